"""What decoding in processes costs /predict beside decoding in threads: the same model, server beside server, in turns.

    python benchmarks/decoding.py --data hymenoptera.zip --weights FOLDER

Needs wrk. Prints medians (smallest to largest) over rounds, and the CPU time of a server's processes per request.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from _serving import Measured, engine, loaded, prepare, served, warm_up, write_pictures
from _setup import hardware, markdown, spread

# What to compare, by the settings that make it.
WAYS = {"threads": {"GRAFT_DECODE_PROCESSES": "0"}, "processes": {"GRAFT_DECODE_PROCESSES": ""}}


def main() -> None:
    arguments = _arguments()
    found: dict[tuple[str, int], list[Measured]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_pictures(arguments.data, folder / "pictures")
        prepare(folder / "data", arguments.backbone, arguments.weights, arguments.data)
        servers = []
        for way, environment in WAYS.items():
            server = stack.enter_context(served("graft", ["-m", "app.main"], folder, environment))
            warm_up(server, folder)
            servers.append((way, server))
        print(f"engine: {engine(folder)}", file=sys.stderr)
        for turn in range(arguments.rounds):
            for concurrency in arguments.concurrency:
                for way, server in servers if turn % 2 else servers[::-1]:
                    measured = loaded(server, folder, concurrency=concurrency, seconds=arguments.seconds)
                    found[way, concurrency].append(measured)
                    print(way, concurrency, measured, file=sys.stderr, flush=True)
    rows = [
        [
            way,
            str(concurrency),
            spread((each.per_second for each in rounds), 0),
            spread((each.p50 for each in rounds), 2),
            spread((each.p99 for each in rounds), 1),
            spread((each.cpu for each in rounds), 2),
            str(sum(each.errors for each in rounds)),
        ]
        for (way, concurrency), rounds in found.items()
    ]
    print(markdown(["decoding", "at once", "a second", "p50, ms", "p99, ms", "CPU ms a request", "errors"], rows))
    for concurrency in arguments.concurrency:
        pairs = zip(found["processes", concurrency], found["threads", concurrency], strict=True)
        ratios = [ours.per_second / theirs.per_second for ours, theirs in pairs]
        print(f"\n{concurrency} at once: processes / threads, pair by pair: {spread(ratios, 2)}", end="")
        print(f", median {statistics.median(ratios):.2f}")
    print(
        f"\n{arguments.backbone}, {arguments.rounds} rounds of {arguments.seconds} s. {hardware(torch.device('cpu'))}."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What decoding in processes costs /predict.")
    parser.add_argument("--data", type=Path, required=True, help="zip of JPEGs")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    main()
