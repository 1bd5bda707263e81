"""The benchmark: its workloads, the peers that are installed, its reports. Nothing here asserts a time."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bench import peers, probes, readme, report, runner, worker
from bench.__main__ import main
from bench.workloads import WORKLOADS


def shrunk(work):
    """The same workload, small enough for a test."""
    if work.kind == "attention":
        batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim = work.shape
        shape = min(batch, 2), num_heads, num_kv_heads, min(seq_len_q, 37), min(seq_len_kv, 37), head_dim
    else:
        shape = {"layer": (2, 9, work.shape[-1]), "table": (50, 64)}[work.kind]
    return dataclasses.replace(work, shape=shape)


@functools.cache
def peer_of(name):
    """One of each: some set global state that can be set once."""
    return peers.PEERS[name](1)


def row(limit="fma", dtype="float32", threads=1, **results):
    """A row as `runner.run` makes it: 10 GFLOP, 20 GB."""
    return {
        "workload": f"work-{limit}",
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
    }


@pytest.fixture
def data():
    """What `python -m bench --json` writes: two workloads, two numbers of threads, one result wrong."""
    rows = [row(limit, threads=n, cattn=1 / n, numpy=3 / n) for limit in ("fma", "read") for n in (1, 2)]
    rows[-1]["results"]["numpy"] = {"error": 0.5, "correct": False}
    return {
        "machine": {"cpu": "a CPU", "isa": "avx2", "system": "a system"},
        "versions": {"python": "3.11", "cattn": "0.1 (avx2)", "numpy": "2.0"},
        "limits": {"1": {"fma": 40e9, "read": 80e9}, "2": {"fma": 80e9, "read": 160e9}},
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


class FakeProcess:
    """Answers as a worker does."""

    def __init__(self, **answers):
        self.answers = answers

    def ask(self, method, *arguments):
        answer = self.answers[method]
        if isinstance(answer, Exception):
            raise answer
        return answer


TIMES = {"result": {"best": 1.0, "median": 2.0, "calls": 3}}


def test_what_is_not_right_is_not_timed():
    work = WORKLOADS[0]
    processes = {
        "right": FakeProcess(load={"result": 0.5}, measure=TIMES),
        "wrong": FakeProcess(load={"result": 2.0}, measure=AssertionError()),
        "nan": FakeProcess(load={"result": math.nan}, measure=AssertionError()),
        "unable": FakeProcess(load={"unsupported": "no such thing"}),
        "broken": FakeProcess(load=runner.PeerError("status -11")),
        "dying": FakeProcess(load={"result": 0.0}, measure=runner.PeerError("status -9")),
    }
    assert runner.measure(work, processes, "expected.npy", tolerance=1.0, seconds=1) == {
        "right": {"error": 0.5, "correct": True, "best": 1.0, "median": 2.0, "calls": 3 * runner.ROUNDS},
        "wrong": {"error": 2.0, "correct": False},
        "nan": {"error": None, "correct": False},
        "unable": {"unsupported": "no such thing"},
        "broken": {"failed": "status -11"},
        "dying": {"failed": "status -9"},
    }


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
    assert process.process.returncode == 0


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


def test_the_text_names_what_is_wrong_and_where_cattn_is_behind(data):
    data["rows"][0] = row(cattn=2.0, numpy=1.0)
    text = report.text(data)
    assert "numpy       WRONG: error 0.5" in text
    assert "behind at work-fma: numpy takes 0.50 of cattn's time" in text
    assert "import cattn: 1.0 ms beyond numpy" in text
    assert not report.is_right(data)


def test_readme_round_trip(data, tmp_path):
    source, target = tmp_path / "bench.json", tmp_path / "README.md"
    source.write_text(json.dumps(data))
    target.write_text("# cattn\n<!-- bench:start -->\nold\n<!-- bench:end -->\nthe rest\n")
    for _ in range(2):  # the second time changes nothing
        assert readme.main([str(source), "--readme", str(target)]) == 0
        text = target.read_text()
        assert text.startswith("# cattn\n<!-- bench:start -->\na CPU, avx2, a system")
        assert text.endswith("<!-- bench:end -->\nthe rest\n")
        assert "old" not in text
        assert "| work-fma | 1000 | 50 % | 500.0 | 50 % | 1e-07 | 3.00x |" in text
        assert "| work-read | 1000 | 50 % | 500.0 | 50 % | 1e-07 |  |" in text  # numpy was wrong there


@pytest.mark.parametrize("text", ["no markers", "<!-- bench:end --><!-- bench:start -->"])
def test_readme_without_markers_is_left_alone(data, tmp_path, capsys, text):
    source, target = tmp_path / "bench.json", tmp_path / "README.md"
    source.write_text(json.dumps(data))
    target.write_text(text)
    assert readme.main([str(source), "--readme", str(target)]) == 2
    assert target.read_text() == text
    assert capsys.readouterr().err.count("\n") == 1


def test_plot(data, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(data, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_end_to_end(tmp_path, capsys):
    path = tmp_path / "bench.json"
    names = "tiny-3x2,table-5000x512"
    assert main(["--workloads", names, "--threads", "1", "--seconds", "0.01", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert capsys.readouterr().out == report.text(data) + "\n"
    assert data.keys() == {"machine", "versions", "limits", "rows", "probes"}
    assert data["machine"].keys() == {"cpu", "isa", "system"}
    assert data["versions"].keys() == {"python", "cattn", "numpy"}
    assert data["limits"]["1"]["fma"] > 0 < data["limits"]["1"]["read"]
    assert [line["workload"] for line in data["rows"]] == names.split(",")
    for line in data["rows"]:
        assert line.keys() == row().keys()
        assert line["results"].keys() == {"cattn", "numpy"}
        for result in line["results"].values():
            assert result.keys() == {"error", "correct", "best", "median", "calls"}
            assert result["error"] <= line["tolerance"]


def test_a_probe_that_fails_says_so():
    assert probes.run("no-such-probe", 1)["text"].startswith("no-such-probe: failed: KeyError")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "expected numbers from 1 on, got '0'"),
        (["--threads", "many"], "invalid thread_counts value: 'many'"),
        (["--peers", "tensorflow"], "got 'tensorflow'"),
        (["--peers", "cattn"], "got 'cattn'"),
        (["--workloads", "prefill-513"], "got 'prefill-513'"),
        (["--seconds", "0"], "expected seconds above 0"),
        (["--json", "no/such/directory/bench.json"], "no directory 'no/such/directory'"),
    ],
)
def test_argument_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_list(capsys):
    assert main(["--list", "--all"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        work.name for work in WORKLOADS
    ]


def test_the_processes_of_other_peers_are_free_of_cattn():
    code = "import sys, bench.worker; print([name for name in sys.modules if name.startswith('cattn')])"
    result = subprocess.run([sys.executable, "-c", code], cwd=runner.ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n"
