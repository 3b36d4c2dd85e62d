"""The paper's measurements: features against transformers, scores and statistics against numpy and
scipy, prompts, and OpenAI's TorchScript archive as torch.jit writes it."""

import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
import transformers
from helpers import GOLDEN, golden, randomize, units
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import textinv
from models import evaluation
from models.checkpoint import BUNDLED, load_clip
from models.clip import preprocess
from models.evaluation import (
    KINDS,
    Scorer,
    confidence,
    editability,
    rank,
    read_captions,
    read_prompts,
    reconstruction,
    without_placeholder,
)
from models.reading import CheckpointError
from models.tokenizers import CLIPTokenizer, WordPieceTokenizer

TINY = GOLDEN / "tiny" / "clip"
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
    monkeypatch.setattr(evaluation, "BATCH", 2)
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


def test_a_vocabulary_of_another_size():
    with pytest.raises(ValueError, match="256 tokens") as caught:
        Scorer.load(TINY / "openai-state-dict.safetensors")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------- OpenAI's TorchScript


class Node(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def modules(state: dict[str, Tensor]) -> nn.Module:
    """A tree of modules with these key names; a mask as OpenAI's blocks have it, no buffer."""
    root = Node()
    for key, value in state.items():
        *path, name = key.split(".")
        node = root
        for segment in path:
            if segment not in node._modules:
                node.add_module(segment, Node())
            node = node._modules[segment]
        if value.is_floating_point():
            node.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            node.register_buffer(name, value)
    root.transformer.resblocks._modules["0"].attn_mask = torch.zeros(77, 77)
    return root


def archive(path: Path, how: str = "trace") -> Path:
    """The golden state_dict as OpenAI publishes it: matrices in half precision, three sizes."""
    state = load_file(TINY / "openai-state-dict.safetensors")
    assert state["visual.proj"].dtype == torch.float16
    sizes = dict(input_resolution=32, context_length=77, vocab_size=256)
    root = modules(state | {k: torch.tensor(v) for k, v in sizes.items()})
    scripted = torch.jit.trace(root, torch.ones(1)) if how == "trace" else torch.jit.script(root)
    torch.jit.save(scripted, path)
    return path


def repickled(source: Path, target: Path, program: bytes) -> Path:
    """An archive with another data.pkl."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))
    return target


def doubled(root: bytes, i: int) -> bytes:
    """Opcodes of a module that has module i twice: a row of 60 has 2^60 paths."""
    memo = b"h" + bytes([i])
    names = (b"X\x01\x00\x00\x00" + letter for letter in (b"a", b"b"))
    return root + b"}(" + b"".join(name + memo for name in names) + b"ubq" + bytes([i + 1])


jit = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@jit
@pytest.mark.parametrize("how", ("trace", "script"))
def test_torchscript(how, tmp_path):
    model = load_clip(archive(tmp_path / "ViT-B-32.pt", how))
    reference = load_clip(TINY / "openai-state-dict.safetensors")
    assert model.config == reference.config
    state = reference.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    scorers = tiny_scorer(tmp_path / "ViT-B-32.pt"), tiny_scorer()
    assert torch.equal(*(s.texts(CAPTIONS) for s in scorers))
    assert torch.equal(*(s.images(pictures(2, (40, 40))) for s in scorers))


@jit
def test_nothing_in_a_torchscript_archive_runs(tmp_path):
    """Code as the archive's modules, as their state, as a value and as a call beside the state."""
    marker, source = tmp_path / "marker", archive(tmp_path / "model.pt")
    with zipfile.ZipFile(source) as file:
        name = next(n for n in file.namelist() if n.endswith("data.pkl"))
        good = file.read(name)
    call = f"cos\nsystem\n(X{{}}touch '{marker}'tR".encode()
    call = call.replace(b"{}", len(f"touch '{marker}'").to_bytes(4, "little"))
    assert pickle.loads(call + b".") == 0 and marker.exists(), "not as hostile as it should be"
    marker.unlink()
    root = b"c__torch__\nCLIP\n)\x81"
    programs = {
        "instead": call + b".",
        "as state": root + call + b"b.",
        "as value": root + b"}X\x04\x00\x00\x00evil" + call + b"sb.",
        "as name": root + b"}" + call + b"Nsb.",
        "attribute": root + b"}X\x09\x00\x00\x00__class__" + call + b"sb.",
        "reduce": b"c__torch__\nCLIP\n(" + call + b"tR.",
        "list": root + b"]b.",
        "cycle": root + b"q\x01}X\x01\x00\x00\x00ah\x01sb.",
        "shared": root + b"q\x00" + b"".join(doubled(root, i) for i in range(60)) + b".",
        "deep": (root + b"}X\x01\x00\x00\x00a") * 2000 + root + b"}b" + b"sb" * 2000 + b".",
    }
    for place, program in programs.items():
        with pytest.raises(CheckpointError) as caught:
            load_clip(repickled(source, tmp_path / "hostile.pt", program))
        message = str(caught.value)
        assert message.isprintable() and "hostile.pt" in message and "a CLIP" in message, place
        assert not marker.exists(), place
    # Beside good weights it does not matter.
    path = repickled(source, tmp_path / "hostile.pt", call + b"0" + good)
    state = load_clip(TINY / "openai-state-dict.safetensors").state_dict()
    assert all(torch.equal(v, state[k]) for k, v in load_clip(path).state_dict().items())
    assert not marker.exists()


@jit
def test_refusals_of_load_clip(tmp_path):
    """One line that names the file and says what a CLIP would be, whatever the accident."""
    whole = archive(tmp_path / "whole.pt").read_bytes()
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_bytes(b"<!DOCTYPE html>\n<html>")
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], tmp_path / "list.pt")
    state = load_file(TINY / "transformers/model.safetensors")
    text = {k: v for k, v in state.items() if not k.startswith("visual_projection")}
    save_file(text, tmp_path / "text.safetensors")
    names = ("empty.pt", "page.pt", "short.pt", "list.pt", "text.safetensors", "missing.pt", ".")
    for name in names:
        with pytest.raises(CheckpointError, match="a CLIP") as caught:
            load_clip(tmp_path / name)
        assert str(caught.value).isprintable() and str(tmp_path / name) in str(caught.value)
        assert "Stable Diffusion" not in str(caught.value)
    save_file(state | {"logit_scale": torch.ones(3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match="1 of another shape"):
        load_clip(tmp_path / "wrong.safetensors")


def test_heads_of_a_configuration(tmp_path):
    save_file(load_file(TINY / "transformers/model.safetensors"), tmp_path / "model.safetensors")
    for settings, found in (
        ("[1]", "damaged"),
        ('{"num_attention_heads": 3}', "3 attention heads"),
    ):
        (tmp_path / "config.json").write_text(f'{{"vision_config": {settings}}}')
        with pytest.raises(CheckpointError, match=found) as caught:
            load_clip(tmp_path)
        assert str(caught.value).isprintable()


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
    code = "import sys, models.evaluation; print({'scipy', 'transformers'} & sys.modules.keys())"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
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
    with pytest.raises(ValueError, match="no text file with captions"):
        read_captions(tmp_path / "nowhere.txt")
