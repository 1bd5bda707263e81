# The table of sinusoidal encodings: sine and cosine of position * frequency, by angle addition in float64,
#     sin(a + b) = sin a cos b + cos a sin b        cos(a + b) = cos a cos b - sin a sin b.
# A position is far + 64 * block + offset; each part is a rotation, kept as two rows with an entry for every column of
# the table: same[] is the cosine of the part's angle, other[] its sine, negative in cosine columns. Then
#     (a then b).same  = a.same * b.same  - a.other * b.other
#     (a then b).other = a.other * b.same + a.same  * b.other
# and a row of the table is `other` in sine columns and `same` in cosine columns: contiguous loops over the columns.
# Sine and cosine themselves are evaluated for about 14 rows, and one in 4096. Positions that are given one by one are
# each a far one, and nothing is added.
#
# A strip of the table is so many pairs of columns that the rotations of 64 offsets stay in a core's L2.
#     tasks: a range of blocks in a strip; for each, by whichever thread is free
#         if the strip is another one than that of the thread's last task
#             its frequencies; 64 rotations of offsets, 64 of blocks: by doubling from those of 1, 2, 4, ... positions
#         for each block of 64 positions
#             far rotation, if another one than the last block's
#             seed = far rotation, then the block's
#             for each offset, for each column: out = seed then offset, narrowed to the table's dtype
# That threads make the same rotations, each for itself, takes no longer than one making them for all.
#
# Errors: below 2e-15 from at most 14 products, besides the rounding of frequencies and angles, which is relative: below
# 2.3e-16 * |position| (1.2e-8 at position 1e8 for whole positions, whose far part alone is rounded as a product), times
# a given frequency where it is larger than 1. No product for a position that was given: 2.3e-16 * (|position| + 1) in
# all.

cdef enum:
    STEPS = 64               # offsets in a block, and blocks to the next far position
    STRIP = 512              # pairs: 64 rotations take 1 MiB; with 256, the writes of 1024 columns are 20 % slower
    SKEW = 8                 # doubles: of rows whole pages apart, reads of one wait for writes to another (7 % slower)
    PACKED = 256             # numbers of a row on their way to a table with gaps
    NUMBER_FLOPS = 50        # the time of a number of the table, in flops of attention
    SINE_FLOPS = 500         # and of a sine


cdef struct Encoding:                   # what a call computes
    Call* call
    Tensor out                          # (1, 1, length, dim); (1, 2, length, pairs): cosines and sines apart
    bint packed                         # its rows are: contiguous, aligned numbers
    Py_ssize_t length, dim, pairs, offset
    const double* positions             # NULL: offset + row
    const double* frequencies           # of the pairs; NULL: those of base
    double base
    bint endpoint, interleaved
    Py_ssize_t sines, cosines           # the first column of each, unless they are interleaved
    Py_ssize_t strip, columns           # pairs in a strip; entries of a row of its rotations
    Py_ssize_t num_offsets, num_starts  # rotations that a thread keeps
    Py_ssize_t block_rows, num_blocks, range_blocks, num_ranges


cdef struct Rotation:
    double* same
    double* other


cdef struct Rotations:                  # scratch of a thread, for one strip
    Py_ssize_t strip, first, pairs      # which one (-1: none yet), its pairs
    Py_ssize_t far_block                # what `far` is of; -1: none yet
    double* frequency
    double* offsets
    double* starts
    Rotation far, seed


cdef inline Rotation rotation_at(double* base, Py_ssize_t number, Py_ssize_t columns) noexcept nogil:
    cdef Rotation r
    r.same = base + 2 * number * columns
    r.other = r.same + columns
    return r


cdef Py_ssize_t scratch_size(const Encoding* e) noexcept nogil:
    """The doubles that the rotations of a thread take."""
    return e.strip + 2 * e.columns * (e.num_offsets + e.num_starts + 2)


cdef void place_rotations(Rotations* t, double* scratch, const Encoding* e) noexcept nogil:
    """t (OUT), of no strip yet."""
    t.strip = -1
    t.frequency = scratch
    t.offsets = scratch + e.strip
    t.starts = t.offsets + 2 * e.columns * e.num_offsets
    t.far = rotation_at(t.starts, e.num_starts, e.columns)
    t.seed = rotation_at(t.starts, e.num_starts + 1, e.columns)


cdef double frequency_of(const Encoding* e, Py_ssize_t pair) noexcept nogil:
    """As given; or from 1 down: to base^(2 / dim - 1), or, with endpoint, to 1 / base itself."""
    cdef double exponent = <double> pair / (e.pairs - 1) if e.endpoint else 2.0 * pair / e.dim
    if e.frequencies != NULL:
        return e.frequencies[pair]
    return 1.0 / e.base if exponent == 1.0 else pow(e.base, -exponent)


# In a strip, sines and cosines are interleaved if they are in the table; else all sines come before all cosines,
# wherever these lie in the table. The last sine of an odd dimension has a cosine here.
cdef inline Py_ssize_t sine_at(Py_ssize_t pair, bint interleaved) noexcept nogil:
    return 2 * pair if interleaved else pair


cdef inline Py_ssize_t cosine_at(Py_ssize_t pair, Py_ssize_t pairs, bint interleaved) noexcept nogil:
    return 2 * pair + 1 if interleaved else pairs + pair


cdef void rotate_by(Rotation out, double position, const Rotations* t, bint interleaved) noexcept nogil:
    """out (OUT): the rotation of `position`, by sine and cosine."""
    cdef Py_ssize_t pair, sine, cosine
    cdef double s, c
    for pair in range(t.pairs):
        s = c_sin(position * t.frequency[pair])
        c = c_cos(position * t.frequency[pair])
        sine, cosine = sine_at(pair, interleaved), cosine_at(pair, t.pairs, interleaved)
        out.same[sine] = out.same[cosine] = c
        out.other[sine] = s
        out.other[cosine] = -s


cdef void compose(Rotation out, Rotation a, Rotation b, Py_ssize_t columns) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(columns):
        out.same[c] = a.same[c] * b.same[c] - a.other[c] * b.other[c]
        out.other[c] = a.other[c] * b.same[c] + a.same[c] * b.other[c]


cdef void multiples(double* rotations, Py_ssize_t count, double step, const Rotations* t,
                    const Encoding* e) noexcept nogil:
    """rotations (OUT): of 0, step, 2 * step, ... (count - 1) * step. Those of powers of two by sine and cosine; each
    other one is the largest power of two in it, then the rest: at most 5 products deep."""
    cdef Py_ssize_t i, power = 1, columns = e.columns
    if count:
        rotate_by(rotation_at(rotations, 0, columns), 0.0, t, e.interleaved)
    while power < count:
        rotate_by(rotation_at(rotations, power, columns), power * step, t, e.interleaved)
        for i in range(power + 1, min(2 * power, count)):
            compose(rotation_at(rotations, i, columns), rotation_at(rotations, power, columns),
                    rotation_at(rotations, i - power, columns), 2 * t.pairs)
        power *= 2


cdef void enter_strip(Rotations* t, const Encoding* e, Py_ssize_t strip) noexcept nogil:
    """t (OUT): what all rows of the strip share."""
    cdef Py_ssize_t pair
    t.strip, t.first = strip, strip * e.strip
    t.pairs = min(e.strip, e.pairs - t.first)
    t.far_block = -1
    for pair in range(t.pairs):
        t.frequency[pair] = frequency_of(e, t.first + pair)
    multiples(t.offsets, e.num_offsets, 1.0, t, e)
    multiples(t.starts, e.num_starts, STEPS, t, e)


cdef void enter_block(Rotations* t, const Encoding* e, Py_ssize_t block) noexcept nogil:
    """t.seed (OUT): the rotation of the block's first row as fill wants it."""
    cdef Py_ssize_t pair, sine, cosine, far_block = block // STEPS * STEPS
    cdef double cosine_a
    if e.positions != NULL:
        rotate_by(t.seed, e.positions[block], t, e.interleaved)
    else:
        if far_block != t.far_block:
            rotate_by(t.far, <double> (e.offset + far_block * STEPS), t, e.interleaved)
            t.far_block = far_block
        compose(t.seed, t.far, rotation_at(t.starts, block - far_block, e.columns), 2 * t.pairs)
    # Sine columns start from (sin a, cos a), which is (other, same), cosine columns from (cos a, sin a), which is
    # (same, -other).
    for pair in range(t.pairs):
        sine, cosine = sine_at(pair, e.interleaved), cosine_at(pair, t.pairs, e.interleaved)
        cosine_a = t.seed.same[sine]
        t.seed.same[sine] = t.seed.other[sine]
        t.seed.other[sine] = cosine_a
        t.seed.other[cosine] = -t.seed.other[cosine]


cdef void fill(char* numbers, Kind kind, const double* seed, const double* turned, const double* same,
               const double* other, Py_ssize_t n) noexcept nogil:
    """numbers (OUT; n of this kind, contiguous and aligned) = seed * same + turned * other: two products each, rounded
    once more where the kind is narrower. From here on the limit is how fast memory takes the table: stores past the
    caches take the same time (131072 x 1024, one thread and two, Emerald Rapids)."""
    cdef float* f32 = <float*> numbers
    cdef double* f64 = <double*> numbers
    cdef uint16_t* half = <uint16_t*> numbers
    cdef Py_ssize_t c
    if kind == F32:
        for c in range(n):
            f32[c] = <float> (seed[c] * same[c] + turned[c] * other[c])
    elif kind == F64:
        for c in range(n):
            f64[c] = seed[c] * same[c] + turned[c] * other[c]
    elif kind == F16:
        for c in range(n):
            half[c] = narrow_f64_to_f16(seed[c] * same[c] + turned[c] * other[c])
    else:
        for c in range(n):
            half[c] = narrow_f64_to_bf16(seed[c] * same[c] + turned[c] * other[c])


cdef void spread(char* p, Py_ssize_t stride, const char* numbers, Kind kind, Py_ssize_t n) noexcept nogil:
    """The n numbers at p, p + stride, ... (OUT), at any address."""
    cdef Py_ssize_t i
    if kind == F32:
        for i in range(n):
            memcpy(p + i * stride, numbers + 4 * i, 4)
    elif kind == F64:
        for i in range(n):
            memcpy(p + i * stride, numbers + 8 * i, 8)
    else:
        for i in range(n):
            memcpy(p + i * stride, numbers + 2 * i, 2)


cdef void fill_with_gaps(char* p, Py_ssize_t stride, Kind kind, const double* seed, const double* turned,
                         const double* same, const double* other, Py_ssize_t n) noexcept nogil:
    """fill() of the numbers at p, p + stride, ..."""
    cdef double packed[PACKED]
    cdef Py_ssize_t c = 0, m
    while c < n:
        m = min(n - c, PACKED)
        fill(<char*> packed, kind, seed + c, turned + c, same + c, other + c, m)
        spread(p + c * stride, stride, <char*> packed, kind, m)
        c += m


cdef void fill_columns(const Encoding* e, Rotations* t, Py_ssize_t block, int part, Py_ssize_t column, Py_ssize_t n,
                       Py_ssize_t at) noexcept nogil:
    """out[part][rows of the block][column : column + n] (OUT), from column `at` of the rotations on; a table that is
    not in parts has a stride of 0 there."""
    cdef Py_ssize_t r, row = block * e.block_rows, stride = e.out.stride[3]
    cdef char* p = row_of(&e.out, 0, part, row) + column * stride
    cdef Rotation offset
    for r in range(min(e.block_rows, e.length - row)):
        offset = rotation_at(t.offsets, r, e.columns)
        if e.packed:
            fill(p, e.out.kind, t.seed.same + at, t.seed.other + at, offset.same + at, offset.other + at, n)
        else:
            fill_with_gaps(p, stride, e.out.kind, t.seed.same + at, t.seed.other + at, offset.same + at,
                           offset.other + at, n)
        p += e.out.stride[2]


cdef void fill_block(const Encoding* e, Rotations* t, Py_ssize_t block) noexcept nogil:
    enter_block(t, e, block)
    if e.interleaved:
        fill_columns(e, t, block, 0, 2 * t.first, min(2 * t.pairs, e.dim - 2 * t.first), 0)
    else:
        fill_columns(e, t, block, 1, e.sines + t.first, t.pairs, 0)
        fill_columns(e, t, block, 0, e.cosines + t.first, min(t.pairs, e.dim // 2 - t.first), t.pairs)


cdef void fill_ranges(const void* what, char* scratch) noexcept nogil:
    """What one thread does of an Encoding. Between two blocks, which take some 10 us, it looks whether the call is to
    end."""
    cdef const Encoding* e = <const Encoding*> what
    cdef Rotations t
    cdef Py_ssize_t number, first, block, strip
    cdef fp_mode before = own_mode()
    place_rotations(&t, <double*> scratch, e)
    number = take_task(e.call)
    while number < e.call.num_tasks and not stopped_by_signal(e.call):
        strip, first = number // e.num_ranges, number % e.num_ranges * e.range_blocks
        if strip != t.strip:
            enter_strip(&t, e, strip)
        for block in range(first, min(first + e.range_blocks, e.num_blocks)):
            if stopped_by_signal(e.call):
                break
            fill_block(e, &t, block)
        task_done(e.call)
        number = take_task(e.call)
    set_mode(before)
    await_others(e.call)


def sinusoid(table, Kind kind, Py_ssize_t offset, const double[::1] positions, const double[::1] frequencies,
             double base, layout, bint endpoint):
    """table (OUT; (length, dim), any strides, of this kind): row r is the encoding of positions[r] or, without them, of
    offset + r. A table (2, length, dim // 2), contiguous, takes all cosines first, then all sines; its layout is None.
    cattn/_positional.py and cattn/_rotary.py have checked the arguments."""
    cdef Encoding e
    cdef Call call
    cdef double flops
    cdef Py_ssize_t num_strips, doubles, size = size_of(kind)
    cdef char* scratch
    describe(&e.out, table, kind)
    e.call, e.length, e.dim = &call, e.out.length[2], e.out.length[1] * e.out.length[3]
    if e.length == 0:
        return
    e.packed = ((e.out.stride[3] == size or e.dim == 1) and e.out.stride[2] % size == 0
                and <uintptr_t> e.out.data % size == 0)
    e.offset, e.base, e.endpoint = offset, base, endpoint
    e.positions = &positions[0] if positions is not None else NULL
    e.frequencies = &frequencies[0] if frequencies is not None else NULL
    e.pairs = (e.dim + 1) // 2
    e.interleaved = layout == "interleaved"
    e.sines = e.dim // 2 if layout == "cosines_first" else 0
    e.cosines = e.pairs if layout == "concatenated" else 0
    e.strip = min(e.pairs, STRIP)
    e.columns = 2 * e.strip + SKEW
    e.block_rows = STEPS if positions is None else 1
    e.num_blocks = ceil_div(e.length, e.block_rows)
    e.num_offsets = min(e.block_rows, e.length)
    e.num_starts = min(STEPS, e.num_blocks) if positions is None else 0
    num_strips = ceil_div(e.pairs, e.strip)
    flops = <double> e.dim * SINE_FLOPS * (e.length if positions is not None else min(e.length, 16) + e.length // 4096)
    if positions is None:
        flops += <double> e.dim * NUMBER_FLOPS * e.length
    begin_call(&call, 0, flops)
    # A few ranges for each thread, none with less work than is worth a thread; each is as long as can be, for the sake
    # of huge pages, which two threads that write next to each other would both clear.
    e.range_blocks = e.num_blocks
    if call.num_threads > 1:
        e.range_blocks = max(e.num_blocks * num_strips // (TASKS_PER_THREAD * call.num_threads),
                             <Py_ssize_t> (SERIAL_FLOPS * e.num_blocks * num_strips / flops))
        e.range_blocks = max(1, min(e.range_blocks, e.num_blocks))
    e.num_ranges = ceil_div(e.num_blocks, e.range_blocks)
    call.num_tasks = call.unfinished = num_strips * e.num_ranges
    call.num_threads = min(call.num_threads, call.num_tasks)
    doubles = scratch_size(&e)
    scratch = take_scratch(call.num_threads * doubles * sizeof(double))
    if scratch == NULL:
        end_call(&call)
        function = "rotary_table" if layout is None else "sinusoidal_encoding"
        raise MemoryError(f"{function}: no memory for {call.num_threads} x {doubles} numbers of scratch")
    with nogil:
        in_threads(&call, fill_ranges, &e, scratch, doubles * sizeof(double))
    give_scratch(scratch)
    end_call(&call)


def narrow_of(const double[::1] x, uint16_t[::1] out, Kind kind):
    """out (OUT) = x, of magnitudes below 2, in a 16-bit kind, as in a table. For tests."""
    cdef Py_ssize_t i
    for i in range(x.shape[0]):
        out[i] = narrow_f64_to_f16(x[i]) if kind == F16 else narrow_f64_to_bf16(x[i])
