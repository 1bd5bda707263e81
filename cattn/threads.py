"""How many threads a call may use.

In this order: the call's `num_threads`, `set_num_threads`, the environment's CATTN_NUM_THREADS, then OMP_NUM_THREADS,
then the smaller of the CPUs this process may run on and the CPUs its cgroup's quota pays for. OpenMP itself knows no
quota: in a container of half a CPU on a host of 64 cores it would start 64 threads and be throttled.
"""

import math
import operator
import os

_chosen: int | None = None


def set_num_threads(num_threads: int | None) -> None:
    """Sets the number of threads that calls without `num_threads=` use; None goes back to the default.

    >>> import cattn
    >>> cattn.set_num_threads(1)
    >>> cattn.get_num_threads()
    1
    >>> cattn.set_num_threads(None)
    """
    global _chosen
    _chosen = None if num_threads is None else checked(num_threads)


def get_num_threads() -> int:
    """The number of threads that calls without `num_threads=` use."""
    return _chosen or _DEFAULT[0]


def checked(num_threads) -> int:
    """`num_threads` as an int of at least 1; ValueError or TypeError otherwise."""
    try:
        count = operator.index(num_threads)
    except TypeError:
        raise TypeError(f"num_threads: expected an integer, got {type(num_threads).__name__}") from None
    if not 1 <= count < 2**31:
        raise ValueError(f"num_threads: expected 1 to {2**31 - 1}, got {count}")
    return count


def source() -> str:
    """Where the number of get_num_threads() comes from, in words."""
    return "set_num_threads" if _chosen else _DEFAULT[1]


def _default() -> tuple[int, str]:
    for name in ("CATTN_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()  # OMP_NUM_THREADS may list one number per nesting level
        if value.isdecimal() and int(value) > 0:
            return int(value), name
        if value and name == "CATTN_NUM_THREADS":
            raise ImportError(f"CATTN_NUM_THREADS: expected a positive integer, got {value!r}")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    if quota is not None and math.ceil(quota) < cpus:
        return math.ceil(quota), "cgroup CPU quota"
    return cpus, "CPU affinity"


def _cgroup_quota(root="/sys/fs/cgroup", membership="/proc/self/cgroup") -> float | None:
    """The CPUs that the quota of this process's cgroup pays for, the least along its path to the root; None: no limit.

    cgroup v2 keeps "quota period" in cpu.max ("max" for none), v1 a file for each (-1 for none).
    """
    quotas = []
    for line in _read(membership).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = root, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            base, names = os.path.join(root, "cpu"), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            folder = os.path.join(base, *parts[:depth])
            fields = [field for name in names for field in _read(os.path.join(folder, name)).split()]
            if len(fields) == 2 and fields[0] not in ("max", "-1"):
                quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def _read(path) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


_DEFAULT = _default()
