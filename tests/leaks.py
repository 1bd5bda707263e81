"""What calls leave behind in memory, for test_memory.py, which runs this in processes of its own."""

import ctypes
import gc
import itertools
import resource
import sys
import threading
import time

import numpy as np
from problems import assert_same_bits, normal, problem

import cattn

MIB = 2**20
attention = cattn.scaled_dot_product_attention


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


mallinfo2 = ctypes.CDLL(None).mallinfo2  # of glibc
mallinfo2.restype = MallInfo


def in_use():
    """Bytes that malloc has given out and not taken back, and blocks of Python objects."""
    gc.collect()
    info = mallinfo2()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


def statm(field):
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * resource.getpagesize()


def address_space():
    return statm(0)


def resident():
    return statm(1)


def refused(*args, function=attention, **options):
    try:
        function(*args, **options)
    except (ValueError, TypeError, MemoryError) as error:
        return str(error)
    raise AssertionError("expected an error")


def kinds():
    """{name: call}: every way through the library, those that end in an error as well."""
    small, half, wide = (problem(3, 5, 8, dtype=dtype) for dtype in (np.float32, np.float16, np.float64))
    rows = problem(40, 70, 64, num_heads=4, num_kv_heads=2)
    long = problem(1, 5000, 64)
    nested = problem(3, 5, 8, leading=(2, 3))
    apart = nested[0].swapaxes(0, 1).copy().swapaxes(0, 1)
    options = {
        "is_causal": True, "q_offset": np.array([1, 2]), "window": (3, None), "softcap": 2.0, "dropout_p": 0.1,
        "alibi_slopes": np.ones((2, 2)), "sinks": np.ones(2), "kv_lens": [3, 4], "attn_mask": np.ones((3, 5), bool),
        "seed": 1,
    }
    both = {"return_weights": True, "return_logsumexp": True}
    out = np.empty((2, 2, 3, 8), np.float32)
    beyond = np.broadcast_to(np.float32(0), (2**45, 8))
    layer = cattn.MultiHeadAttention(16, 4, dropout=0.1, seed=0)
    encoding = cattn.PositionalEncoding(16)
    x = normal(2, 5, 16)
    return {
        "plain": lambda: attention(*small),
        "out": lambda: attention(*small, out=out).copy(),
        "16 bits": lambda: attention(*half),
        "64 bits": lambda: attention(*wide),
        "every option": lambda: attention(*small, **options, **both),
        "rows on two threads": lambda: attention(*rows, num_threads=2),
        "split keys on two threads": lambda: attention(*long, num_threads=2),
        "leading axes that do not merge": lambda: attention(apart, *nested[1:]),
        "lists": lambda: attention(*(x.tolist() for x in small)),
        "error in the first check": lambda: refused(small[0].astype(int), *small[1:]),
        "error in the last check": lambda: refused(*small, **options, out=out[:1]),
        "no memory for out": lambda: refused(beyond, small[1][0, 0], small[2][0, 0]),
        "layer": lambda: layer(x, is_causal=True, training=True, seed=3, return_weights=True),
        "encoding": lambda: encoding(x),
        "table": lambda: cattn.sinusoidal_encoding(70, 16),
        "table of 16 bits": lambda: cattn.sinusoidal_encoding(70, 16, dtype=np.float16, layout="concatenated"),
        "shift": lambda: cattn.relative_shift(3, 8),
    }


def no_block_left(calls):
    """malloc's smallest block takes 32 bytes: a leak of one byte a call would be four times the bound. In each half of
    the calls: Python's own tables grow once in a while."""
    for name, call in kinds().items():
        for _ in range(100):
            call()
        states = [in_use()]
        for _ in range(2):
            for _ in itertools.repeat(None, calls):
                call()
            states.append(in_use())
        first, last = ([b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(states))
        print(name, first, last, flush=True)
        assert min(first[0], last[0]) < 8 * calls and min(first[1], last[1]) < calls // 4, name


def no_page_more(small_calls, large_calls, bound):
    """In resident memory, whoever holds it: in bytes, for each of the two."""
    small, large = problem(3, 5, 8), problem(256, 256, 64, num_heads=8)
    for call, count in ((lambda: attention(*small), small_calls),
                        (lambda: attention(*large, return_weights=True, return_logsumexp=True), large_calls)):
        for _ in range(count // 10):
            call()
        before = resident()
        for _ in itertools.repeat(None, count):
            call()
        print(count, "calls:", resident() - before, flush=True)
        assert resident() - before < bound


def out_of_memory(repeats):
    """The address space ends at each allocation of a call in turn; the next call, with memory, is right."""
    rows, head_dim = 2**24, 2**16  # results of 64 MiB each: never from what malloc has kept
    query = np.broadcast_to(np.float32(0), (rows, head_dim))
    key = query[:1]

    def attend():
        attention(query, key, key[:, :1], return_weights=True, return_logsumexp=True, num_threads=1)

    def attend_wide():
        x = np.broadcast_to(0.0, (9, 4 * head_dim))
        attention(x, x, x[:, :1], num_threads=1)

    def table():
        cattn.set_num_threads(64)  # with 2.1 MiB of scratch each
        try:
            cattn.sinusoidal_encoding(2**14, rows // 2**14)
        finally:
            cattn.set_num_threads(None)

    small = problem()
    expected = attention(*small)
    attend_wide()  # loads its module
    for call, room, what in [
        (attend, 32, f"shape ({rows}, 1)"),  # out
        (attend, 96, f"shape ({rows}, 1)"),  # weights
        (attend, 160, f"shape ({rows},)"),  # logsumexp
        (attend, 200, "attention: no memory for 1 x "),
        (attend_wide, 32, "attention: no memory for 1 x "),
        (table, 32, f"shape ({2**14}, {rows // 2**14})"),
        (table, 96, "sinusoidal_encoding: no memory for 64 x "),
    ]:
        grown = None
        for number in range(repeats + 10):
            if number == 10:
                grown = in_use()[0]
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + room * MIB, resource.RLIM_INFINITY))
            message = refused(function=call)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert what in message, message
            assert_same_bits(attention(*small), expected)
        grown = in_use()[0] - grown
        print(message, grown, flush=True)
        assert grown < 8 * repeats


def too_few_threads():
    """No room for the stacks of the threads asked for: those that can be started do it."""
    arrays = problem(512, 512, 64, leading=(1,), num_heads=8)
    expected = attention(*arrays, num_threads=1), cattn.sinusoidal_encoding(5000, 64)
    for number, room in enumerate((6, 20, 40, 200)):
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + room * MIB, resource.RLIM_INFINITY))
        cattn.set_num_threads(4 + number)
        results = attention(*arrays), cattn.sinusoidal_encoding(5000, 64)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert_same_bits(results, expected)
        with open("/proc/self/status") as file:
            print(room, *(line for line in file if line.startswith("Threads")), flush=True)


def eight_threads(seconds):
    """Eight Python threads call at once: right bits all the time, and no growth: in one of three parts after the first,
    since each thread's pool of OpenMP threads grows now and then to a size that it had not had."""
    calls = [call for name, call in kinds().items() if "error" not in name and "no memory" not in name]
    expected = [call() for call in calls]
    barrier = threading.Barrier(9)
    counts, failures = [0] * 8, []

    def work(number):
        def rounds(until):
            while time.monotonic() < until and not failures:
                for i in range(len(calls)):
                    i = (i + 2 * number) % len(calls)
                    assert_same_bits(calls[i](), expected[i])
                    counts[number] += 1

        try:
            for _ in range(4):
                barrier.wait()
                rounds(time.monotonic() + seconds / 4)
                barrier.wait()
        except BaseException as error:
            failures.append(error)
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    states = []
    try:
        for _ in range(4):
            barrier.wait()
            barrier.wait()
            states.append((sum(counts), *in_use(), resident()))
    except threading.BrokenBarrierError:
        raise failures[0] from None
    parts = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(states)]
    print("calls and growth:", parts, flush=True)
    for thread in threads:
        thread.join()
    done = min(part[0] for part in parts)
    assert done >= len(calls)
    used, blocks, pages = (min(part[i] for part in parts) for i in (1, 2, 3))
    assert used < 8 * done and blocks < done // 4 and pages < 64 * done + 2 * MIB


def scratch_stays_small():
    """Calls over many keys and wide heads, in little more than the room of their results: scratch goes with the tile,
    not with keys, nor with heads that share them."""
    def zeros(*shape):
        return np.broadcast_to(np.float32(0), shape)

    attention(*problem(64, 64, 64, num_heads=8), num_threads=2)  # starts the threads
    for name, room, call in [
        ("128 heads of 576", 4, lambda: attention(zeros(1, 128, 1, 576), *(zeros(1, 1, 2**17, d) for d in (576, 512)),
                                                  num_threads=2)),
        ("more keys", 4, lambda: attention(zeros(1, 64, 1, 64), *[zeros(1, 1, 2**22, 64)] * 2, num_threads=2)),
        ("wide heads", 4, lambda: attention(*[zeros(1, 1, 400, 1024)] * 3, is_causal=True, num_threads=2)),
        ("few of many keys", 2, lambda: attention(zeros(2, 1, 1, 64), *[zeros(2, 1, 2**31, 64)] * 2, num_threads=2,
                                                  kv_lens=np.array([5, 3]))),
        ("few of many keys, many rows", 2, lambda: attention(zeros(2, 1, 40, 64), *[zeros(2, 1, 2**31, 64)] * 2,
                                                             num_threads=2, kv_lens=np.array([5, 3]))),
    ]:
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + room * MIB, resource.RLIM_INFINITY))
        result = call()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(name, result.shape, flush=True)
        assert not result.any()
