"""How far a result of attention may be from the exact one: the only tolerances of its tests, all derived here.

Three computations of one call: the kernel's; the same formula in plain NumPy, in the dtype that the kernel computes
in (float32, or float64); and the exact one, the reference in the next wider dtype. Then, with err() the largest
absolute error in an array,

    err(kernel) <= 2 * err(plain) + 4 * eps * scale

The first term lets the kernel lose twice what the formula loses when each of its steps is rounded once: it sums in
another order, and has scaled its scores by log2(e). The second is a few roundings of the largest number that goes
in. `scale` is that number:

    out         max |value|, since out is an average of values. Dropout makes the weights 1 / (1 - dropout_p) larger.
    weights     1, larger likewise: they are `out` for the identity matrix as value.
    logsumexp   1 + max |logsumexp|: it is rounded as a number of its size, and the logarithm of a sum is off by the
                sum's relative error.

It is at least the smallest normal number: below, the spacing of numbers no longer shrinks.

Where few numbers decide the error (small arrays, peaked softmax, equal scores or values), plain NumPy can be right by
luck. err(plain) is then the largest over up to ROUNDINGS problems that differ from this one by rounding alone:
c * query and key / c; where there is a float mask, mask + c - 1; and value / c, whose results and their errors are c
times smaller. Where there are ALiBi slopes, they are 1/4096 larger at most: plain NumPy's biases are exact for slopes
that are powers of two, and the kernel's are not.

A float16 or bfloat16 result is rounded once more, to the nearest: half an ulp of each number on top. A float64
result is compared with longdouble. Where that is no wider than double, nothing more exact is at hand: plain then
stands for exact and the bound is for the sum of two errors, 2 * (4 * eps * scale).

NaN and infinity have no error; they must stand in the same places.
"""

import numpy as np

import cattn
from cattn import reference

ROUNDINGS = 32
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


@np.errstate(all="ignore")
def assert_close(results, query, key, value, compared=True, **options):
    """The results of everything(query, key, value, **options) are as exact as they have to be, in the query rows that
    are `compared`, (..., seq_len_q)."""
    compared = np.asarray(compared)
    for name in ("out", "num_threads"):  # what the reference does not know
        options.pop(name, None)
    compute = np.result_type(query.dtype, np.float32)
    wide = np.dtype(np.float64 if compute == np.float32 else np.longdouble)
    dtypes = query.dtype, query.dtype, compute
    query, key, value = (x.astype(compute) for x in (query, key, value))
    if options.get("attn_mask") is not None:
        options["attn_mask"] = attn_mask = _clipped(np.asarray(options["attn_mask"]), compute)
    biased = options.get("attn_mask") is not None and attn_mask.dtype != bool
    slopes = options.get("alibi_slopes")
    plain, exact = _plain_and_exact(query, key, value, wide, options)
    enlarged = 1 / (1 - options.get("dropout_p", 0.0))
    scales = enlarged * largest(value), enlarged, 1 + largest(np.where(compared, exact[2], 0))

    def relevant(error, number):
        return np.where(compared if number == 2 else compared[..., None], error, 0)

    names = "out", "weights", "logsumexp"
    for number, (name, dtype, result, right) in enumerate(zip(names, dtypes, results, exact, strict=True)):
        assert (result.dtype, result.shape) == (dtype, right.shape), name
        if not compared.any():
            continue
        rounding = float(np.finfo(compute).eps) * max(scales[number], float(np.finfo(compute).smallest_normal))
        error = relevant(errors(result, right, dtype), number)
        if compute == np.float64 and not WIDER_THAN_DOUBLE:
            bound = 8 * rounding
        else:
            bound = 2 * relevant(errors(plain[number], right), number).max(initial=0) + 4 * rounding
            for seed in range(ROUNDINGS):
                if (error <= bound).all():
                    break
                c = compute.type(np.random.default_rng(seed).uniform(1, 2))
                if biased:
                    options["attn_mask"] = attn_mask.astype(compute) + (c - 1)
                if slopes is not None:
                    options["alibi_slopes"] = np.asarray(slopes) * (1 + (c - 1) / 4096)
                again = _plain_and_exact(query * c, key / c, value / c, wide, options)
                worst = relevant(errors(again[0][number], again[1][number]), number).max()
                if name == "out":
                    worst *= float(c)
                bound = max(bound, 2 * worst + 4 * rounding)
        assert np.isfinite(bound), f"{name}: plain NumPy overflows, so it sets no bound"
        worst = np.unravel_index(error.argmax(), error.shape) if error.size else ()
        assert (error <= bound).all(), (
            f"{name}{[int(i) for i in worst]} = {result[worst]}, exactly {right[worst]}: more than {bound:.3g} apart")


def errors(result, exact, dtype=None):
    """|result - exact|, less what rounding to `dtype` accounts for; infinite where one is finite and the other is not,
    or where they are not finite differently."""
    result = result.astype(exact.dtype)
    with np.errstate(invalid="ignore"):
        difference = np.abs(result - exact)
    relative, absolute = HALF_ULP.get(dtype and dtype.name, (0, 0))
    if relative:
        difference = np.maximum(difference - np.maximum(relative * np.abs(result), absolute), 0)
    same = (result == exact) | (np.isnan(result) & np.isnan(exact))
    return np.where(same, 0, np.where(np.isfinite(difference), difference, np.inf))


def largest(array):
    """max |array|, of what is finite."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))


def _clipped(attn_mask, dtype):
    """`attn_mask` with what is beyond the range of `dtype`, but finite, at its ends: so it is specified."""
    if attn_mask.dtype != np.float64 or dtype == np.float64:
        return attn_mask
    return np.where(np.isfinite(attn_mask), attn_mask.clip(np.finfo(dtype).min, np.finfo(dtype).max), attn_mask)


def _plain_and_exact(query, key, value, wide, options):
    return [
        everything(*(x.astype(dtype) for x in (query, key, value)), **options,
                   attention=reference.scaled_dot_product_attention)
        for dtype in (value.dtype, wide)
    ]
