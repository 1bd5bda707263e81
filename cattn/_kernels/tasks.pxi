# The tasks of a call: its threads take them one by one, and a signal can end them all.
#
# Python runs the handlers of signals (Ctrl-C: KeyboardInterrupt) in its main thread alone, between two bytecodes. A
# call of minutes would hold them back that long; so in a long call the main thread lets them run every POLL_MS. When a
# handler raises, all threads leave at the next block of keys, and the entry raises.
#
#     each thread: take a task, do it, again, until none is left           take_task, stopped, task_done
#     the caller, when none is left for it: wait for the others' last      await_others
#
# `poll` is the one place below an entry where a thread has the GIL and Python code runs. A handler may call cattn
# again, and gets one thread for it.

cdef extern from "Python.h" nogil:
    ctypedef int PyGILState_STATE
    ctypedef void* PyThread_type_lock
    ctypedef int PyLockStatus
    const int NOWAIT_LOCK
    const PyLockStatus PY_LOCK_ACQUIRED
    PyGILState_STATE PyGILState_Ensure() noexcept
    void PyGILState_Release(PyGILState_STATE) noexcept
    int PyErr_CheckSignals() noexcept
    void Py_FatalError(const char*) noexcept
    PyThread_type_lock PyThread_allocate_lock() noexcept
    int PyThread_acquire_lock(PyThread_type_lock, int) noexcept
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock, long long, int) noexcept
    void PyThread_release_lock(PyThread_type_lock) noexcept
    void PyThread_free_lock(PyThread_type_lock) noexcept

cdef extern from *:
    """
    #include <sched.h>
    #include <time.h>
    #include <unistd.h>
    #if defined(__linux__)
    #include <sys/syscall.h>
    #define CATTN_IN_MAIN_THREAD (syscall(SYS_gettid) == getpid())
    #else
    #include <pthread.h>
    #define CATTN_IN_MAIN_THREAD pthread_main_np()
    #endif
    #if !defined(CLOCK_MONOTONIC_COARSE)  /* 5 ns instead of 20, exact to 10 ms */
    #define CLOCK_MONOTONIC_COARSE CLOCK_MONOTONIC
    #endif
    static int64_t cattn_milliseconds(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    }
    #define CATTN_ADD(counter, n) __atomic_fetch_add(counter, n, __ATOMIC_ACQ_REL)
    #define CATTN_READ(flag) __atomic_load_n(flag, __ATOMIC_ACQUIRE)
    #define CATTN_SET(flag) __atomic_store_n(flag, 1, __ATOMIC_RELEASE)
    """
    const bint CATTN_IN_MAIN_THREAD
    int64_t milliseconds "cattn_milliseconds"() noexcept nogil
    Py_ssize_t atomic_add "CATTN_ADD"(Py_ssize_t*, Py_ssize_t) noexcept nogil
    Py_ssize_t atomic_read "CATTN_READ"(const Py_ssize_t*) noexcept nogil
    void atomic_set "CATTN_SET"(Py_ssize_t*) noexcept nogil
    void sched_yield() noexcept nogil

cdef enum:
    LONG_FLOPS = 100_000_000  # about a millisecond; 0.1 s where a core does 1 GFLOP/s. Shorter calls are not watched
    # A thread that runs Python all the time gives up the GIL after 5 ms: waiting for it is 5 % of the caller's time.
    POLL_MS = 100
    YIELDS = 100              # 30 to 50 us, as long as OpenMP spins in a barrier, before the caller sleeps


cdef struct Tasks:
    Py_ssize_t count, num_threads
    Py_ssize_t next                 # atomic; the next to be taken
    Py_ssize_t unfinished           # atomic; kept in watched calls
    Py_ssize_t stop                 # atomic; 1: a handler has raised, its exception is set in the caller's thread state
    PyThread_type_lock finished     # held until unfinished is 0; NULL: a call that nobody watches
    int64_t next_poll               # of the caller


cdef int begin_tasks(Tasks* t, Py_ssize_t count, Py_ssize_t num_threads, double flops) except -1:
    """t (OUT). Calls that may take long are watched, if their thread is the one that has handlers to run."""
    t.count = t.unfinished = count
    t.num_threads = num_threads
    t.next = t.stop = 0
    t.finished = NULL
    if flops >= LONG_FLOPS and CATTN_IN_MAIN_THREAD:
        t.next_poll = milliseconds() + POLL_MS
        t.finished = PyThread_allocate_lock()
        if t.finished == NULL:
            raise MemoryError("cattn: no memory for a lock")
        PyThread_acquire_lock(t.finished, NOWAIT_LOCK)
    return 0


cdef int end_tasks(Tasks* t) except -1:
    """-1, which raises what a handler has raised, if one did."""
    if t.finished != NULL:
        PyThread_acquire_lock(t.finished, NOWAIT_LOCK)  # or it is held already: a lock is released before it goes
        PyThread_release_lock(t.finished)
        PyThread_free_lock(t.finished)
    return -1 if t.stop else 0


cdef bint poll(Tasks* t) noexcept nogil:
    """Lets Python run the handlers of signals that have come. True when one raised."""
    cdef PyGILState_STATE gil = PyGILState_Ensure()
    cdef int forks = cattn_forks
    if PyErr_CheckSignals():
        atomic_set(&t.stop)
    if cattn_forks != forks and t.num_threads > 1:
        Py_FatalError("cattn: a signal handler forked during a call, and the child returned from the handler into "
                      "the call, whose other threads it does not have")
    PyGILState_Release(gil)
    t.next_poll = milliseconds() + POLL_MS
    return atomic_read(&t.stop)


cdef inline bint stopped(Tasks* t) noexcept nogil:
    """True when a call is to end early. Every thread asks once a block of keys; the caller polls then."""
    if t.finished == NULL:
        return False
    return atomic_read(&t.stop) or (threadid() == 0 and milliseconds() >= t.next_poll and poll(t))


cdef inline Py_ssize_t take_task(Tasks* t) noexcept nogil:
    return atomic_add(&t.next, 1)


cdef inline void task_done(Tasks* t) noexcept nogil:
    if t.finished != NULL and atomic_add(&t.unfinished, -1) == 1:
        PyThread_release_lock(t.finished)


cdef void await_others(Tasks* t) noexcept nogil:
    """The caller, out of tasks, waits here instead of in OpenMP's barrier, where it would see no signal."""
    cdef int i
    for i in range(YIELDS):
        if t.finished == NULL or atomic_read(&t.unfinished) == 0 or stopped(t):
            return
        sched_yield()
    # Back early when a signal comes.
    while PyThread_acquire_lock_timed(t.finished, 1000 * POLL_MS, 1) != PY_LOCK_ACQUIRED and not poll(t):
        pass
