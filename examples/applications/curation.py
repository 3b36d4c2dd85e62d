"""Image curation (section 4): 16 candidates for a prompt, sorted by CLIP.

    python examples/applications/curation.py
    python examples/applications/curation.py --concepts cat.safetensors --prompts "a {}" --keep 1

The paper picks the best of 16 by hand and says that CLIP can do so. A row shows all 16 from best to
worst; --keep K also writes the K best of each row as single files, into the folder curation. CLIP
does not know the learnt word, so it is asked for the prompt with the initial word instead.
"""

import repository  # noqa: F401
from common import Workspace, make_parser, run_script, sheet
from evaluate import plain_text, rank
from gallery import galleries

from models.files import write_png

PROMPTS = ("a photo of a {} on the beach", "a sketch of a {}")


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=16, steps=50)
    parser.add_argument("--concepts", nargs="+", default=["mushroom", "hedgehog"])
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="with {} for the word")
    parser.add_argument(
        "--keep", type=int, default=0, metavar="K", help="write the K best as files"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.keep <= args.n:
        parser.error(f"--keep {args.keep} of -n {args.n} pictures; keep 1 to {args.n}")
    workspace, rows = Workspace.open(args), {}
    for number, (label, text, word, drawn) in enumerate(galleries(workspace, args)):
        order = rank(workspace.scorer, drawn, plain_text(text, [word]))
        rows[label] = [drawn[i] for i in order]
        for place, seed in enumerate(order[: args.keep]):  # picture i is drawn with seed i
            settings = dict(seed=seed, steps=args.steps, model=workspace.model.name)
            path = workspace.path("curation", f"{number:02d}-{place + 1}.png")
            write_png(path, drawn[seed], {"prompt": text, "settings": settings}, overwrite=True)
            print(f"wrote {path}")
    workspace.save("curation.png", sheet(rows))


if __name__ == "__main__":
    run_script(main)
