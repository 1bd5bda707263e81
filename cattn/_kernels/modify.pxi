# Modifiers: what happens to a tile of scores between Q K^T and the softmax. A tile is scores[key][lane], n keys from
# `key_start` on by `width` lanes, one query row a lane; scores are in units of log2(e) (the softmax takes exp2), and a
# score of -inf is a masked key. Each modifier is one pass over the tile:
#     cap      s = c tanh(s / c)
#     alibi    s = s - slope[lane] |position[lane] - key|
#     mask     s = s + bias[lane][key], or -inf where the bias is -inf, whatever s was (NaN behind a mask must not leak)
#     limits   s = -inf where key is not in [low[lane], high[lane])

cdef struct Lane:
    Py_ssize_t head         # query head
    Py_ssize_t query        # row of the query array
    Py_ssize_t position     # query + q_offset: the key position it stands at
    Py_ssize_t low, high    # keys [low, high) are visible: causal, window and kv_lens together
    real slope              # ALiBi, times log2(e)


cdef void cap_scores(real* scores, Py_ssize_t size, real cap) noexcept nogil:
    """scores (IN/OUT) = cap * tanh(scores / cap), whole vectors of them: the last one may reach into the next rows of
    scratch. In double, whose users want digits more than speed, libm's tanh."""
    cdef Py_ssize_t i
    cdef vf x, z, small, large
    cdef real inverse = <real> 1.0 / cap
    if IS_DOUBLE:
        for i in range(size):
            scores[i] = cap * <real> tanh(scores[i] * inverse)
        return
    for i in range((size + LANES - 1) // LANES):
        x = vload(scores + i * LANES) * inverse
        z = x * x
        # |x| < 0.625: odd minimax polynomial (Cephes tanhf); else 1 - 2 / (exp(2|x|) + 1). Both within 3e-7 relative:
        # the second alone would lose the digits of small scores.
        small = vset1(<real> -5.70498872745e-3)
        small = vfma(small, z, vset1(<real> 2.06390887954e-2))
        small = vfma(small, z, vset1(<real> -5.37397155531e-2))
        small = vfma(small, z, vset1(<real> 1.33314422036e-1))
        small = vfma(small, z, vset1(<real> -3.33332819422e-1))
        small = vfma(small * z, x, x)
        # exp2 takes at most 127; tanh is 1 in float long before
        large = vselect(vless(vset1(<real> 15.0), vabs(x)), vset1(<real> 15.0), vabs(x))
        large = vset1(<real> 1.0) - vset1(<real> 2.0) / (vexp2(large * <real> (2 * LOG2_E)) + vset1(<real> 1.0))
        large = vcopysign(large, x)
        x = vselect(vless(vabs(x), vset1(<real> 0.625)), small, vselect(vequal(x, x), large, x))
        vstore(scores + i * LANES, x * cap)


cdef void add_alibi(real* scores, Py_ssize_t width, Py_ssize_t n, Py_ssize_t key_start,
                    const Lane* lanes) noexcept nogil:
    """scores (IN/OUT) -= slope * |position - key|. The difference is taken in integers: far positions of a long cache
    lose no digits before they are subtracted."""
    cdef Py_ssize_t j, i
    cdef real distance
    for j in range(n):
        for i in range(width):
            distance = <real> (lanes[i].position - key_start - j)
            scores[j * width + i] -= lanes[i].slope * (distance if distance > 0 else -distance)


cdef void limit_keys(real* scores, Py_ssize_t width, Py_ssize_t n, Py_ssize_t key_start,
                     const Lane* lanes) noexcept nogil:
    """Touches only the keys that a lane does not see: few, since a tile ends where its last lane does."""
    cdef Py_ssize_t i, j
    for i in range(width):
        for j in range(min(n, max(0, lanes[i].low - key_start))):
            scores[j * width + i] = <real> -INFINITY
        for j in range(max(0, lanes[i].high - key_start), n):
            scores[j * width + i] = <real> -INFINITY


cdef void load_bias(real* bias, const Tensor* mask, Py_ssize_t batch, Lane lane, Py_ssize_t key_start,
                    Py_ssize_t n) noexcept nogil:
    """bias[0..n) (OUT) = the mask's row for one lane, times log2(e), finite entries kept finite."""
    cdef Py_ssize_t j
    cdef real limit = <real> BIAS_LIMIT
    cdef real entry, clipped
    cdef const char* row = row_of(mask, batch, lane.head, lane.query)
    load_row(bias, row + key_start * mask.stride[3], mask.stride[3], n, mask.kind)
    if mask.kind == BOOL:
        return
    for j in range(n):
        entry = bias[j]
        clipped = -limit if entry < -limit else limit if entry > limit else entry
        bias[j] = <real> LOG2_E * (clipped if -INFINITY < entry < INFINITY else entry)


# A masked score is replaced, not added to: NaN + -inf would be NaN.
cdef inline void add_biases(real* s, vf bias) noexcept nogil:
    cdef vf masked = vset1(<real> -INFINITY)
    vstore(s, vselect(vequal(bias, masked), masked, vload(s) + bias))


cdef void add_mask(real* scores, Py_ssize_t width, Py_ssize_t n, Py_ssize_t key_start, const Tensor* mask,
                   Py_ssize_t batch, const Lane* lanes, real* bias, real* transposed) noexcept nogil:
    """bias (SCRATCH): LANES rows of BLOCK_KV; transposed (SCRATCH): BLOCK_KV rows of LANES."""
    cdef Py_ssize_t j, v, i
    if width % LANES:  # few rows, in decode
        for i in range(width):
            load_bias(bias, mask, batch, lanes[i], key_start, n)
            for j in range(n):
                scores[j * width + i] = bias[j] if bias[j] == -INFINITY else scores[j * width + i] + bias[j]
        return
    # One row for every query, such as a key-padding mask: load it once, broadcast each entry to the lanes.
    if mask.stride[2] == 0 and (mask.stride[1] == 0 or lanes[0].head == lanes[width - 1].head):
        load_bias(bias, mask, batch, lanes[0], key_start, n)
        for j in range(n):
            for v in range(width // LANES):
                add_biases(scores + j * width + v * LANES, vset1(bias[j]))
        return
    for v in range(width // LANES):
        for i in range(LANES):
            load_bias(bias + i * n, mask, batch, lanes[v * LANES + i], key_start, n)
        # Rows of the mask run along keys, lanes across queries: a transpose through registers in between. At head_dim
        # 64 a dense float32 mask costs 15 % in all, a bool one 10 %.
        transpose(transposed, LANES, bias, n, LANES, n)
        for j in range(n):
            add_biases(scores + j * width + v * LANES, vload(transposed + j * LANES))
