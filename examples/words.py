"""The README's first picture: learn every set in examples/concepts and draw the words in prompts.

    python examples/words.py --out examples/pictures/words.png

A row is two of the pictures that a word was learnt from, then the word in six prompts. Takes some
ten minutes on two CPU cores with the bundled model; any other goes with --model.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import textinv  # noqa: E402

# Set: the coarse word that it starts from. The last is a style.
CONCEPTS = {
    "mushroom": "plant",
    "cupcake": "cake",
    "teddy": "toy",
    "parrot": "bird",
    "hedgehog": "animal",
    "teapot": "drink",
    "lantern": "object",
    "blueprint": "sketch",
}
PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} under water",
    "a painting of a {} on a green background",
    "a sketch of a {}",
    "pixel art of a {} in the snow",
)
THINGS = ("castle", "rocket", "apple", "cat", "trumpet", "key")
STYLES = {"blueprint": tuple(f"a picture of a {thing} in the style of {{}}" for thing in THINGS)}


def row(model: textinv.LatentDiffusion, name: str, seed: int) -> list:
    """Two pictures of a set, and the word learnt from it in its prompts."""
    folder, word, start = ROOT / "examples" / "concepts" / name, f"<{name}>", time.time()
    templates = textinv.TEMPLATES["style" if name in STYLES else "object"]
    options = dict(placeholder=word, templates=templates, seed=seed)
    concept = textinv.invert(model, folder, CONCEPTS[name], **options)
    print(f"{word} learnt in {time.time() - start:.0f} s", flush=True)
    prompts = [prompt.format(word) for prompt in STYLES.get(name, PROMPTS)]
    shown = textinv.to_pil(textinv.prepare_images(folder, model.size))[:2]
    return shown + textinv.sample(model, prompts, [concept], seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="words.png")
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=CONCEPTS)
    parser.add_argument("--model", help="checkpoint; the bundled model by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = textinv.load_model(args.model)
    rows = [image for name in args.concepts for image in row(model, name, args.seed)]
    sheet = textinv.grid([image.resize((112, 112)) for image in rows], columns=2 + len(PROMPTS))
    sheet.quantize(256).save(args.out, optimize=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
