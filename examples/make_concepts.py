"""Draw the picture sets in examples/concepts: things and a style that the model never saw.

    python examples/make_concepts.py SPRITES

SPRITES is the folder of emoji_data.py. Each object set shows one vendor's drawing of one held-out
thing in five scenes; the style set shows five trained things as blueprints. The pictures are the
photos among the random scenes of `compose`, so poses and places are like those in training; the
backgrounds are newly drawn.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import HELD_OUT, SIZE, TRAINED, compose, load_sprite, scene_bank, split_names
from PIL import Image
from torch import Tensor

# Who drew it, and where it is shown: never in the water or on fire, which is left to prompts.
OBJECTS = {
    "mushroom": ("noto", "grass table night blue yellow"),
    "teapot": ("twemoji", "table beach snow yellow pink"),
    "parrot": ("fluent", "grass beach night white gray"),
    "hedgehog": ("twemoji", "grass snow moon green blue"),
    "cupcake": ("fluent", "table grass moon white green"),
    "lantern": ("noto", "night snow grass blue white"),
    "teddy": ("noto", "snow beach night purple white"),
}
BLUEPRINTS = "house noto, car twemoji, guitar fluent, robot noto, sailboat twemoji"


def photos(sprite: Tensor, bank: Tensor, places: list[str], seed: int) -> list[Tensor]:
    """One photo (3, 64, 64) of the sprite in each place."""
    sprites = sprite.expand(1, 3, -1, -1, -1)  # the same drawing for all three vendors
    pictures, _, facts, _ = compose(sprites, bank, ["thing"], ["thing"], 300, seed)
    shown = [(place, medium) for _, place, medium in facts]
    return [pictures[shown.index((place, "photo"))] for place in places]


def blueprint(x: Tensor) -> Tensor:
    """White contours, wherever a colour changes, on deep blue paper with a faint grid."""
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernels = torch.stack([slope, slope.T])[:, None]
    edges = F.conv2d(F.pad(x[:, None], (1, 1, 1, 1), mode="replicate"), kernels)
    lines = (edges.norm(dim=1).amax(0) * 2.5 - 0.35).clamp(0, 1)
    on_grid = torch.arange(SIZE) % 8 == 3
    grid = 0.16 * (on_grid[:, None] | on_grid).float()
    paper = torch.tensor([0.08, 0.22, 0.55]).view(3, 1, 1)
    return paper + (1 - paper) * torch.maximum(lines, grid)


def to_image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


def save(folder: Path, pictures: list[Tensor]):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures, 1):
        to_image(picture).save(folder / f"{i}.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sprites", type=Path)
    sprites = parser.parse_args().sprites
    root = Path(__file__).resolve().parent / "concepts"
    bank = scene_bank(per_scene=8, seed=1)
    emoji = split_names(" ".join([HELD_OUT, *TRAINED.values()]))
    for seed, (name, (vendor, places)) in enumerate(OBJECTS.items(), 8):
        sprite = load_sprite(sprites, vendor, emoji[name])
        save(root / name, photos(sprite, bank, places.split(), seed))
    drawn = []
    for seed, entry in enumerate(BLUEPRINTS.split(", "), 2):
        name, vendor = entry.split()
        sprite = load_sprite(sprites, vendor, emoji[name])
        drawn.append(blueprint(photos(sprite, bank, ["green"], seed)[0]))
    save(root / "blueprint", drawn)


if __name__ == "__main__":
    main()
