"""A device that is not here, for tests of what must work on a GPU without having one.

Inside `with elsewhere():` tensors on the device "meta" have numbers, kept on the CPU, and as on a
GPU an operation on tensors of two devices fails; as on Apple's, there is no float64. What it cannot
show: speed, memory, rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")
ops = torch.ops.aten
COPIES = {ops._to_copy.default, ops.copy_.default}
# Their indices may lie on the CPU, on a GPU too.
INDEXING = {ops.index.Tensor, ops.index_put.default, ops.index_put_.default}


class There(Tensor):
    """A tensor on that device; `here` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor):
        place = (here.stride(), here.storage_offset())
        return Tensor._make_wrapper_subclass(
            cls, here.shape, *place, dtype=here.dtype, device=THERE, requires_grad=False
        )

    def __init__(self, here: Tensor):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def run(op, args, kwargs):
    """An operation, on the numbers here; its result lies where a GPU's would."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.device == THERE and not isinstance(x, There) for x in tensors):
        raise RuntimeError(f"{op}: a tensor was made behind our back, its numbers are lost")
    beside = [x for x in args if isinstance(x, Tensor)] if op in INDEXING else tensors
    if op not in COPIES and len({isinstance(x, There) for x in beside if x.ndim}) > 1:
        raise RuntimeError(f"{op}: tensors on two devices")
    if op is ops._fused_sdp_choice.default:
        return 0  # attention by matrix products
    there = any(isinstance(x, There) for x in (args[:1] if op is ops.copy_.default else tensors))
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == THERE
        kwargs = kwargs | dict(device="cpu")
    here = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    result = op(*here[0], **here[1])
    if not there:
        return result
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
        raise TypeError(f"{op}: no float64 there")
    result = tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, result)
    return return_and_correct_aliasing(op, args, kwargs, result)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


class Lists(TorchFunctionMode):
    """x[[0, 1]], whose tensor torch makes behind our back, and x.tolist()."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        if function is Tensor.tolist:
            args = (args[0].cpu(),)
        return function(*args, **(kwargs or {}))


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    make = torch.tensor

    def tensor(data, dtype=None, device=None) -> Tensor:
        return make(data, dtype=dtype, device="cpu").to(device or "cpu")

    with Operations(), Lists(), mock.patch("torch.tensor", tensor):
        with mock.patch("models.checkpoint.find_device", lambda name: THERE):
            yield THERE
