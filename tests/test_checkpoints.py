"""Layers as checkpoints have them: heads of any size, keys of other widths, each bias by itself, names and prefixes."""

import math

import ml_dtypes
import numpy as np
import pytest
from test_multihead import LAYOUTS, both, by_formula, random_layer

import cattn
import cattn.reference

# Each as a model has it: what is passed, and the parameters that there are then.
LAYERS = {
    "plain": ((12, 3), {}),
    "large heads": ((10, 4), {"num_kv_heads": 2, "head_dim": 6}),  # Qwen 3, Gemma
    "small heads": ((12, 3), {"head_dim": 1}),
    "cross-attention": ((12, 3), {"kdim": 5, "vdim": 7}),
    "keys of another size": ((12, 3), {"kdim": 5}),
    "values of another size": ((12, 4), {"num_kv_heads": 2, "vdim": 5, "head_dim": 2}),
    "keys of the input's size": ((12, 3), {"input_dim": 5, "kdim": 5, "vdim": 5}),
    "no bias at the end": ((12, 3), {"out_bias": False}),  # Qwen 2
    "a bias at the end alone": ((12, 3), {"bias": False, "out_bias": True}),
    "all at once": ((10, 4), {"num_kv_heads": 2, "head_dim": 3, "input_dim": 8, "kdim": 5, "vdim": 6, "bias": False,
                              "out_bias": True}),
}
layers = pytest.mark.parametrize("name", LAYERS)


def make(library, name, seed=0, **options):
    args, own = LAYERS[name]
    return random_layer(library, *args, seed=seed, **own | options)


def inputs(layer, seq_len_q=5, seq_len_kv=7, seed=1):
    rng = np.random.default_rng(seed)
    sizes = (seq_len_q, layer.input_dim), (seq_len_kv, layer.kdim), (seq_len_kv, layer.vdim)
    return [rng.standard_normal((2, *size)).astype(layer.dtype) for size in sizes]


@both
@layers
def test_formula(library, name):
    layer = make(library, name)
    query, key, value = inputs(layer)
    np.testing.assert_allclose(layer(query, key, value), by_formula(layer, query, key, value), rtol=1e-12, atol=1e-13)
    assert layer(query, key, value).shape == (2, 5, layer.embed_dim)
    out, weights = layer(query[0], key[0], value[0], return_weights=True)
    np.testing.assert_allclose(out, layer(query, key, value)[0], rtol=1e-12, atol=1e-13)
    assert weights.shape == (layer.num_heads, 5, 7)


@both
@layers
def test_shapes_of_the_parameters(library, name):
    layer = make(library, name)
    q_rows, kv_rows = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    separate = not layer.kdim == layer.vdim == layer.input_dim
    expected = {
        "in_proj_weight": None if separate else (q_rows + 2 * kv_rows, layer.input_dim),
        "q_proj_weight": (q_rows, layer.input_dim) if separate else None,
        "k_proj_weight": (kv_rows, layer.kdim) if separate else None,
        "v_proj_weight": (kv_rows, layer.vdim) if separate else None,
        "in_proj_bias": None if LAYERS[name][1].get("bias") is False else (q_rows + 2 * kv_rows,),
        "out_proj_weight": (layer.embed_dim, q_rows),
        "out_proj_bias": None if LAYERS[name][1].get("out_bias") is False else (layer.embed_dim,),
    }
    parameters = {parameter: getattr(layer, parameter) for parameter in expected}
    assert {key: None if array is None else array.shape for key, array in parameters.items()} == expected
    for parameter, array in parameters.items():  # each is that of its name
        if array is None:
            setattr(layer, parameter, None)
        else:
            setattr(layer, parameter, array + 1)
            np.testing.assert_array_equal(getattr(layer, parameter), array + 1)


@both
@layers
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "encoder.layer.3.attention."], ids=["no prefix", "prefix"])
def test_round_trip(library, name, layout, prefix):
    layer = make(library, name)
    if layout == "tutorial" and (layer.num_heads != layer.num_kv_heads or layer.in_proj_weight is None):
        with pytest.raises(ValueError, match=r"^layout: expected .* for 'tutorial', got "):
            layer.state_dict(layout)
        return
    state = layer.state_dict(layout, prefix=prefix)
    assert all(key.startswith(prefix) for key in state)
    others = {"encoder.layer.2.attention.self.query.weight": 3, "head.weight": np.ones(3)} if prefix else {}
    arrays = inputs(layer)
    for given in (layout, None):
        fresh = make(library, name, seed=9)
        fresh.load_state_dict(state | others, given, prefix=prefix)
        np.testing.assert_array_equal(fresh(*arrays), layer(*arrays))
    for array in state.values():  # copies
        array[...] = 0
    np.testing.assert_array_equal(fresh(*arrays), layer(*arrays))


@both
@pytest.mark.parametrize("name", ["plain", "large heads", "cross-attention", "no bias at the end"])
def test_keras(library, name):
    """Their formula: einsum("abc,cde->abde") with kernels (size, heads, head_dim), and "abcd,cde->abe"."""
    layer = make(library, name)
    state, arrays = layer.state_dict("keras"), inputs(layer)
    q, k, v = (
        np.einsum("abc,cde->abde", x, state[f"{which}/kernel"]) + state[f"{which}/bias"]
        for x, which in zip(arrays, ("query", "key", "value"), strict=True))
    heads = cattn.reference.scaled_dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)
    out = np.einsum("abcd,cde->abe", heads, state["attention_output/kernel"]) + state.get("attention_output/bias", 0)
    np.testing.assert_allclose(layer(*arrays), out, rtol=1e-12, atol=1e-13)


def names_of(library, layout):
    return list(library.MultiHeadAttention(12, 3).state_dict(layout))


@both
def test_names(library):
    assert names_of(library, "bert") == [
        f"{x}.{kind}" for x in ("self.query", "self.key", "self.value", "output.dense") for kind in ("weight", "bias")]
    assert names_of(library, "bart")[-2:] == ["out_proj.weight", "out_proj.bias"]
    assert names_of(library, "keras")[::2] == [
        "query/kernel", "key/kernel", "value/kernel", "attention_output/kernel"]
    separate = library.MultiHeadAttention(12, 3, kdim=5)
    expected = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert list(separate.state_dict()) == list(separate.state_dict("torch_split")) == expected


@both
def test_norm_beside_the_layer_of_bert(library):
    layer, other = (library.MultiHeadAttention(12, 3, seed=seed) for seed in (0, 1))
    norm = {f"attention.output.LayerNorm.{kind}": np.ones(12) for kind in ("weight", "bias")}
    other.load_state_dict(layer.state_dict("bert", prefix="attention.") | norm, prefix="attention.")
    np.testing.assert_array_equal(other.in_proj_weight, layer.in_proj_weight)
    with pytest.raises(ValueError, match=r"unknown 'attention.self.distance_embedding.weight'$"):
        other.load_state_dict(layer.state_dict("bert", prefix="attention.") | norm
                              | {"attention.self.distance_embedding.weight": np.ones(12)}, prefix="attention.")


# States that do not fit.


def state_without(layer, layout, *endings):
    return {key: array for key, array in layer.state_dict(layout).items() if not key.endswith(endings)}


@both
def test_cures(library):
    layer = library.MultiHeadAttention(12, 3)

    def message(state, layer=layer, **options):
        with pytest.raises(ValueError) as raised:
            layer.load_state_dict(state, **options)
        return str(raised.value)

    whisper = state_without(layer, "bart", "k_proj.bias")
    assert message(whisper) == (
        "state: expected the keys of a layout, 'bart' is the closest: missing 'k_proj.bias'; a bias that is not there "
        "is 0: state | {'k_proj.bias': np.zeros((12,))}")
    layer.load_state_dict(whisper | {"k_proj.bias": np.zeros((12,))})
    qwen2 = state_without(layer, "huggingface", "o_proj.bias")
    assert message(qwen2) == (
        "state: expected the keys of a layout, 'huggingface' is the closest: missing 'o_proj.bias'; a layer with "
        "bias=True and out_bias=False takes it")
    library.MultiHeadAttention(12, 3, out_bias=False).load_state_dict(qwen2)
    whole = {f"encoder.layer.{i}.attention.{key}": array for i in range(3)
             for key, array in layer.state_dict("bert").items()} | {"embeddings.weight": np.ones((5, 12))}
    assert message(whole) == (
        "state: expected the keys of a layout, 'bert' is the closest: missing 'self.query.weight', missing "
        "'self.query.bias', missing 'self.key.weight' and 30 more; prefix='encoder.layer.0.attention.' takes one of 3 "
        "such layers in it")
    layer.load_state_dict(whole, prefix="encoder.layer.0.attention.")
    assert message(whole, prefix="decoder.") == (
        "prefix: expected one that keys of state begin with, got 'decoder.'; the first is "
        "'encoder.layer.0.attention.self.query.weight'")
    assert message({"c_attn.weight": 0}) == (
        "state: expected the keys of a layout, none has such names; of 'torch': missing 'in_proj_weight', missing "
        "'in_proj_bias', missing 'out_proj.weight' and 2 more")
    for name in ("bias_k", "bias_v"):
        assert message(layer.state_dict() | {name: np.ones((1, 1, 12))}).startswith(
            "state: expected no 'bias_k' and 'bias_v', the key and the value that add_bias_kv=True of PyTorch appends")
    qwen3 = layer.state_dict("huggingface") | {"q_norm.weight": np.ones(4)}
    assert message(qwen3).endswith("'huggingface' is the closest: unknown 'q_norm.weight'")
    shape = message(library.MultiHeadAttention(12, 3, kdim=5, vdim=5).state_dict(), layout="torch_split")
    assert shape == "state: expected shape (12, 12) for 'k_proj_weight', got shape (12, 5)"


@both
def test_odd_arguments(library):
    layer = library.MultiHeadAttention(12, 3)
    for use in (layer.state_dict, lambda **options: layer.load_state_dict(layer.state_dict(), **options)):
        for prefix in (None, 3, b"self."):
            with pytest.raises(TypeError, match=r"^prefix: expected a str, got "):
                use(prefix=prefix)
    with pytest.raises(TypeError, match=r"^state: expected names as keys, got 3"):
        layer.load_state_dict(layer.state_dict() | {3: np.ones(3)})


@both
@pytest.mark.parametrize(("options", "error", "message"), [
    ({"head_dim": 0}, ValueError, "head_dim: expected an int >= 1, got 0"),
    ({"head_dim": 2.0}, TypeError, "head_dim: expected an int, got 2.0"),
    ({"kdim": 0}, ValueError, "kdim: expected an int >= 1, got 0"),
    ({"vdim": "3"}, TypeError, "vdim: expected an int, got '3'"),
    ({"out_bias": 1}, TypeError, "out_bias: expected a bool, got 1"),
    ({"head_dim": 2**60}, ValueError, r"embed_dim: expected at most 2\*\*58 elements in a weight, got in_proj_"),
    ({"kdim": 2**60}, ValueError, r"embed_dim: expected at most 2\*\*58 elements in a weight, got k_proj_"),
], ids=["no head_dim", "float", "no kdim", "text", "number for a bool", "huge heads", "huge keys"])
def test_bad_layers(library, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.MultiHeadAttention(12, 3, **options)


@both
def test_heads_that_do_not_divide(library):
    with pytest.raises(ValueError) as raised:
        library.MultiHeadAttention(10, 4)
    assert str(raised.value) == (
        "num_heads: expected a divisor of embed_dim = 10, got 4; head_dim=... makes heads of another size")
    assert library.MultiHeadAttention(10, 4, head_dim=3)(np.ones((2, 10), np.float32)).shape == (2, 10)


@both
def test_inputs_of_other_sizes(library):
    layer = make(library, "cross-attention")
    query, key, value = inputs(layer)
    for args, message in {
        (0,): "key: expected (2, seq_len_kv, 5), got shape (2, 5, 12), the query's, since key is None",
        (0, 1): "value: expected (2, 7, 7), got shape (2, 7, 5), the key's, since value is None",
        (0, 2, 1): "key: expected (2, seq_len_kv, 5), got shape (2, 7, 7); a layer with kdim=7 takes it",
        (0, 1, 1): "value: expected (2, 7, 7), got shape (2, 7, 5); a layer with vdim=5 takes it",
    }.items():
        with pytest.raises(ValueError) as raised:
            layer(*((query, key, value)[number] for number in args))
        assert str(raised.value) == message


@both
def test_parameters_of_the_other_kind(library):
    layer = make(library, "cross-attention")
    with pytest.raises(ValueError, match=r"^in_proj_weight: expected None, got a ndarray; .* has q_proj_weight, k_"):
        layer.in_proj_weight = np.ones((36, 12))
    with pytest.raises(ValueError, match=r"^k_proj_weight: expected shape \(12, 5\), got shape \(12, 12\)"):
        layer.k_proj_weight = np.ones((12, 12))
    with pytest.raises(ValueError, match=r"^q_proj_weight: expected None, got a ndarray; .* has in_proj_weight, in"):
        make(library, "plain").q_proj_weight = np.ones((12, 12))


@both
@layers
def test_repr(library, name):
    layer = make(library, name, dtype=np.float32)
    again = eval(repr(layer), {"MultiHeadAttention": library.MultiHeadAttention})
    assert vars(again).keys() == vars(layer).keys()
    for attribute, value in vars(layer).items():
        other = getattr(again, attribute)
        assert np.shape(other) == np.shape(value) and (isinstance(value, np.ndarray) or other == value), attribute
    assert ("head_dim" in repr(layer)) == (layer.embed_dim != layer.num_heads * layer.head_dim)


@both
def test_seeds_give_what_they_gave(library):
    """Whatever is new, a layer of old arguments has the same weights: one draw for all rows of in_proj_weight."""
    layer, rng = library.MultiHeadAttention(12, 3, seed=5), np.random.default_rng(5)
    bound = math.sqrt(6 / (36 + 12))
    np.testing.assert_array_equal(layer.in_proj_weight, rng.uniform(-bound, bound, (36, 12)).astype(np.float32))


# Tensors of torch.


class Tensor:
    """What a torch tensor is like, of which NumPy reads neither bfloat16 nor one with a gradient."""

    __module__ = "torch"

    def __init__(self, array, dtype, requires_grad=False, device="cpu"):
        self.array, self.dtype, self.requires_grad, self.device = array, dtype, requires_grad, device

    def detach(self):
        return Tensor(self.array, self.dtype)

    def float(self):
        return Tensor(self.array.astype(np.float32), "torch.float32")

    def numpy(self):
        if self.requires_grad or self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array

    def __array__(self, dtype=None, copy=None):
        return self.numpy()


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=lambda x: x.__name__)
def test_state_of_tensors(library, dtype):
    """bfloat16, with gradients, of every second column: exactly these numbers."""
    layer = make(library, "plain", dtype=dtype)
    narrow = {key: array.astype(ml_dtypes.bfloat16) for key, array in layer.state_dict().items()}
    expected, given = make(library, "plain", dtype=dtype, seed=3), make(library, "plain", dtype=dtype, seed=4)
    expected.load_state_dict(narrow)
    given.load_state_dict({key: Tensor(array.repeat(2, -1)[..., ::2], "torch.bfloat16", requires_grad=True)
                           for key, array in narrow.items()})
    for key, array in expected.state_dict().items():
        np.testing.assert_array_equal(given.state_dict()[key], array)
    given.load_state_dict({key: Tensor(array, "torch.float32", requires_grad=True)
                           for key, array in layer.state_dict().items()})
    np.testing.assert_array_equal(given.in_proj_weight, layer.in_proj_weight)


@both
def test_torch_modules(library):
    """The outputs of torch's own layers of the same weights, whatever their dtype."""
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(12, 3, kdim=5, vdim=7, batch_first=True, dtype=torch.float64).eval()
    torch.nn.init.normal_(theirs.in_proj_bias)
    torch.nn.init.normal_(theirs.out_proj.bias)
    ours = make(library, "cross-attention")
    ours.load_state_dict(theirs.state_dict())
    ours.load_state_dict(dict(theirs.named_parameters()))  # with gradients
    arrays = inputs(ours)
    ignored = np.arange(7) >= np.array([[4], [7]])
    with torch.no_grad():
        expected, _ = theirs(*map(torch.from_numpy, arrays), key_padding_mask=torch.from_numpy(ignored))
    np.testing.assert_allclose(ours(*arrays, key_mask=~ignored), expected.numpy(), rtol=1e-12, atol=1e-12)
    back = torch.nn.MultiheadAttention(12, 3, kdim=5, vdim=7, dtype=torch.float64)
    back.load_state_dict({key: torch.from_numpy(array) for key, array in ours.state_dict("torch_split").items()})
    for dtype in (torch.bfloat16, torch.float16):
        state = theirs.to(dtype).state_dict()
        ours.load_state_dict(state)
        np.testing.assert_array_equal(ours.k_proj_weight, state["k_proj_weight"].double().numpy())


@both
def test_no_bias_kv_of_torch(library):
    torch = pytest.importorskip("torch")
    state = torch.nn.MultiheadAttention(12, 3, add_bias_kv=True).state_dict()
    with pytest.raises(ValueError, match=r"^state: expected no 'bias_k' and 'bias_v'"):
        library.MultiHeadAttention(12, 3).load_state_dict(state)


# key_mask.


@both
@pytest.mark.parametrize("name", ["plain", "cross-attention"])
def test_key_mask(library, name):
    layer = make(library, name)
    arrays = inputs(layer)
    key_mask = np.array([[True, False, True, True, False, True, False], [False, True, True, True, True, True, True]])
    expected = by_formula(layer, *arrays, attn_mask=key_mask[:, None, :])
    close = {"rtol": 1e-12, "atol": 1e-13}
    np.testing.assert_allclose(layer(*arrays, key_mask=key_mask), expected, **close)
    np.testing.assert_allclose(layer(*(x[1] for x in arrays), key_mask=key_mask[1].tolist()), expected[1], **close)
    garbage = [x.copy() for x in arrays]
    for array in garbage[1:]:
        array[~key_mask] = np.nan
    np.testing.assert_array_equal(layer(*garbage, key_mask=key_mask), layer(*arrays, key_mask=key_mask))
    # With other masks, of every kind: both have to allow a key.
    rng = np.random.default_rng(2)
    for shape in [(5, 7), (2, 5, 7), (2, 3, 5, 7), (1, 1, 1, 7)]:
        seen = rng.random(shape) < 0.7
        bias = rng.standard_normal(shape)
        four = seen[:, None] if seen.ndim == 3 else seen
        both_masks = key_mask[:, None, None, :] & four
        np.testing.assert_array_equal(layer(*arrays, key_mask=key_mask, attn_mask=seen),
                                      layer(*arrays, attn_mask=both_masks))
        four = bias[:, None] if bias.ndim == 3 else bias
        for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
            narrow = four.astype(dtype)
            np.testing.assert_array_equal(
                layer(*arrays, key_mask=key_mask, attn_mask=bias.astype(dtype)),
                layer(*arrays, attn_mask=np.where(key_mask[:, None, None, :], narrow, narrow.dtype.type(-np.inf))))
    causal = np.tri(5, 7, 2, dtype=bool) & key_mask[:, None, :]
    np.testing.assert_allclose(layer(*arrays, key_mask=key_mask, is_causal=True, q_offset=2),
                               layer(*arrays, attn_mask=causal), **close)
    np.testing.assert_allclose(layer(*arrays, key_mask=key_mask, kv_lens=[4, 3]),
                               layer(*arrays, key_mask=key_mask & (np.arange(7) < [[4], [3]])), **close)


def test_masks_beside_a_key_mask():
    """What is wrong with them is said as without."""
    layer, x = cattn.MultiHeadAttention(12, 3), np.ones((2, 4, 12), np.float32)
    key_mask = np.arange(4) < np.array([[2], [4]])
    for mask in (np.ones((4, 4), int), np.ones((4, 4), ">f4"), np.full((4, 4), "a"), np.full((4, 4), None)):
        messages = []
        for options in ({}, {"key_mask": key_mask}):
            with pytest.raises(TypeError, match=r"^attn_mask: expected bool \(True = attend\) or a float") as raised:
                layer(x, attn_mask=mask, **options)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    with pytest.warns(UserWarning, match=r"^attn_mask: a float mask that holds only 0 and 1"):
        layer(x, attn_mask=np.tri(4), key_mask=key_mask)


@both
def test_bad_key_masks(library):
    layer = library.MultiHeadAttention(12, 3)
    x = np.ones((2, 4, 12), np.float32)
    for mask, error, message in [
        (np.ones((2, 5), bool), ValueError, "key_mask: expected shape (batch, seq_len_kv) = (2, 4), got shape (2, 5); "
                                            "a mask of queries and keys is attn_mask"),
        (np.ones((2, 1, 1, 4), bool), ValueError, "key_mask: expected shape (batch, seq_len_kv) = (2, 4), got shape "
                                                  "(2, 1, 1, 4); a mask of queries and keys is attn_mask"),
        (np.ones(4, bool), ValueError, "key_mask: expected shape (batch, seq_len_kv) = (2, 4), got shape (4,)"),
        (True, ValueError, "key_mask: expected shape (batch, seq_len_kv) = (2, 4), got shape ()"),
        (np.ones((2, 4), int), TypeError,
         "key_mask: expected bool (True = attend), got dtype int64; for 1 = attend: key_mask.astype(bool)"),
        (np.ones((2, 4)), TypeError,
         "key_mask: expected bool (True = attend), got dtype float64; what is added to the scores is attn_mask"),
        (np.array([["a"] * 4] * 2), TypeError, "key_mask: expected bool (True = attend), got dtype <U1"),
    ]:
        with pytest.raises(error) as raised:
            layer(x, key_mask=mask)
        assert str(raised.value) == message
    with pytest.raises(ValueError, match=r"^key_mask: expected shape \(seq_len_kv,\) = \(4,\), got shape \(2, 4\)"):
        layer(x[0], key_mask=np.ones((2, 4), bool))
    for mask in (np.ones(4, bool), np.ones((2, 4), bool)[:, None][:, 0][:1].repeat(3, 0)):
        with pytest.raises(ValueError, match=r"; for a padding mask: key_mask, or kv_lens$|got shape \(3, 4\)$"):
            layer(x, attn_mask=mask)


# Positions from an offset.


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_positions_of_a_step(library, dtype):
    layer = library.PositionalEncoding(6, 0.3, max_len=8, dtype=dtype)
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 6)).astype(dtype)
    whole, dropped = layer(x), layer(x, training=True, seed=3)
    for step in range(5):
        np.testing.assert_array_equal(layer(x[..., step : step + 1, :], offset=step), whole[..., step : step + 1, :])
        np.testing.assert_array_equal(layer(x[..., step : step + 1, :], offset=step, training=True, seed=3),
                                      dropped[..., step : step + 1, :])
    assert layer.P.shape == (1, 8, 6)
    late = layer(x, offset=5)
    assert layer.P.shape == (1, 16, 6)  # it grew
    np.testing.assert_array_equal(late, x + layer.P[0, 5:10])
    np.testing.assert_array_equal(layer(x, positions=np.arange(5, 10)), late)
    positions = np.random.default_rng(1).integers(0, 16, (2, 1, 5))
    np.testing.assert_array_equal(layer(x, positions=positions), x + layer.P[0][positions])
    np.testing.assert_array_equal(layer(x, positions=positions.astype(np.uint8).tolist()), x + layer.P[0][positions])
    np.testing.assert_array_equal(layer(x[0, 0], positions=[3, 3, 0, 40, 1]), x[0, 0] + layer.P[0][[3, 3, 0, 40, 1]])
    assert layer.P.shape == (1, 41, 6)
    assert layer(x[:0], offset=10**9).shape == (0, 3, 5, 6) and layer.P.shape == (1, 41, 6)
    many = np.zeros((3, 100_000, 6), dtype)  # more numbers than are looked at at a time
    numbers = np.random.default_rng(2).integers(0, 41, (3, 100_000))
    np.testing.assert_array_equal(layer(many, positions=numbers), layer.P[0][numbers])


@both
@pytest.mark.parametrize(("options", "error", "message"), [
    ({"offset": -1}, ValueError, "offset: expected an int >= 0, got -1"),
    ({"offset": 1.0}, TypeError, "offset: expected an int, got 1.0"),
    ({"offset": 2**53}, ValueError, "offset: expected positions within 2**53, got 9007199254740992 and 3 rows"),
    ({"positions": [0, 1, -1]}, ValueError, "positions: expected ints from 0 to below 2**53, got -1"),
    ({"positions": [0, 1, 2**53]}, ValueError, "positions: expected ints from 0 to below 2**53, got 9007199254740992"),
    ({"positions": [0, 1]}, ValueError,
     "positions: expected one for each row, shape (2, 3) or axes that broadcast to it, got shape (2,)"),
    ({"positions": np.zeros((1, 2, 3), int)}, ValueError,
     "positions: expected one for each row, shape (2, 3) or axes that broadcast to it, got shape (1, 2, 3)"),
    ({"positions": np.ones(3)}, TypeError,
     "positions: expected integers, got dtype float64; positions.astype(int) casts"),
    ({"positions": [0, 1, 2], "offset": 1}, ValueError, "offset: expected 0 with positions, got 1"),
], ids=["negative", "float", "far", "a negative one", "a far one", "too few", "too many axes", "floats", "both"])
def test_bad_positions(library, options, error, message):
    layer = library.PositionalEncoding(4)
    with pytest.raises(error) as raised:
        layer(np.zeros((2, 3, 4), np.float32), **options)
    assert str(raised.value) == message
