"""show_config: all that a bug report needs."""

import json
import os
import platform
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from processes import python

import cattn
from cattn import _config, _kernels, _threads


@pytest.fixture
def config(capsys):
    def read():
        """What it prints, as a dictionary."""
        assert cattn.show_config() is None
        lines = capsys.readouterr().out.splitlines()
        return {line[:14].strip(): line[15:] for line in lines}
    return read


def test_show_config(config):
    rows = config()
    assert list(rows) == ["cattn", "python, numpy", "machine", "cpu", "isa", "threads", "compiler", "openmp",
                          "numpy's blas"]
    assert rows["cattn"] == cattn.__version__
    assert rows["python, numpy"] == f"{platform.python_version()}, {np.__version__}"
    assert rows["machine"] == f"{platform.machine()} {platform.system()}"
    assert re.fullmatch(rf"[ -~]+ \(this process may run on: {_kernels.cpus}\)", rows["cpu"])
    assert rows["isa"] == f"{cattn.isa} (this CPU runs: {', '.join(cattn.available_isas())})"
    assert rows["threads"] == f"{cattn.get_num_threads()} (from: {_threads.source()})"
    assert re.fullmatch(r"(gcc|clang) \d+\.\d+.*", rows["compiler"])
    without = "none (the compiler has none): one thread"
    assert rows["openmp"] == without or re.fullmatch(r"libg?omp \(specification \d{6}\)", rows["openmp"])
    assert re.fullmatch(r".+, (\d+ threads?|an unknown number of threads) \(from: .+\)", rows["numpy's blas"])


def test_dicts(capsys):
    """As numpy.show_config(mode="dicts"): returned and not printed, plain values throughout."""
    found = cattn.show_config(mode="dicts")
    assert capsys.readouterr() == ("", "")
    assert json.loads(json.dumps(found)) == found
    assert found["cattn"] == cattn.__version__ and found["numpy"] == np.__version__
    assert found["isa"] == {"used": cattn.isa, "available": list(cattn.available_isas())}
    assert found["threads"] == {"count": cattn.get_num_threads(), "source": _threads.source()}
    assert found["cpu"]["count"] == _kernels.cpus
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    assert (found["blas"]["name"], found["blas"]["version"]) == (blas["name"], blas["version"])


@pytest.mark.parametrize("mode", ["dict", "", None, 1, ["dicts"], b"dicts", np.array(["dicts", "dicts"])], ids=repr)
def test_unknown_mode(capsys, mode):
    with pytest.raises(ValueError) as raised:
        cattn.show_config(mode)
    assert str(raised.value) == f"mode: expected 'stdout' or 'dicts', got {mode!r}"
    assert capsys.readouterr().out == ""


def test_a_numpy_that_does_not_name_its_blas(monkeypatch, config):
    for found in ({}, {"Build Dependencies": {"blas": {"found": False}}}, None):
        monkeypatch.setattr(np, "show_config", lambda mode, found=found: found)
        blas = cattn.show_config(mode="dicts")["blas"]
        assert (blas["name"], blas["version"]) == (None, None)
        assert config()["numpy's blas"].startswith("unknown, ")


BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
                  "VECLIB_MAXIMUM_THREADS")


BLAS_SETTINGS = {
    "its own variable": (
        "scipy-openblas", {"OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, (3, "OPENBLAS_NUM_THREADS"),
    ),
    "OpenMP's": ("scipy-openblas", {"OMP_NUM_THREADS": "5"}, (5, "OMP_NUM_THREADS")),
    "not a number": (
        "scipy-openblas", {"OPENBLAS_NUM_THREADS": "many", "GOTO_NUM_THREADS": "2"}, (2, "GOTO_NUM_THREADS"),
    ),
    "MKL": ("mkl-dynamic-lp64-seq", {"OPENBLAS_NUM_THREADS": "3", "MKL_NUM_THREADS": "4"}, (4, "MKL_NUM_THREADS")),
    "Accelerate": (
        "accelerate", {"OMP_NUM_THREADS": "3", "VECLIB_MAXIMUM_THREADS": "1"}, (1, "VECLIB_MAXIMUM_THREADS"),
    ),
    "0": (
        "", {"OPENBLAS_NUM_THREADS": "0"},
        (None, "OPENBLAS_NUM_THREADS, GOTO_NUM_THREADS, OMP_NUM_THREADS not set; by default BLAS uses all CPUs"),
    ),
}


@pytest.mark.parametrize(("name", "variables", "expected"), BLAS_SETTINGS.values(), ids=BLAS_SETTINGS)
def test_threads_of_blas_without_threadpoolctl(monkeypatch, name, variables, expected):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)  # an ImportError
    for variable in BLAS_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert _config._blas_threads(name) == expected


def test_threads_of_blas_by_threadpoolctl(monkeypatch):
    """NumPy's own, where SciPy has brought another one."""
    folder = os.path.dirname(np.__file__)
    pools = [{"user_api": "openmp", "num_threads": 9, "filepath": "/libgomp.so"},
             {"user_api": "blas", "num_threads": 7, "filepath": "/scipy.libs/libopenblas.so"},
             {"user_api": "blas", "num_threads": 5, "filepath": f"{folder}.libs/libopenblas.so"}]
    monkeypatch.setitem(sys.modules, "threadpoolctl", SimpleNamespace(threadpool_info=lambda: pools))
    assert _config._blas_threads("openblas") == (5, "threadpoolctl")
    pools.pop()
    assert _config._blas_threads("openblas") == (7, "threadpoolctl")


def test_name_of_the_cpu(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_bytes(b"processor\t: 0\nmodel name\t: A CPU\xff\x1b @ 2 GHz\nmodel name\t: Another\n")
    assert _config._cpu_name(path) == "A CPU @ 2 GHz"
    path.write_text("processor\t: 0\n")
    assert _config._cpu_name(path) is None
    assert _config._cpu_name(tmp_path / "none") is None


def test_threads_row_follows_set_num_threads(config):
    try:
        cattn.set_num_threads(3)
        assert config()["threads"] == "3 (from: set_num_threads)"
    finally:
        cattn.set_num_threads(None)
    assert config()["threads"] == f"{cattn.get_num_threads()} (from: {_threads.source()})"
    assert _threads.source() != "set_num_threads"


def test_isa_is_the_one_in_use():
    assert cattn.isa in cattn.available_isas()
    assert _kernels.f32.__name__ == f"cattn._kernels.{cattn.isa}"
    assert _kernels.f64().__name__ == f"cattn._kernels.{_kernels.module_name(cattn.isa, 'f64')}"


def test_every_module_says_how_it_was_built(isa):
    built = _kernels.f32.build_info()
    assert built == _kernels.f64().build_info()
    assert set(built) == {"compiler", "openmp"} and all(built.values())


ODD = {
    "many digits": {"OMP_NUM_THREADS": "9" * 5000},
    "no text": {"OMP_NUM_THREADS": "\udcff"},
    "places": {"OMP_PLACES": "cores"},
    "limit of 1": {"OMP_THREAD_LIMIT": "1"},
    "limit of many digits": {"OMP_THREAD_LIMIT": "9" * 5000},
    "ASCII": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    "unknown locale": {"LC_ALL": "no_SUCH.locale"},
}


@pytest.mark.parametrize("variables", ODD.values(), ids=ODD)
def test_odd_environments(variables):
    done = python("import cattn; cattn.show_config()", **variables)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 9, done.stderr
