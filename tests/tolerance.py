"""How far a result of attention may be from the exact one: the only tolerances of its tests, all derived here.

Three computations of one call: the kernel's; the same formula in plain NumPy, in the dtype that the kernel computes
in (float32, or float64); and the exact one, the reference in the next wider dtype. Then, with err() the largest
absolute error in an array,

    err(kernel) <= 2 * err(plain) + 4 * eps * scale

The first term lets the kernel lose twice what the formula loses when each of its steps is rounded once: it sums in
another order, and takes exp2 of differences times log2(e). The second is a few roundings of the largest number that
goes in. `scale` is that number:

    out         max |value|, since out is an average of values. Dropout makes the weights 1 / (1 - dropout_p) larger.
    weights     1, larger likewise: they are `out` for the identity matrix as value.
    logsumexp   1 + max |logsumexp|: it is rounded as a number of its size, and the logarithm of a sum is off by the
                sum's relative error.

It is at least the smallest normal number: below, the spacing of numbers no longer shrinks.

Where few numbers decide the error (small arrays, peaked softmax, equal scores or values), plain NumPy can be right by
luck. err(plain) is then the largest over up to ROUNDINGS problems that differ from this one by rounding alone:
c * query and key / c; where there is a float mask, mask + c - 1; and value / c, whose results and their errors are c
times smaller. assert_within does without: its arrays are large enough.

A float16 or bfloat16 result is rounded once more, to the nearest: half an ulp of each number on top. A float64
result is compared with longdouble. Where that is no wider than double, nothing more exact is at hand: plain then
stands for exact and the bound is for the sum of two errors, 2 * (4 * eps * scale).

NaN and infinity have no error; they must stand in the same places.

Equal numbers in long sums let plain NumPy be right by luck in all of those problems. Results for any numbers at all are
compared with what rounding can do at most, which no plain computation has to measure: assert_possible.
"""

import math

import ml_dtypes
import numpy as np

import cattn
from cattn import reference
from cattn.reference._attention import _scores, aligned, biased, distances, products, scale_of
from cattn.reference._backward import _as_input, _summed_to

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
def assert_close(results, query, key, value, **options):
    """The results of everything(query, key, value, **options) are as exact as they have to be."""
    for name in ("out", "num_threads"):  # what the reference does not know
        options.pop(name, None)
    compute = np.result_type(query.dtype, np.float32)
    wide = np.dtype(np.float64 if compute == np.float32 else np.longdouble)
    dtypes = query.dtype, query.dtype, compute
    query, key, value = (x.astype(compute) for x in (query, key, value))
    options["attn_mask"] = attn_mask = _clipped(options.get("attn_mask"), compute)
    biased = attn_mask is not None and attn_mask.dtype != bool
    plain, exact = _plain_and_exact(query, key, value, wide, options)
    enlarged = 1 / (1 - options.get("dropout_p", 0.0))
    scales = enlarged * largest(value), enlarged, 1 + largest(exact[2])

    names = "out", "weights", "logsumexp"
    for number, (name, dtype, result, right) in enumerate(zip(names, dtypes, results, exact, strict=True)):
        assert (result.dtype, result.shape) == (dtype, right.shape), name
        rounding = float(np.finfo(compute).eps) * max(scales[number], float(np.finfo(compute).smallest_normal))
        error = errors(result, right, dtype)
        if compute == np.float64 and not WIDER_THAN_DOUBLE:
            bound = 8 * rounding
        else:
            bound = 2 * errors(plain[number], right).max(initial=0) + 4 * rounding
            for seed in range(ROUNDINGS):
                if (error <= bound).all():
                    break
                c = compute.type(np.random.default_rng(seed).uniform(1, 2))
                if biased:
                    options["attn_mask"] = attn_mask.astype(compute) + (c - 1)
                again = _plain_and_exact(query * c, key / c, value / c, wide, options)
                worst = errors(again[0][number], again[1][number]).max()
                if name == "out":
                    worst *= float(c)
                bound = max(bound, 2 * worst + 4 * rounding)
        assert np.isfinite(bound), f"{name}: plain NumPy overflows, so it sets no bound"
        worst = np.unravel_index(error.argmax(), error.shape) if error.size else ()
        assert (error <= bound).all(), (
            f"{name}{[int(i) for i in worst]} = {result[worst]}, exactly {right[worst]}: more than {bound:.3g} apart")


@np.errstate(all="ignore")
def assert_gradients_close(gradients, grad_out, query, key, value, out, logsumexp, attn_mask=None, **options):
    """err(kernel) <= 2 * err(plain) + 4 * eps * scale for each of the Gradients that is there, of a backward function
    that was given all of this, and the wanted left away; or of each in a list of several.

    The plain and the exact ones are the reference on these very numbers, out and logsumexp among them, whose own errors
    are not those of the gradients. `scale` is the largest number that the last sum of a gradient may have come to: that
    of the magnitudes of all products, sums instead of differences (_sizes). err(plain) is the largest over ROUNDINGS
    problems, as in assert_close: c * query, key / c, value / c, out / c and c * grad_out have the same scores and the
    same gradients of them.
    """
    compute = np.result_type(query.dtype, np.float32)
    wide = np.dtype(np.float64 if compute == np.float32 else np.longdouble)
    inputs = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    attn_mask = _clipped(attn_mask, compute)
    for name in "alibi_slopes", "sinks":
        if options.get(name) is not None:
            options[name] = np.asarray(options[name]).astype(compute)
    several = gradients if isinstance(gradients, list) else [gradients]
    wanted = [name for name, gradient in several[0]._asdict().items() if gradient is not None]
    arrays = [x.astype(compute) for x in (grad_out, query, key, value, out)]
    sizes = _sizes(*(x.astype(wide) for x in arrays), logsumexp.astype(wide), attn_mask, **options)

    def plain_and_exact(c):
        """As they are for c = 1."""
        scaled = [x * factor for x, factor in zip(arrays, (c, c, 1 / c, 1 / c, 1 / c), strict=True)]
        results = []
        for dtype in (compute, wide):
            mask = attn_mask if attn_mask is None or attn_mask.dtype == bool else attn_mask.astype(dtype)
            results.append(reference.scaled_dot_product_attention_backward(
                *(x.astype(dtype) for x in scaled), logsumexp.astype(dtype), mask, **options, wanted=wanted))
        return results

    problems = [(1.0, plain_and_exact(compute.type(1)))]
    for name in wanted:
        result = np.stack([getattr(gradients, name) for gradients in several])
        right = getattr(problems[0][1][1], name)[None].repeat(len(several), axis=0)
        dtype = inputs[name].dtype if name in inputs else compute
        assert (result.dtype, result.shape) == (dtype, right.shape), name
        error = errors(result, right, dtype)
        rounding = float(np.finfo(compute).eps) * max(float(sizes[name].max(initial=0)),
                                                      float(np.finfo(compute).smallest_normal))
        bound = 4 * rounding
        if compute == np.float64 and not WIDER_THAN_DOUBLE:
            bound = 8 * rounding
        for number in range(1 + ROUNDINGS):
            if number == len(problems):
                c = compute.type(np.random.default_rng(number).uniform(1, 2))
                problems.append((float(c), plain_and_exact(c)))
            c, (plain, exact) = problems[number]
            worst = errors(getattr(plain, name), getattr(exact, name)).max(initial=0)
            bound = max(bound, 2 * worst * {"query": c, "key": 1 / c, "value": 1 / c}.get(name, 1) + 4 * rounding)
            if (error <= bound).all():
                break
        assert np.isfinite(bound), f"{name}: plain NumPy overflows, so it sets no bound"
        worst = np.unravel_index(error.argmax(), error.shape) if error.size else ()
        assert (error <= bound).all(), (
            f"{name}{[int(i) for i in worst]} = {result[worst]}, exactly {right[worst]}: more than {bound:.3g} apart")


def _sizes(grad_out, query, key, value, out, logsumexp, attn_mask, dropout_p=0.0, is_causal=False, scale=None,
           enable_gqa=False, *, q_offset=None, window=None, softcap=0.0, alibi_slopes=None, sinks=None, kv_lens=None,
           kv_starts=None, seed=None, grad_logsumexp=None):
    """{name: what its gradient would be at most if no two numbers in its sums had different signs}: without what sinks,
    softcap and dropout make smaller."""
    inputs, one_head = (query, key, value), query.ndim < 4
    query, key, value, mask = aligned(*inputs, attn_mask)
    grad_logsumexp = np.zeros_like(logsumexp) if grad_logsumexp is None else grad_logsumexp
    if one_head:
        grad_out, out = grad_out[..., None, :, :], out[..., None, :, :]
        logsumexp, grad_logsumexp = logsumexp[..., None, :], grad_logsumexp[..., None, :]
    distance = distances(query.shape[-2], key.shape[-2], q_offset, kv_lens)
    scores, visible = biased(products(query, key, scale, softcap), distance, mask, is_causal, window=window,
                             alibi_slopes=alibi_slopes, kv_lens=kv_lens, kv_starts=kv_starts)
    seeing = logsumexp != -np.inf
    probs = np.where(visible & seeing[..., None], np.exp(scores - logsumexp[..., None]), 0)
    probs, grad_out, query, key, value, out, grad_logsumexp = (
        np.where(np.isfinite(x), np.abs(x), 0) for x in (probs, grad_out, query, key, value, out, grad_logsumexp))
    enlarged, delta = 1 / (1 - dropout_p), (grad_out * out).sum(axis=-1)
    of_scores = probs * (enlarged * (grad_out @ value.swapaxes(-1, -2)) + (delta + grad_logsumexp)[..., None])
    of_products = abs(scale_of(query, scale)) * of_scores
    sizes = {"query": of_products @ key, "key": of_products.swapaxes(-1, -2) @ query,
             "value": enlarged * probs.swapaxes(-1, -2) @ grad_out}
    sizes = {name: _as_input(size, given, one_head)
             for (name, size), given in zip(sizes.items(), inputs, strict=True)}
    sizes["attn_mask"] = of_scores if mask is None else _summed_to(np.shape(mask), of_scores)
    for name, vector, of_heads in (("alibi_slopes", alibi_slopes, (of_scores * np.abs(distance)).sum(axis=(-1, -2))),
                                   ("sinks", sinks, np.where(seeing, delta, 0).sum(axis=-1))):
        sizes[name] = of_heads if vector is None else _summed_to(np.shape(vector), of_heads)
    return sizes


@np.errstate(all="ignore")
def assert_within(results, query, key, value, **options):
    """err(kernel) <= 2 * err(plain) + 4 * eps * scale as it stands, for plain NumPy on these very numbers; float32."""
    plain, exact = _plain_and_exact(query, key, value, np.dtype(np.float64), options)
    scales = largest(value), 1, 1 + largest(exact[2])
    for name, result, of_plain, right, scale in zip(("out", "weights", "logsumexp"), results, plain, exact, scales,
                                                    strict=True):
        assert (result.dtype, result.shape) == (of_plain.dtype, of_plain.shape), name
        error, bound = errors(result, right).max(), 2 * errors(of_plain, right).max() + 4 * np.finfo("f4").eps * scale
        assert np.isfinite(bound), name
        assert error <= bound, f"{name}: {error:.3g} from the exact one, {error / bound:.2f} times what is promised"


@np.errstate(all="ignore")
def assert_possible(results, query, key, value, attn_mask=None, scale=None, *, softcap=0.0, alibi_slopes=None,
                    sinks=None, dropout_p=0.0, seed=None, enable_gqa=False, q_offset=0, **masks):
    """Rounding accounts for the errors of everything(query, key, value, ...) in the query rows that are _specified:
    each step rounds by u = eps / 2, sums have any order, scores any unit.

    At most, with e() for the error of a number,

        e(x y)        u (head_dim + 4) sum |x y|; of the 4, 3 for the unit and the scale. And what becomes subnormal:
                      half the smallest number for each product, times the scale, and for the scale, times the sum
        e(capped)     what e(x y) makes of c tanh(x y / c), and u |capped| 10 times: tanh is within 5 u, c and 1 / c are
                      rounded, and multiplied by
        e(score)      e(capped) + 6 u (|score| + |mask| + |ALiBi|): two sums, each bias is rounded and changes its unit
                      (4.3), and the score is taken from the maximum
        e(sink)       4 u |sink|
        e(weight)     weight (exp(2 e) - 1), for the largest e(score) of a row: exp(score) is off by a factor of
                      exp(e) at most, and so is the sum of all. Of the keys that may count beside the largest score
                      alone, and nothing where that is one key.
                      And 2 u (seq_len_kv + 20) weight: exponentials, changes of the maximum, both sums over keys
        e(out)        sum e(weight) |value|
        e(logsumexp)  the largest e(score), without the sinks; u (seq_len_kv + 20), and u |logsumexp| 4 times

    and 4 eps of the scale of assert_close for what becomes subnormal: worst cases, hundreds of times what happens where
    sums are long.
    """
    if query.ndim < 4:
        if np.ndim(attn_mask) > 2:
            attn_mask = np.expand_dims(attn_mask, -3)
        results = [np.expand_dims(x, axis) for x, axis in zip(results, (-3, -3, -2), strict=True)]
        query, key, value = (np.expand_dims(x, -3) for x in (query, key, value))
    dtype = np.result_type(query.dtype, np.float32)
    wide = np.dtype(np.float64 if dtype == np.float32 else np.longdouble)
    dtypes = query.dtype, query.dtype, dtype
    info = np.finfo(dtype)
    unit = float(info.eps) / 2 * (1 if np.finfo(wide).eps < info.eps else 2)
    attn_mask = _clipped(attn_mask, dtype)
    query, key, value = (x.astype(dtype).astype(wide) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[-3] // key.shape[-3], axis=-3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    masks["q_offset"] = q_offset
    modifiers = {"softcap": softcap, "alibi_slopes": alibi_slopes}
    exact = everything(query, key, value, attn_mask, dropout_p, scale=scale, sinks=sinks, seed=seed, **modifiers,
                       **masks, attention=reference.scaled_dot_product_attention)
    _, weights, logsumexp = exact
    query = np.broadcast_to(query, (*weights.shape[:-1], query.shape[-1]))

    sizes = [np.abs(np.where(np.isfinite(x), x, 0)) for x in (query, key, value)]
    sums = sizes[0] @ sizes[1].swapaxes(-1, -2)
    smallest = float(info.smallest_subnormal)
    error = (unit * (query.shape[-1] + 4) * abs(scale) * sums
             + smallest * (query.shape[-1] * abs(scale) + np.where(abs(scale) < info.smallest_normal, sums, 0)))
    if softcap:
        products = scale * (query @ key.swapaxes(-1, -2))
        low, capped, high = (softcap * np.tanh(x / softcap) for x in (products - error, products, products + error))
        error = np.maximum(high - capped, capped - low) + 10 * unit * np.abs(capped)
    scores, visible = _scores(query, key, attn_mask, scale=scale, **modifiers, **masks)
    of_biases, _ = _scores(  # |mask| + |ALiBi|
        0 * sizes[0], 0 * sizes[1], attn_mask if attn_mask is None else np.abs(attn_mask),
        alibi_slopes=None if alibi_slopes is None else -np.abs(alibi_slopes), **masks)
    error = np.where(visible, error + 6 * unit * (np.abs(scores) + of_biases), 0)

    def largest_error(scores, error):
        """Of those that count in a row, (..., 1), and which count: exp(-750) is 0 in double."""
        count = scores + error >= (scores - error).max(axis=-1, keepdims=True, initial=-np.inf) - 750
        return np.where(count, error, 0).max(axis=-1, keepdims=True, initial=0), count

    rounding = unit * (key.shape[-2] + 20)
    shift, count = largest_error(scores, error)
    of_logsumexp = shift[..., 0] + rounding + 4 * unit * np.abs(np.where(np.isfinite(logsumexp), logsumexp, 0))
    if sinks is not None:
        sinks = np.broadcast_to(np.asarray(sinks).astype(dtype).astype(wide)[:, None, None], (*scores.shape[:-1], 1))
        shift, count = largest_error(np.concatenate([scores, sinks], axis=-1),
                                     np.concatenate([error, 4 * unit * np.abs(sinks)], axis=-1))
    growth = np.where(count.sum(axis=-1, keepdims=True) < 2, 0, np.expm1(2 * shift)) + 2 * rounding
    enlarged = 1 / (1 - dropout_p)
    of_weights = np.where(visible & count[..., : key.shape[-2]], np.fmin(growth * weights, enlarged), 0)

    farthest = np.abs(np.asarray(q_offset, float)).max(initial=0) + visible.shape[-2] + visible.shape[-1]
    reach = 0.0 if alibi_slopes is None else min(np.abs(alibi_slopes).max(initial=0), float(info.max) / 4) * farthest
    kept = 1 - dropout_p
    compared = _specified(sums, value, scale, weights * kept, of_weights * kept, visible, reach, info)
    # What dropout enlarges may leave the range of the result.
    compared &= enlarged * largest(value) <= 0.99 * float(ml_dtypes.finfo(dtypes[0]).max)

    names = "out", "weights", "logsumexp"
    bounds = of_weights @ sizes[2], of_weights, of_logsumexp
    scales = enlarged * largest(value), enlarged, 1.0
    for name, result, right, bound, largest_number, its_dtype in zip(
            names, results, exact, bounds, scales, dtypes, strict=True):
        assert (result.dtype, result.shape) == (its_dtype, right.shape), name
        bound = bound + 4 * float(info.eps) * max(largest_number, float(info.smallest_normal))
        rows = compared if name == "logsumexp" else compared[..., None]
        wrong = ~(errors(result, right, its_dtype) <= bound) & rows
        first = tuple(int(i[0]) for i in np.nonzero(wrong)) if wrong.any() else ()
        assert not wrong.any(), (
            f"{name}{list(first)} = {result[first]}, exactly {right[first]}: rounding makes them differ by "
            f"{np.broadcast_to(bound, right.shape)[first]:.3g} at most")


def merged(outputs, logsumexps, sinks=None, of_outputs=0.0, of_logsumexps=0.0):
    """(out, logsumexp) of merge_states in the next wider dtype, and what rounding can make of each at most. of_outputs
    and of_logsumexps, arrays of n or broadcast to them: how far what is merged may be from what is given here.

    With u = eps / 2, n states, a sink counted as one more, d the distance of a state's logsumexp from the largest:

        e(weight)     u (3 d + 10) weight: a difference, log2(e), their product, exp2 (3 u), and with a sink two more
                      products; and e(its logsumexp) weight. And u (n + 2) weight and the errors of all the weights, in
                      the sum that each is divided by. And the smallest normal number, below which a weight may be 0
        e(out)        sum e(weight) |output|, u n sum weight |output|: a chain of n FMAs. And sum weight e(output)
        e(logsumexp)  the relative error of the sum, and u (4 + 4 |logsumexp|): a logarithm, a sum, in double or not
    """
    outputs, logsumexps = np.stack([*outputs]), np.stack([*logsumexps])
    dtype = logsumexps.dtype
    wide = np.dtype(np.float64 if dtype == np.float32 else np.longdouble)
    info, n = np.finfo(dtype), len(outputs) + (sinks is not None)
    unit = float(info.eps) / 2 * (1 if np.finfo(wide).eps < info.eps else 2)
    outputs, logsumexps = outputs.astype(dtype).astype(wide), logsumexps.astype(wide)
    if sinks is not None:
        sinks = np.broadcast_to(np.asarray(sinks).astype(dtype).astype(wide), logsumexps.shape[1:])
    out, logsumexp = reference.merge_states(outputs, logsumexps, sinks=sinks)

    def of_weights(states, of_states):
        """weights, their errors."""
        total = np.logaddexp.reduce(states, axis=0)
        weights = np.where(states == -np.inf, 0, np.exp(states - total))
        error = unit * (3 * np.abs(states - states.max(axis=0)) + 10) + of_states
        error = np.where(weights > 0, weights * np.expm1(error), 0)
        return weights, error + weights * (error.sum(axis=0) + unit * (n + 2)) + float(info.smallest_normal)

    of_logsumexps = np.broadcast_to(of_logsumexps, logsumexps.shape)
    weights, error = of_weights(logsumexps, of_logsumexps)
    of_logsumexp = np.abs(error).sum(axis=0) + 4 * unit * (1 + np.abs(logsumexp))
    if sinks is not None:
        weights, error = of_weights(np.concatenate([logsumexps, sinks[None]]),
                                    np.concatenate([of_logsumexps, np.zeros_like(sinks)[None]]))
    weights, error = (x[: len(outputs), ..., None] for x in (weights, error))
    of_out = ((error + unit * n * weights) * np.abs(np.where(np.isfinite(outputs), outputs, 0))).sum(axis=0)
    of_out += (weights * of_outputs).sum(axis=0) + n * float(info.smallest_subnormal)
    return (out, of_out), (logsumexp, of_logsumexp)


@np.errstate(all="ignore")
def assert_merged(results, outputs, logsumexps, sinks=None, **given):
    """Rounding accounts for the errors of merge_states(outputs, logsumexps, sinks=sinks)."""
    dtypes = outputs[0].dtype, logsumexps[0].dtype
    for name, result, (right, bound), dtype in zip(
            ("out", "logsumexp"), results, merged(outputs, logsumexps, sinks, **given), dtypes, strict=True):
        assert (result.dtype, result.shape) == (dtype, right.shape), name
        error = errors(result, right, dtype)
        wrong = ~((error <= bound) | (error == 0))
        first = tuple(int(i[0]) for i in np.nonzero(wrong)) if wrong.any() else ()
        assert not wrong.any(), (f"{name}{list(first)} = {result[first]}, exactly {right[first]}: rounding makes them "
                                 f"differ by {bound[first]:.3g} at most")


def _specified(sums, value, scale, weights, of_weights, visible, reach, info):
    """The query rows whose results are specified but for rounding: (..., num_heads, seq_len_q), bool. `sums` are those
    of |query * key|. Not those

    * whose products, scores or ALiBi (`reach`) leave a quarter of the range: there it depends on order what overflows;
    * that give an infinite value a weight that may be below the smallest normal number: it may become 0, and 0 * inf is
      NaN.
    """
    limit, tiny = float(info.max) / 4, float(info.smallest_normal)
    within = np.where(visible, sums, 0).max(axis=-1, initial=0) * max(abs(scale), 1.0) <= limit
    lost = np.isinf(value).any(axis=-1)[..., None, :] & (weights + of_weights > 0) & (weights - of_weights < tiny)
    return within & (reach <= limit) & ~lost.any(axis=-1)


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
    """`attn_mask` with what is finite in it within a quarter of the range of `dtype`, as is specified; an array."""
    if attn_mask is None:
        return None
    attn_mask = np.asarray(attn_mask)
    if attn_mask.dtype == bool:
        return attn_mask
    attn_mask, limit = attn_mask.astype(np.float64), float(np.finfo(dtype).max) / 4
    return np.where(np.isinf(attn_mask), attn_mask, attn_mask.clip(-limit, limit))


def _plain_and_exact(query, key, value, wide, options):
    return [
        everything(*(x.astype(dtype) for x in (query, key, value)), **options,
                   attention=reference.scaled_dot_product_attention)
        for dtype in (value.dtype, wide)
    ]
