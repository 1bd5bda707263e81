"""The door to the kernel of linear layers, specified by the function of the same name in `cattn.reference`."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike

from cattn import _kernels, _threads
from cattn._checks import F32, F64, as_array, check_kind, check_linear, check_vector, out_or_new

__all__ = ["linear"]


def linear(
    x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, *, weight_scales: ArrayLike | None = None,
    out: np.ndarray | None = None, num_threads: int | None = None,
) -> np.ndarray:
    """x @ weight^T + bias, with weights of 32, 16 or 8 bits: out[..., o] = sum_i x[..., i] * weight[o, i] + bias[o].

    Parameters
    ----------
    x : float array (..., in_features)
        float32, float64, float16 or bfloat16. Computed in float32, or in float64 where x is that.
    weight : array (out_features, in_features)
        In the dtype of x, float16 or bfloat16; or int8, with its scales. As state dicts have it, and read where it
        lies: nothing is packed or widened as a whole.
    bias : float array (out_features,), optional
        Added in the dtype computed in.
    weight_scales : float32 array (out_features, ceil(in_features / 32)), with an int8 weight
        One for each 32 numbers of a row, the last ones of which may be fewer: weight[o, i] stands for
        weight[o, i] * weight_scales[o, i // 32], rounded to float32. `cattn.reference.quantize_rows` makes both.
    out : array (..., out_features) of the dtype of x, optional
        Written and returned; any strides.
    num_threads : int, optional
        Threads of this call; as `set_num_threads` says when None.

    Returns
    -------
    out : array (..., out_features), dtype of x

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is written.

    Notes
    -----
    Each number of the result is one chain of sums in an order of its own: the bits of a row depend on no other row,
    not on how many there are, and not on the number of threads. A weight of 16 or 8 bits gives the bits of the float32
    (or float64) array of the same numbers.

    Groups of 32 with a scale, without an offset, are Q8_0 of llama.cpp, whose scales are float16 there.

    Examples
    --------
    >>> x = np.array([[1, 2, 3]], np.float32)
    >>> weight = np.array([[1, 0, 0], [0, 4, 1]], np.int8)
    >>> linear(x, weight, weight_scales=np.array([[0.5], [0.25]], np.float32))
    array([[0.5 , 2.75]], dtype=float32)
    >>> bool((linear(x, weight.astype(np.float16)) == linear(x, weight.astype(np.float32))).all())
    True
    """
    given = x, weight, weight_scales
    x, weight = as_array("x", x), as_array("weight", weight)
    scales = None if weight_scales is None else as_array("weight_scales", weight_scales)
    kind, weight_kind = check_linear(x, weight, scales, given)
    real_kind, dtype = (F64, np.float64) if kind == F64 else (F32, np.float32)
    if bias is not None:
        bias = check_vector("bias", bias, ((len(weight),),), dtype)
    num_threads = 0 if num_threads is None else _threads.checked(num_threads)
    shape = (*x.shape[:-1], len(weight))
    out, target = out_or_new(out, shape, x.dtype, {"x": x, "weight": weight, "bias": bias, "weight_scales": scales})
    module = _kernels.f64() if kind == F64 else _kernels.f32
    for rows, result in _three_axes(x, target):
        module.linear(rows, weight, scales, bias, result, kind, weight_kind, real_kind, num_threads)
    return out


def _three_axes(x, out):
    """Views of both with at most 3 axes: one of all rows, where these lie one after the other, else one for each index
    of the axes before."""
    if x.ndim <= 3:
        return [(x, out)]
    if x.flags.c_contiguous and out.flags.c_contiguous:
        rows = math.prod(x.shape[:-1])
        return [(x.reshape(rows, x.shape[-1]), out.reshape(rows, out.shape[-1]))]
    return ((x[index], out[index]) for index in itertools.product(*map(range, x.shape[:-3])))


def linear_backward(grad_out, x, weight, with_bias, num_threads):
    """(grad_x, grad_weight, grad_bias) of x @ weight^T + bias, given those of the result; grad_bias is None but
    `with_bias`. x and grad_out: 2 or 3 axes, the dtype of the weight, any strides. As exact as `linear`; grad_bias is
    summed in float64, of float64 with what rounding takes. The bits depend on no number of threads. Rows of x whose
    grad_out is 0 everywhere add nothing to grad_weight, whatever stands in them: padding."""
    kind = check_kind("x", x)
    module = _kernels.f64() if kind == F64 else _kernels.f32
    num_threads = 0 if num_threads is None else _threads.checked(num_threads)
    grad_x, grad_weight = np.empty(x.shape, x.dtype), np.empty(weight.shape, x.dtype)
    module.linear(grad_out, weight.T, None, None, grad_x, kind, kind, kind, num_threads)
    rows = math.prod(x.shape[:-1])  # as views, or else copies: of a slice of a batch's sequences, say
    grad_rows, x_rows = (array.reshape(rows, array.shape[-1]) for array in (grad_out, x))
    module.linear(grad_rows.T, x_rows.T, None, None, grad_weight, kind, kind, kind, num_threads)
    if not np.isfinite(grad_weight).all():  # 0 * NaN, perhaps
        used = grad_rows.any(axis=1, keepdims=True)
        if not used.all():
            x_rows = np.where(used, x_rows, x_rows.dtype.type(0))
            module.linear(grad_rows.T, x_rows.T, None, None, grad_weight, kind, kind, kind, num_threads)
    grad_bias = None
    if with_bias:
        grad_bias = np.empty(len(weight), x.dtype)
        module.column_sums(grad_out, grad_bias, kind, num_threads)
    return grad_x, grad_weight, grad_bias
