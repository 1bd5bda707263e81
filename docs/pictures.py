"""The pictures of README and docs: `python docs/pictures.py [FOLDER]` writes them, by default beside this file."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot

import cattn
from cattn import plots


def weights_by_example():
    """Those of docs/attention.md."""
    query = np.array([[0., 4., 0., 0., 1.], [4., 0., 0., 3., 1.], [0., 0., 0., 4., 1.], [0., 1., 4., 0., 1.]])
    key = np.array([[1., 0., 0., 0., 1.], [0., 1., 0., 0., -1.], [0., 0., 1., 0., 1.], [0., 0., 0., 1., -1.]])
    return cattn.scaled_dot_product_attention(query, key, key, return_weights=True)[1]


def one_head():
    tokens = ["I", "love", "my", "dog"]
    return plots.weights(weights_by_example(), tokens, tokens)


def several_heads():
    """Causal, with ALiBi: the first head looks at what is near, the last one everywhere."""
    tokens = ["The", "dog", "did", "not", "cross", "the", "street", "because", "it", "was", "tired"]
    rng = np.random.default_rng(2)
    query, key = rng.standard_normal((2, 1, 4, len(tokens), 8))
    _, w = cattn.scaled_dot_product_attention(
        query, key, key, is_causal=True, alibi_slopes=np.array([1, 1 / 4, 1 / 16, 1 / 64]), return_weights=True)
    return plots.weights(w[0], tokens, tokens)[0]


def rows(head_dim, scale):
    """Those of docs/training.md: largest weights, and norms of the gradients by the scores."""
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((1000, head_dim)), rng.standard_normal((16, head_dim))
    value, grad_out = rng.standard_normal((16, 64)), rng.standard_normal((1000, 64))
    bias = np.zeros((1000, 16))
    out, weights, logsumexp = cattn.scaled_dot_product_attention(
        query, key, value, bias, scale=scale, return_weights=True, return_logsumexp=True)
    gradients = cattn.scaled_dot_product_attention_backward(
        grad_out, query, key, value, out, logsumexp, bias, scale=scale, wanted=["attn_mask"])
    return weights.max(axis=1), np.linalg.norm(gradients.attn_mask, axis=1)


def scales():
    """The median of the rows, and the quartiles around it."""
    head_dims = 2 ** np.arange(2, 11)
    panels = pyplot.subplots(2, 1, figsize=(4.2, 4.4), sharex=True, layout="constrained", height_ratios=(2, 3))[1]
    for name, scale_of, colour, style in (
            ("scale = 1 / sqrt(head_dim)", lambda head_dim: 1 / np.sqrt(head_dim), "#0072B2", "-o"),
            ("scale = 1", lambda head_dim: 1, "#D55E00", "--s")):
        of_rows = np.array([rows(head_dim, scale_of(head_dim)) for head_dim in head_dims])
        quartiles = np.quantile(of_rows, (0.25, 0.5, 0.75), axis=2).transpose(2, 0, 1)
        for panel, (low, median, high) in zip(panels, quartiles, strict=True):
            panel.plot(head_dims, median, style, color=colour, markersize=4, label=name)
            panel.fill_between(head_dims, low, high, color=colour, alpha=0.2, linewidth=0)
    panels[0].set(ylabel="largest weight", ylim=(0, 1.04))
    panels[1].set(xlabel="head_dim", ylabel="gradient by the scores", xscale="log", yscale="log",
                  xticks=head_dims, xticklabels=head_dims)
    panels[1].minorticks_off()
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize="small")
    return panels[0]


PICTURES = {
    "weights": one_head,
    "heads": several_heads,
    "encoding": lambda: plots.encoding(cattn.sinusoidal_encoding(60, 32)),
    "columns": lambda: plots.columns(cattn.sinusoidal_encoding(60, 32), [6, 7, 8, 9]),
    "binary": lambda: plots.binary(32, 10, base=32),  # five bits; five wavelengths, each twice the one before
    "frequencies": lambda: plots.frequencies(32),
    "relative_shift": lambda: plots.relative_shift(5, 32),
    "scales": scales,
}


def main(folder):
    matplotlib.use("Agg")
    matplotlib.rcdefaults()  # not the colours and fonts of whoever runs this
    for name, draw in PICTURES.items():
        figure = draw().figure
        # Without the version of matplotlib: the same bytes as long as the same pixels.
        figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
