"""Figure 7 (section 5.2): every setup of the paper, on every object set, in one chart.

    python examples/fig7.py --out runs/fig7          # hours on two CPU cores
    python examples/fig7.py --out runs/quick --quick  # less of everything

Writes a folder for each setup, its words, and beside each the scores; what is there already is not
computed again, so the script may be stopped at any time. At the end: fig7.csv, fig7.png (needs
matplotlib) and a table.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from words import CONCEPTS, STYLES  # noqa: E402

import textinv  # noqa: E402
from models.command_line import draw_chart, print_scores  # noqa: E402
from models.evaluation import Scorer  # noqa: E402
from models.files import write_file, write_table  # noqa: E402

SETUPS = {
    "ours": {},
    "high lr": dict(lr="high"),
    "low lr": dict(lr="low"),
    "2 vectors": dict(vectors=2),
    "3 vectors": dict(vectors=3),
    "progressive": dict(vectors=3, progressive=True),
    "regularized": dict(regularize=1e-3),
    "per image": dict(per_image=True),
    "bare template": dict(templates=["{}"]),
}
REFERENCES = {"image only": None, "prompt only": [""]}


def scores(
    path: Path, model, scorer: Scorer, folder: Path, setup: str, options: dict
) -> list[dict]:
    """The rows of one setup on one set, from the file if it was measured before."""
    if not path.exists():
        texts, concepts = REFERENCES.get(setup), []
        if setup in SETUPS:
            word = path.with_suffix(".safetensors")
            if not word.exists():
                arguments = dict(placeholder="<s>", **options["training"], **SETUPS[setup])
                textinv.invert(model, folder, CONCEPTS[folder.name], **arguments).save(word)
            concepts = [textinv.load_concept(word)]
            texts = [concepts[0].placeholder]
        rows = list(textinv.evaluate(model, scorer, folder, texts, concepts, **options["sampling"]))
        write_file(path, json.dumps(rows, indent=1).encode())
    about = dict(setup=setup, name=folder.name)
    return [about | row for row in json.loads(path.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/fig7"))
    parser.add_argument("--model", help="checkpoint; the bundled model by default")
    parser.add_argument("--clip", help="OpenAI's ViT-B-32.pt; the bundled small CLIP by default")
    parser.add_argument("--quick", action="store_true", help="two sets, 8 samples, 20 DDIM steps")
    args = parser.parse_args()
    model = textinv.load_model(args.model)
    scorer = Scorer.load(args.clip, model.device)
    sampling = dict(n=8, steps=20) if args.quick else dict(n=16, steps=50)
    options = dict(training=dict(steps=150) if args.quick else {}, sampling=sampling)
    names = [name for name in CONCEPTS if name not in STYLES][: 2 if args.quick else None]
    rows = []
    for setup in [*SETUPS, *REFERENCES]:
        for name in names:
            print(f"{setup}: {name}", flush=True)
            path = args.out / setup.replace(" ", "-") / f"{name}.json"
            folder = ROOT / "examples" / "concepts" / name
            rows += scores(path, model, scorer, folder, setup, options)
    write_table(args.out / "fig7.csv", rows, overwrite=True)
    print_scores(rows)
    draw_chart(rows, args.out / "fig7.png")


if __name__ == "__main__":
    main()
