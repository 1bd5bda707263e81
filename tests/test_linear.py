"""The kernel of projections: as exact as its formula, whatever the shapes; a row's bits depend on itself alone."""

import itertools

import numpy as np
import pytest
from problems import BFLOAT16, EDGES, FLOATS, LAYOUTS, around, assert_same_bits, normal
from tolerance import HALF_ULP

from cattn import _kernels
from cattn._checks import check_kind

# On both sides of every edge: half a vector of rows are few; vectors and panels of them; blocks. Features: vectors,
# tasks. Dimensions: vectors, blocks.
(BLOCK_ROWS,), (FEATURES,), (BLOCK_DIMS,) = (EDGES[name] for name in ("block_rows", "features", "block_dims"))
MOST_LANES = max(EDGES["lanes"])
ROWS = sorted({1, 2, 3, 5, 24, 31, 33, 49, BLOCK_ROWS + 8} | around(*(n // 2 for n in EDGES["lanes"]), BLOCK_ROWS)
              | {n + step for n in EDGES["lanes"] for step in (0, 1)})
OUT = sorted({1, 7, 8, 2 * FEATURES + 1, 3 * FEATURES + 6} | around(MOST_LANES, FEATURES))
IN = sorted({1, 3, 8, MOST_LANES + 1, BLOCK_DIMS // 2, 2 * BLOCK_DIMS, 300} | around(BLOCK_DIMS))


def linear(x, weight, bias=None, *, num_threads=0, out=None):
    """Through the kernel's entry; x of 2 or 3 axes."""
    kind, weight_kind = check_kind("x", x), check_kind("weight", weight)
    if out is None:
        out = np.empty((*x.shape[:-1], len(weight)), x.dtype)
    module = _kernels.f64() if x.dtype == np.float64 else _kernels.f32
    module.linear(x, weight, bias, out, kind, weight_kind, num_threads)
    return out


def assert_exact(result, x, weight, bias):
    """Within what rounding can do: (in_features + 1) u sum |x w| and u |bias| for each sum, and the result's own."""
    compute = np.result_type(x.dtype, np.float32)
    wide = np.longdouble if compute == np.float64 else np.float64
    unit = float(np.finfo(compute).eps) / 2
    x, weight, bias = (array.astype(compute).astype(wide) for array in (x, weight, bias))
    exact = x @ weight.T + bias
    blocks = x.shape[-1] // 128 + 2
    bound = unit * ((129 + blocks) * (np.abs(x) @ np.abs(weight).T) + blocks * np.abs(bias))
    relative, absolute = HALF_ULP.get(result.dtype.name, (unit, 0))
    bound += np.maximum(relative * (np.abs(exact) + bound), absolute)
    assert (np.abs(result.astype(wide) - exact) <= bound).all()


def problem(rows, in_features, out_features, dtype, weight_dtype=None):
    weight_dtype = weight_dtype or dtype
    return (normal(rows, in_features, dtype=dtype), normal(out_features, in_features, dtype=weight_dtype, seed=1),
            normal(out_features, dtype=dtype, seed=2))


pairs = pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [*((dtype, dtype) for dtype in FLOATS), (FLOATS[0], FLOATS[2]), (FLOATS[0], BFLOAT16)],
    ids=str)


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


@pairs
def test_layouts(isa, dtype, weight_dtype):
    for rows in (1, 5, 40):
        x, weight, bias = problem(rows, 140, 60, dtype, weight_dtype)
        expected = linear(x, weight, bias)
        for layout in (layout for name, layout in LAYOUTS.items() if "heads" not in name):
            out = layout(np.zeros_like(expected))
            linear(layout(x), layout(weight), layout(bias[None])[0], out=out)
            assert_same_bits(out, expected)
        grouped = np.broadcast_to(x[:, None], (rows, 3, 140)).swapaxes(0, 1)
        out = np.empty((rows, 3, 60), dtype).swapaxes(0, 1)
        assert_same_bits(linear(grouped, weight, bias, out=out).copy(), np.broadcast_to(expected, (3, rows, 60)).copy())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_stays_in_its_row_and_feature(isa, dtype):
    for rows in (1, 3, 40):
        x, weight, bias = problem(rows, 150, 50, dtype)
        expected = linear(x, weight, bias)
        x[rows // 2, 149], weight[11, 3] = np.inf, np.nan
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
