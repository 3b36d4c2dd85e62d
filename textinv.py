"""Textual Inversion: learn a new word for a thing from 3-5 pictures of it.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion", ICLR 2023 (arXiv:2208.01618). "The paper" below is this one.

The text-to-image model stays as it is. A placeholder such as "<cat>" gets a vector v* of its own in
the space of the token embeddings, and v* alone is trained, with the model's own loss (section 3,
eq. 2):

    v* = argmin_v  E_{z ~ E(x), y, eps ~ N(0, 1), t}  || eps - eps_theta(z_t, t, c_theta(y, v)) ||^2

This file reads from top to bottom as the method: templates (y), the word (v), the loss, training,
sampling. v* is looked up in `embed` of models/latent_diffusion.py. Pictures (x) are prepared by
models/images.py. Below the ruler is the command line: invert, sample, convert, show.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import models

if not (there := Path(models.__file__ or models.__path__[0]).resolve()).is_relative_to(
    Path(__file__).resolve().with_name("models")
):
    raise ImportError(f"{there} hides textinv's own folder models; rename it, or start elsewhere")

from models.checkpoint import FAMILIES, load_model
from models.concepts import FORMATS, Concept, default_format, load_concept, load_concepts, words_in
from models.console import Parser, exit_status, picture_size, side
from models.files import free_target, shortened, text_lines, write_png
from models.images import (
    Images,
    NotFinite,
    find_images,
    grid,
    open_image,
    prepare_images,
    to_pil,
    warn_of_photographs,
    written_templates,
)
from models.latent_diffusion import LatentDiffusion
from models.runs import STOP_EVERY, Run, State, converged
from models.schedule import SAMPLERS
from models.tokenizers import check_names, nfc, without_weights

__all__ = ["Concept", "invert", "load_concept", "load_concepts", "load_model", "sample", "train"]

# ------------------------------------------------------------------- y: the templates (appendix J)


def entries(text: str) -> tuple[str, ...]:
    """Return the entries of "one, two, ..." on any number of lines."""
    return tuple(" ".join(text.split()).split(", "))


OBJECT_TEMPLATES = entries(
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
    for text in entries(
        """
        a painting, a rendering, a cropped painting, the painting, a clean painting, a dirty
        painting, a dark painting, a picture, a cool painting, a close-up painting, a bright
        painting, a good painting, a rendition, a nice painting, a small painting, a weird
        painting, a large painting
        """
    )
)
TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}

# The paper's hyperparameters (appendix F) are for LDM and serve Stable Diffusion too; the bundled
# model has its own (models/emoji/config.json). The rate is multiplied by the batch size, as in the
# paper: 0.005 x 2 GPUs x 4 pictures = 0.04; one GPU's 4 pictures make 0.02. A guidance scale of 7.5
# is within the paper's "typical scales (5-10)".
PAPER = dict(steps=5000, batch_size=4, lr=0.005, guidance_scale=7.5)
# The paper's High and Low (section 5.2) are 2e-2 and 1e-4 beside a base of 5e-3.
RATES = {"base": 1.0, "high": 4.0, "low": 0.02}

# ------------------------------------------------- v*: the new word, a Concept (models/concepts.py)


def initial_vectors(model: LatentDiffusion, init_word: str, count: int) -> Tensor:
    """Return the vectors (count, D) of a coarse description ("cat", appendix F), any phrase.

    A phrase of more tokens than `count` is averaged in `count` consecutive groups; one of fewer
    is repeated from its beginning. Raises ValueError if the model knows no token of it.
    """
    ids = model.known_ids(init_word)
    if not ids:
        raise ValueError(
            f"init word {init_word!r} has no tokens that this model knows; use a word such as cat"
        )
    vectors = model.text_encoder.token_table[torch.tensor(ids)].float()
    if count <= len(ids):
        return torch.stack([group.mean(0) for group in vectors.tensor_split(count)])
    return vectors[torch.arange(count) % len(ids)]


# ------------------------------------------------------------------------------------ the loss


def draw_batch(
    model: LatentDiffusion, mean: Tensor, std: Tensor, count: int, generator: torch.Generator
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Draw one training batch of `count` = B from the moments (N, C, h, w) of N pictures.

    Returns picture numbers, latents z ~ E(x) (B, C, h, w), timesteps (B,) on the CPU, noise like z.
    """
    rows = torch.randint(len(mean), (count,), generator=generator)
    z = mean[rows] + std[rows] * normal(mean[rows], generator)
    t = torch.randint(model.schedule.length, (count,), generator=generator)
    return rows.tolist(), z, t, normal(z, generator)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise, drawn on the CPU so that a seed means the same everywhere."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def diffusion_loss(
    model: LatentDiffusion, latents: Tensor, context: Tensor, t: Tensor, noise: Tensor, weight=1.0
) -> Tensor:
    """Return the mean squared error between the prediction and its target (eq. 1 and 2), a scalar,
    each latent's times `weight` (B, 1, h, w).

    latents and noise (B, C, h, w), t (B,) on the CPU, context (B, L, D). The target is eps, or
    velocity for models that were trained to predict it; that has nothing to do with the word v.
    """
    x_t = model.schedule.q_sample(latents, t, noise)
    prediction = model.unet(x_t, t.to(x_t.device), context).float()
    error = F.mse_loss(prediction, model.schedule.target(latents, t, noise), reduction="none")
    return (error * weight).mean()


# -------------------------------------------------------------------------------------- training

STOPS = ("never", "auto")


def train(
    model: LatentDiffusion,
    images: Images | Tensor,
    init_word: str,
    placeholder: str | None = None,
    vectors: int = 1,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | str | None = None,
    templates: Sequence[str] | Sequence[Sequence[str]] = OBJECT_TEMPLATES,
    flip: bool = True,
    masked: bool = False,
    weight_decay: float = 0.0,
    regularize: float = 0.0,
    progressive: bool = False,
    per_image: bool = False,
    stop: str = "never",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    resume: Mapping[str, Tensor] | None = None,
    share: slice = slice(None),
    on_gradients: Callable[[Tensor, list[Tensor]], None] | None = None,
) -> Iterator[State]:
    """Learn a word by textual inversion (section 3, eq. 2); yield a `State` after each step.

    images: a folder, paths or PIL images, 3-5 of one thing; or what `prepare_images` returns.
    init_word: a coarse description, whose embedding the word starts from. placeholder: the word's
    name in prompts, any string without spaces. vectors: how many it has. steps, batch_size, lr: by
    default the paper's (5000, 4, 0.005), or what suits the bundled model or SDXL; the rate is
    lr * batch_size (appendix F), and lr may be "base", "high" or "low". templates: prompts with {}
    for the word, one is drawn for each picture of each step; or one such list per picture. flip:
    mirror half of the pictures; switch it off for things with writing on them. masked: weigh the
    loss by each picture's alpha channel or NAME.mask.png (white counts, black does not), averaged
    over each latent's pixels. It is the mean over pictures of each one's weighted mean, so a small
    thing counts as much as a large one; a picture without a mask counts whole. weight_decay: the
    paper's code leaves AdamW's default of 0.01 on, which pulls v* towards 0; here it is off.
    stop: "auto" stops once training has converged, with the best vectors; every tenth step costs
    eight pictures more without a gradient. gradient_checkpointing: less memory, slower.

    The setups of section 5.2. regularize: weight of the squared distance of each vector from where
    it started (the paper's code multiplies every difference with every other). progressive, with
    three vectors: the second joins after 2/5 of the steps, the third after 4/5 (2000 and 4000 of
    5000 in the paper); AdamW has them from the start, so weight decay acts on them earlier.
    per_image: also learn a word for each picture, to hold what only that picture shows; the
    prompts end with "with" and that word.

    resume: the `tensors` of a State; steps are counted from the very beginning. The same seed gives
    the same bits, resumed or not, on one machine with one number of threads and one precision.
    share, on_gradients: for examples/several_gpus.py. `share` selects the rows of each batch that
    this process computes; `on_gradients(loss, gradients)` adds up both over the processes.

    Raises ValueError for unusable pictures, words or numbers, and NotFinite before a step with NaN.
    """
    steps, batch_size, lr = hyperparameters(model, steps, batch_size, lr)
    check_setup(vectors, weight_decay, regularize, progressive, stop, seed)
    if placeholder is None:  # the name of a folder, as on the command line
        placeholder = named_after(images) if isinstance(images, (str, Path)) else "<s>"
    model.check_placeholders([placeholder])
    start = initial_vectors(model, init_word, vectors)
    pixels = images if isinstance(images, Tensor) else prepare_images(images, model.size, masked)
    texts = templates_by_picture(templates, len(pixels))
    metadata = dict(init_word=init_word, steps=0, lr=lr, batch_size=batch_size, seed=seed)
    metadata |= dict(base_model=model.name, base_model_hash=model.fingerprint)
    metadata |= dict(clip_skip=model.clip_skip) if model.clip_skip > 1 else {}
    metadata |= dict(templates=json.dumps(list(dict.fromkeys(sum(texts, [])))))
    word = Concept(placeholder, start.clone(), {k: str(v) for k, v in metadata.items()})
    image_words = start_image_words(model, placeholder, len(pixels)) if per_image else []
    check_prompts(model, texts, [word, *image_words])
    mean, std, weight, picture = training_set(model, pixels, flip)

    def loss_of(step: int, words: list[Concept]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return eq. 2 on the step's batch, the regularization, and what the loss was computed
        from. All random numbers of a step follow from the seed and its number."""
        draw = random.Random(f"{seed} {step}")
        generator = torch.Generator().manual_seed(draw.getrandbits(32))
        rows, *batch = draw_batch(model, mean, std, batch_size, generator)
        shown = [picture[i] for i in rows]
        prompts = [fill_template(draw.choice(texts[i]), words, i) for i in shown][share]
        latents, t, noise, weights = (part[share] for part in (*batch, weight[rows]))
        context = model.encode_text(prompts, words)
        model.unet.gradient_checkpointing = gradient_checkpointing
        loss = diffusion_loss(model, latents, context, t, noise, weights)
        model.unet.gradient_checkpointing = False
        penalty = regularize * ((word.vectors - start) ** 2).sum()
        part = len(t) / batch_size  # 1 unless several processes share the batch
        parts = dict(autoencoder=latents, text_encoder=context, UNet=loss)
        return loss * part, penalty * part, parts

    @torch.no_grad()
    def fixed_loss(words: list[Concept]) -> Tensor:
        """Return eq. 2 on batches that no step draws, of eight pictures or more in all."""
        return torch.stack([loss_of(s, words)[0] for s in range(0, -8, -batch_size)]).mean()

    parameters = [w.vectors.requires_grad_() for w in (word, *image_words)]
    optimizer = torch.optim.AdamW(parameters, lr=lr * batch_size, weight_decay=weight_decay)
    state = State(0, steps, torch.tensor(0.0), word, image_words, parameters, optimizer, start)
    if resume:
        state.restore(resume)
    if state.over:
        raise ValueError(f"the run is over after {state.step} steps; ask for more, or start over")
    scale = 2.0**12 if model.dtype == torch.float16 else 1.0
    fixed_loss = fixed_loss if stop == "auto" else None
    return training(state, loss_of, fixed_loss, progressive, scale, on_gradients, far_norm(model))


def training(state: State, loss_of, fixed_loss, progressive, scale, on_gradients, far):
    """Yield the state after each remaining step of `train`, whose closures and options these are.

    Trap: in fp16 the gradient of the loss, which is divided by the number of latents, is too small
    and becomes 0, so the loss is multiplied by `scale`.
    """
    parameters, word = state.parameters, state.concept
    for step in range(state.step + 1, state.steps + 1):
        words = [word, *state.image_words]
        if progressive:  # the second vector joins after 2/5 of the steps, the third after 4/5
            used = 1 + (step - 1) * 5 // (2 * state.steps)
            words[0] = replace(word, vectors=word.vectors[:used])
        loss, penalty, parts = loss_of(step, words)
        state.optimizer.zero_grad()
        ((loss + penalty) * scale).backward()
        gradients = [vectors.grad.div_(scale) for vectors in parameters]
        loss = loss.detach()
        if on_gradients:
            on_gradients(loss, gradients)
        check_finite(step, gradients, parts)
        state.optimizer.step()
        if (norm := word.vectors.detach().norm(dim=1).max().item()) > far:
            warnings.warn(
                f"step {step}: the word's norm is {norm:,.0f}, far from all words of the model, so "
                "it is useless in prompts; start over with a lower lr (--lr base)"
            )
            far = math.inf  # said once
        word.metadata["steps"] = str(step)
        state = replace(state, step=step, loss=loss, concept=words[0], fixed_loss=None)
        if fixed_loss and step % STOP_EVERY == 0:
            fixed = fixed_loss(words)
            if on_gradients:
                on_gradients(fixed, [])
            state.note(fixed.item())
        yield state
        if state.over:
            return


def far_norm(model: LatentDiffusion) -> float:
    """Return a norm that no good word reaches: twelve times that of the model's own words, and at
    least as far as a random walk comes with the usual rate and number of steps."""
    table, usual = model.text_encoder.token_table.float(), PAPER | model.defaults
    walk = usual["lr"] * usual["batch_size"] * math.sqrt(usual["steps"] * table.shape[1])
    return max(12 * table.norm(dim=1).median().item(), walk)


def check_finite(step: int, gradients: Sequence[Tensor], parts: Mapping[str, Tensor]) -> None:
    """Raise NotFinite that names the first part with NaN or infinity, if a gradient has any."""
    if not all(gradient.isfinite().all() for gradient in gradients):
        broken = (name for name, tensor in parts.items() if not tensor.isfinite().all())
        part = next(broken, "gradient").replace("_", " ")
        raise NotFinite(
            f"step {step}: the {part} gave NaN or infinity; the word is left as it was before that "
            "step; start over with another --out and --precision bf16 or fp32, or a lower --lr"
        )


def check_range(least: float, **numbers: float) -> None:
    """Raise ValueError for a number below `least`, for NaN and for infinity."""
    for name, number in numbers.items():
        if not least <= number < 2**53:  # NaN is refused too
            raise ValueError(f"{name} is {number}; it must be at least {least:g}, and finite")


def check_setup(vectors, weight_decay, regularize, progressive, stop, seed) -> None:
    check_range(1, vectors=vectors)
    check_range(0, weight_decay=weight_decay, regularize=regularize, seed=seed)
    if stop not in STOPS:
        raise ValueError(f"stop {stop!r} is not known; use {', '.join(STOPS)}")
    if progressive and vectors != 3:
        raise ValueError(f"progressive training ends with 3 vectors, not with {vectors}")
    if progressive and stop != "never":
        raise ValueError(
            "progressive training ends with its last step, not by stop 'auto'; leave that out"
        )


def hyperparameters(model: LatentDiffusion | None, steps, batch_size, lr) -> tuple[int, int, float]:
    """Return steps, batch size and learning rate: those given, else the model's or the paper's."""
    defaults = PAPER | (model.defaults if model else {})
    if isinstance(lr, str):
        if lr not in RATES:
            raise ValueError(f"lr {lr!r} is not known; use a number, {', '.join(RATES)}")
        lr = defaults["lr"] * RATES[lr]
    given = dict(steps=steps, batch_size=batch_size, lr=lr)
    chosen = {k: defaults[k] if v is None else v for k, v in given.items()}
    check_range(1, steps=chosen["steps"], batch_size=chosen["batch_size"])
    check_range(1e-9, lr=chosen["lr"])
    return chosen["steps"], chosen["batch_size"], chosen["lr"]


def templates_by_picture(templates, pictures: int) -> list[list[str]]:
    """Return the list of templates of each picture. Raises ValueError for one without {}."""
    shared = not templates or isinstance(templates[0], str)
    texts = [list(templates)] * pictures if shared else [list(t) for t in templates]
    if len(texts) != pictures:
        raise ValueError(f"captions for {len(texts)} pictures, but {pictures} pictures")
    if not all(texts) or not all("{}" in text for own in texts for text in own):
        raise ValueError("every template needs a {} where the word goes, as in 'a photo of a {}'")
    return texts


def fill_template(template: str, words: Sequence[Concept], picture: int) -> str:
    """Return a picture's prompt: the word for {}, then the picture's own word if there is one."""
    prompt = template.replace("{}", words[0].placeholder)
    return f"{prompt} with {words[1 + picture].placeholder}" if words[1:] else prompt


def check_prompts(model: LatentDiffusion, texts: list[list[str]], words: list[Concept]) -> None:
    """Raise ValueError for a training prompt whose word the text encoder does not read: "my-cats"
    does not contain the word my-cat, and the end of a long prompt is cut off."""
    placeholders, word = model.placeholders(words), words[0].placeholder
    prompts = [fill_template(text, words, -2) for text in dict.fromkeys(sum(texts, []))]
    for prompt in prompts:
        ids = model.tokenizer.token_ids(prompt, placeholders)
        model.warn_if_cut(prompt, len(ids))
        if not set(placeholders[word]) <= set(model.tokenizer.frame(ids)):
            raise ValueError(
                f"{word} is not read in {prompt!r}: it touches other letters, or its vectors do "
                f"not fit into {model.tokenizer.max_length - 2} tokens; use a name like <cat>, "
                "fewer vectors or a shorter template"
            )


def start_image_words(model: LatentDiffusion, placeholder: str, count: int) -> list[Concept]:
    """Return <s>-1, <s>-2, ...: a word of one vector per picture, all at the mean of the table."""
    mean = model.text_encoder.token_table.float().mean(0, keepdim=True)
    return [Concept(f"{placeholder}-{i + 1}", mean.clone()) for i in range(count)]


def training_set(model: LatentDiffusion, pixels: Tensor, flip: bool) -> tuple:
    """Return mean and standard deviation (M, C, h, w) of the latents of pixels (N, 3 or 4, H, W),
    each picture plain and, with `flip`, mirrored; the weights (M, 1, h, w) of the loss, of mean 1,
    from the fourth channel; and a list of which picture each of the M shows.

    The autoencoder runs once per view; each step samples z ~ E(x) from these moments anew.
    """
    views = torch.cat([pixels, pixels.flip(-1)] if flip else [pixels])
    moments = [model.encode_moments(image[None, :3]) for image in views]
    mean, std = (torch.cat(parts) for parts in zip(*moments))
    masks = (views[:, 3:] + 1) / 2 if views.shape[1] > 3 else torch.ones(len(views), 1, 1, 1)
    weight = F.adaptive_avg_pool2d(masks, mean.shape[-2:]).to(mean)
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise NotFinite("the autoencoder gave NaN or infinity; try --precision bf16 or fp32")
    weight = weight / weight.mean((1, 2, 3), keepdim=True)
    return mean, std, weight, [*range(len(pixels))] * (1 + flip)


def invert(
    model: LatentDiffusion, images: Images, init_word: str, progress: bool = False, **options
) -> Concept:
    """Return the learnt word after the last step of `train`; same arguments, and a bar of
    `progress` if that is asked for."""
    states = train(model, images, init_word, **options)
    total = hyperparameters(model, options.get("steps"), None, None)[0]
    for state in tqdm(states, total=total, unit="step", disable=not progress):
        pass
    return replace(state.concept, vectors=state.concept.vectors.detach())


# -------------------------------------------------------------------------------------- sampling


def check_sampling(sampler, steps, n, eta, seed) -> tuple[Callable, int, str]:
    """Return the sampler's row of SAMPLERS, with `steps` in place of the default if they are given.
    Raises ValueError for an unknown sampler and for numbers out of range."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not known; use {', '.join(SAMPLERS)}")
    run, default, title = SAMPLERS[sampler]
    steps = default if steps is None else steps
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps {steps} is out of range; use 1 to 1000")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it goes from 0 (no noise) to 1 (as noisy as DDPM)")
    check_range(1, n=n)
    check_range(0, seed=seed)
    return run, steps, title


def guidance_of(model: LatentDiffusion | None, guidance_scale: float | None) -> float:
    """Return the guidance scale: the one given, else the model's default."""
    default = (PAPER | (model.defaults if model else {}))["guidance_scale"]
    scale = default if guidance_scale is None else guidance_scale
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale is {scale}; use 1 (none) to about 15")
    return scale


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    prompts: str | Sequence[str],
    concepts: Sequence[Concept] = (),
    negative: str = "",
    n: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str = "dpm++",
    eta: float = 0.0,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
) -> list[Image.Image]:
    """Draw n pictures of each prompt, all of one prompt in a row.

    Brackets in prompts are weights, "(word:1.2)", see models/tokenizers.py. All prompts of a call
    get as many chunks of 75 tokens as the longest. negative: a prompt for what shall not be seen.
    guidance_scale: 1 is none; the default is 7.5, 5 for SDXL, 3 for the bundled model. sampler:
    "dpm++" (14 steps unless told otherwise) or the paper's "ddim" (50). eta: 0 is deterministic, 1
    as noisy as DDPM. size: pixels, one number or (width, height). Picture i of a prompt starts
    from noise of seed + i, whatever else is drawn with it. Raises ValueError for numbers out of
    range and foreign words.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        return []
    run, steps, _ = check_sampling(sampler, steps, n, eta, seed)
    check_range(1, batch_size=batch_size)
    scale = guidance_of(model, guidance_scale)
    size = model.size if size is None else size
    shape = model.latent_shape((size, size) if isinstance(size, int) else size)
    context, uncond = model.conditioning(prompts, concepts, negative)
    jobs = [(row, seed + i) for row in range(len(prompts)) for i in range(n)]
    images: list[Image.Image] = []
    for first in range(0, len(jobs), batch_size):
        rows, seeds = zip(*jobs[first : first + batch_size])
        generators = [torch.Generator().manual_seed(s) for s in seeds]

        def draw(generators=generators) -> Tensor:
            """Return noise (B, C, h, w) on the model's device, from each picture's generator."""
            noise = [torch.randn(shape, generator=g) for g in generators]
            return torch.stack(noise).to(model.device)

        guide = dict(context=context[list(rows)], uncond=uncond, guidance_scale=scale)
        predict = partial(model.guided, **guide)
        for latents in run(model.schedule, predict, draw(), steps, eta, draw):
            pass
        images += to_pil(model.decode_latents(latents))
    return images


# ============================================================================== the command line

LOOKED_AT = 256  # pixels; smaller pictures are enlarged in grids
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for(args: argparse.Namespace) -> LatentDiffusion:
    """Load the model that the arguments name, and print a line about it."""
    given = [args.model, args.device, PRECISIONS.get(args.precision), args.family, args.prediction]
    model = load_model(*given, args.clip_skip, args.vae)
    print(model)
    return model


def run_invert(args: argparse.Namespace) -> int:
    """learn a word from pictures"""
    out, placeholder = target_of(args)
    check_range(1, save_every=args.save_every)
    check_range(0, preview_every=args.preview_every or 0)
    if args.resume and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite starts over; give one of them")
    if args.save_image_words and not args.per_image:
        raise ValueError("--save-image-words saves the words of --per-image; add that, or drop it")
    paths = find_images(args.images)
    templates = read_templates(args.templates, paths, placeholder)
    options = training_options(args, None, templates) | dict(placeholder=placeholder)
    told = options.keys() - {"steps", "batch_size", "lr", "progressive"}  # without the model
    run = Run(out, {name: options[name] for name in told}, args.save_image_words)
    run.look(args.resume, args.overwrite)  # raises where files of another run would be lost
    warn_of_photographs(paths, args.model is None)  # raises for damaged ones
    model = load_for(args)
    initial_vectors(model, args.init_word, 1)  # raises for a word that the model does not know
    ids = model.tokenizer.token_ids(args.init_word)
    print(f"init word {args.init_word!r}: {len(ids)} token(s), ids {ids}")
    if len(ids) > len(args.init_word.split()):
        warnings.warn(f"this model spells {args.init_word!r} in pieces; a word it knows is better")
    model.size = model.size if args.size is None else args.size
    model.latent_shape((model.size, model.size))  # raises for a size that does not fit
    pixels = prepare_images(paths, model.size, args.masked)
    options |= training_options(args, model, templates)
    run.settings, steps = options | fingerprints(model, pixels, options), options["steps"]
    saved = run.look(args.resume, args.overwrite)
    done = int(saved["step"]) if saved else 0
    if args.resume and not saved:
        warnings.warn(f"there is no run at {out} to continue; it starts over")
    if saved and out.exists() and (done == steps or converged(saved.get("losses", []))):
        print(f"the run is over after {done} steps; the word is in {out}")
        return 0
    options |= dict(gradient_checkpointing=args.gradient_checkpointing, resume=saved)
    states = train(model, pixels, **options)
    run.begin(anew=saved is None)
    inputs = grid(to_pil(pixels), least=LOOKED_AT)
    write_png(run.path("inputs.png"), inputs, {"what": "what the model sees"}, True)
    resumed = f", from step {done} on" if done else ""
    print(f"learning {placeholder} from {len(paths)} picture(s), {steps} steps{resumed}, to {out}")

    def preview(state: State) -> Image.Image:
        prompt = f"a photo of {placeholder}"
        return grid(sample(model, prompt, [state.concept], n=4), least=LOOKED_AT)

    preview_every = max(1, steps // 3) if args.preview_every is None else args.preview_every
    state = run.follow(states, args.save_every, preview_every, preview)
    if state.over and state.step < steps:
        print(f"converged after {state.step} of {steps} steps")
    print(what_next(args, out, placeholder, state.over))
    return 0 if state.over else 130


def named_after(path: str | Path) -> str:
    """Return the placeholder called after a folder or a file: "my cat" becomes <my-cat>."""
    path = Path(path).resolve()
    return nfc(f"<{'-'.join((path.stem if path.is_file() else path.name).split())}>")


def target_of(args: argparse.Namespace) -> tuple[Path, str]:
    """Return the word's file and its placeholder. Both default to the name of the pictures' folder:
    "my cat" becomes <my-cat>."""
    source = Path(args.images).resolve()
    name = Path(args.out).stem if args.out else source.stem if source.is_file() else source.name
    out = Path(args.out or f"{shortened(name, 200)}.safetensors")
    default_format(out.suffix)  # raises if words are not written with this ending
    free_target(out, overwrite=True)  # raises if nothing can be written there
    if source.is_dir() and out.resolve().parent == source:
        raise ValueError(
            f"{out} lies among the pictures to learn from, and so would the previews; write it "
            f"elsewhere, for example --out {os.path.relpath(source.parent / out.name)}"
        )
    placeholder = named_after(name) if args.placeholder is None else args.placeholder
    check_names([placeholder])
    return out, placeholder


def training_options(args: argparse.Namespace, model: LatentDiffusion | None, templates) -> dict:
    """Return the options of `train` that decide what is learnt; without the model, numbers that it
    decides are the paper's. Raises ValueError for options that do not fit."""
    if not (args.init_word or "").strip():
        raise ValueError("--init-word is missing: what the pictures show, in a word such as cat")
    steps, batch_size, lr = hyperparameters(model, args.steps, args.batch_size, args.lr)
    vectors = (3 if args.progressive else 1) if args.vectors is None else args.vectors
    check_setup(vectors, args.weight_decay, args.regularize, args.progressive, args.stop, args.seed)
    same = "init_word seed stop masked per_image weight_decay regularize progressive".split()
    options = {name: getattr(args, name) for name in same} | dict(flip=not args.no_flip)
    options |= dict(vectors=vectors, templates=templates)
    return options | dict(steps=steps, batch_size=batch_size, lr=lr)


def fingerprints(model: LatentDiffusion, pixels: Tensor, options: dict) -> dict:
    """Return what else must be the same when a run is resumed: model and pictures."""
    found = dict(model=model.name, fingerprint=model.fingerprint, precision=str(model.dtype))
    found |= dict(prediction=model.schedule.prediction, clip_skip=model.clip_skip)
    found |= dict(pictures=hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16])
    # The vectors of a progressive word join by the number of steps; other runs may get more steps.
    return found | dict(progressive=options["steps"] if options["progressive"] else None)


def read_templates(choice: str, pictures: Sequence[Path], placeholder: str = "{}") -> list:
    """Return the prompts that --templates stands for, or a list of them for each picture."""
    return list(TEMPLATES.get(choice) or written_templates(choice, pictures, placeholder))


def what_next(args: argparse.Namespace, out: Path, placeholder: str, over: bool) -> str:
    """Return a line with what was written and the command to use it, or to continue."""
    if not over:
        command = shlex.join(["python", *sys.argv, *["--resume"] * (not args.resume)])
        return f"stopped; the word so far is in {out}; continue with: {command}"
    again = ["sample", f"a photo of {placeholder}", "--concept", str(out)]
    again += ["--rename", f"{out.name}={placeholder}"] * (out.suffix.lower() == ".pt")  # A1111's
    again += ["--model", args.model] if args.model else []
    again += ["--clip-skip", str(args.clip_skip)] if args.clip_skip > 1 else []
    return f"wrote {out}; try: python textinv.py {shlex.join(again)}"


def words_for(args: argparse.Namespace, prompts: Sequence[str]) -> list[Concept]:
    """Return the words for some prompts, and check the prompts before anything slow. Warns of words
    that no prompt uses."""
    concepts = words_in(args.concept, args.rename)
    known = [concept.placeholder for concept in concepts]
    texts = [without_weights(prompt, known) for prompt in prompts]  # raises for a faulty weight
    check_names(known if prompts else [])
    for word in known:
        if texts and not any(word in text for text in texts):
            warnings.warn(f"{word} was loaded, but no prompt uses it")
    return concepts


def run_sample(args: argparse.Namespace) -> None:
    """draw prompts with learnt words"""
    out = free_target(args.out, args.overwrite, ".png")
    _, steps, title = check_sampling(args.sampler, args.steps, args.n, args.eta, args.seed)
    guidance_of(None, args.guidance)  # raises for one that is no number
    if not (prompts := args.texts + args.prompts):
        raise ValueError("no prompt given; give PROMPT in quotes, or --prompts FILE")
    if Path(args.singles or "").suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--singles {args.singles} is a picture's name; give a folder")
    singles = [Path(args.singles or "") / f"{i:04d}.png" for i in range(args.n * len(prompts))]
    for path in singles if args.singles else ():
        if free_target(path, args.overwrite).resolve() == out.resolve():
            raise ValueError(f"--out {out} is also a picture of --singles; write it elsewhere")
    concepts, model = words_for(args, [*prompts, args.negative]), load_for(args)
    model.check_concepts(concepts)
    settings = dict(sampler=args.sampler, steps=steps, eta=args.eta, seed=args.seed)
    settings |= dict(size=args.size or (model.size, model.size), negative=args.negative)
    settings |= dict(guidance_scale=guidance_of(model, args.guidance))
    info = settings | dict(title=title, model=model.name, model_hash=model.short_hash)
    info |= dict(clip_skip=model.clip_skip)
    print(f"drawing {len(prompts)} prompt(s) x {args.n}, {steps} steps of {title}, to {out}")
    images, seeds = [], [*range(args.seed, args.seed + args.n)] * len(prompts)
    for prompt in tqdm(prompts, unit="prompt", disable=len(prompts) == 1):
        for image in sample(model, prompt, concepts, n=args.n, **settings):
            if args.singles:
                text = {"prompt": prompt, "settings": info | dict(seed=seeds[len(images)])}
                write_png(singles[len(images)], image, text, args.overwrite)
            images.append(image)
    text = {"prompt": "\n".join(prompts), "settings": info | dict(n=args.n, seeds=seeds)}
    sheet = grid(images, args.n if len(prompts) > 1 else None, least=LOOKED_AT)
    write_png(out, sheet, text, args.overwrite)
    print(f"wrote {out}")


def run_convert(args: argparse.Namespace) -> None:
    """write a word in another program's format"""
    out = free_target(args.out, args.overwrite)
    concepts = load_concepts(args.source)
    chosen = [c for c in concepts if args.word in (None, c.placeholder)]
    if len(chosen) != 1:
        names = ", ".join(concept.placeholder for concept in concepts)
        wrong = f", not {args.word}" if args.word else ""
        raise ValueError(f"{args.source} holds {names}{wrong}; say which one with --word")
    concept = chosen[0]
    if args.placeholder is not None:
        check_names([args.placeholder])
        concept = replace(concept, placeholder=args.placeholder)
    if args.picture and out.suffix.lower() != ".png":
        raise ValueError(f"--picture is for an OUT that is a .png file; {out} is none")
    format = args.format or default_format(out.suffix)
    concept.save(out, args.overwrite, format, open_image(args.picture) if args.picture else None)
    word = load_concept(out).placeholder  # in a .pt not the one that was given
    print(f"wrote {out} ({format}): {word}, {tuple(concept.vectors.shape)}")


def run_show(args: argparse.Namespace) -> None:
    """look into a word, a model or a prompt"""
    if not (args.word_file or args.prompt or args.model):
        raise ValueError("nothing to show; give --word FILE, --model PATH or --prompt TEXT")
    args.concept = [*args.concept, *filter(None, [args.word_file])]
    words = words_for(args, [args.prompt] if args.prompt else [])
    model = load_for(args)
    if args.prompt:
        show_prompt(args.prompt, words, model)
    elif args.word_file:
        show_words(words, model)
    else:
        show_model(model)


def show_model(model: LatentDiffusion) -> None:
    print(f"stored as {model.stored}")
    for name in ("unet", "autoencoder", "text_encoder"):
        count = sum(p.numel() for p in getattr(model, name).parameters())
        print(f"{name:12} {count / 1e6:8,.1f}M parameters")
    width, length = model.text_encoder.token_table.shape[1], model.tokenizer.max_length
    print(f"words of {width} numbers, {length} tokens a prompt, pictures of {model.size} pixels")


def show_prompt(prompt: str, concepts: Sequence[Concept], model: LatentDiffusion) -> None:
    """Print a line per token: id, text, and weight if it is not 1."""
    model.check_concepts(concepts)
    start, end = ((i, 1.0) for i in model.tokenizer.frame([]))
    for chunk in model.weighted_chunks(prompt, concepts):
        for i, weight in [start, *chunk, end]:
            print(f"{i:6d} {model.token_text(i, concepts)}" + f" x {weight:.2f}" * (weight != 1))


def show_words(concepts: Sequence[Concept], model: LatentDiffusion) -> None:
    """Print metadata, norms beside those of the model's own words, and the nearest words."""
    table = model.text_encoder.token_table.float().cpu()
    low, middle, high = table.norm(dim=1).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    for concept in concepts:
        count, width = concept.vectors.shape
        other = f", but this model's words have {table.shape[1]}" * (width != table.shape[1])
        print(f"{concept.placeholder}: {count} vector(s) of {width} numbers{other}")
        for key, value in concept.metadata.items():
            print(f"  {key}: {value if len(value) < 200 else value[:200] + '...'}")
        for vector in concept.vectors:
            line = f"  norm {vector.norm():.3f} (words here: {low:.3f}, {middle:.3f}, {high:.3f})"
            if not other:
                near = F.cosine_similarity(vector[None], table).topk(5)
                pairs = zip(near.indices.tolist(), near.values.tolist())
                line += (
                    f"; nearest: {', '.join(f'{model.token_text(i)} {c:.2f}' for i, c in pairs)}"
                )
            print(line)
        model.warn_of_another_model(concept)


def learning_rate(text: str) -> float | str:
    try:
        return text if text in RATES else float(text)
    except ValueError:
        message = f"{text!r} is no learning rate; use a number, {', '.join(RATES)}"
        raise argparse.ArgumentTypeError(message) from None


# Every option by the name that VERBS uses; `flag` is its name on the command line if that differs.
OPTIONS: dict[str, dict] = dict(
    images=dict(flag="images", help="folder with 3-5 pictures of one thing"),
    texts=dict(flag="texts", nargs="*", metavar="PROMPT", help="(word:1.2) weighs a word"),
    prompts=dict(type=text_lines, default=[], metavar="FILE", help="text file, a prompt a line"),
    negative=dict(default="", metavar="TEXT", help="a prompt for what shall not be seen"),
    source=dict(flag="source", metavar="IN", help="a word's file"),
    target=dict(flag="out", metavar="OUT", help="the file to write"),
    model=dict(metavar="NAME|PATH", help="sd15, sd21, sdxl, ldm, file, folder (default: bundled)"),
    family=dict(choices=FAMILIES, help="family of the checkpoint, if its keys do not tell"),
    prediction=dict(choices=("eps", "v"), help="what it predicts, if the file does not tell"),
    vae=dict(metavar="PATH", help="another autoencoder, file or folder"),
    clip_skip=dict(type=int, default=1, choices=(1, 2), help="2 for models trained so (SD 1 only)"),
    device=dict(help="cuda, mps or cpu (default: the best there is)"),
    precision=dict(choices=PRECISIONS, help="of UNet and autoencoder (default: the device's best)"),
    seed=dict(type=int, default=0, help="of all random numbers (default 0)"),
    overwrite=dict(action="store_true", help="replace files of the same name"),
    concept=dict(action="append", default=[], metavar="FILE", help="a word's file; repeatable"),
    rename=dict(action="append", default=[], metavar="OLD=NEW", help="rename the word of file OLD"),
    init_word=dict(metavar="WORDS", help="coarse description to start from, such as cat"),
    placeholder=dict(type=nfc, metavar="WORD", help="the word's name in prompts (<NAME OF OUT>)"),
    word_out=dict(flag="--out", metavar="FILE", help="the word's file (FOLDER.safetensors)"),
    resume=dict(action="store_true", help="continue a run that was stopped"),
    vectors=dict(type=int, help="vectors per word (default 1; 3 if progressive)"),
    training_steps=dict(flag="--steps", type=int, help="steps (5000; SDXL 2000; bundled 600)"),
    training_size=dict(flag="--size", type=side, help="pixels (default: the model's own size)"),
    batch_size=dict(type=int, help="pictures per step (4; SDXL 1; bundled 8)"),
    lr=dict(type=learning_rate, help="rate per picture (0.005; SDXL 0.002), or base, high, low"),
    stop=dict(choices=STOPS, default="never", help="auto: stop once the word has converged"),
    weight_decay=dict(type=float, default=0.0, help="AdamW's weight decay (default 0)"),
    regularize=dict(type=float, default=0.0, metavar="W", help="keep the word near its init word"),
    progressive=dict(action="store_true", help="train one vector, then two, then three"),
    per_image=dict(action="store_true", help="also learn a word for each picture"),
    save_image_words=dict(action="store_true", help="save the words of --per-image too"),
    templates=dict(default="object", help="object, style, captions, a file, or 'a photo of {}'"),
    no_flip=dict(action="store_true", help="do not mirror the pictures"),
    masked=dict(action="store_true", help="learn what alpha or NAME.mask.png shows in white"),
    gradient_checkpointing=dict(action="store_true", help="less memory, slower"),
    preview_every=dict(type=int, metavar="N", help="preview every N steps; 0: none (steps / 3)"),
    save_every=dict(type=int, default=50, metavar="N", help="save a state every N steps (50)"),
    n=dict(flag="-n", type=int, default=4, help="pictures per prompt (default 4)"),
    sampler=dict(choices=SAMPLERS, default="dpm++", help="dpm++ (default), or the paper's ddim"),
    steps=dict(type=int, help="sampling steps (default 14; ddim 50)"),
    guidance=dict(type=float, metavar="SCALE", help="1 is no guidance (7.5; SDXL 5; bundled 3)"),
    eta=dict(type=float, default=0.0, help="0 draws no noise, 1 as much as DDPM (default 0)"),
    size=dict(type=picture_size, metavar="W[xH]", help="pixels (default: the model's own size)"),
    grid_out=dict(flag="--out", default="grid.png", metavar="FILE", help="the grid (grid.png)"),
    singles=dict(metavar="FOLDER", help="also save each picture by itself"),
    format=dict(choices=FORMATS, help="layout of OUT (default: by its ending)"),
    word_file=dict(flag="--word", dest="word_file", metavar="FILE", help="show this word"),
    prompt=dict(metavar="TEXT", help="show the tokens of this prompt, and their weights"),
    word=dict(type=nfc, metavar="WORD", help="which word, if IN holds several"),
    picture=dict(metavar="FILE", help="picture that carries the word, for an OUT.png"),
)
MODEL = " model vae family prediction clip_skip device precision"
VERBS = {
    run_invert: "images init_word placeholder word_out resume overwrite vectors training_steps "
    "batch_size lr stop weight_decay regularize progressive per_image save_image_words templates "
    "training_size no_flip masked gradient_checkpointing preview_every save_every seed" + MODEL,
    run_sample: "texts prompts negative concept rename n sampler steps guidance eta size grid_out "
    "singles overwrite seed" + MODEL,
    run_convert: "source target format placeholder word picture overwrite",
    run_show: "word_file prompt concept rename" + MODEL,
}


def add_options(parser: argparse.ArgumentParser, names: str) -> None:
    """Add the options with these names, separated by spaces."""
    for name in names.split():
        options = dict(OPTIONS[name])
        parser.add_argument(options.pop("flag", f"--{name.replace('_', '-')}"), **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = Parser(prog="textinv.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for run, names in VERBS.items():
        verb = verbs.add_parser(run.__name__.removeprefix("run_"), help=run.__doc__)
        add_options(verb, names)
        verb.set_defaults(run=run)
    return exit_status(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
