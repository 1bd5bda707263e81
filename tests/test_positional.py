"""Sinusoidal positions, the reference and the public ones: accuracy, layouts, out, shift, layer, errors."""

import math
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from problems import EDGES, around

import cattn
import cattn.reference
from cattn import _kernels
from cattn.reference import philox4x32

BFLOAT16 = ml_dtypes.bfloat16
LAYOUTS = ["interleaved", "concatenated", "cosines_first"]
KINDS = {np.float16: 2, BFLOAT16: 3}  # as in _kernels/tensor.pxi

both = pytest.mark.parametrize("library", [cattn, cattn.reference], ids=["public", "reference"])
long_double = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63, reason="long double is no wider than double here"
)


def exact_table(length, dim, base=10000.0, offset=0, layout="interleaved", endpoint=False, positions=None):
    """The formula in long double, one angle at a time."""
    table = np.empty((length, dim), np.longdouble)
    num_sines, num_cosines = (dim + 1) // 2, dim // 2
    positions = [offset + row for row in range(length)] if positions is None else positions
    for column in range(dim):
        if layout == "interleaved":
            pair, is_cosine = divmod(column, 2)
        elif layout == "concatenated":
            is_cosine, pair = divmod(column, num_sines)
        else:
            is_cosine = column < num_cosines
            pair = column if is_cosine else column - num_cosines
        exponent = np.longdouble(pair) / (num_sines - 1) if endpoint else np.longdouble(2 * pair) / dim
        frequency = np.longdouble(base) ** -exponent
        for row in range(length):
            angle = np.longdouble(positions[row]) * frequency
            table[row, column] = np.cos(angle) if is_cosine else np.sin(angle)
    return table


def largest_error(table, *args, **options):
    return np.abs(table.astype(np.longdouble) - exact_table(*table.shape, *args, **options)).max(initial=0)


@long_double
@both
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    length=st.integers(0, 20), dim=st.integers(1, 13), base=st.sampled_from([1.0, 10.0, 10000.0, 5e5]),
    offset=st.one_of(st.integers(-1000, 1000), st.integers(0, 10**8)),
    layout=st.sampled_from(LAYOUTS), endpoint=st.booleans(), dtype=st.sampled_from([np.float32, np.float64]),
)
def test_half_an_ulp(isa, library, length, dim, base, offset, layout, endpoint, dtype):
    options = {"base": base, "offset": offset, "layout": layout, "endpoint": endpoint and dim >= 4 and dim % 2 == 0}
    table = library.sinusoidal_encoding(length, dim, dtype=dtype, **options)
    assert table.shape == (length, dim) and table.dtype == dtype
    assert largest_error(table, **options) <= 2.0**-24


@long_double
@both
@pytest.mark.parametrize("dim", [1, 2, 63, 512])
@pytest.mark.parametrize("offset", [0, 10**6 - 70, 10**8 - 69, -(10**8)])
def test_half_an_ulp_across_blocks(isa, library, dim, offset):
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
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dim", [1, 2, 5, 8, 1022, 1023, 1024, 1025, 1026, 3077])
def test_layouts_hold_the_same_columns(library, dim, dtype):
    """Also where the kernel cuts a row into strips of 1024 columns."""
    interleaved, concatenated, cosines_first = (
        library.sinusoidal_encoding(70, dim, layout=layout, dtype=dtype) for layout in LAYOUTS)
    num_sines = (dim + 1) // 2
    np.testing.assert_array_equal(concatenated[:, :num_sines], interleaved[:, 0::2])
    np.testing.assert_array_equal(concatenated[:, num_sines:], interleaved[:, 1::2])
    np.testing.assert_array_equal(cosines_first[:, : dim // 2], interleaved[:, 1::2])
    np.testing.assert_array_equal(cosines_first[:, dim // 2 :], interleaved[:, 0::2])


@long_double
@pytest.mark.parametrize("endpoint", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strips(isa, layout, endpoint):
    """Several, the last one short, and positions across blocks and far blocks."""
    (strip,), (rows,) = EDGES["table_columns"], EDGES["table_rows"]
    dim, length = 2 * strip + 30, rows**2 + 104
    columns = sorted(around(1, strip, strip + 1, 2 * strip) | {0, dim - 2, dim - 1})
    table = cattn.sinusoidal_encoding(length, dim, layout=layout, endpoint=endpoint, dtype=np.float64)
    for first in (0, rows - 2, rows**2 - 2, length - 2):
        exact = exact_table(2, dim, layout=layout, endpoint=endpoint, offset=first)[:, columns]
        assert np.abs(table[first : first + 2, columns] - exact).max() <= 2e-15 + 2.3e-16 * first


# The conventions of the field, by the formulas of the libraries named, in float64.


def vaswani(length, dim):
    """The PyTorch tutorial's."""
    position = np.arange(length)[:, None]
    div_term = np.exp(np.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    pe = np.zeros((length, dim))
    pe[:, 0::2] = np.sin(position * div_term)
    pe[:, 1::2] = np.cos(position * div_term)
    return pe


def d2l(length, dim):
    x = np.arange(length)[:, None] / np.power(10000, np.arange(0, dim, 2) / dim)
    p = np.zeros((length, dim))
    p[:, 0::2], p[:, 1::2] = np.sin(x), np.cos(x)
    return p


def xlm(n_pos, dim):
    """Hugging Face's XLM, DistilBERT, FlauBERT."""
    position_enc = np.array([[pos / np.power(10000, 2 * (j // 2) / dim) for j in range(dim)] for pos in range(n_pos)])
    out = np.zeros((n_pos, dim))
    out[:, 0::2], out[:, 1::2] = np.sin(position_enc[:, 0::2]), np.cos(position_enc[:, 1::2])
    return out


def marian(n_pos, dim):
    """Hugging Face's Marian and Pegasus."""
    position_enc = np.array([[pos / np.power(10000, 2 * (j // 2) / dim) for j in range(dim)] for pos in range(n_pos)])
    sentinel = dim // 2 + dim % 2
    out = np.zeros((n_pos, dim))
    out[:, :sentinel], out[:, sentinel:] = np.sin(position_enc[:, 0::2]), np.cos(position_enc[:, 1::2])
    return out


def mae(length, embed_dim):
    omega = np.arange(embed_dim // 2, dtype=float) / (embed_dim / 2.0)
    out = np.einsum("m,d->md", np.arange(length), 1.0 / 10000**omega)
    return np.concatenate([np.sin(out), np.cos(out)], axis=1)


def tensor2tensor(length, channels, min_timescale=1.0, max_timescale=1.0e4):
    num_timescales = channels // 2
    log_timescale_increment = math.log(max_timescale / min_timescale) / max(num_timescales - 1, 1)
    inv_timescales = min_timescale * np.exp(np.arange(num_timescales) * -log_timescale_increment)
    scaled_time = np.arange(length)[:, None] * inv_timescales[None, :]
    return np.concatenate([np.sin(scaled_time), np.cos(scaled_time)], axis=1)


def fairseq(num_embeddings, embedding_dim):
    half_dim = embedding_dim // 2
    emb = math.log(10000) / (half_dim - 1)
    emb = np.exp(np.arange(half_dim) * -emb)
    emb = np.arange(num_embeddings)[:, None] * emb[None, :]
    return np.concatenate([np.sin(emb), np.cos(emb)], axis=1)


def whisper(length, channels, max_timescale=10000):
    log_timescale_increment = np.log(max_timescale) / (channels // 2 - 1)
    inv_timescales = np.exp(-log_timescale_increment * np.arange(channels // 2))
    scaled_time = np.arange(length)[:, None] * inv_timescales[None, :]
    return np.concatenate([np.sin(scaled_time), np.cos(scaled_time)], axis=1)


def adm(timesteps, dim, max_period=10000):
    """ADM's, GLIDE's, DiT's."""
    half = dim // 2
    freqs = np.exp(-math.log(max_period) * np.arange(half) / half)
    args = timesteps[:, None] * freqs[None]
    embedding = np.concatenate([np.cos(args), np.sin(args)], axis=-1)
    return np.concatenate([embedding, np.zeros_like(embedding[:, :1])], axis=-1) if dim % 2 else embedding


def diffusers(timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000):
    half_dim = embedding_dim // 2
    exponent = -math.log(max_period) * np.arange(half_dim) / (half_dim - downscale_freq_shift)
    emb = scale * (timesteps[:, None] * np.exp(exponent)[None, :])
    emb = np.concatenate([np.sin(emb), np.cos(emb)], axis=-1)
    return np.concatenate([emb[:, half_dim:], emb[:, :half_dim]], axis=-1) if flip_sin_to_cos else emb


@both
@pytest.mark.parametrize("dim", [4, 6, 64, 512])
@pytest.mark.parametrize(("formula", "layout", "endpoint"), [
    (vaswani, "interleaved", False), (d2l, "interleaved", False), (xlm, "interleaved", False),
    (marian, "concatenated", False), (mae, "concatenated", False),
    (tensor2tensor, "concatenated", True), (fairseq, "concatenated", True), (whisper, "concatenated", True),
])
def test_conventions_of_positions(library, formula, layout, endpoint, dim):
    table = library.sinusoidal_encoding(100, dim, layout=layout, endpoint=endpoint, dtype=np.float64)
    expected = formula(100, dim)
    # An ulp of 1.0 in rows 0 and 1; further on, a frequency's rounding counts once for each position, on both sides.
    np.testing.assert_allclose(table[:2], expected[:2], rtol=0, atol=2.0**-52)
    atol = 2e-15 + 2 * 2.3e-16 * np.arange(100)[:, None] + np.zeros(dim)
    assert (np.abs(table - expected) <= atol).all()


TIMESTEPS = {
    "adm": (adm, {}, "cosines_first", False),
    "diffusers": (diffusers, {}, "concatenated", True),
    "diffusers without shift": (diffusers, {"downscale_freq_shift": 0}, "concatenated", False),
    "diffusers flipped": (diffusers, {"flip_sin_to_cos": True}, "cosines_first", True),
    "diffusers flipped without shift": (
        diffusers, {"flip_sin_to_cos": True, "downscale_freq_shift": 0}, "cosines_first", False,
    ),
}


@both
@pytest.mark.parametrize("dim", [4, 10, 320])
@pytest.mark.parametrize(("formula", "options", "layout", "endpoint"), TIMESTEPS.values(), ids=TIMESTEPS)
def test_conventions_of_timesteps(library, formula, options, layout, endpoint, dim):
    timesteps = np.array([0.0, 1.0, 0.25, 999.0, 37.5, 1e-3, 500.125])
    table = library.sinusoidal_encoding(7, dim, positions=timesteps, layout=layout, endpoint=endpoint, dtype=np.float64)
    atol = 2 * 2.3e-16 * (1 + timesteps[:, None]) + np.zeros(dim)
    assert (np.abs(table - formula(timesteps, dim, **options)) <= atol).all()


@both
def test_conventions_of_odd_dims(library):
    """Whose libraries pad: the table of dim - 1, and a column of zeros. Marian and XLM have one sine more."""
    padded = np.zeros((50, 7))
    library_table = library.sinusoidal_encoding(50, 6, layout="cosines_first", dtype=np.float64)
    padded[:, :6] = library_table
    np.testing.assert_allclose(padded, adm(np.arange(50), 7), rtol=0, atol=1e-13)
    for formula, layout in ((xlm, "interleaved"), (marian, "concatenated")):
        table = library.sinusoidal_encoding(50, 7, layout=layout, dtype=np.float64)
        np.testing.assert_allclose(table, formula(50, 7), rtol=0, atol=1e-13)


@both
@pytest.mark.parametrize("base", [1.0, 3.0, 49.0, 10000.0, 1e6 / 3, 1e300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_last_frequency_is_one_over_base(library, base, layout):
    """The last pair, at position `base` and before: sine and cosine of 1 / base itself, times the position."""
    for dim in (4, 6, 1026):
        last = cattn.reference._positional.columns_of(dim, layout)
        sine, cosine = last[0][-1], last[1][-1]
        positions = np.array([1.0, min(base, 2.0**53) / 2, 0.75])
        table = library.sinusoidal_encoding(3, dim, base=base, layout=layout, endpoint=True, positions=positions,
                                            dtype=np.float64)
        np.testing.assert_allclose(table[:, sine], np.sin(positions / base), rtol=2.0**-52, atol=0)
        np.testing.assert_allclose(table[:, cosine], np.cos(positions / base), rtol=2.0**-52, atol=0)


# Positions of the caller's.


@long_double
@both
@settings(deadline=None, max_examples=60)
@given(data=st.data(), length=st.integers(0, 20), dim=st.integers(1, 13), layout=st.sampled_from(LAYOUTS),
       base=st.sampled_from([1.0, 10.0, 10000.0]), endpoint=st.booleans())
def test_any_positions(library, data, length, dim, layout, base, endpoint):
    dtype = data.draw(st.sampled_from([np.float64, np.float32, np.float16, BFLOAT16, np.int64, np.uint8, ">f8"]))
    numbers = st.integers(0, 255) if dtype == np.uint8 else st.floats(-60000, 60000)
    positions = np.array(data.draw(st.lists(numbers, min_size=length, max_size=length)), float).astype(dtype)
    options = {"layout": layout, "base": base, "endpoint": endpoint and dim >= 4 and dim % 2 == 0}
    table = library.sinusoidal_encoding(length, dim, positions=positions, dtype=np.float64, **options)
    wide = positions.astype(np.float64)
    exact = exact_table(length, dim, positions=wide, **options)
    assert (np.abs(table - exact) <= 2.3e-16 * (np.abs(wide[:, None]) + 1)).all()


@both
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_whole_positions_are_those_of_offset(library, dtype):
    """Within the rounding of both: other sums lead there."""
    table = library.sinusoidal_encoding(300, 6, offset=-100, dtype=dtype)
    positions = np.arange(-100, 200)
    atol = max(float(ml_dtypes.finfo(dtype).eps), 2e-13)
    np.testing.assert_allclose(library.sinusoidal_encoding(300, 6, positions=positions, dtype=dtype).astype(float),
                               table.astype(float), rtol=0, atol=atol)


def test_positions_in_any_array():
    """A list, a strided one, one that is read-only, one that lies in `out`."""
    positions = np.linspace(-3, 1000, 7)
    expected = cattn.sinusoidal_encoding(7, 5, positions=positions, dtype=np.float64)
    strided = np.zeros(21)[::-3]
    strided[:] = positions
    out = np.zeros((7, 5))
    out[:, 2] = positions
    frozen = positions.copy()
    frozen.flags.writeable = False
    for same in (positions.tolist(), strided, frozen, positions.astype(np.longdouble), out[:, 2]):
        table = cattn.sinusoidal_encoding(7, 5, positions=same, dtype=np.float64,
                                          out=out if isinstance(same, np.ndarray) and same.base is out else None)
        np.testing.assert_array_equal(table, expected)


def test_far_positions():
    """Up to 2**53, where a double still is every whole number."""
    positions = np.array([2**53, -(2**53), 2**52 + 1])
    table = cattn.sinusoidal_encoding(3, 2, positions=positions, dtype=np.float64)
    np.testing.assert_array_equal(table[:, 0], [math.sin(p) for p in positions])
    np.testing.assert_array_equal(table[:, 1], [math.cos(p) for p in positions])


# What decides a number: its position and column, and nothing else.


@pytest.fixture
def set_num_threads():
    yield cattn.set_num_threads
    cattn.set_num_threads(None)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_a_number_depends_on_nothing_else(isa, set_num_threads, dtype):
    """Not on the number of threads, the length of the table, the other positions, or where it goes."""
    for dim, layout in ((64, "concatenated"), (1030, "interleaved")):
        options = {"layout": layout, "dtype": dtype}
        set_num_threads(1)
        expected = cattn.sinusoidal_encoding(9000, dim, **options)
        positions = np.linspace(-50, 777, 1000)
        given = cattn.sinusoidal_encoding(1000, dim, positions=positions, **options)
        for num_threads in (2, 3, 7):
            set_num_threads(num_threads)
            np.testing.assert_array_equal(cattn.sinusoidal_encoding(9000, dim, **options), expected)
            np.testing.assert_array_equal(cattn.sinusoidal_encoding(1000, dim, positions=positions, **options), given)
        for length in (1, 63, 65, 4097):
            out = np.empty((length, 3 * dim), dtype)[:, ::3]
            np.testing.assert_array_equal(cattn.sinusoidal_encoding(length, dim, out=out, **options), expected[:length])
        np.testing.assert_array_equal(
            cattn.sinusoidal_encoding(100, dim, positions=positions[900::-9][:100], **options), given[900::-9][:100])


# Rounding to 16 bits.


def narrowed(x, dtype):
    """float64 to a 16-bit format, rounded once, to nearest even, by rint of a multiple of the format's spacing."""
    fraction, bias = {np.float16: (10, 15), BFLOAT16: (7, 127)}[dtype]
    spacing = np.maximum(np.frexp(x)[1] - 1, 1 - bias) - fraction
    return np.ldexp(np.rint(np.ldexp(x, -spacing)), spacing).astype(dtype)  # exact: it is a number of the format


def kernel_narrowed(x, dtype):
    out = np.empty(x.size, np.uint16)
    _kernels.f32.narrow_of(x, out, KINDS[dtype])
    return out.view(dtype)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_narrowing_near_every_tie(isa, dtype):
    """All numbers of the format below 2, subnormal ones included, all midpoints of two, and the doubles next to both;
    those which are next in float32 as well, by way of which a number would be rounded twice."""
    numbers = np.arange(0x4001, dtype=np.uint16).view(dtype).astype(np.float64)  # 0 to 2
    middles = (numbers[:-1] + numbers[1:]) / 2
    ties = np.concatenate([numbers, middles])
    x = [ties, np.nextafter(ties, -1), np.nextafter(ties, 3)]
    for power in range(-53, -20):
        x += [ties * (1 - 2.0**power), ties * (1 + 2.0**power)]
    x = np.concatenate(x)
    x = x[np.abs(x) < 2]
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(kernel_narrowed(x, dtype).view(np.uint16), narrowed(x, dtype).view(np.uint16))
    upper, lower = np.nextafter(middles, 3), np.nextafter(middles, 0)
    np.testing.assert_array_equal(kernel_narrowed(upper, dtype).astype(float), numbers[1:])
    np.testing.assert_array_equal(kernel_narrowed(lower, dtype).astype(float), numbers[:-1])
    even = np.where(np.arange(0x4000) % 2, numbers[1:], numbers[:-1])
    np.testing.assert_array_equal(kernel_narrowed(middles, dtype).astype(float), even)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_narrowing_anything(isa, dtype):
    """Of any exponent below 2: down to where a double itself is subnormal."""
    rng = np.random.default_rng(0)
    exponents = rng.choice([0, -5, -14, -15, -24, -25, -126, -133, -300, -1050], 1_000_000)
    x = rng.uniform(-2, 2, 1_000_000) * np.exp2(exponents)
    np.testing.assert_array_equal(kernel_narrowed(x, dtype).view(np.uint16), narrowed(x, dtype).view(np.uint16))


TABLES_16_BIT = {
    "far offset": {"offset": 10**8 - 100},
    "concatenated": {"layout": "concatenated"},
    "endpoint": {"endpoint": True, "base": 1e7},
    "huge base": {"base": 1e300},
    "positions": {"positions": np.linspace(0, 1, 200)},
    "tiny positions": {"positions": np.linspace(-1e-7, 1e-5, 200), "layout": "cosines_first"},
}


@pytest.mark.parametrize("options", TABLES_16_BIT.values(), ids=TABLES_16_BIT)
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_16_bit_tables_are_the_float64_table_rounded_once(isa, dtype, options):
    table = cattn.sinusoidal_encoding(200, 34, dtype=dtype, **options)
    wide = cattn.sinusoidal_encoding(200, 34, dtype=np.float64, **options)
    assert table.dtype == dtype
    np.testing.assert_array_equal(table.view(np.uint16), narrowed(wide, dtype).view(np.uint16))


@both
def test_float16_is_the_float64_table_rounded(library):
    options = {"offset": 10**8 - 100}
    np.testing.assert_array_equal(
        library.sinusoidal_encoding(100, 33, dtype=np.float16, **options),
        library.sinusoidal_encoding(100, 33, dtype=np.float64, **options).astype(np.float16),
    )


@both
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_error_state_of_numpy(library, dtype):
    """The caller's np.errstate neither raises in a call nor changes a bit of it."""
    x = np.full((2, 5, 8), 1e-6).astype(dtype)
    def calls():
        layer = library.PositionalEncoding(8, 0.3, base=1e30, dtype=dtype)
        return [
            library.sinusoidal_encoding(9, 8, base=1e30, dtype=dtype),
            library.sinusoidal_encoding(9, 8, base=1e300, dtype=dtype),
            library.sinusoidal_encoding(2, 8, positions=np.array([1e-300, 0.5], np.longdouble) * 1e-20, dtype=dtype),
            library.relative_shift(1, 8, base=1e300, dtype=dtype),
            layer(x), layer(x, training=True, seed=1),
        ]
    expected = calls()
    with np.errstate(all="raise"):
        for ours, theirs in zip(calls(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_nothing_as_large_as_the_table(dtype):
    """The kernel writes every dtype and every stride itself: no pass of NumPy over a second array, which no signal
    could interrupt."""
    size = 1000 * 512 * np.dtype(dtype).itemsize
    out = np.empty((512, 1000), dtype).T
    tracemalloc.start()
    try:
        cattn.sinusoidal_encoding(1000, 512, out=out, dtype=dtype)
        assert tracemalloc.get_traced_memory()[1] < size // 8
        tracemalloc.reset_peak()
        cattn.sinusoidal_encoding(1000, 512, dtype=dtype)
        assert size <= tracemalloc.get_traced_memory()[1] < size * 9 // 8
    finally:
        tracemalloc.stop()


@long_double
@pytest.mark.parametrize("dtype", [np.longdouble, "bfloat16"])
def test_other_dtypes_of_the_reference(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    table = cattn.reference.sinusoidal_encoding(40, 7, dtype=dtype)
    assert table.dtype == dtype
    assert largest_error(table) <= (1e-15 if dtype == np.longdouble else 2.0**-9)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
@pytest.mark.parametrize("make", [
    lambda n, d, dtype: np.empty((n, d), dtype),
    lambda n, d, dtype: np.empty((n, d + 3), dtype)[:, 1:-2],
    lambda n, d, dtype: np.empty((2 * n, d), dtype)[::-2],
    lambda n, d, dtype: np.empty((n, 2 * d), dtype)[:, ::2],
    lambda n, d, dtype: np.empty((n, d), dtype)[:, ::-1],
    lambda n, d, dtype: np.empty((d, n), dtype).T,
    lambda n, d, dtype: np.empty(n * d * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype).reshape(n, d),
], ids=["contiguous", "columns", "rows reversed", "strided", "columns reversed", "transposed", "unaligned"])
@pytest.mark.parametrize("shape", [(70, 9), (3, 1), (0, 4), (1, 5), (3, 1300)], ids=str)
def test_out(dtype, make, shape):
    out = make(*shape, dtype)
    assert cattn.sinusoidal_encoding(*shape, offset=3, dtype=dtype, out=out) is out
    np.testing.assert_array_equal(out, cattn.sinusoidal_encoding(*shape, offset=3, dtype=dtype))


def test_out_writes_nothing_else():
    for layout in LAYOUTS:
        frame = np.full((5, 1306), 7, np.float32)
        cattn.sinusoidal_encoding(3, 1303, out=frame[1:4, 1:-2], layout=layout)
        assert (frame[[0, 4]] == 7).all() and (frame[:, [0, -2, -1]] == 7).all() and (frame[1:4, 1:-2] != 7).all()
        strided = np.full((9, 5), 7, np.float32)
        cattn.sinusoidal_encoding(3, 5, out=strided[1::3], layout=layout)
        assert (strided[0::3] == 7).all() and (strided[2::3] == 7).all() and (strided[1::3] != 7).all()


# The shift.


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("delta", [0, 1, -7, 12345])
@pytest.mark.parametrize(("dim", "base", "endpoint"), [
    (2, 10000.0, False), (8, 10000.0, False), (8, 10000.0, True), (10, 50.0, False), (4, 50.0, True)])
def test_relative_shift(library, dim, base, delta, layout, endpoint):
    options = {"base": base, "layout": layout, "endpoint": endpoint}
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
@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6), (2, 3, 7, 6), (2, 0, 6), (0, 7, 6)], ids=str)
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
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_layer_options(library, dtype):
    for dim, options in (
        (5, {"base": 100.0, "layout": "concatenated"}), (6, {"layout": "cosines_first"}),
        (6, {"base": 50.0, "layout": "concatenated", "endpoint": True}),
    ):
        layer = library.PositionalEncoding(dim, max_len=3, dtype=dtype, **options)  # and when the table grows
        out = layer(np.zeros((1, 4, dim), dtype))
        assert out.dtype == dtype
        np.testing.assert_array_equal(out[0], library.sinusoidal_encoding(4, dim, dtype=dtype, **options))


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


def plain_layer(x, table, dropout=0.0, seed=0):
    """The layer in passes over the whole array."""
    out = x + table
    if dropout:
        *leading, seq, dim = x.shape
        batch_index = np.arange(math.prod(leading))[:, None, None]
        counter = (np.arange(-(-dim // 4)), np.arange(seq)[:, None], 2**32 - 1, batch_index)
        words = np.stack(philox4x32(counter, (seed, 0)), axis=-1)
        words = words.reshape(*leading, seq, 4 * len(counter[0]))[..., :dim]
        out = np.where(words >= int(dropout * 2**32), out / out.dtype.type(1 - dropout), out.dtype.type(0))
    return out


@pytest.mark.parametrize("shape", [
    (300_000,), (3, 100_001), (100_000, 1, 5), (5, 3, 20_000, 2), (2, 70, 4000), (2, 0, 4000), (0, 700_000, 7),
], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_layer_in_pieces(shape, dtype):
    """Larger than a piece along any axis, and cut where no multiple of 4 is near: the bits of the whole."""
    if len(shape) == 1:
        shape = (1, *shape)
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    layer = cattn.PositionalEncoding(shape[-1], 0.4, max_len=1, dtype=dtype)
    np.testing.assert_array_equal(layer(x), plain_layer(x, layer.P[0, : shape[-2]]))
    np.testing.assert_array_equal(layer(x, training=True, seed=5), plain_layer(x, layer.P[0, : shape[-2]], 0.4, 5))
    np.testing.assert_array_equal(layer(x[..., ::-1, :]), plain_layer(x[..., ::-1, :], layer.P[0, : shape[-2]]))


def test_layer_takes_pieces():
    """No pass over a whole array, between whose two ends no signal is handled, but pieces of 2**18 numbers."""
    x = np.zeros((2, 4000, 512), np.float32)
    layer = cattn.PositionalEncoding(512, 0.5, max_len=4000)
    tracemalloc.start()
    try:
        layer(x, training=True, seed=0)
        assert tracemalloc.get_traced_memory()[1] < x.nbytes + 2**18 * 80
    finally:
        tracemalloc.stop()


# Bad input.

LAYOUT_RULE = "expected 'interleaved', 'concatenated' or 'cosines_first'"
BEYOND = "positions: expected finite numbers within"
NO_NUMBERS = "positions: expected a float or int array, got dtype"
BAD_TABLES = {
    "negative length": ((-1, 4), {}, ValueError, "length: expected an int >= 0, got -1"),
    "dim of 0": ((3, 0), {}, ValueError, "dim: expected an int >= 1, got 0"),
    "float length": ((3.0, 4), {}, TypeError, r"length: expected an int, got 3\.0"),
    "text as dim": ((3, "4"), {}, TypeError, "dim: expected an int, got '4'"),
    "no length": ((None, 4), {}, TypeError, "length: expected an int, got None"),
    "huge table": ((2**40, 2**40), {}, ValueError, r"length: expected at most 2\*\*58 elements in the table, got "),
    "huge dim": ((0, 2**59), {}, ValueError, r"length: expected at most 2\*\*58 elements in the table, got 0 \* "),
    "layout of an array": (
        (3, 4), {"layout": np.array(["interleaved"] * 2)}, ValueError, f"layout: {LAYOUT_RULE}, got array",
    ),
    "float offset": ((3, 4), {"offset": 0.5}, TypeError, r"offset: expected an int, got 0\.5"),
    "far offset": ((3, 4), {"offset": 2**53}, ValueError, r"offset: expected positions within \+-2\*\*53, got "),
    "far negative offset": (
        (3, 4), {"offset": -(2**60)}, ValueError, r"offset: expected positions within \+-2\*\*53, got ",
    ),
    "base below 1": ((3, 4), {"base": 0.5}, ValueError, r"base: expected a finite float >= 1, got 0\.5"),
    "negative base": ((3, 4), {"base": -10000.0}, ValueError, r"base: expected a finite float >= 1, got -10000\.0"),
    "base of NaN": ((3, 4), {"base": math.nan}, ValueError, "base: expected a finite float >= 1, got nan"),
    "infinite base": ((3, 4), {"base": math.inf}, ValueError, "base: expected a finite float >= 1, got inf"),
    "base beyond float": ((3, 4), {"base": 10**400}, ValueError, "base: expected a finite float >= 1, got 1000"),
    "text as base": ((3, 4), {"base": "10000"}, TypeError, "base: expected a finite float >= 1, got '10000'"),
    "unknown layout": ((3, 4), {"layout": "half"}, ValueError, f"layout: {LAYOUT_RULE}, got 'half'"),
    "layout with a space": (
        (3, 4), {"layout": "cosines first"}, ValueError, f"layout: {LAYOUT_RULE}, got 'cosines first'",
    ),
    "int endpoint": ((3, 4), {"endpoint": 1}, TypeError, "endpoint: expected a bool, got 1"),
    "no endpoint": ((3, 4), {"endpoint": None}, TypeError, "endpoint: expected a bool, got None"),
    "endpoint of an array": (
        (3, 4), {"endpoint": np.array([True, False])}, TypeError, "endpoint: expected a bool, got array",
    ),
    "endpoint with dim of 5": (
        (3, 5), {"endpoint": True}, ValueError, "dim: expected an even number >= 4 with endpoint=True, .*, got 5",
    ),
    "endpoint with dim of 2": (
        (3, 2), {"endpoint": True}, ValueError, "dim: expected an even number >= 4 with endpoint=True, .*, got 2",
    ),
    "endpoint with dim of 1": (
        (3, 1), {"endpoint": True}, ValueError, "dim: expected an even number >= 4 with endpoint=True, .*, got 1",
    ),
    "positions and offset": (
        (3, 4), {"positions": [0, 1, 2], "offset": 1}, ValueError, "offset: expected 0 with positions, got 1",
    ),
    "too few positions": (
        (3, 4), {"positions": [0, 1]}, ValueError,
        r"positions: expected one for each row, shape \(3,\), got shape \(2,\)",
    ),
    "column of positions": (
        (3, 4), {"positions": np.zeros((3, 1))}, ValueError, r"positions: expected one .*, got shape \(3, 1\)",
    ),
    "one position": ((3, 4), {"positions": 1.0}, ValueError, r"positions: expected one .*, got shape \(\)"),
    "ragged positions": (
        (3, 4), {"positions": [[0], [1, 2]]}, ValueError, "positions: expected an array, got a list that makes none",
    ),
    "position of NaN": ((3, 4), {"positions": [0, 1, math.nan]}, ValueError, f"{BEYOND} .*, got nan"),
    "position of -inf": ((3, 4), {"positions": [0, -math.inf, 1]}, ValueError, f"{BEYOND} .*, got -inf"),
    "position of inf in float16": (
        (3, 4), {"positions": np.array([0, math.inf, 1], np.float16)}, ValueError, f"{BEYOND} .*, got inf",
    ),
    "position of inf in bfloat16": (
        (3, 4), {"positions": np.array([0, math.inf, 1], BFLOAT16)}, ValueError, f"{BEYOND} .*, got inf",
    ),
    "int position beyond 2**53": (
        (3, 4), {"positions": [0, 2**53 + 1, 1]}, ValueError, f"{BEYOND} .*, got 9007199254740993",
    ),
    "uint64 position beyond 2**53": (
        (3, 4), {"positions": np.array([0, 1, 2**64 - 1], np.uint64)}, ValueError, f"{BEYOND} .*, got 1844",
    ),
    "float position beyond 2**53": ((3, 4), {"positions": [0.0, -1e16, 1]}, ValueError, rf"{BEYOND} .*, got -1e\+16"),
    "bool positions": ((3, 4), {"positions": [True, False, True]}, TypeError, f"{NO_NUMBERS} bool"),
    "text as positions": ((3, 4), {"positions": ["0", "1", "2"]}, TypeError, f"{NO_NUMBERS} <U1"),
    "complex positions": ((3, 4), {"positions": [0, 1, 2j]}, TypeError, f"{NO_NUMBERS} complex128"),
    "object positions": ((3, 4), {"positions": [0, 1, 2**70]}, TypeError, f"{NO_NUMBERS} object"),
    "int dtype": ((3, 4), {"dtype": np.int32}, TypeError, "dtype: expected .*float.*, got <class 'numpy.int32'>"),
    "complex dtype": ((3, 4), {"dtype": complex}, TypeError, "dtype: expected .*float.*, got <class 'complex'>"),
    "dtype with commas": ((3, 4), {"dtype": "f4,,"}, TypeError, "dtype: expected .*float.*, got 'f4,,'"),
    "dtype of a pair": ((3, 4), {"dtype": (None, -1)}, TypeError, r"dtype: expected .*float.*, got \(None, -1\)"),
    "unknown dtype": ((3, 4), {"dtype": "nonsense"}, TypeError, "dtype: expected .*float.*, got 'nonsense'"),
    "no dtype": ((3, 4), {"dtype": None}, TypeError, "dtype: expected .*float.*, got None"),
}


@both
def test_any_real_base(library):
    """Also one whose comparison with the largest float would overflow."""
    for base in (10, np.float32(10), np.float16(10), np.longdouble(10), Fraction(10)):
        np.testing.assert_array_equal(library.sinusoidal_encoding(9, 6, base=base),
                                      library.sinusoidal_encoding(9, 6, base=10.0))


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.sinusoidal_encoding(*args, **options)


BAD_OUTS = {
    "list": ([[0.0] * 4] * 3, TypeError, "out: expected a numpy.ndarray, got list"),
    "float64": (np.empty((3, 4)), TypeError, r"out: expected dtype float32, got float64; out\[...\] = result casts$"),
    "swapped": (np.empty((3, 4), ">f4"), TypeError, "out: expected dtype float32, got >f4"),
    "transposed": (np.empty((4, 3), np.float32), ValueError, r"out: expected shape \(3, 4\), got shape \(4, 3\)"),
    "an axis more": (
        np.empty((1, 3, 4), np.float32), ValueError, r"out: expected shape \(3, 4\), got shape \(1, 3, 4\)",
    ),
    "read-only": (
        np.broadcast_to(np.float32(0), (3, 4)), ValueError, "out: expected a writeable array, got a read-only",
    ),
    "overlapping rows": (
        as_strided(np.zeros(9, np.float32), (3, 4), (4, 4)), ValueError,
        r"out: expected elements that do not overlap each other, got strides \(4, 4\)",
    ),
    "repeated rows": (
        as_strided(np.zeros(9, np.float32), (3, 4), (0, 4)), ValueError, "out: expected elements that do not overlap",
    ),
}


@pytest.mark.parametrize(("out", "error", "message"), BAD_OUTS.values(), ids=BAD_OUTS)
def test_bad_out(out, error, message):
    with pytest.raises(error, match=f"^{message}"):
        cattn.sinusoidal_encoding(3, 4, out=out)


def test_public_table_has_no_long_double():
    if np.dtype(np.longdouble) != np.float64:
        with pytest.raises(TypeError, match=r"^dtype: expected one of float16, bfloat16, float32, float64, got"):
            cattn.sinusoidal_encoding(3, 4, dtype=np.longdouble)


BAD_SHIFTS = {
    "odd dim": ((1, 5), {}, ValueError, r"dim: expected an even number \(an unpaired sine cannot be rotated\), got 5"),
    "dim of 0": ((1, 0), {}, ValueError, "dim: expected an int >= 1, got 0"),
    "large dim": (
        (1, 2**30), {}, ValueError, r"dim: expected at most 2\*\*58 elements in the matrix, got 1073741824 \* ",
    ),
    "huge dim": (
        (1, 2**62), {}, ValueError,
        r"dim: expected at most 2\*\*58 elements in the matrix, got 4611686018427387904 \* ",
    ),
    "float delta": ((0.5, 4), {}, TypeError, r"delta: expected an int, got 0\.5"),
    "huge delta": ((-(10**400), 4), {}, ValueError, r"delta: expected an int within \+-2\*\*53, got -1000"),
    "base of 0": ((1, 4), {"base": 0.0}, ValueError, r"base: expected a finite float >= 1, got 0\.0"),
    "text as endpoint": ((1, 4), {"endpoint": "yes"}, TypeError, "endpoint: expected a bool, got 'yes'"),
    "dim of 2 with endpoint": (
        (1, 2), {"endpoint": True}, ValueError, "dim: expected an even number >= 4 with endpoint=True",
    ),
    "no layout": ((1, 4), {"layout": None}, ValueError, f"layout: {LAYOUT_RULE}, got None"),
    "int dtype": ((1, 4), {"dtype": int}, TypeError, "dtype: expected a float dtype, got <class 'int'>"),
}


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_SHIFTS.values(), ids=BAD_SHIFTS)
def test_bad_shift(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.relative_shift(*args, **options)


BAD_LAYERS = {
    "dim of 0": ((0,), {}, ValueError, "dim: expected an int >= 1, got 0"),
    "dropout of 1": ((4, 1.0), {}, ValueError, r"dropout: expected a float in \[0, 1\), got 1\.0"),
    "text as dropout": ((4, "0.1"), {}, TypeError, r"dropout: expected a float in \[0, 1\), got '0\.1'"),
    "negative max_len": ((4, 0.1, -1), {}, ValueError, "max_len: expected an int >= 0, got -1"),
    "float max_len": ((4, 0.1, 1e3), {}, TypeError, r"max_len: expected an int, got 1000\.0"),
    "huge max_len": ((4, 0.1, 2**57), {}, ValueError, r"max_len: expected at most 2\*\*58 elements in the table, got "),
    "huge dim": ((2**59, 0.1, 0), {}, ValueError, r"max_len: expected at most 2\*\*58 elements in the table, got "),
    "base of 0": ((4,), {"base": 0.0}, ValueError, "base: "),
    "empty layout": ((4,), {"layout": ""}, ValueError, "layout: "),
    "int endpoint": ((4,), {"endpoint": 0}, TypeError, "endpoint: "),
    "odd dim with endpoint": (
        (5,), {"endpoint": True}, ValueError, "dim: expected an even number >= 4 with endpoint=True",
    ),
    "int dtype": ((4,), {"dtype": int}, TypeError, "dtype: "),
}


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_bad_encoding_layer(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.PositionalEncoding(*args, **options)


BAD_INPUTS = {
    "another width": (
        np.zeros((2, 5), np.float32), {}, ValueError, r"x: expected \(\.\.\., seq, 4\), got shape \(2, 5\)",
    ),
    "1 axis": (np.zeros(4, np.float32), {}, ValueError, r"x: expected \(\.\.\., seq, 4\), got shape \(4,\)"),
    "float64": (
        np.zeros((2, 3, 4)), {}, TypeError, "x: expected the dtype of the layer, float32, got float64; "
                                            r"x\.astype\(layer\.P\.dtype\) casts$",
    ),
    "lists": (
        np.zeros((3, 4)).tolist(), {}, TypeError, "x: expected the dtype of the layer, float32, got float64; "
                                                  r"np\.asarray\(x, layer\.P\.dtype\) casts$",
    ),
    "token numbers": (
        np.zeros((2, 3), int), {}, TypeError, "x: expected the dtype of the layer, float32, got int64; "
                                              "token numbers are looked up in an embedding first$",
    ),
    "nothing": (None, {}, TypeError, "x: expected an array, got None$"),
    "ints": (np.zeros((2, 3, 4), int), {}, TypeError, "x: expected the dtype of the layer, float32, got int64"),
    "ragged": ([[1.0], [2.0, 3.0]], {}, ValueError, "x: expected an array, got a list that makes none: "),
    "negative seed": (np.zeros((3, 4), np.float32), {"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
    "seed beyond 64 bits": (np.zeros((3, 4), np.float32), {"seed": 2**64}, ValueError, "seed: expected an int below"),
    "float seed": (np.zeros((3, 4), np.float32), {"seed": 0.5}, TypeError, "seed: expected an int, got 0.5"),
    "text as training": (
        np.zeros((3, 4), np.float32), {"training": "no"}, TypeError, "training: expected a bool, got 'no'",
    ),
}


@both
@pytest.mark.parametrize(("x", "options", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_layer_input(library, x, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.PositionalEncoding(4, 0.1)(x, **({"training": True} | options))
