"""Keys and values of sequences that grow: pages from a pool, shared where sequences have a beginning in common."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn import _kernels
from cattn._attention import check_options
from cattn._checks import (
    BF16,
    F16,
    F32,
    I8,
    UNBOUNDED,
    as_array,
    check_bool,
    check_int,
    check_kind,
    out_or_new,
    shown,
)
from cattn._threads import checked

__all__ = ["KVCache"]

_KINDS = {"float32": F32, "float16": F16, "bfloat16": BF16, "int8": I8}
_SLAB_BYTES = 1 << 24  # pages are allocated so many bytes at a time: the first token of a small model takes no more
_ALIGNMENT = 64     # of pages and of what is in them, as in _kernels/attention/entry.pxi
# Of attend without options, as the kernel takes them: causal.
_PLAIN = {"window_left": UNBOUNDED, "window_right": 0, "scale": None, "softcap": 0.0, "slopes": None, "sinks": None}


class KVCache:
    """The keys and values of all layers of a model, for any number of sequences, in pages.

    A sequence grows by `extend`, which takes room for new tokens in every layer, and `attend`, which stores a layer's
    keys and values there and attends, causally. Nothing that is stored moves; the pool of pages grows by slabs.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int >= 1
        Of the model.
    head_dim_v : int >= 1, optional
        Of the values; head_dim when None.
    dtype : "float32", "float16", "bfloat16" or "int8", or a dtype of that name
        What is stored. Queries, keys and values come as float32, or in this dtype (bfloat16: that of ml_dtypes), over
        int8 also in any of 16 bits. int8 is symmetric, with a float32 scale for each token and head: see Notes.
    page_size : int >= 1
        Tokens in a page. Sequences share whole pages; and on average half a page of each is empty.
    max_tokens : int >= 0, optional
        What the pool may hold, rounded up to whole pages; as much as there is memory when None.

    Attributes
    ----------
    nbytes : int
        Of the pool.
    num_free_pages : int
        That the pool has now, without growing.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, with nothing changed.
    KeyError
        For a sequence that was never made, or is freed.
    MemoryError
        From `extend`, with nothing changed: the pool is full, or there is no memory.

    Notes
    -----
    PagedAttention: Kwon et al. 2023, arXiv:2309.06180. Threads may attend different layers, or steps, at the same
    time; everything else takes a lock.

    Each row has the bits that `scaled_dot_product_attention` gives it on the same keys in one array (int8:
    `paged_attention` in pages of any size): neither pages, nor the other sequences, nor into which chunks a prompt was
    cut, change any.

    int8: the scale of a row x of keys or values is max|x| / 127, its numbers are x / scale rounded to nearest even, so
    that each is off by max|x| / 254 at most. Scores are then off by at most e = scale * sum|q| * max|k| / 254, the
    weights of a row together by 2 tanh(e / 2), and a column of the result by tanh(e / 2) times the spread of the
    values in it, plus max|v| / 254. A row with an infinity or NaN is NaN as a whole.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cache = KVCache(num_layers=1, num_kv_heads=2, head_dim=8)
    >>> a, b = cache.new(), cache.new()
    >>> step = cache.extend([a, b], [5, 1])                 # a prompt of 5 tokens, and one of 1
    >>> step.positions
    array([0, 1, 2, 3, 4, 0])
    >>> x = rng.standard_normal((6, 2, 8), np.float32)      # (total, heads, head_dim)
    >>> out = cache.attend(0, step, x, x, x)
    >>> step = cache.extend([a, b], 1)                      # one more token of each
    >>> x = rng.standard_normal((2, 2, 8), np.float32)
    >>> cache.attend(0, step, x, x, x).shape, cache.length(a)
    ((2, 2, 8), 6)
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, *, head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32, page_size: int = 64, max_tokens: int | None = None,
    ) -> None:
        self.num_layers = check_int("num_layers", num_layers, 1)
        self.num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
        self.head_dim = check_int("head_dim", head_dim, 1)
        self.head_dim_v = self.head_dim if head_dim_v is None else check_int("head_dim_v", head_dim_v, 1)
        self.page_size = check_int("page_size", page_size, 1)
        self.dtype_name = _dtype_name(dtype)
        self._kind = _KINDS[self.dtype_name]
        self._storage = np.dtype(np.uint16 if self._kind == BF16 else self.dtype_name)
        # A page has its tokens of all layers: of each these parts, [num_kv_heads][page_size][dim], one after the other.
        parts = [(self._storage, self.head_dim), (self._storage, self.head_dim_v)]
        if self._kind == I8:
            parts += [(np.dtype(np.float32), 1)] * 2    # scales of keys and of values
        self._parts, self._layer_bytes = [], 0          # (where it begins, its bytes, dtype, dim)
        for storage, dim in parts:
            size = self.num_kv_heads * self.page_size * dim * storage.itemsize
            self._parts.append((self._layer_bytes, size, storage, dim))
            self._layer_bytes += _aligned(size)
        self._page_bytes = self.num_layers * self._layer_bytes
        self._slab_pages = max(1, _SLAB_BYTES // self._page_bytes)
        if max(self._page_bytes * self._slab_pages, self.page_size) > 2**46:
            raise ValueError(f"page_size: expected a page of less than 2**46 bytes, got {self._page_bytes}")
        self._max_pages = None if max_tokens is None else -(-check_int("max_tokens", max_tokens, 0) // self.page_size)
        self._lock = threading.RLock()
        self._slabs = []            # in the order of their addresses, where the first does not lie first
        self._starts = []           # of each, from the first, in bytes
        self._first_pages = {}      # {layer: what _pages has found}
        self._free = []             # offsets of pages from the first slab, in bytes: a page is known by its offset
        self._owners = {}           # {page: how many sequences have it}
        self._sequences = {}        # {number: its _Sequence}
        self._next = 0

    # Sequences.

    def new(self) -> int:
        """An empty sequence: its number, which is never given again."""
        with self._lock:
            return self._add(_Sequence())

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. The two share every page; the last one is copied when either grows."""
        with self._lock:
            parent = self._closed(sequence)
            child = _Sequence()
            child.pages, child.length, child.start = parent.pages.copy(), parent.length, parent.start
            for page in child.pages:
                if page is not None:
                    self._owners[page] += 1
            return self._add(child)

    def free(self, sequence: int) -> None:
        """The sequence is no more; pages that no other one has return to the pool."""
        with self._lock:
            gone = self._closed(sequence)
            del self._sequences[sequence]
            self._release(gone.pages)

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        with self._lock:
            one = self._closed(sequence)
            length = check_int("length", length, 0)
            if length > one.length:
                raise ValueError(f"length: expected at most the sequence's, {one.length}, got {shown(length)}")
            keep = -(-length // self.page_size)
            self._release(one.pages[keep:])
            del one.pages[keep:]
            one.length, one.start = length, min(one.start, length)

    def drop(self, sequence: int, before: int) -> None:
        """Keys before position `before` do not exist from now on; whole pages of them return. Positions stay."""
        with self._lock:
            one = self._closed(sequence)
            before = check_int("before", before, 0)
            if before > one.length:
                raise ValueError(f"before: expected at most the sequence's length, {one.length}, got {shown(before)}")
            one.start = max(one.start, before)
            for index in range(one.start // self.page_size):
                self._release(one.pages[index : index + 1])
                one.pages[index] = None

    def length(self, sequence: int) -> int:
        """Tokens of the sequence, dropped ones included."""
        with self._lock:
            return self._of(sequence).length

    # Steps.

    def extend(self, sequences: int | Sequence[int] | ArrayLike, counts: int | Sequence[int] | ArrayLike) -> Step:
        """Room for `counts` more tokens of each of these sequences, in every layer.

        All pages that the step needs are taken here, copies of shared ones included, or none. The step is open until
        every layer has attended it: meanwhile its sequences can be neither extended nor forked, truncated, freed or
        dropped from.
        """
        numbers = _ints("sequences", sequences)
        counts = _ints("counts", counts)
        if len(counts) == 1:
            counts = counts * len(numbers)
        if len(counts) != len(numbers):
            raise ValueError(f"counts: expected one, or one for each of {len(numbers)} sequences, got {len(counts)}")
        if counts and min(counts) < 0:
            raise ValueError(f"counts: expected ints >= 0, got {shown(min(counts))}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"sequences: expected each one once, got {shown(numbers)}")
        with self._lock:
            members = [self._closed(number) for number in numbers]
            step = Step(self, numbers, members, counts)
            # A shared page that a step replaces stays the step's until it closes, since it may be cancelled: so each
            # of several sequences that share it and grow takes a copy.
            self._grow(sum(-(-(one.length + count) // self.page_size) - len(one.pages) + self._needs_own(one, count)
                           for one, count in zip(members, counts, strict=True)))
            try:
                for one, count in zip(members, counts, strict=True):
                    one.step = step
                    if self._needs_own(one, count):
                        step._replaced[one], one.pages[-1] = one.pages[-1], self._take()
                        if step._replaced[one] is not None:
                            self._bytes(one.pages[-1])[:] = self._bytes(step._replaced[one])
                    one.length += count
                    one.pages += [self._take() for _ in range(-(-one.length // self.page_size) - len(one.pages))]
                step._describe()
            except BaseException:
                self._undo(step)
                raise
            return step

    def cancel(self, step: Step) -> None:
        """Takes an open step back: its sequences are as before `extend`."""
        with self._lock:
            self._check_open(step)
            if step._running:
                raise ValueError("step: expected one that no thread is attending")
            self._undo(step)

    def attend(
        self, layer: int, step: Step, query: ArrayLike, key: ArrayLike, value: ArrayLike, *,
        scale: float | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        return_logsumexp: bool = False, out: np.ndarray | None = None, num_threads: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Stores the keys and values of the step's tokens in a layer, then attends, causally.

        Parameters
        ----------
        layer : int
            Each one once in a step, in any order.
        step : Step
            An open one of this cache.
        query : array (total, num_heads, head_dim)
            Of the step's tokens, packed as step.cu_seqlens_q says. float32, or the cache's dtype.
        key, value : array (total, num_kv_heads, head_dim or head_dim_v)
            Of the same dtype as the query.
        scale, window, softcap, alibi_slopes, sinks, return_logsumexp, out, num_threads
            As in `varlen_attention`.

        Returns
        -------
        out : array (total, num_heads, head_dim_v), dtype of the query
        logsumexp : array (total, num_heads); with return_logsumexp
        """
        if (scale is window is alibi_slopes is sinks is out is num_threads is None and return_logsumexp is False
                and type(softcap) is float and softcap == 0 and type(step) is Step and type(layer) is int
                and 0 <= layer < self.num_layers):
            result = self._attend(layer, step, _kernels.f32.attend_step_short, query, key, value)
            if result is not None:
                return result
        query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
        return_logsumexp = check_bool("return_logsumexp", return_logsumexp)
        kind = self._check_rows(step, query, key, value)
        layer = self._check_layer(layer)
        total, num_heads, _ = query.shape
        num_threads = 0 if num_threads is None else checked(num_threads)
        if scale is window is alibi_slopes is sinks is None and type(softcap) is float and softcap == 0:
            options = _PLAIN
        else:
            options = check_options(
                F32, num_heads, (len(step._counts),), is_causal=True, scale=scale, window=window, softcap=softcap,
                dropout_p=0.0, seed=None, alibi_slopes=alibi_slopes, sinks=sinks, num_threads=None)
            options = {name: options[name] for name in _PLAIN}
        shape = (total, num_heads, self.head_dim_v)
        out, target = out_or_new(out, shape, query.dtype, {
            "query": query, "key": key, "value": value, "alibi_slopes": options["slopes"], "sinks": options["sinks"]})
        logsumexp = np.empty(shape[:2], np.float32) if return_logsumexp else None
        self._attend(layer, step, _kernels.f32.attend_step if total else _nothing_to_attend, query, key, value, target,
                     kind, None if logsumexp is None else logsumexp.reshape(-1), num_threads=num_threads, **options)
        return (out, logsumexp) if return_logsumexp else out

    def _attend(self, layer, step, entry, query, key, value, *arguments, **options):
        """What an entry of the kernels returns. None, or an error: the layer is still missing."""
        result = None
        pages = self._first_pages.get(layer)
        with self._lock:
            if step._is_closed or step._cache is not self:
                self._check_open(step)
            if layer in step._layers:
                raise ValueError(f"layer: expected one that the step has not attended, got {layer}")
            step._layers.add(layer)
            step._running += 1
        try:
            result = entry(query, key, value, pages or self._pages(layer), step._layout, self._kind, *arguments,
                           **options)
        finally:
            with self._lock:
                step._running -= 1
                if result is None:
                    step._layers.discard(layer)
                else:
                    step._done.add(layer)
                    if len(step._done) == self.num_layers:
                        self._release(step._replaced.values())
                        step._close()
        return result

    # What is stored.

    def keys(self, layer: int, sequence: int) -> np.ndarray:
        """A new array (length, num_kv_heads, head_dim), float32 where bfloat16 or int8 is stored; NaN where keys are
        dropped, or a layer is missing in an open step."""
        return self._gathered(layer, sequence, 0)

    def values(self, layer: int, sequence: int) -> np.ndarray:
        """A new array (length, num_kv_heads, head_dim_v), likewise."""
        return self._gathered(layer, sequence, 1)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return len(self._slabs) * self._slab_pages * self._page_bytes

    @property
    def num_free_pages(self) -> int:
        with self._lock:
            free = len(self._free)
            return free if self._max_pages is None else min(free, self._max_pages - len(self._owners))

    def __repr__(self):
        return (f"KVCache({self.num_layers}, {self.num_kv_heads}, {self.head_dim}, dtype={self.dtype_name!r}, "
                f"page_size={self.page_size}): {len(self._sequences)} sequences, {len(self._owners)} pages in use")

    def _gathered(self, layer, sequence, which):
        layer = self._check_layer(layer)
        with self._lock:
            one = self._of(sequence)
            known = one.length
            if one.step is not None and layer not in one.step._done:
                known -= one.step._counts[one.step._members.index(one)]
            result = np.full((one.length, self.num_kv_heads, self._parts[which][-1]), np.nan,
                             np.float16 if self._kind == F16 else np.float32)
            for index, page in enumerate(one.pages):
                low, high = index * self.page_size, min(known, (index + 1) * self.page_size)
                first = max(low, one.start)
                if first >= high:
                    continue
                rows, *scales = (part[0].swapaxes(0, 1)[first - low : high - low]
                                 for part in self._split(self._bytes(page), layer)[which::2])
                if self._kind == BF16:
                    rows = (rows.astype(np.uint32) << 16).view(np.float32)
                with np.errstate(all="ignore"):  # a scale may be anything
                    result[first:high] = rows * scales[0] if scales else rows
            return result

    # The pool. Pages are known by where they begin, in bytes from the first slab.

    def _add(self, sequence):
        number = self._next
        self._next += 1
        self._sequences[number] = sequence
        return number

    def _of(self, number):
        try:
            return self._sequences[number]
        except (KeyError, TypeError):
            raise KeyError(f"sequence: expected one that new() or fork() gave and that is not freed, "
                           f"got {shown(number)}") from None

    def _closed(self, number):
        one = self._of(number)
        if one.step is not None:
            raise ValueError(f"sequence: expected one without an open step, got {shown(number)}, of whose step "
                             f"{self.num_layers - len(one.step._done)} layers are missing; attend them, or cancel it")
        return one

    def _check_layer(self, layer):
        layer = check_int("layer", layer, 0)
        if layer >= self.num_layers:
            raise ValueError(f"layer: expected an int below num_layers = {self.num_layers}, got {shown(layer)}")
        return layer

    def _check_open(self, step):
        if not isinstance(step, Step) or step._cache is not self:
            raise ValueError(f"step: expected one that this cache's extend() returned, got {shown(step)}")
        if step._is_closed:
            raise ValueError("step: expected an open one, got one that every layer has attended, or that was cancelled")

    def _check_rows(self, step, query, key, value):
        """The kind of all three."""
        if not isinstance(step, Step):
            self._check_open(step)
        total = sum(step._counts)
        kind = check_kind("query", query)
        if kind not in ((F32, F16, BF16) if self._kind == I8 else (F32, self._kind)):
            expected = "16 bits" if self._kind == I8 else f"the cache's dtype, {self.dtype_name}"
            raise TypeError(f"query: expected float32 or {expected}, got {query.dtype}")
        if query.ndim != 3 or len(query) != total or query.shape[2] != self.head_dim or (
                not query.shape[1] or query.shape[1] % self.num_kv_heads):
            raise ValueError(f"query: expected ({total}, num_heads, {self.head_dim}) with a multiple of "
                             f"{self.num_kv_heads} heads, got shape {query.shape}")
        for name, array, dim in (("key", key, self.head_dim), ("value", value, self.head_dim_v)):
            if array.dtype != query.dtype:
                raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {array.dtype}")
            if array.shape != (total, self.num_kv_heads, dim):
                raise ValueError(f"{name}: expected shape {(total, self.num_kv_heads, dim)}, got shape {array.shape}")
        return kind

    def _needs_own(self, one, count):
        """Whether the page that the next token falls into is there, but others have it, or it was dropped."""
        return bool(count and one.length % self.page_size
                    and (one.pages[-1] is None or self._owners[one.pages[-1]] > 1))

    def _undo(self, step):
        for one, length, num_pages in step._before:
            if one.step is not step:
                continue
            self._release(one.pages[num_pages:])
            del one.pages[num_pages:]
            if one in step._replaced:
                self._release(one.pages[-1:])
                one.pages[-1] = step._replaced[one]
            one.length = length
        step._close()

    def _grow(self, needed):
        """So many free pages, or a MemoryError with nothing changed."""
        if self._max_pages is not None and len(self._owners) + needed > self._max_pages:
            raise MemoryError(f"KVCache: expected room for {needed} more pages of {self.page_size} tokens, of which "
                              f"max_tokens leaves {self._max_pages - len(self._owners)}")
        missing = max(0, needed - len(self._free))
        if missing * self._page_bytes > 2**47:
            raise MemoryError(f"KVCache: expected less than 2**47 bytes, got {missing} more pages of "
                              f"{self._page_bytes} bytes")
        new = []
        for _ in range(-(-missing // self._slab_pages)):
            slab = np.empty(self._slab_pages * self._page_bytes + _ALIGNMENT, np.uint8)
            first = -slab.ctypes.data % _ALIGNMENT
            new.append(slab[first : first + self._slab_pages * self._page_bytes])
        for slab in new:
            if not self._slabs:
                self._base, self._first = slab.ctypes.data, slab
            start = slab.ctypes.data - self._base
            at = bisect.bisect(self._starts, start)
            self._starts.insert(at, start)
            self._slabs.insert(at, slab)
            self._free += range(start + (self._slab_pages - 1) * self._page_bytes, start - 1, -self._page_bytes)

    def _take(self):
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _release(self, pages):
        for page in pages:
            if page is None:
                continue
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page]
                self._free.append(page)

    def _bytes(self, page):
        """The bytes of a page."""
        at = bisect.bisect(self._starts, page) - 1
        first = page - self._starts[at]
        return self._slabs[at][first : first + self._page_bytes]

    def _pages(self, layer):
        """The parts of a layer in the first page of the first slab: what tables of pages count from. (): there is none,
        since no token has come yet."""
        if not self._slabs:
            return ()
        result = self._first_pages[layer] = self._split(self._first, layer)
        return result

    def _split(self, page, layer):
        """Views of a page's bytes: the parts of a layer, each (1, num_kv_heads, page_size, dim)."""
        first = layer * self._layer_bytes
        return tuple(page[first + start : first + start + size].view(storage).reshape(
            1, self.num_kv_heads, self.page_size, dim) for start, size, storage, dim in self._parts)


class Step:
    """Tokens that ``KVCache.extend`` made room for.

    Attributes
    ----------
    positions : int array (total,)
        Of the tokens, each in its sequence.
    cu_seqlens_q : int array (len(sequences) + 1,)
        Where the tokens of each sequence begin among them.
    kv_lens : int array (len(sequences),)
        The lengths of the sequences, these tokens included.
    """

    def __init__(self, cache, numbers, members, counts):
        self._cache, self._numbers, self._members, self._counts = cache, numbers, members, counts
        self._replaced = {}         # {a sequence: what was its last page: shared, or None for one that was dropped}
        self._before = [(one, one.length, len(one.pages)) for one in members]
        self._layers, self._done = set(), set()     # that are attended, or were; that were
        self._running = 0           # threads that attend it
        self._is_closed = False

    def _describe(self):
        page_size = self._cache.page_size
        lens = [one.length for one in self._members]
        self.cu_seqlens_q = np.array([0, *itertools.accumulate(self._counts)], np.int64)
        self.kv_lens = np.array(lens, np.int64)
        offsets = self.kv_lens - np.array(self._counts, np.int64)
        starts = [one.start for one in self._members]
        # 0 where no key is.
        table = np.zeros((len(lens), max([len(one.pages) for one in self._members], default=0)), np.int64)
        for row, one in zip(table, self._members, strict=True):
            row[: len(one.pages)] = [page or 0 for page in one.pages]
        rows = np.repeat(np.arange(len(lens)), self._counts)
        self.positions = np.arange(len(rows)) + (offsets - self.cu_seqlens_q[:-1])[rows]
        pages, slots = table[rows, self.positions // page_size], self.positions % page_size
        item = self._cache._storage.itemsize
        # As attend_step takes them.
        self._layout = np.concatenate([
            [len(lens), any(starts), table.shape[1]], self.cu_seqlens_q, offsets, self.kv_lens,
            np.array(starts, np.int64), pages + slots * (self._cache.head_dim * item),
            pages + slots * (self._cache.head_dim_v * item), pages + slots * 4, table.ravel() // _ALIGNMENT])

    def _close(self):
        self._is_closed = True
        for one in self._members:
            if one.step is self:
                one.step = None

    def __repr__(self):
        state = "closed" if self._is_closed else f"{len(self._done)} of {self._cache.num_layers} layers"
        return f"Step({self._numbers}, {self._counts}): {state}"


class _Sequence:
    """Pages in order, None where all of a page is dropped."""

    __slots__ = ("length", "pages", "start", "step")

    def __init__(self):
        self.pages, self.length, self.start, self.step = [], 0, 0, None


def _nothing_to_attend(*_, **__):
    """An entry, for a step without tokens."""
    return True


def _aligned(size):
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _dtype_name(dtype):
    try:
        name = dtype if isinstance(dtype, str) and dtype in _KINDS else np.dtype(dtype).name
    except TypeError:
        name = None
    if dtype is None or name not in _KINDS:
        raise TypeError(f"dtype: expected one of {', '.join(_KINDS)}, got {shown(dtype)}")
    return name


def _ints(name, given):
    if isinstance(given, (int, np.integer)) and not isinstance(given, bool):
        return [int(given)]
    array = as_array(name, given)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name}: expected an int, or a sequence of ints, got {shown(given)}")
    return [int(x) for x in array]
