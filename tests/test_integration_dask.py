"""Attention over dask arrays: any problem in any chunks, the same bits whoever computes them, which tasks there are,
threads, a cluster that loses a worker, layers, errors; and the program that measures it."""

import importlib.util
import inspect
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from problems import BFLOAT16, FLOATS, assert_same_bits, problem, random_problem
from processes import ROOT, line_of_error, python
from tolerance import assert_close, assert_within, everything

import cattn
from bench import dask as bench_dask
from cattn import _kernels, _threads, reference
from cattn.integrations import dask as integration

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

# Old versions of distributed use it; as an error in their threads it hangs a test.
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")

attention = integration.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def one_thread_of_dask():
    with dask.config.set(scheduler="synchronous"):
        yield


def random_chunks(rng, size, unit=1):
    """Any: one, all of length 1, uneven ones; of a multiple of `unit`."""
    most = size // unit
    ends = np.sort(rng.choice(np.arange(1, most), rng.integers(most), replace=False)) if most > 1 else []
    return tuple(unit * int(n) for n in np.diff([0, *ends, most]))


def cut(rng, x, group=1, whole=1):
    """As a dask array in random chunks; the last `whole` axes in one, axis -3 in multiples of `group`."""
    first_whole = x.ndim - whole
    return da.from_array(x, tuple(
        (n,) if axis >= first_whole else random_chunks(rng, n, group if axis == x.ndim - 3 else 1)
        for axis, n in enumerate(x.shape)))


def cut_all(rng, query, key, value):
    group = query.shape[-3] // key.shape[-3] if query.ndim > 3 else 1
    return cut(rng, query, group), cut(rng, key), cut(rng, value)


def in_chunks(arrays, *sizes):
    """Each array in chunks of its sizes, for all axes but the last."""
    return [da.from_array(x, (*size, x.shape[-1])) for x, size in zip(arrays, sizes, strict=True)]


def both(arrays, **options):
    """(out, logsumexp), computed."""
    return dask.compute(*attention(*arrays, **options, return_logsumexp=True))


def count(array, name="attend"):
    return sum(isinstance(key, tuple) and key[0].startswith(f"{name}-") for key in array.__dask_graph__())


# Results.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("start", range(0, 100, 20))
def test_any_problem_in_any_chunks(dtype, start):
    """As exact as the dense call has to be; with the keys in one chunk, its bits."""
    cut_keys = 0
    for seed in range(start, start + 20):
        rng = np.random.default_rng([seed, FLOATS.index(dtype)])
        arrays, options = random_problem(rng, dtype=dtype, most_rows=12, most_keys=20, most_dims=8)
        given = dict(options)
        if "attn_mask" in options and rng.random() < 0.7:
            given["attn_mask"] = cut(rng, options["attn_mask"], whole=0)
        chunked = cut_all(rng, *arrays)
        out, logsumexp = both(chunked, **given)
        dense = everything(*arrays, **options)
        assert_close((out, dense[1], logsumexp), *arrays, **options)
        if chunked[1].numblocks[-2] == chunked[2].numblocks[-2] == 1:
            assert_same_bits((out, logsumexp), dense[::2])
        else:
            cut_keys += 1
    assert cut_keys > 5


def test_long_keys():
    arrays = problem(90, 3000, 64, leading=(1,), num_heads=4, num_kv_heads=2)
    chunked = in_chunks(arrays, (1, 2, 40), (1, 1, 700), (1, 2, (1, 999, 2000)))
    for options in ({}, {"is_causal": True, "q_offset": "end", "softcap": 4.0}, {"sinks": np.arange(4)}):
        out, logsumexp = both(chunked, **options)
        dense = everything(*arrays, **options)
        assert_within((out, dense[1], logsumexp), *arrays, **options)


OPTIONS = {
    "none": {},
    "many": {"is_causal": True, "q_offset": np.array([7, 12]), "alibi_slopes": np.array([[0.5, 0.1, 2, 0]] * 2),
             "sinks": np.arange(4.0), "kv_lens": np.array([20, 40]), "kv_starts": np.array([3, 0])},
    "dropout": {"dropout_p": 0.4, "seed": 5, "window": (12, 3)},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_option
def test_bits_depend_on_the_chunks_of_the_keys_alone(options):
    """Not on those of batch, heads and queries, by which other tasks see nothing; not on whether the values are cut."""
    arrays = problem(30, 41, 8, leading=(2,), num_heads=4, num_kv_heads=2)
    keys = (1, 2, 3, 20, 5, 4, 6)
    expected = both(in_chunks(arrays, (2, 4, 30), (2, 2, keys), (2, 2, keys)), **options)
    for sizes in (((1, 4, 30), (2, 2, keys), (2, 2, 41)), ((2, 2, 7), (1, 2, 41), (1, 1, keys)),
                  ((2, 4, 1), (2, 1, keys), (2, 2, keys))):
        assert_same_bits(both(in_chunks(arrays, *sizes), **options), expected)
    # A batch row by itself, in which fewer chunks of keys are seen.
    alone = [x[1:] for x in arrays]
    own = {name: x[1:] if isinstance(x, np.ndarray) and name != "sinks" else x for name, x in options.items()}
    if "dropout_p" not in options:
        results = both(in_chunks(alone, (1, 4, 30), (1, 2, keys), (1, 2, keys)), **own)
        assert_same_bits(results, tuple(x[1:] for x in expected))


@every_option
def test_bits_depend_on_no_scheduler(options):
    arrays = problem(50, 60, 16, leading=(2,), num_heads=4, num_kv_heads=2)
    chunked = in_chunks(arrays, (1, 2, 13), (1, 1, 7), (2, 1, 9))
    expected = both(chunked, **options)
    for settings in ({"scheduler": "synchronous"}, {"scheduler": "threads", "num_workers": 1},
                     {"scheduler": "threads", "num_workers": 5}):
        for num_threads in (None, 3):
            with dask.config.set(settings):
                assert_same_bits(both(chunked, **options, num_threads=num_threads), expected)


def test_signature():
    """That of the dense function, but that nothing is written into `out`."""
    ours, theirs = (inspect.signature(function).parameters for function in (
        attention, cattn.scaled_dot_product_attention))
    assert {name: (x.default, x.kind) for name, x in ours.items()} == {
        name: (x.default, x.kind) for name, x in theirs.items() if name != "out"}


@pytest.mark.parametrize(("dtype", "kv_dtype"), [(FLOATS[2], FLOATS[2]), (BFLOAT16, BFLOAT16), (FLOATS[0], BFLOAT16)],
                         ids=str)
def test_parts_of_16_bits_are_merged_in_float32(dtype, kv_dtype):
    arrays = problem(20, 33, 8, dtype=dtype, kv_dtype=kv_dtype)
    sizes = (1, 2, 6), (2, 1, 5), (2, 1, 5)
    out, logsumexp = both(in_chunks(arrays, *sizes))
    wide = both(in_chunks([x.astype(np.float32) for x in arrays], *sizes))
    assert (out.dtype, logsumexp.dtype) == (dtype, np.float32)
    assert_same_bits((out, logsumexp), (wide[0].astype(dtype), wide[1]))


def test_numpy_arrays_are_one_chunk():
    """One query in NumPy over many keys, and a mask as a list."""
    query, key, value = problem(1, 40, 8)
    mask = [[True, False] * 20]
    out = attention(query, *in_chunks([key, value], (2, 2, 6), (2, 2, 6)), mask)
    assert out.numblocks == (1, 1, 1, 1)
    assert_same_bits(out.compute(), both(in_chunks([query, key, value], (2, 2, 1), (2, 2, 6), (2, 2, 6)),
                                         attn_mask=np.array(mask))[0])


def test_dropout_where_inner_axes_are_cut():
    """Flat batch indices of a chunk do not follow each other then: outer axes are cut to single rows."""
    arrays = problem(5, 6, 4, leading=(3, 2, 4))
    options = {"dropout_p": 0.5, "seed": 3}
    dense = cattn.scaled_dot_product_attention(*arrays, **options)
    for chunks, expected in (((3, 2, 4), (1, 1, 1)), ((2, 2, 4), (2, 1, 1)), ((3, 1, 4), (3, 2, 1)),
                             ((3, 2, 3), (3, 2, 2))):
        out = attention(*in_chunks(arrays, *[(*chunks, *x.shape[3:5]) for x in arrays]), **options)
        assert out.numblocks[:3] == expected
        assert_same_bits(out.compute(), dense)


def test_seeds_are_drawn_when_the_graph_is_made():
    arrays = in_chunks(problem(9, 20), (1, 2, 5), (1, 2, 5), (1, 2, 5))
    one, other = (attention(*arrays, dropout_p=0.5) for _ in range(2))
    assert_same_bits(one.compute(), one.compute())
    assert (one.compute() != other.compute()).any()
    assert one.name != other.name


def test_names_follow_from_the_call():
    """The same call has the same keys, so that dask computes it once; another has others."""
    arrays = in_chunks(problem(9, 20), (1, 2, 5), (1, 2, 5), (1, 2, 5))
    calls = {}, {"scale": 1.0}, {"window": (1, 1)}, {"kv_lens": np.array([1, 2])}, {"attn_mask": np.ones((9, 20), bool)}
    names = [attention(*arrays, **options).name for options in calls]
    assert len(set(names)) == len(calls)
    assert names == [attention(*arrays, **options).name for options in calls]


# Tasks.


def test_causal_tasks():
    arrays = in_chunks(problem(80, 80, leading=(2,), num_heads=3), *[(1, 1, 10)] * 3)
    out = attention(*arrays, is_causal=True)
    assert count(out) == 2 * 3 * (8 * 9 // 2)
    assert out.chunks == arrays[0].chunks
    assert count(attention(*arrays, is_causal=True, window=(9, None))) == 2 * 3 * (8 + 7)
    assert count(attention(*arrays)) == 2 * 3 * 64


def test_no_task_without_a_key_to_see():
    """By q_offset, windows and lengths, whatever the chunks: as many tasks as blocks in which a pair is seen."""
    hiding = "is_causal", "q_offset", "window", "kv_lens", "kv_starts"
    total = full = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        arrays, options = random_problem(rng, most_rows=12, most_keys=20)
        options = {name: x for name, x in options.items() if name in hiding}
        chunked = cut_all(rng, *arrays)
        seen = reference.scaled_dot_product_attention(*arrays, scale=0, **options, return_weights=True)[1] > 0
        out = attention(*chunked, **options)
        keys = np.cumsum([0, *_merged(chunked[1].chunks[-2], chunked[2].chunks[-2])])
        bounds = [*([0, *itertools.accumulate(sizes)] for sizes in out.chunks[:-1]), keys]
        blocks = [seen[tuple(slice(*ends) for ends in block)]
                  for block in itertools.product(*(itertools.pairwise(ends) for ends in bounds))]
        assert count(out) == sum(block.any() for block in blocks)
        total, full = total + count(out), full + len(blocks)
    assert 100 < total < 0.8 * full


def _merged(*chunks):
    return np.diff([0, *sorted(set().union(*(np.cumsum(sizes).tolist() for sizes in chunks)))])


def test_rows_that_see_nothing():
    arrays = in_chunks(problem(9, 20, 4, head_dim_v=3), *[(1, 1, 4)] * 3)
    options = {"kv_lens": np.array([0, 3])}
    out, logsumexp = attention(*arrays, **options, return_logsumexp=True)
    assert count(out) == 1 * 2 * 3
    out, logsumexp = dask.compute(out, logsumexp)
    assert (out.shape, logsumexp.shape) == ((2, 2, 9, 3), (2, 2, 9))
    assert not out[0].any()
    assert (logsumexp[0] == -np.inf).all()
    assert (logsumexp[1] > -np.inf).all()


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_empty_axes(sizes):
    rows, keys = sizes
    arrays = in_chunks(problem(rows, keys, 4), (1, 2, rows), (1, 2, keys), (1, 2, keys))
    out, logsumexp = both(arrays, sinks=np.ones(2))
    assert_same_bits(out, np.zeros((2, 2, rows, 4), np.float32))
    assert_same_bits(logsumexp, np.full((2, 2, rows), -np.inf, np.float32))


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 2)])
def test_empty_batches(leading):
    arrays = problem(5, 6, 4, leading=leading)
    out, logsumexp = both([da.from_array(x, x.shape) for x in arrays], dropout_p=0.5, is_causal=True, q_offset="end",
                          alibi_slopes=np.ones((*leading, 2)), kv_lens=np.ones(leading, int))
    assert (out.shape, logsumexp.shape) == ((*leading, 2, 5, 4), (*leading, 2, 5))


def test_chunks_without_rows():
    arrays = problem(7, 9, 4)
    chunked = [da.from_array(x, (2, 2, sizes, 4)) for x, sizes in zip(arrays, ((3, 0, 4), (0, 5, 4), (5, 0, 4)),
                                                                     strict=True)]
    dense = everything(*arrays)
    out, logsumexp = both(chunked)
    assert_close((out, dense[1], logsumexp), *arrays)


def test_a_task_has_its_own_chunks_alone():
    """Masks, lengths and slopes are cut with the rest: what travels to a worker does not grow with the problem."""
    batch, rows = 64, 32
    query, key, value = problem(rows, rows, 4, leading=(batch,))
    rng = np.random.default_rng(0)
    options = {"kv_lens": rng.integers(1, rows, batch), "q_offset": rng.integers(0, rows, batch),
               "alibi_slopes": rng.random((batch, 2)), "attn_mask": rng.random((batch, 1, rows, rows)) < 0.5}
    out = attention(*in_chunks([query, key, value], *[(1, 1, 8)] * 3), **options)
    graph = out.__dask_graph__()
    sizes = [len(pickle.dumps(graph[key])) for key in graph]
    assert max(sizes) < 8 * 8 + 2000  # a chunk of the mask, a task's options, names


def test_values_that_are_not_seen():
    """NaN behind kv_lens, in the same chunk as keys that are seen and in others."""
    query, key, value = problem(5, 20, 4)
    lengths = np.array([7, 12])
    expected = both(in_chunks([query, key, value], *[(1, 1, 5)] * 3), kv_lens=lengths)
    for row, length in enumerate(lengths):
        key[row, :, length:] = value[row, :, length:] = np.nan
    assert_same_bits(both(in_chunks([query, key, value], *[(1, 1, 5)] * 3), kv_lens=lengths), expected)


# Warnings and errors.


def test_warnings():
    arrays = in_chunks(problem(9, 20), *[(1, 2, 5)] * 3)
    with pytest.warns(UserWarning, match="is_causal with fewer queries than keys and no q_offset"):
        attention(*arrays, is_causal=True)
    mask = np.tril(np.ones((9, 20), np.float32))
    with pytest.warns(UserWarning, match="a float mask that holds only 0 and 1") as caught:
        attention(*arrays, mask)
    assert caught[0].filename == __file__
    attention(*arrays, da.from_array(mask), is_causal=True, q_offset=0).compute()


UNKNOWN = da.from_array(np.ones(20)) > 0
ERRORS = {
    "return_weights": ({"return_weights": True}, ValueError,
                       "return_weights: expected False over dask arrays, got True; "
                       "cattn.scaled_dot_product_attention of some rows, computed, gives theirs"),
    "head_dim": ({"key": da.ones((2, 2, 20, 8), chunks=(2, 2, 20, 4), dtype="f4")}, ValueError,
                 "key: expected head_dim in one chunk, got chunks (4, 4); key.rechunk({-1: -1})"),
    "head_dim_v": ({"value": da.ones((2, 2, 20, 8), chunks=(2, 2, 20, 4), dtype="f4")}, ValueError,
                   "value: expected head_dim_v in one chunk, got chunks (4, 4); value.rechunk({-1: -1})"),
    "heads": ({"query": da.ones((2, 6, 9, 8), chunks=(2, 4, 9, 8), dtype="f4")}, ValueError,
              "query: expected chunks of heads in multiples of num_heads / num_kv_heads = 3, got (4, 2); "
              "query.rechunk({-3: 3})"),
    "unknown": ({"key": da.ones((2, 2, 20, 8), dtype="f4")[:, :, UNKNOWN]}, ValueError,
                "key: expected chunks of known sizes, got shape (2, 2, nan, 8); key.compute_chunk_sizes() finds them"),
    "unknown mask": ({"attn_mask": (da.ones(20) > 0)[UNKNOWN]}, ValueError,
                     "attn_mask: expected chunks of known sizes, got shape (nan,); "
                     "attn_mask.compute_chunk_sizes() finds them"),
    "kv_lens": ({"kv_lens": da.from_array(np.array([1, 2]))}, TypeError,
                "kv_lens: expected what is known when the graph is made, got a dask Array; kv_lens.compute() is"),
    "sinks": ({"sinks": dask.delayed(np.ones)(2)}, TypeError,
              "sinks: expected what is known when the graph is made, got a dask Delayed; sinks.compute() is"),
    "delayed": ({"query": dask.delayed(np.ones)((2, 2, 9, 8))}, TypeError,
                "query: expected a dask array made of a graph, got a dask Delayed"),
    "dtype": ({"key": da.ones((2, 2, 20, 8), dtype="f8"), "value": da.ones((2, 2, 20, 8), dtype="f8")}, TypeError,
              "key: expected dtype float32, as query has (or a 16-bit one under a float32 query), got float64; "
              "key.astype(query.dtype) casts"),
    "shape": ({"attn_mask": da.ones((9, 7), dtype=bool)}, ValueError,
              "attn_mask: expected a shape that broadcasts to (2, 2, 9, 20), got shape (9, 7)"),
    "option": ({"window": 3}, ValueError, "window: expected None or (left, right), got 3; for that many keys on each "
                                          "side: (3, 3)"),
    "num_threads": ({"num_threads": 0}, ValueError, f"num_threads: expected 1 to {2**31 - 1}, got 0; None takes the "
                                                    "default"),
}


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(changed, error, message):
    """Of the call, before anything is computed."""
    arguments = dict(zip(("query", "key", "value"), in_chunks(problem(9, 20, 8), *[(1, 2, 5)] * 3), strict=True))
    with pytest.raises(error) as caught:
        attention(**arguments | changed)
    assert str(caught.value) == message


@pytest.mark.parametrize(("changed", "cure"), [
    (ERRORS["head_dim"][0], lambda call: call | {"key": call["key"].rechunk({-1: -1})}),
    (ERRORS["heads"][0], lambda call: call | {"query": call["query"].rechunk({-3: 3})}),
    (ERRORS["unknown"][0], lambda call: call | {"key": call["key"].compute_chunk_sizes()}),
    (ERRORS["kv_lens"][0], lambda call: call | {"kv_lens": call["kv_lens"].compute()}),
], ids=["head_dim", "heads", "unknown", "kv_lens"])
def test_cures(changed, cure):
    arguments = dict(zip(("query", "key", "value"), in_chunks(problem(9, 20, 8), *[(1, 2, 5)] * 3), strict=True))
    attention(**cure(arguments | changed)).compute()


def test_without_dask():
    """cattn imports none of it, the module only when it is used; without dask, and with one too old, it says so."""
    code = """
import sys
import cattn
assert "cattn.integrations" not in sys.modules
from cattn.integrations import dask
assert not {"dask", "distributed"} & sys.modules.keys()
"""
    call = """
try:
    dask.scaled_dot_product_attention(None, None, None)
except ImportError as error:
    print(error)
"""
    needs = r'cattn.integrations.dask: needs dask 2023\.7 or newer \(.*\): `pip install "cattn\[dask\]"`\n'
    for setup, got in (('sys.modules["dask"] = None', "import of dask halted"),
                       ('import dask as them; them.__version__ = "2023.6.1"', "this is 2023.6.1")):
        done = python(code + setup + call)
        assert re.fullmatch(needs, done.stdout), done
        assert got in done.stdout


def test_arrays_of_expressions():
    """An option of dask makes arrays of another kind, which have no graph to add to."""
    code = """
import warnings
warnings.simplefilter("ignore")
import dask.array
from cattn.integrations.dask import scaled_dot_product_attention
x = dask.array.ones((4, 4), chunks=2)
try:
    print("graph" if isinstance(x, dask.array.core.Array) else scaled_dot_product_attention(x, x, x))
except TypeError as error:
    print(error)
"""
    done = python(code, DASK_ARRAY__QUERY_PLANNING="True")
    assert done.stdout in ("graph\n", 'query: expected a dask array made of a graph, got a dask Array; without the '
                                      'option "array.query-planning" of dask it is one\n'), done


# Threads.


@pytest.fixture
def worker(monkeypatch):
    """That of a task; its state may be changed."""
    state = SimpleNamespace(nthreads=8, executing={1}, ready=[])
    monkeypatch.setitem(sys.modules, "distributed.worker", SimpleNamespace(
        get_worker=lambda: SimpleNamespace(state=state)))
    monkeypatch.setattr(_kernels, "cpus", 16)
    return state


def test_tasks_of_a_worker_share_its_threads(worker):
    for running, waiting, share in ((1, 0, 8), (2, 0, 4), (3, 0, 2), (3, 9, 1), (8, 0, 1), (20, 50, 1)):
        worker.executing, worker.ready = set(range(running)), list(range(waiting))
        assert integration._share(None) == share
        assert running > 8 or running * share <= 8
    worker.executing, worker.ready, worker.nthreads = {1}, [], 100
    assert integration._share(None) == 16


def test_a_number_that_was_chosen(worker, monkeypatch):
    """For the call, or for the process, whose calls share it."""
    assert integration._share(3) == 3
    cattn.set_num_threads(2)
    assert integration._share(None) is None
    cattn.set_num_threads(None)
    assert integration._share(None) == 8
    monkeypatch.setattr(_threads, "_DEFAULT", (4, "CATTN_NUM_THREADS"))
    assert integration._share(None) is None


def test_threads_of_other_schedulers():
    """Those of one process share, as all of its calls do; the pool of processes has one for each CPU."""
    share = dask.delayed(integration._share, pure=False)(None)
    assert share.compute(scheduler="synchronous") is None
    assert share.compute(scheduler="threads") is None
    assert share.compute(scheduler="processes", num_workers=1) == 1


def test_every_task_asks_for_its_share(monkeypatch):
    asked = []
    monkeypatch.setattr(integration, "_share", lambda num_threads: asked.append(num_threads) or 1)
    arrays = in_chunks(problem(9, 20), *[(2, 2, 5)] * 3)
    attention(*arrays, num_threads=7).compute()
    assert asked == [7] * (2 * 4 + 2)  # queries in 2 chunks, keys in 4, merged at once
    layer = cattn.MultiHeadAttention(16, 2)
    del asked[:]
    integration.multi_head_attention(layer, da.ones((3, 5, 16), chunks=(1, 5, 16), dtype="f4"), num_threads=6).compute()
    assert asked == [6] * 3


# Clusters of processes.


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (dask.config.set({"distributed.comm.timeouts.connect": "5s"}),  # that to a killed worker
          distributed.LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None,
                                   silence_logs=50) as cluster,
          distributed.Client(cluster, set_as_default=False) as client):
        yield client


def last_when_allowed(block, path, block_info=None):
    """The block; that of the last rows, one of all, not before this file is there: until then its worker waits."""
    info = block_info[0]
    while info["chunk-location"][2] == info["num-chunks"][2] - 1 and not os.path.exists(path):
        time.sleep(0.01)
    return block


def test_on_a_cluster(client):
    arrays = problem(50, 60, 16, num_heads=4, num_kv_heads=2)
    chunked = in_chunks(arrays, (1, 2, 13), (1, 1, 7), (2, 1, 9))
    for options in OPTIONS.values():
        expected = both(chunked, **options)
        results = client.compute(attention(*chunked, **options, return_logsumexp=True), sync=True)
        assert_same_bits(tuple(results), expected)
    assert client.submit(integration._share, None).result() == 1
    half = [x.astype(BFLOAT16) for x in arrays]
    out = attention(*in_chunks(half, (1, 2, 13), (1, 1, 7), (2, 1, 9)))
    assert_same_bits(client.compute(out, sync=True), out.compute())


def test_a_killed_worker_changes_nothing(client, tmp_path):
    """Killed with parts of the result in its memory, before the last ones can be computed: it is all there again."""
    query, key, value = in_chunks(problem(120, 120, 16, leading=(1,), num_heads=1), *[(1, 1, 10)] * 3)
    expected = attention(query, key, value, is_causal=True).compute()
    held_back = query.map_blocks(last_when_allowed, str(tmp_path / "go"), dtype=query.dtype)
    pids = client.run(os.getpid)
    future = client.compute(attention(held_back, key, value, is_causal=True))
    try:
        parts, deadline = 0, time.monotonic() + 60
        while parts < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            held = {worker: sum("attend-" in str(key) or "merge-" in str(key) for key in keys)
                    for worker, keys in client.has_what().items()}
            killed, parts = max(held.items(), key=lambda item: item[1])
        os.kill(pids[killed], signal.SIGKILL)
    finally:
        (tmp_path / "go").touch()
    assert_same_bits(future.result(timeout=120), expected)
    assert killed not in client.run(os.getpid)


# Layers.


def tokens(*shape):
    return np.random.default_rng(9).standard_normal(shape, np.float32)


LAYERS = {
    "self-attention": ({}, ((7, 9, 16),), {"is_causal": True}),
    "group": ({"num_kv_heads": 1, "bias": False}, ((7, 9, 16),), {"window": (2, 1), "softcap": 3.0}),
    "cross-attention": ({"kdim": 6, "vdim": 5}, ((7, 9, 16), (7, 12, 6), (7, 12, 5)), {"kv_lens": np.arange(7) + 2}),
    "offsets": ({}, ((7, 9, 16), (7, 12, 16)),
                {"is_causal": True, "q_offset": np.arange(7), "sinks": np.ones(4), "kv_lens": 11}),
    "end": ({}, ((7, 9, 16), (7, 12, 16)), {"is_causal": True, "q_offset": "end"}),
    "slopes": ({}, ((7, 9, 16),), {"alibi_slopes": np.arange(28.0).reshape(7, 4) / 28}),
    "slopes of heads": ({}, ((7, 9, 16),), {"alibi_slopes": np.arange(4.0)}),
    "int8": ({"weight_dtype": "int8"}, ((7, 9, 16),), {}),
    "mask": ({}, ((7, 9, 16),), {"attn_mask": tokens(9, 9)}),
    "masks of batch rows": ({}, ((7, 9, 16),), {"attn_mask": tokens(7, 9, 9) > 0, "key_mask": tokens(7, 9) > -1}),
    "masks of heads": ({}, ((7, 9, 16),), {"attn_mask": tokens(7, 4, 1, 9)}),
    "a mask that broadcasts": ({}, ((7, 9, 16),), {"attn_mask": tokens(1, 4, 9, 9)}),
}


@pytest.mark.parametrize("by_dask", [False, True], ids=["NumPy's masks", "masks of dask"])
@pytest.mark.parametrize(("settings", "shapes", "options"), LAYERS.values(), ids=LAYERS)
def test_layers(settings, shapes, options, by_dask):
    layer = cattn.MultiHeadAttention(16, 4, seed=3, **settings)
    inputs = [tokens(*shape) for shape in shapes]
    chunked = [da.from_array(x, (size, *x.shape[1:])) for x, size in zip(inputs, (3, (1, 6), 2), strict=False)]
    given = {name: da.from_array(x, 2) if by_dask and "mask" in name else x for name, x in options.items()}
    out = integration.multi_head_attention(layer, *chunked, **given)
    expected = layer(*inputs, **options)
    assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
    assert_same_bits(out.compute(), expected)
    assert_same_bits(out.compute(scheduler="threads"), expected)


def test_a_layer_is_taken_as_it_is():
    layer, x = cattn.MultiHeadAttention(16, 4, seed=3), tokens(4, 5, 16)
    out, expected = integration.multi_head_attention(layer, da.from_array(x, (1, 5, 16))), layer(x)
    layer.out_proj_weight *= 2
    assert_same_bits(out.compute(), expected)
    again = integration.multi_head_attention(layer, da.from_array(x, (1, 5, 16)))
    assert again.name != out.name
    assert_same_bits(again.compute(), layer(x))


def test_a_layer_on_a_cluster(client):
    layer, x = cattn.MultiHeadAttention(16, 4, seed=3), tokens(4, 5, 16)
    out = integration.multi_head_attention(layer, da.from_array(x, (1, 5, 16)), is_causal=True)
    assert_same_bits(client.compute(out, sync=True), layer(x, is_causal=True))


LAYER_ERRORS = {
    "layer": ({"layer": cattn.reference.MultiHeadAttention(16, 4)}, TypeError,
              "layer: expected a cattn.MultiHeadAttention, got a cattn.reference._multihead.MultiHeadAttention"),
    "no batch": ({"query": da.ones((9, 16), dtype="f4")}, ValueError,
                 "query: expected (batch, seq_len_q, 16), cut along the batch, got shape (9, 16)"),
    "chunks": ({"query": da.ones((7, 9, 16), chunks=(7, 4, 8), dtype="f4")}, ValueError,
               "query: expected chunks along the batch alone, got ((7,), (4, 4, 1), (8, 8)); "
               "query.rechunk({1: -1, 2: -1})"),
    "chunks of the key": ({"key": da.ones((7, 9, 16), chunks=(1, 5, 16), dtype="f4")}, ValueError,
                          "key: expected chunks along the batch alone, got ((1, 1, 1, 1, 1, 1, 1), (5, 4), (16,)); "
                          "key.rechunk({1: -1, 2: -1})"),
    "width": ({"query": da.ones((7, 9, 15), dtype="f4")}, ValueError,
              "query: expected (batch, seq_len_q, 16) or (seq_len_q, 16), got shape (7, 9, 15); a layer with "
              "input_dim=15 takes it"),
    "mask": ({"attn_mask": da.ones((7, 3, 9, 9), dtype=bool)}, ValueError,
             "attn_mask: expected (9, 9), (7, 9, 9) or (7, 4, 9, 9) (axes of 1 broadcast), got shape (7, 3, 9, 9)"),
    "key_mask": ({"key_mask": da.ones((7, 9), dtype=int)}, TypeError,
                 "key_mask: expected bool (True = attend), got dtype int64; for 1 = attend: key_mask.astype(bool)"),
    "kv_lens": ({"kv_lens": da.ones(7, dtype=int)}, TypeError,
                "kv_lens: expected what is known when the graph is made, got a dask Array; kv_lens.compute() is"),
}


@pytest.mark.parametrize(("changed", "error", "message"), LAYER_ERRORS.values(), ids=LAYER_ERRORS)
def test_errors_of_layers(changed, error, message):
    call = {"layer": cattn.MultiHeadAttention(16, 4), "query": da.ones((7, 9, 16), chunks=(2, 9, 16), dtype="f4")}
    with pytest.raises(error) as caught:
        integration.multi_head_attention(**call | changed)
    assert str(caught.value) == message


# The program that measures it.


def test_bench():
    for module in ("distributed", "tqdm"):
        pytest.importorskip(module)
    options = {"--tokens": 300, "--chunk": 40, "--key-chunk": 100, "--heads": 2, "--repeats": 2}
    done = subprocess.run([sys.executable, "-m", "bench.dask", *(str(x) for option in options.items() for x in option)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    link, problem_line, by_dask, by_cattn, last = done.stdout.splitlines()
    assert re.fullmatch(r"dashboard: http://127\.0\.0\.1:\d+/status( \(bokeh, .*\))?", link)
    # Of a head's 8 chunks of queries 2 see keys of one chunk, 3 of two, 3 of three.
    assert problem_line.startswith("300 tokens, 2 heads of 64, chunks of 40 queries and 100 keys: 34 tasks; ")
    assert re.match(r"dask: [\d.]+ s on 2 workers of 1 thread, ", by_dask)
    assert re.match(r"cattn: [\d.]+ s in one process of 2 threads, ", by_cattn)
    assert re.match(r"dask has [\d.]+ of its speed; results agree: ", last)


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--workers", "x"], ["--chunk=-1"], ["words"]], ids=" ".join)
def test_wrong_arguments_of_bench(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        bench_dask.main(arguments)
    assert error.value.code == 2
    assert "bench.dask: error: " in capsys.readouterr().err


def test_packages_that_bench_needs(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else name)
    error = line_of_error(capsys, bench_dask.main, [], "bench.dask")
    assert 'not installed: tqdm (pip install "cattn[dask]" tqdm)' in error
