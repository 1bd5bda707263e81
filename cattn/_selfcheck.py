"""Whether the kernels of this installation are right on this machine: calls of each instruction set that the CPU runs,
compared with cattn.reference. `python -m cattn check` runs it.

With err() the largest absolute error against the reference in float64 (for float64: in long double),

    err(kernel) <= 2 * err(plain NumPy in the dtype that is computed in) + 4 * eps * scale

`scale` is the largest number that goes into an average or a sum. Plain NumPy can be right by luck: where the bound does
not hold at once, err(plain) is the largest over problems that differ from this one by rounding alone. A float16 result
is rounded once more: half an ulp on top. tests/tolerance.py of the sources has the long form.
"""

import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

import cattn
from cattn import _kernels, reference

ROUNDINGS = 32  # as many problems as the tests try
HOPELESS = 8  # times the bound: plain NumPy is never that lucky, so no further problems are tried
WIDER_THAN_DOUBLE = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
CALLS = 300  # a second or two
GROUP = 20  # calls between two looks at the progress


@dataclass
class Result:
    """What the calls of one instruction set gave."""

    calls: int = 0
    worst: float = 0.0  # the largest error in units of its bound, of what is right
    failures: list[str] = field(default_factory=list)


def calls(number=CALLS):
    """As many problems, always the same: of ten, seven of attention, one of its gradients, a layer and a table."""
    kinds = [Attention] * 7 + [Gradient, Layer, Table]
    for seed in range(number):
        yield kinds[seed % len(kinds)](np.random.default_rng(seed))


def run(number=CALLS, isas=None):
    """Yields {instruction set: Result} now and then: the same dictionary, which fills.

    In groups: first all that NumPy computes, then all that cattn does, since the threads of the one spin for a while on
    the CPUs that the other wants.
    """
    results = {isa: Result() for isa in isas or _kernels.available_isas()}
    yield results
    problems = calls(number)
    while group := list(itertools.islice(problems, GROUP)):
        answers = [call.plain_and_exact() for call in group]
        for isa, result in results.items():
            try:
                with kernels_of(isa):
                    got = [_result_or_error(call) for call in group]
            except ImportError as error:  # the module is there, but damaged
                got = [error] * len(group)
            for call, arrays, plain_and_exact in zip(group, got, answers, strict=True):
                result.calls += 1
                if isinstance(arrays, Exception):
                    share, wrong = 0.0, f"{type(arrays).__name__}: {arrays}"
                else:
                    share, wrong = judge(call, arrays, plain_and_exact)
                if wrong:
                    result.failures.append(f"{call}: {wrong}")
                else:
                    result.worst = max(result.worst, share)
        yield results


def _result_or_error(call):
    try:
        return call.run()
    except Exception as error:
        return error


@contextmanager
def kernels_of(isa):
    """Calls go to the modules of this instruction set. For the whole process: nothing else may call meanwhile."""
    before = _kernels.f32, _kernels.f64
    f32, f64 = (_kernels.module_name(isa, precision) for precision in ("f32", "f64"))
    try:
        _kernels.f32, _kernels.f64 = _kernels._load(f32), lambda: _kernels._load(f64)
        yield
    finally:
        _kernels.f32, _kernels.f64 = before


@np.errstate(all="ignore")
def judge(call, got, plain_and_exact):
    """(largest error in units of its bound, "") or (infinity, what is wrong)."""
    plain, exact = plain_and_exact
    share = 0.0
    for number, (name, array, right, scale) in enumerate(zip(call.names, got, exact, call.scales(exact), strict=True)):
        if array.shape != right.shape:
            return math.inf, f"{name}: shape {array.shape} instead of {right.shape}"
        error = errors(array, right)
        rounding = 4 * call.eps * scale
        if call.compute == np.float64 and not WIDER_THAN_DOUBLE:
            bound = 2 * rounding  # the float64 reference stands for the exact one, with an error of its own
        else:
            bound = 2 * errors(plain[number], right).max(initial=0) + rounding
            for c in 1 + np.random.default_rng(0).random(ROUNDINGS) / 64:
                if (error <= bound).all() or (error > HOPELESS * bound).any():
                    break
                other_plain, other_exact = call.plain_and_exact(call.compute(c))
                bound = max(bound, 2 * errors(other_plain[number], other_exact[number]).max() + rounding)
        if not (error <= bound).all():
            worst = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
            return math.inf, (f"{name}[{', '.join(map(str, worst))}] is {array[worst]!s}, exactly {right[worst]!s}: "
                              f"more than {bound:.2g} apart")
        share = max(share, float(error.max(initial=0) / bound))
    return share, ""


def errors(array, exact):
    """|array - exact|, less half an ulp of a float16; infinite where one is NaN or infinite and not the other."""
    difference = np.abs(array.astype(exact.dtype) - exact)
    if array.dtype == np.float16:
        difference = np.maximum(difference - np.maximum(2.0**-11 * np.abs(array.astype(np.float32)), 2.0**-25), 0)
    same = (array == exact) | (np.isnan(array) & np.isnan(exact))
    return np.where(same, 0, np.where(np.isfinite(difference), difference, np.inf))


class Call:
    """A problem: `run` gives it to cattn, `answer` to the reference."""

    names = ("out",)
    compute = np.float32

    @property
    def eps(self):
        return float(np.finfo(self.compute).eps)

    def plain_and_exact(self, c=1):
        """The reference in the dtype computed in and in the next wider one, for numbers that are c times as large."""
        return self.answer(self.compute, c), self.answer(np.float64 if self.compute == np.float32 else np.longdouble, c)


class Attention(Call):
    """Any combination of arguments; float32 mostly."""

    def __init__(self, rng):
        # Few in float64: long double has no BLAS, which takes most of the time of these checks.
        self.dtype = np.dtype(rng.choice(["float32"] * 5 + ["float16"] * 2 + ["float64"]))
        self.compute = np.float64 if self.dtype == np.float64 else np.float32
        kv_dtype = np.dtype("float16") if self.dtype == np.float32 and rng.random() < 0.2 else self.dtype
        batch, num_kv_heads, group = (int(rng.choice(numbers)) for numbers in ([1, 2], [1, 2], [1, 1, 3]))
        # On both sides of the edges of blocks, panels and register tiles.
        seq_len_q = int(rng.choice([1, 1, 2, 5, 8, 9, 16, 33, 65, 97]))
        seq_len_kv = int(rng.choice([1, 3, 8, 64, 65, 129, 257]))
        head_dim, head_dim_v = int(rng.choice([1, 5, 8, 64, 80, 129])), int(rng.choice([1, 8, 64, 67]))
        heads = num_kv_heads * group
        shapes = ((heads, seq_len_q, head_dim), (num_kv_heads, seq_len_kv, head_dim),
                  (num_kv_heads, seq_len_kv, head_dim_v))
        strided = rng.random() < 0.3
        self.arrays = []
        for (count, seq_len, dim), dtype in zip(shapes, (self.dtype, kv_dtype, kv_dtype), strict=True):
            shape = (batch, seq_len, count, dim) if strided else (batch, count, seq_len, dim)
            array = rng.standard_normal(shape).astype(dtype)
            self.arrays.append(array.swapaxes(1, 2) if strided else array)
        choices = {
            "is_causal": lambda: True,
            "window": lambda: (int(rng.integers(0, 70)), int(rng.integers(0, 70))),
            "softcap": lambda: float(rng.uniform(1, 30)),
            "alibi_slopes": lambda: rng.uniform(0, 0.5, heads).astype(np.float32),
            "sinks": lambda: rng.standard_normal(heads).astype(np.float32),
            "kv_lens": lambda: rng.integers(0, seq_len_kv + 1, batch),
            # Not much larger than usual: where scores spread over 20 and more, a single rounding decides, and plain
            # NumPy can be lucky.
            "scale": lambda: float(rng.uniform(-1, 1)) * 1.5 / math.sqrt(head_dim),
            "dropout_p": lambda: 0.25,
        }
        plain = rng.random() < 0.3  # a way of its own through the checks
        self.options = {name: choose() for name, choose in choices.items() if not plain and rng.random() < 0.2}
        if not plain and rng.random() < 0.3:
            mask = rng.standard_normal((seq_len_q, seq_len_kv)).astype(np.float32)
            self.options["attn_mask"] = mask if rng.random() < 0.5 else mask > -1
        if self.options.get("is_causal") or "window" in self.options or "alibi_slopes" in self.options:
            self.options["q_offset"] = int(rng.integers(-3, max(seq_len_kv - seq_len_q, 0) + 1))
        if "dropout_p" in self.options:
            self.options["seed"] = int(rng.integers(2**32))
        self.num_threads = int(rng.integers(1, 5))
        self.everything = {}
        if rng.random() < 0.5:  # the kernels have ways of their own for the result alone
            self.everything = {"return_weights": True, "return_logsumexp": True}
            self.names = ("out", "weights", "logsumexp")

    def run(self):
        result = cattn.scaled_dot_product_attention(
            *self.arrays, **self.options, **self.everything, num_threads=self.num_threads)
        return result if self.everything else (result,)

    def answer(self, dtype, c):
        query, key, value = (x.astype(self.compute) for x in self.arrays)
        arrays = (x.astype(dtype) for x in (query * c, key / c, value))
        result = reference.scaled_dot_product_attention(*arrays, **self.options, **self.everything)
        return result if self.everything else (result,)

    def scales(self, exact):
        enlarged = 1 / (1 - self.options.get("dropout_p", 0.0))
        value = float(np.abs(self.arrays[2].astype(np.float64)).max())
        logsumexp = np.abs(exact[-1][np.isfinite(exact[-1])]).max(initial=0)
        return (enlarged * value, enlarged, 1 + float(logsumexp))[: len(self.names)]

    def __str__(self):
        arrays = [f"{name}={_brief(x)}" for name, x in zip(("query", "key", "value"), self.arrays, strict=True)]
        options = [f"{name}={_brief(x)}" for name, x in (self.options | self.everything).items()]
        return f"scaled_dot_product_attention({', '.join([*arrays, *options, f'num_threads={self.num_threads}'])})"


class Gradient(Attention):
    """Those of query, key and value."""

    def __init__(self, rng):
        super().__init__(rng)
        self.everything, self.names = {}, ("query", "key", "value")
        self.grad_out = rng.standard_normal((*self.arrays[0].shape[:-1], self.arrays[2].shape[-1])).astype(self.dtype)

    def run(self):
        out, logsumexp = cattn.scaled_dot_product_attention(*self.arrays, **self.options, return_logsumexp=True)
        return cattn.scaled_dot_product_attention_backward(
            self.grad_out, *self.arrays, out, logsumexp, **self.options, num_threads=self.num_threads)[:3]

    def answer(self, dtype, c):
        query, key, value = (x.astype(self.compute) for x in self.arrays)
        arrays = [x.astype(dtype) for x in (query * c, key / c, value)]
        out, logsumexp = reference.scaled_dot_product_attention(*arrays, **self.options, return_logsumexp=True)
        if dtype == self.compute:  # the kernel gets it as it is stored
            out = out.astype(self.dtype).astype(dtype)
        return reference.scaled_dot_product_attention_backward(
            self.grad_out.astype(dtype), *arrays, out, logsumexp, **self.options)[:3]

    def scales(self, exact):
        """Sums of the magnitudes of what is added up."""
        query, key, value = (np.abs(x.astype(np.float64)) for x in self.arrays)
        grad_out = np.abs(self.grad_out.astype(np.float64))
        options = {name: x for name, x in self.options.items() if name not in ("dropout_p", "seed")}
        _, weights = reference.scaled_dot_product_attention(
            *(x.astype(np.float64) for x in self.arrays), **options, return_weights=True)
        group = query.shape[1] // key.shape[1]
        key, value = (np.repeat(x, group, axis=1) for x in (key, value))
        enlarged = 1 / (1 - self.options.get("dropout_p", 0.0))
        of_weights = enlarged * grad_out @ value.swapaxes(-1, -2)
        of_scores = weights * (of_weights + (weights * of_weights).sum(axis=-1, keepdims=True))
        of_scores *= abs(self.options.get("scale", 1 / math.sqrt(query.shape[-1])))
        return ((of_scores @ key).max(), group * (of_scores.swapaxes(-1, -2) @ query).max(),
                group * enlarged * (weights.swapaxes(-1, -2) @ grad_out).max())

    def __str__(self):
        return f"gradients of {super().__str__()}"


class Layer(Call):
    """Self-attention between projections."""

    def __init__(self, rng):
        self.dtype = np.dtype(rng.choice(["float32", "float32", "float16", "float64"]))
        self.compute = np.float64 if self.dtype == np.float64 else np.float32
        num_kv_heads = int(rng.choice([1, 2, 4]))
        self.sizes = {"embed_dim": int(rng.choice([16, 64, 100])), "num_heads": 4, "num_kv_heads": num_kv_heads,
                      "input_dim": int(rng.choice([7, 64, 100]))}
        self.x = rng.standard_normal((int(rng.choice([1, 3])), int(rng.choice([1, 8, 33])), self.sizes["input_dim"]))
        self.x = self.x.astype(self.dtype)
        self.is_causal = bool(rng.random() < 0.5)
        self.num_threads = int(rng.integers(1, 5))
        self.layer = cattn.MultiHeadAttention(**self.sizes, dtype=self.dtype, seed=rng)
        for name in ("in_proj_bias", "out_proj_bias"):
            setattr(self.layer, name, rng.standard_normal(len(getattr(self.layer, name))).astype(self.dtype))

    def run(self):
        return (self.layer(self.x, is_causal=self.is_causal, num_threads=self.num_threads),)

    @property
    def eps(self):
        """Of the result: a float16 layer rounds to float16 between its steps."""
        return float(np.finfo(self.dtype).eps)

    def answer(self, dtype, c):
        """Step by step, since a layer has no long double."""
        layer = self.layer
        x = (self.x.astype(self.compute) * self.compute(c)).astype(dtype)
        between = self.dtype if dtype == self.compute else dtype

        def linear(x, weight, bias):
            return (x @ weight.astype(dtype).T + bias.astype(dtype)).astype(between).astype(dtype)

        q, k, v = (layer._split_heads(linear(x, layer.in_proj_weight[rows], layer.in_proj_bias[rows]))
                   for rows in layer._rows())
        heads = reference.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        heads = heads.swapaxes(1, 2).reshape(*x.shape[:2], -1).astype(between).astype(dtype)
        return (linear(heads, layer.out_proj_weight, layer.out_proj_bias),)

    def scales(self, exact):
        return (float(np.abs(exact[0]).max()),)

    def __str__(self):
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        return (f"MultiHeadAttention({sizes}, dtype={self.dtype})({_brief(self.x)}, is_causal={self.is_causal}, "
                f"num_threads={self.num_threads})")


class Table(Call):
    """Positions by sines and cosines."""

    def __init__(self, rng):
        self.dtype = np.dtype(rng.choice(["float32", "float16", "float64"]))
        self.compute = np.float64 if self.dtype == np.float64 else np.float32
        self.size = int(rng.choice([1, 9, 300])), int(rng.choice([1, 2, 64, 129]))
        layout = str(rng.choice(["interleaved", "concatenated", "cosines_first"]))
        self.options = {"offset": int(rng.choice([0, 5, 100_000])), "layout": layout}

    def run(self):
        return (cattn.sinusoidal_encoding(*self.size, **self.options, dtype=self.dtype),)

    def answer(self, dtype, c):
        return (reference.sinusoidal_encoding(*self.size, **self.options, dtype=dtype),)

    def scales(self, exact):
        # Angles are computed in float64: they are off by eps of a position.
        return (1.0 if self.compute == np.float32 else 1.0 + self.options["offset"] + self.size[0],)

    def __str__(self):
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"sinusoidal_encoding({self.size[0]}, {self.size[1]}, {options}, dtype={self.dtype})"


def _brief(x):
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else repr(x)
