"""Signals during a long call: Ctrl-C ends it within 0.2 s, other handlers run beside it, and neither changes a bit of
what is computed next. Calls that are to be interrupted would take 20 s and more; the exception has to come within 2 s,
so that a loaded machine passes."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time

import pytest
from processes import ROOT

from cattn import _kernels

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


# `key` reaches any length by stride 0. Dropout makes a call slow on every instruction set.
START = """
import os, signal, sys, threading
import numpy as np, cattn
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
rng = np.random.default_rng(0)
def normal(*shape, dtype=np.float32):
    return rng.standard_normal(shape, dtype)
def repeated(*shape, dtype=np.float32):
    return np.broadcast_to(normal(*shape[:-2], 1, shape[-1], dtype=dtype), shape)
def attention(query, key, **options):
    return cattn.scaled_dot_product_attention(query, key, key, **options)
def gradients(query, key, **options):
    out, logsumexp = np.broadcast_to(np.float32(0), query.shape), np.broadcast_to(np.float32(0), query.shape[:-1])
    return cattn.scaled_dot_product_attention_backward(query, query, key, key, out, logsumexp, **options)
SMALL = normal(2, 4, 200, 64)
expected = attention(SMALL, SMALL)
def say(word):
    print(word, flush=True)
def check():
    say("right" if np.array_equal(attention(SMALL, SMALL), expected) else "wrong")
"""

LONG_CALLS = {
    "many tasks": "attention(normal(1, 8, 4096, 64), repeated(1, 8, 4_000_000, 64), num_threads=2)",
    "one task": "attention(normal(1, 1, 16, 64), repeated(1, 1, 1 << 32, 64), num_threads=1)",
    "parts of one task": "attention(normal(1, 1, 96, 64), repeated(1, 1, 40_000_000, 64), dropout_p=0.5, seed=0, "
                         "num_threads=2)",
    # The caller finishes the first task, and has nothing to do but to wait for the second.
    "another thread's task": "attention(normal(8, 1, 16, 64), repeated(8, 1, 1 << 32, 64), num_threads=2, "
                             "kv_lens=np.array([1 << 20, 1 << 32, 9, 9, 9, 9, 9, 9]))",
    "decode": "attention(normal(1, 1, 1, 64), repeated(1, 1, 1 << 35, 64), num_threads=1)",
    "decode of wide heads": "attention(*[repeated(1, 1, n, 2_000_000) for n in (1, 40_000)], num_threads=2)",
    "float64": "attention(normal(1, 8, 4096, 64, dtype=float), repeated(1, 8, 4_000_000, 64, dtype=float), "
               "num_threads=2)",
    "weights": "attention(normal(1, 1, 96, 8), repeated(1, 1, 4_000_000, 8), return_weights=True, dropout_p=0.5, "
               "seed=0, num_threads=2)",
    "weights of float16": "cattn.scaled_dot_product_attention(*[np.zeros((1, 4, 20_000, 8), np.float16)] * 3, "
                          "return_weights=True, dropout_p=0.5, seed=0, num_threads=1)",
    "packed": "cattn.varlen_attention(normal(8192, 8, 64), *[np.broadcast_to(np.float32(0), (32_000_000, 8, 64))] * 2, "
              "[0, 1, 8192], [0, 1000, 32_000_000], num_threads=2)",
    "pages of 8 bits": "cattn.paged_attention(normal(64, 8, 64), *[np.broadcast_to(np.int8(1), (2, 16, 8, 64))] * 2, "
                       "np.zeros((1, 2_000_000), int), [32_000_000], [0, 64], num_threads=2, "
                       "**dict.fromkeys(('key_scales', 'value_scales'), np.ones((2, 16, 8), np.float32)))",
    "gradients": "gradients(normal(1, 8, 4096, 64), repeated(1, 8, 1_000_000, 64), num_threads=2, wanted=['query'])",
    # Each thread waits for the other at every block of rows.
    "gradients of one head": "gradients(normal(1, 1, 100_000, 64), repeated(1, 1, 100_000, 64), num_threads=2, "
                             "dropout_p=0.5, seed=0)",
    "gradients of one task": "gradients(repeated(1, 1, 20_000_000, 8), repeated(1, 1, 400, 8), num_threads=1, "
                             "dropout_p=0.5, seed=0, wanted=['key'])",
    "gradients of a mask": "gradients(repeated(300_000, 1, 96, 8), repeated(300_000, 1, 400, 8), num_threads=2, "
                           "attn_mask=normal(400), wanted=['attn_mask'])",
    "table": "[cattn.sinusoidal_encoding(1_000_000, 64, out=np.empty((1_000_000, 64), np.float32)) "
             "for _ in range(1000)]",
    "rotary": "(lambda x, *tables: [cattn.rotary_embedding(x, *tables, interleaved=True, out=x) "
              "for _ in range(10_000)])(normal(16, 8, 2000, 64), *cattn.rotary_table(2000, 64))",
    "merge": "cattn.merge_states([normal(1000, 1000)] * 100_000, [normal(1000)] * 100_000, num_threads=2)",
    "layer": "layer_of('float32')",
    "layer of float16": "layer_of('float16')",
    "projection": "projection(4000, 65536, 8192, np.float32, num_threads=2)",
    "projection of few rows": "[projection(1, 8192, 8192, np.float64, num_threads=1) for _ in range(10_000)]",
    "projection of long rows": "projection(4000, 1 << 24, 4000, np.float32, num_threads=2)",
    "projection of transposed views": "projection(4000, 1 << 24, 4000, np.float32, num_threads=2, transposed=True)",
    "sums of columns": "cattn._kernels.f32.column_sums(repeated(1 << 36, 256), np.empty(256, np.float32), 0, 2)",
    "positions": "cattn.PositionalEncoding(64, dropout=0.5)(repeated(20_000, 1000, 64), training=True)",
}


def run(code, signal_after=None, python=(sys.executable, "-W", "ignore::DeprecationWarning", "-c"), **variables):
    """The lines a process prints. It gets a SIGINT so many seconds after it has said "begin"."""
    process = subprocess.Popen([*python, START + code], cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    lines, sent = [], None
    hung = threading.Timer(60, process.kill)
    hung.start()
    with process:
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] == "begin" and signal_after is not None:
                time.sleep(signal_after)
                process.send_signal(signal.SIGINT)
                sent = time.monotonic()
            if lines[-1] == "interrupted" and sent is not None and time.monotonic() - sent > 2:
                lines[-1] = "interrupted late"
    hung.cancel()
    return lines


# Made before the signal is on its way. Layers have weights of 0, by strides of 0 where they may.
PREPARED = {
    "layer": """
def layer_of(dtype):
    return layers[dtype](np.broadcast_to(np.ones(1, dtype), (200, 512, 2048)), num_threads=1)
layers = {dtype: cattn.MultiHeadAttention(2048, 16, dtype=dtype) for dtype in ("float32", "float16")}
""",
    "projection": """
def projection(rows, in_features, out_features, dtype, num_threads, transposed=False):
    module = cattn._kernels.f32 if dtype == np.float32 else cattn._kernels.f64()
    x, weight, out = (np.broadcast_to(dtype(0), (1, 1, *shape)) for shape in (
        (rows, in_features), (out_features, in_features), (rows, out_features)))
    if transposed:      # columns of adjacent numbers, which overlap
        item = dtype(0).itemsize
        x, weight = (np.lib.stride_tricks.as_strided(np.zeros(n + 2 * in_features, dtype), (n, in_features),
                                                     (item, 2 * item)) for n in (rows, out_features))
    kind = 0 if dtype == np.float32 else 1
    module.linear(x, weight, None, None, out.copy(), kind, kind, kind, num_threads)
cattn.preload()
""",
}


@pytest.mark.parametrize("name", LONG_CALLS)
def test_ctrl_c(name):
    assert run(f"""
{PREPARED.get(name.split()[0], "")}
say("begin")
try:
    {LONG_CALLS[name]}
    say("finished")
except KeyboardInterrupt:
    say("interrupted")
check()
""", signal_after=0.5) == ["begin", "interrupted", "right"]


def test_ctrl_c_while_another_thread_computes():
    """The main thread gets it, the other's calls go on."""
    assert run("""
stop, stopped, right = threading.Event(), threading.Event(), []
def work():
    while not stop.is_set():
        right.append(np.array_equal(attention(SMALL, SMALL), expected))
    stopped.set()
thread = threading.Thread(target=work)
say("begin")
thread.start()
try:
    thread.join()
except KeyboardInterrupt:
    say("interrupted")
stop.set()
stopped.wait()  # join, once interrupted, waits no more (Python 3.11)
say(len(right) > 0 and all(right))
""", signal_after=0.5) == ["begin", "interrupted", "True"]


# The main thread, for Python, is the one that started it, or that forked.

EMBEDDED = """
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <pthread.h>
static void* run(void* code) {
    wchar_t* arguments[] = {L"embedded"};
    Py_Initialize();
    PySys_SetArgvEx(1, arguments, 0);
    PyObject* main = PyModule_GetDict(PyImport_AddModule("__main__"));
    PyObject* compiled = Py_CompileString((const char*)code, "embedded", Py_file_input);
    if (compiled == NULL || PyEval_EvalCode(compiled, main, main) == NULL) PyErr_Print();
    Py_Finalize();
    return NULL;
}
int main(int count, char** arguments) {
    pthread_t thread;
    return count != 2 || pthread_create(&thread, NULL, run, arguments[1]) || pthread_join(thread, NULL);
}
"""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A program that runs Python in its second thread."""
    folder, values = tmp_path_factory.mktemp("embedded"), sysconfig.get_config_vars()
    compiler, program = shutil.which("cc"), folder / "embedded"
    if not compiler:
        pytest.skip("needs a compiler")
    (folder / "embedded.c").write_text(EMBEDDED)
    built = subprocess.run(
        [compiler, "-w", folder / "embedded.c", "-o", program, f"-I{values['INCLUDEPY']}", f"-L{values['LIBDIR']}",
         f"-L{values.get('LIBPL')}", f"-Wl,-rpath,{values['LIBDIR']}", f"-lpython{values['LDVERSION']}", "-pthread",
         *shlex.split(f"{values['LIBS']} {values['SYSLIBS']} {values['LINKFORSHARED']}")],
        capture_output=True, text=True)
    if built.returncode:
        pytest.skip("this Python has no library to link with: " + built.stderr[-200:])
    return program


@pytest.mark.parametrize("call", ["one task", "float64"])
def test_python_in_the_second_thread_of_a_process(embedded, call):
    variables = {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    assert run(f"""
say(threading.get_native_id() != os.getpid())
say("begin")
try:
    {LONG_CALLS[call]}
    say("finished")
except KeyboardInterrupt:
    say("interrupted")
check()
""", signal_after=0.5, python=[embedded], **variables) == ["True", "begin", "interrupted", "right"]


def test_ctrl_c_in_a_child_of_a_thread():
    """The thread that forks is the child's main one, which has made calls before, beside the parent's main thread."""
    assert run(f"""
def fork():
    attention(normal(1, 8, 512, 64), repeated(1, 8, 512, 64))
    if os.fork() == 0:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            {LONG_CALLS["one task"]}
            say("finished")
        except KeyboardInterrupt:
            say("interrupted")
        check()
        sys.stdout.flush()
        os._exit(0)
    os.wait()
say("begin")
thread = threading.Thread(target=fork)
thread.start()
thread.join()
check()
""") == ["begin", "interrupted", "right", "right"]


# A call of 0.2 s and more in one thread: 33 million weights with dropout.
DURING_CALLS = """
QUERY, KEY = normal(1, 4, 4096, 8), repeated(1, 4, 2000, 8)
def medium():
    return attention(QUERY, KEY, dropout_p=0.5, seed=0, num_threads=NUM_THREADS)
def right_with(handler):
    # Calls until `handler` has run in the middle of one; True when that one's bits are right.
    handled = False
    def handle(number, frame):
        nonlocal handled
        if frame.f_code is cattn._attention.attend.__code__:
            handled = True
            signal.setitimer(signal.ITIMER_REAL, 0)
            handler()
    before = medium()
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    while not handled:
        out = medium()
    return np.array_equal(out, before)
"""


@pytest.fixture(params=[1, 2])
def num_threads(request):
    return request.param


def test_handlers_run_during_a_call(num_threads):
    """And may call cattn."""
    assert run(f"NUM_THREADS = {num_threads}\n{DURING_CALLS}\nsay(right_with(check))") == ["right", "True"]


@pytest.mark.parametrize("call", [
    "cattn.sinusoidal_encoding(1, 1 << 25)",
    "cattn.sinusoidal_encoding(1 << 17, 512, dtype=np.float16, positions=np.arange(1 << 17) / 3)",
], ids=["one wide row", "positions"])
def test_handlers_run_all_through_a_table(call):
    """A call of 0.5 s and more, that of one row in loops over its columns: handlers run again and again, not at some
    place alone that comes late."""
    lines = run(f"""
cattn.set_num_threads(1)
handled = 0
def handle(number, frame):
    global handled
    handled += frame.f_code is cattn.sinusoidal_encoding.__code__
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
{call}
signal.setitimer(signal.ITIMER_REAL, 0)
say(handled)
""")
    assert int(lines[0]) >= 3


def test_what_a_handler_raises_goes_through(num_threads):
    assert run(f"""NUM_THREADS = {num_threads}\n{DURING_CALLS}
def fail():
    raise TimeoutError("too long")
try:
    right_with(fail)
except TimeoutError as error:
    say(error)
check()
""") == ["too long", "right"]


def test_fork_in_a_handler(num_threads):
    """The child lacks the other threads of the call it is in: better an end with a message than a hang."""
    lines = run(f"""NUM_THREADS = {num_threads}\n{DURING_CALLS}
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
def fork():
    pid = os.fork()
    if pid:
        say(f"child: {{os.waitpid(pid, 0)[1] & 127}}")
say(right_with(fork))
check()
""")
    if num_threads == 1 or _kernels.f32.build_info()["openmp"].startswith("none"):
        assert lines == ["True", "right", "child: 0", "True", "right"]
    else:
        assert lines[0].startswith("Fatal Python error") and "cattn: a signal handler forked" in lines[0]
        assert lines[-3:] == [f"child: {signal.SIGABRT:d}", "True", "right"]
