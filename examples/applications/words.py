"""The README's first picture: bundled sets, learnt, and their words in prompts.

    python examples/applications/words.py    # about six minutes on two CPU cores
    python examples/applications/words.py --concepts gem blueprint --out runs/two

A row shows two of the pictures that a word was learnt from, then the word in six prompts,
uncurated.
"""

import repository  # noqa: F401
from common import CONCEPTS, STYLES, Workspace, concept_folder, make_parser, run_script

from models.images import grid, prepare_images, to_pil

PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} under water",
    "a painting of a {} on a green background",
    "a sketch of a {}",
    "pixel art of a {} in the snow",
)
BEST = ("mushroom", "fire-engine", "giraffe", "icecream", "cupcake")  # this small model's best
THINGS = ("castle", "rocket", "apple", "cat", "trumpet", "key")
STYLED = [f"a {{}} of a {thing}" for thing in THINGS]


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=1, steps=50)
    parser.add_argument("--concepts", nargs="+", default=BEST, choices=CONCEPTS)
    args = parser.parse_args(argv)
    workspace, shown = Workspace.open(args), []
    for name in args.concepts[: 1 if args.quick else None]:
        word = workspace.word(name)
        prompts = STYLED if name in STYLES else PROMPTS
        texts = [prompt.replace("{}", word.placeholder) for prompt in prompts]
        learnt_from = to_pil(prepare_images(concept_folder(name), workspace.model.size))[:2]
        shown += learnt_from + workspace.draw(texts, [word], n=1)
    images = [image.resize((112, 112)) for image in shown]
    workspace.save("words.png", grid(images, columns=2 + len(PROMPTS)))


if __name__ == "__main__":
    run_script(main)
