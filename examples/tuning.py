"""Tuning the generator itself, in little memory (for pivotal.py and imagic.py).

Activations are computed again in the backward pass; each weight is updated, and its gradient freed,
as soon as the gradient is there. What is not tuned stays in the model's precision; where that is
bf16, what is tuned is float32 for as long (bf16 is too coarse to add an update of 1e-5 to), and
multiplied in bf16. What to do with the result: difference.py.
"""

from collections.abc import Callable, Iterator

import experiment  # noqa: F401  so that the repository is found
import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion


def tune(
    model: LatentDiffusion, loss_of: Callable[[int], Tensor], steps: int, lr: float, layers: str
) -> Iterator[tuple[int, Tensor]]:
    """AdamW on the UNet's weights whose names hold `layers` ("attn": all attention; "": everything)
    for losses of steps 1, 2, ...; yields step and loss. The model is changed, and frozen again at
    the end."""
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
    """A copy, on the CPU, of what `tune` will change."""
    return {k: p.cpu().clone() for k, p in model.unet.state_dict().items() if layers in k}
