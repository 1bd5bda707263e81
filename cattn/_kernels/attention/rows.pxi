# Rows of queries: which a task has, which keys each of them sees, and the softmax of each over the keys done so far.

cdef void locate_task(const Problem* p, Py_ssize_t number, Task* task) noexcept nogil:
    """task (OUT), but for its keys."""
    cdef Py_ssize_t block = p.num_blocks - 1 - number % p.num_blocks   # the last rows first: most work where causal
    cdef Py_ssize_t first_row = block * p.block_rows
    task.number = number
    task.kv_head = number // p.num_blocks % p.num_kv_heads
    task.batch = number // p.num_blocks // p.num_kv_heads
    task.head = task.kv_head * p.group_size + first_row // p.seq_len_q
    task.query = first_row % p.seq_len_q
    task.num_rows = min(p.block_rows, p.group_size * p.seq_len_q - first_row)
    task.next_batch = task.next_kv_head = task.next_low = task.next_n = 0
    task.next_head = task.next_query = task.next_rows = 0


cdef void describe_task(const Problem* p, Py_ssize_t number, Task* task, Lane* lanes) noexcept nogil:
    """task (OUT), and lanes (OUT)[block_rows]: which query each lane holds and which keys it sees. Lanes past the last
    row repeat it."""
    cdef Py_ssize_t i, q_offset
    cdef real slope, limit = <real> BIAS_LIMIT
    cdef Lane lane
    locate_task(p, number, task)
    task.low, task.high = p.seq_len_kv, 0
    lane.head, lane.query = task.head, task.query
    q_offset = p.q_offset if p.q_offsets == NULL else p.q_offsets[task.batch]
    for i in range(p.block_rows):
        lane.position = lane.query + q_offset
        lane.low = 0 if p.window_left < 0 else max(0, lane.position - p.window_left)
        lane.high = p.seq_len_kv if p.kv_lens == NULL else p.kv_lens[task.batch]
        if p.window_right >= 0:
            lane.high = min(lane.high, lane.position + p.window_right + 1)
        if lane.high <= lane.low:
            lane.low = lane.high = 0
        else:
            task.low = min(task.low, lane.low)
            task.high = max(task.high, lane.high)
        lane.slope = 0.0
        if p.slopes != NULL:
            slope = p.slopes[task.batch * p.slopes_stride + lane.head]
            lane.slope = -limit if slope < -limit else limit if slope > limit else slope
        lanes[i] = lane
        if i + 1 < task.num_rows:
            lane.query += 1
            if lane.query == p.seq_len_q:
                lane.query = 0
                lane.head += 1
    if task.high == 0:
        task.low = 0


cdef void reset(const Problem* p, State* s) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(max(p.block_rows, LANES)):
        s.reference[i] = <real> LOWEST
        s.row_sum[i] = 0.0
    memset(s.acc, 0, p.block_rows * p.v_stride * sizeof(real))


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


cdef void add_lost(const Problem* p, State* total, const State* lost) noexcept nogil:
    """The sums of total (IN/OUT) get back what was lost."""
    cdef Py_ssize_t i
    for i in range(max(p.block_rows, LANES)):
        total.row_sum[i] += lost.row_sum[i]
    for i in range(p.block_rows * p.v_stride):
        total.acc[i] += lost.acc[i]
