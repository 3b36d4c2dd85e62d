"""What the scripts in this folder share: options, the bundled sets, results computed only once.

Everything goes into one folder, runs/NAME OF THE MODEL unless --out says otherwise: a word learnt
by one script is there for the others, and a script that was stopped goes on where it was. What the
options change is not asked again of a result that is there: take another --out for other numbers.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(ROOT))

import textinv  # noqa: E402
from models.command_line import read_templates  # noqa: E402
from models.evaluation import Scorer, confidence  # noqa: E402
from models.files import write_file  # noqa: E402

# Set: the coarse word that it starts from. The last is a style.
CONCEPTS = {
    "mushroom": "plant",
    "cupcake": "cake",
    "teddy": "toy",
    "parrot": "bird",
    "hedgehog": "animal",
    "teapot": "drink",
    "lantern": "object",
    "blueprint": "sketch",
}
STYLES = ("blueprint",)
OBJECTS = [name for name in CONCEPTS if name not in STYLES]


def options(doc: str, samples: int = 8, steps: int = 20) -> argparse.ArgumentParser:
    """What every script can be asked; samples and steps are its defaults of -n and --steps."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", help="checkpoint; the bundled model by default")
    parser.add_argument("--clip", help="OpenAI's ViT-B-32.pt; the bundled small CLIP by default")
    parser.add_argument("--out", type=Path, help="folder of all results (runs/NAME OF MODEL)")
    parser.add_argument("--quick", action="store_true", help="less of everything, in minutes")
    parser.add_argument("--training-steps", type=int, help="of every word (the model's default)")
    parser.add_argument("-n", type=int, default=samples, help=f"pictures a prompt ({samples})")
    parser.add_argument("--steps", type=int, default=steps, help=f"DDIM steps ({steps})")
    return parser


@dataclass
class Lab:
    """A model, what measures its pictures, and where results lie."""

    model: textinv.LatentDiffusion
    scorer: Scorer
    out: Path
    training: dict  # options of every invert
    sampling: dict  # options of every sample and evaluate

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Lab":
        """--quick learns words in fewer steps; these lie in a folder of their own."""
        model = textinv.load_model(args.model)
        out = args.out or Path("runs") / (Path(model.name).stem + "-quick" * args.quick)
        training = dict(steps=args.training_steps or (150 if args.quick else None))
        scorer = Scorer.load(args.clip, model.device)
        return cls(model, scorer, out, training, dict(n=args.n, steps=args.steps))

    def path(self, setup: str, name: str) -> Path:
        return self.out / setup.replace(" ", "-") / name

    def word(self, name: str, setup: str = "ours", images=None, **options) -> textinv.Concept:
        """The word <NAME> of a bundled set by the options of a setup, learnt if it was not yet; or
        the word in a file of that name."""
        if Path(name).is_file():
            return textinv.load_concept(name)
        path = self.path(setup, f"{name}.safetensors")
        if not path.exists():
            print(f"learning {path}", flush=True)
            images = pictures(name) if images is None else images
            if name in STYLES:
                options = (
                    dict(templates=read_templates("captions", textinv.find_images(images)))
                    | options
                )
            options = dict(init_word=CONCEPTS.get(name), placeholder=f"<{name}>") | options
            textinv.invert(self.model, images, **self.training | options).save(path)
        return textinv.load_concept(path)

    def draw(self, prompts, concepts=(), **options) -> list[Image.Image]:
        """`sample` with the script's -n and --steps, unless the options say otherwise."""
        return textinv.sample(self.model, prompts, concepts, **self.sampling | options)

    def save(self, name: str, picture: Image.Image) -> None:
        """The script's result, with 256 colours."""
        self.out.mkdir(parents=True, exist_ok=True)
        picture.quantize(256).save(self.out / name, optimize=True)
        print(f"wrote {self.out / name}")

    def scores(self, setup: str, name: str, texts, concepts=()) -> list[dict]:
        """Section 5.1 for a setup and a bundled set, a row for each prompt; texts as `evaluate`
        has them."""
        path = self.path(setup, f"{name}.json")
        if not path.exists():
            print(f"measuring {path}", flush=True)
            given = (self.model, self.scorer, pictures(name), texts, concepts)
            rows = list(textinv.evaluate(*given, **self.sampling))
            write_file(path, json.dumps(rows, indent=1).encode())
        return [dict(setup=setup, name=name) | row for row in json.loads(path.read_text())]


def pictures(name: str) -> Path:
    return EXAMPLES / "concepts" / name


def opened(folder: str | Path) -> list[Image.Image]:
    """The pictures of a folder."""
    return [textinv.open_image(path) for path in textinv.find_images(folder)]


def tiles(name: str, side: int = 64) -> list[Image.Image]:
    """The pictures of a sheet in examples/sets, row by row."""
    sheet = Image.open(EXAMPLES / "sets" / name).convert("RGB")
    corners = [(x, y) for y in range(0, sheet.height, side) for x in range(0, sheet.width, side)]
    return [sheet.crop((x, y, x + side, y + side)) for x, y in corners]


def draw_chart(path: Path, draw: Callable[[], bytes]) -> None:
    """Write what a function of chart.py draws, if there is matplotlib, an extra."""
    try:
        write_file(path, draw(), overwrite=True)
    except ImportError as error:
        print(f"no chart: {error}; pip install matplotlib")
    else:
        print(f"wrote {path}")


def plus_minus(values) -> str:
    """ "0.812 +-0.020": mean and 95% confidence interval."""
    return "{:.3f} +-{:.3f}".format(*confidence(values))
