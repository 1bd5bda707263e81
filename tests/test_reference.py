"""The specification against a triple loop, closed forms, known random numbers and, if installed, PyTorch."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cattn.reference import dropout_keep, philox4x32, scaled_dot_product_attention

INF = math.inf


def philox_word(seed, batch, head, i, j):
    """One word of Philox4x32-10 in Python ints, written from the paper."""
    counter, key = [j // 4, i, head, batch], [seed % 2**32, seed // 2**32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter[j % 4]


def triple_loop(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *, q_offset=0, window=None,
    softcap=0.0, alibi_slopes=None, sinks=None, kv_lens=None, seed=None,
):
    """4-D, float64, one score at a time."""
    batch, num_heads, seq_len_q, head_dim = query.shape
    num_kv_heads, seq_len_kv = key.shape[1:3]
    out = np.zeros((batch, num_heads, seq_len_q, value.shape[-1]))
    weights = np.zeros((batch, num_heads, seq_len_q, seq_len_kv))
    logsumexp = np.full((batch, num_heads, seq_len_q), -INF)
    if attn_mask is not None:
        attn_mask = np.broadcast_to(attn_mask, weights.shape)
    for b, h, i in np.ndindex(batch, num_heads, seq_len_q):
        kv_head = h // (num_heads // num_kv_heads)
        position = i + (q_offset if np.ndim(q_offset) == 0 else int(q_offset[b]))
        scores = []
        for j in range(seq_len_kv):
            score = math.fsum(query[b, h, i] * key[b, kv_head, j])
            score *= 1 / math.sqrt(head_dim) if scale is None else scale
            if softcap:
                score = softcap * math.tanh(score / softcap)
            if alibi_slopes is not None:
                slope = alibi_slopes[h] if alibi_slopes.ndim == 1 else alibi_slopes[b, h]
                score -= slope * abs(position - j)
            if attn_mask is not None:
                score = (score if attn_mask[b, h, i, j] else -INF) if attn_mask.dtype == bool else (
                    score + attn_mask[b, h, i, j])
            if is_causal and j > position:
                score = -INF
            if window is not None and window[0] not in (None, -1) and j < position - window[0]:
                score = -INF
            if window is not None and window[1] not in (None, -1) and j > position + window[1]:
                score = -INF
            if kv_lens is not None and j >= kv_lens[b]:
                score = -INF
            scores.append(score)
        if max(scores, default=-INF) == -INF:
            continue
        top = max(scores)
        total = math.fsum(math.exp(score - top) for score in scores)
        logsumexp[b, h, i] = top + math.log(total)
        if sinks is not None:
            total += math.exp(sinks[h] - top)
        for j, score in enumerate(scores):
            weight = math.exp(score - top) / total
            if dropout_p:
                kept = philox_word(seed, b, h, i, j) >= int(dropout_p * 2**32)
                weight = weight / (1 - dropout_p) if kept else 0.0
            weights[b, h, i, j] = weight
            out[b, h, i] += weight * value[b, kv_head, j]
    return out, weights, logsumexp


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, num_kv_heads, group_size = (draw(st.integers(1, n)) for n in (2, 2, 3))
    seq_len_q, seq_len_kv = draw(st.integers(0, 5)), draw(st.integers(0, 6))
    num_heads = num_kv_heads * group_size
    head_dim, head_dim_v = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    arrays = (
        rng.standard_normal((batch, num_heads, seq_len_q, head_dim)),
        rng.standard_normal((batch, num_kv_heads, seq_len_kv, head_dim)),
        rng.standard_normal((batch, num_kv_heads, seq_len_kv, head_dim_v)),
    )
    options = {"is_causal": draw(st.booleans()), "softcap": draw(st.sampled_from([0.0, 0.7]))}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([1.0, 0.0, -2.5]))
    offsets = st.integers(-3, 7)
    options["q_offset"] = draw(st.one_of(offsets, st.builds(lambda n: np.arange(n, n - batch, -1), offsets)))
    if draw(st.booleans()):
        sides = st.sampled_from([None, -1, 0, 1, 3])
        options["window"] = (draw(sides), draw(sides))
    if draw(st.booleans()):
        options["alibi_slopes"] = rng.random((batch, num_heads) if draw(st.booleans()) else num_heads)
    if draw(st.booleans()):
        options["sinks"] = rng.standard_normal(num_heads)
    if draw(st.booleans()):
        options["kv_lens"] = rng.integers(0, seq_len_kv + 1, batch)
    if draw(st.booleans()):
        axes = (batch, num_heads, seq_len_q, seq_len_kv)
        shape = [n if draw(st.booleans()) else 1 for n in axes][draw(st.integers(0, 3)):]
        mask = rng.random(shape) < 0.7
        bias = np.where(mask, rng.random(shape), -INF)
        options["attn_mask"] = mask if draw(st.booleans()) else bias
    if draw(st.booleans()):
        options |= {"dropout_p": 0.4, "seed": draw(st.integers(0, 2**64 - 1))}
    return arrays, options


@settings(deadline=None, max_examples=300)
@given(problems())
def test_triple_loop(problem):
    arrays, options = problem
    results = scaled_dot_product_attention(*arrays, **options, return_weights=True, return_logsumexp=True)
    for result, expected in zip(results, triple_loop(*arrays, **options), strict=True):
        assert result.shape == expected.shape and result.dtype == np.float64
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-13)


def random_arrays(*shape, count=3, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(dtype)


def everything(*args, **options):
    return scaled_dot_product_attention(*args, **options, return_weights=True, return_logsumexp=True)


# Shapes.


def test_one_head_without_a_heads_axis():
    query, key, value = random_arrays(3, 5, 4)
    mask = np.random.default_rng(1).random((3, 5, 5)) < 0.6
    options = {"is_causal": True, "dropout_p": 0.5, "seed": 3}
    lengths, offsets = np.array([5, 2, 0]), np.array([0, 1, -1])
    with_heads = everything(
        *(x[:, None] for x in (query, key, value, mask)), kv_lens=lengths, q_offset=offsets, **options
    )
    without = everything(query, key, value, mask, kv_lens=lengths, q_offset=offsets, **options)
    for a, b in zip(with_heads, without, strict=True):
        np.testing.assert_array_equal(a[:, 0], b)
    single = everything(query[0], key[0], value[0], mask[0], kv_lens=np.array(5), q_offset=0, **options)
    for a, b in zip(without, single, strict=True):
        np.testing.assert_array_equal(a[0], b)


def test_leading_axes_broadcast_and_are_counted_in_c_order():
    query = random_arrays(2, 3, 4, 5, 8, count=1)[0]
    key, value = random_arrays(3, 2, 6, 8, count=2, seed=1)
    lengths, slopes = np.arange(6).reshape(2, 3), random_arrays(2, 3, 4, count=1)[0]
    options = {"dropout_p": 0.3, "seed": 11}
    nested = everything(query, key, value, kv_lens=lengths, q_offset=lengths, alibi_slopes=slopes, **options)
    flat = everything(
        query.reshape(6, 4, 5, 8), *(np.tile(x, (2, 1, 1, 1)) for x in (key, value)),
        kv_lens=lengths.ravel(), q_offset=lengths.ravel(), alibi_slopes=slopes.reshape(6, 4), **options,
    )
    for a, b in zip(nested, flat, strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-12)


def test_leading_axis_that_only_the_value_has():
    query, key = random_arrays(1, 2, 3, 4, count=2)
    value = random_arrays(5, 2, 3, 4, count=1)[0]
    out, weights, _ = everything(query, key, value)
    assert out.shape == (5, 2, 3, 4) and weights.shape == (5, 2, 3, 3)


def test_what_is_returned():
    arrays = random_arrays(3, 4)
    out, weights, logsumexp = everything(*arrays)
    np.testing.assert_array_equal(scaled_dot_product_attention(*arrays), out)
    for flag, extra in (("return_weights", weights), ("return_logsumexp", logsumexp)):
        result = scaled_dot_product_attention(*arrays, **{flag: True})
        assert len(result) == 2
        np.testing.assert_array_equal(result[1], extra)


# Closed forms.


def test_equal_scores_average_what_is_seen():
    query, value = np.zeros((6, 3)), np.arange(6.0)[:, None]
    out, weights, logsumexp = everything(query, query, value, is_causal=True)
    np.testing.assert_allclose(out[:, 0], [0, 0.5, 1, 1.5, 2, 2.5])
    np.testing.assert_allclose(weights, np.tri(6) / np.arange(1, 7)[:, None])
    np.testing.assert_allclose(logsumexp, np.log(np.arange(1, 7)))
    out = scaled_dot_product_attention(query, query, value, window=(1, 2), is_causal=False)
    np.testing.assert_allclose(out[:, 0], [1, 1.5, 2.5, 3.5, 4, 4.5])


def test_causal_mask_as_drawn():
    x, keys = np.zeros((3, 1)), np.zeros((5, 1))
    drawn = {
        0: [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        2: [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        -1: [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    }
    for q_offset, expected in drawn.items():
        weights = everything(x, keys, keys, is_causal=True, q_offset=q_offset)[1]
        assert (weights > 0).astype(int).tolist() == expected


def test_sink_takes_its_share():
    x = np.zeros((4, 2, 3, 1))
    _, weights, logsumexp = everything(x, x, x, sinks=np.array([0.0, -INF]))
    np.testing.assert_allclose(weights[:, 0], 1 / 4)
    np.testing.assert_allclose(weights[:, 1], 1 / 3)
    np.testing.assert_allclose(logsumexp, math.log(3))
    _, weights, logsumexp = everything(x, x, x, sinks=np.array([1e4, 0.0]))
    assert not weights[:, 0].any()
    np.testing.assert_allclose(logsumexp, math.log(3))


def test_alibi_is_geometric():
    x = np.zeros((1, 1, 50, 1))
    weights = everything(x, x, x, is_causal=True, alibi_slopes=np.array([math.log(2)]))[1]
    np.testing.assert_allclose(weights[0, 0, -1, ::-1], 0.5 ** np.arange(1, 51), rtol=1e-12)


def test_softcap_bounds_the_scores_before_the_mask():
    query, key = np.full((1, 1), 1e3), np.array([[1.0], [-1.0], [1.0]])
    weights = everything(query, key, key, np.array([True, True, False]), softcap=2.0)[1]
    np.testing.assert_allclose(weights, [[1 / (1 + math.exp(-4)), 1 / (1 + math.exp(4)), 0]])


# Masked keys, empty rows, NaN and inf.


NOTHING_TO_SEE = {
    "bool mask": {"attn_mask": np.zeros((3, 4), bool)},
    "float mask": {"attn_mask": np.full((3, 4), -INF)},
    "causal": {"is_causal": True, "q_offset": -3},
    "window": {"window": (0, 0), "q_offset": 9},
    "kv_lens": {"kv_lens": np.array(0)},
    "kv_lens and mask": {"kv_lens": np.array(2), "attn_mask": np.array([False, False, True, True])},
    "ALiBi and NaN sinks": {
        "attn_mask": np.zeros((3, 4), bool), "alibi_slopes": np.ones(1), "sinks": np.full(1, math.nan),
    },
}


@pytest.mark.parametrize("options", NOTHING_TO_SEE.values(), ids=NOTHING_TO_SEE)
def test_row_that_sees_nothing(options):
    query, key = np.ones((3, 2)), np.ones((4, 2))
    out, weights, logsumexp = everything(query, key, key, **options)
    assert not out.any() and not weights.any() and (logsumexp == -INF).all()


def test_no_keys_and_no_queries():
    query = np.ones((2, 3, 4, 5))
    none = np.ones((2, 3, 0, 5))
    out, weights, logsumexp = everything(query, none, none)
    assert out.shape == query.shape and not out.any()
    assert weights.shape == (2, 3, 4, 0) and (logsumexp == -INF).all()
    assert scaled_dot_product_attention(none, query, query).shape == none.shape


MASKED = {
    "bool mask": {"attn_mask": np.array([True, True, False, False])},
    "float mask": {"attn_mask": np.array([0.0, 0.5, -INF, -INF])},
    "kv_lens": {"kv_lens": np.array([2, 2])},
    "window": {"window": (None, 0), "q_offset": -1},
    "causal with ALiBi and softcap": {"is_causal": True, "q_offset": -1, "alibi_slopes": np.ones(2), "softcap": 3.0},
}


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF])
@pytest.mark.parametrize("options", MASKED.values(), ids=MASKED)
def test_garbage_behind_the_mask_is_not_read(options, garbage):
    query, key, value = random_arrays(2, 2, 4, 3)
    query = query[:, :, :3]
    expected = everything(query, key, value, **options)
    key, value = key.copy(), value.copy()
    key[..., 3, :] = value[..., 2:, 1] = garbage
    if "kv_lens" in options or "attn_mask" in options:
        key[..., 2, 0] = garbage
    else:  # the last row sees key 1 but not key 2
        expected = [x[:, :, :3] for x in expected]
    for a, b in zip(everything(query, key, value, **options), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_value_row_reaches_those_who_see_it():
    query, value = np.zeros((4, 2)), np.ones((4, 3))
    value[2, 1] = math.nan
    out = scaled_dot_product_attention(query, query, value, is_causal=True)
    np.testing.assert_array_equal(out, [[1, 1, 1], [1, 1, 1], [1, math.nan, 1], [1, math.nan, 1]])
    value[2, 1] = INF
    out = scaled_dot_product_attention(query, query, value, is_causal=True)
    np.testing.assert_array_equal(out[:, 1], [1, 1, INF, INF])


def test_weight_that_underflows_still_multiplies():
    query, key, value = np.ones((1, 1)), np.array([[0.0], [-1e6]]), np.array([[1.0], [math.nan]])
    out, weights, _ = everything(query, key, value)
    assert weights.tolist() == [[1.0, 0.0]] and np.isnan(out).all()


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_bad_score_spoils_its_row_alone(bad):
    query, key, value = random_arrays(3, 2)
    bias = np.zeros((3, 3))
    bias[1, 2] = bad
    bias[1, 0] = -INF
    clean = everything(query, key, value)
    out, weights, logsumexp = everything(query, key, value, bias)
    assert np.isnan(out[1]).all() and np.isnan(weights[1, 1:]).all() and np.isnan(logsumexp[1])
    assert weights[1, 0] == 0
    for a, b in zip((out, weights, logsumexp), clean, strict=True):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])


def test_score_of_minus_inf_has_weight_0():
    query, key, value = np.ones((1, 1)), np.array([[0.0], [-INF]]), np.array([[1.0], [2.0]])
    out, weights, logsumexp = everything(query, key, value)
    assert (out.item(), weights.tolist(), logsumexp.item()) == (1.0, [[1.0, 0.0]], 0.0)
    value[1] = math.nan  # the key is seen, so its NaN goes through
    assert math.isnan(everything(query, key, value)[0].item())


@pytest.mark.parametrize("low", [np.finfo(np.float32).min, -1e300, np.finfo(np.float64).min], ids=str)
def test_finite_mask_value_is_a_bias(low):
    """A row of such values is uniform, whatever their size; -inf would make it empty."""
    query, key = np.zeros((1, 4), np.float32), np.zeros((3, 4), np.float32)
    weights = everything(query, key, key, np.full((1, 3), low))[1]
    np.testing.assert_array_equal(weights, np.full((1, 3), 1 / 3, np.float32))


# Dtypes.


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float32, np.float64, np.longdouble])
def test_dtypes(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    arrays = [x.astype(dtype) for x in random_arrays(2, 5, 8)]
    exact = everything(*(x.astype(np.longdouble) for x in arrays), is_causal=True)
    out, weights, logsumexp = everything(*arrays, is_causal=True)
    wide = np.result_type(dtype, np.float32)
    assert out.dtype == weights.dtype == dtype and logsumexp.dtype == wide
    eps = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(out.dtype.name, 8 * np.finfo(wide).eps)
    for result, expected in zip((out, weights), exact, strict=False):
        np.testing.assert_allclose(result.astype(np.longdouble), expected, rtol=2 * eps, atol=eps)
    np.testing.assert_allclose(logsumexp, exact[2], rtol=8 * np.finfo(wide).eps)


def test_compressed_cache():
    query, key, value = random_arrays(2, 5, 8, dtype=np.float32)
    key, value = key.astype(np.float16), value.astype(np.float16)
    expected = scaled_dot_product_attention(query, key.astype(np.float32), value.astype(np.float32))
    np.testing.assert_array_equal(scaled_dot_product_attention(query, key, value), expected)


# Dropout.


KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "digits of pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == words
    seed = key[0] + (key[1] << 32)
    word = philox_word(seed, counter[3], counter[2], counter[1], 4 * counter[0])
    assert f"{word:08x}" == words.split()[0]


def test_dropout_is_a_function_of_the_indices():
    seed = 0x0123456789ABCDEF
    keep = dropout_keep(seed, 0.3, 2, 3, 5, 11)
    for index in np.ndindex(keep.shape):
        assert keep[index] == (philox_word(seed, *index) >= int(0.3 * 2**32))
    np.testing.assert_array_equal(dropout_keep(seed, 0.3, 1, 2, 4, 6), keep[:1, :2, :4, :6])
    assert dropout_keep(seed, 0.3, 2, 0, 5, 11).shape == (2, 0, 5, 11)
    assert dropout_keep(seed, 0.3, 2, 1, 5, 0).shape == (2, 1, 5, 0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.999])
def test_dropout_rate(dropout_p):
    keep = dropout_keep(2**64 - 1, dropout_p, 2, 4, 64, 128)
    sigma = math.sqrt(dropout_p * (1 - dropout_p) / keep.size)
    assert abs(keep.mean() - (1 - dropout_p)) <= 5 * sigma


def test_dropout_scales_what_it_keeps():
    arrays = random_arrays(2, 3, 8, 16)
    _, plain, logsumexp = everything(*arrays)
    out, dropped, dropped_logsumexp = everything(*arrays, dropout_p=0.25, seed=5)
    keep = dropout_keep(5, 0.25, 2, 3, 8, 8)
    np.testing.assert_allclose(dropped, np.where(keep, plain / 0.75, 0), rtol=1e-15)
    np.testing.assert_allclose(out, dropped @ arrays[2], rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(dropped_logsumexp, logsumexp)


def test_seed():
    a, b = dropout_keep(None, 0.5, 1, 1, 32, 32), dropout_keep(None, 0.5, 1, 1, 32, 32)
    assert (a != b).any()
    for seed, error, message in (
        (-1, ValueError, "seed: expected an int >= 0, got -1"),
        (2**64, ValueError, "seed: expected an int below"),
        (1.5, TypeError, "seed: expected an int, got 1.5"),
    ):
        with pytest.raises(error, match=message):
            dropout_keep(seed, 0.5, 1, 1, 2, 2)


# PyTorch.


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_torch(mask, scale, is_causal):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    query = rng.standard_normal((2, 6, 7, 8))
    key, value = rng.standard_normal((2, 2, 3, 9, 8))
    attn_mask = None
    if mask is not None:
        attn_mask = (rng.random((2, 1, 7, 9)) < 0.7) | (np.arange(9) == 0)
        if mask == "float":
            attn_mask = np.where(attn_mask, rng.random(attn_mask.shape), -INF)
        if is_causal:  # not both at once there
            is_causal = False
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in (query, key, value)),
        attn_mask=None if attn_mask is None else torch.from_numpy(attn_mask),
        is_causal=is_causal, scale=scale, enable_gqa=True,
    )
    out = scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-12, atol=1e-13)
