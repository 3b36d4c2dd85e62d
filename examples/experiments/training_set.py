"""Appendix C: how many pictures, how different from each other, and what becomes of the templates.

    python examples/experiments/training_set.py    # half an hour on two CPU cores

Two objects are learnt from 1 to 25 pictures (C.1), from five before one background or in one pose
(C.2), and with the bare prompt "{}" (C.3); "ours" are the five bundled pictures, and all are
measured against these. "presence" is the similarity to the pictures in prompts that ask for more
than the thing: a word that is "easily overwritten by other words" has little of it. At the end it
writes training_set.csv and training_set.png (needs matplotlib) and prints a table.
"""

import json

import repository  # noqa: F401
from chart import tradeoff, write_chart
from common import Workspace, concept_folder, cut_sheet, make_parser, open_images, run_script
from evaluate import reconstruction
from scores import print_scores, summarize

import textinv
from models.files import write_file, write_table

# Each setup with its pictures in the sheet examples/sets/NAME.png, drawn by make_sets.py.
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


def presence(workspace: Workspace, setup: str, name: str, word: textinv.Concept) -> float:
    path = workspace.path(setup, f"{name}-presence.json")
    if not path.exists():
        images = open_images(concept_folder(name))
        drawn = workspace.draw([prompt.format(word.placeholder) for prompt in BUSY], [word])
        score = reconstruction(workspace.scorer.images(drawn), workspace.scorer.images(images))
        write_file(path, json.dumps(score).encode())
    return json.loads(path.read_text())


def main(argv=None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    workspace, rows, present = Workspace.open(args), [], []
    for setup, chosen in SETUPS.items():
        for name in ("mushroom", "teddy")[: 1 if args.quick else None]:
            templates = dict(templates=["{}"]) if setup == "bare template" else {}
            word = workspace.word(name, setup, cut_sheet(f"{name}.png")[chosen], **templates)
            rows += workspace.scores(setup, name, [word.placeholder], [word])
            present.append(f"{setup:20} {name:20} {presence(workspace, setup, name, word):8.4f}")
    write_table(workspace.out / "training_set.csv", rows, overwrite=True)
    print_scores(rows)
    print("", "setup                word                 presence", *present, sep="\n")
    write_chart(workspace.out / "training_set.png", lambda: tradeoff(summarize(rows)))


if __name__ == "__main__":
    run_script(main)
