"""Sinusoidal positions; the layer is also the base of `cattn.PositionalEncoding`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn._checks import (
    as_array,
    check_bool,
    check_dropout,
    check_dtype,
    check_form,
    check_int,
    check_rows,
    check_seed,
    check_table,
    check_table_dtype,
    layer_text,
    pieces,
    raise_layer_dtype,
    shown,
)
from cattn.reference._dropout import keep_of
from cattn.reference._linear import to_bfloat16

__all__ = ["PositionalEncoding", "relative_shift", "sinusoidal_encoding"]


@np.errstate(all="ignore")
def sinusoidal_encoding(
    length: int, dim: int, *, base: float = 10000.0, offset: int = 0, layout: str = "interleaved",
    endpoint: bool = False, positions: ArrayLike | None = None, dtype: DTypeLike = np.float32,
) -> np.ndarray:
    """P[r, 2i] = sin(pos / base^(2i / dim)), P[r, 2i + 1] = cos(same), with pos = offset + r or positions[r].

    table : array (length, dim)

    The angles are computed in float64, in `dtype` where that is wider. bfloat16 is rounded twice: NumPy gets there by
    way of float32. The arguments are described at `cattn.sinusoidal_encoding`; `dtype` is any float dtype here.
    """
    length, dim, base, offset, endpoint, positions = check_table(
        length, dim, base, offset, layout, endpoint, positions)
    stored, _ = check_table_dtype(dtype)
    dtype = np.dtype(np.float32) if stored == np.uint16 else stored
    wide = np.result_type(dtype, np.float64)
    sines, cosines = columns_of(dim, layout)
    position = np.arange(offset, offset + length) if positions is None else positions
    angle = position.astype(wide)[:, None] / periods(dim, base, endpoint, wide)
    table = np.empty((length, dim), dtype)
    table[:, sines] = np.sin(angle)
    table[:, cosines] = np.cos(angle[:, : len(cosines)])
    return to_bfloat16(table) if stored == np.uint16 else table


@np.errstate(all="ignore")
def relative_shift(
    delta: int, dim: int, *, base: float = 10000.0, layout: str = "interleaved", endpoint: bool = False,
    dtype: DTypeLike = np.float64,
) -> np.ndarray:
    """R with P[pos + delta] = P[pos] @ R for every pos: it turns pair i by the angle delta / base^(2i / dim).

    Parameters
    ----------
    delta : int
        May be negative.
    dim : int >= 2, even
        The last sine of an odd dim has no cosine to turn with.
    base, layout, endpoint
        As in `sinusoidal_encoding`.
    dtype : float dtype

    Returns
    -------
    R : array (dim, dim)
        Orthogonal; relative_shift(-delta, dim) is its transpose.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.

    Notes
    -----
    Vaswani et al. 2017, "Attention is all you need", section 3.5.

    Examples
    --------
    >>> table = sinusoidal_encoding(60, 32, dtype=np.float64)
    >>> bool(np.allclose(table[:50] @ relative_shift(10, 32), table[10:]))
    True
    """
    delta = check_int("delta", delta)
    if abs(delta) > 2**53:
        raise ValueError(f"delta: expected an int within +-2**53, got {shown(delta)}")
    dim = check_int("dim", dim, 1)
    if dim > 2**29:
        raise ValueError(f"dim: expected at most 2**58 elements in the matrix, got {shown(dim)} * {shown(dim)}")
    _, dim, base, _, endpoint, _ = check_table(0, dim, base, 0, layout, endpoint)
    if dim % 2:
        raise ValueError(f"dim: expected an even number (an unpaired sine cannot be rotated), got {shown(dim)}")
    dtype = check_dtype(dtype)
    wide = np.result_type(dtype, np.float64)
    sines, cosines = columns_of(dim, layout)
    angle = wide.type(delta) / periods(dim, base, endpoint, wide)
    matrix = np.zeros((dim, dim), dtype)
    matrix[sines, sines] = matrix[cosines, cosines] = np.cos(angle)
    matrix[cosines, sines] = np.sin(angle)
    matrix[sines, cosines] = -np.sin(angle)
    return matrix


class PositionalEncoding:
    """dropout(x + P[:, positions]), with P the table of `sinusoidal_encoding`: see `cattn.PositionalEncoding`.

    x, out : arrays (..., seq, dim)
    positions : from offset on, or int array (..., seq), the leading axes optional
    P : array (1, max_len, dim)
    """

    _table = staticmethod(sinusoidal_encoding)

    def __init__(
        self, dim: int, dropout: float = 0.0, max_len: int = 1000, *, base: float = 10000.0,
        layout: str = "interleaved", endpoint: bool = False, dtype: DTypeLike = np.float32,
    ) -> None:
        self.dim = check_int("dim", dim, 1)
        self.dropout = check_dropout("dropout", dropout)
        dtype = check_dtype(dtype)
        self._options = {"base": base, "layout": layout, "endpoint": endpoint, "dtype": dtype}
        max_len = check_int("max_len", max_len, 0)
        if max(max_len, 1) * self.dim > 2**58:
            raise ValueError(f"max_len: expected at most 2**58 elements in the table, "
                             f"got {shown(max_len)} * {shown(dim)}")
        self.P = self._table(max_len, self.dim, **self._options)[None]

    def __repr__(self) -> str:
        own = self.__dict__ | self.__dict__.get("_options", {})
        shape = getattr(own.get("P"), "shape", ())
        if len(shape) == 3:
            own["max_len"] = shape[1]
        if "dtype" in own:
            own["dtype"] = np.dtype(own["dtype"])
        return layer_text(self, own, {
            "dim": ..., "dropout": 0.0, "max_len": 1000, "base": 10000.0, "layout": "interleaved", "endpoint": False,
            "dtype": np.dtype(np.float32)})

    def __call__(
        self, x: ArrayLike, *, training: bool = False, seed: int | None = None, offset: int = 0,
        positions: ArrayLike | None = None,
    ) -> np.ndarray:
        """Add the positions offset to offset + seq - 1, or these.

        Parameters
        ----------
        x : array (..., seq, dim)
            What the positions are added to.
        training : bool
            Dropout happens only when True.
        seed : int in [0, 2**64), optional
            Of the dropout, fresh for each call when None. It is the generator of `dropout_keep`, with the
            column as key, offset + row as query, the flat index over the leading axes as batch, and head
            2**32 - 1, which no attention uses: a seed may serve both.
        offset : int >= 0
            Position of the first row: that of a token that is decoded. The table grows where it is too short.
        positions : int array (..., seq), optional
            Of each row, from 0 on; of the shape of x without its last axis, or of axes that broadcast to it.

        Returns
        -------
        out : array (..., seq, dim)

        Raises
        ------
        ValueError, TypeError
            Naming the argument, the rule and what came.
        """
        return self._forward(x, training, seed, offset, positions)[0]

    def vjp(
        self, x: ArrayLike, *, training: bool = False, seed: int | None = None, offset: int = 0,
        positions: ArrayLike | None = None,
    ) -> tuple[np.ndarray, Callable[[ArrayLike], np.ndarray]]:
        """The result, and the function that takes its gradient back to x, through the same dropout.

        Parameters
        ----------
        x, training, seed, offset, positions
            As in a call.

        Returns
        -------
        out : array (..., seq, dim)
        pullback : function
            pullback(grad_out), of the shape and the dtype of out, is the gradient of sum(grad_out * out) by x: an array
            of the same shape. P is no parameter.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, the rule and what came; pullback too.
        """
        out, dropout = self._forward(x, training, seed, offset, positions)
        shape, dtype = out.shape, out.dtype

        @np.errstate(all="ignore")
        def pullback(grad_out: ArrayLike) -> np.ndarray:
            grad_out = check_form("grad_out", grad_out, shape, dtype, "dtype of the layer", "layer.P.dtype")
            grad_x = np.empty(shape, dtype)
            for piece in pieces(shape):
                grad_x[piece] = dropout.applied(grad_out[piece], piece)
            return grad_x

        return out, pullback

    @np.errstate(all="ignore")
    def _forward(self, x, training, seed, offset, positions):
        """The result, and the dropout in it."""
        given, x = x, as_array("x", x)
        if x.dtype != self.P.dtype:
            raise_layer_dtype("x", x, given, self.P.dtype, "layer.P.dtype", self.dim)
        if x.ndim < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected (..., seq, {self.dim}), got shape {x.shape}")
        offset, positions, end = check_rows(offset, positions, x.shape[:-1])
        table = self.P  # another thread may replace it meanwhile
        if np.ndim(table) != 3 or table.shape[::2] != (1, self.dim):
            raise ValueError(f"P: expected (1, rows, {self.dim}), got shape {np.shape(table)}")
        if end > table.shape[1]:
            table = self.P = self._table(max(end, 2 * table.shape[1]), self.dim, **self._options)[None]
        p = check_dropout("dropout", self.dropout) if check_bool("training", training) else 0.0
        dropout = _Dropout(p, check_seed(seed) if p else 0, offset, x.shape[:-2])
        out = np.empty(x.shape, x.dtype)
        for piece in pieces(x.shape):
            *_, rows, columns = piece
            shifted = slice(offset + rows.start, offset + rows.stop)
            out[piece] = dropout.applied(
                x[piece] + table[0, shifted if positions is None else positions[piece[:-1]], columns], piece)
        return out, dropout


class _Dropout:
    """That of one call, whose first row has this position."""

    def __init__(self, p, seed, offset, leading):
        self.p, self.seed, self.offset = p, seed, offset
        self.batch_index = np.arange(math.prod(leading)).reshape(leading)

    def applied(self, part, piece):
        """`part`, which are the elements of this piece, dropped or made larger."""
        if not self.p:
            return part
        *batch, rows, columns = piece
        keep = keep_of(self.seed, self.p, self.batch_index[tuple(batch)].ravel(), np.array([2**32 - 1]),
                       slice(self.offset + rows.start, self.offset + rows.stop), columns)
        return np.where(keep.reshape(part.shape), part / part.dtype.type(1 - self.p), part.dtype.type(0))


def periods(dim, base, endpoint, wide):
    """For each pair of columns, what a position is divided by to give its angle."""
    pair = np.arange((dim + 1) // 2).astype(wide)
    return wide.type(base) ** (pair / (dim // 2 - 1) if endpoint else 2 * pair / dim)


def columns_of(dim, layout):
    """The columns of the sines and those of the cosines."""
    columns = np.arange(dim)
    if layout == "interleaved":
        return columns[0::2], columns[1::2]
    if layout == "concatenated":
        return columns[: (dim + 1) // 2], columns[(dim + 1) // 2 :]
    return columns[dim // 2 :], columns[: dim // 2]
