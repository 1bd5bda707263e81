"""Attention for servers without a GPU: NumPy arrays in, NumPy arrays out, fused kernels between.

    scaled_dot_product_attention    softmax(Q K^T) V with masks, windows, GQA, dropout: PyTorch's names and order
    varlen_attention, paged_attention  of sequences of different lengths: packed, or with keys in pages
    scaled_dot_product_attention_backward, varlen_attention_backward  their gradients
    KVCache                         keys and values of sequences that grow, in pages
    merge_states                    results over parts of the keys, merged: shared prefixes, keys on several machines
    MultiHeadAttention              the same between learned projections; loads the usual state dicts
    linear                          projections alone, also by weights of 16 or 8 bits
    sinusoidal_encoding, PositionalEncoding, relative_shift    positions by sines and cosines
    rotary_table, rotary_embedding  positions by turning pairs of numbers of queries and keys
    reference                       all of it in plain NumPy: the specification
    preload                         modules and threads that a first call would ask for, before rights are dropped

How a call goes:  _attention.py, _serving.py, _gradients.py, _linear.py, _multihead.py, _positional.py, _rotary.py
(checks by _checks.py, allocation)  ->  _kernels (one module per instruction set, chosen at import: isa,
available_isas)  ->  tiles.  _threads.py says how many threads.
"""

from cattn import reference
from cattn._attention import scaled_dot_product_attention
from cattn._cache import KVCache
from cattn._config import show_config
from cattn._gradients import Gradients, scaled_dot_product_attention_backward, varlen_attention_backward
from cattn._kernels import available_isas, isa
from cattn._linear import linear
from cattn._merge import merge_states
from cattn._multihead import LayerGradients, MultiHeadAttention
from cattn._positional import PositionalEncoding, relative_shift, sinusoidal_encoding
from cattn._preload import preload
from cattn._rotary import rotary_embedding, rotary_table
from cattn._serving import paged_attention, varlen_attention
from cattn._threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "Gradients",
    "KVCache",
    "LayerGradients",
    "MultiHeadAttention",
    "PositionalEncoding",
    "available_isas",
    "get_num_threads",
    "isa",
    "linear",
    "merge_states",
    "paged_attention",
    "preload",
    "reference",
    "relative_shift",
    "rotary_embedding",
    "rotary_table",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
    "set_num_threads",
    "show_config",
    "sinusoidal_encoding",
    "varlen_attention",
    "varlen_attention_backward",
]
