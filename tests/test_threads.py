"""How many threads a call uses: its own number, or else a share of what set_num_threads, the environment, the quota or
the CPUs say and what limits OpenMP leaves."""

import ctypes
import os
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
from processes import python

import cattn
from cattn import _kernels, _threads
from cattn._threads import _cgroup_quota

VARIABLES = "CATTN_NUM_THREADS", "OMP_NUM_THREADS"


def beginning(parameter):
    """The name of a case."""
    return ascii(parameter)[:24]


def in_new_process(code, **variables):
    return python(code, without=VARIABLES, **variables)


def number_and_source(**variables):
    done = in_new_process("import cattn._threads as t; print(t.get_num_threads(), t.source())", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def no_number_set():
    cattn.set_num_threads(None)
    yield
    cattn.set_num_threads(None)


@pytest.fixture
def openmp_libraries():
    """Those that this process has loaded."""
    if _kernels.f32.build_info()["openmp"].startswith("none"):
        pytest.skip("a build without OpenMP")
    threadpoolctl = pytest.importorskip("threadpoolctl")
    return [library["filepath"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "openmp"]


SETTINGS = {
    "both": ({"CATTN_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, "5 CATTN_NUM_THREADS"),
    "spaces": ({"CATTN_NUM_THREADS": " 6 "}, "6 CATTN_NUM_THREADS"),
    "empty": ({"CATTN_NUM_THREADS": "", "OMP_NUM_THREADS": "3"}, "3 OMP_NUM_THREADS"),
    "largest": ({"CATTN_NUM_THREADS": str(2**31 - 1)}, f"{2**31 - 1} CATTN_NUM_THREADS"),
    "leading zeros": ({"CATTN_NUM_THREADS": "0" * 5000 + "5"}, "5 CATTN_NUM_THREADS"),
    "OpenMP's beyond int": (  # OpenMP shows a negative int
        {"CATTN_NUM_THREADS": "5", "OMP_NUM_THREADS": str(2**31)}, "5 CATTN_NUM_THREADS",
    ),
}


@pytest.mark.parametrize(("variables", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_environment(variables, expected):
    assert number_and_source(**variables) == expected


@pytest.mark.parametrize(("value", "expected"), [
    ("7", 7),  # more than there are CPUs: as told
    ("4,2", 4),  # one for each level of nesting
    (" 4", 4), ("4\n", 4), ("4 , 2", 4), ("+4", 4), ("04", 4), ("0" * 5000 + "4", 4), (f"4,{2**63 - 1}", 4),
], ids=beginning)
def test_environment_of_openmp(openmp_libraries, value, expected):
    """What GCC's OpenMP takes."""
    code = (f"import ctypes; print(ctypes.CDLL({openmp_libraries[0]!r}).omp_get_max_threads())\n"
            "import cattn._threads as t; print(t.get_num_threads(), t.source())")
    done = in_new_process(code, OMP_NUM_THREADS=value)
    assert done.stdout.split("\n") == [str(expected), f"{expected} OMP_NUM_THREADS", ""], done.stderr


NONSENSE = ["0", "-1", "two", "1.5", "0x4", "1_0", "\u0663", "4 2", "\udcff", str(2**63), str(2**64), "9" * 5000]


@pytest.mark.parametrize("nonsense", [*NONSENSE, "+4", "4,2", str(2**31)], ids=beginning)
def test_nonsense_in_the_own_variable(nonsense):
    done = in_new_process("import cattn", CATTN_NUM_THREADS=nonsense)
    assert done.returncode == 1
    got = repr(nonsense) if len(nonsense) < 60 else f"{'9' * 40!r}... (5000 characters)"
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: CATTN_NUM_THREADS: expected an integer from 1 to 2147483647, got {got}")


@pytest.mark.parametrize("nonsense", [
    *NONSENSE, "", ",4", "4,", "4,0", "4,-1", "4,x", f"4,{2**63}", "+ 4", "4;2", str(2**31), "3000000000",
    str(2**63 - 1),
], ids=beginning)
def test_nonsense_in_the_environment(nonsense):
    """OpenMP's variable is for OpenMP to judge: it ignores nonsense. (A number between an int and a long it takes, to
    die of it in the first region that asks for no number.)"""
    assert number_and_source(OMP_NUM_THREADS=nonsense) == number_and_source()


BOUND_OR_NOT = {
    "unbound": {},
    "bound": {"OMP_PROC_BIND": "true"},
}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
@pytest.mark.parametrize("variables", BOUND_OR_NOT.values(), ids=BOUND_OR_NOT)
def test_affinity(variables):
    code = ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "import cattn._threads as t; print(t.get_num_threads(), t.source())")
    assert in_new_process(code, **variables).stdout == "1 CPU affinity\n"


CPUS = ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else "0"


BINDINGS = {
    "true": {"OMP_PROC_BIND": "true"},
    "close": {"OMP_PROC_BIND": "close"},
    "spread": {"OMP_PROC_BIND": "spread"},
    "cores": {"OMP_PLACES": "cores"},
    "threads": {"OMP_PLACES": "threads", "OMP_PROC_BIND": "close"},
    "GOMP": {"GOMP_CPU_AFFINITY": CPUS},
}


@pytest.mark.parametrize("variables", BINDINGS.values(), ids=BINDINGS)
def test_binding(openmp_libraries, variables):
    """OpenMP binds the main thread to one CPU when it is loaded, by cattn or by another library before: the process has
    no fewer CPUs for that."""
    assert number_and_source(**variables) == number_and_source()
    code = (f"import ctypes; ctypes.CDLL({openmp_libraries[0]!r}).omp_get_num_procs()\n"
            "import cattn._threads as t; print(t.get_num_threads(), t.source())")
    assert in_new_process(code, **variables).stdout == in_new_process(code).stdout


LIMITS = {
    "1": ({"CATTN_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "1"}, "1 CATTN_NUM_THREADS, limited by OMP_THREAD_LIMIT"),
    "3": ({"CATTN_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "3"}, "3 CATTN_NUM_THREADS, limited by OMP_THREAD_LIMIT"),
    "of OpenMP's number": (
        {"OMP_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "3"}, "3 OMP_NUM_THREADS, limited by OMP_THREAD_LIMIT",
    ),
    "no levels": (
        {"CATTN_NUM_THREADS": "8", "OMP_MAX_ACTIVE_LEVELS": "0"},
        "1 CATTN_NUM_THREADS, limited by OMP_MAX_ACTIVE_LEVELS",
    ),
    "as many": ({"CATTN_NUM_THREADS": "3", "OMP_THREAD_LIMIT": "3"}, "3 CATTN_NUM_THREADS"),
    "0": ({"CATTN_NUM_THREADS": "3", "OMP_THREAD_LIMIT": "0"}, "3 CATTN_NUM_THREADS"),  # ignored
}


@pytest.mark.parametrize(("variables", "expected"), LIMITS.values(), ids=LIMITS)
def test_thread_limit(openmp_libraries, variables, expected):
    assert number_and_source(**variables) == expected
    done = in_new_process("import cattn; cattn.show_config()", **variables)
    assert f"(from: {expected.split(' ', 1)[1]})" in done.stdout


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("limit", [1, 3])
def test_calls_under_a_thread_limit(openmp_libraries, limit):
    """However many threads they ask for."""
    code = """
import os, numpy as np, cattn
def total():
    layer, sums = cattn.MultiHeadAttention(64, 4, seed=0), []
    for dtype in (np.float32, np.float64):
        x = np.random.default_rng(0).standard_normal((8, 512, 64)).astype(dtype)
        sums.append(cattn.scaled_dot_product_attention(x, x, x, num_threads=8).sum())
    sums += [layer(x.astype(np.float32), num_threads=8).sum(), cattn.sinusoidal_encoding(9000, 512).sum()]
    return [float(number).hex() for number in sums]
before = len(os.listdir("/proc/self/task"))
results = total()
print(len(os.listdir("/proc/self/task")) - before, results)
"""
    limited = in_new_process(code, CATTN_NUM_THREADS="8", OMP_THREAD_LIMIT=str(limit)).stdout
    free = in_new_process(code, CATTN_NUM_THREADS="8").stdout
    assert limited.split(" ", 1)[0] == str(limit - 1) and free.split(" ", 1)[0] == "7"
    assert limited.split(" ", 1)[1] == free.split(" ", 1)[1]


def test_teams_that_openmp_makes_smaller(openmp_libraries):
    """OMP_DYNAMIC: a region may get fewer threads than it asks for, here the number of CPUs at most."""
    done = in_new_process("""
import os
import numpy as np
import cattn
many = 4 * os.cpu_count()
x = np.random.default_rng(0).standard_normal((2, 170, 64), np.float32)
layer = cattn.MultiHeadAttention(64, 4, input_dim=64, seed=0)
wide = cattn.MultiHeadAttention(960, 1, input_dim=64, seed=0)
one_query = x[:, None, :1].repeat(8, 1)
keys = np.random.default_rng(1).standard_normal((2, 8, 20000, 64), np.float32)
for call in (
    lambda: layer(x, num_threads=threads), lambda: wide(x[:1, :40], num_threads=threads),
    lambda: cattn.scaled_dot_product_attention(one_query, keys, keys, num_threads=threads),
    lambda: cattn.scaled_dot_product_attention_backward(
        x[:1], x[:1], *[keys[0, :1, :3000]] * 2, x[:1], x[:1, :, 0], num_threads=threads).key,
    lambda: cattn.set_num_threads(threads) or cattn.sinusoidal_encoding(5000, 64),
):
    results = []
    for threads in (1, many):
        results.append(call())
    np.testing.assert_array_equal(*results)
""", OMP_DYNAMIC="true")
    assert done.returncode == 0, done.stderr


def test_a_number_too_large_to_print():
    with pytest.raises(ValueError, match="num_threads: expected 1 to 2147483647, got an integer of 16610 bits"):
        cattn.set_num_threads(10**5000)


QUOTAS = {
    "none": (8, None, (8, "CPU affinity")),
    "whole CPUs": (8, 2.0, (2, "cgroup CPU quota")),
    "part of a CPU": (8, 2.1, (3, "cgroup CPU quota")),  # rounded up: what is paid for gets used
    "less than one": (8, 0.25, (1, "cgroup CPU quota")),
    "all": (8, 8.0, (8, "CPU affinity")),
    "more than the CPUs": (2, 64.0, (2, "CPU affinity")),
}


@pytest.mark.parametrize(("cpus", "quota", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_quota_and_affinity(monkeypatch, cpus, quota, expected):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_kernels, "cpus", cpus)
    monkeypatch.setattr(_threads, "_cgroup_quota", lambda: quota)
    assert _threads._default() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _threads._default() == (5, "OMP_NUM_THREADS")
    monkeypatch.setenv("CATTN_NUM_THREADS", "6")
    assert _threads._default() == (6, "CATTN_NUM_THREADS")


def test_affinity_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    assert _kernels._count_cpus() == 7


@pytest.mark.parametrize("error", [AttributeError, PermissionError, OSError])
def test_without_affinity(monkeypatch, error):
    """macOS has none; a sandbox may forbid to ask."""
    def refuse(pid):
        raise error

    monkeypatch.setattr(os, "sched_getaffinity", refuse, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert _kernels._count_cpus() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert _kernels._count_cpus() == 1


def test_set_num_threads():
    default, source = cattn.get_num_threads(), _threads.source()
    cattn.set_num_threads(3)
    assert cattn.get_num_threads() == 3 and _threads.source() == "set_num_threads"
    cattn.set_num_threads(np.int64(2))
    assert cattn.get_num_threads() == 2 and type(cattn.get_num_threads()) is int
    cattn.set_num_threads(None)
    assert cattn.get_num_threads() == default and _threads.source() == source


def test_set_num_threads_beats_the_environment():
    code = ("import cattn\nprint(cattn.get_num_threads())\ncattn.set_num_threads(4)\nprint(cattn.get_num_threads())\n"
            "cattn.set_num_threads(None)\nprint(cattn.get_num_threads())")
    assert in_new_process(code, CATTN_NUM_THREADS="5").stdout.split() == ["5", "4", "5"]


def test_the_call_comes_first(monkeypatch):
    used = []

    def note(*, num_threads, **others):
        used.append(num_threads)

    monkeypatch.setattr(_kernels, "f32", SimpleNamespace(attend=note, attend_short=_kernels.f32.attend_short))
    x = np.zeros((3, 4), np.float32)  # too few axes for the short way
    cattn.scaled_dot_product_attention(x, x, x)
    cattn.set_num_threads(3)
    cattn.scaled_dot_product_attention(x, x, x)
    cattn.scaled_dot_product_attention(x, x, x, num_threads=2)
    cattn.scaled_dot_product_attention(x, x, x, num_threads=np.uint8(5))
    cattn.scaled_dot_product_attention(x, x, x)
    assert used == [0, 0, 2, 5, 0]  # 0: the kernel takes a share of the default


def test_the_call_of_gradients_comes_first(monkeypatch):
    used = []

    def note(*, num_threads, **others):
        used.append(num_threads)
        return None, None

    monkeypatch.setattr(_kernels, "f32", SimpleNamespace(attend_backward=note))
    x = np.zeros((3, 4), np.float32)
    dense, packed = (x, x, x, x, x, x[:, 0]), (*[x[:, None]] * 5, x[:, :1], [0, 3])
    for backward, given in ((cattn.scaled_dot_product_attention_backward, dense),
                            (cattn.varlen_attention_backward, packed)):
        backward(*given)
        backward(*given, num_threads=2)
    assert used == [0, 2, 0, 2]


def test_limits_of_threadpoolctl(openmp_libraries):
    """The smaller number wins, in the Python thread that the limit was set in."""
    done = in_new_process("""
import threading, cattn
from cattn import _threads
from threadpoolctl import threadpool_limits
def show():
    print(cattn.get_num_threads(), _threads.source(), sep=": ")
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
    layer = cattn.MultiHeadAttention(64, 4, seed=0)  # its tasks are shared otherwise than attention's
    expected, expected_of_layer = cattn.scaled_dot_product_attention(x, x, x), layer(x)
    cattn.set_num_threads(3)
    inside = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        right = (np.array_equal(cattn.scaled_dot_product_attention(x, x, x, num_threads=2), expected)
                 and np.array_equal(layer(x, num_threads=2), expected_of_layer))
        inside.append((cattn.get_num_threads(), _threads.source(), right))

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
    given = normal(2, 2, 70, 40, seed=3), *problem(70, 600, 40), normal(2, 2, 70, 40, seed=4), normal(2, 2, 70)
    calls += [lambda: cattn.scaled_dot_product_attention_backward(*given, num_threads=2)[:3]]
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
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


V2_GROUPS = {
    "max": ("/", {"cpu.max": "max 100000\n"}, None),
    "quota of the root": ("/", {"cpu.max": "150000 100000\n"}, 1.5),
    "no file": ("/", {}, None),
    "quota of the group": ("/a/b", {"a/b/cpu.max": "50000 100000\n"}, 0.5),
    "the root's is the smallest": (
        "/a/b", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "max 100000\n", "cpu.max": "200000 100000\n"}, 2.0,
    ),
    "the parent's": (
        "/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0,
    ),
    "another's": ("/a", {"b/cpu.max": "100000 100000\n"}, None),
    "path of the host": (  # a path of the host, seen from a container
        "/gone/from/here", {"cpu.max": "100000 50000\n"}, 2.0,
    ),
    "empty file": ("/a", {"a/cpu.max": "\n"}, None),
}


@pytest.mark.parametrize(("path", "contents", "expected"), V2_GROUPS.values(), ids=V2_GROUPS)
def test_cgroup_v2(tmp_path, path, contents, expected):
    files(tmp_path / "cgroup", contents)
    files(tmp_path, {"membership": f"0::{path}\n"})
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") == expected


V1_GROUPS = {
    "no limit": ("/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    "quota of the root": ("/", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
    "the parent's": (
        "/a/b", {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000\n",
                 "cpu/a/cpu.cfs_quota_us": "70000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 0.7,
    ),
    "path of the host": ("/gone", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.0),
    "no period": ("/a", {"cpu/a/cpu.cfs_quota_us": "100000\n"}, None),
    "another controller": ("/", {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}, None),
}


@pytest.mark.parametrize(("path", "contents", "expected"), V1_GROUPS.values(), ids=V1_GROUPS)
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


ODD = [
    "100000 0", "0 100000", "0 0", "-5 100000", "100000 -1", "-100000 -100000", "words here", "1e5 1e5", "0x10 10",
    "1.5 1", "\u0663 1", "100000", "1 2 3", "", "\n", b"\xff\xfe \x80", b"1\x00 1", f"{10**30} 1", f"1 {10**400}",
    f"{'9' * 5000} 100000",
]


@pytest.mark.parametrize("odd", ODD, ids=beginning)
def test_odd_quotas(tmp_path, odd):
    """They count as none; what the parent says still does."""
    odd = odd if isinstance(odd, bytes) else odd.encode()
    quota, _, period = odd.partition(b" ")
    files(tmp_path, {
        "alone/a/cpu.max": odd, "two/a/cpu.max": odd, "two/cpu.max": "200000 100000",
        "old/cpu/a/cpu.cfs_quota_us": quota, "old/cpu/a/cpu.cfs_period_us": period,
        "v2": "0::/a\n", "v1": "5:cpu,cpuacct:/a\n",
    })
    assert _cgroup_quota(tmp_path / "alone", tmp_path / "v2") is None
    assert _cgroup_quota(tmp_path / "two", tmp_path / "v2") == 2.0
    assert _cgroup_quota(tmp_path / "old", tmp_path / "v1") is None


@pytest.mark.parametrize("odd", [
    b"", b"\n\n", b"no colons", b"0", b"0:", b"5:cpu", b":::", b"0::/a\x00b", b"\xff:\xfe:\xfd", b"0::" + b"/b" * 5000,
    b"0::/../../..", "\u0660::/a".encode(),
], ids=beginning)
def test_odd_memberships(tmp_path, odd):
    files(tmp_path, {"cgroup/a/cpu.max": "100000 100000", "odd": odd + b"\n", "both": odd + b"\n0::/a\n"})
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "odd") is None
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "both") == 1.0


def test_a_cgroup_whose_name_is_no_utf8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"a\xff\xe2\x80\xa8b")  # with a line separator of Unicode in it
    os.mkdir(folder)
    Path(os.fsdecode(folder), "cpu.max").write_text("50000 100000")
    files(tmp_path, {"membership": b"0::/a\xff\xe2\x80\xa8b\n"})
    assert _cgroup_quota(tmp_path, tmp_path / "membership") == 0.5


@pytest.mark.parametrize("unreadable", ["cgroup/a/cpu.max", "membership"])
def test_files_that_cannot_be_read(tmp_path, monkeypatch, unreadable):
    files(tmp_path, {"cgroup/a/cpu.max": "100000 100000", "membership": "0::/a\n"})
    (tmp_path / unreadable).unlink()
    (tmp_path / unreadable).mkdir()
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") is None


def test_no_cgroups(tmp_path):
    assert _cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") is None
