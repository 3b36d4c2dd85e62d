"""Pivotal tuning (appendices E and G; Roich et al. 2021): after the word, the model around it.

    python examples/pivotal.py                               # the bundled teddy
    python examples/pivotal.py --images cat/ --concept cat.safetensors --model sd.ckpt

First the word is learnt as ever: the pivot. Then the UNet's attention is tuned, so that sentences
with the word show the pictures better. What changed is saved beside the word, as a difference to
the model; --export FILE writes a whole checkpoint. The picture has the word before and after, by
guidance scale.
"""

from collections.abc import Callable
from pathlib import Path

from difference import add_difference, export, save_difference
from experiment import Lab, options, pictures
from sheet import sheet
from torch import Tensor
from tqdm import tqdm
from tuning import tune, weights

import textinv

PROMPTS = ("a photo of a {}", "a photo of a {} under water", "a sketch of a {}")
SCALES = (1.0, 3.0, 7.0)


def loss_of(model, images, word, batch_size: int) -> Callable[[int], Tensor]:
    """The training loss of the step with that number, as `textinv.train` has it; the word rests."""
    given = dict(flip=True, per_image=False, batch_size=batch_size, seed=0)
    lesson = textinv.prepare(model, word, images, textinv.OBJECT_TEMPLATES, **given)
    return lambda step: lesson.loss(step)[0]


def main(argv=None) -> None:
    parser = options(__doc__, samples=2, steps=50)
    parser.add_argument("--concept", default="teddy", help="a set, or a word's file")
    parser.add_argument("--images", help="what it was learnt from; the set's pictures by default")
    parser.add_argument("--tuning-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", default="attn", help="names of weights to tune; '' for all")
    parser.add_argument("--export", type=Path, metavar="FILE", help="also a whole checkpoint")
    args = parser.parse_args(argv)
    lab = Lab.of(args)
    model, word = lab.model, lab.word(args.concept)
    path = lab.path("pivotal", f"{Path(args.concept).stem}.safetensors")
    texts = [prompt.format(word.placeholder) for prompt in PROMPTS]
    drawn = {}
    for when in ("before", "after"):
        if when == "after" and path.exists():
            add_difference(model, path)
        elif when == "after":
            before, images = weights(model, args.layers), args.images or pictures(args.concept)
            loss = loss_of(model, images, word, args.batch_size)
            steps = tune(model, loss, args.tuning_steps, args.lr, args.layers)
            for _ in tqdm(steps, total=args.tuning_steps, unit="step"):
                pass
            save_difference(path, model, before)
        for text in texts:
            groups = [lab.draw(text, [word], guidance_scale=scale) for scale in SCALES]
            drawn[text, when] = [picture for group in groups for picture in group]
    rows = {f"{text}, {when}": drawn[text, when] for text in texts for when in ("before", "after")}
    lab.save("pivotal.png", sheet(rows, [f"guidance {s:g}" for s in SCALES for _ in range(args.n)]))
    if args.export:
        export(args.model, path, args.export)


if __name__ == "__main__":
    main()
