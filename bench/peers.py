"""The implementations that are compared: a class each, named after what it imports.

A peer is made with the number of threads; `version` says what runs. Its methods, one for each kind of workload that it
can do, take a workload and its arrays and return (run, to_array). run() is what is timed: whatever can be prepared
(the library's own tensors and layouts, padding, compiled graphs, causal masks) is prepared before. to_array(result) is
for the check.
"""

import math
import time
import warnings
from functools import partial

import numpy as np

from .workloads import SCALE, beside, joined


class Unsupported(Exception):
    """This peer has no operator for the workload; the message says what is missing."""


def identity(result):
    return result


class Cattn:
    modules = ("cattn",)

    def __init__(self, num_threads):
        import cattn

        self.cattn = cattn
        self.version = f"{cattn.__version__} ({cattn.isa})"
        cattn.set_num_threads(num_threads)

    def attention(self, work, arrays):
        options = {"is_causal": True} if work.is_causal else {}
        if "attn_mask" in arrays:
            options["attn_mask"] = arrays["attn_mask"]
        inputs = arrays["query"], arrays["key"], arrays["value"]
        return partial(self.cattn.scaled_dot_product_attention, *inputs, **options), identity

    def training(self, work, arrays):
        return partial(self._train, **arrays, is_causal=work.is_causal), joined

    def _train(self, grad_out, query, key, value, **options):
        cattn, inputs = self.cattn, (query, key, value)
        out, logsumexp = cattn.scaled_dot_product_attention(*inputs, **options, return_logsumexp=True)
        gradients = cattn.scaled_dot_product_attention_backward(grad_out, *inputs, out, logsumexp, **options)
        return out, gradients.query, gradients.key, gradients.value

    def layer(self, work, arrays):
        return partial(self._new_layer(work, arrays), arrays["x"]), identity

    def _new_layer(self, work, arrays):
        np.matmul(*np.ones((2, 300, 300), np.float32))  # as in most programs, NumPy's threads exist as well
        layer = self.cattn.MultiHeadAttention(work.shape[-1], work.num_heads)
        layer.load_state_dict(arrays["state"])
        return layer

    def training_layer(self, work, arrays):
        return partial(self._train_layer, self._new_layer(work, arrays), arrays["x"], arrays["grad_out"]), work.joined

    @staticmethod
    def _train_layer(layer, x, grad_out):
        out, pullback = layer.vjp(x, training=True)
        gradients = pullback(grad_out)
        return out, gradients.query, *gradients.parameters.values()

    def table(self, work, arrays):
        return partial(self.cattn.sinusoidal_encoding, *work.shape), identity

    def packed(self, work, arrays):
        if work.each:
            attend = partial(self.cattn.scaled_dot_product_attention, is_causal=work.is_causal)
            return partial(_one_by_one, attend, work.sequences(arrays)), _packed_again
        inputs = (arrays[name] for name in ("query", "key", "value", "cu_seqlens"))
        return partial(self.cattn.varlen_attention, *inputs, is_causal=work.is_causal), identity

    def paged(self, work, arrays):
        inputs = (arrays[name] for name in ("query", "key", "value", "block_table", "kv_lens"))
        scales = {name: array for name, array in arrays.items() if name.endswith("_scales")}
        return partial(self.cattn.paged_attention, *inputs, **scales), identity

    def cache(self, work, arrays):
        return CattnStep(self.cattn.KVCache, work, arrays), identity

    def merge(self, work, arrays):
        return partial(self.cattn.merge_states, **arrays), beside

    def rotary(self, work, arrays):
        out = arrays["x"] if work.in_place else np.empty_like(arrays["x"])
        return partial(self.cattn.rotary_embedding, **arrays, interleaved=False, out=out), identity

    def linear(self, work, arrays):
        return partial(self.cattn.linear, **arrays), identity


class CattnStep:
    """KVCache.attend of one more token, layer by layer; a new step where the last one is used up, or before."""

    most = 8  # layers: their keys stay in the core's own cache, as when a model is small

    def __init__(self, cache, work, arrays):
        num_heads, num_kv_heads, self.length, head_dim = work.shape
        self.token = arrays["query"], arrays["key"][-1:], arrays["value"][-1:]
        self.cache = cache(self.most, num_kv_heads, head_dim)
        self.sequence = self.cache.new()
        prompt = np.zeros((self.length - 1, num_heads, head_dim), np.float32)
        step = self.cache.extend(self.sequence, self.length - 1)
        for layer in range(self.most):
            self.cache.attend(layer, step, prompt, arrays["key"][:-1], arrays["value"][:-1])
        self.step, self.layer = None, self.most

    def prepare(self):
        if self.layer < self.most:
            self.cache.cancel(self.step)
        self.cache.truncate(self.sequence, self.length - 1)
        self.step, self.layer = self.cache.extend(self.sequence, 1), 0

    def __call__(self):
        if self.layer == self.most:
            self.prepare()
        self.layer += 1
        return self.cache.attend(self.layer - 1, self.step, *self.token)


class Numpy:
    """What one writes in NumPy when speed matters: BLAS for the products, everything else in place."""

    modules = ("numpy",)

    def __init__(self, num_threads=None):
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        self.version = f"{np.__version__} ({blas['name']} {blas['version']})"

    def attention(self, work, arrays):
        inputs = arrays["query"], arrays["key"], arrays["value"]
        return partial(self._attend, *inputs, self._bias(work, arrays)), identity

    @staticmethod
    def _bias(work, arrays):
        """What is added to the scores, None where nothing is."""
        mask = arrays.get("attn_mask")
        if work.is_causal:
            mask = np.tri(work.shape[3], work.shape[4], dtype=bool)
        if mask is not None and mask.dtype == bool:
            mask = np.where(mask, np.float32(0), np.float32(-np.inf))
        return mask

    def _attend(self, query, key, value, mask):
        shape, dtype = query.shape, query.dtype
        query, key, value = map(_at_least_float32, (query, key, value))
        powers, total = self._powers(_stacked(_scaled(query), key), key, mask)
        out = powers @ value
        out /= total
        return out.reshape(*shape[:-1], -1).astype(dtype, copy=False)

    @staticmethod
    def _powers(query, key, mask):
        """exp(score - the row's largest) and their sums."""
        scores = query @ key.swapaxes(-1, -2)
        if mask is not None:
            scores.reshape(*key.shape[:2], -1, *mask.shape)[...] += mask
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        return scores, scores.sum(-1, keepdims=True)

    def training(self, work, arrays):
        inputs = (arrays[name] for name in ("grad_out", "query", "key", "value"))
        return partial(self._train, *inputs, self._bias(work, arrays)), joined

    def _train(self, grad_out, query, key, value, mask):
        """out and the gradients. The weights are never divided by their sums: what they are multiplied with is."""
        shape, dtype = query.shape, query.dtype
        grad_out, query, key, value = map(_at_least_float32, (grad_out, query, key, value))
        query, grad_out = _stacked(_scaled(query), key), _stacked(grad_out, key)
        powers, total = self._powers(query, key, mask)
        out = powers @ value
        out /= total
        grad_out = grad_out / total
        of_value = powers.swapaxes(-1, -2) @ grad_out
        of_scores = grad_out @ value.swapaxes(-1, -2)
        of_scores -= (grad_out * out).sum(-1, keepdims=True)
        of_scores *= powers
        of_query = _scaled(of_scores @ key)
        of_key = of_scores.swapaxes(-1, -2) @ query
        results = out.reshape(shape), of_query.reshape(shape), of_key, of_value
        return [x.astype(dtype, copy=False) for x in results]

    def layer(self, work, arrays):
        state = arrays["state"]
        return partial(self._layer, arrays["x"], state, work.num_heads), identity

    def _layer(self, x, state, num_heads):
        heads = self._attend(*self._project(x, state, num_heads), None).swapaxes(1, 2)
        return self._project_back(heads.reshape(x.shape), state)

    @staticmethod
    def _project(x, state, num_heads):
        """(query, key, value)"""
        batch, seq_len, width = x.shape
        qkv = x.reshape(-1, width) @ state["in_proj_weight"].T
        qkv += state["in_proj_bias"]
        return qkv.reshape(batch, seq_len, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)

    @staticmethod
    def _project_back(heads, state):
        out = heads.reshape(-1, heads.shape[-1]) @ state["out_proj.weight"].T
        out += state["out_proj.bias"]
        return out.reshape(heads.shape)

    def training_layer(self, work, arrays):
        return partial(self._train_layer, **arrays, num_heads=work.num_heads), work.joined

    def _train_layer(self, x, state, grad_out, num_heads):
        batch, seq_len, width = x.shape
        rows, grad_rows = x.reshape(-1, width), grad_out.reshape(-1, width)
        of_heads = (grad_rows @ state["out_proj.weight"]).reshape(batch, seq_len, num_heads, -1).swapaxes(1, 2)
        heads, *of_qkv = self._train(of_heads, *self._project(x, state, num_heads), None)
        heads = heads.swapaxes(1, 2).reshape(x.shape)
        of_qkv = np.stack(of_qkv).transpose(1, 3, 0, 2, 4).reshape(-1, 3 * width)
        of_x = (of_qkv @ state["in_proj_weight"]).reshape(x.shape)
        of_in_proj = of_qkv.T @ rows, of_qkv.sum(0)
        of_out_proj = grad_rows.T @ heads.reshape(-1, width), grad_rows.sum(0)
        return self._project_back(heads, state), of_x, *of_in_proj, *of_out_proj

    def table(self, work, arrays):
        return partial(self._table, *work.shape), identity

    @staticmethod
    def _table(length, dim):
        frequency = np.float32(10000) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(-dim))
        angle = np.arange(length, dtype=np.float32)[:, None] * frequency
        table = np.empty((length, dim), np.float32)
        table[:, 0::2] = np.sin(angle)
        table[:, 1::2] = np.cos(angle)
        return table

    def packed(self, work, arrays):
        """A call for each sequence."""
        masks = {}
        if work.is_causal:
            masks = {n: np.where(np.tri(n, dtype=bool), np.float32(0), np.float32(-np.inf)) for n in work.lengths}
        calls = [(*qkv, masks.get(qkv[0].shape[2])) for qkv in work.sequences(arrays)]
        return partial(_one_by_one, self._attend, calls), _packed_again

    def paged(self, work, arrays):
        """A call for each sequence, whose keys and values lie in one array."""
        sequences = zip(arrays["query"], work.sequences(arrays), strict=True)
        calls = [(query[None, :, None], key[None], value[None]) for query, (key, value) in sequences]
        attend = self._attend_int8 if work.dtype == "int8" else partial(self._attend, mask=None)
        return partial(_one_by_one, attend, calls), _packed_again

    def _attend_int8(self, query, key, value):
        key, value = (x.astype(np.float32) for x in (key, value))
        return self._attend(query * SCALE, key, value, None) * SCALE

    def cache(self, work, arrays):
        """Keys and values in arrays with room for the token, whose row is written."""
        key, value = (np.ascontiguousarray(arrays[name].swapaxes(0, 1))[None] for name in ("key", "value"))
        query, *token = arrays["query"][:, :, None], arrays["key"][-1], arrays["value"][-1]
        return partial(self._store_and_attend, query, key, value, *token), lambda out: out[:, :, 0]

    def _store_and_attend(self, query, key, value, new_key, new_value):
        key[0, :, -1], value[0, :, -1] = new_key, new_value
        return self._attend(query, key, value, None)

    def merge(self, work, arrays):
        return partial(self._merge, **arrays), beside

    @staticmethod
    def _merge(outputs, logsumexps):
        largest = logsumexps.max(0)
        weights = np.exp(logsumexps - largest)
        total = weights.sum(0)
        weights /= total
        out = outputs[0] * weights[0, ..., None]
        for output, weight in zip(outputs[1:], weights[1:], strict=True):
            out += output * weight[..., None]
        return out, largest + np.log(total)

    def rotary(self, work, arrays):
        out = arrays["x"] if work.in_place else np.empty_like(arrays["x"])
        return partial(self._turn, **arrays, out=out), identity

    @staticmethod
    def _turn(x, cos, sin, out):
        """out may be x."""
        columns = cos.shape[-1]
        a, b = x[..., :columns], x[..., columns:]
        first = a * cos
        first -= b * sin
        second = np.multiply(b, cos, out=out[..., columns:])
        second += a * sin
        out[..., :columns] = first
        return out

    def linear(self, work, arrays):
        """Weights of fewer bits are widened in the call: kept, they would take the memory of float32."""
        return partial(self._linear, **arrays), identity

    @staticmethod
    def _linear(x, weight, weight_scales=None):
        weight = weight.astype(np.float32, copy=False)
        if weight_scales is not None:
            weight.reshape(*weight_scales.shape, -1)[...] *= weight_scales[..., None]
        return x @ weight.T


def _at_least_float32(array):
    """matmul has no BLAS for half precision."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _scaled(array):
    """Times 1 / sqrt(head_dim), a new array."""
    return array * array.dtype.type(1 / math.sqrt(array.shape[-1]))


def _stacked(query, key):
    """(batch, num_heads, seq_len_q, head_dim) -> (batch, num_kv_heads, group_size * seq_len_q, head_dim): one product
    per key head."""
    return query.reshape(*key.shape[:2], -1, query.shape[-1])


class Torch:
    modules = ("torch",)

    def __init__(self, num_threads):
        import torch

        self.torch = torch
        self.version = torch.__version__
        torch.set_num_threads(num_threads)
        torch.set_num_interop_threads(1)
        torch.set_grad_enabled(False)

    def _tensor(self, array):
        if array.dtype.name == "bfloat16":
            return self.torch.from_numpy(array.view(np.uint16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def _to_array(self, tensor):
        return (tensor.float() if tensor.dtype == self.torch.bfloat16 else tensor).numpy()

    def attention(self, work, arrays):
        tensors = {name: self._tensor(array) for name, array in arrays.items()}
        if work.is_causal:
            tensors["is_causal"] = True
        if work.shape[1] != work.shape[2]:
            tensors["enable_gqa"] = True
        return partial(self.torch.nn.functional.scaled_dot_product_attention, **tensors), self._to_array

    def training(self, work, arrays):
        """Query heads that share a key head: told so, or its copies made before; the faster."""
        tensors = {name: self._tensor(array) for name, array in arrays.items()}
        inputs = [tensors.pop(name).requires_grad_() for name in ("query", "key", "value")]
        grad_out = tensors.pop("grad_out")
        attend = partial(self.torch.nn.functional.scaled_dot_product_attention, **tensors, is_causal=work.is_causal)
        forwards = [partial(attend, *inputs)]
        if work.shape[1] != work.shape[2]:
            copies = partial(self._attend_copies, attend, *inputs, work.shape[1] // work.shape[2])
            forwards = [partial(attend, *inputs, enable_gqa=True), copies]
        candidates = [partial(self._train, forward, inputs, grad_out) for forward in forwards]
        run = candidates[0] if len(candidates) == 1 else min(candidates, key=_seconds_per_call)
        return run, lambda result: joined(self._to_array(part.detach()) for part in result)

    @staticmethod
    def _attend_copies(attend, query, key, value, group_size):
        return attend(query, *(x.repeat_interleave(group_size, 1) for x in (key, value)))

    def _train(self, forward, inputs, grad_out):
        with self.torch.enable_grad():
            out = forward()
        return out, *self.torch.autograd.grad(out, inputs, grad_out)

    def layer(self, work, arrays):
        layer, x = self._new_layer(work, arrays).eval(), self._tensor(arrays["x"])
        return partial(layer, x, x, x, need_weights=False), lambda result: self._to_array(result[0])

    def _new_layer(self, work, arrays):
        layer = self.torch.nn.MultiheadAttention(work.shape[-1], work.num_heads, batch_first=True)
        layer.load_state_dict({name: self._tensor(array) for name, array in arrays["state"].items()})
        return layer

    def training_layer(self, work, arrays):
        layer, x = self._new_layer(work, arrays).train(), self._tensor(arrays["x"]).requires_grad_()
        run = partial(
            self._train,
            lambda: layer(x, x, x, need_weights=False)[0],
            [x, *layer.parameters()],
            self._tensor(arrays["grad_out"]),
        )
        return run, lambda result: work.joined(self._to_array(part.detach()) for part in result)

    def table(self, work, arrays):
        return partial(self._table, *work.shape), self._to_array

    def _table(self, length, dim):
        torch = self.torch
        frequency = 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / -dim)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)

    def packed(self, work, arrays):
        """Padded, with a mask of the keys that are there, which causal sequences need not have; or one by one. Nested
        tensors took 5 times as long as padded ones (2.13, six sequences), and refuse is_causal."""
        attend = self.torch.nn.functional.scaled_dot_product_attention
        sequences, lengths = work.sequences(arrays), work.lengths
        if work.each:
            calls = [tuple(map(self._tensor, qkv)) for qkv in sequences]
            to_array = partial(_packed_again, one=self._to_array)
            return partial(_one_by_one, partial(attend, is_causal=work.is_causal), calls), to_array
        inputs = [self._tensor(_padded(arrays, work.shape[4])) for arrays in zip(*sequences, strict=True)]
        options = {"is_causal": True} if work.is_causal else {"attn_mask": self._mask(lengths, work.shape[4])}

        def to_array(result):
            outs = zip(self._to_array(result), lengths, strict=True)
            return np.concatenate([out[:, :length].swapaxes(0, 1) for out, length in outs])

        return partial(attend, *inputs, **options), to_array

    def _mask(self, lengths, longest):
        """(batch, 1, 1, longest): the keys that are there."""
        return self.torch.from_numpy(np.arange(longest) < lengths[:, None])[:, None, None]

    def paged(self, work, arrays):
        """Padded with a mask, or one by one: the faster."""
        if work.dtype == "int8":
            raise Unsupported("no int8 keys and values")
        options = {"enable_gqa": True} if work.shape[1] != work.shape[2] else {}
        attend = partial(self.torch.nn.functional.scaled_dot_product_attention, **options)
        sequences, query = work.sequences(arrays), self._tensor(arrays["query"])[:, :, None]
        calls = [(query[i : i + 1], *(self._tensor(x[None]) for x in pair)) for i, pair in enumerate(sequences)]
        candidates = [(partial(_one_by_one, attend, calls), partial(_packed_again, one=self._to_array))]
        if len(sequences) > 1:
            pairs = ([x[None] for x in arrays] for arrays in zip(*sequences, strict=True))
            inputs = [self._tensor(_padded(arrays, work.shape[4])) for arrays in pairs]
            padded = partial(attend, query, *inputs, attn_mask=self._mask(work.lengths, work.shape[4]))
            candidates.append((padded, lambda result: self._to_array(result)[:, :, 0]))
        return min(candidates, key=lambda candidate: _seconds_per_call(candidate[0]))

    def rotary(self, work, arrays):
        x, cos, sin = (self._tensor(arrays[name]) for name in ("x", "cos", "sin"))
        out = x if work.in_place else self.torch.empty_like(x)
        return partial(self._turn, x, cos, sin, out), self._to_array

    def _turn(self, x, cos, sin, out):
        """out may be x."""
        a, b = x.chunk(2, -1)
        first = self.torch.addcmul(a * cos, b, sin, value=-1)
        second = self.torch.addcmul(b * cos, a, sin)
        return self.torch.cat((first, second), -1, out=out)

    def linear(self, work, arrays):
        """In the weight's dtype, into which x is cast and from which the result; int8: the dynamic one."""
        torch, x = self.torch, self._tensor(arrays["x"])
        if work.dtype == "int8":
            return self._int8_linear(x, **{name: self._tensor(arrays[name]) for name in ("weight", "weight_scales")})
        weight = self._tensor(arrays["weight"])
        if work.dtype == "float32":
            return partial(torch.nn.functional.linear, x, weight), self._to_array
        return lambda: torch.nn.functional.linear(x.to(weight.dtype), weight).float(), self._to_array

    def _int8_linear(self, x, weight, weight_scales):
        torch = self.torch
        if torch.backends.quantized.engine == "qnnpack":
            raise Unsupported("qnnpack does not round x to 7 bits, but to 8 that the workload's are none of")
        scales = weight_scales[:, 0]
        with warnings.catch_warnings():  # its tensors of 8 bits are deprecated
            warnings.simplefilter("ignore")
            no_offsets = torch.zeros(len(scales), dtype=torch.int64)
            weight = torch.quantize_per_channel(weight * scales[:, None], scales, no_offsets, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        return partial(torch.ops.quantized.linear_dynamic, x, packed, True), self._to_array


class Onnxruntime:
    """ONNX `Attention` (opset 23) or `com.microsoft.MultiHeadAttention`: the faster, where both can do it; of pages
    `com.microsoft.GroupQueryAttention`; ONNX `RotaryEmbedding` (opset 23)."""

    modules = ("onnxruntime", "onnx")

    def __init__(self, num_threads):
        import onnx
        import onnxruntime

        self.onnx, self.ort = onnx, onnxruntime
        self.version = f"{onnxruntime.__version__} (onnx {onnx.__version__})"
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = num_threads
        self.options.inter_op_num_threads = 1

    def attention(self, work, arrays):
        if work.dtype not in ("float32", "float16"):
            raise Unsupported(f"no {work.dtype} kernel")
        candidates = [self._standard(work, arrays)]
        num_heads, num_kv_heads = work.shape[1:3]
        if work.dtype == "float32" and num_heads == num_kv_heads and work.mask != "bool":
            candidates.append(self._contrib(work, arrays))
        return min(candidates, key=lambda candidate: _seconds_per_call(candidate[0]))

    def _standard(self, work, arrays):
        """On (batch, heads, seq, dim), or on (batch, seq, heads * dim) where the views are of that layout."""
        inputs, attributes, to_array = dict(arrays), {"is_causal": int(work.is_causal)}, _first_output
        if work.strided:
            inputs |= {name: _tokens_first(arrays[name]) for name in ("query", "key", "value")}
            attributes |= {"q_num_heads": work.shape[1], "kv_num_heads": work.shape[2]}
            to_array = partial(_heads_first, work)
        return self._session("Attention", "", inputs, list(inputs), attributes), to_array

    def _contrib(self, work, arrays):
        inputs = {name: _tokens_first(arrays[name]) for name in ("query", "key", "value")}
        names = list(inputs)
        if "attn_mask" in arrays:
            inputs["attention_bias"] = arrays["attn_mask"][None, None]
            names += ["", "", "attention_bias"]  # no bias, no key_padding_mask
        attributes = {"num_heads": work.shape[1], "unidirectional": int(work.is_causal)}
        run = self._session("MultiHeadAttention", "com.microsoft", inputs, names, attributes)
        return run, partial(_heads_first, work)

    def paged(self, work, arrays):
        """On a cache (batch, num_kv_heads, longest, head_dim), which the token is written into where it lies: no copy
        of it is made."""
        batch, num_heads, num_kv_heads, _, longest, _ = work.shape
        key, value = ([x[None] for x in arrays] for arrays in zip(*work.sequences(arrays), strict=True))
        wide = arrays["query"].dtype, SCALE if work.dtype == "int8" else 1
        inputs = {
            "query": arrays["query"].reshape(batch, 1, -1),
            "key": _last_token(key, *wide),
            "value": _last_token(value, *wide),
            "past_key": _padded(key, longest),
            "past_value": _padded(value, longest),
            "seqlens_k": (arrays["kv_lens"] - 1).astype(np.int32),  # of each, one less than there are with the token
            "total_sequence_length": np.array([longest], np.int32),
        }
        names, attributes = list(inputs), {"num_heads": num_heads, "kv_num_heads": num_kv_heads}
        if work.dtype == "int8":
            inputs |= {"k_scale": np.array([SCALE]), "v_scale": np.array([SCALE])}
            names += [*[""] * 5, "k_scale", "v_scale"]
            attributes |= dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_TENSOR") | {"kv_cache_bit_width": 8}
        outputs = {"out": "query", "present_key": "past_key", "present_value": "past_value"}
        domain = "com.microsoft"
        session = self._session_of("GroupQueryAttention", domain, inputs, names, attributes, outputs)
        binding, values = session.io_binding(), self._values(inputs)
        for name, ort_value in values.items():
            binding.bind_ortvalue_input(name, ort_value)
        binding.bind_output("out")
        for name in ("key", "value"):
            binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])

        def run():
            session.run_with_iobinding(binding)
            return binding.get_outputs()

        return run, lambda result: _first_output(result).reshape(arrays["query"].shape)

    def rotary(self, work, arrays):
        if work.in_place:
            raise Unsupported("no operator in place")
        inputs = {"x": arrays["x"], "cos": arrays["cos"][None], "sin": arrays["sin"][None]}
        if work.shape[0] != 1:
            inputs |= {name: np.repeat(inputs[name], work.shape[0], axis=0) for name in ("cos", "sin")}
        return self._session("RotaryEmbedding", "", inputs, list(inputs), {"interleaved": 0}), _first_output

    def _session(self, operator, domain, inputs, names, attributes):
        """run() of a session; it keeps inputs and output in onnxruntime's own memory."""
        session = self._session_of(operator, domain, inputs, names, attributes, {"out": names[0]})
        return partial(session.run_with_ort_values, ["out"], self._values(inputs))

    def _values(self, inputs):
        return {name: self.ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}

    def _session_of(self, operator, domain, inputs, names, attributes, outputs):
        """A session of a single node; `outputs`: each has the dtype of an input."""
        helper = self.onnx.helper
        types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
        graph = helper.make_graph(
            [helper.make_node(operator, names, list(outputs), domain=domain, **attributes)],
            operator,
            [helper.make_tensor_value_info(name, types[name], array.shape) for name, array in inputs.items()],
            [helper.make_tensor_value_info(name, types[same], None) for name, same in outputs.items()],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        providers = ["CPUExecutionProvider"]
        return self.ort.InferenceSession(model.SerializeToString(), self.options, providers=providers)


def _one_by_one(attend, calls):
    """A call for each sequence."""
    return [attend(*arguments) for arguments in calls]


def _packed_again(results, one=identity):
    """(1, heads, length, head_dim) of each sequence -> (total, heads, head_dim)."""
    return np.concatenate([one(result)[0].swapaxes(0, 1) for result in results])


def _padded(arrays, longest):
    """(1, heads, length, head_dim) of each sequence -> (batch, heads, longest, head_dim), with zeros behind the end."""
    padded = np.zeros((len(arrays), arrays[0].shape[1], longest, arrays[0].shape[3]), arrays[0].dtype)
    for target, array in zip(padded, arrays, strict=True):
        target[:, : array.shape[2]] = array[0]
    return padded


def _last_token(arrays, dtype, scale):
    """(1, heads, length, head_dim) of each sequence -> (batch, 1, heads * head_dim)."""
    return np.stack([array[:, :, -1].reshape(1, -1) for array in arrays]).astype(dtype) * dtype.type(scale)


def _seconds_per_call(run):
    """Best of three, after one to warm up."""
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _tokens_first(array):
    """(batch, heads, seq, dim) -> (batch, seq, heads * dim), contiguous."""
    batch, _, seq_len, _ = array.shape
    return np.ascontiguousarray(array.swapaxes(1, 2)).reshape(batch, seq_len, -1)


def _first_output(result):
    return result[0].numpy()


def _heads_first(work, result):
    batch, num_heads, _, seq_len_q, _, _ = work.shape
    return _first_output(result).reshape(batch, seq_len_q, num_heads, -1).swapaxes(1, 2)


class Openvino:
    modules = ("openvino",)

    def __init__(self, num_threads):
        import openvino
        from openvino import opset13

        self.ov, self.ops = openvino, opset13
        self.core = openvino.Core()
        self.version = openvino.__version__.partition("-")[0]
        self.properties = {
            "INFERENCE_NUM_THREADS": num_threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the CPU has it
        }

    def attention(self, work, arrays):
        if work.dtype not in ("float32", "float16"):
            raise Unsupported(f"no {work.dtype} kernel")
        _, num_heads, num_kv_heads, seq_len_q, _, _ = work.shape
        if num_heads != num_kv_heads and seq_len_q > 1:
            raise Unsupported("no grouped query heads")
        parameters, nodes, tensors = [], [], []
        for name, array in arrays.items():
            swapped = work.strided and name != "attn_mask"
            if name == "query":  # the heads of a group become the rows of their key head
                array = array.reshape(array.shape[0], num_kv_heads, -1, array.shape[-1])
            if swapped:
                array = array.swapaxes(1, 2)
            tensors.append(self.ov.Tensor(array, shared_memory=True))
            parameters.append(self.ops.parameter(array.shape, array.dtype))
            order = np.array([0, 2, 1, 3])
            nodes.append(self.ops.transpose(parameters[-1], order) if swapped else parameters[-1])
        out = self.ops.scaled_dot_product_attention(*nodes, causal=work.is_causal)
        compiled = self.core.compile_model(self.ov.Model([out], parameters), "CPU", self.properties)
        self.inputs = tensors, arrays  # OpenVINO does not keep what it borrows
        request = compiled.create_infer_request()
        for i, tensor in enumerate(tensors):
            request.set_input_tensor(i, tensor)

        def run():
            request.start_async()
            request.wait()
            return request

        return run, lambda request: request.get_output_tensor().data.reshape(arrays["query"].shape)


PEERS = {peer.modules[0]: peer for peer in (Cattn, Numpy, Torch, Onnxruntime, Openvino)}
