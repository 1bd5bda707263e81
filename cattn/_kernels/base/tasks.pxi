# The threads of a call: how many, how they share its tasks, and how a signal ends them all.
#
# A call gets the number it asks for, or else an equal share, with the calls in flight, of the default; one inside
# a parallel region, and for less work than pays for waking a second. Its threads take the tasks one by one.
#
# Python runs the handlers of signals (Ctrl-C: KeyboardInterrupt) in its main thread alone, between two bytecodes. A
# call of minutes would hold them back that long; so in a long call the main thread lets them run every POLL_MS. When a
# handler raises, all threads leave where they ask next, and the entry raises.
#
#     each thread: take a task, do it, again, until none is left           take_task, stopped_by_signal, task_done
#     the caller, when none is left for it: wait for the others' last      await_others
#
# `run_signal_handlers` is the one place below an entry where a thread has the GIL and Python code runs. A handler may
# call cattn again: from within the threads of a call, with one.

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
    #if !defined(CLOCK_MONOTONIC_COARSE)  /* 5 ns instead of 20, exact to 10 ms */
    #define CLOCK_MONOTONIC_COARSE CLOCK_MONOTONIC
    #endif
    static int64_t cattn_milliseconds(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    }
    """
    int64_t milliseconds "cattn_milliseconds"() noexcept nogil
    void sched_yield() noexcept nogil

cdef enum:
    MAX_THREADS = 1024         # scratch is allocated for each, before it is known how many can be started
    SERIAL_FLOPS = 1_000_000   # below about 10 us of work, waking a second thread costs more than it brings
    TASKS_PER_THREAD = 4       # fewer leave threads idle at the end
    LONG_FLOPS = 100_000_000   # about 1 ms; 0.1 s where a core does 1 GFLOP/s. Shorter calls are not watched
    # A thread that runs Python all the time gives up the GIL after 5 ms: waiting for it is 5 % of the caller's time.
    POLL_MS = 100
    YIELDS = 100               # 30 to 50 us, as long as OpenMP spins in a barrier, before the caller sleeps


cdef struct Call:
    Py_ssize_t num_threads
    bint in_flight                  # counted in calls_in_flight
    Py_ssize_t num_tasks
    Py_ssize_t next_task            # atomic
    Py_ssize_t unfinished           # atomic; tasks, kept in watched calls
    Py_ssize_t stop                 # atomic; 1: a handler has raised, its exception is set in the caller's thread state
    PyThread_type_lock finished     # held until unfinished is 0; NULL: a call that nobody watches
    int64_t next_poll               # of the caller
    fp_mode mode                    # of the caller's thread, for handlers and afterwards


cdef int begin_call(Call* call, Py_ssize_t num_threads, double flops) except -1:
    """call (OUT), but for its tasks. num_threads: 0 for a share of the default. Calls that may take long are watched,
    if their thread is the one that has handlers to run."""
    cdef Py_ssize_t calls
    cdef bint watched = flops >= LONG_FLOPS and handles_signals()
    call.num_threads = 1
    call.in_flight = flops >= SERIAL_FLOPS
    call.next_task = call.stop = 0
    call.mode = get_mode()
    call.finished = NULL
    if call.in_flight:
        calls = atomic_add(&calls_in_flight, 1) + 1
        if one_thread() == NULL:
            call.num_threads = min(num_threads if num_threads else share_of_default(calls), MAX_THREADS)
    if watched:
        call.next_poll = milliseconds() + POLL_MS
        call.finished = PyThread_allocate_lock()
        if call.finished == NULL:
            end_call(call)
            raise MemoryError("cattn: no memory for a lock")
        PyThread_acquire_lock(call.finished, NOWAIT_LOCK)
    return 0


cdef int end_call(Call* call) except -1:
    """-1, which raises what a handler has raised, if one did."""
    set_mode(call.mode)
    if call.in_flight:
        atomic_add(&calls_in_flight, -1)
    if call.finished != NULL:
        PyThread_acquire_lock(call.finished, NOWAIT_LOCK)  # or it is held already: a lock is released before it goes
        PyThread_release_lock(call.finished)
        PyThread_free_lock(call.finished)
    return -1 if call.stop else 0


cdef bint run_signal_handlers(Call* call) noexcept nogil:
    """Lets Python run the handlers of signals that have come. True when one raised."""
    cdef PyGILState_STATE gil
    cdef Py_ssize_t forks_before = forks
    set_mode(call.mode)
    gil = PyGILState_Ensure()
    if PyErr_CheckSignals():
        atomic_set(&call.stop, 1)
    if forks != forks_before and call.num_threads > 1:
        Py_FatalError("cattn: a signal handler forked during a call, and the child returned from the handler into "
                      "the call, whose other threads it does not have")
    PyGILState_Release(gil)
    set_mode(OWN_MODE)
    call.next_poll = milliseconds() + POLL_MS
    return atomic_read(&call.stop)


cdef inline bint stopped_by_signal(Call* call) noexcept nogil:
    """True when a call is to end early. Every thread asks between pieces of work of some 10 us, a block of keys or of
    dimensions, say; the caller runs handlers then, when it is time."""
    if call.finished == NULL:
        return False
    if atomic_read(&call.stop):
        return True
    return threadid() == 0 and milliseconds() >= call.next_poll and run_signal_handlers(call)


ctypedef void (*Work)(const void* what, char* scratch) noexcept nogil


cdef void in_threads(Call* call, Work work, const void* what, char* scratch, size_t size) noexcept nogil:
    """work(what, scratch) in each of at most call.num_threads threads (IN/OUT), each with `size` bytes of scratch."""
    call.num_threads = start_threads(call.num_threads)
    if call.num_threads == 1:
        work(what, scratch)
        return
    with parallel(num_threads=call.num_threads):
        threads_started()
        work(what, scratch + threadid() * size)


cdef inline Py_ssize_t take_task(Call* call) noexcept nogil:
    return atomic_add(&call.next_task, 1)


cdef inline void task_done(Call* call) noexcept nogil:
    if call.finished != NULL and atomic_add(&call.unfinished, -1) == 1:
        PyThread_release_lock(call.finished)


cdef void await_others(Call* call) noexcept nogil:
    """The caller, out of tasks, waits here instead of in OpenMP's barrier, where it would see no signal."""
    cdef int i
    if threadid() != 0:
        return
    for i in range(YIELDS):
        if call.finished == NULL or atomic_read(&call.unfinished) == 0 or stopped_by_signal(call):
            return
        sched_yield()
    # Back early when a signal comes.
    while PyThread_acquire_lock_timed(call.finished, 1000 * POLL_MS, 1) != PY_LOCK_ACQUIRED:
        if run_signal_handlers(call):
            return


cdef inline char* take(char* base, size_t* used, size_t bytes) noexcept nogil:
    cdef char* piece = base + used[0]
    used[0] += round_up(bytes, 64)
    return piece
