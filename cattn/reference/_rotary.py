"""Rotary positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn._checks import as_array, check_bool, check_rotary, check_rotary_table, check_table_dtype, is_float
from cattn.reference._linear import to_bfloat16
from cattn.reference._positional import periods

__all__ = ["rotary_embedding", "rotary_table"]


@np.errstate(all="ignore")
def rotary_table(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, frequencies: ArrayLike | None = None,
    dtype: DTypeLike = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """cos[r, i] = cos(pos * f[i]), sin[r, i] = sin(same), with pos = offset + r and f[i] = base^(-2i / dim).

    cos, sin : arrays (length, dim // 2)

    The angles are computed in float64, in `dtype` where that is wider. The arguments are described at
    `cattn.rotary_table`; `dtype` is any float dtype here.
    """
    length, dim, base, offset, frequencies = check_rotary_table(length, dim, base, offset, frequencies)
    stored, _ = check_table_dtype(dtype)
    dtype = np.dtype(np.float32) if stored == np.uint16 else stored
    wide = np.result_type(dtype, np.float64)
    position = np.arange(offset, offset + length).astype(wide)[:, None]
    angle = position / periods(dim, base, False, wide) if frequencies is None else position * frequencies
    tables = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    return tuple(map(to_bfloat16, tables)) if stored == np.uint16 else tables


@np.errstate(all="ignore")
def rotary_embedding(
    x: ArrayLike, cos: ArrayLike, sin: ArrayLike, positions: ArrayLike | None = None, *, interleaved: bool,
) -> np.ndarray:
    """Each pair (a, b) of x turned by its angle: (a cos - b sin, b cos + a sin).

    x, out : arrays (..., dim)
    cos, sin : (rows, columns), of which `positions` says which, or with the axes of x

    Computed in float32, in the dtype of x where that is wider. The arguments are described at
    `cattn.rotary_embedding`; all float dtypes are taken here.
    """
    arrays = {"x": as_array("x", x), "cos": as_array("cos", cos), "sin": as_array("sin", sin)}
    for name, array in arrays.items():
        if not is_float(array.dtype):
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
    x, cos, sin = arrays.values()
    positions = check_rotary(x, cos, sin, positions)
    columns = cos.shape[-1]
    if check_bool("interleaved", interleaved):
        first, second = slice(0, 2 * columns, 2), slice(1, 2 * columns, 2)
    else:
        first, second = slice(0, columns), slice(columns, 2 * columns)
    compute = np.result_type(x.dtype, np.float32)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    a, b, cos, sin = (array.astype(compute) for array in (x[..., first], x[..., second], cos, sin))
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out
