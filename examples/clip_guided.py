"""CLIP-guided diffusion (Crowson 2021): pictures that climb a cosine in CLIP's space, step by step
(for baselines.py)."""

import torch
import torch.nn.functional as F
from experiment import Lab
from torch import Tensor

import textinv
from models.clip import MEAN, STD


def image_features(lab: Lab, pixels: Tensor) -> Tensor:
    """Unit features of pictures (B, 3, H, W) in [-1, 1], with a gradient."""
    size, like = lab.scorer.clip.config.vision.image_size, pixels.new_tensor
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    pixels = ((pixels + 1) / 2 - like(MEAN)[:, None, None]) / like(STD)[:, None, None]
    return F.normalize(lab.scorer.clip.encode_image(pixels), dim=-1)


def clip_guided(lab: Lab, goal: Tensor, n: int, steps: int, scale: float) -> list:
    """n pictures without a prompt, pushed to features (G, D) of texts or pictures."""
    model, schedule = lab.model, lab.model.schedule
    shape = (n, *model.latent_shape((model.size, model.size)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    uncond = model.encode_text([""] * n)
    for t, t_prev in schedule.ddim_pairs(steps):
        x = x.detach().requires_grad_(True)
        times = torch.full((n,), t, device=x.device)
        x_0, eps = schedule.x_0_and_eps(x, t, model.unet(x, times, uncond).float())
        drawn = model.autoencoder.decode((x_0 / model.scale_factor).to(model.dtype)).float()
        cosine = (image_features(lab, drawn) @ goal.to(x.device).T).mean(1).sum()
        slope = torch.autograd.grad(cosine, x)[0]
        a = schedule.a(t, x).to(x)
        eps = eps.detach() - scale * (1 - a).sqrt() * slope
        x_0 = (x.detach() - (1 - a).sqrt() * eps) / a.sqrt()
        x = schedule.q_sample(x_0, t_prev, eps)
    return textinv.to_pil(model.decode_latents(x.detach()))
