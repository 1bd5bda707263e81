"""Rotary positions, the reference and the public ones: tables, both pairings, positions, in place, layouts, errors."""

import doctest
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from problems import BFLOAT16, EDGES, FLOATS, LAYOUTS, NAN, around, assert_same_bits, normal
from tolerance import HALF_ULP, WIDER_THAN_DOUBLE

import cattn
import cattn.reference

F32, F64, F16 = FLOATS[:3]
(PIECE,), (RUN,) = EDGES["rotary_pairs"], EDGES["rotary_run"]
# Pairs on both sides of every edge: vectors of each width, pieces of rows.
PAIRS = sorted({1, 2, 3, 5, 64, 2 * PIECE + 7, RUN + 9} | around(*EDGES["lanes"], 2 * max(EDGES["lanes"]), PIECE))

both = pytest.mark.parametrize("library", [cattn, cattn.reference], ids=["public", "reference"])
pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


# Tables.


def test_bfloat16_where_numpy_does_not_know_it():
    """In a process without ml_dtypes: the bits."""
    code = """if 1:
        import sys
        import numpy as np, cattn
        assert "ml_dtypes" not in sys.modules
        for library in (cattn, cattn.reference):
            tables = [library.sinusoidal_encoding(50, 6, dtype="bfloat16"),
                      *library.rotary_table(50, 6, dtype="bfloat16")]
            if library is cattn:
                out = np.empty((50, 6), np.uint16)
                assert library.sinusoidal_encoding(50, 6, dtype="bfloat16", out=out) is out
                tables.append(out)
            print(b"".join(x.tobytes() for x in tables).hex(), *{x.dtype.name for x in tables})
        try:
            cattn.PositionalEncoding(4, dtype="bfloat16")
        except TypeError as error:
            assert "dtype: expected" in str(error)
        else:
            raise AssertionError
    """
    lines = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    for bits, dtype, library in zip(lines[::2], lines[1::2], (cattn, cattn.reference), strict=True):
        table = library.sinusoidal_encoding(50, 6, dtype=BFLOAT16)
        tables = [table, *library.rotary_table(50, 6, dtype=BFLOAT16), *([table] if library is cattn else [])]
        assert dtype == "uint16"
        assert bits == b"".join(x.tobytes() for x in tables).hex()


@dtypes
def test_tables_are_those_of_sines_and_cosines(isa, dtype):
    """The same bits as sinusoidal_encoding's, on both sides of its blocks and strips."""
    (rows,), (columns,) = EDGES["table_rows"], EDGES["table_columns"]
    shapes = [(0, 4), (1, 2), *((n, 6) for n in sorted(around(rows, 2 * rows, rows**2))),
              *((70, n) for n in (columns - 2, columns, columns + 2, 3 * columns + 10))]
    for (length, dim), offset in itertools.product(shapes, (0, -7, 10**8)):
        options = {"offset": offset, "base": 500.0, "dtype": dtype}
        cos, sin = cattn.rotary_table(length, dim, **options)
        assert (cos.shape, sin.shape, cos.dtype, sin.dtype) == ((length, dim // 2), (length, dim // 2), dtype, dtype)
        assert cos.flags.c_contiguous and sin.flags.c_contiguous
        expected = cattn.sinusoidal_encoding(length, dim, layout="cosines_first", **options)
        assert_same_bits(np.concatenate([cos, sin], axis=1), expected)


@both
@dtypes
def test_tables_of_a_base(library, dtype):
    options = {"base": 10.0, "offset": 5, "dtype": dtype}
    expected = cattn.reference.sinusoidal_encoding(300, 12, layout="cosines_first", **options).astype(float)
    # Of angles, as test_positional.py has it, on both sides; and where they round to either side of a tie, an ulp of 1.
    ulp = 2 * HALF_ULP[dtype.name][0] if dtype.name in HALF_ULP else float(np.finfo(dtype).eps)
    atol = 4e-15 + 2 * 2.3e-16 * 305 + ulp
    for table, part in zip(library.rotary_table(300, 12, **options), (expected[:, :6], expected[:, 6:]), strict=True):
        assert table.dtype == dtype
        np.testing.assert_allclose(table.astype(float), part, rtol=0, atol=atol)


FREQUENCIES = {
    "small": np.array([1.0, 0.5, 1e-3, 0.0, 1e-300, 1 / 3]), "negative": np.array([-1.0, 0.25, -0.3, -0.0, 0.9, 0.1]),
    "large": np.array([100.0, math.pi, 7.25, 2.0**20, -50.0, 1.0]), "integers": [0, 1, 2, 3, 4, 5],
    "float32": np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32), "bfloat16": np.arange(6).astype(BFLOAT16) / 8,
    "reversed": np.linspace(0, 1, 6)[::-1], "every second": np.linspace(0, 1, 12)[::2],
}


@pytest.mark.skipif(not WIDER_THAN_DOUBLE, reason="nothing more exact than double to compare with")
@both
@pytest.mark.parametrize("frequencies", FREQUENCIES.values(), ids=FREQUENCIES)
def test_given_frequencies(isa, library, frequencies):
    wide = np.asarray(frequencies).astype(np.longdouble)
    for length, offset in ((1, 0), (200, -30), (130, 10**8)):
        position = np.arange(offset, offset + length).astype(np.longdouble)[:, None]
        angle = position * wide
        # Angles are rounded relative to their parts, of which a table that begins below 0 has larger ones.
        bound = 2e-15 + 2.3e-16 * (np.abs(position) + 2 * abs(min(offset, 0))) * np.maximum(1, np.abs(wide))
        tables = library.rotary_table(length, 12, offset=offset, frequencies=frequencies, dtype=np.float64)
        for table, exact in zip(tables, (np.cos(angle), np.sin(angle)), strict=True):
            assert (np.abs(table - exact) <= bound).all()
        for table, narrow in zip(tables, library.rotary_table(length, 12, offset=offset, frequencies=frequencies),
                                 strict=True):
            assert (np.abs(narrow - table) <= 2.0**-25).all()


def test_many_frequencies(isa):
    """In several strips, each with its own part of them; the columns of a table do not depend on the others."""
    frequencies = np.random.default_rng(0).random(1300)
    cos, sin = cattn.rotary_table(70, 2600, frequencies=frequencies)
    for column in (0, 511, 512, 1023, 1024, 1299):
        alone = cattn.rotary_table(70, 2, frequencies=frequencies[column : column + 1])
        assert_same_bits(np.stack(alone)[..., 0], np.stack([cos, sin])[..., column].copy())


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_tables_do_not_depend_on_threads(isa, num_threads):
    cattn.set_num_threads(1)
    expected = cattn.rotary_table(9000, 64)
    cattn.set_num_threads(num_threads)
    assert_same_bits(cattn.rotary_table(9000, 64), expected)


# What Hugging Face computes for a model's "rope_scaling", in float64.


def of_llama3(f, factor=8, low_freq_factor=1, high_freq_factor=4, trained=8192):
    result = []
    for frequency in f:
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / high_freq_factor:
            result.append(frequency)
        elif wavelength > trained / low_freq_factor:
            result.append(frequency / factor)
        else:
            smooth = (trained / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(result), 1.0


def of_yarn(f, dim=128, base=10000.0, factor=4, fast=32, slow=1, trained=4096):
    def pair_that_turns(times):
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair_that_turns(fast)), 0), min(math.ceil(pair_that_turns(slow)), dim - 1)
    result = []
    for pair, frequency in enumerate(f):
        extrapolated = 1 - min(max((pair - low) / (high - low), 0), 1)
        result.append(frequency / factor * (1 - extrapolated) + frequency * extrapolated)
    return np.array(result), 0.1 * math.log(factor) + 1


def of_ntk(f, dim=128, base=10000.0, factor=4):
    return (base * factor ** (dim / (dim - 2))) ** -(np.arange(dim // 2) * 2 / dim), 1.0


@pytest.mark.parametrize(("name", "formula"), [
    ("llama3", of_llama3), ("yarn", of_yarn), ("ntk", of_ntk), ("linear", lambda f: (f / 4, 1.0)),
])
def test_recipes(name, formula):
    """Those of the docstring, run as they stand there."""
    page = {"np": np, "rotary_table": cattn.rotary_table}
    for example in doctest.DocTestParser().get_examples(cattn.rotary_table.__doc__):
        exec(example.source, page)
    frequencies, enlarged = formula(10000.0 ** (-np.arange(64) / 64))
    angle = np.arange(100)[:, None] * frequencies
    for table, exact in zip(page[name], (np.cos(angle), np.sin(angle)), strict=True):
        assert table.shape == (100, 64)
        # float32, twice where it is enlarged; and frequencies that are rounded in another order.
        np.testing.assert_allclose(table, enlarged * exact, rtol=0, atol=2.0**-23)


# Embeddings.


def tables(rows, pairs, dtype=F32, seed=0):
    """cos and sin of any angles."""
    angle = np.random.default_rng(seed).uniform(-4, 4, (rows, pairs))
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def slices(pairs, interleaved):
    return ((slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved
            else (slice(0, pairs), slice(pairs, 2 * pairs)))


def assert_exact(out, x, cos, sin, interleaved):
    """Within what rounding can do: u of each product and of the sum, and the result's own. cos and sin broadcast."""
    compute = np.result_type(x.dtype, np.float32)
    wide = np.longdouble if compute == F64 else np.float64
    unit = float(np.finfo(compute).eps) / 2 * (1 if compute == F32 or WIDER_THAN_DOUBLE else 2)
    pairs = cos.shape[-1]
    first, second = slices(pairs, interleaved)
    a, b, c, s = (array.astype(compute).astype(wide) for array in (x[..., first], x[..., second], cos, sin))
    relative, absolute = HALF_ULP.get(out.dtype.name, (0, 0))
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    for result, exact, size in ((out[..., first], a * c - b * s, np.abs(a * c) + np.abs(b * s)),
                                (out[..., second], b * c + a * s, np.abs(b * c) + np.abs(a * s))):
        bound = 2 * unit * (1 + unit) * size + 2 * float(np.finfo(compute).smallest_subnormal)
        bound += np.maximum(relative * (np.abs(exact) + bound), absolute)
        assert (np.abs(result.astype(wide) - exact) <= bound).all()
    assert_same_bits(out[..., 2 * pairs :].copy(), x[..., 2 * pairs :].copy())


@both
@pairings
@dtypes
def test_any_number_of_pairs(isa, library, interleaved, dtype):
    """All columns and some, on both sides of every edge of the kernel's loops."""
    for pairs, rest in itertools.product(PAIRS, (0, 1, 40)):
        x = normal(2, 3, 5, 2 * pairs + rest, dtype=dtype)
        before = x.copy()
        cos, sin = tables(5, pairs, F64 if dtype == F64 else F32)
        out = library.rotary_embedding(x, cos, sin, interleaved=interleaved)
        assert_exact(out, x, cos, sin, interleaved)
        assert_same_bits(x, before)


@both
@pairings
def test_a_turn_is_a_complex_product(isa, library, interleaved):
    """Angles by hand: pair i of position p is multiplied by exp(1j * p / 10000^(2i / dim))."""
    x = normal(2, 3, 50, 8, dtype=F64)
    cos, sin = library.rotary_table(50, 8, dtype=np.float64)
    out = library.rotary_embedding(x, cos, sin, interleaved=interleaved)
    first, second = slices(4, interleaved)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(
        1j * np.arange(50)[:, None] / 10000.0 ** (np.arange(4) / 4))
    # An angle's rounding at position 49, 2.3e-16 * 49 on both sides, times numbers below 4.
    np.testing.assert_allclose(out[..., first], turned.real, rtol=0, atol=1e-13)
    np.testing.assert_allclose(out[..., second], turned.imag, rtol=0, atol=1e-13)


@both
def test_a_quarter_of_a_turn(isa, library):
    """Whole numbers, which are exact: (a, b) becomes (-b, a)."""
    cos, sin = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    for dtype in FLOATS:
        x = np.array([[1, 2, 3, 4, 5]]).astype(dtype)
        for interleaved, expected in ((True, [-2, 1, -4, 3, 5]), (False, [-3, -4, 1, 2, 5])):
            out = library.rotary_embedding(x, cos, sin, interleaved=interleaved)
            np.testing.assert_array_equal(out.astype(float), [expected])
            back = library.rotary_embedding(out, cos, -sin, interleaved=interleaved)
            np.testing.assert_array_equal(back.astype(float), x.astype(float))


@pairings
def test_scores_depend_on_distance(isa, interleaved):
    query, key = normal(64, dtype=F64), normal(64, dtype=F64, seed=1)
    cos, sin = cattn.rotary_table(300, 64, dtype=np.float64)
    queries, keys = (cattn.rotary_embedding(np.broadcast_to(x, (300, 64)), cos, sin, interleaved=interleaved)
                     for x in (query, key))
    scores = queries @ keys.T
    for distance in (-100, -1, 0, 1, 30):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=1e-11)
    assert abs(scores[0, 0] - scores[0, 1]) > 1e-3


@dtypes
def test_pairings_are_permutations_of_each_other(isa, dtype):
    """To the bit: columns 0, 2, 4, ... before 1, 3, 5, ..."""
    for pairs in PAIRS:
        x = normal(2, 2, 7, 2 * pairs, dtype=dtype)
        cos, sin = tables(7, pairs)
        order = np.concatenate([np.arange(0, 2 * pairs, 2), np.arange(1, 2 * pairs, 2)])
        interleaved = cattn.rotary_embedding(x, cos, sin, interleaved=True)
        halves = cattn.rotary_embedding(x[..., order].copy(), cos, sin, interleaved=False)
        assert_same_bits(interleaved[..., order].copy(), halves)


@pairings
@dtypes
def test_what_is_not_finite_stays_in_its_pair(isa, interleaved, dtype):
    """Columns that are not turned pass through as bits."""
    x = normal(2, 1, 4, 75, dtype=dtype)
    cos, sin = tables(4, 35)
    expected = cattn.rotary_embedding(x, cos, sin, interleaved=interleaved)
    first, second = (np.arange(75)[part] for part in slices(35, interleaved))
    x[1, 0, 2, first[33]], x[0, 0, 1, second[3]] = np.inf, NAN
    x.view(f"u{dtype.itemsize}")[..., 72] = np.iinfo(f"u{dtype.itemsize}").max - 5  # a NaN with a payload
    out = cattn.rotary_embedding(x, cos, sin, interleaved=interleaved)
    changed = np.zeros(x.shape, bool)
    for batch, row, pair in ((1, 2, 33), (0, 1, 3)):
        changed[batch, 0, row, [first[pair], second[pair]]] = True
    assert not np.isfinite(out[changed].astype(float)).any()
    assert_same_bits(out[..., 70:].copy(), x[..., 70:].copy())
    changed[..., 70:] = True
    assert_same_bits(out[~changed], expected[~changed])


@pairings
def test_range_of_16_bits(isa, interleaved):
    """What overflows is infinite; numbers that are subnormal stay."""
    cos, sin = np.full((1, 20), 1, np.float32), np.full((1, 20), 1, np.float32)
    for dtype, largest in ((F16, 65504.0), (BFLOAT16, float(np.array(0x7F7F, np.uint16).view(BFLOAT16)))):
        x = np.full((1, 40), largest).astype(dtype)
        out = cattn.rotary_embedding(x, cos, sin, interleaved=interleaved).astype(float)
        assert set(out.ravel().tolist()) == {0.0, np.inf}
        x = np.ones((1, 40), np.uint16).view(dtype)  # the smallest
        out = cattn.rotary_embedding(x, cos, sin, interleaved=interleaved)
        assert set(out.view(np.uint16).ravel().tolist()) == {0, 2}


# Where the tables' rows come from.


@both
@pairings
def test_ways_to_say_the_same_positions(isa, library, interleaved):
    cos, sin = tables(40, 6)
    x = normal(3, 2, 5, 14)                                               # (batch, heads, seq, dim)
    ids = np.array([[0, 1, 2, 3, 4], [7, 7, 39, 0, 5], [10, 11, 12, 13, 14]])

    def turned(x, *tables, positions=None):
        return library.rotary_embedding(x, *tables, positions, interleaved=interleaved)

    expected = turned(x, cos, sin, positions=np.repeat(ids[:, None], 2, axis=1))
    assert_exact(expected, x, cos[ids][:, None], sin[ids][:, None], interleaved)
    same = [
        turned(x, cos, sin, positions=ids[:, None]), turned(x, cos, sin, positions=ids[:, None].tolist()),
        turned(x, cos[ids][:, None], sin[ids][:, None]),                  # aligned with x
        *(turned(x, cos, sin, positions=ids[:, None].astype(kind)) for kind in ("i1", "u2", ">i4", "u8")),
        turned(x, cos, sin, positions=np.repeat(ids[:, None], 2, axis=1)[..., ::-1][..., ::-1]),
    ]
    for out in same:
        assert_same_bits(out, expected)
    packed = x.swapaxes(1, 2).reshape(15, 2, 14)                          # (total, heads, dim)
    for out in (turned(packed, cos, sin, positions=ids.reshape(15, 1)),
                turned(packed, cos[ids].reshape(15, 1, 6), sin[ids].reshape(15, 1, 6))):
        assert_same_bits(out.reshape(3, 5, 2, 14).swapaxes(1, 2).copy(), expected)
    first = turned(x, cos[:5], sin[:5])                                   # the sequence is axis -2
    assert_same_bits(first, turned(x, cos, sin, positions=np.arange(5)[None, None]))
    assert_same_bits(first[:1], expected[:1])
    assert_same_bits(turned(x[0, 0], cos[:5], sin[:5]), first[0, 0])      # 2 axes
    assert_same_bits(turned(x[:, 0], cos[None, :5], sin[None, :5]), first[:, 0].copy())
    assert_same_bits(turned(x[:, 0], cos, sin, positions=np.arange(5)[None]), first[:, 0].copy())
    assert_same_bits(turned(x[0, 0, 3], cos[3], sin[3]), first[0, 0, 3])  # 1 axis
    assert_same_bits(turned(x[0, 0, 3], cos, sin, positions=3), first[0, 0, 3])
    heads = np.arange(2)[:, None]                                         # a row for each head
    assert_same_bits(turned(x, cos, sin, positions=heads[None]), turned(x, cos[heads][None], sin[heads][None]))


@pairings
@dtypes
def test_more_axes(isa, interleaved, dtype):
    """Those that become one, and those that do not."""
    cos, sin = tables(9, 4)
    positions = np.random.default_rng(0).integers(0, 9, (2, 3, 4, 2, 5))
    x = normal(2, 3, 4, 2, 5, 9, dtype=dtype)
    expected = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        expected[index] = cattn.rotary_embedding(x[index], cos, sin, positions[index], interleaved=interleaved)
    some = positions[:, :1, :, :1]
    of_some = cattn.rotary_embedding(x.reshape(24, 2, 5, 9), cos, sin, interleaved=interleaved,
                                     positions=np.broadcast_to(some, positions.shape).reshape(24, 2, 5))
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        back = np.argsort(order)
        moved = np.ascontiguousarray(x.transpose(*order, 5)).transpose(*back, 5)
        for out in (None, np.zeros((2, 6, 4, 2, 5, 12), dtype)[:, ::2, ..., 2:-1]):
            result = cattn.rotary_embedding(moved, cos, sin, positions, interleaved=interleaved, out=out)
            assert_same_bits(result.copy(), expected)
        result = cattn.rotary_embedding(moved, cos[positions], sin[positions], interleaved=interleaved)
        assert_same_bits(result, expected)
        assert_same_bits(cattn.rotary_embedding(moved, cos, sin, some, interleaved=interleaved).reshape(24, 2, 5, 9),
                         of_some)
    sequence = cattn.rotary_embedding(x, cos[:5], sin[:5], interleaved=interleaved)
    assert_same_bits(sequence[1, 2], cattn.rotary_embedding(x[1, 2], cos[:5], sin[:5], interleaved=interleaved))
    one = x[:, :1, :, :1, :1]  # of length 1
    assert_same_bits(cattn.rotary_embedding(one, cos, sin, positions[:, :1, :, :1, :1], interleaved=interleaved),
                     expected[:, :1, :, :1, :1].copy())


@both
def test_more_axes_than_numpy_broadcasts(library):
    x, tables = np.ones((1,) * 31 + (4,), np.float32), np.ones((2, 1, 2), np.float32)
    out = library.rotary_embedding(x, *tables, interleaved=True)
    np.testing.assert_array_equal(out.ravel(), [0, 2, 0, 2])


@both
@dtypes
def test_tables_of_the_dtype_of_x(isa, library, dtype):
    """float32 and that of x; each as what it holds."""
    x = normal(1, 2, 6, 40, dtype=dtype)
    for table_dtype, interleaved in itertools.product({F32, dtype}, (False, True)):
        cos, sin = tables(6, 18, table_dtype)
        out = library.rotary_embedding(x, cos, sin, interleaved=interleaved)
        assert_exact(out, x, cos, sin, interleaved)
        compute = np.result_type(dtype, np.float32)
        assert_same_bits(out, library.rotary_embedding(x, cos.astype(compute), sin.astype(compute),
                                                       interleaved=interleaved))


# What must not matter.


@pairings
@dtypes
def test_strides(isa, interleaved, dtype):
    for pairs, rest in ((24, 0), (19, 7), (PIECE + 3, 2)):
        x = normal(2, 3, 5, 2 * pairs + rest, dtype=dtype)
        cos, sin = tables(5, pairs)
        expected = cattn.rotary_embedding(x, cos, sin, interleaved=interleaved)
        plain = [layout for name, layout in LAYOUTS.items() if "heads" not in name]
        for number, layout in enumerate(LAYOUTS.values()):
            result = cattn.rotary_embedding(layout(x), cos, sin, interleaved=interleaved)
            assert_same_bits(result, expected)
            out = layout(np.zeros_like(x))
            table_layout = plain[number % len(plain)]
            assert cattn.rotary_embedding(x, table_layout(cos), table_layout(sin), interleaved=interleaved,
                                          out=out) is out
            assert_same_bits(out.copy(), expected)


@pairings
@dtypes
def test_in_place(isa, interleaved, dtype):
    for pairs, rest in ((24, 0), (19, 7), (PIECE + 3, 0)):
        x = normal(2, 3, 5, 2 * pairs + rest, dtype=dtype)
        cos, sin = tables(5, pairs)
        expected = cattn.rotary_embedding(x, cos, sin, interleaved=interleaved)
        for layout in LAYOUTS.values():
            own = layout(x)
            assert cattn.rotary_embedding(own, cos, sin, interleaved=interleaved, out=own) is own
            assert_same_bits(own.copy(), expected)
    whole = np.zeros((4, 10, 32), dtype)  # by two views of the same part
    whole[:, 2:5, 8:] = x = normal(4, 3, 24, dtype=dtype)
    cos, sin = tables(3, 12)
    cattn.rotary_embedding(whole[:, 2:5, 8:], cos[None], sin[None], interleaved=interleaved, out=whole[:, 2:5, 8:])
    assert_same_bits(whole[:, 2:5, 8:].copy(), cattn.rotary_embedding(x, cos[None], sin[None], interleaved=interleaved))
    whole[:, 2:5, 8:] = 0
    assert not whole.astype(float).any()


@pairings
@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
def test_threads_and_other_rows(isa, interleaved, dtype):
    """On both sides of a run of rows, in any order of the axes; a row depends on itself alone."""
    for dim, rows in ((64, RUN // 64), (RUN + 2, 3)):
        for shape in ((1, 5, rows + 1, dim), (rows, 3, 2, dim), (2, 2, rows - 1, dim)):
            x = normal(*shape, dtype=dtype)
            cos, sin = tables(max(shape[:-1]), dim // 2 - 1)
            positions = np.random.default_rng(0).integers(0, len(cos), (shape[0], 1, shape[2]))
            expected = cattn.rotary_embedding(x, cos, sin, positions, interleaved=interleaved, num_threads=1)
            for num_threads in (2, 3, 7):
                out = cattn.rotary_embedding(x, cos, sin, positions, interleaved=interleaved, num_threads=num_threads)
                assert_same_bits(out, expected)
            swapped = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
            out = cattn.rotary_embedding(swapped, cos, sin, positions, interleaved=interleaved, out=swapped)
            assert_same_bits(out.copy(), expected)
            alone = cattn.rotary_embedding(x[-1:, 1:2, -1:], cos, sin, positions[-1:, :, -1:], interleaved=interleaved)
            assert_same_bits(alone, expected[-1:, 1:2, -1:].copy())
            if dtype == F32 and shape[0] == 1:
                assert_exact(expected, x, cos[positions], sin[positions], interleaved)


@both
@pairings
def test_empty(isa, library, interleaved):
    for shape in ((0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8), (0, 8), (3, 0, 2, 0, 4, 8)):
        cos, sin = tables(shape[-2], 3)
        assert library.rotary_embedding(np.zeros(shape), cos, sin, interleaved=interleaved).shape == shape
        positions = np.zeros((1,) * (len(shape) - 2) + (0,), int) if not shape[-2] else np.zeros((0, *shape[1:-1]), int)
        if not shape[0] or not shape[-2]:
            none = np.zeros((0, 3), np.float32)
            out = library.rotary_embedding(np.zeros(shape), none, none, positions, interleaved=interleaved)
            assert out.shape == shape
    no_columns = np.zeros((2, 3, 0), np.float32)
    for dtype in FLOATS:
        x = normal(2, 2, 3, 5, dtype=dtype)  # nothing turns
        assert_same_bits(library.rotary_embedding(x, *no_columns, interleaved=interleaved), x)
    assert library.rotary_embedding(np.zeros((3, 0), "f"), *no_columns, interleaved=interleaved).shape == (3, 0)


# Bad input.

F = np.float32


def zeros(*shape, dtype=F):
    return np.zeros(shape, dtype)


BAD_TABLES = {
    "odd dim": ((3, 5), {}, ValueError, r"dim: expected an even number \(a pair of columns turns together\), got 5$"),
    "dim of 0": ((3, 0), {}, ValueError, "dim: expected an int >= 1, got 0$"),
    "float dim": ((3, 4.0), {}, TypeError, r"dim: expected an int, got 4\.0$"),
    "negative length": ((-1, 4), {}, ValueError, "length: expected an int >= 0, got -1$"),
    "huge table": ((2**40, 2**40), {}, ValueError, r"length: expected at most 2\*\*58 elements in the table, got "),
    "base below 1": ((3, 4), {"base": 0.5}, ValueError, r"base: expected a finite float >= 1, got 0\.5$"),
    "text as base": ((3, 4), {"base": "1e4"}, TypeError, "base: expected a finite float >= 1, got '1e4'$"),
    "far offset": ((3, 4), {"offset": 2**53}, ValueError, r"offset: expected positions within \+-2\*\*53, got "),
    "float offset": ((3, 4), {"offset": 1.5}, TypeError, r"offset: expected an int, got 1\.5$"),
    "int dtype": ((3, 4), {"dtype": int}, TypeError, "dtype: expected .*float.*, got <class 'int'>$"),
    "too few frequencies": (
        (3, 4), {"frequencies": [1.0]}, ValueError,
        r"frequencies: expected one for each pair of columns, shape \(2,\), got shape \(1,\)$",
    ),
    "frequencies for each column": (
        (3, 4), {"frequencies": np.ones(4)}, ValueError, r"frequencies: expected .* \(2,\), got shape \(4,\)$",
    ),
    "bool frequencies": (
        (3, 4), {"frequencies": [True, True]}, TypeError, "frequencies: expected a float or int array, got dtype bool$",
    ),
    "complex frequencies": (
        (3, 4), {"frequencies": [1j, 0]}, TypeError, "frequencies: expected a float or int array, got dtype complex128",
    ),
    "frequency of NaN": (
        (3, 4), {"frequencies": [1, NAN]}, ValueError,
        r"frequencies: expected finite numbers within \+-2\*\*53, got nan$",
    ),
    "frequency of inf": (
        (3, 4), {"frequencies": [1, np.inf]}, ValueError, "frequencies: expected finite numbers .*, got inf$",
    ),
    "frequency beyond 2**53": (
        (3, 4), {"frequencies": [1, -1e16]}, ValueError, r"frequencies: expected finite numbers .*, got -1e\+16$",
    ),
    "huge frequency": (
        (3, 4), {"frequencies": np.array([1, "1e1000"], np.longdouble)}, ValueError, "frequencies: expected finite",
    ),
}


@both
@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table(library, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        library.rotary_table(*args, **options)


def test_public_table_has_no_long_double():
    if np.dtype(np.longdouble) != np.float64:
        with pytest.raises(TypeError, match=r"^dtype: expected one of float16, bfloat16, float32, float64, got"):
            cattn.rotary_table(3, 4, dtype=np.longdouble)
        cos, _ = cattn.reference.rotary_table(3, 4, dtype=np.longdouble)
        x = np.ones((3, 4), np.longdouble)
        assert cattn.reference.rotary_embedding(x, cos, cos, interleaved=True).dtype == np.longdouble


def call(library, x=None, cos=None, sin=None, positions=None, **options):
    """A good call, but for what is given: x (2, 3, 5, 8), tables of 3 columns, half of them for 6."""
    cos = zeros(5, 3) if cos is None else cos
    return library.rotary_embedding(zeros(2, 3, 5, 8) if x is None else x, cos, cos if sin is None else sin, positions,
                                    **{"interleaved": True} | options)


# The reference says the same of shapes and positions.
BAD_SHAPES = {
    "x of no axes": ({"x": np.float32(1)}, ValueError, "x: expected (..., dim), got shape ()"),
    "cos of no axes": ({"cos": np.float32(1)}, ValueError, "cos: expected (rows, columns), got shape ()"),
    "another sin": ({"sin": zeros(5, 4)}, ValueError, "sin: expected the shape of cos, (5, 3), got shape (5, 4)"),
    "too many columns": (
        {"cos": zeros(5, 5)}, ValueError,
        "cos: expected a column for each pair of x's dim of 8, 4 or fewer, got shape (5, 5)",
    ),
    "columns twice": (
        {"cos": zeros(5, 8)}, ValueError,
        "cos: expected a column for each pair of x's dim of 8, 4 or fewer, got shape (5, 8); of tables with each "
        "column twice, first all, then all again: cos[..., :4], sin likewise",
    ),
    "more rows than x": (
        {"cos": zeros(6, 3)}, ValueError,
        "cos: expected 5 rows, one for each of x's axis -2, got shape (6, 3); or pass positions, which say which rows",
    ),
    "more rows than a sequence": (
        {"x": zeros(5, 8), "cos": zeros(6, 3)}, ValueError,
        "cos: expected rows for x's (5,) (axes of 1 broadcast), got shape (6, 3); or pass positions, for cos of 2 axes",
    ),
    "3 axes": (
        {"x": zeros(2, 5, 8)}, ValueError,
        "cos: expected 3 axes, or positions with it, since x of 3 axes may be (batch, seq, dim) or (total, heads, dim)"
        ", got shape (5, 3); for the first pass cos[None] and sin[None], for the second cos[:, None] and sin[:, None]",
    ),
    "rows that do not fit": (
        {"cos": zeros(2, 1, 4, 3)}, ValueError,
        "cos: expected rows for x's (2, 3, 5) (axes of 1 broadcast), got shape (2, 1, 4, 3); or pass positions, for "
        "cos of 2 axes",
    ),
    "ONNX's caches": (
        {"cos": zeros(2, 5, 3)}, ValueError,
        "cos: expected (rows, columns), or 4 axes, as x has, got shape (2, 5, 3); for the same rows for each head: "
        "cos[:, None] and sin[:, None]",
    ),
    "5 axes": (
        {"cos": zeros(1, 1, 1, 5, 3)}, ValueError,
        "cos: expected (rows, columns), or 4 axes, as x has, got shape (1, 1, 1, 5, 3)",
    ),
    "a row alone": (
        {"cos": zeros(3)}, ValueError, "cos: expected (rows, columns), or 4 axes, as x has, got shape (3,)",
    ),
    "positions and cos of 4 axes": (
        {"cos": zeros(1, 1, 5, 3), "positions": zeros(1, 1, 5, dtype=int)}, ValueError,
        "cos: expected (rows, columns) with positions, got shape (1, 1, 5, 3)",
    ),
    "float positions": (
        {"positions": zeros(1, 1, 5)}, TypeError,
        "positions: expected integers, got dtype float32; positions.astype(int) casts",
    ),
    "list of floats": (
        {"positions": [[[0.0]]]}, TypeError,
        "positions: expected integers, got dtype float64; np.asarray(positions, int) casts",
    ),
    "bool positions": (
        {"positions": zeros(1, 1, 5, dtype=bool)}, TypeError, "positions: expected integers, got dtype bool",
    ),
    "ids": (
        {"positions": zeros(2, 5, dtype=int)}, ValueError,
        "positions: expected 3 axes, those of x but the last, that are or broadcast to (2, 3, 5), got shape (2, 5); "
        "for the same of each head: positions[:, None]",
    ),
    "one row of ids": (
        {"positions": zeros(5, dtype=int)}, ValueError,
        "positions: expected 3 axes, those of x but the last, that are or broadcast to (2, 3, 5), got shape (5,); for "
        "the same of each head: positions[None, None]",
    ),
    "one for each batch row": (
        {"x": zeros(2, 3, 1, 8), "positions": zeros(2, dtype=int)}, ValueError,
        "positions: expected 3 axes, those of x but the last, that are or broadcast to (2, 3, 1), got shape (2,); for "
        "one of each batch row: positions[:, None, None]",
    ),
    "packed": (
        {"x": zeros(7, 3, 8), "positions": zeros(7, dtype=int)}, ValueError,
        "positions: expected 2 axes, those of x but the last, that are or broadcast to (7, 3), got shape (7,); for x "
        "of (total, heads, dim) positions[:, None]",
    ),
    "either": (
        {"x": zeros(7, 7, 8), "positions": zeros(7, dtype=int)}, ValueError,
        "positions: expected 2 axes, those of x but the last, that are or broadcast to (7, 7), got shape (7,); for x "
        "of (batch, seq, dim) positions[None], for x of (total, heads, dim) positions[:, None]",
    ),
    "a number": (
        {"positions": 3}, ValueError,
        "positions: expected 3 axes, those of x but the last, that are or broadcast to (2, 3, 5), got shape ()",
    ),
    "too many positions": (
        {"positions": zeros(1, 1, 6, dtype=int)}, ValueError,
        "positions: expected 3 axes, those of x but the last, that are or broadcast to (2, 3, 5), got shape (1, 1, 6)",
    ),
    "negative position": (
        {"positions": np.array([0, 1, -1, 2, 3])[None, None]}, ValueError,
        "positions: expected ints from 0 to below 5, the rows of cos, got -1",
    ),
    "far position": (
        {"positions": np.array([0, 1, 5, 2, 3])[None, None]}, ValueError,
        "positions: expected ints from 0 to below 5, the rows of cos, got 5",
    ),
    "huge position": (
        {"positions": np.array([0, 1, 2**64 - 1, 2, 3], np.uint64)[None, None]}, ValueError,
        "positions: expected ints from 0 to below 5, the rows of cos, got 18446744073709551615",
    ),
    "no rows": (
        {"cos": zeros(0, 3), "positions": zeros(1, 1, 5, dtype=int)}, ValueError,
        "positions: expected ints from 0 to below 0, the rows of cos, got 0",
    ),
    "int interleaved": ({"interleaved": 1}, TypeError, "interleaved: expected a bool, got 1"),
    "no interleaved": ({"interleaved": None}, TypeError, "interleaved: expected a bool, got None"),
}


@both
@pytest.mark.parametrize(("options", "error", "message"), BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_bad_shapes(library, options, error, message):
    with pytest.raises(error) as caught:
        call(library, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(("shape", "positions", "cure"), [
    ((2, 3, 5, 8), np.arange(10).reshape(2, 5), "positions[:, None]"),
    ((2, 3, 5, 8), np.arange(5), "positions[None, None]"),
    ((2, 3, 1, 8), np.arange(2), "positions[:, None, None]"),
    ((7, 3, 8), np.arange(7), "positions[:, None]"),
    ((3, 7, 8), np.arange(7), "positions[None]"),
])
def test_cures_of_positions(shape, positions, cure):
    cos = zeros(20, 4)
    with pytest.raises(ValueError, match=r"^positions: ") as caught:
        call(cattn, zeros(*shape), cos, positions=positions)
    assert cure in str(caught.value)
    assert call(cattn, zeros(*shape), cos, positions=eval(cure)).shape == shape


KIND = "expected float32, float64, float16 or bfloat16 in native byte order"
BAD_DTYPES = {
    "int x": ({"x": zeros(5, 8, dtype=int)}, f"x: {KIND}, got dtype int64; x.astype(np.float32) casts"),
    "list": ({"x": [[1, 2]]}, f"x: {KIND}, got dtype int64; np.asarray(x, np.float32) casts"),
    "swapped x": ({"x": zeros(5, 8, dtype=">f4")}, f"x: {KIND}, got dtype >f4; x.astype(np.float32) casts"),
    "float64 cos": (
        {"cos": zeros(5, 3, dtype=float)}, "cos: expected float32, got dtype float64; cos.astype(np.float32) casts",
    ),
    "float64 cos for float16": (
        {"x": zeros(2, 3, 5, 8, dtype=F16), "cos": zeros(5, 3, dtype=float)},
        "cos: expected float32, or float16 as x has, got dtype float64; cos.astype(np.float32) casts",
    ),
    "float16 cos": (
        {"cos": zeros(5, 3, dtype=F16)}, "cos: expected float32, got dtype float16; cos.astype(np.float32) casts",
    ),
    "list as cos": (
        {"cos": [[1.0] * 3] * 5},
        "cos: expected float32, got dtype float64; np.asarray(cos, np.float32) casts",
    ),
    "complex cos": ({"cos": zeros(5, 3, dtype=complex)}, "cos: expected float32, got dtype complex128"),
    "another sin": (
        {"x": zeros(2, 3, 5, 8, dtype=F16), "sin": zeros(5, 3, dtype=F16)},
        "sin: expected the dtype of cos, float32, got float16; sin.astype(cos.dtype) casts",
    ),
    "float num_threads": ({"num_threads": 1.0}, "num_threads: expected an integer, got float"),
}


@pytest.mark.parametrize(("options", "message"), BAD_DTYPES.values(), ids=BAD_DTYPES)
def test_bad_dtypes(options, message):
    with pytest.raises(TypeError) as caught:
        call(cattn, **options)
    assert str(caught.value) == message


def test_interleaved_has_no_default():
    with pytest.raises(TypeError, match="interleaved"):
        cattn.rotary_embedding(zeros(5, 8), zeros(5, 3), zeros(5, 3))


X = zeros(2, 3, 5, 8)
TABLE = zeros(5, 3)
BAD_OUTS = {
    "list": ([0.0], TypeError, "out: expected a numpy.ndarray, got list"),
    "float64": (zeros(2, 3, 5, 8, dtype=float), TypeError, "out: expected dtype float32, got float64"),
    "shape": (zeros(2, 3, 5, 6), ValueError, r"out: expected shape \(2, 3, 5, 8\), got shape \(2, 3, 5, 6\)"),
    "repeated rows": (as_strided(zeros(1000), (2, 3, 5, 8), (480, 160, 0, 4)), ValueError,
                      "out: expected elements that do not overlap each other"),
    "x, a column on": (as_strided(X.reshape(-1)[1:], (2, 3, 5, 8), X.strides), ValueError,
                       "out: expected x itself, or memory of its own, got an array that overlaps x"),
    "x backwards": (X[..., ::-1], ValueError,
                    "out: expected x itself, or memory of its own, got an array that overlaps x"),
}


@pytest.mark.parametrize(("out", "error", "message"), BAD_OUTS.values(), ids=BAD_OUTS)
def test_bad_out(out, error, message):
    with pytest.raises(error, match=f"^{message}"):
        cattn.rotary_embedding(X, TABLE, TABLE, interleaved=True, out=out)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_out_over_a_table(name):
    memory = zeros(5, 8)
    tables = {"cos": zeros(5, 4), "sin": zeros(5, 4)} | {name: memory[:, :4]}
    with pytest.raises(ValueError, match=f"^out: expected memory of its own, got an array that overlaps {name}$"):
        cattn.rotary_embedding(zeros(5, 8), **tables, interleaved=True, out=memory)


@st.composite
def shared_memory(draw):
    """x and out (3, 4), in one piece of 150 bytes; the addresses of out's numbers, and of x's."""
    memory = np.zeros(150, np.uint8)
    arrays, addresses = [], []
    for _ in range(2):
        strides = draw(st.sampled_from([(16, 4), (4, 12), (-16, 4), (20, -4), (16, 5), (8, 4), (7, 21)]))
        offsets = [i * strides[0] + j * strides[1] for i in range(3) for j in range(4)]
        start = draw(st.integers(-min(offsets), min(len(memory) - 4 - max(offsets), 60)))
        arrays.append(np.ndarray((3, 4), np.float32, memory, start, strides))
        addresses.append([start + offset for offset in offsets])
    return (*arrays, *addresses)


@given(shared_memory())
def test_out_may_be_x_and_nothing_else(shared):
    x, out, of_x, of_out = shared
    bytes_of = [{address + byte for address in addresses for byte in range(4)} for addresses in (of_x, of_out)]
    rng = np.random.default_rng(0)
    out[...] = rng.standard_normal((3, 4))
    x[...] = given_x = rng.standard_normal((3, 4)).astype(np.float32)
    cos, sin = tables(3, 2)
    before = out.copy()
    if len(bytes_of[1]) < 48:
        message = "^out: expected elements that do not overlap each other"
    elif of_x != of_out and bytes_of[0] & bytes_of[1]:
        message = "^out: expected x itself, or memory of its own, got an array that overlaps x$"
    else:
        expected = cattn.rotary_embedding(x.copy(), cos, sin, interleaved=True)
        assert cattn.rotary_embedding(x, cos, sin, interleaved=True, out=out) is out
        assert_same_bits(out.copy(), expected)
        if of_x != of_out and len(bytes_of[0]) == 48:
            assert_same_bits(x.copy(), given_x)
        return
    with pytest.raises(ValueError, match=message):
        cattn.rotary_embedding(x, cos, sin, interleaved=True, out=out)
    assert_same_bits(out.copy(), before)


def test_errors_come_before_anything_is_written():
    """In place, the last position of all."""
    x = normal(2, 3, 5, 8)
    before = x.copy()
    positions = np.zeros((2, 3, 5), int)
    positions[-1, -1, -1] = 5
    with pytest.raises(ValueError, match=r"^positions: "):
        cattn.rotary_embedding(x, TABLE, TABLE, positions, interleaved=True, out=x)
    assert_same_bits(x, before)
