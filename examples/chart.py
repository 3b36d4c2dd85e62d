"""The paper's charts: figure 7, likeness to the pictures against obedience to the prompt; figure
13, measures by training steps.

    python textinv.py evaluate runs/*/*.safetensors --images examples/concepts --chart fig7.png
    python examples/chart.py scores.csv fig7.png    # of a table that `evaluate` wrote

Needs matplotlib: pip install -e ".[plots]".
"""

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import experiment  # noqa: F401  so that the repository is found

from models.evaluation import confidence, scores_of
from models.files import write_file


def tradeoff(scores: Mapping[str, Sequence[tuple[str, float, float]]]) -> bytes:
    """A PNG with a point for each setup, {setup: [(word, reconstruction, editability), ...]}: the
    mean over its words, with 95% confidence intervals where it has more than two."""
    figure = blank(8, 5)
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
    return png(figure)


def curves(rows: Sequence[Mapping], measures: Sequence[str]) -> bytes:
    """A PNG with a panel for each set and measure, a line for each number of pictures, over the
    training steps; rows as broad.py writes them."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = blank(3 * len(measures), 2.5 * len(names))
    panels = figure.subplots(len(names), len(measures), squeeze=False)
    for axes, name in zip(panels, names):
        for panel, measure in zip(axes, measures):
            for count in dict.fromkeys(row["pictures"] for row in rows):
                own = [row for row in rows if (row["name"], row["pictures"]) == (name, count)]
                points = [row["steps"] for row in own], [row[measure] for row in own]
                panel.plot(*points, "o-", label=f"pictures: {count}", markersize=3)
            panel.set_title(f"{name}: {measure}", fontsize=9)
            panel.set_xscale("log")
            panel.set_xticks(points[0], map(str, points[0]), fontsize=8)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    return png(figure)


def blank(width: float, height: float):
    """A figure of so many inches. matplotlib, an extra, is looked for only here."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("chart", type=Path)
    args = parser.parse_args(argv)
    with open(args.table, newline="", encoding="utf-8") as file:
        rows = [row | dict(score=float(row["score"])) for row in csv.DictReader(file)]
    try:
        write_file(args.chart, tradeoff(scores_of(rows)), overwrite=True)
    except ImportError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
