"""Which of the features named in isa.py this CPU has and its operating system saves; how fast it spins; the number of
threads that calls share (cpu.pxd)."""

cdef extern from *:
    """
    #include <string.h>
    #include <time.h>
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
    #if defined(__x86_64__)
    #define CATTN_RELAX() __builtin_ia32_pause()
    #else
    #define CATTN_RELAX() __asm__ volatile ("" ::: "memory")
    #endif
    /* As GCC's OpenMP spins, gomp_barrier_wait: reads a word, relaxes. */
    static double cattn_seconds_to_spin(long rounds) {
        static int word;
        struct timespec start, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        while (rounds-- && __atomic_load_n(&word, __ATOMIC_RELAXED) == 0) CATTN_RELAX();
        clock_gettime(CLOCK_MONOTONIC, &end);
        return (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    }
    """
    int cattn_cpu_supports(const char* feature) noexcept
    double cattn_seconds_to_spin(long rounds) noexcept nogil


def supports(str feature) -> bool:
    """True when this CPU, and the operating system on it, can run code compiled with -m<feature>."""
    return cattn_cpu_supports(feature.encode()) != 0


def spin_rounds(double seconds):
    """How often GCC's OpenMP asks whether there is work in that time. A round takes 1 to 60 ns: x86's pause lasts from
    10 cycles to 140, and on other CPUs it is no pause at all. The fastest of three tries: one can be interrupted."""
    cdef long rounds = 200
    cdef double fastest = min([cattn_seconds_to_spin(rounds) for _ in range(3)])
    return max(1, <long> (seconds / max(fastest, 1e-9) * rounds))


def set_threads(Py_ssize_t default, Py_ssize_t openmp):
    """For cattn/threads.py, which decides both numbers."""
    atomic_set(&default_threads, default)
    atomic_set(&openmp_threads, openmp)
