"""Sinusoidal positions, specified by the functions and the class of the same names in `cattn.reference`."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn import _kernels, reference
from cattn.attention import _carried, _check_out, _kind
from cattn.reference import _check_dtype, _check_table, relative_shift

__all__ = ["PositionalEncoding", "relative_shift", "sinusoidal_encoding"]


def sinusoidal_encoding(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, layout: str = "interleaved",
    endpoint: bool = False, positions: ArrayLike | None = None, dtype: DTypeLike = np.float32,
    out: np.ndarray | None = None,
) -> np.ndarray:
    length, dim, base, offset, endpoint, positions = _check_table(
        length, dim, base, offset, layout, endpoint, positions)
    dtype = _check_dtype(dtype, ("float16", "bfloat16", "float32", "float64"))
    if out is None:
        out = target = np.empty((length, dim), dtype)
    else:
        target = _check_out(out, (length, dim), dtype, {})
    if positions is not None:
        with np.errstate(all="ignore"):  # a long double may be too small for a double
            positions = positions.astype(np.float64, copy=False)
    kind = _kind("out", target)
    _kernels.f32.sinusoid(_carried(target, kind), kind, offset, positions, float(base), layout, endpoint)
    return out


sinusoidal_encoding.__doc__ = reference.sinusoidal_encoding.__doc__


class PositionalEncoding(reference.PositionalEncoding):
    __doc__ = reference.PositionalEncoding.__doc__
    _table = staticmethod(sinusoidal_encoding)
