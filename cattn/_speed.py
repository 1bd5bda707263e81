"""What cattn is worth on this machine: ten typical calls against plain NumPy, and against what the machine can do at
most. `python -m cattn speed` runs it.

NumPy works in a process of its own (_plain.py), in turns with this one: two pools of threads that spin on the same CPUs
slow each other down several times over. Around each row the machine is probed: FMAs in registers and NOPs, on as many
threads as cattn uses. Where they get less CPU time than they ask for, or are slower than they have been, somebody else
is using the machine, and the row says so.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

import cattn
from cattn import _kernels, _plain

TURNS = 2  # of cattn and NumPy at each row: what disturbs the machine for a while then disturbs both
PROBE = 2e-3  # seconds: long against the 50 to 200 us in which a thread wakes up; a row pays for eight
PROBES = 4
REPEATS = 5  # of a limit that has turned out too low
NOP_ROUNDS = 100_000  # of 100: 0.5 ms where 6 run in a cycle
# What probes see of a quiet machine, at least. Of the CPU time that they asked for: undisturbed 98 % and more, of
# several threads some percent less, since they wake up. Of the most FMAs and NOPs a second: both follow the clock,
# which varies by 12 %; where another tenant runs on the same core, NOPs fall to 45 to 65 % and FMAs stay (Xeon).
QUIET = {"time": 0.88, "fma": 0.8, "nop": 0.8}


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
        self.fma = self.nop = 0.0  # operations a second, the most of all probes
        self.iterations = 1000
        self.threads = ThreadPoolExecutor(self.cpus)
        # The shortest of some: a thread that waits for a CPU makes any probe long.
        while min(probe.seconds for probe in self.probe()) < PROBE:
            self.iterations *= 2
        self.single = max(self._fma(1) for _ in range(PROBES))  # FMAs a second in one thread

    def probe(self, repeats=PROBES):
        return [self._probe() for _ in range(repeats)]

    def _fma(self, num_threads):
        start = time.perf_counter()
        done = _kernels.f32.fma_flops(self.iterations, num_threads)
        return done / (time.perf_counter() - start)

    def _probe(self):
        start, used = time.perf_counter(), time.process_time()
        fma = self._fma(self.num_threads)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        probe = Probe(fma, seconds, used, min(self.threads.map(nops, [NOP_ROUNDS] * self.cpus)))
        self.fma, self.nop = max(self.fma, probe.fma), max(self.nop, probe.nop)
        return probe

    def seen(self, probes):
        """What these probes saw: the part of the CPU time that they asked for, FMAs and NOPs a second. Some virtual
        machines count too little time for the second CPU and further ones: where as many FMAs were done as by so many
        single threads, the CPUs were there."""
        asked_for = self.cpus * sum(probe.seconds for probe in probes)
        fma = statistics.median(probe.fma for probe in probes)
        return {"time": max(sum(probe.used for probe in probes) / asked_for, fma / (self.cpus * self.single)),
                "fma": fma,
                "nop": statistics.median(probe.nop for probe in probes)}

    def read(self, array, seconds=0.03):
        """Bytes a second, the most of a few: of an array that is as large as what the work reads, so that it lies in
        the same cache or in none."""
        rates, deadline = [], time.perf_counter() + seconds
        while len(rates) < 3 or time.perf_counter() < deadline:
            start = time.perf_counter()
            done = _kernels.f32.read_bytes(array, self.num_threads)
            rates.append(done / (time.perf_counter() - start))
        return max(rates)


class Probe(typing.NamedTuple):
    fma: float      # operations a second
    seconds: float  # that the FMAs took
    used: float     # seconds of CPU time in these
    nop: float      # NOPs a second in the slowest of the threads


def nops(rounds):
    """NOPs a second, in this thread."""
    start = time.perf_counter()
    done = _kernels.cpu.nops(rounds)
    return done / (time.perf_counter() - start)


def how_quiet(seen, limits):
    """quiet: the part of the machine that was there, of what probes have seen; busy: less than of a quiet machine."""
    shares = {name: rate / limits.get(name, 1.0) for name, rate in seen.items()}
    return {"quiet": min(shares.values()), "busy": any(shares[name] < QUIET[name] for name in shares)}


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
    probing = sum(probe.seconds for probe in probes)
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
    return row | how_quiet(machine.seen(probes), {"fma": machine.fma, "nop": machine.nop})


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
