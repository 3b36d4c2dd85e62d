"""Textual Inversion: a new word for a thing, learnt from 3-5 pictures of it.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion", ICLR 2023 (arXiv:2208.01618). "The paper" below is this one.

The text-to-image model stays as it is. A placeholder such as "<cat>" is given a vector v* of its
own in the space of the token embeddings, and v* alone is trained, with the model's own loss
(section 3, eq. 2):

    v* = argmin_v  E_{z ~ E(x), y, eps ~ N(0, 1), t}  || eps - eps_theta(z_t, t, c_theta(y, v)) ||^2

`diffusion_loss` is the mean of it over batch and elements. (A model that was trained to predict
velocity instead of eps is held to that; it has nothing to do with the word v.)

This file reads from top to bottom as the method: templates (y), pictures (x), the word (v),
training, sampling, measuring. What v* is looked up in: models/latent_diffusion.py, `embed`. The
command line is models/command_line.py.
"""

import json
import math
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from models.checkpoint import load_model
from models.editing import latent_mask, reconstruct, shrinking_masks, working_size
from models.embeddings import Concept, load_concept, load_concepts
from models.evaluation import (
    Scorer,
    editability,
    read_prompts,
    reconstruction,
    without_placeholder,
)
from models.latent_diffusion import LatentDiffusion
from models.parallel import add_up, rank_and_world, shared_out
from models.prompts import escape, without_weights
from models.stopping import Watch
from models.tokenizers import any_of

__all__ = [
    "Concept",
    "edit",
    "evaluate",
    "invert",
    "load_concept",
    "load_concepts",
    "load_model",
    "sample",
    "train",
]

# ------------------------------------------------------------------- y: the templates (appendix J)


def listed(text: str) -> tuple[str, ...]:
    """The entries of "one, two, ..." on any number of lines."""
    return tuple(" ".join(text.split()).split(", "))


OBJECT_TEMPLATES = listed(
    """
    a photo of a {}, a rendering of a {}, a cropped photo of the {}, the photo of a {}, a photo of
    a clean {}, a photo of a dirty {}, a dark photo of the {}, a photo of my {}, a photo of the
    cool {}, a close-up photo of a {}, a bright photo of the {}, a cropped photo of a {}, a photo
    of the {}, a good photo of the {}, a photo of one {}, a close-up photo of the {}, a rendition
    of the {}, a photo of the clean {}, a rendition of a {}, a photo of a nice {}, a good photo of
    a {}, a photo of the nice {}, a photo of the small {}, a photo of the weird {}, a photo of the
    large {}, a photo of a cool {}, a photo of a small {}
    """
)
# For styles the paper's code exchanges the noun and puts the word behind "in the style of".
STYLE_TEMPLATES = tuple(
    f"{text} in the style of {{}}"
    for text in listed(
        """
        a painting, a rendering, a cropped painting, the painting, a clean painting, a dirty
        painting, a dark painting, a picture, a cool painting, a close-up painting, a bright
        painting, a good painting, a rendition, a nice painting, a small painting, a weird
        painting, a large painting
        """
    )
)
TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}

# The paper's (appendix F) are for LDM and serve Stable Diffusion too; the bundled model has its own
# (models/emoji/config.json). The rate is multiplied by the batch size, as the paper does: 0.005 x
# 2 GPUs x 4 pictures = 0.04; with one GPU's 4 it is 0.02. A scale of 7.5 is within the paper's
# "typical scales (5-10)".
PAPER = dict(steps=5000, batch_size=4, lr=0.005, guidance_scale=7.5)
# The paper's High and Low (section 5.2) are 2e-2 and 1e-4 beside a base of 5e-3.
RATES = {"base": 1.0, "high": 4.0, "low": 0.02}

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
    captions = {path.with_suffix(".txt") for path in pictures}
    for path in files:
        if path.suffix.lower() in (".heic", ".heif"):
            warnings.warn(f"skipped {path}: HEIC is not read, save it as JPEG", stacklevel=2)
        elif path not in pictures and path not in captions:
            warnings.warn(f"skipped {path}: not a picture", stacklevel=2)
    if not pictures:
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{folder}: no pictures; 3-5 files of {kinds} are wanted")
    return pictures


def open_image(source: str | Path | Image.Image, behind: str = "white") -> Image.Image:
    """An upright RGB picture: EXIF orientation applied, transparency composited on white or what
    else is `behind`, of an animation the first frame."""
    if isinstance(source, Image.Image):
        image = source
    else:
        try:
            image = Image.open(source)
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{source}: not readable as a picture ({error})") from error
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # PIL raises whatever the damaged tags make it stumble over
        warnings.warn(f"{source}: damaged EXIF ({error}), taken as it lies", stacklevel=2)
    if image.mode == "F":
        brightest = np.asarray(image).max()
        image = image.point(lambda value: value * (255 if brightest <= 1 else 1))
    if image.mode.startswith("I"):  # 16 bits a pixel; PIL would clip them to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
    return image.convert("RGB")


def prepare_images(images: Images, size: int) -> Tensor:
    """Pictures as the model sees them, (N, 3, size, size) in [-1, 1]: the largest square in the
    middle, cropped and never stretched. Warns of pictures that are smaller than that."""
    if isinstance(images, (str, Path)):
        images = find_images(images)
    if not images:
        raise ValueError("no pictures given; 3-5 pictures of one thing are wanted")
    fitted = []
    for i, source in enumerate(images):
        image = open_image(source)
        if min(image.size) < size:
            name = f"picture {i + 1}" if isinstance(source, Image.Image) else source
            width, height = image.size
            warnings.warn(f"{name} has {width}x{height} pixels, enlarged for {size}", stacklevel=2)
        fitted.append(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    return torch.cat([to_tensor(image) for image in fitted])


def to_tensor(image: Image.Image) -> Tensor:
    """(1, C, H, W) in [-1, 1] of an RGB or a grey picture."""
    pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


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


# `Concept` is what stands for it in prompts and its vectors (V, D), the only thing that is trained:
# models/embeddings.py, which reads and writes the files of many programs.


def is_one_word(placeholder: str) -> bool:
    """Neither empty nor with a space in it."""
    return bool(placeholder) and not any(c.isspace() for c in placeholder)


def check_placeholder(model: LatentDiffusion, placeholder: str) -> None:
    """Raises ValueError for a name that is not one word, or that the model knows already."""
    fault = None
    if not is_one_word(placeholder):
        fault = "is empty or has a space in it"
    elif placeholder.isalnum() and len(known_ids(model, placeholder)) == 1:
        fault = "is an ordinary word of this model"
    if fault:
        raise ValueError(
            f"placeholder {placeholder!r} {fault}; use one like <cat> (--placeholder '<cat>', or "
            "--rename FILE='<cat>' for a finished word)"
        )


def known_ids(model: LatentDiffusion, text: str) -> list[int]:
    """The text's tokens but for those that stand for "unknown"."""
    unknown = getattr(model.tokenizer, "unknown_id", None)  # CLIP's tokenizer knows every byte
    return [i for i in model.tokenizer.token_ids(text) if i != unknown]


def initial_vectors(model: LatentDiffusion, init_word: str, count: int) -> Tensor:
    """(count, D) vectors of a coarse description ("cat", appendix F), any phrase.

    A phrase of more tokens than `count` is averaged in `count` consecutive groups; one of fewer
    is repeated from its beginning.
    """
    ids = known_ids(model, init_word)
    if not ids:
        raise ValueError(
            f"init word {init_word!r} has no tokens that this model knows; use a coarse word such "
            "as cat"
        )
    vectors = model.text_encoder.token_table[torch.tensor(ids)].float()
    if count <= len(ids):
        return torch.stack([group.mean(0) for group in vectors.tensor_split(count)])
    return vectors[torch.arange(count) % len(ids)]


# -------------------------------------------------------------------------------------- training


def draw_batch(
    model: LatentDiffusion, mean: Tensor, std: Tensor, count: int, generator: torch.Generator
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """What the expectation of eq. 2 runs over, for a batch of `count` = B: numbers of pictures, as
    they stand in the latents' moments (N, C, h, w); their latents z ~ E(x) (B, C, h, w); timesteps
    (B,), all alike likely, on the CPU; and eps, noise like z."""
    rows = torch.randint(len(mean), (count,), generator=generator)
    z = mean[rows] + std[rows] * normal(mean[rows], generator)
    t = torch.randint(model.schedule.length, (count,), generator=generator)
    return rows.tolist(), z, t, normal(z, generator)


def diffusion_loss(
    model: LatentDiffusion, latents: Tensor, context: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """The error that the paper's eq. 1 and 2 take the expectation of, a scalar: the mean square of
    what the model predicts of latents (B, C, h, w), noised with `noise` to timesteps t (B,), given
    the context (B, L, D), less what it should: eps, or velocity where model.schedule says so. t
    lies on the CPU, like the schedule."""
    x_t = model.schedule.q_sample(latents, t, noise)
    prediction = model.unet(x_t, t.to(x_t.device), context).float()
    return F.mse_loss(prediction, model.schedule.target(latents, t, noise))


@dataclass
class Lesson:
    """What the steps of a training draw their batches from: words, prompts and pictures, by
    `prepare` below."""

    model: LatentDiffusion
    words: list[Concept]  # the word that is learnt, and those of single pictures
    texts: list[list[str]]  # each picture's templates
    picture: list[int]  # which picture each of the latents is of
    mean: Tensor  # and std: moments of the latents (N, C, h, w)
    std: Tensor
    batch_size: int
    seed: int

    def draw(self, step: int) -> tuple[list[str], Tensor, Tensor, Tensor]:
        """A batch's prompts, latents, timesteps and noise: the same for the same seed and step."""
        draw, generator = draws_of_step(self.seed, step)
        rows, *batch = draw_batch(self.model, self.mean, self.std, self.batch_size, generator)
        shown = [self.picture[i] for i in rows]
        return [prompt_for(draw.choice(self.texts[i]), self.words, i) for i in shown], *batch

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 2 on this process's share of a step's batch, to be added up over the processes; and
        what it was computed from, for `check_finite`."""
        rank, world = rank_and_world()
        prompts, *batch = self.draw(step)
        latents, t, noise = (part[rank::world] for part in batch)
        context = self.model.encode_text(prompts[rank::world], self.words)
        loss = diffusion_loss(self.model, latents, context, t, noise) * (len(t) / self.batch_size)
        return loss, dict(autoencoder=latents, text_encoder=context, UNet=loss.detach().clone())

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """Eq. 2 on batches that are always the same and that no step of training draws, of eight
        pictures or more in all."""
        steps = range(0, -8, -self.batch_size)
        loss = torch.stack([self.loss(step)[0] for step in steps]).mean()
        add_up([loss])
        return loss.item()


@dataclass
class State:
    """Where training stands after a step. Its vectors are the ones in training: clone what is to
    outlast the next step.

    `loss` is that of eq. 2 on the step's batch. `concept` has the vectors in use so far (all of
    them unless progressive), `image_words` are empty unless asked for. `watch` is None unless
    training stops by itself.
    """

    step: int
    loss: Tensor
    concept: Concept
    image_words: list[Concept]
    parameters: list[Tensor]
    optimizer: torch.optim.AdamW
    watch: Watch | None = None

    def over(self, steps: int) -> bool:
        """Whether this was the last of so many steps, or has made the word steady."""
        return self.step >= steps or bool(self.watch and self.watch.steady())

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on beside the arguments, for `train(resume=...)`."""
        tensors = {"step": torch.tensor(self.step)}
        for i, vectors in enumerate(self.parameters):
            tensors[f"{i}.vectors"] = vectors.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{i}.{moment}"] = self.optimizer.state[vectors][moment]
        tensors |= self.watch.tensors() if self.watch else {}
        return {key: tensor.cpu().clone() for key, tensor in tensors.items()}


def restore(state: State, saved: Mapping) -> None:
    """Put what `State.tensors` returned back where it was."""
    for i, vectors in enumerate(state.parameters):
        names = [f"{i}.{kind}" for kind in ("vectors", "exp_avg", "exp_avg_sq")]
        if any(n not in saved or saved[n].shape != vectors.shape for n in names):
            raise ValueError("the state to resume from is of other vectors than are trained here")
        value, *moments = (saved[n].to(vectors, copy=True) for n in names)
        vectors.data.copy_(value)
        step = torch.tensor(float(saved["step"]))
        state.optimizer.state[vectors] = dict(step=step, exp_avg=moments[0], exp_avg_sq=moments[1])
    state.watch = Watch.of(saved) if state.watch else None
    state.step = int(saved["step"])


class NotFinite(ValueError):
    """NaN or infinity: of a training step (the word is left as it was before it), of the
    autoencoder, or in sampled pictures."""


def check_finite(step: int, gradients: Sequence[Tensor], **parts: Tensor) -> None:
    """Raises NotFinite with the name of the part that gave the first NaN or infinity, if the
    gradients hold one: whatever goes wrong on the way ends there."""
    if not all(gradient.isfinite().all() for gradient in gradients):
        broken = (name for name, tensor in parts.items() if not tensor.isfinite().all())
        part = next(broken, "gradient").replace("_", " ")
        raise NotFinite(
            f"step {step}: the {part} gave NaN or infinity; the word is left as it was before that "
            "step; begin anew with another --out and --precision bf16 or fp32, or a lower --lr"
        )


STOPS = ("never", "auto")


def train(
    model: LatentDiffusion,
    images: Images,
    init_word: str,
    placeholder: str = "<s>",
    vectors: int = 1,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | str | None = None,
    templates: Sequence[str] | Sequence[Sequence[str]] = OBJECT_TEMPLATES,
    flip: bool = True,
    weight_decay: float = 0.0,
    regularize: float = 0.0,
    progressive: bool = False,
    per_image: bool = False,
    stop: str = "never",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    resume: Mapping[str, Tensor] | None = None,
) -> Iterator[State]:
    """Textual inversion (section 3, eq. 2): an iterator with a `State` after each step.

    images: a folder, paths or PIL images, 3-5 of one thing. init_word: a coarse description whose
    embedding the word starts from. placeholder: what the word is called in prompts, any string
    without spaces. vectors: how many it has. steps, batch_size and lr default to the paper's (5000,
    4, 0.005) or to what suits the bundled model; the optimizer's rate is lr * batch_size (appendix
    F), and lr may be "base", "high" or "low". templates: prompts with {} for the word, one drawn
    anew for each picture of each step; or such a list for each picture. flip: mirror half of the
    pictures; switch it off for things with writing on them. weight_decay: the paper's code leaves
    AdamW's default of 0.01 on, which pulls v* towards 0; here it is off unless asked for.
    stop: "auto" ends before the last step once the word is steady (models/stopping.py), with the
    best of its vectors; every tenth step costs eight pictures more without a gradient.
    gradient_checkpointing: less memory, more time.

    The setups of section 5.2: regularize: weight of the squared distance of each vector from where
    it started (the paper's code mixes the vectors: it multiplies every difference with every
    other). progressive, with three vectors: the second joins after 2/5 of the steps, the third
    after 4/5 (the paper: 2000 and 4000 of 5000); AdamW knows them all along, so that weight decay
    works on them before, and their first updates are larger than others'. per_image:
    also learn a word for each picture, to hold what only that picture shows; the prompts end "with"
    it.

    resume: the `tensors` of a State; steps are counted from the very beginning. The same seed
    gives the same word, to the last bit, resumed or not, on the same machine and precision.

    Under torchrun each process takes its share of every batch (models/parallel.py). Nothing but the
    vectors gets a gradient. Raises ValueError for pictures, words and numbers that cannot be used,
    and NotFinite where a step gives NaN or infinity.
    """
    steps, batch_size, lr = hyperparameters(model, steps, batch_size, lr)
    check_range(1, vectors=vectors)
    check_range(0, weight_decay=weight_decay, regularize=regularize, seed=seed)
    if stop not in STOPS:
        raise ValueError(f"stop {stop!r} is not known; use {', '.join(STOPS)}")
    if progressive and (vectors, stop) != (3, "never"):
        raise ValueError(
            f"progressive training ends with 3 vectors, not with {vectors}, and not by stop 'auto'"
        )
    world = rank_and_world()[1]
    if world > batch_size:
        raise ValueError(f"a batch of {batch_size} is too small to split among {world} processes")

    start = initial_vectors(model, init_word, vectors)
    metadata = dict(init_word=init_word, steps=0, lr=lr, batch_size=batch_size, seed=seed)
    metadata |= dict(base_model=model.name, base_model_hash=model.fingerprint)
    word = Concept(placeholder, start.clone(), {k: str(v) for k, v in metadata.items()})
    lesson = prepare(model, word, images, templates, flip, per_image, batch_size, seed)
    parameters = [w.vectors.requires_grad_() for w in lesson.words]
    optimizer = torch.optim.AdamW(parameters, lr=lr * batch_size, weight_decay=weight_decay)
    watch = Watch() if stop == "auto" else None
    state = State(0, torch.tensor(0.0), word, lesson.words[1:], parameters, optimizer, watch)
    if resume:
        restore(state, resume)
    if state.over(steps):
        raise ValueError(f"the run is over after {state.step} steps; ask for more, or begin anew")

    def penalty() -> Tensor:
        return regularize * ((parameters[0] - start) ** 2).sum()

    states = training(state, lesson, steps, penalty, progressive)
    return checkpointed(model, states) if gradient_checkpointing else states


def training(
    state: State, lesson: Lesson, steps: int, penalty: Callable[[], Tensor], progressive: bool
) -> Iterator[State]:
    """The steps of `train`, from behind the state's on."""
    word, parameters, world = state.concept, state.parameters, rank_and_world()[1]
    # Trap: in fp16 the loss's gradient, which is divided by the number of latents, is lost as too
    # small.
    scale = 2.0**12 if lesson.model.dtype == torch.float16 else 1.0
    for step in range(state.step + 1, steps + 1):
        if progressive:
            used = 1 + (step - 1) * 5 // (2 * steps)
            lesson.words[0] = replace(word, vectors=parameters[0][:used])
        loss, parts = lesson.loss(step)
        state.optimizer.zero_grad()
        ((loss + penalty() / world) * scale).backward()
        gradients = [vectors.grad.div_(scale) for vectors in parameters]
        loss = loss.detach()
        add_up([loss, *gradients])
        check_finite(step, gradients, **parts)
        state.optimizer.step()
        word.metadata["steps"] = str(step)
        if state.watch and step % Watch.EVERY == 0:
            state.watch.look(lesson.fixed_loss(), parameters)
        state = replace(state, step=step, loss=loss, concept=lesson.words[0])
        yield state
        if state.over(steps):
            return


def checkpointed(model: LatentDiffusion, states: Iterator[State]) -> Iterator[State]:
    """The states, reached with gradient checkpointing, which is off again when they end."""
    model.unet.gradient_checkpointing = True
    try:
        yield from states
    finally:
        model.unet.gradient_checkpointing = False


def check_range(least: float, **numbers: float) -> None:
    for name, number in numbers.items():
        if not least <= number < 2**53:  # NaN is refused too
            fault = "is too large" if number >= 2**53 else f"must be at least {least:g}"
            raise ValueError(f"{name} is {number}; it {fault}")


def hyperparameters(model: LatentDiffusion, steps, batch_size, lr) -> tuple[int, int, float]:
    """What was asked for, else the paper's or the bundled model's."""
    defaults = PAPER | model.defaults
    if isinstance(lr, str):
        if lr not in RATES:
            raise ValueError(f"lr {lr!r} is not known; use a number, {', '.join(RATES)}")
        lr = defaults["lr"] * RATES[lr]
    given = dict(steps=steps, batch_size=batch_size, lr=lr)
    chosen = {k: defaults[k] if v is None else v for k, v in given.items()}
    check_range(1, steps=chosen["steps"], batch_size=chosen["batch_size"])
    check_range(1e-9, lr=chosen["lr"])
    return chosen["steps"], chosen["batch_size"], chosen["lr"]


def texts_by_picture(templates, pictures: int) -> list[list[str]]:
    """The templates of each picture, checked."""
    shared = not templates or isinstance(templates[0], str)
    texts = [list(templates)] * pictures if shared else [list(t) for t in templates]
    if len(texts) != pictures:
        raise ValueError(f"captions for {len(texts)} pictures, but {pictures} pictures")
    if not all(texts) or not all("{}" in text for own in texts for text in own):
        raise ValueError("every template needs a {} where the word goes, as in 'a photo of a {}'")
    return texts


def check_prompts(model: LatentDiffusion, prompts: Sequence[str], words: Sequence[Concept]) -> None:
    """Every training prompt must show the word to the text encoder, or there is nothing to learn:
    in "my-cats" there is no my-cat, and the end of a long prompt is cut off."""
    placeholders, word = model.placeholders(words), words[0].placeholder
    warn_of_cuts(
        model, {text: len(model.tokenizer.token_ids(text, placeholders)) for text in prompts}
    )
    for prompt in dict.fromkeys(prompts):
        if not set(placeholders[word]) <= set(model.tokenizer.encode(prompt, placeholders)):
            raise ValueError(
                f"{word} is not read in {prompt!r}: it touches other letters, or its vectors do "
                f"not fit into {model.tokenizer.max_length - 2} tokens; use a name like <cat>, "
                "fewer vectors or a shorter template"
            )


def prompt_for(template: str, words: Sequence[Concept], picture: int) -> str:
    """The prompt for a picture: the word in its place, then the picture's own word, if any."""
    prompt = template.replace("{}", words[0].placeholder)
    return f"{prompt} with {words[1:][picture].placeholder}" if len(words) > 1 else prompt


def prepare(
    model: LatentDiffusion,
    word: Concept,
    images: Images,
    templates: Sequence[str] | Sequence[Sequence[str]],
    flip: bool,
    per_image: bool,
    batch_size: int,
    seed: int,
) -> Lesson:
    """The checked word, pictures and prompts, the pictures encoded."""
    check_placeholder(model, word.placeholder)
    pixels = prepare_images(images, model.size)
    texts = texts_by_picture(templates, len(pixels))
    word.metadata["templates"] = json.dumps(list(dict.fromkeys(sum(texts, []))))
    image_words = first_image_words(model, word.placeholder, len(pixels)) if per_image else []
    words = [word, *image_words]
    check_prompts(model, [prompt_for(text, words, -1) for own in texts for text in own], words)
    seen, picture = views(pixels, flip)
    moments = latent_moments(model, seen)
    return Lesson(model, words, texts, picture, *moments, batch_size, seed)


def views(pixels: Tensor, flip: bool) -> tuple[Tensor, list[int]]:
    """What training sees of the pictures (N, 3, H, W): (M, 3, H, W), each picture plain and, with
    `flip`, mirrored; and for each of these which picture it is of. Augmentation belongs here."""
    kinds = [pixels, pixels.flip(-1)] if flip else [pixels]
    return torch.cat(kinds), [*range(len(pixels))] * len(kinds)


def latent_moments(model: LatentDiffusion, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (N, C, h, w) of the latents of pixels (N, 3, H, W).

    The autoencoder runs once; z ~ E(x) is drawn anew from these moments in every step.
    """
    moments = [model.encode_moments(image[None]) for image in pixels]
    mean, std = (torch.cat(parts) for parts in zip(*moments))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise NotFinite("the autoencoder gave NaN or infinity; try --precision bf16 or fp32")
    return mean, std


def first_image_words(model: LatentDiffusion, placeholder: str, count: int) -> list[Concept]:
    """<s>-1, <s>-2, ...: a word of one vector for each picture, all at the mean of the table,
    where they mean nothing in particular."""
    mean = model.text_encoder.token_table.float().mean(0, keepdim=True)
    return [Concept(f"{placeholder}-{i + 1}", mean.clone()) for i in range(count)]


def draws_of_step(seed: int, step: int) -> tuple[random.Random, torch.Generator]:
    """The random numbers of one step follow from its number, so that no state need be kept."""
    draw = random.Random(f"{seed} {step}")
    return draw, torch.Generator().manual_seed(draw.getrandbits(32))


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def invert(model: LatentDiffusion, images: Images, init_word: str, **options) -> Concept:
    """The learnt word of `train` after its last step; same arguments."""
    for state in train(model, images, init_word, **options):
        pass
    return replace(state.concept, vectors=state.concept.vectors.detach())


# -------------------------------------------------------------------------------------- sampling


WIDTHS = {768: "a Stable Diffusion 1", 1024: "a Stable Diffusion 2", 1280: "LDM text2img-large"}


def check_concepts(model: LatentDiffusion, concepts: Sequence[Concept]) -> None:
    """Raises ValueError for words of another model's width, and for names that are no good."""
    width = model.text_encoder.token_table.shape[1]
    seen = set()
    for concept in concepts:
        if concept.vectors.shape[1] != width:
            own = concept.vectors.shape[1]
            base = concept.metadata.get("base_model") or WIDTHS.get(own, "unknown")
            raise ValueError(
                f"{concept.placeholder} has vectors {own} wide, this model's words are {width} "
                f"wide; it was learnt with another model ({base}), so give that with --model"
            )
        if concept.placeholder in seen:
            raise ValueError(
                f"two words are called {concept.placeholder}; give one another name: "
                f"--rename FILE='<another>'"
            )
        check_placeholder(model, concept.placeholder)
        seen.add(concept.placeholder)


def warn_of_cuts(model: LatentDiffusion, counts: Mapping[str, int]) -> None:
    """Warn of each prompt that has more tokens than the text encoder reads."""
    room = model.tokenizer.max_length - 2
    for prompt, count in counts.items():
        if count > room:
            warnings.warn(f"{prompt!r} has {count} tokens, only the first {room} are read")


def conditions(
    model: LatentDiffusion,
    prompts: Sequence[str],
    concepts: Sequence[Concept] = (),
    guidance_scale: float | None = None,
) -> dict:
    """What `model.guided` asks for beside x_t and t, checked: the context (P, L, D) of the prompts,
    whose brackets are weights, that of the empty prompt, and the scale, or the model's default."""
    scale = guidance_of(model, guidance_scale)
    check_concepts(model, concepts)
    warn_of_cuts(model, {text: len(model.weighted_ids(text, concepts)) for text in prompts})
    context, uncond = model.encode_prompts(prompts, concepts), model.encode_text([""])
    return dict(context=context, uncond=uncond, guidance_scale=scale)


def guidance_of(model: LatentDiffusion, guidance_scale: float | None) -> float:
    """The scale that was asked for, or the model's default."""
    defaults = PAPER | model.defaults
    scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale is {scale}; use 1 (none) to about 15")
    return scale


def finished(pixels: Tensor) -> list[Image.Image]:
    """Pictures (N, 3, H, W) as PIL images, where they hold numbers."""
    if not pixels.isfinite().all():
        raise NotFinite(
            "sampling gave NaN or infinity; try --precision bf16 or fp32, or a lower --guidance"
        )
    return to_pil(pixels)


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

    Brackets in prompts are weights, "(word:1.2)", as models/prompts.py describes. guidance_scale:
    1 is none; by default 7.5, or what suits the bundled model. eta: 0 is deterministic, 1 as noisy
    as DDPM. size: pixels, one number or (width, height). Picture i of a prompt starts from noise
    of seed + i, whatever else is asked for with it. Raises ValueError for numbers out of range and
    for words that do not belong to this model.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        return []
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it goes from 0 (DDIM) to 1 (as noisy as DDPM)")
    check_range(1, n=n, batch_size=batch_size)
    check_range(0, seed=seed)
    size = model.size if size is None else size
    shape = model.latent_shape((size, size) if isinstance(size, int) else size)
    distinct = list(dict.fromkeys(prompts))
    given = conditions(model, distinct, concepts, guidance_scale)

    jobs = [(distinct.index(prompt), seed + i) for prompt in prompts for i in range(n)]
    images: list[Image.Image] = []
    for first in range(0, len(jobs), batch_size):
        rows, seeds = zip(*jobs[first : first + batch_size])
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        own = given | dict(context=given["context"][list(rows)])

        def draw(generators=generators) -> Tensor:
            noise = [torch.randn(shape, generator=g) for g in generators]
            return torch.stack(noise).to(model.device)

        images += finished(model.decode_latents(denoise(model, draw(), steps, eta, draw, **own)))
    return images


def denoise(
    model: LatentDiffusion,
    x_T: Tensor,
    steps: int,
    eta: float = 0.0,
    draw: Callable[[], Tensor] | None = None,
    **given,
) -> Tensor:
    """Latents (B, C, h, w) by DDIM from noise x_T like them; `given` is what `conditions` returns,
    and `draw` makes more noise where eta is not 0."""
    predict = partial(model.guided, **given)
    for latents in model.schedule.ddim_sample(predict, x_T, steps, eta, draw):
        pass
    return latents


STRENGTH = {False: 0.6, True: 1.0}  # of `edit`, by whether there is a mask


@torch.no_grad()
def edit(
    model: LatentDiffusion,
    image: str | Path | Image.Image,
    prompt: str,
    concepts: Sequence[Concept] = (),
    mask: str | Path | Image.Image | None = None,
    strength: float | None = None,
    n: int = 1,
    steps: int = 50,
    guidance_scale: float | None = None,
    seed: int = 0,
    reconstruct_steps: int = 100,
) -> list[Image.Image]:
    """n versions of a picture, repainted to the prompt where the mask is white: appendix A.3 and
    figure 10, by blended latent diffusion (Avrahami et al. 2022). Without a mask all of it is.

    Sampling starts from the picture noised to `strength`, in (0, 1], of the schedule; 1, the
    default with a mask, starts from noise alone, and 0.6, the default without one, keeps the
    layout (Meng et al. 2022). After every step the latents outside the mask are those of the
    picture, as noisy as the step, with the noise that sampling began with (the paper draws it
    anew). What is returned has the picture's size, and its very pixels (of a transparent one, on
    white) where the mask is black; the decoder is fitted to them in `reconstruct_steps` steps.
    Raises ValueError for pictures that cannot be read, for strips, for a mask of another size or
    without white, and as `sample` does.
    """
    image = open_image(image)
    strength = STRENGTH[mask is not None] if strength is None else strength
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; use more than 0 (keep all), and 1 at most")
    check_range(1, n=n)
    check_range(0, seed=seed, reconstruct_steps=reconstruct_steps)
    mask = Image.new("L", image.size, 255) if mask is None else open_mask(mask, image.size)
    given = conditions(model, [prompt], concepts, guidance_scale)
    size = working_size(image.size, model.size, model.unit)
    pixels = to_tensor(image.resize(size, Image.Resampling.BICUBIC)).to(model.device)
    inside = (to_tensor(mask.resize(size)).to(model.device) + 1) / 2
    z_0 = model.encode_images(pixels)
    repaint = latent_mask((to_tensor(mask) + 1) / 2, z_0.shape[-2:]).to(z_0)
    pairs = model.schedule.ddim_pairs(steps)[-max(1, round(strength * steps)) :]
    cell = model.unit // model.autoencoder.config.factor
    masks = shrinking_masks(repaint, len(pairs), cell)

    versions = []
    for s in range(seed, seed + n):
        noise = normal(z_0, torch.Generator().manual_seed(s))
        x = noise if strength == 1 else model.schedule.q_sample(z_0, pairs[0][0], noise)
        for (t, t_prev), blend in zip(pairs, masks):
            prediction = model.guided(x, torch.full((1,), t, device=x.device), **given)
            x = model.schedule.ddim_step(x, t, t_prev, prediction)
            x = blend * x + (1 - blend) * model.schedule.q_sample(z_0, t_prev, noise)
        x = repaint * x + (1 - repaint) * z_0
        fitted = reconstruct(model, x, pixels, inside, reconstruct_steps)
        drawn = finished(fitted)[0].resize(image.size, Image.Resampling.BICUBIC)
        versions.append(Image.composite(drawn, image, mask))
    return versions


def open_mask(source: str | Path | Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask of a picture of that (width, height): grey, white where it may change. What is
    transparent is black."""
    mask = open_image(source, "black").convert("L")
    if mask.size != size:
        raise ValueError(
            f"the mask has {mask.width}x{mask.height} pixels, the picture {size[0]}x{size[1]}; "
            "paint the mask over a copy of the picture"
        )
    if mask.getextrema()[1] < 128:
        raise ValueError("the mask is black everywhere; paint white what may change")
    return mask


def unknown_words(prompts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """What looks like a placeholder, <word>, and is none of the concepts'."""
    known = {concept.placeholder for concept in concepts}
    found = [word for prompt in prompts for word in re.findall(r"<[^<>\s]+>", prompt)]
    return [word for word in dict.fromkeys(found) if word not in known]


def plain_text(prompt: str, concepts: Sequence[Concept]) -> str:
    """The prompt for a CLIP that does not know the learnt words: without weights, and with the
    coarse word that each began as, where its file says so."""
    coarse = {concept.placeholder: concept.metadata.get("init_word", "") for concept in concepts}
    if coarse:
        prompt = re.sub(any_of(coarse), lambda word: escape(coarse[word[0]]), prompt)
    return " ".join(without_weights(prompt).split())


# ------------------------------------------------------------------------------------- measuring

RECONSTRUCTION = "A photo of {}"


def evaluate(
    model: LatentDiffusion,
    scorer: Scorer,
    images: Images,
    texts: Sequence[str] | None,
    concepts: Sequence[Concept] = (),
    prompts: Mapping[str, Sequence[str]] | None = None,
    n: int = 64,
    steps: int = 50,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Iterator[dict]:
    """Section 5.1: how like the pictures, and how obedient to the prompt; yields a row per prompt.

    images: the pictures that the word was learnt from. texts: what stands for {} in the prompts:
    [a placeholder] of `concepts`, human captions (n samples shared out among them), [""] for
    "prompt only", or None for "image only", where the pictures themselves are what is scored
    (against themselves too, so that each counts once as its own like).
    prompts: {kind: prompts}, by default models/evaluation_prompts.txt. A row is {"kind", "prompt",
    "score"}; the kind of the first, "A photo of {}", is "reconstruction". Raises ValueError as
    `sample` does.
    """
    check_range(1, n=n)
    prompts = read_prompts() if prompts is None else prompts
    pictures = find_images(images) if isinstance(images, (str, Path)) else images
    originals = scorer.images([open_image(picture) for picture in pictures])

    def features(prompt: str) -> Tensor:
        drawn = []
        for i, text in enumerate(texts):
            share = len(range(i, n, len(texts)))
            filled = " ".join(prompt.replace("{}", escape(text)).split())
            options = dict(steps=steps, guidance_scale=guidance_scale, seed=seed + len(drawn))
            drawn += sample(model, filled, concepts, n=share, **options) if share else []
        return scorer.images(drawn)

    kinds = [("reconstruction", RECONSTRUCTION)]
    kinds += [(kind, prompt) for kind, listed in prompts.items() for prompt in listed]

    def row(entry: tuple[str, str]) -> dict:
        kind, prompt = entry
        drawn = originals if texts is None else features(prompt)
        if kind == "reconstruction":
            score = reconstruction(drawn, originals)
        else:
            plain = without_placeholder(without_weights(prompt), "{}")
            score = editability(drawn, scorer.texts([plain]))
        return dict(kind=kind, prompt=prompt, score=score)

    yield from shared_out(kinds, row)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `python textinv.py invert ...`: see models/command_line.py."""
    from models.command_line import main  # which imports this file

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
