"""Figure 7 of the paper: likeness to the pictures against obedience to the prompt.

    python textinv.py evaluate runs/*/*.safetensors --images examples/concepts --chart fig7.png

Needs matplotlib: pip install -e ".[plots]".
"""

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.evaluation import confidence


def tradeoff(scores: Mapping[str, Sequence[tuple[str, float, float]]]) -> bytes:
    """A PNG with a point for each setup, {setup: [(word, reconstruction, editability), ...]}: the
    mean over its words, with 95% confidence intervals where it has several."""
    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for setup, rows in scores.items():
        points = ([row[2] for row in rows], [row[1] for row in rows])
        (x, dx), (y, dy) = (confidence(p) if len(p) > 1 else (p[0], 0.0) for p in points)
        axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="o", capsize=3, elinewidth=0.8)
        axes.annotate(setup, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set_xlabel("editability: CLIP cosine to the prompt")
    axes.set_ylabel("reconstruction: CLIP cosine to the pictures")
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
