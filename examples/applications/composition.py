"""Composition (appendix A.1, figure 8): two learnt words in one prompt.

    python examples/applications/composition.py

Objects in a learnt style, where weights say which of the two words gives way; and two objects in
one picture, which the paper finds hard "because our training considers only single concept scenes".
Uncurated.
"""

import repository  # noqa: F401
from common import CONCEPTS, Workspace, make_parser, run_script, sheet
from style import SETUPS

# Each prompt with its style word, if any, and the setup in which that is learnt.
PROMPTS = {
    "a painting of a <mushroom> in the style of <blueprint>": {"blueprint": "style templates"},
    "a painting of a <cupcake> in the style of <blueprint>": {"blueprint": "style templates"},
    "a <blueprint> of a <cupcake>": {"blueprint": "two vectors"},
    "a [[<blueprint>]] of a (<cupcake>:1.4)": {"blueprint": "two vectors"},
    "a photo of a <mushroom> and a <cupcake>": {},
    "a photo of a <giraffe> and a <fire-engine>": {},
    "a photo of a <mushroom> and a <teddy>": {},
    "a photo of a cat and a dog": {},
}


def main(argv=None) -> None:
    args = make_parser(__doc__, samples=6, steps=50).parse_args(argv)
    workspace, rows = Workspace.open(args), {}
    for prompt, styles in list(PROMPTS.items())[: 1 if args.quick else None]:
        words = [workspace.word(name, setup, **SETUPS[setup][1]) for name, setup in styles.items()]
        objects = [name for name in CONCEPTS if f"<{name}>" in prompt and name not in styles]
        rows[prompt] = workspace.draw(prompt, words + [workspace.word(name) for name in objects])
    workspace.save("composition.png", sheet(rows))


if __name__ == "__main__":
    run_script(main)
