"""Tune the UNet itself in little memory (for pivotal.py and imagic.py).

Activations are computed again in the backward pass; each weight is updated, and its gradient freed,
as soon as the gradient is there. What is not tuned stays in the model's precision. Where that is
bf16, the tuned weights are float32 meanwhile (bf16 is too coarse to add an update of 1e-5 to), and
autocast multiplies them in bf16. What to do with the result: difference.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import textinv
from models.images import prepare_images
from models.latent_diffusion import LatentDiffusion

Batch = tuple[list[int], Tensor, Tensor, Tensor]


def training_batches(
    model: LatentDiffusion, images: str | Path | list, batch_size: int, flip: bool
) -> Callable[[int], Batch]:
    """Return a function of a step's number: indices of views (B), their latents z ~ E(x)
    (B, C, h, w), timesteps (B,) and noise like z, the same for the same number. With `flip` each
    picture is seen plain and mirrored."""
    pixels = prepare_images(images, model.size)
    mean, std, _ = textinv.training_set(model, pixels, flip)
    seeded = torch.Generator().manual_seed
    return lambda step: textinv.draw_batch(model, mean, std, batch_size, seeded(step))


def tune(
    model: LatentDiffusion, loss_of: Callable[[int], Tensor], steps: int, lr: float, layers: str
) -> Iterator[tuple[int, Tensor]]:
    """Minimise the losses of steps 1, 2, ... by AdamW over the UNet's weights whose names hold
    `layers` ("attn": all attention; "": everything); yield step and loss. The model is changed, and
    frozen again at the end."""
    chosen = [p for name, p in model.unet.named_parameters() if layers in name]
    dtype = model.dtype
    updates = {}

    def update(parameter: Tensor) -> None:
        updates[parameter].step()
        parameter.grad = None

    for p in chosen:
        p.data = p.data.float()
        p.requires_grad_(True)
        updates[p] = torch.optim.AdamW([p], lr)
    hooks = [p.register_post_accumulate_grad_hook(update) for p in chosen]
    model.unet.gradient_checkpointing = True
    try:
        for step in range(1, steps + 1):
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_of(step)
            loss.backward()
            yield step, loss.detach()
    finally:
        model.unet.gradient_checkpointing = False
        for hook, p in zip(hooks, chosen):
            hook.remove()
            p.requires_grad_(False)
            p.data = p.data.to(dtype)


def weights(model: LatentDiffusion, layers: str) -> dict[str, Tensor]:
    """Return a copy, on the CPU, of the weights that `tune` will change."""
    return {k: p.cpu().clone() for k, p in model.unet.state_dict().items() if layers in k}
