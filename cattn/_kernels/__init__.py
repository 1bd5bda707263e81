"""Picks, at import, the modules of the best instruction set that this CPU runs, or the one CATTN_ISA names.

A module that the CPU cannot run would die at import (SIGILL), so the choice is made from the table before importing.
What is missing, a module or the OpenMP runtime under it, is an ImportError that says how to get it.
"""

import importlib
import os
import platform
import re
import sys
from importlib.util import find_spec

from cattn._kernels.isa import Isa, compiled_for

_FOLDER = os.path.dirname(__file__)


def available_isas() -> tuple[str, ...]:
    """The instruction sets that are built into this installation and that this CPU runs: best first, and last those
    that are made for other CPUs."""
    return tuple(_AVAILABLE)


def shown(text: str) -> str:
    """`text` as an error message quotes it: its beginning, where it is long."""
    return repr(text) if len(text) <= 60 else f"{text[:40]!r}... ({len(text)} characters)"


def _load(name: str):
    """The extension module cattn._kernels.<name>."""
    full_name = f"{__name__}.{name}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name not in (full_name, f"{__name__}.memoryviews"):    # which all of them import
            raise
        raise ImportError(f"cattn: the compiled module {error.name} is missing: {_cure()}", name=error.name) from error
    except ImportError as error:
        cure = _cure_of_openmp(str(error))
        if cure is None:
            raise
        raise ImportError(f"cattn: {cure}", name=full_name) from error


def _cure() -> str:
    """What brings back modules that are not here."""
    if getattr(sys, "frozen", False):
        return (f"freeze the application with all modules of {__name__}, which are imported by name: PyInstaller finds "
                f"them by the hook of an installed cattn, other tools want them listed")
    if os.path.exists(os.path.join(_FOLDER, "cpu.pyx")):
        return f"`pip install -e .` in {os.path.dirname(os.path.dirname(_FOLDER))} builds it"
    return f"`pip install --force-reinstall --no-deps cattn` brings it back to {_FOLDER}"


def _cure_of_openmp(error: str) -> str | None:
    """None: it is not the OpenMP runtime that the dynamic linker (of glibc, musl or macOS) has not found."""
    library = re.search(r"lib(gomp|i?omp)[\w-]*\.\w[\w.]*", error)
    if not library or not re.search("cannot open shared object|Error loading shared library|Library not loaded", error):
        return None
    if "-" in library[0]:  # a copy under a name of its own, as wheels carry it
        return f"the OpenMP runtime {library[0]} of the wheel is missing: {_cure()}"
    if library[1] != "gomp":
        return (f"the OpenMP runtime {library[0]} is not on this system: `apt-get install libomp5`, `dnf install "
                f"libomp` or, on macOS, `brew install libomp` installs it")
    return (f"the OpenMP runtime {library[0]} is not on this system: `apt-get install libgomp1` (Debian, Ubuntu), "
            f"`dnf install libgomp` (Fedora, RHEL) or `apk add libgomp` (Alpine) installs it")


cpu = _load("cpu")


def _find_isas() -> dict[str, Isa]:
    rows = sorted(compiled_for(platform.machine()), key=lambda row: bool(row.cpus) and not any(map(cpu.is_a, row.cpus)))
    return {
        row.name: row
        for row in rows
        if all(cpu.supports(feature) for feature in row.features) and find_spec(f"{__name__}.{row.modules['f32']}")
    }


def _choose() -> str:
    if not _AVAILABLE:
        _load(compiled_for(platform.machine())[-1].modules["f32"])  # runs on every CPU: it is missing, as is raised
    wanted = os.environ.get("CATTN_ISA") or next(iter(_AVAILABLE))
    if wanted not in _AVAILABLE:
        raise ImportError(f"CATTN_ISA: expected one of {', '.join(_AVAILABLE)} on this CPU, got {shown(wanted)}")
    return wanted


def module_name(isa: str, precision: str) -> str:
    """The instruction set's module of this precision; where it has none, that of the best available one that has."""
    rows = (_AVAILABLE[isa], *_AVAILABLE.values())
    return next(row.modules[precision] for row in rows if precision in row.precisions)


def _count_cpus() -> int:
    """The CPUs that this process may run on. To be asked before OpenMP is loaded: where it is told to bind its threads
    (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY), it binds the thread that loads it, at once, to the first place."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # macOS has no affinity, and a sandbox may forbid to ask
        return os.cpu_count() or 1


def _load_with_short_spin(name: str):
    """Imports the first module that loads GCC's OpenMP runtime, which reads GOMP_SPINCOUNT then, and only then.

    By default its threads spin for milliseconds after each parallel region, on cores that another pool (OpenBLAS, in
    numpy.matmul) wants next: alternating the two took 8 to 28 ms a round instead of 0.35 (2 cores). Threads that sleep
    take 50 to 200 us to wake in a virtual machine. With 50 us of spin, alternating takes 1.3 to 1.4 times the sum of
    both alone; with 15 us 1.2, but a layer, whose three regions lie 30 to 80 us apart, twice the time; with 100 us 1.7.
    """
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return _load(name)
    os.environ["GOMP_SPINCOUNT"] = str(cpu.spin_rounds(50e-6))
    try:
        return _load(name)
    finally:
        del os.environ["GOMP_SPINCOUNT"]


_AVAILABLE = _find_isas()  # asked once: where rights are dropped after the import, the folder may be out of sight later
isa = _choose()
cpus = _count_cpus()
f32 = _load_with_short_spin(module_name(isa, "f32"))
cpus = max(cpus, f32.bound_cpus())  # another library had loaded OpenMP, which has bound this thread since


def f64():
    """The module that computes in float64, imported when it is first asked for."""
    return _load(module_name(isa, "f64"))


fma_flops = f32.fma_flops
read_bytes = f32.read_bytes
