# Where the keys and values of a task lie, as what they are read, and which are wanted next.

cdef enum:
    AHEAD_LINES = 2     # asked for every EXP_KEYS keys: 1 is 15 % slower where short sequences come from memory

cdef struct Rows:
    const char* row             # the first that is left
    Py_ssize_t stride, bytes, left

cdef struct Ahead:              # what is asked of memory while tiles are accumulated, a few lines at a time: in a
    Rows rows[4]                # burst, the queue of misses would fill, and the loops' own loads wait
    int count, current          # of rows[]
    Py_ssize_t offset           # in the current row


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


cdef inline void prefetch_ahead(Ahead* a) noexcept nogil:
    """The next lines."""
    cdef Rows* rows
    for _ in range(AHEAD_LINES):
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


cdef void ask_for(Ahead* a, const Tensor* t, Py_ssize_t batch, Py_ssize_t head, Py_ssize_t first, Py_ssize_t n,
                  Py_ssize_t dim) noexcept nogil:
    """Adds rows [first, first + n) to what is asked for, unless their numbers lie far apart: too many lines."""
    cdef Rows* rows = &a.rows[a.count]
    if n <= 0 or not 0 < t.stride[3] <= <Py_ssize_t> sizeof(double):
        return
    rows.row, rows.stride, rows.bytes, rows.left = row_of(t, batch, head, first), t.stride[2], dim * t.stride[3], n
    if rows.stride == rows.bytes:
        rows.bytes, rows.left = n * rows.bytes, 1   # one long row
    a.count += 1


cdef void plan_ahead(const Problem* p, const Task* task, Py_ssize_t key_end, Py_ssize_t high,
                     Ahead* a) noexcept nogil:
    """a (OUT): what is wanted when the keys up to key_end are done, and the hardware does not foresee. The next block
    of keys, where its rows lie apart; in the last block of a split, the rows of out, and the first rows of the next
    task."""
    cdef Py_ssize_t n = min(high - key_end, p.block_kv)
    cdef Task next_task
    a.count = a.current = 0
    a.offset = 0
    if n > 0:
        if p.k.stride[2] != p.head_dim * p.k.stride[3]:
            ask_for(a, &p.k, task.batch, task.kv_head, key_end, n, p.head_dim)
        if p.v.stride[2] != p.head_dim_v * p.v.stride[3]:
            ask_for(a, &p.v, task.batch, task.kv_head, key_end, n, p.head_dim_v)
        return
    if not p.call.in_flight:  # so little work that all of it is in the caches
        return
    n = min(task.num_rows, p.seq_len_q - task.query)
    ask_for(a, &p.out, task.batch, task.head, task.query, n, p.head_dim_v)
    # Where tasks take equally long, a thread gets every num_threads-th. Of a task whose keys are cut into splits this
    # one may be just a part; of windows only the rows know where they begin.
    if p.num_splits > 1 or p.window_left >= 0 or task.number + p.call.num_threads >= p.call.num_tasks:
        return
    locate_task(p, task.number + p.call.num_threads, &next_task)
    n = min(p.block_kv, p.seq_len_kv)
    ask_for(a, &p.k, next_task.batch, next_task.kv_head, 0, n, p.head_dim)
    ask_for(a, &p.v, next_task.batch, next_task.kv_head, 0, n, p.head_dim_v)
    n = min(next_task.num_rows, p.seq_len_q - next_task.query)
    ask_for(a, &p.q, next_task.batch, next_task.head, next_task.query, n, p.head_dim)
