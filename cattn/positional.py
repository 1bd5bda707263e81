"""Sinusoidal positions, specified by the functions and the class of the same names in `cattn.reference`."""

import numpy as np
from numpy.typing import DTypeLike

from cattn import _kernels, reference
from cattn.reference import _check_dtype, _check_table, relative_shift
from cattn.threads import get_num_threads

__all__ = ["PositionalEncoding", "relative_shift", "sinusoidal_encoding"]


def sinusoidal_encoding(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, layout: str = "interleaved",
    dtype: DTypeLike = np.float32, out: np.ndarray | None = None,
) -> np.ndarray:
    """P[r, 2i] = sin(pos / base^(2i / dim)), P[r, 2i + 1] = cos(same), with pos = offset + r.

    Within half a float32 ulp of 1.0, 2**-24, of the exact value for every position up to 1e8 (float16:
    rounded to it from there).

    Parameters
    ----------
    length : int >= 0
        Number of positions.
    dim : int >= 1
        Number of columns. An odd dim has one sine more than cosines.
    base : float >= 1
    offset : int
        First position; may be negative.
    layout : str
        "interleaved": sin, cos, sin, cos, ...; "concatenated": all sines, then all cosines.
    dtype : float16, float32 or float64
    out : array (length, dim) of this dtype, optional
        Written and returned; any strides.

    Returns
    -------
    table : array (length, dim)

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is written.

    Notes
    -----
    Vaswani et al. 2017, "Attention is all you need", section 3.5 (interleaved); "concatenated" is
    tensor2tensor's.

    Examples
    --------
    >>> sinusoidal_encoding(3, 4).round(3)
    array([[ 0.   ,  1.   ,  0.   ,  1.   ],
           [ 0.841,  0.54 ,  0.01 ,  1.   ],
           [ 0.909, -0.416,  0.02 ,  1.   ]], dtype=float32)
    """
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
    _kernels.sinusoid(table, offset, float(base), layout == "concatenated", get_num_threads())
    if table is not out:
        out[...] = table
    return out


class PositionalEncoding(reference.PositionalEncoding):
    __doc__ = reference.PositionalEncoding.__doc__
    _table = staticmethod(sinusoidal_encoding)
