"""Turns the JSON of a run into text, Markdown or a picture: every number shown is derived here."""

from itertools import groupby
from statistics import geometric_mean


def speed(row, result):
    """(value, unit) of the best call: bytes where reading or writing is the work."""
    if row["limit"] == "read" or not row["flops"]:
        return row["nbytes"] / result["best"] / 1e9, "GB/s"
    return row["flops"] / result["best"] / 1e9, "GFLOP/s"


def percent(row, result, limits):
    """Of the FMA peak or the read bandwidth of as many threads; None where neither limits the work."""
    if not row["limit"] or "best" not in result:
        return None
    limit = limits[str(row["threads"])][row["limit"]] / 1e9
    if row["limit"] == "fma" and row["dtype"] == "float64":
        limit /= 2  # half as many lanes
    return 100 * speed(row, result)[0] / limit


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


def is_right(data):
    """Nothing was wrong and nothing failed."""
    results = [result for row in data["rows"] for result in row["results"].values()]
    return all("best" in result or "unsupported" in result for result in results)


def peers_of(data):
    """What cattn was measured against."""
    return [name for name in data["versions"] if name not in ("python", "cattn")]


def threads(count):
    return f"{count} thread" if int(count) == 1 else f"{count} threads"


def milliseconds(seconds):
    return f"{1e3 * seconds:#.4g}".rstrip(".")


def verdict(result):
    """Why a result has no time."""
    if "unsupported" in result:
        return f"cannot: {result['unsupported']}"
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    return f"WRONG: error {result['error']}"


def machine(data):
    """What ran where, and what the machine can do at most."""
    yield f"{data['machine']['cpu']}, {data['machine']['isa']}, {data['machine']['system']}"
    yield ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    for count, limits in data["limits"].items():
        fma, read = limits["fma"] / 1e9, limits["read"] / 1e9
        yield f"{threads(count)}: FMA peak {fma:.1f} GFLOP/s (float32), read bandwidth {read:.1f} GB/s"


def summary(data):
    """Geometric means over the workloads, and the workloads at which cattn is behind."""
    for count in data["limits"]:
        rows = [row for row in data["rows"] if str(row["threads"]) == count]
        ratios = {peer: [ratio(row, peer) for row in rows] for peer in peers_of(data)}
        best = [ratio(row, best_peer(row)) for row in rows]
        if len(ratios) > 1:
            ratios["the best of them"] = best
        means = {peer: [value for value in values if value] for peer, values in ratios.items()}
        parts = [f"{geometric_mean(values):.2f}x {peer}" for peer, values in means.items() if values]
        if parts:
            yield f"{threads(count)}, geometric mean over the workloads: {', '.join(parts)}"
        for row, value in zip(rows, best, strict=True):
            if value and value < 1:
                yield f"  behind at {row['workload']}: {best_peer(row)} takes {value:.2f} of cattn's time"


LEGEND = """
Columns: threads; ms, best and median; speed of the best, and its part of the machine's limit; largest error
against float64; time in units of cattn's (medians).
"""


def text(data):
    """The whole report for a terminal: a line for each workload, number of threads and implementation."""
    lines = list(machine(data))
    for name, rows in groupby(data["rows"], key=lambda row: row["workload"]):
        rows = list(rows)
        lines += ["", f"{name} {tuple(rows[0]['shape'])} {rows[0]['dtype']}: {rows[0]['reason']}"]
        lines += [line for row in rows for line in _result_lines(row, data["limits"])]
    lines += [LEGEND, *summary(data), *(probe["text"] for probe in data["probes"].values())]
    return "\n".join(lines)


def _result_lines(row, limits):
    for peer, result in row["results"].items():
        line = f"{row['threads']:>4} {peer:12}"
        if "best" not in result:
            yield line + verdict(result)
            continue
        value, unit = speed(row, result)
        share = percent(row, result, limits)
        times = ratio(row, peer)
        line += f"{milliseconds(result['best']):>9}{milliseconds(result['median']):>9}{value:9.4g} {unit:8}"
        line += " " * 8 if share is None else f"{share:6.1f} %"
        line += f"{result['error']:10.1e}"
        yield line if peer == "cattn" or times is None else f"{line}{times:8.2f}x"


def markdown(data):
    """The report for README: a line for each workload."""
    counts = list(data["limits"])
    peers = peers_of(data)
    times = [cell for count in counts for cell in (f"ms, {threads(count)}", "of limit")]
    table = [["workload", *times, "error", *peers]]
    table.append(["---", *["---:"] * (len(table[0]) - 1)])
    for name, rows in groupby(data["rows"], key=lambda row: row["workload"]):
        cells = [name]
        for row in rows:
            result = row["results"]["cattn"]
            share = percent(row, result, data["limits"])
            cells.append(milliseconds(result["median"]) if "best" in result else verdict(result))
            cells.append("" if share is None else f"{share:.0f} %")
        cells.append(f"{result['error']:.0e}" if "best" in result else "")
        ratios = [ratio(row, peer) for peer in peers]
        cells += ["" if value is None else f"{value:.2f}x" for value in ratios]
        table.append(cells)
    return "\n".join(
        [
            *(f"{line}  " for line in machine(data)),  # two spaces: a line break
            "",
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
            "ms: median. Of limit: best call against the FMA peak (decode: read bandwidth) of the same run.",
            "Error: the largest against float64.",
            f"Peers: their median in units of cattn's, {threads(counts[-1])}.",
            "",
            *(f"* {line.strip()}" for line in summary(data)),
            *(f"* {probe['text']}" for probe in data["probes"].values()),
        ]
    )


def plot(data, path):
    """Draw how much of the machine's limit each implementation reaches; the right edge is the limit."""
    from matplotlib.figure import Figure

    places = {
        name: y
        for y, name in enumerate(dict.fromkeys(row["workload"] for row in data["rows"] if row["limit"]))
    }
    figure = Figure(figsize=(5 * len(data["limits"]) + 2, 0.25 * len(places) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(data["limits"]), sharey=True, squeeze=False)[0]
    for panel, count in zip(panels, data["limits"], strict=True):
        for peer in ("cattn", *peers_of(data)):
            points = [
                (places[row["workload"]], percent(row, row["results"][peer], data["limits"]))
                for row in data["rows"]
                if str(row["threads"]) == count and row["limit"] and "best" in row["results"][peer]
            ]
            y, share = zip(*points, strict=True) if points else ((), ())
            if peer == "cattn":
                panel.barh(y, share, color="lightsteelblue", label=peer)
            else:
                panel.plot(share, y, "o", markersize=4, label=peer)
        panel.set(
            xlim=(0, 100), title=threads(count), xlabel="% of the FMA peak (decode: of the read bandwidth)"
        )
        panel.set_yticks(list(places.values()), list(places))
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"{data['machine']['cpu']}, {data['machine']['isa']}")
    figure.savefig(path, dpi=150)
