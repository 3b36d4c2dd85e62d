"""The small pieces that the networks here share: attention, timestep embedding, upsampling, and
what the text encoders hand to the UNet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Scaled dot-product attention of `heads` heads (Vaswani et al. 2017, eq. 1).

    q is (B, Lq, heads * d), k and v are (B, Lk, heads * d); returns (B, Lq, heads * d). With
    `causal`, position i sees positions 0..i only, as in CLIP's text tower.
    """
    b, _, width = q.shape
    q, k, v = (x.view(b, -1, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(b, -1, width)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features (B, dim) of the timesteps t (B,), float32: first cosines, then sines."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Upsample(nn.Module):
    """Twice the height and width: each value repeated, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@dataclass
class Conditioning:
    """What SDXL's UNet is conditioned on; for the other families it is the context, a tensor."""

    context: Tensor  # (B, L, D)
    pooled: Tensor  # (B, P): the text as a whole
    # (B, 6), pixels: original height and width, top and left of the crop, target height and width
    # (Podell et al. 2023, section 2.2). None: those of a picture that nobody resized or cropped.
    sizes: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> "Conditioning":
        return each(lambda part: part[rows], self)

    def isfinite(self) -> Tensor:
        return torch.cat([self.context.isfinite().flatten(), self.pooled.isfinite().flatten()])


def each(function: Callable, *given: Tensor | Conditioning) -> Tensor | Conditioning:
    """Apply a function to tensors, or part by part to Conditionings."""
    if isinstance(given[0], Tensor):
        return function(*given)
    parts = zip(*((g.context, g.pooled, g.sizes) for g in given))
    return Conditioning(*(None if part[0] is None else function(*part) for part in parts))
