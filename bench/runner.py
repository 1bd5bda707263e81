"""Runs workloads: a process for each implementation and number of threads, checked, then timed in turns.

Around the turns cattn's process probes the machine: FMAs in registers and NOPs, on as many threads. Where they get less
CPU time than they ask for, or are slower than the run's best, somebody else is using the machine.
"""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

import cattn
from cattn import _threads
from cattn._speed import QUIET, how_quiet

from . import report
from .peers import PEERS, Numpy
from .worker import max_error, rest

ROOT = Path(__file__).parent.parent
ROUNDS = 3  # turns at each workload: what disturbs the machine for a while then disturbs every implementation
THREAD_VARIABLES = (
    "CATTN_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
REPEATS = 2  # of the turns, while the machine is busy
LEAST_READ = 1 << 28  # bytes, to measure memory by
LIMITS = 5  # measurements of a limit, at the start and where it has turned out too low
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "int8": 2.0**-23}


class PeerError(Exception):
    """An implementation failed."""


def command(module, *arguments, num_threads, **variables):
    """Arguments to start `python -m module` with the size of every thread pool that may be in it set, and these
    variables."""
    return {
        "args": [sys.executable, "-m", module, *map(str, arguments)],
        "cwd": ROOT,
        "env": os.environ | dict.fromkeys(THREAD_VARIABLES, str(num_threads)) | variables,
        "text": True,
    }


class Process:
    """A worker, asked through pipes."""

    def __init__(self, peer, num_threads, module="bench.worker", **variables):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # In a session of its own: Ctrl-C goes to this process alone, which then ends that one.
        self.process = subprocess.Popen(
            **command(module, peer, num_threads, num_threads=num_threads, **variables),
            **pipes,
            start_new_session=True,
        )

    def ask(self, method, *arguments):
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps({"method": method, "arguments": arguments}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise PeerError(f"its process ended with status {self.process.wait()}")
        answer = json.loads(answer)
        if "failed" in answer:
            raise PeerError(answer["failed"])
        return answer

    def close(self):
        self.process.kill()  # it may be in the middle of a call
        self.process.communicate()


def installed(peer):
    return all(importlib.util.find_spec(module) for module in PEERS[peer].modules)


def float64_answer(work):
    """(answer in float64, error that is still right).

    cattn promises twice the error of NumPy and 4 ulps of the largest value; ten times and 4 ulps pass here,
    for everybody. A wrong mask or a lost key is far beyond that. The report shows how accurate each one is.
    """
    arrays = work.arrays()
    expected = work.expected(arrays)
    run, to_array = getattr(Numpy(), work.kind)(work, arrays)
    largest = float(np.abs(arrays.get("value", expected)).max() * np.max(arrays.get("value_scales", 1)))
    rounding = 4 * min(EPSILON[work.dtype], EPSILON["float32"]) * largest  # 16 bits: computed in float32,
    rounding += EPSILON[work.dtype] * float(np.abs(expected).max())  # rounded at the end
    return expected, 10 * max_error(to_array(run()), expected) + rounding


def check(work, processes, expected, tolerance):
    """{peer: result} of a workload, loaded and called once."""
    results = {}
    for peer, process in processes.items():
        try:
            answer = process.ask("load", work.name, str(expected))
            if "unsupported" in answer:
                results[peer] = answer
                continue
            error = answer["result"]
            results[peer] = {"error": error if np.isfinite(error) else None, "correct": error <= tolerance}
        except PeerError as failure:
            results[peer] = {"failed": str(failure)}
    return results


def take_turns(results, processes, seconds):
    """{peer: its times} of those whose results are right; the others are not timed."""
    samples = {peer: [] for peer, result in results.items() if result.get("correct")}
    for _ in range(ROUNDS):
        for peer in list(samples):
            try:
                samples[peer].append(processes[peer].ask("measure", seconds / ROUNDS)["result"])
            except PeerError as failure:
                results[peer] = {"failed": str(failure)}
                del samples[peer]
    return {
        peer: {
            "best": min(sample["best"] for sample in rounds),
            "median": statistics.median(sample["median"] for sample in rounds),
            "calls": sum(sample["calls"] for sample in rounds),
        }
        for peer, rounds in samples.items()
    }


def measure(work, num_threads, processes, expected, tolerance, seconds, limits, about):
    """The row of a workload at one number of threads. `limits` (IN, OUT) grow with what the probes see."""
    results = check(work, processes, expected, tolerance)
    machine = processes["cattn"]
    attempts = []
    while not attempts or (how_quiet(attempts[-1]["seen"], limits)["busy"] and len(attempts) <= REPEATS):
        if attempts:
            about(f"{work.name} again, since the machine was busy")
        before = probe(machine, limits)
        attempt = {"times": take_turns(results, processes, seconds)}
        if work.limit == "read":
            limits["read"] = max(limits["read"], machine.ask("read", beyond_caches())["result"])
            attempt["bandwidth"] = machine.ask("read", work.nbytes)["result"]
        after = probe(machine, limits)
        attempts.append(attempt | {"seen": {name: min(before[name], after[name]) for name in QUIET}})
    row = describe(work) | {"threads": num_threads, "tolerance": tolerance, "results": results}
    row |= max(attempts, key=lambda attempt: how_quiet(attempt["seen"], limits)["quiet"])
    for peer, times in row.pop("times").items():
        if results[peer].get("correct"):  # else it has failed in a later attempt
            results[peer] |= times
    row |= {"attempts": len(attempts), "notes": []}
    measure_limit_again(row, machine, limits)
    return row


def probe(process, limits):
    """What the machine gives now."""
    answer = process.ask("probe")["result"]
    limits.update({name: max(limits[name], rate) for name, rate in answer["best"].items()})
    return answer["now"]


def measure_limit_again(row, process, limits):
    """Where cattn was faster than the limit, the limit was measured wrongly: on a busy machine, say. Nothing is
    clipped."""

    def percent():
        return report.percent(row, row["results"]["cattn"], {str(row["threads"]): limits}) or 0

    before = percent()
    for _ in range(LIMITS):
        if percent() <= 100:
            break
        if row["limit"] == "read":
            row["bandwidth"] = max(row["bandwidth"], process.ask("read", row["nbytes"])["result"])
        else:
            probe(process, limits)
    if before > 100:
        note = f"{report.LIMITS[row['limit']]} measured again: {percent():.0f} % of it instead of {before:.0f} %"
        row["notes"].append(note if percent() <= 100 else f"{note}, and still less than the call's rate")


def ask_versions(processes, say):
    """Of {peer: process}, whose peers that cannot start are taken out."""
    for peer, process in list(processes.items()):
        try:
            process.version = process.ask("version")["result"]
        except PeerError as failure:
            if peer == "cattn":
                raise
            say(f"skipped: {peer} ({failure})")
            del processes[peer]


def run(works, peers, thread_counts, seconds, about, say):
    """Yields all that the reports need, as JSON has it: one dictionary, first without rows, then after each workload.
    `about` is told what comes next, `say` what is left out."""
    groups = {}
    try:
        limits = {}
        for n in thread_counts:
            about(f"starting {', '.join(peers)} on {report.threads(n)}")
            groups[n] = {peer: Process(peer, n) for peer in peers}
            ask_versions(groups[n], say)
            limits[str(n)] = {"fma": 0.0, "nop": 0.0, "read": groups[n]["cattn"].ask("read", beyond_caches())["result"]}
            for _ in range(LIMITS):
                probe(groups[n]["cattn"], limits[str(n)])
        versions = {peer: process.version for peer, process in groups[thread_counts[0]].items()}
        data = {
            "machine": {"cpu": cpu_model(), "isa": cattn.isa, "system": f"{platform.system()} {platform.machine()}",
                        "read_nbytes": beyond_caches()},
            "versions": {"python": platform.python_version()} | versions,
            "limits": limits,
            "rows": [],
            "probes": {},
        }
        yield data
        with tempfile.TemporaryDirectory() as scratch:
            answer_file = Path(scratch) / "expected.npy"
            for work in works:
                about(work.name)
                expected, tolerance = float64_answer(work)
                np.save(answer_file, expected)
                rest()
                data["rows"] += [
                    measure(work, n, processes, answer_file, tolerance, seconds, limits[str(n)], about)
                    for n, processes in groups.items()
                ]
                for row in data["rows"]:  # the limits may have grown
                    row |= how_quiet(row["seen"], limits[str(row["threads"])])
                yield data
    finally:
        for processes in groups.values():
            for process in processes.values():
                process.close()


def describe(work):
    """The workload's part of a row."""
    names = "reason", "kind", "shape", "dtype", "limit", "flops", "nbytes"
    return {"workload": work.name} | {name: getattr(work, name) for name in names}


@cache
def beyond_caches(caches="/sys/devices/system/cpu/cpu0/cache", memory="/proc/meminfo"):
    """Bytes to measure memory by: four times the last cache, as far as Linux tells it; a process for each number of
    threads reads so many, so no more than an eighth of the memory."""
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in Path(caches).glob("index*/size")]
    found = [line.split()[1] for line in _threads._read(memory).splitlines() if line.startswith("MemTotal:")]
    most = (int(found[0]) << 10) // 8 if found else LEAST_READ
    return max(LEAST_READ, min(4 * max(sizes, default=0), most)) // 4096 * 4096


def cpu_model():
    """The CPU's name as the system gives it, and on x86 its family and model: virtual machines hide the rest."""
    found = {}
    for line in _threads._read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    if "cpu family" not in found:
        return found["model name"]
    return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
