"""The door to the attention kernel: checks, broadcasting and allocation, then one call.

What comes in may have any strides and several leading axes; the kernel takes 4 axes (batch, heads, seq, dim). Views
alone get it there, nothing is copied as a whole.
"""

from __future__ import annotations

import itertools
import math
import numbers
import sys
import typing
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from cattn import _kernels, _threads
from cattn.reference import (
    _as_array,
    _cast,
    _cast_cure,
    _check_bool,
    _check_dropout,
    _check_int,
    _check_seed,
    _is_bfloat16,
    _is_masked,
    _is_number,
    _is_torch,
    _shown,
)

__all__ = ["scaled_dot_product_attention"]

F32, F64, F16, BF16, BOOL = range(5)  # as in _kernels/tensor.pxi
_KINDS = {np.dtype(np.float32): F32, np.dtype(np.float64): F64, np.dtype(np.float16): F16}
# The buffer protocol has no name for bfloat16 and Cython none for float16: they travel as uint16, bools as uint8.
_CARRIERS = {F16: np.uint16, BF16: np.uint16, BOOL: np.uint8}
_UNBOUNDED = -1
_FAR = 2**60  # offsets and windows beyond any key; sums of three of them still fit an int64
_MAX_HEAD_DIM = 2**31 - 1
_MAX_NUMBERS = 2**48  # in value, by strides of 0: beyond, the size of the scratch would not fit an index
# Of scale and softcap: a quarter of the largest number, as for a bias, fits after * log2(e) as well.
_F32_RANGE, _F64_RANGE = ((float(x.smallest_normal), float(x.max) / 4) for x in map(np.finfo, (np.float32, np.float64)))
_MAX_AXES = 32  # numpy broadcasts no more
# Of numpy.shares_memory. They take up to 75 ms; of random arrays 1 in 20,000 takes more, with 5 axes, and none with 4.
_MAX_STEPS = 1_000_000
# Of a float mask, that are looked at in each call. 64 rows of tril(ones(64, 64)), or one of 4096: it takes 1.7 us, and
# a single number 1.1. (All of 512 x 512 would take 26 us.)
_FIRST_NUMBERS = 4096
# The bits of 1. As arrays of no axes: compared with twice as fast as scalars.
_ONE = {F32: np.ones((), np.float32).view(np.uint32), F64: np.ones((), np.float64).view(np.uint64),
        F16: np.ones((), np.float16).view(np.uint16), BF16: np.array(0x3F80, np.uint16)}
_PACKAGE = __name__.partition(".")[0]


# For type checkers: what is returned, by the two flags. By the name `overload` alone Jedi would know these as well, and
# show them in place of the function, without a docstring.
@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, return_weights: Literal[False] = False, return_logsumexp: Literal[False] = False,
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> np.ndarray: ...


@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, return_weights: Literal[True], return_logsumexp: Literal[False] = False,
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray]: ...


@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, return_weights: Literal[False] = False, return_logsumexp: Literal[True],
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray]: ...


@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, return_weights: Literal[True], return_logsumexp: Literal[True],
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, return_weights: bool = False, return_logsumexp: bool = False,
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> np.ndarray | tuple[np.ndarray, ...]: ...


def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    return_weights: bool = False, return_logsumexp: bool = False, out: np.ndarray | None = None,
    num_threads: int | None = None, seed: int | None = None,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """softmax(scale * query @ key^T + mask) @ value, for each head.

    In this order: scale, softcap (c * tanh(x / c)), ALiBi and mask, softmax with the sinks in its
    denominator, dropout, weights @ value. Everything combines with everything.

    Parameters
    ----------
    query : float array (..., num_heads, seq_len_q, head_dim)
        A row for each token that looks at others. Also (batch, seq_len_q, head_dim) or (seq_len_q,
        head_dim), one head; key and value then have as many axes.
    key : float array (..., num_kv_heads, seq_len_kv, head_dim)
        A row for each token that is looked at: a score is a query times a key. num_heads is a multiple of
        num_kv_heads; consecutive query heads share a key head. Leading axes broadcast, missing ones count as
        1. Computed in float32, or in the query's dtype where that is wider.
    value : float array (..., num_kv_heads, seq_len_kv, head_dim_v)
        What each token that is looked at gives: a row of the result is their weighted mean.
    attn_mask : bool or float array, broadcastable to the weights
        Which keys each query may see, or what is added to its scores. bool: True = attend. float: added; -inf
        = masked, every finite value is a bias (clipped to a quarter of the range of the dtype computed in).
    dropout_p : float in [0, 1)
        The share of weights to drop, in training. Weights are zeroed where `dropout_keep(seed, ...)` is False,
        the others divided by 1 - dropout_p. The batch index is the flat index over the leading axes.
    is_causal : bool
        No query sees a key after it: query i sees key j when j <= i + q_offset. With 3 queries, 5 keys and
        q_offset 0 and 2::

            1 0 0 0 0        1 1 1 0 0
            1 1 0 0 0        1 1 1 1 0
            1 1 1 0 0        1 1 1 1 1
    scale : float, optional
        What scores are multiplied by; 1 / sqrt(head_dim) when None. At most a quarter of the range of the
        dtype computed in, as softcap.
    enable_gqa : bool
        Accepted so that calls written for PyTorch work; the shapes say it all.
    q_offset : int or int array (batch,), optional
        Position of query 0 among the keys (those already in a cache). May be negative. "batch" is the shape
        of the leading axes where there are several. 0 when None.
    window : (left, right) or an array of two, optional
        How far each query sees: query i sees keys i + q_offset - left to i + q_offset + right, both included;
        None or -1 = unbounded.
    softcap : float, optional
        Scores are bent to stay within +-softcap. 0 or None = off; else from the smallest normal number of the dtype
        computed in on.
    alibi_slopes : float array (num_heads,) or (batch, num_heads), optional
        Lowers scores by distance, ALiBi: adds -slope * abs(i + q_offset - j). Clipped as attn_mask is.
    sinks : float array (num_heads,), optional
        One more logit per head, for attention that goes nowhere: exp(sink) joins the denominator, no value
        goes with it.
    kv_lens : int or int array (batch,), optional
        How many keys each batch row has, where it is padded: keys at and past the length do not exist.
    return_weights, return_logsumexp : bool
        Return a tuple, with these after the result.
    out : array of the result's shape and dtype, optional
        Written and returned; any strides.
    num_threads : int, optional
        Threads of this call; as `set_num_threads` says when None.
    seed : int in [0, 2**64), optional
        Of the dropout; fresh for each call when None.

    Returns
    -------
    out : array (..., num_heads, seq_len_q, head_dim_v), dtype of the query
        A row that sees no key is 0 (where tutorials that fill with -1e6 or -9e15 give the mean of all
        values). The value row of a masked key is not read: NaN there changes nothing. A score that is NaN or
        +inf makes its row NaN, and NaN in a value row that is seen goes through, with weight 0 as well.
    weights : array (..., num_heads, seq_len_q, seq_len_kv), dtype of the query; with return_weights
        What multiplies the values, after sinks and dropout. Exactly 0 for masked keys.
    logsumexp : array (..., num_heads, seq_len_q), dtype computed in; with return_logsumexp
        log(sum(exp(scores))), without the sinks; -inf for a row that sees no key.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is written.

    Warns
    -----
    UserWarning
        Where is_causal meets fewer queries than keys (than kv_lens says, if given) and no q_offset: query 0 is
        at key 0 then, not near the last key; q_offset=0 says that it is meant. And where a float mask holds 0
        and 1 and nothing else, as if 1 meant "attend".

    Notes
    -----
    Vaswani et al. 2017, "Attention is all you need"; ALiBi: Press et al. 2022; sinks: Xiao et al. 2024. Names
    and order of the arguments: torch.nn.functional.scaled_dot_product_attention; window: FlashAttention.

    Examples
    --------
    >>> query = np.array([[1., 0.], [0., 1.]])
    >>> key = np.array([[2., 0.], [0., 2.], [1., 1.]])
    >>> value = np.array([[1., 0.], [0., 1.], [5., 5.]])
    >>> out, weights = scaled_dot_product_attention(  # the queries are the last two of three tokens
    ...     query, key, value, is_causal=True, q_offset=1, return_weights=True)
    >>> weights.round(3)
    array([[0.804, 0.196, 0.   ],
           [0.14 , 0.576, 0.284]])
    >>> out.round(3)
    array([[0.804, 0.196],
           [1.56 , 1.996]])
    """
    if (attn_mask is None and kv_lens is None and window is None and sinks is None and alibi_slopes is None
            and seed is None and return_weights is False and return_logsumexp is False
            and (enable_gqa is False or enable_gqa is True)
            and type(dropout_p) is float and dropout_p == 0
            and (softcap == 0 if type(softcap) is float else softcap is None)
            and (q_offset is None or (type(q_offset) is int and -_FAR <= q_offset <= _FAR))
            and (is_causal is False or is_causal is True)):
        result = _kernels.f32.attend_plain(query, key, value, out, is_causal, scale, q_offset,
                                           0 if num_threads is None else _threads.checked(num_threads))
        if result is not None:
            return result
    given = query, key, value
    query, key, value = _as_array("query", query), _as_array("key", key), _as_array("value", value)
    is_causal = _check_bool("is_causal", is_causal)
    _check_bool("enable_gqa", enable_gqa)
    return_weights = _check_bool("return_weights", return_weights)
    return_logsumexp = _check_bool("return_logsumexp", return_logsumexp)
    q_kind, kv_kind = _kind("query", query, given[0]), _kind("key", key, given[1])
    if value.dtype != key.dtype:
        cure = ""
        if value.dtype == query.dtype:
            cure = f"; {_cast_cure('key', given[1], 'query.dtype')} casts"
        elif _is_number(value.dtype):
            cure = f"; {_cast_cure('value', given[2], 'key.dtype')} casts"
        raise TypeError(f"value: expected the dtype of key, {key.dtype}, got {value.dtype}{cure}")
    if q_kind != kv_kind and not (q_kind == F32 and kv_kind in (F16, BF16)):
        raise TypeError(f"key: expected dtype {query.dtype}, as query has (or a 16-bit one under a float32 query), "
                        f"got {key.dtype}; {_cast_cure('key', given[1], 'query.dtype')} casts")
    leading = _check_shapes(query, key, value)
    one_head = query.ndim < 4
    num_heads, seq_len_q = (1, query.shape[-2]) if one_head else query.shape[-3:-1]
    seq_len_kv, head_dim_v = value.shape[-2:]
    rows_shape = (*leading, seq_len_q) if one_head else (*leading, num_heads, seq_len_q)
    width = max(head_dim_v, seq_len_kv if return_weights else 1)
    if math.prod(rows_shape) * width > sys.maxsize // 8:
        raise ValueError(f"query: expected a result that fits in memory, got rows {rows_shape} of {width}")

    right = left = _UNBOUNDED
    if window is not None:
        left, right = _check_window(window)
    if is_causal:
        right = 0
    smallest, largest = _F64_RANGE if q_kind == F64 else _F32_RANGE
    scale = None if scale is None else _check_number("scale", scale, -largest, largest)
    softcap = 0.0 if softcap is None else _check_number("softcap", softcap, smallest, largest)
    dropout_p = _check_dropout("dropout_p", dropout_p)
    seed = _check_seed(seed) if dropout_p or seed is not None else 0
    num_threads = 0 if num_threads is None else _threads.checked(num_threads)  # 0: the kernel takes the default
    no_offset = q_offset is None
    q_offsets = None
    if no_offset:
        q_offset = 0
    elif type(q_offset) is not int:
        q_offsets = _check_lengths("q_offset", q_offset, leading)
        q_offset = 0
    if kv_lens is not None:
        kv_lens, given_lens = _check_lengths("kv_lens", kv_lens, leading), kv_lens
        if kv_lens.size and not 0 <= kv_lens.min() <= kv_lens.max() <= seq_len_kv:
            got = given_lens if isinstance(given_lens, numbers.Integral) else kv_lens.tolist()
            raise ValueError(f"kv_lens: expected lengths from 0 to seq_len_kv = {seq_len_kv}, got {_shown(got)}")
    compute_dtype = np.float64 if q_kind == F64 else np.float32
    if alibi_slopes is not None:
        alibi_slopes = _check_vector("alibi_slopes", alibi_slopes, ((num_heads,), (*leading, num_heads)), compute_dtype)
        alibi_slopes = alibi_slopes.reshape(math.prod(alibi_slopes.shape[:-1]), num_heads)
    if sinks is not None:
        sinks = _check_vector("sinks", sinks, ((num_heads,),), compute_dtype)
    mask_kind = BOOL
    if attn_mask is not None:
        if attn_mask is True or attn_mask is False:  # is_causal, in the place of attn_mask
            raise TypeError(f"attn_mask: expected an array, got {attn_mask}; for the causal mask: "
                            f"is_causal={attn_mask}")
        given_mask = _as_array("attn_mask", attn_mask)
        attn_mask, mask_kind = _check_mask(given_mask, attn_mask, (*rows_shape, seq_len_kv), leading)
    if out is None:
        out = target = np.empty((*rows_shape, head_dim_v), query.dtype)
    else:
        inputs = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "alibi_slopes": alibi_slopes,
                  "sinks": sinks}
        target = _check_out(out, (*rows_shape, head_dim_v), query.dtype, inputs)
    if is_causal and no_offset and 0 < seq_len_q < seq_len_kv:
        _warn_of_first_keys(seq_len_q, kv_lens)
    if mask_kind != BOOL and _is_0_and_1(given_mask, mask_kind):
        _warn("attn_mask: a float mask that holds only 0 and 1 and is added to the scores; for True = attend pass "
              "attn_mask.astype(bool)")
    weights = np.empty((*rows_shape, seq_len_kv), compute_dtype) if return_weights else None
    narrow_weights = np.empty(weights.shape, query.dtype) if return_weights and q_kind in _CARRIERS else None
    logsumexp = np.empty(rows_shape, compute_dtype) if return_logsumexp else None

    module = _kernels.f64() if q_kind == F64 else _kernels.f32
    arrays = [(query, q_kind), (key, kv_kind), (value, kv_kind), (attn_mask, mask_kind), (target, q_kind)]
    batches = _batches([_four_axes(array, kind, leading, one_head) for array, kind in arrays], leading)
    for batch_offset, (q, k, v, mask, result) in batches if target.size else ():
        batch = slice(batch_offset, batch_offset + q.shape[0])
        rows = slice(batch_offset * num_heads * seq_len_q, batch.stop * num_heads * seq_len_q)
        of_weights = slice(rows.start * seq_len_kv, rows.stop * seq_len_kv)
        module.attend(
            q, k, v, mask, result,
            None if weights is None else weights.reshape(-1)[of_weights],
            None if narrow_weights is None else narrow_weights.view(np.uint16).reshape(-1)[of_weights],
            None if logsumexp is None else logsumexp.reshape(-1)[rows],
            q_kind, kv_kind, mask_kind, scale, softcap, left, right,
            max(-_FAR, min(_FAR, q_offset)),
            None if q_offsets is None else q_offsets[batch],
            None if kv_lens is None else kv_lens[batch],
            alibi_slopes if alibi_slopes is None or len(alibi_slopes) == 1 else alibi_slopes[batch],
            sinks, dropout_p, seed, batch_offset, num_threads,
        )
    if not (return_weights or return_logsumexp):
        return out
    results = [out]
    if return_weights:
        results.append(weights if narrow_weights is None else narrow_weights)
    if return_logsumexp:
        results.append(logsumexp)
    return tuple(results)


def _warn(message):
    """A UserWarning at the line that called the library, through however many functions of its own: what is shown once
    per place is shown once for each such line. So the text has no numbers, which change from token to token."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def _warn_of_first_keys(seq_len_q, kv_lens):
    if kv_lens is None:
        _warn("is_causal with fewer queries than keys and no q_offset: query i sees keys 0 to i; for queries that are "
              "the last tokens pass q_offset=seq_len_kv - seq_len_q, else q_offset=0")
    elif seq_len_q < kv_lens.max(initial=0):
        _warn("is_causal with fewer queries than kv_lens and no q_offset: query i sees keys 0 to i; for queries that "
              "are the last tokens pass q_offset=kv_lens - seq_len_q, else q_offset=0")


def _is_0_and_1(mask, kind):
    """Whether both are there and nothing else; False as well where a large mask begins with many of the same."""
    if mask.size <= _FIRST_NUMBERS:
        return _holds_0_and_1(mask, kind)
    part = mask
    for axis in range(mask.ndim):
        if part.size > _FIRST_NUMBERS:
            part = part[(slice(None),) * axis + (slice(max(1, _FIRST_NUMBERS * part.shape[axis] // part.size)),)]
    once = tuple(slice(None) if stride else slice(1) for stride in mask.strides)
    return _holds_0_and_1(part, kind) and _holds_0_and_1(mask[once], kind)


def _holds_0_and_1(numbers, kind):
    one = _ONE[kind]
    ones = np.count_nonzero(numbers.view(one.dtype) == one)  # by their bits: numpy.errstate has no say in this
    return 0 < ones < numbers.size and np.count_nonzero(numbers) == ones


def _kind(name, array, given=None):
    """Of an array whose dtype is one of these; `given`, what it was made of, tells how to cast it."""
    kind = _KINDS.get(array.dtype)
    if kind is None:
        if not _is_bfloat16(array.dtype):
            cure = ""
            if array.dtype.kind in "iuf":
                wide = array.dtype.kind == "f" and array.dtype.itemsize >= 8
                cure = f"; {_cast_cure(name, given, 'np.float64' if wide else 'np.float32')} casts"
            elif array.dtype.kind in "US":
                cure = "; tokens are looked up in an embedding first"
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16 in native byte order, "
                            f"got dtype {array.dtype}{cure}")
        kind = _KINDS[array.dtype] = BF16
    return kind


def _check_shapes(query, key, value):
    """The leading axes of the result, broadcast."""
    if query.ndim < 2:
        cure = "; for one query: np.atleast_2d(query)" if query.size and query.ndim else ""
        raise ValueError(f"query: expected 2 axes (seq_len_q, head_dim) or more, got shape {query.shape}{cure}")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim > _MAX_AXES:
            raise ValueError(f"{name}: expected at most {_MAX_AXES} axes, got {array.ndim}")
    for name, array in (("key", key), ("value", value)):
        if array.ndim != query.ndim and min(array.ndim, query.ndim) < 4:
            raise ValueError(f"{name}: expected {query.ndim} axes, as query has, got shape {array.shape}")
    core = 2 if query.ndim < 4 else 3
    leading = query.shape[:-core]
    for name, array in (("key", key), ("value", value)):
        try:
            leading = np.broadcast_shapes(leading, array.shape[:-core])
        except ValueError:
            cure = ""
            if query.ndim == 3 and array.shape[0] and query.shape[0] % array.shape[0] == 0:
                cure = "; 3 axes are (batch, seq, head_dim); for heads pass 4, x[None] of each"
            raise ValueError(f"{name}: expected {_shape_text(leading, core, name, query, key)}, "
                             f"got shape {array.shape}{cure}") from None
    head_dim = query.shape[-1]
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"query: expected a head_dim from 1 to {_MAX_HEAD_DIM}, got shape {query.shape}")
    if key.shape[-1] != head_dim:
        cure = "; keys come untransposed: key.swapaxes(-1, -2)" if key.shape[-2] == head_dim else ""
        raise ValueError(f"key: expected {_shape_text(leading, core, 'key', query, key)}, got shape {key.shape}{cure}")
    if core == 3 and (key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]):
        cure = "; axes are (batch, heads, seq, head_dim)"
        if key.shape[-2] and query.shape[-2] % key.shape[-2] == 0:
            cure += ", for arrays (batch, seq, heads, head_dim) pass x.swapaxes(-3, -2) of each"
        raise ValueError(f"key: expected a num_kv_heads that divides query's {query.shape[-3]} heads, "
                         f"got shape {key.shape}{cure}")
    if value.shape[-core:-1] != key.shape[-core:-1] or not 1 <= value.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(f"value: expected {_shape_text(leading, core, 'value', query, key)}, got shape {value.shape}")
    kv_numbers = math.prod(leading) * math.prod(key.shape[-core:-1]) * max(head_dim, value.shape[-1])
    if value.size > _MAX_NUMBERS or kv_numbers > sys.maxsize // 8:
        raise ValueError(f"value: expected at most {_MAX_NUMBERS} numbers, and key and value broadcast to {leading} "
                         f"that fit an index, got shape {value.shape}")
    return leading


def _shape_text(leading, core, name, query, key):
    heads = () if core == 2 else ("num_kv_heads",) if name == "key" else (str(key.shape[-3]),)
    last = ("seq_len_kv", str(query.shape[-1])) if name == "key" else (str(key.shape[-2]), "head_dim_v")
    return f"({', '.join([*map(str, leading), *heads, *last])})"


def _check_number(name, value, smallest, largest):
    if not isinstance(value, (float, numbers.Real)):  # float first: the test of an abstract class takes long
        cure = ""
        if isinstance(value, np.ndarray) and _is_number(value.dtype):
            if value.size == 1:
                cure = f"; {name}.item() is one"
            elif name == "scale":
                cure = "; for one per head multiply query by it and pass scale=1"
        elif _is_torch(value) and getattr(value, "ndim", None) == 0:
            cure = f"; {name}.item() is one"
        raise TypeError(f"{name}: expected a number, got {_shown(value)}{cure}")
    try:
        number = float(value)
    except OverflowError:  # an int
        number = math.inf
    if not (smallest <= number <= largest or number == 0):
        raise ValueError(f"{name}: expected 0 or a number from {smallest:.3g} to {largest:.3g}, got {_shown(value)}")
    return number


def _check_window(window):
    sides = window
    if not isinstance(window, (tuple, list)):
        array = _as_array("window", window) if hasattr(window, "__array__") else None
        sides = () if array is None or array.ndim != 1 else list(array)
    if len(sides) != 2:
        got, is_int = _shown(window), isinstance(window, numbers.Integral) and not isinstance(window, bool)
        cure = f"; for that many keys on each side: ({got}, {got})" if is_int else ""
        raise ValueError(f"window: expected None or (left, right), got {got}{cure}")
    sides = [_UNBOUNDED if side is None else _check_int("window", side) for side in sides]
    if min(sides) < _UNBOUNDED:
        raise ValueError("window: expected keys to the left and right >= 0, or -1 or None for all, "
                         f"got {_shown(window)}")
    return (min(side, _FAR) for side in sides)


def _check_lengths(name, lengths, leading):
    """A flat int64 array, one number per batch row; far-away ones clipped."""
    if type(lengths) is not int:  # which numpy has no dtype for, where it is far away
        given, lengths = lengths, _as_array(name, lengths)
        if lengths.dtype.kind not in "iu":
            cure = ""
            if name == "kv_lens" and lengths.dtype == bool:
                cure = "; of a right-padded mask they are mask.sum(-1)"
            elif lengths.dtype.kind == "f":
                cure = f"; {_cast_cure(name, given, 'int')} casts"
            raise TypeError(f"{name}: expected integers, got dtype {lengths.dtype}{cure}")
        if lengths.ndim and lengths.shape != leading:
            expected = f"an int, or shape {leading}, one per batch row" if leading else "an int"
            raise ValueError(f"{name}: expected {expected}, got shape {lengths.shape}")
        if lengths.ndim:
            return np.array([max(-_FAR, min(_FAR, length)) for length in lengths.ravel().tolist()], np.int64)
        lengths = lengths.item()
    return np.full(math.prod(leading), max(-_FAR, min(_FAR, lengths)), np.int64)


def _check_vector(name, vector, shapes, dtype):
    vector = _as_array(name, vector)
    if not _is_number(vector.dtype):
        raise TypeError(f"{name}: expected a float or int array, got dtype {vector.dtype}")
    if vector.shape not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got shape {vector.shape}")
    vector = np.ascontiguousarray(_cast(vector, dtype))  # infinity does what a number beyond the range would
    return vector if vector.flags.aligned else vector.copy()


def _check_mask(attn_mask, given, shape, leading):
    if attn_mask.dtype == bool:
        kind = BOOL
    elif attn_mask.dtype in _KINDS or _is_bfloat16(attn_mask.dtype):
        kind = _kind("attn_mask", attn_mask)
    else:
        cure = ""
        if attn_mask.dtype.kind in "iu":
            cure = f"; for 1 = attend: {_cast_cure('attn_mask', given, 'bool')}"
        elif attn_mask.dtype.kind == "f":
            cure = f"; {_cast_cure('attn_mask', given, 'np.float32')} casts"
        raise TypeError(f"attn_mask: expected bool (True = attend) or a float dtype (added), got {attn_mask.dtype}"
                        f"{cure}")
    try:
        return np.broadcast_to(attn_mask, shape), kind
    except ValueError:
        cure = ""
        if attn_mask.shape == (*leading, shape[-1]):
            axes = ", ".join([":"] * len(leading) + ["None"] * (len(shape) - 1 - len(leading)) + [":"])
            cure = f"; for a padding mask: mask[{axes}], or kv_lens"
        elif len(leading) == 1 and len(shape) == 4 and attn_mask.shape == (*leading, *shape[-2:]):
            cure = "; for one mask per batch row: mask[:, None]"
        elif len(shape) == 4 and attn_mask.shape == (math.prod(shape[:2]), *shape[2:]):
            cure = f"; for one mask per batch row and head: mask.reshape{shape}"
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {shape}, "
                         f"got shape {attn_mask.shape}{cure}") from None


def _check_out(out, shape, dtype, inputs):
    """A view of `out` as a plain array: what a subclass says of its shape and strides need not be true, and another
    thread may set them."""
    if not isinstance(out, np.ndarray):
        cure = "; its .numpy() shares its memory" if _is_torch(out) else ""
        raise TypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}{cure}")
    if _is_masked(out):
        raise TypeError("out: expected a plain array, got a masked array, whose mask would be ignored; use its .data")
    out = np.asarray(out)[...]
    if out.dtype != dtype:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}; out[...] = result casts")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got shape {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")
    try:
        if _overlaps_itself(out):
            raise ValueError(f"out: expected elements that do not overlap each other, got strides {out.strides}")
    except np.exceptions.TooHardError:
        raise ValueError(f"out: expected elements that do not overlap each other, or strides of which that can be seen "
                         f"in {_MAX_STEPS} steps, got strides {out.strides}") from None
    for name, array in inputs.items():
        if array is None:
            continue
        try:
            if np.may_share_memory(out, array) and np.shares_memory(out, array, max_work=_MAX_STEPS):
                raise ValueError(f"out: expected memory of its own, got an array that overlaps {name}")
        except np.exceptions.TooHardError:
            raise ValueError(f"out: expected memory of its own, or strides of which that can be seen in {_MAX_STEPS} "
                             f"steps, got an array that may overlap {name}") from None
    return out


def _overlaps_itself(out):
    """Whether two elements share a byte. TooHardError where that is no matter of few steps."""
    axes = sorted((abs(stride), length, axis)
                  for axis, (stride, length) in enumerate(zip(out.strides, out.shape, strict=True)) if length > 1)
    extent = out.itemsize  # bytes from the first to the end of the last element, over the axes of smaller strides
    for stride, length, _ in axes:
        if stride < extent:
            break
        extent += stride * (length - 1)
    else:
        return False
    if not out.size:
        return False
    # Axes that interleave. Two elements that share a byte differ along a first axis of these: moved together, one is at
    # index 0 of it and the other is not, both at 0 of the axes before and anywhere along those after.
    here = [slice(None)] * out.ndim
    for _, _, axis in reversed(axes):
        there = here.copy()
        here[axis], there[axis] = slice(1), slice(1, None)
        if np.shares_memory(out[tuple(here)], out[tuple(there)], max_work=_MAX_STEPS):
            return True
    return False


def _carried(array, kind):
    """`array` in the dtype in which its kind travels, with axes of length 1 in front where it has less than 4; None for
    None."""
    if array is None:
        return None
    if kind in _CARRIERS:
        array = array.view(_CARRIERS[kind])
    return array[(None,) * (4 - array.ndim)]


def _four_axes(array, kind, leading, one_head):
    """A view of `array` as (*leading, heads, seq, dim), broadcast, in the dtype its kind travels in; None for None."""
    if array is None:
        return None
    if kind in _CARRIERS:
        array = array.view(_CARRIERS[kind])
    if one_head:
        array = array[..., None, :, :]
    if not leading:
        array = array[None]
        leading = (1,)
    if array.shape[:-3] != leading:
        array = np.broadcast_to(array, leading + array.shape[-3:])
    return array


def _batches(views, leading):
    """(index of the first batch row, views of 4 axes): all at once where the leading axes of every view are one axis
    by their strides, else a call for each element of the outer ones."""
    if len(leading) <= 1:
        yield 0, views
        return
    merged = [None if view is None else _merge_leading(view) for view in views]
    if all(new is not None or old is None for new, old in zip(merged, views, strict=True)):
        yield 0, merged
        return
    for number, index in enumerate(itertools.product(*map(range, leading[:-1]))):
        yield number * leading[-1], [None if view is None else view[index] for view in views]


def _merge_leading(view):
    """`view` with all axes before the last three as one, by strides; None where they do not allow it."""
    length, stride = 1, 0
    for next_length, next_stride in zip(view.shape[-4::-1], view.strides[-4::-1], strict=True):
        if next_length == 1:
            continue
        if length == 1:
            length, stride = next_length, next_stride
        elif next_stride == length * stride:
            length *= next_length
        else:
            return None
    shape, strides = (length, *view.shape[-3:]), (stride, *view.strides[-3:])
    return np.lib.stride_tricks.as_strided(view, shape, strides, writeable=view.flags.writeable)
