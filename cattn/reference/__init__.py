"""What cattn computes, in plain NumPy: obvious, slow, for every float dtype.

Each public function and class of `cattn` has a counterpart here with the same name and the same arguments
(`out` and `num_threads` aside); there, the arguments are described. The fast ones are tested against these; a
new behaviour starts here.
`scaled_dot_product_attention` does not check its arguments: `cattn.scaled_dot_product_attention` does. The
classes here are also the base of the fast ones, which do the costly steps in their own way.
"""

from cattn.reference._attention import scaled_dot_product_attention
from cattn.reference._dropout import dropout_keep, philox4x32
from cattn.reference._linear import linear
from cattn.reference._multihead import MultiHeadAttention
from cattn.reference._positional import PositionalEncoding, relative_shift, sinusoidal_encoding

__all__ = [
    "MultiHeadAttention",
    "PositionalEncoding",
    "dropout_keep",
    "linear",
    "philox4x32",
    "relative_shift",
    "scaled_dot_product_attention",
    "sinusoidal_encoding",
]
