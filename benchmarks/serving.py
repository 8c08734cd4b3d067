r"""What /predict costs beside the bare work: throughput, latency and CPU time, against the limit and other servers.

    python benchmarks/serving.py --data hymenoptera.zip --weights FOLDER [--backbone mobilenet_v3_small]
        [--concurrency 1,8,32,128] [--seconds 5] [--rounds 3] [--peers INTERPRETER]

Real servers in processes of their own on loopback, loaded by wrk (Debian package wrk), a JPEG a request, top 5 out;
the servers take turns in each round. The model's head is solved for on the zip, whose validation pictures engines are
compared on; a backbone without weights in the folder is a random one. The bare limit is this machine doing nothing
else, in whichever way is faster: decode and preprocess in one thread per core, forward in batches of eight on the
engine that Graft chose; or all of it in each of one thread per core. The naive server is what tutorials show: a `def`
route of FastAPI, PIL, torchvision's transforms, eager torch. --peers: also LitServe, BentoML and Ray Serve, see
_peer_model.py, by an interpreter that has them and Graft's packages; two of them take forms alone, so Graft is asked
by forms too. Prints medians (smallest to largest) over rounds, and the CPU time of each server's processes per
request.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from _serving import HERE, PICTURES, Measured, engine, loaded, prepare, served, warm_up, write_pictures
from _setup import hardware, markdown, spread

PEERS = ("litserve", "bentoml", "ray")
TAKE_FORMS = ("litserve", "bentoml")


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_pictures(arguments.data, folder / "pictures")
        prepare(folder / "data", arguments.backbone, arguments.weights, arguments.data)
        servers = [
            stack.enter_context(served("graft", ["-m", "app.main"], folder)),
            stack.enter_context(served("naive", [str(HERE / "_naive_server.py")], folder)),
        ]
        for peer in PEERS if arguments.peers else ():
            script, takes_forms = str(HERE / f"_peer_{peer}.py"), peer in TAKE_FORMS
            servers.append(
                stack.enter_context(
                    served(peer, [script], folder, interpreter=arguments.peers, takes_forms=takes_forms)
                )
            )
        if arguments.peers:
            servers.append(replace(servers[0], name="graft, by form", takes_forms=True))
        for server in servers:
            warm_up(server, folder)
        print(f"engine: {engine(folder)}", file=sys.stderr)
        found: dict[tuple[str, int], list[Measured]] = defaultdict(list)
        bare: list[dict[str, float]] = []
        for _ in range(arguments.rounds):
            bare.append(_bare(folder, arguments.seconds))
            for concurrency in arguments.concurrency:
                for server in servers:
                    found[server.name, concurrency].append(
                        loaded(server, folder, concurrency=concurrency, seconds=arguments.seconds)
                    )
                    print(server.name, concurrency, found[server.name, concurrency][-1], file=sys.stderr, flush=True)
    print(_table(found, bare))
    print(f"\n{arguments.backbone}, {PICTURES} photographs. {hardware(torch.device('cpu'))}.")


def _table(found: dict[tuple[str, int], list[Measured]], bare: list[dict[str, float]]) -> str:
    limit = statistics.median(each["per_second"] for each in bare)
    rows = [
        [
            "bare limit",
            "",
            spread((each["per_second"] for each in bare), 0),
            "1.00",
            spread((each["alone_ms"] for each in bare), 1),
            "",
            spread((each["cpu_ms"] for each in bare), 2),
            "",
        ]
    ]
    for (name, concurrency), rounds in found.items():
        rows.append(
            [
                name,
                str(concurrency),
                spread((each.per_second for each in rounds), 0),
                f"{statistics.median(each.per_second for each in rounds) / limit:.2f}",
                spread((each.p50 for each in rounds), 1),
                spread((each.p99 for each in rounds), 1),
                spread((each.cpu for each in rounds), 2),
                str(sum(each.errors for each in rounds)),
            ]
        )
    header = ["server", "at once", "a second", "of the limit", "p50, ms", "p99, ms", "CPU ms a request", "errors"]
    return markdown(header, rows)


def _bare(folder: Path, seconds: float) -> dict[str, float]:
    command = [sys.executable, str(HERE / "_bare_serving.py"), str(folder), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(("per_second", "cpu_ms", "alone_ms"), map(float, ran.stdout.split()), strict=True))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What /predict costs beside the bare work.")
    parser.add_argument("--data", type=Path, required=True, help="zip of JPEGs")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--backbone", default="mobilenet_v3_small")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", help="interpreter with litserve, bentoml and ray[serve]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
