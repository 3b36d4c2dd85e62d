"""Appendix B: does a word cover its concept? Samples beside the pictures, by a t-test.

    python examples/coverage.py    # twenty minutes on two CPU cores; minutes with --quick

For each set: the L2 distances between its pictures (in CLIP's space), and those between pictures
and samples of "a photo of <s>". The concept is covered where Welch's test cannot tell the two means
apart (p > 0.05): for all samples, and for the 1/2, 1/4, 1/6 and 1/8 of the distances closest to
their mean, the paper's cherry-picking. Welch's, because the sets are of very unequal size; scipy is
no dependency, the test is in measures.py. The distances of one set share pictures, so they
are not independent and p is too small: a covered concept is the safer verdict.
"""

from experiment import CONCEPTS, STYLES, Lab, opened, options, pictures
from measures import closest, distances, welch

from models.files import write_table

SHARES = (1, 1 / 2, 1 / 4, 1 / 6, 1 / 8)


def coverage(lab: Lab, name: str) -> dict[str, str]:
    """p for each share of the distances of one set."""
    word = lab.word(name)
    prompt = "a picture in the style of {}" if name in STYLES else "a photo of {}"
    drawn = lab.draw(prompt.format(word.placeholder), [word])
    images = opened(pictures(name))
    within, between = distances(lab.scorer.images(drawn), lab.scorer.images(images))
    row = dict(name=name, kind="style" if name in STYLES else "object")
    row |= dict(within=f"{within.mean():.3f}", to_samples=f"{between.mean():.3f}")
    shares = {f"1/{1 / s:.0f}": welch(within, closest(between, s))[2] for s in SHARES}
    return row | {share: f"{p:.4f}" for share, p in shares.items()}


def main(argv=None) -> None:
    args = options(__doc__, samples=256).parse_args(argv)
    lab, rows = Lab.of(args), []
    for name in ("mushroom", "blueprint") if args.quick else CONCEPTS:
        rows.append(coverage(lab, name))
        print(*rows[-1].values(), sep="\t", flush=True)
        write_table(lab.out / "coverage.csv", rows, overwrite=True)
    for share in list(rows[0])[4:]:
        for kind in ("object", "style"):
            ps = [float(row[share]) for row in rows if row["kind"] == kind]
            covered = sum(p > 0.05 for p in ps)
            print(f"{share} of the distances, {kind}s covered: {covered} of {len(ps)}")


if __name__ == "__main__":
    main()
