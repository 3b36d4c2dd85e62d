"""KL autoencoder (Rombach et al. 2022, section 3.1): pictures to latents and back.

Modules carry the key names of the CompVis checkpoints (`first_stage_model.` without the prefix).
`Encoder` and `Decoder` are flat lists of residual blocks, one resolution after the other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Upsample, attention


@dataclass
class AutoencoderConfig:
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels per level, full resolution first
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    z_channels: int = 4
    norm_groups: int = 32  # fewer in the narrow bundled model

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return 2 ** (len(self.widths) - 1)


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)  # trap: 1e-5 in the UNet's residual blocks


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention of a single head over all positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (m(h).flatten(2).transpose(1, 2) for m in (self.q, self.k, self.v))
        out = attention(q, k, v, heads=1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Trap: the padding is asymmetric, right and bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then a change of resolution where there is one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(c_out if i else c_in, c_out, groups) for i in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Encoder(nn.Module):
    """Pictures (b, 3, H, W) to mean and log variance, (b, 2 * z_channels, h, w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in, c_out, config.num_res_blocks, groups)
            for c_in, c_out in zip(widths[:1] + widths, widths)
        )
        for level, width in zip(self.down[:-1], widths):
            level.downsample = Downsample(width)
        self.mid = Mid(widths[-1], groups)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents (b, z_channels, h, w) to pictures (b, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups)
        # up[i] works at the resolution of the encoder's down[i], so the last entry runs first.
        self.up = nn.ModuleList(
            Level(c_in, c_out, config.num_res_blocks + 1, groups)
            for c_in, c_out in zip(widths[1:] + widths[-1:], widths)
        )
        for level, width in zip(self.up[1:], widths[1:]):
            level.upsample = Upsample(width)
        self.norm_out = norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, z, h, w) of q(z | x) for pictures x (B, 3, H, W)
        in [-1, 1]; H and W are multiples of `config.factor`. Latents are not scaled yet."""
        x = x.to(self.quant_conv.weight.dtype)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1] and not clamped, from unscaled latents z."""
        return self.decoder(self.post_quant_conv(z.to(self.quant_conv.weight.dtype)))
