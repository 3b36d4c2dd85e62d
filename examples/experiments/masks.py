"""What a mask keeps out of a word: five pictures before one and the same background, learnt from
with and without `masked`.

    python examples/experiments/masks.py    # a quarter of an hour on two CPU cores

Printed for each set and run: `leak`, the share of the samples' outermost pixels that are within 0.1
(of 1, in each channel) of a training background, by what the prompt asks for; the similarity of
samples to prompts that ask for another background; and to the thing alone, cut out by the masks.
masks.png shows four samples of the first plain prompt, and four on the beach.
"""

from itertools import product
from pathlib import Path

import numpy as np
import repository  # noqa: F401
from common import CONCEPTS, Workspace, cut_sheet, make_parser, run_script, sheet
from evaluate import editability, reconstruction
from PIL import Image, ImageChops

PLAIN = ("a photo of a {}", "a photo of the {}")
OTHER = ("a photo of a {} on the beach", "a photo of a {} in the snow", "a photo of a {} at night")


def edge(picture: Image.Image) -> np.ndarray:
    """Return the outermost pixels (N, 3) in [0, 1]."""
    x = np.asarray(picture, float) / 255
    return np.concatenate([x[0], x[-1], x[1:-1, 0], x[1:-1, -1]])


def background(picture: Image.Image) -> np.ndarray:
    """Return the background (H, W, 3), a plane fitted to the outermost pixels."""
    y, x = np.mgrid[: picture.height, : picture.width]
    terms = np.stack([np.ones_like(x), x, y], -1) / [1, picture.width, picture.height]
    rim = np.concatenate([terms[0], terms[-1], terms[1:-1, 0], terms[1:-1, -1]])
    return terms @ np.linalg.lstsq(rim, edge(picture), rcond=None)[0]


def write_set(name: str, folder: Path, colour: str | None) -> list[Image.Image]:
    """Write the five pictures with one background, or before a colour instead, and their masks."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = cut_sheet(f"{name}.png")[25:30]
    for i, picture in enumerate(pictures):
        differs = np.abs(np.asarray(picture) / 255 - background(picture)).max(-1) > 0.06
        mask = Image.fromarray(differs).convert("L")
        mask.save(folder / f"{i}.mask.png")
        if colour:
            picture.paste(colour, mask=ImageChops.invert(mask))
        picture.save(folder / f"{i}.png")
    return pictures


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=16)
    parser.add_argument("--sets", nargs="+", default=["teddy", "mushroom"])
    parser.add_argument("--background", help="a colour to put behind the things, such as magenta")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args(argv)
    workspace = Workspace.open(args)
    scorer, rows = workspace.scorer, {}
    print("| set | masked | seed | leak, plain | leak, others | editability | the thing |")
    for name in args.sets:
        folder = workspace.out / "masks" / name
        pictures = write_set(name, folder, args.background)
        colours = np.stack([edge(picture).mean(0) for picture in pictures])
        masks = [Image.open(folder / f"{i}.mask.png") for i in range(len(pictures))]
        white = Image.new("RGB", pictures[0].size, "white")
        things = scorer.images([Image.composite(p, white, m) for p, m in zip(pictures, masks)])
        for seed, masked in product(range(args.seeds), (False, True)):
            setup = f"one background {'masked ' * masked}{seed}"
            given = dict(images=folder, masked=masked, seed=seed, init_word=CONCEPTS[name])
            word = workspace.word(name, setup, placeholder=f"<{name}>", **given)
            leaks, similar, shown = [], [], []
            for prompts in (PLAIN, OTHER):
                texts = [prompt.format(word.placeholder) for prompt in prompts]
                drawn = workspace.draw(texts, [word])
                away = np.stack([edge(picture)[:, None] - colours for picture in drawn])
                leaks.append((np.abs(away).max(-1).min(-1) < 0.1).mean())
                similar.append(scorer.images(drawn))
                shown += drawn[: min(4, args.n)]
            features = similar[1].split(args.n)
            wanted = [scorer.texts([p.replace("{}", CONCEPTS[name])]) for p in OTHER]
            edits = np.mean([editability(f, w) for f, w in zip(features, wanted)])
            figures = [*leaks, edits, reconstruction(similar[0], things)]
            row = " | ".join(f"{figure:.3f}" for figure in figures)
            print(f"| {name} | {masked} | {seed} | {row} |", flush=True)
            rows[f"{name}{', masked' * masked}, seed {seed}"] = shown
    workspace.save("masks.png", sheet(rows))


if __name__ == "__main__":
    run_script(main)
