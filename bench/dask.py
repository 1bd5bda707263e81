"""Attention in chunks on a cluster of processes, by dask and cattn, beside one call of cattn in one process.

    python -m bench.dask

computes causal attention of 131072 tokens on 2 workers of 1 thread each, and by one process of 2 threads, in turns. It
tells the speed of both, what a worker takes in memory, how much the workers send each other, and whether the results
agree. The link to dask's dashboard comes first.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from functools import partial

import numpy as np

import cattn

from .usage import check_text, number, require, status_of

TOKENS, CHUNK, KEY_CHUNK, HEADS, HEAD_DIM = 131072, 8192, 16384, 1, 64
WORKERS, REPEATS = 2, 3
MOST_TOKENS, MOST_HEADS, MOST_WORKERS = 2**24, 1024, 256
# By so many ulps of the largest value may the results differ: cattn promises 4 and twice the error of plain NumPy, of
# each.
ULPS = 16


def argument_parser():
    parser = argparse.ArgumentParser(prog="python -m bench.dask", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    integer = partial(partial, number, int)
    add("--tokens", type=integer(1, MOST_TOKENS), default=TOKENS, metavar="N", help="queries and keys (%(default)s)")
    add("--chunk", type=integer(1, MOST_TOKENS), default=CHUNK, metavar="N", help="queries of a chunk (%(default)s)")
    add("--key-chunk", type=integer(1, MOST_TOKENS), default=KEY_CHUNK, metavar="N",
        help="keys of a chunk: more than queries, then there are fewer parts to send and merge (%(default)s)")
    add("--heads", type=integer(1, MOST_HEADS), default=HEADS, metavar="N", help=f"of {HEAD_DIM} columns (%(default)s)")
    add("--workers", type=integer(1, MOST_WORKERS), default=WORKERS, metavar="N",
        help="processes of one thread each; the one beside them has as many threads (%(default)s)")
    add("--memory", type=integer(1, 2**20), metavar="MB",
        help="of a worker, beyond about which dask moves chunks to the disk; default: its share of the machine's")
    add("--repeats", type=integer(1, 100), default=REPEATS, metavar="N", help="turns; medians count (%(default)s)")
    return parser


def arrays_of(args):
    """query, key and value as dask arrays in chunks of tokens, each head by itself."""
    import dask.array

    rng = dask.array.random.default_rng(0)
    shape = 1, args.heads, args.tokens, HEAD_DIM
    return [rng.standard_normal(shape, chunks=(1, 1, chunk, HEAD_DIM)).astype(np.float32)
            for chunk in (args.chunk, args.key_chunk, args.key_chunk)]


def wait_for(array, what):
    """`array`, computed and left on the workers; under a progress bar of its chunks."""
    from distributed import as_completed, futures_of
    from tqdm import tqdm

    array = array.persist()
    futures = futures_of(array)
    with tqdm(total=len(futures), desc=what, unit=" chunks") as progress:
        for future in as_completed(futures):
            future.result()  # raises what a task has raised
            progress.update()
    return array


def peak_memory():
    """Of this process, in bytes, since it was started."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


def bytes_sent(dask_worker):
    return dask_worker.transfer_outgoing_bytes_total


def measure(client, args):
    """{what: number} and the medians of seconds, by both."""
    from cattn.integrations import dask as integration

    client.run(cattn.preload)
    at_start = client.run(peak_memory)
    arrays = [array.persist() for array in arrays_of(args)]
    here = client.gather([client.compute(array) for array in arrays])
    times = {"dask": [], "cattn": []}
    for turn in range(args.repeats):
        sent = client.run(bytes_sent)
        start = time.perf_counter()
        # Of no use without dropout, but another seed gives the tasks other names: dask has no result of theirs.
        out = integration.scaled_dot_product_attention(*arrays, is_causal=True, seed=turn)
        result = wait_for(out, f"turn {turn + 1}")
        times["dask"].append(time.perf_counter() - start)
        sent = [after - sent[worker] for worker, after in client.run(bytes_sent).items()]
        peaks = [peak - at_start[worker] for worker, peak in client.run(peak_memory).items()]
        ours = result.compute()
        del result
        start = time.perf_counter()
        theirs = cattn.scaled_dot_product_attention(*here, is_causal=True, num_threads=args.workers)
        times["cattn"].append(time.perf_counter() - start)
    difference = float(np.abs(ours - theirs).max())
    tasks = sum(1 for key in out.__dask_graph__() if isinstance(key, tuple) and key[0].startswith("attend-"))
    return {
        "tasks": tasks, "sent": sum(sent), "peak": max(peaks), "difference": difference,
        "agree": difference <= ULPS * np.finfo(np.float32).eps * float(np.abs(here[2]).max()),
        "seconds": {name: statistics.median(each) for name, each in times.items()},
    }


def run(args):
    require(["dask", "distributed", "tqdm"], 'pip install "cattn[dask]" tqdm')
    from distributed import Client, LocalCluster

    with (LocalCluster(n_workers=args.workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0",
                       memory_limit="auto" if args.memory is None else f"{args.memory}MB", silence_logs=50) as cluster,
          Client(cluster) as client):
        note = "" if importlib.util.find_spec("bokeh") else " (bokeh, which draws it, is not installed)"
        print(f"dashboard: {client.dashboard_link}{note}", flush=True)
        found = measure(client, args)

    pairs, megabytes = args.heads * args.tokens * (args.tokens + 1) / 2, args.heads * args.tokens * HEAD_DIM * 4 / 1e6
    seconds = found["seconds"]
    rates = {name: f"{pairs / each / 1e9:.2f} thousand million pairs/s" for name, each in seconds.items()}
    print(f"{args.tokens} tokens, {args.heads} head{'s' * (args.heads > 1)} of {HEAD_DIM}, chunks of {args.chunk} "
          f"queries and {args.key_chunk} keys: {found['tasks']} tasks; query, key, value and result have "
          f"{megabytes:.1f} MB each")
    print(f"dask: {seconds['dask']:.2f} s on {args.workers} workers of 1 thread, {rates['dask']}; they sent each other "
          f"{found['sent'] / 1e6:.1f} MB; one took up to {found['peak'] / 1e6:.0f} MB of memory")
    print(f"cattn: {seconds['cattn']:.2f} s in one process of {args.workers} threads, {rates['cattn']}; {cattn.isa}")
    print(f"dask has {seconds['cattn'] / seconds['dask']:.2f} of its speed; results "
          f"{'agree' if found['agree'] else 'DIFFER'}: {found['difference']:.1e} apart at most")
    return int(not found["agree"])


def main(argv=None):
    args = argument_parser().parse_args(argv)

    def work():
        check_text(sys.argv[1:] if argv is None else argv)
        return run(args)

    return status_of("bench.dask", work)


if __name__ == "__main__":
    from cattn.__main__ import exit_after

    exit_after(main)
