# The two inner loops of products. `multiply`: some rows of numbers times a panel of vectors; for scores, the
# accumulation of values, and projections of many rows. `multiply_columns`: rows of numbers times few others, for scores
# and projections of few rows, where each number is used a few times only. Both add a dot product's terms one after the
# other, in one chain of FMAs, and have the same bits.

cdef enum:
    MAX_TILE = 24       # accumulators of a tile, at most
    # Vectors of rows in a panel, at most; simd.h says how many an instruction set takes. 4 keys x 3 vectors = 12
    # accumulators hide the FMA latency; 6 x 2 is 1 to 2 % slower. Unrolling the loop over dimensions made AVX-512 1 %
    # slower.
    MAX_PANEL = 3
    MAX_WIDTH = 48      # MAX_PANEL * LANES, at most
    # In a block of panels, about: what they are multiplied by passes the cache once in each. Flat from 96 to 384
    MAX_ROWS = 192
    SCALE_DIMS = 32     # int8 numbers of a row that share a scale; the same number as in cattn/_checks.py


cdef inline int panel_vectors(const int MOST, Py_ssize_t vectors) noexcept nogil:
    """How many of the remaining vectors the next panel takes, of which MOST fit a tile: not 3 + 1 of 4, since a panel
    of one vector has too few accumulators to fill the FMA pipes."""
    return <int> vectors if vectors <= MOST else 2 if MOST == 3 and vectors == 4 else MOST


cdef inline Py_ssize_t padded_rows(Py_ssize_t rows) noexcept nogil:
    """As many of few rows as multiply_columns takes at once; the last of them repeats."""
    return 1 if rows == 1 else 2 if rows == 2 else 4 if rows <= 4 else 8 if rows <= 8 else 16


cdef inline void multiply_once(const int ROWS, const int VECTORS, vf* acc, const real* a, Py_ssize_t a_row,
                               const real* b) noexcept nogil:
    """acc[r][v] += a[r * a_row] * b[v]. In attention's fused tile of 8 x 2, FMAs stay in their registers: 0.95 to 1 of
    the time, and 0.9 where another hardware thread takes half of what the core decodes (Cascade Lake); in that of
    16 x 1, they were no faster."""
    cdef bint HERE = ATTEND_FUSED and ROWS == 8 and VECTORS == 2 and is_constant(a_row)
    cdef vf b_k[MAX_PANEL]
    cdef vf a_r
    cdef int r, v
    for v in range(VECTORS):
        b_k[v] = vload(b + v * LANES)
    for r in range(ROWS):
        a_r = vset1(a[r * a_row])
        for v in range(VECTORS):
            if HERE:
                acc[r * VECTORS + v] = vfma_here(a_r, b_k[v], acc[r * VECTORS + v])
            else:
                acc[r * VECTORS + v] = vfma(a_r, b_k[v], acc[r * VECTORS + v])


cdef inline void multiply(const int ROWS, const int VECTORS, vf* acc, const real* a, Py_ssize_t a_row,
                          Py_ssize_t a_step, const real* b, Py_ssize_t n) noexcept nogil:
    """acc[r][v] += sum over k < n of a[r * a_row + k * a_step] * b[k][v]: the register tile of both products. Once
    inlined with constant ROWS and VECTORS, acc lives in registers: per k, VECTORS loads, ROWS broadcasts and
    ROWS * VECTORS FMAs.

    Fused tiles: where a_row is a constant, a broadcast is at a register and a constant, and can be the operand of an
    FMA: with two registers it would be two instructions. gcc 12 by itself keeps an index for each row, most of them in
    memory: 4 to 7 % slower for 8 rows (Cascade Lake), more for 16. Four steps a turn are worth 6 % (Emerald Rapids).
    Where a_row is no constant, as in projections, it is faster by itself."""
    cdef Py_ssize_t k
    if ATTEND_FUSED and ROWS == ATTEND_ROWS and is_constant(a_row):
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


cdef struct Soon:               # rows that are wanted soon, as many as there are in use
    const char* lines           # the first line of the first row, of `bytes` bytes
    Py_ssize_t bytes
    Py_ssize_t step             # bytes from a line to the next that is asked for together with it
    Py_ssize_t pitch            # from there to the lines that are asked for 64 bytes later


cdef inline void multiply_columns(const int KIND, const bint SCALED, const int ROWS, const int GROUPS, vf* acc,
                                  const char* a, Py_ssize_t a_step, const real* scales, const real* b, Py_ssize_t n,
                                  const Soon* soon) noexcept nogil:
    """acc[g][r] (IN/OUT), lane l, += sum over k < n of a[g * LANES + l][k] * b[k][r]: rows of `a`, of KIND, lie a_step
    bytes apart, and are transposed in registers, BYTES of each at a time: whole squares would spill. n: for 16 bits, a
    multiple of LANES; where it is an odd one, each row has LANES numbers more before its last LANES. For 8 bits, a
    multiple of 4 * COLUMNS. SCALED: a number is scales[k / SCALE_DIMS][g * LANES + l] times as large, rounded.

    `soon` is prefetched on the way, a line for each row and 64 bytes of it, one by one: there are as many buffers for
    misses as lines of 16 rows, and what is to be multiplied waits while these are full. From memory, one row takes 0.9
    to 0.95 of the time that it takes with a burst for each 64 bytes (Emerald Rapids)."""
    cdef vf columns[MAX_LANES * 2]
    cdef real lanes[MAX_LANES]
    cdef Py_ssize_t k = 0, at = 0
    cdef int BYTES = COLUMNS * <int> sizeof(real)
    cdef int STEP = COLUMNS if KIND == real_kind() else 4 * COLUMNS if KIND == I8 else 2 * COLUMNS
    cdef int LINES = GROUPS * LANES * BYTES // 64           # to ask for with each BYTES; none of only two rows
    cdef int EACH = max(1, LINES // COLUMNS)                # with a column
    cdef const char* line = soon.lines
    cdef int c, g, r, i
    while k + STEP <= n:
        for g in range(GROUPS):
            vload_columns(columns + g * COLUMNS, a + g * LANES * a_step, a_step)
        for c in range(COLUMNS):
            if c * EACH < LINES and at // 64 * 64 < soon.bytes:
                for i in range(EACH):
                    prefetch(line)
                    line += soon.step
            multiply_column(KIND, SCALED, ROWS, GROUPS, acc, columns + c, scales, b + STEP // COLUMNS * c * ROWS)
        a = byte_in_register(a + BYTES)
        b = in_register(b + STEP * ROWS)
        k += STEP
        at += BYTES
        if SCALED and k % SCALE_DIMS == 0:
            scales += GROUPS * LANES
        if at % 64 == 0:
            line += soon.pitch - GROUPS * LANES * soon.step
    if at % 64 != 0 and at // 64 * 64 < soon.bytes:     # the last line's other rows
        for r in range(at % 64 * GROUPS * LANES // 64, GROUPS * LANES):
            prefetch(line)
            line += soon.step
    if (KIND == F16 or KIND == BF16) and 2 * COLUMNS > LANES and k < n:     # the columns before count no more
        for g in range(GROUPS):
            vload_columns(columns + g * COLUMNS, a + g * LANES * a_step - LANES * 2, a_step)
        for c in range(COLUMNS // 2, COLUMNS):
            multiply_column(KIND, SCALED, ROWS, GROUPS, acc, columns + c, scales, b + (2 * c - LANES) * ROWS)
    while KIND == real_kind() and k < n:
        for g in range(GROUPS):
            for c in range(LANES):
                lanes[c] = (<const real*> (a + (g * LANES + c) * a_step))[0]
            for r in range(ROWS):
                acc[g * ROWS + r] = vfma(vload(lanes), vset1(b[r]), acc[g * ROWS + r])
        a += sizeof(real)
        b += ROWS
        k += 1


cdef inline void multiply_column(const int KIND, const bint SCALED, const int ROWS, const int GROUPS, vf* acc,
                                 const vf* column, const real* scales, const real* b) noexcept nogil:
    """acc[g][r] (IN/OUT) += what the columns of the groups, COLUMNS apart, hold, times b[k][r]. scales: of these."""
    cdef vf parts[MAX_LANES * 4]
    cdef vf scale
    cdef int PARTS = 1 if KIND == real_kind() else 4 if KIND == I8 else 2   # numbers in a lane
    cdef int g, i, r
    for g in range(GROUPS):
        if KIND == real_kind():
            parts[g] = column[g * COLUMNS]
        elif KIND == F16:
            vsplit_f16(parts + 2 * g, column[g * COLUMNS])
        elif KIND == BF16:
            vsplit_bf16(parts + 2 * g, column[g * COLUMNS])
        else:
            vsplit_i8(parts + 4 * g, column[g * COLUMNS])
        if SCALED:
            scale = vload(scales + g * LANES)
            for i in range(PARTS):
                parts[PARTS * g + i] = parts[PARTS * g + i] * scale
    for i in range(PARTS):
        for r in range(ROWS):
            for g in range(GROUPS):
                acc[g * ROWS + r] = vfma(parts[PARTS * g + i], vset1(b[i * ROWS + r]), acc[g * ROWS + r])
