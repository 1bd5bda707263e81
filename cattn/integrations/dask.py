"""Attention over dask arrays, on one machine or many: `pip install "cattn[dask]"`.

    scaled_dot_product_attention    over arrays that are cut along batch, heads, queries and keys
    multi_head_attention            a layer over a batch that is cut

A task takes a chunk of the queries and a chunk of the keys; what it returns is a part for cattn.merge_states. The parts
of a chunk of queries are merged in a tree that the chunks of the keys alone decide, so that neither the scheduler nor
the number of workers, nor how anything else is cut, changes a bit. Where is_causal, the window and the lengths let no
query of a chunk see a key of another, there is no task.

dask is imported by the first call.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import multiprocessing
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import cattn
from cattn import _kernels, _threads
from cattn._attention import check_problem
from cattn._checks import (
    BOOL,
    UNBOUNDED,
    as_array,
    cast,
    check_bool,
    check_key_mask,
    check_layer_inputs,
    check_layer_mask,
    warn_of_0_and_1,
    warn_of_first_keys,
)
from cattn.integrations._library import library

__all__ = ["multi_head_attention", "scaled_dot_product_attention"]

_OLDEST = (2023, 7)
# Parts that a task merges. Of more, the first ones wait longer in memory; of fewer, each is merged more often.
_ARITY = 4


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, q_offset: ArrayLike | str | None = None,
    window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
    alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None, kv_lens: ArrayLike | None = None,
    kv_starts: ArrayLike | None = None, return_weights: bool = False, return_logsumexp: bool = False,
    num_threads: int | None = None, seed: int | None = None,
) -> Any:
    """`cattn.scaled_dot_product_attention` of dask arrays, as a dask array: nothing is computed yet.

    Everything means what it means there; dropout too drops the same weights.

    Parameters
    ----------
    query : dask array (..., num_heads, seq_len_q, head_dim)
    key : dask array (..., num_kv_heads, seq_len_kv, head_dim)
    value : dask array (..., num_kv_heads, seq_len_kv, head_dim_v)
        In any chunks, but head_dim in one, and the query's heads in multiples of num_heads / num_kv_heads. Where two
        are cut differently, both are cut at the places of either. NumPy arrays count as one chunk.
    attn_mask : bool or float array of dask or NumPy, broadcastable to the weights
        In any chunks; it is cut as the others are.
    q_offset, window, alibi_slopes, sinks, kv_lens, kv_starts
        Known now: NumPy arrays or numbers. By them some tasks need not be.
    return_weights : bool
        False.
    return_logsumexp : bool
        Return a tuple, with this after the result.
    num_threads : int, optional
        Threads of each task. When None, in each process: what `cattn.set_num_threads` or CATTN_NUM_THREADS says there,
        for all tasks at once; else the tasks of a worker of dask.distributed share as many as it has, one of dask's
        scheduler "processes" has one, and others share what cattn takes by itself.
    dropout_p, is_causal, scale, enable_gqa, softcap, seed
        As there. Without a seed one is drawn now: computing twice gives the same.

    Returns
    -------
    out : dask array (..., num_heads, seq_len_q, head_dim_v), dtype of the query
        In the chunks of the query. Parts are merged before they are rounded to 16 bits.
    logsumexp : dask array (..., num_heads, seq_len_q), dtype computed in; with return_logsumexp

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.
    ImportError
        Where dask is missing or older than 2023.7.

    Warns
    -----
    UserWarning
        As there; of a mask of 0 and 1 only where it is a NumPy array.

    Notes
    -----
    A row's bits depend on its query, on the keys that it sees and on how the keys are cut: with keys in one chunk they
    are those of `cattn.scaled_dot_product_attention`. A task takes one chunk of each array and makes one part, of a
    chunk of the result and its logsumexp in the dtype computed in; it merges four of them. With dropout, leading axes
    before one that is cut are cut into single rows.

    Examples
    --------
    ::

        query, key, value = (dask.array.from_zarr(path) for path in paths)      # (1, 8, 131072, 64) each
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        out.to_zarr("out.zarr")
    """
    if check_bool("return_weights", return_weights):
        raise ValueError("return_weights: expected False over dask arrays, got True; "
                         "cattn.scaled_dot_product_attention of some rows, computed, gives theirs")
    return_logsumexp = check_bool("return_logsumexp", return_logsumexp)
    _check_known(q_offset=q_offset, window=window, alibi_slopes=alibi_slopes, sinks=sinks, kv_lens=kv_lens,
                 kv_starts=kv_starts)
    query, key, value = _as_dask("query", query), _as_dask("key", key), _as_dask("value", value)
    mask_is_dask = _is_dask("attn_mask", attn_mask)
    problem = check_problem(
        _outline(query), _outline(key), _outline(value), _outline(attn_mask) if mask_is_dask else attn_mask, dropout_p,
        is_causal, scale, enable_gqa, q_offset=q_offset, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, kv_lens=kv_lens, kv_starts=kv_starts, num_threads=num_threads, seed=seed)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if len(array.chunks[-1]) > 1:
            raise ValueError(f"{name}: expected {'head_dim_v' if name == 'value' else 'head_dim'} in one chunk, got "
                             f"chunks {array.chunks[-1]}; {name}.rechunk({{-1: -1}})")
    if q_offset is None and problem.is_causal and 0 < query.shape[-2] < key.shape[-2]:
        warn_of_first_keys(query.shape[-2], problem.of_batches["kv_lens"])
    if attn_mask is not None and not mask_is_dask:
        attn_mask = problem.given_mask
        if problem.options["mask_kind"] != BOOL:
            warn_of_0_and_1(attn_mask, problem.options["mask_kind"])
    return _graph(query, key, value, attn_mask, problem, num_threads, return_logsumexp)


def multi_head_attention(
    layer: cattn.MultiHeadAttention, query: Any, key: Any = None, value: Any = None, *, attn_mask: Any = None,
    key_mask: Any = None, is_causal: bool = False, q_offset: ArrayLike | str | None = None,
    window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
    alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None, kv_lens: ArrayLike | None = None,
    num_threads: int | None = None,
) -> Any:
    """layer(query, key, value, ...) of dask arrays that are cut along the batch, as a dask array.

    Parameters
    ----------
    layer : cattn.MultiHeadAttention
        As it is now: what is changed in it later changes nothing. Each worker gets it once.
    query : dask array (batch, seq_len_q, input_dim)
    key : dask array (batch, seq_len_kv, kdim), optional
    value : dask array (batch, seq_len_kv, vdim), optional
        Cut along the batch alone.
    attn_mask, key_mask : arrays of dask or NumPy, optional
        As in a call of the layer, in any chunks.
    is_causal, q_offset, window, softcap, alibi_slopes, sinks, kv_lens
        As in a call of the layer; NumPy arrays or numbers.
    num_threads : int, optional
        Threads of each task; its share when None, as in `scaled_dot_product_attention`.

    Returns
    -------
    out : dask array (batch, seq_len_q, embed_dim), dtype of the layer
        The bits of a call of the layer.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.
    ImportError
        Where dask is missing or older than 2023.7.

    Warns
    -----
    UserWarning
        As a call of the layer does; of a mask of 0 and 1 where it is computed.

    Examples
    --------
    ::

        out = multi_head_attention(layer, dask.array.from_zarr("tokens.zarr"), is_causal=True)
    """
    if not isinstance(layer, cattn.MultiHeadAttention):
        raise TypeError(f"layer: expected a cattn.MultiHeadAttention, got a {type(layer).__module__}."
                        f"{type(layer).__name__}")
    _check_known(q_offset=q_offset, window=window, alibi_slopes=alibi_slopes, sinks=sinks, kv_lens=kv_lens)
    inputs = {"query": query}
    for name, array in (("key", key), ("value", value)):
        if array is not None:
            inputs[name] = array
    inputs = {name: _as_dask(name, array) for name, array in inputs.items()}
    outlines = check_layer_inputs(layer, *(_outline(inputs[name]) if name in inputs else None
                                           for name in ("query", "key", "value")))
    if outlines[0].ndim != 3:
        raise ValueError(f"query: expected (batch, seq_len_q, {layer.input_dim}), cut along the batch, "
                         f"got shape {outlines[0].shape}")
    masks = {name: array for name, array in (("attn_mask", attn_mask), ("key_mask", key_mask)) if array is not None}
    masks_of = {"attn_mask": lambda mask: check_layer_mask(layer, mask, *outlines[:2]),
                "key_mask": lambda mask: check_key_mask(mask, outlines[1])}
    of_layer = {}
    for name, array in masks.items():
        of_layer[name] = masks_of[name](_outline(array) if _is_dask(name, array) else array)
    batch = len(outlines[0])
    heads = [np.broadcast_to(np.empty((), layer.dtype), (batch, num_heads, x.shape[1], layer.head_dim))
             for num_heads, x in zip((layer.num_heads, *[layer.num_kv_heads] * 2), outlines, strict=True)]
    problem = check_problem(
        *heads, of_layer.get("attn_mask"), 0.0, is_causal, None, False, q_offset=q_offset, window=window,
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, kv_lens=kv_lens, kv_starts=None,
        num_threads=num_threads, seed=None)
    for name, array in inputs.items():
        if any(len(chunks) > 1 for chunks in array.chunks[1:]):
            raise ValueError(f"{name}: expected chunks along the batch alone, got {array.chunks}; "
                             f"{name}.rechunk({{1: -1, 2: -1}})")
    if q_offset is None and problem.is_causal and 0 < outlines[0].shape[1] < outlines[1].shape[1]:
        warn_of_first_keys(outlines[0].shape[1], problem.of_batches["kv_lens"])
    return _layer_graph(layer, inputs, masks, problem, num_threads)


# What is checked.


@functools.cache
def _dask():
    """The modules of dask that are used."""
    library("dask", _OLDEST, "dask")
    import dask.array
    from dask.highlevelgraph import HighLevelGraph

    return dask, dask.array, HighLevelGraph


def _is_dask(name, x):
    """Whether x is a dask array, of known chunks. Of other collections of dask NumPy would make arrays by computing
    them."""
    dask, array, _ = _dask()
    if not dask.is_dask_collection(x):
        return False
    if not isinstance(x, array.core.Array):
        cure = ""
        if isinstance(x, array.Array):
            cure = '; without the option "array.query-planning" of dask it is one'
        raise TypeError(f"{name}: expected a dask array made of a graph, got a dask {type(x).__name__}{cure}")
    if any(math.isnan(n) for n in x.shape):
        raise ValueError(f"{name}: expected chunks of known sizes, got shape {x.shape}; "
                         f"{name}.compute_chunk_sizes() finds them")
    return True


def _check_known(**arguments):
    for name, x in arguments.items():
        if _dask()[0].is_dask_collection(x):
            raise TypeError(f"{name}: expected what is known when the graph is made, got a dask {type(x).__name__}; "
                            f"{name}.compute() is")


def _as_dask(name, x):
    return x if _is_dask(name, x) else _cut(as_array(name, x), None)


def _cut(x, chunks):
    """An array, of dask or NumPy, in these chunks; None: in one."""
    array = _dask()[1]
    if isinstance(x, array.core.Array):
        return x.rechunk(chunks)
    return array.from_array(x, chunks=-1 if chunks is None else chunks)


def _outline(x):
    """A NumPy array of the shape and dtype of x, with nothing in it, for the checks."""
    return np.broadcast_to(np.empty((), x.dtype), x.shape)


# Where things are cut.


def _refined(*chunks):
    """Those that begin wherever one of these does."""
    ends = sorted(set().union(*(itertools.accumulate(sizes) for sizes in chunks)))
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))


def _slices(chunks):
    return [slice(end - size, end) for size, end in zip(chunks, itertools.accumulate(chunks), strict=True)]


def _fitted(x, chunks):
    """x, whose axes are the last of these, in these chunks; an axis of 1 broadcasts."""
    chunks = chunks[len(chunks) - x.ndim :]
    return _cut(x, tuple((1,) if n == 1 else sizes for n, sizes in zip(x.shape, chunks, strict=True)))


def _places(chunks):
    """(index, slices) of each block."""
    for block in itertools.product(*(list(enumerate(_slices(sizes))) for sizes in chunks)):
        yield tuple(i for i, _ in block), tuple(part for _, part in block)


def _block(x, index):
    """The key of the block of a _fitted array at this index."""
    index = index[len(index) - x.ndim :]
    return x.name, *(0 if len(sizes) == 1 else i for i, sizes in zip(index, x.chunks, strict=True))


def _leading_chunks(arrays, leading, core, dropout):
    result = []
    for axis, size in enumerate(leading):
        chunks = [x.chunks[axis - len(leading) - core] for x in arrays
                  if x.ndim - core >= len(leading) - axis and x.shape[axis - len(leading) - core] == size]
        result.append(_refined(*chunks))
    if dropout:  # for which the batch rows of a task have to follow each other
        last = max((axis for axis, sizes in enumerate(result) if len(sizes) > 1), default=0)
        result[:last] = [(1,) * size for size in leading[:last]]
    return result


def _head_chunks(query, key, value):
    """Of key heads; and how many query heads each has."""
    group = query.shape[-3] // key.shape[-3]
    chunks = query.chunks[-3]
    if any(size % group for size in chunks):
        raise ValueError(f"query: expected chunks of heads in multiples of num_heads / num_kv_heads = {group}, got "
                         f"{chunks}; query.rechunk({{-3: {max(1, max(chunks) // group) * group}}})")
    return _refined([size // group for size in chunks], key.chunks[-3], value.chunks[-3]), group


# Graphs.


def _graph(query, key, value, mask, problem, num_threads, return_logsumexp):
    dask, array, HighLevelGraph = _dask()
    options, head_dim_v = problem.options, value.shape[-1]
    leading = _leading_chunks((query, key, value), problem.leading, 2 if problem.one_head else 3,
                              options["dropout_p"] > 0)
    heads, kv_heads = [], []  # no axis, or one
    if not problem.one_head:
        kv_chunks, group = _head_chunks(query, key, value)
        heads, kv_heads = [tuple(size * group for size in kv_chunks)], [kv_chunks]
    key_chunks = _refined(key.chunks[-2], value.chunks[-2])
    rows_chunks = [*leading, *heads, _refined(query.chunks[-2])]
    token = dask.base.tokenize(query, key, value, mask, options, problem.of_batches, num_threads)
    query = _fitted(query, [*rows_chunks, (query.shape[-1],)])
    key, value = (_fitted(x, [*leading, *kv_heads, key_chunks, (x.shape[-1],)]) for x in (key, value))
    arrays = [query, key, value]
    if mask is not None:
        mask = _fitted(mask, [*rows_chunks, key_chunks])
        arrays.append(mask)

    attend, merge, out_name, logsumexp_name = (
        f"{name}-{token}" for name in ("attend", "merge", "attention", "logsumexp"))
    tasks, outs, logsumexps = {}, {}, {}
    of_keys = _slices(key_chunks)
    kernel_sinks, merged_sinks = (options["sinks"], None) if len(of_keys) == 1 else (None, options["sinks"])
    for batch, slices in _places(leading):
        rows = _BatchRows(problem, slices)
        for i, queries in enumerate(_slices(rows_chunks[-1])):
            seen = rows.seen_keys(queries, of_keys)
            for head, own in _places(heads):
                place, part = (*batch, *head, i), own[0] if own else slice(0, 1)
                parts = {}
                for j in seen:
                    task = functools.partial(
                        _attend, **rows.options(queries, of_keys[j], part), num_threads=num_threads,
                        sinks=None if kernel_sinks is None else kernel_sinks[part])
                    blocks = [_block(query, (*place, 0)), *(_block(x, (*batch, *head, j, 0)) for x in (key, value))]
                    if mask is not None:
                        blocks.append(_block(mask, (*place, j)))
                    parts[j] = (attend, *place, j)
                    tasks[parts[j]] = (task, *blocks)
                sinks = None if merged_sinks is None else merged_sinks[part]
                whole = _merge_tree(tasks, parts, (merge, *place), len(of_keys), sinks, num_threads)
                if whole is None:
                    whole = (merge, *place, 0, 0)
                    shape = tuple(sizes[i] for i, sizes in zip(place, rows_chunks, strict=True))
                    tasks[whole] = (functools.partial(_nothing, shape, head_dim_v, problem.dtype),)
                outs[out_name, *place, 0] = (_result, whole, query.dtype)
                logsumexps[logsumexp_name, *place] = (_logsumexp, whole)

    graph = HighLevelGraph.from_collections(attend, tasks, dependencies=arrays)

    def collection(name, blocks, chunks, dtype):
        own = HighLevelGraph({**graph.layers, name: blocks}, {**graph.dependencies, name: {attend}})
        return array.Array(own, name, tuple(chunks), dtype=dtype)

    out = collection(out_name, outs, [*rows_chunks, (head_dim_v,)], query.dtype)
    if not return_logsumexp:
        return out
    return out, collection(logsumexp_name, logsumexps, rows_chunks, np.dtype(problem.dtype))


def _merge_tree(tasks, parts, name, count, sinks, num_threads):
    """The key of what the parts, {number of a chunk of keys: key}, become when they are merged; None where there is
    none. Which of `count` chunks come together follows from their numbers: a part that is not there is as one that sees
    nothing. The last task has the sinks, if there are any."""
    level = 0
    while parts and count > 1:
        level, count = level + 1, -(-count // _ARITY)
        groups, parts = parts, {}
        for number, group in itertools.groupby(groups.items(), lambda item: item[0] // _ARITY):
            keys = [key for _, key in group]
            last_sinks = sinks if count == 1 else None
            if len(keys) == 1 and last_sinks is None:
                parts[number] = keys[0]
            else:
                parts[number] = (*name, level, number)
                tasks[parts[number]] = (
                    functools.partial(_merge, sinks=last_sinks, num_threads=num_threads), *keys)
    return parts.get(0)


class _BatchRows:
    """Batch rows of a chunk: a slice of each leading axis."""

    def __init__(self, problem, slices):
        self._problem, leading = problem, problem.leading
        self._lengths = dict(problem.of_batches)
        self._slopes = self._lengths.pop("slopes")
        for name, array in self._lengths.items():
            self._lengths[name] = None if array is None else array.reshape(leading)[slices]
        if self._slopes is not None:
            self._slopes = (self._slopes[0] if len(self._slopes) == 1 else
                            self._slopes.reshape(*leading, self._slopes.shape[1])[slices])
        self._shape = tuple(part.stop - part.start for part in slices)
        self._first = sum(part.start * math.prod(leading[axis + 1 :]) for axis, part in enumerate(slices))

    def seen_keys(self, queries, chunks):
        """The numbers of the chunks in which one of these batch rows has a key that one of these queries sees."""
        if queries.start == queries.stop or 0 in self._shape:
            return []
        options, length = self._problem.options, self._problem.key.shape[-2]
        offset, end, start = (default if self._lengths[name] is None else self._lengths[name] for name, default in (
            ("q_offsets", options["q_offset"]), ("kv_lens", length), ("kv_starts", 0)))
        left, right = options["window_left"], options["window_right"]
        low, high = (np.reshape(x, -1)[:, None] for x in (start, end))
        offset = np.reshape(offset, -1)[:, None]
        if left != UNBOUNDED:
            low = np.maximum(low, queries.start + offset - left)
        if right != UNBOUNDED:
            high = np.minimum(high, queries.stop + offset + right)
        first, last = np.array([(keys.start, keys.stop) for keys in chunks]).T
        return np.flatnonzero((np.maximum(low, first) < np.minimum(high, last)).any(axis=0)).tolist()

    def options(self, queries, keys, heads):
        """Of _attend, for a task: positions count from the chunk's first key, and what is not cut does not."""
        options = self._problem.options
        shift, length = queries.start - keys.start, keys.stop - keys.start
        offset = self._lengths["q_offsets"]
        lengths = {name: None if self._lengths[name] is None else (self._lengths[name] - keys.start).clip(0, length)
                   for name in ("kv_lens", "kv_starts")}
        return {
            "q_offset": (options["q_offset"] if offset is None else offset) + shift, **lengths,
            "alibi_slopes": None if self._slopes is None else self._slopes[..., heads],
            "window": (options["window_left"], options["window_right"]),
            **{name: options[name] for name in ("scale", "softcap", "dropout_p", "seed")},
            "first": (self._first, heads.start, queries.start, keys.start)}


def _layer_graph(layer, inputs, masks, problem, num_threads):
    dask, array, HighLevelGraph = _dask()
    layer = copy.deepcopy(layer)
    chunks = _refined(*(x.chunks[0] for x in inputs.values()))
    options = {name: problem.options[name] for name in ("softcap", "sinks", "q_offset")}
    options["window"] = problem.options["window_left"], problem.options["window_right"]
    token = dask.base.tokenize(layer, inputs, masks, options, problem.of_batches, num_threads)
    name, layer_key = f"multi-head-attention-{token}", f"layer-{token}"

    arrays = {input_name: _cut(x, (chunks, *x.chunks[1:])) for input_name, x in inputs.items()}
    for mask_name, mask in masks.items():
        mask = mask if _is_dask(mask_name, mask) else as_array(mask_name, mask)
        cut = mask.ndim > 2 or mask_name == "key_mask"
        arrays[mask_name] = _fitted(mask, [chunks, *((n,) for n in mask.shape[1:])] if cut else
                                    [(n,) for n in mask.shape])
    blocks = {layer_key: layer}
    for i, part in enumerate(_slices(chunks)):
        offsets, kv_lens, slopes = (problem.of_batches[given] for given in ("q_offsets", "kv_lens", "slopes"))
        if offsets is not None:
            options["q_offset"] = offsets[part]
        if kv_lens is not None:
            options["kv_lens"] = kv_lens[part]
        if slopes is not None:
            options["alibi_slopes"] = slopes[0] if len(slopes) == 1 else slopes[part]
        task = functools.partial(_apply, tuple(arrays), num_threads, **options)
        blocks[name, i, 0, 0] = (task, layer_key, *(_block(x, (i, *[0] * (x.ndim - 1))) for x in arrays.values()))
    graph = HighLevelGraph.from_collections(name, blocks, dependencies=list(arrays.values()))
    shape = inputs["query"].shape
    return array.Array(graph, name, (chunks, (shape[1],), (layer.embed_dim,)), dtype=layer.dtype)


# Tasks.


def _attend(query, key, value, attn_mask=None, *, first, dropout_p, scale, num_threads, **options):
    """(out, logsumexp) of a chunk of the queries over one of the keys, both in the dtype computed in. `first`: the
    batch row, head, query and key that the chunks begin with."""
    batch, head, query_start, key_start = first
    problem = check_problem(
        cast(query, np.result_type(query.dtype, np.float32)), key, value, attn_mask, dropout_p, False, scale, False,
        num_threads=_share(num_threads), **options)
    out = np.empty((*problem.rows_shape, problem.value.shape[-1]), problem.dtype)
    logsumexp = np.empty(problem.rows_shape, problem.dtype)
    for rows, (result,), arguments in problem.calls(out):
        arguments["batch_offset"] += batch
        problem.module.attend(
            out=result, weights=None, narrow_weights=None, logsumexp=logsumexp.reshape(-1)[rows], head_offset=head,
            query_offset=query_start, key_offset=key_start, **arguments)
    return out, logsumexp


def _merge(*parts, sinks, num_threads):
    outs, logsumexps = zip(*parts, strict=True)
    if sinks is not None and logsumexps[0].ndim > 2:
        sinks = sinks[:, None]
    return cattn.merge_states(outs, logsumexps, sinks=sinks, num_threads=_share(num_threads))


def _nothing(rows_shape, head_dim_v, dtype):
    """What rows that see no key have."""
    return np.zeros((*rows_shape, head_dim_v), dtype), np.full(rows_shape, -np.inf, dtype)


def _result(part, dtype):
    return cast(part[0], dtype)


def _logsumexp(part):
    return part[1]


def _apply(names, num_threads, layer, *arrays, **options):
    arrays = dict(zip(names, arrays, strict=True))
    return layer(arrays.pop("query"), **arrays, num_threads=_share(num_threads), **options)


def _share(num_threads):
    """The threads of a task, so that those that run beside it have as many; None: as its process has it."""
    if num_threads is not None or _threads.is_chosen():
        return num_threads
    module = sys.modules.get("distributed.worker")
    try:
        worker = module and module.get_worker()
    except ValueError:  # a task of another scheduler
        worker = None
    if worker:
        state = worker.state
        return max(1, min(state.nthreads, _kernels.cpus) // max(1, len(state.executing) + len(state.ready)))
    return 1 if multiprocessing.parent_process() is not None else None
