"""Figure 7 (section 5.2): every setup of the paper, on every object set, in one chart.

    python examples/experiments/fig7.py                 # two hours on two CPU cores
    python examples/experiments/fig7.py --concepts teddy --setups "3 vectors"    # and "ours"

At the end it writes fig7.csv and fig7.png (needs matplotlib) and prints a table, and what each
setup changes: the mean of its differences to "ours", set by set, with a 95% confidence interval.
The paper has 64 samples of 50 DDIM steps for each prompt (-n 64 --steps 50); here it is 8 of 20.
"""

import repository  # noqa: F401
from chart import tradeoff, write_chart
from common import EXAMPLES, MORE, OBJECTS, Workspace, make_parser, run_script
from evaluate import read_captions
from scores import print_differences, print_scores, summarize

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


def scores(workspace: Workspace, setup: str, name: str) -> list[dict]:
    """Return a row for each prompt: one setup, or one reference, on one set."""
    if setup in SETUPS:
        word = workspace.word(name, setup, **SETUPS[setup])
        return workspace.scores(setup, name, [word.placeholder], [word])
    texts = {"image only": None, "prompt only": [""]}
    texts |= read_captions(EXAMPLES / "captions" / f"{name}.txt")
    return workspace.scores(setup, name, texts[setup])


def main(argv=None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--concepts", nargs="+", choices=OBJECTS + MORE, default=OBJECTS)
    every = [*SETUPS, *REFERENCES]
    parser.add_argument("--setups", nargs="+", choices=every, default=every)
    args = parser.parse_args(argv)
    workspace, rows = Workspace.open(args), []
    for setup in dict.fromkeys(["ours", *args.setups]):  # which the others are compared with
        for name in args.concepts[: 2 if args.quick else None]:
            rows += scores(workspace, setup, name)
    write_table(workspace.out / "fig7.csv", rows, overwrite=True)
    print_scores(rows)
    print_differences(rows)
    write_chart(workspace.out / "fig7.png", lambda: tradeoff(summarize(rows)))


if __name__ == "__main__":
    run_script(main)
