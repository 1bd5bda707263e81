"""How fast a language model reads and writes, whatever computes it: of bench.llama, and of its peers in processes of
their own."""

import time
from typing import NamedTuple

import numpy as np

DECODED = 32  # tokens, to measure by


class Speed(NamedTuple):
    prefill: float  # tokens a second, of each sequence
    decode: float  # of all sequences together


def measure(begin, feed, vocab_size, context, sequences=1, seconds=2.0):
    """The Speed of sequences that grow alike: prompts up to DECODED tokens before the context's end, then these, one
    by one. The best prompt of some `seconds`, one at least, and the median token.

    begin() forgets what was before; feed(tokens) takes the next ones of each sequence, an array (sequences, count).
    What they are makes no difference."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=(sequences, context))
    prompt = context - DECODED
    best, spent = np.inf, 0.0

    def timed(tokens):
        start = time.perf_counter()
        feed(tokens)
        return time.perf_counter() - start

    while spent < seconds or not spent:
        begin()
        taken = timed(tokens[:, :prompt])
        best, spent = min(best, taken), spent + taken
    each = [timed(tokens[:, place : place + 1]) for place in range(prompt, context)]
    return Speed(sequences * prompt / best, sequences / float(np.median(each)))
