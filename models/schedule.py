"""The noise schedule, and what follows from it: noising, targets, and the samplers.

[1] Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (DDPM)
[2] Song et al. 2021, "Denoising Diffusion Implicit Models" (DDIM)
[3] Salimans & Ho 2022, "Progressive Distillation" (v-prediction)
[4] Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed"
[5] Lu et al. 2022, "DPM-Solver++" (2M: second order, from the last two predictions)
[6] Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"
[7] Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models"
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor


@dataclass(eq=False)
class Schedule:
    """How much signal and noise each timestep has. `beta_schedule` and so on are as in diffusers.

    `alphas_cumprod` (length,) is a_t, the share of signal variance left at timestep t. Like all
    coefficients, it is float64 on the CPU until it is multiplied by pictures in float32.
    """

    beta_start: float = 0.00085  # LDM text2img-large and Stable Diffusion alike
    beta_end: float = 0.012
    prediction: str = "eps"  # what the UNet returns: "eps", the noise [1], or "v" [3]
    length: int = 1000  # number of timesteps
    zero_snr: bool = False  # the last timestep is pure noise [4], and sampling starts there
    beta_schedule: str = "scaled_linear"
    trained_betas: Sequence[float] | None = None  # every beta, instead of a beta_schedule
    spacing: str | None = None  # of the sampler's timesteps: "leading", "trailing" or "linspace"
    steps_offset: int = 1  # the last of the sampler's timesteps, with "leading"

    def __post_init__(self):
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction type {self.prediction!r} is not known; use 'eps' or 'v'")
        if self.zero_snr and self.prediction == "eps":
            raise ValueError("a last timestep of pure noise needs v-prediction; use --prediction v")
        self.spacing = self.spacing or ("trailing" if self.zero_snr else "leading")
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"timestep_spacing {self.spacing!r} is not supported; use leading")
        kind, start, end, length = self.beta_schedule, self.beta_start, self.beta_end, self.length
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        elif kind == "linear":  # [1]
            betas = torch.linspace(start, end, length, dtype=torch.float64)
        elif kind == "scaled_linear":  # linear in the square root
            betas = torch.linspace(start**0.5, end**0.5, length, dtype=torch.float64).square()
        elif kind == "squaredcos_cap_v2":  # [7, eq. 17]
            s = torch.linspace(0, 1, length + 1, dtype=torch.float64)
            a = ((s + 0.008) / 1.008 * pi / 2).cos().square()
            betas = (1 - a[1:] / a[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"beta_schedule {kind!r} is not supported; use scaled_linear")
        self.betas, self.length = betas, len(betas)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if self.zero_snr:  # [4, algorithm 1]: sqrt(a_t) shifted to end at 0, and scaled to keep a_0
            root = self.alphas_cumprod.sqrt()
            self.alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()

    def a(self, t: Tensor | int, like: Tensor) -> Tensor:
        """Return a_t for timesteps t (B,) or a number, shaped to multiply `like` (B, ...). It is 1
        for t < 0, before any noise. It stays on the CPU because MPS has no float64."""
        t = torch.as_tensor(t).cpu()
        a = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])
        return a.reshape(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x_0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """Return a sample of q(x_t | x_0) [1, eq. 4]: x_0 (B, ...) noised to timesteps t (B,)."""
        a = self.a(t, x_0)
        return a.sqrt().to(x_0) * x_0 + (1 - a).sqrt().to(x_0) * noise

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return what the UNet should predict for q_sample(x_0, t, noise)."""
        if self.prediction == "eps":
            return noise
        a = self.a(t, x_0)
        return a.sqrt().to(x_0) * noise - (1 - a).sqrt().to(x_0) * x_0

    def x_0_and_eps(self, x_t: Tensor, t: Tensor | int, prediction: Tensor):
        """Return the clean picture and the noise, (x_0, eps), that a prediction for x_t implies."""
        a = self.a(t, x_t)
        signal, sigma = a.sqrt().to(x_t), (1 - a).sqrt().to(x_t)
        if self.prediction == "eps":
            return (x_t - sigma * prediction) / signal, prediction
        return signal * x_t - sigma * prediction, signal * prediction + sigma * x_t

    def ddim_step(self, x_t: Tensor, t: int, t_prev: int, prediction: Tensor, eta=0.0, noise=None):
        """Return x at `t_prev` from x at `t` [2, eq. 12].

        eta 0 adds no new noise: the predicted x_0 is noised again with the predicted eps. Then
        t_prev may be larger than t, which is DDIM inversion. eta 1 is DDPM [1, eq. 6 and 7]: a
        sample of p(x_{t_prev} | x_t) with the smaller of its two variances.
        """
        x_0, eps = self.x_0_and_eps(x_t, t, prediction)
        if not eta:
            return self.q_sample(x_0, t_prev, eps)
        a_t, a_prev = self.a(t, x_t), self.a(t_prev, x_t)
        variance = eta**2 * (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
        x = a_prev.sqrt().to(x_t) * x_0 + (1 - a_prev - variance).sqrt().to(x_t) * eps
        return x + variance.sqrt().to(x_t) * noise

    def ddim_timesteps(self, steps: int) -> list[int]:
        """Return `steps` timesteps, from high to low: 981, 961, ..., 21, 1 for 50 steps.

        Traps: as in the paper's sampler, they end at 1, not at 0, and all strides are equal. But
        for 600 of 1000 steps, strides of 1 would start at timestep 600, far from pure noise. If
        equal strides leave out more than a twentieth at the top, strides differ by one instead.
        """
        if not 1 <= steps <= self.length:
            raise ValueError(f"steps {steps} is out of range; use 1 to {self.length}")
        if self.spacing == "trailing":  # 999, 979, ..., 19 [4, section 3.3]
            return [round(i * self.length / steps) - 1 for i in range(steps, 0, -1)]
        if self.spacing == "linspace":  # 999, 979, ..., 20, 0
            gap = (self.length - 1) / max(1, steps - 1)
            return [round(i * gap) for i in reversed(range(steps))]
        stride = self.length // steps
        if steps * stride < 0.95 * self.length:
            return [1 + i * self.length // steps for i in reversed(range(steps))]
        # The lowest is the offset, or less if the highest would be out of range.
        first = min(self.steps_offset, self.length - 1 - stride * (steps - 1))
        return [first + stride * i for i in reversed(range(steps))]

    def ddim_pairs(self, steps: int) -> list[tuple[int, int]]:
        """Return (t, t_prev) of each DDIM step. Trap: the last t_prev is 0, with a little noise."""
        times = self.ddim_timesteps(steps)
        return list(zip(times, times[1:] + [0]))

    def ddim_sample(self, predict: Callable, x: Tensor, steps: int, eta=0.0, draw=None) -> Iterator:
        """Yield x (B, ...) after each step of DDIM, from noise to timestep 0, almost clean.

        predict(x_t, t (B,)) returns the model's prediction. eta is 0 to 1; above 0, each step calls
        draw() for noise like x. eta 1 is DDPM; Euler ancestral differs only in its timesteps.
        """
        for t, t_prev in self.ddim_pairs(steps):
            prediction = predict(x, torch.full((len(x),), t, device=x.device))
            x = self.ddim_step(x, t, t_prev, prediction, eta, draw() if eta else None)
            yield x

    def ddim_invert(self, predict: Callable, x: Tensor, steps: int) -> Iterator:
        """Yield x (B, ...) after each step of DDIM run backwards, from a clean x to its noise x_T.

        The UNet is given the timestep that a step goes to, as in Mokady et al. 2022 and diffusers.
        """
        for t, t_from in reversed(self.ddim_pairs(steps)):
            prediction = predict(x, torch.full((len(x),), t, device=x.device))
            x = self.ddim_step(x, t_from, t, prediction)
            yield x

    def dpm_sample(self, predict: Callable, x: Tensor, steps: int, eta=0.0, draw=None) -> Iterator:
        """Yield x (B, ...) after each step of DPM-Solver++(2M) [5, algorithm 2], from noise.

        Each step is DDIM's (with eta, that of DPM-Solver++(2M) SDE), but its x_0 is extrapolated
        from the last two predictions to the middle of the step in log sigma. Noise levels sigma =
        sqrt((1 - a) / a) are evenly spaced in sigma^(1/7) [6, eq. 5]. Trap: with zero_snr or cosine
        betas the first sigma is (nearly) infinite, and most levels would be pure noise. Then the
        timesteps are DDIM's, and a_t is raised to at least 2^-24.
        """
        times = self.ddim_timesteps(steps)  # raises for steps out of range
        table = (1 / self.alphas_cumprod.clamp(min=2**-24) - 1).sqrt()
        sigmas = table[times]
        if table[-1] < 100:
            ends = table ** (1 / 7)
            sigmas = torch.linspace(ends[-1], ends[0], steps, dtype=torch.float64) ** 7
            times = (sigmas.log()[:, None] - table.log()).abs().argmin(1).tolist()
        sigmas = [*sigmas.tolist(), 0.0]
        x_0_before = ratio_before = None
        for t, sigma, sigma_prev in zip(times, sigmas, sigmas[1:]):
            out = predict(x, torch.full((len(x),), t, device=x.device))
            signal, ratio = (1 + sigma**2) ** -0.5, sigma_prev / sigma
            z = x / signal  # x_0 + sigma * eps
            x_0 = z - sigma * out if self.prediction == "eps" else signal * (x - sigma * out)
            middle = x_0
            if x_0_before is not None and ratio:  # not in the last step, where log(ratio) is -inf
                middle = x_0 + (x_0 - x_0_before) * (log(ratio) / (2 * log(ratio_before)))
            z = middle + ratio ** (1 + eta) * (z - middle)
            if eta:
                z = z + sigma_prev * (1 - ratio ** (2 * eta)) ** 0.5 * draw()
            x = z * (1 + sigma_prev**2) ** -0.5
            yield x
            x_0_before, ratio_before = x_0, ratio


# Samplers by name: the function, its default number of steps, its name in other programs.
SAMPLERS = {
    "dpm++": (Schedule.dpm_sample, 14, "DPM++ 2M Karras"),
    "ddim": (Schedule.ddim_sample, 50, "DDIM"),
}
