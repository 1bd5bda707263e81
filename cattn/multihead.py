"""Multi-head attention with learned projections, specified by `cattn.reference.MultiHeadAttention`."""

import numpy as np
from numpy.typing import ArrayLike

from cattn import _kernels, reference
from cattn.attention import F64, _carried, _kind, scaled_dot_product_attention
from cattn.threads import checked

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(reference.MultiHeadAttention):
    __doc__ = reference.MultiHeadAttention.__doc__
    _dtypes = ("float16", "bfloat16", "float32", "float64")

    def __call__(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, is_causal: bool = False, q_offset: ArrayLike | None = None,
        window: tuple[int | None, int | None] | None = None, softcap: float = 0.0,
        alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, return_weights: bool = False, training: bool = False,
        seed: int | None = None, num_threads: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        return self._forward(
            query, key, value, attn_mask, is_causal, return_weights, training,
            q_offset=q_offset, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            kv_lens=kv_lens, seed=seed, num_threads=num_threads,
        )

    __call__.__doc__ = reference.MultiHeadAttention.__call__.__doc__

    def _project(self, query, key, value, weight, bias, num_threads):
        if value is not key:
            return super()._project(query, key, value, weight, bias, num_threads)

        def project(x, rows):
            return self._linear(x, weight[rows], None if bias is None else bias[rows], num_threads)

        q_rows, k_rows, v_rows = self._rows()
        if key is not query:
            return project(query, q_rows), *np.split(project(key, slice(k_rows.start, None)), 2, axis=-1)
        qkv = project(query, slice(None))
        return qkv[..., q_rows], qkv[..., k_rows], qkv[..., v_rows]

    def _attend(self, q, k, v, attn_mask, return_weights, num_threads, **options):
        # The heads are written side by side, so that the output projection reads contiguous memory.
        batch, num_heads, seq_len_q, head_dim = q.shape
        out = np.empty((batch, seq_len_q, num_heads, head_dim), q.dtype)
        result = scaled_dot_product_attention(
            q, k, v, attn_mask, out=out.swapaxes(1, 2), return_weights=return_weights, num_threads=num_threads,
            **options,
        )
        return out.reshape(batch, seq_len_q, self.embed_dim), result[1] if return_weights else None

    def _linear(self, x, weight, bias, num_threads):
        out = np.empty((*x.shape[:-1], len(weight)), x.dtype)
        kind = _kind("x", x)
        arrays = (_carried(array, kind) for array in (x, weight, bias, out))
        module = _kernels.f64() if kind == F64 else _kernels.f32
        module.linear(*arrays, kind, kind, 0 if num_threads is None else checked(num_threads))
        return out
