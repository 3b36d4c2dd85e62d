"""Pictures in and out: files to tensors in [-1, 1], and back to PIL images.

The model sees the largest square in the middle of a picture: upright, in RGB, with white where the
picture is transparent. Pictures are never stretched.
"""

import io
import math
import os
import re
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

# Formats that Pillow opens, but cannot read by itself. For EPS it would run Ghostscript.
NO_PICTURES = {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"}
LARGE = 1 << 25  # pixels; larger pictures are reduced to about this size
MAX_PIXELS = 1 << 28  # of a picture that is being read; they take 1 GiB of memory
Images = str | Path | Sequence[str | Path | Image.Image]


class NotFinite(ValueError):
    """NaN or infinity in training, in the autoencoder or in sampled pictures."""


def find_images(folder: str | Path) -> list[Path]:
    """Return the picture files of a folder, sorted, without masks (cat.mask.png beside cat.jpg).
    Warns of other files that are not hidden. Raises ValueError if there is no picture."""
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(p for p in folder.glob("[!.]*") if p.is_file())
    faults = {path: fault_of(path) for path in files}
    pictures = [path for path in files if not faults[path]]
    beside = {p.with_suffix(end) for p in pictures for end in (".txt", ".caption", ".mask.png")}
    for path in files:
        if faults[path] and path not in beside:
            warnings.warn(f"skipped {path}: {faults[path]}")
    if not pictures:
        inside = (p for p in islice(folder.rglob("*"), 10_000) if p.is_file() and not fault_of(p))
        below = ", ".join(sorted({str(path.parent) for path in inside})[:5])
        there = f"but there are in {below}; give that folder"
        there = there if below else "give a folder with 3-5 pictures"
        found = "no pictures that can be read" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {found}, {there}")
    return pictures


@contextmanager
def opened(path: str | Path):
    """Open a picture without Pillow's limits on pixels (`read_image` has one) and on PNG texts."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY
    try:
        image = Image.open(path)
        if image.format in NO_PICTURES:
            image.close()
            raise ValueError(f"it is {image.format}")
        yield image
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


def fault_of(path: Path) -> str | None:
    """Return why a file in a folder is not a training picture, or None."""
    if re.search(r"\.(inputs|step-\d+|mask)\.png$", path.name, re.IGNORECASE):
        return "written by a run, or a mask (NAME.mask.png) without its picture NAME.jpg"
    return content_fault(path)


def content_fault(path: Path) -> str | None:
    """Return why a file is not a picture, or None if Pillow knows its content or its ending."""
    try:
        with opened(path) as image:
            image.close()
            return None
    except Exception:  # Pillow's plugins raise nearly anything for foreign files
        ending = path.suffix.lower()
    with open(path, "rb") as file:
        phone = re.match(rb"(?s).{4}ftyp.*(avi|hei|hev|mif1)", file.read(32))
    if phone or ending in (".heic", ".heif"):
        return "HEIC (or AVIF) is not read here, save it as JPEG"
    known = Image.registered_extensions().get(ending) in Image.OPEN.keys() - NO_PICTURES
    return None if known else "not a picture"


def read_image(path: str | Path) -> Image.Image:
    """Load a file's picture (the first frame), reduced if it is very large. Raises ValueError if
    the file is not readable as a picture, or too large."""
    try:
        with opened(path) as image:
            shrink = max(1, math.sqrt(image.width * image.height / LARGE))
            small = int(image.width / shrink), int(image.height / shrink)
            image.draft(None, small)  # decodes a JPEG at a half, a quarter or an eighth of its size
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise ValueError(f"{pixels:,} pixels, {MAX_PIXELS:,} at most; save it smaller")
            image.load()
            if not image.mode.startswith("I;"):  # 16 bits, which Pillow cannot resize
                image.thumbnail(small)
            return image
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        fault = Path(path).is_file() and content_fault(Path(path))
        raise ValueError(f"{path}: {fault or f'not readable as a picture ({error})'}") from error


def open_image(source: str | Path | Image.Image, background: str = "white") -> Image.Image:
    """Return an upright picture in RGB, in sRGB's colours: EXIF orientation and colour profile are
    applied, transparent parts are on `background`. Raises ValueError as `read_image` does."""
    image = source if isinstance(source, Image.Image) else read_image(source)
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises nearly anything for damaged tags
        warnings.warn(f"{source}: damaged EXIF ({error}), orientation ignored")
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode[0] in "IF":  # Pillow would clip 16 bits to white
        values = np.asarray(image)
        if image.mode != "F":
            values = values / 256
        elif values.max() <= 1:
            values = values * 255
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    plain = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = image.convert(plain)
    image = (in_srgb(image, profile, source) if profile else image).convert("RGB")
    if alpha:
        image = Image.composite(image, Image.new("RGB", image.size, background), alpha)
    return image


def in_srgb(image: Image.Image, profile: bytes, name) -> Image.Image:
    """Return a picture (L, RGB or CMYK) converted from its profile to sRGB; warnings say `name`."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except Exception as error:  # a damaged profile, one of other colours, a Pillow without lcms
        warnings.warn(f"{name}: unusable colour profile ({error}), taken as sRGB")
        return image


def written_templates(choice: str, pictures: Sequence[Path], placeholder: str) -> list:
    """Return the templates of `choice`: a file, one template, or "captions", those beside pictures.
    If they differ by picture, return a list for each picture. As in A1111, [name] is the word and
    [filewords] a picture's caption, else the name of its file without the number in front."""
    if choice == "captions":
        return [read_captions(caption_of(path), placeholder) for path in pictures]
    marked = any(mark in choice for mark in ("{}", "[name]", placeholder))
    single = marked and not (os.path.isfile(choice) or choice.endswith(".txt"))
    texts = [with_mark(choice, placeholder)] if single else read_captions(choice, placeholder)
    if not any("[filewords]" in text for text in texts):
        return texts
    filled = []
    for path in pictures:
        caption, words = caption_of(path), path.stem.lstrip("0123456789-_ ")
        words = " ".join(text_lines(caption)) if caption.exists() else words
        words = with_mark(words, placeholder)
        filled.append([text.replace("[filewords]", words) for text in texts])
    return filled


def with_mark(text: str, placeholder: str) -> str:
    """Return a template with {} wherever the word goes."""
    return nfc(text).replace("[name]", "{}").replace(placeholder, "{}")


def caption_of(path: Path) -> Path:
    """Return the file with a picture's caption: cat.caption if there is one, else cat.txt."""
    caption = path.with_suffix(".caption")
    return caption if caption.exists() else path.with_suffix(".txt")


def read_captions(path: str | Path, placeholder: str) -> list[str]:
    """Return the templates in a text file. Raises ValueError for a line without the word."""
    try:
        lines = [with_mark(line, placeholder) for line in text_lines(path)]
    except OSError as error:
        takes = "object, style, captions (cat.txt beside cat.jpg), a file or 'a photo of {}'"
        fault = f"{str(path)!r}: {error.strerror}" if error.strerror else error
        raise ValueError(f"{fault}; --templates takes {takes}") from None
    for line in lines or [""]:
        if "{}" not in line and "[filewords]" not in line:
            raise ValueError(f"{path}: {line[:60]!r} has no {{}} where the word goes")
    return lines


def warn_of_photographs(paths: Sequence[Path], bundled: bool) -> None:
    """Read all pictures. If the bundled model is to learn from them, warn of large ones and of ones
    with many colours. Raises ValueError for one that is not readable."""
    colours = lambda image: len(ImageOps.fit(image, (64, 64)).getcolors(64 * 64))
    found = [min(im.size) > 256 or colours(im) > 2600 for im in map(open_image, paths)]
    if any(found) and bundled:
        warnings.warn("the bundled model knows only emoji; for photographs take --model sd15")


def open_mask(source: str | Path | Image.Image, image: Image.Image) -> Image.Image:
    """Return a grey picture of how much each pixel counts: NAME.mask.png beside NAME.jpg, else the
    picture's alpha channel, else white. Raises ValueError if the mask has another size."""
    beside = None if isinstance(source, Image.Image) else Path(source).with_suffix(".mask.png")
    if beside and beside.exists():
        mask = open_image(beside, "black").convert("L")
        if mask.size != image.size:
            own, other = (f"{i.width}x{i.height}" for i in (mask, image))
            raise ValueError(f"{beside} has {own} pixels, its picture {other}; resize it")
        return mask
    shows = ImageChops.difference(image, open_image(source, "black"))  # where alpha is less than 1
    return ImageChops.invert(shows.convert("L"))


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
            warnings.warn(f"{name} has {image.width}x{image.height} pixels, enlarged for {size}")
        squares.append(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
        if masked:
            mask = ImageOps.fit(open_mask(source, image), (size, size), Image.Resampling.BOX)
            if not mask.getbbox():
                raise ValueError(f"{name}: the mask is empty in the square that the model sees")
            squares[-1].putalpha(mask)
    if masked and all(square.getextrema()[3] == (255, 255) for square in squares):
        warnings.warn("masked, but nothing is transparent, or black in a NAME.mask.png")
    return torch.cat([to_tensor(image) for image in squares])


def to_tensor(image: Image.Image) -> Tensor:
    """Return (1, C, H, W) in [-1, 1] of a picture with C channels."""
    pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return pictures (N, 3, H, W) in [-1, 1] as PIL images. Raises NotFinite for NaN."""
    if not images.isfinite().all():
        raise NotFinite("a picture came out as NaN; try --precision bf16 or fp32, weaker guidance")
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def grid(images: Sequence[Image.Image], columns: int | None = None, gap=2, least=1) -> Image.Image:
    """Return all pictures in one, row by row; as square as possible unless `columns` is given.
    Pictures smaller than `least` pixels are enlarged by a whole factor."""
    columns = columns or math.ceil(len(images) ** 0.5)
    factor = math.ceil(least / min(images[0].size))
    images = [ImageOps.scale(image, factor, Image.Resampling.LANCZOS) for image in images]
    w, h = images[0].width + gap, images[0].height + gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * w - gap, rows * h - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * w, i // columns * h))
    return sheet
