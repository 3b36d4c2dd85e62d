"""Embedding files: ours read back, files as each program writes them, and what must be refused.

The files of other programs are built here field by field from their sources, with torch.save,
safetensors and PIL alone; ours are read here by what those programs do (A1111) or by themselves
(diffusers).
"""

import base64
import io
import json
import math
import pickletools
import re
import struct
import unicodedata
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import GOLDEN, TEXT, assert_close_std
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch import nn

import textinv
from models.checkpoint import BERT_VOCAB
from models.concepts import (
    FORMATS,
    MAX_TABLE,
    Concept,
    default_format,
    encode_concept,
    load_concepts,
    words_in,
)
from models.files import CheckpointError
from models.tokenizers import CLIPTokenizer, WordPieceTokenizer

TINY = GOLDEN / "tiny"
KINDS = (
    ("diffusers", ".safetensors"),
    ("emb_params", ".safetensors"),
    ("paper", ".pt"),
    ("a1111", ".pt"),
    ("a1111", ".png"),
)
ORIGIN = {"steps": "500", "base_model": "v1-5", "base_model_hash": "0123abcd"}


def vectors(count=2, width=768, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes(a.numpy()) == bytes(b.numpy())


def read_one(path):
    (word,) = load_concepts(path)
    assert word.vectors.dtype == torch.float32 and word.vectors.ndim == 2
    return word


def refused(path, match):
    """Reading fails with one printable line that names the file and says `match`."""
    with pytest.raises(CheckpointError, match=match) as caught:
        load_concepts(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 700
    return message


# ---------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize("width", (32, 768, 1024, 1280))
@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize(("format", "suffix"), KINDS)
def test_round_trip_is_exact(format, suffix, count, width, tmp_path):
    v = vectors(count, width)
    limits = torch.finfo(torch.float32)
    v[0, :6] = torch.tensor([-0.0, 1e-45, limits.max, limits.min, limits.tiny, 1 / 3])
    metadata = ORIGIN | {"init_word": "cat", "learnt": "\N{SNOWMAN}"}
    word = Concept("<Mü 👩‍🚀>", v, metadata)
    path = tmp_path / f"my.word{suffix}"
    path.write_bytes(encode_concept(word, format, suffix))
    again = read_one(path)
    assert same_bits(again.vectors, v)
    name = {"paper": "*", "a1111": "my.word"}.get(format, word.placeholder)
    assert again.placeholder == (word.placeholder if suffix == ".png" else name)
    kept = {"paper": {}, "a1111": ORIGIN}.get(format, metadata)
    assert again.metadata == kept


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
@pytest.mark.parametrize(("format", "suffix"), KINDS)
def test_a_view_of_a_table_is_written_without_the_table(format, suffix, dtype, tmp_path):
    table = nn.Parameter(vectors(5000, 64).to(dtype))
    path = tmp_path / f"w{suffix}"
    path.write_bytes(encode_concept(Concept("<w>", table[7:9]), format, suffix.upper()))
    assert same_bits(read_one(path).vectors, table[7:9].detach().float())
    assert path.stat().st_size < 100_000  # the table has 640,000 or more


def test_files_hold_what_their_programs_expect(tmp_path):
    v = vectors()
    word = Concept("<cat>", v, ORIGIN)
    for format, key in (("diffusers", "<cat>"), ("emb_params", "emb_params")):
        path = tmp_path / f"{format}.safetensors"
        path.write_bytes(encode_concept(word, format, ".safetensors"))
        assert list(load_file(path)) == [key]
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert header["__metadata__"] == ORIGIN | {"placeholder": "<cat>"}
    paper = load_ours(encode_concept(word, "paper", ".pt"))
    assert set(paper) == {"string_to_token", "string_to_param"}
    assert type(paper["string_to_param"]) is nn.ParameterDict
    assert same_bits(paper["string_to_param"]["*"].detach(), v)
    a1111 = load_ours(encode_concept(word, "a1111", ".pt"))
    fields = "string_to_token string_to_param name step sd_checkpoint sd_checkpoint_name"
    assert list(a1111) == fields.split()
    assert a1111["string_to_token"] == {"*": 265} and a1111["name"] == "<cat>"
    assert (a1111["step"], a1111["sd_checkpoint_name"]) == (500, "v1-5")
    bare = load_ours(encode_concept(Concept("<cat>", v, {"steps": "many"}), "a1111", ".pt"))
    assert bare["step"] is bare["sd_checkpoint"] is bare["sd_checkpoint_name"] is None


def load_ours(content):
    return torch.load(io.BytesIO(content), weights_only=False)


def test_the_papers_token_is_the_tokenizers():
    (clip,) = CLIPTokenizer.load().token_ids("*")
    (bert,) = WordPieceTokenizer.load(BERT_VOCAB).token_ids("*")
    for width, token in ((768, clip), (1024, clip), (1280, bert)):
        content = load_ours(encode_concept(Concept("<w>", vectors(1, width)), "paper", ".pt"))
        stored = content["string_to_token"]["*"]
        assert stored == token and stored.dtype == torch.int64 and stored.shape == ()


def test_formats_and_suffixes(tmp_path):
    assert [default_format(s) for s in (".safetensors", ".pt", ".PNG")] == [
        "diffusers",
        "a1111",
        "a1111",
    ]
    with pytest.raises(ValueError, match=r"'.bin'; possible are diffusers: \.safetensors"):
        default_format(".bin")
    assert tuple(FORMATS) == ("diffusers", "emb_params", "a1111", "paper")
    suffixes = (".safetensors", ".pt", ".png", ".bin", "")
    for format, suffix in {(f, s) for f in (*FORMATS, "kohya") for s in suffixes} - set(KINDS):
        with pytest.raises(ValueError, match=r"possible are.*a1111: \.pt or \.png"):
            encode_concept(Concept("<w>", vectors()), format, suffix)


@pytest.mark.parametrize(
    ("placeholder", "v"),
    [
        ("<w>", torch.full((1, 4), torch.nan)),
        ("<w>", torch.zeros(0, 4)),
        ("<w>", torch.zeros(1, 2, 4)),
        ("<w>", torch.zeros(2, 4, dtype=torch.int64)),
        ("<w>", torch.zeros(1001, 4)),
        ("<w>", torch.tensor([[1e300]], dtype=torch.float64)),
    ],
)
def test_nothing_is_written_that_could_not_be_read(placeholder, v):
    for format, suffix in KINDS:
        with pytest.raises(ValueError):
            encode_concept(Concept(placeholder, v), format, suffix)


def test_too_many_vectors_for_a_picture():
    with pytest.raises(ValueError, match="too many"):
        encode_concept(Concept("<w>", vectors(500)), "a1111", ".png")
    encode_concept(Concept("<w>", vectors(77, 1280)), "a1111", ".png")  # a whole prompt


def test_pictures(tmp_path):
    path = tmp_path / "w.png"
    for placeholder in ("<cat>", "\N{SOFT HYPHEN}", "<猫>", "w" * 300):
        path.write_bytes(encode_concept(Concept(placeholder, vectors()), "a1111", ".png"))
        assert Image.open(path).size == (512, 512)
        assert read_one(path).placeholder == placeholder
    picture = Image.effect_noise((40, 30), 50).convert("RGBA")
    path.write_bytes(encode_concept(Concept("<w>", vectors()), "a1111", ".png", picture))
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture.convert("RGB")))


# ----------------------------------------------------------------------------- other programs'


def old_parameter_dict(table):
    """A ParameterDict whose state is that of torch 1.6 to 1.11, which had no `_keys`."""
    module = nn.ParameterDict.__new__(nn.ParameterDict)
    hooks = "_backward_hooks _forward_hooks _forward_pre_hooks _state_dict_hooks".split()
    module.__dict__.update(
        training=True,
        _parameters=OrderedDict((k, nn.Parameter(v)) for k, v in table.items()),
        _buffers=OrderedDict(),
        _non_persistent_buffers_set=set(),
        _is_full_backward_hook=None,
        **{hook: OrderedDict() for hook in (*hooks, "_load_state_dict_pre_hooks")},
        _modules=OrderedDict(),
        _initialized=True,
    )
    return module


@pytest.mark.parametrize("old", (False, True))
@pytest.mark.parametrize("strings", (["*"], ["*", "sks", "<a b>"]))
def test_the_papers_file(old, strings, tmp_path):
    table = {s: vectors(1, 1280, seed) for seed, s in enumerate(strings)}
    parameters = old_parameter_dict(table) if old else nn.ParameterDict(OrderedDict(table))
    tokens = {s: torch.tensor(i) for i, s in enumerate(strings)}
    path = tmp_path / "embeddings_gs-4999.pt"
    torch.save({"string_to_token": tokens, "string_to_param": parameters}, path)
    words = load_concepts(path)
    assert [word.placeholder for word in words] == strings
    assert all(same_bits(word.vectors, table[word.placeholder]) for word in words)
    assert all(word.metadata == {} for word in words)


@pytest.mark.parametrize("kind", (dict, nn.ParameterDict, old_parameter_dict))
@pytest.mark.parametrize("name", ("trained-as", "*", None))
def test_a1111_pt_goes_by_its_file_name(kind, name, tmp_path):
    v = vectors(8)
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": kind({"*": v}),
        "name": name,
        "step": 0,
        "sd_checkpoint": "7460a6fa",
        "sd_checkpoint_name": None,
    }
    path = tmp_path / "bad hands v4.1.pt"
    torch.save(content, path)
    word = read_one(path)
    assert word.placeholder == "bad hands v4.1" and same_bits(word.vectors, v)
    assert word.metadata == {"steps": "0", "base_model_hash": "7460a6fa"}


def a1111_json(v, **fields):
    """What A1111's EmbeddingEncoder makes of its dictionary, as base64."""
    tensor = {"TORCHTENSOR": v.numpy().tolist() if isinstance(v, torch.Tensor) else v}
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, **fields}
    return base64.b64encode(json.dumps(content).encode())


def write_png(path, text, key="sd-ti-embedding", zip=False):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a photo of a cat")
    info.add_text(key, text, zip)
    Image.effect_noise((96, 64), 50).convert("RGB").save(path, "PNG", pnginfo=info)
    return path


def test_a1111_png(tmp_path):
    v = vectors(3)
    fields = dict(step=1500, sd_checkpoint="7460a6fa", sd_checkpoint_name="sd-v1-4")
    word = read_one(write_png(tmp_path / "cat-1500.png", a1111_json(v, name="cat", **fields)))
    assert word.placeholder == "cat" and same_bits(word.vectors, v)
    metadata = {"steps": "1500", "base_model_hash": "7460a6fa", "base_model": "sd-v1-4"}
    assert word.metadata == metadata
    for name in ({}, {"name": ""}, {"name": None}):
        path = write_png(tmp_path / "cat-1500.png", a1111_json(v, **name))
        assert read_one(path).placeholder == ("cat-1500" if name else "*")


def test_one_trainer(tmp_path):
    v, path = vectors(4), tmp_path / "cat.safetensors"
    save_file({"emp_params": v, "emp_params_out": vectors(4, seed=1)}, path)
    word = read_one(path)
    assert word.placeholder == "cat" and same_bits(word.vectors, v) and word.metadata == {}
    save_file({"emp_params_out": v}, path)
    refused(path, "output embedding")
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "*", "step": 0}
    torch.save(content | {"sd_checkpoint": "", "sd_checkpoint_name": ""}, tmp_path / "dog.pt")
    word = read_one(tmp_path / "dog.pt")
    assert word.placeholder == "dog" and word.metadata == {"steps": "0"}


def test_kohya(tmp_path):
    v = vectors(4).bfloat16()
    torch.save({"emb_params": v}, tmp_path / "cat.pt")
    metadata = {"ss_steps": "1600", "ss_sd_model_name": "model.ckpt"}
    save_file({"emb_params": v}, tmp_path / "cat.safetensors", metadata)
    for suffix, found in ((".pt", {}), (".safetensors", metadata)):
        word = read_one(tmp_path / f"cat{suffix}")
        assert word.placeholder == "cat" and word.metadata == found
        assert same_bits(word.vectors, v.float())


def save_safetensors(table, path):
    save_file(table, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("save", "suffix"), ((torch.save, ".bin"), (torch.save, ".pt"), (save_safetensors, ".bin"))
)
def test_diffusers(save, suffix, tmp_path):
    path, v = tmp_path / f"learned_embeds{suffix}", vectors(12, 8)
    save({"<cat-toy>": v[0].clone()}, path)
    assert read_one(path).placeholder == "<cat-toy>" and same_bits(read_one(path).vectors, v[:1])
    numbered = {f"<c>_{i}" if i else "<c>": v[i].clone() for i in range(12)}
    shuffled = {k: numbered[k] for k in sorted(numbered, reverse=True)}
    rows = {k: t[None].clone() for k, t in numbered.items()}
    for table in (numbered, shuffled, rows):
        save(table, path)
        assert read_one(path).placeholder == "<c>" and same_bits(read_one(path).vectors, v)
    names = ("a", "b_1", "a_1_1", "a_1", "c_2", "a_3")
    save({n: v[i].clone() for i, n in enumerate(names)} | {"b": v[:2].clone()}, path)
    found = {word.placeholder: word.vectors for word in load_concepts(path)}
    assert {name: len(w) for name, w in found.items()} == {
        "a": 2,
        "b": 2,
        "b_1": 1,
        "a_1_1": 1,
        "c_2": 1,
        "a_3": 1,
    }
    assert same_bits(found["a"], v[[0, 3]])


def test_harmful_characters_become_question_marks(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"<a\x1b[31m\nb\u202ec\x9b>": vectors()}, path, {"k\r": "v\x07", "n": "é👩‍🚀"})
    word = read_one(path)
    assert word.placeholder == "<a?[31m?b?c?>" and word.metadata == {"k?": "v?", "n": "é👩‍🚀"}
    path = write_png(tmp_path / "w.png", a1111_json(vectors(), name="\ud800\x00 "))
    assert read_one(path).placeholder == "??"
    strange = tmp_path / "a\nb\x1b.pt"
    torch.save({"emb_params": vectors()}, strange)
    assert read_one(strange).placeholder == "a?b?"
    save_file({"a\x1b[2J": torch.zeros(1, 2, 3)}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "shape")


@pytest.mark.parametrize("key", ("clip_l", "text_encoders_0"))
@pytest.mark.parametrize(("save", "suffix"), ((save_file, ".safetensors"), (torch.save, ".pt")))
def test_clip_l_alone_is_a_word_of_stable_diffusion_1(key, save, suffix, tmp_path):
    v, path = vectors(3), tmp_path / f"cat_emb{suffix}"
    save({key: v}, path)
    assert read_one(path).placeholder == "cat_emb" and same_bits(read_one(path).vectors, v)
    if save is save_file:
        save({key: v.half()}, path, {"placeholder": "<cat>"})
        assert read_one(path).placeholder == "<cat>"
        assert same_bits(read_one(path).vectors, v.half().float())


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2))
@pytest.mark.parametrize(("save", "suffix"), ((save_file, ".safetensors"), (torch.save, ".pt")))
def test_eight_bits(dtype, save, suffix, tmp_path):
    v, path = vectors(2).to(dtype), tmp_path / f"cat{suffix}"
    for content in ({"<cat>": v}, {"<cat>": v[0].clone()}, {"emb_params": v}, {"clip_l": v}):
        save(content, path)
        (stored,) = content.values()
        assert same_bits(read_one(path).vectors, stored.float().reshape(-1, 768))
    save({"clip_l": v, "clip_g": vectors(2, 1280).to(dtype)}, path)
    assert same_bits(read_one(path).vectors[:, :768].contiguous(), v.float())
    if suffix == ".pt":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "x"}, path)
        assert same_bits(read_one(path).vectors, v.float())


@pytest.mark.parametrize("suffix", (".pt", ".bin"))
@pytest.mark.parametrize("shape", ((768,), (1, 768), (4, 1024)))
@pytest.mark.parametrize("kind", (torch.Tensor.float, torch.Tensor.half, nn.Parameter))
def test_bare_tensors_are_called_after_the_file(kind, shape, suffix, tmp_path):
    v, path = kind(vectors(1, 4096).flatten()[: math.prod(shape)].reshape(shape)), None
    path = tmp_path / f"my cat{suffix}"
    torch.save(v, path)
    word = read_one(path)
    assert word.placeholder == "my cat"
    assert same_bits(word.vectors, v.detach().float().reshape(-1, shape[-1]))


def test_bundles_within_a_lora(tmp_path):
    lora = {"lora_unet_mid.lora_up.weight": torch.zeros(4, 4), "lora_te_a.alpha": torch.tensor(1.0)}
    one, two, wide = vectors(2), vectors(1, seed=1), vectors(2, 1280)
    bundle = {"bundle_emb.my.cat.string_to_param.*": one, "bundle_emb.<dog>.emb_params": two}
    path = tmp_path / "l.safetensors"
    for content in (lora | bundle, bundle):
        save_file(content, path)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            words = {word.placeholder: word.vectors for word in load_concepts(path)}
        assert set(words) == {"my.cat", "<dog>"}
        assert same_bits(words["my.cat"], one) and same_bits(words["<dog>"], two)
        said = ["<dog>, my.cat: read without the LoRA" in str(note.message) for note in notes]
        assert said == [True] * (content != bundle)
    save_file({"bundle_emb.x.clip_l": one, "bundle_emb.x.clip_g": wide}, path)
    word = read_one(path)
    assert word.placeholder == "x" and same_bits(word.vectors, torch.cat([one, wide], 1))
    save_file({"bundle_emb.x.clip_l": one}, path)
    assert read_one(path).placeholder == "x" and same_bits(read_one(path).vectors, one)


def test_a_hypernetwork_is_called_one(tmp_path):
    layers = {"linear.0.weight": torch.zeros(8, 4), "linear.0.bias": torch.zeros(8)}
    torch.save({768: (layers, layers), 320: (layers, layers)}, tmp_path / "h.pt")
    refused(tmp_path / "h.pt", "a hypernetwork")
    torch.save({768: [layers, layers], "step": 10, "name": "h"}, tmp_path / "h.pt")
    refused(tmp_path / "h.pt", "a hypernetwork")


# ------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["learned_embeds.bin"], 0),
        (["learned_embeds.safetensors"], 0),
        (["learned_embeds-steps-500.bin", "learned_embeds.bin", "other.pt"], 1),
        (["learned_embeds.bin", "learned_embeds.safetensors"], 1),
        (["learned_embeds-steps-500.safetensors", "learned_embeds-steps-1500.safetensors"], 1),
        (["learned_embeds-steps-3000.bin", "learned_embeds-steps-900.safetensors"], 0),
        (["cat.pt"], 0),
        (["cat_emb.safetensors"], 0),
    ],
)
def test_folders_with_a_word(names, newest, tmp_path):
    (tmp_path / "concept_images").mkdir()
    for name in ("README.md", "concept_images/1.jpeg", "type_of_concept.txt", ".gitattributes"):
        (tmp_path / name).write_text("x")
    (tmp_path / "token_identifier.txt").write_text("<cat-toy>")
    for seed, name in enumerate(names):
        save = save_file if name.endswith("safetensors") else torch.save
        save({"<toy>": vectors(1, seed=seed)}, tmp_path / name)
    word = read_one(tmp_path)
    assert word.placeholder == "<toy>" and same_bits(word.vectors, vectors(1, seed=newest))
    (word,) = words_in([str(tmp_path)], [f"{tmp_path.name}=<new>"])
    assert word.placeholder == "<new>"


def test_a_folder_with_one_word_among_other_files(tmp_path):
    save_file(
        {"lora_unet_a.alpha": torch.tensor(1.0)}, tmp_path / "pytorch_lora_weights.safetensors"
    )
    refused(tmp_path, "a LoRA")
    save_file({"clip_l": vectors(2)}, tmp_path / "cat_emb.safetensors")
    write_png(tmp_path / "cat.png", "x", "comment")
    assert read_one(tmp_path).placeholder == "cat_emb"
    torch.save({"emb_params": vectors(1)}, tmp_path / "dog.pt")
    refused(tmp_path, "2 words: cat_emb.safetensors, dog.pt; give a word's file")
    refused(TINY / "sd1/diffusers", r"no word, found model_index.json.*\(a model: --model\)")


def test_a_run_that_writes_a_pt_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save("cat/1.png")
    learn = ["invert", "cat", "--init-word", "cat", "--batch-size", "1", "--preview-every", "0"]
    learn += ["--device", "cpu", "--placeholder", "<cat>"]
    assert textinv.main([*learn, "--steps", "2", "--out", "whole.pt"]) == 0
    for steps in ("1", "2"):
        assert textinv.main([*learn, "--steps", steps, "--out", "w.pt", "--resume"]) == 0
    assert same_bits(read_one("w.pt").vectors, read_one("whole.pt").vectors)
    assert as_a1111_picks(torch.load("w.pt")).shape == (1, 192)
    assert (read_one("w.pt").placeholder, torch.load("w.pt")["name"]) == ("w", "<cat>")


# ------------------------------------------------------------------------------ read by others


def as_a1111_picks(content):
    """The tensor that A1111's loader takes out of a loaded file, or its complaint."""
    if "string_to_param" in content:
        table = content["string_to_param"]
        table = getattr(table, "_parameters", table)
        assert len(table) == 1, "multiple terms"
        return next(iter(table.items()))[1].detach().float()
    assert type(content) is dict and len(content) == 1
    tensor = next(iter(content.values()))
    assert type(tensor) is torch.Tensor
    return (tensor[None] if tensor.ndim == 1 else tensor).detach().float()


A1111_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|__builtin__ set|"
    r"torch (Float|Long)Storage|torch\.nn\.modules\.container ParameterDict"
)


@pytest.mark.parametrize(("format", "suffix"), KINDS)
def test_a1111_reads_ours(format, suffix, tmp_path):
    v, path = vectors(3), tmp_path / f"w{suffix}"
    path.write_bytes(encode_concept(Concept("<w>", v), format, suffix))
    if suffix == ".safetensors":
        content = load_file(path)
    elif suffix == ".png":
        text = base64.b64decode(Image.open(path).text["sd-ti-embedding"])
        content = json.loads(text)
        (tensor,) = content["string_to_param"].values()
        doubles = np.array(tensor["TORCHTENSOR"])  # A1111 goes by way of float64
        content["string_to_param"]["*"] = torch.from_numpy(doubles)
        assert content["name"] == "<w>" and content["string_to_token"] == {"*": 265}
    else:
        with zipfile.ZipFile(path) as archive:  # A1111 looks into the file before it loads it
            allowed = r"^([^/]+)/((data/\d+)|version|(data\.pkl))$"
            assert all(re.match(allowed, name) for name in archive.namelist())
            program = archive.read("archive/data.pkl")
        names = [arg for op, arg, _ in pickletools.genops(program) if op.name == "GLOBAL"]
        assert names and all(A1111_GLOBALS.fullmatch(name) for name in names), names
        content = torch.load(path, weights_only=False)
    assert same_bits(as_a1111_picks(content), v)


def pipeline():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        TINY / "sd1/diffusers",
        scheduler=scheduler,
        safety_checker=None,
        local_files_only=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=torch.float32)  # transformers keeps the file's half precision


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("format", ("diffusers", "a1111"))
@pytest.mark.filterwarnings("ignore:The configuration file of the unet")
@torch.no_grad()
def test_diffusers_draws_the_same_with_ours(format, count, tmp_path):
    model = textinv.load_model(TINY / "sd1/diffusers", device="cpu", dtype=torch.float32)
    v = model.text_encoder.token_table.std() * vectors(count, 32)
    word = Concept("<cat>", v)
    path = tmp_path / f"word{'.safetensors' if format == 'diffusers' else '.pt'}"
    word.save(path)
    pipe = pipeline()
    pipe.load_textual_inversion(str(path))
    prompt = "a photo of a <cat> on the beach"
    theirs, empty = pipe.encode_prompt(prompt, "cpu", 1, True)
    context, uncond = model.encode_text([prompt], [word]), model.encode_text([""])
    assert_close_std(context, theirs, TEXT)
    assert_close_std(uncond, empty, TEXT)
    without = model.encode_text([prompt])
    assert (context - without).abs().max() > 0.1 * without.std()  # the word counts

    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def predict(x_t, t):
        return model.guided(x_t, t, context, uncond, 7.5)

    *_, ours = model.schedule.ddim_sample(predict, x_T, 4)
    options = dict(num_inference_steps=4, guidance_scale=7.5, height=64, width=64)
    theirs = pipe(prompt, latents=x_T, output_type="latent", **options).images
    assert_close_std(ours, theirs, 5e-4)


# ------------------------------------------------------------------------------- names and models


@pytest.mark.parametrize("name", ("고양이", "café", "<Ünï-ầ>", "ガ", "और"))
@pytest.mark.parametrize("forms", (("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")))
def test_names_in_another_unicode_form(name, forms, tmp_path):
    stored, typed = (unicodedata.normalize(form, name) for form in forms)
    plain = unicodedata.normalize("NFC", name)
    save_file({stored: vectors(2, 32)}, tmp_path / "w.safetensors")
    word = read_one(tmp_path / "w.safetensors")
    assert word.placeholder == plain
    model = textinv.load_model(TINY / "sd1/model.safetensors", device="cpu")
    prompt, reference = f"a photo of {typed} here", "a photo of <w> here"
    same = Concept("<w>", word.vectors)
    for encode in (model.encode_text, model.encode_prompts):
        assert torch.equal(encode([prompt], [word]), encode([reference], [same]))
    (renamed,) = words_in([str(tmp_path / "w.safetensors")], [f"{typed}=<{stored}>"])
    assert renamed.placeholder == f"<{plain}>"
    save_file({stored: vectors(1, 32)}, tmp_path / f"{stored}.safetensors")
    (renamed,) = words_in([str(tmp_path / f"{stored}.safetensors")], [f"{typed}.safetensors=<x>"])
    assert renamed.placeholder == "<x>"
    torch.save({"emb_params": vectors()}, tmp_path / f"{stored}.pt")
    assert read_one(tmp_path / f"{stored}.pt").placeholder == plain


def test_unicode_forms_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, typed = (unicodedata.normalize(form, "내 고양이") for form in ("NFD", "NFC"))
    (tmp_path / folder).mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / folder / "1.png")
    short = ["--steps", "1", "--batch-size", "1", "--preview-every", "0", "--device", "cpu"]
    learn = ["invert", folder, "--init-word", "cat", *short]
    assert textinv.main(learn) == 0
    placeholder, path = "<내-고양이>", f"{folder}.safetensors"
    assert read_one(path).placeholder == placeholder
    named = ["--placeholder", unicodedata.normalize("NFD", placeholder)]
    assert textinv.main([*learn, *named, "--resume"]) == 0  # the same run
    prompts = [f"a {placeholder}", f"my {unicodedata.normalize('NFD', placeholder)}"]
    draw = ["sample", *prompts, "--concept", path, "-n", "1", "--steps", "1"]
    capsys.readouterr()
    assert textinv.main([*draw, "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "not a learnt word" not in said and "no prompt uses" not in said
    chosen = ["--word", named[1], "--placeholder", "<\u00e9>"]
    assert textinv.main(["convert", path, "x.safetensors", *chosen]) == 0
    assert read_one("x.safetensors").placeholder == "<é>" and not capsys.readouterr().err


def sd1_as(path, dtype, change=lambda v: v):
    """The tiny Stable Diffusion 1 under another name, in another precision, or fine-tuned."""
    state = load_file(TINY / "sd1/model.safetensors")
    state = {
        k: change(v.float()).to(dtype) if v.is_floating_point() else v for k, v in state.items()
    }
    save_file(state, path)
    return textinv.load_model(path, device="cpu")


def test_a_word_used_with_another_model(tmp_path, recwarn):
    base = textinv.load_model(TINY / "sd1/model.safetensors", device="cpu")
    about = dict(base_model=base.name, base_model_hash=base.fingerprint)
    word = Concept("<cat>", vectors(1, 32), about)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        same = sd1_as(tmp_path / "renamed.safetensors", dtype)
        textinv.sample(same, "a <cat>", [word], steps=1, size=64)
    textinv.sample(
        textinv.load_model(TINY / "sd1/diffusers", "cpu"), "a <cat>", [word], steps=1, size=64
    )
    torch.manual_seed(0)
    tuned = sd1_as(tmp_path / "tuned.safetensors", torch.float16, lambda v: v + 0.01 * v.std())
    for silent in ({}, about | {"base_model_hash": "7460a6fa"}, {"base_model_hash": "cc6cb27103"}):
        textinv.sample(tuned, "a <cat>", [replace(word, metadata=silent)], steps=1, size=64)
    assert not [w for w in recwarn if "fingerprint" in str(w.message)]
    with pytest.warns(UserWarning, match="<cat> .*with model.safetensors .*: tuned.safe"):
        textinv.sample(tuned, ["a <cat>", "my <cat>"], [word], steps=1, size=64)


def test_another_model_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = sd1_as(tmp_path / "base.safetensors", torch.float16)
    sd1_as(tmp_path / "tuned.safetensors", torch.float16, lambda v: v + 0.01 * v.std())
    about = dict(base_model=base.name, base_model_hash=base.fingerprint)
    Concept("<cat>", vectors(1, 32), about).save("cat.safetensors")
    assert textinv.main(["convert", "cat.safetensors", "a.pt", "--format", "a1111"]) == 0
    drawn = ["a <w>", "the <w>", "-n", "1", "--steps", "1", "--size", "64", "--overwrite"]
    for word, verb in (
        ("<w>", ["sample", *drawn, "--concept", "cat.safetensors", "--rename", "<cat>=<w>"]),
        ("<x>", ["show", "--prompt", "a <x>", "--concept", "a.pt", "--rename", "a=<x>"]),
        ("<cat>", ["show", "--word", "cat.safetensors"]),
    ):
        for model, notes in (("base", 0), ("tuned", 1)):
            options = ["--model", f"{model}.safetensors", "--device", "cpu"]
            assert textinv.main([*verb, *options]) == 0
            lines = capsys.readouterr().err.splitlines()
            said = [line for line in lines if line.startswith(f"note: {word} was")]
            assert len(said) == notes, said
            assert not notes or ("with base.safetensors" in said[0] and ": tuned.saf" in said[0])


# ------------------------------------------------------------------------- damaged and hostile


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def rezip(content, change, compress=zipfile.ZIP_STORED):
    """The zip file with every entry replaced by `change(name, data)`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        with zipfile.ZipFile(buffer, "w", compress) as target:
            for name in source.namelist():
                target.writestr(name, change(name, source.read(name)))
    return buffer.getvalue()


def test_a_large_description_is_refused_before_it_is_read(tmp_path):
    path, content = tmp_path / "w.pt", saved({"emb_params": vectors()})

    def bomb(name, data):
        return b"}" * (5 << 20) if name.endswith("data.pkl") else data

    path.write_bytes(rezip(content, bomb, zipfile.ZIP_DEFLATED))
    refused(path, "too many for a learnt word.*--model")
    header = b'{"__metadata__":{"a":"%s"}}' % (b"x" * MAX_TABLE)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path, "too many for a learnt word.*--model")


def test_compressed_and_misnamed_archives(tmp_path):
    """A zip packed anew, and one under the other format's name, are read as they are."""
    v = vectors()
    packed = rezip(saved({"emb_params": v}), lambda name, data: data, zipfile.ZIP_DEFLATED)
    for name, content in (("a.pt", packed), ("b.safetensors", saved({"emb_params": v}))):
        (tmp_path / name).write_bytes(content)
        assert same_bits(read_one(tmp_path / name).vectors, v)
    save_file({"emb_params": v}, tmp_path / "c.pt")
    assert same_bits(read_one(tmp_path / "c.pt").vectors, v)


def test_a_word_does_not_hang_on_its_file(tmp_path):
    """Vectors are copied, so a file written over in place afterwards changes nothing."""
    v, path = vectors(), tmp_path / "w.safetensors"
    for save in (torch.save, save_file):
        save({"<w>": v}, path)
        word = read_one(path)
        path.write_bytes(bytes(path.stat().st_size))
        assert same_bits(word.vectors, v)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"<w>": torch.tensor([[1.0, torch.nan]])}, "'<w>' holds NaN.*earlier"),
        ({"<w>": torch.tensor([[torch.inf, 1.0]])}, "NaN or infinity"),
        ({"<w>": torch.tensor([[1e300]], dtype=torch.float64)}, "NaN or infinity"),
        ({"clip_g": vectors(1, 1280)}, "needs clip_l and clip_g"),
        ({"<w>": torch.zeros(0, 768)}, r"shape \(0, 768\)"),
        ({"<w>": torch.zeros(2, 0)}, "shape"),
        ({"<w>": torch.tensor(1.0)}, "shape"),
        ({"<w>": torch.zeros(1, 2, 768)}, r"shape \(1, 2, 768\)"),
        ({"<w>": torch.zeros(1001, 4)}, "V from 1 to 1,000"),
        ({"<w>": torch.zeros(16385)}, "D to 16,384"),
        ({"<w>": torch.ones(2, 768, dtype=torch.int64)}, "int64.*floats"),
        ({"a": vectors(1), "a_1": vectors(1, 1024)}, "Sizes of tensors must match"),
        ({}, "no vectors"),
        ({"emp_params_out": vectors(1)}, "output embedding"),
        ({"lora_unet_down_blocks_0.alpha": torch.tensor(4.0)}, "a LoRA"),
        ({"lora_te_text_model_0.lora_up.weight": torch.zeros(4, 4)}, "a LoRA"),
        ({"unet.mid_block.0.to_q.lora_A.weight": torch.zeros(4, 4)}, "a LoRA"),
        ({"lycoris_mid_block_0.lokr_w1": torch.zeros(4, 4)}, "a LoRA"),
        ({"encoder.conv_in.weight": torch.zeros(4, 4)}, "an autoencoder"),
        ({"decoder.up.3.block.0.conv1.weight": torch.zeros(4, 4)}, "an autoencoder"),
        ({"text_model.final_layer_norm.bias": torch.zeros(4)}, "model's weights.*--model"),
    ],
)
def test_tables_that_are_no_words(table, match, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(table, path)
    refused(path, match)
    torch.save(table, path)
    refused(path, match)


@pytest.mark.parametrize("name", ("sd1/model.safetensors", "sd1/model.ckpt", "ldm/model.ckpt"))
def test_a_checkpoint_is_called_one(name):
    refused(TINY / name, "a checkpoint goes to --model")


def test_files_of_torch_before_1_6(tmp_path):
    path = tmp_path / "w.pt"
    for content in ({"<w>": vectors()}, {"string_to_param": {"*": vectors()}}):
        path.write_bytes(saved(content, _use_new_zipfile_serialization=False))
        assert same_bits(read_one(path).vectors, vectors())


@pytest.mark.parametrize(("format", "suffix"), KINDS)
def test_truncated_and_scrambled_files(format, suffix, tmp_path):
    path, whole = (
        tmp_path / f"w{suffix}",
        encode_concept(Concept("<w>", vectors(1, 8)), format, suffix, Image.new("L", (8, 8))),
    )
    text_end = whole.find(b"IDAT") - 8 if suffix == ".png" else len(whole)
    for size in (0, 1, 7, 8, 9, 30, 100, text_end // 2, text_end - 1 - 4 * (suffix == ".png")):
        path.write_bytes(whole[:size])
        refused(path, "found|picture without a word")
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            word = read_one(path)
            assert word.vectors.isfinite().all()
        except CheckpointError as error:
            assert str(error).isprintable() and str(path) in str(error)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (a1111_json([[1.0, 2.0], [3.0]]), "expected"),
        (a1111_json([[1.0, "x"]]), "expected"),
        (a1111_json([[float("nan")]]), "NaN"),
        (a1111_json([[1e300]]), "infinity"),
        (a1111_json([[1, 2]]), "int64"),
        (a1111_json([]), "shape"),
        (a1111_json([[[1.0]]]), "shape"),
        (a1111_json({"a": 1}), "expected"),
        (base64.b64encode(b"[" * 100_000), "expected"),
        (base64.b64encode(b'{"string_to_param": 3}'), "expected"),
        (base64.b64encode(b"[1]"), "expected"),
        (base64.b64encode(b'{"name": "x"}'), "no vectors"),
        (b"no base64", "expected"),
        (b"A" * (MAX_TABLE + 1), "too many for a learnt word"),
    ],
)
def test_json_that_is_no_word(text, match, tmp_path):
    refused(write_png(tmp_path / "w.png", text), match)


def test_pictures_without_a_word(tmp_path):
    refused(write_png(tmp_path / "w.png", b"e30=", "Comment"), "no text chunk sd-ti-embedding")
    assert read_one(write_png(tmp_path / "w.png", a1111_json(vectors()), zip=True))
    liar = struct.pack(">I", 15) + b"tEXtsd-ti-embedding\0" + a1111_json(vectors())
    (tmp_path / "w.png").write_bytes(b"\x89PNG\r\n\x1a\n" + liar)
    refused(tmp_path / "w.png", "found")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "the text 'version https"),
        (b"<!DOCTYPE html>\n\x1b[2J", "the text '<!DOCTYPE"),
        (b"PK\x03\x04" + b"x" * 100, "zip"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF" * 20, "binary data"),
        (struct.pack("<Q", 2) + b"[]", "expected a learnt word"),
        (struct.pack("<Q", 2) + b"{}", "no vectors"),
        (struct.pack("<Q", 20) + b'{"__metadata__": []}', "invalid JSON"),
    ],
)
def test_what_is_no_word_at_all(content, match, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    refused(path, match)


def test_folders_and_nothing(tmp_path):
    refused(tmp_path, "no word, found nothing; give a word's file")
    refused(tmp_path / "missing.pt", "no such file or folder")
