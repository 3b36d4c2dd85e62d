"""Prompt weights (appendix G): the learnt word louder and softer.

    python examples/weights.py

"Stable Diffusion embeddings tend to dominate the prompt"; "prompt re-weighting" is one remedy. The
same noise in every row: only the number in (<word>:number) changes.
"""

from experiment import Lab, options
from sheet import sheet

WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
PROMPTS = ("a sketch of a ({}:{})", "a photo of a ({}:{}) on fire")


def main(argv=None) -> None:
    parser = options(__doc__, samples=1, steps=50)
    parser.add_argument("--concepts", nargs="+", default=["mushroom", "cupcake", "lantern"])
    args = parser.parse_args(argv)
    lab, rows = Lab.of(args), {}
    for name in args.concepts[: 1 if args.quick else None]:
        word = lab.word(name)
        for prompt in PROMPTS:
            texts = [prompt.format(word.placeholder, weight) for weight in WEIGHTS]
            rows[prompt.format(word.placeholder, "W")] = lab.draw(texts, [word], n=1)
    lab.save("weights.png", sheet(rows, [f"W = {weight}" for weight in WEIGHTS]))


if __name__ == "__main__":
    main()
