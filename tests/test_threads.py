"""How many threads a call uses: its own number, or else a share of what set_num_threads, the environment, the quota or
the CPUs say and what limits OpenMP leaves."""

import ctypes
import os
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from problems import DTYPES, assert_same_bits, normal, problem

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

    def note(*arguments):
        used.append(arguments[-1])

    monkeypatch.setattr(_kernels, "f32", SimpleNamespace(attend=note, attend_plain=_kernels.f32.attend_plain))
    x = np.zeros((3, 4), np.float32)  # too few axes for the short way
    cattn.scaled_dot_product_attention(x, x, x)
    cattn.set_num_threads(3)
    cattn.scaled_dot_product_attention(x, x, x)
    cattn.scaled_dot_product_attention(x, x, x, num_threads=2)
    cattn.scaled_dot_product_attention(x, x, x, num_threads=np.uint8(5))
    cattn.scaled_dot_product_attention(x, x, x)
    assert used == [0, 0, 2, 5, 0]  # 0: the kernel takes a share of the default


@pytest.fixture
def openmp_libraries():
    """Those that this process has loaded."""
    if _kernels.f32.build_info()["openmp"].startswith("none"):
        pytest.skip("a build without OpenMP")
    threadpoolctl = pytest.importorskip("threadpoolctl")
    return [library["filepath"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "openmp"]


def test_limits_of_threadpoolctl(openmp_libraries):
    """The smaller number wins, in the Python thread that the limit was set in."""
    done = in_new_process("""
import threading, cattn
from cattn import threads
from threadpoolctl import threadpool_limits
def show():
    print(cattn.get_num_threads(), threads.source(), sep=": ")
with threadpool_limits(2):
    show()
    cattn.set_num_threads(3)
    show()
    thread = threading.Thread(target=show)
    thread.start()
    thread.join()
    cattn.set_num_threads(1)
    show()
with threadpool_limits(9):
    cattn.set_num_threads(6)
    show()
show()
""", OMP_NUM_THREADS="4")
    limited = ", limited by threadpoolctl or omp_set_num_threads"
    assert done.stdout.splitlines() == [
        f"2: OMP_NUM_THREADS{limited}", f"2: set_num_threads{limited}", "3: set_num_threads",
        f"1: set_num_threads{limited}", "6: set_num_threads", "6: set_num_threads"]


def test_a_limit_from_before_the_import(openmp_libraries):
    """Another extension had loaded OpenMP."""
    done = in_new_process(f"""
import ctypes
openmp = ctypes.CDLL({openmp_libraries[0]!r})
openmp.omp_set_num_threads(2)
import cattn
print(cattn.get_num_threads())
openmp.omp_set_num_threads(5)
print(cattn.get_num_threads())
""", CATTN_NUM_THREADS="5", OMP_NUM_THREADS="3")
    assert done.stdout.split() == ["2", "5"]


def test_one_thread_inside_a_parallel_region(openmp_libraries):
    x = np.random.default_rng(0).standard_normal((4, 200, 64), np.float32)
    expected = cattn.scaled_dot_product_attention(x, x, x)
    cattn.set_num_threads(3)
    inside = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        right = np.array_equal(cattn.scaled_dot_product_attention(x, x, x, num_threads=2), expected)
        inside.append((cattn.get_num_threads(), threads.source(), right))

    ctypes.CDLL(openmp_libraries[0]).GOMP_parallel(region, None, 2, 0)
    assert inside == [(1, "set_num_threads, limited by a parallel region", True)] * 2
    assert cattn.get_num_threads() == 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_calls_in_flight_share_the_default(openmp_libraries):
    """Each Python thread that calls has a pool of its own: how large it becomes tells how many threads the call got."""
    done = in_new_process("""
import os, signal, threading, cattn
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
x = np.ones((8, 512, 64), np.float32)
endless = np.broadcast_to(x[:1, :1], (1, 1 << 32, 64))
done = threading.Event()
def threads_of_a_call(**options):
    number, counted = [], threading.Event()
    def call():
        before = len(os.listdir("/proc/self/task"))
        cattn.scaled_dot_product_attention(x, x, x, **options)
        number.append(1 + len(os.listdir("/proc/self/task")) - before)
        counted.set()
        done.wait()  # the pool ends with the Python thread
    threading.Thread(target=call, daemon=True).start()
    counted.wait()
    return number[0]
def beside_another():
    shared = 6
    while shared == 6:  # not yet beside it
        shared = threads_of_a_call()
    print(shared, threads_of_a_call(num_threads=4), flush=True)
    pid = os.fork()
    if pid == 0:
        print(threads_of_a_call(), flush=True)  # the other call is not in the child
        os._exit(0)
    os.waitpid(pid, 0)
    os.kill(os.getpid(), signal.SIGINT)
print(threads_of_a_call(), threads_of_a_call(num_threads=4), flush=True)
threading.Thread(target=beside_another).start()
try:
    cattn.scaled_dot_product_attention(x[:1], endless, endless, num_threads=1)
except KeyboardInterrupt:
    print(threads_of_a_call())
done.set()
""", CATTN_NUM_THREADS="6")
    assert done.stdout.split("\n") == ["6 4", "3 4", "6", "6", ""], done.stderr


@pytest.mark.slow
def test_eight_threads_for_a_minute():
    """The right bits, and no memory kept."""
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    rng = np.random.default_rng(0)
    problems = []
    for seq_len_q, seq_len_kv in ((3, 5), (100, 100), (1, 5000), (300, 300)):
        q = rng.standard_normal((2, 4, seq_len_q, 64), np.float32)
        kv = rng.standard_normal((2, 2, seq_len_kv, 64), np.float32)
        problems.append((q, kv, cattn.scaled_dot_product_attention(q, kv, kv, num_threads=1)))
    wrong, sizes, start = [], [], time.monotonic()

    def work(number):
        while time.monotonic() - start < 60 and not wrong:
            for q, kv, expected in problems:
                if not np.array_equal(cattn.scaled_dot_product_attention(q, kv, kv), expected):
                    wrong.append(q.shape)
            if number == 0:
                sizes.append((time.monotonic() - start, resident()))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    early, late = (max(size for when, size in sizes if low <= when < high) for low, high in ((10, 30), (30, 60)))
    assert late - early < 2**20


# Several Python threads.


def test_eight_python_threads_at_once(isa):
    """Each has the bits that it has alone; with a GIL they meet in the kernels, free-threaded everywhere."""
    shapes = {"seq_len_q": 70, "seq_len_kv": 90, "head_dim": 40}, {"seq_len_q": 1, "seq_len_kv": 3000}
    layer = cattn.MultiHeadAttention(32, 4, seed=0)
    calls = [
        partial(cattn.scaled_dot_product_attention, *problem(**shape, dtype=dtype, kv_dtype=kv_dtype, seed=number),
                return_weights=True, return_logsumexp=True, num_threads=1 + number % 3)
        for number, (dtype, kv_dtype) in enumerate(DTYPES) for shape in shapes
    ]
    calls += [partial(layer, normal(3, 20, 32), is_causal=True), partial(cattn.sinusoidal_encoding, 300, 64)]
    alone = [call() for call in calls]
    together = threading.Barrier(8)

    def all_from(first):
        together.wait()
        return [(number, calls[number]()) for number in (*range(first, len(calls)), *range(first)) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(all_from, range(8)):
            for number, result in results:
                assert_same_bits(result, alone[number])


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this interpreter has a GIL")
@pytest.mark.parametrize("wanted", cattn.available_isas())
def test_the_gil_stays_off(wanted):
    code = "import sys, cattn; cattn._kernels.f64(); print(sys._is_gil_enabled())"
    done = in_new_process(code, CATTN_ISA=wanted)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


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
