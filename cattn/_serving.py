"""Attention of sequences of different lengths: packed rows, and keys in pages.

Both take the door of the dense function for what they have in common, and the same kernels: each sequence gets the bits
that the dense call gives it alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cattn import _kernels
from cattn._attention import check_offset, check_options
from cattn._checks import (
    BOOL,
    F64,
    I8,
    KINDS,
    as_array,
    check_block_table,
    check_bool,
    check_cu_seqlens,
    check_kinds,
    check_packed_shapes,
    check_page_kinds,
    check_page_scales,
    check_result,
    out_or_new,
)

__all__ = ["paged_attention", "varlen_attention"]


def varlen_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, cu_seqlens_q: ArrayLike,
    cu_seqlens_kv: ArrayLike | None = None, *, is_causal: bool = False, q_offset: ArrayLike | str = "end",
    scale: float | None = None, window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
    alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None, dropout_p: float = 0.0,
    return_logsumexp: bool = False, out: np.ndarray | None = None, num_threads: int | None = None,
    seed: int | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """softmax(scale * query @ key^T) @ value for each head of each sequence, of sequences packed one after the other.

    Nothing is padded: the time follows the sum of the work, and is shared by all threads whatever the lengths are.
    Each row has the bits that `scaled_dot_product_attention` gives it for its sequence alone.

    Parameters
    ----------
    query : float array (total_q, num_heads, head_dim)
        The queries of all sequences.
    key : float array (total_kv, num_kv_heads, head_dim)
        num_heads is a multiple of num_kv_heads. Dtypes as in `scaled_dot_product_attention`.
    value : float array (total_kv, num_kv_heads, head_dim_v)
    cu_seqlens_q : int array (batch + 1,)
        Where sequences begin: sequence b has rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1. The first is 0, the last
        total_q.
    cu_seqlens_kv : int array (batch + 1,), optional
        The same of keys and values; those of the queries when None.
    is_causal : bool
        No query sees a key after it: query i of a sequence sees key j when j <= i + q_offset.
    q_offset : int, int array (batch,) or "end"
        Position of a sequence's query 0 among its keys. "end": its queries are the last of its keys.
    scale, window, softcap, alibi_slopes, sinks, dropout_p, seed, num_threads
        As in `scaled_dot_product_attention`; a sequence is what is a batch row there.
    return_logsumexp : bool
        Return a tuple, with these after the result.
    out : array of the result's shape and dtype, optional
        Written and returned; any strides.

    Returns
    -------
    out : array (total_q, num_heads, head_dim_v), dtype of the query
    logsumexp : array (total_q, num_heads), dtype computed in; with return_logsumexp

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is written.

    Notes
    -----
    Names and meaning: flash_attn_varlen_func (FlashAttention), which needs the longest lengths as well.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((3 + 1 + 4, 2, 8), np.float32)      # sequences of 3, 1 and 4 tokens
    >>> out = varlen_attention(x, x, x, [0, 3, 4, 8], is_causal=True)
    >>> out.shape
    (8, 2, 8)
    >>> bool((out[3] == x[3]).all())        # the one token sees itself alone
    True
    """
    return attend_packed(
        query, key, value, cu_seqlens_q, cu_seqlens_kv, is_causal=is_causal, q_offset=q_offset, scale=scale,
        window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p,
        return_logsumexp=return_logsumexp, out=out, num_threads=num_threads, seed=seed)


def attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_kv, *, kinds=KINDS, out=None, **options):
    """`varlen_attention`. `kinds`: an integration's own numbers of dtypes, as in _attention.attend."""
    query, key, value, q_kind, kv_kind, cu_seqlens_q, cu_seqlens_kv = check_packed(
        query, key, value, cu_seqlens_q, cu_seqlens_kv, kinds)
    return _attend(
        query, key.swapaxes(0, 1)[None], value.swapaxes(0, 1)[None], q_kind, kv_kind, cu_seqlens_q,
        np.diff(cu_seqlens_kv), out, {"query": query, "key": key, "value": value},
        keys={"cu_seqlens_kv": cu_seqlens_kv}, **options)


def paged_attention(
    query: ArrayLike, key_pages: ArrayLike, value_pages: ArrayLike, block_table: ArrayLike, kv_lens: ArrayLike,
    cu_seqlens_q: ArrayLike | None = None, *, is_causal: bool = True, q_offset: ArrayLike | str = "end",
    key_scales: ArrayLike | None = None, value_scales: ArrayLike | None = None,
    scale: float | None = None, window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
    alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None, dropout_p: float = 0.0,
    return_logsumexp: bool = False, out: np.ndarray | None = None, num_threads: int | None = None,
    seed: int | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """softmax(scale * query @ key^T) @ value for each head of each sequence, whose keys and values lie in pages.

    Decoding steps and prompts may stand in one call. Each row has the bits that `scaled_dot_product_attention` gives
    it on the same keys in one array.

    Parameters
    ----------
    query : float array (total_q, num_heads, head_dim)
        The queries of all sequences, packed.
    key_pages : array (num_pages, page_size, num_kv_heads, head_dim)
        Any strides: pages (num_pages, num_kv_heads, page_size, head_dim) come as pages.swapaxes(1, 2), and keys and
        values that share an array as views of it. Dtypes as in `scaled_dot_product_attention`; or int8, with scales,
        under a query of float32 or 16 bits.
    value_pages : array (num_pages, page_size, num_kv_heads, head_dim_v)
        In the dtype of key_pages.
    block_table : int array (batch, max_pages)
        Key j of sequence b is row j % page_size of page block_table[b, j // page_size]. What stands behind the last
        page of a sequence is not looked at. Sequences may share pages.
    kv_lens : int array (batch,)
        How many keys each sequence has, those of this call's tokens included.
    cu_seqlens_q : int array (batch + 1,), optional
        Where sequences begin among the queries, as in `varlen_attention`; one query for each when None.
    is_causal : bool
        No query sees a key after it: query i of a sequence sees key j when j <= i + q_offset.
    q_offset : int, int array (batch,) or "end"
        Position of a sequence's query 0 among its keys. "end": its queries are the last of its keys.
    key_scales, value_scales : float32 array (num_pages, page_size, num_kv_heads), with int8 pages
        A row of pages stands for its numbers times its scale. Scales of keys that nobody sees are not used.
    scale, window, softcap, alibi_slopes, sinks, dropout_p, seed, num_threads
        As in `scaled_dot_product_attention`; a sequence is what is a batch row there.
    return_logsumexp : bool
        Return a tuple, with these after the result.
    out : array of the result's shape and dtype, optional
        Written and returned; any strides.

    Returns
    -------
    out : array (total_q, num_heads, head_dim_v), dtype of the query
    logsumexp : array (total_q, num_heads), dtype computed in; with return_logsumexp

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is read or written.

    Notes
    -----
    Of int8 pages, a score is the product of query and numbers, times the scale: the row times its scale is not rounded
    for itself, and a result may differ in the last bits from that on float32 pages of the rounded products. It has the
    same bits whatever the strides, the pages, and the other queries are.

    PagedAttention: Kwon et al. 2023, arXiv:2309.06180. The table and the lengths are vLLM's.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> pages = rng.standard_normal((6, 4, 1, 8), np.float32)       # 6 pages of 4 keys
    >>> query = rng.standard_normal((2, 1, 8), np.float32)          # a token of each of two sequences
    >>> out = paged_attention(query, pages, pages, [[5, 0], [2, -1]], [6, 3])
    >>> keys = np.concatenate([pages[5], pages[0]])[None, :6, 0]    # what the first of them sees
    >>> bool((out[0] == varlen_attention(query[:1], keys[0, :, None], keys[0, :, None], [0, 1], [0, 6])).all())
    True
    """
    given = query, key_pages, value_pages, key_scales, value_scales
    query, key_pages = as_array("query", query), as_array("key_pages", key_pages)
    value_pages = as_array("value_pages", value_pages)
    key_scales = None if key_scales is None else as_array("key_scales", key_scales)
    value_scales = None if value_scales is None else as_array("value_scales", value_scales)
    q_kind, kv_kind = check_page_kinds(query, (key_pages, value_pages), (key_scales, value_scales), given)
    check_packed_shapes(query, key_pages, value_pages, ("query", "key_pages", "value_pages"))
    keys = {}
    if kv_kind == I8:
        check_page_scales("key_scales", key_scales, "key_pages", key_pages, given[3])
        check_page_scales("value_scales", value_scales, "value_pages", value_pages, given[4])
        keys = {"key_scales": key_scales.swapaxes(1, 2)[..., None],
                "value_scales": value_scales.swapaxes(1, 2)[..., None]}
    num_pages, page_size = key_pages.shape[:2]
    block_table, kv_lens = check_block_table(block_table, kv_lens, num_pages, page_size)
    if cu_seqlens_q is None:
        if len(query) != len(kv_lens):
            raise ValueError(f"query: expected one row for each of {len(kv_lens)} sequences where cu_seqlens_q is "
                             f"None, got shape {query.shape}")
        cu_seqlens_q = np.arange(len(query) + 1)
    else:
        cu_seqlens_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, len(query), len(kv_lens))
    return _attend(
        query, key_pages.swapaxes(1, 2), value_pages.swapaxes(1, 2), q_kind, kv_kind, cu_seqlens_q, kv_lens, out,
        {"query": query, "key_pages": key_pages, "value_pages": value_pages, "key_scales": key_scales,
         "value_scales": value_scales}, is_causal=is_causal, q_offset=q_offset, scale=scale, window=window,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p,
        return_logsumexp=return_logsumexp, num_threads=num_threads, seed=seed, keys=keys | {"block_table": block_table})


def check_packed(query, key, value, cu_seqlens_q, cu_seqlens_kv, kinds):
    """Arrays, and the kinds of queries and keys, of a packed problem."""
    given = query, key, value
    query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
    q_kind, kv_kind = check_kinds(query, key, value, given, kinds=kinds)
    check_packed_shapes(query, key, value)
    cu_seqlens_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, len(query))
    name, cu_seqlens_kv = ("cu_seqlens_q", cu_seqlens_q) if cu_seqlens_kv is None else ("cu_seqlens_kv", cu_seqlens_kv)
    cu_seqlens_kv = check_cu_seqlens(name, cu_seqlens_kv, len(key), len(cu_seqlens_q) - 1)
    return query, key, value, q_kind, kv_kind, cu_seqlens_q, cu_seqlens_kv


def _attend(query, key, value, q_kind, kv_kind, cu_seqlens_q, kv_lens, out, inputs, *, is_causal, q_offset,
            return_logsumexp, keys, **options):
    """`keys` says where each sequence has its keys; `inputs` are what `out` must not overlap."""
    total, num_heads, _ = query.shape
    is_causal = check_bool("is_causal", is_causal)
    return_logsumexp = check_bool("return_logsumexp", return_logsumexp)
    shape = (total, num_heads, value.shape[-1])
    check_result(shape[:2], shape[2])
    options = check_options(q_kind, num_heads, kv_lens.shape, is_causal=is_causal, **options)
    q_offset, q_offsets = check_offset(q_offset, kv_lens.shape, kv_lens, np.diff(cu_seqlens_q))
    out, target = out_or_new(out, shape, query.dtype,
                             inputs | {"alibi_slopes": options["slopes"], "sinks": options["sinks"]})
    compute_dtype = np.float64 if q_kind == F64 else np.float32
    logsumexp = np.empty(shape[:2], compute_dtype) if return_logsumexp else None
    if total and num_heads:
        module = _kernels.f64() if q_kind == F64 else _kernels.f32
        module.attend(
            query=query.swapaxes(0, 1)[None], key=key, value=value, mask=None, out=target.swapaxes(0, 1)[None],
            weights=None, narrow_weights=None, logsumexp=None if logsumexp is None else logsumexp.reshape(-1),
            q_kind=q_kind, kv_kind=kv_kind, mask_kind=BOOL, q_offset=q_offset, q_offsets=q_offsets, kv_lens=kv_lens,
            batch_offset=0, cu_seqlens_q=cu_seqlens_q, **keys, **options)
    return (out, logsumexp) if return_logsumexp else out
