"""Calls on arrays that end, or start, at a page which nobody may touch: one byte read or written outside is a SIGSEGV.
Run in a process of its own by test_guard_pages.py."""

import ctypes
import itertools
import mmap

import numpy as np
from problems import BFLOAT16, DTYPES, FLOATS, INF, LAYOUTS, assert_same_bits, normal, problem
from test_linear import PAIRS, linear
from test_linear import problem as linear_problem
from tolerance import everything

import cattn
from cattn import _attention, _checks, _gradients
from cattn._linear import linear_backward
from cattn.reference._linear import StoredWeight

PAGE, PROT_NONE = mmap.PAGESIZE, 0
LIBC = ctypes.CDLL(None, use_errno=True)


def guarded_bytes(size, at_end, gap=0):
    """`size` bytes whose end (or start) is `gap` bytes from a page without access; another one is on the other side."""
    pages = -(-(size + gap) // PAGE)
    whole = np.frombuffer(mmap.mmap(-1, (pages + 2) * PAGE), np.uint8)
    for page in (0, pages + 1):
        if LIBC.mprotect(ctypes.c_void_p(whole.ctypes.data + page * PAGE), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = (pages + 1) * PAGE - size - gap if at_end else PAGE + gap
    return whole[start : start + size]


def guarded(x, at_end):
    """`x` with the same strides, its first or last byte next to the page; an unaligned one stays unaligned."""
    spans = [stride * (n - 1) for stride, n in zip(x.strides, x.shape, strict=True)]
    before, after = -sum(min(span, 0) for span in spans), sum(max(span, 0) for span in spans)
    memory = guarded_bytes(before + after + x.itemsize if x.size else 0, at_end, x.ctypes.data % x.dtype.alignment)
    y = np.ndarray(x.shape, x.dtype, memory, before if x.size else 0, x.strides)
    y[...] = x
    return y


class GuardedNumpy:
    """numpy, for a module that allocates through it."""

    def __init__(self, at_end):
        self.at_end = at_end

    def __getattr__(self, name):
        function = getattr(np, name)
        if name not in ("empty", "zeros", "array", "ascontiguousarray"):
            return function
        return lambda *args, **options: guarded(function(*args, **options), self.at_end)


SEQ_LENS_Q = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 24, 31, 33, 49, 65]
SEQ_LENS_KV = [1, 2, 3, 4, 5, 7, 8, 9, 13, 63, 64, 65, 127, 128, 129, 130]


def options_of(number, num_heads, seq_len_q, seq_len_kv):
    rng = np.random.default_rng(number)
    mask_shape = [(seq_len_q, seq_len_kv), (1, 1, 1, seq_len_kv), (2, num_heads, seq_len_q, seq_len_kv)][number % 3]
    kind = [bool, *FLOATS][number // 5 % 5]
    slopes_shape = (2, num_heads) if number // 5 % 2 else (num_heads,)
    seen = rng.random(mask_shape) < 0.8
    mask = seen if kind is bool else np.where(seen, rng.standard_normal(mask_shape), -INF).astype(kind)
    return [
        {},
        {"attn_mask": mask},
        {"is_causal": True, "q_offset": rng.integers(0, seq_len_kv, 2), "alibi_slopes": rng.random(slopes_shape)},
        {"kv_lens": rng.integers(0, seq_len_kv + 1, 2), "sinks": rng.standard_normal(num_heads), "softcap": 2.0},
        {"attn_mask": mask, "window": (seq_len_kv // 2, 3), "dropout_p": 0.2, "seed": number},
    ][number % 5]


def calls(head_dims, kernels):
    """(description, arrays, options): each head_dim with every dtype; the other lists go round."""
    layouts = list(LAYOUTS)
    for number, (head_dim, (dtype, kv_dtype), kernel) in enumerate(itertools.product(head_dims, DTYPES, kernels)):
        lens = [n for n in SEQ_LENS_Q if (n <= 4) == (kernel == "decode")]
        seq_len_q = lens[number // 3 % len(lens)]
        seq_len_kv = SEQ_LENS_KV[number // 5 % len(SEQ_LENS_KV)]
        head_dim_v = head_dim if number // 16 % 2 else 1 + number * 7 % 130
        num_kv_heads = 1 + number % 2
        arrays = problem(seq_len_q, seq_len_kv, head_dim, head_dim_v, num_heads=2, num_kv_heads=num_kv_heads,
                         dtype=dtype, kv_dtype=kv_dtype, seed=number)
        # Half of the keys and values contiguous: those are read in place.
        names = [layouts[number // 7**i % len(layouts)] if (number >> i) % 2 else "contiguous" for i in range(4)]
        arrays = [LAYOUTS[name](x) for name, x in zip(names, arrays, strict=False)]
        options = options_of(number, 2, seq_len_q, seq_len_kv)
        if number % 3 == 0:
            options["out"] = LAYOUTS[names[3]](np.zeros((2, 2, seq_len_q, head_dim_v), dtype))
        yield f"{[(x.shape, x.strides, str(x.dtype)) for x in arrays]} {list(options)}", arrays, options
    # Few rows whose K and V are read in place, with every kind of rest: of keys, and of 16-bit dimensions.
    if "decode" in kernels:
        rest = itertools.product((16, 48, 80, 272), (1, 15, 17, 130), DTYPES)
        for number, (head_dim, seq_len_kv, (dtype, kv_dtype)) in enumerate(rest):
            arrays = problem(1 + number % 4, seq_len_kv, head_dim, dtype=dtype, kv_dtype=kv_dtype, seed=number)
            yield f"in place, {[(x.shape, str(x.dtype)) for x in arrays]}", arrays, {}


def allocate_by(numpy):
    _attention.np = _checks.np = _gradients.np = numpy


def attention(head_dims, kernels=("decode", "prefill")):
    for description, arrays, options in calls(head_dims, kernels):
        allocate_by(np)
        expected = everything(*arrays, **options)
        expected = (expected[0].copy(), *expected[1:])
        for at_end in (True, False):
            print("at the end" if at_end else "at the start", description, flush=True)
            allocate_by(GuardedNumpy(at_end))
            same = {name: guarded(x, at_end) if isinstance(x, np.ndarray) else x for name, x in options.items()}
            results = everything(*(guarded(x, at_end) for x in arrays), **same)
            assert_same_bits(tuple(x.copy() for x in results), expected)
    allocate_by(np)


def gradients(head_dims):
    names = cattn.Gradients._fields
    for description, arrays, options in calls(head_dims, ["prefill"]):
        out, logsumexp = cattn.scaled_dot_product_attention(
            *arrays, **{name: x for name, x in options.items() if name != "out"}, return_logsumexp=True)
        given = options.pop("out", out).copy() + out.dtype.type(1), *arrays, out, logsumexp
        expected = cattn.scaled_dot_product_attention_backward(*given, **options, wanted=names)
        for at_end in (True, False):
            print("gradients at the end" if at_end else "gradients at the start", description, flush=True)
            allocate_by(GuardedNumpy(at_end))
            same = {name: guarded(x, at_end) if isinstance(x, np.ndarray) else x for name, x in options.items()}
            found = cattn.scaled_dot_product_attention_backward(
                *(guarded(x, at_end) for x in given), **same, wanted=names)
            allocate_by(np)
            for one, other in zip(found, expected, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert_same_bits(one.copy(), other)
    for dim, dtype, seq_len_kv in itertools.product((1, 24, 64), FLOATS, (7, 130, 600)):
        query, key, value = problem(9, seq_len_kv, dim, leading=(1,), num_heads=1, dtype=dtype)
        out, logsumexp = cattn.scaled_dot_product_attention(query, key, value, return_logsumexp=True)
        expected = cattn.scaled_dot_product_attention_backward(out, query, key, value, out, logsumexp)
        for behind in (True, False):
            print("gradients of keys that do not exist", dim, dtype, seq_len_kv, behind, flush=True)
            more = [beyond(guarded(x, behind), behind) for x in (key, value)]
            lengths = {"kv_lens": seq_len_kv} if behind else {"kv_starts": 600}
            found = cattn.scaled_dot_product_attention_backward(out, query, *more, out, logsumexp, **lengths)
            rows = slice(seq_len_kv) if behind else slice(600, None)
            for one, other in zip(found[1:3], expected[1:3], strict=True):
                assert np.count_nonzero(one) == np.count_nonzero(one[:, :, rows])
                if behind:  # else the blocks are others
                    assert_same_bits(one[:, :, rows], other)


def beyond(x, behind):
    """`x` with 600 more rows, behind or before its own: in no memory."""
    x = x if behind else x[:, :, ::-1]
    x = np.lib.stride_tricks.as_strided(x, (1, 1, x.shape[2] + 600, x.shape[3]), x.strides)
    return x if behind else x[:, :, ::-1]


def tables(dims):
    for number, (dim, dtype) in enumerate(itertools.product(dims, [np.float16, BFLOAT16, np.float32, np.float64])):
        length = [1, 2, 63, 64, 65, 130][number % 6]
        layout = ["interleaved", "concatenated", "cosines_first"][number // 2 % 3]
        options = {"layout": layout, "dtype": dtype, "offset": number}
        expected = cattn.sinusoidal_encoding(length, dim, **options)
        for at_end in (True, False):
            print("table", length, dim, options, at_end, flush=True)
            out = guarded(np.zeros((length, dim), dtype), at_end)
            assert_same_bits(cattn.sinusoidal_encoding(length, dim, **options, out=out).copy(), expected)


def projections(in_features):
    """x, weight, scales, bias and out of the projections' kernel, of every dtype, few rows and many."""
    layouts = [layout for name, layout in LAYOUTS.items() if "heads" not in name]
    numbers = itertools.count()
    for width, (dtype, weight_dtype), rows in itertools.product(in_features, PAIRS, (1, 3, 8, 17, 50)):
        number = next(numbers)
        out_features = [1, 7, 16, 33, 48, 50][number % 6]
        x, weight, bias = linear_problem(rows, width, out_features, dtype, weight_dtype)
        arrays = [x, *(weight.numbers, weight.scales)] if weight_dtype == "int8" else [x, weight]
        arrays += [bias[None], np.zeros((rows, out_features), dtype)]
        if number % 2:
            arrays = [layouts[(number // 2 + i) % len(layouts)](x) for i, x in enumerate(arrays)]
        expected = linear(x, weight, bias)
        for at_end in (True, False):
            print("projection", rows, width, out_features, dtype, [x.strides for x in arrays], at_end, flush=True)
            x, *weights, bias, out = (guarded(x, at_end) for x in arrays)
            weight = StoredWeight("int8", *weights) if weight_dtype == "int8" else weights[0]
            assert_same_bits(linear(x, weight, bias[0], out=out).copy(), expected)


def linear_gradients(in_features):
    """grad_out, x and the weight, of every dtype; as they are, and as views."""
    layouts = [layout for name, layout in LAYOUTS.items() if "heads" not in name]
    for number, (width, dtype, rows) in enumerate(itertools.product(in_features, FLOATS, (1, 3, 17, 50, 200))):
        out_features = [1, 7, 33, 48, 50, 130][number % 6]
        arrays = [normal(*shape, dtype=dtype, seed=i)
                  for i, shape in enumerate([(rows, out_features), (rows, width), (out_features, width)])]
        expected = linear_backward(*arrays, True, 1)
        if number % 2:
            arrays[:2] = (layouts[(number // 2 + i) % len(layouts)](x) for i, x in enumerate(arrays[:2]))
        for at_end in (True, False):
            print("gradients", rows, width, out_features, dtype, [x.strides for x in arrays], at_end, flush=True)
            assert_same_bits(linear_backward(*(guarded(x, at_end) for x in arrays), True, 1), expected)


def rotary(dims):
    """x, tables and out, of every dtype and both pairings; rows in place and others."""
    layouts = list(LAYOUTS.values())
    for number, (dim, dtype, interleaved) in enumerate(itertools.product(dims, FLOATS, (False, True))):
        x = layouts[number // 3 % len(layouts) if number % 2 else 0](normal(2, 3, 5, dim, dtype=dtype))
        cos, sin = cattn.rotary_table(5, dim // 2 * 2, dtype=dtype if number % 3 == 0 else np.float32)
        expected = cattn.rotary_embedding(x, cos, sin, interleaved=interleaved)
        for at_end in (True, False):
            print("rotary", dim, dtype, interleaved, x.strides, at_end, flush=True)
            own, cos, sin, out = (guarded(array, at_end) for array in (x, cos, sin, np.zeros_like(x)))
            assert_same_bits(cattn.rotary_embedding(own, cos, sin, interleaved=interleaved, out=out).copy(), expected)
            cattn.rotary_embedding(own, cos, sin, interleaved=interleaved, out=own)
            assert_same_bits(own.copy(), expected)


def packed(head_dims):
    """Packed sequences, and the same in pages of which the last, and the first, are full."""
    for number, (head_dim, (dtype, kv_dtype)) in enumerate(itertools.product(head_dims, DTYPES)):
        page_size = [1, 8, 16, 24, 64, 128][number % 6]
        lens = np.array([page_size * (1 + number % 4), 0, page_size * 2])
        cu_kv, cu_q = np.cumsum([0, *lens]), np.array([0, *[(1, 1, 2), (1, 0, 20), (3, 1, 40)][number % 3]]).cumsum()
        arrays = [normal(cu_q[-1], 4, head_dim, dtype=dtype), *(
            normal(cu_kv[-1], 2, head_dim, dtype=kv_dtype, seed=seed) for seed in (1, 2))]
        expected = cattn.varlen_attention(*arrays, cu_q, cu_kv, is_causal=True)
        table = np.full((3, 6), -1)
        table[0, : lens[0] // page_size] = np.arange(lens[0] // page_size)[::-1] + 2
        table[2, :2] = 1, 0
        pages = [np.empty((cu_kv[-1] // page_size, page_size, *x.shape[1:]), kv_dtype) for x in arrays[1:]]
        for new, x in zip(pages, arrays[1:], strict=True):
            for batch in (0, 2):
                for i in range(lens[batch] // page_size):
                    new[table[batch, i]] = x[cu_kv[batch] + i * page_size :][:page_size]
        for at_end in (True, False):
            print("packed", head_dim, dtype, kv_dtype, page_size, at_end, flush=True)
            query, key, value, *new = (guarded(x, at_end) for x in (*arrays, *pages))
            out = guarded(np.zeros_like(query), at_end)
            cattn.varlen_attention(query, key, value, cu_q, cu_kv, is_causal=True, out=out)
            assert_same_bits(out.copy(), expected)
            cattn.paged_attention(query, *new, guarded(table, at_end), lens, cu_q, out=out)
            assert_same_bits(out.copy(), expected)
            if dtype == np.float64:
                continue
            few = [np.rint(x.astype(np.float32) * 16).astype(np.int8) for x in pages]
            scales = [np.full(x.shape[:-1], 0.0625, np.float32) for x in few]
            in_float = [guarded((x * np.float32(0.0625)).astype(np.float32), at_end) for x in few]
            wide = cattn.paged_attention(query.astype(np.float32), *in_float, table, lens, cu_q)
            few, scales = [guarded(x, at_end) for x in few], [guarded(x, at_end) for x in scales]
            cattn.paged_attention(query, *few, table, lens, cu_q, key_scales=scales[0], value_scales=scales[1], out=out)
            assert_same_bits(out.copy(), wide.astype(dtype))


def merges(dims):
    """outputs, logsumexps, sinks and out of merge_states, of every dtype and layout."""
    layouts = list(LAYOUTS.values())
    for number, (dim, dtype, rows) in enumerate(itertools.product(dims, FLOATS, (1, 7, 17))):
        compute = np.result_type(dtype, np.float32)
        outputs = [normal(2, 2, rows, dim, dtype=dtype, seed=i) for i in range(3)]
        logsumexps = [normal(2, 2, rows, dtype=compute, seed=i) for i in range(3)]
        sinks, out = normal(2, 2, rows, dtype=compute, seed=9), np.zeros_like(outputs[0])
        if number % 2:
            arrays = (*outputs, *logsumexps, sinks, out)
            arrays = [layouts[(number // 2 + i) % len(layouts)](x) for i, x in enumerate(arrays)]
            outputs, logsumexps, sinks, out = arrays[:3], arrays[3:6], arrays[6], arrays[7]
        expected = cattn.merge_states(outputs, logsumexps, sinks=sinks)
        for at_end in (True, False):
            print("merge", rows, dim, dtype, [x.strides for x in (*outputs, sinks, out)], at_end, flush=True)
            same = ([guarded(x, at_end) for x in arrays] for arrays in (outputs, logsumexps))
            results = cattn.merge_states(*same, sinks=guarded(sinks, at_end), out=guarded(out, at_end))
            assert_same_bits(tuple(x.copy() for x in results), expected)


def many_keys():
    """Keys in several splits, which threads share; rows done again because their values overflow."""
    for at_end, dtype, seq_len_q in itertools.product((True, False), [FLOATS[0], FLOATS[1], BFLOAT16], (1, 8, 20)):
        query, key, value = problem(seq_len_q, 9001, 24, 17, leading=(1,), num_heads=1, dtype=dtype)
        value[...] = np.sign(value) * (1e307 if dtype == np.float64 else 3e38)
        print("many keys", at_end, dtype, seq_len_q, flush=True)
        results = everything(*(guarded(x, at_end) for x in (query, key, value)), num_threads=2)
        assert_same_bits(results, everything(query, key, value))


def touch_outside(at_end):
    """What the guard is for."""
    x = guarded(normal(5), at_end)
    ctypes.string_at(x.ctypes.data + x.nbytes if at_end else x.ctypes.data - 1, 1)
