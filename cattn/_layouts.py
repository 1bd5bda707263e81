"""The state dicts of other libraries: their names for a layer's parameters, and the order of their rows."""

from collections.abc import Mapping

import numpy as np

from cattn._checks import as_array, cast, copy, is_float, shown


def state_dict(layer, layout):
    """A copy of the layer's parameters, in this layout."""
    parameters = layer._own_parameters()
    entries = _entries(layer, layout, parameters)
    return {key: copy(parameters[name][rows], layer.dtype) for key, (name, rows) in entries.items()}


def parameters_of(layer, state, layout):
    """{parameter: a new array} from a state dict; where the layout is None, its keys tell."""
    if not isinstance(state, Mapping):
        cure = "; pass its .state_dict()" if hasattr(state, "state_dict") else ""
        raise TypeError(f"state: expected a mapping of names to arrays, got {type(state).__name__}{cure}")
    shapes = layer._shapes()
    parameters = {name: getattr(layer, name) for name in shapes}
    if layout is None:
        shared = {name: len(entries.keys() & set(state)) for name, entries in _layouts(layer, parameters).items()}
        layout = max(shared, key=shared.get)
    entries = _entries(layer, layout, parameters)
    missing, unknown = [k for k in entries if k not in state], [k for k in state if k not in entries]
    if missing or unknown:
        raise ValueError(f"state: expected the keys {list(entries)} (layout {layout!r}), got {shown(list(state))}: "
                         f"missing {missing}, unknown {unknown}")

    loaded = {name: np.empty(shapes[name], layer.dtype) for name, _ in entries.values()}
    for key, (name, rows) in entries.items():
        array, target = as_array("state", state[key], f" for {key!r}"), loaded[name][rows]
        if not is_float(array.dtype):
            raise TypeError(f"state: expected a float array for {key!r}, got dtype {array.dtype}")
        if array.shape != target.shape:
            raise ValueError(f"state: expected shape {target.shape} for {key!r}, got shape {array.shape}")
        loaded[name][rows] = cast(array, layer.dtype)
    return loaded


def _entries(layer, name, parameters):
    layouts = _layouts(layer, parameters)
    if not (isinstance(name, str) and name in layouts):
        raise ValueError(f"layout: expected one of {list(layouts)}, got {shown(name)}")
    if name == "tutorial" and layer.num_kv_heads != layer.num_heads:
        raise ValueError(f"layout: expected num_kv_heads = num_heads = {layer.num_heads} for 'tutorial', "
                         f"got num_kv_heads = {layer.num_kv_heads}")
    return layouts[name]


def _layouts(layer, parameters):
    """{layout: {key: (parameter, rows)}}: entry `key` of a state dict is these rows of that parameter. Without biases
    that are None."""
    every, split = slice(None), dict(zip("qkv", layer._rows(), strict=True))
    by_head = np.arange(3 * layer.embed_dim).reshape(3, layer.num_heads, layer.head_dim).swapaxes(0, 1)

    def entries(out_prefix, in_prefixes):
        parts = [("in_proj", *part) for part in in_prefixes] + [("out_proj", out_prefix, every)]
        return {prefix + kind: (f"{name}_{kind}", rows) for name, prefix, rows in parts
                for kind in ("weight", "bias") if parameters[f"{name}_{kind}"] is not None}

    torch = entries("out_proj.", [("in_proj_", every)])
    torch_split = {f"{x}_proj_weight": ("in_proj_weight", rows) for x, rows in split.items()} | torch
    del torch_split["in_proj_weight"]
    return {
        "torch": torch,
        "torch_split": torch_split,
        "tutorial": entries("o_proj.", [("qkv_proj.", by_head.ravel())]),
        "d2l": entries("W_o.", [(f"W_{x}.", rows) for x, rows in split.items()]),
        "huggingface": entries("o_proj.", [(f"{x}_proj.", rows) for x, rows in split.items()]),
    }
