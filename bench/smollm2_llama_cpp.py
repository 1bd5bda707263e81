"""The model of bench.chat as llama.cpp runs it:

    python -m bench.smollm2_llama_cpp WEIGHTS THREADS CONTEXT... [-- MODEL]

WEIGHTS: Q4_1 as the package's file has them, or float16 or float32, to which those of the file are widened. In a
process of its own, without cattn. Prints, as JSON, for each context the tokens a second of prefill and decode.
"""

import json
import sys
import tempfile
from pathlib import Path

from .smollm2 import find_model
from .speed import measure
from .usage import require

CURE = "pip install llama-cpp-python, which compiles llama.cpp"


def widened(source, target, dtype):
    """A GGUF file like `source`, with matrices in this dtype; vectors, the weights of norms, stay float32."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weight.astype(dtype if weight.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def speeds(path, threads, contexts):
    from llama_cpp import Llama

    for context in contexts:
        model = Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
        yield measure(model.reset, lambda tokens, model=model: model.eval(tokens[0].tolist()), model.n_vocab(), context)
        model.close()


def main():
    require(("llama_cpp", "gguf"), CURE)
    (weights, threads, *contexts), model = sys.argv[1:], None
    if "--" in contexts:
        *contexts, _, model = contexts
    source = Path(model) if model else find_model()
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if weights != "Q4_1":
            path = Path(folder, "widened.gguf")
            widened(source, path, weights)
        print(json.dumps([tuple(speed) for speed in speeds(path, int(threads), map(int, contexts))]))


if __name__ == "__main__":
    main()
