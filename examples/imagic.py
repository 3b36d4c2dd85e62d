"""Imagic (Kawar et al. 2022), which appendix H compares with: one picture, edited by a text.

    python examples/imagic.py
    python examples/imagic.py --image dog.jpg --prompt "a photo of a sitting dog" --model sd.ckpt

Three stages: the embedding of the target text is optimised until it describes the picture; the
UNet's attention is tuned to draw the picture from it; samples are drawn from mixtures of the two
embeddings, from the picture's (0) to the target's (1). The picture keeps its place and pose, where
a learnt word brings the thing alone into new scenes: the first row.
"""

from functools import partial

import torch
from experiment import Lab, options, pictures
from sheet import sheet
from tuning import tune

import textinv

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def losses(model, image):
    """loss(context, step) on one picture; four draws of t and noise a step."""
    mean, std = textinv.latent_moments(model, textinv.prepare_images([image], model.size))

    def loss(context, step: int) -> torch.Tensor:
        _, generator = textinv.draws_of_step(0, step)
        _, latents, t, noise = textinv.draw_batch(model, mean, std, 4, generator)
        return textinv.diffusion_loss(model, latents, context.expand(4, -1, -1), t, noise)

    return loss


def optimized(context: torch.Tensor, loss, steps: int, lr: float) -> torch.Tensor:
    """The context (1, L, D), moved to where it describes the picture."""
    context = context.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([context], lr)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(context, step).backward()
        optimizer.step()
    return context.detach()


def draw(lab: Lab, context: torch.Tensor, seed: int):
    """A picture of a context (1, L, D)."""
    model, given = lab.model, textinv.conditions(lab.model, [""]) | dict(context=context)
    shape = (1, *model.latent_shape((model.size, model.size)))
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    latents = textinv.denoise(model, x_T, lab.sampling["steps"], **given)
    return textinv.to_pil(model.decode_latents(latents))[0]


def main(argv=None) -> None:
    parser = options(__doc__, samples=2, steps=50)
    parser.add_argument("--image", default=str(pictures("teddy") / "2.png"))
    parser.add_argument("--prompt", default="a photo of a bear in the snow", help="the target")
    parser.add_argument("--concept", default="teddy", help="a set, or a word's file, beside it")
    parser.add_argument("--tuning-steps", type=int, default=400, help="of each stage")
    parser.add_argument("--word-prompt", default="a photo of a {} in the snow")
    args = parser.parse_args(argv)
    lab = Lab.of(args)
    word = lab.word(args.concept)
    text = args.word_prompt.replace("{}", word.placeholder)
    rows = {f"learnt word, other seeds: {text}": lab.draw(text, [word], n=len(SHARES))}
    loss, target = losses(lab.model, args.image), lab.model.encode_prompts([args.prompt])
    found = optimized(target, loss, args.tuning_steps, lr=1e-2)
    for _ in tune(lab.model, partial(loss, found), args.tuning_steps, lr=1e-4, layers="attn"):
        pass
    rows["the picture"] = [textinv.open_image(args.image)]
    for seed in range(args.n):
        mixed = [draw(lab, found.lerp(target, share), seed) for share in SHARES]
        rows[f"Imagic: {args.prompt}, seed {seed}"] = mixed
    lab.save("imagic.png", sheet(rows, [f"{share:g} of the target" for share in SHARES]))


if __name__ == "__main__":
    main()
