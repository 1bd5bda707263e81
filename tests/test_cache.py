"""KVCache: pages that sequences share, grow into and give back; each row attends as in one array."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
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


def assert_close(a, b, value):
    """Two results of the formula, the first in its dtype or a wider one, for scores below 40 and fewer than 300 keys:
    each weight is off by less than 2 * (300 + 300) * eps / 2, relatively, for its score and for the sum."""
    np.testing.assert_allclose(a, b, rtol=0, atol=2.0**12 * np.finfo(b.dtype).eps * np.abs(value).max(initial=0))


def check_pages(cache, kept=()):
    """Each page is free, or known with as many owners as there are; `kept` are those of an open step, which may be
    cancelled."""
    owners = dict.fromkeys(kept, 0)
    for page in kept:
        owners[page] += 1
    for one in cache._sequences.values():
        assert len(one.pages) == -(-one.length // cache.page_size)
        for page in filter(lambda page: page is not None, one.pages):
            owners[page] = owners.get(page, 0) + 1
    assert owners == cache._owners
    assert not set(owners) & set(cache._free)
    assert len(set(cache._free)) == len(cache._free)
    assert len(cache._free) + len(cache._owners) == len(cache._slabs) * cache._slab_pages


class Machine(RuleBasedStateMachine):
    """A cache of two layers against the reference."""

    @initialize(data=st.data(), dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
                page_size=st.integers(1, 5), max_tokens=st.one_of(st.none(), st.integers(0, 60)))
    def begin(self, data, dtype, page_size, max_tokens):
        options = {"dtype": dtype, "page_size": page_size, "max_tokens": max_tokens}
        self.cache, self.model = (module.KVCache(2, 1, 2, **options) for module in (cattn, reference))
        self.cache._slab_pages = 3  # so that several are needed
        self.alive, self.gone = [], []
        self.steps = None           # one of the cache, one of the model: open
        self.chosen, self.counts, self.missing = [], [], []     # of that: its sequences, their counts, layers
        self.number = 0             # of attend
        self.new()
        self.new()
        self._extend(data, self.alive[:], 3)    # most of what follows needs tokens
        self._attend_all(data)

    def has_step(self):
        return self.steps is not None

    def has_none(self):
        return self.steps is None

    def has_closed(self):
        return len(self.chosen) < len(self.alive)

    def _closed(self, data, least=1):
        """One with so many tokens, if there is one."""
        closed = [one for one in self.alive if one not in self.chosen]
        return data.draw(st.sampled_from([one for one in closed if self.model.length(one) >= least] or closed))

    def _both(self, method, *arguments):
        result, expected = (getattr(cache, method)(*arguments) for cache in (self.cache, self.model))
        assert result == expected
        return result

    @rule()
    def new(self):
        one = self._both("new")
        assert one not in self.alive
        assert one not in self.gone
        self.alive.append(one)

    @precondition(has_closed)
    @rule(data=st.data())
    def fork(self, data):
        self.alive.append(self._both("fork", self._closed(data)))

    @precondition(has_closed)
    @rule(data=st.data())
    def free(self, data):
        one = self._closed(data, 0)
        self._both("free", one)
        self.alive.remove(one)
        self.gone.append(one)

    @precondition(has_closed)
    @rule(data=st.data(), method=st.sampled_from(["truncate", "drop"]), grows=st.booleans())
    def truncate_or_drop(self, data, method, grows):
        """And grow: as drafts do that are refused, and windows that slide."""
        one = self._closed(data)
        self._both(method, one, data.draw(st.integers(0, self.model.length(one))))
        if grows and self.has_none():
            self._extend(data, [one], 1)
            self._attend_all(data)

    @precondition(has_none)
    @rule(data=st.data())
    def extend(self, data):
        self._extend(data, data.draw(st.permutations(self.alive))[: data.draw(st.integers(0, 3))])

    def _extend(self, data, chosen, least=0):
        counts = [data.draw(st.integers(least, 7)) for _ in chosen]
        pages = len(self.cache._owners)
        try:
            step = self.cache.extend(chosen, counts)
        except MemoryError:
            assert self.cache._max_pages is not None
            assert len(self.cache._owners) == pages
            return
        self.steps = step, self.model.extend(chosen, counts)
        self.chosen, self.counts, self.missing = chosen, counts, list(range(self.cache.num_layers))
        for name in ("positions", "cu_seqlens_q", "kv_lens"):
            assert_same_bits(*(getattr(one, name) for one in self.steps))

    def _close(self):
        self.steps, self.chosen, self.counts = None, [], []

    @precondition(has_step)
    @rule()
    def cancel(self):
        for cache, step in zip((self.cache, self.model), self.steps, strict=True):
            cache.cancel(step)
        self._close()

    @precondition(has_step)
    @rule(data=st.data())
    def attend(self, data):
        """The bits of the dense function, unless numbers have scales; and in float64, what the reference says."""
        layer = data.draw(st.sampled_from(self.missing))
        self.missing.remove(layer)
        self.number += 1
        query, key, value = (normal(sum(self.counts), 1, 2, seed=(self.number, i)) for i in range(3))
        out = self.cache.attend(layer, self.steps[0], query, key, value)
        exact = self.model.attend(layer, self.steps[1], query.astype(float), key, value)
        assert exact.shape == query.shape
        for b, one in enumerate(self.chosen):
            rows, start = slice(*self.steps[0].cu_seqlens_q[b : b + 2]), self.model._sequences[one].start
            k, v = (x(layer, one).astype(np.float32) for x in (self.model.keys, self.model.values))
            if self.counts[b]:
                assert_close(exact[rows], out[rows], v[start:])
                if self.cache.dtype_name != "int8":
                    assert_same_bits(out[rows], dense(query[rows], k, v, start)[0])
                assert_close(exact[rows], dense(*(x.astype(float) for x in (query[rows], k, v)), start)[0], v[start:])
        if not self.missing:
            self._close()

    @precondition(has_none)
    @rule(data=st.data())
    def grow(self, data):
        """A step from beginning to end."""
        self.extend(data)
        self._attend_all(data)

    def _attend_all(self, data):
        while self.steps:
            self.attend(data)

    @precondition(has_none)
    @precondition(has_closed)
    @rule(data=st.data())
    def branch(self, data):
        """Two that share their last page, unless it is full, and one of them, or both, in a step."""
        parent = max(self.alive, key=self.model.length)
        self.alive.append(self._both("fork", parent))
        both = [parent, self.alive[-1]]
        self._extend(data, data.draw(st.sampled_from([both, both[:1], both[1:]])))

    @rule(data=st.data())
    def misuse(self, data):
        for cache in (self.cache, self.model):
            if self.gone:
                with pytest.raises(KeyError):
                    cache.free(data.draw(st.sampled_from(self.gone)))
            if self.chosen:
                one = data.draw(st.sampled_from(self.chosen))
                for call in (cache.fork, cache.free, lambda x, of=cache: of.truncate(x, 0),
                             lambda x, of=cache: of.drop(x, 0), lambda x, of=cache: of.extend(x, 1)):
                    with pytest.raises(ValueError, match="open step"):
                        call(one)

    @invariant()
    def pages_are_right(self):
        check_pages(self.cache, [page for page in self.steps[0]._replaced.values() if page is not None]
                    if self.steps else ())

    @invariant()
    def what_is_stored_is_right(self):
        for one in self.alive:
            self._both("length", one)
            for layer in range(self.cache.num_layers):
                for name in ("keys", "values"):     # NaN in the same places
                    rows, expected = (getattr(cache, name)(layer, one) for cache in (self.cache, self.model))
                    assert rows.dtype == expected.dtype
                    np.testing.assert_array_equal(rows, expected)


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, derandomize=True, deadline=None,
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


# The reference itself, by numbers that can be checked by hand.


def _rows(*numbers):
    """(total, 1, 1): one head of one dim."""
    return np.array(numbers, np.float32)[:, None, None]


def test_reference_worked_numbers():
    """Keys of 0 weigh the same: each token gets the mean of the values that it sees."""
    cache = reference.KVCache(1, 1, 1)
    a, b = cache.new(), cache.new()
    step = cache.extend([a, b], [3, 1])
    assert step.positions.tolist() == [0, 1, 2, 0]
    assert step.cu_seqlens_q.tolist() == [0, 3, 4]
    assert step.kv_lens.tolist() == [3, 1]
    out = cache.attend(0, step, _rows(1, 1, 1, 1), _rows(0, 0, 0, 0), _rows(1, 3, 8, 50))
    np.testing.assert_allclose(out.ravel(), [1, 2, 4, 50], rtol=4e-7)
    child = cache.fork(a)
    cache.truncate(a, 2)
    cache.drop(child, 1)
    step = cache.extend([child, b, a], 1)
    assert step.positions.tolist() == [3, 1, 2]
    assert step.kv_lens.tolist() == [4, 2, 3]
    out, lse = cache.attend(0, step, _rows(1, 1, 1), _rows(0, np.log(3), 0), _rows(1, 2, -1), return_logsumexp=True)
    np.testing.assert_allclose(out.ravel(), [(3 + 8 + 1) / 3, (50 + 3 * 2) / 4, (1 + 3 - 1) / 3], rtol=1e-6)
    np.testing.assert_allclose(lse.ravel(), np.log([3, 4, 3]), rtol=4e-7)
    assert (cache.length(a), cache.length(b), cache.length(child)) == (3, 2, 4)
    np.testing.assert_array_equal(cache.values(0, a), _rows(1, 3, -1))
    np.testing.assert_array_equal(cache.values(0, child), _rows(np.nan, 3, 8, 1))
    np.testing.assert_array_equal(cache.keys(0, b), _rows(0, np.log(3)))


def test_reference_passes_options_on():
    options = {"scale": 0.5, "window": (6, None), "softcap": 4.0, "alibi_slopes": np.ones((2, HEADS)),
               "sinks": np.zeros(HEADS), "return_logsumexp": True}
    cache = reference.KVCache(1, KV_HEADS, DIM, dtype=np.float64)
    query, key, value = normal(23, HEADS, DIM), normal(23, KV_HEADS, DIM, seed=1), normal(23, KV_HEADS, DIM, seed=2)
    query, key, value = (x.astype(float) for x in (query, key, value))
    results = cache.attend(0, cache.extend([cache.new(), cache.new()], [20, 3]), query, key, value, **options)
    expected = reference.varlen_attention(query, key, value, [0, 20, 23], is_causal=True, **options)
    for result, right in zip(results, expected, strict=True):
        assert_close(result, right, right)


def test_reference_drops_nan():
    cache = reference.KVCache(1, 1, 1)
    a = cache.new()
    nan = _rows(np.nan, np.inf)
    assert np.isnan(cache.attend(0, cache.extend(a, 2), _rows(1, 1), nan, nan)).all()
    cache.drop(a, 2)
    out = cache.attend(0, cache.extend(a, 1), _rows(1), _rows(2), _rows(3))
    assert out.ravel().tolist() == [3]
    cache.truncate(a, 1)    # the next token is the first that exists
    assert cache.attend(0, cache.extend(a, 1), _rows(1), _rows(2), _rows(5)).ravel().tolist() == [5]
    np.testing.assert_array_equal(cache.values(0, a), _rows(np.nan, 5))


def test_reference_steps():
    """Layers in any order; a step that is taken back leaves nothing; what failed can be repeated."""
    cache = reference.KVCache(2, 1, 1)
    a = cache.new()
    first, second = _rows(1, 2), _rows(3, 4)
    step = cache.extend(a, 2)
    cache.attend(1, step, first, first, first)
    assert np.isnan(cache.keys(0, a)).all()
    np.testing.assert_array_equal(cache.keys(1, a), first)
    with pytest.raises(ValueError, match="layer: expected one that the step has not attended"):
        cache.attend(1, step, first, first, first)
    with pytest.raises(ValueError, match="concatenation axis"):
        cache.attend(0, step, first, np.zeros((2, 3, 1), np.float32), first)
    for call in (cache.fork, cache.free, lambda x: cache.truncate(x, 0), lambda x: cache.drop(x, 0),
                 lambda x: cache.extend([cache.new(), x], 1)):
        with pytest.raises(ValueError, match="sequence: expected one without an open step"):
            call(a)
    assert cache.length(a) == 2
    cache.attend(0, step, second, second, second)
    np.testing.assert_array_equal(cache.keys(0, a), second)
    for call in (cache.cancel, lambda x: cache.attend(0, x, first, first, first)):
        with pytest.raises(ValueError, match="step: expected an open one"):
            call(step)

    step = cache.extend([a], np.array([2]))
    cache.attend(0, step, first, first, first)
    cache.cancel(step)
    assert cache.length(a) == 2
    np.testing.assert_array_equal(cache.keys(0, a), second)
    with pytest.raises(ValueError, match="step: expected an open one"):
        cache.attend(1, step, first, first, first)
    cache.free(a)
    for call in (cache.fork, cache.free, cache.length, lambda x: cache.extend(x, 1), lambda x: cache.keys(0, x)):
        with pytest.raises(KeyError):
            call(a)
    assert cache.new() > a
    assert cache.attend(0, cache.extend([], []), *(np.empty((0, 1, 1), np.float32),) * 3).shape == (0, 1, 1)


def test_reference_keeps_no_array_of_a_caller():
    cache = reference.KVCache(1, 1, 1)
    a = cache.new()
    x = _rows(1, 2)
    cache.attend(0, cache.extend(a, 2), x, x, x)
    b = cache.fork(a)
    x[:] = cache.keys(0, a)[:] = cache.values(0, b)[:] = 7
    cache.attend(0, cache.extend(a, 1), x[:1], x[:1], x[:1])
    for one, expected in ((a, _rows(1, 2, 7)), (b, _rows(1, 2))):
        np.testing.assert_array_equal(cache.keys(0, one), expected)
        np.testing.assert_array_equal(cache.values(0, one), expected)


def _kept(dtype, x, module=reference):
    """What a cache of this dtype makes of keys (total, num_kv_heads, head_dim), and of such values."""
    cache = module.KVCache(1, *x.shape[1:], dtype=dtype)
    one = cache.new()
    cache.attend(0, cache.extend(one, len(x)), x, x, x)
    assert_same_bits(cache.keys(0, one), cache.values(0, one))
    return cache.keys(0, one)


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 10), ("bfloat16", 7), (BFLOAT16, 7)])
def test_reference_rounds_to_nearest_even(dtype, digits):
    step = 2.0**-digits
    given = _rows(1, 1 + step / 2, 1 + step * 1.5, 1 + step * 0.75, -1 - step / 2, np.inf, np.nan)
    expected = _rows(1, 1, 1 + step * 2, 1 + step, -1, np.inf, np.nan)
    for wide in (np.float32, np.float64):
        result = _kept(dtype, given.astype(wide))
        assert result.dtype == (np.float16 if dtype == "float16" else np.float32)
        np.testing.assert_array_equal(result, expected.astype(result.dtype))
    assert np.isinf(_kept(dtype, _rows(3.4e38))).all()


TINY = float(np.finfo(np.float32).smallest_subnormal)
INT8_ROWS = [
    ([127, 0.5, 1.5, 2.5, -0.5, -1.5], [127, 0, 2, 2, 0, -2]),      # the scale is 1
    ([1, 3, -254, 5, 0.9, -4], [0, 4, -254, 4, 0, -4]),             # 2
    ([-1, 1, 0.5, 0, -0.0, 0.25], [-127, 127, 64, 0, 0, 32]),       # 1/127, which times 127 is 1; numbers follow
    ([0, -0.0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ([TINY, -TINY, 0, TINY, 0, 0], [0, 0, 0, 0, 0, 0]),             # the scale is 0: no nearer number is there
    ([190 * TINY, -190 * TINY, TINY, 0, 0, 0], [127 * TINY, -127 * TINY, TINY, 0, 0, 0]),   # the least scale there is
    ([np.inf, 1, 0, 0, 0, 0], [np.nan] * 6),
    ([1, -np.inf, np.inf, 0, 0, 0], [np.nan] * 6),
    ([np.nan, 1, 0, 0, 0, 0], [np.nan] * 6),
    ([np.nan, np.inf, 0, 0, 0, 0], [np.nan] * 6),
]


@pytest.mark.filterwarnings("error")
def test_reference_int8():
    """A scale for each token and head: rows as tokens, as heads, and as both."""
    given, expected = (np.array(x, np.float32) for x in zip(*INT8_ROWS, strict=True))
    expected[2] *= np.float32(1) / np.float32(127)
    for shape in ((-1, 1, 6), (1, -1, 6), (5, 2, 6)):
        for wide in (np.float32, np.float64):
            result = _kept("int8", given.reshape(shape).astype(wide)).reshape(-1, 6)
            nan = np.isnan(expected)
            assert (np.isnan(result) == nan).all()
            assert_same_bits(result[~nan], expected[~nan])


def test_int8_is_that_of_the_reference(isa):
    """Also in the whole vectors of longer rows."""
    largest = np.full((1, 1, 6), np.finfo(np.float32).max)
    given = np.concatenate([np.array([x for x, _ in INT8_ROWS], np.float32)[:, None], largest, normal(500, 1, 6)])
    for repeats in (1, 3, 50):
        x = np.tile(given, repeats)
        kept, expected = _kept("int8", x, cattn), _kept("int8", x)
        np.testing.assert_array_equal(kept, expected)
        nan = np.isnan(expected)
        assert_same_bits(kept[~nan], expected[~nan])


def test_reference_int8_is_within_half_a_scale():
    """But for the roundings of the scale, the ratio and the product: 127 * 2**-24 of a scale each."""
    x = normal(50, 3, 40) * np.float32(10) ** np.arange(-15, 35, dtype=np.float32)[:, None, None]
    half = np.abs(x).max(axis=-1, keepdims=True).astype(float) / 254
    assert (np.abs(_kept("int8", x).astype(float) - x) <= half * (1 + 2.0**-14)).all()
    assert np.isfinite(_kept("int8", _rows(3.4028e38))).all()
    assert np.isinf(_kept("int8", _rows(np.finfo(np.float32).max))).all()   # its scale is rounded up


@pytest.mark.slow
def test_a_million_steps_lose_no_memory():
    """Random extend, truncate, fork and free, also from a full pool: RSS and pages are where they were."""
    rng = np.random.default_rng(0)
    cache = cattn.KVCache(1, 1, 4, page_size=4, max_tokens=200)
    cache._slab_pages = 8
    sequences = [cache.new() for _ in range(20)]

    def some(count):
        full = 0
        for number in range(count):
            i = int(rng.integers(len(sequences)))
            one, action = sequences[i], rng.integers(4)
            if action == 0:
                try:
                    cache.cancel(cache.extend(one, 5))
                    step = cache.extend(one, int(rng.integers(1, 9)))
                except MemoryError:
                    cache.truncate(one, 0)
                    full += 1
                    continue
                x = np.zeros((len(step.positions), 1, 4), np.float32)
                cache.attend(0, step, x, x, x)
            elif action == 1:
                cache.truncate(one, int(rng.integers(cache.length(one) + 1)))
            elif action == 2:
                sequences.append(cache.fork(one))
            elif len(sequences) > 10:
                cache.free(one)
                del sequences[i]
            if len(sequences) > 40:
                cache.free(sequences.pop())
            if number % 1000 == 0:
                check_pages(cache)
        return full

    def rss():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    some(100_000)
    before = rss()
    assert some(900_000)
    assert rss() - before < 1000     # pages of 4 KB: what the allocator may do by itself
    for one in sequences:
        cache.free(one)
    check_pages(cache)
    assert not cache._owners
    assert cache.num_free_pages == 50


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
