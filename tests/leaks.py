"""What calls leave behind in memory, for test_memory.py, which runs this in processes of its own."""

import ctypes
import gc
import itertools
import os
import resource
import sys
import threading
import time

import numpy as np
from problems import assert_same_bits, normal, problem

import cattn
from cattn import _kernels

MIB = 2**20
attention, backward = cattn.scaled_dot_product_attention, cattn.scaled_dot_product_attention_backward


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


def threads_alive():
    """The caller and those that have come since the import, which started the threads of NumPy's BLAS."""
    return len(os.listdir("/proc/self/task")) - STARTED_BEFORE


STARTED_BEFORE = 0
STARTED_BEFORE = threads_alive() - 1


class Room:
    """Only so many bytes more of address space than are in use now."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + self.size, resource.RLIM_INFINITY))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class RoomForThreads:
    """Only so many threads more than the user has now. Root has no such limit: it becomes another user, for good."""

    def __init__(self, more):
        self.more, self.limits = more, resource.getrlimit(resource.RLIMIT_NPROC)

    def __enter__(self):
        if os.getuid() == 0:
            os.setuid(54321)  # nobody's, most likely
        used = 0
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    used += len(os.listdir(f"/proc/{name}/task"))
            except OSError:  # it has ended, or is not to be looked into
                continue
        resource.setrlimit(resource.RLIMIT_NPROC, (used + self.more, self.limits[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_NPROC, self.limits)


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
    result, logsumexp = attention(*small, **options, return_logsumexp=True)
    given = result, *small, result, logsumexp
    packed = [x[0].swapaxes(0, 1) for x in given]
    layer = cattn.MultiHeadAttention(16, 4, dropout=0.1, seed=0)
    encoding = cattn.PositionalEncoding(16)
    x = normal(2, 5, 16)
    cos_sin = cattn.rotary_table(3, 8)
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
        "gradients": lambda: backward(*given, **options)[:3],
        "gradients of everything": lambda: backward(*given, **options | {"attn_mask": np.ones((3, 5), half[0].dtype)},
                                                    grad_logsumexp=logsumexp, wanted=cattn.Gradients._fields),
        "gradients of packed sequences": lambda: cattn.varlen_attention_backward(*packed, [0, 1, 3], [0, 3, 5])[:3],
        "error in the gradients' last check": lambda: refused(*given[:-1], logsumexp[:1], function=backward),
        "layer": lambda: layer(x, is_causal=True, training=True, seed=3, return_weights=True),
        "encoding": lambda: encoding(x),
        "merge": lambda: cattn.merge_states([small[0]] * 3, [small[0][..., 0]] * 3, sinks=0.5, num_threads=2),
        "table": lambda: cattn.sinusoidal_encoding(70, 16),
        "table of 16 bits": lambda: cattn.sinusoidal_encoding(70, 16, dtype=np.float16, layout="concatenated"),
        "shift": lambda: cattn.relative_shift(3, 8),
        "rotary table": lambda: cattn.rotary_table(70, 16, frequencies=[0.5] * 8),
        "rotary": lambda: cattn.rotary_embedding(small[0], *cos_sin, [[[0], [1]]] * 2, interleaved=True),
        "rotary in five axes": lambda: cattn.rotary_embedding(apart, *cos_sin, interleaved=False),
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


def no_page_more_each_call():
    """What the system hands out anew, page by page, while the same call is made again and again."""
    inputs, layer, tokens = problem(128, 128, 64), cattn.MultiHeadAttention(128, 2), normal(2, 32, 128)
    small, logsumexp = [x[..., :1] for x in inputs], inputs[0][..., 0]
    out, calls = np.empty_like(inputs[0]), 100
    for name, call in (("attention", lambda: attention(*inputs, out=out, num_threads=2)),
                       ("gradients", lambda: backward(small[0], *small, small[0], logsumexp, num_threads=2)),
                       ("layer", lambda: layer(tokens, num_threads=2)),
                       ("table", lambda: cattn.sinusoidal_encoding(16, 512))):
        for _ in range(50):
            call()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(calls):
            call()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(name, faults, "pages in", calls, "calls", flush=True)
        assert faults < calls, name


def out_of_memory(repeats):
    """The address space ends at each allocation of a call in turn; the next call, with memory, is right."""
    # Results of 64 MiB each: never from what malloc has kept. Scratch beyond the 8 MiB left, with narrow vectors too.
    rows, head_dim = 2**24, 2**18
    query = np.broadcast_to(np.float32(0), (rows, head_dim))
    key = query[:1]

    def attend():
        attention(query, key, key[:, :1], return_weights=True, return_logsumexp=True, num_threads=1)

    def attend_wide():
        x = np.broadcast_to(0.0, (9, head_dim))
        attention(x, x, x[:, :1], num_threads=1)

    def differentiate():
        x = np.broadcast_to(np.float32(0), (9, head_dim))
        backward(x, x, x, x, x, x[:, 0], num_threads=1)

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
        (differentiate, 8, f"shape (9, {head_dim})"),  # the query's gradient
        (differentiate, 60, "attention: no memory for 1 x "),
        (table, 32, f"shape ({2**14}, {rows // 2**14})"),
        (table, 96, "sinusoidal_encoding: no memory for 64 x "),
    ]:
        grown = None
        for number in range(repeats + 10):
            if number == 10:
                grown = in_use()[0]
            with Room(room * MIB):
                message = refused(function=call)
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
        with Room(room * MIB):
            cattn.set_num_threads(4 + number)
            results = attention(*arrays), cattn.sinusoidal_encoding(5000, 64)
        assert_same_bits(results, expected)
        print(room, threads_alive(), flush=True)


# What makes the pool of a thread smaller, having been 12: then 10 more stacks are needed, of which the C library keeps
# some 5. Each is a call of one of the modules, and what asks for 12 threads next.


def pool_kinds():
    arrays = problem(512, 512, 64, leading=(1,), num_heads=8)
    wide = [x.astype(np.float64) for x in arrays]
    query, key, value = problem(300, 1600, 16, leading=(1,))  # in 4 splits, which wait for each other
    layer = cattn.MultiHeadAttention(768, 12, seed=0)
    x = normal(100, 768)
    out = np.empty((20_000, 64), np.float32)
    return {
        "float32": lambda n: attention(*arrays, num_threads=n),
        "float64": lambda n: attention(*wide, num_threads=n),
        "gradients": lambda n: backward(query, query, key, value, query, query[..., 0], num_threads=n)[:3],
        "layer": lambda n: layer(x, num_threads=n),
        "table": lambda n: cattn.set_num_threads(n) or cattn.sinusoidal_encoding(20_000, 64, out=out).copy(),
        "fma": lambda n: np.array(_kernels.fma_flops(10, n)) / n,
        "read": lambda n: np.array(_kernels.read_bytes(np.ones(12_000, np.float32), n)),
    }


def one_pool(large, small):
    """No room to start threads in: those there are do it, whichever module has used them."""
    kinds = pool_kinds()
    expected = kinds[large](1)
    with Room(1000 * MIB):
        assert_same_bits(kinds[large](12), expected)
        assert threads_alive() == 12
        kinds[small](2)
        while threads_alive() > 2:  # they end on their own
            time.sleep(0.001)
    with Room(6 * MIB):
        result = kinds[large](12)
    print(large, small, threads_alive(), flush=True)
    assert_same_bits(result, expected)


def one_pool_in_a_child():
    """A fork dissolves it."""
    kinds = pool_kinds()
    expected = kinds["float32"](12)
    pid = os.fork()
    if pid == 0:
        with Room(6 * MIB):
            os._exit(0 if np.array_equal(kinds["float32"](12), expected) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    while threads_alive() > 1:
        time.sleep(0.001)
    with Room(6 * MIB):
        result = kinds["float32"](12)
    assert_same_bits(result, expected)


def openmp_library():
    with open("/proc/self/maps") as file:
        return ctypes.CDLL(next(line.split()[-1] for line in file if "libgomp" in line or "libomp" in line))


def in_a_region_of_one_thread():
    """What a region inside another one starts is of no pool, and ends with it."""
    kinds = pool_kinds()
    expected, inside = kinds["float32"](1), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        inside.append(kinds["float32"](12))

    openmp_library().GOMP_parallel(region, None, 1, 0)
    assert_same_bits(inside[0], expected)
    while threads_alive() > 1:
        time.sleep(0.001)
    with Room(6 * MIB):
        result = kinds["float32"](12)
    assert_same_bits(result, expected)


def fewer_than_asked():
    """OpenMP gives a region fewer threads than it was asked for, as long as it is told to adjust their number."""
    openmp = openmp_library()
    kinds = pool_kinds()
    expected, gradients = kinds["float32"](1), kinds["gradients"](1)
    openmp.omp_set_dynamic(1)
    assert_same_bits(kinds["float32"](200), expected)
    assert_same_bits(kinds["gradients"](200), gradients)
    assert threads_alive() < 200
    openmp.omp_set_dynamic(0)
    with Room(60 * MIB):  # scratch for 200 takes 35
        result = kinds["float32"](200)
    assert_same_bits(result, expected)


def large_stacks(size):
    """The environment asks for stacks of so many bytes."""
    kinds = pool_kinds()
    expected = kinds["float32"](1)
    for stacks in (0, 2):
        with Room(size * stacks + size // 2):
            assert_same_bits(kinds["float32"](8), expected)
            assert threads_alive() == 1 + stacks


def first_calls_at_once(rounds, limit):
    """Eight Python threads want eight threads each, in the room for a few. limit: "memory" or "threads"."""
    kinds = [kind for name, kind in pool_kinds().items() if name in ("float32", "float64", "layer")]
    expected = [kind(1) for kind in kinds]
    assert_same_bits(kinds[1](1), expected[1])  # another user may not read the modules that this loads
    failures = []

    def work(number):
        try:
            barrier.wait()
            for i in range(3):
                assert_same_bits(kinds[(number + i) % 3](8), expected[(number + i) % 3])
        except BaseException as error:
            failures.append(error)
            raise

    for number in range(rounds):
        barrier = threading.Barrier(9)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        with Room((4 + number) * 9 * MIB) if limit == "memory" else RoomForThreads(4 + number):
            barrier.wait()
            for thread in threads:
                thread.join()
        assert not failures
        while threads_alive() > 1:
            time.sleep(0.001)


def last_blocks():
    """malloc has given out all that there was, then some KB are free, and some more: MemoryError, or the right bits.
    Each call has another number of threads than the one before, for which OpenMP allocates."""
    libc = ctypes.CDLL(None)
    malloc, free = libc.malloc, libc.free
    malloc.argtypes, malloc.restype, free.argtypes, free.restype = [ctypes.c_size_t], ctypes.c_size_t, [
        ctypes.c_size_t], None
    out = np.empty((400, 64), np.float32)
    arrays = problem(200, 64, 64)
    expected, result = attention(*arrays), np.empty_like(arrays[0])
    layer = cattn.MultiHeadAttention(256, 4, seed=0)
    x = normal(20, 256)
    kinds = {
        "attention": lambda n: attention(*arrays, num_threads=n, out=result),
        "layer": lambda n: layer(x, num_threads=n),
        "table": lambda n: cattn.set_num_threads(n) or cattn.sinusoidal_encoding(400, 64, out=out),
        "fma": lambda n: _kernels.fma_flops(10, n),
    }
    blocks = [0] * 200_000
    done = refusals = 0
    for name, kind in kinds.items():
        for n in (1, 2, 3):
            kind(n)
        with Room(0):
            count = 0
            for size in (65536, 4096, 1024):
                block = malloc(size)
                while block:
                    blocks[count] = block
                    count += 1
                    block = malloc(size)
            for _ in range(400):
                for n in (2, 1, 3):
                    try:
                        kind(n)
                        done += 1
                    except MemoryError:
                        refusals += 1
                count -= 1
                free(blocks[count])
            for i in range(count):
                free(blocks[i])
        assert_same_bits(result, expected)
        print(name, done, refusals, flush=True)


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
        ("gradients, of 12 MiB, twice", 28, lambda: np.stack(backward(
            *[zeros(1, 1, 2**14, 64)] * 5, zeros(1, 1, 2**14), is_causal=True, num_threads=2)[:3])),
    ]:
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + room * MIB, resource.RLIM_INFINITY))
        result = call()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(name, result.shape, flush=True)
        assert not result.any()
