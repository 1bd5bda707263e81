# Modifiers: what happens to a tile of scores between Q K^T and the softmax, and to its probabilities after it. Each is
# one pass over the tile (IN/OUT); a score of -inf is a masked key. In this order, which modify_tile has:
#     keys     s = s * scale[key], of keys of 8 bits
#     scale    s = |scale| s, where a modifier below calculates with scores (choose_units)
#     cap      s = c tanh(s / c)
#     alibi    s = s - slope[lane] |position[lane] - key|
#     mask     s = s + bias[lane][key], or -inf where the bias is -inf, whatever s was (NaN behind a mask must not leak)
#     limits   s = -inf where key is not in [low[lane], high[lane])
# and after the softmax:
#     drop     p = p / (1 - dropout_p), or 0
#     shrink   p = p * shrink[lane]: see store_result
#     values   p = p * scale[key], of values of 8 bits; 0 where the key is not seen, whatever its scale is

cdef void scale_keys(const Problem* p, const real* scales, const Tile* t, real* scaled) noexcept nogil:
    """scaled (OUT) = scores or probabilities times what load_key_scales has read; whole vectors, as cap_scores."""
    cdef vf each[MAX_DECODE_ROWS]
    cdef vf scale
    cdef Py_ssize_t j, i, width = t.width
    scales += t.key_start % p.block_kv
    if width < LANES:   # few rows, in decode
        for j in range(ceil_div(t.n, LANES)):
            for i in range(width):
                each[i] = vload(scales + j * LANES)
            if width == 2:
                vweave(each, 2)
            elif width == 4:
                vweave(each, 4)
            elif width == 8:
                vweave(each, 8)
            for i in range(width):
                vstore(scaled + (j * width + i) * LANES, vload(t.scores + (j * width + i) * LANES) * each[i])
        return
    for j in range(t.n):
        scale = vset1(scales[j])
        for i in range(width // LANES):
            vstore(scaled + j * width + i * LANES, vload(t.scores + j * width + i * LANES) * scale)


cdef void scale_scores(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """In whole vectors, as cap_scores."""
    cdef Py_ssize_t i
    cdef vf scale = vset1(t.scale)
    for i in range(ceil_div(t.n * t.width, LANES)):
        vstore(t.scores + i * LANES, vload(t.scores + i * LANES) * scale)
    t.scale = 1.0


cdef void cap_scores(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """Whole vectors of scores: the last one may reach into the next rows of scratch. In double, whose users want
    digits more than speed, libm's tanh."""
    cdef Py_ssize_t i, size = t.n * t.width
    cdef vf x, z, small, large
    cdef real* scores = t.scores
    cdef real cap = p.softcap
    cdef real inverse = <real> 1.0 / cap
    if IS_DOUBLE:
        for i in range(size):
            scores[i] = cap * <real> tanh(scores[i] * inverse)
        return
    for i in range(ceil_div(size, LANES)):
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


cdef void add_alibi(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """The difference of position and key is taken in integers: far positions of a long cache lose no digits before they
    are subtracted."""
    cdef Py_ssize_t j, i
    cdef real distance
    for j in range(t.n):
        for i in range(t.width):
            distance = <real> (t.lanes[i].position - t.key_start - j)
            t.scores[j * t.width + i] -= t.lanes[i].slope * (distance if distance > 0 else -distance)


cdef void limit_keys(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """Touches only keys that some lane does not see: few, since a tile ends where its last lane does."""
    cdef real low[MAX_WIDTH]
    cdef real high[MAX_WIDTH]
    cdef vf masked = vset1(<real> -INFINITY), key
    cdef Py_ssize_t n = t.n, width = t.width, all_low = 0, all_high = n, i, j, v
    cdef real* scores = t.scores
    for i in range(width):
        low[i] = <real> min(n, max(0, t.lanes[i].low - t.key_start))
        high[i] = <real> min(n, max(0, t.lanes[i].high - t.key_start))
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


cdef inline char* entry_of(const Tensor* mask, const Lane* lane, Py_ssize_t key) noexcept nogil:
    return lane_row(mask, lane) + key * mask.stride[3]


cdef void load_bias(real* bias, const Tensor* mask, const Lane* lane, Py_ssize_t key, Py_ssize_t n) noexcept nogil:
    """bias (OUT) = n biases of one lane, from `key` on, in whole vectors."""
    cdef Py_ssize_t i
    load_row(bias, entry_of(mask, lane, key), mask.stride[3], n, mask.kind)
    if mask.kind != BOOL:
        for i in range(ceil_div(n, LANES)):
            vstore(bias + i * LANES, bias_of(vload(bias + i * LANES)))


cdef inline void prefetch_mask(const Problem* p, const Tile* t, const int WIDTH, Py_ssize_t first,
                               Py_ssize_t end) noexcept nogil:
    """The lines of the tile's keys [first, end). The lanes' rows are far apart, so that each begins with misses. Asked
    for before it is needed, a dense mask in L3 slows attention to 0.88 (float32) and 0.94 (bool) of its speed without
    (AVX-512; AVX2: 0.90 both)."""
    cdef const Tensor* mask = &p.mask
    cdef Py_ssize_t i, offset, end_offset = end * mask.stride[3]
    if mask.stride[2] == 0 or mask.stride[3] > <Py_ssize_t> sizeof(double):  # one row for all, or entries far apart
        return
    if end == t.n:
        end_offset += 63  # rows seldom begin with a line: the one in which the last key lies, or else the next block's
    for i in range(WIDTH):
        for offset in range(round_up(first * mask.stride[3], 64), end_offset, 64):
            prefetch(entry_of(mask, t.lanes + i, t.key_start) + offset)


cdef Py_ssize_t add_small_mask(const Tensor* mask, const Tile* t, Py_ssize_t lane, real factor) noexcept nogil:
    """What add_mask does, for LANES lanes from `lane` on and from the first key on, straight from a mask of aligned
    reals, as long as there is nothing to clip and no infinity. Returns how many keys are done, in whole vectors."""
    cdef const real* rows[MAX_LANES]
    cdef vf square[MAX_LANES]
    cdef vf largest, scale = vset1(factor)
    cdef real* scores = t.scores + lane
    cdef Py_ssize_t n = t.n, width = t.width, j = 0, i
    for i in range(LANES):
        rows[i] = <const real*> entry_of(mask, t.lanes + lane + i, t.key_start)
    while j + LANES <= n:
        largest = vset1(<real> 0.0)
        for i in range(LANES):
            square[i] = vload(rows[i] + j)
            largest = vmax(vabs(square[i]), largest)  # passes over a NaN, or (NEON) stays one
        if vany(vless(vset1(<real> BIAS_LIMIT), largest)) or vany(vdiffer(largest, largest)):
            break
        vtranspose(square)
        for i in range(LANES):
            vstore(scores + (j + i) * width, vfma(vload(scores + (j + i) * width), scale, square[i]))
        j += LANES
    return j


cdef Py_ssize_t add_bool_mask(const Tensor* mask, const Tile* t, Py_ssize_t lane) noexcept nogil:
    """The same for a bool mask whose entries are adjacent."""
    cdef const char* rows[MAX_LANES]
    cdef int8_t tile[64 * MAX_LANES]  # VECTOR_BYTES keys of LANES lanes, at most
    cdef vf masked = vset1(<real> -INFINITY)
    cdef Py_ssize_t n = t.n, width = t.width, j = 0, i
    cdef int k
    cdef real* scores = t.scores + lane
    cdef real* s
    for i in range(LANES):
        rows[i] = entry_of(mask, t.lanes + lane + i, t.key_start)
    while j + VECTOR_BYTES <= n:
        vfalse_tile(tile, rows, j)
        for k in range(VECTOR_BYTES):
            s = scores + (j + k) * width
            vstore(s, vselect(vfalse(tile, k), masked, vload(s)))
        j += VECTOR_BYTES
    return j


cdef void add_mask(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """scores = scale * scores + biases; scale is 1 under a bool mask."""
    cdef const Tensor* mask = &p.mask
    cdef const Lane* lanes = t.lanes
    cdef real* scores = t.scores
    cdef real* biases = w.rows  # LANES rows of n, rounded up to whole vectors
    cdef real scale = t.scale
    cdef Py_ssize_t n = t.n, width = t.width, length = round_up(n, LANES), done = 0, j, v, i
    cdef bint one_batch = lanes[0].batch == lanes[width - 1].batch
    cdef bint in_place = rows_are_real(mask), bools = mask.kind == BOOL and mask.stride[3] == 1
    cdef vf square[MAX_LANES]
    t.scale = 1.0
    if width % LANES:  # few rows, in decode
        for i in range(width):
            load_bias(biases, mask, lanes + i, t.key_start, n)
            for j in range(n):
                scores[j * width + i] = (biases[j] if biases[j] == -INFINITY
                                         else scores[j * width + i] * scale + biases[j])
        return
    # One row for every query, such as a key-padding mask: load it once, broadcast each entry to the lanes.
    # Lanes are sorted by batch row, then by head.
    if mask.stride[2] == 0 and (mask.stride[0] == 0 or one_batch) and (
            mask.stride[1] == 0 or (one_batch and lanes[0].head == lanes[width - 1].head)):
        load_bias(biases, mask, lanes, t.key_start, n)
        for j in range(n):
            for v in range(width // LANES):
                add_biases(scores + j * width + v * LANES, scale, vset1(biases[j]))
        return
    # Rows of the mask run along keys, lanes across queries: a transpose in registers in between.
    for v in range(width // LANES):
        if in_place:
            done = add_small_mask(mask, t, v * LANES, scale)
        elif bools:
            done = add_bool_mask(mask, t, v * LANES)
        if done == n:
            continue
        for i in range(LANES):
            load_bias(biases + i * length, mask, lanes + v * LANES + i, t.key_start + done, n - done)
        for j in range(ceil_div(n - done, LANES)):
            for i in range(LANES):
                square[i] = vload(biases + i * length + j * LANES)
            vtranspose(square)
            for i in range(LANES):
                add_biases(scores + (done + j * LANES + i) * width + v * LANES, scale, square[i])


cdef inline void drop_of_lane(const Problem* p, const Lane* lane, real* weights, Py_ssize_t stride,
                              Py_ssize_t key_start, Py_ssize_t n, real keep_scale) noexcept nogil:
    """drop_weights of a lane's weights of keys [key_start, key_start + n)."""
    drop_weights(weights, stride, p.key_offset + key_start, n, p.dropout_threshold, keep_scale, p.seed,
                 <uint32_t> (p.query_offset + lane.query), <uint32_t> (p.head_offset + lane.head),
                 <uint32_t> (p.batch_offset + lane.batch))


cdef void drop_probs(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(t.width):
        drop_of_lane(p, t.lanes + i, t.scores + i, t.width, t.key_start, t.n, p.keep_scale)


cdef void shrink_probs(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """Whole vectors of probabilities. What was above 0 stays so where the factor is not 1: the weight of an infinite
    value. Finite ones do not feel it."""
    cdef const real* shrink = w.shrink + (t.lanes - <const Lane*> w.lanes)
    cdef Py_ssize_t i, period = max(1, t.width // LANES)  # few rows, in decode: a vector has the factor of each lane
    cdef vf zero = vset1(<real> 0.0), one = vset1(<real> 1.0)
    cdef vf prob, factor, product, least
    for i in range(ceil_div(t.n * t.width, LANES)):
        prob, factor = vload(t.scores + i * LANES), vload(shrink + i % period * LANES)
        product = prob * factor
        least = vselect(vless(factor, one), vset1(<real> SMALLEST), zero)
        product = vselect(vless(zero, prob), vmax(product, least), product)
        vstore(t.scores + i * LANES, product)


cdef void scale_values(const Problem* p, const Workspace* w, const Tile* t, real* scaled) noexcept nogil:
    """scaled (OUT): the tile's probabilities, times the scales of values."""
    cdef Py_ssize_t i
    scale_keys(p, w.value_scales, t, scaled)
    if (t.limited or p.mask.data != NULL) and not all_finite(w.value_scales + t.key_start % p.block_kv, t.n):
        find_visible(p, w, t)
        for i in range(t.n * t.width):
            if w.visible[i] == -INFINITY:
                scaled[i] = 0.0


cdef void mask_tile(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """The modifiers that can take a key away."""
    if p.mask.data != NULL:
        add_mask(p, w, t)
    if t.limited:
        limit_keys(p, w, t)


cdef void find_visible(const Problem* p, const Workspace* w, const Tile* t) noexcept nogil:
    """w.visible (OUT)[n][width]: 0 where a lane sees a key, else -inf. The modifiers tell, on a tile of zeros."""
    cdef Tile visible = t[0]
    cdef Py_ssize_t i
    visible.scores, visible.scale = w.visible, 1.0
    for i in range(t.n * t.width):
        w.visible[i] = 0.0
    mask_tile(p, w, &visible)


cdef inline bint is_modified(const Problem* p, const Tile* t) noexcept nogil:
    """Whether any modifier of scores touches the tile."""
    return (t.limited or p.mask.data != NULL or p.k_scales.data != NULL or p.scale != 1 or p.softcap != 0
            or p.slopes != NULL)


cdef bint modify_tile(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """All modifiers of scores; False where there is none."""
    if not is_modified(p, t):
        return False
    if p.k_scales.data != NULL:
        scale_keys(p, w.key_scales, t, t.scores)
    t.scale = p.scale
    # A float mask, when it is the first to need it, brings the scale in itself: one FMA instead of a pass.
    if t.scale != 1 and (p.softcap != 0 or p.slopes != NULL or p.mask.data == NULL or p.mask.kind == BOOL):
        scale_scores(p, w, t)
    if p.softcap != 0:
        cap_scores(p, w, t)
        if w.capped != NULL:
            memcpy(w.capped, t.scores, t.n * t.width * sizeof(real))
    if p.slopes != NULL:
        add_alibi(p, w, t)
    mask_tile(p, w, t)
    return True


cdef void modify_probs(const Problem* p, const Workspace* w, Tile* t) noexcept nogil:
    """All modifiers of probabilities."""
    if p.dropout:
        drop_probs(p, w, t)
    if w.again:
        shrink_probs(p, w, t)
    if p.v_scales.data != NULL:
        scale_values(p, w, t, t.scores)
