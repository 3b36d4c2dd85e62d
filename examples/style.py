"""Style transfer (section 4, figure 6): a word for a way of drawing, used on other things.

    python examples/style.py

The bundled style is learnt with captions that name what each picture shows ("a {} of a house"), so
that the word need only hold how it is drawn; with the paper's templates ("a painting in the style
of {}") it has to hold both. One vector keeps the things apart, two draw the style better.
"""

from experiment import Lab, options, pictures
from sheet import sheet

import textinv

THINGS = ("castle", "rocket", "apple", "cat", "trumpet", "key", "tree")
SETUPS = {
    "one vector": ("a {} of a thing", {}),
    "two vectors": ("a {} of a thing", dict(vectors=2)),
    "the paper's templates": (
        "a painting of a thing in the style of {}",
        dict(templates=textinv.STYLE_TEMPLATES),
    ),
}


def main(argv=None) -> None:
    parser = options(__doc__, samples=1, steps=50)
    parser.add_argument("--concepts", nargs="+", default=["blueprint"], help="style sets, or files")
    args = parser.parse_args(argv)
    lab, rows = Lab.of(args), {}
    plain = [f"a photo of a {thing}" for thing in THINGS]
    rows["no style"] = lab.draw(plain)
    for name in args.concepts:
        folder = pictures(name)
        if folder.is_dir():
            shown = textinv.find_images(folder)
            rows[f"{name}: what it was learnt from"] = [textinv.open_image(p) for p in shown]
        for setup, (prompt, given) in SETUPS.items():
            word = lab.word(name, "ours" if setup == "one vector" else f"style {setup}", **given)
            text = prompt.replace("{}", word.placeholder)
            rows[f"{text}: {setup}"] = lab.draw([text.replace("thing", t) for t in THINGS], [word])
    lab.save("style.png", sheet(rows, THINGS))


if __name__ == "__main__":
    main()
