"""diffusers' components in the loop of its textual inversion script, for benchmark.py.

Weights, pictures, batch and precision are the same. The loop is as they publish it: the autoencoder
encodes in every step, the text encoder's whole table is optimised, and all rows but the word's are
put back afterwards.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.images import prepare_images
from models.latent_diffusion import LatentDiffusion
from models.layers import Conv2d, Linear
from models.naming import autoencoder_from_diffusers, unet_from_diffusers


def components(model: LatentDiffusion):
    """Return diffusers' UNet, autoencoder and text encoder of SD 1.5's sizes, and give their
    weights to our model."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    widths, blocks = (128, 256, 512, 512), dict(layers_per_block=2)
    blocks |= dict(down_block_types=["DownEncoderBlock2D"] * 4)
    blocks |= dict(up_block_types=["UpDecoderBlock2D"] * 4)
    with torch.device(model.device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(block_out_channels=widths, **blocks)
        sizes = dict(vocab_size=49409, hidden_size=768, intermediate_size=3072)
        sizes |= dict(num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu")
        text = CLIPTextModel(CLIPTextConfig(**sizes))
    unet, vae = unet.to(model.dtype), vae.to(model.dtype)
    for ours, theirs, rename in (
        (model.unet, unet, unet_from_diffusers),
        (model.autoencoder, vae, autoencoder_from_diffusers),
    ):
        ours.load_state_dict(rename(theirs.state_dict()))
        theirs.requires_grad_(False)
        # Where a processor is slow with 16-bit floats, theirs too are multiplied in float32.
        ours_of = {nn.Linear: Linear, nn.Conv2d: Conv2d}
        for module in theirs.modules():
            module.__class__ = ours_of.get(type(module), type(module))
    text.requires_grad_(False)
    text.get_input_embeddings().weight.requires_grad_(True)
    return unet, vae, text


def their_step(model, unet, vae, text, folder: Path, batch_size: int, checkpointing: bool):
    """Return a function that does one step of their script."""
    from diffusers import DDPMScheduler

    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()  # theirs checkpoints only so; no dropout is set
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    table = text.get_input_embeddings().weight
    before = table.detach().clone()
    optimizer = torch.optim.AdamW([table], lr=5e-4)
    images = prepare_images(folder, model.size)[:1]
    images = images.expand(batch_size, -1, -1, -1).to(model.device, model.dtype)
    ids = torch.tensor([model.tokenizer.pad(model.tokenizer.encode("a photo of a toy"))])
    ids[0, 5] = 49408
    ids = ids.expand(batch_size, -1).to(model.device)

    def step() -> None:
        latents = vae.encode(images).latent_dist.sample().detach() * 0.18215
        noise = torch.randn_like(latents)
        t = torch.randint(1000, (batch_size,), device=latents.device)
        context = text(ids)[0].to(model.dtype)
        prediction = unet(scheduler.add_noise(latents, noise, t), t, context).sample
        F.mse_loss(prediction.float(), noise.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:49408] = before[:49408]

    return step


def their_sample(model, unet, vae, text):
    """Return a function that draws one picture with their pipeline: 50 steps of PNDM, as Stable
    Diffusion 1.5 is published."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.to(model.dtype),
        tokenizer=None,
        unet=unet.eval(),
        scheduler=PNDMScheduler(
            1000, 0.00085, 0.012, "scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    context, uncond = (model.encode_text([p]).to(model.dtype) for p in ("a photo of a toy", ""))
    given = dict(prompt_embeds=context, negative_prompt_embeds=uncond)
    given |= dict(height=model.size, width=model.size)
    return lambda **steps: pipe(**given, **steps)
