"""What a table of scores says: means with confidence intervals, and what each setup changes.

A table is a list of rows {"setup", "name", "kind", "prompt", "score"}, as evaluate.py writes them:
one for each prompt of each word. The intervals are Student's, "error bars are 95% confidence
intervals" (figure 7).
"""

import math
from collections.abc import Sequence

import numpy as np

POINTS = 2**20  # of the integrals below


def summarize(rows: Sequence[dict]) -> dict[str, list[tuple[str, float, float]]]:
    """Return {setup: [(name, reconstruction, mean editability), ...]}."""
    table: dict[str, list] = {}
    for setup, name in dict.fromkeys((row["setup"], row["name"]) for row in rows):
        of_word = [row for row in rows if (row["setup"], row["name"]) == (setup, name)]
        first = next(row["score"] for row in of_word if row["kind"] == "reconstruction")
        others = [row["score"] for row in of_word if row["kind"] != "reconstruction"]
        table.setdefault(setup, []).append((name, first, sum(others) / len(others)))
    return table


def print_scores(rows: Sequence[dict]) -> None:
    """Print both scores of each word, and their means over the words of each setup."""
    print(f"{'setup':20} {'word':20} reconstruction  editability")
    for setup, scores in summarize(rows).items():
        for name, first, second in scores:
            print(f"{setup:20.20} {name:20.20} {first:14.4f} {second:12.4f}")
        if len(scores) > 1:
            (a, da), (b, db) = (confidence([s[i] for s in scores]) for i in (1, 2))
            print(
                f"{setup:20.20} {'mean, 95% interval':20} {a:6.4f} +-{da:.4f} {b:7.4f} +-{db:.4f}"
            )


def print_differences(rows: Sequence[dict], base: str = "ours") -> None:
    """Print what each setup changes against `base`, over the words that both were measured on."""
    table = {s: {name: pair for name, *pair in scores} for s, scores in summarize(rows).items()}
    reference = table.pop(base)
    if table:
        print(f"\nagainst {base}      reconstruction      editability")
    for setup, pairs in table.items():
        both = [(pairs[name], reference[name]) for name in pairs]
        if len(both) > 1:
            changes = [confidence([a[i] - b[i] for a, b in both]) for i in (0, 1)]
            first, second = ("{:.3f} +-{:.3f}".format(*change) for change in changes)
            print(f"{setup:16} {first:>15} {second:>16}")


# ---------------------------------------------------------------------------- confidence intervals


def mean_and_error(values) -> tuple[int, float, float]:
    """Return the number of the values, their mean, and the mean's squared standard error."""
    values = np.asarray(values, np.float64).ravel()
    if len(values) < 2:
        raise ValueError(f"a spread needs two values at least, found {len(values)}")
    return len(values), float(values.mean()), float(values.var(ddof=1) / len(values))


def confidence(values, level: float = 0.95) -> tuple[float, float]:
    """Return the mean of values (n,), n >= 2, and half the width of its confidence interval."""
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies between 0 and 1, found {level}")
    n, mean, error = mean_and_error(values)
    return mean, student_quantile(level, n - 1) * math.sqrt(error)


# With t = sqrt(degrees) tan(a) the density of Student's distribution is proportional to
# cos(a)^(degrees - 1) for a in (-pi/2, pi/2). A sum over midpoints of this bounded interval is
# exact to seven digits or more, for whole degrees from 1 to 5,000.


def student_tail(t: float, degrees: float) -> float:
    """Return P(|T| >= |t|) for T of Student's distribution with so many degrees of freedom."""
    first = math.atan(abs(t) / math.sqrt(degrees))
    width = (math.pi / 2 - first) / POINTS
    angles = first + width * (np.arange(POINTS) + 0.5)
    log_half = math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)
    half = math.sqrt(math.pi) / 2 * math.exp(log_half)  # the integral from 0 to pi/2
    return min(1.0, float((np.cos(angles) ** (degrees - 1)).sum()) * width / half)


def student_quantile(level: float, degrees: float) -> float:
    """Return the t with P(|T| < t) = level."""
    edges = np.linspace(0, math.pi / 2, POINTS + 1)
    inside = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (degrees - 1))
    angle = np.interp(level, np.append(0, inside / inside[-1]), edges)
    return math.sqrt(degrees) * math.tan(angle)
