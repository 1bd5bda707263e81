"""How many threads a call uses: the call's own number, set_num_threads, the environment, the quota, the CPUs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cattn
from cattn import _kernels, threads
from cattn.threads import _cgroup_quota

ROOT = Path(cattn.__file__).parents[1]
VARIABLES = "CATTN_NUM_THREADS", "OMP_NUM_THREADS"


def in_new_process(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def number_and_source(**variables):
    done = in_new_process("import cattn.threads as t; print(t.get_num_threads(), t.source())", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def no_number_set():
    cattn.set_num_threads(None)
    yield
    cattn.set_num_threads(None)


@pytest.mark.parametrize(("variables", "expected"), [
    ({"CATTN_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, "5 CATTN_NUM_THREADS"),
    ({"CATTN_NUM_THREADS": " 6 "}, "6 CATTN_NUM_THREADS"),
    ({"CATTN_NUM_THREADS": "", "OMP_NUM_THREADS": "3"}, "3 OMP_NUM_THREADS"),
    ({"OMP_NUM_THREADS": "7"}, "7 OMP_NUM_THREADS"),  # more than there are CPUs: as told
    ({"OMP_NUM_THREADS": "4,2"}, "4 OMP_NUM_THREADS"),  # one for each level of nesting
])
def test_environment(variables, expected):
    assert number_and_source(**variables) == expected


@pytest.mark.parametrize("nonsense", ["0", "-1", "two", "1.5"])
def test_nonsense_in_the_environment(nonsense):
    """An error in cattn's own variable; OpenMP's is for OpenMP to judge."""
    done = in_new_process("import cattn", CATTN_NUM_THREADS=nonsense)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"ImportError: CATTN_NUM_THREADS: expected a positive integer, got {nonsense!r}"
    assert number_and_source(OMP_NUM_THREADS=nonsense) == number_and_source()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_affinity():
    code = ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "import cattn.threads as t; print(t.get_num_threads(), t.source())")
    assert in_new_process(code).stdout == "1 CPU affinity\n"


@pytest.mark.parametrize(("cpus", "quota", "expected"), [
    (8, None, (8, "CPU affinity")),
    (8, 2.0, (2, "cgroup CPU quota")),
    (8, 2.1, (3, "cgroup CPU quota")),  # rounded up: what is paid for gets used
    (8, 0.25, (1, "cgroup CPU quota")),
    (8, 8.0, (8, "CPU affinity")),
    (2, 64.0, (2, "CPU affinity")),
])
def test_quota_and_affinity(monkeypatch, cpus, quota, expected):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: quota)
    assert threads._default() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads._default() == (5, "OMP_NUM_THREADS")
    monkeypatch.setenv("CATTN_NUM_THREADS", "6")
    assert threads._default() == (6, "CATTN_NUM_THREADS")


def test_without_affinity(monkeypatch):
    """macOS has none."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert threads._default()[0] == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads._default()[0] == 1


def test_set_num_threads():
    default, source = cattn.get_num_threads(), threads.source()
    cattn.set_num_threads(3)
    assert cattn.get_num_threads() == 3 and threads.source() == "set_num_threads"
    cattn.set_num_threads(np.int64(2))
    assert cattn.get_num_threads() == 2 and type(cattn.get_num_threads()) is int
    cattn.set_num_threads(None)
    assert cattn.get_num_threads() == default and threads.source() == source


def test_set_num_threads_beats_the_environment():
    code = ("import cattn\nprint(cattn.get_num_threads())\ncattn.set_num_threads(4)\nprint(cattn.get_num_threads())\n"
            "cattn.set_num_threads(None)\nprint(cattn.get_num_threads())")
    assert in_new_process(code, CATTN_NUM_THREADS="5").stdout.split() == ["5", "4", "5"]


def test_the_call_comes_first(monkeypatch):
    used = []
    monkeypatch.setattr(_kernels, "f32", SimpleNamespace(attend=lambda *arguments: used.append(arguments[-1])))
    x = np.zeros((3, 4), np.float32)
    cattn.scaled_dot_product_attention(x, x, x)
    cattn.set_num_threads(3)
    cattn.scaled_dot_product_attention(x, x, x)
    cattn.scaled_dot_product_attention(x, x, x, num_threads=2)
    cattn.scaled_dot_product_attention(x, x, x, num_threads=np.uint8(5))
    cattn.scaled_dot_product_attention(x, x, x)
    cattn.set_num_threads(None)
    assert used == [cattn.get_num_threads(), 3, 2, 5, 3]


# cgroups, as files in a folder.


def files(folder, contents):
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(("path", "contents", "expected"), [
    ("/", {"cpu.max": "max 100000\n"}, None),
    ("/", {"cpu.max": "150000 100000\n"}, 1.5),
    ("/", {}, None),
    ("/a/b", {"a/b/cpu.max": "50000 100000\n"}, 0.5),
    ("/a/b", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "max 100000\n", "cpu.max": "200000 100000\n"}, 2.0),
    ("/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),  # a limit of the parent
    ("/a", {"b/cpu.max": "100000 100000\n"}, None),  # another's
    ("/gone/from/here", {"cpu.max": "100000 50000\n"}, 2.0),  # a path of the host, seen from a container
    ("/a", {"a/cpu.max": "\n"}, None),
])
def test_cgroup_v2(tmp_path, path, contents, expected):
    files(tmp_path / "cgroup", contents)
    files(tmp_path, {"membership": f"0::{path}\n"})
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") == expected


@pytest.mark.parametrize(("path", "contents", "expected"), [
    ("/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ("/", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
    ("/a/b", {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000\n",
              "cpu/a/cpu.cfs_quota_us": "70000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 0.7),
    ("/gone", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.0),
    ("/a", {"cpu/a/cpu.cfs_quota_us": "100000\n"}, None),
    ("/", {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}, None),
])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_cgroup_v1(tmp_path, path, contents, expected, controllers):
    files(tmp_path / "cgroup", contents)
    files(tmp_path, {"membership": f"12:memory:/x\n5:{controllers}:{path}\n4:cpuset:/\n1:name=systemd:{path}\n"})
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") == expected


def test_cgroup_v1_and_v2_together(tmp_path):
    files(tmp_path, {
        "cgroup/cpu/a/cpu.cfs_quota_us": "300000", "cgroup/cpu/a/cpu.cfs_period_us": "100000",
        "cgroup/b/cpu.max": "200000 100000", "membership": "3:cpu,cpuacct:/a\n0::/b\n",
    })
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") == 2.0


def test_no_cgroups(tmp_path):
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") is None
