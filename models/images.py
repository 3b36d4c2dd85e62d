"""Pictures in and out: files to tensors in [-1, 1], and back to PIL images.

A picture is shown to the model as the largest square in its middle, upright, in RGB, on white where
it is transparent; it is never stretched.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
Images = str | Path | Sequence[str | Path | Image.Image]


class NotFinite(ValueError):
    """NaN or infinity in training, in the autoencoder or in sampled pictures."""


def find_images(folder: str | Path) -> list[Path]:
    """Return the picture files of a folder, sorted, without masks (cat.mask.png beside cat.jpg).
    Warns of each other file that is skipped.

    Raises ValueError if there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; give a folder with 3-5 pictures of one thing")
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.is_file())
    pictures = [p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    beside = {path.with_suffix(end) for path in pictures for end in (".txt", ".mask.png")}
    pictures = [path for path in pictures if path not in beside]
    for path in files:
        if path.suffix.lower() in (".heic", ".heif"):
            warnings.warn(f"skipped {path}: HEIC is not read, save it as JPEG", stacklevel=2)
        elif path not in pictures and path not in beside:
            warnings.warn(f"skipped {path}: not a picture", stacklevel=2)
    if not pictures:
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{folder}: no pictures; 3-5 files of {kinds} are wanted")
    return pictures


def open_image(source: str | Path | Image.Image, background: str = "white") -> Image.Image:
    """Return an upright RGB picture: EXIF orientation applied, transparent parts on `background`,
    the first frame of an animation. Raises ValueError if the file is not readable as a picture."""
    if isinstance(source, Image.Image):
        image = source
    else:
        try:
            image = Image.open(source)
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{source}: not readable as a picture ({error})") from error
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises whatever the damaged tags lead to
        warnings.warn(f"{source}: damaged EXIF ({error}), orientation ignored", stacklevel=2)
    if image.mode == "F":
        brightest = np.asarray(image).max()
        image = image.point(lambda value: value * (255 if brightest <= 1 else 1))
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def open_mask(source: str | Path | Image.Image) -> Image.Image:
    """Return how much each pixel of a picture counts, grey: what NAME.mask.png beside NAME.jpg
    shows, else the picture's alpha channel, else white. Raises ValueError for another size."""
    white = open_image(source)
    beside = None if isinstance(source, Image.Image) else Path(source).with_suffix(".mask.png")
    if beside is None or not beside.exists():  # where the background shows, alpha is less than 1
        shows = ImageChops.difference(white, open_image(source, "black"))
        return ImageChops.invert(shows.convert("L"))
    mask = open_image(beside, "black").convert("L")
    if mask.size != white.size:
        sizes = "{}x{} pixels, the picture {}x{}".format(*mask.size, *white.size)
        raise ValueError(f"{beside} has {sizes}; a mask must have its picture's size")
    return mask


def prepare_images(images: Images, size: int, masked: bool = False) -> Tensor:
    """Return pictures as the model sees them, (N, 3, size, size) in [-1, 1]; if masked, with their
    masks as a fourth channel. Warns of pictures that are smaller than `size`. Raises ValueError if
    there are none, if one is not readable, or if a mask is empty."""
    if isinstance(images, (str, Path)):
        images = find_images(images)
    if not images:
        raise ValueError("no pictures given; 3-5 pictures of one thing are wanted")
    squares = []
    for i, source in enumerate(images):
        image = open_image(source)
        name = f"picture {i + 1}" if isinstance(source, Image.Image) else source
        if min(image.size) < size:
            width, height = image.size
            warnings.warn(f"{name} has {width}x{height} pixels, enlarged for {size}", stacklevel=2)
        squares.append(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
        if masked:
            mask = ImageOps.fit(open_mask(source), (size, size), Image.Resampling.BOX)
            if not mask.getbbox():
                raise ValueError(f"{name}: the mask is empty in the square that the model sees")
            squares[-1].putalpha(mask)
    if masked and all(square.getextrema()[3] == (255, 255) for square in squares):
        warnings.warn("masked, but no picture has transparency or a NAME.mask.png", stacklevel=2)
    return torch.cat([to_tensor(image) for image in squares])


def to_tensor(image: Image.Image) -> Tensor:
    """Return (1, C, H, W) in [-1, 1] of a picture with C channels."""
    pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return pictures (N, 3, H, W) in [-1, 1] as PIL images. Raises NotFinite for NaN."""
    if not images.isfinite().all():
        raise NotFinite(
            "sampling gave NaN or infinity; try --precision bf16 or fp32, or a lower --guidance"
        )
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Return one picture of many, row by row; as square as possible unless `columns` is given."""
    columns = columns or math.ceil(len(images) ** 0.5)
    w, h = images[0].width + gap, images[0].height + gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * w - gap, rows * h - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * w, i // columns * h))
    return sheet
