"""Write the report of a run into README.md: `python -m bench.readme BENCH.json`."""

import argparse
import json
import sys
from pathlib import Path

from .report import markdown

START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def with_report(readme, data):
    """The README text with the report of `data` between the markers, whatever was there."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no {START} followed by {END}")
    return f"{before}{START}\n{markdown(data)}\n{END}{after}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("json", type=Path, help="what python -m bench --json wrote")
    parser.add_argument("--readme", type=Path, default=Path(__file__).parent.parent / "README.md")
    args = parser.parse_args(argv)
    try:
        text = with_report(args.readme.read_text(), json.loads(args.json.read_text()))
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.readme: {args.json}, {args.readme}: {error}", file=sys.stderr)
        return 2
    args.readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
