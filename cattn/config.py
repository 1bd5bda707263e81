"""What this installation is and what it decided at import, for bug reports."""

import platform

import numpy as np

from cattn import _kernels, threads


def show_config() -> None:
    """Prints the version, the instruction sets, the number of threads and where it came from, compiler and OpenMP."""
    import cattn

    build = _kernels.f32.build_info()
    rows = {
        "cattn": cattn.__version__,
        "python, numpy": f"{platform.python_version()}, {np.__version__}",
        "machine": f"{platform.machine()} {platform.system()}",
        "isa": f"{_kernels.isa} (this CPU runs: {', '.join(_kernels.available_isas())})",
        "threads": f"{threads.get_num_threads()} (from: {threads.source()})",
        "compiler": build["compiler"],
        "openmp": build["openmp"],
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")
