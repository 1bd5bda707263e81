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


PICTURES = {
    "weights": one_head,
    "heads": several_heads,
    "encoding": lambda: plots.encoding(cattn.sinusoidal_encoding(60, 32)),
    "columns": lambda: plots.columns(cattn.sinusoidal_encoding(60, 32), [6, 7, 8, 9]),
    "binary": lambda: plots.binary(32, 10, base=32),  # five bits; five wavelengths, each twice the one before
    "frequencies": lambda: plots.frequencies(32),
    "relative_shift": lambda: plots.relative_shift(5, 32),
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
