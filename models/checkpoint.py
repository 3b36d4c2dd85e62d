"""Public checkpoints to models: reading files safely, finding the family, naming, strict loading.

A file is opened as a table of `Stored` tensors: names and shapes at once, data only on demand and
straight into the wanted precision, so the peak of memory is the model itself plus one tensor.
Nothing in a file can run: pickles go through `RestrictedUnpickler`, and weights are only ever
copied into modules that were built from their shapes.

Our modules carry the CompVis key names, so single files load unrenamed; the diffusers layout and
open_clip's text encoder are renamed by the tables below, on whole dotted segments.
"""

import hashlib
import json
import math
import mmap
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path

import torch
from torch import Tensor, nn

from . import tokenizers
from .autoencoder import Autoencoder, AutoencoderConfig
from .bert import BertConfig, BertTextEncoder
from .clip import CLIP, CLIPConfig, CLIPTextEncoder, TextConfig, VisionConfig
from .latent_diffusion import SCALE_FACTOR, LatentDiffusion
from .schedule import Schedule
from .unet import UNet, UNetConfig

BUNDLED = Path(__file__).parent / "emoji"
BERT_VOCAB = Path(__file__).parent / "vocab" / "bert-base-uncased.txt"
BETAS = (0.00085, 0.012)  # LDM text2img-large and Stable Diffusion alike
ZIP = b"PK\x03\x04"  # how files of torch.save begin
FAMILIES = ("ldm", "sd1", "sd2")
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


# -------------------------------------------------------------------------------- reading files


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


State = dict[str, Stored]


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


def open_safetensors(path: Path) -> State:
    """The tensors of a .safetensors file: 8 bytes of length, a JSON header, then the data."""
    file = MappedFile(path)
    size = int.from_bytes(file.map[:8], "little")
    header = json.loads(file.map[8 : 8 + size])
    header.pop("__metadata__", None)
    state: State = {}
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


def scripted(module: Stub) -> State:
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


def open_state(path: Path) -> State:
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


# --------------------------------------------------------------------------------------- naming


def part(state: State, prefix: str) -> State:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def rename(key: str, table: Mapping[str, str]) -> str:
    """The key with every run of whole dotted segments that the table knows replaced, in order."""
    dotted = f".{key}."
    for old, new in table.items():
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_NAMES = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # diffusers before 0.15, and so every published Stable Diffusion folder
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
# open_clip's and OpenAI's names to those of `transformers`
CLIP_NAMES = {
    "resblocks": "layers",
    "transformer": "encoder",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
    "class_embedding": "embeddings.class_embedding",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}


def unet_from_diffusers(state: State) -> State:
    """CompVis counts all blocks of one way in a row; diffusers counts by level and kind."""
    blocks = count(state, r"down_blocks\.0\.resnets\.(\d+)\.")

    def name(key: str) -> str:
        match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key)
        if not match:
            key = rename(key, UNET_OUTSIDE)
            return rename(key, UNET_RESNET) if re.match(r"middle_block\.[02]\.", key) else key
        way, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if way == "down":
            first, side = 1 + level * (blocks + 1), "input_blocks"
        else:
            first, side = level * (blocks + 1), "output_blocks"
        if kind == "resnets":
            return f"{side}.{first + index}.0.{rename(rest, UNET_RESNET)}"
        if kind == "attentions":
            return f"{side}.{first + index}.1.{rest}"
        if kind == "downsamplers":
            return f"{side}.{first + blocks}.0.{rename(rest, {'conv': 'op'})}"
        attended = f"up_blocks.{level}.attentions.0.norm.weight" in state
        return f"{side}.{first + blocks}.{2 if attended else 1}.{rest}"

    return {name(k): v for k, v in state.items()}


def autoencoder_from_diffusers(state: State) -> State:
    """The decoder's levels are counted from the other end; 1x1 convolutions come as matrices."""
    levels = count(state, r"decoder\.up_blocks\.(\d+)\.")

    def level(match: re.Match) -> str:
        number = int(match[2])
        return f"{match[1]}.{number if match[1] == 'down' else levels - 1 - number}."

    def name(key: str) -> str:
        return rename(re.sub(r"(down|up)_blocks\.(\d+)\.", level, key), VAE_NAMES)

    renamed = {name(k): v for k, v in state.items()}
    return {
        k: v.reshape(*v.shape, 1, 1) if ".attn_1." in k and len(v.shape) == 2 else v
        for k, v in renamed.items()
    }


def clip_from_openai(state: State) -> State:
    """open_clip's or OpenAI's names of one tower; the stacked in_proj is cut into q, k and v."""
    renamed: State = {}
    for key, tensor in state.items():
        key = rename(key, CLIP_NAMES)
        if match := re.fullmatch(r"(.+\.self_attn)\.in_proj_(weight|bias)", key):
            for letter, third in zip("qkv", tensor.thirds()):
                renamed[f"{match[1]}.{letter}_proj.{match[2]}"] = third
        else:
            renamed[key] = tensor
    return renamed


def text_from_transformers(state: State) -> State:
    """CLIP's text tower under `text_model.`, which some files leave out; no position_ids."""
    return {
        "text_model." + k.removeprefix("text_model."): v
        for k, v in state.items()
        if not k.endswith("position_ids")
    }


def text_from_open_clip(state: State) -> State:
    """SD 2's text encoder. Its last block is left out: the model takes the one before."""
    unused = ("text_projection", "logit_scale")
    tower = {k: v for k, v in state.items() if k not in unused and not k.endswith("attn_mask")}
    last = count(tower, r"transformer\.resblocks\.(\d+)\.") - 1
    tower = {k: v for k, v in tower.items() if f".resblocks.{last}." not in k}
    return text_from_transformers(clip_from_openai(tower))


# ------------------------------------------------------------------------- sizes from the shapes


def count(keys: Iterable[str], pattern: str) -> int:
    """How many different numbers the pattern's group matches."""
    return len({m[1] for k in keys if (m := re.match(pattern, k))})


def unet_config(state: State, **known) -> UNetConfig:
    """Sizes of a UNet; `known` are the heads and the groups, which shapes do not tell."""
    levels: list[list[int]] = [[]]
    attention = set()
    for i in range(1, count(state, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in state:
            levels.append([])
            continue
        levels[-1].append(state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0])
        if f"input_blocks.{i}.1.proj_in.weight" in state:
            attention.add(len(levels) - 1)
    middle = "middle_block.1.transformer_blocks"
    return UNetConfig(
        widths=tuple(level[0] for level in levels),
        num_res_blocks=len(levels[0]),
        attention_levels=tuple(sorted(attention)),
        depth=count(state, middle.replace(".", r"\.") + r"\.(\d+)\."),
        context_dim=state[f"{middle}.0.attn2.to_k.weight"].shape[1],
        channels=state["input_blocks.0.0.weight"].shape[1],
        linear_projection=len(state["middle_block.1.proj_in.weight"].shape) == 2,
        **known,
    )


def autoencoder_config(state: State, **known) -> AutoencoderConfig:
    levels = range(count(state, r"encoder\.down\.(\d+)\."))
    return AutoencoderConfig(
        widths=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels),
        num_res_blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        z_channels=state["post_quant_conv.weight"].shape[0],
        **known,
    )


def bert_config(state: State) -> BertConfig:
    vocab_size, width = state["transformer.token_emb.weight"].shape
    return BertConfig(
        width=width,
        layers=count(state, r"transformer\.attn_layers\.layers\.(\d+)\.") // 2,
        vocab_size=vocab_size,
        max_length=state["transformer.pos_emb.emb.weight"].shape[0],
    )


def text_config(state: State, heads: int | None, quick_gelu: bool) -> TextConfig:
    """`heads` None: 64 channels each, as in every published CLIP."""
    vocab_size, width = state["text_model.embeddings.token_embedding.weight"].shape
    return TextConfig(
        width=width,
        layers=count(state, r"text_model\.encoder\.layers\.(\d+)\."),
        heads=heads or max(1, width // 64),
        quick_gelu=quick_gelu,
        vocab_size=vocab_size,
        max_length=state["text_model.embeddings.position_embedding.weight"].shape[0],
    )


# -------------------------------------------------------------------------------------- loading


def check_heads(path: Path, width: int, heads: int | None) -> None:
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(f"{path}: {heads!r} attention heads do not divide {width} channels")


def fill(build: Callable[[], nn.Module], state: State, dtype, device, path: Path) -> nn.Module:
    """The module built without memory, then given the file's tensors; every key must match."""
    with torch.device("meta"):
        module = build()
    wanted = module.state_dict()
    missing, left = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [k for k in wanted if k in state and state[k].shape != tuple(wanted[k].shape)]
    if missing or left or wrong:
        raise CheckpointError(
            f"{path}: not the expected {type(module).__name__}: {len(missing)} keys missing "
            f"({some(missing)}), {len(left)} not expected ({some(left)}), {len(wrong)} of another "
            f"shape ({some(wrong)})"
        )
    module.load_state_dict(
        {k: state[k].read(dtype).to(device) for k in wanted}, strict=True, assign=True
    )
    return module.eval()


@dataclass
class Parts:
    """A checkpoint taken apart: the three networks under our names, and what was said beside."""

    path: Path
    family: str
    unet: State
    autoencoder: State
    text: State
    prediction: str | None = None
    betas: tuple[float, float] = BETAS
    heads: int | None = None
    head_width: int | None = None
    text_heads: int | None = None
    unet_groups: int = 32
    autoencoder_groups: int = 32
    vocabulary: Path | None = None
    special: tuple[str, str] = tokenizers.OPENAI_SPECIAL
    name: str = ""
    size: int | None = None


def find_family(state: State, path: Path) -> str:
    keys = {
        "ldm": "cond_stage_model.transformer.token_emb.weight",
        "sd2": "cond_stage_model.model.token_embedding.weight",
    }
    for family, key in keys.items():
        if key in state:
            return family
    if any(k.startswith("cond_stage_model.transformer.") for k in state):
        return "sd1"
    if any(k.startswith("conditioner.embedders.") for k in state):
        raise CheckpointError(f"{path}: Stable Diffusion XL is not supported; {EXPECTED}")
    raise CheckpointError(f"{path}: not a text-to-image model, found {some(state)}; {EXPECTED}")


def holds_model(path: Path) -> bool:
    """Whether a file is a checkpoint of a text-to-image model, supported or not."""
    try:
        return any(key.startswith("model.diffusion_model.") for key in open_state(path))
    except CheckpointError:
        return False


def stored_precision(path: Path, family: str | None) -> str:
    """The kind of numbers that a model's UNet is stored in: "float16"."""
    with checking(path):
        return str(take_apart(path, family).unet["out.2.weight"].read(None).dtype)[len("torch.") :]


def settings_beside(path: Path) -> dict[str, str]:
    """Plain `key: value` lines of the original configuration beside a file, where there is one:
    model.yaml beside model.ckpt, or config.yaml."""
    for name in (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        if name.is_file():
            text = name.read_text(errors="replace")
            lines = re.findall(r"^\s*(\w+):[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
            return dict(reversed(lines))  # the first of equal keys counts
    return {}


def from_single_file(path: Path, family: str | None) -> Parts:
    """LDM's or Stable Diffusion's own layout. EMA copies (`model_ema.`), the schedule's buffers
    and training leftovers are passed over, as in the original inference configuration."""
    state = open_state(path)
    family = family or find_family(state, path)
    beside = settings_beside(path)
    text = part(state, "cond_stage_model.")
    if family == "ldm":
        text = {k: v for k, v in text.items() if ".to_logits." not in k}
    elif family == "sd1":
        text = text_from_transformers(part(text, "transformer."))
    else:
        text = text_from_open_clip(part(text, "model."))
    number = {k: int(v) for k, v in beside.items() if v.isdigit()}
    autoencoder = part(state, "first_stage_model.")
    vocabulary = path.with_name("vocab.txt")
    return Parts(
        path,
        family,
        unet=part(state, "model.diffusion_model."),
        autoencoder={k: v for k, v in autoencoder.items() if not k.startswith("loss.")},
        text=text,
        prediction=beside.get("parameterization"),
        heads=number.get("num_heads"),
        head_width=number.get("num_head_channels"),
        text_heads=number.get("num_attention_heads") or number.get("heads"),
        vocabulary=vocabulary if family == "ldm" and vocabulary.is_file() else None,
        special=tokenizers.OPEN_CLIP_SPECIAL if family == "sd2" else tokenizers.OPENAI_SPECIAL,
        name=path.name,
    )


def read_json(path: Path) -> dict:
    with checking(path):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def component(folder: Path) -> tuple[State, dict]:
    """Weights and config.json of one subfolder of the diffusers layout, fp16 variants included."""
    names = ("diffusion_pytorch_model", "model", "pytorch_model")
    endings = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    for name in (n + e for e in endings for n in names):
        if (folder / name).is_file():
            return open_state(folder / name), read_json(folder / "config.json")
    raise CheckpointError(
        f"{folder}: no weights there, found {some(sorted(p.name for p in folder.glob('*')))}; "
        f"expected {names[0]}.safetensors or the like, as diffusers writes it"
    )


def from_diffusers(path: Path, family: str | None) -> Parts:
    if (path / "text_encoder_2").exists():
        raise CheckpointError(f"{path}: Stable Diffusion XL is not supported; {EXPECTED}")
    unet, config = component(path / "unet")
    autoencoder, autoencoder_settings = component(path / "vae")
    text, text_settings = component(path / "text_encoder")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    unet = unet_from_diffusers(unet)
    if not family:
        linear = len(unet["middle_block.1.proj_in.weight"].shape) == 2
        family = "sd2" if linear else "sd1"
    # Trap: diffusers calls the number of heads `attention_head_dim`, one for all levels or a list.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    by_width = isinstance(heads, list)
    kind = scheduler.get("prediction_type")
    usual = dict(beta_schedule="scaled_linear", num_train_timesteps=1000)
    usual |= dict(scaling_factor=SCALE_FACTOR)
    for key, value in usual.items():
        told = (scheduler | autoencoder_settings).get(key, value)
        if told != value:
            warnings.warn(f"{path}: {key} {told} is not supported, {value} is taken instead")
    merges = path / "tokenizer" / "merges.txt"
    return Parts(
        path,
        family,
        unet,
        autoencoder_from_diffusers(autoencoder),
        text_from_transformers(text),
        prediction={"epsilon": "eps", "v_prediction": "v"}.get(kind, kind),
        betas=(scheduler.get("beta_start", BETAS[0]), scheduler.get("beta_end", BETAS[1])),
        heads=None if by_width else heads,
        head_width=unet["input_blocks.0.0.weight"].shape[0] // heads[0] if by_width else None,
        text_heads=text_settings.get("num_attention_heads"),
        unet_groups=config.get("norm_num_groups", 32),
        autoencoder_groups=autoencoder_settings.get("norm_num_groups", 32),
        vocabulary=merges if merges.is_file() else None,
        name=path.name,
    )


def take_apart(path: Path, family: str | None) -> Parts:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; {EXPECTED}")
    if path.is_file():
        return from_single_file(path, family)
    if (path / "unet").is_dir():
        return from_diffusers(path, family)
    settings = read_json(path / "config.json")
    if "norm_groups" not in settings:
        raise CheckpointError(f"{path}: found {contents(path)}; {EXPECTED}")
    parts = from_single_file(path / "model.safetensors", "ldm")
    parts.unet_groups, parts.autoencoder_groups = settings["norm_groups"]
    parts.heads, parts.prediction = settings["heads"], settings["prediction"]
    parts.name, parts.size = settings["name"], settings["size"]
    return parts


def load_tokenizer(parts: Parts, vocab_size: int, max_length: int) -> tokenizers.Tokenizer:
    if parts.family == "ldm":
        tokenizer: tokenizers.Tokenizer = tokenizers.WordPieceTokenizer.load(
            parts.vocabulary or BERT_VOCAB, max_length
        )
    else:
        pad_id = 0 if parts.family == "sd2" else None
        tokenizer = tokenizers.CLIPTokenizer.load(
            parts.vocabulary, max_length, pad_id, vocab_size, parts.special
        )
    if tokenizer.vocab_size != vocab_size:
        raise CheckpointError(
            f"{parts.path}: its text encoder knows {vocab_size} tokens, its vocabulary has "
            f"{tokenizer.vocab_size}; put the vocab.txt it was trained with beside it"
        )
    return tokenizer


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, the best there is for None; ValueError if it is not here."""
    try:
        device = best_device() if name is None else torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not known; use cuda, mps or cpu") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if (device.index or 0) >= here.get(device.type, 0):
        raise ValueError(
            f"no device {device} here; use --device cpu, or install a torch that supports it"
        )
    return device


def best_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def measure_prediction(model: LatentDiffusion) -> str:
    """Tell an eps-model from a v-model by asking it (SD 2's two kinds have the same keys).

    At the last timestep x_t is nearly all noise: an eps-model returns it, a v-model about -x_0.
    """
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, model.unet.config.channels, 32, 32, generator=generator)
    t = torch.tensor([model.schedule.length - 1], device=model.device)
    with torch.no_grad():
        prediction = model.unet(x_t.to(model.device), t, model.encode_text([""])).float().cpu()
    correlation = torch.corrcoef(torch.stack([x_t.flatten(), prediction.flatten()]))[0, 1]
    return "eps" if correlation > 0.5 else "v"


def load_model(
    path: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    prediction: str | None = None,
) -> LatentDiffusion:
    """A text-to-image model from a public checkpoint, frozen, ready to invert and sample.

    path: a single file (.ckpt, .safetensors), a folder in the diffusers layout, or None for the
    bundled model. device, dtype: the best there are unless given; the text encoder stays in
    float32 whatever `dtype` is. family ("ldm", "sd1", "sd2") and prediction ("eps", "v") override
    what the file says. Raises `CheckpointError`, a ValueError, for anything but such a file.
    """
    if family not in (None, *FAMILIES):
        raise ValueError(f"family {family!r} is not known; use {', '.join(FAMILIES)}")
    if prediction not in (None, "eps", "v"):
        raise ValueError(f"prediction {prediction!r} is not known; use eps or v")
    path = Path(path) if path is not None else BUNDLED
    device = find_device(device)
    dtype = dtype or best_dtype(device)
    with checking(path):
        return assemble(take_apart(path, family), device, dtype, prediction)


def assemble(parts: Parts, device, dtype, prediction: str | None) -> LatentDiffusion:
    heads, head_width = parts.heads, parts.head_width
    if not heads and not head_width:
        heads, head_width = (None, 64) if parts.family == "sd2" else (8, None)
    unet = unet_config(
        parts.unet, heads=heads, head_width=head_width, norm_groups=parts.unet_groups
    )
    for width in unet.widths:
        check_heads(parts.path, width, unet.heads_for(width))
    autoencoder = autoencoder_config(parts.autoencoder, norm_groups=parts.autoencoder_groups)
    if unet.channels != autoencoder.z_channels:
        raise CheckpointError(
            f"{parts.path}: its UNet takes {unet.channels} channels, its latents have "
            f"{autoencoder.z_channels}; inpainting, depth and upscaling models are not supported"
        )
    path, float32 = parts.path, torch.float32
    if parts.family == "ldm":
        text = bert_config(parts.text)
        encoder = fill(lambda: BertTextEncoder(text), parts.text, float32, device, path)
    else:
        text = text_config(parts.text, parts.text_heads, quick_gelu=parts.family == "sd1")
        check_heads(path, text.width, text.heads)
        encoder = fill(lambda: CLIPTextEncoder(text), parts.text, float32, device, path)
    model = LatentDiffusion(
        unet=fill(lambda: UNet(unet), parts.unet, dtype, device, path),
        autoencoder=fill(lambda: Autoencoder(autoencoder), parts.autoencoder, dtype, device, path),
        text_encoder=encoder,
        tokenizer=load_tokenizer(parts, text.vocab_size, text.max_length),
        schedule=Schedule(*parts.betas, prediction or parts.prediction or "eps"),
        family=parts.family,
        name=parts.name,
        fingerprint=fingerprint(parts.unet["out.2.weight"]),
    )
    if parts.family == "sd2" and not (prediction or parts.prediction):
        model.schedule = Schedule(*parts.betas, measure_prediction(model))
    sizes = {"ldm": 256, "sd1": 512, "sd2": 768 if model.schedule.prediction == "v" else 512}
    model.size = parts.size or sizes[parts.family]
    return model


def fingerprint(weights: Stored) -> str:
    """16 hexadecimal digits that name a base model, equal for its fp16 and fp32 files."""
    return hashlib.sha256(weights.read(torch.float16).numpy().tobytes()).hexdigest()[:16]


CLIP_EXPECTED = (
    "expected a CLIP with both towers: OpenAI's .pt, its state_dict, or a file or folder in the "
    "layout of transformers"
)


def load_clip(path: str | Path | None = None) -> CLIP:
    """CLIP with both towers (the paper measures with OpenAI's ViT-B/32), float32, on the CPU.

    path: OpenAI's published .pt, a TorchScript archive of which only the tensors are read; its
    state_dict; model.safetensors of the layout of `transformers`, or the folder it is in, with the
    config.json beside it; None for the bundled one. Raises `CheckpointError`, a ValueError, for
    anything else.
    """
    path = Path(path) if path is not None else BUNDLED / "clip.safetensors"
    try:
        with checking(path):
            folder = (path / "config.json").is_file()
            return assemble_clip(component(path)[0] if folder else open_state(path), path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(EXPECTED, CLIP_EXPECTED)) from error


def towers_from_openai(state: State) -> State:
    """OpenAI's layout in the names of `transformers`. Its two projections multiply from the right;
    the .pt has three sizes as scalars, and a traced module keeps its mask beside its weights."""
    unused = ("input_resolution", "context_length", "vocab_size")
    state = {k: v for k, v in state.items() if k not in unused and not k.endswith("attn_mask")}
    visual = part(state, "visual.")
    text = {k: v for k, v in state.items() if not k.startswith("visual.")}
    projections = {
        "visual_projection.weight": visual.pop("proj").transpose(),
        "text_projection.weight": text.pop("text_projection").transpose(),
        "logit_scale": text.pop("logit_scale"),
    }
    towers = (("text_model", text), ("vision_model", visual))
    return projections | {
        f"{name}.{k}": v for name, tower in towers for k, v in clip_from_openai(tower).items()
    }


def assemble_clip(state: State, path: Path) -> CLIP:
    """Sizes come from the shapes. The heads (64 channels each) and QuickGELU are OpenAI's unless a
    config.json in the layout of `transformers` says otherwise, as LAION's do."""
    text_settings, vision_settings = {}, {}
    if "visual.conv1.weight" in state:
        state = towers_from_openai(state)
    else:
        settings = read_json((path if path.is_dir() else path.parent) / "config.json")
        text_settings = settings.get("text_config") or {}
        vision_settings = settings.get("vision_config") or {}
    for key in ("visual_projection.weight", "text_projection.weight"):
        if key not in state:
            raise CheckpointError(f"{path}: has no {key}, found {some(state)}; {CLIP_EXPECTED}")
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    patches = state["vision_model.embeddings.patch_embedding.weight"].shape
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    config = CLIPConfig(
        text=text_config(state, text_settings.get("num_attention_heads"), quick(text_settings)),
        vision=VisionConfig(
            width=patches[0],
            layers=count(state, r"vision_model\.encoder\.layers\.(\d+)\."),
            heads=vision_settings.get("num_attention_heads") or max(1, patches[0] // 64),
            quick_gelu=quick(vision_settings),
            patch_size=patches[2],
            image_size=math.isqrt(positions - 1) * patches[2],
        ),
        width=state["text_projection.weight"].shape[0],
    )
    for tower in (config.text, config.vision):
        check_heads(path, tower.width, tower.heads)
    return fill(lambda: CLIP(config), state, torch.float32, "cpu", path)


def quick(settings: dict) -> bool:
    """Whether a tower of CLIP has OpenAI's approximation of GELU, or the exact one."""
    return settings.get("hidden_act", "quick_gelu") == "quick_gelu"
