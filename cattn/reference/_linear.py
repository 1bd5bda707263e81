"""Linear layers, also of weights in 16 or 8 bits; and how weights come into those."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cattn._checks import SCALE_DIMS, cast
from cattn.reference._attention import compute_dtype

__all__ = ["linear"]


@np.errstate(all="ignore")
def linear(
    x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, *, weight_scales: ArrayLike | None = None,
) -> np.ndarray:
    """x @ weight^T + bias: see `cattn.linear`. Computed in float32, or in the dtype of x where that is wider.

    x : float array (..., in_features)
    weight : array (out_features, in_features)
    bias : array (out_features,), or None
    weight_scales : array (out_features, ceil(in_features / 32)) with an int8 weight, which is then
        weight[o, i] * weight_scales[o, i // 32], rounded to float32
    out : array (..., out_features), dtype of x

    The arguments are described there. This checks nothing.
    """
    x, weight = np.asarray(x), np.asarray(weight)
    dtype = compute_dtype(x)
    if weight_scales is not None:
        weight = dequantized(weight, np.asarray(weight_scales))
    out = x.astype(dtype, copy=False) @ weight.astype(dtype, copy=False).T
    if bias is not None:
        out += bias
    return out.astype(x.dtype, copy=False)


@np.errstate(all="ignore")
def linear_backward(grad_out, x, weight, has_bias):
    """The gradients of sum(grad_out * (x @ weight^T + bias)) by x, weight and bias, in the dtype of x; None for a bias
    that is not there.

    grad_out : array (..., out_features); x : array (..., in_features); weight : array (out_features, in_features)

    Rows of x whose grad_out is 0 everywhere add nothing to the weight's gradient, whatever stands in them: padding.
    """
    dtype = compute_dtype(x)
    grad_out, wide_x = grad_out.astype(dtype, copy=False), x.astype(dtype, copy=False)
    grad_x = grad_out @ weight.astype(dtype, copy=False)
    rows = grad_out.reshape(-1, len(weight))
    used = rows.any(axis=1)
    grad_weight = rows[used].T @ wide_x.reshape(-1, x.shape[-1])[used]
    grad_bias = rows.sum(axis=0, dtype=np.result_type(dtype, np.float64)) if has_bias else None
    return tuple(None if gradient is None else gradient.astype(x.dtype, copy=False)
                 for gradient in (grad_x, grad_weight, grad_bias))


def dequantized(weight, scales):
    """The float32 array that int8 numbers and their scales stand for."""
    return weight * np.repeat(scales, SCALE_DIMS, axis=1)[:, : weight.shape[1]]


@np.errstate(all="ignore")
def quantize_rows(weight):
    """(numbers, scales) of a float array (out_features, in_features): int8 and float32, weight_scales of `linear`.

    Symmetric: a group's scale is its largest magnitude / 127, its numbers are weight / scale rounded to nearest even,
    so that each is off by half a scale at most. A group with an infinity or NaN becomes NaN."""
    weight = cast(weight, np.float32)
    out_features, in_features = weight.shape
    numbers = np.empty(weight.shape, np.int8)
    scales = np.empty((out_features, -(-in_features // SCALE_DIMS)), np.float32)
    for group in range(scales.shape[1]):
        part = weight[:, group * SCALE_DIMS : (group + 1) * SCALE_DIMS]
        scale = scales[:, group] = np.abs(part).max(axis=1) / np.float32(127)
        ratio = np.rint(part / scale[:, None])  # NaN where the scale is 0 or infinite
        numbers[:, group * SCALE_DIMS : (group + 1) * SCALE_DIMS] = np.clip(np.nan_to_num(ratio, nan=0), -127, 127)
    return numbers, scales


class StoredWeight:
    """A weight (out_features, in_features) in fewer bits, as a layer with weight_dtype keeps it: float16; bfloat16 as
    uint16, its bits, since NumPy alone has no such dtype; or int8, with scales."""

    def __init__(self, dtype, numbers, scales=None):
        self.dtype, self.numbers, self.scales = dtype, numbers, scales
        self.shape = numbers.shape

    @classmethod
    def of(cls, weight, dtype):
        """Rounded to nearest even; float64 by way of float32."""
        weight = cast(weight, np.float32)
        if dtype == "int8":
            return cls(dtype, *quantize_rows(weight))
        return cls(dtype, cast(weight, np.float16) if dtype == "float16" else to_bfloat16(weight))

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, rows):
        return StoredWeight(self.dtype, self.numbers[rows], None if self.scales is None else self.scales[rows])

    @np.errstate(all="ignore")
    def widened(self):
        """The float32 array that it stands for."""
        if self.dtype == "int8":
            return dequantized(self.numbers, self.scales)
        if self.dtype == "bfloat16":
            return (self.numbers.astype(np.uint32) << 16).view(np.float32)
        return self.numbers.astype(np.float32)


def to_bfloat16(weight):
    """The bits, uint16, of a float32 array, rounded to nearest even."""
    bits = np.ascontiguousarray(weight).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(weight), bits >> 16 | 64, rounded).astype(np.uint16)
