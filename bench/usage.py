"""What the user of a program can put right: told in one line, exit status 2."""

import argparse
import importlib.util
import math
import sys

MOST_THREADS = 1024  # more is a typing error, which would start as many


class UsageError(Exception):
    """Something the user can put right; the message is all that is printed."""


def require(names, cure="README.md says how to install the demo"):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)} ({cure})")


def number(convert, lowest, highest, text):
    """The type of an argument: a number within limits."""
    try:
        value = convert(text)
    except ValueError:
        value = math.nan
    if not lowest <= value <= highest:
        kind = "an int" if convert is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {kind} from {lowest} to {highest}, got {text!r}")
    return value


def check_text(arguments):
    """Those of the command line: bytes that Python could not decode have become lone surrogates."""
    if any("\ud800" <= letter <= "\udfff" for letter in "".join(arguments)):
        raise UsageError(f"expected arguments in UTF-8, got {arguments}")


def status_of(program, work):
    """The exit status of `program`, which is work()."""
    try:
        return work() or 0
    except UsageError as error:
        print(f"{program}:", " ".join(str(error).split()), file=sys.stderr)
        return 2
