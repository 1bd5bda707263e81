"""The kernels of one instruction set and one precision (`real`: float, or double in the _f64 modules).

Read in this order, in which they are included:
    base/openmp.pxi         the OpenMP runtime: how a parallel region is entered; what show_config tells of it
    base/tasks.pxi          a call's threads: how many, how they share its tasks, how Ctrl-C ends them; their scratch
    base/tensor.pxi         arrays of any stride and dtype; a row of one is loaded into reals, or stored from them
    base/tile.pxi           the two inner loops of all products
    base/dropout.pxi        the counter-based generator
    attention/problem.pxi   one attention problem, how it is cut into tasks, and the scratch of a thread
    attention/rows.pxi      the query rows of a task: which keys they see, and their softmax so far
    attention/keys.pxi      where keys and values lie, and which come next
    attention/modify.pxi    what changes a tile of scores: softcap, ALiBi, masks, the causal / window / length limits
    attention/values.pxi    NaN and infinities of V behind a mask
    attention/finish.pxi    how a row ends: result, logsumexp, weights
    attention/prefill.pxi   the kernel for many query rows: queries in the SIMD lanes
    attention/decode.pxi    the kernel for few query rows: keys in the SIMD lanes, then dimensions
    attention/attend.pxi    who does which task or split, and who merges them
    attention/backward.pxi  the gradients
    attention/entry.pxi     the entries from Python
    merge.pxi               partial results over disjoint keys, merged
    linear.pxi              the layer's projections, and the products that are their gradients
    sinusoid.pxi            the table of positional encodings
    rotary.pxi              pairs of numbers turned by such a table
    measure.pxi             the machine's limits, for the benchmark and for the test that the build flags are in force
base/simd.h has the vectors. Nothing in base knows of attention.

Below an entry (plain `def`), where the GIL has been given up, everything is `noexcept nogil`: nothing allocates but
`start_threads` in base/openmp.pxi, for as long as threads are started, and nothing raises or calls Python but
`run_signal_handlers` in base/tasks.pxi, which runs the handlers of signals for the main thread of a long call.
"""
from cpython.buffer cimport PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport INFINITY, cos as c_cos, exp, fabs, log, pow, rint, sin as c_sin, sqrt, tanh
from libc.stdint cimport int8_t, int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, labs, malloc, qsort
from libc.string cimport memcpy, memset

from numpy import dtype, empty, ndarray, zeros

from cattn._kernels.cpu cimport (
    atomic_add, atomic_read, atomic_set, calls_in_flight, child_is_serial, default_threads, dissolve_pool, forks,
    give_scratch, handles_signals, hold_starts, openmp_threads, pool_of_this_thread, release_starts, stack_size,
    take_scratch,
)


cdef extern from *:
    """
    #include <float.h>
    #define LOG2_E 1.4426950408889634
    /* What a mask entry or an ALiBi bias may be at most: its sum with a score that is no larger stays finite, also
       after * log2(e). */
    #define BIAS_LIMIT (IS_DOUBLE ? DBL_MAX / 4 : FLT_MAX / 4)
    /* Where a row's reference starts: no finite score is below; -inf - LOWEST is -inf, and -inf + inf would be NaN. */
    #define LOWEST (IS_DOUBLE ? -DBL_MAX : -FLT_MAX)
    /* What the probabilities of a row that overflowed are multiplied by when it is done again. */
    #define SHRINK 0x1p-40
    #define SMALLEST (IS_DOUBLE ? DBL_MIN : FLT_MIN)
    /* Of a unit of scores, see choose_units: the distance of any score from LOWEST, times this, is far beyond SLACK. */
    #define SMALLEST_UNIT 0x1p-60
    /* What a row's scores may exceed its reference by, in log2: probabilities are 2**8 at most. */
    #define SLACK 8
    """
    const double LOG2_E, BIAS_LIMIT, SHRINK, SMALLEST, SMALLEST_UNIT, SLACK, LOWEST, FLT_MAX


cdef extern from "simd.h" nogil:
    # Cython is told that vectors are scalars: it then passes arithmetic through to C, where it is vector arithmetic.
    ctypedef float real
    ctypedef float vf
    ctypedef int vi
    const int LANES, COLUMNS, VECTOR_BYTES, REGISTERS, TILE_ROWS, PANEL_VECTORS, ATTEND_ROWS, ATTEND_VECTORS, IS_DOUBLE
    const bint ATTEND_FUSED
    void prefetch(const void*)
    const real* in_register(const real*)
    const char* byte_in_register(const char*)
    bint is_constant(Py_ssize_t)
    vf vload(const real*)
    void vstore(real*, vf)
    vf vset1(real)
    vf vfma(vf, vf, vf)
    vf vfma_here(vf, vf, vf)
    vf vmax(vf, vf)
    vf vselect(vi, vf, vf)
    vf vrounded(vf)
    vi vless(vf, vf)
    vi vequal(vf, vf)
    vi vdiffer(vf, vf)
    vf vabs(vf)
    vf vcopysign(vf, vf)
    int vany(vi)
    vf vexp2(vf)
    void vtranspose(vf*)
    void vload_square(vf*, const char*, Py_ssize_t)
    void vload_columns(vf*, const char*, Py_ssize_t)
    void vweave(vf*, int)
    void vunweave(vf*)
    void vsplit_f16(vf*, vf)
    void vsplit_bf16(vf*, vf)
    void vsplit_i8(vf*, vf)
    void vfalse_tile(int8_t*, const char* const*, Py_ssize_t)
    vi vfalse(const int8_t*, int)
    ctypedef int fp_mode
    const fp_mode OWN_MODE
    fp_mode get_mode()
    void set_mode(fp_mode)
    fp_mode own_mode()
    double opaque(double)
    vf vload_f16(const uint16_t*)
    vf vload_bf16(const uint16_t*)
    vf vload_i8(const int8_t*)
    void vstore_f16(uint16_t*, vf)
    void vstore_bf16(uint16_t*, vf)
    float widen_f16(uint16_t)
    float widen_bf16(uint16_t)
    uint16_t narrow_f16(float)
    uint16_t narrow_bf16(float)
    uint16_t narrow_f64_to_f16(double)
    uint16_t narrow_f64_to_bf16(double)


cdef enum:
    MAX_LANES = 16      # of any instruction set, in float


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    """a / b, rounded up, of numbers from 0 on."""
    return (a + b - 1) // b


cdef inline Py_ssize_t round_up(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    """The next multiple of b."""
    return (a + b - 1) // b * b


include "base/openmp.pxi"
include "base/tasks.pxi"
include "base/tensor.pxi"
include "base/tile.pxi"
include "base/dropout.pxi"
include "attention/problem.pxi"
include "attention/rows.pxi"
include "attention/keys.pxi"
include "attention/modify.pxi"
include "attention/values.pxi"
include "attention/finish.pxi"
include "attention/prefill.pxi"
include "attention/decode.pxi"
include "attention/attend.pxi"
include "attention/backward.pxi"
include "attention/entry.pxi"
include "merge.pxi"
include "linear.pxi"
include "sinusoid.pxi"
include "rotary.pxi"
include "measure.pxi"
