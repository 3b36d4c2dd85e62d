"""KL autoencoder (Rombach et al. 2022, section 3.1): pictures to latents and back.

Modules have the key names of the CompVis checkpoints (without the prefix `first_stage_model.`). A
`Sequential` runs its modules in the order in which they are set.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Conv2d, attention, upsample


@dataclass
class AutoencoderConfig:
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels per level, full resolution first
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    z_channels: int = 4
    norm_groups: int = 32  # fewer in the narrow bundled model

    @property
    def factor(self) -> int:
        return 2 ** (len(self.widths) - 1)  # pixels per latent along each side


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)  # trap: 1e-5 in the UNet's residual blocks


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = norm(c_in, groups)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out, groups)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Self-attention with one head over the h * w positions of x (b, c, h, w), added to x."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (m(h).flatten(2).transpose(1, 2) for m in (self.q, self.k, self.v))
        out = attention(q, k, v, heads=1)  # (b, h * w, c)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))  # trap: right and bottom only
        self.conv = Conv2d(channels, channels, 3, stride=2)


class Mid(nn.Sequential):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)


class Level(nn.Sequential):
    """Residual blocks of one resolution, then down- or upsampling unless it is the last level."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int):
        super().__init__()
        self.block = nn.Sequential(ResnetBlock(c_in, c_out, groups))
        for _ in range(blocks - 1):
            self.block.append(ResnetBlock(c_out, c_out, groups))


class Encoder(nn.Module):
    """Pictures (b, 3, H, W) to mean and log variance, (b, 2 * z_channels, h, w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.Sequential()
        for c_in, c_out in zip(widths[:1] + widths, widths):
            self.down.append(Level(c_in, c_out, config.num_res_blocks, groups))
        for level, width in zip(self.down[:-1], widths):
            level.downsample = Downsample(width)
        self.mid = Mid(widths[-1], groups)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents (b, z_channels, h, w) to pictures (b, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups)
        # up[i] has the resolution of the encoder's down[i], so the last entry runs first.
        self.up = nn.ModuleList()
        for c_in, c_out in zip(widths[1:] + widths[-1:], widths):
            self.up.append(Level(c_in, c_out, config.num_res_blocks + 1, groups))
        for level, width in zip(self.up[1:], widths[1:]):
            level.upsample = upsample(width)
        self.norm_out = norm(widths[0], groups)
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

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
        self.quant_conv = Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (B, z, h, w), unscaled, of q(z | x) for pictures
        x (B, 3, H, W) in [-1, 1]. H and W are multiples of `config.factor`."""
        x = x.to(self.quant_conv.weight.dtype)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Return pictures (B, 3, H, W), about [-1, 1] but not clamped, of unscaled latents z."""
        return self.decoder(self.post_quant_conv(z.to(self.quant_conv.weight.dtype)))
