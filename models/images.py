"""Pictures in and out: files to tensors in [-1, 1], and back to PIL images.

A picture is shown to the model as the largest square in its middle, upright, in RGB, on white where
it is transparent; it is never stretched.
"""

import io
import math
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor

from .files import text_lines
from .tokenizers import nfc

# What Pillow opens, but cannot read as a picture by itself. EPS it would run, by Ghostscript.
NO_PICTURES = {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"}
LARGE = 1 << 25  # pixels; pictures with more are reduced to about as many
MAX_PIXELS = 1 << 28  # in memory while one is read: 1 GiB
Images = str | Path | Sequence[str | Path | Image.Image]


class NotFinite(ValueError):
    """NaN or infinity in training, in the autoencoder or in sampled pictures."""


@contextmanager
def pillow_limits():
    """Let Pillow read large pictures, which `open_image` bounds, and PNG files with long texts."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


def find_images(folder: str | Path) -> list[Path]:
    """Return the picture files of a folder, sorted, without masks (cat.mask.png beside cat.jpg).
    Warns of each other file that is skipped.

    Raises ValueError if there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; give a folder with 3-5 pictures of one thing")
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.is_file())
    faults = {path: fault_of(path) for path in files}
    pictures = [path for path in files if not faults[path]]
    endings = (".txt", ".caption", ".mask.png")
    beside = {path.with_suffix(end) for path in pictures for end in endings}
    pictures = [path for path in pictures if path not in beside]
    for path in files:
        if faults[path] and path not in beside:
            warnings.warn(f"skipped {path}: {faults[path]}", stacklevel=2)
    if not pictures:
        inside = (p for p in islice(folder.rglob("*"), 10_000) if p.is_file() and not fault_of(p))
        below = ", ".join(str(path) for path in sorted({path.parent for path in inside})[:5])
        there = f"but there are in {below}; give that folder" if below else "3-5 are wanted"
        raise ValueError(f"{folder}: no pictures that can be read, {there}")
    return pictures


def fault_of(path: Path) -> str | None:
    """Return why a file is not a picture, or None for one that is, or is damaged: Pillow knows its
    content or its ending."""
    if path.name.startswith("."):
        return "not a picture"
    try:
        with pillow_limits(), Image.open(path, formats=picture_formats()):
            return None
    except Exception:  # plugins raise whatever a foreign file leads to
        known = Image.registered_extensions().get(path.suffix.lower()) in picture_formats()
        return phone_format(path) or (None if known else "not a picture")


def picture_formats() -> list[str]:
    """Return what Pillow, with the plugins of this program's user, can read as a picture."""
    Image.init()
    return [name for name in Image.ID if name not in NO_PICTURES]


def phone_format(path: Path) -> str | None:
    """Return what to do about a picture of a kind that this Pillow cannot read."""
    with open(path, "rb") as file:
        start = file.read(32)
    avif = start[4:8] == b"ftyp" and b"avi" in start
    boxes = start[4:8] == b"ftyp" and any(kind in start for kind in (b"hei", b"hev", b"mif1"))
    heic = boxes or path.suffix.lower() in (".heic", ".heif")
    kind = "AVIF" if avif else "HEIC" if heic else None
    return kind and f"{kind} is not read here, save it as JPEG"


def read_image(path: str | Path) -> Image.Image:
    """Return a file's picture, loaded, its first frame; a very large one reduced. Raises ValueError
    if the file is not readable as a picture, or too large."""
    try:
        with pillow_limits():
            image = Image.open(path, formats=picture_formats())
            width, height = image.size
            shrink = math.sqrt(width * height / LARGE)
            small = int(width / shrink), int(height / shrink)
            if shrink > 1:  # a JPEG is decoded at a half, a quarter or an eighth
                image.draft(None, small)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{width}x{height} pixels, {MAX_PIXELS:,} at most; save it smaller"
                )
            image.load()
            if shrink > 1 and not image.mode.startswith("I;"):  # which Pillow does not resize
                image.thumbnail(small)
            return image
    except (OSError, ValueError, SyntaxError) as error:
        known = Path(path).is_file() and phone_format(Path(path))
        raise ValueError(f"{path}: {known or f'not readable as a picture ({error})'}") from error


def open_image(source: str | Path | Image.Image, background: str = "white") -> Image.Image:
    """Return an upright picture in RGB, in sRGB's colours: EXIF orientation and colour profile are
    applied, transparent parts are on `background`. Raises ValueError as `read_image` does."""
    image = source if isinstance(source, Image.Image) else read_image(source)
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises whatever the damaged tags lead to
        warnings.warn(f"{source}: damaged EXIF ({error}), orientation ignored", stacklevel=2)
    profile, mode = image.info.get("icc_profile"), image.mode
    if mode == "F":
        brightest = np.asarray(image).max()
        image = image.point(lambda value: value * (255 if brightest <= 1 else 1)).convert("L")
    if mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    grey, alpha = image.mode in ("1", "L", "LA"), None
    if mode in ("RGBA", "LA", "P", "PA") or "transparency" in image.info:
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
    image = image.convert("L" if grey else "CMYK" if mode == "CMYK" else "RGB")
    if profile:
        image = in_srgb(image, profile, source)
    image = image.convert("RGB")
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def in_srgb(image: Image.Image, profile: bytes, name) -> Image.Image:
    """Return a picture (L, RGB or CMYK) converted from its colour profile; `name` is for notes."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except Exception as error:  # a damaged profile, one of other colours, a Pillow without lcms
        warnings.warn(f"{name}: unusable colour profile ({error}), taken as sRGB", stacklevel=3)
        return image


def written_templates(choice: str, pictures: Sequence[Path], placeholder: str) -> list:
    """Return the templates of a file, of one template, or of the captions beside the pictures; as
    lists, one per picture, where they differ. As in A1111, [name] is the word and [filewords] a
    picture's caption, or the name of its file."""
    if choice == "captions":
        return [read_captions(caption_of(path), placeholder) for path in pictures]
    single = any(mark in choice for mark in ("{}", "[name]", placeholder))
    texts = [with_mark(choice, placeholder)] if single else read_captions(Path(choice), placeholder)
    if not any("[filewords]" in text for text in texts):
        return texts
    words = [with_mark(file_words(path), placeholder) for path in pictures]
    return [[text.replace("[filewords]", own) for text in texts] for own in words]


def with_mark(text: str, placeholder: str) -> str:
    """Return a template with {} wherever the word goes."""
    return nfc(text).replace("[name]", "{}").replace(placeholder, "{}")


def caption_of(path: Path) -> Path:
    """Return the file with a picture's caption: cat.caption if there is one, else cat.txt."""
    caption = path.with_suffix(".caption")
    return caption if caption.exists() else path.with_suffix(".txt")


def file_words(path: Path) -> str:
    """Return a picture's caption, or else its file's name without the number in front."""
    caption = caption_of(path)
    return " ".join(text_lines(caption)) if caption.exists() else path.stem.lstrip("0123456789-_ ")


def read_captions(path: Path, placeholder: str) -> list[str]:
    """Return the templates in a text file. Raises ValueError for a line without the word."""
    try:
        lines = [with_mark(line, placeholder) for line in text_lines(path)]
    except OSError as error:
        raise ValueError(
            f"{str(path)!r}: {error.strerror or error}; --templates takes "
            "object, style, captions (cat.txt beside cat.jpg), a file, 'a photo of {}'"
        ) from None
    if not lines:
        raise ValueError(f"{path} is empty; write one template per line, as in 'a photo of {{}}'")
    for line in lines:
        if "{}" not in line and "[filewords]" not in line:
            raise ValueError(f"{path}: {line[:60]!r} has no {{}} where the word goes")
    return lines


def warn_of_photographs(paths: Sequence[Path], bundled: bool) -> None:
    """Warn of pictures that are large, or have many colours, if the bundled model is to learn from
    them. Raises ValueError for one that is not readable."""
    found = False
    for image in map(open_image, paths):
        colours = ImageOps.fit(image, (64, 64)).getcolors(64 * 64)
        found |= min(image.size) > 256 or len(colours) > 2600
    if found and bundled:
        warnings.warn(
            "these look like photographs; the bundled model knows only emoji at 64 pixels. For "
            "photographs take a model that was trained on them: --model sd15 (see weights.md)"
        )


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


def grid(
    images: Sequence[Image.Image], columns: int | None = None, gap: int = 2, least: int = 1
) -> Image.Image:
    """Return one picture of many, row by row; as square as possible unless `columns` is given.
    Those below `least` pixels are enlarged by a whole factor."""
    columns = columns or math.ceil(len(images) ** 0.5)
    factor = math.ceil(least / min(images[0].size))
    images = [ImageOps.scale(image, factor, Image.Resampling.LANCZOS) for image in images]
    w, h = images[0].width + gap, images[0].height + gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * w - gap, rows * h - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * w, i // columns * h))
    return sheet
