"""PyTorch by cattn: bit for bit what the doors compute, in PyTorch's layouts; what is taken and what is left; modules,
graphs, checkpoints, processes; and tensors with every option."""

import contextlib
import functools
import inspect
import itertools
import shutil
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from problems import BFLOAT16, DTYPES, assert_same_bits, random_problem
from processes import python
from tolerance import assert_gradients_close, errors, largest

import cattn
from cattn import _kernels
from cattn.integrations import torch as integration
from cattn.reference import Gradients

torch = pytest.importorskip("torch")
F = torch.nn.functional
INF = float("inf")
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64, np.dtype(np.float16): torch.float16,
         BFLOAT16: torch.bfloat16, np.dtype(bool): torch.bool}
OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
OPERATOR_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

of_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).partition(".")[2])


@pytest.fixture(autouse=True)
def as_before():
    """No test leaves cattn under PyTorch, or a number of threads."""
    threads = torch.get_num_threads()
    yield
    integration.disable()
    torch.set_num_threads(threads)


@pytest.fixture
def all_sizes(monkeypatch):
    """cattn takes what is small as well."""
    integration._need_torch()
    none = {"work": (0, 0), "work_of_one_query": (0, 0), "work_backward": 0, "queries_backward": 0}
    monkeypatch.setattr(integration, "_DTYPES", {
        dtype: limits._replace(**none) for dtype, limits in integration._DTYPES.items()})


@contextlib.contextmanager
def taken(forward=0, backward=0):
    """Checks how many calls cattn takes in the block."""
    before = {name: counts.get("cattn", 0) for name, counts in integration.stats().items()}
    yield
    after = {name: counts.get("cattn", 0) for name, counts in integration.stats().items()}
    assert {name: after[name] - before[name] for name in after} == {"forward": forward, "backward": backward}


def array(tensor):
    """The same memory, of bfloat16 as ml_dtypes has it."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.view(torch.uint16).numpy().view(BFLOAT16) if tensor.dtype is torch.bfloat16 else tensor.numpy())


def tensor(array):
    """A tensor of its own."""
    bits = np.array(array).view(np.uint16) if array.dtype == BFLOAT16 else np.array(array)
    return torch.from_numpy(bits).view(NAMES[array.dtype]) if array.dtype == BFLOAT16 else torch.from_numpy(bits)


def heads_last(x):
    """The same numbers as (batch, seq, heads, dim) in memory, as projections leave them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def problem(dtype=torch.float32, *, batch=2, heads=4, kv_heads=None, rows=9, keys=13, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, rows, head_dim), *[(batch, kv_heads or heads, keys, head_dim)] * 2
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def masked(*shape, dtype=torch.float32, seed=7):
    """Biases, a third of them -inf."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(shape, generator=generator) > 1 / 3
    return torch.where(seen, torch.randn(shape, generator=generator), -INF).to(dtype)


# name: (what becomes of query, key and value; the options)
CASES = {
    "plain": (None, {}),
    "causal": (None, {"is_causal": True}),
    "scale": (None, {"scale": -0.7}),
    "bool mask": (None, {"attn_mask": masked(9, 13) == 0}),
    "mask of queries and keys": (None, {"attn_mask": masked(9, 13)}),
    "mask of keys": (None, {"attn_mask": masked(2, 1, 1, 13)}),
    "mask of all": (None, {"attn_mask": masked(2, 4, 9, 13)}),
    "mask of strides": (None, {"attn_mask": masked(2, 1, 13, 9).transpose(2, 3)}),
    "one query": ({"rows": 1}, {"attn_mask": masked(2, 1, 1, 13)}),
    "grouped heads": ({"kv_heads": 2}, {"enable_gqa": True, "is_causal": True}),
    "one key head": ({"kv_heads": 1, "rows": 13}, {"enable_gqa": True, "attn_mask": masked(13, 13)}),
    "heads last": (heads_last, {"is_causal": True}),
    "slices": (lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]], {}),
    "batch of copies": (lambda x: x[:1].expand(x.shape), {}),
    "sequence first": (lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), {"attn_mask": masked(9, 13)}),
}
of_cases = pytest.mark.parametrize("case", CASES)


def inputs_of(case, dtype):
    change, options = CASES[case]
    options = dict(options)
    if options.get("attn_mask") is not None and options["attn_mask"].dtype is not torch.bool:
        options["attn_mask"] = options["attn_mask"].to(dtype)
    if isinstance(change, dict):
        return problem(dtype, **change), options
    inputs = problem(dtype)
    return [change(x) for x in inputs] if change else inputs, options


def door(inputs, options):
    """(out, logsumexp)."""
    options = {name: array(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return cattn.scaled_dot_product_attention(*map(array, inputs), **options, q_offset=0, return_logsumexp=True)


def door_backward(grad_out, inputs, results, options, **others):
    options = {name: array(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return cattn.scaled_dot_product_attention_backward(
        array(grad_out), *map(array, inputs), *results, **options, q_offset=0, **others)


# Under scaled_dot_product_attention.


@of_dtypes
@of_cases
def test_forward_has_the_bits_of_the_door(all_sizes, case, dtype):
    inputs, options = inputs_of(case, dtype)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    with integration.enabled(), taken(forward=1):
        ours = F.scaled_dot_product_attention(*inputs, **options)
    assert_same_bits(array(ours), door(inputs, options)[0])
    assert ours.stride() == theirs.stride()


@of_dtypes
@of_cases
def test_forward_is_as_exact_as_pytorchs(all_sizes, case, dtype):
    """By twice the error of its own kernel, as tests/tolerance.py has it of the plain formula."""
    inputs, options = inputs_of(case, dtype)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    with integration.enabled(), taken(forward=1):
        ours = F.scaled_dot_product_attention(*inputs, **options)
    wide = [x.double() for x in inputs]
    exact = cattn.reference.scaled_dot_product_attention(
        *map(array, wide), **{name: array(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()},
        q_offset=0)
    compute = np.float64 if dtype is torch.float64 else np.float32
    rounding = np.finfo(compute).eps * largest(array(wide[2]))
    bound = 2 * errors(array(theirs), exact).max() + 4 * rounding
    assert errors(array(ours), exact, array(ours).dtype).max() <= bound


@of_dtypes
@of_cases
def test_backward_has_the_bits_of_the_door(all_sizes, case, dtype):
    inputs, options = inputs_of(case, dtype)
    inputs = [x.detach().requires_grad_() for x in inputs]
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    grad_out = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    their_gradients = torch.autograd.grad(theirs, inputs, grad_out)
    with integration.enabled(), taken(forward=1, backward=1):
        ours = F.scaled_dot_product_attention(*inputs, **options)
        gradients = torch.autograd.grad(ours, inputs, grad_out)
    expected = door_backward(grad_out, inputs, door(inputs, options), options)
    for name, ours, theirs in zip(("query", "key", "value"), gradients, their_gradients, strict=True):
        assert_same_bits(array(ours), getattr(expected, name))
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mask_of_another_dtype(all_sizes, dtype):
    inputs = [x.requires_grad_() for x in problem(dtype)]
    options = {"attn_mask": masked(9, 13)}
    with integration.enabled(), taken(forward=1, backward=1):
        out = F.scaled_dot_product_attention(*inputs, **options)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    results = door(inputs, options)
    assert_same_bits(array(out), results[0])
    for gradient, right in zip(gradients, door_backward(torch.ones_like(out), inputs, results, options), strict=False):
        assert_same_bits(array(gradient), right)


@of_cases
def test_gradients_by_differences(all_sizes, case):
    inputs, options = inputs_of(case, torch.float64)
    inputs = [x.clone().requires_grad_() for x in inputs]
    with integration.enabled():
        assert torch.autograd.gradcheck(functools.partial(F.scaled_dot_product_attention, **options), inputs)
    assert integration.stats()["backward"]["cattn"] > 0


@of_dtypes
def test_operator_has_pytorchs_layout(all_sizes, dtype):
    """Which graphs of torch.compile rely on; and its logsumexp."""
    inputs, options = problem(dtype), {"is_causal": True}
    theirs = OPERATOR(*inputs, **options)
    with integration.enabled():
        ours = OPERATOR(*inputs, **options)
    for one, other, expected in zip(ours, theirs, door(inputs, options), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert_same_bits(array(one), expected)


@pytest.mark.parametrize(("forward", "backward"), [
    (False, False), (False, True), (True, False), (True, True)])
def test_rows_that_see_nothing(all_sizes, forward, backward):
    """0, and gradients of 0, whichever kernel computes which half."""
    inputs = [x.requires_grad_() for x in problem(torch.float64)]
    mask = masked(2, 1, 9, 13).double()
    mask[1, :, 4] = -INF
    context = {False: contextlib.nullcontext, True: integration.enabled}
    with context[forward](), taken(forward=forward):
        out = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with context[backward](), taken(backward=backward):
        gradients = torch.autograd.grad(out, inputs, grad_out)
    assert not out[1, :, 4].any()
    assert not gradients[0][1, :, 4].any()
    assert_gradients_close(Gradients(*map(array, gradients), None, None, None), array(grad_out), *map(array, inputs),
                           *door(inputs, {"attn_mask": mask}), attn_mask=array(mask))


@pytest.mark.parametrize("wanted", [names for count in (1, 2) for names in itertools.combinations(range(3), count)])
def test_some_require_grad(all_sizes, wanted):
    inputs = problem()
    of_all = [x.clone().requires_grad_() for x in inputs]
    of_some = [x.clone().requires_grad_(number in wanted) for number, x in enumerate(inputs)]
    with integration.enabled(), taken(forward=2, backward=2):
        for given in of_all, of_some:
            F.scaled_dot_product_attention(*given).sum().backward()
    for number in range(3):
        if number in wanted:
            assert torch.equal(of_some[number].grad, of_all[number].grad)
        else:
            assert of_some[number].grad is None


def recorded(monkeypatch):
    """The keyword arguments of each call of the float32 kernels' two entries."""
    calls = []

    def entry(name):
        def call(**arguments):
            calls.append(arguments)
            return getattr(module, name)(**arguments)
        return call

    module = _kernels.f32
    monkeypatch.setattr(_kernels, "f32", types.SimpleNamespace(
        **{name: entry(name) for name in ("attend", "attend_backward")}, attend_short=lambda *_: None))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_is_copied(all_sizes, monkeypatch, dtype):
    """The kernels have the tensors' memory, and write into that of the results."""
    calls = recorded(monkeypatch)
    query, key, value = inputs = [heads_last(x).requires_grad_() for x in problem(dtype)]
    mask = masked(9, 13, dtype=dtype)
    with integration.enabled():
        out = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
        grad_out = torch.ones_like(out)
        gradients = torch.autograd.grad(out, inputs, grad_out)
    memory = {"query": query, "key": key, "value": value, "mask": mask, "out": out}
    forward, backward = calls
    assert {name: forward[name].ctypes.data for name in memory} == {name: x.data_ptr() for name, x in memory.items()}
    memory |= {"grad_out": grad_out, "grad_key": gradients[1], "grad_value": gradients[2]}
    if dtype is torch.float32:  # else it is rounded
        memory["grad_query"] = gradients[0]
    assert {name: backward[name].ctypes.data for name in memory} == {name: x.data_ptr() for name, x in memory.items()}


def test_threads_are_pytorchs(all_sizes, monkeypatch):
    calls = recorded(monkeypatch)
    inputs = [x.requires_grad_() for x in problem()]
    with integration.enabled():
        for threads in (1, 3):
            torch.set_num_threads(threads)
            F.scaled_dot_product_attention(*inputs).sum().backward()
            assert [arguments["num_threads"] for arguments in calls[-2:]] == [threads] * 2
            integration.attention(*inputs).sum().backward()
            assert [arguments["num_threads"] for arguments in calls[-2:]] == [threads] * 2
            integration.attention(*inputs, num_threads=2).sum().backward()
            assert [arguments["num_threads"] for arguments in calls[-2:]] == [2, 2]


# What is taken, and what is not.


def counted(which, call):
    """What `stats` counts of a call."""
    before = integration.stats()[which]
    call()
    return {name: count - before.get(name, 0) for name, count in integration.stats()[which].items()
            if count != before.get(name, 0)}


@pytest.mark.parametrize(("sizes", "options", "reason"), [
    ({"rows": 4, "keys": 4}, {}, "faster there"),
    ({"rows": 32, "keys": 32, "head_dim": 8}, {}, "cattn"),
    ({"rows": 32, "keys": 32, "head_dim": 8}, {"attn_mask": masked(32, 32)}, "faster there"),
    ({"rows": 64, "keys": 64, "head_dim": 8}, {"attn_mask": masked(64, 64)}, "cattn"),
    ({"rows": 1, "keys": 512, "head_dim": 64}, {}, "faster there"),
    ({"rows": 1, "keys": 1024, "head_dim": 64}, {}, "cattn"),
    ({"rows": 1, "keys": 1024, "head_dim": 64}, {"attn_mask": masked(1, 1024)}, "faster there"),
    ({"rows": 1, "keys": 8192, "head_dim": 64}, {"attn_mask": masked(1, 8192)}, "cattn"),
    ({"rows": 1, "keys": 16, "head_dim": 64, "dtype": torch.bfloat16}, {}, "cattn"),
    ({"rows": 64, "keys": 64, "head_dim": 64}, {"scale": 1e31}, "unusual"),
])
def test_what_is_taken(sizes, options, reason):
    """What is not has the bits of PyTorch's own kernel."""
    inputs = problem(**sizes)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    with integration.enabled():
        results = []
        counts = counted("forward", lambda: results.append(F.scaled_dot_product_attention(*inputs, **options)))
    assert counts == {reason: 1}
    if reason != "cattn":
        assert_same_bits(array(results[0]), array(theirs))


@pytest.mark.parametrize(("sizes", "reason"), [
    ({"rows": 4, "keys": 4}, "faster there"),
    ({"rows": 11, "keys": 1024, "head_dim": 64}, "faster there"),
    ({"rows": 12, "keys": 1024, "head_dim": 64}, "cattn"),
    ({"rows": 1, "keys": 128, "dtype": torch.float16}, "cattn"),
])
def test_what_is_taken_backward(sizes, reason):
    inputs = [x.requires_grad_() for x in problem(**sizes)]
    out = F.scaled_dot_product_attention(*inputs)
    grad_out = torch.ones_like(out)
    theirs = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
    with integration.enabled():
        results = []
        counts = counted("backward", lambda: results.extend(torch.autograd.grad(out, inputs, grad_out)))
    assert counts == {reason: 1}
    if reason != "cattn":
        for one, other in zip(results, theirs, strict=True):
            assert_same_bits(array(one), array(other))


def test_matrix_unit(monkeypatch):
    """The limit of CPUs with one."""
    integration._need_torch()
    limits = {dtype: limits._replace(queries_of_tiles=16) for dtype, limits in integration._DTYPES.items()}
    monkeypatch.setattr(integration, "_DTYPES", limits)
    with integration.enabled():
        for rows, reason in ((15, "cattn"), (16, "matrix unit")):
            inputs = problem(torch.bfloat16, rows=rows, keys=64, head_dim=64)
            assert counted("forward", lambda: F.scaled_dot_product_attention(*inputs)) == {reason: 1}  # noqa: B023


class Subclass(torch.Tensor):
    """May mean anything by its methods."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.numpy:
            raise AssertionError
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_are_left_alone(all_sizes):
    inputs = [x.as_subclass(Subclass) for x in problem()]
    theirs = F.scaled_dot_product_attention(*inputs)
    with integration.enabled():
        results = []
        counts = counted("forward", lambda: results.append(F.scaled_dot_product_attention(*inputs)))
    assert counts == {"unusual": 1}
    assert torch.equal(results[0], theirs)


@pytest.mark.parametrize("change", [
    lambda query, key, value: (query, key[:1], value[:1]),
    lambda query, key, value: (query, key[:, :3], value[:, :3]),
], ids=["batch", "heads"])
def test_shapes_that_do_not_fit_are_left_alone(all_sizes, monkeypatch, change):
    """As only direct calls of the operator have them: PyTorch's kernel may read what is not there, so not run here."""
    seen = []
    with integration.enabled():
        own = types.SimpleNamespace(call_boxed=lambda keys, *args, **options: seen.append(len(args)) or args[0].clone())
        monkeypatch.setattr(integration, "_own", integration._Both(own, own))
        inputs = change(*problem())
        assert integration._forward.__wrapped__(None, *inputs) is not None
        out = torch.empty_like(inputs[0])
        assert integration._backward.__wrapped__(None, out, *inputs, out, out[..., 0], 0.0, False) is not None
        short = out[:, :, :4]
        integration._backward.__wrapped__(None, short, *problem(), out, out[..., 0], 0.0, False)
        integration._backward.__wrapped__(None, out, *problem(), out, out[:, :, :4, 0], 0.0, False)
    assert seen == [5, 8, 8, 8]


@pytest.mark.parametrize(("inputs", "options"), [
    (problem(), {"dropout_p": 0.1}),
    ([*problem()[:2], problem(head_dim=5)[2]], {}),
    ([x[0] for x in problem()], {}),
    ([x[0, 0] for x in problem()], {}),
    ([x.mT.contiguous().mT for x in problem()], {}),
    (problem(keys=13), {"attn_mask": masked(9, 13).requires_grad_()}),
], ids=["dropout", "head_dim_v", "3 axes", "2 axes", "columns", "mask with gradient"])
def test_what_the_dispatcher_keeps(all_sizes, inputs, options):
    """The result is PyTorch's, and nothing is counted."""
    torch.manual_seed(0)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    before = integration.stats()
    with integration.enabled():
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(*inputs, **options), theirs)
    assert integration.stats() == before


def test_the_callers_of_stats_may_change_it():
    integration.stats()["forward"]["cattn"] = -1
    assert integration.stats()["forward"].get("cattn", 0) >= 0


# As it is switched on and off.


def bits_of_two_kernels():
    """A problem on which the two kernels differ by some bits, and the result of PyTorch's."""
    inputs = problem(rows=64, keys=64, head_dim=64)
    return inputs, F.scaled_dot_product_attention(*inputs)


def is_on(case):
    inputs, theirs = case
    before = integration.stats()["forward"].get("cattn", 0)
    same = torch.equal(F.scaled_dot_product_attention(*inputs), theirs)
    on = integration.stats()["forward"].get("cattn", 0) > before
    assert same != on
    return on


@pytest.mark.parametrize("fast_path", [False, True])
def test_enable_and_disable(fast_path):
    case = bits_of_two_kernels()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        for _ in range(2):
            integration.enable()
            integration.enable()
            assert is_on(case)
            assert not torch.backends.mha.get_fastpath_enabled()
            integration.disable()
            assert not is_on(case)
            assert torch.backends.mha.get_fastpath_enabled() == fast_path
            integration.disable()
            assert torch.backends.mha.get_fastpath_enabled() == fast_path
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_blocks_nest():
    case = bits_of_two_kernels()
    with integration.enabled():
        with integration.enabled():
            assert is_on(case)
        assert is_on(case)
        integration.disable()
        assert not is_on(case)
        with integration.enabled():
            assert is_on(case)
        assert not is_on(case)
    assert not is_on(case)
    with integration.enabled():
        integration.enable()
    assert not is_on(case)
    integration.enable()
    with integration.enabled():
        integration.disable()
    assert is_on(case)


def test_a_block_that_raises():
    case = bits_of_two_kernels()
    with pytest.raises(KeyError), integration.enabled():
        assert is_on(case)
        raise KeyError
    assert not is_on(case)
    assert torch.backends.mha.get_fastpath_enabled()


def test_as_an_implementation_of_flash_attention():
    case = bits_of_two_kernels()
    attention = torch.nn.attention
    assert "cattn" in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl("cattn")
    try:
        assert attention.current_flash_attention_impl() == "cattn"
        assert is_on(case)
    finally:
        attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert not is_on(case)


def test_no_warning():
    """PyTorch warns once in a process that a kernel is replaced."""
    done = python("import torch, cattn.integrations.torch as c\nc.enable()\nc.disable()\nc.enable()\n"
                  "x = torch.ones(1, 1, 2, 2)\ntorch.nn.functional.scaled_dot_product_attention(x, x, x)\nc.disable()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_imports_torch():
    """No import of this module, and the first call of it. Imported after torch, it registers its name at once."""
    done = python("import sys, cattn\nassert 'cattn.integrations' not in sys.modules\nimport cattn.integrations.torch\n"
                  "assert 'torch' not in sys.modules\ncattn.integrations.torch.enable()\nassert 'torch' in sys.modules")
    assert (done.returncode, done.stderr) == (0, "")
    done = python("import sys, torch, cattn.integrations.torch\n"
                  "assert 'cattn' in torch.nn.attention.list_flash_attention_impls()\n"
                  "assert 'torch._dynamo' not in sys.modules   # which takes a second")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("module", "reason"), [
    ("None", "import of torch halted; None in sys.modules"),
    ("types.SimpleNamespace(__version__='2.10.1')", "this is 2.10.1"),
])
@pytest.mark.parametrize("call", ["enable()", "enabled().__enter__()", "attention(0, 0, 0)",
                                  "varlen_attention(0, 0, 0, 0)"])
def test_without_torch(module, reason, call):
    done = python(f"import sys, types; sys.modules['torch'] = {module}\nimport cattn.integrations.torch as c\n"
                  f"c.disable()\nprint(c.stats())\nc.{call}")
    assert done.stdout == "{'forward': {}, 'backward': {}}\n"
    assert done.stderr.splitlines()[-1] == (
        f'ImportError: cattn.integrations.torch: needs torch 2.11 or newer ({reason}): `pip install "cattn[torch]"`')


# Modules, modes, graphs, processes.


def as_exact(ours, theirs, exact):
    """By twice the error of PyTorch's own, and four roundings of the largest number: whole layers, whose rounding is
    not attention's alone."""
    bound = 2 * errors(array(theirs), array(exact)).max() + 4 * np.finfo(np.float32).eps * largest(array(exact))
    return errors(array(ours), array(exact)).max() <= bound


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multi_head_attention(all_sizes, train, padding, batch_first):
    """Without need_weights: with it, it multiplies by itself."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=batch_first).train(train)
    x = torch.randn(2, 16, 32)
    shape = x.shape if batch_first else (16, 2, 32)
    options = {"need_weights": False}
    if padding:
        options["key_padding_mask"] = torch.arange(16) >= torch.tensor([[16], [11]])
    wide = torch.nn.MultiheadAttention(32, 4, batch_first=batch_first, dtype=torch.float64).train(train)
    wide.load_state_dict(layer.state_dict())

    def run(module, x):
        out, _ = module(*[x.reshape(shape)] * 3, **options)
        module.zero_grad()
        if train:
            out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in module.parameters() if train)]

    with torch.set_grad_enabled(train):
        exact = run(wide, x.double())
        theirs = run(layer, x)
        with integration.enabled(), taken(forward=1, backward=train):
            ours = run(layer, x)
    assert all(itertools.starmap(as_exact, zip(ours, theirs, exact, strict=True)))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_transformer_encoder(all_sizes, train):
    """In eval mode too, where its fast path would bypass attention; also of padded batches, which that would nest."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).train(train)
    wide = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, dtype=torch.float64), 2).train(train)
    wide.load_state_dict(encoder.state_dict())
    x, padding = torch.randn(2, 16, 32), torch.arange(16) >= torch.tensor([[16], [11]])

    def run(module, x):
        return module(x, src_key_padding_mask=padding)[~padding]

    with torch.set_grad_enabled(train):
        theirs = run(encoder, x)
        with integration.enabled(), taken(forward=2):
            ours = run(encoder, x)
        assert as_exact(ours, theirs, run(wide, x.double()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(all_sizes, mode):
    inputs = [x.requires_grad_() for x in problem()]
    with integration.enabled(), taken(forward=1), mode():
        results = F.scaled_dot_product_attention(*inputs), integration.attention(*inputs)
    for out in results:
        assert not out.requires_grad
        assert_same_bits(array(out), door(inputs, {})[0])


def test_python_threads(all_sizes):
    """At once, each gets what it gets alone."""
    inputs = problem(rows=40, keys=40, head_dim=64)
    with integration.enabled():
        alone = F.scaled_dot_product_attention(*inputs)
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(lambda _: F.scaled_dot_product_attention(*inputs), range(40)))
    assert all(torch.equal(result, alone) for result in results)


def test_autocast(all_sizes):
    inputs = [x.requires_grad_() for x in problem()]
    with integration.enabled(), taken(forward=1, backward=1):
        with torch.autocast("cpu", torch.bfloat16):
            out = F.scaled_dot_product_attention(*inputs)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert out.dtype is torch.bfloat16
    narrow = [x.bfloat16() for x in inputs]
    results = door(narrow, {})
    assert_same_bits(array(out), results[0])
    expected = door_backward(torch.ones_like(out), narrow, results, {})
    for gradient, right in zip(gradients, expected, strict=False):
        assert_same_bits(array(gradient), right.astype(np.float32))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(all_sizes):
    inputs = [x[None].expand(3, *x.shape) for x in problem()]
    theirs = torch.func.vmap(F.scaled_dot_product_attention)(*inputs)
    with integration.enabled():
        ours = torch.func.vmap(F.scaled_dot_product_attention)(*inputs)
    assert ours.shape == theirs.shape
    assert_same_bits(array(ours[0]), door([x[0] for x in inputs], {})[0])


@pytest.mark.parametrize("backend", [
    "eager", "aot_eager",
    pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no g++")])])
@pytest.mark.parametrize("case", ["causal", "heads last", "mask of keys", "grouped heads", "sequence first"])
def test_compiled(all_sizes, backend, case):
    torch.compiler.reset()
    inputs, options = inputs_of(case, torch.float32)
    inputs = [x.detach().requires_grad_() for x in inputs]
    with integration.enabled():
        compiled = torch.compile(lambda *inputs: 2 * F.scaled_dot_product_attention(*inputs, **options),
                                 backend=backend, fullgraph=True)
        with taken(forward=1, backward=1), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)     # of PyTorch's own modules
            out = compiled(*inputs)
            gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        results = door(inputs, options)
        assert_same_bits(array(out), 2 * results[0])
        expected = door_backward(torch.full_like(out, 2), inputs, results, options)
    for gradient, right in zip(gradients, expected, strict=False):
        assert_same_bits(array(gradient), right)


OUT_OF_GRAPHS = """
import torch
from cattn.integrations import torch as integration
integration._need_torch()
none = {"work": (0, 0), "work_of_one_query": (0, 0), "work_backward": 0, "queries_backward": 0}
for dtype, limits in integration._DTYPES.items():
    integration._DTYPES[dtype] = limits._replace(**none)
attention = torch.nn.functional.scaled_dot_product_attention
def broken(x):      # by a graph break in a block, for which it is not compiled; what it calls could be
    try:
        torch._dynamo.graph_break()
        return CALL + 1
    finally:
        pass
def model(x):
    for _ in range(2):
        y = broken(x)
    return y
integration.enable()
x = torch.randn(1, 2, 3, 4)
FIRST
compiled = torch.compile(model, backend="eager")
for length in range(2, 14):
    x = torch.randn(1, 2, length, 4, requires_grad=length % 2 == 0)
    assert torch.equal(compiled(x), CALL + 1)
print(integration.stats()["forward"].get("cattn", 0))
"""


@pytest.mark.parametrize("first", ["pass", "CALL", "import torch._dynamo", "import torch._dynamo; CALL"])
@pytest.mark.parametrize(("call", "count"), [("attention(x, x, x)", 36), ("integration.attention(x, x, x)", 0)])
def test_torch_compile_does_not_look_into_it(first, call, count):
    """Where it breaks a graph, whether torch.compile's modules came before or after the first call: none of the library
    is compiled again for each shape."""
    done = python(OUT_OF_GRAPHS.replace("FIRST", first).replace("CALL", call), TORCH_LOGS="recompiles,graph_code")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == count + (count > 0 and "CALL" in first)
    assert "Recompiling" not in done.stderr
    assert "numpy" not in done.stderr


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")    # torch.compile looks at it
def test_attention_breaks_graphs(fullgraph):
    torch.compiler.reset()
    inputs = [x.requires_grad_() for x in problem()]
    compiled = torch.compile(lambda *inputs: 2 * integration.attention(*inputs, softcap=3.0), backend="eager",
                             fullgraph=fullgraph)
    if fullgraph:
        with pytest.raises(Exception, match="disable"):
            compiled(*inputs)
        return
    out = compiled(*inputs)
    assert torch.equal(out, 2 * integration.attention(*inputs, softcap=3.0))
    out.sum().backward()
    assert inputs[0].grad is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(all_sizes, use_reentrant):
    """The gradients are of the weights that were dropped in the forward pass."""
    inputs = [x.requires_grad_() for x in problem()]

    def block(*inputs):
        out = integration.attention(*inputs, dropout_p=0.5, is_causal=True, q_offset=0)
        return F.scaled_dot_product_attention(out, *inputs[1:])

    def run(function):
        torch.manual_seed(3)
        for x in inputs:
            x.grad = None
        with integration.enabled():
            out = function(*inputs)
            out.square().sum().backward()
        return out, *(x.grad for x in inputs)

    def checkpointed(*inputs):
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=use_reentrant)

    for one, other in zip(run(block), run(checkpointed), strict=True):
        assert_same_bits(array(one), array(other))


WORKERS = """
import torch
from cattn.integrations import torch as integration
class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, number):
        x = torch.full((2, 4, 64, 64), float(number))
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return out[0, 0, 0, 0], torch.tensor([integration.stats()["forward"]["cattn"], torch.get_num_threads()])
if __name__ == "__main__":
    torch.set_num_threads(2)
    integration.enable()
    x = torch.randn(2, 8, 128, 64, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()     # threads are there before the fork
    loader = torch.utils.data.DataLoader(Items(), num_workers=2, multiprocessing_context="fork", timeout=60)
    for number, (result, (count, threads)) in ((number, (result, counts[0])) for number, (result, counts)
                                               in enumerate(loader)):
        print(number, float(result), int(count) > 1, int(threads))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_workers_that_fork():
    done = python(WORKERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{number} {number}.0 True 1" for number in range(4)]


# Tensors with every option.


def tensors_of(arrays, options):
    """The inputs of `attention`, those that can have gradients first: query, key, value, mask, slopes, sinks."""
    options = dict(options)
    inputs = [*arrays, *(options.pop(name, None) for name in ("attn_mask", "alibi_slopes", "sinks"))]
    return [x if x is None else tensor(np.asarray(x)) for x in inputs], options


def call(inputs, options, **others):
    return integration.attention(*inputs[:4], alibi_slopes=inputs[4], sinks=inputs[5], **options, **others)


NAMES_OF_INPUTS = "query", "key", "value", "attn_mask", "alibi_slopes", "sinks"


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_attention_has_the_bits_of_the_door(dtype, kv_dtype):
    rng = np.random.default_rng(11)
    for _ in range(40):
        arrays, options = random_problem(rng, dtype=dtype, kv_dtype=kv_dtype)
        wanted = {"return_weights": bool(rng.integers(2)), "return_logsumexp": bool(rng.integers(2))}
        expected = cattn.scaled_dot_product_attention(*arrays, **options, **wanted)
        inputs, others = tensors_of(arrays, options)
        result = call(inputs, others, **wanted)
        assert type(result) is type(expected) if isinstance(expected, tuple) else isinstance(result, torch.Tensor)
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, expected)), strict=True):
            assert_same_bits(array(one), other)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_gradients_have_the_bits_of_the_door(dtype, kv_dtype):
    """Of those that require them, and of no other."""
    rng = np.random.default_rng(12)
    for _ in range(40):
        arrays, options = random_problem(rng, dtype=dtype, kv_dtype=kv_dtype)
        inputs, others = tensors_of(arrays, options)
        asked = [x is not None and x.is_floating_point() and rng.random() < 2 / 3 for x in inputs]
        for x, requires in zip(inputs, asked, strict=True):
            if requires:
                x.requires_grad_()
        out, logsumexp = call(inputs, others, return_logsumexp=True)
        if not any(asked):
            assert not out.requires_grad
            continue
        grads = [tensor(np.asarray(rng.standard_normal(x.shape)).astype(array(x).dtype)) for x in (out, logsumexp)]
        torch.autograd.backward([out, logsumexp], grads)
        expected = cattn.scaled_dot_product_attention_backward(
            array(grads[0]), *arrays, array(out), array(logsumexp), **options, grad_logsumexp=array(grads[1]),
            wanted=[name for name, requires in zip(NAMES_OF_INPUTS, asked, strict=True) if requires])
        for x, right in zip(inputs, expected, strict=True):
            assert (x is None or x.grad is None) == (right is None)
            if right is not None:
                assert_same_bits(array(x.grad), right.astype(array(x).dtype))


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_attention_by_differences(seed):
    rng = np.random.default_rng(seed)
    while True:
        arrays, options = random_problem(rng, most_rows=3, most_keys=4, most_dims=3)
        seen = np.asarray(options.get("attn_mask", 0.0))
        if 0 not in (arrays[0].size, arrays[1].size) and (seen.dtype == bool or np.isfinite(seen).all()):
            break
    inputs, others = tensors_of(arrays, options)
    inputs = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]

    def loss(*inputs):
        out, logsumexp = call(inputs, others, return_logsumexp=True)
        return out, torch.where(torch.isinf(logsumexp), 0, logsumexp)

    assert torch.autograd.gradcheck(loss, inputs)


def test_bfloat16_everywhere():
    """Slopes and sinks too, whose bits are numbers to nobody."""
    inputs = [x.bfloat16().requires_grad_() for x in (*problem(), masked(9, 13), torch.rand(4), torch.randn(4))]
    out, weights, logsumexp = call(inputs, {}, return_weights=True, return_logsumexp=True)
    arrays = list(map(array, inputs))
    options = dict(zip(NAMES_OF_INPUTS[3:], arrays[3:], strict=True))
    expected = cattn.scaled_dot_product_attention(*arrays[:3], **options, return_weights=True, return_logsumexp=True)
    for one, other in zip((out, weights, logsumexp), expected, strict=True):
        assert_same_bits(array(one), other)
    out.float().sum().backward()
    gradients = cattn.scaled_dot_product_attention_backward(
        np.ones(out.shape, BFLOAT16), *arrays[:3], expected[0], expected[2], **options, wanted=NAMES_OF_INPUTS)
    for x, right in zip(inputs, gradients, strict=True):
        assert_same_bits(array(x.grad), right.astype(BFLOAT16))


def test_results_share_memory(monkeypatch):
    """Tensors are made of the arrays that the door returns, and it reads those of the inputs."""
    calls = recorded(monkeypatch)
    inputs = problem()
    out = integration.attention(*inputs)
    assert [calls[0][name].ctypes.data for name in ("query", "key", "value", "out")] == [
        x.data_ptr() for x in (*inputs, out)]


def test_dropout_is_pytorchs_to_seed():
    inputs = problem()
    torch.manual_seed(5)
    first, second = (integration.attention(*inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(integration.attention(*inputs, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    seeded = integration.attention(*inputs, dropout_p=0.5, seed=9)
    assert_same_bits(array(seeded), cattn.scaled_dot_product_attention(*map(array, inputs), dropout_p=0.5, seed=9))


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5, "seed": 9}])
def test_the_generator_is_left_alone_without_need(options):
    state = torch.get_rng_state()
    integration.attention(*problem(), **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_logsumexp_is_used():
    inputs = [x.double().requires_grad_() for x in problem()]
    _, logsumexp = integration.attention(*inputs, return_logsumexp=True)
    ours = torch.autograd.grad(logsumexp.sum(), inputs[:2])
    scores = inputs[0] @ inputs[1].mT / 8**0.5
    theirs = torch.autograd.grad(torch.logsumexp(scores, dim=-1).sum(), inputs[:2])
    for one, other in zip(ours, theirs, strict=True):   # sums of 13 products, and of 9: each rounds by half an eps
        assert (one - other).abs().max() <= 100 * np.finfo(np.float64).eps * other.abs().max()


def test_weights_have_no_gradient():
    inputs = [x.requires_grad_() for x in problem()]
    out, weights = integration.attention(*inputs, return_weights=True)
    assert out.requires_grad
    assert not weights.requires_grad


def test_there_is_no_second_derivative():
    """An error, not a part that is missing."""
    query, key, value = (x.requires_grad_() for x in problem())
    (gradient,) = torch.autograd.grad(integration.attention(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="its gradients have no derivative"):
        (gradient.square().sum() + query.sum()).backward()


def test_changes_between_forward_and_backward():
    """Of tensors they are an error of PyTorch's; lengths are copied."""
    query, key, value = (x.requires_grad_() for x in problem())
    lengths, starts = torch.tensor([5, 13]), np.array([1, 0])
    window, offset = [3, 0], [1, 2]

    def run():
        return integration.attention(query, key, value, kv_lens=lengths, kv_starts=starts, window=window,
                                     q_offset=offset)

    expected = torch.autograd.grad(run().sum(), query)[0]
    out = run()
    lengths.zero_()
    starts += 3
    window[0], offset[0] = 0, 9
    assert torch.equal(torch.autograd.grad(out.sum(), query)[0], expected)
    out = run()
    with torch.no_grad():
        key += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_warnings_name_the_line_of_the_caller(requires_grad):
    inputs = [x.requires_grad_(requires_grad) for x in problem()]
    with pytest.warns(UserWarning, match="no q_offset") as record:
        integration.attention(*inputs, is_causal=True)
    assert record[0].filename == __file__


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"query": np.ones((2, 3))}, TypeError,
     "query: expected a tensor, got a ndarray; torch.as_tensor(query) is one"),
    ({"key": None}, TypeError, "key: expected a tensor, got a NoneType"),
    ({"sinks": [0.0] * 4}, TypeError, "sinks: expected a tensor, got a list; torch.as_tensor(sinks) is one"),
    ({"value": torch.ones(2, 4, 13, 8, device="meta")}, ValueError,
     "value: expected a tensor on the CPU, got one on meta; value.cpu() is there"),
    ({"query": torch.ones(2, 4, 9, 8, dtype=torch.int64)}, TypeError,
     "query: expected float32, float64, float16 or bfloat16, got torch.int64; query.float() casts"),
    ({"query": torch.ones(2, 4, 9, 8, dtype=torch.uint16)}, TypeError,
     "query: expected float32, float64, float16 or bfloat16, got torch.uint16; query.float() casts"),
    ({"key": torch.ones(2, 4, 13, 8, dtype=torch.float64)}, TypeError,
     "key: expected torch.float32, as query has (or a 16-bit one under a float32 query), got torch.float64; "
     "key.to(query.dtype) casts"),
    ({"key": torch.ones(2, 4, 13, 8, dtype=torch.bfloat16)}, TypeError,
     "value: expected the dtype of key, torch.bfloat16, got torch.float32; value.to(key.dtype) casts"),
    ({"attn_mask": torch.ones(9, 13, dtype=torch.int64)}, TypeError,
     "attn_mask: expected bool (True = attend) or a float dtype (added), got torch.int64; for 1 = attend: "
     "attn_mask.bool()"),
    ({"attn_mask": torch.ones(9, 13, dtype=torch.uint16)}, TypeError,
     "attn_mask: expected bool (True = attend) or a float dtype (added), got torch.uint16; for 1 = attend: "
     "attn_mask.bool()"),
    ({"attn_mask": torch.ones(9, 12, dtype=torch.bool)}, ValueError,
     "attn_mask: expected a shape that broadcasts to (2, 4, 9, 13), got shape (9, 12)"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a float in [0, 1), got 1.0"),
    ({"return_logsumexp": 1}, TypeError, "return_logsumexp: expected a bool, got 1"),
    ({"num_threads": 0}, ValueError, "num_threads: expected 1 to 2147483647, got 0; None takes the default"),
])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors(change, error, message, requires_grad):
    arguments = dict(zip(("query", "key", "value"), problem(), strict=True)) | change
    if requires_grad and isinstance(arguments["query"], torch.Tensor) and arguments["query"].is_floating_point():
        arguments["query"].requires_grad_()
    with pytest.raises(error) as raised:
        integration.attention(**arguments)
    assert str(raised.value) == message


def test_attention_takes_what_the_door_takes():
    """But out, which PyTorch does not differentiate."""
    names = list(inspect.signature(cattn.scaled_dot_product_attention).parameters)
    names.remove("out")
    assert list(inspect.signature(integration.attention).parameters) == names


# Packed sequences.


def packed_problem(rng, dtype, kv_dtype):
    """(query, key, value), cu_seqlens and options of three sequences, one of them without queries."""
    num_kv_heads, group_size, head_dim = rng.integers(1, 4, 3)
    lengths = rng.integers(1, 6, (2, 3))
    lengths[0, rng.integers(3)] = 0
    cu_seqlens = [np.cumsum([0, *each]) for each in lengths]
    arrays = [rng.standard_normal((seqlens[-1], heads, head_dim)).astype(own) for seqlens, heads, own in (
        (cu_seqlens[0], num_kv_heads * group_size, dtype), (cu_seqlens[1], num_kv_heads, kv_dtype),
        (cu_seqlens[1], num_kv_heads, kv_dtype))]
    options = {"is_causal": bool(rng.integers(2)), "softcap": float(rng.integers(2)),
               "window": (int(rng.integers(1, 5)), None)}
    if rng.integers(2):
        options |= {"dropout_p": 0.3, "seed": 3}
    for name in "alibi_slopes", "sinks":
        if rng.integers(2):
            options[name] = rng.standard_normal(num_kv_heads * group_size)
    return arrays, cu_seqlens, options


def call_packed(inputs, cu_seqlens, options, **others):
    return integration.varlen_attention(*inputs[:3], *cu_seqlens, alibi_slopes=inputs[4], sinks=inputs[5], **options,
                                        **others)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_packed_has_the_bits_of_the_door(dtype, kv_dtype):
    """Results, and the gradients of what requires them, and of nothing else."""
    rng = np.random.default_rng(13)
    for _ in range(40):
        arrays, cu_seqlens, options = packed_problem(rng, dtype, kv_dtype or dtype)
        inputs, others = tensors_of(arrays, options)
        asked = [x is not None and rng.random() < 2 / 3 for x in inputs]
        for x, requires in zip(inputs, asked, strict=True):
            if requires:
                x.requires_grad_()
        results = call_packed(inputs, map(torch.from_numpy, cu_seqlens), others, return_logsumexp=True)
        expected = cattn.varlen_attention(*arrays, *cu_seqlens, **options, return_logsumexp=True)
        for one, other in zip(results, expected, strict=True):
            assert_same_bits(array(one), other)
        assert results[0].requires_grad == any(asked)
        if not any(asked):
            continue
        grads = [tensor(np.asarray(rng.standard_normal(x.shape)).astype(array(x).dtype)) for x in results]
        torch.autograd.backward(results, grads)
        expected = cattn.varlen_attention_backward(
            array(grads[0]), *arrays, *expected, *cu_seqlens, **options, grad_logsumexp=array(grads[1]),
            wanted=[name for name, requires in zip(NAMES_OF_INPUTS, asked, strict=True) if requires])
        for x, right in zip(inputs, expected, strict=True):
            assert (x is None or x.grad is None) == (right is None)
            if right is not None:
                assert_same_bits(array(x.grad), right.astype(array(x).dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_each_sequence_by_itself(dtype):
    """Gradients too."""
    inputs = [torch.randn(7, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    out = integration.varlen_attention(*inputs, torch.tensor([0, 4, 7]), is_causal=True)
    ours = torch.autograd.grad(out.square().sum(), inputs)
    halves = [integration.attention(*(x[part].transpose(0, 1)[None] for x in inputs), is_causal=True)
              for part in (slice(0, 4), slice(4, 7))]
    expected = torch.cat([half[0].transpose(0, 1) for half in halves])
    assert torch.equal(out, expected)
    for one, other in zip(ours, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        assert torch.equal(one, other)


def test_packed_dropout_is_pytorchs_to_seed():
    def run():
        torch.manual_seed(5)
        return integration.varlen_attention(*torch.ones(3, 6, 2, 8), [0, 2, 6], dropout_p=0.5)

    assert torch.equal(run(), run())
    assert not torch.equal(run(), integration.varlen_attention(*torch.ones(3, 6, 2, 8), [0, 2, 6], dropout_p=0.5))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"query": np.ones((2, 2, 3))}, TypeError,
     "query: expected a tensor, got a ndarray; torch.as_tensor(query) is one"),
    ({"query": torch.ones(7, 2)}, ValueError, "query: expected (total_q, num_heads, head_dim), got shape (7, 2)"),
    ({"cu_seqlens_q": torch.tensor([0, 4, 6])}, ValueError, "cu_seqlens_q: expected "),
    ({"cu_seqlens_q": torch.tensor([0.0, 7.0])}, TypeError, "cu_seqlens_q: expected "),
    ({"key": torch.ones(7, 2, 8, dtype=torch.float64)}, TypeError,
     "key: expected torch.float32, as query has (or a 16-bit one under a float32 query), got torch.float64; "
     "key.to(query.dtype) casts"),
])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors_of_packed(change, error, message, requires_grad):
    arguments = {name: torch.ones(7, 2, 8) for name in ("query", "key", "value")}
    arguments |= {"cu_seqlens_q": torch.tensor([0, 4, 7])} | change
    if requires_grad and isinstance(arguments["query"], torch.Tensor):
        arguments["query"].requires_grad_()
    with pytest.raises(error) as raised:
        integration.varlen_attention(**arguments)
    assert str(raised.value).startswith(message)


def test_packed_takes_what_the_door_takes():
    names = list(inspect.signature(cattn.varlen_attention).parameters)
    names.remove("out")
    assert list(inspect.signature(integration.varlen_attention).parameters) == names
