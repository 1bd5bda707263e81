"""Every bad call of attention: the exception, its whole text, and that nothing was written before it came."""

import math
from fractions import Fraction
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cattn
from cattn import threads

F32, F64 = np.float32, np.float64


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def giant(*shape, dtype=F32):
    """No memory behind it: all strides are 0."""
    return np.broadcast_to(dtype(0), shape)


def call(query=None, key=None, value=None, **options):
    """A good call, but for what is given: 2 batch rows, 4 heads on 2, 3 queries, 5 keys, head_dim 8 and 6."""
    query = zeros(2, 4, 3, 8) if query is None else query
    key = zeros(2, 2, 5, 8) if key is None else key
    value = zeros(2, 2, 5, 6) if value is None else value
    return cattn.scaled_dot_product_attention(query, key, value, **options)


def read_only(array):
    array.flags.writeable = False
    return array


def overlapping():
    """Two rows in the place of one."""
    return np.lib.stride_tricks.as_strided(zeros(1000), (2, 4, 3, 6), (288, 72, 0, 4))


class Larger(np.ndarray):
    """Says that it has what the call asks for."""

    shape, strides, ndim, size = (2, 4, 3, 6), (288, 72, 24, 4), 4, 144


DTYPE = "expected float32, float64, float16 or bfloat16 in native byte order"
SHAPE, KIND = ValueError, TypeError
SWAPPED_BFLOAT16 = np.dtype(ml_dtypes.bfloat16).newbyteorder()

BAD_CALLS = [
    # Dtypes.
    ({"query": zeros(2, 4, 3, 8, dtype=int)}, KIND, f"query: {DTYPE}, got dtype int64"),
    ({"query": zeros(2, 4, 3, 8, dtype=object)}, KIND, f"query: {DTYPE}, got dtype object"),
    ({"query": zeros(2, 4, 3, 8, dtype=complex)}, KIND, f"query: {DTYPE}, got dtype complex128"),
    ({"query": zeros(2, 4, 3, 8, dtype=bool)}, KIND, f"query: {DTYPE}, got dtype bool"),
    ({"query": zeros(2, 4, 3, 8, dtype=">f4")}, KIND, f"query: {DTYPE}, got dtype >f4"),
    ({"query": zeros(2, 4, 3, 8, dtype=np.longdouble)}, KIND, f"query: {DTYPE}, got dtype {np.dtype(np.longdouble)}"),
    ({"query": zeros(2, 4, 3, 8, dtype=ml_dtypes.float8_e4m3fn)}, KIND, f"query: {DTYPE}, got dtype float8_e4m3fn"),
    ({"query": zeros(2, 4, 3, 8, dtype=SWAPPED_BFLOAT16)}, KIND, f"query: {DTYPE}, got dtype {SWAPPED_BFLOAT16}"),
    ({"query": [["a"]]}, KIND, f"query: {DTYPE}, got dtype <U1"),
    ({"key": zeros(2, 2, 5, 8, dtype=int)}, KIND, f"key: {DTYPE}, got dtype int64"),
    ({"key": zeros(2, 2, 5, 8, dtype=">f2")}, KIND, f"key: {DTYPE}, got dtype >f2"),
    ({"value": zeros(2, 2, 5, 6, dtype=np.int8)}, KIND, "value: expected the dtype of key, float32, got int8"),
    ({"value": zeros(2, 2, 5, 6, dtype=F64)}, KIND, "value: expected the dtype of key, float32, got float64"),
    ({"key": zeros(2, 2, 5, 8, dtype=np.float16)}, KIND, "value: expected the dtype of key, float16, got float32"),
    *(
        ({"query": zeros(2, 4, 3, 8, dtype=q), "key": zeros(2, 2, 5, 8, dtype=k), "value": zeros(2, 2, 5, 6, dtype=k)},
         KIND, f"key: expected dtype {np.dtype(q)}, as query has (or a 16-bit one under a float32 query), "
               f"got {np.dtype(k)}")
        for q, k in [(F64, F32), (F32, F64), (np.float16, F32), (F64, np.float16), (np.float16, ml_dtypes.bfloat16),
                      (ml_dtypes.bfloat16, np.float16), (ml_dtypes.bfloat16, F32)]
    ),

    # Number of axes.
    ({"query": zeros(8)}, SHAPE, "query: expected 2 axes (seq_len_q, head_dim) or more, got shape (8,)"),
    ({"query": F32(1)}, SHAPE, "query: expected 2 axes (seq_len_q, head_dim) or more, got shape ()"),
    ({"query": zeros(3, 8)}, SHAPE, "key: expected 2 axes, as query has, got shape (2, 2, 5, 8)"),
    ({"key": zeros(2, 5, 8)}, SHAPE, "key: expected 4 axes, as query has, got shape (2, 5, 8)"),
    ({"key": F32(1)}, SHAPE, "key: expected 4 axes, as query has, got shape ()"),
    ({"value": zeros(5, 6)}, SHAPE, "value: expected 4 axes, as query has, got shape (5, 6)"),
    ({"query": zeros(2, 3, 8), "key": zeros(2, 5, 8)}, SHAPE,
     "value: expected 3 axes, as query has, got shape (2, 2, 5, 6)"),

    # Lengths of axes.
    ({"key": zeros(3, 2, 5, 8)}, SHAPE, "key: expected (2, num_kv_heads, seq_len_kv, 8), got shape (3, 2, 5, 8)"),
    ({"value": zeros(3, 2, 5, 6)}, SHAPE, "value: expected (2, 2, 5, head_dim_v), got shape (3, 2, 5, 6)"),
    ({"query": zeros(2, 3, 8), "key": zeros(3, 5, 8), "value": zeros(3, 5, 6)}, SHAPE,
     "key: expected (2, seq_len_kv, 8), got shape (3, 5, 8)"),
    ({"key": zeros(7, 3, 2, 5, 8)}, SHAPE, "key: expected (2, num_kv_heads, seq_len_kv, 8), got shape (7, 3, 2, 5, 8)"),
    ({"key": zeros(2, 2, 5, 80)}, SHAPE, "key: expected (2, num_kv_heads, seq_len_kv, 8), got shape (2, 2, 5, 80)"),
    ({"query": zeros(3, 8), "key": zeros(5, 7), "value": zeros(5, 6)}, SHAPE,
     "key: expected (seq_len_kv, 8), got shape (5, 7)"),
    ({"query": zeros(2, 4, 3, 0)}, SHAPE, "query: expected a head_dim from 1 to 2147483647, got shape (2, 4, 3, 0)"),
    ({"key": zeros(2, 3, 5, 8)}, SHAPE,
     "key: expected a num_kv_heads that divides query's 4 heads, got shape (2, 3, 5, 8)"),
    ({"key": zeros(2, 8, 5, 8)}, SHAPE,
     "key: expected a num_kv_heads that divides query's 4 heads, got shape (2, 8, 5, 8)"),
    ({"key": zeros(2, 0, 5, 8)}, SHAPE,
     "key: expected a num_kv_heads that divides query's 4 heads, got shape (2, 0, 5, 8)"),
    ({"value": zeros(2, 4, 5, 6)}, SHAPE, "value: expected (2, 2, 5, head_dim_v), got shape (2, 4, 5, 6)"),
    ({"value": zeros(2, 2, 4, 6)}, SHAPE, "value: expected (2, 2, 5, head_dim_v), got shape (2, 2, 4, 6)"),
    ({"value": zeros(2, 2, 5, 0)}, SHAPE, "value: expected (2, 2, 5, head_dim_v), got shape (2, 2, 5, 0)"),

    # Sizes beyond an index.
    ({"query": giant(1, 1, 1, 2**31), "key": giant(1, 1, 1, 2**31), "value": zeros(1, 1, 1, 1)}, SHAPE,
     "query: expected a head_dim from 1 to 2147483647, got shape (1, 1, 1, 2147483648)"),
    ({"key": zeros(1, 1, 5, 8), "value": giant(1, 1, 5, 2**31)}, SHAPE,
     "value: expected (2, 1, 5, head_dim_v), got shape (1, 1, 5, 2147483648)"),
    ({"query": giant(2**20, 2**20, 2**18, 1), "key": giant(1, 1, 5, 1), "value": giant(1, 1, 5, 4)}, SHAPE,
     f"query: expected a result that fits in memory, got rows {(2**20, 2**20, 2**18)} of 4"),
    ({"query": giant(2**30, 1, 2, 1, 1), "key": giant(2**29, 1, 1, 1), "value": giant(1, 1, 1, 1)}, SHAPE,
     f"query: expected a result that fits in memory, got rows {(2**30, 2**29, 2, 1)} of 1"),
    ({"query": giant(2**30, 1), "key": giant(2**32, 1), "value": giant(2**32, 1), "return_weights": True}, SHAPE,
     f"query: expected a result that fits in memory, got rows {(2**30,)} of 1"),
    ({"query": np.zeros((9000, 1), np.float16), "key": giant(2**60, 1, dtype=np.float16),
      "value": giant(2**60, 1, dtype=np.float16)}, SHAPE,
     f"value: expected at most {2**48} numbers, and key and value broadcast to () that fit an index, "
     f"got shape ({2**60}, 1)"),
    ({"query": zeros(2**13, 1, 1, 1), "key": giant(1, 1, 2**48, 1), "value": giant(1, 1, 2**48, 1)}, SHAPE,
     f"value: expected at most {2**48} numbers, and key and value broadcast to (8192,) that fit an index, "
     f"got shape (1, 1, {2**48}, 1)"),

    # Mask.
    ({"attn_mask": zeros(3, 5, dtype=int)}, KIND,
     "attn_mask: expected bool (True = attend) or a float dtype (added), got int64"),
    ({"attn_mask": zeros(3, 5, dtype=np.uint8)}, KIND,
     "attn_mask: expected bool (True = attend) or a float dtype (added), got uint8"),
    ({"attn_mask": zeros(3, 5, dtype=">f4")}, KIND,
     "attn_mask: expected bool (True = attend) or a float dtype (added), got >f4"),
    ({"attn_mask": zeros(3, 5, dtype=SWAPPED_BFLOAT16)}, KIND,
     f"attn_mask: expected bool (True = attend) or a float dtype (added), got {SWAPPED_BFLOAT16}"),
    ({"attn_mask": "causal"}, KIND, "attn_mask: expected bool (True = attend) or a float dtype (added), got <U6"),
    ({"attn_mask": zeros(3, 6)}, SHAPE,
     "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), got shape (3, 6)"),
    ({"attn_mask": zeros(2, 3, 5)}, SHAPE,
     "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), got shape (2, 3, 5)"),
    ({"attn_mask": zeros(1, 2, 4, 3, 5)}, SHAPE,
     "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), got shape (1, 2, 4, 3, 5)"),
    ({"attn_mask": zeros(0, 5, dtype=bool)}, SHAPE,
     "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), got shape (0, 5)"),

    # Numbers.
    *(({"scale": number}, ValueError, f"scale: expected 0 or a number from -8.51e+37 to 8.51e+37, got {number}")
      for number in (math.nan, math.inf, -math.inf, 10**400, 9e37, -9e37)),
    ({"scale": "1"}, KIND, "scale: expected a number, got '1'"),
    ({"scale": 1j}, KIND, "scale: expected a number, got 1j"),
    ({"scale": np.ones(1)}, KIND, "scale: expected a number, got array([1.])"),
    *(({"softcap": number}, ValueError, f"softcap: expected 0 or a number from 1.18e-38 to 8.51e+37, got {number}")
      for number in (math.nan, math.inf, -1.0, 9e37, 1e-38)),
    *(({"query": zeros(2, 4, 3, 8, dtype=F64), "key": zeros(2, 2, 5, 8, dtype=F64), "out": None, name: number,
        "value": zeros(2, 2, 5, 6, dtype=F64)}, ValueError,
       f"{name}: expected 0 or a number from {least} to 4.49e+307, got {number}")
      for name, number, least in [("softcap", 1e-308, "2.23e-308"), ("softcap", 5e307, "2.23e-308"),
                                  ("scale", 5e307, "-4.49e+307")]),
    ({"softcap": None}, KIND, "softcap: expected a number, got None"),
    ({"softcap": np.ones(2)}, KIND, "softcap: expected a number, got array([1., 1.])"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a float in [0, 1), got 1.0"),
    ({"dropout_p": Fraction(10**20 - 1, 10**20)}, ValueError,
     f"dropout_p: expected a float in [0, 1), got {10**20 - 1}/{10**20}"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a float in [0, 1), got -0.1"),
    ({"dropout_p": math.nan}, ValueError, "dropout_p: expected a float in [0, 1), got nan"),
    ({"dropout_p": None}, KIND, "dropout_p: expected a float in [0, 1), got None"),
    ({"dropout_p": np.ones(2)}, KIND, "dropout_p: expected a float in [0, 1), got array([1., 1.])"),
    ({"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
    ({"seed": 2**64, "dropout_p": 0.5}, ValueError, f"seed: expected an int below 2**64, got {2**64}"),
    ({"seed": 1.0, "dropout_p": 0.5}, KIND, "seed: expected an int, got 1.0"),
    ({"num_threads": 0}, ValueError, "num_threads: expected 1 to 2147483647, got 0"),
    ({"num_threads": -2}, ValueError, "num_threads: expected 1 to 2147483647, got -2"),
    ({"num_threads": 2**31}, ValueError, "num_threads: expected 1 to 2147483647, got 2147483648"),
    ({"num_threads": 1.5}, KIND, "num_threads: expected an integer, got float"),
    ({"num_threads": "2"}, KIND, "num_threads: expected an integer, got str"),

    # Window, positions, lengths.
    ({"window": 3}, ValueError, "window: expected None or (left, right), got 3"),
    ({"window": (1, 2, 3)}, ValueError, "window: expected None or (left, right), got (1, 2, 3)"),
    ({"window": ()}, ValueError, "window: expected None or (left, right), got ()"),
    ({"window": "12"}, ValueError, "window: expected None or (left, right), got '12'"),
    ({"window": np.array([1, 2])}, ValueError, "window: expected None or (left, right), got array([1, 2])"),
    ({"window": (1.0, 2)}, KIND, "window: expected an int, got 1.0"),
    ({"window": (1, "2")}, KIND, "window: expected an int, got '2'"),
    ({"window": (-2, 0)}, ValueError,
     "window: expected keys to the left and right >= 0, or -1 or None for all, got (-2, 0)"),
    ({"window": (None, -5)}, ValueError,
     "window: expected keys to the left and right >= 0, or -1 or None for all, got (None, -5)"),
    ({"q_offset": 1.0}, KIND, "q_offset: expected integers, got dtype float64"),
    ({"q_offset": None}, KIND, "q_offset: expected integers, got dtype object"),
    ({"q_offset": True}, KIND, "q_offset: expected integers, got dtype bool"),
    ({"q_offset": [0, 1, 2]}, ValueError, "q_offset: expected shape (2,), one per batch row, got shape (3,)"),
    ({"q_offset": [[0, 1]]}, ValueError, "q_offset: expected shape (2,), one per batch row, got shape (1, 2)"),
    ({"kv_lens": 3}, ValueError, "kv_lens: expected shape (2,), one per batch row, got shape ()"),
    ({"kv_lens": [3]}, ValueError, "kv_lens: expected shape (2,), one per batch row, got shape (1,)"),
    ({"kv_lens": [3.0, 4.0]}, KIND, "kv_lens: expected integers, got dtype float64"),
    ({"kv_lens": [True, False]}, KIND, "kv_lens: expected integers, got dtype bool"),
    ({"kv_lens": [3, 6]}, ValueError, "kv_lens: expected lengths from 0 to seq_len_kv = 5, got [3, 6]"),
    ({"kv_lens": [-1, 5]}, ValueError, "kv_lens: expected lengths from 0 to seq_len_kv = 5, got [-1, 5]"),

    # Vectors of the heads.
    ({"alibi_slopes": zeros(3)}, ValueError, "alibi_slopes: expected shape (4,) or (2, 4), got shape (3,)"),
    ({"alibi_slopes": 0.5}, ValueError, "alibi_slopes: expected shape (4,) or (2, 4), got shape ()"),
    ({"alibi_slopes": zeros(1, 4)}, ValueError, "alibi_slopes: expected shape (4,) or (2, 4), got shape (1, 4)"),
    ({"alibi_slopes": zeros(4, dtype=complex)}, KIND, "alibi_slopes: expected a float array, got dtype complex128"),
    ({"alibi_slopes": zeros(4, dtype=bool)}, KIND, "alibi_slopes: expected a float array, got dtype bool"),
    ({"sinks": zeros(4, dtype=SWAPPED_BFLOAT16)}, KIND,
     f"sinks: expected a float array, got dtype {SWAPPED_BFLOAT16}"),
    ({"sinks": zeros(2)}, ValueError, "sinks: expected shape (4,), got shape (2,)"),
    ({"sinks": zeros(2, 4)}, ValueError, "sinks: expected shape (4,), got shape (2, 4)"),
    ({"sinks": zeros(4, dtype=object)}, KIND, "sinks: expected a float array, got dtype object"),

    # out.
    ({"out": [1.0]}, KIND, "out: expected an array of query's dtype float32, got <class 'list'>"),
    ({"out": zeros(2, 4, 3, 6, dtype=F64)}, KIND, "out: expected an array of query's dtype float32, got float64"),
    ({"out": zeros(2, 4, 3, 6, dtype=">f4")}, KIND, "out: expected an array of query's dtype float32, got >f4"),
    ({"out": zeros(2, 4, 3, 8)}, ValueError, "out: expected shape (2, 4, 3, 6), got shape (2, 4, 3, 8)"),
    ({"out": zeros(4, 3, 6)}, ValueError, "out: expected shape (2, 4, 3, 6), got shape (4, 3, 6)"),
    ({"out": zeros(1, 1, 3, 6).view(Larger)}, ValueError,
     "out: expected shape (2, 4, 3, 6), got shape (1, 1, 3, 6)"),
    ({"out": read_only(zeros(2, 4, 3, 6))}, ValueError, "out: expected a writeable array, got a read-only one"),
    ({"out": overlapping()}, ValueError,
     "out: expected elements that do not overlap each other, got strides (288, 72, 0, 4)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=[case[2][:60] for case in BAD_CALLS])
def test_bad_call(changes, error, message):
    out = np.full((2, 4, 3, 6), 7, F32)
    with pytest.raises((ValueError, TypeError)) as raised:
        call(**{"out": out} | changes)
    assert raised.type is error
    assert str(raised.value) == message
    assert (out == 7).all()


@pytest.mark.parametrize("which", [
    "query", "key", "value", "attn_mask", "q_offset", "kv_lens", "alibi_slopes", "sinks",
])
def test_rows_of_different_lengths(which):
    with pytest.raises(ValueError, match=f"^{which}: expected an array, got a list that makes none: "):
        call(**{which: [[1.0], [2.0, 3.0]]})


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_too_many_axes(which):
    try:
        many = zeros(*[1] * 33)
    except ValueError:
        pytest.skip("this NumPy has no arrays of 33 axes")
    with pytest.raises(ValueError, match=f"^{which}: expected at most 32 axes, got 33$"):
        call(**{which: many})


def test_good_call():
    """What the cases above differ from."""
    assert call().shape == (2, 4, 3, 6)
    assert call(out=zeros(2, 4, 3, 6), q_offset=1, kv_lens=[3, 5], alibi_slopes=zeros(2, 4), sinks=zeros(4)).any() == 0


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask", "sinks", "alibi_slopes"])
def test_out_that_overlaps_an_input(which):
    """Also where they share one number. Arrays that take turns in one memory are fine."""
    shapes = {"query": (2, 4, 3, 8), "key": (2, 2, 5, 8), "value": (2, 2, 5, 6), "attn_mask": (2, 4, 3, 5),
              "sinks": (4,), "alibi_slopes": (4,)}
    size = math.prod(shapes[which])
    for overlap in (0, 1, min(size, 144)):
        memory = np.arange(144 + size - overlap, dtype=F32)
        out, array = memory[:144].reshape(2, 4, 3, 6), memory[144 - overlap :].reshape(shapes[which])
        if overlap == 0:
            assert call(**{which: array}, out=out) is out
            continue
        with pytest.raises(ValueError) as raised:
            call(**{which: array}, out=out)
        assert str(raised.value) == f"out: expected memory of its own, got an array that overlaps {which}"
        assert (memory == np.arange(len(memory))).all()
    pairs = zeros(2, 4, 3, 16)
    assert call(query=pairs[..., ::2], out=pairs[..., 1:13:2]).shape == (2, 4, 3, 6)


def test_overlap_that_is_hard_to_decide_counts_as_one(monkeypatch):
    """Whether two strided arrays overlap is an integer problem; numpy gives up after a number of steps."""
    def give_up(*args, **kwargs):
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", give_up)
    pairs = zeros(2, 4, 3, 16)
    with pytest.raises(ValueError, match="overlaps query"):
        call(query=pairs[..., ::2], out=pairs[..., 1:13:2])


@pytest.mark.parametrize(("shape", "seq_len_kv", "return_weights"), [
    ((2**45, 1, 1, 1), 1, False), ((2**20, 1, 2**20, 1), 2**10, True),
])
def test_result_beyond_memory(shape, seq_len_kv, return_weights):
    """It fits an index, so it is for the allocator to refuse."""
    keys = giant(1, 1, seq_len_kv, 1)
    with pytest.raises(MemoryError):
        cattn.scaled_dot_product_attention(giant(*shape), keys, keys, return_weights=return_weights)


def test_failing_call_reads_nothing(monkeypatch):
    """The kernel is not entered; the short way lets no bad call in."""
    entered = []
    kernels = SimpleNamespace(attend=lambda *args: entered.append(args), attend_plain=cattn._kernels.f32.attend_plain)
    monkeypatch.setattr(cattn._kernels, "f32", kernels)
    call(softcap=1.0)
    assert len(entered) == 1
    for changes, _, _ in BAD_CALLS:
        with pytest.raises((ValueError, TypeError)):
            call(**changes)
    assert len(entered) == 1


def test_no_memory_for_scratch():
    """The kernel's own allocation, which grows with head_dim and threads: more bytes than a process has addresses."""
    rows = giant(1000, 1, 100, 2**31 - 1)
    with pytest.raises(MemoryError, match=r"^attention: no memory for 1000 x \d+ bytes of scratch$"):
        cattn.scaled_dot_product_attention(rows, rows, rows[..., :1], num_threads=1000)


@pytest.mark.parametrize(("num_threads", "error", "message"), [
    (0, ValueError, "num_threads: expected 1 to 2147483647, got 0"),
    (-1, ValueError, "num_threads: expected 1 to 2147483647, got -1"),
    (2**40, ValueError, f"num_threads: expected 1 to 2147483647, got {2**40}"),
    (2.0, TypeError, "num_threads: expected an integer, got float"),
    ("4", TypeError, "num_threads: expected an integer, got str"),
])
def test_set_num_threads(num_threads, error, message):
    before = cattn.get_num_threads()
    with pytest.raises((ValueError, TypeError)) as raised:
        cattn.set_num_threads(num_threads)
    assert raised.type is error and str(raised.value) == message
    assert cattn.get_num_threads() == before and threads.source() != "set_num_threads"
