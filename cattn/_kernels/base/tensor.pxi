# Arrays as a pointer and byte strides, of any dtype the contract knows. Kernels compute on contiguous `real` rows: a
# row either already is one and is used in place, or is loaded into scratch.
#
# Strides may be negative, zero or no multiple of the item, and data may lie at any byte: numbers are moved by memcpy,
# which compiles to one load and is defined at every address. Vector loads are unaligned ones throughout; on aligned
# data they cost the same.

ctypedef enum Kind:  # the same numbers as in cattn/_checks.py
    F32, F64, F16, BF16, BOOL, I8

cdef struct Tensor:
    char* data            # NULL: the array was not given
    Py_ssize_t length[4]  # batch, head, row, column
    Py_ssize_t stride[4]  # in bytes; 0 where the array is broadcast
    Kind kind
    # Rows of all batch rows in one axis: the first of each batch row; or NULL
    const int64_t* firsts

cdef inline Kind real_kind() noexcept nogil:
    return F64 if IS_DOUBLE else F32


cdef inline Py_ssize_t size_of(Kind kind) noexcept nogil:
    """Of a number, in bytes."""
    return 1 if kind == BOOL or kind == I8 else 4 if kind == F32 else 8 if kind == F64 else 2


# batch, head and row are of the broadcast shape: an axis the array lacks has stride 0, as has batch where rows are
# packed.
cdef inline char* row_of(const Tensor* t, Py_ssize_t batch, Py_ssize_t head, Py_ssize_t row) noexcept nogil:
    if t.firsts != NULL:
        row += t.firsts[batch]
    return t.data + batch * t.stride[0] + head * t.stride[1] + row * t.stride[2]


cdef inline bint rows_are_real(const Tensor* t) noexcept nogil:
    """True when a row of `t` can be used in place: contiguous, aligned reals. Whole strides, because the distance of
    two rows is then a number of reals."""
    return (t.kind == real_kind() and t.stride[3] == sizeof(real) and t.stride[2] % <Py_ssize_t> sizeof(real) == 0
            and t.stride[1] % <Py_ssize_t> sizeof(real) == 0 and t.stride[0] % <Py_ssize_t> sizeof(real) == 0
            and <uintptr_t> t.data % sizeof(real) == 0)


cdef inline real load_one(const char* p, Kind kind) noexcept nogil:
    """One number of any kind and any alignment. A bool is what it adds to a score: 0, or -inf where it is False."""
    cdef float single
    cdef double wide
    cdef uint16_t half
    if kind == F32:
        memcpy(&single, p, 4)
        return <real> single
    elif kind == F64:
        memcpy(&wide, p, 8)
        if not IS_DOUBLE and -INFINITY < wide < INFINITY:  # a mask wider than the scores: finite stays finite
            wide = min(max(wide, -FLT_MAX), FLT_MAX)
        return <real> wide
    elif kind == BOOL:
        return <real> 0.0 if p[0] else <real> -INFINITY
    elif kind == I8:
        return <real> (<const int8_t*> p)[0]
    memcpy(&half, p, 2)
    return <real> (widen_f16(half) if kind == F16 else widen_bf16(half))


cdef void load_row(real* row, const char* p, Py_ssize_t stride, Py_ssize_t n, Kind kind) noexcept nogil:
    """row[0..n) (OUT) = the n numbers at p, p + stride, ..., widened to real."""
    cdef Py_ssize_t i = 0
    if kind == real_kind() and stride == sizeof(real):
        memcpy(row, p, n * sizeof(real))
        return
    # A stride of 2 alone is no sign of 16-bit numbers: every second bool has it too.
    if not IS_DOUBLE and stride == 2 and (kind == F16 or kind == BF16):
        while i + LANES <= n:
            vstore(row + i, vload_f16(<const uint16_t*> (p + 2 * i)) if kind == F16
                   else vload_bf16(<const uint16_t*> (p + 2 * i)))
            i += LANES
    if kind == BOOL and stride == 1:
        for i in range(n):  # a loop of its own, for the compiler to vectorise: masks of keys
            row[i] = <real> 0.0 if p[i] else <real> -INFINITY
        return
    if kind == I8 and stride == 1:
        for i in range(n):
            row[i] = <real> (<const int8_t*> p)[i]
        return
    while i < n:  # the tail of 16-bit rows; and whatever has no loop of its own: gaps, float64 masks
        row[i] = load_one(p + i * stride, kind)
        i += 1


cdef void store_row(char* p, Py_ssize_t stride, const real* row, Py_ssize_t n, Kind kind) noexcept nogil:
    """The n numbers at p, p + stride, ... (OUT) = row[0..n), narrowed to nearest even where `kind` is a 16-bit one."""
    cdef Py_ssize_t i = 0
    cdef uint16_t half
    if kind == real_kind() and stride == sizeof(real):
        memcpy(p, row, n * sizeof(real))
        return
    if not IS_DOUBLE and stride == 2:
        while i + LANES <= n:
            if kind == F16:
                vstore_f16(<uint16_t*> (p + 2 * i), vload(row + i))
            else:
                vstore_bf16(<uint16_t*> (p + 2 * i), vload(row + i))
            i += LANES
    for i in range(i, n):
        if kind == real_kind():
            memcpy(p + i * stride, &row[i], sizeof(real))
        else:
            half = narrow_f16(<float> row[i]) if kind == F16 else narrow_bf16(<float> row[i])
            memcpy(p + i * stride, &half, 2)


cdef void transpose(real* out, Py_ssize_t out_stride, const real* a, Py_ssize_t a_stride, Py_ssize_t rows,
                    Py_ssize_t columns) noexcept nogil:
    """out[c * out_stride + r] (OUT) = a[r * a_stride + c] for r < rows, c < columns: by LANES x LANES squares through
    registers, the edges one by one."""
    cdef vf square[MAX_LANES]
    cdef Py_ssize_t r = 0, c, i
    # Plain loops would be bound by their scattered stores, one a number: 8 to 16 times as many as here.
    while r + LANES <= rows:
        c = 0
        while c + LANES <= columns:
            vload_square(square, <const char*> (a + r * a_stride + c), a_stride * sizeof(real))
            for i in range(LANES):
                vstore(out + (c + i) * out_stride + r, square[i])
            c += LANES
        while c < columns:
            for i in range(LANES):
                out[c * out_stride + r + i] = a[(r + i) * a_stride + c]
            c += 1
        r += LANES
    while r < rows:
        for c in range(columns):
            out[c * out_stride + r] = a[r * a_stride + c]
        r += 1


cdef void transpose_rows(real* out, Py_ssize_t out_stride, const real** row, Py_ssize_t columns) noexcept nogil:
    """out[c * out_stride + r] (OUT) = row[r][c] for r < LANES, c < columns: rows wherever they lie."""
    cdef vf square[MAX_LANES]
    cdef Py_ssize_t c = 0
    cdef int r
    while c + LANES <= columns:
        for r in range(LANES):
            square[r] = vload(row[r] + c)
        vtranspose(square)
        for r in range(LANES):
            vstore(out + (c + r) * out_stride, square[r])
        c += LANES
    while c < columns:
        for r in range(LANES):
            out[c * out_stride + r] = row[r][c]
        c += 1


cdef int describe(Tensor* t, array, Kind kind) except -1:
    """t (OUT) = where the array's numbers are, and how many axes it has; those that it lacks, of 4, come first and have
    length 1. The caller's reference keeps the numbers there: numpy resizes no array that is referenced. Its dtype
    has been checked: the buffer is asked for without a format, which bfloat16 has not, and "float32" has several. Typed
    memoryviews of query, key, value took 0.6 us more, of 2.2 (Xeon)."""
    cdef Py_buffer view
    cdef int axis = 4, num_axes, own
    cdef bint fits
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES)
    fits = view.ndim <= 4 and view.itemsize == size_of(kind)  # another thread may have set the dtype since
    t.data, t.kind, t.firsts, num_axes = <char*> view.buf, kind, NULL, view.ndim
    own = num_axes if fits else 0
    while axis:
        axis, own = axis - 1, own - 1
        t.length[axis] = view.shape[own] if own >= 0 else 1
        t.stride[axis] = view.strides[own] if own >= 0 else 0
    PyBuffer_Release(&view)
    if not fits:
        raise ValueError(f"expected at most 4 axes of numbers of {size_of(kind)} bytes, got shape {array.shape} of "
                         f"{array.dtype}")
    return num_axes


cdef char* data_of(array) except NULL:
    """Where the bytes of a new, contiguous array are."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_WRITABLE)
    PyBuffer_Release(&view)
    return <char*> view.buf


cdef int describe_new(Tensor* t, array, Kind kind, const Py_ssize_t* length) except -1:
    """describe() of a new contiguous array, by its bytes alone: takes 8 % of a tiny call less."""
    cdef int axis = 4
    cdef Py_ssize_t stride = size_of(kind)
    t.kind, t.data, t.firsts = kind, data_of(array), NULL
    while axis:
        axis -= 1
        t.length[axis], t.stride[axis] = length[axis], stride
        stride *= length[axis]
    return 0
