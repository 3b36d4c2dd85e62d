"""What blended latent diffusion (Avrahami et al. 2022) needs around its loop, which is
`textinv.edit`: sizes, masks in the space of the latents, and the reconstruction of the background.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .latent_diffusion import LatentDiffusion


def working_size(size: tuple[int, int], side: int, unit: int) -> tuple[int, int]:
    """Width and height, multiples of `unit`, of about this size's proportions, whose shorter one
    is `side`: what a model draws well. Raises ValueError for a strip."""
    if max(size) > 8 * min(size):
        raise ValueError(f"the picture has {size[0]}x{size[1]} pixels; cut a less narrow part out")
    scale = side / min(size)
    width, height = (max(unit, round(s * scale / unit) * unit) for s in size)
    return width, height


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, 1, h, w) of 0 and 1, for a size (h, w), of a mask (1, 1, H, W) in [0, 1]: a latent may
    change if any of its pixels may. Trap: grey would be multiplied in anew at every step."""
    return F.adaptive_max_pool2d((mask >= 0.5).float(), size)


def shrinking_masks(mask: Tensor, steps: int, cell: int) -> list[Tensor]:
    """The mask (1, 1, h, w) of each step. A thin one begins wide and narrows down to itself over
    the first half of the steps (section 4.3 of the blended latent diffusion paper).

    Thin is what is no wider than a cell of the UNet's coarsest level, `cell` latents: where the
    picture is laid out, the mask would hardly be seen.
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
    """Picture (1, 3, H, W) in [-1, 1] of latents (1, C, h, w), whose background is that of the
    source (1, 3, H, W).

    The decoder loses fine detail of what it never changed. A copy of it is fitted to this one
    picture: to the source outside the mask, to what it drew itself inside (section 4.2 there), so
    that no seam is seen where the source is pasted back. Both count alike: with the 100 that the
    original code gives the outside, a small decoder spoils the inside. 0 steps fit nothing.
    """
    drawn = model.decode_latents(latents)
    if steps == 0 or mask.min() == 1:
        return drawn
    decode = nn.Sequential(model.autoencoder.post_quant_conv, model.autoencoder.decoder)
    decode = copy.deepcopy(decode).float().requires_grad_(True)
    optimizer = torch.optim.Adam(decode.parameters(), lr=1e-4)
    z = latents.float() / model.scale_factor
    with torch.enable_grad():
        for _ in range(steps):
            picture = decode(z)
            inside = ((picture - drawn) * mask).square().mean()
            outside = ((picture - source) * (1 - mask)).square().mean()
            optimizer.zero_grad()
            (inside + outside).backward()
            optimizer.step()
    return decode(z).detach().clamp(-1, 1)
