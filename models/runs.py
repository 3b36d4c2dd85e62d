"""The files of a run: written all or nothing, never over another file unless asked, resumable.

A run that learns `cat.safetensors` keeps beside it

    cat.json         its settings, written before the first step
    cat.csv          one row per step
    cat.state        step, vectors, the optimizer's moments; losses and best for `--stop auto`
    cat.inputs.png   what the model sees of the pictures
    cat.step-N.png   previews
    cat.image-N.*    the words of single pictures, if asked for

All random numbers of a step follow from the seed and the step's number: no generator is saved.
"""

import csv
import glob
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from .concepts import Concept
from .files import checking, shortened, some, write_file, write_png, write_table

# Early stopping (Voronov et al. 2023, "Is This Loss Informative?", arXiv:2302.04841): the loss of a
# new batch depends on its timesteps more than on the word, so every STOP_EVERY steps it is measured
# on the same batches. Training has converged when the variance of the last STOP_WINDOW values is
# below STOP_SHARE times the variance of all. (Voronov et al.: every step, 310 values, 0.15.)
STOP_EVERY, STOP_WINDOW, STOP_SHARE = 10, 10, 0.05
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
ANEW = "start over with --overwrite, without --resume"


@dataclass
class State:
    """The state of training after a step. Later steps change the vectors: clone what you keep."""

    step: int
    steps: int  # the last step
    loss: Tensor  # eq. 2 on the step's batch
    concept: Concept  # with the vectors in use so far: all of them unless progressive
    image_words: list[Concept]  # one per picture, if asked for
    parameters: list[Tensor]
    optimizer: torch.optim.AdamW
    start: Tensor  # the vectors before the first step
    fixed_loss: float | None = None  # for early stopping, if this step measured it
    fixed_losses: list[float] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)  # the vectors with the lowest fixed loss

    @property
    def over(self) -> bool:
        """True after the last step, or once training has converged."""
        return self.step >= self.steps or converged(self.fixed_losses)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, besides the arguments of `train`."""
        tensors = {"step": torch.tensor(self.step)}
        for i, vectors in enumerate(self.parameters):
            tensors[f"{i}.vectors"] = vectors.detach()
            tensors |= {f"{i}.{name}": self.optimizer.state[vectors][name] for name in MOMENTS}
        if self.fixed_losses:
            tensors["losses"] = torch.tensor(self.fixed_losses, dtype=torch.float64)
            tensors |= {f"best.{i:04d}": vectors for i, vectors in enumerate(self.best)}
        return {key: tensor.cpu().clone() for key, tensor in tensors.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned. Raises ValueError if its vectors have other shapes."""
        self.step = int(saved["step"])
        for i, vectors in enumerate(self.parameters):
            kept = [saved.get(f"{i}.{name}") for name in ("vectors", *MOMENTS)]
            if any(tensor is None or tensor.shape != vectors.shape for tensor in kept):
                raise ValueError("the state to resume from has vectors of other shapes")
            value, *moments = (tensor.to(vectors, copy=True) for tensor in kept)
            vectors.data.copy_(value)
            step = torch.tensor(float(self.step))
            self.optimizer.state[vectors] = dict(zip(MOMENTS, moments), step=step)
        self.fixed_losses = saved["losses"].tolist() if "losses" in saved else []
        self.best = [saved[key] for key in sorted(saved) if key.startswith("best.")]

    @torch.no_grad()
    def note(self, fixed_loss: float) -> None:
        """Record a loss for early stopping; once training has converged, take the best vectors."""
        self.fixed_loss = fixed_loss
        self.fixed_losses.append(fixed_loss)
        if fixed_loss == min(self.fixed_losses):
            self.best = [vectors.clone() for vectors in self.parameters]
        if converged(self.fixed_losses):
            for vectors, best in zip(self.parameters, self.best):
                vectors.copy_(best)


def converged(losses: Sequence[float]) -> bool:
    """Return True if the last losses vary little compared with all of them (early stopping)."""
    past = torch.as_tensor(losses, dtype=torch.float64)
    return len(past) >= STOP_WINDOW and bool(past[-STOP_WINDOW:].var() < STOP_SHARE * past.var())


class Run:
    """The files of one run, beside the word that it learns."""

    def __init__(self, out: Path, settings: dict, image_words: bool = False):
        self.out, self.settings = out, dict(file=out.name) | settings  # cat.pt shares cat.json
        self.image_words = image_words  # also save the words of single pictures
        self.stem = shortened(out.stem, 200)  # leaves room for the endings
        self.rows: list[dict] = []  # of the .csv

    def path(self, ending: str) -> Path:
        """Return `cat.csv` beside `cat.safetensors`, for the ending "csv"."""
        return self.out.with_name(f"{self.stem}.{ending}")

    def look(self, resume: bool, overwrite: bool) -> dict[str, Tensor] | None:
        """Return the state to continue from, or None at the beginning. Raises ValueError if another
        run's files would be lost, or if a setting is not what this run began with."""
        if resume and self.path("json").exists():
            self.check_settings()
            if self.path("state").exists():
                state = self.read_state()
                return state if int(state["step"]) else None
            if not self.out.exists():
                return None  # killed before the first step
        there = [path for path in (self.out, *self.files()) if path.exists()]
        if there and not overwrite:
            way = "its state is gone, so use" if resume else "use --resume,"
            names = some(path.name for path in there)
            raise ValueError(f"{names}: there already; {way} another --out, or --overwrite")
        return None

    def files(self) -> list[Path]:
        """Return the files that runs of this name have left, without the word."""
        ends = rf"json|csv|state|(inputs|step-\d+)\.png|image-\d+\{self.out.suffix}"
        own = re.compile(rf"{re.escape(self.stem)}\.({ends})")
        return sorted(p for p in self.out.parent.glob("*") if own.fullmatch(p.name))

    def begin(self, anew: bool) -> None:
        """Write the settings. `anew` first removes another run's files, but not its word."""
        text = (json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n").encode()
        unfinished = self.out.parent.glob(f".{glob.escape(self.stem)}.*.tmp")  # of a killed process
        for path in [*unfinished, *(self.files() if anew else ())]:
            path.unlink()
        write_file(self.path("json"), text, overwrite=True)
        if anew:  # else `look` would take the word for another run's, as this one has no state
            self.write_state({"step": torch.tensor(0)})

    def check_settings(self) -> None:
        path = self.path("json")
        with checking(path, f"expected a run's settings; {ANEW}"):
            began = dict(json.loads(path.read_text("utf-8")))
        for key, now in json.loads(json.dumps(self.settings)).items():
            # The model's file may have a new name; the fingerprint identifies the model.
            if began.get(key) != now and key not in ("steps", "model"):
                then = repr(began.get(key)) + f" of {began.get('model')}" * (key == "fingerprint")
                differs = f"{path}: the run began with {key} {then:.200}, now it is {now!r:.200}"
                raise ValueError(f"{differs}; give what it began with, or {ANEW}")

    def read_state(self) -> dict[str, Tensor]:
        with checking(self.path("state"), f"expected a run's state; {ANEW}"):
            state = load(self.path("state").read_bytes())
            last = int(state["step"])
        with checking(self.path("csv"), f"expected the run's table; put it back, or {ANEW}"):
            with open(self.path("csv"), newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= last]
        return state

    def follow(self, states: Iterator, save_every: int, preview_every: int, preview: Callable):
        """Train, and keep word, table, state and previews up to date; return the last State.

        states: what `textinv.train` returns. preview(state) draws a picture, every `preview_every`
        steps (0: never). Ctrl-C ends the run after the current step, with everything saved.
        """
        state, steps = None, self.settings["steps"]
        progress = tqdm(states, total=steps, initial=len(self.rows), unit="step")
        try:
            with progress, interruptible() as asked:
                for state in progress:
                    self.rows.append(table_row(state))
                    # A mean, as one step's loss depends more on its timesteps than on the word.
                    loss = fmean(float(row["loss"]) for row in self.rows[-50:])
                    progress.set_postfix(loss=f"{loss:.4f}", peak=peak_memory(state.loss.device))
                    shown = preview_every and state.step % preview_every == 0 and not state.over
                    if shown or state.step % save_every == 0:
                        self.save(state)
                    if shown:  # after saving: on a small GPU it may run out of memory
                        text = {"prompt": f"a photo of {state.concept.placeholder}"}
                        write_png(self.path(f"step-{state.step}.png"), preview(state), text, True)
                    if asked:
                        break
        finally:
            if state is not None and state.concept.metadata["steps"] == str(state.step):
                self.save(state)  # else the vectors are already those of a step that broke
        return state

    def save(self, state: State) -> None:
        """Write word, table and state. The state is last: the others then have all its steps."""
        state.concept.save(self.out, overwrite=True)
        for i, word in enumerate(state.image_words if self.image_words else (), 1):
            word.save(self.path(f"image-{i}{self.out.suffix}"), overwrite=True)
        self.write_state(state.tensors())

    def write_state(self, tensors: dict[str, Tensor]) -> None:
        write_table(self.path("csv"), self.rows, overwrite=True)
        write_file(self.path("state"), save(tensors), overwrite=True)


def table_row(state: State) -> dict[str, str]:
    """Return a step's row of the table: loss, fixed loss if measured, mean norm of the vectors, and
    their mean distance from where they started."""
    vectors = state.concept.vectors.detach()
    moved = vectors - state.start[: len(vectors)]
    figures = [state.loss, vectors.norm(dim=1).mean(), moved.norm(dim=1).mean()]
    loss, norm, moved = torch.stack(figures).tolist()  # waits for the device only once
    fixed = "" if state.fixed_loss is None else f"{state.fixed_loss:.6f}"
    row = dict(step=str(state.step), loss=f"{loss:.6f}", fixed_loss=fixed)
    return row | dict(norm=f"{norm:.4f}", moved=f"{moved:.4f}")


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yield a list that is empty until Ctrl-C or SIGTERM; a second one stops the program."""
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> str:
    """Return the peak of memory so far: of tensors on a GPU, else of this process (Linux only)."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    # Trap: getrusage's ru_maxrss would include the peak of the process that started this one.
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "")
    return f"{int(own[1]) / 2**20:.1f} GiB" if own else "?"
