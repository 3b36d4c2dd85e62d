"""Composition (appendix A.1, figure 8): two learnt words in one prompt.

    python examples/composition.py

An object in a learnt style, and two objects side by side, which the paper finds the model "fails
to" do: it was trained on scenes of one thing. Uncurated.
"""

from experiment import Lab, options
from sheet import sheet

PROMPTS = {
    ("mushroom", "blueprint"): "a <blueprint> of a <mushroom>",
    ("teddy", "blueprint"): "a <blueprint> of a <teddy>",
    ("mushroom", "teddy"): "a photo of a <mushroom> and a <teddy>",
    ("parrot", "lantern"): "a photo of a <parrot> on a <lantern>",
}


def main(argv=None) -> None:
    args = options(__doc__, steps=50).parse_args(argv)
    lab, rows = Lab.of(args), {}
    for names, prompt in list(PROMPTS.items())[: 1 if args.quick else None]:
        rows[prompt] = lab.draw(prompt, [lab.word(name) for name in names])
    lab.save("composition.png", sheet(rows))


if __name__ == "__main__":
    main()
