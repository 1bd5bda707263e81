# Rotary positions (Su et al. 2021): each pair (a, b) of a row turned by its angle, (a cos - b sin, b cos + a sin).
# Pairs are neighbours (interleaved), or a number of the first half with the one in its place in the second.
#
#     tasks: some runs, taken by whichever thread is free
#         run: at most RUN numbers, rows next to each other; runs of the same table rows follow each other
#             for each row
#                 real rows in place      two vectors of pairs at a time; interleaved ones sorted in registers
#                 others                  PIECE pairs: loaded as reals, turned, stored
#                 columns behind the pairs are copied, unless x is out
#
# What it takes is the time of reading x and writing out. The axes are put in the order of x's memory for that, whatever
# their meaning; a run is short enough for its rows of the tables to stay in L1, whose next readers are other heads.
# Stores past the caches were tried: 0.65 of the time where out is warm and larger than the caches, 1.1 to 1.8 where it
# is new or small (Emerald Rapids).
#
# Of the two products of a number, the one with the other of the pair is rounded before the sum, whatever the compiler
# would rather fuse: the same bits in both pairings, in vectors and in their rest, wherever the rows lie.
#
# Errors: u of each product and of the sum, u = eps / 2. Nothing is read behind a row, or of a table but the rows that
# positions name, which cattn/_checks.py has looked at.

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    # From a row to what is asked for meanwhile, of x and of out: without, x of 32 MB takes 1.25 times as long in
    # place, and 1.35 times into `out` (Emerald Rapids)
    AHEAD_BYTES = 4096
    RUN = 8192          # numbers of x; flat from 1024 to 2**18 (Emerald Rapids)
    PIECE = 256         # pairs: two of these, and their cosines and sines, are 4 KB of float32
    TURN_FLOPS = 20     # the time of a number in the caches, in flops of attention


cdef struct Rotary:                     # 4 axes; those before the last in the order of x's memory
    Call* call
    Tensor x                            # IN
    Tensor out                          # OUT; x itself, or apart from it
    Tensor cos, sin                     # IN; of length 1 where all share it; with positions, axis 2 is a row's number
    const char* positions               # int64; NULL: the rows of cos lie as those of x
    Py_ssize_t position_stride[3]
    Py_ssize_t pairs
    bint interleaved, in_place, rows_in_place, tables_in_place
    Py_ssize_t run_rows, num_blocks     # rows of a run: so many of axis 2; blocks of these
    Py_ssize_t num_runs, range_runs     # in all, and in a task


cdef inline void turn(vf* two, vf cos, vf sin) noexcept nogil:
    """two (IN/OUT): the first and the second numbers of pairs."""
    cdef vf first = two[0]
    two[0] = vfma(cos, first, -vrounded(sin * two[1]))
    two[1] = vfma(cos, two[1], vrounded(sin * first))


cdef inline void turn_vectors(const bint INTERLEAVED, real* out, const real* x, Py_ssize_t apart, const real* cos,
                              const real* sin) noexcept nogil:
    """out (OUT) = LANES pairs of x, which may be out: two vectors, `apart` from each other."""
    cdef vf two[2]
    two[0], two[1] = vload(x), vload(x + apart)
    if INTERLEAVED:
        vunweave(two)
    turn(two, vload(cos), vload(sin))
    if INTERLEAVED:
        vweave(two, 2)
    vstore(out, two[0])
    vstore(out + apart, two[1])


cdef inline void turn_pairs(const bint INTERLEAVED, real* out, const real* x, Py_ssize_t half, const real* cos,
                            const real* sin, Py_ssize_t n) noexcept nogil:
    """out (OUT) = n pairs of x, which may be out; in halves, these are `half` apart. The last ones, less than a vector,
    by way of one."""
    cdef Py_ssize_t step = 2 * LANES if INTERLEAVED else LANES
    cdef Py_ssize_t apart = LANES if INTERLEAVED else half
    cdef real rest[4][MAX_LANES]
    while n >= LANES:
        turn_vectors(INTERLEAVED, out, x, apart, cos, sin)
        out, x, cos, sin = out + step, x + step, cos + LANES, sin + LANES
        n -= LANES
    if n:
        memset(rest, 0, sizeof(rest))
        memcpy(rest[2], cos, n * sizeof(real))
        memcpy(rest[3], sin, n * sizeof(real))
        if INTERLEAVED:
            memcpy(rest, x, 2 * n * sizeof(real))
            turn_vectors(INTERLEAVED, rest[0], rest[0], apart, rest[2], rest[3])
            memcpy(out, rest, 2 * n * sizeof(real))
        else:
            memcpy(rest[0], x, n * sizeof(real))
            memcpy(rest[1], x + half, n * sizeof(real))
            turn_vectors(INTERLEAVED, rest[0], rest[0], MAX_LANES, rest[2], rest[3])
            memcpy(out, rest[0], n * sizeof(real))
            memcpy(out + half, rest[1], n * sizeof(real))


cdef void turn_piece(const Rotary* r, char* out, const char* x, const real* cos, const real* sin, Py_ssize_t first,
                     Py_ssize_t n) noexcept nogil:
    """out (OUT) = n pairs of the row x from the one `first` on; of any stride and dtype."""
    cdef real two[2][PIECE]
    cdef Py_ssize_t x_step = r.x.stride[3], out_step = r.out.stride[3], pairs = r.pairs
    if r.interleaved:
        load_row(two[0], x + 2 * first * x_step, x_step, 2 * n, r.x.kind)
        turn_pairs(True, two[0], two[0], 0, cos, sin, n)
        store_row(out + 2 * first * out_step, out_step, two[0], 2 * n, r.out.kind)
        return
    load_row(two[0], x + first * x_step, x_step, n, r.x.kind)
    load_row(two[1], x + (pairs + first) * x_step, x_step, n, r.x.kind)
    turn_pairs(False, two[0], two[0], PIECE, cos, sin, n)
    store_row(out + first * out_step, out_step, two[0], n, r.out.kind)
    store_row(out + (pairs + first) * out_step, out_step, two[1], n, r.out.kind)


cdef void turn_row(const Rotary* r, char* out, const char* x, const char* cos, const char* sin) noexcept nogil:
    """out (OUT) = x, its pairs turned by this row of the tables."""
    cdef real cos_piece[PIECE]
    cdef real sin_piece[PIECE]
    cdef bint in_place = r.rows_in_place and r.tables_in_place
    cdef Py_ssize_t first = 0, n, most = RUN if in_place else PIECE
    cdef const real* c
    cdef const real* s
    while first < r.pairs:
        if first and stopped_by_signal(r.call):  # of a very long row
            return
        n = min(r.pairs - first, most)
        if r.tables_in_place:
            c, s = <const real*> cos + first, <const real*> sin + first
        else:
            load_row(cos_piece, cos + first * r.cos.stride[3], r.cos.stride[3], n, r.cos.kind)
            load_row(sin_piece, sin + first * r.sin.stride[3], r.sin.stride[3], n, r.sin.kind)
            c, s = cos_piece, sin_piece
        if not in_place:
            turn_piece(r, out, x, c, s, first, n)
        elif r.interleaved:
            turn_pairs(True, <real*> out + 2 * first, <const real*> x + 2 * first, 0, c, s, n)
        else:
            turn_pairs(False, <real*> out + first, <const real*> x + first, r.pairs, c, s, n)
        first += n


cdef void copy_rest(const Rotary* r, char* out, const char* x) noexcept nogil:
    """The columns behind the pairs, of any stride."""
    cdef Py_ssize_t size = size_of(r.x.kind), x_step = r.x.stride[3], out_step = r.out.stride[3]
    cdef Py_ssize_t n = r.x.length[3] - 2 * r.pairs
    x += 2 * r.pairs * x_step
    out += 2 * r.pairs * out_step
    if x_step == size == out_step:
        memcpy(out, x, n * size)
        return
    while n > 0:
        memcpy(out, x, size)
        out, x = out + out_step, x + x_step
        n -= 1


cdef void turn_run(const Rotary* r, Py_ssize_t number) noexcept nogil:
    """out (OUT): rows of one run."""
    cdef Py_ssize_t length = r.x.length[1], block = number // length % r.num_blocks
    cdef Py_ssize_t i = number // length // r.num_blocks, j = number % length, k
    cdef int64_t position
    cdef Py_ssize_t columns = r.x.length[3], step = r.x.stride[2], line, lines = 0
    if step == columns * size_of(r.x.kind) and r.out.stride[2] == step:     # rows one after the other
        lines = ceil_div(step, 64)
    cdef char* out
    cdef const char* x
    cdef const char* cos
    cdef const char* sin
    for k in range(block * r.run_rows, min((block + 1) * r.run_rows, r.x.length[2])):
        x, out = row_of(&r.x, i, j, k), row_of(&r.out, i, j, k)
        if r.positions == NULL:
            cos, sin = row_of(&r.cos, i, j, k), row_of(&r.sin, i, j, k)
        else:
            memcpy(&position, r.positions + i * r.position_stride[0] + j * r.position_stride[1]
                   + k * r.position_stride[2], sizeof(position))
            cos, sin = row_of(&r.cos, 0, 0, position), row_of(&r.sin, 0, 0, position)
        for line in range(lines):
            prefetch(x + AHEAD_BYTES + 64 * line)
            if not r.in_place:
                prefetch(out + AHEAD_BYTES + 64 * line)
        turn_row(r, out, x, cos, sin)
        if not r.in_place and 2 * r.pairs < columns:
            copy_rest(r, out, x)


cdef void turn_ranges(const void* what, char* scratch) noexcept nogil:
    """What one thread does of a Rotary."""
    cdef const Rotary* r = <const Rotary*> what
    cdef Py_ssize_t number = take_task(r.call), run
    cdef fp_mode before = own_mode()
    while number < r.call.num_tasks and not stopped_by_signal(r.call):
        for run in range(number * r.range_runs, min((number + 1) * r.range_runs, r.num_runs)):
            if stopped_by_signal(r.call):
                break
            turn_run(r, run)
        task_done(r.call)
        number = take_task(r.call)
    set_mode(before)
    await_others(r.call)


cdef void swap_axes(Tensor* t, int a, int b) noexcept nogil:
    t.length[a], t.length[b] = t.length[b], t.length[a]
    t.stride[a], t.stride[b] = t.stride[b], t.stride[a]


cdef inline Py_ssize_t step_along(const Tensor* t, int axis) noexcept nogil:
    """From one to the next, in bytes; as far as can be where there is one alone."""
    cdef Py_ssize_t stride = t.stride[axis]
    return PY_SSIZE_T_MAX if t.length[axis] == 1 else max(stride, -stride)


cdef void sort_axes(Rotary* r) noexcept nogil:
    """The three before the last (IN/OUT), by the steps of x: the longest first."""
    cdef int a, b
    for a in range(2):
        for b in range(2 - a):
            if step_along(&r.x, b) < step_along(&r.x, b + 1):
                swap_axes(&r.x, b, b + 1)
                swap_axes(&r.out, b, b + 1)
                if r.positions == NULL:
                    swap_axes(&r.cos, b, b + 1)
                    swap_axes(&r.sin, b, b + 1)
                else:
                    r.position_stride[b], r.position_stride[b + 1] = r.position_stride[b + 1], r.position_stride[b]


def rotary(x, cos, sin, const int64_t[:, :, :] positions, out, Kind kind, Kind table_kind, bint interleaved,
           Py_ssize_t num_threads):
    """out (OUT; as x, or x itself) = x (..., dim), turned. cos, sin: (rows, columns) behind positions, whose axes are
    those of x but the last; or, where that is None, as many axes as x, those of length 1 for all. num_threads: 0 for
    the default. cattn/_rotary.py has checked the arguments."""
    cdef Rotary r
    cdef Call call
    cdef double flops
    cdef int axis
    describe(&r.x, x, kind)
    describe(&r.out, out, kind)
    describe(&r.cos, cos, table_kind)
    describe(&r.sin, sin, table_kind)
    r.call, r.pairs, r.interleaved, r.positions = &call, r.cos.length[3], interleaved, NULL
    flops = TURN_FLOPS
    for axis in range(4):
        flops *= r.x.length[axis]
    if flops == 0:
        return
    if positions is not None:
        r.positions = <const char*> &positions[0, 0, 0]
    for axis in range(3):
        if r.positions != NULL:
            r.position_stride[axis] = positions.strides[axis] if positions.shape[axis] > 1 else 0
        elif r.cos.length[axis] == 1:
            r.cos.stride[axis] = r.sin.stride[axis] = 0
    sort_axes(&r)
    r.in_place = r.out.data == r.x.data
    r.rows_in_place = rows_are_real(&r.x) and rows_are_real(&r.out)
    r.tables_in_place = rows_are_real(&r.cos) and rows_are_real(&r.sin)
    r.run_rows = max(1, min(r.x.length[2], RUN // r.x.length[3]))
    r.num_blocks = ceil_div(r.x.length[2], r.run_rows)
    r.num_runs = r.x.length[0] * r.x.length[1] * r.num_blocks
    begin_call(&call, num_threads, flops)
    r.range_runs = max(1, r.num_runs // (TASKS_PER_THREAD * call.num_threads))
    call.num_tasks = call.unfinished = ceil_div(r.num_runs, r.range_runs)
    call.num_threads = min(call.num_threads, call.num_tasks)
    with nogil:
        in_threads(&call, turn_ranges, &r, NULL, 0)
    end_call(&call)
