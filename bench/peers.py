"""The implementations that are compared: a class each, named after what it imports.

A peer is made with the number of threads; `version` says what runs. Its methods attention, layer and table
take a workload and its arrays and return (run, to_array). run() is what is timed: whatever can be prepared
(the library's own tensors and layouts, compiled graphs, causal masks) is prepared before. to_array(result) is
for the check.
"""

import math
import time
from functools import partial

import numpy as np


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

    def layer(self, work, arrays):
        np.matmul(*np.ones((2, 300, 300), np.float32))  # as in most programs, NumPy's threads exist as well
        layer = self.cattn.MultiHeadAttention(work.shape[-1], work.num_heads)
        layer.load_state_dict(arrays["state"])
        return partial(layer, arrays["x"]), identity

    def table(self, work, arrays):
        return partial(self.cattn.sinusoidal_encoding, *work.shape), identity


class Numpy:
    """What one writes in NumPy when speed matters: BLAS for the products, everything else in place."""

    modules = ("numpy",)

    def __init__(self, num_threads=None):
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        self.version = f"{np.__version__} ({blas['name']} {blas['version']})"

    def attention(self, work, arrays):
        mask = arrays.get("attn_mask")
        if work.is_causal:
            mask = np.tri(work.shape[3], work.shape[4], dtype=bool)
        if mask is not None and mask.dtype == bool:
            mask = np.where(mask, np.float32(0), np.float32(-np.inf))
        return partial(self._attend, arrays["query"], arrays["key"], arrays["value"], mask), identity

    @staticmethod
    def _attend(query, key, value, mask):
        dtype = query.dtype
        if dtype.itemsize == 2:  # matmul has no BLAS for half precision
            query, key, value = (x.astype(np.float32) for x in (query, key, value))
        batch, num_heads, seq_len_q, head_dim = query.shape
        num_kv_heads = key.shape[1]
        # One product per key head: its query heads are stacked as rows.
        query = query * query.dtype.type(1 / math.sqrt(head_dim))
        scores = query.reshape(batch, num_kv_heads, -1, head_dim) @ key.swapaxes(-1, -2)
        if mask is not None:
            scores.reshape(batch, num_kv_heads, -1, *mask.shape)[...] += mask
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(-1, keepdims=True)
        out = scores @ value
        out /= total
        return out.reshape(batch, num_heads, seq_len_q, -1).astype(dtype, copy=False)

    def layer(self, work, arrays):
        state = arrays["state"]
        return partial(self._layer, arrays["x"], state, work.num_heads), identity

    def _layer(self, x, state, num_heads):
        batch, seq_len, width = x.shape
        qkv = x.reshape(-1, width) @ state["in_proj_weight"].T
        qkv += state["in_proj_bias"]
        query, key, value = qkv.reshape(batch, seq_len, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
        heads = self._attend(query, key, value, None).swapaxes(1, 2).reshape(-1, width)
        out = heads @ state["out_proj.weight"].T
        out += state["out_proj.bias"]
        return out.reshape(x.shape)

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

    def layer(self, work, arrays):
        layer = self.torch.nn.MultiheadAttention(work.shape[-1], work.num_heads, batch_first=True).eval()
        layer.load_state_dict({name: self._tensor(array) for name, array in arrays["state"].items()})
        x = self._tensor(arrays["x"])
        return partial(layer, x, x, x, need_weights=False), lambda result: self._to_array(result[0])

    def table(self, work, arrays):
        return partial(self._table, *work.shape), self._to_array

    def _table(self, length, dim):
        torch = self.torch
        frequency = 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / -dim)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class Onnxruntime:
    """ONNX `Attention` (opset 23) or `com.microsoft.MultiHeadAttention`: the faster, where both can do it."""

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

    def _session(self, operator, domain, inputs, names, attributes):
        """A session of a single node; run() keeps inputs and output in onnxruntime's own memory."""
        helper = self.onnx.helper
        types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
        graph = helper.make_graph(
            [helper.make_node(operator, names, ["out"], domain=domain, **attributes)],
            operator,
            [helper.make_tensor_value_info(name, types[name], array.shape) for name, array in inputs.items()],
            [helper.make_tensor_value_info("out", types["query"], None)],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        providers = ["CPUExecutionProvider"]
        session = self.ort.InferenceSession(model.SerializeToString(), self.options, providers=providers)
        feeds = {name: self.ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        return partial(session.run_with_ort_values, ["out"], feeds)


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
