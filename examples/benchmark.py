"""Speed and memory in one table: a training step, sampling, and the way to the first step.

    python examples/benchmark.py                              # the bundled model
    python examples/benchmark.py --models emoji sd1 ldm --against diffusers   # needs diffusers

sd1 and ldm are files of the full size with random weights, written once (5 GB, --files), for speed
does not depend on their values. Each model has a process of its own, so that peaks of memory are
its own. TFLOP are counted, not timed (torch's FLOP counter); the share is of what a large matrix
product reaches on this device in this precision. sd1 against diffusers: benchmark_diffusers.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from benchmark_parts import FULL_SIZE, count_flops, matmul_rate, timed, write_random
from experiment import ROOT, pictures

import textinv
from models.checkpoint import best_device, best_dtype
from models.command_line import PRECISIONS, peak_memory


def measure(args: argparse.Namespace) -> dict:
    """One column of the table."""
    device = torch.device(args.device) if args.device else best_device()
    dtype = PRECISIONS.get(args.precision) or best_dtype(device)
    (name,) = args.models
    file = args.files / f"{name}.safetensors" if name in FULL_SIZE else None
    model = textinv.load_model(file, device, dtype)
    column = {"precision": str(dtype)[6:], "batch": args.batch_size, "pixels": model.size}
    column["command to model, s"] = time.time() - args.started
    options = dict(batch_size=args.batch_size, gradient_checkpointing=args.gradient_checkpointing)
    states = textinv.train(model, pictures("teddy"), "toy", **options)
    next(states)
    column["command to first step, s"] = time.time() - args.started
    seconds = median(timed(lambda: next(states), device) for _ in range(args.steps))
    column |= {"training step, s": seconds, "peak memory": peak_memory(device)}
    flops = count_flops(lambda: next(states)) / 1e12  # takes memory of its own
    column |= {"TFLOP a step": flops, "TFLOP/s": flops / seconds}
    column["share of a matrix product's"] = flops / seconds / matmul_rate(device, dtype)
    column["picture of 50 DDIM steps, s"] = picture_seconds(model, args.ddim_steps)
    if args.against == "diffusers" and name == "sd1":
        from benchmark_diffusers import compare

        column |= compare(model, states, args)
    return column


def picture_seconds(model: textinv.LatentDiffusion, steps: int) -> float:
    """Seconds for a picture of 50 DDIM steps; of fewer, its other steps are taken to be as long."""
    draw = lambda n: timed(lambda: textinv.sample(model, "a photo of a toy", steps=n), model.device)
    if steps == 50:
        return draw(50)
    one, some = draw(1), draw(steps)
    return one + 49 * (some - one) / (steps - 1)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=["emoji", *FULL_SIZE], default=["emoji"])
    parser.add_argument("--against", choices=["diffusers"])
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed (5)")
    parser.add_argument("--ddim-steps", type=int, default=50, help="that are timed (50)")
    parser.add_argument("--files", type=Path, default=Path(tempfile.gettempdir(), "textinv-random"))
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # one model, as JSON
    args = parser.parse_args(argv)
    if args.ddim_steps < 2:
        parser.error("--ddim-steps must be at least 2: the first takes longer than the others")
    if args.started:
        print(json.dumps(measure(args)))
        return
    columns = {}
    for name in args.models:
        file = args.files / f"{name}.safetensors"
        if name in FULL_SIZE and not file.exists():
            write_random(name, file)
        given = [*(sys.argv[1:] if argv is None else argv), "--models", name]
        command = [sys.executable, __file__, *given, "--started", str(time.time())]
        lines = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
        columns[name] = json.loads(lines[-1])
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        values = [column.get(key, "") for column in columns.values()]
        shown = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)
        print(f"| {key} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
