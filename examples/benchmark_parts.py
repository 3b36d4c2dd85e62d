"""What benchmark.py needs: checkpoints of the full size, a clock, what the device can do."""

import time
from collections.abc import Callable
from pathlib import Path

import experiment  # noqa: F401  so that the repository is found
import torch
from safetensors.torch import save_file
from torch.utils import flop_counter

from models.autoencoder import Autoencoder, AutoencoderConfig
from models.bert import BertConfig, BertTextEncoder
from models.clip import CLIPTextEncoder, TextConfig
from models.unet import UNet, UNetConfig

# Stable Diffusion 1.5, and LDM-1.45B: the UNet's context, the text encoder, its place in the file.
FULL_SIZE = {
    "sd1": (768, lambda: CLIPTextEncoder(TextConfig()), "cond_stage_model.transformer."),
    "ldm": (1280, lambda: BertTextEncoder(BertConfig()), "cond_stage_model."),
}


def write_random(name: str, path: Path) -> None:
    """A checkpoint of the full size in fp16."""
    width, encoder, prefix = FULL_SIZE[name]
    parts = {prefix: encoder(), "first_stage_model.": Autoencoder(AutoencoderConfig())}
    parts["model.diffusion_model."] = UNet(UNetConfig(context_dim=width))
    state = {p + k: v.half() for p, module in parts.items() for k, v in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5)) / 1e12


def count_flops(work: Callable[[], object]) -> int:
    """Floating point operations of the work: matrix products, convolutions, attention. torch's
    counter passes over the attention that runs on the CPU unless it is told."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    of_shapes = {forward: lambda *qkv, **_: flop_counter.sdpa_flop_count(*qkv[:3])}
    of_shapes[backward] = lambda *gqkv, **_: flop_counter.sdpa_backward_flop_count(*gqkv[:4])
    with flop_counter.FlopCounterMode(display=False, custom_mapping=of_shapes) as counter:
        work()
    return counter.get_total_flops()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the work is done, on the device too."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
