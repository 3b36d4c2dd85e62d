"""Galleries of uncurated results (section 4; figures 1, 4 and 18 to 21).

    python examples/gallery.py                             # the bundled words, some prompts
    python examples/gallery.py --concepts cat.safetensors --prompts "{} on the moon" --model sd.ckpt
    python examples/gallery.py --prompts "a photo of {}" -n 8      # one prompt, many seeds

A row for each word and prompt, a column for each seed; nothing is left out or drawn again.
"""

from experiment import OBJECTS, Lab, options
from sheet import sheet

PROMPTS = ("a photo of {} on the moon", "an oil painting of {}", "pixel art of {} at night")


def main(argv=None) -> None:
    parser = options(__doc__, steps=50)
    parser.add_argument("--concepts", nargs="+", default=OBJECTS[:4], help="sets, or words' files")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="with {} for the word")
    args = parser.parse_args(argv)
    lab, rows = Lab.of(args), {}
    for name in args.concepts[: 1 if args.quick else None]:
        word = lab.word(name)
        for prompt in args.prompts:
            text = prompt.replace("{}", word.placeholder)
            rows[text] = lab.draw(text, [word])
    lab.save("gallery.png", sheet(rows))


if __name__ == "__main__":
    main()
