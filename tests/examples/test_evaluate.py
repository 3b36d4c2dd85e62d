"""examples/evaluate.py and scores.py: features against transformers, scores and intervals against
numpy and scipy, prompts, and the command line."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import chart
import evaluate
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import transformers
from elsewhere import elsewhere
from evaluate import (
    KINDS,
    Scorer,
    editability,
    plain_text,
    preprocess,
    rank,
    read_captions,
    read_prompts,
    reconstruction,
    without_placeholder,
)
from helpers import EXACT, GOLDEN, assert_close_std, golden, randomize, units
from PIL import Image
from scores import confidence
from torch import Tensor, nn

import textinv
from models.checkpoint import BUNDLED, load_clip
from models.tokenizers import CLIPTokenizer, WordPieceTokenizer

TINY = GOLDEN / "tiny" / "clip"
ROOT = Path(evaluate.__file__).parents[1]
MUSHROOM = ROOT / "examples" / "concepts" / "mushroom"
CAPTIONS = ("a photo of a cat", "a sketch", "", "on the moon " * 40, "Ünïcode, 3 signs!")


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Smooth noise: pictures that a network tells apart."""
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)) for _ in range(count)]
    return [image.resize(size, Image.Resampling.BICUBIC) for image in small]


def tiny_scorer(path: Path = TINY / "openai-state-dict.safetensors") -> Scorer:
    """The golden CLIP knows 256 tokens, too few for byte pairs; its last one is the end."""
    signs = [chr(c) for c in range(ord("!"), ord("z") + 1)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *signs, *("##" + c for c in signs)]
    vocab += [f"unused{i}" for i in range(255 - len(vocab))]
    return Scorer(load_clip(path), WordPieceTokenizer([*vocab, "[SEP]"]))


def largest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def theirs(model: nn.Module, images=(), ids=()) -> list[Tensor]:
    """Unit features of transformers' CLIPModel, whose methods return different things by version:
    of the whole model's output only."""
    size = model.config.vision_config.image_size
    with torch.no_grad():
        out = model(input_ids=torch.as_tensor(ids), pixel_values=preprocess(images, size))
    return [out.image_embeds, out.text_embeds]


# ------------------------------------------------------------------------------------- features


def test_features_and_scores_are_those_of_transformers():
    reference = transformers.CLIPModel.from_pretrained(
        TINY / "transformers", dtype=torch.float32
    ).eval()
    scorer = tiny_scorer()
    samples, training = pictures(7, (45, 70)), pictures(4, (64, 40), seed=1)
    ids = [scorer.tokenizer.pad(scorer.tokenizer.encode(text)) for text in CAPTIONS]
    images, texts = theirs(reference, samples + training, ids)
    ours = scorer.images(samples + training), scorer.texts(CAPTIONS)
    assert largest(ours[0], images) <= 1e-4 and largest(ours[1], texts) <= 1e-4
    assert ours[0].dtype == ours[1].dtype == torch.float32
    score = reconstruction(scorer.images(samples), scorer.images(training))
    assert abs(score - (images[:7] @ images[7:].T).mean().item()) <= 1e-4
    mean = F.normalize(images[:7].mean(dim=0), dim=0)
    for i, caption in enumerate(CAPTIONS):
        score = editability(scorer.images(samples), scorer.texts([caption]))
        assert abs(score - (mean @ texts[i]).item()) <= 1e-4
        assert score == editability(scorer.images(samples), scorer.texts([caption])[0])


def test_golden_features():
    """OpenAI's own numbers, by way of the scorer's preprocessing."""
    g, scorer = golden("clip"), tiny_scorer()
    images = [Image.fromarray(x.numpy()) for x in g["image_u8"]]
    assert largest(scorer.images(images), F.normalize(g["image_features"], dim=1)) <= 1e-4


@pytest.mark.parametrize("act, width", (("quick_gelu", 64), ("gelu", 64), ("gelu", 80)))
def test_a_folder_of_transformers(act, width, tmp_path):
    """With byte pairs, and with what a config.json alone can say: the heads and the exact GELU."""
    shared = dict(hidden_size=width, intermediate_size=4 * width, hidden_act=act)
    shared |= dict(num_hidden_layers=2, num_attention_heads=width // 16)
    reference = randomize(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=dict(vocab_size=640, bos_token_id=638, eos_token_id=639, **shared),
                vision_config=dict(image_size=32, patch_size=8, **shared),
                projection_dim=48,
            )
        )
    )
    reference.save_pretrained(tmp_path)
    scorer, file = Scorer.load(tmp_path), Scorer.load(tmp_path / "model.safetensors")
    assert isinstance(scorer.tokenizer, CLIPTokenizer)
    ids = [scorer.tokenizer.pad(scorer.tokenizer.encode(text)) for text in CAPTIONS]
    images, texts = theirs(reference, pictures(3, (50, 33)), ids)
    assert largest(scorer.images(pictures(3, (50, 33))), images) <= 1e-4
    assert largest(scorer.texts(CAPTIONS), texts) <= 1e-4
    assert torch.equal(file.texts(CAPTIONS), scorer.texts(CAPTIONS))


def test_padding_has_no_influence(tmp_path):
    """OpenAI pads with 0 and reads at the largest id; Stable Diffusion pads with the end."""
    scorer = tiny_scorer()
    first = scorer.texts(CAPTIONS)
    for pad_id in (0, 7, scorer.tokenizer.end_id):
        scorer.tokenizer.pad_id = pad_id
        assert torch.equal(scorer.texts(CAPTIONS), first)


def test_batches_and_modes(monkeypatch):
    scorer = tiny_scorer()
    images = pictures(5, (40, 31)) + [pictures(1, (1, 1))[0], pictures(1, (64, 3))[0].convert("L")]
    whole = scorer.images(images)
    monkeypatch.setattr(evaluate, "BATCH", 2)
    assert largest(scorer.images(images), whole) <= 1e-5
    assert largest(scorer.texts(CAPTIONS), torch.cat([scorer.texts([c]) for c in CAPTIONS])) <= 1e-5
    assert torch.allclose(whole.norm(dim=1), torch.ones(7)) and not whole.requires_grad
    for rows in (scorer.images, scorer.texts):
        with pytest.raises(ValueError, match="nothing to score"):
            rows([])


def test_bundled():
    scorer = Scorer.load()
    cat, sky = scorer.texts(["a photo of a cat", "on a blue background"])
    again = scorer.texts(["a photo of a cat"])[0]
    assert largest(cat, again) <= 1e-6 and cat @ sky < 0.99
    assert scorer.images(pictures(1, (64, 64))).shape == (1, len(cat))


@pytest.mark.parametrize(
    "prompt",
    ["a photo of a cat at a party", "portrait of a cat, highly detailed", "a cat and a dog"],
)
def test_the_bundled_model_draws_the_things_of_a_prompt(prompt):
    """Two at once, and beside unknown words, which are spelt in letters that it never read."""
    model, scorer = textinv.load_model(device="cpu"), Scorer.load()
    pictures = scorer.images(textinv.sample(model, prompt, n=4))
    things = "cat dog bear apple rocket castle tree key car star heart pumpkin".split()
    similarity = pictures @ scorer.texts([f"a photo of a {thing}" for thing in things]).T
    drawn = [thing for thing in things if f" {thing}" in prompt]
    best = similarity.mean(0).topk(len(drawn)).indices.tolist()
    assert sorted(things[i] for i in best) == sorted(drawn)


def test_a_vocabulary_of_another_size():
    with pytest.raises(ValueError, match="256 tokens") as caught:
        Scorer.load(TINY / "openai-state-dict.safetensors")
    assert "\n" not in str(caught.value)


def test_preprocess():
    g = golden("clip")
    pictures = [Image.fromarray(x.numpy()) for x in g["image_u8"]]
    assert_close_std(preprocess(pictures, 32), g["pixel_values"], EXACT)
    picture = Image.fromarray(g["preprocess.image_u8"].numpy())
    assert_close_std(preprocess([picture], 32)[0], g["preprocess.pixel_values"], EXACT)


@pytest.mark.parametrize("size", (32, 224))
def test_live_preprocess(size):
    # Version 5 has the processor that resizes by PIL under a name of its own.
    name = "CLIPImageProcessorPil" if transformers.__version__ >= "5" else "CLIPImageProcessor"
    processor = getattr(transformers, name)(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    rng, checked = np.random.default_rng(size), 0
    while checked < 12:
        w, h = (int(x) for x in rng.integers(size // 2, 3 * size, 2))
        surplus = size * max(w, h) // min(w, h) - size
        if surplus % 4 == 3:
            # Half a pixel is left over: OpenAI's crop rounds to even (here: up; see
            # `test_preprocess`), transformers' rounds down.
            continue
        mode = ("RGB", "L", "RGBA", "CMYK")[checked % 4]
        picture = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode)
        reference = processor(picture, return_tensors="pt")["pixel_values"]
        assert_close_std(preprocess([picture], size), reference, EXACT)
        checked += 1


# None leaves half a pixel over, where the two crops differ (see `test_live_preprocess`).
SHAPES = ((1, 1), (2, 3), (7, 2), (1, 40), (31, 33), (300, 200), (640, 480), (500, 33), (33, 501))


@pytest.mark.parametrize("size", (32, 224))
@pytest.mark.parametrize("shape", SHAPES)
def test_live_preprocess_of_odd_shapes(size, shape):
    """Tiny, narrow and wide pictures. Both resize by PIL, whose bicubic filter widens with the
    reduction (antialiasing)."""
    name = "CLIPImageProcessorPil" if transformers.__version__ >= "5" else "CLIPImageProcessor"
    processor = getattr(transformers, name)(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    w, h = shape
    pixels = np.random.default_rng(w).integers(0, 256, (h, w, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    reference = processor(picture, return_tensors="pt")["pixel_values"]
    assert (preprocess([picture], size) - reference).abs().max() <= 1e-4


# ---------------------------------------------------------------------------------- section 5.1


def test_scores_by_hand():
    samples, images, prompt = units(64, 16), units(5, 16, seed=1), units(16, seed=2)
    x, y, p = (v.double().numpy() for v in (samples, images, prompt))
    pairs = [x[i] @ y[j] for i in range(64) for j in range(5)]
    assert abs(reconstruction(samples, images) - np.mean(pairs)) <= 1e-6
    mean = x.sum(axis=0) / 64
    assert abs(editability(samples, prompt) - mean @ p / np.linalg.norm(mean)) <= 1e-6
    # The published code's number is smaller by the length of the mean.
    assert abs(editability(samples, prompt) * np.linalg.norm(mean) - (x @ p).mean()) <= 1e-6
    assert math.isclose(reconstruction(images[:1], images[:1]), 1, abs_tol=1e-6)


@pytest.mark.parametrize(
    "prompt, placeholder, left",
    (
        ("A photo of <cat> on the moon", "<cat>", "A photo of on the moon"),
        ("An oil painting of <cat>", "<cat>", "An oil painting of"),
        ("<cat> at night", "<cat>", "at night"),
        ("A photo of my own cat on fire", "my own cat", "A photo of on fire"),
        ("a <cat> and  a <cat>\tand a dog ", "<cat>", "a and a and a dog"),
        ("A photo of *, on the moon", "*", "A photo of , on the moon"),
        ("A photo of a <Cat>", "<cat>", "A photo of a <Cat>"),
        ("<cat>", "<cat>", ""),
    ),
)
def test_without_placeholder(prompt, placeholder, left):
    assert without_placeholder(prompt, placeholder) == left


def test_prompts():
    prompts = read_prompts()
    assert tuple(prompts) == KINDS and all(prompts.values())
    for kind, example in zip(
        KINDS, ("A photo of {} on the moon", "An oil painting of {}", "Elmo holding a {}")
    ):
        assert example in prompts[kind]
    every = [p for rows in prompts.values() for p in rows]
    assert len(set(every)) == len(every) and all(
        p.format("<cat>").count("<cat>") == 1 for p in every
    )
    known = set((BUNDLED / "vocab.txt").read_text().split())
    unknown = [p for p in every if set(p.format("cat").lower().split()) - known]
    assert unknown == ["Elmo holding a {}"]


def test_prompts_of_our_own(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        b"\xef\xbb\xbf# a comment\r\n\r\n style :  {} in the style: new  \r\n  # another\nstyle: {}"
    )
    assert read_prompts(path) == {
        "background": [],
        "style": ["{} in the style: new", "{}"],
        "composition": [],
    }


@pytest.mark.parametrize(
    "line",
    (
        "colour: a red {}",
        "A photo of {} on the moon",
        "style: an oil painting",
        "style: {} and {}",
        "style: {0} painted",
        "style: {} {",
        "style: } {",
        "style:",
        "\x00\x1b[31m" * 100,
    ),
)
def test_a_line_that_is_no_prompt(line, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"# prompts\nstyle: a sketch of {{}}\n{line}\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        read_prompts(path)
    assert str(caught.value).isprintable() and str(path) in str(caught.value)


def test_no_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# nothing yet\n")
    with pytest.raises(ValueError, match="no prompts") as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


# --------------------------------------------------------------------------- confidence intervals


@pytest.mark.parametrize("n", (2, 5, 64, 5000))
@pytest.mark.parametrize("level", (0.5, 0.95, 0.9999))
def test_confidence(n, level):
    values = np.random.default_rng(n).normal(3, 2, n)
    mean, half = confidence(values.tolist(), level)
    error = values.std(ddof=1) / math.sqrt(n)
    low, high = scipy.stats.t.interval(level, n - 1, values.mean(), error)
    assert abs(mean - values.mean()) <= 1e-9
    assert abs(half - (high - low) / 2) <= 1e-6 * half


def test_statistics_of_too_little():
    with pytest.raises(ValueError, match="two values"):
        confidence([1.0])
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f"found {level}"):
            confidence([1.0, 2.0], level)


def test_needs_nothing_else():
    """Neither scipy nor transformers at run time."""
    code = "import sys, evaluate; print({'scipy', 'transformers'} & sys.modules.keys())"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "examples",
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "set()"


def test_rank_puts_the_picture_of_the_text_first():
    """The bundled CLIP knows its own training words."""
    scorer = Scorer.load()
    model = textinv.load_model()
    words = ("cat", "tomato", "airplane")
    pictures = [textinv.sample(model, f"a photo of a {word}", steps=20)[0] for word in words]
    for i, word in enumerate(words):
        order = rank(scorer, pictures, f"a photo of a {word}")
        assert order[0] == i and sorted(order) == [0, 1, 2]


def test_captions_are_short_up_to_12_words(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a cat\n\n" + "very " * 11 + "long\n" + "very " * 12 + "long\n")
    captions = read_captions(path)
    assert [len(lines) for lines in captions.values()] == [2, 1]
    assert list(captions) == ["short captions", "long captions"]
    with pytest.raises(ValueError, match="not a text file with captions"):
        read_captions(tmp_path / "nowhere.txt")


# ----------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def word(tmp_path_factory) -> Path:
    """A word of the bundled model that is not trained."""
    path = tmp_path_factory.mktemp("word") / "m.safetensors"
    textinv.Concept("<m>", textinv.initial_vectors(textinv.load_model(), "plant", 1)).save(path)
    return path


def mistake(capsys, *arguments: object) -> str:
    """The one line on standard error that a mistake ends in."""
    assert evaluate.main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line and not line.startswith("note: ") and "|" not in line]
    assert len(lines) == 1 and lines[0].startswith("textinv: "), lines
    return lines[0]


def test_words_and_references_are_measured(word, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("background: {} on the beach\nstyle: a sketch of {}\n")
    (tmp_path / "captions.txt").write_text("a red mushroom\n" + "a very long story " * 4)
    out = tmp_path / "scores.csv"
    arguments = [word, "--images", MUSHROOM, "-n", "2", "--steps", "1", "--device", "cpu"]
    arguments += ["--prompts", tmp_path / "prompts.txt", "--references", "--out", out]
    arguments += ["--captions", tmp_path / "captions.txt"]
    with_chart = [*arguments, "--chart", tmp_path / "chart.png"]
    assert evaluate.main([str(a) for a in with_chart]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    setups = dict.fromkeys(row["setup"] for row in rows)
    folder = word.parent.name
    assert [*setups] == [folder, "image only", "prompt only", "short captions", "long captions"]
    assert len(rows) == 3 * len(setups)
    assert all(-1 <= float(row["score"]) <= 1 for row in rows)
    assert "reconstruction" in capsys.readouterr().out
    assert Image.open(tmp_path / "chart.png").width > 200
    assert "--overwrite" in mistake(capsys, *arguments)
    nothing = ["--images", MUSHROOM, "--out", tmp_path / "n.csv"]
    assert "give words, --references" in mistake(capsys, *nothing)


def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path, capsys, word):
    empty = tmp_path / "pictures" / word.stem
    empty.mkdir(parents=True)
    table = tmp_path / "scores.csv"
    command = [word, "--images", empty, "--out", table, "-n", "1"]
    assert "no pictures" in mistake(capsys, *command)
    assert "two words are m" in mistake(capsys, word, word, "--images", MUSHROOM, "--out", table)
    wide = tmp_path / "wide.safetensors"
    textinv.Concept("<wide>", torch.zeros(1, 7)).save(wide)
    command = [word, wide, "--images", MUSHROOM, "--out", table]
    assert "7 wide" in mistake(capsys, *command) and not table.exists()


def test_a_faulty_weight_is_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(textinv, "load_for", None)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("style: a sketch of {}\nstyle: a (photo:1.2.3) of {}\n")
    command = ["--references", "--images", MUSHROOM, "--prompts", prompts]
    assert "is not a weight" in mistake(capsys, *command, "--out", tmp_path / "a.csv")
    assert [*tmp_path.iterdir()] == [prompts]


def test_a_chart_without_matplotlib_costs_only_the_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    table = tmp_path / "scores.csv"
    table.write_text("setup,name,kind,prompt,score\no,cat,reconstruction,,1\no,cat,style,a {},1\n")
    assert chart.main([str(table), str(tmp_path / "chart.png")]) == 1
    assert "no chart" in (said := capsys.readouterr().err) and "pip install matplotlib" in said
    assert not (tmp_path / "chart.png").exists()


def test_the_plain_text_names_what_the_word_began_as():
    word = textinv.Concept("<s>", torch.zeros(1, 4), {"init_word": "cat"})
    assert plain_text("a (<s>:1.2)  [on] <t>", [word]) == "a cat on <t>"


def test_words_are_measured_on_another_device(word, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("style: a sketch of {}\n")
    options = ["--images", MUSHROOM, "--prompts", prompts, "--steps", "2", "-n", "2"]
    with elsewhere():
        command = [word, *options, "--out", tmp_path / "scores.csv"]
        assert evaluate.main([str(a) for a in command]) == 0
