# Where the keys and values of a task lie, as what they are read, which come next, and which are wanted soon. Both
# kernels take the blocks that next_block yields: no other place computes an address of K or V.
#
# Keys in pages: a run of keys ends where its page does. Another way to store them is a case of place_runs. The scales
# of keys of 8 bits are a modifier of scores, those of values one of probabilities: see modify.pxi.

cdef enum:
    # Asked for every EXP_KEYS keys, at least: 1 is 15 % slower where short sequences come from memory
    AHEAD_LINES = 2
    MOST_ROWS = 2 * MAX_RUNS + 2    # K and V of a block in the smallest pages, Q, out
    MOST_LINES = 64     # where K is far wider than V; 2 to 16 elsewhere
    # K and V of a call, in bytes: larger ones are asked for although the hardware foresees them. From memory, 12 to 64
    # rows a key head take 0.82 to 0.95 of the time then, 128 and more 0.87 to 0.93; 16 rows on keys in L2, 1.1 times
    # (Emerald Rapids)
    FAR_BYTES = 1 << 21

cdef struct Rows:
    const char* row             # the first that is left
    Py_ssize_t stride, bytes, left

cdef struct Ahead:              # what is asked of memory while tiles are accumulated, a few lines at a time: in a
    Rows rows[MOST_ROWS]        # burst, the queue of misses would fill, and the loops' own loads wait
    int count, current          # of rows[]
    int lines                   # to be asked for every EXP_KEYS keys
    Py_ssize_t offset           # in the current row


cdef inline const char* key_row(const Problem* p, const Tensor* t, Py_ssize_t batch, Py_ssize_t head,
                                Py_ssize_t key) noexcept nogil:
    """A row of K or V."""
    if p.block_table == NULL:
        return row_of(t, batch, head, key)
    return row_of(t, p.block_table[batch * p.table_stride + key // p.page_size], head, key % p.page_size)


cdef inline Py_ssize_t until_page_ends(const Problem* p, Py_ssize_t key, Py_ssize_t n) noexcept nogil:
    """How many of n keys lie one after the other."""
    return n if p.block_table == NULL else min(n, p.page_size - key % p.page_size)


cdef inline const char* key_of_run(const Block* b, Py_ssize_t key, Py_ssize_t* left) noexcept nogil:
    """K's row of a key of the block, counted from its first; left (OUT): keys of its run from there on."""
    cdef const KeyRun* run = b.runs
    while key >= run.n:
        key -= run.n
        run += 1
    left[0] = run.n - key
    return run.k + key * b.k_step


cdef inline bint blocks_are_whole(const Problem* p) noexcept nogil:
    """Whether a block of keys never goes on in another page."""
    return p.block_table == NULL or p.page_size % p.block_kv == 0


cdef void copy_rows(real* copy, const Problem* p, const Tensor* t, const Task* task, const Block* b, Py_ssize_t dim,
                    Py_ssize_t stride) noexcept nogil:
    """copy (OUT)[b.n][stride]: the block's rows of K or V as reals; what a row has beyond `dim` is 0."""
    cdef Py_ssize_t j, d
    for j in range(b.n):
        load_row(copy + j * stride, key_row(p, t, task.batch, task.kv_head, b.key_start + j), t.stride[3], dim, t.kind)
        for d in range(dim, stride):
            copy[j * stride + d] = 0.0


cdef void load_key_scales(real* scales, const Problem* p, const Tensor* t, const Task* task,
                          const Block* b) noexcept nogil:
    """scales (OUT)[block_kv + LANES]: each key's, at its place on the grid of blocks; 0 in whole vectors behind."""
    cdef Py_ssize_t done = 0, n, i
    cdef const char* row
    cdef float scale
    scales += b.key_start % p.block_kv
    while done < b.n:
        n = until_page_ends(p, b.key_start + done, b.n - done)
        row = key_row(p, t, task.batch, task.kv_head, b.key_start + done)
        if t.stride[2] == sizeof(float):
            load_row(scales + done, row, sizeof(float), n, F32)
        else:   # mostly as far apart as there are heads
            for i in range(n):
                memcpy(&scale, row + i * t.stride[2], sizeof(float))
                scales[done + i] = scale
        done += n
    for i in range(b.n, round_up(b.n, LANES)):
        scales[i] = 0.0


cdef inline Py_ssize_t end_of_keys(const Problem* p, const Task* task, Py_ssize_t high) noexcept nogil:
    """Where a thread that is at a split up to `high` will be done with the task: after it, or after all of them."""
    return task.high if p.parts == NULL else high


cdef inline void before_block(Block* b, Py_ssize_t low) noexcept nogil:
    """b (OUT): next_block's next one starts at `low`."""
    b.key_start, b.n = low, 0


cdef void place_runs(const Problem* p, const Task* task, Py_ssize_t high, Block* b) noexcept nogil:
    """The block's runs (OUT), where they lie. Those of the next block, or of what the thread goes on with, are told
    beside them."""
    cdef Py_ssize_t done = 0, batch = task.batch, head = task.kv_head, next_key = b.key_start + b.n, next_n
    cdef KeyRun* run = b.runs
    b.k_step, b.v_step = p.k.stride[2], p.v.stride[2]
    next_n = min(p.block_kv, task.high - next_key)
    if next_key >= end_of_keys(p, task, high):
        batch, head, next_key, next_n = task.next_batch, task.next_kv_head, task.next_low, task.next_n
    b.num_runs = 0
    while done < b.n:
        run.n = until_page_ends(p, b.key_start + done, b.n - done)
        run.k = key_row(p, &p.k, task.batch, task.kv_head, b.key_start + done)
        run.v = key_row(p, &p.v, task.batch, task.kv_head, b.key_start + done)
        run.next_n = until_page_ends(p, next_key, next_n)
        run.next_k = key_row(p, &p.k, batch, head, next_key) if run.next_n > 0 else NULL
        next_key += run.next_n
        next_n -= run.next_n
        done += run.n
        run += 1
        b.num_runs += 1


cdef inline bint next_block(const Problem* p, const Workspace* w, const Task* task, Py_ssize_t high,
                            Block* b) noexcept nogil:
    """b (IN: the block before; OUT): the next keys below `high`, on a grid that starts at key 0, where they lie or in
    w.k_rows and w.v_rows. False: there are none, or the call is to end."""
    b.key_start += b.n
    if b.key_start >= high or stopped_by_signal(p.call):
        return False
    b.n = min(p.block_kv - b.key_start % p.block_kv, high - b.key_start)
    b.kind = p.block_kind
    if p.k_scales.data != NULL:
        load_key_scales(w.key_scales, p, &p.k_scales, task, b)
        load_key_scales(w.value_scales, p, &p.v_scales, task, b)
    if p.k_in_place or p.v_in_place:
        place_runs(p, task, high, b)
    if not p.k_in_place:
        copy_rows(w.k_rows, p, &p.k, task, b, p.head_dim, p.k_stride)
        b.num_runs, b.runs[0].n, b.runs[0].next_n = 1, b.n, 0
        b.runs[0].k, b.k_step = <const char*> w.k_rows, p.k_stride * sizeof(real)
    if not p.v_in_place:
        copy_rows(w.v_rows, p, &p.v, task, b, p.head_dim_v, p.v_stride)
        b.runs[0].v, b.v_step = <const char*> w.v_rows, p.v_stride * sizeof(real)
    return True


cdef inline bint copies_values(const Problem* p) noexcept nogil:
    """Values behind masks are looked at, as reals."""
    return not p.v_in_place or (p.may_mask and (p.block_kind != real_kind() or not blocks_are_whole(p)))


cdef inline const real* values_of(const Problem* p, const Workspace* w, const Task* task, const Block* b,
                                  Py_ssize_t* stride) noexcept nogil:
    """The block's rows of V as reals, `stride` (OUT) of them apart."""
    if not p.v_in_place or (b.kind == real_kind() and b.num_runs == 1):
        stride[0] = b.v_step // <Py_ssize_t> sizeof(real)
        return <const real*> b.runs[0].v
    copy_rows(w.v_rows, p, &p.v, task, b, p.head_dim_v, p.v_stride)
    stride[0] = p.v_stride
    return w.v_rows


cdef inline void prefetch_ahead(Ahead* a, int lines) noexcept nogil:
    """The next lines."""
    cdef Rows* rows
    for _ in range(lines):
        if a.current == a.count:
            return
        rows = &a.rows[a.current]
        prefetch(rows.row + a.offset)
        a.offset += 64
        if a.offset >= rows.bytes:
            a.offset = 0
            rows.row += rows.stride
            rows.left -= 1
            if rows.left == 0:
                a.current += 1


cdef void ask_for(Ahead* a, const Tensor* t, const char* row, Py_ssize_t n, Py_ssize_t dim) noexcept nogil:
    """Adds n rows from this one on to what is asked for, unless their numbers lie far apart: too many lines."""
    cdef Rows* rows = &a.rows[a.count]
    if n <= 0 or not 0 < t.stride[3] <= <Py_ssize_t> sizeof(double):
        return
    rows.row, rows.stride, rows.bytes, rows.left = row, t.stride[2], dim * t.stride[3], n
    if rows.stride == rows.bytes:
        rows.bytes, rows.left = n * rows.bytes, 1   # one long row
    a.count += 1


cdef void ask_for_queries(const Problem* p, Ahead* a, const Tensor* t, Py_ssize_t batch, Py_ssize_t kv_head,
                          Py_ssize_t row, Py_ssize_t dim) noexcept nogil:
    """Adds a block's rows of Q or out, from `row` of a key head's on: those of the first head."""
    cdef Lane lane
    locate_row(p, batch, kv_head, row, &lane)
    ask_for(a, t, lane_row(t, &lane), min(p.block_rows, num_queries(p, lane.batch) - lane.query), dim)


cdef void ask_for_keys(const Problem* p, Ahead* a, const Tensor* t, Py_ssize_t batch, Py_ssize_t head, Py_ssize_t key,
                       Py_ssize_t n, Py_ssize_t dim) noexcept nogil:
    """Adds n rows of K or V from `key` on, as many as a.rows has room for where they are of several pages."""
    cdef Py_ssize_t together
    while n > 0 and a.count + 2 < MOST_ROWS:
        together = until_page_ends(p, key, n)
        ask_for(a, t, key_row(p, t, batch, head, key), together, dim)
        key += together
        n -= together


cdef void plan_ahead(const Problem* p, const Task* task, Py_ssize_t key_end, Py_ssize_t high,
                     Ahead* a) noexcept nogil:
    """a (OUT): what is wanted when the keys up to key_end are done. The next block of keys, where it is far or its rows
    lie apart; after the last, the rows of out, and what the thread goes on with."""
    cdef Py_ssize_t n = min(end_of_keys(p, task, high) - key_end, p.block_kv), panels, lines
    cdef Py_ssize_t row = p.head_dim * size_of(p.k.kind) + p.head_dim_v * size_of(p.v.kind)
    cdef bint far = p.batch_size * p.num_kv_heads * p.seq_len_kv * row > FAR_BYTES
    a.lines = AHEAD_LINES
    a.count = a.current = 0
    a.offset = 0
    if n > 0:
        if far or p.k.stride[2] != p.head_dim * p.k.stride[3]:
            ask_for_keys(p, a, &p.k, task.batch, task.kv_head, key_end, n, p.head_dim)
        if far or p.v.stride[2] != p.head_dim_v * p.v.stride[3]:
            ask_for_keys(p, a, &p.v, task.batch, task.kv_head, key_end, n, p.head_dim_v)
        # All of it, while each panel accumulates its tiles of ATTEND_ROWS dimensions.
        panels = ceil_div(task.num_rows, <Py_ssize_t> ATTEND_VECTORS * LANES)
        lines = row * EXP_KEYS * ATTEND_ROWS // (64 * p.head_dim_v * panels)
        a.lines = <int> min(max(lines, <Py_ssize_t> AHEAD_LINES), <Py_ssize_t> MOST_LINES)
        return
    if not p.call.in_flight:  # so little work that all of it is in the caches
        return
    ask_for_queries(p, a, &p.out, task.batch, task.kv_head, task.first_row, p.head_dim_v)
    ask_for_keys(p, a, &p.k, task.next_batch, task.next_kv_head, task.next_low, task.next_n, p.head_dim)
    ask_for_keys(p, a, &p.v, task.next_batch, task.next_kv_head, task.next_low, task.next_n, p.head_dim_v)
    if task.next_n:
        ask_for_queries(p, a, &p.q, task.next_batch, task.next_kv_head, task.next_row, p.head_dim)
