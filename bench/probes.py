"""What a table of calls does not show: memory, import time, and how cattn and NumPy's BLAS share the cores.

Each probe runs in a process of its own, `python -m bench.probes NAME`, and prints one JSON object.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

import cattn

from .runner import command
from .worker import time_calls


def scratch_memory():
    """Peak of the resident memory at 16384 x 16384 beyond the inputs and the output."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 16384, 64), np.float32)
    out = np.ones_like(query)
    before = _peak_memory()
    cattn.scaled_dot_product_attention(query, key, value, out=out)
    megabytes = (_peak_memory() - before) / 1e6
    return {"megabytes": megabytes, "text": f"scratch memory at 16384 x 16384, one head: {megabytes:.1f} MB"}


def _peak_memory():
    """Bytes. Not getrusage's ru_maxrss: a new process inherits that from its parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError("needs /proc/self/status")
    return next(
        int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")
    )


def import_time():
    """Time of `import cattn` where numpy is there already, best of 20 processes."""
    code = "import time, numpy; start = time.perf_counter(); import cattn; print(time.perf_counter() - start)"
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    milliseconds = 1e3 * min(float(run().stdout) for _ in range(20))
    return {"milliseconds": milliseconds, "text": f"import cattn: {milliseconds:.1f} ms beyond numpy"}


def alternating():
    """numpy.matmul and an attention of about 0.2 ms in turns: two pools of threads that want the same cores."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 300, 300), np.float32)

    def median(run, seconds=0.5):
        return time_calls(run, seconds)["median"]

    for seq_len in range(64, 1024, 32):  # as long as takes 0.2 ms on this machine
        query, key, value = rng.standard_normal((3, 1, 8, seq_len, 64), np.float32)
        attention = partial(cattn.scaled_dot_product_attention, query, key, value)
        if median(attention, seconds=0.1) > 0.2e-3:
            break
    matmul = partial(np.matmul, a, b)

    def both():
        matmul()
        attention()

    alone = [median(matmul), median(attention)]
    ratio = median(both) / sum(alone)
    times = " + ".join(f"{1e3 * seconds:.3f}" for seconds in alone)
    text = f"numpy.matmul(300 x 300) and attention(8 x {seq_len} x 64) in turns: {ratio:.2f} x ({times}) ms alone"
    return {"ratio": ratio, "text": text}


PROBES = {"scratch-memory": scratch_memory, "import-time": import_time, "alternating": alternating}


def run(name, num_threads):
    """The probe's result, from a new process."""
    process = subprocess.run(**command("bench.probes", name, num_threads=num_threads), capture_output=True)
    if process.returncode:
        return {"text": f"{name}: failed: {process.stderr.strip().splitlines()[-1]}"}
    return json.loads(process.stdout)


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
