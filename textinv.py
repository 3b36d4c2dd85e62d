"""Textual Inversion: a new word for a thing, learnt from 3-5 pictures of it.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion", ICLR 2023 (arXiv:2208.01618). "The paper" below is this one.

The text-to-image model stays as it is. A placeholder such as "<cat>" is given a vector v* of its
own in the space of the token embeddings, and v* alone is trained, with the model's own loss
(section 3, eq. 2):

    v* = argmin_v  E_{z ~ E(x), y, eps ~ N(0, 1), t}  || eps - eps_theta(z_t, t, c_theta(y, v)) ||^2

This file reads from top to bottom as the method: templates (y), pictures (x), the word (v),
training, sampling, command line. What v* is looked up in: models/latent_diffusion.py, `embed`.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from models.checkpoint import BUNDLED, FAMILIES, load_clip, load_model
from models.clip import preprocess
from models.latent_diffusion import LatentDiffusion
from models.tokenizers import WordPieceTokenizer

__all__ = ["Concept", "invert", "load_concept", "load_model", "sample", "train"]

# ------------------------------------------------------------------- y: the templates (appendix J)

OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
# For styles the paper's code exchanges the noun and puts the word behind "in the style of".
STYLE_TEMPLATES = tuple(
    f"{text} in the style of {{}}"
    for text in (
        "a painting",
        "a rendering",
        "a cropped painting",
        "the painting",
        "a clean painting",
        "a dirty painting",
        "a dark painting",
        "a picture",
        "a cool painting",
        "a close-up painting",
        "a bright painting",
        "a good painting",
        "a rendition",
        "a nice painting",
        "a small painting",
        "a weird painting",
        "a large painting",
    )
)
TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}

# Steps, batch size and base learning rate. The paper's (appendix F) are for LDM and serve Stable
# Diffusion too; the bundled model is small and quick. The rate is multiplied by the batch size,
# as the paper does: 0.005 x 2 GPUs x 4 pictures = 0.04.
TRAINING = {"emoji": dict(steps=300, batch_size=8, lr=0.0025)}
PAPER = dict(steps=5000, batch_size=4, lr=0.005)
GUIDANCE = {"emoji": 3.0}  # elsewhere 7.5, within the paper's "typical scales (5-10)" for LDM

# ------------------------------------------------------------------------------ x: the pictures

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
Images = str | Path | Sequence[str | Path | Image.Image]


def find_images(folder: str | Path) -> list[Path]:
    """The picture files of a folder, sorted. Warns of every other file that it skips."""
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; give a folder with 3-5 pictures of one thing")
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.is_file())
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    for path in files:
        if path not in pictures:
            warnings.warn(f"skipped {path}: not a picture", stacklevel=2)
    if not pictures:
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{folder}: no pictures; 3-5 files of {kinds} are wanted")
    return pictures


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """An upright RGB picture: EXIF orientation applied, transparency composited on white."""
    if isinstance(source, Image.Image):
        image = source
    else:
        try:
            image = Image.open(source)
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{source}: not readable as a picture ({error})") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; PIL would clip them to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare_images(images: Images, size: int) -> Tensor:
    """Pictures as the model sees them, (N, 3, size, size) in [-1, 1]: the largest square in the
    middle, cropped and never stretched."""
    if isinstance(images, (str, Path)):
        images = find_images(images)
    if not images:
        raise ValueError("no pictures given; 3-5 pictures of one thing are wanted")
    fitted = [
        ImageOps.fit(open_image(image), (size, size), Image.Resampling.BICUBIC) for image in images
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures (N, 3, H, W) in [-1, 1] as PIL images."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """One picture of many, row by row."""
    columns = columns or math.ceil(len(images) ** 0.5)
    w, h = images[0].width + gap, images[0].height + gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * w - gap, rows * h - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * w, i // columns * h))
    return sheet


# ----------------------------------------------------------------------------- v*: the new word


@dataclass
class Concept:
    """A learnt word: what stands for it in prompts, and its vectors (V, D), float32.

    V is 1 in the paper's main setup; more vectors act like several words in a row (section 5.2).
    """

    placeholder: str
    vectors: Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a .safetensors file {placeholder: (V, D)}, which diffusers reads as it is."""
        vectors = self.vectors.detach().cpu().contiguous()
        metadata = self.metadata | {"placeholder": self.placeholder}
        write_file(path, save({self.placeholder: vectors}, metadata), overwrite)


def load_concept(path: str | Path) -> Concept:
    """A word that `Concept.save` wrote, or any .safetensors with one (V, D) or (D,) tensor."""
    try:
        with safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            vectors = file.get_tensor(names[0]).float() if len(names) == 1 else None
    except Exception as error:  # the library raises its own types for damaged files
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not readable as a .safetensors word ({reason})") from error
    if vectors is None or vectors.ndim not in (1, 2) or not vectors.isfinite().all():
        raise ValueError(f"{path}: expected one finite tensor (V, D), found {', '.join(names[:3])}")
    return Concept(names[0], torch.atleast_2d(vectors), metadata)


def free_target(path: Path, overwrite: bool) -> Path:
    """The path, if it may be written: said before the work, not after it."""
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or say --overwrite")
    return path


def write_file(path: str | Path, content: bytes, overwrite: bool = False) -> None:
    """All or nothing: a temporary file beside the target, synced, then renamed."""
    path = free_target(Path(path), overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def check_placeholder(model: LatentDiffusion, placeholder: str) -> None:
    if not placeholder or any(c.isspace() for c in placeholder):
        raise ValueError(
            f"placeholder {placeholder!r} is empty or has a space in it; use one like <cat>"
        )
    if placeholder.isalnum() and len(model.tokenizer.words(placeholder)) == 1:
        raise ValueError(
            f"placeholder {placeholder!r} is an ordinary word of this model; use <{placeholder}>"
        )


def initial_vectors(model: LatentDiffusion, init_word: str, count: int) -> Tensor:
    """(count, D) vectors of a coarse description ("cat", appendix F), any phrase.

    A phrase of more tokens than `count` is averaged in `count` consecutive groups; one of fewer
    is repeated from its beginning.
    """
    ids = model.tokenizer.words(init_word)
    if not ids:
        raise ValueError(f"init word {init_word!r} has no tokens; use a coarse word such as cat")
    vectors = model.text_encoder.token_table[torch.tensor(ids)].float()
    if count <= len(ids):
        return torch.stack([group.mean(0) for group in vectors.tensor_split(count)])
    return vectors[torch.arange(count) % len(ids)]


# -------------------------------------------------------------------------------------- training


@dataclass
class State:
    """Where training stands after a step. `loss` is a tensor, so that reading it (and waiting
    for the device) is left to whoever wants the number."""

    step: int
    loss: Tensor
    concept: Concept


def diffusion_loss(
    model: LatentDiffusion,
    latents: Tensor,
    prompts: Sequence[str],
    concepts: Sequence[Concept],
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Eq. 1 of the paper for given t and noise, a scalar: how well the model takes the noise out
    of latents (B, C, h, w), noised to timesteps t (B,), when told the prompts."""
    x_t = model.schedule.q_sample(latents, t, noise)
    context = model.encode_text(prompts, concepts)
    prediction = model.unet(x_t, t, context).float()
    return F.mse_loss(prediction, model.schedule.target(latents, t, noise))


def train(
    model: LatentDiffusion,
    images: Images,
    init_word: str,
    placeholder: str = "<s>",
    vectors: int = 1,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    templates: Sequence[str] = OBJECT_TEMPLATES,
    flip: bool = True,
    weight_decay: float = 0.0,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Iterator[State]:
    """Textual inversion (section 3, eq. 2), a generator that yields a `State` after each step.

    images: a folder, paths or PIL images, 3-5 of one thing. init_word: a coarse description whose
    embedding the word starts from. vectors: how many vectors the word has. steps, batch_size and
    lr default to the paper's (5000, 4, 0.005) or to what suits the bundled model; the optimizer's
    rate is lr * batch_size (appendix F). templates: prompts with {} for the word, one drawn anew
    for each picture of each step. flip: mirror half of the pictures; switch it off for things
    with writing on them. weight_decay: the paper's code leaves AdamW's default of 0.01 on, which
    pulls v* towards 0; here it is off unless asked for. The same seed gives the same word.

    Nothing but the vectors gets a gradient. Raises ValueError for pictures, words and numbers
    that cannot be used.
    """
    defaults = TRAINING.get(model.name, PAPER)
    steps = defaults["steps"] if steps is None else steps
    batch_size = defaults["batch_size"] if batch_size is None else batch_size
    lr = defaults["lr"] if lr is None else lr
    for name, value in dict(steps=steps, batch_size=batch_size, lr=lr, vectors=vectors).items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be more than 0")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError("every template needs a {} where the word goes, as in 'a photo of a {}'")
    check_placeholder(model, placeholder)

    pixels = prepare_images(images, model.size)
    both = torch.cat([pixels, pixels.flip(-1)]) if flip else pixels
    # The autoencoder runs once. z ~ E(x) is drawn anew from its moments in every step.
    moments = [model.encode_moments(image[None]) for image in both]
    mean, std = (torch.cat(parts) for parts in zip(*moments))

    word = initial_vectors(model, init_word, vectors).to(model.device).requires_grad_()
    metadata = dict(init_word=init_word, steps=0, lr=lr * batch_size, batch_size=batch_size)
    metadata |= dict(seed=seed, base_model=model.name, base_model_hash=model.fingerprint)
    metadata |= dict(templates=json.dumps(list(templates)))
    concept = Concept(placeholder, word, {k: str(v) for k, v in metadata.items()})
    optimizer = torch.optim.AdamW([word], lr=lr * batch_size, weight_decay=weight_decay)

    generator = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    model.unet.gradient_checkpointing = gradient_checkpointing
    try:
        for step in range(1, steps + 1):
            rows = torch.randint(len(both), (batch_size,), generator=generator).to(mean.device)
            z = mean[rows] + std[rows] * normal(mean[rows], generator)
            t = torch.randint(model.schedule.length, (batch_size,), generator=generator)
            prompts = [draw.choice(templates).format(placeholder) for _ in range(batch_size)]
            noise = normal(z, generator)

            loss = diffusion_loss(model, z, prompts, [concept], t.to(z.device), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            concept.metadata["steps"] = str(step)
            yield State(step, loss.detach(), concept)
    finally:
        model.unet.gradient_checkpointing = False


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def invert(model: LatentDiffusion, images: Images, init_word: str, **options) -> Concept:
    """The learnt word of `train` after its last step; same arguments."""
    for state in train(model, images, init_word, **options):
        pass
    return Concept(
        state.concept.placeholder, state.concept.vectors.detach(), state.concept.metadata
    )


# -------------------------------------------------------------------------------------- sampling


def check_concepts(model: LatentDiffusion, concepts: Sequence[Concept]) -> None:
    width = model.text_encoder.token_table.shape[1]
    seen = set()
    for concept in concepts:
        if concept.vectors.shape[1] != width:
            raise ValueError(
                f"{concept.placeholder} has vectors {concept.vectors.shape[1]} wide, this model's "
                f"words are {width} wide; it was learnt with another model "
                f"({concept.metadata.get('base_model', 'unknown')})"
            )
        if concept.placeholder in seen:
            raise ValueError(f"two words are called {concept.placeholder}; load only one of them")
        seen.add(concept.placeholder)


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    prompts: str | Sequence[str],
    concepts: Sequence[Concept] = (),
    n: int = 1,
    steps: int = 50,
    guidance_scale: float | None = None,
    eta: float = 0.0,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
) -> list[Image.Image]:
    """Pictures of the prompts by DDIM (Song et al. 2021), n of each, all of one prompt in a row.

    guidance_scale: 1 is none; by default 7.5, or what suits the bundled model. eta: 0 is
    deterministic, 1 as noisy as DDPM. size: pixels, one number or (width, height). Picture i of
    a prompt starts from noise of seed + i, whatever else is asked for with it. Raises ValueError
    for numbers out of range and for words that do not belong to this model.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if n < 1 or not 0 <= eta <= 1:
        raise ValueError(f"n is {n} and eta {eta}; n must be at least 1 and eta from 0 to 1")
    check_concepts(model, concepts)
    if guidance_scale is None:
        guidance_scale = GUIDANCE.get(model.name, 7.5)
    size = model.size if size is None else size
    shape = model.latent_shape((size, size) if isinstance(size, int) else size)
    uncond = model.encode_text([""])

    jobs = [(prompt, seed + i) for prompt in prompts for i in range(n)]
    images: list[Image.Image] = []
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        generators = [torch.Generator().manual_seed(s) for _, s in batch]
        context = model.encode_text([prompt for prompt, _ in batch], concepts)

        def draw(generators=generators) -> Tensor:
            rows = [torch.randn(shape, generator=g) for g in generators]
            return torch.stack(rows).to(model.device)

        def predict(x_t: Tensor, t: Tensor, context=context) -> Tensor:
            return model.guided(x_t, t, context, uncond, guidance_scale)

        for latents in model.schedule.ddim_sample(predict, draw(), steps, eta, draw):
            pass
        images += to_pil(model.decode_latents(latents))
    return images


def unknown_words(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """What looks like a placeholder, <word>, and is none of the concepts'."""
    known = {concept.placeholder for concept in concepts}
    found = [word for prompt in prompts for word in re.findall(r"<[^<>\s]+>", prompt)]
    return [word for word in dict.fromkeys(found) if word not in known]


# ---------------------------------------------------------------------------------- command line

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="textinv.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", metavar="PATH", help="checkpoint; without it the bundled model")
    shared.add_argument("--family", choices=FAMILIES, help="if the file's keys do not tell")
    shared.add_argument("--prediction", choices=("eps", "v"), help="if the file does not tell")
    shared.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    shared.add_argument("--precision", choices=PRECISIONS, help="the device's best by default")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--overwrite", action="store_true", help="replace files of this name")

    p = verbs.add_parser("invert", parents=[shared], help="learn a word from pictures")
    p.add_argument("images", help="folder with 3-5 pictures of one thing")
    p.add_argument("--init-word", metavar="WORDS", help="coarse description to start from: cat")
    p.add_argument("--placeholder", metavar="WORD", help="what to call it; <NAME OF --out>")
    p.add_argument("--out", metavar="FILE", help="NAME OF FOLDER.safetensors by default")
    p.add_argument("--vectors", type=int, default=1, help="vectors per word (default 1)")
    p.add_argument("--steps", type=int)
    p.add_argument("--batch-size", type=int)
    p.add_argument("--lr", type=float, help="base rate; multiplied by the batch size")
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--templates", default="object", help="object, style, or one: 'a photo of {}'")
    p.add_argument("--no-flip", action="store_true", help="do not mirror the pictures")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower")
    p.add_argument("--preview-every", type=int, metavar="STEPS", help="0 for none")
    p.set_defaults(run=run_invert)

    p = verbs.add_parser("sample", parents=[shared], help="draw prompts")
    p.add_argument("prompts", nargs="+", metavar="PROMPT")
    p.add_argument("--concept", action="append", default=[], metavar="FILE", help="learnt word")
    p.add_argument("-n", type=int, default=4, help="pictures per prompt (default 4)")
    p.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    p.add_argument("--guidance", type=float)
    p.add_argument("--eta", type=float, default=0.0)
    p.add_argument("--size", metavar="W[xH]", help="pixels; the model's own size by default")
    p.add_argument("--out", default="grid.png", metavar="FILE", help="the grid (grid.png)")
    p.add_argument("--singles", metavar="FOLDER", help="also write each picture by itself")
    p.set_defaults(run=run_sample)
    return parser


def load_for(args: argparse.Namespace) -> LatentDiffusion:
    model = load_model(
        args.model, args.device, PRECISIONS.get(args.precision), args.family, args.prediction
    )
    print(model)
    return model


def write_png(path: str | Path, image: Image.Image, text: dict, overwrite: bool) -> None:
    """A PNG whose text chunks say how it was made."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with tempfile.SpooledTemporaryFile() as buffer:
        image.save(buffer, "PNG", pnginfo=info)
        buffer.seek(0)
        write_file(path, buffer.read(), overwrite)


@torch.no_grad()
def clip_similarity(images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
    """Cosines (N, M) between N pictures and M captions, in the space of the bundled CLIP."""
    clip = load_clip()
    tokenizer = WordPieceTokenizer.load(BUNDLED / "vocab.txt", clip.config.text.max_length)
    ids = torch.tensor([tokenizer.pad(tokenizer.encode(c)) for c in captions])
    text = F.normalize(clip.encode_text(ids, tokenizer.end_id), dim=-1)
    pixels = preprocess(images, clip.config.vision.image_size)
    return F.normalize(clip.encode_image(pixels), dim=-1) @ text.T


def near_words(paths: Sequence[Path], count: int = 5) -> str:
    """The trained words of the bundled model that look most like the pictures."""
    words = json.loads((BUNDLED / "config.json").read_text())["nouns"]
    pictures = [open_image(path) for path in paths]
    cosines = clip_similarity(pictures, [f"a photo of a {word}" for word in words]).mean(0)
    return ", ".join(words[i] for i in cosines.topk(count).indices)


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def run_invert(args: argparse.Namespace) -> None:
    name = Path(args.out).stem if args.out else Path(args.images).resolve().stem
    out = free_target(Path(args.out or f"{name}.safetensors"), args.overwrite)
    placeholder = args.placeholder if args.placeholder is not None else f"<{name}>"
    paths = find_images(args.images)
    if not args.init_word:
        raise ValueError(
            "--init-word is missing: the coarse word for what the pictures show (cat, mug, "
            f"painting), from which the new word starts; nearest here: {near_words(paths)}"
        )
    model = load_for(args)
    ids = model.tokenizer.words(args.init_word)
    print(f"init word {args.init_word!r}: {len(ids)} token(s), ids {ids}; {args.vectors} vector(s)")
    pictures = to_pil(prepare_images(paths, model.size))
    options = dict(placeholder=placeholder, vectors=args.vectors, seed=args.seed)
    options |= dict(steps=args.steps, batch_size=args.batch_size, lr=args.lr)
    options |= dict(templates=TEMPLATES.get(args.templates, (args.templates,)))
    options |= dict(flip=not args.no_flip, weight_decay=args.weight_decay)
    options |= dict(gradient_checkpointing=args.gradient_checkpointing)
    steps = args.steps if args.steps is not None else TRAINING.get(model.name, PAPER)["steps"]
    every = args.preview_every if args.preview_every is not None else max(1, steps // 3)
    print(f"learning {placeholder} from {len(pictures)} pictures, {steps} steps, to {out}")

    beside = str(out.with_suffix(""))
    loss = 0.0
    for state in train(model, pictures, args.init_word, **options):
        if state.step == 1:  # the arguments were good
            progress = tqdm(total=steps, unit="step")
            text = {"what": "what the model sees"}
            write_png(f"{beside}.inputs.png", grid(pictures), text, True)
        progress.update()
        if state.step % 10 == 0:
            loss = state.loss.item() if not loss else 0.9 * loss + 0.1 * state.loss.item()
            progress.set_postfix(loss=f"{loss:.4f}", peak=peak_memory(model.device))
        if every and state.step % every == 0 and state.step < steps:
            prompt = f"a photo of {placeholder}"
            shown = sample(model, prompt, [state.concept], n=4, steps=20, seed=args.seed)
            write_png(f"{beside}.step-{state.step}.png", grid(shown), {"prompt": prompt}, True)
    progress.close()
    state.concept.save(out, args.overwrite)
    print(f"wrote {out}; try: python textinv.py sample 'a photo of {placeholder}' --concept {out}")


def run_sample(args: argparse.Namespace) -> None:
    out = free_target(Path(args.out), args.overwrite)
    concepts = [load_concept(path) for path in args.concept]
    for word in unknown_words(args.prompts, concepts):
        known = ", ".join(c.placeholder for c in concepts) or "none"
        warnings.warn(f"{word} is no learnt word (known: {known}); it is read as plain text")
    size = None
    if args.size:
        if not re.fullmatch(r"\d+(x\d+)?", args.size):
            raise ValueError(f"--size {args.size} is not a size; use 512 or 512x768")
        size = tuple(int(s) for s in (args.size.split("x") * 2)[:2])
    model = load_for(args)
    settings = dict(steps=args.steps, eta=args.eta, seed=args.seed, size=size or model.size)
    guidance = GUIDANCE.get(model.name, 7.5) if args.guidance is None else args.guidance
    settings |= dict(guidance_scale=guidance)
    print(f"drawing {len(args.prompts)} prompt(s) x {args.n}, {args.steps} DDIM steps, to {out}")
    rows = []
    for prompt in tqdm(args.prompts, unit="prompt", disable=len(args.prompts) == 1):
        images = sample(model, prompt, concepts, n=args.n, **settings)
        for i, image in enumerate(images):
            if args.singles:
                path = Path(args.singles) / f"{len(rows) + i:04d}.png"
                text = {"prompt": prompt, "settings": settings | dict(seed=args.seed + i)}
                write_png(path, image, text, args.overwrite)
        rows += images
    columns = args.n if len(args.prompts) > 1 else None
    text = {"prompt": "\n".join(args.prompts), "settings": settings | dict(model=model.name)}
    write_png(out, grid(rows, columns), text, args.overwrite)
    print(f"wrote {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one line on standard error for a user's mistake."""
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"textinv: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
