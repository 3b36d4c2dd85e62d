"""Appendix B: does a word cover its concept? Samples beside the pictures, by a t-test.

    python examples/experiments/coverage.py    # twenty minutes on two CPU cores

For each set two means are compared: of the L2 distances between its pictures (in CLIP's space), and
of those between pictures and samples of "a photo of <s>". The concept is covered where Welch's
test cannot tell them apart (p > 0.05): for all distances, and for the 1/2, 1/4, 1/6 and 1/8 of them
closest to their mean, the paper's cherry-picking. The test is Welch's because the two groups have
very unequal sizes. The distances of one set share pictures, so they are not independent and p is
too small: "covered" is the safer of the two verdicts.
"""

import repository  # noqa: F401
from common import OBJECTS, STYLES, Workspace, concept_folder, make_parser, open_images, run_script
from measures import closest, distances, welch

from models.files import write_table

SHARES = (1, 1 / 2, 1 / 4, 1 / 6, 1 / 8)


def coverage(workspace: Workspace, name: str) -> dict[str, str]:
    """Return a row of the table: p for each share of the distances of one set."""
    word = workspace.word(name)
    prompt = "a picture in the style of {}" if name in STYLES else "a photo of {}"
    drawn = workspace.draw(prompt.format(word.placeholder), [word])
    images = open_images(concept_folder(name))
    within, between = distances(workspace.scorer.images(drawn), workspace.scorer.images(images))
    row = dict(name=name, kind="style" if name in STYLES else "object")
    row |= dict(within=f"{within.mean():.3f}", to_samples=f"{between.mean():.3f}")
    shares = {f"1/{1 / s:.0f}": welch(within, closest(between, s))[2] for s in SHARES}
    return row | {share: f"{p:.4f}" for share, p in shares.items()}


def main(argv=None) -> None:
    args = make_parser(__doc__, samples=256).parse_args(argv)
    workspace, rows = Workspace.open(args), []
    for name in ("mushroom", "blueprint") if args.quick else [*OBJECTS, *STYLES]:
        rows.append(coverage(workspace, name))
        print(*rows[-1].values(), sep="\t", flush=True)
        write_table(workspace.out / "coverage.csv", rows, overwrite=True)
    for share in list(rows[0])[4:]:
        for kind in ("object", "style"):
            ps = [float(row[share]) for row in rows if row["kind"] == kind]
            covered = sum(p > 0.05 for p in ps)
            print(f"{share} of the distances, {kind}s covered: {covered} of {len(ps)}")


if __name__ == "__main__":
    run_script(main)
