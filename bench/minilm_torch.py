"""The model of bench.minilm as PyTorch runs it: `python -m bench.minilm_torch MODEL_DIR FOLDER THREADS`.

In a process of its own, since two pools of threads slow each other down. Reads FOLDER/sentences.json, lists of token
ids, saves their embeddings in FOLDER/embeddings.npy and prints, as JSON, the seconds, of these in the attention layers,
and PyTorch's version.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from .minilm import load_model, timed_embed


class TorchEncoder:
    """minilm.Encoder, every operation PyTorch's: padding in attention alone, and one product for the three input
    projections, as in cattn."""

    def __init__(self, weights, config):
        self.weights = {name: torch.from_numpy(array) for name, array in weights.items()}
        self.epsilon, self.num_heads = config["layer_norm_eps"], config["num_attention_heads"]
        self.attention_seconds = 0.0
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            prefix = f"encoder.layer.{i}."
            names = [f"{prefix}attention.self.{x}" for x in ("query", "key", "value")]
            in_proj = [torch.cat([self.weights[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias")]
            self.layers.append((prefix, in_proj))

    def __call__(self, token_ids, lengths):
        is_token = torch.arange(token_ids.shape[1]) < torch.from_numpy(lengths)[:, None]
        x = self.weights["embeddings.word_embeddings.weight"][torch.from_numpy(token_ids)[is_token]]
        x += self.weights["embeddings.position_embeddings.weight"][is_token.nonzero()[:, 1]]
        x += self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self._layer_norm("embeddings.LayerNorm", x)
        padded = torch.zeros(*is_token.shape, x.shape[1])
        for prefix, in_proj in self.layers:
            padded[is_token] = x
            start = time.perf_counter()
            attended = self._attention(prefix, in_proj, padded, is_token[:, None, None])
            self.attention_seconds += time.perf_counter() - start
            x = self._layer_norm(f"{prefix}attention.output.LayerNorm", x + attended[is_token])
            hidden = functional.gelu(self._linear(f"{prefix}intermediate.dense", x))
            x = self._layer_norm(f"{prefix}output.LayerNorm", x + self._linear(f"{prefix}output.dense", hidden))
        padded[is_token] = x
        pooled = torch.einsum("bsd,bs->bd", padded, is_token.float())
        return functional.normalize(pooled, dim=-1).numpy()

    def _attention(self, prefix, in_proj, x, mask):
        batch, seq_len, width = x.shape
        qkv = functional.linear(x, *in_proj).view(batch, seq_len, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(*qkv, attn_mask=mask)
        return self._linear(f"{prefix}attention.output.dense", heads.transpose(1, 2).reshape(batch, seq_len, width))

    def _linear(self, name, x):
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _layer_norm(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, self.epsilon)


def main():
    directory, folder = map(Path, sys.argv[1:3])
    torch.set_num_threads(int(sys.argv[3]))
    torch.set_num_interop_threads(1)
    torch.set_grad_enabled(False)
    weights, config, _ = load_model(directory)
    sentences = json.loads((folder / "sentences.json").read_text())
    embeddings, *cost = timed_embed("torch", TorchEncoder(weights, config), sentences)
    np.save(folder / "embeddings.npy", embeddings)
    print(json.dumps({"cost": cost, "version": torch.__version__}))


if __name__ == "__main__":
    main()
