"""The instruction sets that cattn is compiled for: the one table that both setup.py and the importer read.

Each row is an extension module for each of its precisions, all made from the same sources. A row may be used when the
machine matches and the CPU has every listed feature; the compiler gets exactly these features as `-m` flags, so what is
asked for and what is compiled cannot drift apart.
"""

from typing import NamedTuple


class Isa(NamedTuple):
    name: str
    machines: tuple[str, ...]  # platform.machine() values; empty: any
    features: tuple[str, ...]  # names that both `gcc -m<name>` and `__builtin_cpu_supports("<name>")` know
    flags: tuple[str, ...] = ()  # further compiler flags
    precisions: tuple[str, ...] = ("f32", "f64")  # every row has f32, the last one both
    # It is the best for these alone, names that `__builtin_cpu_is` knows; others run it when asked to. Empty: for all
    cpus: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, str]:
        """The module of each precision, made from the file of that name: <name> of f32, <name>_f64 of f64."""
        return {precision: self.name if precision == "f32" else f"{self.name}_{precision}"
                for precision in self.precisions}


X86_64 = ("x86_64", "AMD64")

# Best first. -mtune=haswell: with the tuning of newer AMD cores gcc 12 folds the query vectors into memory operands
# of the FMAs and loses a quarter of the speed. avx512_intel and avx512_skylake have other tiles (base/simd.h), and the
# same bits as avx512. In float64 the latter would take 0.8 of the time of avx512_intel, which does it there: a module
# is a tenth of the build.
AVX512 = ("avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl")
ISAS = (
    Isa("avx512_skylake", X86_64, AVX512, ("-mtune=haswell", "-DCATTN_FUSED_TILE"),
        precisions=("f32",), cpus=("skylake-avx512", "cascadelake", "cooperlake")),
    Isa("avx512_intel", X86_64, AVX512, ("-mtune=haswell", "-DCATTN_BROADCAST_TILE"), cpus=("intel",)),
    Isa("avx512", X86_64, AVX512, ("-mtune=haswell",)),
    Isa("avx2", X86_64, ("avx2", "fma", "f16c"), ("-mtune=haswell",)),
    Isa("baseline", (), ()),
)


def compiled_for(machine: str) -> tuple[Isa, ...]:
    """The rows that are built on `machine` (a value of platform.machine()), best first."""
    return tuple(isa for isa in ISAS if not isa.machines or machine in isa.machines)
