"""What is measured: each workload knows its arrays, its answer in float64 and how much work it is."""

from dataclasses import dataclass
from math import prod

import numpy as np


def as_dtype(name):
    """np.dtype(name), "bfloat16" included (without ml_dtypes: an ImportError)."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """scaled_dot_product_attention of normal random arrays."""

    name: str
    reason: str
    shape: tuple  # batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim
    dtype: str = "float32"
    is_causal: bool = False
    mask: str = ""  # "bool" (one key in eight hidden) or "float", dense, (seq_len_q, seq_len_kv)
    strided: bool = False  # (batch, seq, heads, dim) arrays seen as (batch, heads, seq, dim)
    limit: str = "fma"  # what bounds it: "fma", "read" or "" (neither)
    default: bool = True  # False: measured with --all only

    kind = "attention"

    def arrays(self):
        batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim = self.shape
        rng = np.random.default_rng(0)

        def normal(heads, seq_len):
            if self.strided:
                return rng.standard_normal((batch, seq_len, heads, head_dim), np.float32).swapaxes(1, 2)
            return rng.standard_normal((batch, heads, seq_len, head_dim), np.float32)

        lengths = {"query": (num_heads, seq_len_q), "key": (num_kv_heads, seq_len_kv), "value": (num_kv_heads, seq_len_kv)}
        arrays = {name: normal(*sizes).astype(as_dtype(self.dtype), copy=False) for name, sizes in lengths.items()}
        if self.mask == "bool":
            arrays["attn_mask"] = rng.random((seq_len_q, seq_len_kv)) < 0.875
        elif self.mask == "float":
            arrays["attn_mask"] = rng.standard_normal((seq_len_q, seq_len_kv), np.float32)
        return arrays

    def expected(self, arrays):
        from cattn import reference  # only here: the processes of the other peers stay free of cattn

        exact = {name: a if a.dtype == bool else a.astype(np.float64) for name, a in arrays.items()}
        return reference.scaled_dot_product_attention(**exact, is_causal=self.is_causal)

    @property
    def flops(self):
        batch, num_heads, _, seq_len_q, seq_len_kv, head_dim = self.shape
        return 4 * batch * num_heads * seq_len_q * seq_len_kv * head_dim // (2 if self.is_causal else 1)

    @property
    def nbytes(self):
        """Of the keys and the values."""
        batch, _, num_kv_heads, _, seq_len_kv, head_dim = self.shape
        return 2 * batch * num_kv_heads * seq_len_kv * head_dim * as_dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Self-attention of a whole MultiHeadAttention layer, projections and biases included."""

    name: str
    reason: str
    shape: tuple  # batch, seq_len, width; heads of 64
    dtype: str = "float32"
    limit: str = "fma"
    default: bool = True

    kind = "layer"

    @property
    def num_heads(self):
        return self.shape[-1] // 64

    def arrays(self):
        """The input x and a state dict in PyTorch's layout."""
        width = self.shape[-1]
        rng = np.random.default_rng(0)
        shapes = {
            "in_proj_weight": (3 * width, width),
            "in_proj_bias": (3 * width,),
            "out_proj.weight": (width, width),
            "out_proj.bias": (width,),
        }
        state = {name: rng.standard_normal(shape, np.float32) * np.float32(width**-0.5) for name, shape in shapes.items()}
        return {"x": rng.standard_normal(self.shape, np.float32), "state": state}

    def expected(self, arrays):
        from cattn import reference

        layer = reference.MultiHeadAttention(self.shape[-1], self.num_heads, dtype=np.float64)
        layer.load_state_dict({name: array.astype(np.float64) for name, array in arrays["state"].items()})
        return layer(arrays["x"].astype(np.float64))

    @property
    def flops(self):
        batch, seq_len, width = self.shape
        return 8 * batch * seq_len * width**2 + 4 * batch * seq_len**2 * width


@dataclass(frozen=True, kw_only=True)
class Table:
    """A sinusoidal table."""

    name: str
    reason: str
    shape: tuple  # length, dim
    dtype: str = "float32"
    limit: str = ""
    default: bool = True

    kind = "table"
    flops = 0

    def arrays(self):
        return {}

    def expected(self, arrays):
        from cattn import reference

        return reference.sinusoidal_encoding(*self.shape, dtype=np.float64)

    @property
    def nbytes(self):
        """Of the table, written."""
        return prod(self.shape) * as_dtype(self.dtype).itemsize


def _layers():
    for batch, seq_len in (1, 16), (1, 128), (32, 128):
        for width in (384, 768, 1024):
            reason = f"{batch} x {seq_len} tokens, width {width}: projections and attention together"
            yield Layer(name=f"layer-{batch}x{seq_len}-w{width}", reason=reason, shape=(batch, seq_len, width))


PREFILL = (1, 8, 8, 2048, 2048, 64)
DECODE = (1, 32, 32, 1, 4096, 128)

WORKLOADS = (
    Attention(name="tiny-3x2", reason="the textbook example: nothing but the cost of a call", shape=(1, 1, 1, 3, 3, 2)),
    Attention(name="tiny-16", reason="a short sentence: threads hardly pay", shape=(1, 8, 8, 16, 16, 64)),
    Attention(name="prefill-128", reason="one batch-1 sentence, all heads", shape=(1, 8, 8, 128, 128, 64)),
    Attention(name="prefill-512", reason="a paragraph", shape=(1, 8, 8, 512, 512, 64)),
    Attention(name="prefill-512-causal", reason="half the work", shape=(1, 8, 8, 512, 512, 64), is_causal=True),
    Attention(name="prefill-2048", reason="a page: scores no longer fit a cache", shape=PREFILL),
    Attention(name="prefill-2048-causal", reason="a prompt", shape=PREFILL, is_causal=True),
    Attention(name="prefill-2048-d128", reason="head_dim of most language models", shape=(1, 8, 8, 2048, 2048, 128)),
    Attention(
        name="prefill-2048-d128-causal",
        reason="a prompt of most language models",
        shape=(1, 8, 8, 2048, 2048, 128),
        is_causal=True,
    ),
    Attention(
        name="prefill-8192-causal",
        reason="a long prompt: 2 GB of scores in NumPy",
        shape=(1, 8, 8, 8192, 8192, 64),
        is_causal=True,
        default=False,
    ),
    Attention(name="encoder-32x128", reason="a batch of sentences (BERT)", shape=(32, 12, 12, 128, 128, 64)),
    Attention(name="vit-16x197", reason="image patches: 197 is no multiple of anything", shape=(16, 12, 12, 197, 197, 64)),
    Attention(name="head-dim-80", reason="a head_dim that is no power of two", shape=(1, 12, 12, 1024, 1024, 80)),
    Attention(name="head-dim-96", reason="another one", shape=(1, 12, 12, 1024, 1024, 96)),
    Attention(name="prefill-2048-strided", reason="views of (batch, seq, heads, dim)", shape=PREFILL, strided=True),
    Attention(name="prefill-2048-float-mask", reason="a dense bias", shape=PREFILL, mask="float"),
    Attention(name="prefill-2048-bool-mask", reason="an arbitrary pattern", shape=PREFILL, mask="bool"),
    Attention(name="prefill-2048-float64", reason="double precision throughout", shape=PREFILL, dtype="float64"),
    Attention(name="prefill-2048-float16", reason="half-precision storage", shape=PREFILL, dtype="float16"),
    Attention(name="prefill-2048-bfloat16", reason="the other half precision", shape=PREFILL, dtype="bfloat16"),
    Attention(name="decode-4096", reason="one new token: reading K and V is the work", shape=DECODE, limit="read"),
    Attention(
        name="decode-4096-float16",
        reason="half the bytes",
        shape=DECODE,
        dtype="float16",
        limit="read",
    ),
    Attention(name="decode-4096-bfloat16", reason="half the bytes", shape=DECODE, dtype="bfloat16", limit="read"),
    Attention(
        name="decode-gqa2", reason="two query heads share a key head", shape=(1, 32, 16, 1, 4096, 128), limit="read"
    ),
    Attention(name="decode-gqa4", reason="four query heads share a key head", shape=(1, 32, 8, 1, 4096, 128), limit="read"),
    Attention(name="decode-gqa8", reason="one key head, long", shape=(1, 8, 1, 1, 32768, 128), limit="read"),
    Attention(name="decode-gqa4-batch8", reason="eight sequences at once", shape=(8, 32, 8, 1, 2048, 128), limit="read"),
    Table(name="table-5000x512", reason="positions of a long context", shape=(5000, 512)),
    Table(name="table-131072x1024", reason="a table of 512 MiB", shape=(131072, 1024), default=False),
    *_layers(),
)
