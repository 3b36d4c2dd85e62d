"""Bias reduction (appendix A.2, figure 9): a fairer word for what the model shows one-sidedly.

    python examples/bias.py
    python examples/bias.py --images doctors --word doctor --model sd.ckpt   # doctors/A, doctors/B

--images has a subfolder for each variant. The new word starts from the old one and is learnt from
the first two pictures of each variant. Which variant a sample shows is told by the mean of whose
pictures it is nearest to, in CLIP's space. Bundled: the frogs of three vendors; the model draws the
first one's unless told otherwise (emoji_data.py, VENDOR_ODDS).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from experiment import EXAMPLES, Lab, opened, options
from sheet import sheet

SHOWN = 8


def shares(lab: Lab, variants: dict[str, list], drawn: list) -> dict[str, int]:
    """How many of the pictures show each variant."""
    means = [lab.scorer.images(pictures).mean(0) for pictures in variants.values()]
    nearest = (lab.scorer.images(drawn) @ F.normalize(torch.stack(means), dim=1).T).argmax(1)
    counts = nearest.bincount(minlength=len(variants)).tolist()
    return dict(zip(variants, counts))


def main(argv=None) -> None:
    parser = options(__doc__, samples=48)
    parser.add_argument("--images", type=Path, default=EXAMPLES / "sets" / "frog")
    parser.add_argument("--word", default="frog", help="what is biased")
    args = parser.parse_args(argv)
    lab = Lab.of(args)
    folders = sorted(folder for folder in args.images.iterdir() if folder.is_dir())
    variants = {folder.name: opened(folder) for folder in folders}
    balanced = [picture for pictures in variants.values() for picture in pictures[:2]]
    fair = lab.word(f"fair-{args.word}", images=balanced, init_word=args.word)
    rows = {"learnt from": balanced}
    for text in (args.word, fair.placeholder):
        drawn = lab.draw(f"a photo of a {text}", [fair])
        counts = ", ".join(f"{k} {v}" for k, v in shares(lab, variants, drawn).items())
        print(f"a photo of a {text}: {counts} of {len(drawn)}")
        rows[f"a photo of a {text}: {counts}"] = drawn[:SHOWN]
        rows[f"{text}: more"] = drawn[SHOWN : 2 * SHOWN]
    lab.save("bias.png", sheet(rows))
    if all(len(pictures) > 3 for pictures in variants.values()):
        half = {name: pictures[:3] for name, pictures in variants.items()}
        real = [shares(lab, half, pictures[3:]) for pictures in variants.values()]
        print(f"the same measure, by half of the pictures, on the others: {real}")


if __name__ == "__main__":
    main()
