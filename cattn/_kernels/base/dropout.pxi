# Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a keyed bijection
# of 128-bit counters. Whether a weight is dropped is a function of (seed, batch, head, query, key) alone, so it does
# not depend on tiles, threads or the order of the work. Specified by cattn.reference.

cdef inline void philox(uint32_t* x, uint32_t key0, uint32_t key1) noexcept nogil:
    """x[0..4) (IN: counter, OUT: four random words). Ten rounds of two 32 x 32 -> 64 bit products, whose halves are
    exchanged and mixed with the key; the constants are the paper's."""
    cdef uint64_t product0, product1
    cdef uint32_t second
    cdef int round
    for round in range(10):
        product0 = <uint64_t> 0xD2511F53 * x[0]
        product1 = <uint64_t> 0xCD9E8D57 * x[2]
        second = x[3]
        x[0] = <uint32_t> (product1 >> 32) ^ x[1] ^ key0
        x[1] = <uint32_t> product1
        x[2] = <uint32_t> (product0 >> 32) ^ second ^ key1
        x[3] = <uint32_t> product0
        key0 += <uint32_t> 0x9E3779B9
        key1 += <uint32_t> 0xBB67AE85


cdef void drop_weights(real* weights, Py_ssize_t stride, Py_ssize_t key_start, Py_ssize_t n, uint32_t threshold,
                       real keep_scale, uint64_t seed, uint32_t query, uint32_t head, uint32_t batch) noexcept nogil:
    """weights[0, stride, ...] (IN/OUT), those of keys [key_start, key_start + n): * keep_scale, or 0 where dropped.

    One counter serves four neighbouring keys. A tile may start in the middle of four: then the first words are made
    and not used, so that a key has the same word wherever tiles begin."""
    cdef uint32_t words[4]
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t word = key_start % 4
    while i < n:
        words[0] = <uint32_t> ((key_start + i) // 4)
        words[1] = query
        words[2] = head
        words[3] = batch
        philox(words, <uint32_t> seed, <uint32_t> (seed >> 32))
        while word < 4 and i < n:
            weights[i * stride] *= keep_scale if words[word] >= threshold else <real> 0.0
            word += 1
            i += 1
        word = 0
