"""What cattn computes, in plain NumPy: obvious, slow, for every float dtype.

Each public function and class of `cattn` has a counterpart here with the same name and the same arguments
(`out` and `num_threads` aside); there, the arguments are described. The fast ones are tested against these; a
new behaviour starts here.
`scaled_dot_product_attention` does not check its arguments: `cattn.scaled_dot_product_attention` does. The
classes here are also the base of the fast ones, which do the costly steps in their own way.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

__all__ = [
    "MultiHeadAttention",
    "PositionalEncoding",
    "dropout_keep",
    "philox4x32",
    "relative_shift",
    "scaled_dot_product_attention",
    "sinusoidal_encoding",
]


@np.errstate(all="ignore")
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
    softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
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
    result_dtype = query.dtype
    dtype = _compute_dtype(query)
    one_head = query.ndim < 4
    if one_head:
        query, key, value = (np.expand_dims(x, -3) for x in (query, key, value))
    query, key, value = (x.astype(dtype, copy=False) for x in (query, key, value))

    leading = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    num_heads, seq_len_q, head_dim = query.shape[-3:]
    num_kv_heads, seq_len_kv = key.shape[-3:-1]
    query = np.broadcast_to(query, (*leading, num_heads, seq_len_q, head_dim))
    if num_kv_heads != num_heads:
        key, value = (np.repeat(x, num_heads // num_kv_heads, axis=-3) for x in (key, value))

    if one_head and attn_mask is not None and np.ndim(attn_mask) > 2:
        attn_mask = np.expand_dims(attn_mask, -3)
    scores, visible = _scores(
        query, key, attn_mask, is_causal, scale, q_offset=q_offset, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, kv_lens=kv_lens)

    row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    row_max = np.where(row_max == -np.inf, dtype.type(0), row_max)
    exps = np.exp(scores - row_max)
    row_sum = exps.sum(axis=-1, keepdims=True)
    logsumexp = (row_max + np.log(row_sum))[..., 0]
    if sinks is not None:
        row_sum = row_sum + np.exp(np.asarray(sinks).astype(dtype)[:, None, None] - row_max)
    weights = np.where(scores != -np.inf, exps / row_sum, dtype.type(0))
    if dropout_p:
        keep = dropout_keep(seed, dropout_p, math.prod(leading), num_heads, seq_len_q, seq_len_kv)
        weights = weights * keep.reshape(weights.shape) / dtype.type(1 - dropout_p)

    out = _weighted_sum(weights, value, visible)
    if one_head:
        out, weights, logsumexp = out.squeeze(-3), weights.squeeze(-3), logsumexp.squeeze(-2)
    results = [out.astype(result_dtype)]
    if return_weights:
        results.append(weights.astype(result_dtype))
    if return_logsumexp:
        results.append(logsumexp)
    return results[0] if len(results) == 1 else tuple(results)


def _scores(query, key, attn_mask=None, is_causal=False, scale=None, *, q_offset=None, window=None, softcap=0.0,
            alibi_slopes=None, kv_lens=None):
    """What the softmax is of, with -inf for masked keys; and which keys are not masked. For as many key heads as query
    heads."""
    dtype = query.dtype
    seq_len_q, head_dim = query.shape[-2:]
    scores = query @ key.swapaxes(-1, -2) * dtype.type(1 / math.sqrt(head_dim) if scale is None else scale)
    if softcap:
        scores = dtype.type(softcap) * np.tanh(scores / dtype.type(softcap))

    largest = np.finfo(dtype).max / 4  # so that a score can be added, in any unit
    key_index = np.arange(key.shape[-2])
    q_offset = np.asarray(0 if q_offset is None else q_offset, np.int64)
    position = np.arange(seq_len_q)[:, None] + q_offset[..., None, None, None]
    distance = key_index - position  # (batch, 1, seq_len_q, seq_len_kv)
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
    if kv_lens is not None:
        visible = visible & (key_index < np.asarray(kv_lens)[..., None, None, None])
    if attn_mask is not None:
        attn_mask = np.asarray(attn_mask)
        if attn_mask.dtype == bool:
            visible = visible & attn_mask
        else:
            bias = attn_mask.astype(_compute_dtype(attn_mask))
            bias = np.where(np.isinf(bias), bias, np.clip(bias, -largest, largest)).astype(dtype)
            visible = visible & (bias != -np.inf)
            scores = scores + bias
    scores = np.where(visible, scores, dtype.type(-np.inf))
    return scores, np.broadcast_to(visible, scores.shape)


def _weighted_sum(weights, value, visible):
    """weights @ value, where NaN and inf of a value row reach the queries that see it and no other."""
    finite = np.isfinite(value)
    out = weights @ np.where(finite, value, value.dtype.type(0))
    other_axes = tuple(axis for axis in range(value.ndim) if axis != value.ndim - 2)
    for j in np.flatnonzero(~finite.all(axis=other_axes)):
        row = np.where(finite[..., j, None, :], 0, value[..., j, None, :])
        out += np.where(visible[..., j, None], weights[..., j, None] * row, 0)
    return out


def philox4x32(counter, key) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four counter words and two key words to four random words.

    Parameters
    ----------
    counter : four ints or int arrays that broadcast, each taken modulo 2**32
    key : two ints below 2**32

    Returns
    -------
    words : four uint64 arrays with values below 2**32

    Notes
    -----
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Examples
    --------
    >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) & low for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def dropout_keep(
    seed: int | None, dropout_p: float, batch: int, num_heads: int, seq_len_q: int, seq_len_kv: int
) -> np.ndarray:
    """Which weights dropout keeps: philox(seed, batch, head, query, key) >= int(dropout_p * 2**32).

    A function of the indices alone: the same for any shape, batch mates and number of threads. Key j of query
    i takes word j % 4 of `philox4x32((j // 4, i, head_index, batch_index), (seed % 2**32, seed // 2**32))`.

    Parameters
    ----------
    seed : int in [0, 2**64), or None for a fresh one
    dropout_p : float in [0, 1)
    batch, num_heads, seq_len_q, seq_len_kv : int

    Returns
    -------
    keep : bool array (batch, num_heads, seq_len_q, seq_len_kv)

    Raises
    ------
    ValueError, TypeError
        If the seed is not such an int.

    Examples
    --------
    >>> dropout_keep(7, 0.5, 1, 1, 2, 6).astype(int)
    array([[[[1, 1, 0, 0, 0, 1],
             [0, 0, 1, 1, 0, 0]]]])
    """
    return _keep(seed, dropout_p, np.arange(batch), np.arange(num_heads), slice(0, seq_len_q), slice(0, seq_len_kv))


def _keep(seed, dropout_p, batch_index, head_index, rows, columns):
    """`dropout_keep` of these indices, and of slices of queries and of keys that start at a multiple of 4."""
    seed = _check_seed(seed)
    counter = (
        np.arange(columns.start // 4, -(-columns.stop // 4)),
        np.arange(rows.start, rows.stop)[:, None],
        head_index[:, None, None],
        batch_index[:, None, None, None],
    )
    words = np.stack(philox4x32(counter, (seed % 2**32, seed // 2**32)), axis=-1)
    words = words.reshape(len(batch_index), len(head_index), len(counter[1]), 4 * len(counter[0]))
    words = words[..., : columns.stop - columns.start]
    return words >= np.uint64(int(dropout_p * 2**32))


class _Parameter:
    """A weight or bias of a layer: what is assigned to it is checked, and cast to the layer's dtype.

    The layer keeps a view of its own, of the assigned array's memory where that can be used and trained in place, else
    of a copy. Calls take views of that in turn, and check them again: the shape and the dtype of what an attribute
    returns can be set as well."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, layer: object, owner: type | None = None) -> Any:
        if layer is None:
            return self
        try:
            return layer.__dict__[self.name]
        except KeyError:
            raise AttributeError(f"this layer has no {self.name} yet") from None

    def __set__(self, layer: Any, value: ArrayLike | None) -> None:
        array = layer._check_parameter(self.name, value, layer._shapes()[self.name])
        layer.__dict__[self.name] = array if array is None or array.flags.writeable else _copy(array, array.dtype)


class MultiHeadAttention:
    """Multi-head attention: concat_h(attention(x_q W_q,h^T, x_k W_k,h^T, x_v W_v,h^T)) @ W_o^T + b_o.

    in_proj_weight : array (embed_dim + 2 * num_kv_heads * head_dim, input_dim)
    in_proj_bias : array (embed_dim + 2 * num_kv_heads * head_dim,), or None
    out_proj_weight : array (embed_dim, embed_dim)
    out_proj_bias : array (embed_dim,), or None

    The arguments are described at `cattn.MultiHeadAttention`. Vaswani et al. 2017, section 3.2.2.
    """

    _dtypes = None  # names of the dtypes allowed; None: every float dtype

    in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias = (_Parameter() for _ in range(4))

    def __init__(
        self, embed_dim: int, num_heads: int, *, num_kv_heads: int | None = None,
        input_dim: int | None = None, bias: bool = True, dropout: float = 0.0, dtype: DTypeLike = np.float32,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self.embed_dim = _check_int("embed_dim", embed_dim, 1)
        self.num_heads = _check_int("num_heads", num_heads, 1)
        num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = _check_int("num_kv_heads", num_kv_heads, 1)
        self.input_dim = _check_int("input_dim", embed_dim if input_dim is None else input_dim, 1)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {_shown(embed_dim)}, "
                             f"got {_shown(num_heads)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {_shown(num_heads)}, got {_shown(num_kv_heads)}"
            )
        self.head_dim = self.embed_dim // self.num_heads
        self.dropout = _check_dropout("dropout", dropout)
        self.dtype = _check_dtype(dtype, self._dtypes)
        bias = _check_bool("bias", bias)

        try:
            rng = np.random.default_rng(seed)
        except (TypeError, ValueError) as error:
            raise type(error)(f"seed: expected an int >= 0 or a Generator, got {_shown(seed)}") from None
        shapes = self._shapes()
        if shapes["in_proj_weight"][0] * max(self.input_dim, self.embed_dim) > 2**58:
            raise ValueError(f"embed_dim: expected at most 2**58 elements in a weight, got embed_dim = {embed_dim} and "
                             f"input_dim = {self.input_dim}")
        for name, shape in shapes.items():
            if len(shape) == 2:
                setattr(self, name, _xavier_uniform(rng, *shape, self.dtype))
            else:
                setattr(self, name, np.zeros(shape, self.dtype) if bias else None)

    def __call__(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, is_causal: bool = False, q_offset: ArrayLike | None = None,
        window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
        alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, return_weights: bool = False, training: bool = False,
        seed: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Project, attend, project back: see `cattn.MultiHeadAttention`, which has num_threads besides.

        query : array (batch, seq_len_q, input_dim) or (seq_len_q, input_dim)
        key, value : arrays (batch, seq_len_kv, input_dim) or (seq_len_kv, input_dim); the query, the key when None
        out : array (batch, seq_len_q, embed_dim) or (seq_len_q, embed_dim)
        weights : array (batch, num_heads, seq_len_q, seq_len_kv); with return_weights
        """
        return self._forward(
            query, key, value, attn_mask, is_causal, return_weights, training,
            q_offset=q_offset, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            kv_lens=kv_lens, seed=seed,
        )

    def _forward(self, query, key, value, attn_mask, is_causal, return_weights, training, *, kv_lens, num_threads=None,
                 **options):
        query, key, value = self._check_inputs(query, key, value)
        if attn_mask is not None:
            attn_mask = self._check_mask(attn_mask, query, key)
        is_causal, return_weights = _check_bool("is_causal", is_causal), _check_bool("return_weights", return_weights)
        dropout_p = _check_dropout("dropout", self.dropout) if _check_bool("training", training) else 0.0
        batched = query.ndim == 3
        if kv_lens is not None:
            kv_lens = kv_lens if type(kv_lens) is int else _as_array("kv_lens", kv_lens)
        in_weight, in_bias, out_weight, out_bias = self._own_parameters().values()

        projected = self._project(query, key, value, in_weight, in_bias, num_threads)
        q, k, v = (self._split_heads(x) for x in projected)
        heads, weights = self._attend(q, k, v, attn_mask, return_weights, num_threads, is_causal=is_causal,
                                      kv_lens=kv_lens, dropout_p=dropout_p, **options)
        out = self._linear(heads, out_weight, out_bias, num_threads)
        if not batched:
            out, weights = out[0], weights[0] if return_weights else None
        return (out, weights) if return_weights else out

    # The steps that cattn.MultiHeadAttention does in its own way.

    def _project(self, query, key, value, weight, bias, num_threads):
        """(..., seq, input_dim) each to (..., seq, heads * head_dim) each."""
        return [self._linear(x, weight[rows], None if bias is None else bias[rows], num_threads)
                for x, rows in zip((query, key, value), self._rows(), strict=True)]

    def _attend(self, q, k, v, attn_mask, return_weights, num_threads, **options):
        """(batch, heads, seq, head_dim) each to (batch, seq_len_q, embed_dim), and the weights if wanted."""
        out, weights = scaled_dot_product_attention(q, k, v, attn_mask, return_weights=True, **options)
        return out.swapaxes(1, 2).reshape(len(q), q.shape[2], self.embed_dim), weights

    @np.errstate(all="ignore")
    def _linear(self, x, weight, bias, num_threads):
        """x @ weight^T + bias, rounded once to the dtype of x."""
        dtype = _compute_dtype(x)
        out = x.astype(dtype, copy=False) @ weight.astype(dtype, copy=False).T
        if bias is not None:
            out += bias
        return out.astype(x.dtype, copy=False)

    # The steps that both share.

    def _shapes(self):
        """{parameter: its shape}, for sizes that fit together: they are plain attributes."""
        if (self.num_kv_heads < 1 or self.num_heads * self.head_dim != self.embed_dim
                or self.num_heads % self.num_kv_heads):
            raise ValueError(
                f"embed_dim: expected num_heads * head_dim, and num_heads a multiple of num_kv_heads, got embed_dim = "
                f"{self.embed_dim}, num_heads = {self.num_heads}, head_dim = {self.head_dim}, "
                f"num_kv_heads = {self.num_kv_heads}"
            )
        rows = self.embed_dim + 2 * self.num_kv_heads * self.head_dim
        return {"in_proj_weight": (rows, self.input_dim), "in_proj_bias": (rows,),
                "out_proj_weight": (self.embed_dim, self.embed_dim), "out_proj_bias": (self.embed_dim,)}

    def _rows(self):
        """The rows of in_proj_weight and in_proj_bias that make q, k and v."""
        k_start, v_start = self.embed_dim, self.embed_dim + self.num_kv_heads * self.head_dim
        return slice(0, k_start), slice(k_start, v_start), slice(v_start, 2 * v_start - k_start)

    def _check_parameter(self, name, value, shape):
        """`value` as a C-contiguous, aligned array of this shape, in the layer's dtype; None where there is no bias."""
        if value is None and len(shape) == 1:
            return None
        array = _as_array(name, value)
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got shape {array.shape}")
        if array.dtype != self.dtype:
            if not _is_number(array.dtype):
                raise TypeError(f"{name}: expected a float or int array, got dtype {array.dtype}")
            array = _cast(array, self.dtype)
        return array if array.flags.c_contiguous and array.flags.aligned else _copy(array, self.dtype)

    def _own_parameters(self):
        """{parameter: a view that nobody else holds}, for one call: another thread may assign them meanwhile."""
        own, dtype = {}, self.dtype
        for name, shape in self._shapes().items():
            array = own[name] = getattr(self, name)
            if array is not None:
                view = own[name] = array[...]
                if not (view.shape == shape and view.dtype == dtype and view.flags.carray):  # rarely
                    own[name] = self._check_parameter(name, view, shape)
        return own

    def _split_heads(self, x):
        """(batch, seq, heads * head_dim), batch optional, to a view (batch, heads, seq, head_dim)."""
        x = x.reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim).swapaxes(-3, -2)
        return x if x.ndim == 4 else x[None]

    def _check_inputs(self, query, key, value):
        # The same array for two of them stays one: they are projected together.
        given_query, given_key, given_value = query, key, value
        query = _as_array("query", query)
        key = query if key is None or key is given_query else _as_array("key", key)
        value = (key if value is None or value is given_key else query if value is given_query
                 else _as_array("value", value))
        dim = self.input_dim
        for name, x, given in (("query", query, given_query), ("key", key, given_key), ("value", value, given_value)):
            if x.dtype != self.dtype:
                _raise_layer_dtype(name, x, given, self.dtype, "layer.dtype", dim)
        if query.ndim not in (2, 3) or query.shape[-1] != dim:
            cure = ""
            if query.shape == (dim,):
                cure = "; for one query: np.atleast_2d(query)"
            elif query.shape[-1:] == (self.head_dim,) and query.ndim == 4:
                cure = "; the layer makes the heads itself"
            elif query.ndim in (2, 3) and query.shape[-1]:
                cure = f"; a layer with input_dim={query.shape[-1]} takes it"
            raise ValueError(
                f"query: expected (batch, seq_len_q, {dim}) or (seq_len_q, {dim}), got shape {query.shape}{cure}"
            )
        if key.ndim != query.ndim or key.shape[:-2] != query.shape[:-2] or key.shape[-1] != dim:
            expected = ", ".join(str(size) for size in (*query.shape[:-2], "seq_len_kv", dim))
            raise ValueError(f"key: expected ({expected}), got shape {key.shape}")
        if value.shape != key.shape:
            raise ValueError(f"value: expected the shape of key, {key.shape}, got shape {value.shape}")
        return query, key, value

    def _check_mask(self, attn_mask, query, key):
        attn_mask = _as_array("attn_mask", attn_mask)
        batch, rows = len(query) if query.ndim == 3 else 1, (query.shape[-2], key.shape[-2])
        allowed = {2: rows, 3: (batch, *rows), 4: (batch, self.num_heads, *rows)}
        expected = allowed.get(attn_mask.ndim)
        if expected is None or any(n not in (1, m) for n, m in zip(attn_mask.shape, expected, strict=True)):
            cure = ""
            if attn_mask.shape == (rows[1],):
                cure = "; for a padding mask: mask[None, :], or kv_lens"
            elif attn_mask.shape == (batch, rows[1]):
                cure = "; for a padding mask: mask[:, None, None, :], or kv_lens"
            elif attn_mask.shape == (batch * self.num_heads, *rows):
                cure = f"; for one mask per batch row and head: mask.reshape{allowed[4]}"
            raise ValueError(
                f"attn_mask: expected {allowed[2]}, {allowed[3]} or {allowed[4]} (axes of 1 broadcast), "
                f"got shape {attn_mask.shape}{cure}"
            )
        return attn_mask[:, None] if attn_mask.ndim == 3 else attn_mask

    def __repr__(self) -> str:
        own = dict(self.__dict__)
        biases = {name: own.pop(name) for name in ("in_proj_bias", "out_proj_bias") if name in own}
        lacking = [name for name, bias in biases.items() if bias is None]
        own |= {"bias": False} if len(lacking) == 2 else dict.fromkeys(lacking)
        return _layer_text(self, own, {
            "embed_dim": ..., "num_heads": ..., "num_kv_heads": own.get("num_heads"), "input_dim": own.get("embed_dim"),
            "bias": True, "in_proj_bias": ..., "out_proj_bias": ..., "dropout": 0.0, "dtype": np.dtype(np.float32)})

    # State dicts.

    def state_dict(self, layout: str = "torch") -> dict[str, np.ndarray]:
        """A copy of the parameters, under the names and in the row order of another library.

        Parameters
        ----------
        layout : str
            Whose names.

            * "torch": in_proj_weight, in_proj_bias, out_proj.weight, out_proj.bias of its MultiheadAttention.
            * "torch_split": q_proj_weight, k_proj_weight, v_proj_weight for in_proj_weight, as it has them
              where kdim or vdim differ.
            * "tutorial": qkv_proj.* and o_proj.*, the rows of qkv_proj ordered [head][q, k, v][head_dim]; only
              for num_kv_heads == num_heads.
            * "d2l": W_q.*, W_k.*, W_v.*, W_o.*
            * "huggingface": q_proj.*, k_proj.*, v_proj.*, o_proj.*

        Returns
        -------
        state : dict of str to array

        Raises
        ------
        ValueError
            If there is no such layout, or not for this layer.
        """
        parameters = self._own_parameters()
        entries = self._layout(layout, parameters)
        return {key: _copy(parameters[name][rows], self.dtype) for key, (name, rows) in entries.items()}

    def load_state_dict(self, state: Mapping[str, ArrayLike], layout: str | None = None) -> None:
        """Take all parameters from a state dict; change nothing if anything is wrong with it.

        Parameters
        ----------
        state : mapping of str to float array
            Anything that numpy.asarray reads; cast to the dtype of the layer.
        layout : str, optional
            As in `state_dict`; from the names in `state` when None.

        Raises
        ------
        ValueError
            If keys are missing or unknown (both are listed), or a shape is wrong (key and both shapes are
            named).
        TypeError
            If `state` is not a mapping of names to float arrays.
        """
        if not isinstance(state, Mapping):
            cure = "; pass its .state_dict()" if hasattr(state, "state_dict") else ""
            raise TypeError(f"state: expected a mapping of names to arrays, got {type(state).__name__}{cure}")
        shapes = self._shapes()
        parameters = {name: getattr(self, name) for name in shapes}
        if layout is None:
            shared = {name: len(entries.keys() & set(state)) for name, entries in self._layouts(parameters).items()}
            layout = max(shared, key=shared.get)
        entries = self._layout(layout, parameters)
        missing, unknown = [k for k in entries if k not in state], [k for k in state if k not in entries]
        if missing or unknown:
            raise ValueError(
                f"state: expected the keys {list(entries)} (layout {layout!r}), got {_shown(list(state))}: "
                f"missing {missing}, unknown {unknown}"
            )

        loaded = {name: np.empty(shapes[name], self.dtype) for name, _ in entries.values()}
        for key, (name, rows) in entries.items():
            array, target = _as_array("state", state[key], f" for {key!r}"), loaded[name][rows]
            if not _is_float(array.dtype):
                raise TypeError(f"state: expected a float array for {key!r}, got dtype {array.dtype}")
            if array.shape != target.shape:
                raise ValueError(f"state: expected shape {target.shape} for {key!r}, got shape {array.shape}")
            loaded[name][rows] = _cast(array, self.dtype)
        for name, array in loaded.items():
            setattr(self, name, array)

    def _layout(self, name, parameters):
        layouts = self._layouts(parameters)
        if not (isinstance(name, str) and name in layouts):
            raise ValueError(f"layout: expected one of {list(layouts)}, got {_shown(name)}")
        if name == "tutorial" and self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"layout: expected num_kv_heads = num_heads = {self.num_heads} for 'tutorial', "
                f"got num_kv_heads = {self.num_kv_heads}"
            )
        return layouts[name]

    def _layouts(self, parameters):
        """{layout: {key: (parameter, rows)}}: entry `key` of a state dict is these rows of that parameter. Of those
        that are not None."""
        every, split = slice(None), dict(zip("qkv", self._rows(), strict=True))
        by_head = np.arange(3 * self.embed_dim).reshape(3, self.num_heads, self.head_dim).swapaxes(0, 1)

        def entries(out_prefix, in_prefixes):
            parts = [("in_proj", *part) for part in in_prefixes] + [("out_proj", out_prefix, every)]
            return {prefix + kind: (f"{name}_{kind}", rows) for name, prefix, rows in parts
                    for kind in ("weight", "bias") if parameters[f"{name}_{kind}"] is not None}

        torch = entries("out_proj.", [("in_proj_", every)])
        torch_split = {f"{x}_proj_weight": ("in_proj_weight", rows) for x, rows in split.items()} | torch
        del torch_split["in_proj_weight"]
        return {
            "torch": torch,
            "torch_split": torch_split,
            "tutorial": entries("o_proj.", [("qkv_proj.", by_head.ravel())]),
            "d2l": entries("W_o.", [(f"W_{x}.", rows) for x, rows in split.items()]),
            "huggingface": entries("o_proj.", [(f"{x}_proj.", rows) for x, rows in split.items()]),
        }


@np.errstate(all="ignore")
def sinusoidal_encoding(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, layout: str = "interleaved",
    endpoint: bool = False, positions: ArrayLike | None = None, dtype: DTypeLike = np.float32,
) -> np.ndarray:
    """P[r, 2i] = sin(pos / base^(2i / dim)), P[r, 2i + 1] = cos(same), with pos = offset + r or positions[r].

    table : array (length, dim)

    The angles are computed in float64, in `dtype` where that is wider. bfloat16 is rounded twice: NumPy gets there by
    way of float32. The arguments are described at `cattn.sinusoidal_encoding`; `dtype` is any float dtype here.
    """
    length, dim, base, offset, endpoint, positions = _check_table(
        length, dim, base, offset, layout, endpoint, positions)
    dtype = _check_dtype(dtype)
    wide = np.result_type(dtype, np.float64)
    sines, cosines = _columns(dim, layout)
    position = np.arange(offset, offset + length) if positions is None else positions
    angle = position.astype(wide)[:, None] / _periods(dim, base, endpoint, wide)
    table = np.empty((length, dim), dtype)
    table[:, sines] = np.sin(angle)
    table[:, cosines] = np.cos(angle[:, : len(cosines)])
    return table


@np.errstate(all="ignore")
def relative_shift(
    delta: int, dim: int, *, base: float = 10000.0, layout: str = "interleaved", endpoint: bool = False,
    dtype: DTypeLike = np.float64,
) -> np.ndarray:
    """R with P[pos + delta] = P[pos] @ R for every pos: it turns pair i by the angle delta / base^(2i / dim).

    Parameters
    ----------
    delta : int
        May be negative.
    dim : int >= 2, even
        The last sine of an odd dim has no cosine to turn with.
    base, layout, endpoint
        As in `sinusoidal_encoding`.
    dtype : float dtype

    Returns
    -------
    R : array (dim, dim)
        Orthogonal; relative_shift(-delta, dim) is its transpose.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.

    Notes
    -----
    Vaswani et al. 2017, "Attention is all you need", section 3.5.

    Examples
    --------
    >>> table = sinusoidal_encoding(60, 32, dtype=np.float64)
    >>> bool(np.allclose(table[:50] @ relative_shift(10, 32), table[10:]))
    True
    """
    delta = _check_int("delta", delta)
    if abs(delta) > 2**53:
        raise ValueError(f"delta: expected an int within +-2**53, got {_shown(delta)}")
    dim = _check_int("dim", dim, 1)
    if dim > 2**29:
        raise ValueError(f"dim: expected at most 2**58 elements in the matrix, got {_shown(dim)} * {_shown(dim)}")
    _, dim, base, _, endpoint, _ = _check_table(0, dim, base, 0, layout, endpoint)
    if dim % 2:
        raise ValueError(f"dim: expected an even number (an unpaired sine cannot be rotated), got {_shown(dim)}")
    dtype = _check_dtype(dtype)
    wide = np.result_type(dtype, np.float64)
    sines, cosines = _columns(dim, layout)
    angle = wide.type(delta) / _periods(dim, base, endpoint, wide)
    matrix = np.zeros((dim, dim), dtype)
    matrix[sines, sines] = matrix[cosines, cosines] = np.cos(angle)
    matrix[cosines, sines] = np.sin(angle)
    matrix[sines, cosines] = -np.sin(angle)
    return matrix


class PositionalEncoding:
    """dropout(x + P[:, :seq]), with P the table of `sinusoidal_encoding`: see `cattn.PositionalEncoding`.

    x, out : arrays (..., seq, dim)
    P : array (1, max_len, dim)
    """

    _table = staticmethod(sinusoidal_encoding)

    def __init__(
        self, dim: int, dropout: float = 0.0, max_len: int = 1000, *, base: float = 10000.0,
        layout: str = "interleaved", endpoint: bool = False, dtype: DTypeLike = np.float32,
    ) -> None:
        self.dim = _check_int("dim", dim, 1)
        self.dropout = _check_dropout("dropout", dropout)
        self._options = {"base": base, "layout": layout, "endpoint": endpoint, "dtype": dtype}
        max_len = _check_int("max_len", max_len, 0)
        if max(max_len, 1) * self.dim > 2**58:
            raise ValueError(f"max_len: expected at most 2**58 elements in the table, "
                             f"got {_shown(max_len)} * {_shown(dim)}")
        self.P = self._table(max_len, self.dim, **self._options)[None]

    def __repr__(self) -> str:
        own = self.__dict__ | self.__dict__.get("_options", {})
        shape = getattr(own.get("P"), "shape", ())
        if len(shape) == 3:
            own["max_len"] = shape[1]
        if "dtype" in own:
            own["dtype"] = np.dtype(own["dtype"])
        return _layer_text(self, own, {
            "dim": ..., "dropout": 0.0, "max_len": 1000, "base": 10000.0, "layout": "interleaved", "endpoint": False,
            "dtype": np.dtype(np.float32)})

    @np.errstate(all="ignore")
    def __call__(self, x: ArrayLike, *, training: bool = False, seed: int | None = None) -> np.ndarray:
        """Add the positions 0 to seq - 1.

        Parameters
        ----------
        x : array (..., seq, dim)
            What the positions are added to.
        training : bool
            Dropout happens only when True.
        seed : int in [0, 2**64), optional
            Of the dropout, fresh for each call when None. It is the generator of `dropout_keep`, with the
            column as key, the position as query, the flat index over the leading axes as batch, and head
            2**32 - 1, which no attention uses: a seed may serve both.

        Returns
        -------
        out : array (..., seq, dim)

        Raises
        ------
        ValueError, TypeError
            Naming the argument, the rule and what came.
        """
        given, x = x, _as_array("x", x)
        if x.dtype != self.P.dtype:
            _raise_layer_dtype("x", x, given, self.P.dtype, "layer.P.dtype", self.dim)
        if x.ndim < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected (..., seq, {self.dim}), got shape {x.shape}")
        *leading, seq, _ = x.shape
        table = self.P  # another thread may replace it meanwhile
        if np.ndim(table) != 3 or table.shape[::2] != (1, self.dim):
            raise ValueError(f"P: expected (1, rows, {self.dim}), got shape {np.shape(table)}")
        if seq > table.shape[1]:
            table = self.P = self._table(max(seq, 2 * table.shape[1]), self.dim, **self._options)[None]
        dropout = _check_dropout("dropout", self.dropout) if _check_bool("training", training) else 0.0
        seed = _check_seed(seed) if dropout else 0
        batch_index = np.arange(math.prod(leading)).reshape(leading)
        out = np.empty(x.shape, x.dtype)
        for piece in _pieces(x.shape):
            *batch, rows, columns = piece
            part = x[piece] + table[0, rows, columns]
            if dropout:
                keep = _keep(seed, dropout, batch_index[tuple(batch)].ravel(), np.array([2**32 - 1]), rows, columns)
                part = np.where(keep.reshape(part.shape), part / part.dtype.type(1 - dropout), part.dtype.type(0))
            out[piece] = part
        return out


def _pieces(shape):
    """Slices, one for each axis, that cut an array of this shape into pieces of at most 2**18 elements: these take
    0.1 ms, 10 ms with dropout; between two of them Python runs the handlers of signals. Columns are cut at multiples
    of 4, as many as share a counter of the random numbers."""

    def halves(piece):
        sizes = [part.stop - part.start for part in piece]
        if math.prod(sizes) <= 2**18:
            yield piece
            return
        axis = next(axis for axis, size in enumerate(sizes) if size > 1)
        start, stop = piece[axis].start, piece[axis].stop
        middle = start + sizes[axis] // 2
        if axis == len(sizes) - 1:
            middle -= middle % 4
        yield from halves((*piece[:axis], slice(start, middle), *piece[axis + 1 :]))
        yield from halves((*piece[:axis], slice(middle, stop), *piece[axis + 1 :]))

    return halves(tuple(slice(0, size) for size in shape))


def _periods(dim, base, endpoint, wide):
    """For each pair of columns, what a position is divided by to give its angle."""
    pair = np.arange((dim + 1) // 2).astype(wide)
    return wide.type(base) ** (pair / (dim // 2 - 1) if endpoint else 2 * pair / dim)


def _columns(dim, layout):
    """The columns of the sines and those of the cosines."""
    columns = np.arange(dim)
    if layout == "interleaved":
        return columns[0::2], columns[1::2]
    if layout == "concatenated":
        return columns[: (dim + 1) // 2], columns[(dim + 1) // 2 :]
    return columns[dim // 2 :], columns[: dim // 2]


def _xavier_uniform(rng, fan_out, fan_in, dtype):
    bound = math.sqrt(6 / (fan_in + fan_out))
    weight = np.empty(fan_out * fan_in, dtype)
    for first in range(0, weight.size, 2**18):  # signals are handled in between
        part = weight[first : first + 2**18]
        part[...] = _cast(rng.uniform(-bound, bound, part.size), dtype)
    return weight.reshape(fan_out, fan_in)


def _compute_dtype(x):
    return np.result_type(x.dtype, np.float32)


def _is_float(dtype):
    return dtype.kind == "f" or _is_bfloat16(dtype)


def _is_number(dtype):
    return dtype.kind in "iu" or _is_float(dtype)


def _is_bfloat16(dtype):
    """In native byte order: ml_dtypes reads the other one wrong, without a word."""
    return dtype.name == "bfloat16" and dtype.isnative


def _as_array(name, x, what=""):
    """The array that numpy.asarray makes of x, as a view of its own: another thread may set the shape of the caller's.

    An argument that makes none, in whatever way, is named; so is a masked array, since asarray drops the mask.
    """
    if type(x) is not np.ndarray:
        given = x
        if given is None:
            cure = "; for self-attention pass the same array as all three" if name in ("key", "value") else ""
            raise TypeError(f"{name}: expected an array{what}, got None{cure}")
        try:
            x = np.asanyarray(given)
        except MemoryError:
            raise
        except ValueError as error:  # such as rows of different lengths
            raise ValueError(f"{name}: expected an array{what}, got a {type(given).__name__} that makes none: "
                             f"{error}") from None
        except Exception as error:  # __array__ is foreign code
            raise TypeError(f"{name}: expected an array{what}, got "
                            f"{_torch_text(given) or f'a {type(given).__name__} that makes none: {error}'}") from error
        if x.dtype == object and x.ndim == 0 and not isinstance(given, (np.ndarray, np.generic, numbers.Number)):
            cure = "; np.from_dlpack(...) of it is one" if _is_on_cpu(given) else ""
            raise TypeError(f"{name}: expected an array{what}, got a {type(given).__name__}, which NumPy does not read "
                            f"as one{cure}")
        if _is_masked(x):
            raise TypeError(f"{name}: expected a plain array{what}, got a masked array, whose mask would be ignored; "
                            f"use .filled(...)")
        x = np.asarray(x)
    return x[...]


def _is_torch(x):
    """A tensor of torch, which this does not import: a class of it has a base from there, a Parameter too."""
    return any(str(base.__module__).partition(".")[0] == "torch" for base in type(x).__mro__)


def _torch_text(x):
    """What of a torch tensor keeps NumPy from reading it, or of the first in a list, and the calls that change that;
    "" for anything else."""
    what = "a torch tensor"
    if isinstance(x, (list, tuple)) and x:
        what, x = f"a {type(x).__name__} with a torch tensor", x[0]
    if not _is_torch(x):
        return ""
    device, dtype = str(getattr(x, "device", "cpu")), str(getattr(x, "dtype", ""))
    if device == "meta":  # where there are no numbers
        return ""
    reasons, calls = [], ""
    if getattr(x, "requires_grad", False) is True:
        reasons, calls = [*reasons, "requires grad"], calls + ".detach()"
    if device.partition(":")[0] != "cpu":
        reasons, calls = [*reasons, f"is on {device}"], calls + ".cpu()"
    bits = ""
    if dtype.startswith(("torch.bfloat16", "torch.float8")):
        reasons.append(f"is {dtype.partition('.')[2]}, which NumPy has not")
        if dtype == "torch.bfloat16":
            bits = f", or with ml_dtypes {calls}.view(torch.int16).numpy().view(ml_dtypes.bfloat16)"
        calls += ".float()"
    return f"{what} that {' and '.join(reasons)}; pass its {calls}{bits}" if reasons else ""


def _is_on_cpu(x):
    """Whether x offers its memory by DLPack, and NumPy could read it: 1 is the device "CPU" of DLPack's header."""
    try:
        return hasattr(x, "__dlpack__") and x.__dlpack_device__()[0] == 1
    except Exception:  # foreign code
        return False


def _cast_cure(name, given, dtype):
    """How to cast what was given as `name` to `dtype`, which is text as well; a list has no astype."""
    return f"{name}.astype({dtype})" if isinstance(given, np.ndarray) else f"np.asarray({name}, {dtype})"


def _raise_layer_dtype(name, array, given, dtype, dtype_text, dim):
    """The TypeError of an input that has not the layer's dtype; `dim` is the length that its last axis should have."""
    cure = ""
    if array.dtype.kind in "iu" and array.shape[-1:] != (dim,):
        cure = "; token numbers are looked up in an embedding first"
    elif array.dtype.kind in "US":
        cure = "; tokens are looked up in an embedding first"
    elif _is_number(array.dtype):
        cure = f"; {_cast_cure(name, given, dtype_text)} casts"
    raise TypeError(f"{name}: expected the dtype of the layer, {dtype}, got {array.dtype}{cure}")


def _is_masked(x):
    """Of numpy.ma, which this does not import: without it there are none."""
    return issubclass(type(x), getattr(sys.modules.get("numpy.ma"), "MaskedArray", ()))


def _cast(array, dtype):
    """`array` in this dtype, itself where it has it already. What overflows is infinite, in silence, whatever the
    caller's numpy.errstate."""
    return array if array.dtype == dtype else _copy(array, dtype)


def _copy(array, dtype):
    """A copy in this dtype, made in pieces: between two of them Python runs the handlers of signals."""
    result = np.empty(array.shape, dtype)
    with np.errstate(all="ignore"):
        for piece in _pieces(array.shape):
            result[piece] = array[piece]
    return result


def _shown(value):
    """`value` in the words of an error, shortened: str() refuses integers of thousands of digits, and what others write
    may raise."""
    try:
        text = str(value) if isinstance(value, numbers.Number) else repr(value)
    except Exception:
        return (f"an int of {value.bit_length()} bits" if isinstance(value, int)
                else f"a {type(value).__name__} that cannot be shown")
    return text if len(text) <= 200 else f"{text[:200]}..."


def _layer_text(layer, own, defaults):
    """The call that makes such a layer: which of `own` are not these defaults. A layer may be half made, as a debugger
    shows it, and its attributes may be anything."""
    texts = []
    for name, default in defaults.items():
        value = own.get(name, default)
        comparable = all(isinstance(x, (numbers.Number, str, np.bool_, np.dtype)) for x in (value, default))
        if not (value is default or (comparable and value == default)):
            texts.append(f"{name}={value.name if isinstance(value, np.dtype) else _shown(value)}")
    return f"{type(layer).__name__}({', '.join(texts)})"


def _check_bool(name, value):
    if value is not True and value is not False and not isinstance(value, np.bool_):
        raise TypeError(f"{name}: expected a bool, got {_shown(value)}")
    return bool(value)


def _check_int(name, value, minimum=None):
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {_shown(value)}") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {_shown(value)}")
    return value


def _check_dropout(name, value):
    if not isinstance(value, (float, numbers.Real)):  # float first: the test of an abstract class takes long
        cure = "; 0.0 is off" if value is None else ""
        raise TypeError(f"{name}: expected a float in [0, 1), got {_shown(value)}{cure}")
    if not 0 <= value < 1 or float(value) == 1:  # a Fraction or a long double may round to 1
        raise ValueError(f"{name}: expected a float in [0, 1), got {_shown(value)}")
    return float(value)


def _check_seed(seed):
    if hasattr(seed, "integers"):  # a numpy.random.Generator
        raise TypeError(f"seed: expected an int, got a {type(seed).__name__}; int(seed.integers(2**63)) draws one")
    seed = int.from_bytes(os.urandom(8), "little") if seed is None else _check_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"seed: expected an int below 2**64, got {_shown(seed)}")
    return seed


def _check_dtype(dtype, names=None):
    """numpy.dtype(dtype), if it is a float dtype and one of these names."""
    expected = "a float dtype" if names is None else "one of " + ", ".join(names)
    try:
        result = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        cure = f"; as text: {str(dtype).partition('.')[2]!r}" if _is_torch(dtype) else ""
        raise TypeError(f"dtype: expected {expected}, got {_shown(dtype)}{cure}") from None
    allowed = _is_float(result) if names is None else result.name in names
    if dtype is None or not allowed or not result.isnative:
        raise TypeError(f"dtype: expected {expected}, got {_shown(dtype)}")
    return result


def _check_table(length, dim, base, offset, layout, endpoint, positions=None):
    """The numbers as such, and `positions` as a new array."""
    length, dim = _check_int("length", length, 0), _check_int("dim", dim, 1)
    offset = _check_int("offset", offset)
    if max(length, 1) * dim > 2**58:
        raise ValueError("length: expected at most 2**58 elements in the table, "
                         f"got {_shown(length)} * {_shown(dim)}")
    if not -(2**53) <= offset <= 2**53 - length:
        raise ValueError(f"offset: expected positions within +-2**53, got {_shown(offset)} and length {length}")
    if not isinstance(base, numbers.Real):
        raise TypeError(f"base: expected a finite float >= 1, got {_shown(base)}")
    try:
        number = float(base)
    except OverflowError:  # an int
        number = math.inf
    if not 1 <= number < math.inf:  # below 1, angles and their errors would outgrow the positions
        raise ValueError(f"base: expected a finite float >= 1, got {_shown(base)}")
    if not (isinstance(layout, str) and layout in ("interleaved", "concatenated", "cosines_first")):
        raise ValueError(f"layout: expected 'interleaved', 'concatenated' or 'cosines_first', got {_shown(layout)}")
    endpoint = _check_bool("endpoint", endpoint)
    if endpoint and (dim % 2 or dim < 4):
        raise ValueError("dim: expected an even number >= 4 with endpoint=True, where dim / 2 - 1 steps lead from "
                         f"frequency 1 to 1 / base, got {_shown(dim)}")
    if positions is not None:
        if offset:
            raise ValueError(f"offset: expected 0 with positions, got {_shown(offset)}")
        positions = _check_positions(positions, length)
    return length, dim, base, offset, endpoint, positions


@np.errstate(all="ignore")
def _check_positions(positions, length):
    positions = _as_array("positions", positions)
    if not _is_number(positions.dtype):
        raise TypeError(f"positions: expected a float or int array, got dtype {positions.dtype}")
    if positions.shape != (length,):
        raise ValueError(f"positions: expected one for each row, shape ({length},), got shape {positions.shape}")
    if positions.dtype.kind in "iu":  # wide enough for the bound, and exact at it
        checked = positions.astype(np.uint64 if positions.dtype.kind == "u" else np.int64)
    else:
        checked = positions.astype(np.result_type(positions.dtype, np.float64))
    if length:
        for worst in (checked.min(), checked.max()):  # NaN, if there is one
            if not -(2**53) <= worst.item() <= 2**53:
                raise ValueError(f"positions: expected finite numbers within +-2**53, got {worst}")
    return checked
