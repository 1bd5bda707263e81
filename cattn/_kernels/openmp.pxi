# The OpenMP runtime: what it is, and its one trap. GCC's (12 to 16) deadlocks when a process forks after its first
# parallel region and the child enters one: the child inherits a pool of threads that do not exist in it. So, before
# each fork, the pool of the forking thread is dissolved (25 to 35 us; the next region makes a new one in 40 to 60 us).
# Where the runtime cannot do that, the child computes with one thread.

cdef extern from *:
    """
    #if defined(_OPENMP) && !defined(_WIN32)
    #include <omp.h>
    #include <pthread.h>
    #if defined(__clang__) || __GNUC__ >= 9
    #pragma weak omp_pause_resource_all
    static int cattn_dissolve_pool(void) {
        return omp_pause_resource_all ? omp_pause_resource_all(omp_pause_soft) == 0 : 0;
    }
    #else
    static int cattn_dissolve_pool(void) { return 0; }
    #endif
    static int cattn_pool_dissolved = 0, cattn_child_is_serial = 0, cattn_forks = 0;
    static void cattn_before_fork(void) { cattn_pool_dissolved = cattn_dissolve_pool(); }
    static void cattn_in_child(void) { cattn_child_is_serial |= !cattn_pool_dissolved; cattn_forks++; }
    static int cattn_watch_forks(void) { return pthread_atfork(cattn_before_fork, NULL, cattn_in_child); }
    #else
    static int cattn_child_is_serial = 0, cattn_forks = 0;
    static int cattn_watch_forks(void) { return 0; }
    #endif

    #if defined(__clang__)
    #define CATTN_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define CATTN_COMPILER "gcc " __VERSION__
    #else
    #define CATTN_COMPILER "unknown"
    #endif
    #if !defined(_OPENMP)
    #define CATTN_OPENMP "none (the compiler has none): one thread"
    #elif defined(__clang__)
    #define CATTN_OPENMP "libomp"
    #else
    #define CATTN_OPENMP "libgomp"
    #endif
    #ifdef _OPENMP
    #define CATTN_OPENMP_DATE _OPENMP
    #else
    #define CATTN_OPENMP_DATE 0
    #endif
    """
    const char* CATTN_COMPILER
    const char* CATTN_OPENMP
    const int CATTN_OPENMP_DATE
    bint cattn_child_is_serial
    int cattn_forks    # that this process is away from the one that imported cattn
    int cattn_watch_forks() noexcept


if cattn_watch_forks():
    raise MemoryError("cattn: pthread_atfork found no memory for its handlers")


def build_info():
    """How this module was built."""
    openmp = CATTN_OPENMP.decode()
    return {
        "compiler": CATTN_COMPILER.decode(),
        "openmp": f"{openmp} (specification {CATTN_OPENMP_DATE})" if CATTN_OPENMP_DATE else openmp,
    }
