"""How many threads a call may use.

In this order: the call's `num_threads`, `set_num_threads`, the environment's CATTN_NUM_THREADS, then OMP_NUM_THREADS,
then the smaller of the CPUs this process may run on (as it was when OpenMP was loaded, which can bind the main thread
to one of them) and the CPUs its cgroup's quota pays for. OpenMP itself knows no quota: in a container of half a CPU on
a host of 64 cores it would start 64 threads and be throttled.

All but the first are one number for the process: the calls in flight share it, so that 8 Python threads on 8 CPUs get a
CPU each and not 64 threads. A limit set on OpenMP at run time (threadpoolctl) lowers it. OMP_THREAD_LIMIT bounds all of
them, a call's `num_threads` too. The kernels apply these when a call comes. Results depend on none of it.

After a call the threads spin for some microseconds only (see cattn._kernels), so that those of NumPy's or PyTorch's
next call find the CPUs free.
"""

import math
import operator
import os
import re

from cattn import _kernels
from cattn._kernels import cpu

_MOST = 2**31 - 1  # an int of C, which is what OpenMP is asked for

_chosen: int | None = None


def set_num_threads(num_threads: int | None) -> None:
    """Sets the number of threads that calls without `num_threads=` share; None goes back to the default.

    A call that is alone gets all of them, of several at once (from Python threads) each an equal share, at least one.
    A lower limit on OpenMP, as `threadpoolctl.threadpool_limits` sets it for the Python thread that it is called in,
    counts as well, whichever came first: the smaller number wins. It does not touch `num_threads=`.

    >>> import cattn
    >>> cattn.set_num_threads(1)
    >>> cattn.get_num_threads()
    1
    >>> cattn.set_num_threads(None)
    """
    global _chosen
    _chosen = None if num_threads is None else checked(num_threads)
    cpu.set_threads(_chosen or _DEFAULT[0], _OPENMP)


def get_num_threads() -> int:
    """The number of threads that a call without `num_threads=` uses when it is alone."""
    return _kernels.f32.default_num_threads()[0]


def checked(num_threads) -> int:
    """`num_threads` as an int of at least 1; ValueError or TypeError otherwise."""
    try:
        count = operator.index(num_threads)
    except TypeError:
        raise TypeError(f"num_threads: expected an integer, got {type(num_threads).__name__}") from None
    if not 1 <= count <= _MOST:
        got = count if count.bit_length() <= 64 else f"an integer of {count.bit_length()} bits"  # str() can refuse it
        cure = "; None takes the default" if count < 1 else ""
        raise ValueError(f"num_threads: expected 1 to {_MOST}, got {got}{cure}")
    return count


def is_chosen() -> bool:
    """Whether somebody has chosen the number for cattn: by set_num_threads, or CATTN_NUM_THREADS."""
    return _chosen is not None or _DEFAULT[1] == "CATTN_NUM_THREADS"


def source() -> str:
    """Where the number of get_num_threads() comes from, in words."""
    limit = _kernels.f32.default_num_threads()[1]
    return ("set_num_threads" if _chosen else _DEFAULT[1]) + (f", limited by {limit}" if limit else "")


def _default() -> tuple[int, str]:
    wanted = os.environ.get("CATTN_NUM_THREADS", "").strip()
    if wanted:
        count = _number(wanted)
        if count is None or not 1 <= count <= _MOST:
            raise ImportError(f"CATTN_NUM_THREADS: expected an integer from 1 to {_MOST}, got {_kernels.shown(wanted)}")
        return count, "CATTN_NUM_THREADS"
    count = _openmp_variable()
    if count is not None:
        return count, "OMP_NUM_THREADS"
    quota = _cgroup_quota()
    if quota is not None and math.ceil(quota) < _kernels.cpus:
        return math.ceil(quota), "cgroup CPU quota"
    return _kernels.cpus, "CPU affinity"


def _number(text: str) -> int | None:
    """The number that ASCII digits write; None for other text, and for what no 64 bits hold, as int() refuses thousands
    of digits."""
    if not (text.isascii() and text.isdecimal()):
        return None
    significant = text.lstrip("0") or "0"
    return int(significant) if len(significant) <= 19 else None


def _openmp_variable() -> int | None:
    """OMP_NUM_THREADS as GCC's OpenMP reads it: a number for each level of nesting. It ignores all of them where one is
    not a number from 1 to 2**63 - 1; here the first is to fit an int as well."""
    text = os.environ.get("OMP_NUM_THREADS")
    if not text:  # mostly: then an import compiles no regular expression
        return None
    numbers = []
    for field in text.split(","):
        number = re.fullmatch(r"\s*\+?(\d+)\s*", field, re.ASCII)
        numbers.append(_number(number[1]) if number else None)
    if not all(number and number < 2**63 for number in numbers) or numbers[0] > _MOST:
        return None
    return numbers[0]


def _cgroup_quota(root="/sys/fs/cgroup", membership="/proc/self/cgroup") -> float | None:
    """The CPUs that the quota of this process's cgroup pays for, the least along its path to the root; None: no limit.

    cgroup v2 keeps "quota period" in cpu.max ("max" for none), v1 a file for each (-1 for none). Files that cannot be
    read or say anything else are no limit.
    """
    quotas = []
    for line in _read(membership).split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            base, names = root, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            base, names = os.path.join(root, "cpu"), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            folder = os.path.join(base, *parts[:depth])
            fields = [_number(field) for name in names for field in _read(os.path.join(folder, name)).split()]
            if len(fields) == 2 and all(fields):
                quotas.append(fields[0] / fields[1])
    return min(quotas, default=None)


def _read(path) -> str:
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except (OSError, ValueError):  # ValueError: a path with a NUL in it
        return ""


_DEFAULT = _default()
# What OpenMP starts with: it says less in a thread where somebody limits it.
_OPENMP = _openmp_variable() or _kernels.cpus
set_num_threads(None)
