"""Draw 24 fixed prompts with the bundled model and let the bundled CLIP name the pictures.

    python examples/bundled/check_emoji.py --out grid.png

For each picture CLIP picks the nearest of 50 captions: the 24 prompts and 26 others. The script
prints the pictures for which it picks a wrong one, and the number of right ones.
"""

import argparse
import random

import repository  # noqa: F401
from common import run_script
from emoji_data import TRAINED, split_names
from evaluate import Scorer

import textinv
from models.images import grid

PROMPTS = """
a photo of an apple on a blue background
a photo of a banana on the beach
a painting of a rose on the grass
a sketch of a house in the snow
pixel art of a heart on a black background
a photo of a pumpkin at night
a photo of a penguin in the snow
a photo of a fish under water
a black and white photo of a skull on a white background
a photo of a strawberry on a wooden table
a painting of a sunflower on a blue background
a photo of a rocket on the moon
a sketch of a butterfly on a white background
a photo of a cactus on a yellow background
pixel art of a star at night
a photo of a panda on the grass
a photo of a basketball on a green background
a photo of a hamburger on a wooden table
a painting of a sailboat on the beach
a photo of a snowman on fire
a black and white photo of a car on the moon
a photo of an avocado on a pink background
a photo of a crab on the beach
pixel art of a ghost on a purple background
""".strip().splitlines()


def other_captions(count: int) -> list[str]:
    """Return captions of trained things that no prompt names, in the prompts' scenes."""
    names = (name for text in TRAINED.values() for name in split_names(text))
    free = [n for n in names if not any(n in prompt.split() for prompt in PROMPTS)]
    draw = random.Random(0)
    scenes = [prompt.partition(" of ")[::2] for prompt in PROMPTS]
    captions = []
    for name in draw.sample(free, count):
        medium, rest = draw.choice(scenes)
        captions.append(f"{medium} of a {name} {rest.split(' ', 2)[2]}")
    return captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="grid.png")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    model = textinv.load_model()
    given = dict(sampler="ddim", steps=args.steps, guidance_scale=args.guidance)
    images = textinv.sample(model, PROMPTS, **given)
    sheet = grid([i.resize((128, 128)) for i in images], columns=8)
    sheet.quantize(256).save(args.out, optimize=True)

    captions = PROMPTS + other_captions(26)
    scorer = Scorer.load()
    nearest = (scorer.images(images) @ scorer.texts(captions).T).argmax(1).tolist()
    others = [(i, best) for i, best in enumerate(nearest) if best != i]
    for i, best in others:
        print(f"{PROMPTS[i]!r} looks like {captions[best]!r}")
    hits = len(PROMPTS) - len(others)
    print(f"{hits} of {len(PROMPTS)} pictures are nearest to their own caption of {len(captions)}")


if __name__ == "__main__":
    run_script(main)
