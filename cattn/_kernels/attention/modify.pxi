# Modifiers: what happens to a tile of scores between Q K^T and the softmax. A tile is scores[key][lane], n keys from
# `key_start` on by `width` lanes, one query row a lane; a score of -inf is a masked key. Each modifier is one pass over
# the tile:
#     scale    s = |scale| s, where a modifier below calculates with scores (choose_units)
#     cap      s = c tanh(s / c)
#     alibi    s = s - slope[lane] |position[lane] - key|
#     mask     s = s + bias[lane][key], or -inf where the bias is -inf, whatever s was (NaN behind a mask must not leak)
#     limits   s = -inf where key is not in [low[lane], high[lane])

cdef void scale_scores(real* scores, Py_ssize_t size, real scale) noexcept nogil:
    """scores (IN/OUT) times scale, in whole vectors as cap_scores."""
    cdef Py_ssize_t i
    for i in range((size + LANES - 1) // LANES):
        vstore(scores + i * LANES, vload(scores + i * LANES) * vset1(scale))


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
    """Touches only keys that some lane does not see: few, since a tile ends where its last lane does."""
    cdef real low[MAX_WIDTH]
    cdef real high[MAX_WIDTH]
    cdef vf masked = vset1(<real> -INFINITY), key
    cdef Py_ssize_t all_low = 0, all_high = n, i, j, v
    for i in range(width):
        low[i] = <real> min(n, max(0, lanes[i].low - key_start))
        high[i] = <real> min(n, max(0, lanes[i].high - key_start))
        all_low = max(all_low, <Py_ssize_t> low[i])
        all_high = min(all_high, <Py_ssize_t> high[i])
    j = 0
    while j < n:
        if j >= all_low and j < all_high:
            j = all_high
            continue
        if width % LANES:   # few rows, in decode
            for i in range(width):
                if not low[i] <= j < high[i]:
                    scores[j * width + i] = <real> -INFINITY
        else:
            key = vset1(<real> j)
            for v in range(width // LANES):
                i = j * width + v * LANES
                vstore(scores + i, vselect(vless(key, vload(low + v * LANES)), masked,
                                           vselect(vless(key, vload(high + v * LANES)), vload(scores + i), masked)))
        j += 1


# Finite entries of a mask stay so small that their sum with a score is finite.
cdef inline vf bias_of(vf entry) noexcept nogil:
    cdef vf limit = vset1(<real> BIAS_LIMIT)
    cdef vf clipped = vmax(-limit, entry)
    clipped = vselect(vless(limit, clipped), limit, clipped)
    return vselect(vequal(vabs(entry), vset1(<real> INFINITY)), entry, clipped)


# A masked score is replaced, not added to: NaN + -inf would be NaN.
cdef inline void add_biases(real* s, real scale, vf bias) noexcept nogil:
    cdef vf masked = vset1(<real> -INFINITY)
    vstore(s, vselect(vequal(bias, masked), masked, vfma(vload(s), vset1(scale), bias)))


cdef inline char* entry_of(const Tensor* mask, Py_ssize_t batch, const Lane* lane, Py_ssize_t key) noexcept nogil:
    return row_of(mask, batch, lane.head, lane.query) + key * mask.stride[3]


cdef void load_bias(real* bias, const Tensor* mask, Py_ssize_t batch, const Lane* lane, Py_ssize_t key,
                    Py_ssize_t n) noexcept nogil:
    """bias (OUT) = n biases of one lane, from `key` on, in whole vectors."""
    cdef Py_ssize_t i
    load_row(bias, entry_of(mask, batch, lane, key), mask.stride[3], n, mask.kind)
    if mask.kind != BOOL:
        for i in range((n + LANES - 1) // LANES):
            vstore(bias + i * LANES, bias_of(vload(bias + i * LANES)))


cdef void prefetch_mask(const Tensor* mask, Py_ssize_t batch, const Lane* lanes, Py_ssize_t width,
                        Py_ssize_t key_start, Py_ssize_t first, Py_ssize_t end, Py_ssize_t n) noexcept nogil:
    """The lines of keys [first, end) of the n from key_start on. The lanes' rows are far apart, so that each begins
    with misses. Asked for before it is needed, a dense mask in L3 slows attention to 0.88 (float32) and 0.94 (bool) of
    its speed without (AVX-512; AVX2: 0.90 both)."""
    cdef Py_ssize_t i, offset, end_offset = end * mask.stride[3]
    if mask.stride[2] == 0 or mask.stride[3] > <Py_ssize_t> sizeof(double):  # one row for all, or entries far apart
        return
    if end == n:
        end_offset += 63  # rows seldom begin with a line: the one in which the last key lies, or else the next block's
    for i in range(width):
        for offset in range((first * mask.stride[3] + 63) // 64 * 64, end_offset, 64):
            prefetch(entry_of(mask, batch, lanes + i, key_start) + offset)


cdef Py_ssize_t add_small_mask(real* scores, real scale, Py_ssize_t width, Py_ssize_t n, Py_ssize_t key_start,
                               const Tensor* mask, Py_ssize_t batch, const Lane* lanes) noexcept nogil:
    """What add_mask does, for LANES lanes and from the first key on, straight from a mask of aligned reals, as long as
    there is nothing to clip and no infinity. Returns how many keys are done, in whole vectors of them."""
    cdef const real* rows[16]
    cdef vf square[16]
    cdef vf largest
    cdef Py_ssize_t j = 0, i
    for i in range(LANES):
        rows[i] = <const real*> entry_of(mask, batch, lanes + i, key_start)
    while j + LANES <= n:
        largest = vset1(<real> 0.0)
        for i in range(LANES):
            square[i] = vload(rows[i] + j)
            largest = vmax(vabs(square[i]), largest)  # passes over a NaN, or (NEON) stays one
        if vany(vless(vset1(<real> BIAS_LIMIT), largest)) or vany(vdiffer(largest, largest)):
            break
        vtranspose(square)
        for i in range(LANES):
            vstore(scores + (j + i) * width, vfma(vload(scores + (j + i) * width), vset1(scale), square[i]))
        j += LANES
    return j


cdef Py_ssize_t add_bool_mask(real* scores, Py_ssize_t width, Py_ssize_t n, Py_ssize_t key_start, const Tensor* mask,
                              Py_ssize_t batch, const Lane* lanes) noexcept nogil:
    """The same for a bool mask whose entries are adjacent."""
    cdef const char* rows[16]
    cdef int8_t tile[1024]  # VECTOR_BYTES keys of LANES lanes, at most
    cdef vf masked = vset1(<real> -INFINITY)
    cdef Py_ssize_t j = 0, i
    cdef int k
    cdef real* s
    for i in range(LANES):
        rows[i] = entry_of(mask, batch, lanes + i, key_start)
    while j + VECTOR_BYTES <= n:
        vfalse_tile(tile, rows, j)
        for k in range(VECTOR_BYTES):
            s = scores + (j + k) * width
            vstore(s, vselect(vfalse(tile, k), masked, vload(s)))
        j += VECTOR_BYTES
    return j


cdef void add_mask(real* scores, real scale, Py_ssize_t width, Py_ssize_t n, Py_ssize_t key_start, const Tensor* mask,
                   Py_ssize_t batch, const Lane* lanes, real* scratch) noexcept nogil:
    """scores (IN/OUT) = scale * scores + biases; scale is 1 under a bool mask. scratch: LANES rows of n reals, n
    rounded up to whole vectors."""
    cdef Py_ssize_t length = (n + LANES - 1) // LANES * LANES, done = 0, j, v, i
    cdef bint in_place = rows_are_real(mask), bools = mask.kind == BOOL and mask.stride[3] == 1
    cdef vf square[16]
    if width % LANES:  # few rows, in decode
        for i in range(width):
            load_bias(scratch, mask, batch, lanes + i, key_start, n)
            for j in range(n):
                scores[j * width + i] = (scratch[j] if scratch[j] == -INFINITY
                                         else scores[j * width + i] * scale + scratch[j])
        return
    # One row for every query, such as a key-padding mask: load it once, broadcast each entry to the lanes.
    if mask.stride[2] == 0 and (mask.stride[1] == 0 or lanes[0].head == lanes[width - 1].head):
        load_bias(scratch, mask, batch, lanes, key_start, n)
        for j in range(n):
            for v in range(width // LANES):
                add_biases(scores + j * width + v * LANES, scale, vset1(scratch[j]))
        return
    # Rows of the mask run along keys, lanes across queries: a transpose in registers in between.
    for v in range(width // LANES):
        if in_place:
            done = add_small_mask(scores + v * LANES, scale, width, n, key_start, mask, batch, lanes + v * LANES)
        elif bools:
            done = add_bool_mask(scores + v * LANES, width, n, key_start, mask, batch, lanes + v * LANES)
        if done == n:
            continue
        for i in range(LANES):
            load_bias(scratch + i * length, mask, batch, lanes + v * LANES + i, key_start + done, n - done)
        for j in range((n - done + LANES - 1) // LANES):
            for i in range(LANES):
                square[i] = vload(scratch + i * length + j * LANES)
            vtranspose(square)
            for i in range(LANES):
                add_biases(scores + (done + j * LANES + i) * width + v * LANES, scale, square[i])


cdef void mask_tile(const Problem* p, const Workspace* w, real* scores, real scale, Py_ssize_t width, Py_ssize_t batch,
                    Py_ssize_t key_start, Py_ssize_t n, const Lane* lanes, bint limited) noexcept nogil:
    """The two modifiers that can take a key away."""
    if p.mask.data != NULL:
        add_mask(scores, scale, width, n, key_start, &p.mask, batch, lanes, w.rows)
    if limited:
        limit_keys(scores, width, n, key_start, lanes)


cdef bint modify_tile(const Problem* p, const Workspace* w, real* scores, Py_ssize_t width, Py_ssize_t batch,
                      Py_ssize_t key_start, Py_ssize_t n, const Lane* lanes, bint limited) noexcept nogil:
    """All modifiers on scores (IN/OUT); False where there is none."""
    cdef real scale = p.scale
    if not limited and p.mask.data == NULL and scale == 1 and p.softcap == 0 and p.slopes == NULL:
        return False
    # A float mask, when it is the first to need it, brings the scale in itself: one FMA instead of a pass.
    if scale != 1 and (p.softcap != 0 or p.slopes != NULL or p.mask.data == NULL or p.mask.kind == BOOL):
        scale_scores(scores, n * width, scale)
        scale = 1.0
    if p.softcap != 0:
        cap_scores(scores, n * width, p.softcap)
    if p.slopes != NULL:
        add_alibi(scores, width, n, key_start, lanes)
    mask_tile(p, w, scores, scale, width, batch, key_start, n, lanes, limited)
    return True


cdef void drop_tile(const Problem* p, real* probs, Py_ssize_t width, Py_ssize_t batch, Py_ssize_t key_start,
                    Py_ssize_t n, const Lane* lanes) noexcept nogil:
    cdef Py_ssize_t i
    if not p.dropout:
        return
    for i in range(width):
        drop_weights(probs + i, width, key_start, n, p.dropout_threshold, p.keep_scale, p.seed,
                     <uint32_t> lanes[i].query, <uint32_t> lanes[i].head, <uint32_t> (p.batch_offset + batch))


cdef void shrink_tile(real* probs, Py_ssize_t vectors, const real* shrink, Py_ssize_t period) noexcept nogil:
    """probs (IN/OUT), whole vectors of them: times their rows' factors, which come again after `period` vectors. What
    was above 0 stays so where the factor is not 1: the weight of an infinite value. Finite ones do not feel it."""
    cdef Py_ssize_t i
    cdef vf zero = vset1(<real> 0.0), one = vset1(<real> 1.0)
    cdef vf prob, factor, product, least
    for i in range(vectors):
        prob, factor = vload(probs + i * LANES), vload(shrink + i % period * LANES)
        product = prob * factor
        least = vselect(vless(factor, one), vset1(<real> SMALLEST), zero)
        product = vselect(vless(zero, prob), vmax(product, least), product)
        vstore(probs + i * LANES, product)
