"""Measure cattn against its peers: `python -m bench`.

Every result is checked before it is timed. Exit status 1 when one is wrong or an implementation fails.
"""

import argparse
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import cattn

from . import probes, report, runner
from .peers import PEERS
from .workloads import WORKLOADS


def some_of(choices, text):
    """The choices that NAME,NAME,... names; all of them for "all"."""
    names = list(choices) if text == "all" else text.split(",")
    for name in names:
        if name not in choices:
            raise argparse.ArgumentTypeError(f"expected all or some of {','.join(choices)}, got {name!r}")
    return names


def thread_counts(text):
    """N,N,... as a sorted list."""
    counts = sorted({int(count) for count in text.split(",")})
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on, got {text!r}")
    return counts


def seconds(text):
    if not 0 < float(text) < 3600:
        raise argparse.ArgumentTypeError(f"expected seconds above 0 and below 3600, got {text!r}")
    return float(text)


def new_file(text):
    """A path in a directory that exists: known before the measuring, not after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {str(path.parent)!r}")
    return path


def argument_parser():
    peers = [peer for peer in PEERS if peer != "cattn"]
    names = [work.name for work in WORKLOADS] + list(probes.PROBES)
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--threads", type=thread_counts, metavar="N,...", help="default: 1 and all cores")
    add(
        "--peers",
        type=partial(some_of, peers),
        default=["numpy"],
        metavar="PEER,...",
        help=f"all, or of: {', '.join(peers)}",
    )
    add(
        "--workloads", type=partial(some_of, names), metavar="NAME,...", help="default: all that are not slow"
    )
    add("--all", action="store_true", help="the slow workloads as well")
    add("--seconds", type=seconds, default=0.3, help="for each implementation of a workload (%(default)s)")
    add("--json", type=new_file, metavar="FILE", help="write the results")
    add("--plot", type=new_file, metavar="FILE.png", help="draw them (needs matplotlib)")
    add("--list", action="store_true", help="print the workloads and why each is there")
    return parser


def is_chosen(work, args):
    return work.name in args.workloads if args.workloads else args.all or work.default


def say(message):
    print(message, file=sys.stderr)


def main(argv=None):
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib, which is not installed")
    works = [work for work in WORKLOADS if is_chosen(work, args)]
    if args.list:
        for work in works:
            print(f"{work.name:26}{work.reason}")
        return 0

    counts = args.threads or sorted({1, cattn.get_num_threads()})
    peers = ["cattn"]
    for peer in args.peers:
        if runner.installed(peer):
            peers.append(peer)
        else:
            say(f"skipped: {peer} (not installed)")
    if importlib.util.find_spec("ml_dtypes") is None:
        for work in works:
            if work.dtype == "bfloat16":
                say(f"skipped: {work.name} (ml_dtypes is not installed)")
        works = [work for work in works if work.dtype != "bfloat16"]

    data = runner.run(works, peers, counts, args.seconds, say)
    chosen = [name for name in probes.PROBES if not args.workloads or name in args.workloads]
    data["probes"] = {name: probes.run(name, counts[-1]) for name in chosen}
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.plot:
        report.plot(data, args.plot)
    print(report.text(data))
    return 0 if report.is_right(data) else 1


if __name__ == "__main__":
    sys.exit(main())
