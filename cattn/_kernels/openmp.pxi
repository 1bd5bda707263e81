# The OpenMP runtime: what it is, how many threads it lets a call have, and its two traps. GCC's (12 to 16) deadlocks
# when a process forks after its first parallel region and the child enters one: the child inherits a pool of threads
# that do not exist in it. So, before each fork, the pool of the forking thread is dissolved (25 to 35 us; the next
# region makes a new one in 40 to 60 us). Where the runtime cannot do that, the child computes with one thread.
#
# And the runtime ends the process when it cannot start a thread. So before a region that needs more than the pool has,
# as many are started and ended here, all at once: what cannot be started is not asked for, and the stacks of what could
# stay with the C library, where the region finds them.

cdef extern from *:
    """
    #include <limits.h>
    #if defined(_OPENMP) && !defined(_WIN32)
    #include <omp.h>
    #include <pthread.h>
    /* glibc 2.34 moved these; by their old versions, which it keeps, a build with it runs on older ones as well. */
    #if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    #if defined(__x86_64__)
    #define CATTN_OLD_GLIBC "GLIBC_2.2.5"
    #elif defined(__aarch64__)
    #define CATTN_OLD_GLIBC "GLIBC_2.17"
    #endif
    #endif
    #if defined(CATTN_OLD_GLIBC)
    __asm__(".symver pthread_create, pthread_create@" CATTN_OLD_GLIBC);
    __asm__(".symver pthread_join, pthread_join@" CATTN_OLD_GLIBC);
    #endif
    #if defined(__clang__) || __GNUC__ >= 9
    #pragma weak omp_pause_resource_all
    static int cattn_dissolve_pool(void) {
        return omp_pause_resource_all ? omp_pause_resource_all(omp_pause_soft) == 0 : 0;
    }
    #else
    static int cattn_dissolve_pool(void) { return 0; }
    #endif
    static __thread int cattn_pool = 1; /* threads that this thread's last region had */
    static int cattn_pool_dissolved = 0, cattn_child_is_serial = 0, cattn_forks = 0;
    static void cattn_before_fork(void) {
        cattn_pool_dissolved = cattn_dissolve_pool();
        cattn_pool = 1;
    }
    static void cattn_in_child(void) { cattn_child_is_serial |= !cattn_pool_dissolved; cattn_forks++; }
    static int cattn_watch_forks(void (*in_child)(void)) {
        return pthread_atfork(cattn_before_fork, NULL, cattn_in_child) || pthread_atfork(NULL, NULL, in_child);
    }
    static void* cattn_pass(void* gate) {
        pthread_mutex_lock((pthread_mutex_t*) gate);
        pthread_mutex_unlock((pthread_mutex_t*) gate);
        return NULL;
    }
    static int cattn_startable(int wanted) {
        enum { AT_MOST = 1024 };
        pthread_t started[AT_MOST];
        pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
        int i, more = 0;
        if (wanted > omp_get_thread_limit()) wanted = omp_get_thread_limit();
        if (wanted > cattn_pool) {
            pthread_mutex_lock(&gate);
            while (more < wanted - cattn_pool && more < AT_MOST
                   && pthread_create(&started[more], NULL, cattn_pass, &gate) == 0) more++;
            pthread_mutex_unlock(&gate);
            for (i = 0; i < more; i++) pthread_join(started[i], NULL);
            wanted = cattn_pool + more;
        }
        return cattn_pool = wanted;
    }
    #else
    static int cattn_startable(int wanted) { return wanted; }
    static int cattn_child_is_serial = 0, cattn_forks = 0;
    static int cattn_watch_forks(void (*in_child)(void)) { (void)in_child; return 0; }
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
    /* Negative: OMP_NUM_THREADS has a long that is no int, and calls ask for a number of their own. */
    #define CATTN_MAX_THREADS (omp_get_max_threads() > 0 ? omp_get_max_threads() : INT_MAX)
    #define CATTN_THREAD_LIMIT omp_get_thread_limit()
    #define CATTN_BOUND_CPUS (omp_get_proc_bind() == omp_proc_bind_false ? 0 : omp_get_num_procs())
    #define CATTN_IN_PARALLEL omp_in_parallel()
    #define CATTN_NO_REGIONS (omp_get_max_active_levels() == 0)
    #else
    #define CATTN_OPENMP_DATE 0
    #define CATTN_MAX_THREADS 1
    #define CATTN_THREAD_LIMIT 1
    #define CATTN_BOUND_CPUS 0
    #define CATTN_IN_PARALLEL 0
    #define CATTN_NO_REGIONS 1
    #endif
    """
    const char* CATTN_COMPILER
    const char* CATTN_OPENMP
    const int CATTN_OPENMP_DATE
    bint cattn_child_is_serial
    int cattn_forks    # that this process is away from the one that imported cattn
    const bint CATTN_IN_PARALLEL
    const bint CATTN_NO_REGIONS
    const Py_ssize_t CATTN_MAX_THREADS
    const Py_ssize_t CATTN_THREAD_LIMIT  # that OMP_THREAD_LIMIT sets: regions get no more, whatever they ask for
    const Py_ssize_t CATTN_BOUND_CPUS    # the CPUs of this process, where OpenMP binds its threads; else 0
    int cattn_watch_forks(void (*in_child)() noexcept nogil) noexcept
    int cattn_startable(int wanted) noexcept nogil  # of the `wanted` threads of the next region, its caller included


cdef void forget_calls() noexcept nogil:
    """A child of fork has none of the threads that are in a call of the parent."""
    atomic_set(&calls_in_flight, 0)


if cattn_watch_forks(forget_calls):
    raise MemoryError("cattn: pthread_atfork found no memory for its handlers")


cdef const char* one_thread() noexcept nogil:
    """Why a call gets one thread whatever it asks for; NULL: it does not."""
    if not CATTN_OPENMP_DATE:
        return "a build without OpenMP"
    if cattn_child_is_serial:
        return "a fork, with an OpenMP that cannot take one"
    if CATTN_IN_PARALLEL:
        return "a parallel region"
    if CATTN_NO_REGIONS:
        return "OMP_MAX_ACTIVE_LEVELS"
    return NULL


cdef bint openmp_is_limited() noexcept nogil:
    """True when this Python thread runs with fewer OpenMP threads than at the start."""
    return CATTN_MAX_THREADS < atomic_read(&openmp_threads)


cdef Py_ssize_t share_of_default(Py_ssize_t calls) noexcept nogil:
    """The threads of each of so many calls that do not ask for a number."""
    cdef Py_ssize_t threads = atomic_read(&default_threads)
    if openmp_is_limited():
        threads = min(threads, CATTN_MAX_THREADS)
    threads = min(threads, CATTN_THREAD_LIMIT)
    return max(1, threads // max(1, calls))  # 0 after a fork in a handler in a call: forgotten in the child, then ended


def default_num_threads():
    """The threads of a call that asks for no number and is alone, and what keeps it from more, if anything does."""
    cdef const char* reason = one_thread()
    cdef Py_ssize_t threads = share_of_default(1)
    if reason != NULL:
        return 1, reason.decode()
    if threads == CATTN_THREAD_LIMIT < atomic_read(&default_threads):
        return threads, "OMP_THREAD_LIMIT"
    return threads, "threadpoolctl or omp_set_num_threads" if openmp_is_limited() else None


def bound_cpus():
    """The CPUs that this process had when OpenMP was loaded, where OpenMP binds its threads to CPUs; 0 where it does
    not. The affinity of the thread that loaded it is one place of them from then on."""
    return CATTN_BOUND_CPUS


def build_info():
    """How this module was built."""
    openmp = CATTN_OPENMP.decode()
    return {
        "compiler": CATTN_COMPILER.decode(),
        "openmp": f"{openmp} (specification {CATTN_OPENMP_DATE})" if CATTN_OPENMP_DATE else openmp,
    }
