"""Multi-head attention, which is also the base of `cattn.MultiHeadAttention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cattn import _layouts
from cattn._checks import (
    KINDS,
    as_array,
    cast,
    check_bool,
    check_dropout,
    check_dtype,
    check_form,
    check_int,
    check_key_mask,
    check_layer_inputs,
    check_layer_mask,
    check_parameter,
    check_seed,
    check_weight_dtype,
    copy,
    is_float,
    layer_text,
    raise_mask_dtype,
    shown,
    warn_of_0_and_1,
)
from cattn.reference._attention import scaled_dot_product_attention
from cattn.reference._backward import scaled_dot_product_attention_backward
from cattn.reference._linear import StoredWeight, linear, linear_backward

__all__ = ["LayerGradients", "MultiHeadAttention"]


class LayerGradients(NamedTuple):
    """By the inputs of a layer, None for those that it was not given, and by its parameters, {name: gradient}."""

    query: np.ndarray
    key: np.ndarray | None
    value: np.ndarray | None
    parameters: dict[str, np.ndarray]


class _Parameter:
    """A weight or bias of a layer: what is assigned to it is checked, and cast to the layer's dtype.

    The layer keeps a view of its own, of the assigned array's memory where that can be used and trained in place, else
    of a copy. Calls take views of that in turn, and check them again: the shape and the dtype of what an attribute
    returns can be set as well.

    With weight_dtype, a weight is kept as a StoredWeight, and its attribute returns a read-only copy, widened."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, layer: object, owner: type | None = None) -> Any:
        if layer is None:
            return self
        try:
            array = layer.__dict__[self.name]
            return _read_only(array.widened(), layer.dtype) if isinstance(array, StoredWeight) else array
        except KeyError:
            if "dtype" in layer.__dict__ and self.name not in layer._shapes():
                return None
            raise AttributeError(f"this layer has no {self.name} yet") from None

    def __set__(self, layer: Any, value: ArrayLike | None) -> None:
        shapes = layer._shapes()
        if self.name not in shapes:
            if value is None:
                return
            raise ValueError(f"{self.name}: expected None, got a {type(value).__name__}; a layer with input_dim, kdim, "
                             f"vdim = {layer.input_dim}, {layer.kdim}, {layer.vdim} has {', '.join(shapes)}")
        array = check_parameter(self.name, value, shapes[self.name], layer.dtype)
        if layer.weight_dtype is not None and len(shapes[self.name]) == 2:
            layer.__dict__[self.name] = StoredWeight.of(array, layer.weight_dtype)
            return
        layer.__dict__[self.name] = array if array is None or array.flags.writeable else copy(array, array.dtype)


class MultiHeadAttention:
    """Multi-head attention: concat_h(attention(x_q W_q,h^T, x_k W_k,h^T, x_v W_v,h^T)) @ W_o^T + b_o.

    in_proj_weight : array ((num_heads + 2 * num_kv_heads) * head_dim, input_dim)
    in_proj_bias : array ((num_heads + 2 * num_kv_heads) * head_dim,), or None
    out_proj_weight : array (embed_dim, num_heads * head_dim)
    out_proj_bias : array (embed_dim,), or None

    Where kdim or vdim is not input_dim, in_proj_weight is None, and its rows are these:

    q_proj_weight : array (num_heads * head_dim, input_dim)
    k_proj_weight : array (num_kv_heads * head_dim, kdim)
    v_proj_weight : array (num_kv_heads * head_dim, vdim)

    The arguments are described at `cattn.MultiHeadAttention`. Vaswani et al. 2017, section 3.2.2.
    """

    _dtypes = None  # names of the dtypes allowed; None: every float dtype

    in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight = (_Parameter() for _ in range(4))
    in_proj_bias, out_proj_weight, out_proj_bias = (_Parameter() for _ in range(3))

    def __init__(
        self, embed_dim: int, num_heads: int, *, num_kv_heads: int | None = None, head_dim: int | None = None,
        input_dim: int | None = None, kdim: int | None = None, vdim: int | None = None, bias: bool = True,
        out_bias: bool | None = None, dropout: float = 0.0, dtype: DTypeLike = np.float32,
        seed: int | np.random.Generator | None = None, weight_dtype: DTypeLike | None = None,
    ) -> None:
        self.embed_dim = check_int("embed_dim", embed_dim, 1)
        self.num_heads = check_int("num_heads", num_heads, 1)
        num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1)
        self.input_dim = check_int("input_dim", embed_dim if input_dim is None else input_dim, 1)
        self.kdim = check_int("kdim", self.input_dim if kdim is None else kdim, 1)
        self.vdim = check_int("vdim", self.input_dim if vdim is None else vdim, 1)
        if head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {shown(embed_dim)}, got {shown(num_heads)}"
                             "; head_dim=... makes heads of another size")
        self.head_dim = check_int("head_dim", self.embed_dim // self.num_heads if head_dim is None else head_dim, 1)
        self.dropout = check_dropout("dropout", dropout)
        self.dtype = check_dtype(dtype, self._dtypes)
        self.weight_dtype = check_weight_dtype(weight_dtype)
        bias = check_bool("bias", bias)
        out_bias = bias if out_bias is None else check_bool("out_bias", out_bias)

        try:
            rng = np.random.default_rng(seed)
        except (TypeError, ValueError) as error:
            raise type(error)(f"seed: expected an int >= 0 or a Generator, got {shown(seed)}") from None
        shapes = self._shapes()
        for name, shape in shapes.items():
            if math.prod(shape) > 2**58:
                raise ValueError(f"embed_dim: expected at most 2**58 elements in a weight, got {name} of shape {shape}")
        for name, shape in shapes.items():
            if len(shape) == 2:
                setattr(self, name, _xavier_uniform(rng, *shape, self.dtype))
            else:
                has_bias = out_bias if name == "out_proj_bias" else bias
                setattr(self, name, np.zeros(shape, self.dtype) if has_bias else None)

    def __call__(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, key_mask: ArrayLike | None = None, is_causal: bool = False,
        q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, return_weights: bool = False, training: bool = False,
        seed: int | None = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Project, attend, project back: see `cattn.MultiHeadAttention`, which has num_threads besides.

        query : array (batch, seq_len_q, input_dim) or (seq_len_q, input_dim)
        key : array (batch, seq_len_kv, kdim) or (seq_len_kv, kdim); the query when None
        value : array (batch, seq_len_kv, vdim) or (seq_len_kv, vdim); the key when None
        out : array (batch, seq_len_q, embed_dim) or (seq_len_q, embed_dim)
        weights : array (batch, num_heads, seq_len_q, seq_len_kv); with return_weights
        """
        return self._forward(
            query, key, value, attn_mask, key_mask, is_causal, return_weights, training,
            q_offset=q_offset, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            kv_lens=kv_lens, seed=seed,
        )

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters by name, those that are not None: the arrays themselves, so that `p -= step` trains the layer.

        Raises
        ------
        ValueError
            If the layer has a weight_dtype.
        """
        self._check_trains()
        parameters = {name: getattr(self, name) for name in self._shapes()}
        return {name: array for name, array in parameters.items() if array is not None}

    def vjp(
        self, query: ArrayLike, key: ArrayLike | None = None, value: ArrayLike | None = None, *,
        attn_mask: ArrayLike | None = None, key_mask: ArrayLike | None = None, is_causal: bool = False,
        q_offset: ArrayLike | None = None, window: Sequence[int | None] | ArrayLike | None = None,
        softcap: float | None = 0.0, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
        kv_lens: ArrayLike | None = None, training: bool = False, seed: int | None = None,
    ) -> tuple[np.ndarray, Callable[[ArrayLike], LayerGradients]]:
        """The result, and the function that takes its gradient back to inputs and parameters: see
        `cattn.MultiHeadAttention`, which has num_threads besides.

        out : array (batch, seq_len_q, embed_dim) or (seq_len_q, embed_dim), as of a call
        pullback : pullback(grad_out), with grad_out of the shape and the dtype of out, is LayerGradients, those of
        sum(grad_out * out)

        What was not given has its gradient in that of what was taken for it: key None in the query's, value None in the
        key's. pullback may be called more than once. It has copies of all that it needs: neither parameters nor inputs
        that change meanwhile matter to it.
        """
        return self._vjp(
            query, key, value, attn_mask, key_mask, is_causal, training, q_offset=q_offset, window=window,
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, kv_lens=kv_lens, seed=seed,
        )

    def _forward(self, query, key, value, attn_mask, key_mask, is_causal, return_weights, training, *, kv_lens,
                 num_threads=None, **options):
        query, key, value, attn_mask, checked = self._arguments(
            query, key, value, attn_mask, key_mask, is_causal, training, kv_lens)
        return_weights = check_bool("return_weights", return_weights)
        own = self._own_parameters()

        q, k, v = self._project(query, key, value, own, num_threads)
        heads, weights = self._attend(q, k, v, attn_mask, return_weights, num_threads, **checked, **options)
        out = self._linear(heads, own["out_proj_weight"], own["out_proj_bias"], num_threads)
        if query.ndim == 2:
            out, weights = out[0], weights[0] if return_weights else None
        return (out, weights) if return_weights else out

    def _vjp(self, query, key, value, attn_mask, key_mask, is_causal, training, *, kv_lens, seed, num_threads=None,
             **options):
        self._check_trains()
        # Which of q, k and v each input becomes; those that are not given become none.
        parts = {"query": "qkv" if key is None and value is None else "qk" if key is None else "q",
                 "key": "" if key is None else "kv" if value is None else "k",
                 "value": "" if value is None else "v"}
        parts = {name: part for name, part in parts.items() if part}
        query, key, value, attn_mask, checked = self._arguments(
            query, key, value, attn_mask, key_mask, is_causal, training, kv_lens)
        if checked["dropout_p"]:
            seed = check_seed(seed)
        copies = {id(x): copy(x, x.dtype) for x in (query, key, value)}
        query, key, value = (copies[id(x)] for x in (query, key, value))
        own = {name: None if x is None else copy(x, x.dtype) for name, x in self._own_parameters().items()}
        options = {name: x.copy() if isinstance(x, np.ndarray) else x
                   for name, x in (options | checked | {"attn_mask": attn_mask, "seed": seed}).items()}

        q, k, v = self._project(query, key, value, own, num_threads)
        heads, logsumexp = self._attend_with_lse(q, k, v, num_threads, **options)
        out = self._linear(heads, own["out_proj_weight"], own["out_proj_bias"], num_threads)
        batched = query.ndim == 3
        out = out if batched else out[0]
        shape = out.shape

        def pullback(grad_out: ArrayLike) -> LayerGradients:
            grad_out = check_form("grad_out", grad_out, shape, self.dtype, "dtype of the layer", "layer.dtype")
            grad_heads, *of_out_proj = self._linear_backward(
                grad_out if batched else grad_out[None], heads, own["out_proj_weight"], num_threads,
                own["out_proj_bias"] is not None)
            of_projected = self._attend_backward(grad_heads, q, k, v, heads, logsumexp, parts, num_threads, **options)
            inputs, gradients = self._project_backward(
                of_projected, {"query": query, "key": key, "value": value}, parts, own, num_threads)
            gradients["out_proj_weight"], gradients["out_proj_bias"] = of_out_proj
            return LayerGradients(**inputs, parameters={
                name: gradients[name] for name, x in own.items() if x is not None})

        return out, pullback

    def _arguments(self, query, key, value, attn_mask, key_mask, is_causal, training, kv_lens):
        """Checked: the inputs, the masks as one, and what else attention takes."""
        query, key, value = check_layer_inputs(self, query, key, value)
        if attn_mask is not None:
            attn_mask = check_layer_mask(self, attn_mask, query, key)
        if key_mask is not None:
            attn_mask = _with_key_mask(attn_mask, check_key_mask(key_mask, key))
        is_causal = check_bool("is_causal", is_causal)
        dropout_p = check_dropout("dropout", self.dropout) if check_bool("training", training) else 0.0
        if kv_lens is not None:
            kv_lens = kv_lens if type(kv_lens) is int else as_array("kv_lens", kv_lens)
        return query, key, value, attn_mask, {"is_causal": is_causal, "kv_lens": kv_lens, "dropout_p": dropout_p}

    def _check_trains(self):
        if self.weight_dtype is not None:
            raise ValueError(f"weight_dtype: expected None in a layer that is trained, got {self.weight_dtype}, where "
                             "small steps are rounded away; a layer without weight_dtype takes this one's state_dict()")

    # The steps that cattn.MultiHeadAttention does in its own way.

    def _project(self, query, key, value, own, num_threads):
        """(batch, seq, size) each, batch optional, to (batch, heads, seq, head_dim) each, by `own` parameters."""
        weight, bias, rows = own.get("in_proj_weight"), own["in_proj_bias"], self._rows()
        weights = ([own[f"{x}_proj_weight"] for x in "qkv"] if weight is None else [weight[part] for part in rows])
        biases = [None if bias is None else bias[part] for part in rows]
        return [self._split_heads(self._linear(x, *parameters, num_threads))
                for x, *parameters in zip((query, key, value), weights, biases, strict=True)]

    def _attend(self, q, k, v, attn_mask, return_weights, num_threads, **options):
        """(batch, heads, seq, head_dim) each to (batch, seq_len_q, num_heads * head_dim), and the weights if wanted."""
        out, weights = scaled_dot_product_attention(q, k, v, attn_mask, return_weights=True, **options)
        return self._join_heads(out), weights

    def _attend_with_lse(self, q, k, v, num_threads, **options):
        """(batch, heads, seq, head_dim) each to (batch, seq_len_q, num_heads * head_dim), and the logsumexp."""
        out, logsumexp = scaled_dot_product_attention(q, k, v, return_logsumexp=True, **options)
        return self._join_heads(out), logsumexp

    def _attend_backward(self, grad_heads, q, k, v, heads, logsumexp, parts, num_threads, **options):
        """The gradients of what each input has become: {input: (batch, seq, size), those of its `parts` side by side},
        such as "kv"; heads and their gradient as _attend_with_lse has them."""
        gradients = scaled_dot_product_attention_backward(
            self._split_heads(grad_heads), q, k, v, self._split_heads(heads), logsumexp, **options)
        of = dict(zip("qkv", map(self._join_heads, gradients[:3]), strict=True))
        return {name: np.concatenate([of[letter] for letter in part], axis=-1) for name, part in parts.items()}

    def _linear(self, x, weight, bias, num_threads):
        """x @ weight^T + bias, rounded once to the dtype of x; the weight may be a StoredWeight."""
        return linear(x, weight.widened() if isinstance(weight, StoredWeight) else weight, bias)

    def _linear_backward(self, grad_out, x, weight, num_threads, has_bias):
        """The gradients of x, weight and bias, the last None where there is none, in the dtype of x."""
        return linear_backward(grad_out, x, weight, has_bias)

    # The steps that both share.

    def _shapes(self):
        """{parameter: its shape}, for sizes that fit together: they are plain attributes."""
        num_kv_heads, input_dim = self.num_kv_heads, self.input_dim
        if num_kv_heads < 1 or self.num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {shown(self.num_heads)}, "
                             f"got {shown(num_kv_heads)}")
        q_rows, kv_rows = self.num_heads * self.head_dim, num_kv_heads * self.head_dim
        rows = q_rows + 2 * kv_rows
        if self.kdim == self.vdim == input_dim:
            weights = {"in_proj_weight": (rows, input_dim)}
        else:
            weights = {"q_proj_weight": (q_rows, input_dim), "k_proj_weight": (kv_rows, self.kdim),
                       "v_proj_weight": (kv_rows, self.vdim)}
        return {**weights, "in_proj_bias": (rows,), "out_proj_weight": (self.embed_dim, q_rows),
                "out_proj_bias": (self.embed_dim,)}

    def _rows(self):
        """Of what is projected, in in_proj_weight and in_proj_bias: those that make q, k and v."""
        k_start, v_start = self.num_heads * self.head_dim, (self.num_heads + self.num_kv_heads) * self.head_dim
        return slice(0, k_start), slice(k_start, v_start), slice(v_start, 2 * v_start - k_start)

    def _own_parameters(self, widened=False):
        """{parameter: a view that nobody else holds}, for one call: another thread may assign them meanwhile. Weights
        are as they are stored, or widened."""
        own, dtype = {}, self.dtype
        for name, shape in self._shapes().items():
            array = self.__dict__.get(name)
            if isinstance(array, StoredWeight) and array.shape == shape and not widened:
                own[name] = array
                continue
            array = getattr(self, name)
            if array is not None:
                array = array[...]
                if not (array.shape == shape and array.dtype == dtype and array.flags.carray):  # rarely
                    array = check_parameter(name, array, shape, dtype)
            own[name] = array
        return own

    def _project_backward(self, of_projected, inputs, parts, own, num_threads):
        """From what _attend_backward returns to the gradients of the inputs, {name: array or None}, and of in_proj and
        the like. What an input has become is taken back in one go, so that the sum is rounded once."""
        rows, has_bias = dict(zip("qkv", self._rows(), strict=True)), own["in_proj_bias"] is not None
        of_inputs, of_weights, of_biases = dict.fromkeys(inputs), [], []
        for name, part in parts.items():
            first = rows[part[0]].start
            if "in_proj_weight" in own:
                weight = own["in_proj_weight"][first : rows[part[-1]].stop]
            else:
                weight = np.concatenate([own[f"{letter}_proj_weight"] for letter in part])
            x = inputs[name]
            of_x, of_weight, of_bias = self._linear_backward(
                of_projected[name], x if x.ndim == 3 else x[None], weight, num_threads, has_bias)
            of_inputs[name] = of_x.reshape(x.shape)
            of_weights.append((first, part, of_weight))
            of_biases.append(of_bias)
        gradients = {"in_proj_bias": _joined(of_biases)} if has_bias else {}
        if "in_proj_weight" in own:
            gradients["in_proj_weight"] = _joined([of_weight for _, _, of_weight in of_weights])
        else:
            gradients |= {f"{letter}_proj_weight": of_weight[rows[letter].start - first : rows[letter].stop - first]
                          for first, part, of_weight in of_weights for letter in part}
        return of_inputs, gradients

    def _join_heads(self, x):
        """(batch, heads, seq, head_dim) to (batch, seq, heads * head_dim)."""
        batch, num_heads, seq_len, head_dim = x.shape
        return x.swapaxes(1, 2).reshape(batch, seq_len, num_heads * head_dim)

    def _split_heads(self, x):
        """(batch, seq, heads * head_dim), batch optional, to a view (batch, heads, seq, head_dim)."""
        x = x.reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim).swapaxes(-3, -2)
        return x if x.ndim == 4 else x[None]

    def __repr__(self) -> str:
        own = dict(self.__dict__)
        for name, argument in ("in_proj_bias", "bias"), ("out_proj_bias", "out_bias"):
            if name in own:
                own[argument] = own[name] is not None
        sizes = [own.get(name) for name in ("embed_dim", "num_heads", "head_dim")]
        if all(type(size) is int for size in sizes) and sizes[0] == sizes[1] * sizes[2]:
            del own["head_dim"]
        return layer_text(self, own, {
            "embed_dim": ..., "num_heads": ..., "num_kv_heads": own.get("num_heads"), "head_dim": None,
            "input_dim": own.get("embed_dim"), "kdim": own.get("input_dim"), "vdim": own.get("input_dim"),
            "bias": True, "out_bias": own.get("bias", True), "dropout": 0.0, "dtype": np.dtype(np.float32),
            "weight_dtype": None})

    # State dicts.

    def state_dict(self, layout: str = "torch", prefix: str = "") -> dict[str, np.ndarray]:
        """A copy of the parameters, under the names and in the row order of another library.

        Parameters
        ----------
        layout : str
            Whose names.

            * "torch": in_proj_weight, in_proj_bias, out_proj.weight, out_proj.bias of its MultiheadAttention.
            * "torch_split": q_proj_weight, k_proj_weight, v_proj_weight for in_proj_weight, as it has them
              where kdim or vdim differ. ("torch" is the same for such a layer.)
            * "tutorial": qkv_proj.* and o_proj.*, the rows of qkv_proj ordered [head][q, k, v][head_dim], not
              [q, k, v][head][head_dim] as in Phi-3; only for num_kv_heads == num_heads and kdim == vdim ==
              input_dim.
            * "d2l": W_q.*, W_k.*, W_v.*, W_o.*
            * "huggingface": q_proj.*, k_proj.*, v_proj.*, o_proj.* (Llama, Qwen, Gemma)
            * "bart": q_proj.*, k_proj.*, v_proj.*, out_proj.* (BART, CLIP, Whisper)
            * "bert": self.query.*, self.key.*, self.value.*, output.dense.* (BERT, RoBERTa)
            * "keras": query/kernel (input_dim, num_heads, head_dim) and query/bias (num_heads, head_dim), likewise
              key and value; attention_output/kernel (num_heads, head_dim, embed_dim) and attention_output/bias
        prefix : str
            What the names begin with, as "encoder.layer.3.attention." of a whole model.

        Returns
        -------
        state : dict of str to array

        Raises
        ------
        ValueError
            If there is no such layout, or not for this layer.
        TypeError
            If `prefix` is no str.
        """
        return _layouts.state_dict(self, layout, prefix)

    def load_state_dict(self, state: Mapping[str, ArrayLike], layout: str | None = None, prefix: str = "") -> None:
        """Take all parameters from a state dict; change nothing if anything is wrong with it.

        The layer projects and attends, with scale 1 / sqrt(head_dim). What a model does to its queries and keys in
        between (rotary positions of Llama, Qwen, Gemma; norms of Qwen 3; another scale) is not part of it.

        Parameters
        ----------
        state : mapping of str to float array
            Anything that numpy.asarray reads, and torch tensors on the CPU, of bfloat16 and with gradients as
            well; cast to the dtype of the layer.
        layout : str, optional
            As in `state_dict`; from the names in `state` when None. The norm that BERT has beside its layer,
            output.LayerNorm.*, is left alone.
        prefix : str
            Of the names that count, such as "encoder.layer.3.attention."; those that begin otherwise are
            ignored. "": all count.

        Raises
        ------
        ValueError
            If keys are missing or unknown (the closest layout, the first three of them, and what takes the state
            are named), or a shape is wrong (key and both shapes are named).
        TypeError
            If `state` is not a mapping of names to float arrays.
        """
        for name, array in _layouts.parameters_of(self, state, layout, prefix).items():
            setattr(self, name, array)


def _joined(arrays):
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _read_only(array, dtype):
    array = cast(array, dtype)
    array.flags.writeable = False
    return array


def _with_key_mask(attn_mask, key_mask):
    """attn_mask, of 2 or 4 axes or None, without the keys that key_mask (batch, seq_len_kv) hides."""
    key_mask = key_mask[:, None, None, :]
    if attn_mask is None:
        return key_mask
    if attn_mask.dtype == bool:
        return attn_mask & key_mask
    if not is_float(attn_mask.dtype):
        raise_mask_dtype(attn_mask, attn_mask)
    if attn_mask.dtype in KINDS:  # no longer to be seen where -inf is in it
        warn_of_0_and_1(attn_mask, KINDS[attn_mask.dtype])
    combined = np.empty(np.broadcast_shapes(attn_mask.shape, key_mask.shape), attn_mask.dtype)
    combined[...] = attn_mask
    np.copyto(combined, attn_mask.dtype.type(-np.inf), where=~key_mask)
    return combined


def _xavier_uniform(rng, fan_out, fan_in, dtype):
    bound = math.sqrt(6 / (fan_in + fan_out))
    weight = np.empty(fan_out * fan_in, dtype)
    for first in range(0, weight.size, 2**18):  # signals are handled in between
        part = weight[first : first + 2**18]
        part[...] = cast(rng.uniform(-bound, bound, part.size), dtype)
    return weight.reshape(fan_out, fan_in)
