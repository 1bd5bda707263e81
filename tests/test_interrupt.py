"""Signals during a long call: Ctrl-C ends it within 0.2 s, other handlers run beside it, and neither changes a bit of
what is computed next. Calls that are to be interrupted would take 20 s and more; the exception has to come within 2 s,
so that a loaded machine passes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import cattn
from cattn import _kernels

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

ROOT = Path(cattn.__file__).parents[1]

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
    "float64": "attention(normal(1, 8, 4096, 64, dtype=float), repeated(1, 8, 4_000_000, 64, dtype=float), "
               "num_threads=2)",
    "weights": "attention(normal(1, 1, 96, 8), repeated(1, 1, 4_000_000, 8), return_weights=True, dropout_p=0.5, "
               "seed=0, num_threads=2)",
    "table": "[cattn.sinusoidal_encoding(1_000_000, 64, out=np.empty((1_000_000, 64), np.float32)) "
             "for _ in range(1000)]",
}


def run(code, signal_after=None):
    """The lines a process prints. It gets a SIGINT so many seconds after it has said "begin"."""
    process = subprocess.Popen([sys.executable, "-W", "ignore::DeprecationWarning", "-c", START + code], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
            if lines[-1] == "interrupted" and time.monotonic() - sent > 2:
                lines[-1] = "interrupted late"
    hung.cancel()
    return lines


@pytest.mark.parametrize("call", LONG_CALLS.values(), ids=LONG_CALLS)
def test_ctrl_c(call):
    assert run(f"""
say("begin")
try:
    {call}
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
        if frame.f_code is cattn.scaled_dot_product_attention.__code__:
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
