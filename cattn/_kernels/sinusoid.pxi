# The table of sinusoidal encodings, row[pos] = sin and cos of pos * frequency. By angle addition in float64,
#     sin(a + b) = sin a cos b + cos a sin b        cos(a + b) = cos a cos b - sin a sin b,
# position a + b = start of its block + offset in the block, so that sine and cosine are evaluated for one row a block
# and BLOCK rows of offsets only. There is no recurrence: errors stay at 2e-16 wherever the row is, besides the rounding
# of the angle a itself (1e-8 at position 1e8).
#     for each block of positions
#         seeds: sin_cos[column], cos_sin[column] of the block's start
#         for each offset in the block, for each column
#             out = sin_cos * same[offset] + cos_sin * other[offset]
# `same` holds cos b in every column and `other` sin b, -sin b in sine and cosine columns: one loop over contiguous
# columns serves every layout and odd dimensions.

cdef enum:
    BLOCK = 64   # positions a block: balances the BLOCK rows of offsets against one row of seeds a block


cdef void combine(double* out, const double* sin_cos, const double* cos_sin, const double* same, const double* other,
                  Py_ssize_t dim) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(dim):
        out[c] = sin_cos[c] * same[c] + cos_sin[c] * other[c]


cdef void combine_f32(float* out, const double* sin_cos, const double* cos_sin, const double* same,
                      const double* other, Py_ssize_t dim) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(dim):
        out[c] = <float> (sin_cos[c] * same[c] + cos_sin[c] * other[c])


cdef void fill_seeds(double* sin_cos, double* cos_sin, double position, const double* frequency, Py_ssize_t dim,
                     bint concatenated) noexcept nogil:
    """Sine (cosine) of the position's angles, by columns of the table; cos_sin (OUT) is its derivative's magnitude."""
    cdef Py_ssize_t pair, sine, cosine, half = (dim + 1) // 2
    cdef double s, c
    for pair in range(half):
        s = c_sin(position * frequency[pair])
        c = c_cos(position * frequency[pair])
        sine = pair if concatenated else 2 * pair
        cosine = half + pair if concatenated else 2 * pair + 1
        sin_cos[sine] = s
        cos_sin[sine] = c
        if cosine < dim:
            sin_cos[cosine] = c
            cos_sin[cosine] = s


cdef void fill_block(char* rows, Py_ssize_t row_bytes, bint single, Py_ssize_t n, double position,
                     const double* frequency, const double* same, const double* other, double* seed, Py_ssize_t dim,
                     bint concatenated) noexcept nogil:
    """The n rows (OUT) of one block, the first at `position`. seed (SCRATCH): two rows."""
    cdef Py_ssize_t r
    fill_seeds(seed, seed + dim, position, frequency, dim, concatenated)
    for r in range(n):
        if single:
            combine_f32(<float*> (rows + r * row_bytes), seed, seed + dim, same + r * dim, other + r * dim, dim)
        else:
            combine(<double*> (rows + r * row_bytes), seed, seed + dim, same + r * dim, other + r * dim, dim)


def sinusoid(table, Py_ssize_t offset, double base, bint concatenated, int num_threads):
    """table (OUT; (length, dim), float32 or float64, contiguous rows): row r is the encoding of position offset + r."""
    cdef float[:, ::1] f32
    cdef double[:, ::1] f64
    cdef bint single = table.dtype.itemsize == 4
    cdef char* rows
    cdef Py_ssize_t length, dim, row_bytes, half, offsets, blocks, block, r
    cdef double* frequency
    cdef double* same
    cdef double* other
    cdef double* seeds
    if single:
        f32 = table
        length, dim, rows, row_bytes = f32.shape[0], f32.shape[1], <char*> &f32[0, 0], f32.strides[0]
    else:
        f64 = table
        length, dim, rows, row_bytes = f64.shape[0], f64.shape[1], <char*> &f64[0, 0], f64.strides[0]
    if length == 0:
        return
    half = (dim + 1) // 2
    offsets = min(BLOCK, length)
    blocks = (length + BLOCK - 1) // BLOCK
    num_threads = 1 if cattn_child_is_serial else <int> min(num_threads, blocks)
    frequency = <double*> malloc((half + 2 * offsets * dim + 2 * num_threads * dim) * sizeof(double))
    if frequency == NULL:
        raise MemoryError("sinusoidal_encoding: no memory for the scratch rows")
    same = frequency + half
    other = same + offsets * dim
    seeds = other + offsets * dim
    with nogil:
        for r in range(half):
            frequency[r] = pow(base, -2.0 * r / dim)
        for r in prange(offsets, schedule="static", num_threads=num_threads):
            fill_offsets(same + r * dim, other + r * dim, r, frequency, dim, concatenated)
        with parallel(num_threads=num_threads):
            for block in prange(blocks, schedule="static"):
                fill_block(rows + block * BLOCK * row_bytes, row_bytes, single, min(BLOCK, length - block * BLOCK),
                           <double> (offset + block * BLOCK), frequency, same, other, seeds + 2 * dim * threadid(),
                           dim, concatenated)
    free(frequency)


cdef void fill_offsets(double* same, double* other, Py_ssize_t position, const double* frequency, Py_ssize_t dim,
                       bint concatenated) noexcept nogil:
    """same (OUT) = cos b in both columns of a pair; other (OUT) = sin b in its sine column, -sin b in the cosine's."""
    cdef Py_ssize_t pair, sine, cosine, half = (dim + 1) // 2
    cdef double s, c
    for pair in range(half):
        s = c_sin(position * frequency[pair])
        c = c_cos(position * frequency[pair])
        sine = pair if concatenated else 2 * pair
        cosine = half + pair if concatenated else 2 * pair + 1
        same[sine] = c
        other[sine] = s
        if cosine < dim:
            same[cosine] = c
            other[cosine] = -s
