"""scaled_dot_product_attention against the reference: every argument, dtype, shape and layout, on every instruction
set. How close is close enough: tolerance.py."""

import contextlib
import inspect
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from problems import (
    BFLOAT16,
    DTYPES,
    EDGES,
    FLOATS,
    HEAD_DIMS,
    INF,
    KEYS,
    LAYOUTS,
    NAN,
    ROWS,
    around,
    assert_same_bits,
    calls,
    normal,
    problem,
)
from test_linear import linear
from tolerance import assert_within, check, everything

import cattn
from cattn import reference
from cattn._attention import check_problem
from cattn.reference import dropout_keep

F16, F32, F64 = (np.dtype(name) for name in ("float16", "float32", "float64"))
attention = cattn.scaled_dot_product_attention

(SPLIT,) = EDGES["split_keys"]
both_precisions = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
all_dtypes = pytest.mark.parametrize(
    ("dtype", "kv_dtype"), DTYPES, ids=[f"{q}" if q == kv else f"{q}-{kv}" for q, kv in DTYPES]
)
mask_dtypes = pytest.mark.parametrize("kind", [bool, *FLOATS], ids=lambda kind: np.dtype(kind).name)


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_any_call(isa, call):
    arrays, options = call
    check(*arrays, **options)


def test_signature():
    """That of the reference, with `out` and `num_threads`; the first eight are PyTorch's, in its order."""
    fast, specified = (inspect.signature(x.scaled_dot_product_attention).parameters for x in (cattn, reference))
    assert [name for name in fast if name not in ("out", "num_threads")] == list(specified)
    for name, parameter in specified.items():
        assert (fast[name].kind, fast[name].default) == (parameter.kind, parameter.default)
    by_position = [name for name, parameter in fast.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert by_position == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


# Dtypes and shapes.


@all_dtypes
@pytest.mark.parametrize("leading", [None, (2,)], ids=str)
def test_dtypes(isa, dtype, kv_dtype, leading):
    arrays = problem(37, 150, 24, 20, dtype=dtype, kv_dtype=kv_dtype, leading=leading)
    check(*arrays)
    num_heads = 1 if leading is None else 2
    check(*arrays, is_causal=True, q_offset=100, softcap=5.0, alibi_slopes=np.full(num_heads, 0.1),
          sinks=np.ones(num_heads), dropout_p=0.2, seed=3)


@both_precisions
@pytest.mark.parametrize("seq_len_q", ROWS)
def test_query_rows(isa, seq_len_q, dtype):
    arrays = problem(seq_len_q, 70, 12, 6, leading=None, dtype=dtype)
    check(*arrays)
    check(*arrays, is_causal=True, q_offset=70 - seq_len_q)


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=str)
@pytest.mark.parametrize("seq_len_kv", KEYS)
def test_keys(isa, seq_len_kv, dtype):
    arrays = problem(20, seq_len_kv, 6, 5, leading=None, dtype=dtype)
    check(*arrays)
    check(*arrays, is_causal=True, q_offset=seq_len_kv - 10, kv_lens=seq_len_kv - seq_len_kv // 8)


@both_precisions
@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), [
    *((rows, n) for rows in (1, 20) for n in sorted(around(SPLIT))), (3, 2 * SPLIT + 1), (8, 5 * SPLIT - 120),
    (9, 8 * SPLIT + 1), (1, 16 * SPLIT),
])
def test_many_keys(isa, seq_len_q, seq_len_kv, dtype):
    """Where keys are cut into splits whose results are merged."""
    query, key, value = problem(seq_len_q, seq_len_kv, 8, 3, leading=None, dtype=dtype)
    check(query, key, value, num_threads=2)
    check(query, key, value, is_causal=True, q_offset=seq_len_kv - 1500, window=(1000, None))
    key[:, -1] = np.linspace(0, 50, seq_len_kv)  # each split's maximum exceeds the one before
    query[:, -1] = 1 + np.arange(seq_len_q)
    check(query, key, value, num_threads=3)
    check(query, key[::-1], value)


@all_dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(isa, head_dim, dtype, kv_dtype):
    for key_dim, value_dim in ((head_dim, head_dim), (head_dim, 2), (2, head_dim)):
        check(*problem(5, 130, key_dim, value_dim, leading=None, dtype=dtype, kv_dtype=kv_dtype))


@both_precisions
@pytest.mark.parametrize("seq_len_q", [1, 5, 16, 50])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 1), (6, 2), (8, 1), (24, 8), (5, 5)])
def test_grouped_queries(isa, num_heads, num_kv_heads, seq_len_q, dtype):
    """The rows of a group share vectors and blocks: their edges fall anywhere."""
    arrays = problem(seq_len_q, 40, 16, num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype)
    check(*arrays, enable_gqa=True)
    check(*arrays, is_causal=True, q_offset=20, alibi_slopes=np.linspace(0.1, 1, num_heads), sinks=np.ones(num_heads))


SHAPES = {
    "2 axes": ((5, 8), (7, 8), (7, 3), ()),
    "3 axes": ((2, 5, 8), (2, 7, 8), (2, 7, 3), (2,)),
    "one key for all": ((2, 5, 8), (1, 7, 8), (2, 7, 3), (2,)),
    "one query and one value for all": ((1, 5, 8), (3, 7, 8), (1, 7, 3), (3,)),
    "4 axes": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3), (2,)),
    "one query for all": ((1, 4, 5, 8), (2, 2, 7, 8), (1, 2, 7, 3), (2,)),
    "a leading axis more in key and value": ((2, 4, 5, 8), (2, 2, 2, 7, 8), (2, 2, 2, 7, 3), (2, 2)),
    "a leading axis more in value": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 2, 7, 3), (2, 2)),
    "5 axes": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 3), (2, 3)),
    "key without the first axis": ((2, 3, 4, 5, 8), (3, 2, 7, 8), (2, 1, 2, 7, 3), (2, 3)),
    "each broadcasts": ((1, 1, 4, 5, 8), (2, 1, 1, 7, 8), (1, 3, 1, 7, 3), (2, 3)),
    "one value for all": ((4, 5, 8), (4, 7, 8), (1, 7, 3), (4,)),
    "key with two axes more": ((1, 4, 5, 8), (2, 1, 3, 2, 7, 8), (3, 2, 7, 3), (2, 1, 3)),
    "all with other axes": ((2, 1, 3, 2, 4, 5, 8), (2, 3, 1, 4, 7, 8), (1, 1, 1, 2, 4, 7, 3), (2, 2, 3, 2)),
}


@pytest.mark.parametrize(("query", "key", "value", "leading"), SHAPES.values(), ids=SHAPES)
def test_axes_and_broadcasting(isa, query, key, value, leading):
    arrays = [normal(*shape, seed=number) for number, shape in enumerate((query, key, value))]
    heads = query[-3:-2] if len(query) > 3 else ()
    out, weights, logsumexp = check(*arrays)
    assert out.shape == (*leading, *heads, 5, 3) and weights.shape == (*leading, *heads, 5, 7)
    assert logsumexp.shape == (*leading, *heads, 5)
    rng = np.random.default_rng(0)
    per_batch_row = {
        "kv_lens": rng.integers(0, 8, leading),
        "q_offset": rng.integers(-2, 8, leading),
        "alibi_slopes": rng.random((*leading, *heads) if heads else (*leading, 1)),
        "attn_mask": rng.random(weights.shape) < 0.8,
    }
    check(*arrays, **per_batch_row, is_causal=True, dropout_p=0.3, seed=9)
    check(*arrays, **per_batch_row, out=np.empty((7, *out.shape), np.float32)[3])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_leading_axes_that_strides_cannot_merge(isa, order):
    arrays = problem(5, 7, 8, leading=(2, 3, 4), num_heads=4, num_kv_heads=2)
    arrays = [np.moveaxis(x, (0, 1, 2), order) for x in arrays]
    leading = arrays[0].shape[:3]
    slopes = normal(*leading, 4) ** 2
    check(*arrays, alibi_slopes=slopes, kv_lens=np.arange(24).reshape(leading) % 8, dropout_p=0.5, seed=1)
    out = np.moveaxis(np.empty((4, 5, 8, *leading), np.float32), (0, 1, 2), (3, 4, 5))
    check(*arrays, attn_mask=normal(*leading[::-1], 4, 5, 7).transpose(2, 1, 0, 3, 4, 5), out=out)


# Masks. Every subset of axes kept, the others of length 1, and leading ones missing.

MASK_SHAPES = [
    tuple(n if keep else 1 for n, keep in zip((2, 4, 35, 70), kept, strict=True))
    for kept in itertools.product((False, True), repeat=4)
] + [(), (1,), (70,), (35, 70), (35, 1), (4, 1, 70), (4, 35, 70)]


def random_mask(kind, shape, seed=0):
    """bool, or a bias with -inf in it; 0.7 is seen."""
    rng = np.random.default_rng(seed)
    seen = rng.random(shape) < 0.7
    return np.asarray(seen) if kind is bool else np.where(seen, rng.standard_normal(shape), -INF).astype(kind)


@mask_dtypes
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_mask_shapes(isa, shape, kind):
    arrays = problem(35, 70, 8, num_heads=4, num_kv_heads=2)
    mask = random_mask(kind, shape)
    check(*arrays, attn_mask=mask)
    check(*arrays, attn_mask=mask, is_causal=True, q_offset=30, kv_lens=np.array([50, 70]), window=(20, None))


@mask_dtypes
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mask_dtypes(isa, dtype, kind):
    check(*problem(5, 70, 8, dtype=dtype), attn_mask=random_mask(kind, (2, 1, 5, 70)))


@pytest.mark.parametrize(("leading", "shape"), [
    (None, (9, 13)), (None, (13,)), (None, (9, 1)),
    ((3,), (3, 9, 13)), ((3,), (3, 1, 13)), ((3,), (9, 13)),
    ((2, 3), (2, 3, 2, 9, 13)), ((2, 3), (3, 1, 9, 13)), ((2, 3), (2, 1, 1, 1, 13)),
], ids=str)
@pytest.mark.parametrize("kind", [bool, F32], ids=["bool", "float32"])
def test_mask_axes(isa, leading, shape, kind):
    arrays = problem(leading=leading)
    if leading == (3,):
        arrays = [x[:, 0] for x in arrays]  # 3 axes: no heads, and the mask has none either
    check(*arrays, attn_mask=random_mask(kind, shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@mask_dtypes
def test_mask_layouts(isa, layout, kind):
    arrays = problem(35, 70, 8)
    mask = random_mask(kind, (2, 2, 35, 70))
    strided = LAYOUTS[layout](mask)
    np.testing.assert_array_equal(strided, mask)
    assert_same_bits(everything(*arrays, attn_mask=strided), everything(*arrays, attn_mask=mask))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
def test_dtypes_that_tell_the_byte_order(isa, dtype):
    """Of this machine, in letters: NumPy has it so from `newbyteorder`, and in the formats of buffers."""
    named = np.dtype(dtype).newbyteorder().newbyteorder()
    if not named.isnative:
        pytest.skip("the other byte order")
    plain = np.dtype(named.char)
    arrays = problem(9, 13, dtype=plain)
    mask = normal(9, 13, dtype=plain)
    told = [x.view(named) for x in (*arrays, mask)]
    expected = everything(*arrays, attn_mask=mask)
    assert_same_bits(tuple(x.view(x.dtype.char) for x in everything(*told[:3], attn_mask=told[3])),
                     tuple(x.view(x.dtype.char) for x in expected))
    out = np.empty(expected[0].shape, named)
    attention(*told[:3], out=out)
    assert_same_bits(out.view(plain), attention(*arrays))
    table = np.empty((5, 6), named)
    cattn.sinusoidal_encoding(5, 6, dtype=plain, out=table)
    assert_same_bits(table.view(plain), cattn.sinusoidal_encoding(5, 6, dtype=plain))
    layer = cattn.MultiHeadAttention(8, 2, dtype=named, seed=0)
    x = normal(2, 3, 8, dtype=plain)
    assert_same_bits(layer(x.view(named)).view(plain), cattn.MultiHeadAttention(8, 2, dtype=plain, seed=0)(x))


def test_mask_of_python_lists(isa):
    query, key, value = problem(2, 3, 4, leading=None)
    check(query, key, value, attn_mask=[[True, False, True], [False, True, True]])
    check(query, key, value, attn_mask=[0.0, -INF, 2.5])
    out = attention(query.tolist(), key.tolist(), value.tolist())  # lists of floats are float64
    assert out.dtype == np.float64


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("lowest", [np.finfo(x).min for x in (F16, F32, F64)], ids=str)
def test_finite_mask_values_are_biases(isa, dtype, lowest):
    """finfo.min hides a key next to others that are seen; where all keys have it, all are seen."""
    query, key, value = problem(9, 13, 8, leading=None, dtype=dtype)
    mask = np.zeros((9, 13))
    mask[:, ::2] = lowest
    weights = check(query, key, value, attn_mask=mask)[1]
    assert not weights[:, ::2].any()
    mask[:] = lowest
    weights, logsumexp = attention(query, key, value, mask, return_weights=True, return_logsumexp=True)[1:]
    assert (logsumexp > -INF).all() and (weights > 0).all()
    if lowest < np.finfo(F16).min:  # the scores are lost next to it
        np.testing.assert_allclose(weights, 1 / 13, rtol=1e-6)


@both_precisions
def test_largest_biases(isa, dtype):
    """As far as the range goes, a larger bias wins."""
    query, key, value = problem(1, 4, 8, leading=None, dtype=dtype)
    largest = np.finfo(dtype).max / 4
    for biases in ([-0.3, -0.6, -1, -0.5], [0.3, 0.6, 1, 0.5], [-1, -1, -1, -1]):
        mask = largest * np.array(biases, dtype)
        weights = check(query, key, value, attn_mask=mask)[1]
        np.testing.assert_allclose(weights[0], (mask == mask.max()) / (mask == mask.max()).sum(), rtol=1e-6)


# Positions: causal, window, lengths.


@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), [(9, 9), (9, 13), (13, 9), (1, 70), (70, 300), (300, 70)])
@pytest.mark.parametrize("q_offset", [
    0, 1, 4, 200, -1, -8, -9, -300, 2**40, -(2**40), 2**62, -(2**62), np.int64(3), np.array(2, np.uint8),
    np.array([0, -4]), np.array([3, 200], np.int16), np.array([2**62, -(2**62)]), [5, -5],
], ids=str)
def test_causal(isa, seq_len_q, seq_len_kv, q_offset):
    check(*problem(seq_len_q, seq_len_kv, 8), is_causal=True, q_offset=q_offset)


def test_q_offset_beyond_int64(isa):
    arrays = problem()
    assert_same_bits(everything(*arrays, is_causal=True, q_offset=10**30), everything(*arrays))
    assert not attention(*arrays, is_causal=True, q_offset=-(10**30)).any()
    huge = np.array([2**64 - 1, 0], np.uint64)
    out = attention(*arrays, is_causal=True, q_offset=huge)
    assert_same_bits(out[:1], attention(*(x[:1] for x in arrays)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_offset", [0, 100, -30, np.array([120, 40])], ids=str)
@pytest.mark.parametrize("window", [
    (0, 0), (1, 0), (0, 1), (16, 16), (3, None), (None, 3), (-1, 5), (70, -1), (None, None), (-1, -1), [2, 2],
    (np.int64(4), np.uint8(4)), (2**62, 2**62), (10**30, 0),
], ids=str)
def test_window(isa, window, q_offset, is_causal):
    arrays = problem(50, 140, 8)
    if max(side or 0 for side in window) > 2**32:  # beyond what the reference adds: the same as unbounded
        wide = [None if side > 2**32 else side for side in window]
        options = {"q_offset": q_offset, "is_causal": is_causal}
        assert_same_bits(everything(*arrays, window=window, **options), everything(*arrays, window=wide, **options))
    else:
        check(*arrays, window=window, q_offset=q_offset, is_causal=is_causal)


@both_precisions
@pytest.mark.parametrize("kv_lens", [
    np.array([0, 140]), np.array([1, 2], np.int8), np.array([64, 65], np.uint64), [127, 128], np.array([129, 3])[::-1],
], ids=str)
def test_kv_lens(isa, kv_lens, dtype):
    arrays = problem(20, 140, 8, dtype=dtype)
    check(*arrays, kv_lens=kv_lens)
    check(*arrays, kv_lens=kv_lens, is_causal=True, q_offset=100, window=(50, 0))


def test_kv_lens_of_one_sequence(isa):
    arrays = problem(leading=None)
    for kv_lens in (0, 5, 13, np.int32(7), np.array(2)):
        check(*arrays, kv_lens=kv_lens)


# What changes the scores.


@both_precisions
@pytest.mark.parametrize("scale", [None, 1, 0.05, 0, -0.3, 1 / 3, np.float32(0.2)], ids=str)
def test_scale(isa, scale, dtype):
    check(*problem(dtype=dtype), scale=scale)


@all_dtypes
@pytest.mark.parametrize("softcap", [0, 0.01, 1, 2.5, 50.0, 1e6])
@pytest.mark.parametrize("sharpness", [1, 64])
def test_softcap(isa, softcap, sharpness, dtype, kv_dtype):
    """From the linear to the flat part of tanh."""
    query, key, value = problem(dtype=dtype, kv_dtype=kv_dtype)
    check(query * query.dtype.type(sharpness), key, value, softcap=softcap)
    check(query * query.dtype.type(sharpness), key, value, softcap=softcap, is_causal=True, q_offset=3)


@pytest.mark.parametrize(("dtype", "softcap"), [(F32, 2e-38), (F32, 1e30), (F32, 8e37), (F64, 3e-308), (F64, 1e300)],
                         ids=str)
def test_softcap_at_the_ends_of_its_range(isa, dtype, softcap):
    arrays = problem(dtype=dtype)
    check(*arrays, softcap=softcap)
    check(0 * arrays[0], *arrays[1:], softcap=softcap)


def test_softcap_bounds_infinite_scores(isa):
    """-inf becomes -softcap before the masks: the key is seen."""
    query, value = np.ones((1, 1), np.float32), normal(3, 2)
    check(query, np.array([[INF], [-INF], [0]], np.float32), value, softcap=2.0)


@both_precisions
@pytest.mark.parametrize("q_offset", [0, 100, -7, np.array([3, 130])], ids=str)
@pytest.mark.parametrize("slopes", [(2,), (2, 2)], ids=str)
def test_alibi(isa, slopes, q_offset, dtype):
    arrays = problem(20, 140, 8, dtype=dtype)
    slopes = np.random.default_rng(0).random(slopes)
    check(*arrays, alibi_slopes=slopes, q_offset=q_offset)
    check(*arrays, alibi_slopes=slopes.astype(np.float32), q_offset=q_offset, is_causal=True)
    check(*arrays, alibi_slopes=-slopes / 50, q_offset=q_offset)


@both_precisions
@pytest.mark.parametrize("slope", [3e38, -3e38, 1e308, INF])
def test_slopes_beyond_the_range(isa, slope, dtype):
    """Only the nearest keys are left, at 0 * slope."""
    arrays = problem(dtype=dtype)
    check(*arrays, alibi_slopes=np.array([abs(slope), 0.5]), is_causal=True, q_offset=4)
    check(*arrays, alibi_slopes=np.array([slope, 0.5]), window=(0, 0))


def test_alibi_dtypes(isa):
    arrays = problem(20, 140, 8)
    for slopes in (np.array([1, 2]), np.array([0.5, 0.25], BFLOAT16), [0.5, 0.25], np.array([0.25, 0.5])[::-1]):
        check(*arrays, alibi_slopes=slopes)


@all_dtypes
@pytest.mark.parametrize("sinks", [(0, 1), (-INF, 5), (100, -100), (1e4, INF), (3e38, -3e38)], ids=str)
def test_sinks(isa, sinks, dtype, kv_dtype):
    arrays = problem(dtype=dtype, kv_dtype=kv_dtype)
    _, weights, logsumexp = check(*arrays, sinks=np.array(sinks, np.float64))
    assert_same_bits(logsumexp, everything(*arrays)[2])
    assert not weights[:, np.array(sinks) >= 1e4].any()
    check(*arrays, sinks=np.array(sinks, np.float32), kv_lens=np.array([0, 4]))


# Dropout.


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1, np.int64(77), np.uint64(2**63)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.99, 1 - 2**-40])
def test_dropout_keeps_what_the_reference_keeps(isa, seed, dropout_p):
    query, key, value = problem(50, 141, 8, leading=(3,), num_heads=4, num_kv_heads=2)
    weights = everything(0 * query, key, value, dropout_p=dropout_p, seed=seed)[1]
    np.testing.assert_array_equal(weights != 0, dropout_keep(int(seed), dropout_p, 3, 4, 50, 141))


@pytest.mark.parametrize("rows", [50, 1])
@pytest.mark.parametrize("key_offset", range(4))
def test_dropout_of_a_part_of_a_problem(isa, key_offset, rows):
    """The kernel is told which batch row, head, query and key come first: of the result, and of the weights."""
    num_keys, (batch, heads) = 90, (3, 4)
    query, key, value = problem(rows, num_keys, 8, leading=(batch,), num_heads=heads, num_kv_heads=2)
    value = np.broadcast_to(np.eye(num_keys, dtype=value.dtype), (*key.shape[:2], num_keys, num_keys))
    part = check_problem(query, key, value, None, 0.4, False, 0, False, q_offset=None, window=None, softcap=None,
                         alibi_slopes=None, sinks=None, kv_lens=None, kv_starts=None, num_threads=None, seed=8)
    out, weights = np.empty((2, batch, heads, rows, num_keys), np.float32)
    for _, (result,), arguments in part.calls(out):
        arguments["batch_offset"] += 5
        part.module.attend(out=result, weights=weights.reshape(-1), narrow_weights=None, logsumexp=None, **arguments,
                           head_offset=2, query_offset=9, key_offset=key_offset)
    kept = dropout_keep(8, 0.4, 5 + batch, 2 + heads, 9 + rows, key_offset + num_keys)[5:, 2:, 9:, key_offset:]
    np.testing.assert_array_equal(weights != 0, kept)
    np.testing.assert_array_equal(out != 0, kept)


@all_dtypes
@pytest.mark.parametrize("dropout_p", [0.3, np.float32(0.5)], ids=str)
def test_dropout(isa, dropout_p, dtype, kv_dtype):
    arrays = problem(20, 141, 8, dtype=dtype, kv_dtype=kv_dtype)
    check(*arrays, dropout_p=dropout_p, seed=5)
    check(*arrays, dropout_p=dropout_p, seed=5, is_causal=True, q_offset=60, sinks=np.ones(2))
    for left in range(4):  # the first key seen is any word of the four that belong together
        check(*arrays, dropout_p=dropout_p, seed=6, window=(left, 30), q_offset=90)
        check(arrays[0][:, :, :2], *arrays[1:], dropout_p=dropout_p, seed=6, window=(left, None), q_offset=90)


def test_dropout_so_rare_that_nothing_drops(isa):
    """Below 2**-32; the weights are larger by 1 / (1 - dropout_p) all the same."""
    out = attention(np.zeros((1, 1)), np.zeros((3, 1)), np.ones((3, 1)), dropout_p=1e-10, seed=0)
    np.testing.assert_allclose(out, 1 / (1 - 1e-10), rtol=1e-15)


def test_dropout_without_seed_differs_each_time():
    arrays = problem(20, 40)
    assert (attention(*arrays, dropout_p=0.5) != attention(*arrays, dropout_p=0.5)).any()
    assert_same_bits(attention(*arrays, seed=3), attention(*arrays))


# What is returned, and into what.


@all_dtypes
def test_returns(isa, dtype, kv_dtype):
    arrays = problem(dtype=dtype, kv_dtype=kv_dtype)
    out, weights, logsumexp = everything(*arrays)
    assert out.dtype == weights.dtype == dtype
    assert logsumexp.dtype == (np.float64 if dtype == F64 else np.float32)
    assert isinstance(attention(*arrays), np.ndarray)
    assert_same_bits(attention(*arrays, return_weights=True), (out, weights))
    assert_same_bits(attention(*arrays, return_logsumexp=True), (out, logsumexp))


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out(isa, layout, dtype, kv_dtype):
    arrays = problem(35, 13, 8, 17, dtype=dtype, kv_dtype=kv_dtype)
    expected = attention(*arrays)
    out, other = (LAYOUTS[layout](np.zeros(expected.shape, dtype)) for _ in range(2))
    assert attention(*arrays, out=out) is out
    other[...] = expected
    memory, right = (x if x.base is None else x.base for x in (out, other))
    assert memory.tobytes("A") == right.tobytes("A")  # what lies between the elements is untouched as well
    assert everything(*arrays, out=out)[0] is out


def short_way(monkeypatch):
    """The list that gets, for each call from now on that the door offers to the short way, whether that took it."""
    taken, attend_short = [], cattn._kernels.f32.attend_short

    def watched(*arguments):
        result = attend_short(*arguments)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(cattn._kernels, "f32", SimpleNamespace(attend=cattn._kernels.f32.attend, attend_short=watched))
    return taken


def lengths(*numbers, dtype=np.int64):
    """For batches of 3, every second number of an array."""
    return np.repeat(np.array(numbers, dtype), 2)[::2]


SHORT = {
    "plain": {},
    "causal": {"is_causal": True, "q_offset": 0},
    "scale": {"scale": 0.3},
    "offset": {"is_causal": True, "q_offset": 7},
    "negative offset": {"is_causal": True, "q_offset": -3},
    "enable_gqa": {"enable_gqa": True},
    "offsets": {"is_causal": True, "q_offset": lengths(0, -5, 40)},
    "offsets of 32 bits": {"is_causal": True, "q_offset": lengths(12, 2, 1, dtype=np.int32)},
    "kv_lens": {"kv_lens": lengths(1, 0, 1)},
    "kv_lens of 32 bits": {"kv_lens": lengths(1, 1, 0, dtype=np.int32)},
    "one of kv_lens for all": {"kv_lens": 1},
    "window": {"window": (2, 0)},
    "windows without bounds": {"window": (None, -1)},
    "left window": {"window": (5, None)},
    "logsumexp": {"return_logsumexp": True},
    "all": {"is_causal": True, "q_offset": lengths(20, 0, 9), "kv_lens": lengths(1, 0, 1), "window": (3, 5),
            "return_logsumexp": True, "scale": 2.0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize(("dtype", "kv_dtype"), [pair for pair in DTYPES if pair[0] != F64], ids=str)
def test_the_short_way_and_the_long_way(isa, monkeypatch, options, layout, dtype, kv_dtype):
    """To the same bits, into the caller's array or a new one."""
    taken = short_way(monkeypatch)
    for batch, sizes in [(2, (37, 50, 24, 40)), (1, (1, 300, 64)), (3, (1, 1, 1))]:
        arrays = problem(*sizes, leading=(batch,), num_heads=4, num_kv_heads=2, dtype=dtype, kv_dtype=kv_dtype)
        query, key, value = map(LAYOUTS[layout], arrays)
        own = {name: option[:batch] if isinstance(option, np.ndarray) else option for name, option in options.items()}
        expected = attention(query, key, value, softcap=0, **own)  # an int, which the short way does not take
        taken.clear()
        out = np.empty(query.shape[:-1] + value.shape[-1:], dtype)
        heads_last = np.empty(out.swapaxes(1, 2).shape, dtype).swapaxes(1, 2)
        assert_same_bits(attention(query, key, value, **own), expected)
        for target in out, heads_last:
            result = attention(query, key, value, out=target, **own)
            assert (result[0] if "return_logsumexp" in own else result) is target
            assert_same_bits(result, expected)
        assert taken == [True] * 3


def test_no_option_is_lost_on_the_short_way(monkeypatch):
    """Whatever an argument is but its default, the short way gets it or is not asked."""
    one = np.ones(1)
    others = {
        "attn_mask": one, "dropout_p": 0.5, "is_causal": True, "scale": 2.0, "enable_gqa": 1, "q_offset": 1,
        "window": (1, 1), "softcap": 1.0, "alibi_slopes": one, "sinks": one, "kv_lens": 1, "return_weights": True,
        "return_logsumexp": True, "out": one, "num_threads": 2, "seed": 0, "kv_starts": 1,
    }
    parameters = inspect.signature(attention).parameters
    arrays = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    assert others.keys() == parameters.keys() - set(arrays)  # a new argument needs a value here
    taken_arguments = list(inspect.signature(cattn._kernels.f32.attend_short).parameters)
    asked = []

    class NotThisWayError(Exception):
        """In place of the long way."""

    def no_array(name, x):
        raise NotThisWayError

    kernels = SimpleNamespace(attend_short=lambda *arguments: asked.append(arguments) or "what it returns")
    monkeypatch.setattr(cattn._kernels, "f32", kernels)
    monkeypatch.setattr("cattn._attention.as_array", no_array)
    for name, value in [(None, None), *others.items()]:
        asked.clear()
        options = {name: value} if name else {}
        if name is None or name in taken_arguments:
            assert attention(*arrays, **options) == "what it returns"
            (arguments,) = asked
            got = dict(zip(taken_arguments, arguments, strict=True))
            expected = {name: parameter.default for name, parameter in parameters.items() if name in taken_arguments}
            expected |= dict(zip(arrays, arrays, strict=True)) | {"num_threads": 0, "kinds": got["kinds"]} | options
            assert got == expected
        else:
            with pytest.raises(NotThisWayError):
                attention(*arrays, **options)
            assert asked == []


def test_the_short_way_when_causal_without_an_offset(monkeypatch):
    """Where no key comes after the last query."""
    taken = short_way(monkeypatch)
    for seq_len_q, seq_len_kv in [(1, 1), (5, 5), (9, 4)]:
        arrays = problem(seq_len_q, seq_len_kv, 8, num_heads=4, num_kv_heads=2)
        assert_same_bits(attention(*arrays, is_causal=True), attention(*arrays, is_causal=np.True_, q_offset=0))
        assert taken == [True, False]
        taken.clear()


def test_what_the_short_way_leaves_alone(monkeypatch):
    taken = short_way(monkeypatch)
    x = normal(2, 3, 5, 8)
    masked, wide, half = np.ma.array(x), x.astype(F64), x.astype(F16)
    far = np.array([0, 2**61])
    for arrays, options in [
        ((x[0],) * 3, {}), ((x[:1], x, x), {}), ((x, x[:, :1], x), {}), ((x, x[..., :0, :], x[..., :0, :]), {}),
        ((masked,) * 3, {}), ((wide,) * 3, {}), ((x.tolist(),) * 3, {}), ((x,) * 3, {"scale": np.float64(2)}),
        ((x,) * 3, {"scale": 0.0}), ((x,) * 3, {"out": np.empty((*x.shape, 2), F32)[..., 0]}),
        ((x,) * 3, {"out": np.empty_like(x)[::-1]}), ((x[..., :0, :], x, x), {}), ((x[None],) * 3, {}),
        ((half, x, x), {}), ((x, half, x), {}), ((x, wide, wide), {}), ((half, *(x.astype(BFLOAT16),) * 2), {}),
        ((x.astype(int),) * 3, {}), ((x.astype(bool),) * 3, {}), ((half,) * 3, {"out": np.empty_like(x)}),
        ((x,) * 3, {"out": x}), ((half,) * 3, {"out": half}),
        *(((x,) * 3, options) for options in (
            {"is_causal": 1}, {"is_causal": np.False_}, {"return_logsumexp": 1},
            {"kv_lens": -1}, {"kv_lens": 6}, {"kv_lens": np.array([5, 6])}, {"kv_lens": np.array([-1, 0])},
            {"kv_lens": np.array(5)}, {"kv_lens": np.array([5])}, {"kv_lens": [5, 5]},
            {"kv_lens": np.array([5.0, 5.0])}, {"kv_lens": True},
            {"kv_lens": np.array([[5], [5]])}, {"kv_lens": np.array([5, 5], ">i8")},
            {"kv_lens": np.array([5, 5], np.uint64)}, {"q_offset": 2**61}, {"q_offset": -(2**70)}, {"q_offset": far},
            {"q_offset": -far}, {"q_offset": 1.0}, {"q_offset": np.int64(1)}, {"window": 3}, {"window": [1, 1]},
            {"window": (1, 1, 1)}, {"window": (-2, 1)}, {"window": (1, 2**61)}, {"window": (1.0, 1)},
            {"window": (True, 1)}, {"window": (np.int64(1), 1)},
        )),
    ]:
        with contextlib.suppress(ValueError, TypeError):
            attention(*arrays, **options)
        assert taken == [False], (arrays, options)
        taken.clear()
    many = np.ones((65, 1, 1, 1), F32)
    assert_same_bits(attention(many, many, many, kv_lens=np.ones(65, np.int64)), many)
    assert taken == [False]
    taken.clear()
    for options in ({"enable_gqa": 1}, {"return_weights": 0}):
        with contextlib.suppress(TypeError):
            attention(x, x, x, **options)
        assert taken == [], options


def test_out_with_the_smallest_gaps(isa):
    """Strides that interleave without overlap."""
    query, key, value = problem(3, 5, 4, 3, leading=None)
    for shape, step in (((3, 5), np.s_[:, ::2]), ((5, 3), np.s_[::2]), ((7, 5), np.s_[::3, ::-2])):
        out = np.zeros(shape, np.float32)[step]
        assert_same_bits(attention(query, key, value, out=out).copy(), attention(query, key, value))


# Inputs that are not plain arrays of their own memory. (Strides: test_invariance.py.)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_zero_strides(isa, axis):
    arrays = problem(20, 70, 8, 8, num_heads=4)
    for number, array in enumerate(arrays):
        one = array[tuple(slice(1) if i == axis else slice(None) for i in range(4))]
        broadcast = [*arrays[:number], np.broadcast_to(one, array.shape), *arrays[number + 1:]]
        assert_same_bits(check(*broadcast), everything(*(x.copy() for x in broadcast)))
    check(*(np.broadcast_to(np.float32(0.5), x.shape) for x in arrays))


def test_read_only_memmap_and_subclass(isa, tmp_path):
    class Named(np.ndarray):
        pass

    arrays = problem()
    expected = everything(*arrays)
    frozen, mapped = [x.copy() for x in arrays], []
    for number, array in enumerate(frozen):
        array.flags.writeable = False
        np.save(tmp_path / f"{number}.npy", array)
        mapped.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    for same in (frozen, mapped, [x.view(Named) for x in arrays], [memoryview(x) for x in arrays]):
        results = everything(*same)
        assert_same_bits(results, expected)
        assert {type(x) for x in results} == {np.ndarray}
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=expected[0].shape)
    assert attention(*arrays, out=out) is out
    assert_same_bits(np.asarray(out), expected[0])


def test_inputs_are_not_written(isa):
    arrays = problem()
    options = {"attn_mask": normal(9, 13), "sinks": normal(2), "alibi_slopes": normal(2), "kv_lens": np.array([3, 9])}
    before = [x.copy() for x in (*arrays, *options.values())]
    everything(*arrays, **options, is_causal=True)
    for array, copy in zip((*arrays, *options.values()), before, strict=True):
        np.testing.assert_array_equal(array, copy)


# NaN, infinity, and rows without keys.

HIDE = {  # keys that some rows see and some do not, for 2 batch rows, 2 heads, 20 queries, 140 keys
    "bool mask": {"attn_mask": random_mask(bool, (2, 2, 20, 140))},
    "bool mask of keys": {"attn_mask": random_mask(bool, (2, 1, 1, 140), seed=4)},
    "float mask": {"attn_mask": random_mask(F32, (20, 140))},
    "causal": {"is_causal": True, "q_offset": np.array([120, 0])},
    "window": {"window": (8, 5), "q_offset": np.array([0, 120])},
    "lengths": {"kv_lens": np.array([130, 5])},
    "all": {"attn_mask": random_mask(BFLOAT16, (20, 140)), "is_causal": True, "q_offset": 115,
            "kv_lens": np.array([140, 130]), "softcap": 3.0, "alibi_slopes": np.array([0.01, 0.02]),
            "sinks": np.ones(2), "dropout_p": 0.2, "seed": 1},
}


@all_dtypes
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, "largest"])
@pytest.mark.parametrize("hide", HIDE)
def test_garbage_behind_masks(isa, hide, garbage, dtype, kv_dtype):
    """Rows that do not see the garbage keep their bits. Those that see it are as the reference has them."""
    query, key, value = problem(20, 140, 8, dtype=dtype, kv_dtype=kv_dtype)
    finite = garbage == "largest"
    garbage = -float(kv_dtype.type(6e4 if kv_dtype == F16 else 3e38)) if finite else garbage
    clean = everything(query, key, value, **HIDE[hide])
    for bad in (2, 5, 127, 131):
        seen = reference.scaled_dot_product_attention(query, key, value, **HIDE[hide] | {"dropout_p": 0.0},
                                                      return_weights=True)[1][..., bad] != 0
        bad_key, bad_value, bad_number = key.copy(), value.copy(), value.copy()
        bad_key[..., bad, :] = bad_value[..., bad, :] = bad_number[..., bad, 3] = garbage
        for spoilt in ((query, bad_key, value), (query, key, bad_value), (query, bad_key, bad_value),
                       (query, key, bad_number)):
            results = everything(*spoilt, **HIDE[hide])
            for result, expected in zip(results, clean, strict=True):
                assert_same_bits(result[~seen], expected[~seen])
        if not finite and bad == 131:
            for spoilt in ((query, bad_key, value), (query, key, bad_value), (query, key, bad_number)):
                check(*spoilt, **HIDE[hide])


@both_precisions
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("hide", [None, "causal", "float mask"])
def test_what_is_attended_goes_through(isa, bad, hide, dtype):
    """NaN and infinity in one number of query, key, value or mask: the same NaN as in the reference, no others."""
    options = HIDE[hide] if hide else {}
    arrays = problem(20, 140, 8, 5, dtype=dtype)
    clean = everything(*arrays, **options)
    for number, row in ((0, 7), (1, 3), (2, 3), (2, 139)):
        spoilt = [x.copy() for x in arrays]
        spoilt[number][1, 0, row, 2] = bad
        results = check(*spoilt, **options)
        for result, expected in zip(results, clean, strict=True):
            assert_same_bits(result[0], expected[0])
            assert_same_bits(result[1, 1], expected[1, 1])
    mask = np.zeros((20, 140), dtype)
    mask[4, [6, 100]] = bad
    mask[4, 5] = -INF
    check(*arrays, attn_mask=mask)
    check(*arrays, attn_mask=mask, is_causal=True, q_offset=90)


@both_precisions
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_infinite_value_of_tiny_weight(isa, rows, dtype):
    """As long as the weight is a normal number, its product with infinity is infinity."""
    gaps = range(20, 120, 9) if dtype == F32 else range(100, 1020, 90)
    for gap in gaps:  # the weight is about 2**-gap
        query = np.ones((rows, 1), dtype)
        key = np.array([[0], [-gap * math.log(2)], [0]], dtype)
        value = np.array([[1, 2, 1], [INF, 3, -INF], [1, 4, 1]], dtype)
        check(query, key, value, scale=1.0)
        assert_same_bits(attention(query, key, value, scale=1.0)[:, ::2], np.tile(value[1, ::2], (rows, 1)))


def test_score_of_minus_infinity_has_weight_0(isa):
    """Where it comes from query and key, the key is seen: an infinite or NaN value goes through."""
    query, key = np.ones((1, 1), np.float32), np.array([[0], [-INF]], np.float32)
    for last, expected in ((2, 1), (NAN, NAN), (INF, NAN)):
        value = np.array([[1], [last]], np.float32)
        for options in ({}, {"attn_mask": np.zeros(2, np.float32)}, {"is_causal": True, "q_offset": 1}):
            out, weights, logsumexp = check(query, key, value, **options)
            np.testing.assert_array_equal(out.item(), expected)
            assert (weights.tolist(), logsumexp.item()) == ([[1, 0]], 0)
    out, weights, logsumexp = check(query, np.full((3, 1), -INF, np.float32), np.ones((3, 2), np.float32))
    assert not out.any() and not weights.any() and (logsumexp == -INF).all()


def test_weight_that_underflows_is_no_mask(isa):
    query, key, value = np.ones((1, 1)), np.array([[0.0], [-1e6]]), np.array([[1.0], [NAN]])
    for options in ({}, {"attn_mask": np.zeros(2)}, {"is_causal": True, "q_offset": 1}):
        out, weights, _ = check(query, key, value, **options)
        assert np.isnan(out).all() and weights.tolist() == [[1, 0]]


SEE_NOTHING = {  # one head, 9 queries, 140 keys
    "bool mask": {"attn_mask": np.zeros((9, 140), bool)},
    "float mask": {"attn_mask": np.full((9, 140), -INF)},
    "bool mask of queries": {"attn_mask": np.zeros((9, 1), bool)},
    "before all keys": {"is_causal": True, "q_offset": -9},
    "far before all keys": {"is_causal": True, "q_offset": -(2**62)},
    "window after all keys": {"window": (0, 0), "q_offset": 140},
    "window far after": {"window": (3, 3), "q_offset": 2**62},
    "window before": {"window": (0, 5), "q_offset": -15},
    "length 0": {"kv_lens": 0},
    "length and mask": {"kv_lens": 20, "attn_mask": np.arange(140) >= 20},
    "length and window": {"kv_lens": 100, "is_causal": True, "window": (10, None), "q_offset": 200},
    "with the rest": {"attn_mask": np.zeros(140, bool), "alibi_slopes": [1.0], "sinks": [NAN], "softcap": 1.0,
                      "dropout_p": 0.5},
}


@all_dtypes
@pytest.mark.parametrize("why", SEE_NOTHING)
def test_rows_that_see_nothing(isa, why, dtype, kv_dtype):
    """0, 0 and -inf, whatever is in the arrays."""
    query, key, value = problem(9, 140, 8, leading=None, dtype=dtype, kv_dtype=kv_dtype)
    for arrays in ((query, key, value), (query, key * kv_dtype.type(NAN), value * kv_dtype.type(INF)),
                   (query * dtype.type(NAN), key, value)):
        out, weights, logsumexp = everything(*arrays, **SEE_NOTHING[why])
        assert not out.any() and not weights.any() and (logsumexp == -INF).all()


@both_precisions
def test_some_rows_see_nothing(isa, dtype):
    arrays = problem(50, 140, 8, dtype=dtype)
    mask = random_mask(bool, (2, 2, 50, 140))
    mask[:, :, ::3] = False
    mask[:, 1, 7:30] = False
    check(*arrays, attn_mask=mask, sinks=np.ones(2))
    check(*arrays, is_causal=True, q_offset=np.array([-20, -45]), window=(4, None))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("leading", "num_heads", "num_kv_heads", "seq_len_q", "seq_len_kv"), [
    (None, 1, 1, 0, 5), (None, 1, 1, 5, 0), (None, 1, 1, 0, 0),
    ((2,), 4, 2, 0, 5), ((2,), 4, 2, 5, 0), ((0,), 4, 2, 5, 5), ((2,), 0, 3, 5, 5),
    ((2, 0), 4, 2, 5, 5), ((0, 2), 4, 2, 5, 5), ((0, 0), 4, 2, 0, 0), ((2, 3), 4, 2, 5, 0),
], ids=str)
def test_empty(isa, leading, num_heads, num_kv_heads, seq_len_q, seq_len_kv, dtype):
    """No queries, batch rows or heads: an empty result. No keys: zeros."""
    arrays = problem(seq_len_q, seq_len_kv, 8, 3, leading=leading, num_heads=num_heads, num_kv_heads=num_kv_heads,
                     dtype=dtype)
    axes = () if leading is None else (*leading, num_heads)
    batch = leading or ()
    for options in ({}, {
        "is_causal": True, "q_offset": np.full(batch, 2), "kv_lens": np.full(batch, min(seq_len_kv, 1)),
        "attn_mask": np.zeros((*axes, seq_len_q, seq_len_kv), dtype), "dropout_p": 0.5, "seed": 1,
        "alibi_slopes": np.ones((*batch, num_heads)), "sinks": np.ones(num_heads), "softcap": 1.0,
        "out": np.empty((*axes, seq_len_q, 3), dtype), "num_threads": 2,
    }):
        out, weights, logsumexp = everything(*arrays, **options)
        assert out.shape == (*axes, seq_len_q, 3) and weights.shape == (*axes, seq_len_q, seq_len_kv)
        assert logsumexp.shape == (*axes, seq_len_q)
        if seq_len_kv == 0:
            assert not out.any() and (logsumexp == -INF).all()


# 16-bit numbers.

HALVES = np.arange(2**16, dtype=np.uint16)


def assert_same_halves(a, b):
    """Equal bits, but for the payload of NaN and the sign of 0, which sums do not keep."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        nan = np.isnan(b)
        np.testing.assert_array_equal(np.isnan(a), nan)
        a, b = (np.where(nan | (x == 0), x.dtype.type(0), x).view(np.uint16) for x in (a, b))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "every second column", "unaligned"])
@pytest.mark.parametrize("dtype", [F16, BFLOAT16], ids=str)
def test_every_half_passes_through(isa, dtype, layout):
    """One key: the result is its value. Widened and narrowed, contiguous and one by one."""
    value = LAYOUTS[layout](HALVES.view(dtype)[None, :])
    one = np.ones((1, 4), dtype)
    assert_same_halves(attention(one, one, value), value)
    wide = attention(one.astype(np.float32), one, value)
    assert wide.dtype == np.float32
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(wide, value.astype(np.float32))


@pytest.mark.parametrize("dtype", [F16, BFLOAT16], ids=str)
def test_every_half_is_read_in_keys_and_masks(isa, dtype):
    """The logsumexp of one key is its score."""
    halves = HALVES.view(dtype)[:, None, None, None]
    one, zero = np.ones((1, 1, 1, 1), dtype), np.zeros(halves.shape, dtype)
    by_key = everything(one.astype(np.float32), halves, one)[2]
    by_mask = everything(zero, one, one, attn_mask=halves)[2]
    with np.errstate(invalid="ignore"):
        scores = halves.astype(np.float32)[..., 0]
        expected = np.where(scores == INF, NAN, scores)  # inf - inf
        compared = ~(abs(scores) > 2**125) | np.isinf(scores)  # else times log2(e) beyond float32
    for logsumexp in (by_key, by_mask):
        np.testing.assert_allclose(logsumexp[compared], expected[compared], rtol=3e-7, atol=1e-44)


@pytest.mark.parametrize("dtype", [F16, BFLOAT16], ids=str)
def test_results_are_rounded_to_nearest_even(isa, dtype):
    zero = np.zeros((1, 4), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        halves = HALVES.view(dtype)
        halves = halves[np.isfinite(halves)]
        other = np.random.default_rng(0).permutation(halves)
        half = np.float32(0.5)
        mean = half * halves.astype(np.float32) + half * other.astype(np.float32)
        assert_same_halves(attention(zero, np.zeros((2, 4), dtype), np.stack([halves, other]))[0], mean.astype(dtype))
        # Neighbours: ties. And dropout of 0.3 that keeps this one weight: a factor with a full significand.
        mean = half * halves[:-1].astype(np.float32) + half * halves[1:].astype(np.float32)
        neighbours = attention(zero, np.zeros((2, 4), dtype), np.stack([halves[:-1], halves[1:]]))[0]
        assert_same_halves(neighbours, mean.astype(dtype))
        seed = next(seed for seed in itertools.count() if dropout_keep(seed, 0.3, 1, 1, 1, 1))
        enlarged = attention(zero, zero, halves[None], dropout_p=0.3, seed=seed)[0]
        assert_same_halves(enlarged, (halves.astype(np.float32) * np.float32(1 / 0.7)).astype(dtype))


# Extremes.


@pytest.mark.parametrize(("dtype", "power"), [
    (F32, 100), (F32, -100), (BFLOAT16, 100), (BFLOAT16, -100), (F64, 900), (F64, -900),
], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "q_offset": 100}], ids=["all keys", "causal"])
def test_powers_of_two_cost_no_bit(isa, dtype, power, options):
    """Around 1e30 and 1e-30 (1e270 in float64)."""
    query, key, value = problem(20, 140, 8, dtype=dtype)
    out, weights, logsumexp = check(query, key, value, **options)
    factor = dtype.type(2.0**power)
    assert_same_bits(everything(query, key, value * factor, **options), (out * factor, weights, logsumexp))
    assert_same_bits(everything(query * factor, key / factor, value, **options), (out, weights, logsumexp))


@both_precisions
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_large_and_small_values(isa, size, dtype):
    query, key, value = problem(20, 300, 8, dtype=dtype)
    check(query, key, value * dtype.type(size))
    check(query, key / dtype.type(1e20), value * dtype.type(size), dropout_p=0.5, seed=2)


@pytest.mark.parametrize("seq_len_q", [1, 5, 20])
@pytest.mark.parametrize(("dtype", "size"), [(F32, 3e38), (F64, 1.7e308), (BFLOAT16, 3e38), (F16, 6e4)], ids=str)
def test_values_near_the_largest_number(isa, dtype, size, seq_len_q):
    """An average overflows no more than plain NumPy's does, and finite results stay next to infinite ones."""
    query, key, value = problem(seq_len_q, 300, 8, dtype=dtype)
    large = np.where(value < 0, -size, size).astype(dtype)
    check(query, key, large)
    check(query, key, abs(large), is_causal=True, q_offset=290, sinks=np.zeros(2))
    mixed = np.where(np.arange(8) % 3 == 0, value, abs(large))  # columns of ordinary numbers
    mixed[1, 1, 250, 4:6] = INF, NAN
    out = check(query, key, mixed)[0]
    if dtype.itemsize > 2:
        assert_same_bits(out[..., ::3], attention(query, key, value)[..., ::3])
    other = mixed.copy()
    other[0] = value[0]
    assert_same_bits(attention(query, key, other)[0], attention(query, key, value)[0])


@pytest.mark.parametrize("seq_len_q", [1, 5, 20])
@pytest.mark.parametrize(("dtype", "size", "largest"), [(F32, 1e30, 3e38), (F64, 1e200, 1.7e308)], ids=str)
def test_values_near_the_largest_number_with_large_scores(isa, dtype, size, largest, seq_len_q):
    """Equal scores so large that nothing smaller counts beside them: the mean of the values."""
    query, key, value = problem(seq_len_q, 300, 1, 8, dtype=dtype)
    query[...], key[...] = 1, -size
    check(query, key, np.where(value < 0, -largest, largest).astype(dtype))
    check(query, key, np.full_like(value, largest), is_causal=True, q_offset=290)


# Whole numbers, or 8 bits of a float32: plain NumPy's dot products and scores round little or nothing.
EXACT_PRODUCTS = {
    "0 to 15": (lambda rng, shape: rng.integers(0, 16, shape), 1 / 8),
    "0 to 3": (lambda rng, shape: rng.integers(0, 4, shape), 1.0),
    "bfloat16 of 3": (lambda rng, shape: (3 * rng.standard_normal(shape)).astype(BFLOAT16), None),
    "bfloat16 of 10": (lambda rng, shape: (10 * rng.standard_normal(shape)).astype(BFLOAT16), -1 / 8),
    "20": (lambda rng, shape: 20 * rng.standard_normal(shape), None),
}


def has_fma():
    """Whether products are rounded before they are added up: (1 + e)^2 - (1 + 2 e) is e^2."""
    e = np.float32(2**-12)
    return linear(np.array([[1, 1 + e]], np.float32), np.array([[-1 - 2 * e, 1 + e]], np.float32)).item() != 0


@pytest.mark.parametrize(("numbers", "scale"), EXACT_PRODUCTS.values(), ids=EXACT_PRODUCTS)
def test_as_exact_where_plain_numpy_is_at_its_best(isa, numbers, scale):
    """The scale and log2(e) may not round what the formula does not. 40 rows of 24 heads, all in one bound: of 3 heads
    alone, plain NumPy is now and then, by luck, three times as exact."""
    if numbers is EXACT_PRODUCTS["20"][0] and not has_fma():
        pytest.skip("without FMA every product is rounded, which plain NumPy on this CPU does not do")
    rng = np.random.default_rng(0)
    query, key = (numbers(rng, (8, 3, n, 64)).astype(np.float32) for n in (40, 200))
    value = rng.standard_normal(key.shape, np.float32)
    for options in ({}, {"alibi_slopes": [0.5, 0.25, 0.125]}, {"attn_mask": rng.integers(-9, 9, (40, 200)) * 0.5},
                    {"softcap": 64.0}):
        arrays, options = (query, key, value), {"scale": scale, **options}
        assert_within(everything(*arrays, **options), *arrays, **options)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_score_within_the_range_of_factors_that_are_not(isa, dtype, rows):
    """scale * query, or scale * key, would overflow; -scale, scores of 0 to -50 and their mirror image."""
    largest = float(np.finfo(dtype).max)
    query = np.full((rows, 1), largest**0.27, dtype)
    for size, scale in ((largest**-0.98, largest**0.73), (largest**0.5, largest**-0.75)):
        key = (np.arange(1, 51, dtype=dtype) * size)[:, None]
        for sign in (1, -1):
            check(query, key, np.arange(50, dtype=dtype)[:, None], scale=sign * float(scale))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-37, 1e-30])
def test_tiny_scales(isa, scale, rows):
    """Where the scale is 0 or nearly, masked keys stay masked and the others get what their scores say."""
    query, key, value = problem(rows, 200, 64)
    for size in (1.0, 1e18):
        for options in ({}, {"is_causal": True, "q_offset": 100}, {"attn_mask": normal(rows, 200) > 0},
                        {"softcap": 3.0}):
            check(query * np.float32(size), key * np.float32(size), value, scale=scale, **options)


def test_tiny_queries_and_keys_give_the_mean(isa):
    query, key, value = problem(20, 140, 8)
    tiny = np.float32(1e-30)
    np.testing.assert_allclose(check(query * tiny, key * tiny, value)[1], 1 / 140, rtol=1e-6)


@all_dtypes
@pytest.mark.parametrize("seq_len_kv", [5, 140, 600])
def test_peaked_scores(isa, seq_len_kv, dtype, kv_dtype):
    query, key, value = problem(30, seq_len_kv, 32, dtype=dtype, kv_dtype=kv_dtype)
    check(query * dtype.type(16), key, value)
    check(query * dtype.type(16), key, value, is_causal=True, q_offset=seq_len_kv - 20)


@both_precisions
@pytest.mark.parametrize("head_dim", [4, 65, 257])
@pytest.mark.parametrize("step", [0.01, 0.5, 8])
def test_ramps_along_the_keys(isa, step, head_dim, dtype):
    """Scores that grow with the key move the reference value in every block, in lanes beside others that fall."""
    query, key, value = problem(40, 700, head_dim, 8, leading=None, dtype=dtype)
    # In the last dimension: a dot product that adds its largest term last is not about the rounding of sums.
    query[:, :-1] /= head_dim
    query[:, -1] = np.linspace(-1, 1, 40) * math.sqrt(head_dim)
    key[:, -1] = step * np.arange(700)
    for order in (key, key[::-1]):
        check(query, order, value)
        check(query, order, value, attn_mask=random_mask(bool, (40, 700)), window=(None, 100), q_offset=300)


@both_precisions
@pytest.mark.parametrize("seq_len_kv", KEYS)
def test_equal_scores_give_the_mean(isa, seq_len_kv, dtype):
    query, key, value = problem(5, seq_len_kv, 8, leading=None, dtype=dtype)
    for same in (np.zeros_like(key), np.broadcast_to(key[:1], key.shape)):
        weights = check(query, same, value)[1]
        np.testing.assert_allclose(weights, 1 / seq_len_kv, rtol=4 * np.finfo(dtype).eps)
    check(query, np.zeros_like(key), value, sinks=[0.0], is_causal=True, q_offset=seq_len_kv - 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 20])
def test_errors_do_not_grow_with_the_number_of_keys(isa, rows, dtype):
    """In rows of equal numbers each sum loses the same in every split of the keys, and in the same direction. Merging
    the splits loses no more: two roundings and the division's, however many there are."""
    query, key = np.ones((1, 1, rows, 8), dtype), np.float32(0.3).astype(dtype)
    value = np.random.default_rng(0).uniform(0.5, 1, (1, 1, 1, 20)).astype(dtype)

    def mean_of(seq_len_kv):
        shape = 1, 1, seq_len_kv
        return attention(query, np.broadcast_to(key, (*shape, 8)), np.broadcast_to(value, (*shape, 20)))

    one_split = mean_of(SPLIT)
    for seq_len_kv in (2**16, 2**19):
        np.testing.assert_allclose(mean_of(seq_len_kv), one_split, rtol=2 * np.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("rows", [1, 20])
def test_maxima_that_rise_from_split_to_split(isa, rows):
    """A factor near 1 at each of 64 merges would lose a unit of exp2's error each time."""
    seq_len_kv = 64 * SPLIT
    query = np.ones((rows, 1), np.float32)
    key = np.linspace(0, 6, seq_len_kv, dtype=np.float32)[:, None]
    check(query, key, np.random.default_rng(0).uniform(0.5, 1, (seq_len_kv, 2)).astype(np.float32), scale=1.0)


@pytest.mark.parametrize("rows", [1, 20])
def test_infinities_and_overflow_in_some_splits(isa, rows):
    """What the sums of splits keep of their rounding errors is no number there."""
    query, key, value = problem(rows, 9000, 8, leading=None)
    value *= np.float32(1e37)
    assert np.isfinite(check(query, key, value)[0]).all()
    value[5000, 0], value[8999, 1], value[17, 2], value[6000, 2] = INF, -INF, INF, -INF
    out = check(query, key, value)[0]
    assert (out[:, 0] == INF).all() and (out[:, 1] == -INF).all() and np.isnan(out[:, 2]).all()
