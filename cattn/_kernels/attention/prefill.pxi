# Attention, O = softmax(Q K^T) V, without ever storing Q K^T: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with the
# *queries in the SIMD lanes*.
#
#     for each task: (batch, key head, block of query rows)
#         pack q, transposed, in panels of up to 3 vectors of queries
#         reference = LOWEST, row_sum = 0, acc = 0
#         for each block of keys, on a grid that starts at key 0
#             load K and V rows: in place where they are reals (V: adjacent ones), else copied into scratch
#             for each panel that sees any of these keys
#                 scores      S^T[key][query] = K broadcast x Q^T vectors
#                 modify      only where a mask, a limit, softcap or ALiBi touches the tile
#                 softmax     reference (lazily), exp2, sum: all vertical; meanwhile, of the panel before this,
#                 accumulate  O^T[dim][query] += V broadcast x P^T
#         out = O^T transposed / row_sum; logsumexp
#
# Softmax and accumulate share a loop, one vector of exp2 every few keys: ten of its fifteen operations are no FMAs, and
# on Zen run beside them when both are within the reach of one reorder buffer. Apart, exp2 takes 8 to 10 % of the time
# at head_dim 64; woven in, half of that. On Intel every 512-bit operation needs a port of the FMAs, and woven in, a
# chain of 40 cycles fills the scheduler (Cascade Lake: 1.2 times the time). Fused tiles are for those: exp2 takes the
# scores from the registers where they are computed, as soon as the reference is known, and a panel is accumulated
# before the next one is scored, while L1 still has its probabilities.
#
# No horizontal operation and no packing of K or V anywhere. Every number of a query row is computed from its own query
# and the keys it sees, each dot product and sum in one fixed order, so neither the rows beside it, the number of
# threads, the size of the blocks of rows nor masked keys change a bit (a masked key adds an exact 0).
#
# Exactness: sums over keys start afresh in each block of keys (one long sum costs 3 to 8 times the error at 2048 to
# 16384 keys); probabilities are relative to a reference at most 2**8 below the maximum, so they never overflow.
# Assumes: checked arguments; what it may touch is described by Problem. Never: allocates, raises, takes the GIL
# (but for `run_signal_handlers`, tasks.pxi).

cdef enum:
    NARROW_DIMS = 256   # of a head: wider ones have 64 keys in a block
    DIMS_AT_ONCE = 256  # summed in one run; longer dot products are sums of such, or their error would outgrow BLAS's
    MASK_KEYS = 32      # of a masked tile at a time: two lines of a float32 mask in each of its rows
    VALUE_DIMS = 16     # of a group of packed columns: whole tiles of dimensions, a line of float32
    EXP_KEYS = 4        # of an accumulating tile to a vector of exp2; 8 to two vectors and 16 to four are slower
    # Keys of an accumulating tile of 16 dimensions, which has no exp2 beside it, to some prefetches: 4 are 4 % slower,
    # 32 and none equal (Emerald Rapids)
    AHEAD_KEYS = 16


cdef struct ValueRun:           # rows of V that lie one after the other
    const real* v
    Py_ssize_t n

cdef struct Values:             # of a tile's keys
    ValueRun runs[MAX_RUNS]
    Py_ssize_t stride, group    # reals from a key to the next, and from VALUE_DIMS dimensions to the next

cdef struct Panel:              # of queries, against a block of keys
    Tile tile
    int vectors
    Py_ssize_t first_lane
    Values values
    bint exponentiated          # its scores are probabilities already, and total is their sum
    vf total[MAX_PANEL]

cdef struct Softmax:            # a tile's pass of exponentials, under way
    real* scores                # the next vector
    Py_ssize_t left             # vectors
    int vectors, column         # of the panel; which of them is next
    vf unit
    vf reference[MAX_PANEL]
    vf total[MAX_PANEL]


cdef Py_ssize_t keys_per_block(Py_ssize_t head_dim, Py_ssize_t head_dim_v) noexcept nogil:
    """128: 32 KB of K at head_dim 64, and 12 KB of scores. 256 keys are 1 % slower on Zen 5 (48 KB of L1) and 1 %
    faster on Zen 3, 64 keys cost 2 to 6 % in loads and stores of acc. Depends on nothing else: it decides bits."""
    return 128 if max(head_dim, head_dim_v) <= NARROW_DIMS else 64


cdef inline void score_keys(const int ROWS, const int VECTORS, real* scores, vf* tile_max, const real* q,
                            const real* k, Py_ssize_t k_stride, Py_ssize_t head_dim) noexcept nogil:
    """scores[ROWS][width] (OUT) = ROWS keys times the panel's queries; tile_max (IN/OUT) follows them."""
    cdef vf acc[MAX_TILE]
    cdef Py_ssize_t d = 0, dims
    cdef int i, r, v
    while True:
        dims = min(head_dim - d, DIMS_AT_ONCE)
        for i in range(ROWS * VECTORS):
            acc[i] = vset1(<real> 0.0)
        multiply(ROWS, VECTORS, acc, k + d, k_stride, 1, q + d * VECTORS * LANES, dims)
        if d:
            for i in range(ROWS * VECTORS):
                acc[i] = acc[i] + vload(scores + i * LANES)
        d += dims
        if d == head_dim:
            break
        for i in range(ROWS * VECTORS):
            vstore(scores + i * LANES, acc[i])
    for r in range(ROWS):
        for v in range(VECTORS):
            tile_max[v] = vmax(acc[r * VECTORS + v], tile_max[v])  # a NaN score is passed over; exp2 keeps it
            vstore(scores + (r * VECTORS + v) * LANES, acc[r * VECTORS + v])


cdef inline bint strides_are_known(Py_ssize_t head_dim) noexcept nogil:
    """Fused tiles want rows as far apart as one of the constants that score_tile has loops for. With a stride in a
    register, those of 16 keys are 7 to 19 % slower than tiles of 8 x 2 (Emerald Rapids)."""
    return ATTEND_FUSED and head_dim <= NARROW_DIMS


cdef inline Py_ssize_t key_stride(Py_ssize_t head_dim) noexcept nogil:
    """Reals from one row of copied keys to the next, and where strides are known, also of those in place."""
    if not strides_are_known(head_dim):
        return head_dim
    return 32 if head_dim <= 32 else 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


# scores[n][width] (OUT) = n keys, in tiles of ROWS of them. The last tile of a run that is no multiple of ROWS starts
# early and does some keys twice, with the same bits, instead of doing up to ROWS - 1 keys one by one at a third of the
# speed; after tiles of 16, at most 8 keys are half a tile.
cdef inline void score_run(const int ROWS, const int VECTORS, real* scores, vf* tile_max, const real* q, const real* k,
                           Py_ssize_t k_stride, Py_ssize_t n, Py_ssize_t head_dim) noexcept nogil:
    cdef Py_ssize_t j = 0
    while j + ROWS <= n:
        score_keys(ROWS, VECTORS, scores + j * VECTORS * LANES, tile_max, q, k + j * k_stride, k_stride, head_dim)
        j += ROWS
        if ROWS == 16 and n - 8 <= j < n:
            score_keys(8, VECTORS, scores + (n - 8) * VECTORS * LANES, tile_max, q, k + (n - 8) * k_stride, k_stride,
                       head_dim)
            return
        if n - ROWS < j < n and n >= ROWS:
            j = n - ROWS  # the last keys: a whole tile again, over keys some of which are done already
    while j < n:
        score_keys(1, VECTORS, scores + j * VECTORS * LANES, tile_max, q, k + j * k_stride, k_stride, head_dim)
        j += 1


cdef inline void score_tile(const int VECTORS, real* scores, vf* tile_max, const real* q, const real* k,
                            Py_ssize_t k_stride, Py_ssize_t n, Py_ssize_t head_dim) noexcept nogil:
    """A panel of one vector takes 8 keys at once, to have accumulators enough, or 16."""
    if ATTEND_FUSED and n >= ATTEND_ROWS and k_stride == 64:
        score_run(ATTEND_ROWS, VECTORS, scores, tile_max, q, k, 64, n, head_dim)
    elif ATTEND_FUSED and n >= ATTEND_ROWS and k_stride == 128:
        score_run(ATTEND_ROWS, VECTORS, scores, tile_max, q, k, 128, n, head_dim)
    elif ATTEND_FUSED and n >= ATTEND_ROWS and k_stride == 32:
        score_run(ATTEND_ROWS, VECTORS, scores, tile_max, q, k, 32, n, head_dim)
    elif ATTEND_FUSED and n >= ATTEND_ROWS and k_stride == 256:
        score_run(ATTEND_ROWS, VECTORS, scores, tile_max, q, k, 256, n, head_dim)
    elif (VECTORS == 1 or ATTEND_ROWS == 8) and n >= 8:
        score_run(8, VECTORS, scores, tile_max, q, k, k_stride, n, head_dim)
    else:
        score_run(4, VECTORS, scores, tile_max, q, k, k_stride, n, head_dim)


cdef inline void exponentiate_keys(const int KEYS, const int VECTORS, real* probs, vf* tile_max, vf* total,
                                   const vf* scores, const vf* reference, vf unit) noexcept nogil:
    """probs (OUT)[KEYS][VECTORS] = exp2((s - reference) * unit); tile_max and total (IN/OUT) follow."""
    cdef vf prob
    cdef int r, v
    for r in range(KEYS):
        for v in range(VECTORS):
            tile_max[v] = vmax(scores[r * VECTORS + v], tile_max[v])
            prob = vexp2((scores[r * VECTORS + v] - reference[v]) * unit)
            total[v] = total[v] + prob
            vstore(probs + (r * VECTORS + v) * LANES, prob)


cdef inline void score_and_exponentiate(const int STRIDE, real* probs, vf* tile_max, vf* total, const vf* reference,
                                        vf unit, const real* q, const real* k, Py_ssize_t n,
                                        Py_ssize_t head_dim) noexcept nogil:
    """probs (OUT)[n][width], n a multiple of ATTEND_ROWS: exp2((s - reference) * unit), straight from the registers
    that hold the scores; tile_max and total (IN/OUT) follow."""
    cdef vf acc[MAX_TILE]
    cdef vf largest[MAX_PANEL]
    cdef vf sum[MAX_PANEL]
    cdef vf old[MAX_PANEL]
    cdef Py_ssize_t j = 0
    cdef int QUARTER = ATTEND_ROWS // 4, VECTORS = ATTEND_VECTORS, i, v
    for v in range(VECTORS):
        largest[v], sum[v], old[v] = tile_max[v], total[v], reference[v]
    while j < n:
        for i in range(ATTEND_ROWS * VECTORS):
            acc[i] = vset1(<real> 0.0)
        multiply(ATTEND_ROWS, VECTORS, acc, k + j * STRIDE, STRIDE, 1, q, head_dim)
        # GCC 12 unrolls no loop of 16 exponentials: acc would have to be in memory.
        exponentiate_keys(QUARTER, VECTORS, probs, largest, sum, acc, old, unit)
        exponentiate_keys(QUARTER, VECTORS, probs + QUARTER * VECTORS * LANES, largest, sum, acc + QUARTER * VECTORS,
                          old, unit)
        exponentiate_keys(QUARTER, VECTORS, probs + 2 * QUARTER * VECTORS * LANES, largest, sum,
                          acc + 2 * QUARTER * VECTORS, old, unit)
        exponentiate_keys(QUARTER, VECTORS, probs + 3 * QUARTER * VECTORS * LANES, largest, sum,
                          acc + 3 * QUARTER * VECTORS, old, unit)
        probs += ATTEND_ROWS * VECTORS * LANES
        j += ATTEND_ROWS
    for v in range(VECTORS):
        tile_max[v], total[v] = largest[v], sum[v]


cdef bint score_at_once(const Problem* p, Panel* panel, const real* reference, const real* q, const Block* b,
                        Py_ssize_t first_key) noexcept nogil:
    """The tile's probabilities and their sum (OUT) in one step, for a store and a load less a score; the same bits as
    in two. False: in two, since the reference is to move."""
    cdef Py_ssize_t j = 0, n, k_stride = b.k_step // <Py_ssize_t> sizeof(real)
    cdef const real* k
    cdef real* probs
    cdef vf largest[MAX_PANEL]
    cdef vf old[MAX_PANEL]
    cdef vf unit = vset1(p.unit)
    cdef Tile* t = &panel.tile
    cdef bint stays = True
    cdef int v
    for v in range(ATTEND_VECTORS):
        old[v] = vload(reference + v * LANES)
        largest[v], panel.total[v] = vset1(<real> -INFINITY), vset1(<real> 0.0)
        stays = stays and not vany(vequal(old[v], vset1(<real> LOWEST)))
    if not stays:
        return False
    while j < t.n:
        k = <const real*> key_of_run(b, first_key + j, &n)
        n = min(n, t.n - j)
        probs = t.scores + j * t.width
        if k_stride == 64:
            score_and_exponentiate(64, probs, largest, panel.total, old, unit, q, k, n, p.head_dim)
        elif k_stride == 128:
            score_and_exponentiate(128, probs, largest, panel.total, old, unit, q, k, n, p.head_dim)
        elif k_stride == 32:
            score_and_exponentiate(32, probs, largest, panel.total, old, unit, q, k, n, p.head_dim)
        else:
            score_and_exponentiate(256, probs, largest, panel.total, old, unit, q, k, n, p.head_dim)
        j += n
    for v in range(ATTEND_VECTORS):
        stays = stays and not vany(vless(vset1(<real> SLACK), (largest[v] - old[v]) * unit))
    return stays


cdef inline void exponentiate(Softmax* e, Py_ssize_t count) noexcept nogil:
    """The next `count` vectors of scores become probabilities, exp2((s - reference) * unit); total adds them up."""
    cdef vf prob
    # One vector after the other: four in lockstep would spill, and a spill costs as much as two FMAs.
    for _ in range(count):
        prob = vexp2((vload(e.scores) - e.reference[e.column]) * e.unit)
        e.total[e.column] = e.total[e.column] + prob
        vstore(e.scores, prob)
        e.scores += LANES
        e.column = 0 if e.column + 1 == e.vectors else e.column + 1
    e.left -= count


cdef inline void exponentiate_all(const int VECTORS, Softmax* e) noexcept nogil:
    """The same of all that are left, a whole number of keys; what does not change stays in registers."""
    cdef vf total[MAX_PANEL]
    cdef vf prob
    cdef Py_ssize_t j
    cdef int v
    for v in range(VECTORS):
        total[v] = e.total[v]
    for j in range(e.left // VECTORS):
        for v in range(VECTORS):
            prob = vexp2((vload(e.scores + (j * VECTORS + v) * LANES) - e.reference[v]) * e.unit)
            total[v] = total[v] + prob
            vstore(e.scores + (j * VECTORS + v) * LANES, prob)
    for v in range(VECTORS):
        e.total[v] = total[v]
    e.left = 0


cdef inline void accumulate_dims(const int ROWS, const int VECTORS, real* acc, const real* probs,
                                 const Values* values, Py_ssize_t d, Py_ssize_t n, Softmax* e,
                                 Ahead* ahead) noexcept nogil:
    """acc[ROWS][width] (IN/OUT) += ROWS columns of V from d on, over n keys, times the panel's probabilities. The
    exponentials of another tile (IN/OUT) move on by a vector every EXP_KEYS keys, where only `tile` is in registers."""
    cdef vf tile[MAX_TILE]
    cdef int KEYS = AHEAD_KEYS if ATTEND_FUSED else EXP_KEYS
    cdef const ValueRun* run = values.runs
    cdef Py_ssize_t column = d // VALUE_DIMS * values.group + d % VALUE_DIMS, j
    cdef int r
    for r in range(ROWS * VECTORS):
        tile[r] = vset1(<real> 0.0)
    while n > 0:
        j = 0
        while j < run.n:
            multiply(ROWS, VECTORS, tile, run.v + column + j * values.stride, 1, values.stride,
                     probs + j * VECTORS * LANES, min(run.n - j, <Py_ssize_t> KEYS))
            if not ATTEND_FUSED and e.left:
                exponentiate(e, 1)
            prefetch_ahead(ahead, KEYS // EXP_KEYS * ahead.lines)
            j += KEYS
        n -= run.n
        probs += run.n * VECTORS * LANES
        run += 1
    for r in range(ROWS * VECTORS):
        vstore(acc + r * LANES, vload(acc + r * LANES) + tile[r])


# acc[head_dim_v][width] (IN/OUT) in tiles of ROWS dimensions. Each tile runs over all n keys, with P in L1 and a column
# of V (16 or 32 bytes of each row, the same cache line four or two times in a row) from L2. e: as in accumulate_dims.
cdef inline void accumulate(const int VECTORS, real* acc, const real* probs, const Values* values, Py_ssize_t n,
                            Py_ssize_t head_dim_v, Softmax* e, Ahead* ahead) noexcept nogil:
    cdef int ROWS = 8 if VECTORS == 1 and ATTEND_ROWS < 16 else ATTEND_ROWS
    cdef Py_ssize_t d = 0
    while d + ROWS <= head_dim_v:
        if ROWS == 16:
            accumulate_dims(16, VECTORS, acc + d * VECTORS * LANES, probs, values, d, n, e, ahead)
        elif ROWS == 8:
            accumulate_dims(8, VECTORS, acc + d * VECTORS * LANES, probs, values, d, n, e, ahead)
        else:
            accumulate_dims(4, VECTORS, acc + d * VECTORS * LANES, probs, values, d, n, e, ahead)
        d += ROWS
    while ROWS == 16 and d + 4 <= head_dim_v:
        accumulate_dims(4, VECTORS, acc + d * VECTORS * LANES, probs, values, d, n, e, ahead)
        d += 4
    while d < head_dim_v:
        accumulate_dims(1, VECTORS, acc + d * VECTORS * LANES, probs, values, d, n, e, ahead)
        d += 1


cdef inline void update_reference(const int VECTORS, vf* tile_max, real* reference, real* row_sum, real* acc,
                                  Py_ssize_t head_dim_v, real unit) noexcept nogil:
    """The reference is not the maximum: a lane moves it only when its scores exceed it by more than SLACK, which random
    scores never do after the first block, and then rescales what it has summed. Lanes that stay multiply by an exact 1.
    Starting at LOWEST instead of -inf keeps -inf - reference from being NaN."""
    cdef vf factor[MAX_PANEL]
    cdef vf old, new, slack = vset1(<real> SLACK)
    cdef Py_ssize_t d
    cdef int v
    cdef bint grew = False, fresh = True
    for v in range(VECTORS):
        grew = grew or vany(vless(slack, (tile_max[v] - vload(reference + v * LANES)) * unit))
        fresh = fresh and not vany(vdiffer(vload(reference + v * LANES), vset1(<real> LOWEST)))
    if not grew:
        return
    for v in range(VECTORS):
        old = vload(reference + v * LANES)
        new = vselect(vless(slack, (tile_max[v] - old) * unit), tile_max[v], old)
        factor[v] = vexp2((old - new) * unit)
        vstore(reference + v * LANES, new)
        vstore(row_sum + v * LANES, vload(row_sum + v * LANES) * factor[v])
    if fresh:  # nothing is summed yet
        return
    for d in range(head_dim_v):
        for v in range(VECTORS):
            vstore(acc + (d * VECTORS + v) * LANES, vload(acc + (d * VECTORS + v) * LANES) * factor[v])


cdef void place_values(const Problem* p, const Workspace* w, Values* values, const Block* b, Py_ssize_t skipped,
                       Py_ssize_t n) noexcept nogil:
    """values (OUT): those of n keys of the block, but for the first `skipped` ones."""
    cdef ValueRun* part = values.runs
    cdef const KeyRun* run = b.runs
    values.stride, values.group = b.v_step // <Py_ssize_t> sizeof(real), VALUE_DIMS
    if p.v_packed:
        values.stride, values.group = VALUE_DIMS, v_group(p)
        part.v, part.n = w.v_columns + skipped * VALUE_DIMS, n
        return
    if not p.v_in_place:
        part.v, part.n = w.v_rows + skipped * values.stride, n
        return
    while n > 0:
        if skipped < run.n:
            part.v, part.n = <const real*> run.v + skipped * values.stride, min(n, run.n - skipped)
            n -= part.n
            part += 1
        skipped = max(0, skipped - run.n)
        run += 1


cdef inline Py_ssize_t v_group(const Problem* p) noexcept nogil:
    """Reals from a group of packed columns to the next: a key more than it holds, or all would be in the same sets
    of L1 while they are written."""
    return (p.block_kv + 1) * VALUE_DIMS


cdef inline bint packs_values(const Problem* p) noexcept nogil:
    """With rows a multiple of 512 bytes apart, the line that a tile of dimensions reads of each of 128 keys is in one
    of 8 sets of L1, and 32 KB of it have room for 64 such lines. Packed, head_dim 128 takes 0.93 of the time; 64, with
    rows of 256 bytes, as much (Cascade Lake). Two panels do not pay for it."""
    return (ATTEND_FUSED and ATTEND_ROWS == 8 and p.head_dim_v * <Py_ssize_t> sizeof(real) % 512 == 0
            and p.block_rows > 2 * ATTEND_VECTORS * LANES)


cdef void pack_values(const Problem* p, const Workspace* w, const Block* b) noexcept nogil:
    """w.v_columns (OUT): the block's values, VALUE_DIMS of each key side by side."""
    cdef real* key = w.v_columns
    cdef real* group
    cdef const real* row
    cdef Py_ssize_t j, d
    cdef int i
    for i in range(b.num_runs if p.v_in_place else 1):  # where V is copied, K may still have several
        for j in range(b.runs[i].n if p.v_in_place else b.n):
            row = <const real*> (b.runs[i].v + j * b.v_step)
            group = key
            d = 0
            while d < p.head_dim_v:
                memcpy(group, row + d, VALUE_DIMS * sizeof(real))
                group += v_group(p)
                d += VALUE_DIMS
            key += VALUE_DIMS


cdef Py_ssize_t clip_tile(const Problem* p, Tile* t) noexcept nogil:
    """t (IN/OUT): less the keys at its ends that no lane sees, which are not computed at all: for causal attention the
    tile ends at the panel's own diagonal, not at the block's. n = 0: none is left. Returns how many went before."""
    cdef const Lane* lanes = t.lanes
    cdef Py_ssize_t low = lanes[0].low, high = lanes[0].high      # seen by some lane
    cdef Py_ssize_t all_low = low, all_high = high                # seen by all lanes
    cdef Py_ssize_t skipped, i
    for i in range(1, 1 if p.same_keys else t.width):
        low = min(low, lanes[i].low)
        high = max(high, lanes[i].high)
        all_low = max(all_low, lanes[i].low)
        all_high = min(all_high, lanes[i].high)
    skipped = max(low - t.key_start, 0)
    t.n = max(0, min(t.n, high - t.key_start) - skipped)
    t.key_start += skipped
    t.limited = t.key_start < all_low or t.key_start + t.n > all_high
    return skipped


cdef inline bint score_panel(const int VECTORS, const Problem* p, const Workspace* w, const State* state,
                             Panel* panel, const Block* b) noexcept nogil:
    """panel (IN: of which queries, keys of the block, where the scores go; OUT: the keys that it sees): modified
    scores, and reference is what their softmax refers to. False where it sees none of the keys."""
    cdef Tile* t = &panel.tile
    cdef Py_ssize_t width = VECTORS * LANES
    cdef vf tile_max[MAX_PANEL]
    cdef Py_ssize_t i, j, part, skipped, n, key_start, k_stride = b.k_step // <Py_ssize_t> sizeof(real)
    cdef const char* k
    skipped = clip_tile(p, t)
    n, key_start = t.n, t.key_start
    if n == 0:
        return False
    place_values(p, w, &panel.values, b, skipped, n)
    panel.exponentiated = (
        panel.vectors == ATTEND_VECTORS and strides_are_known(p.head_dim)
        and n % ATTEND_ROWS == 0 and (b.num_runs == 1 or key_start % ATTEND_ROWS == 0)
        and not is_modified(p, t) and p.weights == NULL
        and score_at_once(p, panel, state.reference + panel.first_lane, w.queries + panel.first_lane * p.q_stride, b,
                          skipped))
    if panel.exponentiated:
        return True
    for i in range(VECTORS):
        tile_max[i] = vset1(<real> -INFINITY)
    j = 0
    while j < n:  # run by run; a masked tile in parts, so that its mask is asked for a little at a time
        k = key_of_run(b, skipped + j, &part)
        part = min(part, n - j)
        if p.mask.data != NULL and part >= 2 * MASK_KEYS:
            part = MASK_KEYS
        if p.mask.data != NULL:
            prefetch_mask(p, t, VECTORS * LANES, j, j + part)
        score_tile(VECTORS, t.scores + j * width, tile_max, w.queries + panel.first_lane * p.q_stride,
                   <const real*> k, k_stride, part, p.head_dim)
        j += part
    if modify_tile(p, w, t):
        for i in range(VECTORS):
            tile_max[i] = vset1(<real> -INFINITY)
        for j in range(n):
            for i in range(VECTORS):
                tile_max[i] = vmax(vload(t.scores + (j * VECTORS + i) * LANES), tile_max[i])
    keep_scores(p, t)
    update_reference(VECTORS, tile_max, state.reference + panel.first_lane, state.row_sum + panel.first_lane,
                     state.acc + panel.first_lane * p.v_stride, p.head_dim_v, p.unit)
    return True


cdef void begin_softmax(Softmax* e, const Panel* panel, const State* state, real unit) noexcept nogil:
    cdef int v
    e.unit = vset1(unit)
    e.scores, e.left = panel.tile.scores, panel.tile.n * panel.vectors
    e.vectors, e.column = panel.vectors, 0
    for v in range(panel.vectors):
        e.reference[v] = vload(state.reference + panel.first_lane + v * LANES)
        e.total[v] = vset1(<real> 0.0)
    if panel.exponentiated:
        e.left = 0
        for v in range(panel.vectors):
            e.total[v] = panel.total[v]


cdef void end_softmax(const Problem* p, const Workspace* w, const Softmax* e, Panel* panel,
                      const State* state) noexcept nogil:
    cdef real* row_sum = state.row_sum + panel.first_lane
    cdef int v
    for v in range(panel.vectors):
        vstore(row_sum + v * LANES, vload(row_sum + v * LANES) + e.total[v])
    modify_probs(p, w, &panel.tile)


cdef void accumulate_panel(const Problem* p, const State* state, Panel* panel, Softmax* e, Ahead* ahead) noexcept nogil:
    """The panel's part of acc (IN/OUT) moves on, and so, to its end, does the softmax of another one. The panel is done
    with then: tile.n = 0, as it may be before."""
    cdef real* acc = state.acc + panel.first_lane * p.v_stride
    cdef const Tile* t = &panel.tile
    if ATTEND_FUSED and e.left and e.vectors == 1:
        exponentiate_all(1, e)
    elif ATTEND_FUSED and e.left:
        exponentiate_all(ATTEND_VECTORS, e)
    if t.n == 0:
        pass
    elif ATTEND_VECTORS == 3 and panel.vectors == 3:
        accumulate(3, acc, t.scores, &panel.values, t.n, p.head_dim_v, e, ahead)
    elif ATTEND_VECTORS >= 2 and panel.vectors == 2:
        accumulate(2, acc, t.scores, &panel.values, t.n, p.head_dim_v, e, ahead)
    else:
        accumulate(1, acc, t.scores, &panel.values, t.n, p.head_dim_v, e, ahead)
    panel.tile.n = 0
    if e.left:
        exponentiate(e, e.left)  # what the panel had no room for


cdef void prefill_pack(const Problem* p, const Workspace* w, const Task* task) noexcept nogil:
    """w.queries (OUT)[panel][dim][width] = sign * q."""
    cdef Py_ssize_t vectors = ceil_div(task.num_rows, LANES)
    cdef Py_ssize_t first = 0, v, i, d, width
    cdef bint in_place = rows_are_real(&p.q)
    cdef const Lane* lanes
    cdef const real* row[MAX_LANES]
    cdef real* packed
    cdef int panel
    while first < vectors:
        panel = panel_vectors(ATTEND_VECTORS, vectors - first)
        width = panel * LANES
        for v in range(panel):
            lanes = w.lanes + (first + v) * LANES
            packed = w.queries + first * LANES * p.q_stride + v * LANES
            if in_place and lanes[LANES - 1].query == lanes[0].query + LANES - 1:   # rows of one head, none repeated
                transpose(packed, width, <const real*> lane_row(&p.q, lanes),
                          p.q.stride[2] // <Py_ssize_t> sizeof(real), LANES, p.head_dim)
            else:
                for i in range(LANES):
                    row[i] = <const real*> lane_row(&p.q, lanes + i)
                    if not in_place:
                        load_row(w.rows + i * p.head_dim, <const char*> row[i], p.q.stride[3], p.head_dim, p.q.kind)
                        row[i] = w.rows + i * p.head_dim
                transpose_rows(packed, width, row, p.head_dim)
            if p.sign < 0:
                for d in range(p.head_dim):
                    vstore(packed + d * width, -vload(packed + d * width))
        first += panel


cdef void prefill_keys(const Problem* p, const Workspace* w, const Task* task, const State* state, Py_ssize_t low,
                       Py_ssize_t high) noexcept nogil:
    """state (IN/OUT) moves on over keys [low, high)."""
    cdef Py_ssize_t vectors = ceil_div(task.num_rows, LANES)
    cdef Py_ssize_t first, skipped, v_stride
    cdef const real* v
    cdef Block b
    cdef Ahead ahead
    cdef int v_is_finite
    cdef bint seen
    cdef Panel panels[2]
    cdef Panel* panel = &panels[0]
    cdef Panel* pending = &panels[1]    # its probabilities wait for being accumulated; n = 0: none does
    cdef Softmax e, nothing
    cdef Tile tile
    pending.tile.n = pending.first_lane = nothing.left = 0
    pending.tile.scores = NULL
    ahead.count = ahead.current = ahead.lines = 0
    before_block(&b, low)
    while True:
        if pending.tile.n and (p.v_packed or not p.v_in_place):  # its rows of V are about to be overwritten
            accumulate_panel(p, state, pending, &nothing, &ahead)
        if not next_block(p, w, task, high, &b):
            break
        plan_ahead(p, task, b.key_start + b.n, high, &ahead)
        if p.v_packed:
            pack_values(p, w, &b)
        v_is_finite = -1    # not yet known
        first = 0
        while first < vectors:
            panel.vectors, panel.first_lane = panel_vectors(ATTEND_VECTORS, vectors - first), first * LANES
            panel.tile.width, panel.tile.lanes = panel.vectors * LANES, w.lanes + panel.first_lane
            panel.tile.key_start, panel.tile.n = b.key_start, b.n
            panel.tile.scores = w.scores if ATTEND_FUSED or pending.tile.scores != w.scores else w.next_scores
            first += panel.vectors
            if pending.tile.n and pending.first_lane == panel.first_lane:  # before reference moves
                accumulate_panel(p, state, pending, &nothing, &ahead)
            if ATTEND_VECTORS == 3 and panel.vectors == 3:
                seen = score_panel(3, p, w, state, panel, &b)
            elif ATTEND_VECTORS >= 2 and panel.vectors == 2:
                seen = score_panel(2, p, w, state, panel, &b)
            else:
                seen = score_panel(1, p, w, state, panel, &b)
            if not seen:
                continue
            begin_softmax(&e, panel, state, p.unit)
            accumulate_panel(p, state, pending, &e, &ahead)
            end_softmax(p, w, &e, panel, state)
            pending, panel = panel, pending
            # Only a tile in which some lane does not see some key can leak that key's value; V is looked at once a
            # block.
            if pending.tile.limited or p.mask.data != NULL:
                if v_is_finite < 0:
                    v = values_of(p, w, task, &b, &v_stride)
                    v_is_finite = not make_finite(w.v_finite, p.v_stride, v, v_stride, b.n, p.head_dim_v)
                if not v_is_finite:
                    tile = pending.tile
                    skipped = tile.key_start - b.key_start
                    pending.values.runs[0].v, pending.values.runs[0].n = w.v_finite + skipped * p.v_stride, tile.n
                    pending.values.stride, pending.values.group = p.v_stride, VALUE_DIMS
                    accumulate_panel(p, state, pending, &nothing, &ahead)
                    repair_values(p, w, &tile, state.acc + pending.first_lane * p.v_stride, 1, tile.width,
                                  v + skipped * v_stride, v_stride, p.head_dim_v)
            if ATTEND_FUSED:
                accumulate_panel(p, state, pending, &nothing, &ahead)
    accumulate_panel(p, state, pending, &nothing, &ahead)


cdef bint prefill_reads_in_place(const Tensor* v, Py_ssize_t head_dim_v, Py_ssize_t block_rows) noexcept nogil:
    """Rows of V that lie apart fall into few L1 sets and are each read in several columns: they are copied, unless a
    single panel is to read them. (Rows of K are read whole.)"""
    return rows_are_real(v) and (v.stride[2] == head_dim_v * <Py_ssize_t> sizeof(real)
                                 or block_rows <= ATTEND_VECTORS * LANES)


cdef void prefill_merge(const Problem* p, const Task* task, State* total, State* lost,
                        const State* part) noexcept nogil:
    """total + lost (IN/OUT) = both states."""
    cdef Py_ssize_t vectors = ceil_div(task.num_rows, LANES)
    cdef Py_ssize_t first = 0, v, d, i
    cdef vf factors[2]
    cdef int panel
    while first < vectors:
        panel = panel_vectors(ATTEND_VECTORS, vectors - first)
        for v in range(panel):
            i = (first + v) * LANES
            merge_reference(total.reference + i, part.reference + i, p.unit, factors)
            merge_vector(total.row_sum + i, lost.row_sum + i, part.row_sum + i, factors[0], factors[1])
            for d in range(p.head_dim_v):
                i = first * LANES * p.v_stride + (d * panel + v) * LANES
                merge_vector(total.acc + i, lost.acc + i, part.acc + i, factors[0], factors[1])
        first += panel


cdef bint prefill_finish(const Problem* p, const Workspace* w, const Task* task, const State* state) noexcept nogil:
    """out (OUT), logsumexp and weights: acc / row_sum, transposed, panel by panel. True: to be done again."""
    cdef Py_ssize_t vectors = ceil_div(task.num_rows, LANES)
    cdef Py_ssize_t first = 0, i, v, d, width, num_rows, whole
    cdef bint out_in_place = rows_are_real(&p.out)
    cdef bint again = False, all_right
    cdef real inverse_sum[MAX_WIDTH]
    cdef vf check[MAX_PANEL]
    cdef vf factor[MAX_PANEL]
    cdef vf row_sum, result
    cdef const Lane* lanes
    cdef real* shrink
    cdef real* acc
    cdef int panel
    while first < vectors:
        panel = panel_vectors(ATTEND_VECTORS, vectors - first)
        width = panel * LANES
        num_rows = min(width, task.num_rows - first * LANES)
        lanes = w.lanes + first * LANES
        shrink = w.shrink + first * LANES
        acc = state.acc + first * LANES * p.v_stride
        for i in range(width):
            inverse_sum[i] = sink_term(p, lanes + i, state.reference[first * LANES + i])
        for v in range(panel):
            row_sum = vload(state.row_sum + (first + v) * LANES)
            result = vset1(<real> 1.0) / (row_sum + vload(inverse_sum + v * LANES))
            # no key seen: 0 / 0 is 0 here
            result = vselect(vequal(row_sum, vset1(<real> 0.0)), vset1(<real> 0.0), result)
            vstore(inverse_sum + v * LANES, result)
            factor[v] = result / vload(shrink + v * LANES)
            check[v] = vload(shrink + v * LANES) - vset1(<real> 1.0)
        for d in range(p.head_dim_v):
            for v in range(panel):
                i = d * width + v * LANES
                result = vload(acc + i) * factor[v]
                check[v] = vfma(result, vset1(<real> 0.0), check[v])   # NaN from the first NaN or infinity on
                vstore(acc + i, result)
        all_right = True
        for v in range(panel):
            all_right = all_right and not vany(vdiffer(check[v], vset1(<real> 0.0)))
        if p.logsumexp.data != NULL or p.weights != NULL:
            for i in range(num_rows):
                finish_row(p, lanes + i, state.reference[first * LANES + i],
                           state.row_sum[first * LANES + i], inverse_sum[i])
        # Straight into out where the panel's rows lie there as reals, one after the other; through scratch otherwise.
        if all_right and out_in_place and lanes[num_rows - 1].query == lanes[0].query + num_rows - 1:
            whole = num_rows // LANES * LANES
            transpose(<real*> lane_row(&p.out, lanes),
                      p.out.stride[2] // <Py_ssize_t> sizeof(real), acc, width, p.head_dim_v, whole)
            if whole < num_rows:
                transpose(w.rows, p.head_dim_v, acc + whole, width, p.head_dim_v, LANES)
            for i in range(whole, num_rows):
                store_row(lane_row(&p.out, lanes + i), p.out.stride[3],
                          w.rows + (i - whole) * p.head_dim_v, p.head_dim_v, p.out.kind)
        else:
            transpose(w.rows, p.head_dim_v, acc, width, p.head_dim_v, width)
            for i in range(num_rows):
                again = store_result(p, lanes + i, shrink + i, w.rows + i * p.head_dim_v) or again
        first += panel
    return again
