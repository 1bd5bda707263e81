# The entry of attention from Python. cattn/_attention.py has checked and normalised every argument: 4 axes (batch,
# heads, seq, dim) by strides, equal batch, window and lengths in range.
#
#     plan: which kernel, how large the blocks of rows, how long the splits of the keys
#     scratch for each thread: the only large allocation
#     without the GIL:
#         many tasks      for each task, by whichever thread is free: its splits in order, merged; finish
#         few tasks       for each split of each task, by whichever thread is free; merged in order; finish
#
# Threads take tasks one by one (tasks.pxi): where a neighbour takes a core away, a static share of one head of 2048
# rows took 4.9 ms instead of 3.4.

# In C variables: as names they were looked up eight times in a tiny call, 8 % of it.
cdef object REAL = dtype("float64" if IS_DOUBLE else "float32")
cdef object NDARRAY = ndarray
cdef object EMPTY = empty

cdef enum:
    EXP_FLOPS = 64             # an exp2 and its bookkeeping, a score
    MIN_BLOCK = 6              # vectors of query rows: two or three panels, so that K and V are still used twice
    TASKS_PER_THREAD = 4       # fewer leave threads idle at the end
    SLOTS_PER_THREAD = 2       # parts that may wait to be merged: one of each thread, and as many where one is late
    DECODE_SPLIT = 1024        # keys: 512 to 4096 measured within 4 %
    PREFILL_SPLIT = 4096       # keys: a merge is one more pass over acc


cdef int describe(Tensor* t, array, Kind kind) except -1:
    """t (OUT) = where the array's numbers are. The caller's reference keeps them there: numpy resizes no array that
    is referenced. 16-bit floats arrive as uint16, bools as uint8, since buffers have no name for them."""
    cdef const float[:, :, :, :] f32
    cdef const double[:, :, :, :] f64
    cdef const uint16_t[:, :, :, :] half
    cdef const uint8_t[:, :, :, :] flags
    cdef int axis
    t.kind = kind
    if kind == F32:
        f32 = array
        t.data = <char*> &f32[0, 0, 0, 0]
        for axis in range(4):
            t.length[axis], t.stride[axis] = f32.shape[axis], f32.strides[axis]
    elif kind == F64:
        f64 = array
        t.data = <char*> &f64[0, 0, 0, 0]
        for axis in range(4):
            t.length[axis], t.stride[axis] = f64.shape[axis], f64.strides[axis]
    elif kind == BOOL:
        flags = array
        t.data = <char*> &flags[0, 0, 0, 0]
        for axis in range(4):
            t.length[axis], t.stride[axis] = flags.shape[axis], flags.strides[axis]
    else:
        half = array
        t.data = <char*> &half[0, 0, 0, 0]
        for axis in range(4):
            t.length[axis], t.stride[axis] = half.shape[axis], half.strides[axis]
    return 0


cdef int describe_new(Tensor* t, array, const Py_ssize_t* length) except -1:
    """describe() of a new contiguous array of `real`, by its bytes alone: takes 8 % of a tiny call less."""
    cdef Py_buffer view
    cdef int axis = 4
    cdef Py_ssize_t stride = sizeof(real)
    PyObject_GetBuffer(array, &view, PyBUF_WRITABLE)
    t.kind, t.data = real_kind(), <char*> view.buf
    PyBuffer_Release(&view)
    while axis:
        axis -= 1
        t.length[axis], t.stride[axis] = length[axis], stride
        stride *= length[axis]
    return 0


cdef int describe_inputs(Problem* p, query, key, value, Kind q_kind, Kind kv_kind) except -1:
    """q, k, v and the sizes of p (OUT)."""
    describe(&p.q, query, q_kind)
    describe(&p.k, key, kv_kind)
    describe(&p.v, value, kv_kind)
    p.batch, p.seq_len_q, p.head_dim = p.q.length[0], p.q.length[2], p.q.length[3]
    p.num_kv_heads, p.seq_len_kv, p.head_dim_v = p.k.length[1], p.k.length[2], p.v.length[3]
    p.group_size = p.q.length[1] // max(1, p.num_kv_heads)
    return 0


cdef void plan(Problem* p, Py_ssize_t num_threads) noexcept nogil:
    """Which kernel, and how the work is cut. What decides bits (decode_width, block_kv, split_kv) follows from the
    shape of one batch row alone. The query rows of a key head are cut into blocks: large, so that K and V are read
    seldom, but enough of them for all threads; which block a row is in decides no bit of its result."""
    cdef Py_ssize_t rows = p.group_size * p.seq_len_q
    cdef Py_ssize_t vectors = (rows + LANES - 1) // LANES
    cdef Py_ssize_t size = MAX_ROWS // LANES, wide, fewer_blocks     # size, wide: vectors in a block
    cdef Py_ssize_t widest = max(p.head_dim, p.head_dim_v)
    p.decode_width = 0
    p.may_mask = p.mask.data != NULL or p.window_left >= 0 or p.window_right >= 0 or p.kv_lens != NULL
    if rows <= min(MAX_DECODE_ROWS, LANES):
        p.decode_width = 1 if rows == 1 else 2 if rows == 2 else 4 if rows <= 4 else 8
        p.q_stride = (p.head_dim + LANES - 1) // LANES * LANES
        p.v_stride = (p.head_dim_v + LANES - 1) // LANES * LANES
        p.block_kv, p.split_kv = DECODE_KEYS, DECODE_SPLIT
        p.num_blocks, p.block_rows = 1, p.decode_width
        # Both in place or both copied, since one loop reads one kind of rows.
        p.k_in_place = decode_reads_in_place(&p.k, p.head_dim) and decode_reads_in_place(&p.v, p.head_dim_v)
        p.v_in_place = p.k_in_place and (rows_are_real(&p.v) or not p.may_mask)  # values behind masks are looked at
    else:
        p.q_stride, p.v_stride = p.head_dim, p.head_dim_v
        # Halve the blocks until every thread has a few. Smaller blocks read K and V more often, from L2 or L3.
        p.block_kv, p.split_kv = keys_per_block(p.head_dim, p.head_dim_v), PREFILL_SPLIT
        if size * LANES * widest > MAX_BLOCK:
            size = max(1, MAX_BLOCK // (LANES * widest) // PANEL_VECTORS) * PANEL_VECTORS
        while (num_threads > 1 and size // 2 >= MIN_BLOCK
               and p.batch * p.num_kv_heads * ((vectors + size - 1) // size) < TASKS_PER_THREAD * num_threads):
            size //= 2
        p.num_blocks = (vectors + size - 1) // size
        # Where threads have tasks enough, a third more than a block is one block still, and several are whole panels:
        # 197 rows take 5 % longer in two blocks.
        fewer_blocks = max(1, (vectors + size * 2 // 3) // size)
        wide = (vectors + fewer_blocks - 1) // fewer_blocks
        if wide < vectors:
            wide = (wide + PANEL_VECTORS - 1) // PANEL_VECTORS * PANEL_VECTORS
        size = (vectors + p.num_blocks - 1) // p.num_blocks
        if (num_threads == 1 or p.batch * p.num_kv_heads * ((vectors + wide - 1) // wide)
                >= TASKS_PER_THREAD * num_threads):
            size = wide
        p.num_blocks = (vectors + size - 1) // size
        p.block_rows = size * LANES
        p.k_in_place = rows_are_real(&p.k)
        p.v_in_place = prefill_reads_in_place(&p.v, p.head_dim_v, p.block_rows)
    p.num_splits = (p.seq_len_kv + p.split_kv - 1) // p.split_kv


# The workspace is laid out anew for each task: a dozen additions, against a structure to keep.
cdef void locate(const Problem* p, Workspace* w, Task* task, char* scratch, Py_ssize_t number) noexcept nogil:
    """w, but for its queries, and task (OUT)."""
    cdef Py_ssize_t i
    carve(w, scratch, p)
    describe_task(p, number, task, w.lanes)
    for i in range(max(p.block_rows, LANES)):
        w.shrink[i] = 1.0
    w.again = False


cdef void pack(const Problem* p, const Workspace* w, const Task* task) noexcept nogil:
    if p.decode_width:
        decode_pack(p, w, task)
    else:
        prefill_pack(p, w, task)


cdef void do_split(const Problem* p, const Workspace* w, const Task* task, State* state,
                   Py_ssize_t split) noexcept nogil:
    """state (OUT): the softmax over the keys of one split."""
    cdef Py_ssize_t low = max(task.low, split * p.split_kv)
    cdef Py_ssize_t high = min(task.high, (split + 1) * p.split_kv)
    reset(p, state)
    if p.decode_width:
        decode_keys(p, w, task, state, low, high)
    else:
        prefill_keys(p, w, task, state, low, high)


cdef inline Py_ssize_t first_split(const Problem* p, const Task* task) noexcept nogil:
    """Of those whose keys the task sees."""
    return task.low // p.split_kv


cdef inline Py_ssize_t num_splits(const Problem* p, const Task* task) noexcept nogil:
    """Of these. One where it sees no key: something has to write its rows of 0."""
    return max(1, (task.high + p.split_kv - 1) // p.split_kv - first_split(p, task))


cdef void merge(const Problem* p, const Task* task, State* total, State* lost, const State* part) noexcept nogil:
    if p.decode_width:
        decode_merge(p, total, lost, part)
    else:
        prefill_merge(p, task, total, lost, part)


cdef bint finish(const Problem* p, const Workspace* w, const Task* task, const State* state) noexcept nogil:
    return decode_finish(p, w, task, state) if p.decode_width else prefill_finish(p, w, task, state)


cdef bint do_splits(const Problem* p, Workspace* w, const Task* task) noexcept nogil:
    """The splits of a task one after the other. True: to be done again."""
    cdef Py_ssize_t first = first_split(p, task), split
    if p.weights != NULL:
        clear_weights(p, w, task)
    do_split(p, w, task, &w.total, first)
    for split in range(first + 1, first + num_splits(p, task)):
        if stopped(p.call):
            return False
        if split == first + 1:
            reset(p, &w.lost)
        do_split(p, w, task, &w.part, split)
        merge(p, task, &w.total, &w.lost, &w.part)
    if num_splits(p, task) > 1:
        add_lost(p, &w.total, &w.lost)
    return finish(p, w, task, &w.total)


cdef void do_task(const Problem* p, Py_ssize_t number, char* scratch) noexcept nogil:
    cdef Workspace w
    cdef Task task
    locate(p, &w, &task, scratch, number)
    pack(p, &w, &task)
    # Twice for the rare block with a row whose values overflow: see store_result.
    if do_splits(p, &w, &task):
        w.again = True
        do_splits(p, &w, &task)


# Where there are too few tasks, a part is one split of a task. Parts are numbered in the order in which they are
# merged: the tasks one after the other, their splits likewise. Threads take them in that order, each leaves its state
# in one of a few slots, and whoever finds the next one in line there merges it, by the same steps as do_splits. A
# thread that is a whole round of slots ahead waits: scratch does not grow with the number of keys.

cdef struct Parts:
    Py_ssize_t* first       # [num_tasks + 1]: a task's first part
    char* states            # [slots]: part i leaves its state in slot i % slots
    Py_ssize_t* left        # [slots] atomic: i + 1 when part i has
    Py_ssize_t slots
    State total, lost       # of the task that is being merged
    Py_ssize_t task         # its number
    Py_ssize_t merged       # atomic: how many parts are
    Py_ssize_t requests     # atomic: threads that have asked for a merge; above 0, one is at it


cdef void merge_part(const Problem* p, Parts* parts, Py_ssize_t part, char* scratch) noexcept nogil:
    """The next in line; after the last of a task, the rest of the task."""
    cdef Workspace w
    cdef Task task
    cdef State state
    cdef bint is_first, is_last
    if part == parts.first[parts.task + 1]:
        parts.task += 1
    is_first, is_last = part == parts.first[parts.task], part + 1 == parts.first[parts.task + 1]
    locate(p, &w, &task, scratch, parts.task)
    place_state(&state, parts.states + part % parts.slots * state_size(p), p)
    if is_first:
        memcpy(parts.total.acc, state.acc, state_size(p))
        reset(p, &parts.lost)
    else:
        merge(p, &task, &parts.total, &parts.lost, &state)
    if not is_last:
        return
    if not is_first:
        add_lost(p, &parts.total, &parts.lost)
    if finish(p, &w, &task, &parts.total):
        pack(p, &w, &task)
        w.again = True
        do_splits(p, &w, &task)


cdef void merge_parts(const Problem* p, Parts* parts, char* scratch) noexcept nogil:
    """All that are next in line, unless another thread is at it: that one then looks again."""
    cdef Py_ssize_t requests = 1, part
    if atomic_add(&parts.requests, 1):
        return
    while requests:
        part = atomic_read(&parts.merged)
        while atomic_read(&parts.left[part % parts.slots]) == part + 1 and not stopped(p.call):
            merge_part(p, parts, part, scratch)
            part += 1
            atomic_set(&parts.merged, part)
            task_done(p.call)
        requests = atomic_add(&parts.requests, -requests) - requests  # that came meanwhile


cdef void do_part(const Problem* p, Parts* parts, Py_ssize_t number, char* scratch) noexcept nogil:
    """One split of a task, its state left in a slot."""
    cdef Workspace w
    cdef Task task
    cdef State state
    cdef Py_ssize_t of_task = 0
    while number - atomic_read(&parts.merged) >= parts.slots:
        if stopped(p.call):
            return
        sched_yield()
    while number >= parts.first[of_task + 1]:
        of_task += 1
    locate(p, &w, &task, scratch, of_task)
    pack(p, &w, &task)
    place_state(&state, parts.states + number % parts.slots * state_size(p), p)
    do_split(p, &w, &task, &state, first_split(p, &task) + number - parts.first[of_task])
    atomic_set(&parts.left[number % parts.slots], number + 1)
    merge_parts(p, parts, scratch)


cdef void do_tasks(const void* what, char* scratch) noexcept nogil:
    """What one thread does of a Problem."""
    cdef const Problem* p = <const Problem*> what
    cdef Py_ssize_t number = take_task(p.call)
    cdef fp_mode before = own_mode()
    while number < p.call.num_tasks and not stopped(p.call):
        if p.parts == NULL:
            do_task(p, number, scratch)
            task_done(p.call)
        else:
            do_part(p, p.parts, number, scratch)
        number = take_task(p.call)
    set_mode(before)
    await_others(p.call)


cdef Py_ssize_t count_parts(const Problem* p, Parts* parts, Py_ssize_t num_tasks, char* scratch) noexcept nogil:
    """parts.first (OUT); returns the number of parts: of the keys that are seen."""
    cdef Workspace w
    cdef Task task
    cdef Py_ssize_t number
    carve(&w, scratch, p)
    parts.first[0] = 0
    for number in range(num_tasks):
        describe_task(p, number, &task, w.lanes)
        parts.first[number + 1] = parts.first[number] + num_splits(p, &task)
    return parts.first[num_tasks]


cdef int run(Problem* p, Py_ssize_t num_threads) except -1:
    """Plans a described problem and does it."""
    cdef Workspace w
    cdef Call call
    cdef Parts parts
    cdef Py_ssize_t num_tasks, threads, slot
    cdef size_t scratch_size, shared_size = 0
    cdef char* scratch
    if p.batch * p.num_kv_heads * p.group_size * p.seq_len_q == 0:
        return 0
    # Half the flops where causal, unknown here: what they decide is no precise thing.
    begin_call(&call, num_threads, <double> p.batch * p.num_kv_heads * p.group_size * p.seq_len_q * p.seq_len_kv
               * (2 * (p.head_dim + p.head_dim_v) + EXP_FLOPS))
    threads = call.num_threads
    p.parts = NULL
    plan(p, threads)
    call.num_tasks = num_tasks = p.batch * p.num_kv_heads * p.num_blocks
    if threads > 1 and num_tasks < TASKS_PER_THREAD * threads and p.num_splits > 1 and p.weights == NULL:
        p.parts = &parts
        parts.slots = SLOTS_PER_THREAD * threads
        shared_size = (parts.slots + 2) * state_size(p) + (parts.slots + num_tasks + 1) * sizeof(Py_ssize_t)
    else:
        threads = min(threads, num_tasks)
    scratch_size = carve(&w, NULL, p)
    # 64-byte pieces from its start on: no vector of packed queries, scores or acc crosses a cache line.
    scratch = take_scratch(threads * scratch_size + shared_size)
    if scratch == NULL:
        end_call(&call)
        raise MemoryError(f"attention: no memory for {threads} x {scratch_size} bytes of scratch")
    if p.parts != NULL:
        parts.states = scratch + threads * scratch_size
        place_state(&parts.total, parts.states + parts.slots * state_size(p), p)
        place_state(&parts.lost, parts.states + (parts.slots + 1) * state_size(p), p)
        parts.left = <Py_ssize_t*> (parts.states + (parts.slots + 2) * state_size(p))
        for slot in range(parts.slots):
            parts.left[slot] = 0
        parts.first = parts.left + parts.slots
        parts.task = parts.merged = parts.requests = 0
        call.num_tasks = count_parts(p, &parts, num_tasks, scratch)
        threads = min(threads, call.num_tasks)
    call.unfinished = call.num_tasks
    call.num_threads = threads
    p.call = &call
    with nogil:
        in_threads(&call, do_tasks, p, scratch, scratch_size)
    give_scratch(scratch)
    end_call(&call)


def attend(query, key, value, mask, out, real[::1] weights, uint16_t[::1] narrow_weights, real[::1] logsumexp,
           Kind q_kind, Kind kv_kind, Kind mask_kind, scale, double softcap, Py_ssize_t window_left,
           Py_ssize_t window_right, Py_ssize_t q_offset, const int64_t[::1] q_offsets, const int64_t[::1] kv_lens,
           const real[:, ::1] slopes, const real[::1] sinks, double dropout_p, uint64_t seed, Py_ssize_t batch_offset,
           Py_ssize_t num_threads):
    """out, weights, these again in 16 bits, and logsumexp (OUT; flat, contiguous) of one attention problem; None: not
    given."""
    cdef Problem p
    describe_inputs(&p, query, key, value, q_kind, kv_kind)
    describe(&p.out, out, q_kind)
    p.mask.data = NULL
    if mask is not None:
        describe(&p.mask, mask, mask_kind)
    p.weights = &weights[0] if weights is not None else NULL
    p.narrow_weights = &narrow_weights[0] if narrow_weights is not None else NULL
    p.logsumexp = &logsumexp[0] if logsumexp is not None else NULL
    p.sinks = &sinks[0] if sinks is not None else NULL
    p.slopes = &slopes[0, 0] if slopes is not None else NULL
    p.slopes_stride = p.group_size * p.num_kv_heads if slopes is not None and slopes.shape[0] > 1 else 0
    p.q_offset = q_offset
    p.q_offsets = &q_offsets[0] if q_offsets is not None else NULL
    p.kv_lens = &kv_lens[0] if kv_lens is not None else NULL
    p.window_left, p.window_right = window_left, window_right
    p.softcap = <real> softcap
    choose_units(&p, scale)
    p.dropout = dropout_p > 0
    p.dropout_threshold = <uint32_t> (dropout_p * 4294967296.0)
    p.keep_scale = <real> (1.0 / (1.0 - dropout_p))
    p.seed = seed
    p.batch_offset = batch_offset
    run(&p, num_threads)


cdef bint is_plain(const Problem* p) noexcept:
    """True when the shapes fit together, no axis is empty, and no size is where it may be out of the door's ranges."""
    cdef const Py_ssize_t* q = p.q.length
    cdef const Py_ssize_t* k = p.k.length
    cdef const Py_ssize_t* v = p.v.length
    return (q[0] == k[0] == v[0] and k[1] == v[1] and k[2] == v[2] and q[3] == k[3]
            and q[1] == p.group_size * k[1] and max(q[3], v[3]) < 1 << 30
            # As doubles, since the product of lengths in numbers of 64 bits may overflow.
            and 0 < <double> q[0] * q[1] * q[2] * q[3] * k[2] * v[3] < 1e15)


cdef bint lies_apart(const Problem* p) noexcept:
    """True when `out` is laid out as a contiguous array with gaps, or one whose heads and rows are swapped, and shares
    no range of addresses with an input. Then no two elements share memory."""
    cdef const Tensor* out = &p.out
    cdef const Tensor* inputs[3]
    cdef char* start
    cdef char* end
    cdef int inner = 2 if out.stride[2] <= out.stride[1] else 1
    cdef int outer = 3 - inner, axis, i
    inputs[0], inputs[1], inputs[2] = &p.q, &p.k, &p.v
    if not (out.stride[3] == sizeof(real) and out.stride[inner] >= out.length[3] * out.stride[3]
            and out.stride[outer] >= out.length[inner] * out.stride[inner]
            and out.stride[0] >= out.length[outer] * out.stride[outer]):
        return False
    for i in range(3):
        start, end = inputs[i].data, inputs[i].data + sizeof(real)
        for axis in range(4):
            start += min(0, inputs[i].stride[axis] * (inputs[i].length[axis] - 1))
            end += max(0, inputs[i].stride[axis] * (inputs[i].length[axis] - 1))
        if start < out.data + out.length[0] * out.stride[0] and out.data < end:
            return False
    return True


cdef bint has_lengths(const Tensor* t, const Py_ssize_t* length) noexcept:
    return (t.length[0] == length[0] and t.length[1] == length[1] and t.length[2] == length[2]
            and t.length[3] == length[3])


def attend_plain(query, key, value, out, bint is_causal, scale, q_offset, Py_ssize_t num_threads):
    """The short way of the plain call: arrays of this module's `real`, 4 axes, equal batches, no option but these.
    Returns `out` (OUT), a new array where it is None; returns None, with nothing written, for anything else: the door
    then finds out what it is."""
    cdef Problem p
    cdef Py_ssize_t length[4]
    if (type(query) is not NDARRAY or type(key) is not NDARRAY or type(value) is not NDARRAY
            or query.dtype is not REAL or key.dtype is not REAL or value.dtype is not REAL):
        return None
    memset(&p, 0, sizeof(p))
    try:
        describe_inputs(&p, query, key, value, real_kind(), real_kind())
        if out is not None:
            if type(out) is not NDARRAY or out.dtype is not REAL or not out.flags.writeable:
                return None
            describe(&p.out, out, real_kind())
    except ValueError:  # another number of axes
        return None
    if not is_plain(&p) or (q_offset is None and is_causal and p.seq_len_q < p.seq_len_kv):  # of which the door warns
        return None
    if scale is not None and not (type(scale) is float and 1e-30 < scale < 1e30):
        return None
    choose_units(&p, scale)
    length[:] = [p.batch, p.q.length[1], p.seq_len_q, p.head_dim_v]
    if out is None:
        out = EMPTY((length[0], length[1], length[2], length[3]), REAL)
        describe_new(&p.out, out, length)
    elif not has_lengths(&p.out, length) or not lies_apart(&p):
        return None
    p.window_left, p.window_right = -1, 0 if is_causal else -1
    p.q_offset = 0 if q_offset is None else q_offset
    p.keep_scale = 1.0
    run(&p, num_threads)
    return out
