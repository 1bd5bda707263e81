# One attention problem, how it is cut into tasks, and the scratch that a thread needs for it.
#
# A task is (batch, key head, block of query rows). The query rows of all heads that share a key head stand one after
# the other, so grouped queries use each load of K and V together; and where all batch rows share their keys (a stride
# of 0), the rows of all of them do. The keys are cut into splits of a fixed length, each with a softmax of its own,
# merged in order: a thread does the splits of its task one after the other, or, where one task would keep a thread busy
# for too large a part of the call, different threads do them. Who does what changes no bit.
#
# Where the batch rows differ in their numbers of queries, some are done by one kernel, and some by the other: a plan
# for each, and one queue of tasks for all.

cdef enum:
    MIN_BLOCK = 6              # vectors of query rows: two or three panels, so that K and V are still used twice
    # Numbers in a block of queries, or of results: fewer rows beyond head_dim 341. At 1024, 64 rows are 12 % slower
    # than 192, 32 are 40 % (Zen 4), and each of the two to four such blocks takes 256 KB instead of 768.
    MAX_BLOCK = 65536
    # Of a block of 128 keys in pages of SMALL_PAGE; smaller ones are copied, and by prefill those that are no multiple
    # of the most keys in a tile: a tile is of one page
    SMALL_PAGE = 8
    MOST_TILE_KEYS = 16
    MAX_RUNS = 17
    SPLIT_KEYS = 1024          # decode: 512 to 4096 measured within 4 %; prefill of 2048 keys: 1 % for the merge

cdef struct Parts   # attend.pxi

cdef struct Sequence:               # of a plan whose batch rows differ in length: those with most work come first
    Py_ssize_t batch
    Py_ssize_t first_task           # of the plan's tasks
    double work                     # of its longest task

cdef struct Problem:
    Tensor q, k, v, out, mask       # IN, IN, IN, OUT, IN
    Tensor k_scales, v_scales       # IN (as k, as v, but of dim 1): what numbers of 8 bits are to be multiplied by
    real* weights                   # OUT (batch, num_heads, seq_len_q, seq_len_kv), contiguous; or NULL
    uint16_t* narrow_weights        # OUT, the same in the kind of out, where that has 16 bits; or NULL
    Tensor logsumexp                # OUT, a real for each query
    const real* sinks               # IN (num_heads,); or NULL
    const real* slopes              # IN (batch or 1, num_heads); or NULL
    Py_ssize_t slopes_stride        # from one batch row of slopes to the next: num_heads or 0
    const int64_t* cu_seqlens_q     # IN (batch + 1,): batch row i has rows [i] to [i + 1]; or NULL: all seq_len_q
    # IN (batch, table_stride): which pages have the keys of a batch row; k and v are (pages, num_kv_heads, page_size,
    # dim) then; or NULL
    const int64_t* block_table
    Py_ssize_t table_stride, page_size
    const int64_t* q_offsets        # IN (batch,); or NULL: q_offset for all
    const int64_t* kv_lens          # IN (batch,); or NULL: all seq_len_kv
    const int64_t* kv_starts        # IN (batch,): no batch row sees a key before its; or NULL
    Py_ssize_t q_offset
    # seq_len_q, seq_len_kv: of the longest batch row
    Py_ssize_t batch_size, num_kv_heads, group_size, seq_len_q, head_dim, head_dim_v, seq_len_kv
    Py_ssize_t folded               # batch rows in a task: all of them where they share their keys, else 1
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
    # For dropout: of this call's first batch row, head, query and key among all, where it is a part of a larger problem
    Py_ssize_t batch_offset, head_offset, query_offset, key_offset
    # The plan
    const Sequence* sequences       # [num_sequences]; or NULL: all batch rows are equally long
    Py_ssize_t num_sequences, num_tasks
    int decode_width                # 0: prefill kernel; else lanes that decode gives to rows: 1, 2, 4 or 8
    bint k_in_place, v_in_place     # rows of K, V are read where they lie, in whatever block
    bint v_packed                   # and those of V are then packed by columns, see pack_values
    Kind block_kind                 # of the numbers in blocks of K and V
    bint may_mask                   # some row may not see some key of a block
    bint same_keys                  # all rows of a batch row see the same, but for masks
    Py_ssize_t q_stride, v_stride   # reals from one row of packed queries, of acc, to the next
    Py_ssize_t k_stride             # likewise of copied keys
    Py_ssize_t block_rows           # query rows in a block, a multiple of LANES (decode: decode_width)
    Py_ssize_t block_kv             # keys in a block: what one pass of the kernel's loops takes
    Py_ssize_t split_kv             # keys in a split, a multiple of block_kv
    Py_ssize_t num_splits
    Parts* parts                    # splits that different threads do; NULL: each does whole tasks
    Call* call

cdef struct State:                  # of the softmax of a block of rows, over the keys done so far
    # In the unit of what leaves the modifiers. [block_rows], decode: [LANES], row r in each lane l with
    # l % decode_width == r
    real* reference
    real* row_sum                   # likewise
    real* acc                       # [panel][head_dim_v][width], decode: [row][v_stride]

cdef struct Workspace:              # one per thread, SCRATCH
    State total, part
    State lost                      # what rounding has taken from the sums of total, see merge_vector; no reference
    real* queries                   # [panel][head_dim][width], decode: [q_stride][row]; times p.sign
    real* scores                    # [block_kv][width]
    real* next_scores               # likewise, for prefill; decode's vectors reach into it from the end of scores
    real* k_rows                    # [block_kv][k_stride]; unless K is read in place
    real* v_rows                    # [block_kv][v_stride]; unless V is read in place, and always as reals
    real* v_columns                 # [group][block_kv][VALUE_DIMS], groups v_group apart; where V is packed
    real* visible                   # [block_kv][width]: 0 where seen, -inf where masked; see repair_values
    real* capped                    # OUT [block_kv][width]: scores after the softcap; or NULL
    real* v_finite                  # [block_kv][v_stride]; both only where a row may not see a key
    real* key_scales                # [block_kv] of the block's keys, by their place on the grid; where there are any
    real* value_scales              # likewise
    real* rows                      # query or result rows, LANES mask rows of block_kv, or the last keys of decode
    real* shrink                    # [block_rows], decode: [LANES]; factors of probabilities, see store_result
    bint again                      # some of them are not 1
    Lane* lanes                     # [block_rows]

cdef struct Lane:
    Py_ssize_t batch
    Py_ssize_t head         # query head
    Py_ssize_t query        # row of the query array
    Py_ssize_t position     # query + q_offset: the key position it stands at
    Py_ssize_t low, high    # keys [low, high) are visible: causal, window and kv_lens together
    real slope              # ALiBi

cdef struct KeyRun:                 # keys that lie one after the other
    Py_ssize_t n
    const char* k                   # rows of adjacent numbers, Block.k_step bytes apart
    const char* v                   # likewise
    const char* next_k              # rows of K, as far apart, that are probably read next
    Py_ssize_t next_n

cdef struct Block:                  # some consecutive keys of a head, see next_block
    Py_ssize_t key_start, n
    KeyRun runs[MAX_RUNS]
    int num_runs                    # several in small pages; one where K is copied
    Py_ssize_t k_step, v_step
    Kind kind                       # of the numbers

cdef struct Tile:                   # a panel of query rows against some keys of a block
    real* scores                    # [n][width]; probabilities once the softmax is through
    Py_ssize_t width                # a lane for each row: whole vectors of them, or (decode) fewer than LANES
    const Lane* lanes               # [width]
    Py_ssize_t key_start, n
    bint limited                    # some lane does not see some key
    real scale                      # what the scores are still to be multiplied by

cdef struct Task:
    Py_ssize_t batch, kv_head       # whose keys
    Py_ssize_t first_row, num_rows  # of the batch row's query rows, or of those of all folded ones
    Py_ssize_t lanes                # a whole number of vectors of rows; decode: block_rows
    Py_ssize_t low, high            # keys [low, high) are seen by some row
    # What the thread probably goes on with, see expect: keys [next_low, + next_n), for query rows from next_row on.
    # next_n: 0 where nobody knows
    Py_ssize_t next_batch, next_kv_head, next_low, next_n, next_row


cdef inline Py_ssize_t state_size(const Problem* p) noexcept nogil:
    """In bytes, a multiple of 64."""
    return (2 * max(p.block_rows, LANES) + p.block_rows * p.v_stride) * <Py_ssize_t> sizeof(real) // 64 * 64 + 64


cdef inline void place_state(State* s, char* base, const Problem* p) noexcept nogil:
    cdef Py_ssize_t lanes = max(p.block_rows, LANES)
    s.acc = <real*> base
    s.reference = s.acc + p.block_rows * p.v_stride
    s.row_sum = s.reference + lanes


cdef size_t carve(Workspace* w, char* base, const Problem* p) noexcept nogil:
    """Lays the workspace out from `base` on, 64-byte aligned pieces; returns its size in bytes."""
    cdef Py_ssize_t width = min(p.block_rows, <Py_ssize_t> ATTEND_VECTORS * LANES)
    cdef Py_ssize_t keys = round_up(min(p.block_kv, p.seq_len_kv), LANES)
    cdef size_t size = 0
    cdef Py_ssize_t state = state_size(p)
    place_state(&w.total, take(base, &size, state), p)
    place_state(&w.part, take(base, &size, state if p.num_splits > 1 else 0), p)
    place_state(&w.lost, take(base, &size, state if p.num_splits > 1 else 0), p)
    w.queries = <real*> take(base, &size, p.block_rows * p.q_stride * sizeof(real))
    w.scores = <real*> take(base, &size, keys * width * sizeof(real))
    w.next_scores = <real*> take(base, &size, keys * width * sizeof(real))
    w.k_rows = <real*> take(base, &size, 0 if p.k_in_place else keys * p.k_stride * sizeof(real))
    w.v_rows = <real*> take(base, &size, keys * p.v_stride * sizeof(real) if copies_values(p) else 0)
    w.v_columns = <real*> take(base, &size, p.head_dim_v // VALUE_DIMS * v_group(p) * sizeof(real)
                               if p.v_packed else 0)
    w.key_scales = <real*> take(base, &size, (p.block_kv + LANES) * sizeof(real) if p.k_scales.data != NULL else 0)
    w.value_scales = <real*> take(base, &size, (p.block_kv + LANES) * sizeof(real) if p.v_scales.data != NULL else 0)
    w.rows = <real*> take(base, &size, max(width * max(p.q_stride, p.v_stride), LANES * max(p.q_stride, keys))
                          * sizeof(real))
    w.shrink = <real*> take(base, &size, max(p.block_rows, LANES) * sizeof(real))
    w.lanes = <Lane*> take(base, &size, p.block_rows * sizeof(Lane))
    w.capped = NULL
    w.visible = <real*> take(base, &size, keys * width * sizeof(real) if p.may_mask else 0)
    w.v_finite = <real*> take(base, &size, keys * p.v_stride * sizeof(real) if p.may_mask else 0)
    return size


cdef int choose_units(Problem* p, scale) except -1:
    """sign, scale, unit and natural (OUT), from the scale, None for 1 / sqrt(head_dim), and the modifiers. The query is
    never multiplied by the scale: that would round what plain NumPy does not, and could leave the range. As long as
    scores are only compared, with each other or with -inf, they stay products of query and key, and exp2 takes
    (s - reference) * unit, with unit = |scale| log2(e): where s is near the maximum, the difference is exact and small.
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


cdef inline Py_ssize_t num_queries(const Problem* p, Py_ssize_t batch) noexcept nogil:
    return p.seq_len_q if p.cu_seqlens_q == NULL else p.cu_seqlens_q[batch + 1] - p.cu_seqlens_q[batch]


cdef inline Py_ssize_t num_keys(const Problem* p, Py_ssize_t batch) noexcept nogil:
    return p.seq_len_kv if p.kv_lens == NULL else p.kv_lens[batch]


cdef inline Py_ssize_t num_rows(const Problem* p, Py_ssize_t batch) noexcept nogil:
    """Query rows that use the same keys."""
    return p.folded * p.group_size * num_queries(p, batch)


cdef inline int width_of(Py_ssize_t rows) noexcept nogil:
    """decode_width of so many query rows."""
    return 0 if rows > min(MAX_DECODE_ROWS, LANES) else <int> padded_rows(rows)


cdef inline bint lengths_differ(const Problem* p) noexcept nogil:
    return p.folded == 1 and p.batch_size > 1 and (p.cu_seqlens_q != NULL or p.kv_lens != NULL)


cdef inline bint is_planned(const Problem* p, Py_ssize_t batch) noexcept nogil:
    """Whether the plan is this batch row's."""
    return num_rows(p, batch) > 0 and width_of(num_rows(p, batch)) == p.decode_width


cdef Py_ssize_t count_tasks(const Problem* p, Py_ssize_t block_rows) noexcept nogil:
    """Of the plan, in blocks of so many query rows."""
    cdef Py_ssize_t batch, blocks = 0
    if not lengths_differ(p):
        return p.batch_size // p.folded * p.num_kv_heads * ceil_div(num_rows(p, 0), block_rows)
    for batch in range(p.batch_size):
        if is_planned(p, batch):
            blocks += ceil_div(num_rows(p, batch), block_rows)
    return blocks * p.num_kv_heads


cdef double work_of(const Problem* p, Py_ssize_t rows, Py_ssize_t batch) noexcept nogil:
    """Of a task: products of a row and a key. Few rows take as long as some more, since they wait for the keys."""
    return <double> (rows + MAX_DECODE_ROWS) * (num_keys(p, batch) + LANES)


cdef int compare_work(const void* a, const void* b) noexcept nogil:
    """For qsort: the most comes first; of as much, the first batch row."""
    cdef const Sequence* one = <const Sequence*> a
    cdef const Sequence* other = <const Sequence*> b
    if one.work != other.work:
        return -1 if one.work > other.work else 1
    return -1 if one.batch < other.batch else 1


cdef Py_ssize_t list_sequences(Problem* p, Sequence* sequences) noexcept nogil:
    """The plan's batch rows (OUT), sorted, and their tasks; returns how many they are."""
    cdef Py_ssize_t batch, i, n = 0, first_task = 0
    for batch in range(p.batch_size):
        if is_planned(p, batch):
            sequences[n].batch = batch
            sequences[n].work = work_of(p, min(num_rows(p, batch), p.block_rows), batch)
            n += 1
    qsort(sequences, n, sizeof(Sequence), compare_work)
    for i in range(n):
        sequences[i].first_task = first_task
        first_task += p.num_kv_heads * ceil_div(num_rows(p, sequences[i].batch), p.block_rows)
    p.sequences, p.num_sequences = sequences, n
    return n


cdef void plan(Problem* p, int decode_width, Py_ssize_t longest, Py_ssize_t num_threads) noexcept nogil:
    """How the work of those batch rows is cut that a kernel for this decode_width does; the longest has so many query
    rows. What decides bits (block_kv, split_kv) follows from head_dim and head_dim_v alone. The query rows of a key
    head are cut into blocks: large, so that K and V are read seldom, but enough of them for all threads; which block a
    row is in decides no bit of its result."""
    cdef Py_ssize_t vectors = ceil_div(longest, LANES)
    cdef Py_ssize_t size = MAX_ROWS // LANES, wide, fewer_blocks     # size, wide: vectors in a block
    cdef Py_ssize_t widest = max(p.head_dim, p.head_dim_v)
    cdef bint pages_are_even
    p.decode_width = decode_width
    p.v_packed = False
    p.sequences = NULL
    p.same_keys = p.window_left < 0 and p.window_right < 0 and (
        p.folded == 1 or (p.kv_lens == NULL and p.kv_starts == NULL))
    p.block_kv, p.split_kv = keys_per_block(p.head_dim, p.head_dim_v), SPLIT_KEYS
    p.may_mask = p.mask.data != NULL or not p.same_keys or p.kv_lens != NULL or p.kv_starts != NULL
    if decode_width:
        p.q_stride = round_up(p.head_dim, LANES)
        p.v_stride = round_up(p.head_dim_v, LANES)
        p.k_stride = p.q_stride
        p.block_rows = decode_width
        # Both in place or both copied, since one loop reads one kind of rows.
        p.k_in_place = (decode_reads_in_place(&p.k, p.head_dim) and decode_reads_in_place(&p.v, p.head_dim_v)
                        and (p.k.kind == real_kind() or p.head_dim >= 2 * LANES)    # see multiply_columns
                        and (p.k.kind != I8 or p.head_dim % (4 * COLUMNS) == 0)
                        and (p.block_table == NULL or p.page_size >= SMALL_PAGE))
        p.v_in_place = p.k_in_place
        p.block_kind = p.k.kind if p.k_in_place else real_kind()
    else:
        p.q_stride, p.v_stride = p.head_dim, p.head_dim_v
        # Halve the blocks until every thread has a few. Smaller blocks read K and V more often, from L2 or L3.
        if size * LANES * widest > MAX_BLOCK:
            size = max(1, MAX_BLOCK // (LANES * widest) // ATTEND_VECTORS) * ATTEND_VECTORS
        while (num_threads > 1 and size // 2 >= MIN_BLOCK
               and count_tasks(p, size * LANES) < TASKS_PER_THREAD * num_threads):
            size //= 2
        # Where threads have tasks enough, a third more than a block is one block still, and several are whole panels:
        # 197 rows take 5 % longer in two blocks.
        fewer_blocks = max(1, (vectors + size * 2 // 3) // size)
        wide = ceil_div(vectors, fewer_blocks)
        if wide < vectors:
            wide = round_up(wide, ATTEND_VECTORS)
        size = ceil_div(vectors, ceil_div(vectors, size))
        if num_threads == 1 or count_tasks(p, wide * LANES) >= TASKS_PER_THREAD * num_threads:
            size = wide
        p.block_rows = size * LANES
        p.k_stride = key_stride(p.head_dim)
        pages_are_even = blocks_are_whole(p) or p.page_size % MOST_TILE_KEYS == 0
        p.k_in_place = pages_are_even and rows_are_real(&p.k) and (
            not strides_are_known(p.head_dim) or p.k.stride[2] == p.k_stride * <Py_ssize_t> sizeof(real))
        # Where K is copied, a block is one run.
        p.v_in_place = ((blocks_are_whole(p) or (pages_are_even and p.k_in_place))
                        and prefill_reads_in_place(&p.v, p.head_dim_v, p.block_rows))
        p.v_packed = packs_values(p)
        p.block_kind = real_kind()
    p.num_tasks = count_tasks(p, p.block_rows)
    p.num_splits = ceil_div(p.seq_len_kv, p.split_kv)
