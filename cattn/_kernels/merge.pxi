# Partial results over disjoint keys, merged by their logsumexps, for each row:
#     m = max_i lse[i]        w[i] = exp(lse[i] - m)        sum = w[0] + w[1] + ...
#     logsumexp = m + log(sum)
#     out = w[0] / sum * outputs[0] + w[1] / sum * outputs[1] + ...
# with sum + exp(sink - m) in place of `sum` in out alone, where there is a sink.
#
#     tasks: ranges of blocks; for each, by whichever thread is free
#         for each block of LANES rows
#             weights     W[state][row], rows in the lanes
#             for each row, for each piece of its dimensions
#                 for each state: acc += W[state][row] broadcast x the state's row, dimensions in the lanes
#
# Weights add up to 1 before anything is multiplied by them: no product or sum is larger than the largest number of
# `outputs`, but for rounding. A row is a chain of FMAs in the order of the states, and no other row has part in it. It
# starts from -0, which leaves what is added to it as it is: one state, and any number of empty ones beside it, comes
# out as it came.
#
# Errors, with u = eps / 2: u (3 |lse[i] - m| + 4) of a weight, n u of a sum; `merged` in tests/tolerance.py adds them.
# The limit is how fast memory brings `outputs`, since a number is used once: one thread of Emerald Rapids merges 10 to
# 14 GB/s, results included, of the 14 that it reads.

cdef enum:
    MERGE_AXES = 32         # numpy broadcasts no more; as in cattn/_checks.py
    MERGE_DIMS = 1024       # of a row at a time: between two such pieces, a thread sees whether the call is to end
    # Bytes of outputs, from which on they are not in L2, as a rule: rows are prefetched so many rows ahead. That takes
    # 0.85 to 0.95 of the time from memory, as long from L3, up to 1.15 from L1 (8 to 32 rows; Emerald Rapids).
    MERGE_CACHED = 1 << 20
    MERGE_AHEAD = 16
    # The time of a number of `outputs`, and of what else a row of one takes, in flops of attention.
    MERGE_FLOPS = 8
    WEIGHT_FLOPS = 1000


cdef struct MergeArray:                 # an array that has a row, or a number, for each row of the result
    char* data                          # NULL: the array was not given
    Py_ssize_t stride[MERGE_AXES]       # in bytes, along the axes of a Merge
    Py_ssize_t item                     # from one number of a row to the next


cdef struct Merge:                      # what a call computes
    Call* call
    Kind kind                           # of outputs and out
    Py_ssize_t num_states, head_dim
    bint in_place                       # rows of outputs are contiguous, and LANES long or longer
    Py_ssize_t num_axes                 # of the rows: all but the last of `outputs`, joined where strides allow it
    Py_ssize_t length[MERGE_AXES]
    MergeArray* outputs                 # IN [num_states]
    MergeArray* logsumexps              # IN [num_states]
    MergeArray* sinks                   # IN
    MergeArray* out                     # OUT
    MergeArray* logsumexp               # OUT
    Py_ssize_t ahead                    # rows between the one that is done and the one that is prefetched; 0: none is
    Py_ssize_t line_blocks              # blocks along the last axis of the rows
    Py_ssize_t num_blocks, range_blocks


cdef struct MergeWorkspace:             # SCRATCH of a thread
    real* weights                       # [num_states][LANES]; -1: an empty state, which is not looked at
    char** rows                         # [num_states]: of outputs, the block's first
    real* acc                           # [MERGE_DIMS + LANES]
    real* copy                          # [MERGE_DIMS + LANES]


cdef size_t carve_merge(MergeWorkspace* w, char* base, const Merge* m) noexcept nogil:
    """w (OUT) at `base`; returns the bytes it takes."""
    cdef size_t used = 0
    w.weights = <real*> take(base, &used, m.num_states * LANES * sizeof(real))
    w.rows = <char**> take(base, &used, m.num_states * sizeof(char*))
    w.acc = <real*> take(base, &used, (MERGE_DIMS + LANES) * sizeof(real))
    w.copy = <real*> take(base, &used, (MERGE_DIMS + LANES) * sizeof(real))
    return used


cdef inline char* at_index(const MergeArray* rows, const Py_ssize_t* index, Py_ssize_t num_axes) noexcept nogil:
    cdef char* p = rows.data
    cdef Py_ssize_t axis
    for axis in range(num_axes):
        p += index[axis] * rows.stride[axis]
    return p


cdef inline vf load_lanes(const char* p, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    """One number for each of n rows, and for the lanes behind them what an empty state has."""
    cdef real lanes[MAX_LANES]
    cdef Py_ssize_t i
    if n == LANES and stride == sizeof(real):
        return vload(<const real*> p)
    for i in range(LANES):
        lanes[i] = <real> -INFINITY
    for i in range(n):
        memcpy(&lanes[i], p + i * stride, sizeof(real))
    return vload(lanes)


cdef void merge_weights(const Merge* m, const MergeWorkspace* w, const Py_ssize_t* index, Py_ssize_t n) noexcept nogil:
    """w.weights (OUT), logsumexp (OUT) of the n rows from `index` on.

    A NaN makes its own weight NaN, and so the sum; an infinite logsumexp likewise, by inf - inf. The exponents with a
    sink are relative to the larger one of it and m: neither overflows."""
    cdef Py_ssize_t i, last = m.num_axes - 1, stride = m.logsumexp.stride[last]
    cdef vf largest = vset1(<real> LOWEST), none = vset1(<real> -INFINITY), zero = vset1(<real> 0.0), sum = zero
    cdef vf lse, weight, factor, denominator, apart
    cdef real maxima[MAX_LANES]
    cdef real sums[MAX_LANES]
    cdef real result
    cdef char* p
    for i in range(m.num_states):
        lse = load_lanes(at_index(m.logsumexps + i, index, m.num_axes), m.logsumexps[i].stride[last], n)
        vstore(w.weights + i * LANES, lse)
        largest = vmax(largest, lse)
    for i in range(m.num_states):
        lse = vload(w.weights + i * LANES)
        weight = vexp2((lse - largest) * <real> LOG2_E)
        sum = sum + weight
        vstore(w.weights + i * LANES, vselect(vequal(lse, none), vset1(<real> -1.0), weight))
    vstore(maxima, largest)
    vstore(sums, sum)
    p = at_index(m.logsumexp, index, m.num_axes)
    for i in range(n):
        result = <real> (maxima[i] + log(<double> sums[i])) if sums[i] != 0 else <real> -INFINITY
        memcpy(p + i * stride, &result, sizeof(real))
    factor, denominator = vset1(<real> 1.0), sum
    if m.sinks.data != NULL:
        apart = load_lanes(at_index(m.sinks, index, m.num_axes), m.sinks.stride[last], n) - largest
        apart = apart * <real> LOG2_E
        factor = vexp2(-vmax(zero, apart))
        denominator = sum * factor + vexp2(-vmax(zero, -apart))
    for i in range(m.num_states):
        weight = vload(w.weights + i * LANES)
        vstore(w.weights + i * LANES, vselect(vless(weight, zero), weight, weight * factor / denominator))


cdef inline void add_dims(const int KIND, const int VECTORS, real* out, const Merge* m, const MergeWorkspace* w,
                          Py_ssize_t row, Py_ssize_t d) noexcept nogil:
    """out (OUT)[VECTORS] = dimensions d and following of the states' rows, which are contiguous, weighted."""
    cdef vf acc[4]
    cdef vf factor
    cdef const char* p
    cdef real weight
    cdef Py_ssize_t i, stride
    cdef int v
    for v in range(VECTORS):
        acc[v] = vset1(<real> -0.0)
    for i in range(m.num_states):
        weight = w.weights[i * LANES + row]
        if weight == -1:
            continue
        factor, stride = vset1(weight), m.outputs[i].stride[m.num_axes - 1]
        p = w.rows[i] + row * stride + d * size_of(<Kind> KIND)
        if m.ahead:
            for v in range(<int> ceil_div(VECTORS * LANES * size_of(<Kind> KIND), 64)):
                prefetch(p + m.ahead * stride + 64 * v)
        for v in range(VECTORS):
            acc[v] = vfma(factor, load_kv(KIND, p, v * LANES), acc[v])
    for v in range(VECTORS):
        vstore(out + v * LANES, acc[v])


cdef inline void add_in_place(const int KIND, real* out, const Merge* m, const MergeWorkspace* w, Py_ssize_t row,
                              Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """out[0..n) (OUT) = dimensions first, ... of the states' rows, weighted; n: LANES or more. The last vector may
    begin among the dimensions of the one before: these are computed twice."""
    cdef Py_ssize_t d = 0
    while d + 4 * LANES <= n:
        add_dims(KIND, 4, out + d, m, w, row, first + d)
        d += 4 * LANES
    while d < n:
        d = min(d, n - LANES)
        add_dims(KIND, 1, out + d, m, w, row, first + d)
        d += LANES


cdef void add_copies(real* out, const Merge* m, const MergeWorkspace* w, Py_ssize_t row, Py_ssize_t first,
                     Py_ssize_t n) noexcept nogil:
    """The same for rows of any stride and length; out: whole vectors."""
    cdef const MergeArray* outputs
    cdef vf factor
    cdef real weight
    cdef Py_ssize_t i, v
    for v in range(ceil_div(n, LANES)):
        vstore(out + v * LANES, vset1(<real> -0.0))
    for i in range(m.num_states):
        weight, outputs = w.weights[i * LANES + row], m.outputs + i
        if weight == -1:
            continue
        load_row(w.copy, w.rows[i] + row * outputs.stride[m.num_axes - 1] + first * outputs.item, outputs.item, n,
                 m.kind)
        factor = vset1(weight)
        for v in range(ceil_div(n, LANES)):
            vstore(out + v * LANES, vfma(factor, vload(w.copy + v * LANES), vload(out + v * LANES)))


cdef void merge_row(const Merge* m, const MergeWorkspace* w, Py_ssize_t row, char* out) noexcept nogil:
    """out (OUT) = the weighted sum of the states' rows, `row` steps from the block's first."""
    cdef Py_ssize_t first = 0, n, i = 0
    cdef bint to_out = m.in_place and m.kind == real_kind() and m.out.item == sizeof(real)
    cdef real* acc = w.acc
    while i < m.num_states and w.weights[i * LANES + row] == -1:
        i += 1
    while first < m.head_dim and not stopped_by_signal(m.call):
        n = m.head_dim - first
        if n >= MERGE_DIMS + LANES:
            n = MERGE_DIMS
        if to_out:
            acc = <real*> (out + first * sizeof(real))
        if i == m.num_states:
            memset(acc, 0, n * sizeof(real))
        elif not m.in_place:
            add_copies(acc, m, w, row, first, n)
        elif not IS_DOUBLE and m.kind == F16:
            add_in_place(F16, acc, m, w, row, first, n)
        elif not IS_DOUBLE and m.kind == BF16:
            add_in_place(BF16, acc, m, w, row, first, n)
        else:
            add_in_place(F64 if IS_DOUBLE else F32, acc, m, w, row, first, n)
        if not to_out:
            store_row(out + first * m.out.item, m.out.item, acc, n, m.kind)
        first += n


cdef void merge_block(const Merge* m, const MergeWorkspace* w, Py_ssize_t block) noexcept nogil:
    """out, logsumexp (OUT) of at most LANES rows."""
    cdef Py_ssize_t index[MERGE_AXES]
    cdef Py_ssize_t axis = m.num_axes - 1, line = block // m.line_blocks, n, i
    cdef char* out
    index[axis] = block % m.line_blocks * LANES
    n = min(m.length[axis] - index[axis], <Py_ssize_t> LANES)
    while axis > 0:
        axis -= 1
        index[axis] = line % m.length[axis]
        line //= m.length[axis]
    merge_weights(m, w, index, n)
    for i in range(m.num_states):
        w.rows[i] = at_index(m.outputs + i, index, m.num_axes)
    out = at_index(m.out, index, m.num_axes)
    for i in range(n):
        merge_row(m, w, i, out + i * m.out.stride[m.num_axes - 1])


cdef void merge_ranges(const void* what, char* scratch) noexcept nogil:
    """What one thread does of a Merge."""
    cdef const Merge* m = <const Merge*> what
    cdef MergeWorkspace w
    cdef Py_ssize_t number = take_task(m.call), block
    cdef fp_mode before = own_mode()
    carve_merge(&w, scratch, m)
    while number < m.call.num_tasks and not stopped_by_signal(m.call):
        for block in range(number * m.range_blocks, min((number + 1) * m.range_blocks, m.num_blocks)):
            if stopped_by_signal(m.call):
                break
            merge_block(m, &w, block)
        task_done(m.call)
        number = take_task(m.call)
    set_mode(before)
    await_others(m.call)


cdef int describe_rows(MergeArray* rows, array, Kind kind, const Merge* m, bint has_dims) except -1:
    """rows (OUT) = where the numbers of an array are that has the axes of m and, has_dims, its head_dim."""
    cdef Py_buffer view
    cdef Py_ssize_t axis
    cdef bint fits
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES)
    fits = view.ndim == m.num_axes + has_dims and view.itemsize == size_of(kind)
    fits = fits and (not has_dims or view.shape[m.num_axes] == m.head_dim)
    if fits:
        rows.data, rows.item = <char*> view.buf, view.strides[m.num_axes] if has_dims else 0
        for axis in range(m.num_axes):
            fits = fits and view.shape[axis] == m.length[axis]
            rows.stride[axis] = view.strides[axis]
    PyBuffer_Release(&view)
    if not fits:
        raise ValueError(f"merge_states: an array of shape {array.shape} and {array.dtype} does not fit the others")
    return 0


cdef void join_axes(Merge* m, MergeArray* rows, Py_ssize_t count) noexcept nogil:
    """The axes of m (IN/OUT) without those of length 1, and neighbours as one where all the arrays allow it."""
    cdef Py_ssize_t axis, i, kept = 0
    cdef bint joined
    for axis in range(m.num_axes):
        if m.length[axis] == 1:
            continue
        joined = kept > 0
        for i in range(count if joined else 0):
            joined = joined and rows[i].stride[kept - 1] == m.length[axis] * rows[i].stride[axis]
        if joined:
            m.length[kept - 1] *= m.length[axis]
        else:
            m.length[kept] = m.length[axis]
            kept += 1
        for i in range(count):
            rows[i].stride[kept - 1] = rows[i].stride[axis]
    if kept == 0:
        m.length[0] = kept = 1
        for i in range(count):
            rows[i].stride[0] = 0
    m.num_axes = kept


def merge_states(outputs, logsumexps, sinks, out, logsumexp, Kind kind, Py_ssize_t num_threads):
    """out and logsumexp (OUT) of lists of arrays, (..., head_dim) of this kind and (...) of reals; sinks: reals (...),
    or None. Any strides. cattn/_merge.py has checked the arguments. num_threads: 0 for the default."""
    cdef Merge m
    cdef Call call
    cdef MergeWorkspace w
    cdef Py_ssize_t i, rows = 1, num_arrays, lines
    cdef size_t arrays_size, workspace_size
    cdef char* scratch
    m.call, m.kind, m.num_states = &call, kind, len(outputs)
    m.num_axes = len(out.shape) - 1
    m.head_dim = out.shape[m.num_axes]
    if not 0 < m.num_states == len(logsumexps) or not 0 <= m.num_axes <= MERGE_AXES:
        raise ValueError(f"merge_states: {len(outputs)} outputs, {len(logsumexps)} logsumexps, {len(out.shape)} axes")
    for i in range(m.num_axes):
        m.length[i] = out.shape[i]
        rows *= m.length[i]
    if rows == 0:
        return
    begin_call(&call, num_threads, <double> rows * m.num_states * (m.head_dim * MERGE_FLOPS + WEIGHT_FLOPS))
    num_arrays = 2 * m.num_states + 3
    arrays_size = round_up(num_arrays * sizeof(MergeArray), 64)
    workspace_size = carve_merge(&w, NULL, &m)
    scratch = take_scratch(arrays_size + call.num_threads * workspace_size)
    if scratch == NULL:
        end_call(&call)
        raise MemoryError(f"merge_states: no memory for {call.num_threads} x {workspace_size} bytes of scratch")
    m.outputs = <MergeArray*> scratch
    m.logsumexps = m.outputs + m.num_states
    m.sinks = m.logsumexps + m.num_states
    m.out, m.logsumexp = m.sinks + 1, m.sinks + 2
    m.ahead = MERGE_AHEAD if rows * m.head_dim * m.num_states * size_of(kind) > MERGE_CACHED else 0
    m.in_place = m.head_dim >= LANES
    try:
        for i in range(m.num_states):
            describe_rows(m.outputs + i, outputs[i], kind, &m, True)
            m.in_place = m.in_place and m.outputs[i].item == size_of(kind)
            describe_rows(m.logsumexps + i, logsumexps[i], real_kind(), &m, False)
        memset(m.sinks, 0, sizeof(MergeArray))
        if sinks is not None:
            describe_rows(m.sinks, sinks, real_kind(), &m, False)
        describe_rows(m.out, out, kind, &m, True)
        describe_rows(m.logsumexp, logsumexp, real_kind(), &m, False)
        join_axes(&m, m.outputs, num_arrays)
        lines = rows // m.length[m.num_axes - 1]
        m.line_blocks = ceil_div(m.length[m.num_axes - 1], LANES)
        m.num_blocks = lines * m.line_blocks
        m.range_blocks = m.num_blocks
        if call.num_threads > 1:
            m.range_blocks = max(1, m.num_blocks // (TASKS_PER_THREAD * call.num_threads))
        call.num_tasks = call.unfinished = ceil_div(m.num_blocks, m.range_blocks)
        call.num_threads = min(call.num_threads, call.num_tasks)
        with nogil:
            in_threads(&call, merge_ranges, &m, scratch + arrays_size, workspace_size)
    finally:
        give_scratch(scratch)
        end_call(&call)
