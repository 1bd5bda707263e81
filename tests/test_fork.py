"""A child of fork computes, with all its threads, whatever its parent did before: GCC's OpenMP alone would hang."""

import multiprocessing
import os
import signal
import threading
import warnings

import numpy as np
import pytest

import cattn

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

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


def test_fork_of_a_fork(expected):
    def grandchild():
        attention()
        return attention() if exit_status_of_child(attention, expected) == 0 else None

    assert exit_status_of_child(grandchild, expected) == 0


def test_child_has_its_threads(expected):
    tasks = "/proc/self/task"
    if not os.path.isdir(tasks) or cattn.get_num_threads() == 1:
        pytest.skip("needs /proc and two processors")

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
