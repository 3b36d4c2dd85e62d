"""The paper's charts: figure 7, reconstruction against editability, and figure 13, measures by
training steps.

    python examples/evaluate.py runs/*/*.safetensors --images examples/concepts --chart fig7.png
    python examples/chart.py scores.csv fig7.png    # of a table that evaluate.py wrote

Needs matplotlib: pip install -e ".[plots]".
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import repository  # noqa: F401
from scores import confidence, summarize

from models.console import exit_status
from models.files import write_file


def tradeoff(scores: Mapping[str, Sequence[tuple[str, float, float]]]) -> bytes:
    """Return a PNG with a point for each setup, {setup: [(word, reconstruction, editability)]}:
    the mean over its words, with 95% confidence intervals where it has more than two."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for i, (setup, rows) in enumerate(scores.items()):
        points = ([row[2] for row in rows], [row[1] for row in rows])
        (x, dx), (y, dy) = (confidence(p) if len(p) > 2 else (mean(p), 0.0) for p in points)
        look = dict(color=f"C{i % 10}", marker="osDv^"[i // 3 % 5], markersize=6)
        bars = dict(capsize=2, elinewidth=0.5, linestyle="none")
        axes.errorbar(x, y, xerr=dx, yerr=dy, label=setup, **look, **bars)
    axes.set_xlabel("editability: CLIP cosine to the prompt")
    axes.set_ylabel("reconstruction: CLIP cosine to the pictures")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    return to_png(figure)


def curves(rows: Sequence[Mapping], measures: Sequence[str]) -> bytes:
    """Return a PNG with a panel for each set and measure, and in it a line for each number of
    pictures, over the training steps; rows as broad.py writes them."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = new_figure(3 * len(measures), 2.5 * len(names))
    panels = figure.subplots(len(names), len(measures), squeeze=False)
    for axes, name in zip(panels, names):
        for panel, measure in zip(axes, measures):
            for count in dict.fromkeys(row["pictures"] for row in rows):
                line = [row for row in rows if (row["name"], row["pictures"]) == (name, count)]
                points = [row["steps"] for row in line], [row[measure] for row in line]
                panel.plot(*points, "o-", label=f"pictures: {count}", markersize=3)
            panel.set_title(f"{name}: {measure}", fontsize=9)
            panel.set_xscale("log")
            panel.set_xticks(points[0], map(str, points[0]), fontsize=8)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    return to_png(figure)


def new_figure(width: float, height: float):
    """Return an empty figure, sizes in inches. Only here matplotlib, an extra, is imported."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def to_png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def write_chart(path: Path, draw: Callable[[], bytes]) -> bool:
    """Write the PNG that `draw` returns. Without matplotlib print a line and return False."""
    try:
        write_file(path, draw(), overwrite=True)
    except ImportError as error:
        print(f"no chart: {error}; pip install matplotlib", file=sys.stderr)
        return False
    print(f"wrote {path}")
    return True


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("chart", type=Path)
    args = parser.parse_args(argv)
    with open(args.table, newline="", encoding="utf-8") as file:
        rows = [row | dict(score=float(row["score"])) for row in csv.DictReader(file)]
    return 0 if write_chart(args.chart, lambda: tradeoff(summarize(rows))) else 1


if __name__ == "__main__":
    sys.exit(exit_status(main, "chart.py"))
