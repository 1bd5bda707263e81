"""MultiHeadAttention, the reference and the public one: formula, masks, dropout, state dicts, errors."""

import math

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
    if layer.in_proj_bias is not None:
        layer.in_proj_bias[:] = rng.standard_normal(layer.in_proj_bias.shape)
        layer.out_proj_bias[:] = rng.standard_normal(layer.out_proj_bias.shape)
    return layer


def random_input(*shape, seed=2, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def by_formula(layer, query, key, value, **options):
    """One head at a time, from the state dict."""
    state = layer.state_dict("huggingface")
    head_dim = layer.embed_dim // layer.num_heads

    def project(x, name, head):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        bias = state.get(f"{name}_proj.bias", np.zeros(layer.embed_dim))
        return x @ state[f"{name}_proj.weight"][rows].T + bias[rows]

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
])
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
@pytest.mark.parametrize("shape", [(0, 3, 12), (2, 0, 12), (0, 12)])
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_with_weights_any_number_of_threads_and_any_batch_of_many_rows(dtype):
    layer = random_layer(cattn, 48, 3, dtype=dtype)
    x = random_input(6, 70, 48, dtype=dtype)
    out = layer(x, is_causal=True, num_threads=1)
    np.testing.assert_array_equal(layer(x, is_causal=True, return_weights=True, num_threads=2)[0], out)
    np.testing.assert_array_equal(layer(x, is_causal=True, num_threads=3), out)
    for i in range(5):
        np.testing.assert_array_equal(layer(x[i : i + 2], is_causal=True), out[i : i + 2])


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


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), [
    ((10, 3), {}, ValueError, "num_heads: expected a divisor of embed_dim = 10, got 3"),
    ((12, 6), {"num_kv_heads": 4}, ValueError, "num_kv_heads: expected a divisor of num_heads = 6, got 4"),
    ((12, 6), {"num_kv_heads": 12}, ValueError, "num_kv_heads: expected a divisor of num_heads = 6, got 12"),
    ((0, 1), {}, ValueError, "embed_dim: expected an int >= 1, got 0"),
    ((12, 0), {}, ValueError, "num_heads: expected an int >= 1, got 0"),
    ((12, 3), {"num_kv_heads": 0}, ValueError, "num_kv_heads: expected an int >= 1, got 0"),
    ((12, 3), {"input_dim": -1}, ValueError, "input_dim: expected an int >= 1, got -1"),
    ((12.0, 3), {}, TypeError, r"embed_dim: expected an int, got 12\.0"),
    ((12, "3"), {}, TypeError, "num_heads: expected an int, got '3'"),
    ((2**30, 1), {}, ValueError, r"embed_dim: expected at most 2\*\*58 elements in a weight, got embed_dim = 1073741"),
    ((2**10, 1), {"input_dim": 2**60}, ValueError, r"embed_dim: expected at most 2\*\*58 elements in a weight, got "),
    ((12, 3), {"dropout": 1.0}, ValueError, r"dropout: expected a float in \[0, 1\), got 1\.0"),
    ((12, 3), {"dropout": -0.1}, ValueError, r"dropout: expected a float in \[0, 1\), got -0\.1"),
    ((12, 3), {"dropout": math.nan}, ValueError, r"dropout: expected a float in \[0, 1\), got nan"),
    ((12, 3), {"dropout": None}, TypeError, r"dropout: expected a float in \[0, 1\), got None"),
    ((12, 3), {"dtype": np.int64}, TypeError, "dtype: expected .*float.*, got <class 'numpy.int64'>"),
    ((12, 3), {"dtype": "float23"}, TypeError, "dtype: expected .*float.*, got 'float23'"),
    ((12, 3), {"dtype": None}, TypeError, "dtype: expected .*float.*, got None"),
    ((12, 3), {"dtype": np.dtype(">f4")}, TypeError, r"dtype: expected .*float.*, got dtype\('>f4'\)"),
    ((12, 3), {"seed": -1}, ValueError, "seed: expected an int >= 0 or a Generator, got -1"),
    ((12, 3), {"seed": "x"}, TypeError, "seed: expected an int >= 0 or a Generator, got 'x'"),
])
def test_bad_layer(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.MultiHeadAttention(*args, **options)


def test_public_layer_has_no_long_double():
    if np.dtype(np.longdouble) != np.float64:
        with pytest.raises(TypeError, match=r"^dtype: expected one of float16, bfloat16, .*, got"):
            cattn.MultiHeadAttention(12, 3, dtype=np.longdouble)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), [
    ((ones(12),), {}, ValueError,
     r"query: expected \(batch, seq_len_q, 12\) or \(seq_len_q, 12\), got shape \(12,\)"),
    ((ones(1, 2, 3, 12),), {}, ValueError, r"query: expected .*, got shape \(1, 2, 3, 12\)"),
    ((ones(2, 3, 11),), {}, ValueError, r"query: expected .*, got shape \(2, 3, 11\)"),
    ((ones(2, 3, 12), ones(3, 3, 12)), {}, ValueError,
     r"key: expected \(2, seq_len_kv, 12\), got shape \(3, 3, 12\)"),
    ((ones(2, 3, 12), ones(3, 12)), {}, ValueError,
     r"key: expected \(2, seq_len_kv, 12\), got shape \(3, 12\)"),
    ((ones(3, 12), ones(3, 8)), {}, ValueError, r"key: expected \(seq_len_kv, 12\), got shape \(3, 8\)"),
    ((ones(2, 3, 12), ones(2, 4, 12), ones(2, 5, 12)), {}, ValueError,
     r"value: expected the shape of key, \(2, 4, 12\), got shape \(2, 5, 12\)"),
    ((ones(2, 3, 12, dtype=np.float64),), {}, TypeError,
     "query: expected the dtype of the layer, float32, got float64"),
    ((ones(2, 3, 12, dtype=int),), {}, TypeError, "query: expected .*, got int64"),
    ((ones(2, 3, 12, dtype=object),), {}, TypeError, "query: expected .*, got object"),
    ((ones(2, 3, 12), ones(3, 12, dtype=np.float16)), {}, TypeError, "key: expected .*, got float16"),
    ((ones(2, 3, 12), ones(2, 3, 12), ones(2, 3, 12, dtype=complex)), {}, TypeError,
     "value: expected .*, got complex128"),
    ((ones(2, 4, 12), ones(2, 5, 12)), {"attn_mask": np.ones((5, 4), bool)}, ValueError,
     r"attn_mask: expected \(4, 5\), \(2, 4, 5\) or \(2, 3, 4, 5\) \(axes of 1 broadcast\), got shape"),
    ((ones(2, 4, 12),), {"attn_mask": np.ones(4, bool)}, ValueError,
     r"attn_mask: expected .*, got shape \(4,\)"),
    ((ones(2, 4, 12),), {"attn_mask": np.ones((3, 4, 4), bool)}, ValueError,
     r"attn_mask: expected .*, got shape \(3, 4, 4\)"),
    ((ones(2, 4, 12),), {"attn_mask": np.ones((1, 2, 3, 4, 4), bool)}, ValueError,
     r"attn_mask: expected .*, got shape \(1, 2, 3, 4, 4\)"),
    ((ones(4, 12),), {"attn_mask": np.ones((3, 4, 4), bool)}, ValueError,
     r"attn_mask: expected \(4, 4\), \(1, 4, 4\) or \(1, 3, 4, 4\) \(axes of 1 broadcast\), got shape"),
])
def test_bad_call(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.MultiHeadAttention(12, 3)(*args, **options)


@pytest.mark.parametrize(("options", "error", "name"), [
    ({"attn_mask": np.ones((4, 4), int)}, TypeError, "attn_mask"),
    ({"kv_lens": np.array([4, 5])}, ValueError, "kv_lens"),
    ({"kv_lens": np.array([4, 4, 4])}, ValueError, "kv_lens"),
    ({"q_offset": np.array([1])}, ValueError, "q_offset"),
    ({"window": 3}, (ValueError, TypeError), "window"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"alibi_slopes": np.ones(4, np.float32)}, ValueError, "alibi_slopes"),
    ({"sinks": np.ones(4, np.float32)}, ValueError, "sinks"),
    ({"seed": -1, "training": True}, ValueError, "seed"),
    ({"num_threads": 0}, ValueError, "num_threads"),
])
def test_what_the_attention_checks(options, error, name):
    layer = cattn.MultiHeadAttention(12, 3, dropout=0.5)
    with pytest.raises(error, match=f"^{name}: expected .*, got "):
        layer(ones(2, 4, 12), **options)


@both
@pytest.mark.parametrize(("change", "layout", "error", "message"), [
    ({"in_proj_bias": None}, None, ValueError,
     r"state: expected the keys \['in_proj_weight', .*\] \(layout 'torch'\), got \['in_proj_weight', .*\]: "
     r"missing \['in_proj_bias'\], unknown \[\]"),
    ({"bias_k": ones(1, 1, 12)}, None, ValueError, r"state: .*: missing \[\], unknown \['bias_k'\]"),
    ({"in_proj_bias": None, "bias": ones(36)}, "torch", ValueError,
     r"state: .*: missing \['in_proj_bias'\], unknown \['bias'\]"),
    ({}, "d2l", ValueError,
     r"state: .* \(layout 'd2l'\), .*: missing \['W_q.weight', .*\], unknown \['in_proj_weight'"),
    ({}, "keras", ValueError, r"layout: expected one of \['torch', .*\], got 'keras'"),
    ({}, ["torch"], ValueError, r"layout: expected one of \['torch', .*\], got \['torch'\]"),
    ({"out_proj.bias": ones(13)}, None, ValueError,
     r"state: expected shape \(12,\) for 'out_proj.bias', got shape \(13,\)"),
    ({"in_proj_weight": ones(36, 11)}, None, ValueError,
     r"state: expected shape \(36, 12\) for 'in_proj_weight', got shape \(36, 11\)"),
    ({"out_proj.weight": ones(12, 12, dtype=int)}, None, TypeError,
     "state: expected a float array for 'out_proj.weight', got dtype int64"),
    ({"out_proj.weight": np.ones((12, 12), SWAPPED_BFLOAT16)}, None, TypeError,
     f"state: expected a float array for 'out_proj.weight', got dtype {SWAPPED_BFLOAT16}"),
])
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
    with pytest.raises(ValueError, match=r"^state: expected an array, got a list that makes none: "):
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
    with pytest.raises(ValueError, match=r"missing \['in_proj_weight', .*\], unknown \[\]"):
        layer.load_state_dict({})
    with pytest.raises(ValueError, match=r"unknown \['q_proj.bias'"):
        library.MultiHeadAttention(12, 4, bias=False).load_state_dict(layer.state_dict("huggingface"))
