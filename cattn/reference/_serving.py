"""Attention of sequences of different lengths, packed or in pages: the dense function, sequence by sequence."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike

from cattn.reference._attention import compute_dtype, scaled_dot_product_attention

__all__ = ["paged_attention", "varlen_attention"]


def varlen_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = None, *, is_causal: bool = False, q_offset: ArrayLike | str = "end",
    return_logsumexp: bool = False, **options,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Attention of packed sequences, each on its own: see `cattn.varlen_attention`.

    query, key, value : float arrays (total_q, num_heads, head_dim), (total_kv, num_kv_heads, head_dim) and
    (total_kv, num_kv_heads, head_dim_v); sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1] - 1
    out : array (total_q, num_heads, head_dim_v); logsumexp : array (total_q, num_heads)
    """
    key, value = np.asarray(key), np.asarray(value)
    cu_seqlens_kv = cu_seqlens_q if cu_seqlens_kv is None else cu_seqlens_kv
    keys = [(key[start:end], value[start:end]) for start, end in itertools.pairwise(cu_seqlens_kv)]
    return _each(np.asarray(query), keys, value.shape[-1], cu_seqlens_q, q_offset, return_logsumexp,
                 is_causal=is_causal, **options)


def paged_attention(
    query: ArrayLike, key_pages: ArrayLike, value_pages: ArrayLike, block_table: ArrayLike, kv_lens: ArrayLike,
    cu_seqlens_q: ArrayLike | None = None, *, is_causal: bool = True, q_offset: ArrayLike | str = "end",
    key_scales: ArrayLike | None = None, value_scales: ArrayLike | None = None, return_logsumexp: bool = False,
    **options,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Attention of packed queries on keys in pages: see `cattn.paged_attention`.

    key_pages, value_pages : arrays (num_pages, page_size, num_kv_heads, head_dim or head_dim_v)
    block_table : int array (batch, max_pages); kv_lens : int array (batch,)
    key_scales, value_scales : arrays (num_pages, page_size, num_kv_heads) of int8 pages, which are multiplied by them
    """
    query, key_pages, value_pages = np.asarray(query), np.asarray(key_pages), np.asarray(value_pages)
    page_size = key_pages.shape[1]
    if cu_seqlens_q is None:
        cu_seqlens_q = np.arange(len(query) + 1)
    keys = []
    for pages, kv_len in zip(np.asarray(block_table), kv_lens, strict=True):
        pages = pages[: -(-kv_len // page_size)]
        keys.append((_gathered(key_pages, key_scales, pages)[:kv_len],
                     _gathered(value_pages, value_scales, pages)[:kv_len]))
    return _each(query, keys, value_pages.shape[-1], cu_seqlens_q, q_offset, return_logsumexp, is_causal=is_causal,
                 **options)


@np.errstate(all="ignore")
def _gathered(x, scales, pages):
    """The rows of these pages, one after the other."""
    rows = x[pages].reshape(-1, *x.shape[2:])
    return rows if scales is None else rows * np.asarray(scales)[pages].reshape(-1, x.shape[2], 1)


def _each(query, keys, head_dim_v, cu_seqlens_q, q_offset, return_logsumexp, *, alibi_slopes=None, dropout_p=0.0,
          **options):
    """The dense function on each sequence's queries and its pair of `keys`."""
    out = np.empty((*query.shape[:2], head_dim_v), query.dtype)
    logsumexp = np.empty(query.shape[:2], compute_dtype(query))
    for batch, (key, value) in enumerate(keys):
        rows = slice(cu_seqlens_q[batch], cu_seqlens_q[batch + 1])
        q, k, v = (x.swapaxes(0, 1)[None] for x in (query[rows], key, value))
        if dropout_p:  # the sequence is the batch index, of which it depends: the last of so many equal ones
            q = np.broadcast_to(q, (batch + 1, *q.shape[1:]))
        result = scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, return_logsumexp=True,
            q_offset=q_offset if isinstance(q_offset, str) or np.ndim(q_offset) == 0 else q_offset[batch],
            alibi_slopes=alibi_slopes if np.ndim(alibi_slopes) < 2 else alibi_slopes[batch], **options)
        out[rows], logsumexp[rows] = (x[-1].swapaxes(0, 1) for x in result)
    return (out, logsumexp) if return_logsumexp else out
