"""The model of bench.chat as PyTorch runs it: `python -m bench.smollm2_torch FOLDER COUNT THREADS [MODEL]`.

In a process of its own, without cattn: two pools of threads slow each other down. Reads FOLDER/prompt.json, a list of
tokens, saves the logits after each of them in FOLDER/logits.npy and prints, as JSON, the COUNT tokens that follow, each
the likeliest.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from .smollm2 import open_model


class TorchLlama:
    """llama.Llama of one sequence in float32, every operation PyTorch's. Rotary positions are products of complex
    numbers, as in Llama's first code."""

    def __init__(self, config, weight):
        self.config = config
        self.weights = {name: torch.from_numpy(weight(name)) for name in config.shapes()}
        frequencies = config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angles = torch.outer(torch.arange(config.context_length), frequencies)
        self.turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        self.past = [None] * config.num_layers  # keys and values

    def __call__(self, tokens):
        """Logits (len(tokens), vocab_size) of the tokens that come next."""
        weights, config = self.weights, self.config
        start = 0 if self.past[0] is None else self.past[0][0].shape[1]
        turns = self.turns[start : start + len(tokens)]
        x = weights["token_embd.weight"][torch.tensor(tokens)]
        for layer in range(config.num_layers):
            attended = self._attention(layer, self._rms_norm(f"blk.{layer}.attn_norm", x), turns)
            x = x + self._linear(f"blk.{layer}.attn_output", attended)
            normed = self._rms_norm(f"blk.{layer}.ffn_norm", x)
            gate, up = (self._linear(f"blk.{layer}.ffn_{name}", normed) for name in ("gate", "up"))
            x = x + self._linear(f"blk.{layer}.ffn_down", functional.silu(gate) * up)
        return self._linear("token_embd", self._rms_norm("output_norm", x))

    def _attention(self, layer, x, turns):
        q, k, v = (
            self._linear(f"blk.{layer}.attn_{name}", x).unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1)
            for name in "qkv"
        )
        q, k = self._turn(q, turns), self._turn(k, turns)
        if self.past[layer] is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(self.past[layer], (k, v), strict=True))
        self.past[layer] = k, v
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        repeats = q.shape[0] // k.shape[0]
        k, v = (heads.repeat_interleave(repeats, 0)[None] for heads in (k, v))
        heads = functional.scaled_dot_product_attention(q[None], k, v, attn_mask=seen)[0]
        return heads.transpose(0, 1).flatten(1)

    def _turn(self, x, turns):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    def _linear(self, name, x):
        return functional.linear(x, self.weights[f"{name}.weight"])

    def _rms_norm(self, name, x):
        weight = self.weights[f"{name}.weight"]
        return functional.rms_norm(x, weight.shape, weight, self.config.epsilon)


def main():
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(int(sys.argv[3]))
    torch.set_num_interop_threads(1)
    torch.set_grad_enabled(False)
    config, _, weight = open_model(*sys.argv[4:])
    model = TorchLlama(config, weight)
    prompt = json.loads((folder / "prompt.json").read_text())
    logits = model(prompt)
    np.save(folder / "logits.npy", logits.numpy())
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(model(tokens[-1:])[-1].argmax()))
    print(json.dumps(tokens))


if __name__ == "__main__":
    main()
