"""Load Stable Diffusion XL at full size, with random weights, and train a few steps: time, memory.

    python examples/benchmark_sdxl.py                  # bf16, 512 pixels, gradient checkpointing

The file (7 GB, --file) is written once, piece by piece, from the table of keys in tests/golden.
RssAnon is what the process needs for itself; weights that stay mapped in their file do not count.
"""

import argparse
import json
import math
import struct
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from repository import ROOT

import textinv


def write_random(path: Path) -> None:
    """Write a single file of SDXL in fp16. Matrices keep the size of what passes through them."""
    table = json.loads((ROOT / "tests/golden/keys/sdxl-compvis.json").read_text())
    table = {key: shape for key, shape in table.items() if not key.endswith("position_ids")}
    header, end = {}, 0
    for key, shape in table.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = dict(dtype="F16", shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    numbers = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".part"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, shape in table.items():
            count = math.prod(shape)
            if len(shape) < 2:
                tensor = torch.full((count,), float("bias" not in key))
            else:
                scale = 0.02 if "embedding" in key else math.prod(shape[1:]) ** -0.5
                tensor = scale * numbers.repeat(-(-count // len(numbers)))[:count]
            file.write(tensor.half().numpy().tobytes())
    path.with_suffix(".part").rename(path)


class Anonymous(threading.Thread):
    """The most anonymous memory of this process, GiB, looked up twenty times a second (Linux)."""

    peak = 0.0

    def __init__(self):
        super().__init__(daemon=True)

    def run(self):
        while True:
            status = Path("/proc/self/status").read_text()
            now = int(status.partition("RssAnon:")[2].split()[0]) / 2**20
            self.peak = max(self.peak, now)
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=Path(tempfile.gettempdir(), "sdxl-random"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=textinv.PRECISIONS, default="bf16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    file = args.file.with_suffix(".safetensors")
    if not file.exists():
        write_random(file)
    memory, start = Anonymous(), time.time()
    memory.start()
    model = textinv.load_model(file, args.device, textinv.PRECISIONS[args.precision])
    model.size = args.size
    print(f"{model}; loaded in {time.time() - start:.1f} s, RssAnon at most {memory.peak:.1f} GiB")
    image, start = Image.radial_gradient("L").convert("RGB"), time.time()
    options = dict(gradient_checkpointing=True, batch_size=1, steps=args.steps)
    for state in textinv.train(model, [image], "cat", **options):
        seconds, start = time.time() - start, time.time()
        print(
            f"step {state.step}: {seconds:.1f} s (the first encodes the picture), loss "
            f"{state.loss.item():.3f}, RssAnon at most {memory.peak:.1f} GiB"
        )


if __name__ == "__main__":
    main()
