"""What the scripts share: options, the bundled picture sets, results computed only once, sheets.

All results go into one folder, runs/NAME OF THE MODEL unless --out says otherwise. A word learnt
by one script is there for the others, and a script that was stopped resumes. A result that is
there is not computed again, whatever the options say: take another --out for other numbers.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluate import Scorer, evaluate
from PIL import Image, ImageDraw, ImageFont
from repository import ROOT

import textinv
from models.files import write_file
from models.images import find_images, open_image
from models.latent_diffusion import LatentDiffusion

EXAMPLES = ROOT / "examples"
# Each set with the initial word that it starts from. The last is a style.
CONCEPTS = {
    "mushroom": "plant",
    "cupcake": "cake",
    "teddy": "toy",
    "parrot": "bird",
    "hedgehog": "animal",
    "teapot": "drink",
    "lantern": "object",
    "icecream": "food",
    "hotdog": "food",
    "flamingo": "bird",
    "zebra": "animal",
    "giraffe": "animal",
    "fire-engine": "vehicle",
    "ufo": "vehicle",
    "hibiscus": "plant",
    "gem": "object",
    "blueprint": "sketch",
}
STYLES = ("blueprint",)
# Things that some findings were tried on again. The experiments measure the other seven.
MORE = "icecream hotdog flamingo zebra giraffe fire-engine ufo hibiscus gem".split()
OBJECTS = [name for name in CONCEPTS if name not in (*MORE, *STYLES)]


def make_parser(doc: str, samples: int = 8, steps: int = 20) -> argparse.ArgumentParser:
    """Return a parser with what every script can be asked; `samples` and `steps` are its defaults
    of -n and --steps."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", help="sd15, sd21, sdxl, ldm, file, folder (default: bundled)")
    parser.add_argument("--clip", help="vit-b-32, or a file or folder (the bundled small CLIP)")
    parser.add_argument("--out", type=Path, help="folder of all results (runs/NAME OF MODEL)")
    parser.add_argument("--quick", action="store_true", help="less of everything, in minutes")
    parser.add_argument("--training-steps", type=int, help="for each word (the model's default)")
    parser.add_argument("-n", type=int, default=samples, help=f"pictures per prompt ({samples})")
    parser.add_argument("--steps", type=int, default=steps, help=f"DDIM steps ({steps})")
    return parser


@dataclass
class Workspace:
    """A model, a scorer for its pictures, and the folder of results."""

    model: LatentDiffusion
    scorer: Scorer
    out: Path
    training: dict  # options of every `textinv.invert`
    sampling: dict  # options of every `textinv.sample` and `evaluate`

    @classmethod
    def open(cls, args: argparse.Namespace) -> "Workspace":
        """Load what the options ask for. --quick learns words in fewer steps; these lie in a folder
        of their own."""
        model = textinv.load_model(args.model)
        out = args.out or Path("runs") / (Path(model.name).stem + "-quick" * args.quick)
        training = dict(steps=args.training_steps or (150 if args.quick else None))
        scorer = Scorer.load(args.clip, model.device)
        return cls(model, scorer, out, training, dict(n=args.n, steps=args.steps))

    def path(self, setup: str, name: str) -> Path:
        return self.out / setup.replace(" ", "-") / name

    def word(self, name: str, setup: str = "ours", images=None, **options) -> textinv.Concept:
        """Return the word of the file `name`, or else the word <NAME> of a bundled set, learnt with
        a setup's options if it is not there yet."""
        if name not in CONCEPTS and "init_word" not in options:
            if not Path(name).exists():
                raise ValueError(f"{name}: no such file; bundled sets are {', '.join(CONCEPTS)}")
            return textinv.load_concept(name)
        path = self.path(setup, f"{name}.safetensors")
        if not path.exists():
            print(f"learning {path}", flush=True)
            images = concept_folder(name) if images is None else images
            defaults = dict(init_word=CONCEPTS.get(name), placeholder=f"<{name}>")
            if name in STYLES:
                captions = textinv.read_templates("captions", find_images(images))
                defaults["templates"] = captions
            options = self.training | defaults | options
            textinv.invert(self.model, images, **options).save(path)
        return textinv.load_concept(path)

    def draw(self, prompts, concepts=(), **options) -> list[Image.Image]:
        """Sample by DDIM with the script's -n and --steps, unless the options say otherwise."""
        options = dict(sampler="ddim") | self.sampling | options
        return textinv.sample(self.model, prompts, concepts, **options)

    def save(self, name: str, picture: Image.Image) -> None:
        """Write the script's result, with 256 colours."""
        self.out.mkdir(parents=True, exist_ok=True)
        picture.quantize(256).save(self.out / name, optimize=True)
        print(f"wrote {self.out / name}")

    def scores(self, setup: str, name: str, texts, concepts=()) -> list[dict]:
        """Return the rows of section 5.1 for a setup and a bundled set; texts as in `evaluate`."""
        path = self.path(setup, f"{name}.json")
        if not path.exists():
            print(f"measuring {path}", flush=True)
            images = concept_folder(name)
            measured = evaluate(self.model, self.scorer, images, texts, concepts, **self.sampling)
            write_file(path, json.dumps(list(measured), indent=1).encode())
        return [dict(setup=setup, name=name) | row for row in json.loads(path.read_text())]


def run_script(main: Callable[[], None]) -> None:
    """Run a script as textinv.py runs: a user's mistake ends it with one line and status 2."""
    sys.exit(textinv.exit_status(main, Path(sys.argv[0]).name))


# ---------------------------------------------------------------------------------------- pictures


def concept_folder(name: str) -> Path:
    return EXAMPLES / "concepts" / name


def open_images(folder: str | Path) -> list[Image.Image]:
    return [open_image(path) for path in find_images(folder)]


def cut_sheet(name: str, side: int = 64) -> list[Image.Image]:
    """Return the pictures of a sheet in examples/sets, row by row."""
    whole = Image.open(EXAMPLES / "sets" / name).convert("RGB")
    corners = [(x, y) for y in range(0, whole.height, side) for x in range(0, whole.width, side)]
    return [whole.crop((x, y, x + side, y + side)) for x, y in corners]


SIDE, GAP, LABEL = 96, 4, 104  # of a picture, between pictures, of the column with the labels


def sheet(rows: Mapping[str, Sequence[Image.Image]], columns: Iterable = ()) -> Image.Image:
    """Return one picture of {label: pictures of a row}, below the columns' captions, as the paper's
    figures have them; None leaves a gap."""
    columns = list(columns)
    top, count = (44 if columns else 0), max(map(len, rows.values()))
    size = LABEL + count * (SIDE + GAP), top + len(rows) * (SIDE + GAP) - GAP
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(columns):
        left = LABEL + i * (SIDE + GAP)
        write_text(draw, (left, 0, left + SIDE, top), caption)
    for j, (label, pictures) in enumerate(rows.items()):
        y = top + j * (SIDE + GAP)
        write_text(draw, (0, y, LABEL - GAP, y + SIDE), label)
        for i, picture in enumerate(pictures):
            if picture is not None:
                page.paste(picture.resize((SIDE, SIDE)), (LABEL + i * (SIDE + GAP), y))
    return page


def write_text(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str) -> None:
    """Draw text into the middle of a box (left, top, right, bottom), on as many lines as needed."""
    font = ImageFont.load_default(size=11)
    width = max(1, int((box[2] - box[0]) / font.getlength("n")))
    lines = "\n".join(textwrap.wrap(text, width))
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    draw.multiline_text(middle, lines, "black", font, anchor="mm", align="center", spacing=2)
