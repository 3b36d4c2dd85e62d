"""Checkpoints and words by published name, by address, and from Hugging Face's cache.

Downloads go to torch's own cache. A file gets its name there once its size is right, and its
checksum if that is known.
"""

import csv
import hashlib
import os
import re
import warnings
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import torch

from .files import CheckpointError, some

PUBLISHED = list(csv.DictReader(Path(__file__).with_suffix(".csv").read_text().splitlines()))


def find(given: str | Path, what: str = "") -> Path:
    """Return the local path of `given`. If no such path exists, it may be the name of a published
    "model" or "clip" or an address, which are downloaded, or a repository in Hugging Face's cache
    ("x/y" or its folder models--x--y). Raises CheckpointError, one line."""
    text, hint = str(given), ""
    names = {row["name"]: row for row in PUBLISHED if row["what"] == what}
    if os.path.exists(given):
        return snapshot(Path(given))
    if row := names.get(text.lower()):
        return download(row["address"], row["licence"], row["sha256"])
    if re.match("https?://", text, re.IGNORECASE):
        return download(text)
    if re.fullmatch(r"(?!.*\.(?:ckpt|safetensors|pt|bin|png)$)\w[\w.-]*/\w[\w.-]*", text):
        folder = hub_cache() / f"models--{text.replace('/', '--')}"
        if (path := snapshot(folder)) != folder:
            return path
        hint = f" and no repository in {folder.parent}; if it is one, `hf download {text}` gets it"
    kinds = ", ".join(["a path", "an address", "a Hugging Face repository", *names])
    raise CheckpointError(f"{text}: no such file or folder{hint}; possible are {kinds}")


def download(address: str, licence: str = "", sha256: str = "") -> Path:
    """Return the local copy of an address's file; download it if the cache does not have it."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not licence:  # files of users' own addresses may have the same names
        folder /= hashlib.sha256(address.encode()).hexdigest()[:16]
    target = folder / address.partition("?")[0].rpartition("/")[2][-100:]
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urlopen(Request(address, headers={"User-Agent": "torch.hub"}), timeout=30) as answer:
            size, kind = answer.length, answer.headers.get_content_type()
        if size is None or kind == "text/html":
            raise OSError("no file of a known size; take the address of the file, not of its page")
        about = f"licence: {licence or 'not known'}; SHA-256: {sha256 or 'not known'}"
        warnings.warn(f"downloading {address} to {target}: {size:,} bytes; {about}")
        with TemporaryDirectory(prefix="partial-", dir=folder) as beside:
            part = Path(beside) / target.name
            torch.hub.download_url_to_file(address, str(part), sha256 or None)
            if (got := part.stat().st_size) != size:
                raise OSError(f"cut off after {got:,} of {size:,} bytes")
            os.replace(part, target)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        reason = str(error).strip("<>") or type(error).__name__
        remedy = f"try again, put the file at {target} or set TORCH_HOME to a folder with room"
        raise CheckpointError(f"{address}: not downloaded ({reason}); {remedy}") from None
    return target


def hub_cache() -> Path:
    """Return the folder of Hugging Face's cache, found as huggingface_hub finds it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def snapshot(path: Path) -> Path:
    """Return the snapshot in a folder models--x--y: refs/main's, else the newest; else the path."""
    main = path / "refs" / "main"
    name = main.read_text().strip() if main.is_file() else ""
    age = lambda folder: (folder.name == name, folder.stat().st_mtime)
    return max(path.glob("snapshots/*/"), key=age, default=path)


def checkpoint_in(folder: Path) -> Path:
    """Return the checkpoint in a folder: model.safetensors, else the only one, else the folder."""
    files = {p.stem: p for end in ("ckpt", "safetensors") for p in folder.glob(f"*.{end}")}
    if not files or any(folder.glob("unet/diffusion_pytorch_model*")):
        return folder
    if len(files) > 1 and "model" not in files:
        names = some(sorted(path.name for path in files.values()))
        raise CheckpointError(f"several checkpoints: {names}; give one of them")
    return files.get("model") or files.popitem()[1]
