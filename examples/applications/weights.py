"""Prompt weights (appendix G): the learnt word stronger and weaker.

    python examples/applications/weights.py

"Stable Diffusion embeddings tend to dominate the prompt"; "prompt re-weighting" is one remedy. In a
row the noise is always the same; only the number in (<word>:number) changes.
"""

import repository  # noqa: F401
from common import Workspace, make_parser, run_script, sheet

WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
PROMPTS = ("a sketch of a ({}:{})", "a photo of a ({}:{}) on fire")


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=1, steps=50)
    parser.add_argument("--concepts", nargs="+", default=["mushroom", "cupcake", "lantern"])
    args = parser.parse_args(argv)
    workspace, rows = Workspace.open(args), {}
    for name in args.concepts[: 1 if args.quick else None]:
        word = workspace.word(name)
        for prompt in PROMPTS:
            texts = [prompt.format(word.placeholder, weight) for weight in WEIGHTS]
            rows[prompt.format(word.placeholder, "W")] = workspace.draw(texts, [word], n=1)
    workspace.save("weights.png", sheet(rows, [f"W = {weight}" for weight in WEIGHTS]))


if __name__ == "__main__":
    run_script(main)
