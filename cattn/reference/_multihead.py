"""Multi-head attention, which is also the base of `cattn.MultiHeadAttention`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn import _layouts
from cattn._checks import (
    as_array,
    cast,
    check_bool,
    check_dropout,
    check_dtype,
    check_int,
    check_layer_inputs,
    check_layer_mask,
    check_parameter,
    copy,
    layer_text,
    shown,
)
from cattn.reference._attention import compute_dtype, scaled_dot_product_attention

__all__ = ["MultiHeadAttention"]


class _Parameter:
    """A weight or bias of a layer: what is assigned to it is checked, and cast to the layer's dtype.

    The layer keeps a view of its own, of the assigned array's memory where that can be used and trained in place, else
    of a copy. Calls take views of that in turn, and check them again: the shape and the dtype of what an attribute
    returns can be set as well."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, layer: object, owner: type | None = None) -> Any:
        if layer is None:
            return self
        try:
            return layer.__dict__[self.name]
        except KeyError:
            raise AttributeError(f"this layer has no {self.name} yet") from None

    def __set__(self, layer: Any, value: ArrayLike | None) -> None:
        array = check_parameter(self.name, value, layer._shapes()[self.name], layer.dtype)
        layer.__dict__[self.name] = array if array is None or array.flags.writeable else copy(array, array.dtype)


class MultiHeadAttention:
    """Multi-head attention: concat_h(attention(x_q W_q,h^T, x_k W_k,h^T, x_v W_v,h^T)) @ W_o^T + b_o.

    in_proj_weight : array (embed_dim + 2 * num_kv_heads * head_dim, input_dim)
    in_proj_bias : array (embed_dim + 2 * num_kv_heads * head_dim,), or None
    out_proj_weight : array (embed_dim, embed_dim)
    out_proj_bias : array (embed_dim,), or None

    The arguments are described at `cattn.MultiHeadAttention`. Vaswani et al. 2017, section 3.2.2.
    """

    _dtypes = None  # names of the dtypes allowed; None: every float dtype

    in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias = (_Parameter() for _ in range(4))

    def __init__(
        self, embed_dim: int, num_heads: int, *, num_kv_heads: int | None = None,
        input_dim: int | None = None, bias: bool = True, dropout: float = 0.0, dtype: DTypeLike = np.float32,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self.embed_dim = check_int("embed_dim", embed_dim, 1)
        self.num_heads = check_int("num_heads", num_heads, 1)
        num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
        self.input_dim = check_int("input_dim", embed_dim if input_dim is None else input_dim, 1)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {shown(embed_dim)}, "
                             f"got {shown(num_heads)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {shown(num_heads)}, got {shown(num_kv_heads)}"
            )
        self.head_dim = self.embed_dim // self.num_heads
        self.dropout = check_dropout("dropout", dropout)
        self.dtype = check_dtype(dtype, self._dtypes)
        bias = check_bool("bias", bias)

        try:
            rng = np.random.default_rng(seed)
        except (TypeError, ValueError) as error:
            raise type(error)(f"seed: expected an int >= 0 or a Generator, got {shown(seed)}") from None
        shapes = self._shapes()
        if shapes["in_proj_weight"][0] * max(self.input_dim, self.embed_dim) > 2**58:
            raise ValueError(f"embed_dim: expected at most 2**58 elements in a weight, got embed_dim = {embed_dim} and "
                             f"input_dim = {self.input_dim}")
        for name, shape in shapes.items():
            if len(shape) == 2:
                setattr(self, name, _xavier_uniform(rng, *shape, self.dtype))
            else:
                setattr(self, name, np.zeros(shape, self.dtype) if bias else None)

    def __call__(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, is_causal: bool = False, q_offset: ArrayLike | None = None,
        window: Sequence[int | None] | ArrayLike | None = None, softcap: float | None = 0.0,
        alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, return_weights: bool = False, training: bool = False,
        seed: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Project, attend, project back: see `cattn.MultiHeadAttention`, which has num_threads besides.

        query : array (batch, seq_len_q, input_dim) or (seq_len_q, input_dim)
        key, value : arrays (batch, seq_len_kv, input_dim) or (seq_len_kv, input_dim); the query, the key when None
        out : array (batch, seq_len_q, embed_dim) or (seq_len_q, embed_dim)
        weights : array (batch, num_heads, seq_len_q, seq_len_kv); with return_weights
        """
        return self._forward(
            query, key, value, attn_mask, is_causal, return_weights, training,
            q_offset=q_offset, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            kv_lens=kv_lens, seed=seed,
        )

    def _forward(self, query, key, value, attn_mask, is_causal, return_weights, training, *, kv_lens, num_threads=None,
                 **options):
        query, key, value = check_layer_inputs(self, query, key, value)
        if attn_mask is not None:
            attn_mask = check_layer_mask(self, attn_mask, query, key)
        is_causal, return_weights = check_bool("is_causal", is_causal), check_bool("return_weights", return_weights)
        dropout_p = check_dropout("dropout", self.dropout) if check_bool("training", training) else 0.0
        batched = query.ndim == 3
        if kv_lens is not None:
            kv_lens = kv_lens if type(kv_lens) is int else as_array("kv_lens", kv_lens)
        in_weight, in_bias, out_weight, out_bias = self._own_parameters().values()

        q, k, v = self._project(query, key, value, in_weight, in_bias, num_threads)
        heads, weights = self._attend(q, k, v, attn_mask, return_weights, num_threads, is_causal=is_causal,
                                      kv_lens=kv_lens, dropout_p=dropout_p, **options)
        out = self._linear(heads, out_weight, out_bias, num_threads)
        if not batched:
            out, weights = out[0], weights[0] if return_weights else None
        return (out, weights) if return_weights else out

    # The steps that cattn.MultiHeadAttention does in its own way.

    def _project(self, query, key, value, weight, bias, num_threads):
        """(batch, seq, input_dim) each, batch optional, to (batch, heads, seq, head_dim) each."""
        return [self._split_heads(self._linear(x, weight[rows], None if bias is None else bias[rows], num_threads))
                for x, rows in zip((query, key, value), self._rows(), strict=True)]

    def _attend(self, q, k, v, attn_mask, return_weights, num_threads, **options):
        """(batch, heads, seq, head_dim) each to (batch, seq_len_q, embed_dim), and the weights if wanted."""
        out, weights = scaled_dot_product_attention(q, k, v, attn_mask, return_weights=True, **options)
        return out.swapaxes(1, 2).reshape(len(q), q.shape[2], self.embed_dim), weights

    @np.errstate(all="ignore")
    def _linear(self, x, weight, bias, num_threads):
        """x @ weight^T + bias, rounded once to the dtype of x."""
        dtype = compute_dtype(x)
        out = x.astype(dtype, copy=False) @ weight.astype(dtype, copy=False).T
        if bias is not None:
            out += bias
        return out.astype(x.dtype, copy=False)

    # The steps that both share.

    def _shapes(self):
        """{parameter: its shape}, for sizes that fit together: they are plain attributes."""
        if (self.num_kv_heads < 1 or self.num_heads * self.head_dim != self.embed_dim
                or self.num_heads % self.num_kv_heads):
            raise ValueError(
                f"embed_dim: expected num_heads * head_dim, and num_heads a multiple of num_kv_heads, got embed_dim = "
                f"{self.embed_dim}, num_heads = {self.num_heads}, head_dim = {self.head_dim}, "
                f"num_kv_heads = {self.num_kv_heads}"
            )
        rows = self.embed_dim + 2 * self.num_kv_heads * self.head_dim
        return {"in_proj_weight": (rows, self.input_dim), "in_proj_bias": (rows,),
                "out_proj_weight": (self.embed_dim, self.embed_dim), "out_proj_bias": (self.embed_dim,)}

    def _rows(self):
        """The rows of in_proj_weight and in_proj_bias that make q, k and v."""
        k_start, v_start = self.embed_dim, self.embed_dim + self.num_kv_heads * self.head_dim
        return slice(0, k_start), slice(k_start, v_start), slice(v_start, 2 * v_start - k_start)

    def _own_parameters(self):
        """{parameter: a view that nobody else holds}, for one call: another thread may assign them meanwhile."""
        own, dtype = {}, self.dtype
        for name, shape in self._shapes().items():
            array = getattr(self, name)
            if array is not None:
                array = array[...]
                if not (array.shape == shape and array.dtype == dtype and array.flags.carray):  # rarely
                    array = check_parameter(name, array, shape, dtype)
            own[name] = array
        return own

    def _split_heads(self, x):
        """(batch, seq, heads * head_dim), batch optional, to a view (batch, heads, seq, head_dim)."""
        x = x.reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim).swapaxes(-3, -2)
        return x if x.ndim == 4 else x[None]

    def __repr__(self) -> str:
        own = dict(self.__dict__)
        biases = {name: own.pop(name) for name in ("in_proj_bias", "out_proj_bias") if name in own}
        lacking = [name for name, bias in biases.items() if bias is None]
        own |= {"bias": False} if len(lacking) == 2 else dict.fromkeys(lacking)
        return layer_text(self, own, {
            "embed_dim": ..., "num_heads": ..., "num_kv_heads": own.get("num_heads"), "input_dim": own.get("embed_dim"),
            "bias": True, "in_proj_bias": ..., "out_proj_bias": ..., "dropout": 0.0, "dtype": np.dtype(np.float32)})

    # State dicts.

    def state_dict(self, layout: str = "torch") -> dict[str, np.ndarray]:
        """A copy of the parameters, under the names and in the row order of another library.

        Parameters
        ----------
        layout : str
            Whose names.

            * "torch": in_proj_weight, in_proj_bias, out_proj.weight, out_proj.bias of its MultiheadAttention.
            * "torch_split": q_proj_weight, k_proj_weight, v_proj_weight for in_proj_weight, as it has them
              where kdim or vdim differ.
            * "tutorial": qkv_proj.* and o_proj.*, the rows of qkv_proj ordered [head][q, k, v][head_dim]; only
              for num_kv_heads == num_heads.
            * "d2l": W_q.*, W_k.*, W_v.*, W_o.*
            * "huggingface": q_proj.*, k_proj.*, v_proj.*, o_proj.*

        Returns
        -------
        state : dict of str to array

        Raises
        ------
        ValueError
            If there is no such layout, or not for this layer.
        """
        return _layouts.state_dict(self, layout)

    def load_state_dict(self, state: Mapping[str, ArrayLike], layout: str | None = None) -> None:
        """Take all parameters from a state dict; change nothing if anything is wrong with it.

        Parameters
        ----------
        state : mapping of str to float array
            Anything that numpy.asarray reads; cast to the dtype of the layer.
        layout : str, optional
            As in `state_dict`; from the names in `state` when None.

        Raises
        ------
        ValueError
            If keys are missing or unknown (both are listed), or a shape is wrong (key and both shapes are
            named).
        TypeError
            If `state` is not a mapping of names to float arrays.
        """
        for name, array in _layouts.parameters_of(self, state, layout).items():
            setattr(self, name, array)


def _xavier_uniform(rng, fan_out, fan_in, dtype):
    bound = math.sqrt(6 / (fan_in + fan_out))
    weight = np.empty(fan_out * fan_in, dtype)
    for first in range(0, weight.size, 2**18):  # signals are handled in between
        part = weight[first : first + 2**18]
        part[...] = cast(rng.uniform(-bound, bound, part.size), dtype)
    return weight.reshape(fan_out, fan_in)
