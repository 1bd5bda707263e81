"""The floating-point mode of the threads that call, and of those that compute: flush-to-zero, rounding. Results do not
depend on it, and it is left as it was."""

import os
import platform
import subprocess
import sys

import pytest
from processes import ROOT

import cattn

# Machine code: a function that sets the mode, and one that reads it.
CODE = {
    "x86_64": ("0fae17c3", "0fae1f8b07c3", 0x1F80, 0x9FC0, 0x7F80),  # ldmxcsr [rdi]; stmxcsr [rdi]
    "aarch64": ("000040f900441bd5c0035fd6", "00443bd5c0035fd6", 0, 1 << 24, 3 << 22),  # msr fpcr, [x0]; mrs x0, fpcr
}

SETUP = """
import ctypes, mmap, sys
import numpy as np, cattn
from cattn import _kernels
from cattn._linear import linear_backward
code = [bytes.fromhex(text) for text in ({set_code!r}, {get_code!r})]
memory = mmap.mmap(-1, 8192, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory[:len(code[0])], memory[4096:4096 + len(code[1])] = code
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
word = ctypes.c_uint64(0)
set_function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
get_function = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p)(address + 4096)
def set_mode(mode):
    word.value = mode
    set_function(ctypes.byref(word))
def get_mode():
    return get_function(ctypes.byref(word)) & ~0x3F

# Subnormal numbers of each dtype among others.
rng = np.random.default_rng(0)
def float16(*shape):
    return (rng.integers(0, 1 << 12, shape) | rng.integers(0, 2, shape) << 15).astype(np.uint16).view(np.float16)
def float32(*shape):
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-140, 2, shape)).astype(np.float32)
def float64(*shape):
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-1060, 2, shape)
cases = []
for make in (float16, float32, float64):
    for rows, head_dim in ((2, 40), (2, 8), (40, 40), (40, 32)):  # 1 / sqrt(8) and 1 / sqrt(32) depend on the rounding
        q, k, v = make(2, 1, rows, head_dim), make(2, 1, 3000, head_dim), make(2, 1, 3000, head_dim)
        strided = [np.stack([x, x], -1)[..., 0] for x in (q, k, v)]
        for arrays in ((q, k, v), strided):
            for options in ({{}}, {{"scale": 1e-41}}, {{"scale": 1e37}}, {{"softcap": 2.0}},
                            {{"attn_mask": (rng.standard_normal(3000) * 1e-39).astype(np.float32)}}):
                for threads in (1, 2):
                    cases.append((arrays, dict(options, num_threads=threads)))
layers = []
for dtype in (np.float16, np.float32, np.float64):
    layer = cattn.MultiHeadAttention(24, 3, dtype=dtype, seed=0)
    for shape in ((1, 24), (2, 9, 24)):
        layers.append((layer, np.full(shape, 1e-37 if dtype == np.float32 else 1e-7, dtype)))
turned = {{make: (make(2, 2, 4000, 44), cattn.rotary_table(4000, 40)) for make in (float16, float32, float64)}}
states = [(make(3, 40, 20), (rng.standard_normal((3, 40)) * 50).astype(np.float64 if make is float64 else np.float32))
          for make in (float16, float32, float64)]
def served():
    # Packed, in pages and in caches: of 8 bits with scales that are subnormal, or nearly.
    query, key = (rng.standard_normal((60, heads, 64)).astype(np.float32) for heads in (4, 2))
    numbers = rng.integers(-127, 128, (2, 64, 2, 64), np.int8)
    weight = rng.integers(-127, 128, (40, 64), np.int8)
    tiny = [x * np.float32(1e-20) for x in (query, key)]
    scaled = [(key * np.float32(scale), np.full((2, 64, 2), scale, np.float32), np.full((40, 2), scale, np.float32))
              for scale in (1e-40, 1e-38, 1.0)]
    def results():
        yield (cattn.varlen_attention(*tiny, key, [0, 1, 60]),)
        for rows, scales, weight_scales in scaled:
            yield (cattn.paged_attention(query, numbers, numbers, [[0, 1], [1, 0]], [128, 70], [0, 1, 60],
                                         key_scales=scales, value_scales=scales),)
            yield tuple(cattn.linear(query[:n], weight, weight_scales=weight_scales) for n in (1, 4, 60))
            for dtype in ("float32", "float16", "bfloat16", "int8"):
                cache = cattn.KVCache(1, 2, 64, dtype=dtype)
                yield (cache.attend(0, cache.extend(cache.new(), 60), query, rows, rows),)
    return results
served = served()
def results():
    yield from served()
    for arrays, options in cases:
        yield cattn.scaled_dot_product_attention(*arrays, return_weights=True, return_logsumexp=True, **options)
    for arrays, options in cases[::4]:
        out, logsumexp = cattn.scaled_dot_product_attention(*arrays, return_logsumexp=True, **options)
        yield cattn.scaled_dot_product_attention_backward(out, *arrays, out, logsumexp, **options)[:3]
    for layer, x in layers:
        yield layer(x, num_threads=1), layer(x, num_threads=2)
        yield linear_backward(x, x, layer.out_proj_weight, True, 2)
    for outputs, logsumexps in states:
        yield cattn.merge_states(outputs, logsumexps, sinks=logsumexps[0])
    yield cattn.sinusoidal_encoding(300, 50),
    yield cattn.sinusoidal_encoding(300, 50, dtype=np.float16),
    for make in (float16, float32, float64):
        x, tables = turned[make]
        yield tuple(cattn.rotary_embedding(x, *tables, interleaved=True, num_threads=threads) for threads in (1, 2))
def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))
"""


@pytest.mark.skipif(platform.machine() not in CODE or os.name != "posix", reason="no machine code for this CPU")
@pytest.mark.parametrize("when", ["before the threads start", "afterwards"])
@pytest.mark.parametrize("wanted", cattn.available_isas())
def test_results_do_not_depend_on_the_mode(wanted, when):
    set_code, get_code, default, flush, toward_zero = CODE[platform.machine()]
    code = SETUP.format(set_code=set_code, get_code=get_code) + f"""
default, modes = {default}, ({flush}, {toward_zero})
if {when == "afterwards"}:
    expected = list(results())
    right = iter(expected)
else:
    # The pool inherits the mode of its first call. What is right is computed by another process.
    import subprocess, pickle
    right = iter(pickle.loads(sys.stdin.buffer.read()))
for mode in modes:
    if {when == "afterwards"}:
        right = iter(expected)
    made = results()
    count = 0
    for mine in right:
        set_mode(mode)
        got = next(made)
        left = get_mode()
        set_mode(default)
        assert left == mode, (hex(left), hex(mode))
        assert same(mine, got), ("case", count)
        count += 1
    if {when != "afterwards"}:
        break
print("same", count)
"""
    environment = os.environ | {"CATTN_ISA": wanted}
    given = None
    if when != "afterwards":
        made = SETUP.format(set_code=set_code, get_code=get_code) + (
            "import pickle; sys.stdout.buffer.write(pickle.dumps(list(results())))")
        given = subprocess.run([sys.executable, "-c", made], cwd=ROOT, env=environment, capture_output=True,
                               check=True).stdout
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment, input=given,
                          capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.startswith(b"same ")
