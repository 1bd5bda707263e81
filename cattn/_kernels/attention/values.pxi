# Values behind a mask: a key that a row does not see has probability 0 there, and 0 * NaN would leak its value.

cdef bint all_finite(const real* x, Py_ssize_t n) noexcept nogil:
    cdef vf check = vset1(<real> 0.0)
    cdef real tail = 0.0
    cdef Py_ssize_t i
    for i in range(n // LANES):
        check = vfma(vload(x), vset1(<real> 0.0), check)  # NaN from the first NaN or infinity on
        x += LANES
    for i in range(n % LANES):
        tail += x[i] * <real> 0.0
    return tail == 0.0 and not vany(vdiffer(check, check))


cdef bint make_finite(real* finite, Py_ssize_t finite_stride, const real* v_rows, Py_ssize_t v_stride, Py_ssize_t n,
                      Py_ssize_t head_dim_v) noexcept nogil:
    """True when V has a NaN or infinity in these n rows; finite (OUT) is then a copy with 0 in their place."""
    cdef Py_ssize_t j, d
    cdef real value
    cdef bint finite_so_far = True
    for j in range(n):
        finite_so_far = finite_so_far and all_finite(v_rows + j * v_stride, head_dim_v)
    if finite_so_far:
        return False
    for j in range(n):
        for d in range(head_dim_v):
            value = v_rows[j * v_stride + d]
            finite[j * finite_stride + d] = value if value * <real> 0.0 == 0.0 else <real> 0.0
    return True


cdef void repair_values(const Problem* p, const Workspace* w, const Tile* t, real* acc, Py_ssize_t acc_lane,
                        Py_ssize_t acc_dim, const real* v_rows, Py_ssize_t v_stride, Py_ssize_t dim) noexcept nogil:
    """The other half of make_finite: NaN and infinities of V reach those lanes of acc, acc[lane * acc_lane +
    dim * acc_dim], that see their key."""
    cdef Py_ssize_t j, d, i
    cdef real value
    find_visible(p, w, t)
    for j in range(t.n):
        if stopped_by_signal(p.call):
            return
        for d in range(dim):
            value = v_rows[j * v_stride + d]
            if value * <real> 0.0 == 0.0:
                continue
            for i in range(t.width):
                if w.visible[j * t.width + i] != -INFINITY:
                    acc[i * acc_lane + d * acc_dim] += t.scores[j * t.width + i] * value
