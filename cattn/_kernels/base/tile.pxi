# The register tile: some rows of numbers times a panel of vectors, the one inner loop of scores, of the accumulation of
# values and of projections.

cdef enum:
    MAX_TILE = 24       # accumulators of a tile, at most
    # Vectors of rows in a panel, at most; simd.h says how many an instruction set takes. 4 keys x 3 vectors = 12
    # accumulators hide the FMA latency; 6 x 2 is 1 to 2 % slower. Unrolling the loop over dimensions made AVX-512 1 %
    # slower.
    MAX_PANEL = 3
    MAX_WIDTH = 48      # MAX_PANEL * LANES, at most
    # In a block of panels, about: what they are multiplied by passes the cache once in each. Flat from 96 to 384
    MAX_ROWS = 192


cdef inline int panel_vectors(const int MOST, Py_ssize_t vectors) noexcept nogil:
    """How many of the remaining vectors the next panel takes, of which MOST fit a tile: not 3 + 1 of 4, since a panel
    of one vector has too few accumulators to fill the FMA pipes."""
    return <int> vectors if vectors <= MOST else 2 if MOST == 3 and vectors == 4 else MOST


cdef inline void multiply_once(const int ROWS, const int VECTORS, vf* acc, const real* a, Py_ssize_t a_row,
                               const real* b) noexcept nogil:
    """acc[r][v] += a[r * a_row] * b[v]"""
    cdef vf b_k[MAX_PANEL]
    cdef vf a_r
    cdef int r, v
    for v in range(VECTORS):
        b_k[v] = vload(b + v * LANES)
    for r in range(ROWS):
        a_r = vset1(a[r * a_row])
        for v in range(VECTORS):
            acc[r * VECTORS + v] = vfma(a_r, b_k[v], acc[r * VECTORS + v])


cdef inline void multiply(const int ROWS, const int VECTORS, vf* acc, const real* a, Py_ssize_t a_row,
                          Py_ssize_t a_step, const real* b, Py_ssize_t n) noexcept nogil:
    """acc[r][v] += sum over k < n of a[r * a_row + k * a_step] * b[k][v]: the register tile of both products. Once
    inlined with constant ROWS and VECTORS, acc lives in registers: per k, VECTORS loads, ROWS broadcasts and
    ROWS * VECTORS FMAs.

    16 rows: a_row is a constant, so that a broadcast is the operand of its FMA, at a register and a constant: with two
    registers it would be two instructions. gcc 12 by itself keeps 16 indexes, most of them in memory. Four steps a turn
    are worth 6 % (Emerald Rapids)."""
    cdef Py_ssize_t k
    if ROWS == 16:
        while n >= 4:
            multiply_once(ROWS, VECTORS, acc, a, a_row, b)
            a = in_register(a + a_step)
            multiply_once(ROWS, VECTORS, acc, a, a_row, b + VECTORS * LANES)
            a = in_register(a + a_step)
            multiply_once(ROWS, VECTORS, acc, a, a_row, b + 2 * VECTORS * LANES)
            a = in_register(a + a_step)
            multiply_once(ROWS, VECTORS, acc, a, a_row, b + 3 * VECTORS * LANES)
            a = in_register(a + a_step)
            b += 4 * VECTORS * LANES
            n -= 4
    for k in range(n):
        multiply_once(ROWS, VECTORS, acc, a + k * a_step, a_row, b + k * VECTORS * LANES)
