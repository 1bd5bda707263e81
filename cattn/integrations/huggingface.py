"""cattn in Hugging Face's transformers, on CPUs: `pip install "cattn[huggingface]"`.

    register    attn_implementation="cattn" for its models: encoders, decoders, vision; inference and training

A causal mask, a sliding window and padding on either side come to cattn as numbers: no mask is made, padded keys cost
nothing, and heads in groups are not repeated. Any other mask is made, and used as it is.

transformers has two registers, of functions that make a mask for all layers of a kind, and of functions that attend.
On its way from one to the other the mask is the model's, which may compute with it. So it is a tensor, the mask that
attention by "eager" would have, whose numbers are there as soon as something asks for them (_Mask).

`import cattn` does not import this module: `import cattn.integrations.huggingface` does. `register` imports
transformers and torch.
"""

from __future__ import annotations

import types

import numpy as np

import cattn
from cattn._checks import check_cu_seqlens
from cattn.integrations._library import library
from cattn.integrations.torch import _need_torch, attention, varlen_attention

__all__ = ["register"]

_NAME = "cattn"
_OLDEST = (5, 4)

# What layers of some models pass on, and no mask says: the keys that each query has chosen, sinks of each token.
_UNSUPPORTED = "indices", "block_indices", "sinks"


def register() -> None:
    """Makes "cattn" an `attn_implementation` of transformers, for models on the CPU, in this process.

    Models that look up their attention by this name follow, as most do. Some have an attention of their own: they raise
    an error for a name that they do not know, or compute what they compute for "eager".

    Raises
    ------
    ImportError
        Where there is no transformers of 5.4 or newer, or no torch of 2.11 or newer.

    Examples
    --------
    ::

        cattn.integrations.huggingface.register()
        model = AutoModel.from_pretrained(name, attn_implementation="cattn")
        model.set_attn_implementation("sdpa")   # and back
    """
    _need_transformers()
    for interface, function in ((transformers.AttentionInterface, _attention),
                                (transformers.AttentionMaskInterface, _mask)):
        interface.register(_NAME, torch.compiler.disable(function, reason="NumPy is in it"))


transformers = torch = masking_utils = _collector = _Mask = _patterns = None    # by _need_transformers


def _need_transformers():
    """Imports transformers, once, and makes what is made of it."""
    global transformers, torch, masking_utils, _collector, _Mask, _patterns
    if transformers is not None:
        return
    imported = library("transformers", _OLDEST, "huggingface")
    _need_torch()
    import torch
    from transformers import masking_utils
    from transformers.utils import output_capturing

    _collector = getattr(output_capturing, "_active_collector", None)
    _Mask, _patterns = _mask_class(), _known_patterns()
    transformers = imported


# Attention.


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, softcap=None,
               s_aux=None, position_bias=None, output_attentions=False, cu_seq_lens_q=None, cu_seq_lens_k=None,
               **others):
    """What layers call, with tensors (batch, heads, seq, head_dim): the result (batch, seq, heads, head_dim), and the
    weights or None."""
    _refuse_graphs()
    for name in _UNSUPPORTED:
        if others.get(name) is not None:
            raise ValueError(f'attn_implementation="{_NAME}": {type(module).__name__} passes {name}, which it does not '
                             f'take; model.set_attn_implementation("eager") does')
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x if x.dtype is torch.float64 else x.to(dtype) for x in (query, key, value))
    weights_wanted = output_attentions or _collects_attentions()
    may_be_packed = not weights_wanted and position_bias is None
    visible, bias, limits = None, None, {}
    if isinstance(attention_mask, _Mask):
        visible, bias, limits = attention_mask.meaning(
            (max(len(query), len(key)), 1, query.shape[2], key.shape[2]), may_be_packed)
    elif attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        limits = {"is_causal": bool(is_causal) and query.shape[2] > 1, "q_offset": 0}
    elif attention_mask.dtype is torch.bool:
        visible = attention_mask
    else:
        bias = attention_mask
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias

    options = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        starts = attention_mask.starts if isinstance(attention_mask, _Mask) else None
        cu_seqlens = _check_lengths(cu_seq_lens_q, cu_seq_lens_k, query, key, starts, {
            "biases of positions": position_bias is not None,
            "output_attentions": weights_wanted and starts is None,
            "a mask": (not limits and starts is None) or visible is not None or "kv_lens" in limits
            or "kv_starts" in limits,
            "keys behind the last query, as in a static cache":
                ("window" in limits or limits.get("is_causal", False))
                and limits["q_offset"] != key.shape[2] - query.shape[2],
        })
        if limits:
            limits = limits | {"cu_seqlens": cu_seqlens}
    if "cu_seqlens" in limits:
        tokens = (x[0].transpose(0, 1) for x in (query, key, value))
        limits_of_each = {name: limits[name] for name in ("is_causal", "window") if name in limits}
        return varlen_attention(*tokens, *limits["cu_seqlens"], **limits_of_each, **options)[None], None
    if not weights_wanted:
        weights = None
        out = attention(query, key, value, _joined(visible, bias), **limits, **options)
    elif torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (query, key, value, bias, s_aux)):
        out, weights = _by_formula(query, key, value, visible, bias, limits, **options)
    else:
        out, weights = attention(query, key, value, _joined(visible, bias), **limits, **options, return_weights=True)
    return out.transpose(1, 2).contiguous(), weights


def _check_lengths(cu_seq_lens_q, cu_seq_lens_k, query, key, starts, others):
    """Both, of sequences in the only row of a batch. `starts`: where positions start again, if transformers has seen
    it; `others`: {what cannot be beside lengths: whether it is}."""
    others = {"lengths of queries or of keys alone": cu_seq_lens_q is None or cu_seq_lens_k is None,
              f"a batch of {max(len(query), len(key))}": len(query) != 1 or len(key) != 1, **others}
    if any(others.values()):
        raise ValueError(
            f'attn_implementation="{_NAME}": cu_seq_lens_q and cu_seq_lens_k: expected sequences one after the other '
            f'in a batch of 1, and nothing else, got {next(name for name, given in others.items() if given)}')
    found = []
    for name, lengths, x in (("cu_seq_lens_q", cu_seq_lens_q, query), ("cu_seq_lens_k", cu_seq_lens_k, key)):
        try:
            found.append(check_cu_seqlens(name, lengths, x.shape[2]))
        except (ValueError, TypeError) as error:
            raise type(error)(f'attn_implementation="{_NAME}": {error}; they are of the tokens of one call') from None
    if query.shape[2] == key.shape[2] and not np.array_equal(*found):
        raise ValueError(f'attn_implementation="{_NAME}": cu_seq_lens_k: expected {found[0].tolist()}, as '
                         f'cu_seq_lens_q, got {found[1].tolist()}')
    if starts is not None and not np.array_equal(starts, found[0]):
        raise ValueError(f'attn_implementation="{_NAME}": cu_seq_lens_q: expected {starts.tolist()}, where '
                         f'position_ids start again, got {found[0].tolist()}')
    return found


def _refuse_graphs():
    """Of torch.jit.trace and torch.export: in them, what NumPy computes would be a constant."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise RuntimeError(f'attn_implementation="{_NAME}" is not for traced or exported models; '
                           f'model.set_attn_implementation("sdpa") is')


def _joined(visible, bias):
    """A mask for cattn of one of booleans and one of numbers, each may be None."""
    if bias is None:
        return visible
    return bias if visible is None else bias.masked_fill(~visible, -torch.inf)


def _collects_attentions():
    """Whether a model has been asked for weights: some do not tell their layers, and take what these return."""
    collected = None if _collector is None else _collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _by_formula(query, key, value, visible, bias, limits, scale, softcap, sinks, dropout_p):
    """The result and the weights, both with gradients, as PyTorch computes them one step after the other."""
    zeros = [x.new_zeros(()).expand(*x.shape[:3], 1) for x in (query, key)]
    visible = attention(zeros[0], zeros[1], zeros[1], visible, **limits, return_weights=True)[1] > 0
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.mT) * (query.shape[-1]**-0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)    # finite: a row may see nothing
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].masked_fill(~visible, 0).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    return weights @ value, weights


# Masks.


def _mask_class():
    class Mask(torch.Tensor):
        """A mask of numbers (batch, 1, queries, keys), 0 or the lowest of its dtype, which are not there before
        something asks for them: any function of tensors gets them in its place. From then on they are what counts, as
        they may have been changed.

        Before, it means the same as `options` of cattn, and `visible` as a mask of booleans, which may be None; with
        cu_seqlens, as those of varlen_attention. `starts` are these, or None.
        """

        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, shape, dtype, device, **_):
            return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

        def __init__(self, shape, dtype, device, *, everything, visible, options):
            self._everything, self._visible, self._options, self._numbers = everything, visible, options, None
            self.starts = options["cu_seqlens"][0] if "cu_seqlens" in options else None

        def meaning(self, shape, may_be_packed):
            """(visible, numbers, options), for attention of this shape."""
            if self._numbers is not None or self.shape != shape or (
                    "cu_seqlens" in self._options and not may_be_packed):
                return None, self._as_numbers(), {}
            return self._visible, None, self._options

        def _as_numbers(self):
            if self._numbers is None:
                lowest = torch.finfo(self.dtype).min
                self._numbers = torch.zeros((), dtype=self.dtype).where(self._everything(), lowest)
            return self._numbers

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.detach.default:   # of inputs, by torch.utils.checkpoint
                return args[0]
            args, kwargs = torch.utils._pytree.tree_map_only(cls, cls._as_numbers, (args, kwargs or {}))
            return function(*args, **kwargs)

    return Mask


def _mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None,
          allow_is_causal_skip=True, allow_is_bidirectional_skip=False, dtype=None, device="cpu", **others):
    """What transformers' create_causal_mask and its like return: a _Mask, or None where all is visible and that may be
    said so.

    Query i and key j have the positions q_offset + i and kv_offset + j. `mask_function` says of two positions whether
    one sees the other; attention_mask, booleans (batch, positions), which keys are no padding.
    """
    _refuse_graphs()
    mask_function = mask_function or masking_utils.causal_mask_function

    def everything():
        return masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False, device=device, **others)

    options, visible = _options_of(mask_function), None
    padded = attention_mask is not None
    if options is not None and "sequences" in options:
        cu_seqlens = _cu_seqlens(options.pop("sequences"), q_length, kv_length)
        usable = cu_seqlens is not None and q_offset == kv_offset and not padded
        options = options | {"cu_seqlens": (cu_seqlens, None)} if usable else None
    if options is None or (padded and (attention_mask.dtype is not torch.bool or attention_mask.ndim != 2
                                       or len(attention_mask) != batch_size or not attention_mask.is_cpu)):
        visible, options = everything(), {}
    else:
        if padded:
            visible, lengths = _lengths(attention_mask[:, kv_offset : kv_offset + kv_length], kv_length)
            options = options | lengths
        if allow_is_bidirectional_skip and visible is None and not options:
            return None
        options = options | {"q_offset": int(q_offset) - int(kv_offset)}
    return _Mask((batch_size, 1, q_length, kv_length), dtype, device, everything=everything, visible=visible,
                 options=options)


def _cu_seqlens(sequences, q_length, kv_length):
    """Where sequences begin and end, of one row of their numbers; None if they are not one after the other there."""
    if sequences.shape != (1, q_length) or q_length != kv_length or not sequences.is_cpu:
        return None
    steps = np.diff(sequences[0].numpy())
    return None if (steps < 0).any() else np.array([0, *np.flatnonzero(steps) + 1, q_length])


def _lengths(is_key, kv_length):
    """(mask of booleans or None, options of cattn) that say which keys of each row are none; those after the last
    column are not."""
    missing = kv_length - is_key.shape[1]
    if missing:
        is_key = torch.nn.functional.pad(is_key, (0, missing))
    rows = is_key.numpy()
    counts = np.count_nonzero(rows, axis=1)
    starts, stops = rows.argmax(axis=1), kv_length - rows[:, ::-1].argmax(axis=1)
    stops[counts == 0] = 0
    if (stops - starts != counts).any():
        return is_key[:, None, None], {}
    options = {}
    if starts.any():
        options["kv_starts"] = starts
    if (stops < kv_length).any():
        options["kv_lens"] = stops
    return None, options


def _options_of(mask_function):
    """What it says, in options of cattn; None where it is none that is known. With `sequences` where they are packed:
    which one each token (batch, length) is of."""
    for pattern, options in _patterns:
        found = _found(mask_function, pattern)
        if found is not None:
            options = options(found.get("width", 0))
            if options is not None and "sequences" in found:
                options["sequences"] = found["sequences"]
            return options
    return None


class _Anything(str):
    """In a pattern: any width of a window, any tensor of positions."""


def _found(given, pattern):
    """{name: what is in a mask function in the place of _Anything(name)} if it was made as `pattern` was; None if it
    was not."""
    if isinstance(pattern, _Anything):
        return {pattern: given}
    if isinstance(pattern, tuple) and isinstance(given, tuple) and len(pattern) == len(given):
        parts = zip(given, pattern, strict=True)
    elif isinstance(pattern, types.FunctionType) and isinstance(given, types.FunctionType) and (
            pattern.__code__ is given.__code__):
        parts = ((a.cell_contents, b.cell_contents)
                 for a, b in zip(given.__closure__ or (), pattern.__closure__ or (), strict=True))
    else:
        return None
    found = [_found(*pair) for pair in parts]
    return None if None in found else {name: value for each in found for name, value in each.items()}


def _known_patterns():
    """[(mask function, options of cattn as a function of its width)], those that mean the same in this transformers:
    small masks are compared. Each as it is, and for packed sequences."""
    candidates = [
        (lambda width: masking_utils.causal_mask_function, lambda width: {"is_causal": True}),
        (lambda width: masking_utils.bidirectional_mask_function, lambda width: {}),
        (masking_utils.sliding_window_causal_mask_function,
         lambda width: {"is_causal": True, "window": (width - 1, None)} if width > 0 else None),
        (masking_utils.sliding_window_bidirectional_mask_function,
         lambda width: {"window": (width, width)} if width > 0 else None),
    ]

    def theirs(mask_function, rows, keys, offset):
        mask = masking_utils.sdpa_mask(batch_size=1, q_length=rows, kv_length=keys, q_offset=offset,
                                       mask_function=mask_function, allow_is_causal_skip=False)
        return mask[0, 0].numpy()

    def ours(options, rows, keys, offset):
        arrays = np.zeros((rows, 1)), np.zeros((keys, 1)), np.zeros((keys, 1))
        return cattn.scaled_dot_product_attention(*arrays, q_offset=offset, return_weights=True, **options)[1] > 0

    found = []
    for make, options in candidates:
        if np.array_equal(theirs(make(2), 3, 8, 4), ours(options(2), 3, 8, 4)):
            found.append((make(_Anything("width")), options))
        two = np.zeros((7, 7), bool)
        two[:4, :4], two[4:, 4:] = (ours(options(2), n, n, 0) for n in (4, 3))
        packed = _packed(make(2), torch.tensor([[0] * 4 + [1] * 3]), torch.tensor([[0, 1, 2, 3, 0, 1, 2]]))
        if np.array_equal(theirs(packed, 7, 7, 0), two):
            found.append((_packed(make(_Anything("width")), _Anything("sequences"), _Anything("positions")), options))
    return found


def _packed(mask_function, sequences, positions):
    """What transformers makes of it where positions start again within a row."""
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if remap is not None:
        mask_function = remap(mask_function, positions)
    return masking_utils.and_masks(mask_function, masking_utils.packed_sequence_mask_function(sequences))
