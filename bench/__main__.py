"""Measure cattn against its peers: `python -m bench`.

Every result is checked before it is timed. The table grows row by row; stderr says what is left. Exit status 1 when a
result is wrong or an implementation fails, 130 after Ctrl-C, which keeps the rows that are finished and draws them:
a second one leaves the picture out.
"""

import argparse
import importlib.util
import json
import sys
import time
from contextlib import closing
from functools import partial

import cattn
from cattn.__main__ import Progress, exit_after, seconds

from . import probes, report, runner
from .files import new_file, picture, replaced
from .peers import PEERS
from .usage import MOST_THREADS
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
    try:
        counts = sorted({int(count) for count in text.split(",")})
    except ValueError:
        counts = [0]
    if not 1 <= counts[0] <= counts[-1] <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 to {MOST_THREADS}, as in 1,2, got {text!r}")
    return counts


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
    add("--json", type=new_file, metavar="FILE", help="write the results, after each row")
    add("--plot", type=picture, metavar="FILE.png", help="draw them (needs matplotlib)")
    add("--list", action="store_true", help="print the workloads and why each is there")
    return parser


def is_chosen(work, args):
    return work.name in args.workloads if args.workloads else args.all or work.default


class Show:
    """What terminal and JSON file show of a run while it lasts."""

    def __init__(self, json_file, total, row_seconds):
        """total: the number of rows; row_seconds: the least that one takes."""
        self.json_file, self.total, self.row_seconds = json_file, total, row_seconds
        self.done = 0
        self.start = time.monotonic()
        self.progress = Progress(json_only=True)  # on stderr

    def about(self, text):
        """What comes next, and what is left: on a terminal in place, elsewhere a line."""
        row_seconds = self.row_seconds
        if self.done:
            row_seconds = max(row_seconds, (time.monotonic() - self.start) / self.done)
        left = row_seconds * (self.total - self.done)
        left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        self.progress.show(f"{self.done} of {self.total} rows done, about {left} left: {text}", at_once=True)

    def say(self, text):
        """On stderr, to stay."""
        self.progress.clear()
        print(text, file=sys.stderr, flush=True)

    def write(self, text):
        """A part of the table."""
        self.progress.clear()
        print(text, flush=True)

    def save(self, data):
        if self.json_file:
            with replaced(self.json_file) as part:
                part.write_text(json.dumps(data, indent=1) + "\n")


def main(argv=None):
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.plot and args.plot == args.json:
        parser.error(f"--json and --plot: expected two files, got {args.plot} twice")
    works = [work for work in WORKLOADS if is_chosen(work, args)]
    if args.list:
        for work in works:
            print(f"{work.name:26}{work.reason}")
        return 0

    counts = args.threads or sorted({1, cattn.get_num_threads()})
    missing = [peer for peer in args.peers if not runner.installed(peer)]
    peers = ["cattn", *(peer for peer in args.peers if peer not in missing)]
    if args.plot and len(peers) == 1:
        parser.error(f"--plot: no peer to draw, not installed: {', '.join(missing)}")
    left_out = [f"{peer} (not installed)" for peer in missing]
    if importlib.util.find_spec("ml_dtypes") is None:
        left_out += [f"{work.name} (ml_dtypes is not installed)" for work in works if work.dtype == "bfloat16"]
        works = [work for work in works if work.dtype != "bfloat16"]
    chosen = [name for name in probes.PROBES if not args.workloads or name in args.workloads]

    show = Show(args.json, len(works) + len(chosen), args.seconds * len(counts) * len(peers))
    for what in left_out:
        show.say(f"skipped: {what}")
    data, status = None, 0
    try:
        with closing(runner.run(works, peers, counts, args.seconds, show.about, show.say)) as measured:
            for data in measured:
                rows = report.by_workload(data)
                show.done = len(rows)
                show.save(data)
                show.write(report.lines(rows[-1], data) if rows else report.header(data))
        for name in chosen:
            show.about(name)
            data["probes"][name] = probes.run(name, counts[-1])
            show.done += 1
            show.save(data)
    except KeyboardInterrupt:
        status, end = 130, {"interrupted": True}
    except runner.PeerError as error:  # of cattn's process, which probes the machine
        status, end = 1, {"error": f"cattn: {error}"}
        show.say(end["error"])
    if data is None:
        show.progress.clear()
        return status
    if status:
        show.save(data | end)
    show.write(report.footer(data))
    if status == 130:
        show.write("\nInterrupted: what stands above was measured, the rest was not.")
    if args.plot and any(map(report.best_peer, data["rows"])):
        report.plot(data, args.plot)
    elif args.plot:
        show.say(f"not drawn, since no peer has a time: {args.plot}")
    is_right = all(report.is_right(result) for row in data["rows"] for result in row["results"].values())
    return status or int(not is_right)


if __name__ == "__main__":
    exit_after(main)
