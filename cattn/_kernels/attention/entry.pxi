# The entries of attention from Python. cattn/_attention.py has checked and normalised every argument: 4 axes (batch,
# heads, seq, dim) by strides, equal batch, window and lengths in range.

# In C variables: as names they were looked up eight times in a tiny call, 8 % of it.
cdef object REAL = dtype("float64" if IS_DOUBLE else "float32")
cdef object NDARRAY = ndarray
cdef object EMPTY = empty


cdef int describe_inputs(Problem* p, query, key, value, Kind q_kind, Kind kv_kind) except -1:
    """q, k, v and the sizes of p (OUT)."""
    describe(&p.q, query, q_kind)
    describe(&p.k, key, kv_kind)
    describe(&p.v, value, kv_kind)
    p.batch_size, p.seq_len_q, p.head_dim = p.q.length[0], p.q.length[2], p.q.length[3]
    p.num_kv_heads, p.seq_len_kv, p.head_dim_v = p.k.length[1], p.k.length[2], p.v.length[3]
    p.group_size = p.q.length[1] // max(1, p.num_kv_heads)
    return 0


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
    length[:] = [p.batch_size, p.q.length[1], p.seq_len_q, p.head_dim_v]
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
