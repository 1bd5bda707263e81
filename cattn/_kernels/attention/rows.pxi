# Rows of queries: which a task has, which keys each of them sees, and the softmax of each over the keys done so far.

cdef inline char* lane_row(const Tensor* t, const Lane* lane) noexcept nogil:
    """The lane's row of Q, out or a mask."""
    return row_of(t, lane.batch, lane.head, lane.query)


cdef const Sequence* sequence_of(const Problem* p, Py_ssize_t number) noexcept nogil:
    """The batch row that has task `number`: the last one that begins there or before."""
    cdef Py_ssize_t low = 0, high = p.num_sequences, middle
    while high - low > 1:
        middle = (low + high) // 2
        if p.sequences[middle].first_task <= number:
            low = middle
        else:
            high = middle
    return &p.sequences[low]


cdef void locate_task(const Problem* p, Py_ssize_t number, Task* task) noexcept nogil:
    """task (OUT), but for its keys."""
    cdef const Sequence* sequence
    cdef Py_ssize_t rows, blocks
    if p.sequences == NULL:
        rows = num_rows(p, 0)
        blocks = ceil_div(rows, p.block_rows)
        task.batch = number // blocks // p.num_kv_heads
    else:
        sequence = sequence_of(p, number)
        number -= sequence.first_task
        rows = num_rows(p, sequence.batch)
        blocks = ceil_div(rows, p.block_rows)
        task.batch = sequence.batch
    task.kv_head = number // blocks % p.num_kv_heads
    task.first_row = (blocks - 1 - number % blocks) * p.block_rows   # the last rows first: most work where causal
    task.num_rows = min(p.block_rows, rows - task.first_row)
    task.lanes = p.block_rows if p.decode_width else round_up(task.num_rows, LANES)
    task.next_batch = task.next_kv_head = task.next_low = task.next_n = task.next_row = 0


cdef void locate_row(const Problem* p, Py_ssize_t batch, Py_ssize_t kv_head, Py_ssize_t row, Lane* lane) noexcept nogil:
    """lane (OUT): whose query stands in this row of those that use the keys of batch and kv_head."""
    cdef Py_ssize_t queries = num_queries(p, batch)
    lane.query = row % queries
    lane.head = kv_head * p.group_size + row // queries % p.group_size
    lane.batch = batch + row // queries // p.group_size


cdef void describe_lane(const Problem* p, Lane* lane) noexcept nogil:
    """lane (IN: whose query; OUT: which keys it sees)."""
    cdef real slope, limit = <real> BIAS_LIMIT
    lane.position = lane.query + (p.q_offset if p.q_offsets == NULL else p.q_offsets[lane.batch])
    lane.low = 0 if p.window_left < 0 else max(0, lane.position - p.window_left)
    if p.kv_starts != NULL:
        lane.low = max(lane.low, p.kv_starts[lane.batch])
    lane.high = num_keys(p, lane.batch)
    if p.window_right >= 0:
        lane.high = min(lane.high, lane.position + p.window_right + 1)
    if lane.high <= lane.low:
        lane.low = lane.high = 0
    lane.slope = 0.0
    if p.slopes != NULL:
        slope = p.slopes[lane.batch * p.slopes_stride + lane.head]
        lane.slope = -limit if slope < -limit else limit if slope > limit else slope


cdef void describe_lanes(const Problem* p, Task* task, Lane* lanes) noexcept nogil:
    """lanes (OUT)[task.lanes]: which query each lane holds and which keys it sees; and which some lane does (OUT, of
    the task). Lanes past the last row repeat it."""
    cdef Py_ssize_t i, queries
    cdef Lane lane
    task.low, task.high = p.seq_len_kv, 0
    queries = num_queries(p, task.batch)
    locate_row(p, task.batch, task.kv_head, task.first_row, &lane)
    for i in range(task.lanes):
        if i < task.num_rows:
            describe_lane(p, &lane)
            if lane.low < lane.high:
                task.low = min(task.low, lane.low)
                task.high = max(task.high, lane.high)
        lanes[i] = lane
        if i + 1 < task.num_rows:
            lane.query += 1
            if lane.query == queries:
                lane.query = 0
                lane.head += 1
                if lane.head == (task.kv_head + 1) * p.group_size:
                    lane.head = task.kv_head * p.group_size
                    lane.batch += 1
    if task.high == 0:
        task.low = 0


cdef inline void describe_task(const Problem* p, Py_ssize_t number, Task* task, Lane* lanes) noexcept nogil:
    """task (OUT), and lanes (OUT)[task.lanes]."""
    locate_task(p, number, task)
    describe_lanes(p, task, lanes)


cdef void reset(const Problem* p, const Task* task, State* s) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(max(task.lanes, LANES)):
        s.reference[i] = <real> LOWEST
        s.row_sum[i] = 0.0
    memset(s.acc, 0, task.lanes * p.v_stride * sizeof(real))


# Splits are merged in order. Their sums are kept with what rounding takes from them, so that the error of the whole
# does not grow with the number of splits; and the reference is moved only past SLACK, as within a split, or the errors
# of many factors near 1 would add up.

cdef inline void merge_reference(real* total_max, const real* part_max, real unit, vf* factors) noexcept nogil:
    """total_max (IN/OUT), one vector; factors (OUT)[2]: what the sums of total and part are multiplied by."""
    cdef vf old = vload(total_max), other = vload(part_max), new
    new = vselect(vless(vset1(<real> SLACK), (other - old) * unit), other, old)
    factors[0], factors[1] = vexp2((old - new) * unit), vexp2((other - new) * unit)
    vstore(total_max, new)


cdef inline void merge_vector(real* total, real* lost, const real* part, vf total_factor,
                              vf part_factor) noexcept nogil:
    """total + lost (IN/OUT) = (total + lost) * total_factor + part * part_factor: the sum of two numbers and what it
    rounds off (Knuth, The Art of Computer Programming 2, 4.2.2) are exact. Infinities lose nothing."""
    cdef vf a = vrounded(vload(total) * total_factor), b = vrounded(vload(part) * part_factor)
    cdef vf both = a + b
    cdef vf of_b = both - a
    cdef vf off = (a - (both - of_b)) + (b - of_b)
    off = vselect(vequal(off, off), off, vset1(<real> 0.0))
    vstore(lost, vload(lost) * total_factor + off)
    vstore(total, both)


cdef void add_lost(const Problem* p, const Task* task, State* total, const State* lost) noexcept nogil:
    """The sums of total (IN/OUT) get back what was lost."""
    cdef Py_ssize_t i
    for i in range(max(task.lanes, LANES)):
        total.row_sum[i] += lost.row_sum[i]
    for i in range(task.lanes * p.v_stride):
        total.acc[i] += lost.acc[i]
