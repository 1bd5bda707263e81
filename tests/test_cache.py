"""KVCache: pages that sequences share, grow into and give back; each row attends as in one array."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from problems import BFLOAT16, assert_same_bits, normal

import cattn
from cattn import reference

attention = cattn.scaled_dot_product_attention
HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 8, 16


def tokens(count, seed):
    """query, key, value of so many tokens."""
    return (normal(count, HEADS, DIM, seed=(seed, 0)), normal(count, KV_HEADS, DIM, seed=(seed, 1)),
            normal(count, KV_HEADS, DIM_V, seed=(seed, 2)))


def stored(array, dtype):
    """What a cache of this dtype makes of it, as float32."""
    return array.astype(BFLOAT16 if dtype == "bfloat16" else dtype).astype(np.float32)


def dense(query, key, value, start=0):
    """Of one sequence, the last tokens of which have the queries."""
    heads = (x.swapaxes(0, 1)[None] for x in (query, key, value))
    result = attention(*heads, is_causal=True, q_offset="end", kv_starts=start, return_logsumexp=True)
    return tuple(x[0].swapaxes(0, 1) for x in result)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_steps_have_the_bits_of_dense_calls(isa, dtype, page_size):
    """Prompts of several lengths in chunks, then tokens one by one; each layer has keys of its own."""
    cache = cattn.KVCache(2, KV_HEADS, DIM, head_dim_v=DIM_V, dtype=dtype, page_size=page_size)
    sequences = [cache.new() for _ in range(3)]
    seen = {(layer, one): (np.empty((0, KV_HEADS, DIM), np.float32), np.empty((0, KV_HEADS, DIM_V), np.float32))
            for layer in range(2) for one in sequences}
    for number, counts in enumerate([(5, 1, 130), (0, 7, 40), (1, 1, 1), (1, 1, 1), (3, 0, 2)]):
        step = cache.extend(sequences, counts)
        assert step.cu_seqlens_q.tolist() == np.cumsum([0, *counts]).tolist()
        assert step.kv_lens.tolist() == [cache.length(one) for one in sequences]
        for layer in (1, 0):
            query, key, value = tokens(sum(counts), seed=10 * number + layer)
            out, lse = cache.attend(layer, step, query, key, value, return_logsumexp=True, num_threads=2)
            for b, one in enumerate(sequences):
                rows = slice(step.cu_seqlens_q[b], step.cu_seqlens_q[b + 1])
                assert (step.positions[rows] == np.arange(step.kv_lens[b] - counts[b], step.kv_lens[b])).all()
                k, v = seen[layer, one]
                k, v = np.concatenate([k, stored(key[rows], dtype)]), np.concatenate([v, stored(value[rows], dtype)])
                seen[layer, one] = k, v
                assert_same_bits((out[rows], lse[rows]), dense(query[rows], k, v))
                assert_same_bits(cache.keys(layer, one).astype(np.float32), k)
                assert_same_bits(cache.values(layer, one).astype(np.float32), v)


def test_queries_of_the_cache_s_dtype(isa):
    for dtype in (np.dtype(np.float16), BFLOAT16):
        cache = cattn.KVCache(1, KV_HEADS, DIM, head_dim_v=DIM_V, dtype=dtype)
        step = cache.extend(cache.new(), 9)
        query, key, value = (x.astype(dtype) for x in tokens(9, 0))
        assert_same_bits(cache.attend(0, step, query, key, value), dense(query, key, value)[0])
        results = []
        for given in (dtype, np.float32):
            cache = cattn.KVCache(1, KV_HEADS, DIM, head_dim_v=DIM_V, dtype="int8")
            step = cache.extend(cache.new(), 9)
            results.append(cache.attend(0, step, *(x.astype(given) for x in (query, key, value))).astype(dtype))
        assert_same_bits(*results)


def quantised(x):
    """int8 numbers of each row, and its scale."""
    with np.errstate(all="ignore"):
        scales = np.abs(x).max(-1) / np.float32(127)
        numbers = np.rint(x / scales[..., None])
    return np.where(np.isfinite(scales[..., None]) & (scales[..., None] > 0), numbers, 0).astype(np.int8), scales


@pytest.mark.parametrize(("page_size", "dim"), [(1, 8), (16, 32), (64, 300)])
def test_8_bits(isa, page_size, dim):
    """Prompts in chunks, then single tokens: what is stored, and the bits of pages of another size."""
    cache = cattn.KVCache(2, KV_HEADS, dim, head_dim_v=DIM_V, dtype="int8", page_size=page_size)
    sequences, rng = [cache.new(), cache.new()], np.random.default_rng(0)
    seen = [[np.empty((0, KV_HEADS, size), np.float32) for size in (dim, DIM_V)] for _ in sequences]
    for counts in ((130, 3), (17, 40), (1, 1), (1, 0)):
        step = cache.extend(sequences, counts)
        new = [normal(sum(counts), heads, size, seed=(*counts, size, heads)) * rng.exponential(2.0)
               for heads, size in ((HEADS, dim), (KV_HEADS, dim), (KV_HEADS, DIM_V))]
        for rows in new[1:]:
            rows[0, 0] = 0
            rows[-1, 1] *= np.float32(1e-38)
        outs = [cache.attend(layer, step, *new, return_logsumexp=True) for layer in (1, 0)]
        assert_same_bits(*outs)
        for b, one in enumerate(sequences):
            rows = slice(step.cu_seqlens_q[b], step.cu_seqlens_q[b + 1])
            seen[b] = [np.concatenate([before, x[rows]]) for before, x in zip(seen[b], new[1:], strict=True)]
            (keys, key_scales), (values, value_scales) = map(quantised, seen[b])
            assert_same_bits(cache.keys(1, one), keys * key_scales[..., None])
            assert_same_bits(cache.values(1, one), values * value_scales[..., None])
            expected = cattn.paged_attention(
                new[0][rows], keys[None], values[None], [[0]], [len(keys)], [0, counts[b]], return_logsumexp=True,
                key_scales=key_scales[None], value_scales=value_scales[None])
            assert_same_bits(tuple(x[rows] for x in outs[0]), expected)


def test_8_bits_of_what_is_not_finite(isa):
    cache = cattn.KVCache(1, 1, 20, dtype="int8")
    sequence = cache.new()
    key = normal(4, 1, 20)
    key[1, 0, 3], key[2, 0, 19] = np.nan, -np.inf
    value = key[::-1].copy()
    out = cache.attend(0, cache.extend(sequence, 4), normal(4, 1, 20), key, value)
    keys, values = cache.keys(0, sequence), cache.values(0, sequence)
    assert np.isnan(keys).all((1, 2)).tolist() == [False, True, True, False]
    assert np.isnan(values).all((1, 2)).tolist() == [False, True, True, False]
    assert np.isnan(out).all((1, 2)).tolist() == [False, True, True, True]


@pytest.mark.parametrize("peaked", [1, 20])
def test_the_error_of_8_bits(isa, peaked):
    """What the docstring derives, and float32's own error: the largest that is measured is a fifth of it."""
    query, key, value = normal(50, HEADS, 64) * peaked, *(normal(50, KV_HEADS, 64, seed=seed) for seed in (1, 2))
    key[::7] *= 5
    cache = cattn.KVCache(1, KV_HEADS, 64, dtype="int8")
    sequence = cache.new()
    out = cache.attend(0, cache.extend(sequence, 50), query, key, value)
    exact = reference.varlen_attention(*(x.astype(np.float64) for x in (query, key, value)), [0, 50], is_causal=True)
    for stored_rows, rows in ((cache.keys(0, sequence), key), (cache.values(0, sequence), value)):
        assert (np.abs(stored_rows - rows) <= np.abs(rows).max(-1, keepdims=True) / 254 * (1 + 1e-5)).all()
    for head in range(HEADS):
        k, v = key[:, head // 2], value[:, head // 2]
        for row in range(50):
            e = 64**-0.5 * np.abs(query[row, head]).sum() * np.abs(k[: row + 1]).max() / 254
            spread = v[: row + 1].max(0) - v[: row + 1].min(0)
            bound = np.tanh(e / 2) * spread + np.abs(v[: row + 1]).max() / 254
            assert (np.abs(out[row, head] - exact[row, head]) <= bound + 1e-5).all()


def test_options(isa):
    cache = cattn.KVCache(1, KV_HEADS, DIM, page_size=4)
    sequences = [cache.new(), cache.new()]
    step = cache.extend(sequences, [20, 3])
    query, key, value = normal(23, HEADS, DIM), normal(23, KV_HEADS, DIM, seed=1), normal(23, KV_HEADS, DIM, seed=2)
    options = {"scale": 0.5, "window": (6, None), "softcap": 4.0, "alibi_slopes": np.ones((2, HEADS)),
               "sinks": np.zeros(HEADS), "return_logsumexp": True}
    out = np.empty((HEADS, 23, DIM), np.float32).swapaxes(0, 1)
    result = cache.attend(0, step, query, key, value, out=out, **options)
    assert result[0] is out
    expected = cattn.varlen_attention(query, key, value, [0, 20, 23], is_causal=True, **options)
    assert_same_bits(tuple(x.copy() for x in result), expected)


class Machine(RuleBasedStateMachine):
    """A cache of one layer against lists of arrays."""

    @initialize(page_size=st.integers(1, 5), max_tokens=st.one_of(st.none(), st.integers(0, 60)))
    def begin(self, page_size, max_tokens):
        self.cache = cattn.KVCache(1, 1, 2, page_size=page_size, max_tokens=max_tokens)
        self.cache._slab_pages = 3  # so that several are needed
        self.model = {}             # {sequence: [(key, value) of each token]}
        self.starts = {}
        self.step = None            # (step, its sequences, counts)
        self.count = 0
        self.gone = []

    def _closed(self):
        busy = self.step[1] if self.step else ()
        return sorted(set(self.model) - set(busy))

    @rule()
    def new(self):
        one = self.cache.new()
        assert one not in self.model
        assert one not in self.gone
        self.model[one], self.starts[one] = [], 0

    @rule(data=st.data())
    def fork(self, data):
        if closed := self._closed():
            parent = data.draw(st.sampled_from(closed))
            child = self.cache.fork(parent)
            self.model[child], self.starts[child] = self.model[parent].copy(), self.starts[parent]

    @rule(data=st.data())
    def free(self, data):
        if closed := self._closed():
            one = data.draw(st.sampled_from(closed))
            self.cache.free(one)
            del self.model[one]
            self.gone.append(one)

    @rule(data=st.data())
    def truncate(self, data):
        if closed := self._closed():
            one = data.draw(st.sampled_from(closed))
            length = data.draw(st.integers(0, len(self.model[one])))
            self.cache.truncate(one, length)
            del self.model[one][length:]
            self.starts[one] = min(self.starts[one], length)

    @rule(data=st.data())
    def drop(self, data):
        if closed := self._closed():
            one = data.draw(st.sampled_from(closed))
            before = data.draw(st.integers(0, len(self.model[one])))
            self.cache.drop(one, before)
            self.starts[one] = max(self.starts[one], before)

    @rule(data=st.data())
    def extend(self, data):
        if self.step:
            return
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True)) if self.model else []
        counts = [data.draw(st.integers(0, 7)) for _ in chosen]
        pages = len(self.cache._owners)
        try:
            step = self.cache.extend(chosen, counts)
        except MemoryError:
            assert self.cache._max_pages is not None
            assert len(self.cache._owners) == pages
            return
        self.step = step, chosen, counts

    @rule()
    def cancel(self):
        if self.step:
            self.cache.cancel(self.step[0])
            self.step = None

    @rule()
    def attend(self):
        if not self.step:
            return
        step, chosen, counts = self.step
        self.count += 1
        query, key, value = (normal(sum(counts), 1, 2, seed=(self.count, i)) for i in range(3))
        out = self.cache.attend(0, step, query, key, value)
        for b, one in enumerate(chosen):
            rows = slice(step.cu_seqlens_q[b], step.cu_seqlens_q[b + 1])
            self.model[one] += zip(key[rows], value[rows], strict=True)
            if counts[b]:
                k, v = (np.array(x) for x in zip(*self.model[one], strict=True))
                assert_same_bits(out[rows], dense(query[rows], k, v, self.starts[one])[0])
        self.step = None

    @rule(data=st.data())
    def misuse(self, data):
        if self.gone:
            with pytest.raises(KeyError):
                self.cache.free(data.draw(st.sampled_from(self.gone)))
        if self.step and self.step[1]:
            one = data.draw(st.sampled_from(self.step[1]))
            for call in (self.cache.fork, self.cache.free, lambda x: self.cache.truncate(x, 0),
                         lambda x: self.cache.drop(x, 0), lambda x: self.cache.extend(x, 1)):
                with pytest.raises(ValueError, match="open step"):
                    call(one)

    @invariant()
    def pages_are_right(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        owners = {}
        for one in cache._sequences.values():
            assert len(one.pages) == -(-one.length // cache.page_size)
            for page in filter(lambda page: page is not None, one.pages):
                owners[page] = owners.get(page, 0) + 1
        for page in self._kept():
            owners[page] = owners.get(page, 0) + 1
        assert owners == cache._owners
        assert not set(owners) & set(cache._free)
        assert len(set(cache._free)) == len(cache._free)
        assert len(cache._free) + len(cache._owners) == len(cache._slabs) * cache._slab_pages
        for one, entries in self.model.items():
            start = self.starts[one]
            for rows, index in ((cache.keys(0, one), 0), (cache.values(0, one), 1)):
                assert np.isnan(rows[:start]).all()
                np.testing.assert_array_equal(
                    rows[start : len(entries)], np.array([entry[index] for entry in entries[start:]]).reshape(-1, 1, 2))

    def _kept(self):
        """Pages that are an open step's, since it may be cancelled."""
        return [page for page in self.step[0]._replaced.values() if page is not None] if self.step else []


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None,
                                     suppress_health_check=list(HealthCheck))
test_any_history = Machine.TestCase


def test_a_fork_shares_pages():
    cache = cattn.KVCache(3, 1, 8, page_size=16)
    parent = cache.new()
    step = cache.extend(parent, 40)
    for layer in range(3):
        x = normal(40, 1, 8, seed=layer)
        cache.attend(layer, step, x, x, x)
    free = cache.num_free_pages
    children = [cache.fork(parent) for _ in range(5)]
    assert cache.num_free_pages == free
    step = cache.extend(children, 1)
    assert cache.num_free_pages == free - 5     # of each, a copy of the last page
    for layer in range(3):
        x = normal(5, 1, 8, seed=9)
        cache.attend(layer, step, x, x, x)
        assert_same_bits(cache.keys(layer, parent), normal(40, 1, 8, seed=layer))
        assert_same_bits(cache.keys(layer, children[2])[:40], normal(40, 1, 8, seed=layer))


def _filled(cache, sequence, count, value):
    x = np.full((count, 1, 8), value, np.float32)
    cache.attend(0, cache.extend(sequence, count), x, x, x)


def test_a_cancelled_step_gives_shared_pages_back():
    """Also where the other owner is gone meanwhile."""
    cache = cattn.KVCache(1, 1, 8, page_size=4)
    a = cache.new()
    _filled(cache, a, 2, 1)
    b = cache.fork(a)
    step = cache.extend(b, 1)
    cache.free(a)
    cache.cancel(step)
    _filled(cache, cache.new(), 8, 9)
    assert (cache.keys(0, b) == 1).all()


def test_tokens_where_a_page_was_dropped():
    cache = cattn.KVCache(1, 1, 8, page_size=4)
    a = cache.new()
    _filled(cache, a, 10, 1)
    cache.drop(a, 8)
    cache.truncate(a, 6)
    cache.cancel(cache.extend(a, 3))
    _filled(cache, a, 3, 2)
    rows = cache.keys(0, a)
    assert np.isnan(rows[:6]).all()
    assert (rows[6:] == 2).all()


class Kernels:
    """Both entries of steps do this."""

    def __init__(self, entry):
        self.attend_step = self.attend_step_short = entry


# The short way, and the other.
both_ways = pytest.mark.parametrize("options", [{}, {"num_threads": 1}], ids=["short", "long"])


@both_ways
def test_what_fails_can_be_repeated_or_cancelled(monkeypatch, options):
    cache = cattn.KVCache(1, 1, 8, page_size=4)
    a = cache.new()
    step = cache.extend(a, 3)
    x = normal(3, 1, 8)
    out = cache.attend
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(cattn._kernels, "f32", Kernels(lambda *_, **__: 1 // 0))
        cache.attend(0, step, x, x, x, **options)
    assert np.isnan(cache.keys(0, a)).all()
    monkeypatch.undo()
    assert out(0, step, x, x, x).shape == x.shape
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(cattn._cache.Step, "_describe", lambda _: 1 // 0)
        cache.extend(a, 50)
    assert cache.length(a) == 3
    _filled(cache, a, 1, 0)
    with pytest.raises(MemoryError, match="KVCache: expected less than"):
        cache.extend(a, 2**60)


@both_ways
def test_no_thread_cancels_what_another_attends(monkeypatch, options):
    cache = cattn.KVCache(1, 1, 8)
    step = cache.extend(cache.new(), 1)
    x = normal(1, 1, 8)

    def cancel(*_, **__):
        with pytest.raises(ValueError, match="no thread is attending"):
            cache.cancel(step)
        return True

    monkeypatch.setattr(cattn._kernels, "f32", Kernels(cancel))
    cache.attend(0, step, x, x, x, **options)


def test_what_a_caller_does_to_a_step_changes_nothing():
    cache = cattn.KVCache(1, 1, 8)
    step = cache.extend(cache.new(), 5)
    x = normal(5, 1, 8)
    step.positions, step.kv_lens[:] = step.positions[:1], 10**9
    step.cu_seqlens_q[:] = 77
    assert_same_bits(cache.attend(0, step, x, x, x), dense(x, x, x)[0])


def test_the_short_way_has_the_bits_of_the_other(isa):
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        for counts in ([1], [1, 5], [0, 2], [0], [40, 1, 3]):
            results = []
            for options in ({}, {"num_threads": 2}, {"return_logsumexp": True}, {"softcap": None}):
                cache = cattn.KVCache(1, KV_HEADS, DIM, head_dim_v=DIM_V, dtype=dtype, page_size=16)
                sequences = [cache.new() for _ in counts]
                cache.attend(0, cache.extend(sequences, 0), *tokens(0, 0), **options)     # before there is a page
                cache.attend(0, cache.extend(sequences, 7), *tokens(7 * len(counts), 0))
                result = cache.attend(0, cache.extend(sequences, counts), *tokens(sum(counts), 1), **options)
                results.append(result[0] if "return_logsumexp" in options else result)
                assert results[-1].shape == (sum(counts), HEADS, DIM_V)
            for result in results[1:]:
                assert_same_bits(results[0], result)


def test_pages_are_whole_units_apart():
    """As the kernel counts them; and so that rows of reals can be read in place."""
    for dtype in ("float32", "float16"):
        cache = cattn.KVCache(1, 1, 64, dtype=dtype, page_size=128)
        cache.extend(cache.new(), 1)
        keys, values = cache._pages(0)
        assert repr(cache.extend(cache.new(), 2)) == "Step([1], [2]): 0 of 1 layers"
        assert keys.ctypes.data % 64 == values.ctypes.data % 64 == cache._page_bytes % 64 == 0


def test_threads_attend_layers_at_once():
    cache = cattn.KVCache(8, KV_HEADS, DIM, head_dim_v=DIM_V)
    sequences = [cache.new(), cache.new()]
    for number in range(5):
        step = cache.extend(sequences, [4, 1])
        results = [None] * 8

        def work(layer, step=step, results=results, number=number):
            results[layer] = cache.attend(layer, step, *tokens(5, number), num_threads=1)

        threads = [threading.Thread(target=work, args=(layer,)) for layer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results[1:]:
            assert_same_bits(result, results[0])
        with pytest.raises(ValueError, match="step: expected an open one"):
            cache.attend(0, step, *tokens(5, number))


@pytest.mark.slow
def test_a_million_steps_lose_no_memory():
    """Random extend, truncate, fork and free: RSS and pages are where they were."""
    rng = np.random.default_rng(0)
    cache = cattn.KVCache(1, 1, 4, page_size=4, max_tokens=4000)
    sequences = [cache.new() for _ in range(20)]

    def some(count):
        for _ in range(count):
            i = int(rng.integers(len(sequences)))
            one, action = sequences[i], rng.integers(4)
            if action == 0:
                try:
                    cache.cancel(cache.extend(one, 5))
                    step = cache.extend(one, int(rng.integers(1, 9)))
                except MemoryError:
                    cache.truncate(one, 0)
                    continue
                x = np.zeros((len(step.positions), 1, 4), np.float32)
                cache.attend(0, step, x, x, x)
            elif action == 1:
                cache.truncate(one, int(rng.integers(cache.length(one) + 1)))
            elif action == 2:
                cache.free(sequences[int(rng.integers(len(sequences)))]) if len(sequences) < 1 else None
                sequences.append(cache.fork(one))
            elif len(sequences) > 10:
                cache.free(one)
                del sequences[i]
            if len(sequences) > 40:
                cache.free(sequences.pop())

    def rss():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    some(100_000)
    before = rss()
    some(900_000)
    assert rss() - before < 1000     # pages of 4 KB: what the allocator may do by itself
    for one in sequences:
        cache.free(one)
    assert not cache._owners


def _open_step():
    cache = cattn.KVCache(2, KV_HEADS, DIM, head_dim_v=DIM_V, max_tokens=100)
    return cache, cache.extend(cache.new(), 5)


BAD = [
    (lambda c, s, t: c.attend(2, s, *t), ValueError, "layer: expected an int below num_layers = 2"),
    (lambda c, s, t: c.attend("0", s, *t), TypeError, "layer: expected an int"),
    (lambda c, s, t: c.attend(0, 3, *t), ValueError, "step: expected one that this cache"),
    (lambda c, s, t: c.attend(0, _open_step()[1], *t), ValueError, "step: expected one that this cache"),
    (lambda c, s, t: c.attend(0, s, *tokens(4, 0)), ValueError, r"query: expected \(5, num_heads, 8\)"),
    (lambda c, s, t: c.attend(0, s, t[0][:, :3], *t[1:]), ValueError, "query: expected"),
    (lambda c, s, t: c.attend(0, s, t[0], t[2], t[1]), ValueError, "key: expected shape"),
    (lambda c, s, t: c.attend(0, s, t[0].astype(float), *t[1:]), TypeError, "query: expected float32 or the cache"),
    (lambda c, s, t: c.attend(0, s, t[0], t[1].astype(float), t[2]), TypeError, "key: expected the dtype of query"),
    (lambda c, s, t: c.extend(0, 5), ValueError, "sequence: expected one without an open step"),
    (lambda c, s, t: c.extend(c.new(), 500), MemoryError, "KVCache: expected room for 8 more pages"),
    (lambda c, s, t: c.extend(c.new(), -1), ValueError, "counts: expected ints >= 0"),
    (lambda c, s, t: c.extend([1, 1], 1), ValueError, "sequences: expected each one once"),
    (lambda c, s, t: c.extend([c.new(), c.new()], [1, 2, 3]), ValueError, "counts: expected one, or one for each of 2"),
    (lambda c, s, t: c.extend(1.5, 1), TypeError, "sequences: expected an int"),
    (lambda c, s, t: c.extend(77, 1), KeyError, "sequence: expected one that new"),
    (lambda c, s, t: c.free([1]), KeyError, "sequence: expected one that new"),
    (lambda c, s, t: c.truncate(c.new(), 1), ValueError, "length: expected at most"),
    (lambda c, s, t: c.drop(c.new(), 1), ValueError, "before: expected at most"),
    (lambda c, s, t: c.keys(5, 0), ValueError, "layer: expected"),
    (lambda c, s, t: cattn.KVCache(0, 1, 1), ValueError, "num_layers: expected an int >= 1"),
    (lambda c, s, t: cattn.KVCache(1, 1, 1, dtype="float64"), TypeError, "dtype: expected one of float32"),
    (lambda c, s, t: cattn.KVCache(1, 1, 1, dtype="uint8"), TypeError, "dtype: expected one of float32"),
    (lambda c, s, t: cattn.KVCache(1, 1, 1, max_tokens=-1), ValueError, "max_tokens: expected an int >= 0"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_bad_input_changes_nothing(call, error, text):
    cache, step = _open_step()
    before = cache.num_free_pages, len(cache._owners)
    with pytest.raises(error, match=text):
        call(cache, step, tokens(5, 0))
    assert (cache.num_free_pages, len(cache._owners)) == before
    for layer in range(2):
        cache.attend(layer, step, *tokens(5, 0))
    assert repr(step).endswith("closed")
