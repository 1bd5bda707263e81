# The register tile: some rows of numbers times a panel of vectors, the one inner loop of scores, of the accumulation of
# values and of projections.

cdef enum:
    # Vectors of rows in a panel, at most; simd.h says how many an instruction set takes. 4 keys x 3 vectors = 12
    # accumulators hide the FMA latency; 6 x 2 is 1 to 2 % slower. Unrolling the loop over dimensions made AVX-512 1 %
    # slower.
    MAX_PANEL = 3
    MAX_WIDTH = 48      # MAX_PANEL * LANES, at most
    # In a block of panels, about: what they are multiplied by passes the cache once in each. Flat from 96 to 384
    MAX_ROWS = 192


cdef inline int panel_vectors(Py_ssize_t vectors) noexcept nogil:
    """How many of the remaining vectors the next panel takes: not 3 + 1 of 4, since a panel of one vector has too few
    accumulators to fill the FMA pipes."""
    return <int> vectors if vectors <= PANEL_VECTORS else 2 if vectors == 4 else PANEL_VECTORS


cdef inline void multiply(const int ROWS, const int VECTORS, vf* acc, const real* a, Py_ssize_t a_row,
                          Py_ssize_t a_step, const real* b, Py_ssize_t n) noexcept nogil:
    """acc[r][v] += sum over k < n of a[r * a_row + k * a_step] * b[k][v]: the register tile of both products. Once
    inlined with constant ROWS and VECTORS, acc lives in registers: per k, VECTORS loads, ROWS broadcasts and
    ROWS * VECTORS FMAs."""
    cdef vf b_k[MAX_PANEL]
    cdef vf a_rk
    cdef Py_ssize_t k
    cdef int r, v
    for k in range(n):
        for v in range(VECTORS):
            b_k[v] = vload(b + (k * VECTORS + v) * LANES)
        for r in range(ROWS):
            a_rk = vset1(a[r * a_row + k * a_step])
            for v in range(VECTORS):
                acc[r * VECTORS + v] = vfma(a_rk, b_k[v], acc[r * VECTORS + v])
