"""eps_theta of the paper: a UNet with cross-attention (Rombach et al. 2022, section 3.3).

LDM, Stable Diffusion 1, 2 and XL and the bundled model differ only in the numbers of `UNetConfig`.
Modules have the key names of the CompVis checkpoints (without the prefix `model.diffusion_model.`),
where every entry of `input_blocks` and `output_blocks` is a short list of layers.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Conditioning, Conv2d, Linear, attention, feed_forward, upsample


@dataclass
class UNetConfig:
    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # channels per level, full resolution first
    num_res_blocks: int = 2  # per level on the way down; one more on the way up
    depths: tuple[int, ...] = (1, 1, 1, 0)  # blocks per transformer, by level; 0: no transformer
    middle_depth: int = 1  # the same for the middle block
    context_dim: int = 768
    channels: int = 4  # of the latents
    heads: int | None = 8  # attention heads in LDM and SD 1; None: width / head_width
    head_width: int | None = None  # channels per attention head, 64 in SD 2 and SDXL
    norm_groups: int = 32  # fewer in the narrow bundled model
    linear_projection: bool = False  # linear proj_in and proj_out, not 1x1 convolutions: SD 2, SDXL
    vector_dim: int = 0  # width of SDXL's pooled text and embedded sizes, 2816; 0 in other models
    factor: int = 8  # pixels per latent along each side, for SDXL's sizes

    def heads_for(self, width: int) -> int:
        return self.heads or width // self.head_width


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Return sinusoidal features (B, dim) of timesteps t (B,), float32: cosines, then sines."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Residual block, (b, c_in, h, w) to (b, c_out, h, w). emb: embedded t, (b, 4 * widths[0])."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        # Trap: eps is 1e-5 here, 1e-6 in the spatial transformers. Dropout is there for key names.
        norm = partial(nn.GroupNorm, config.norm_groups, eps=1e-5)
        conv, dropout = partial(Conv2d, kernel_size=3, padding=1), nn.Dropout(0.0)
        self.in_layers = nn.Sequential(norm(c_in), nn.SiLU(), conv(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(4 * config.widths[0], c_out))
        self.out_layers = nn.Sequential(norm(c_out), nn.SiLU(), dropout, conv(c_out, c_out))
        self.skip_connection = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Attention from x (b, l, width) to context (b, L, context_dim), or to x itself."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k, self.to_v = (Linear(context_dim, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attention(q, k, v, self.heads))


class GEGLU(nn.Module):
    """A linear layer, one half of which gates the other (Shazeer 2020)."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.proj = Linear(d_in, 2 * d_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # trap: the value comes first
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward. Here the word meets the picture."""

    def __init__(self, width: int, config: UNetConfig):
        super().__init__()
        heads = config.heads_for(width)
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = feed_forward(GEGLU(width, 4 * width), width)
        self.attn2 = CrossAttention(width, config.context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Pointwise(Linear):
    """A 1x1 convolution of (b, c, h, w), stored as a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.flatten(2).transpose(1, 2))  # (b, h * w, c)
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class SpatialTransformer(nn.Module):
    """Transformer blocks over the h * w positions of x (b, c, h, w), added to x. They also attend
    to the context (b, L, context_dim)."""

    def __init__(self, width: int, depth: int, config: UNetConfig):
        super().__init__()
        project = Pointwise if config.linear_projection else partial(Conv2d, kernel_size=1)
        blocks = (TransformerBlock(width, config) for _ in range(depth))
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=1e-6)
        self.proj_in = project(width, width)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = project(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (b, h * w, c)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Block(nn.Sequential):
    """Layers in a row. Residual blocks also read the timestep, transformers the text."""

    def forward(self, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            else:
                h = layer(h)
        return h


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths, emb_dim = config.widths, 4 * config.widths[0]

        def embed(dim: int) -> nn.Sequential:
            return nn.Sequential(Linear(dim, emb_dim), nn.SiLU(), Linear(emb_dim, emb_dim))

        def block(c_in: int, level: int) -> Block:
            layers = Block(ResBlock(c_in, widths[level], config))
            if depth := config.depths[level]:
                layers.append(SpatialTransformer(widths[level], depth, config))
            return layers

        self.time_embed = embed(widths[0])
        if config.vector_dim:
            self.label_emb = nn.Sequential(embed(config.vector_dim))
        self.input_blocks = nn.ModuleList([Block(Conv2d(config.channels, widths[0], 3, padding=1))])
        skips = [widths[0]]  # channels of the input blocks' outputs, which output blocks read too
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(block(skips[-1], level))
                skips.append(width)
            if level < len(widths) - 1:
                halve = Conv2d(width, width, 3, stride=2, padding=1)
                self.input_blocks.append(Block(nn.Sequential(OrderedDict(op=halve))))
                skips.append(width)
        self.middle_block = Block(
            ResBlock(width, width, config),
            SpatialTransformer(width, config.middle_depth, config),
            ResBlock(width, width, config),
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.output_blocks.append(block(width + skips.pop(), level))
                width = widths[level]
            if level:
                self.output_blocks[-1].append(upsample(width))
        norm = nn.GroupNorm(config.norm_groups, width, eps=1e-5)
        self.out = nn.Sequential(norm, nn.SiLU(), Conv2d(width, config.channels, 3, padding=1))

    def embed_vector(self, x_t: Tensor, given: Conditioning) -> Tensor:
        """Return the embedding (B, 4 * widths[0]) of pooled text and sizes, which SDXL adds to the
        timestep's. Each of the six sizes is embedded separately, like a timestep."""
        b, p = given.pooled.shape
        h, w = (side * self.config.factor for side in x_t.shape[2:])
        own = torch.tensor([h, w, 0, 0, h, w]).expand(b, 6)
        sizes = own if given.sizes is None else given.sizes  # (B, 6)
        dim = (self.config.vector_dim - p) // 6
        sizes = timestep_embedding(sizes.flatten().to(x_t.device), dim).reshape(b, 6 * dim)
        vector = torch.cat([given.pooled.float(), sizes], dim=1)  # (B, vector_dim)
        return self.label_emb(vector.to(self.out[2].weight.dtype))

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | Conditioning) -> Tensor:
        """Return the prediction (B, C, h, w), eps or v, in the weights' precision.

        x_t (B, C, h, w): noised latents, h and w multiples of 2 ** (levels - 1). t (B,): integer
        timesteps. context (B, L, D): text, for SDXL a `Conditioning`. Inputs of any precision.
        """
        dtype = self.out[2].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.config.widths[0]).to(dtype))
        if isinstance(context, Conditioning):
            emb, context = emb + self.embed_vector(x_t, context), context.context
        # With gradient checkpointing, the backward pass computes each block's activations again.
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False) if again else Block.__call__
        h, context, skips = x_t.to(dtype), context.to(dtype), []
        for block in self.input_blocks:
            h = run(block, h, emb, context)
            skips.append(h)
        h = run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)
