"""Appendix D: words for broad concepts, by the number of training steps and of pictures.

    python examples/broad.py    # half an hour on two CPU cores; minutes with --quick

Parrots (of three vendors, not one parrot) and blueprints (of anything) are learnt from 1 to 25
pictures. At several steps samples of the word are compared with all hundred pictures: the Fréchet
distance, the cluster diversity, and the scores of figure 14. Distances are of CLIP features; with
lpips and clean-fid (lpips_fid.py) also the paper's own. At the end broad.csv, broad.png (needs
matplotlib) and a table.
"""

import json

import chart
import lpips_fid
from experiment import Lab, draw_chart, options, tiles
from measures import cluster_diversity, frechet

import textinv
from models.evaluation import editability, reconstruction, without_placeholder
from models.files import write_file, write_table

# Sheet: init word, templates, and prompts: for the distances, then for editability.
PARROTS = ["A photo of {}", "A photo of {} on the beach", "A sketch of {}"]
BLUEPRINTS = ["A picture in the style of {}"]
BLUEPRINTS += [f"A picture of a {thing} in the style of {{}}" for thing in ("castle", "cat")]
SETS = {"parrots": ("bird", "object", PARROTS), "blueprints": ("sketch", "style", BLUEPRINTS)}
STEPS = {False: [75, 150, 300, 600], True: [50, 150]}  # by --quick


def snapshots(lab: Lab, name: str, count: int, at: list[int]) -> list[textinv.Concept]:
    """The word at several steps of one training run."""
    paths = [lab.path("broad", f"{name}-{count}-{step}.safetensors") for step in at]
    init_word, templates, _ = SETS[name]
    if not all(path.exists() for path in paths):
        given = dict(placeholder=f"<{name}>", templates=textinv.TEMPLATES[templates], steps=at[-1])
        for state in textinv.train(lab.model, tiles(f"{name}.webp")[:count], init_word, **given):
            if state.step in at:
                state.concept.save(paths[at.index(state.step)], overwrite=True)
    return [textinv.load_concept(path) for path in paths]


def measures(lab: Lab, name: str, count: int, concept: textinv.Concept) -> dict[str, float]:
    everything, prompts = tiles(f"{name}.webp"), SETS[name][2]
    filled = [prompt.format(f"<{name}>") for prompt in prompts]
    few = max(2, lab.sampling["n"] // 8)  # a mean needs fewer than a distribution
    counts = [lab.sampling["n"]] + [few] * len(prompts[1:])
    drawn = [lab.draw(prompt, [concept], n=n) for prompt, n in zip(filled, counts)]
    images = lab.scorer.images(everything)
    plain, *edited = (lab.scorer.images(group) for group in drawn)
    texts = lab.scorer.texts([without_placeholder(prompt, "{}") for prompt in prompts[1:]])
    return lpips_fid.measures(drawn[0], everything, count) | dict(
        frechet=frechet(plain, images),
        diversity=cluster_diversity(plain, images[:count]),
        reconstruction=reconstruction(plain, images),
        editability=sum(map(editability, edited, texts)) / len(edited),
    )


def main(argv=None) -> None:
    args = options(__doc__, samples=64).parse_args(argv)
    lab, rows, at = Lab.of(args), [], STEPS[args.quick]
    print(lpips_fid.networks()[-1])
    for name in SETS:
        for count in (1, 5) if args.quick else (1, 5, 25):
            for step, concept in zip(at, snapshots(lab, name, count, at)):
                path = lab.path("broad", f"{name}-{count}-{step}.json")
                if not path.exists():
                    write_file(path, json.dumps(measures(lab, name, count, concept)).encode())
                found = json.loads(path.read_text())
                rows.append(dict(name=name, pictures=count, steps=step) | found)
                scores = (f"{measure} {value:.3f}" for measure, value in found.items())
                print(f"{name}, {count} pictures, {step} steps:", *scores, flush=True)
    write_table(lab.out / "broad.csv", rows, overwrite=True)
    draw_chart(lab.out / "broad.png", lambda: chart.curves(rows, list(rows[0])[3:]))


if __name__ == "__main__":
    main()
