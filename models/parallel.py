"""More than one process, started by torchrun: who does what, and how the results meet.

    torchrun --nproc-per-node 2 textinv.py invert ...

Every process draws the same random numbers and works on its share. Without torchrun there is one
process, whose share is everything.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def processes(device: str | None = None) -> Iterator[int]:
    """Join the processes that torchrun has started, if it has; yields this one's number. Unless
    another device is asked for, each takes the GPU of its number on its machine; ValueError if
    there are not as many."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    gpu = torch.cuda.is_available() and device in (None, "cuda")
    if gpu:
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"{count} GPU(s) here; say --nproc-per-node {count}, or --device cpu")
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def add_up(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over all processes, in place."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def any_of_them(flag: bool) -> bool:
    """Whether the flag is true in any process; all must ask."""
    told = torch.tensor(float(flag))
    add_up([told])
    return bool(told)


def wait_for_all() -> None:
    if rank_and_world()[1] > 1:
        dist.barrier()


def shared_out(items: Sequence, work: Callable) -> Iterator:
    """work(item) of every item, in order, the items dealt out to the processes like cards; every
    process gets all results."""
    rank, world = rank_and_world()
    if world == 1:
        yield from map(work, items)
        return
    hands: list[list] = [[] for _ in range(world)]
    dist.all_gather_object(hands, [work(item) for item in items[rank::world]])
    for i in range(len(items)):
        yield hands[i % world][i // world]
