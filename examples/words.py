"""The README's first picture: learn words from examples/concepts and draw them in new prompts.

python examples/words.py --out examples/pictures/words.png
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import textinv  # noqa: E402

CONCEPTS = {"mushroom": "plant", "cupcake": "cake", "teddy": "toy", "parrot": "bird"}
PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} at night",
    "a painting of a {} on a green background",
    "a sketch of a {}",
    "pixel art of a {} in the snow",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="words.png")
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=CONCEPTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = textinv.load_model()
    rows = []
    for name in args.concepts:
        folder, word, start = ROOT / "examples" / "concepts" / name, f"<{name}>", time.time()
        concept = textinv.invert(model, folder, CONCEPTS[name], placeholder=word, seed=args.seed)
        print(f"{word} learnt in {time.time() - start:.0f} s")
        rows += textinv.to_pil(textinv.prepare_images(folder, model.size))[:2]
        rows += textinv.sample(model, [p.format(word) for p in PROMPTS], [concept], seed=args.seed)
    sheet = textinv.grid([image.resize((112, 112)) for image in rows], columns=2 + len(PROMPTS))
    sheet.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
