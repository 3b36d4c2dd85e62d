"""Read tensors from files without running code in them; write files all or nothing.

`torch.load(weights_only=True)` builds containers and tensors and calls nothing else; .safetensors
hold no code. Tensors are memory-mapped, copy on write. While they are in use, replace their file by
renaming another over it, as `write_file` does, never by writing into it.
"""

import csv
import hashlib
import io
import json
import os
import re
import secrets
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
BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # and of torch before 1.6
EXPECTED = "expected LDM or Stable Diffusion 1, 2 or XL: .ckpt, .safetensors or a diffusers folder"


class CheckpointError(ValueError):
    """A file cannot be used. The message is one line, with "?" for unprintable characters."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


def some(names: Iterable[str]) -> str:
    """Return the first three names, for an error message."""
    names = [name[:80] for name in names]
    return ", ".join(names[:3] + ["..."] * (len(names) > 3)) or "nothing"


def out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out; for PyTorch that may be a RuntimeError that says so."""
    said = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(said, str(error)))


@contextmanager
def checking(path: Path, expected: str = EXPECTED):
    """Convert any exception while reading `path` into one CheckpointError that names the file."""
    try:
        yield
    except CheckpointError as e:
        name = str(CheckpointError(str(path)))  # does the message name it, or a file in it?
        if str(e).startswith((f"{name}: ", f"{name}{os.sep}")):
            raise
        raise CheckpointError(f"{path}: {e}") from e
    except Exception as e:  # parsers and shape arithmetic raise nearly anything
        if out_of_memory(e):
            raise
        if isinstance(e, OSError) and e.strerror:
            raise CheckpointError(f"{path}: {e.strerror}; {expected}") from e
        # Trap: torch.load's message is advice; the cause is in the exception's context.
        cause = (e.__context__ or e) if isinstance(e, UnpicklingError) else e
        reason = f"it has no {cause}" if isinstance(cause, KeyError) else str(cause)
        reason = (reason or type(cause).__name__).splitlines()[0][:200]
        found = f"damaged or of another kind, found {contents(path)} ({reason})"
        raise CheckpointError(f"{path}: {found}; {expected}") from e


def contents(path: Path) -> str:
    """Describe a file that does not load: often a cut download, a web page or a git-lfs pointer."""
    if path.is_dir():
        return "a folder with " + some(sorted(p.name for p in path.iterdir()))
    with open(path, "rb") as file:
        start = file.read(40)
    if not start:
        return "an empty file"
    line = start.decode("utf-8", "replace").splitlines()[0]
    kind = f"the text {line!r}" if line.isprintable() else "binary data"
    return f"{kind}, {path.stat().st_size:,} bytes"


class Stub:
    """Replaces classes and functions in a pickle that PyTorch does not know. It takes any
    arguments, does nothing, and keeps its pickled state as plain data."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        self.state = state


def open_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one checkpoint file in any format, mapped."""
    with checking(path):
        content, _ = open_content(path)
        content = tensors_of_modules(content) if isinstance(content, Stub) else dict(content)
        for level in ("state_dict", "params_ema", "params"):  # the latter two: upscalers'
            content = content.get(level, content)
        if not (tensors := tensors_in(content)):
            raise CheckpointError(f"holds no tensors but {some(map(str, content))}; {EXPECTED}")
        return tensors


def tensors_in(table: dict) -> dict[str, Tensor]:
    """Return the entries of a table that are named, dense tensors, without gradients."""
    tensors = {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {k: v.detach() for k, v in tensors.items() if v.layout == torch.strided}


def open_content(path: Path, limit: int | None = None) -> tuple[object, dict[str, str]]:
    """Return a file's content, tensors mapped, and its metadata. Its first bytes tell the format.
    limit: the largest pickle or header in bytes, for files of words."""
    with open(path, "rb") as file:
        start = file.read(16)
        file.seek(0)
        if start.startswith(ZIP):
            return unpickle(path, file, limit), {}
        if start.startswith(BEFORE_1_6):
            return torch.load(file, map_location="cpu", weights_only=True), {}
    size = int.from_bytes(start[:8], "little")
    if size < path.stat().st_size:  # else it is not a .safetensors file
        check_size(size, limit)
    with safe_open(path, framework="pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata() or {}


def check_size(size: int, limit: int | None) -> None:
    if limit and size > limit:
        raise CheckpointError(f"{size:,} bytes, too many for a learnt word; models go to --model")


def unpickle(path: Path, file: BinaryIO, limit: int | None) -> object:
    """Return what torch.save wrote into a zip, without running any function that it names."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    check_size(entries["data.pkl"].file_size, limit)
    # Trap: torch.load trusts this suffix whatever the content, and maps compressed data undecoded.
    mapped = path.suffix != ".safetensors" and not any(e.compress_type for e in entries.values())
    if "constants.pkl" in entries:  # a TorchScript archive, which torch.load would run
        mapped, file = False, without_code(file)
    file.seek(0)
    names = get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    with safe_globals([(Stub, name) for name in names]):
        return torch.load(path if mapped else file, "cpu", mmap=mapped, weights_only=True)


def without_code(source: BinaryIO) -> io.BytesIO:
    """Copy a zip of torch.save without code, constants and what newer versions of torch add."""
    copy = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            if re.fullmatch(r"[^/]+/(data\.pkl|data/\d+|version)", name):
                new.writestr(zipfile.ZipInfo(name), old.read(name))
    return copy


def tensors_of_modules(module: Stub) -> dict[str, object]:
    """Return the state of a TorchScript archive, which is a pickled tree of modules."""
    state = {}
    for name, value in (module.state or {}).items():
        inner = tensors_of_modules(value) if isinstance(value, Stub) else {}
        state |= {name: value} | {f"{name}.{key}": tensor for key, tensor in inner.items()}
    return state


class Output:
    """Wraps standard output or error so that printing never fails: characters that the stream lacks
    are replaced, and output that cannot be written is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # Python's stream is None if it is closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(ValueError, RuntimeError):  # closed; interrupted by a signal that prints
            try:
                self.stream.write(text)
                self.stream.flush()
            except OSError:  # a closed pipe, a full disk: drop the buffer, or Python fails at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def shortened(name: str, size: int) -> str:
    """Return a file's name, cut to `size` bytes."""
    return os.fsencode(name)[:size].decode(errors="ignore")


def free_target(path: str | Path, overwrite: bool, ending: str = "") -> Path:
    """Check that `path` has this ending and can be written, before any work starts; return it."""
    if not str(path).lower().endswith(ending):
        raise ValueError(f"{str(path)!r} is not a {ending} file")
    path = Path(path).expanduser()  # the shell leaves --out=~/cat.png as it is
    if len(os.fsencode(path.name)) > 255:
        raise ValueError(f"{path.name}: the name is too long; 255 bytes are possible")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder or a device; give the name of a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or say --overwrite")
    folder = next(p for p in path.resolve().parents if p.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{path} cannot be written: {folder} is not a folder you may write to")
    return path


def write_file(path: str | Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file all or nothing: a temporary file beside the target, synced, then renamed. Raises
    ValueError if the target exists or cannot be written."""
    path = free_target(path, overwrite)
    temporary = path.with_name(f".{shortened(path.name, 200)}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


# Settings by the names that A1111's web UI gives them.
INFOTEXT = dict(steps="Steps", title="Sampler", guidance_scale="CFG scale", seed="Seed")
INFOTEXT |= dict(size="Size", model_hash="Model hash", model="Model", clip_skip="Clip skip")


def infotext(prompt: str, settings: dict) -> str:
    """Return prompt and settings in the format that A1111's web UI and others write and read."""
    settings, pairs = dict(title="DDIM", size=()) | settings, []
    settings["size"] = "x".join(map(str, settings["size"]))
    for name, label in INFOTEXT.items():
        text = re.sub(r"\.(safetensors|ckpt)$", "", str(settings.get(name, "")))
        quoted = json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text
        pairs += [f"{label}: {quoted}"] if text else []
    negative = [f"Negative prompt: {settings['negative']}"] if settings.get("negative") else []
    return "\n".join([prompt, *negative, ", ".join(pairs)]).strip()


def write_png(path: str | Path, image: Image.Image, text: dict, overwrite: bool) -> None:
    """Write a PNG with text chunks; "settings" are also written as A1111's "parameters"."""
    if "settings" in text:
        text = text | dict(parameters=infotext(text["prompt"], text["settings"]))
    write_file(path, png_bytes(image, text), overwrite)


def png_bytes(image: Image.Image, text: dict) -> bytes:
    """Return the bytes of a PNG with these text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def settings_beside(path: Path) -> dict[str, str]:
    """Return the `key: value` lines of model.yaml or config.yaml beside model.ckpt, if any."""
    beside = (path.with_suffix(".yaml"), path.with_name("config.yaml"))
    text = next((file.read_text(errors="replace") for file in beside if file.is_file()), "")
    lines = re.findall(r"^\s*(\w+):[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
    kinds = re.findall(r"\.(Eps|V)Scaling\b", text)  # in SDXL's configuration
    lines += [("parameterization", kind.lower()) for kind in kinds]
    return dict(reversed(lines))  # the first of equal keys counts


def short_hash(path: Path) -> str:
    """Return the short hash by which A1111's web UI and Civitai ("AutoV1") know a checkpoint."""
    with open(path, "rb") as file:
        file.seek(1 << 20)
        content = file.read(1 << 16)
    return hashlib.sha256(content).hexdigest()[:8] if content else ""  # a file of less than 1 MiB


def text_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file, UTF-8 or UTF-16, that are not empty. Raises OSError."""
    try:
        content = Path(path).read_bytes()
        lines = content.decode("utf-16" if b"\0" in content else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise OSError(f"{path}: not text in UTF-8 or UTF-16 ({error}); save it as UTF-8") from None
    return [line for line in lines if line.strip()]


def write_table(path: str | Path, rows: Sequence[dict], overwrite: bool) -> None:
    """Write a CSV of rows with the same keys."""
    table = io.StringIO()
    if rows:
        writer = csv.DictWriter(table, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_file(path, table.getvalue().encode(), overwrite)
