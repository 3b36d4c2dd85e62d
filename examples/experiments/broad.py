"""Appendix D: words for broad concepts, by the number of training steps and of pictures.

    python examples/experiments/broad.py    # half an hour on two CPU cores

Parrots (by three vendors, not one parrot) and blueprints (of anything) are learnt from 1 to 25
pictures. At several steps samples of the word are compared with all hundred pictures: the Fréchet
distance, the cluster diversity, and the scores of figure 14. Distances are between CLIP features,
and, with lpips and clean-fid (lpips_fid.py), also the paper's. At the end it writes broad.csv and
broad.png (needs matplotlib).
"""

import json

import repository  # noqa: F401
from chart import curves, write_chart
from common import Workspace, cut_sheet, make_parser, run_script
from evaluate import editability, reconstruction, without_placeholder
from lpips_fid import load_networks, network_measures
from measures import cluster_diversity, frechet

import textinv
from models.files import write_file, write_table

# Each sheet with its init word, its templates and its prompts: one for the distances, and others
# for editability.
PARROTS = ["A photo of {}", "A photo of {} on the beach", "A sketch of {}"]
BLUEPRINTS = ["A picture in the style of {}"]
BLUEPRINTS += [f"A picture of a {thing} in the style of {{}}" for thing in ("castle", "cat")]
SETS = {"parrots": ("bird", "object", PARROTS), "blueprints": ("sketch", "style", BLUEPRINTS)}
STEPS = {False: [75, 150, 300, 600], True: [50, 150]}  # by --quick


def snapshots(workspace: Workspace, name: str, count: int, at: list[int]) -> list[textinv.Concept]:
    """Return the word at several steps of one training run."""
    paths = [workspace.path("broad", f"{name}-{count}-{step}.safetensors") for step in at]
    init_word, templates, _ = SETS[name]
    if not all(path.exists() for path in paths):
        given = dict(placeholder=f"<{name}>", templates=textinv.TEMPLATES[templates], steps=at[-1])
        for state in textinv.train(
            workspace.model, cut_sheet(f"{name}.webp")[:count], init_word, **given
        ):
            if state.step in at:
                state.concept.save(paths[at.index(state.step)], overwrite=True)
    return [textinv.load_concept(path) for path in paths]


def measures(
    workspace: Workspace, name: str, count: int, concept: textinv.Concept
) -> dict[str, float]:
    everything, prompts = cut_sheet(f"{name}.webp"), SETS[name][2]
    filled = [prompt.format(f"<{name}>") for prompt in prompts]
    few = max(2, workspace.sampling["n"] // 8)  # a mean needs fewer than a distribution
    counts = [workspace.sampling["n"]] + [few] * len(prompts[1:])
    drawn = [workspace.draw(prompt, [concept], n=n) for prompt, n in zip(filled, counts)]
    images = workspace.scorer.images(everything)
    plain, *edited = (workspace.scorer.images(group) for group in drawn)
    texts = workspace.scorer.texts([without_placeholder(prompt, "{}") for prompt in prompts[1:]])
    return network_measures(drawn[0], everything, count) | dict(
        frechet=frechet(plain, images),
        diversity=cluster_diversity(plain, images[:count]),
        reconstruction=reconstruction(plain, images),
        editability=sum(map(editability, edited, texts)) / len(edited),
    )


def main(argv=None) -> None:
    args = make_parser(__doc__, samples=64).parse_args(argv)
    workspace, rows, at = Workspace.open(args), [], STEPS[args.quick]
    print(load_networks()[-1])
    for name in SETS:
        for count in (1, 5) if args.quick else (1, 5, 25):
            for step, concept in zip(at, snapshots(workspace, name, count, at)):
                path = workspace.path("broad", f"{name}-{count}-{step}.json")
                if not path.exists():
                    write_file(path, json.dumps(measures(workspace, name, count, concept)).encode())
                found = json.loads(path.read_text())
                rows.append(dict(name=name, pictures=count, steps=step) | found)
                scores = (f"{measure} {value:.3f}" for measure, value in found.items())
                print(f"{name}, {count} pictures, {step} steps:", *scores, flush=True)
    write_table(workspace.out / "broad.csv", rows, overwrite=True)
    write_chart(workspace.out / "broad.png", lambda: curves(rows, list(rows[0])[3:]))


if __name__ == "__main__":
    run_script(main)
