"""Fewer steps for the same word: quality by the number of steps, and training that stops by itself.

    python examples/experiments/steps.py            # three quarters of an hour on two CPU cores
    python examples/experiments/steps.py --paper    # an hour more

Every run of fewer steps is the beginning of the full one ("ours"). "auto" is `--stop auto`,
"paper" the paper's 5,000 steps of 4 pictures. Differences to "ours" are taken set by set, with 95%
confidence intervals.
"""

import repository  # noqa: F401
from common import CONCEPTS, OBJECTS, Workspace, make_parser, run_script
from scores import print_differences, print_scores

import textinv
from models.files import write_table

SHARES = (20, 10, 5, 2.5)  # the full run is so many times as long as the shorter ones
PAPER = {key: textinv.PAPER[key] for key in ("steps", "batch_size", "lr")}


def setups(workspace: Workspace, paper: bool) -> dict[str, dict]:
    full = textinv.hyperparameters(workspace.model, workspace.training["steps"], None, None)[0]
    shorter = [max(1, round(full / share)) for share in SHARES]
    named = {f"{steps} steps": dict(steps=steps) for steps in shorter}
    named |= {"auto": dict(stop="auto"), "ours": {}}
    return named | ({"paper": PAPER} if paper else {})


def main(argv=None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=OBJECTS)
    parser.add_argument("--paper", action="store_true", help="also the paper's numbers")
    args = parser.parse_args(argv)
    workspace, rows = Workspace.open(args), []
    for setup, given in setups(workspace, args.paper).items():
        for name in args.concepts[: 2 if args.quick else None]:
            word = workspace.word(name, setup, **given)
            rows += workspace.scores(setup, name, [word.placeholder], [word])
            print(f"{setup}, {name}: {word.metadata['steps']} steps")
    write_table(workspace.out / "steps.csv", rows, overwrite=True)
    print_scores(rows)
    print_differences(rows)


if __name__ == "__main__":
    run_script(main)
