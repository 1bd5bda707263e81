"""Keys and values of sequences that grow: an array of each, for each sequence and layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn._checks import cast
from cattn.reference._linear import to_bfloat16
from cattn.reference._serving import varlen_attention

__all__ = ["KVCache"]


class KVCache:
    """The keys and values of all layers of a model, for any number of sequences: see `cattn.KVCache`.

    There are no pages: page_size and max_tokens change nothing, and nbytes and num_free_pages are left out.

    dtype : "float32", "float16", "bfloat16", or another float dtype, to which numbers are rounded, to nearest even;
    or "int8": of each token and head, scale = max|x| / 127 in float32, and rint(x / scale), to nearest even, which is 0
    where the scale is 0, infinite or NaN, and in -127 to 127 where the scale is subnormal. That stands for
    scale * number: NaN in all places of a row with an infinity or NaN

    The arguments are described there. This does not check them, only what they ask for: KeyError where the sequence is
    not there; ValueError where it has an open step, where the step is not open, or has attended the layer.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, *, head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32, page_size: int = 64, max_tokens: int | None = None,
    ) -> None:
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.page_size = page_size
        # NumPy alone has no dtype of that name.
        self.dtype_name = "bfloat16" if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype).name
        self._sequences = {}    # {number: its _Sequence}
        self._next = 0

    # Sequences.

    def new(self) -> int:
        """An empty sequence: its number, which is never given again."""
        keys, values = (_stored(np.empty((0, self.num_kv_heads, dim), np.float32), self.dtype_name)
                        for dim in (self.head_dim, self.head_dim_v))
        return self._add(_Sequence(0, 0, [keys] * self.num_layers, [values] * self.num_layers))

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens."""
        parent = self._closed(sequence)
        return self._add(_Sequence(parent.length, parent.start, parent.keys.copy(), parent.values.copy()))

    def free(self, sequence: int) -> None:
        """The sequence is no more."""
        self._closed(sequence)
        del self._sequences[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        self._closed(sequence).cut(length)

    def drop(self, sequence: int, before: int) -> None:
        """Keys before position `before` do not exist from now on. Positions stay."""
        one = self._closed(sequence)
        one.start = max(one.start, before)

    def length(self, sequence: int) -> int:
        """Tokens of the sequence, dropped ones included."""
        return self._sequences[sequence].length

    # Steps.

    def extend(self, sequences: int | Sequence[int] | ArrayLike, counts: int | Sequence[int] | ArrayLike) -> Step:
        """Room for `counts` more tokens of each of these sequences, in every layer.

        The step is open until every layer has attended it: meanwhile its sequences can be neither extended nor forked,
        truncated, freed or dropped from.
        """
        members = [self._closed(int(number)) for number in np.atleast_1d(sequences)]
        counts = [int(count) for count in np.broadcast_to(np.atleast_1d(counts), len(members))]
        step = Step(members, counts)
        for one, count in zip(members, counts, strict=True):
            one.length, one.step = one.length + count, step
        return step

    def cancel(self, step: Step) -> None:
        """Takes an open step back: its sequences are as before `extend`."""
        step._check_open()
        for one, count in zip(step._members, step._counts, strict=True):
            one.cut(one.length - count)
        step._close()

    def attend(
        self, layer: int, step: Step, query: ArrayLike, key: ArrayLike, value: ArrayLike, *,
        scale: float | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        return_logsumexp: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Stores the keys and values of the step's tokens in a layer, then attends, causally: the step's queries of a
        sequence are the last ones of its keys, without those that are dropped.

        query : float array (total, num_heads, head_dim), packed as step.cu_seqlens_q says
        key, value : float arrays (total, num_kv_heads, head_dim or head_dim_v)
        out : array (total, num_heads, head_dim_v), dtype of the query
        logsumexp : array (total, num_heads), dtype computed in; with return_logsumexp
        """
        step._check_open()
        if layer in step._layers:
            raise ValueError(f"layer: expected one that the step has not attended, got {layer}")
        key, value = (_stored(np.asarray(x), self.dtype_name) for x in (key, value))
        cu_seqlens_q = np.cumsum([0, *step._counts])
        grown, seen_keys, seen_values = [], [key[:0]], [value[:0]]
        for one, (first, end) in zip(step._members, itertools.pairwise(cu_seqlens_q), strict=True):
            keys = np.concatenate([one.keys[layer], key[first:end]])
            values = np.concatenate([one.values[layer], value[first:end]])
            grown.append((keys, values))
            seen_keys.append(keys[one.start :])
            seen_values.append(values[one.start :])
        result = varlen_attention(
            query, np.concatenate(seen_keys), np.concatenate(seen_values), cu_seqlens_q,
            np.cumsum([len(keys) for keys in seen_keys]), is_causal=True, q_offset="end", scale=scale, window=window,
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, return_logsumexp=return_logsumexp)

        for one, (keys, values) in zip(step._members, grown, strict=True):
            one.keys[layer], one.values[layer] = keys, values
        step._layers.add(layer)
        if len(step._layers) == self.num_layers:
            step._close()
        return result

    # What is stored.

    def keys(self, layer: int, sequence: int) -> np.ndarray:
        """A new array (length, num_kv_heads, head_dim), float32 where bfloat16 or int8 is stored; NaN where keys are
        dropped, or a layer is missing in an open step."""
        one = self._sequences[sequence]
        return one.with_gaps(one.keys[layer])

    def values(self, layer: int, sequence: int) -> np.ndarray:
        """A new array (length, num_kv_heads, head_dim_v), likewise."""
        one = self._sequences[sequence]
        return one.with_gaps(one.values[layer])

    def _add(self, one):
        number = self._next
        self._next += 1
        self._sequences[number] = one
        return number

    def _closed(self, number):
        one = self._sequences[number]
        if one.step is not None:
            raise ValueError(f"sequence: expected one without an open step, got {number}")
        return one


class Step:
    """Tokens that ``KVCache.extend`` made room for, with positions, cu_seqlens_q and kv_lens."""

    def __init__(self, members, counts):
        self._members, self._counts = members, counts
        self._layers = set()    # that have attended
        self._is_open = True
        lens = [one.length for one in members]
        self.positions = np.array([i for n, count in zip(lens, counts, strict=True) for i in range(n, n + count)], int)
        self.cu_seqlens_q = np.cumsum([0, *counts])
        self.kv_lens = np.array(lens, int) + np.array(counts, int)

    def _check_open(self):
        if not self._is_open:
            raise ValueError("step: expected an open one")

    def _close(self):
        self._is_open = False
        for one in self._members:
            one.step = None


class _Sequence:
    """keys and values: of each layer an array (length, num_kv_heads, dim), shorter where an open step has not attended.
    Nothing is written to these, so that several sequences may have them."""

    def __init__(self, length, start, keys, values):
        self.length, self.start, self.keys, self.values, self.step = length, start, keys, values, None

    def cut(self, length):
        self.length, self.start = length, min(self.start, length)
        self.keys, self.values = ([x[:length] for x in arrays] for arrays in (self.keys, self.values))

    def with_gaps(self, array):
        result = np.full((self.length, *array.shape[1:]), np.nan, array.dtype)
        result[self.start : len(array)] = array[self.start :]
        return result


@np.errstate(all="ignore")
def _stored(x, dtype_name):
    """What a cache of this dtype makes of keys or values, as float32 where NumPy has no such floats."""
    if dtype_name == "bfloat16":
        return (to_bfloat16(cast(x, np.float32)).astype(np.uint32) << 16).view(np.float32)
    if dtype_name == "int8":
        x = cast(x, np.float32)
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        numbers = np.where((scale > 0) & (scale < np.inf), np.clip(np.rint(x / scale), -127, 127), np.float32(0))
        return scale * numbers.astype(np.int8)
    return cast(x, np.dtype(dtype_name))
