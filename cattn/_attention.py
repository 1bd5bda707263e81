"""The door to the attention kernel: checks, broadcasting and allocation, then one call.

What comes in may have any strides and several leading axes; the kernel takes 4 axes (batch, heads, seq, dim). Views
alone get it there, nothing is copied as a whole.
"""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cattn import _kernels, _threads
from cattn._checks import (
    BOOL,
    F32_RANGE,
    F64,
    F64_RANGE,
    FAR,
    KINDS,
    UNBOUNDED,
    as_array,
    check_bool,
    check_dropout,
    check_kinds,
    check_kv_lens,
    check_lengths,
    check_mask,
    check_number,
    check_result,
    check_seed,
    check_shapes,
    check_vector,
    check_window,
    out_or_new,
    shown,
    warn_of_0_and_1,
    warn_of_first_keys,
)

__all__ = ["scaled_dot_product_attention"]


# For type checkers: what is returned, by the two flags. By the name `overload` alone Jedi would know these as well, and
# show them in place of the function, without a docstring.
@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | str | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, kv_starts: ArrayLike | None = None,
    return_weights: Literal[False] = False, return_logsumexp: Literal[False] = False,
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> np.ndarray: ...


@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | str | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, kv_starts: ArrayLike | None = None,
    return_weights: Literal[True], return_logsumexp: Literal[False] = False,
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray]: ...


@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | str | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, kv_starts: ArrayLike | None = None,
    return_weights: Literal[False] = False, return_logsumexp: Literal[True],
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray]: ...


@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | str | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, kv_starts: ArrayLike | None = None,
    return_weights: Literal[True], return_logsumexp: Literal[True],
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


@typing.overload
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | str | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, kv_starts: ArrayLike | None = None,
    return_weights: bool = False, return_logsumexp: bool = False,
    out: np.ndarray | None = None, num_threads: int | None = None, seed: int | None = None,
) -> np.ndarray | tuple[np.ndarray, ...]: ...


def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | str | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, kv_starts: ArrayLike | None = None,
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
    q_offset : int, int array (batch,) or "end", optional
        Position of query 0 among the keys (those already in a cache). May be negative. "batch" is the shape
        of the leading axes where there are several. "end": the queries are the last of the keys, kv_lens
        (seq_len_kv, if not given) - seq_len_q. 0 when None.
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
    kv_starts : int or int array (batch,), optional
        Which key is the first of each batch row, where it is padded on the left: those before do not exist.
        Positions are counted from key 0 all the same.
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
    # An option that attend_short does not take has to be off: test_no_option_is_lost_on_the_short_way.
    if (attn_mask is None and sinks is None and alibi_slopes is None and seed is None and kv_starts is None
            and return_weights is False
            and (enable_gqa is False or enable_gqa is True)
            and type(dropout_p) is float and dropout_p == 0
            and (softcap == 0 if type(softcap) is float else softcap is None)):
        result = _kernels.f32.attend_short(
            query, key, value, is_causal, scale, q_offset, window, kv_lens, return_logsumexp, out,
            0 if num_threads is None else _threads.checked(num_threads), KINDS)
        if result is not None:
            return result
    return attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, q_offset=q_offset, window=window,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, kv_lens=kv_lens, kv_starts=kv_starts,
        return_weights=return_weights, return_logsumexp=return_logsumexp, out=out, num_threads=num_threads, seed=seed)


def attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *, q_offset, return_weights,
           return_logsumexp, out, kinds=KINDS, **options):
    """`scaled_dot_product_attention` but for the short way. `kinds`: an integration's own numbers of dtypes, where
    uint16 is what holds its bfloat16."""
    return_weights = check_bool("return_weights", return_weights)
    return_logsumexp = check_bool("return_logsumexp", return_logsumexp)
    problem = check_problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, q_offset=q_offset,
                            kinds=kinds, **options)
    query, key, value = problem.query, problem.key, problem.value
    rows_shape, (seq_len_kv, head_dim_v) = problem.rows_shape, value.shape[-2:]
    check_result(rows_shape, max(head_dim_v, seq_len_kv if return_weights else 1))
    out, target = out_or_new(out, (*rows_shape, head_dim_v), query.dtype, {
        "query": query, "key": key, "value": value, "attn_mask": problem.attn_mask,
        "alibi_slopes": problem.of_batches["slopes"], "sinks": problem.options["sinks"]})
    if q_offset is None and problem.is_causal and 0 < rows_shape[-1] < seq_len_kv:
        warn_of_first_keys(rows_shape[-1], problem.of_batches["kv_lens"])
    if problem.options["mask_kind"] != BOOL:
        warn_of_0_and_1(problem.given_mask, problem.options["mask_kind"])
    weights = np.empty((*rows_shape, seq_len_kv), problem.dtype) if return_weights else None
    narrow = query.dtype != problem.dtype
    narrow_weights = np.empty(weights.shape, query.dtype) if return_weights and narrow else None
    logsumexp = np.empty(rows_shape, problem.dtype) if return_logsumexp else None
    for rows, (result,), arguments in problem.calls(target):
        of_weights = slice(rows.start * seq_len_kv, rows.stop * seq_len_kv)
        problem.module.attend(
            out=result, weights=None if weights is None else weights.reshape(-1)[of_weights],
            narrow_weights=None if narrow_weights is None else narrow_weights.view(np.uint16).reshape(-1)[of_weights],
            logsumexp=None if logsumexp is None else logsumexp.reshape(-1)[rows], **arguments)
    if not (return_weights or return_logsumexp):
        return out
    results = [out]
    if return_weights:
        results.append(weights if narrow_weights is None else narrow_weights)
    if return_logsumexp:
        results.append(logsumexp)
    return tuple(results)


class Problem(NamedTuple):
    """The arguments of a dense problem, checked. Its queries have rows_shape, (..., heads, rows), without heads for
    one_head; `dtype` is computed in."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    attn_mask: np.ndarray | None    # broadcast
    given_mask: np.ndarray | None
    is_causal: bool
    leading: tuple[int, ...]
    one_head: bool
    rows_shape: tuple[int, ...]
    dtype: type
    options: dict                   # of the kernel's entries
    of_batches: dict                # likewise, arrays of one for each batch row; or None

    @property
    def module(self):
        return _kernels.f64() if self.dtype == np.float64 else _kernels.f32

    def new_gradient(self, shape, dtype):
        """For the kernel to write; 0 where there is no pair of a row and a key, and so nothing to do for it."""
        empty = 0 in self.rows_shape or self.key.shape[-2] == 0
        return np.zeros(shape, dtype) if empty else np.empty(shape, dtype)

    def calls(self, *arrays):
        """(which rows of all, views of `arrays` with 4 axes, the other arguments) of each call of the kernel; None
        where there is no row."""
        num_rows = self.rows_shape[-1] * (1 if self.one_head else self.rows_shape[-2])
        if 0 in self.rows_shape:
            return
        given = self.query, self.key, self.value, self.attn_mask, *arrays
        views = [_four_axes(array, self.leading, self.one_head) for array in given]
        for first, (query, key, value, mask, *others) in _batches(views, self.leading):
            batch = slice(first, first + len(query))
            of_batch = {name: array if array is None or (name == "slopes" and len(array) == 1) else array[batch]
                        for name, array in self.of_batches.items()}
            yield (slice(first * num_rows, batch.stop * num_rows), others,
                   dict(self.options, query=query, key=key, value=value, mask=mask, batch_offset=first, **of_batch))


def check_problem(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *, q_offset, window, softcap,
                  alibi_slopes, sinks, kv_lens, kv_starts, num_threads, seed, kinds=KINDS):
    """The Problem of these arguments, which are described in `scaled_dot_product_attention` and `attend`."""
    given = query, key, value
    query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
    is_causal = check_bool("is_causal", is_causal)
    check_bool("enable_gqa", enable_gqa)
    q_kind, kv_kind = check_kinds(query, key, value, given, kinds=kinds)
    leading = check_shapes(query, key, value)
    one_head = query.ndim < 4
    num_heads, seq_len_q = (1, query.shape[-2]) if one_head else query.shape[-3:-1]
    seq_len_kv = value.shape[-2]
    rows_shape = (*leading, seq_len_q) if one_head else (*leading, num_heads, seq_len_q)
    options = check_options(
        q_kind, num_heads, leading, is_causal=is_causal, scale=scale, window=window, softcap=softcap,
        dropout_p=dropout_p, seed=seed, alibi_slopes=alibi_slopes, sinks=sinks, num_threads=num_threads)
    slopes = options.pop("slopes")
    if kv_lens is not None:
        kv_lens = check_kv_lens(kv_lens, leading, seq_len_kv)
    if kv_starts is not None:
        kv_starts = check_kv_lens(kv_starts, leading, seq_len_kv, "kv_starts")
    q_offset, q_offsets = check_offset(q_offset, leading, seq_len_kv if kv_lens is None else kv_lens, seq_len_q)
    given_mask, mask_kind = None, BOOL
    if attn_mask is not None:
        given_mask = as_array("attn_mask", attn_mask)
        attn_mask, mask_kind = check_mask(given_mask, attn_mask, (*rows_shape, seq_len_kv), leading, kinds)
    return Problem(
        query, key, value, attn_mask, given_mask, is_causal, leading, one_head, rows_shape,
        np.float64 if q_kind == F64 else np.float32,
        dict(options, q_kind=q_kind, kv_kind=kv_kind, mask_kind=mask_kind, q_offset=q_offset),
        {"q_offsets": q_offsets, "kv_lens": kv_lens, "kv_starts": kv_starts, "slopes": slopes})


def check_options(q_kind, num_heads, leading, *, is_causal, scale, window, softcap, dropout_p, seed, alibi_slopes,
                  sinks, num_threads):
    """What all kinds of attention have in common, as the kernel's entry takes it."""
    right = left = UNBOUNDED
    if window is not None:
        left, right = check_window(window)
    if is_causal:
        right = 0
    smallest, largest = F64_RANGE if q_kind == F64 else F32_RANGE
    scale = None if scale is None else check_number("scale", scale, -largest, largest)
    softcap = 0.0 if softcap is None else check_number("softcap", softcap, smallest, largest)
    dropout_p = check_dropout("dropout_p", dropout_p)
    seed = check_seed(seed) if dropout_p or seed is not None else 0
    num_threads = 0 if num_threads is None else _threads.checked(num_threads)  # 0: the kernel takes the default
    compute_dtype = np.float64 if q_kind == F64 else np.float32
    if alibi_slopes is not None:
        alibi_slopes = check_vector("alibi_slopes", alibi_slopes, ((num_heads,), (*leading, num_heads)), compute_dtype)
        alibi_slopes = alibi_slopes.reshape(math.prod(alibi_slopes.shape[:-1]), num_heads)
    if sinks is not None:
        sinks = check_vector("sinks", sinks, ((num_heads,),), compute_dtype)
    return {"window_left": left, "window_right": right, "scale": scale, "softcap": softcap, "dropout_p": dropout_p,
            "seed": seed, "slopes": alibi_slopes, "sinks": sinks, "num_threads": num_threads}


def check_offset(q_offset, leading, seq_len_kv, seq_len_q):
    """q_offset of all batch rows, and an array of one for each, or None; the lengths are ints or arrays."""
    if isinstance(q_offset, str):
        if q_offset != "end":
            raise ValueError(f'q_offset: expected an int, an int array or "end", got {shown(q_offset)}')
        q_offset = seq_len_kv - seq_len_q
        return (q_offset, None) if isinstance(q_offset, int) else (0, q_offset)
    if q_offset is None or type(q_offset) is int:
        return max(-FAR, min(FAR, q_offset or 0)), None
    return 0, check_lengths("q_offset", q_offset, leading)


def _four_axes(array, leading, one_head):
    """A view of `array` as (*leading, heads, seq, dim), broadcast; None for None."""
    if array is None:
        return None
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
