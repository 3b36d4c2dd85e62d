"""When training may stop: Voronov et al. 2023, "Is This Loss Informative? Faster Text-to-Image
Customization by Tracking Objective Dynamics" (arXiv:2302.04841).

The losses of ever new batches vary with their timesteps far more than with the word. On a batch
that is always the same (pictures, timesteps, noise, prompts) the word alone makes the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Watch:
    """Keeps the losses of a fixed batch, one for every `EVERY` steps, and the parameters that had
    the lowest."""

    # Theirs: every step, 310 of them, 0.15.
    EVERY, WINDOW, SHARE = 10, 10, 0.05

    losses: list[float] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, saved: Mapping[str, Tensor]) -> "Watch":
        """What `tensors` returned."""
        best = [saved[key] for key in sorted(saved) if key.startswith("best.")]
        return cls(saved["losses"].tolist() if "losses" in saved else [], best)

    def tensors(self) -> dict[str, Tensor]:
        """Losses and best parameters, to be saved."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        return tensors | {f"best.{i:04d}": vectors for i, vectors in enumerate(self.best)}

    @torch.no_grad()
    def look(self, loss: float, parameters: Sequence[Tensor]) -> None:
        """Note the loss; once it is steady, put the best values into the parameters."""
        self.losses.append(loss)
        if loss == min(self.losses):
            self.best = [vectors.clone() for vectors in parameters]
        if self.steady():
            for vectors, best in zip(parameters, self.best):
                vectors.copy_(best)

    def steady(self) -> bool:
        """Whether the variance of the last `WINDOW` losses is below `SHARE` of that of them all."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        enough = len(losses) >= self.WINDOW
        return enough and bool(losses[-self.WINDOW :].var() < self.SHARE * losses.var())
