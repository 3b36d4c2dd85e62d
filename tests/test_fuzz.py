"""Damaged files: each ends in success, or in one line and exit status 2. Nothing in them runs, and
nothing is left half written. 260 files by default, 2,300 with --full."""

import io
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import textinv
from models.concepts import FORMATS
from models.files import CheckpointError, open_state

TINY = Path(__file__).resolve().parent / "golden" / "tiny"


def damage(data: bytes, draw: random.Random) -> bytes:
    """One of the accidents that happen to files, or what an attacker would try."""
    data = bytearray(data)
    where, length = draw.randrange(len(data)), draw.choice([1, 4, 16, 300])
    kind = draw.choice("flip header cut zero insert double grow swap".split())
    if kind == "flip":
        for _ in range(draw.choice([1, 3, 30])):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == "header":  # where formats keep their lengths
        data[draw.randrange(min(len(data), 120))] = draw.randrange(256)
    elif kind == "cut":
        del data[where:]
    elif kind == "zero":
        data[where : where + length] = bytes(length)
    elif kind == "insert":
        data[where:where] = draw.randbytes(length)
    elif kind == "double":
        data[where:where] = data[where : where + length]
    elif kind == "grow":
        data += draw.randbytes(length)
    else:
        other = draw.randrange(len(data))
        data[where : where + 8], data[other : other + 8] = (
            data[other : other + 8],
            data[where : where + 8],
        )
    return bytes(data)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> dict[str, bytes]:
    """A sound file of every embedding format."""
    folder = tmp_path_factory.mktemp("words")
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    word = textinv.Concept("<w>", vectors, {"steps": "5"})
    files = {}
    for format in FORMATS:
        for suffix in FORMATS[format]:
            path = folder / f"{format}{suffix}"
            word.save(path, format=format)
            files[path.name] = path.read_bytes()
    several = {"a": vectors[0].clone(), "a_1": vectors[1].clone()}
    files["several.safetensors"] = save(several)
    files["several.bin"] = saved(several)
    files["old.pt"] = saved({"<w>": vectors}, _use_new_zipfile_serialization=False)
    files["zip.safetensors"] = files["a1111.pt"]
    return files


def saved(content: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    files, with_exif = {}, ("png", "jpg", "webp")
    for suffix in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        file = io.BytesIO()
        options = {"exif": exif} if suffix in with_exif else {}
        rgb.save(file, {"jpg": "jpeg"}.get(suffix, suffix), **options)
        files[f"p.{suffix}"] = file.getvalue()
    return files


def ends_well(capsys, arguments: list[object], out: Path) -> None:
    """Success and the file, or one line, exit status 2 and nothing written."""
    capsys.readouterr()
    status = textinv.main([str(a) for a in arguments])
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("note: ")]
    assert (status, len(lines)) in ((0, 0), (2, 1)), (arguments, lines)
    assert out.exists() == (status == 0)
    assert not list(out.parent.glob(".*"))  # no temporary files
    if status == 0:
        assert textinv.load_concepts(out)
        out.unlink()


def test_damaged_words(words, tmp_path, capsys, full):
    draw, out = random.Random(1), tmp_path / "out.safetensors"
    for i in range(900 if full else 100):
        name = draw.choice([*words])
        file = tmp_path / name
        file.write_bytes(damage(words[name], draw))
        ends_well(capsys, ["convert", file, out], out)


def test_damaged_pictures(words, tmp_path, capsys, full):
    (tmp_path / "w.safetensors").write_bytes(words["diffusers.safetensors"])
    draw, files, out = random.Random(2), pictures(), tmp_path / "out.png"
    for i in range(500 if full else 60):
        name = draw.choice([*files])
        file = tmp_path / name
        file.write_bytes(damage(files[name], draw))
        ends_well(capsys, ["convert", tmp_path / "w.safetensors", out, "--picture", file], out)


def test_damaged_checkpoints(tmp_path, capsys, full):
    draw = random.Random(3)
    sources = [TINY / "ldm" / "model.ckpt", TINY / "sd1" / "model.ckpt"]
    sources += [TINY / "sd1" / "model.safetensors", TINY / "sd2" / "model.safetensors"]
    data = {source: source.read_bytes() for source in sources}
    shutil.copy(TINY / "ldm" / "vocab.txt", tmp_path)
    for i in range(300 if full else 40):
        source = draw.choice(sources)
        file = tmp_path / source.name
        file.write_bytes(damage(data[source], draw))
        capsys.readouterr()
        arguments = ["sample", "a", "-n", "1", "--steps", "1", "--size", "32", "--device", "cpu"]
        arguments += ["--model", str(file), "--out", str(tmp_path / "g.png"), "--overwrite"]
        status = textinv.main(arguments)
        lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("note: ")]
        assert (status, len(lines)) in ((0, 0), (2, 1)), lines


def archives() -> dict[str, bytes]:
    """A small table of tensors in every format, with more than tensors beside it."""
    table = {f"layer.{i}.weight": torch.full((2, 3), float(i)) for i in range(6)}
    content = {"state_dict": table, "callbacks": {Path: [np.float64(0.5), Path("a")]}}
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    script = io.BytesIO()
    with warnings.catch_warnings():  # PyTorch would rather have another format
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, torch.ones(1, 2)), script)
    return {
        "lightning.ckpt": saved(content),
        "zip.safetensors": saved(content),
        "old.ckpt": saved(table, _use_new_zipfile_serialization=False),
        "table.safetensors": save(table),
        "safetensors.ckpt": save(table),
        "script.pt": script.getvalue(),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_archives(tmp_path, full):
    draw, files = random.Random(4), archives()
    for i in range(600 if full else 60):
        name = draw.choice([*files])
        path = tmp_path / name
        path.write_bytes(damage(files[name], draw))
        try:
            for tensor in open_state(path).values():
                tensor.float().sum()  # the data are read only here
        except CheckpointError as error:
            message = str(error)
            assert message.startswith(f"{path}: ") and message.isprintable()
