"""The state dicts of other libraries: their names for a layer's parameters, and how they lay these out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from cattn._checks import as_array, cast, check_text, copy, is_float, of_torch, shown

# What each calls the projections of query, key, value and result; keys are "name.weight" and "name.bias".
_NAMES = {
    "huggingface": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "bert": ("self.query", "self.key", "self.value", "output.dense"),
    "d2l": ("W_q", "W_k", "W_v", "W_o"),
}
_LAYOUTS = ("torch", "torch_split", "tutorial", "keras", *_NAMES)
_NOT_OURS = {"bert": ("output.LayerNorm.",)}  # what stands under the same prefix, and is no part of the layer


class _Entry(NamedTuple):
    """An entry of a state dict: the numbers of a view of a parameter, in that order, in this shape."""

    parameter: str
    view: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]


def state_dict(layer, layout, prefix):
    """A copy of the layer's parameters, in this layout."""
    check_text("prefix", prefix)
    parameters = layer._own_parameters(widened=True)
    _check_layout(layer, layout)
    entries = _without(_entries(layer, layout), parameters)
    return {prefix + key: copy(entry.view(parameters[entry.parameter]), layer.dtype).reshape(entry.shape)
            for key, entry in entries.items()}


def parameters_of(layer, state, layout, prefix):
    """{parameter: a new array} from a state dict; where the layout is None, its keys tell."""
    if not isinstance(state, Mapping):
        cure = "; pass its .state_dict()" if hasattr(state, "state_dict") else ""
        raise TypeError(f"state: expected a mapping of names to arrays, got {type(state).__name__}{cure}")
    check_text("prefix", prefix)
    keys = _keys_behind(prefix, state)
    shapes = layer._shapes()
    parameters = {name: getattr(layer, name) for name in shapes}
    found = layout is None
    if found:
        layout = _closest(layer, keys, parameters)
    _check_layout(layer, layout)
    entries = _without(_entries(layer, layout), parameters)
    _check_keys(layer, keys, layout, entries, prefix, found)

    loaded = {entry.parameter: np.empty(shapes[entry.parameter], layer.dtype) for entry in entries.values()}
    for key, entry in entries.items():
        name = prefix + key
        array = as_array("state", of_torch(state[name]), f" for {name!r}")
        if not is_float(array.dtype):
            raise TypeError(f"state: expected a float array for {name!r}, got dtype {array.dtype}")
        if array.shape != entry.shape:
            raise ValueError(f"state: expected shape {entry.shape} for {name!r}, got shape {array.shape}")
        target = entry.view(loaded[entry.parameter])
        target[...] = cast(array, layer.dtype).reshape(target.shape)
    return loaded


def _check_layout(layer, layout):
    if not (isinstance(layout, str) and layout in _LAYOUTS):
        raise ValueError(f"layout: expected one of {list(_LAYOUTS)}, got {shown(layout)}")
    if layout == "tutorial" and layer.num_kv_heads != layer.num_heads:
        raise ValueError(f"layout: expected num_kv_heads = num_heads = {layer.num_heads} for 'tutorial', "
                         f"got num_kv_heads = {layer.num_kv_heads}")
    if layout == "tutorial" and "in_proj_weight" not in layer._shapes():
        raise ValueError(f"layout: expected kdim = vdim = input_dim = {layer.input_dim} for 'tutorial', "
                         f"got kdim = {layer.kdim} and vdim = {layer.vdim}")


def _entries(layer, layout):
    """{key: its _Entry} of a layer with all biases."""
    shapes = layer._shapes()
    joint = "in_proj_weight" in shapes
    rows = dict(zip("qkv", layer._rows(), strict=True))

    def entry(parameter, view=lambda array: array):
        return _Entry(parameter, view, view(np.broadcast_to(np.float32(0), shapes[parameter])).shape)

    def part(x, kind, change=lambda array: array):
        """Of the projection x, one of "qkvo"; `change` makes the view of its rows."""
        if x == "o":
            return entry(f"out_proj_{kind}", change)
        if kind == "weight" and not joint:
            return entry(f"{x}_proj_weight", change)
        return entry(f"in_proj_{kind}", lambda array: change(array[rows[x]]))

    if layout in _NAMES:
        return {f"{name}.{kind}": part(x, kind)
                for x, name in zip("qkvo", _NAMES[layout], strict=True) for kind in ("weight", "bias")}
    if layout == "keras":
        heads = partial(_heads_apart, layer.head_dim)

        def heads_first(array):
            return array.T.reshape(-1, layer.head_dim, len(array))

        return {
            **{f"{name}/{kind}": part(x, "weight" if kind == "kernel" else "bias", heads)
               for x, name in zip("qkv", ("query", "key", "value"), strict=True) for kind in ("kernel", "bias")},
            "attention_output/kernel": part("o", "weight", heads_first),
            "attention_output/bias": part("o", "bias"),
        }
    if layout == "tutorial":
        def by_head(array):
            return array.reshape(3, layer.num_heads, layer.head_dim, *array.shape[1:]).swapaxes(0, 1)

        return {f"qkv_proj.{kind}": _Entry(f"in_proj_{kind}", by_head, shapes.get(f"in_proj_{kind}"))
                for kind in ("weight", "bias")} | {f"o_proj.{kind}": part("o", kind) for kind in ("weight", "bias")}
    in_proj = {"in_proj_weight": entry("in_proj_weight")} if layout == "torch" and joint else {
        f"{x}_proj_weight": part(x, "weight") for x in "qkv"}
    return {**in_proj, "in_proj_bias": entry("in_proj_bias"),
            "out_proj.weight": part("o", "weight"), "out_proj.bias": part("o", "bias")}


def _heads_apart(head_dim, array):
    """(heads * head_dim, size) to (size, heads, head_dim); of a bias, (heads, head_dim)."""
    return np.moveaxis(array.reshape(-1, head_dim, *array.shape[1:]), (0, 1), (-2, -1))


def _without(entries, parameters):
    """Those whose parameter is there."""
    return {key: entry for key, entry in entries.items() if parameters.get(entry.parameter) is not None}


# Keys that fit no layout.


def _keys_behind(prefix, state):
    keys = [key[len(prefix) :] for key in state if isinstance(key, str) and key.startswith(prefix)]
    if prefix and not keys:
        raise ValueError(f"prefix: expected one that keys of state begin with, got {shown(prefix)}; the first is "
                         f"{shown(next(iter(state), None))}")
    others = [key for key in state if not isinstance(key, str)]
    if others:
        raise TypeError(f"state: expected names as keys, got {shown(others[0])}")
    return keys


def _closest(layer, keys, parameters):
    """The layout that shares the most keys, or the most ends of keys, and lacks the fewest."""
    keys = set(keys)

    def rank(layout):
        entries = _entries(layer, layout)
        ends = sum(any(key.endswith((f".{end}", f"/{end}")) for key in keys) for end in entries)
        return len(entries.keys() & keys), ends, -len(_without(entries, parameters).keys() - keys)

    return max(_LAYOUTS, key=rank)


def _check_keys(layer, keys, layout, entries, prefix, found):
    keys = [key for key in keys if not key.startswith(_NOT_OURS.get(layout, ()))]
    differences = [f"missing {prefix + key!r}" for key in entries if key not in keys]
    differences += [f"unknown {shown(prefix + key)}" for key in keys if key not in entries]
    if not differences:
        return
    if {"bias_k", "bias_v"} & set(keys):
        raise ValueError("state: expected no 'bias_k' and 'bias_v', the key and the value that add_bias_kv=True of "
                         "PyTorch appends: cattn's layer has none")
    expected = f"layout {layout!r}"
    if found:
        alike = any(key.endswith(tuple(entries)) for key in keys)
        expected = f"a layout, {layout!r} is the closest" if alike else f"a layout, none has such names; of {layout!r}"
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    cure = _cure(layer, keys, layout, prefix)
    raise ValueError(f"state: expected the keys of {expected}: {', '.join(differences[:3])}{more}{cure}")


def _cure(layer, keys, layout, prefix):
    """What would take the state, if anything plainly does."""
    every = _entries(layer, layout)
    biases = {key: entry.parameter for key, entry in every.items() if entry.parameter.endswith("_bias")}
    given, weights = set(keys), every.keys() - biases.keys()
    if weights <= given <= every.keys():
        ours = [key for key, parameter in biases.items() if parameter == "in_proj_bias"]
        lacking = [key for key in ours if key not in given]
        if not lacking or len(lacking) == len(ours):
            has_out = any(biases[key] == "out_proj_bias" for key in given & biases.keys())
            return f"; a layer with bias={not lacking} and out_bias={has_out} takes it"
        zeros = ", ".join(f"{prefix + key!r}: np.zeros({every[key].shape})" for key in lacking)
        return f"; a bias that is not there is 0: state | {{{zeros}}}"
    first, *others = (key for key in every if key in weights)
    prefixes = [key[: -len(first)] for key in keys if key.endswith(first) and key != first]
    fitting = [found for found in prefixes if all(found + key in given for key in others)]
    if fitting:
        return f"; prefix={prefix + fitting[0]!r} takes one of {len(fitting)} such layers in it"
    return ""
