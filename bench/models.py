"""Whole models of transformers, random weights in real architectures, by PyTorch's attention and by cattn's.

    python -m bench.models

Each of eager, sdpa, cattn (cattn.integrations.huggingface) and enable (sdpa under cattn.integrations.torch) has a
process of its own, whose results are checked against float64 before they are timed, in turns. The table is Markdown.
"""

import argparse
import sys
import tempfile
from contextlib import closing, suppress
from functools import partial
from importlib import metadata
from pathlib import Path

import cattn
from cattn.__main__ import Progress, seconds
from cattn._speed import how_quiet

from . import report, runner
from .__main__ import some_of, thread_counts
from .usage import check_text, require, status_of
from .workloads import MODELS

MODULE = "bench.models_torch"
IMPLEMENTATIONS = "eager", "sdpa", "cattn", "enable"
WIDE = "float64"  # sdpa, in float64: eager has a softmax of float32, and NaN for rows that see nothing
# Part of the largest number of each result by which float32 may differ from float64, beside ten times the error of
# eager; what a lost key or a wrong mask changes is far beyond that.
ROUNDING = 4 * 2.0**-23
MOST = 1e-4  # that part, of eager: some dozen layers, one after the other, have 1e-6 to 1e-5
# Of glibc: larger blocks are mapped each by itself and given back at once. So memory is what a call needs; else it is
# also what happens to lie between its blocks, a third more or less.
EXACT = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 17))


def argument_parser():
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--threads", type=thread_counts, metavar="N,...", help="default: 1 and all cores")
    add("--models", type=partial(some_of, [model.name for model in MODELS]), default="all", metavar="NAME,...",
        help="default: all")
    add("--seconds", type=seconds, default=6.0, help="for each implementation of a row (%(default)s)")
    add("--list", action="store_true", help="print the models and why each is there")
    return parser


def check(model, processes, folder):
    """{implementation: result} of a model, loaded and called once. Eager's error says what float32 can do."""
    expected = Path(folder) / "expected.npz"
    with closing(runner.Process(WIDE, cattn.get_num_threads(), MODULE)) as process:
        try:
            process.ask("save", model.name, str(expected))
        except runner.PeerError as error:
            raise runner.PeerError(f"{model.name}, {WIDE}: {error}") from None
    results = runner.check(model, {"eager": processes["eager"]}, expected, MOST)
    others = {name: process for name, process in processes.items() if name != "eager"}
    tolerance = 10 * results["eager"]["error"] + ROUNDING if results["eager"].get("correct") else MOST
    return results | runner.check(model, others, expected, tolerance)


def measure(model, num_threads, processes, meters, machine, limits, seconds, folder):
    """The row of a model; with memory where there are processes to see it."""
    results = check(model, processes, folder)
    before = runner.probe(machine, limits)
    for name, times in runner.take_turns(results, processes, seconds).items():
        results[name] |= times
    after = runner.probe(machine, limits)
    row = {"workload": model.name, "threads": num_threads, "results": results, "share": None}
    for name, meter in meters.items():
        if "best" in results[name]:
            with suppress(runner.PeerError):    # an empty cell
                results[name]["memory"] = meter.ask("memory", model.name)["result"]
    if "best" in results["sdpa"]:
        row["share"] = processes["sdpa"].ask("share")["result"]
    return row | {"seen": {name: min(before[name], after[name]) for name in before}}


HEAD = ["model", "threads", "attention", *IMPLEMENTATIONS, *(f"{name}, MB" for name in IMPLEMENTATIONS)]
LEGEND = """
Attention: its part of sdpa's time, without that of gradients. sdpa: milliseconds, the median; the others: how many
times as fast as sdpa. MB: what a call takes beside all that lies there before it, with the most threads. (\\*) The
machine was busy."""


def line(row, limits):
    """A row of the table."""
    results = row["results"]
    busy = r"\*" * how_quiet(row["seen"], limits)["busy"]
    cells = [row["workload"] + busy, str(row["threads"]), "" if row["share"] is None else f"{row['share']:.0%}"]
    base = results["sdpa"].get("median")
    for name in IMPLEMENTATIONS:
        result = results[name]
        if not report.is_right(result):
            cells.append(report.verdict(result).partition(":")[0])
        elif name == "sdpa":
            cells.append(report.milliseconds(base))
        else:
            cells.append(f"{base / result['median']:.2f}x" if base else report.milliseconds(result["median"]))
    memory = (results[name].get("memory") for name in IMPLEMENTATIONS)
    return [*cells, *("" if nbytes is None else f"{nbytes / 1e6:.0f}" for nbytes in memory)]


def start(num_threads, **variables):
    """{implementation: its process}"""
    return {name: runner.Process(name, num_threads, MODULE, **variables) for name in IMPLEMENTATIONS}


def rows(models, num_threads, seconds, about, has_memory):
    """Yields (a line of the table, {implementation: result}) of each model; `about` is told what comes next."""
    about(f"starting on {report.threads(num_threads)}")
    processes, machine = start(num_threads), runner.Process("cattn", num_threads)
    meters = start(num_threads, **EXACT) if has_memory else {}
    try:
        limits = {"fma": 0.0, "nop": 0.0}
        for _ in range(runner.LIMITS):
            runner.probe(machine, limits)
        for number, model in enumerate(models):
            about(f"{number} of {len(models)} models done on {report.threads(num_threads)}: {model.name}")
            with tempfile.TemporaryDirectory() as folder:
                row = measure(model, num_threads, processes, meters, machine, limits, seconds, folder)
            yield line(row, limits), row["results"]
    finally:
        for process in [*processes.values(), *meters.values(), machine]:
            process.close()


def run(args):
    models = [model for model in MODELS if model.name in args.models]
    if args.list:
        for model in models:
            print(f"{model.name:22}{model.reason}")
        return 0
    require(["torch", "transformers"], 'pip install "cattn[huggingface]"')
    progress, status = Progress(json_only=True), 0
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{runner.cpu_model()}, {cattn.isa}  \ncattn {cattn.__version__}, {versions}\n")
    print(report.markdown_table([HEAD]), flush=True)
    counts = args.threads or sorted({1, cattn.get_num_threads()})
    for count in counts:
        about = partial(progress.show, at_once=True)
        for cells, results in rows(models, count, args.seconds, about, has_memory=count == counts[-1]):
            progress.clear()
            print(f"| {' | '.join(cells)} |", flush=True)
            wrong = {name: result for name, result in results.items() if not report.is_right(result)}
            for name, result in wrong.items():
                print(f"{cells[0]}, {name}: {report.verdict(result)}", file=sys.stderr)
            status |= bool(wrong)
    print(LEGEND)
    return int(status)


def main(argv=None):
    args = argument_parser().parse_args(argv)

    def work():
        check_text(sys.argv[1:] if argv is None else argv)
        return run(args)

    try:
        return status_of("bench.models", work)
    except runner.PeerError as error:  # of a process without which nothing is known
        print(f"bench.models: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    from cattn.__main__ import exit_after

    exit_after(main)
