"""Textual Inversion: learn a new word for a thing from 3-5 pictures of it.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion", ICLR 2023 (arXiv:2208.01618). "The paper" below is this one.

The text-to-image model stays as it is. A placeholder such as "<cat>" gets a vector v* of its own in
the space of the token embeddings, and v* alone is trained, with the model's own loss (section 3,
eq. 2):

    v* = argmin_v  E_{z ~ E(x), y, eps ~ N(0, 1), t}  || eps - eps_theta(z_t, t, c_theta(y, v)) ||^2

From top to bottom, this file follows the method: templates (y), the word (v), the loss, training,
sampling. `embed` in models/latent_diffusion.py looks v* up, models/images.py prepares pictures (x).
Below the line of = signs is the command line: invert, sample, convert, show.
"""

import argparse
import hashlib
import json
import math
import random
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from models.tokenizers import any_of, check_names, nfc, without_weights

__all__ = ["Concept", "invert", "load_concept", "load_concepts", "load_model", "sample", "train"]

# ------------------------------------------------------------------- y: the templates (appendix J)


def entries(text: str) -> tuple[str, ...]:
    """Return the entries of "one, two, ..." on any number of lines."""
    return tuple(" ".join(text.split()).split(", "))


PHOTOS = """
    a photo of a {}, a rendering of a {}, a cropped photo of the {}, the photo of a {}, a photo of
    a clean {}, a photo of a dirty {}, a dark photo of the {}, a photo of my {}, a photo of the
    cool {}, a close-up photo of a {}, a bright photo of the {}, a cropped photo of a {}, a photo
    of the {}, a good photo of the {}, a photo of one {}, a close-up photo of the {}, a rendition
    of the {}, a photo of the clean {}, a rendition of a {}, a photo of a nice {}, a good photo of
    a {}, a photo of the nice {}, a photo of the small {}, a photo of the weird {}, a photo of the
    large {}, a photo of a cool {}, a photo of a small {}
"""
# For styles the paper's code says "painting", adds "in the style of {}", and lists two twice.
PAINTINGS = """
    a painting, a rendering, a cropped painting, the painting, a clean painting, a dirty painting,
    a dark painting, a picture, a cool painting, a close-up painting, a bright painting, a good
    painting, a rendition, a nice painting, a small painting, a weird painting, a large painting
"""
OBJECT_TEMPLATES = entries(PHOTOS)
STYLE_TEMPLATES = tuple(f"{text} in the style of {{}}" for text in entries(PAINTINGS))
TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}

# The paper's hyperparameters for LDM (appendix F); some models have their own. The rate is
# multiplied by the batch size: 0.005 x 2 GPUs x 4 pictures = 0.04 in the paper, 0.005 x 4 here.
# A guidance scale of 7.5 is within the paper's "typical scales (5-10)".
PAPER = dict(steps=5000, batch_size=4, lr=0.005, guidance_scale=7.5)
RATES = {"base": 1.0, "high": 4.0, "low": 0.02}  # section 5.2: 5e-3, 2e-2, 1e-4
STOPS = ("never", "auto")  # after the last step, or once training has converged

# ------------------------------------------------- v*: the new word, a Concept (models/concepts.py)


def initial_vectors(model: LatentDiffusion, init_word: str, count: int) -> Tensor:
    """Return the vectors (count, D) of the tokens of a coarse description such as "cat" (appendix
    F). More than `count` tokens are averaged in `count` consecutive groups; fewer are repeated.
    Raises ValueError if the model knows none of them."""
    ids = model.known_ids(init_word)
    if not ids:
        raise ValueError(f"init word {init_word!r} has no tokens that this model knows; try cat")
    vectors = model.text_encoder.token_table[torch.tensor(ids)].float()
    if count <= len(ids):
        return torch.stack([group.mean(0) for group in vectors.tensor_split(count)])
    return vectors[torch.arange(count) % len(ids)]


# ------------------------------------------------------------------------------------ the loss


def draw_batch(
    model: LatentDiffusion, mean: Tensor, std: Tensor, count: int, generator: torch.Generator
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Draw a training batch of `count` = B from the moments (N, C, h, w) of N pictures: picture
    numbers, latents z ~ E(x) (B, C, h, w), timesteps (B,) on the CPU, and noise of z's shape."""
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
    """Return the mean squared error between the prediction and its target (eq. 1 and 2), a scalar.

    latents and noise (B, C, h, w), t (B,) on the CPU, context (B, L, D). Each latent position's
    error is multiplied by `weight` (B, 1, h, w). The target is eps, or the velocity for v-models.
    """
    x_t = model.schedule.q_sample(latents, t, noise)
    prediction = model.unet(x_t, t.to(x_t.device), context).float()
    error = F.mse_loss(prediction, model.schedule.target(latents, t, noise), reduction="none")
    return (error * weight).mean()


# -------------------------------------------------------------------------------------- training


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

    images: a folder, paths or PIL images, 3-5 of one thing, or what `prepare_images` returns.
    init_word: a coarse description, from whose embedding the word starts. placeholder: the word in
    prompts, without spaces. vectors: how many it has. steps, batch_size, lr: by default the paper's
    (5000, 4, 0.005) or the model's own; the rate is lr * batch_size (appendix F), and lr may be
    "base", "high" or "low". templates: prompts with {} for the word, one drawn for each picture of
    each step, or one such list per picture. flip: also learn from mirrored pictures. masked: weigh
    the loss by alpha or NAME.mask.png (white counts); each picture's weights have mean 1, so a
    small thing counts as much as a large one. weight_decay: pulls v* towards 0; the paper's code
    has 0.01. stop: "auto" stops once training has converged, with the best vectors; to see this,
    every tenth step runs at least eight more pictures. gradient_checkpointing: less memory, slower.

    The setups of section 5.2. regularize: weight of the squared distance of each vector from where
    it started (the paper's code averages all products of two vectors' moves). progressive, with
    three vectors: the second joins after 2/5 of the steps, the third after 4/5; weight decay acts
    on all from the start. per_image: also learn a word for each picture, for what only that picture
    shows; its prompts end in "with" and that word.

    resume: what `State.tensors()` returned; `steps` is still the total. On a CPU, the same
    seed gives the same bits, resumed or not, with one number of threads and one precision.
    share, on_gradients: for examples/several_gpus.py. `share` selects the rows of each batch that
    this process computes; `on_gradients(loss, gradients)` adds up both over the processes.

    Raises ValueError for unusable pictures, words or numbers; NotFinite if a step gives NaN.
    """
    steps, batch_size, lr = hyperparameters(model, steps, batch_size, lr)
    check_setup(vectors, weight_decay, regularize, progressive, stop, seed)
    if placeholder is None:  # the name of a folder, as on the command line
        placeholder = named_after(name_of(images)) if isinstance(images, (str, Path)) else "<s>"
    model.check_placeholders([placeholder])
    start = initial_vectors(model, init_word, vectors)
    pixels = images if isinstance(images, Tensor) else prepare_images(images, model.size, masked)
    texts = templates_by_picture(templates, len(pixels))
    distinct = list(dict.fromkeys(sum(texts, [])))
    metadata = dict(init_word=init_word, steps=0, lr=lr, batch_size=batch_size, seed=seed)
    metadata |= dict(base_model=model.name, base_model_hash=model.fingerprint)
    metadata |= dict(clip_skip=model.clip_skip, templates=json.dumps(distinct))
    word = Concept(placeholder, start.clone(), {k: str(v) for k, v in metadata.items()})
    average = model.text_encoder.token_table.float().mean(0, keepdim=True)
    names = [f"{placeholder}-{i + 1}" for i in range(len(texts) if per_image else 0)]
    image_words = [Concept(name, average.clone()) for name in names]
    check_prompts(model, distinct, [word, *image_words])
    mean, std, weight = training_set(model, pixels, flip)

    def loss_of(step: int, words: list[Concept]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss (eq. 2) on the step's batch, the penalty, and tensors to check for NaN.
        All random numbers follow from the seed and the step's number."""
        draw = random.Random(f"{seed} {step}")
        generator = torch.Generator().manual_seed(draw.getrandbits(32))
        rows, *batch = draw_batch(model, mean, std, batch_size, generator)
        shown = [row % len(texts) for row in rows]  # the mirrored pictures follow the plain ones
        prompts = [fill_template(draw.choice(texts[i]), words, i) for i in shown][share]
        latents, t, noise, weights = (tensor[share] for tensor in (*batch, weight[rows]))
        context = model.encode_text(prompts, words)
        model.unet.gradient_checkpointing = gradient_checkpointing
        loss = diffusion_loss(model, latents, context, t, noise, weights)
        model.unet.gradient_checkpointing = False
        penalty = regularize * ((word.vectors - start) ** 2).sum()
        part = len(t) / batch_size  # 1 unless several processes share the batch
        parts = dict(autoencoder=latents, text_encoder=context, UNet=loss)
        return loss * part, penalty * part, parts

    parameters = [w.vectors.requires_grad_() for w in (word, *image_words)]
    optimizer = torch.optim.AdamW(parameters, lr=lr * batch_size, weight_decay=weight_decay)
    state = State(0, steps, torch.tensor(0.0), word, image_words, parameters, optimizer, start)
    if resume:
        state.restore(resume)
    if state.over:
        raise ValueError(f"the run is over after {state.step} steps; ask for more, or start over")
    return training(model, state, loss_of, batch_size, progressive, stop, on_gradients)


def training(model, state: State, loss_of, batch_size, progressive, stop, on_gradients):
    """Yield the state after each remaining step. Arguments are options and a closure of `train`."""
    word, far = state.concept, far_norm(model)
    # Trap: in fp16 the gradient of the loss, a mean over all latents, is so small that it becomes
    # 0. So the loss is multiplied by `scale`.
    scale = 2.0**12 if model.dtype == torch.float16 else 1.0
    for step in range(state.step + 1, state.steps + 1):
        words = [word, *state.image_words]
        if progressive:  # the second vector joins after 2/5 of the steps, the third after 4/5
            used = 1 + (step - 1) * 5 // (2 * state.steps)
            words[0] = replace(word, vectors=word.vectors[:used])
        with torch.enable_grad():  # notebooks often disable gradients at the top
            loss, penalty, parts = loss_of(step, words)
            state.optimizer.zero_grad()
            ((loss + penalty) * scale).backward()
        gradients = [vectors.grad.div_(scale) for vectors in state.parameters]
        loss = loss.detach()
        if on_gradients:
            on_gradients(loss, gradients)
        check_finite(step, gradients, parts)
        word.metadata["steps"] = str(step)  # before the vectors change: see `Run.follow`
        state.optimizer.step()
        if (norm := word.vectors.detach().norm(dim=1).max().item()) > far:
            warnings.warn(f"the word's norm, {norm:,.0f}, is too large; start over with a lower lr")
            far = math.inf  # warn only once
        state = replace(state, step=step, loss=loss, concept=words[0], fixed_loss=None)
        if stop == "auto" and step % STOP_EVERY == 0:
            with torch.no_grad():  # fixed batches, of step numbers that training never uses
                losses = [loss_of(s, words)[0] for s in range(0, -8, -batch_size)]
            fixed = torch.stack(losses).mean()
            if on_gradients:
                on_gradients(fixed, [])
            state.note(fixed.item())
        yield state
        if state.over:
            return


def far_norm(model: LatentDiffusion) -> float:
    """Return a norm that no good word reaches: twelve times the median of the model's own words, or
    the length of a random walk with the usual rate and steps, whichever is larger."""
    table = model.text_encoder.token_table.float()
    steps, batch_size, lr = hyperparameters(model, None, None, None)
    walk = lr * batch_size * math.sqrt(steps * table.shape[1])
    return max(12 * table.norm(dim=1).median().item(), walk)


def check_finite(step: int, gradients: Sequence[Tensor], parts: Mapping[str, Tensor]) -> None:
    """If a gradient has NaN or infinity, raise NotFinite naming the part where they came up."""
    if not all(gradient.isfinite().all() for gradient in gradients):
        broken = (name for name, tensor in parts.items() if not tensor.isfinite().all())
        part = next(broken, "gradient").replace("_", " ")
        said = f"step {step}: the {part} gave NaN or infinity; the word is as before that step"
        raise NotFinite(f"{said}; start over with --precision bf16 or fp32, or a lower --lr")


def check_range(least: float, **numbers: float) -> None:
    """Raise ValueError for a number below `least`, for NaN, and from 2^53 on."""
    for name, number in numbers.items():
        if not least <= number < 2**53:  # NaN is refused too
            raise ValueError(f"{name} is {number}; it must be at least {least:g}, and below 2^53")


def check_setup(vectors, weight_decay, regularize, progressive, stop, seed) -> None:
    check_range(1, vectors=vectors)
    check_range(0, weight_decay=weight_decay, regularize=regularize, seed=seed)
    if stop not in STOPS:
        raise ValueError(f"stop {stop!r} is not known; use {', '.join(STOPS)}")
    if progressive and (vectors, stop) != (3, "never"):
        raise ValueError("progressive needs 3 vectors and no early stopping; drop the other option")


def hyperparameters(model: LatentDiffusion | None, steps, batch_size, lr) -> tuple[int, int, float]:
    """Return steps, batch size and learning rate: those given, else the model's or the paper's."""
    defaults = PAPER | (model.defaults if model else {})
    steps = defaults["steps"] if steps is None else steps
    batch_size = defaults["batch_size"] if batch_size is None else batch_size
    lr = "base" if lr is None else lr
    try:
        lr = defaults["lr"] * RATES[lr] if lr in RATES else float(lr)
    except ValueError:
        raise ValueError(f"lr {lr!r} is not known; use a number, {', '.join(RATES)}") from None
    check_range(1, steps=steps, batch_size=batch_size)
    check_range(1e-9, lr=lr)
    return steps, batch_size, lr


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


def check_prompts(model: LatentDiffusion, templates: list[str], words: list[Concept]) -> None:
    """Raise ValueError for a training prompt in which the text encoder would not see the word:
    "my-cats" does not contain the word my-cat, and the end of a long prompt is cut off."""
    placeholders, word = model.placeholders(words), words[0].placeholder
    for template in templates:
        prompt = fill_template(template, words, len(words) - 2)  # with the last picture's word
        ids = model.tokenizer.token_ids(prompt, placeholders)
        model.warn_if_cut(prompt, len(ids))
        if not set(placeholders[word]) <= set(model.tokenizer.frame(ids)):
            said = f"{word} is not read in {prompt!r}: it touches letters, or not all of it fits"
            raise ValueError(f"{said}; use a name like <cat>, fewer vectors, a shorter template")


def training_set(model: LatentDiffusion, pixels: Tensor, flip: bool) -> tuple:
    """Return mean and standard deviation (M, C, h, w) of the latents of pixels (N, 3 or 4, H, W):
    N plain ones and, with `flip`, N mirrored ones; and the loss weights (M, 1, h, w), of mean 1,
    from the fourth channel. The autoencoder runs only here."""
    views = torch.cat([pixels, pixels.flip(-1)] if flip else [pixels])
    moments = [model.encode_moments(image[None, :3]) for image in views]
    mean, std = (torch.cat(parts) for parts in zip(*moments))
    masks = (views[:, 3:] + 1) / 2 if views.shape[1] > 3 else torch.ones(len(views), 1, 1, 1)
    weight = F.adaptive_avg_pool2d(masks, mean.shape[-2:]).to(mean)
    return mean, std, weight / weight.mean((1, 2, 3), keepdim=True)


def invert(
    model: LatentDiffusion, images: Images, init_word: str, progress: bool = False, **options
) -> Concept:
    """Run `train`, which explains `options`, to its end, and return the learnt word."""
    states = train(model, images, init_word, **options)
    total = hyperparameters(model, options.get("steps"), None, None)[0]
    for state in tqdm(states, total=total, unit="step", disable=not progress):
        pass
    return replace(state.concept, vectors=state.concept.vectors.detach())


# -------------------------------------------------------------------------------------- sampling


def check_sampling(sampler, steps, n, eta, seed, batch_size=1) -> tuple[Callable, int, str]:
    """Check the numbers; return the sampler's function, steps and name in other programs."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not known; use {', '.join(SAMPLERS)}")
    run, default, title = SAMPLERS[sampler]
    steps = default if steps is None else steps
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps {steps} is out of range; use 1 to 1000")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it goes from 0 (no noise) to 1 (as noisy as DDPM)")
    check_range(1, n=n, batch_size=batch_size)
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
    progress: bool = False,
) -> list[Image.Image]:
    """Draw n pictures of each prompt; those of one prompt follow each other in the list.

    Brackets in prompts are weights, "(word:1.2)", see models/tokenizers.py. All prompts of a call
    get as many chunks of 75 tokens as the longest. negative: a prompt for what should not be seen.
    guidance_scale: 1 is none; by default 7.5, or the model's own. sampler: "dpm++" (14 steps by
    default) or the paper's "ddim" (50). eta: 0 is deterministic, 1 as noisy as DDPM. size: pixels,
    one number or (width, height). Picture i of a prompt starts from the noise of seed + i, in any
    batch. progress: show a bar. Raises ValueError for numbers out of range, words of another width.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    run, steps, _ = check_sampling(sampler, steps, n, eta, seed, batch_size)
    scale, device = guidance_of(model, guidance_scale), model.device
    size = model.size if size is None else size
    shape = model.latent_shape((size, size) if isinstance(size, int) else size)
    context, uncond = model.conditioning(prompts, concepts, negative)
    jobs = [(row, seed + i) for row in range(len(prompts)) for i in range(n)]
    images: list[Image.Image] = []
    for first in range(0, len(jobs), batch_size):
        rows, seeds = zip(*jobs[first : first + batch_size])
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

        def draw(generators=generators) -> Tensor:  # (B, C, h, w), each row from its own seed
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

        predict = lambda x, t, part=context[list(rows)]: model.guided(x, t, part, uncond, scale)
        taken = run(model.schedule, predict, draw(), steps, eta, draw)
        for latents in tqdm(taken, total=steps, unit="step", leave=False, disable=not progress):
            pass
        images += to_pil(model.decode_latents(latents))
    return images


# ============================================================================== the command line

LEAST = 256  # pixels; smaller pictures are enlarged in grids
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for(args: argparse.Namespace) -> LatentDiffusion:
    """Load the model that the arguments name, and print a line about it."""
    given = [args.model, args.device, PRECISIONS.get(args.precision), args.family, args.prediction]
    model = load_model(*given, args.clip_skip, args.vae)
    print(model)
    return model


def run_invert(args: argparse.Namespace) -> int:
    """learn a word from pictures: invert examples/concepts/mushroom --init-word plant"""
    out, placeholder = target_of(args)
    check_range(1, save_every=args.save_every)
    check_range(0, preview_every=args.preview_every or 0)
    if args.save_image_words and not args.per_image:
        raise ValueError("--save-image-words saves the words of --per-image; add that, or drop it")
    paths = find_images(args.images)
    templates = read_templates(args.templates, paths, placeholder)
    options = training_options(args, None, templates) | dict(placeholder=placeholder)
    early = options.keys() - {"steps", "batch_size", "lr", "progressive"}  # these need the model
    run = Run(out, {name: options[name] for name in early}, args.save_image_words)
    run.look(args.resume, args.overwrite)  # raises where files of another run would be lost
    warn_of_photographs(paths, args.model is None)  # raises for damaged ones
    model = load_for(args)
    if len(model.tokenizer.token_ids(args.init_word)) > len(args.init_word.split()):
        warnings.warn(f"this model spells {args.init_word!r} in pieces; a word it knows is better")
    model.size = args.size or model.size
    model.latent_shape((model.size, model.size))  # raises for a size that does not fit
    pixels = prepare_images(paths, model.size, args.masked)
    options |= training_options(args, model, templates)
    # What must not change on resuming, the model first; for progressive words also the steps.
    run.settings |= dict(model=model.name, fingerprint=model.fingerprint, clip_skip=model.clip_skip)
    run.settings |= dict(prediction=model.schedule.prediction, precision=str(model.dtype))
    run.settings |= options | dict(progressive=options["steps"] if args.progressive else None)
    run.settings |= dict(pictures=hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16])
    saved = run.look(args.resume, args.overwrite)
    if args.resume and not saved:
        warnings.warn(f"there is no run at {out} to continue; it starts over")
    done = int(saved["step"]) if saved else 0
    if done and out.exists() and (done == options["steps"] or converged(saved.get("losses", []))):
        print(f"the run is over after {done} steps; the word is in {out}")
        return 0
    return learn(args, run, model, pixels, options | dict(resume=saved))


def learn(args: argparse.Namespace, run: Run, model: LatentDiffusion, pixels, options) -> int:
    """Train with the options, write the files of the run, and return the exit status."""
    states = train(model, pixels, gradient_checkpointing=args.gradient_checkpointing, **options)
    placeholder, steps, saved = options["placeholder"], options["steps"], options["resume"]
    run.begin(anew=saved is None)
    write_png(run.path("inputs.png"), grid(to_pil(pixels[:, :3]), least=LEAST), {}, overwrite=True)
    print(f"learning {placeholder}: {len(pixels)} picture(s), {steps} steps, to {run.out}")

    def preview(state: State) -> Image.Image:
        return grid(sample(model, f"a photo of {placeholder}", [state.concept], n=4), least=LEAST)

    preview_every = math.ceil(steps / 3) if args.preview_every is None else args.preview_every
    state = run.follow(states, args.save_every, preview_every, preview)
    if not state.over:
        again = sys.argv if args.resume else [*sys.argv[:2], "--resume", *sys.argv[2:]]
        print(f"stopped; the word is in {run.out}; continue with: python {shlex.join(again)}")
        return 130
    if state.step < steps:
        print(f"converged after {state.step} of {steps} steps")
    draw = [sys.argv[0], "sample", f"a photo of {placeholder}", "--concept", str(run.out)]
    if load_concept(run.out).placeholder != placeholder:  # a .pt names it after the file
        draw += ["--rename", f"{run.out.name}={placeholder}"]
    for name in ("model", "vae", "family", "prediction"):
        draw += [f"--{name}", vars(args)[name]] if vars(args)[name] else []
    draw += ["--clip-skip", str(args.clip_skip)] if args.clip_skip > 1 else []
    print(f"wrote {run.out}; try: python {shlex.join(draw)}")
    return 0


def name_of(path: str | Path) -> str:
    """Return the name of a folder, or that of a file without its ending."""
    path = Path(path).resolve()
    return path.stem if path.is_file() else path.name


def named_after(name: str) -> str:
    """Return the placeholder with this name: "my cat" becomes <my-cat>."""
    return nfc(f"<{'-'.join(name.split())}>")


def target_of(args: argparse.Namespace) -> tuple[Path, str]:
    """Return the word's file and its placeholder, named after --out or the pictures' folder."""
    name = Path(args.out).stem if args.out else name_of(args.images)
    out = Path(args.out or f"{shortened(name, 200)}.safetensors")
    default_format(out.suffix)  # raises if words are not written with this ending
    out = free_target(out, overwrite=True)  # raises if nothing can be written there
    if Path(args.images).is_dir() and out.resolve().parent == Path(args.images).resolve():
        raise ValueError(f"{out} lies among the pictures; write it elsewhere: --out ../{out.name}")
    placeholder = named_after(name) if args.placeholder is None else args.placeholder
    check_names([placeholder])
    return out, placeholder


def training_options(args: argparse.Namespace, model: LatentDiffusion | None, templates) -> dict:
    """Return the options of `train` that decide what is learnt, with the defaults of `model`."""
    if not args.init_word.strip():
        raise ValueError("--init-word is missing: what the pictures show, in a word such as cat")
    steps, batch_size, lr = hyperparameters(model, args.steps, args.batch_size, args.lr)
    vectors = (3 if args.progressive else 1) if args.vectors is None else args.vectors
    check_setup(vectors, args.weight_decay, args.regularize, args.progressive, args.stop, args.seed)
    options = dict(vectors=vectors, templates=templates, steps=steps, batch_size=batch_size, lr=lr)
    same = "init_word seed stop masked per_image weight_decay regularize progressive".split()
    return options | {name: getattr(args, name) for name in same} | dict(flip=not args.no_flip)


def read_templates(choice: str, pictures: Sequence[Path], placeholder: str = "{}") -> list:
    """Return the templates that --templates names, or a list of them for each picture."""
    return list(TEMPLATES.get(choice) or written_templates(choice, pictures, placeholder))


def words_for(args: argparse.Namespace, prompts: Sequence[str]) -> list[Concept]:
    """Return the learnt words; check them and the prompts' weights before anything slow starts."""
    concepts = words_in(args.concept, args.rename)
    known = [concept.placeholder for concept in concepts]
    used = re.findall(any_of(known), "\n".join(without_weights(p, known) for p in prompts))
    check_names(known if prompts else [])
    for word in known:
        if prompts and word not in used:
            warnings.warn(f"{word} was loaded, but no prompt uses it")
    return concepts


def run_sample(args: argparse.Namespace) -> None:
    """draw prompts with learnt words: sample "a small <mushroom>" --concept mushroom.safetensors"""
    out = free_target(args.out, args.overwrite, ".png")
    _, steps, title = check_sampling(args.sampler, args.steps, args.n, args.eta, args.seed)
    guidance_of(None, args.guidance)  # raises for NaN and infinity
    if not (prompts := args.texts + args.prompts):
        raise ValueError("no prompt given; give PROMPT in quotes, or --prompts FILE")
    if files := [t for t in prompts if re.fullmatch(r"[^\s:]+\.(safetensors|pt|bin|png)", t)]:
        raise ValueError(f"{files[0]} is no prompt; give --concept before the file of each word")
    count = args.n * len(prompts) if args.singles else 0
    singles = [free_target(Path(args.singles, f"{i:04}.png"), args.overwrite) for i in range(count)]
    concepts, model = words_for(args, [*prompts, args.negative]), load_for(args)
    bar = sys.stderr.isatty()  # logs of many prompts would fill with bars
    settings = dict(sampler=args.sampler, steps=steps, eta=args.eta, seed=args.seed)
    settings |= dict(guidance_scale=guidance_of(model, args.guidance), negative=args.negative)
    settings |= dict(size=args.size or (model.size, model.size))
    info = settings | dict(title=title, model=model.name, model_hash=model.short_hash)
    info |= dict(clip_skip=model.clip_skip)
    print(f"drawing {len(prompts)} prompt(s) x {args.n}, {steps} steps of {title}, to {out}")
    images, seeds = [], [*range(args.seed, args.seed + args.n)] * len(prompts)
    for prompt in tqdm(prompts, unit="prompt", disable=len(prompts) == 1):
        for image in sample(model, prompt, concepts, n=args.n, progress=bar, **settings):
            if singles:
                text = {"prompt": prompt, "settings": info | dict(seed=seeds[len(images)])}
                write_png(singles[len(images)], image, text, args.overwrite)
            images.append(image)
    text = {"prompt": "\n".join(prompts), "settings": info | dict(n=args.n, seeds=seeds)}
    sheet = grid(images, args.n if len(prompts) > 1 else None, least=LEAST)
    write_png(out, sheet, text, args.overwrite)
    print(f"wrote {out}")


def run_convert(args: argparse.Namespace) -> None:
    """write a word in another program's format: convert mushroom.safetensors mushroom.pt"""
    out = free_target(args.out, args.overwrite)
    concepts = load_concepts(args.source)
    chosen = [c for c in concepts if args.word in (None, c.placeholder)]
    if len(chosen) != 1:
        names = ", ".join(concept.placeholder for concept in concepts)
        raise ValueError(f"{args.source} holds {names}; say which one with --word")
    concept = chosen[0]
    if args.placeholder is not None:
        check_names([args.placeholder])
        concept = replace(concept, placeholder=args.placeholder)
    if args.picture and out.suffix.lower() != ".png":
        raise ValueError(f"--picture is for an OUT that is a .png file; {out} is not")
    picture = open_image(args.picture) if args.picture else None
    concept.save(out, args.overwrite, args.format, picture)
    word = load_concept(out).placeholder  # in a .pt, the word is named after the file
    print(f"wrote {out}: {word}, {tuple(concept.vectors.shape)}")


def run_show(args: argparse.Namespace) -> None:
    """look into a word, a model or a prompt: show --word mushroom.safetensors"""
    if not (args.word_file or args.prompt or args.model):
        raise ValueError("nothing to show; give --word FILE, --model PATH or --prompt TEXT")
    args.concept = [*args.concept, *filter(None, [args.word_file])]
    words, model = words_for(args, [args.prompt] if args.prompt else []), load_for(args)
    if args.prompt:
        show_prompt(args.prompt, words, model)
    elif args.word_file:
        show_words(words, model)
    else:
        print(f"stored as {model.stored}")
        for name in ("unet", "autoencoder", "text_encoder"):
            count = sum(p.numel() for p in getattr(model, name).parameters())
            print(f"{name:12} {count / 1e6:8,.1f}M parameters")
        width, length = model.text_encoder.token_table.shape[1], model.tokenizer.max_length
        print(f"{width} numbers a word, {length} tokens a prompt, pictures of {model.size} pixels")


def show_prompt(prompt: str, concepts: Sequence[Concept], model: LatentDiffusion) -> None:
    """Print a line per token: id, text, and weight if it is not 1."""
    model.check_concepts(concepts)
    start, end = ((i, 1.0) for i in model.tokenizer.frame([]))
    for chunk in model.weighted_chunks(prompt, concepts):
        for i, weight in [start, *chunk, end]:
            print(f"{i:6d} {model.token_text(i, concepts)}" + f" x {weight:.2f}" * (weight != 1))


def show_words(concepts: Sequence[Concept], model: LatentDiffusion) -> None:
    """Print each word's metadata, norms (and those of the model's words) and nearest words."""
    table = model.text_encoder.token_table.float().cpu()
    low, middle, high = table.norm(dim=1).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    for concept in concepts:
        count, width = concept.vectors.shape
        print(f"{concept.placeholder}: {count} vector(s) of {width} numbers, {table.shape[1]} here")
        for key, value in concept.metadata.items():
            print(f"  {key}: {value:.200}")
        for vector in concept.vectors:
            line = f"  norm {vector.norm():.3f} (here {low:.3f} to {high:.3f}, median {middle:.3f})"
            if width == table.shape[1]:
                cosines, ids = F.cosine_similarity(vector[None], table).topk(5)
                near = zip(map(model.token_text, ids.tolist()), cosines.tolist())
                line += "; nearest: " + ", ".join(f"{text} {cosine:.2f}" for text, cosine in near)
            print(line)
        model.warn_of_another_model(concept)


# Every option by the name that VERBS uses; `flag` is its name on the command line if that differs.
OPTIONS: dict[str, dict] = dict(
    images=dict(flag="images", metavar="IMAGES", help="folder with 3-5 pictures of one thing"),
    texts=dict(flag="texts", nargs="*", metavar="PROMPT", help="what to draw, in quotes"),
    prompts=dict(type=text_lines, default=[], metavar="FILE", help="text file, a prompt per line"),
    negative=dict(default="", metavar="TEXT", help="what should not be seen, such as blurry"),
    source=dict(flag="source", metavar="IN", help="a word's file, from here or another program"),
    target=dict(flag="out", metavar="OUT", help="file to write: .safetensors, .pt or .png"),
    model=dict(metavar="NAME|PATH", help="sd15, sd21, sdxl, ldm, file or folder (the bundled one)"),
    family=dict(choices=FAMILIES, help="kind of model (detected)"),
    prediction=dict(choices=("eps", "v"), help="what the model predicts (detected)"),
    vae=dict(metavar="PATH", help="another autoencoder, file or folder (the model's)"),
    clip_skip=dict(type=int, default=1, choices=(1, 2), help="2 if the model's page says so (1)"),
    device=dict(help="cuda, mps or cpu (the fastest here)"),
    precision=dict(choices=PRECISIONS, help="of the weights (bf16 or fp16 with CUDA, else fp32)"),
    seed=dict(type=int, default=0, help="another number gives another result (0)"),
    overwrite=dict(action="store_true", help="replace files of the same name"),
    concept=dict(action="append", default=[], metavar="FILE", help="a word's file; repeatable"),
    rename=dict(action="append", default=[], metavar="FILE=WORD", help="call a file's word WORD"),
    init_word=dict(default="", metavar="WORD", help="needed: what the pictures show, such as cat"),
    placeholder=dict(type=nfc, metavar="WORD", help="the word's name in prompts, such as <cat>"),
    word_out=dict(flag="--out", metavar="FILE", help="file for the word (IMAGES.safetensors)"),
    resume=dict(action="store_true", help="continue a run that was stopped; repeat its options"),
    vectors=dict(type=int, help="how many per word; more hold more detail (1; 3 if progressive)"),
    training_steps=dict(flag="--steps", type=int, help="how many (5000; SDXL 2000; bundled 600)"),
    training_size=dict(flag="--size", type=side, help="pixels; less saves memory (the model's)"),
    batch_size=dict(type=int, help="pictures per step; fewer save memory (4; SDXL 1; bundled 8)"),
    lr=dict(help="rate per picture; or base, high, low (0.005; SDXL 0.002; bundled 0.0025)"),
    stop=dict(choices=STOPS, default="never", help="auto stops when the loss has settled (never)"),
    weight_decay=dict(type=float, default=0.0, help="pulls the word to 0; the paper has 0.01 (0)"),
    regularize=dict(type=float, default=0.0, help="keeps the word near --init-word; try 0.001 (0)"),
    progressive=dict(action="store_true", help="train one vector, then two, then three"),
    per_image=dict(action="store_true", help="also a word for each picture, for its own details"),
    save_image_words=dict(action="store_true", help="save the words of --per-image too"),
    templates=dict(default="object", help="object, style, captions, FILE or text with {} (object)"),
    no_flip=dict(action="store_true", help="do not mirror the pictures; for things with writing"),
    masked=dict(action="store_true", help="ignore what is transparent, or black in NAME.mask.png"),
    gradient_checkpointing=dict(action="store_true", help="less memory, but slower"),
    preview_every=dict(type=int, metavar="N", help="steps between previews; 0: none (--steps / 3)"),
    save_every=dict(type=int, default=50, metavar="N", help="steps between saves of the run (50)"),
    n=dict(flag="-n", type=int, default=4, help="pictures per prompt (4)"),
    sampler=dict(choices=SAMPLERS, default="dpm++", help="the paper's is ddim, slower (dpm++)"),
    steps=dict(type=int, help="sampling steps; more are slower and finer (14; ddim 50)"),
    guidance=dict(type=float, help="1 to 15, how much the prompt counts (7.5; SDXL 5; bundled 3)"),
    eta=dict(type=float, default=0.0, help="fresh noise in each step, from 0 to 1 (0)"),
    size=dict(type=picture_size, metavar="W[xH]", help="pixels, such as 512x768 (the model's)"),
    grid_out=dict(flag="--out", default="grid.png", metavar="FILE", help="all pictures (grid.png)"),
    singles=dict(metavar="FOLDER", help="also save each picture by itself, in this folder"),
    format=dict(choices=FORMATS, help="emb_params is for kohya (by the ending of OUT)"),
    word_file=dict(flag="--word", dest="word_file", metavar="FILE", help="look into this word"),
    prompt=dict(metavar="TEXT", help="show the tokens of this prompt, and their weights"),
    word=dict(type=nfc, metavar="WORD", help="which word, if IN holds several"),
    picture=dict(metavar="FILE", help="picture to put the word into, for an OUT that is a .png"),
)
LOADING = "vae family prediction clip_skip device precision"
VERBS = {  # their options in the order of --help: what everybody needs, then by subject
    run_invert: "images init_word word_out model placeholder vectors templates masked no_flip "
    "training_size training_steps stop batch_size lr regularize weight_decay progressive per_image "
    "save_image_words gradient_checkpointing seed resume overwrite save_every preview_every "
    + LOADING,
    run_sample: "texts concept model n negative guidance steps size seed grid_out singles "
    "overwrite prompts rename sampler eta " + LOADING,
    run_convert: "source target format placeholder word picture overwrite",
    run_show: "word_file prompt model concept rename " + LOADING,
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
        text, example = run.__doc__.split(": ")
        shown = dict(help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        shown |= dict(description=f"{text}; defaults are in brackets", allow_abbrev=False)
        shown |= dict(epilog=f"example:\n  python textinv.py {example}")
        verb = verbs.add_parser(run.__name__.removeprefix("run_"), **shown)
        add_options(verb, names)
        verb.set_defaults(run=run)
    return exit_status(lambda: (args := parser.parse_args(argv)).run(args))


if __name__ == "__main__":
    sys.exit(main())
