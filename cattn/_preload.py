"""What a first call would do late, done early: modules imported, threads started."""

import numpy as np

from cattn import _kernels, _threads
from cattn._attention import scaled_dot_product_attention

_MAX_THREADS = 1024  # the kernels use no more


def preload() -> None:
    """Imports every module that a call may need, and starts the threads.

    `import cattn` leaves out what not every program needs: float64, numpy.random (the seeds of layers), threads. The
    first call that does finds nothing any more in a process that has gone into an empty root (chroot) or given up the
    right to read the installation (setuid), and few threads close to a limit (RLIMIT_NPROC, a cgroup's pids.max).

    To be called before that, after the last fork, since children of fork start threads of their own, and in the Python
    thread that is going to call: each has its own threads, get_num_threads() of them, itself included.

    Raises
    ------
    ImportError
        If something is missing: which module, and what brings it.

    Examples
    --------
    >>> import cattn
    >>> cattn.preload()  # and then: os.chroot("/srv/empty"); os.setuid(65534)
    """
    import numpy.random

    numpy.random.default_rng(0)
    _kernels.f64()
    num_threads = _threads.get_num_threads()
    # A head a thread: a megaflop for each, enough for a call to wake it.
    x = np.broadcast_to(np.zeros((64, 64), np.float32), (min(num_threads, _MAX_THREADS), 64, 64))[None]
    scaled_dot_product_attention(x, x, x, num_threads=num_threads)
