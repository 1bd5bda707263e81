"""preload(): after it, no call imports anything or starts another thread."""

import os
import sys

import numpy as np
import pytest
from processes import python

import cattn
from cattn import _kernels

# What makes imports impossible.
WALLS = {
    "chroot": """
folder = tempfile.mkdtemp()
os.chroot(folder)
os.chdir("/")
""",
    "finder": """
class Wall:
    def find_spec(self, name, path=None, target=None):
        raise ImportError(f"behind the wall: {name}")
sys.meta_path[:] = [Wall()]
sys.path.clear()
sys.path_importer_cache.clear()
""",
}

SERVER = """
import os, sys, tempfile, threading
import numpy as np
try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None
import cattn
from cattn import _kernels

def count():
    return len(os.listdir(tasks)) if tasks is not None else 0

tasks = os.open("/proc/self/task", os.O_RDONLY) if os.path.isdir("/proc/self/task") else None  # seen from behind walls
threads = count()
PRELOAD
started = count() - threads
WALL
try:
    import fractions
except ImportError:
    pass
else:
    sys.exit("no wall")
modules = set(sys.modules)

def refused(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (TypeError, ValueError, MemoryError) as error:
        return str(error)
    sys.exit("no error")

attention = cattn.scaled_dot_product_attention
dtypes = [np.float64, np.float32, np.float16] + ([ml_dtypes.bfloat16] if ml_dtypes else [])
for dtype in dtypes:
    x = np.linspace(-1, 1, 8 * 8 * 256 * 16).reshape(8, 8, 256, 16).astype(dtype)
    attention(x, x, x)
    for options in (
        {"attn_mask": np.tri(256, dtype=bool)}, {"attn_mask": np.zeros((256, 256), np.float32)}, {"is_causal": True},
        {"kv_lens": [3] * 8, "return_weights": True, "return_logsumexp": True}, {"window": (5, 5)}, {"softcap": 3.0},
        {"dropout_p": 0.5, "seed": 1}, {"alibi_slopes": np.ones(8), "sinks": np.ones(8)}, {"out": np.empty_like(x)},
        {"q_offset": np.arange(8)},
    ):
        attention(x, x, x, **options)
    given = x, x, x, x, x, x[..., 0].astype(np.float64 if dtype == np.float64 else np.float32)
    cattn.scaled_dot_product_attention_backward(*given, np.zeros((256, 256), dtype), sinks=np.ones(8),
                                                wanted=cattn.Gradients._fields)
    cattn.varlen_attention_backward(*(x[0, :7] for x in given), [0, 3, 7])
    refused(cattn.scaled_dot_product_attention_backward, *given, wanted="x")
    for seed in (None, 0, np.random.default_rng(0)):
        layer = cattn.MultiHeadAttention(64, 4, dropout=0.5, dtype=dtype, seed=seed)
    layer(np.ones((2, 70, 64), dtype), training=True, seed=1)
    layer(np.ones((1, 64), dtype), return_weights=True)
    layer.load_state_dict(layer.state_dict("huggingface"))
    refused(layer.load_state_dict, {})
    for bad in ({"kv_lens": [300] * 8}, {"attn_mask": object()}, {"out": x}, {"scale": "x"}, {"num_threads": 0},
                {"window": x}, {"seed": -1, "dropout_p": 0.5}):
        refused(attention, x, x, x, **bad)
for dtype in (np.float16, np.float32, np.float64):
    cattn.sinusoidal_encoding(2000, 512, dtype=dtype)
    cattn.PositionalEncoding(8, dropout=0.5, dtype=dtype)(np.ones((1, 3, 8), dtype), training=True, seed=1)
cattn.relative_shift(3, 4)
for dtype in dtypes:
    cattn.rotary_embedding(np.ones((1, 2, 3, 4, 8), dtype), *cattn.rotary_table(4, 8), interleaved=True)
refused(cattn.MultiHeadAttention, 8, 3)
refused(cattn.MultiHeadAttention, 8, 2, seed="x")
refused(cattn.sinusoidal_encoding, 2**40, 2**10)
x = np.ones((3, 5, 8), np.float32)
cattn.reference.scaled_dot_product_attention(x, x, x, dropout_p=0.5, seed=1)
cattn.reference.MultiHeadAttention(8, 2, seed=1)(x)
more = count() - threads - started
cattn.preload()
cattn.set_num_threads(2)
cattn.show_config()
work = threading.Thread(target=cattn.preload)
work.start()
work.join()  # its pool ends with it
pid = os.fork()
if pid == 0:
    attention(x.astype(np.float64), x.astype(np.float64), x.astype(np.float64))
    os._exit(len(cattn.available_isas()))
isas = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(isas, started, more, sorted(set(sys.modules) - modules))
"""


def serve(wall, preload="cattn.preload()", **variables):
    code = SERVER.replace("PRELOAD", preload).replace("WALL", WALLS[wall])
    # One thread of numpy's: it has others of its own.
    return python(code, **{"CATTN_NUM_THREADS": "5", "OPENBLAS_NUM_THREADS": "1"} | variables)


@pytest.fixture(params=WALLS)
def wall(request):
    if request.param == "chroot" and not (hasattr(os, "geteuid") and os.geteuid() == 0):
        pytest.skip("only root may chroot")
    return request.param


@pytest.mark.parametrize("isa", cattn.available_isas())
def test_behind_a_wall(wall, isa):
    """4 threads beside the main thread run then; the calls need no other, and no module."""
    done = serve(wall, CATTN_ISA=isa)
    assert done.returncode == 0, done.stderr
    isas, started, more, modules = done.stdout.splitlines()[-1].split(" ", 3)
    countable = os.path.isdir("/proc/self/task") and not _kernels.f32.build_info()["openmp"].startswith("none")
    assert (int(isas), int(started), int(more)) == (len(cattn.available_isas()), 4 if countable else 0, 0)
    assert modules == "[]"


def test_without_preload(wall):
    """The wall is one."""
    done = serve(wall, "")
    assert done.returncode == 1
    assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr


def test_what_preload_imports():
    code = """
import sys, cattn
late = [f"cattn._kernels.{cattn._kernels.module_name(cattn.isa, 'f64')}", "numpy.random"]
print([name in sys.modules for name in late], cattn.preload(), [name in sys.modules for name in late])
"""
    done = python(code)
    assert done.stdout == "[False, False] None [True, True]\n", done.stderr


@pytest.mark.parametrize("number", [1, 3, 2**31 - 1])
def test_threads_are_those_of_a_call(monkeypatch, number):
    """A head for each thread that the kernels have at most."""
    calls = []
    monkeypatch.setattr("cattn._preload.scaled_dot_product_attention",
                        lambda *arrays, num_threads: calls.append((arrays[0].shape[1], arrays[0].dtype, num_threads)))
    monkeypatch.setattr(cattn._threads, "get_num_threads", lambda: number)
    cattn.preload()
    assert calls == [(min(number, 1024), np.dtype(np.float32), number)]


def test_a_missing_module_is_named(monkeypatch):
    name = f"cattn._kernels.{_kernels.module_name(cattn.isa, 'f64')}"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"{name} is missing: "):
        cattn.preload()
