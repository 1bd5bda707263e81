"""The process of one implementation of bench.models: `python -m bench.models_torch NAME THREADS`, see bench.worker.

NAME is what transformers calls it ("eager", "sdpa", "cattn"), "enable": sdpa under cattn.integrations.torch, or
"float64": sdpa in float64, but for what models themselves compute in float32.

A function for each family of models returns (run, answer): run() is what is timed, answer() a list of arrays to check.
"""

import ctypes
import gc
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional

from .worker import serve, time_calls
from .workloads import MODELS

LLAMA = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": None}  # as SmolLM2-135M; nothing ends an answer
WIDE = "float64"
STEPS = 8  # of decoding, timed together


def new_model(config, implementation, make=transformers.AutoModel):
    """With the same weights for every implementation."""
    wide = implementation == WIDE
    torch.manual_seed(0)
    model = make.from_config(config, attn_implementation="sdpa" if wide else implementation, dtype=torch.float32)
    return (model.double() if wide else model).eval()


def random_tokens(batch, seq_len, vocab_size):
    return torch.randint(10, vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(1))


def random_numbers(dtype, *shape):
    """The same of every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def half_padding(batch, seq_len):
    """(batch, seq_len), 1 for tokens: rows of all lengths, evenly spread, half of the array in all, at the left."""
    lengths = torch.linspace(seq_len, 1, batch).round()
    return (torch.arange(seq_len) < lengths[:, None]).long()


def first_result(forward, **inputs):
    """(run, answer) of a model whose first result is all that is looked at."""
    return partial(forward, **inputs), lambda: [forward(**inputs)[0]]


def bert(implementation, batch, seq_len, padding="none"):
    """padding: "none"; "half" of the tokens; or "left out", where that can be: sentences one after the other."""
    config = transformers.BertConfig()
    model = new_model(config, implementation)
    tokens = random_tokens(batch, seq_len, config.vocab_size)
    is_token = torch.ones_like(tokens) if padding == "none" else half_padding(batch, seq_len)
    inputs = {"input_ids": tokens, "attention_mask": is_token}
    if padding == "left out" and implementation == "cattn":
        collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        sentences = [row[is_any.bool()].tolist() for row, is_any in zip(tokens, is_token, strict=True)]
        inputs = dict(collate([{"input_ids": sentence} for sentence in sentences]))
        del inputs["labels"]

    def answer():
        result = model(**inputs).last_hidden_state
        return [result[is_token.bool()] if len(result) == batch else result[0]]  # what is padding is nobody's

    return partial(model, **inputs), answer


def bert_training(implementation, batch, seq_len):
    """A classifier of two classes. Its answer: the loss, and the gradients of the first layer's attention, that depend
    on all that comes after; without dropout."""
    config = transformers.BertConfig()
    model = new_model(config, implementation, transformers.AutoModelForSequenceClassification)
    inputs = {"input_ids": random_tokens(batch, seq_len, config.vocab_size),
              "attention_mask": torch.ones(batch, seq_len, dtype=torch.long),
              "labels": torch.arange(batch) % 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def gradients():
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = model(**inputs).loss
        loss.backward()
        return loss

    def run():
        model.train()
        gradients()
        optimizer.step()

    def answer():
        loss = gradients()
        attention = model.bert.encoder.layer[0].attention.self
        return [loss.detach(), *(x.weight.grad for x in (attention.query, attention.key, attention.value))]

    return run, answer


def vit(implementation, batch):
    config = transformers.ViTConfig()
    model = new_model(config, implementation)
    return first_result(model, pixel_values=random_numbers(model.dtype, batch, 3, 224, 224))


def whisper(implementation):
    config = transformers.WhisperConfig(d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048,
                                        decoder_layers=1, decoder_attention_heads=8, decoder_ffn_dim=2048)
    encoder = new_model(config, implementation).get_encoder()
    return first_result(encoder, input_features=random_numbers(encoder.dtype, 1, 80, 3000))


def new_llama(implementation):
    return new_model(transformers.LlamaConfig(**LLAMA), implementation, transformers.AutoModelForCausalLM)


def llama_prefill(implementation, seq_len):
    tokens = random_tokens(1, seq_len, LLAMA["vocab_size"])
    return first_result(new_llama(implementation), input_ids=tokens, logits_to_keep=1)


class Decode:
    """One more token, after a prompt that stays in the cache."""

    most = STEPS

    def __init__(self, model, prompt):
        self.model, self.length = model, prompt.shape[1]
        self.cache = model(prompt, logits_to_keep=1).past_key_values
        self.token = prompt[:, -1:]

    def prepare(self):
        more = self.cache.get_seq_length() - self.length
        if more:
            self.cache.crop(-more)

    def __call__(self):
        return self.model(self.token, past_key_values=self.cache).logits

    def answer(self):
        self.prepare()
        return [self()]


def llama_decode(implementation, seq_len):
    step = Decode(new_llama(implementation), random_tokens(1, seq_len, LLAMA["vocab_size"]))
    return step, step.answer


class Told(transformers.LogitsProcessor):
    """Lets a model say these tokens, whatever it would say: so all implementations say the same."""

    def __init__(self, tokens, prompt_length):
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids, scores):
        token = self.tokens[:, input_ids.shape[1] - self.prompt_length]
        return scores.scatter(1, token[:, None], torch.inf)


def llama_generate(implementation, batch, seq_len, count):
    """Greedily. Its answer: the logits before each token."""
    model = new_llama(implementation)
    is_token = half_padding(batch, seq_len).flip(1)
    prompts = random_tokens(batch, seq_len, LLAMA["vocab_size"]) * is_token  # 0: padding
    told = Told(random_tokens(batch, count, LLAMA["vocab_size"]), seq_len)
    options = {"attention_mask": is_token, "max_new_tokens": count, "do_sample": False, "logits_processor": [told]}

    def answer():
        return list(model.generate(prompts, **options, output_logits=True, return_dict_in_generate=True).logits)

    return partial(model.generate, prompts, **options), answer


def status_bytes(name):
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


class Worker:
    """What can be asked of the process, one method each."""

    def __init__(self, name, num_threads):
        torch.set_num_threads(num_threads)
        torch.set_num_interop_threads(1)
        torch.set_grad_enabled(False)
        warnings.simplefilter("ignore", FutureWarning)  # `past_key_values` is a name that all versions know
        transformers.logging.set_verbosity_error()
        self.implementation = name
        if name == "cattn":
            from cattn.integrations import huggingface

            huggingface.register()
        elif name == "enable":
            import cattn.integrations.torch

            cattn.integrations.torch.enable()
            self.implementation = "sdpa"
        self.run = None

    def _prepare(self, name):
        """The function that answers."""
        self.run = None  # drops the model before
        gc.collect()
        model = next(model for model in MODELS if model.name == name)
        self.run, answer = globals()[model.family](self.implementation, *model.arguments)
        return lambda: [x.numpy() for x in answer()]

    def save(self, name, path):
        np.savez(path, *self._prepare(name)())

    def load(self, name, path):
        """Prepare the model and run it once; the largest error, in units of the largest number of each result."""
        answers = self._prepare(name)()
        with np.load(path) as expected:
            pairs = list(zip(answers, expected.values(), strict=True))
        return float(np.max([np.abs(answer - right).max() / np.abs(right).max() for answer, right in pairs]))

    def measure(self, seconds):
        return time_calls(self.run, seconds)

    def memory(self, name):
        """Bytes that a call takes, at its peak, beside what lies there before it: the model, and what the first call
        has left."""
        self._prepare(name)
        self.run()
        self._prepare_call()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.run()
        taken = status_bytes("VmHWM") - before
        self.run = None
        return taken

    def share(self):
        """Of the time of a call, what scaled_dot_product_attention takes; without gradients."""
        original, spent = functional.scaled_dot_product_attention, 0.0

        def timed(*args, **kwargs):
            nonlocal spent
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent += time.perf_counter() - start

        functional.scaled_dot_product_attention = timed
        try:
            self._prepare_call()
            start = time.perf_counter()
            self.run()
            return spent / (time.perf_counter() - start)
        finally:
            functional.scaled_dot_product_attention = original

    def _prepare_call(self):
        getattr(self.run, "prepare", lambda: None)()


if __name__ == "__main__":
    serve(Worker)
