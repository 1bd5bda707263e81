# What this machine can do at most, measured with the same build flags as the kernels: the benchmark divides by it, and
# a test fails when the kernels fall far below it (then the build has lost -O3 or its inlining).

cdef real spin_fma(Py_ssize_t iterations) noexcept nogil:
    """12 independent chains of vector FMAs, entirely in registers: as many as the kernels' register tile has, enough
    for two pipes of 4 to 6 cycles. The addend is the result's register, as NEON's FMA wants it: without, each took two
    copies. They grow, which never makes a subnormal number or NaN."""
    cdef vf acc[12]
    cdef vf a = vset1(<real> 1e-6)
    cdef real lanes[MAX_LANES]
    cdef Py_ssize_t i
    cdef int r
    for r in range(12):
        acc[r] = vset1(<real> (r + 1))
    for i in range(iterations):
        for r in range(12):
            acc[r] = vfma(acc[r], a, acc[r])
    for r in range(1, 12):
        acc[0] = acc[0] + acc[r]
    vstore(lanes, acc[0])
    return lanes[0]


def fma_flops(Py_ssize_t iterations, int num_threads=1):
    """Runs `iterations` rounds of 12 vector FMAs in each thread; returns the floating-point operations done (an FMA is
    two). The result goes into a comparison, or the compiler would drop the loop."""
    cdef int thread, threads
    cdef real total = 0.0
    with nogil:
        threads = start_threads(num_threads)
        if threads == 1:
            for thread in range(num_threads):
                total += spin_fma(iterations)
        else:
            with parallel(num_threads=threads):
                threads_started()
                for thread in prange(num_threads, schedule="static"):
                    total += spin_fma(iterations)
    return 0.0 if total != total else 24.0 * LANES * iterations * num_threads


cdef real sum_chunk(const real* a, Py_ssize_t n) noexcept nogil:
    """The sum of whole runs of four vectors, with a prefetch a page ahead."""
    cdef vf total[4]
    cdef real lanes[MAX_LANES]
    cdef Py_ssize_t i
    cdef int r
    for r in range(4):
        total[r] = vset1(<real> 0.0)
    for i in range(n // (4 * LANES)):
        prefetch(a + 4096 // <Py_ssize_t> sizeof(real))
        if LANES * sizeof(real) > 16:
            prefetch(a + 4160 // <Py_ssize_t> sizeof(real))
        for r in range(4):
            total[r] = total[r] + vload(a + r * LANES)
        a += 4 * LANES
    vstore(lanes, total[0] + total[1] + total[2] + total[3])
    return lanes[0]


def read_bytes(const real[::1] a, int num_threads=1):
    """Reads the array once, cut in equal parts over the threads; returns the bytes read. To measure memory and not a
    cache the array has to be several times the last cache."""
    cdef Py_ssize_t part = a.shape[0] // num_threads
    cdef int thread, threads
    cdef real total = 0.0
    with nogil:
        threads = start_threads(num_threads)
        if threads == 1:
            for thread in range(num_threads):
                total += sum_chunk(&a[0] + thread * part, part)
        else:
            with parallel(num_threads=threads):
                threads_started()
                for thread in prange(num_threads, schedule="static"):
                    total += sum_chunk(&a[0] + thread * part, part)
    return 0 if total != total else num_threads * part * sizeof(real)


def exp2_of(const real[::1] x, real[::1] out):
    """out (OUT) = 2**x by the softmax's own exp2, whole vectors of it: for the test that sweeps its error."""
    cdef Py_ssize_t i
    for i in range(x.shape[0] // LANES):
        vstore(&out[i * LANES], vexp2(vload(&x[i * LANES])))


def stored_of(const real[::1] x, uint16_t[::1] out, Kind kind):
    """out (OUT) = x in a 16-bit kind, as a row of results. For tests."""
    store_row(<char*> &out[0], sizeof(uint16_t), &x[0], x.shape[0], kind)


def edges():
    """{what: its size}, of all that loops and blocks begin and end by: tests take shapes on both sides of them."""
    return {
        "lanes": LANES, "tile_rows": ATTEND_ROWS, "block_rows": MAX_ROWS, "decode_rows": MAX_DECODE_ROWS,
        "block_keys": keys_per_block(1, 1), "wide_block_keys": keys_per_block(NARROW_DIMS + 1, 1),
        "split_keys": SPLIT_KEYS, "narrow_dims": NARROW_DIMS, "dims_at_once": DIMS_AT_ONCE,
        "features": FEATURES, "block_dims": BLOCK_DIMS, "chunk_dims": CHUNK_DIMS,
        "sum_columns": SUM_COLUMNS, "table_rows": STEPS, "table_columns": 2 * STRIP,
        "rotary_pairs": PIECE, "rotary_run": RUN,
        "merge_dims": MERGE_DIMS, "gradient_rows": BACKWARD_ROWS, "gradient_keys": BACKWARD_KEYS,
        "gradient_split": BACKWARD_SPLIT, "gradient_dims": MAX_BLOCK // BACKWARD_ROWS,
    }
