"""Packed sequences, and keys in pages: the bits of the dense call of each sequence."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import BFLOAT16, DTYPES, INF, NAN, assert_same_bits, normal

import cattn
from cattn import reference

attention = cattn.scaled_dot_product_attention
every_dtype = pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=[f"{q}-{kv}" for q, kv in DTYPES])

# (queries, keys) of each sequence: both kernels and each width of decode, none of either, several blocks and splits.
LENGTHS = {
    "mixed": [(1, 300), (40, 40), (2, 2), (0, 5), (3, 0), (17, 130), (1, 1), (5, 1100)],
    "long": [(3, 7), (1, 2300), (210, 260), (2, 1)],
    "decode": [(1, 17), (1, 128), (1, 129), (1, 1500)],
    "one": [(9, 33)],
    "none": [],
}
lengths = pytest.mark.parametrize("name", LENGTHS)


def packed(pairs, num_heads=4, num_kv_heads=2, head_dim=16, head_dim_v=None, dtype=np.float32, kv_dtype=None):
    """query, key, value, cu_seqlens_q, cu_seqlens_kv"""
    total_q, total_kv = (sum(pair[i] for pair in pairs) for i in (0, 1))
    return (normal(total_q, num_heads, head_dim, dtype=dtype, seed=1),
            normal(total_kv, num_kv_heads, head_dim, dtype=kv_dtype or dtype, seed=2),
            normal(total_kv, num_kv_heads, head_dim_v or head_dim, dtype=kv_dtype or dtype, seed=3),
            *(np.cumsum([0, *(pair[i] for pair in pairs)]) for i in (0, 1)))


def options_for(batch, num_heads):
    rng = np.random.default_rng(0)
    return {
        "plain": {}, "causal": {"is_causal": True},
        "all": {"is_causal": True, "window": (50, None), "softcap": 3.0, "alibi_slopes": rng.random((batch, num_heads)),
                "sinks": rng.standard_normal(num_heads), "scale": -0.3, "q_offset": rng.integers(0, 30, batch)},
    }


def each(query, key, value, cu_q, cu_kv, *, dropout_p=0.0, seed=None, **options):
    """The dense call for each sequence."""
    out = np.empty((*query.shape[:2], value.shape[-1]), query.dtype)
    lse = np.empty(query.shape[:2], np.result_type(query.dtype, np.float32) if query.dtype != BFLOAT16 else np.float32)
    offset, slopes = options.pop("q_offset", "end"), options.pop("alibi_slopes", None)
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_kv[b], cu_kv[b + 1])
        q, k, v = (np.broadcast_to(x.swapaxes(0, 1), (b + 1 if dropout_p else 1, *x.swapaxes(0, 1).shape))
                   for x in (query[rows], key[keys], value[keys]))
        result = attention(
            q, k, v, return_logsumexp=True, q_offset=offset if isinstance(offset, str) else int(offset[b]),
            alibi_slopes=None if slopes is None else slopes[b], dropout_p=dropout_p, seed=seed, **options)
        out[rows], lse[rows] = (x[-1].swapaxes(0, 1) for x in result)
    return out, lse


def in_pages(rows, cu, page_size, seed=0):
    """Rows of packed sequences in pages of a random order, others and what is behind the end filled with NaN, or 77;
    and the table, with garbage behind the end."""
    rng = np.random.default_rng(seed)
    counts = [-(-(end - start) // page_size) for start, end in itertools.pairwise(cu)]
    order = iter(rng.permutation(sum(counts) + 3))
    pages = np.full((sum(counts) + 3, page_size, *rows.shape[1:]), 77 if rows.dtype == np.int8 else NAN, rows.dtype)
    table = rng.integers(-2**40, 2**40, (len(counts), max(counts, default=0) + 1))
    for b, count in enumerate(counts):
        for i in range(count):
            table[b, i] = next(order)
            part = rows[cu[b] + i * page_size : min(cu[b + 1], cu[b] + (i + 1) * page_size)]
            pages[table[b, i], : len(part)] = part
    return pages, table


@lengths
@every_dtype
@pytest.mark.parametrize("which", ["plain", "causal", "all"])
def test_varlen_has_the_bits_of_dense_calls(isa, name, dtype, kv_dtype, which):
    arrays = packed(LENGTHS[name], dtype=dtype, kv_dtype=kv_dtype)
    options = options_for(len(LENGTHS[name]), 4)[which]
    expected = each(*arrays, **options)
    for num_threads in (1, 2, 5):
        assert_same_bits(
            cattn.varlen_attention(*arrays, return_logsumexp=True, num_threads=num_threads, **options), expected)


@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 16), (4, 16), (8, 16), (12, 32), (16, 64), (48, 32), (64, 64),
                                                     (128, 32), (256, 33), (1024, 16)])
@every_dtype
@pytest.mark.parametrize("which", ["causal", "all"])
def test_pages_have_the_bits_of_dense_calls(isa, page_size, head_dim, dtype, kv_dtype, which):
    pairs = [pair for pair in LENGTHS["mixed"] + LENGTHS["long"] if pair[1] or which == "causal"]
    query, key, value, cu_q, cu_kv = packed(pairs, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype)
    options = options_for(len(pairs), 4)[which]
    expected = each(query, key, value, cu_q, cu_kv, **options)
    key_pages, table = in_pages(key, cu_kv, page_size)
    value_pages, _ = in_pages(value, cu_kv, page_size)
    for num_threads in (1, 3):
        assert_same_bits(
            cattn.paged_attention(query, key_pages, value_pages, table, np.diff(cu_kv), cu_q, return_logsumexp=True,
                                  num_threads=num_threads, **options), expected)


def test_pages_of_any_layout(isa):
    pairs = LENGTHS["mixed"]
    query, key, value, cu_q, cu_kv = packed(pairs, head_dim=32)
    key_pages, table = in_pages(key, cu_kv, 16)
    value_pages, _ = in_pages(value, cu_kv, 16)
    call = cattn.paged_attention
    rest = table, np.diff(cu_kv), cu_q
    expected = call(query, key_pages, value_pages, *rest)
    both = np.stack([key_pages, value_pages], 1)                                    # FlashInfer, NHD
    assert_same_bits(call(query, both[:, 0], both[:, 1], *rest), expected)
    heads_first = np.ascontiguousarray(key_pages.swapaxes(1, 2)), np.ascontiguousarray(value_pages.swapaxes(1, 2))
    assert_same_bits(call(query, *(x.swapaxes(1, 2) for x in heads_first), *rest), expected)   # HND
    gaps = (np.repeat(key_pages, 2, -1)[..., ::2], np.repeat(value_pages, 2, -1)[..., ::2])
    assert_same_bits(call(query, *gaps, *rest), expected)
    assert_same_bits(call(query, key_pages[::-1], value_pages[::-1],
                          np.where(table >= 0, len(key_pages) - 1 - table, table), *rest[1:]), expected)
    out = np.empty((len(query), 32, 4), np.float32).swapaxes(1, 2)
    assert call(query, key_pages, value_pages, *rest, out=out) is out
    assert_same_bits(out.copy(), expected)


@pytest.mark.parametrize("page_size", [16, 48, 128])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_pages_of_values_that_are_packed(isa, head_dim, page_size):
    """More rows than two panels, and rows of values of 512 bytes: in place in several runs, and copied beside keys that
    are read in place (of two heads of 16)."""
    query, key, value, cu_q, cu_kv = packed([(150, 300), (70, 71)], head_dim=head_dim, head_dim_v=128)
    expected = each(query, key, value, cu_q, cu_kv, is_causal=True)
    key_pages, table = in_pages(key, cu_kv, page_size)
    value_pages, _ = in_pages(value, cu_kv, page_size)
    heads_first = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (key_pages, value_pages)]
    for pages in ((key_pages, value_pages), heads_first):
        assert_same_bits(
            cattn.paged_attention(query, *pages, table, np.diff(cu_kv), cu_q, return_logsumexp=True, is_causal=True),
            expected)


def of_8_bits(total, heads, head_dim, scales, seed):
    """int8 numbers, a scale for each row, one of these, and what they stand for."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-128, 128, (total, heads, head_dim), np.int8)
    scales = rng.choice(np.array(scales, np.float32), (total, heads))
    return numbers, scales, numbers * scales[..., None]


def paged_8_bits(query, keys, values, cu_q, cu_kv, page_size, **options):
    """paged_attention of two results of of_8_bits."""
    (key_pages, table), (key_scales, _), (value_pages, _), (value_scales, _) = (
        in_pages(x, cu_kv, page_size) for x in (*keys[:2], *values[:2]))
    return cattn.paged_attention(query, key_pages, value_pages, table, np.diff(cu_kv), cu_q, key_scales=key_scales,
                                 value_scales=value_scales, return_logsumexp=True, **options)


POWERS = 2.0 ** np.arange(-12, -5)


@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 32), (4, 16), (8, 64), (12, 32), (16, 96), (48, 32), (64, 64),
                                                     (128, 32), (256, 33), (64, 272), (1024, 16)])
@pytest.mark.parametrize("which", ["causal", "all"])
def test_pages_of_8_bits(isa, page_size, head_dim, which):
    """With scales that are powers of two, what they stand for is exact, and so is the order of multiplying: the bits of
    dense calls."""
    pairs = [pair for pair in LENGTHS["mixed"] + LENGTHS["long"] if pair[1] or which == "causal"]
    query, _, _, cu_q, cu_kv = packed(pairs, head_dim=head_dim)
    keys, values = (of_8_bits(cu_kv[-1], 2, dim, POWERS, seed) for seed, dim in ((1, head_dim), (2, 48)))
    options = options_for(len(pairs), 4)[which]
    expected = each(query, keys[2], values[2], cu_q, cu_kv, **options)
    for num_threads in (1, 3):
        assert_same_bits(
            paged_8_bits(query, keys, values, cu_q, cu_kv, page_size, num_threads=num_threads, **options), expected)


def test_8_bits_of_any_scale(isa):
    """A row alone has the bits that it has among others, and is as exact as attention on float32 keys has to be: with
    scales of 12 bits, what they stand for is exact in float32."""
    query, _, _, cu_q, cu_kv = packed([(30, 700)], head_dim=64)
    rng = np.random.default_rng(0)
    scales = rng.integers(2**11, 2**12, 50) * 2.0**-18
    keys, values = (of_8_bits(700, 2, 64, scales, seed) for seed in (1, 2))
    out, lse = paged_8_bits(query, keys, values, cu_q, cu_kv, 16)
    for row in (0, 7, 21):
        for count in (1, 2, 4, 7):
            some = slice(row, row + count)
            result = paged_8_bits(query[some], keys, values, [0, count], cu_kv, 64, q_offset=670 + some.start)
            assert_same_bits(result, (out[some], lse[some]))
    plain, exact = (
        reference.varlen_attention(*(x.astype(dtype) for x in (query, keys[2], values[2])), cu_q, cu_kv,
                                   is_causal=True, return_logsumexp=True) for dtype in (np.float32, np.float64))
    sizes = np.abs(values[2]).max(), 1 + np.abs(exact[1]).max()
    for result, one, right, scale in zip((out, lse), plain, exact, sizes, strict=True):
        bound = 2 * np.abs(one - right).max() + 4 * np.finfo(np.float32).eps * scale      # as in tolerance.py
        assert np.abs(result - right).max() <= bound


def test_scales_nobody_sees(isa):
    """Those of keys that a row does not see reach it by no way, whatever they are; those that it sees do."""
    query, _, _, _, cu_kv = packed([(20, 150)], head_dim=32)
    for count in (20, 5, 1):
        keys, values = (of_8_bits(150, 2, 32, [0.01], seed) for seed in (1, 2))
        call = [query[:count], keys, values, [0, count], cu_kv, 16]
        options = {"q_offset": 130, "window": (100, 0)}
        out, lse = paged_8_bits(*call, **options)
        first = max(count - 5, 0)
        for scales in (keys[1], values[1]):
            for worst in (NAN, INF, -INF):
                kept = scales.copy()
                scales[130 + count - 1], scales[:20] = worst, worst   # seen by the last row alone, and by none
                result = paged_8_bits(*call, **options)
                assert_same_bits(tuple(x[first : count - 1] for x in result),
                                 tuple(x[first : count - 1] for x in (out, lse)))
                assert not np.isfinite(result[0][count - 1]).all()
                scales[:] = kept


def test_8_bits_that_overflow(isa):
    """Sums of huge values, done once more with smaller probabilities."""
    query, _, _, cu_q, cu_kv = packed([(3, 900), (40, 500)], head_dim=32)
    keys, values = of_8_bits(1400, 2, 32, POWERS, 1), of_8_bits(1400, 2, 32, [2.0**119, 2.0**120], 2)
    expected = each(query, keys[2], values[2], cu_q, cu_kv, is_causal=True)
    assert np.isfinite(expected[0]).all()
    assert_same_bits(paged_8_bits(query, keys, values, cu_q, cu_kv, 16), expected)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=["float16", "bfloat16"])
def test_queries_of_16_bits_over_8(isa, dtype):
    query, _, _, cu_q, cu_kv = packed([(1, 140), (20, 20)], head_dim=64, dtype=dtype)
    keys, values = (of_8_bits(160, 2, 64, [0.013, 0.02], seed) for seed in (1, 2))
    out, lse = paged_8_bits(query.astype(np.float32), keys, values, cu_q, cu_kv, 64)
    assert_same_bits(paged_8_bits(query, keys, values, cu_q, cu_kv, 64), (out.astype(dtype), lse))


def test_scales_of_any_layout(isa):
    query, _, _, cu_q, cu_kv = packed([(1, 140), (20, 20)], head_dim=64)
    keys, values = (of_8_bits(160, 2, 64, [0.013, 0.02], seed) for seed in (1, 2))
    (k, table), (k_scales, _), (v, _), (v_scales, _) = (in_pages(x, cu_kv, 16) for x in (*keys[:2], *values[:2]))
    rest, names = (table, np.diff(cu_kv), cu_q), ("key_scales", "value_scales")
    expected = cattn.paged_attention(query, k, v, *rest, key_scales=k_scales, value_scales=v_scales)
    heads_first = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v, k_scales, v_scales)]
    gaps = [np.repeat(x, 3, -1)[..., ::3] for x in (k, v, k_scales, v_scales)]
    for arrays in (heads_first, gaps):
        scales = dict(zip(names, arrays[2:], strict=True))
        assert_same_bits(cattn.paged_attention(query, *arrays[:2], *rest, **scales), expected)
    wide = (x.astype(np.float64) for x in (query, k, v))
    exact = reference.paged_attention(*wide, *rest, key_scales=k_scales, value_scales=v_scales)
    np.testing.assert_allclose(expected, exact, rtol=0, atol=2e-6)    # the scales are those of the reference too


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 200)), max_size=6), page=st.integers(1, 70),
       head_dim=st.sampled_from([1, 8, 16, 33, 64]), causal=st.booleans(), threads=st.integers(1, 3),
       window=st.sampled_from([None, (5, 0), (40, 3)]))
def test_any_lengths(isa, pairs, page, head_dim, causal, threads, window):
    arrays = packed(pairs, head_dim=head_dim, head_dim_v=24)
    options = {"is_causal": causal, "window": window}
    expected = each(*arrays, **options)
    options |= {"num_threads": threads, "return_logsumexp": True}
    assert_same_bits(cattn.varlen_attention(*arrays, **options), expected)
    query, key, value, cu_q, cu_kv = arrays
    (key_pages, table), (value_pages, _) = (in_pages(x, cu_kv, page) for x in (key, value))
    assert_same_bits(cattn.paged_attention(query, key_pages, value_pages, table, np.diff(cu_kv), cu_q, **options),
                     expected)


def test_dropout_counts_sequences(isa):
    arrays = packed(LENGTHS["mixed"])
    options = {"dropout_p": 0.4, "seed": 7, "is_causal": True}
    result = cattn.varlen_attention(*arrays, return_logsumexp=True, **options)
    assert_same_bits(result, each(*arrays, **options))


@pytest.mark.parametrize("name", ["mixed", "none"])
def test_reference(name):
    """One dense call with a mask that lets each query see the keys of its own sequence; in float64, where two orders
    of sums differ by less than 1e-13 for numbers of this size."""
    pairs = LENGTHS[name]
    query, key, value, cu_q, cu_kv = packed(pairs, dtype=np.float64)
    result = reference.varlen_attention(query, key, value, cu_q, cu_kv, is_causal=True, return_logsumexp=True)
    mask = np.zeros((len(query), len(key)), bool)
    for b, (seq_len_q, seq_len_kv) in enumerate(pairs):
        mask[cu_q[b] : cu_q[b + 1], cu_kv[b] : cu_kv[b + 1]] = np.tri(seq_len_q, seq_len_kv, seq_len_kv - seq_len_q)
    q, k, v = (x.swapaxes(0, 1) for x in (query, key, value))
    expected = reference.scaled_dot_product_attention(q[None], k[None], v[None], mask, return_logsumexp=True)
    for one, other in zip(result, expected, strict=True):
        np.testing.assert_allclose(one, other[0].swapaxes(0, 1), rtol=0, atol=1e-13)
    (key_pages, table), (value_pages, _) = (in_pages(x, cu_kv, 8) for x in (key, value))
    assert_same_bits(reference.paged_attention(query, key_pages, value_pages, table, np.diff(cu_kv), cu_q,
                                               return_logsumexp=True), result)


def test_lengths_are_copied(isa):
    """`out` may lie over them."""
    count = 300
    numbers = np.zeros(count * 8, np.int64)
    numbers[: count + 1] = np.arange(count + 1)
    query = np.ones((count, 1, 8))
    out = cattn.varlen_attention(query, query, query, numbers[: count + 1],
                                 out=numbers.view(np.float64).reshape(count, 1, 8))
    assert (out == 1).all()
    pages, table, lens = np.ones((1, 4, 1, 8)), np.zeros((count, 1), int), numbers[:count]
    lens[:] = 4
    out = cattn.paged_attention(query, pages, pages, table, lens,
                                out=numbers.view(np.float64).reshape(count, 1, 8))
    assert (out == 1).all()


def test_one_long_among_short_ones_uses_all_threads(isa):
    """Its parts are done by several threads, and merged as one does them."""
    pairs = [(1, 10)] * 20 + [(1, 9000)] + [(1, 10)] * 20
    arrays = packed(pairs, num_heads=1, num_kv_heads=1)
    assert_same_bits(*(cattn.varlen_attention(*arrays, num_threads=n) for n in (1, 4)))


@pytest.mark.parametrize("seq_len_q", [1, 4, 50])
def test_starts_and_end(isa, seq_len_q):
    """Left padding: keys before the start are not there, whatever they hold."""
    query = normal(3, 2, seq_len_q, 16, seed=4)
    key, value = normal(3, 2, 140, 16, seed=5), normal(3, 2, 140, 16, seed=6)
    starts, lens = np.array([0, 37, 140]), np.array([60, 140, 140])
    index = np.arange(140)
    mask = ((index >= starts[:, None]) & (index < lens[:, None]))[:, None, None]
    expected = attention(query, key, value, mask, is_causal=True, q_offset=lens - seq_len_q, return_weights=True,
                         return_logsumexp=True)
    key[:, :, :], value[:, :, :] = (np.where(mask.swapaxes(-1, -2), x, NAN) for x in (key, value))
    options = {"is_causal": True, "q_offset": "end", "kv_lens": lens, "kv_starts": starts}
    assert_same_bits(
        attention(query, key, value, return_weights=True, return_logsumexp=True, **options), expected)
    wide = [x.astype(np.float64) for x in (query, key, value)]
    assert_same_bits(
        reference.scaled_dot_product_attention(*wide, **options),
        reference.scaled_dot_product_attention(*wide, mask, is_causal=True, q_offset=lens - seq_len_q))
    options = {"q_offset": "end", "is_causal": True, "kv_lens": 60}      # what the short way takes
    assert_same_bits(attention(query[:1], key[:1], value[:1], **options), expected[0][:1])


def test_shared_keys_are_those_of_each(isa):
    """Keys and values with a batch stride of 0: the rows of all batch rows stand in one task."""
    query, key, value = normal(5, 4, 3, 16), normal(1, 2, 1500, 16, seed=1), normal(1, 2, 1500, 16, seed=2)
    copies = [np.repeat(x, 5, 0) for x in (key, value)]
    rng = np.random.default_rng(0)
    for options in (
            {}, {"is_causal": True, "q_offset": rng.integers(0, 1500, 5)}, {"kv_lens": rng.integers(0, 1500, 5)},
            {"alibi_slopes": rng.random((5, 4)), "q_offset": np.arange(5), "sinks": np.ones(4)},
            {"attn_mask": rng.random((5, 1, 3, 1500)) < 0.5}, {"attn_mask": normal(5, 1, 1, 1500)},
            {"attn_mask": normal(1, 4, 1, 1500)}, {"attn_mask": rng.random((5, 4, 1, 1500)) < 0.5},
            {"dropout_p": 0.5, "seed": 1}, {"kv_starts": rng.integers(0, 1500, 5)}):
        for seq_len_q in (1, 3):
            if "attn_mask" in options and options["attn_mask"].shape[-2] > seq_len_q:
                continue
            assert_same_bits(*(
                attention(query[:, :, :seq_len_q], k, v, return_weights=True, return_logsumexp=True, num_threads=2,
                          **options) for k, v in ((key, value), copies)))


BAD = [
    ("varlen", {"cu_seqlens_q": [0, 3, 2, 6]}, ValueError, "cu_seqlens_q: expected numbers that never decrease"),
    ("varlen", {"cu_seqlens_q": [1, 3, 5, 6]}, ValueError, "cu_seqlens_q: expected a start of 0"),
    ("varlen", {"cu_seqlens_q": [0, 3, 4, 5]}, ValueError, "cu_seqlens_q: expected an end of 6"),
    ("varlen", {"cu_seqlens_q": [0.0, 3, 4, 6]}, TypeError, "cu_seqlens_q: expected integers"),
    ("varlen", {"cu_seqlens_q": []}, ValueError, "cu_seqlens_q: expected one number or more"),
    ("varlen", {"cu_seqlens_q": np.array([], int)}, ValueError, "cu_seqlens_q: expected one number or more"),
    ("varlen", {"cu_seqlens_kv": [0, 9]}, ValueError, "cu_seqlens_kv: expected 4 numbers"),
    ("varlen", {"query": normal(6, 4)}, ValueError, r"query: expected \(total_q, num_heads, head_dim\)"),
    ("varlen", {"key": normal(9, 3, 16)}, ValueError, "key: expected"),
    ("varlen", {"value": normal(8, 2, 16)}, ValueError, "value: expected"),
    ("varlen", {"q_offset": "start"}, ValueError, "q_offset: expected an int"),
    ("varlen", {"q_offset": [1, 2]}, ValueError, "q_offset: expected an int, or shape"),
    ("paged", {"block_table": [[0, 1], [9, 0], [0, 0]]}, ValueError, "block_table: expected pages from 0 to below"),
    ("paged", {"block_table": [[0, -1], [1, 0], [0, 0]]}, ValueError, "block_table: expected pages from 0 to below"),
    ("paged", {"block_table": [0, 1]}, ValueError, r"block_table: expected shape \(batch, max_pages\)"),
    ("paged", {"kv_lens": [9, 1, 1]}, ValueError, "kv_lens: expected lengths from 0 to max_pages"),
    ("paged", {"kv_lens": [5, 1]}, ValueError, "kv_lens: expected one length for each of 3 rows"),
    ("paged", {"kv_lens": [5.0, 1, 0]}, TypeError, "kv_lens: expected integers"),
    ("paged", {"cu_seqlens_q": None}, ValueError, "query: expected one row for each of 3 sequences"),
    ("paged", {"key_pages": normal(3, 4, 2, 16, dtype=np.float64)}, TypeError, "value_pages: expected the dtype of"),
    ("paged", {"value_pages": normal(3, 4, 1, 16)}, ValueError, "value_pages: expected"),
    ("paged", {"key_scales": np.ones((3, 4, 2), "f")}, ValueError, "key_scales: expected None, as key_pages is"),
    ("paged", {"value_scales": np.ones((3, 4, 2), "f")}, ValueError, "value_scales: expected None, as key_pages is"),
    ("paged", {"key_pages": np.ones((3, 4, 2, 16), np.int8)}, TypeError, "value_pages: expected int8, as the other"),
    ("int8", {"key_scales": None}, TypeError, "key_scales: expected a float32 array, as key_pages is int8, got None"),
    ("int8", {"value_scales": None}, TypeError, "value_scales: expected a float32 array, as value_pages is int8"),
    ("int8", {"key_scales": np.ones((3, 4, 2))}, TypeError, "key_scales: expected float32, got dtype float64"),
    ("int8", {"value_scales": np.ones((3, 4), "f")}, ValueError, r"value_scales: expected shape \(3, 4, 2\), one for"),
    ("int8", {"query": normal(6, 4, 16, dtype=np.float64)}, TypeError, "query: expected float32 or 16 bits over int8"),
    ("int8", {"key_pages": np.ones((3, 4, 2, 16), np.uint8)}, TypeError, "key_pages: expected int8, as the other"),
]


@pytest.mark.parametrize(("which", "change", "error", "text"), BAD)
def test_bad_input(which, change, error, text):
    arguments = {"query": normal(6, 4, 16), "cu_seqlens_q": [0, 3, 4, 6], "out": np.full((6, 4, 16), INF, np.float32)}
    if which == "varlen":
        arguments |= {"key": normal(9, 2, 16), "value": normal(9, 2, 16), "cu_seqlens_kv": [0, 5, 7, 9]}
    else:
        arguments |= {"key_pages": normal(3, 4, 2, 16), "value_pages": normal(3, 4, 2, 16), "kv_lens": [5, 1, 0],
                      "block_table": [[0, 1], [2, 0], [0, 0]]}
    if which == "int8":
        scales = np.ones((3, 4, 2), np.float32)
        arguments |= {"key_pages": scales[..., None].repeat(16, -1).astype(np.int8), "key_scales": scales}
        arguments |= {"value_pages": arguments["key_pages"], "value_scales": scales}
    arguments |= change
    with pytest.raises(error, match=text):
        (cattn.varlen_attention if which == "varlen" else cattn.paged_attention)(**arguments)
    assert (arguments["out"] == INF).all()
