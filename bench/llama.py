"""A Llama on cattn: products, rotary positions, attention and its cache are cattn's, what is between is NumPy.

    forward     packed tokens of any sequences -> logits, in as many pieces as one likes: the bits are the same
    generate    prompts -> tokens, several at once; a prompt joins in chunks while others answer, and who is done leaves
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import cattn
from cattn.reference import quantize_rows

from . import speed
from .usage import UsageError

GROUP = 32  # numbers of a row that share a scale, in int8
# Tokens at a time. From 128 to 2048 a prompt of 2048 takes the same time within 10 % (one thread of a busy Xeon with
# AVX-512): that many rows hide the reading of the weights. More would let those who are answered meanwhile wait.
CHUNK = 256
AT_ONCE = 16  # prompts; a long list of them would fill the memory with keys


class Matrix:
    """A weight (out_features, in_features) in the dtype that it is stored in."""

    def __init__(self, weight, dtype):
        self.scales = None
        if dtype == "int8":
            weight, self.scales = quantize_rows(weight)
        self.weight = weight.astype(dtype, copy=False)

    def __call__(self, x):
        return cattn.linear(x, self.weight, weight_scales=self.scales)

    def rows(self, numbers):
        """In float32."""
        rows = self.weight[numbers].astype(np.float32, copy=False)
        if self.scales is not None:
            rows *= np.repeat(self.scales[numbers], GROUP, axis=1)[:, : rows.shape[1]]
        return rows

    @property
    def nbytes(self):
        return self.weight.nbytes + (0 if self.scales is None else self.scales.nbytes)


def rms_norm(x, weight, epsilon):
    """x / sqrt(mean(x^2) + epsilon) * weight, for each row."""
    scale = 1 / np.sqrt(np.einsum("rd,rd->r", x, x) / x.shape[-1] + epsilon)
    return x * scale[:, None] * weight


def swiglu(gate_up):
    """gate / (1 + exp(-gate)) * up, which lie side by side in each row."""
    gate, up = np.split(gate_up, 2, axis=-1)
    with np.errstate(over="ignore"):  # of a gate below -88: it is 0 then
        hidden = np.exp(-gate)
    hidden += 1
    np.divide(gate, hidden, out=hidden)
    hidden *= up
    return hidden


@dataclass
class Layer:
    attention_norm: np.ndarray
    qkv: Matrix
    out: Matrix
    feed_forward_norm: np.ndarray
    gate_up: Matrix
    down: Matrix


class Llama:
    """Token numbers to logits. Every row's bits depend on the tokens before it in its sequence, and on nothing else."""

    def __init__(self, config, weight, dtype="float32", progress=iter):
        """weight(name): the float32 array of this name, as Config.shapes lists them; dtype: what it is stored as."""
        self.config = config
        self.cos, self.sin = cattn.rotary_table(config.context_length, config.head_dim, base=config.rope_base)
        self.embedding = Matrix(weight("token_embd.weight"), dtype)
        try:
            self.head = Matrix(weight("output.weight"), dtype)
        except KeyError:
            self.head = self.embedding
        self.norm = weight("output_norm.weight")

        def matrix(*names):
            return Matrix(np.concatenate([weight(name) for name in names]), dtype)

        self.layers = []
        for number in progress(range(config.num_layers)):
            names = {name: f"blk.{number}.{name}.weight" for name in (
                "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")}
            self.layers.append(Layer(
                weight(names["attn_norm"]), matrix(names["attn_q"], names["attn_k"], names["attn_v"]),
                matrix(names["attn_output"]), weight(names["ffn_norm"]), matrix(names["ffn_gate"], names["ffn_up"]),
                matrix(names["ffn_down"])))

    @property
    def nbytes(self):
        """Of the weights."""
        matrices = {id(self.embedding): self.embedding, id(self.head): self.head}.values()
        layers = sum(x.nbytes for layer in self.layers for x in vars(layer).values())
        return self.norm.nbytes + layers + sum(matrix.nbytes for matrix in matrices)

    def new_cache(self, dtype="float32"):
        config = self.config
        return cattn.KVCache(config.num_layers, config.num_kv_heads, config.head_dim, dtype=dtype)

    def forward(self, tokens, cache, step, rows=slice(None)):
        """Logits (len(rows), vocab_size) after these of the packed tokens (total,), which `step` made room for."""
        x = self.embedding.rows(tokens)
        for number, layer in enumerate(self.layers):
            attended = cache.attend(number, step, *self._heads(layer, x, step.positions))
            x = self._after_attention(layer, x, attended)
        return self.head(rms_norm(x[rows], self.norm, self.config.epsilon))

    def attention_weights(self, tokens, number):
        """(num_heads, total, total): what the heads of a layer, counted from 0, look at in one sequence."""
        cache = self.new_cache()
        step = cache.extend(cache.new(), len(tokens))
        x = self.embedding.rows(tokens)
        for before, layer in enumerate(self.layers[:number]):
            attended = cache.attend(before, step, *self._heads(layer, x, step.positions))
            x = self._after_attention(layer, x, attended)
        heads = (x.swapaxes(0, 1)[None] for x in self._heads(self.layers[number], x, step.positions))
        return cattn.scaled_dot_product_attention(*heads, is_causal=True, return_weights=True)[1][0]

    def _heads(self, layer, x, positions):
        """q (total, num_heads, head_dim), k and v (total, num_kv_heads, head_dim); q and k are turned by position."""
        config = self.config
        x = layer.qkv(rms_norm(x, layer.attention_norm, config.epsilon)).reshape(len(x), -1, config.head_dim)
        turned = config.num_heads + config.num_kv_heads
        qk = cattn.rotary_embedding(x[:, :turned], self.cos, self.sin, positions[:, None], interleaved=True)
        return qk[:, : config.num_heads], qk[:, config.num_heads :], x[:, turned:]

    def _after_attention(self, layer, x, attended):
        x = x + layer.out(attended.reshape(x.shape))
        x += layer.down(swiglu(layer.gate_up(rms_norm(x, layer.feed_forward_norm, self.config.epsilon))))
        return x


def chooser(temperature=0.0, seed=None):
    """A function (logits of one row) -> token, for one sequence: the likeliest, or drawn with probabilities
    softmax(logits / temperature)."""
    if not temperature:
        return lambda logits: int(logits.argmax())
    rng = np.random.default_rng(seed)

    def choose(logits):
        logits = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # of tiny temperatures: exp(-inf) is 0
            sums = np.exp((logits - logits.max()) / temperature).cumsum()
        return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))

    return choose


class Token(NamedTuple):
    prompt: int  # its index among the prompts
    token: int
    is_last: bool


@dataclass(eq=False)
class _Sequence:
    prompt: int
    handle: int  # in the cache
    pending: list  # tokens whose keys are still to be stored
    choose: object
    count: int = 0  # of tokens that it was given


def generate(model, cache, prompts, max_tokens, ends=(), choosers=chooser, chunk=CHUNK, at_once=AT_ONCE, about=None):
    """Yield each Token that follows one of the prompts (lists of tokens, none empty) as soon as it is known, until one
    of `ends`, which is yielded too, or max_tokens of them. choosers(): a function as `chooser` gives, for each prompt.

    A step takes up to `chunk` tokens, those of earlier prompts first: a token of each answer, and as much of the next
    prompts as there is room for. about(count), before each: how many tokens are known and not yet seen by the model.
    """
    waiting = deque(enumerate(prompts))
    running = []
    while waiting or running:
        while waiting and len(running) < at_once:
            number, prompt = waiting.popleft()
            running.append(_Sequence(number, cache.new(), list(prompt), choosers()))
        if about is not None:
            about(sum(len(sequence.pending) for sequence in running))
        room, parts = chunk, []
        for sequence in running:
            if room:
                parts.append((sequence, sequence.pending[:room]))
                room -= len(parts[-1][1])
        step = cache.extend([sequence.handle for sequence, _ in parts], [len(part) for _, part in parts])
        for sequence, part in parts:
            del sequence.pending[: len(part)]
        known = [n for n, (sequence, _) in enumerate(parts) if not sequence.pending]  # whose next token is asked for
        logits = model.forward(
            np.concatenate([part for _, part in parts]), cache, step, np.asarray(step.cu_seqlens_q)[1:][known] - 1)
        for n, row in zip(known, logits, strict=True):
            sequence = parts[n][0]
            if np.isnan(row).any():
                raise UsageError("the model's logits are NaN: is its file damaged?")
            token = sequence.choose(row)
            sequence.count += 1
            sequence.pending.append(token)
            is_last = token in ends or sequence.count == max_tokens
            yield Token(sequence.prompt, token, is_last)
            if is_last:
                cache.free(sequence.handle)
                running.remove(sequence)


def measure(model, dtype, context, sequences=1, seconds=2.0):
    """The Speed of the model, with prompts in chunks; and the bytes of its cache."""
    cache = model.new_cache(dtype)
    handles = []

    def begin():
        for handle in handles:
            cache.free(handle)
        handles[:] = [cache.new() for _ in range(sequences)]

    def feed(tokens):
        chunk = max(1, CHUNK // sequences)
        for first in range(0, tokens.shape[1], chunk):
            part = tokens[:, first : first + chunk]
            step = cache.extend(handles, part.shape[1])
            model.forward(part.ravel(), cache, step, np.asarray(step.cu_seqlens_q)[1:] - 1)

    return speed.measure(begin, feed, model.config.vocab_size, context, sequences, seconds), cache.nbytes
