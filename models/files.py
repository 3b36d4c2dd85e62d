"""Tensors out of files, and files that are written all or nothing.

PyTorch and safetensors do the reading: `torch.load(weights_only=True)` builds containers and
tensors and calls nothing else. Tensors are mapped: the file is read where they are used, and what
is written into them stays in memory (copy on write). So the file must not be overwritten in place
while they are in use; a rename, as `write_file` does, and a removal do not matter.
"""

import csv
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

ZIP = b"PK\x03\x04"  # how files of torch.save begin
NAME_SIZE = 255  # bytes of a file's name, which file systems allow
BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # and of torch before 1.6
EXPECTED = (
    "expected an LDM or a Stable Diffusion 1, 2 or XL checkpoint (.ckpt or .safetensors), or a "
    "folder in the diffusers layout"
)


class CheckpointError(ValueError):
    """A file that is not what it should be. One line; what a terminal would not print is "?"."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


def some(names: Iterable[str]) -> str:
    """The first names of many, for an error message."""
    names = list(names)
    shown = ", ".join(name[:80] for name in names[:3])
    return shown + ", ..." * (len(names) > 3) if names else "nothing"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On the CPU, and in NVIDIA's libraries, that is a RuntimeError."""
    said = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or re.search(said, str(error)) is not None


@contextmanager
def checking(path: Path, expected: str = EXPECTED):
    """Convert any exception while reading `path` into one CheckpointError that names the file."""
    try:
        yield
    except CheckpointError as e:
        name = str(CheckpointError(str(path)))  # of the file, or of the folder that it lies in
        if str(e).startswith((f"{name}: ", f"{name}{os.sep}")):
            raise
        raise CheckpointError(f"{path}: {e}") from e
    except Exception as e:  # parsers and shape arithmetic raise nearly anything
        if out_of_memory(e):
            raise
        if isinstance(e, OSError) and e.strerror:
            raise CheckpointError(f"{path}: {e.strerror}; {expected}") from e
        # Trap: torch.load puts advice in place of the cause, which is left as the context.
        cause = (e.__context__ or e) if isinstance(e, UnpicklingError) else e
        reason = f"it has no {cause}" if isinstance(cause, KeyError) else str(cause)
        reason = (reason or type(cause).__name__).splitlines()[0][:200]
        found = f"damaged or of another kind, found {contents(path)} ({reason})"
        raise CheckpointError(f"{path}: {found}; {expected}") from e


def contents(path: Path) -> str:
    """Describe a file that did not load: often a cut download, a web page, a git-lfs pointer."""
    if path.is_dir():
        return "a folder with " + some(sorted(p.name for p in path.iterdir()))
    with open(path, "rb") as file:
        start = file.read(40)
    if not start:
        return "an empty file"
    line = start.decode("utf-8", "replace").splitlines()[0]
    kind = f"the text {line!r}" if line.isprintable() else "binary data"
    return f"{'a zip archive' if start.startswith(ZIP) else kind}, {path.stat().st_size:,} bytes"


class Stub:
    """Replaces every class and function of a pickle that PyTorch does not know: it takes any
    arguments, does nothing, and keeps a state given to it as plain data."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        self.state = state


def open_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one checkpoint file in any format, mapped."""
    with checking(path):
        content, _ = open_content(path)
        if isinstance(content, Stub):
            content = tensors_of_modules(content)
        for level in ("state_dict", "params_ema", "params"):  # the latter two: upscalers'
            if isinstance(content, dict) and isinstance(content.get(level), dict):
                content = content[level]
        if not isinstance(content, dict):
            raise CheckpointError(f"holds no table of tensors; {EXPECTED}")
        if not (tensors := tensors_in(content)):
            raise CheckpointError(f"holds no tensors but {some(map(str, content))}; {EXPECTED}")
        return tensors


def tensors_in(table: dict) -> dict[str, Tensor]:
    """The ordinary tensors of a table that have a name, without gradients."""
    tensors = {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {k: v.detach() for k, v in tensors.items() if v.layout == torch.strided}


def open_content(path: Path, limit: int | None = None) -> tuple[object, dict[str, str]]:
    """Return what a file holds, tensors mapped, and its metadata. The format follows from its
    first bytes. limit: of the bytes that describe the tensors, for files of words."""
    with open(path, "rb") as file:
        start = file.read(16)
        file.seek(0)
        if start.startswith(ZIP):
            return unpickle(path, file, limit), {}
        if start.startswith(BEFORE_1_6):
            return torch.load(file, map_location="cpu", weights_only=True), {}
    size = int.from_bytes(start[:8], "little")
    if size < path.stat().st_size:  # else it is no .safetensors at all
        check_size(size, limit)
    with safe_open(path, framework="pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata() or {}


def check_size(size: int, limit: int | None) -> None:
    if limit and size > limit:
        raise CheckpointError(
            f"its description of the tensors has {size:,} bytes, too many for a learnt word "
            f"({limit:,} at most); a checkpoint goes to --model"
        )


def unpickle(path: Path, file: BinaryIO, limit: int | None) -> object:
    """Return what torch.save wrote into this zip, without calling anything that it names."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in entries:
        raise CheckpointError("a zip archive, but not one written by torch.save")
    check_size(entries["data.pkl"].file_size, limit)
    # Trap: torch.load reads by the suffix if it is this one, and maps compressed data as they are.
    mapped = path.suffix != ".safetensors" and not any(e.compress_type for e in entries.values())
    if "constants.pkl" in entries:  # a TorchScript archive, which torch.load would run
        mapped, file = False, without_code(file)
    file.seek(0)
    names = get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    with safe_globals([(Stub, name) for name in names]):
        source = path if mapped else file
        return torch.load(source, map_location="cpu", mmap=mapped, weights_only=True)


def without_code(source: BinaryIO) -> io.BytesIO:
    """A copy of a zip of torch.save: no code, no constants, nothing that newer versions add."""
    copy = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            if re.fullmatch(r"[^/]+/(data\.pkl|data/\d+|version)", name):
                new.writestr(zipfile.ZipInfo(name), old.read(name))
    return copy


def tensors_of_modules(module: Stub) -> dict[str, object]:
    """Return the state of a TorchScript archive, a pickled tree of modules. Each module is visited
    once, because a module may hold itself."""
    state, rest, seen = {}, [("", module)], set()
    while rest:
        prefix, module = rest.pop()
        if id(module) not in seen:
            seen.add(id(module))
            for name, value in (module.state or {}).items():
                state[f"{prefix}{name}"] = value
                if isinstance(value, Stub):
                    rest.append((f"{prefix}{name}.", value))
    return state


class Output:
    """A stream such as standard output, which ends nothing: what it cannot show is replaced, and
    what nobody reads any more is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # Python's stream is None where it is closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # a closed pipe, a full disk: what is left in the buffer goes nowhere
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (ValueError, RuntimeError):  # closed; written to within a signal's handler
            pass
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` does it."""


def shortened(name: str, size: int) -> str:
    """Return a file's name cut to `size` bytes."""
    return os.fsencode(name)[:size].decode(errors="ignore")


def free_target(path: Path, overwrite: bool) -> Path:
    """Return the path after checking that it can be written, before any work starts."""
    if len(os.fsencode(path.name)) > NAME_SIZE:
        raise ValueError(f"{path.name}: the name is too long; {NAME_SIZE} bytes are possible")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder or a device; give the name of a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or say --overwrite")
    folder = next(p for p in path.resolve().parents if p.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{path} cannot be written: {folder} is no folder that you may write to")
    return path


def free_png(path: str | Path, overwrite: bool) -> Path:
    """Return the path of a PNG file after checking that it can be written."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(
            f"{str(path)!r} is not a .png file; pictures are written as PNG with settings"
        )
    return free_target(Path(path), overwrite)


def write_file(path: str | Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file all or nothing: a temporary file beside the target, synced, then renamed.

    Raises ValueError where the target exists or cannot be written.
    """
    path = free_target(Path(path), overwrite)
    temporary = path.with_name(f".{shortened(path.name, 200)}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror or error}; make room, or write elsewhere"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


# How A1111's web UI calls settings.
INFOTEXT = dict(steps="Steps", title="Sampler", sigmas="Schedule type", guidance_scale="CFG scale")
INFOTEXT |= dict(seed="Seed", size="Size", model_hash="Model hash", model="Model")
INFOTEXT |= dict(clip_skip="Clip skip")


def infotext(prompt: str, settings: dict) -> str:
    """Return prompt and settings in the form that A1111's web UI and its like write and read."""
    title, karras, _ = settings.get("title", "DDIM").partition(" Karras")
    settings, texts = settings | dict(title=title, sigmas=karras.strip()), []
    for name, label in INFOTEXT.items():
        value = settings.get(name, "")
        text = "x".join(map(str, value)) if name == "size" else str(value)
        text = re.sub(r"\.(safetensors|ckpt)$", "", text)
        text = json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text
        texts += [f"{label}: {text}"] * (text != "")
    negative = [f"Negative prompt: {settings['negative']}"] if settings.get("negative") else []
    return "\n".join([prompt, *negative, ", ".join(texts)]).strip()


def write_png(path: str | Path, image: Image.Image, text: dict, overwrite: bool) -> None:
    """Write a PNG whose text chunks say how it was made; with "settings" among them also as A1111's
    web UI says it, in "parameters"."""
    if "settings" in text:
        text = text | dict(parameters=infotext(text["prompt"], text["settings"]))
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_file(path, buffer.getvalue(), overwrite)


def settings_beside(path: Path) -> dict[str, str]:
    """Plain `key: value` lines of the original configuration beside a file, where there is one:
    model.yaml beside model.ckpt, or config.yaml."""
    for name in (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        if name.is_file():
            text = name.read_text(errors="replace")
            lines = re.findall(r"^\s*(\w+):[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
            if scaling := re.search(r"\.(Eps|V)Scaling\b", text):  # SDXL's configuration
                lines.append(("parameterization", scaling[1].lower()))
            return dict(reversed(lines))  # the first of equal keys counts
    return {}


def short_hash(path: Path) -> str:
    """Return the short hash by which A1111's web UI and Civitai ("AutoV1") know a checkpoint."""
    with open(path, "rb") as file:
        file.seek(1 << 20)
        content = file.read(1 << 16)
    return hashlib.sha256(content).hexdigest()[:8] if content else ""  # a file of less than 1 MiB


def text_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file, UTF-8 or UTF-16, that are not empty. Raises OSError if it is
    not readable."""
    try:
        content = Path(path).read_bytes()
        lines = content.decode("utf-16" if b"\0" in content else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise OSError(f"no text in UTF-8 or UTF-16 ({error}); save it as UTF-8") from None
    return [line for line in lines if line.strip()]


def write_table(path: str | Path, rows: Sequence[dict], overwrite: bool) -> None:
    """Write a CSV of rows with the same keys."""
    table = io.StringIO()
    if rows:
        writer = csv.DictWriter(table, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_file(path, table.getvalue().encode(), overwrite)
