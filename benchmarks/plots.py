"""The pictures of docs/methods.md, drawn from the runs in benchmarks/results.

    python benchmarks/plots.py [FOLDER]

Writes SVG files into FOLDER (docs/pictures): dots are seeds, bars their mean. Nothing is measured here.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

HERE = Path(__file__).parent
SETS = {
    "two_trees": "two_trees\n12",
    "hymenoptera": "hymenoptera\n244",
    "surface_defects": "surface_defects\n600",
    "tiny_longtail": "tiny_longtail\n1,022",
    "sign_digits": "sign_digits\n1,200",
}
METHODS = {
    "feature_extraction": "#4c78a8",
    "fine_tuning": "#f58518",
    "full_fine_tuning": "#54a24b",
    "from_scratch": "#b79a20",
    "auto": "#9467bd",
}
STARTS = {
    ("probe", "mobilenet_v3_small"): ("frozen ImageNet features", "#4c78a8", "-"),
    ("tuned", "mobilenet_v3_small"): ("tuned from ImageNet", "#f58518", "-"),
    ("probe", "graft_small"): ("frozen graft_small features", "#4c78a8", "--"),
    ("tuned", "graft_small"): ("tuned from graft_small", "#f58518", "--"),
    ("scratch in tuning's time", "random"): ("from nothing, in tuning's time", "#b79a20", "-"),
}
SHOTS = ("5", "10", "20")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "docs" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    # The same runs give the same file, to the byte; letters stay letters, in the reader's own font.
    matplotlib.rcParams |= {"svg.hashsalt": "graft", "svg.fonttype": "none", "font.size": 9}
    save(methods(runs("accuracy")), folder / "methods.svg")
    save(shots(runs("backbones")), folder / "shots.svg")


def runs(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / "results" / f"{name}.jsonl").read_text().splitlines()]


def methods(rows: list[dict[str, Any]]) -> pyplot.Figure:
    """Validation accuracy of every method on every set, `modern`."""
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(METHODS)
    for index, (method, colour) in enumerate(METHODS.items()):
        for place, name in enumerate(SETS):
            found = [
                r["val_accuracy"] for r in rows if (r["set"], r["method"], r["recipe"]) == (name, method, "modern")
            ]
            x = place + (index - (len(METHODS) - 1) / 2) * width
            axes.bar(x, statistics.mean(found), width * 0.9, color=colour, label=method if place == 0 else None)
            axes.plot([x] * len(found), found, "k.", markersize=2.5)
    axes.set_xticks(range(len(SETS)), SETS.values())
    axes.set_ylabel("validation accuracy")
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(METHODS), frameon=False)
    return figure


def shots(rows: list[dict[str, Any]]) -> pyplot.Figure:
    """Validation accuracy by the number of training pictures of a class, for each start."""
    names = [name for name in SETS if name != "two_trees"]  # six pictures of a class are all that it has
    figure, panels = pyplot.subplots(1, len(names), figsize=(8, 3), layout="constrained", sharey=True)
    for axes, name in zip(panels, names, strict=True):
        for (what, start), (label, colour, line) in STARTS.items():
            found: dict[int, list[float]] = defaultdict(list)
            for r in rows:
                if (r["set"], r["what"], r["start"]) == (name, what, start) and r["shots"] in SHOTS:
                    found[int(r["shots"])].append(r["val_accuracy"])
            counts = sorted(found)
            means = [statistics.mean(found[count]) for count in counts]
            spreads = [statistics.stdev(found[count]) for count in counts]
            axes.errorbar(counts, means, spreads, color=colour, linestyle=line, marker=".", capsize=2, label=label)
        axes.set_title(name, fontsize=9)
        axes.set_xticks([int(count) for count in SHOTS])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy")
    figure.supxlabel("training pictures of each class", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    # Letters are the reader's, and lines that end in spaces are nobody's.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


if __name__ == "__main__":
    main()
