# How a row ends: its result, logsumexp and weights.

cdef inline real* weights_row(const Problem* p, const Lane* lane) noexcept nogil:
    cdef Py_ssize_t head = lane.batch * p.num_kv_heads * p.group_size + lane.head
    return p.weights + (head * p.seq_len_q + lane.query) * p.seq_len_kv


cdef void clear_weights(const Problem* p, const Workspace* w, const Task* task) noexcept nogil:
    cdef Py_ssize_t i, j
    cdef real* row
    for i in range(task.num_rows):
        if stopped_by_signal(p.call):
            return
        row = weights_row(p, &w.lanes[i])
        for j in range(p.seq_len_kv):
            row[j] = <real> -INFINITY


cdef void keep_scores(const Problem* p, const Tile* t) noexcept nogil:
    """Writes the tile of modified scores into the rows of the weights that are to come (finish_row makes them)."""
    cdef Py_ssize_t i, j
    cdef real* row
    if p.weights == NULL:
        return
    for i in range(t.width):
        row = weights_row(p, &t.lanes[i]) + t.key_start
        for j in range(t.n):
            row[j] = t.scores[j * t.width + i]


cdef inline vf weight_of(vf score, real reference, real unit, real inverse_sum) noexcept nogil:
    """Exactly 0 for a masked key, in a row of NaN as well."""
    return vselect(vequal(score, vset1(<real> -INFINITY)), vset1(<real> 0.0),
                   vexp2((score - reference) * unit) * inverse_sum)


cdef void finish_weights(real* row, Py_ssize_t n, real reference, real unit, real inverse_sum) noexcept nogil:
    """row[0..n) (IN/OUT): scores become weights."""
    cdef real last[MAX_LANES]
    cdef Py_ssize_t i, tail = n % LANES
    for i in range(n // LANES):
        vstore(row, weight_of(vload(row), reference, unit, inverse_sum))
        row += LANES
    if tail:
        memcpy(last, row, tail * sizeof(real))
        for i in range(tail, LANES):
            last[i] = reference
        vstore(last, weight_of(vload(last), reference, unit, inverse_sum))
        memcpy(row, last, tail * sizeof(real))


cdef bint store_result(const Problem* p, const Lane* lane, real* shrink, real* row) noexcept nogil:
    """Stores a row of out. True where it has to be done again.

    Probabilities are relative to a reference near the maximum and may add up to 2**8 * keys, so that huge values can
    overflow acc where the result would not. A row with an infinity or NaN is done once more, with probabilities and acc
    times 2**-40, and only those numbers are taken from there: others would lose digits below 1e-26. Other rows keep
    their bits. Infinities and NaN that were in the input come out again."""
    cdef char* target = lane_row(&p.out, lane)
    cdef real stored
    cdef Py_ssize_t d
    cdef bint again = False
    if shrink[0] == 1.0:
        again = not all_finite(row, p.head_dim_v)
        shrink[0] = <real> SHRINK if again else <real> 1.0
    else:
        for d in range(p.head_dim_v):
            stored = load_one(target + d * p.out.stride[3], p.out.kind)
            if stored * <real> 0.0 == 0.0:
                row[d] = stored
    store_row(target, p.out.stride[3], row, p.head_dim_v, p.out.kind)
    return again


cdef inline real sink_term(const Problem* p, const Lane* lane, real reference) noexcept nogil:
    """What a sink adds to row_sum."""
    return <real> exp(p.sinks[lane.head] - reference * p.natural) if p.sinks != NULL else <real> 0.0


cdef void finish_row(const Problem* p, const Lane* lane, real reference, real row_sum,
                     real inverse_sum) noexcept nogil:
    """A row's logsumexp and weights (OUT), where asked for."""
    cdef real* row
    if p.logsumexp.data != NULL:
        (<real*> lane_row(&p.logsumexp, lane))[0] = (
            <real> (reference * p.natural + log(<double> row_sum)) if row_sum != 0 else <real> -INFINITY)
    if p.weights != NULL and not stopped_by_signal(p.call):
        row = weights_row(p, lane)
        finish_weights(row, p.seq_len_kv, reference, p.unit, inverse_sum)
        if p.dropout:
            drop_of_lane(p, lane, row, 1, 0, p.seq_len_kv, p.keep_scale)
        if p.narrow_weights != NULL:
            store_row(<char*> (p.narrow_weights + (row - p.weights)), sizeof(uint16_t), row, p.seq_len_kv, p.out.kind)
