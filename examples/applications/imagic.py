"""Imagic (Kawar et al. 2022), which appendix H compares with: one picture, edited by a text.

    python examples/applications/imagic.py
    python examples/applications/imagic.py --image dog.jpg --prompt "a photo of a sitting dog"

It has three stages: the embedding of the target text is optimised until it describes the picture;
the UNet's attention is tuned to draw the picture from it; samples are drawn from mixtures of the
two embeddings, from the picture's (0) to the target's (1). So place and pose of the picture are
kept, where a learnt word brings only the thing into new scenes (first row).
"""

from functools import partial

import repository  # noqa: F401
import torch
from common import Workspace, concept_folder, make_parser, run_script, sheet
from tuning import training_batches, tune

import textinv
from models.images import open_image, to_pil

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def loss_of(model, image):
    """Return the loss of a context and a step's number on one picture, with four draws of t and
    noise in each step."""
    batch = training_batches(model, [image], batch_size=4, flip=False)

    def loss(context, step: int) -> torch.Tensor:
        _, latents, t, noise = batch(step)
        return textinv.diffusion_loss(model, latents, context.expand(4, -1, -1), t, noise)

    return loss


def optimized(context: torch.Tensor, loss, steps: int, lr: float) -> torch.Tensor:
    """Return the context (1, L, D), optimised to describe the picture."""
    context = context.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([context], lr)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(context, step).backward()
        optimizer.step()
    return context.detach()


def draw(workspace: Workspace, context: torch.Tensor, seed: int):
    """Return a picture of a context (1, L, D)."""
    model = workspace.model
    given = dict(context=context, uncond=model.encode_text([""]))
    given["guidance_scale"] = textinv.guidance_of(model, None)
    shape = (1, *model.latent_shape((model.size, model.size)))
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    predict, steps = partial(model.guided, **given), workspace.sampling["steps"]
    *_, latents = model.schedule.ddim_sample(predict, x_T, steps)
    return to_pil(model.decode_latents(latents))[0]


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=2, steps=50)
    parser.add_argument("--image", default=str(concept_folder("teddy") / "2.png"))
    parser.add_argument("--prompt", default="a photo of a bear in the snow", help="the target")
    parser.add_argument("--concept", default="teddy", help="a set, or a word's file, beside it")
    parser.add_argument("--tuning-steps", type=int, default=400, help="of each stage")
    parser.add_argument("--word-prompt", default="a photo of a {} in the snow")
    args = parser.parse_args(argv)
    workspace = Workspace.open(args)
    if workspace.model.family == "sdxl":
        parser.error("Imagic is not done for SDXL here; take another --model")
    word = workspace.word(args.concept)
    text = args.word_prompt.replace("{}", word.placeholder)
    rows = {f"learnt word, other seeds: {text}": workspace.draw(text, [word], n=len(SHARES))}
    loss = loss_of(workspace.model, args.image)
    target, _ = workspace.model.conditioning([args.prompt], [])
    found = optimized(target, loss, args.tuning_steps, lr=1e-2)
    for _ in tune(workspace.model, partial(loss, found), args.tuning_steps, lr=1e-4, layers="attn"):
        pass
    rows["the picture"] = [open_image(args.image)]
    for seed in range(args.n):
        mixed = [draw(workspace, found.lerp(target, share), seed) for share in SHARES]
        rows[f"Imagic: {args.prompt}, seed {seed}"] = mixed
    workspace.save("imagic.png", sheet(rows, [f"{share:g} of the target" for share in SHARES]))


if __name__ == "__main__":
    run_script(main)
