"""Attention problems for the tests: random arrays, the same arrays in other layouts, and random calls."""

import math

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import cattn
from cattn import _kernels

INF, NAN = math.inf, math.nan
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]

# (query's dtype, key's and value's dtype): all that attention takes.
DTYPES = [(dtype, dtype) for dtype in FLOATS] + [(FLOATS[0], FLOATS[2]), (FLOATS[0], BFLOAT16)]


def random_problem(rng, *, dtype=np.float64, kv_dtype=None, most_rows=5, most_keys=6, most_dims=4):
    """((query, key, value), options): any combination of what attention takes but threads, small, by a
    numpy.random.Generator. Float masks are of the query's dtype; the rest is of float64."""
    def maybe():
        return rng.random() < 1 / 3

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    num_kv_heads, group_size = one_of((1, 1), (2, 1), (1, 3), (2, 2))
    num_heads = num_kv_heads * group_size
    leading = one_of((), (1,), (2,), (3,), (2, 2))
    one_head = num_heads == 1 and len(leading) < 2
    leading = leading if leading or one_head else (1,)
    heads, kv_heads = ((), ()) if one_head else ((num_heads,), (num_kv_heads,))
    head_dim, head_dim_v = rng.integers(1, most_dims + 1, 2)
    seq_len_q, seq_len_kv = (int(rng.integers(0 if rng.random() < 0.05 else 1, most + 1))
                             for most in (most_rows, most_keys))
    whole, arrays = rng.integers(3), []  # this array has all leading axes, from the others some may be missing
    for number, (core, array_dtype) in enumerate((((*heads, seq_len_q, head_dim), dtype),
                                                  ((*kv_heads, seq_len_kv, head_dim), kv_dtype or dtype),
                                                  ((*kv_heads, seq_len_kv, head_dim_v), kv_dtype or dtype))):
        own = [1 if number != whole and maybe() else n for n in leading]
        if number != whole and len(own) == 2 and maybe():
            own = own[1:]
        arrays.append(rng.standard_normal((*own, *core)).astype(array_dtype))

    options = {}
    if maybe():
        options["is_causal"] = True
    if maybe():
        options["q_offset"] = one_of(int(rng.integers(-2, seq_len_kv + 2)), "end",
                                     rng.integers(-2, seq_len_kv + 2, leading))
    elif options.get("is_causal") and seq_len_q < seq_len_kv:
        options["q_offset"] = 0  # else it is warned of
    if maybe():
        options["window"] = one_of((None, 1), (2, None), (1, 0), (-1, 2), (0, 3))
    if maybe():
        options["softcap"] = one_of(0.5, 2, 30.0)
    if maybe():
        options["scale"] = one_of(0, 0.25, -1.5)
    if maybe():
        options["alibi_slopes"] = rng.random((*leading, num_heads) if maybe() else num_heads)
    if maybe():
        options["sinks"] = rng.standard_normal(num_heads)
    for name in "kv_lens", "kv_starts":
        if maybe():
            options[name] = one_of(int(rng.integers(seq_len_kv + 1)), rng.integers(0, seq_len_kv + 1, leading))
    if maybe() or maybe():
        weights_shape = (*leading, *heads, seq_len_q, seq_len_kv)
        shape = [1 if maybe() else n for n in weights_shape][rng.integers(len(weights_shape) + 1):]
        seen = rng.random(shape) < one_of(0.3, 0.7, 1)
        options["attn_mask"] = (seen if maybe() else
                                np.where(seen, rng.standard_normal(shape), -INF).astype(dtype))
    if maybe():
        options |= {"dropout_p": one_of(0.1, 0.5, 0.9), "seed": int(rng.integers(2**63))}
    return tuple(arrays), options


# Instruction sets that have the same bits, by test_tiles and test_gradients_of_tiles; and those that all other tests of
# kernels run on: of the former, the one in use, or the best. tools/test_avx512.sh runs the suite with each in use.
TILES = [isa for isa in cattn.available_isas() if isa.startswith("avx512")]
ISAS = [isa for isa in cattn.available_isas()
        if isa not in TILES or isa == (cattn.isa if cattn.isa in TILES else TILES[0])]


def _edges():
    """{what: its sizes in all modules that this CPU runs}."""
    modules = [_kernels._load(_kernels.module_name(isa, precision))
               for isa in cattn.available_isas() for precision in ("f32", "f64")]
    return {name: sorted({module.edges()[name] for module in modules}) for name in modules[0].edges()}


def around(*sizes):
    return {size + step for size in sizes for step in (-1, 0, 1)} - {0}


def last_row_of_one_block(lanes, block_rows):
    """As `plan` has it, for one thread: a third more than a block, in whole vectors, is one block still."""
    vectors = block_rows // lanes
    return (2 * vectors - vectors * 2 // 3 - 1) * lanes


EDGES = _edges()
# On both sides of every edge in the kernels. Query rows: those that decode takes, lanes, panels of 1 to 3 vectors, and
# where a second block begins.
_LANES, (_BLOCK_ROWS,) = EDGES["lanes"], EDGES["block_rows"]
_LAST_ROWS = [last_row_of_one_block(lanes, _BLOCK_ROWS) for lanes in _LANES]
ROWS = sorted({1, 2, 3, 5} | around(*EDGES["decode_rows"], *(n * lanes for lanes in _LANES for n in (1, 2, 3, 4)))
              | {n * max(_LANES) for n in (5, 6)} | {6 * max(_LANES) + 1, 2 * _BLOCK_ROWS + 1}
              | {row + step for row in _LAST_ROWS for step in (0, 1)})
# Keys: register tiles, blocks, several of these.
_BLOCKS = EDGES["block_keys"] + EDGES["wide_block_keys"]
KEYS = sorted({1, 2, 3, 4 * max(_BLOCKS) + 1} | around(*EDGES["tile_rows"], *_LANES, *_BLOCKS, 2 * max(_BLOCKS)))
# head_dim: lanes, common sizes, where the number of keys in a block changes, and where long sums end.
_DIMS = EDGES["narrow_dims"] + EDGES["dims_at_once"]
HEAD_DIMS = sorted({1, 3, 5, 64, 65, 80, 128, 129, max(_LANES) + 1, 2 * max(_DIMS) + 1, *_LANES}
                   | {dim + step for dim in _DIMS for step in (0, 1)})
# Those of gradients: panels and blocks of rows; tiles, blocks and splits of keys; heads whose blocks have fewer rows.
GRADIENT_ROWS = sorted({2} | around(*(n * lanes for lanes in _LANES for n in (1, 2, 3, 4)), *EDGES["gradient_rows"],
                                    *(2 * rows for rows in EDGES["gradient_rows"])))
GRADIENT_KEYS = sorted({2} | around(*EDGES["tile_rows"], *_LANES, *EDGES["gradient_keys"], *EDGES["gradient_split"],
                                    *(2 * keys for keys in EDGES["gradient_split"])))
GRADIENT_DIMS = sorted({*range(1, 301), *around(*EDGES["gradient_dims"])})


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def problem(seq_len_q=9, seq_len_kv=13, head_dim=8, head_dim_v=None, *, leading=(2,), num_heads=2, num_kv_heads=None,
            dtype=np.float32, kv_dtype=None, seed=0):
    """query, key, value; leading=None: 2 axes, without heads."""
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    axes = () if leading is None else (*leading, num_heads)
    kv_axes = () if leading is None else (*leading, num_kv_heads or num_heads)
    kv_dtype = kv_dtype or dtype
    return (
        normal(*axes, seq_len_q, head_dim, dtype=dtype, seed=(seed, 0)),
        normal(*kv_axes, seq_len_kv, head_dim, dtype=kv_dtype, seed=(seed, 1)),
        normal(*kv_axes, seq_len_kv, head_dim_v, dtype=kv_dtype, seed=(seed, 2)),
    )


def assert_same_bits(a, b):
    """Bit for bit the same results: arrays, or tuples of arrays."""
    if isinstance(a, tuple):
        for one, other in zip(a, b, strict=True):
            assert_same_bits(one, other)
        return
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    unsigned = f"u{a.dtype.itemsize}"
    np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(unsigned) for x in (a, b)))


def _into(buffer, x):
    buffer[...] = x
    return buffer


def _unaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)
    return _into(np.ndarray(x.shape, x.dtype, memory, offset=1), x)


def _garbage(shape, dtype):
    return np.full(shape, 99 if dtype.kind == "i" else NAN, dtype)


def _spread(x, steps):
    """`x` in an array that is longer by these factors along its last axes, with garbage in between."""
    steps = [1] * (x.ndim - len(steps)) + list(steps)
    buffer = _garbage([n * step for n, step in zip(x.shape, steps, strict=True)], x.dtype)
    return _into(buffer[tuple(slice(None, None, step) for step in steps)], x)


def _reversed(x):
    turned = np.flip(x)
    return np.flip(turned.copy())


# The same numbers with other strides.
LAYOUTS = {
    "contiguous": lambda x: x.copy(),
    "(batch, seq, heads, dim)": lambda x: np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3),
    "(batch, heads, dim, seq)": lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
    "Fortran": np.asfortranarray,
    "every second column": lambda x: _spread(x, (2,)),
    "every third row": lambda x: _spread(x, (3, 1)),
    "wide rows": lambda x: _into(_garbage((*x.shape[:-1], x.shape[-1] + 3), x.dtype)[..., 1:-2], x),
    "negative strides": _reversed,
    "unaligned": _unaligned,
    "unaligned columns": lambda x: _unaligned(x.swapaxes(-1, -2)).swapaxes(-1, -2),
}


@st.composite
def calls(draw):
    """((query, key, value), options): every argument of attention, in any combination."""
    def maybe():
        return draw(st.sampled_from([False, False, True]))

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype, kv_dtype = draw(st.sampled_from(DTYPES))
    num_kv_heads, group_size = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (3, 5)]))
    num_heads = num_kv_heads * group_size
    leading = draw(st.sampled_from([(), (1,), (2,), (3,), (2, 2)]))
    one_head = num_heads == 1 and len(leading) < 2
    leading = leading if leading or one_head else (1,)
    head_dim, head_dim_v = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(HEAD_DIMS))
    seq_len_kv = draw(st.sampled_from([0, *KEYS]))
    # As many query rows as the exact reference multiplies in a few milliseconds.
    row_work = math.prod(leading) * num_heads * (seq_len_kv + 1) * (head_dim + head_dim_v)
    most = max(1, (200_000 if dtype == np.float64 else 3_000_000) // row_work)
    seq_len_q = draw(st.sampled_from([n for n in [0, *ROWS] if n <= most]))

    whole = draw(st.integers(0, 2))  # this array has all leading axes, from the others some may be missing
    heads = () if one_head else (num_heads,)
    kv_heads = () if one_head else (num_kv_heads,)
    arrays = []
    for number, core, array_dtype in (
        (0, (*heads, seq_len_q, head_dim), dtype),
        (1, (*kv_heads, seq_len_kv, head_dim), kv_dtype),
        (2, (*kv_heads, seq_len_kv, head_dim_v), kv_dtype),
    ):
        own = [1 if number != whole and maybe() else n for n in leading]
        array = rng.standard_normal((*own, *core)).astype(array_dtype)
        layouts = [name for name in LAYOUTS if array.ndim > 2 or "heads" not in name]
        arrays.append(LAYOUTS[draw(st.sampled_from(layouts))](array))

    options = {}
    if maybe():
        options["is_causal"] = True
    if maybe():
        around = [-seq_len_q, -1, 1, seq_len_kv - seq_len_q, seq_len_kv]
        options["q_offset"] = draw(st.sampled_from(around))
    elif maybe():
        options["q_offset"] = rng.integers(-2, seq_len_kv + 3, leading)
    elif options.get("is_causal") and seq_len_q < seq_len_kv:
        options["q_offset"] = 0  # else it is warned of
    if maybe():
        side = st.sampled_from([None, -1, 0, 1, seq_len_kv // 2])
        options["window"] = draw(side), draw(side)
    if maybe():
        options["softcap"] = draw(st.sampled_from([0.5, 2, 30.0]))
    if maybe():
        options["scale"] = draw(st.sampled_from([0, 0.25, -1 / head_dim]))
    if maybe():
        options["alibi_slopes"] = rng.random((*leading, num_heads) if maybe() else num_heads)
    if maybe():
        options["sinks"] = rng.standard_normal(num_heads) * draw(st.sampled_from([1, 20]))
    if maybe():
        options["kv_lens"] = rng.integers(0, seq_len_kv + 1, leading)
    if maybe() or maybe():
        kind = draw(st.sampled_from([bool, *FLOATS]))
        weights_shape = (*leading, *heads, seq_len_q, seq_len_kv)
        shape = [1 if maybe() else n for n in weights_shape][draw(st.integers(0, len(weights_shape))):]
        seen = rng.random(shape) < draw(st.sampled_from([0.2, 0.7, 1]))
        mask = seen if kind is bool else np.where(seen, rng.standard_normal(shape), -INF).astype(kind)
        layouts = [name for name in LAYOUTS if mask.ndim > 2 or (mask.ndim == 2 and "heads" not in name)]
        options["attn_mask"] = LAYOUTS[draw(st.sampled_from(layouts))](mask) if layouts else mask
    if maybe():
        options |= {"dropout_p": draw(st.sampled_from([0.1, 0.5, 0.9])), "seed": draw(st.integers(0, 2**64 - 1))}
    if maybe():
        options["num_threads"] = draw(st.integers(1, 4))
    return arrays, options
