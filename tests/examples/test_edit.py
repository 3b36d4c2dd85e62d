"""examples/edit.py on the bundled model: what is kept, what changes, and the command line."""

import json

import edit as edit_script
import numpy as np
import pytest
import torch
from edit import edit, latent_mask, open_mask, reconstruct, shrinking_masks, working_size
from elsewhere import elsewhere
from PIL import Image, ImageDraw

import textinv
from models.images import to_tensor


@pytest.fixture(scope="module")
def model():
    return textinv.load_model(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def dog(model):
    return textinv.sample(model, "a photo of a dog on the beach", steps=20, seed=5)[0]


def disc(size=(64, 64)) -> Image.Image:
    mask = Image.new("L", size)
    w, h = size
    ImageDraw.Draw(mask).ellipse((w // 6, h // 6, 5 * w // 6, 5 * h // 6), fill=255)
    return mask


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(float) / 127.5 - 1


def test_outside_the_mask_nothing_changes_and_inside_the_prompt_is_followed(model, dog):
    """A tomato is red and an avocado green, whatever was there; the background stays to the bit."""
    mask = disc()
    inside, outside = np.asarray(mask) == 255, np.asarray(mask) == 0
    means = {}
    for thing in ("tomato", "avocado"):
        prompt = f"a photo of a {thing} on the beach"
        options = dict(mask=mask, steps=20, reconstruct_steps=20, n=2)
        for version in edit(model, dog, prompt, **options):
            assert version.size == dog.size
            assert np.array_equal(np.asarray(version)[outside], np.asarray(dog)[outside])
            means.setdefault(thing, []).append(pixels(version)[inside].mean(0))
    red, green = np.mean(means["tomato"], 0), np.mean(means["avocado"], 0)
    assert red[0] - red[1] > 0.15 + green[0] - green[1]


def test_the_fitted_decoder_shows_the_background_better_than_the_autoencoder_does(model, dog):
    """Avrahami et al., section 4.2: before anything is pasted back."""
    source = to_tensor(dog)
    latents, mask = model.encode_images(source), (to_tensor(disc()) + 1) / 2
    latents[..., 4:12, 4:12] = 0  # something else was painted there
    errors = []
    for steps in (0, 100):
        drawn = reconstruct(model, latents, source, mask, steps)
        errors.append((((drawn - source) * (1 - mask)) ** 2).mean().item())
    own = model.decode_latents(model.encode_images(source))
    own = (((own - source) * (1 - mask)) ** 2).mean().item()
    assert errors[1] < own < errors[0]
    assert not any(p.requires_grad for p in model.autoencoder.parameters())


def test_thin_masks_begin_wide_and_end_as_themselves():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 30, 5:60] = 1
    masks = shrinking_masks(mask, steps=20, cell=8)
    areas = [m.sum().item() for m in masks]
    assert areas == sorted(areas, reverse=True) and areas[0] > 5 * areas[-1]
    assert torch.equal(masks[10], mask) and torch.equal(masks[-1], mask)
    assert torch.equal(shrinking_masks(mask, steps=1, cell=8)[0], mask)
    wide = torch.zeros(1, 1, 64, 64)
    wide[..., 10:40, 10:40] = 1
    assert all(torch.equal(m, wide) for m in shrinking_masks(wide, 20, cell=8))


def test_a_mask_of_one_pixel_reaches_the_latents_and_the_picture(model, dog):
    mask = Image.new("L", (64, 64))
    mask.putpixel((21, 33), 255)
    small = latent_mask((to_tensor(mask) + 1) / 2, (16, 16))
    assert small.sum() == 1
    version = edit(model, dog, "a photo of a strawberry", mask=mask, steps=5)[0]
    changed = (np.asarray(version) != np.asarray(dog)).any(-1)
    assert changed.sum() == 1 and changed[33, 21]


def test_thin_lines_in_large_pictures_and_grey_masks_change_what_they_show(model, dog):
    """Masks were shrunk as grey, and grey was multiplied in at every step: nothing came of it."""
    large = dog.resize((600, 600), Image.Resampling.BICUBIC)
    line, grey = Image.new("L", (600, 600)), Image.new("L", (64, 64), 140)
    ImageDraw.Draw(line).line((40, 300, 560, 300), fill=255, width=3)
    version = edit(model, large, "a banana", mask=line, steps=10, reconstruct_steps=5)[0]
    on_line = np.asarray(line) == 255
    assert np.abs(pixels(version) - pixels(large))[on_line].mean() > 0.05
    version = edit(model, dog, "a banana", mask=grey, steps=10, reconstruct_steps=5)[0]
    assert np.abs(pixels(version) - pixels(dog)).mean() > 0.05


def test_what_is_transparent_in_a_mask_is_kept(dog):
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (10, 10, 20, 20))
    opened = np.asarray(open_mask(mask, (64, 64))).astype(int)
    assert opened[10:20, 10:20].min() == 255 and opened.sum() == 255 * 100


@pytest.mark.parametrize("size", [(200, 131), (50, 90), (64, 64)])
def test_pictures_of_any_size_come_back_in_their_size(model, dog, size):
    """Their own pixels outside the mask, not those of the size that was worked at."""
    image, mask = dog.resize(size), disc(size)
    version = edit(model, image, "a tomato", mask=mask, steps=2, reconstruct_steps=1)[0]
    outside = np.asarray(mask) == 0
    assert version.size == size
    assert np.array_equal(np.asarray(version)[outside], np.asarray(image)[outside])


def test_working_sizes():
    assert working_size((4000, 3000), 512, 64) == (704, 512)
    assert working_size((100, 100), 64, 16) == (64, 64)
    with pytest.raises(ValueError, match="3000x10 pixels; crop it to a less narrow one"):
        working_size((3000, 10), 64, 16)


def test_without_a_mask_strength_says_how_much_is_kept(model, dog):
    distances = []
    for strength in (0.1, 0.5, 1.0):
        version = edit(model, dog, "a sketch of a dog", strength=strength, steps=20)[0]
        distances.append(np.abs(pixels(version) - pixels(dog)).mean())
    assert distances == sorted(distances)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(mask=Image.new("L", (32, 32), 255)), "mask has 32x32 pixels, the picture 64x64"),
        (dict(mask=Image.new("L", (64, 64))), "black everywhere; paint white"),
        (dict(strength=0.0), "strength is 0.0"),
        (dict(strength=float("nan")), "strength is nan"),
        (dict(n=0), "n is 0"),
        (dict(steps=0), "steps 0 is out of range"),
        (dict(guidance_scale=float("inf")), "guidance_scale is inf"),
    ],
)
def test_mistakes(model, dog, options, says):
    with pytest.raises(ValueError, match=says):
        edit(model, dog, "a cat", **options)


# ----------------------------------------------------------------------------------- command line


def mistake(capsys, *arguments: object) -> str:
    """The one line on standard error that a mistake ends in."""
    assert edit_script.main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("textinv: "), lines
    return lines[0]


def test_the_command_repaints_inside_the_mask(dog, tmp_path, capsys):
    picture, mask, out = tmp_path / "a.png", tmp_path / "mask.png", tmp_path / "b.png"
    dog.save(picture)
    white = Image.new("L", (64, 64))
    white.paste(255, (20, 20, 44, 44))
    white.save(mask)
    arguments = [picture, "a (tomato:1.2)", "--mask", mask, "--steps", "2", "--out", out]
    assert edit_script.main([str(a) for a in arguments]) == 0
    before, after = (np.asarray(Image.open(p).convert("RGB")) for p in (picture, out))
    changed = (before != after).any(-1)
    assert changed[20:44, 20:44].mean() > 0.5 and changed.sum() == changed[20:44, 20:44].sum()
    assert json.loads(Image.open(out).text["settings"])["mask"] == str(mask)
    arguments[-1] = tmp_path / "n.png"
    assert edit_script.main([str(a) for a in [*arguments, "--negative", "[a|b] (dog:1.2)"]]) == 0
    assert capsys.readouterr().err.count("[a|b] is not supported") == 1
    changed = Image.open(arguments[-1])
    assert "\nNegative prompt: [a|b] (dog:1.2)\nSteps: 2, " in changed.text["parameters"]
    assert changed.tobytes() != Image.open(out).tobytes()
    arguments[-1] = out
    capsys.readouterr()
    assert "--overwrite" in mistake(capsys, *arguments)
    arguments[-1] = tmp_path / "c.png"
    Image.new("RGB", (80, 80)).save(tmp_path / "large.png")
    assert "mask has 64x64" in mistake(capsys, tmp_path / "large.png", *arguments[1:])
    assert "nowhere.png" in mistake(capsys, "nowhere.png", *arguments[1:])
    assert "is not a weight" in mistake(capsys, picture, "a (cat:1.2.3)", *arguments[2:])
    assert "see edit.py --help" in mistake(capsys, picture)


def test_versions_have_seeds_of_their_own(model, dog):
    options = dict(steps=3, strength=0.8)
    pair = edit(model, dog, "a cat", n=2, seed=4, **options)
    (second,) = edit(model, dog, "a cat", seed=5, **options)
    assert np.array_equal(np.asarray(pair[1]), np.asarray(second))
    assert not np.array_equal(np.asarray(pair[0]), np.asarray(second))


def test_another_device_gives_the_same_pictures(model, dog):
    options = dict(mask=disc(), steps=2, reconstruct_steps=2)
    word = textinv.Concept("<s>", textinv.initial_vectors(model, "cat", 1))
    (here,) = edit(model, dog, "a <s>", [word], **options)
    with elsewhere():
        (there,) = edit(textinv.load_model(dtype=torch.float32), dog, "a <s>", [word], **options)
    assert np.abs(np.asarray(here, float) - np.asarray(there, float)).max() <= 1
