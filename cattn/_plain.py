"""The workloads of `python -m cattn speed`, and what one writes for them in NumPy when speed matters: BLAS for the
products, everything else in place, in float32.

This file alone is the program that runs these: it answers JSON requests, one a line. OpenBLAS's threads spin
for milliseconds after a product, on the CPUs that cattn's next call wants, and the other way round: so NumPy has a
process of its own, and neither side answers before its own threads rest.
"""

import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np

CLOCK = 20e-6  # seconds; shorter calls are timed in groups that take at least this long


@dataclass(frozen=True)
class Work:
    """A typical call."""

    name: str
    kind: str  # "attention", "layer" or "table"
    shape: tuple  # attention: batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim
    dtype: str = "float32"
    is_causal: bool = False
    limit: str = "fma"  # what bounds it: "fma", "read" or "" (neither)

    def arrays(self):
        rng = np.random.default_rng(0)

        def uniform(*shape, scale=1.0):
            array = rng.random(shape, np.float32)
            array -= np.float32(0.5)
            array *= np.float32(math.sqrt(12) * scale)  # of variance scale**2
            return array.astype(self.dtype, copy=False)

        if self.kind == "attention":
            batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim = self.shape
            return [uniform(batch, num_heads, seq_len_q, head_dim), uniform(batch, num_kv_heads, seq_len_kv, head_dim),
                    uniform(batch, num_kv_heads, seq_len_kv, head_dim)]
        if self.kind == "layer":
            width, scale = self.shape[-1], self.shape[-1] ** -0.5
            return [uniform(*self.shape), uniform(3 * width, width, scale=scale), uniform(3 * width, scale=scale),
                    uniform(width, width, scale=scale), uniform(width, scale=scale)]
        return []

    @property
    def num_heads(self):
        """Of a layer: heads of 64."""
        return self.shape[-1] // 64

    @property
    def flops(self):
        if self.kind == "attention":
            batch, num_heads, _, seq_len_q, seq_len_kv, head_dim = self.shape
            return 4 * batch * num_heads * seq_len_q * seq_len_kv * head_dim // (2 if self.is_causal else 1)
        if self.kind == "layer":
            batch, seq_len, width = self.shape
            return 8 * batch * seq_len * width**2 + 4 * batch * seq_len**2 * width
        return 0

    @property
    def nbytes(self):
        """Of keys and values; 0 where reading them is not what takes the time."""
        if self.limit != "read":
            return 0
        batch, _, num_kv_heads, _, seq_len_kv, head_dim = self.shape
        return 2 * batch * num_kv_heads * seq_len_kv * head_dim * np.dtype(self.dtype).itemsize


WORKS = (
    Work("tiny", "attention", (1, 8, 8, 16, 16, 64), limit=""),
    Work("prefill", "attention", (1, 8, 8, 512, 512, 64)),
    Work("prefill, long", "attention", (1, 8, 8, 2048, 2048, 64)),
    Work("causal", "attention", (1, 8, 8, 2048, 2048, 64), is_causal=True),
    Work("float16", "attention", (1, 8, 8, 1024, 1024, 64), dtype="float16"),
    Work("encoder batch", "attention", (32, 12, 12, 128, 128, 64)),
    Work("decode, GQA", "attention", (1, 32, 8, 1, 4096, 128), limit="read"),
    Work("decode, float16", "attention", (1, 32, 8, 1, 4096, 128), dtype="float16", limit="read"),
    Work("layer", "layer", (1, 128, 768)),
    Work("sinusoidal table", "table", (5000, 512), limit=""),
)


def attention(query, key, value, bias=None):
    """softmax(query @ key^T / sqrt(head_dim) + bias) @ value."""
    dtype = query.dtype
    if dtype == np.float16:  # matmul has no BLAS for it
        query, key, value = (x.astype(np.float32) for x in (query, key, value))
    batch, num_heads, seq_len_q, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # One product for each key head: its query heads are stacked as rows.
    query = query * np.float32(1 / math.sqrt(head_dim))
    scores = np.matmul(query.reshape(batch, num_kv_heads, -1, head_dim), key.swapaxes(-1, -2))
    if bias is not None:
        scores.reshape(batch, num_heads, seq_len_q, -1)[...] += bias
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    out = np.matmul(scores, value)
    out /= total
    return out.reshape(batch, num_heads, seq_len_q, -1).astype(dtype, copy=False)


def layer(x, in_weight, in_bias, out_weight, out_bias, num_heads):
    """Self-attention between projections."""
    batch, seq_len, width = x.shape
    qkv = np.matmul(x.reshape(-1, width), in_weight.T)
    qkv += in_bias
    query, key, value = qkv.reshape(batch, seq_len, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
    heads = attention(query, key, value).swapaxes(1, 2).reshape(-1, width)
    out = np.matmul(heads, out_weight.T)
    out += out_bias
    return out.reshape(x.shape)


def table(length, dim):
    """Sines and cosines, interleaved."""
    frequencies = np.float32(10000) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(-dim))
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    out = np.empty((length, dim), np.float32)
    np.sin(angles, out=out[:, 0::2])
    np.cos(angles, out=out[:, 1::2])
    return out


def prepared(work):
    """What is timed, a function without arguments; a causal mask is made before."""
    arrays = work.arrays()
    if work.kind == "attention":
        bias = None
        if work.is_causal:
            bias = np.where(np.tri(*work.shape[3:5], dtype=bool), np.float32(0), np.float32(-np.inf))
        return lambda: attention(*arrays, bias)
    if work.kind == "layer":
        return lambda: layer(*arrays, work.num_heads)
    return lambda: table(*work.shape)


def time_calls(run, seconds):
    """Seconds for each call: all that fit, one at least."""
    times, group = [], 1
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        start = time.perf_counter()
        for _ in range(group):
            run()
        elapsed = time.perf_counter() - start
        if elapsed < CLOCK:
            group *= 2
        else:
            times.append(elapsed / group)
    # What ran before, the other process, has left its own data in the caches: the first call pays for it.
    return times[1:] if len(times) > 2 else times


def rest():
    """Waits until the threads of this process use no more time, one second at most."""
    for _ in range(200):
        used = time.process_time()
        time.sleep(0.005)
        if time.process_time() - used < 0.0005:
            return


def summary(times):
    return {"best": min(times), "median": statistics.median(times), "calls": len(times)}


def main():
    """Requests: ["load", the fields of a Work] and ["measure", seconds]; the end of the input is the end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    run = None
    for line in sys.stdin:
        method, argument = json.loads(line)
        if method == "load":
            run = None  # drops the arrays of the work before
            run = prepared(Work(**argument | {"shape": tuple(argument["shape"])}))
            run()
            answer = None
        else:
            answer = time_calls(run, argument)
        rest()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
