#!/usr/bin/env python3
"""What llvm-mca thinks of the kernels' inner loops on CPUs that are not at hand:

    tools/model.py [--llvm-mca PROGRAM] [--cpus znver3,...] [--module avx512,...] [--folder FOLDER] [--ports]

For each innermost loop of a built module that has some FMAs: how many instructions and FMAs a turn has, and for each
CPU the cycles of a turn and the part of what the model gives the loop that measures the FMA peak (spin_fma). --ports
also says how busy each resource is, in cycles a turn. Everything is taken to come from L1, each branch to be foreseen,
and loops to go on forever: what is left out is what the benchmark measures. A CPU that has no model of its own gets
that of another one (LLVM 16: sapphirerapids that of Ice Lake, neoverse-v1 that of Neoverse N2). Modules of aarch64, for
`--cpus neoverse-v1 --module baseline`, are built by tools/test_aarch64.sh, whose `--cache FOLDER` has them in
source/cattn/_kernels. Debian 12: apt-get install binutils llvm-16, and binutils-aarch64-linux-gnu for these.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).parent.parent / "cattn/_kernels"
CPUS = "sapphirerapids,znver3,znver4"


class Machine(NamedTuple):
    triple: str
    objdump: str
    comment: str        # regular expressions: what objdump adds to an instruction,
    fma: str
    branch: str         # one that may go on with the next instruction, and where else it goes,
    leaves: str         # and whatever does not go on
    back: str           # a branch that llvm-mca takes


MACHINES = {  # by ELF's number
    62: Machine("x86_64", "objdump", r"\s*(#|<).*", "vfmadd", r"j\w+\s+([0-9a-f]+)", "j|call|ret", "jne 0"),
    183: Machine("aarch64", "aarch64-linux-gnu-objdump", r"\s*(//|<).*", r"fmla\b",
                 r"(?:b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+)$", r"b\b|b\.|bl|br|ret|cbn?z|tbn?z", "b.ne #0"),
}
LEAST_FMAS = 8  # of a loop that is worth a line
MOST_INSTRUCTIONS = 400
ITERATIONS = 200


def machine_of(module):
    return MACHINES[int.from_bytes(module.read_bytes()[18:20], "little")]


def loops(module, machine):
    """(function, instructions, number of FMAs) of the innermost loops: those that no other branch leaves or enters."""
    text = subprocess.run([machine.objdump, "-d", "--no-show-raw-insn", module], capture_output=True, text=True,
                          check=True)
    name = module.name.partition(".")[0]
    function, body, at = "", [], {}
    for line in text.stdout.splitlines():
        if start := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function, body, at = re.sub(rf"^__pyx_\w*_{len(name)}{name}_", "", start[1]), [], {}
        elif found := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            at[found[1]] = len(body)
            body.append(re.sub(machine.comment, "", found[2]))
            jump = re.match(machine.branch, body[-1])
            if jump and jump[1] in at:
                turn = body[at[jump[1]]:]
                fmas = sum(bool(re.match(machine.fma, line)) for line in turn)
                leaves = any(re.match(machine.leaves, line) for line in turn[:-1])
                if fmas >= LEAST_FMAS and len(turn) <= MOST_INSTRUCTIONS and not leaves:
                    yield function, turn, fmas


def model(program, cpu, turn, machine):
    """(cycles of a turn, {resource: its cycles}); None where the CPU lacks an instruction."""
    code = "\n".join([*turn[:-1], machine.back])
    done = subprocess.run([program, f"-mtriple={machine.triple}", f"-mcpu={cpu}", f"-iterations={ITERATIONS}",
                           "-instruction-info=false"], input=code, capture_output=True, text=True)
    if "unsupported instruction" in done.stderr:
        return None
    if done.returncode:
        sys.exit(f"{program} -mcpu={cpu}: {done.stderr.strip()}")
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", done.stdout)[1]) / ITERATIONS
    names = dict(re.findall(r"^\[([\d.]+)\]\s+- (\S+)", done.stdout, re.M))
    head, pressure = re.search(r"Resource pressure per iteration:\n(.*)\n(.*)", done.stdout).groups()
    numbers = re.findall(r"\[([\d.]+)\]", head)
    busy = [float(value) if value != "-" else 0.0 for value in pressure.split()]
    return cycles, {names[number]: value for number, value in zip(numbers, busy, strict=True) if value}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llvm-mca", default="llvm-mca-16")
    parser.add_argument("--cpus", default=CPUS)
    parser.add_argument("--module", default="avx512_skylake,avx512_intel,avx512,avx2")
    parser.add_argument("--folder", type=Path, default=KERNELS)
    parser.add_argument("--ports", action="store_true")
    args = parser.parse_args()
    cpus = args.cpus.split(",")
    for name in args.module.split(","):
        module = next(args.folder.glob(f"{name}.*so"), None)
        if module is None:
            sys.exit(f"{args.folder}/{name}.*so: expected a module that is built")
        machine = machine_of(module)
        print(f"{name:40} insns FMAs" + "".join(f"{cpu:>22}" for cpu in cpus))
        rows = [(function, turn, fmas, [model(args.llvm_mca, cpu, turn, machine) for cpu in cpus])
                for function, turn, fmas in loops(module, machine)]
        peak = next((fmas, modelled) for function, _, fmas, modelled in rows
                    if re.search("spin_fma|fma_flops", function))  # the latter where the former is inlined
        printed = set()
        for function, turn, fmas, modelled in rows:
            cells = [f"{found[0]:9.1f} cycles {100 * fmas / found[0] * best[0] / peak[0]:4.0f} %" if found else "-"
                     for found, best in zip(modelled, peak[1], strict=True)]
            if (function, fmas, *cells) in printed:  # of another kind or stride of keys
                continue
            printed.add((function, fmas, *cells))
            print(f"  {function[-38:]:38} {len(turn):5} {fmas:4}" + "".join(f"{cell:>22}" for cell in cells))
            for cpu, found in zip(cpus, modelled, strict=True) if args.ports else ():
                if found:
                    print(f"      {cpu}: " + ", ".join(f"{port} {cycles:.1f}" for port, cycles in found[1].items()))


if __name__ == "__main__":
    main()
