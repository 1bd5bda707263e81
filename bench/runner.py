"""Runs workloads: a process for each implementation and number of threads, checked, then timed in turns."""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

import cattn

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
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class PeerError(Exception):
    """An implementation failed."""


def command(module, *arguments, num_threads):
    """Arguments to start `python -m module` with the size of every thread pool that may be in it set."""
    return {
        "args": [sys.executable, "-m", module, *map(str, arguments)],
        "cwd": ROOT,
        "env": os.environ | dict.fromkeys(THREAD_VARIABLES, str(num_threads)),
        "text": True,
    }


class Process:
    """A worker, asked through pipes."""

    def __init__(self, peer, num_threads):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(
            **command("bench.worker", peer, num_threads, num_threads=num_threads), **pipes
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
        self.process.communicate()  # the end of its input is the end of the process


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
    largest = float(np.abs(arrays.get("value", expected)).max())
    rounding = 4 * min(EPSILON[work.dtype], EPSILON["float32"]) * largest  # 16 bits: computed in float32,
    rounding += EPSILON[work.dtype] * float(np.abs(expected).max())  # rounded at the end
    return expected, 10 * max_error(to_array(run()), expected) + rounding


def measure(work, processes, expected, tolerance, seconds):
    """{peer: result} of a workload. What is wrong is not timed."""
    results, samples = {}, {}
    for peer, process in processes.items():
        try:
            answer = process.ask("load", work.name, str(expected))
            if "unsupported" in answer:
                results[peer] = answer
                continue
            error = answer["result"]
            results[peer] = {"error": error if np.isfinite(error) else None, "correct": error <= tolerance}
            if error <= tolerance:
                samples[peer] = []
        except PeerError as failure:
            results[peer] = {"failed": str(failure)}
    for _ in range(ROUNDS):
        for peer in list(samples):
            try:
                samples[peer].append(processes[peer].ask("measure", seconds / ROUNDS)["result"])
            except PeerError as failure:
                results[peer] = {"failed": str(failure)}
                del samples[peer]
    for peer, rounds in samples.items():
        results[peer] |= {
            "best": min(sample["best"] for sample in rounds),
            "median": statistics.median(sample["median"] for sample in rounds),
            "calls": sum(sample["calls"] for sample in rounds),
        }
    return results


def start(peers, num_threads, progress):
    """{peer: process}, without those that cannot start."""
    processes = {peer: Process(peer, num_threads) for peer in peers}
    for peer, process in list(processes.items()):
        try:
            process.version = process.ask("version")["result"]
        except PeerError as failure:
            progress(f"skipped: {peer} ({failure})")
            del processes[peer]
    return processes


def run(works, peers, thread_counts, seconds, progress=lambda message: None):
    """Measure the workloads; returns all that the reports need, as JSON has it."""
    groups = {n: start(peers, n, progress) for n in thread_counts}
    limits = {str(n): processes["cattn"].ask("limits")["result"] for n, processes in groups.items()}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        answer_file = Path(scratch) / "expected.npy"
        for number, work in enumerate(works, 1):
            progress(f"{number}/{len(works)} {work.name}")
            expected, tolerance = float64_answer(work)
            np.save(answer_file, expected)
            rest()
            for n, processes in groups.items():
                found = processes["cattn"].ask("limits")["result"]
                limits[str(n)] = {name: max(found[name], best) for name, best in limits[str(n)].items()}
                results = measure(work, processes, answer_file, tolerance, seconds)
                rows.append(describe(work) | {"threads": n, "tolerance": tolerance, "results": results})
    versions = {peer: process.version for peer, process in groups[thread_counts[0]].items()}
    for processes in groups.values():
        for process in processes.values():
            process.close()
    return {
        "machine": {
            "cpu": cpu_model(),
            "isa": cattn.isa,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version()} | versions,
        "limits": limits,
        "rows": rows,
    }


def describe(work):
    """The workload's part of a row."""
    names = "reason", "kind", "shape", "dtype", "limit", "flops", "nbytes"
    return {"workload": work.name} | {name: getattr(work, name) for name in names}


def cpu_model():
    """The CPU's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
