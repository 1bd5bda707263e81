"""Sinusoidal positions, the reference and the public ones: accuracy, layouts, out, shift, layer, errors."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cattn
import cattn.reference
from cattn.reference import philox4x32

both = pytest.mark.parametrize("library", [cattn, cattn.reference], ids=["public", "reference"])
long_double = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63, reason="long double is no wider than double here"
)


def exact_table(length, dim, base=10000.0, offset=0, layout="interleaved"):
    """The formula in long double, one angle at a time."""
    table = np.empty((length, dim), np.longdouble)
    num_sines = (dim + 1) // 2
    for column in range(dim):
        if layout == "interleaved":
            pair, is_cosine = divmod(column, 2)
        else:
            is_cosine, pair = divmod(column, num_sines)
        frequency = np.longdouble(base) ** (-np.longdouble(2 * pair) / np.longdouble(dim))
        for row in range(length):
            angle = np.longdouble(offset + row) * frequency
            table[row, column] = np.cos(angle) if is_cosine else np.sin(angle)
    return table


def largest_error(table, *args, **options):
    return np.abs(table.astype(np.longdouble) - exact_table(*table.shape, *args, **options)).max(initial=0)


@long_double
@both
@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(0, 20), dim=st.integers(1, 13), base=st.sampled_from([1.0, 10.0, 10000.0, 5e5]),
    offset=st.one_of(st.integers(-1000, 1000), st.integers(0, 10**8)),
    layout=st.sampled_from(["interleaved", "concatenated"]), dtype=st.sampled_from([np.float32, np.float64]),
)
def test_half_an_ulp(library, length, dim, base, offset, layout, dtype):
    options = {"base": base, "offset": offset, "layout": layout}
    table = library.sinusoidal_encoding(length, dim, dtype=dtype, **options)
    assert table.shape == (length, dim) and table.dtype == dtype
    assert largest_error(table, **options) <= 2.0**-24


@long_double
@both
@pytest.mark.parametrize("dim", [1, 2, 63, 512])
@pytest.mark.parametrize("offset", [0, 10**6 - 70, 10**8 - 69, -(10**8)])
def test_half_an_ulp_across_blocks(library, dim, offset):
    table = library.sinusoidal_encoding(70, dim, offset=offset)
    assert largest_error(table, offset=offset) <= 2.0**-24


@both
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 1000])
def test_first_pair_is_the_sine_of_the_position(library, length):
    """On every platform: the angle of columns 0 and 1 is the position itself."""
    for offset in (0, 10**8 - length + 1):
        table = library.sinusoidal_encoding(length, 6, offset=offset)
        positions = range(offset, offset + length)
        np.testing.assert_allclose(table[:, 0], [math.sin(p) for p in positions], rtol=0, atol=2.0**-24)
        np.testing.assert_allclose(table[:, 1], [math.cos(p) for p in positions], rtol=0, atol=2.0**-24)


@both
def test_float64_is_nearly_exact_at_small_positions(library):
    table = library.sinusoidal_encoding(100, 16, dtype=np.float64)
    angles = [[position / 10000 ** (2 * i / 16) for i in range(8)] for position in range(100)]
    expected = [[f(angle) for angle in row for f in (math.sin, math.cos)] for row in angles]
    np.testing.assert_allclose(table, expected, rtol=0, atol=100 * 2.0**-52)


@both
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_layouts_hold_the_same_columns(library, dim):
    interleaved = library.sinusoidal_encoding(9, dim, layout="interleaved")
    concatenated = library.sinusoidal_encoding(9, dim, layout="concatenated")
    num_sines = (dim + 1) // 2
    np.testing.assert_array_equal(concatenated[:, :num_sines], interleaved[:, 0::2])
    np.testing.assert_array_equal(concatenated[:, num_sines:], interleaved[:, 1::2])


@both
def test_float16_is_the_float64_table_rounded(library):
    options = {"offset": 10**8 - 100}
    np.testing.assert_array_equal(
        library.sinusoidal_encoding(100, 33, dtype=np.float16, **options),
        library.sinusoidal_encoding(100, 33, dtype=np.float64, **options).astype(np.float16),
    )


@long_double
@pytest.mark.parametrize("dtype", [np.longdouble, "bfloat16"])
def test_other_dtypes_of_the_reference(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    table = cattn.reference.sinusoidal_encoding(40, 7, dtype=dtype)
    assert table.dtype == dtype
    assert largest_error(table) <= (1e-15 if dtype == np.longdouble else 2.0**-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("make", [
    lambda n, d, dtype: np.empty((n, d), dtype),
    lambda n, d, dtype: np.empty((n, d + 3), dtype)[:, 1:-2],
    lambda n, d, dtype: np.empty((2 * n, d), dtype)[::-2],
    lambda n, d, dtype: np.empty((n, 2 * d), dtype)[:, ::2],
    lambda n, d, dtype: np.empty((n, d), dtype)[:, ::-1],
    lambda n, d, dtype: np.empty((d, n), dtype).T,
    lambda n, d, dtype: np.empty(n * d * dtype().itemsize + 1, np.uint8)[1:].view(dtype).reshape(n, d),
], ids=["contiguous", "columns", "rows reversed", "strided", "columns reversed", "transposed", "unaligned"])
@pytest.mark.parametrize("shape", [(70, 9), (3, 1), (0, 4), (1, 5)])
def test_out(dtype, make, shape):
    out = make(*shape, dtype)
    assert cattn.sinusoidal_encoding(*shape, offset=3, dtype=dtype, out=out) is out
    np.testing.assert_array_equal(out, cattn.sinusoidal_encoding(*shape, offset=3, dtype=dtype))


def test_out_writes_nothing_else():
    frame = np.full((5, 6), 7, np.float32)
    cattn.sinusoidal_encoding(3, 4, out=frame[1:4, 1:5])
    assert (frame[[0, 4]] == 7).all() and (frame[:, [0, 5]] == 7).all() and (frame[1:4, 1:5] != 7).all()


# The shift.


@both
@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("delta", [0, 1, -7, 12345])
@pytest.mark.parametrize(("dim", "base"), [(2, 10000.0), (8, 10000.0), (10, 50.0)])
def test_relative_shift(library, dim, base, delta, layout):
    options = {"base": base, "layout": layout}
    shift = library.relative_shift(delta, dim, **options)
    assert shift.shape == (dim, dim) and shift.dtype == np.float64
    table = library.sinusoidal_encoding(20, dim, offset=10, dtype=np.float64, **options)
    moved = library.sinusoidal_encoding(20, dim, offset=10 + delta, dtype=np.float64, **options)
    atol = (abs(delta) + 100) * 2.0**-52
    np.testing.assert_allclose(table @ shift, moved, rtol=0, atol=atol)
    np.testing.assert_allclose(shift @ shift.T, np.eye(dim), rtol=0, atol=atol)
    np.testing.assert_array_equal(library.relative_shift(-delta, dim, **options), shift.T)
    single = library.relative_shift(delta, dim, dtype=np.float32, **options)
    np.testing.assert_array_equal(single, shift.astype(np.float32))


# The layer.


@both
@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6), (2, 3, 7, 6), (2, 0, 6), (0, 7, 6)])
def test_layer_adds_the_table(library, shape):
    layer = library.PositionalEncoding(6, max_len=10)
    assert layer.P.shape == (1, 10, 6) and layer.P.dtype == np.float32
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    before = x.copy()
    out = layer(x)
    np.testing.assert_array_equal(out, x + library.sinusoidal_encoding(shape[-2], 6))
    np.testing.assert_array_equal(x, before)
    assert out.dtype == np.float32 and layer.P.shape == (1, 10, 6)


@both
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_layer_options(library, dtype):
    layer = library.PositionalEncoding(5, base=100.0, layout="concatenated", dtype=dtype)
    out = layer(np.zeros((1, 4, 5), dtype))
    expected = library.sinusoidal_encoding(4, 5, base=100.0, layout="concatenated", dtype=dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[0], expected)


@both
def test_layer_grows(library):
    layer = library.PositionalEncoding(4, max_len=10)
    first = layer.P.copy()
    out = layer(np.zeros((1, 11, 4), np.float32))
    assert out.shape == (1, 11, 4) and layer.P.shape == (1, 20, 4)  # doubled: amortised
    np.testing.assert_array_equal(layer.P[:, :10], first)
    layer(np.zeros((1, 100, 4), np.float32))
    np.testing.assert_array_equal(layer.P[0], library.sinusoidal_encoding(100, 4))
    empty = library.PositionalEncoding(4, max_len=0)
    assert empty.P.shape == (1, 0, 4) and empty(np.zeros((3, 4), np.float32)).shape == (3, 4)


@both
def test_layer_dropout(library):
    layer = library.PositionalEncoding(6, 0.4)
    x = np.random.default_rng(0).standard_normal((2, 3, 50, 6)).astype(np.float32)
    plain = layer(x)
    np.testing.assert_array_equal(layer(x, seed=1), plain)
    seed = 0x0123456789ABCDEF
    dropped = layer(x, training=True, seed=seed)
    flat, flat_plain = dropped.reshape(6, 50, 6), plain.reshape(6, 50, 6)
    for batch, position, column in ((0, 0, 0), (0, 1, 5), (1, 0, 3), (5, 49, 4), (3, 7, 2)):
        words = philox4x32((column // 4, position, 2**32 - 1, batch), (seed % 2**32, seed >> 32))
        kept = words[column % 4] >= int(0.4 * 2**32)
        assert flat[batch, position, column] == (
            flat_plain[batch, position, column] / np.float32(0.6) if kept else 0
        )
    kept = dropped != 0
    np.testing.assert_array_equal(dropped[kept], plain[kept] / np.float32(0.6))
    assert abs(kept.mean() - 0.6) < 5 * math.sqrt(0.24 / kept.size)
    np.testing.assert_array_equal(layer(x, training=True, seed=seed), dropped)
    assert (layer(x, training=True) != layer(x, training=True)).any()


# Bad input.

BAD_TABLES = [
    ((-1, 4), {}, ValueError, "length: expected an int >= 0, got -1"),
    ((3, 0), {}, ValueError, "dim: expected an int >= 1, got 0"),
    ((3.0, 4), {}, TypeError, r"length: expected an int, got 3\.0"),
    ((3, "4"), {}, TypeError, "dim: expected an int, got '4'"),
    ((None, 4), {}, TypeError, "length: expected an int, got None"),
    ((2**40, 2**40), {}, ValueError, r"length: expected at most 2\*\*58 elements in the table, got "),
    ((0, 2**59), {}, ValueError, r"length: expected at most 2\*\*58 elements in the table, got 0 \* "),
    ((3, 4), {"layout": np.array(["interleaved"] * 2)}, ValueError, "layout: expected 'interleaved' or 'concatenated'"),
    ((3, 4), {"offset": 0.5}, TypeError, r"offset: expected an int, got 0\.5"),
    ((3, 4), {"offset": 2**53}, ValueError, r"offset: expected positions within \+-2\*\*53, got "),
    ((3, 4), {"offset": -(2**60)}, ValueError, r"offset: expected positions within \+-2\*\*53, got "),
    ((3, 4), {"base": 0.5}, ValueError, r"base: expected a finite float >= 1, got 0\.5"),
    ((3, 4), {"base": -10000.0}, ValueError, r"base: expected a finite float >= 1, got -10000\.0"),
    ((3, 4), {"base": math.nan}, ValueError, "base: expected a finite float >= 1, got nan"),
    ((3, 4), {"base": math.inf}, ValueError, "base: expected a finite float >= 1, got inf"),
    ((3, 4), {"base": 10**400}, ValueError, "base: expected a finite float >= 1, got 1000"),
    ((3, 4), {"base": "10000"}, TypeError, "base: expected a finite float >= 1, got '10000'"),
    ((3, 4), {"layout": "half"}, ValueError, "layout: expected 'interleaved' or 'concatenated', got 'half'"),
    ((3, 4), {"dtype": np.int32}, TypeError, "dtype: expected .*float.*, got <class 'numpy.int32'>"),
    ((3, 4), {"dtype": complex}, TypeError, "dtype: expected .*float.*, got <class 'complex'>"),
    ((3, 4), {"dtype": "nonsense"}, TypeError, "dtype: expected .*float.*, got 'nonsense'"),
    ((3, 4), {"dtype": None}, TypeError, "dtype: expected .*float.*, got None"),
]


@both
def test_any_real_base(library):
    """Also one whose comparison with the largest float would overflow."""
    for base in (10, np.float32(10), np.float16(10), np.longdouble(10), Fraction(10)):
        np.testing.assert_array_equal(library.sinusoidal_encoding(9, 6, base=base),
                                      library.sinusoidal_encoding(9, 6, base=10.0))


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_TABLES)
def test_bad_table(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.sinusoidal_encoding(*args, **options)


@pytest.mark.parametrize(("out", "error", "message"), [
    ([[0.0] * 4] * 3, TypeError, "out: expected a numpy.ndarray, got list"),
    (np.empty((3, 4)), TypeError, "out: expected dtype float32, got float64"),
    (np.empty((3, 4), ">f4"), TypeError, "out: expected dtype float32, got >f4"),
    (np.empty((4, 3), np.float32), ValueError, r"out: expected \(3, 4\), got shape \(4, 3\)"),
    (np.empty((1, 3, 4), np.float32), ValueError, r"out: expected \(3, 4\), got shape \(1, 3, 4\)"),
    (np.broadcast_to(np.float32(0), (3, 4)), ValueError, "out: expected a writeable array, got a read-only"),
])
def test_bad_out(out, error, message):
    with pytest.raises(error, match=f"^{message}"):
        cattn.sinusoidal_encoding(3, 4, out=out)


def test_public_table_has_no_long_double():
    if np.dtype(np.longdouble) != np.float64:
        with pytest.raises(TypeError, match=r"^dtype: expected one of float16, float32, float64, got"):
            cattn.sinusoidal_encoding(3, 4, dtype=np.longdouble)


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), [
    ((1, 5), {}, ValueError, r"dim: expected an even number \(an unpaired sine cannot be rotated\), got 5"),
    ((1, 0), {}, ValueError, "dim: expected an int >= 1, got 0"),
    ((1, 2**30), {}, ValueError, r"dim: expected at most 2\*\*58 elements in the matrix, got 1073741824 \* "),
    ((0.5, 4), {}, TypeError, r"delta: expected an int, got 0\.5"),
    ((-(10**400), 4), {}, ValueError, r"delta: expected an int within \+-2\*\*53, got -1000"),
    ((1, 4), {"base": 0.0}, ValueError, r"base: expected a finite float >= 1, got 0\.0"),
    ((1, 4), {"layout": None}, ValueError, "layout: expected 'interleaved' or 'concatenated', got None"),
    ((1, 4), {"dtype": int}, TypeError, "dtype: expected a float dtype, got <class 'int'>"),
])
def test_bad_shift(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.relative_shift(*args, **options)


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), [
    ((0,), {}, ValueError, "dim: expected an int >= 1, got 0"),
    ((4, 1.0), {}, ValueError, r"dropout: expected a float in \[0, 1\), got 1\.0"),
    ((4, "0.1"), {}, TypeError, r"dropout: expected a float in \[0, 1\), got '0\.1'"),
    ((4, 0.1, -1), {}, ValueError, "max_len: expected an int >= 0, got -1"),
    ((4, 0.1, 1e3), {}, TypeError, r"max_len: expected an int, got 1000\.0"),
    ((4, 0.1, 2**57), {}, ValueError, r"max_len: expected at most 2\*\*58 elements in the table, got "),
    ((2**59, 0.1, 0), {}, ValueError, r"max_len: expected at most 2\*\*58 elements in the table, got "),
    ((4,), {"base": 0.0}, ValueError, "base: "),
    ((4,), {"layout": ""}, ValueError, "layout: "),
    ((4,), {"dtype": int}, TypeError, "dtype: "),
])
def test_bad_encoding_layer(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.PositionalEncoding(*args, **options)


@both
@pytest.mark.parametrize(("x", "options", "error", "message"), [
    (np.zeros((2, 5), np.float32), {}, ValueError, r"x: expected \(\.\.\., seq, 4\), got shape \(2, 5\)"),
    (np.zeros(4, np.float32), {}, ValueError, r"x: expected \(\.\.\., seq, 4\), got shape \(4,\)"),
    (np.zeros((2, 3, 4)), {}, TypeError, "x: expected the dtype of the layer, float32, got float64"),
    (np.zeros((2, 3, 4), int), {}, TypeError, "x: expected the dtype of the layer, float32, got int64"),
    ([[1.0], [2.0, 3.0]], {}, ValueError, "x: expected an array, got a list that makes none: "),
    (np.zeros((3, 4), np.float32), {"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
    (np.zeros((3, 4), np.float32), {"seed": 2**64}, ValueError, "seed: expected an int below"),
    (np.zeros((3, 4), np.float32), {"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
])
def test_bad_layer_input(library, x, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.PositionalEncoding(4, 0.1)(x, training=True, **options)
