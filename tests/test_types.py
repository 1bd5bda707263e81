"""What editors and type checkers say, which read the source and do not run it; help(); repr() of layers."""

import ast
import importlib.util
import inspect
import os
import pydoc
import re
import subprocess
import sys
import typing

import numpy as np
import pytest

import cattn
from cattn import (
    _attention,
    _cache,
    _gradients,
    _linear,
    _merge,
    _multihead,
    _positional,
    _rotary,
    _serving,
    reference,
)

CALLABLES = [name for name in cattn.__all__ if callable(getattr(cattn, name))]
FOLDER = os.path.dirname(cattn.__file__)
USER_SCRIPT = """
from typing import assert_type

import numpy as np

import cattn

q = np.ones((1, 2, 3, 4), np.float32)
attend = cattn.scaled_dot_product_attention


def of_arrays(flag: bool) -> None:
    assert_type(attend(q, q, q), np.ndarray)
    print(attend(q, q, q).shape, attend(q, q, q, None, 0.0, True, scale=0.5, window=(3, None), num_threads=1) @ q)
    assert_type(attend(q, q, q, return_weights=False, return_logsumexp=False), np.ndarray)
    assert_type(attend(q, q, q, return_weights=True), tuple[np.ndarray, np.ndarray])
    assert_type(attend(q, q, q, return_logsumexp=True), tuple[np.ndarray, np.ndarray])
    out, weights, logsumexp = attend(q, q, q, return_weights=True, return_logsumexp=True)
    print(out.shape, weights.shape, logsumexp.shape)
    assert_type(attend(q, q, q, return_weights=flag), np.ndarray | tuple[np.ndarray, ...])
    assert_type(attend(q, q, q, return_weights=True, return_logsumexp=flag), np.ndarray | tuple[np.ndarray, ...])
    assert_type(cattn.merge_states([q, q], [q[0], q[0]], sinks=[0.5], out=q), tuple[np.ndarray, np.ndarray])
    assert_type(cattn.merge_states(q, q[0], num_threads=1), tuple[np.ndarray, np.ndarray])
    gradients = cattn.scaled_dot_product_attention_backward(out, q, q, q, out, logsumexp, wanted=("key", "sinks"))
    assert_type(gradients, cattn.Gradients)
    assert_type(gradients.key, np.ndarray | None)
    cattn.varlen_attention_backward(out[0], q[0], q[0], q[0], out[0], logsumexp[0], [0, 2], seed=None, num_threads=1)
    cattn.varlen_attention_backward(out, q, q, q, out, logsumexp)  # type: ignore[call-arg]
    attend([[1.0]], [[1.0]], [[1.0]], q_offset=[0], kv_lens=np.array([1]), out=q)
    attend(q, q, q, return_weights=True).shape  # type: ignore[attr-defined]
    attend(q, q)  # type: ignore[call-overload]
    attend(q, q, q, mask=q)  # type: ignore[call-overload]


def of_layers(flag: bool) -> None:
    layer = cattn.MultiHeadAttention(8, 2, num_kv_heads=1, dropout=0.1, dtype="bfloat16", seed=np.random.default_rng())
    assert_type(layer(q), np.ndarray)
    assert_type(layer(q, q, q, is_causal=True, return_weights=False), np.ndarray)
    assert_type(layer(q, return_weights=True), tuple[np.ndarray, np.ndarray])
    assert_type(layer(q, return_weights=flag, num_threads=2), np.ndarray | tuple[np.ndarray, np.ndarray])
    layer.in_proj_weight[:] = 0
    layer.out_proj_bias = None
    assert_type(cattn.linear(q, q[0, 0], weight_scales=None, out=q), np.ndarray)
    cattn.MultiHeadAttention(8, 2, weight_dtype="int8")
    layer.load_state_dict(layer.state_dict("d2l"), layout=None)
    print(layer(q, return_weights=True).shape)  # type: ignore[attr-defined]
    positions = cattn.PositionalEncoding(32, max_len=5, layout="concatenated")
    assert_type(positions(q, training=flag, seed=1), np.ndarray)
    assert_type(cattn.sinusoidal_encoding(3, 4, positions=[0.5, 1.0, 2.0], dtype=np.float64), np.ndarray)
    assert_type(cattn.relative_shift(3, 4), np.ndarray)
    cos, sin = cattn.rotary_table(3, 4, frequencies=[1.0, 0.1])
    assert_type(cattn.rotary_embedding(q, cos, sin, interleaved=flag, out=q), np.ndarray)
    cattn.rotary_embedding(q, cos, sin)  # type: ignore[call-arg]


def of_installation() -> None:
    assert_type(cattn.isa, str)
    assert_type(cattn.available_isas(), tuple[str, ...])
    assert_type(cattn.get_num_threads(), int)
    cattn.set_num_threads(None)
    cattn.set_num_threads("2")  # type: ignore[arg-type]
    cattn.preload()
    cattn.show_config()
"""


def parameters(function):
    return inspect.signature(function).parameters


def documented(docstring):
    """The parameters that a docstring has an entry for."""
    section = inspect.cleandoc(docstring).partition("Parameters\n----------\n")[2]
    section = re.split(r"\n\n\w+\n---", section)[0]
    entries = re.findall(r"^(\w[\w, ]*?)(?: : .*)?$", section, re.MULTILINE)
    return [name for entry in entries for name in entry.split(", ")]


# Docstrings.


@pytest.mark.parametrize("module", [
    _attention, _cache, _gradients, _linear, _merge, _multihead, _positional, _rotary, _serving,
], ids=lambda module: module.__name__)
def test_docstrings_stand_in_the_source(module):
    with open(module.__file__) as file:
        tree = ast.parse(file.read())
    definitions = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for name in module.__all__:
        public = getattr(module, name)
        if public.__module__ == module.__name__:  # relative_shift is the reference's own
            assert ast.get_docstring(definitions[name]) == inspect.getdoc(public)
            assert "Raises\n------" in inspect.getdoc(public)


@pytest.mark.parametrize("function", [
    cattn.scaled_dot_product_attention, cattn.linear, cattn.merge_states, cattn.sinusoidal_encoding,
    cattn.relative_shift,
    cattn.MultiHeadAttention, cattn.MultiHeadAttention.__call__, cattn.MultiHeadAttention.state_dict,
    cattn.MultiHeadAttention.load_state_dict, cattn.PositionalEncoding, cattn.PositionalEncoding.__call__,
    cattn.rotary_table, cattn.rotary_embedding, cattn.varlen_attention, cattn.paged_attention, cattn.KVCache,
    cattn.KVCache.attend, cattn.scaled_dot_product_attention_backward, cattn.varlen_attention_backward,
], ids=lambda function: function.__qualname__)
def test_every_parameter_is_described(function):
    assert sorted(documented(function.__doc__)) == sorted(name for name in parameters(function) if name != "self")


@pytest.mark.parametrize("name", [
    "scaled_dot_product_attention", "varlen_attention", "paged_attention", "merge_states", "linear",
    "MultiHeadAttention",
    "sinusoidal_encoding", "PositionalEncoding", "rotary_table", "rotary_embedding",
    "KVCache", "scaled_dot_product_attention_backward", "varlen_attention_backward"])
def test_reference_points_to_the_public_one(name):
    text = getattr(reference, name).__doc__
    assert f"`cattn.{name}`" in text
    assert "Parameters\n" not in text
    assert len(text) < 1700


SHOWN = {
    "scaled_dot_product_attention(": "softmax(scale * query @ key^T + mask) @ value, for each head.",
    "scaled_dot_product_attention_backward(": "The gradients of `scaled_dot_product_attention`",
    "linear(": "x @ weight^T + bias, with weights of 32, 16 or 8 bits",
    "merge_states(": "Attention over all keys, from results over parts of them",
    "sinusoidal_encoding(": "P[r, 2i] = sin(pos / base^(2i / dim))",
    "rotary_table(": "cos[r, i] = cos(pos * f[i])",
    "rotary_embedding(": "x with each pair (a, b) of a row turned by an angle",
    "relative_shift(": "R with P[pos + delta] = P[pos] @ R",
    "MultiHeadAttention(": "Multi-head attention: concat_h(",
    "PositionalEncoding(": "dropout(x + P[:, positions])",
    "MultiHeadAttention.__call__(": "Project, attend, project back.",
    "PositionalEncoding.__call__(": "Add the positions offset to offset + seq - 1",
    "MultiHeadAttention.state_dict(": "A copy of the parameters",
    "set_num_threads(": "Sets the number of threads",
    "preload(": "Imports every module that a call may need",
}


@pytest.mark.parametrize(("call", "first"), SHOWN.items(), ids=SHOWN)
def test_jedi_shows_docstring_and_parameters(call, first, tmp_path, monkeypatch):
    jedi = pytest.importorskip("jedi")
    from jedi.api.environment import InterpreterEnvironment  # of this process: the others start one

    monkeypatch.setattr(jedi.settings, "cache_directory", str(tmp_path))  # else the home directory's
    function = cattn
    for part in call[:-1].split("."):
        function = getattr(function, part)
    script = jedi.Script(f"import cattn\ncattn.{call}", environment=InterpreterEnvironment(),
                         project=jedi.Project(os.path.dirname(FOLDER)))
    (signature,) = script.get_signatures(2, len(f"cattn.{call}"))
    assert [parameter.name for parameter in signature.params if parameter.name != "self"] == [
        name for name in parameters(function) if name != "self"]
    (hover,) = script.help(2, len(f"cattn.{call}") - 2)
    for shown in (signature, hover):
        text = shown.docstring(raw=True)
        assert text.startswith(first)
        assert text == inspect.getdoc(function)


@pytest.mark.parametrize("name", CALLABLES)
def test_help_has_short_signatures(name):
    """ArrayLike by its name: written out, it takes 370 characters for each argument."""
    function = getattr(cattn, name)
    text = pydoc.plain(pydoc.render_doc(function))
    signature, first, _ = text.partition(inspect.getdoc(function).partition("\n")[0])
    assert first
    assert len(signature) < 1500
    assert not re.search(r"Union\[|_NestedSequence|_SupportsArray|_SupportsDType", text)


# Types.


@pytest.mark.parametrize("name", [*CALLABLES, "MultiHeadAttention.__init__", "MultiHeadAttention.__call__",
                                  "MultiHeadAttention.state_dict", "MultiHeadAttention.load_state_dict",
                                  "PositionalEncoding.__init__", "PositionalEncoding.__call__"])
def test_annotations_are_complete_and_can_be_evaluated(name):
    function = cattn
    for part in name.split("."):
        function = getattr(function, part)
    if hasattr(function, "_fields"):  # a named tuple
        assert list(typing.get_type_hints(function)) == list(function._fields)
        return
    if isinstance(function, type):
        function = function.__init__
    assert typing.get_type_hints(function).keys() == {*parameters(function), "return"} - {"self"}


@pytest.mark.parametrize("function", [cattn.scaled_dot_product_attention, cattn.MultiHeadAttention.__call__],
                         ids=lambda function: function.__qualname__)
def test_overloads_have_the_parameters_of_the_function(function):
    """In its order, with its kinds, types and defaults: the flags apart, which they tell apart."""
    overloads = typing.get_overloads(function)
    flags = [name for name in ("return_weights", "return_logsumexp") if name in parameters(function)]
    assert len(overloads) == 2 ** len(flags) + 1
    for overload in overloads:
        assert list(parameters(overload)) == list(parameters(function))
        for name, parameter in parameters(function).items():
            if name not in flags:
                assert parameters(overload)[name] == parameter
    assert inspect.signature(overloads[-1]) == inspect.signature(function)  # flags that are not known beforehand


def test_mypy_accepts_a_user_script(tmp_path):
    """And takes exception where it has to: an ignored error that is none is one."""
    if not importlib.util.find_spec("mypy"):
        pytest.skip("needs mypy")
    assert os.path.exists(os.path.join(FOLDER, "py.typed"))
    (tmp_path / "user.py").write_text(USER_SCRIPT)
    # Not preloaded, under a sanitizer: mypy runs nothing of cattn.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MYPY", "LD_PRELOAD"))}
    if os.path.basename(os.path.dirname(FOLDER)) not in ("site-packages", "dist-packages"):  # where mypy looks itself
        environment["MYPYPATH"] = os.path.dirname(FOLDER)
    # silent: as of an installed package, errors inside of cattn are not shown. Generics: before 2.2, numpy had no
    # default for the parameters of ndarray.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--allow-any-generics", "--follow-imports=silent", "--config-file=",
         "--cache-dir=cache", "user.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("Success: no issues found"), done.stdout + done.stderr
    assert done.returncode == 0


# repr().


@pytest.mark.parametrize("module", [cattn, reference], ids=lambda module: module.__name__)
def test_repr_is_the_call_that_makes_such_a_layer(module):
    attention, positions = module.MultiHeadAttention, module.PositionalEncoding
    for layer, text in [
        (attention(64, 8), "MultiHeadAttention(embed_dim=64, num_heads=8)"),
        (attention(64, 8, num_kv_heads=8, input_dim=64, bias=True, dropout=0, dtype=float),
         "MultiHeadAttention(embed_dim=64, num_heads=8, dtype=float64)"),
        (attention(64, 8, num_kv_heads=2, input_dim=48, bias=False, dropout=0.1, dtype="float16"),
         "MultiHeadAttention(embed_dim=64, num_heads=8, num_kv_heads=2, input_dim=48, bias=False, dropout=0.1, "
         "dtype=float16)"),
        (positions(32), "PositionalEncoding(dim=32)"),
        (positions(32, 0, 1000, base=10000, dtype="f4"), "PositionalEncoding(dim=32)"),
        (positions(32, 0.5, 60, base=100.0, layout="concatenated", endpoint=True, dtype=np.float64),
         "PositionalEncoding(dim=32, dropout=0.5, max_len=60, base=100.0, layout='concatenated', endpoint=True, "
         "dtype=float64)"),
    ]:
        assert repr(layer) == text


def test_repr_says_what_the_layer_is_at_the_time():
    layer = cattn.MultiHeadAttention(16, 4)
    layer.in_proj_bias = None
    layer.dropout = 0.25
    assert repr(layer) == "MultiHeadAttention(embed_dim=16, num_heads=4, bias=False, out_bias=True, dropout=0.25)"
    layer.out_proj_bias = None
    assert repr(layer) == "MultiHeadAttention(embed_dim=16, num_heads=4, bias=False, dropout=0.25)"
    layer.in_proj_bias = np.zeros(48)
    assert repr(layer) == "MultiHeadAttention(embed_dim=16, num_heads=4, out_bias=False, dropout=0.25)"
    positions = cattn.PositionalEncoding(4, max_len=2)
    positions(np.zeros((3, 4), np.float32))
    assert repr(positions) == "PositionalEncoding(dim=4, max_len=4)"

    class Named(cattn.MultiHeadAttention):
        pass

    assert repr(Named(4, 2)) == "Named(embed_dim=4, num_heads=2)"


def test_repr_of_layers_that_are_half_made_or_changed():
    """It raises nothing: debuggers show layers in the middle of __init__, and attributes can be anything."""
    assert repr(cattn.MultiHeadAttention.__new__(cattn.MultiHeadAttention)) == "MultiHeadAttention()"
    assert repr(cattn.PositionalEncoding.__new__(cattn.PositionalEncoding)) == "PositionalEncoding()"
    layer, positions = cattn.MultiHeadAttention(4, 2), cattn.PositionalEncoding(4)
    for thing in (None, 10**5000, np.zeros(3), np.float32(np.nan), "x" * 1000, object(), [1]):
        for name in ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "kdim", "dropout", "dtype"):
            setattr(layer, name, thing)
        positions.dim = positions.P = positions.dropout = thing
        assert len(repr(layer)) < 1500
        assert len(repr(positions)) < 1500
