"""show_config: all that a bug report needs."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cattn
from cattn import _kernels, threads


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
    assert list(rows) == ["cattn", "python, numpy", "machine", "isa", "threads", "compiler", "openmp"]
    assert rows["cattn"] == cattn.__version__
    assert rows["python, numpy"] == f"{platform.python_version()}, {np.__version__}"
    assert rows["machine"] == f"{platform.machine()} {platform.system()}"
    assert rows["isa"] == f"{cattn.isa} (this CPU runs: {', '.join(cattn.available_isas())})"
    assert rows["threads"] == f"{cattn.get_num_threads()} (from: {threads.source()})"
    assert re.fullmatch(r"(gcc|clang) \d+\.\d+.*", rows["compiler"])
    without = "none (the compiler has none): one thread"
    assert rows["openmp"] == without or re.fullmatch(r"libg?omp \(specification \d{6}\)", rows["openmp"])


def test_threads_row_follows_set_num_threads(config):
    try:
        cattn.set_num_threads(3)
        assert config()["threads"] == "3 (from: set_num_threads)"
    finally:
        cattn.set_num_threads(None)
    assert config()["threads"] == f"{cattn.get_num_threads()} (from: {threads.source()})"
    assert threads.source() != "set_num_threads"


def test_isa_is_the_one_in_use():
    assert cattn.isa in cattn.available_isas()
    assert _kernels.f32.__name__ == f"cattn._kernels.{cattn.isa}"
    assert _kernels.f64().__name__ == f"cattn._kernels.{cattn.isa}_f64"


def test_every_module_says_how_it_was_built(isa):
    built = _kernels.f32.build_info()
    assert built == _kernels.f64().build_info()
    assert set(built) == {"compiler", "openmp"} and all(built.values())


@pytest.mark.parametrize("variables", [
    {"OMP_NUM_THREADS": "9" * 5000}, {"OMP_NUM_THREADS": "\udcff"}, {"OMP_PLACES": "cores"}, {"OMP_THREAD_LIMIT": "1"},
    {"OMP_THREAD_LIMIT": "9" * 5000}, {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, {"LC_ALL": "no_SUCH.locale"},
], ids=lambda variables: " ".join(variables))
def test_odd_environments(variables):
    root = Path(cattn.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", "import cattn; cattn.show_config()"], cwd=root,
                          env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 7, done.stderr
