"""The noise schedule, and what follows from it: noising, targets, and the samplers.

[1] Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (DDPM)
[2] Song et al. 2021, "Denoising Diffusion Implicit Models" (DDIM)
[3] Salimans & Ho 2022, "Progressive Distillation" (v-prediction)
[4] Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed"
[5] Lu et al. 2022, "DPM-Solver++" (2M: second order, from the last two predictions)
[6] Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"
[7] Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models"

A sampler is a loop over steps, and a row of SAMPLERS at the end.
"""

from collections.abc import Callable, Iterator, Sequence
from math import log, pi

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t, t (B,)) -> prediction of x_t's shape
Draw = Callable[[], Tensor] | None  # standard noise of x's shape, drawn once a step with eta


def betas_of(kind: str, start: float, end: float, length: int) -> Tensor:
    """Return betas (length,), float64, that rise as `kind` says, in the words of diffusers."""
    if kind == "scaled_linear":  # linear in the square root, as in LDM and Stable Diffusion
        return torch.linspace(start**0.5, end**0.5, length, dtype=torch.float64).square()
    if kind == "linear":  # [1]
        return torch.linspace(start, end, length, dtype=torch.float64)
    if kind == "squaredcos_cap_v2":  # [7, eq. 17]
        s = torch.linspace(0, 1, length + 1, dtype=torch.float64)
        a = ((s + 0.008) / 1.008 * pi / 2).cos().square()
        return (1 - a[1:] / a[:-1]).clamp(max=0.999)
    raise ValueError(
        f"beta_schedule {kind!r} is not supported; use scaled_linear, linear or squaredcos_cap_v2"
    )


class Schedule:
    """The share of noise at each of `length` timesteps.

    `prediction` says what the UNet returns: "eps", the noise [1], or "v" [3]. `zero_snr`: the last
    timestep is noise alone [4], and sampling starts there. `trained_betas`: all betas, in place of
    a rule. `spacing` ("leading", "trailing", "linspace") and `steps_offset` of the sampler's
    timesteps are those of diffusers' schedulers.
    `alphas_cumprod` (length,) is a_t, the share of signal variance left at timestep t: float64 on
    the CPU, where every coefficient is computed before it meets a picture in float32.
    """

    def __init__(
        self,
        beta_start: float = 0.00085,  # LDM text2img-large and Stable Diffusion alike
        beta_end: float = 0.012,
        prediction: str = "eps",
        length: int = 1000,
        zero_snr: bool = False,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        spacing: str | None = None,
        steps_offset: int = 1,
    ):
        if prediction not in ("eps", "v"):
            raise ValueError(f"prediction type {prediction!r} is not known; use 'eps' or 'v'")
        if zero_snr and prediction == "eps":
            raise ValueError("noise alone does not tell a picture from eps; use --prediction v")
        if spacing not in (None, "leading", "trailing", "linspace"):
            raise ValueError(f"timestep_spacing {spacing!r} is not supported; use leading")
        self.prediction = prediction
        self.zero_snr = zero_snr
        self.spacing = spacing or ("trailing" if zero_snr else "leading")
        self.steps_offset = steps_offset
        if trained_betas is None:
            self.betas = betas_of(beta_schedule, beta_start, beta_end, length)
        else:
            self.betas = torch.tensor(trained_betas, dtype=torch.float64)
        self.length = len(self.betas)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        if zero_snr:  # [4, algorithm 1]: sqrt(a_t) shifted to end at 0, and scaled to keep a_0
            root = self.alphas_cumprod.sqrt()
            self.alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()

    def a(self, t: Tensor | int, like: Tensor) -> Tensor:
        """a_t for timesteps t (B,) or a number, shaped to multiply `like` (B, ...); float64, on the
        CPU (MPS knows no float64).

        Before the first timestep (t < 0) nothing is noised: a_t is 1.
        """
        t = torch.as_tensor(t).cpu()
        a = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])
        return a.reshape(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x_0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """A sample of q(x_t | x_0) [1, eq. 4]: x_0 (B, ...) noised to timesteps t (B,), or one."""
        a = self.a(t, x_0)
        return a.sqrt().to(x_0) * x_0 + (1 - a).sqrt().to(x_0) * noise

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the UNet should return for q_sample(x_0, t, noise)."""
        if self.prediction == "eps":
            return noise
        a = self.a(t, x_0)
        return a.sqrt().to(x_0) * noise - (1 - a).sqrt().to(x_0) * x_0

    def x_0_and_eps(self, x_t: Tensor, t: Tensor | int, prediction: Tensor):
        """The clean picture and the noise that the UNet's prediction stands for, (x_0, eps)."""
        a = self.a(t, x_t)
        signal, sigma = a.sqrt().to(x_t), (1 - a).sqrt().to(x_t)
        if self.prediction == "eps":
            return (x_t - sigma * prediction) / signal, prediction
        return signal * x_t - sigma * prediction, signal * prediction + sigma * x_t

    def ddim_step(
        self, x_t: Tensor, t: int, t_prev: int, prediction: Tensor, eta: float = 0.0, noise=None
    ) -> Tensor:
        """x at `t_prev` from x at `t` [2, eq. 12].

        eta 0 draws no noise: the predicted x_0 is noised anew with the predicted eps. Such a step
        may also go up (t_prev > t), which is DDIM inversion. eta 1 is DDPM [1, eq. 6 and 7]: a
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
        """Return `steps` timesteps, falling: 981, 961, ..., 21, 1 for 50 steps.

        Traps: they start at 1, not at 0, as in the paper's sampler. And they are a whole stride
        apart, which for 600 of 1000 would begin in half noise, at 600; where that cuts off more
        than a twentieth, strides differ by one.
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
        # Less than the offset only if that would overrun.
        first = min(self.steps_offset, self.length - 1 - stride * (steps - 1))
        return [first + stride * i for i in reversed(range(steps))]

    def ddim_pairs(self, steps: int) -> list[tuple[int, int]]:
        """(t, t_prev) of each step of DDIM, falling.

        Trap: the last one ends at a_0, the first entry of `alphas_cumprod`, not at 1.
        """
        times = self.ddim_timesteps(steps)
        return list(zip(times, times[1:] + [0]))

    def ddim_sample(
        self, predict: Predict, x: Tensor, steps: int, eta: float = 0.0, draw: Draw = None
    ) -> Iterator[Tensor]:
        """Yield every state of DDIM from noise x (B, ...) down to a clean one.

        eta is 0 to 1. With 1 it is DDPM, and Euler ancestral, which differs only in its timesteps.
        """
        for t, t_prev in self.ddim_pairs(steps):
            prediction = predict(x, torch.full((x.shape[0],), t, device=x.device))
            x = self.ddim_step(x, t, t_prev, prediction, eta, draw() if eta else None)
            yield x

    def dpm_sample(
        self, predict: Predict, x: Tensor, steps: int, eta: float = 0.0, draw: Draw = None
    ) -> Iterator[Tensor]:
        """Yield every state of DPM-Solver++(2M) [5, algorithm 2], from noise x (B, ...) down.

        Each step is DDIM's (with eta, DPM-Solver++(2M) SDE's) with another x_0: extrapolated from
        the last two predictions to the middle of the step in log sigma. Noise levels sigma =
        sqrt((1 - a) / a) are even in sigma^(1/7) [6, eq. 5]. Trap: with zero_snr (and cosine betas)
        the first is infinite (2^-24 stands for a_t) or nearly so, and most would be noise alone;
        there the timesteps are DDIM's.
        """
        times = self.ddim_timesteps(steps)  # raises for steps out of range
        table = (1 / self.alphas_cumprod.clamp(min=2**-24) - 1).sqrt()
        sigmas = table[times]
        if table[-1] < 100:
            ends = table ** (1 / 7)
            sigmas = torch.linspace(ends[-1], ends[0], steps, dtype=torch.float64) ** 7
            times = (sigmas.log()[:, None] - table.log()).abs().argmin(1).tolist()
        sigmas = [*sigmas.tolist(), 0.0]
        before = x
        for i, t in enumerate(times):
            sigma, sigma_prev = sigmas[i : i + 2]
            signal, ratio = (1 + sigma**2) ** -0.5, sigma_prev / sigma
            out = predict(x, torch.full((x.shape[0],), t, device=x.device))
            z = x / signal  # x_0 + sigma * eps
            x_0 = z - sigma * out if self.prediction == "eps" else signal * (x - sigma * out)
            middle = x_0
            if i and ratio:  # not in the first step, nor in the last, which ends at log 0
                middle = x_0 + (x_0 - before) * (log(ratio) / (2 * log(sigma / sigmas[i - 1])))
            z = middle + ratio ** (1 + eta) * (z - middle)
            if eta:
                z = z + sigma_prev * (1 - ratio ** (2 * eta)) ** 0.5 * draw()
            x, before = z * (1 + sigma_prev**2) ** -0.5, x_0
            yield x

    def ddim_invert(self, predict: Predict, x: Tensor, steps: int) -> Iterator[Tensor]:
        """DDIM run backwards, from a clean x (B, ...) up to its noise x_T; yields every state.

        The UNet is asked at the timestep that the step goes to (Mokady et al. 2022 and diffusers'
        inverse scheduler do the same).
        """
        for t, t_from in reversed(self.ddim_pairs(steps)):
            prediction = predict(x, torch.full((x.shape[0],), t, device=x.device))
            x = self.ddim_step(x, t_from, t, prediction)
            yield x


# A sampler by its name: the function, its default number of steps, its name in other programs.
SAMPLERS = {
    "dpm++": (Schedule.dpm_sample, 14, "DPM++ 2M Karras"),
    "ddim": (Schedule.ddim_sample, 50, "DDIM"),
}


def sampler_of(name: str, steps: int | None = None) -> tuple[Callable, int, str]:
    """Return the row of SAMPLERS with this name, with `steps` if they are given."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not known; use {', '.join(SAMPLERS)}")
    run, default, title = SAMPLERS[name]
    return run, default if steps is None else steps, title
