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
    check_kind,
    check_rotary,
    check_rotary_table,
    check_table_dtype,
    check_table_kind,
    out_or_new,
)

__all__ = ["rotary_embedding", "rotary_table"]


def rotary_table(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, frequencies: ArrayLike | None = None,
    dtype: DTypeLike = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """cos[r, i] = cos(pos * f[i]), sin[r, i] = sin(pos * f[i]), with pos = offset + r and f[i] = base^(-2i / dim).

    What `rotary_embedding` turns by. The angles are computed in float64, so that the float32 table is within half a
    float32 ulp of 1.0, 2**-24, for every position up to 1e8. Narrower tables are rounded from float64 once.

    Parameters
    ----------
    length : int >= 0
        Number of positions.
    dim : int >= 2, even
        Number of columns that turn, two for each of the table's.
    base : float >= 1
        Wavelengths lie from 2 pi to 2 pi * base.
    offset : int
        First position; may be negative.
    frequencies : float or int array (dim // 2,), optional
        f in place of those of `base`, each within +-2**53. Where one is larger than 1, the table is as exact as if the
        positions were that much larger.
    dtype : float dtype
        float16, bfloat16 (of ml_dtypes), float32 or float64; "bfloat16" without ml_dtypes: its bits, as uint16.

    Returns
    -------
    cos, sin : arrays (length, dim // 2)
        Each contiguous; together they are one array.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.

    Notes
    -----
    Su et al. 2021, "RoFormer: Enhanced transformer with rotary position embedding". Libraries that want each cosine
    twice, in `dim` columns, take np.concatenate([cos, cos], axis=-1) (Hugging Face) or np.repeat(cos, 2, axis=-1).

    Models that were trained on shorter texts scale the frequencies. By Hugging Face's names, with the numbers of a
    config.json: "linear" divides them by the factor. "ntk" (bloc97 2023) enlarges the base. "yarn" (Peng et al. 2023)
    divides those of the pairs that turn less than once over the trained length, leaves those that turn 32 times, and
    goes from one to the other between; and both tables are multiplied by 0.1 * log(factor) + 1. "llama3" does so
    between 1 and 4 turns, by the number of turns instead of the pair's.

    Examples
    --------
    >>> cos, sin = rotary_table(3, 4)
    >>> cos.round(3)
    array([[ 1.   ,  1.   ],
           [ 0.54 ,  1.   ],
           [-0.416,  1.   ]], dtype=float32)
    >>> dim, base = 128, 10000.0
    >>> f = base ** (-np.arange(0, dim, 2) / dim)
    >>> linear = rotary_table(100, dim, frequencies=f / 4)
    >>> ntk = rotary_table(100, dim, base=base * 4 ** (dim / (dim - 2)))

    YaRN, from 4096 trained positions to four times as many:

    >>> low, high = (dim * np.log(4096 / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (32, 1))
    >>> low, high = max(np.floor(low), 0), min(np.ceil(high), dim - 1)
    >>> ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    >>> yarn = [(0.1 * np.log(4) + 1) * x for x in rotary_table(100, dim, frequencies=f * (1 - ramp + ramp / 4))]

    Llama 3.1, from 8192 positions by a factor of 8, with low and high frequency factors of 1 and 4:

    >>> turns = 8192 * f / (2 * np.pi)
    >>> ramp = np.clip((turns - 1) / (4 - 1), 0, 1)
    >>> llama3 = rotary_table(100, dim, frequencies=f * (ramp + (1 - ramp) / 8))
    """
    length, dim, base, offset, frequencies = check_rotary_table(length, dim, base, offset, frequencies)
    dtype, kind = check_table_dtype(dtype, ("float16", "bfloat16", "float32", "float64"))
    table = np.empty((2, length, dim // 2), dtype)
    _kernels.f32.sinusoid(table, kind, offset, None, frequencies, float(base), None, False)
    return table[0], table[1]


def rotary_embedding(
    x: ArrayLike, cos: ArrayLike, sin: ArrayLike, positions: ArrayLike | None = None, *, interleaved: bool,
    out: np.ndarray | None = None, num_threads: int | None = None,
) -> np.ndarray:
    """x with each pair (a, b) of a row turned by an angle: (a cos - b sin, b cos + a sin).

    Applied to queries and keys, it makes scores depend on the distance of two positions alone.

    Parameters
    ----------
    x : float array (..., dim)
        Queries or keys. float32, float64, float16 or bfloat16; computed in float32, or in float64 where that is its
        dtype.
    cos, sin : float arrays (rows, columns), or with as many axes as x
        Of float32 or the dtype of x, as `rotary_table` makes them. The first 2 * columns of a row of x are turned, the
        others pass through: dim is at least that. Which row of them a row of x is turned by, `positions` says.
        Without, it is that of the same index along axis -2 of x, the sequence, as many as there are; x then has 2 axes
        or at least 4. Or they have the axes of x before the last themselves, some of length 1.
    positions : int array, optional
        Rows of cos and sin, of 2 axes then: from 0 to below their number. Of as many axes as x has before the last, of
        length 1 where the others share it: pos[:, None] for x (total, heads, dim), pos[:, None] of (batch, seq) for x
        (batch, heads, seq, dim).
    interleaved : bool
        Which columns are pairs. True: 0 and 1, 2 and 3, and so on. False: 0 and `columns`, 1 and `columns` + 1, and so
        on, the first half and the second of those that turn. The wrong one raises no error.
    out : array of the shape and dtype of x, optional
        Written and returned; any strides. It may be x itself.
    num_threads : int, optional
        Threads of this call; as `set_num_threads` says when None.

    Returns
    -------
    out : array (..., dim), dtype of x

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is written; a position without a row is one, too.

    Notes
    -----
    Su et al. 2021, "RoFormer: Enhanced transformer with rotary position embedding"; ONNX RotaryEmbedding-23.

    ===========  ============================================================================================
    interleaved  whose
    ===========  ============================================================================================
    True         the paper; GPT-J; Meta's Llama; GGUF's Llama, whose rows of weights are ordered for it;
                 FlashAttention's `rotary_interleaved` by default
    False        GPT-NeoX; Hugging Face's Llama, Mistral, Qwen, Gemma, Phi; ONNX and FlashInfer by default
    ===========  ============================================================================================

    Hugging Face's cos and sin have each column twice: pass the first half, cos[..., :cos.shape[-1] // 2].

    Examples
    --------
    >>> cos, sin = rotary_table(2, 4)
    >>> x = np.array([[1., 0., 1., 0.], [1., 0., 1., 0.]], np.float32)          # (seq, dim)
    >>> rotary_embedding(x, cos, sin, interleaved=True).round(3)
    array([[1.   , 0.   , 1.   , 0.   ],
           [0.54 , 0.841, 1.   , 0.01 ]], dtype=float32)
    >>> rotary_embedding(x, cos, sin, interleaved=False).round(3)
    array([[ 1.   ,  0.   ,  1.   ,  0.   ],
           [-0.301,  0.   ,  1.382,  0.   ]], dtype=float32)

    The next token of two sequences, at positions 17 and 5, in place:

    >>> cos, sin = rotary_table(100, 64)
    >>> query = np.ones((2, 8, 1, 64), np.float32)                              # (batch, heads, seq, dim)
    >>> positions = np.array([17, 5])[:, None, None]
    >>> rotary_embedding(query, cos, sin, positions, interleaved=False, out=query) is query
    True
    """
    given = x, cos, sin
    x, cos, sin = as_array("x", x), as_array("cos", cos), as_array("sin", sin)
    kind = check_kind("x", x, given[0])
    table_kind = check_table_kind(x, cos, sin, given)
    interleaved = check_bool("interleaved", interleaved)
    positions = check_rotary(x, cos, sin, positions)
    num_threads = 0 if num_threads is None else _threads.checked(num_threads)  # 0: the kernel takes the default
    out, target = out_or_new(out, x.shape, x.dtype, {"x": x, "cos": cos, "sin": sin}, itself="x")
    module = _kernels.f64() if kind == F64 else _kernels.f32
    if positions is not None:
        positions = positions.reshape((1,) * (4 - x.ndim) + positions.shape)
    for arrays in [(x, cos, sin, positions, target)] if x.ndim <= 4 else _four_axes(x, cos, sin, positions, target):
        module.rotary(*arrays, kind, table_kind, interleaved, num_threads)
    return out


def _four_axes(x, cos, sin, positions, target):
    """Views of at most 4 axes: neighbours of those before the last as one, where the strides of all allow it, and a
    view for each index of those that are left beyond three."""
    arrays = [x, target, cos, sin] if positions is None else [x, target, positions[..., None]]
    leading = x.shape[:-1]
    if not x.size:
        return
    # Of each array and axis; 0 where it is broadcast.
    steps = [(0,) * (x.ndim - array.ndim) + tuple(
        stride if n > 1 else 0 for n, stride in zip(array.shape[:-1], array.strides[:-1], strict=True))
        for array in arrays]
    merged = []
    for n, own in zip(leading, zip(*steps, strict=True), strict=True):
        if n == 1:
            continue
        if merged and all(outer == n * inner for outer, inner in zip(merged[-1][1], own, strict=True)):
            merged[-1] = merged[-1][0] * n, own
        else:
            merged.append((n, own))
    lengths = tuple(n for n, _ in merged)
    views = [np.lib.stride_tricks.as_strided(
        array, (*lengths, array.shape[-1]), (*(own[number] for _, own in merged), array.strides[-1]),
        writeable=array.flags.writeable) for number, array in enumerate(arrays)]
    for index in itertools.product(*map(range, lengths[:-3])):
        x, target, *others = (view[index] for view in views)
        if positions is None:
            yield x, *others, None, target
        else:
            yield x, cos, sin, others[0][(None,) * (4 - x.ndim) + (..., 0)], target
