# The OpenMP runtime: what it is, how many threads it lets a call have, and that it does not end the process.
#
# GCC's does that ("libgomp: Thread creation failed", "libgomp: Out of memory") wherever it cannot start a thread, or
# finds no memory for one of its own small blocks. So before a region that needs more than the pool of its thread has,
# as many are started and ended here, all at once, with stacks as large as OpenMP's: what cannot be started is not asked
# for. The pool is what the thread's last region had, in whichever module: threads beyond that have been ended.
#
# in_threads (tasks.pxi) enters a region so, and measure.pxi:
#
#     threads = start_threads(threads)             at most as many; nothing comes between this and the region
#     if threads == 1:
#         do it
#     else:
#         with parallel(num_threads=threads):
#             threads_started()
#             do it
#
# Starts in other Python threads wait from start_threads until threads_started: else two would find the same room. What
# is not cattn's may take it still, or make the pool smaller: other processes of the user, threads of other packages,
# their parallel regions in the same thread.

cdef extern from *:
    """
    #include <limits.h>
    #if defined(_OPENMP)
    #include <omp.h>
    #include <pthread.h>
    #include <sched.h>
    #include <time.h>
    #include <unistd.h>
    #if defined(__linux__)
    #include <sys/syscall.h>
    #endif
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
    __asm__(".symver pthread_attr_setstacksize, pthread_attr_setstacksize@" CATTN_OLD_GLIBC);
    #endif
    #if defined(__clang__) || __GNUC__ >= 9
    #pragma weak omp_pause_resource_all
    static int cattn_dissolve_pool(void) {
        return omp_pause_resource_all ? omp_pause_resource_all(omp_pause_soft) == 0 : 0;
    }
    #else
    static int cattn_dissolve_pool(void) { return 0; }
    #endif
    struct cattn_probe {
        pthread_t thread;
        pthread_mutex_t* gate;
        long id;
    };
    static void* cattn_pass(void* argument) {
        struct cattn_probe* probe = (struct cattn_probe*)argument;
    #if defined(__linux__)
        probe->id = syscall(SYS_gettid);
    #endif
        pthread_mutex_lock(probe->gate);
        pthread_mutex_unlock(probe->gate);
        return NULL;
    }
    /* A thread that has been joined counts as one of the user's for some microseconds more: the kernel says when it is
       gone. Not longer than 0.1 s: another thread may have been given the same number. */
    static void cattn_await_end(long id) {
    #if defined(__linux__)
        struct timespec nap = {0, 100000};
        int i;
        for (i = 0; i < 1000 && syscall(SYS_tgkill, getpid(), id, 0) == 0; i++)
            if (i < 50) sched_yield(); else nanosleep(&nap, NULL);
    #else
        (void)id;
    #endif
    }
    /* How many more threads can be started, `wanted` at most. probes (SCRATCH): one for each. */
    static int cattn_startable(int wanted, size_t stack_size, struct cattn_probe* probes) {
        pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
        pthread_attr_t attributes;
        int i, started = 0;
        if (pthread_attr_init(&attributes)) return 0;
        if (stack_size) pthread_attr_setstacksize(&attributes, stack_size); /* refused: the default, as in libgomp */
        pthread_mutex_lock(&gate);
        while (started < wanted) {
            probes[started].gate = &gate;
            if (pthread_create(&probes[started].thread, &attributes, cattn_pass, &probes[started])) break;
            started++;
        }
        pthread_mutex_unlock(&gate);
        for (i = 0; i < started; i++) pthread_join(probes[i].thread, NULL);
        for (i = 0; i < started; i++) cattn_await_end(probes[i].id);
        pthread_attr_destroy(&attributes);
        return started;
    }
    #define CATTN_OPENMP_DATE _OPENMP
    /* Negative: OMP_NUM_THREADS has a long that is no int, and calls ask for a number of their own. */
    #define CATTN_MAX_THREADS (omp_get_max_threads() > 0 ? omp_get_max_threads() : INT_MAX)
    #define CATTN_THREAD_LIMIT omp_get_thread_limit()
    #define CATTN_BOUND_CPUS (omp_get_proc_bind() == omp_proc_bind_false ? 0 : omp_get_num_procs())
    #define CATTN_NO_REGIONS (omp_get_max_active_levels() == 0)
    #define CATTN_LEVEL omp_get_level()
    #define CATTN_TEAM omp_get_num_threads()
    #define CATTN_AWAIT_TEAM() _Pragma("omp barrier")
    #else
    struct cattn_probe { char none; };
    static int cattn_dissolve_pool(void) { return 1; }
    static int cattn_startable(int wanted, size_t stack_size, struct cattn_probe* probes) {
        (void)stack_size, (void)probes;
        return wanted;
    }
    #define CATTN_OPENMP_DATE 0
    #define CATTN_MAX_THREADS 1
    #define CATTN_THREAD_LIMIT 1
    #define CATTN_BOUND_CPUS 0
    #define CATTN_NO_REGIONS 1
    #define CATTN_LEVEL 0
    #define CATTN_TEAM 1
    #define CATTN_AWAIT_TEAM() ((void)0)
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
    """
    const char* CATTN_COMPILER
    const char* CATTN_OPENMP
    const int CATTN_OPENMP_DATE
    const int CATTN_LEVEL  # of nested parallel regions, also of one thread: a region in one of those has no pool
    const int CATTN_TEAM   # threads of the region that this is in
    const bint CATTN_NO_REGIONS
    const Py_ssize_t CATTN_MAX_THREADS
    const Py_ssize_t CATTN_THREAD_LIMIT  # that OMP_THREAD_LIMIT sets: regions get no more, whatever they ask for
    const Py_ssize_t CATTN_BOUND_CPUS    # the CPUs of this process, where OpenMP binds its threads; else 0
    void await_team "CATTN_AWAIT_TEAM"() noexcept nogil  # all threads of the region: Cython's prange ends without it
    ctypedef struct Probe "struct cattn_probe":
        pass
    int cattn_dissolve_pool() noexcept nogil
    int cattn_startable(int wanted, size_t stack_size, Probe* probes) noexcept nogil

cdef enum:
    # What libgomp allocates for a region: 2 KB, and for each thread less than 400 bytes (GCC 12); the C library for
    # each thread's start 1 KB. Both with room to spare.
    REGION_BYTES = 65536
    REGION_THREAD_BYTES = 2048

if dissolve_pool == NULL and CATTN_OPENMP_DATE:
    dissolve_pool = cattn_dissolve_pool


cdef int start_threads(Py_ssize_t wanted) noexcept nogil:
    """The threads, at most `wanted`, that the next region can have, its caller included. 1: no region can be entered.
    More: it has to follow, since no other thread starts any until threads_started."""
    cdef int* pool
    cdef int threads
    cdef size_t reserved
    cdef void* reserve
    if wanted <= 1 or CATTN_THREAD_LIMIT == 1 or one_thread() != NULL:
        return 1
    pool = pool_of_this_thread()
    threads = <int> min(wanted, MAX_THREADS, CATTN_THREAD_LIMIT)
    if threads == pool[0]:  # the region finds its threads, and libgomp what it has allocated for them
        return threads
    if threads > pool[0]:
        hold_starts()
    reserved = REGION_BYTES + <size_t> threads * REGION_THREAD_BYTES
    reserve = malloc(reserved)
    if reserve == NULL:
        threads = 1
    elif threads > pool[0]:
        threads = pool[0] + cattn_startable(threads - pool[0], stack_size, <Probe*> reserve)
    free(reserve)  # libgomp's blocks are smaller
    if threads == 1:
        release_starts()
    return threads


cdef void threads_started() noexcept nogil:
    """Each thread of a region says so, first of all. OpenMP has started all of them then, and may have given fewer than
    it was asked for (OMP_DYNAMIC)."""
    if threadid() == 0:
        if CATTN_TEAM > 1:  # a team of one leaves the pool as it is
            pool_of_this_thread()[0] = CATTN_TEAM
        release_starts()


cdef const char* one_thread() noexcept nogil:
    """Why a call gets one thread whatever it asks for; NULL: it does not."""
    if not CATTN_OPENMP_DATE:
        return "a build without OpenMP"
    if child_is_serial:
        return "a fork, with an OpenMP that cannot take one"
    if CATTN_LEVEL:
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
