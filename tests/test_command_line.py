"""The verbs as a person uses them, and every mistake in one line with exit status 2."""

import argparse
import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import textinv
from models import runs

ROOT = Path(__file__).resolve().parent.parent
MUSHROOM = ROOT / "examples" / "concepts" / "mushroom"
TINY = ROOT / "tests" / "golden" / "tiny"
LEARN = ["invert", str(MUSHROOM), "--init-word", "plant", "--device", "cpu", "--batch-size", "1"]


@pytest.fixture(scope="module")
def word(tmp_path_factory) -> str:
    """A word of the bundled model, as good as untrained."""
    path = tmp_path_factory.mktemp("word") / "m.safetensors"
    assert textinv.main([*LEARN, "--steps", "1", "--preview-every", "0", "--out", str(path)]) == 0
    return str(path)


def mistake(capsys, *arguments: object) -> str:
    """The one line on standard error that a mistake ends in."""
    assert textinv.main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line and not line.startswith("note: ") and "|" not in line]
    assert len(lines) == 1 and lines[0].startswith("textinv: "), lines
    return lines[0]


def test_it_learns_and_draws(tmp_path, capsys):
    word, picture = str(tmp_path / "m.safetensors"), str(tmp_path / "m.png")
    options = ["--out", word, "--steps", "4", "--preview-every", "2"]
    assert textinv.main([*LEARN, *options, "--per-image", "--save-image-words"]) == 0
    names = {p.name for p in tmp_path.iterdir()}
    own = "m.safetensors m.json m.csv m.state m.inputs.png m.step-2.png".split()
    assert names == {*own, *(f"m.image-{i}.safetensors" for i in range(1, 6))}
    assert json.loads((tmp_path / "m.json").read_text())["init_word"] == "plant"
    rows = list(csv.DictReader((tmp_path / "m.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and float(rows[3]["moved"]) > 0
    draw = ["sample", "a sketch of <m>", "a <typo>", "--concept", word, "-n", "2", "--steps", "2"]
    assert textinv.main([*draw, "--out", picture, "--singles", str(tmp_path / "all")]) == 0
    assert "<typo>" in capsys.readouterr().err
    assert "a sketch of <m>" in Image.open(picture).text["prompt"]
    assert len(list((tmp_path / "all").iterdir())) == 4
    assert "--overwrite" in mistake(capsys, *draw, "--out", picture)
    assert "--resume" in mistake(capsys, *LEARN, *options)


def test_the_sampler_and_its_steps_are_kept_in_the_picture(tmp_path):
    for sampler, eta, steps in (("dpm++", 0.0, 14), ("ddim", 0.5, 50)):
        picture = tmp_path / f"{steps}.png"
        option = [] if sampler == "dpm++" else ["--sampler", sampler, "--eta", str(eta)]
        assert textinv.main(["sample", "a cat", "-n", "1", "--out", str(picture), *option]) == 0
        kept = json.loads(Image.open(picture).text["settings"])
        assert (kept["sampler"], kept["eta"], kept["steps"]) == (sampler, eta, steps)


@pytest.mark.parametrize(
    "arguments",
    [
        ["invert", "nowhere", "--init-word", "plant"],
        ["invert", str(MUSHROOM)],
        ["sample", "a cat", "--model", "nowhere.ckpt"],
    ],
)
def test_mistakes_are_one_line_and_exit_status_2_of_the_process(tmp_path, arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "textinv.py", *arguments, "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("textinv: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, says",
    [
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--seed", "-1"], "seed is -1"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--vectors", "0"], "vectors is 0"),
        (
            ["--init-word", "  "],
            "--init-word is missing",
        ),
        (["--placeholder", "my cat"], "has a space in it; use a name like <cat>"),
        (["--placeholder", ""], "is empty"),
        (["--placeholder", "cat"], "is an ordinary word of this model"),
        (["--templates", "nofile.txt"], "object, style, captions (cat.txt beside cat.jpg), a file"),
        (["--templates", "captions"], "1.txt"),
        (["--device", "abacus"], "no device abacus; use cpu, or cuda"),
        (["--out", "word.doc"], "possible are diffusers: .safetensors"),
        (["--out", "."], "a word is not written as ''"),
        (["--save-every", "0"], "save_every is 0"),
        (["--preview-every", "-1"], "preview_every is -1"),
        (["--steps", "many"], "invalid int value: 'many'; see textinv.py invert --help"),
        (["--lr", "quick"], "use a number, base, high, low"),
        (["--save-image-words"], "--per-image"),
        (["--vectors", "1001"], "is not read in"),
        (["--progressive", "--vectors", "2"], "needs 3 vectors"),
    ],
)
def test_mistakes_in_learning(tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.chdir(tmp_path)
    assert says in mistake(capsys, *LEARN, "--out", "m.safetensors", *change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, says",
    [
        (["-n", "0"], "n is 0; it must be at least 1"),
        (["--steps", "0"], "steps 0 is out of range; use 1 to 1000"),
        (["--eta", "2"], "eta is 2.0"),
        (["--sampler", "euler"], "invalid choice: 'euler'"),
        (["--size", "72"], "must be multiples of 16"),
        (["--size", "65"], "'65' is not a size; use multiples of 8"),
        (["--size", "64x64x64"], "is not a size; use multiples of 8"),
        (["--size", "big"], "use multiples of 8"),
        (["--seed", "-3"], "seed is -3"),
        (["--guidance", "nan"], "guidance_scale is nan"),
        (["--concept", "nowhere.safetensors"], "no such file"),
        (["--rename", "a=b"], "--rename a=b: write OLD=NEW; OLD may be no word yet"),
        (["--out", "a.jpg"], "is not a .png file"),
    ],
)
def test_mistakes_in_drawing(tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.chdir(tmp_path)
    assert says in mistake(capsys, "sample", "a cat", "--steps", "1", "--device", "cpu", *change)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_no_cuda_although_asked_for(capsys):
    assert "no device cuda; use cpu" in mistake(capsys, "sample", "a cat", "--device", "cuda")


def test_bad_folders_and_pictures(tmp_path, capsys):
    def learn(folder: Path) -> list[object]:
        return ["invert", folder, *LEARN[2:], "--steps", "1", "--out", tmp_path / "w.safetensors"]

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no pictures" in mistake(capsys, *learn(empty))
    (empty / "notes.txt").write_text("x")
    (empty / "IMG_1.HEIC").write_bytes(b"x")
    assert textinv.main([str(a) for a in learn(empty)]) == 2
    assert "save it as JPEG" in capsys.readouterr().err
    mixed = tmp_path / "mixed"
    shutil.copytree(MUSHROOM, mixed)
    (mixed / "bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert "bad.jpg: not readable as a picture" in mistake(capsys, *learn(mixed))


def test_the_word_is_not_written_among_the_pictures(tmp_path, monkeypatch, capsys):
    shutil.copytree(MUSHROOM, tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m")
    said = mistake(capsys, "invert", ".", "--init-word", "plant", "--steps", "1")
    assert "--out ../m.safetensors" in said
    assert len(list((tmp_path / "m").iterdir())) == 5


def to_try(capsys) -> list[str]:
    """Return the arguments of the command that a run recommends; it calls this same program."""
    program, *arguments = shlex.split(capsys.readouterr().out.rpartition("try: python ")[2])
    assert program == sys.argv[0]
    return arguments


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    out = tmp_path / "w.pt"
    learn = [*LEARN, "--steps", "2", "--preview-every", "0", "--out", str(out)]
    assert textinv.main(learn) == 0
    command = to_try(capsys)
    assert command[-1] == "w.pt=<w>"  # A1111 calls the word of a .pt after its file
    draw = ["--device", "cpu", "--steps", "1", "-n", "1", "--out", str(tmp_path / "grid.png")]
    assert textinv.main([*command, *draw]) == 0
    assert torch.load(out)["name"] == "<w>"
    before = out.read_bytes()
    assert textinv.main([*learn, "--resume"]) == 0
    assert "the run is over after 2 steps" in capsys.readouterr().out and out.read_bytes() == before
    (tmp_path / "w.state").unlink()
    assert "its state is gone" in mistake(capsys, *learn, "--resume")
    (tmp_path / "w.step-7.png").write_text("mine")
    for name in ("w.pt", "w.csv", "w.json", "w.inputs.png"):
        (tmp_path / name).unlink()
    assert "w.step-7.png: there already" in mistake(capsys, *learn)


def test_a_full_disk_is_said_before_the_first_step(tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    said = mistake(capsys, *LEARN, "--steps", "3", "--out", tmp_path / "new" / "m.safetensors")
    assert "m.json cannot be written: No space left on device" in said
    assert not list((tmp_path / "new").iterdir())


def test_nan_keeps_the_last_good_word(tmp_path, capsys, monkeypatch):
    model = textinv.load_model(device="cpu", dtype=torch.float32)
    monkeypatch.setattr(textinv, "load_model", lambda *_: model)
    table_row = runs.table_row

    def break_after_two(state):
        if state.step == 2:
            model.unet.out[2].bias.data[0] = torch.nan
        return table_row(state)

    monkeypatch.setattr(runs, "table_row", break_after_two)
    out = tmp_path / "m.safetensors"
    said = mistake(capsys, *LEARN, "--steps", "9", "--out", out)
    assert "step 3: the UNet gave NaN or infinity" in said and "--precision" in said
    kept = textinv.load_concept(out)
    assert kept.vectors.isfinite().all() and kept.metadata["steps"] == "2"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_helps(capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(textinv, "load_model", fail)
    assert "what helps: --precision bf16, a smaller -n" in mistake(capsys, "sample", "a cat")


def test_several_words_clash_until_one_is_renamed(word, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    shutil.copy(word, other)
    draw = ["sample", "a <m> and <n>", "--concept", word, "--concept", str(other), "-n", "1"]
    draw += ["--steps", "1", "--out", str(tmp_path / "g.png")]
    assert "two words are called <m>" in mistake(capsys, *draw)
    assert textinv.main([*draw, "--rename", "other.safetensors=<n>"]) == 0
    assert "not a learnt word" not in capsys.readouterr().err
    save_file({"<wide>": torch.zeros(1, 768)}, tmp_path / "wide.safetensors")
    said = mistake(capsys, *draw[:2], "--concept", tmp_path / "wide.safetensors", "--out", "x.png")
    assert "768 wide" in said and "192 wide" in said


@pytest.mark.parametrize("name", ["a.pt", "a.png", "a.safetensors"])
def test_words_convert_to_what_other_programs_read(word, tmp_path, name, capsys):
    out = tmp_path / name
    format = "emb_params" if name.endswith("tensors") else "a1111"
    assert textinv.main(["convert", word, str(out), "--format", format]) == 0
    again = textinv.load_concept(out)
    assert torch.equal(again.vectors, textinv.load_concept(word).vectors)
    assert "--overwrite" in mistake(capsys, "convert", word, out)
    assert textinv.main(["convert", str(out), str(tmp_path / "b.safetensors")]) == 0
    assert "possible are" in mistake(capsys, "convert", word, tmp_path / "a.doc")


def test_one_of_several_words_is_converted_by_name(tmp_path, capsys):
    both = tmp_path / "both.safetensors"
    save_file({"<a>": torch.zeros(1, 4), "<b>": torch.ones(2, 4)}, both)
    assert "<a>, <b>; say which one with --word" in mistake(
        capsys, "convert", both, tmp_path / "x.pt"
    )
    out = tmp_path / "x.safetensors"
    arguments = ["convert", both, out, "--word", "<b>", "--placeholder", "<c>"]
    assert textinv.main([str(a) for a in arguments]) == 0
    concept = textinv.load_concept(out)
    assert concept.placeholder == "<c>" and torch.equal(concept.vectors, torch.ones(2, 4))
    with pytest.raises(ValueError, match="holds 2 words"):
        textinv.load_concept(both)


def test_show_looks_into_words_checkpoints_and_prompts(word, capsys):
    assert textinv.main(["show", "--word", word, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "<m>: 1 vector(s) of 192 numbers" in said and "nearest: plant" in said
    assert "init_word: plant" in said and "norm" in said
    checkpoint = str(TINY / "sd2" / "model.safetensors")
    assert textinv.main(["show", "--model", checkpoint, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "sd2" in said and "-prediction" in said and "stored as float16" in said
    assert "unet" in said and "M parameters" in said
    prompt = ["show", "--prompt", "a (cat:1.5) <m>", "--concept", word, "--device", "cpu"]
    assert textinv.main(prompt) == 0
    said = capsys.readouterr().out
    assert " cat x 1.50\n" in said and "<m>, vector 1 of 1" in said
    assert "no such file" in mistake(capsys, "show", "--word", "nowhere.safetensors")
    assert "give --word FILE, --model PATH or --prompt TEXT" in mistake(capsys, "show")
    assert textinv.main(["show", "--prompt", "cat " * 200, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "only the first 22 are read" in said.err and said.out.count(" cat\n") == 22


def test_captions_beside_the_pictures_are_templates(tmp_path):
    pictures = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    (tmp_path / "a.txt").write_text("{} on a table\n\na {} seen from above\n")
    (tmp_path / "b.txt").write_text("no place for the word")
    with pytest.raises(ValueError, match="b.txt: 'no place for the word' has no {}"):
        textinv.read_templates("captions", pictures)
    (tmp_path / "b.txt").write_text("{}\n")
    texts = textinv.read_templates("captions", pictures)
    assert texts == [["{} on a table", "a {} seen from above"], ["{}"]]
    assert textinv.read_templates(str(tmp_path / "a.txt"), pictures) == texts[0]
    assert textinv.read_templates("{}", pictures) == ["{}"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has a peak of its own")
def test_the_peak_of_memory_is_not_that_of_the_process_before():
    child = "import torch; from models.runs import *; print(peak_memory(torch.device('cpu')))"
    parent = "import subprocess, sys; big = b'x' * (3 << 29); "
    parent += f"print(subprocess.check_output([sys.executable, '-c', {child!r}], text=True))"
    said = subprocess.check_output([sys.executable, "-c", parent], cwd=ROOT, text=True)
    assert 0.1 <= float(said.split()[0]) < 1.2


def test_a_faulty_weight_is_said_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(textinv, "load_for", None)
    draw = ["sample", "a cat", "a (dog:1.2.3)", "--singles", tmp_path / "all"]
    assert "is not a weight" in mistake(capsys, *draw, "--out", tmp_path / "a.png")
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_that_is_not_there_is_named(capsys):
    assert "n: no such file or folder" in mistake(capsys, "show", "--model", "n")


def test_the_command_to_try_next_works_as_it_stands(tmp_path, capsys, monkeypatch):
    """With a space in the names, and the model that the word was learnt with."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MUSHROOM, "my cat")
    model = str(ROOT / "models" / "emoji")
    learn = ["invert", "my cat", "--init-word", "plant", "--model", model, "--device", "cpu"]
    learn += ["--prediction", "v"]
    assert textinv.main([*learn, "--steps", "1", "--batch-size", "1"]) == 0
    command = to_try(capsys)
    assert command[-4:] == ["--model", model, "--prediction", "v"]
    assert textinv.main([*command, "--device", "cpu", "--steps", "1", "-n", "1"]) == 0
    assert Path("grid.png").exists()


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings as A1111 reads them: the last line is "label: value"
    pairs, a value with commas or colons is a JSON string."""
    *lines, last = text.split("\n")
    start = next((i for i, x in enumerate(lines) if x.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    values = {label: json.loads(v) if v.startswith('"') else v for label, v in pairs}
    return "\n".join(lines[:start]), negative, values


@pytest.mark.parametrize(
    "prompt, negative",
    [
        ("a (cat:1.2), Steps: 9", ""),
        ("several\nlines, of: text", "ugly, (bad:1.3)\nworse"),
        ("ein Löwe 고양이 \U0001f981", "häßlich"),
        ("", "no prompt"),
    ],
)
def test_pictures_carry_what_a1111_reads(tmp_path, prompt, negative):
    """Latin-1 in a tEXt chunk, as that program writes it, the rest in iTXt."""
    checkpoint = tmp_path / "my, model: v1.5.safetensors"
    shutil.copy(TINY / "sd1" / "model.safetensors", checkpoint)
    shutil.copy(TINY / "sd1" / "config.yaml", tmp_path)
    draw = ["sample", prompt, "--negative", negative, "--model", str(checkpoint), "-n", "2"]
    draw += [
        "--steps",
        "3",
        "--seed",
        "7",
        "--size",
        "64x32",
        "--guidance",
        "6.5",
        "--device",
        "cpu",
    ]
    assert textinv.main([*draw, "--singles", str(tmp_path), "--out", str(tmp_path / "g.png")]) == 0
    digest = hashlib.sha256(checkpoint.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    for name, seed in (("g.png", "7"), ("0000.png", "7"), ("0001.png", "8")):
        image = Image.open(tmp_path / name)
        assert image.text["prompt"] == prompt
        assert json.loads(image.text["settings"])["negative"] == negative
        found = parse_parameters(image.text["parameters"])
        assert found[:2] == (prompt, negative)
        assert found[2] == {
            "Steps": "3",
            "Sampler": "DPM++ 2M Karras",
            "CFG scale": "6.5",
            "Seed": seed,
            "Size": "64x32",
            "Model hash": digest,
            "Model": "my, model: v1.5",
            "Clip skip": "1",
        }
        latin = all(ord(c) < 256 for c in prompt + negative)
        assert (b"tEXtparameters" in (tmp_path / name).read_bytes()) == latin


def test_models_without_a_file_of_their_own_have_no_hash(tmp_path):
    for model in ([], ["--model", str(TINY / "sd1" / "diffusers")]):
        out = tmp_path / f"{len(model)}.png"
        draw = ["sample", "a", "b", "--steps", "1", "-n", "1", "--out", str(out), "--size", "64"]
        assert textinv.main([*draw, *model]) == 0
        prompt, _, values = parse_parameters(Image.open(out).text["parameters"])
        assert prompt == "a\nb" and values["Model"] == ("diffusers" if model else "emoji")
        assert ("Model hash" in values) == (not model)  # the bundled one is a file


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_prompts_come_from_a_file(tmp_path, mark, capsys):
    file, out = tmp_path / "p.txt", tmp_path / "g.png"
    file.write_bytes(mark + "a cat\r\n\r\n \t\nein Löwe\n".encode())
    draw = ["--prompts", str(file), "-n", "1", "--steps", "1", "--device", "cpu", "--overwrite"]
    for given in ([], ["first", "second"]):
        assert textinv.main(["sample", *given, *draw, "--out", str(out)]) == 0
        prompts = Image.open(out).text["prompt"].split("\n")
        assert prompts == [*given, "a cat", "ein Löwe"]
    assert textinv.main(["sample", *draw, "--out", str(out), "last"]) == 0
    assert Image.open(out).text["prompt"].split("\n") == ["last", "a cat", "ein Löwe"]


def test_no_prompts_are_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(textinv, "load_for", None)
    empty, other = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    other.write_bytes("Löwe\n".encode("latin-1"))
    for given in ([], ["--prompts", empty]):
        said = mistake(capsys, "sample", *given, "--out", tmp_path / "g.png")
        assert "give PROMPT in quotes, or --prompts FILE" in said
    assert "save it as UTF-8" in mistake(capsys, "sample", "--prompts", other)
    assert "nowhere.txt" in mistake(capsys, "sample", "a", "--prompts", tmp_path / "nowhere.txt")


def test_words_of_the_negative_prompt_count(word, tmp_path, capsys):
    draw = ["sample", "a cat", "--concept", word, "-n", "1", "--steps", "1", "--device", "cpu"]
    draw += ["--out", str(tmp_path / "g.png"), "--overwrite"]
    assert textinv.main([*draw, "--negative", "(<m>:1.2), <n>"]) == 0
    said = capsys.readouterr().err
    assert "no prompt uses it" not in said and said.count("<n> is not a learnt word") == 1
    assert textinv.main([*draw, "--negative", "ugly"]) == 0
    assert "<m> was loaded, but no prompt uses it" in capsys.readouterr().err
    assert textinv.main([*draw, "--negative", "embedding:m"]) == 0
    assert "note" not in capsys.readouterr().err
    assert textinv.main([*draw, "--rename", "<m>=my-cat", "--negative", "two my-cats"]) == 0
    assert "my-cat was loaded, but no prompt uses it" in capsys.readouterr().err
    assert "'1,2' is not a weight" in mistake(capsys, *draw, "--negative", "(<m>:1,2)")


def test_clip_skip_is_remembered(tmp_path, capsys, monkeypatch):
    out = tmp_path / "w.safetensors"
    learn = [*LEARN, "--preview-every", "0", "--out", str(out), "--size", "32"]
    learn += ["--model", str(TINY / "sd1" / "model.safetensors"), "--batch-size", "1"]
    assert textinv.main([*learn, "--steps", "1", "--clip-skip", "2"]) == 0
    said = capsys.readouterr().out
    assert textinv.load_concept(out).metadata["clip_skip"] == "2"
    assert "--clip-skip 2" in said
    assert "clip_skip 2, now it is 1" in mistake(capsys, *learn, "--steps", "2", "--resume")
    assert textinv.main([*learn, "--steps", "2", "--clip-skip", "2", "--resume"]) == 0
    draw = ["sample", "a <w>", "--concept", str(out), "--rename", "w.safetensors=<w>", "--device"]
    draw += ["cpu", "--steps", "1", "-n", "1", "--size", "32", "--overwrite"]
    draw += ["--out", str(tmp_path / "g.png"), "--model", str(TINY / "sd1" / "model.safetensors")]
    capsys.readouterr()
    assert textinv.main(draw) == 0
    assert "<w> was learnt with clip skip 2; add --clip-skip 2" in capsys.readouterr().err
    first = (tmp_path / "g.png").read_bytes()
    assert textinv.main([*draw, "--clip-skip", "2"]) == 0
    assert "clip" not in capsys.readouterr().err
    assert first != (tmp_path / "g.png").read_bytes()
    values = parse_parameters(Image.open(tmp_path / "g.png").text["parameters"])[2]
    assert values["Clip skip"] == "2"
    assert "use 2 with some SD 1 models" in mistake(capsys, "sample", "a", "--clip-skip", "2")


def test_show_prompts_in_chunks_with_their_weights(capsys, monkeypatch):
    show = [
        "show",
        "--model",
        str(TINY / "sd1" / "model.safetensors"),
        "--device",
        "cpu",
        "--prompt",
    ]
    assert textinv.main([*show, "a (a:1.5) BREAK a"]) == 0
    tokens = [line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()[1:]]
    start, end = "<|startoftext|>", "<|endoftext|>"
    assert tokens == [start, "a</w>", "a</w> x 1.50", end, start, "a</w>", end]
    assert textinv.main([*show, "a " * 160]) == 0
    said = capsys.readouterr()
    assert said.out.count(start) == 3 and said.out.count(" a</w>\n") == 160 and not said.err
    assert textinv.main([*show, "[a:b:0.5] <lora:x:1> (embedding:y:1.2)"]) == 0
    said = capsys.readouterr().err
    assert said.count("note: ") == 3 and "embedding:y is not a learnt word" in said
    monkeypatch.setattr(textinv, "load_for", None)
    assert "'1,2' is not a weight" in mistake(capsys, *show, "(<cat>:1,2)")


@pytest.mark.parametrize("way", ["ascii", "cp1252", "| head -1", "2>&1 | head -1", ">&-", "2>&-"])
def test_output_that_nobody_sees_ends_nothing(tmp_path, way):
    """Characters that the terminal lacks, a closed pipe, closed streams."""
    learn = [*LEARN, "--steps", "1", "--preview-every", "0", "--out", "고양이.safetensors"]
    command = shlex.join([sys.executable, str(ROOT / "textinv.py"), *learn])
    encoding = dict(PYTHONIOENCODING=way) if way.isalnum() else {}
    command += "" if encoding else f" {way}"
    environment = os.environ | encoding
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, env=environment
    )
    assert done.returncode == 0
    assert (tmp_path / "고양이.safetensors").exists() and (tmp_path / "고양이.state").exists()


@pytest.mark.parametrize("name", ["猫" * 80, "é" * 120, "a" * 243])
def test_names_are_cut_by_bytes(tmp_path, capsys, name):
    out = tmp_path / f"{name}.safetensors"
    learn = [*LEARN, "--steps", "2", "--preview-every", "1", "--placeholder", "<m>"]
    learn += ["--per-image", "--save-image-words"]
    assert textinv.main([*learn, "--out", str(out)]) == 0
    assert out.exists() and len([*tmp_path.iterdir()]) == 11
    assert textinv.main([*learn, "--out", str(out), "--resume"]) == 0
    long = tmp_path / f"{name}123.safetensors"
    if len(os.fsencode(long.name)) > 255:
        assert "the name is too long" in mistake(capsys, *learn, "--out", long)


def test_the_help_of_each_verb_ends_with_an_example_that_works(tmp_path, capsys, monkeypatch):
    """One after the other: each uses the word that the first learns."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    few = ["--steps", "1"]
    for verb, more in dict(invert=few, sample=few, convert=[], show=[]).items():
        with pytest.raises(SystemExit, match="0"):
            textinv.main([verb, "--help"])
        example = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert example[:3] == ["python", "textinv.py", verb]
        assert textinv.main([*example[2:], *more]) == 0
    assert Path("grid.png").exists() and Path("mushroom.pt").exists()


def test_an_unknown_option_is_named(capsys):
    said = mistake(capsys, "sample", "a", "--guidence", "3")
    assert "unrecognized arguments: --guidence 3; see textinv.py --help" in said


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["invert", MUSHROOM, "--init-word", "a", "--batch-size", "0"], "batch_size is 0"),
        (["invert", MUSHROOM, "--init-word", "a", "--lr", "nan"], "lr is nan"),
        (["invert", MUSHROOM, "--init-word", "a", "--seed", "-1"], "seed is -1"),
        (["invert", MUSHROOM, "--init-word", "a", "--placeholder", "a b"], "has a space in it"),
        (["invert", MUSHROOM, "--init-word", "a", "--size", "100"], "use multiples of 8"),
        (["invert", MUSHROOM, "--init-word", "a", "--clip-skip", "3"], "choose from 1, 2"),
        (["invert", MUSHROOM, "--init-word", " "], "--init-word is missing"),
        (
            ["invert", MUSHROOM, "--init-word", "a", "--progressive", "--stop", "auto"],
            "progressive needs 3 vectors and no early stopping; drop the other option",
        ),
        (
            ["invert", MUSHROOM, "--init-word", "a", "--progressive", "--vectors", "2"],
            "needs 3 vectors and no early stopping",
        ),
        (["invert", MUSHROOM, "--init-word", "a", "--templates", ""], "textinv: '': "),
        (["sample", "a", "--rename", "a.pt"], "write OLD=NEW"),
        (["sample", "a", "--out", ""], "'' is not a .png file"),
        (["sample", "a", "--steps", "1001"], "use 1 to 1000"),
        (["sample", "a", "--eta", "-1"], "eta is -1.0"),
        (["sample", "a", "-n", "0"], "n is 0"),
        (["sample", "a", "--seed", "-1"], "seed is -1"),
        (["sample", "a", "--seed", "9" * 20], "and below 2^53"),
        (["invert", "nowhere", "--init-word", "cat"], "nowhere: no such folder, give a folder"),
        (["sample", "a", "--guidance", "inf"], "guidance_scale is inf"),
        (["sample", "a", "--size", "0"], "is not a size"),
        (["sample", "a", "--clip-skip", "0"], "choose from 1, 2"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(textinv, "load_model", None)
    assert says in mistake(capsys, *arguments)


def test_what_would_be_lost_is_said_before_the_model_is_loaded(word, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(textinv, "load_model", None)
    learn = [*LEARN, "--out", word]
    assert "use --resume, another --out, or --overwrite" in mistake(capsys, *learn)
    for overwrite in ([], ["--overwrite"]):
        said = mistake(capsys, *learn, "--resume", "--seed", "1", *overwrite)
        assert "seed 0, now it is 1" in said and "--overwrite, without --resume" in said
    for old, new in (("m.safetensors", "a b"), ("<m>", "a b")):
        draw = ["sample", "a", "--concept", word, "--rename", f"{old}={new}"]
        assert "has a space in it" in mistake(capsys, *draw)
    again = ["sample", "<m>", "--concept", word, "--concept", word]
    assert "two words are called <m>" in mistake(capsys, *again)
    assert "two words are called <m>" in mistake(capsys, "show", "--prompt", *again[1:])


@pytest.mark.parametrize("theirs", ["models.py", "models/__init__.py"])
def test_a_module_of_the_same_name_in_the_way_is_named(tmp_path, theirs):
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("class Net: pass\n")
    code = f"import sys; sys.path.append({str(ROOT)!r}); import textinv"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {(tmp_path / theirs).resolve()} hides textinv's own")


@pytest.mark.parametrize("out, named", (("v1.5.pt", "<v1.5>"), ("cat.pt", "<cat>")))
def test_the_placeholder_is_named_after_out_whatever_files_are_here(
    tmp_path, monkeypatch, out, named
):
    monkeypatch.chdir(tmp_path)
    Path("v1.5").write_text("a file")
    Path("IMG_2023").mkdir()
    Path("cat").symlink_to("IMG_2023")
    args = argparse.Namespace(images=str(MUSHROOM), out=out, placeholder=None)
    assert textinv.target_of(args) == (Path(out), named)


def test_options_are_not_abbreviated(capsys):
    assert "unrecognized arguments: --prompt" in mistake(capsys, "sample", "--prompt", "a cat")


def test_captions_of_other_trainers(tmp_path):
    pictures = [tmp_path / "1 - red cat.jpg", tmp_path / "b.jpg"]
    (tmp_path / "b.caption").write_text("a <c> in 木", "utf-16")
    (tmp_path / "t.txt").write_text("a [name], [filewords]\n", "utf-8-sig")
    texts = textinv.read_templates(str(tmp_path / "t.txt"), pictures, "<c>")
    assert texts == [["a {}, red cat"], ["a {}, a {} in 木"]]
    assert textinv.read_templates("captions", pictures[1:], "<c>") == [["a {} in 木"]]
    assert textinv.read_templates("my <c>", pictures, "<c>") == ["my {}"]
    assert textinv.read_templates("my [name]", pictures, "<c>") == ["my {}"]
    (tmp_path / "of <c>.txt").write_text("his {}")
    assert textinv.read_templates(str(tmp_path / "of <c>.txt"), pictures, "<c>") == ["his {}"]
    with pytest.raises(ValueError, match=r"my <c>\.txt': No such file"):
        textinv.read_templates(str(tmp_path / "my <c>.txt"), pictures, "<c>")
    (tmp_path / "b.caption").write_bytes(b"a {} caf\xe9")
    for choice in ("captions", "{} [filewords]"):
        with pytest.raises((ValueError, OSError), match=r"b\.caption: not text in UTF-8"):
            textinv.read_templates(choice, pictures[1:], "<c>")


def test_a_norm_far_from_the_tables_is_said_once(tmp_path, capsys):
    learn = [*LEARN, "--preview-every", "0", "--steps", "3"]
    for lr in ("100", "3"):
        out = ["--out", str(tmp_path / f"{lr}.pt")]
        assert textinv.main([*learn, "--lr", lr, *out]) == 0
        lines = re.split("[\r\n]+", capsys.readouterr().err)
        notes = [line for line in lines if "start over with a lower lr" in line]
        assert len(notes) == 1 and notes[0].startswith("note: ")  # not beside the progress bar
    assert textinv.main([*learn, "--out", str(tmp_path / "b.pt")]) == 0
    said = capsys.readouterr().err
    assert "lower lr" not in said and "photograph" not in said


def test_a_file_is_no_prompt(tmp_path, capsys):
    word, out = str(tmp_path / "kat.pt"), ["--out", str(tmp_path / "grid.png")]
    textinv.Concept("kat", torch.zeros(1, 192)).save(word)
    assert textinv.main(["sample", "--concept", word, word, "an apple", *out]) == 2
    assert f"{word} is no prompt; give --concept before" in capsys.readouterr().err
    few = ["--concept", word, "--steps", "1", "-n", "1"]
    assert textinv.main(["sample", "an apple", "embedding:kat.pt", *few, *out]) == 0


def test_photographs_and_the_bundled_model(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    Image.effect_noise((512, 400), 60).convert("RGB").save(tmp_path / "p" / "a.jpg")
    learn = ["invert", tmp_path / "p", *LEARN[2:], "--steps", "1", "--out", tmp_path / "a.pt"]
    assert textinv.main([str(a) for a in learn]) == 0
    assert "the bundled model knows only emoji" in capsys.readouterr().err
