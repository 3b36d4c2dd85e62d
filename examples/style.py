"""Style transfer (section 4, figure 6): a word for a way of drawing, used on other things.

    python examples/style.py

The bundled style is learnt with captions that name what each picture shows ("a {} of a house"), so
that the word need only hold how it is drawn; with the paper's templates ("a painting in the style
of {}") it has to hold both, and what it shows of either is less.
"""

from experiment import Lab, opened, options, pictures
from sheet import sheet

import textinv

THINGS = ("castle", "rocket", "apple", "cat", "trumpet", "key", "tree")
# Setup: its prompt, and how it differs from the default.
SETUPS = {
    "ours": ("a {} of a thing", {}),
    "two vectors": ("a {} of a thing", dict(vectors=2)),
    "style templates": (
        "a painting of a thing in the style of {}",
        dict(templates=textinv.STYLE_TEMPLATES),
    ),
}


def main(argv=None) -> None:
    parser = options(__doc__, samples=1, steps=50)
    parser.add_argument("--concepts", nargs="+", default=["blueprint"], help="style sets, or files")
    args = parser.parse_args(argv)
    lab = Lab.of(args)
    rows = {"no style": lab.draw([f"a photo of a {thing}" for thing in THINGS])}
    for name in args.concepts:
        if pictures(name).is_dir():
            rows[f"{name}: learnt from"] = opened(pictures(name))
        for setup, (prompt, given) in SETUPS.items():
            word = lab.word(name, setup, **given)
            text = prompt.replace("{}", word.placeholder)
            drawn = lab.draw([text.replace("thing", thing) for thing in THINGS], [word])
            rows[f"{text} ({setup})"] = drawn
    lab.save("style.png", sheet(rows, THINGS))


if __name__ == "__main__":
    main()
