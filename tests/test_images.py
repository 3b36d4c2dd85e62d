"""Pictures of all kinds, as the model sees them."""

import numpy as np
import pytest
import torch
from PIL import Image

import textinv


def test_odd_pictures_are_taken(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("P").save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "deep.png")
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.convert("LA").save(tmp_path / "gray-alpha.png")
    Image.new("1", (1, 1), 1).save(tmp_path / "dot.png")
    with pytest.warns(UserWarning, match="dot.png has 1x1 pixels, enlarged"):
        pixels = textinv.prepare_images(tmp_path, 8)
    assert pixels.shape == (6, 3, 8, 8)
    plain = textinv.prepare_images([rgb], 8)[0]
    means = {p.name: q.mean().item() for p, q in zip(textinv.find_images(tmp_path), pixels)}
    for name in ("cmyk.jpg", "moving.gif", "gray-alpha.png"):
        assert means[name] == pytest.approx(plain.mean().item(), abs=0.1), name
    assert means["deep.png"] == pytest.approx(40_000 / 32768 - 1, abs=0.01)
    light = textinv.open_image(Image.fromarray(np.full((2, 2), 0.5, np.float32)))
    assert light.getpixel((0, 0)) == (127, 127, 127)


def test_damaged_exif_does_not_stop_a_picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", exif=b"no exif at all")
    with pytest.warns(UserWarning, match="damaged EXIF"):
        assert textinv.open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_images_are_upright_square_and_on_white(tmp_path):
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 60:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise by 90 degrees
    Image.fromarray(wide).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    turned = textinv.open_image(tmp_path / "phone.jpg")
    assert turned.size == (60, 120) and turned.getpixel((30, 10)) < (10, 10, 10)
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert textinv.open_image(clear).getpixel((5, 5)) == (255, 255, 255)
    circle = Image.new("RGB", (300, 100), "red")
    circle.paste("blue", (100, 0, 200, 100))
    pixels = textinv.prepare_images([circle], 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels[0, 2].mean() > 0.9  # only the middle square is left


def test_folders_skip_what_is_no_picture_and_name_what_is_broken(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match="skipped") as seen:
        assert [p.name for p in textinv.find_images(tmp_path)] == ["a.png"]
    assert len(seen) == 2
    (tmp_path / "b.jpg").write_bytes(b"no jpeg")
    with pytest.raises(ValueError, match="b.jpg"):
        textinv.prepare_images([tmp_path / "b.jpg"], 8)
    with pytest.raises(ValueError, match="no pictures"):
        empty = tmp_path / "empty"
        empty.mkdir()
        textinv.find_images(empty)


@pytest.mark.parametrize("mode", ("RGBA", "LA", "P", "beside"))
def test_masks_are_the_alpha_channel_or_lie_beside_the_picture(tmp_path, mode):
    shown = Image.new("L", (16, 8), 0)
    shown.paste(255, (4, 0, 9, 8))  # x from 4 to 8; the square in the middle begins at 4
    picture = Image.new("RGB", (16, 8), "red")
    if mode == "beside":
        picture.save(tmp_path / "a.b.jpg")
        shown.save(tmp_path / "a.b.mask.png")
    elif mode == "P":
        shown.point(lambda value: value // 255).save(tmp_path / "a.png", transparency=0)
    else:
        picture = picture.convert(mode.removesuffix("A"))
        picture.putalpha(shown)
        picture.save(tmp_path / "a.png")
    assert len(textinv.find_images(tmp_path)) == 1
    pixels = textinv.prepare_images(tmp_path, 8, masked=True)
    assert torch.equal(pixels[:, :3], textinv.prepare_images(tmp_path, 8))
    expected = torch.tensor([1.0] * 5 + [-1.0] * 3).expand(1, 8, 8)
    assert torch.equal(pixels[:, 3], expected)


def test_masks_that_are_empty_absent_or_of_another_size(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg")
    with pytest.warns(UserWarning, match="no picture has transparency or a NAME.mask.png"):
        whole = textinv.prepare_images(tmp_path, 8, masked=True)
    assert torch.equal(whole[:, 3], torch.ones(1, 8, 8))
    Image.new("RGBA", (16, 8), (9, 9, 9, 0)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png: the mask is empty"):
        textinv.prepare_images(tmp_path, 8, masked=True)
    Image.new("L", (9, 8), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(ValueError, match="a.mask.png has 9x8 pixels, the picture 8x8"):
        textinv.prepare_images(tmp_path, 8, masked=True)
