"""`python -m cattn`: the three sections, their JSON, and what they say where something is wrong. Nothing here asserts a
time."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import ROOT, python

import cattn
from cattn import __main__ as command
from cattn import _kernels, _plain, _selfcheck, _speed, reference


def start(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "cattn", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def shrunk(work):
    """The same kind of work, small enough for a test."""
    if work.kind == "attention":
        batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim = work.shape
        shape = min(batch, 2), num_heads, num_kv_heads, min(seq_len_q, 37), min(seq_len_kv, 37), head_dim
    else:
        shape = {"layer": (2, 9, 128), "table": (50, 64)}[work.kind]
    return dataclasses.replace(work, shape=shape)


@pytest.fixture
def small(monkeypatch):
    """Fewer checks and smaller works: what is tested is the program around them."""
    monkeypatch.setattr(_selfcheck, "CALLS", 40)
    monkeypatch.setattr(_plain, "WORKS", tuple(map(shrunk, _plain.WORKS)))


# The program.


def test_import_leaves_it_out():
    code = "import sys, cattn; print([name for name in sys.modules if name.startswith('cattn.')])"
    done = python(code)
    assert "cattn._config" in done.stdout, done.stderr
    assert not any(name in done.stdout for name in ("__main__", "_selfcheck", "_speed", "_plain"))


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m cattn")
    for section, text in command.SECTIONS.items():
        assert f"  {section:8}{text}\n" in out


WRONG_ARGUMENTS = {
    "a word": (["speeds"], "expected some of config, check, speed, got 'speeds'"),
    "no seconds": (["--seconds", "0"], "expected seconds above 0 and below 3600, got '0'"),
    "nan": (["--seconds", "nan"], "expected seconds above 0 and below 3600, got 'nan'"),
    "text": (["--seconds", "ten"], "expected seconds above 0 and below 3600, got 'ten'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_config(capsys):
    cattn.show_config()
    expected = capsys.readouterr().out
    assert command.main(["config"]) == 0
    assert capsys.readouterr().out == expected


def test_one_json_object_and_nothing_else():
    """All of it as it is installed, in a process, as short as it goes."""
    process = start("--json", "--seconds", "0.01")
    out, err = process.communicate()
    assert process.returncode == 0, err
    data = json.loads(out)
    assert list(data)[:3] == ["config", "checks", "rows"]
    assert data["config"] == cattn.show_config(mode="dicts")
    checks = data["checks"]
    assert checks["right"] is True and checks["calls"] == _selfcheck.CALLS >= 200
    assert list(checks["isas"]) == list(cattn.available_isas())
    for result in checks["isas"].values():
        assert result["calls"] == _selfcheck.CALLS and result["failures"] == [] and 0 < result["worst"] <= 1
    assert [row["name"] for row in data["rows"]] == [work.name for work in _plain.WORKS]
    for row, work in zip(data["rows"], _plain.WORKS, strict=True):
        assert tuple(row["shape"]) == work.shape
        for name in ("cattn", "numpy"):
            assert 0 < row[name]["best"] <= row[name]["median"] and row[name]["calls"] >= 1
        assert row["ratio"] == row["numpy"]["median"] / row["cattn"]["median"]
        assert isinstance(row["busy"], bool) and row["quiet"] > 0
        if work.limit:
            assert row["share"] == row["rate"] / row["limit"] > 0
        assert ("share" in row) == bool(work.limit)


def test_all_sections(small, capsys):
    assert command.main(["--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["cattn", cattn.__version__]
    for isa in cattn.available_isas():
        [line] = [line for line in lines if line.startswith(f"{isa} ") and "right" in line]
        assert "40 of 40 calls right, errors up to " in line
    for work in _plain.WORKS:
        [line] = [line for line in lines if line.startswith(f"{work.name} ") and "x" in line]
        assert " FLOP/s" not in line and ("GFLOP/s" in line) == (work.limit == "fma")
        assert ("GB/s" in line) == (work.limit == "read")
    assert "fight for the CPUs" in out


def test_sections_are_chosen(small, capsys):
    assert command.main(["check", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["checks"]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_interrupted(as_json):
    """What was measured so far stands, and there is no traceback."""
    # As `start`, but that a shell's background jobs are born ignoring SIGINT.
    code = ("import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "runpy.run_module('cattn', run_name='__main__', alter_sys=True)")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "config", "speed", "--seconds", "20", *["--json"] * as_json],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if as_json:  # its progress goes to stderr
        assert process.stderr.readline().startswith("speed: ")
    else:
        for line in process.stdout:
            if line.startswith(f"{_plain.WORKS[0].name} ") or line.startswith("speed: "):
                break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    if as_json:
        data = json.loads(out)
        assert data["interrupted"] is True and "config" in data and len(data["rows"]) < len(_plain.WORKS)
    else:
        assert out.splitlines()[-1] == "Interrupted: what stands above was measured, the rest was not."


def test_interrupted_checks(small, monkeypatch, capsys):
    """Between two groups of calls; the modules are those from before."""
    before = _kernels.f32
    judge, calls = _selfcheck.judge, []

    def interrupting(*arguments):
        calls.append(arguments)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return judge(*arguments)

    monkeypatch.setattr(_selfcheck, "judge", interrupting)
    assert command.main(["check"]) == 130
    out = capsys.readouterr().out
    assert "20 of 20 calls right" in out and out.splitlines()[-1].startswith("Interrupted")
    assert _kernels.f32 is before


STREAMS = {
    "no stdout": (">&-", 0, "", "progress\nchild\n"),
    "no stderr": ("2>&-", 0, "result\n", ""),
    "none": ("<&- >&- 2>&-", 0, "", ""),
    "full stdout": (">/dev/full", 1, "", "progress\nchild\nerror: [Errno 28] No space left on device\n"),
    "full stderr": ("2>/dev/full", 1, "", ""),
    "both full": (">/dev/full 2>&1", 1, "", ""),
}


@pytest.mark.parametrize(("redirection", "status", "out", "err"), STREAMS.values(), ids=STREAMS)
def test_streams_that_cannot_be_written(redirection, status, out, err):
    """No traceback, and a child may write to them."""
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    code = ("import subprocess\nfrom cattn.__main__ import *\n"
            "def main():\n"
            "    Progress(json_only=True).show('progress', at_once=True)\n"
            "    subprocess.run(['/bin/sh', '-c', 'echo child >&2'], check=True)\n"
            "    print('result')\n"
            "    return 0\n"
            "exit_after(main)")
    done = subprocess.run(["/bin/sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, code], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


@pytest.mark.parametrize(("raised", "status"), [
    ("KeyboardInterrupt", 130), ("SystemExit(2)", 2), ("BrokenPipeError", 1), ("OSError('text')", 1),
])
def test_exit_status(raised, status):
    code = f"from cattn.__main__ import exit_after\ndef main():\n    raise {raised}\nexit_after(main)"
    done = python(code)
    assert (done.returncode, done.stderr) == (status, "error: text\n" if "text" in raised else "")


def test_a_reader_that_goes_away():
    process = start("config", "check")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 1
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


# Whether it is right.


def test_calls_cover_the_arguments():
    """Of attention, every option; gradients, layers and tables; every dtype that NumPy has."""
    calls = list(_selfcheck.calls())
    attention = [call for call in calls if isinstance(call, _selfcheck.Attention)]
    options = set().union(*(call.options for call in attention))
    assert options >= {"attn_mask", "is_causal", "window", "softcap", "alibi_slopes", "sinks", "kv_lens", "scale",
                       "dropout_p", "q_offset"}
    for kind in (_selfcheck.Attention, _selfcheck.Gradient, _selfcheck.Layer, _selfcheck.Table):
        dtypes = {call.dtype.name for call in calls if isinstance(call, kind)}
        assert dtypes == {"float16", "float32", "float64"}
    assert any(not call.options and not call.everything for call in attention)
    assert len({str(call) for call in calls}) > 0.95 * len(calls)


def test_every_isa_computes_its_own_calls(monkeypatch):
    """Each module is asked for each call."""
    asked = dict.fromkeys(cattn.available_isas(), 0)
    run = _selfcheck.Call.run if hasattr(_selfcheck.Call, "run") else None
    assert run is None  # each kind of call has its own

    for kind in (_selfcheck.Attention, _selfcheck.Gradient, _selfcheck.Layer, _selfcheck.Table):
        def counted(call, run=kind.run):
            isa = _kernels.f32.__name__.rpartition(".")[2]
            asked[isa] += 1
            assert _kernels.f64().__name__ == f"cattn._kernels.{_kernels.module_name(isa, 'f64')}"
            return run(call)
        monkeypatch.setattr(kind, "run", counted)
    *_, results = _selfcheck.run(10)
    assert asked == dict.fromkeys(cattn.available_isas(), 10)
    assert {isa: result.calls for isa, result in results.items()} == asked


def planted(kernel, change):
    """`kernel`, and what it leaves in the array that it is to write changed."""
    def wrong(*arguments):
        result = kernel(*arguments)
        change(result[0] if isinstance(result, tuple) else result, arguments)
        return result
    return wrong


def a_little_more(result, arguments):
    if result is not None:
        result[...] = np.nextafter(result + result.dtype.type(1e-3), np.inf, dtype=result.dtype)


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_wrong_kernel(small, monkeypatch, capsys, as_json):
    """Of one instruction set: exit status 1, the call and its numbers, and the others are right."""
    wrong_isa = cattn.available_isas()[-1]
    module = _kernels._load(wrong_isa)
    monkeypatch.setattr(module, "attend_short", planted(module.attend_short, a_little_more))
    assert command.main(["check", *["--json"] * as_json]) == 1
    out = capsys.readouterr().out
    if as_json:
        checks = json.loads(out)["checks"]
        assert checks["right"] is False
        failures = {isa: result["failures"] for isa, result in checks["isas"].items()}
    else:
        failures = {isa: [line.removeprefix("  WRONG: ") for line in out.splitlines() if "WRONG: " in line]
                    if isa == wrong_isa else [] for isa in cattn.available_isas()}
        assert out.splitlines()[-1].startswith("Something is WRONG with this installation")
        for isa in cattn.available_isas()[:-1]:
            assert "40 of 40 calls right" in next(line for line in out.splitlines() if line.startswith(f"{isa} "))
    found = failures.pop(wrong_isa)
    assert not any(failures.values())
    number = r"(out|query|key|value)\[[\d, ]+\] is \S+, exactly \S+: more than \S+ apart$"
    assert all(re.search(number, text) for text in found)
    assert any(text.startswith("scaled_dot_product_attention(query=float") for text in found)


def test_kernels_that_are_wrong_elsewhere(monkeypatch):
    """Projections, tables; an array that is NaN; one that has another shape; an exception."""
    isa = cattn.available_isas()[0]
    module = _kernels._load(isa)

    def nan_in_table(result, arguments):
        arguments[0][-1, -1] = np.nan

    def failing(*arguments):
        raise MemoryError("planted")

    monkeypatch.setattr(module, "sinusoid", planted(module.sinusoid, nan_in_table))
    monkeypatch.setattr(module, "linear", failing)
    *_, results = _selfcheck.run(40, [isa])
    failures = results[isa].failures
    layers = [call for call in _selfcheck.calls(40) if isinstance(call, _selfcheck.Layer)]
    assert sum(": MemoryError: planted" in text for text in failures) == sum(x.dtype != np.float64 for x in layers)
    tables = [text for text in failures if text.startswith("sinusoidal_encoding")]
    assert len(tables) == 4 and all(" is nan, exactly " in text for text in tables)
    assert len(failures) + (results[isa].calls - len(failures)) == 40

    call = next(_selfcheck.calls(1))
    exact = call.plain_and_exact()
    wrong_shape = tuple(array[:1, :, :0] for array in call.run())
    assert "shape" in _selfcheck.judge(call, wrong_shape, exact)[1]


def test_a_module_that_cannot_be_loaded(monkeypatch, capsys):
    """A damaged file: said for its instruction set, and the others are checked."""
    monkeypatch.setattr(_selfcheck, "CALLS", 20)
    *others, wrong_isa = cattn.available_isas()
    load = _kernels._load

    def damaged(name):
        if name == wrong_isa:
            raise ImportError("file too short")
        return load(name)

    monkeypatch.setattr(_kernels, "_load", damaged)
    assert command.main(["check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["checks"]["isas"]
    assert len(found[wrong_isa]["failures"]) == 20
    assert all(text.endswith(": ImportError: file too short") for text in found[wrong_isa]["failures"])
    assert not any(found[isa]["failures"] for isa in others)


@pytest.mark.parametrize("call", list(_selfcheck.calls(10)), ids=lambda call: type(call).__name__)
def test_the_bound_notices_small_errors(call):
    """The reference itself is right, and an error of 100 eps of the largest number is not."""
    plain, exact = call.plain_and_exact()
    of_logsumexp = call.dtype if isinstance(call, _selfcheck.Gradient) else call.compute
    dtypes = [call.dtype, call.dtype, of_logsumexp][: len(exact)]
    rounded = [array.astype(dtype) for array, dtype in zip(exact, dtypes, strict=True)]
    assert _selfcheck.judge(call, rounded, (plain, exact))[1] == ""
    for number, (array, scale) in enumerate(zip(exact, call.scales(exact), strict=True)):
        error = 100 * float(np.finfo(dtypes[number]).eps) * max(scale, float(np.abs(array[np.isfinite(array)]).max()))
        wrong = list(rounded)
        wrong[number] = (array + error).astype(dtypes[number])
        assert _selfcheck.judge(call, wrong, (plain, exact))[1].startswith(f"{call.names[number]}[")


# What it is worth.


@pytest.mark.parametrize("work", _plain.WORKS, ids=lambda work: work.name)
def test_both_sides_compute_the_same(work):
    """cattn's call and NumPy's, against the reference."""
    work = shrunk(work)
    arrays = [array.astype(np.float64) for array in work.arrays()]
    if work.kind == "attention":
        expected = reference.scaled_dot_product_attention(*arrays, is_causal=work.is_causal)
    elif work.kind == "layer":
        layer = reference.MultiHeadAttention(work.shape[-1], work.num_heads, dtype=np.float64)
        layer.in_proj_weight, layer.in_proj_bias, layer.out_proj_weight, layer.out_proj_bias = arrays[1:]
        expected = layer(arrays[0])
    else:
        expected = reference.sinusoidal_encoding(*work.shape, dtype=np.float64)
    for result in (_speed.prepared(work)(), _plain.prepared(work)()):
        assert (result.dtype, result.shape) == (work.dtype, expected.shape)
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-3 if work.dtype == "float16" else 1e-5)


def test_works():
    """Ten, of every kind; each has what it is divided by."""
    assert len(_plain.WORKS) == len({work.name for work in _plain.WORKS}) == 10
    for work in _plain.WORKS:
        assert (work.flops > 0) == (work.kind != "table")
        assert (work.nbytes > 0) == (work.limit == "read")
        assert len(work.name) < 17  # a column
    assert _plain.Work("", "attention", (1, 8, 2, 3, 5, 64)).flops == 4 * 8 * 3 * 5 * 64
    assert _plain.Work("", "attention", (1, 8, 2, 1, 5, 64), "float16", limit="read").nbytes == 2 * 2 * 5 * 64 * 2


PROBES = {
    "quiet": ([(100, 1.0, 2.0, 50)] * 3, 1.0, False),
    "half the CPU time": ([(100, 1.0, 1.0, 50)] * 3, 0.5, True),  # of the CPU time of two threads, half
    "slower CPUs": (  # it has the CPUs, but they are slower
        [(100, 1.0, 2.0, 50), (40, 1.0, 2.0, 50), (40, 1.0, 2.0, 50)], 0.4, True,
    ),
    "shared decoders": (  # and shares their decoders
        [(100, 1.0, 2.0, 30), (100, 1.0, 2.0, 30), (100, 1.0, 2.0, 50)], 0.6, True,
    ),
    "a little": ([(90, 1.0, 1.9, 45)] * 3, 0.9, False),
    "a coarse clock": ([(200, 1.0, 1.1, 50)] * 3, 1.0, False),  # a clock that does not see the second CPU
}


@pytest.mark.parametrize(("probes", "quiet", "busy"), PROBES.values(), ids=PROBES)
def test_a_busy_machine_is_noticed(probes, quiet, busy):
    seen = _speed.Machine.seen(SimpleNamespace(cpus=2, single=100.0), [_speed.Probe(*probe) for probe in probes])
    assert _speed.how_quiet(seen, {"fma": 100, "nop": 50}) == {"quiet": pytest.approx(quiet), "busy": busy}


MEASURED_AGAIN = {
    "found": ([5e9, 12e9, 99e9], 12e9, "FMA peak measured again: 12 instead of 4 GFLOP/s"),
    "not found": (
        [5e9, 6e9, 6e9, 6e9, 6e9],
        6e9, "FMA peak measured again: 6 instead of 4 GFLOP/s, and still less than the call's rate",
    ),
}


@pytest.mark.parametrize(("found", "limit", "note"), MEASURED_AGAIN.values(), ids=MEASURED_AGAIN)
def test_more_than_the_limit_is_measured_again(found, limit, note):
    """Until the limit is above the call, some times; it is never lowered to 100 %."""
    found = iter(found)
    machine = SimpleNamespace(fma=4e9)

    def probe(repeats):
        machine.fma = max(machine.fma, next(found))

    machine.probe = probe
    row = {"limit": 4e9, "rate": 10e9, "unit": "FLOP/s", "notes": []}
    _speed.measure_again(row, machine, None)
    assert row == {"limit": limit, "rate": 10e9, "unit": "FLOP/s", "notes": [note]}


def test_more_than_the_bandwidth_is_measured_again():
    machine = SimpleNamespace(read=lambda array: 12e9)
    row = {"limit": 4e9, "rate": 10e9, "unit": "B/s", "notes": []}
    _speed.measure_again(row, machine, np.ones(4, np.float32))
    assert row["limit"] == 12e9 and row["notes"] == ["read bandwidth measured again: 12 instead of 4 GB/s"]


def row(**changes):
    times = {"best": 1e-3, "median": 1e-3, "calls": 3}
    return {"name": "prefill", "kind": "attention", "dtype": "float32", "is_causal": False, "shape": [1, 8, 2, 3, 4, 5],
            "cattn": times, "numpy": times, "ratio": 1.0, "notes": [], "unit": "FLOP/s", "rate": 5e9, "limit": 10e9,
            "share": 0.5, "quiet": 1.0, "busy": False} | changes


@pytest.mark.parametrize(("rows", "there", "not_there"), [
    ([row(), row(ratio=4.0)],
     ["1x8/2x3x4x5", "5 GFLOP/s   50%\n", "NumPy takes 2.00 times as long (geometric mean)."],
     ["busy", "BUSY", "too low"]),
    ([row(share=1.25, notes=["a note"])], ["125%\n", "    a note\n"], ["busy"]),
    ([row(), row(busy=True, quiet=0.5, ratio=9.0)],
     ["  busy\n", "BUSY: the machine was busy during 1 of 2 rows: probes found as little as 50% of it",
      "NumPy takes 1.00 times as long (geometric mean of the rows that are not busy)."], []),
    ([row(busy=True, quiet=0.5)], ["Medians in ms.\n"], ["NumPy takes"]),
    ([row(), row(limit=11e9)], ["The first rows were compared with 10 GFLOP/s, which was measured too low."], []),
], ids=["quiet", "beyond the limit", "busy", "all busy", "a limit that grows"])
def test_what_is_said(monkeypatch, capsys, rows, there, not_there):
    monkeypatch.setattr(_speed, "run", lambda seconds, about: iter(rows))
    assert command.main(["speed"]) == 0
    out = capsys.readouterr().out
    assert out.replace("█", "").isascii()  # bars know other encodings
    for text in there:
        assert text in out
    for text in not_there:
        assert text not in out


def test_the_process_that_runs_numpy_ends(small, monkeypatch, capsys):
    """As it does where memory is short: what was measured stays."""
    send, loads = _speed.Plain.send, []

    def ending(plain, *request):
        loads.extend(name for name in request if name == "load")
        if len(loads) == 2:
            plain.process.kill()
            plain.process.wait()
        send(plain, *request)

    monkeypatch.setattr(_speed.Plain, "send", ending)
    assert command.main(["speed", "--seconds", "0.01", "--json"]) == 1
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert len(data["rows"]) == 1
    assert data["error"] == "the process that runs NumPy ended with status -9"
    assert captured.err.endswith(f"speed: {data['error']}\n")

    loads.clear()
    assert command.main(["speed", "--seconds", "0.01"]) == 1
    assert "WRONG" not in capsys.readouterr().out  # of cattn nothing is known


BARS = {
    "nothing": ("utf-8", 0.0, ""),
    "half": ("utf-8", 0.5, "████"),
    "a part of a block": ("utf-8", 0.5 + 1 / 64, "████▏"),
    "all": ("utf-8", 1.0, "████████"),
    "beyond": ("utf-8", 1.5, "████████▶"),
    "ASCII": ("ascii", 0.5, "####"),
    "ASCII beyond": ("ascii", 1.5, "########>"),
    "unknown encoding": ("no such", 0.5, "####"),
}


@pytest.mark.parametrize(("encoding", "share", "expected"), BARS.values(), ids=BARS)
def test_bars(monkeypatch, encoding, share, expected):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding=encoding))
    assert command.bar(share, 8) == expected
