"""The model of bench.chat as PyTorch runs it, in a process of its own, without cattn: two pools of threads slow each
other down.

    python -m bench.smollm2_torch answer FOLDER COUNT THREADS [MODEL]

reads FOLDER/prompt.json, a list of tokens, saves the logits after each of them in FOLDER/logits.npy and prints, as
JSON, the COUNT tokens that follow, each the likeliest.

    python -m bench.smollm2_torch speed THREADS CONTEXT... [-- MODEL]

prints, as JSON, for each context the tokens a second of prefill and decode.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from .smollm2 import open_model
from .speed import measure

CHUNK = 256  # tokens at a time, as in bench.llama


class TorchLlama:
    """llama.Llama of one sequence in float32, every operation PyTorch's. Rotary positions are products of complex
    numbers, as in Llama's first code."""

    def __init__(self, config, weight):
        self.config = config
        self.weights = {name: torch.from_numpy(weight(name)) for name in config.shapes()}
        frequencies = config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angles = torch.outer(torch.arange(config.context_length), frequencies)
        self.turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        shape = config.num_layers, 2, 1, config.num_kv_heads, config.context_length, config.head_dim
        self.past = torch.empty(shape)  # keys and values
        self.length = 0

    def forget(self):
        self.length = 0

    def __call__(self, tokens, rows=slice(None)):
        """Logits (len(rows), vocab_size) after these of the tokens that come next."""
        weights, config = self.weights, self.config
        turns = self.turns[self.length : self.length + len(tokens)]
        x = weights["token_embd.weight"][torch.tensor(tokens)]
        for layer in range(config.num_layers):
            attended = self._attention(layer, self._rms_norm(f"blk.{layer}.attn_norm", x), turns)
            x = x + self._linear(f"blk.{layer}.attn_output", attended)
            normed = self._rms_norm(f"blk.{layer}.ffn_norm", x)
            gate, up = (self._linear(f"blk.{layer}.ffn_{name}", normed) for name in ("gate", "up"))
            x = x + self._linear(f"blk.{layer}.ffn_down", functional.silu(gate) * up)
        self.length += len(tokens)
        return self._linear("token_embd", self._rms_norm("output_norm", x[rows]))

    def _attention(self, layer, x, turns):
        q, k, v = (
            self._linear(f"blk.{layer}.attn_{name}", x).unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1)
            for name in "qkv"
        )
        q, k = self._turn(q, turns), self._turn(k, turns)
        end = self.length + q.shape[1]
        self.past[layer, :, 0, :, self.length : end] = torch.stack([k, v])
        seen = None if q.shape[1] == 1 else torch.ones(q.shape[1], end, dtype=torch.bool).tril(self.length)
        k, v = self.past[layer, ..., :end, :]
        heads = functional.scaled_dot_product_attention(q[None], k, v, attn_mask=seen, enable_gqa=True)[0]
        return heads.transpose(0, 1).flatten(1)

    def _turn(self, x, turns):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    def _linear(self, name, x):
        return functional.linear(x, self.weights[f"{name}.weight"])

    def _rms_norm(self, name, x):
        weight = self.weights[f"{name}.weight"]
        return functional.rms_norm(x, weight.shape, weight, self.config.epsilon)


def open_torch(threads, *model):
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.set_grad_enabled(False)
    config, _, weight = open_model(*model)
    return TorchLlama(config, weight)


def answer(folder, count, threads, *model):
    folder = Path(folder)
    model = open_torch(int(threads), *model)
    prompt = json.loads((folder / "prompt.json").read_text())
    logits = model(prompt)
    np.save(folder / "logits.npy", logits.numpy())
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < int(count):
        tokens.append(int(model(tokens[-1:])[-1].argmax()))
    return tokens


def speeds(threads, *contexts):
    contexts, file = (contexts[:-2], contexts[-1:]) if "--" in contexts else (contexts, ())
    model = open_torch(int(threads), *file)

    def feed(tokens):
        for first in range(0, tokens.shape[1], CHUNK):
            model(tokens[0, first : first + CHUNK].tolist(), [-1])

    return [tuple(measure(model.forget, feed, model.config.vocab_size, int(context))) for context in contexts]


if __name__ == "__main__":
    print(json.dumps({"answer": answer, "speed": speeds}[sys.argv[1]](*sys.argv[2:])))
