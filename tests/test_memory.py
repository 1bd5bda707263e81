"""Memory: no leak, also where it runs out; arrays live as long as a call needs them; many threads at once."""

import ctypes
import itertools
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from problems import assert_same_bits, normal, problem
from processes import program_of, python

import cattn
from cattn import _kernels

attention = cattn.scaled_dot_product_attention

measured = pytest.mark.skipif(
    not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")), reason="needs glibc's mallinfo2")
starts_threads = pytest.mark.skipif(
    _kernels.f32.build_info()["openmp"].startswith("none"), reason="a build without OpenMP")


def run(code, **variables):
    done = python(program_of("leaks", code), **variables)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@measured
def test_no_block_left():
    run("leaks.no_block_left(250)")


@measured
def test_no_page_more():
    """100,000 calls that leak 64 bytes would take 6 MiB, and a leak of one large result 8."""
    run("leaks.no_page_more(100_000, 30, 2 * leaks.MIB)")


@measured
def test_no_page_more_each_call():
    """Scratch is kept where malloc would give it back to the system after each call, from 128 KiB on."""
    run("leaks.no_page_more_each_call()", MALLOC_TRIM_THRESHOLD_="131072")


@measured
@pytest.mark.slow
def test_no_page_more_in_a_million_calls():
    run("leaks.no_page_more(1_000_000, 1000, 2 * leaks.MIB); leaks.no_block_left(10_000)")


@measured
def test_out_of_memory():
    run("leaks.out_of_memory(200)")


@measured
def test_too_few_threads():
    """GCC's OpenMP ends the process where it cannot start a thread."""
    run("leaks.too_few_threads()")


@measured
def test_scratch_stays_small():
    run("leaks.scratch_stays_small()")


@measured
@starts_threads
@pytest.mark.parametrize(("large", "small"), [
    ("float64", "float32"), ("float32", "float64"), ("float32", "fma"), ("float64", "read"), ("fma", "float32"),
    ("read", "layer"), ("layer", "table"), ("table", "layer"),
    ("float32", "gradients")])
def test_one_pool(large, small):
    """Each thread that calls has one, whichever modules it calls in: a region of fewer threads ends the others."""
    run(f"leaks.one_pool({large!r}, {small!r})")


@measured
@starts_threads
def test_one_pool_in_a_child():
    run("leaks.one_pool_in_a_child()")


@measured
@starts_threads
def test_no_pool_in_a_region_of_one_thread():
    run("leaks.in_a_region_of_one_thread()")


@measured
@starts_threads
def test_fewer_threads_than_asked_for():
    run("leaks.fewer_than_asked()")


STACKS = {
    "G": {"OMP_STACKSIZE": "1G"},
    "KB": {"OMP_STACKSIZE": " 1048576"},  # KB
    "GOMP": {"GOMP_STACKSIZE": "1024 m "},
    "GOMP too small": {"OMP_STACKSIZE": "1073741824b", "GOMP_STACKSIZE": "1M"},
    "no unit": {"OMP_STACKSIZE": "1T", "GOMP_STACKSIZE": "1048576K"},  # no unit that it knows: as if it were not set
    "GOMP of 0": {"OMP_STACKSIZE": "1G", "GOMP_STACKSIZE": "0"},
}


@measured
@starts_threads
@pytest.mark.parametrize("variables", STACKS.values(), ids=STACKS)
def test_large_stacks(variables):
    """Of 1 GiB, as the environment has it: those of the threads that are tried first are as large."""
    if _kernels.f32.build_info()["openmp"].startswith("libomp"):
        pytest.skip("other units")
    run("leaks.large_stacks(2**30)", **variables)


@measured
@starts_threads
@pytest.mark.parametrize("limit", ["memory", "threads"])
def test_first_calls_at_once(limit):
    run(f"leaks.first_calls_at_once(10, {limit!r})")


@measured
@starts_threads
def test_last_blocks():
    run("leaks.last_blocks()")


@measured
def test_eight_threads():
    run("leaks.eight_threads(2)")


@measured
@pytest.mark.slow
def test_eight_threads_for_a_minute():
    run("leaks.eight_threads(60)")


def during_a_call(act):
    """(query, key, value), copies of them, what act(arrays) returned, the result of attention on them. act() ran while
    a thread was in the middle of that call; the thread had taken the arrays out of the list. Longer calls until one
    lasts."""
    for seq_len_kv in (2**power for power in itertools.count(13)):
        arrays = [normal(1000, 64), normal(seq_len_kv, 64, seed=1), normal(seq_len_kv, 64, seed=2)]
        copies = [x.copy() for x in arrays]
        taken, results = arrays.copy(), []
        thread = threading.Thread(target=lambda taken=taken, results=results: results.append(
            attention(taken.pop(0), taken.pop(0), taken.pop(0), num_threads=1)))
        thread.start()
        while taken:
            time.sleep(0.001)
        acted = act(arrays)
        lasted = thread.is_alive()
        thread.join()
        if lasted:
            return arrays, copies, acted, results[0]


def test_arrays_dropped_during_a_call():
    def drop(arrays):
        watched = [weakref.ref(x) for x in arrays]
        arrays.clear()
        taking_their_place = [np.full((2**13, 64), np.nan, np.float32) for _ in range(20)]
        return watched, [x() is not None for x in watched], len(taking_their_place)

    arrays, copies, (watched, alive, _), result = during_a_call(drop)
    assert arrays == [] and alive == [True] * 3
    assert_same_bits(result, attention(*copies, num_threads=1))
    assert [x() for x in watched] == [None] * 3


def test_temporary_arrays_live_as_long_as_the_call():
    """Those that nobody but the call has ever referred to."""
    class Source:
        def __init__(self, x):
            self.x, self.made = x, None

        def __array__(self, dtype=None, copy=None):
            made = self.x.copy()
            self.made = weakref.ref(made)
            return made

    arrays = problem(300, 2000, 64)
    sources = [Source(x) for x in arrays]
    mask = np.ones((300, 2000), bool)
    assert_same_bits(attention(*sources, mask.tolist()), attention(*arrays, mask))
    assert [source.made() for source in sources] == [None] * 3


def test_arrays_resized_during_a_call():
    def resize(arrays):  # by index: a variable would be one more reference, and enough for NumPy to refuse
        errors = []
        for i in range(3):
            try:
                arrays[i].resize(1)
            except ValueError as error:
                errors.append(str(error))
        return errors

    arrays, copies, errors, result = during_a_call(resize)
    assert len(errors) == 3 and all("cannot resize" in error for error in errors)
    assert_same_bits(result, attention(*copies, num_threads=1))
    assert resize(arrays) == resize([x.copy() for x in copies])  # with CPython 3.14, NumPy refuses this as well
