"""Which weights dropout drops: a function of the seed and of a weight's place, by Philox."""

from __future__ import annotations

import numpy as np

from cattn._checks import check_seed

__all__ = ["dropout_keep", "philox4x32"]


def philox4x32(counter, key) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four counter words and two key words to four random words.

    Parameters
    ----------
    counter : four ints or int arrays that broadcast, each taken modulo 2**32
    key : two ints below 2**32

    Returns
    -------
    words : four uint64 arrays with values below 2**32

    Notes
    -----
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Examples
    --------
    >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) & low for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def dropout_keep(
    seed: int | None, dropout_p: float, batch: int, num_heads: int, seq_len_q: int, seq_len_kv: int
) -> np.ndarray:
    """Which weights dropout keeps: philox(seed, batch, head, query, key) >= int(dropout_p * 2**32).

    A function of the indices alone: the same for any shape, batch mates and number of threads. Key j of query
    i takes word j % 4 of `philox4x32((j // 4, i, head_index, batch_index), (seed % 2**32, seed // 2**32))`.

    Parameters
    ----------
    seed : int in [0, 2**64), or None for a fresh one
    dropout_p : float in [0, 1)
    batch, num_heads, seq_len_q, seq_len_kv : int

    Returns
    -------
    keep : bool array (batch, num_heads, seq_len_q, seq_len_kv)

    Raises
    ------
    ValueError, TypeError
        If the seed is not such an int.

    Examples
    --------
    >>> dropout_keep(7, 0.5, 1, 1, 2, 6).astype(int)
    array([[[[1, 1, 0, 0, 0, 1],
             [0, 0, 1, 1, 0, 0]]]])
    """
    return keep_of(seed, dropout_p, np.arange(batch), np.arange(num_heads), slice(0, seq_len_q), slice(0, seq_len_kv))


def keep_of(seed, dropout_p, batch_index, head_index, rows, columns):
    """`dropout_keep` of these indices, and of slices of queries and of keys that start at a multiple of 4."""
    seed = check_seed(seed)
    counter = (
        np.arange(columns.start // 4, -(-columns.stop // 4)),
        np.arange(rows.start, rows.stop)[:, None],
        head_index[:, None, None],
        batch_index[:, None, None, None],
    )
    words = np.stack(philox4x32(counter, (seed % 2**32, seed // 2**32)), axis=-1)
    words = words.reshape(len(batch_index), len(head_index), len(counter[1]), 4 * len(counter[0]))
    words = words[..., : columns.stop - columns.start]
    return words >= np.uint64(int(dropout_p * 2**32))
