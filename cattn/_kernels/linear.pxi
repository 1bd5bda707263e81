# The linear layer, out = x W^T + bias. W is read in the layout that state dicts have, (out_features, in_features), and
# not packed: packing is what a BLAS spends its time on when each number of W is used for few rows. Its numbers are
# reals, 16-bit ones, or int8 with a scale for each SCALE_DIMS of a row; what is not real is widened (and scaled, as a
# product of floats) in registers or on the way into a copy, and then as good as reals.
#
#     for each block of rows of x, for each chunk of dimensions
#         x as reals: packed as X^T, many rows in panels of up to 3 vectors of them (in parallel)
#         for each task: FEATURES rows of W (in parallel)
#             few rows    for each LANES of them, for each BLOCK_DIMS dimensions
#                             W transposed and widened in registers,
#                             out[row][features] += W vectors x X broadcast
#             many rows   for each panel, for each BLOCK_DIMS dimensions (W copied: these first), for each ROWS features
#                             out^T[feature][row] += W broadcast x X^T vectors
#             after the last chunk: out, narrowed
#
# x and W may be transposed views: the numbers that lie side by side are those of a dimension then, as in X^T, and W is
# copied so. Gradients are such products, by x of grad_out and W^T, by W of grad_out^T and x^T, whose sums run over all
# rows of x, chunk by chunk; that by the bias is what `column_sums` adds up.
#
# A number of out is one chain of FMAs over each BLOCK_DIMS dimensions, and the sum of bias and these chains, one after
# the other: whichever way, so that the bits of a row depend on no other row, nor on how W is stored. With one row of x
# the second way would be bound by its broadcasts, one FMA a number of W, and the first by memory.

cdef enum:
    # Rows of W in a task: a multiple of every ROWS and of MAX_LANES, and tasks enough for some threads, not for dozens
    FEATURES = 48
    BLOCK_DIMS = 128  # of a panel: half of L1. Whole rows of W at once were 5 to 10 % slower at 16 rows of X
    W_STRIDE = 144    # of BLOCK_DIMS dimensions that are copied: rows in different sets of L1
    # Bytes from what is read of a row of W to what is asked for. From memory, 2048 take 1.03 times as long for float32,
    # and 512 1.1 times for float16 rows of 576; of wider rows, all are alike up to 8192 (Emerald Rapids)
    AHEAD = 4096
    # Dimensions of a transposed W at a time: with a block of rows they fit into L3. One thread takes 0.98 of the time
    # with 512, which fit into L2, and up to 1.03 times with all 4096 of a batch (Zen 5); but after each chunk, all
    # threads wait for the last one.
    CHUNK_DIMS = 2048
    DIMS_AHEAD = 8    # of a transposed x, from what is packed to what is asked for
    # Numbers of x in a block of rows: 16 MB of float32, and tasks stay short where rows are very long
    MAX_PACKED = 1 << 22


cdef inline void linear_tile(const int ROWS, const int VECTORS, real* tile, const real* x, const real* weight,
                             Py_ssize_t w_stride, Py_ssize_t w_step, Py_ssize_t dims, const char* soon,
                             Py_ssize_t soon_stride, Py_ssize_t o) noexcept nogil:
    """tile[ROWS][width] += `dims` dimensions of ROWS features for the panel's rows. In `weight`, the dimensions of a
    feature lie side by side (w_step: 1), or the features of a dimension do. soon: where W has the numbers that come
    next, from the first feature of the task on, soon_stride bytes from one feature, or dimension, to the next; those of
    the features from `o` on are prefetched on the way, 64 bytes at a time: they come from memory, and the hardware's
    own streams stop at each row. NULL: none are."""
    cdef vf acc[MAX_TILE]
    cdef Py_ssize_t line = 64 // <Py_ssize_t> sizeof(real)
    cdef Py_ssize_t d = 0
    cdef int i, r
    for i in range(ROWS * VECTORS):
        acc[i] = vset1(<real> 0.0)
    while d < dims:
        if soon != NULL:
            for r in range(ROWS):
                if w_step == 1:
                    prefetch(soon + (o + r) * soon_stride + d * <Py_ssize_t> sizeof(real))
                else:   # by the last number of 64 bytes: in the line of the first may lie the features before
                    prefetch(soon + (d + (o + r) % line) * soon_stride
                             + ((o + r) // line * line + line - 1) * <Py_ssize_t> sizeof(real))
        multiply(ROWS, VECTORS, acc, weight + d * w_step, w_stride, w_step, x + d * VECTORS * LANES,
                 min(line, dims - d))
        d += line
    for i in range(ROWS * VECTORS):
        vstore(tile + i * LANES, vload(tile + i * LANES) + acc[i])


cdef inline void linear_panel(const int VECTORS, real* tile, const real* x, const real* weight, Py_ssize_t w_stride,
                              Py_ssize_t w_step, Py_ssize_t dims, Py_ssize_t n, const char* soon,
                              Py_ssize_t soon_stride) noexcept nogil:
    """tile[n][width] (IN/OUT): `dims` dimensions of n features, for one panel."""
    cdef int ROWS = 8 if VECTORS == 1 or TILE_ROWS == 8 else 6 if VECTORS == 2 else 4
    cdef Py_ssize_t width = VECTORS * LANES
    cdef Py_ssize_t o = 0
    while o + ROWS <= n:
        if ROWS == 8:
            linear_tile(8, VECTORS, tile + o * width, x, weight, w_stride, w_step, dims, soon, soon_stride, o)
        elif ROWS == 6:
            linear_tile(6, VECTORS, tile + o * width, x, weight, w_stride, w_step, dims, soon, soon_stride, o)
        else:
            linear_tile(4, VECTORS, tile + o * width, x, weight, w_stride, w_step, dims, soon, soon_stride, o)
        o += ROWS
        weight += ROWS * w_stride
    while o < n:
        linear_tile(1, VECTORS, tile + o * width, x, weight, w_stride, w_step, dims, soon, soon_stride, o)
        o += 1
        weight += w_stride


cdef inline void linear_columns(const int KIND, const int ROWS, const int GROUPS, real* tile, const real* x,
                                const char* weight, Py_ssize_t w_step, const real* scales, Py_ssize_t dims,
                                const Soon* soon) noexcept nogil:
    """tile[GROUPS][ROWS][LANES] (IN/OUT): `dims` dimensions of GROUPS x LANES features."""
    cdef vf acc[16]
    cdef int i
    for i in range(GROUPS * ROWS):
        acc[i] = vset1(<real> 0.0)
    multiply_columns(KIND, KIND == I8, ROWS, GROUPS, acc, weight, w_step, scales, x, dims, soon)
    for i in range(GROUPS * ROWS):
        vstore(tile + i * LANES, vload(tile + i * LANES) + acc[i])


cdef inline void linear_kinds(const int ROWS, const int GROUPS, Kind kind, real* tile, const real* x,
                              const char* weight, Py_ssize_t w_step, const real* scales, Py_ssize_t dims,
                              const Soon* soon) noexcept nogil:
    if IS_DOUBLE:
        linear_columns(F64, ROWS, GROUPS, tile, x, weight, w_step, scales, dims, soon)
    elif kind == F16:
        linear_columns(F16, ROWS, GROUPS, tile, x, weight, w_step, scales, dims, soon)
    elif kind == BF16:
        linear_columns(BF16, ROWS, GROUPS, tile, x, weight, w_step, scales, dims, soon)
    elif kind == I8:
        linear_columns(I8, ROWS, GROUPS, tile, x, weight, w_step, scales, dims, soon)
    else:
        linear_columns(F32, ROWS, GROUPS, tile, x, weight, w_step, scales, dims, soon)


cdef struct Taken:
    Py_ssize_t tasks                # atomic; of a thread's share, that somebody has begun
    char apart[56]                  # each in a cache line of its own


cdef struct Linear:
    Tensor x                        # IN (1, batch, seq, in_features)
    Tensor weight                   # IN (1, 1, out_features, in_features)
    Tensor scales                   # IN (1, 1, out_features, in_features / SCALE_DIMS rounded up) of int8
    Tensor bias                     # IN (1, 1, 1, out_features), or no data
    Tensor out                      # OUT (1, batch, seq, out_features)
    Py_ssize_t seq, rows            # rows of x in a batch row, and in all
    Py_ssize_t in_features, out_features
    Py_ssize_t block, first_row     # rows of x at a time; the first of those that are worked on
    bint starts, ends               # the dimensions of x and W are the first ones, the last ones
    bint x_transposed               # a view whose columns are packed; all its rows are equally far apart
    bint w_transposed               # a view whose columns are copied
    bint w_in_place                 # W is read where it lies: rows of adjacent reals
    bint w_adjacent                 # or, for few rows, of adjacent numbers of any kind
    Py_ssize_t ahead                # dimensions of W from what is used to what is asked for
    real* packed                    # x of the block: [panel][in_features][width], few rows: [in_features][row]
    real* sums                      # [task], tiles of a block from one chunk to the next; NULL: there is one chunk
    Taken* taken                    # one per thread, of the block's tasks
    Call* call


cdef struct LinearWorkspace:        # one per thread, SCRATCH
    real* tile                      # [panel][FEATURES][width], few rows: [group][row][LANES]
    real* weight                    # [FEATURES][W_STRIDE], where W is not
    real* scales                    # [LANES][features] of int8 that is read in place
    real* rows                      # [MAX_WIDTH][BLOCK_DIMS] or [MAX_WIDTH][FEATURES]


cdef size_t carve_linear(LinearWorkspace* b, char* base, const Linear* l) noexcept nogil:
    """Lays the scratch of a thread out from `base` on; returns its size in bytes."""
    cdef size_t size = 0
    b.tile = <real*> take(base, &size, FEATURES * (l.block + MAX_WIDTH) * sizeof(real))
    b.weight = <real*> take(base, &size, FEATURES * W_STRIDE * sizeof(real))
    b.scales = <real*> take(base, &size, LANES * FEATURES * sizeof(real))
    b.rows = <real*> take(base, &size, MAX_WIDTH * BLOCK_DIMS * sizeof(real))
    return size


cdef inline bint few_rows(const Linear* l, Py_ssize_t rows) noexcept nogil:
    """Transposing W takes as long as multiplying it with LANES / 2 rows. Where W would be copied as reals for many, few
    are more: LANES of them take 0.65 to 0.75 of the time so (Emerald Rapids)."""
    return not l.w_transposed and rows <= (LANES if l.w_adjacent and not l.w_in_place else LANES // 2)


cdef inline char* row_number(const Linear* l, const Tensor* t, Py_ssize_t row) noexcept nogil:
    return row_of(t, 0, row // l.seq, row % l.seq)


cdef inline bint is_transposed(const Tensor* t) noexcept nogil:
    """True where the numbers of a column lie closer to each other than those of a row, which have gaps."""
    return t.stride[3] != size_of(t.kind) and labs(t.stride[2]) < labs(t.stride[3])


cdef inline bint rows_are_even(const Linear* l, const Tensor* t, Py_ssize_t first_row, Py_ssize_t n) noexcept nogil:
    """True where these rows are reals in place and equally far apart, also where they are of several batch rows."""
    return rows_are_real(t) and (
        row_number(l, t, first_row + n - 1) == row_number(l, t, first_row) + (n - 1) * t.stride[2])


cdef void pack_transposed(const Linear* l, real* row, Py_ssize_t first_row, Py_ssize_t rows, Py_ssize_t first,
                          Py_ssize_t dims) noexcept nogil:
    """As pack_dims, of a transposed x. row: SCRATCH, for `rows` numbers."""
    cdef const char* x = row_number(l, &l.x, first_row) + first * l.x.stride[3]
    cdef Py_ssize_t lines = 0, vectors, d, i, r
    cdef real* packed
    cdef int panel
    if l.x.stride[2] == size_of(l.x.kind):
        lines = ceil_div(rows * l.x.stride[2], 64)
    for d in range(first, first + dims):
        for i in range(lines):
            prefetch(x + DIMS_AHEAD * l.x.stride[3] + i * 64)
        for r in range(rows, round_up(rows, LANES)):
            row[r] = 0.0
        load_row(row, x, l.x.stride[2], rows, l.x.kind)
        packed, vectors, r = l.packed, ceil_div(rows, LANES), 0
        while vectors > 0:
            panel = panel_vectors(PANEL_VECTORS, vectors)
            for i in range(panel):
                vstore(packed + (d * panel + i) * LANES, vload(row + r))
                r += LANES
            packed += panel * LANES * l.in_features
            vectors -= panel
        x += l.x.stride[3]


cdef void pack_dims(const Linear* l, char* scratch, Py_ssize_t first_row, Py_ssize_t rows,
                    Py_ssize_t first) noexcept nogil:
    """BLOCK_DIMS dimensions of l.packed (OUT), from `first` on; lanes past the last row are 0."""
    cdef Py_ssize_t dims = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS)
    cdef Py_ssize_t vectors = ceil_div(rows, LANES), width, n, r
    cdef real* packed = l.packed
    cdef LinearWorkspace b
    carve_linear(&b, scratch, l)
    if few_rows(l, rows):
        width = padded_rows(rows)
        for r in range(width):
            load_row(b.rows, row_number(l, &l.x, first_row + min(r, rows - 1)) + first * l.x.stride[3], l.x.stride[3],
                     dims, l.x.kind)
            for n in range(dims):
                packed[(first + n) * width + r] = b.rows[n]
        return
    if l.x_transposed:
        pack_transposed(l, b.rows, first_row, rows, first, dims)
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


cdef void load_weights(const Linear* l, real* row, Py_ssize_t feature, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """row[0..n) (OUT) = the dimensions of a feature from `first` on, a multiple of SCALE_DIMS."""
    cdef const char* scale
    cdef Py_ssize_t i = 0, end
    cdef float factor
    load_row(row, row_of(&l.weight, 0, 0, feature) + first * l.weight.stride[3], l.weight.stride[3], n, l.weight.kind)
    if l.weight.kind != I8:
        return
    scale = row_of(&l.scales, 0, 0, feature) + first // SCALE_DIMS * l.scales.stride[3]
    while i < n:
        memcpy(&factor, scale, sizeof(float))
        end = min(i + SCALE_DIMS, n)
        while i < end:
            row[i] = <real> (<float> row[i] * factor)   # rounded to float, whatever `real` is
            i += 1
        scale += l.scales.stride[3]


cdef void load_scales(const Linear* l, const LinearWorkspace* b, Py_ssize_t feature, Py_ssize_t n,
                      Py_ssize_t first) noexcept nogil:
    """b.scales[LANES][n] (OUT): the scales of n features, a multiple of LANES, from dimension `first` on. Those of the
    next n are asked for."""
    cdef Py_ssize_t groups = min(ceil_div(l.in_features - first, SCALE_DIMS), <Py_ssize_t> LANES), r
    cdef const char* scales = row_of(&l.scales, 0, 0, feature) + first // SCALE_DIMS * l.scales.stride[3]
    if feature + 2 * n <= l.out_features:
        for r in range(n, 2 * n):
            prefetch(scales + r * l.scales.stride[2])
    if rows_are_real(&l.scales):
        transpose(b.scales, n, <const real*> scales, l.scales.stride[2] // <Py_ssize_t> sizeof(real), n, groups)
        return
    for r in range(n):
        load_row(b.rows + r * LANES, scales + r * l.scales.stride[2], l.scales.stride[3], groups, F32)
    transpose(b.scales, n, b.rows, LANES, n, groups)


cdef Soon expect_weights(const Linear* l, Py_ssize_t feature, Py_ssize_t n, Py_ssize_t first) noexcept nogil:
    """What to ask for beside the dimensions of n features from `first` on: those AHEAD bytes further; in the end, the
    first of the next n features."""
    cdef Soon soon
    first += l.ahead
    if first >= l.in_features:
        first -= round_up(l.in_features, BLOCK_DIMS)
        feature += n
    soon.lines = row_of(&l.weight, 0, 0, feature) + first * l.weight.stride[3]
    soon.bytes = 0
    if l.ahead and feature + n <= l.out_features:
        soon.bytes = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS) * l.weight.stride[3]
    soon.step, soon.pitch = l.weight.stride[2], 64
    return soon


cdef void copy_weights(const Linear* l, const LinearWorkspace* b, Py_ssize_t feature, Py_ssize_t n, Py_ssize_t first,
                       Py_ssize_t dims, const Soon* soon) noexcept nogil:
    """b.weight[n][W_STRIDE] (OUT) = dimensions first to first + dims of n features."""
    cdef Py_ssize_t r, line
    for r in range(n):
        for line in range(ceil_div(soon.bytes, 64)):
            prefetch(soon.lines + r * soon.step + line * 64)
        load_weights(l, b.weight + r * W_STRIDE, feature + r, first, dims)


cdef void copy_transposed(const Linear* l, const LinearWorkspace* b, Py_ssize_t feature, Py_ssize_t n,
                          Py_ssize_t first, Py_ssize_t dims) noexcept nogil:
    """b.weight[dims][FEATURES] (OUT) = n features of each dimension from `first` on."""
    cdef const char* w = row_of(&l.weight, 0, 0, feature) + first * l.weight.stride[3]
    cdef Py_ssize_t stride = l.weight.stride[2], d, i
    for d in range(dims):
        i = 0
        if l.weight.kind == real_kind() and stride == sizeof(real):     # a call for each would be 2 % of all
            while i + LANES <= n:
                vstore(b.weight + d * FEATURES + i, vload(<const real*> w + i))
                i += LANES
        load_row(b.weight + d * FEATURES + i, w + i * stride, stride, n - i, l.weight.kind)
        w += l.weight.stride[3]


cdef inline int features_at_once(Py_ssize_t rows) noexcept nogil:
    """With few rows: so many that their chains of FMAs do not wait for each other. 32 of one row with AVX-512 would be
    as many streams from memory, and up to 15 % slower."""
    return MAX_LANES if rows == 1 else LANES


cdef void few_features(const Linear* l, const LinearWorkspace* b, Py_ssize_t first_row, Py_ssize_t rows,
                       Py_ssize_t feature, Py_ssize_t n) noexcept nogil:
    """out[first_row : + rows][feature : + n] (OUT): few rows, at most features_at_once. All dimensions of these after
    the other: each row of W is one stream from memory."""
    cdef Py_ssize_t first = 0, r, i, dims, padded = padded_rows(rows), features = features_at_once(rows), w_step
    cdef int step = 4 * COLUMNS if l.weight.kind == I8 else LANES
    cdef Kind kind
    cdef const char* w
    cdef const real* x = l.packed
    cdef const real* scales = NULL
    cdef real* tile = b.tile
    cdef Soon soon
    load_linear_bias(l, b.rows, feature, n)
    for i in range(features // LANES):
        for r in range(padded):
            vstore(tile + (i * padded + r) * LANES, vload(b.rows + i * LANES))
    while first < l.in_features:
        if stopped_by_signal(l.call):
            return
        dims = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS)
        soon = expect_weights(l, feature, features, first)
        kind, w_step = l.weight.kind, l.weight.stride[2]
        w = row_of(&l.weight, 0, 0, feature) + first * l.weight.stride[3]
        if not (n == features and (l.w_in_place or (l.w_adjacent and dims % step == 0 and dims > step))):
            copy_weights(l, b, feature, n, first, dims, &soon)
            memset(b.weight + n * W_STRIDE, 0, (features - n) * W_STRIDE * sizeof(real))
            kind, w, w_step, soon.bytes = real_kind(), <const char*> b.weight, W_STRIDE * sizeof(real), 0
        elif kind == I8:
            if first % (LANES * SCALE_DIMS) == 0:
                load_scales(l, b, feature, n, first)
            scales = b.scales + first % (LANES * SCALE_DIMS) // SCALE_DIMS * n
        if padded == 1:
            linear_kinds(1, MAX_LANES // LANES, kind, tile, x, w, w_step, scales, dims, &soon)
        elif padded == 2:
            linear_kinds(2, 1, kind, tile, x, w, w_step, scales, dims, &soon)
        elif padded == 4:
            linear_kinds(4, 1, kind, tile, x, w, w_step, scales, dims, &soon)
        elif LANES < 16 or padded == 8:
            linear_kinds(8, 1, kind, tile, x, w, w_step, scales, dims, &soon)
        else:
            linear_kinds(16, 1, kind, tile, x, w, w_step, scales, dims, &soon)
        x += dims * padded
        first += dims
    for r in range(rows):
        for i in range(ceil_div(n, LANES)):
            store_row(row_number(l, &l.out, first_row + r) + (feature + i * LANES) * l.out.stride[3], l.out.stride[3],
                      tile + (i * padded + r) * LANES, min(n - i * LANES, <Py_ssize_t> LANES), l.out.kind)


cdef inline void multiply_panel(int panel, real* tile, const real* x, const real* w, Py_ssize_t w_stride,
                                Py_ssize_t w_step, Py_ssize_t dims, Py_ssize_t n, const char* soon,
                                Py_ssize_t soon_stride) noexcept nogil:
    if panel == 1:
        linear_panel(1, tile, x, w, w_stride, w_step, dims, n, soon, soon_stride)
    elif PANEL_VECTORS == 2 or panel == 2:
        linear_panel(2, tile, x, w, w_stride, w_step, dims, n, soon, soon_stride)
    else:
        linear_panel(3, tile, x, w, w_stride, w_step, dims, n, soon, soon_stride)


cdef inline const char* next_weights(const Linear* l, Py_ssize_t feature, Py_ssize_t first) noexcept nogil:
    """W from `first` + BLOCK_DIMS on, or of the next FEATURES from 0 on; NULL where these are not all there."""
    first += BLOCK_DIMS
    if first >= l.in_features:
        first, feature = 0, feature + FEATURES
        if feature + FEATURES > l.out_features:
            return NULL
    return row_of(&l.weight, 0, 0, feature) + first * l.weight.stride[3]


cdef void begin_panel(const Linear* l, real* tile, Py_ssize_t width, const real* bias, Py_ssize_t n) noexcept nogil:
    """tile[n][width] (OUT) = bias, where the dimensions of W are the first ones."""
    cdef Py_ssize_t o, r
    for o in range(n if l.starts else 0):
        for r in range(width // LANES):
            vstore(tile + o * width + r * LANES, vset1(bias[o]))


cdef void store_panel(const Linear* l, const LinearWorkspace* b, real* tile, Py_ssize_t width, Py_ssize_t first_row,
                      Py_ssize_t rows, Py_ssize_t feature, Py_ssize_t n) noexcept nogil:
    """out[first_row : + rows][feature : + n] (OUT) = tile[n][width], where the dimensions of W are the last ones."""
    cdef Py_ssize_t r
    if not l.ends:
        return
    if rows_are_even(l, &l.out, first_row, rows):
        transpose(<real*> row_number(l, &l.out, first_row) + feature, l.out.stride[2] // <Py_ssize_t> sizeof(real),
                  tile, width, n, rows)
        return
    transpose(b.rows, FEATURES, tile, width, n, rows)
    for r in range(rows):
        store_row(row_number(l, &l.out, first_row + r) + feature * l.out.stride[3], l.out.stride[3],
                  b.rows + r * FEATURES, n, l.out.kind)


cdef void multiply_in_place(const Linear* l, const LinearWorkspace* b, Py_ssize_t first_row, Py_ssize_t rows,
                            Py_ssize_t feature, Py_ssize_t n) noexcept nogil:
    """out[first_row : + rows] (OUT): n features. All dimensions of a panel after the other, so that its sums stay in
    L1: block of W after block of W takes 6 % longer for a batch (width 768, Intel). With the first panel, memory is
    asked for the next dimensions of W, or for the first of the next FEATURES."""
    cdef Py_ssize_t first, width, dims
    cdef Py_ssize_t w_stride = l.weight.stride[2] // <Py_ssize_t> sizeof(real)
    cdef const char* soon
    cdef const real* w = <const real*> row_of(&l.weight, 0, 0, feature)
    cdef const real* x = l.packed
    cdef real bias[FEATURES]
    cdef real* tile = b.tile
    cdef int panel
    load_linear_bias(l, bias, feature, n)
    while rows > 0:
        panel = panel_vectors(PANEL_VECTORS, ceil_div(rows, LANES))
        width = panel * LANES
        begin_panel(l, tile, width, bias, n)
        first = 0
        while first < l.in_features:
            if stopped_by_signal(l.call):
                return
            dims = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS)
            soon = next_weights(l, feature, first) if x == l.packed else NULL
            multiply_panel(panel, tile, x + first * width, w + first, w_stride, 1, dims, n, soon, l.weight.stride[2])
            first += BLOCK_DIMS
        store_panel(l, b, tile, width, first_row, min(width, rows), feature, n)
        if l.sums != NULL:
            tile += FEATURES * width
        x += width * l.in_features
        first_row += width
        rows -= width


cdef void multiply_copied(const Linear* l, const LinearWorkspace* b, Py_ssize_t first_row, Py_ssize_t rows,
                          Py_ssize_t feature, Py_ssize_t n) noexcept nogil:
    """As multiply_in_place, of a W that is copied as reals: some dimensions, once for all panels."""
    cdef Py_ssize_t left, first = 0, width, dims
    cdef const real* x
    cdef const char* next_dims
    cdef Soon soon
    cdef real bias[FEATURES]
    cdef real* tile = b.tile
    cdef int panel
    load_linear_bias(l, bias, feature, n)
    left = rows
    while left > 0:
        width = panel_vectors(PANEL_VECTORS, ceil_div(left, LANES)) * LANES
        begin_panel(l, tile, width, bias, n)
        tile += FEATURES * width
        left -= width
    while first < l.in_features:
        if stopped_by_signal(l.call):
            return
        dims = min(l.in_features - first, <Py_ssize_t> BLOCK_DIMS)
        next_dims = NULL
        if l.w_transposed:
            copy_transposed(l, b, feature, n, first, dims)
            if l.weight.stride[2] == sizeof(real) and n == FEATURES:
                next_dims = next_weights(l, feature, first)
        else:
            soon = expect_weights(l, feature, n, first)
            copy_weights(l, b, feature, n, first, dims, &soon)
        tile, x, left = b.tile, l.packed, ceil_div(rows, LANES)
        while left > 0:
            panel = panel_vectors(PANEL_VECTORS, left)
            width = panel * LANES
            if l.w_transposed:
                multiply_panel(panel, tile, x + first * width, b.weight, 1, FEATURES, dims, n, next_dims,
                               l.weight.stride[3])
                next_dims = NULL
            else:
                multiply_panel(panel, tile, x + first * width, b.weight, W_STRIDE, 1, dims, n, NULL, 0)
            tile += FEATURES * width
            x += width * l.in_features
            left -= panel
        first += dims
    tile, left = b.tile, rows
    while left > 0:
        width = panel_vectors(PANEL_VECTORS, ceil_div(left, LANES)) * LANES
        store_panel(l, b, tile, width, first_row + rows - left, min(width, left), feature, n)
        tile += FEATURES * width
        left -= width


cdef void do_features(const Linear* l, char* scratch, Py_ssize_t first_row, Py_ssize_t rows,
                      Py_ssize_t feature) noexcept nogil:
    """out[first_row : + rows][feature : + FEATURES] (OUT)"""
    cdef Py_ssize_t end = min(feature + FEATURES, l.out_features)
    cdef LinearWorkspace b
    carve_linear(&b, scratch, l)
    if l.sums != NULL:
        b.tile = l.sums + feature * (l.block + MAX_WIDTH)
    if not few_rows(l, rows):
        if l.w_in_place:
            multiply_in_place(l, &b, first_row, rows, feature, end - feature)
        else:
            multiply_copied(l, &b, first_row, rows, feature, end - feature)
        return
    while feature < end:
        few_features(l, &b, first_row, rows, feature, min(<Py_ssize_t> features_at_once(rows), end - feature))
        feature += features_at_once(rows)


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


cdef int describe_linear(Linear* l, x, weight, scales, bias, out, Kind kind, Kind weight_kind,
                         Kind bias_kind) except -1:
    """l (OUT), but for what is planned; ValueError where the shapes do not fit together."""
    describe(&l.x, x, kind)
    describe(&l.weight, weight, weight_kind)
    describe(&l.out, out, kind)
    l.bias.data = l.scales.data = NULL
    if bias is not None:
        describe(&l.bias, bias, bias_kind)
    if scales is not None:
        describe(&l.scales, scales, F32)
    l.seq, l.rows = l.x.length[2], l.x.length[1] * l.x.length[2]
    l.in_features, l.out_features = l.weight.length[3], l.weight.length[2]
    if (l.x.length[3] != l.in_features or l.out.length[3] != l.out_features or l.x.length[1] != l.out.length[1]
            or l.x.length[2] != l.out.length[2] or (bias is not None and l.bias.length[3] != l.out_features)
            or not l.x.length[0] == l.out.length[0] == l.weight.length[0] == l.weight.length[1] == 1
            or (bias is not None and not l.bias.length[0] == l.bias.length[1] == l.bias.length[2] == 1)
            or (scales is not None) != (weight_kind == I8)
            or (scales is not None and not (l.scales.length[0] == l.scales.length[1] == 1
                                            and l.scales.length[2] == l.out_features
                                            and l.scales.length[3] == ceil_div(l.in_features, SCALE_DIMS)))):
        raise ValueError(f"linear: x of shape {x.shape}, weight of shape {weight.shape}, scales of shape "
                         f"{None if scales is None else scales.shape}, bias of shape "
                         f"{None if bias is None else bias.shape} and out of shape {out.shape} do not fit together")
    return 0


def linear(x, weight, scales, bias, out, Kind kind, Kind weight_kind, Kind bias_kind, Py_ssize_t num_threads):
    """out[row][o] (OUT) = bias[o] + sum over d of x[row][d] * weight[o][d], in arrays of up to 4 axes as Linear says,
    of any strides; bias may be None, and scales are, but for int8. num_threads: 0 for the default."""
    cdef Linear l, part              # of some dimensions
    cdef LinearWorkspace b
    cdef Call call
    cdef Py_ssize_t rows, chunk, left
    cdef size_t packed_size, sums_size, taken_size, workspace_size
    cdef char* scratch
    cdef char* workspaces
    describe_linear(&l, x, weight, scales, bias, out, kind, weight_kind, bias_kind)
    if l.rows == 0 or l.out_features == 0:
        return
    l.x_transposed = is_transposed(&l.x) and (l.seq == l.rows or l.x.stride[1] == l.seq * l.x.stride[2])
    l.w_transposed = is_transposed(&l.weight) and weight_kind != I8
    chunk = max(1, l.in_features)
    if l.w_transposed and l.out_features <= MAX_PACKED // (MAX_ROWS + MAX_WIDTH):
        chunk = min(chunk, <Py_ssize_t> CHUNK_DIMS)
    l.block = min(l.rows, <Py_ssize_t> MAX_ROWS, max(LANES // 2, MAX_PACKED // chunk))
    l.w_in_place = rows_are_real(&l.weight)
    l.w_adjacent = l.w_in_place or (not IS_DOUBLE and weight_kind != F32 and weight_kind != F64
                                    and l.weight.stride[3] == size_of(weight_kind))
    l.ahead = 0
    if l.weight.stride[3] == size_of(weight_kind):
        l.ahead = min(AHEAD // size_of(weight_kind), round_up(l.in_features, BLOCK_DIMS))
    begin_call(&call, num_threads, 2.0 * l.rows * l.in_features * l.out_features)
    l.call = &call
    call.num_threads = min(call.num_threads, ceil_div(l.out_features, FEATURES))
    rows = padded_rows(l.block) if few_rows(&l, l.block) else round_up(l.block, LANES)
    packed_size = round_up(rows * min(l.in_features, chunk) * sizeof(real), 64)
    sums_size = 0
    if chunk < l.in_features:
        sums_size = round_up(l.out_features, FEATURES) * (l.block + MAX_WIDTH) * sizeof(real)
    taken_size = call.num_threads * sizeof(Taken)
    workspace_size = carve_linear(&b, NULL, &l)
    scratch = take_scratch(packed_size + sums_size + taken_size + call.num_threads * workspace_size)
    if scratch == NULL:
        end_call(&call)
        raise MemoryError(f"linear: no memory for a copy of {l.block} x {l.in_features} numbers")
    l.packed, l.sums = <real*> scratch, <real*> (scratch + packed_size) if sums_size else NULL
    l.taken = <Taken*> (scratch + packed_size + sums_size)
    workspaces = scratch + packed_size + sums_size + taken_size
    with nogil:
        l.first_row = 0
        while l.first_row < l.rows and not stopped_by_signal(&call):
            part, left = l, l.in_features
            part.starts, part.ends = True, False
            while not part.ends and not stopped_by_signal(&call):
                part.in_features = min(left, chunk)
                left -= part.in_features
                part.ends = left == 0
                memset(l.taken, 0, taken_size)
                in_threads(&call, do_rows, &part, workspaces, workspace_size)
                part.x.data += chunk * l.x.stride[3]
                part.weight.data += chunk * l.weight.stride[3]
                part.starts = False
            l.first_row += l.block
    give_scratch(scratch)
    end_call(&call)


cdef enum:
    SUM_COLUMNS = 128   # at a time: half a KB of each float32 row. 64 take up to 1.5 times as long (Zen 5)
    SUM_FLOPS = 8       # the time of a number, in flops of attention


cdef struct ColumnSums:
    Tensor x                        # IN (1, batch, seq, columns)
    Tensor out                      # OUT (1, 1, 1, columns)
    Call* call


cdef inline void add_row(double* total, double* lost, const real* row) noexcept nogil:
    """total[SUM_COLUMNS] + lost[SUM_COLUMNS] (IN/OUT) += row: in double, and what rounding takes from the sum of
    doubles is kept (Knuth)."""
    cdef double x, sum, taken
    cdef int i
    for i in range(SUM_COLUMNS):
        x = row[i]
        sum = total[i] + x
        if IS_DOUBLE:
            taken = sum - total[i]
            lost[i] += (total[i] - (sum - taken)) + (x - taken)
        total[i] = sum


cdef void sum_columns(const ColumnSums* s, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    """out[first : + n] (OUT), at most SUM_COLUMNS."""
    cdef double total[SUM_COLUMNS]
    cdef double lost[SUM_COLUMNS]
    cdef real row[SUM_COLUMNS]
    cdef Py_ssize_t i, j
    cdef const char* x
    cdef bint in_place = n == SUM_COLUMNS and rows_are_real(&s.x)
    for i in range(SUM_COLUMNS):
        total[i], lost[i], row[i] = 0.0, 0.0, 0.0
    for i in range(s.x.length[1]):
        for j in range(s.x.length[2]):
            if j % 256 == 0 and stopped_by_signal(s.call):
                return
            x = row_of(&s.x, 0, i, j) + first * s.x.stride[3]
            if in_place:
                add_row(total, lost, <const real*> x)
            else:
                load_row(row, x, s.x.stride[3], n, s.x.kind)
                add_row(total, lost, row)
    for i in range(n):
        if -INFINITY < total[i] < INFINITY:     # else what is lost is NaN
            total[i] += lost[i]
        row[i] = <real> total[i]
    store_row(s.out.data + first * s.out.stride[3], s.out.stride[3], row, n, s.out.kind)


cdef void do_columns(const void* what, char* scratch) noexcept nogil:
    """What one thread does of ColumnSums."""
    cdef const ColumnSums* s = <const ColumnSums*> what
    cdef Py_ssize_t number = take_task(s.call)
    cdef fp_mode before = own_mode()
    while number < s.call.num_tasks and not stopped_by_signal(s.call):
        sum_columns(s, number * SUM_COLUMNS, min(s.out.length[3] - number * SUM_COLUMNS, <Py_ssize_t> SUM_COLUMNS))
        task_done(s.call)
        number = take_task(s.call)
    set_mode(before)
    await_others(s.call)


def column_sums(x, out, Kind kind, Py_ssize_t num_threads):
    """out[c] (OUT) = sum over rows of x[row][c], of arrays of up to 4 axes as ColumnSums says. num_threads: 0 for the
    default."""
    cdef ColumnSums s
    cdef Call call
    describe(&s.x, x, kind)
    describe(&s.out, out, kind)
    s.call = &call
    if s.x.length[0] != 1 or s.out.length[0] * s.out.length[1] * s.out.length[2] != 1 or (
            s.out.length[3] != s.x.length[3]):
        raise ValueError(f"column_sums: x of shape {x.shape} and out of shape {out.shape} do not fit together")
    begin_call(&call, num_threads, <double> SUM_FLOPS * s.x.length[1] * s.x.length[2] * s.x.length[3])
    call.num_tasks = call.unfinished = ceil_div(s.x.length[3], SUM_COLUMNS)
    call.num_threads = max(1, min(call.num_threads, call.num_tasks))
    with nogil:
        in_threads(&call, do_columns, &s, NULL, 0)
    end_call(&call)
