"""Attention by its formula: the scores, their softmax, dropout, the weighted sum of the values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cattn.reference._dropout import dropout_keep

__all__ = ["scaled_dot_product_attention"]


@np.errstate(all="ignore")
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None, kv_starts: ArrayLike | None = None,
    return_weights: bool = False, return_logsumexp: bool = False, seed: int | None = None,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """softmax(scale * query @ key^T + mask) @ value, for each head: see `cattn.scaled_dot_product_attention`.

    In this order: scale, softcap (c * tanh(x / c)), ALiBi and mask, softmax with the sinks in its
    denominator, dropout, weights @ value. Computed in float32, or in the query's dtype where that is wider.

    query, key, value : float arrays (..., num_heads, seq_len_q, head_dim), (..., num_kv_heads, seq_len_kv, head_dim)
    and (..., num_kv_heads, seq_len_kv, head_dim_v)
    out : array (..., num_heads, seq_len_q, head_dim_v), dtype of the query
    weights : array (..., num_heads, seq_len_q, seq_len_kv), dtype of the query; with return_weights
    logsumexp : array (..., num_heads, seq_len_q), dtype computed in; with return_logsumexp

    The arguments are described there. This checks nothing and warns of nothing.
    """
    query, key, value = np.asarray(query), np.asarray(key), np.asarray(value)
    result_dtype, one_head = query.dtype, query.ndim < 4
    query, key, value, attn_mask = aligned(query, key, value, attn_mask)
    dtype = query.dtype

    scores, visible = _scores(
        query, key, attn_mask, is_causal, scale, q_offset=q_offset, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, kv_lens=kv_lens, kv_starts=kv_starts)

    row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    row_max = np.where(row_max == -np.inf, dtype.type(0), row_max)
    exps = np.exp(scores - row_max)
    row_sum = exps.sum(axis=-1, keepdims=True)
    logsumexp = (row_max + np.log(row_sum))[..., 0]
    if sinks is not None:
        row_sum = row_sum + np.exp(np.asarray(sinks).astype(dtype)[:, None, None] - row_max)
    weights = dropped(np.where(scores != -np.inf, exps / row_sum, dtype.type(0)), dropout_p, seed)
    out = weighted_sum(weights, value, visible)
    if one_head:
        out, weights, logsumexp = out.squeeze(-3), weights.squeeze(-3), logsumexp.squeeze(-2)
    results = [out.astype(result_dtype)]
    if return_weights:
        results.append(weights.astype(result_dtype))
    if return_logsumexp:
        results.append(logsumexp)
    return results[0] if len(results) == 1 else tuple(results)


def aligned(query, key, value, attn_mask):
    """All with an axis of heads where they have a leading axis; but for the mask, which may be None, in the dtype
    computed in, the query with all leading axes, and keys and values of as many heads as the query."""
    dtype = compute_dtype(query)
    if query.ndim < 4:
        query, key, value = (np.expand_dims(x, -3) for x in (query, key, value))
        if attn_mask is not None and np.ndim(attn_mask) > 2:
            attn_mask = np.expand_dims(attn_mask, -3)
    query, key, value = (x.astype(dtype, copy=False) for x in (query, key, value))
    leading = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    query = np.broadcast_to(query, (*leading, *query.shape[-3:]))
    num_heads, num_kv_heads = query.shape[-3], key.shape[-3]
    if num_kv_heads != num_heads:
        key, value = (np.repeat(x, num_heads // num_kv_heads, axis=-3) for x in (key, value))
    return query, key, value, attn_mask


def _scores(query, key, attn_mask=None, is_causal=False, scale=None, *, q_offset=None, window=None, softcap=0.0,
            alibi_slopes=None, kv_lens=None, kv_starts=None):
    """What the softmax is of, with -inf for masked keys; and which keys are not masked. For as many key heads as query
    heads."""
    distance = distances(query.shape[-2], key.shape[-2], q_offset, kv_lens)
    return biased(products(query, key, scale, softcap), distance, attn_mask, is_causal, window=window,
                  alibi_slopes=alibi_slopes, kv_lens=kv_lens, kv_starts=kv_starts)


def products(query, key, scale, softcap):
    """The scores before ALiBi and mask, capped."""
    dtype = query.dtype
    scores = query @ key.swapaxes(-1, -2) * dtype.type(scale_of(query, scale))
    return dtype.type(softcap) * np.tanh(scores / dtype.type(softcap)) if softcap else scores


def scale_of(query, scale):
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def distances(seq_len_q, seq_len_kv, q_offset, kv_lens):
    """How far behind its query each key is, (batch, 1, seq_len_q, seq_len_kv)."""
    if isinstance(q_offset, str):  # "end"
        q_offset = np.asarray(seq_len_kv if kv_lens is None else kv_lens) - seq_len_q
    q_offset = np.asarray(0 if q_offset is None else q_offset, np.int64)
    position = np.arange(seq_len_q)[:, None] + q_offset[..., None, None, None]
    return np.arange(seq_len_kv) - position


def biased(scores, distance, attn_mask, is_causal, *, window, alibi_slopes, kv_lens, kv_starts):
    """The scores with ALiBi and mask, -inf for masked keys; and which keys are not masked."""
    dtype = scores.dtype
    largest = np.finfo(dtype).max / 4  # so that a score can be added, in any unit
    if alibi_slopes is not None:
        slopes = np.clip(np.asarray(alibi_slopes).astype(dtype), -largest, largest)[..., None, None]
        scores = scores - slopes * np.abs(distance).astype(dtype)

    visible = np.bool_(True)
    if is_causal:
        visible = visible & (distance <= 0)
    left, right = (None, None) if window is None else (None if side is None else int(side) for side in window)
    if left not in (None, -1):
        visible = visible & (distance >= -left)
    if right not in (None, -1):
        visible = visible & (distance <= right)
    key_index = np.arange(scores.shape[-1])
    if kv_lens is not None:
        visible = visible & (key_index < np.asarray(kv_lens)[..., None, None, None])
    if kv_starts is not None:
        visible = visible & (key_index >= np.asarray(kv_starts)[..., None, None, None])
    if attn_mask is not None:
        attn_mask = np.asarray(attn_mask)
        if attn_mask.dtype == bool:
            visible = visible & attn_mask
        else:
            bias = attn_mask.astype(compute_dtype(attn_mask))
            bias = np.where(np.isinf(bias), bias, np.clip(bias, -largest, largest)).astype(dtype)
            visible = visible & (bias != -np.inf)
            scores = scores + bias
    scores = np.where(visible, scores, dtype.type(-np.inf))
    return scores, np.broadcast_to(visible, scores.shape)


def dropped(weights, dropout_p, seed):
    """(..., num_heads, seq_len_q, seq_len_kv), what is kept of them made larger."""
    if not dropout_p:
        return weights
    keep = dropout_keep(seed, dropout_p, math.prod(weights.shape[:-3]), *weights.shape[-3:])
    return weights * keep.reshape(weights.shape) / weights.dtype.type(1 - dropout_p)


def weighted_sum(weights, value, visible):
    """weights @ value, where NaN and inf of a value row reach the queries that see it and no other."""
    finite = np.isfinite(value)
    out = weights @ np.where(finite, value, value.dtype.type(0))
    other_axes = tuple(axis for axis in range(value.ndim) if axis != value.ndim - 2)
    for j in np.flatnonzero(~finite.all(axis=other_axes)):
        missing = visible[..., j, None] & ~finite[..., j, None, :]
        out += np.where(missing, weights[..., j, None] * value[..., j, None, :], 0)
    return out


def compute_dtype(x):
    return np.result_type(x.dtype, np.float32)
