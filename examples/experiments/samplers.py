"""How far few steps of each sampler are from the solution of 1,000 DDIM steps, from the same noise.

    python examples/experiments/samplers.py    # half an hour on one CPU core

64 prompts, a picture each, at the model's own guidance scale. A distance is that of the latents,
relative to the solution's norm. The solution is kept in samplers.pt.
"""

from functools import partial

import repository  # noqa: F401
import torch
from common import Workspace, make_parser, run_script

import textinv
from models.files import write_table
from models.schedule import SAMPLERS

THINGS = "apple banana penguin panda rocket car house hamburger".split()
SCENES = "a photo of {} on the moon, a photo of {} on the beach, a photo of {} at night, "
SCENES += "a photo of {} in the snow, a sketch of {}, pixel art of {}, an oil painting of {}, "
SCENES = (SCENES + "a black and white photo of {}").split(", ")


@torch.no_grad()
def main(argv=None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    workspace = Workspace.open(args)
    model = workspace.model
    prompts = [scene.format(thing) for thing in THINGS for scene in SCENES]
    prompts = prompts[: 4 if args.quick else None]
    shape, seeds = model.latent_shape((model.size, model.size)), range(len(prompts))
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in seeds]
    noise = torch.stack(noise).to(model.device)
    context, uncond = model.conditioning(prompts)
    scale = textinv.guidance_of(model, None)
    predict = partial(model.guided, context=context, uncond=uncond, guidance_scale=scale)

    def solve(sampler: str, steps: int) -> torch.Tensor:
        for latents in SAMPLERS[sampler][0](model.schedule, predict, noise, steps):
            pass
        return latents.flatten(1).cpu()

    path, rows = workspace.out / "samplers.pt", []
    if not path.exists():
        workspace.out.mkdir(parents=True, exist_ok=True)
        torch.save(solve("ddim", 100 if args.quick else 1000), path)
    solution = torch.load(path)
    for sampler, steps in (("ddim", 20), ("ddim", 50), *(("dpm++", n) for n in range(10, 21))):
        distance = (solve(sampler, steps) - solution).norm(dim=1) / solution.norm(dim=1)
        figures = dict(mean=distance.mean(), median=distance.median(), most=distance.max())
        figures = {key: f"{figure:.4f}" for key, figure in figures.items()}
        rows.append(dict(sampler=sampler, steps=steps) | figures)
        print(*rows[-1].values(), flush=True)
    write_table(workspace.out / "samplers.csv", rows, overwrite=True)


if __name__ == "__main__":
    run_script(main)
