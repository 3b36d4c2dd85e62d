"""What the networks share: attention, a few layers, and SDXL's conditioning."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability

SLOW = {"AVX2": (torch.bfloat16, torch.float16), "AVX512": (torch.float16,)}  # by CPU capability


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Return scaled dot-product attention (Vaswani et al. 2017, eq. 1), (B, Lq, heads * d), of
    q (B, Lq, heads * d), k and v (B, Lk, heads * d). With `causal`, position i sees only 0 to i."""
    b, _, width = q.shape
    q, k, v = (x.view(b, -1, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    out = widened(F.scaled_dot_product_attention, q, k, v, is_causal=causal)  # (B, heads, Lq, d)
    return out.transpose(1, 2).reshape(b, -1, width)


def widened(function: Callable, *tensors: Tensor | None, **options) -> Tensor:
    """Return function(*tensors, **options), computed in float32 on processors where PyTorch
    multiplies the tensors' own type a hundred times as slowly."""
    x = tensors[0]
    if not x.is_cpu or x.dtype not in SLOW.get(get_cpu_capability(), ()):
        return function(*tensors, **options)
    wide = (part if part is None else part.float() for part in tensors)
    return function(*wide, **options).to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return widened(F.linear, x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return widened(super()._conv_forward, x, weight, bias)


def feed_forward(first: nn.Module, width: int) -> nn.Sequential:
    """Return two linear layers; `first` goes from width to 4 * width and has an activation."""
    dropout = nn.Dropout(0.0)  # does nothing, but is counted in the key names
    return nn.Sequential(OrderedDict(net=nn.Sequential(first, dropout, Linear(4 * width, width))))


def upsample(channels: int) -> nn.Sequential:
    """Return layers that double height and width by repeating values, then a 3x3 convolution."""
    repeat = nn.Upsample(scale_factor=2.0, mode="nearest")
    conv = Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=repeat, conv=conv))


@dataclass
class Conditioning:
    """What SDXL's UNet is conditioned on. Other UNets are given the context alone, a tensor."""

    context: Tensor  # (B, L, D)
    pooled: Tensor  # (B, P): the text as a whole
    # (B, 6), pixels: original height and width, top and left of the crop, target height and width
    # (Podell et al. 2023, section 2.2). None: a picture neither resized nor cropped.
    sizes: Tensor | None = None

    def __getitem__(self, rows: slice | list[int]) -> "Conditioning":
        return each(lambda part: part[rows], self)

    def isfinite(self) -> Tensor:
        return self.context.isfinite().all() & self.pooled.isfinite().all()


def each(function: Callable, *given: Tensor | Conditioning) -> Tensor | Conditioning:
    """Return function(*given) for tensors; for Conditionings, apply it part by part."""
    if isinstance(given[0], Tensor):
        return function(*given)
    parts = zip(*(vars(conditioning).values() for conditioning in given))
    return Conditioning(*(None if part[0] is None else function(*part) for part in parts))
