"""What tuning changed in a model, as a file of its own (for pivotal.py)."""

import shutil
from pathlib import Path

import experiment  # noqa: F401  so that the repository is found
import torch
from safetensors.torch import save
from torch import Tensor

from models.checkpoint import BUNDLED
from models.files import write_file
from models.latent_diffusion import LatentDiffusion
from models.reading import CheckpointError, open_state

PREFIX = "model.diffusion_model."  # the UNet's keys in LDM's and Stable Diffusion's own files


def save_difference(path: Path, model: LatentDiffusion, before: dict[str, Tensor]) -> None:
    """What tuning has added to the weights, in bf16: SD 1.5's attention is 0.2 GB of its 1.7."""
    now = model.unet.state_dict()
    changes = {PREFIX + k: (now[k].cpu().float() - v.float()) for k, v in before.items()}
    about = dict(base_model=model.name, base_model_hash=model.fingerprint)
    changes = {k: v.to(torch.bfloat16).contiguous() for k, v in changes.items()}
    write_file(path, save(changes, about | dict(kind="difference")))


def read_difference(path: Path) -> dict[str, Tensor]:
    return {key: stored.read(torch.float32) for key, stored in open_state(path).items()}


def add_difference(model: LatentDiffusion, path: Path, share: float = 1.0) -> None:
    """Put the tuned weights into a model, or a share of the way to them; -1 takes them out."""
    parameters = dict(model.unet.named_parameters())
    for key, change in read_difference(path).items():
        p = parameters.get(key.removeprefix(PREFIX))
        if p is None or p.shape != change.shape:
            raise ValueError(f"{path}: {key} is no weight of {model.name}; load what was tuned")
        p.data += (share * change).to(p)


def export(base: str | None, difference: Path, out: Path) -> None:
    """The whole checkpoint as one .safetensors file, in the base's own layout and precision. The
    bundled model's configuration is put beside it."""
    source = BUNDLED / "model.safetensors" if base is None else Path(base)
    if source.is_dir():
        raise CheckpointError(f"{source}: a folder; a single file can be written of a single file")
    state = {key: stored.read(None) for key, stored in open_state(source).items()}
    for key, change in read_difference(difference).items():
        state[key] = (state[key].float() + change).to(state[key].dtype)
    write_file(out, save({k: v.contiguous() for k, v in state.items()}))
    for name in ("config.json", "vocab.txt") if base is None else ():
        shutil.copy(BUNDLED / name, out.parent)
