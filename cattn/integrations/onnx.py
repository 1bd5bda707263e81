"""ONNX's Attention and RotaryEmbedding, for onnx's reference evaluator: `pip install "cattn[onnx]"`.

    new_ops    what onnx.reference.ReferenceEvaluator(model, new_ops=new_ops()) computes these two nodes by

The nodes translate: three axes to four, without a copy, and names and rules of ONNX to those of cattn. onnx is imported
by the first call of `new_ops`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

import cattn
from cattn._checks import cast, check_int, check_kv_lens, is_float, shown
from cattn.integrations._library import library
from cattn.reference._attention import aligned, biased, distances, products, scale_of

__all__ = ["new_ops"]

_OLDEST = (1, 22)
_SOFTMAX_PRECISIONS = {1: "FLOAT", 10: "FLOAT16", 11: "DOUBLE", 16: "BFLOAT16"}  # TensorProto.DataType
_MODES = range(4)  # of qk_matmul_output
_AFTER_SOFTCAP, _WITH_BIAS, _PROBABILITIES = 1, 2, 3
_MASKS_OF_ANY_LENGTH = 24  # the opset


def new_ops() -> list[Any]:
    """Node classes for Attention (opsets 23 to 25) and RotaryEmbedding (23), of the domain ai.onnx.

    Every input, output and attribute means what ONNX says, with these liberties:

    * Where ONNX rounds each step to the dtype of Q, all is computed in float32, or in float64 where that is the dtype
      or `softmax_precision`, and rounded once. A lower `softmax_precision` changes nothing.
    * Keys that a bool mask, `is_causal`, a window or `nonpad_kv_seqlen` hides are not read: NaN there changes nothing.
    * An integer mask is added, and `softcap` counts by its magnitude, as in ONNX's function body.
    * `qk_matmul_output` before the softmax (modes 0 to 2) is plain NumPy, and takes the memory of all scores; it is
      computed where the node has that output.

    Returns
    -------
    list of subclasses of ``onnx.reference.op_run.OpRun``

    Raises
    ------
    ImportError
        Where onnx is missing or older than 1.22.

    Notes
    -----
    The evaluator computes nodes in functions of the model (model.functions) by its own classes: it does not pass
    new_ops on to them, as it does to branches and loops. ``onnx.inliner.inline_local_functions`` makes them nodes like
    others.

    Examples
    --------
    ::

        session = onnx.reference.ReferenceEvaluator(model, new_ops=new_ops())
        results = session.run(None, {"Q": query, "K": key, "V": value})
    """
    return [*_classes()]


@functools.cache
def _classes():
    library("onnx", _OLDEST, "onnx")
    from onnx.reference.op_run import OpRun

    class Attention(OpRun):
        op_domain = ""

        def run(self, *args, **kwargs):
            # The evaluator keeps results by their names. That of an output which a node has not is "", as of an input
            # which a node has not: there has to be None, or the next node without a mask takes it for its mask.
            results = super().run(*args, **kwargs)
            return tuple(result if name else None for result, name in zip(results, self.output, strict=False))

        def _run(self, *inputs, **attributes):
            wanted = len(self.output) > 3 and self.output[3] != ""
            return _attention(*inputs, **attributes, opset=self.run_params["opsets"][self.domain], qk_wanted=wanted)

    class RotaryEmbedding(OpRun):
        op_domain = ""

        def _run(self, *inputs, **attributes):
            return (_rotary_embedding(*inputs, **attributes),)

    return Attention, RotaryEmbedding


def _attention(
    Q, K, V, attn_mask=None, past_key=None, past_value=None, nonpad_kv_seqlen=None, *, opset, qk_wanted, scale=None,
    is_causal=0, q_num_heads=None, kv_num_heads=None, softmax_precision=None, softcap=0.0, qk_matmul_output_mode=0,
    left_window_size=-1, right_window_size=-1,
):
    """Y, present_key, present_value; and qk_matmul_output, if it is wanted. Names are ONNX's."""
    mode = qk_matmul_output_mode
    if mode not in _MODES:
        raise ValueError(f"qk_matmul_output_mode: expected 0, 1, 2 or 3, got {shown(mode)}")
    if softmax_precision is not None and softmax_precision not in _SOFTMAX_PRECISIONS:
        expected = ", ".join(f"{number} ({name})" for number, name in _SOFTMAX_PRECISIONS.items())
        raise ValueError(f"softmax_precision: expected one of {expected}, got {shown(softmax_precision)}")
    if scale is not None and scale < 0:
        raise ValueError(f"scale: expected a number >= 0, whose square root Q and K are multiplied by, got {scale}")
    window = check_int("left_window_size", left_window_size, -1), check_int("right_window_size", right_window_size, -1)

    query = _by_heads("Q", Q, "q_num_heads", q_num_heads)
    key = _by_heads("K", K, "kv_num_heads", kv_num_heads)
    value = _by_heads("V", V, "kv_num_heads", kv_num_heads)
    for name, array in (("K", key), ("V", value)):
        if len(array) != len(query):
            raise ValueError(f"{name}: expected a batch of {len(query)}, as Q has, got shape {array.shape}")
    present_key, present_value, offset = key, value, 0
    if (past_key is None) != (past_value is None):
        raise ValueError("past_key, past_value: expected both or neither, got one")
    if past_key is not None:
        if nonpad_kv_seqlen is not None:
            raise ValueError("nonpad_kv_seqlen: expected none beside past_key and past_value, got both")
        present_key, present_value = _present("past_key", past_key, key), _present("past_value", past_value, value)
        offset = past_key.shape[2]
        if past_value.shape[2] != offset:
            raise ValueError(f"past_value: expected the {offset} keys of past_key, got shape {past_value.shape}")
    seq_len_q, seq_len_kv = query.shape[2], present_key.shape[2]
    if nonpad_kv_seqlen is not None:
        nonpad_kv_seqlen = check_kv_lens(nonpad_kv_seqlen, query.shape[:1], seq_len_kv, "nonpad_kv_seqlen")
        offset = nonpad_kv_seqlen - seq_len_q

    if softmax_precision is not None and _SOFTMAX_PRECISIONS[softmax_precision] == "DOUBLE":
        dtype = np.float64
    else:
        dtype = np.result_type(query, present_key, present_value)
    query, key, value = (cast(x, dtype) for x in (query, present_key, present_value))
    if attn_mask is not None:
        attn_mask = _mask(attn_mask, seq_len_kv, opset, dtype)
    softcap = abs(float(softcap))
    hiding = {"q_offset": offset, "kv_lens": nonpad_kv_seqlen, "window": window}

    if Q.ndim == 4:
        Y = out = np.empty((*query.shape[:3], value.shape[3]), dtype)
    else:
        Y = np.empty((*query.shape[:3:2], query.shape[1] * value.shape[3]), dtype)
        out = _by_heads("Y", Y, "q_num_heads", q_num_heads)
    probabilities = qk_wanted and mode == _PROBABILITIES
    results = cattn.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=bool(is_causal), scale=None if scale is None else float(scale),
        softcap=softcap, out=out, return_weights=probabilities, **hiding)
    outputs = [cast(Y, Q.dtype), present_key, present_value]
    if qk_wanted:
        qk = results[1] if probabilities else _scores(query, key, attn_mask, mode, scale, softcap, is_causal, hiding)
        outputs.append(cast(qk, Q.dtype))
    return tuple(outputs)


def _by_heads(name, array, attribute, num_heads):
    """(batch, heads, seq, head_dim), as a view; of three axes, (batch, seq, heads * head_dim)."""
    if array.ndim == 4:
        if num_heads and num_heads != array.shape[1]:
            raise ValueError(f"{name}: expected {attribute} = {num_heads} heads, got shape {array.shape}")
        return array
    if array.ndim != 3:
        raise ValueError(f"{name}: expected (batch, heads, seq, head_dim) or (batch, seq, heads * head_dim), "
                         f"got shape {array.shape}")
    if not num_heads or num_heads < 0:
        raise ValueError(f"{attribute}: expected a number of heads, as {name} has 3 axes, got {num_heads}")
    if array.shape[2] % num_heads:
        raise ValueError(f"{name}: expected a multiple of {attribute} = {num_heads} as last axis, "
                         f"got shape {array.shape}")
    return array.reshape(*array.shape[:2], num_heads, array.shape[2] // num_heads).swapaxes(1, 2)


def _present(name, past, new):
    batch, heads, _, head_dim = new.shape
    if past.ndim != 4 or (*past.shape[:2], past.shape[3]) != (batch, heads, head_dim):
        raise ValueError(f"{name}: expected ({batch}, {heads}, past_sequence_length, {head_dim}), "
                         f"got shape {past.shape}")
    return np.concatenate((past, new), axis=2)


def _mask(attn_mask, seq_len_kv, opset, dtype):
    """bool, or a float mask; of all keys, where a later opset than 23 has one for the first alone."""
    if attn_mask.dtype != bool and not is_float(attn_mask.dtype):
        attn_mask = attn_mask.astype(np.result_type(dtype, np.float32))
    if opset < _MASKS_OF_ANY_LENGTH or attn_mask.ndim == 0 or attn_mask.shape[-1] >= seq_len_kv:
        return attn_mask
    padded = np.full((*attn_mask.shape[:-1], seq_len_kv), attn_mask.dtype != bool and -np.inf, attn_mask.dtype)
    padded[..., : attn_mask.shape[-1]] = attn_mask
    return padded


@np.errstate(all="ignore")
def _scores(query, key, attn_mask, mode, scale, softcap, is_causal, hiding):
    """What the softmax is of, or, in modes 0 and 1, becomes so."""
    query, key, _, attn_mask = aligned(query, key, key, attn_mask)
    root = query.dtype.type(math.sqrt(scale_of(query, scale)))
    scores = products(query * root, key * root, 1, softcap if mode >= _AFTER_SOFTCAP else 0)
    if mode < _WITH_BIAS:
        return scores
    if attn_mask is not None and attn_mask.dtype != bool:  # not clipped, as in biased()
        scores += attn_mask.astype(scores.dtype)
        attn_mask = None
    distance = distances(query.shape[2], key.shape[2], hiding["q_offset"], hiding["kv_lens"])
    return biased(scores, distance, attn_mask, is_causal, window=hiding["window"], alibi_slopes=None,
                  kv_lens=hiding["kv_lens"], kv_starts=None)[0]


def _rotary_embedding(X, cos_cache, sin_cache, position_ids=None, *, interleaved=0, rotary_embedding_dim=0,
                      num_heads=None):
    x = _by_heads("X", X, "num_heads", num_heads)
    dim = rotary_embedding_dim or x.shape[3]
    if dim != 2 * cos_cache.shape[-1] or dim > x.shape[3]:
        name = "rotary_embedding_dim" if rotary_embedding_dim else "X"
        raise ValueError(f"{name}: expected {2 * cos_cache.shape[-1]} columns to turn, 2 for each of cos_cache's, "
                         f"and at most the {x.shape[3]} of a head, got {dim}")
    if position_ids is None:
        if cos_cache.ndim != 3:
            raise ValueError("cos_cache: expected (batch, seq, columns), as there are no position_ids, "
                             f"got shape {cos_cache.shape}")
        cos_cache, sin_cache = cos_cache[:, None], sin_cache[:, None]
    else:
        if position_ids.ndim != 2:
            raise ValueError(f"position_ids: expected (batch, seq), got shape {position_ids.shape}")
        position_ids = position_ids[:, None]
    Y = np.empty(X.shape, X.dtype)
    cattn.rotary_embedding(x, cos_cache, sin_cache, position_ids, interleaved=bool(interleaved),
                           out=_by_heads("Y", Y, "num_heads", x.shape[1]))
    return Y
