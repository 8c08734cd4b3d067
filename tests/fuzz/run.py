"""Fuzzes one target by coverage, from the seeds on: python tests/fuzz/run.py archive --seconds 600

What it learns stays in build/fuzz/TARGET, so that the next run goes on from there. A finding ends it, not with 0, and
lies in build/fuzz/TARGET-found-…: put it into tests/fuzz/found/TARGET, where the tests replay it, and mend it.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(REPOSITORY), str(HERE.parent), str(HERE)]

# Coverage of what is read with; Pillow's and zlib's C code is not seen, what Python does with it is.
SEEN = ["app.datasets", "app.vision.images", "app.api.open_inference_wire", "app.api.strict_json", "PIL"]

with atheris.instrument_imports(include=SEEN):
    from seeds import SEEDS
    from targets import TARGETS

# An input that takes this long, or this much, is a finding.
LONGEST_SECONDS, MOST_MEBIBYTES = 5, 1024
MOST_BYTES = 64 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    arguments = parser.parse_args()
    learnt = REPOSITORY / "build" / "fuzz" / arguments.target
    learnt.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS[arguments.target]():
        (learnt / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    options = [
        f"-max_total_time={arguments.seconds}",
        f"-timeout={LONGEST_SECONDS}",
        f"-rss_limit_mb={MOST_MEBIBYTES}",
        f"-max_len={MOST_BYTES}",
        f"-artifact_prefix={learnt}-found-",
        "-print_final_stats=1",
    ]
    dictionary = HERE / f"{arguments.target}.dict"
    if dictionary.exists():
        options.append(f"-dict={dictionary}")
    target = TARGETS[arguments.target]
    found = HERE / "found" / arguments.target  # there is none before the first finding
    corpora = [str(folder) for folder in (learnt, found) if folder.is_dir()]
    atheris.Setup([sys.argv[0], *options, *corpora], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
