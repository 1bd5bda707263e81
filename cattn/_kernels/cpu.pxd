# What the modules of all instruction sets and precisions have in common. Counters and numbers here are atomic: any
# Python thread may be in a call, on free-threaded interpreters in set_num_threads too.

cdef extern from *:
    """
    #define CATTN_ADD(counter, n) __atomic_fetch_add(counter, n, __ATOMIC_ACQ_REL)
    #define CATTN_READ(counter) __atomic_load_n(counter, __ATOMIC_ACQUIRE)
    #define CATTN_SET(counter, value) __atomic_store_n(counter, value, __ATOMIC_RELEASE)
    #define CATTN_SWAP(pointer, value) __atomic_exchange_n(pointer, value, __ATOMIC_ACQ_REL)
    """
    Py_ssize_t atomic_add "CATTN_ADD"(Py_ssize_t*, Py_ssize_t) noexcept nogil
    Py_ssize_t atomic_read "CATTN_READ"(const Py_ssize_t*) noexcept nogil
    void atomic_set "CATTN_SET"(Py_ssize_t*, Py_ssize_t) noexcept nogil
    char* atomic_swap "CATTN_SWAP"(char**, char*) noexcept nogil

cdef Py_ssize_t default_threads    # shared by the calls that do not ask for a number
cdef Py_ssize_t openmp_threads     # what OpenMP starts with; it says less where something limits it at run time
cdef Py_ssize_t calls_in_flight

cdef char* take_scratch(size_t size) noexcept nogil     # from the start of a cache line on; NULL: there is no memory
cdef void give_scratch(char* scratch) noexcept nogil    # back, for the next call; not NULL

# Threads and forks: cpu.pyx keeps them for all modules, since OpenMP has one pool of threads for each calling thread,
# whichever module it calls in. start_threads and threads_started (openmp.pxi) are what uses them.
cdef int* pool_of_this_thread() noexcept nogil  # the threads that OpenMP keeps for this one, and itself
cdef void hold_starts() noexcept nogil          # until release_starts, no other thread's pool grows
cdef void release_starts() noexcept nogil       # if this thread holds them
cdef size_t stack_size                          # of OpenMP's threads; 0: what the C library gives each thread
cdef int (*dissolve_pool)() noexcept nogil      # True when it could; NULL: no module with OpenMP is loaded
cdef bint child_is_serial
cdef Py_ssize_t forks                           # that this process is away from the one that imported cattn
cdef bint handles_signals() except -1           # in this thread, Python runs the handlers of signals
