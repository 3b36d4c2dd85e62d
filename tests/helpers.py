"""What the parity tests share: the golden numbers, the tiny models behind them, one comparison.

`golden/` holds what the reference code (CompVis, Stability, OpenAI, diffusers, transformers)
computes on random weights: `tiny/` the weights, `expected/` inputs and outputs, `keys/` the key
names and shapes of the full-size checkpoints. The weights are read here without
models/checkpoint.py, so that a mistake there cannot hide one in the networks.
"""

import json
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from models.autoencoder import Autoencoder, AutoencoderConfig
from models.bert import BertConfig, BertTextEncoder
from models.clip import CLIPTextEncoder, SDXLTextEncoder, TextConfig
from models.schedule import Schedule
from models.unet import UNet, UNetConfig

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("ldm", "sd1", "sd2")

# Largest difference allowed, relative to the standard deviation of the reference. Two correct
# implementations in float32 differ by a fifth of this or less.
TEXT, UNET, CONTEXT_GRAD, VECTOR_GRAD = 2e-5, 5e-5, 5e-4, 1e-4
MOMENTS, DECODE, EXACT, STEP, CHAIN = 5e-5, 2e-4, 1e-5, 2e-4, 1e-4


def deviation(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| / std(reference); of a single number, relative to itself."""
    assert ours.shape == reference.shape, (tuple(ours.shape), tuple(reference.shape))
    scale = reference.double().std() if reference.numel() > 1 else reference.double().abs()
    return ((ours.double() - reference.double()).abs().max() / scale).item()


def assert_close_std(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    error = deviation(ours.detach(), reference)
    assert error <= tolerance, f"{error:.2e} of the reference's std, allowed {tolerance:.0e}"


@cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected" / f"{name}.safetensors")


def golden_keys(name: str) -> dict:
    return json.loads((GOLDEN / "keys" / f"{name}.json").read_text())


@cache
def tiny_state(family: str) -> dict[str, Tensor]:
    """The tiny checkpoint in CompVis names, in float32."""
    folder = GOLDEN / "tiny" / family
    if family == "ldm":
        state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    else:
        state = load_file(folder / "model.safetensors")
    return {key: value.float() for key, value in state.items()}


def below(table: dict, prefix: str) -> dict:
    """The entries of a state_dict or key table below `prefix`, without it and what we never use."""
    unused = ("position_ids", "to_logits.weight", "to_logits.bias")
    return {
        key.removeprefix(prefix): value
        for key, value in table.items()
        if key.startswith(prefix) and not key.endswith(unused)
    }


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def fill(model: nn.Module, state: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """`model` with the weights of `state` below `prefix`, frozen; strict in both directions."""
    model.load_state_dict(below(state, prefix))
    return model.eval().requires_grad_(False)


UNETS = {
    "ldm": UNetConfig((32, 32, 64), 2, (1, 1, 0), context_dim=32),
    "sd1": UNetConfig((32, 64), 1, (1, 0), context_dim=32),
    "sd2": UNetConfig(
        (32, 64), 1, (1, 0), context_dim=32, heads=None, head_width=16, linear_projection=True
    ),
    "sdxl": UNetConfig(
        (32, 64, 64),
        1,
        (0, 2, 3),
        3,
        context_dim=80,
        heads=None,
        head_width=16,
        linear_projection=True,
        vector_dim=96,
        factor=4,
    ),
}
AUTOENCODERS = {"ldm": (32, 64, 32, 32), "sd1": (32, 32, 32, 32), "sd2": (32, 32, 32)}
AUTOENCODERS["sdxl"] = (32, 32, 32)


@cache
def tiny_unet(family: str) -> UNet:
    return fill(UNet(UNETS[family]), tiny_state(family), "model.diffusion_model.")


@cache
def tiny_autoencoder(family: str) -> Autoencoder:
    config = AutoencoderConfig(AUTOENCODERS[family], num_res_blocks=1)
    return fill(Autoencoder(config), tiny_state(family), "first_stage_model.")


@cache
def tiny_text_encoder(family: str) -> BertTextEncoder | CLIPTextEncoder:
    if family == "ldm":
        encoder = BertTextEncoder(BertConfig(32, 2, 2048))
        return fill(encoder, tiny_state("ldm"), "cond_stage_model.")
    if family == "sd1":
        config = TextConfig(width=32, layers=2, heads=4, vocab_size=640)
        return fill(CLIPTextEncoder(config), tiny_state("sd1"), "cond_stage_model.transformer.")
    if family == "sdxl":
        return tiny_sdxl_text_encoder()
    # The single file of SD 2 has open_clip's names; its folder has the same weights in ours.
    config = TextConfig(width=32, layers=2, heads=2, vocab_size=640, quick_gelu=False)
    file = GOLDEN / "tiny/sd2/diffusers/text_encoder/model.safetensors"
    return fill(CLIPTextEncoder(config), load_file(file))


def tiny_sdxl_text_encoder() -> SDXLTextEncoder:
    first = TextConfig(width=32, layers=3, heads=4, vocab_size=640)
    second = TextConfig(width=48, layers=4, heads=3, vocab_size=640, quick_gelu=False)
    state, tables = {}, []
    for name, folder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        part = load_file(GOLDEN / f"tiny/sdxl/diffusers/{folder}/model.safetensors")
        tables.append(part.pop("text_model.embeddings.token_embedding.weight"))
        state |= {key.replace("text_model", name): value for key, value in part.items()}
    state["token_table"] = torch.cat(tables, dim=1)
    return fill(
        SDXLTextEncoder((first, second)), {key: value.float() for key, value in state.items()}
    )


def schedule(family: str) -> Schedule:
    return Schedule(0.00085, 0.012, "v" if family == "sd2" else "eps")


def embed(encoder: nn.Module, ids: Tensor, placeholder: int = -1, vectors: Tensor | None = None):
    """Token embeddings (B, 77, D) of ids (B, 77), each placeholder replaced by `vectors` (V, D);
    the rest of a row moves to the right and is cut at 77."""
    rows = []
    for row in ids:
        parts = [
            vectors if i == placeholder else encoder.token_table[i : i + 1] for i in row.tolist()
        ]
        rows.append(torch.cat(parts)[: len(row)])
    return torch.stack(rows)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """A reference model in float32 with every weight moved, so that none is trivially 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval().requires_grad_(False)


def renamed(state: dict[str, Tensor], table: str, prefix: str) -> dict[str, Tensor]:
    """diffusers' state_dict in CompVis names, by the map `golden/keys/{table}.json`."""
    entry = golden_keys(table)
    state = {ours.removeprefix(prefix): state[theirs] for ours, theirs in entry["map"].items()}
    for key in entry.get("squeeze", ()):  # 1x1 convolutions there, linear layers in diffusers
        state[key.removeprefix(prefix)] = state[key.removeprefix(prefix)][:, :, None, None]
    return state


def units(*shape: int, seed: int = 0) -> Tensor:
    """Random features whose rows have something in common, as CLIP's do."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x + 0.5, dim=-1)
