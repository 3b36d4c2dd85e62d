"""Edit a picture with a prompt: repaint what a mask shows (appendix A.3, figure 10), or all of it.

    python examples/edit.py photo.png "a <cat> at night" --mask mask.png --concept cat.safetensors
    python examples/edit.py photo.png "a sketch of a dog" --strength 0.5

With a mask this is blended latent diffusion (Avrahami et al. 2022, arXiv:2206.02779), "that paper"
below; without one, sampling from a noised picture (Meng et al. 2022).
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import repository  # noqa: F401
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import textinv
from models.concepts import Concept
from models.files import free_target, write_png
from models.images import grid, open_image, to_pil, to_tensor
from models.latent_diffusion import LatentDiffusion

Picture = str | Path | Image.Image


@torch.no_grad()
def edit(
    model: LatentDiffusion,
    image: Picture,
    prompt: str,
    concepts: Sequence[Concept] = (),
    mask: Picture | None = None,
    strength: float | None = None,
    n: int = 1,
    steps: int = 50,
    guidance_scale: float | None = None,
    seed: int = 0,
    reconstruct_steps: int = 100,
    negative: str = "",
) -> list[Image.Image]:
    """Return n versions of a picture, repainted to the prompt where the mask is white, or
    everywhere without a mask. negative: a prompt for what shall not be seen.

    Sampling starts from the picture noised to `strength`, in (0, 1], of the schedule: 1, the
    default with a mask, starts from pure noise; 0.6, the default without one, keeps the layout.
    After every step the latents outside the mask are replaced by the picture's, noised to the same
    timestep, always with the noise that sampling began with (that paper draws it anew).

    A version has the picture's size, and its very pixels (of a transparent one, on white) where
    the mask is black. The decoder is fitted to them in `reconstruct_steps` steps. Raises ValueError
    for an unreadable or very narrow picture, for a mask of another size or without white, and as
    `textinv.sample` does.
    """
    image = open_image(image)
    strength = default_strength(mask) if strength is None else strength
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; use more than 0 (keep all), and 1 at most")
    textinv.check_range(1, n=n)
    textinv.check_range(0, seed=seed, reconstruct_steps=reconstruct_steps)
    mask = Image.new("L", image.size, 255) if mask is None else open_mask(mask, image.size)
    guide = dict(guidance_scale=textinv.guidance_of(model, guidance_scale))
    guide["context"], guide["uncond"] = model.conditioning([prompt], concepts, negative)
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
        noise = textinv.normal(z_0, torch.Generator().manual_seed(s))
        x = noise if strength == 1 else model.schedule.q_sample(z_0, pairs[0][0], noise)
        x = sample_blended(model, x, z_0, noise, pairs, masks, guide)
        decoded = reconstruct(model, x, pixels, inside, reconstruct_steps)
        version = to_pil(decoded)[0].resize(image.size, Image.Resampling.BICUBIC)
        versions.append(Image.composite(version, image, mask))
    return versions


def sample_blended(
    model: LatentDiffusion,
    x: Tensor,
    z_0: Tensor,
    noise: Tensor,
    pairs: Sequence[tuple[int, int]],
    masks: Sequence[Tensor],
    guide: dict,
) -> Tensor:
    """Return latents (1, C, h, w) by DDIM from x over pairs of timesteps, with a mask for each
    step: what lies outside is set to q(z_t | z_0), always with the same noise. `guide` are the
    other arguments of `model.guided`."""
    for (t, t_prev), mask in zip(pairs, masks):
        prediction = model.guided(x, torch.full((1,), t, device=x.device), **guide)
        x = model.schedule.ddim_step(x, t, t_prev, prediction)
        x = mask * x + (1 - mask) * model.schedule.q_sample(z_0, t_prev, noise)
    return masks[-1] * x + (1 - masks[-1]) * z_0


def default_strength(mask: object | None) -> float:
    return 0.6 if mask is None else 1.0


def open_mask(source: Picture, size: tuple[int, int]) -> Image.Image:
    """Return the mask of a picture of that (width, height): grey, white where it may change.
    Transparent parts are black."""
    mask = open_image(source, "black").convert("L")
    if mask.size != size:
        raise ValueError(
            f"the mask has {mask.width}x{mask.height} pixels, the picture {size[0]}x{size[1]}; "
            "paint the mask over a copy of the picture"
        )
    if mask.getextrema()[1] < 128:
        raise ValueError("the mask is black everywhere; paint white what may change")
    return mask


def working_size(size: tuple[int, int], side: int, unit: int) -> tuple[int, int]:
    """Return the width and height at which the model works: multiples of `unit`, about in this
    size's proportions, the shorter one `side`. Raises ValueError for a narrow strip."""
    if max(size) > 8 * min(size):
        raise ValueError(
            f"the picture has {size[0]}x{size[1]} pixels; crop it to a less narrow one"
        )
    scale = side / min(size)
    width, height = (max(unit, round(s * scale / unit) * unit) for s in size)
    return width, height


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mask (1, 1, h, w) of 0 and 1, for a size (h, w), of one in pixels (1, 1, H, W) in
    [0, 1]: a latent may change if any of its pixels may.

    Trap: a grey mask would be multiplied in again at every step, so it is rounded first.
    """
    return F.adaptive_max_pool2d((mask >= 0.5).float(), size)


def shrinking_masks(mask: Tensor, steps: int, cell: int) -> list[Tensor]:
    """Return the mask (1, 1, h, w) of each step. A thin one starts wide and shrinks to itself over
    the first half of the steps (section 4.3 of that paper).

    Thin means no wider than a cell of the UNet's coarsest level, `cell` latents: there, where the
    layout is decided, such a mask would hardly be seen.
    """
    thickness, rest = 0, mask
    while thickness < cell // 2 and rest.any():
        rest = -F.max_pool2d(-F.pad(rest, (1, 1, 1, 1)), 3, stride=1)  # one latent off all around
        thickness += bool(rest.any())
    missing = cell // 2 - thickness
    masks = []
    for step in range(steps):
        radius = max(0, round(missing * (1 - 2 * step / steps)))
        masks.append(F.max_pool2d(mask, 2 * radius + 1, stride=1, padding=radius))
    return [*masks[:-1], mask]


def reconstruct(
    model: LatentDiffusion, latents: Tensor, source: Tensor, mask: Tensor, steps: int
) -> Tensor:
    """Decode latents (1, C, h, w) into a picture (1, 3, H, W) in [-1, 1] whose background is that
    of the source (1, 3, H, W).

    The autoencoder loses fine detail even where nothing was changed. A copy of the decoder is
    fitted to this one picture: to the source outside the mask, to its own output inside (section
    4.2 of that paper), so that no seam is seen where the source is pasted back. Both have the same
    weight: with the 100 that the original code gives the outside, a small decoder spoils the
    inside. 0 steps fit nothing.
    """
    decoded = model.decode_latents(latents)
    if steps == 0 or mask.min() == 1:
        return decoded
    decode = nn.Sequential(model.autoencoder.post_quant_conv, model.autoencoder.decoder)
    decode = copy.deepcopy(decode).float().requires_grad_(True)
    optimizer = torch.optim.Adam(decode.parameters(), lr=1e-4)
    z = latents.float() / model.scale_factor
    with torch.enable_grad():
        for _ in range(steps):
            picture = decode(z)
            inside = ((picture - decoded) * mask).square().mean()
            outside = ((picture - source) * (1 - mask)).square().mean()
            optimizer.zero_grad()
            (inside + outside).backward()
            optimizer.step()
    return decode(z).detach().clamp(-1, 1)


# ------------------------------------------------------------------------------------ command line


def make_parser() -> argparse.ArgumentParser:
    p = textinv.Parser(prog="edit.py", description=__doc__.splitlines()[0])
    p.add_argument("image", metavar="IMAGE")
    p.add_argument("prompt", metavar="PROMPT", help="what the result should show")
    p.add_argument("--mask", metavar="FILE", help="white where the picture may change (all of it)")
    p.add_argument("--strength", type=float, help="1 keeps nothing (1 with a mask, else 0.6)")
    p.add_argument("-n", type=int, default=1, help="versions (default: 1)")
    fit = "fit the decoder to what the mask keeps (100); 0 is faster, perhaps with a seam"
    p.add_argument("--reconstruct-steps", type=int, default=100, metavar="STEPS", help=fit)
    p.add_argument("--out", default="edited.png", metavar="FILE", help="a grid if n > 1")
    names = "concept rename negative steps guidance seed overwrite model " + textinv.LOADING
    textinv.add_options(p, names)
    p.set_defaults(steps=50)
    return p


def run(args: argparse.Namespace) -> None:
    out = free_target(args.out, args.overwrite, ".png")
    textinv.check_range(1, n=args.n)
    image = open_image(args.image)
    mask = open_mask(args.mask, image.size) if args.mask else None
    concepts = textinv.words_for(args, [args.prompt, args.negative])
    model = textinv.load_for(args)
    strength = default_strength(mask) if args.strength is None else args.strength
    settings = dict(strength=strength, steps=args.steps)
    settings |= dict(reconstruct_steps=args.reconstruct_steps, negative=args.negative)
    settings |= dict(guidance_scale=textinv.guidance_of(model, args.guidance))
    print(f"repainting {args.image}, {args.n} version(s), {args.steps} DDIM steps, to {out}")
    images, seeds = [], range(args.seed, args.seed + args.n)
    for seed in tqdm(seeds, unit="version", disable=args.n == 1):
        images += edit(model, image, args.prompt, concepts, mask, seed=seed, **settings)
    settings |= dict(image=args.image, mask=args.mask, size=image.size, seed=args.seed)
    settings |= dict(seeds=[*seeds], model=model.name, model_hash=model.short_hash)
    settings |= dict(clip_skip=model.clip_skip)
    text = {"prompt": args.prompt, "settings": settings}
    write_png(out, grid(images), text, args.overwrite)
    print(f"wrote {out}")


def main(argv: Sequence[str] | None = None) -> int:
    return textinv.exit_status(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
