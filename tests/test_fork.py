"""A child of fork computes, with all its threads, whatever its parent did before: GCC's OpenMP alone would hang."""

import http.client
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from processes import ROOT

import cattn
from cattn import _kernels
from cattn._linear import linear_backward

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

OPENMP = _kernels.f32.build_info()["openmp"]
ARRAYS = np.random.default_rng(0).standard_normal((3, 2, 4, 200, 64)).astype(np.float32)


def attention():
    return cattn.scaled_dot_product_attention(*ARRAYS, num_threads=2)


@pytest.fixture(autouse=True)
def expected():
    """The parent has used its threads before each test."""
    with warnings.catch_warnings():  # Python 3.12 warns of any fork beside threads
        warnings.simplefilter("ignore", DeprecationWarning)
        yield attention()


def exit_status_of_child(compute, expected):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a hang ends as a signal
        os._exit(0 if np.array_equal(compute(), expected) else 1)
    return os.waitpid(pid, 0)[1]


def test_fork(expected):
    for _ in range(3):
        assert exit_status_of_child(attention, expected) == 0
        np.testing.assert_array_equal(attention(), expected)


def test_serving_in_a_child():
    """A cache that the parent has filled grows on in the child, with the bits that it has in the parent."""
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((150, 4, 64), np.float32), rng.standard_normal((150, 2, 64), np.float32)
    weight = np.random.default_rng(1).integers(-127, 128, (300, 64), np.int8)
    cu_seqlens, scales = [0, 100, 150], np.ones((300, 2), np.float32)
    tables = cattn.rotary_table(150, 64)
    caches = {dtype: cattn.KVCache(1, 2, 64, dtype=dtype) for dtype in ("float32", "int8")}
    sequences = {dtype: cache.new() for dtype, cache in caches.items()}
    for dtype, cache in caches.items():
        cache.attend(0, cache.extend(sequences[dtype], 150), query, key, key)

    def compute():
        results = [
            cattn.varlen_attention(query, key, key, cu_seqlens, num_threads=2),
            cattn.linear(query, weight, weight_scales=scales, num_threads=2),
            *linear_backward(query, query, query[:64, 0], True, 2),
            cattn.rotary_embedding(query, *tables, positions=np.arange(150)[:, None], interleaved=True, num_threads=2),
            *cattn.merge_states([query, query], [query[..., 0], query[..., 1]], num_threads=2)]
        for dtype, cache in caches.items():
            child = cache.fork(sequences[dtype])
            results.append(cache.attend(0, cache.extend(child, 150), query, key, key, num_threads=2))
        return np.concatenate([x.ravel() for x in results])

    expected = compute()
    for _ in range(2):
        assert exit_status_of_child(compute, expected) == 0
        np.testing.assert_array_equal(compute(), expected)


def test_gradients_in_a_child():
    out, logsumexp = cattn.scaled_dot_product_attention(*ARRAYS, is_causal=True, return_logsumexp=True)

    def compute():
        return np.stack(cattn.scaled_dot_product_attention_backward(
            out, *ARRAYS, out, logsumexp, is_causal=True, num_threads=2)[:3])

    expected = compute()
    for _ in range(2):
        assert exit_status_of_child(compute, expected) == 0
        np.testing.assert_array_equal(compute(), expected)


def test_fork_of_a_fork(expected):
    def grandchild():
        attention()
        return attention() if exit_status_of_child(attention, expected) == 0 else None

    assert exit_status_of_child(grandchild, expected) == 0


def test_child_has_its_threads(expected):
    tasks = "/proc/self/task"
    if not os.path.isdir(tasks) or OPENMP.startswith("none"):
        pytest.skip("needs /proc and OpenMP")

    def compute():
        result = attention()
        return result if len(os.listdir(tasks)) >= 2 else None

    assert exit_status_of_child(compute, expected) == 0


def test_multiprocessing_fork(expected):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for result in [pool.apply_async(attention) for _ in range(4)]:
            np.testing.assert_array_equal(result.get(timeout=30), expected)


def test_fork_from_a_thread_while_another_computes(expected):
    stop = threading.Event()
    statuses = []

    def keep_computing():
        while not stop.is_set():
            attention()

    busy = threading.Thread(target=keep_computing)
    forking = threading.Thread(target=lambda: statuses.extend(
        exit_status_of_child(attention, expected) for _ in range(3)))
    busy.start()
    forking.start()
    forking.join()
    stop.set()
    busy.join()
    assert statuses == [0, 0, 0]


def test_fork_while_others_start_their_threads(expected):
    """Each first call of a Python thread starts some, one call at a time: a child is not kept waiting for those of its
    parent."""
    stop = threading.Event()

    def keep_starting():
        while not stop.is_set():
            thread = threading.Thread(target=attention)
            thread.start()
            thread.join()

    starting = [threading.Thread(target=keep_starting) for _ in range(3)]
    for thread in starting:
        thread.start()
    statuses = [0]
    while statuses[-1] == 0 and len(statuses) <= 50:
        statuses.append(exit_status_of_child(attention, expected))
    stop.set()
    for thread in starting:
        thread.join()
    assert statuses[-1] == 0


def test_gunicorn(tmp_path):
    """--preload: the master imports the application, which computes, and forks the workers."""
    pytest.importorskip("gunicorn")
    (tmp_path / "gunicorn.conf.py").write_text("control_socket_disable = True")  # it would be made in the home folder
    (tmp_path / "application.py").write_text("""
import os, time
import numpy as np
import cattn

ARRAYS = np.random.default_rng(0).standard_normal((3, 2, 4, 200, 64), np.float32)

def attention():
    return cattn.scaled_dot_product_attention(*ARRAYS, num_threads=2)

expected, master = attention(), os.getpid()

def answer(environ, start_response):
    right = all(np.array_equal(attention(), expected) for _ in range(10))
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 2
    time.sleep(0.1)  # busy: the other worker takes the next request
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {os.getppid() == master and right and threads >= 2}".encode()]
""")

    def ask(_):
        connection = http.client.HTTPConnection(*listener.getsockname(), timeout=30)
        connection.request("GET", "/")
        return connection.getresponse().read().decode()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--bind",
                   f"fd://{listener.fileno()}", "--pythonpath", f"{tmp_path},{ROOT}", "application:answer"]
        server = subprocess.Popen(command, cwd=tmp_path, pass_fds=[listener.fileno()])
        try:
            workers = set()
            with ThreadPoolExecutor(4) as clients:
                for _ in range(20):
                    for pid, good in map(str.split, clients.map(ask, range(4))):
                        workers.add(pid)
                        assert good == str(not OPENMP.startswith("none"))
                    if len(workers) == 2:
                        break
            assert len(workers) == 2
        finally:
            server.terminate()
            server.wait(30)


def test_openmp_that_cannot_dissolve_its_pool(tmp_path):
    """The child computes with one thread, and so do its children. A runtime of the same name that refuses stands in for
    one that lacks the function."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or not compiler or OPENMP.startswith("none"):
        pytest.skip("needs OpenMP, a compiler and LD_PRELOAD")
    (tmp_path / "refuse.c").write_text("int omp_pause_resource_all(int kind) { return -1; }")
    library = tmp_path / "refuse.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "refuse.c"], check=True)
    preload = f"{os.environ.get('LD_PRELOAD', '')} {library}"  # a sanitizer has to stay the first
    done = subprocess.run([sys.executable, "-c", """
import os, signal, cattn
import numpy as np
from cattn import _threads
cattn.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((8, 200, 64), np.float32)
expected = cattn.scaled_dot_product_attention(x, x, x)
wide = x.astype(float)
def child(depth):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        right = np.array_equal(cattn.scaled_dot_product_attention(x, x, x), expected)
        right &= np.array_equal(cattn.scaled_dot_product_attention(x, x, x, num_threads=4), expected)
        right &= cattn.scaled_dot_product_attention(wide, wide, wide).shape == wide.shape  # loads another module
        right &= cattn._kernels.fma_flops(10, 2) > 0
        print(right, len(os.listdir("/proc/self/task")), cattn.get_num_threads(), _threads.source(), flush=True)
        if depth:
            child(depth - 1)
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
child(1)
print(np.array_equal(cattn.scaled_dot_product_attention(x, x, x), expected), cattn.get_num_threads())
"""], cwd=ROOT, env=os.environ | {"LD_PRELOAD": preload}, capture_output=True, text=True, timeout=120)
    serial = "True 1 1 set_num_threads, limited by a fork, with an OpenMP that cannot take one"
    assert done.stdout.splitlines() == [serial, serial, "0", "0", "True 2"], done.stderr
