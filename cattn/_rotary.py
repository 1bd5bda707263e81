"""Rotary positions, specified by the functions of the same names in `cattn.reference`."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn import _kernels, _threads
from cattn._checks import (
    F64,
    as_array,
    check_bool,
    check_dtype,
    check_kind,
    check_out,
    check_rotary,
    check_rotary_table,
    check_table_kind,
)

__all__ = ["rotary_embedding", "rotary_table"]


def rotary_table(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, frequencies: ArrayLike | None = None,
    dtype: DTypeLike = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """TODO"""
    length, dim, base, offset, frequencies = check_rotary_table(length, dim, base, offset, frequencies)
    dtype = check_dtype(dtype, ("float16", "bfloat16", "float32", "float64"))
    table = np.empty((2, length, dim // 2), dtype)
    _kernels.f32.sinusoid(table, check_kind("table", table), offset, None, frequencies, float(base), None, False)
    return table[0], table[1]


def rotary_embedding(
    x: ArrayLike, cos: ArrayLike, sin: ArrayLike, positions: ArrayLike | None = None, *, interleaved: bool,
    out: np.ndarray | None = None, num_threads: int | None = None,
) -> np.ndarray:
    """TODO"""
    given = x, cos, sin
    x, cos, sin = as_array("x", x), as_array("cos", cos), as_array("sin", sin)
    kind = check_kind("x", x, given[0])
    table_kind = check_table_kind(x, cos, sin, given)
    interleaved = check_bool("interleaved", interleaved)
    positions = check_rotary(x, cos, sin, positions)
    num_threads = 0 if num_threads is None else _threads.checked(num_threads)  # 0: the kernel takes the default
    if out is None:
        out = target = np.empty(x.shape, x.dtype)
    else:
        target = check_out(out, x.shape, x.dtype, {"x": x, "cos": cos, "sin": sin}, itself="x")
    module = _kernels.f64() if kind == F64 else _kernels.f32
    if positions is not None:
        positions = positions.reshape((1,) * (4 - x.ndim) + positions.shape)
    module.rotary(x, cos, sin, positions, target, kind, table_kind, interleaved, num_threads)
    return out
