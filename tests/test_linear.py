"""linear(), and its kernel: as exact as its formula, whatever the shapes; a row's bits depend on itself alone, and not
on how the weights are stored."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from problems import BFLOAT16, EDGES, FLOATS, LAYOUTS, around, assert_same_bits, normal
from tolerance import HALF_ULP

import cattn
from cattn import _kernels, reference
from cattn._checks import STORED_KINDS, check_kind
from cattn._linear import linear_backward
from cattn.reference._linear import StoredWeight, quantize_rows, to_bfloat16

# On both sides of every edge: half a vector of rows are few; vectors and panels of them; blocks. Features: vectors,
# tasks. Dimensions: vectors, blocks, chunks.
(BLOCK_ROWS,), (FEATURES,), (BLOCK_DIMS,) = (EDGES[name] for name in ("block_rows", "features", "block_dims"))
(CHUNK_DIMS,), (SUM_COLUMNS,) = EDGES["chunk_dims"], EDGES["sum_columns"]
MOST_LANES = max(EDGES["lanes"])
F32, F64 = np.float32, np.float64
ROWS = sorted({1, 2, 3, 5, 24, 31, 33, 49, BLOCK_ROWS + 8} | around(*(n // 2 for n in EDGES["lanes"]), BLOCK_ROWS)
              | {n + step for n in EDGES["lanes"] for step in (0, 1)})
OUT = sorted({1, 7, 8, 2 * FEATURES + 1, 3 * FEATURES + 6} | around(MOST_LANES, FEATURES))
# And of int8: groups of 32, and as many scales as are transposed at once, or two more.
IN = sorted({1, 3, 8, MOST_LANES + 1, BLOCK_DIMS // 2, 2 * BLOCK_DIMS, 300, 576} | around(BLOCK_DIMS))
LONG_IN = sorted({2 * CHUNK_DIMS + BLOCK_DIMS + 1} | around(CHUNK_DIMS))


def linear(x, weight, bias=None, *, num_threads=0, out=None):
    """Through the kernel's entry; x of 2 or 3 axes. The weight may be a StoredWeight."""
    kind, scales = check_kind("x", x), None
    if isinstance(weight, StoredWeight):
        weight_kind, weight, scales = STORED_KINDS[weight.dtype], weight.numbers, weight.scales
    else:
        weight_kind = check_kind("weight", weight)
    if out is None:
        out = np.empty((*x.shape[:-1], len(weight)), x.dtype)
    module = _kernels.f64() if x.dtype == np.float64 else _kernels.f32
    module.linear(x, weight, scales, bias, out, kind, weight_kind, kind, num_threads)
    return out


def public(x, weight, bias=None, **options):
    """Through the door."""
    if isinstance(weight, StoredWeight):
        options["weight_scales"], weight = weight.scales, weight.numbers
    return cattn.linear(x, weight, bias, **options)


def widened(weight):
    return weight.widened() if isinstance(weight, StoredWeight) else weight


def assert_exact(result, x, weight, bias):
    """Within what rounding can do: (in_features + 1) u sum |x w| and u |bias| for each sum, and the result's own."""
    compute = np.result_type(x.dtype, np.float32)
    wide = np.longdouble if compute == np.float64 else np.float64
    unit = float(np.finfo(compute).eps) / 2
    x, weight, bias = (array.astype(compute).astype(wide) for array in (x, widened(weight), bias))
    exact = x @ weight.T + bias
    blocks = x.shape[-1] // 128 + 2
    bound = unit * ((129 + blocks) * (np.abs(x) @ np.abs(weight).T) + blocks * np.abs(bias))
    relative, absolute = HALF_ULP.get(result.dtype.name, (unit, 0))
    bound += np.maximum(relative * (np.abs(exact) + bound), absolute)
    assert (np.abs(result.astype(wide) - exact) <= bound).all()


def problem(rows, in_features, out_features, dtype, weight_dtype=None):
    """weight_dtype "int8": a StoredWeight."""
    weight = normal(out_features, in_features, seed=1)
    weight = StoredWeight.of(weight, "int8") if weight_dtype == "int8" else weight.astype(weight_dtype or dtype)
    return normal(rows, in_features, dtype=dtype), weight, normal(out_features, dtype=dtype, seed=2)


PAIRS = [(dtype, weight_dtype) for dtype in FLOATS
         for weight_dtype in dict.fromkeys([dtype, FLOATS[2], BFLOAT16, "int8"])]
pairs = pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)


@pairs
def test_shapes(isa, dtype, weight_dtype):
    shapes = [*((rows, 130, 50) for rows in ROWS), *((rows, 40, n) for n in OUT for rows in (1, 3, 20)),
              *((rows, n, 20) for n in IN for rows in (1, 6, 33))]
    for shape in shapes:
        arrays = problem(*shape, dtype, weight_dtype)
        assert_exact(linear(*arrays), *arrays)


@pytest.mark.parametrize("rows", ROWS)
def test_small_whole_numbers_are_exact(isa, rows):
    rng = np.random.default_rng(rows)
    for in_features, out_features in itertools.product(IN, OUT):
        x, weight = rng.integers(-9, 10, (rows, in_features)), rng.integers(-9, 10, (out_features, in_features))
        bias = rng.integers(-9, 10, out_features)
        for dtype in (np.float32, np.float64):
            result = linear(*(a.astype(dtype) for a in (x, weight, bias)))
            np.testing.assert_array_equal(result, x @ weight.T + bias)


@pairs
def test_a_row_depends_on_no_other(isa, dtype, weight_dtype):
    """Nor on the number of threads, nor on other rows of W."""
    x, weight, bias = problem(200, 300, 100, dtype, weight_dtype)
    together = linear(x, weight, bias)
    for rows in ROWS[:-1]:
        assert_same_bits(linear(x[7 : 7 + rows], weight, bias), together[7 : 7 + rows])
    for num_threads in (1, 2, 3):
        assert_same_bits(linear(x, weight, bias, num_threads=num_threads), together)
    for first, rows in itertools.product((0, 13, 99), (1, 6, 30)):
        part = linear(x[:rows], weight[first:], bias[first:])
        assert_same_bits(part, together[:rows, first:].copy())


def laid_out(weight, layout):
    if isinstance(weight, StoredWeight):
        return StoredWeight(weight.dtype, layout(weight.numbers), layout(weight.scales))
    return layout(weight)


@pairs
def test_layouts(isa, dtype, weight_dtype):
    for rows, in_features in itertools.product((1, 5, 40), (140, 160)):
        x, weight, bias = problem(rows, in_features, 60, dtype, weight_dtype)
        expected = linear(x, weight, bias)
        for layout in (layout for name, layout in LAYOUTS.items() if "heads" not in name):
            out = layout(np.zeros_like(expected))
            linear(layout(x), laid_out(weight, layout), layout(bias[None])[0], out=out)
            assert_same_bits(out, expected)
        grouped = np.broadcast_to(x[:, None], (rows, 3, in_features)).swapaxes(0, 1)
        out = np.empty((rows, 3, 60), dtype).swapaxes(0, 1)
        assert_same_bits(linear(grouped, weight, bias, out=out).copy(), np.broadcast_to(expected, (3, rows, 60)).copy())


@pairs
def test_what_is_not_finite_stays_in_its_row_and_feature(isa, dtype, weight_dtype):
    for rows, in_features in itertools.product((1, 3, 40), (150, 192)):
        x, weight, bias = problem(rows, in_features, 50, dtype, weight_dtype)
        expected = linear(x, weight, bias)
        x[rows // 2, 149] = np.inf
        if weight_dtype == "int8":
            weight.scales[11, 1] = np.nan
        else:
            weight[11, 3] = np.nan
        result = linear(x, weight, bias)
        changed = np.zeros(result.shape, bool)
        changed[rows // 2], changed[:, 11] = True, True
        assert not np.isfinite(result[changed].astype(float)).any()
        assert_same_bits(result[~changed], expected[~changed])


def test_empty(isa):
    for rows in (1, 30):
        x, weight, bias = problem(rows, 0, 5, np.dtype(np.float32))
        assert_same_bits(linear(x, weight, bias), np.broadcast_to(bias, (rows, 5)).copy())
        assert not linear(x, weight).any()
    assert linear(*problem(0, 9, 5, np.dtype(np.float32))).shape == (0, 5)
    assert linear(*problem(3, 9, 0, np.dtype(np.float32))).shape == (3, 0)


def test_long_rows(isa):
    """Fewer rows at a time where they are very long."""
    x, weight, bias = problem(9, 1 << 20, 3, np.dtype(np.float32))
    together = linear(x, weight, bias)
    assert_exact(together, x, weight, bias)
    for row in range(9):
        assert_same_bits(linear(x[row : row + 1], weight, bias), together[row : row + 1])


@pytest.mark.parametrize("shapes", [
    ((5, 8), (4, 7), (4,), (5, 4)), ((5, 8), (2048, 1), (4,), (5, 4)), ((5, 8), (4, 8), (1,), (5, 4)),
    ((5, 8), (4, 8), (7,), (5, 4)), ((5, 8), (4, 8), (4,), (5, 3)), ((5, 8), (4, 8), (4,), (4, 4)),
    ((2, 5, 8), (4, 8), (4,), (3, 5, 4)), ((5, 8), (2, 4, 8), (4,), (5, 4)), ((5, 8), (4, 8), (3, 4), (5, 4)),
], ids=str)
def test_shapes_that_do_not_fit_together(isa, shapes):
    """The last check before memory is read: the layer has looked at its parameters before."""
    x, weight, bias, out = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=r"linear: x of shape .* do not fit together"):
        linear(x, weight, bias, out=out)


@pytest.mark.parametrize("scales", [None, (4, 1), (4, 3), (3, 2), (2, 4, 2), (4,)], ids=str)
def test_scales_that_do_not_fit(isa, scales):
    weight = StoredWeight("int8", np.zeros((4, 40), np.int8), scales and np.zeros(scales, np.float32))
    with pytest.raises(ValueError, match=r"linear: .* scales of shape .* do not fit together"):
        linear(np.zeros((5, 40), np.float32), weight)


# Weights in fewer bits.


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("stored", STORED_KINDS)
def test_a_weight_has_the_bits_of_its_numbers(isa, dtype, stored):
    """Whether it is widened in registers or in a copy."""
    shapes = [*((rows, 576) for rows in ROWS), *((rows, n) for n in IN for rows in (1, 2, 4, 7, 16, 40))]
    for rows, in_features in shapes:
        x, weight, bias = problem(rows, in_features, 50, dtype, "int8")
        if stored != "int8":
            weight = StoredWeight.of(normal(50, in_features, seed=1), stored)
        assert_same_bits(linear(x, weight, bias), linear(x, weight.widened().astype(dtype), bias))


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 30])
def test_every_byte_and_any_scale(isa, rows):
    """-128 as well, which quantize_rows does not make; products that are subnormal, infinite or NaN. All times 1."""
    weight = np.tile(np.arange(-128, 128).astype(np.int8), (48, 1))
    scales = np.array([1, -2.5, 0, 1e-40, 3e-45, 1e-38, 3e38, np.inf, np.nan, 2**-103, 0.1], np.float32)
    stored = StoredWeight("int8", weight, np.resize(scales, (48, 8)))
    finite = np.isfinite(stored.widened()).all(axis=1)
    assert 3 < finite.sum() < 45
    for number in range(0, 256, 5):
        x = np.zeros((rows, 256), np.float32)
        x[:, number] = 1
        result = linear(x, stored)
        expected = np.broadcast_to(stored.widened()[:, number], (rows, 48))
        np.testing.assert_array_equal(result[:, finite], expected[:, finite])
        assert np.isnan(result[:, ~finite]).all()


def test_quantize_rows():
    weight = normal(7, 100) * np.geomspace(1e-30, 1e30, 7, dtype=np.float32)[:, None]
    weight[2, 32:64] = 0
    weight[3, 70], weight[4, 0] = np.inf, np.nan
    weight[5, 96:] = [1e-45, -1e-45, 0, 0]      # a scale that rounds to 0
    numbers, scales = quantize_rows(weight)
    assert (numbers.dtype, numbers.shape, scales.dtype, scales.shape) == (np.int8, (7, 100), np.float32, (7, 4))
    assert numbers.min() >= -127
    bad = np.zeros((7, 100), bool)
    bad[3, 64:96] = bad[4, :32] = True
    stands_for = StoredWeight("int8", numbers, scales).widened()
    np.testing.assert_array_equal(np.isnan(stands_for), bad)
    whole = np.repeat(scales, 32, axis=1)[:, :100].astype(float)
    # Half a scale; the quotient and the product are rounded, of 127 scales at most; the smallest number, of the scale.
    bound = whole * (0.5 + 127 * 2.0**-23) + 127 * 2.0**-149
    assert (np.abs(weight.astype(float) - stands_for)[~bad] <= bound[~bad]).all()
    groups = np.abs(weight[0, :96].reshape(3, 32)).max(axis=1)
    np.testing.assert_array_equal(scales[0, :3], groups / np.float32(127))
    assert (np.abs(numbers[0, :96].reshape(3, 32)).max(axis=1) == 127).all()
    assert quantize_rows(weight[:, :0])[1].shape == (7, 0)
    assert quantize_rows(weight[:0])[1].shape == (0, 4)


def test_to_bfloat16():
    """As ml_dtypes rounds, but for the bits of NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    bits[:10] = [0, 0x80000000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1, 0x00008000, 0x7F800001]
    numbers = bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        expected, nan = numbers.astype(ml_dtypes.bfloat16), np.isnan(numbers)
    np.testing.assert_array_equal(to_bfloat16(numbers)[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(to_bfloat16(numbers).view(ml_dtypes.bfloat16)[nan]).all()


# Transposed views, and the gradients, which are their products.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_transposed_views(isa, dtype):
    """Of x, of the weight, or of both: the bits of the same arrays otherwise, also where sums go on in other chunks."""
    shapes = [*((rows, 130, 50) for rows in ROWS), *((20, 140, n) for n in OUT),
              *((rows, n, FEATURES + 3) for n in IN + LONG_IN for rows in (1, 33, BLOCK_ROWS + 8))]
    for shape in shapes:
        x, weight, bias = problem(*shape, dtype)
        expected, turned = linear(x, weight, bias), np.asfortranarray(x)
        for arrays in (x, np.asfortranarray(weight)), (turned, weight), (turned, np.asfortranarray(weight)):
            assert_same_bits(linear(*arrays, bias), expected)
        if len(x) % 2 == 0:
            batch = turned.reshape(2, -1, x.shape[1])
            assert np.shares_memory(batch, turned)
            assert_same_bits(linear(batch, weight, bias).reshape(expected.shape), expected)


def test_a_wide_transposed_view(isa):
    """Of more features than have room for what they are from one chunk to the next: there is one."""
    x, weight, _ = problem(2, CHUNK_DIMS + 1, 1, np.dtype(np.float32))
    column = np.repeat(weight, 2)[::2]      # not rows of adjacent numbers, which are read in place
    wide = np.broadcast_to(column, (20_000, len(column)))
    assert_same_bits(linear(x, wide), np.broadcast_to(linear(x, weight), (2, 20_000)).copy())


def gradient_problem(rows, in_features, out_features, dtype):
    """grad_out, x, weight."""
    x, weight, _ = problem(rows, in_features, out_features, dtype)
    return normal(rows, out_features, dtype=dtype, seed=3), x, weight


def assert_summed(result, x):
    """The sums of columns: within the rounding of n sums of doubles, or, of float64, u^2 as much (Ogita, Rump and Oishi
    2005, proposition 4.5), and of the result."""
    exact, magnitude = (np.array([math.fsum(column) for column in a.astype(float).T]) for a in (x, np.abs(x)))
    unit = len(x) * 2.0**-53
    compute = np.finfo(np.result_type(x.dtype, np.float32))
    bound = (unit**2 if x.dtype == np.float64 else unit) * magnitude
    for relative, absolute in ((float(compute.eps) / 2, float(compute.smallest_subnormal) / 2),
                               HALF_ULP.get(x.dtype.name, (0, 0))):
        bound += np.maximum(relative * (np.abs(exact) + bound), absolute)
    assert result.dtype == x.dtype
    assert (np.abs(result.astype(float) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(isa, dtype):
    shapes = [*itertools.product((0, 1, 9, FEATURES + 1, 130), repeat=3), *((rows, 33, 50) for rows in ROWS),
              *((20, 40, n) for n in (*OUT, *around(SUM_COLUMNS), 2 * SUM_COLUMNS + 1)), *((20, n, 40) for n in IN),
              *((rows, FEATURES + 3, BLOCK_ROWS + 2) for rows in LONG_IN)]
    for shape in shapes:
        grad_out, x, weight = arrays = gradient_problem(*shape, dtype)
        grad_x, grad_weight, grad_bias = linear_backward(*arrays, True, None)
        assert [a.dtype for a in (grad_x, grad_weight, grad_bias)] == [dtype] * 3
        assert [a.shape for a in (grad_x, grad_weight, grad_bias)] == [x.shape, weight.shape, weight.shape[:1]]
        assert_exact(grad_x, grad_out, weight.T, np.zeros(shape[1]))
        assert_exact(grad_weight, grad_out.T, x.T, np.zeros(shape[1]))
        assert_summed(grad_bias, grad_out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_have_the_same_bits(isa, dtype):
    """Whatever the layout, the number of axes and of threads."""
    arrays = gradient_problem(4 * CHUNK_DIMS // 3, 70, 3 * FEATURES, dtype)
    expected = linear_backward(*arrays, True, 1)
    for num_threads in (2, 7):
        assert_same_bits(linear_backward(*arrays, True, num_threads), expected)
    grad_out, x, weight = arrays
    *without, none = linear_backward(*arrays, False, None)
    assert none is None
    assert_same_bits(tuple(without), expected[:2])
    for layout, other in zip(LAYOUTS.values(), reversed(LAYOUTS.values()), strict=True):
        batch = (layout(grad_out.reshape(2, -1, grad_out.shape[1])), other(x.reshape(2, -1, x.shape[1])))
        grad_x, *rest = linear_backward(*batch, weight, True, 2)
        assert_same_bits((grad_x.reshape(x.shape), *rest), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_goes_where_it_belongs(isa, dtype):
    grad_out, x, weight = gradient_problem(CHUNK_DIMS + 9, 70, 60, dtype)
    expected = linear_backward(grad_out, x, weight, True, None)
    x[2, 50], weight[49, 3], grad_out[CHUNK_DIMS + 1, 59] = np.nan, np.inf, -np.inf
    reached = [np.zeros(a.shape, bool) for a in expected]
    for a, index in zip((0, 0, 1, 1, 2), (np.s_[CHUNK_DIMS + 1], np.s_[:, 3], np.s_[:, 50], 59, 59), strict=True):
        reached[a][index] = True
    for result, before, there in zip(linear_backward(grad_out, x, weight, True, None), expected, reached, strict=True):
        assert not np.isfinite(result[there].astype(float)).any()
        assert_same_bits(result[~there], before[~there])


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_long_sums_of_columns(isa, dtype):
    rows = 1 << 20
    bits = np.finfo(dtype).nmant + 1
    x = np.ones((rows, 5), dtype)
    x[:, 1] += normal(rows) * 1e-3
    x[0, 2], x[-1, 2] = 2.0**bits, -(2.0**bits)     # which a 1 does not change
    x[1::2, 3] = normal(rows // 2) * 1e-6
    x[:, 4] = normal(rows, seed=1)
    out = np.empty(5, dtype)
    module = _kernels.f64() if dtype == np.float64 else _kernels.f32
    module.column_sums(x, out, check_kind("x", x), 0)
    assert_summed(out, x)
    assert out[0] == rows and out[2] == rows - 2


def test_sums_that_are_not_finite(isa):
    largest = np.finfo(F64).max
    columns = [([np.inf, 1, 2], np.inf), ([1, -np.inf, 2], -np.inf), ([np.inf, -np.inf, 2], np.nan),
               ([np.nan, 1, np.inf], np.nan), ([largest, largest, 1], np.inf), ([1, 2, 3], 6)]
    for module, dtype, kind in ((_kernels.f32, F32, 0), (_kernels.f64(), F64, 1)):
        out = np.empty(len(columns), dtype)
        with np.errstate(over="ignore"):
            module.column_sums(np.array([column for column, _ in columns]).T.astype(dtype), out, kind, 1)
        np.testing.assert_array_equal(out, [result for _, result in columns])
    x = np.array([[np.finfo(F32).max] * 2, [np.finfo(F32).max, 1], [-np.finfo(F32).max, 0]], F32)
    _kernels.f32.column_sums(x, out := np.empty(2, F32), 0, 1)
    np.testing.assert_array_equal(out, np.finfo(F32).max)       # between, it is twice as much


@pytest.mark.parametrize("shapes", [((5, 8), (7,)), ((5, 8), (1, 2, 8)), ((2, 2, 5, 8), (8,))], ids=str)
def test_sums_that_do_not_fit(isa, shapes):
    x, out = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=r"column_sums: x of shape .* and out of shape .* do not fit together"):
        _kernels.f32.column_sums(x, out, 0, 0)


# The door.


@pairs
def test_public(isa, dtype, weight_dtype):
    """Any number of axes, any strides; specified by the reference."""
    for shape in [(130,), (3, 130), (2, 3, 130), (2, 2, 3, 130), (2, 1, 3, 2, 130), (0, 130), (2, 0, 3, 130)]:
        x, weight, bias = problem(math.prod(shape[:-1]), 130, 50, dtype, weight_dtype)
        expected, scales = linear(x, weight, bias).reshape(*shape[:-1], 50), getattr(weight, "scales", None)
        specified = reference.linear(x.reshape(shape), widened(weight) if scales is None else weight.numbers, bias,
                                     weight_scales=scales)
        assert (specified.dtype, specified.shape) == (expected.dtype, expected.shape)
        assert_exact(specified.reshape(-1, 50), x, weight, bias)
        x = x.reshape(shape)
        assert_same_bits(public(x, weight, bias), expected)
        if len(shape) > 1:
            backwards = np.ascontiguousarray(x.T).T
            out = np.zeros((*shape[-2::-1], 50), dtype).transpose(*range(len(shape) - 2, -1, -1), len(shape) - 1)
            assert public(backwards, weight, bias, out=out, num_threads=1) is out
            assert_same_bits(out.copy(), expected)


def test_bias_in_the_dtype_computed_in(isa):
    """It is not rounded to 16 bits on the way."""
    x, weight = np.zeros((2, 8), np.float16), np.zeros((3, 8), np.float16)
    x[:, 0], weight[:, 0] = 1, -1
    bias = np.array([1 + 2.0**-12, 2, 3], np.float32)
    np.testing.assert_array_equal(cattn.linear(x, weight, bias), np.float16([[2.0**-12, 1, 2]] * 2))
    np.testing.assert_array_equal(cattn.linear(x, weight, [1, 2, 3]), np.float16([[0, 1, 2]] * 2))
    assert_same_bits(cattn.linear(x, weight, bias), reference.linear(x, weight, bias))


def test_lists():
    assert cattn.linear([[1.0, 2.0]], [[3.0, 4.0]], [0.5]).tolist() == [[11.5]]


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def giant(*shape, dtype=F32):
    return np.broadcast_to(dtype(0), shape)


SHARED = zeros(100)
KIND, SHAPE = TypeError, ValueError
WEIGHT = "weight: expected float32, as x has, float16, bfloat16, or int8 with weight_scales, got dtype"
BAD_CALLS = [
    ({"x": zeros(2, 40, dtype=int)}, KIND, "x: expected float32, float64, float16 or bfloat16 in native byte order, "
     "got dtype int64; x.astype(np.float32) casts"),
    ({"x": None}, KIND, "x: expected an array, got None"),
    ({"weight": None}, KIND, "weight: expected an array, got None"),
    ({"weight": zeros(3, 40, dtype=F64)}, KIND, f"{WEIGHT} float64; weight.astype(x.dtype) casts"),
    ({"weight": zeros(3, 40, dtype=F64).tolist()}, KIND, f"{WEIGHT} float64; np.asarray(weight, x.dtype) casts"),
    ({"weight": zeros(3, 40, dtype=np.uint8)}, KIND, f"{WEIGHT} uint8; weight.astype(x.dtype) casts"),
    ({"weight": zeros(3, 40, dtype=np.uint16)}, KIND, f"{WEIGHT} uint16; weight.astype(x.dtype) casts"),
    ({"weight": zeros(3, 40, dtype=">f2")}, KIND, f"{WEIGHT} >f2; weight.astype(x.dtype) casts"),
    ({"weight": zeros(3, 40, dtype=complex)}, KIND, f"{WEIGHT} complex128"),
    ({"x": zeros(2, 40, dtype=np.float16), "weight": zeros(3, 40)}, KIND, "weight: expected float16, as x has, "
     "bfloat16, or int8 with weight_scales, got dtype float32; weight.astype(x.dtype) casts"),
    ({"x": F32(1)}, SHAPE, "x: expected 1 axis (in_features,) or more, got shape ()"),
    ({"weight": zeros(3, 41)}, SHAPE, "weight: expected shape (out_features, 40), got shape (3, 41)"),
    ({"weight": zeros(40, 3)}, SHAPE,
     "weight: expected shape (out_features, 40), got shape (40, 3); weight.T has it"),
    ({"weight": zeros(40)}, SHAPE, "weight: expected shape (out_features, 40), got shape (40,)"),
    ({"weight": zeros(1, 3, 40)}, SHAPE, "weight: expected shape (out_features, 40), got shape (1, 3, 40)"),
    ({"weight": zeros(3, 40, dtype=np.int8)}, KIND, "weight_scales: expected a float32 array, as weight is int8, got "
     "None; weight.astype(x.dtype) is a weight without"),
    ({"weight_scales": zeros(3, 2)}, SHAPE,
     "weight_scales: expected None, as weight is float32, got an array; they scale int8"),
    ({"weight": zeros(3, 40, dtype=np.int8), "weight_scales": zeros(3, 2, dtype=F64)}, KIND,
     "weight_scales: expected float32, got dtype float64; weight_scales.astype(np.float32) casts"),
    ({"weight": zeros(3, 40, dtype=np.int8), "weight_scales": "a"}, KIND,
     "weight_scales: expected float32, got dtype <U1"),
    *(({"weight": zeros(3, 40, dtype=np.int8), "weight_scales": zeros(*shape)}, SHAPE, "weight_scales: expected shape "
       f"(3, 2), one for each 32 numbers of a row of weight, got shape {shape}") for shape in [(3, 1), (3,), (2, 3)]),
    ({"bias": zeros(4)}, SHAPE, "bias: expected shape (3,), got shape (4,)"),
    ({"bias": zeros(1, 3)}, SHAPE, "bias: expected shape (3,), got shape (1, 3)"),
    ({"bias": zeros(3, dtype=bool)}, KIND, "bias: expected a float or int array, got dtype bool"),
    ({"x": giant(2**49), "weight": giant(1, 2**49)}, SHAPE, "x: expected at most 281474976710656 in_features and a "
     f"result that fits in memory, got shape ({2**49},) for a weight of shape (1, {2**49})"),
    ({"x": giant(2**60, 1), "weight": zeros(3, 1)}, SHAPE, "x: expected at most 281474976710656 in_features and a "
     f"result that fits in memory, got shape ({2**60}, 1) for a weight of shape (3, 1)"),
    ({"out": zeros(2, 4)}, SHAPE, "out: expected shape (2, 3), got shape (2, 4)"),
    ({"out": zeros(2, 3, dtype=F64)}, KIND, "out: expected dtype float32, got float64; out[...] = result casts"),
    ({"out": [[0.0]]}, KIND, "out: expected a numpy.ndarray, got list"),
    ({"out": giant(2, 3)}, SHAPE, "out: expected a writeable array, got a read-only one"),
    ({"x": SHARED[:80].reshape(2, 40), "out": SHARED[79:85].reshape(2, 3)}, SHAPE,
     "out: expected memory of its own, got an array that overlaps x"),
    ({"bias": SHARED[:3], "out": SHARED[2:8].reshape(2, 3)}, SHAPE,
     "out: expected memory of its own, got an array that overlaps bias"),
    ({"weight": zeros(3, 40, dtype=np.int8), "weight_scales": SHARED[:6].reshape(3, 2),
      "out": SHARED[5:11].reshape(2, 3)}, SHAPE,
     "out: expected memory of its own, got an array that overlaps weight_scales"),
    ({"num_threads": 0}, SHAPE, "num_threads: expected 1 to 2147483647, got 0; None takes the default"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_calls(options, error, message):
    arguments = {"x": zeros(2, 40), "weight": zeros(3, 40), "out": np.full((2, 3), 7, F32)} | options
    out = arguments["out"]
    before = np.array(out)
    with pytest.raises(error) as caught:
        cattn.linear(**arguments)
    assert str(caught.value) == message
    np.testing.assert_array_equal(out, before)
