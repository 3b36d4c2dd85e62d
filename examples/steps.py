"""Fewer steps for the same word: quality by the number of steps, and training that stops by itself.

    python examples/steps.py            # three quarters of an hour on two CPU cores
    python examples/steps.py --paper    # also the paper's 5,000 steps of 4 pictures: an hour more

Every run of fewer steps is the beginning of the full one ("ours"). "auto" is `--stop auto`
(models/stopping.py). Differences to ours are taken set by set, with 95% confidence intervals.
"""

from experiment import CONCEPTS, OBJECTS, Lab, options
from fig7 import print_differences

import textinv
from models.command_line import print_scores
from models.files import write_table

SHARES = (20, 10, 5, 2.5)  # the runs of fewer steps are these parts of the full one
PAPER = {key: textinv.PAPER[key] for key in ("steps", "batch_size", "lr")}


def setups(lab: Lab, paper: bool) -> dict[str, dict]:
    full = textinv.hyperparameters(lab.model, lab.training["steps"], None, None)[0]
    shorter = [max(1, round(full / share)) for share in SHARES]
    named = {f"{steps} steps": dict(steps=steps) for steps in shorter}
    named |= {"auto": dict(stop="auto"), "ours": {}}
    return named | ({"paper": PAPER} if paper else {})


def main(argv=None) -> None:
    parser = options(__doc__)
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=OBJECTS)
    parser.add_argument("--paper", action="store_true", help="the paper's numbers beside ours")
    args = parser.parse_args(argv)
    lab, rows = Lab.of(args), []
    for setup, given in setups(lab, args.paper).items():
        for name in args.concepts[: 2 if args.quick else None]:
            word = lab.word(name, setup, **given)
            rows += lab.scores(setup, name, [word.placeholder], [word])
            print(f"{setup}, {name}: {word.metadata['steps']} steps")
    write_table(lab.out / "steps.csv", rows, overwrite=True)
    print_scores(rows)
    print_differences(rows)


if __name__ == "__main__":
    main()
