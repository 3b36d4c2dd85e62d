"""Damaged files: each ends in success, or in one line and exit status 2. Nothing in them runs, and
nothing is left half written. 200 files by default, 1,500 with --full."""

import io
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

import textinv
from models.embeddings import FORMATS, SUFFIXES
from models.reading import rebuild_tensor

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


class Bomb:
    """What pickle would run, were it pickle that reads."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def hostile_archive(content: object) -> bytes:
    """A file of torch.save whose pickle holds more than tensors."""
    buffer = io.BytesIO()
    torch.save({"string_to_param": {"*": torch.zeros(1, 4)}}, buffer)
    out = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            is_table = name.endswith("data.pkl")
            new.writestr(name, pickle.dumps(content) if is_table else old.read(name))
    return out.getvalue()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> dict[str, bytes]:
    """A sound file of every embedding format."""
    folder = tmp_path_factory.mktemp("words")
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    word = textinv.Concept("<w>", vectors, {"steps": "5"})
    files = {}
    for format in FORMATS:
        for suffix in SUFFIXES[format]:
            path = folder / f"{format}{suffix}"
            word.save(path, format=format)
            files[path.name] = path.read_bytes()
    files["several.safetensors"] = save({"a": vectors[0].clone(), "a_1": vectors[1].clone()})
    return files


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
    for i in range(700 if full else 100):
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


def test_hostile_words_run_nothing(tmp_path, capsys):
    trace, out = tmp_path / "trace", tmp_path / "out.safetensors"
    bomb = Bomb(trace)
    contents = [bomb, {"string_to_param": bomb}, {"string_to_param": {"*": bomb}}, {"name": bomb}]
    shared = ()
    for _ in range(40):  # 2 ** 40 elements, in a few bytes
        shared = (shared, shared)
    contents += [{"name": shared}]
    for content in contents:
        (tmp_path / "word.pt").write_bytes(hostile_archive(content))
        ends_well(capsys, ["convert", tmp_path / "word.pt", out], out)
    save_file({"<w>": torch.full((1, 4), torch.nan)}, tmp_path / "nan.safetensors")
    ends_well(capsys, ["convert", tmp_path / "nan.safetensors", out], out)
    assert not trace.exists()


@pytest.mark.parametrize(
    "program",
    {
        "gigabytes": pickle.BYTEARRAY8 + (1 << 40).to_bytes(8, "little"),
        "state of an OrderedDict": b"ccollections\nOrderedDict\n)R}\x8c\x05itemsNsb",
        "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}\x8c\x07__doc__\x8c\x01xsb",
        "a long number as a shape": b"ctorch._utils\n_rebuild_tensor_v2\n(\x8c\x01aK\x00(\x8b"
        + (10_000).to_bytes(4, "little")
        + b"\x01" * 10_000
        + b"t(K\x01ttR",
    }.values(),
)
def test_pickles_that_ask_for_too_much_get_one_line(tmp_path, capsys, program):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.PROTO + b"\x04" + program + pickle.STOP)
    (tmp_path / "w.pt").write_bytes(archive.getvalue())
    ends_well(capsys, ["convert", tmp_path / "w.pt", tmp_path / "o.pt"], tmp_path / "o.pt")
    assert rebuild_tensor.__doc__ is None


def test_a_pickle_whose_keys_would_take_years_is_refused(tmp_path, capsys):
    program = pickle.MARK + pickle.EMPTY_TUPLE
    for i in range(40):
        program += pickle.BINPUT + bytes([i]) + pickle.BINGET + bytes([i]) + pickle.TUPLE2
    for table in (
        pickle.EMPTY_DICT + program.removeprefix(pickle.MARK) + pickle.NONE + pickle.SETITEM,
        program + pickle.NONE + pickle.DICT,
        program + pickle.FROZENSET,
    ):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", pickle.PROTO + b"\x04" + table + pickle.STOP)
        (tmp_path / "w.pt").write_bytes(archive.getvalue())
        assert textinv.main(["convert", str(tmp_path / "w.pt"), str(tmp_path / "o.pt")]) == 2
        assert "nested keys" in capsys.readouterr().err
