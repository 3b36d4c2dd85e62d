"""Noising and sampling against CompVis' samplers (golden numbers) and diffusers' schedulers (live).

The random networks behind the golden numbers are no denoisers: their samples grow far beyond a
standard deviation of 1, and inversion does not come back. States are compared, not round trips.
"""

import json
from functools import cache
from itertools import count

import pytest
import torch
from helpers import (
    CHAIN,
    EXACT,
    FAMILIES,
    GOLDEN,
    STEP,
    UNET,
    assert_close_std,
    golden,
    schedule,
    tiny_autoencoder,
    tiny_text_encoder,
    tiny_unet,
)

from models.latent_diffusion import LatentDiffusion
from models.schedule import Schedule

TIMESTEPS = json.loads((GOLDEN / "expected/schedule.json").read_text())["timesteps"]


@cache
def predictor(family: str, scale: float = 1.0):
    """The tiny model's prediction, guided, for the second of the golden prompts."""
    parts = tiny_unet(family), tiny_autoencoder(family), tiny_text_encoder(family)
    model = LatentDiffusion(*parts, None, schedule(family), family)
    uncond, context = golden(family)["text.out"][:2, None]
    return lambda x, t: model.guided(x, t, context.expand(len(x), -1, -1), uncond, scale)


def noises(family: str):
    """`draw` for the golden trajectories: step i adds noise i % 10."""
    step = count()
    return lambda: golden(family)["ddim.noise"][next(step) % 10][None]


def at(t: int) -> torch.Tensor:
    return torch.tensor([t])


# ------------------------------------------------------------------------------------- noising


def test_betas_and_alphas_cumprod():
    g, ours = golden("schedule"), schedule("sd1")
    assert ours.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(ours.betas, g["betas_f64"], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.alphas_cumprod, g["alphas_cumprod_f64"], rtol=1e-12, atol=0)
    # diffusers computes in float32.
    assert_close_std(ours.betas, g["diffusers_betas"], EXACT)
    assert_close_std(ours.alphas_cumprod, g["diffusers_alphas_cumprod"], EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_noising_and_back(family):
    g, ours = golden(family), schedule(family)
    x_t = ours.q_sample(g["diff.x0"], g["diff.t"], g["diff.noise"])
    assert_close_std(x_t, g["diff.q_sample"], EXACT)
    target = ours.target(g["diff.x0"], g["diff.t"], g["diff.noise"])
    assert_close_std(target, g["diff.v_target" if family == "sd2" else "diff.noise"], EXACT)
    x_0, eps = ours.x_0_and_eps(g["diff.q_sample"], g["diff.t"], target)
    assert_close_std(x_0, g["diff.x0_from_v" if family == "sd2" else "diff.x0_from_eps"], EXACT)
    assert_close_std(eps, g["diff.eps_from_v" if family == "sd2" else "diff.noise"], EXACT)


@pytest.mark.parametrize("prediction", ("eps", "v"))
def test_float64_stays_on_the_cpu(prediction):
    """Some devices have none; "meta" stands for them: mixed with the CPU it fails."""
    ours, t = Schedule(0.00085, 0.012, prediction), torch.tensor([3, 500])
    x, noise = torch.zeros(2, 4, 2, 2, device="meta"), torch.zeros(2, 4, 2, 2, device="meta")
    assert ours.a(t, x).device.type == "cpu"
    for result in (
        *(ours.q_sample(x, t, noise), ours.target(x, t, noise)),
        *(ours.ddim_step(x, 500, 400, noise), ours.ddim_step(x, 500, 400, noise, 1, noise)),
    ):
        assert result.device.type == "meta" and result.dtype == torch.float32


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction type 'x0' is not known"):
        Schedule(0.00085, 0.012, "x0")


# ---------------------------------------------------------------------------------------- DDPM


@pytest.mark.parametrize("family", FAMILIES)
def test_ddpm_step(family):
    """One ancestral step from each of the timesteps 0, 1, 500 and 999."""
    g, ours = golden(family), schedule(family)
    context = g["text.out"][1:2].expand(4, -1, -1)
    prediction = tiny_unet(family)(g["diff.q_sample"], g["diff.t"], context)
    assert_close_std(prediction, g["ddpm.model_out"], UNET)
    if "ddpm.step" in g:
        rows = (g["diff.q_sample"], g["diff.t"], g["ddpm.model_out"], g["ddpm.noise"])
        for x, t, out, noise, row in zip(*rows, g["ddpm.step"]):
            step = ours.ddim_step(x[None], int(t), int(t) - 1, out[None], 1, noise[None])
            assert_close_std(step, row[None], STEP)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name, times, t_prevs",
    (
        ("ldm_first5", range(999, 994, -1), range(998, 993, -1)),
        ("ldm_last5", range(4, -1, -1), range(3, -2, -1)),
        ("diffusers_chain_S10_offset0", range(900, -1, -100), range(800, -101, -100)),
        ("diffusers_chain_S10_offset1", range(901, 0, -100), range(801, -100, -100)),
    ),
)
def test_ddpm_chain(family, name, times, t_prevs):
    g, ours, predict = golden(family), schedule(family), predictor(family)
    if f"ddpm.{name}" not in g:
        assert family == "sd2"  # its original code has no DDPM sampler that knows v
        return
    x, draw = g["ddim.xT"], noises(family)
    for t, t_prev in zip(times, t_prevs, strict=True):
        x = ours.ddim_step(x, t, t_prev, predict(x, at(t)), 1, draw())
    assert_close_std(x, g[f"ddpm.{name}"], STEP)


# ---------------------------------------------------------------------------------------- DDIM


def assert_same_list(ours: list[int], recorded: list) -> None:
    """The record keeps the first entries and the last of a long list, with "..." between."""
    if "..." in recorded:
        gap = recorded.index("...")
        ours = ours[:gap] + ["..."] + ours[gap + 1 - len(recorded) :]
    assert ours == recorded


@pytest.mark.parametrize("steps", [int(s) for s in TIMESTEPS])
def test_ddim_timesteps(steps):
    """As the original, counted upwards, but exactly `steps` of them.

    Where `steps` does not divide 1000, range(0, 1000, 1000 // steps) makes one more in the
    original (7 -> 8, 30 -> 31), and adding 1 overruns the table for 333, 999 and 1000; diffusers
    cuts the list to `steps`, and overruns for 1000 alone. Ours is diffusers' list, and for 1000
    steps every timestep.
    """
    ours, entry = schedule("sd1").ddim_timesteps(steps), TIMESTEPS[str(steps)]
    assert len(ours) == steps
    if steps == 1000:
        assert ours == list(range(999, -1, -1))
        return
    assert_same_list(ours, entry["diffusers_leading_offset1"])
    if "diffusers_inverse_offset1" in entry:
        assert_same_list(ours[::-1], entry["diffusers_inverse_offset1"])
    # The original's list goes on where `steps` does not divide 1000.
    original = [t + 1 for t in range(0, 1000, 1000 // steps)]
    assert_same_list(original, entry["ldm_uniform"])
    assert ours[::-1] == original[:steps]
    assert len(original) == entry["ldm_uniform_count"] == steps + (1000 % steps > 0)


@pytest.mark.parametrize("steps", (0, -1, 1001))
def test_ddim_timesteps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"steps {steps} is out of range"):
        schedule("sd1").ddim_timesteps(steps)


def test_ddim_coefficients():
    """alphas, alphas of the step before, and sigmas of eta 1; the original's are of float32."""
    g, ours = golden("schedule"), schedule("sd1")
    times = ours.ddim_timesteps(50)[::-1]
    a_t, a_prev = ours.alphas_cumprod[times], ours.alphas_cumprod[[0] + times[:-1]]
    assert_close_std(a_t, g["ldm_S50_alphas"], EXACT)
    assert_close_std(a_prev, g["ldm_S50_alphas_prev"], EXACT)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    sigmas = [  # what is left of a step of nothing but noise
        ours.ddim_step(zero, t, t_prev, zero, 1.0, one).item()
        for t, t_prev in zip(times, [0] + times)
    ]
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    assert_close_std(sigmas, g["ldm_S50_eta1_sigmas"], EXACT)


@pytest.mark.parametrize("scale", (1, 7.5))
@pytest.mark.parametrize("eta", (0, 1))
@pytest.mark.parametrize("steps", (10, 50))
@pytest.mark.parametrize("family", FAMILIES)
def test_ddim_trajectory(family, steps, eta, scale):
    """Against the original sampler, ten or five states, and diffusers', the last state."""
    g, run = golden(family), f"S{steps}.eta{eta}.g{scale}"
    reference = g[f"ddim.ldm.{run}"]
    tolerance = CHAIN if scale == 1 else 2e-2 if family == "sd2" else 5e-4
    states = list(
        schedule(family).ddim_sample(
            predictor(family, scale), g["ddim.xT"], steps, eta, noises(family)
        )
    )
    assert len(states) == steps
    every = steps // len(reference)
    for ours, theirs in zip(states[every - 1 :: every], reference[:, None], strict=True):
        assert_close_std(ours, theirs, tolerance)
    assert_close_std(states[-1], g[f"ddim.diffusers_sd.{run}"], tolerance)


@pytest.mark.parametrize("scale", (1, 7.5))
@pytest.mark.parametrize("eta", (0, 1))
@pytest.mark.parametrize("family", FAMILIES)
def test_ddim_each_step_from_its_recorded_state(family, eta, scale):
    """Tighter than the whole trajectory, in which SD 2's guided steps are chaotic."""
    g, ours, predict = golden(family), schedule(family), predictor(family, scale)
    after = g[f"ddim.ldm.S10.eta{eta}.g{scale}"][:, None]
    before = [g["ddim.xT"], *after[:-1]]
    times, draw = ours.ddim_timesteps(10), noises(family)
    for x, t, t_prev, reference in zip(before, times, times[1:] + [0], after):
        prediction = predict(x, at(t))
        state = ours.ddim_step(x, t, t_prev, prediction, eta, draw())
        assert_close_std(state, reference, STEP)
    x_0, _ = ours.x_0_and_eps(x, t, prediction)
    assert_close_std(x_0, g[f"ddim.ldm.S10.eta{eta}.g{scale}.pred_x0"], STEP)


@pytest.mark.parametrize("steps", (10, 50))
@pytest.mark.parametrize("family", FAMILIES)
def test_ddim_inversion(family, steps):
    g, ours, predict = golden(family), schedule(family), predictor(family)
    reference = g[f"inv.S{steps}"]
    states = list(ours.ddim_invert(predict, g["inv.x0"], steps))
    every = steps // len(reference)
    for state, theirs in zip(states[every - 1 :: every], reference[:, None], strict=True):
        # Rounding adds up: LDM's recorded last state of 50 is itself 6e-5 from float64's.
        assert_close_std(state, theirs, 2 * CHAIN)
    *_, x_0 = ours.ddim_sample(predict, reference[-1:], steps)
    assert_close_std(x_0, g[f"inv.S{steps}.reconstructed"], CHAIN)


@pytest.mark.parametrize("family", ("sd1", "sd2"))
def test_image_to_image(family):
    """The original's img2img, which noises to one timestep above the first that it denoises."""
    g, ours, predict = golden(family), schedule(family), predictor(family, 7.5)
    times = ours.ddim_timesteps(10)
    x = ours.q_sample(g["inv.x0"], at(times[-7]), g["ddim.noise"][:1])
    assert_close_std(x, g["img2img.encoded_t6of10"], EXACT)
    for t, t_prev in zip(times[-6:], times[-5:] + [0]):
        x = ours.ddim_step(x, t, t_prev, predict(x, at(t)))
    assert_close_std(x, g["img2img.decoded_g7.5"], 2e-2 if family == "sd2" else 5e-4)


# --------------------------------------------------------------------------- live, diffusers


def live(name: str, steps: int, prediction: str, **options):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        **({} if name.startswith("DPM") else {"clip_sample": options.pop("clip_sample", False)}),
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        **options,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def draws(seed: int, shape=(2, 4, 8, 8)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("eta", (0.0, 0.4, 1.0))
@pytest.mark.parametrize("steps", (7, 30, 50))
@pytest.mark.parametrize("prediction", ("eps", "v"))
def test_live_ddim(prediction, steps, eta):
    scheduler = live("DDIMScheduler", steps, prediction, set_alpha_to_one=False)
    ours = Schedule(0.00085, 0.012, prediction)
    times = ours.ddim_timesteps(steps)
    assert times == scheduler.timesteps.tolist()
    for t, t_prev in zip(times, times[1:] + [0]):
        x, out, noise = draws(t)
        reference = scheduler.step(out, t, x, eta=eta, variance_noise=noise).prev_sample
        assert_close_std(ours.ddim_step(x, t, t_prev, out, eta, noise), reference, STEP)


@pytest.mark.parametrize("steps", (10, 50, 1000))
@pytest.mark.parametrize("prediction", ("eps", "v"))
def test_live_ddpm(prediction, steps):
    options = {"clip_sample": False, "variance_type": "fixed_small"}
    scheduler = live("DDPMScheduler", steps, prediction, **options)
    ours = Schedule(0.00085, 0.012, prediction)
    for t in scheduler.timesteps.tolist()[:: max(1, steps // 50)]:
        t -= steps == 1000  # diffusers' list, with the offset, overruns the table
        x, out, _ = draws(t)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        generator = torch.Generator().manual_seed(t)
        reference = scheduler.step(out, t, x, generator=generator).prev_sample
        mine = ours.ddim_step(x, t, t - 1000 // steps, out, 1, noise)
        assert_close_std(mine, reference, STEP)


@pytest.mark.parametrize("steps", (1, 2, 3, 15, 50, 1000))
@pytest.mark.parametrize("eta", (0.0, 1.0))
@pytest.mark.parametrize("prediction, zero_snr", (("eps", False), ("v", False), ("v", True)))
def test_live_dpm_solver(prediction, zero_snr, eta, steps):
    """Every state and timestep, by Karras' noise levels; trailing timesteps with zero_snr."""
    options = dict(solver_order=2, solver_type="midpoint", use_karras_sigmas=not zero_snr)
    options |= dict(rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing")
    options |= dict(algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++")
    scheduler = live("DPMSolverMultistepScheduler", steps, prediction, **options)
    ours = Schedule(0.00085, 0.012, prediction, zero_snr=zero_snr)
    x, asked, net = draws(0)[0], [], {t: draws(t)[:2] for t in scheduler.timesteps.tolist()}

    def predict(x, t):
        asked.append(t[0].item())
        return net[asked[-1]][0] / 2 + x / 3

    states = ours.dpm_sample(predict, x, steps, eta, lambda: net[asked[-1]][1])
    for t, mine in zip(scheduler.timesteps, states, strict=True):
        out = net[t.item()][0] / 2 + x / 3
        x = scheduler.step(out, t, x, variance_noise=net[t.item()][1]).prev_sample
        assert_close_std(mine, x, CHAIN)
    assert asked == scheduler.timesteps.tolist()


SCHEDULES = (
    dict(beta_schedule="linear"),
    dict(beta_schedule="squaredcos_cap_v2"),
    dict(trained_betas=[0.01 + 0.0001 * i for i in range(100)]),
    dict(timestep_spacing="trailing"),
    dict(timestep_spacing="linspace"),
    dict(steps_offset=0),
)


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: "-".join(map(str, o.items()))[:40])
def test_live_schedules(options):
    """Noise levels and timesteps of schedulers that are configured in another way."""
    diffusers = pytest.importorskip("diffusers")
    usual = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    length = len(options.get("trained_betas", range(1000)))
    theirs = diffusers.DDIMScheduler(num_train_timesteps=length, **usual | options)
    ours = {k.replace("timestep_", ""): v for k, v in options.items()}
    ours = Schedule(length=length, **ours)
    assert_close_std(ours.alphas_cumprod, theirs.alphas_cumprod, EXACT)
    for steps in (1, 4, 7, 50, 100):
        theirs.set_timesteps(steps)
        times = theirs.timesteps.tolist()
        assert ours.ddim_timesteps(steps) == [t - (times[0] == length) for t in times]


def test_unknown_schedules():
    with pytest.raises(ValueError, match="beta_schedule 'sigmoid'"):
        Schedule(beta_schedule="sigmoid")
    with pytest.raises(ValueError, match="timestep_spacing 'middle'"):
        Schedule(spacing="middle")


@pytest.mark.parametrize("steps", (1, 3, 30, 334, 400, 501, 600, 999, 1000))
def test_every_number_of_steps_begins_in_noise(steps):
    """The step that would follow upwards is beyond the schedule, or nearly."""
    times = Schedule(0.00085, 0.012).ddim_timesteps(steps)
    assert len(set(times)) == steps and times == sorted(times, reverse=True)
    assert 0 <= times[-1] <= 1 and times[0] <= 999
    assert times[0] + 1000 / steps >= 949


@pytest.mark.parametrize("steps", (7, 50))
@pytest.mark.parametrize("prediction", ("eps", "v"))
def test_live_inversion(prediction, steps):
    scheduler = live("DDIMInverseScheduler", steps, prediction, set_alpha_to_one=False)
    ours = Schedule(0.00085, 0.012, prediction)
    times = scheduler.timesteps.tolist()
    x, out, _ = draws(0)
    asked = []

    def predict(x, t):
        asked.append(t[0].item())
        return out * t[0] / 1000

    reference = x
    for t, mine in zip(times, ours.ddim_invert(predict, x, steps), strict=True):
        reference = scheduler.step(out * t / 1000, t, reference).prev_sample
        assert_close_std(mine, reference, STEP)
    assert asked == times
