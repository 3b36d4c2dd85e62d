"""Tensors out of files: .safetensors, and what torch.save writes, without running anything.

A file is opened as a table of `Stored` tensors: names and shapes at once, data only on demand and
straight into the wanted precision, so the peak of memory is the model itself plus one tensor.
Pickles go through `RestrictedUnpickler`, which imports nothing and admits containers and tensors.
"""

import json
import math
import mmap
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path

import torch
from torch import Tensor

ZIP = b"PK\x03\x04"  # how files of torch.save begin
EXPECTED = (
    "expected an LDM or Stable Diffusion 1/2 checkpoint (.ckpt or .safetensors), or a folder in "
    "the diffusers layout"
)


class CheckpointError(ValueError):
    """A file that is not what it should be; one line that says what was expected and found.

    Key names come from the file, so what is no printable character (line breaks, terminal
    escapes) becomes "?".
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


def some(names: Iterable[str]) -> str:
    """The first names of many, for an error message."""
    names = list(names)
    shown = ", ".join(name[:80] for name in names[:3])
    return shown + ", ..." * (len(names) > 3) if names else "nothing"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; PyTorch says so in a plain RuntimeError on the CPU, and on a GPU
    where a library of NVIDIA's found out."""
    said = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or re.search(said, str(error)) is not None


@contextmanager
def checking(path: Path):
    """Turns whatever a damaged or foreign file makes the code below stumble over (nearly any
    exception: parsers and shape arithmetic trust their input) into one line about that file."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; {EXPECTED}") from error
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path}: damaged or foreign, found {contents(path)} ({reason[:200]}); {EXPECTED}"
        ) from error


def contents(path: Path) -> str:
    """What a file that did not load looks like: the usual accidents are a truncated download, a
    web page and a git-lfs pointer."""
    if path.is_dir():
        return "a folder with " + some(sorted(p.name for p in path.iterdir()))
    with open(path, "rb") as file:
        start = file.read(40)
    line = start.decode("utf-8", "replace").splitlines()[:1]
    if not start or start.startswith(ZIP):
        kind = "a zip archive" if start else "an empty file"
    else:
        kind = f"the text {line[0]!r}" if line[0].isprintable() else "binary data"
    return f"{kind}, {path.stat().st_size:,} bytes"


@dataclass(frozen=True)
class Stored:
    """A tensor that still lies in its file. `read(dtype)` copies it out (None: as stored)."""

    shape: tuple[int, ...]
    read: Callable[[torch.dtype | None], Tensor]

    def thirds(self) -> list["Stored"]:
        """The three parts along the first dimension: q, k and v of a stacked projection."""
        size = self.shape[0] // 3
        return [
            Stored(
                (size, *self.shape[1:]),
                lambda dtype, i=i: self.read(dtype)[i * size :][:size].clone(),  # else all stays
            )
            for i in range(3)
        ]

    def reshape(self, *shape: int) -> "Stored":
        return Stored(shape, lambda dtype: self.read(dtype).reshape(shape))

    def transpose(self) -> "Stored":
        return Stored(self.shape[::-1], lambda dtype: self.read(dtype).T.contiguous())


Tensors = dict[str, Stored]


class MappedFile:
    """A file mapped into memory, whose pages are given back as soon as they have been copied."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read(self, start: int, count: int, stored: torch.dtype) -> Tensor:
        """A flat view of `count` numbers; copy it, then `release`."""
        if count == 0:
            return torch.empty(0, dtype=stored)
        return torch.frombuffer(self.map, dtype=stored, count=count, offset=start)

    def release(self, start: int, size: int) -> None:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED, first, start + size - first)


def stored_in(file: MappedFile, start: int, count: int, dtype: torch.dtype, view) -> Callable:
    """The `read` of a tensor whose storage of `count` numbers begins at `start`."""

    def read(wanted: torch.dtype | None) -> Tensor:
        tensor = view(file.read(start, count, dtype))
        tensor = tensor.to(wanted or dtype, copy=True, memory_format=torch.contiguous_format)
        file.release(start, count * dtype.itemsize)
        return tensor

    return read


# Kinds of numbers: in a .safetensors header, as a storage of torch.save, here.
NUMBERS = (
    ("F64", "DoubleStorage", torch.float64),
    ("F32", "FloatStorage", torch.float32),
    ("F16", "HalfStorage", torch.float16),
    ("BF16", "BFloat16Storage", torch.bfloat16),
    ("I64", "LongStorage", torch.int64),
    ("I32", "IntStorage", torch.int32),
    ("I16", "ShortStorage", torch.int16),
    ("I8", "CharStorage", torch.int8),
    ("U8", "ByteStorage", torch.uint8),
    ("BOOL", "BoolStorage", torch.bool),
)
SAFETENSORS_DTYPES = {name: dtype for name, _, dtype in NUMBERS}


def open_safetensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file: 8 bytes of length, a JSON header, then the data."""
    file = MappedFile(path)
    size = int.from_bytes(file.map[:8], "little")
    header = json.loads(file.map[8 : 8 + size])
    header.pop("__metadata__", None)
    state: Tensors = {}
    free = 8 + size  # where the next tensor may begin
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: numbers of type {entry['dtype']} are not supported")
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        n = math.prod(shape)
        damaged = begin < free or end - begin != n * dtype.itemsize or min(shape, default=0) < 0
        if damaged or end > len(file.map):
            raise CheckpointError(
                f"{path}: truncated or damaged, expected tensor {name[:80]!r} at bytes "
                f"{begin:,} to {end:,}, found {len(file.map):,} bytes in all"
            )
        free = end
        view = methodcaller("reshape", shape)
        state[name] = Stored(shape, stored_in(file, begin, n, dtype, view))
    return state


class Stub:
    """Stands for every class and function that a pickle names and that is not admitted.

    It takes any arguments and does nothing; a state given to it is kept as plain data.
    """

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    state = None

    def __setstate__(self, state):
        self.state = state

    def ignore(self, *args, **kwargs):
        return self

    append = extend = add = update = __setitem__ = __call__ = ignore


def rebuild_tensor(storage, offset, shape, stride, *_) -> Stored:
    file, start, count, dtype = storage
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    # Trap: a pickle may hold integers of thousands of digits, and arithmetic on them takes hours.
    if len(numbers) > 17 or not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers):
        raise ValueError("a tensor of impossible shape")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    inside = 0 in shape or max(math.prod(shape), last + 1) <= count
    if not inside:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its {count} numbers")

    def view(flat: Tensor) -> Tensor:
        return flat.as_strided(shape, stride, offset)

    return Stored(shape, stored_in(file, start, count, dtype, view))


ADMITTED = {
    ("collections", "OrderedDict"): lambda: OrderedDict(),  # filled later, through the checks below
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
} | {("torch", storage): dtype for _, storage, dtype in NUMBERS}


def hashing(opcode: bytes, keys: Callable[[list], list]) -> Callable:
    """The opcode's own code, after a look at what it will hash. Trap: a tuple of tuples that share
    their parts, a few bytes in a pickle, takes years to hash."""
    own_code = pickle._Unpickler.dispatch[opcode[0]]

    def load(unpickler) -> None:
        for key in keys(unpickler.stack):
            parts = key if isinstance(key, tuple) else [key]
            if any(isinstance(part, (tuple, frozenset)) for part in parts):
                raise ValueError("nested keys")
        own_code(unpickler)

    return load


def build(unpickler) -> None:
    """BUILD gives an object its state: here to stubs alone, so that nothing of ours is changed."""
    state = unpickler.stack.pop()
    if isinstance(unpickler.stack[-1], Stub):
        unpickler.stack[-1].__setstate__(state)


def refuse(unpickler) -> None:
    raise ValueError("an opcode that no checkpoint needs")


class RestrictedUnpickler(pickle._Unpickler):
    """Admits containers and tensors; every other name becomes a `Stub`, and nothing is imported.

    Tensors come out as `Stored`. Trap: the Lightning files of LDM and Stable Diffusion name
    classes of packages that are not installed, so refusing unknown names would refuse them.
    The unpickler in Python, not the one in C, where a few bytes can ask for gigabytes.
    """

    dispatch = (
        pickle._Unpickler.dispatch
        | {
            pickle.BUILD[0]: build,
            pickle.BYTEARRAY8[0]: refuse,  # allocates what it says before reading
            pickle.SETITEM[0]: hashing(pickle.SETITEM, lambda stack: stack[-2:-1]),
            pickle.SETITEMS[0]: hashing(pickle.SETITEMS, lambda stack: stack[::2]),
            pickle.DICT[0]: hashing(pickle.DICT, lambda stack: stack[::2]),
            pickle.ADDITEMS[0]: hashing(pickle.ADDITEMS, lambda stack: stack),
            pickle.FROZENSET[0]: hashing(pickle.FROZENSET, lambda stack: stack),
        }
    )

    def __init__(self, archive: "TorchArchive", data):
        super().__init__(data)
        self.archive = archive

    def find_class(self, module: str, name: str):
        return ADMITTED.get((module, name), Stub)

    def persistent_load(self, identifier):
        _, dtype, key, _, count = identifier
        if not isinstance(key, str):  # trap: to write out nested tuples can take all memory
            raise ValueError("a storage without a name")
        return self.archive.storage(key, dtype, int(count))


class TorchArchive:
    """A file written by `torch.save` since torch 1.6: a zip of data.pkl and raw storages."""

    def __init__(self, path: Path):
        self.file = MappedFile(path)
        with zipfile.ZipFile(path) as archive:
            self.entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in self.entries if name.endswith("data.pkl")]
            if len(pickles) != 1 or self.entries[pickles[0]].file_size > 1 << 28:
                raise CheckpointError(f"{path}: a zip file, but not one written by torch.save")
            self.root = pickles[0].removesuffix("data.pkl")
            with archive.open(pickles[0]) as data:
                self.content = RestrictedUnpickler(self, data).load()

    def storage(self, key: str, dtype: torch.dtype, count: int):
        info = self.entries[f"{self.root}data/{key}"]
        size = count * dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or not 0 <= size <= info.file_size:
            raise ValueError(f"storage {key} does not hold the {count} numbers it should")
        # The data begin behind the entry's local header: 30 bytes, the name and an extra field.
        lengths = self.file.map[info.header_offset + 26 : info.header_offset + 30]
        start = info.header_offset + 30
        start += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        if start + size > len(self.file.map):
            raise ValueError(f"storage {key} ends beyond the file")
        return self.file, start, count, dtype


def scripted(module: Stub) -> Tensors:
    """The tensors of a TorchScript archive, which pickles its modules: a stub for each of them,
    whose state holds its tensors and its submodules. Every module counts once, so neither a cycle
    nor a shared one keeps us busy; nothing of the archive's code is read."""
    state, rest, seen = {}, [("", module)], set()
    while rest:
        prefix, module = rest.pop()
        if id(module) not in seen:
            seen.add(id(module))
            for name, value in (module.state or {}).items():
                if isinstance(value, Stored):
                    state[f"{prefix}{name}"] = value
                elif isinstance(value, Stub):
                    rest.append((f"{prefix}{name}.", value))
    return state


def open_state(path: Path) -> Tensors:
    """The tensors of one checkpoint file, whatever its format; `CheckpointError` if it has none."""
    with checking(path):
        with open(path, "rb") as file:
            if file.read(4) != ZIP:
                return open_safetensors(path)
        content = TorchArchive(path).content
        if isinstance(content, Stub):
            content = scripted(content)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds no table of tensors; {EXPECTED}")
        return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Stored)}
