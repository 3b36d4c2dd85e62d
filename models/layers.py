"""What the networks share: attention, a few layers, and SDXL's conditioning."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Return scaled dot-product attention (Vaswani et al. 2017, eq. 1), (B, Lq, heads * d), of
    q (B, Lq, heads * d), k and v (B, Lk, heads * d). With `causal`, position i sees only 0 to i."""
    b, _, width = q.shape
    q, k, v = (x.view(b, -1, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, Lq, d)
    return out.transpose(1, 2).reshape(b, -1, width)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Return sinusoidal features (B, dim) of timesteps t (B,), float32: cosines, then sines."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class FeedForward(nn.Sequential):
    """Two linear layers; `first` is the one from width to 4 * width, with its activation."""

    def __init__(self, first: nn.Module, width: int):
        super().__init__()
        dropout = nn.Dropout(0.0)  # does nothing, but is counted in the key names
        self.net = nn.Sequential(first, dropout, nn.Linear(4 * width, width))


class Upsample(nn.Sequential):
    """Doubles height and width by repeating each value, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.double = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.conv = conv3x3(channels, channels)


@dataclass
class Conditioning:
    """What SDXL's UNet is conditioned on. Other UNets are given the context alone, a tensor."""

    context: Tensor  # (B, L, D)
    pooled: Tensor  # (B, P): the text as a whole
    # (B, 6), pixels: original height and width, top and left of the crop, target height and width
    # (Podell et al. 2023, section 2.2). None: a picture neither resized nor cropped.
    sizes: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> "Conditioning":
        return each(lambda part: part[rows], self)

    def isfinite(self) -> Tensor:
        return self.context.isfinite().all() & self.pooled.isfinite().all()


def each(function: Callable, *given: Tensor | Conditioning) -> Tensor | Conditioning:
    """Return function(*given) for tensors; for Conditionings, apply it part by part."""
    if isinstance(given[0], Tensor):
        return function(*given)
    parts = zip(*(vars(conditioning).values() for conditioning in given))
    return Conditioning(*(None if part[0] is None else function(*part) for part in parts))
