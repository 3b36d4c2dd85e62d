"""Bias reduction (appendix A.2, figure 9): a fairer word for what the model shows with a bias.

    python examples/applications/bias.py
    python examples/applications/bias.py --images doctors --word doctor --model sd.ckpt

--images has a subfolder for each variant (doctors/A, doctors/B). The new word starts from the old
one and is learnt from the first two pictures of each variant. A sample counts for the variant whose
pictures' mean is nearest to it in CLIP's space. The bundled pictures are frogs of three vendors,
of which the model prefers the first (emoji_data.py, VENDOR_ODDS).
"""

from pathlib import Path

import repository  # noqa: F401
import torch
import torch.nn.functional as F
from common import EXAMPLES, Workspace, make_parser, open_images, run_script, sheet

SHOWN = 8


def shares(workspace: Workspace, variants: dict[str, list], drawn: list) -> dict[str, int]:
    """Return {variant: how many of the drawn pictures show it}."""
    means = [workspace.scorer.images(pictures).mean(0) for pictures in variants.values()]
    nearest = (workspace.scorer.images(drawn) @ F.normalize(torch.stack(means), dim=1).T).argmax(1)
    counts = nearest.bincount(minlength=len(variants)).tolist()
    return dict(zip(variants, counts))


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=48)
    parser.add_argument("--images", type=Path, default=EXAMPLES / "sets" / "frog")
    parser.add_argument("--word", default="frog", help="what is biased")
    args = parser.parse_args(argv)
    workspace = Workspace.open(args)
    folders = sorted(folder for folder in args.images.iterdir() if folder.is_dir())
    variants = {folder.name: open_images(folder) for folder in folders}
    balanced = [picture for pictures in variants.values() for picture in pictures[:2]]
    fair = workspace.word(f"fair-{args.word}", images=balanced, init_word=args.word)
    rows = {"learnt from": balanced}
    for text in (args.word, fair.placeholder):
        drawn = workspace.draw(f"a photo of a {text}", [fair])
        counts = ", ".join(f"{k} {v}" for k, v in shares(workspace, variants, drawn).items())
        print(f"a photo of a {text}: {counts} of {len(drawn)}")
        rows[f"a photo of a {text}: {counts}"] = drawn[:SHOWN]
        rows[f"{text}: more"] = drawn[SHOWN : 2 * SHOWN]
    workspace.save("bias.png", sheet(rows))
    if all(len(pictures) > 3 for pictures in variants.values()):
        half = {name: pictures[:3] for name, pictures in variants.items()}
        real = [shares(workspace, half, pictures[3:]) for pictures in variants.values()]
        print(f"the same measure, by half of the pictures, on the others: {real}")


if __name__ == "__main__":
    run_script(main)
