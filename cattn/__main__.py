"""What this installation of cattn is, whether it is right, and what it is worth on this machine: `python -m cattn`."""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import time
from contextlib import suppress

SECTIONS = {
    "config": "versions, instruction sets, threads, NumPy's BLAS",
    "check": "a few hundred calls of every instruction set against cattn.reference",
    "speed": "ten typical calls against plain NumPy, and against what the machine can do at most",
}
SHOWN = 3  # failures of an instruction set that are printed in full
BAR = 16  # a full bar: NumPy takes 16 times as long


def section(text):
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(SECTIONS)}, got {text!r}")
    return text


def seconds(text):
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 3600:
        raise argparse.ArgumentTypeError(f"expected seconds above 0 and below 3600, got {text!r}")
    return number


def argument_parser():
    parser = argparse.ArgumentParser(
        prog="python -m cattn", description=__doc__.partition(":")[0] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="sections:\n" + "\n".join(f"  {name:8}{text}" for name, text in SECTIONS.items())
        + "\n\nExit status: 0; 1 where a check or NumPy's process fails; 130 after Ctrl-C.")
    add = parser.add_argument
    add("sections", nargs="*", type=section, metavar="SECTION", help=f"of: {', '.join(SECTIONS)}; all by default")
    add("--seconds", type=seconds, default=10.0, metavar="S", help="for all of speed (%(default)s)")
    add("--json", action="store_true", help="print one JSON object instead, and nothing else")
    return parser


class Progress:
    """A line that is overwritten, on a terminal; elsewhere a line now and then, on stderr."""

    def __init__(self, json_only):
        self.stream = sys.stdout if sys.stdout.isatty() and not json_only else sys.stderr
        self.width = 0
        self.last = time.monotonic()

    def show(self, text, at_once=False):
        if self.stream.isatty():
            text = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r{text:<{self.width}}", end="", file=self.stream, flush=True)
            self.width = len(text)
        elif at_once or time.monotonic() - self.last > 1.5:  # no wait is silent for 2 seconds
            print(text, file=self.stream, flush=True)
            self.last = time.monotonic()

    def clear(self):
        if self.width:
            print(f"\r{'':{self.width}}\r", end="", file=self.stream, flush=True)
            self.width = 0


class Report:
    """The sections: each prints as it goes, or only fills `data` where JSON is asked for."""

    def __init__(self, args):
        self.args = args
        self.progress = Progress(args.json)
        self.data = {}
        self.right = True

    def say(self, text=""):
        if not self.args.json:
            self.progress.clear()
            print(text, flush=True)
            self.progress.last = time.monotonic()

    def config(self):
        import cattn

        self.data["config"] = cattn.show_config(mode="dicts")
        if not self.args.json:
            cattn.show_config()

    def check(self):
        from cattn import _selfcheck

        start = time.perf_counter()
        checks = self.data["checks"] = {"calls": _selfcheck.CALLS, "isas": {}}
        results = {}
        self.say(f"check: {_selfcheck.CALLS} calls of each instruction set against cattn.reference in float64")
        try:
            for results in _selfcheck.run(_selfcheck.CALLS):
                done = next(iter(results.values())).calls
                self.progress.show(f"check: {done} of {_selfcheck.CALLS} calls, {', '.join(results)}")
        finally:
            for isa, result in results.items():
                checks["isas"][isa] = {"calls": result.calls, "worst": result.worst, "failures": result.failures}
                self._say_checked(isa, result)
            checks["seconds"] = time.perf_counter() - start
            self.right = checks["right"] = not any(result.failures for result in results.values())

    def _say_checked(self, isa, result):
        count = f"{result.calls - len(result.failures)} of {result.calls} calls right"
        self.say(f"{isa:14} {count}" + ("" if result.failures else f", errors up to {result.worst:.0%} of the bound"))
        for failure in result.failures[:SHOWN]:
            self.say(f"  WRONG: {failure}")
        if len(result.failures) > SHOWN:
            self.say(f"  and {len(result.failures) - SHOWN} more")

    def speed(self):
        import cattn
        from cattn import _speed
        from cattn._config import threads_text

        rows = self.data["rows"] = []
        config = cattn.show_config(mode="dicts")
        blas = config["blas"]
        count = "threads unknown" if blas["threads"] is None else threads_text(blas["threads"])
        self.say(f"speed: cattn ({config['isa']['used']}, {threads_text(config['threads']['count'])}) and NumPy "
                 f"{config['numpy']} ({blas['name'] or 'BLAS unknown'}, {count})")
        self.say(f"{'':35}{'cattn':>9}{'NumPy':>9}{'ratio':>8}")
        # Rows tell of themselves, where they are printed and do not take long.
        at_once = self.args.json or self.args.seconds > 15
        self.progress.show("speed: starting NumPy's process", at_once)
        try:
            for row in _speed.run(self.args.seconds,
                                  lambda work: self.progress.show(f"speed: measuring {work.name}", at_once)):
                rows.append(row)
                self.say(self._line(row, _speed))
                for note in row["notes"]:
                    self.say(f"    {note}")
        except _speed.PeerError as error:
            self.data["error"] = str(error)
            print(f"speed: {error}", file=sys.stderr)
        finally:
            self.progress.clear()
            if rows:
                self._say_summary(rows, _speed)

    def _line(self, row, speed):
        line = f"{row['name']:17}{speed.sizes(row):18}"
        line += "".join(f"{milliseconds(row[name]['median']):>9}" for name in ("cattn", "numpy"))
        width = max(min(shutil.get_terminal_size((100, 24)).columns - 84, BAR), 4)
        line += f"{row['ratio']:7.2f}x {bar(row['ratio'] / BAR, width):{width + 1}}"
        if "share" in row:
            line += f"{row['rate'] / 1e9:7.4g} G{row['unit']:7}{row['share']:5.0%}"
        return f"{line}  busy" if row["busy"] else line.rstrip()

    def _say_summary(self, rows, speed):
        quiet = [row["ratio"] for row in rows if not row["busy"]]
        mean = ""
        if quiet:
            which = "" if len(quiet) == len(rows) else " of the rows that are not busy"
            mean = f"; NumPy takes {statistics.geometric_mean(quiet):.2f} times as long (geometric mean{which})"
        fma = [row["limit"] for row in rows if row.get("unit") == "FLOP/s"]
        self.say(f"Medians in ms{mean}.")
        self.say("NumPy has a process of its own and takes turns with cattn: two pools of threads would fight for the "
                 "CPUs.")
        if fma:
            self.say(f"Percent: cattn's best call against the FMA peak of {fma[-1] / 1e9:.4g} GFLOP/s; decode, against "
                     "reading as many bytes.")
            if fma[-1] > 1.03 * fma[0]:
                self.say(f"The first rows were compared with {fma[0] / 1e9:.4g} GFLOP/s, which was measured too low.")
        busy = [row for row in rows if row["busy"]]
        if busy:
            least = min(row["quiet"] for row in busy)
            self.data["busy"] = (f"the machine was busy during {len(busy)} of {len(rows)} rows: probes found as little "
                                 f"as {least:.0%} of it")
            self.say(f"BUSY: {self.data['busy']},")
            self.say("other processes, other tenants of the cores or a CPU quota took the rest. These rows say little: "
                     "repeat when it is quiet.")


def milliseconds(seconds):
    return f"{1e3 * seconds:#.4g}".rstrip(".")


def bar(share, width):
    """`width` characters for 1, in eighths of a character where the encoding has them; an arrow beyond."""
    try:
        "█▏▶".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#" * width + ">" if share > 1 else "#" * round(share * width)
    if share > 1:
        return "█" * width + "▶"
    whole, eighths = divmod(round(share * width * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def main(argv=None):
    args = argument_parser().parse_args(argv)
    report = Report(args)
    wanted = [name for name in SECTIONS if name in args.sections or not args.sections]
    status = 0
    try:
        for number, name in enumerate(wanted):
            if number:
                report.say()
            getattr(report, name)()
    except KeyboardInterrupt:
        report.data["interrupted"] = True
        status = 130
    report.progress.clear()
    if args.json:
        print(json.dumps(report.data, indent=1, allow_nan=False))
    elif status:
        print("Interrupted: what stands above was measured, the rest was not.")
    if not report.right and not args.json:
        print("\nSomething is WRONG with this installation on this machine: please report it with the lines above.")
    return status if report.right and "error" not in report.data else 1


def write_nowhere(descriptor):
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    os.set_inheritable(descriptor, True)  # where it was closed, open() has given it this very number


def exit_after(main):
    """With its status; 130 after Ctrl-C, 143 after SIGTERM, 1 where nobody reads what it prints, as in
    `python -m cattn | head`, or it cannot be written. No traceback in any of these; what is open is closed."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # closed before Python began
            write_nowhere(descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        try:
            code = main()
        except KeyboardInterrupt:
            code = 130
        except SystemExit as end:
            code = end.code
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            with suppress(OSError):
                print(f"error: {error}", file=sys.stderr)
        write_nowhere(1)  # Python flushes both once more
        write_nowhere(2)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    exit_after(main)
