"""Multi-head attention with learned projections, specified by `cattn.reference.MultiHeadAttention`."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from cattn import _kernels, reference
from cattn._attention import check_problem, scaled_dot_product_attention
from cattn._checks import F64, STORED_KINDS, cast, check_kind
from cattn._gradients import differentiate
from cattn._linear import linear_backward
from cattn._threads import checked
from cattn.reference import LayerGradients
from cattn.reference._linear import StoredWeight

__all__ = ["LayerGradients", "MultiHeadAttention"]


class MultiHeadAttention(reference.MultiHeadAttention):
    """Multi-head attention: concat_h(attention(x_q W_q,h^T, x_k W_k,h^T, x_v W_v,h^T)) @ W_o^T + b_o.

    Parameters
    ----------
    embed_dim : int
        Size of the result.
    num_heads : int
        Attentions side by side, each in head_dim columns of its own.
    num_kv_heads : int, optional
        Heads of keys and values, a divisor of num_heads (the default); fewer is grouped-query attention.
    head_dim : int, optional
        Size of a head; embed_dim / num_heads when None, which num_heads has to divide then.
    input_dim : int, optional
        Size of the query's rows; embed_dim when None.
    kdim, vdim : int, optional
        Sizes of the key's and the value's rows; input_dim when None.
    bias : bool
        Whether the projections of query, key and value have one.
    out_bias : bool, optional
        Whether the last projection has one; as `bias` when None.
    dropout : float in [0, 1)
        Of the attention weights, in calls with training=True.
    dtype : dtype
        Of parameters, inputs and results.
    seed : int or numpy.random.Generator, optional
        Of the initial weights.
    weight_dtype : "float16", "bfloat16" or "int8", optional
        What weights are kept in, for inference: half or a quarter of the memory of float32, which is what the
        projections of few rows wait for. They are rounded where they are assigned or loaded, float64 by way of float32.
        int8: with a float32 scale for each 32 numbers of a row, the largest magnitude among them / 127. In the dtype of
        the layer when None.

    Attributes
    ----------
    in_proj_weight : array ((num_heads + 2 * num_kv_heads) * head_dim, input_dim), or None
        Rows of all query heads, then of all key heads, then of all value heads.
    q_proj_weight : None, or array (num_heads * head_dim, input_dim)
    k_proj_weight : None, or array (num_kv_heads * head_dim, kdim)
    v_proj_weight : None, or array (num_kv_heads * head_dim, vdim)
        Instead of in_proj_weight where kdim or vdim is not input_dim, as in PyTorch.
    in_proj_bias : array ((num_heads + 2 * num_kv_heads) * head_dim,), or None
    out_proj_weight : array (embed_dim, num_heads * head_dim)
    out_proj_bias : array (embed_dim,), or None

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.

    Notes
    -----
    Parameters may be changed in place, and assigned: anything that numpy.asarray reads, of this shape, is cast
    to the dtype of the layer; a C-contiguous, aligned, writeable array of this dtype is not copied. Each bias
    may be None, and an array again. With `weight_dtype`, weights are assigned only: what an attribute returns is a
    read-only copy of what is kept, in the dtype of the layer.

    Weights start Xavier-uniform, U(-b, b) with b = sqrt(6 / (fan_in + fan_out)), where (fan_out, fan_in) is the
    shape: of in_proj_weight as for one Linear(input_dim, 3 * embed_dim). Biases start at 0.

    Vaswani et al. 2017, "Attention is all you need", section 3.2.2; grouped queries: Ainslie et al. 2023.

    Examples
    --------
    >>> layer = MultiHeadAttention(16, 4, seed=0)
    >>> x = np.ones((2, 3, 16), np.float32)
    >>> out, weights = layer(x, is_causal=True, return_weights=True)
    >>> out.shape, weights.shape
    ((2, 3, 16), (2, 4, 3, 3))
    >>> sorted(layer.state_dict("huggingface"))[:2]
    ['k_proj.bias', 'k_proj.weight']
    """

    _dtypes = ("float16", "bfloat16", "float32", "float64")

    # For type checkers, as in _attention.py: what is returned, by return_weights.
    @typing.overload
    def __call__(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, key_mask: ArrayLike | None = None, is_causal: bool = False,
        q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, return_weights: Literal[False] = False, training: bool = False,
        seed: int | None = None, num_threads: int | None = None,
    ) -> np.ndarray: ...

    @typing.overload
    def __call__(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, key_mask: ArrayLike | None = None, is_causal: bool = False,
        q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, return_weights: Literal[True], training: bool = False,
        seed: int | None = None, num_threads: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]: ...

    @typing.overload
    def __call__(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, key_mask: ArrayLike | None = None, is_causal: bool = False,
        q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, return_weights: bool = False, training: bool = False,
        seed: int | None = None, num_threads: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]: ...

    def __call__(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, key_mask: ArrayLike | None = None, is_causal: bool = False,
        q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, return_weights: bool = False, training: bool = False,
        seed: int | None = None, num_threads: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Project, attend, project back.

        Parameters
        ----------
        query : array (batch, seq_len_q, input_dim) or (seq_len_q, input_dim)
            A row for each token that looks at others.
        key : array (batch, seq_len_kv, kdim) or (seq_len_kv, kdim), optional
            A row for each token that is looked at; the query when None: self-attention.
        value : array (batch, seq_len_kv, vdim) or (seq_len_kv, vdim), optional
            What these tokens give; the key when None.
        attn_mask : bool or float array, optional
            Which keys each query may see, or what is added to its scores. (seq_len_q, seq_len_kv), (batch,
            seq_len_q, seq_len_kv) or (batch, num_heads, seq_len_q, seq_len_kv); axes of length 1 broadcast.
            True = attend, as in scaled_dot_product_attention and the opposite of torch.nn.MultiheadAttention,
            where True = ignore.
        key_mask : bool array (batch, seq_len_kv) or (seq_len_kv,), optional
            Which keys may be seen at all: True = attend, as in the attention_mask of a tokenizer; the opposite of
            PyTorch's key_padding_mask, where True = ignore (key_mask=~key_padding_mask). With attn_mask, both
            have to allow a key. For padding on the right `kv_lens` is faster: what is behind is not read.
        is_causal, q_offset, window, softcap, alibi_slopes, sinks, kv_lens
            As in `scaled_dot_product_attention`.
        return_weights : bool
            Return a tuple, with the weights after the result.
        training : bool
            Dropout happens only when True.
        seed : int in [0, 2**64), optional
            Of the dropout.
        num_threads : int, optional
            Threads of this call; as `set_num_threads` says when None.

        Returns
        -------
        out : array (batch, seq_len_q, embed_dim) or (seq_len_q, embed_dim)
            out_proj_bias for a query that sees no key.
        weights : array (batch, num_heads, seq_len_q, seq_len_kv); with return_weights
            Without a batch axis where the inputs have none.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, the rule and what came.

        Warns
        -----
        UserWarning
            As `scaled_dot_product_attention` does.
        """
        return self._forward(
            query, key, value, attn_mask, key_mask, is_causal, return_weights, training,
            q_offset=q_offset, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            kv_lens=kv_lens, seed=seed, num_threads=num_threads,
        )

    def vjp(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, key_mask: ArrayLike | None = None, is_causal: bool = False,
        q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, training: bool = False, seed: int | None = None,
        num_threads: int | None = None,
    ) -> tuple[np.ndarray, Callable[[ArrayLike], LayerGradients]]:
        """The result, and the function that takes its gradient back to the inputs and the parameters.

        Parameters
        ----------
        query, key, value, attn_mask, key_mask, is_causal, q_offset, window, softcap, alibi_slopes, sinks, kv_lens
            As in a call, and likewise
        training, seed
            these. What dropout drops, it drops in pullback too, with or without a seed.
        num_threads : int, optional
            Threads of this call and of pullback; as `set_num_threads` says when None.

        Returns
        -------
        out : array (batch, seq_len_q, embed_dim) or (seq_len_q, embed_dim)
            The bits of a call.
        pullback : function
            pullback(grad_out), with grad_out of the shape and dtype of out, returns LayerGradients: those of
            sum(grad_out * out) by query, key and value, and by `parameters`, a dict with the names of `parameters()`.
            None for a key or value that was not given: what was taken for it, the query or the key, has the sum.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, the rule and what came; pullback too. A layer with `weight_dtype` is for inference.

        Warns
        -----
        UserWarning
            As `scaled_dot_product_attention` does.

        Notes
        -----
        pullback may be called more than once, and has copies of all that it needs: parameters, or inputs, that are
        changed or replaced before it is called change nothing. Rows whose gradient is 0 everywhere add nothing to the
        weights', whatever stands in them: padding. The bits depend on no number of threads.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> layer = MultiHeadAttention(16, 4, seed=0)
        >>> x, target = rng.standard_normal((2, 2, 3, 16), np.float32)
        >>> losses = []
        >>> for step in range(100):
        ...     out, pullback = layer.vjp(x)
        ...     losses.append(((out - target) ** 2).mean())
        ...     gradients = pullback(2 * (out - target) / out.size).parameters
        ...     for name, parameter in layer.parameters().items():
        ...         parameter -= 0.5 * gradients[name]
        >>> bool(losses[-1] < losses[0] / 4)
        True
        """
        return self._vjp(
            query, key, value, attn_mask, key_mask, is_causal, training, q_offset=q_offset, window=window,
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, kv_lens=kv_lens, seed=seed,
            num_threads=num_threads,
        )

    def _project(self, query, key, value, own, num_threads):
        # What is the same array is projected in one go, and the heads of the result are told apart.
        weight, bias = own.get("in_proj_weight"), own["in_proj_bias"]
        if value is not key or weight is None:
            return super()._project(query, key, value, own, num_threads)
        if key is query:
            heads = self._split_heads(self._linear(query, weight, bias, num_threads))
            q, kv = heads[:, : self.num_heads], heads[:, self.num_heads :]
        else:
            q_rows = self.num_heads * self.head_dim
            q, kv = (self._split_heads(self._linear(x, weight[rows], None if bias is None else bias[rows], num_threads))
                     for x, rows in ((query, slice(q_rows)), (key, slice(q_rows, None))))
        return q, kv[:, : self.num_kv_heads], kv[:, self.num_kv_heads :]

    def _attend(self, q, k, v, attn_mask, return_weights, num_threads, **options):
        # The heads are written side by side, so that the output projection reads contiguous memory.
        batch, num_heads, seq_len_q, head_dim = q.shape
        out = np.empty((batch, seq_len_q, num_heads, head_dim), q.dtype)
        result = scaled_dot_product_attention(
            q, k, v, attn_mask, out=out.swapaxes(1, 2), return_weights=return_weights, num_threads=num_threads,
            **options,
        )
        returned = return_weights or options.get("return_logsumexp")
        return out.reshape(batch, seq_len_q, num_heads * head_dim), result[1] if returned else None

    def _attend_with_lse(self, q, k, v, num_threads, attn_mask, **options):
        return self._attend(q, k, v, attn_mask, False, num_threads, return_logsumexp=True, **options)

    def _attend_backward(self, grad_heads, q, k, v, heads, logsumexp, parts, num_threads, attn_mask, dropout_p,
                         is_causal, **options):
        # The kernel writes the gradients of all heads where the projection's backward pass reads them, side by side.
        problem = check_problem(q, k, v, attn_mask, dropout_p, is_causal, None, False, kv_starts=None,
                                num_threads=num_threads, **options)
        arrays, targets = {"q": q, "k": k, "v": v}, {}
        of_projected = {}
        for name, part in parts.items():
            sizes = [arrays[letter].shape[1] * self.head_dim for letter in part]
            batch, seq_len = arrays[part[0]].shape[::2]
            both = of_projected[name] = problem.new_gradient((batch, seq_len, sum(sizes)), problem.dtype)
            for letter, size, end in zip(part, sizes, itertools.accumulate(sizes), strict=True):
                targets[letter] = self._split_heads(both[..., end - size : end])
        differentiate(problem, self._split_heads(grad_heads), self._split_heads(heads), logsumexp.reshape(-1), None,
                      *targets.values())
        return {name: cast(x, q.dtype) for name, x in of_projected.items()}

    def _linear_backward(self, grad_out, x, weight, num_threads, has_bias):
        return linear_backward(grad_out, x, weight, has_bias, num_threads)

    def _linear(self, x, weight, bias, num_threads):
        out = np.empty((*x.shape[:-1], len(weight)), x.dtype)
        kind = weight_kind = check_kind("x", x)
        scales = None
        if isinstance(weight, StoredWeight):
            weight_kind, weight, scales = STORED_KINDS[weight.dtype], weight.numbers, weight.scales
        module = _kernels.f64() if kind == F64 else _kernels.f32
        module.linear(x, weight, scales, bias, out, kind, weight_kind, kind,
                      0 if num_threads is None else checked(num_threads))
        return out
