# Attention, O = softmax(Q K^T) V, without ever storing Q K^T: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with the
# *queries in the SIMD lanes*. The query rows of all heads of a key head's group stand one after the other, so grouped
# queries share each load of K and V.
#
#     for each (batch, key head, block of query rows)                       one task
#         pack scale * log2(e) * q, transposed, in panels of up to 3 vectors of queries
#         row_max = LOWEST, row_sum = 0, acc = 0
#         for each block of keys, on a grid that starts at key 0
#             load K and V rows: in place when contiguous, else one row copy into scratch
#             for each panel that sees any of these keys
#                 scores      S^T[key][query] = K broadcast x Q^T vectors
#                 modify      only where a mask, a limit, softcap or ALiBi touches the tile
#                 softmax     row_max (lazily), exp2, sum: all vertical
#                 accumulate  O^T[dim][query] += V broadcast x P^T
#         out = O^T transposed / row_sum; logsumexp
#
# No horizontal operation and no packing of K or V anywhere. Every number of a query row is computed from its own query
# and the keys it sees, each dot product and sum in one fixed order, so neither the rows beside it, the number of
# threads, the size of the blocks of rows nor masked keys change a bit (a masked key adds an exact 0).
#
# A probability could also be made while its score is still in a register; that measured 1 % slower than the pass over
# the tile in L1 (Zen 5), for a second code path.
#
# Exactness: sums over keys start afresh in each block of keys (one long sum costs 3 to 8 times the error at 2048 to
# 16384 keys); probabilities are relative to a reference at most 2**8 below the maximum, so they never overflow.
# Assumes: checked arguments; what it may touch is described by Problem. Never: allocates, raises, takes the GIL.

cdef enum:
    MAX_PANEL = 3       # vectors of queries in a panel: 4 keys x 3 vectors = 12 accumulators hide the FMA latency
    MAX_WIDTH = 48      # MAX_PANEL * LANES, at most
    MAX_ROWS = 192      # query rows in a block: K and V pass through the cache once a block; flat from 96 to 384

cdef struct Problem:
    Tensor q, k, v, out, mask       # IN, IN, IN, OUT, IN
    real* weights                   # OUT (batch, num_heads, seq_len_q, seq_len_kv), contiguous; or NULL
    real* logsumexp                 # OUT (batch, num_heads, seq_len_q), contiguous; or NULL
    const real* sinks               # IN (num_heads,); or NULL
    const real* slopes              # IN (batch or 1, num_heads); or NULL
    Py_ssize_t slopes_stride        # from one batch row of slopes to the next: num_heads or 0
    const int64_t* q_offsets        # IN (batch,); or NULL: q_offset for all
    const int64_t* kv_lens          # IN (batch,); or NULL: all seq_len_kv
    Py_ssize_t q_offset
    Py_ssize_t batch, num_kv_heads, group_size, seq_len_q, head_dim, head_dim_v, seq_len_kv
    Py_ssize_t window_left, window_right   # -1: unbounded; is_causal is window_right = 0
    real scale, softcap             # both times log2(e); softcap 0: none
    uint32_t dropout_threshold      # 0: no dropout
    real keep_scale
    uint64_t seed
    Py_ssize_t batch_offset         # of this call's first batch row, for dropout
    Py_ssize_t block_vectors        # vectors of query rows in a block
    Py_ssize_t num_blocks           # blocks of query rows per (batch, key head)
    Py_ssize_t block_kv             # keys in a block

cdef struct Workspace:              # one per thread, SCRATCH
    real* queries                   # [panel][head_dim][width]
    real* acc                       # [panel][head_dim_v][width]
    real* scores                    # [block_kv][width]
    real* visible                   # [block_kv][width]: 0 where seen, -inf where masked; see repair_values
    real* k_rows                    # [block_kv][head_dim]
    real* v_rows                    # [block_kv][head_dim_v]
    real* v_finite                  # [block_kv][head_dim_v]
    real* rows                      # [LANES * MAX_PANEL][max(head_dim, head_dim_v)], or LANES mask rows of block_kv
    real* transposed                # [block_kv][LANES]
    real* row_max                   # [MAX_ROWS]
    real* row_sum                   # [MAX_ROWS]
    Lane* lanes                     # [MAX_ROWS]


cdef Py_ssize_t keys_per_block(Py_ssize_t head_dim, Py_ssize_t head_dim_v) noexcept nogil:
    """128: 32 KB of K at head_dim 64, and 12 KB of scores. 256 keys are 1 % slower on Zen 5 (48 KB of L1) and 1 %
    faster on Zen 3, 64 keys cost 2 to 6 % in loads and stores of acc. Depends on nothing else: it decides bits."""
    return 128 if max(head_dim, head_dim_v) <= 256 else 64


cdef size_t carve(Workspace* w, char* base, const Problem* p) noexcept nogil:
    """Lays the workspace out from `base` on (64-byte aligned pieces); returns its size in bytes."""
    cdef Py_ssize_t longest = max(p.head_dim, p.head_dim_v)
    cdef Py_ssize_t rows = p.block_vectors * LANES
    cdef Py_ssize_t width = min(rows, MAX_PANEL * LANES)
    cdef Py_ssize_t keys = min(p.block_kv, p.seq_len_kv)
    cdef size_t size = 0
    w.queries = <real*> take(base, &size, rows * p.head_dim * sizeof(real))
    w.acc = <real*> take(base, &size, rows * p.head_dim_v * sizeof(real))
    w.scores = <real*> take(base, &size, keys * width * sizeof(real))
    w.k_rows = <real*> take(base, &size, keys * p.head_dim * sizeof(real))
    w.v_rows = <real*> take(base, &size, keys * p.head_dim_v * sizeof(real))
    w.rows = <real*> take(base, &size, max(width * longest, LANES * keys) * sizeof(real))
    w.row_max = <real*> take(base, &size, rows * sizeof(real))
    w.row_sum = <real*> take(base, &size, rows * sizeof(real))
    w.lanes = <Lane*> take(base, &size, rows * sizeof(Lane))
    w.transposed = <real*> take(base, &size, keys * LANES * sizeof(real))
    w.visible = <real*> take(base, &size, keys * width * sizeof(real))
    w.v_finite = <real*> take(base, &size, keys * p.head_dim_v * sizeof(real))
    return size


cdef inline char* take(char* base, size_t* used, size_t bytes) noexcept nogil:
    cdef char* piece = base + used[0]
    used[0] += (bytes + 63) // 64 * 64
    return piece


cdef inline int panel_vectors(Py_ssize_t vectors) noexcept nogil:
    """How many of the remaining vectors the next panel takes: 3, and 2 + 2 instead of 3 + 1, since a panel of one
    vector has too few accumulators to fill the FMA pipes."""
    return 1 if vectors == 1 else 2 if vectors == 2 or vectors == 4 else 3


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


cdef inline void score_keys(const int ROWS, const int VECTORS, real* scores, vf* tile_max, const real* q,
                            const real* k, Py_ssize_t k_stride, Py_ssize_t head_dim) noexcept nogil:
    """scores[ROWS][width] (OUT) = ROWS keys times the panel's queries; tile_max (IN/OUT) follows them."""
    cdef vf acc[8 * MAX_PANEL]
    cdef int r, v
    for r in range(ROWS * VECTORS):
        acc[r] = vset1(<real> 0.0)
    multiply(ROWS, VECTORS, acc, k, k_stride, 1, q, head_dim)
    for r in range(ROWS):
        for v in range(VECTORS):
            tile_max[v] = vmax(acc[r * VECTORS + v], tile_max[v])  # a NaN score is passed over; exp2 keeps it
            vstore(scores + (r * VECTORS + v) * LANES, acc[r * VECTORS + v])


cdef inline void score_tile(const int VECTORS, real* scores, vf* tile_max, const real* q, const real* k,
                            Py_ssize_t k_stride, Py_ssize_t n, Py_ssize_t head_dim) noexcept nogil:
    cdef int ROWS = 8 if VECTORS == 1 or REGISTERS == 32 else 4
    cdef Py_ssize_t j = 0
    while j + ROWS <= n:
        if ROWS == 8:
            score_keys(8, VECTORS, scores + j * VECTORS * LANES, tile_max, q, k + j * k_stride, k_stride, head_dim)
        else:
            score_keys(4, VECTORS, scores + j * VECTORS * LANES, tile_max, q, k + j * k_stride, k_stride, head_dim)
        j += ROWS
        if n - ROWS < j < n and n >= ROWS:
            j = n - ROWS  # the last keys: a whole tile again, over keys some of which are done already
    while j < n:
        score_keys(1, VECTORS, scores + j * VECTORS * LANES, tile_max, q, k + j * k_stride, k_stride, head_dim)
        j += 1


cdef inline void accumulate_dims(const int ROWS, const int VECTORS, real* acc, const real* probs, const real* v_rows,
                                 Py_ssize_t v_stride, Py_ssize_t n) noexcept nogil:
    """acc[ROWS][width] (IN/OUT) += ROWS columns of V, over n keys, times the panel's probabilities."""
    cdef vf tile[8 * MAX_PANEL]
    cdef int r
    for r in range(ROWS * VECTORS):
        tile[r] = vset1(<real> 0.0)
    multiply(ROWS, VECTORS, tile, v_rows, 1, v_stride, probs, n)
    for r in range(ROWS * VECTORS):
        vstore(acc + r * LANES, vload(acc + r * LANES) + tile[r])


cdef inline void accumulate(const int VECTORS, real* acc, const real* probs, const real* v_rows, Py_ssize_t v_stride,
                            Py_ssize_t n, Py_ssize_t head_dim_v) noexcept nogil:
    cdef int ROWS = 8 if VECTORS == 1 or REGISTERS == 32 else 4
    cdef Py_ssize_t d = 0
    while d + ROWS <= head_dim_v:
        if ROWS == 8:
            accumulate_dims(8, VECTORS, acc + d * VECTORS * LANES, probs, v_rows + d, v_stride, n)
        else:
            accumulate_dims(4, VECTORS, acc + d * VECTORS * LANES, probs, v_rows + d, v_stride, n)
        d += ROWS
    while d < head_dim_v:
        accumulate_dims(1, VECTORS, acc + d * VECTORS * LANES, probs, v_rows + d, v_stride, n)
        d += 1


cdef inline void update_reference(const int VECTORS, const vf* tile_max, real* row_max, real* row_sum, real* acc,
                                  Py_ssize_t head_dim_v) noexcept nogil:
    """row_max is a reference, not the maximum: a lane moves it only when its scores exceed it by more than 2**8, which
    random scores never do after the first block, and then rescales what it has summed. Lanes that stay multiply by
    an exact 1. Starting at LOWEST instead of -inf keeps -inf - row_max from being NaN."""
    cdef vf factor[MAX_PANEL]
    cdef vf old, new
    cdef Py_ssize_t d
    cdef int v
    cdef bint grew = False
    for v in range(VECTORS):
        grew = grew or vany(vless(vload(row_max + v * LANES) + vset1(<real> 8.0), tile_max[v]))
    if not grew:
        return
    for v in range(VECTORS):
        old = vload(row_max + v * LANES)
        new = vselect(vless(old + vset1(<real> 8.0), tile_max[v]), tile_max[v], old)
        factor[v] = vexp2(old - new)
        vstore(row_max + v * LANES, new)
        vstore(row_sum + v * LANES, vload(row_sum + v * LANES) * factor[v])
    for d in range(head_dim_v):
        for v in range(VECTORS):
            vstore(acc + (d * VECTORS + v) * LANES, vload(acc + (d * VECTORS + v) * LANES) * factor[v])


cdef inline void exponentiate(const int VECTORS, real* scores, const real* row_max, real* row_sum,
                              Py_ssize_t n) noexcept nogil:
    """scores (IN/OUT) become probabilities exp2(s - row_max); row_sum (IN/OUT) adds their sum."""
    cdef vf reference[MAX_PANEL]
    cdef vf total[MAX_PANEL]
    cdef vf prob
    cdef Py_ssize_t j
    cdef int v
    for v in range(VECTORS):
        reference[v] = vload(row_max + v * LANES)
        total[v] = vset1(<real> 0.0)
    for j in range(n):
        for v in range(VECTORS):
            prob = vexp2(vload(scores + (j * VECTORS + v) * LANES) - reference[v])
            total[v] = total[v] + prob
            vstore(scores + (j * VECTORS + v) * LANES, prob)
    for v in range(VECTORS):
        vstore(row_sum + v * LANES, vload(row_sum + v * LANES) + total[v])


cdef void mask_tile(const Problem* p, const Workspace* w, real* scores, Py_ssize_t width, Py_ssize_t batch,
                    Py_ssize_t key_start, Py_ssize_t n, const Lane* lanes, bint limited) noexcept nogil:
    """The two modifiers that can take a key away."""
    if p.mask.data != NULL:
        add_mask(scores, width, n, key_start, &p.mask, batch, lanes, w.rows, w.transposed)
    if limited:
        limit_keys(scores, width, n, key_start, lanes)


cdef bint make_finite(real* finite, const real* v_rows, Py_ssize_t v_stride, Py_ssize_t n,
                      Py_ssize_t head_dim_v) noexcept nogil:
    """True when V has a NaN or infinity in these n rows; finite (OUT) is then a copy with 0 in their place."""
    cdef Py_ssize_t j, d
    cdef real check = 0.0
    cdef real zero
    for j in range(n):
        zero = 0.0
        for d in range(head_dim_v):
            zero += v_rows[j * v_stride + d] * <real> 0.0  # NaN for NaN and infinity
        check += zero
    if check == 0.0:
        return False
    for j in range(n):
        for d in range(head_dim_v):
            zero = v_rows[j * v_stride + d] * <real> 0.0
            finite[j * head_dim_v + d] = v_rows[j * v_stride + d] if zero == 0.0 else <real> 0.0
    return True


cdef void repair_values(real* acc, const real* probs, const real* visible, const real* v_rows, Py_ssize_t v_stride,
                        Py_ssize_t n, Py_ssize_t width, Py_ssize_t head_dim_v) noexcept nogil:
    """The other half of make_finite: NaN and infinities of V reach those lanes of acc that see their key."""
    cdef Py_ssize_t j, d, i
    cdef real value
    for j in range(n):
        for d in range(head_dim_v):
            value = v_rows[j * v_stride + d]
            if value * <real> 0.0 == 0.0:
                continue
            for i in range(width):
                if visible[j * width + i] != -INFINITY:
                    acc[d * width + i] += probs[j * width + i] * value


cdef inline void attend_tile(const int VECTORS, const Problem* p, const Workspace* w, Py_ssize_t batch,
                             Py_ssize_t first_vector, Py_ssize_t key_start, Py_ssize_t n, const real* k,
                             Py_ssize_t k_stride, const real* v, Py_ssize_t v_stride, int* v_is_finite) noexcept nogil:
    """One panel of queries against the n keys from key_start on: its acc, row_max and row_sum move on.
    v_is_finite (IN/OUT): -1 when not yet known of this block of V."""
    cdef Py_ssize_t width = VECTORS * LANES
    cdef Lane* lanes = w.lanes + first_vector * LANES
    cdef real* row_max = w.row_max + first_vector * LANES
    cdef real* row_sum = w.row_sum + first_vector * LANES
    cdef real* acc = w.acc + first_vector * LANES * p.head_dim_v
    cdef vf tile_max[MAX_PANEL]
    cdef Py_ssize_t low = lanes[0].low, high = lanes[0].high      # seen by some lane
    cdef Py_ssize_t all_low = low, all_high = high                # seen by all lanes
    cdef Py_ssize_t i, j, skipped, block_keys = n
    cdef bint limited, masked
    for i in range(1, width):
        low = min(low, lanes[i].low)
        high = max(high, lanes[i].high)
        all_low = max(all_low, lanes[i].low)
        all_high = min(all_high, lanes[i].high)
    skipped = max(low - key_start, 0)
    n = min(n, high - key_start) - skipped
    if n <= 0:
        return
    key_start += skipped
    limited = key_start < all_low or key_start + n > all_high
    masked = limited or p.mask.data != NULL

    for i in range(VECTORS):
        tile_max[i] = vset1(<real> -INFINITY)
    score_tile(VECTORS, w.scores, tile_max, w.queries + first_vector * LANES * p.head_dim, k + skipped * k_stride,
               k_stride, n, p.head_dim)
    if masked or p.softcap != 0 or p.slopes != NULL:
        if p.softcap != 0:
            cap_scores(w.scores, n * width, p.softcap)
        if p.slopes != NULL:
            add_alibi(w.scores, width, n, key_start, lanes)
        mask_tile(p, w, w.scores, width, batch, key_start, n, lanes, limited)
        for i in range(VECTORS):
            tile_max[i] = vset1(<real> -INFINITY)
        for j in range(n):
            for i in range(VECTORS):
                tile_max[i] = vmax(vload(w.scores + (j * VECTORS + i) * LANES), tile_max[i])
    if p.weights != NULL:
        keep_scores(p, w.scores, width, batch, key_start, n, lanes)
    update_reference(VECTORS, tile_max, row_max, row_sum, acc, p.head_dim_v)
    exponentiate(VECTORS, w.scores, row_max, row_sum, n)
    if p.dropout_threshold != 0:
        for i in range(width):
            drop_weights(w.scores + i, width, key_start, n, p.dropout_threshold, p.keep_scale, p.seed,
                         <uint32_t> lanes[i].query, <uint32_t> lanes[i].head, <uint32_t> (p.batch_offset + batch))

    # A key that some lanes of this tile do not see has probability 0 there, and 0 * NaN would leak its value.
    if masked and v_is_finite[0] < 0:
        v_is_finite[0] = not make_finite(w.v_finite, v, v_stride, block_keys, p.head_dim_v)
    if masked and not v_is_finite[0]:
        accumulate(VECTORS, acc, w.scores, w.v_finite + skipped * p.head_dim_v, p.head_dim_v, n, p.head_dim_v)
        for j in range(n * width):
            w.visible[j] = 0.0
        mask_tile(p, w, w.visible, width, batch, key_start, n, lanes, limited)
        repair_values(acc, w.scores, w.visible, v + skipped * v_stride, v_stride, n, width, p.head_dim_v)
    else:
        accumulate(VECTORS, acc, w.scores, v + skipped * v_stride, v_stride, n, p.head_dim_v)


cdef inline real* weights_row(const Problem* p, Py_ssize_t batch, Lane lane) noexcept nogil:
    return p.weights + ((batch * p.num_kv_heads * p.group_size + lane.head) * p.seq_len_q + lane.query) * p.seq_len_kv


cdef void keep_scores(const Problem* p, const real* scores, Py_ssize_t width, Py_ssize_t batch, Py_ssize_t key_start,
                      Py_ssize_t n, const Lane* lanes) noexcept nogil:
    """Writes the tile of modified scores into the rows of the weights that are to come (finish_rows makes them)."""
    cdef Py_ssize_t i, j
    cdef real* row
    for i in range(width):
        row = weights_row(p, batch, lanes[i]) + key_start
        for j in range(n):
            row[j] = scores[j * width + i]


cdef inline vf weight_of(vf score, real reference, real inverse_sum) noexcept nogil:
    """Exactly 0 for a masked key, in a row of NaN as well."""
    return vselect(vequal(score, vset1(<real> -INFINITY)), vset1(<real> 0.0), vexp2(score - reference) * inverse_sum)


cdef void finish_weights(real* row, Py_ssize_t n, real reference, real inverse_sum) noexcept nogil:
    """row[0..n) (IN/OUT): scores become weights."""
    cdef real last[16]
    cdef Py_ssize_t i, tail = n % LANES
    for i in range(n // LANES):
        vstore(row, weight_of(vload(row), reference, inverse_sum))
        row += LANES
    if tail:
        memcpy(last, row, tail * sizeof(real))
        for i in range(tail, LANES):
            last[i] = reference
        vstore(last, weight_of(vload(last), reference, inverse_sum))
        memcpy(row, last, tail * sizeof(real))


cdef void describe_lanes(const Problem* p, Lane* lanes, Py_ssize_t batch, Py_ssize_t kv_head, Py_ssize_t first_row,
                         Py_ssize_t num_lanes) noexcept nogil:
    """lanes (OUT): which query each lane holds and which keys it sees. Lanes past the last row repeat it."""
    cdef Py_ssize_t rows = p.group_size * p.seq_len_q
    cdef Py_ssize_t i, row
    cdef Lane lane
    for i in range(num_lanes):
        row = min(first_row + i, rows - 1)
        lane.head = kv_head * p.group_size + row // p.seq_len_q
        lane.query = row % p.seq_len_q
        lane.position = lane.query + (p.q_offset if p.q_offsets == NULL else p.q_offsets[batch])
        lane.low = 0 if p.window_left < 0 else max(0, lane.position - p.window_left)
        lane.high = p.seq_len_kv if p.kv_lens == NULL else p.kv_lens[batch]
        if p.window_right >= 0:
            lane.high = min(lane.high, lane.position + p.window_right + 1)
        if lane.high <= lane.low:
            lane.low = lane.high = 0
        lane.slope = 0.0
        if p.slopes != NULL:
            lane.slope = p.slopes[batch * p.slopes_stride + lane.head] * <real> LOG2_E
        lanes[i] = lane


cdef void pack_queries(const Problem* p, const Workspace* w, Py_ssize_t batch, Py_ssize_t vectors) noexcept nogil:
    """w.queries (OUT)[panel][dim][width] = scale * q."""
    cdef Py_ssize_t first = 0, v, i, j
    cdef Py_ssize_t width
    cdef int panel
    cdef real* row
    while first < vectors:
        panel = panel_vectors(vectors - first)
        width = panel * LANES
        for v in range(first, first + panel):
            for i in range(LANES):
                row = w.rows + i * p.head_dim
                load_row(row, row_of(&p.q, batch, w.lanes[v * LANES + i].head, w.lanes[v * LANES + i].query),
                         p.q.stride[3], p.head_dim, p.q.kind)
                for j in range(p.head_dim):
                    row[j] *= p.scale
            transpose(w.queries + first * LANES * p.head_dim + (v - first) * LANES, width, w.rows, p.head_dim,
                      LANES, p.head_dim)
        first += panel


cdef void finish_rows(const Problem* p, const Workspace* w, Py_ssize_t batch, Py_ssize_t first_vector, int panel,
                      Py_ssize_t num_rows) noexcept nogil:
    """out (OUT), logsumexp and weights of a panel's first num_rows rows: acc / row_sum, transposed."""
    cdef Py_ssize_t width = panel * LANES
    cdef real* acc = w.acc + first_vector * LANES * p.head_dim_v
    cdef real* row
    cdef Lane lane
    cdef real inverse[MAX_WIDTH]
    cdef real row_max, row_sum
    cdef Py_ssize_t i, d
    cdef double total
    for i in range(width):
        lane = w.lanes[first_vector * LANES + i]
        row_max = w.row_max[first_vector * LANES + i]
        row_sum = w.row_sum[first_vector * LANES + i]
        total = row_sum
        if p.sinks != NULL:
            total += exp2(p.sinks[lane.head] * LOG2_E - row_max)
        inverse[i] = <real> (1.0 / total) if row_sum != 0 else <real> 0.0   # no key seen: 0 / 0 is 0 here
        if i >= num_rows:
            continue
        if p.logsumexp != NULL:
            p.logsumexp[(batch * p.num_kv_heads * p.group_size + lane.head) * p.seq_len_q + lane.query] = (
                <real> ((row_max + log2(<double> row_sum)) / LOG2_E) if row_sum != 0 else <real> -INFINITY)
        if p.weights != NULL:
            row = weights_row(p, batch, lane)
            finish_weights(row, p.seq_len_kv, row_max, inverse[i])
            if p.dropout_threshold != 0:
                drop_weights(row, 1, 0, p.seq_len_kv, p.dropout_threshold, p.keep_scale, p.seed,
                             <uint32_t> lane.query, <uint32_t> lane.head, <uint32_t> (p.batch_offset + batch))
    for d in range(p.head_dim_v):
        for i in range(panel):
            vstore(acc + d * width + i * LANES, vload(acc + d * width + i * LANES) * vload(inverse + i * LANES))
    transpose(w.rows, p.head_dim_v, acc, width, p.head_dim_v, width)
    for i in range(num_rows):
        lane = w.lanes[first_vector * LANES + i]
        store_row(row_of(&p.out, batch, lane.head, lane.query), p.out.stride[3], w.rows + i * p.head_dim_v,
                  p.head_dim_v, p.out.kind)


cdef inline const real* load_rows(real* scratch, const Tensor* t, Py_ssize_t batch, Py_ssize_t head, Py_ssize_t first,
                                  Py_ssize_t n, Py_ssize_t dim, bint reused, Py_ssize_t* stride) noexcept nogil:
    """Rows [first, first + n) of K or V as reals with `stride` (OUT) between them. Contiguous rows stay where they
    are. Rows far apart fall into few L1 sets (16 % slower in place): they are copied, unless hardly reused."""
    cdef Py_ssize_t j
    if rows_are_real(t) and (t.stride[2] == dim * <Py_ssize_t> sizeof(real) or not reused):
        stride[0] = t.stride[2] // <Py_ssize_t> sizeof(real)
        return <const real*> row_of(t, batch, head, first)
    for j in range(n):
        load_row(scratch + j * dim, row_of(t, batch, head, first + j), t.stride[3], dim, t.kind)
    stride[0] = dim
    return scratch


cdef void attend_block(const Problem* p, Py_ssize_t task, char* scratch) noexcept nogil:
    """One block of query rows of one key head, start to end."""
    cdef Workspace w
    cdef Py_ssize_t block = p.num_blocks - 1 - task % p.num_blocks   # the last rows first: most work where causal
    cdef Py_ssize_t kv_head = task // p.num_blocks % p.num_kv_heads
    cdef Py_ssize_t batch = task // p.num_blocks // p.num_kv_heads
    cdef Py_ssize_t first_row = block * p.block_vectors * LANES
    cdef Py_ssize_t num_rows = min(p.block_vectors * LANES, p.group_size * p.seq_len_q - first_row)
    cdef Py_ssize_t vectors = (num_rows + LANES - 1) // LANES
    cdef Py_ssize_t low, high, first, i, n, key_start, k_stride, v_stride
    cdef const real* k
    cdef const real* v
    cdef int panel, v_is_finite
    carve(&w, scratch, p)
    describe_lanes(p, w.lanes, batch, kv_head, first_row, vectors * LANES)
    pack_queries(p, &w, batch, vectors)
    low = p.seq_len_kv
    high = 0
    for i in range(vectors * LANES):
        w.row_max[i] = <real> LOWEST
        w.row_sum[i] = 0.0
        low = min(low, w.lanes[i].low)
        high = max(high, w.lanes[i].high)
    for i in range(vectors * LANES * p.head_dim_v):
        w.acc[i] = 0.0
    if p.weights != NULL:
        for i in range(num_rows):
            for n in range(p.seq_len_kv):
                weights_row(p, batch, w.lanes[i])[n] = <real> -INFINITY

    key_start = low - low % p.block_kv
    while key_start < high:
        n = min(p.block_kv, high - key_start)
        k = load_rows(w.k_rows, &p.k, batch, kv_head, key_start, n, p.head_dim, vectors > 3, &k_stride)
        v = load_rows(w.v_rows, &p.v, batch, kv_head, key_start, n, p.head_dim_v, vectors > 3, &v_stride)
        v_is_finite = -1
        first = 0
        while first < vectors:
            panel = panel_vectors(vectors - first)
            if panel == 3:
                attend_tile(3, p, &w, batch, first, key_start, n, k, k_stride, v, v_stride, &v_is_finite)
            elif panel == 2:
                attend_tile(2, p, &w, batch, first, key_start, n, k, k_stride, v, v_stride, &v_is_finite)
            else:
                attend_tile(1, p, &w, batch, first, key_start, n, k, k_stride, v, v_stride, &v_is_finite)
            first += panel
        key_start += p.block_kv

    first = 0
    while first < vectors:
        panel = panel_vectors(vectors - first)
        finish_rows(p, &w, batch, first, panel, min(num_rows - first * LANES, panel * LANES))
        first += panel
