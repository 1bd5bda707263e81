"""How far a result of attention may be from the exact one: the only tolerances of its tests, all derived here.

Three computations of one call: the kernel's; the same formula in plain NumPy, in the dtype that the kernel computes
in (float32, or float64); and the exact one, the reference in the next wider dtype. Then, with err() the largest
absolute error in an array,

    err(kernel) <= 2 * err(plain) + 4 * eps * scale

The first term lets the kernel lose twice what the formula loses when each of its steps is rounded once: it sums in
another order, and has scaled its scores by log2(e). The second is a few roundings of the largest number that goes
in, for arrays so small that plain NumPy is right by luck. `scale` is that number:

    out         max |value|, since out is an average of values. Dropout makes the weights 1 / (1 - dropout_p) larger.
    weights     1, larger likewise: they are `out` for the identity matrix as value.
    logsumexp   1 + max |logsumexp|: it is rounded as a number of its size, and the logarithm of a sum is off by the
                sum's relative error.

A float16 or bfloat16 result is rounded once more, to the nearest: half an ulp of each number on top. A float64
result is compared with longdouble. Where that is no wider than double, nothing more exact is at hand: plain then
stands for exact and the bound is for the sum of two errors, 2 * (4 * eps * scale).

NaN and infinity have no error; they must stand in the same places.
"""

import numpy as np

import cattn
from cattn import reference

WIDER_THAN_DOUBLE = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps

# Half an ulp of x is at most the first number times |x|, and the second where x is subnormal.
HALF_ULP = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}


def everything(*arrays, attention=cattn.scaled_dot_product_attention, **options):
    """(out, weights, logsumexp)."""
    return attention(*arrays, **options, return_weights=True, return_logsumexp=True)


def check(query, key, value, **options):
    """(out, weights, logsumexp) of cattn's attention, all three close enough to the exact ones."""
    results = everything(query, key, value, **options)
    assert_close(results, query, key, value, **options)
    return results


def assert_close(results, query, key, value, **options):
    """The results of everything(query, key, value, **options) are as exact as they have to be."""
    for name in ("out", "num_threads"):  # what the reference does not know
        options.pop(name, None)
    compute = np.result_type(query.dtype, np.float32)
    wide = np.dtype(np.float64 if compute == np.float32 else np.longdouble)
    plain, exact = (
        everything(*(x.astype(dtype) for x in (query, key, value)), **options,
                   attention=reference.scaled_dot_product_attention)
        for dtype in (compute, wide)
    )
    eps = float(np.finfo(compute).eps)
    enlarged = 1 / (1 - options.get("dropout_p", 0.0))
    scales = enlarged * largest(value.astype(wide)), enlarged, 1 + largest(exact[2])
    dtypes = query.dtype, query.dtype, compute
    names = "out", "weights", "logsumexp"
    for name, dtype, result, rough, right, scale in zip(names, dtypes, results, plain, exact, scales, strict=True):
        assert (result.dtype, result.shape) == (dtype, right.shape), name
        if compute == np.float64 and not WIDER_THAN_DOUBLE:
            bound = 8 * eps * scale
        else:
            bound = 2 * errors(rough, right).max(initial=0) + 4 * eps * scale
        assert np.isfinite(bound), f"{name}: plain NumPy overflows, so it sets no bound"
        relative, absolute = HALF_ULP.get(dtype.name, (0, 0))
        rounding = np.maximum(relative * (np.abs(right) + bound), absolute)
        excess = errors(result, right) - np.where(np.isfinite(right), bound + rounding, 0)
        worst = np.unravel_index(excess.argmax(), excess.shape) if excess.size else None
        assert worst is None or excess[worst] <= 0, (
            f"{name}{[int(i) for i in worst]} = {result[worst]}, exactly {right[worst]}: more than {bound} apart")


def errors(result, exact):
    """|result - exact|; infinite where one is finite and the other is not, or where they are not finite differently."""
    result = result.astype(exact.dtype)
    with np.errstate(invalid="ignore"):
        difference = np.abs(result - exact)
    same = (result == exact) | (np.isnan(result) & np.isnan(exact))
    return np.where(same, 0, np.where(np.isfinite(difference), difference, np.inf))


def largest(array):
    """max |array|, of what is finite."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))
