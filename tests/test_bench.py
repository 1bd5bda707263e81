"""The benchmark: its workloads, the peers that are installed, its reports. Nothing here asserts a time."""

import dataclasses
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from processes import FakeProcess, python

from bench import peers, probes, readme, report, runner, worker
from bench.__main__ import main
from bench.files import replaced
from bench.workloads import WORKLOADS, Attention, Layer


def shrunk(work):
    """The same workload, small enough for a test."""
    if work.kind in ("attention", "training"):
        batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim = work.shape
        shape = min(batch, 2), num_heads, num_kv_heads, min(seq_len_q, 37), min(seq_len_kv, 37), head_dim
    elif work.kind in ("packed", "paged"):
        batch, num_heads, num_kv_heads, _, _, head_dim = work.shape
        shape = min(batch, 4), num_heads, num_kv_heads, 7, 150, head_dim  # 150: more than two pages
    else:
        shape = {
            "layer": (2, 9, work.shape[-1]),
            "training_layer": (2, 9, work.shape[-1]),
            "table": (50, 64),
            "cache": work.shape,
            "merge": (*work.shape[:1], 3, 2, 5, 16),
            "rotary": (2, 3, 11, 32),
            "linear": (*work.shape[:1], 64, 48),
        }[work.kind]
    return dataclasses.replace(work, shape=shape)


@functools.cache
def peer_of(name):
    """One of each: some set global state that can be set once."""
    return peers.PEERS[name](1)


def row(limit="fma", dtype="float32", threads=1, quiet=1.0, name=None, **results):
    """A row as `runner.run` makes it: 10 GFLOP, 20 GB."""
    bandwidth = {"bandwidth": 80e9 * threads} if limit == "read" else {}
    return bandwidth | {
        "workload": name or f"work-{limit}",
        "reason": "a test",
        "kind": "attention",
        "shape": [1, 2, 3],
        "dtype": dtype,
        "limit": limit,
        "flops": 10e9,
        "nbytes": 20e9,
        "threads": threads,
        "tolerance": 1e-6,
        "results": {
            name: {"error": 1e-7, "correct": True, "best": median / 2, "median": median, "calls": 5}
            for name, median in results.items()
        },
        "seen": {"time": 1.0, "fma": 40e9 * threads * quiet, "nop": 10e9},
        "quiet": quiet,
        "busy": quiet < 0.88,
        "attempts": 1 if quiet == 1 else 3,
        "notes": [],
    }


@pytest.fixture
def data():
    """What `python -m bench --json` writes: two workloads, two numbers of threads, one result wrong."""
    rows = [row(limit, threads=n, cattn=1 / n, numpy=3 / n) for limit in ("fma", "read") for n in (1, 2)]
    rows[-1]["results"]["numpy"] = {"error": 0.5, "correct": False}
    return {
        "machine": {"cpu": "a CPU", "isa": "avx2", "system": "a system"},
        "versions": {"python": "3.11", "cattn": "0.1 (avx2)", "numpy": "2.0"},
        "limits": {
            "1": {"fma": 40e9, "nop": 10e9, "read": 80e9},
            "2": {"fma": 80e9, "nop": 10e9, "read": 160e9},
        },
        "rows": rows,
        "probes": {"import-time": {"milliseconds": 1.0, "text": "import cattn: 1.0 ms beyond numpy"}},
    }


def test_workloads_are_well_formed():
    names = [work.name for work in WORKLOADS]
    assert len(set(names)) == len(names)
    for work in WORKLOADS:
        assert work.reason
        assert work.limit in ("fma", "read", "")
        assert work.flops > 0 or work.nbytes > 0
        assert work.limit != "read" or work.nbytes > 0
        assert "," not in work.name  # the separator of --workloads


@pytest.mark.parametrize("name", [name for name in peers.PEERS if runner.installed(name)])
@pytest.mark.parametrize("work", WORKLOADS, ids=lambda work: work.name)
def test_every_installed_peer_is_right(work, name):
    if work.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    work = shrunk(work)
    arrays = work.arrays()
    expected, tolerance = runner.float64_answer(work)
    prepare = getattr(peer_of(name), work.kind, None)
    if prepare is None:
        pytest.skip(f"{name} has no {work.kind}")
    try:
        run, to_array = prepare(work, arrays)
    except peers.Unsupported as reason:
        pytest.skip(str(reason))
    assert worker.max_error(to_array(run()), expected) <= tolerance


@pytest.mark.parametrize("work", [w for w in WORKLOADS if w.kind == "attention"], ids=lambda work: work.name)
def test_the_tolerance_notices_a_lost_key(work):
    if work.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    work = shrunk(work)
    expected, tolerance = runner.float64_answer(work)
    arrays = work.arrays()
    for name in ("key", "value"):
        arrays[name] = arrays[name][:, :, :-1]
    if "attn_mask" in arrays:
        arrays["attn_mask"] = arrays["attn_mask"][:, :-1]
    assert worker.max_error(work.expected(arrays), expected) > 2 * tolerance


@pytest.mark.parametrize(
    "work", [w for w in WORKLOADS if w.kind in ("training", "training_layer")], ids=lambda work: work.name
)
def test_the_tolerance_notices_a_lost_token_in_each_gradient(work):
    """And in the result. The last key counts for nothing, or the last token of a layer for no parameter."""
    if work.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    work = shrunk(work)
    expected, tolerance = runner.float64_answer(work)
    arrays = work.arrays()
    if work.kind == "training":
        changed, sizes = ["key"], [arrays[name].size for name in ("query", "query", "key", "value")]
    else:
        changed = ["x", "grad_out"]
        sizes = [arrays["x"].size] * 2 + [parameter.size for parameter in arrays["state"].values()]
    for name in changed:
        arrays[name] = arrays[name].copy()
        arrays[name][..., -1, :] = 0
    difference = np.abs(work.expected(arrays) - expected)
    assert sum(sizes) == difference.size
    for part in np.split(difference, np.cumsum(sizes)[:-1]):
        assert part.max() > 2 * tolerance


def test_products_of_training():
    """Five more than the two of attention; three instead of one of each projection."""
    for work in WORKLOADS:
        if work.kind == "training":
            shape, is_causal = work.shape, work.is_causal
            assert 2 * work.flops == 7 * Attention("", "", shape, is_causal=is_causal).flops
        elif work.kind == "training_layer":
            batch, seq_len, width = work.shape
            heads = Attention("", "", (batch, width // 64, width // 64, seq_len, seq_len, 64)).flops
            assert 2 * work.flops == 7 * heads + 6 * (Layer("", "", work.shape).flops - heads)


@pytest.mark.parametrize("work", [w for w in WORKLOADS if w.kind == "paged"], ids=lambda work: work.name)
def test_the_tolerance_notices_a_lost_key_in_pages(work):
    """Of each sequence; and pages in another order."""
    work = shrunk(work)
    expected, tolerance = runner.float64_answer(work)
    arrays = work.arrays()
    fewer = work.expected(arrays | {"kv_lens": arrays["kv_lens"] - 1})
    assert (np.abs(fewer - expected).max((1, 2)) > 2 * tolerance).all()
    table = arrays["block_table"].copy()
    longest = arrays["kv_lens"].argmax()
    table[longest] = table[longest, ::-1]
    assert worker.max_error(work.expected(arrays | {"block_table": table}), expected) > 2 * tolerance


@pytest.mark.parametrize("work", [w for w in WORKLOADS if w.kind == "packed"], ids=lambda work: work.name)
def test_the_tolerance_notices_a_wrong_length(work):
    work = shrunk(work)
    expected, tolerance = runner.float64_answer(work)
    arrays = work.arrays()
    arrays["cu_seqlens"][1:-1] += 1
    assert worker.max_error(work.expected(arrays), expected) > 2 * tolerance


@pytest.mark.parametrize("work", [w for w in WORKLOADS if w.kind in ("packed", "paged")], ids=lambda work: work.name)
def test_lengths(work):
    """As the shape says; the arrays have no more tokens than those, up to the last page of each."""
    batch, *_, shortest, longest, _ = work.shape
    assert len(work.lengths) == batch and work.lengths.max() == longest
    assert work.lengths.min() == (shortest if batch > 1 else longest)
    work = shrunk(work)
    arrays = work.arrays()
    if work.kind == "packed":
        assert arrays["cu_seqlens"][-1] == len(arrays["query"]) == len(arrays["key"])
        assert (np.diff(arrays["cu_seqlens"]) == work.lengths).all()
    else:
        used = arrays["block_table"][arrays["block_table"] >= 0]
        assert sorted(used) == list(range(len(arrays["key"])))
        assert [key.shape[1] for key, _ in work.sequences(arrays)] == list(work.lengths)


@pytest.mark.parametrize("name", ["cattn", "numpy", "torch"])
@pytest.mark.parametrize("work", [w for w in WORKLOADS if w.kind == "rotary"], ids=lambda work: work.name)
def test_where_turned_queries_go(work, name):
    if not runner.installed(name):
        pytest.skip(f"{name} is not installed")
    work = shrunk(work)
    arrays = work.arrays()
    run, to_array = peer_of(name).rotary(work, arrays)
    result = to_array(run())
    assert np.shares_memory(result, arrays["x"]) == work.in_place
    assert (arrays["x"] == work.arrays()["x"]).all() != work.in_place
    assert np.shares_memory(result, to_array(run()))  # each call writes there


@pytest.mark.parametrize("work", [w for w in WORKLOADS if w.dtype == "int8"], ids=lambda work: work.name)
def test_what_implementations_round_differently_is_equal_here(work):
    """A scale for each token, row, channel or tensor; inputs of a linear layer in 32 or 7 bits."""
    arrays = shrunk(work).arrays()
    if work.kind == "paged":
        assert len(np.unique([arrays["key_scales"], arrays["value_scales"]])) == 1
        assert min(arrays[name].min() for name in ("key", "value")) >= -127
    else:
        assert (arrays["weight_scales"] == arrays["weight_scales"][:, :1]).all()
        levels = (arrays["x"] - arrays["x"].min()) / ((arrays["x"].max() - arrays["x"].min()) / 127)
        assert (levels == levels.round()).all()


def test_a_step_of_a_cache_is_new_where_it_has_to_be():
    """Each call is the same, also when a step is made anew before all its layers are attended."""
    work = next(work for work in WORKLOADS if work.kind == "cache")
    expected, tolerance = runner.float64_answer(work)
    run, _ = peer_of("cattn").cache(work, work.arrays())
    for calls in (1, run.most, 3, 2 * run.most + 1):
        for _ in range(calls):
            assert worker.max_error(run(), expected) <= tolerance
        run.prepare()
        assert (run.layer, run.cache.length(run.sequence)) == (0, work.shape[2])


def test_max_error():
    expected = np.zeros((3, 2))
    assert worker.max_error(np.float32([[0, 0], [0, -2], [1, 0]]), expected) == 2
    assert math.isnan(worker.max_error(np.float32([[0, 0], [0, 9], [np.nan, 0]]), expected))
    with pytest.raises(ValueError, match=r"expected shape \(3, 2\), got \(2, 3\)"):
        worker.max_error(expected.T, expected)


def test_calls_are_counted_and_the_best_is_no_longer_than_the_median():
    calls = []
    times = worker.time_calls(lambda: calls.append(0), seconds=0.01)
    assert 0 < times["best"] <= times["median"]
    assert 0 < times["calls"] < len(calls)


def test_a_slow_call_among_fast_ones_counts_once(monkeypatch):
    """Timed alone, since the clock resolves it; the fast ones then in a group of 4."""
    now, durations = [0.0], iter([0, 1, *[0.25] * 7])

    def run():
        now[0] += next(durations)

    monkeypatch.setattr(worker, "CLOCK", 1)
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert worker.time_calls(run, seconds=2.5)["calls"] == 1 + 4


def test_a_call_that_takes_all_the_time_is_made_once(monkeypatch):
    now = [0.0]

    def run():
        now[0] += 3

    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert worker.time_calls(run, seconds=2) == {"best": 3.0, "median": 3.0, "calls": 1}
    assert worker.time_calls(run, seconds=3) == {"best": 3.0, "median": 3.0, "calls": 1}
    assert now == [3 + 6]


def test_what_is_prepared_is_not_timed(monkeypatch):
    """A group has no more calls than one preparation is good for."""
    now, said = [0.0], []

    class Run:
        most = 4

        def prepare(self):
            now[0] += 100
            said.append("prepare")

        def __call__(self):
            now[0] += 1
            said.append("call")

    monkeypatch.setattr(worker, "CLOCK", 1000)
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    times = worker.time_calls(Run(), seconds=350)
    assert times == {"best": 1.0, "median": 1.0, "calls": 8}
    groups = "".join(word[0] for word in said).split("p")
    assert groups == ["c", "c", "cc", "cccc", "cccc"]


def times(best):
    return {"result": {"best": best, "median": 2 * best, "calls": 3}}


def test_what_is_not_right_is_not_timed():
    processes = {
        "right": FakeProcess(load={"result": 0.5}, measure=times(1.0)),
        "wrong": FakeProcess(load={"result": 2.0}, measure=AssertionError()),
        "nan": FakeProcess(load={"result": math.nan}, measure=AssertionError()),
        "unable": FakeProcess(load={"unsupported": "no such thing"}),
        "broken": FakeProcess(load=runner.PeerError("status -11")),
        "dying": FakeProcess(load={"result": 0.0}, measure=runner.PeerError("status -9")),
    }
    results = runner.check(WORKLOADS[0], processes, "expected.npy", tolerance=1.0)
    assert runner.take_turns(results, processes, seconds=1) == {
        "right": {"best": 1.0, "median": 2.0, "calls": 3 * runner.ROUNDS}
    }
    assert results == {
        "right": {"error": 0.5, "correct": True},
        "wrong": {"error": 2.0, "correct": False},
        "nan": {"error": None, "correct": False},
        "unable": {"unsupported": "no such thing"},
        "broken": {"failed": "status -11"},
        "dying": {"failed": "status -9"},
    }


def probe(time=1.0, fma=1.0, nop=1.0, best=1.0):
    """A machine that has these parts of 40 GFLOP/s and 10 G NOP/s."""
    now = {"time": time, "fma": fma * 40e9, "nop": nop * 10e9}
    return {"result": {"now": now, "best": {"fma": best * 40e9, "nop": 10e9}}}


def measured(probes, *, name="prefill-128", reads=(), **answers):
    """The row of a machine that gives these probes, two for each attempt; what has been said of it; its limits."""
    work = next(work for work in WORKLOADS if work.name == name)
    said, limits = [], {"fma": 40e9, "nop": 10e9, "read": 80e9}
    turns = [times(attempt) for attempt in (3.0, 2.0, 1.0) for _ in range(runner.ROUNDS)]
    answers = {"load": {"result": 0.5}, "measure": turns, "probe": probes, "read": list(reads)} | answers
    processes = {"cattn": FakeProcess(**answers)}
    row = runner.measure(work, 1, processes, "expected.npy", 1.0, 1, limits, said.append)
    return row | runner.how_quiet(row["seen"], limits), said, limits


@pytest.mark.parametrize(
    ("probes", "attempts", "best", "quiet", "is_busy"),
    [
        ([probe()] * 2, 1, 3.0, 1.0, False),
        ([probe(nop=0.8), probe(fma=0.9)], 1, 3.0, 0.8, False),
        ([probe(), probe(time=0.5), *[probe()] * 2], 2, 2.0, 1.0, False),
        ([probe(nop=0.6), *[probe()] * 3], 2, 2.0, 1.0, False),
        ([probe(fma=0.5), probe(), probe(fma=0.7), probe(), probe(fma=0.6), probe()], 3, 2.0, 0.7, True),
    ],
    ids=["quiet", "almost", "somebody else's CPU time", "somebody else in the same core", "for long"],
)
def test_what_is_measured_on_a_busy_machine_is_repeated(probes, attempts, best, quiet, is_busy):
    """Two times at most; the quietest attempt counts."""
    row, said, _ = measured(probes)
    assert (row["attempts"], row["results"]["cattn"]["best"]) == (attempts, best)
    assert (row["quiet"], row["busy"]) == (pytest.approx(quiet), is_busy)
    assert said == ["prefill-128 again, since the machine was busy"] * (attempts - 1)
    assert not probes  # all were asked for


def test_a_limit_that_grows_makes_earlier_rows_busy():
    """The machine was busy from the start, and nothing to compare with."""
    row, _, limits = measured([probe(), probe()])
    assert not row["busy"]
    runner.probe(FakeProcess(probe=probe(best=2.0)), limits)
    assert runner.how_quiet(row["seen"], limits) == {"quiet": 0.5, "busy": True}


@pytest.mark.parametrize(("best", "expected"), [(1.5, 1.5), (1.1, 1.1)])
def test_more_than_the_fma_peak_is_measured_again(best, expected):
    """Until it is above the call, some times; it is never lowered to 100 %."""
    flops = next(work.flops for work in WORKLOADS if work.name == "prefill-128")
    fast = times(flops / 48e9)  # 120 % of the peak
    probes = [probe(), probe(), *[probe(best=best)] * runner.LIMITS]
    row, _, limits = measured(probes, measure=fast)
    assert limits["fma"] == expected * 40e9
    percent = report.percent(row, row["results"]["cattn"], {"1": limits})
    assert percent == pytest.approx(120 / best)
    [note] = row["notes"]
    assert note.startswith(f"FMA peak measured again: {percent:.0f} % of it instead of 120 %")
    assert note.endswith("still less than the call's rate") == (percent > 100)
    assert len(probes) == (0 if percent > 100 else runner.LIMITS - 1)


def test_more_than_the_read_bandwidth_is_measured_again():
    nbytes = next(work.nbytes for work in WORKLOADS if work.name == "decode-gqa4")
    reads = [{"result": rate} for rate in (90e9, 80e9, 70e9, 110e9, 999e9)]  # the first: beyond caches
    row, _, limits = measured([probe()] * 2, name="decode-gqa4", reads=reads, measure=times(nbytes / 100e9))
    assert row["bandwidth"] == 110e9 and limits["read"] == 90e9
    assert row["notes"] == ["read bandwidth measured again: 91 % of it instead of 125 %"]


def test_a_worker_that_dies_is_an_error():
    process = runner.Process("numpy", 1)
    process.process.kill()
    with pytest.raises(runner.PeerError, match="ended with status -9"):
        process.ask("version")
    process.close()


def test_a_worker_reports_what_goes_wrong():
    process = runner.Process("numpy", 1)
    try:
        with pytest.raises(runner.PeerError, match="FileNotFoundError"):
            process.ask("load", "tiny-3x2", "no such file")
        assert "result" in process.ask("version")
    finally:
        process.close()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_probes_of_this_machine(num_threads):
    """One of cattn's processes: what is had now is no more than the best."""
    process = runner.Process("cattn", num_threads)
    try:
        found = process.ask("probe")["result"]
        assert found["now"]["time"] > 0 and process.ask("read", 1 << 20)["result"] > 0
        for name in ("fma", "nop"):
            assert 0 < found["now"][name] <= found["best"][name]
    finally:
        process.close()


@pytest.mark.parametrize(
    ("limit", "dtype", "value", "unit", "percent"),
    [
        ("fma", "float32", 20, "GFLOP/s", 50),
        ("fma", "float64", 20, "GFLOP/s", 100),
        ("read", "float32", 40, "GB/s", 50),
        ("", "float32", 20, "GFLOP/s", None),
    ],
)
def test_derived_numbers(data, limit, dtype, value, unit, percent):
    line = row(limit, dtype, cattn=1.0, numpy=3.0, torch=2.0)
    result = line["results"]["cattn"]
    assert report.speed(line, result) == (value, unit)
    assert report.percent(line, result, data["limits"]) == percent
    assert report.ratio(line, "numpy") == 3
    assert report.best_peer(line) == "torch"
    assert report.ratio(line, "openvino") is None


def text_of(data):
    """What a run prints."""
    return "\n".join(
        [report.header(data), *(report.lines(rows, data) for rows in report.by_workload(data)), report.footer(data)]
    )


def test_the_text_names_what_is_wrong_and_where_cattn_is_behind(data):
    data["rows"][0] = row(cattn=2.0, numpy=1.0)
    text = text_of(data)
    assert "    numpy: WRONG: error 0.5\n" in text and text.count("WRONG") == 2  # and in its column
    assert "behind at work-fma: numpy takes 0.50 of cattn's time" in text
    assert "import cattn: 1.0 ms beyond numpy" in text
    assert "BUSY" not in text and "*" not in text


def test_the_text_says_where_the_machine_was_busy(data):
    data["rows"][0] = row(cattn=1.0, numpy=9.0, quiet=0.5)
    data["rows"][2]["notes"] = ["a note"]
    text = text_of(data)
    assert re.search(r"\nwork-fma +1 +1000\*", text) and re.search(r"\nwork-read +1 +1000 ", text)
    assert "\n    a note\n" in text
    assert "1 thread, geometric mean over the workloads that are not busy: 3.00x numpy\n" in text
    assert "2 threads, geometric mean over the workloads: 3.00x numpy\n" in text
    assert (
        "BUSY: the machine was busy during 1 of 4 rows (*, or noticed later): probes found as little as 50% of it. "
        "These rows say little: repeat --workloads work-fma\n"
    ) in text
    markdown = report.markdown(data)
    assert "| work-fma | 1000\\* | 50 % | 500.0 | 50 % | 1e-07 | 3.00x |" in markdown
    assert "rows (\\*, or noticed later)" in markdown


@pytest.fixture
def root(data, tmp_path):
    """A directory with a run that has what README shows, and pages to write it into."""
    data["rows"] += [
        row(name=name, threads=n, cattn=1.0, numpy=2.0) for name in readme.SHORT for n in (1, 2)
    ]
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench.json").write_text(json.dumps(data))
    for name in ("README.md", readme.PAGE):
        (tmp_path / name).write_text("# cattn\n<!-- bench:start -->\nold\n<!-- bench:end -->\nthe rest\n")
    return tmp_path


def write_pages(root):
    return readme.main([str(root / "bench.json"), "--root", str(root)])


def test_readme_round_trip(root):
    pytest.importorskip("matplotlib")
    for _ in range(2):  # the second time changes nothing
        assert write_pages(root) == 0
        short, page = ((root / name).read_text() for name in ("README.md", readme.PAGE))
        for text, mark in ((short, ""), (page, "## ")):
            assert text.startswith(f"# cattn\n<!-- bench:start -->\n{mark}a CPU, avx2, a system")
            assert text.endswith("<!-- bench:end -->\nthe rest\n")
            assert "old" not in text
        assert "| work-fma | 1000 | 50 % | 500.0 | 50 % | 1e-07 | 3.00x |" in page
        assert "| work-read | 1000 | 50 % of 80.0 GB/s | 500.0 | 50 % of 160.0 GB/s | 1e-07 | WRONG |" in page
        for words in readme.SHORT.values():
            assert f"| {words} | 1000 | 2.00x |" in short
        assert "work-fma" not in short and f"]({readme.PAGE})" in short
        assert (root / readme.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_page_keeps_each_machine(root, data):
    """A table of each, where it was; a new one comes first."""
    pytest.importorskip("matplotlib")
    page, run = root / readme.PAGE, root / "bench.json"

    def headings():
        return [line for line in page.read_text().splitlines() if line.startswith("## ")]

    for cpu in ("A", "B", "C", "B"):
        data["machine"]["cpu"] = cpu
        data["versions"]["numpy"] = f"3.{len(headings())}"
        run.write_text(json.dumps(data))
        assert write_pages(root) == 0
    assert headings() == [f"## {cpu}, avx2, a system" for cpu in "CBA"]
    text = page.read_text()
    assert [text.count(f"numpy 3.{n}") for n in range(4)] == [1, 0, 1, 1]  # A, once B, C, B again
    assert text.endswith("<!-- bench:end -->\nthe rest\n")


def test_bytes_to_measure_memory_by(tmp_path):
    def bytes_of(megabytes, total):
        caches = tmp_path / f"{megabytes} {total}"
        for number, size in enumerate(("48K", f"{megabytes << 10}K")):
            (caches / f"index{number}").mkdir(parents=True)
            (caches / f"index{number}" / "size").write_text(f"{size}\n")
        memory = caches / "meminfo"
        memory.write_text(f"MemTotal:       {total << 10} kB\n")
        return runner.beyond_caches(caches, memory) >> 20

    assert bytes_of(32, 1 << 16) == 256
    assert bytes_of(300, 1 << 16) == 1200
    assert bytes_of(300, 4096) == 512
    assert runner.beyond_caches(tmp_path / "nothing", tmp_path / "nothing") == runner.LEAST_READ


def test_readme_says_where_the_machine_was_busy(data):
    data["rows"] += [row(name=name, threads=2, cattn=1.0, numpy=2.0) for name in readme.SHORT]
    assert "*" not in readme.short(data)
    data["rows"][-1] |= {"busy": True, "quiet": 0.5}
    first, *_, last, _, _ = readme.short(data).splitlines()
    assert first.endswith(" \\*: the machine was busy.") and "| 1000\\* | 2.00x |" in last


def test_readme_shows_workloads_that_exist():
    assert readme.SHORT.keys() <= {work.name for work in WORKLOADS if work.default}


@pytest.mark.parametrize("page", ["README.md", readme.PAGE])
@pytest.mark.parametrize("text", ["no markers", "<!-- bench:end --><!-- bench:start -->"])
def test_pages_without_markers_are_left_alone(root, capsys, page, text):
    (root / page).write_text(text)
    before = [(root / name).read_text() for name in ("README.md", readme.PAGE)]
    assert write_pages(root) == 2
    assert [(root / name).read_text() for name in ("README.md", readme.PAGE)] == before
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and page in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: 3, "no dictionary"),
        (lambda data: [data], "no dictionary"),
        (lambda data: {}, "no machine,"),
        (lambda data: data | {"rows": 3}, "no rows,"),
        (lambda data: data | {"rows": [[]]}, "no rows[0],"),
        (lambda data: data | {"rows": [data["rows"][0] | {"threads": "2"}]}, "no rows[0].threads,"),
        (lambda data: data | {"rows": [data["rows"][0] | {"results": {}}]}, "no rows[0].results.cattn,"),
        (lambda data: data | {"limits": {"1": {"fma": 1}}}, "no limits.1.read,"),
        (lambda data: data | {"limits": {}}, "IndexError: "),
        (lambda data: data | {"interrupted": True}, "a run that ended early"),
        (lambda data: data | {"error": "cattn: status -9"}, "a run that ended early"),
    ],
)
def test_readme_of_something_else(root, data, capsys, change, message):
    (root / "bench.json").write_text(json.dumps(change(data)))
    assert write_pages(root) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert "old" in (root / "README.md").read_text()


def test_readme_of_a_run_without_its_rows(root, data, capsys):
    data["rows"] = data["rows"][:-2]
    (root / "bench.json").write_text(json.dumps(data))
    assert write_pages(root) == 2
    assert f"no row of {list(readme.SHORT)[-1]}, which README shows" in capsys.readouterr().err


@pytest.mark.parametrize("counts", [["1", "2"], ["2"]], ids=" and ".join)
def test_plot(data, tmp_path, counts):
    """Also of rows that have nothing to draw, that cattn loses, that were measured on a busy machine."""
    pytest.importorskip("matplotlib")
    data["rows"] += [row(name="behind", threads=n, cattn=3.0, numpy=1.0, quiet=0.5) for n in (1, 2)]
    data["limits"] = {count: data["limits"][count] for count in counts}
    data["rows"] = [line for line in data["rows"] if str(line["threads"]) in counts]
    report.plot(data, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_end_to_end(tmp_path, capsys):
    path = tmp_path / "bench.json"
    names = "tiny-3x2,table-5000x512"
    assert main(["--workloads", names, "--threads", "1", "--seconds", "0.01", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data.keys() == {"machine", "versions", "limits", "rows", "probes"}
    assert data["machine"].keys() == {"cpu", "isa", "system", "read_nbytes"}
    assert data["versions"].keys() == {"python", "cattn", "numpy"}
    assert all(data["limits"]["1"][name] > 0 for name in ("fma", "nop", "read"))
    assert [line["workload"] for line in data["rows"]] == names.split(",")
    for line in data["rows"]:
        assert line.keys() == row(limit="").keys()
        assert line["results"].keys() == {"cattn", "numpy"}
        assert 1 <= line["attempts"] <= 1 + runner.REPEATS
        for result in line["results"].values():
            assert result.keys() == {"error", "correct", "best", "median", "calls"}
            assert result["error"] <= line["tolerance"]
    out, err = capsys.readouterr()
    assert out.replace("*", " ") == text_of(data).replace("*", " ") + "\n"  # a row may be found busy later
    lines = [line for line in err.splitlines() if not line.endswith(" again, since the machine was busy")]
    assert [line.rpartition(": ")[2] for line in lines] == ["starting cattn, numpy on 1 thread", *names.split(",")]
    assert lines[2].startswith("1 of 2 rows done, about ")


# The program, on rows that are made up.


@pytest.fixture
def fake_run(data, monkeypatch):
    """Lets `main` run on the rows of `data`; `meanwhile` is called with their number before each workload."""

    def fake(meanwhile):
        def run(works, peers, thread_counts, seconds, about, say):
            rows, data["rows"], data["probes"] = data["rows"], [], {}
            meanwhile(0)
            yield data
            while rows:
                about(rows[0]["workload"])
                meanwhile(len(data["rows"]))
                data["rows"] += [rows.pop(0), rows.pop(0)]
                yield data
            meanwhile(len(data["rows"]))

        monkeypatch.setattr(runner, "run", run)
        monkeypatch.setattr(probes, "PROBES", {})

    return fake


def test_rows_appear_when_they_are_measured(data, fake_run, tmp_path, capsys):
    """On stdout and, as valid JSON, in the file: before anything else is measured."""
    path, seen = tmp_path / "bench.json", []
    table = [report.header(data), *(report.lines(rows, data) for rows in report.by_workload(data))]

    def meanwhile(count):
        if seen or count:
            assert len(json.loads(path.read_text())["rows"]) == count
        seen.append(capsys.readouterr().out)

    fake_run(meanwhile)
    assert main(["--json", str(path)]) == 1  # NumPy is wrong in a row
    assert seen == ["", *(f"{part}\n" for part in table)]
    assert capsys.readouterr().out == f"{report.footer(data)}\n"
    assert [child.name for child in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), runner.PeerError("its process ended with status -11")],
                         ids=["interrupt", "peer"])
def test_rows_are_kept_when_a_run_ends_early(data, fake_run, tmp_path, capsys, error):
    def meanwhile(count):
        if count:
            raise error

    fake_run(meanwhile)
    path, is_interrupt = tmp_path / "bench.json", isinstance(error, KeyboardInterrupt)
    assert main(["--json", str(path)]) == (130 if is_interrupt else 1)
    found = json.loads(path.read_text())
    assert found["rows"] == data["rows"] and len(found["rows"]) == 2
    out, err = capsys.readouterr()
    assert "2 threads, geometric mean over the workloads: 3.00x numpy" in out
    if is_interrupt:
        assert found["interrupted"] is True
        assert out.splitlines()[-1] == "Interrupted: what stands above was measured, the rest was not."
    else:
        assert found["error"] == "cattn: its process ended with status -11"
        assert err.splitlines()[-1] == found["error"]


@pytest.mark.parametrize("end", [None, KeyboardInterrupt], ids=["whole", "interrupted"])
def test_the_picture_comes_last(data, fake_run, tmp_path, capsys, monkeypatch, end):
    """Everything is said when a second Ctrl-C leaves it out."""
    pytest.importorskip("matplotlib")

    def meanwhile(count):
        if count and end:
            raise end

    def plot(data, path):
        seen.append(capsys.readouterr().out.splitlines()[-1])
        raise KeyboardInterrupt

    fake_run(meanwhile)
    seen = []
    monkeypatch.setattr(report, "plot", plot)
    with pytest.raises(KeyboardInterrupt):
        main(["--plot", str(tmp_path / "bench.png")])
    assert seen[0].startswith("Interrupted: " if end else "2 threads, geometric mean ")


def test_nothing_to_draw(data, fake_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for line in data["rows"]:
        del line["results"]["numpy"]
    fake_run(lambda count: None)
    assert main(["--plot", str(tmp_path / "bench.png")]) == 0
    assert "not drawn, since no peer has a time: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_right_results_are_exit_status_0(data, fake_run):
    data["rows"] = data["rows"][:2]
    fake_run(lambda count: None)
    assert main([]) == 0


def test_interrupted_before_anything_is_known(data, fake_run, capsys):
    def meanwhile(count):
        raise KeyboardInterrupt

    fake_run(meanwhile)
    assert main([]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(tmp_path, number):
    """Of a run as it is, in the middle of a row: its processes end with it, and no temporary file stays."""
    path, scratch = tmp_path / "bench.json", tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["--workloads", "tiny-3x2,table-5000x512", "--threads", "1", "--seconds", "0.5", "--json", str(path)]
    # As `python -m bench`, but that a shell's background jobs are born ignoring SIGINT.
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('bench', run_name='__main__', alter_sys=True)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"TMPDIR": str(scratch)}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=runner.ROOT, env=environment, **pipes)
    for line in process.stdout:
        if line.startswith("tiny-3x2 "):
            break
    assert list(scratch.iterdir())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)  # their ends of stderr are closed as well
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert not list(scratch.iterdir())
    if number == signal.SIGTERM:
        return
    assert "1 thread: FMA peak " in out and out.splitlines()[-1].startswith("Interrupted: ")
    data = json.loads(path.read_text())
    assert data["interrupted"] is True and [line["workload"] for line in data["rows"]] == ["tiny-3x2"]


def test_progress_on_a_terminal_stays_out_of_the_table(data, fake_run, monkeypatch, capsys):
    """It is overwritten in place, and wiped before a row is printed."""
    fake_run(lambda count: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main(["--workloads", "tiny-16"])
    out, err = capsys.readouterr()
    assert "\r" not in out and "\n" not in err
    assert err.startswith("\r0 of 1 rows done, about ") and err.endswith(" \r")


def test_a_probe_that_fails_says_so():
    assert probes.run("no-such-probe", 1)["text"].startswith("no-such-probe: failed: KeyError")


WRONG_ARGUMENTS = {
    **{
        f"threads {text[:7]}": (["--threads", text], f"expected numbers from 1 to 1024, as in 1,2, got '{text}'")
        for text in ("0", "many", "1,", "1,1025", "9" * 5000)
    },
    "peer of none": (["--peers", "tensorflow"], "got 'tensorflow'"),
    "cattn as peer": (["--peers", "cattn"], "got 'cattn'"),
    "unknown workload": (["--workloads", "prefill-513"], "got 'prefill-513'"),
    "no seconds": (["--seconds", "0"], "expected seconds above 0"),
    "no directory": (["--json", "no/such/directory/bench.json"], "no directory 'no/such/directory'"),
    "json to a device": (["--json", "/dev/null"], "expected a new file or one to replace, got '/dev/null'"),
    "name that is too long with .new": (["--json", "x" * 253], "cannot be written: [Errno"),
    "name that is too long": (["--json", "x" * 300], "cannot be written: [Errno"),
    "plot of an unknown type": (["--plot", "x.txt"], "got 'x.txt'"),
    "plot without a type": (["--plot", "x"], "got 'x'"),
    "plot without a name": (["--plot", ""], "got ''"),
    "plot to no directory": (["--plot", "no/such/directory/x.png"], "no directory 'no/such/directory'"),
    "one file for both": (["--plot", "x.svg", "--json", "./x.svg"], "expected two files, got "),
    "nothing to draw": (["--plot", "x.png", "--peers", "no-such-peer"], "no peer to draw, not installed: no-such-peer"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_argument_errors(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run", None)  # an argument that passes starts nothing
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    if "no-such-peer" in arguments:
        no_such_peer = type("NoSuchPeer", (), {"modules": ["no_such_module"]})
        monkeypatch.setitem(peers.PEERS, "no-such-peer", no_such_peer)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_half_a_file_is_none(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert [child.read_text() for child in tmp_path.iterdir()] == ["old"]


def test_list(capsys):
    assert main(["--list", "--all"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        work.name for work in WORKLOADS
    ]


def test_the_processes_of_other_peers_are_free_of_cattn():
    code = "import sys, bench.worker; print([name for name in sys.modules if name.startswith('cattn')])"
    assert python(code, folder=runner.ROOT).stdout == "[]\n"
