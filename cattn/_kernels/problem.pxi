# One attention problem, the scratch that a thread needs for it, and what both kernels share: which keys a query row
# sees, how rows of K and V are fetched, how a row ends.
#
# A task is (batch, key head, block of query rows). The query rows of all heads that share a key head stand one after
# the other, so grouped queries use each load of K and V together. The keys are cut into splits of a fixed length, each
# with a softmax of its own, merged in order: a thread does the splits of its task one after the other, or, where there
# are too few tasks, different threads do them. Who does what changes no bit.

cdef struct Parts   # attend.pxi

cdef struct Problem:
    Tensor q, k, v, out, mask       # IN, IN, IN, OUT, IN
    real* weights                   # OUT (batch, num_heads, seq_len_q, seq_len_kv), contiguous; or NULL
    uint16_t* narrow_weights        # OUT, the same in the kind of out, where that has 16 bits; or NULL
    real* logsumexp                 # OUT (batch, num_heads, seq_len_q), contiguous; or NULL
    const real* sinks               # IN (num_heads,); or NULL
    const real* slopes              # IN (batch or 1, num_heads); or NULL
    Py_ssize_t slopes_stride        # from one batch row of slopes to the next: num_heads or 0
    const int64_t* q_offsets        # IN (batch,); or NULL: q_offset for all
    const int64_t* kv_lens          # IN (batch,); or NULL: all seq_len_kv
    Py_ssize_t q_offset
    Py_ssize_t batch, num_kv_heads, group_size, seq_len_q, head_dim, head_dim_v, seq_len_kv
    Py_ssize_t window_left, window_right   # -1: unbounded; is_causal is window_right = 0
    # Of a score, see choose_units
    real sign                       # the scale's: queries are packed times it
    real scale                      # what the modifiers multiply by first; 1: nothing
    real unit                       # exp(score) is exp2(s * unit), for a score s as it leaves the modifiers
    double natural                  # s * natural is the score
    real softcap                    # 0: none
    bint dropout
    uint32_t dropout_threshold
    real keep_scale
    uint64_t seed
    Py_ssize_t batch_offset         # of this call's first batch row, for dropout
    # The plan (attend.pxi)
    int decode_width                # 0: prefill kernel; else lanes that decode gives to rows: 1, 2, 4 or 8
    bint k_in_place, v_in_place     # rows of K, V are read where they lie, in whatever block
    bint may_mask                   # some row may not see some key of a block
    Py_ssize_t q_stride, v_stride   # reals from one row of packed queries, of acc, to the next
    Py_ssize_t block_rows           # query rows in a block, a multiple of LANES (decode: decode_width)
    Py_ssize_t num_blocks           # blocks of query rows per (batch, key head)
    Py_ssize_t block_kv             # keys in a block: what one pass of the kernel's loops takes
    Py_ssize_t split_kv             # keys in a split, a multiple of block_kv
    Py_ssize_t num_splits
    Parts* parts                    # splits that different threads do; NULL: each does whole tasks
    Call* call

cdef struct State:                  # of the softmax of a block of rows, over the keys done so far
    # In the unit of what leaves the modifiers. [block_rows], decode: [LANES], row r in each lane l with
    # l % decode_width == r
    real* row_max
    real* row_sum                   # likewise; decode: the lanes of a row hold parts of its sum
    real* acc                       # [panel][head_dim_v][width], decode: [row][v_stride]

cdef struct Workspace:              # one per thread, SCRATCH
    State total, part
    State lost                      # what rounding has taken from the sums of total, see merge_vector; no row_max
    real* queries                   # [panel][head_dim][width], decode: [row][q_stride]; times p.sign
    real* scores                    # [block_kv][width]
    real* next_scores               # likewise, for prefill
    real* k_rows                    # [block_kv][q_stride]; unless K is read in place
    real* v_rows                    # [block_kv][v_stride]; likewise
    real* visible                   # [block_kv][width]: 0 where seen, -inf where masked; see repair_values
    real* v_finite                  # [block_kv][v_stride]; both only where a row may not see a key
    real* rows                      # query or result rows, or LANES mask rows of block_kv
    real* shrink                    # [block_rows], decode: [LANES]; factors of probabilities, see store_result
    bint again                      # some of them are not 1
    Lane* lanes                     # [block_rows]

cdef struct Task:
    Py_ssize_t number
    Py_ssize_t batch, kv_head
    Py_ssize_t head, query          # of the first row
    Py_ssize_t num_rows             # query rows in this block
    Py_ssize_t low, high            # keys [low, high) are seen by some row


cdef inline Py_ssize_t state_size(const Problem* p) noexcept nogil:
    """In bytes, a multiple of 64."""
    return (2 * max(p.block_rows, LANES) + p.block_rows * p.v_stride) * <Py_ssize_t> sizeof(real) // 64 * 64 + 64


cdef inline void place_state(State* s, char* base, const Problem* p) noexcept nogil:
    cdef Py_ssize_t lanes = max(p.block_rows, LANES)
    s.acc = <real*> base
    s.row_max = s.acc + p.block_rows * p.v_stride
    s.row_sum = s.row_max + lanes


cdef inline char* take(char* base, size_t* used, size_t bytes) noexcept nogil:
    cdef char* piece = base + used[0]
    used[0] += (bytes + 63) // 64 * 64
    return piece


cdef size_t carve(Workspace* w, char* base, const Problem* p) noexcept nogil:
    """Lays the workspace out from `base` on, 64-byte aligned pieces; returns its size in bytes."""
    cdef Py_ssize_t width = min(p.block_rows, <Py_ssize_t> PANEL_VECTORS * LANES)
    cdef Py_ssize_t keys = (min(p.block_kv, p.seq_len_kv) + LANES - 1) // LANES * LANES
    cdef size_t size = 0
    cdef Py_ssize_t state = state_size(p)
    place_state(&w.total, take(base, &size, state), p)
    place_state(&w.part, take(base, &size, state if p.num_splits > 1 else 0), p)
    place_state(&w.lost, take(base, &size, state if p.num_splits > 1 else 0), p)
    w.queries = <real*> take(base, &size, p.block_rows * p.q_stride * sizeof(real))
    w.scores = <real*> take(base, &size, keys * width * sizeof(real))
    w.next_scores = <real*> take(base, &size, keys * width * sizeof(real))
    w.k_rows = <real*> take(base, &size, 0 if p.k_in_place else keys * p.q_stride * sizeof(real))
    w.v_rows = <real*> take(base, &size, 0 if p.v_in_place else keys * p.v_stride * sizeof(real))
    w.rows = <real*> take(base, &size, max(width * max(p.q_stride, p.v_stride), LANES * max(p.q_stride, keys))
                          * sizeof(real))
    w.shrink = <real*> take(base, &size, max(p.block_rows, LANES) * sizeof(real))
    w.lanes = <Lane*> take(base, &size, p.block_rows * sizeof(Lane))
    w.visible = <real*> take(base, &size, keys * width * sizeof(real) if p.may_mask else 0)
    w.v_finite = <real*> take(base, &size, keys * p.v_stride * sizeof(real) if p.may_mask else 0)
    return size


cdef void reset(const Problem* p, State* s) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(max(p.block_rows, LANES)):
        s.row_max[i] = <real> LOWEST
        s.row_sum[i] = 0.0
    memset(s.acc, 0, p.block_rows * p.v_stride * sizeof(real))


# Splits are merged in order. Their sums are kept with what rounding takes from them, so that the error of the whole
# does not grow with the number of splits; and the reference is moved only past SLACK, as within a split, or the errors
# of many factors near 1 would add up.

cdef inline void merge_reference(real* total_max, const real* part_max, real unit, vf* factors) noexcept nogil:
    """total_max (IN/OUT), one vector; factors (OUT)[2]: what the sums of total and part are multiplied by."""
    cdef vf old = vload(total_max), other = vload(part_max), new
    new = vselect(vless(vset1(<real> SLACK), (other - old) * unit), other, old)
    factors[0], factors[1] = vexp2((old - new) * unit), vexp2((other - new) * unit)
    vstore(total_max, new)


cdef inline void merge_vector(real* total, real* lost, const real* part, vf total_factor,
                              vf part_factor) noexcept nogil:
    """total + lost (IN/OUT) = (total + lost) * total_factor + part * part_factor: the sum of two numbers and what it
    rounds off (Knuth, The Art of Computer Programming 2, 4.2.2) are exact. Infinities lose nothing."""
    cdef vf a = vrounded(vload(total) * total_factor), b = vrounded(vload(part) * part_factor)
    cdef vf both = a + b
    cdef vf of_b = both - a
    cdef vf off = (a - (both - of_b)) + (b - of_b)
    off = vselect(vequal(off, off), off, vset1(<real> 0.0))
    vstore(lost, vload(lost) * total_factor + off)
    vstore(total, both)


cdef void add_lost(const Problem* p, State* total, const State* lost) noexcept nogil:
    """The sums of total (IN/OUT) get back what was lost."""
    cdef Py_ssize_t i
    for i in range(max(p.block_rows, LANES)):
        total.row_sum[i] += lost.row_sum[i]
    for i in range(p.block_rows * p.v_stride):
        total.acc[i] += lost.acc[i]


cdef void locate_task(const Problem* p, Py_ssize_t number, Task* task) noexcept nogil:
    """task (OUT), but for its keys."""
    cdef Py_ssize_t block = p.num_blocks - 1 - number % p.num_blocks   # the last rows first: most work where causal
    cdef Py_ssize_t first_row = block * p.block_rows
    task.number = number
    task.kv_head = number // p.num_blocks % p.num_kv_heads
    task.batch = number // p.num_blocks // p.num_kv_heads
    task.head = task.kv_head * p.group_size + first_row // p.seq_len_q
    task.query = first_row % p.seq_len_q
    task.num_rows = min(p.block_rows, p.group_size * p.seq_len_q - first_row)


cdef void describe_task(const Problem* p, Py_ssize_t number, Task* task, Lane* lanes) noexcept nogil:
    """task (OUT), and lanes (OUT)[block_rows]: which query each lane holds and which keys it sees. Lanes past the last
    row repeat it."""
    cdef Py_ssize_t i, q_offset
    cdef real slope, limit = <real> BIAS_LIMIT
    cdef Lane lane
    locate_task(p, number, task)
    task.low, task.high = p.seq_len_kv, 0
    lane.head, lane.query = task.head, task.query
    q_offset = p.q_offset if p.q_offsets == NULL else p.q_offsets[task.batch]
    for i in range(p.block_rows):
        lane.position = lane.query + q_offset
        lane.low = 0 if p.window_left < 0 else max(0, lane.position - p.window_left)
        lane.high = p.seq_len_kv if p.kv_lens == NULL else p.kv_lens[task.batch]
        if p.window_right >= 0:
            lane.high = min(lane.high, lane.position + p.window_right + 1)
        if lane.high <= lane.low:
            lane.low = lane.high = 0
        else:
            task.low = min(task.low, lane.low)
            task.high = max(task.high, lane.high)
        lane.slope = 0.0
        if p.slopes != NULL:
            slope = p.slopes[task.batch * p.slopes_stride + lane.head]
            lane.slope = -limit if slope < -limit else limit if slope > limit else slope
        lanes[i] = lane
        if i + 1 < task.num_rows:
            lane.query += 1
            if lane.query == p.seq_len_q:
                lane.query = 0
                lane.head += 1
    if task.high == 0:
        task.low = 0


cdef inline const real* load_rows(real* scratch, const Tensor* t, Py_ssize_t batch, Py_ssize_t head, Py_ssize_t first,
                                  Py_ssize_t n, Py_ssize_t dim, bint in_place, Py_ssize_t* stride) noexcept nogil:
    """Rows [first, first + n) of K or V as reals, `stride` (IN: of scratch, OUT: of the result) apart; what a row of
    scratch has beyond `dim` is 0."""
    cdef Py_ssize_t j, d
    if in_place:
        stride[0] = t.stride[2] // <Py_ssize_t> sizeof(real)
        return <const real*> row_of(t, batch, head, first)
    for j in range(n):
        load_row(scratch + j * stride[0], row_of(t, batch, head, first + j), t.stride[3], dim, t.kind)
        for d in range(dim, stride[0]):
            scratch[j * stride[0] + d] = 0.0
    return scratch


cdef int choose_units(Problem* p, scale) except -1:
    """sign, scale, unit and natural (OUT), from the scale, None for 1 / sqrt(head_dim), and the modifiers. The query is
    never multiplied by the scale: that would round what plain NumPy does not, and could leave the range. As long as
    scores are only compared, with each other or with -inf, they stay products of query and key, and exp2 takes
    (s - row_max) * unit, with unit = |scale| log2(e): where s is near the maximum, the difference is exact and small.
    Where something is calculated with them, the first modifier multiplies by |scale|, as NumPy does; and where |scale|
    is so small that -inf, times it, were lost in it. The sign goes into the query, so that the largest s belongs to the
    largest score."""
    cdef double given = 0.0 if scale is None else scale, size
    cdef fp_mode callers = own_mode()
    size = fabs(given) if scale is not None else 1 / sqrt(opaque(<double> p.head_dim))
    p.sign = -1.0 if given < 0 else 1.0
    p.scale = 1.0
    p.natural = size
    if (size < SMALLEST_UNIT or p.softcap != 0 or p.slopes != NULL or (p.mask.data != NULL and p.mask.kind != BOOL)):
        p.scale = <real> size
        p.natural = 1.0
    p.unit = <real> (p.natural * LOG2_E)
    set_mode(callers)
    return 0


cdef void mask_tile(const Problem* p, const Workspace* w, real* scores, real scale, Py_ssize_t width, Py_ssize_t batch,
                    Py_ssize_t key_start, Py_ssize_t n, const Lane* lanes, bint limited) noexcept nogil:
    """The two modifiers that can take a key away."""
    if p.mask.data != NULL:
        add_mask(scores, scale, width, n, key_start, &p.mask, batch, lanes, w.rows)
    if limited:
        limit_keys(scores, width, n, key_start, lanes)


cdef bint modify_tile(const Problem* p, const Workspace* w, real* scores, Py_ssize_t width, Py_ssize_t batch,
                      Py_ssize_t key_start, Py_ssize_t n, const Lane* lanes, bint limited) noexcept nogil:
    """All modifiers on scores (IN/OUT); False where there is none."""
    cdef real scale = p.scale
    if not limited and p.mask.data == NULL and scale == 1 and p.softcap == 0 and p.slopes == NULL:
        return False
    # A float mask, when it is the first to need it, brings the scale in itself: one FMA instead of a pass.
    if scale != 1 and (p.softcap != 0 or p.slopes != NULL or p.mask.data == NULL or p.mask.kind == BOOL):
        scale_scores(scores, n * width, scale)
        scale = 1.0
    if p.softcap != 0:
        cap_scores(scores, n * width, p.softcap)
    if p.slopes != NULL:
        add_alibi(scores, width, n, key_start, lanes)
    mask_tile(p, w, scores, scale, width, batch, key_start, n, lanes, limited)
    return True


cdef void drop_tile(const Problem* p, real* probs, Py_ssize_t width, Py_ssize_t batch, Py_ssize_t key_start,
                    Py_ssize_t n, const Lane* lanes) noexcept nogil:
    cdef Py_ssize_t i
    if not p.dropout:
        return
    for i in range(width):
        drop_weights(probs + i, width, key_start, n, p.dropout_threshold, p.keep_scale, p.seed,
                     <uint32_t> lanes[i].query, <uint32_t> lanes[i].head, <uint32_t> (p.batch_offset + batch))


cdef void shrink_tile(real* probs, Py_ssize_t vectors, const real* shrink, Py_ssize_t period) noexcept nogil:
    """probs (IN/OUT), whole vectors of them: times their rows' factors, which come again after `period` vectors. What
    was above 0 stays so where the factor is not 1: the weight of an infinite value. Finite ones do not feel it."""
    cdef Py_ssize_t i
    cdef vf zero = vset1(<real> 0.0), one = vset1(<real> 1.0)
    cdef vf prob, factor, product, least
    for i in range(vectors):
        prob, factor = vload(probs + i * LANES), vload(shrink + i % period * LANES)
        product = prob * factor
        least = vselect(vless(factor, one), vset1(<real> SMALLEST), zero)
        product = vselect(vless(zero, prob), vmax(product, least), product)
        vstore(probs + i * LANES, product)


cdef bint all_finite(const real* x, Py_ssize_t n) noexcept nogil:
    cdef vf check = vset1(<real> 0.0)
    cdef real tail = 0.0
    cdef Py_ssize_t i
    for i in range(n // LANES):
        check = vfma(vload(x), vset1(<real> 0.0), check)  # NaN from the first NaN or infinity on
        x += LANES
    for i in range(n % LANES):
        tail += x[i] * <real> 0.0
    return tail == 0.0 and not vany(vdiffer(check, check))


cdef bint make_finite(real* finite, Py_ssize_t finite_stride, const real* v_rows, Py_ssize_t v_stride, Py_ssize_t n,
                      Py_ssize_t head_dim_v) noexcept nogil:
    """True when V has a NaN or infinity in these n rows; finite (OUT) is then a copy with 0 in their place. A key that
    some rows do not see has probability 0 there, and 0 * NaN would leak its value."""
    cdef Py_ssize_t j, d
    cdef real value
    cdef bint finite_so_far = True
    for j in range(n):
        finite_so_far = finite_so_far and all_finite(v_rows + j * v_stride, head_dim_v)
    if finite_so_far:
        return False
    for j in range(n):
        for d in range(head_dim_v):
            value = v_rows[j * v_stride + d]
            finite[j * finite_stride + d] = value if value * <real> 0.0 == 0.0 else <real> 0.0
    return True


cdef void repair_values(const Problem* p, const Workspace* w, const real* probs, real* acc, Py_ssize_t acc_lane,
                        Py_ssize_t acc_dim, const real* v_rows, Py_ssize_t v_stride, Py_ssize_t width,
                        Py_ssize_t batch, Py_ssize_t key_start, Py_ssize_t n, const Lane* lanes,
                        bint limited) noexcept nogil:
    """The other half of make_finite: NaN and infinities of V reach those lanes of acc, acc[lane * acc_lane +
    dim * acc_dim], that see their key. Which do: the modifiers tell, on a tile of zeros."""
    cdef Py_ssize_t j, d, i
    cdef real value
    for j in range(n * width):
        w.visible[j] = 0.0
    mask_tile(p, w, w.visible, 1.0, width, batch, key_start, n, lanes, limited)
    for j in range(n):
        if stopped(p.call):
            return
        for d in range(p.head_dim_v):
            value = v_rows[j * v_stride + d]
            if value * <real> 0.0 == 0.0:
                continue
            for i in range(width):
                if w.visible[j * width + i] != -INFINITY:
                    acc[i * acc_lane + d * acc_dim] += probs[j * width + i] * value


cdef inline real* weights_row(const Problem* p, Py_ssize_t batch, Lane lane) noexcept nogil:
    return p.weights + ((batch * p.num_kv_heads * p.group_size + lane.head) * p.seq_len_q + lane.query) * p.seq_len_kv


cdef void clear_weights(const Problem* p, const Workspace* w, const Task* task) noexcept nogil:
    cdef Py_ssize_t i, j
    cdef real* row
    for i in range(task.num_rows):
        if stopped(p.call):
            return
        row = weights_row(p, task.batch, w.lanes[i])
        for j in range(p.seq_len_kv):
            row[j] = <real> -INFINITY


cdef void keep_scores(const Problem* p, const real* scores, Py_ssize_t width, Py_ssize_t batch, Py_ssize_t key_start,
                      Py_ssize_t n, const Lane* lanes) noexcept nogil:
    """Writes the tile of modified scores into the rows of the weights that are to come (finish_row makes them)."""
    cdef Py_ssize_t i, j
    cdef real* row
    if p.weights == NULL:
        return
    for i in range(width):
        row = weights_row(p, batch, lanes[i]) + key_start
        for j in range(n):
            row[j] = scores[j * width + i]


cdef inline vf weight_of(vf score, real reference, real unit, real inverse_sum) noexcept nogil:
    """Exactly 0 for a masked key, in a row of NaN as well."""
    return vselect(vequal(score, vset1(<real> -INFINITY)), vset1(<real> 0.0),
                   vexp2((score - reference) * unit) * inverse_sum)


cdef void finish_weights(real* row, Py_ssize_t n, real reference, real unit, real inverse_sum) noexcept nogil:
    """row[0..n) (IN/OUT): scores become weights."""
    cdef real last[16]
    cdef Py_ssize_t i, tail = n % LANES
    for i in range(n // LANES):
        vstore(row, weight_of(vload(row), reference, unit, inverse_sum))
        row += LANES
    if tail:
        memcpy(last, row, tail * sizeof(real))
        for i in range(tail, LANES):
            last[i] = reference
        vstore(last, weight_of(vload(last), reference, unit, inverse_sum))
        memcpy(row, last, tail * sizeof(real))


cdef bint store_result(const Problem* p, Py_ssize_t batch, Lane lane, real* shrink, real* row) noexcept nogil:
    """Stores a row of out. True where it has to be done again.

    Probabilities are relative to a reference near the maximum and may add up to 2**8 * keys, so that huge values can
    overflow acc where the result would not. A row with an infinity or NaN is done once more, with probabilities and acc
    times 2**-40, and only those numbers are taken from there: others would lose digits below 1e-26. Other rows keep
    their bits. Infinities and NaN that were in the input come out again."""
    cdef char* target = row_of(&p.out, batch, lane.head, lane.query)
    cdef real stored
    cdef Py_ssize_t d
    cdef bint again = False
    if shrink[0] == 1.0:
        again = not all_finite(row, p.head_dim_v)
        shrink[0] = <real> SHRINK if again else <real> 1.0
    else:
        for d in range(p.head_dim_v):
            stored = load_one(target + d * p.out.stride[3], p.out.kind)
            if stored * <real> 0.0 == 0.0:
                row[d] = stored
    store_row(target, p.out.stride[3], row, p.head_dim_v, p.out.kind)
    return again


cdef inline real sink_term(const Problem* p, Lane lane, real row_max) noexcept nogil:
    """What a sink adds to row_sum."""
    return <real> exp(p.sinks[lane.head] - row_max * p.natural) if p.sinks != NULL else <real> 0.0


cdef void finish_row(const Problem* p, Py_ssize_t batch, Lane lane, real row_max, real row_sum,
                     real inverse_sum) noexcept nogil:
    """A row's logsumexp and weights (OUT), where asked for."""
    cdef real* row
    if p.logsumexp != NULL:
        p.logsumexp[(batch * p.num_kv_heads * p.group_size + lane.head) * p.seq_len_q + lane.query] = (
            <real> (row_max * p.natural + log(<double> row_sum)) if row_sum != 0 else <real> -INFINITY)
    if p.weights != NULL and not stopped(p.call):
        row = weights_row(p, batch, lane)
        finish_weights(row, p.seq_len_kv, row_max, p.unit, inverse_sum)
        if p.dropout:
            drop_weights(row, 1, 0, p.seq_len_kv, p.dropout_threshold, p.keep_scale, p.seed,
                         <uint32_t> lane.query, <uint32_t> lane.head, <uint32_t> (p.batch_offset + batch))
        if p.narrow_weights != NULL:
            store_row(<char*> (p.narrow_weights + (row - p.weights)), sizeof(uint16_t), row, p.seq_len_kv, p.out.kind)
