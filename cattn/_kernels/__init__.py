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


def _choose() -> str:
    available = available_isas()
    wanted = os.environ.get("CATTN_ISA") or available[0]
    if wanted not in available:
        raise ImportError(f"CATTN_ISA: expected one of {', '.join(available)} on this CPU, got {wanted!r}")
    return wanted


isa = _choose()
f32 = importlib.import_module(f"{__name__}.{isa}")


def f64():
    """The module that computes in float64, imported when it is first asked for."""
    return importlib.import_module(f"{__name__}.{isa}_f64")


fma_flops = f32.fma_flops
read_bytes = f32.read_bytes
sinusoid = f32.sinusoid
