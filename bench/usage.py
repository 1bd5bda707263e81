"""What the user of a program can put right: told in one line, exit status 2."""

import importlib.util
import sys


class UsageError(Exception):
    """Something the user can put right; the message is all that is printed."""


def require(names, cure="README.md says how to install the demo"):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)} ({cure})")


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
