"""Pictures of all kinds, as the model sees them."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

import textinv
from models import images


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
    assert len(seen) == 1  # hidden files are skipped without a note
    for name in ("a.inputs.png", "a.step-50.png", "a.mask.PNG", "gone.mask.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.warns(UserWarning, match="written by a run, or a mask"):
        assert [p.name for p in textinv.find_images(tmp_path)] == ["a.png"]
    (tmp_path / "b.jpg").write_bytes(b"no jpeg")
    with pytest.raises(ValueError, match="b.jpg"):
        textinv.prepare_images([tmp_path / "b.jpg"], 8)
    (tmp_path / "b.mask.png").write_bytes(b"no png")
    with pytest.raises(ValueError, match="b.mask.png: not readable as a picture"):
        textinv.prepare_images([tmp_path / "b.mask.png"], 8)
    with pytest.raises(ValueError, match="no such folder"):
        textinv.find_images(tmp_path / "nowhere")
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
    with pytest.warns(UserWarning, match="nothing is transparent, or black in a NAME.mask.png"):
        whole = textinv.prepare_images(tmp_path, 8, masked=True)
    assert torch.equal(whole[:, 3], torch.ones(1, 8, 8))
    Image.new("RGBA", (16, 8), (9, 9, 9, 0)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png: the mask is empty"):
        textinv.prepare_images(tmp_path, 8, masked=True)
    Image.new("L", (9, 8), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(ValueError, match=r"a.mask.png has 9x8 pixels, its picture 8x8; resize it"):
        textinv.prepare_images(tmp_path, 8, masked=True)


def profile(space: str) -> bytes:
    """A colour profile: Adobe RGB, a grey one of the same gamma, or a damaged one."""
    if space == "damaged":
        return b"no profile"

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.19921875 * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    if space == "grey":
        tags |= {b"kTRC": curve}
    else:
        for letter, column in zip(b"rgb", ADOBE_TO_XYZ.T):
            tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
            tags[bytes([letter]) + b"TRC"] = curve
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    kind = b"GRAY" if space == "grey" else b"RGB "
    head = bytes(8) + struct.pack(">I", 0x02100000) + b"mntr" + kind + b"XYZ " + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    body = head.ljust(128, b"\0") + table + data
    return struct.pack(">I", len(body)) + body[4:]


ADOBE_TO_XYZ = np.array(  # with D50 as white, as profiles have it
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB_TO_XYZ = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)


def srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    curve = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curve


def test_colour_profiles_lead_to_srgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    linear = (pixels / 255) ** 2.19921875
    expected = srgb(linear @ ADOBE_TO_XYZ.T @ np.linalg.inv(SRGB_TO_XYZ).T)
    assert np.abs(expected - pixels).mean() > 5
    rgb, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    clear = rgb.copy()
    clear.putalpha(255)
    for name, image in (("a.png", rgb), ("b.tif", rgb), ("c.png", clear)):
        image.save(tmp_path / name, icc_profile=profile("adobe"))
        found = np.asarray(textinv.open_image(tmp_path / name), float)
        assert np.abs(found - expected).max() < 4 and np.abs(found - expected).mean() < 0.6, name
    grey.save(tmp_path / "grey.png", icc_profile=profile("grey"))
    found = np.asarray(textinv.open_image(tmp_path / "grey.png"), float)
    assert np.abs(found - srgb(linear[..., :1])).max() < 3
    for image, wrong in ((rgb, "damaged"), (rgb, "grey"), (rgb.convert("CMYK"), "adobe")):
        image.save(tmp_path / "w.tif", icc_profile=profile(wrong))
        with pytest.warns(UserWarning, match="w.tif: unusable colour profile"):
            found = textinv.open_image(tmp_path / "w.tif")
        assert np.asarray(found).tolist() == np.asarray(image.convert("RGB")).tolist()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_a_damaged_avif_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / "a.avif"
    Image.fromarray(noise).save(path)
    whole, damaged = path.read_bytes(), 0
    for start in range(0, 400, 7):  # the header, and where the picture begins
        path.write_bytes(whole[:start] + bytes(16) + whole[start + 16 :])
        try:
            textinv.open_image(path)
        except ValueError as error:
            damaged += str(error).startswith(f"{path}: not readable as a picture")
    assert damaged > 3


def test_pillow_decides_what_is_a_picture(tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    formats = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c": "PNG", "d.photo": "WEBP", "e.TGA": "TGA"}
    formats |= {"f.avif": "AVIF"} if features.check("avif") else {}
    for name, format in formats.items():
        image.save(tmp_path / name, format)
    for name in ("a.txt", "b.caption", "notes.md", "word.bin", "x.eps"):
        (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.warns(UserWarning) as seen:
        assert {path.name for path in textinv.find_images(tmp_path)} == set(formats)
    said = " ".join(str(warning.message) for warning in seen)
    assert len(seen) == 3 and all(name in said for name in ("notes.md", "word.bin", "x.eps"))
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for name in ("IMG_1.HEIC", "IMG_2.jpg", "IMG_3"):
        (tmp_path / name).write_bytes(heic)
        with pytest.warns(UserWarning, match=f"{name}: HEIC .* is not read here, save it as JPEG"):
            textinv.find_images(tmp_path)
        with pytest.raises(ValueError, match="HEIC"):
            textinv.open_image(tmp_path / name)


@pytest.mark.parametrize("below", ["img/10_cat", "concept_images"])
def test_a_folder_below_with_the_pictures_is_named(tmp_path, below):
    (tmp_path / below).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / below / "1.jpeg")
    with pytest.raises(ValueError, match=f"no pictures.*{tmp_path / below}; give that"):
        textinv.find_images(tmp_path)


def test_large_pictures_are_reduced_and_the_largest_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGE", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # as 20,000 x 20,000 to the true limit
    wide = Image.new("RGB", (300, 100), "blue")
    for name in ("a.jpg", "b.png", "c.webp"):
        wide.save(tmp_path / name)
        found = textinv.open_image(tmp_path / name)
        assert found.width * found.height <= 1000 and found.width > 40
        assert np.abs(np.asarray(found, float) - (0, 0, 255)).max() < 3
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    assert textinv.open_image(tmp_path / "a.jpg")  # decoded at an eighth
    with pytest.raises(ValueError, match=r"b.png: .*30,000 pixels, 2,000 at most"):
        textinv.open_image(tmp_path / "b.png")


def test_a_png_with_much_text_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 5_000_000, zip=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", pnginfo=text)
    assert textinv.open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size, least, side", ((64, 256, 256), (100, 256, 300), (512, 256, 512)))
def test_small_pictures_are_enlarged_in_a_grid(size, least, side):
    sheet = images.grid([Image.new("RGB", (size, size), "red")] * 4, least=least)
    assert sheet.size == (2 * side + 2, 2 * side + 2) and sheet.getpixel((5, 5)) == (255, 0, 0)
