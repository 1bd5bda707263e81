# The entries of attention from Python. `attend` takes what cattn/_attention.py has checked and normalised: 4 axes
# (batch, heads, seq, dim) by strides, equal batch, window and lengths in range. `attend_short` checks by itself, in C:
# small calls take less time than their checks in Python would.

# In C variables: as names they were looked up eight times in a tiny call, 8 % of it.
cdef object REAL = dtype("float64" if IS_DOUBLE else "float32")
cdef object INT64 = dtype("int64")
cdef object INT32 = dtype("int32")
cdef object NDARRAY = ndarray
cdef object EMPTY = empty
cdef object ZEROS = zeros

cdef enum:
    FEW_BATCH_ROWS = 64  # whose lengths fit a small array; the checks in Python are nothing beside more rows
    # Offsets and windows beyond any key, FAR in cattn/_checks.py: sums of three of them still fit an int64.
    FAR_LOG2 = 60
    PAGE_UNIT = 64      # bytes: pages of a cache are multiples of it apart, of which rows in place make use


cdef int describe_inputs(Problem* p, query, key, value, Kind q_kind, Kind kv_kind) except -1:
    """q, k, v and the sizes of p (OUT); the axes of all three together, 12 at most."""
    cdef int num_axes = (
        describe(&p.q, query, q_kind) + describe(&p.k, key, kv_kind) + describe(&p.v, value, kv_kind))
    p.batch_size, p.seq_len_q, p.head_dim = p.q.length[0], p.q.length[2], p.q.length[3]
    p.num_kv_heads, p.seq_len_kv, p.head_dim_v = p.k.length[1], p.k.length[2], p.v.length[3]
    p.group_size = p.q.length[1] // max(1, p.num_kv_heads)
    p.folded = 1
    if p.k.stride[0] == p.v.stride[0] == 0 and p.batch_size > 0:
        p.folded = p.batch_size
    return num_axes


cdef void pack_rows(Tensor* t, const int64_t* firsts):
    """The one batch row of t (IN/OUT) becomes several. numpy tells any stride of an axis of length 1."""
    t.firsts, t.stride[0] = firsts, 0


cdef void pack_like(Tensor* t, const Tensor* other):
    if other.firsts != NULL:
        pack_rows(t, other.firsts)


cdef void describe_packed(Problem* p, const int64_t* cu_seqlens_q):
    """p (IN/OUT): where the queries of batch_size batch rows begin, and the longest of them."""
    cdef Py_ssize_t batch
    p.cu_seqlens_q = cu_seqlens_q
    pack_rows(&p.q, p.cu_seqlens_q)
    pack_rows(&p.out, p.cu_seqlens_q)
    p.seq_len_q = p.seq_len_kv = 0
    for batch in range(p.batch_size):
        p.seq_len_q = max(p.seq_len_q, num_queries(p, batch))
        p.seq_len_kv = max(p.seq_len_kv, num_keys(p, batch))


cdef void describe_logsumexp(const Problem* p, Tensor* t, const real* logsumexp):
    """t (OUT), contiguous: (batch, num_heads, seq_len_q), or packed (total, num_heads)."""
    cdef Py_ssize_t num_heads = p.num_kv_heads * p.group_size
    t.data, t.firsts, t.kind = <char*> logsumexp, p.q.firsts, real_kind()
    if t.firsts == NULL:
        t.stride[2], t.stride[1] = sizeof(real), p.seq_len_q * sizeof(real)
        t.stride[0] = num_heads * t.stride[1]
    else:
        t.stride[2], t.stride[1], t.stride[0] = num_heads * sizeof(real), sizeof(real), 0


cdef void describe_options(Problem* p, scale, double softcap, Py_ssize_t window_left, Py_ssize_t window_right,
                           const real[:, ::1] slopes, const real[::1] sinks):
    """p (OUT): what all kinds of attention take; its mask is described."""
    if sinks is not None:
        p.sinks = &sinks[0]
    if slopes is not None:
        p.slopes = &slopes[0, 0]
        p.slopes_stride = slopes.shape[1] if slopes.shape[0] > 1 else 0
    p.window_left, p.window_right = window_left, window_right
    p.softcap = <real> softcap
    choose_units(p, scale)


cdef int describe_problem(Problem* p, query, key, value, out, mask, Kind q_kind, Kind kv_kind, Kind mask_kind,
                          Py_ssize_t q_offset, const int64_t[::1] q_offsets, const int64_t[::1] kv_lens,
                          const int64_t[::1] kv_starts, const int64_t[::1] cu_seqlens_q,
                          const int64_t[::1] cu_seqlens_kv, double dropout_p, uint64_t seed,
                          Py_ssize_t batch_offset) except -1:
    """p (OUT), as attend has it, but for its options and what else it writes."""
    memset(p, 0, sizeof(Problem))
    describe_inputs(p, query, key, value, q_kind, kv_kind)
    describe(&p.out, out, q_kind)
    if mask is not None:
        describe(&p.mask, mask, mask_kind)
    p.q_offset = q_offset
    if q_offsets is not None:
        p.q_offsets = &q_offsets[0]
    if kv_lens is not None:
        p.kv_lens = &kv_lens[0]
    if kv_starts is not None:
        p.kv_starts = &kv_starts[0]
    if cu_seqlens_q is not None:
        p.batch_size, p.folded = cu_seqlens_q.shape[0] - 1, 1
        describe_packed(p, &cu_seqlens_q[0])
    if cu_seqlens_kv is not None:
        p.folded = 1
        pack_rows(&p.k, &cu_seqlens_kv[0])
        pack_rows(&p.v, &cu_seqlens_kv[0])
    p.dropout = dropout_p > 0
    p.dropout_threshold = <uint32_t> (dropout_p * 4294967296.0)
    p.keep_scale = <real> (1.0 / (1.0 - dropout_p))
    p.seed = seed
    p.batch_offset = batch_offset
    return 0


def attend(*, query, key, value, mask, out, real[::1] weights, uint16_t[::1] narrow_weights, real[::1] logsumexp,
           Kind q_kind, Kind kv_kind, Kind mask_kind, scale, double softcap, Py_ssize_t window_left,
           Py_ssize_t window_right, Py_ssize_t q_offset, const int64_t[::1] q_offsets, const int64_t[::1] kv_lens,
           const real[:, ::1] slopes, const real[::1] sinks, double dropout_p, uint64_t seed, Py_ssize_t batch_offset,
           Py_ssize_t num_threads, const int64_t[::1] kv_starts=None, const int64_t[::1] cu_seqlens_q=None,
           const int64_t[::1] cu_seqlens_kv=None, const int64_t[:, ::1] block_table=None, key_scales=None,
           value_scales=None, Py_ssize_t head_offset=0, Py_ssize_t query_offset=0, Py_ssize_t key_offset=0):
    """out, weights, these again in 16 bits, and logsumexp (OUT; flat, contiguous) of one attention problem; None: not
    given. With cu_seqlens_q, queries, out and logsumexp are packed, (1, heads, total, dim), and so with cu_seqlens_kv
    keys and values; with block_table, these are (pages, heads, page_size, dim). Both come with kv_lens.
    Those of 8 bits have float32 scales, (pages, heads, page_size, 1). The offsets are those of Problem."""
    cdef Problem p
    describe_problem(&p, query, key, value, out, mask, q_kind, kv_kind, mask_kind, q_offset, q_offsets, kv_lens,
                     kv_starts, cu_seqlens_q, cu_seqlens_kv, dropout_p, seed, batch_offset)
    p.head_offset, p.query_offset, p.key_offset = head_offset, query_offset, key_offset
    if key_scales is not None:
        describe(&p.k_scales, key_scales, F32)
        describe(&p.v_scales, value_scales, F32)
    if weights is not None:
        p.weights = &weights[0]
    if narrow_weights is not None:
        p.narrow_weights = &narrow_weights[0]
    if block_table is not None:
        p.block_table, p.table_stride, p.page_size = &block_table[0, 0], block_table.shape[1], p.k.length[2]
        p.folded = 1
    if logsumexp is not None:
        describe_logsumexp(&p, &p.logsumexp, &logsumexp[0])
    describe_options(&p, scale, softcap, window_left, window_right, slopes, sinks)
    run(&p, num_threads)


def attend_backward(*, grad_out, query, key, value, out, mask, const real[::1] logsumexp,
                    const real[::1] grad_logsumexp, grad_query, grad_key, grad_value, grad_mask, bint wide,
                    bint slopes_wanted, bint sinks_wanted, Kind q_kind, Kind kv_kind, Kind mask_kind, scale,
                    double softcap, Py_ssize_t window_left, Py_ssize_t window_right, Py_ssize_t q_offset,
                    const int64_t[::1] q_offsets, const int64_t[::1] kv_lens, const real[:, ::1] slopes,
                    const real[::1] sinks, double dropout_p, uint64_t seed, Py_ssize_t batch_offset,
                    Py_ssize_t num_threads, const int64_t[::1] kv_starts=None,
                    const int64_t[::1] cu_seqlens_q=None, const int64_t[::1] cu_seqlens_kv=None):
    """The gradients (OUT; None: not wanted) of what attend has computed with these arguments: grad_query of reals,
    grad_key and grad_value of kv_kind, or (wide) of reals, grad_mask of reals or of doubles, 0 before, with a stride of
    0 where it is broadcast.
    Returns those of slopes and sinks, (splits, batch, num_heads), of which the sums over the first axis are meant."""
    cdef Backward b
    memset(&b, 0, sizeof(b))
    describe_problem(&b.p, query, key, value, out, mask, q_kind, kv_kind, mask_kind, q_offset, q_offsets, kv_lens,
                     kv_starts, cu_seqlens_q, cu_seqlens_kv, dropout_p, seed, batch_offset)
    b.p.folded = 1      # each batch row has gradients of its own, which whoever has broadcast it adds up
    describe_logsumexp(&b.p, &b.p.logsumexp, &logsumexp[0])
    if grad_logsumexp is not None:
        describe_logsumexp(&b.p, &b.d_logsumexp, &grad_logsumexp[0])
    describe_options(&b.p, scale, softcap, window_left, window_right, slopes, sinks)
    describe(&b.d_out, grad_out, q_kind)
    pack_like(&b.d_out, &b.p.out)
    if grad_query is not None:
        describe(&b.dq, grad_query, real_kind())
        pack_like(&b.dq, &b.p.q)
    if grad_key is not None:
        describe(&b.dk, grad_key, real_kind() if wide else kv_kind)
        pack_like(&b.dk, &b.p.k)
    if grad_value is not None:
        describe(&b.dv, grad_value, real_kind() if wide else kv_kind)
        pack_like(&b.dv, &b.p.v)
    if grad_mask is not None:
        describe(&b.d_mask, grad_mask, F64 if grad_mask.itemsize == sizeof(double) else F32)
    plan_backward(&b)
    shape = (b.p.num_splits, b.p.batch_size, b.p.num_kv_heads * b.p.group_size)
    of_slopes, of_sinks = ZEROS(shape if slopes_wanted else 0), ZEROS(shape if sinks_wanted else 0)
    if slopes_wanted:
        b.d_slopes = <double*> data_of(of_slopes)
    if sinks_wanted:
        b.d_sinks = <double*> data_of(of_sinks)
    run_backward(&b, num_threads)
    return of_slopes, of_sinks


cdef void swap_heads(Tensor* t):
    """(1, total, heads, dim) becomes (1, heads, total, dim)."""
    t.length[1], t.length[2] = t.length[2], t.length[1]
    t.stride[1], t.stride[2] = t.stride[2], t.stride[1]


cdef void store_rows(const Tensor* rows, const Tensor* pages, const int64_t* places) noexcept nogil:
    """pages (OUT): row i of (1, heads, total, dim), rounded, at places[i] bytes from where each head's first row is."""
    cdef Py_ssize_t i, head, d, n, dim = rows.length[3]
    cdef real numbers[256]
    for i in range(rows.length[2]):
        for head in range(rows.length[1]):
            for d in range(ceil_div(dim, 256)):
                n = min(<Py_ssize_t> 256, dim - d * 256)
                load_row(numbers, row_of(rows, 0, head, i) + d * 256 * rows.stride[3], rows.stride[3], n, rows.kind)
                store_row(row_of(pages, 0, head, 0) + places[i] + d * 256 * pages.stride[3], pages.stride[3], numbers,
                          n, pages.kind)


cdef void store_quantized(const Tensor* rows, const Tensor* pages, const Tensor* scales, const int64_t* places,
                          const int64_t* scale_places) noexcept nogil:
    """As store_rows, into 8 bits: a row's scale (OUT), a float, is its largest magnitude / 127; its numbers are rounded
    to nearest even, or 0 where that is 0, infinite or NaN."""
    cdef Py_ssize_t i, head, d, j, n, dim = rows.length[3]
    cdef const char* row
    cdef int8_t* target
    cdef real numbers[256]
    cdef float largest, scale
    for i in range(rows.length[2]):
        for head in range(rows.length[1]):
            row = row_of(rows, 0, head, i)
            largest = 0
            for d in range(ceil_div(dim, 256)):
                n = min(<Py_ssize_t> 256, dim - d * 256)
                load_row(numbers, row + d * 256 * rows.stride[3], rows.stride[3], n, rows.kind)
                for j in range(n):
                    if largest == largest and not fabs(numbers[j]) <= largest:
                        largest = <float> fabs(numbers[j])
            scale = largest / <float> 127
            memcpy(row_of(scales, 0, head, 0) + scale_places[i], &scale, sizeof(float))
            target = <int8_t*> (row_of(pages, 0, head, 0) + places[i])
            if not 0 < scale < INFINITY:
                memset(target, 0, dim)
                continue
            for d in range(ceil_div(dim, 256)):
                n = min(<Py_ssize_t> 256, dim - d * 256)
                if d or dim > 256:
                    load_row(numbers, row + d * 256 * rows.stride[3], rows.stride[3], n, rows.kind)
                for j in range(n):
                    # More than 127 only by the rounding of a subnormal scale.
                    target[d * 256 + j] = <int8_t> max(<real> -127, min(<real> 127, rint(numbers[j] / scale)))


cdef enum:
    STEP_HEADER = 3


cdef void describe_pages(Problem* p, tuple pages, Kind kind):
    """p (OUT): keys, values, and of 8 bits the scales of both, as attend_step has them."""
    describe(&p.k, pages[0], kind)
    describe(&p.v, pages[1], kind)
    if kind == I8:
        describe(&p.k_scales, pages[2], F32)
        describe(&p.v_scales, pages[3], F32)
    p.num_kv_heads, p.page_size, p.head_dim, p.head_dim_v = p.k.length[1], p.k.length[2], p.k.length[3], p.v.length[3]


cdef int do_step(Problem* p, Tensor* new_keys, Tensor* new_values, const int64_t* step,
                 Py_ssize_t num_threads) except -1:
    """The problem (IN: described, but for what `step` tells; keys, values and pages as attend_step has them)."""
    cdef Py_ssize_t batch = step[0], total = p.q.length[1]
    cdef const int64_t* places
    cdef fp_mode callers
    swap_heads(&p.q)
    swap_heads(&p.out)
    swap_heads(new_keys)
    swap_heads(new_values)
    p.group_size = p.q.length[1] // p.num_kv_heads
    p.batch_size, p.folded, p.table_stride = batch, 1, step[2]
    p.q_offsets, p.kv_lens = step + STEP_HEADER + batch + 1, step + STEP_HEADER + 2 * batch + 1
    if step[1]:
        p.kv_starts = p.kv_lens + batch
    describe_packed(p, step + STEP_HEADER)
    places = p.kv_lens + 2 * batch
    p.block_table = places + 3 * total
    with nogil:
        if p.k.kind == I8:
            callers = own_mode()
            store_quantized(new_keys, &p.k, &p.k_scales, places, places + 2 * total)
            store_quantized(new_values, &p.v, &p.v_scales, places + total, places + 2 * total)
            set_mode(callers)
        else:
            store_rows(new_keys, &p.k, places)
            store_rows(new_values, &p.v, places + total)
    p.k.stride[0] = p.v.stride[0] = p.k_scales.stride[0] = p.v_scales.stride[0] = PAGE_UNIT
    p.keep_scale = 1.0
    return run(p, num_threads)


def attend_step(query, key, value, tuple pages, step, Kind pages_kind, out, Kind kind, real[::1] logsumexp, *, scale,
                double softcap, Py_ssize_t window_left, Py_ssize_t window_right, const real[:, ::1] slopes,
                const real[::1] sinks, Py_ssize_t num_threads):
    """A step of a cache; returns out. key and value (total, num_kv_heads, dim) go into pages, then out (OUT) and
    logsumexp (OUT, flat; or None) of the query (total, num_heads, dim) are what attend makes of them. `pages`: keys and
    values of the first page, (1, num_kv_heads, page_size, dim), of 8 bits the scales of both too. `step`, contiguous
    int64, holds, one after the other, the number of sequences, whether kv_starts count, the pages in a row of the
    table; cu_seqlens_q (batch + 1), q_offsets, kv_lens, kv_starts (batch each); where keys, values and scales are
    stored (total each), in bytes from the first page; and the table, in PAGE_UNITs from there."""
    cdef Problem p
    cdef Tensor new_keys, new_values
    memset(&p, 0, sizeof(p))
    describe_pages(&p, pages, pages_kind)
    describe(&p.q, query, kind)
    describe(&p.out, out, kind)
    describe(&new_keys, key, kind)
    describe(&new_values, value, kind)
    describe_options(&p, scale, softcap, window_left, window_right, slopes, sinks)
    if logsumexp is not None:   # a place for each query of each head, packed as they are
        p.logsumexp.data, p.logsumexp.kind = <char*> &logsumexp[0], real_kind()
        p.logsumexp.stride[2], p.logsumexp.stride[1] = p.q.length[2] * sizeof(real), sizeof(real)
        p.logsumexp.firsts = <const int64_t*> data_of(step) + STEP_HEADER
    do_step(&p, &new_keys, &new_values, <const int64_t*> data_of(step), num_threads)
    return out


def attend_step_short(query, key, value, tuple pages, step, Kind pages_kind):
    """The short way, as attend_short: of a step without options, with float32 arrays. Returns a new `out`, or None with
    nothing written."""
    cdef Problem p
    cdef Tensor new_keys, new_values
    cdef Py_ssize_t length[4]
    cdef const int64_t* numbers = <const int64_t*> data_of(step)
    if not pages or type(query) is not NDARRAY or type(key) is not NDARRAY or type(value) is not NDARRAY:
        return None
    if query.dtype is not REAL or key.dtype is not REAL or value.dtype is not REAL:
        return None
    memset(&p, 0, sizeof(p))
    describe_pages(&p, pages, pages_kind)
    try:
        if describe(&p.q, query, F32) + describe(&new_keys, key, F32) + describe(&new_values, value, F32) != 9:
            return None
    except ValueError:  # more than 4 axes
        return None
    length[:] = [1, numbers[STEP_HEADER + numbers[0]], p.num_kv_heads, p.head_dim]
    if not has_lengths(&new_keys, length):
        return None
    length[3] = p.head_dim_v
    if not has_lengths(&new_values, length):
        return None
    length[2] = p.q.length[2]
    if (length[1] == 0 or p.q.length[1] != length[1] or p.q.length[3] != p.head_dim or length[2] == 0
            or length[2] % p.num_kv_heads):
        return None
    out = EMPTY((length[1], length[2], length[3]), REAL)
    describe_new(&p.out, out, F32, length)
    p.window_left = -1
    choose_units(&p, None)
    do_step(&p, &new_keys, &new_values, numbers, 0)
    return out


cdef bint sizes_fit(const Problem* p) noexcept:
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
    if not (out.stride[3] == size_of(out.kind) and out.stride[inner] >= out.length[3] * out.stride[3]
            and out.stride[outer] >= out.length[inner] * out.stride[inner]
            and out.stride[0] >= out.length[outer] * out.stride[outer]):
        return False
    for i in range(3):
        start, end = inputs[i].data, inputs[i].data + size_of(inputs[i].kind)
        for axis in range(4):
            start += min(0, inputs[i].stride[axis] * (inputs[i].length[axis] - 1))
            end += max(0, inputs[i].stride[axis] * (inputs[i].length[axis] - 1))
        if start < out.data + out.length[0] * out.stride[0] and out.data < end:
            return False
    return True


cdef bint has_lengths(const Tensor* t, const Py_ssize_t* length) noexcept:
    return (t.length[0] == length[0] and t.length[1] == length[1] and t.length[2] == length[2]
            and t.length[3] == length[3])


cdef Py_ssize_t index_of(number) except? -1:
    """An exact int as such; an OverflowError beyond +-2**FAR_LOG2."""
    cdef Py_ssize_t index = number
    if not -(1LL << FAR_LOG2) <= index <= 1LL << FAR_LOG2:
        raise OverflowError
    return index


cdef bint read_lengths(int64_t* lengths, given, Py_ssize_t n, int64_t low, int64_t high) except -1:
    """lengths[n] (OUT) = an int, or an array of one 64- or 32-bit int for each batch row: copies, which nobody changes
    after they were looked at. False where it is anything else, or one is not within low..high."""
    cdef Py_buffer view
    cdef Py_ssize_t i
    cdef int single
    cdef bint wide, fits
    if n > FEW_BATCH_ROWS:
        return False
    if type(given) is int:
        lengths[0] = index_of(given)
        for i in range(1, n):
            lengths[i] = lengths[0]
    else:
        if type(given) is not NDARRAY:
            return False
        wide = given.dtype is INT64
        if not wide and given.dtype is not INT32:
            return False
        PyObject_GetBuffer(given, &view, PyBUF_STRIDES)
        fits = view.ndim == 1 and view.shape[0] == n and view.itemsize == (8 if wide else 4)
        for i in range(n if fits else 0):
            if wide:
                memcpy(&lengths[i], <char*> view.buf + i * view.strides[0], 8)
            else:
                memcpy(&single, <char*> view.buf + i * view.strides[0], 4)
                lengths[i] = single
        PyBuffer_Release(&view)
        if not fits:
            return False
    for i in range(n):
        if not low <= lengths[i] <= high:
            return False
    return True


cdef bint read_window(Problem* p, window) except -1:
    """The window of p (OUT). False where it is no tuple of two ints from -1 on, or None."""
    if type(window) is not tuple or len(window) != 2:
        return False
    left, right = window
    if not (left is None or type(left) is int) or not (right is None or type(right) is int):
        return False
    p.window_left = -1 if left is None else index_of(left)
    p.window_right = -1 if right is None else index_of(right)
    return min(p.window_left, p.window_right) >= -1


cdef Kind kind_of(dtype, dict kinds) except? BOOL:
    """Its number in `kinds`, which are cattn/_checks.py's; BOOL: none that attention computes with."""
    if dtype is REAL:
        return real_kind()
    kind = kinds.get(dtype)
    return BOOL if kind is None else kind


def attend_short(query, key, value, is_causal, scale, q_offset, window, kv_lens, return_logsumexp, out,
                 Py_ssize_t num_threads, dict kinds):
    """The short way: what the door returns, for the options that stand here and no other, where all is as plain as it
    mostly is: arrays of 4 axes with equal batches, out apart from them, numbers of Python's own types. Returns None,
    with nothing written, for anything else: the door then finds out what it is, an error or just not plain. So each
    rule of the door's that stands here once more may be stricter, never laxer."""
    cdef Problem p
    cdef Py_ssize_t length[4]
    cdef int64_t offsets[FEW_BATCH_ROWS]
    cdef int64_t lens[FEW_BATCH_ROWS]
    cdef Py_ssize_t batch
    cdef Kind q_kind, kv_kind
    if type(query) is not NDARRAY or type(key) is not NDARRAY or type(value) is not NDARRAY:
        return None
    q_dtype = query.dtype  # once: another thread may set it
    q_kind, kv_kind = kind_of(q_dtype, kinds), kind_of(key.dtype, kinds)
    if (kind_of(value.dtype, kinds) != kv_kind or (q_kind == F64) != IS_DOUBLE
            or (q_kind != kv_kind and (q_kind != F32 or kv_kind == F64)) or kv_kind == BOOL):
        return None
    if (is_causal is not True and is_causal is not False) or (
            return_logsumexp is not True and return_logsumexp is not False):
        return None
    if scale is not None and not (type(scale) is float and 1e-30 < scale < 1e30):
        return None
    memset(&p, 0, sizeof(p))
    p.window_left = p.window_right = -1
    try:
        if describe_inputs(&p, query, key, value, q_kind, kv_kind) != 12 or not sizes_fit(&p):
            return None
        if window is not None and not read_window(&p, window):
            return None
        if kv_lens is not None:
            if not read_lengths(lens, kv_lens, p.batch_size, 0, p.seq_len_kv):
                return None
            p.kv_lens = lens
        if q_offset is None:
            if is_causal and p.seq_len_q < p.seq_len_kv:  # of which the door warns
                return None
        elif type(q_offset) is int:
            p.q_offset = index_of(q_offset)
        elif type(q_offset) is str:
            if q_offset != "end":
                return None
            p.q_offset = p.seq_len_kv - p.seq_len_q
            if p.kv_lens != NULL:
                p.q_offsets = offsets
                for batch in range(p.batch_size):
                    offsets[batch] = lens[batch] - p.seq_len_q
        else:
            if not read_lengths(offsets, q_offset, p.batch_size, -(1LL << FAR_LOG2), 1LL << FAR_LOG2):
                return None
            p.q_offsets = offsets
        if out is not None:
            if type(out) is not NDARRAY or kind_of(out.dtype, kinds) != q_kind or not out.flags.writeable:
                return None
            describe(&p.out, out, q_kind)
    except (ValueError, OverflowError):  # more than 4 axes; an int that is far away
        return None
    if is_causal:
        p.window_right = 0
    choose_units(&p, scale)
    length[:] = [p.batch_size, p.q.length[1], p.seq_len_q, p.head_dim_v]
    if out is None:
        out = EMPTY((length[0], length[1], length[2], length[3]), q_dtype)
        describe_new(&p.out, out, q_kind, length)
    elif not has_lengths(&p.out, length) or not lies_apart(&p):
        return None
    if return_logsumexp:
        logsumexp = EMPTY((length[0], length[1], length[2]), REAL)
        describe_logsumexp(&p, &p.logsumexp, <real*> data_of(logsumexp))
    p.keep_scale = 1.0
    run(&p, num_threads)
    return (out, logsumexp) if return_logsumexp else out
