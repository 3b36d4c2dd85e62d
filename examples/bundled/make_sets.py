"""Draw the larger sets in examples/sets, which the experiments of appendices C and D learn from.

    python examples/bundled/make_sets.py SPRITES

SPRITES is the folder of emoji_data.py. Each file is a sheet of 64x64 pictures:

    mushroom.png, teddy.png   7 rows of 5: 25 pictures of one drawing, the first five those of
                              examples/concepts; five before one plain background; five in one pose
    parrots.webp              10 x 10: parrots of all three vendors, anywhere
    blueprints.webp           10 x 10: trained things of all vendors, as blueprints

and frog/VENDOR/ has six pictures of the frog that each vendor draws.
"""

import argparse
from pathlib import Path

import repository  # noqa: F401
from common import EXAMPLES, run_script
from emoji_data import (
    HELD_OUT,
    SCENES,
    TRAINED,
    VENDORS,
    compose,
    load_sprite,
    load_sprites,
    scene_bank,
    split_names,
)
from make_concepts import VENDORS_OF, blueprint, save, to_image
from PIL import Image
from torch import Tensor

from models.images import grid

PLACES = [place for place in SCENES if place not in ("water", "fire")]  # left to prompts


def photos(sprites: Tensor, bank: Tensor, count: int, places=None, seed: int = 50) -> list[Tensor]:
    """Return photos of sprites (N, 3, 4, 64, 64) drawn at random, in these places only."""
    names = ["thing"] * len(sprites)
    pictures, _, facts, _ = compose(sprites, bank, names, names, 60 * count, seed)
    fitting = [medium == "photo" and place in (places or PLACES) for _, place, medium in facts]
    return [picture for picture, fits in zip(pictures, fitting) if fits][:count]


def any_vendor(sprites: Tensor) -> Tensor:
    """Return (3 N, 3, ...) of (N, 3, ...), the three all the same: `compose` favours the first."""
    return sprites.flatten(0, 1)[:, None].expand(-1, 3, -1, -1, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sprites", type=Path)
    folder = parser.parse_args().sprites
    held_out = split_names(HELD_OUT)
    bank, out = scene_bank(per_scene=8, seed=2), EXAMPLES / "sets"
    out.mkdir(exist_ok=True)
    for name in ("mushroom", "teddy"):
        sprite = load_sprite(folder, VENDORS_OF[name], held_out[name])
        one = sprite.expand(1, 3, -1, -1, -1)
        shown = [Image.open(p) for p in sorted((EXAMPLES / "concepts" / name).glob("*.png"))]
        backs = [bank[list(SCENES).index(place), 0] for place in PLACES[:5]]
        still = [back * (1 - sprite[3]) + sprite[:3] for back in backs]
        more = photos(one, bank, 20) + photos(one, bank, 5, ["gray"]) + still
        grid(shown + [to_image(p) for p in more], 5, gap=0).save(out / f"{name}.png", optimize=True)

    parrots = any_vendor(load_sprites(folder, {"parrot": held_out["parrot"]}))
    shown = [to_image(p) for p in photos(parrots, bank, 100)]
    grid(shown, 10, gap=0).save(out / "parrots.webp", quality=92)
    frogs = any_vendor(load_sprites(folder, {"frog": split_names(TRAINED["animal"])["frog"]}))
    for i, vendor in enumerate(VENDORS):
        save(out / "frog" / vendor, photos(frogs[i : i + 1], bank, 6, seed=i))
    things = any_vendor(load_sprites(folder, split_names(" ".join(TRAINED.values()))))
    drawn = [blueprint(p) for p in photos(things, bank, 100, ["green"])]
    grid([to_image(p) for p in drawn], 10, gap=0).save(out / "blueprints.webp", quality=92)


if __name__ == "__main__":
    run_script(main)
