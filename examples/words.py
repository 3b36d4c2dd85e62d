"""The README's first picture: all bundled sets, learnt, and their words in prompts.

    python examples/words.py    # some ten minutes on two CPU cores

A row is two of the pictures that a word was learnt from, then the word in six prompts: uncurated.
"""

from experiment import CONCEPTS, STYLES, Lab, options, pictures

import textinv

PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} under water",
    "a painting of a {} on a green background",
    "a sketch of a {}",
    "pixel art of a {} in the snow",
)
THINGS = ("castle", "rocket", "apple", "cat", "trumpet", "key")
STYLED = [f"a {{}} of a {thing}" for thing in THINGS]


def main(argv=None) -> None:
    parser = options(__doc__, samples=1, steps=50)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=CONCEPTS)
    args = parser.parse_args(argv)
    lab, shown = Lab.of(args), []
    for name in args.concepts[: 1 if args.quick else None]:
        word = lab.word(name)
        prompts = STYLED if name in STYLES else PROMPTS
        texts = [prompt.replace("{}", word.placeholder) for prompt in prompts]
        learnt_from = textinv.to_pil(textinv.prepare_images(pictures(name), lab.model.size))[:2]
        shown += learnt_from + lab.draw(texts, [word], n=1)
    images = [image.resize((112, 112)) for image in shown]
    lab.save("words.png", textinv.grid(images, columns=2 + len(PROMPTS)))


if __name__ == "__main__":
    main()
