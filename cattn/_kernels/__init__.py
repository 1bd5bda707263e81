"""Picks, at import, the modules of the best instruction set that this CPU runs, or the one CATTN_ISA names.

A module that the CPU cannot run would die at import (SIGILL), so the choice is made from the table before importing.
"""

import importlib
import os
import platform
from importlib.util import find_spec

from cattn._kernels import cpu
from cattn._kernels.isa import compiled_for


def available_isas() -> tuple[str, ...]:
    """The instruction sets that are built into this installation and that this CPU runs, best first."""
    return tuple(
        row.name
        for row in compiled_for(platform.machine())
        if all(cpu.supports(feature) for feature in row.features) and find_spec(f"{__name__}.{row.name}")
    )


def shown(text: str) -> str:
    """`text` as an error message quotes it: its beginning, where it is long."""
    return repr(text) if len(text) <= 60 else f"{text[:40]!r}... ({len(text)} characters)"


def _choose() -> str:
    available = available_isas()
    wanted = os.environ.get("CATTN_ISA") or available[0]
    if wanted not in available:
        raise ImportError(f"CATTN_ISA: expected one of {', '.join(available)} on this CPU, got {wanted!r}")
    return wanted


def _count_cpus() -> int:
    """The CPUs that this process may run on. To be asked before OpenMP is loaded: where it is told to bind its threads
    (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY), it binds the thread that loads it, at once, to the first place."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # macOS has no affinity, and a sandbox may forbid to ask
        return os.cpu_count() or 1


def _import_with_short_spin(name: str):
    """Imports the first module that loads GCC's OpenMP runtime, which reads GOMP_SPINCOUNT then, and only then.

    By default its threads spin for milliseconds after each parallel region, on cores that another pool (OpenBLAS, in
    numpy.matmul) wants next: alternating the two took 8 to 28 ms a round instead of 0.35 (2 cores). Threads that sleep
    take 50 to 200 us to wake in a virtual machine. With 50 us of spin, alternating takes 1.3 to 1.4 times the sum of
    both alone; with 15 us 1.2, but a layer, whose three regions lie 30 to 80 us apart, twice the time; with 100 us 1.7.
    """
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return importlib.import_module(name)
    os.environ["GOMP_SPINCOUNT"] = str(cpu.spin_rounds(50e-6))
    try:
        return importlib.import_module(name)
    finally:
        del os.environ["GOMP_SPINCOUNT"]


isa = _choose()
cpus = _count_cpus()
f32 = _import_with_short_spin(f"{__name__}.{isa}")
cpus = max(cpus, f32.bound_cpus())  # another library had loaded OpenMP, which has bound this thread since


def f64():
    """The module that computes in float64, imported when it is first asked for."""
    return importlib.import_module(f"{__name__}.{isa}_f64")


fma_flops = f32.fma_flops
read_bytes = f32.read_bytes
sinusoid = f32.sinusoid
