"""What this installation is and what it decided at import, for bug reports."""

import os
import platform
import warnings

import numpy as np

from cattn import _kernels, _threads
from cattn._checks import shown


def show_config(mode: str = "stdout") -> dict | None:
    """Prints versions, instruction sets, compiler and OpenMP, the number of threads and where it came from, and the
    BLAS of NumPy with its threads; mode="dicts" returns them and prints nothing, as numpy.show_config does.

    NumPy does not say how many threads its BLAS uses: threadpoolctl does, where it is installed. Without, the number is
    the one that the environment asks for, or None.

    >>> import cattn
    >>> sorted(cattn.show_config(mode="dicts"))
    ['blas', 'cattn', 'compiler', 'cpu', 'isa', 'machine', 'numpy', 'openmp', 'python', 'threads']
    """
    if not isinstance(mode, str) or mode not in ("stdout", "dicts"):
        raise ValueError(f"mode: expected 'stdout' or 'dicts', got {shown(mode)}")
    config = _config()
    if mode == "dicts":
        return config
    cpu, isa, blas = config["cpu"], config["isa"], config["blas"]
    count = "an unknown number of threads" if blas["threads"] is None else threads_text(blas["threads"])
    rows = {
        "cattn": config["cattn"],
        "python, numpy": f"{config['python']}, {config['numpy']}",
        "machine": config["machine"],
        "cpu": f"{cpu['name'] or 'of unknown name'} (this process may run on: {cpu['count']})",
        "isa": f"{isa['used']} (this CPU runs: {', '.join(isa['available'])})",
        "threads": f"{config['threads']['count']} (from: {config['threads']['source']})",
        "compiler": config["compiler"],
        "openmp": config["openmp"],
        "numpy's blas": f"{blas['name'] or 'unknown'} {blas['version'] or ''}".rstrip() + f", {count} "
                        f"(from: {blas['source']})",
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return None


def _config():
    import cattn

    build = _kernels.f32.build_info()
    return {
        "cattn": cattn.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()} {platform.system()}",
        "cpu": {"name": _cpu_name(), "count": _kernels.cpus},
        "isa": {"used": _kernels.isa, "available": list(_kernels.available_isas())},
        "threads": {"count": _threads.get_num_threads(), "source": _threads.source()},
        "compiler": build["compiler"],
        "openmp": build["openmp"],
        "blas": _blas(),
    }


def threads_text(count):
    return f"{count} thread" if count == 1 else f"{count} threads"


def _cpu_name(path="/proc/cpuinfo"):
    """As Linux gives it on x86; None elsewhere."""
    for line in _threads._read(path).split("\n"):
        if line.startswith("model name"):
            # Printable ASCII: it goes to terminals of any encoding.
            return "".join(c for c in line.partition(":")[2].strip() if " " <= c <= "~") or None
    return None


# What tells a BLAS how many threads to use, the one that wins first; by a word of its name. Any other is taken for
# OpenBLAS, which distributions call "blas" or "cblas".
_BLAS_VARIABLES = {
    "mkl": ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    "blis": ("BLIS_NUM_THREADS", "OMP_NUM_THREADS"),
    "accelerate": ("VECLIB_MAXIMUM_THREADS",),
    "": ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"),
}


def _blas():
    """Name, version and number of threads of NumPy's BLAS, and where that number came from; None: not known."""
    try:
        found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        name, version = (str(found[key]) if found.get(key) else None for key in ("name", "version"))
    except (AttributeError, KeyError, TypeError):  # a NumPy that was built without Meson
        name = version = None
    count, source = _blas_threads(name or "")
    return {"name": name, "version": version, "threads": count, "source": source}


def _blas_threads(name):
    try:
        import threadpoolctl
    except ImportError:
        threadpoolctl = None
    if threadpoolctl is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two OpenMP runtimes in one process
            pools = [pool for pool in threadpoolctl.threadpool_info() if pool.get("user_api") == "blas"]
        folder = os.path.dirname(np.__file__)
        # SciPy has a BLAS of its own: NumPy's lies in its folder, or in numpy.libs beside that, where a wheel has it.
        own = [pool for pool in pools if str(pool.get("filepath", "")).startswith((folder + os.sep, folder + ".libs"))]
        if own or len(pools) == 1:
            return (own or pools)[0]["num_threads"], "threadpoolctl"
    variables = next(names for word, names in _BLAS_VARIABLES.items() if word in name.lower())
    for variable in variables:
        count = _threads._number(os.environ.get(variable, "").strip())
        if count:
            return count, variable
    return None, f"{', '.join(variables)} not set; by default BLAS uses all CPUs"
