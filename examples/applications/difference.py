"""Save what tuning changed in a model as a file of its own, and add it again (for pivotal.py)."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from models.checkpoint import BUNDLED
from models.files import free_target, open_state, write_file
from models.latent_diffusion import LatentDiffusion

CONFIGURATION = ("config.json", "vocab.txt")  # of the bundled model, in the checkpoint's folder
PREFIX = "model.diffusion_model."  # the UNet's keys in LDM's and Stable Diffusion's own files


def save_difference(path: Path, model: LatentDiffusion, before: dict[str, Tensor]) -> None:
    """Write what tuning added to the weights, in bf16: SD 1.5's attention is 0.2 GB of its 1.7."""
    now = model.unet.state_dict()
    changes = {PREFIX + k: (now[k].cpu().float() - v.float()) for k, v in before.items()}
    about = dict(base_model=model.name, base_model_hash=model.fingerprint)
    changes = {k: v.to(torch.bfloat16).contiguous() for k, v in changes.items()}
    write_file(path, save(changes, about | dict(kind="difference")))


def add_difference(model: LatentDiffusion, path: Path, share: float = 1.0) -> None:
    """Add a saved difference, or a share of it, to a model's weights; -1 takes it out again."""
    parameters = dict(model.unet.named_parameters())
    for key, change in open_state(path).items():
        p = parameters.get(key.removeprefix(PREFIX))
        if p is None or p.shape != change.shape:
            raise ValueError(
                f"{path}: {key} is no weight of {model.name}; load the model that was tuned"
            )
        p.data += (share * change.float()).to(p)


def check_export(base: str | None, out: Path) -> None:
    """Raise ValueError if `export` could not write the checkpoint, or would replace a file."""
    if base is not None and not Path(base).is_file():
        raise ValueError(f"{base} is no single file; only such a model can be exported")
    for name in (out.name, *(CONFIGURATION if base is None else ())):
        target = out.with_name(name)
        if target.exists():
            raise ValueError(f"{target} exists; choose another name for --export")
        free_target(target, overwrite=True)  # raises if nothing can be written there


def export(base: str | None, difference: Path, out: Path) -> None:
    """Write the tuned checkpoint as one .safetensors file, in the base's layout and precision. The
    bundled model's configuration is copied beside it."""
    check_export(base, out)
    state = open_state(BUNDLED / "model.safetensors" if base is None else base)
    for key, change in open_state(difference).items():
        state[key] = (state[key].float() + change).to(state[key].dtype)
    write_file(out, save({k: v.contiguous() for k, v in state.items()}))
    for name in CONFIGURATION if base is None else ():
        shutil.copy(BUNDLED / name, out.parent)
