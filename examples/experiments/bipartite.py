"""Bipartite inversion (appendix E, figure 15 left): a picture's own noise, under new prompts.

    python examples/experiments/bipartite.py
    python examples/experiments/bipartite.py --concept cat.safetensors --image cat.jpg

x_T is found by DDIM run backwards under "A photo of S*" without guidance; then other prompts start
from it, at several guidance scales: a low one keeps the structure, a high one follows the prompt.
It also prints the error of the round trip, there and back under one prompt. The error falls with
the number of steps: each step of the inversion asks the model at a slightly different point than
the step back.
"""

from functools import partial
from pathlib import Path

import repository  # noqa: F401
import torch
from common import Workspace, concept_folder, make_parser, run_script, sheet

from models.images import find_images, prepare_images, to_pil

PROMPTS = (
    "A photo of {}",
    "A photo of {} on the beach",
    "A sketch of {}",
    "A photo of {} at night",
)
SCALES = (1, 1.5, 2, 3, 5)


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=1, steps=100)
    parser.add_argument("--concept", default="teddy", help="a set, or a word's file")
    parser.add_argument("--image", help="the picture; the set's second one by default")
    args = parser.parse_args(argv)
    if not args.image and Path(args.concept).is_file():
        parser.error("a word of your own needs --image, a picture of the thing")
    workspace = Workspace.open(args)
    model, word = workspace.model, workspace.word(args.concept)
    texts = [prompt.replace("{}", word.placeholder) for prompt in PROMPTS]
    image = args.image or find_images(concept_folder(args.concept))[1]
    source = prepare_images([image], model.size)
    latents = model.encode_images(source)

    context, uncond = model.conditioning(texts[:1], [word])
    given = dict(context=context, uncond=uncond, guidance_scale=1)
    invert = partial(model.schedule.ddim_invert, partial(model.guided, **given), latents)
    for steps in (5, 10, 20) if args.quick else (10, 25, 50, 100, 250, 500):
        *_, x_T = invert(steps)
        *_, back = model.schedule.ddim_sample(partial(model.guided, **given), x_T, steps)
        error = (back - latents).square().mean().sqrt() / latents.std()
        print(f"{steps:4} steps there and back: error {error:.4f} of the latents' deviation")

    *_, x_T = invert(args.steps)
    pictures = to_pil(torch.cat([source, model.decode_latents(latents).cpu()]))
    rows = {"the picture, and as the autoencoder has it": pictures}
    for text in texts[: 2 if args.quick else None]:
        drawn = []
        for scale in SCALES[: 2 if args.quick else None]:
            context, _ = model.conditioning([text], [word])
            given |= dict(context=context, guidance_scale=scale)
            predict = partial(model.guided, **given)
            drawn.append([*model.schedule.ddim_sample(predict, x_T, args.steps)][-1])
        rows[text] = to_pil(model.decode_latents(torch.cat(drawn)))
    workspace.save("bipartite.png", sheet(rows, [f"guidance {scale}" for scale in SCALES]))


if __name__ == "__main__":
    run_script(main)
