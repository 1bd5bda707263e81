"""Every bad call of attention: the exception, its whole text, and that nothing was written before it came."""

import inspect
import math
import operator
import warnings
from fractions import Fraction
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from processes import python

import cattn
from cattn import _threads, reference

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


def differentiate(**changes):
    """The same for its gradients; and for these, which is None, packed: 3 sequences."""
    arguments = {"grad_out": zeros(2, 4, 3, 6), "query": zeros(2, 4, 3, 8), "key": zeros(2, 2, 5, 8),
                 "value": zeros(2, 2, 5, 6), "out": zeros(2, 4, 3, 6), "logsumexp": zeros(2, 4, 3)}
    return cattn.scaled_dot_product_attention_backward(**arguments | changes)


def differentiate_packed(**changes):
    arguments = {"grad_out": zeros(6, 4, 3), "query": zeros(6, 4, 8), "key": zeros(9, 2, 8), "value": zeros(9, 2, 3),
                 "out": zeros(6, 4, 3), "logsumexp": zeros(6, 4), "cu_seqlens_q": [0, 3, 4, 6],
                 "cu_seqlens_kv": [0, 5, 7, 9]}
    return cattn.varlen_attention_backward(**arguments | changes)


def read_only(array):
    array.flags.writeable = False
    return array


def overlapping():
    """Two rows in the place of one."""
    return np.lib.stride_tricks.as_strided(zeros(1000), (2, 4, 3, 6), (288, 72, 0, 4))


def interleaved():
    """Two rows of three numbers, each 8 bytes long: at bytes 0, 16, 32 and 24, 40, 56."""
    return np.ndarray((2, 3), F64, np.zeros(8), 0, (24, 16))


class Larger(np.ndarray):
    """Says that it has what the call asks for."""

    shape, strides, ndim, size = (2, 4, 3, 6), (288, 72, 24, 4), 4, 144


DTYPE = "expected float32, float64, float16 or bfloat16 in native byte order"
SHAPE, KIND = ValueError, TypeError
SWAPPED_BFLOAT16 = np.dtype(ml_dtypes.bfloat16).newbyteorder()

BAD_CALLS = [
    # Dtypes.
    ({"query": zeros(2, 4, 3, 8, dtype=int)}, KIND,
     f"query: {DTYPE}, got dtype int64; query.astype(np.float32) casts"),
    ({"query": [[1, 2], [3, 4]]}, KIND, f"query: {DTYPE}, got dtype int64; np.asarray(query, np.float32) casts"),
    ({"query": zeros(2, 4, 3, 8, dtype=">f8")}, KIND,
     f"query: {DTYPE}, got dtype >f8; query.astype(np.float64) casts"),
    ({"query": zeros(2, 4, 3, 8, dtype=object)}, KIND, f"query: {DTYPE}, got dtype object"),
    ({"query": zeros(2, 4, 3, 8, dtype=complex)}, KIND, f"query: {DTYPE}, got dtype complex128"),
    ({"query": zeros(2, 4, 3, 8, dtype=bool)}, KIND, f"query: {DTYPE}, got dtype bool"),
    ({"query": zeros(2, 4, 3, 8, dtype=">f4")}, KIND,
     f"query: {DTYPE}, got dtype >f4; query.astype(np.float32) casts"),
    ({"query": zeros(2, 4, 3, 8, dtype=np.longdouble)}, KIND,
     f"query: {DTYPE}, got dtype {np.dtype(np.longdouble)}; query.astype(np.float64) casts"),
    ({"query": zeros(2, 4, 3, 8, dtype=ml_dtypes.float8_e4m3fn)}, KIND, f"query: {DTYPE}, got dtype float8_e4m3fn"),
    ({"query": zeros(2, 4, 3, 8, dtype=SWAPPED_BFLOAT16)}, KIND, f"query: {DTYPE}, got dtype {SWAPPED_BFLOAT16}"),
    ({"query": [["a"]]}, KIND, f"query: {DTYPE}, got dtype <U1; tokens are looked up in an embedding first"),
    ({"key": ["I", "love"]}, KIND, f"key: {DTYPE}, got dtype <U4; tokens are looked up in an embedding first"),
    ({"key": zeros(2, 2, 5, 8, dtype=int)}, KIND, f"key: {DTYPE}, got dtype int64; key.astype(np.float32) casts"),
    ({"key": zeros(2, 2, 5, 8, dtype=">f2")}, KIND, f"key: {DTYPE}, got dtype >f2; key.astype(np.float32) casts"),
    ({"value": zeros(2, 2, 5, 6, dtype=np.int8)}, KIND,
     "value: expected the dtype of key, float32, got int8; value.astype(key.dtype) casts"),
    ({"value": zeros(2, 2, 5, 6, dtype=complex)}, KIND, "value: expected the dtype of key, float32, got complex128"),
    ({"value": zeros(2, 2, 5, 6).tolist()}, KIND,
     "value: expected the dtype of key, float32, got float64; np.asarray(value, key.dtype) casts"),
    ({"value": zeros(2, 2, 5, 6, dtype=F64)}, KIND,
     "value: expected the dtype of key, float32, got float64; value.astype(key.dtype) casts"),
    ({"key": zeros(2, 2, 5, 8, dtype=np.float16)}, KIND,
     "value: expected the dtype of key, float16, got float32; key.astype(query.dtype) casts"),
    ({"key": zeros(2, 2, 5, 8, dtype=F64).tolist()}, KIND,
     "value: expected the dtype of key, float64, got float32; np.asarray(key, query.dtype) casts"),
    ({"key": zeros(2, 2, 5, 8).tolist(), "value": zeros(2, 2, 5, 6, dtype=F64)}, KIND,
     "key: expected dtype float32, as query has (or a 16-bit one under a float32 query), got float64; "
     "np.asarray(key, query.dtype) casts"),
    *(
        ({"query": zeros(2, 4, 3, 8, dtype=q), "key": zeros(2, 2, 5, 8, dtype=k), "value": zeros(2, 2, 5, 6, dtype=k)},
         KIND, f"key: expected dtype {np.dtype(q)}, as query has (or a 16-bit one under a float32 query), "
               f"got {np.dtype(k)}; key.astype(query.dtype) casts")
        for q, k in [(F64, F32), (F32, F64), (np.float16, F32), (F64, np.float16), (np.float16, ml_dtypes.bfloat16),
                      (ml_dtypes.bfloat16, np.float16), (ml_dtypes.bfloat16, F32)]
    ),

    # Number of axes.
    ({"query": zeros(8)}, SHAPE,
     "query: expected 2 axes (seq_len_q, head_dim) or more, got shape (8,); for one query: np.atleast_2d(query)"),
    ({"query": zeros(0)}, SHAPE, "query: expected 2 axes (seq_len_q, head_dim) or more, got shape (0,)"),
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
     "key: expected a num_kv_heads that divides query's 4 heads, got shape (2, 3, 5, 8); "
     "axes are (batch, heads, seq, head_dim)"),
    ({"key": zeros(2, 8, 5, 8)}, SHAPE,
     "key: expected a num_kv_heads that divides query's 4 heads, got shape (2, 8, 5, 8); "
     "axes are (batch, heads, seq, head_dim)"),
    ({"key": zeros(2, 0, 5, 8)}, SHAPE,
     "key: expected a num_kv_heads that divides query's 4 heads, got shape (2, 0, 5, 8); "
     "axes are (batch, heads, seq, head_dim)"),
    ({"query": zeros(2, 7, 4, 8), "key": zeros(2, 9, 4, 8), "value": zeros(2, 9, 4, 6)}, SHAPE,
     "key: expected a num_kv_heads that divides query's 7 heads, got shape (2, 9, 4, 8); axes are (batch, heads, seq, "
     "head_dim), for arrays (batch, seq, heads, head_dim) pass x.swapaxes(-3, -2) of each"),
    ({"query": zeros(4, 3, 8), "key": zeros(2, 5, 8), "value": zeros(2, 5, 6)}, SHAPE,
     "key: expected (4, seq_len_kv, 8), got shape (2, 5, 8); 3 axes are (batch, seq, head_dim); for heads pass 4, "
     "x[None] of each"),
    ({"key": zeros(2, 2, 8, 5)}, SHAPE,
     "key: expected (2, num_kv_heads, seq_len_kv, 8), got shape (2, 2, 8, 5); keys come untransposed: "
     "key.swapaxes(-1, -2)"),
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
     f"query: expected a result that fits in memory, got rows {(2**30,)} of {2**32}"),
    ({"query": np.zeros((9000, 1), np.float16), "key": giant(2**60, 1, dtype=np.float16),
      "value": giant(2**60, 1, dtype=np.float16)}, SHAPE,
     f"value: expected at most {2**48} numbers, and key and value broadcast to () that fit an index, "
     f"got shape ({2**60}, 1)"),
    ({"query": zeros(2**13, 1, 1, 1), "key": giant(1, 1, 2**48, 1), "value": giant(1, 1, 2**48, 1)}, SHAPE,
     f"value: expected at most {2**48} numbers, and key and value broadcast to (8192,) that fit an index, "
     f"got shape (1, 1, {2**48}, 1)"),

    # Mask.
    ({"attn_mask": zeros(3, 5, dtype=int)}, KIND,
     "attn_mask: expected bool (True = attend) or a float dtype (added), got int64; "
     "for 1 = attend: attn_mask.astype(bool)"),
    ({"attn_mask": [[1, 1, 1, 1, 0]]}, KIND, "attn_mask: expected bool (True = attend) or a float dtype (added), "
     "got int64; for 1 = attend: np.asarray(attn_mask, bool)"),
    ({"attn_mask": zeros(3, 5, dtype=np.uint8)}, KIND,
     "attn_mask: expected bool (True = attend) or a float dtype (added), got uint8; "
     "for 1 = attend: attn_mask.astype(bool)"),
    ({"attn_mask": zeros(3, 5, dtype=">f4")}, KIND,
     "attn_mask: expected bool (True = attend) or a float dtype (added), got >f4; attn_mask.astype(np.float32) casts"),
    ({"attn_mask": zeros(3, 5, dtype=SWAPPED_BFLOAT16)}, KIND,
     f"attn_mask: expected bool (True = attend) or a float dtype (added), got {SWAPPED_BFLOAT16}"),
    ({"attn_mask": True}, KIND, "attn_mask: expected an array, got True; for the causal mask: is_causal=True"),
    ({"attn_mask": False}, KIND, "attn_mask: expected an array, got False; for the causal mask: is_causal=False"),
    ({"attn_mask": "causal"}, KIND, "attn_mask: expected bool (True = attend) or a float dtype (added), got <U6"),
    ({"attn_mask": zeros(3, 6)}, SHAPE,
     "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), got shape (3, 6)"),
    ({"attn_mask": zeros(2, 3, 5)}, SHAPE,
     "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), got shape (2, 3, 5); "
     "for one mask per batch row: mask[:, None]"),
    ({"attn_mask": zeros(8, 3, 5)}, SHAPE, "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), "
     "got shape (8, 3, 5); for one mask per batch row and head: mask.reshape(2, 4, 3, 5)"),
    ({"attn_mask": zeros(2, 5, dtype=bool)}, SHAPE, "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), "
     "got shape (2, 5); for a padding mask: mask[:, None, None, :], or kv_lens"),
    ({"query": zeros(2, 3, 8), "key": zeros(2, 5, 8), "value": zeros(2, 5, 6), "attn_mask": zeros(2, 5, dtype=bool)},
     SHAPE, "attn_mask: expected a shape that broadcasts to (2, 3, 5), got shape (2, 5); for a padding mask: "
     "mask[:, None, :], or kv_lens"),
    ({"query": zeros(3, 2, 4, 3, 8), "attn_mask": zeros(3, 2, 5, dtype=bool)},
     SHAPE, "attn_mask: expected a shape that broadcasts to (3, 2, 4, 3, 5), got shape (3, 2, 5); for a padding mask: "
     "mask[:, :, None, None, :], or kv_lens"),
    ({"attn_mask": zeros(1, 2, 4, 3, 5)}, SHAPE,
     "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), got shape (1, 2, 4, 3, 5)"),
    ({"attn_mask": zeros(0, 5, dtype=bool)}, SHAPE,
     "attn_mask: expected a shape that broadcasts to (2, 4, 3, 5), got shape (0, 5)"),

    # Numbers.
    *(({"scale": number}, ValueError, f"scale: expected 0 or a number from -8.51e+37 to 8.51e+37, got {number}")
      for number in (math.nan, math.inf, -math.inf, 10**100, 9e37, -9e37)),
    ({"scale": 10**400}, ValueError,
     f"scale: expected 0 or a number from -8.51e+37 to 8.51e+37, got 1{'0' * 199}..."),
    ({"scale": 10**5000}, ValueError,
     "scale: expected 0 or a number from -8.51e+37 to 8.51e+37, got an int of 16610 bits"),
    ({"seed": 10**5000}, ValueError, "seed: expected an int below 2**64, got an int of 16610 bits"),
    ({"dropout_p": 10**5000}, ValueError, "dropout_p: expected a float in [0, 1), got an int of 16610 bits"),
    ({"scale": "1"}, KIND, "scale: expected a number, got '1'"),
    ({"scale": 1j}, KIND, "scale: expected a number, got 1j"),
    ({"scale": np.ones(1)}, KIND, "scale: expected a number, got array([1.]); scale.item() is one"),
    ({"softcap": np.array(50)}, KIND, "softcap: expected a number, got array(50); softcap.item() is one"),
    ({"scale": np.ones(4)}, KIND, "scale: expected a number, got array([1., 1., 1., 1.]); for one per head multiply "
     "query by it and pass scale=1"),
    ({"scale": [1.0]}, KIND, "scale: expected a number, got [1.0]"),
    *(({"softcap": number}, ValueError, f"softcap: expected 0 or a number from 1.18e-38 to 8.51e+37, got {number}")
      for number in (math.nan, math.inf, -1.0, 9e37, 1e-38)),
    *(({"query": zeros(2, 4, 3, 8, dtype=F64), "key": zeros(2, 2, 5, 8, dtype=F64), "out": None, name: number,
        "value": zeros(2, 2, 5, 6, dtype=F64)}, ValueError,
       f"{name}: expected 0 or a number from {least} to 4.49e+307, got {number}")
      for name, number, least in [("softcap", 1e-308, "2.23e-308"), ("softcap", 5e307, "2.23e-308"),
                                  ("scale", 5e307, "-4.49e+307")]),
    ({"softcap": np.ones(2)}, KIND, "softcap: expected a number, got array([1., 1.])"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a float in [0, 1), got 1.0"),
    ({"dropout_p": Fraction(10**20 - 1, 10**20)}, ValueError,
     f"dropout_p: expected a float in [0, 1), got {10**20 - 1}/{10**20}"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a float in [0, 1), got -0.1"),
    ({"dropout_p": math.nan}, ValueError, "dropout_p: expected a float in [0, 1), got nan"),
    ({"dropout_p": None}, KIND, "dropout_p: expected a float in [0, 1), got None; 0.0 is off"),
    ({"dropout_p": 1}, ValueError, "dropout_p: expected a float in [0, 1), got 1"),
    ({"dropout_p": np.ones(2)}, KIND, "dropout_p: expected a float in [0, 1), got array([1., 1.])"),
    ({"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
    ({"seed": 2**64, "dropout_p": 0.5}, ValueError, f"seed: expected an int below 2**64, got {2**64}"),
    ({"seed": np.random.default_rng(0), "dropout_p": 0.5}, KIND,
     "seed: expected an int, got a Generator; int(seed.integers(2**63)) draws one"),
    ({"seed": 1.0, "dropout_p": 0.5}, KIND, "seed: expected an int, got 1.0"),
    ({"num_threads": 0}, ValueError, "num_threads: expected 1 to 2147483647, got 0; None takes the default"),
    ({"num_threads": -2}, ValueError, "num_threads: expected 1 to 2147483647, got -2; None takes the default"),
    ({"num_threads": 2**31}, ValueError, "num_threads: expected 1 to 2147483647, got 2147483648"),
    ({"num_threads": 1.5}, KIND, "num_threads: expected an integer, got float"),
    ({"num_threads": "2"}, KIND, "num_threads: expected an integer, got str"),

    # Window, positions, lengths.
    ({"window": True}, ValueError, "window: expected None or (left, right), got True"),
    ({"window": 3}, ValueError,
     "window: expected None or (left, right), got 3; for that many keys on each side: (3, 3)"),
    ({"window": np.int64(3)}, ValueError,
     "window: expected None or (left, right), got 3; for that many keys on each side: (3, 3)"),
    ({"window": np.array(3)}, ValueError, "window: expected None or (left, right), got array(3)"),
    ({"window": 3.0}, ValueError, "window: expected None or (left, right), got 3.0"),
    ({"window": (1, 2, 3)}, ValueError, "window: expected None or (left, right), got (1, 2, 3)"),
    ({"window": ()}, ValueError, "window: expected None or (left, right), got ()"),
    ({"window": "12"}, ValueError, "window: expected None or (left, right), got '12'"),
    ({"window": np.array([1, 2, 3])}, ValueError, "window: expected None or (left, right), got array([1, 2, 3])"),
    ({"window": np.array([[1, 2]])}, ValueError, "window: expected None or (left, right), got array([[1, 2]])"),
    ({"window": np.array([1.0, 2.0])}, KIND, "window: expected an int, got 1.0"),
    ({"window": np.array([True, False])}, KIND, f"window: expected an int, got {np.True_!r}"),
    ({"window": np.ma.masked_array([1, 2], [0, 1])}, KIND,
     "window: expected a plain array, got a masked array, whose mask would be ignored; use .filled(...)"),
    ({"window": (1.0, 2)}, KIND, "window: expected an int, got 1.0"),
    ({"window": (1, "2")}, KIND, "window: expected an int, got '2'"),
    ({"window": (-2, 0)}, ValueError,
     "window: expected keys to the left and right >= 0, or -1 or None for all, got (-2, 0)"),
    ({"window": (None, -5)}, ValueError,
     "window: expected keys to the left and right >= 0, or -1 or None for all, got (None, -5)"),
    ({"q_offset": 1.0}, KIND, "q_offset: expected integers, got dtype float64; np.asarray(q_offset, int) casts"),
    ({"q_offset": "0"}, ValueError, "q_offset: expected an int, an int array or \"end\", got '0'"),
    ({"q_offset": ["0"]}, KIND, "q_offset: expected integers, got dtype <U1"),
    ({"q_offset": True}, KIND, "q_offset: expected integers, got dtype bool"),
    ({"q_offset": [0, 1, 2]}, ValueError,
     "q_offset: expected an int, or shape (2,), one per batch row, got shape (3,)"),
    ({"q_offset": [[0, 1]]}, ValueError,
     "q_offset: expected an int, or shape (2,), one per batch row, got shape (1, 2)"),
    ({"kv_lens": [3]}, ValueError, "kv_lens: expected an int, or shape (2,), one per batch row, got shape (1,)"),
    ({"query": zeros(3, 8), "key": zeros(5, 8), "value": zeros(5, 6), "out": None, "kv_lens": [3]}, ValueError,
     "kv_lens: expected an int, got shape (1,)"),
    ({"kv_lens": [3.0, 4.0]}, KIND, "kv_lens: expected integers, got dtype float64; np.asarray(kv_lens, int) casts"),
    ({"kv_lens": np.array([3.0, 4.0])}, KIND,
     "kv_lens: expected integers, got dtype float64; kv_lens.astype(int) casts"),
    ({"kv_lens": 3.0}, KIND, "kv_lens: expected integers, got dtype float64; np.asarray(kv_lens, int) casts"),
    ({"kv_lens": True}, KIND,
     "kv_lens: expected integers, got dtype bool; of a right-padded mask they are mask.sum(-1)"),
    ({"kv_lens": [True, False]}, KIND,
     "kv_lens: expected integers, got dtype bool; of a right-padded mask they are mask.sum(-1)"),
    ({"kv_lens": 6}, ValueError, "kv_lens: expected lengths from 0 to seq_len_kv = 5, got 6"),
    ({"kv_lens": np.int8(-1)}, ValueError, "kv_lens: expected lengths from 0 to seq_len_kv = 5, got -1"),
    ({"kv_lens": 2**70}, ValueError, f"kv_lens: expected lengths from 0 to seq_len_kv = 5, got {2**70}"),
    ({"kv_lens": [3, 6]}, ValueError, "kv_lens: expected lengths from 0 to seq_len_kv = 5, got [3, 6]"),
    ({"kv_lens": [-1, 5]}, ValueError, "kv_lens: expected lengths from 0 to seq_len_kv = 5, got [-1, 5]"),

    # Vectors of the heads.
    ({"alibi_slopes": zeros(3)}, ValueError, "alibi_slopes: expected shape (4,) or (2, 4), got shape (3,)"),
    ({"alibi_slopes": 0.5}, ValueError, "alibi_slopes: expected shape (4,) or (2, 4), got shape ()"),
    ({"alibi_slopes": zeros(1, 4)}, ValueError, "alibi_slopes: expected shape (4,) or (2, 4), got shape (1, 4)"),
    ({"alibi_slopes": zeros(4, dtype=complex)}, KIND,
     "alibi_slopes: expected a float or int array, got dtype complex128"),
    ({"alibi_slopes": zeros(4, dtype=bool)}, KIND, "alibi_slopes: expected a float or int array, got dtype bool"),
    ({"sinks": zeros(4, dtype=SWAPPED_BFLOAT16)}, KIND,
     f"sinks: expected a float or int array, got dtype {SWAPPED_BFLOAT16}"),
    ({"sinks": zeros(2)}, ValueError, "sinks: expected shape (4,), got shape (2,)"),
    ({"sinks": zeros(2, 4)}, ValueError, "sinks: expected shape (4,), got shape (2, 4)"),
    ({"sinks": zeros(4, dtype=object)}, KIND, "sinks: expected a float or int array, got dtype object"),

    # out.
    ({"out": [1.0]}, KIND, "out: expected a numpy.ndarray, got list"),
    ({"out": zeros(2, 4, 3, 6, dtype=F64)}, KIND,
     "out: expected dtype float32, got float64; out[...] = result casts"),
    ({"out": zeros(2, 4, 3, 6, dtype=">f4")}, KIND,
     "out: expected dtype float32, got >f4; out[...] = result casts"),
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


@pytest.fixture
def no_kernels(monkeypatch):
    """A call that entered one would end in an AttributeError."""
    monkeypatch.setattr(cattn._kernels, "f32", SimpleNamespace())
    monkeypatch.setattr(cattn._kernels, "f64", SimpleNamespace)


@pytest.mark.parametrize(("changes", "error", "message"), [
    case for case in BAD_CALLS if "return_weights" not in case[0] and not case[2].startswith("out: ")
], ids=lambda case: case[:60] if isinstance(case, str) else "")
def test_bad_call_of_gradients(no_kernels, changes, error, message):
    """The forward's, word for word."""
    with pytest.raises((ValueError, TypeError)) as raised:
        differentiate(**{name: value for name, value in changes.items() if name != "out"})
    assert raised.type is error
    assert str(raised.value) == message


NAMES = "query, key, value, attn_mask, alibi_slopes, sinks"
BAD_GRADIENTS = [  # (of 2 batch rows or of 3 sequences, what is wrong, the error, its text)
    (differentiate, {"grad_out": zeros(2, 4, 3, 6, dtype=F64)}, KIND,
     "grad_out: expected the dtype of query, float32, got float64; grad_out.astype(query.dtype) casts"),
    (differentiate, {"grad_out": zeros(2, 4, 3, 6).tolist()}, KIND,
     "grad_out: expected the dtype of query, float32, got float64; np.asarray(grad_out, query.dtype) casts"),
    (differentiate, {"grad_out": "text"}, KIND, "grad_out: expected the dtype of query, float32, got <U4"),
    (differentiate, {"grad_out": None}, KIND, "grad_out: expected an array, got None"),
    (differentiate, {"grad_out": zeros(4, 3, 6)}, SHAPE,
     "grad_out: expected shape (2, 4, 3, 6), got shape (4, 3, 6)"),
    (differentiate, {"grad_out": zeros(2, 4, 3, 8)}, SHAPE,
     "grad_out: expected shape (2, 4, 3, 6), got shape (2, 4, 3, 8)"),
    (differentiate, {"out": zeros(2, 4, 3, 6, dtype=np.float16)}, KIND,
     "out: expected the dtype of query, float32, got float16; out.astype(query.dtype) casts"),
    (differentiate, {"out": zeros(2, 4, 3, 6, dtype=">f4")}, KIND,
     "out: expected the dtype of query, float32, got >f4; out.astype(query.dtype) casts"),
    (differentiate, {"out": None}, KIND, "out: expected an array, got None"),
    (differentiate, {"out": zeros(1, 4, 3, 6)}, SHAPE, "out: expected shape (2, 4, 3, 6), got shape (1, 4, 3, 6)"),
    (differentiate, {"logsumexp": zeros(2, 4, 3, dtype=F64)}, KIND,
     "logsumexp: expected the dtype computed in, float32, got float64; logsumexp.astype(np.float32) casts"),
    (differentiate, {"logsumexp": zeros(2, 4, 3, dtype=bool)}, KIND,
     "logsumexp: expected the dtype computed in, float32, got bool"),
    (differentiate, {"logsumexp": None}, KIND, "logsumexp: expected an array, got None"),
    (differentiate, {"logsumexp": zeros(2, 4, 3, 1)}, SHAPE,
     "logsumexp: expected shape (2, 4, 3), got shape (2, 4, 3, 1)"),
    (differentiate, {"grad_logsumexp": zeros(2, 4, 3, dtype=np.float16)}, KIND,
     "grad_logsumexp: expected the dtype computed in, float32, got float16; grad_logsumexp.astype(np.float32) casts"),
    (differentiate, {"grad_logsumexp": zeros(3)}, SHAPE, "grad_logsumexp: expected shape (2, 4, 3), got shape (3,)"),
    *((differentiate, {"wanted": wanted}, KIND, f"wanted: expected a collection of names, got {text}")
      for wanted, text in [("query", "'query'; wanted=('query',) wants one"), ("all", "'all'"), (None, "None"),
                           (3, "3"), ([["query"]], "[['query']]")]),
    *((differentiate, {"wanted": wanted}, ValueError, f"wanted: expected names out of {NAMES}, got {text}")
      for wanted, text in [(["query", "values"], "'values'"), ({"grad_out"}, "'grad_out'"), (b"key", "101"),
                           ([None], "None")]),
    *((call, {"dropout_p": 0.5}, ValueError,
       "seed: expected the seed that the forward call had, with dropout_p = 0.5, got None; draw one for both")
      for call in (differentiate, differentiate_packed)),
    (differentiate_packed, {"grad_out": zeros(1, 6, 4, 3)}, SHAPE,
     "grad_out: expected shape (6, 4, 3), got shape (1, 6, 4, 3)"),
    (differentiate_packed, {"out": zeros(6, 4, 3, dtype=F64)}, KIND,
     "out: expected the dtype of query, float32, got float64; out.astype(query.dtype) casts"),
    (differentiate_packed, {"logsumexp": zeros(4, 6)}, SHAPE, "logsumexp: expected shape (6, 4), got shape (4, 6)"),
    (differentiate_packed, {"grad_logsumexp": zeros(6, 4, dtype=F64)}, KIND,
     "grad_logsumexp: expected the dtype computed in, float32, got float64; grad_logsumexp.astype(np.float32) casts"),
    (differentiate_packed, {"wanted": "key"}, KIND,
     "wanted: expected a collection of names, got 'key'; wanted=('key',) wants one"),
    (differentiate_packed, {"wanted": ["out"]}, ValueError, f"wanted: expected names out of {NAMES}, got 'out'"),
    (differentiate_packed, {"query": zeros(6, 8)}, SHAPE,
     "query: expected (total_q, num_heads, head_dim), got shape (6, 8)"),
    (differentiate_packed, {"key": zeros(9, 2, 8, dtype=F64)}, KIND,
     "value: expected the dtype of key, float64, got float32; key.astype(query.dtype) casts"),
    (differentiate_packed, {"value": zeros(8, 2, 3)}, SHAPE,
     "value: expected (9, 2, head_dim_v), got shape (8, 2, 3)"),
    (differentiate_packed, {"cu_seqlens_q": [0, 3, 2, 6]}, ValueError,
     "cu_seqlens_q: expected numbers that never decrease, got 3 before 2"),
    (differentiate_packed, {"cu_seqlens_kv": [0, 9]}, ValueError,
     "cu_seqlens_kv: expected 4 numbers, one more than there are sequences, got 2"),
    (differentiate_packed, {"is_causal": 1}, KIND, "is_causal: expected a bool, got 1"),
    (differentiate_packed, {"q_offset": "start"}, ValueError,
     "q_offset: expected an int, an int array or \"end\", got 'start'"),
    (differentiate_packed, {"scale": math.nan}, ValueError,
     "scale: expected 0 or a number from -8.51e+37 to 8.51e+37, got nan"),
    (differentiate_packed, {"window": 3}, ValueError,
     "window: expected None or (left, right), got 3; for that many keys on each side: (3, 3)"),
    (differentiate_packed, {"softcap": -1.0}, ValueError,
     "softcap: expected 0 or a number from 1.18e-38 to 8.51e+37, got -1.0"),
    (differentiate_packed, {"alibi_slopes": zeros(3)}, ValueError,
     "alibi_slopes: expected shape (4,) or (3, 4), got shape (3,)"),
    (differentiate_packed, {"sinks": zeros(3, 4)}, ValueError, "sinks: expected shape (4,), got shape (3, 4)"),
    (differentiate_packed, {"dropout_p": 1.0}, ValueError, "dropout_p: expected a float in [0, 1), got 1.0"),
    (differentiate_packed, {"seed": -1}, ValueError, "seed: expected an int >= 0, got -1"),
    (differentiate_packed, {"num_threads": 0}, ValueError,
     "num_threads: expected 1 to 2147483647, got 0; None takes the default"),
]


@pytest.mark.parametrize(("call", "changes", "error", "message"), BAD_GRADIENTS,
                         ids=[case[3][:60] for case in BAD_GRADIENTS])
def test_bad_gradients(no_kernels, call, changes, error, message):
    with pytest.raises((ValueError, TypeError)) as raised:
        call(**changes)
    assert raised.type is error
    assert str(raised.value) == message


def test_good_gradients():
    """What the cases above differ from, other forms of it, and what is cast as their messages say."""
    rng = np.random.default_rng(0)
    grad_out, logsumexp = rng.standard_normal((2, 4, 3, 6)), rng.standard_normal((2, 4, 3))
    given = {"grad_out": grad_out.astype(F32), "logsumexp": logsumexp.astype(F32)}
    expected = differentiate(**given)
    assert expected.value.any() and expected.attn_mask is None
    for wanted in (["value"], {"value": 0}, (name for name in ("value", "value"))):
        found = differentiate(**given, wanted=wanted)
        np.testing.assert_array_equal(found.value, expected.value)
        assert found.query is None
    assert differentiate(wanted=()) == (None,) * 6
    cured = {"grad_out": np.asarray(grad_out.tolist(), given["grad_out"].dtype), "logsumexp": np.float32(logsumexp)}
    np.testing.assert_array_equal(differentiate(**cured).value, expected.value)
    assert not differentiate_packed().query.any()


OF_GRADIENTS = "grad_out", "query", "key", "value", "out", "logsumexp", "grad_logsumexp", "alibi_slopes", "sinks"


@pytest.mark.parametrize("call", [differentiate, differentiate_packed])
@pytest.mark.parametrize("which", OF_GRADIENTS)
def test_gradients_of_what_makes_no_array(call, which):
    for given, error, text in (
            ([[1.0], [2.0, 3.0]], ValueError, "an array, got a list that makes none: "),
            (Raises(RuntimeError("no")), TypeError, "an array, got a Raises that makes none: no"),
            ({"a": 1}, TypeError, "an array, got a dict, which NumPy does not read as one"),
            (Tensor(requires_grad=True), TypeError, "an array, got a torch tensor that requires grad; pass its .det"),
            (np.ma.masked_array(zeros(4), True), TypeError, "a plain array, got a masked array, whose mask would")):
        with pytest.raises(error, match=f"^{which}: expected {text}"):
            call(**{which: given})


def test_cures():
    """What the messages above name is taken, and means what they say."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(shape).astype(F32) for shape in ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)))
    attention, expected = cattn.scaled_dot_product_attention, call(query, key, value)
    same = np.testing.assert_array_equal

    def close(result, other):  # where another number of heads comes, and so another order of sums
        np.testing.assert_allclose(result, other, rtol=1e-5, atol=1e-6)

    mask = np.arange(5) < np.array([[2], [4]])
    padded = call(query, key, value, kv_lens=mask.sum(-1))
    same(call(query, key, value, attn_mask=mask[:, None, None, :]), padded)
    same(call(query, key, value, attn_mask=mask.astype(int)[:, None, None, :].astype(bool)), padded)
    close(attention(query[:, 0], key[:, 0], value[:, 0], mask[:, None, :]), padded[:, 0])
    same(attention(query[None], key[None], value[None], mask[None][:, :, None, None, :]), padded[None])
    of_rows = np.broadcast_to(mask[:, None], (2, 3, 5))
    same(call(query, key, value, attn_mask=of_rows[:, None]), padded)
    same(call(query, key, value, attn_mask=np.repeat(of_rows, 4, axis=0).reshape(2, 4, 3, 5)), padded)

    swapped = [x.swapaxes(1, 2).copy() for x in (query, key, value)]  # (batch, seq, heads, head_dim)
    same(call(*(x.swapaxes(-3, -2) for x in swapped)), expected)
    same(call(query, key.swapaxes(-1, -2).copy().swapaxes(-1, -2), value), expected)
    same(attention(*(x[0][None] for x in (query, key, value)))[0], expected[0])
    close(attention(np.atleast_2d(query[0, 0, 0]), key[0, 0], value[0, 0]), expected[0, 0, :1])
    same(call(query, key.astype(F64).astype(query.dtype), np.asarray(value.tolist(), key.dtype)), expected)
    scales = np.array([0.5, 1, 2, 4], F32)
    for head, scale in enumerate(scales.tolist()):
        same(call(query * scales[:, None, None], key, value, scale=1)[:, head],
             call(query, key, value, scale=scale)[:, head])
    same(call(query, key, value, window=(1, 1)), call(query, key, value, window=[1, 1]))
    out = np.zeros((2, 4, 3, 6))
    out[...] = expected
    same(out, expected)
    call(query, key, value, dropout_p=0.5, seed=int(rng.integers(2**63)))


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
    """Whether two strided arrays overlap, or two elements of one, is an integer problem; numpy gives up after a number
    of steps."""
    def give_up(*args, **kwargs):
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", give_up)
    pairs = zeros(2, 4, 3, 16)
    with pytest.raises(ValueError, match=r"^out: expected memory of its own, or strides of which that can be seen in "
                                         r"1000000 steps, got an array that may overlap query$"):
        call(query=pairs[..., ::2], out=pairs[..., 1:13:2])
    with pytest.raises(ValueError, match=r"^out: expected elements that do not overlap each other, or strides of which "
                                         r"that can be seen in 1000000 steps, got strides \(24, 16\)$"):
        cattn.scaled_dot_product_attention(*[np.ones((2, 3))] * 3, out=interleaved())


class Window:
    """As a torch tensor."""

    def __array__(self, dtype=None, copy=None):
        return np.array([1, 0])

    def __iter__(self):
        return iter([1, 0])


OTHER_FORMS = {  # (one way to say it, the plain one)
    "an int as kv_lens": ({"kv_lens": 3}, {"kv_lens": [3, 3]}),
    "numpy's int as kv_lens": ({"kv_lens": np.uint8(3)}, {"kv_lens": [3, 3]}),
    "an array of no axes as kv_lens": ({"kv_lens": np.array(3)}, {"kv_lens": [3, 3]}),
    "0 as kv_lens": ({"kv_lens": 0}, {"kv_lens": [0, 0]}),
    "softcap of None": ({"softcap": None}, {}),
    "softcap of None, the long way": ({"softcap": None, "kv_lens": [3, 4]}, {"kv_lens": [3, 4]}),
    "window as a list": ({"window": [1, None]}, {"window": (1, None)}),
    "window as an array": ({"window": np.array([1, 0])}, {"window": (1, 0)}),
    "window as an unsigned array": ({"window": np.array([1, 0], np.uint64)}, {"window": (1, 0)}),
    "window as an array with -1": ({"window": np.array([-1, 0], np.int8)}, {"window": (None, 0)}),
    "window as what makes an array": ({"window": Window()}, {"window": (1, 0)}),
    "window as an array with None": ({"window": np.array([1, None])}, {"window": (1, None)}),
}


@pytest.mark.parametrize("which", OTHER_FORMS)
@pytest.mark.parametrize("library", [cattn, reference], ids=["public", "reference"])
def test_other_forms_of_an_option(which, library):
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(shape) for shape in ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)))
    given, plain = OTHER_FORMS[which]
    result = library.scaled_dot_product_attention(query, key, value, **given)
    np.testing.assert_array_equal(result, library.scaled_dot_product_attention(query, key, value, **plain))
    layer, x = library.MultiHeadAttention(8, 2, seed=0, dtype=F64), key[:, 0]
    np.testing.assert_array_equal(layer(x, **given), layer(x, **plain))
    plain = {name: option[:1] if name == "kv_lens" else option for name, option in plain.items()}
    given = {name: option if np.ndim(option) == 0 or name == "window" else option[:1] for name, option in given.items()}
    np.testing.assert_array_equal(layer(x[0], **given), layer(x[0], **plain))


def test_softcap_of_none_takes_the_short_way(monkeypatch):
    entered = []
    kernels = SimpleNamespace(attend_short=lambda *args: entered.append(args) or "what it returns")
    monkeypatch.setattr(cattn._kernels, "f32", kernels)
    assert [call(**options) for options in ({}, {"softcap": 0.0}, {"softcap": None})] == ["what it returns"] * 3
    assert len(entered) == 3


@pytest.mark.parametrize(("shape", "seq_len_kv", "return_weights"), [
    ((2**45, 1, 1, 1), 1, False), ((2**20, 1, 2**20, 1), 2**10, True),
], ids=["out", "weights"])
def test_result_beyond_memory(shape, seq_len_kv, return_weights):
    """It fits an index, so it is for the allocator to refuse."""
    keys = giant(1, 1, seq_len_kv, 1)
    with pytest.raises(MemoryError):
        cattn.scaled_dot_product_attention(giant(*shape), keys, keys, return_weights=return_weights)


def test_failing_call_reads_nothing(monkeypatch):
    """The kernel is not entered; the short way lets no bad call in."""
    entered = []
    attend_short = cattn._kernels.f32.attend_short
    kernels = SimpleNamespace(attend=lambda **options: entered.append(options), attend_short=attend_short)
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


BAD_NUMBERS = {
    "0": (0, ValueError, "num_threads: expected 1 to 2147483647, got 0; None takes the default"),
    "negative": (-1, ValueError, "num_threads: expected 1 to 2147483647, got -1; None takes the default"),
    "beyond int": (2**40, ValueError, f"num_threads: expected 1 to 2147483647, got {2**40}"),
    "float": (2.0, TypeError, "num_threads: expected an integer, got float"),
    "text": ("4", TypeError, "num_threads: expected an integer, got str"),
}


@pytest.mark.parametrize(("num_threads", "error", "message"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_set_num_threads(num_threads, error, message):
    before = cattn.get_num_threads()
    with pytest.raises((ValueError, TypeError)) as raised:
        cattn.set_num_threads(num_threads)
    assert raised.type is error and str(raised.value) == message
    assert cattn.get_num_threads() == before and _threads.source() != "set_num_threads"


# Truth values.


@pytest.mark.parametrize("name", ["is_causal", "enable_gqa", "return_weights", "return_logsumexp"])
@pytest.mark.parametrize("number", ["no", None, 0, 1.0, np.ones(2, bool), np.ones(1, bool), np.array(True), [True]],
                         ids=repr)
@pytest.mark.parametrize("short", [True, False])
def test_truth_values_are_bools(name, number, short):
    with pytest.raises(TypeError) as raised:
        call(**{name: number}, **({} if short else {"softcap": 1.0}))
    assert str(raised.value) == f"{name}: expected a bool, got {number!r}"


def test_truth_values_of_numpy():
    arrays = [np.random.default_rng(i).standard_normal((1, 2, 5, 4)).astype(F32) for i in range(3)]
    attention = cattn.scaled_dot_product_attention
    np.testing.assert_array_equal(attention(*arrays, is_causal=np.True_), attention(*arrays, is_causal=True))
    np.testing.assert_array_equal(attention(*arrays, is_causal=np.False_, enable_gqa=np.True_), attention(*arrays))
    assert len(attention(*arrays, return_weights=np.True_, return_logsumexp=np.True_)) == 3


# What makes no array, and masked arrays.

ARRAYS = {"query": zeros(2, 4, 3, 8), "key": zeros(2, 2, 5, 8), "value": zeros(2, 2, 5, 6), "attn_mask": zeros(3, 5),
          "q_offset": np.array([1, 2]), "kv_lens": np.array([3, 4]), "alibi_slopes": zeros(4), "sinks": zeros(4)}


class Raises:
    """As a torch tensor that requires grad does, or one on a GPU."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


class Makes(Raises):
    """As a variable of a netCDF file does."""

    def __array__(self, dtype=None, copy=None):
        return self.error


@pytest.mark.parametrize("which", ARRAYS)
@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, NotImplementedError, ZeroDivisionError, OSError])
def test_what_makes_no_array_is_named(which, error):
    cause = error("Can't call numpy() on Tensor that requires grad.")
    out = np.full((2, 4, 3, 6), 7, F32)
    with pytest.raises(TypeError) as raised:
        call(**{which: Raises(cause)}, out=out)
    assert str(raised.value) == f"{which}: expected an array, got a Raises that makes none: {cause}"
    assert raised.value.__cause__ is cause
    assert (out == 7).all()


class Tensor:
    """What a torch tensor says of itself, and how it refuses."""

    __module__ = "torch"
    ndim = 0

    def __init__(self, dtype="float32", device="cpu", requires_grad=False):
        self.dtype, self.device, self.requires_grad = f"torch.{dtype}", device, requires_grad

    def __array__(self, dtype=None, copy=None):
        raise TypeError("torch's words")

    def __repr__(self):
        return "tensor(1.)"


class Parameter(Tensor):
    __module__ = "somebody.layers"


OF_BFLOAT16 = ".view(torch.int16).numpy().view(ml_dtypes.bfloat16)"
TENSORS = {
    "grad": (Tensor(requires_grad=True), "a torch tensor that requires grad; pass its .detach()"),
    "parameter": (Parameter(requires_grad=True), "a torch tensor that requires grad; pass its .detach()"),
    "device": (Tensor(device="cuda:0"), "a torch tensor that is on cuda:0; pass its .cpu()"),
    "bfloat16": (
        Tensor("bfloat16"),
        f"a torch tensor that is bfloat16, which NumPy has not; pass its .float(), or with ml_dtypes {OF_BFLOAT16}",
    ),
    "all three": (
        Tensor("bfloat16", "mps:0", True),
        "a torch tensor that requires grad and is on mps:0 and is bfloat16, which NumPy has not; pass its "
        f".detach().cpu().float(), or with ml_dtypes .detach().cpu(){OF_BFLOAT16}",
    ),
    "float8": (Tensor("float8_e4m3fn"), "a torch tensor that is float8_e4m3fn, which NumPy has not; pass its .float()"),
    "list": ([Tensor(requires_grad=True)], "a list with a torch tensor that requires grad; pass its .detach()"),
    "unreadable": (Tensor(), "a Tensor that makes none: torch's words"),
    "on no device": (Tensor("bfloat16", "meta", True), "a Tensor that makes none: torch's words"),
}


@pytest.mark.parametrize("which", ARRAYS)
@pytest.mark.parametrize(("tensor", "message"), TENSORS.values(), ids=TENSORS)
def test_torch_tensor_that_numpy_does_not_read(which, tensor, message):
    out = np.full((2, 4, 3, 6), 7, F32)
    with pytest.raises(TypeError) as raised:
        call(**{which: tensor}, out=out)
    assert str(raised.value) == f"{which}: expected an array, got {message}"
    assert str(raised.value.__cause__) == "torch's words"
    assert (out == 7).all()


def test_cures_of_torch_tensors():
    """The calls that the messages name, done to real ones."""
    torch = pytest.importorskip("torch")
    numbers = np.random.default_rng(0).standard_normal((2, 4, 3, 8)).astype(ml_dtypes.bfloat16)
    tensor = torch.nn.Parameter(torch.from_numpy(numbers.astype(F32)).bfloat16())
    for given, message in ((tensor, "requires grad and is bfloat16"), (tensor.float(), "requires grad; pass its"),
                           (tensor.detach(), "is bfloat16")):
        with pytest.raises(TypeError, match=f"^query: expected an array, got a torch tensor that {message}"):
            call(query=given)
    with pytest.raises(TypeError, match=r"^query: expected an array, got a Tensor that makes none: "):
        call(query=tensor.detach().to("meta"))
    expected = call(query=numbers.astype(F32))
    np.testing.assert_array_equal(call(query=tensor.detach().float()), expected)
    cured = tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    assert cured.tobytes() == numbers.tobytes()
    out = torch.zeros(2, 4, 3, 6)
    with pytest.raises(TypeError, match=r"^out: expected a numpy.ndarray, got Tensor; its .numpy\(\) shares its mem"):
        call(query=numbers.astype(F32), out=out)
    call(query=numbers.astype(F32), out=out.numpy())
    np.testing.assert_array_equal(out.numpy(), expected)
    with pytest.raises(TypeError, match=r"^scale: expected a number, got tensor\(0.5000\); scale.item\(\) is one$"):
        call(scale=torch.tensor(0.5))


def test_torch_tensors_as_numbers_and_out():
    with pytest.raises(TypeError) as raised:
        call(scale=Tensor())
    assert str(raised.value) == "scale: expected a number, got tensor(1.); scale.item() is one"
    several = Tensor()
    several.ndim = 1
    with pytest.raises(TypeError) as raised:
        call(scale=several)
    assert str(raised.value) == "scale: expected a number, got tensor(1.)"
    with pytest.raises(TypeError) as raised:
        call(out=Tensor())
    assert str(raised.value) == "out: expected a numpy.ndarray, got Tensor; its .numpy() shares its memory"


class Capsule:
    """Memory that DLPack gives away and NumPy's own protocols do not."""

    def __init__(self, array, device):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        if self.device is None:
            raise RuntimeError("no device")
        return self.device, 0


UNREAD = {
    "a dict": ({"a": 1}, "dict", ""),
    "a set": ({1.0}, "set", ""),
    "a generator": ((x for x in [1.0]), "generator", ""),
    "a function": (zeros, "function", ""),
    "DLPack": (Capsule(zeros(2), 1), "Capsule", "; np.from_dlpack(...) of it is one"),
    "DLPack of a GPU": (Capsule(zeros(2), 2), "Capsule", ""),
    "DLPack of no device": (Capsule(zeros(2), None), "Capsule", ""),
}


@pytest.mark.parametrize("which", ARRAYS)
@pytest.mark.parametrize("kind", UNREAD)
def test_what_numpy_does_not_read(which, kind):
    given, name, cure = UNREAD[kind]
    out = np.full((2, 4, 3, 6), 7, F32)
    with pytest.raises(TypeError) as raised:
        call(**{which: given}, out=out)
    assert str(raised.value) == f"{which}: expected an array, got a {name}, which NumPy does not read as one{cure}"
    assert (out == 7).all()


def test_cure_of_dlpack():
    query = np.random.default_rng(0).standard_normal((2, 4, 3, 8)).astype(F32)
    np.testing.assert_array_equal(call(query=np.from_dlpack(Capsule(query, 1))), call(query=query))


OF_NONE = {
    "query": "query: expected an array, got None",
    "key": "key: expected an array, got None; for self-attention pass the same array as all three",
    "value": "value: expected an array, got None; for self-attention pass the same array as all three",
}


@pytest.mark.parametrize(("which", "message"), OF_NONE.items(), ids=OF_NONE)
def test_none(which, message):
    arrays = {name: ARRAYS[name] for name in ("query", "key", "value")} | {which: None}
    with pytest.raises(TypeError) as raised:
        cattn.scaled_dot_product_attention(**arrays)
    assert str(raised.value) == message


@pytest.mark.parametrize("which", ARRAYS)
def test_bad_value_in_what_makes_no_array(which):
    with pytest.raises(ValueError, match=f"^{which}: expected an array, got a Raises that makes none: wrong$"):
        call(**{which: Raises(ValueError("wrong"))})


@pytest.mark.parametrize("which", ARRAYS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_not_about_the_argument_goes_through(which, error):
    error = error("as it is")
    with pytest.raises(type(error)) as raised:
        call(**{which: Raises(error)})
    assert raised.value is error


@pytest.mark.parametrize("which", ARRAYS)
@pytest.mark.parametrize("through", [lambda x: x, Makes], ids=["itself", "through __array__"])
def test_masked_array(which, through):
    out = np.full((2, 4, 3, 6), 7, F32)
    masked = np.ma.masked_array(ARRAYS[which], ARRAYS[which] == 0)
    with pytest.raises(TypeError) as raised:
        call(**{which: through(masked)}, out=out)
    assert str(raised.value) == (f"{which}: expected a plain array, got a masked array, whose mask would be ignored; "
                                 f"use .filled(...)")
    assert (out == 7).all()
    call(**{which: masked.filled()})


def test_masked_array_as_out():
    out = np.ma.masked_array(np.full((2, 4, 3, 6), 7, F32), True)
    with pytest.raises(TypeError) as raised:
        call(out=out)
    assert str(raised.value) == ("out: expected a plain array, got a masked array, whose mask would be ignored; "
                                 "use its .data")
    assert (out.data == 7).all()
    call(out=out.data)
    assert (out.data == 0).all()


def test_masked_arrays_are_known_without_importing_them():
    code = """if True:
        import sys, cattn
        x = [[1.0, 2.0]]
        cattn.scaled_dot_product_attention(x, x, x, [[True]])
        cattn.MultiHeadAttention(2, 1, dtype=float).load_state_dict(cattn.MultiHeadAttention(2, 1).state_dict())
        assert "numpy.ma" not in sys.modules
        """
    done = python(code)
    assert done.returncode == 0, done.stderr


# Arrays that change while a call looks at its arguments: they count as they were when they came.


class Changes:
    """A number that sets the shape of arrays when it is asked for its value."""

    def __init__(self, value, *arrays_and_shapes):
        self.value, self.arrays_and_shapes = value, arrays_and_shapes

    def __index__(self):
        for array, shape in self.arrays_and_shapes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy: shape is not to be set
                array.shape = shape
        return self.value

    def __array__(self, dtype=None, copy=None):
        return np.array(operator.index(self))


@pytest.mark.parametrize("dtype", [F32, F64, np.float16, ml_dtypes.bfloat16])
def test_shapes_set_during_the_checks(dtype):
    def arrays():
        rng = np.random.default_rng(0)
        return {"query": rng.standard_normal((1, 8, 6, 6)).astype(dtype),
                "key": rng.standard_normal((1, 8, 6, 6)).astype(dtype),
                "value": rng.standard_normal((1, 8, 6, 6)).astype(dtype)}

    vectors = {"alibi_slopes": np.ones(8), "attn_mask": np.ones((6, 6), bool)}
    expected = cattn.scaled_dot_product_attention(**arrays(), **vectors)
    for shape in ((8, 1, 6, 6), (288,), (1, 1, 1, 288), (2, 144)):
        changed = arrays()
        changes = Changes(2, *((array, shape) for array in changed.values()))
        result = cattn.scaled_dot_product_attention(**changed, **vectors, seed=changes)
        np.testing.assert_array_equal(result, expected)
        changed = arrays()
        changes = Changes(0, *((array, shape) for array in changed.values()))
        result = cattn.scaled_dot_product_attention(**changed, **vectors, q_offset=changes)
        np.testing.assert_array_equal(result, expected)


# numpy.errstate is the caller's: no number makes a call raise by it.

EXTREME = {  # float64 numbers beyond float32, below its least, and NaN
    "sinks": {"sinks": np.array([1e300, 1e-300, -1e300, np.nan])},
    "alibi_slopes": {"alibi_slopes": np.array([1e300, 1e-300, -1e300, 5e-324])},
    "float64 mask": {"attn_mask": np.array([1e300, 1e-300, -1e300, 5e-324, np.nan])},
    "longdouble sinks": {"sinks": np.array([1e300, 1e-300, -1e300, np.nan], np.longdouble)},
    "signalling NaN": {"attn_mask": np.array([0x7F800001, 0, 0, 0, 0], np.uint32).view(F32)},
    "scale": {"scale": np.longdouble(1) / 3},
    "softcap": {"softcap": np.float64(1.1754944e-38)},
    "dropout": {"dropout_p": 1 - 1e-12, "seed": 1},
    "every way out": {"return_weights": True, "return_logsumexp": True, "dropout_p": 1 - 1e-6, "seed": 3},
}


@pytest.mark.parametrize("dtype", [F32, F64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("options", EXTREME)
def test_errstate_raises_nothing(dtype, options):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6))]
    arrays[0] *= 20
    arrays = [x.astype(dtype) for x in arrays]
    options = {"return_weights": True, **EXTREME[options]}
    with np.errstate(all="ignore"):
        expected = cattn.scaled_dot_product_attention(*arrays, **options)
    for state in ("raise", "warn"):  # a warning is an error here
        with np.errstate(all=state):
            results = cattn.scaled_dot_product_attention(*arrays, **options)
        for result, right in zip(results, expected, strict=True):
            assert result.tobytes() == right.tobytes()


@pytest.mark.parametrize("dtype", [F32, F64, np.float16, ml_dtypes.bfloat16])
def test_errstate_raises_nothing_in_gradients(dtype):
    """Sums over copies, heads and splits have infinities of both signs in them, and numbers beyond the dtype."""
    rng = np.random.default_rng(0)
    query, grad_out = (rng.standard_normal((2, 4, 3, 8)).astype(dtype) for _ in range(2))
    key, value = (rng.standard_normal((1, 2, 700, 8)).astype(dtype) for _ in range(2))
    mask = rng.standard_normal(700).astype(dtype)
    options = {"alibi_slopes": np.ones(4), "sinks": np.ones(4)}
    out, logsumexp = cattn.scaled_dot_product_attention(query, key, value, mask, **options, return_logsumexp=True)
    grad_out[0] = 0.3 * float(ml_dtypes.finfo(dtype).max)
    grad_out[:, :, 0, 0], grad_out[:, :, 1, 1] = [[np.inf], [-np.inf]], -np.inf
    with np.errstate(all="ignore"):
        expected = cattn.scaled_dot_product_attention_backward(
            grad_out, query, key, value, out, logsumexp, mask, **options, wanted=cattn.Gradients._fields)
    assert all(np.isnan(x).any() for x in expected)
    with np.errstate(all="raise"):
        found = cattn.scaled_dot_product_attention_backward(
            grad_out, query, key, value, out, logsumexp, mask, **options, wanted=cattn.Gradients._fields)
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()


OUT_OF_RANGE = {
    "scale of NaN": ({"scale": np.float32(np.nan)}, "scale"),
    "infinite scale": ({"scale": np.longdouble("inf")}, "scale"),
    "softcap of NaN": ({"softcap": np.float16(np.nan)}, "softcap"),
    "dropout_p of NaN": ({"dropout_p": np.float32(np.nan)}, "dropout_p"),
    "infinite dropout_p": ({"dropout_p": np.float16(np.inf)}, "dropout_p"),
    "dropout_p that underflows": ({"dropout_p": np.longdouble("1e-4000")}, None),
}


@pytest.mark.parametrize(("options", "name"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_errstate_and_numbers_out_of_range(options, name):
    with np.errstate(all="raise"):
        if name is None:
            call(**options)
        else:
            with pytest.raises(ValueError, match=f"^{name}: expected "):
                call(**options)


# Memory of `out`.


def brute_force(array):
    """The addresses of all bytes, one for each time that it is part of an element."""
    start = array.__array_interface__["data"][0]
    for stride, length in zip(array.strides, array.shape, strict=True):
        start = np.add.outer(start, stride * np.arange(length))
    return np.add.outer(start, np.arange(array.itemsize)).ravel()


def random_views(rng, memory):
    """Arrays of one shape in one piece of memory, whose axes interleave, in and out of each other: of 2, 3 or 4 axes,
    with the steps of sliced buffers or any others."""
    dtype = rng.choice([F32, F64, np.float16])
    size = np.dtype(dtype).itemsize
    shape = tuple(int(n) for n in rng.integers(1, 5, rng.choice([2, 3, 4])))
    if len(shape) == 4 and rng.random() < 0.5:
        shape = (1, 1, *shape[2:])
    views = []
    for _ in range(2):
        if rng.random() < 0.5:  # a contiguous buffer with longer axes, sliced and transposed
            steps = rng.integers(1, 4, len(shape))
            order = rng.permutation(len(shape))
            strides, stride = [0] * len(shape), size
            for axis in order:
                strides[axis] = stride * int(steps[axis]) * int(rng.choice([-1, 1]))
                stride *= int(steps[axis]) * shape[axis]
        else:
            strides = [int(n) * (size if rng.random() < 0.7 else 1) for n in rng.integers(-12, 13, len(shape))]
        spans = [stride * (n - 1) for stride, n in zip(strides, shape, strict=True)]
        low, high = -sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans) + size
        if low + high > len(memory):
            return None
        start = int(rng.integers(low, min(len(memory) - high, low + 4 * size) + 1))
        views.append(np.ndarray(shape, dtype, memory, start, strides))
    return views


def test_out_is_refused_exactly_where_it_overlaps():
    """Against all addresses, one by one: random views of one piece of memory, in which axes interleave."""
    memory, rng = np.zeros(3000, np.uint8), np.random.default_rng(0)
    taken, refused = 0, {"expected elements that do not overlap each other": 0, "expected memory of its own": 0}
    for _ in range(6000):
        views = random_views(rng, memory)
        if views is None:
            continue
        query, out = views
        plain = np.zeros(query.shape, query.dtype)
        own, others = brute_force(out), brute_force(query)
        itself = len(np.unique(own)) < len(own)
        shares = len(np.intersect1d(own, others)) > 0
        try:
            assert cattn.scaled_dot_product_attention(query, plain, plain, out=out) is out
        except ValueError as error:
            rule = str(error).removeprefix("out: ").split(", got")[0]
            refused[rule] += 1
            assert itself if "elements" in rule else shares and not itself, (error, out.shape, out.strides)
        else:
            assert not (itself or shares), (out.shape, out.strides, query.strides)
            taken += 1
    assert taken > 500 and min(refused.values()) > 500


BUFFERS = {  # out and query take turns in one buffer of this shape
    "columns": ((2, 4, 3, 16), np.s_[..., 0::2], np.s_[..., 1::2]),
    "rows": ((2, 4, 6, 8), np.s_[:, :, 0::2], np.s_[:, :, 1::2]),
    "heads": ((2, 8, 3, 8), np.s_[:, 0::2], np.s_[:, 1::2]),
    "batch rows": ((4, 4, 3, 8), np.s_[0::2], np.s_[1::2]),
    "reversed columns": ((2, 4, 3, 16), np.s_[..., 0::2], np.s_[..., ::-2]),
    "thirds of rows and halves of columns": ((2, 4, 9, 16), np.s_[:, :, 1::3, 0::2], np.s_[:, :, 1::3, 1::2]),
    "halves of large arrays": ((8, 16, 128, 128), np.s_[..., 0::2], np.s_[..., 1::2]),
    "heads of large arrays": ((8, 32, 128, 64), np.s_[:, 0::2], np.s_[:, 1::2]),
}


@pytest.mark.parametrize("which", BUFFERS)
@pytest.mark.parametrize("dtype", [F32, F64, np.float16])
def test_out_and_query_take_turns(which, dtype):
    shape, mine, yours = BUFFERS[which]
    buffer = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    out, query = buffer[mine], buffer[yours]
    before = query.copy()
    expected = cattn.scaled_dot_product_attention(before, before, before)
    assert cattn.scaled_dot_product_attention(query, before, before, out=out) is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(query, before)


def test_out_whose_axes_interleave():
    x = np.random.default_rng(0).standard_normal((2, 3))
    out = interleaved()
    assert cattn.scaled_dot_product_attention(x, x, x, out=out) is out
    np.testing.assert_array_equal(out, cattn.scaled_dot_product_attention(x, x, x))


# Warnings.


def warned(function):
    """(text, file, line) of each warning, with Python's default: once per text and place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        globals().pop("__warningregistry__", None)
        function()
    assert all(warning.category is UserWarning for warning in caught)
    return [(str(warning.message), warning.filename, warning.lineno) for warning in caught]


def tokens(seq_len, axes=(1, 2), dtype=F32):
    return np.ones((*axes, seq_len, 4), dtype)


FIRST_KEYS = ("is_causal with fewer queries than keys and no q_offset: query i sees keys 0 to i; for queries that are "
              "the last tokens pass q_offset=seq_len_kv - seq_len_q, else q_offset=0")
FIRST_KEYS_OF_LENGTHS = ("is_causal with fewer queries than kv_lens and no q_offset: query i sees keys 0 to i; for "
                         "queries that are the last tokens pass q_offset=kv_lens - seq_len_q, else q_offset=0")
CAUSAL_CALLS = {  # (arguments, options, the warning)
    "one query": ((1, 5), {}, FIRST_KEYS),
    "some queries": ((4, 5), {}, FIRST_KEYS),
    "as many": ((5, 5), {}, None),
    "more": ((6, 5), {}, None),
    "no queries": ((0, 5), {}, None),
    "the long way": ((1, 5), {"softcap": 1.0}, FIRST_KEYS),
    "numpy's True": ((1, 5), {"is_causal": np.True_}, FIRST_KEYS),
    "not causal": ((1, 5), {"is_causal": False}, None),
    "offset": ((1, 5), {"q_offset": 4}, None),
    "offset of 0": ((1, 5), {"q_offset": 0}, None),
    "offset of 0, the long way": ((1, 5), {"q_offset": 0, "softcap": 1.0}, None),
    "offsets of 0": ((1, 5), {"q_offset": [0]}, None),
    "numpy's offset": ((1, 5), {"q_offset": np.int64(0)}, None),
    "lengths": ((1, 5), {"kv_lens": [5]}, FIRST_KEYS_OF_LENGTHS),
    "shorter lengths": ((2, 5), {"kv_lens": [3]}, FIRST_KEYS_OF_LENGTHS),
    "a prompt in a longer cache": ((3, 5), {"kv_lens": [3]}, None),
    "lengths and offsets": ((1, 5), {"kv_lens": [5], "q_offset": [4]}, None),
    "more keys than lengths": ((6, 5), {"kv_lens": [5]}, None),
}


@pytest.mark.parametrize("which", CAUSAL_CALLS)
@pytest.mark.parametrize("axes", [(1, 2), (1,)], ids=["heads", "no heads"])
def test_warning_of_causal_with_fewer_queries(which, axes):
    sizes, options, message = CAUSAL_CALLS[which]
    query, key = (tokens(n, axes) for n in sizes)
    options = {"is_causal": True} | options
    caught = warned(lambda: cattn.scaled_dot_product_attention(query, key, key, **options))
    assert [text for text, *_ in caught] == ([message] if message else [])
    assert warned(lambda: reference.scaled_dot_product_attention(query, key, key, **options)) == []


def test_what_is_computed_is_as_with_offset_0():
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 2, 3, 4)), rng.standard_normal((2, 2, 9, 4))
    for arrays in ((query, key, key), [x.astype(F32) for x in (query, key, key)]):
        expected = cattn.scaled_dot_product_attention(*arrays, is_causal=True, q_offset=0)
        with pytest.warns(UserWarning, match="q_offset=seq_len_kv - seq_len_q"):
            result = cattn.scaled_dot_product_attention(*arrays, is_causal=True)
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(reference.scaled_dot_product_attention(*arrays, is_causal=True),
                                      reference.scaled_dot_product_attention(*arrays, is_causal=True, q_offset=0))


MASKS = {  # what holds only 0 and 1, and what does not
    "causal": (np.tril(np.ones((5, 5))), True),
    "padding": (np.array([1.0, 1, 1, 0, 0]), True),
    "minus zeros": (np.array([1.0, -0.0, 1, 1, 1]), True),
    "one of each": (np.array([0.0, 1])[[0, 0, 1, 0, 0]], True),
    "strided": (np.tril(np.ones((10, 10)))[::2, ::2], True),
    "broadcast": (np.broadcast_to(np.array([1.0, 0, 0, 0, 0]), (2, 4, 5, 5)), True),
    "zeros": (np.zeros((5, 5)), False),
    "ones": (np.ones((5, 5)), False),
    "one number": (np.array(1.0), False),
    "infinite": (np.where(np.tri(5) > 0, 0, -np.inf), False),
    "infinite and 1": (np.where(np.tri(5) > 0, 1, -np.inf), False),
    "large negative": ((1 - np.tri(5)) * -1e9, False),
    "one that is neither": (np.tri(5) + np.eye(5) / 8, False),
    "NaN": (np.array([0, 1, np.nan, 0, 0]), False),
    "bool": (np.tri(5) > 0, False),
}


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("dtype", [F32, F64, np.float16, ml_dtypes.bfloat16])
def test_warning_of_masks_of_0_and_1(which, dtype):
    mask, warns = MASKS[which]
    if mask.dtype != bool and which != "broadcast":
        with np.errstate(over="ignore"):
            mask = mask.astype(dtype)
    x = tokens(5, (2, 4))
    caught = warned(lambda: cattn.scaled_dot_product_attention(x, x, x, mask))
    assert [text for text, *_ in caught] == ([
        "attn_mask: a float mask that holds only 0 and 1 and is added to the scores; for True = attend pass "
        "attn_mask.astype(bool)"] if warns else [])
    assert warned(lambda: reference.scaled_dot_product_attention(x, x, x, mask)) == []


@pytest.mark.parametrize("shape", [(300, 300), (1, 1, 300, 300), (2, 4, 300, 300), (300, 2000)], ids=str)
def test_warning_of_large_masks_of_0_and_1(shape):
    mask = np.tril(np.ones(shape, F32))
    query, key = tokens(shape[-2], (2, 4)), tokens(shape[-1], (2, 4))
    assert len(warned(lambda: cattn.scaled_dot_product_attention(query, key, key, mask))) == 1
    mask[..., -1, -1] = 0.5
    assert warned(lambda: cattn.scaled_dot_product_attention(query, key, key, mask)) == []


def test_warnings_name_the_caller():
    """Once per line, however many tokens; of this file, also through a layer."""
    layer = cattn.MultiHeadAttention(8, 2)

    class Mine(cattn.MultiHeadAttention):
        def __call__(self, x, **options):
            return super().__call__(x, **options)  # once

    own = Mine(8, 2)
    mask, x = np.tri(3), np.ones((1, 9, 8), F32)

    def calls():
        for n in range(2, 9):
            cattn.scaled_dot_product_attention(tokens(1), tokens(n), tokens(n), is_causal=True)  # once
            cattn.scaled_dot_product_attention(tokens(1), tokens(n), tokens(n), is_causal=True, kv_lens=[n])  # once
            layer(x[:, :1], x[:, :n], is_causal=True)  # once
            layer(x[0, :1], x[0, :n], is_causal=True, kv_lens=n)  # once
            layer(x[:, :3], attn_mask=mask)  # once
            own(x[:, :3], attn_mask=mask)

    lines, first = inspect.getsourcelines(test_warnings_name_the_caller)
    expected = [first + number for number, line in enumerate(lines) if line.endswith("  # once\n")]
    caught = warned(calls)
    assert sorted(line for _, _, line in caught) == expected and len(expected) == 6
    assert {file for _, file, _ in caught} == {__file__}


def test_warning_as_an_error_comes_before_anything_is_written():
    out = np.full((1, 2, 1, 4), 7, F32)
    with pytest.raises(UserWarning, match=r"^is_causal with fewer queries"):  # an error, in this suite
        cattn.scaled_dot_product_attention(tokens(1), tokens(5), tokens(5), is_causal=True, out=out)
    with pytest.raises(UserWarning, match=r"^attn_mask: a float mask"):
        cattn.scaled_dot_product_attention(tokens(1), tokens(5), tokens(5), np.eye(5)[0], out=out)
    assert (out == 7).all()
