"""MultiHeadAttention, the reference and the public one: formula, masks, dropout, state dicts, errors."""

import copy
import math
import pickle
import re
import warnings

import ml_dtypes
import numpy as np
import pytest

import cattn
import cattn.reference
from cattn.reference import dropout_keep, scaled_dot_product_attention

both = pytest.mark.parametrize("library", [cattn, cattn.reference], ids=["public", "reference"])
SWAPPED_BFLOAT16 = np.dtype(ml_dtypes.bfloat16).newbyteorder()


def random_layer(library, *args, seed=0, **options):
    """A layer whose biases are not 0."""
    layer = library.MultiHeadAttention(*args, seed=seed, **{"dtype": np.float64, **options})
    rng = np.random.default_rng(seed + 1)
    for bias in (layer.in_proj_bias, layer.out_proj_bias):
        if bias is not None:
            bias[:] = rng.standard_normal(bias.shape)
    return layer


def random_input(*shape, seed=2, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def by_formula(layer, query, key, value, **options):
    """One head at a time, from the state dict."""
    state = layer.state_dict("huggingface")

    def project(x, name, head):
        rows = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        weight = state[f"{name}_proj.weight"]
        return x @ weight[rows].T + state.get(f"{name}_proj.bias", np.zeros(len(weight)))[rows]

    heads = []
    for head in range(layer.num_heads):
        kv_head = head // (layer.num_heads // layer.num_kv_heads)
        q, k, v = project(query, "q", head), project(key, "k", kv_head), project(value, "v", kv_head)
        heads.append(scaled_dot_product_attention(q, k, v, **options))
    out = np.concatenate(heads, axis=-1) @ state["o_proj.weight"].T
    return out + state.get("o_proj.bias", 0)


@both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "input_dim"), [(4, 4, 24), (6, 2, 24), (4, 1, 7), (1, 1, 5)]
)
def test_self_and_cross_attention(library, num_heads, num_kv_heads, input_dim, bias):
    layer = random_layer(library, 24, num_heads, num_kv_heads=num_kv_heads, input_dim=input_dim, bias=bias)
    x, memory, values = random_input(2, 5, input_dim), *random_input(2, 2, 9, input_dim, seed=3)
    close = {"rtol": 1e-12, "atol": 1e-12}
    causal = {"is_causal": True, "window": (2, 0)}
    np.testing.assert_allclose(layer(x, **causal), by_formula(layer, x, x, x, **causal), **close)
    np.testing.assert_allclose(layer(x, x, x), layer(x), **close)
    np.testing.assert_allclose(layer(x, x.copy()), layer(x), **close)
    np.testing.assert_allclose(layer(x, memory), by_formula(layer, x, memory, memory), **close)
    np.testing.assert_allclose(layer(x, memory, values), by_formula(layer, x, memory, values), **close)
    expected = by_formula(layer, memory, memory, values)
    np.testing.assert_allclose(layer(memory, value=values), expected, **close)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_public_as_exact_as_reference(dtype, num_kv_heads):
    """The error is at most twice that of the reference in the same dtype, plus 4 eps."""
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    plain = random_layer(cattn.reference, 64, 4, num_kv_heads=num_kv_heads, dtype=dtype)
    fast = cattn.MultiHeadAttention(64, 4, num_kv_heads=num_kv_heads, dtype=dtype)
    fast.load_state_dict(plain.state_dict())
    exact = cattn.reference.MultiHeadAttention(64, 4, num_kv_heads=num_kv_heads, dtype=np.longdouble)
    exact.load_state_dict(plain.state_dict())
    x = random_input(2, 37, 64, dtype=dtype)
    options = {"is_causal": True, "kv_lens": np.array([37, 20]), "return_weights": True}
    expected = exact(x.astype(np.longdouble), **options)
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[dtype.name]
    for ours, theirs, true in zip(fast(x, **options), plain(x, **options), expected, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        error, plain_error = (np.abs(result.astype(np.longdouble) - true).max() for result in (ours, theirs))
        assert error <= 2 * plain_error + 4 * eps * np.abs(true).max()


@both
def test_without_a_batch_axis(library):
    layer = random_layer(library, 12, 3)
    x, memory = random_input(5, 12), random_input(7, 12, seed=3)
    mask = np.random.default_rng(4).random((5, 7)) < 0.6
    options = {"attn_mask": mask, "is_causal": True, "return_weights": True}
    out, weights = layer(x, memory, kv_lens=6, q_offset=1, **options)
    expected, expected_weights = layer(
        x[None], memory[None], kv_lens=np.array([6]), q_offset=np.array([1]), **options
    )
    assert out.shape == (5, 12) and weights.shape == (3, 5, 7)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(weights, expected_weights[0])
    np.testing.assert_allclose(layer(x), layer(x[None])[0], rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("shape", [
    (5, 7), (1, 7), (5, 1), (2, 5, 7), (1, 5, 7), (2, 1, 7), (2, 3, 5, 7), (2, 1, 1, 7), (1, 3, 5, 1)
], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(library, shape, kind):
    layer = random_layer(library, 12, 3)
    x, memory = random_input(2, 5, 12), random_input(2, 7, 12, seed=3)
    mask = np.random.default_rng(4).random(shape) < 0.6
    full = np.broadcast_to(mask[:, None] if mask.ndim == 3 else mask, (2, 3, 5, 7))
    if kind == "float":
        mask = np.where(mask, 0.0, -np.inf)
    _, weights = layer(x, memory, attn_mask=mask, return_weights=True)
    np.testing.assert_array_equal(weights > 0, full)


@both
def test_query_that_sees_nothing_gives_the_bias(library):
    layer = random_layer(library, 12, 3)
    x = random_input(2, 5, 12)
    out, weights = layer(x, attn_mask=np.zeros((5, 5), bool), return_weights=True)
    np.testing.assert_array_equal(out, np.broadcast_to(layer.out_proj_bias, out.shape))
    assert not weights.any()


@both
def test_padding_is_not_read(library):
    layer = random_layer(library, 12, 3)
    x = random_input(2, 6, 12)
    lengths = np.array([4, 6])
    expected = layer(x, kv_lens=lengths)
    x[0, 4:] = math.nan
    out = layer(x, kv_lens=lengths)
    np.testing.assert_array_equal(out[0, :4], expected[0, :4])
    np.testing.assert_array_equal(out[1], expected[1])
    assert np.isnan(out[0, 4:]).all()


@both
def test_decoding_step_by_step(library):
    layer = random_layer(library, 12, 3, num_kv_heads=1)
    x = random_input(2, 6, 12)
    whole = layer(x, is_causal=True)
    for step in range(6):
        row = layer(x[:, step : step + 1], x[:, : step + 1], is_causal=True, q_offset=step)
        np.testing.assert_allclose(row[:, 0], whole[:, step], rtol=1e-12, atol=1e-12)


@both
def test_options_reach_the_attention(library):
    layer = random_layer(library, 12, 3)
    x = random_input(2, 6, 12)
    q, k, _ = np.split(x @ layer.in_proj_weight.T + layer.in_proj_bias, 3, axis=-1)
    q, k = (y.reshape(2, 6, 3, 4).swapaxes(1, 2) for y in (q, k))
    options = {"softcap": 0.5, "alibi_slopes": np.array([0.5, 0.1, 0.0]), "sinks": np.array([0.0, 1.0, -1.0]),
               "window": (3, 1), "q_offset": np.array([0, 2]), "kv_lens": np.array([6, 3])}
    _, expected = scaled_dot_product_attention(q, k, k, **options, return_weights=True)
    _, weights = layer(x, **options, return_weights=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=1e-14)


@both
@pytest.mark.parametrize("shape", [(0, 3, 12), (2, 0, 12), (0, 12)], ids=str)
def test_empty(library, shape):
    layer = random_layer(library, 12, 3)
    assert layer(np.empty(shape)).shape == shape
    no_keys = layer(np.ones((*shape[:-2], 4, 12)), np.ones((*shape[:-2], 0, 12)))
    np.testing.assert_array_equal(no_keys, np.broadcast_to(layer.out_proj_bias, no_keys.shape))


@both
def test_strided_input_and_nothing_written(library):
    layer = random_layer(library, 12, 3)
    x = random_input(5, 2, 24).swapaxes(0, 1)[..., ::2]
    x.flags.writeable = False
    np.testing.assert_allclose(layer(x), layer(np.ascontiguousarray(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seq_len", [1, 3, 70])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_same_bits_with_weights_any_number_of_threads_and_any_batch(isa, dtype, seq_len):
    """A batch row alone, of a single token too, and beside others."""
    layer = random_layer(cattn, 384, 12, dtype=dtype)
    x = random_input(16, seq_len, 384, dtype=dtype)
    out = layer(x, is_causal=True, num_threads=1)
    np.testing.assert_array_equal(layer(x, is_causal=True, return_weights=True, num_threads=2)[0], out)
    np.testing.assert_array_equal(layer(x, is_causal=True, num_threads=3), out)
    for i in range(15):
        np.testing.assert_array_equal(layer(x[i : i + 1], is_causal=True), out[i : i + 1])
    np.testing.assert_array_equal(layer(x[3:9], is_causal=True), out[3:9])


@both
def test_dropout_only_when_training(library):
    layer = random_layer(library, 12, 3, dropout=0.4)
    x = random_input(2, 8, 12)
    out, weights = layer(x, return_weights=True)
    np.testing.assert_array_equal(layer(x, seed=7), out)
    dropped_out, dropped = layer(x, training=True, seed=7, return_weights=True)
    keep = dropout_keep(7, 0.4, 2, 3, 8, 8)
    np.testing.assert_allclose(dropped, np.where(keep, weights / 0.6, 0), rtol=1e-12)
    np.testing.assert_array_equal(layer(x, training=True, seed=7), dropped_out)
    assert (layer(x, training=True) != layer(x, training=True)).any()


# Parameters.


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_initialisation(library, dtype):
    layer = library.MultiHeadAttention(64, 8, num_kv_heads=2, input_dim=40, dtype=dtype, seed=3)
    for weight, shape in ((layer.in_proj_weight, (96, 40)), (layer.out_proj_weight, (64, 64))):
        assert weight.shape == shape and weight.dtype == dtype
        bound = math.sqrt(6 / sum(shape))
        assert 0.98 * bound < np.abs(weight).max() <= bound * 1.001
        assert abs(weight.astype(np.float64).mean()) < 5 * bound / math.sqrt(3 * weight.size)
    assert not layer.in_proj_bias.any() and not layer.out_proj_bias.any()
    assert layer.in_proj_bias.dtype == layer.out_proj_bias.dtype == dtype
    without = library.MultiHeadAttention(64, 8, bias=False)
    assert without.in_proj_bias is None and without.out_proj_bias is None


@both
def test_seed(library):
    seeds = (5, 5, np.random.default_rng(5), 6, None)
    layers = [library.MultiHeadAttention(8, 2, seed=seed) for seed in seeds]
    same = [np.array_equal(layers[0].in_proj_weight, layer.in_proj_weight) for layer in layers]
    assert same == [True, True, True, False, False]


LAYOUTS = {
    "torch": ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"],
    "torch_split": ["q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight",
                    "out_proj.bias"],
    "tutorial": ["qkv_proj.weight", "qkv_proj.bias", "o_proj.weight", "o_proj.bias"],
    "d2l": [f"W_{x}.{kind}" for x in "qkvo" for kind in ("weight", "bias")],
    "huggingface": [f"{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")],
    "bart": [f"{x}_proj.{kind}" for x in ("q", "k", "v", "out") for kind in ("weight", "bias")],
    "bert": [f"{x}.{kind}" for x in ("self.query", "self.key", "self.value", "output.dense")
             for kind in ("weight", "bias")],
    "keras": [f"{x}/{kind}" for x in ("query", "key", "value", "attention_output") for kind in ("kernel", "bias")],
}


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_state_dict_round_trip(library, layout, bias, num_kv_heads):
    if layout == "tutorial" and num_kv_heads != 4:
        return
    options = {"num_kv_heads": num_kv_heads, "input_dim": 5, "bias": bias}
    layer, other = random_layer(library, 12, 4, **options), random_layer(library, 12, 4, **options, seed=9)
    state = layer.state_dict(layout)
    assert sorted(state) == sorted(key for key in LAYOUTS[layout] if bias or not key.endswith("bias"))
    x = random_input(2, 3, 5)
    expected = layer(x)
    for given in (layout, None):
        fresh = random_layer(library, 12, 4, **options, seed=9)
        fresh.load_state_dict(state, given)
        np.testing.assert_array_equal(fresh(x), expected)
    for array in state.values():  # copies
        array[...] = 0
    np.testing.assert_array_equal(layer(x), expected)
    assert (other(x) != expected).any()


@both
def test_rows_of_the_layouts(library):
    layer = library.MultiHeadAttention(4, 2, input_dim=1)  # head_dim 2
    weight = np.arange(12.0, dtype=np.float32)[:, None]  # q 0-3, k 4-7, v 8-11
    layer.in_proj_weight[:] = weight
    states = [layer.state_dict(layout) for layout in LAYOUTS]
    rows = {name: array.ravel().tolist() for state in states for name, array in state.items()}
    assert rows["in_proj_weight"] == list(range(12))
    assert rows["qkv_proj.weight"] == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    for prefix in ("W_{}.weight", "{}_proj.weight", "{}_proj_weight"):
        assert [rows[prefix.format(x)][0] for x in "qkv"] == [0, 4, 8]
    layer = library.MultiHeadAttention(4, 2, num_kv_heads=1)
    shapes = {name: array.shape for name, array in layer.state_dict("huggingface").items()}
    assert (shapes["q_proj.weight"], shapes["k_proj.weight"], shapes["v_proj.bias"]) == ((4, 4), (2, 4), (2,))


@both
def test_state_is_cast(library):
    layer = library.MultiHeadAttention(4, 2, dtype=np.float32)
    layer.load_state_dict(library.MultiHeadAttention(4, 2, dtype=np.float64, seed=1).state_dict())
    expected = library.MultiHeadAttention(4, 2, dtype=np.float32, seed=1)
    np.testing.assert_array_equal(layer.in_proj_weight, expected.in_proj_weight)
    assert layer.in_proj_weight.dtype == np.float32


@both
@pytest.mark.parametrize("bias", [True, False])
def test_torch(library, bias):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(24, 4, bias=bias, batch_first=True, dtype=torch.float64).eval()
    if bias:
        torch.nn.init.normal_(theirs.in_proj_bias)
        torch.nn.init.normal_(theirs.out_proj.bias)
    ours = library.MultiHeadAttention(24, 4, bias=bias, dtype=np.float64)
    ours.load_state_dict(theirs.state_dict())
    x, memory = random_input(2, 5, 24), random_input(2, 7, 24, seed=3)
    attend = (np.random.default_rng(4).random((5, 7)) < 0.6) | (np.arange(7) == 0)
    with torch.no_grad():
        expected, weights = theirs(
            *(torch.from_numpy(y) for y in (x, memory, memory)), attn_mask=torch.from_numpy(~attend),
            average_attn_weights=False,
        )
    out, our_weights = ours(x, memory, attn_mask=attend, return_weights=True)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(our_weights, weights.numpy(), rtol=1e-12, atol=1e-14)

    back = torch.nn.MultiheadAttention(24, 4, bias=bias, dtype=torch.float64)
    back.load_state_dict({key: torch.from_numpy(array) for key, array in ours.state_dict().items()})
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)


@both
def test_torch_with_separate_weights(library):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(12, 3, kdim=5, vdim=5)
    layer = library.MultiHeadAttention(12, 3)
    message = r"state: expected shape \(12, 12\) for 'k_proj_weight', got shape \(12, 5\)"
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(theirs.state_dict())
    names = set(theirs.state_dict())
    assert set(layer.state_dict("torch_split")) == names


# Bad input.


BAD_LAYERS = {
    "indivisible embed_dim": ((10, 3), {}, ValueError, "num_heads: expected a divisor of embed_dim = 10, got 3"),
    "indivisible num_heads": (
        (12, 6), {"num_kv_heads": 4}, ValueError, "num_kv_heads: expected a divisor of num_heads = 6, got 4",
    ),
    "more KV heads than heads": (
        (12, 6), {"num_kv_heads": 12}, ValueError, "num_kv_heads: expected a divisor of num_heads = 6, got 12",
    ),
    "embed_dim of 0": ((0, 1), {}, ValueError, "embed_dim: expected an int >= 1, got 0"),
    "num_heads of 0": ((12, 0), {}, ValueError, "num_heads: expected an int >= 1, got 0"),
    "num_kv_heads of 0": ((12, 3), {"num_kv_heads": 0}, ValueError, "num_kv_heads: expected an int >= 1, got 0"),
    "negative input_dim": ((12, 3), {"input_dim": -1}, ValueError, "input_dim: expected an int >= 1, got -1"),
    "float embed_dim": ((12.0, 3), {}, TypeError, r"embed_dim: expected an int, got 12\.0"),
    "text as num_heads": ((12, "3"), {}, TypeError, "num_heads: expected an int, got '3'"),
    "huge embed_dim": (
        (2**30, 1), {}, ValueError, r"embed_dim: expected at most 2\*\*58 elements in a weight, got in_proj_weight of ",
    ),
    "huge input_dim": (
        (2**10, 1), {"input_dim": 2**60}, ValueError, r"embed_dim: expected at most 2\*\*58 elements in a weight, got ",
    ),
    "dropout of 1": ((12, 3), {"dropout": 1.0}, ValueError, r"dropout: expected a float in \[0, 1\), got 1\.0"),
    "negative dropout": ((12, 3), {"dropout": -0.1}, ValueError, r"dropout: expected a float in \[0, 1\), got -0\.1"),
    "dropout of NaN": ((12, 3), {"dropout": math.nan}, ValueError, r"dropout: expected a float in \[0, 1\), got nan"),
    "no dropout": ((12, 3), {"dropout": None}, TypeError, r"dropout: expected a float in \[0, 1\), got None"),
    "int dtype": ((12, 3), {"dtype": np.int64}, TypeError, "dtype: expected .*float.*, got <class 'numpy.int64'>"),
    "unknown dtype": ((12, 3), {"dtype": "float23"}, TypeError, "dtype: expected .*float.*, got 'float23'"),
    "no dtype": ((12, 3), {"dtype": None}, TypeError, "dtype: expected .*float.*, got None"),
    "swapped dtype": ((12, 3), {"dtype": np.dtype(">f4")}, TypeError, r"dtype: expected .*float.*, got dtype\('>f4'\)"),
    "negative seed": ((12, 3), {"seed": -1}, ValueError, "seed: expected an int >= 0 or a Generator, got -1"),
    "text as seed": ((12, 3), {"seed": "x"}, TypeError, "seed: expected an int >= 0 or a Generator, got 'x'"),
    **{f"weights of {dtype}": ((12, 3), {"weight_dtype": dtype}, TypeError, "weight_dtype: expected None, float16, "
                               f"bfloat16 or int8, got {re.escape(repr(dtype))}$")
       for dtype in ("int4", "float32", np.float32, np.uint8, 8)},
}


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_bad_layer(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.MultiHeadAttention(*args, **options)


def test_public_layer_has_no_long_double():
    if np.dtype(np.longdouble) != np.float64:
        with pytest.raises(TypeError, match=r"^dtype: expected one of float16, bfloat16, .*, got"):
            cattn.MultiHeadAttention(12, 3, dtype=np.longdouble)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


BAD_CALLS = {
    "query of 1 axis": (
        (ones(12),), {}, ValueError,
        r"query: expected \(batch, seq_len_q, 12\) or \(seq_len_q, 12\), got shape \(12,\)",
    ),
    "query of 4 axes": ((ones(1, 2, 3, 12),), {}, ValueError, r"query: expected .*, got shape \(1, 2, 3, 12\)"),
    "query of another width": ((ones(2, 3, 11),), {}, ValueError, r"query: expected .*, got shape \(2, 3, 11\)"),
    "key of another batch": (
        (ones(2, 3, 12), ones(3, 3, 12)), {}, ValueError,
        r"key: expected \(2, seq_len_kv, 12\), got shape \(3, 3, 12\)",
    ),
    "key without batch": (
        (ones(2, 3, 12), ones(3, 12)), {}, ValueError,
        r"key: expected \(2, seq_len_kv, 12\), got shape \(3, 12\)",
    ),
    "key of another width": (
        (ones(3, 12), ones(3, 8)), {}, ValueError, r"key: expected \(seq_len_kv, 12\), got shape \(3, 8\)",
    ),
    "value of another length": (
        (ones(2, 3, 12), ones(2, 4, 12), ones(2, 5, 12)), {}, ValueError,
        r"value: expected the shape of key, \(2, 4, 12\), got shape \(2, 5, 12\)",
    ),
    "float64 query": (
        (ones(2, 3, 12, dtype=np.float64),), {}, TypeError,
        "query: expected the dtype of the layer, float32, got float64",
    ),
    "int query": ((ones(2, 3, 12, dtype=int),), {}, TypeError, "query: expected .*, got int64"),
    "object query": ((ones(2, 3, 12, dtype=object),), {}, TypeError, "query: expected .*, got object"),
    "float16 key": ((ones(2, 3, 12), ones(3, 12, dtype=np.float16)), {}, TypeError, "key: expected .*, got float16"),
    "complex value": (
        (ones(2, 3, 12), ones(2, 3, 12), ones(2, 3, 12, dtype=complex)), {}, TypeError,
        "value: expected .*, got complex128",
    ),
    "transposed mask": (
        (ones(2, 4, 12), ones(2, 5, 12)), {"attn_mask": np.ones((5, 4), bool)}, ValueError,
        r"attn_mask: expected \(4, 5\), \(2, 4, 5\) or \(2, 3, 4, 5\) \(axes of 1 broadcast\), got shape",
    ),
    "mask of 1 axis": (
        (ones(2, 4, 12),), {"attn_mask": np.ones(4, bool)}, ValueError,
        r"attn_mask: expected .*, got shape \(4,\)",
    ),
    "mask of another batch": (
        (ones(2, 4, 12),), {"attn_mask": np.ones((3, 4, 4), bool)}, ValueError,
        r"attn_mask: expected .*, got shape \(3, 4, 4\)",
    ),
    "mask of 5 axes": (
        (ones(2, 4, 12),), {"attn_mask": np.ones((1, 2, 3, 4, 4), bool)}, ValueError,
        r"attn_mask: expected .*, got shape \(1, 2, 3, 4, 4\)",
    ),
    "mask of another batch without batch": (
        (ones(4, 12),), {"attn_mask": np.ones((3, 4, 4), bool)}, ValueError,
        r"attn_mask: expected \(4, 4\), \(1, 4, 4\) or \(1, 3, 4, 4\) \(axes of 1 broadcast\), got shape",
    ),
}


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.MultiHeadAttention(12, 3)(*args, **options)


RULE = "expected (batch, seq_len_q, 12) or (seq_len_q, 12)"
MASKS = "attn_mask: expected (4, 5), (2, 4, 5) or (2, 3, 4, 5) (axes of 1 broadcast)"


WHOLE_TEXTS = {
    "float64 query": (
        (ones(2, 3, 12, dtype=np.float64),), None, TypeError,
        "query: expected the dtype of the layer, float32, got float64; query.astype(layer.dtype) casts",
    ),
    "query of lists": (
        (ones(3, 12).tolist(),), None, TypeError,
        "query: expected the dtype of the layer, float32, got float64; np.asarray(query, layer.dtype) casts",
    ),
    "int query": (
        (ones(3, 12, dtype=int),), None, TypeError,
        "query: expected the dtype of the layer, float32, got int64; query.astype(layer.dtype) casts",
    ),
    "token numbers": (
        (np.arange(6).reshape(2, 3),), None, TypeError,
        "query: expected the dtype of the layer, float32, got int64; token numbers are looked up in an embedding first",
    ),
    "complex query": (
        (ones(3, 12, dtype=complex),), None, TypeError,
        "query: expected the dtype of the layer, float32, got complex128",
    ),
    "float16 key": (
        (ones(2, 3, 12), ones(2, 5, 12, dtype=np.float16)), None, TypeError,
        "key: expected the dtype of the layer, float32, got float16; key.astype(layer.dtype) casts",
    ),
    "value of lists": (
        (ones(3, 12), ones(5, 12), ones(5, 12).tolist()), None, TypeError,
        "value: expected the dtype of the layer, float32, got float64; np.asarray(value, layer.dtype) casts",
    ),
    "no query": ((None,), None, TypeError, "query: expected an array, got None"),
    "one query": (
        (ones(12),), None, ValueError, f"query: {RULE}, got shape (12,); for one query: np.atleast_2d(query)",
    ),
    "tokens": (
        ([["I", "love"]],), None, TypeError,
        "query: expected the dtype of the layer, float32, got <U4; tokens are looked up in an embedding first",
    ),
    "query as wide as another layer's": (
        (ones(2, 3, 16),), None, ValueError,
        f"query: {RULE}, got shape (2, 3, 16); a layer with input_dim=16 takes it",
    ),
    "empty query": ((ones(2, 3, 0),), None, ValueError, f"query: {RULE}, got shape (2, 3, 0)"),
    "query with heads": (
        (ones(2, 3, 5, 4),), None, ValueError,
        f"query: {RULE}, got shape (2, 3, 5, 4); the layer makes the heads itself",
    ),
    "query of 4 axes": ((ones(2, 3, 5, 12),), None, ValueError, f"query: {RULE}, got shape (2, 3, 5, 12)"),
    "padding mask": (
        (ones(2, 4, 12), ones(2, 5, 12)), np.ones((2, 5), bool), ValueError,
        f"{MASKS}, got shape (2, 5); for a padding mask: key_mask, or kv_lens",
    ),
    "padding mask of 1 axis": (
        (ones(2, 4, 12), ones(2, 5, 12)), np.ones(5, bool), ValueError,
        f"{MASKS}, got shape (5,); for a padding mask: key_mask, or kv_lens",
    ),
    "mask per batch row and head": (
        (ones(2, 4, 12), ones(2, 5, 12)), np.ones((6, 4, 5), bool), ValueError,
        f"{MASKS}, got shape (6, 4, 5); for one mask per batch row and head: mask.reshape(2, 3, 4, 5)",
    ),
    "transposed mask": (
        (ones(2, 4, 12), ones(2, 5, 12)), np.ones((5, 4), bool), ValueError, f"{MASKS}, got shape (5, 4)",
    ),
}


@both
@pytest.mark.parametrize(("args", "attn_mask", "error", "message"), WHOLE_TEXTS.values(), ids=WHOLE_TEXTS)
def test_whole_text_of_bad_calls(library, args, attn_mask, error, message):
    with pytest.raises(error) as raised:
        library.MultiHeadAttention(12, 3)(*args, attn_mask=attn_mask)
    assert str(raised.value) == message


@both
def test_cures(library):
    """What the messages above name is taken."""
    layer = library.MultiHeadAttention(12, 3, seed=0)
    x, memory = random_input(2, 4, 12, dtype=np.float32), random_input(2, 5, 12, dtype=np.float32)
    mask = np.arange(5) < np.array([[2], [5]])
    expected = layer(x, memory, kv_lens=mask.sum(-1))
    np.testing.assert_array_equal(layer(x, memory, attn_mask=mask[:, None, None, :]), expected)
    by_head = np.repeat(mask[:, None, :], 12, axis=1).reshape(6, 4, 5)
    np.testing.assert_array_equal(layer(x, memory, attn_mask=by_head.reshape(2, 3, 4, 5)), expected)
    np.testing.assert_array_equal(layer(x[:1], memory[:1], attn_mask=mask[0][None, :]), expected[:1])
    np.testing.assert_array_equal(layer(x.astype(np.float64).astype(layer.dtype)), layer(x))
    np.testing.assert_array_equal(layer(np.asarray(x.tolist(), layer.dtype)), layer(x))


class TorchDtype:
    __module__ = "torch"

    def __repr__(self):
        return "torch.float32"


@both
def test_other_cures(library):
    with pytest.raises(TypeError) as raised:
        library.MultiHeadAttention(12, 3, dtype=TorchDtype())
    assert re.fullmatch("dtype: expected .*float.*, got torch.float32; as text: 'float32'", str(raised.value))
    layer = library.MultiHeadAttention(12, 3)
    with pytest.raises(TypeError) as raised:
        layer.load_state_dict(layer)
    assert str(raised.value) == (
        "state: expected a mapping of names to arrays, got MultiHeadAttention; pass its .state_dict()")
    layer.load_state_dict(layer.state_dict())


@both
def test_states_that_numpy_does_not_read(library):
    class Parameter:
        __module__ = "torch.nn.parameter"
        requires_grad, device, dtype = True, "cuda:0", "torch.bfloat16"

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("torch's words")

    layer = library.MultiHeadAttention(12, 3)
    with pytest.raises(TypeError) as raised:
        layer.load_state_dict(layer.state_dict() | {"out_proj.bias": Parameter()})
    assert str(raised.value) == (
        "state: expected an array for 'out_proj.bias', got a torch tensor that requires grad and is on cuda:0 and is "
        "bfloat16, which NumPy has not; pass its .detach().cpu().float(), or with ml_dtypes "
        ".detach().cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)")
    with pytest.raises(TypeError) as raised:
        layer.load_state_dict(layer.state_dict() | {"out_proj.bias": None})
    assert str(raised.value) == "state: expected an array for 'out_proj.bias', got None"


BAD_OPTIONS = {
    "int mask": ({"attn_mask": np.ones((4, 4), int)}, TypeError, "attn_mask"),
    "kv_lens beyond the keys": ({"kv_lens": np.array([4, 5])}, ValueError, "kv_lens"),
    "too many kv_lens": ({"kv_lens": np.array([4, 4, 4])}, ValueError, "kv_lens"),
    "too few offsets": ({"q_offset": np.array([1])}, ValueError, "q_offset"),
    "window of one number": ({"window": 3}, (ValueError, TypeError), "window"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "too many slopes": ({"alibi_slopes": np.ones(4, np.float32)}, ValueError, "alibi_slopes"),
    "too many sinks": ({"sinks": np.ones(4, np.float32)}, ValueError, "sinks"),
    "negative seed": ({"seed": -1, "training": True}, ValueError, "seed"),
    "no threads": ({"num_threads": 0}, ValueError, "num_threads"),
}


@pytest.mark.parametrize(("options", "error", "name"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_what_the_attention_checks(options, error, name):
    layer = cattn.MultiHeadAttention(12, 3, dropout=0.5)
    with pytest.raises(error, match=f"^{name}: expected .*, got "):
        layer(ones(2, 4, 12), **options)


BAD_STATES = {
    "missing": (
        {"in_proj_bias": None}, None, ValueError,
        "state: expected the keys of a layout, 'torch' is the closest: missing 'in_proj_bias'; a layer with bias=False "
        "and out_bias=True takes it$",
    ),
    "bias_k": ({"bias_k": ones(1, 1, 12)}, None, ValueError, "state: expected no 'bias_k' and 'bias_v'"),
    "another key": (
        {"in_proj_bias": None, "bias": ones(36)}, "torch", ValueError,
        r"state: expected the keys of layout 'torch': missing 'in_proj_bias', unknown 'bias'$",
    ),
    "another layout": (
        {}, "d2l", ValueError,
        "state: expected the keys of layout 'd2l': missing 'W_q.weight', missing 'W_q.bias', missing 'W_k.weight' and "
        "9 more$",
    ),
    "unknown layout": ({}, "flax", ValueError, r"layout: expected one of \['torch', .*\], got 'flax'"),
    "list as layout": ({}, ["torch"], ValueError, r"layout: expected one of \['torch', .*\], got \['torch'\]"),
    "bias of another length": (
        {"out_proj.bias": ones(13)}, None, ValueError,
        r"state: expected shape \(12,\) for 'out_proj.bias', got shape \(13,\)",
    ),
    "weight of another width": (
        {"in_proj_weight": ones(36, 11)}, None, ValueError,
        r"state: expected shape \(36, 12\) for 'in_proj_weight', got shape \(36, 11\)",
    ),
    "int weight": (
        {"out_proj.weight": ones(12, 12, dtype=int)}, None, TypeError,
        "state: expected a float array for 'out_proj.weight', got dtype int64",
    ),
    "swapped bfloat16": (
        {"out_proj.weight": np.ones((12, 12), SWAPPED_BFLOAT16)}, None, TypeError,
        f"state: expected a float array for 'out_proj.weight', got dtype {SWAPPED_BFLOAT16}",
    ),
}


@both
@pytest.mark.parametrize(("change", "layout", "error", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_bad_state_changes_nothing(library, change, layout, error, message):
    layer = random_layer(library, 12, 3, dtype=np.float32)
    before = layer.state_dict()
    state = library.MultiHeadAttention(12, 3, seed=8).state_dict() | change
    state = {key: array for key, array in state.items() if array is not None}
    with pytest.raises(error, match=f"^{message}"):
        layer.load_state_dict(state, layout)
    for key, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[key])


@both
@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask"])
def test_rows_of_different_lengths(library, which):
    layer = library.MultiHeadAttention(12, 3)
    with pytest.raises(ValueError, match=f"^{which}: expected an array, got a list that makes none: "):
        layer(**{"query": ones(4, 12), which: [[1.0], [2.0, 3.0]]})
    with pytest.raises(ValueError, match=r"^state: expected an array for 'out_proj.bias', got a list that makes "):
        layer.load_state_dict(layer.state_dict() | {"out_proj.bias": [[1.0], [2.0, 3.0]]})


@both
def test_other_bad_states(library):
    layer = library.MultiHeadAttention(12, 4, num_kv_heads=2)
    message = "^layout: expected num_kv_heads = num_heads = 4 for 'tutorial', got num_kv_heads = 2"
    with pytest.raises(ValueError, match=message):
        layer.state_dict("tutorial")
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(library.MultiHeadAttention(12, 4).state_dict("tutorial"))
    with pytest.raises(ValueError, match=r"^layout: expected one of \[.*\], got None"):
        layer.state_dict(None)
    with pytest.raises(TypeError, match=r"^state: expected a mapping of names to arrays, got list"):
        layer.load_state_dict([ones(36, 12)])
    with pytest.raises(ValueError, match=r"; of 'torch': missing 'in_proj_weight', missing 'in_proj_bias', "):
        layer.load_state_dict({})
    with pytest.raises(ValueError, match=r"unknown 'q_proj.bias', .*; a layer with bias=True and out_bias=True ta"):
        library.MultiHeadAttention(12, 4, bias=False).load_state_dict(layer.state_dict("huggingface"))


# Assigned parameters, and other attributes.

PARAMETERS = {"in_proj_weight": (36, 12), "in_proj_bias": (36,), "out_proj_weight": (12, 12), "out_proj_bias": (12,)}


class Named(np.ndarray):
    pass


class Lying(np.ndarray):
    shape = (36, 12)


def unaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)
    array = np.ndarray(x.shape, x.dtype, memory, 1)
    array[...] = x
    return array


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


FORMS = {  # the same numbers otherwise
    "plain": lambda x: x,
    "subclass": lambda x: x.view(Named),
    "row of a larger array": lambda x: np.stack([x, x])[1],
    "float64": lambda x: x.astype(np.float64),
    "longdouble": lambda x: x.astype(np.longdouble),
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder("S")),
    "list": lambda x: x.tolist(),
    "Fortran": np.asfortranarray,
    "every second column": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "negative strides": lambda x: np.flip(np.flip(x).copy()),
    "unaligned": unaligned,
    "read-only": read_only,
}


@both
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_assigned_parameters(library, form, dtype):
    """Cast where need be, and then as if they had been there from the start; in memory of their own, but for arrays
    that can be used and trained in place."""
    if form == "other byte order" and dtype == ml_dtypes.bfloat16:
        return  # read wrong by ml_dtypes, and refused
    source, layer = (random_layer(library, 12, 3, dtype=dtype, seed=seed) for seed in (0, 5))
    x = random_input(2, 5, 12, dtype=dtype)
    for name in PARAMETERS:
        given = FORMS[form](getattr(source, name).copy())
        setattr(layer, name, given)
        held = getattr(layer, name)
        assert held is getattr(layer, name) and type(held) is np.ndarray
        assert held.dtype == dtype and held.flags.carray
        in_place = form != "list" and given.dtype == dtype and given.flags.carray
        assert (form != "list" and np.shares_memory(held, given)) == in_place
    np.testing.assert_array_equal(layer(x), source(x))


@both
def test_integers_as_parameters(library):
    layer = library.MultiHeadAttention(12, 3)
    layer.out_proj_bias = list(range(12))
    layer.out_proj_weight = np.eye(12, dtype=np.int8)
    np.testing.assert_array_equal(layer.out_proj_bias, np.arange(12, dtype=np.float32))
    assert layer.out_proj_bias.dtype == layer.out_proj_weight.dtype == np.float32


BAD_PARAMETERS = {
    "in_proj_weight too short": (
        "in_proj_weight", ones(12, 12), ValueError, r"expected shape \(36, 12\), got shape \(12, 12\)$",
    ),
    "in_proj_weight too narrow": (
        "in_proj_weight", ones(36, 6), ValueError, r"expected shape \(36, 12\), got shape \(36, 6\)$",
    ),
    "in_proj_weight transposed": (
        "in_proj_weight", ones(12, 36), ValueError, r"expected shape \(36, 12\), got shape \(12, 36\)$",
    ),
    "in_proj_weight that lies": (
        "in_proj_weight", ones(1, 1).view(Lying), ValueError, r"expected shape \(36, 12\), got shape \(1, 1\)$",
    ),
    "out_proj_weight of another shape": (
        "out_proj_weight", ones(2048, 1), ValueError, r"expected shape \(12, 12\), got shape \(2048, 1\)$",
    ),
    "out_proj_weight too short": (
        "out_proj_weight", ones(6, 12), ValueError, r"expected shape \(12, 12\), got shape \(6, 12\)$",
    ),
    "empty out_proj_weight": (
        "out_proj_weight", ones(0, 12), ValueError, r"expected shape \(12, 12\), got shape \(0, 12\)$",
    ),
    "flat out_proj_weight": (
        "out_proj_weight", ones(144), ValueError, r"expected shape \(12, 12\), got shape \(144,\)$",
    ),
    "number as out_proj_weight": ("out_proj_weight", 1.0, ValueError, r"expected shape \(12, 12\), got shape \(\)$"),
    "no out_proj_weight": ("out_proj_weight", None, TypeError, "expected an array, got None$"),
    "in_proj_bias of 1": ("in_proj_bias", ones(1), ValueError, r"expected shape \(36,\), got shape \(1,\)$"),
    "short in_proj_bias": ("in_proj_bias", ones(7), ValueError, r"expected shape \(36,\), got shape \(7,\)$"),
    "column as in_proj_bias": (
        "in_proj_bias", ones(36, 1), ValueError, r"expected shape \(36,\), got shape \(36, 1\)$",
    ),
    "out_proj_bias of 1": ("out_proj_bias", ones(1), ValueError, r"expected shape \(12,\), got shape \(1,\)$"),
    "empty out_proj_bias": ("out_proj_bias", [], ValueError, r"expected shape \(12,\), got shape \(0,\)$"),
    "complex out_proj_bias": (
        "out_proj_bias", ones(12, dtype=complex), TypeError, "expected a float or int array, got dtype complex128$",
    ),
    "object out_proj_bias": (
        "out_proj_bias", ones(12, dtype=object), TypeError, "expected a float or int array, got dtype object$",
    ),
    "bool out_proj_bias": (
        "out_proj_bias", ones(12, dtype=bool), TypeError, "expected a float or int array, got dtype bool$",
    ),
    "swapped out_proj_bias": (
        "out_proj_bias", np.ones(12, SWAPPED_BFLOAT16), TypeError, "expected a float or int array, got dtype ",
    ),
    "text as out_proj_weight": (
        "out_proj_weight", [["a"] * 12] * 12, TypeError, "expected a float or int array, got dtype <U1$",
    ),
    "ragged out_proj_weight": (
        "out_proj_weight", [[1.0], [2.0, 3.0]], ValueError, "expected an array, got a list that makes none: ",
    ),
    "masked out_proj_bias": (
        "out_proj_bias", np.ma.masked_array(ones(12), ones(12)), TypeError,
        r"expected a plain array, got a masked array, whose mask would be ignored; use \.filled\(\.\.\.\)$",
    ),
}


@both
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_bad_parameter_changes_nothing(library, name, value, error, message):
    layer = random_layer(library, 12, 3, dtype=np.float32)
    x = random_input(2, 5, 12, dtype=np.float32)
    before, expected = getattr(layer, name), layer(x)
    with pytest.raises(error, match=f"^{name}: {message}"):
        setattr(layer, name, value)
    assert getattr(layer, name) is before
    np.testing.assert_array_equal(layer(x), expected)


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_training_steps(library, dtype):
    """With the gradient in float64: a new array, one in place, one through an alias of the array."""
    layer = random_layer(library, 12, 3, dtype=dtype)
    x = random_input(2, 5, 12, dtype=dtype)
    for name, shape in PARAMETERS.items():
        gradient = random_input(*shape, seed=7)
        before = getattr(layer, name).astype(np.float64)
        setattr(layer, name, getattr(layer, name) - 0.1 * gradient)
        np.testing.assert_array_equal(getattr(layer, name), (before - 0.1 * gradient).astype(dtype))
        alias = getattr(layer, name)
        own = np.zeros(shape, dtype)
        setattr(layer, name, own)
        own += np.ones((), dtype)  # the caller's array is the layer's
        assert (getattr(layer, name) == 1).all()
        step = gradient.astype(dtype)
        layer.__setattr__(name, getattr(layer, name).__isub__(step))  # layer.name -= step
        np.testing.assert_array_equal(own, np.ones((), dtype) - step)
        getattr(layer, name)[...] = alias
        np.testing.assert_array_equal(own, alias)
    assert layer(x).dtype == dtype
    layer.out_proj_weight -= 0.5 * layer.out_proj_weight
    layer.out_proj_bias *= 0
    assert np.isfinite(layer(x).astype(np.float64)).all()


@both
def test_read_only_parameters_are_trained_as_well(library):
    layer = library.MultiHeadAttention(12, 3)
    frozen = read_only(ones(12, 12))
    layer.out_proj_weight = frozen
    layer.out_proj_weight -= 1
    assert not layer.out_proj_weight.any() and frozen.all()


@both
@pytest.mark.parametrize("state", ["raise", "warn"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_errstate_raises_nothing(library, dtype, state):
    """Neither in casts of parameters and states, of numbers of any size, nor in calls; a warning is an error here."""
    extreme = np.resize(np.array([1e300, 1e-300, -1e300, 5e-324, np.nan, 1e-7, 6e4]), 144).reshape(12, 12)
    with np.errstate(all=state):
        layer = library.MultiHeadAttention(12, 3, dtype=dtype, seed=0, dropout=0.5)
        library.MultiHeadAttention(512, 2, dtype=dtype, seed=0)  # weights from below the least normal float16
        layer.load_state_dict(layer.state_dict() | {"out_proj.weight": extreme})
    with np.errstate(all="ignore"):
        expected = extreme.astype(dtype)
    assert layer.out_proj_weight.tobytes() == expected.tobytes()
    with np.errstate(all=state):
        layer.out_proj_weight = extreme
        layer.out_proj_bias = extreme[0]
        layer.in_proj_weight = layer.in_proj_weight * 8
    assert layer.out_proj_weight.tobytes() == expected.tobytes()
    assert layer.out_proj_bias.tobytes() == expected[0].tobytes()
    for x in (random_input(2, 5, 12, dtype=dtype), np.full((5, 12), 6e4, dtype), np.full((1, 12), 1e-7, dtype)):
        options = {"training": True, "seed": 3, "return_weights": True}
        with np.errstate(all="ignore"):
            expected_results = layer(x, **options)
        with np.errstate(all=state):
            results = layer(x, **options)
        for result, right in zip(results, expected_results, strict=True):
            assert result.tobytes() == right.tobytes()


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("without", [("in_proj_bias",), ("out_proj_bias",), ("in_proj_bias", "out_proj_bias")],
                         ids=" and ".join)
def test_each_bias_by_itself(library, without, num_kv_heads, layout):
    """None counts as 0; state dicts have the other one alone."""
    if layout == "tutorial" and num_kv_heads != 4:
        return
    layer, zeros = (random_layer(library, 12, 4, num_kv_heads=num_kv_heads, input_dim=5) for _ in range(2))
    for name in without:
        setattr(layer, name, None)
        assert getattr(layer, name) is None
        getattr(zeros, name)[:] = 0
    x, memory = random_input(2, 3, 5), random_input(2, 6, 5, seed=3)
    np.testing.assert_array_equal(layer(x), zeros(x))
    np.testing.assert_array_equal(layer(x, memory), zeros(x, memory))
    state = layer.state_dict(layout)
    out_bias = {"tutorial": "o_proj.bias", "d2l": "W_o.bias", "huggingface": "o_proj.bias", "bert": "output.dense.bias",
                "keras": "attention_output/bias"}.get(layout, "out_proj.bias")
    expected = [key for key in LAYOUTS[layout] if not key.endswith("bias")
                or ("out_proj_bias" if key == out_bias else "in_proj_bias") not in without]
    assert sorted(state) == sorted(expected)
    fresh = random_layer(library, 12, 4, num_kv_heads=num_kv_heads, input_dim=5, seed=9)
    with pytest.raises(ValueError, match=r"missing '.*bias'.*; a layer with bias=.* takes it$"):
        fresh.load_state_dict(state, layout)
    for name in without:
        setattr(fresh, name, None)
    fresh.load_state_dict(state)
    np.testing.assert_array_equal(fresh(x), layer(x))
    for name in without:  # and back
        setattr(fresh, name, getattr(zeros, name))
    assert sorted(fresh.state_dict(layout)) == sorted(LAYOUTS[layout])
    np.testing.assert_array_equal(fresh(x), layer(x))


def set_in_place(array, attribute, value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy: shape, strides and dtype are not to be set
        setattr(array, attribute, value)


@both
@pytest.mark.parametrize(("name", "shape"), [
    ("in_proj_weight", (12, 36)), ("in_proj_weight", (432, 1)), ("in_proj_weight", (432,)), ("in_proj_bias", (1, 36)),
    ("out_proj_weight", (144, 1)), ("out_proj_weight", (1, 144)), ("out_proj_weight", (3, 4, 12)),
    ("out_proj_bias", (12, 1)),
], ids=str)
def test_shape_set_in_place(library, name, shape):
    """Of the array that the layer holds: refused where it is used, right again when it is set back. An array that was
    assigned is its caller's, who can set its shape."""
    layer = random_layer(library, 12, 3)
    x = random_input(2, 5, 12)
    expected, right = layer(x), PARAMETERS[name]
    set_in_place(getattr(layer, name), "shape", shape)
    message = f"^{name}: expected shape {re.escape(str(right))}, got shape {re.escape(str(shape))}$"
    for use in (lambda: layer(x), layer.state_dict, lambda: layer.state_dict("d2l")):
        with pytest.raises(ValueError, match=message):
            use()
    set_in_place(getattr(layer, name), "shape", right)
    np.testing.assert_array_equal(layer(x), expected)
    own = getattr(layer, name).copy()
    setattr(layer, name, own)
    set_in_place(own, "shape", shape)
    np.testing.assert_array_equal(layer(x), expected)
    set_in_place(getattr(layer, name), "shape", shape)
    layer.load_state_dict(random_layer(library, 12, 3).state_dict())
    np.testing.assert_array_equal(layer(x), expected)


@both
def test_other_changes_in_place(library):
    """No resize, since the layer holds a view; other strides and dtypes are what the array says then."""
    layer = library.MultiHeadAttention(12, 3, seed=0)
    x = random_input(2, 5, 12, dtype=np.float32)
    own = ones(12, 12)
    layer.out_proj_weight = own
    for array in (own, layer.out_proj_weight):
        with pytest.raises(ValueError, match="cannot resize"):
            array.resize((2048, 1))
    with pytest.raises(ValueError, match="cannot resize"):
        layer.in_proj_bias.resize(1)
    layer.out_proj_weight = random_input(12, 12)
    expected = library.MultiHeadAttention(12, 3, seed=0)
    expected.out_proj_weight = layer.out_proj_weight.T
    set_in_place(layer.out_proj_weight, "strides", layer.out_proj_weight.strides[::-1])
    np.testing.assert_array_equal(layer(x), expected(x))
    expected.out_proj_weight = layer.out_proj_weight.copy().view(np.int32)
    set_in_place(layer.out_proj_weight, "dtype", np.int32)
    np.testing.assert_array_equal(layer(x), expected(x))


@both
def test_frozen_in_place(library):
    layer = library.MultiHeadAttention(12, 3)
    layer.out_proj_weight.flags.writeable = False
    layer(ones(5, 12))
    with pytest.raises(ValueError, match="read-only"):
        layer.out_proj_weight -= 1


@both
@pytest.mark.parametrize(("attribute", "value", "name"), [
    ("embed_dim", 24, "out_proj_weight"), ("embed_dim", 6, "out_proj_weight"), ("num_heads", 6, "in_proj_weight"),
    ("num_heads", 1, "num_kv_heads"), ("head_dim", 2, "in_proj_weight"), ("head_dim", 12, "in_proj_weight"),
    ("num_kv_heads", 1, "in_proj_weight"), ("num_kv_heads", 2, "num_kv_heads"), ("input_dim", 6, "query"),
    ("input_dim", 24, "query"), ("dtype", np.dtype(np.float64), "query"), ("dropout", 1.5, "dropout"),
    ("dropout", "0", "dropout"),
], ids=str)
def test_attributes_that_do_not_fit(library, attribute, value, name):
    layer = library.MultiHeadAttention(12, 3)
    setattr(layer, attribute, value)
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected "):
        layer(ones(2, 5, 12), training=True)
    if name == "num_kv_heads":
        state = library.MultiHeadAttention(12, 3).state_dict()
        for use in (layer.state_dict, lambda: layer.load_state_dict(state)):
            with pytest.raises(ValueError, match=r"^num_kv_heads: expected a divisor of num_heads = "):
                use()
    if attribute == "input_dim":
        layer.kdim = layer.vdim = value
        with pytest.raises(ValueError, match=rf"^in_proj_weight: expected shape \(36, {value}\), got shape \(36, 12\)"):
            layer(ones(2, 5, value))
    if attribute == "dtype":  # the parameters are cast
        assert layer(ones(2, 5, 12, dtype=np.float64)).dtype == np.float64


@both
def test_attributes_that_fit(library):
    """Other heads of the same rows, and a layer that is made another size by hand: as if it had been made so."""
    layer, expected = random_layer(library, 12, 3), random_layer(library, 12, 2)
    layer.num_heads, layer.num_kv_heads, layer.head_dim = 2, 2, 6
    x = random_input(2, 5, 12)
    np.testing.assert_array_equal(layer(x), expected(x))
    for layout, keys in LAYOUTS.items():
        state = expected.state_dict(layout)
        for key in keys:
            np.testing.assert_array_equal(layer.state_dict(layout)[key], state[key])
    expected = random_layer(library, 8, 4, num_kv_heads=2, input_dim=12)
    layer.embed_dim, layer.num_heads, layer.num_kv_heads, layer.head_dim = 8, 4, 2, 2
    for name in PARAMETERS:
        setattr(layer, name, getattr(expected, name))
    np.testing.assert_array_equal(layer(x), expected(x))
    np.testing.assert_array_equal(layer(x, x.copy()), expected(x, x.copy()))


@both
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
                         ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("bias", [True, False])
def test_copies(library, copied, bias):
    layer = random_layer(library, 12, 4, num_kv_heads=2, bias=bias, dropout=0.3)
    x = random_input(2, 5, 12)
    other = copied(layer)
    expected = layer(x, training=True, seed=1)
    np.testing.assert_array_equal(other(x, training=True, seed=1), expected)
    other.out_proj_weight -= 0.25
    assert (other(x) != layer(x)).any() == (copied is not copy.copy)
    with pytest.raises(ValueError, match=r"^out_proj_weight: expected shape \(12, 12\), got shape \(12, 11\)"):
        other.out_proj_weight = ones(12, 11)
    other.load_state_dict(layer.state_dict("huggingface"))
    np.testing.assert_array_equal(other(x), layer(x))


@both
def test_a_subclass_that_sets_what_it_was_given(library):
    class Mine(library.MultiHeadAttention):
        def __init__(self, embed_dim, num_heads):
            super().__init__(embed_dim, num_heads, seed=0)
            self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
            self.in_proj_bias = None

    x = random_input(2, 5, 12, dtype=np.float32)
    assert Mine(12, 3)(x).shape == x.shape
    assert library.MultiHeadAttention.in_proj_weight.name == "in_proj_weight"
    with pytest.raises(AttributeError, match="no in_proj_weight yet"):
        _ = library.MultiHeadAttention.__new__(library.MultiHeadAttention).in_proj_weight


# Arrays that change while a call looks at its arguments.


class Changes:
    """Sets the shape of an array when it is asked for its own."""

    def __init__(self, array, shape, value):
        self.array, self.shape, self.value = array, shape, value

    def __array__(self, dtype=None, copy=None):
        set_in_place(self.array, "shape", self.shape)
        return self.value


@both
def test_inputs_and_parameters_changed_during_the_checks(library):
    """Inputs are as they were when the call came; a parameter is refused."""
    layer = random_layer(library, 12, 3)
    x, mask = random_input(2, 6, 12), np.ones((6, 6), bool)
    for number in range(3):
        arrays = [x.copy() for _ in range(3)]
        result = layer(*arrays, attn_mask=Changes(arrays[number], (6, 2, 12), mask))
        np.testing.assert_array_equal(result, layer(*[x.copy() for _ in range(3)]))
    changed = mask.copy()
    result = layer(x, attn_mask=changed, kv_lens=Changes(changed, (36,), np.array([6, 6])))
    np.testing.assert_array_equal(result, layer(x))
    with pytest.raises(ValueError, match=r"^out_proj_weight: expected shape \(12, 12\), got shape \(144, 1\)"):
        layer(x, attn_mask=Changes(layer.out_proj_weight, (144, 1), mask))


@both
def test_state_changed_while_it_is_loaded(library):
    layer, state = random_layer(library, 12, 3), random_layer(library, 12, 3, seed=4).state_dict()
    changed = state["in_proj_weight"]
    layer.load_state_dict(state | {"out_proj.bias": Changes(changed, (12, 36), state["out_proj.bias"])})
    set_in_place(changed, "shape", (36, 12))
    np.testing.assert_array_equal(layer.in_proj_weight, changed)


@both
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_masked_inputs(library, name):
    arguments = {"query": ones(2, 5, 12), "key": ones(2, 5, 12), "value": ones(2, 5, 12), "attn_mask": np.ones((5, 5))}
    masked = np.ma.masked_array(arguments[name], False)
    with pytest.raises(TypeError, match=f"^{name}: expected a plain array, got a masked array, whose mask would be "):
        library.MultiHeadAttention(12, 3)(**arguments | {name: masked})


@both
def test_masked_entry_of_a_state(library):
    layer = library.MultiHeadAttention(12, 3)
    masked = np.ma.masked_array(ones(12), False)
    with pytest.raises(TypeError, match=r"^state: expected a plain array for 'out_proj.bias', got a masked array, "):
        layer.load_state_dict(layer.state_dict() | {"out_proj.bias": masked})


@both
@pytest.mark.parametrize("name", ["is_causal", "return_weights", "training"])
@pytest.mark.parametrize("value", ["no", None, 0, 1, np.ones(2, bool), np.array(True)], ids=repr)
def test_truth_values_are_bools(library, name, value):
    with pytest.raises(TypeError) as raised:
        library.MultiHeadAttention(12, 3)(ones(2, 5, 12), **{name: value})
    assert str(raised.value) == f"{name}: expected a bool, got {value!r}"
    with pytest.raises(TypeError) as raised:
        library.MultiHeadAttention(12, 3, bias=value)
    assert str(raised.value) == f"bias: expected a bool, got {value!r}"


@both
def test_state_while_a_bias_is_assigned(library):
    """The entries are those of the parameters that were there."""
    layer = library.MultiHeadAttention(12, 3, seed=0)
    bias = layer.in_proj_bias

    class Assigns(type(layer)):
        def _rows(self):
            self.in_proj_bias = None
            return super()._rows()

    layer.__class__ = Assigns
    np.testing.assert_array_equal(layer.state_dict()["in_proj_bias"], bias)
    assert "in_proj_bias" not in layer.state_dict()


@both
def test_sizes_of_0_are_named(library):
    layer = library.MultiHeadAttention(12, 3, seed=0)
    layer.num_kv_heads = 0
    with pytest.raises(ValueError, match=r"^num_kv_heads: expected a divisor of num_heads = 3, got 0"):
        layer(ones(2, 5, 12))


@both
def test_truth_values_of_numpy(library):
    layer = library.MultiHeadAttention(12, 3, bias=np.False_)
    assert layer.in_proj_bias is None
    out, weights = layer(ones(2, 5, 12), is_causal=np.True_, return_weights=np.True_, training=np.True_)
    assert out.shape == (2, 5, 12) and not np.triu(weights, 1).any()


def test_projected_together():
    """The same array for several inputs is projected once, whether it is named or left out."""
    layer = random_layer(cattn, 12, 3)
    x, memory = random_input(2, 6, 12), random_input(2, 7, 12, seed=3)
    products = []

    class Counts(cattn.MultiHeadAttention):
        def _linear(self, x, weight, bias, num_threads):
            products.append(len(weight))
            return super()._linear(x, weight, bias, num_threads)

    layer.__class__ = Counts
    for inputs, expected in [((x,), [36, 12]), ((x, x), [36, 12]), ((x, x, x), [36, 12]), ((x, None, x), [36, 12]),
                             ((x, memory), [12, 24, 12]), ((x, memory, memory), [12, 24, 12]),
                             ((x, memory, memory.copy()), [12, 12, 12, 12])]:
        products.clear()
        layer(*inputs)
        assert sorted(products) == sorted(expected)


# Weights in fewer bits.


STORED = ["float16", "bfloat16", "int8"]


@pytest.mark.parametrize("sizes", [{}, {"num_kv_heads": 2}, {"kdim": 20, "vdim": 48, "bias": False}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("weight_dtype", STORED)
def test_weight_dtype(isa, weight_dtype, dtype, sizes):
    """A layer computes with what it keeps: to the bit as a layer with these numbers does, where their dtype holds them;
    else as exactly as the reference, see test_public_as_exact_as_reference."""
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def layer_of(library, dtype, weight_dtype=None):
        """With the numbers of `fast`."""
        layer = library.MultiHeadAttention(64, 4, dtype=dtype, weight_dtype=weight_dtype, seed=0, **sizes)
        if weight_dtype is None:
            for name, array in fast._own_parameters().items():
                if array is not None and len(array.shape) == 2:
                    setattr(layer, name, array.widened())
        return layer

    fast, plain = (layer_of(library, dtype, weight_dtype) for library in (cattn, cattn.reference))
    for array in fast._own_parameters().values():
        if array is not None and len(array.shape) == 2:
            assert array.numbers.itemsize == (1 if weight_dtype == "int8" else 2)
    exact = layer_of(cattn.reference, np.longdouble)
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[dtype.name]
    memory = () if "kdim" not in sizes else (random_input(2, 9, 20, dtype=dtype), random_input(2, 9, 48, dtype=dtype))
    for seq_len in (1, 5, 40):
        inputs = random_input(2, seq_len, 64, dtype=dtype), *memory
        ours, theirs = fast(*inputs), plain(*inputs)
        true = exact(*(x.astype(np.longdouble) for x in inputs))
        error, plain_error = (np.abs(result.astype(np.longdouble) - true).max() for result in (ours, theirs))
        assert error <= 2 * plain_error + 4 * eps * np.abs(true).max()
        if dtype.itemsize > 2:
            np.testing.assert_array_equal(ours, layer_of(cattn, dtype)(*inputs))
            np.testing.assert_array_equal(theirs, layer_of(cattn.reference, dtype)(*inputs))


@both
@pytest.mark.parametrize("weight_dtype", [*STORED, np.float16, np.dtype(np.int8), ml_dtypes.bfloat16])
def test_weights_are_rounded_when_they_come(library, weight_dtype):
    weight = random_input(24, 24)
    layer = library.MultiHeadAttention(24, 3, weight_dtype=weight_dtype, dtype=np.float32)
    name = layer.weight_dtype
    assert name in STORED and repr(layer).endswith(f", weight_dtype={name!r})")
    layer.out_proj_weight = weight
    held = layer.out_proj_weight
    if name == "int8":
        scale = np.abs(weight.astype(np.float32)).max(axis=1, keepdims=True) / np.float32(127)
        np.testing.assert_array_equal(held, scale * np.rint(weight.astype(np.float32) / scale))
    else:
        narrow = np.float16 if name == "float16" else ml_dtypes.bfloat16
        np.testing.assert_array_equal(held, weight.astype(np.float32).astype(narrow).astype(np.float32))
    assert held.dtype == np.float32 and np.abs(held - weight).max() > 0
    with pytest.raises(ValueError, match="read-only"):
        layer.out_proj_weight -= 1  # which nobody would keep
    np.testing.assert_array_equal(layer.out_proj_weight, held)
    with pytest.raises(ValueError, match=r"^out_proj_weight: expected shape \(24, 24\), got shape \(24, 23\)"):
        layer.out_proj_weight = weight[:, 1:]
    layer.in_proj_bias[:] = 1  # biases are as ever
    np.testing.assert_array_equal(layer.state_dict()["in_proj_bias"], np.ones(72))


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_dtype", STORED)
def test_state_dict_of_what_is_kept(library, weight_dtype, layout):
    source = random_layer(library, 12, 4, dtype=np.float32)
    layer = library.MultiHeadAttention(12, 4, weight_dtype=weight_dtype)
    layer.load_state_dict(source.state_dict(layout), layout)
    state = layer.state_dict(layout)
    assert all(array.dtype == np.float32 and array.flags.writeable for array in state.values())
    other = library.MultiHeadAttention(12, 4)
    other.load_state_dict(state, layout)
    x = random_input(2, 5, 12, dtype=np.float32)
    np.testing.assert_array_equal(layer(x), other(x))
    for copied in (copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(copied(layer)(x), layer(x))
    assert (layer(x) != source(x)).any()


@both
def test_sizes_that_do_not_fit_what_is_kept(library):
    layer = library.MultiHeadAttention(12, 3, weight_dtype="int8")
    layer.num_heads = 6
    with pytest.raises(ValueError, match=r"^in_proj_weight: expected shape \(48, 12\), got shape \(36, 12\)"):
        layer(ones(2, 5, 12, dtype=np.float32))
