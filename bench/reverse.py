"""A transformer learns to reverse sequences: attention and its gradients by cattn, everything else in plain NumPy.

    python -m bench.reverse

trains one encoder block on sequences of 16 random digits, whose labels are the same digits backwards, and then asks it
for sequences that it has not seen. `--plot FILE.png` draws what its attention looks at by then: the anti-diagonal.
`--torch` trains the same model in PyTorch as well, from the same weights on the same batches, to compare.

The task is that of the UvA's deep learning tutorial 6, "Transformers and multi-head attention"; the batches are new
ones all the time, and the rate is higher.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Two threads gain 2 % in products as small as these, lose 90 % where another program uses a CPU, and round in
    # another order.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported

import numpy as np

import cattn

from .files import picture, save_figure
from .usage import MOST_THREADS, UsageError, check_text, number, require, status_of

DIGITS, LENGTH = 10, 16
WIDTH, HIDDEN, NUM_HEADS = 32, 64, 1
EPSILON = 1e-5  # of the norms
BATCH_SIZE, STEPS, WARM_UP, RATE = 128, 500, 50, 5e-3
BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-8  # of Adam
HELD_OUT = 1000  # sequences
COMPARED, TOLERANCE = 20, 1e-3  # of so many first losses PyTorch's may differ by so much
MOST_STEPS = 100_000  # their batches are 200 MB, which PyTorch's process gets in a file


# What a model has beside attention. Each function returns its result and a pullback, as MultiHeadAttention.vjp does:
# from the gradient of the result to those of x, weight and bias.


def linear(x, weight, bias):
    def pullback(grad):
        rows = grad.reshape(-1, grad.shape[-1])
        return grad @ weight, rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(axis=0)

    return x @ weight.T + bias, pullback


def layer_norm(x, weight, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + EPSILON)
    normed = centred / spread

    def pullback(grad):
        of_normed = grad * weight
        along = (of_normed * normed).mean(axis=-1, keepdims=True)
        of_x = (of_normed - of_normed.mean(axis=-1, keepdims=True) - along * normed) / spread
        return of_x, (grad * normed).sum(axis=(0, 1)), grad.sum(axis=(0, 1))

    return normed * weight + bias, pullback


def cross_entropy(logits, labels):
    """The mean of -log softmax(logits)[label], and its gradient."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exps = np.exp(shifted)
    sums = exps.sum(axis=-1)
    loss = np.log(sums).mean() - np.take_along_axis(shifted, labels[..., None], axis=-1).mean()
    is_label = labels[..., None] == np.arange(logits.shape[-1])
    return float(loss), (exps / sums[..., None] - is_label) / labels.size


class Model:
    """From digits (batch, LENGTH) to logits (batch, LENGTH, DIGITS).

    `parameters` {name: array} are what it computes with: an array that is changed in place changes the model.
    """

    def __init__(self, seed, dtype=np.float32, attention_class=cattn.MultiHeadAttention):
        rng = np.random.default_rng(seed)
        self.one_hot = np.eye(DIGITS, dtype=dtype)
        self.positions = cattn.sinusoidal_encoding(LENGTH, WIDTH, dtype=dtype)
        self.attention = attention_class(WIDTH, NUM_HEADS, dtype=dtype, seed=rng)
        self.parameters = {f"attention.{name}": array for name, array in self.attention.parameters().items()}
        for name, fan_out, fan_in in (("input", WIDTH, DIGITS), ("linear1", HIDDEN, WIDTH), ("linear2", WIDTH, HIDDEN),
                                      ("output", DIGITS, WIDTH)):
            bound = math.sqrt(6 / (fan_in + fan_out))  # Glorot and Bengio 2010
            self._add(name, rng.uniform(-bound, bound, (fan_out, fan_in)).astype(dtype))
        for name in ("norm1", "norm2"):
            self._add(name, np.ones(WIDTH, dtype))

    def _add(self, name, weight):
        self.parameters |= {f"{name}.weight": weight, f"{name}.bias": np.zeros(len(weight), weight.dtype)}

    def vjp(self, digits):
        """(logits, pullback), with pullback(gradient of the logits) -> {name: gradient of this parameter}"""
        pullbacks = {}

        def apply(function, name, x):
            out, pullbacks[name] = function(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])
            return out

        x, pullbacks["input"] = self._embed(digits)
        attended, pull_attention = self.attention.vjp(x)
        x = apply(layer_norm, "norm1", x + attended)
        hidden = apply(linear, "linear1", x)
        x = apply(layer_norm, "norm2", x + apply(linear, "linear2", np.maximum(hidden, 0)))
        logits = apply(linear, "output", x)

        def pullback(grad):
            gradients = {}

            def pull(name, grad):
                grad, gradients[f"{name}.weight"], gradients[f"{name}.bias"] = pullbacks[name](grad)
                return grad

            grad = pull("norm2", pull("output", grad))
            grad = pull("norm1", grad + pull("linear1", pull("linear2", grad) * (hidden > 0)))
            of_attention = pull_attention(grad)
            pull("input", grad + of_attention.query)
            return gradients | {f"attention.{name}": array for name, array in of_attention.parameters.items()}

        return logits, pullback

    def attention_weights(self, digits):
        """(batch, NUM_HEADS, LENGTH, LENGTH)"""
        x, _ = self._embed(digits)
        return self.attention(x, return_weights=True)[1]

    def _embed(self, digits):
        x, pullback = linear(self.one_hot[digits], self.parameters["input.weight"], self.parameters["input.bias"])
        return x + self.positions, pullback


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, parameters):
        self.parameters, self.steps = parameters, 0
        self.means, self.squares = ({name: np.zeros_like(array) for name, array in parameters.items()} for _ in "12")

    def step(self, gradients, rate):
        self.steps += 1
        rate /= 1 - BETA_1**self.steps
        correction = 1 / (1 - BETA_2**self.steps)
        for name, parameter in self.parameters.items():
            grad, mean, square = gradients[name], self.means[name], self.squares[name]
            mean += (1 - BETA_1) * (grad - mean)
            square += (1 - BETA_2) * (grad * grad - square)
            parameter -= rate * mean / (np.sqrt(correction * square) + TINY)


def rates(steps):
    """Of each step: up in a line, down along a cosine."""
    return [RATE * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def sequences(rng, count):
    return rng.integers(DIGITS, size=(count, LENGTH))


def batches(seed, steps):
    rng = np.random.default_rng([seed, 1])
    return (sequences(rng, BATCH_SIZE) for _ in range(steps))


def held_out(seed):
    """Of 10**16 sequences that there are, a training of MOST_STEPS sees some 10**7."""
    return sequences(np.random.default_rng([seed, 2]), HELD_OUT)


def train(model, seed, steps):
    """Yields the loss of each batch, and the share of its digits that are right, before the model learns from it."""
    adam = Adam(model.parameters)
    for digits, rate in zip(batches(seed, steps), rates(steps), strict=True):
        labels = digits[:, ::-1]
        logits, pullback = model.vjp(digits)
        loss, grad = cross_entropy(logits, labels)
        adam.step(pullback(grad), rate)
        yield loss, np.mean(logits.argmax(axis=-1) == labels)


# The command.


def argument_parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench.reverse", description=__doc__.partition("\n")[0],
        epilog="On one machine a seed gives the same losses, to the bit, with any number of --threads: these are "
               "cattn's. NumPy's products have one, or what OPENBLAS_NUM_THREADS says; their rounding depends on that.")
    add = parser.add_argument
    integer = partial(partial, number, int)
    add("--steps", type=integer(1, MOST_STEPS), default=STEPS, metavar="N", help="batches to learn from (%(default)s)")
    add("--seed", type=integer(0, 2**64 - 1), default=0, metavar="N", help="of weights and sequences (%(default)s)")
    add("--threads", type=integer(1, MOST_THREADS), metavar="N", help=f"default: {cattn.get_num_threads()}")
    add("--plot", type=picture, metavar="FILE", help="draw what attention looks at, as a.png, a.svg or a.pdf")
    add("--torch", action="store_true", help="train the same model in PyTorch: do the losses agree, how fast are both")
    return parser


def learn(model, seed, steps):
    """Train under a progress bar: (losses, seconds)."""
    from tqdm import tqdm

    losses, start = [], time.perf_counter()
    with tqdm(train(model, seed, steps), "cattn", steps, unit=" steps") as progress:
        for loss, right in progress:
            losses.append(loss)
            progress.set_postfix_str(f"loss {loss:.4f}, {right:.1%} right", refresh=False)
    return losses, time.perf_counter() - start


def torch_learn(seed, steps, num_threads):
    """What bench.reverse_torch prints."""
    from .runner import command

    model = Model(seed)
    start = {name: array for name, array in model.parameters.items() if not name.startswith("attention.")}
    start |= model.attention.state_dict("torch", "attention.") | {"positions": model.positions}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "start.npz"), **start)
        np.savez(Path(folder, "steps.npz"), digits=np.array(list(batches(seed, steps)), np.uint8), rates=rates(steps))
        process = subprocess.run(
            **command("bench.reverse_torch", folder, num_threads, num_threads=num_threads),
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to this process alone, which then ends that one
        )
    if process.returncode:
        raise UsageError("PyTorch failed, as it says above")
    return json.loads(process.stdout)


def draw(model, digits, path):
    """What each digit of a sequence looks at."""
    from cattn import plots

    names = [str(digit) for digit in digits]
    axes = plots.weights(model.attention_weights(digits[None])[0], names, names)
    save_figure(axes[0].figure, path)


def run(args):
    require(["tqdm"])
    if args.torch:
        require(["torch"], "pip install torch")
    if args.threads is not None:
        cattn.set_num_threads(args.threads)
    num_threads = cattn.get_num_threads()
    model = Model(args.seed)
    losses, seconds = learn(model, args.seed, args.steps)

    asked = held_out(args.seed)
    answers = model.vjp(asked)[0].argmax(axis=-1)
    is_right = answers == asked[:, ::-1]
    print(f"{is_right.all(axis=1).sum()} of {HELD_OUT} sequences that it has not seen are reversed, "
          f"{is_right.mean():.2%} of their digits are right:")
    print(*asked[0], " ->  ", *answers[0])
    print(f"cattn: {args.steps / seconds:.0f} steps/s; {cattn.isa}, {num_threads} thread{'s' * (num_threads > 1)}",
          flush=True)
    if args.plot is not None:
        draw(model, asked[0], args.plot)
        print(f"{args.plot}: what each digit of this sequence looks at", flush=True)
    if args.torch:
        found = torch_learn(args.seed, args.steps, num_threads)
        difference = np.abs(np.subtract(losses, found["losses"]))[:COMPARED].max()
        agree = difference <= TOLERANCE
        print(f"torch {found['version']}: {args.steps / found['seconds']:.0f} steps/s; losses of the first "
              f"{min(COMPARED, args.steps)} steps {'agree' if agree else 'DIFFER'}: {difference:.1e} apart at most")
        return int(not agree)


def main(argv=None):
    args = argument_parser().parse_args(argv)

    def work():
        check_text(sys.argv[1:] if argv is None else argv)
        return run(args)

    return status_of("bench.reverse", work)


if __name__ == "__main__":
    from cattn.__main__ import exit_after

    exit_after(main)
