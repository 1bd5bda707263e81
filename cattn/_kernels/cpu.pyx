"""What all kernels' modules share: which of the features named in isa.py this CPU has and its operating system saves;
how fast it spins, and decodes; the number of threads that calls share; the size of each thread's pool of OpenMP
threads, whose turn it is to start some, and what becomes of all that in a child of fork (cpu.pxd)."""

from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc

from signal import set_wakeup_fd

cdef extern from *:
    """
    #include <ctype.h>
    #include <errno.h>
    #include <limits.h>
    #include <pthread.h>
    #include <stdlib.h>
    #include <string.h>
    #include <time.h>
    /* Of the table's features for this machine, X("avx2") X("fma") ... from setup.py: the builtin wants literal names.
       It asks the operating system (XGETBV) as well as the CPU. */
    static int cattn_cpu_supports(const char *feature) {
        #define X(name) if (strcmp(feature, name) == 0) return __builtin_cpu_supports(name) != 0;
        CATTN_CPU_FEATURES
        #undef X
        return 0;
    }
    static int cattn_cpu_is(const char *name) {
        #define X(known) if (strcmp(name, known) == 0) return __builtin_cpu_is(known) != 0;
        CATTN_CPU_NAMES
        #undef X
        return 0;
    }
    /* So that AddressSanitizer sees each call's end of its scratch, none is kept. */
    #if defined(__SANITIZE_ADDRESS__)
    #define CATTN_KEPT_SCRATCH 0
    #else
    #define CATTN_KEPT_SCRATCH ((size_t)32 << 20)
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
    static void cattn_run_nops(long rounds) {
        while (rounds-- > 0) __asm__ volatile (".rept 100\\n\\tnop\\n\\t.endr");
    }
    /* Of each thread. glibc allocates such variables at a thread's first access, and ends the process where it cannot,
       unless they are "initial-exec": then they are there from the start. Other C libraries load no such module. */
    #if defined(__GLIBC__)
    #define CATTN_OF_THREAD static __thread __attribute__((tls_model("initial-exec")))
    #else
    #define CATTN_OF_THREAD static __thread
    #endif
    CATTN_OF_THREAD int cattn_pool = 1, cattn_holds_starts, cattn_pool_dissolved, cattn_signals_asked, cattn_signals;
    static pthread_mutex_t cattn_starts = PTHREAD_MUTEX_INITIALIZER;
    /* As libgomp reads it: 0 for nothing that it would take. `shift`: of the unit where none is given. */
    static size_t cattn_bytes_of(const char* name, int shift) {
        static const char units[] = "bkmg";
        const char* text = getenv(name);
        const char* unit;
        char* end;
        unsigned long value;
        if (text == NULL) return 0;
        errno = 0;
        value = strtoul(text, &end, 10);
        if (errno || end == text) return 0;
        while (isspace((unsigned char)*end)) end++;
        if (*end) {
            unit = strchr(units, tolower((unsigned char)*end));
            if (unit == NULL) return 0;
            shift = 10 * (int)(unit - units);
            for (end++; isspace((unsigned char)*end); end++);
        }
        return *end || value > ULONG_MAX >> shift ? 0 : value << shift;
    }
    static size_t cattn_stack_size(void) {
        size_t size = 0;
    #if defined(__clang__)
        size = cattn_bytes_of("KMP_STACKSIZE", 0);
    #endif
        if (!size) size = cattn_bytes_of("OMP_STACKSIZE", 10);
        if (!size) size = cattn_bytes_of("GOMP_STACKSIZE", 10);
        if (!size) size = cattn_bytes_of("OMP_STACKSIZE_ALL", 10); /* from GCC 13 on */
    #if defined(__clang__)
        if (!size) size = (size_t)4 << 20; /* libomp's own default */
    #endif
        return size;
    }
    """
    int cattn_cpu_supports(const char* feature) noexcept
    double cattn_seconds_to_spin(long rounds) noexcept nogil
    const size_t CATTN_KEPT_SCRATCH
    void cattn_run_nops(long rounds) noexcept nogil
    int cattn_cpu_is(const char* name) noexcept
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t*, void*) noexcept nogil
    int pthread_mutex_lock(pthread_mutex_t*) noexcept nogil
    int pthread_mutex_unlock(pthread_mutex_t*) noexcept nogil
    int pthread_atfork(void (*before)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil) noexcept
    pthread_mutex_t starts "cattn_starts"
    int pool "cattn_pool"
    bint holds_starts "cattn_holds_starts"
    bint pool_dissolved "cattn_pool_dissolved"
    int signals_asked "cattn_signals_asked"  # the number of forks, + 1, at which this thread has asked
    bint signals "cattn_signals"             # the answer
    size_t cattn_stack_size() noexcept


def supports(str feature) -> bool:
    """True when this CPU, and the operating system on it, can run code compiled with -m<feature>."""
    return cattn_cpu_supports(feature.encode()) != 0


def is_a(str name) -> bool:
    """True when this is a CPU of the vendor or family that the table calls so."""
    return cattn_cpu_is(name.encode()) != 0


def spin_rounds(double seconds):
    """How often GCC's OpenMP asks whether there is work in that time. A round takes 1 to 60 ns: x86's pause lasts from
    10 cycles to 140, and on other CPUs it is no pause at all. The fastest of three tries: one can be interrupted."""
    cdef long rounds = 200
    cdef double fastest = min([cattn_seconds_to_spin(rounds) for _ in range(3)])
    return max(1, <long> (seconds / max(fastest, 1e-9) * rounds))


def nops(long rounds):
    """Runs `rounds` times 100 NOPs, without the GIL; returns their number. Of a core they take what decodes
    instructions and nothing else: another hardware thread leaves them half of that, and an FMA loop all it needs."""
    with nogil:
        cattn_run_nops(rounds)
    return 100 * rounds


def set_threads(Py_ssize_t default, Py_ssize_t openmp):
    """For cattn/_threads.py, which decides both numbers."""
    atomic_set(&default_threads, default)
    atomic_set(&openmp_threads, openmp)


# Scratch. One block is kept from call to call. With malloc alone, what a call frees together with its result may be as
# much as glibc returns to the system at once: every call then pays for each page of both anew (8 heads of 128 x 64 on
# two threads of an Intel Xeon: 200 us instead of 126), or none does, as chance has it. Larger ones than glibc would
# keep itself are not kept here either.

cdef enum:
    LINE = 64

cdef struct Block:          # in the line before the scratch
    void* allocated
    size_t size             # of the scratch

cdef char* kept = NULL      # atomic


cdef inline Block* block_of(char* scratch) noexcept nogil:
    return <Block*> (scratch - LINE)


cdef char* take_scratch(size_t size) noexcept nogil:
    cdef char* scratch = atomic_swap(&kept, NULL)
    cdef char* allocated
    if scratch != NULL:
        if block_of(scratch).size >= size:
            return scratch
        free(block_of(scratch).allocated)
    allocated = <char*> malloc(size + 2 * LINE)
    if allocated == NULL:
        return NULL
    scratch = allocated + 2 * LINE - <uintptr_t> allocated % LINE
    block_of(scratch).allocated, block_of(scratch).size = allocated, size
    return scratch


cdef void give_scratch(char* scratch) noexcept nogil:
    if block_of(scratch).size <= CATTN_KEPT_SCRATCH:
        scratch = atomic_swap(&kept, scratch)
    if scratch != NULL:
        free(block_of(scratch).allocated)


# Threads.

# OpenMP reads its environment when it is loaded: by the kernels' module, imported next, unless another package has
# loaded it already; the variables are assumed to be the same then.
stack_size = cattn_stack_size()


cdef int* pool_of_this_thread() noexcept nogil:
    return &pool


cdef void hold_starts() noexcept nogil:
    global holds_starts
    pthread_mutex_lock(&starts)
    holds_starts = True


cdef void release_starts() noexcept nogil:
    global holds_starts
    if holds_starts:
        holds_starts = False
        pthread_mutex_unlock(&starts)


# Forks. GCC's OpenMP (12 to 16) deadlocks when a process forks after its first parallel region and the child enters
# one: the child inherits a pool of threads that do not exist in it. So, before each fork, the pool of the forking
# thread is dissolved (25 to 35 us; the next region makes another in 40 to 60 us). Where the runtime cannot do that, the
# child computes with one thread.

cdef void before_fork() noexcept nogil:
    global pool, pool_dissolved
    pool_dissolved = dissolve_pool == NULL or dissolve_pool()
    if pool_dissolved:
        pool = 1


cdef void in_child() noexcept nogil:
    """A child has none of its parent's threads but the one that forked: none of those in a call, nor the one that was
    starting some. Waiting for that one before the fork would be a lock more to take in an order."""
    global child_is_serial, forks, holds_starts, pool
    atomic_set(&calls_in_flight, 0)
    pthread_mutex_init(&starts, NULL)
    holds_starts = False
    pool = 1
    child_is_serial |= not pool_dissolved
    forks += 1


if pthread_atfork(before_fork, NULL, in_child):
    raise MemoryError("cattn: pthread_atfork found no memory for its handlers")


# Signals.

cdef bint handles_signals() except -1:
    """Asks Python: the process's first thread is not it where Python is embedded and was started by another, and after
    a fork it is the thread that forked. set_wakeup_fd refuses every other thread before it looks at the file, and then
    this file, whose number is above all that a process can have. Of each thread once, and once more after a fork."""
    global signals, signals_asked
    if signals_asked != forks + 1:
        try:
            set_wakeup_fd(0x7fffffff)
        except ValueError:
            signals = False
        except OSError:
            signals = True
        signals_asked = forks + 1
    return signals
