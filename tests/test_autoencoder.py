"""The autoencoder against CompVis' (golden numbers) and against diffusers (live)."""

import pytest
import torch
from helpers import (
    DECODE,
    FAMILIES,
    MOMENTS,
    assert_close_std,
    below,
    fill,
    golden,
    golden_keys,
    randomize,
    renamed,
    shapes,
    tiny_autoencoder,
)

from models.autoencoder import Autoencoder, AutoencoderConfig

TABLES = ("ldm-text2img-large", "sd-v1-compvis", "sd-v2-compvis", "sdxl-compvis")


@pytest.mark.parametrize("table", TABLES)
def test_full_size_keys(table):
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig())
    assert autoencoder.config.factor == 8
    assert shapes(autoencoder) == below(golden_keys(table), "first_stage_model.")


@pytest.mark.parametrize("family", (*FAMILIES, "sdxl"))
def test_encode(family):
    g, autoencoder = golden(family), tiny_autoencoder(family)
    moments = autoencoder.quant_conv(autoencoder.encoder(g["vae.image"]))
    # Channels 6 and 7 are log-variances that a random network sends below -30; their size must
    # not loosen the tolerance of the others.
    assert_close_std(moments[:, :6], g["vae.moments"][:, :6], MOMENTS)
    assert_close_std(moments[:, 6:], g["vae.moments"][:, 6:], MOMENTS)

    mean, std = autoencoder.encode(g["vae.image"])
    assert_close_std(mean, g["vae.mean"], MOMENTS)
    assert_close_std(2 * std.log(), g["vae.logvar"], MOMENTS)
    sample = mean + std * g["vae.noise"]
    assert_close_std(sample, g["vae.sample"], MOMENTS)
    scale_factor = 0.13025 if family == "sdxl" else 0.18215
    assert_close_std(scale_factor * sample, g["vae.latent_scaled"], MOMENTS)


@pytest.mark.parametrize("family", (*FAMILIES, "sdxl"))
def test_decode(family):
    g = golden(family)
    assert_close_std(tiny_autoencoder(family).decode(g["vae.z"]), g["vae.decoded"], DECODE)


def test_live_against_diffusers():
    diffusers = pytest.importorskip("diffusers")
    widths = (32, 64, 96, 96)
    reference = diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=64,
    )
    randomize(reference)
    names = "map-sd-v1-vae-compvis-to-diffusers"
    state = renamed(reference.state_dict(), names, "first_stage_model.")
    autoencoder = fill(Autoencoder(AutoencoderConfig(widths)), state)

    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(2, 3, 40, 64, generator=generator) - 1
    posterior = reference.encode(images).latent_dist
    mean, std = autoencoder.encode(images)
    assert_close_std(mean, posterior.mean, MOMENTS)
    assert_close_std(std, posterior.std, MOMENTS)
    z = torch.randn(2, 4, 5, 8, generator=generator)
    assert_close_std(autoencoder.decode(z), reference.decode(z).sample, DECODE)
