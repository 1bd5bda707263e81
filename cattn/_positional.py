"""Sinusoidal positions, specified by the functions and the class of the same names in `cattn.reference`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn import _kernels, reference
from cattn._checks import check_table, check_table_dtype, out_or_new
from cattn.reference import relative_shift

__all__ = ["PositionalEncoding", "relative_shift", "sinusoidal_encoding"]


def sinusoidal_encoding(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, layout: str = "interleaved",
    endpoint: bool = False, positions: ArrayLike | None = None, dtype: DTypeLike = np.float32,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """P[r, 2i] = sin(pos / base^(2i / dim)), P[r, 2i + 1] = cos(same), with pos = offset + r or positions[r].

    The angles are computed in float64, so that the float32 table is within half a float32 ulp of 1.0, 2**-24, for
    every position up to 1e8. Narrower tables are rounded from float64 once.

    Parameters
    ----------
    length : int >= 0
        Number of positions.
    dim : int >= 1
        Number of columns. An odd dim has one sine more than cosines; no column is padded with zeros.
    base : float >= 1
        Wavelengths lie from 2 pi to 2 pi * base.
    offset : int
        First position; may be negative. 0 with `positions`.
    layout : str
        The order of the columns. "interleaved": sin, cos, sin, cos, ...; "concatenated": all sines, then all
        cosines; "cosines_first": all cosines, then all sines.
    endpoint : bool
        Whether the last frequency is 1 / base. True: the frequencies are base^(-i / (dim / 2 - 1)), from 1 to
        1 / base itself, and dim is even and at least 4. False: they stop short of it, at base^(2 / dim - 1).
    positions : int or float array (length,), optional
        In place of offset + r, each within +-2**53; they may be fractional. Every angle is computed by itself then,
        and a float64 table is within 2.3e-16 * (abs(pos) + 1).
    dtype : float dtype
        float16, bfloat16 (of ml_dtypes), float32 or float64; "bfloat16" without ml_dtypes: its bits, as uint16.
    out : array (length, dim) of this dtype, optional
        Written and returned; any strides, no two elements in the same place.

    Returns
    -------
    table : array (length, dim)

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is written.

    Notes
    -----
    The conventions of the field, all with base 10000:

    ================  ========  =====================================================================
    layout            endpoint  whose
    ================  ========  =====================================================================
    "interleaved"     False     Vaswani et al. 2017, section 3.5; d2l.ai; the PyTorch tutorial; Hugging
                                Face's XLM, DistilBERT and FlauBERT
    "concatenated"    False     Hugging Face's Marian and Pegasus; MAE, each half of a 2-d embedding
    "concatenated"    True      tensor2tensor; fairseq, and Hugging Face's FSMT, M2M100, XGLM; Whisper;
                                DDPM; diffusers' get_timestep_embedding by default
    "cosines_first"   False     ADM's timestep_embedding, and GLIDE's and DiT's; diffusers with
                                flip_sin_to_cos=True and downscale_freq_shift=0
    "cosines_first"   True      diffusers with flip_sin_to_cos=True and its default downscale_freq_shift=1
    ================  ========  =====================================================================

    Most of them compute frequencies and angles in float32, with errors up to 1e-7 times the position, and pad an
    odd dim with a column of zeros: that of dim - 1, and zeros. fairseq counts positions from padding_idx + 1 on, and
    the row of its padding is zero. What diffusers calls `scale` multiplies `positions`, before they come here.

    Examples
    --------
    >>> sinusoidal_encoding(3, 4).round(3)
    array([[ 0.   ,  1.   ,  0.   ,  1.   ],
           [ 0.841,  0.54 ,  0.01 ,  1.   ],
           [ 0.909, -0.416,  0.02 ,  1.   ]], dtype=float32)
    >>> sinusoidal_encoding(2, 4, positions=[0.5, 1], layout="cosines_first").round(3)
    array([[0.878, 1.   , 0.479, 0.005],
           [0.54 , 1.   , 0.841, 0.01 ]], dtype=float32)
    """
    length, dim, base, offset, endpoint, positions = check_table(
        length, dim, base, offset, layout, endpoint, positions)
    dtype, kind = check_table_dtype(dtype, ("float16", "bfloat16", "float32", "float64"))
    out, target = out_or_new(out, (length, dim), dtype, {})
    if positions is not None:
        with np.errstate(all="ignore"):  # a long double may be too small for a double
            positions = positions.astype(np.float64, copy=False)
    _kernels.f32.sinusoid(target, kind, offset, positions, None, float(base), layout, endpoint)
    return out


class PositionalEncoding(reference.PositionalEncoding):
    """dropout(x + P[:, positions]), with P the table of `sinusoidal_encoding`, and positions from 0, or from an offset.

    Parameters
    ----------
    dim : int >= 1
        Number of columns, of the inputs as well.
    dropout : float in [0, 1)
        In calls with training=True.
    max_len : int >= 0
        Rows of the table to begin with; it grows when a longer input or a later position comes.
    base, layout, endpoint, dtype
        As in `sinusoidal_encoding`; inputs have this dtype.

    Attributes
    ----------
    P : array (1, max_len, dim)

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.

    Notes
    -----
    The layer of Vaswani et al. 2017, section 3.5, and of d2l.ai, section 11.6.

    Examples
    --------
    >>> layer = PositionalEncoding(32)
    >>> out = layer(np.zeros((1, 60, 32), np.float32))
    >>> bool((out == layer.P[:, :60]).all())
    True
    >>> step = layer(np.zeros((1, 1, 32), np.float32), offset=60)       # the next token
    >>> bool((step == layer.P[:, 60:61]).all())
    True
    """

    _table = staticmethod(sinusoidal_encoding)
