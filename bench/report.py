"""Turns the JSON of a run into text, a Markdown table, a picture. Every number shown is derived here from that JSON."""

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
    medians = {peer: result["median"] for peer, result in row["results"].items() if peer != "cattn" and "best" in result}
    return min(medians, key=medians.get, default=None)


def is_right(data):
    """Nothing was wrong and nothing failed."""
    results = [result for row in data["rows"] for result in row["results"].values()]
    return all("best" in result or "unsupported" in result for result in results)


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
        peers = dict.fromkeys(peer for row in rows for peer in row["results"] if peer != "cattn")
        ratios = {peer: [ratio(row, peer) for row in rows] for peer in peers}
        ratios["the best of them"] = [ratio(row, best_peer(row)) for row in rows]
        means = {peer: [value for value in values if value] for peer, values in ratios.items()}
        parts = [f"{geometric_mean(values):.2f}x {peer}" for peer, values in means.items() if values]
        yield f"{threads(count)}, geometric mean over the workloads: " + ", ".join(parts)
        for row, value in zip(rows, ratios["the best of them"], strict=True):
            if value and value < 1:
                yield f"  behind at {row['workload']}: {best_peer(row)} takes {value:.2f} of cattn's time"


def text(data):
    """The whole report for a terminal: a line for each workload, number of threads and implementation."""
    lines = list(machine(data))
    for name, rows in groupby(data["rows"], key=lambda row: row["workload"]):
        rows = list(rows)
        lines += ["", f"{name} {tuple(rows[0]['shape'])} {rows[0]['dtype']}: {rows[0]['reason']}"]
        for row in rows:
            for peer, result in row["results"].items():
                lines.append(f"{row['threads']:>4} {peer:12}{_columns(row, peer, data['limits'])}")
    lines += ["", "Columns: threads; ms, best and median; speed of the best, and how much of the machine's limit that is;"]
    lines += ["largest error against float64; time in units of cattn's (medians).", "", *summary(data)]
    return "\n".join(lines + [probe["text"] for probe in data["probes"].values()])


def _columns(row, peer, limits):
    result = row["results"][peer]
    if "best" not in result:
        return verdict(result)
    value, unit = speed(row, result)
    share = percent(row, result, limits)
    of_limit = "" if share is None else f"{share:.1f} %"
    times = ratio(row, peer)
    in_cattns = "" if peer == "cattn" or times is None else f"{times:.2f}x"
    return (
        f"{milliseconds(result['best']):>9}{milliseconds(result['median']):>9}{value:9.1f} {unit:8}{of_limit:>8}"
        f"{result['error']:10.1e}{in_cattns:>9}"
    )


def markdown(data):
    """The report for README: a line for each workload."""
    counts = list(data["limits"])
    peers = [peer for peer in data["versions"] if peer not in ("python", "cattn")]
    head = ["workload", *(cell for count in counts for cell in (f"ms, {threads(count)}", "of limit")), "error", *peers]
    table = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, rows in groupby(data["rows"], key=lambda row: row["workload"]):
        cells = [name]
        for row in rows:
            result = row["results"]["cattn"]
            share = percent(row, result, data["limits"])
            cells.append(milliseconds(result["median"]) if "best" in result else verdict(result))
            cells.append("" if share is None else f"{share:.0f} %")
        cells.append(f"{result['error']:.0e}" if "best" in result else "")
        times = [ratio(row, peer) for peer in peers]
        cells += ["" if value is None else f"{value:.2f}x" for value in times]
        table.append(cells)
    lines = [f"{line}  " for line in machine(data)]  # two spaces: a line break
    lines += ["", *(f"| {' | '.join(cells)} |" for cells in table), ""]
    lines += [
        f"ms: median. Of limit: the best call as a part of the FMA peak (decode: of the read bandwidth) measured in the same run. "
        f"Error: the largest against float64. Peers: their time in units of cattn's, {threads(counts[-1])}.",
        "",
        *(f"* {line.strip()}" for line in summary(data)),
        *(f"* {probe['text']}" for probe in data["probes"].values()),
    ]
    return "\n".join(lines)


def plot(data, path):
    """Draw how much of the machine's limit each implementation reaches; the right edge is the limit."""
    from matplotlib.figure import Figure

    rows = [row for row in data["rows"] if row["limit"]]
    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(5 * len(data["limits"]) + 2, 0.3 * len(names) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(data["limits"]), sharey=True, squeeze=False)[0]
    for panel, count in zip(panels, data["limits"], strict=True):
        peers = [peer for peer in data["versions"] if peer not in ("python", "cattn")]
        shares = {
            peer: {
                row["workload"]: percent(row, row["results"].get(peer, {}), data["limits"])
                for row in rows
                if str(row["threads"]) == count
            }
            for peer in ("cattn", *peers)
        }
        panel.barh(names, [shares["cattn"].get(name) or 0 for name in names], color="lightsteelblue", label="cattn")
        for peer, marker in zip(peers, "osD^", strict=False):
            points = [(share, name) for name, share in shares[peer].items() if share is not None]
            panel.plot(*zip(*points, strict=True), marker, markersize=4, label=peer)
        panel.set(xlim=(0, 100), title=threads(count), xlabel="% of the FMA peak (decode: of the read bandwidth)")
        panel.invert_yaxis()
    panels[0].legend(loc="lower right")
    figure.suptitle(f"{data['machine']['cpu']}, {data['machine']['isa']}")
    figure.savefig(path, dpi=150)
