# The linear layer, out = x W^T + bias. W is read in the layout that state dicts have, (out_features, in_features), and
# not packed: packing is what a BLAS spends its time on when each number of W is used for few rows.
#
#     for each block of rows of x
#         x as reals: packed as X^T, many rows in panels of up to 3 vectors of them (in parallel)
#         for each task: FEATURES rows of W (in parallel)
#             few rows    for each LANES of them, for each BLOCK_DIMS dimensions
#                             LANES dimensions of W transposed in registers,
#                             out[row][features] += W vectors x X broadcast
#             many rows   for each panel, for each BLOCK_DIMS dimensions (W copied: these first), for each ROWS features
#                             out^T[feature][row] += W broadcast x X^T vectors
#             out, narrowed
#
# A number of out is one chain of FMAs over each BLOCK_DIMS dimensions, and the sum of bias and these chains, one after
# the other: whichever way, so that the bits of a row depend on no other row. With one row of x the second way would be
# bound by its broadcasts, one FMA a number of W, and the first by memory.

cdef enum:
    # Rows of W in a task: a multiple of every ROWS, and tasks enough for some threads, not for dozens
    FEATURES = 48
    BLOCK_DIMS = 128  # of a panel: half of L1. Whole rows of W at once were 5 to 10 % slower at 16 rows of X
    W_STRIDE = 144    # of BLOCK_DIMS dimensions that are copied: rows in different sets of L1
    # Numbers of x in a block of rows: 16 MB of float32, and tasks stay short where rows are very long
    MAX_PACKED = 1 << 22


cdef inline bint few_rows(Py_ssize_t rows) noexcept nogil:
    """Transposing W takes as long as multiplying it with LANES / 2 rows."""
    return rows <= LANES // 2


cdef inline void linear_tile(const int ROWS, const int VECTORS, real* tile, const real* x, const real* weight,
                             Py_ssize_t w_stride, Py_ssize_t ahead, Py_ssize_t dims) noexcept nogil:
    """tile[ROWS][width] += `dims` dimensions of ROWS features of the panel's rows. What lies `ahead` numbers from there
    is prefetched on the way, a line at a time: it comes from memory, and the hardware's own streams stop at each row.
    0: nothing is."""
    cdef vf acc[MAX_TILE]
    cdef Py_ssize_t line = 64 // <Py_ssize_t> sizeof(real)
    cdef Py_ssize_t d = 0
    cdef int i, r
    for i in range(ROWS * VECTORS):
        acc[i] = vset1(<real> 0.0)
    while d < dims:
        if ahead:
            for r in range(ROWS):
                prefetch(weight + r * w_stride + d + ahead)
        multiply(ROWS, VECTORS, acc, weight + d, w_stride, 1, x + d * VECTORS * LANES, min(line, dims - d))
        d += line
    for i in range(ROWS * VECTORS):
        vstore(tile + i * LANES, vload(tile + i * LANES) + acc[i])


cdef inline void linear_panel(const int VECTORS, real* tile, const real* x, const real* weight, Py_ssize_t w_stride,
                              Py_ssize_t ahead, Py_ssize_t dims, Py_ssize_t n) noexcept nogil:
    """tile[n][width] (IN/OUT): `dims` dimensions of n features, for one panel."""
    cdef int ROWS = 8 if VECTORS == 1 or TILE_ROWS == 8 else 6 if VECTORS == 2 else 4
    cdef Py_ssize_t width = VECTORS * LANES
    cdef Py_ssize_t o = 0
    while o + ROWS <= n:
        if ROWS == 8:
            linear_tile(8, VECTORS, tile + o * width, x, weight, w_stride, ahead, dims)
        elif ROWS == 6:
            linear_tile(6, VECTORS, tile + o * width, x, weight, w_stride, ahead, dims)
        else:
            linear_tile(4, VECTORS, tile + o * width, x, weight, w_stride, ahead, dims)
        o += ROWS
        weight += ROWS * w_stride
    while o < n:
        linear_tile(1, VECTORS, tile + o * width, x, weight, w_stride, ahead, dims)
        o += 1
        weight += w_stride


cdef inline void linear_columns(const int ROWS, real* tile, const real* x, const real* weight, Py_ssize_t w_stride,
                                Py_ssize_t dims, const Soon* soon) noexcept nogil:
    """tile[ROWS][LANES] (IN/OUT): `dims` dimensions of LANES features."""
    cdef vf acc[8]
    cdef int r
    for r in range(ROWS):
        acc[r] = vset1(<real> 0.0)
    multiply_columns(F64 if IS_DOUBLE else F32, ROWS, 1, acc, <const char*> weight, w_stride * sizeof(real), x, dims,
                     soon)
    for r in range(ROWS):
        vstore(tile + r * LANES, vload(tile + r * LANES) + acc[r])


cdef struct Taken:
    Py_ssize_t tasks                # atomic; of a thread's share, that somebody has begun
    char apart[56]                  # each in a cache line of its own


cdef struct Linear:
    Tensor x                        # IN (1, batch, seq, in_features)
    Tensor weight                   # IN (1, 1, out_features, in_features)
    Tensor bias                     # IN (1, 1, 1, out_features), or no data
    Tensor out                      # OUT (1, batch, seq, out_features)
    Py_ssize_t seq, rows            # rows of x in a batch row, and in all
    Py_ssize_t in_features, out_features
    Py_ssize_t block, first_row     # rows of x at a time; the first of those that are worked on
    bint w_in_place                 # W is read where it lies: rows of adjacent reals
    real* packed                    # x of the block: [panel][in_features][width], few rows: [in_features][row]
    Taken* taken                    # one per thread, of the block's tasks
    Call* call


cdef struct LinearWorkspace:        # one per thread, SCRATCH
    real* tile                      # [panel][FEATURES][width], few rows: [row][LANES]
    real* weight                    # [FEATURES][W_STRIDE], where W is not
    real* rows                      # [MAX_WIDTH][BLOCK_DIMS] or [MAX_WIDTH][FEATURES]


cdef size_t carve_linear(LinearWorkspace* b, char* base, const Linear* l) noexcept nogil:
    """Lays the scratch of a thread out from `base` on; returns its size in bytes."""
    cdef size_t size = 0
    b.tile = <real*> take(base, &size, FEATURES * (l.block + MAX_WIDTH) * sizeof(real))
    b.weight = <real*> take(base, &size, FEATURES * W_STRIDE * sizeof(real))
    b.rows = <real*> take(base, &size, MAX_WIDTH * BLOCK_DIMS * sizeof(real))
    return size


cdef inline char* row_number(const Linear* l, const Tensor* t, Py_ssize_t row) noexcept nogil:
    return row_of(t, 0, row // l.seq, row % l.seq)


cdef inline bint rows_are_even(const Linear* l, const Tensor* t, Py_ssize_t first_row, Py_ssize_t n) noexcept nogil:
    """True where these rows are reals in place and equally far apart, also where they are of several batch rows."""
    return rows_are_real(t) and (
        row_number(l, t, first_row + n - 1) == row_number(l, t, first_row) + (n - 1) * t.stride[2])


cdef void pack_dims(const Linear* l, char* scratch, Py_ssize_t first_row, Py_ssize_t rows,
                    Py_ssize_t first) noexcept nogil:
    """BLOCK_DIMS dimensions of l.packed (OUT), from `first` on; lanes past the last row are 0."""
    cdef Py_ssize_t dims = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS)
    cdef Py_ssize_t vectors = ceil_div(rows, LANES), width, n, r
    cdef real* packed = l.packed
    cdef LinearWorkspace b
    carve_linear(&b, scratch, l)
    if few_rows(rows):
        width = padded_rows(rows)
        for r in range(width):
            load_row(b.rows, row_number(l, &l.x, first_row + min(r, rows - 1)) + first * l.x.stride[3], l.x.stride[3],
                     dims, l.x.kind)
            for n in range(dims):
                packed[(first + n) * width + r] = b.rows[n]
        return
    while vectors > 0:
        width = panel_vectors(PANEL_VECTORS, vectors) * LANES
        n = min(rows, width)
        if n < width:
            memset(packed + first * width, 0, width * dims * sizeof(real))
        if rows_are_even(l, &l.x, first_row, n):
            transpose(packed + first * width, width, <const real*> row_number(l, &l.x, first_row) + first,
                      l.x.stride[2] // <Py_ssize_t> sizeof(real), n, dims)
        else:
            for r in range(n):
                load_row(b.rows + r * BLOCK_DIMS, row_number(l, &l.x, first_row + r) + first * l.x.stride[3],
                         l.x.stride[3], dims, l.x.kind)
            transpose(packed + first * width, width, b.rows, BLOCK_DIMS, n, dims)
        packed += width * l.in_features
        first_row += width
        rows -= width
        vectors -= width // LANES


cdef void load_linear_bias(const Linear* l, real* bias, Py_ssize_t feature, Py_ssize_t n) noexcept nogil:
    """bias (OUT)[FEATURES] of n features, 0 behind them and where there is none."""
    cdef Py_ssize_t o
    for o in range(FEATURES):
        bias[o] = 0.0
    if l.bias.data != NULL:
        load_row(bias, l.bias.data + feature * l.bias.stride[3], l.bias.stride[3], n, l.bias.kind)


cdef void few_features(const Linear* l, const LinearWorkspace* b, Py_ssize_t first_row, Py_ssize_t rows,
                       Py_ssize_t feature, Py_ssize_t n) noexcept nogil:
    """out[first_row : + rows][feature : + n] (OUT): few rows, at most LANES features. All dimensions of these after the
    other: each row of W is one stream from memory."""
    cdef Py_ssize_t first = 0, r, dims, padded = padded_rows(rows), w_stride
    cdef bint in_place = l.w_in_place and n == LANES
    cdef const char* weight = row_of(&l.weight, 0, 0, feature)
    cdef const real* w
    cdef const real* x = l.packed
    cdef real* tile = b.tile
    cdef Soon soon
    soon.item = soon.pitch = l.weight.stride[3]
    soon.step = l.weight.stride[2]
    load_linear_bias(l, b.rows, feature, n)
    for r in range(padded):
        vstore(tile + r * LANES, vload(b.rows))
    while first < l.in_features:
        if stopped_by_signal(l.call):
            return
        dims = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS)
        # Asked for: the next dimensions, in the end the first ones of the next features.
        soon.lines, soon.bytes = weight + dims * soon.item, dims * soon.item
        if first + dims == l.in_features:
            soon.lines = weight - first * soon.item + LANES * soon.step
            if feature + 2 * LANES > l.out_features:
                soon.bytes = 0
        w, w_stride = <const real*> weight, l.weight.stride[2] // <Py_ssize_t> sizeof(real)
        if not in_place:
            w, w_stride = b.weight, W_STRIDE
            for r in range(n):
                load_row(b.weight + r * W_STRIDE, weight + r * l.weight.stride[2], l.weight.stride[3], dims,
                         l.weight.kind)
            memset(b.weight + n * W_STRIDE, 0, (LANES - n) * W_STRIDE * sizeof(real))
        if padded == 1:
            linear_columns(1, tile, x, w, w_stride, dims, &soon)
        elif padded == 2:
            linear_columns(2, tile, x, w, w_stride, dims, &soon)
        elif padded == 4:
            linear_columns(4, tile, x, w, w_stride, dims, &soon)
        else:
            linear_columns(8, tile, x, w, w_stride, dims, &soon)
        x += dims * padded
        weight += dims * l.weight.stride[3]
        first += dims
    for r in range(rows):
        store_row(row_number(l, &l.out, first_row + r) + feature * l.out.stride[3], l.out.stride[3], tile + r * LANES,
                  n, l.out.kind)


cdef inline void multiply_panel(int panel, real* tile, const real* x, const real* w, Py_ssize_t w_stride,
                                Py_ssize_t ahead, Py_ssize_t dims, Py_ssize_t n) noexcept nogil:
    if panel == 1:
        linear_panel(1, tile, x, w, w_stride, ahead, dims, n)
    elif PANEL_VECTORS == 2 or panel == 2:
        linear_panel(2, tile, x, w, w_stride, ahead, dims, n)
    else:
        linear_panel(3, tile, x, w, w_stride, ahead, dims, n)


cdef void multiply_in_place(const Linear* l, const LinearWorkspace* b, Py_ssize_t rows, Py_ssize_t feature,
                            Py_ssize_t n) noexcept nogil:
    """b.tile (IN/OUT): n features. All dimensions of a panel after the other, so that its sums stay in L1: block of W
    after block of W takes 6 % longer for a batch (width 768, Intel). With the first panel, memory is asked for the next
    dimensions of W, or for the first of the next FEATURES."""
    cdef Py_ssize_t vectors = ceil_div(rows, LANES), first, width, dims, ahead
    cdef Py_ssize_t w_stride = l.weight.stride[2] // <Py_ssize_t> sizeof(real)
    cdef const real* w = <const real*> row_of(&l.weight, 0, 0, feature)
    cdef const real* x = l.packed
    cdef real* tile = b.tile
    cdef int panel
    while vectors > 0:
        panel = panel_vectors(PANEL_VECTORS, vectors)
        width = panel * LANES
        first = 0
        while first < l.in_features:
            if stopped_by_signal(l.call):
                return
            dims = ahead = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS)
            if tile != b.tile:
                ahead = 0
            elif first + dims == l.in_features:
                ahead = FEATURES * w_stride - first if feature + 2 * FEATURES <= l.out_features else 0
            multiply_panel(panel, tile, x + first * width, w + first, w_stride, ahead, dims, n)
            first += BLOCK_DIMS
        tile += FEATURES * width
        x += width * l.in_features
        vectors -= panel


cdef void multiply_copied(const Linear* l, const LinearWorkspace* b, Py_ssize_t rows, Py_ssize_t feature,
                          Py_ssize_t n) noexcept nogil:
    """As multiply_in_place, of a W that is copied as reals: some dimensions, once for all panels."""
    cdef Py_ssize_t left, first = 0, r, width, line, dims, ahead
    cdef const char* weight = row_of(&l.weight, 0, 0, feature)
    cdef const real* x
    cdef real* tile
    cdef int panel
    while first < l.in_features:
        if stopped_by_signal(l.call):
            return
        dims = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS)
        ahead = (dims if first + dims < l.in_features else 0) * l.weight.stride[3]
        for r in range(n):
            if 0 < ahead <= BLOCK_DIMS * <Py_ssize_t> sizeof(real):  # adjacent numbers
                for line in range(0, ahead, 64):
                    prefetch(weight + r * l.weight.stride[2] + ahead + line)
            load_row(b.weight + r * W_STRIDE, weight + r * l.weight.stride[2], l.weight.stride[3], dims,
                     l.weight.kind)
        tile, x, left = b.tile, l.packed, ceil_div(rows, LANES)
        while left > 0:
            panel = panel_vectors(PANEL_VECTORS, left)
            width = panel * LANES
            multiply_panel(panel, tile, x + first * width, b.weight, W_STRIDE, 0, dims, n)
            tile += FEATURES * width
            x += width * l.in_features
            left -= panel
        weight += dims * l.weight.stride[3]
        first += dims


cdef void many_features(const Linear* l, const LinearWorkspace* b, Py_ssize_t first_row, Py_ssize_t rows,
                        Py_ssize_t feature, Py_ssize_t n) noexcept nogil:
    """out[first_row : + rows][feature : + n] (OUT): many rows, at most FEATURES features."""
    cdef Py_ssize_t vectors = ceil_div(rows, LANES), width, o, r
    cdef real* tile = b.tile
    load_linear_bias(l, b.rows, feature, n)
    while vectors > 0:
        width = panel_vectors(PANEL_VECTORS, vectors) * LANES
        for o in range(n):
            for r in range(width // LANES):
                vstore(tile + o * width + r * LANES, vset1(b.rows[o]))
        tile += FEATURES * width
        vectors -= width // LANES
    if l.w_in_place:
        multiply_in_place(l, b, rows, feature, n)
    else:
        multiply_copied(l, b, rows, feature, n)
    tile = b.tile
    while rows > 0:
        width = panel_vectors(PANEL_VECTORS, ceil_div(rows, LANES)) * LANES
        if rows_are_even(l, &l.out, first_row, min(width, rows)):
            transpose(<real*> row_number(l, &l.out, first_row) + feature, l.out.stride[2] // <Py_ssize_t> sizeof(real),
                      tile, width, n, min(width, rows))
        else:
            transpose(b.rows, FEATURES, tile, width, n, min(width, rows))
            for r in range(min(width, rows)):
                store_row(row_number(l, &l.out, first_row + r) + feature * l.out.stride[3], l.out.stride[3],
                          b.rows + r * FEATURES, n, l.out.kind)
        tile += FEATURES * width
        first_row += width
        rows -= width


cdef void do_features(const Linear* l, char* scratch, Py_ssize_t first_row, Py_ssize_t rows,
                      Py_ssize_t feature) noexcept nogil:
    """out[first_row : + rows][feature : + FEATURES] (OUT)"""
    cdef Py_ssize_t end = min(feature + FEATURES, l.out_features)
    cdef LinearWorkspace b
    carve_linear(&b, scratch, l)
    if not few_rows(rows):
        many_features(l, &b, first_row, rows, feature, end - feature)
        return
    while feature < end:
        few_features(l, &b, first_row, rows, feature, min(<Py_ssize_t> LANES, end - feature))
        feature += LANES


cdef void do_rows(const void* what, char* scratch) noexcept nogil:
    """What one thread does for a block of rows of a Linear: its share of packing x, then, when all have, its share of
    the features, then what others have not begun of theirs. A share is rows of W that follow each other, the same from
    call to call: they stay in the thread's caches, and what it prefetches is what it takes next. Turn by turn, 16 rows
    of width 384 or 768 take 12 to 18 % longer (two threads of a Xeon). The caller waits for the others in the region's
    own barrier, where it sees no signal: a task takes milliseconds."""
    cdef const Linear* problem = <const Linear*> what
    cdef Py_ssize_t first_row = problem.first_row, rows = min(problem.block, problem.rows - first_row)
    cdef Py_ssize_t num_blocks = ceil_div(problem.in_features, BLOCK_DIMS)
    cdef Py_ssize_t num_tasks = ceil_div(problem.out_features, FEATURES)
    # Not as many as were asked for: OMP_DYNAMIC. And one thread may be any of somebody else's region.
    cdef Py_ssize_t threads = CATTN_TEAM if problem.call.num_threads > 1 else 1
    cdef Py_ssize_t own = threadid() if threads > 1 else 0
    cdef Py_ssize_t number = own, turn, share, first, count
    cdef fp_mode before = own_mode()
    while number < num_blocks and not stopped_by_signal(problem.call):
        pack_dims(problem, scratch, first_row, rows, number * BLOCK_DIMS)
        number += threads
    if threads > 1:
        await_team()
    for turn in range(threads):
        share = (own + turn) % threads
        first = share * num_tasks // threads
        count = (share + 1) * num_tasks // threads - first
        while atomic_read(&problem.taken[share].tasks) < count and not stopped_by_signal(problem.call):
            number = atomic_add(&problem.taken[share].tasks, 1)
            if number < count:
                do_features(problem, scratch, first_row, rows, (first + number) * FEATURES)
    set_mode(before)


cdef int describe_linear(Linear* l, x, weight, bias, out, Kind kind, Kind weight_kind) except -1:
    """l (OUT), but for what is planned; ValueError where the shapes do not fit together."""
    describe(&l.x, x, kind)
    describe(&l.weight, weight, weight_kind)
    describe(&l.out, out, kind)
    l.bias.data = NULL
    if bias is not None:
        describe(&l.bias, bias, kind)
    l.seq, l.rows = l.x.length[2], l.x.length[1] * l.x.length[2]
    l.in_features, l.out_features = l.weight.length[3], l.weight.length[2]
    if (l.x.length[3] != l.in_features or l.out.length[3] != l.out_features or l.x.length[1] != l.out.length[1]
            or l.x.length[2] != l.out.length[2] or (bias is not None and l.bias.length[3] != l.out_features)
            or not l.x.length[0] == l.out.length[0] == l.weight.length[0] == l.weight.length[1] == 1
            or (bias is not None and not l.bias.length[0] == l.bias.length[1] == l.bias.length[2] == 1)):
        raise ValueError(f"linear: x of shape {x.shape}, weight of shape {weight.shape}, bias of shape "
                         f"{None if bias is None else bias.shape} and out of shape {out.shape} do not fit together")
    return 0


def linear(x, weight, bias, out, Kind kind, Kind weight_kind, Py_ssize_t num_threads):
    """out[row][o] (OUT) = bias[o] + sum over d of x[row][d] * weight[o][d], in arrays of 4 axes as Linear says; bias
    may be None. num_threads: 0 for the default."""
    cdef Linear l
    cdef LinearWorkspace b
    cdef Call call
    cdef Py_ssize_t rows
    cdef size_t packed_size, taken_size, workspace_size
    cdef char* scratch
    cdef char* workspaces
    describe_linear(&l, x, weight, bias, out, kind, weight_kind)
    if l.rows == 0 or l.out_features == 0:
        return
    l.block = min(l.rows, <Py_ssize_t> MAX_ROWS, max(LANES // 2, MAX_PACKED // max(1, l.in_features)))
    l.w_in_place = rows_are_real(&l.weight)
    begin_call(&call, num_threads, 2.0 * l.rows * l.in_features * l.out_features)
    l.call = &call
    call.num_threads = min(call.num_threads, ceil_div(l.out_features, FEATURES))
    rows = padded_rows(l.block) if few_rows(l.block) else round_up(l.block, LANES)
    packed_size = round_up(rows * l.in_features * sizeof(real), 64)
    taken_size = call.num_threads * sizeof(Taken)
    workspace_size = carve_linear(&b, NULL, &l)
    scratch = take_scratch(packed_size + taken_size + call.num_threads * workspace_size)
    if scratch == NULL:
        end_call(&call)
        raise MemoryError(f"linear: no memory for a copy of {l.block} x {l.in_features} numbers")
    l.packed, l.taken = <real*> scratch, <Taken*> (scratch + packed_size)
    workspaces = scratch + packed_size + taken_size
    with nogil:
        l.first_row = 0
        while l.first_row < l.rows and not stopped_by_signal(&call):
            memset(l.taken, 0, taken_size)
            in_threads(&call, do_rows, &l, workspaces, workspace_size)
            l.first_row += l.block
    give_scratch(scratch)
    end_call(&call)
