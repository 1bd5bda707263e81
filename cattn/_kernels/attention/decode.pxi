# Attention of few query rows (a decoding step: one row for each head that shares the key head) against long K and V.
# Each number of K and V is used for a few FMAs only, so the limit is how fast they arrive: rows of K and V are taken as
# they lie, also in 16 or 8 bits, and one pass over them serves all rows. *Keys are in the SIMD lanes* for scores,
# dimensions for values.
#
#     for each (batch, key head), each split of the keys
#         for each block of keys
#             for GROUPS x LANES keys at a time
#                 scores      S[row][keys] += K transposed in registers x q broadcast; prefetch these keys' rows of V
#             modify, softmax as in prefill, on S[key][row] as one run of vectors (lane l belongs to row l % rows)
#             for a few vectors of dims at a time
#                 accumulate  O[row][dims] += P[key][row] broadcast x V vectors; prefetch the next block's rows of K
#     merge the splits in order; out = O / row_sum
#
# Every dot product, sum and reference is what prefill makes it, in the same order, on the same grid of keys: a row has
# the same bits in either kernel, and how many stand beside it decides only how fast it is done. Sums over dims in the
# lanes would need no transposition, and have other bits: one row of float32 in cache takes 0.85 to 0.95 of the time
# then, of float16 0.65 to 0.85, from memory 0.95 to 1 and 0.85 to 1; from 4 rows on they are slower (Emerald Rapids,
# AVX-512 and AVX2).
#
# The prefetches are worth 1.6 to 2.3 x (Zen 4): the hardware's own streams stop at each page and each new array. Both
# loops need them: with half of V's asked for a block ahead, among K's, decoding from memory takes 1.1 to 1.2 times as
# long, with half of K's among V's 1.05 to 1.1; every second line alone, 1.15 to 1.3 times (Emerald Rapids).

cdef enum:
    MAX_DECODE_ROWS = 8     # more rows need the arithmetic that prefill has


# KIND and WIDTH are constants wherever these functions are inlined: there are 4 kinds of rows (real, float16, bfloat16,
# int8) and 4 widths of rows per key head (1, 2, 4, 8; 3 and 5 to 7 rows repeat the last).

cdef inline vf load_kv(const int KIND, const char* row, Py_ssize_t d) noexcept nogil:
    """LANES numbers of a row of K or V from dimension d on, widened inside the load."""
    if KIND == F16:
        return vload_f16(<const uint16_t*> row + d)
    if KIND == BF16:
        return vload_bf16(<const uint16_t*> row + d)
    if KIND == I8:
        return vload_i8(<const int8_t*> row + d)
    return vload(<const real*> row + d)


cdef inline void decode_group(const int KIND, const int WIDTH, const int GROUPS, real* scores, const real* q,
                              Py_ssize_t dims, const char* k, Py_ssize_t k_step, const char* v, Py_ssize_t v_step,
                              Py_ssize_t v_row) noexcept nogil:
    """scores[key][WIDTH] (OUT) of GROUPS x LANES keys at k; dims: a multiple of LANES. These keys' rows of V, of v_row
    bytes, are prefetched on the way; in the order in which they lie, where no gaps are between them: 2 to 3 % faster
    than one line of each at a time (Emerald Rapids)."""
    cdef vf acc[8]
    cdef vf before[8]
    cdef Py_ssize_t d = 0, n, size = size_of(<Kind> KIND)
    cdef bint no_gaps = v_step == v_row
    cdef Py_ssize_t line = 64 * GROUPS * LANES if no_gaps else 64   # from a step's first line to the next step's
    cdef Soon soon
    cdef int i, key
    soon.step, soon.pitch = 64 if no_gaps else v_step, line
    while True:
        n = min(dims - d, <Py_ssize_t> DIMS_AT_ONCE)
        for i in range(GROUPS * WIDTH):
            acc[i] = vset1(<real> 0.0)
        soon.lines, soon.bytes = v + d // (64 // size) * line, v_row - d * size
        multiply_columns(KIND, False, WIDTH, GROUPS, acc, k + d * size, k_step, NULL, q + d * WIDTH, n, &soon)
        if d:
            for i in range(GROUPS * WIDTH):
                acc[i] = acc[i] + before[i]
        d += n
        if d == dims:
            break
        for i in range(GROUPS * WIDTH):
            before[i] = acc[i]
    for i in range(GROUPS):
        vweave(acc + i * WIDTH, WIDTH)
    for i in range(GROUPS * WIDTH):
        vstore(scores + i * LANES, acc[i])
    d //= 64 // size
    while d * 64 < v_row:   # V is wider than K
        for key in range(GROUPS * LANES):
            prefetch(v + d * line + key * soon.step)
        d += 1


cdef inline void decode_scores(const int KIND, const int WIDTH, const Problem* p, const Workspace* w,
                               const Block* b) noexcept nogil:
    """w.scores[key][WIDTH] (OUT) for the block's keys."""
    # Accumulators, each one chain of FMAs: 4, or 1 with AVX-512, whose squares take 16 numbers of each key as long as
    # their FMAs do. With 4, that is 5 to 15 % slower, with 2, AVX2 up to 17 %; of 8 bits, with 1 cached keys take 1.07
    # times as long (Emerald Rapids).
    cdef int GROUPS = max(1, (1 if VECTOR_BYTES == 64 and KIND != I8 else 4) // WIDTH)
    cdef Py_ssize_t j = 0, at = 0, i, k_bytes, row = p.q_stride * size_of(<Kind> KIND)
    cdef Py_ssize_t v_row = p.head_dim_v * size_of(<Kind> KIND)
    cdef const KeyRun* run = b.runs
    cdef const char* k
    cdef const char* v
    cdef char* copy = <char*> w.rows
    while j < b.n:
        k, v, k_bytes = run.k + at * b.k_step, run.v + at * b.v_step, b.k_step
        if GROUPS > 1 and at + GROUPS * LANES <= run.n:
            decode_group(KIND, WIDTH, GROUPS, w.scores + j * WIDTH, w.queries, p.q_stride, k, k_bytes, v, b.v_step,
                         v_row)
            j += GROUPS * LANES
            at += GROUPS * LANES
        else:
            if at + LANES > run.n:  # goes on in another run, or ends: behind, there may be no memory
                for i in range(LANES):
                    memcpy(copy + i * row, run.k + at * b.k_step, row)
                    if j + i + 1 < b.n:
                        at += 1
                        if at == run.n:
                            run += 1
                            at = 0
                at -= LANES
                k, k_bytes = copy, row
            decode_group(KIND, WIDTH, 1, w.scores + j * WIDTH, w.queries, p.q_stride, k, k_bytes, v, b.v_step,
                         v_row if k != copy else 0)
            j += LANES
            at += LANES
        if at == run.n:
            run += 1
            at = 0


cdef inline void decode_dims(const int KIND, const int WIDTH, const int VECTORS, real* acc, Py_ssize_t acc_stride,
                             const real* probs, const real* summed, const Block* b, Py_ssize_t d,
                             vf* sums) noexcept nogil:
    """acc[WIDTH][VECTORS] (IN/OUT) at dimension d += the block's probabilities times V. The same dimensions of the rows
    at next_k are prefetched on the way. d = 0: sums[0] (OUT), in lane r < WIDTH, the sum of row r's `summed`, at next
    to no cost where the FMAs wait for V."""
    cdef Py_ssize_t size = size_of(<Kind> KIND)
    cdef int LINES = <int> ceil_div(VECTORS * LANES * size, 64)
    cdef vf tile[16]
    cdef vf v_d[8]
    cdef vf prob, sum = vset1(<real> 0.0)
    cdef const KeyRun* run
    cdef const char* v
    cdef const char* next_k
    cdef Py_ssize_t j, v_bytes = b.v_step, k_bytes = b.k_step, next_n
    cdef int r, c, i
    for r in range(WIDTH * VECTORS):
        tile[r] = vset1(<real> 0.0)
    for i in range(b.num_runs):
        run = &b.runs[i]
        v, next_k, next_n = run.v, run.next_k, run.next_n
        for j in range(run.n):
            if j < next_n and d * size % 64 == 0:
                for c in range(LINES):
                    prefetch(next_k + j * k_bytes + d * size + 64 * c)
            if d == 0:
                sum = sum + vload(summed + j * WIDTH)
            for c in range(VECTORS):
                v_d[c] = load_kv(KIND, v + j * v_bytes, d + c * LANES)
            for r in range(WIDTH):
                prob = vset1(probs[j * WIDTH + r])
                for c in range(VECTORS):
                    tile[r * VECTORS + c] = vfma(prob, v_d[c], tile[r * VECTORS + c])
        probs += run.n * WIDTH
        summed += run.n * WIDTH
    if d == 0:
        sums[0] = sum
    for r in range(WIDTH):
        for c in range(VECTORS):
            vstore(acc + r * acc_stride + d + c * LANES,
                   vload(acc + r * acc_stride + d + c * LANES) + tile[r * VECTORS + c])


cdef inline vf decode_values(const int KIND, const int WIDTH, real* acc, Py_ssize_t dims, const real* probs,
                             const real* summed, const Block* b) noexcept nogil:
    """acc[WIDTH][dims] (IN/OUT) over the block's keys. Returns the sums of `summed`: lane r < WIDTH is row r's."""
    # 8 accumulators, or 16 for 4 and 8 rows where there are 32 registers: with 4 for one row, decoding was 15 % slower.
    # The block's rows of V are in cache by now, so that going over them several times costs little. What is left is
    # done by half as many, not one by one, where each FMA waits for the one before: one row of head_dim 64 takes 0.90
    # of the time with AVX-512, one of 32 0.82 with AVX2 (Emerald Rapids, keys in cache).
    cdef int VECTORS = 8 if WIDTH == 1 else min(4, max(1, REGISTERS // 2 // WIDTH))
    cdef Py_ssize_t d = 0
    cdef vf sums = vset1(<real> 0.0)
    while VECTORS == 8 and d + 8 * LANES <= dims:
        decode_dims(KIND, WIDTH, 8, acc, dims, probs, summed, b, d, &sums)
        d += 8 * LANES
    while VECTORS >= 4 and d + 4 * LANES <= dims:
        decode_dims(KIND, WIDTH, 4, acc, dims, probs, summed, b, d, &sums)
        d += 4 * LANES
    while VECTORS >= 2 and d + 2 * LANES <= dims:
        decode_dims(KIND, WIDTH, 2, acc, dims, probs, summed, b, d, &sums)
        d += 2 * LANES
    while d < dims:
        decode_dims(KIND, WIDTH, 1, acc, dims, probs, summed, b, d, &sums)
        d += LANES
    return sums


cdef inline vf spread_max(vf x, int width) noexcept nogil:
    """In each lane, the largest of the lanes that belong to the same row: once a block of keys, so by scalars."""
    cdef real lanes[MAX_LANES]
    cdef int i
    vstore(lanes, x)
    for i in range(width, LANES):
        lanes[i % width] = lanes[i] if lanes[i] > lanes[i % width] else lanes[i % width]
    for i in range(width, LANES):
        lanes[i] = lanes[i % width]
    return vload(lanes)


cdef inline vf each_row(vf x, int width) noexcept nogil:
    """In each lane, what lane % width has."""
    cdef real lanes[MAX_LANES]
    cdef int i
    vstore(lanes, x)
    for i in range(width, LANES):
        lanes[i] = lanes[i - width]
    return vload(lanes)


cdef void decode_softmax(const Workspace* w, const State* state, real unit, int width, Py_ssize_t vectors,
                         Py_ssize_t dims) noexcept nogil:
    """w.scores (IN/OUT): whole vectors of scores become probabilities; the state follows, but for the sums of these, as
    in update_reference."""
    cdef vf largest = vset1(<real> -INFINITY)
    cdef vf reference = vload(state.reference), slack = vset1(<real> SLACK), moved, factor
    cdef real factors[MAX_LANES]
    cdef real* acc = state.acc
    cdef real* scores = w.scores
    cdef Py_ssize_t i, d
    for i in range(vectors):
        largest = vmax(vload(scores + i * LANES), largest)
    largest = spread_max(largest, width)
    if vany(vless(slack, (largest - reference) * unit)):
        moved = vselect(vless(slack, (largest - reference) * unit), largest, reference)
        factor = vexp2((reference - moved) * unit)
        reference = moved
        vstore(state.reference, reference)
        vstore(state.row_sum, vload(state.row_sum) * factor)
        vstore(factors, factor)
        for i in range(width):
            for d in range(dims):
                acc[i * dims + d] *= factors[i]
    for i in range(vectors):
        vstore(scores + i * LANES, vexp2((vload(scores + i * LANES) - reference) * unit))


cdef vf sum_probs(const real* probs, int width, Py_ssize_t n) noexcept nogil:
    """In lane r < width, the sum of row r's probabilities."""
    cdef vf sum = vset1(<real> 0.0)
    cdef Py_ssize_t j
    for j in range(n):
        sum = sum + vload(probs + j * width)
    return sum


cdef void scores_of(const Problem* p, const Workspace* w, const Block* b) noexcept nogil:
    """decode_scores of the block."""
    if not IS_DOUBLE and b.kind == F16:
        scores_of_kind(F16, p, w, b)
    elif not IS_DOUBLE and b.kind == BF16:
        scores_of_kind(BF16, p, w, b)
    elif not IS_DOUBLE and b.kind == I8:
        scores_of_kind(I8, p, w, b)
    else:
        scores_of_kind(F64 if IS_DOUBLE else F32, p, w, b)


cdef inline void scores_of_kind(const int KIND, const Problem* p, const Workspace* w, const Block* b) noexcept nogil:
    if p.decode_width == 1:
        decode_scores(KIND, 1, p, w, b)
    elif p.decode_width == 2:
        decode_scores(KIND, 2, p, w, b)
    elif p.decode_width == 4:
        decode_scores(KIND, 4, p, w, b)
    else:
        decode_scores(KIND, 8, p, w, b)


cdef vf add_values(const Problem* p, const State* state, const real* probs, const real* summed,
                   const Block* b) noexcept nogil:
    """decode_values of the block."""
    if not IS_DOUBLE and b.kind == F16:
        return add_values_of_kind(F16, p, state.acc, probs, summed, b)
    if not IS_DOUBLE and b.kind == BF16:
        return add_values_of_kind(BF16, p, state.acc, probs, summed, b)
    if not IS_DOUBLE and b.kind == I8:
        return add_values_of_kind(I8, p, state.acc, probs, summed, b)
    return add_values_of_kind(F64 if IS_DOUBLE else F32, p, state.acc, probs, summed, b)


cdef inline vf add_values_of_kind(const int KIND, const Problem* p, real* acc, const real* probs, const real* summed,
                                  const Block* b) noexcept nogil:
    if p.decode_width == 1:
        return decode_values(KIND, 1, acc, p.v_stride, probs, summed, b)
    if p.decode_width == 2:
        return decode_values(KIND, 2, acc, p.v_stride, probs, summed, b)
    if p.decode_width == 4:
        return decode_values(KIND, 4, acc, p.v_stride, probs, summed, b)
    return decode_values(KIND, 8, acc, p.v_stride, probs, summed, b)


cdef bint decode_reads_in_place(const Tensor* t, Py_ssize_t dim) noexcept nogil:
    """Whole vectors of adjacent numbers, which loads of fewer bits take at any alignment."""
    if dim % LANES:
        return False
    return rows_are_real(t) or (not IS_DOUBLE and (t.kind == F16 or t.kind == BF16 or t.kind == I8)
                                and t.stride[3] == size_of(t.kind))


cdef void decode_keys(const Problem* p, const Workspace* w, const Task* task, const State* state, Py_ssize_t low,
                      Py_ssize_t high) noexcept nogil:
    """state (IN/OUT) moves on over keys [low, high)."""
    cdef int width = p.decode_width
    cdef Py_ssize_t i, v_stride, all_low = 0, all_high = p.seq_len_kv
    cdef const real* v_rows
    cdef Block b
    cdef Tile t
    cdef vf sums = vset1(<real> 0.0), of_values
    cdef bint are_modified, is_finite
    t.width, t.lanes = width, w.lanes
    # Keys [all_low, all_high) are seen by all rows. Outside, a tile is limited: some row must not see some key.
    for i in range(width):
        all_low = max(all_low, w.lanes[i].low)
        all_high = min(all_high, w.lanes[i].high)
    before_block(&b, low)
    while next_block(p, w, task, high, &b):
        scores_of(p, w, &b)
        t.scores = w.scores
        t.key_start, t.n = b.key_start, b.n
        t.limited = b.key_start < all_low or b.key_start + b.n > all_high
        modify_tile(p, w, &t)
        keep_scores(p, &t)
        # What fills the last vector are keys that do not exist.
        i = b.n * width
        while i % LANES:
            w.scores[i] = <real> -INFINITY
            i += 1
        decode_softmax(w, state, p.unit, width, i // LANES, p.v_stride)
        are_modified = p.dropout or w.again
        if are_modified:
            sums = sum_probs(w.scores, width, b.n)
            modify_probs(p, w, &t)
        elif p.v_scales.data != NULL:   # beside the scores, which are summed
            scale_values(p, w, &t, w.next_scores)
            t.scores = w.next_scores
        # NaN and infinities behind a mask must not leak: see make_finite
        v_rows, is_finite = NULL, True
        if t.limited or p.mask.data != NULL:
            v_rows = values_of(p, w, task, &b, &v_stride)
            is_finite = not make_finite(w.v_finite, p.v_stride, v_rows, v_stride, b.n, p.head_dim_v)
        if not is_finite:
            b.kind, b.num_runs, b.v_step = real_kind(), 1, p.v_stride * sizeof(real)
            b.runs[0].n, b.runs[0].v, b.runs[0].next_n = b.n, <const char*> w.v_finite, 0
        of_values = add_values(p, state, t.scores, w.scores, &b)
        if not is_finite:
            repair_values(p, w, &t, state.acc, p.v_stride, 1, v_rows, v_stride, p.head_dim_v)
        vstore(state.row_sum, vload(state.row_sum) + each_row(sums if are_modified else of_values, width))


cdef void decode_pack(const Problem* p, const Workspace* w, const Task* task) noexcept nogil:
    """w.queries (OUT)[dim][row] = sign * q, dimensions padded with 0."""
    cdef Py_ssize_t i, d
    for i in range(p.decode_width):
        load_row(w.rows, lane_row(&p.q, &w.lanes[i]), p.q.stride[3], p.head_dim, p.q.kind)
        for d in range(p.head_dim):
            w.queries[d * p.decode_width + i] = w.rows[d] * p.sign
        for d in range(p.head_dim, p.q_stride):
            w.queries[d * p.decode_width + i] = 0.0


cdef void decode_merge(const Problem* p, State* total, State* lost, const State* part) noexcept nogil:
    """total + lost (IN/OUT) = both states."""
    cdef vf factors[2]
    cdef real total_factors[MAX_LANES]
    cdef real part_factors[MAX_LANES]
    cdef Py_ssize_t row, v, d
    merge_reference(total.reference, part.reference, p.unit, factors)
    merge_vector(total.row_sum, lost.row_sum, part.row_sum, factors[0], factors[1])
    vstore(total_factors, factors[0])
    vstore(part_factors, factors[1])
    for row in range(p.decode_width):
        for v in range(p.v_stride // LANES):
            d = row * p.v_stride + v * LANES
            merge_vector(total.acc + d, lost.acc + d, part.acc + d, vset1(total_factors[row]),
                         vset1(part_factors[row]))


cdef bint decode_finish(const Problem* p, const Workspace* w, const Task* task, const State* state) noexcept nogil:
    """out (OUT), logsumexp and weights: acc / row_sum. True: to be done again."""
    cdef Py_ssize_t i, lane, d
    cdef bint again = False
    cdef real row_sum, inverse
    cdef real* row
    for i in range(task.num_rows):
        row_sum = state.row_sum[i]
        # no key seen: 0 / 0 is 0 here
        inverse = 1 / (row_sum + sink_term(p, &w.lanes[i], state.reference[i])) if row_sum != 0 else <real> 0.0
        finish_row(p, &w.lanes[i], state.reference[i], row_sum, inverse)
        inverse /= w.shrink[i]
        row = state.acc + i * p.v_stride
        for d in range(p.head_dim_v):
            row[d] *= inverse
        again = store_result(p, &w.lanes[i], w.shrink + i, row) or again
    for lane in range(p.decode_width, LANES):
        w.shrink[lane] = w.shrink[lane % p.decode_width]
    return again
