"""Turns the JSON of a run into text, Markdown or a picture: every number shown is derived here."""

from itertools import groupby
from statistics import geometric_mean

from .files import save_figure

LIMITS = {"fma": "FMA peak", "read": "read bandwidth"}


def speed(row, result):
    """(value, unit) of the best call: bytes where reading or writing is the work."""
    if row["limit"] == "read" or not row["flops"]:
        return row["nbytes"] / result["best"] / 1e9, "GB/s"
    return row["flops"] / result["best"] / 1e9, "GFLOP/s"


def percent(row, result, limits):
    """Of the FMA peak of as many threads, or of reading as many bytes; None where neither limits the work."""
    if not row["limit"] or "best" not in result:
        return None
    limit = row["bandwidth"] if row["limit"] == "read" else limits[str(row["threads"])]["fma"]
    if row["limit"] == "fma" and row["dtype"] == "float64":
        limit /= 2  # half as many lanes
    return 100 * speed(row, result)[0] / (limit / 1e9)


def ratio(row, peer):
    """The peer's time in units of cattn's (medians); None where one of them has none."""
    cattn, other = row["results"]["cattn"], row["results"].get(peer, {})
    return other["median"] / cattn["median"] if "best" in cattn and "best" in other else None


def best_peer(row):
    """The fastest of cattn's peers, None where none has a time."""
    medians = {
        peer: result["median"]
        for peer, result in row["results"].items()
        if peer != "cattn" and "best" in result
    }
    return min(medians, key=medians.get, default=None)


def is_right(result):
    """It was not wrong and did not fail."""
    return "best" in result or "unsupported" in result


def peers_of(data):
    """What cattn was measured against."""
    return [name for name in data["versions"] if name not in ("python", "cattn")]


def threads(count):
    return f"{count} thread" if int(count) == 1 else f"{count} threads"


def milliseconds(seconds):
    return f"{1e3 * seconds:#.4g}".rstrip(".")


def by_workload(data):
    """The rows of each workload: one for each number of threads."""
    return [list(rows) for _, rows in groupby(data["rows"], key=lambda row: row["workload"])]


def verdict(result):
    """What is not right of a result."""
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    return f"WRONG: error {result['error']}"


def time_cell(row):
    """cattn's milliseconds; a star: the machine was busy."""
    result = row["results"]["cattn"]
    if not is_right(result):
        return verdict(result).partition(":")[0]
    return milliseconds(result["median"]) + "*" * row["busy"]


def peer_cell(row, peer):
    """How many times as long as cattn a peer takes."""
    value, result = ratio(row, peer), row["results"].get(peer)
    if value is not None:
        return f"{value:.2f}x"
    return "" if result is None or is_right(result) else verdict(result).partition(":")[0]


def machine(data):
    """What ran where."""
    yield f"{data['machine']['cpu']}, {data['machine']['isa']}, {data['machine']['system']}"
    yield ", ".join(f"{name} {version}" for name, version in data["versions"].items())


def limits(data):
    """What the machine can do at most: all that any probe of the run has seen."""
    for count, rates in data["limits"].items():
        fma, read = rates["fma"] / 1e9, rates["read"] / 1e9
        nbytes = data["machine"].get("read_nbytes")
        of = f" (of {nbytes / 1e6:.0f} MB)" if nbytes else ""
        yield f"{threads(count)}: FMA peak {fma:.1f} GFLOP/s (float32), read bandwidth {read:.1f} GB/s{of}"


def summary(data):
    """Geometric means over the workloads, the workloads at which cattn is behind, and what a busy machine spoilt."""
    for count in data["limits"]:
        rows = [row for row in data["rows"] if str(row["threads"]) == count]
        quiet = [row for row in rows if not row["busy"]]
        ratios = {peer: [ratio(row, peer) for row in quiet] for peer in peers_of(data)}
        if len(ratios) > 1:
            ratios["the best of them"] = [ratio(row, best_peer(row)) for row in quiet]
        means = {peer: [value for value in values if value] for peer, values in ratios.items()}
        parts = [f"{geometric_mean(values):.2f}x {peer}" for peer, values in means.items() if values]
        if parts:
            which = "" if len(quiet) == len(rows) else " that are not busy"
            yield f"{threads(count)}, geometric mean over the workloads{which}: {', '.join(parts)}"
        for row in rows:
            value = ratio(row, best_peer(row))
            if value and value < 1:
                yield f"  behind at {row['workload']}: {best_peer(row)} takes {value:.2f} of cattn's time"
    yield from busy(data)
    yield from (probe["text"] for probe in data["probes"].values())


def busy(data):
    """Which rows a busy machine spoilt, all attempts of them."""
    rows = [row for row in data["rows"] if row["busy"]]
    if rows:
        least = min(row["quiet"] for row in rows)
        names = ",".join(dict.fromkeys(row["workload"] for row in rows))
        yield (
            f"BUSY: the machine was busy during {len(rows)} of {len(data['rows'])} rows (*, or noticed later): probes "
            f"found as little as {least:.0%} of it. These rows say little: repeat --workloads {names}"
        )


LEGEND = """
ms: cattn's median. Speed: of its best call, and its part of the FMA peak that was known then (GB/s: of reading as many
bytes). Error: cattn's largest against float64. Peers: their median in units of cattn's; empty where they cannot
or are not asked.
"""


def header(data):
    """What is known before the first row."""
    columns = f"{'workload':25} threads {'ms':>9}    {'speed':13} of limit  error"
    return "\n".join([*machine(data), "", columns + "".join(f"{peer:>13}" for peer in peers_of(data))])


def lines(rows, data):
    """The lines of a workload, one for each number of threads, and what is to be said of them."""
    found = []
    for row in rows:
        result = row["results"]["cattn"]
        time = time_cell(row) + " " * (not row["busy"])
        line = f"{row['workload'] if row is rows[0] else '':25}{row['threads']:>8} {time:>10}"
        if "best" in result:
            value, unit = speed(row, result)
            share = percent(row, result, data["limits"])
            share = "" if share is None else f"{share:.0f} %"
            line += f"{value:>8.4g} {unit:8}{share:>8}{result['error']:>7.0e}"
        found.append((f"{line:76}" + "".join(f"{peer_cell(row, peer):>13}" for peer in peers_of(data))).rstrip())
        found += [f"    {note}" for note in row["notes"]]
        wrong = {peer: result for peer, result in row["results"].items() if not is_right(result)}
        found += [f"    {peer}: {verdict(result)}" for peer, result in wrong.items()]
    return "\n".join(found)


def footer(data):
    """What is known after the last row."""
    return "\n".join([LEGEND, *limits(data), *summary(data)])


def markdown(data):
    """The whole report for a page, under the machine's name: a line for each workload."""
    counts, peers = list(data["limits"]), peers_of(data)
    name, *versions = machine(data)
    times = [cell for count in counts for cell in (f"ms, {threads(count)}", "of limit")]
    table = [["workload", *times, "error", *peers]]
    for rows in by_workload(data):
        cells = [rows[0]["workload"]]
        for row in rows:
            result = row["results"]["cattn"]
            share = percent(row, result, data["limits"])
            of = f" of {row['bandwidth'] / 1e9:.1f} GB/s" if row["limit"] == "read" else ""
            cells += [time_cell(row), "" if share is None else f"{share:.0f} %{of}"]
        cells.append(f"{result['error']:.0e}" if "best" in result else "")
        table.append(cells + [peer_cell(row, peer) for peer in peers])
    return "\n".join(
        [
            f"## {name}",
            "",
            *(f"{line}  " for line in (*versions, *limits(data))),  # two spaces: a line break
            "",
            markdown_table(table),
            "",
            "ms: median. Of limit: best call against the FMA peak of the same run (GB/s: bandwidth of reading as many "
            "bytes).",
            "Error: the largest against float64.",
            f"Peers: median in units of cattn's, {threads(counts[-1])}; empty where they cannot or are not asked.",
            "",
            *(f"* {line.strip()}".replace("(*", "(\\*") for line in summary(data)),
        ]
    )


def markdown_table(table):
    """Its first row is the header; all columns but the first are numbers."""
    head, *rows = ([cell.replace("*", "\\*") for cell in cells] for cells in table)
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, align, *rows])


COLOURS = {"numpy": "#8496b0", "torch": "#e07a3f", "onnxruntime": "#4f8f83", "openvino": "#8f6fb3"}


def plot(data, path):
    """Draw how many times as long as cattn the best peer takes: bars for the most threads, dots for fewer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    *fewer, most = data["limits"]
    workloads = by_workload(data)
    figure = Figure(figsize=(8.5, 0.2 * len(workloads) + 1.6), layout="constrained")
    panel = figure.subplots()
    panel.set_xscale("log")
    panel.axvline(1, color="black", linewidth=1)
    panel.grid(axis="x", color="lightgrey", linewidth=0.5)
    panel.set_axisbelow(True)
    for y, rows in enumerate(workloads):
        values = {str(row["threads"]): (ratio(row, best_peer(row)), best_peer(row)) for row in rows}
        values = {count: (value, COLOURS[peer]) for count, (value, peer) in values.items() if value}
        if most in values:
            value, colour = values[most]
            panel.barh(y, value - 1, left=1, color=colour, height=0.75)
            outermost, side, offset, ink = max(values.values())[0], "left", 4, "black"
            if value < 1:
                outermost, side, offset, ink = min(values.values())[0], "right", -4, "firebrick"
            place = {"xytext": (offset, 0), "textcoords": "offset points", "ha": side, "va": "center"}
            panel.annotate(f"{value:#.3g}", (outermost, y), fontsize=8, color=ink, **place)
        for count in values.keys() & fewer:
            value, colour = values[count]
            panel.plot(value, y, "o", color=colour, markeredgecolor="black", markersize=4)
    panel.set_yticks(range(len(workloads)), [rows[0]["workload"] + "*" * rows[-1]["busy"] for rows in workloads])
    panel.set_ylim(len(workloads) - 0.4, -0.6)
    low, high = panel.get_xlim()
    low, high = 0.92 * low, 1.05 * high  # room for the numbers
    panel.set_xlim(low, high)
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if low <= tick <= high]
    panel.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(axis="y", length=0, labelsize=8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.set_xlabel("left of 1x, cattn is slower", fontsize=8)
    title = f"How many times as long as cattn the fastest of {', '.join(peers_of(data))} takes"
    panel.set_title(f"{title}\n{next(machine(data))}", fontsize=9)
    for peer in peers_of(data):
        panel.barh(0, 0, left=1, color=COLOURS[peer], label=peer)
    panel.plot([], "s", color="lightgrey", label=threads(most))
    for count in fewer:
        panel.plot([], "o", color="white", markeredgecolor="black", markersize=4, label=threads(count))
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    save_figure(figure, path, dpi=150)
