"""CLIP-guided diffusion (Crowson 2021), for baselines.py: each sampling step follows the gradient
of a cosine in CLIP's space."""

import torch
import torch.nn.functional as F
from common import Workspace
from torch import Tensor

from models.clip import MEAN, STD
from models.images import to_pil


def image_features(workspace: Workspace, pixels: Tensor) -> Tensor:
    """Return unit features of pictures (B, 3, H, W) in [-1, 1], differentiably."""
    size = workspace.scorer.clip.config.vision.image_size
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    pixels = ((pixels + 1) / 2 - MEAN.to(pixels)) / STD.to(pixels)
    return F.normalize(workspace.scorer.clip.encode_image(pixels), dim=-1)


def clip_guided(workspace: Workspace, goal: Tensor, n: int, steps: int, scale: float) -> list:
    """Return n pictures without a prompt, guided to features (G, D) of texts or pictures."""
    model, schedule = workspace.model, workspace.model.schedule
    shape = (n, *model.latent_shape((model.size, model.size)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    uncond = model.encode_text([""] * n)
    for t, t_prev in schedule.ddim_pairs(steps):
        x = x.detach().requires_grad_(True)
        times = torch.full((n,), t, device=x.device)
        x_0, eps = schedule.x_0_and_eps(x, t, model.unet(x, times, uncond).float())
        drawn = model.autoencoder.decode((x_0 / model.scale_factor).to(model.dtype)).float()
        cosine = (image_features(workspace, drawn) @ goal.to(x.device).T).mean(1).sum()
        slope = torch.autograd.grad(cosine, x)[0]
        a = schedule.a(t, x).to(x)
        eps = eps.detach() - scale * (1 - a).sqrt() * slope
        x_0 = (x.detach() - (1 - a).sqrt() * eps) / a.sqrt()
        x = schedule.q_sample(x_0, t_prev, eps)
    return to_pil(model.decode_latents(x.detach()))
