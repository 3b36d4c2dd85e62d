"""eps_theta of the paper: a UNet with cross-attention (Rombach et al. 2022, section 3.3).

One implementation for LDM, Stable Diffusion 1, 2 and XL and the bundled model; they differ only in
the numbers of `UNetConfig`. Modules carry the key names of the CompVis checkpoints
(`model.diffusion_model.` without the prefix), in which every entry of `input_blocks` and
`output_blocks` is a short list of layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Conditioning, Upsample, attention, timestep_embedding


@dataclass
class UNetConfig:
    widths: tuple[int, ...] = (320, 640, 1280, 1280)  # channels per level, full resolution first
    num_res_blocks: int = 2  # per level on the way down; one more on the way up
    # Transformer blocks in each spatial transformer of a level, 0 where there is none. The middle
    # has as many as the last level in SDXL, where the others have none.
    depths: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    context_dim: int = 768
    channels: int = 4  # of the latents
    # Attention heads: a fixed number (8 in LDM and SD 1) or a fixed width (64 in SD 2 and SDXL).
    heads: int | None = 8
    head_width: int | None = None
    norm_groups: int = 32  # fewer in the narrow bundled model
    linear_projection: bool = False  # SD 2, SDXL: proj_in and proj_out are no 1x1 convolutions
    vector_dim: int = 0  # SDXL: width of pooled text and embedded sizes, 2816; 0: none are taken
    factor: int = 8  # pixels per latent, in each direction; only sizes need it

    @property
    def emb_dim(self) -> int:
        """Width of the timestep's embedding."""
        return 4 * self.widths[0]

    def heads_for(self, width: int) -> int:
        return self.heads or width // self.head_width


class ResBlock(nn.Module):
    """(b, c_in, h, w) to (b, c_out, h, w), told the timestep by its embedding (b, emb_dim)."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        groups = config.norm_groups  # trap: eps is 1e-5 here, 1e-6 in the spatial transformers
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, c_in, eps=1e-5), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.emb_dim, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, c_out, eps=1e-5),
            nn.SiLU(),
            nn.Dropout(0.0),  # holds its place in the key names
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Attention from x to `context`, or to x itself where there is none."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        out = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out(out)


class GEGLU(nn.Module):
    """A linear layer whose one half is gated by the other (Shazeer 2020)."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.proj = nn.Linear(d_in, 2 * d_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # trap: the value comes first
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward. Here the word meets the picture."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Adds to a picture (b, c, h, w) what transformer blocks make of its h * w positions and of the
    context (b, L, context_dim)."""

    def __init__(self, width: int, depth: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=1e-6)
        project = nn.Linear if config.linear_projection else (lambda a, b: nn.Conv2d(a, b, 1))
        self.proj_in = project(width, width)
        heads = config.heads_for(width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, config.context_dim, heads) for _ in range(depth)
        )
        self.proj_out = project(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        linear = isinstance(self.proj_in, nn.Linear)
        h = self.norm(x) if linear else self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # (b, h * w, c)
        h = self.proj_in(h) if linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if linear else h
        h = h.transpose(1, 2).reshape(x.shape)
        return x + (h if linear else self.proj_out(h))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Block(nn.Sequential):
    """Layers in a row; each is given what it wants besides h: the timestep or the text."""

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
        widths, emb_dim = config.widths, config.emb_dim
        levels = range(len(widths))

        def blocks(c_in: int, level: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(c_in, widths[level], config)]
            if depth := config.depths[level]:
                layers.append(SpatialTransformer(widths[level], depth, config))
            return layers

        self.time_embed = nn.Sequential(
            nn.Linear(widths[0], emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        if config.vector_dim:
            layers = nn.Linear(config.vector_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
            self.label_emb = nn.Sequential(nn.Sequential(*layers))
        self.input_blocks = nn.ModuleList(
            [Block(nn.Conv2d(config.channels, widths[0], 3, padding=1))]
        )
        skips = [widths[0]]
        for level in levels:
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Block(*blocks(skips[-1], level)))
                skips.append(widths[level])
            if level != levels[-1]:
                self.input_blocks.append(Block(Downsample(widths[level])))
                skips.append(widths[level])

        width = widths[-1]
        self.middle_block = Block(
            ResBlock(width, width, config),
            SpatialTransformer(width, config.middle_depth, config),
            ResBlock(width, width, config),
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for i in range(config.num_res_blocks + 1):
                layers = blocks(width + skips.pop(), level)
                width = widths[level]
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, width, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(width, config.channels, 3, padding=1),
        )

    def run(self, block: Block, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """One block, its activations kept or, with gradient checkpointing, computed again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, context, use_reentrant=False)
        return block(h, emb, context)

    def embed_vector(self, x_t: Tensor, given: Conditioning) -> Tensor:
        """Return what SDXL adds to the timestep's embedding, (B, emb_dim): pooled text and sizes.

        Each of the six sizes is embedded by itself, as timesteps are.
        """
        (b, p), (h, w) = given.pooled.shape, x_t.shape[2:]
        sizes, factor, dim = given.sizes, self.config.factor, (self.config.vector_dim - p) // 6
        if sizes is None:
            own = [h * factor, w * factor, 0, 0, h * factor, w * factor]
            sizes = torch.tensor(own).expand(b, 6)
        sizes = timestep_embedding(sizes.flatten().to(x_t.device), dim).reshape(b, 6 * dim)
        vector = torch.cat([given.pooled.float(), sizes], dim=1)  # (B, vector_dim)
        return self.label_emb(vector.to(self.out[2].weight.dtype))

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | Conditioning) -> Tensor:
        """The prediction for noised latents: eps, or v where the schedule says so.

        x_t (B, C, h, w) latents, t (B,) integer timesteps, context (B, L, D) text features, of
        any float precision, for SDXL in a `Conditioning`; the result (B, C, h, w) has the precision
        of the weights. h and w are multiples of 2 ** (levels - 1).
        """
        dtype = self.out[2].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.config.widths[0]).to(dtype))
        if isinstance(context, Conditioning):
            emb, context = emb + self.embed_vector(x_t, context), context.context
        h, context = x_t.to(dtype), context.to(dtype)
        skips = []
        for block in self.input_blocks:
            h = self.run(block, h, emb, context)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)
