"""Local editing (appendix A.3, figure 10): learnt words painted into a picture.

    python examples/editing.py
    python examples/editing.py --image beach.jpg --mask mask.png --concepts cat.safetensors ...

What `python textinv.py edit IMAGE --mask MASK PROMPT` does, for several words; if no mask is given,
one that leaves a margin. The last row has no mask at all, and starts from more and more noise.
"""

from experiment import Lab, options, pictures
from PIL import Image, ImageDraw
from sheet import sheet

import textinv

STRENGTHS = (0.3, 0.5, 0.7, 0.9)


def middle(size: tuple[int, int]) -> Image.Image:
    """A mask that leaves a margin at the sides."""
    mask = Image.new("L", size)
    width, height = size
    ImageDraw.Draw(mask).rectangle((width // 16, height // 32, width - width // 16, height), 255)
    return mask


def main(argv=None) -> None:
    parser = options(__doc__, samples=4, steps=50)
    parser.add_argument("--image", default=str(pictures("teddy") / "2.png"))
    parser.add_argument("--mask", help="white where the picture may change")
    parser.add_argument("--concepts", nargs="+", default=["mushroom", "cupcake", "parrot"])
    parser.add_argument("--prompt", default="a photo of a {} on the beach")
    parser.add_argument("--whole", default="a photo of a {} in the snow", help="without a mask")
    args = parser.parse_args(argv)
    lab, image = Lab.of(args), textinv.open_image(args.image)
    mask = textinv.open_mask(args.mask, image.size) if args.mask else middle(image.size)
    rows = {"the picture, and the mask": [image, mask.convert("RGB")]}
    for name in args.concepts[: 1 if args.quick else None]:
        word = lab.word(name)
        text = args.prompt.replace("{}", word.placeholder)
        rows[text] = textinv.edit(lab.model, image, text, [word], mask, **lab.sampling)
    word = lab.word(args.concepts[0])
    text = args.whole.replace("{}", word.placeholder)
    rows[f"{text}, from strength {', '.join(map(str, STRENGTHS))}"] = [
        textinv.edit(lab.model, image, text, [word], strength=s, steps=args.steps)[0]
        for s in STRENGTHS
    ]
    lab.save("editing.png", sheet(rows))


if __name__ == "__main__":
    main()
