"""cattn in PyTorch, on CPUs: `pip install "cattn[torch]"`.

    enable, disable, enabled    cattn under torch.nn.functional.scaled_dot_product_attention, forward and backward
    stats                       the calls it took, and those that it left to PyTorch's own kernel, and why
    attention                   tensors with all options of cattn, and gradients
    varlen_attention            the same of packed sequences

Tensors are read and written where they lie, nothing is copied as a whole. Calls have as many threads as
torch.get_num_threads() says.

PyTorch's dispatcher sends attention on the CPU to a flash-attention operator, or else to plain matrix products: where
there is dropout, where query, key and value have fewer or more than 4 axes, values another head_dim than keys, elements
of a row gaps, or a mask a gradient. `enable` registers functions for that operator and for its gradients. What is not
worth it here, or out of the ordinary, they pass on to the kernels that were registered before.

`import cattn` does not import this module: `import cattn.integrations.torch` does. Its first call imports torch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cattn import _kernels
from cattn._attention import attend, scaled_dot_product_attention
from cattn._checks import BF16, BOOL, F16, F32, F64, KINDS, cast
from cattn._gradients import backward, packed_backward
from cattn._serving import attend_packed
from cattn.integrations._library import library

__all__ = ["attention", "disable", "enable", "enabled", "stats", "varlen_attention"]

_OLDEST = (2, 11)
_OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"
_LARGEST_SCALE = 1e30


def enable() -> None:
    """Puts cattn under `torch.nn.functional.scaled_dot_product_attention`, for tensors on the CPU, in this process.

    Modules that call it follow, also where they are compiled. torch.nn.MultiheadAttention and its transformer layers
    would go past it in eval mode: their fast path (torch.backends.mha) is switched off until `disable`. With
    need_weights=True, their default, they never call it.

    `torch.nn.attention.activate_flash_attention_impl("cattn")` does the same, where this module was imported after
    torch. Neither this nor `disable` is to be called while other threads compute attention.

    Raises
    ------
    ImportError
        Where torch is missing or older than 2.11.

    Examples
    --------
    ::

        import cattn.integrations.torch
        cattn.integrations.torch.enable()
    """
    global _library, _own, _fast_path
    _need_torch()
    with _lock:
        if _library is not None:
            return
        names = _OPERATOR, f"{_OPERATOR}_backward"
        _own = _Both(*(torch.library.get_kernel(f"aten::{name}", "CPU") for name in names))
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():     # of what is meant: that it replaces a kernel
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, function in zip(names, (_forward, _backward), strict=True):
                library.impl(name, function, "CPU", with_keyset=True)
        _fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        _library = library


def disable() -> None:
    """Puts back what was there before `enable`. What a call has computed since is of use still: its gradients are then
    PyTorch's own kernel's."""
    global _library
    with _lock:
        if _library is None:
            return
        _library = None     # whose end takes its kernels out
        torch.backends.mha.set_fastpath_enabled(_fast_path)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` for a block, in all threads: after it, whatever happened in it, all is as it was before it.

    Examples
    --------
    ::

        with enabled():
            logits = model(tokens)
    """
    before = _library
    enable()
    try:
        yield
    finally:
        (disable if before is None else enable)()


def stats() -> dict[str, dict[str, int]]:
    """How many calls came since the import, {"forward": {...}, "backward": {...}} of counts: "cattn", those that it
    took; and by the reason those that went on to PyTorch's own kernel:

    "faster there"
        Small calls, small and middling ones of a single query, and the gradients of some queries alone, as measured.
        Of 16 bits hardly any.
    "matrix unit"
        16-bit numbers of 16 queries or more on a CPU that multiplies them as tiles (AMX).
    "unusual"
        Not what scaled_dot_product_attention sends: subclasses of tensors, shapes and dtypes that differ, dropout.

    Calls that PyTorch's dispatcher sends elsewhere are not among them. Where several threads call at once, some may be
    missed.
    """
    return {name: dict(counts) for name, counts in _counts.items()}


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, q_offset: Any = None, window: Any = None,
    softcap: float | None = 0.0, alibi_slopes: Any = None, sinks: Any = None, kv_lens: Any = None,
    kv_starts: Any = None, return_weights: bool = False, return_logsumexp: bool = False, num_threads: int | None = None,
    seed: int | None = None,
) -> Any:
    """`cattn.scaled_dot_product_attention` of tensors on the CPU, with gradients.

    Parameters
    ----------
    query, key, value : tensors of float32, float64, float16 or bfloat16
        As there: any number of leading axes, which broadcast.
    attn_mask, alibi_slopes, sinks : tensors, optional
        As there. Those that require grad have a gradient.
    dropout_p, is_causal, scale, enable_gqa, q_offset, window, softcap, kv_lens, kv_starts
        As there.
    return_weights, return_logsumexp : bool
        Return a tuple, with these after the result. The logsumexp has a gradient, the weights have none.
    num_threads : int, optional
        Threads of this call, and of its gradients; torch.get_num_threads() when None.
    seed : int in [0, 2**64), optional
        Of the dropout. None: drawn from PyTorch's generator, so that torch.manual_seed decides, and
        torch.utils.checkpoint drops the same again.

    Returns
    -------
    out, weights, logsumexp : tensors
        As there.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, the rule and what came.
    ImportError
        Where torch is missing or older than 2.11.

    Notes
    -----
    There is one derivative, and no second. torch.compile leaves the call out of its graphs; autocast leaves its tensors
    as they are.
    """
    _need_torch()
    return _attention(
        _DENSE, (query, key, value, attn_mask, alibi_slopes, sinks), return_weights, return_logsumexp, num_threads,
        {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "q_offset": q_offset,
         "window": window, "softcap": softcap, "kv_lens": kv_lens, "kv_starts": kv_starts, "seed": seed})


def varlen_attention(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any = None, *, is_causal: bool = False,
    q_offset: Any = "end", scale: float | None = None, window: Any = None, softcap: float | None = 0.0,
    alibi_slopes: Any = None, sinks: Any = None, dropout_p: float = 0.0, return_logsumexp: bool = False,
    num_threads: int | None = None, seed: int | None = None,
) -> Any:
    """`cattn.varlen_attention` of tensors on the CPU, with gradients: sequences packed one after the other, no padding.

    Parameters
    ----------
    query : tensor (total_q, num_heads, head_dim) of float32, float64, float16 or bfloat16
    key : tensor (total_kv, num_kv_heads, head_dim)
    value : tensor (total_kv, num_kv_heads, head_dim_v)
    cu_seqlens_q, cu_seqlens_kv : int tensors (batch + 1,)
        Where sequences begin, as there.
    is_causal, q_offset, scale, window, softcap, dropout_p
        As there.
    alibi_slopes, sinks : tensors, optional
        As there. Those that require grad have a gradient.
    return_logsumexp : bool
        Return a tuple, with these after the result. They have a gradient.
    num_threads, seed
        As in `attention`.

    Returns
    -------
    out : tensor (total_q, num_heads, head_dim_v), dtype of the query
    logsumexp : tensor (total_q, num_heads), dtype computed in; with return_logsumexp

    Raises
    ------
    ValueError, TypeError, ImportError
        As in `attention`.
    """
    _need_torch()
    return _attention(
        _PACKED, (query, key, value, None, alibi_slopes, sinks), False, return_logsumexp, num_threads,
        {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv, "is_causal": is_causal, "q_offset": q_offset,
         "scale": scale, "window": window, "softcap": softcap, "dropout_p": dropout_p, "seed": seed})


def _need_torch():
    """Imports torch, once, and makes what is made of it."""
    global torch, _DTYPES, _TYPES, _Attention
    if torch is not None:
        return
    imported = library("torch", _OLDEST, "torch")
    # By PyTorch 2.13 on an AMD EPYC with AVX-512 (Zen 5), one thread, head_dim 32 to 128, where handing a call on takes
    # 5 us, 7 backward. Tiles are untried: they do several times the work that vectors of 32-bit numbers do.
    tiles = imported.cpu.get_capabilities()
    of_tiles = {name: 16 if tiles.get(name) else np.inf for name in ("amx_fp16", "amx_bf16")}
    _DTYPES = {imported.float32: _Limits(F32, (2**16, 2**18), (2**19, 2**22), 2**19, 12, np.inf),
               imported.float64: _Limits(F64, (2**15, 2**17), (2**20, 2**21), 2**18, 16, np.inf),
               imported.float16: _Limits(F16, (2**11, 2**12), (2**11, 2**11), 2**13, 1, of_tiles["amx_fp16"]),
               imported.bfloat16: _Limits(BF16, (2**13, 2**17), (2**12, 2**13), 2**14, 1, of_tiles["amx_bf16"])}
    _TYPES = imported.Tensor, imported.nn.Parameter
    _Attention = _function(imported)
    imported.nn.attention.register_flash_attention_impl("cattn", register_fn=_Handle)
    torch = imported


def _outside_graphs(function):
    """`function`, which torch.compile is not to look into. What does that is imported with it, and takes a second: so
    not before."""
    hidden = None

    @functools.wraps(function)
    def call(*args, **options):
        nonlocal hidden
        if hidden is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **options)
            hidden = torch.compiler.disable(function)
            skip = getattr(torch._dynamo.decorators, "skip", None)
            for ours in (call, attention, varlen_attention) if skip else ():
                skip(ours)      # else they would be compiled, for shape after shape
        return hidden(*args, **options)

    return call


# Under scaled_dot_product_attention.


class _Both(NamedTuple):
    forward: Any
    backward: Any


class _Limits(NamedTuple):
    """From where on calls of a dtype are taken: the products of the numbers of batch rows, heads, queries, keys and
    head_dim. Pairs are for calls without a mask and with one."""

    kind: int
    work: tuple[int, int]
    work_of_one_query: tuple[int, int]
    work_backward: int
    queries_backward: int
    queries_of_tiles: float     # with as many it is PyTorch's that is faster


class _Handle:
    """What `torch.nn.attention.restore_flash_attention_impl` ends."""

    def __init__(self):
        enable()

    def remove(self):
        disable()


torch = _DTYPES = _TYPES = _Attention = None    # by _need_torch
_lock = threading.Lock()
_library = None     # while it lives, its functions are registered
_own = None         # PyTorch's kernels
_fast_path = True
_counts = {"forward": Counter(), "backward": Counter()}

# As the kernels number the arrays of tensors: those of uint16 hold bfloat16.
_KINDS = KINDS | {np.dtype(np.uint16): BF16}


@_outside_graphs
def _forward(keys, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """The operator: (out, logsumexp), in PyTorch's layouts."""
    limits = _DTYPES.get(query.dtype)
    reason = _reason(limits, query, key, value, dropout_p, attn_mask, scale, True)
    _counts["forward"][reason or "cattn"] += 1
    if reason:
        return _own.forward.call_boxed(keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    out = torch.empty_like(query)
    arrays = {"query": _array(query), "key": _array(key), "value": _array(value), "out": _array(out)}
    module, dtype = (_kernels.f64(), np.float64) if limits.kind == F64 else (_kernels.f32, np.float32)
    logsumexp = np.empty(query.shape[:3], dtype)
    module.attend(**arrays, **_options(limits.kind, query, key, is_causal, attn_mask, scale), weights=None,
                  narrow_weights=None, logsumexp=logsumexp.reshape(-1))
    if attn_mask is not None:   # PyTorch's number for rows that see no key, which its own backward kernel asks for
        logsumexp[logsumexp == -np.inf] = 0
    if 1 not in query.shape[1:3]:
        logsumexp = logsumexp.swapaxes(1, 2).copy().swapaxes(1, 2)
    return out, torch.from_numpy(logsumexp)


@_outside_graphs
def _backward(keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    """The operator's gradients by query, key and value, in PyTorch's layout."""
    limits = _DTYPES.get(query.dtype)
    reason = _reason(limits, query, key, value, dropout_p, attn_mask, scale, False)
    if not (grad_out is not None and grad_out.shape == out.shape == query.shape
            and logsumexp.shape == query.shape[:3] and grad_out.dtype is out.dtype is query.dtype):
        reason = "unusual"
    _counts["backward"][reason or "cattn"] += 1
    if reason:
        return _own.backward.call_boxed(keys, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal,
                                        attn_mask=attn_mask, scale=scale)
    narrow = limits.kind in (F16, BF16)
    grad_query = torch.empty_permuted(query.shape, (0, 2, 1, 3), dtype=torch.float32 if narrow else query.dtype)
    grad_key, grad_value = (torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype) for x in (key, value))
    arrays = {"grad_out": _array(grad_out), "query": _array(query), "key": _array(key), "value": _array(value),
              "out": _array(out), "grad_query": _array(grad_query), "grad_key": _array(grad_key),
              "grad_value": _array(grad_value)}
    module = _kernels.f64() if limits.kind == F64 else _kernels.f32
    module.attend_backward(**arrays, **_options(limits.kind, query, key, is_causal, attn_mask, scale), grad_mask=None,
                           logsumexp=np.ascontiguousarray(_array(logsumexp)).reshape(-1), grad_logsumexp=None,
                           wide=not narrow, slopes_wanted=False, sinks_wanted=False)
    return grad_query.to(query.dtype), grad_key, grad_value


def _reason(limits, query, key, value, dropout_p, attn_mask, scale, forward):
    """Why PyTorch's own kernel is to compute this, as `stats` counts it; None: it is not."""
    q_shape, kv_shape = query.shape, key.shape
    if (limits is None or key.dtype is not query.dtype or value.dtype is not query.dtype
            or type(query) not in _TYPES or type(key) not in _TYPES or type(value) not in _TYPES
            or len(q_shape) != 4 or len(kv_shape) != 4 or value.shape != kv_shape or dropout_p
            or (scale is not None and not -_LARGEST_SCALE < scale < _LARGEST_SCALE)):
        return "unusual"
    batch, heads, rows, head_dim = q_shape
    kv_batch, kv_heads, keys, kv_head_dim = kv_shape
    masked = attn_mask is not None
    if not forward:
        work = limits.work_backward if rows >= limits.queries_backward else np.inf
    elif rows == 1:
        work = limits.work_of_one_query[masked]
    else:
        work = limits.work[masked]
    if batch * heads * rows * keys * head_dim < work:
        return "faster there"
    if rows >= limits.queries_of_tiles:
        return "matrix unit"
    if kv_batch != batch or kv_head_dim != head_dim or not kv_heads or heads % kv_heads:
        return "unusual"
    if masked and (attn_mask.dtype not in _DTYPES or type(attn_mask) not in _TYPES):
        return "unusual"
    return None


def _array(tensor):
    """The same memory as an array, of bfloat16 as uint16."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _options(kind, query, key, is_causal, attn_mask, scale):
    """What both entries of the kernel take."""
    mask, mask_kind = None, BOOL
    if attn_mask is not None:
        mask = _array(attn_mask.expand(*query.shape[:3], key.shape[2]))
        mask_kind = _DTYPES[attn_mask.dtype].kind
    return {"q_kind": kind, "kv_kind": kind, "mask": mask, "mask_kind": mask_kind, "scale": scale, "softcap": 0.0,
            "window_left": -1, "window_right": 0 if is_causal else -1, "q_offset": 0, "q_offsets": None,
            "kv_lens": None, "slopes": None, "sinks": None, "dropout_p": 0.0, "seed": 0, "batch_offset": 0,
            "num_threads": torch.get_num_threads()}


# The functions with all options.

_INPUTS = "query", "key", "value", "attn_mask", "alibi_slopes", "sinks"
_ARRAYS = {"q_offset", "window", "kv_lens", "kv_starts", "cu_seqlens_q", "cu_seqlens_kv"}


@_outside_graphs
def _attention(doors, inputs, return_weights, return_logsumexp, num_threads, options):
    arrays = _check_inputs(inputs)
    for name in _ARRAYS & options.keys():   # for the gradients, whatever becomes of the caller's
        given = options[name]
        options[name] = given.numpy(force=True).copy() if isinstance(given, torch.Tensor) else copy.copy(given)
    if options["seed"] is None and options["dropout_p"] != 0:
        options["seed"] = int(torch.randint(2**63 - 1, ()))
    options["num_threads"] = torch.get_num_threads() if num_threads is None else num_threads
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    # Not in _Attention.forward: a warning names the line of the caller.
    results = doors.forward(**arrays, **options, return_weights=return_weights,
                            return_logsumexp=return_logsumexp or differentiated)
    results = [_tensor(x) for x in (results if isinstance(results, tuple) else (results,))]
    if differentiated:
        results = _Attention.apply(*inputs, results, doors.backward, options)
    results = results[: 1 + bool(return_weights)] + results[len(results) - bool(return_logsumexp):]
    return results[0] if len(results) == 1 else tuple(results)


def _check_inputs(inputs):
    """{name: array} of the tensors, which may be None from attn_mask on."""
    for name, x in zip(_INPUTS, inputs, strict=True):
        if x is None and name in _INPUTS[3:]:
            continue
        if not isinstance(x, torch.Tensor):
            cure = f"; torch.as_tensor({name}) is one" if isinstance(x, (np.ndarray, list)) else ""
            raise TypeError(f"{name}: expected a tensor, got a {type(x).__name__}{cure}")
        if x.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {x.device}; {name}.cpu() is there")
        if name in _INPUTS[:3] and x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}; {name}.float() "
                            f"casts")
        if name == "attn_mask" and x.dtype is not torch.bool and x.dtype not in _DTYPES:
            raise TypeError(f"attn_mask: expected bool (True = attend) or a float dtype (added), got {x.dtype}; for 1 "
                            f"= attend: attn_mask.bool()")
    query, key, value, *_ = inputs
    if key.dtype is not query.dtype and (query.dtype is not torch.float32 or key.dtype is torch.float64):
        raise TypeError(f"key: expected {query.dtype}, as query has (or a 16-bit one under a float32 query), got "
                        f"{key.dtype}; key.to(query.dtype) casts")
    if value.dtype is not key.dtype:
        raise TypeError(f"value: expected the dtype of key, {key.dtype}, got {value.dtype}; value.to(key.dtype) casts")
    return _arrays(inputs)


def _arrays(inputs):
    """{name: array or None}. Slopes and sinks are numbers to be cast, whose bits have no kind."""
    return {name: x if x is None else _array(x.float() if x.dtype is torch.bfloat16 and name in _INPUTS[4:] else x)
            for name, x in zip(_INPUTS, inputs, strict=True)}


def _tensor(array):
    """The same memory as a tensor, of uint16 as bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def _cast(array, dtype):
    """As in _checks, of float32 to what holds bfloat16 too."""
    if dtype != np.uint16 or array.dtype == dtype:
        return cast(array, dtype)
    return _array(torch.from_numpy(array).to(torch.bfloat16))


def _attend_dense(query, key, value, attn_mask, **options):
    out = None  # else laid out as by PyTorch's own kernel, the heads of a row together: joining them copies nothing
    if query.ndim == key.ndim == value.ndim == 4 and len(query) == len(key) == len(value):
        shape = *query.shape[:3], value.shape[3]
        out = torch.empty_permuted(shape, (0, 2, 1, 3), dtype=torch.from_numpy(query).dtype).numpy()
    door = scaled_dot_product_attention
    if any(x is not None and x.dtype == np.uint16 for x in (query, key, attn_mask)):
        door = functools.partial(attend, kinds=_KINDS)
    return door(query, key, value, attn_mask, out=out, **options)


# The doors, where uint16 is what holds bfloat16.
_DENSE = _Both(_attend_dense, functools.partial(backward, kinds=_KINDS, cast=_cast))
_PACKED = _Both(    # which have neither mask nor weights
    lambda attn_mask, return_weights, **options: attend_packed(**options, kinds=_KINDS),
    lambda attn_mask, **options: packed_backward(**options, kinds=_KINDS, cast=_cast))


def _function(torch):
    """The autograd function of `attention` and `varlen_attention`."""

    class Attention(torch.autograd.Function):
        """Makes tensors that have been computed the results of these inputs."""

        @staticmethod
        def forward(ctx, query, key, value, attn_mask, alibi_slopes, sinks, results, door, options):
            ctx.save_for_backward(query, key, value, attn_mask, alibi_slopes, sinks, results[0], results[-1])
            ctx.door, ctx.options = door, options
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*results[1:-1])
            return tuple(results)

        @staticmethod
        def backward(ctx, grad_out, *others):
            wanted = [name for name, needed in zip(_INPUTS, ctx.needs_input_grad, strict=False) if needed]
            gradients = AttentionBackward.apply(
                grad_out, others[-1], *ctx.saved_tensors, wanted, ctx.door, ctx.options)
            return *gradients, None, None, None

    class AttentionBackward(torch.autograd.Function):
        """The gradients, which have none: an error says so where PyTorch asks for them."""

        @staticmethod
        def forward(ctx, grad_out, grad_logsumexp, *saved):
            *inputs, out, logsumexp, wanted, door, options = saved
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            gradients = door(
                grad_out=_array(grad_out), **_arrays(inputs), out=_array(out), logsumexp=_array(logsumexp),
                grad_logsumexp=None if grad_logsumexp is None else _array(grad_logsumexp), wanted=wanted, **options)
            return tuple(None if gradient is None else _tensor(gradient).to(x.dtype)
                         for x, gradient in zip(inputs, gradients, strict=True))

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError("cattn.integrations.torch.attention: its gradients have no derivative")

    return Attention


if "torch" in sys.modules:  # so that its list of implementations has this one
    with contextlib.suppress(ImportError):
        _need_torch()
