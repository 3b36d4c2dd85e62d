"""Style transfer (section 4, figure 6): a word for a way of drawing, used on other things.

    python examples/applications/style.py

The bundled style is learnt with captions that name what each picture shows ("a {} of a house"), so
that the word only has to hold how it is drawn. With the paper's templates ("a painting in the style
of {}") it has to hold both, and shows less of either.
"""

import repository  # noqa: F401
from common import Workspace, concept_folder, make_parser, open_images, run_script, sheet

import textinv

THINGS = ("castle", "rocket", "apple", "cat", "trumpet", "key", "tree")
# Each setup with its prompt and its options of training.
SETUPS = {
    "ours": ("a {} of a thing", {}),
    "two vectors": ("a {} of a thing", dict(vectors=2)),
    "style templates": (
        "a painting of a thing in the style of {}",
        dict(templates=textinv.STYLE_TEMPLATES),
    ),
}


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=1, steps=50)
    parser.add_argument("--concepts", nargs="+", default=["blueprint"], help="style sets, or files")
    args = parser.parse_args(argv)
    workspace = Workspace.open(args)
    rows = {"no style": workspace.draw([f"a photo of a {thing}" for thing in THINGS])}
    for name in args.concepts:
        if concept_folder(name).is_dir():
            rows[f"{name}: learnt from"] = open_images(concept_folder(name))
        for setup, (prompt, given) in SETUPS.items():
            word = workspace.word(name, setup, **given)
            text = prompt.replace("{}", word.placeholder)
            drawn = workspace.draw([text.replace("thing", thing) for thing in THINGS], [word])
            rows[f"{text} ({setup})"] = drawn
    workspace.save("style.png", sheet(rows, THINGS))


if __name__ == "__main__":
    run_script(main)
