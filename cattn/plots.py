"""Pictures of attention and of positions, by matplotlib: `pip install "cattn[plot]"`.

    weights           who attends to whom, for one head or several
    encoding          a table of positions as a heat map
    columns           some of its columns as curves
    binary            binary numbers beside the table: a bit alternates as a column does
    frequencies       how fast each column turns
    relative_shift    P[pos + delta] = P[pos] @ R, as hands of clocks that R turns

Each draws on `ax`, or on a new pyplot figure with constrained layout, and returns what it drew on. Nothing else of
matplotlib is touched: no rcParams, no current figure where `ax` is given, no show(). Numbers with a sign have a
diverging colour map with white for 0, the others one from white to dark blue; curves have Okabe and Ito's colours.
All can be told apart by the colour-blind.

`import cattn` does not import this module: `from cattn import plots` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

import cattn
from cattn._checks import as_array, check_int, check_table, is_number, shown
from cattn.reference._positional import columns_of, periods

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise ImportError(f'cattn.plots: needs matplotlib ({error}): `pip install "cattn[plot]"`') from error
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator, MultipleLocator

__all__ = ["binary", "columns", "encoding", "frequencies", "relative_shift", "weights"]

# NaN is grey, which neither holds. Without its nearly black ends, red and blue are told apart at a glance.
_SEQUENTIAL = matplotlib.colormaps["Blues"].with_extremes(bad="0.6")
_DIVERGING = ListedColormap(matplotlib.colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256))).with_extremes(bad="0.6")
# Okabe and Ito 2008, "Color universal design": without black, which is that of the text, and yellow, faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STYLES = ("-", "--", ":", "-.")
_WIDTH = 4.2  # inches: in a column of 3.4, text of 10 points is still of 8
_SMALLEST = 5.5  # points, of a text
_LONGEST = 30  # characters of a token
_LARGEST = 1e250  # of what is drawn: limits and ticks beyond it overflow in matplotlib


def weights(
    w: ArrayLike, query_tokens: Sequence[str] | None = None, key_tokens: Sequence[str] | None = None, *, ax: Any = None,
) -> Any:
    """Attention weights as a heat map: a row for each query, a column for each key. Numbers stand where they fit.

    Parameters
    ----------
    w : array (seq_len_q, seq_len_kv) or (num_heads, seq_len_q, seq_len_kv)
        What return_weights=True gives, for one sequence. No number is below 0 or beyond 1e250; a NaN is grey.
    query_tokens : list of seq_len_q str, optional
        None: positions. Long ones are shortened; of many, those are named for which there is room.
    key_tokens : list of seq_len_kv str, optional
        None: positions. For self-attention, the same list again.
    ax : Axes, or an array of num_heads Axes of one figure, optional
        None: a new figure.

    Returns
    -------
    ax : Axes, or array (num_heads,) of Axes
        An array where w has three axes. All heads have the same colours.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is drawn.

    Examples
    --------
    >>> import cattn
    >>> from cattn import plots
    >>> tokens = "I love my dog".split()
    >>> x = np.random.default_rng(0).standard_normal((4, 6))
    >>> _, w = cattn.scaled_dot_product_attention(x, x, x, return_weights=True)
    >>> ax = plots.weights(w, tokens, tokens)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('key (token)', 'query (token)')
    >>> x = np.random.default_rng(0).standard_normal((8, 4, 6))
    >>> _, w = cattn.scaled_dot_product_attention(x, x, x, return_weights=True)
    >>> [ax.get_title() for ax in plots.weights(w, tokens, tokens)][-1]
    'head 7'
    """
    w = _numbers("w", w, 3, "(seq_len_q, seq_len_kv) or (num_heads, seq_len_q, seq_len_kv)")
    lowest = np.fmin.reduce(w, axis=None)  # of what is no NaN
    if lowest < 0:
        raise ValueError(f"w: expected weights, none of them below 0, got {lowest}; return_weights=True of attention "
                         "gives them")
    seq_len_q, seq_len_kv = w.shape[-2:]
    query_tokens = _tokens("query_tokens", query_tokens, seq_len_q, "row")
    key_tokens = _tokens("key_tokens", key_tokens, seq_len_kv, "column")
    heads = w.reshape(-1, seq_len_q, seq_len_kv)
    per_row = None
    if ax is None:
        axes, per_row = _grid(len(heads), seq_len_q, seq_len_kv, query_tokens, key_tokens)
    else:
        axes = np.array([_check_axes(ax)]) if w.ndim == 2 else _of_heads(ax, len(heads))
    largest = _largest(w)
    for number, (panel, head) in enumerate(zip(axes, heads, strict=True)):
        image = _heat_map(panel, head, _SEQUENTIAL, 0, largest)
        _write_numbers(panel, image, head, "{:.2f}", len(f"{largest:.2f}"))
        _name_ticks(panel.xaxis, key_tokens, seq_len_kv, "key")
        _name_ticks(panel.yaxis, query_tokens, seq_len_q, "query")
        if w.ndim == 3:
            panel.set_title(f"head {number}", fontsize="medium")
        if per_row and number % per_row:  # its neighbour has the same labels
            panel.set_ylabel("")
            panel.tick_params(labelleft=False)
        if per_row and number + per_row < len(heads):
            panel.set_xlabel("")
            panel.tick_params(labelbottom=False)
    _colour_bar(image, axes, "weight")
    return axes if w.ndim == 3 else axes[0]


def encoding(table: ArrayLike, *, ax: Axes | None = None) -> Axes:
    """A table of positions as a heat map: a row for each position, a column for each column.

    Parameters
    ----------
    table : array (length, dim)
        As `cattn.sinusoidal_encoding` gives it, in any layout, or a learned one. The colours reach from minus the
        largest number to the largest, 1e250 at most; a NaN is grey.
    ax : Axes, optional
        None: a new figure.

    Returns
    -------
    ax : Axes

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is drawn.

    Examples
    --------
    >>> import cattn
    >>> from cattn import plots
    >>> ax = plots.encoding(cattn.sinusoidal_encoding(60, 32))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('column', 'position')
    """
    table = _numbers("table", table, 2, "(length, dim)")
    ax = _one(ax, (_WIDTH, 3.4))
    limit = _largest(table)
    image = _heat_map(ax, table, _DIVERGING, -limit, limit)
    _name_columns(ax.xaxis, table.shape[1])
    _name_positions(ax.yaxis, len(table))
    ax.set(xlabel="column", ylabel="position")
    _colour_bar(image, [ax], "value")
    return ax


def columns(table: ArrayLike, columns: Sequence[int], *, ax: Axes | None = None) -> Axes:
    """Some columns of a table of positions as curves over the positions.

    Parameters
    ----------
    table : array (length, dim)
        As `cattn.sinusoidal_encoding` gives it, in any layout, or a learned one. No number is beyond +-1e250; a NaN is
        a gap.
    columns : list of ints from 0 to dim - 1
        Which, in the order of the legend.
    ax : Axes, optional
        None: a new figure.

    Returns
    -------
    ax : Axes

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is drawn.

    Notes
    -----
    d2l.ai, section 11.6, shows columns 6 to 9 of 32: 6 and 7 are sine and cosine of one frequency, 8 and 9 of a lower
    one.

    Examples
    --------
    >>> import cattn
    >>> from cattn import plots
    >>> ax = plots.columns(cattn.sinusoidal_encoding(60, 32), [6, 7, 8, 9])
    >>> [line.get_label() for line in ax.get_lines()]
    ['column 6', 'column 7', 'column 8', 'column 9']
    """
    table = _numbers("table", table, 2, "(length, dim)")
    chosen = _ints("columns", columns, table.shape[1])
    ax = _one(ax, (_WIDTH, 2.6 + 0.19 * math.ceil(len(chosen) / 4)))  # four in a row of the legend
    lines = []
    for number, column in enumerate(chosen):
        style, colour = divmod(number, len(_COLOURS))
        lines += ax.plot(table[:, column], color=_COLOURS[colour], linestyle=_STYLES[style % len(_STYLES)],
                         linewidth=1.4, label=f"column {column}")
    ax.set(xlabel="position", ylabel="value")
    ax.margins(x=0.01)
    _name_positions(ax.xaxis, len(table))
    ax.spines[["top", "right"]].set_visible(False)
    _legend_above(ax, lines)
    return ax


def binary(
    n: int, dim: int, *, base: float = 10000.0, layout: str = "interleaved", endpoint: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """The binary numbers from 0 to n - 1 beside the table of these positions: a bit alternates as a column does.

    A row is a number, and the position of that number. Bits stand with the lowest first, and of the table first all
    sines, then all cosines: in each of the three, what alternates slower is further to the right.

    Parameters
    ----------
    n : int >= 2
        Number of rows.
    dim : int >= 1
        Number of columns of the table.
    base, layout, endpoint
        As in `cattn.sinusoidal_encoding`; the columns are labelled by their numbers in this layout. With
        base=2 ** (dim / 2) each wavelength is twice the one before, as with bits.
    ax : Axes, optional
        None: a new figure.

    Returns
    -------
    ax : Axes
        With three images: bits, sines, cosines; no cosines where dim is 1.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is drawn.

    Notes
    -----
    The comparison is that of d2l.ai, section 11.6: both count, the bits in two values, the table in numbers of which
    each changes smoothly.

    Examples
    --------
    >>> from cattn import plots
    >>> ax = plots.binary(16, 16)
    >>> [label.get_text() for label in ax.get_xticklabels()][:4]
    ['1', '2', '4', '8']
    """
    n, dim = check_int("n", n, 2), check_int("dim", dim, 1)
    _check_size("n", n, dim)
    table = cattn.sinusoidal_encoding(n, dim, base=base, layout=layout, endpoint=endpoint, dtype=np.float64)
    num_bits = (n - 1).bit_length()
    bits = np.arange(n)[:, None] >> np.arange(num_bits) & 1
    powers = [2**bit if num_bits <= 5 else f"$2^{{{bit}}}$" for bit in range(num_bits)]
    ax = _one(ax, (_WIDTH, min(max(0.14 * n, 2.2), 8) + 1))

    # In units of a column of the table. Bits take a third of the width, and are paler than -1 and 1 in the table, so
    # that the digits can be read.
    parts = [("binary", "bit", bits, 0.55 * dim / num_bits, (-0.7, 1.7), powers, 5 if num_bits <= 5 else 4)]
    for name, places in zip(("sines", "cosines"), columns_of(dim, layout), strict=True):
        if len(places):
            parts.append((name, "column", table[:, places], 1, (-1, 1), places, max(6 - len(str(dim - 1)), 1)))
    ticks, labels, images, left = [], [], [], 0.0
    for name, below, values, width, limits, names, most in parts:
        end = left + width * len(names)
        images.append(_heat_map(ax, values, _DIVERGING, *limits, (left, end, n - 0.5, -0.5)))
        step = _step(len(names), most)
        named = range(0, len(names) - step // 4, step)  # at its end, a label would reach into the next part
        ticks += [left + width * (number + 0.5) for number in named]
        labels += [str(names[number]) for number in named]
        for text, height, points, side in [(name, 1, 4, "bottom"), (below, 0, -20, "top")]:
            ax.annotate(text, ((left + end) / 2, height), (0, points), xycoords=ax.get_xaxis_transform(),
                        textcoords="offset points", ha="center", va=side, annotation_clip=False)
        left = end + 0.08 * dim
    ax.set(xlim=(0, end), ylim=(n - 0.5, -0.5), ylabel="number, position")
    _write_numbers(ax, images[0], bits, "{:d}", 2)
    ax.set_xticks(ticks, labels, fontsize="small")
    _name_positions(ax.yaxis, n)
    ax.spines[:].set_visible(False)
    _colour_bar(images[1], [ax], "sine, cosine (bits: 0 blue, 1 red)", ticks=[-1, 0, 1])
    return ax


def frequencies(
    dim: int, *, base: float = 10000.0, layout: str = "interleaved", endpoint: bool = False, ax: Axes | None = None,
) -> Axes:
    """The frequency of each column, in radians per position, and so its wavelength, in positions.

    Parameters
    ----------
    dim : int >= 1
        Number of columns.
    base, layout, endpoint
        As in `cattn.sinusoidal_encoding`, but that base is 1e250 at most.
    ax : Axes, optional
        None: a new figure.

    Returns
    -------
    ax : Axes
        Its left axis has the frequencies, the right one the wavelengths; both are logarithmic.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is drawn.

    Examples
    --------
    >>> from cattn import plots
    >>> ax = plots.frequencies(32)
    >>> sines, cosines = ax.get_lines()
    >>> cosines.get_ydata()[:2].round(3)  # of columns 1 and 3: 1 and 10000^(-2 / 32)
    array([1.   , 0.562])
    """
    dim = check_int("dim", dim, 1)
    _check_size("dim", 1, dim)
    _, _, base, _, endpoint, _ = check_table(0, dim, base, 0, layout, endpoint)
    if base > _LARGEST:
        raise ValueError(f"base: expected {_LARGEST:g} at most in a picture, got {shown(base)}")
    frequency = 1 / periods(dim, base, endpoint, np.dtype(np.float64))
    ax = _one(ax, (_WIDTH, 3.1))
    ax.set_yscale("log")
    size = min(max(120 / dim, 2), 5)
    lines = []
    for places, name, marker, colour in zip(columns_of(dim, layout), ("sine", "cosine"), "os", _COLOURS, strict=False):
        if not len(places):  # of one column
            break
        lines += ax.plot(places, frequency[: len(places)], marker, color=colour, markersize=size, label=name,
                         markerfacecolor=colour if name == "sine" else "none")
    ax.set(xlabel="column", ylabel="frequency (radians per position)", xlim=(-0.7, dim - 0.3))
    _name_columns(ax.xaxis, dim)
    ax.spines["top"].set_visible(False)
    right = ax.secondary_yaxis("right", functions=(_turn, _turn))
    right.set_ylabel("wavelength (positions)")
    _legend_above(ax, lines)
    return ax


def relative_shift(
    delta: int, dim: int, *, positions: Sequence[int] = (0, 3), pairs: Sequence[int] | None = None,
    base: float = 10000.0, layout: str = "interleaved", endpoint: bool = False, ax: Axes | None = None,
) -> Axes:
    """P[pos + delta] = P[pos] @ R: R, of `cattn.relative_shift`, turns each pair of columns by an angle of its own.

    The sine and the cosine of one frequency are the hand of a clock: its height and how far right it reaches. A row of
    clocks is a position; a column of clocks is a pair. Whatever the position, a pair turns by the same angle, delta
    times its frequency: R depends on delta alone. The hand that R turned ends in a ring, P[pos + delta] as
    `cattn.sinusoidal_encoding` computes it.

    Parameters
    ----------
    delta : int
        May be negative: clockwise.
    dim : int >= 2, even
        Number of columns.
    positions : list of ints
        A row of clocks for each. Within +-2**53, also when delta is added.
    pairs : list of ints from 0 to dim / 2 - 1, optional
        A column of clocks for each. None: the first four.
    base, layout, endpoint
        As in `cattn.sinusoidal_encoding`.
    ax : Axes, optional
        None: a new figure.

    Returns
    -------
    ax : Axes
        Clocks have radius 1; the one of row r and column c has its centre at (3 c, -2.6 r).

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is drawn.

    Notes
    -----
    Vaswani et al. 2017, "Attention is all you need", section 3.5.

    Examples
    --------
    >>> from cattn import plots
    >>> ax = plots.relative_shift(5, 32)
    >>> ax.get_title()
    'P[pos + 5] = P[pos] @ R'
    """
    shift = cattn.relative_shift(delta, dim, base=base, layout=layout, endpoint=endpoint)
    delta = check_int("delta", delta)
    pairs = _ints("pairs", range(min(4, dim // 2)) if pairs is None else pairs, dim // 2)
    positions = _ints("positions", positions)
    for position in positions:
        if max(abs(position), abs(position + delta)) > 2**53:
            raise ValueError(f"positions: expected ints within +-2**53, also with delta={delta} added, got "
                             f"{shown(position)}")

    def rows(delta):
        return cattn.sinusoidal_encoding(
            len(positions), dim, base=base, layout=layout, endpoint=endpoint, dtype=np.float64,
            positions=[position + delta for position in positions])

    there = f"P[pos {'-' if delta < 0 else '+'} {abs(delta)}]"
    before = rows(0)
    tables = {"P[pos]": before, "P[pos] @ R": before @ shift, there: rows(delta)}
    sines, cosines = (places[pairs] for places in columns_of(dim, layout))
    angles = delta / periods(dim, base, endpoint, np.dtype(np.float64))[pairs]
    centres = np.stack(np.meshgrid(3.0 * np.arange(len(pairs)), -2.6 * np.arange(len(positions))), axis=-1)
    hands = [centres + np.stack([table[:, cosines], table[:, sines]], axis=-1) for table in tables.values()]
    # Everything but title and legend lies within the limits, in the units of the clocks.
    left, right = -3.4, centres[0, -1, 0] + 1.2
    bottom, top = centres[-1, 0, 1] - 1.75, 2.2
    ax = _one(ax, (max(0.36 * (right - left) + 0.1, 4), 0.36 * (top - bottom) + 0.7))
    ax.set(aspect="equal", xlim=(left, right), ylim=(bottom, top))
    ax.set_axis_off()

    circle = _on_circle(np.linspace(0, math.tau, 73))
    ax.add_collection(LineCollection((centres[..., None, :] + circle).reshape(-1, *circle.shape), colors="0.8",
                                     linewidths=0.8, label="_circles"))
    turns = np.fmod(angles, math.tau)  # whole ones left out
    starts = np.arctan2(before[:, sines], before[:, cosines])
    arcs = centres[..., None, :] + 0.5 * _on_circle(starts[..., None] + turns[:, None] * np.linspace(0, 1, 60))
    ax.add_collection(LineCollection(arcs.reshape(-1, 60, 2), colors="0.5", linewidths=0.8, label="_arcs"))
    for arc in arcs[:, np.abs(turns) > 0.4].reshape(-1, 60, 2):  # room for a head
        ax.annotate("", arc[-1], arc[-4], arrowprops={"arrowstyle": "->", "color": "0.5", "linewidth": 0.8,
                                                      "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7})
    for ends, name, colour, width in zip(hands, tables, _COLOURS, (1.4, 2.0), strict=False):
        segments = np.stack([centres, ends], axis=-2).reshape(-1, 2, 2)
        ax.add_collection(LineCollection(segments, colors=colour, linewidths=width, label=name, capstyle="round"))
    ax.scatter(*hands[2].reshape(-1, 2).T, s=30, facecolors="none", edgecolors="black", linewidths=1, zorder=3,
               label=there)

    texts = [(-1.4, 1.25, "right: cosine\nup: sine", "right", "bottom"),
             (-1.4, bottom, "turned by", "right", "bottom")]
    texts += [(-1.4, y, f"pos = {position}", "right", "center")
              for (_, y), position in zip(centres[:, 0], positions, strict=True)]
    for (x, _), sine, cosine, angle in zip(centres[0], sines, cosines, angles, strict=True):
        texts += [(x, 1.25, f"columns\n{sine}, {cosine}", "center", "bottom"),
                  (x, bottom, f"{angle:.3g} rad", "center", "bottom")]
    for x, y, text, ha, va in texts:
        ax.text(x, y, text, ha=ha, va=va, fontsize="small")
    ax.set_title(f"{there} = P[pos] @ R", fontsize="medium")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, frameon=False, fontsize="small",
              borderaxespad=0.2, handlelength=1.2, columnspacing=1.2)
    return ax


# Arguments.


def _numbers(name, x, most_axes, expected):
    """In float64: what is drawn need not be more exact. With two axes or more."""
    x = as_array(name, x)
    if not (x.dtype == bool or is_number(x.dtype)):
        raise TypeError(f"{name}: expected an array of numbers, got dtype {x.dtype}")
    if not (2 <= x.ndim <= most_axes and x.size):
        cure = ""
        if x.ndim == 1 and x.size:
            cure = f"; of one row: {name}[None]"
        elif x.ndim > most_axes:
            cure = f"; one of them: {name}[{', '.join('0' * (x.ndim - most_axes))}]"
        raise ValueError(f"{name}: expected {expected}, none of them 0, got shape {x.shape}{cure}")
    with np.errstate(over="ignore"):  # a long double may become infinite
        x = x.astype(np.float64)
    beyond = x[np.abs(x) > _LARGEST]
    if beyond.size:
        raise ValueError(f"{name}: expected numbers within +-{_LARGEST:g} or NaN, got {beyond[0]}")
    return x


def _check_size(name, count, dim):
    """`name` is what makes a table of these sizes too large."""
    if count * dim > 2**53:
        raise ValueError(f"{name}: expected at most 2**53 numbers in the table, got {shown(count)} * {shown(dim)}")


def _listed(name, value, what):
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{name}: expected a list of {what}, got {shown(value)}") from None


def _ints(name, value, count=None):
    """A list of some, from 0 to count - 1 where there is a count."""
    listed = [check_int(name, number) for number in _listed(name, value, "ints")]
    if not listed:
        raise ValueError(f"{name}: expected one int at least, got {shown(value)}")
    if count is not None and not 0 <= min(listed) <= max(listed) < count:
        raise ValueError(f"{name}: expected ints from 0 to {count - 1}, got {shown(listed)}")
    return listed


def _tokens(name, tokens, count, what):
    """None, or a list of str that can be printed and are not long."""
    if tokens is None:
        return None
    if isinstance(tokens, str):
        raise TypeError(f"{name}: expected a list of str, got the str {shown(tokens)}; .split() makes a list of its "
                        "words")
    tokens = _listed(name, tokens, "str")
    for token in tokens:
        if not isinstance(token, str):
            raise TypeError(f"{name}: expected a list of str, got {shown(token)} in it; "
                            f"[str(token) for token in {name}] is one")
    if len(tokens) != count:
        raise ValueError(f"{name}: expected {count}, one for each {what} of w, got {len(tokens)}")
    tokens = [token if token.isprintable() else repr(token)[1:-1] for token in tokens]
    return [token if len(token) <= _LONGEST else f"{token[: _LONGEST - 11]}…{token[-10:]}" for token in tokens]


def _check_axes(ax):
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected an Axes of matplotlib, got {shown(ax)}")
    if ax.name != "rectilinear":
        raise ValueError(f"ax: expected Axes with two straight axes, got {type(ax).__name__}")
    if ax.figure is None:
        raise ValueError("ax: expected Axes of a figure, got some that were removed from theirs")
    return ax


# Axes.


def _one(ax, size):
    """`ax`, or that of a new figure of so many inches."""
    if ax is not None:
        return _check_axes(ax)
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _of_heads(ax, heads):
    """The Axes that the caller gave, as an array."""
    axes = np.array(ax, dtype=object).ravel()
    for panel in axes:
        _check_axes(panel)
    if len(axes) != heads:
        raise ValueError(f"ax: expected {heads} Axes, one for each head of w, got {len(axes)}; "
                         f"pyplot.subplots(1, {heads})[1] are as many")
    if len({panel.figure for panel in axes}) > 1:
        raise ValueError("ax: expected Axes of one figure, or of one subfigure, got Axes of several")
    return axes


def _grid(heads, seq_len_q, seq_len_kv, query_tokens, key_tokens):
    """An array of that many Axes in a new figure, and how many are in a row."""
    from matplotlib import pyplot

    at_least = math.isqrt(heads - 1) + 1
    per_row = next((number for number in range(at_least, 5) if heads % number == 0), min(at_least, 4))
    rows = -(-heads // per_row)
    cell, smallest, largest, more = (0.5, 2.0, 8.0, 1.4) if heads == 1 else (0.17, 1.0, 3.0, 1.1)
    width, height = (min(max(cell * count, smallest), largest) for count in (seq_len_kv, seq_len_q))
    letter = 0.085  # inches, about, of 10 points
    beside, below = (letter * max((len(token) for token in tokens or ()), default=2)
                     for tokens in (query_tokens, key_tokens))
    if below < width / seq_len_kv:  # not turned
        below = 0.15
    figure = pyplot.figure(figsize=(per_row * width + more + beside, rows * (height + 0.2) + 0.5 + below),
                           layout="constrained")
    return np.array([figure.add_subplot(rows, per_row, number + 1) for number in range(heads)]), per_row


def _points(ax):
    """Width and height of the Axes, of which a colour bar and labels will take a part."""
    box = ax.get_window_extent()
    return np.array([box.width, box.height]) * 72 / ax.figure.dpi


def _colour_bar(image, axes, label, **options):
    """Beside the Axes, along all of them, and no wider where they are high."""
    boxes = [panel.get_window_extent() for panel in axes]
    height = (max(box.y1 for box in boxes) - min(box.y0 for box in boxes)) * 72 / axes[0].figure.dpi
    axes[0].figure.colorbar(image, ax=list(axes), label=label, aspect=max(20, height / 12), **options)


def _on_circle(angles):
    """The points at these angles: x and y are the last axis."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _largest(x):
    """Of its absolute values; 1 of none but 0 and NaN."""
    return np.abs(x).max(initial=0, where=~np.isnan(x)) or 1.0


def _heat_map(ax, x, colours, lowest, highest, extent=None):
    return ax.imshow(x, cmap=colours, vmin=lowest, vmax=highest, extent=extent, aspect="auto", origin="upper")


def _write_numbers(ax, image, numbers, form, characters):
    """Each in its cell, where so many characters fit: black or white, whichever can be read on its colour."""
    left, right, bottom, top = image.get_extent()
    rows, columns = numbers.shape
    cell = np.array([(right - left) / columns, (bottom - top) / rows])
    width, height = 0.85 * _points(ax) * cell / np.ptp([ax.get_xlim(), ax.get_ylim()], axis=1)
    size = min(0.7 * height, width / (0.65 * characters), 10)
    if size < _SMALLEST:
        return
    is_dark = image.to_rgba(numbers)[..., :3] @ [0.299, 0.587, 0.114] < 0.5
    for row, column in np.ndindex(rows, columns):
        x, y = (left, top) + cell * (column + 0.5, row + 0.5)
        ax.text(x, y, form.format(numbers[row, column]), ha="center", va="center", fontsize=size,
                color="white" if is_dark[row, column] else "black")


def _name_ticks(axis, tokens, count, what):
    if tokens is None:
        _name_positions(axis, count)
        axis.set_label_text(f"{what} (position)")
        return
    axis.set_label_text(f"{what} (token)")
    is_x = axis.axis_name == "x"
    length = _points(axis.axes)[0 if is_x else 1]
    places = range(0, count, math.ceil(count * _SMALLEST / (0.75 * length)))  # each has room for the smallest text
    cell = length / len(places)
    size = min(10, max(0.75 * cell, _SMALLEST))
    rotation = {}
    if is_x and max(len(token) for token in tokens) * 0.65 * size > cell:
        rotation = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if cell > 14 else {"rotation": 90}
    axis.set_ticks(places, [tokens[place] for place in places], parse_math=False, fontsize=size, **rotation)
    axis.set_tick_params(length=0)


def _name_positions(axis, count):
    axis.set_major_locator(MaxNLocator(nbins=_room(axis, count), steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _name_columns(axis, count):
    axis.set_major_locator(MultipleLocator(_step(count, _room(axis, count))))


def _room(axis, count):
    """For how many numbers below `count` an axis has room, in 10 points; 8 are enough."""
    width, height = 0.8 * _points(axis.axes)
    return max(min(8, int(width / (6.5 * (len(str(count - 1)) + 0.5)) if axis.axis_name == "x" else height / 12)), 1)


def _step(count, number):
    """The power of two that cuts so many columns into `number` steps at most."""
    return 2 ** max(math.ceil(math.log2(count / number)), 0)


def _legend_above(ax, lines):
    ax.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(len(lines), 4), frameon=False,
              fontsize="small", handlelength=1.6, columnspacing=1, borderaxespad=0.2)


def _turn(x):
    """From a frequency to its wavelength, and back. Axes ask for 0 as well."""
    with np.errstate(divide="ignore"):
        return math.tau / np.asarray(x, dtype=float)
