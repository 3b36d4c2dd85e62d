"""Files that a run writes: all or nothing, never over another file unless asked, and resumable.

A run that learns `cat.safetensors` keeps beside it

    cat.json         its settings, written before the first step
    cat.csv          one row per step
    cat.state        what the next step depends on: its number, the vectors, the optimizer's two
                     moments, and what `--stop auto` has seen
    cat.inputs.png   what the model sees of the pictures
    cat.step-N.png   previews
    cat.image-N.*    the words of single pictures, if they are asked for

Every random draw of a step follows from the seed and the number of the step, so the state needs no
generators, and a run that was killed goes on to the same bits from whichever state it finds.
"""

import csv
import glob
import io
import json
import os
import secrets
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .parallel import rank_and_world, wait_for_all


def free_target(path: Path, overwrite: bool) -> Path:
    """The path, if it may be written: said before the work, not after it."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder or a device; give the name of a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or say --overwrite")
    folder = next(p for p in path.resolve().parents if p.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{path} cannot be written: {folder} is no folder that you may write to")
    return path


def write_file(path: str | Path, content: bytes, overwrite: bool = False) -> None:
    """All or nothing: a temporary file beside the target, synced, then renamed. Of several
    processes (models/parallel.py) only the first writes.

    Raises ValueError where the target exists or cannot be written.
    """
    if rank_and_world()[0] > 0:
        return
    path = free_target(Path(path), overwrite)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
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


def write_png(path: str | Path, image: Image.Image, text: dict, overwrite: bool) -> None:
    """A PNG whose text chunks say how it was made."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_file(path, buffer.getvalue(), overwrite)


def write_table(path: str | Path, rows: Sequence[dict], overwrite: bool) -> None:
    """A CSV of rows with the same keys."""
    table = io.StringIO()
    if rows:
        writer = csv.DictWriter(table, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_file(path, table.getvalue().encode(), overwrite)


class Run:
    """The files of one run, beside the word that it learns."""

    def __init__(self, out: Path, settings: dict):
        self.out = out
        self.settings = settings
        self.rows: list[dict] = []

    def path(self, ending: str) -> Path:
        """`cat.csv` beside `cat.safetensors`, for the ending "csv"."""
        return self.out.with_name(f"{self.out.stem}.{ending}")

    def look(self, resume: bool, overwrite: bool) -> dict[str, Tensor] | None:
        """The state to go on from, or None at the beginning. Writes nothing.

        Raises ValueError where files that are not this run's would be lost, or where a setting
        differs from what the run began with; the number of steps may.
        """
        if resume and self.path("json").exists():
            self.check_settings()
            if self.path("state").exists():
                state = self.read_state()
                return state if int(state["step"]) else None
            if not self.out.exists():
                return None  # killed before the first step
        for path in () if overwrite else self.files():
            way = "its state is gone, so" if resume else "go on with --resume,"
            raise ValueError(
                f"{path} exists; {way} choose another --out, or say --overwrite to begin anew"
            )
        return None

    def files(self) -> list[Path]:
        """What there is of the files that a run of this name writes."""
        beside, suffix = glob.escape(self.out.stem), self.out.suffix
        own = f"json csv state inputs.png step-[0-9]*.png image-[0-9]*{suffix}".split()
        found = [p for name in own for p in self.out.parent.glob(f"{beside}.{name}")]
        return [self.out] * self.out.exists() + found

    def begin(self, anew: bool) -> None:
        """Write the settings, before the first step. `anew` takes another run's files away but
        the word, whose place is taken by the first save."""
        wait_for_all()  # each process has looked at what there is; now the first changes it
        if rank_and_world()[0] > 0:
            return
        for path in self.out.parent.glob(f".{glob.escape(self.out.stem)}.*.tmp"):
            path.unlink()  # what a killed process left
        for path in self.files() if anew else ():
            if path != self.out:
                path.unlink()
        text = json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n"
        write_file(self.path("json"), text.encode(), overwrite=True)
        if anew:  # a run without a state, but with a word, is not ours to overwrite
            self.save({"step": torch.tensor(0)})

    def check_settings(self) -> None:
        path = self.path("json")
        try:
            began = dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a run's settings ({error}); use --overwrite") from None
        for key, now in json.loads(json.dumps(self.settings)).items():
            if began.get(key) != now and key != "steps":
                raise ValueError(
                    f"{path}: the run began with {key} {began.get(key)!r}, now it is {now!r}; "
                    "give what it began with, or begin anew with --overwrite"
                )

    def read_state(self) -> dict[str, Tensor]:
        path = self.path("state")
        try:
            state = load(path.read_bytes())
            step = int(state["step"])
            with open(self.path("csv"), newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path}: no run can go on from it and the .csv beside it ({error}); begin anew "
                "with --overwrite"
            ) from None
        return state

    def save(self, state: dict[str, Tensor]) -> None:
        """Table and state, the state last: whatever it says is done lies in the other files."""
        write_table(self.path("csv"), self.rows, overwrite=True)
        write_file(self.path("state"), save(state), overwrite=True)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C (and SIGTERM) only asks: the yielded list is no longer empty, and whoever runs the
    loop ends it between two steps. A second Ctrl-C ends at once."""
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
