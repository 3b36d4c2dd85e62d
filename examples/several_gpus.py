"""Learn a word, or sample, on several GPUs: one process for each, started by torchrun.

    torchrun --nproc-per-node 2 examples/several_gpus.py invert cat/ --init-word cat
    torchrun --nproc-per-node 2 examples/several_gpus.py sample "a <cat>" "a sketch of a <cat>" \\
        --concept cat.safetensors

Every process draws the same random numbers. When training, each computes its rows of every batch,
and the gradients are summed before the step, so the word is that of one process with the same
batch, up to rounding. When sampling, the prompts are dealt out. Only the first process prints and
writes. Ctrl-C, in any process, saves the word so far. A run cannot be resumed and writes neither
table nor previews; `textinv.py invert`, in one process, does.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import repository  # noqa: F401
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import textinv
from models.files import free_target, write_png
from models.images import find_images, grid
from models.runs import interruptible

MODEL = " seed overwrite model " + textinv.LOADING
INVERT = "images init_word placeholder word_out vectors training_steps batch_size lr stop templates"
INVERT += " weight_decay regularize progressive per_image no_flip masked"
INVERT += " gradient_checkpointing save_every"
SAMPLE = "texts prompts negative concept rename n sampler steps guidance grid_out"


@contextmanager
def joined(device: str | None) -> Iterator[tuple[int, int]]:
    """Join the other processes and yield this one's rank and their number. Each takes the GPU of
    its LOCAL_RANK, unless another device is asked for."""
    if "WORLD_SIZE" not in os.environ:
        raise ValueError("start this by torchrun --nproc-per-node N examples/several_gpus.py ...")
    use_gpus = torch.cuda.is_available() and device in (None, "cuda")
    if use_gpus:
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"{count} GPU(s) here; use --nproc-per-node {count} or --device cpu")
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpus else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def sum_over_processes(loss: Tensor, gradients: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, for `textinv.train`."""
    for tensor in (loss, *gradients):
        dist.all_reduce(tensor)


def any_process(flag: bool) -> bool:
    """Return whether the flag is true in any process."""
    count = torch.tensor(float(flag))
    dist.all_reduce(count)
    return bool(count)


def invert(args: argparse.Namespace, rank: int, world: int) -> int:
    """Learn a word and write it, every --save-every steps and at the end. Return the exit status:
    130 after Ctrl-C."""
    out, placeholder = textinv.target_of(args)
    free_target(out, args.overwrite)
    textinv.check_range(1, save_every=args.save_every)
    images = find_images(args.images)
    templates = textinv.read_templates(args.templates, images, placeholder)
    textinv.training_options(args, None, templates)  # raises for unusable numbers, before loading
    model = textinv.load_for(args)
    options = textinv.training_options(args, model, templates) | dict(placeholder=placeholder)
    if options["batch_size"] < world:
        raise ValueError(
            f"a batch of {options['batch_size']} is too small to split among {world} processes; "
            f"use --batch-size {world} or more"
        )
    options |= dict(gradient_checkpointing=args.gradient_checkpointing)
    options |= dict(share=slice(rank, None, world), on_gradients=sum_over_processes)
    states = textinv.train(model, images, **options)
    dist.barrier()  # every process has looked at `out`; now the first may write it
    steps = options["steps"]
    print(f"learning {placeholder}, {steps} steps on {world} processes, to {out}")
    with interruptible() as asked, tqdm(states, total=steps, unit="step") as progress:
        for state in progress:
            progress.set_postfix(loss=f"{state.loss.item():.4f}")
            stopped = any_process(bool(asked))
            if rank == 0 and state.step % args.save_every == 0:
                state.concept.save(out, overwrite=True)
            if stopped:
                break
    if rank == 0:
        state.concept.save(out, overwrite=True)
    print(f"{'stopped' if stopped else 'done'} after {state.step} steps; wrote {out}")
    return 130 if stopped else 0


def sample(args: argparse.Namespace, rank: int, world: int) -> None:
    """Sample the prompts, each in one process, and write them as one grid."""
    out = free_target(args.out, args.overwrite, ".png")
    if not (prompts := args.texts + args.prompts):
        raise ValueError("no prompt given; give PROMPT in quotes, or --prompts FILE")
    concepts = textinv.words_for(args, [*prompts, args.negative])
    model = textinv.load_for(args)
    _, steps, title = textinv.check_sampling(args.sampler, args.steps, args.n, 0, args.seed)
    settings = dict(n=args.n, sampler=args.sampler, steps=steps, seed=args.seed)
    settings |= dict(size=(model.size, model.size), negative=args.negative)
    settings |= dict(guidance_scale=textinv.guidance_of(model, args.guidance))
    print(f"drawing {len(prompts)} prompt(s) x {args.n} on {world} processes, to {out}")
    mine = prompts[rank::world]
    drawn = [textinv.sample(model, prompt, concepts, **settings) for prompt in mine]
    shares: list[list] = [[] for _ in range(world)]
    dist.all_gather_object(shares, drawn)
    rows = [shares[i % world][i // world] for i in range(len(prompts))]
    if rank == 0:
        pictures = [picture for row in rows for picture in row]
        settings |= dict(
            title=title, model=model.name, model_hash=model.short_hash, clip_skip=model.clip_skip
        )
        text = {"prompt": "\n".join(prompts), "settings": settings}
        write_png(out, grid(pictures, args.n if len(rows) > 1 else None), text, args.overwrite)
    print(f"wrote {out}")


def run(args: argparse.Namespace) -> int:
    """Do one process's part. A user's mistake is found by all processes, and the first says it."""
    with joined(args.device) as (rank, world):
        if rank == 0:
            return args.work(args, rank, world) or 0
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            try:
                return args.work(args, rank, world) or 0
            except (ValueError, OSError):
                return 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = textinv.Parser(prog="several_gpus.py", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    for verb, work, names in (("invert", invert, INVERT), ("sample", sample, SAMPLE)):
        p = verbs.add_parser(verb, help=work.__doc__.splitlines()[0])
        textinv.add_options(p, names + MODEL)
        p.set_defaults(work=work)
    return textinv.exit_status(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
