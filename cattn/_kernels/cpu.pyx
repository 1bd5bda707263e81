"""Which of the features named in isa.py this CPU has and its operating system saves; the number of threads that calls
share (cpu.pxd)."""

cdef extern from *:
    """
    #include <string.h>
    #if defined(__x86_64__) || defined(_M_X64)
    /* The builtin wants literal names, and asks the operating system (XGETBV) as well as the CPU. */
    #define CATTN_CPU_FEATURES(X) X("avx2") X("fma") X("f16c") X("avx512f") X("avx512dq") X("avx512bw") X("avx512vl")
    static int cattn_cpu_supports(const char *feature) {
        __builtin_cpu_init();
        #define X(name) if (strcmp(feature, name) == 0) return __builtin_cpu_supports(name) != 0;
        CATTN_CPU_FEATURES(X)
        #undef X
        return 0;
    }
    #else
    static int cattn_cpu_supports(const char *feature) { (void)feature; return 0; }
    #endif
    """
    int cattn_cpu_supports(const char* feature) noexcept


def supports(str feature) -> bool:
    """True when this CPU, and the operating system on it, can run code compiled with -m<feature>."""
    return cattn_cpu_supports(feature.encode()) != 0


def set_threads(Py_ssize_t default, Py_ssize_t openmp):
    """For cattn/threads.py, which decides both numbers."""
    atomic_set(&default_threads, default)
    atomic_set(&openmp_threads, openmp)
