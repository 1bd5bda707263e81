"""What cattn is worth on this machine: ten typical calls against plain NumPy, and against what the machine can do at
most. `python -m cattn speed` runs it.

NumPy works in a process of its own (_plain.py), in turns with this one: two pools of threads that spin on the same CPUs
slow each other down several times over. Around each row the machine is probed: FMAs in registers, on as many threads as
cattn uses. Where they get less CPU time than they ask for, or are slower than they have been, somebody else is using
the machine, and the row says so.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

import numpy as np

import cattn
from cattn import _kernels, _plain

TURNS = 2  # of cattn and NumPy at each row: what disturbs the machine for a while then disturbs both
PROBE = 2e-3  # seconds: long against the 50 to 200 us in which a thread wakes up; a row pays for eight
PROBES = 4
REPEATS = 5  # of a limit that has turned out too low
# Of the CPU time that was asked for, and of the FMA peak. An undisturbed thread got 98 % and more of both; of several,
# waking up takes some percent of a probe.
QUIET = 0.88


class PeerError(Exception):
    """NumPy's process has ended."""


class Plain:
    """NumPy's process, asked through pipes."""

    def __init__(self):
        # With the path of this process, whatever it has been told; cattn itself is not imported there.
        code = (f"import runpy, sys; sys.path[:] = {sys.path!r}\n"
                f"runpy.run_path({_plain.__file__!r}, run_name='__main__')")
        # In a session of its own: Ctrl-C goes to this process alone, which then ends that one.
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, start_new_session=True)

    def send(self, *request):
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def receive(self):
        answer = self.process.stdout.readline()
        if not answer:
            raise PeerError(f"the process that runs NumPy ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self):
        self.process.kill()  # it may be in the middle of a call
        self.process.communicate()


class Machine:
    """The limits of the machine, as far as they have been measured, and who else uses it."""

    def __init__(self, num_threads):
        self.num_threads = num_threads
        self.cpus = min(num_threads, _kernels.cpus)  # on which they run
        self.fma = 0.0  # operations a second, the most of all probes
        self.iterations = 1000
        # The shortest of some: a thread that waits for a CPU makes any probe long.
        while min(seconds for _, seconds, _ in self.probe()) < PROBE:
            self.iterations *= 2

    def _fma(self):
        """(operations a second, seconds, seconds of CPU time) of a probe."""
        start, used = time.perf_counter(), time.process_time()
        done = _kernels.f32.fma_flops(self.iterations, self.num_threads)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        self.fma = max(self.fma, done / seconds)
        return done / seconds, seconds, used

    def probe(self, repeats=PROBES):
        """[(operations a second, seconds, seconds of CPU time), ...]"""
        return [self._fma() for _ in range(repeats)]

    def quiet(self, probes):
        """The part of the machine that was there for these probes: of the CPU time that they asked for, or of the FMA
        peak, whichever is less."""
        time_share = sum(used for _, _, used in probes) / self.cpus / sum(seconds for _, seconds, _ in probes)
        return min(time_share, statistics.median(rate for rate, _, _ in probes) / self.fma)

    def read(self, array, seconds=0.03):
        """Bytes a second, the most of a few: of an array that is as large as what the work reads, so that it lies in
        the same cache or in none."""
        rates, deadline = [], time.perf_counter() + seconds
        while len(rates) < 3 or time.perf_counter() < deadline:
            start = time.perf_counter()
            done = _kernels.f32.read_bytes(array, self.num_threads)
            rates.append(done / (time.perf_counter() - start))
        return max(rates)


def prepared(work):
    """What is timed: a function without arguments."""
    arrays = work.arrays()
    if work.kind == "attention":
        options = {"is_causal": True} if work.is_causal else {}
        return partial(cattn.scaled_dot_product_attention, *arrays, **options)
    if work.kind == "layer":
        x, *parameters = arrays
        layer = cattn.MultiHeadAttention(work.shape[-1], work.num_heads, seed=0)
        names = "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias"
        for name, parameter in zip(names, parameters, strict=True):
            setattr(layer, name, parameter)
        return partial(layer, x)
    return partial(cattn.sinusoidal_encoding, *work.shape)


def run(seconds, about=lambda work: None):
    """Yields a row, a dictionary, for each of _plain.WORKS; `about` is called with what comes next."""
    start = time.perf_counter()
    plain = Plain()
    try:
        machine = Machine(cattn.get_num_threads())
        machine.probe(10 * PROBES)
        for number, work in enumerate(_plain.WORKS):
            about(work)
            now = time.perf_counter()
            left = start + seconds - now
            yield measured(work, plain, machine, now + left / (len(_plain.WORKS) - number))
    finally:
        plain.close()


def measured(work, plain, machine, deadline):
    """The row of a work, to be ready by the deadline where one call of each and TURNS allow it."""
    plain.send("load", dataclasses.asdict(work))
    call = prepared(work)
    plain.receive()
    call()
    reads = np.ones(work.nbytes // 4, np.float32) if work.limit == "read" else None
    probes = machine.probe()
    bandwidth = 0.0 if reads is None else machine.read(reads)
    probing = sum(seconds for _, seconds, _ in probes)
    share = max(deadline - time.perf_counter() - probing, 0) / (2 * TURNS)
    times = {"cattn": [], "numpy": []}
    for turn in range(TURNS):
        if turn and time.perf_counter() > deadline:  # a slow machine: one call took longer than its share
            break
        _plain.rest()
        times["cattn"] += _plain.time_calls(call, share)
        _plain.rest()
        plain.send("measure", share)
        times["numpy"] += plain.receive()
    probes += machine.probe()

    row = {name: getattr(work, name) for name in ("name", "kind", "dtype", "is_causal")} | {"shape": list(work.shape)}
    row |= {name: _plain.summary(samples) for name, samples in times.items()}
    row["ratio"] = row["numpy"]["median"] / row["cattn"]["median"]
    row["notes"] = []
    if work.limit:
        row["unit"] = "FLOP/s" if work.limit == "fma" else "B/s"
        row["rate"] = (work.flops if work.limit == "fma" else work.nbytes) / row["cattn"]["best"]
        if reads is not None:
            bandwidth = max(bandwidth, machine.read(reads))
        row["limit"] = machine.fma if reads is None else bandwidth
        if row["rate"] > row["limit"]:
            measure_again(row, machine, reads)
        row["share"] = row["rate"] / row["limit"]
    row["quiet"] = machine.quiet(probes)
    row["busy"] = row["quiet"] < QUIET
    return row


def measure_again(row, machine, reads):
    """A call was faster than the limit allows, so the limit was measured wrongly: on a busy machine, say."""
    before, what = row["limit"], "FMA peak" if reads is None else "read bandwidth"
    for _ in range(REPEATS):
        if reads is None:
            machine.probe(2 * PROBES)
            row["limit"] = machine.fma
        else:
            row["limit"] = max(row["limit"], machine.read(reads))
        if row["limit"] >= row["rate"]:
            break
    measured = f"{what} measured again: {row['limit'] / 1e9:.4g} instead of {before / 1e9:.4g} G{row['unit']}"
    row["notes"].append(measured if row["limit"] >= row["rate"] else f"{measured}, and still less than the call's rate")


def sizes(work_row):
    """The shape in few characters: query heads / key heads where they differ."""
    shape = work_row["shape"]
    if work_row["kind"] == "attention":
        batch, num_heads, num_kv_heads, *rest = shape
        shape = [batch, num_heads if num_heads == num_kv_heads else f"{num_heads}/{num_kv_heads}", *rest]
    return "x".join(map(str, shape))
