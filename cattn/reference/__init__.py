"""What cattn computes, in plain NumPy: obvious, slow, for every float dtype.

Each public function and class of `cattn` has a counterpart here with the same name and the same arguments
(`out` and `num_threads` aside); there, the arguments are described. The fast ones are tested against these; a
new behaviour starts here.
Attention, `merge_states` and `KVCache` do not check their arguments here: those of `cattn` do. The
layers here are also the base of the fast ones, which do the costly steps in their own way.
"""

from cattn.reference._attention import scaled_dot_product_attention
from cattn.reference._backward import Gradients, scaled_dot_product_attention_backward, varlen_attention_backward
from cattn.reference._cache import KVCache
from cattn.reference._dropout import dropout_keep, philox4x32
from cattn.reference._linear import linear, quantize_rows
from cattn.reference._merge import merge_states
from cattn.reference._multihead import LayerGradients, MultiHeadAttention
from cattn.reference._positional import PositionalEncoding, relative_shift, sinusoidal_encoding
from cattn.reference._rotary import rotary_embedding, rotary_table
from cattn.reference._serving import paged_attention, varlen_attention

__all__ = [
    "Gradients",
    "KVCache",
    "LayerGradients",
    "MultiHeadAttention",
    "PositionalEncoding",
    "dropout_keep",
    "linear",
    "merge_states",
    "paged_attention",
    "philox4x32",
    "quantize_rows",
    "relative_shift",
    "rotary_embedding",
    "rotary_table",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
    "sinusoidal_encoding",
    "varlen_attention",
    "varlen_attention_backward",
]
