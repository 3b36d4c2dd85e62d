"""Figure 7 (section 5.2): every setup of the paper, on every object set, in one chart.

    python examples/fig7.py            # two hours on two CPU cores; less with --quick
    python examples/fig7.py --concepts mushroom teddy   # some sets only, e.g. one process each

At the end fig7.csv, fig7.png (needs matplotlib), a table, and what each setup changes: the mean of
its differences to the first, set by set, with a 95% confidence interval. The paper has 64 samples
of 50 DDIM steps for each prompt (-n 64 --steps 50); the default here is 8 of 20.
"""

import chart
from experiment import EXAMPLES, OBJECTS, Lab, draw_chart, options, plus_minus

from models.command_line import print_scores
from models.evaluation import read_captions, scores_of
from models.files import write_table

SETUPS = {
    "ours": {},
    "high lr": dict(lr="high"),
    "low lr": dict(lr="low"),
    "2 vectors": dict(vectors=2),
    "3 vectors": dict(vectors=3),
    "progressive": dict(vectors=3, progressive=True),
    "regularized": dict(regularize=1e-3),
    "regularized x10": dict(regularize=1e-2),
    "per image": dict(per_image=True),
    "bare template": dict(templates=["{}"]),
}
REFERENCES = ("image only", "prompt only", "short captions", "long captions")


def scores(lab: Lab, setup: str, name: str) -> list[dict]:
    """A row for each prompt: one setup, or one reference, on one set."""
    if setup in SETUPS:
        word = lab.word(name, setup, **SETUPS[setup])
        return lab.scores(setup, name, [word.placeholder], [word])
    texts = {"image only": None, "prompt only": [""]}
    texts |= read_captions(EXAMPLES / "captions" / f"{name}.txt")
    return lab.scores(setup, name, texts[setup])


def print_differences(rows: list[dict]) -> None:
    """What a setup changes against the first, over the sets that both were measured on."""
    table = {s: {name: pair for name, *pair in scores} for s, scores in scores_of(rows).items()}
    base = table.pop("ours")
    print("\nagainst ours      reconstruction      editability")
    for setup, pairs in table.items():
        both = [(pairs[name], base[name]) for name in pairs]
        if len(both) > 1:
            changes = [plus_minus([a[i] - b[i] for a, b in both]) for i in (0, 1)]
            print(f"{setup:16} {changes[0]:>15} {changes[1]:>16}")


def main(argv=None) -> None:
    parser = options(__doc__)
    parser.add_argument("--concepts", nargs="+", choices=OBJECTS, default=OBJECTS)
    args = parser.parse_args(argv)
    lab, rows = Lab.of(args), []
    for setup in [*SETUPS, *REFERENCES]:
        for name in args.concepts[: 2 if args.quick else None]:
            rows += scores(lab, setup, name)
    write_table(lab.out / "fig7.csv", rows, overwrite=True)
    print_scores(rows)
    print_differences(rows)
    draw_chart(lab.out / "fig7.png", lambda: chart.tradeoff(scores_of(rows)))


if __name__ == "__main__":
    main()
