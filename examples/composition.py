"""Composition (appendix A.1, figure 8): two learnt words in one prompt.

    python examples/composition.py

Objects in a learnt style, where weights say which of the two words gives way; and two objects in
one picture, which the paper finds hard "because our training considers only single concept scenes".
The bundled model has seen nothing else: it melts trained words together in the same way (last row).
Uncurated.
"""

from experiment import Lab, options
from sheet import sheet
from style import SETUPS

# Prompt: the words in it, each with the setup that it is learnt by.
PROMPTS = {
    "a painting of a <mushroom> in the style of <blueprint>": {"blueprint": "style templates"},
    "a painting of a <cupcake> in the style of <blueprint>": {"blueprint": "style templates"},
    "a <blueprint> of a <cupcake>": {"blueprint": "two vectors"},
    "a [[<blueprint>]] of a (<cupcake>:1.4)": {"blueprint": "two vectors"},
    "a photo of a <cupcake> with a <mushroom>": {},
    "a photo of a <mushroom> and a <teddy>": {},
    "a photo of a cat and a dog": {},
}


def main(argv=None) -> None:
    args = options(__doc__, samples=6, steps=50).parse_args(argv)
    lab, rows = Lab.of(args), {}
    for prompt, styles in list(PROMPTS.items())[: 1 if args.quick else None]:
        words = [lab.word(name, setup, **SETUPS[setup][1]) for name, setup in styles.items()]
        objects = [name for name in ("mushroom", "cupcake", "teddy") if f"<{name}>" in prompt]
        rows[prompt] = lab.draw(prompt, words + [lab.word(name) for name in objects])
    lab.save("composition.png", sheet(rows))


if __name__ == "__main__":
    main()
