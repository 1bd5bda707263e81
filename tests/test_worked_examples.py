"""The numbers of the documents that the library started from, to the digits printed there."""

import numpy as np
import pytest

import cattn
import cattn.reference

pytestmark = pytest.mark.parametrize("library", [cattn, cattn.reference], ids=["public", "reference"])


def printed(array, expected, decimals):
    """Equal to the numbers as printed: off by at most half a unit of the last digit."""
    np.testing.assert_allclose(array, expected, rtol=0, atol=0.5001 * 10.0**-decimals)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)], ids=str)
def test_scaled_dot_product(library, dtype, leading):
    query = [[0.3367, 0.1288], [0.2345, 0.2303], [-1.1229, -0.1863]]
    key = [[2.2082, -0.6380], [0.4617, 0.2674], [0.5349, 0.8094]]
    value = [[1.1103, -1.6898], [-0.9890, 0.9580], [1.3221, 0.8172]]
    query, key, value = (np.broadcast_to(np.array(x, dtype), (*leading, 3, 2)) for x in (query, key, value))
    values, attention = library.scaled_dot_product_attention(query, key, value, return_weights=True)
    assert values.shape == (*attention.shape[:-1], 2) == (*leading, 3, 2)
    expected_weights = [[0.4028, 0.2886, 0.3086], [0.3538, 0.3069, 0.3393], [0.1303, 0.4630, 0.4067]]
    expected_values = [[0.5698, -0.1520], [0.5379, -0.0265], [0.2246, 0.5556]]
    printed(attention, np.broadcast_to(expected_weights, attention.shape), 4)
    # The inputs are rounded to 4 digits as well, which moves one value by 0.06 of the last digit.
    np.testing.assert_allclose(values, np.broadcast_to(expected_values, values.shape), rtol=0, atol=0.6e-4)


def test_row_that_sees_nothing_is_zero_not_uniform(library):
    query, key, value = np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 2))
    mask = np.array([[True, True, True], [False, False, False], [True, False, False]])
    values, attention = library.scaled_dot_product_attention(query, key, value, mask, return_weights=True)
    assert attention.tolist() == [[1 / 3] * 3, [0.0] * 3, [1.0, 0.0, 0.0]]
    assert values[1].tolist() == [0.0, 0.0]


def test_variance_of_the_scores(library):
    """q and k with variance s^2 give scores of variance s^4 * d_k, and s^4 once scaled."""
    rng = np.random.default_rng(0)
    s, d_k = 2.0, 64
    query, key = s * rng.standard_normal((2, 500, d_k))
    value = np.ones((500, 1))
    for scale, variance in ((1.0, s**4 * d_k), (None, s**4)):
        _, weights, logsumexp = library.scaled_dot_product_attention(
            query / 30, key, value, scale=scale, return_weights=True, return_logsumexp=True
        )
        scores = 30 * (np.log(weights) + logsumexp[:, None])
        assert scores.var() == pytest.approx(variance, rel=0.05)


def test_unscaled_scores_saturate(library):
    """With scale 1, scores spread by sqrt(d_k): one key has the weight of most rows, whose gradients vanish.

    By its scores, a row of weights w, the largest 1 - e, has the gradient w (u - sum(w u)), u being grad_out @ value^T:
    e times the range of u at most in the largest, w times that in each other, sqrt(2) e times it in all.

    Of 16 scores that spread by s, the two largest are more than 0.36 s apart in half of the rows, where e is then
    exp(-0.36 sqrt(512)) = 3e-4 and less. With 200 seeds, the median row had 1/350 to 1/2600 of the gradient.
    """
    rng = np.random.default_rng(0)
    d_k = 512
    query, key = rng.standard_normal((1000, d_k)), rng.standard_normal((16, d_k))
    value, grad_out = rng.standard_normal((16, 64)), rng.standard_normal((1000, 64))
    bias = np.zeros((1000, 16))  # its gradient is that of the scores
    of_weights = grad_out @ value.T
    # Sums of 64 products, and weights that are off by the rounding of scores: below 100, sums of 512 products.
    rounding = 2 * d_k * np.finfo(float).eps * (np.abs(grad_out) @ np.abs(value.T)).max()
    medians = []
    for scale in (None, 1.0):
        out, weights, logsumexp = library.scaled_dot_product_attention(
            query, key, value, bias, scale=scale, return_weights=True, return_logsumexp=True
        )
        gradients = library.scaled_dot_product_attention_backward(
            grad_out, query, key, value, out, logsumexp, bias, scale=scale, wanted=("query", "attn_mask")
        )
        of_scores, of_query = (np.linalg.norm(x, axis=1) for x in (gradients.attn_mask, gradients.query))
        rest = 1 - weights.max(axis=1)
        assert (of_scores <= np.sqrt(2) * rest * np.ptp(of_weights, axis=1) + rounding).all()
        medians.append([np.median(x) for x in (rest, of_scores, of_query)])
    scaled, unscaled = medians
    assert unscaled[0] < 1e-3 < 0.5 < scaled[0]
    assert unscaled[1] < scaled[1] / 100
    assert unscaled[2] < scaled[2] * np.sqrt(d_k) / 100  # by the query: times the scale


def tutorial_multihead(x, state, num_heads, mask=None):
    """The forward pass as it is printed there."""
    batch, seq, _ = x.shape
    qkv = x @ state["qkv_proj.weight"].T + state["qkv_proj.bias"]
    qkv = qkv.reshape(batch, seq, num_heads, -1).transpose(0, 2, 1, 3)
    q, k, v = np.split(qkv, 3, axis=-1)
    logits = q @ k.swapaxes(-2, -1) / np.sqrt(q.shape[-1])
    if mask is not None:
        while mask.ndim < 4:  # 2 axes: for all; 3 axes: one for each batch element
            mask = mask[None] if mask.ndim == 2 else mask[:, None]
        logits = np.where(mask == 0, -9e15, logits)
    attention = np.exp(logits - logits.max(axis=-1, keepdims=True))
    attention /= attention.sum(axis=-1, keepdims=True)
    values = (attention @ v).transpose(0, 2, 1, 3).reshape(batch, seq, -1)
    return values @ state["o_proj.weight"].T + state["o_proj.bias"], attention


@pytest.mark.parametrize("mask_axes", [None, 2, 3, 4])
def test_multihead_layout_and_masks(library, mask_axes):
    rng = np.random.default_rng(1)
    batch, seq, num_heads, input_dim, embed_dim = 2, 5, 4, 6, 12
    state = {
        "qkv_proj.weight": rng.standard_normal((3 * embed_dim, input_dim)),
        "qkv_proj.bias": rng.standard_normal(3 * embed_dim),
        "o_proj.weight": rng.standard_normal((embed_dim, embed_dim)),
        "o_proj.bias": rng.standard_normal(embed_dim),
    }
    layer = library.MultiHeadAttention(embed_dim, num_heads, input_dim=input_dim, dtype=np.float64)
    layer.load_state_dict(state)
    x = rng.standard_normal((batch, seq, input_dim))
    mask = None
    if mask_axes is not None:
        shape = {2: (seq, seq), 3: (batch, seq, seq), 4: (batch, num_heads, seq, seq)}[mask_axes]
        mask = (rng.random(shape) < 0.6) | np.eye(seq, dtype=bool)
    out, weights = layer(x, attn_mask=mask, return_weights=True)
    expected_out, expected_weights = tutorial_multihead(x, state, num_heads, mask)
    np.testing.assert_allclose(out, expected_out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-12, atol=1e-15)


def test_multihead_initialisation(library):
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim = 10, got 4"):
        library.MultiHeadAttention(10, 4)
    state = library.MultiHeadAttention(32, 4, input_dim=20, seed=0).state_dict("tutorial")
    bound = np.sqrt(6 / (20 + 96))
    assert state["qkv_proj.weight"].shape == (96, 20)
    assert 0.95 * bound < np.abs(state["qkv_proj.weight"]).max() <= bound
    assert np.abs(state["o_proj.weight"]).max() <= np.sqrt(6 / 64)
    assert not state["qkv_proj.bias"].any() and not state["o_proj.bias"].any()


def test_unscaled_from_weight_matrices(library):
    x = np.array([[1, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]], np.float64)
    w_key = np.array([[0, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 0]])
    w_query = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 1]])
    w_value = np.array([[0, 2, 0], [0, 3, 0], [1, 0, 3], [1, 1, 0]])
    key, query, value = x @ w_key, x @ w_query, x @ w_value
    assert key.tolist() == [[0, 1, 1], [4, 4, 0], [2, 3, 1]]
    assert query.tolist() == [[1, 0, 2], [2, 2, 2], [2, 1, 3]]
    assert value.tolist() == [[1, 2, 3], [2, 8, 0], [2, 6, 3]]
    out, weights, logsumexp = library.scaled_dot_product_attention(
        query, key, value, scale=1, return_weights=True, return_logsumexp=True
    )
    scores = np.log(weights) + logsumexp[:, None]
    np.testing.assert_allclose(scores, [[2, 4, 4], [4, 16, 12], [4, 12, 10]], rtol=1e-12)
    expected_weights = [
        [0.063379, 0.468311, 0.468311], [0.000006, 0.982008, 0.017986], [0.000295, 0.880537, 0.119168]
    ]
    expected_out = [
        [1.936621, 6.683105, 1.595068], [1.999994, 7.963992, 0.053976], [1.999705, 7.759892, 0.358389]
    ]
    printed(weights, expected_weights, 6)
    printed(out, expected_out, 6)


def test_shapes_of_separate_heads(library):
    """(N, seq, heads, head_dim) in; weights (N, heads, query_len, key_len); out (N, query_len, embed_dim)."""
    rng = np.random.default_rng(2)
    values, keys, queries = rng.standard_normal((3, 2, 7, 4, 8))
    out, weights = library.scaled_dot_product_attention(
        *(x.transpose(0, 2, 1, 3) for x in (queries[:, :5], keys, values)), return_weights=True
    )
    assert weights.shape == (2, 4, 5, 7)
    assert out.transpose(0, 2, 1, 3).reshape(2, 5, 32).shape == (2, 5, 32)


def test_encoder_attention_shapes(library):
    rng = np.random.default_rng(3)
    embeddings = rng.standard_normal((4, 6))  # I love my dog
    query, key, value = (embeddings @ rng.standard_normal((6, 5)) for _ in range(3))
    out, weights = library.scaled_dot_product_attention(query, key, value, return_weights=True)
    assert (query.shape, weights.shape, out.shape) == ((4, 5), (4, 4), (4, 5))
    row, row_weights = library.scaled_dot_product_attention(query[:1], key, value, return_weights=True)
    assert (row.shape, row_weights.shape) == ((1, 5), (1, 4))
    np.testing.assert_allclose(row[0], out[0], rtol=1e-12)


def test_sinusoidal_table(library):
    table = library.sinusoidal_encoding(3, 4)  # I am good
    printed(table[:, :2], [[0, 1], [0.841, 0.54], [0.909, -0.416]], 3)
    printed(table[:, 2], [0, 0.01, 0.02], 3)
    printed(table[:, 3], [1, 0.99995, 0.9998], 5)


def test_columns_6_7_turn_faster_than_8_9(library):
    table = library.sinusoidal_encoding(60, 32, dtype=np.float64)
    turn = [np.arctan2(table[1, c], table[1, c + 1]) for c in (6, 8)]
    np.testing.assert_allclose(turn, [10000 ** (-6 / 32), 10000 ** (-8 / 32)], rtol=1e-12)
    assert turn[0] > turn[1]


@pytest.mark.parametrize("delta", [1, 7, -3])
def test_relative_positions(library, delta):
    dim = 32
    table = library.sinusoidal_encoding(60, dim, dtype=np.float64)
    for j in range(dim // 2):
        w = 10000 ** (-2 * j / dim)
        turn = np.array([[np.cos(delta * w), np.sin(delta * w)], [-np.sin(delta * w), np.cos(delta * w)]])
        pair = table[10, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(turn @ pair, table[10 + delta, 2 * j : 2 * j + 2], rtol=0, atol=1e-13)
    shifted = table[10:50] @ library.relative_shift(delta, dim)
    np.testing.assert_allclose(shifted, table[10 + delta : 50 + delta], rtol=0, atol=1e-13)


def test_positional_encoding_layer(library):
    layer = library.PositionalEncoding(32)
    assert layer.P.shape == (1, 1000, 32)
    out = layer(np.zeros((1, 60, 32), np.float32))
    np.testing.assert_array_equal(out, layer.P[:, :60, :32])


def test_positions_make_order_matter(library):
    """The middle word scores 0 with both others; with positions 0.61 and 0.99, and not the same swapped."""
    words = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    positions = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])

    def scores(x):
        _, weights, logsumexp = library.scaled_dot_product_attention(
            x, x, x, scale=1.0, return_weights=True, return_logsumexp=True
        )
        return (np.log(weights) + logsumexp[:, None])[1]

    swapped = words[[2, 1, 0]]
    np.testing.assert_allclose(scores(words)[[0, 2]], [0, 0], atol=1e-12)
    np.testing.assert_allclose(scores(swapped)[[0, 2]], [0, 0], atol=1e-12)
    np.testing.assert_allclose(scores(words + positions)[[0, 2]], [0.61, 0.99], rtol=1e-12)
    assert np.abs(scores(swapped + positions)[[0, 2]] - [0.61, 0.99]).min() > 0.1
