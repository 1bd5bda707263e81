# Who does which task.
#
#     plan: which kernels, how large the blocks of rows, how long the splits of the keys
#     scratch for each thread: the only large allocation
#     without the GIL:
#         no task is long     for each task, by whichever thread is free: its splits in order, merged; finish
#         some are            those of one split as before; for each split of the others, by whichever thread is free;
#                             merged in order; finish
#
# Threads take tasks one by one (tasks.pxi): where a neighbour takes a core away, a static share of one head of 2048
# rows took 4.9 ms instead of 3.4.

cdef enum:
    EXP_FLOPS = 64             # an exp2 and its bookkeeping, a score
    SLOTS_PER_THREAD = 2       # parts that may wait to be merged: one of each thread, and as many where one is late
    MOST_PLANS = 5             # one for each decode_width

cdef struct Run:                        # what the threads of a call do
    Problem plans[MOST_PLANS]
    int num_plans
    Parts* parts                        # NULL: each thread does whole tasks
    Call* call


cdef inline Problem* plan_of(Run* run, Py_ssize_t* number) noexcept nogil:
    """number (IN: of a task of the call; OUT: of the plan)."""
    cdef int i = 0
    while number[0] >= run.plans[i].num_tasks:
        number[0] -= run.plans[i].num_tasks
        i += 1
    return &run.plans[i]


# The workspace is laid out anew for each task: a dozen additions, against a structure to keep.
cdef void locate(const Problem* p, Workspace* w, Task* task, char* scratch, Py_ssize_t number) noexcept nogil:
    """w, but for its queries, and task (OUT)."""
    cdef Py_ssize_t i
    carve(w, scratch, p)
    describe_task(p, number, task, w.lanes)
    for i in range(max(task.lanes, LANES)):
        w.shrink[i] = 1.0
    w.again = False


cdef inline void expect(const Problem* p, Task* task, Py_ssize_t number, Py_ssize_t split) noexcept nogil:
    """task (OUT): the thread probably goes on with this split of the plan's task `number`. Where a window begins, only
    its rows know."""
    cdef Task following
    if p.window_left >= 0 or p.kv_starts != NULL or number >= p.num_tasks:
        return
    locate_task(p, number, &following)
    task.next_batch, task.next_kv_head, task.next_low = following.batch, following.kv_head, split * p.split_kv
    task.next_n = max(0, min(p.block_kv, num_keys(p, following.batch) - task.next_low))
    task.next_row = following.first_row


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
    reset(p, task, state)
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
            reset(p, task, &w.lost)
        do_split(p, w, task, &w.part, split)
        merge(p, task, &w.total, &w.lost, &w.part)
    if num_splits(p, task) > 1:
        add_lost(p, task, &w.total, &w.lost)
    return finish(p, w, task, &w.total)


cdef void do_task(const Problem* p, Py_ssize_t number, char* scratch) noexcept nogil:
    cdef Workspace w
    cdef Task task
    locate(p, &w, &task, scratch, number)
    # Where tasks take equally long, a thread gets every num_threads-th.
    expect(p, &task, number + p.call.num_threads, 0)
    pack(p, &w, &task)
    # Twice for the rare block with a row whose values overflow: see store_result.
    if do_splits(p, &w, &task):
        w.again = True
        do_splits(p, &w, &task)


# Where a task is too long for one thread, a part is one split of a task. Parts are numbered in the order in which they
# are merged: the tasks one after the other, their splits likewise. Threads take them in that order, each leaves its
# state in one of a few slots, and whoever finds the next one in line there merges it, by the same steps as do_splits;
# what is a whole task is done as such. A thread that is a whole round of slots ahead waits: scratch does not grow with
# the number of keys.

cdef struct Parts:
    Py_ssize_t* first       # [num_tasks + 1]: a task's first part
    char* states            # [slots + 2]: part i leaves its state in slot i % slots
    Py_ssize_t state_size   # of a slot
    Py_ssize_t* left        # [slots] atomic: i + 1 when part i has
    Py_ssize_t slots, num_tasks
    Py_ssize_t task         # that is being merged; its total and what this has lost are behind the slots
    Py_ssize_t merged       # atomic: how many parts are
    Py_ssize_t requests     # atomic: threads that have asked for a merge; above 0, one is at it


cdef inline void place_slot(const Problem* p, const Parts* parts, Py_ssize_t slot, State* s) noexcept nogil:
    place_state(s, parts.states + slot * parts.state_size, p)


cdef inline bint is_whole(const Parts* parts, Py_ssize_t task) noexcept nogil:
    return parts.first[task + 1] - parts.first[task] == 1


cdef Py_ssize_t task_of(const Parts* parts, Py_ssize_t part) noexcept nogil:
    """The task that a part is of."""
    cdef Py_ssize_t low = 0, high = parts.num_tasks, middle
    while high - low > 1:
        middle = (low + high) // 2
        if parts.first[middle] <= part:
            low = middle
        else:
            high = middle
    return low


cdef void merge_part(Run* run, Parts* parts, Py_ssize_t part, char* scratch) noexcept nogil:
    """The next in line; after the last of a task, the rest of the task."""
    cdef Workspace w
    cdef Task task
    cdef State state, total, lost
    cdef bint is_first, is_last
    cdef Py_ssize_t number
    cdef const Problem* p
    if part == parts.first[parts.task + 1]:
        parts.task += 1
    if is_whole(parts, parts.task):
        return
    is_first, is_last = part == parts.first[parts.task], part + 1 == parts.first[parts.task + 1]
    number = parts.task
    p = plan_of(run, &number)
    locate(p, &w, &task, scratch, number)
    place_slot(p, parts, part % parts.slots, &state)
    place_slot(p, parts, parts.slots, &total)
    place_slot(p, parts, parts.slots + 1, &lost)
    if is_first:
        memcpy(total.acc, state.acc, state_size(p))
        reset(p, &task, &lost)
    else:
        merge(p, &task, &total, &lost, &state)
    if not is_last:
        return
    add_lost(p, &task, &total, &lost)
    if finish(p, &w, &task, &total):
        pack(p, &w, &task)
        w.again = True
        do_splits(p, &w, &task)


cdef void merge_parts(Run* run, Parts* parts, char* scratch) noexcept nogil:
    """All that are next in line, unless another thread is at it: that one then looks again."""
    cdef Py_ssize_t requests = 1, part
    if atomic_add(&parts.requests, 1):
        return
    while requests:
        part = atomic_read(&parts.merged)
        while atomic_read(&parts.left[part % parts.slots]) == part + 1 and not stopped_by_signal(run.call):
            merge_part(run, parts, part, scratch)
            part += 1
            atomic_set(&parts.merged, part)
            task_done(run.call)
        requests = atomic_add(&parts.requests, -requests) - requests  # that came meanwhile


cdef void do_split_of(Run* run, Parts* parts, Py_ssize_t of_task, Py_ssize_t part, char* scratch) noexcept nogil:
    """A part, one of several of the task: its state is left in a slot."""
    cdef Workspace w
    cdef Task task
    cdef State state
    cdef Py_ssize_t number = of_task, next_part = part + run.call.num_threads, next_task, next_number
    cdef const Problem* p = plan_of(run, &number)
    locate(p, &w, &task, scratch, number)
    if next_part < run.call.num_tasks:
        next_task = next_number = task_of(parts, next_part)
        if plan_of(run, &next_number) == p:
            expect(p, &task, next_number, next_part - parts.first[next_task])
    pack(p, &w, &task)
    place_slot(p, parts, part % parts.slots, &state)
    do_split(p, &w, &task, &state, first_split(p, &task) + part - parts.first[of_task])


cdef void do_part(Run* run, Parts* parts, Py_ssize_t part, char* scratch) noexcept nogil:
    cdef Py_ssize_t task = task_of(parts, part), number = task
    cdef const Problem* p
    while part - atomic_read(&parts.merged) >= parts.slots:
        if stopped_by_signal(run.call):
            return
        sched_yield()
    if is_whole(parts, task):
        p = plan_of(run, &number)
        do_task(p, number, scratch)
    else:
        do_split_of(run, parts, task, part, scratch)
    atomic_set(&parts.left[part % parts.slots], part + 1)
    merge_parts(run, parts, scratch)


cdef void do_tasks(const void* what, char* scratch) noexcept nogil:
    """What one thread does of a Run."""
    cdef Run* run = <Run*> what
    cdef Py_ssize_t number = take_task(run.call)
    cdef fp_mode before = own_mode()
    cdef const Problem* p
    while number < run.call.num_tasks and not stopped_by_signal(run.call):
        if run.parts == NULL:
            p = plan_of(run, &number)
            do_task(p, number, scratch)
            task_done(run.call)
        else:
            do_part(run, run.parts, number, scratch)
        number = take_task(run.call)
    set_mode(before)
    await_others(run.call)


cdef Py_ssize_t count_parts(Run* run, Parts* parts, char* scratch) noexcept nogil:
    """parts.first (OUT); returns the number of parts: of the keys that are seen."""
    cdef Workspace w
    cdef Task task
    cdef const Problem* p
    cdef Py_ssize_t number, of_plan
    parts.first[0] = 0
    for number in range(parts.num_tasks):
        of_plan = number
        p = plan_of(run, &of_plan)
        carve(&w, scratch, p)
        describe_task(p, of_plan, &task, w.lanes)
        parts.first[number + 1] = parts.first[number] + num_splits(p, &task)
    return parts.first[parts.num_tasks]


cdef inline int width_of_plan(int i) noexcept nogil:
    """0, 8, 4, 2, 1"""
    return 16 >> i if i else 0


cdef double plan_all(Run* run, const Problem* p, Py_ssize_t num_threads, double* longest_task) noexcept nogil:
    """run.plans (OUT) of a described problem: one for each decode_width that a batch row asks for, most rows first.
    Returns the work of all tasks; longest_task (OUT): of one."""
    cdef Py_ssize_t longest[MOST_PLANS]     # rows of a batch row
    cdef Py_ssize_t batch, rows, different = p.batch_size if lengths_differ(p) else min(1, p.batch_size)
    cdef double work = 0
    cdef int i
    cdef Problem* q
    for i in range(MOST_PLANS):
        longest[i] = 0
    for batch in range(different):
        rows = num_rows(p, batch)
        for i in range(MOST_PLANS):
            if rows and width_of(rows) == width_of_plan(i):
                longest[i] = max(longest[i], rows)
    run.num_plans = 0
    longest_task[0] = 0
    for i in range(MOST_PLANS):
        if longest[i]:
            q = &run.plans[run.num_plans]
            q[0] = p[0]
            plan(q, width_of_plan(i), longest[i], num_threads)
            run.num_plans += 1
            for batch in range(different):
                if is_planned(q, batch):
                    rows = num_rows(q, batch)
                    longest_task[0] = max(longest_task[0], work_of(q, min(rows, q.block_rows), batch))
                    work += work_of(q, rows, batch) * (p.batch_size // p.folded // different) * p.num_kv_heads
    return work


cdef double count_pairs(const Problem* p) noexcept nogil:
    """Of a query row and a key, of one head. Half of them where causal, unknown here: what they decide is no precise
    thing."""
    cdef Py_ssize_t batch
    cdef double pairs = 0
    if not lengths_differ(p):
        return <double> p.batch_size * p.seq_len_q * p.seq_len_kv
    for batch in range(p.batch_size):
        pairs += <double> num_queries(p, batch) * num_keys(p, batch)
    return pairs


cdef int run(const Problem* p, Py_ssize_t num_threads) except -1:
    """Plans a described problem and does it."""
    cdef Workspace w
    cdef Call call
    cdef Parts parts
    cdef Run run
    cdef Py_ssize_t threads, slot, num_tasks = 0
    cdef size_t scratch_size = 0, lists_size, shared_size
    cdef double work, longest_task
    cdef Sequence* sequences
    cdef char* scratch
    cdef int i
    begin_call(&call, num_threads, count_pairs(p) * p.num_kv_heads * p.group_size
               * (2 * (p.head_dim + p.head_dim_v) + EXP_FLOPS))
    threads = call.num_threads
    run.call, run.parts = &call, NULL
    work = plan_all(&run, p, threads, &longest_task)
    parts.state_size = 0
    for i in range(run.num_plans):
        run.plans[i].call, run.plans[i].parts = &call, NULL
        num_tasks += run.plans[i].num_tasks
        scratch_size = max(scratch_size, carve(&w, NULL, &run.plans[i]))
        parts.state_size = max(parts.state_size, state_size(&run.plans[i]))
    if num_tasks == 0:
        end_call(&call)
        return 0
    call.num_tasks = num_tasks
    lists_size = round_up(p.batch_size * sizeof(Sequence), 64) if lengths_differ(p) else 0
    shared_size = 0
    if (threads > 1 and longest_task * TASKS_PER_THREAD * threads > work and run.plans[0].num_splits > 1
            and p.weights == NULL):
        run.parts = &parts
        parts.slots, parts.num_tasks = SLOTS_PER_THREAD * threads, num_tasks
        shared_size = (parts.slots + 2) * parts.state_size + (parts.slots + num_tasks + 1) * sizeof(Py_ssize_t)
    else:
        threads = min(threads, num_tasks)
    # 64-byte pieces from its start on: no vector of packed queries, scores or acc crosses a cache line.
    scratch = take_scratch(threads * scratch_size + lists_size + shared_size)
    if scratch == NULL:
        end_call(&call)
        raise MemoryError(f"attention: no memory for {threads} x {scratch_size} bytes of scratch")
    if lists_size:
        sequences = <Sequence*> (scratch + threads * scratch_size)
        for i in range(run.num_plans):
            sequences += list_sequences(&run.plans[i], sequences)
    if run.parts != NULL:
        parts.states = scratch + threads * scratch_size + lists_size
        parts.left = <Py_ssize_t*> (parts.states + (parts.slots + 2) * parts.state_size)
        for slot in range(parts.slots):
            parts.left[slot] = 0
        parts.first = parts.left + parts.slots
        parts.task = parts.merged = parts.requests = 0
        for i in range(run.num_plans):
            run.plans[i].parts = &parts
        call.num_tasks = count_parts(&run, &parts, scratch)
        threads = min(threads, call.num_tasks)
    call.unfinished = call.num_tasks
    call.num_threads = threads
    with nogil:
        in_threads(&call, do_tasks, &run, scratch, scratch_size)
    give_scratch(scratch)
    end_call(&call)
