# The table of sinusoidal encodings: sine and cosine of position * frequency, by angle addition in float64,
#     sin(a + b) = sin a cos b + cos a sin b        cos(a + b) = cos a cos b - sin a sin b.
# A position is far + 64 * block + offset; each part is a rotation, kept as two rows with an entry for every column of
# the table: same[] is the cosine of the part's angle, other[] its sine, negative in cosine columns. Then
#     (a then b).same  = a.same * b.same  - a.other * b.other
#     (a then b).other = a.other * b.same + a.same  * b.other
# and a row of the table is `other` in sine columns and `same` in cosine columns: contiguous loops over the columns, for
# every layout and for odd dimensions. Sine and cosine themselves are evaluated for about 12 rows, and one in 4096.
#     64 rotations of offsets, 64 of blocks: by doubling from those of 1, 2, 4, ... positions
#     for each block of 64 positions
#         seed = far rotation, then the block's
#         for each offset, for each column: out = seed then offset
# Errors: below 2e-15 from at most 14 products, besides the rounding of the far angle (1e-8 at position 1e8).

cdef enum:
    STEPS = 64               # offsets in a block, and blocks to the next far position
    NUMBER_FLOPS = 50        # the time of a number of the table, in flops of attention


cdef struct Rotation:
    double* same
    double* other


cdef inline Rotation rotation_at(double* base, Py_ssize_t number, Py_ssize_t dim) noexcept nogil:
    cdef Rotation r
    r.same = base + 2 * number * dim
    r.other = r.same + dim
    return r


cdef void rotate_by(Rotation out, double position, const double* frequency, Py_ssize_t dim,
                    bint concatenated) noexcept nogil:
    """out (OUT): the rotation of `position`, by sine and cosine."""
    cdef Py_ssize_t pair, sine, cosine, half = (dim + 1) // 2
    cdef double s, c
    for pair in range(half):
        s = c_sin(position * frequency[pair])
        c = c_cos(position * frequency[pair])
        sine = pair if concatenated else 2 * pair
        cosine = half + pair if concatenated else 2 * pair + 1
        out.same[sine] = c
        out.other[sine] = s
        if cosine < dim:
            out.same[cosine] = c
            out.other[cosine] = -s


cdef void compose(Rotation out, Rotation a, Rotation b, Py_ssize_t dim) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(dim):
        out.same[c] = a.same[c] * b.same[c] - a.other[c] * b.other[c]
        out.other[c] = a.other[c] * b.same[c] + a.same[c] * b.other[c]


cdef void multiples(double* rotations, Py_ssize_t count, double step, const double* frequency, Py_ssize_t dim,
                    bint concatenated) noexcept nogil:
    """rotations (OUT): of 0, step, 2 * step, ... (count - 1) * step. Those of powers of two by sine and cosine; each
    other one is the largest power of two in it, then the rest: at most 5 products deep."""
    cdef Py_ssize_t i, power = 1
    rotate_by(rotation_at(rotations, 0, dim), 0.0, frequency, dim, concatenated)
    while power < count:
        rotate_by(rotation_at(rotations, power, dim), power * step, frequency, dim, concatenated)
        for i in range(power + 1, min(2 * power, count)):
            compose(rotation_at(rotations, i, dim), rotation_at(rotations, power, dim),
                    rotation_at(rotations, i - power, dim), dim)
        power *= 2


cdef void fill_row(char* row, bint single, const double* seed, const double* turned, Rotation offset,
                   Py_ssize_t dim) noexcept nogil:
    """row (OUT) = seed * offset.same + turned * offset.other, in float32 or float64: two products a number and one
    store. From here on the limit is how fast memory takes the table."""
    cdef float* f32 = <float*> row
    cdef double* f64 = <double*> row
    cdef Py_ssize_t c
    if single:
        for c in range(dim):
            f32[c] = <float> (seed[c] * offset.same[c] + turned[c] * offset.other[c])
    else:
        for c in range(dim):
            f64[c] = seed[c] * offset.same[c] + turned[c] * offset.other[c]


cdef void fill_block(char* rows, Py_ssize_t row_bytes, bint single, Py_ssize_t n, Rotation far, Rotation block,
                     double* offsets, Rotation seed, Py_ssize_t dim, bint concatenated) noexcept nogil:
    """The n rows (OUT) of one block. seed (SCRATCH)."""
    cdef Py_ssize_t r, pair, cosine, half = (dim + 1) // 2
    cdef double cosine_a
    compose(seed, far, block, dim)
    # Now what fill_row needs: sine columns start from (sin a, cos a), which is (other, same), cosine columns from
    # (cos a, sin a), which is (same, -other).
    for pair in range(half):
        cosine = half + pair if concatenated else 2 * pair + 1
        r = pair if concatenated else 2 * pair
        cosine_a = seed.same[r]
        seed.same[r] = seed.other[r]
        seed.other[r] = cosine_a
        if cosine < dim:
            seed.other[cosine] = -seed.other[cosine]
    for r in range(n):
        fill_row(rows + r * row_bytes, single, seed.same, seed.other, rotation_at(offsets, r, dim), dim)


def sinusoid(table, Py_ssize_t offset, double base, bint concatenated, Py_ssize_t num_threads):
    """table (OUT; (length, dim), float32 or float64, contiguous rows): row r is the encoding of position offset + r."""
    cdef float[:, ::1] f32
    cdef double[:, ::1] f64
    cdef bint single = table.dtype.itemsize == 4
    cdef char* rows
    cdef Py_ssize_t length, dim, row_bytes, half, blocks, block, far, num_far, r
    cdef Call call
    cdef double* frequency
    cdef double* offsets
    cdef double* starts
    cdef double* fars
    cdef double* seeds
    if single:
        f32 = table
        length, dim, rows, row_bytes = f32.shape[0], f32.shape[1], <char*> &f32[0, 0], f32.strides[0]
    else:
        f64 = table
        length, dim, rows, row_bytes = f64.shape[0], f64.shape[1], <char*> &f64[0, 0], f64.strides[0]
    if length == 0:
        return
    # One block for the scratch: frequencies, then rotations of offsets, blocks, far positions; a seed for each thread.
    half = (dim + 1) // 2
    blocks = (length + STEPS - 1) // STEPS
    num_far = (blocks + STEPS - 1) // STEPS
    begin_call(&call, num_threads, <double> NUMBER_FLOPS * length * dim)
    num_threads = min(call.num_threads, blocks)
    frequency = <double*> malloc((half + 2 * dim * (min(STEPS, length) + min(STEPS, blocks) + num_far + num_threads))
                                 * sizeof(double))
    if frequency == NULL:
        end_call(&call)
        raise MemoryError("sinusoidal_encoding: no memory for the scratch rows")
    offsets = frequency + half
    starts = offsets + 2 * dim * min(STEPS, length)
    fars = starts + 2 * dim * min(STEPS, blocks)
    seeds = fars + 2 * dim * num_far
    with nogil:
        if num_threads > 1:
            num_threads = cattn_startable(num_threads)
        for r in range(half):
            frequency[r] = pow(base, -2.0 * r / dim)
        multiples(offsets, min(STEPS, length), 1.0, frequency, dim, concatenated)
        multiples(starts, min(STEPS, blocks), STEPS, frequency, dim, concatenated)
        for far in prange(num_far, schedule="static", num_threads=num_threads):
            rotate_by(rotation_at(fars, far, dim), <double> (offset + far * STEPS * STEPS), frequency, dim,
                      concatenated)
        with parallel(num_threads=num_threads):
            for block in prange(blocks, schedule="static"):
                if not stopped(&call):
                    fill_block(rows + block * STEPS * row_bytes, row_bytes, single,
                               min(STEPS, length - block * STEPS), rotation_at(fars, block // STEPS, dim),
                               rotation_at(starts, block % STEPS, dim), offsets, rotation_at(seeds, threadid(), dim),
                               dim, concatenated)
    free(frequency)
    end_call(&call)
