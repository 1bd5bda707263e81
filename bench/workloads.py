"""What is measured: each workload knows its arrays, its answer in float64 and how much work it is."""

from dataclasses import dataclass
from math import prod

import numpy as np

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def as_dtype(name):
    """np.dtype(name), "bfloat16" included (without ml_dtypes: an ImportError)."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@dataclass(frozen=True)
class Attention:
    """scaled_dot_product_attention of normal random arrays."""

    name: str
    reason: str
    shape: tuple  # batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim
    dtype: str = "float32"
    is_causal: bool = False
    mask: str = ""  # "bool" (one key in eight hidden) or "float": dense, (seq_len_q, seq_len_kv)
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

        arrays = {
            "query": normal(num_heads, seq_len_q),
            "key": normal(num_kv_heads, seq_len_kv),
            "value": normal(num_kv_heads, seq_len_kv),
        }
        arrays = {name: array.astype(as_dtype(self.dtype), copy=False) for name, array in arrays.items()}
        if self.mask == "bool":
            arrays["attn_mask"] = rng.random((seq_len_q, seq_len_kv)) < 0.875
        elif self.mask == "float":
            arrays["attn_mask"] = rng.standard_normal((seq_len_q, seq_len_kv), np.float32)
        return arrays

    def expected(self, arrays):
        from cattn import reference  # only here: the processes of the other peers stay free of cattn

        num_kv_heads = self.shape[2]
        query, key, value = (
            np.split(arrays[name].astype(np.float64), num_kv_heads, axis=1)
            for name in ("query", "key", "value")
        )
        options = {"attn_mask": arrays.get("attn_mask"), "is_causal": self.is_causal}
        # One key head at a time: the scores of all of them can be many gigabytes.
        heads = [
            reference.scaled_dot_product_attention(*qkv, **options)
            for qkv in zip(query, key, value, strict=True)
        ]
        return np.concatenate(heads, axis=1)

    @property
    def flops(self):
        batch, num_heads, _, seq_len_q, seq_len_kv, head_dim = self.shape
        return 4 * batch * num_heads * seq_len_q * seq_len_kv * head_dim // (2 if self.is_causal else 1)

    @property
    def nbytes(self):
        """Of the keys and the values."""
        batch, _, num_kv_heads, _, seq_len_kv, head_dim = self.shape
        return 2 * batch * num_kv_heads * seq_len_kv * head_dim * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Layer:
    """Self-attention of a whole MultiHeadAttention layer, projections and biases included."""

    name: str
    reason: str
    shape: tuple  # batch, seq_len, width; heads of 64
    dtype: str = "float32"
    limit: str = "fma"
    default: bool = True

    kind = "layer"
    nbytes = 0

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
        scale = np.float32(width**-0.5)
        state = {name: scale * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
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


@dataclass(frozen=True)
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
        """Of the table."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


PREFILL = (1, 8, 8, 2048, 2048, 64)
PREFILL_D128 = (1, 8, 8, 2048, 2048, 128)
DECODE = (1, 32, 32, 1, 4096, 128)

WORKLOADS = (
    Attention(
        "tiny-3x2", "the textbook example: all of it is the cost of a call", (1, 1, 1, 3, 3, 2), limit=""
    ),
    Attention("tiny-16", "a short sentence: threads hardly pay", (1, 8, 8, 16, 16, 64), limit=""),
    Attention("prefill-128", "a sentence", (1, 8, 8, 128, 128, 64)),
    Attention("prefill-512", "a paragraph", (1, 8, 8, 512, 512, 64)),
    Attention("prefill-512-causal", "a paragraph as a prompt", (1, 8, 8, 512, 512, 64), is_causal=True),
    Attention("prefill-2048", "a page: the scores fit no cache", PREFILL),
    Attention("prefill-2048-causal", "a page as a prompt: half the work", PREFILL, is_causal=True),
    Attention("prefill-2048-d128", "the head_dim of most language models", PREFILL_D128),
    Attention("prefill-2048-d128-causal", "a prompt of a language model", PREFILL_D128, is_causal=True),
    Attention("prefill-8192-causal", "a chapter", (1, 8, 8, 8192, 8192, 64), is_causal=True, default=False),
    Attention("encoder-32x128", "a batch of sentences", (32, 12, 12, 128, 128, 64)),
    Attention("vit-16x197", "image patches: 197 is a multiple of nothing", (16, 12, 12, 197, 197, 64)),
    Attention("head-dim-80", "a head_dim that is no power of two", (1, 12, 12, 1024, 1024, 80)),
    Attention("head-dim-96", "another one", (1, 12, 12, 1024, 1024, 96)),
    Attention(
        "prefill-2048-strided", "what a projection leaves: (batch, seq, heads, dim)", PREFILL, strided=True
    ),
    Attention("prefill-2048-float-mask", "a dense bias", PREFILL, mask="float"),
    Attention("prefill-2048-bool-mask", "any pattern", PREFILL, mask="bool"),
    Attention("prefill-2048-float64", "double precision throughout", PREFILL, "float64"),
    Attention("prefill-2048-float16", "half the bytes, the same arithmetic", PREFILL, "float16"),
    Attention("prefill-2048-bfloat16", "the other half precision", PREFILL, "bfloat16"),
    Attention("decode-4096", "one new token: reading keys and values is the work", DECODE, limit="read"),
    Attention("decode-4096-float16", "half the bytes", DECODE, "float16", limit="read"),
    Attention("decode-4096-bfloat16", "half the bytes", DECODE, "bfloat16", limit="read"),
    Attention("decode-gqa2", "two query heads a key head", (1, 32, 16, 1, 4096, 128), limit="read"),
    Attention("decode-gqa4", "four query heads a key head", (1, 32, 8, 1, 4096, 128), limit="read"),
    Attention("decode-gqa8", "eight query heads, one key head, long", (1, 8, 1, 1, 32768, 128), limit="read"),
    Attention("decode-gqa4-batch8", "eight sequences at once", (8, 32, 8, 1, 2048, 128), limit="read"),
    Table("table-5000x512", "positions of a long context", (5000, 512)),
    Table("table-131072x1024", "half a gigabyte of positions", (131072, 1024), default=False),
    Layer("layer-1x16-w384", "projections and attention of a short sentence", (1, 16, 384)),
    Layer("layer-1x16-w768", "the same, wider", (1, 16, 768)),
    Layer("layer-1x16-w1024", "the same, wider", (1, 16, 1024), default=False),
    Layer("layer-1x128-w384", "of a long sentence", (1, 128, 384)),
    Layer("layer-1x128-w768", "the same, wider", (1, 128, 768)),
    Layer("layer-1x128-w1024", "the same, wider", (1, 128, 1024), default=False),
    Layer("layer-32x128-w384", "of a batch", (32, 128, 384)),
    Layer("layer-32x128-w768", "the same, wider", (32, 128, 768)),
    Layer("layer-32x128-w1024", "the same, wider", (32, 128, 1024), default=False),
)
