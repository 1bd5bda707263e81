# Gradients of attention, without ever storing Q K^T: FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithm 2), again
# with the queries in the SIMD lanes. Of a row with logsumexp L (without its sink), w = 1 / (1 + exp(sink - L)),
# dO' = w / (1 - dropout_p) dO, delta = w dO . out - dL:
#
#     for each task: (split of the keys, batch, key head)
#         copy the split's rows of K and V; dK = dV = 0
#         for each block of query rows, those of all heads of the group one after the other
#             pack q and dO', as panels of vectors of rows, and as panels of vectors of dimensions
#             for each block of keys
#                 for each panel that sees any of these keys
#                     scores      S^T[key][query] = K broadcast x Q^T vectors, modified as in the forward pass
#                     dP          dP^T[key][query] = V broadcast x dO'^T vectors
#                     P = exp2(S - L), dS = P (dP - delta)
#                     dQ          dQ^T[dim][query] += K broadcast x dS^T vectors
#                 dV[key][dim] += P^T broadcast x dO' vectors
#                 dK[key][dim] += dS^T broadcast x Q vectors
#             dQ is added to the gradient when the splits before this have been
#         dK and dV are stored
#
# Five products a tile. A split's dK and dV belong to one task; the parts of dQ that the splits contribute are added in
# the order of the splits, for which a task waits at each block of rows: two tasks of a head walk along its rows one
# behind the other. Blocks, splits and the order of sums follow from the sizes of the problem alone, so the number of
# threads, and the other batch rows, change no bit.
#
# A masked pair is left out, not multiplied by 0: its dS is 0 whatever K, V, Q and dO hold (differentiate), and where
# one of them has NaN or infinities, the products that would multiply these by 0 take them as 0 and get them back for
# the pairs that are seen (repair_values, repair_keys).

cdef enum:
    # Rows in a block: 96 to 384 are equal at head_dim 64 to 256, with AVX-512 and AVX2 (Zen 5, 1 MB of L2); the fewer,
    # the less scratch, and the less a task waits for another of its head. Fewer beyond head_dim 682
    BACKWARD_ROWS = 96
    BACKWARD_KEYS = 128         # in a block; 64 are equal
    # Keys in a split, for which Q and dO are packed anew: 256 are 4 to 5 % slower, 1024 2 % faster (3 to 4 % at
    # head_dim 128), with half as many tasks for the threads: one causal head of 1024 rows is two
    BACKWARD_SPLIT = 512
    MAX_PANELS = 24             # of BACKWARD_ROWS rows: of 6 lanes at least, but the last two

cdef struct Backward:
    Problem p                   # out and logsumexp are IN
    Tensor d_out                # IN, as out
    Tensor d_logsumexp          # IN, as logsumexp; or not given
    Tensor dq, dk, dv           # OUT, as q, k, v, those that are wanted; dq: of reals
    Tensor d_mask               # OUT, as mask, of reals or of doubles, 0 before; or not given
    double* d_slopes            # OUT [split][batch][num_heads], 0 before; or NULL
    double* d_sinks             # likewise
    double scale                # the problem's, with its sign
    # Splits and batches and key heads that one task does: one, or all of those that share numbers of d_mask
    Py_ssize_t task_splits, task_batches, task_heads
    Py_ssize_t tile_keys        # rows of a panel of probs: block_kv, and what add_mask writes in whole vectors behind
    Py_ssize_t k_stride, v_stride       # reals from one copied row to the next
    Py_ssize_t dk_stride, dv_stride     # of dK and dV, and of rows while they are packed: whole vectors
    Py_ssize_t* turns           # [batch][key head][block of rows]: how many splits have added their dQ

cdef struct RowPanel:           # of a block of rows
    Py_ssize_t first, width, rows
    Py_ssize_t low, high        # of a block of keys: probs and d_scores stand there, with 0 where none is computed

cdef struct BackwardScratch:
    Workspace w                 # queries, rows, visible, capped, lanes
    real* k_rows                # [split_kv][k_stride]
    real* v_rows                # [split_kv][v_stride]
    real* dk                    # [split_kv][dk_stride]
    real* dv                    # [split_kv][dv_stride]
    real* k_finite              # [block_kv][k_stride]; see make_finite
    real* d_out                 # [panel][head_dim_v][width]; times w / (1 - dropout_p), as is the next but one
    real* q_dims                # [panel of dimensions][row][width]
    real* d_out_dims            # likewise
    real* dq                    # [panel][head_dim][width]
    real* probs                 # [panel][tile_keys][width]: S, then P
    real* d_scores              # [panel][tile_keys][width]: dP, then dS
    real* keep                  # [block_kv][width]: 0 where dropped, else 1
    real* reference             # [block_rows]: L, in the unit of what leaves the modifiers
    real* factor                # [block_rows]: w / (1 - dropout_p)
    real* delta                 # [block_rows]
    real* sign                  # [block_rows]: the scale's
    RowPanel panels[MAX_PANELS]
    int num_panels
    bint k_finite_split         # no NaN or infinity in k_rows
    bint q_finite, d_out_finite     # nor in a block's rows; else they are 0 in *_dims


cdef size_t carve_backward(BackwardScratch* s, char* base, const Backward* b) noexcept nogil:
    """Lays the scratch out from `base` on; returns its size in bytes."""
    cdef const Problem* p = &b.p
    cdef Py_ssize_t width = ATTEND_VECTORS * LANES, keys = p.block_kv, rows = p.block_rows
    cdef Py_ssize_t split = min(p.split_kv, p.seq_len_kv) + TILE_ROWS   # the last tile of keys may reach behind
    cdef size_t size = 0
    memset(s, 0, sizeof(BackwardScratch))
    s.k_rows = <real*> take(base, &size, split * b.k_stride * sizeof(real))
    s.v_rows = <real*> take(base, &size, split * b.v_stride * sizeof(real))
    s.dk = <real*> take(base, &size, split * b.dk_stride * sizeof(real))
    s.dv = <real*> take(base, &size, split * b.dv_stride * sizeof(real))
    s.w.queries = <real*> take(base, &size, rows * p.head_dim * sizeof(real))
    s.d_out = <real*> take(base, &size, rows * p.head_dim_v * sizeof(real))
    s.q_dims = <real*> take(base, &size, rows * b.dk_stride * sizeof(real))
    s.d_out_dims = <real*> take(base, &size, rows * b.dv_stride * sizeof(real))
    s.dq = <real*> take(base, &size, rows * p.head_dim * sizeof(real))
    s.probs = <real*> take(base, &size, rows * b.tile_keys * sizeof(real))
    s.d_scores = <real*> take(base, &size, rows * b.tile_keys * sizeof(real))
    s.w.rows = <real*> take(base, &size, max(2 * LANES * max(b.dk_stride, b.dv_stride), max(width * b.dk_stride,
                                             LANES * keys)) * sizeof(real))
    s.reference = <real*> take(base, &size, rows * sizeof(real))
    s.factor = <real*> take(base, &size, rows * sizeof(real))
    s.delta = <real*> take(base, &size, rows * sizeof(real))
    s.sign = <real*> take(base, &size, rows * sizeof(real))
    s.w.visible = <real*> take(base, &size, keys * width * sizeof(real))
    s.k_finite = <real*> take(base, &size, keys * b.k_stride * sizeof(real))
    s.w.lanes = <Lane*> take(base, &size, rows * sizeof(Lane))
    if p.dropout:
        s.keep = <real*> take(base, &size, keys * width * sizeof(real))
    if p.softcap != 0:
        s.w.capped = <real*> take(base, &size, keys * width * sizeof(real))
    return size


cdef void plan_backward(Backward* b) noexcept nogil:
    """Of a described problem, and what is wanted of it."""
    cdef Problem* p = &b.p
    cdef Py_ssize_t widest = max(p.head_dim, p.head_dim_v), panel = ATTEND_VECTORS * LANES
    cdef fp_mode callers = own_mode()
    # Rows may see nothing also where nothing is masked, see weigh_rows.
    p.same_keys, p.may_mask = False, True
    p.block_rows, p.block_kv, p.split_kv = BACKWARD_ROWS, BACKWARD_KEYS, BACKWARD_SPLIT
    if p.block_rows * widest > MAX_BLOCK:
        p.block_rows = max(1, MAX_BLOCK // (widest * panel)) * panel
    p.num_splits = ceil_div(p.seq_len_kv, p.split_kv)
    b.tile_keys = p.block_kv + LANES
    b.k_stride, b.v_stride = key_stride(p.head_dim), key_stride(p.head_dim_v)
    b.dk_stride, b.dv_stride = round_up(p.head_dim, LANES), round_up(p.head_dim_v, LANES)
    b.scale = p.sign * p.natural * p.scale
    b.task_splits = b.task_batches = b.task_heads = 1
    if b.d_mask.data != NULL:
        b.task_splits = p.num_splits if b.d_mask.stride[3] == 0 else 1
        b.task_batches = p.batch_size if b.d_mask.stride[0] == 0 else 1
        b.task_heads = p.num_kv_heads if b.d_mask.stride[1] == 0 else 1
    p.num_tasks = (p.num_splits // b.task_splits * (p.batch_size // b.task_batches)
                   * (p.num_kv_heads // b.task_heads))
    set_mode(callers)


cdef inline Py_ssize_t first_turn(const Backward* b, Py_ssize_t batch, Py_ssize_t kv_head) noexcept nogil:
    """Of a key head's blocks of rows, in b.turns; with batch = batch_size, the number of all. Blocks are at most as
    many as whole ones fit all rows before, and one for each batch row."""
    cdef const Problem* p = &b.p
    cdef Py_ssize_t queries = batch * p.seq_len_q if p.cu_seqlens_q == NULL else p.cu_seqlens_q[batch]
    cdef Py_ssize_t blocks = queries * p.group_size // p.block_rows + batch
    if batch == p.batch_size:
        return blocks * p.num_kv_heads
    return blocks * p.num_kv_heads + kv_head * ceil_div(num_rows(p, batch), p.block_rows)


cdef void describe_panels(BackwardScratch* s, const Task* task) noexcept nogil:
    cdef Py_ssize_t vectors = ceil_div(task.num_rows, LANES), first = 0
    cdef RowPanel* panel = s.panels
    while first < vectors:
        panel.first, panel.width = first * LANES, panel_vectors(ATTEND_VECTORS, vectors - first) * LANES
        panel.rows = min(panel.width, task.num_rows - panel.first)
        first += panel.width // LANES
        panel += 1
    s.num_panels = <int> (panel - s.panels)


cdef void pack_dimensions(real* packed, Py_ssize_t block_rows, Py_ssize_t row, const real* rows, Py_ssize_t dim,
                          Py_ssize_t stride) noexcept nogil:
    """packed (OUT)[panel of dimensions][row][width] = LANES rows, `row` and those after it."""
    cdef Py_ssize_t vectors = ceil_div(dim, LANES), first = 0, i, v
    cdef int panel
    while first < vectors:
        panel = panel_vectors(PANEL_VECTORS, vectors - first)
        for i in range(LANES):
            for v in range(panel):
                vstore(packed + first * LANES * block_rows + ((row + i) * panel + v) * LANES,
                       vload(rows + i * stride + (first + v) * LANES))
        first += panel


cdef bint pack_both(const Backward* b, const BackwardScratch* s, const Tensor* t, Py_ssize_t dim, Py_ssize_t stride,
                    const real* factor, real* lanes, real* dims) noexcept nogil:
    """The block's rows of Q or dO times their factors, as panels of rows (OUT) [panel][dim][width] and of dimensions
    (OUT) [panel][row][width]. False where they have NaN or infinities that some key is not to see: `dims` has 0 there.
    """
    cdef Py_ssize_t v, i, d, row
    cdef real* rows = s.w.rows
    cdef const RowPanel* panel
    cdef vf times
    cdef bint finite = True
    cdef int number
    for number in range(s.num_panels):
        panel = &s.panels[number]
        for v in range(panel.width // LANES):
            row = panel.first + v * LANES
            for i in range(LANES):
                load_row(rows + i * stride, lane_row(t, s.w.lanes + row + i), t.stride[3], dim, t.kind)
                for d in range(dim, stride):
                    rows[i * stride + d] = 0.0
                times = vset1(factor[row + i])
                for d in range(stride // LANES):
                    vstore(rows + i * stride + d * LANES, vload(rows + i * stride + d * LANES) * times)
            transpose(lanes + panel.first * dim + v * LANES, panel.width, rows, stride, LANES, dim)
            finite = not make_finite(rows, stride, rows, stride, LANES, dim) and finite
            pack_dimensions(dims, b.p.block_rows, row, rows, dim, stride)
    return finite


cdef void weigh_rows(const Backward* b, const BackwardScratch* s, const Task* task, bint first_of_block,
                     Py_ssize_t split) noexcept nogil:
    """reference, factor, delta and sign (OUT) of the block's rows; d_sinks, where it is wanted (IN/OUT), gets their
    parts from the first split that they see."""
    cdef const Problem* p = &b.p
    cdef Py_ssize_t row = 0, i, d, stride = b.dv_stride
    cdef real* d_out = s.w.rows
    cdef real* out = s.w.rows + LANES * stride
    cdef vf square[MAX_LANES]
    cdef vf total
    cdef real products[MAX_LANES]
    cdef const Lane* lane
    cdef double logsumexp, weight, rest, delta
    while row < task.lanes:
        for i in range(LANES):
            lane = s.w.lanes + row + i
            for d in range(p.head_dim_v, stride):
                d_out[i * stride + d] = out[i * stride + d] = 0.0
            load_row(d_out + i * stride, lane_row(&b.d_out, lane), b.d_out.stride[3], p.head_dim_v, b.d_out.kind)
            load_row(out + i * stride, lane_row(&p.out, lane), p.out.stride[3], p.head_dim_v, p.out.kind)
            square[i] = vset1(<real> 0.0)
            for d in range(stride // LANES):
                square[i] = vfma(vload(d_out + i * stride + d * LANES), vload(out + i * stride + d * LANES), square[i])
        vtranspose(square)
        total = square[0]
        for i in range(1, LANES):
            total = total + square[i]
        vstore(products, total)
        for i in range(LANES):
            lane = s.w.lanes + row + i
            logsumexp = (<real*> lane_row(&p.logsumexp, lane))[0]
            delta, weight = products[i], 1.0
            s.sign[row + i] = p.sign
            if logsumexp == -INFINITY:      # the row sees no key, or none whose score is more than that
                s.reference[row + i] = s.factor[row + i] = s.delta[row + i] = 0.0
                s.w.lanes[row + i].low = s.w.lanes[row + i].high = 0
                continue
            if p.sinks != NULL:
                weight = 1 / (1 + exp(p.sinks[lane.head] - logsumexp))
                if b.d_sinks != NULL and first_of_block and row + i < task.num_rows:
                    rest = 1 / (1 + exp(logsumexp - p.sinks[lane.head]))
                    part_of(b, b.d_sinks, split, lane)[0] -= rest * delta
            s.reference[row + i] = <real> (logsumexp / p.natural)
            s.factor[row + i] = <real> (weight * p.keep_scale)
            s.delta[row + i] = <real> (weight * delta)
            if b.d_logsumexp.data != NULL:
                s.delta[row + i] -= (<real*> lane_row(&b.d_logsumexp, lane))[0]
        row += LANES


cdef inline double* part_of(const Backward* b, double* parts, Py_ssize_t split, const Lane* lane) noexcept nogil:
    """A head's entry of d_slopes or d_sinks."""
    return parts + ((split * b.p.batch_size + lane.batch) * b.p.num_kv_heads * b.p.group_size + lane.head)


cdef inline void differentiate(const int VECTORS, real* probs, real* d_scores, Py_ssize_t n, const real* reference,
                               const real* delta, real unit) noexcept nogil:
    """probs (IN: scores; OUT) = exp2((s - reference) * unit); d_scores (IN: dP; OUT) = probs * (dP - delta); both 0
    where the score is -inf. The difference is exact where both are large, as biases of -1e9 are in a row that has no
    other; and sums of products that start at 0 have half the error of those that start at -reference."""
    cdef vf references[MAX_PANEL]
    cdef vf deltas[MAX_PANEL]
    cdef vf zero = vset1(<real> 0.0), masked = vset1(<real> -INFINITY), units = vset1(unit)
    cdef vf score, prob
    cdef Py_ssize_t j
    cdef int v
    for v in range(VECTORS):
        references[v], deltas[v] = vload(reference + v * LANES), vload(delta + v * LANES)
    for j in range(n):
        for v in range(VECTORS):
            score = vload(probs + v * LANES)
            prob = vexp2((score - references[v]) * units)
            vstore(probs + v * LANES, vselect(vequal(score, masked), zero, prob))
            vstore(d_scores + v * LANES,
                   vselect(vequal(score, masked), zero, prob * (vload(d_scores + v * LANES) - deltas[v])))
        probs += VECTORS * LANES
        d_scores += VECTORS * LANES


cdef void tell_from_masked(const Problem* p, const BackwardScratch* s, const Tile* t) noexcept nogil:
    """Scores of -inf (IN/OUT) of pairs that are seen become LOWEST: their probability is 0, or NaN in a row that is."""
    cdef Py_ssize_t i
    find_visible(p, &s.w, t)
    for i in range(t.n * t.width):
        if s.w.visible[i] != -INFINITY and t.scores[i] == -INFINITY:
            t.scores[i] = <real> LOWEST


cdef void make_keep(const Problem* p, const BackwardScratch* s, const Tile* t) noexcept nogil:
    """s.keep (OUT) of the tile's pairs."""
    cdef Py_ssize_t i
    for i in range(t.n * t.width):
        s.keep[i] = 1.0
    for i in range(t.width):
        drop_of_lane(p, t.lanes + i, s.keep + i, t.width, t.key_start, t.n, 1.0)


cdef void multiply_tile(real* x, const real* y, Py_ssize_t n) noexcept nogil:
    """x (IN/OUT)[n] *= y, whole vectors."""
    cdef Py_ssize_t i
    for i in range(n // LANES):
        vstore(x + i * LANES, vload(x + i * LANES) * vload(y + i * LANES))


cdef void differentiate_cap(const Problem* p, const BackwardScratch* s, real* d_scores, Py_ssize_t n) noexcept nogil:
    """d_scores (IN/OUT)[n], of capped scores c: times 1 - (c / softcap)**2. Those of masked pairs stay 0."""
    cdef Py_ssize_t i
    cdef vf c, d, cap = vset1(p.softcap), one = vset1(<real> 1.0), zero = vset1(<real> 0.0)
    for i in range(n // LANES):
        c, d = vload(s.w.capped + i * LANES) / cap, vload(d_scores + i * LANES)     # divided: 1 at the cap itself
        vstore(d_scores + i * LANES, vselect(vequal(d, zero), zero, d * (one - c * c)))


cdef void add_slopes(const Backward* b, const Tile* t, Py_ssize_t rows, Py_ssize_t split) noexcept nogil:
    """d_slopes (IN/OUT) -= the tile's dS times the distances; its first `rows` lanes count."""
    cdef Py_ssize_t i, j
    cdef double total
    for i in range(rows):
        total = 0
        for j in range(t.n):
            total += <double> t.scores[j * t.width + i] * fabs(<double> (t.lanes[i].position - t.key_start - j))
        part_of(b, b.d_slopes, split, t.lanes + i)[0] -= total


cdef void add_to_mask(const Backward* b, const Tile* t, Py_ssize_t rows) noexcept nogil:
    """d_mask (IN/OUT) += the tile's dS."""
    cdef Py_ssize_t i, j
    cdef char* entry
    for i in range(rows):
        entry = entry_of(&b.d_mask, t.lanes + i, t.key_start)
        for j in range(t.n):
            if b.d_mask.kind == F64:
                (<double*> entry)[0] += t.scores[j * t.width + i]
            else:
                (<float*> entry)[0] += <float> t.scores[j * t.width + i]
            entry += b.d_mask.stride[3]


cdef void repair_keys(const Backward* b, const BackwardScratch* s, const Tile* t, Py_ssize_t rows, const Tensor* x,
                      Py_ssize_t dim, const real* factor, real* acc, Py_ssize_t stride) noexcept nogil:
    """acc (IN/OUT), row j of it for key j of the tile, gets the products with the NaN and infinities of the rows of Q
    or dO, from the pairs that are seen."""
    cdef Py_ssize_t i, j, d
    cdef real value
    cdef const char* row
    find_visible(&b.p, &s.w, t)
    for i in range(rows):
        if stopped_by_signal(b.p.call):
            return
        row = lane_row(x, t.lanes + i)
        for d in range(dim):
            value = load_one(row + d * x.stride[3], x.kind) * factor[i]
            if value * <real> 0.0 == 0.0:
                continue
            for j in range(t.n):
                if s.w.visible[j * t.width + i] != -INFINITY:
                    acc[j * stride + d] += t.scores[j * t.width + i] * value


cdef void repair_tile(const Backward* b, const BackwardScratch* s, const RowPanel* panel, const Tile* probs,
                      const Tile* d_scores, Py_ssize_t key) noexcept nogil:
    """dK and dV, from `key` of the split on, of what pack_both has left out."""
    if not s.d_out_finite and b.dv.data != NULL:
        repair_keys(b, s, probs, panel.rows, &b.d_out, b.p.head_dim_v, s.factor + panel.first, s.dv + key * b.dv_stride,
                    b.dv_stride)
    if not s.q_finite and b.dk.data != NULL:
        repair_keys(b, s, d_scores, panel.rows, &b.p.q, b.p.head_dim, s.sign + panel.first, s.dk + key * b.dk_stride,
                    b.dk_stride)


cdef inline void add_query_products(const int VECTORS, const Backward* b, const BackwardScratch* s,
                                    const RowPanel* panel, const Tile* t, Py_ssize_t key) noexcept nogil:
    """dQ (IN/OUT) of the panel += its dS times rows of K, from `key` of the split on."""
    cdef Values values
    cdef Softmax nothing
    cdef Ahead ahead
    cdef real* dq = s.dq + panel.first * b.p.head_dim
    cdef const real* k = s.k_rows + key * b.k_stride
    cdef bint repaired = (not s.k_finite_split and (t.limited or b.p.mask.data != NULL)
                          and make_finite(s.k_finite, b.k_stride, k, b.k_stride, t.n, b.p.head_dim))
    nothing.left = 0
    ahead.count = ahead.current = ahead.lines = 0
    values.runs[0].v, values.runs[0].n = (<const real*> s.k_finite if repaired else k), t.n
    values.stride, values.group = b.k_stride, VALUE_DIMS
    accumulate(VECTORS, dq, t.scores, &values, t.n, b.p.head_dim, &nothing, &ahead)
    if repaired:
        repair_values(&b.p, &s.w, t, dq, 1, t.width, k, b.k_stride, b.p.head_dim)


cdef inline void differentiate_panel(const int VECTORS, const Backward* b, const BackwardScratch* s, RowPanel* panel,
                                     Py_ssize_t split, Py_ssize_t key_start, Py_ssize_t n) noexcept nogil:
    """P and dS (OUT) of the panel and n keys, which `panel` (OUT: low, high) then has; what comes of them for dQ, the
    mask and the slopes."""
    cdef const Problem* p = &b.p
    cdef Py_ssize_t width = VECTORS * LANES, key, skipped
    cdef real* probs = s.probs + panel.first * b.tile_keys
    cdef real* d_scores = s.d_scores + panel.first * b.tile_keys
    cdef vf ignored[MAX_PANEL]
    cdef Tile t, d
    cdef int v
    t.width, t.lanes, t.key_start, t.n = width, s.w.lanes + panel.first, key_start, n
    skipped = clip_tile(p, &t)
    panel.low = panel.high = 0
    if t.n == 0:
        return
    panel.low, panel.high = skipped // TILE_ROWS * TILE_ROWS, round_up(skipped + t.n, TILE_ROWS)
    for v in range(VECTORS):
        ignored[v] = vset1(<real> 0.0)
    key = t.key_start - split * p.split_kv
    t.scores = probs + skipped * width
    d = t
    d.scores = d_scores + skipped * width
    score_tile(VECTORS, t.scores, ignored, s.w.queries + panel.first * p.head_dim, s.k_rows + key * b.k_stride,
               b.k_stride, t.n, p.head_dim)
    score_tile(VECTORS, d.scores, ignored, s.d_out + panel.first * p.head_dim_v, s.v_rows + key * b.v_stride,
               b.v_stride, t.n, p.head_dim_v)
    modify_tile(p, &s.w, &t)
    if not (s.q_finite and s.k_finite_split):
        tell_from_masked(p, s, &t)
    if p.dropout:
        make_keep(p, s, &t)
        multiply_tile(d.scores, s.keep, t.n * width)
    differentiate(VECTORS, t.scores, d.scores, t.n, s.reference + panel.first, s.delta + panel.first, p.unit)
    if p.dropout:
        multiply_tile(t.scores, s.keep, t.n * width)
    if b.d_mask.data != NULL:
        add_to_mask(b, &d, panel.rows)
    if b.d_slopes != NULL:
        add_slopes(b, &d, panel.rows, split)
    if p.softcap != 0:
        differentiate_cap(p, s, d.scores, t.n * width)
    memset(probs + panel.low * width, 0, (skipped - panel.low) * width * sizeof(real))
    memset(d_scores + panel.low * width, 0, (skipped - panel.low) * width * sizeof(real))
    memset(t.scores + t.n * width, 0, (panel.high - skipped - t.n) * width * sizeof(real))
    memset(d.scores + t.n * width, 0, (panel.high - skipped - t.n) * width * sizeof(real))
    if b.dq.data != NULL:
        add_query_products(VECTORS, b, s, panel, &d, key)
    if not (s.q_finite and s.d_out_finite):
        repair_tile(b, s, panel, &t, &d, key)


cdef inline void add_key_tile(const int VECTORS, const BackwardScratch* s, Py_ssize_t tile_keys, const real* tiles,
                              Py_ssize_t key, const real* dims, real* acc, Py_ssize_t stride) noexcept nogil:
    """acc (IN/OUT)[TILE_ROWS][VECTORS] += the keys' rows of P or dS, `tiles`, times a panel of dimensions of the
    block's rows: one chain over all of them."""
    cdef vf sums[MAX_TILE]
    cdef const RowPanel* panel
    cdef const real* a
    cdef int r, v, number
    for r in range(TILE_ROWS * VECTORS):
        sums[r] = vset1(<real> 0.0)
    for number in range(s.num_panels):
        panel = &s.panels[number]
        if not panel.low <= key < panel.high:
            continue
        a = tiles + panel.first * tile_keys + key * panel.width
        if panel.width == ATTEND_VECTORS * LANES:
            multiply(TILE_ROWS, VECTORS, sums, a, ATTEND_VECTORS * LANES, 1, dims + panel.first * VECTORS * LANES,
                     panel.rows)
        else:
            multiply(TILE_ROWS, VECTORS, sums, a, panel.width, 1, dims + panel.first * VECTORS * LANES, panel.rows)
    for r in range(TILE_ROWS):
        for v in range(VECTORS):
            vstore(acc + r * stride + v * LANES, vload(acc + r * stride + v * LANES) + sums[r * VECTORS + v])


cdef void add_key_products(const Backward* b, const BackwardScratch* s, const real* tiles, Py_ssize_t n,
                           const real* dims, real* acc, Py_ssize_t stride) noexcept nogil:
    """acc (IN/OUT)[n][stride] += P or dS of all panels, `tiles`, times the block's rows of dO or Q."""
    cdef Py_ssize_t tile_keys = b.tile_keys, vectors = stride // LANES, first = 0, key
    cdef const real* panel
    cdef int width
    while first < vectors:
        width = panel_vectors(PANEL_VECTORS, vectors - first)
        panel = dims + first * LANES * b.p.block_rows
        key = 0
        while key < n:
            if PANEL_VECTORS == 3 and width == 3:
                add_key_tile(3, s, tile_keys, tiles, key, panel, acc + key * stride + first * LANES, stride)
            elif width == 2:
                add_key_tile(2, s, tile_keys, tiles, key, panel, acc + key * stride + first * LANES, stride)
            else:
                add_key_tile(1, s, tile_keys, tiles, key, panel, acc + key * stride + first * LANES, stride)
            key += TILE_ROWS
        first += width


cdef void add_queries(const Backward* b, const BackwardScratch* s, bint first_of_block) noexcept nogil:
    """dq (IN/OUT): the block's rows += scale * dQ; = from the first split that they see."""
    cdef Py_ssize_t i, d, dim = b.p.head_dim, stride = b.dk_stride
    cdef real scale = <real> b.scale
    cdef real* rows = s.w.rows
    cdef real* row
    cdef const RowPanel* panel
    cdef int number
    for number in range(s.num_panels):
        panel = &s.panels[number]
        transpose(rows, stride, s.dq + panel.first * dim, panel.width, dim, panel.width)
        for i in range(panel.rows):
            row = <real*> lane_row(&b.dq, s.w.lanes + panel.first + i)
            if first_of_block:
                for d in range(dim):
                    row[d] = scale * rows[i * stride + d]
            else:
                for d in range(dim):
                    row[d] += scale * rows[i * stride + d]


cdef void clear_queries(const Backward* b, const BackwardScratch* s, const Task* task) noexcept nogil:
    """dq (OUT) of a block of rows that see no key."""
    cdef Py_ssize_t i
    for i in range(task.num_rows if b.dq.data != NULL else 0):
        memset(lane_row(&b.dq, s.w.lanes + i), 0, b.p.head_dim * sizeof(real))


cdef bint await_turn(const Backward* b, Py_ssize_t* turn, Py_ssize_t splits_before) noexcept nogil:
    """False: the call is to end."""
    while atomic_read(turn) != splits_before:
        if stopped_by_signal(b.p.call):
            return False
        sched_yield()
    return True


cdef void do_block(const Backward* b, BackwardScratch* s, const Task* task, Py_ssize_t split,
                   Py_ssize_t* turn) noexcept nogil:
    """A block of rows against a split: s.dk and s.dv (IN/OUT), dq, d_mask, d_slopes, d_sinks (IN/OUT)."""
    cdef const Problem* p = &b.p
    cdef Py_ssize_t split_start = split * p.split_kv, splits_before = split - task.low // p.split_kv, n
    cdef Py_ssize_t key_start = max(task.low, split_start)      # what lies before may not exist
    cdef Py_ssize_t key_end = min(task.high, split_start + p.split_kv)
    cdef RowPanel* panel
    cdef int number
    describe_panels(s, task)
    weigh_rows(b, s, task, splits_before == 0, split)
    s.q_finite = pack_both(b, s, &p.q, p.head_dim, b.dk_stride, s.sign, s.w.queries, s.q_dims)
    s.d_out_finite = pack_both(b, s, &b.d_out, p.head_dim_v, b.dv_stride, s.factor, s.d_out, s.d_out_dims)
    memset(s.dq, 0, task.lanes * p.head_dim * sizeof(real))
    while key_start < key_end:
        if stopped_by_signal(p.call):
            return
        n = min(p.block_kv - key_start % p.block_kv, key_end - key_start)
        for number in range(s.num_panels):
            panel = &s.panels[number]
            if ATTEND_VECTORS == 3 and panel.width == 3 * LANES:
                differentiate_panel(3, b, s, panel, split, key_start, n)
            elif ATTEND_VECTORS >= 2 and panel.width == 2 * LANES:
                differentiate_panel(2, b, s, panel, split, key_start, n)
            else:
                differentiate_panel(1, b, s, panel, split, key_start, n)
        if b.dv.data != NULL:
            add_key_products(b, s, s.probs, n, s.d_out_dims, s.dv + (key_start - split_start) * b.dv_stride,
                             b.dv_stride)
        if b.dk.data != NULL:
            add_key_products(b, s, s.d_scores, n, s.q_dims, s.dk + (key_start - split_start) * b.dk_stride,
                             b.dk_stride)
        key_start += n
    if b.dq.data != NULL and await_turn(b, turn, splits_before):
        add_queries(b, s, splits_before == 0)
        atomic_set(turn, splits_before + 1)


cdef void store_keys(const Tensor* t, const Task* task, Py_ssize_t start, Py_ssize_t end, Py_ssize_t low,
                     Py_ssize_t high, real* rows, Py_ssize_t dim, Py_ssize_t stride, real scale) noexcept nogil:
    """Keys [start, end) of dk or dv (OUT) = scale * rows for those in [low, high), else 0."""
    cdef Py_ssize_t key, d
    if t.data == NULL:
        return
    for key in range(start, end):
        if low <= key < high:
            for d in range(stride // LANES):
                vstore(rows + d * LANES, vload(rows + d * LANES) * scale)
        else:
            memset(rows, 0, stride * sizeof(real))
        store_row(row_of(t, task.batch, task.kv_head, key), t.stride[3], rows, dim, t.kind)
        rows += stride


cdef void do_head(const Backward* b, BackwardScratch* s, Py_ssize_t split, Py_ssize_t batch,
                  Py_ssize_t kv_head) noexcept nogil:
    """A split of a key head against all its query rows."""
    cdef const Problem* p = &b.p
    cdef Py_ssize_t rows = num_rows(p, batch), start = split * p.split_kv, end, low, high
    cdef Py_ssize_t* turn = b.turns + first_turn(b, batch, kv_head)
    cdef Task task
    cdef Block keys
    task.batch, task.kv_head, task.first_row = batch, kv_head, 0
    high = max(start, min(num_keys(p, batch), start + p.split_kv))
    low = start if p.kv_starts == NULL else min(high, max(start, p.kv_starts[batch]))
    keys.key_start, keys.n = low, high - low
    copy_rows(s.k_rows + (low - start) * b.k_stride, p, &p.k, &task, &keys, p.head_dim, b.k_stride)
    copy_rows(s.v_rows + (low - start) * b.v_stride, p, &p.v, &task, &keys, p.head_dim_v, b.v_stride)
    s.k_finite_split = all_finite(s.k_rows + (low - start) * b.k_stride, keys.n * b.k_stride)
    memset(s.dk, 0, (high - start) * b.dk_stride * sizeof(real))
    memset(s.dv, 0, (high - start) * b.dv_stride * sizeof(real))
    while task.first_row < rows:
        task.num_rows = min(p.block_rows, rows - task.first_row)
        task.lanes = round_up(task.num_rows, LANES)
        describe_lanes(p, &task, s.w.lanes)
        if task.low < high and task.high > low:
            do_block(b, s, &task, split, turn)
            if stopped_by_signal(p.call):
                return
        elif split == 0 and task.low == task.high:
            clear_queries(b, s, &task)
        task.first_row += p.block_rows
        turn += 1
    # Packed keys are as many as there are; of others, those that do not exist get 0.
    end = min(start + p.split_kv, num_keys(p, batch) if p.k.firsts != NULL else p.seq_len_kv)
    store_keys(&b.dk, &task, start, end, low, high, s.dk, p.head_dim, b.dk_stride, <real> fabs(b.scale))
    store_keys(&b.dv, &task, start, end, low, high, s.dv, p.head_dim_v, b.dv_stride, 1.0)


cdef void do_backward_task(const Backward* b, BackwardScratch* s, Py_ssize_t number) noexcept nogil:
    """Tasks are numbered by split, batch and key head: heads apart are at work together, and no task waits for one that
    comes after it."""
    cdef Py_ssize_t heads = b.p.num_kv_heads // b.task_heads
    cdef Py_ssize_t batches = b.p.batch_size // b.task_batches
    cdef Py_ssize_t first_head = number % heads * b.task_heads
    cdef Py_ssize_t first_batch = number // heads % batches * b.task_batches
    cdef Py_ssize_t first_split = number // heads // batches * b.task_splits
    cdef Py_ssize_t split, batch, head
    for split in range(first_split, first_split + b.task_splits):
        for batch in range(first_batch, first_batch + b.task_batches):
            for head in range(first_head, first_head + b.task_heads):
                if stopped_by_signal(b.p.call):
                    return
                do_head(b, s, split, batch, head)


cdef void do_backward_tasks(const void* what, char* scratch) noexcept nogil:
    """What one thread does of a Backward."""
    cdef const Backward* b = <const Backward*> what
    cdef Call* call = b.p.call
    cdef Py_ssize_t number = take_task(call)
    cdef fp_mode before = own_mode()
    cdef BackwardScratch s
    carve_backward(&s, scratch, b)
    while number < call.num_tasks and not stopped_by_signal(call):
        do_backward_task(b, &s, number)
        task_done(call)
        number = take_task(call)
    set_mode(before)
    await_others(call)


cdef int run_backward(Backward* b, Py_ssize_t num_threads) except -1:
    """Does a planned problem."""
    cdef BackwardScratch s
    cdef Call call
    cdef Problem* p = &b.p
    cdef size_t size
    cdef Py_ssize_t num_turns
    cdef char* scratch
    begin_call(&call, num_threads, count_pairs(p) * p.num_kv_heads * p.group_size
               * (2 * (3 * p.head_dim + 2 * p.head_dim_v) + EXP_FLOPS))
    p.call = &call
    if p.num_tasks == 0:
        end_call(&call)
        return 0
    call.num_tasks = call.unfinished = p.num_tasks
    call.num_threads = min(call.num_threads, p.num_tasks)
    size = carve_backward(&s, NULL, b)
    num_turns = first_turn(b, p.batch_size, 0)
    scratch = take_scratch(call.num_threads * size + num_turns * sizeof(Py_ssize_t))
    if scratch == NULL:
        end_call(&call)
        raise MemoryError(f"attention: no memory for {call.num_threads} x {size} bytes of scratch")
    b.turns = <Py_ssize_t*> (scratch + call.num_threads * size)
    memset(b.turns, 0, num_turns * sizeof(Py_ssize_t))
    with nogil:
        in_threads(&call, do_backward_tasks, b, scratch, size)
    give_scratch(scratch)
    end_call(&call)
