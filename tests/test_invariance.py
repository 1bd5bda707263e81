"""What must not matter does not change a bit: threads, batch mates, padding, strides, what else is asked for."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from problems import (
    BFLOAT16,
    DTYPES,
    EDGES,
    FLOATS,
    INF,
    LAYOUTS,
    NAN,
    TILES,
    assert_same_bits,
    calls,
    normal,
    problem,
)
from tolerance import everything

import cattn
from cattn import _kernels

attention = cattn.scaled_dot_product_attention

all_dtypes = pytest.mark.parametrize(
    ("dtype", "kv_dtype"), DTYPES, ids=[f"{q}" if q == kv else f"{q}-{kv}" for q, kv in DTYPES]
)


def some_options(num_heads, batch, seq_len_kv):
    """Everything at once, for 2 batch rows or more."""
    rng = np.random.default_rng(0)
    return {
        "is_causal": True, "q_offset": rng.integers(0, seq_len_kv, batch), "window": (seq_len_kv // 2, None),
        "softcap": 5.0, "alibi_slopes": rng.random((batch, num_heads)), "sinks": rng.standard_normal(num_heads),
        "kv_lens": rng.integers(seq_len_kv // 2, seq_len_kv, batch),
        "attn_mask": np.where(rng.random((batch, 1, 1, seq_len_kv)) < 0.9, 0.5, -INF),
    }


# Shapes: prefill with blocks of rows that threads share out in other ways, few rows (decoding), few rows in groups, and
# keys enough to be split between threads.
SHAPES = {
    "prefill": {"seq_len_q": 210, "seq_len_kv": 300, "num_heads": 3, "head_dim": 33},
    "one head": {"seq_len_q": 100, "seq_len_kv": 140, "num_heads": 1, "head_dim": 64},
    "grouped": {"seq_len_q": 50, "seq_len_kv": 300, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64},
    "decode": {"seq_len_q": 1, "seq_len_kv": 3000, "num_heads": 4, "head_dim": 64},
    "grouped decode": {"seq_len_q": 2, "seq_len_kv": 3000, "num_heads": 8, "num_kv_heads": 2, "head_dim": 40},
    "long": {"seq_len_q": 20, "seq_len_kv": 9000, "num_heads": 1, "head_dim": 16},
}
shapes = pytest.mark.parametrize("shape", SHAPES)


@functools.cache
def arrays_of(shape, dtype=FLOATS[0], kv_dtype=None):
    return problem(**SHAPES[shape], dtype=dtype, kv_dtype=kv_dtype)


@functools.cache
def options_of(shape):
    return some_options(SHAPES[shape]["num_heads"], 2, SHAPES[shape]["seq_len_kv"])


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_any_call(isa, call):
    """Copies of the inputs, other numbers of threads, and with or without what else there is to ask for."""
    arrays, options = call
    options.pop("num_threads", None)
    out, weights, logsumexp = everything(*arrays, **options)
    copies = [x.copy() for x in arrays]
    if "attn_mask" in options:
        options["attn_mask"] = np.array(options["attn_mask"], order="C")
    assert_same_bits(everything(*copies, **options, num_threads=5), (out, weights, logsumexp))
    given_out = np.empty(out.shape[::-1], out.dtype).T
    assert_same_bits(attention(*arrays, **options, num_threads=3, out=given_out).copy(), out)


@all_dtypes
@shapes
def test_threads(isa, shape, dtype, kv_dtype):
    arrays = arrays_of(shape, dtype, kv_dtype)
    for options in ({}, {"is_causal": True, "q_offset": 0}, options_of(shape) | {"dropout_p": 0.1, "seed": 1}):
        expected = attention(*arrays, num_threads=1, return_logsumexp=True, **options)
        with_weights = everything(*arrays, num_threads=1, **options)
        for num_threads in (2, 3, 7):
            assert_same_bits(attention(*arrays, num_threads=num_threads, return_logsumexp=True, **options), expected)
            assert_same_bits(everything(*arrays, num_threads=num_threads, **options), with_weights)


@pytest.mark.parametrize("rows", [3, 20, 400])
def test_parts_of_tasks_of_many_lengths(isa, rows):
    """Threads take splits of the keys that some row sees, of tasks with none, one and many of them."""
    query, key, value = problem(rows, 60_000, 5, leading=(3,), num_heads=1)
    for options in ({"kv_lens": [60_000, 0, 9000]}, {"kv_lens": [3, 1, 60_000], "is_causal": True, "q_offset": 50_000},
                    {"is_causal": True, "q_offset": [0, 59_000, -5000], "window": (9000, 0)},
                    {"window": (5000, 5000), "q_offset": 30_000, "alibi_slopes": [0.01], "sinks": [1.0]}):
        expected = attention(query, key, value, num_threads=1, return_logsumexp=True, **options)
        for num_threads in (2, 3, 5):
            results = attention(query, key, value, num_threads=num_threads, return_logsumexp=True, **options)
            assert_same_bits(results, expected)


@shapes
def test_repeated_and_concurrent_calls(isa, shape):
    arrays, options = arrays_of(shape), options_of(shape)
    expected = everything(*arrays, **options)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(everything, *arrays, **options, num_threads=1 + number % 2) for number in range(12)]
        for future in futures:
            assert_same_bits(future.result(), expected)
    assert_same_bits(everything(*arrays, **options), expected)


@all_dtypes
@shapes
def test_batch_mates(isa, shape, dtype, kv_dtype):
    """A batch row alone gives what it gives beside others, whatever those hold. (Dropout depends on the index.)"""
    arrays, options = arrays_of(shape, dtype, kv_dtype), options_of(shape)
    expected = everything(*arrays, **options)
    plain = everything(*arrays)
    for row in (slice(0, 1), slice(1, 2)):
        own = {name: option[row] if name in ("q_offset", "alibi_slopes", "kv_lens", "attn_mask") else option
               for name, option in options.items()}
        alone = [x[row] for x in arrays]
        assert_same_bits(everything(*alone, **own), tuple(x[row] for x in expected))
        assert_same_bits(everything(*alone), tuple(x[row] for x in plain))
        spoilt = [x.copy() for x in arrays]
        for x in spoilt:
            x[1 - row.start] = NAN
        assert_same_bits(tuple(x[row] for x in everything(*spoilt, **options)), tuple(x[row] for x in expected))


@shapes
def test_other_rows_and_heads(isa, shape):
    """NaN in one query, or in one head, stays there."""
    arrays = arrays_of(shape)
    expected = attention(*arrays)
    spoilt = arrays[0].copy()
    spoilt[:, 0, 0] = NAN
    out = attention(spoilt, *arrays[1:])
    assert np.isnan(out[:, 0, 0]).all()
    assert_same_bits(out[:, 0, 1:], expected[:, 0, 1:])
    assert_same_bits(out[:, 1:], expected[:, 1:])


@all_dtypes
@shapes
def test_padding_behind_the_lengths(isa, shape, dtype, kv_dtype):
    """Longer arrays with any garbage at and past kv_lens: the same bits, up to a block more or less."""
    query, key, value = arrays_of(shape, dtype, kv_dtype)
    full = key.shape[2]
    for length in (full, full - 1, 129, 128, 64, 3):
        expected = attention(query, key[:, :, :length], value[:, :, :length], return_logsumexp=True)
        for more in (1, 200):
            padded = [np.full((2, x.shape[1], length + more, x.shape[3]), NAN, kv_dtype) for x in (key, value)]
            for long, short in zip(padded, (key, value), strict=True):
                long[:, :, :length] = short[:, :, :length]
            for garbage in (NAN, INF):
                for long in padded:
                    long[:, :, length:] = garbage
                lengths = np.full(2, length)
                out, weights, logsumexp = everything(query, *padded, kv_lens=lengths)
                assert_same_bits((out, logsumexp), expected)
                assert not weights[..., length:].any()


def differentiate(*given, wanted=cattn.Gradients._fields, backward=cattn.scaled_dot_product_attention_backward,
                  **options):
    """{name: gradient} of those that there are."""
    gradients = backward(*given, **options, wanted=wanted)
    return {name: gradient for name, gradient in gradients._asdict().items() if gradient is not None}


def forward_of(arrays, options, row=slice(None)):
    """What `differentiate` takes of a forward pass over these batch rows, and their options."""
    query, key, value = (x[row] for x in arrays)
    options = {name: option[row] if name in ("q_offset", "alibi_slopes", "kv_lens", "attn_mask") and np.ndim(option)
               else option for name, option in options.items()}
    out, logsumexp = attention(query, key, value, **options, return_logsumexp=True)
    grad_out = normal(len(arrays[0]), *out.shape[1:], dtype=out.dtype, seed=1)[row]
    return (grad_out, query, key, value, out, logsumexp), options


def gradients_of(arrays, options, row=slice(None), **more):
    given, options = forward_of(arrays, options, row)
    return differentiate(*given, **options, **more)


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert_same_bits(tuple(found.values()), tuple(expected.values()))


@all_dtypes
@shapes
def test_gradients_by_any_threads(isa, shape, dtype, kv_dtype):
    arrays = arrays_of(shape, dtype, kv_dtype)
    for options in ({}, {"is_causal": True, "q_offset": 0}, options_of(shape) | {"dropout_p": 0.1, "seed": 1}):
        expected = gradients_of(arrays, options, num_threads=1)
        for num_threads in (2, 3, 7):
            assert_same_gradients(gradients_of(arrays, options, num_threads=num_threads), expected)


@all_dtypes
@shapes
def test_gradients_of_batch_mates(isa, shape, dtype, kv_dtype):
    """Those of sinks, which all batch rows share, are the sum over them."""
    arrays = arrays_of(shape, dtype, kv_dtype)
    for options in ({}, options_of(shape)):
        expected = gradients_of(arrays, options)
        for row in (slice(0, 1), slice(1, 2)):
            alone = gradients_of(arrays, options, row)
            assert alone.keys() == expected.keys()
            for name in alone.keys() - {"sinks"}:
                assert_same_bits(alone[name], expected[name][row])


@shapes
def test_gradients_again_and_at_once(isa, shape):
    given, options = forward_of(arrays_of(shape), options_of(shape))
    expected = differentiate(*given, **options)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(differentiate, *given, **options, num_threads=1 + number % 2) for number in range(8)]
        for future in futures:
            assert_same_gradients(future.result(), expected)


@all_dtypes
@shapes
def test_gradients_wanted_alone(isa, shape, dtype, kv_dtype):
    given, options = forward_of(arrays_of(shape, dtype, kv_dtype), options_of(shape))
    expected = differentiate(*given, **options)
    for name in expected:
        assert_same_bits(differentiate(*given, **options, wanted=[name])[name], expected[name])


@shapes
def test_gradients_of_other_rows_and_heads(isa, shape):
    """NaN in one query reaches the gradients of its own head's keys, and no other row's."""
    arrays = arrays_of(shape)
    (grad_out, query, *given), _ = forward_of(arrays, {})
    expected = differentiate(grad_out, query, *given)
    query = query.copy()
    query[:, 0, 0] = NAN
    found = differentiate(grad_out, query, *given)
    assert np.isnan(found["query"][:, 0, 0]).all() and np.isnan(found["key"][:, 0]).all()
    assert_same_bits(found["query"][:, 0, 1:], expected["query"][:, 0, 1:])
    assert_same_bits(found["query"][:, 1:], expected["query"][:, 1:])
    for name in "key", "value":
        assert_same_bits(found[name][:, 1:], expected[name][:, 1:])


@all_dtypes
@pytest.mark.parametrize("shape", ["prefill", "decode", "grouped"])
def test_gradients_of_padding(isa, shape, dtype, kv_dtype):
    """Longer arrays with any garbage at and past kv_lens: the same bits, and 0 behind."""
    query, key, value = arrays_of(shape, dtype, kv_dtype)
    for length in (300, 129, 128, 3):
        (grad_out, *_, out, logsumexp), _ = forward_of((query, key[:, :, :length], value[:, :, :length]), {})
        expected = differentiate(grad_out, query, key[:, :, :length], value[:, :, :length], out, logsumexp)
        for more, garbage in ((1, NAN), (600, INF)):
            padded = [np.full((2, x.shape[1], length + more, x.shape[3]), garbage, kv_dtype) for x in (key, value)]
            for long, short in zip(padded, (key, value), strict=True):
                long[:, :, :length] = short[:, :, :length]
            found = differentiate(grad_out, query, *padded, out, logsumexp, kv_lens=np.full(2, length))
            assert not found["key"][:, :, length:].any() and not found["value"][:, :, length:].any()
            assert_same_gradients(
                {name: x if name == "query" else x[:, :, :length] for name, x in found.items()}, expected)


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(isa, layout, dtype, kv_dtype):
    for shape in ("decode", "grouped"):
        arrays = [x[:1, :, :, :17] for x in arrays_of(shape, dtype, kv_dtype)]
        mask = normal(1, 1, arrays[0].shape[2], arrays[1].shape[2], dtype=dtype)
        given, _ = forward_of(arrays, {"attn_mask": mask})
        expected = differentiate(*given, attn_mask=mask)
        strided = [*(LAYOUTS[layout](x) for x in given[:-1]), LAYOUTS[layout](given[-1][..., None])[..., 0]]
        assert_same_gradients(differentiate(*strided, attn_mask=LAYOUTS[layout](mask)), expected)
        for number, x in enumerate(strided):
            one = (*given[:number], x, *given[number + 1:])
            assert_same_gradients(differentiate(*one, attn_mask=mask), expected)


@all_dtypes
@pytest.mark.parametrize("lens", [(1, 2, 700, 0, 90, 130, 33), (300, 200, 100)], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"window": (100, 20), "softcap": 3.0, "sinks": np.ones(4)},
], ids=["nothing", "causal", "options"])
def test_gradients_of_packed_sequences(isa, options, lens, dtype, kv_dtype):
    """Each sequence's are those that it has alone. What they share has the sum over them."""
    cu_seqlens_kv, lens_q = np.cumsum([0, *lens]), [2 * n // 3 for n in lens[::-1]]
    cu_seqlens_q = np.cumsum([0, *lens_q])
    query, grad_out = (normal(cu_seqlens_q[-1], 4, 40, dtype=dtype, seed=seed) for seed in (0, 1))
    key, value = (normal(cu_seqlens_kv[-1], 2, 40, dtype=kv_dtype, seed=seed) for seed in (2, 3))
    options = options | {"alibi_slopes": np.linspace(0, 0.1, 4 * len(lens)).reshape(-1, 4), "q_offset": "end"}
    out, logsumexp = cattn.varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_kv, **options,
                                            return_logsumexp=True)
    packed = differentiate(grad_out, query, key, value, out, logsumexp, cu_seqlens_q, cu_seqlens_kv, **options,
                           backward=cattn.varlen_attention_backward)
    for number in range(len(lens)):
        q, kv = (slice(*cu[number : number + 2]) for cu in (cu_seqlens_q, cu_seqlens_kv))
        own = [x[rows].swapaxes(0, 1)[None] for x, rows in zip(
            (grad_out, query, key, value, out, logsumexp), (q, q, kv, kv, q, q), strict=True)]
        alone = differentiate(*own, **options | {"alibi_slopes": options["alibi_slopes"][number]})
        for name, rows in ("query", q), ("key", kv), ("value", kv):
            assert_same_bits(packed[name][rows].swapaxes(0, 1), alone[name][0])
        assert_same_bits(packed["alibi_slopes"][number], alone["alibi_slopes"])


@all_dtypes
def test_gradients_of_grouped_and_repeated_heads(isa, dtype, kv_dtype):
    """Those of the queries: keys have the sum over their group."""
    for seq_len_q in (1, 5, 50, 200):
        query, key, value = problem(seq_len_q, 300, 40, num_heads=6, num_kv_heads=2, dtype=dtype, kv_dtype=kv_dtype)
        repeated = [np.repeat(x, 3, axis=1) for x in (key, value)]
        for options in ({}, some_options(6, 2, 300), {"dropout_p": 0.2, "seed": 4}):
            assert_same_bits(gradients_of((query, key, value), options)["query"],
                             gradients_of((query, *repeated), options)["query"])


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES[2:], ids=str)
def test_gradients_of_sixteen_bits_are_wide_ones_rounded(isa, dtype, kv_dtype):
    for shape in SHAPES:
        given, options = forward_of(arrays_of(shape, dtype, kv_dtype), options_of(shape))
        wide = differentiate(*(x.astype(np.float32) for x in given), **options)
        dtypes = {"query": dtype, "key": kv_dtype, "value": kv_dtype}
        assert_same_gradients(differentiate(*given, **options),
                              {name: x.astype(dtypes.get(name, x.dtype)) for name, x in wide.items()})


@pytest.mark.skipif(len(TILES) < 2, reason="this CPU has no AVX-512")
@pytest.mark.parametrize("head_dim", [1, 17, 32, 33, 65, 129, 257, 300])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_gradients_of_tiles(head_dim, dtype, on_every_isa):
    """Those of all AVX-512 rows."""
    for seq_len_kv in (*range(1, 34), 128, 137, 144, 530):
        arrays = problem(23, seq_len_kv, head_dim, head_dim // 2 + 1, dtype=dtype)
        for options in ({}, {"is_causal": True, "q_offset": seq_len_kv - 20}, {"softcap": 2.0}):
            found = dict(zip(cattn.available_isas(), on_every_isa(
                lambda arrays=arrays, options=options: gradients_of(arrays, options)), strict=True))
            for isa in TILES:
                assert_same_gradients(found[isa], found[TILES[0]])


def growing(x):
    """Scores that leave the reference behind from one block of keys to the next."""
    return x * np.linspace(1, 40, x.shape[-2], dtype=x.dtype)[:, None]


def with_odd_numbers(x):
    x = x.copy()
    x[..., -3:, 0] = [NAN, INF, -INF][:x.shape[-2]]
    return x


@pytest.mark.skipif(len(TILES) < 2, reason="this CPU has no AVX-512")
@pytest.mark.parametrize("keys", [np.asarray, growing, with_odd_numbers])
@pytest.mark.parametrize("head_dim", [1, 17, 31, 32, 33, 64, 65, 128, 129, 256, 257, 300])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_tiles(head_dim, keys, dtype, monkeypatch):
    """Those of all AVX-512 rows: rows of K as far apart as fused loops know, others, every rest of 16 keys; with few
    rows of queries, and with so many that values are packed."""
    precision = "f32" if dtype == np.float32 else "f64"
    tiles = [_kernels._load(name) for name in dict.fromkeys(_kernels.module_name(isa, precision) for isa in TILES)]
    for seq_len_kv in (*range(1, 34), 128, 136, 137, 144, 256, 272, 300):
        seq_len_q = 23 if seq_len_kv < 130 else 71
        query, key, value = problem(seq_len_q, seq_len_kv, num_heads=2, head_dim=head_dim, dtype=dtype)
        for options in ({}, {"is_causal": True, "q_offset": seq_len_kv - 20}, {"softcap": 2.0}):
            results = []
            for module in tiles:
                monkeypatch.setattr(_kernels, precision, module if precision == "f32" else lambda module=module: module)
                results.append(everything(query, keys(key), value, **options))
                results.append((attention(query, keys(key), value, **options),))  # no weights to be kept on the way
            # A NaN's sign is that of whichever operand came first.
            all_of_one, out, *others = (
                tuple(np.where(np.isnan(x), x.dtype.type(NAN), x) for x in result) for result in results)
            assert_same_bits(out, all_of_one[:1])
            for all_of_other, other_out in zip(others[::2], others[1::2], strict=True):
                assert_same_bits(all_of_other, all_of_one)
                assert_same_bits(other_out, out)


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa, layout, dtype, kv_dtype):
    """Few rows per key and many: rows of K and V that are used in place, and rows that are copied."""
    for shape in ("prefill", "decode", "grouped"):
        arrays = [x[:1, :, :, :17] for x in arrays_of(shape, dtype, kv_dtype)]
        expected = everything(*(x.copy() for x in arrays))
        strided = [LAYOUTS[layout](x) for x in arrays]
        for x, y in zip(strided, arrays, strict=True):
            np.testing.assert_array_equal(x, y)
        assert_same_bits(everything(*strided), expected)
        for number in range(3):
            one = [strided[i] if i == number else arrays[i] for i in range(3)]
            assert_same_bits(everything(*one), expected)


@shapes
def test_out_weights_and_logsumexp_change_nothing(isa, shape):
    for options in ({}, options_of(shape), {"dropout_p": 0.5, "seed": 7}):
        arrays = arrays_of(shape)
        expected = attention(*arrays, **options)
        out, weights, logsumexp = everything(*arrays, **options)
        assert_same_bits(out, expected)
        assert_same_bits(attention(*arrays, **options, return_weights=True), (expected, weights))
        assert_same_bits(attention(*arrays, **options, return_logsumexp=True), (expected, logsumexp))
        given = np.full(expected.shape[::-1], NAN, np.float32).T
        assert attention(*arrays, **options, out=given) is given
        assert_same_bits(given.copy(), expected)


@all_dtypes
def test_grouped_heads_are_repeated_heads(isa, dtype, kv_dtype):
    """By index or by np.repeat."""
    for seq_len_q in (1, 2, 5, 50):
        query, key, value = problem(seq_len_q, 300, 40, num_heads=6, num_kv_heads=2, dtype=dtype, kv_dtype=kv_dtype)
        repeated = [np.repeat(x, 3, axis=1) for x in (key, value)]
        for options in ({}, some_options(6, 2, 300), {"dropout_p": 0.2, "seed": 4}):
            assert_same_bits(everything(query, key, value, **options), everything(query, *repeated, **options))


ROWS = EDGES["decode_rows"][-1] + 3


@all_dtypes
@pytest.mark.parametrize("keys", [np.asarray, growing])
@pytest.mark.parametrize("seq_len_kv", [1, 2, 15, 33, 127, 128, 130, 300, 1024, 2100])
def test_a_row_alone(isa, seq_len_kv, keys, dtype, kv_dtype):
    """One row, and any few, in the kernel for few rows, and as rows of a batch in that for many."""
    for number, head_dim in enumerate((1, 24, 33, 64, 80, 128, 257, 272, 528)):
        head_dim_v = (head_dim, 16, 128)[number % 3]
        query, key, value = problem(ROWS, seq_len_kv, head_dim, head_dim_v, leading=(1,), num_heads=1, dtype=dtype,
                                    kv_dtype=kv_dtype)
        key = keys(key)
        options = [{}, {"is_causal": True, "q_offset": seq_len_kv - 7}, {"softcap": 2.0, "sinks": np.ones(1)},
                   {"window": (3, seq_len_kv // 2), "q_offset": seq_len_kv // 3}, {"attn_mask": normal(seq_len_kv)}]
        for asked in (options[number % 5], options[(number + 2) % 5]):
            expected = everything(query, key, value, **asked)
            for start, end in ((0, 1), (ROWS - 1, ROWS), (1, 3), (2, 5), (4, 8), (3, 8), (1, 9), (0, 9)):
                own = dict(asked, q_offset=asked["q_offset"] + start) if "q_offset" in asked else asked
                few = everything(query[:, :, start:end], key, value, **own)
                assert_same_bits(few, tuple(x[:, :, start:end] for x in expected))
                assert_same_bits(attention(query[:, :, start:end], key, value, **own), few[0])
            assert_same_bits(attention(query, key, value, **asked), expected[0])


@pytest.mark.parametrize(("seq_len_kv", "cuts"), [
    (200, [20, 100, 190]), (200, [33, 66, 190]), (200, [64, 128, 190]), (200, [150, 170, 190]), (5000, [9, 40]),
    (200, [1, 3, 6, 10, 15, 23, 24, 190]), (5000, [1, 2, 4, 12, 40]),
], ids=str)
@all_dtypes
def test_queries_in_chunks(isa, seq_len_kv, cuts, dtype, kv_dtype):
    """Chunks of the queries, each with its q_offset, and all at once. (Dropout depends on the index.)"""
    query, key, value = problem(cuts[-1], seq_len_kv, 24, dtype=dtype, kv_dtype=kv_dtype)
    options = {"is_causal": True, "window": (seq_len_kv // 2, None), "alibi_slopes": np.array([0.1, 0.3]) / 20,
               "softcap": 4.0, "sinks": np.ones(2), "kv_lens": np.array([seq_len_kv, seq_len_kv - 50])}
    q_offset = seq_len_kv - cuts[-1]
    expected = everything(query, key, value, **options, q_offset=q_offset)
    chunks = []
    for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
        chunks.append(everything(query[:, :, start:end], key, value, **options, q_offset=q_offset + start))
    joined = [np.concatenate([chunk[number] for chunk in chunks], axis=2) for number in range(3)]
    assert_same_bits(tuple(joined), expected)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES[2:], ids=str)
def test_sixteen_bits_are_wide_numbers_rounded(isa, dtype, kv_dtype):
    """The same bits as in float32, but for the last rounding."""
    for shape in SHAPES:
        arrays = arrays_of(shape, dtype, kv_dtype)
        wide = everything(*(x.astype(np.float32) for x in arrays), **options_of(shape))
        out, weights, logsumexp = everything(*arrays, **options_of(shape))
        assert_same_bits((out, weights, logsumexp), (wide[0].astype(dtype), wide[1].astype(dtype), wide[2]))


@shapes
@pytest.mark.parametrize("scale", [0.125, 0.1])
def test_one_mask_in_many_forms(isa, shape, scale):
    """bool or additive, of any dtype, broadcast or written out, or said by is_causal, window and kv_lens. Biases are
    added to scores that have been multiplied by the scale, and rounded, where that is no power of two: then additive
    ones have bits of their own."""
    arrays = arrays_of(shape)
    seq_len_q, seq_len_kv = arrays[0].shape[2], arrays[1].shape[2]
    i, j = np.arange(seq_len_q)[:, None] + seq_len_kv // 3, np.arange(seq_len_kv)
    left = seq_len_kv // 4
    said = {"is_causal": True, "q_offset": seq_len_kv // 3, "window": (left, None),
            "kv_lens": np.array([seq_len_kv, seq_len_kv // 3 + 5])}
    seen = (j <= i) & (j >= i - left) & (j < said["kv_lens"][:, None, None, None])
    expected = everything(*arrays, scale=scale, **said)
    additive = [np.where(seen, 0, -INF).astype(kind) for kind in FLOATS]
    of_additive = expected if scale == 0.125 else everything(*arrays, attn_mask=additive[0], scale=scale)
    for mask in (seen, *additive):
        right = expected if mask is seen else of_additive
        assert_same_bits(everything(*arrays, attn_mask=mask, scale=scale), right)
        written_out = np.broadcast_to(mask, (2, arrays[0].shape[1], seq_len_q, seq_len_kv)).copy()
        assert_same_bits(everything(*arrays, attn_mask=written_out, scale=scale), right)
        assert_same_bits(everything(*arrays, attn_mask=mask, scale=scale, **said), right)
    expected = gradients_of(arrays, said | {"scale": scale})
    for number, mask in enumerate((seen, *additive)):
        found = differentiate(*forward_of(arrays, said | {"scale": scale})[0], attn_mask=mask, scale=scale,
                              wanted=("query", "key", "value"))
        if number == 0 or scale == 0.125:
            assert_same_gradients(found, expected)


@shapes
def test_bias_broadcast_or_written_out(isa, shape):
    arrays = arrays_of(shape)
    full = (*arrays[0].shape[:3], arrays[1].shape[2])
    for kept in ((0, 0, 0, 1), (0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1), (1, 1, 0, 0)):
        bias = normal(*(n if keep else 1 for n, keep in zip(full, kept, strict=True)), dtype=BFLOAT16)
        expected = everything(*arrays, attn_mask=np.broadcast_to(bias, full).copy())
        assert_same_bits(everything(*arrays, attn_mask=bias), expected)


def test_leading_axes_are_one_batch(isa):
    """However they come: broadcast, merged by strides or one call for each."""
    arrays = problem(9, 70, 16, leading=(6,), num_heads=4, num_kv_heads=2)
    options = some_options(4, 6, 70) | {"dropout_p": 0.3, "seed": 2}
    expected = everything(*arrays, **options)

    def split(x):
        return x.reshape(2, 3, *x.shape[1:]) if np.ndim(x) and len(x) == 6 else x

    nested = [split(x) for x in arrays]
    nested_options = {name: split(option) for name, option in options.items()}
    swapped = [x.swapaxes(0, 1).copy().swapaxes(0, 1) for x in nested]
    for same in (nested, swapped, [swapped[0], *nested[1:]]):
        results = everything(*same, **nested_options)
        assert_same_bits(tuple(x.reshape(6, *x.shape[2:]) for x in results), expected)


@shapes
def test_three_axes_are_one_head(isa, shape):
    arrays = [x[:, 0] for x in arrays_of(shape)]
    options = some_options(1, 2, arrays[1].shape[1]) | {"dropout_p": 0.3, "seed": 2}
    with_head = everything(*(x[:, None] for x in arrays), **options)
    options["attn_mask"] = options["attn_mask"][:, 0]
    assert_same_bits(everything(*arrays, **options), tuple(x[:, 0] for x in with_head))
    single = {name: option[0] if name in ("q_offset", "kv_lens", "attn_mask") else option
              for name, option in options.items()} | {"alibi_slopes": options["alibi_slopes"][0]}
    assert_same_bits(everything(*(x[0] for x in arrays), **single), tuple(x[0, 0] for x in with_head))
