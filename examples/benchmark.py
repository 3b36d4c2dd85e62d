"""Speed and memory: a training step, sampling, and the way to the first step.

    python examples/benchmark.py                              # the bundled model
    python examples/benchmark.py --models emoji sd1 ldm --against diffusers   # needs diffusers

sd1 and ldm are the full-size networks with random weights: speed does not depend on their values.
Each row is a process of its own, so that peaks of memory are its own. TFLOP are counted, not timed
(torch's FLOP counter, the forward and backward of one step); the share is of what a large matrix
product reaches on this device in this precision. diffusers (sd1 only): see benchmark_diffusers.py.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

import torch
from experiment import ROOT, pictures
from torch.utils.flop_counter import FlopCounterMode

import textinv
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.bert import BertConfig, BertTextEncoder
from models.checkpoint import BERT_VOCAB, BETAS, best_device, best_dtype
from models.clip import CLIPTextEncoder, TextConfig
from models.command_line import PRECISIONS, peak_memory
from models.schedule import Schedule
from models.tokenizers import CLIPTokenizer, WordPieceTokenizer
from models.unet import UNet, UNetConfig

SIZES = {"emoji": 64, "ldm": 256, "sd1": 512}


def full_size(family: str, device: torch.device, dtype: torch.dtype) -> textinv.LatentDiffusion:
    """Stable Diffusion 1.5, or LDM-1.45B, with random weights."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        sd1 = family == "sd1"
        unet = UNet(UNetConfig(context_dim=768 if sd1 else 1280))
        autoencoder = Autoencoder(AutoencoderConfig())
        torch.set_default_dtype(torch.float32)
        encoder = CLIPTextEncoder(TextConfig()) if sd1 else BertTextEncoder(BertConfig())
    tokenizer = CLIPTokenizer.load() if sd1 else WordPieceTokenizer.load(BERT_VOCAB)
    parts = (unet, autoencoder, encoder, tokenizer, Schedule(*BETAS))
    return textinv.LatentDiffusion(*parts, family=family, name=family, size=SIZES[family])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5)) / 1e12


def timed(work, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict:
    """One row of the table."""
    start, (name,) = time.perf_counter(), args.models
    device = torch.device(args.device) if args.device else best_device()
    dtype = PRECISIONS.get(args.precision) or best_dtype(device)
    bundled = name == "emoji"
    model = textinv.load_model(None, device, dtype) if bundled else full_size(name, device, dtype)
    options = dict(batch_size=args.batch_size, gradient_checkpointing=args.gradient_checkpointing)
    options |= dict(steps=2 * args.steps + 3, templates=["a photo of a {}"])
    states = textinv.train(model, pictures("teddy"), "toy", **options)
    next(states)
    first = time.perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        next(states)
    flops = counter.get_total_flops()
    seconds = median(timed(lambda: next(states), device) for _ in range(args.steps))
    row = dict(model=name, pixels=SIZES[name], batch=args.batch_size, precision=str(dtype)[6:])
    row |= dict(first_step_s=first, step_s=seconds, step_memory=peak_memory(device))
    row |= dict(tflop=flops / 1e12, tflop_per_s=flops / seconds / 1e12)
    row |= dict(share=flops / seconds / 1e12 / matmul_rate(device, dtype))
    if args.against == "diffusers" and name == "sd1":
        from benchmark_diffusers import compare

        row |= compare(model, states, args)
    draw = lambda: textinv.sample(model, "a photo of a toy", n=1, steps=args.ddim_steps)
    row |= dict(picture_s=timed(draw, device) * 50 / args.ddim_steps)
    return row


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["emoji"])
    parser.add_argument("--against", choices=["diffusers"])
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed (5)")
    parser.add_argument("--ddim-steps", type=int, default=50, help="drawn; times are for 50")
    parser.add_argument("--row", action="store_true", help="one model in this process, as JSON")
    args = parser.parse_args(argv)
    if args.row:
        print(json.dumps(measure(args)))
        return
    given = sys.argv[1:] if argv is None else list(argv)
    for name in args.models:
        command = [sys.executable, __file__, *given, "--models", name, "--row"]
        row = json.loads(subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1])
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(*shown, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
