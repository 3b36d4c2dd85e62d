"""Appendix C: how many pictures, how different from each other, and what becomes of the templates.

    python examples/training_set.py    # half an hour on two CPU cores; minutes with --quick

Two objects, each learnt from 1 to 25 pictures (C.1), from five before one background or in one pose
(C.2), and with the bare prompt "{}" (C.3); "ours" are the five bundled pictures, and all are
measured against these. At the end training_set.csv, training_set.png (needs matplotlib), a table.
"""

from experiment import Lab, options, tiles

from models.command_line import draw_chart, print_scores, scores_of
from models.files import write_table

# Which pictures of the sheet examples/sets/NAME.png; make_sets.py draws it.
SETUPS = {
    "1 picture": slice(1),
    "2 pictures": slice(2),
    "ours": slice(5),
    "10 pictures": slice(10),
    "25 pictures": slice(25),
    "one background": slice(25, 30),
    "one pose": slice(30, 35),
    "bare template": slice(5),
}


def main(argv=None) -> None:
    args = options(__doc__).parse_args(argv)
    lab, rows = Lab.of(args), []
    for setup, chosen in SETUPS.items():
        for name in ("mushroom", "teddy")[: 1 if args.quick else None]:
            templates = dict(templates=["{}"]) if setup == "bare template" else {}
            word = lab.word(name, setup, tiles(f"{name}.png")[chosen], **templates)
            rows += lab.scores(setup, name, [word.placeholder], [word])
    write_table(lab.out / "training_set.csv", rows, overwrite=True)
    print_scores(rows)
    draw_chart(lab.out / "training_set.png", lambda chart: chart.tradeoff(scores_of(rows)))


if __name__ == "__main__":
    main()
