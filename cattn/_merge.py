"""Partial results of attention, merged: specified by `cattn.reference.merge_states`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cattn import _kernels, _threads
from cattn._checks import F64, check_state_sinks, check_states, out_or_new

__all__ = ["merge_states"]


def merge_states(
    outputs: Sequence[ArrayLike] | ArrayLike, logsumexps: Sequence[ArrayLike] | ArrayLike, *,
    sinks: ArrayLike | None = None, out: np.ndarray | None = None, num_threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over all keys, from results over parts of them: sum_i w_i outputs[i] / sum_i w_i.

    w_i is exp(logsumexps[i]). A part is what `scaled_dot_product_attention` returns for the same queries and keys that
    no other part has, with return_logsumexp=True and without sinks. Parts are merged in the order given.

    Parameters
    ----------
    outputs : n float arrays (..., head_dim_v), or one (n, ..., head_dim_v)
        The results over the parts, of one shape and dtype, any strides.
    logsumexps : n float arrays (...), or one (n, ...)
        Natural logarithms of their sums of exp(score): float32, or float64 beside outputs of float64. Where one is
        -inf, that part has no key for this row, and changes no bit of it; its row of `outputs` is not looked at.
    sinks : float array, broadcastable to a logsumexp, optional
        One more logit for each row, that joins the denominator of `out`, as in `scaled_dot_product_attention`; for
        sinks (num_heads,) and logsumexps (..., num_heads, seq_len_q) sinks[:, None]. To be given in the last merge
        only: the logsumexp is that without them.
    out : array of the result's shape and dtype, optional
        Written and returned; any strides.
    num_threads : int, optional
        Threads of this call; as `set_num_threads` says when None.

    Returns
    -------
    out : array (..., head_dim_v), dtype of the outputs
        A row that no part has a key for is 0. NaN and infinities go through to their own rows; a logsumexp that is
        NaN or +inf makes its row NaN.
    logsumexp : array (...), dtype of the logsumexps
        log(sum_i w_i), without the sinks; -inf for a row that no part has a key for. With it, the result is a part for
        another merge.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came, before anything is written.

    Notes
    -----
    Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; the parts of a shared prefix: Juravsky et
    al. 2024, "Hydragen". FlashInfer's merge_state has logarithms to base 2: multiply those by log(2). What is rounded
    is as in attention, computed in the dtype of the logsumexps; outputs of 16 bits have been rounded before they are
    merged, and are once more.

    Examples
    --------
    >>> import cattn
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 2, 6, 8))
    >>> parts = [cattn.scaled_dot_product_attention(query, key[:, part], value[:, part], return_logsumexp=True)
    ...          for part in (slice(4), slice(4, None))]
    >>> out, logsumexp = merge_states(*zip(*parts))
    >>> np.allclose(out, cattn.scaled_dot_product_attention(query, key, value), rtol=0, atol=1e-14)
    True
    """
    outputs, logsumexps, kind = check_states(outputs, logsumexps)
    num_threads = 0 if num_threads is None else _threads.checked(num_threads)  # 0: the kernel takes the default
    first, shape, dtype = outputs[0], logsumexps[0].shape, logsumexps[0].dtype
    if sinks is not None:
        sinks = check_state_sinks(sinks, shape, dtype)
    inputs = {} if out is None else {"sinks": sinks} | {
        f"{name}[{i}]": x for name, arrays in (("outputs", outputs), ("logsumexps", logsumexps))
        for i, x in enumerate(arrays)}
    out, target = out_or_new(out, first.shape, first.dtype, inputs)
    logsumexp = np.empty(shape, dtype)
    module = _kernels.f64() if kind == F64 else _kernels.f32
    module.merge_states(outputs, logsumexps, sinks, target, logsumexp, kind, num_threads)
    return out, logsumexp
