# The linear layer for few rows, out = x W^T + bias: a projection of a short text. W is read in the layout that state
# dicts have, (out_features, in_features), and not packed: packing is what a BLAS spends its time on when each number of
# W is used for few rows.
#
#     X^T packed in panels of up to 3 vectors of rows
#     for each task: FEATURES rows of W
#         for each panel
#             for ROWS features at a time
#                 tile    out^T[feature][row] = W broadcast x X^T vectors; prefetch the next rows of W
#             out = tile transposed + bias

cdef enum:
    FEATURES = 48  # rows of W in a task: a multiple of every ROWS, and tasks enough for all threads


cdef inline void linear_tile(const int ROWS, const int VECTORS, real* tile, const real* x, const real* weight,
                             const real* bias, Py_ssize_t in_features) noexcept nogil:
    """tile[ROWS][width] (OUT) = ROWS features of the panel's rows. The ROWS rows of W after these are prefetched on the
    way, a line at a time: they come from memory, and the hardware's own streams stop at each row."""
    cdef vf acc[8 * MAX_PANEL]
    cdef Py_ssize_t line = 64 // <Py_ssize_t> sizeof(real)
    cdef Py_ssize_t d = 0, dims
    cdef int i, r, v
    for r in range(ROWS):
        for v in range(VECTORS):
            vstore(tile + (r * VECTORS + v) * LANES, vset1(bias[r]))
    while d < in_features:
        for i in range(ROWS * VECTORS):
            acc[i] = vset1(<real> 0.0)
        dims = min(in_features, d + DIMS_AT_ONCE)
        while d < dims:
            for r in range(ROWS):
                prefetch(weight + (ROWS + r) * in_features + d)
            multiply(ROWS, VECTORS, acc, weight + d, in_features, 1, x + d * VECTORS * LANES, min(line, dims - d))
            d += line
        d = dims
        for i in range(ROWS * VECTORS):
            vstore(tile + i * LANES, vload(tile + i * LANES) + acc[i])


cdef inline void linear_panel(const int VECTORS, real* tile, const real* x, const real* weight, const real* bias,
                              Py_ssize_t in_features, Py_ssize_t n) noexcept nogil:
    """tile[n][width] (OUT): n features."""
    cdef int ROWS = 8 if VECTORS == 1 or TILE_ROWS == 8 else 6 if VECTORS == 2 else 4
    cdef Py_ssize_t o = 0
    while o + ROWS <= n:
        if ROWS == 8:
            linear_tile(8, VECTORS, tile, x, weight, bias, in_features)
        elif ROWS == 6:
            linear_tile(6, VECTORS, tile, x, weight, bias, in_features)
        else:
            linear_tile(4, VECTORS, tile, x, weight, bias, in_features)
        tile += ROWS * VECTORS * LANES
        weight += ROWS * in_features
        bias += ROWS
        o += ROWS
    while o < n:
        linear_tile(1, VECTORS, tile, x, weight, bias, in_features)
        tile += VECTORS * LANES
        weight += in_features
        bias += 1
        o += 1


cdef void pack_panel(real* packed, const real* x, Py_ssize_t rows, Py_ssize_t in_features, int panel) noexcept nogil:
    """packed[in_features][width] (OUT) = x transposed; lanes past the last row are 0."""
    if rows < panel * LANES:
        memset(packed, 0, panel * LANES * in_features * sizeof(real))
    transpose(packed, panel * LANES, x, in_features, min(rows, panel * LANES), in_features)


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
        elif panel == 2:
            linear_panel(2, tile, packed, weight, bias + first, in_features, n)
        else:
            linear_panel(3, tile, packed, weight, bias + first, in_features, n)
        transpose(out + vector * LANES * out_features + first, out_features, tile, panel * LANES, n,
                  min(panel * LANES, rows - vector * LANES))
        packed += panel * LANES * in_features
        vector += panel


def linear(const real[:, ::1] x, const real[:, ::1] weight, const real[::1] bias, real[:, ::1] out,
           Py_ssize_t num_threads):
    """out[row][o] (OUT) = bias[o] + sum over d of x[row][d] * weight[o][d]. No axis is empty. num_threads: 0 for the
    default."""
    cdef Py_ssize_t rows = x.shape[0], in_features = x.shape[1], out_features = weight.shape[0]
    cdef Py_ssize_t block = (min(rows, MAX_ROWS) + LANES - 1) // LANES * LANES
    cdef Py_ssize_t num_tasks = (out_features + FEATURES - 1) // FEATURES
    cdef Py_ssize_t first, vectors, vector, n, task, tile_size = FEATURES * MAX_WIDTH
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
            vectors = (n + LANES - 1) // LANES
            vector = 0
            while vector < vectors:
                pack_panel(packed + vector * LANES * in_features, &x[first + vector * LANES, 0], n - vector * LANES,
                           in_features, panel_vectors(vectors - vector))
                vector += panel_vectors(vectors - vector)
            with parallel(num_threads=threads):
                for task in prange(num_tasks, schedule="dynamic", chunksize=1):
                    do_features(&out[first, 0], packed, &weight[0, 0], &bias[0], tiles + threadid() * tile_size, n,
                                in_features, out_features, task * FEATURES)
            first += block
    free(allocated)
    end_call(&call)
