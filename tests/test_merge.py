"""Merged partial results: as exact as their formula, equal to attention over all keys, whatever is empty, not finite,
strided or in another thread; errors."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import EDGES, FLOATS, INF, LAYOUTS, NAN, around, assert_same_bits, normal, problem
from tolerance import HALF_ULP, assert_merged, errors, largest, merged

import cattn
from cattn import _kernels, reference

merge = cattn.merge_states
both = pytest.mark.parametrize("library", [cattn, reference], ids=["public", "reference"])
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
# On both sides of every edge: vectors, four of them, pieces of a row; blocks of rows.
LANES = EDGES["lanes"]
(PIECE,) = EDGES["merge_dims"]
DIMS = sorted({1, 2, 3, 64, 80, 128} | around(*LANES, *(4 * n for n in LANES), *(5 * n for n in LANES))
              | {PIECE + n + step for n in (0, *LANES) for step in (-1, 0, 1)} | {2 * PIECE + 3})
ROWS = sorted({1, 2, 3, 50} | around(*LANES))


def compute(dtype):
    return np.result_type(dtype, np.float32)


def states(n, rows, dim, dtype=np.float32, *, spread=3.0, empty=0.0, seed=0):
    """n outputs (*rows, dim) and logsumexps rows, of which a share is empty."""
    rows = rows if isinstance(rows, tuple) else (rows,)
    rng = np.random.default_rng((seed, n, dim))
    logsumexps = rng.standard_normal((n, *rows)) * spread
    logsumexps[rng.random((n, *rows)) < empty] = -INF
    outputs = rng.standard_normal((n, *rows, dim)).astype(dtype)
    return list(outputs), list(logsumexps.astype(compute(dtype)))


def same_states(pair, layout):
    return tuple([layout(x) for x in arrays] for arrays in pair)


# As exact as the formula.


@dtypes
def test_shapes(isa, dtype):
    shapes = [*((3, 5, dim) for dim in DIMS), *((2, rows, 40) for rows in ROWS), *((n, 20, 33) for n in (1, 4, 9, 40))]
    for n, rows, dim in shapes:
        pair = states(n, rows, dim, dtype, empty=0.2)
        assert_merged(merge(*pair), *pair)


@both
@given(data=st.data())
def test_any_states(library, data):
    dtype = data.draw(st.sampled_from(FLOATS))
    rows = data.draw(st.sampled_from([(), (1,), (7,), (2, 3), (3, 1, 4), (2, 1, 1, 2, 5), (4, 0), (0, 3)]))
    pair = states(data.draw(st.integers(1, 9)), rows, data.draw(st.sampled_from([1, 5, 16, 40])), dtype,
                  spread=data.draw(st.sampled_from([0, 0.1, 3, 100, 1e30])), seed=data.draw(st.integers(0, 2**32)),
                  empty=data.draw(st.sampled_from([0, 0.3, 0.9])))
    shift = data.draw(st.sampled_from([0, 0, -1000, 30000]))
    pair[1][:] = [x + x.dtype.type(shift) for x in pair[1]]
    sinks = None
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([rows, rows[1:], (), (*rows[:-1], 1)[-len(rows):] if rows else ()]))
        rng = np.random.default_rng(data.draw(st.integers(0, 9)))
        sinks = shift + rng.standard_normal(shape) * data.draw(st.sampled_from([1, 50]))
    assert_merged(library.merge_states(*pair, sinks=sinks), *pair, sinks)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_as_exact_as_numpy(isa, dtype):
    """Twice the error of the plain formula, of arrays that are large enough for it to have one."""
    wide = np.float64 if dtype == np.float32 else np.longdouble
    for n, with_sinks in itertools.product((2, 5, 30), (False, True)):
        pair = states(n, 500, 64, dtype)
        sinks = normal(500, dtype=dtype) if with_sinks else None
        plain = reference.merge_states(*pair, sinks=sinks)
        exact = reference.merge_states(*([x.astype(wide) for x in arrays] for arrays in pair), sinks=sinks)
        for result, of_plain, right, scale in zip(merge(*pair, sinks=sinks), plain, exact,
                                                  (largest(pair[0][0]), 1 + largest(exact[1])), strict=True):
            bound = 2 * errors(of_plain, right).max() + 4 * np.finfo(dtype).eps * scale
            assert errors(result, right).max() <= bound


@dtypes
def test_any_tree(isa, dtype):
    """Merged two by two, in whatever order: within what each step can round."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        outputs, logsumexps = states(2 + seed % 7, 40, 33, dtype, empty=0.1, seed=seed)
        relative, absolute = HALF_ULP.get(dtype.name, (0, 0))
        nodes = [(o, lse, 0.0, 0.0) for o, lse in zip(outputs, logsumexps, strict=True)]
        while len(nodes) > 1:
            pair = [nodes.pop(rng.integers(len(nodes))) for _ in range(2)]
            out, logsumexp = merge([x[0] for x in pair], [x[1] for x in pair])
            with np.errstate(all="ignore"):
                (_, of_out), (_, of_logsumexp) = merged(
                    [x[0] for x in pair], [x[1] for x in pair],
                    of_outputs=np.stack([np.broadcast_to(x[2], out.shape) for x in pair]),
                    of_logsumexps=np.stack([np.broadcast_to(x[3], logsumexp.shape) for x in pair]))
                of_out = of_out + np.maximum(relative * np.abs(out.astype(float)), absolute)
                of_logsumexp = np.where(logsumexp == -INF, 0, of_logsumexp)
            nodes.append((out, logsumexp, of_out, of_logsumexp))
        (out, logsumexp, of_out, of_logsumexp), = nodes
        with np.errstate(all="ignore"):
            (right, _), (right_lse, _) = merged(outputs, logsumexps)
        assert (errors(out, right) <= of_out).all()
        assert (errors(logsumexp, right_lse) <= of_logsumexp).all()


# Attention over all keys.


@pytest.mark.parametrize("options", [
    {}, {"is_causal": True, "q_offset": 80}, {"is_causal": True, "q_offset": 0}, {"window": (30, 10), "softcap": 2.0},
    {"sinks": True}, {"kv_lens": True, "sinks": True}, {"alibi_slopes": np.array([0.5, 0.1, 0.0, 2.0])},
], ids=str)
@dtypes
def test_splits_of_attention(isa, dtype, options):
    """A row has as many keys as it sees, of some parts none: as exact as the plain formula with the same parts."""
    cuts = 0, 1, 17, 30, 90, 120
    query, key, value = problem(20, 120, 48, leading=(3,), num_heads=4, num_kv_heads=2, dtype=dtype)
    options = dict(options)
    sinks = normal(4, seed=5) if options.pop("sinks", False) else None
    kv_lens = np.array([0, 17, 100]) if options.pop("kv_lens", False) else None
    q_offset = options.pop("q_offset", 0)

    def parts(library, query, key, value):
        for low, high in itertools.pairwise(cuts):
            lens = {} if kv_lens is None else {"kv_lens": np.clip(kv_lens - low, 0, high - low)}
            yield library.scaled_dot_product_attention(
                query, key[..., low:high, :], value[..., low:high, :], q_offset=q_offset - low, return_logsumexp=True,
                **options, **lens)

    by_head = None if sinks is None else sinks[:, None]
    result = merge(*zip(*parts(cattn, query, key, value), strict=True), sinks=by_head)
    plain = reference.merge_states(*zip(*parts(reference, query, key, value), strict=True), sinks=by_head)
    wide = np.longdouble if dtype == np.float64 else np.float64
    exact = reference.scaled_dot_product_attention(
        *(x.astype(wide) for x in (query, key, value)), sinks=sinks, q_offset=q_offset, kv_lens=kv_lens,
        return_logsumexp=True, **options)
    for got, of_plain, right, scale in zip(result, plain, exact, (largest(value), 1 + largest(exact[1])), strict=True):
        assert got.shape == right.shape
        assert errors(got, right).max() <= (2 * errors(of_plain, right).max()
                                            + 4 * float(np.finfo(compute(dtype)).eps) * scale)
    assert (exact[1] == -INF).any() == (kv_lens is not None)


def test_shared_prefix(isa):
    """Queries of all sequences as rows of one, over the keys that all share."""
    query, key, value = problem(1, 7, 16, leading=(5,), num_heads=6, num_kv_heads=2)
    _, shared_key, shared_value = problem(1, 50, 16, leading=(1,), num_heads=6, num_kv_heads=2, seed=1)
    options = {"return_logsumexp": True}
    shared = cattn.scaled_dot_product_attention(query.swapaxes(0, 2), shared_key, shared_value, **options)
    own = cattn.scaled_dot_product_attention(query, key, value, **options)
    result = merge([shared[0].swapaxes(0, 2), own[0]], [shared[1].swapaxes(0, 2), own[1]])
    whole = [np.concatenate([np.broadcast_to(x, (5, *x.shape[1:])), y], axis=2).astype(float)
             for x, y in ((shared_key, key), (shared_value, value))]
    exact = reference.scaled_dot_product_attention(query.astype(float), *whole, **options)
    for got, right in zip(result, exact, strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=2e-6)


# Empty states, and what is not finite.


@both
@dtypes
def test_empty_states_change_no_bit(isa, library, dtype):
    """Wherever they stand, whatever their rows hold; one state alone comes out as it came, -0 as well."""
    for dim in (1, 5, 64, 80):
        for n, rows in ((1, 9), (3, 40)):
            outputs, logsumexps = states(n, rows, dim, dtype, empty=0.3)
            outputs[0][:, ::2] = -0.0
            expected = library.merge_states(outputs, logsumexps)
            if n == 1:
                seen = logsumexps[0] != -INF
                assert_same_bits(expected[1], logsumexps[0])
                assert_same_bits(expected[0][seen], outputs[0][seen])
                assert_same_bits(expected[0][~seen], np.zeros_like(outputs[0][~seen]))
            for hole, junk in itertools.product(range(n + 1), (0, NAN, INF)):
                more, empty = np.full_like(outputs[0], junk), np.full_like(logsumexps[0], -INF)
                assert_same_bits(library.merge_states([*outputs[:hole], more, *outputs[hole:]],
                                                      [*logsumexps[:hole], empty, *logsumexps[hole:]]), expected)


@both
@dtypes
def test_all_empty(isa, library, dtype):
    outputs, logsumexps = states(3, (2, 5), 20, dtype, empty=1)
    outputs[1][...] = NAN
    for sinks in (None, 0.0, INF, NAN):
        out, logsumexp = library.merge_states(outputs, logsumexps, sinks=sinks)
        assert_same_bits(out, np.zeros_like(outputs[0]))
        assert_same_bits(logsumexp, logsumexps[0])


@both
@dtypes
def test_what_is_not_finite_stays_in_its_row(isa, library, dtype):
    outputs, logsumexps = states(3, 40, 37, dtype)
    expected = library.merge_states(outputs, logsumexps)
    outputs[1][4, 7], outputs[2][5, 36], outputs[0][6, 0], outputs[1][6, 0] = NAN, INF, INF, -INF
    logsumexps[0][10], logsumexps[2][11], logsumexps[1][12], logsumexps[1][13] = NAN, INF, NAN, -INF
    outputs[1][13] = NAN
    logsumexps[0][14] = logsumexps[2][14] = -INF  # beside one NaN, nothing
    logsumexps[1][14] = NAN
    logsumexps[0][15] = logsumexps[1][15] = INF
    out, logsumexp = library.merge_states(outputs, logsumexps)
    assert np.isnan(out[4, 7].astype(float))
    assert out[5, 36] == INF
    assert np.isnan(out[6, 0].astype(float))
    for row in (10, 11, 12, 14, 15):
        assert np.isnan(out[row].astype(float)).all()
        assert np.isnan(logsumexp[row])
    assert_same_bits((out[13], logsumexp[13]), tuple(x[0] for x in library.merge_states(
        [outputs[0][13:14], outputs[2][13:14]], [logsumexps[0][13:14], logsumexps[2][13:14]])))
    changed = np.zeros(out.shape, bool)
    changed[[4, 5, 6], [7, 36, 0]] = changed[10:16] = True
    assert_same_bits(out[~changed], expected[0][~changed])
    same_rows = [row for row in range(40) if not 10 <= row < 16]
    assert_same_bits(logsumexp[same_rows], expected[1][same_rows])


@both
def test_a_weight_of_0_does_not_hide_a_nan(isa, library):
    """As in attention: a state that is not empty is looked at."""
    outputs, logsumexps = states(2, 3, 20)
    outputs[1][0, 3], outputs[1][1, 3], logsumexps[1][:2] = NAN, INF, -1e4
    out, logsumexp = library.merge_states(outputs, logsumexps)
    assert np.isnan(out[:2, 3]).all()
    assert np.isfinite(np.delete(out, 3, axis=1)).all()
    assert_same_bits(logsumexp[:2], logsumexps[0][:2])


@dtypes
def test_far_logsumexps_and_large_outputs(isa, dtype):
    """Nothing overflows on the way: what is multiplied has weights that add up to 1."""
    huge, most = float(np.finfo(compute(dtype)).max), float(ml_dtypes.finfo(dtype).max)
    outputs = [np.full((4, 20), sign * most / 2, dtype) for sign in (1, 1, 1, -1)]
    logsumexps = [np.array([huge, -huge, 0, lse], compute(dtype)) for lse in (0, 0, 1, -huge)]
    logsumexps[0][0] = -huge
    assert_merged(merge(outputs, logsumexps), outputs, logsumexps)
    outputs = [np.full((4, 20), most, dtype)] * 4  # equal weights, exactly a quarter
    out, _ = merge(outputs, [np.full(4, -huge, compute(dtype))] * 4)
    assert_same_bits(out, outputs[0])


# Sinks.


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_sinks(isa, dtype):
    pair = states(3, (2, 4, 9), 20, dtype, empty=0.3)
    without = merge(*pair)
    for sinks in (normal(4)[:, None], normal(2, 4, 9), 0.5, [-2], 1000.0, -1000.0, normal(1, 9) * 100, np.arange(9)):
        out, logsumexp = merge(*pair, sinks=sinks)
        assert_merged((out, logsumexp), *pair, sinks)
        assert_same_bits(logsumexp, without[1])
    assert_same_bits(merge(*pair, sinks=-INF), without)
    assert not merge(*pair, sinks=INF)[0].any()
    out, logsumexp = merge(*pair, sinks=NAN)
    seen = without[1] != -INF
    assert np.isnan(out[seen].astype(float)).all()
    assert not out[~seen].any()
    assert_same_bits(logsumexp, without[1])


def test_sinks_of_a_row_touch_no_other(isa):
    pair = states(2, 30, 20)
    sinks = np.full(30, 0.5)
    expected = merge(*pair, sinks=sinks)
    sinks[7] = NAN
    out, _ = merge(*pair, sinks=sinks)
    assert np.isnan(out[7]).all()
    assert_same_bits(np.delete(out, 7, axis=0), np.delete(expected[0], 7, axis=0))


# What must not matter.


@dtypes
def test_layouts(isa, dtype):
    for dim in (5, 40, 64):
        pair = states(3, (2, 3, 17), dim, dtype, empty=0.2)
        sinks = normal(3)[:, None].astype(compute(dtype))
        expected = merge(*pair, sinks=sinks)
        for layout in LAYOUTS.values():
            out = layout(np.zeros_like(expected[0]))
            same = same_states(pair, layout)
            returned, logsumexp = merge(*same, sinks=layout(np.broadcast_to(sinks, (2, 3, 17))), out=out)
            assert returned is out
            assert_same_bits((out.copy(), logsumexp), expected)
        mixed = [list(LAYOUTS.values())[3 * i](x) for i, x in enumerate(pair[0])]
        assert_same_bits(merge(mixed, pair[1], sinks=sinks), expected)


def test_axes(isa):
    """Any number of them; those that strides allow are one to the kernel."""
    outputs, logsumexps = states(2, (3, 2, 4, 5), 24)
    expected = merge(outputs, logsumexps)
    for shape in ((120,), (6, 20), (1, 3, 1, 8, 5, 1), (3, 2, 4, 5) + (1,) * 27):
        out, logsumexp = merge([x.reshape(*shape, 24) for x in outputs], [x.reshape(shape) for x in logsumexps])
        assert_same_bits((out.reshape(3, 2, 4, 5, 24), logsumexp.reshape(3, 2, 4, 5)), expected)
    for axes in itertools.permutations(range(4)):
        out, logsumexp = merge([x.transpose(*axes, 4) for x in outputs], [x.transpose(axes) for x in logsumexps])
        assert_same_bits((out, logsumexp), (expected[0].transpose(*axes, 4).copy(), expected[1].transpose(axes).copy()))
    swapped = np.ascontiguousarray(outputs[1].swapaxes(0, 2)).swapaxes(0, 2)
    assert_same_bits(merge([outputs[0], swapped], logsumexps), expected)
    row = merge([x[1, 0, 2, 3] for x in outputs], [x[1, 0, 2, 3] for x in logsumexps])
    assert_same_bits(row, (expected[0][1, 0, 2, 3], expected[1][1, 0, 2, 3, ...]))


def test_broadcast(isa):
    """Axes of stride 0."""
    outputs, logsumexps = states(2, (4, 1), 24)
    wide = [np.broadcast_to(x, (4, 30, 24)) for x in outputs], [np.broadcast_to(x, (4, 30)) for x in logsumexps]
    assert_same_bits(merge(*wide), tuple(np.repeat(x, 30, axis=1) for x in merge(outputs, logsumexps)))


@dtypes
def test_threads_and_other_rows(isa, dtype):
    pair = states(3, (5, 700), 64, dtype, empty=0.2)
    expected = merge(*pair, num_threads=1)
    for num_threads in (2, 3, 7, None):
        assert_same_bits(merge(*pair, num_threads=num_threads), expected)
    swapped = merge(*([x.swapaxes(0, 1) for x in arrays] for arrays in pair), num_threads=2)
    assert_same_bits(tuple(x.swapaxes(0, 1).copy() for x in swapped), expected)
    for first, end in ((0, 1), (3, 20), (699, 700), (17, 433)):
        part = merge(*([x[2, first:end] for x in arrays] for arrays in pair))
        assert_same_bits(part, tuple(x[2, first:end] for x in expected))


def test_ways_to_give_them(isa):
    """Lists, tuples, one array; nothing that is given is written to."""
    pair = states(3, (2, 5), 20)
    expected = merge(*pair)
    stacked = [np.stack(arrays) for arrays in pair]
    for arrays in (tuple(map(tuple, pair)), stacked, (pair[0], stacked[1])):
        assert_same_bits(merge(*arrays), expected)
    for x in (*pair[0], *pair[1]):
        x.flags.writeable = False
    assert_same_bits(merge(*pair), expected)
    assert_same_bits(merge([x.astype(float).tolist() for x in pair[0]], [x.astype(float).tolist() for x in pair[1]]),
                     merge(*([x.astype(float) for x in arrays] for arrays in pair)))


@both
def test_empty_axes(library):
    for rows, dim in (((0,), 5), ((3, 0), 5), ((0, 3), 64), ((4,), 0), ((), 0)):
        out, logsumexp = library.merge_states(*states(2, rows, dim))
        assert (out.shape, logsumexp.shape) == ((*rows, dim), rows)
    assert_same_bits(logsumexp, library.merge_states(*states(2, (), 0))[1])


def test_more_work_than_a_thread_is_asked_for(isa):
    """Many states, many short lines of rows."""
    pair = states(300, (3, 2), 20)
    assert_merged(merge(*pair, num_threads=2), *pair)
    outputs, logsumexps = states(2, (4000, 3), 8)
    apart = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in outputs]
    assert_same_bits(merge([apart[0], outputs[1]], logsumexps, num_threads=2), merge(outputs, logsumexps))


# Bad input.

ONE, LSE = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.float32)
BAD = {
    "no outputs": ([], [], {}, ValueError, "outputs: expected one array or more, got none$"),
    "an array of none": (np.zeros((0, 3, 4)), np.zeros((0, 3)), {}, ValueError, "outputs: expected one array or more"),
    "None": (None, [LSE], {}, TypeError,
             r"outputs: expected an array or a list of n arrays \(\.\.\., head_dim_v\), got None$"),
    "None inside": ([ONE, None], [LSE], {}, TypeError, r"outputs\[1\]: expected an array, got None$"),
    "one row": (np.zeros(3), [LSE], {}, ValueError,
                r"outputs: expected n arrays .*, or one with a first axis of n, got shape \(3,\)$"),
    "numbers": ([1.0, 2.0], [1.0, 2.0], {}, ValueError,
                r"outputs\[0\]: expected 1 to 32 axes \(\.\.\., head_dim_v\), got shape \(\)$"),
    "too many axes": ([np.zeros((1,) * 33, np.float32)], [LSE], {}, ValueError, r"outputs\[0\]: expected 1 to 32 axes"),
    "ints": ([ONE.astype(int)], [LSE], {}, TypeError,
             r"outputs\[0\]: expected float32, .* got dtype int64; outputs\[0\]\.astype\(np\.float32\) casts$"),
    "an array of ints": (np.zeros((2, 3, 4), int), [LSE], {}, TypeError,
                         r"outputs: expected float32, .* got dtype int64; outputs\.astype\(np\.float32\) casts$"),
    "another dtype": ([ONE, ONE.astype(np.float16)], [LSE, LSE], {}, TypeError,
                      r"outputs\[1\]: expected the dtype of outputs\[0\], float32, got float16; "
                      r"outputs\[1\]\.astype\(float32\) casts$"),
    "another shape": ([ONE, ONE[:1]], [LSE, LSE], {}, ValueError,
                      r"outputs\[1\]: expected the shape of outputs\[0\], \(2, 3, 4\), got shape \(1, 3, 4\)$"),
    "too few logsumexps": ([ONE, ONE], [LSE], {}, ValueError, "logsumexps: expected as many as outputs, 2, got 1$"),
    "one logsumexp": ([ONE, ONE], np.float32(1), {}, ValueError,
                      r"logsumexps: expected n arrays \(\.\.\.\), as many as outputs, or one with a first axis of n, "),
    "no logsumexps": ([ONE], None, {}, TypeError, "logsumexps: expected an array or a list of n arrays"),
    "logsumexps of float64": ([ONE], [LSE.astype(float)], {}, TypeError,
                              r"logsumexps\[0\]: expected float32, as return_logsumexp=True gives it beside outputs of "
                              r"float32, got float64; logsumexps\[0\]\.astype\(float32\) casts$"),
    "logsumexps of float16": (np.zeros((1, 2, 4), np.float16), np.zeros((1, 2), np.float16), {}, TypeError,
                              r"logsumexps: expected float32, as .* outputs of float16, got float16; "
                              r"logsumexps\.astype\(float32\) casts$"),
    "float32 beside float64": ([ONE.astype(float)], [LSE], {}, TypeError, r"logsumexps\[0\]: expected float64, as"),
    "an axis of 1": ([ONE], [LSE[..., None]], {}, ValueError,
                     r"logsumexps\[0\]: expected shape \(2, 3\), that of outputs\[0\] without the last axis, got shape "
                     r"\(2, 3, 1\); logsumexps\[0\]\[\.\.\., 0\] has it$"),
    "swapped": ([ONE, ONE], [LSE, LSE.T], {}, ValueError,
                r"logsumexps\[1\]: .* got shape \(3, 2\); logsumexps\[1\]\.swapaxes\(-1, -2\) has it$"),
    "sinks of heads": ([ONE], [LSE], {"sinks": np.zeros(2)}, ValueError,
                       r"sinks: expected a shape that broadcasts to that of the logsumexps, \(2, 3\), got shape "
                       r"\(2,\); for one per head: sinks\[:, None\]$"),
    "sinks of more axes": ([ONE], [LSE], {"sinks": np.zeros((1, 2, 3))}, ValueError, "sinks: expected a shape that"),
    "text as sinks": ([ONE], [LSE], {"sinks": "a"}, TypeError, "sinks: expected a float or int array, got dtype <U1$"),
    "no threads": ([ONE], [LSE], {"num_threads": 0}, ValueError, "num_threads: expected 1 to"),
    "out of another shape": ([ONE], [LSE], {"out": ONE[:1]}, ValueError, r"out: expected shape \(2, 3, 4\), got"),
    "out of another dtype": ([ONE], [LSE], {"out": ONE.astype(float)}, TypeError, "out: expected dtype float32, got"),
    "out that is read": ([ONE[:1], ONE[1:]], [LSE[:1]] * 2, {"out": ONE[1:]}, ValueError,
                         r"out: expected memory of its own, got an array that overlaps outputs\[1\]$"),
}


@pytest.mark.parametrize(("outputs", "logsumexps", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(outputs, logsumexps, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        merge(outputs, logsumexps, **options)
    assert not ONE.any()
    assert not LSE.any()


@pytest.mark.parametrize(("change", "shape"), [("outputs", (2, 3, 5)), ("logsumexps", (2, 4)), ("sinks", (3,)),
                                               ("logsumexp", (3, 2))])
def test_shapes_that_do_not_fit_together(isa, change, shape):
    """The last check before memory is read."""
    arrays = {"outputs": ONE, "logsumexps": LSE, "sinks": LSE, "out": ONE.copy(), "logsumexp": LSE.copy()}
    arrays[change] = np.zeros(shape, np.float32)
    arrays |= {"outputs": [arrays["outputs"]], "logsumexps": [arrays["logsumexps"]]}
    with pytest.raises(ValueError, match=r"^merge_states: an array of shape .* does not fit the others"):
        _kernels.f32.merge_states(*arrays.values(), 0, 1)
    with pytest.raises(ValueError, match=r"^merge_states: 0 outputs"):
        _kernels.f32.merge_states([], [], None, ONE.copy(), LSE.copy(), 0, 1)
