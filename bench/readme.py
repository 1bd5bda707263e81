"""Write a run into README.md, docs/benchmark.md and docs/pictures/benchmark.png: `python -m bench.readme BENCH.json`.

README gets a short table, docs/benchmark.md all of it, beside those of other machines, each between its markers; the
picture is of all rows.
"""

import argparse
import json
import sys
from pathlib import Path

from . import report

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
PAGE, PICTURE = "docs/benchmark.md", "docs/pictures/benchmark.png"
SHORT = {
    "prefill-512": "a paragraph, 8 heads x 512 tokens x 64",
    "prefill-2048-causal": "a page, causal, 8 x 2048 x 64",
    "encoder-32x128": "32 sentences, 12 x 128 x 64",
    "decode-4096": "a new token after 4096, 32 x 128",
    "layer-1x128-w768": "a layer with its projections, 128 x 768",
}


NUMBER = (int, float)
ROW = {
    "workload": str,
    "threads": int,
    "dtype": str,
    "limit": str,
    "flops": NUMBER,
    "nbytes": NUMBER,
    "quiet": NUMBER,
    "busy": bool,
    "results": {"cattn": dict, ...: dict},
}
RUN = {
    "machine": {"cpu": str, "isa": str, "system": str},
    "versions": {...: str},
    "limits": {...: {"fma": NUMBER, "read": NUMBER}},
    "rows": [ROW],
    "probes": {...: {"text": str}},
}


def missing(value, form, name=""):
    """Yields what `value` lacks of `form`: a type, a list's entries, a dictionary's keys; ... stands for every key."""
    kind = form if isinstance(form, (type, tuple)) else type(form)
    if not isinstance(value, kind):
        yield name
    elif kind is list:
        for number, entry in enumerate(value):
            yield from missing(entry, form[0], f"{name}[{number}]")
    elif kind is dict and form is not dict:
        for wanted, part in form.items():
            for key in value if wanted is ... else [wanted]:
                yield from missing(value.get(key), part, f"{name}.{key}")


def whole_run(text):
    """What python -m bench --json wrote; ValueError where it is none, or one that ended early."""
    data = json.loads(text)
    lacking = [name.removeprefix(".") for name in missing(data, RUN)]
    if lacking:
        raise ValueError(f"not what python -m bench --json writes: no {lacking[0] or 'dictionary'}, or no such thing")
    if "interrupted" in data or "error" in data:
        raise ValueError("a run that ended early: make a whole one")
    return data


def short(data):
    """README's table, under the machine's line."""
    most = list(data["limits"])[-1]
    rows = {row["workload"]: row for row in data["rows"] if str(row["threads"]) == most}
    missing = [name for name in SHORT if name not in rows]
    if missing:
        raise ValueError(f"no row of {', '.join(missing)}, which README shows: run python -m bench without --workloads")
    peers = report.peers_of(data)
    table = [["", "cattn, ms", *peers]]
    for name, words in SHORT.items():
        cells = [report.peer_cell(rows[name], peer) for peer in peers]
        table.append([words, report.time_cell(rows[name]), *cells])
    busy = " \\*: the machine was busy." if any(rows[name]["busy"] for name in SHORT) else ""
    return "\n".join(
        [
            f"{next(report.machine(data))}, {report.threads(most)}. Peers: their time in units of cattn's.{busy}",
            "",
            report.markdown_table(table),
            "",
            f"[All workloads, versions and limits]({PAGE})",
        ]
    )


def between_markers(page, text):
    """The page with the text between its markers, whatever was there."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no {START} followed by {END}")
    return f"{before}{START}\n{text}\n{END}{after}"


def beside_others(page, text):
    """The page with a machine's section between its markers: where the one of that heading was, else first."""
    _, _, rest = page.partition(START)
    sections = [f"## {section.strip()}" for section in f"\n{rest.partition(END)[0]}".split("\n## ")[1:]]
    heading = text.splitlines()[0]
    others = [section for section in sections if section.splitlines()[0] != heading]
    at = next((i for i, section in enumerate(sections) if section.splitlines()[0] == heading), 0)
    return between_markers(page, "\n\n".join([*others[:at], text.strip(), *others[at:]]))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, help="what python -m bench --json wrote")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="where README.md is")
    args = parser.parse_args(argv)
    pages, path = {}, args.root
    try:
        data = whole_run(args.json.read_text())
        for name, make, place in ("README.md", short, between_markers), (PAGE, report.markdown, beside_others):
            path = args.root / name
            pages[path] = place(path.read_text(), make(data))
        path = args.root / PICTURE
        path.parent.mkdir(exist_ok=True)
        report.plot(data, path)
        for path, text in pages.items():
            path.write_text(text)
    except Exception as error:  # whatever else may be in the file
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"bench.readme: {args.json}, {path}: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
