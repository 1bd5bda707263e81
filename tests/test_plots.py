"""Pictures: what they show is what was given or what the formula says, labels are in full view, and nothing else of
matplotlib changes."""

import inspect
import itertools
import math
import os
import subprocess
import sys
import tomllib
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, python
from test_types import documented

import cattn

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")  # for these tests; the module leaves it alone
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import LineCollection  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Annotation  # noqa: E402

from cattn import plots  # noqa: E402

LAYOUTS = ["interleaved", "concatenated", "cosines_first"]
WORDS = ["I", "love", "my", "dog"]
TABLE = cattn.sinusoidal_encoding(20, 8)

# Every function, as it is called most simply.
CALLS = {
    "weights": lambda ax=None: plots.weights(np.eye(4), WORDS, WORDS, ax=ax),
    "encoding": lambda ax=None: plots.encoding(TABLE, ax=ax),
    "columns": lambda ax=None: plots.columns(TABLE, [0, 3], ax=ax),
    "binary": lambda ax=None: plots.binary(8, 6, ax=ax),
    "frequencies": lambda ax=None: plots.frequencies(8, ax=ax),
    "relative_shift": lambda ax=None: plots.relative_shift(3, 8, ax=ax),
}
every_function = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def no_figure_stays():
    before = set(pyplot.get_fignums())
    yield
    for number in set(pyplot.get_fignums()) - before:
        pyplot.close(number)


def softmax_of(*shape, seed=0):
    scores = np.exp(2 * np.random.default_rng(seed).standard_normal(shape))
    return scores / scores.sum(axis=-1, keepdims=True)


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def cells(ax):
    """{(x, y): text} of what is written in the data."""
    return {text.get_position(): text.get_text() for text in ax.texts if not isinstance(text, Annotation)}


def expected_pair(position, pair, dim, base=10000.0, endpoint=False):
    exponent = pair / (dim // 2 - 1) if endpoint else 2 * pair / dim
    angle = position / base**exponent
    return math.sin(angle), math.cos(angle)


def columns_of(pair, dim, layout):
    """(sine, cosine) of a pair; dim is even."""
    return {"interleaved": (2 * pair, 2 * pair + 1), "concatenated": (pair, dim // 2 + pair),
            "cosines_first": (dim // 2 + pair, pair)}[layout]


# What all do.


def test_every_function_is_here():
    assert sorted(CALLS) == plots.__all__


@every_function
def test_a_new_figure(name):
    before = pyplot.get_fignums()
    ax = CALLS[name]()
    assert isinstance(ax, Axes)
    assert len(pyplot.get_fignums()) == len(before) + 1
    assert pyplot.gcf() is ax.figure
    assert ax.figure.get_layout_engine().__class__.__name__ == "ConstrainedLayoutEngine"


@every_function
def test_a_given_ax(name):
    """It is drawn on, and nothing else changes: neither pyplot's figures, nor the current one, nor rcParams."""
    other = pyplot.figure()
    parameters, numbers = matplotlib.rcParams.copy(), pyplot.get_fignums()
    parts = Figure(layout="constrained").subfigures(1, 2)
    ax = parts[1].add_subplot()
    assert CALLS[name](ax=ax) is ax
    assert ax.has_data()
    assert (pyplot.get_fignums(), pyplot.gcf()) == (numbers, other)
    assert not other.axes and not parts[0].axes
    CALLS[name]()
    assert matplotlib.rcParams == parameters


@every_function
@pytest.mark.parametrize("ax", [pyplot, "ax", Figure()], ids=["pyplot", "str", "figure"])
def test_what_is_no_ax(name, ax):
    before = pyplot.get_fignums()
    with pytest.raises(TypeError, match=r"^ax: expected an Axes of matplotlib, got "):
        CALLS[name](ax=ax)
    assert pyplot.get_fignums() == before


@every_function
@pytest.mark.parametrize("kind", ["polar", "3d", "removed"])
def test_axes_that_cannot_be_drawn_on(name, kind):
    figure = Figure()
    ax = figure.add_subplot(projection=None if kind == "removed" else kind)
    if kind == "removed":
        ax.remove()
    before = ax.get_children()
    with pytest.raises(ValueError, match=r"^ax: expected Axes (with two straight axes|of a figure), got "):
        CALLS[name](ax=ax)
    assert ax.get_children() == before


@every_function
def test_documented(name):
    function = getattr(plots, name)
    parameters = inspect.signature(function).parameters
    assert sorted(documented(function.__doc__)) == sorted(parameters)
    assert typing.get_type_hints(function).keys() == {*parameters, "return"}
    assert "Raises\n------" in inspect.getdoc(function)


# In full view, at every size.

SIZES = {
    "one weight": lambda: plots.weights([[1.0]], ["a"], ["b"]),
    "few": lambda: plots.weights(softmax_of(4, 4), WORDS, WORDS),
    "one query": lambda: plots.weights(softmax_of(1, 12), ["next"], [f"word{i}" for i in range(12)]),
    "long words": lambda: plots.weights(softmax_of(6, 6), ["antidisestablishmentarianism"] * 6, ["pneumonoultra"] * 6),
    "many": lambda: plots.weights(softmax_of(50, 50), [f"t{i}" for i in range(50)], [f"token{i}" for i in range(50)]),
    "hundreds": lambda: plots.weights(softmax_of(300, 300), [f"token{i}" for i in range(300)], ["x"] * 300),
    "positions": lambda: plots.weights(softmax_of(7, 300)),
    **{f"{heads} heads": lambda heads=heads: plots.weights(softmax_of(heads, 4, 4), WORDS, WORDS)[0]
       for heads in (1, 2, 3, 5, 8, 12)},
    "heads of many": lambda: plots.weights(softmax_of(4, 30, 30), [f"tok{i}" for i in range(30)], ["longer"] * 30)[0],
    "6 heads of 64": lambda: plots.weights(softmax_of(6, 64, 64), ["query"] * 64, ["key"] * 64)[3],
    "longest words": lambda: plots.weights(softmax_of(2, 2), ["x" * 9999, "x"], ["日本" * 9999, "x"]),
    "encoding": lambda: plots.encoding(cattn.sinusoidal_encoding(60, 32)),
    "wide encoding": lambda: plots.encoding(np.ones((2, 100_000))),
    "large encoding": lambda: plots.encoding(cattn.sinusoidal_encoding(3000, 512, offset=10**6)),
    "small encoding": lambda: plots.encoding([[1.0]]),
    "columns": lambda: plots.columns(cattn.sinusoidal_encoding(60, 32), [6, 7, 8, 9]),
    "many columns": lambda: plots.columns(cattn.sinusoidal_encoding(60, 32), range(30)),
    "one position": lambda: plots.columns(TABLE[:1], [0]),
    **{f"binary {n}, {dim}": lambda n=n, dim=dim: plots.binary(n, dim)
       for n, dim in [(2, 1), (3, 2), (8, 7), (16, 16), (16, 513), (32, 32), (60, 32), (64, 8), (200, 100),
                      (5000, 512)]},
    **{f"frequencies {dim}": lambda dim=dim: plots.frequencies(dim) for dim in (1, 2, 7, 32, 512, 100_000)},
    "base 1": lambda: plots.frequencies(8, base=1),
    "base 1e250": lambda: plots.frequencies(8, base=1e250),
    "clocks": lambda: plots.relative_shift(5, 32),
    "one clock": lambda: plots.relative_shift(-3, 2, positions=[1]),
    "many clocks": lambda: plots.relative_shift(12345678, 64, positions=range(8), pairs=range(10)),
}


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("size", SIZES)
def test_in_full_view(size):
    """Nothing is cut off by the figure's edge, and no two labels of an axis overlap."""
    figure = SIZES[size]().figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    inches = figure.get_tightbbox(renderer)
    width, height = figure.get_size_inches()
    assert inches.x0 >= -0.02 and inches.y0 >= -0.02 and inches.x1 <= width + 0.02 and inches.y1 <= height + 0.02
    assert width < 13 and height < 13
    for ax in figure.axes:
        assert ax.get_window_extent().width > 20 or ax.get_label() == "<colorbar>"
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [tick.label1 if tick.label1.get_visible() else tick.label2 for tick in axis.get_major_ticks()
                     if low <= tick.get_loc() <= high]
            shown = [label for label in shown if label.get_visible() and label.get_text()]
            if axis is ax.xaxis and any(label.get_rotation() == 45 for label in shown):
                continue  # their boxes overlap, they do not
            boxes = [label.get_window_extent(renderer) for label in shown]
            for one, other in itertools.pairwise(boxes):
                assert not one.padded(-1).overlaps(other.padded(-1)), [label.get_text() for label in shown]


# weights.


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights(dtype):
    w = softmax_of(3, 4).astype(dtype)
    w.flags.writeable = False
    ax = plots.weights(w, ["a", "b", "c"], WORDS)
    (image,) = ax.get_images()
    assert np.array_equal(image.get_array(), w)
    assert image.get_clim() == (0, w.max())
    assert image.colorbar.ax.get_ylabel() == "weight"
    assert (ticks(ax.xaxis), ticks(ax.yaxis)) == (WORDS, ["a", "b", "c"])
    assert ax.yaxis_inverted()  # the first query on top
    assert cells(ax) == {(column, row): f"{w[row, column]:.2f}" for row in range(3) for column in range(4)}


def test_numbers_are_written_where_they_fit():
    assert len(plots.weights(softmax_of(8, 8)).texts) == 64
    assert not plots.weights(softmax_of(50, 50)).texts


def test_numbers_that_are_long_are_not_written():
    """1e250 is 251 digits, and all there is."""
    assert plots.weights([[1.0]]).texts and not plots.weights([[1e250]]).texts


@pytest.mark.parametrize("axis", [
    lambda: plots.weights(softmax_of(1, 9)).yaxis,
    lambda: plots.weights(softmax_of(9, 1)).xaxis,
    lambda: plots.encoding(TABLE[:1]).yaxis,
    lambda: plots.encoding(TABLE[:, :1]).xaxis,
    lambda: plots.columns(TABLE[:1], [0]).xaxis,
    lambda: plots.frequencies(1).xaxis,
])
def test_what_there_is_one_of_is_number_0(axis):
    axis = axis()
    axis.axes.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    shown = {place: label.get_text() for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)}
    assert [text for place, text in shown.items() if low <= place <= high] == ["0"]


def test_numbers_can_be_read_on_their_colours():
    ax = plots.weights([[0.0, 1.0]])
    assert [text.get_color() for text in ax.texts] == ["black", "white"]


def test_positions_are_named_where_tokens_are_not():
    ax = plots.weights(softmax_of(3, 4), key_tokens=WORDS)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key (token)", "query (position)")


def test_long_tokens_are_turned():
    def angles(tokens):
        return {label.get_rotation() for label in plots.weights(softmax_of(4, 4), None, tokens).get_xticklabels()}

    assert angles(WORDS) == {0}
    assert angles(["incomprehensibilities", *WORDS[1:]]) <= {45, 90}


def test_tokens_are_shown_as_they_are():
    """Dollars are no formula, and what cannot be seen is written out."""
    tokens = ["$x$", "a\nb", "\t", "_^{"]
    ax = plots.weights(softmax_of(4, 4), tokens, tokens)
    assert ticks(ax.xaxis) == ["$x$", r"a\nb", r"\t", "_^{"]
    assert not any(label.get_parse_math() for label in [*ax.get_xticklabels(), *ax.get_yticklabels()])
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("shape", "step"), [((64, 64), 1), ((200, 200), 3), ((6, 64, 64), 3)], ids=str)
def test_many_tokens_are_named_in_part(shape, step):
    """Those for which there is room."""
    tokens = [f"t{i}" for i in range(shape[-1])]
    ax = np.ravel(plots.weights(softmax_of(*shape), tokens, tokens))[-1]
    assert ax.get_xticks().tolist() == list(range(0, shape[-1], step))
    assert ticks(ax.xaxis) == tokens[::step]


def test_long_tokens_are_shortened():
    tokens = ["a" * 30, "b" * 19 + "x" * 9999 + "c" * 10]
    shown = ticks(plots.weights(softmax_of(2, 2), tokens).yaxis)
    assert shown == ["a" * 30, "b" * 19 + "…" + "c" * 10]


def test_weights_of_heads():
    w = softmax_of(5, 3, 4)
    axes = plots.weights(w, ["a", "b", "c"], WORDS)
    assert axes.shape == (5,)
    for head, ax in enumerate(axes):
        (image,) = ax.get_images()
        assert np.array_equal(image.get_array(), w[head])
        assert image.get_clim() == (0, w.max())  # the same colours for all
        assert ax.get_title() == f"head {head}"
    figure = axes[0].figure
    assert len(figure.axes) == 6  # and one colour bar
    at_left = [ax.get_subplotspec().is_first_col() for ax in axes]
    assert [bool(ax.get_ylabel()) for ax in axes] == at_left
    # Three in a row: the third has none below it, and says itself what its columns are.
    assert [bool(ax.get_xlabel()) for ax in axes] == [False, False, True, True, True]


@pytest.mark.parametrize("made", ["array", "grid", "list"])
def test_heads_on_given_axes(made):
    figure = Figure(layout="constrained")
    given = figure.subplots(2, 2)
    given = {"array": given.ravel(), "grid": given, "list": list(given.ravel())}[made]
    axes = plots.weights(softmax_of(4, 3, 4), ax=given)
    assert list(axes) == figure.axes[:4]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in axes)


def test_nothing_and_everything_is_masked():
    """Rows that see nothing are 0; a NaN that was attended is neither 0 nor any weight."""
    assert plots.weights(np.zeros((2, 2))).get_images()[0].get_clim() == (0, 1)
    (image,) = plots.weights([[np.nan, 0.25], [0, 0.5]]).get_images()
    assert image.get_clim() == (0, 0.5)
    red, green, blue, _ = image.cmap(image.norm(np.ma.masked_invalid([np.nan])))[0]
    assert red == green == blue == pytest.approx(0.6)


# encoding and columns.


def test_encoding():
    table = cattn.sinusoidal_encoding(20, 7)
    ax = plots.encoding(table)
    (image,) = ax.get_images()
    assert np.array_equal(image.get_array(), table)
    assert list(image.get_extent()) == [-0.5, 6.5, 19.5, -0.5]  # row 0 is on top
    limit = np.abs(table).max()
    assert image.get_clim() == (-limit, limit)
    assert image.colorbar.ax.get_ylabel() == "value"
    lowest, middle, highest = image.cmap([0.0, 0.5, 1.0])[:, :3]
    assert middle.min() > 0.93  # white
    assert lowest[2] > 2 * lowest[0] and highest[0] > 2 * highest[2]  # blue, red


def test_columns():
    table = cattn.sinusoidal_encoding(60, 32)
    ax = plots.columns(table, np.array([6, 7, 8, 9]))
    lines = ax.get_lines()
    assert [line.get_label() for line in lines] == [f"column {column}" for column in range(6, 10)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [line.get_label() for line in lines]
    for line, column in zip(lines, range(6, 10), strict=True):
        assert line.get_xdata().tolist() == list(range(60))
        assert np.array_equal(line.get_ydata(), table[:, column])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("position", "value")


def test_curves_differ():
    lines = plots.columns(cattn.sinusoidal_encoding(9, 32), range(24)).get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 24


# binary, frequencies, relative_shift: the formulas, written out.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("endpoint", [False, True])
def test_binary(layout, endpoint):
    n, dim, base = 13, 8, 50.0
    ax = plots.binary(n, dim, base=base, layout=layout, endpoint=endpoint)
    bits, sines, cosines = ax.get_images()
    assert ["".join(map(str, row[::-1])) for row in bits.get_array()] == [f"{number:04b}" for number in range(n)]
    pairs = np.array([[expected_pair(number, pair, dim, base, endpoint) for pair in range(4)] for number in range(n)])
    np.testing.assert_allclose(sines.get_array(), pairs[..., 0], atol=1e-12)
    np.testing.assert_allclose(cosines.get_array(), pairs[..., 1], atol=1e-12)
    order = [columns_of(pair, dim, layout) for pair in range(4)]
    assert ticks(ax.xaxis) == ["1", "2", "4", "8", *(str(s) for s, _ in order), *(str(c) for _, c in order)]
    # Each label is below the middle of its column.
    edges = [image.get_extent()[:2] for image in (bits, sines, cosines)]
    middles = [left + (right - left) * (number + 0.5) / 4 for left, right in edges for number in range(4)]
    np.testing.assert_allclose(ax.get_xticks(), middles)
    assert edges == sorted(edges) and edges[0][1] < edges[1][0] and edges[1][1] < edges[2][0]
    assert [cells(ax)[key] for key in sorted(cells(ax), key=lambda key: (key[1], key[0]))] == [
        digit for number in range(n) for digit in f"{number:04b}"[::-1]]
    assert {tuple(image.get_extent()[2:]) for image in (bits, sines, cosines)} == {(n - 0.5, -0.5)}


def test_labels_of_bits():
    """As numbers where these have room."""
    five, six = (ticks(plots.binary(n, 2).xaxis)[:-2] for n in (32, 33))
    assert five == ["1", "2", "4", "8", "16"] and six == ["$2^{0}$", "$2^{2}$", "$2^{4}$"]


@pytest.mark.parametrize("dim", [1, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_binary_of_odd_dim(dim, layout):
    """One sine more than cosines."""
    widths = [image.get_array().shape[1] for image in plots.binary(4, dim, layout=layout).get_images()]
    assert widths == ([2, 1] if dim == 1 else [2, 4, 3])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("endpoint", [False, True])
def test_frequencies(layout, endpoint):
    dim, base = 12, 300.0
    ax = plots.frequencies(dim, base=base, layout=layout, endpoint=endpoint)
    drawn = {}
    for line in ax.get_lines():
        for column, frequency in zip(line.get_xdata(), line.get_ydata(), strict=True):
            drawn[int(column)] = line.get_label(), frequency
    for pair in range(6):
        frequency = base ** -(pair / 5 if endpoint else pair / 6)
        for column, name in zip(columns_of(pair, dim, layout), ("sine", "cosine"), strict=True):
            assert drawn[column] == (name, pytest.approx(frequency))
    assert len(drawn) == dim
    assert ax.get_yscale() == "log"
    ax.figure.canvas.draw()
    (right,) = ax.child_axes
    assert right.get_ylabel() == "wavelength (positions)"
    # At the same height: a frequency and 2 pi over it.
    for frequency in (0.01, 0.5):
        there = right.transData.transform((0, 2 * math.pi / frequency))[1]
        assert there == pytest.approx(ax.transData.transform((0, frequency))[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("delta", [5, -40, 0])
def test_relative_shift(layout, delta):
    dim, pairs, positions = 16, [0, 3, 7], [2, 11]
    ax = plots.relative_shift(delta, dim, positions=positions, pairs=pairs, layout=layout)
    drawn = {thing.get_label(): thing for thing in ax.collections}
    sign = "-" if delta < 0 else "+"
    names = ["P[pos]", "P[pos] @ R", f"P[pos {sign} {abs(delta)}]"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names
    assert ax.get_title() == f"{names[2]} = {names[1]}"
    starts, before, there = [], [], []
    for row, position in enumerate(positions):
        for column, pair in enumerate(pairs):
            centre = np.array([3 * column, -2.6 * row])
            starts.append(centre)
            before.append(centre + expected_pair(position, pair, dim)[::-1])  # right: cosine, up: sine
            there.append(centre + expected_pair(position + delta, pair, dim)[::-1])
    for name, ends in zip(names[:2], (before, there), strict=True):  # what R turns is the other position
        segments = np.array(drawn[name].get_segments())
        np.testing.assert_allclose(segments[:, 0], starts, atol=1e-12)
        np.testing.assert_allclose(segments[:, 1], ends, atol=1e-12)
    np.testing.assert_allclose(drawn[names[2]].get_offsets(), there, atol=1e-12)
    texts = [text.get_text() for text in ax.texts]
    for pair in pairs:
        assert "columns\n{}, {}".format(*columns_of(pair, dim, layout)) in texts
        assert f"{delta / 10000 ** (2 * pair / dim):.3g} rad" in texts
    assert {"pos = 2", "pos = 11"} <= set(texts)


@pytest.mark.parametrize("delta", [2, -2, 10])
def test_arcs_lead_from_hand_to_hand(delta):
    """In the direction of the turn, whole turns left out."""
    ax = plots.relative_shift(delta, 8, positions=[1, 6])
    drawn = {thing.get_label(): thing.get_segments() for thing in ax.collections if isinstance(thing, LineCollection)}
    assert len(drawn["_arcs"]) == 8
    for arc, one, other in zip(drawn["_arcs"], drawn["P[pos]"], drawn["P[pos] @ R"], strict=True):
        centre = one[0]
        np.testing.assert_allclose(2 * (arc[0] - centre), one[1] - centre, atol=1e-9)
        np.testing.assert_allclose(2 * (arc[-1] - centre), other[1] - centre, atol=1e-9)
        (x, y), (next_x, next_y) = arc[0] - centre, arc[1] - centre
        assert np.sign(x * next_y - y * next_x) == np.sign(delta)


# Errors.

SHAPES = "w: expected (seq_len_q, seq_len_kv) or (num_heads, seq_len_q, seq_len_kv), none of them 0, got shape "


BAD_CALLS = {
    "weights of 1 axis": (lambda: plots.weights(np.zeros(3)), SHAPES + "(3,); of one row: w[None]"),
    "weights of 4 axes": (lambda: plots.weights(np.zeros((1, 8, 5, 5))), SHAPES + "(1, 8, 5, 5); one of them: w[0]"),
    "weights of 5 axes": (
        lambda: plots.weights(np.zeros((2, 1, 8, 5, 5))), SHAPES + "(2, 1, 8, 5, 5); one of them: w[0, 0]",
    ),
    "weights of a number": (lambda: plots.weights(0.5), SHAPES + "()"),
    "no weights": (lambda: plots.weights([]), SHAPES + "(0,)"),
    "empty weights": (lambda: plots.weights(np.zeros((0, 3, 3))), SHAPES + "(0, 3, 3)"),
    "negative weights": (
        lambda: plots.weights([[0.5, -1.5, np.nan]]),
        "w: expected weights, none of them below 0, got -1.5; return_weights=True of attention gives them",
    ),
    **{
        f"weights of {type(value).__name__} {value}": (
            lambda value=value: plots.weights([[0.5, np.nan], [0.0, value]]),
            f"w: expected numbers within +-1e+250 or NaN, got {float(value)}",
        )
        for value in (np.inf, 1e308, np.float32(np.inf), np.longdouble("inf"))
    },
    "text as weights": (lambda: plots.weights([["a"]]), "w: expected an array of numbers, got dtype <U1"),
    "weights of None": (lambda: plots.weights(None), "w: expected an array, got None"),
    "too few query tokens": (
        lambda: plots.weights(np.eye(4), WORDS[:3]), "query_tokens: expected 4, one for each row of w, got 3",
    ),
    "too many key tokens": (
        lambda: plots.weights(np.eye(4), None, [*WORDS, "."]),
        "key_tokens: expected 4, one for each column of w, got 5",
    ),
    "sentence as tokens": (
        lambda: plots.weights(np.eye(4), "I love my dog"),
        "query_tokens: expected a list of str, got the str 'I love my dog'; .split() makes a list of its words",
    ),
    "ints as tokens": (
        lambda: plots.weights(np.eye(4), None, [1, 2, 3, 4]),
        "key_tokens: expected a list of str, got 1 in it; [str(token) for token in key_tokens] is one",
    ),
    "number as tokens": (lambda: plots.weights(np.eye(4), None, 4), "key_tokens: expected a list of str, got 4"),
    "table of 3 axes": (
        lambda: plots.encoding(np.zeros((1, 3, 4))),
        "table: expected (length, dim), none of them 0, got shape (1, 3, 4); one of them: table[0]",
    ),
    "complex table": (lambda: plots.encoding([[1j]]), "table: expected an array of numbers, got dtype complex128"),
    "table beyond the range": (
        lambda: plots.encoding([[0.0, -1.7e308]]), "table: expected numbers within +-1e+250 or NaN, got -1.7e+308",
    ),
    "columns beyond the range": (
        lambda: plots.columns([[0.0, 1e300]], [0]), "table: expected numbers within +-1e+250 or NaN, got 1e+300",
    ),
    "empty table": (
        lambda: plots.columns(np.zeros((0, 4)), [0]), "table: expected (length, dim), none of them 0, got shape (0, 4)",
    ),
    "column beyond the table": (lambda: plots.columns(TABLE, [0, 8]), "columns: expected ints from 0 to 7, got [0, 8]"),
    "negative column": (lambda: plots.columns(TABLE, [-1]), "columns: expected ints from 0 to 7, got [-1]"),
    "number as columns": (lambda: plots.columns(TABLE, 3), "columns: expected a list of ints, got 3"),
    "no columns": (lambda: plots.columns(TABLE, []), "columns: expected one int at least, got []"),
    "text as columns": (lambda: plots.columns(TABLE, "67"), "columns: expected an int, got '6'"),
    "binary of one row": (lambda: plots.binary(1, 8), "n: expected an int >= 2, got 1"),
    "binary of dim 0": (lambda: plots.binary(8, 0), "dim: expected an int >= 1, got 0"),
    "huge binary": (
        lambda: plots.binary(2**53 + 1, 16),
        "n: expected at most 2**53 numbers in the table, got 9007199254740993 * 16",
    ),
    "huge frequencies": (
        lambda: plots.frequencies(2**60),
        "dim: expected at most 2**53 numbers in the table, got 1 * 1152921504606846976",
    ),
    "huge base": (lambda: plots.frequencies(8, base=1e308), "base: expected 1e+250 at most in a picture, got 1e+308"),
    "unknown layout": (
        lambda: plots.frequencies(8, layout="x"),
        "layout: expected 'interleaved', 'concatenated' or 'cosines_first', got 'x'",
    ),
    "odd dim": (
        lambda: plots.relative_shift(1, 7), "dim: expected an even number (an unpaired sine cannot be rotated), got 7",
    ),
    "pair beyond the table": (
        lambda: plots.relative_shift(1, 8, pairs=[4]), "pairs: expected ints from 0 to 3, got [4]",
    ),
    "float position": (lambda: plots.relative_shift(1, 8, positions=[0.5]), "positions: expected an int, got 0.5"),
    **{
        f"position {position:.3g} and delta {delta}": (
            lambda delta=delta, position=position: plots.relative_shift(delta, 8, positions=[0, position]),
            f"positions: expected ints within +-2**53, also with delta={delta} added, got {position}",
        )
        for delta, position in [(1, 2**53), (-1, -(2**53)), (0, 2**53 + 1), (-1, 10**40)]
    },
}


@pytest.mark.parametrize(("call", "text"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(call, text):
    before = pyplot.get_fignums()
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    assert str(raised.value) == text
    assert pyplot.get_fignums() == before


def test_bad_axes_of_weights():
    axes = Figure().subplots(1, 3)
    with pytest.raises(ValueError, match=r"^ax: expected 2 Axes, one for each head of w, got 3; pyplot\."):
        plots.weights(softmax_of(2, 3, 3), ax=axes)
    with pytest.raises(ValueError, match=r"^ax: expected 2 Axes, one for each head of w, got 1; "):
        plots.weights(softmax_of(2, 3, 3), ax=axes[0])
    with pytest.raises(TypeError, match=r"^ax: expected an Axes of matplotlib, got array"):
        plots.weights(softmax_of(3, 3), ax=axes)
    with pytest.raises(ValueError, match=r"^ax: expected Axes of one figure, or of one subfigure, got Axes of several"):
        plots.weights(softmax_of(2, 3, 3), ax=[axes[0], Figure().subplots()])
    with pytest.raises(TypeError, match=r"^ax: expected an Axes of matplotlib, got None"):
        plots.weights(softmax_of(2, 3, 3), ax=[axes[0], None])
    assert not any(ax.has_data() for ax in axes)


# Imports.


def test_cattn_does_not_import_it():
    done = python("import sys, cattn\n"
                  "assert not hasattr(cattn, 'plots') and 'plots' not in dir(cattn)\n"
                  "assert not [name for name in sys.modules if name.startswith(('matplotlib', 'cattn.plots'))]\n"
                  "import cattn.plots\n"
                  "assert cattn.plots.weights and 'matplotlib.pyplot' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_without_matplotlib():
    done = python("import sys; sys.modules['matplotlib'] = None\nimport cattn\nfrom cattn import plots")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: cattn.plots: needs matplotlib (import of matplotlib halted; None in sys.modules): "
        '`pip install "cattn[plot]"`')
    assert done.returncode == 1


def test_extra():
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["plot"] == ["matplotlib"]


# The pictures of the documentation.


def test_pictures_of_the_documentation(tmp_path):
    """The script makes those that are there: the same names and sizes; the pixels are matplotlib's and its fonts'."""
    folder = Path(__file__).parents[1] / "docs"
    if not folder.exists():
        pytest.skip("an installation without docs")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", folder / "pictures.py", tmp_path], env=environment, check=True)
    made, there = ({path.name: path for path in place.glob("*.png")} for place in (tmp_path, folder / "pictures"))
    there.pop("benchmark.png", None)  # of the tool that measures
    assert made.keys() == there.keys()
    for name, path in there.items():
        assert path.stat().st_size < 80_000
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what reads images
            sizes = [np.array(pyplot.imread(picture).shape[:2]) for picture in (path, made[name])]
        assert np.abs(sizes[0] - sizes[1]).max() <= 1
