"""Sinusoidal positions, specified by the functions and the class of the same names in `cattn.reference`."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn import _kernels, reference
from cattn.reference import _check_dtype, _check_table, relative_shift

__all__ = ["PositionalEncoding", "relative_shift", "sinusoidal_encoding"]

_KINDS = {"float16": 2, "bfloat16": 3, "float32": 0, "float64": 1}  # as in _kernels/tensor.pxi


def sinusoidal_encoding(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, layout: str = "interleaved",
    endpoint: bool = False, positions: ArrayLike | None = None, dtype: DTypeLike = np.float32,
    out: np.ndarray | None = None,
) -> np.ndarray:
    length, dim, base, offset, positions = _check_table(length, dim, base, offset, layout, endpoint, positions)
    dtype = _check_dtype(dtype, _KINDS)
    if out is None:
        out = target = np.empty((length, dim), dtype)
    else:
        target = _check_out(out, (length, dim), dtype)
    if positions is not None:
        with np.errstate(all="ignore"):  # a long double may be too small for a double
            positions = positions.astype(np.float64, copy=False)
    if dtype.itemsize == 2:  # the buffer protocol has no name for bfloat16 and Cython none for float16
        target = target.view(np.uint16)
    _kernels.f32.sinusoid(target[None, None], _KINDS[dtype.name], offset, positions, float(base), layout,
                          bool(endpoint), 0)
    return out


sinusoidal_encoding.__doc__ = reference.sinusoidal_encoding.__doc__


def _check_out(out, shape, dtype):
    """`out` as a plain array: what a subclass says of its shape and strides need not be true."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}")
    out = np.asarray(out)
    if out.dtype != dtype:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out: expected ({shape[0]}, {shape[1]}), got shape {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")
    extent = out.itemsize  # bytes from the first to the end of the last element, over the axes of smaller strides
    for stride, n in sorted((abs(stride), n) for stride, n in zip(out.strides, shape, strict=True)):
        if out.size and n > 1 and stride < extent:
            raise ValueError(f"out: expected elements that do not overlap each other, got strides {out.strides}")
        extent += stride * (n - 1)
    return out


class PositionalEncoding(reference.PositionalEncoding):
    __doc__ = reference.PositionalEncoding.__doc__
    _table = staticmethod(sinusoidal_encoding)
