"""Galleries of uncurated results (section 4; figures 1, 4 and 18 to 21).

    python examples/applications/gallery.py
    python examples/applications/gallery.py --concepts cat.safetensors --model sd.ckpt
    python examples/applications/gallery.py --prompts "a photo of {}" -n 16

There is a row for each word and prompt and a column for each seed; nothing is left out or drawn
again.
"""

import argparse
from collections.abc import Iterator

import repository  # noqa: F401
from common import OBJECTS, Workspace, make_parser, run_script, sheet

PROMPTS = ("a photo of {} on the moon", "an oil painting of {}", "pixel art of {} at night")


def galleries(workspace: Workspace, args: argparse.Namespace) -> Iterator[tuple]:
    """Yield (label, prompt, word, pictures) for each word in each prompt. The label is the prompt,
    with a number if an earlier word of the same name has it already."""
    labels: list[str] = []
    for name in args.concepts[: 1 if args.quick else None]:
        word = workspace.word(name)
        for prompt in args.prompts:
            text = prompt.replace("{}", word.placeholder)
            labels.append(f"{text} ({len(labels) + 1})" if text in labels else text)
            yield labels[-1], text, word, workspace.draw(text, [word])


def main(argv=None) -> None:
    parser = make_parser(__doc__, steps=50)
    parser.add_argument("--concepts", nargs="+", default=OBJECTS[:4], help="sets, or words' files")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="with {} for the word")
    args = parser.parse_args(argv)
    workspace = Workspace.open(args)
    rows = {label: drawn for label, *_, drawn in galleries(workspace, args)}
    workspace.save("gallery.png", sheet(rows))


if __name__ == "__main__":
    run_script(main)
