"""Draw the picture sets in examples/concepts: things and a style that the model never saw.

    python examples/bundled/make_concepts.py SPRITES

SPRITES is the folder of emoji_data.py. Each object set shows one vendor's drawing of one held-out
thing in five scenes, but never in the water or on fire, so that prompts can ask for it; the style
set shows five trained things as blueprints. The poses were drawn at random once
(concepts/poses.json).
"""

import argparse
import json
from pathlib import Path

import repository  # noqa: F401
import torch
from common import run_script
from emoji_data import (
    HELD_OUT,
    SCENES,
    SIZE,
    TRAINED,
    load_sprite,
    outlines,
    placed,
    plain,
    scene_bank,
    split_names,
)
from PIL import Image
from torch import Tensor

CONCEPTS = Path(__file__).resolve().parent.parent / "concepts"
VENDORS_OF = {  # who drew each thing
    "mushroom": "noto",
    "teapot": "twemoji",
    "parrot": "fluent",
    "hedgehog": "twemoji",
    "cupcake": "fluent",
    "lantern": "noto",
    "teddy": "noto",
    "icecream": "noto",
    "hotdog": "twemoji",
    "flamingo": "fluent",
    "zebra": "noto",
    "giraffe": "twemoji",
    "fire-engine": "fluent",
    "ufo": "noto",
    "hibiscus": "twemoji",
    "gem": "fluent",
}
BLUEPRINTS = "house noto, car twemoji, guitar fluent, robot noto, sailboat twemoji"


def photo(sprite: Tensor, bank: Tensor, pose: dict) -> Tensor:
    """Return the sprite (4, 64, 64) in a pose and a place, (3, 64, 64) in [0, 1]."""
    numbers = (torch.tensor([pose[key]]) for key in ("scale", "angle", "mirror", "shift"))
    layer = placed(sprite[None], *numbers)[0]
    if pose["place"] in SCENES:
        back = bank[list(SCENES).index(pose["place"]), pose["number"]]
        back = back.flip(-1) if pose["flip"] else back
    else:
        tint = torch.tensor(pose["tint"]).view(3, 1, 1)
        back = plain(pose["place"], pose["down"], pose["right"], tint).clamp(0, 1)
    return (back * (1 - layer[3:]) + layer[:3]).clamp(0, 1)


def blueprint(x: Tensor) -> Tensor:
    """Return white contours, wherever a colour changes, on deep blue paper with a faint grid."""
    lines = (outlines(x[None])[0, 0] * 2.5 - 0.35).clamp(0, 1)
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
    parser.add_argument("--out", type=Path, default=CONCEPTS)
    args = parser.parse_args()
    poses = json.loads((CONCEPTS / "poses.json").read_text())
    bank = scene_bank(per_scene=8, seed=1)
    emoji = split_names(" ".join([HELD_OUT, *TRAINED.values()]))
    for name, vendor in VENDORS_OF.items():
        sprite = load_sprite(args.sprites, vendor, emoji[name])
        save(args.out / name, [photo(sprite, bank, pose) for pose in poses[name]])
    things = (entry.split() for entry in BLUEPRINTS.split(", "))
    sprites = [load_sprite(args.sprites, vendor, emoji[name]) for name, vendor in things]
    shown = [photo(sprite, bank, pose) for sprite, pose in zip(sprites, poses["blueprint"])]
    save(args.out / "blueprint", [blueprint(picture) for picture in shown])


if __name__ == "__main__":
    run_script(main)
