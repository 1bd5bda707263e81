"""Sinusoidal positions, specified by the functions and the class of the same names in `cattn.reference`."""

import numpy as np
from numpy.typing import DTypeLike

from cattn import _kernels, reference
from cattn.reference import _check_dtype, _check_table, relative_shift

__all__ = ["PositionalEncoding", "relative_shift", "sinusoidal_encoding"]


def sinusoidal_encoding(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, layout: str = "interleaved",
    dtype: DTypeLike = np.float32, out: np.ndarray | None = None,
) -> np.ndarray:
    length, dim, base, offset = _check_table(length, dim, base, offset, layout)
    dtype = _check_dtype(dtype, ("float16", "float32", "float64"))
    if out is None:
        out = np.empty((length, dim), dtype)
    elif not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}")
    elif out.dtype != dtype:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}")
    elif out.shape != (length, dim):
        raise ValueError(f"out: expected ({length}, {dim}), got shape {out.shape}")
    elif not out.flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")

    table = out
    if dtype == np.float16:
        table = np.empty(out.shape, np.float64)
    elif not out.flags.carray:
        table = np.empty(out.shape, dtype)
    _kernels.sinusoid(table, offset, float(base), layout == "concatenated", 0)
    if table is not out:
        out[...] = table
    return out


sinusoidal_encoding.__doc__ = reference.sinusoidal_encoding.__doc__


class PositionalEncoding(reference.PositionalEncoding):
    __doc__ = reference.PositionalEncoding.__doc__
    _table = staticmethod(sinusoidal_encoding)
