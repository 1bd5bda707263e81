# The linear layer, out = x W^T + bias. W is read in the layout that state dicts have, (out_features, in_features), and
# not packed: packing is what a BLAS spends its time on when each number of W is used for few rows.
#
#     for each BLOCK_DIMS dimensions (in parallel)
#         X^T packed in panels of up to 3 vectors of rows
#     for each task: FEATURES rows of W (in parallel)
#         for each panel
#             for each BLOCK_DIMS dimensions, for ROWS features at a time
#                 tile    out^T[feature][row] += W broadcast x X^T vectors; prefetch the next rows of W
#             out = tile transposed

cdef enum:
    FEATURES = 48     # rows of W in a task: a multiple of every ROWS, and tasks enough for some threads, not for dozens
    BLOCK_DIMS = 128  # of a panel: half of L1. Whole rows of W at once were 5 to 10 % slower at 16 rows of X


cdef inline void linear_tile(const int ROWS, const int VECTORS, real* tile, const real* x, const real* weight,
                             Py_ssize_t in_features, Py_ssize_t dims) noexcept nogil:
    """tile[ROWS][width] += `dims` dimensions of ROWS features of the panel's rows. The ROWS rows of W after these are
    prefetched on the way, a line at a time: they come from memory, and the hardware's own streams stop at each row."""
    cdef vf acc[8 * MAX_PANEL]
    cdef Py_ssize_t line = 64 // <Py_ssize_t> sizeof(real)
    cdef Py_ssize_t d = 0
    cdef int i, r
    for i in range(ROWS * VECTORS):
        acc[i] = vset1(<real> 0.0)
    while d < dims:
        for r in range(ROWS):
            prefetch(weight + (ROWS + r) * in_features + d)
        multiply(ROWS, VECTORS, acc, weight + d, in_features, 1, x + d * VECTORS * LANES, min(line, dims - d))
        d += line
    for i in range(ROWS * VECTORS):
        vstore(tile + i * LANES, vload(tile + i * LANES) + acc[i])


cdef inline void linear_panel(const int VECTORS, real* tile, const real* x, const real* weight, const real* bias,
                              Py_ssize_t in_features, Py_ssize_t n) noexcept nogil:
    """tile[n][width] (OUT): n features. Some dimensions of all of them after the other, so that these of the panel
    stay in L1."""
    cdef int ROWS = 8 if VECTORS == 1 or TILE_ROWS == 8 else 6 if VECTORS == 2 else 4
    cdef Py_ssize_t width = VECTORS * LANES
    cdef Py_ssize_t d = 0, dims, o
    cdef const real* w
    cdef int v
    for o in range(n):
        for v in range(VECTORS):
            vstore(tile + (o * VECTORS + v) * LANES, vset1(bias[o]))
    while d < in_features:
        dims = min(in_features - d, <Py_ssize_t> BLOCK_DIMS)
        o = 0
        w = weight + d
        while o + ROWS <= n:
            if ROWS == 8:
                linear_tile(8, VECTORS, tile + o * width, x + d * width, w, in_features, dims)
            elif ROWS == 6:
                linear_tile(6, VECTORS, tile + o * width, x + d * width, w, in_features, dims)
            else:
                linear_tile(4, VECTORS, tile + o * width, x + d * width, w, in_features, dims)
            o += ROWS
            w += ROWS * in_features
        while o < n:
            linear_tile(1, VECTORS, tile + o * width, x + d * width, w, in_features, dims)
            o += 1
            w += in_features
        d += dims


cdef void pack_dims(real* packed, const real* x, Py_ssize_t rows, Py_ssize_t in_features,
                    Py_ssize_t first) noexcept nogil:
    """packed[panel][first : first + BLOCK_DIMS][width] (OUT) = x transposed; lanes past the last row are 0."""
    cdef Py_ssize_t dims = min(in_features - first, <Py_ssize_t> BLOCK_DIMS)
    cdef Py_ssize_t vectors = (rows + LANES - 1) // LANES
    cdef Py_ssize_t width
    while vectors > 0:
        width = panel_vectors(vectors) * LANES
        if rows < width:
            memset(packed + first * width, 0, width * dims * sizeof(real))
        transpose(packed + first * width, width, x + first, in_features, min(rows, width), dims)
        packed += width * in_features
        x += width * in_features
        rows -= width
        vectors -= width // LANES


cdef void do_features(real* out, const real* packed, const real* weight, const real* bias, real* tile, Py_ssize_t rows,
                      Py_ssize_t in_features, Py_ssize_t out_features, Py_ssize_t first) noexcept nogil:
    """out[rows][first : first + FEATURES] (OUT)"""
    cdef Py_ssize_t n = min(FEATURES, out_features - first)
    cdef Py_ssize_t vectors = (rows + LANES - 1) // LANES
    cdef Py_ssize_t vector = 0
    cdef int panel
    weight += first * in_features
    while vector < vectors:
        panel = panel_vectors(vectors - vector)
        if panel == 1:
            linear_panel(1, tile, packed, weight, bias + first, in_features, n)
        elif PANEL_VECTORS == 2 or panel == 2:
            linear_panel(2, tile, packed, weight, bias + first, in_features, n)
        else:
            linear_panel(3, tile, packed, weight, bias + first, in_features, n)
        transpose(out + vector * LANES * out_features + first, out_features, tile, panel * LANES, n,
                  min(panel * LANES, rows - vector * LANES))
        packed += panel * LANES * in_features
        vector += panel


def linear(const real[:, ::1] x, const real[:, ::1] weight, const real[::1] bias, real[:, ::1] out,
           Py_ssize_t num_threads):
    """out[row][o] (OUT) = bias[o] + sum over d of x[row][d] * weight[o][d]. No axis is empty; arrays are aligned.
    num_threads: 0 for the default."""
    cdef Py_ssize_t rows = x.shape[0], in_features = x.shape[1], out_features = weight.shape[0]
    cdef Py_ssize_t block = (min(rows, MAX_ROWS) + LANES - 1) // LANES * LANES
    cdef Py_ssize_t num_tasks = (out_features + FEATURES - 1) // FEATURES
    cdef Py_ssize_t first, n, task, tile_size = FEATURES * MAX_WIDTH
    cdef int threads
    cdef char* allocated
    cdef real* packed
    cdef real* tiles
    cdef Call call
    begin_call(&call, num_threads, 2.0 * rows * in_features * out_features)
    threads = <int> min(call.num_threads, num_tasks)
    allocated = <char*> malloc((block * in_features + threads * tile_size) * sizeof(real) + 64)
    if allocated == NULL:
        end_call(&call)
        raise MemoryError(f"linear: no memory for a copy of {block} x {in_features} numbers")
    packed = <real*> (allocated + 64 - <uintptr_t> allocated % 64)
    tiles = packed + block * in_features
    with nogil:
        if threads > 1:
            threads = cattn_startable(threads)
        first = 0
        while first < rows and not stopped(&call):
            n = min(block, rows - first)
            with parallel(num_threads=threads):
                for task in prange((in_features + BLOCK_DIMS - 1) // BLOCK_DIMS, schedule="static"):
                    pack_dims(packed, &x[first, 0], n, in_features, task * BLOCK_DIMS)
                for task in prange(num_tasks, schedule="dynamic", chunksize=1):
                    do_features(&out[first, 0], packed, &weight[0, 0], &bias[0], tiles + threadid() * tile_size, n,
                                in_features, out_features, task * FEATURES)
            first += block
    free(allocated)
    end_call(&call)
