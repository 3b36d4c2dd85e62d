"""A table of pictures with captions drawn on, as the paper's figures have them."""

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LABEL = 96, 4, 104  # of a picture, between pictures, of the column with the labels


def write(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str) -> None:
    """Text in the middle of a box (left, top, right, bottom), on as many lines as it takes."""
    font = ImageFont.load_default(size=11)
    width = max(1, int((box[2] - box[0]) / font.getlength("n")))
    lines = "\n".join(textwrap.wrap(text, width))
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    draw.multiline_text(middle, lines, "black", font, anchor="mm", align="center", spacing=2)


def sheet(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str] = ()) -> Image.Image:
    """{label of the row: its pictures}, below the columns' captions; None leaves a gap."""
    top, count = (44 if columns else 0), max(map(len, rows.values()))
    size = LABEL + count * (SIDE + GAP), top + len(rows) * (SIDE + GAP) - GAP
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(columns):
        left = LABEL + i * (SIDE + GAP)
        write(draw, (left, 0, left + SIDE, top), caption)
    for j, (label, pictures) in enumerate(rows.items()):
        y = top + j * (SIDE + GAP)
        write(draw, (0, y, LABEL - GAP, y + SIDE), label)
        for i, picture in enumerate(pictures):
            if picture is not None:
                page.paste(picture.resize((SIDE, SIDE)), (LABEL + i * (SIDE + GAP), y))
    return page
