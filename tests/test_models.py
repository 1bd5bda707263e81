"""python -m bench.models: that its models are what it says, in small, and what it makes of right and wrong answers."""

import importlib.util
import os

import numpy as np
import pytest
from processes import FakeProcess, line_of_error, python

from bench import models, runner
from bench.workloads import MODELS, Model

SMALL = {"bert": (2, 9, "left out"), "vit": (1,), "whisper": (), "llama_prefill": (9,), "llama_decode": (9,),
         "llama_generate": (2, 9, 3), "bert_training": (2, 9)}


@pytest.fixture(scope="module")
def torch_models():
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from bench import models_torch
    from cattn.integrations import huggingface

    huggingface.register()
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    yield models_torch
    torch.set_grad_enabled(before)


def worker_of(torch_models, implementation):
    """As in a process of its own, which starts by settings of all of it."""
    worker = torch_models.Worker.__new__(torch_models.Worker)
    worker.implementation, worker.run = implementation, None
    return worker


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of transformers


@pytest.mark.parametrize("family", sorted({model.family for model in MODELS}))
def test_families(torch_models, monkeypatch, tmp_path, family):
    """Every implementation computes the same, and can be timed."""
    monkeypatch.setattr(torch_models, "MODELS", [Model("small", "", family, SMALL[family])])
    path = str(tmp_path / "expected.npz")
    worker_of(torch_models, torch_models.WIDE).save("small", path)
    workers = {name: worker_of(torch_models, name) for name in ("eager", "sdpa", "cattn")}
    errors = {name: worker.load("small", path) for name, worker in workers.items()}
    assert 0 < errors["eager"] < 1e-4
    assert max(errors.values()) <= 10 * errors["eager"] + models.ROUNDING
    assert workers["cattn"].measure(0.0)["calls"] >= 1
    assert 0 < workers["sdpa"].share() < 1


def test_a_lost_token_is_noticed(torch_models, monkeypatch, tmp_path):
    monkeypatch.setattr(torch_models, "MODELS", [Model("small", "", "bert", (2, 64))])
    path = str(tmp_path / "expected.npz")
    worker_of(torch_models, torch_models.WIDE).save("small", path)
    worker = worker_of(torch_models, "cattn")
    right = worker.load("small", path)
    attend = torch_models.transformers.AttentionInterface._global_mapping["cattn"]
    monkeypatch.setitem(torch_models.transformers.AttentionInterface._global_mapping, "cattn",
                        lambda module, query, key, value, mask, **options: attend(
                            module, query, key[:, :, 1:], value[:, :, 1:], None, **options))
    assert worker.load("small", path) > 100 * right + models.ROUNDING


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="not Linux")
def test_memory(torch_models, monkeypatch):
    monkeypatch.setattr(torch_models, "MODELS", [Model("small", "", "stand_in", ())])
    monkeypatch.setattr(
        torch_models, "stand_in", lambda implementation: (lambda: np.ones(30_000_000, np.int8).sum(), None),
        raising=False)
    assert 29e6 < worker_of(torch_models, "sdpa").memory("small") < 40e6


@pytest.mark.parametrize("results", [([1.0], [np.nan]), ([np.nan], [1.0])])
def test_not_a_number_is_no_result(torch_models, monkeypatch, tmp_path, results):
    answers = [torch_models.torch.tensor(result) for result in results]
    monkeypatch.setattr(torch_models, "MODELS", [Model("small", "", "stand_in", ())])
    monkeypatch.setattr(torch_models, "stand_in", lambda implementation: (None, lambda: answers), raising=False)
    np.savez(tmp_path / "expected.npz", np.ones(1), np.ones(1))
    assert np.isnan(worker_of(torch_models, "sdpa").load("small", tmp_path / "expected.npz"))


def result(median):
    return {"result": {"best": median / 2, "median": median, "calls": 3}}


@pytest.fixture
def fakes(monkeypatch):
    """The processes: eager is 3 times as slow as sdpa, cattn twice as fast. `enable` is for the test."""
    processes = {
        "eager": FakeProcess(load={"result": 1e-6}, measure=result(0.3),
                             memory={"result": 50e6}),
        "sdpa": FakeProcess(load={"result": 1e-6}, measure=result(0.1),
                            memory={"result": 20e6}, share={"result": 0.25}),
        "cattn": FakeProcess(load={"result": 1e-5}, measure=result(0.05),
                             memory={"result": 10e6}),
        "enable": FakeProcess(load={"result": 1e-6}, measure=result(0.1),
                              memory={"result": 20e6}),
    }
    rates = {"time": 1.0, "fma": 1e9, "nop": 1e9}
    others = {models.WIDE: FakeProcess(save={"result": None}),
              "cattn": FakeProcess(probe={"result": {"now": rates, "best": {"fma": 1e9, "nop": 1e9}}})}
    monkeypatch.setattr(models, "start", lambda num_threads, **variables: processes)
    monkeypatch.setattr(runner, "Process", lambda name, *arguments: others[name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(models.metadata, "version", lambda name: "2")
    return processes | {models.WIDE: others[models.WIDE]}


def table_of(capsys, *arguments):
    """(status, the rows as lists of cells, stderr)"""
    status = models.main(["--threads", "1", "--models", "bert-8x128", *arguments])
    out, err = capsys.readouterr()
    return status, [row[2:-2].split(" | ") for row in out.splitlines() if row.startswith("| bert")], err


def test_table(fakes, capsys):
    status, rows, _ = table_of(capsys)
    assert status == 0
    assert rows == [["bert-8x128", "1", "25%", "0.33x", "100.0", "2.00x", "1.00x", "50", "20", "10", "20"]]
    assert all(process.answers is None for process in fakes.values())   # closed


@pytest.mark.parametrize(("answer", "word"), [
    ({"load": {"result": 2e-5}}, "WRONG"), ({"load": {"result": float("nan")}}, "WRONG"),
    ({"load": runner.PeerError("status -11")}, "FAILED"), ({"measure": runner.PeerError("status -9")}, "FAILED"),
])
def test_what_is_wrong_is_told(fakes, capsys, answer, word):
    fakes["enable"].answers |= answer
    status, [row], err = table_of(capsys)
    assert (status, row[6], row[10]) == (1, word, "")
    assert f"bert-8x128, enable: {word}: " in err


def test_without_eager_others_are_held_against_what_it_may_have(fakes, capsys):
    fakes["eager"].answers["load"] = runner.PeerError("status -11")
    status, [row], _ = table_of(capsys)
    assert (status, row[3:7]) == (1, ["FAILED", "100.0", "2.00x", "1.00x"])


def test_memory_that_is_not_seen_is_left_out(fakes, capsys):
    fakes["sdpa"].answers["memory"] = runner.PeerError("status -9")
    status, [row], _ = table_of(capsys)
    assert (status, row[7:]) == (0, ["50", "", "10", "20"])


def test_without_sdpa_times_are_times(fakes, capsys):
    fakes["sdpa"].answers["load"] = runner.PeerError("status -11")
    status, [row], _ = table_of(capsys)
    assert (status, row[2:6]) == (1, ["", "300.0", "FAILED", "50.00"])


def test_without_float64_nothing_is_known(fakes, capsys):
    fakes[models.WIDE].answers["save"] = runner.PeerError("no memory")
    status, rows, err = table_of(capsys)
    assert (status, rows) == (1, [])
    assert err.endswith("bert-8x128, float64: no memory\n")


def test_list(capsys):
    assert models.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [model.name for model in MODELS]


def test_packages_that_are_missing_are_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else name)
    error = line_of_error(capsys, models.main, [], "bench.models")
    assert 'not installed: transformers (pip install "cattn[huggingface]")' in error


@pytest.mark.parametrize(("arguments", "message"), [
    (["--threads", "0"], "argument --threads: expected numbers from 1"),
    (["--models", "bert"], "argument --models: expected all or some of bert-8x128,"),
    (["--seconds", "-1"], "argument --seconds: expected "),
    (["words"], "unrecognized arguments: words"),
])
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        models.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_pytorchs_process_is_free_of_cattn():
    pytest.importorskip("transformers")
    code = "import sys, bench.models_torch; print([name for name in sys.modules if name.startswith('cattn')])"
    assert python(code).stdout == "[]\n"
