"""ONNX's Attention and RotaryEmbedding by cattn: the cases of the onnx package, its own evaluator on any inputs and
attributes together, what is different, errors."""

import importlib
import itertools
import re
import sys

import ml_dtypes  # noqa: F401, so that NumPy knows bfloat16
import numpy as np
import pytest
from tolerance import errors, largest

import cattn
from cattn import _kernels
from cattn.integrations import onnx as integration

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, inliner, reference  # noqa: E402
from onnx.backend.test.case import node as cases_of_nodes  # noqa: E402
from onnx.backend.test.runner import Runner  # noqa: E402

VERSION = tuple(map(int, re.match(r"(\d+)\.(\d+)", onnx.__version__).groups()))
INPUTS = "Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"
OUTPUTS = "Y", "present_key", "present_value", "qk_matmul_output"


def collected():
    """What onnx tests the two nodes by, without the graphs of other nodes that stand for them."""
    for module in ("attention", "rotaryembedding"):
        importlib.import_module(f"{cases_of_nodes.__name__}.{module}")
    return [case for case in cases_of_nodes._NodeTestCases
            if [node.op_type for node in case.model.graph.node] in (["Attention"], ["RotaryEmbedding"])]


CASES = collected()


def session(model, by_cattn=True):
    return reference.ReferenceEvaluator(model, new_ops=integration.new_ops() if by_cattn else None)


def model_of(nodes, inputs, outputs, opset=25, functions=()):
    """The nodes as a graph, whose inputs and outputs are named."""
    def values(names):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    return helper.make_model(helper.make_graph(nodes, "graph", values(inputs), values(outputs)), opset_imports=imports,
                             functions=functions)


def run(arrays, outputs=("Y",), *, op_type="Attention", by_cattn=True, opset=25, **attributes):
    """{output: array} of one node. `arrays`: its inputs by name, in the order of INPUTS."""
    order = INPUTS if op_type == "Attention" else tuple(arrays)
    inputs = [name if name in arrays else "" for name in order]
    node = helper.make_node(op_type, inputs, [name if name in outputs else "" for name in OUTPUTS], **attributes)
    evaluator = session(model_of([node], arrays, outputs, opset), by_cattn)
    return dict(zip(outputs, evaluator.run(list(outputs), arrays), strict=True))


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def counts(monkeypatch):
    """{entry of the kernels: how often it has computed something}."""
    counted = dict.fromkeys(("attend", "attend_short", "rotary"), 0)

    class Counting:
        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            entry = getattr(self.module, name)
            if name not in counted:
                return entry

            def call(*args, **kwargs):
                result = entry(*args, **kwargs)
                counted[name] += name != "attend_short" or result is not None
                return result
            return call

    f32, f64 = Counting(_kernels.f32), Counting(_kernels.f64())
    monkeypatch.setattr(_kernels, "f32", f32)
    monkeypatch.setattr(_kernels, "f64", lambda: f64)
    return counted


# The cases of the onnx package.


def test_every_case_is_there():
    """As many as there are in onnx 1.23.2, and in the oldest that is supported."""
    number = [[case.model.graph.node[0].op_type for case in CASES].count(op) for op in ("Attention", "RotaryEmbedding")]
    assert number >= ([93, 8] if VERSION >= (1, 23) else [64, 8]) and number[1] >= 8
    opsets = {case.model.opset_import[0].version for case in CASES}
    assert opsets >= ({23, 24, 25} if VERSION >= (1, 23) else {23, 24})


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_node_cases(case, counts):
    """As exact as onnx's own runner of tests asks for, by one call of a kernel."""
    evaluator = session(case.model)
    [(inputs, outputs)] = case.data_sets
    results = evaluator.run(None, dict(zip(evaluator.input_names, inputs, strict=True)))
    Runner.assert_similar_outputs(outputs, results, case.rtol, case.atol)
    is_attention = case.model.graph.node[0].op_type == "Attention"
    assert [counts["attend"] + counts["attend_short"], counts["rotary"]] == [is_attention, not is_attention]


# Beside onnx's own evaluator, on larger arrays.


def problem(seed):
    """Inputs in float64, and attributes, with any options together."""
    rng = np.random.default_rng(seed)
    batch, kv_heads, head_size, v_head_size, seq_q, seq_new, past = 2, 2, 16, 12, 19, 37, 11
    heads, cache = kv_heads * int(rng.integers(1, 3)), rng.choice(["none", "past", "nonpad"])
    arrays = {"Q": rng.standard_normal((batch, heads, seq_q, head_size)),
              "K": rng.standard_normal((batch, kv_heads, seq_new, head_size)),
              "V": rng.standard_normal((batch, kv_heads, seq_new, v_head_size))}
    attributes = {"is_causal": int(rng.integers(2)), "qk_matmul_output_mode": seed % 4}
    if rng.integers(2):
        attributes["scale"] = 0.0625  # its root is exact, as is that of 1 / sqrt(head_size)
    if rng.integers(2):
        attributes["softcap"] = 2.0
    if rng.integers(2):
        attributes |= {"left_window_size": int(rng.integers(-1, 9)), "right_window_size": int(rng.integers(-1, 9))}
    if rng.integers(2):
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
        for name in ("Q", "K", "V"):
            array = arrays[name].swapaxes(1, 2)
            arrays[name] = array.reshape(*array.shape[:2], -1)
    seq_kv, shortest = seq_new, 2
    if cache == "past":
        seq_kv = past + seq_new
        arrays["past_key"] = rng.standard_normal((batch, kv_heads, past, head_size))
        arrays["past_value"] = rng.standard_normal((batch, kv_heads, past, v_head_size))
    elif cache == "nonpad":
        arrays["nonpad_kv_seqlen"] = rng.integers(0, seq_kv + 1, batch)
        shortest = max(2, arrays["nonpad_kv_seqlen"].max())
    kind = rng.choice(["none", "bool", "float"])
    if kind != "none":
        columns = int(rng.integers(shortest, seq_kv + 1)) if rng.integers(2) else seq_kv
        shapes = (columns,), (1, columns), (seq_q, columns), (heads, seq_q, columns), (batch, 1, seq_q, columns)
        seen = rng.random(shapes[rng.integers(len(shapes))]) < 0.7
        if seen.ndim > 1 and seen.shape[-2] > 1:
            seen[..., seq_q // 2, :] = False
        arrays["attn_mask"] = seen if kind == "bool" else np.where(seen, rng.standard_normal(seen.shape), -np.inf)
    return arrays, attributes


def as_dtype(arrays, dtype):
    return {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in arrays.items()}


def by_onnx(arrays, attributes):
    """All outputs, by its own evaluator, around two of its errors (1.23.2), which ONNX's function body does not have:
    with is_causal and a mask of one row, all queries see what the first sees; and mode 0 is mode 1."""
    if "attn_mask" in arrays:
        mask, seq_q = arrays["attn_mask"], arrays["Q"].shape[-2]
        arrays = arrays | {"attn_mask": np.broadcast_to(mask, (*mask.shape[:-2], seq_q, mask.shape[-1]))}
    results = run(arrays, OUTPUTS, by_cattn=False, **attributes)
    if attributes["qk_matmul_output_mode"] == 0:
        results |= run(arrays, ("qk_matmul_output",), by_cattn=False, **attributes | {"softcap": 0.0})
    return results


newest = pytest.mark.skipif(VERSION < (1, 23), reason="its own Attention has NaN in rows that see nothing, no windows")


@newest
@np.errstate(all="ignore")
@pytest.mark.parametrize("seed", range(80))
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_beside_onnx(dtype, seed):
    """err(cattn) <= 2 * err(plain) + 4 * eps * scale, as in tolerance.py: plain and exact are onnx's own evaluator, in
    the dtype computed in and in the next wider one."""
    arrays, attributes = problem(seed)
    arrays = as_dtype(arrays, dtype)
    compute = np.result_type(dtype, np.float32)
    wide = np.float64 if compute == np.float32 else np.longdouble
    results = run(arrays, OUTPUTS, **attributes)
    plain, exact = (by_onnx(as_dtype(arrays, dtype), attributes) for dtype in (compute, wide))
    for name in ("present_key", "present_value"):
        np.testing.assert_array_equal(results[name], exact[name].astype(dtype), strict=True)
    for name, of_scale in (("Y", "present_value"), ("qk_matmul_output", "qk_matmul_output")):
        assert (results[name].dtype, results[name].shape) == (dtype, exact[name].shape)
        bound = 2 * errors(plain[name], exact[name]).max() + 4 * np.finfo(compute).eps * largest(exact[of_scale])
        assert np.isfinite(bound)
        assert errors(results[name], exact[name], np.dtype(dtype)).max() <= bound, name


def test_problems_cover_the_inputs():
    """Of test_beside_onnx: each pair of options comes together."""
    features = []
    for seed in range(80):
        arrays, attributes = problem(seed)
        mask = arrays.get("attn_mask")
        keys = arrays["K"].shape[-2] if arrays["K"].ndim == 4 else arrays["K"].shape[1]
        keys += arrays["past_key"].shape[2] if "past_key" in arrays else 0
        features.append({
            "three axes": arrays["Q"].ndim == 3, "past": "past_key" in arrays, "nonpad": "nonpad_kv_seqlen" in arrays,
            "bool": mask is not None and mask.dtype == bool, "float": mask is not None and mask.dtype != bool,
            "short": mask is not None and mask.shape[-1] < keys, "causal": attributes["is_causal"],
            "softcap": "softcap" in attributes, "scale": "scale" in attributes,
            "window": max(attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)) >= 0})
    exclusive = {("past", "nonpad"), ("bool", "float")}
    for pair in itertools.combinations(features[0], 2):
        assert (pair in exclusive) or any(feature[pair[0]] and feature[pair[1]] for feature in features), pair


@pytest.mark.parametrize("three_axes", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotary_embedding_dim", [0, 8])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rotary_embedding_beside_onnx(dtype, with_ids, rotary_embedding_dim, interleaved, three_axes):
    """Two products and their sum, each rounded once in float32: each number is off by at most half an eps of two
    numbers and of their sum, at most twice the largest. Then rounded to the dtype."""
    dtype, batch, heads, seq, head_size = np.dtype(dtype), 2, 3, 9, 16
    columns = (rotary_embedding_dim or head_size) // 2
    angles = np.random.default_rng(1).uniform(0, 7, (20, columns) if with_ids else (batch, seq, columns))
    X = normal(batch, heads, seq, head_size, dtype=dtype)
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": rotary_embedding_dim}
    if three_axes:
        X, attributes["num_heads"] = X.swapaxes(1, 2).reshape(batch, seq, -1), heads
    arrays = {"X": X, "cos_cache": np.cos(angles).astype(dtype), "sin_cache": np.sin(angles).astype(dtype)}
    ids = {"position_ids": np.random.default_rng(2).integers(0, 20, (batch, seq))} if with_ids else {}
    [result] = run(arrays | ids, op_type="RotaryEmbedding", opset=23, **attributes).values()
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    [exact] = run(wide | ids, op_type="RotaryEmbedding", opset=23, by_cattn=False, **attributes).values()
    assert (result.dtype, result.shape) == (dtype, X.shape)
    bound = np.finfo(np.float32).eps / 2 * (2 + 2) * largest(wide["X"])
    assert errors(result, exact, dtype).max() <= bound


# What the cases leave open.


def qkv(batch=1, heads=2, seq_q=3, seq_kv=5, head_size=4):
    q, k, v = (normal(batch, heads, seq, head_size, seed=seed) for seed, seq in enumerate((seq_q, seq_kv, seq_kv)))
    return {"Q": q, "K": k, "V": v}


def test_an_output_that_is_not_asked_for_is_no_input_of_the_next_node():
    """Both are named "". onnx's own Attention gives the second node the first one's present_value for a mask."""
    nodes = [helper.make_node("Attention", ["Q", "K", "V"], ["first", "", "", "scores"]),
             helper.make_node("Attention", ["first", "K", "V", "", "past_key", "past_value"], ["Y"])]
    arrays = qkv() | {"past_key": normal(1, 2, 2, 4), "past_value": normal(1, 2, 2, 4)}
    Y, first, scores = session(model_of(nodes, arrays, ["Y", "first", "scores"])).run(None, arrays)
    right = run(arrays | {"Q": first})["Y"]
    np.testing.assert_array_equal(Y, right)
    assert scores.shape == (1, 2, 3, 5)


def test_a_mask_for_one_key():
    """One column: until opset 23 for all keys, as it broadcasts; since, for the first alone."""
    arrays = qkv() | {"attn_mask": np.ones((3, 1), bool)}
    old, new = (run(arrays, opset=opset)["Y"] for opset in (23, 24))
    np.testing.assert_array_equal(old, run(qkv())["Y"])
    np.testing.assert_array_equal(new, np.broadcast_to(arrays["V"][:, :, :1], new.shape))
    everyone = run(arrays | {"attn_mask": np.array(True)}, opset=24)["Y"]  # no axes, so none that is short
    np.testing.assert_array_equal(everyone, old)


@pytest.mark.parametrize("kind", ["int32", "uint8"])
def test_integer_masks_are_added(kind):
    arrays, mask = qkv(), np.random.default_rng(3).integers(0, 5, (3, 5)).astype(kind)
    results = [run(arrays | {"attn_mask": mask.astype(dtype)})["Y"] for dtype in (kind, np.float32)]
    np.testing.assert_array_equal(*results)


def test_softcap_by_its_magnitude():
    """c * tanh(x / c) does not depend on the sign of c."""
    results = [run(qkv(), softcap=softcap)["Y"] for softcap in (0.5, -0.5, 0.0)]
    np.testing.assert_array_equal(*results[:2])
    assert not np.allclose(results[1], results[2])


def test_softmax_precision_is_a_least_one(counts):
    """Lower ones change no bit; DOUBLE is computed in float64, and rounded once."""
    arrays = qkv(seq_q=20, seq_kv=40)
    default = run(arrays)["Y"]
    for precision in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        np.testing.assert_array_equal(run(arrays, softmax_precision=precision)["Y"], default)
    double = run(arrays, OUTPUTS, softmax_precision=TensorProto.DOUBLE, qk_matmul_output_mode=3)
    exact = run(as_dtype(arrays, np.float64), OUTPUTS, qk_matmul_output_mode=3)
    for name in OUTPUTS:
        np.testing.assert_array_equal(double[name], exact[name].astype(np.float32), strict=True)
    assert (double["Y"] != default).any()


def test_values_of_another_dtype():
    """T2 is a type of its own: computed in the wider one; the result has Q's, present_value its own."""
    arrays = qkv(seq_q=20)
    arrays |= as_dtype({"Q": arrays["Q"], "K": arrays["K"]}, np.float16) | as_dtype({"V": arrays["V"]}, np.float64)
    results, right = run(arrays, OUTPUTS), run(as_dtype(arrays, np.float64))
    assert [results[name].dtype for name in OUTPUTS] == ["float16", "float16", "float64", "float16"]
    np.testing.assert_array_equal(results["Y"], right["Y"].astype(np.float16))
    narrow = run(as_dtype(arrays, np.float16))["Y"]
    assert (narrow != results["Y"]).any()


def test_garbage_in_hidden_keys():
    """Behind nonpad_kv_seqlen, and a bool mask."""
    arrays = qkv(batch=2) | {"nonpad_kv_seqlen": np.array([5, 3]), "attn_mask": np.arange(5) != 1}
    right = run(arrays, is_causal=1)["Y"]
    for name in ("K", "V"):
        arrays[name][:, :, 1] = np.nan
        arrays[name][1, :, 3:] = np.nan
    np.testing.assert_array_equal(run(arrays, is_causal=1)["Y"], right)
    assert np.isfinite(right).all() and right.any()


def test_largest_biases_are_in_the_output():
    """The kernel clips them; the output of scores with bias does not."""
    lowest = np.finfo(np.float32).min
    arrays = qkv() | {"attn_mask": np.full((3, 5), lowest)}
    results = run(arrays, ("Y", "qk_matmul_output"), qk_matmul_output_mode=2)
    np.testing.assert_array_equal(results["qk_matmul_output"], np.full((1, 2, 3, 5), lowest))
    np.testing.assert_allclose(results["Y"], np.broadcast_to(arrays["V"].mean(axis=2, keepdims=True), (1, 2, 3, 4)),
                               rtol=0, atol=5 * np.finfo(np.float32).eps * largest(arrays["V"]))


def test_scores_that_overflow_alone():
    """The root of scale on both sides, as ONNX has it: products of Q and K would overflow."""
    arrays = qkv()
    arrays |= {"Q": np.full_like(arrays["Q"], 2.0**66), "K": np.full_like(arrays["K"], 2.0**66)}
    scores = run(arrays, ("Y", "qk_matmul_output"), scale=2.0**-40)["qk_matmul_output"]
    np.testing.assert_array_equal(scores, np.full((1, 2, 3, 5), 2.0**94, np.float32))


def test_no_number_of_heads():
    """0, as None, where four axes say it."""
    np.testing.assert_array_equal(run(qkv(), q_num_heads=0, kv_num_heads=0)["Y"], run(qkv())["Y"])


@pytest.mark.parametrize(("seq_q", "seq_kv"), [(0, 5), (3, 0)])
def test_no_queries_or_no_keys(seq_q, seq_kv):
    results = run(qkv(seq_q=seq_q, seq_kv=seq_kv), OUTPUTS, qk_matmul_output_mode=3, is_causal=1)
    assert results["qk_matmul_output"].shape == (1, 2, seq_q, seq_kv)
    np.testing.assert_array_equal(results["Y"], np.zeros((1, 2, seq_q, 4), np.float32))


def test_branches_and_linked_attributes(counts):
    """new_ops reaches nodes in branches; functions of a model when they are inlined."""
    inside = helper.make_node("Attention", ["Q", "K", "V"], ["inside"], is_causal=1)
    value = helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)
    branch = helper.make_graph([inside], "branch", [], [value])
    arrays = qkv()
    nodes = [helper.make_node("If", ["condition"], ["Y"], then_branch=branch, else_branch=branch)]
    [Y] = session(model_of(nodes, [*arrays, "condition"], ["Y"])).run(None, arrays | {"condition": np.array(True)})
    right = run(arrays, is_causal=1)["Y"]
    np.testing.assert_array_equal(Y, right)

    node = helper.make_node("Attention", ["Q", "K", "V"], ["Y"])
    causal = onnx.AttributeProto(name="is_causal", ref_attr_name="causal", type=onnx.AttributeProto.INT)
    node.attribute.append(causal)
    function = helper.make_function("custom", "attend", ["Q", "K", "V"], ["Y"], [node], [helper.make_opsetid("", 25)],
                                    ["causal"])
    evaluator = session(function)
    [Y] = evaluator.run(None, arrays, attributes={"causal": 1})
    np.testing.assert_array_equal(Y, right)
    call = helper.make_node("attend", ["Q", "K", "V"], ["Y"], domain="custom", causal=1)
    model = model_of([call], arrays, ["Y"], functions=[function])
    before = dict(counts)
    session(model).run(None, arrays)
    assert counts == before  # onnx's own: as the docstring says
    np.testing.assert_array_equal(session(inliner.inline_local_functions(model)).run(None, arrays)[0], right)


def test_no_copies_of_three_axes(monkeypatch):
    """Heads are views, of the result too."""
    seen = {}
    attention = cattn.scaled_dot_product_attention

    def spy(query, key, value, *args, out, **kwargs):
        seen.update(Q=query, K=key, V=value, Y=out)
        return attention(query, key, value, *args, out=out, **kwargs)

    monkeypatch.setattr(cattn, "scaled_dot_product_attention", spy)
    arrays = {name: array.swapaxes(1, 2).reshape(1, array.shape[2], -1) for name, array in qkv().items()}
    Y = run(arrays, q_num_heads=2, kv_num_heads=2)["Y"]
    for name, array in (arrays | {"Y": Y}).items():
        assert np.shares_memory(seen[name], array), name


# Errors.


@pytest.mark.parametrize(("change", "attributes", "message"), [
    ({}, {"qk_matmul_output_mode": 4}, "qk_matmul_output_mode: expected 0, 1, 2 or 3, got 4"),
    ({}, {"softmax_precision": 7},
     "softmax_precision: expected one of 1 (FLOAT), 10 (FLOAT16), 11 (DOUBLE), 16 (BFLOAT16), got 7"),
    ({}, {"scale": -0.5}, "scale: expected a number >= 0, whose square root Q and K are multiplied by, got -0.5"),
    ({}, {"q_num_heads": 3}, "Q: expected q_num_heads = 3 heads, got shape (1, 2, 3, 4)"),
    ({"Q": np.ones((3, 4))}, {},
     "Q: expected (batch, heads, seq, head_dim) or (batch, seq, heads * head_dim), got shape (3, 4)"),
    ({"K": np.ones((1, 5, 8))}, {}, "kv_num_heads: expected a number of heads, as K has 3 axes, got None"),
    ({"K": np.ones((1, 5, 8))}, {"kv_num_heads": 0},
     "kv_num_heads: expected a number of heads, as K has 3 axes, got 0"),
    ({"V": np.ones((1, 5, 9))}, {"kv_num_heads": 2},
     "V: expected a multiple of kv_num_heads = 2 as last axis, got shape (1, 5, 9)"),
    ({"Q": np.ones((2, 2, 3, 4))}, {}, "K: expected a batch of 2, as Q has, got shape (1, 2, 5, 4)"),
    ({"past_key": np.ones((1, 2, 3, 4))}, {}, "past_key, past_value: expected both or neither, got one"),
    ({"past_key": np.ones((1, 2, 3, 5)), "past_value": np.ones((1, 2, 3, 4))}, {},
     "past_key: expected (1, 2, past_sequence_length, 4), got shape (1, 2, 3, 5)"),
    ({"past_key": np.ones((1, 2, 3, 4)), "past_value": np.ones((1, 2, 2, 4))}, {},
     "past_value: expected the 3 keys of past_key, got shape (1, 2, 2, 4)"),
    ({"past_key": np.ones((1, 2, 3, 4)), "past_value": np.ones((1, 2, 3, 4)), "nonpad_kv_seqlen": np.array([3])}, {},
     "nonpad_kv_seqlen: expected none beside past_key and past_value, got both"),
    ({"nonpad_kv_seqlen": np.array([6])}, {}, "nonpad_kv_seqlen: expected lengths from 0 to seq_len_kv = 5, got [6]"),
    ({"attn_mask": np.ones((3, 6), bool)}, {},
     "attn_mask: expected a shape that broadcasts to (1, 2, 3, 5), got shape"),
    ({}, {"left_window_size": -2}, "left_window_size: expected an int >= -1, got -2"),
    ({}, {"right_window_size": -3}, "right_window_size: expected an int >= -1, got -3"),
])
def test_errors(change, attributes, message):
    arrays = qkv() | as_dtype(change, np.float32)
    with pytest.raises(ValueError) as raised:
        run(arrays, **attributes)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(("change", "attributes", "message"), [
    ({}, {"num_heads": 3}, "X: expected num_heads = 3 heads, got shape (1, 2, 3, 8)"),
    ({"X": np.ones((1, 3, 8))}, {}, "num_heads: expected a number of heads, as X has 3 axes, got None"),
    ({}, {"rotary_embedding_dim": 6},
     "rotary_embedding_dim: expected 8 columns to turn, 2 for each of cos_cache's, and at most the 8 of a head, got 6"),
    ({"X": np.ones((1, 2, 3, 4))}, {},
     "X: expected 8 columns to turn, 2 for each of cos_cache's, and at most the 4 of a head, got 4"),
    ({"X": np.ones((1, 2, 3, 4))}, {"rotary_embedding_dim": 8},
     "rotary_embedding_dim: expected 8 columns to turn, 2 for each of cos_cache's, and at most the 4 of a head, got 8"),
    ({"cos_cache": np.ones((3, 4))}, {},
     "cos_cache: expected (batch, seq, columns), as there are no position_ids, got shape (3, 4)"),
    ({"position_ids": np.zeros(3, int)}, {}, "position_ids: expected (batch, seq), got shape (3,)"),
    ({"position_ids": np.full((1, 3), 9), "cos_cache": np.ones((9, 4)), "sin_cache": np.ones((9, 4))}, {},
     "positions: "),
])
def test_errors_of_rotary_embedding(change, attributes, message):
    arrays = {"X": np.ones((1, 2, 3, 8)), "cos_cache": np.ones((1, 3, 4)), "sin_cache": np.ones((1, 3, 4))} | change
    with pytest.raises(ValueError) as raised:
        run(as_dtype(arrays, np.float32), op_type="RotaryEmbedding", opset=23, **attributes)
    assert str(raised.value).startswith(message)


@pytest.fixture
def not_imported():
    integration._classes.cache_clear()
    yield
    integration._classes.cache_clear()


def test_without_onnx(not_imported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError) as raised:
        integration.new_ops()
    assert str(raised.value).startswith("cattn.integrations.onnx: needs onnx 1.22 or newer (")
    assert str(raised.value).endswith('): `pip install "cattn[onnx]"`')
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(("version", "is_enough"), [
    ("1.9.0", False), ("1.21.0rc1", False), ("1.22.0", True), ("2.0", True)])
def test_versions_of_onnx(not_imported, monkeypatch, version, is_enough):
    monkeypatch.setattr(onnx, "__version__", version)
    if is_enough:
        assert [op.__name__ for op in integration.new_ops()] == ["Attention", "RotaryEmbedding"]
        return
    with pytest.raises(ImportError) as raised:
        integration.new_ops()
    assert str(raised.value) == (f"cattn.integrations.onnx: needs onnx 1.22 or newer (this is {version}): "
                                 '`pip install "cattn[onnx]"`')


def test_the_caller_may_change_the_list():
    integration.new_ops().clear()
    assert len(integration.new_ops()) == 2
