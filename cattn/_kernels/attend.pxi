# The entry of attention from Python. cattn/attention.py has checked and normalised every argument: 4 axes (batch,
# heads, seq, dim) by strides, equal batch, window and lengths in range.

cdef enum:
    SERIAL_FLOPS = 1_000_000   # below about 10 us of work, waking a second thread costs more than it brings
    MIN_BLOCK = 6              # vectors of query rows: two panels, so that K and V are still used twice
    TASKS_PER_THREAD = 4       # fewer leave threads idle at the end


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
            t.stride[axis] = f32.strides[axis]
    elif kind == F64:
        f64 = array
        t.data = <char*> &f64[0, 0, 0, 0]
        for axis in range(4):
            t.stride[axis] = f64.strides[axis]
    elif kind == BOOL:
        flags = array
        t.data = <char*> &flags[0, 0, 0, 0]
        for axis in range(4):
            t.stride[axis] = flags.strides[axis]
    else:
        half = array
        t.data = <char*> &half[0, 0, 0, 0]
        for axis in range(4):
            t.stride[axis] = half.strides[axis]
    return 0


cdef void plan_blocks(Problem* p, Py_ssize_t num_threads) noexcept nogil:
    """Cuts the query rows of a key head into blocks: large, so that K and V are read seldom, but enough of them for
    all threads. Which block a row is in decides no bit of its result."""
    cdef Py_ssize_t vectors = (p.group_size * p.seq_len_q + LANES - 1) // LANES
    cdef Py_ssize_t size = MAX_ROWS // LANES
    while (num_threads > 1 and size // 2 >= MIN_BLOCK
           and p.batch * p.num_kv_heads * ((vectors + size - 1) // size) < TASKS_PER_THREAD * num_threads):
        size //= 2
    p.num_blocks = max(1, (vectors + size - 1) // size)
    p.block_vectors = (vectors + p.num_blocks - 1) // p.num_blocks


def attend(query, key, value, mask, out, real[::1] weights, real[::1] logsumexp, Kind q_kind, Kind kv_kind,
           Kind mask_kind, double scale, double softcap, Py_ssize_t window_left, Py_ssize_t window_right,
           Py_ssize_t q_offset, const int64_t[::1] q_offsets, const int64_t[::1] kv_lens, const real[:, ::1] slopes,
           const real[::1] sinks, double dropout_p, uint64_t seed, Py_ssize_t batch_offset, Py_ssize_t num_threads):
    """out, weights and logsumexp (OUT; flat, contiguous) of one attention problem; None: not given."""
    cdef Problem p
    cdef Workspace w
    cdef Py_ssize_t task, num_tasks, threads
    cdef size_t scratch_size
    cdef char* allocated
    cdef char* scratch
    describe(&p.q, query, q_kind)
    describe(&p.k, key, kv_kind)
    describe(&p.v, value, kv_kind)
    describe(&p.out, out, q_kind)
    p.mask.data = NULL
    if mask is not None:
        describe(&p.mask, mask, mask_kind)
    p.batch, p.num_kv_heads, p.seq_len_kv, p.head_dim = key.shape
    p.group_size = query.shape[1] // p.num_kv_heads
    p.seq_len_q = query.shape[2]
    p.head_dim_v = value.shape[3]
    p.weights = &weights[0] if weights is not None else NULL
    p.logsumexp = &logsumexp[0] if logsumexp is not None else NULL
    p.sinks = &sinks[0] if sinks is not None else NULL
    p.slopes = &slopes[0, 0] if slopes is not None else NULL
    p.slopes_stride = p.group_size * p.num_kv_heads if slopes is not None and slopes.shape[0] > 1 else 0
    p.q_offset = q_offset
    p.q_offsets = &q_offsets[0] if q_offsets is not None else NULL
    p.kv_lens = &kv_lens[0] if kv_lens is not None else NULL
    p.window_left, p.window_right = window_left, window_right
    p.scale = <real> (scale * LOG2_E)
    p.softcap = <real> (softcap * LOG2_E)
    p.dropout_threshold = <uint32_t> (dropout_p * 4294967296.0)
    p.keep_scale = <real> (1.0 / (1.0 - dropout_p))
    p.seed = seed
    p.batch_offset = batch_offset
    p.block_kv = keys_per_block(p.head_dim, p.head_dim_v)
    threads = num_threads
    if (2.0 * p.batch * p.num_kv_heads * p.group_size * p.seq_len_q * p.seq_len_kv * (p.head_dim + p.head_dim_v)
            < SERIAL_FLOPS):
        threads = 1
    plan_blocks(&p, threads)
    num_tasks = p.batch * p.num_kv_heads * p.num_blocks
    if p.seq_len_q == 0 or num_tasks == 0 or p.head_dim_v == 0:
        return
    threads = min(threads, num_tasks)
    scratch_size = carve(&w, NULL, &p)
    allocated = <char*> malloc(threads * scratch_size + 64)
    if allocated == NULL:
        raise MemoryError(f"attention: no memory for {threads} x {scratch_size} bytes of scratch")
    scratch = allocated + 64 - <uintptr_t> allocated % 64
    if threads == 1:
        with nogil:
            for task in range(num_tasks):
                attend_block(&p, task, scratch)
    else:
        with nogil, parallel(num_threads=threads):
            for task in prange(num_tasks, schedule="dynamic", chunksize=1):
                attend_block(&p, task, scratch + threadid() * scratch_size)
    free(allocated)
