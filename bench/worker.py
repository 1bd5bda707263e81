"""The process of one implementation at one number of threads: `python -m bench.worker PEER THREADS`.

It answers JSON requests, one a line, and sleeps on the pipe in between. Two pools of threads that spin on the
same cores slow each other down several times over: so no two implementations share a process, and none
answers before its own threads rest.
"""

import json
import math
import os
import statistics
import sys
import time
from functools import cached_property

import numpy as np

from .peers import PEERS, Unsupported
from .workloads import WORKLOADS

SLICE = 1 << 20  # elements compared at a time
PROBES = 4  # before and after each row
CLOCK = 20e-6  # seconds; shorter calls are timed in groups that take at least this long


def max_error(result, expected):
    """Largest absolute difference, NaN where either has one."""
    if result.shape != expected.shape:
        raise ValueError(f"result: expected shape {expected.shape}, got {result.shape}")
    result, expected = result.reshape(-1), expected.reshape(-1)
    starts = range(0, expected.size, SLICE)
    return float(np.max([np.abs(result[i : i + SLICE] - expected[i : i + SLICE]).max() for i in starts]))


def time_calls(run, seconds):
    """Seconds for each call, best and median, and how many calls. One to warm up is not counted, unless it takes all
    the time.

    Where run has a method `prepare`, that comes before each group, not timed, and is good for run.most calls."""
    prepare, most = getattr(run, "prepare", None), getattr(run, "most", math.inf)
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    if first > seconds:
        return {"best": first, "median": first, "calls": 1}
    times, calls, group = [], 0, 1
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        if prepare:
            prepare()
        start = time.perf_counter()
        for _ in range(group):
            run()
        elapsed = time.perf_counter() - start
        if elapsed < CLOCK and 2 * group <= most:
            group *= 2
        else:
            times.append(elapsed / group)
            calls += group
    return {"best": min(times), "median": statistics.median(times), "calls": calls}


def rest():
    """Wait until the threads of this process use no more time, one second at most."""
    for _ in range(100):
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.001:
            return


class Worker:
    """What can be asked of the process, one method each."""

    def __init__(self, peer, num_threads):
        self.peer = PEERS[peer](num_threads)
        self.num_threads = num_threads
        self.run = None
        self.array = None

    def version(self):
        return self.peer.version

    def load(self, name, expected):
        """Prepare the workload and run it once; the largest error against the array in file `expected`."""
        self.run = None  # drops the arrays of the workload before
        work = next(work for work in WORKLOADS if work.name == name)
        prepare = getattr(self.peer, work.kind, None)
        if prepare is None:
            raise Unsupported(f"no {work.kind}")
        self.run, to_array = prepare(work, work.arrays())
        return max_error(to_array(self.run()), np.load(expected, mmap_mode="r"))

    def measure(self, seconds):
        return time_calls(self.run, seconds)

    @cached_property
    def machine(self):
        from cattn import _speed  # only here: the processes of the other peers stay free of cattn

        return _speed.Machine(self.num_threads)

    def probe(self):
        """What the machine gives `now`, and the `best` of FMAs and NOPs of all probes so far."""
        now = self.machine.seen(self.machine.probe(PROBES))
        return {"now": now, "best": {"fma": self.machine.fma, "nop": self.machine.nop}}

    def read(self, nbytes):
        """Bytes a second, of an array of that size: it lies in the same cache as what a workload reads, or in none."""
        if self.array is None or self.array.nbytes < nbytes:
            self.array = np.ones(nbytes // 4, np.float32)
        return self.machine.read(self.array[: nbytes // 4])


def serve(make):
    """What make(NAME, THREADS) of the command line returns has a method for each request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    worker = make(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request["method"])(*request["arguments"])}
        except Unsupported as error:
            answer = {"unsupported": str(error)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        rest()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Worker)
