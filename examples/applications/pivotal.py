"""Pivotal tuning (appendices E and G; Roich et al. 2021): after the word, the model around it.

    python examples/applications/pivotal.py                               # the bundled teddy
    python examples/applications/pivotal.py --images cat/ --concept cat.safetensors --model sd.ckpt

First the word is learnt as always: the pivot. Then the UNet's attention is tuned, so that prompts
with the word show the pictures better. What changed is saved in a folder of its own, as a
difference to the model; --export FILE writes a whole checkpoint. The picture shows the word before
and after, by guidance scale.
"""

import random
from collections.abc import Callable
from pathlib import Path

import repository  # noqa: F401
from common import CONCEPTS, Workspace, concept_folder, make_parser, run_script, sheet
from difference import add_difference, check_export, export, save_difference
from torch import Tensor
from tqdm import tqdm
from tuning import training_batches, tune, weights

import textinv

PROMPTS = ("a photo of a {}", "a photo of a {} under water", "a sketch of a {}")
SCALES = (1.0, 3.0, 7.0)


def loss_of(model, images, word, batch_size: int) -> Callable[[int], Tensor]:
    """Return the loss of a step's number: that of `textinv.train`, with a finished word."""
    batch = training_batches(model, images, batch_size, flip=True)

    def loss(step: int) -> Tensor:
        _, latents, t, noise = batch(step)
        templates = random.Random(step).choices(textinv.OBJECT_TEMPLATES, k=batch_size)
        prompts = [template.replace("{}", word.placeholder) for template in templates]
        context = model.encode_text(prompts, [word])
        return textinv.diffusion_loss(model, latents, context, t, noise)

    return loss


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=2, steps=50)
    parser.add_argument("--concept", default="teddy", help="a set, or a word's file")
    parser.add_argument("--images", help="what it was learnt from; the set's pictures by default")
    parser.add_argument("--tuning-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", default="attn", help="names of weights to tune; '' for all")
    parser.add_argument("--export", type=Path, metavar="FILE", help="also a whole checkpoint")
    args = parser.parse_args(argv)
    if args.concept not in CONCEPTS and not args.images:
        parser.error("--images is missing: the folder of pictures that the word was learnt from")
    if args.export:
        check_export(args.model, args.export)  # before an hour of tuning
    workspace = Workspace.open(args)
    model, word = workspace.model, workspace.word(args.concept)
    path = workspace.path("pivotal", f"{Path(args.concept).stem}.safetensors")
    texts = [prompt.format(word.placeholder) for prompt in PROMPTS]
    drawn = {}
    for when in ("before", "after"):
        if when == "after" and path.exists():
            add_difference(model, path)
        elif when == "after":
            before = weights(model, args.layers)
            images = args.images or concept_folder(args.concept)
            loss = loss_of(model, images, word, args.batch_size)
            steps = tune(model, loss, args.tuning_steps, args.lr, args.layers)
            for _ in tqdm(steps, total=args.tuning_steps, unit="step"):
                pass
            save_difference(path, model, before)
        for text in texts:
            groups = [workspace.draw(text, [word], guidance_scale=scale) for scale in SCALES]
            drawn[text, when] = [picture for group in groups for picture in group]
    rows = {f"{text}, {when}": drawn[text, when] for text in texts for when in ("before", "after")}
    columns = [f"guidance {scale:g}" for scale in SCALES for _ in range(args.n)]
    workspace.save("pivotal.png", sheet(rows, columns))
    if args.export:
        export(args.model, path, args.export)


if __name__ == "__main__":
    run_script(main)
