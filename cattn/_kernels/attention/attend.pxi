# Who does which task.
#
#     plan: which kernel, how large the blocks of rows, how long the splits of the keys
#     scratch for each thread: the only large allocation
#     without the GIL:
#         many tasks      for each task, by whichever thread is free: its splits in order, merged; finish
#         few tasks       for each split of each task, by whichever thread is free; merged in order; finish
#
# Threads take tasks one by one (tasks.pxi): where a neighbour takes a core away, a static share of one head of 2048
# rows took 4.9 ms instead of 3.4.

cdef enum:
    EXP_FLOPS = 64             # an exp2 and its bookkeeping, a score
    SLOTS_PER_THREAD = 2       # parts that may wait to be merged: one of each thread, and as many where one is late


# The workspace is laid out anew for each task: a dozen additions, against a structure to keep.
cdef void locate(const Problem* p, Workspace* w, Task* task, char* scratch, Py_ssize_t number) noexcept nogil:
    """w, but for its queries, and task (OUT)."""
    cdef Py_ssize_t i
    carve(w, scratch, p)
    describe_task(p, number, task, w.lanes)
    for i in range(max(p.block_rows, LANES)):
        w.shrink[i] = 1.0
    w.again = False


cdef inline void expect(const Problem* p, Task* task, Py_ssize_t number, Py_ssize_t split) noexcept nogil:
    """task (OUT): the thread probably goes on with this split of task `number`. Where a window begins, only its rows
    know."""
    cdef Task following
    if p.window_left >= 0:
        return
    locate_task(p, number, &following)
    task.next_batch, task.next_kv_head, task.next_low = following.batch, following.kv_head, split * p.split_kv
    task.next_n = min(p.block_kv, p.seq_len_kv - task.next_low)
    task.next_head, task.next_query = following.head, following.query
    task.next_rows = min(following.num_rows, p.seq_len_q - following.query)


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
    return max(1, ceil_div(task.high, p.split_kv) - first_split(p, task))


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
        if stopped_by_signal(p.call):
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
    # Where tasks take equally long, a thread gets every num_threads-th.
    if number + p.call.num_threads < p.call.num_tasks:
        expect(p, &task, number + p.call.num_threads, 0)
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
        while atomic_read(&parts.left[part % parts.slots]) == part + 1 and not stopped_by_signal(p.call):
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
    cdef Py_ssize_t of_task = 0, next_task, following = number + p.call.num_threads
    while number - atomic_read(&parts.merged) >= parts.slots:
        if stopped_by_signal(p.call):
            return
        sched_yield()
    while number >= parts.first[of_task + 1]:
        of_task += 1
    locate(p, &w, &task, scratch, of_task)
    if following < p.call.num_tasks:
        next_task = of_task
        while following >= parts.first[next_task + 1]:
            next_task += 1
        expect(p, &task, next_task, following - parts.first[next_task])
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
    while number < p.call.num_tasks and not stopped_by_signal(p.call):
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
    if p.batch_size * p.num_kv_heads * p.group_size * p.seq_len_q == 0:
        return 0
    # Half the flops where causal, unknown here: what they decide is no precise thing.
    begin_call(&call, num_threads, <double> p.batch_size * p.num_kv_heads * p.group_size * p.seq_len_q * p.seq_len_kv
               * (2 * (p.head_dim + p.head_dim_v) + EXP_FLOPS))
    threads = call.num_threads
    p.parts = NULL
    plan(p, threads)
    call.num_tasks = num_tasks = p.batch_size * p.num_kv_heads * p.num_blocks
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
