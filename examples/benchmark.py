"""Measure speed and memory: a training step, sampling, and the way to the first step.

    python examples/benchmark.py                              # the bundled model
    python examples/benchmark.py --models emoji sd1 ldm --against diffusers   # needs diffusers

sd1 and ldm are files of the full size with random weights, written once (5 GB, --files), for speed
does not depend on their values. Each model has a process of its own, so that its peak of memory is
its own. TFLOP are counted, not timed (torch's FLOP counter), and compared with what a large matrix
product reaches on this device in this precision. --against: benchmark_diffusers.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from repository import ROOT
from safetensors.torch import save_file
from torch.utils import flop_counter

import textinv
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.bert import BertConfig, BertTextEncoder
from models.checkpoint import best_dtype, find_device
from models.clip import CLIPTextEncoder, TextConfig
from models.latent_diffusion import LatentDiffusion
from models.layers import widened
from models.runs import peak_memory
from models.unet import UNet, UNetConfig

PICTURES = ROOT / "examples" / "concepts" / "teddy"
FULL_SIZE = ("sd1", "ldm")  # Stable Diffusion 1.5 and LDM-1.45B


def write_random(name: str, path: Path) -> None:
    """Write a checkpoint of the full size with random weights, in fp16."""
    if name == "sd1":
        prefix, encoder, width = "cond_stage_model.transformer.", CLIPTextEncoder(TextConfig()), 768
    else:
        prefix, encoder, width = "cond_stage_model.", BertTextEncoder(BertConfig()), 1280
    parts = {prefix: encoder, "first_stage_model.": Autoencoder(AutoencoderConfig())}
    parts["model.diffusion_model."] = UNet(UNetConfig(context_dim=width))
    state = {p + k: v.half() for p, module in parts.items() for k, v in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the work is done, on the device too."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: widened(torch.mm, a, b), device) for _ in range(5)) / 1e12


def count_flops(work: Callable[[], object]) -> int:
    """Count the floating point operations of matrix products, convolutions and attention. torch's
    counter skips the attention that runs on the CPU unless it is told what that costs."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    of_shapes = {forward: lambda *qkv, **_: flop_counter.sdpa_flop_count(*qkv[:3])}
    of_shapes[backward] = lambda *gqkv, **_: flop_counter.sdpa_backward_flop_count(*gqkv[:4])
    with flop_counter.FlopCounterMode(display=False, custom_mapping=of_shapes) as counter:
        work()
    return counter.get_total_flops()


def measure(args: argparse.Namespace) -> dict:
    """Return one column of the table."""
    device = find_device(args.device)
    dtype = textinv.PRECISIONS.get(args.precision) or best_dtype(device)
    (name,) = args.models
    file = args.files / f"{name}.safetensors" if name in FULL_SIZE else None
    model = textinv.load_model(file, device, dtype)
    column = {"precision": str(dtype)[6:], "batch": args.batch_size, "pixels": model.size}
    column["command to model, s"] = time.time() - args.started
    options = dict(batch_size=args.batch_size, gradient_checkpointing=args.gradient_checkpointing)
    states = textinv.train(model, PICTURES, "toy", **options)
    next(states)
    column["command to first step, s"] = time.time() - args.started
    seconds = median(timed(lambda: next(states), device) for _ in range(args.steps))
    column |= {"training step, s": seconds, "peak memory": peak_memory(device)}
    flops = count_flops(lambda: next(states)) / 1e12  # takes memory of its own
    column |= {"TFLOP a step": flops, "TFLOP/s": flops / seconds}
    column["share of a matrix product's"] = flops / seconds / matmul_rate(device, dtype)
    textinv.sample(model, "a photo of a toy", steps=1)  # for warming up
    _, steps, title = textinv.SAMPLERS["dpm++"]
    seconds = timed(lambda: textinv.sample(model, "a photo of a toy"), device)
    column[f"picture of {steps} steps of {title}, s"] = seconds
    if args.against == "diffusers" and name == "sd1":
        column |= compare(model, states, args)
    return column


def compare(model: LatentDiffusion, states, args: argparse.Namespace) -> dict:
    """Time a training step of the run `states`, and a picture, in turns with diffusers. Each draws
    as it does unless told otherwise."""
    from benchmark_diffusers import components, their_sample, their_step

    parts = components(model)
    train = their_step(model, *parts, PICTURES, args.batch_size, args.gradient_checkpointing)
    pipeline = their_sample(model, *parts)
    train(), pipeline(num_inference_steps=1)  # for warming up; ours is warm
    found = in_turns("step", lambda: next(states), train, args.steps, model.device)
    draw = lambda: textinv.sample(model, "a photo of a toy")
    return found | in_turns("picture", draw, pipeline, args.pictures, model.device)


def in_turns(what: str, ours, theirs, rounds: int, device: torch.device) -> dict:
    """Return the median seconds of both, and the ratios of the rounds."""
    pairs = [(timed(ours, device), timed(theirs, device)) for _ in range(rounds)]
    a, b = map(median, zip(*pairs))
    ratios = sorted(x / y for x, y in pairs)
    spread = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    found = {f"{what}: ours in turns, s": a, f"{what}: diffusers, s": b}
    return found | {f"{what}: ratio (lowest, highest)": spread}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=["emoji", *FULL_SIZE], default=["emoji"])
    parser.add_argument("--against", choices=["diffusers"])
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=textinv.PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed (5)")
    parser.add_argument("--pictures", type=int, default=1, help="rounds with diffusers' (1)")
    parser.add_argument("--files", type=Path, default=Path(tempfile.gettempdir(), "textinv-random"))
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # one model, as JSON
    return parser


def main(argv=None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.started:
        print(json.dumps(measure(args)))
        return
    columns = {}
    for name in args.models:
        file = args.files / f"{name}.safetensors"
        if name in FULL_SIZE and not file.exists():
            write_random(name, file)
        options = [*(sys.argv[1:] if argv is None else argv), "--models", name]
        command = [sys.executable, __file__, *options, "--started", str(time.time())]
        lines = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
        columns[name] = json.loads(lines[-1])
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        values = [column.get(key, "") for column in columns.values()]
        shown = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)
        print(f"| {key} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
