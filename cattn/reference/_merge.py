"""Partial results of attention over disjoint keys, merged by their logsumexps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cattn.reference._attention import compute_dtype

__all__ = ["merge_states"]


@np.errstate(all="ignore")
def merge_states(
    outputs: Sequence[ArrayLike] | ArrayLike, logsumexps: Sequence[ArrayLike] | ArrayLike, *,
    sinks: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """sum_i w_i outputs[i] / sum_i w_i, with w_i = exp(logsumexps[i]), and log(sum_i w_i): see `cattn.merge_states`.

    Computed in float32, or in the dtype of the outputs where that is wider, in the order given. A sink adds exp(sink)
    to the denominator of `out` and nothing to `logsumexp`.

    outputs, logsumexps : n float arrays each, (..., head_dim_v) and (...), or one array of them
    out : array (..., head_dim_v), dtype of the outputs
    logsumexp : array (...), dtype computed in

    The arguments are described there. This checks nothing.
    """
    outputs = [np.asarray(x) for x in outputs]
    result_dtype, dtype = outputs[0].dtype, compute_dtype(outputs[0])
    logsumexps = np.stack([np.asarray(x).astype(dtype) for x in logsumexps])
    row_max = logsumexps.max(axis=0)
    row_max = np.where(row_max == -np.inf, dtype.type(0), row_max)
    exps = np.exp(logsumexps - row_max)
    row_sum = exps.sum(axis=0)
    logsumexp = row_max + np.log(row_sum)
    if sinks is not None:
        row_sum = row_sum + np.exp(np.asarray(sinks).astype(dtype) - row_max)

    out = np.full(outputs[0].shape, dtype.type(-0.0))  # to which every number, -0.0 as well, is added without a change
    for i, output in enumerate(outputs):
        weighted = (exps[i] / row_sum)[..., None] * output.astype(dtype)
        out = np.where(logsumexps[i, ..., None] != -np.inf, out + weighted, out)
    out = np.where((logsumexps == -np.inf).all(axis=0)[..., None], dtype.type(0), out)
    return out.astype(result_dtype), logsumexp
