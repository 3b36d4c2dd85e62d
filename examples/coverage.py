"""Appendix B: does a word cover its concept? Samples beside the pictures, by a t-test.

    python examples/coverage.py --out runs/coverage

For each set: the L2 distances between its pictures (in CLIP's space), and those between pictures
and samples of "a photo of <s>". The concept is covered where Welch's test cannot tell the two means
apart (p > 0.05): for all samples, and for the 1/2, 1/4, 1/6 and 1/8 of the distances closest to
their mean, the paper's cherry-picking. Welch's, because the sets are of very unequal size; scipy is
no dependency, the test is in models/evaluation.py. The distances of one set share pictures, so they
are not independent and p is too small: a covered concept is the safer verdict. Words that are
there already are not learnt again.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from words import CONCEPTS, STYLES  # noqa: E402

import textinv  # noqa: E402
from models.evaluation import Scorer, closest, distances, welch  # noqa: E402
from models.files import write_table  # noqa: E402

SHARES = (1, 1 / 2, 1 / 4, 1 / 6, 1 / 8)


def learnt(model: textinv.LatentDiffusion, folder: Path, out: Path) -> textinv.Concept:
    """The word of a set, from `out` if it was learnt before."""
    if not out.exists():
        templates = textinv.TEMPLATES["style" if folder.name in STYLES else "object"]
        init_word = CONCEPTS[folder.name]
        textinv.invert(model, folder, init_word, templates=templates).save(out)
    return textinv.load_concept(out)


def coverage(samples, pictures) -> dict[str, str]:
    """p for each share of the distances."""
    within, between = distances(samples, pictures)
    return {
        f"1/{1 / share:.0f}": f"{welch(within, closest(between, share))[2]:.4f}" for share in SHARES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/coverage"))
    parser.add_argument("--model", help="checkpoint; the bundled model by default")
    parser.add_argument("--clip", help="OpenAI's ViT-B-32.pt; the bundled small CLIP by default")
    parser.add_argument("-n", type=int, default=256, help="samples per set (default 256)")
    args = parser.parse_args()
    model = textinv.load_model(args.model)
    scorer, rows = Scorer.load(args.clip, model.device), []
    for name in CONCEPTS:
        folder = ROOT / "examples" / "concepts" / name
        word = learnt(model, folder, args.out / f"{name}.safetensors")
        prompt = "a picture in the style of {}" if name in STYLES else "a photo of {}"
        drawn = textinv.sample(model, prompt.format(word.placeholder), [word], n=args.n)
        pictures = [textinv.open_image(path) for path in textinv.find_images(folder)]
        kind = "style" if name in STYLES else "object"
        rows.append(
            dict(name=name, kind=kind) | coverage(scorer.images(drawn), scorer.images(pictures))
        )
        print(rows[-1], flush=True)
        write_table(args.out / "coverage.csv", rows, overwrite=True)
    for share in list(rows[0])[2:]:
        for kind in ("object", "style"):
            ps = [float(row[share]) for row in rows if row["kind"] == kind]
            covered = sum(p > 0.05 for p in ps)
            print(f"{share} of the distances, {kind}s covered: {covered} of {len(ps)}")


if __name__ == "__main__":
    main()
