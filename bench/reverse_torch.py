"""The model of bench.reverse as PyTorch trains it: `python -m bench.reverse_torch FOLDER THREADS`.

In a process of its own, since two pools of threads slow each other down. Reads FOLDER/start.npz, the parameters under
their names, and FOLDER/steps.npz, the digits and the rate of each step; prints, as JSON, the losses, the seconds and
PyTorch's version.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm


class TorchModel(nn.Module):
    """reverse.Model, of PyTorch's modules."""

    def __init__(self, start):
        super().__init__()
        self.positions = torch.from_numpy(start["positions"])
        width, self.num_digits = start["input.weight"].shape
        self.input = nn.Linear(self.num_digits, width)
        self.block = nn.TransformerEncoderLayer(width, 1, len(start["linear1.bias"]), dropout=0.0, batch_first=True)
        self.output = nn.Linear(width, self.num_digits)

    def forward(self, digits):
        x = self.input(functional.one_hot(digits, self.num_digits).float()) + self.positions
        return self.output(self.block(x))


def block_name(name):
    """A parameter's name in TorchModel."""
    if name.startswith(("input.", "output.")):
        return name
    return f"block.{name.replace('attention.', 'self_attn.')}"


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    torch.set_num_interop_threads(1)
    start, steps = (dict(np.load(folder / f"{name}.npz")) for name in ("start", "steps"))
    model = TorchModel(start)
    del start["positions"]
    model.load_state_dict({block_name(name): torch.from_numpy(array) for name, array in start.items()})
    adam = torch.optim.Adam(model.parameters(), fused=True)
    losses, began = [], time.perf_counter()
    for digits, rate in zip(torch.from_numpy(steps["digits"]).long(), tqdm(steps["rates"], "torch", unit=" steps"),
                            strict=True):
        loss = functional.cross_entropy(model(digits).flatten(0, 1), digits.flip(1).flatten())
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = float(rate)
        adam.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    print(json.dumps({"losses": losses, "seconds": seconds, "version": torch.__version__}))


if __name__ == "__main__":
    main()
