"""Attention for servers without a GPU: NumPy arrays in, NumPy arrays out, fused kernels between.

    scaled_dot_product_attention    softmax(Q K^T) V with masks, windows, GQA, dropout: PyTorch's names and order
    MultiHeadAttention              the same between learned projections; loads the usual state dicts
    linear                          projections alone, also by weights of 16 or 8 bits
    sinusoidal_encoding, PositionalEncoding, relative_shift    positions by sines and cosines
    reference                       all of it in plain NumPy: the specification
    preload                         modules and threads that a first call would ask for, before rights are dropped

How a call goes:  _attention.py, _linear.py, _multihead.py, _positional.py (checks by _checks.py, allocation)  ->
_kernels (one module per instruction set, chosen at import: isa, available_isas)  ->  tiles.  _threads.py says how many
threads.
"""

from cattn import reference
from cattn._attention import scaled_dot_product_attention
from cattn._config import show_config
from cattn._kernels import available_isas, isa
from cattn._linear import linear
from cattn._multihead import MultiHeadAttention
from cattn._positional import PositionalEncoding, relative_shift, sinusoidal_encoding
from cattn._preload import preload
from cattn._threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "MultiHeadAttention",
    "PositionalEncoding",
    "available_isas",
    "get_num_threads",
    "isa",
    "linear",
    "preload",
    "reference",
    "relative_shift",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
    "sinusoidal_encoding",
]
