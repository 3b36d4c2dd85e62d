"""Local editing (appendix A.3, figure 10): learnt words painted into a picture.

    python examples/applications/editing.py
    python examples/applications/editing.py --image photo.jpg --concepts cat.safetensors

This is what edit.py does, for several words; the mask leaves a margin if none is given. The last
row has no mask at all, and starts from more and more noise.
"""

import repository  # noqa: F401
from common import Workspace, concept_folder, make_parser, run_script, sheet
from edit import edit, open_mask
from PIL import Image, ImageDraw

from models.images import open_image

STRENGTHS = (0.3, 0.5, 0.7, 0.9)


def middle(size: tuple[int, int]) -> Image.Image:
    """Return a mask that leaves a margin at the sides."""
    mask = Image.new("L", size)
    width, height = size
    ImageDraw.Draw(mask).rectangle((width // 16, height // 32, width - width // 16, height), 255)
    return mask


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=4, steps=50)
    parser.add_argument("--image", default=str(concept_folder("teddy") / "2.png"))
    parser.add_argument("--mask", help="white where the picture may change")
    parser.add_argument("--concepts", nargs="+", default=["mushroom", "cupcake", "parrot"])
    parser.add_argument("--prompt", default="a photo of a {} on the beach")
    parser.add_argument("--whole", default="a photo of a {} in the snow", help="without a mask")
    args = parser.parse_args(argv)
    workspace, image = Workspace.open(args), open_image(args.image)
    mask = open_mask(args.mask, image.size) if args.mask else middle(image.size)
    rows = {"the picture, and the mask": [image, mask.convert("RGB")]}
    for name in args.concepts[: 1 if args.quick else None]:
        word = workspace.word(name)
        text = args.prompt.replace("{}", word.placeholder)
        rows[text] = edit(workspace.model, image, text, [word], mask, **workspace.sampling)
    word = workspace.word(args.concepts[0])
    text = args.whole.replace("{}", word.placeholder)
    rows[f"{text}, from strength {', '.join(map(str, STRENGTHS))}"] = [
        edit(workspace.model, image, text, [word], strength=s, steps=args.steps)[0]
        for s in STRENGTHS
    ]
    workspace.save("editing.png", sheet(rows))


if __name__ == "__main__":
    run_script(main)
