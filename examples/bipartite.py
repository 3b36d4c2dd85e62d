"""Bipartite inversion (appendix E, figure 15 left): a picture's own noise, under new prompts.

    python examples/bipartite.py
    python examples/bipartite.py --concept cat.safetensors --image cat.jpg --model sd.ckpt

x_T is found by DDIM run backwards under "A photo of S*" without guidance; then other prompts start
from it, at several guidance scales: a low one keeps the structure, a high one obeys the prompt. And
the error of the round trip, there and back under one prompt: it falls as steps grow, for a step of
the inversion asks the model at a place where the way back does not quite pass.
"""

from functools import partial
from pathlib import Path

import torch
from experiment import Lab, options, pictures
from sheet import sheet

import textinv

PROMPTS = (
    "A photo of {}",
    "A photo of {} on the beach",
    "A sketch of {}",
    "A photo of {} at night",
)
SCALES = (1, 1.5, 2, 3, 5)


def main(argv=None) -> None:
    parser = options(__doc__, samples=1, steps=100)
    parser.add_argument("--concept", default="teddy", help="a set, or a word's file")
    parser.add_argument("--image", help="the picture; the set's second one by default")
    args = parser.parse_args(argv)
    if not args.image and Path(args.concept).is_file():
        parser.error("a word of your own needs --image, a picture of the thing")
    lab = Lab.of(args)
    word = lab.word(args.concept)
    texts = [prompt.replace("{}", word.placeholder) for prompt in PROMPTS]
    image = args.image or textinv.find_images(pictures(args.concept))[1]
    source = textinv.prepare_images([image], lab.model.size)
    latents = lab.model.encode_images(source)

    given = textinv.conditions(lab.model, texts[:1], [word], guidance_scale=1)
    invert = partial(lab.model.schedule.ddim_invert, partial(lab.model.guided, **given), latents)
    for steps in (5, 10, 20) if args.quick else (10, 25, 50, 100, 250, 500):
        *_, x_T = invert(steps)
        back = textinv.denoise(lab.model, x_T, steps, **given)
        error = (back - latents).square().mean().sqrt() / latents.std()
        print(f"{steps:4} steps there and back: error {error:.4f} of the latents' deviation")

    *_, x_T = invert(args.steps)
    rows = {"the picture, and as the autoencoder has it": textinv.to_pil(source)}
    rows[next(iter(rows))] += textinv.to_pil(lab.model.decode_latents(latents))
    for text in texts[: 2 if args.quick else None]:
        drawn = []
        for scale in SCALES[: 2 if args.quick else None]:
            given = textinv.conditions(lab.model, [text], [word], scale)
            drawn.append(textinv.denoise(lab.model, x_T, args.steps, **given))
        rows[text] = textinv.to_pil(lab.model.decode_latents(torch.cat(drawn)))
    lab.save("bipartite.png", sheet(rows, [f"guidance {scale}" for scale in SCALES]))


if __name__ == "__main__":
    main()
