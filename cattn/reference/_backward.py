"""The gradients of attention: the scores are computed again, and become weights by the forward's logsumexp."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cattn.reference._attention import (
    aligned,
    biased,
    compute_dtype,
    distances,
    dropped,
    products,
    scale_of,
    weighted_sum,
)

__all__ = ["Gradients", "scaled_dot_product_attention_backward", "varlen_attention_backward"]


class Gradients(NamedTuple):
    """One for each input, of its shape; None for those that are not wanted."""

    query: np.ndarray | None = None
    key: np.ndarray | None = None
    value: np.ndarray | None = None
    attn_mask: np.ndarray | None = None
    alibi_slopes: np.ndarray | None = None
    sinks: np.ndarray | None = None


@np.errstate(all="ignore")
def scaled_dot_product_attention_backward(
    grad_out: ArrayLike, query: ArrayLike, key: ArrayLike, value: ArrayLike, out: ArrayLike, logsumexp: ArrayLike,
    attn_mask: ArrayLike | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, *, q_offset: ArrayLike | None = None,
    window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
    alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None, kv_lens: ArrayLike | None = None,
    kv_starts: ArrayLike | None = None, seed: int | None = None, grad_logsumexp: ArrayLike | None = None,
    wanted: Collection[str] = ("query", "key", "value"),
) -> Gradients:
    """The gradients of sum(grad_out * out) + sum(grad_logsumexp * logsumexp) by what the forward was given.

    With C = scale * query @ key^T, capped; P = exp(scores - logsumexp), the weights but for sinks and dropout;
    w = 1 / (1 + exp(sink - logsumexp)), the share that a sink leaves them; D = keep / (1 - dropout_p); and
    delta = sum(grad_out * out) of each row:

        grad_value    = (w P D)^T @ grad_out
        grad_scores   = w P (D (grad_out @ value^T) - delta) + P grad_logsumexp
        grad_products = scale * grad_scores (1 - (C / softcap)^2)
        grad_query    = grad_products @ key
        grad_key      = grad_products^T @ query
        grad_mask     = grad_scores
        grad_slope    = -sum(grad_scores abs(i + q_offset - j))
        grad_sink     = -sum((1 - w) delta)

    grad_out, out : arrays (..., num_heads, seq_len_q, head_dim_v)
    logsumexp, grad_logsumexp : arrays (..., num_heads, seq_len_q)
    gradients : arrays of the inputs' shapes and dtypes; of alibi_slopes and sinks in the dtype computed in

    An input that is broadcast has the sum over its copies, a shared key head that over its group. A bool mask has no
    gradient (None), and a bias that was clipped has that of the clipped one. Masked pairs add nothing to any gradient,
    nor do rows that see nothing, where logsumexp is -inf, whatever stands there.

    The other arguments are those of the forward, with the seed that it used: see
    `cattn.scaled_dot_product_attention_backward`. This checks nothing and warns of nothing.
    """
    inputs = [np.asarray(x) for x in (query, key, value)]
    one_head = inputs[0].ndim < 4
    query, key, value, aligned_mask = aligned(*inputs, attn_mask)
    dtype = query.dtype
    grad_out, out, logsumexp = (np.asarray(x).astype(dtype, copy=False) for x in (grad_out, out, logsumexp))
    grad_logsumexp = np.asarray(0 if grad_logsumexp is None else grad_logsumexp).astype(dtype, copy=False)
    if one_head:
        grad_out, out, logsumexp = grad_out[..., None, :, :], out[..., None, :, :], logsumexp[..., None, :]
        grad_logsumexp = grad_logsumexp[..., None, :] if grad_logsumexp.ndim else grad_logsumexp
    logsumexp, grad_logsumexp = logsumexp[..., None], grad_logsumexp[..., None]

    capped = products(query, key, scale, softcap)
    distance = distances(query.shape[-2], key.shape[-2], q_offset, kv_lens)
    scores, visible = biased(capped, distance, aligned_mask, is_causal, window=window, alibi_slopes=alibi_slopes,
                             kv_lens=kv_lens, kv_starts=kv_starts)
    seeing = logsumexp != -np.inf
    visible = visible & seeing

    def where_visible(x):
        return np.where(visible, x, dtype.type(0))

    probs = where_visible(np.exp(scores - logsumexp))
    weights, delta = probs, (grad_out * out).sum(axis=-1, keepdims=True)
    if sinks is not None:
        above = np.asarray(sinks).astype(dtype)[:, None, None] - logsumexp
        weights, of_sink = where_visible(probs / (1 + np.exp(above))), 1 / (1 + np.exp(-above))
    grad_weights = dropped(grad_out @ value.swapaxes(-1, -2), dropout_p, seed)
    grad_scores = where_visible(weights * (grad_weights - delta) + probs * grad_logsumexp)
    grad_products = dtype.type(scale_of(query, scale)) * grad_scores
    if softcap:
        grad_products = where_visible(grad_products * (1 - (capped / dtype.type(softcap)) ** 2))

    gradients = {}
    if "query" in wanted:
        gradients["query"] = _as_input(weighted_sum(grad_products, key, visible), inputs[0], one_head)
    to_keys, visible_to_keys = grad_products.swapaxes(-1, -2), visible.swapaxes(-1, -2)
    if "key" in wanted:
        gradients["key"] = _as_input(weighted_sum(to_keys, query, visible_to_keys), inputs[1], one_head)
    if "value" in wanted:
        to_values = dropped(weights, dropout_p, seed).swapaxes(-1, -2)
        gradients["value"] = _as_input(weighted_sum(to_values, grad_out, visible_to_keys), inputs[2], one_head)
    if "attn_mask" in wanted and attn_mask is not None and np.asarray(attn_mask).dtype != bool:
        attn_mask = np.asarray(attn_mask)
        of_mask = _summed_to(np.shape(aligned_mask), grad_scores)
        gradients["attn_mask"] = of_mask.reshape(attn_mask.shape).astype(attn_mask.dtype)
    if "alibi_slopes" in wanted and alibi_slopes is not None:
        of_heads = -(grad_scores * np.abs(distance).astype(dtype)).sum(axis=(-1, -2))
        gradients["alibi_slopes"] = _summed_to(np.shape(alibi_slopes), of_heads)
    if "sinks" in wanted and sinks is not None:
        of_rows = np.where(seeing, -of_sink * delta, dtype.type(0))[..., 0]
        gradients["sinks"] = _summed_to(np.shape(sinks), of_rows.sum(axis=-1))
    return Gradients(**gradients)


@np.errstate(all="ignore")
def varlen_attention_backward(
    grad_out: ArrayLike, query: ArrayLike, key: ArrayLike, value: ArrayLike, out: ArrayLike, logsumexp: ArrayLike,
    cu_seqlens_q: ArrayLike, cu_seqlens_kv: ArrayLike | None = None, *, is_causal: bool = False,
    q_offset: ArrayLike | str = "end", alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    dropout_p: float = 0.0, grad_logsumexp: ArrayLike | None = None,
    wanted: Collection[str] = ("query", "key", "value"), **options,
) -> Gradients:
    """The gradients of `varlen_attention`: those of each sequence on its own, summed where they share slopes and sinks.
    See `cattn.varlen_attention_backward`.

    grad_out, out : arrays (total_q, num_heads, head_dim_v)
    logsumexp, grad_logsumexp : arrays (total_q, num_heads)
    """
    query, key, value = np.asarray(query), np.asarray(key), np.asarray(value)
    rows = list(itertools.starmap(slice, itertools.pairwise(cu_seqlens_q)))
    keys = rows if cu_seqlens_kv is None else list(itertools.starmap(slice, itertools.pairwise(cu_seqlens_kv)))
    sums = {name: np.zeros_like(x) for name, x in (("query", query), ("key", key), ("value", value)) if name in wanted}
    for name, vector in ("alibi_slopes", alibi_slopes), ("sinks", sinks):
        if name in wanted and vector is not None:
            sums[name] = np.zeros((len(rows), query.shape[1]), compute_dtype(query))
    for batch, (own_rows, own_keys) in enumerate(zip(rows, keys, strict=True)):
        q, do, o, lse, do_lse = (None if x is None else np.asarray(x)[own_rows].swapaxes(0, 1)[None]
                                 for x in (query, grad_out, out, logsumexp, grad_logsumexp))
        k, v = (x[own_keys].swapaxes(0, 1)[None] for x in (key, value))
        if dropout_p:  # as in the forward, the last of so many: the others see nothing
            q, do, o = (np.broadcast_to(x, (batch + 1, *x.shape[1:])) for x in (q, do, o))
            lse = np.concatenate([np.full_like(lse, -np.inf)] * batch + [lse])
        gradients = scaled_dot_product_attention_backward(
            do, q, k, v, o, lse, None, dropout_p, is_causal,
            q_offset=q_offset if isinstance(q_offset, str) or np.ndim(q_offset) == 0 else q_offset[batch],
            alibi_slopes=alibi_slopes if np.ndim(alibi_slopes) < 2 else alibi_slopes[batch], sinks=sinks,
            grad_logsumexp=do_lse, wanted=sums, **options)
        for name, where in ("query", own_rows), ("key", own_keys), ("value", own_keys):
            if name in sums:
                sums[name][where] = getattr(gradients, name)[-1].swapaxes(0, 1)
        for name in sums.keys() & {"alibi_slopes", "sinks"}:
            sums[name][batch] = getattr(gradients, name)
    for name, vector in ("alibi_slopes", alibi_slopes), ("sinks", sinks):
        if name in sums:
            sums[name] = _summed_to(np.shape(vector), sums[name])
    return Gradients(**sums)


def _as_input(gradient, given, one_head):
    """A gradient for each query head, with all leading axes, in the shape and the dtype of the query, key or value."""
    shape = (*given.shape[:-2], 1, *given.shape[-2:]) if one_head else given.shape
    num_heads, group_size = shape[-3], gradient.shape[-3] // shape[-3]
    by_group = gradient.reshape(*gradient.shape[:-3], num_heads, group_size, *shape[-2:])
    return _summed_to(shape, by_group.sum(axis=-3)).reshape(given.shape).astype(given.dtype, copy=False)


def _summed_to(shape, array):
    """`array`, summed over the axes that an input of this shape is broadcast along; in double or wider, as there may be
    many."""
    missing = array.ndim - len(shape)
    axes = tuple(axis for axis in range(array.ndim) if axis < missing or shape[axis - missing] == 1)
    wide = np.result_type(array.dtype, np.float64)
    return array.sum(axis=axes, dtype=wide, keepdims=True).reshape(shape).astype(array.dtype)
