"""The doors to the kernel of attention's gradients: the forward's checks, what belongs to it, then one call."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

from cattn import _kernels
from cattn._attention import check_offset, check_options, check_problem
from cattn._checks import (
    BOOL,
    F32,
    F64,
    KINDS,
    cast,
    check_bool,
    check_of_forward,
    check_result,
    check_seed_of_forward,
    check_wanted,
)
from cattn._serving import check_packed
from cattn.reference import Gradients

__all__ = ["Gradients", "scaled_dot_product_attention_backward", "varlen_attention_backward"]


def scaled_dot_product_attention_backward(
    grad_out: ArrayLike, query: ArrayLike, key: ArrayLike, value: ArrayLike, out: ArrayLike, logsumexp: ArrayLike,
    attn_mask: ArrayLike | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, *, q_offset: ArrayLike | str | None = None,
    window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
    alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None, kv_lens: ArrayLike | None = None,
    kv_starts: ArrayLike | None = None, seed: int | None = None, grad_logsumexp: ArrayLike | None = None,
    wanted: Collection[str] = ("query", "key", "value"), num_threads: int | None = None,
) -> Gradients:
    """The gradients of `scaled_dot_product_attention`: of sum(grad_out * out) by its inputs.

    With C = scale * query @ key^T, bent by the softcap; P = exp(scores - logsumexp), the weights but for sinks and
    dropout; w = 1 / (1 + exp(sink - logsumexp)), what a sink leaves of them, 1 without sinks; D = keep / (1 -
    dropout_p); and delta = sum(grad_out * out) for each row::

        grad_value    = (w P D)^T @ grad_out
        grad_scores   = w P (D (grad_out @ value^T) - delta) + P grad_logsumexp
        grad_products = scale * grad_scores * (1 - (C / softcap)^2)
        grad_query    = grad_products @ key
        grad_key      = grad_products^T @ query

    The scores are computed again, from logsumexp: nothing of size seq_len_q x seq_len_kv is stored.

    Parameters
    ----------
    grad_out : array of the shape and dtype of out
        The gradient of what is minimised by out.
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As they were given to `scaled_dot_product_attention`, and likewise
    q_offset, window, softcap, alibi_slopes, sinks, kv_lens, kv_starts
        these.
    out : array (..., num_heads, seq_len_q, head_dim_v), dtype of the query
        What it returned.
    logsumexp : array (..., num_heads, seq_len_q), dtype computed in
        Likewise, with return_logsumexp.
    seed : int in [0, 2**64)
        Of the forward; needed where dropout_p is not 0.
    grad_logsumexp : array of the shape and dtype of logsumexp, optional
        The gradient of what is minimised by logsumexp; 0 when None.
    wanted : collection of str
        Whose gradients are computed, out of "query", "key", "value", "attn_mask", "alibi_slopes" and "sinks".
    num_threads : int, optional
        Threads of this call; as `set_num_threads` says when None.

    Returns
    -------
    gradients : Gradients
        A named tuple with a field for each of these names, None where it is not wanted, or there is none: of a bool
        mask, and of what was not given. Shape and dtype are those of the input, but that slopes and sinks have the
        dtype computed in. An input that was broadcast has the sum over its copies, a key head that of all query heads
        that share it. Rows that see no key, and keys that no row sees, have gradient 0; NaN behind a mask changes
        nothing. A bias that was clipped is differentiated as if it were not.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.

    Notes
    -----
    The bits depend on no number of threads and on no other batch row. Memory beyond the result grows with seq_len_q
    + seq_len_kv, but for the gradient of a mask. That is added up by one thread where all of its copies are computed:
    for a mask without batch and head axes, only parts of 512 keys are work for different threads.

    Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 2.

    Examples
    --------
    >>> import cattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value, grad_out = rng.standard_normal((4, 1, 2, 5, 8))
    >>> def attention(value, **options):
    ...     return cattn.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    >>> out, logsumexp = attention(value, return_logsumexp=True)
    >>> gradients = scaled_dot_product_attention_backward(
    ...     grad_out, query, key, value, out, logsumexp, is_causal=True)
    >>> nudge = 1e-6 * rng.standard_normal(value.shape)     # what changes out by the derivative, about
    >>> change = (grad_out * (attention(value + nudge) - out)).sum()
    >>> bool(abs(change - (gradients.value * nudge).sum()) < 1e-12)
    True
    """
    return backward(
        grad_out, query, key, value, out, logsumexp, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        alibi_slopes=alibi_slopes, sinks=sinks, seed=seed, grad_logsumexp=grad_logsumexp, wanted=wanted,
        q_offset=q_offset, window=window, softcap=softcap, kv_lens=kv_lens, kv_starts=kv_starts,
        num_threads=num_threads)


def backward(grad_out, query, key, value, out, logsumexp, attn_mask, dropout_p, is_causal, scale, enable_gqa, *,
             alibi_slopes, sinks, seed, grad_logsumexp, wanted, kinds=KINDS, cast=cast, **options):
    """`scaled_dot_product_attention_backward`. `kinds` are those of the forward's `attend`; `cast` rounds to them."""
    wanted = check_wanted(wanted, {"attn_mask": attn_mask, "alibi_slopes": alibi_slopes, "sinks": sinks})
    seed = check_seed_of_forward(seed, dropout_p)
    problem = check_problem(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, alibi_slopes=alibi_slopes, sinks=sinks,
        seed=seed, kinds=kinds, **options)
    query, key, value, mask = problem.query, problem.key, problem.value, problem.given_mask
    rows_shape, dtype, slopes_shape = problem.rows_shape, problem.dtype, np.shape(alibi_slopes)
    if mask is not None and mask.dtype == bool:
        wanted.discard("attn_mask")
    check_result(rows_shape, max(query.shape[-1], value.shape[-1]))
    grad_out, out, logsumexp, grad_logsumexp = check_of_forward(
        grad_out, out, logsumexp, grad_logsumexp, rows_shape, value.shape[-1], query.dtype, dtype)

    full = [problem.leading + x.shape[-(2 if problem.one_head else 3):] for x in (query, key, value)]
    # What is summed afterwards is not rounded before, and the copies of a mask may be many.
    kv_dtype = key.dtype if (key.shape, value.shape) == tuple(full[1:]) else dtype
    grad_query, grad_key, grad_value = (
        problem.new_gradient(shape, own_dtype) if name in wanted else None
        for name, shape, own_dtype in zip(Gradients._fields, full, (dtype, kv_dtype, kv_dtype), strict=False))
    grad_mask = None
    if "attn_mask" in wanted:
        grad_mask = np.zeros(mask.shape, dtype if mask.size == problem.attn_mask.size else np.float64)
    of_mask = None if grad_mask is None else np.broadcast_to(grad_mask, problem.attn_mask.shape)
    num_heads = 1 if problem.one_head else rows_shape[-2]
    of_heads = {name: np.zeros((math.prod(problem.leading), num_heads))
                for name in ("alibi_slopes", "sinks") if name in wanted}
    differentiate(
        problem, grad_out, out, logsumexp, grad_logsumexp, grad_query, grad_key, grad_value, of_mask, of_heads)
    gradients = {name: cast(_summed(array, given.shape), given.dtype) for name, array, given in (
        ("query", grad_query, query), ("key", grad_key, key), ("value", grad_value, value)) if array is not None}
    if grad_mask is not None:
        gradients["attn_mask"] = cast(grad_mask, mask.dtype)
    return Gradients(**gradients, **_of_heads(of_heads, slopes_shape, dtype))


def differentiate(problem, grad_out, out, logsumexp, grad_logsumexp=None, grad_query=None, grad_key=None,
                  grad_value=None, grad_mask=None, of_heads=None):
    """The gradients (OUT) of a Problem, those that are not None: with all leading axes, of any strides between rows;
    the query's of the dtype computed in, the mask's of that or of double, the others of that or of the keys'; the
    mask's 0 before, and broadcast as it is. `of_heads`: {"alibi_slopes" or "sinks": array (batch, num_heads)}. Both
    logsumexps are flat."""
    of_heads = of_heads or {}
    names = "grad_out", "out", "grad_query", "grad_key", "grad_value", "grad_mask"
    wide = all(x is None or x.dtype == problem.dtype for x in (grad_key, grad_value))
    for rows, arrays, arguments in problem.calls(grad_out, out, grad_query, grad_key, grad_value, grad_mask):
        parts = problem.module.attend_backward(
            **dict(zip(names, arrays, strict=True)), logsumexp=logsumexp[rows],
            grad_logsumexp=None if grad_logsumexp is None else grad_logsumexp[rows], wide=wide,
            slopes_wanted="alibi_slopes" in of_heads, sinks_wanted="sinks" in of_heads, **arguments)
        first = arguments["batch_offset"]
        for name, of_splits in zip(("alibi_slopes", "sinks"), parts, strict=True):
            if name in of_heads:
                of_heads[name][first : first + of_splits.shape[1]] = _of_all_splits(of_splits)


def varlen_attention_backward(
    grad_out: ArrayLike, query: ArrayLike, key: ArrayLike, value: ArrayLike, out: ArrayLike, logsumexp: ArrayLike,
    cu_seqlens_q: ArrayLike, cu_seqlens_kv: ArrayLike | None = None, *, is_causal: bool = False,
    q_offset: ArrayLike | str = "end", scale: float | None = None,
    window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
    alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None, dropout_p: float = 0.0,
    seed: int | None = None, grad_logsumexp: ArrayLike | None = None,
    wanted: Collection[str] = ("query", "key", "value"), num_threads: int | None = None,
) -> Gradients:
    """The gradients of `varlen_attention`: of sum(grad_out * out) by its inputs, for sequences that are packed.

    The formulas are those of `scaled_dot_product_attention_backward`; each sequence gets the bits that this gives it
    alone.

    Parameters
    ----------
    grad_out : array of the shape and dtype of out
    query, key, value, cu_seqlens_q, cu_seqlens_kv
        As they were given to `varlen_attention`, and likewise
    is_causal, q_offset, scale, window, softcap, alibi_slopes, sinks, dropout_p
        these.
    out : array (total_q, num_heads, head_dim_v), dtype of the query
        What it returned.
    logsumexp : array (total_q, num_heads), dtype computed in
        Likewise, with return_logsumexp.
    seed, grad_logsumexp, num_threads
        As in `scaled_dot_product_attention_backward`.
    wanted : collection of str
        Whose gradients are computed, as there.

    Returns
    -------
    gradients : Gradients
        A named tuple with a field for each of these names, None where it is not wanted, or was not given.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.

    Examples
    --------
    >>> import cattn
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((3 + 1 + 4, 2, 8), np.float32)      # sequences of 3, 1 and 4 tokens
    >>> out, logsumexp = cattn.varlen_attention(x, x, x, [0, 3, 4, 8], return_logsumexp=True)
    >>> gradients = varlen_attention_backward(np.ones_like(out), x, x, x, out, logsumexp, [0, 3, 4, 8])
    >>> gradients.value[:4, 0, 0].round(3)      # of the one token that sees itself alone, 1
    array([0.834, 1.235, 0.931, 1.   ], dtype=float32)
    """
    return packed_backward(
        grad_out, query, key, value, out, logsumexp, cu_seqlens_q, cu_seqlens_kv, is_causal=is_causal,
        q_offset=q_offset, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        dropout_p=dropout_p, seed=seed, grad_logsumexp=grad_logsumexp, wanted=wanted, num_threads=num_threads)


def packed_backward(grad_out, query, key, value, out, logsumexp, cu_seqlens_q, cu_seqlens_kv, *, is_causal, q_offset,
                    alibi_slopes, sinks, dropout_p, seed, grad_logsumexp, wanted, kinds=KINDS, cast=cast, **options):
    """`varlen_attention_backward`. `kinds` are those of the forward's `attend_packed`; `cast` rounds to them."""
    wanted = check_wanted(wanted, {"attn_mask": None, "alibi_slopes": alibi_slopes, "sinks": sinks})
    seed = check_seed_of_forward(seed, dropout_p)
    query, key, value, q_kind, kv_kind, cu_seqlens_q, cu_seqlens_kv = check_packed(
        query, key, value, cu_seqlens_q, cu_seqlens_kv, kinds)
    is_causal = check_bool("is_causal", is_causal)
    rows_shape, kv_lens = query.shape[:2], np.diff(cu_seqlens_kv)
    check_result(rows_shape, max(query.shape[-1], value.shape[-1]))
    options = check_options(
        q_kind, rows_shape[1], kv_lens.shape, is_causal=is_causal, dropout_p=dropout_p, seed=seed,
        alibi_slopes=alibi_slopes, sinks=sinks, **options)
    q_offset, q_offsets = check_offset(q_offset, kv_lens.shape, kv_lens, np.diff(cu_seqlens_q))
    dtype, slopes_shape = np.float64 if q_kind == F64 else np.float32, np.shape(alibi_slopes)
    grad_out, out, logsumexp, grad_logsumexp = check_of_forward(
        grad_out, out, logsumexp, grad_logsumexp, rows_shape, value.shape[-1], query.dtype, dtype)

    new = np.zeros if 0 in (*rows_shape, len(key)) else np.empty
    grad_query = new(query.shape, dtype) if "query" in wanted else None
    grad_key, grad_value = (new(x.shape, x.dtype) if name in wanted else None
                            for name, x in (("key", key), ("value", value)))
    of_heads = {name: np.zeros((len(kv_lens), rows_shape[1])) for name in ("alibi_slopes", "sinks") if name in wanted}
    if 0 not in rows_shape:
        module = _kernels.f64() if q_kind == F64 else _kernels.f32
        names = "grad_out", "query", "key", "value", "out", "grad_query", "grad_key", "grad_value"
        arrays = grad_out, query, key, value, out, grad_query, grad_key, grad_value
        parts = module.attend_backward(
            **{name: None if x is None else x.swapaxes(0, 1)[None] for name, x in zip(names, arrays, strict=True)},
            mask=None, grad_mask=None, logsumexp=logsumexp, grad_logsumexp=grad_logsumexp,
            wide=kv_kind in (F32, F64), slopes_wanted="alibi_slopes" in wanted, sinks_wanted="sinks" in wanted,
            q_kind=q_kind, kv_kind=kv_kind, mask_kind=BOOL, q_offset=q_offset, q_offsets=q_offsets, kv_lens=kv_lens,
            batch_offset=0, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, **options)
        of_heads |= {name: _of_all_splits(of_splits)
                     for name, of_splits in zip(("alibi_slopes", "sinks"), parts, strict=True) if name in wanted}
    return Gradients(query=None if grad_query is None else cast(grad_query, query.dtype), key=grad_key,
                     value=grad_value, **_of_heads(of_heads, slopes_shape, dtype))


def _summed(array, shape):
    """A gradient in the shape of the input, summed over the axes that it was broadcast along."""
    missing = array.ndim - len(shape)
    axes = tuple(axis for axis in range(array.ndim) if axis < missing or shape[axis - missing] != array.shape[axis])
    return _sum(array, axes).reshape(shape) if axes else array


def _of_all_splits(parts):
    """(splits, batch, num_heads), summed over the splits one after the other. NumPy's sum does so for several numbers,
    and adds the parts of one in pairs: its bits would depend on how many others there are."""
    total = np.zeros(parts.shape[1:])
    with np.errstate(all="ignore"):
        for part in parts:
            total += part
    return total


def _of_heads(gradients, slopes_shape, dtype):
    """The gradients of slopes and sinks, of (batch, num_heads) each."""
    return {name: cast(_sum(array, 0) if name == "sinks" or len(slopes_shape) == 1 else array.reshape(slopes_shape),
                       dtype) for name, array in gradients.items()}


def _sum(array, axes):
    """In double, as there may be many; in silence, whatever the caller's numpy.errstate."""
    with np.errstate(all="ignore"):
        return array.sum(axis=axes, dtype=np.float64)
