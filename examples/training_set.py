"""Appendix C: how many pictures, how different from each other, and what becomes of the templates.

    python examples/training_set.py    # half an hour on two CPU cores; minutes with --quick

Two objects, each learnt from 1 to 25 pictures (C.1), from five before one background or in one pose
(C.2), and with the bare prompt "{}" (C.3); "ours" are the five bundled pictures, and all are
measured against these. "presence" is likeness to the pictures in prompts that ask for more than the
thing: a word that is "easily overwritten by other words" has little of it. At the end
training_set.csv, training_set.png (needs matplotlib) and a table.
"""

import json

import chart
from experiment import Lab, draw_chart, opened, options, pictures, tiles

import textinv
from models.command_line import print_scores
from models.evaluation import reconstruction, scores_of
from models.files import write_file, write_table

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
BUSY = ("A photo of {} on the beach", "A photo of {} on fire", "A photo of {} on a chair")


def presence(lab: Lab, setup: str, name: str, word: textinv.Concept) -> float:
    path = lab.path(setup, f"{name}-presence.json")
    if not path.exists():
        images = opened(pictures(name))
        drawn = lab.draw([prompt.format(word.placeholder) for prompt in BUSY], [word])
        score = reconstruction(lab.scorer.images(drawn), lab.scorer.images(images))
        write_file(path, json.dumps(score).encode())
    return json.loads(path.read_text())


def main(argv=None) -> None:
    args = options(__doc__).parse_args(argv)
    lab, rows, present = Lab.of(args), [], []
    for setup, chosen in SETUPS.items():
        for name in ("mushroom", "teddy")[: 1 if args.quick else None]:
            templates = dict(templates=["{}"]) if setup == "bare template" else {}
            word = lab.word(name, setup, tiles(f"{name}.png")[chosen], **templates)
            rows += lab.scores(setup, name, [word.placeholder], [word])
            present.append(f"{setup:20} {name:20} {presence(lab, setup, name, word):8.4f}")
    write_table(lab.out / "training_set.csv", rows, overwrite=True)
    print_scores(rows)
    print("", "setup                word                 presence", *present, sep="\n")
    draw_chart(lab.out / "training_set.png", lambda: chart.tradeoff(scores_of(rows)))


if __name__ == "__main__":
    main()
