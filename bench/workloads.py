"""What is measured: each workload knows its arrays, its answer in float64 and how much work it is."""

import math
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import numpy as np

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
PAGE_SIZE = 64
SCALE_DIMS = 32  # numbers of an int8 weight that share a scale
SCALE = np.float32(1 / 32)  # of int8 numbers that stand for normal random ones


def as_dtype(name):
    """np.dtype(name), "bfloat16" included (without ml_dtypes: an ImportError)."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def log_uniform(shortest, longest, count):
    """So many lengths, evenly spread on a logarithmic scale, in any order; the longest where it is one."""
    return np.random.default_rng(1).permutation(np.geomspace(longest, shortest, count).round().astype(np.int64))


def as_int8(array):
    """What numbers times SCALE stand for it. Larger ones than 127 * SCALE are cut."""
    return np.clip(np.rint(array / SCALE), -127, 127).astype(np.int8)


@dataclass(frozen=True)
class Workload:
    """What all of them have, and the values that most have."""

    name: str
    reason: str
    shape: tuple
    dtype: str = "float32"
    limit: str = "fma"  # what bounds it: "fma", "read" or "" (neither)
    default: bool = True  # False: measured with --all only

    flops = nbytes = 0  # where it is not counted


@dataclass(frozen=True)
class Attention(Workload):
    """scaled_dot_product_attention of normal random arrays."""

    shape: tuple  # batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim
    is_causal: bool = False
    mask: str = ""  # "bool" (one key in eight hidden) or "float": dense, (seq_len_q, seq_len_kv)
    strided: bool = False  # (batch, seq, heads, dim) arrays seen as (batch, heads, seq, dim)

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

        options = {"attn_mask": arrays.get("attn_mask"), "is_causal": self.is_causal}
        heads = [
            reference.scaled_dot_product_attention(*qkv, **options)
            for qkv in self._key_heads(arrays, "query", "key", "value")
        ]
        return np.concatenate(heads, axis=1)

    def _key_heads(self, arrays, *names):
        """These arrays in float64, one key head at a time: the scores of all of them can be many gigabytes."""
        parts = (np.split(arrays[name].astype(np.float64), self.shape[2], axis=1) for name in names)
        return zip(*parts, strict=True)

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
class Training(Attention):
    """Attention and its gradients by query, key and value, for a normal random gradient by the result."""

    kind = "training"

    def arrays(self):
        arrays = super().arrays()
        grad_out = np.random.default_rng(1).standard_normal(arrays["query"].shape, np.float32)
        return arrays | {"grad_out": grad_out.astype(arrays["query"].dtype, copy=False)}

    def expected(self, arrays):
        """out and the gradients, joined."""
        from cattn import reference

        options = {"attn_mask": arrays.get("attn_mask"), "is_causal": self.is_causal}
        heads = []
        for grad_out, *qkv in self._key_heads(arrays, "grad_out", "query", "key", "value"):
            out, logsumexp = reference.scaled_dot_product_attention(*qkv, **options, return_logsumexp=True)
            gradients = reference.scaled_dot_product_attention_backward(grad_out, *qkv, out, logsumexp, **options)
            heads.append((out, gradients.query, gradients.key, gradients.value))
        return joined(np.concatenate(parts, axis=1) for parts in zip(*heads, strict=True))

    @property
    def flops(self):
        """Five products more than the forward's two: the scores, which need not have been kept, and four."""
        return 7 * super().flops // 2


def joined(parts):
    """Arrays of any shapes as a single one, of one axis."""
    return np.concatenate([np.ravel(part) for part in parts])


@dataclass(frozen=True)
class Layer(Workload):
    """Self-attention of a whole MultiHeadAttention layer, projections and biases included."""

    shape: tuple  # batch, seq_len, width; heads of 64

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
        scale = np.float32(width**-0.5)
        state = {name: scale * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        return {"x": rng.standard_normal(self.shape, np.float32), "state": state}

    def expected(self, arrays):
        return self._reference(arrays)(arrays["x"].astype(np.float64))

    def _reference(self, arrays):
        """The layer in float64."""
        from cattn import reference

        layer = reference.MultiHeadAttention(self.shape[-1], self.num_heads, dtype=np.float64)
        layer.load_state_dict({name: array.astype(np.float64) for name, array in arrays["state"].items()})
        return layer

    @property
    def flops(self):
        batch, seq_len, width = self.shape
        return 8 * batch * seq_len * width**2 + 4 * batch * seq_len**2 * width


@dataclass(frozen=True)
class TrainingLayer(Layer):
    """The layer and its gradients by x and all parameters, for a normal random gradient by the result."""

    kind = "training_layer"

    def arrays(self):
        return super().arrays() | {"grad_out": np.random.default_rng(1).standard_normal(self.shape, np.float32)}

    def expected(self, arrays):
        """out and the gradients, joined."""
        out, pullback = self._reference(arrays).vjp(arrays["x"].astype(np.float64))
        gradients = pullback(arrays["grad_out"].astype(np.float64))
        return self.joined([out, gradients.query, *gradients.parameters.values()])

    def joined(self, parts):
        """out, the gradients by x and by each parameter as a single array. Those by parameters are sums over all tokens
        and shown in units of sqrt(tokens): so they are as large as the rest, and one tolerance is good for all."""
        out, of_x, *of_parameters = parts
        return joined([out, of_x, *(part / math.sqrt(prod(self.shape[:2])) for part in of_parameters)])

    @property
    def flops(self):
        """Of each projection three products instead of one, of attention seven instead of two."""
        batch, seq_len, width = self.shape
        return 24 * batch * seq_len * width**2 + 14 * batch * seq_len**2 * width


@dataclass(frozen=True)
class Table(Workload):
    """A sinusoidal table."""

    shape: tuple  # length, dim
    limit: str = ""

    kind = "table"

    def arrays(self):
        return {}

    def expected(self, arrays):
        from cattn import reference

        return reference.sinusoidal_encoding(*self.shape, dtype=np.float64)

    @property
    def nbytes(self):
        """Of the table."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Packed(Workload):
    """varlen_attention of sequences of different lengths, packed one after the other."""

    shape: tuple  # batch, num_heads, num_kv_heads, shortest, longest, head_dim
    is_causal: bool = False
    each: bool = False  # True: a dense call for each sequence, on arrays of its own

    kind = "packed"

    @property
    def lengths(self):
        batch, _, _, shortest, longest, _ = self.shape
        return log_uniform(shortest, longest, batch)

    def arrays(self):
        _, num_heads, num_kv_heads, _, _, head_dim = self.shape
        rng = np.random.default_rng(0)
        total = int(self.lengths.sum())
        return {
            name: rng.standard_normal((total, heads, head_dim), np.float32).astype(as_dtype(self.dtype), copy=False)
            for name, heads in (("query", num_heads), ("key", num_kv_heads), ("value", num_kv_heads))
        } | {"cu_seqlens": np.cumsum([0, *self.lengths])}

    def sequences(self, arrays):
        """(query, key, value) of each, (1, heads, length, head_dim), contiguous."""
        return [
            tuple(
                np.ascontiguousarray(arrays[name][start:end].swapaxes(0, 1))[None] for name in ("query", "key", "value")
            )
            for start, end in pairwise(arrays["cu_seqlens"])
        ]

    def expected(self, arrays):
        from cattn import reference

        qkv = (arrays[name].astype(np.float64) for name in ("query", "key", "value"))
        return reference.varlen_attention(*qkv, arrays["cu_seqlens"], is_causal=self.is_causal)

    @property
    def flops(self):
        _, num_heads, _, _, _, head_dim = self.shape
        return 4 * num_heads * int((self.lengths**2).sum()) * head_dim // (2 if self.is_causal else 1)

    @property
    def nbytes(self):
        """Of the keys and the values."""
        _, _, num_kv_heads, _, _, head_dim = self.shape
        return 2 * int(self.lengths.sum()) * num_kv_heads * head_dim * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Paged(Workload):
    """paged_attention of a new token of each sequence, whose keys and values lie in pages in any order.

    dtype is that of the pages and of the queries; int8 has queries of float32. All int8 rows have the same scale, so
    that implementations with a scale for each token, each channel or each tensor have the same answer.
    """

    shape: tuple  # batch, num_heads, num_kv_heads, shortest, longest, head_dim
    limit: str = "read"

    kind = "paged"
    lengths = Packed.lengths

    def arrays(self):
        """Each head of a page has its tokens one after the other, as in KVCache."""
        batch, num_heads, num_kv_heads, _, longest, head_dim = self.shape
        rng = np.random.default_rng(0)
        num_pages = -(-self.lengths // PAGE_SIZE)
        shape = int(num_pages.sum()), num_kv_heads, PAGE_SIZE, head_dim

        def pages():
            pages = rng.standard_normal(shape, np.float32)
            return as_int8(pages) if self.dtype == "int8" else pages.astype(as_dtype(self.dtype), copy=False)

        query = rng.standard_normal((batch, num_heads, head_dim), np.float32)
        arrays = {
            "query": query.astype(as_dtype("float32" if self.dtype == "int8" else self.dtype), copy=False),
            "key": pages().swapaxes(1, 2),
            "value": pages().swapaxes(1, 2),
            "block_table": np.full((batch, -(-longest // PAGE_SIZE)), -1),
            "kv_lens": self.lengths,
        }
        order = rng.permutation(num_pages.sum())
        for row, part in zip(arrays["block_table"], np.split(order, np.cumsum(num_pages)[:-1]), strict=True):
            row[: len(part)] = part
        if self.dtype == "int8":
            scales = np.full((shape[0], num_kv_heads, PAGE_SIZE), SCALE).swapaxes(1, 2)
            arrays |= {"key_scales": scales, "value_scales": scales.copy(order="K")}
        return arrays

    def sequences(self, arrays):
        """(key, value) of each, (num_kv_heads, length, head_dim), contiguous."""

        def gathered(pages, length):
            return np.ascontiguousarray(pages.reshape(-1, *pages.shape[2:])[:length].swapaxes(0, 1))

        return [
            tuple(gathered(arrays[name][pages[: -(-length // PAGE_SIZE)]], length) for name in ("key", "value"))
            for pages, length in zip(arrays["block_table"], arrays["kv_lens"], strict=True)
        ]

    def expected(self, arrays):
        from cattn import reference

        table = arrays["block_table"], arrays["kv_lens"]
        wide = {name: array.astype(np.float64) for name, array in arrays.items() if array.dtype.kind != "i"}
        wide |= {name: arrays[name].astype(np.float64) for name in ("key", "value")}
        scales = {name: wide[name] for name in wide if name.endswith("_scales")}
        return reference.paged_attention(wide["query"], wide["key"], wide["value"], *table, **scales)

    @property
    def flops(self):
        _, num_heads, _, _, _, head_dim = self.shape
        return 4 * num_heads * int(self.lengths.sum()) * head_dim

    @property
    def nbytes(self):
        """Of the keys and the values, and of their scales."""
        _, _, num_kv_heads, _, _, head_dim = self.shape
        row = head_dim * ITEMSIZE[self.dtype] + (4 if self.dtype == "int8" else 0)
        return 2 * int(self.lengths.sum()) * num_kv_heads * row


@dataclass(frozen=True)
class Cache(Workload):
    """KVCache.attend of one token of one sequence, which stores its key and value. `extend`, once for all layers of a
    model, is not timed."""

    shape: tuple  # num_heads, num_kv_heads, seq_len_kv, head_dim
    limit: str = ""

    kind = "cache"

    def arrays(self):
        """The last key and value are the token's."""
        num_heads, num_kv_heads, seq_len_kv, head_dim = self.shape
        rng = np.random.default_rng(0)
        return {
            "query": rng.standard_normal((1, num_heads, head_dim), np.float32),
            "key": rng.standard_normal((seq_len_kv, num_kv_heads, head_dim), np.float32),
            "value": rng.standard_normal((seq_len_kv, num_kv_heads, head_dim), np.float32),
        }

    def expected(self, arrays):
        from cattn import reference

        qkv = (array.astype(np.float64) for array in arrays.values())
        return reference.varlen_attention(*qkv, [0, 1], [0, self.shape[2]])

    @property
    def flops(self):
        num_heads, _, seq_len_kv, head_dim = self.shape
        return 4 * num_heads * seq_len_kv * head_dim

    @property
    def nbytes(self):
        """Of the keys and the values."""
        _, num_kv_heads, seq_len_kv, head_dim = self.shape
        return 2 * num_kv_heads * seq_len_kv * head_dim * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Merge(Workload):
    """merge_states of results over parts of the keys."""

    shape: tuple  # states, batch, num_heads, seq_len_q, head_dim
    limit: str = "read"

    kind = "merge"

    def arrays(self):
        rng = np.random.default_rng(0)
        return {
            "outputs": rng.standard_normal(self.shape, np.float32),
            "logsumexps": rng.standard_normal(self.shape[:-1], np.float32),
        }

    def expected(self, arrays):
        """The result with its logsumexp as one more column."""
        from cattn import reference

        return beside(reference.merge_states(*(array.astype(np.float64) for array in arrays.values())))

    @property
    def flops(self):
        return 2 * prod(self.shape)

    @property
    def nbytes(self):
        """Of the states, which are read."""
        return (prod(self.shape) + prod(self.shape[:-1])) * ITEMSIZE[self.dtype]


def beside(result):
    """(out, logsumexp) as one array."""
    out, logsumexp = result
    return np.concatenate([out, logsumexp[..., None]], axis=-1)


@dataclass(frozen=True)
class Rotary(Workload):
    """rotary_embedding of the first half of the columns with the second (interleaved=False)."""

    shape: tuple  # batch, num_heads, seq_len, head_dim
    in_place: bool = False  # the result is written over x; else into an array that is there
    limit: str = "read"

    kind = "rotary"

    def arrays(self):
        _, _, seq_len, head_dim = self.shape
        angle = np.arange(seq_len)[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
        x = np.random.default_rng(0).standard_normal(self.shape, np.float32)
        return {"x": x, "cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}

    def expected(self, arrays):
        from cattn import reference

        return reference.rotary_embedding(*(array.astype(np.float64) for array in arrays.values()), interleaved=False)

    @property
    def flops(self):
        return 3 * prod(self.shape)

    @property
    def nbytes(self):
        """Of x and the tables, which are read."""
        return (prod(self.shape) + prod(self.shape[-2:])) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Linear(Workload):
    """linear: x @ weight^T. dtype is the weight's; x and the result are float32.

    x has 128 values, -4 to 63/16, and the groups of an int8 row the same scale: so implementations that round x to 7
    bits as well (PyTorch's dynamic int8), or have a scale for each row of the weight, have the same answer.
    """

    shape: tuple  # rows, in_features, out_features

    kind = "linear"

    def arrays(self):
        rows, in_features, out_features = self.shape
        rng = np.random.default_rng(0)
        x = np.clip(np.rint(16 * rng.standard_normal((rows, in_features), np.float32)), -64, 63) / np.float32(16)
        x[0, :2] = -4, 63 / 16  # whoever looks for the range of x finds this one
        weight = rng.standard_normal((out_features, in_features), np.float32)
        if self.dtype != "int8":
            return {"x": x, "weight": (weight * np.float32(in_features**-0.5)).astype(as_dtype(self.dtype), copy=False)}
        scales = SCALE * rng.uniform(0.5, 1.5, (out_features, 1)).astype(np.float32) * np.float32(in_features**-0.5)
        groups = -(-in_features // SCALE_DIMS)
        return {"x": x, "weight": as_int8(weight), "weight_scales": np.repeat(scales, groups, axis=1)}

    def expected(self, arrays):
        weight = arrays["weight"].astype(np.float64)
        if self.dtype == "int8":
            weight *= arrays["weight_scales"][:, :1]
        return arrays["x"].astype(np.float64) @ weight.T

    @property
    def flops(self):
        return 2 * prod(self.shape)

    @property
    def nbytes(self):
        """Of the weight and its scales."""
        _, in_features, out_features = self.shape
        row = in_features * ITEMSIZE[self.dtype] + (4 * -(-in_features // SCALE_DIMS) if self.dtype == "int8" else 0)
        return out_features * row


PREFILL = (1, 8, 8, 2048, 2048, 64)
PREFILL_D128 = (1, 8, 8, 2048, 2048, 128)
ENCODER = (32, 12, 12, 128, 128, 64)
DECODE = (1, 32, 32, 1, 4096, 128)
PACKED = (64, 8, 8, 16, 512, 64)
ROTARY = (1, 32, 2048, 128)
LINEAR = {"up": (576, 1536), "down": (1536, 576), "qkv": (576, 960)}  # of SmolLM2-135M


def paged(batch, group_size, dtype):
    name = f"paged-{batch}-gqa{group_size}{'' if dtype == 'float32' else f'-{dtype}'}"
    sequences = "a sequence" if batch == 1 else f"{batch} sequences"
    heads = f"{group_size} query head{'s' * (group_size > 1)} a key head"
    reason = f"a token of {sequences}, up to 16384 keys in pages, {heads}"
    default = (batch, group_size) == (8, 4)
    return Paged(name, reason, (batch, 4 * group_size, 4, 128, 16384, 64), dtype, default=default)


def projection(which, rows, dtype):
    name = f"linear-{which}-{rows}{'' if dtype == 'float32' else f'-{dtype}'}"
    in_features, out_features = LINEAR[which]
    reason = f"{in_features} to {out_features} for {rows} token{'s' * (rows > 1)} at once"
    default = which == "up" and (rows, dtype) in ((1, "float32"), (1, "float16"), (1, "int8"), (16, "float32"))
    limit = "fma" if rows > 4 else "read"  # up to some rows, the weight is read for less than it takes
    return Linear(name, reason, (rows, in_features, out_features), dtype, limit=limit, default=default)


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
    Attention("encoder-32x128", "a batch of sentences", ENCODER),
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
    Training("train-2048", "attention and its gradients: seven products for two", PREFILL, default=False),
    Training("train-2048-causal", "the same of a language model", PREFILL, is_causal=True),
    Training("train-2048-d128", "the head_dim of most language models", PREFILL_D128, default=False),
    Training("train-2048-d128-causal", "training one of those", PREFILL_D128, is_causal=True, default=False),
    Training("train-encoder-32x128", "a batch of sentences", ENCODER),
    Training("train-vit-8x197", "a batch of images", (8, 12, 12, 197, 197, 64)),
    Training(
        "train-gqa8-causal", "eight query heads a key head", (1, 32, 4, 1024, 1024, 64), is_causal=True, default=False
    ),
    Training("train-2048-float64", "double precision throughout", PREFILL, "float64", default=False),
    Training("train-2048-bfloat16", "half the bytes", PREFILL, "bfloat16", default=False),
    TrainingLayer("train-layer-32x128-w384", "a layer and its gradients, of a batch", (32, 128, 384)),
    TrainingLayer("train-layer-32x128-w768", "the same, wider", (32, 128, 768), default=False),
    TrainingLayer("train-layer-32x128-w1024", "the same, wider", (32, 128, 1024), default=False),
    Packed("packed-64", "64 sequences of 16 to 512 tokens in one array", PACKED),
    Packed("packed-64-each", "the same, a dense call for each", PACKED, each=True),
    Attention("packed-64-padded", "the same, padded to 512: what not knowing lengths costs", (64, 8, 8, 512, 512, 64)),
    Packed("packed-64-causal", "64 prompts of 16 to 512 tokens", PACKED, is_causal=True, default=False),
    Packed(
        "packed-64-causal-each", "the same, a dense call for each", PACKED, is_causal=True, each=True, default=False
    ),
    Attention(
        "packed-64-causal-padded",
        "the same, padded to 512",
        (64, 8, 8, 512, 512, 64),
        is_causal=True,
        default=False,
    ),
    *(paged(*which) for which in product((1, 8, 32), (1, 4, 8), ("float32", "float16", "int8"))),
    Cache("attend-64", "KVCache.attend of a token with 64 keys: most of it is the cost of a call", (9, 3, 64, 64)),
    Merge("merge-2", "a shared prefix and what is a sequence's own, 32 sequences", (2, 32, 32, 1, 128)),
    Merge("merge-8", "keys in eight parts", (8, 32, 32, 1, 128)),
    Rotary("rotary-2048", "positions of a prompt, into an array that is there", ROTARY),
    Rotary("rotary-2048-in-place", "the same, over the queries themselves", ROTARY, in_place=True),
    *(projection(*which) for which in product(LINEAR, (1, 4, 16), ("float32", "float16", "bfloat16", "int8"))),
)


@dataclass(frozen=True)
class Model:
    """A whole model, of bench.models."""

    name: str
    reason: str
    family: str  # a function of models_torch, and what it is given
    arguments: tuple


MODELS = (
    Model("bert-8x128", "BERT-base, a batch of sentences", "bert", (8, 128)),
    Model("bert-1x384", "BERT-base, a paragraph", "bert", (1, 384)),
    Model("bert-32x128-padded", "BERT-base, a batch of which half is padding", "bert", (32, 128, "half")),
    Model("bert-32x128-packed", "the same batch, which cattn takes without the padding", "bert", (32, 128, "left out")),
    Model("bert-8x512-padded", "half padding, longer", "bert", (8, 512, "half")),
    Model("vit-1x197", "ViT-B, a picture", "vit", (1,)),
    Model("vit-8x197", "ViT-B, a batch of pictures", "vit", (8,)),
    Model("whisper-1500", "the encoder of Whisper-base, 30 seconds of sound", "whisper", ()),
    Model("llama-prefill-2048", "a Llama of 135 million weights, a prompt", "llama_prefill", (2048,)),
    Model("llama-decode-2048", "one more token of the same", "llama_decode", (2048,)),
    Model("llama-generate-4x512", "16 tokens after each of 4 prompts, half of which is padding on the left",
          "llama_generate", (4, 512, 16)),
    Model("bert-train-8x128", "BERT-base, a step of training: dropout, gradients, AdamW", "bert_training", (8, 128)),
)
