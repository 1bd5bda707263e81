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


def to_bfloat16(weight):
    """The bits, uint16, of a float array rounded to nearest even: NumPy alone has no such dtype."""
    bits = cast(weight, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(weight), bits >> 16 | 64, rounded).astype(np.uint16)


def of_bfloat16(bits):
    """The float32 array that they are the bits of."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
