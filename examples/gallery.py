"""Galleries of uncurated results (section 4; figures 1, 4 and 18 to 21).

    python examples/gallery.py                             # the bundled words, some prompts
    python examples/gallery.py --concepts cat.safetensors --prompts "{} on the moon" --model sd.ckpt
    python examples/gallery.py --prompts "a photo of {}" -n 8      # one prompt, many seeds

A row for each word and prompt, a column for each seed; nothing is left out or drawn again.
"""

import argparse
from collections.abc import Iterator

from experiment import OBJECTS, Lab, options
from sheet import sheet

PROMPTS = ("a photo of {} on the moon", "an oil painting of {}", "pixel art of {} at night")


def galleries(lab: Lab, args: argparse.Namespace) -> Iterator[tuple]:
    """(prompt, word, pictures) for each of the words in each of the prompts."""
    for name in args.concepts[: 1 if args.quick else None]:
        word = lab.word(name)
        for prompt in args.prompts:
            text = prompt.replace("{}", word.placeholder)
            yield text, word, lab.draw(text, [word])


def main(argv=None) -> None:
    parser = options(__doc__, steps=50)
    parser.add_argument("--concepts", nargs="+", default=OBJECTS[:4], help="sets, or words' files")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="with {} for the word")
    args = parser.parse_args(argv)
    lab = Lab.of(args)
    lab.save("gallery.png", sheet({text: drawn for text, _, drawn in galleries(lab, args)}))


if __name__ == "__main__":
    main()
