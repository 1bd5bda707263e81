"""Gradients: of attention, dense and packed, and of the layers; against differences, the reference and PyTorch."""

import inspect
import itertools
import re

import numpy as np
import pytest
from problems import (
    BFLOAT16,
    DTYPES,
    FLOATS,
    GRADIENT_DIMS,
    GRADIENT_KEYS,
    GRADIENT_ROWS,
    INF,
    NAN,
    assert_same_bits,
    random_problem,
)
from tolerance import assert_gradients_close

import cattn
from cattn import reference
from cattn.reference import Gradients

# Whose gradients are tested: modules that have scaled_dot_product_attention, varlen_attention and both backward.
IMPLEMENTATIONS = [cattn, cattn.reference]
LIBRARIES = [cattn, cattn.reference]  # of the layers

every = pytest.mark.parametrize("library", IMPLEMENTATIONS, ids=lambda module: module.__name__)
both = pytest.mark.parametrize("library", LIBRARIES, ids=lambda module: module.__name__)
ALL = Gradients._fields


def normal(rng, *shape):
    return rng.standard_normal(shape)


def problem(seed=0, *, leading=(2,), num_heads=4, num_kv_heads=2, seq_len_q=3, seq_len_kv=5, head_dim=3, head_dim_v=2):
    rng = np.random.default_rng(seed)
    heads, kv_heads = (*leading, num_heads), (*leading, num_kv_heads)
    return (normal(rng, *heads, seq_len_q, head_dim), normal(rng, *kv_heads, seq_len_kv, head_dim),
            normal(rng, *kv_heads, seq_len_kv, head_dim_v))


def backward(library, arrays, options, grad_out=None, grad_logsumexp=None, wanted=ALL):
    """Gradients; grad_out is random where it is None."""
    out, logsumexp = library.scaled_dot_product_attention(*arrays, **options, return_logsumexp=True)
    if grad_out is None:
        grad_out = normal(np.random.default_rng(99), *out.shape).astype(out.dtype)
    return library.scaled_dot_product_attention_backward(
        grad_out, *arrays, out, logsumexp, **options, grad_logsumexp=grad_logsumexp, wanted=wanted)


# Against differences.

STEP = 2.0**-9


def slope(f):
    """df/dt at 0, but for f's fifth derivative times STEP**4 / 30."""
    return (8 * (f(STEP) - f(-STEP)) - (f(2 * STEP) - f(-2 * STEP))) / (12 * STEP)


def close_to_slopes(gradient, slopes, largest):
    """1e-7 of the largest; 1e-10: what rounding makes of a sum of some tens, over the step."""
    return np.abs(gradient - slopes) <= 1e-7 * largest + 1e-10


def loss(call, inputs, grad_out, grad_logsumexp):
    """What gradients are of, by the reference."""
    out, logsumexp = call(**inputs, return_logsumexp=True)
    of_logsumexp = 0 if grad_logsumexp is None else np.where(logsumexp == -INF, 0, grad_logsumexp * logsumexp)
    return np.sum(grad_out * out) + np.sum(of_logsumexp)


def assert_slopes(gradients, call, inputs, grad_out, grad_logsumexp, rng=None):
    """Every number of every float input; or with rng, all numbers at once, in a random direction."""
    for name, gradient in gradients.items():
        given = inputs[name]
        assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype), name
        largest = np.abs(gradient).max(initial=0)

        def along(direction, name=name, given=given):
            return slope(lambda t: loss(call, inputs | {name: given + t * direction}, grad_out, grad_logsumexp))

        if rng is not None:
            direction = normal(rng, *given.shape)
            direction /= np.linalg.norm(direction) or 1
            assert close_to_slopes(np.sum(gradient * direction), along(direction), largest), name
            continue
        slopes = np.zeros(given.shape)
        for index in np.ndindex(given.shape):
            direction = np.zeros(given.shape)
            direction[index] = 1
            slopes[index] = along(direction)
        assert close_to_slopes(gradient, slopes, largest).all(), name


def float_inputs(inputs):
    """Those that have a gradient, as far as they are given."""
    return {name for name in ALL if name in inputs and inputs[name].dtype != bool}


def options_alone():
    rng = np.random.default_rng(1)
    seen = rng.random((2, 4, 3, 5)) < 0.7
    bias = np.where(seen, normal(rng, 2, 4, 3, 5), -INF)
    return {
        "nothing": {}, "scale": {"scale": -0.7}, "scale of 0": {"scale": 0.0},
        "causal": {"is_causal": True, "q_offset": 0}, "causal at the end": {"is_causal": True, "q_offset": "end"},
        "window": {"window": (1, 2)},
        "softcap": {"softcap": 0.8}, "softcap and scale": {"softcap": 0.8, "scale": 1.3},
        "softcap, ALiBi and mask": {"softcap": 0.8, "alibi_slopes": rng.random(4), "attn_mask": bias},
        "ALiBi": {"alibi_slopes": rng.random(4)},
        "ALiBi by batch row, at offsets": {"alibi_slopes": normal(rng, 2, 4), "q_offset": np.array([2, -1])},
        "sinks": {"sinks": normal(rng, 4)}, "kv_lens": {"kv_lens": np.array([3, 5])}, "kv_lens, one": {"kv_lens": 4},
        "kv_starts": {"kv_starts": np.array([3, 0])}, "bool mask": {"attn_mask": seen},
        "float mask": {"attn_mask": bias}, "mask of keys": {"attn_mask": bias[0, 0, 0]},
        "mask of queries": {"attn_mask": normal(rng, 3, 1)}, "mask of heads": {"attn_mask": normal(rng, 4, 1, 1)},
        "mask of a batch row": {"attn_mask": bias[:1, :1]}, "dropout": {"dropout_p": 0.4, "seed": 3},
        "dropout and sinks": {"dropout_p": 0.4, "seed": 3, "sinks": normal(rng, 4)},
    }


OPTIONS = options_alone()


@every
@pytest.mark.parametrize("with_logsumexp", [False, True], ids=["", "logsumexp"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_alone(library, options, with_logsumexp):
    rng = np.random.default_rng(2)
    arrays = problem()
    inputs = dict(zip(("query", "key", "value"), arrays, strict=True)) | options
    grad_out = normal(rng, 2, 4, 3, 2)
    grad_logsumexp = normal(rng, 2, 4, 3) if with_logsumexp else None
    gradients = backward(library, arrays, options, grad_out, grad_logsumexp)
    given = {name: x for name, x in gradients._asdict().items() if x is not None}
    assert given.keys() == float_inputs(inputs)
    assert_slopes(given, reference.scaled_dot_product_attention, inputs, grad_out, grad_logsumexp)


@every
@pytest.mark.parametrize("seeds", [range(n, n + 100) for n in range(0, 500, 100)], ids=str)
def test_any_options_together(library, seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        arrays, options = random_problem(rng)
        inputs = dict(zip(("query", "key", "value"), arrays, strict=True)) | options
        out, logsumexp = reference.scaled_dot_product_attention(*arrays, **options, return_logsumexp=True)
        grad_out, grad_logsumexp = normal(rng, *out.shape), normal(rng, *logsumexp.shape) if seed % 2 else None
        gradients = backward(library, arrays, options, grad_out, grad_logsumexp)
        given = {name: x for name, x in gradients._asdict().items() if x is not None}
        assert given.keys() == float_inputs(inputs), seed
        assert_slopes(given, reference.scaled_dot_product_attention, inputs, grad_out, grad_logsumexp, rng)


# What is wanted.


def test_signatures():
    """Those of the forward functions, but for what they return, with what gradients need; and the reference's."""
    for name in "scaled_dot_product_attention", "varlen_attention":
        forward, ours, specified = (inspect.signature(function).parameters for function in (
            getattr(cattn, name), getattr(cattn, f"{name}_backward"), getattr(reference, f"{name}_backward")))
        own = {"grad_out", "out", "logsumexp", "grad_logsumexp", "wanted"}
        shared = forward.keys() - {"out", "return_weights", "return_logsumexp"}
        assert ours.keys() == shared | own
        assert all((ours[option].kind, ours[option].default) == (forward[option].kind, forward[option].default)
                   for option in shared)
        by_position = [name for name, parameter in ours.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        assert by_position == ["grad_out", "query", "key", "value", "out", "logsumexp", *[
            name for name in list(forward)[3:] if forward[name].kind is forward[name].POSITIONAL_OR_KEYWORD]]
        for option in specified.keys() - {"options"}:
            assert (ours[option].kind, ours[option].default) == (specified[option].kind, specified[option].default)


@every
def test_what_is_wanted(library):
    arrays = problem()
    options = {name: OPTIONS["softcap, ALiBi and mask"][name] for name in ("softcap", "alibi_slopes", "attn_mask")}
    options |= OPTIONS["dropout and sinks"]
    everything = backward(library, arrays, options)
    for count in range(len(ALL) + 1):
        for wanted in itertools.combinations(ALL, count):
            gradients = backward(library, arrays, options, wanted=wanted)
            for name, all_of, of_these in zip(ALL, everything, gradients, strict=True):
                assert (of_these is not None) == (name in wanted)
                if of_these is not None:
                    assert_same_bits(of_these, all_of)
    out, logsumexp = library.scaled_dot_product_attention(*arrays, return_logsumexp=True)
    gradients = library.scaled_dot_product_attention_backward(out, *arrays, out, logsumexp)
    assert [x is not None for x in gradients] == [True] * 3 + [False] * 3


# What is masked, and rows that see nothing.

MASKED = {
    "bool mask": {"attn_mask": np.array([True, True, True, False, False])},
    "float mask": {"attn_mask": np.array([0.0, 0.5, 1.0, -INF, -INF])},
    "kv_lens": {"kv_lens": np.array([3, 3])},
    "window": {"window": (None, 0)},
    "causal, all options": {"is_causal": True, "q_offset": 0, "alibi_slopes": np.ones(4), "softcap": 3.0,
                            "sinks": np.ones(4), "dropout_p": 0.5, "seed": 1},
}


@every
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("options", MASKED.values(), ids=MASKED)
def test_garbage_behind_the_mask_is_not_read(library, options, garbage):
    arrays = problem()
    expected = backward(library, arrays, options)
    query, key, value = (x.copy() for x in arrays)
    key[..., 3:, 1] = value[..., 3, :] = value[..., 4, 0] = garbage
    gradients = backward(library, (query, key, value), options)
    for name, gradient, clean in zip(ALL, gradients, expected, strict=True):
        if gradient is not None:
            np.testing.assert_array_equal(gradient, clean, name)
    assert not gradients.key[..., 3:, :].any() and not gradients.value[..., 3:, :].any()
    if gradients.attn_mask is not None:
        assert not gradients.attn_mask[3:].any()


@every
def test_garbage_in_the_first_keys_is_not_read(library):
    query, key, value = problem()
    options = {"kv_starts": np.array([2, 1]), "alibi_slopes": np.ones(4)}
    expected = backward(library, (query, key, value), options)
    key, value = key.copy(), value.copy()
    key[0, :, :2] = value[0, :, 1, 0] = value[1, :, 0] = NAN
    for gradient, clean in zip(backward(library, (query, key, value), options), expected, strict=True):
        if gradient is not None:
            np.testing.assert_array_equal(gradient, clean)


@every
@pytest.mark.parametrize("where", ["key", "value"])
def test_garbage_reaches_those_who_see_it(library, where):
    """Row 2 alone sees key 2: its own gradient is NaN, and those of the keys that it sees; nothing of rows 0 and 1."""
    query, key, value = problem(num_heads=1, num_kv_heads=1, seq_len_kv=3, leading=(1,))
    options = {"is_causal": True, "sinks": np.ones(1), "attn_mask": np.zeros((3, 3))}
    clean = backward(library, (query, key, value), options)
    bad = {"key": key, "value": value}
    bad[where] = bad[where].copy()
    bad[where][..., 2, 0] = NAN
    gradients = backward(library, (query, *bad.values()), options)
    np.testing.assert_array_equal(gradients.query[..., :2, :], clean.query[..., :2, :])
    np.testing.assert_array_equal(gradients.attn_mask[:2], clean.attn_mask[:2])
    assert np.isnan(gradients.query[..., 2, :]).all() and np.isnan(gradients.attn_mask[2]).all()
    assert np.isnan(gradients.key).all() and np.isnan(gradients.sinks).all()
    assert np.isnan(gradients.value).all() == (where == "key")


@every
def test_value_of_a_weight_that_underflows(library):
    """Its NaN goes through, as in the forward; an infinite weight of none of the others is made up."""
    query, key, value = np.ones((1, 1)), np.array([[0.0], [-1e6]]), np.array([[1.0], [NAN]])
    gradients = backward(library, (query, key, value), {}, np.ones((1, 1)))
    assert np.isnan(gradients.query).all() and np.isnan(gradients.key).all()
    np.testing.assert_array_equal(gradients.value, [[1.0], [0.0]])


NOTHING_TO_SEE = {
    "bool mask": {"attn_mask": np.zeros((3, 5), bool)},
    "float mask": {"attn_mask": np.full((3, 5), -INF)},
    "causal": {"is_causal": True, "q_offset": -3},
    "window": {"window": (0, 0), "q_offset": 9},
    "kv_lens": {"kv_lens": 0},
    "kv_lens and kv_starts": {"kv_lens": 2, "kv_starts": 2},
    "all options": {"attn_mask": np.full((3, 5), -INF), "alibi_slopes": np.ones(4), "sinks": np.full(4, NAN),
                    "softcap": 1.0, "dropout_p": 0.5, "seed": 1},
}


@every
@pytest.mark.parametrize("number", [1.0, NAN, INF])
@pytest.mark.parametrize("options", NOTHING_TO_SEE.values(), ids=NOTHING_TO_SEE)
def test_rows_that_see_nothing(library, options, number):
    arrays = tuple(np.full_like(x, number) for x in problem())
    gradients = backward(library, arrays, options, np.full((2, 4, 3, 2), number), np.full((2, 4, 3), number))
    for name in ALL:
        gradient = getattr(gradients, name)
        assert (gradient is not None) == (name in {"query", "key", "value"} | float_inputs(options)), name
        assert gradient is None or not gradient.any(), name


@every
def test_rows_whose_scores_are_all_minus_infinity(library):
    """Of keys that are not masked. Their logsumexp is -inf, and that decides."""
    arrays = np.ones((2, 1)), np.full((3, 1), -INF), np.ones((3, 1))
    options = {"attn_mask": np.zeros((2, 3)), "sinks": np.zeros(1)}
    gradients = backward(library, arrays, options, np.ones((2, 1)), np.ones(2))
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@every
def test_one_row_that_sees_nothing(library):
    """Whatever stands in it, the others have their gradients."""
    query, key, value = problem()
    seen = np.ones((3, 5), bool)
    seen[1] = False
    options = {"attn_mask": seen, "sinks": np.ones(4)}
    grad_out = normal(np.random.default_rng(3), 2, 4, 3, 2)
    expected = backward(library, (query[..., ::2, :], key, value), {"sinks": np.ones(4)}, grad_out[..., ::2, :])
    query, grad_out = query.copy(), grad_out.copy()
    query[..., 1, :] = grad_out[..., 1, :] = NAN
    gradients = backward(library, (query, key, value), options, grad_out)
    assert not gradients.query[..., 1, :].any()
    np.testing.assert_allclose(gradients.query[..., ::2, :], expected.query, rtol=1e-13, atol=1e-13)
    for name in "key", "value", "sinks":
        np.testing.assert_allclose(getattr(gradients, name), getattr(expected, name), rtol=1e-13, atol=1e-13)


@every
def test_gradient_that_is_not_finite_stays_in_its_row(library):
    arrays = problem(num_heads=2, seq_len_kv=3)
    grad_out = normal(np.random.default_rng(3), 2, 2, 3, 2)
    clean = backward(library, arrays, {"is_causal": True}, grad_out)
    grad_out[0, 0, 1, 0] = NAN
    gradients = backward(library, arrays, {"is_causal": True}, grad_out)
    for name, first in ("query", (0, 0, 1)), ("key", (0, 0, slice(2))):
        expected = getattr(clean, name).copy()
        expected[first] = NAN
        np.testing.assert_array_equal(getattr(gradients, name), expected, name)
    expected = clean.value.copy()
    expected[0, 0, :2, 0] = NAN
    np.testing.assert_array_equal(gradients.value, expected)


@every
def test_what_is_not_finite_in_other_batch_rows(library):
    """An infinite gradient of a score meets the queries of its own batch row."""
    query, key, value = problem(num_heads=2)
    grad_out = normal(np.random.default_rng(3), 2, 2, 3, 2)
    grad_out[0, 0, 1, 0] = INF
    query[1, 1, 1, 0] = INF
    together = backward(library, (query, key, value), {}, grad_out)
    for row in (slice(0, 1), slice(1, 2)):
        alone = backward(library, [x[row] for x in (query, key, value)], {}, grad_out[row])
        for name in "query", "key", "value":
            np.testing.assert_array_equal(np.isnan(getattr(together, name)[row]), np.isnan(getattr(alone, name)), name)


@every
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_cap_that_is_reached(library, dtype):
    """Its derivative is 0, exactly."""
    query, key, value = (x.astype(dtype) for x in problem())
    for softcap in (0.7, 3.3, 7.0, 10.0, 30.0, 49.0):
        gradients = backward(library, (np.copysign(dtype.type(1e9), query), key, value), {"softcap": softcap})
        assert not gradients.query.any() and not gradients.key.any() and gradients.value.any(), softcap


@every
def test_no_keys_and_no_queries(library):
    query, key, value = problem()
    gradients = backward(library, (query, key[..., :0, :], value[..., :0, :]), {})
    assert gradients.query.shape == query.shape and not gradients.query.any()
    assert gradients.key.shape == (2, 2, 0, 3) and gradients.value.shape == (2, 2, 0, 2)
    gradients = backward(library, (query[..., :0, :], key, value), {"sinks": np.ones(4), "attn_mask": np.zeros(5)})
    for gradient, given in zip(gradients, (query[..., :0, :], key, value, np.zeros(5), None, np.ones(4)), strict=True):
        assert (gradient is None) == (given is None)
        assert gradient is None or (gradient.shape == given.shape and not gradient.any())


# Closed forms.


@every
def test_equal_scores(library):
    """Of weights 1 / n: each value has 1 / n of every row's grad_out; with grad_logsumexp alone, a mask the weights."""
    query, key, value = (np.zeros((1, 1, 4, 1)) for _ in range(3))
    gradients = backward(library, (query, key, value), {}, np.arange(4.0).reshape(1, 1, 4, 1))
    np.testing.assert_allclose(gradients.value.ravel(), 6 / 4, rtol=1e-15)
    gradients = backward(library, (query, key, value), {"attn_mask": np.zeros((4, 4)), "is_causal": True},
                         np.zeros((1, 1, 4, 1)), np.ones((1, 1, 4)))
    np.testing.assert_allclose(gradients.attn_mask, np.tri(4) / np.arange(1, 5)[:, None], rtol=1e-15)


@every
def test_sink_takes_what_it_has(library):
    """Two weights of 1 / 3 and a sink of 1 / 3, on values 1 and 3: out is 4 / 3, its derivative -1 / 3 * 4 / 3."""
    query = np.zeros((1, 1, 1, 1))
    key, value = np.zeros((1, 1, 2, 1)), np.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    gradients = backward(library, (query, key, value), {"sinks": np.zeros(1), "attn_mask": np.zeros(2)},
                         np.ones((1, 1, 1, 1)), np.ones((1, 1, 1)), wanted=("sinks", "attn_mask"))
    np.testing.assert_allclose(gradients.sinks, -4 / 9, rtol=1e-14)
    np.testing.assert_allclose(gradients.attn_mask, [(1 - 4 / 3) / 3 + 1 / 2, (3 - 4 / 3) / 3 + 1 / 2], rtol=1e-14)


@every
@pytest.mark.parametrize("sink", [-INF, INF, 1e5])
def test_sinks_without_an_exponential(library, sink):
    arrays = problem()
    gradients = backward(library, arrays, {"sinks": np.full(4, sink)})
    without = backward(library, arrays, {})
    for name in "query", "key", "value":
        expected = getattr(without, name) if sink < 0 else np.zeros_like(getattr(without, name))
        np.testing.assert_array_equal(getattr(gradients, name), expected, name)
    assert not gradients.sinks.any()


@every
def test_clipping_has_no_derivative(library):
    """The largest of all biases takes all weight: what the logsumexp is moves as it does."""
    largest = np.finfo(np.float64).max
    bias = np.array([0, 0, largest, 0, 0])
    gradients = backward(library, problem(), {"attn_mask": bias}, np.zeros((2, 4, 3, 2)), np.ones((2, 4, 3)))
    np.testing.assert_array_equal(gradients.attn_mask, [0, 0, 2 * 4 * 3, 0, 0])
    gradients = backward(library, problem(seq_len_q=1, seq_len_kv=3), {"alibi_slopes": np.full(4, -largest)},
                         np.zeros((2, 4, 1, 2)), np.ones((2, 4, 1)))
    np.testing.assert_array_equal(gradients.alibi_slopes, np.full(4, -2 * 2))  # of 2 batch rows, at distance 2


# Shapes.


@every
def test_copies_are_summed(library):
    """An axis of 1, or none, or a shared head: the gradient is the sum over its copies."""
    rng = np.random.default_rng(4)
    whole = problem(leading=(2, 3), num_kv_heads=4)
    query, key, value = whole[0], whole[1][:1, :, :2], whole[2][0, :, ::2]
    mask = normal(rng, 3, 1, 1, 5)
    copied = (query, np.repeat(np.broadcast_to(key, (2, 3, 2, 5, 3)), 2, axis=2),
              np.repeat(np.broadcast_to(value, (2, 3, 2, 5, 2)), 2, axis=2))
    slopes = rng.random(4)
    options = {"dropout_p": 0.3, "seed": 5}
    grad_out = normal(rng, 2, 3, 4, 3, 2)
    gradients = backward(library, (query, key, value), {"attn_mask": mask, "alibi_slopes": slopes, **options}, grad_out)
    full = backward(library, copied, {"attn_mask": np.broadcast_to(mask, (2, 3, 4, 3, 5)).copy(),
                                      "alibi_slopes": np.broadcast_to(slopes, (2, 3, 4)).copy(), **options}, grad_out)
    close = {"rtol": 1e-12, "atol": 1e-13}
    np.testing.assert_allclose(gradients.query, full.query, **close)
    by_group = full.key.reshape(2, 3, 2, 2, 5, 3).sum(axis=3)
    np.testing.assert_allclose(gradients.key, by_group.sum(axis=0, keepdims=True), **close)
    np.testing.assert_allclose(gradients.value, full.value.reshape(2, 3, 2, 2, 5, 2).sum(axis=(0, 3)), **close)
    np.testing.assert_allclose(gradients.attn_mask, full.attn_mask.sum(axis=(0, 2, 3))[:, None, None], **close)
    np.testing.assert_allclose(gradients.alibi_slopes, full.alibi_slopes.sum(axis=(0, 1)), **close)


@every
def test_a_query_that_is_broadcast(library):
    query, key, value = problem(leading=(3,), num_kv_heads=4)
    gradients = backward(library, (query[:1], key, value), {})
    full = backward(library, (np.broadcast_to(query[:1], query.shape).copy(), key, value), {})
    np.testing.assert_allclose(gradients.query, full.query.sum(axis=0, keepdims=True), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradients.key, full.key, rtol=1e-12, atol=1e-13)


@every
def test_without_an_axis_of_heads(library):
    rng = np.random.default_rng(5)
    query, key, value = (x[:, 0] for x in problem(leading=(2,), num_heads=1, num_kv_heads=1))
    options = {"attn_mask": normal(rng, 2, 3, 5), "sinks": np.ones(1), "dropout_p": 0.3, "seed": 5,
               "alibi_slopes": rng.random((2, 1))}
    grad_out, grad_logsumexp = normal(rng, 2, 3, 2), normal(rng, 2, 3)
    with_heads = backward(library, (query[:, None], key[:, None], value[:, None]),
                          options | {"attn_mask": options["attn_mask"][:, None]}, grad_out[:, None],
                          grad_logsumexp[:, None])
    gradients = backward(library, (query, key, value), options, grad_out, grad_logsumexp)
    for name in ALL:
        one, other = getattr(gradients, name), getattr(with_heads, name)
        assert_same_bits(one, other if name in ("alibi_slopes", "sinks") else other[:, 0])
    single = options | {"attn_mask": options["attn_mask"][0], "alibi_slopes": options["alibi_slopes"][0]}
    first = backward(library, (query[0], key[0], value[0]), single, grad_out[0], grad_logsumexp[0])
    for name in "query", "key", "value", "attn_mask", "alibi_slopes":
        assert_same_bits(getattr(first, name), getattr(gradients, name)[0])


# Dtypes.


def check_gradients(arrays, options, rng, library=cattn, on_every_isa=lambda call: call(), spoil=lambda x: x):
    """They are as exact as they have to be. grad_out is random, spoilt, and so is grad_logsumexp."""
    out, logsumexp = library.scaled_dot_product_attention(*arrays, **options, return_logsumexp=True)
    grad_out, grad_logsumexp = spoil(normal(rng, *out.shape).astype(out.dtype)), normal(rng, *logsumexp.shape)
    given = grad_out, *arrays, out, logsumexp
    options = options | {"grad_logsumexp": grad_logsumexp.astype(logsumexp.dtype)}
    gradients = on_every_isa(lambda: library.scaled_dot_product_attention_backward(*given, **options, wanted=ALL))
    assert_gradients_close(gradients, *given, **options)


@every
@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=str)
def test_dtypes(library, dtype, kv_dtype):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        arrays, options = random_problem(rng, dtype=dtype, kv_dtype=kv_dtype, most_rows=9, most_keys=20, most_dims=12)
        check_gradients(arrays, options, rng, library)


@every
@pytest.mark.parametrize("mask_dtype", FLOATS, ids=str)
def test_each_gradient_has_the_dtype_of_its_input(library, mask_dtype):
    query, key, value = (x.astype(np.float32) for x in problem())
    options = {"attn_mask": np.full((3, 5), 0.5, mask_dtype), "alibi_slopes": np.ones(4), "sinks": np.ones(4)}
    gradients = backward(library, (query, key.astype(BFLOAT16), value.astype(BFLOAT16)), options)
    assert [x.dtype for x in gradients] == [np.float32, BFLOAT16, BFLOAT16, mask_dtype, np.float32, np.float32]
    gradients = backward(library, problem(), options)
    assert [x.dtype for x in gradients] == [np.float64] * 3 + [mask_dtype] + [np.float64] * 2


# Sizes, on every instruction set.


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_large_problems(on_every_isa, seed, dtype, kv_dtype):
    rng = np.random.default_rng(seed)
    arrays, options = random_problem(rng, dtype=dtype, kv_dtype=kv_dtype, most_rows=400, most_keys=700, most_dims=40)
    check_gradients(arrays, options, rng, on_every_isa=on_every_isa)


SIZES = {
    **{f"{n} rows": {"seq_len_q": n, "seq_len_kv": 7} for n in GRADIENT_ROWS},
    **{f"{n} keys": {"seq_len_q": 7, "seq_len_kv": n} for n in GRADIENT_KEYS},
    **{f"head_dim {n}": {"seq_len_q": 20, "seq_len_kv": 30, "head_dim": n, "head_dim_v": 1 + 11 * n % 301}
       for n in GRADIENT_DIMS},
}


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(on_every_isa, sizes, dtype):
    query, key, value = (x.astype(dtype) for x in problem(leading=(), num_heads=1, num_kv_heads=1, **sizes))
    # Small scores: those of wide heads, in one chain of up to 256 products, lose more than twice what BLAS's sums do.
    arrays, rng = (query / 4, key, value), np.random.default_rng(1)
    check_gradients(arrays, {}, rng, on_every_isa=on_every_isa)
    limits = {"is_causal": True, "q_offset": "end", "window": (3 * key.shape[-2] // 4, None)}
    check_gradients(arrays, limits, rng, on_every_isa=on_every_isa)


def test_starts_behind_many_splits(on_every_isa):
    rng = np.random.default_rng(0)
    arrays = [normal(rng, 2, 1, n, 2).astype(np.float32) for n in (3, 40_000, 40_000)]
    check_gradients(arrays, {"kv_starts": np.array([39_990, 1000]), "kv_lens": np.array([40_000, 1600])}, rng,
                    on_every_isa=on_every_isa)


MANY_COPIES = {
    "mask of keys": ((2, 8, 1000, 4), (2, 8, 40, 4), (40,)),
    "mask of one number": ((2, 2, 200, 4), (2, 2, 140, 4), (1,)),
    "mask for all heads": ((40, 40, 20, 4), (40, 40, 20, 4), (20, 20)),
    "query": ((1, 1, 20, 4), (3000, 1, 20, 4), None),
}


@pytest.mark.parametrize(("query_shape", "key_shape", "mask_shape"), MANY_COPIES.values(), ids=MANY_COPIES)
def test_sums_over_many_copies(query_shape, key_shape, mask_shape):
    """Of weights, which all have one sign, not one after the other in float32."""
    rng = np.random.default_rng(0)
    arrays = [normal(rng, *shape).astype(np.float32) for shape in (query_shape, key_shape, key_shape)]
    options = {} if mask_shape is None else {"attn_mask": normal(rng, *mask_shape).astype(np.float32)}
    out, logsumexp = cattn.scaled_dot_product_attention(*arrays, **options, return_logsumexp=True)
    given = np.zeros_like(out), *arrays, out, logsumexp
    options["grad_logsumexp"] = np.ones_like(logsumexp)
    gradients = cattn.scaled_dot_product_attention_backward(*given, **options, wanted=ALL)
    assert_gradients_close(gradients, *given, **options)


def with_odd_numbers(x, rng):
    """Some that are NaN or infinite, or none."""
    x = x.copy()
    for _ in range(rng.integers(4) if x.size else 0):
        x.reshape(-1)[rng.integers(x.size)] = rng.choice([NAN, INF, -INF])
    return x


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("seeds", [range(n, n + 10) for n in range(0, 40, 10)], ids=str)
def test_odd_numbers(on_every_isa, seeds, dtype):
    """They reach what they reach in the reference, under any masks and beyond one block."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        arrays, options = random_problem(rng, dtype=dtype, most_rows=230, most_keys=600, most_dims=12)
        if "alibi_slopes" in options:
            options["alibi_slopes"] /= 20  # 0 times infinity is NaN, and no weight is to be 0 in one precision alone
        check_gradients([with_odd_numbers(x, rng) for x in arrays], options, rng, on_every_isa=on_every_isa,
                        spoil=lambda x, rng=rng: with_odd_numbers(x, rng))


# Packed sequences.


def packed_problem(rng):
    """((query, key, value, cu_seqlens_q, cu_seqlens_kv), options)"""
    num_kv_heads, group_size = rng.integers(1, 3, 2)
    num_heads, sequences = num_kv_heads * group_size, rng.integers(0, 4)
    cu_seqlens_q, cu_seqlens_kv = (np.concatenate([[0], rng.integers(0, 5, sequences).cumsum()]) for _ in range(2))
    head_dim, head_dim_v = rng.integers(1, 4, 2)
    total_q, total_kv = cu_seqlens_q[-1], cu_seqlens_kv[-1]
    arrays = (normal(rng, total_q, num_heads, head_dim), normal(rng, total_kv, num_kv_heads, head_dim),
              normal(rng, total_kv, num_kv_heads, head_dim_v), cu_seqlens_q, cu_seqlens_kv)
    options = {name: value for name, value in {
        "is_causal": True, "q_offset": rng.integers(-1, 3, sequences), "window": (1, 2), "softcap": 0.7, "scale": 0.8,
        "alibi_slopes": rng.random((sequences, num_heads) if rng.random() < 0.5 else num_heads),
        "sinks": normal(rng, num_heads), "dropout_p": 0.4,
    }.items() if rng.random() < 0.5}
    return arrays, options | ({"seed": 6} if "dropout_p" in options else {})


@every
def test_packed_sequences(library):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        (*arrays, cu_seqlens_q, cu_seqlens_kv), options = packed_problem(rng)
        packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
        inputs = dict(zip(("query", "key", "value"), arrays, strict=True)) | options
        out, logsumexp = library.varlen_attention(*arrays, **packed, **options, return_logsumexp=True)
        grad_out, grad_logsumexp = normal(rng, *out.shape), normal(rng, *logsumexp.shape)
        gradients = library.varlen_attention_backward(
            grad_out, *arrays, out, logsumexp, **packed, **options, grad_logsumexp=grad_logsumexp, wanted=ALL)
        given = {name: x for name, x in gradients._asdict().items() if x is not None}
        assert given.keys() == float_inputs(inputs), seed
        assert_slopes(given, reference.varlen_attention, inputs | packed, grad_out, grad_logsumexp, rng)


@every
def test_packed_sequences_are_each_on_its_own(library):
    """As the dense function has them; and their own lengths are the default."""
    rng = np.random.default_rng(7)
    query, key, value = normal(rng, 7, 4, 3), normal(rng, 7, 2, 3), normal(rng, 7, 2, 2)
    cu_seqlens, sinks = np.array([0, 4, 4, 7]), normal(rng, 4)
    out, logsumexp = library.varlen_attention(query, key, value, cu_seqlens, is_causal=True, sinks=sinks,
                                              return_logsumexp=True)
    grad_out = normal(rng, 7, 4, 2)
    packed = library.varlen_attention_backward(grad_out, query, key, value, out, logsumexp, cu_seqlens, is_causal=True,
                                               sinks=sinks, wanted=("query", "key", "value", "sinks"))
    of_sinks = 0
    for start, end in itertools.pairwise(cu_seqlens):
        own = [x[start:end].swapaxes(0, 1)[None] for x in (query, key, value)]
        dense = backward(library, own, {"is_causal": True, "sinks": sinks}, grad_out[start:end].swapaxes(0, 1)[None])
        for name in "query", "key", "value":
            np.testing.assert_allclose(getattr(packed, name)[start:end], getattr(dense, name)[0].swapaxes(0, 1),
                                       rtol=1e-12, atol=1e-13)
        of_sinks = of_sinks + dense.sinks
    np.testing.assert_allclose(packed.sinks, of_sinks, rtol=1e-12, atol=1e-13)
    assert packed.attn_mask is None and packed.alibi_slopes is None
    only = library.varlen_attention_backward(grad_out, query, key, value, out, logsumexp, cu_seqlens, is_causal=True,
                                             sinks=sinks, wanted=("key",))
    assert_same_bits(only.key, packed.key)
    assert [x is not None for x in only] == [False, True, False, False, False, False]


@every
def test_packed_garbage_stays_in_its_sequence(library):
    rng = np.random.default_rng(8)
    arrays = [normal(rng, 6, 2, 3) for _ in range(4)]
    cu_seqlens, options = np.array([0, 3, 6]), {"dropout_p": 0.5, "seed": 2}

    def gradients(query, key, value, grad_out):
        out, logsumexp = library.varlen_attention(query, key, value, cu_seqlens, **options, return_logsumexp=True)
        return library.varlen_attention_backward(
            grad_out, query, key, value, out, logsumexp, cu_seqlens, **options)[:3]

    clean = gradients(*arrays)
    for first, bad in itertools.product(range(4), (NAN, INF)):
        spoilt = [x.copy() for x in arrays]
        spoilt[first][1] = bad
        for gradient, expected in zip(gradients(*spoilt), clean, strict=True):
            assert_same_bits(gradient[3:], expected[3:])
            assert np.isfinite(gradient[:3]).all() <= (first == 2)


# PyTorch.


@every
@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_torch(library, mask, scale):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    query, key, value = normal(rng, 2, 6, 7, 8), normal(rng, 2, 3, 9, 8), normal(rng, 2, 3, 9, 8)
    options = {"scale": scale, "enable_gqa": True}
    attn_mask = None
    if mask == "causal":
        options |= {"is_causal": True, "q_offset": 0}
    elif mask is not None:
        attn_mask = (rng.random((2, 1, 7, 9)) < 0.7) | (np.arange(9) == 0)
        if mask == "float":
            attn_mask = np.where(attn_mask, rng.random(attn_mask.shape), -INF)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (query, key, value)]
    of_mask = None if attn_mask is None else torch.from_numpy(attn_mask).requires_grad_(mask == "float")
    out = torch.nn.functional.scaled_dot_product_attention(
        *tensors, attn_mask=of_mask, is_causal=mask == "causal", scale=scale, enable_gqa=True)
    grad_out = normal(rng, *out.shape)
    out.backward(torch.from_numpy(grad_out))
    gradients = backward(library, (query, key, value), options | ({} if mask in (None, "causal") else
                                                                  {"attn_mask": attn_mask}), grad_out)
    for gradient, tensor in zip(gradients, tensors, strict=False):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-11, atol=1e-13)
    if mask == "float":
        np.testing.assert_allclose(gradients.attn_mask, of_mask.grad.numpy(), rtol=1e-11, atol=1e-13)


# Layers.


def random_layer(library, *args, seed=0, **options):
    """A layer whose biases are not 0."""
    layer = library.MultiHeadAttention(*args, seed=seed, **{"dtype": np.float64, **options})
    rng = np.random.default_rng(seed + 1)
    for bias in (layer.in_proj_bias, layer.out_proj_bias):
        if bias is not None:
            bias[:] = normal(rng, *bias.shape).astype(bias.dtype)
    return layer


def assert_layer_slopes(layer, inputs, options):
    """Every number of inputs and parameters, against differences of the reference's result."""
    plain = reference.MultiHeadAttention(
        layer.embed_dim, layer.num_heads, num_kv_heads=layer.num_kv_heads, head_dim=layer.head_dim,
        input_dim=layer.input_dim, kdim=layer.kdim, vdim=layer.vdim, bias=layer.in_proj_bias is not None,
        out_bias=layer.out_proj_bias is not None, dropout=layer.dropout, dtype=np.float64)
    plain.load_state_dict(layer.state_dict())
    out, pullback = layer.vjp(**inputs, **options)
    np.testing.assert_allclose(out, plain(**inputs, **options), rtol=1e-12, atol=1e-12)
    grad_out = normal(np.random.default_rng(9), *out.shape)
    gradients = pullback(grad_out)
    assert {name for name in ("query", "key", "value") if getattr(gradients, name) is not None} == inputs.keys()
    assert list(gradients.parameters) == list(layer.parameters())

    def slopes(array, call):
        result = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            def at(t, index=index):
                old = array[index]
                array[index] += t
                total = np.sum(grad_out * call())
                array[index] = old
                return total

            result[index] = slope(at)
        return result

    inputs = {name: x.copy() for name, x in inputs.items()}
    for name, gradient, array in (
            *((name, getattr(gradients, name), x) for name, x in inputs.items()),
            *((name, gradients.parameters[name], x) for name, x in plain.parameters().items())):
        assert (gradient.shape, gradient.dtype) == (array.shape, array.dtype), name
        expected = slopes(array, lambda: plain(**inputs, **options))
        assert close_to_slopes(gradient, expected, np.abs(gradient).max()).all(), name


def layer_cases():
    rng = np.random.default_rng(10)
    x, memory, values = normal(rng, 2, 3, 6), normal(rng, 2, 4, 6), normal(rng, 2, 4, 6)
    mask = np.where(rng.random((2, 2, 3, 3)) < 0.7, normal(rng, 2, 2, 3, 3), -INF)
    return {
        "self-attention": ({}, (x,), {}),
        "query, key and value the same array": ({}, (x, x, x), {}),
        "cross-attention": ({}, (x, memory), {}),
        "three inputs": ({}, (x, memory, values), {}),
        "value alone": ({}, (memory, None, values), {}),
        "kdim and vdim": ({"kdim": 5, "vdim": 2}, (x, memory[..., :5], values[..., :2]), {}),
        "vdim, key None": ({"vdim": 2}, (memory, None, values[..., :2]), {}),
        "grouped heads": ({"num_kv_heads": 1}, (x,), {"is_causal": True}),
        "without biases": ({"bias": False}, (x, memory), {}),
        "with the last bias alone": ({"bias": False, "out_bias": True}, (x,), {}),
        "without a batch axis": ({"input_dim": 6, "head_dim": 3}, (x[0], memory[0]), {"kv_lens": 3}),
        "masks": ({}, (x,), {"attn_mask": mask, "key_mask": np.array([[True, True, False], [True, True, True]])}),
        "mask of 3 axes": ({}, (x,), {"attn_mask": mask[:, 0]}),
        "all options": ({}, (x, memory), {
            "is_causal": True, "q_offset": np.array([1, 2]), "window": (3, 1), "softcap": 0.9,
            "alibi_slopes": np.array([0.5, 0.1]), "sinks": np.array([0.0, 1.0]), "kv_lens": np.array([4, 2])}),
        "dropout": ({"dropout": 0.4}, (x,), {"training": True, "seed": 3}),
        "dropout outside of training": ({"dropout": 0.4}, (x,), {}),
    }


LAYER_CASES = layer_cases()


@both
@pytest.mark.parametrize(("sizes", "inputs", "options"), LAYER_CASES.values(), ids=LAYER_CASES)
def test_layers(library, sizes, inputs, options):
    layer = random_layer(library, 4, 2, **{"input_dim": 6, **sizes})
    named = {name: x for name, x in zip(("query", "key", "value"), inputs, strict=False) if x is not None}
    assert_layer_slopes(layer, named, options)


@both
def test_what_changes_after_vjp_changes_nothing(library):
    """Parameters in place and replaced, inputs, masks; and pullback can be called again."""
    rng = np.random.default_rng(11)
    layer = random_layer(library, 6, 2, dropout=0.3)
    arrays = {"query": normal(rng, 2, 3, 6), "key": normal(rng, 2, 4, 6)}
    options = {"attn_mask": normal(rng, 3, 4), "kv_lens": np.array([4, 3]), "alibi_slopes": rng.random(2),
               "sinks": normal(rng, 2), "q_offset": np.array([0, 1])}
    grad_out = normal(rng, 2, 3, 6)

    def vjp():
        return layer.vjp(**arrays, **options, training=True, seed=5)

    def flat(gradients):
        return gradients.query, gradients.key, *gradients.parameters.values()

    expected = flat(vjp()[1](grad_out))
    out, pullback = vjp()
    for array in (*layer.parameters().values(), *arrays.values(), *options.values(), out):
        array[...] = 7
    assert_same_bits(flat(pullback(grad_out)), expected)
    layer.in_proj_weight, layer.out_proj_weight = np.zeros((18, 6)), np.zeros((6, 6))
    layer.in_proj_bias = layer.out_proj_bias = None
    layer.dropout = 0.9
    assert_same_bits(flat(pullback(grad_out)), expected)
    first = pullback(grad_out)
    for gradient in flat(first):
        gradient[...] = 0
    assert_same_bits(flat(pullback(grad_out)), expected)


@both
def test_parameters(library):
    layer = library.MultiHeadAttention(4, 2, seed=0)
    assert list(layer.parameters()) == ["in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias"]
    assert all(array is getattr(layer, name) for name, array in layer.parameters().items())
    layer = library.MultiHeadAttention(4, 2, vdim=3, bias=False, out_bias=True)
    assert list(layer.parameters()) == [
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight", "out_proj_bias"]


@both
def test_steps_against_the_gradient_train(library):
    rng = np.random.default_rng(12)
    layer, x, goal = library.MultiHeadAttention(8, 2, seed=0), normal(rng, 4, 5, 8), normal(rng, 4, 5, 8)
    x, goal, losses = x.astype(np.float32), goal.astype(np.float32), []
    for _ in range(30):
        out, pullback = layer.vjp(x, is_causal=True)
        losses.append(float(np.sum((out - goal) ** 2)))
        gradients = pullback(2 * (out - goal)).parameters
        for name, p in layer.parameters().items():
            p -= np.float32(0.003) * gradients[name]
    assert all(after < before for before, after in itertools.pairwise(losses))


@both
def test_fresh_dropout_is_the_same_in_pullback(library):
    """The result is linear in the value: what the gradient makes of it is what the result was."""
    rng = np.random.default_rng(13)
    layer = random_layer(library, 6, 2, dropout=0.5, bias=False)
    query, key, value = (normal(rng, 2, 5, 6) for _ in range(3))
    results = []
    for _ in range(2):
        out, pullback = layer.vjp(query, key, value, training=True)
        grad_out = normal(rng, 2, 5, 6)
        np.testing.assert_allclose(np.sum(grad_out * out), np.sum(pullback(grad_out).value * value), rtol=1e-10)
        results.append(out)
    assert (results[0] != results[1]).any()
    np.testing.assert_allclose(layer.vjp(query, key, value)[0], layer(query, key, value), rtol=1e-12)


@both
def test_padding_reaches_no_parameter(library):
    rng = np.random.default_rng(14)
    layer = random_layer(library, 6, 2)
    x, memory, grad_out = normal(rng, 2, 3, 6), normal(rng, 2, 4, 6), normal(rng, 2, 3, 6)
    lengths = np.array([4, 2])
    expected = layer.vjp(x, memory, kv_lens=lengths)[1](grad_out)
    memory[1, 2:] = NAN
    gradients = layer.vjp(x, memory, kv_lens=lengths)[1](grad_out)
    assert not gradients.key[1, 2:].any()
    for one, other in zip((*gradients[:2], *gradients.parameters.values()),
                          (*expected[:2], *expected.parameters.values()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@both
def test_no_rows(library):
    layer = random_layer(library, 6, 2)
    gradients = layer.vjp(np.ones((2, 0, 6)), np.ones((2, 3, 6)))[1](np.ones((2, 0, 6)))
    assert gradients.query.shape == (2, 0, 6) and gradients.key.shape == (2, 3, 6) and not gradients.key.any()
    assert not any(x.any() for x in gradients.parameters.values())
    gradients = layer.vjp(np.ones((2, 3, 6)), np.ones((2, 0, 6)))[1](np.ones((2, 3, 6)))
    assert not gradients.query.any() and (gradients.parameters["out_proj_bias"] == 6).all()


@both
@pytest.mark.parametrize("dtype", ["float16", BFLOAT16, "float32"], ids=str)
def test_layer_dtypes(library, dtype):
    """The error is at most twice that of the reference in the same dtype, plus 4 eps. And its own: q, k and v, heads,
    the gradients of both and the result are rounded to that dtype, and the longest sums, of 74 rows, in float32."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(15)
    plain = random_layer(reference, 16, 2, dtype=dtype)
    exact, layer = (module.MultiHeadAttention(16, 2, dtype=dtype)
                    for module, dtype in ((reference, np.float64), (library, dtype)))
    exact.load_state_dict(plain.state_dict())
    layer.load_state_dict(plain.state_dict())
    x, grad_out = (normal(rng, 2, 37, 16).astype(dtype) for _ in range(2))
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}[dtype.name]

    def gradients(layer):
        found = layer.vjp(x.astype(layer.dtype), is_causal=True)[1](grad_out.astype(layer.dtype))
        return {"query": found.query, **found.parameters}

    of_plain, right = gradients(plain), gradients(exact)
    for name, ours in gradients(layer).items():
        assert (ours.dtype, ours.shape) == (dtype, right[name].shape), name
        error, plain_error = (np.abs(x.astype(np.float64) - right[name]).max() for x in (ours, of_plain[name]))
        assert error <= 2 * plain_error + 4 * eps * np.abs(right[name]).max(), name
        assert plain_error <= (5 * eps + 74 * 2.0**-23) * np.abs(right[name]).max(), name


@both
def test_gradient_of_a_bias_does_not_lose_rows(library):
    """Of 100,000 rows: summed one after the other they are off by 1e-3. Of pairs of sums of up to 128, each number
    goes through 25 roundings or fewer."""
    layer = library.MultiHeadAttention(2, 1, seed=0)
    grad_out = np.full((100_000, 1, 2), 0.1, np.float32)
    gradients = layer.vjp(np.ones((100_000, 1, 2), np.float32))[1](grad_out).parameters
    np.testing.assert_allclose(gradients["out_proj_bias"], 100_000 * float(np.float32(0.1)), rtol=25 * 2.0**-24)


@both
@pytest.mark.parametrize("weight_dtype", ["float16", "bfloat16", "int8"])
def test_layers_for_inference_have_no_gradients(library, weight_dtype):
    layer = library.MultiHeadAttention(4, 2, weight_dtype=weight_dtype)
    message = re.escape(f"weight_dtype: expected None in a layer that is trained, got {weight_dtype}, where small "
                        "steps are rounded away; a layer without weight_dtype takes this one's state_dict()")
    for call in layer.parameters, lambda: layer.vjp(np.ones((2, 4), np.float32)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()
    trained = library.MultiHeadAttention(4, 2)
    trained.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(trained.in_proj_weight, layer.in_proj_weight)


@both
@pytest.mark.parametrize(("grad_out", "error", "message"), [
    (np.ones((2, 3, 4)), TypeError,
     "grad_out: expected the dtype of the layer, float32, got float64; grad_out.astype(layer.dtype) casts"),
    ([[1, 2]], TypeError,
     "grad_out: expected the dtype of the layer, float32, got int64; np.asarray(grad_out, layer.dtype) casts"),
    (np.array("text"), TypeError, "grad_out: expected the dtype of the layer, float32, got <U4"),
    (None, TypeError, "grad_out: expected an array, got None"),
    (np.ones((3, 4), np.float32), ValueError, "grad_out: expected shape (2, 3, 4), got shape (3, 4)"),
], ids=["dtype", "list", "text", "None", "shape"])
def test_grad_out_of_layers_is_checked(library, grad_out, error, message):
    _, pullback = library.MultiHeadAttention(4, 2).vjp(np.ones((2, 3, 4), np.float32))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        pullback(grad_out)
    _, pullback = library.PositionalEncoding(4).vjp(np.ones((2, 3, 4), np.float32))
    with pytest.raises(error, match=f"^{re.escape(message.replace('layer.dtype', 'layer.P.dtype'))}$"):
        pullback(grad_out)


@both
def test_vjp_checks_as_a_call_does(library):
    layer = library.MultiHeadAttention(4, 2, dropout=0.5)
    for options, message in (({"training": 1}, "training: "), ({"key_mask": np.ones((2, 3))}, "key_mask: "),
                             ({"attn_mask": np.ones((5, 5), bool)}, "attn_mask: "),
                             ({"is_causal": None}, "is_causal: "), ({"training": True, "seed": -1}, "seed: ")):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            layer.vjp(np.ones((2, 3, 4), np.float32), **options)


@both
@pytest.mark.parametrize("options", [{}, {"training": True, "seed": 4}, {"training": True, "seed": 4, "offset": 9},
                                     {"training": True, "seed": 4, "positions": np.array([2, 0, 5])}], ids=str)
def test_positional_encoding(library, options):
    rng = np.random.default_rng(16)
    layer = library.PositionalEncoding(4, 0.4, dtype=np.float64)
    x, grad_out = normal(rng, 2, 3, 4), normal(rng, 2, 3, 4)
    out, pullback = layer.vjp(x, **options)
    assert_same_bits(out, layer(x, **options))
    keep = np.ones((2, 3, 4))
    if options:
        far = np.full((2, 3, 4), 9.0)  # that no position makes 0
        keep = (layer(far, **options) != 0) / (1 - 0.4)
        assert (keep == 0).any()
    np.testing.assert_allclose(pullback(grad_out), grad_out * keep, rtol=1e-15)
    x[...] = out[...] = layer.P[...] = 7
    layer.dropout = 0.9
    assert not np.shares_memory(pullback(grad_out), grad_out)
    np.testing.assert_allclose(pullback(grad_out), grad_out * keep, rtol=1e-15)


@both
def test_positional_encoding_with_fresh_dropout(library):
    layer = library.PositionalEncoding(8, 0.5)
    x = np.full((2, 30, 8), 9, np.float32)
    out, pullback = layer.vjp(x, training=True)
    np.testing.assert_array_equal(pullback(np.ones_like(x)), np.where(out == 0, 0, 2).astype(np.float32))
    assert (out == 0).any() and (layer.vjp(x, training=True)[0] != out).any()
    bad = np.full_like(x, NAN)
    np.testing.assert_array_equal(np.isnan(pullback(bad)), out != 0)


@both
@pytest.mark.parametrize(("kdim", "vdim"), [(8, 8), (5, 3)])
def test_layers_as_torch_has_them(library, kdim, vdim):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(17)
    theirs = torch.nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, batch_first=True, dtype=torch.float64)
    ours = library.MultiHeadAttention(8, 2, kdim=kdim, vdim=vdim, dtype=np.float64)
    ours.load_state_dict({name: x.detach() for name, x in theirs.state_dict().items()})
    arrays = normal(rng, 2, 3, 8), normal(rng, 2, 4, kdim), normal(rng, 2, 4, vdim)
    key_mask = np.array([[True, True, True, False], [True, True, False, False]])
    tensors = [torch.from_numpy(x).requires_grad_() for x in arrays]
    out, _ = theirs(*tensors, key_padding_mask=torch.from_numpy(~key_mask))
    grad_out = normal(rng, 2, 3, 8)
    out.backward(torch.from_numpy(grad_out))
    gradients = ours.vjp(*arrays, key_mask=key_mask)[1](grad_out)
    of_theirs = dict(theirs.named_parameters())
    for name, gradient in gradients.parameters.items():
        np.testing.assert_allclose(gradient, of_theirs[name.replace("out_proj_", "out_proj.")].grad.numpy(),
                                   rtol=1e-10, atol=1e-12, err_msg=name)
    for gradient, tensor in zip(gradients[:3], tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-10, atol=1e-12)
