"""Whatever comes in, as far as it is legal: any memory, any values, any combination of arguments. Never a crash, and
never a number that is wrong without a word: results as close as tolerance.py asks, or an error that names the argument.

What is drawn starts from problems.calls(), whose arrays then get hostile values in hostile memory.
"""

import inspect
import mmap
import sys
from decimal import Decimal
from fractions import Fraction

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BFLOAT16, FLOATS, INF, LAYOUTS, NAN, calls, problem
from processes import python
from tolerance import assert_possible, everything

import cattn
from cattn import reference

normal_suite = settings(settings.get_profile("normal"), max_examples=80)
slow_suite = settings.get_profile("slow")


# Values.


def special_numbers(dtype):
    info = ml_dtypes.finfo(dtype)
    return np.array([NAN, INF, -INF, 0.3 * float(info.max), -0.3 * float(info.max), float(info.max), 0.0, -0.0,
                     float(info.smallest_subnormal), -float(info.smallest_normal)])


def normal_values(rng, shape, dtype):
    return rng.standard_normal(shape)


def equal_values(rng, shape, dtype):
    return np.full(shape, rng.choice([*special_numbers(dtype)[3:], 1.0]))


def one_outlier(rng, shape, dtype):
    x = rng.standard_normal(shape)
    x.reshape(-1)[: x.size and 1] = rng.choice([1e4, *special_numbers(dtype)])
    return rng.permutation(x.reshape(-1)).reshape(shape)


def subnormal_values(rng, shape, dtype):
    return rng.standard_normal(shape) * float(ml_dtypes.finfo(dtype).smallest_normal) / 4


def largest_values(rng, shape, dtype):
    return np.where(rng.random(shape) < 0.5, -1, 1) * (0.3 * float(ml_dtypes.finfo(dtype).max))


def of_any_size(rng, shape, dtype):
    return rng.standard_normal(shape) * float(ml_dtypes.finfo(dtype).max) ** rng.uniform(-0.5, 0.5, shape)


def sprinkled_values(rng, shape, dtype):
    return np.where(rng.random(shape) < 0.03, rng.choice(special_numbers(dtype), shape), rng.standard_normal(shape))


VALUES = st.sampled_from([
    normal_values, normal_values, equal_values, one_outlier, subnormal_values, largest_values, of_any_size,
    sprinkled_values,
])


def filled(draw, rng, shape, dtype):
    with np.errstate(all="ignore"):
        return draw(VALUES)(rng, shape, dtype).astype(dtype)


# Memory. What a layout makes of an array need not hold the same numbers.


class Subclass(np.ndarray):
    pass


def read_only(x):
    x.flags.writeable = False
    return x


def in_bytes(x, strides, start=0):
    """`x`'s numbers repeated in a piece of memory, taken out of it with these strides in bytes."""
    spans = [stride * (n - 1) for stride, n in zip(strides, x.shape, strict=True)]
    before, after = -sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans) + x.itemsize
    numbers = np.resize(x, (start + before + after) // x.itemsize + 1)
    return np.ndarray(x.shape, x.dtype, numbers.view(np.uint8), start + before, strides)


def any_bytes(x, rng):
    strides = [int(n) for n in rng.integers(-3 * x.itemsize, 3 * x.itemsize + 1, x.ndim)]
    return in_bytes(x, strides, int(rng.integers(x.itemsize)))


def overlapping(x, rng):
    return in_bytes(x, [x.itemsize * int(n) for n in rng.integers(-1, 3, x.ndim)])


def broadcast(x, rng):
    axis = rng.integers(x.ndim)
    return np.broadcast_to(x[tuple(slice(1) if i == axis else slice(None) for i in range(x.ndim))], x.shape)


def field_of_records(x, rng):
    records = np.zeros(x.shape, [("flag", "u1"), ("number", x.dtype), ("text", "S2")])
    records["number"] = x
    return records["number"]


def memory_mapped(x, rng):
    memory = np.frombuffer(mmap.mmap(-1, x.nbytes or 1), np.uint8)[: x.nbytes]
    mapped = memory.view(x.dtype).reshape(x.shape)
    mapped[...] = x
    return mapped


STRIDE = 2**32
SPARSE = []  # 64 GB of address space, and memory behind what has been touched


def far_apart(x, rng):
    """The entries along one axis are 4 GB apart."""
    axis = next((axis for axis, n in enumerate(x.shape) if 1 < n <= 16), None)
    if axis is None or x.size == 0 or sys.platform != "linux":
        return x
    if not SPARSE:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        SPARSE.append(np.frombuffer(mmap.mmap(-1, 16 * STRIDE, flags=flags), np.uint8))
    inner = np.moveaxis(x, axis, 0)
    strides = np.moveaxis(np.empty(inner.shape[1:], x.dtype)[None], 0, axis).strides
    apart = np.ndarray(x.shape, x.dtype, SPARSE[0], int(rng.integers(4)) * STRIDE // 4,
                       [STRIDE if i == axis else stride for i, stride in enumerate(strides)])
    apart[...] = x
    return apart


MEMORY = {name: lambda x, rng, layout=layout: layout(x) for name, layout in LAYOUTS.items()} | {
    "read-only": lambda x, rng: read_only(x.copy()),
    "subclass": lambda x, rng: x.view(Subclass),
    "lists": lambda x, rng: x.tolist() if x.dtype == np.float64 and x.size else x,
    "any bytes": any_bytes,
    "overlapping": overlapping,
    "broadcast": broadcast,
    "field of records": field_of_records,
    "memory mapped": memory_mapped,
}


def placed(draw, rng, x, same_numbers=False):
    names = [name for name in MEMORY if (x.ndim > 2 or "heads" not in name) and not (same_numbers and "any" in name)]
    return MEMORY[draw(st.sampled_from(names))](x, rng) if x.ndim > 1 else x


# Calls.

EXTREMES = {"sinks": [INF, -INF, NAN, 1e4, 3e38, -1e308], "alibi_slopes": [0, -1, 1e38, -1e308, INF]}


@st.composite
def hostile_calls(draw):
    """((query, key, value), options)."""
    def maybe():
        return draw(st.sampled_from([False, False, True]))

    arrays, options = draw(calls())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    far = draw(st.sampled_from([None, None, None, 0, 1, 2]))
    for number, array in enumerate(arrays):
        array = filled(draw, rng, array.shape, array.dtype)
        arrays[number] = far_apart(array, rng) if number == far else placed(draw, rng, array)

    integers = st.sampled_from([np.int64, np.int32, np.dtype(">i8"), np.int16, list])
    for name in ("q_offset", "kv_lens"):
        if np.ndim(options.get(name, 0)):
            kind = draw(integers)
            options[name] = options[name].tolist() if kind is list else options[name][::-1].astype(kind)[::-1]
    if maybe():
        options["q_offset"] = draw(st.sampled_from([2**40, -(2**40), 2**60, -(2**60), np.int64(5)]))
    if maybe():
        side = st.sampled_from([None, -1, 0, 2, 2**40, 2**60])
        options["window"] = draw(side), draw(side)
    if "softcap" in options:
        options["softcap"] = draw(st.sampled_from([1e-37, 1e-20, 0.5, 30, 1e20, 8e37]))
    if "scale" in options:
        options["scale"] = draw(st.sampled_from([0, -0.5, 1e-37, 1e-20, 1e20, -8e37]))
    for name, extremes in EXTREMES.items():
        if name in options and maybe():
            options[name] = np.where(rng.random(options[name].shape) < 0.3, draw(st.sampled_from(extremes)),
                                     options[name])
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype == bool:
        bytes_ = np.where(mask, rng.choice(np.array([1, 2, 255], np.uint8), mask.shape), 0).astype(np.uint8)
        options["attn_mask"] = placed(draw, rng, bytes_.view(bool))
    elif mask is not None:
        bias = np.where(mask == -INF, mask, filled(draw, rng, mask.shape, mask.dtype))
        if mask.ndim > 1 and maybe():
            bias[..., :1, :] = -INF
        options["attn_mask"] = placed(draw, rng, bias)
    return arrays, options


def plain(x):
    """The same numbers in an ordinary array."""
    return np.array(x, order="C")


@np.errstate(invalid="ignore")  # signalling NaN
def same_numbers(a, b):
    """Equal, bit for bit but for the payload of NaN."""
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        x, y = (np.where(np.isnan(z), z.dtype.type(0), z).view(f"u{z.dtype.itemsize}") for z in (x, y))
        np.testing.assert_array_equal(x, y)


def run_call(arrays, options, out_layout):
    copies = [plain(x) for x in arrays]
    plain_options = options.copy()
    if "attn_mask" in options:
        plain_options["attn_mask"] = plain(options["attn_mask"])
    results = everything(*arrays, **options)
    for x, copy in zip(arrays, copies, strict=True):
        same_numbers([plain(x)], [copy])
    assert_written_alone(results[0], out_layout, *arrays, **options)
    plain_options.pop("num_threads", None)
    same_numbers(everything(*copies, **plain_options, num_threads=5), results)
    assert_possible(results, *copies, **plain_options)


def assert_written_alone(result, layout, *arrays, **options):
    """The same into an array of this layout, and what lies between its elements is left alone."""
    out, other = (LAYOUTS[layout](np.zeros(result.shape, result.dtype)) for _ in range(2))
    assert cattn.scaled_dot_product_attention(*arrays, **options, out=out) is out
    other[...] = result
    out, other = (x if x.base is None else x.base for x in (out, other))
    assert out.tobytes("A") == other.tobytes("A")


def out_layouts(call):
    axes = max(np.ndim(x) for x in call[0])
    return st.tuples(st.just(call[0]), st.just(call[1]),
                     st.sampled_from([name for name in LAYOUTS if axes > 2 or "heads" not in name]))


@normal_suite
@given(call=hostile_calls().flatmap(out_layouts))
def test_any_call(isa, call):
    run_call(*call)


@st.composite
def hostile_gradients(draw):
    """(what the backward function is given, options), whatever the forward's results were."""
    (query, key, value), options = draw(hostile_calls())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    query, key, value = (np.asarray(x) for x in (query, key, value))  # some are lists
    core = 2 if query.ndim < 4 else 3
    leading = np.broadcast_shapes(*(x.shape[:-core] for x in (query, key, value)))
    rows, dtype = (*leading, *query.shape[-core:-1]), np.result_type(query.dtype, np.float32)
    grad_out, out = (placed(draw, rng, filled(draw, rng, (*rows, value.shape[-1]), query.dtype)) for _ in range(2))
    logsumexp = placed(draw, rng, filled(draw, rng, rows, dtype))
    if draw(st.booleans()):
        options["grad_logsumexp"] = placed(draw, rng, filled(draw, rng, rows, dtype))
    return (grad_out, query, key, value, out, logsumexp), options


@normal_suite
@given(call=hostile_gradients())
def test_any_gradients(isa, call):
    """Never a crash, inputs stay as they are, and the memory that they lie in does not matter, nor do threads."""
    given, options = call
    copies = [plain(x) for x in given]
    plain_options = {name: plain(x) if name in ("attn_mask", "grad_logsumexp") else x for name, x in options.items()}
    found, others = (
        [x for x in cattn.scaled_dot_product_attention_backward(*arrays, **own, wanted=cattn.Gradients._fields)
         if x is not None] for arrays, own in ((given, options), (copies, plain_options | {"num_threads": 5})))
    same_numbers(map(plain, given), copies)
    same_numbers(found, others)
    assert [x.shape for x in found[:3]] == [x.shape for x in copies[1:4]]


@pytest.mark.slow
@slow_suite
@given(call=hostile_calls().flatmap(out_layouts))
def test_very_many_calls(isa, call):
    run_call(*call)


@pytest.mark.parametrize("layout", ["contiguous", "every second column"])
@pytest.mark.parametrize("num_rows", [3, 50])
def test_every_byte_of_a_bool(isa, num_rows, layout):
    """All but 0 is True, also in a mask made of other bytes than 1."""
    query, key, value = problem(num_rows, 256, 8, leading=None)
    numbers = np.add.outer(np.arange(num_rows), np.arange(256)).astype(np.uint8)  # 0 in another place in each row
    for mask in numbers, numbers[:1]:
        results = everything(query, key, value, attn_mask=LAYOUTS[layout](mask.view(bool)))
        same_numbers(results, everything(query, key, value, attn_mask=mask > 0))


# Memory that arrays share with `out`.


@st.composite
def shared_memory(draw):
    """({name: array}, with key and value the same; their addresses as sets): all in one piece of 200 bytes."""
    memory = np.zeros(200, np.uint8)
    shapes = {"query": (2, 3), "key": (2, 3), "attn_mask": (2, 2), "out": (2, 3)}
    arrays, addresses = {}, {}
    for name, shape in shapes.items():
        strides = [draw(st.integers(-40, 40)) for _ in shape]
        offsets = [i * strides[0] + j * strides[1] for i in range(shape[0]) for j in range(shape[1])]
        low, high = -min(offsets), len(memory) - 4 - max(offsets)
        hypothesis.assume(low <= high)
        start = draw(st.integers(low, high))
        arrays[name] = np.ndarray(shape, np.float32, memory, start, strides)
        addresses[name] = [start + offset + byte for offset in offsets for byte in range(4)]
    return arrays, addresses


@settings(normal_suite, max_examples=300)
@given(arrays_and_addresses=shared_memory())
def test_out_is_refused_where_it_shares_a_byte(arrays_and_addresses):
    """With an input, or with itself: exactly then."""
    arrays, addresses = arrays_and_addresses
    own = set(addresses["out"])
    shares = next((name for name in ("query", "key", "attn_mask") if own & set(addresses[name])), None)
    try:
        result = cattn.scaled_dot_product_attention(
            arrays["query"], arrays["key"], arrays["key"], arrays["attn_mask"], out=arrays["out"])
    except ValueError as error:
        if len(own) < len(addresses["out"]):
            assert str(error).startswith("out: expected elements that do not overlap each other, got strides")
        else:
            assert str(error) == f"out: expected memory of its own, got an array that overlaps {shares}"
    else:
        assert shares is None and len(own) == len(addresses["out"])
        assert result is arrays["out"] and not result.any()


# Arrays whose shape another thread sets.

FLIPPED = """
import sys, threading, time, warnings
import numpy as np, cattn
warnings.simplefilter("ignore")  # of NumPy: shape is not to be set
sys.setswitchinterval(1e-6)
A, B = (1, 8, 64, 64), (8, 1, 64, 64)
x, y, out = (np.random.default_rng(i).standard_normal(A, np.float32) for i in range(3))
mask = np.random.default_rng(3).random((1, 8, 64, 64)) < 0.7
layer = cattn.MultiHeadAttention(64, 8, seed=0)
inputs = np.random.default_rng(4).standard_normal((2, 96, 64), np.float32)
encoding = cattn.PositionalEncoding(64)
attention, attention_backward = cattn.scaled_dot_product_attention, cattn.scaled_dot_product_attention_backward


def attend_query(): return attention(x, y[:, :1], y[:, :1], mask[:1, :1])
def attend_keys(): return attention(y, x, x, mask[:1, :1])
def attend_mask(): return attention(y, y, y, mask)
def attend_into(): return attention(y, y, y, np.ones((64, 64), bool), out=out).copy()
def attend_shortly(): return attention(x, y[:, :1], y[:, :1])
def differentiate(): return attention_backward(y, y, x, x, y, y[..., 0]).key
def project(): return layer(inputs)
def encode(): return encoding(inputs)
def change_weight(): return layer(np.ones((2, 3, 64), np.float32))


for call, array, shapes in [
        (attend_query, x, (A, B)), (attend_keys, x, (A, B)), (attend_mask, mask, (A, (1, 8, 4096, 1))),
        (attend_into, out, (A, B)), (attend_shortly, x, (A, B)), (differentiate, x, (A, B)),
        (project, inputs, ((2, 96, 64), (96, 2, 64))),
        (encode, inputs, ((2, 96, 64), (96, 2, 64))), (change_weight, layer.out_proj_weight, ((64, 64), (4096, 1)))]:
    right = {}
    for shape in shapes:
        array.shape = shape
        try:
            right[shape] = call().tobytes()
        except ValueError as error:
            right[shape] = str(error)
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            for shape in shapes:
                array.shape = shape

    thread = threading.Thread(target=flip, daemon=True)
    thread.start()
    seen, until, count = set(), time.monotonic() + 0.4, 0
    while time.monotonic() < until:
        try:
            seen.add(call().tobytes())
        except (ValueError, TypeError) as error:
            assert ": expected " in str(error), error
        count += 1
    stop.set()
    thread.join()
    array.shape = shapes[0]
    print(call.__name__, count, "calls,", len(seen), "results", flush=True)
    assert seen and seen <= set(right.values()), call.__name__
"""


@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(),
                    reason="without a GIL, NumPy's own reading of a shape is a race")
def test_shapes_that_another_thread_sets():
    """Each call is of one shape or the other, or an error that names an argument."""
    done = python(FLIPPED)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}"


# Anything at all.

JUNK = st.sampled_from([
    None, True, 0, -1, 3, 2**62, 2**64, 10**5000, 0.5, NAN, INF, -1e308, 1e-320, 1j, "text", b"bytes", (), (1,), (1, 2),
    (None, -1), (2**70, 0), [1.0, [2.0]], [], [[], []], {}, {1}, object(), len, Fraction(1, 3), Decimal(1),
    np.float32(2), np.int8(-1), np.longdouble(1) / 3, np.zeros(0), np.zeros(3), np.zeros((2, 3), int),
    np.zeros((2, 3, 4), np.float32), np.zeros((1, 2, 3, 4), np.float16), np.array(None), np.array("x"),
    np.zeros((3, 4), ">f4"), np.zeros((3, 4), BFLOAT16.newbyteorder()), np.zeros((3, 4), bool), np.datetime64("2020"),
    np.zeros(2, "f4,i4"), np.zeros((3, 4), complex), np.zeros((3, 4), ml_dtypes.float8_e4m3fn),
    np.ma.masked_all((3, 4)), np.broadcast_to(np.float32(1), (2**40, 2**20)),
])


def outcome(function, *args, **options):
    """("result", what it returns), or (type of error, its text); only errors that name an argument are such."""
    try:
        return "result", function(*args, **options)
    except (ValueError, TypeError) as error:
        names = inspect.signature(function).parameters
        assert str(error).split(":")[0] in names, f"no argument of this name: {error}"
        assert ": expected " in str(error)
        return type(error), str(error)


@st.composite
def replaced_arguments(draw, names, most=2):
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=most, unique=True))
    return {name: draw(JUNK) for name in chosen}


ATTENTION_ARGUMENTS = [
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "q_offset", "window",
    "softcap", "alibi_slopes", "sinks", "kv_lens", "return_weights", "return_logsumexp", "out", "num_threads", "seed",
]


@settings(normal_suite, max_examples=500)
@given(replaced=replaced_arguments(ATTENTION_ARGUMENTS))
def test_junk_in_calls(replaced):
    query, key, value = (np.ones((3, 4), np.float32) for _ in range(3))
    arguments = {"query": query, "key": key, "value": value, "out": np.full((3, 4), 7, np.float32)} | replaced
    kind, _ = outcome(cattn.scaled_dot_product_attention, **arguments)
    if kind != "result" and "out" not in replaced:
        assert (arguments["out"] == 7).all()


@settings(normal_suite, max_examples=500)
@given(replaced=replaced_arguments([
    "grad_out", "out", "logsumexp", "grad_logsumexp", "wanted",
    *(name for name in ATTENTION_ARGUMENTS if name not in ("out", "return_weights", "return_logsumexp"))]))
def test_junk_in_gradients(replaced):
    x = np.ones((3, 4), np.float32)
    arguments = {**dict.fromkeys(("grad_out", "query", "key", "value", "out"), x), "logsumexp": x[:, 0]} | replaced
    outcome(cattn.scaled_dot_product_attention_backward, **arguments)


@settings(normal_suite, max_examples=300)
@given(replaced=replaced_arguments([
    "grad_out", "query", "key", "value", "out", "logsumexp", "cu_seqlens_q", "cu_seqlens_kv", "is_causal", "q_offset",
    "scale", "window", "softcap", "alibi_slopes", "sinks", "dropout_p", "seed", "grad_logsumexp", "wanted",
    "num_threads"]))
def test_junk_in_gradients_of_packed_sequences(replaced):
    x = np.ones((3, 2, 4), np.float32)
    arguments = {**dict.fromkeys(("grad_out", "query", "key", "value", "out"), x), "logsumexp": x[..., 0],
                 "cu_seqlens_q": [0, 1, 3]} | replaced
    outcome(cattn.varlen_attention_backward, **arguments)


def same_errors(name, args, options):
    """What the public and the reference's function or class of this name make of it: the results, or None where both
    raise the same error."""
    ours, theirs = (outcome(getattr(library, name), *args, **options) for library in (cattn, reference))
    if "dtype" in options and ours[0] is TypeError and theirs[0] == "result":
        assert ours[1].startswith("dtype: ")
        assert theirs[1].dtype == np.longdouble  # which the public ones do not know
        return None
    if "result" in (ours[0], theirs[0]):
        assert ours[0] == theirs[0], (ours, theirs)
        return ours[1], theirs[1]
    if "dtype" in options:  # the texts list those that they know
        ours, theirs = ((kind, text.split(",")[-1]) for kind, text in (ours, theirs))
    assert ours == theirs
    return None


@settings(normal_suite, max_examples=300)
@given(replaced=replaced_arguments(["length", "dim", "base", "offset", "layout", "endpoint", "positions", "dtype"]))
def test_junk_in_tables(replaced):
    results = same_errors("sinusoidal_encoding", (), {"length": 5, "dim": 6} | replaced)
    if results and results[0].dtype != np.float16:
        np.testing.assert_allclose(*results, rtol=0, atol=2.0**-23)


@settings(normal_suite, max_examples=200)
@given(replaced=replaced_arguments(["length", "dim", "base", "offset", "frequencies"]))
def test_junk_in_rotary_tables(replaced):
    results = same_errors("rotary_table", (), {"length": 5, "dim": 6} | replaced)
    if results:
        np.testing.assert_allclose(*results, rtol=0, atol=2.0**-23)


@settings(normal_suite, max_examples=300)
@given(replaced=replaced_arguments(["x", "cos", "sin", "positions", "interleaved", "out", "num_threads"]))
def test_junk_in_rotary_embeddings(replaced):
    x, cos, sin = np.ones((3, 4), np.float32), *np.ones((2, 3, 2), np.float32)
    out = np.full((3, 4), 7, np.float32)
    arguments = {"x": x, "cos": cos, "sin": sin, "interleaved": True, "out": out} | replaced
    kind, _ = outcome(cattn.rotary_embedding, **arguments)
    if kind != "result":
        assert (out == 7).all()


@settings(normal_suite, max_examples=200)
@given(replaced=replaced_arguments(["delta", "dim", "base", "layout", "endpoint", "dtype"]))
def test_junk_in_shifts(replaced):
    same_errors("relative_shift", (), {"delta": 2, "dim": 6} | replaced)


@settings(normal_suite, max_examples=300)
@given(replaced=replaced_arguments(["embed_dim", "num_heads", "num_kv_heads", "input_dim", "bias", "dropout", "seed"]))
def test_junk_in_layers(replaced):
    same_errors("MultiHeadAttention", (), {"embed_dim": 12, "num_heads": 3} | replaced)


@settings(normal_suite, max_examples=200)
@given(replaced=replaced_arguments(["dim", "dropout", "max_len", "base", "layout", "endpoint"]))
def test_junk_in_encodings(replaced):
    same_errors("PositionalEncoding", (), {"dim": 6, "max_len": 4} | replaced)


# The layers, on hostile memory.


@st.composite
def hostile_input(draw, dtype, *shape):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from([normal_values, subnormal_values, sprinkled_with_nan]))(rng, shape, dtype)
    return placed(draw, rng, values.astype(dtype), same_numbers=True)


def sprinkled_with_nan(rng, shape, dtype):
    return np.where(rng.random(shape) < 0.02, NAN, rng.standard_normal(shape))


@st.composite
def layer_calls(draw):
    num_kv_heads, group_size, head_dim = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)))
    dtype = draw(st.sampled_from(FLOATS))
    embed_dim, input_dim = num_kv_heads * group_size * head_dim, draw(st.integers(1, 9))
    options = {"num_kv_heads": num_kv_heads, "input_dim": input_dim, "bias": draw(st.booleans()), "dtype": dtype,
               "seed": draw(st.integers(0, 2**32 - 1))}
    batch = draw(st.sampled_from([(), (0,), (1,), (3,)]))
    seq_len_q, seq_len_kv = draw(st.tuples(st.integers(0, 12), st.integers(0, 12)))
    inputs = [draw(hostile_input(dtype, *batch, seq_len_q, input_dim))]
    for _ in range(draw(st.integers(0, 2))):
        inputs.append(draw(hostile_input(dtype, *batch, seq_len_kv, input_dim)))
    return (embed_dim, num_kv_heads * group_size), options, inputs, draw(st.booleans())


def run_layer(sizes, options, inputs, is_causal):
    ours, theirs = (library.MultiHeadAttention(*sizes, **options) for library in (cattn, reference))
    wide = reference.MultiHeadAttention(*sizes, **options | {"dtype": np.longdouble})
    wide.load_state_dict(theirs.state_dict())
    call = {"is_causal": is_causal, "q_offset": 0, "return_weights": True}
    copies = [plain(x) for x in inputs]
    info = ml_dtypes.finfo(options["dtype"])
    with np.errstate(all="ignore"):
        widened = [x.astype(np.longdouble) for x in copies]
        results = ours(*inputs, **call), theirs(*copies, **call), wide(*widened, **call)
        for result, rough, exact in zip(*results, strict=True):
            assert (result.dtype, result.shape) == (options["dtype"], exact.shape)
            finite = np.isfinite(exact)
            np.testing.assert_array_equal(np.isnan(result), np.isnan(exact))
            error, rough_error = (
                np.abs(np.where(finite, x.astype(np.longdouble) - exact, 0)).max(initial=0) for x in (result, rough))
            rounding = float(info.eps) * max(np.abs(np.where(finite, exact, 0)).max(initial=0), 1)
            assert error <= 2 * rough_error + 4 * rounding


@normal_suite
@given(call=layer_calls())
def test_any_layer(isa, call):
    run_layer(*call)


@normal_suite
@given(data=st.data(), dtype=st.sampled_from([FLOATS[0], FLOATS[1], FLOATS[2]]), dim=st.integers(1, 9),
       shape=st.sampled_from([(0,), (5,), (2, 7), (3, 0, 2), (2, 1, 4)]), max_len=st.integers(0, 6),
       training=st.booleans())
def test_any_encoding(data, dtype, dim, shape, max_len, training):
    x = data.draw(hostile_input(dtype, *shape, dim))
    ours, theirs = (library.PositionalEncoding(dim, 0.5, max_len, dtype=dtype) for library in (cattn, reference))
    out, expected = ours(x, training=training, seed=3), theirs(plain(x), training=training, seed=3)
    assert (out.dtype, out.shape) == (dtype, expected.shape) and ours.P.shape == theirs.P.shape
    # Where dropout leaves them, sums of tables that are both within 2**-24 of the right one (half an ulp in float16),
    # rounded, times 2.
    size = np.abs(np.where(np.isfinite(expected), expected, 0)).max(initial=1)
    np.testing.assert_allclose(out, expected, rtol=0, atol=4 * (2.0**-24 + float(np.finfo(dtype).eps) * size))
    np.testing.assert_array_equal(out == 0, expected == 0)
