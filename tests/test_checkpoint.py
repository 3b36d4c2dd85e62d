"""Loading: every layout of every family, full-size key tables, variants found in the wild, files
that are damaged, foreign or hostile, and the peak of memory."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import DECODE, GOLDEN, TEXT, UNET, assert_close_std, golden, golden_keys, shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import checkpoint, naming, sizes
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.bert import BertConfig
from models.checkpoint import load_clip, load_model
from models.clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from models.files import CheckpointError
from models.latent_diffusion import LatentDiffusion
from models.naming import autoencoder_from_diffusers, unet_from_diffusers
from models.unet import UNet, UNetConfig

TINY = GOLDEN / "tiny"
FILES = (
    "ldm/model.ckpt",
    "sd1/model.ckpt",
    "sd1/model.safetensors",
    "sd1/diffusers",
    "sd2/model.safetensors",
    "sd2/diffusers",
)


def load(path: Path, dtype=torch.float32, **options) -> LatentDiffusion:
    return load_model(path, device="cpu", dtype=dtype, **options)


def tensors(model: LatentDiffusion) -> dict[str, Tensor]:
    modules = {"unet": model.unet, "vae": model.autoencoder, "text": model.text_encoder}
    return {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}


def assert_same_tensors(ours: LatentDiffusion, reference: LatentDiffusion) -> None:
    ours, reference = tensors(ours), tensors(reference)
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[k], reference[k]) for k in reference)


def refusal(path: Path, **options) -> str:
    """The message that `path` is refused with: one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message and len(message) < 1000, message
    return message


def copy_beside(source: str, tmp_path: Path) -> Path:
    """A private copy of a tiny checkpoint, a folder or a file with its config.yaml."""
    path = TINY / source
    if path.is_dir():
        return Path(shutil.copytree(path, tmp_path / "model"))
    shutil.copy(path.with_name("config.yaml"), tmp_path)
    return Path(shutil.copy(path, tmp_path))


# ------------------------------------------------------------------------------ the tiny files


@pytest.mark.parametrize("file", FILES)
@torch.no_grad()
def test_outputs(file):
    model, family = load(TINY / file), file[:3]
    g = golden(family)
    assert model.family == family
    assert model.schedule.prediction == ("v" if family == "sd2" else "eps")
    assert model.size == {"ldm": 256, "sd1": 512, "sd2": 768}[family]
    text = model.text_encoder(model.embed(g["text.ids"], None))
    assert_close_std(text, g["text.out"], TEXT)
    unet = model.unet(g["unet.x"], g["unet.t"], g["unet.context"])
    assert_close_std(unet, g["unet.out"], UNET)
    assert_close_std(model.autoencoder.decode(g["vae.z"]), g["vae.decoded"], DECODE)


@pytest.mark.parametrize("file", FILES[2:])
def test_layouts_hold_the_same_model(file):
    first = {"sd1": "sd1/model.ckpt", "sd2": "sd2/model.safetensors"}[file[:3]]
    model, reference = load(TINY / file), load(TINY / first)
    assert_same_tensors(model, reference)
    assert model.fingerprint == reference.fingerprint


@pytest.mark.parametrize("file", FILES)
def test_frozen_in_the_wanted_precision(file):
    model = load(TINY / file, torch.bfloat16)
    for name, tensor in tensors(model).items():
        text = name.startswith("text.")
        assert tensor.dtype == (torch.float32 if text else torch.bfloat16), name
        assert tensor.is_contiguous() and not tensor.requires_grad
    assert not model.unet.training
    # Nothing bigger is kept alive behind a tensor, such as the stacked q, k and v it was cut from.
    for tensor in tensors(model).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_overrides():
    assert load(TINY / "sd1/model.ckpt", prediction="v").schedule.prediction == "v"
    assert load(TINY / "sd2/diffusers", prediction="eps").schedule.prediction == "eps"
    assert load(TINY / "ldm/model.ckpt", family="ldm").family == "ldm"
    refusal(TINY / "ldm/model.ckpt", family="sd1")
    refusal(TINY / "sd1/model.ckpt", family="ldm")
    with pytest.raises(ValueError, match="family 'sd3'"):
        load(TINY / "ldm/model.ckpt", family="sd3")
    with pytest.raises(ValueError, match="prediction type 'x0'"):
        load(TINY / "ldm/model.ckpt", prediction="x0")


def test_family_override_for_a_folder():
    model = load(TINY / "sd1/diffusers", family="sd2")
    assert model.family == "sd2" and model.tokenizer.pad_id == 0


def test_tokenizers():
    assert load(TINY / "ldm/model.ckpt").tokenizer.vocab_size == 2048
    for file in FILES[1:]:
        tokenizer = load(TINY / file).tokenizer
        assert tokenizer.vocab_size == 640
        assert tokenizer.pad_id == (0 if file.startswith("sd2") else tokenizer.end_id)


def test_vocabulary_of_another_size(tmp_path):
    """The published LDM has BERT's 30522 tokens, the vendored ones; the tiny one has its own."""
    path = copy_beside("ldm/model.ckpt", tmp_path)
    assert "2048" in refusal(path) and "30522" in refusal(path)
    (tmp_path / "vocab.txt").write_text("not\na\nvocabulary\n")
    refusal(path)


def test_original_configuration_beside_a_file(tmp_path):
    """As Stability published it: quoted values, comments; or under the checkpoint's own name."""
    path = copy_beside("sd2/model.safetensors", tmp_path)
    text = '  parameterization: "v"  # x\n  num_head_channels: 16 # need to fix\n  heads: 2\n'
    (tmp_path / "config.yaml").rename(tmp_path / "model.yaml")
    (tmp_path / "model.yaml").write_text(text)
    model = load(path)
    assert model.schedule.prediction == "v" and model.unet.config.head_width == 16
    (tmp_path / "model.yaml").write_text(text.replace('"v"', "x0"))
    assert "x0" in refusal(path)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ("eps", "v"))
def test_measured_prediction(tmp_path, monkeypatch, kind, dtype):
    """Where no configuration tells, the network is asked: one that returns its input predicts
    the noise."""
    path = Path(shutil.copy(TINY / "sd2/model.safetensors", tmp_path))
    (tmp_path / "config.yaml").write_text("num_head_channels: 16\nheads: 2\n")
    assert load(path, dtype).schedule.prediction in ("eps", "v")
    answer = {"eps": lambda self, x, t, context: x, "v": lambda self, x, t, context: -x.flip(-1)}
    monkeypatch.setattr(UNet, "forward", answer[kind])
    assert load(path, dtype).schedule.prediction == kind


# ------------------------------------------------------------------------- full-size key tables


def empty(table: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in table.items()}


def read(tables: dict[str, dict], tmp_path: Path, monkeypatch) -> tuple[dict, dict]:
    """What the loader makes of files with these keys: `tables` from file name to key table."""
    for name in tables:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    opened = lambda path: empty(tables[path.relative_to(tmp_path).as_posix()])
    monkeypatch.setattr(checkpoint, "open_state", opened)
    if len(tables) > 1:
        return checkpoint.read_folder(tmp_path, None)
    return checkpoint.read_single_file(tmp_path / next(iter(tables)), None)


UNETS = {
    "ldm": UNetConfig(context_dim=1280),
    "sd1": UNetConfig(),
    "sd2": UNetConfig(context_dim=1024, heads=None, head_width=64, linear_projection=True),
}


def assert_full_size(parts: dict, family: str) -> None:
    """Every key has its place, none is missing and none is left (`filled` is strict in both)."""
    heads = {"heads": UNETS[family].heads, "head_width": UNETS[family].head_width}
    unet = sizes.unet_config(parts["unet"], **heads)
    autoencoder = sizes.autoencoder_config(parts["autoencoder"])
    assert (unet, autoencoder) == (UNETS[family], AutoencoderConfig())
    place = (torch.float32, "meta")
    checkpoint.filled(UNet, unet, parts["unet"], *place)
    checkpoint.filled(Autoencoder, autoencoder, parts["autoencoder"], *place)
    text = checkpoint.load_text_encoder(family, parts["text"], ({}, {}), "meta").config
    if family == "ldm":
        assert text == BertConfig()
    else:
        wanted = {"sd1": (768, 12, 12, True), "sd2": (1024, 23, 16, False)}[family]
        assert (text.width, text.layers, text.heads, text.quick_gelu) == wanted


@pytest.mark.parametrize(
    "names",
    (
        ("ldm-text2img-large",),
        ("ldm-text2img-large", "ldm-text2img-large.ema-extra"),
        ("sd-v1-compvis",),
        ("sd-v2-compvis",),
    ),
    ids="+".join,
)
def test_full_size_single_files(names, tmp_path, monkeypatch):
    table = {key: shape for name in names for key, shape in golden_keys(name).items()}
    parts, known = read({"model.ckpt": table}, tmp_path, monkeypatch)
    assert known["family"] == ("ldm" if "ldm" in names[0] else names[0].replace("-v", "")[:3])
    assert_full_size(parts, known["family"])


@pytest.mark.parametrize("vae", ("vae", "vae.old-names"))
@pytest.mark.parametrize("version", (1, 2))
def test_full_size_folders(version, vae, tmp_path, monkeypatch):
    files = {
        "unet/diffusion_pytorch_model.bin": "unet",
        "vae/diffusion_pytorch_model.safetensors": vae,
        "text_encoder/model.safetensors": "text_encoder",
    }
    tables = {f: golden_keys(f"sd-v{version}-diffusers-{n}") for f, n in files.items()}
    for name in ("unet", "vae", "text_encoder"):
        config = golden_keys(f"config/sd-v{version}-diffusers-{name}") if name == "unet" else {}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    parts, known = read(tables, tmp_path, monkeypatch)
    assert known["family"] == f"sd{version}"
    assert_full_size(parts, known["family"])
    heads = dict(heads=8) if version == 1 else dict(heads=None, head_width=64)
    assert known["unet"] == heads | dict(norm_groups=32)


@pytest.mark.parametrize("kind", ("unet", "vae"))
@pytest.mark.parametrize("version", (1, 2))
def test_diffusers_names(version, kind):
    """Key by key: the tensor that diffusers calls so comes out under CompVis' name."""
    entry = golden_keys(f"map-sd-v{version}-{kind}-compvis-to-diffusers")
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[kind]
    convert = {
        "unet": unet_from_diffusers,
        "vae": autoencoder_from_diffusers,
    }[kind]
    expected = {ours.removeprefix(prefix): theirs for ours, theirs in entry["map"].items()}
    names = list(entry["map"].values())
    state = {key: torch.tensor([i]) for i, key in enumerate(names)}
    assert {ours: names[tensor] for ours, tensor in convert(state).items()} == expected
    old = {entry.get("old_names", {}).get(key, key): tensor for key, tensor in state.items()}
    assert {ours: names[tensor] for ours, tensor in convert(old).items()} == expected


def test_open_clip_names():
    """Key by key, with numbers in the tensors to see which third went where."""
    names = golden_keys("map-sd-v2-text-openclip-to-transformers")["map"]
    values = {key: torch.arange(3.0)[:, None] + 10 * i for i, key in enumerate(names)}
    found = naming.text_up_to_penultimate(naming.clip_to_transformers(values), None)
    found = {k: v for k, v in found.items() if not checkpoint.NEEDLESS.match(k)}
    expected = {}
    for key, theirs in names.items():
        if isinstance(theirs, list):
            expected |= zip(theirs, values[key].chunk(3))
        elif theirs:
            expected[theirs] = values[key]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("table", ("transformers", "openai"))
def test_full_size_clip(table, tmp_path, monkeypatch):
    opened = lambda path: empty(golden_keys(f"clip-vit-b32-{table}"))
    monkeypatch.setattr(checkpoint, "open_state", opened)
    with torch.device("meta"):
        wanted = shapes(CLIP(CLIPConfig(TextConfig(width=512, heads=8), VisionConfig(), 512)))
    seen = {}

    def fill(kind, config, state, *_):
        kept = [k for k in state if k in wanted or not checkpoint.NEEDLESS.match(k)]
        seen.update({k: list(state[k].shape) for k in kept})
        with torch.device("meta"):
            return kind(config)

    monkeypatch.setattr(checkpoint, "filled", fill)
    (tmp_path / "model.safetensors").touch()
    assert shapes(load_clip(tmp_path)) == wanted == seen


def test_clip_layouts_hold_the_same_model():
    theirs = load_file(TINY / "clip/transformers/model.safetensors")
    ours = load_clip(TINY / "clip/openai-state-dict.safetensors").state_dict()
    again = load_clip(TINY / "clip/transformers/model.safetensors").state_dict()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key].float()) and torch.equal(value, again[key])


# ------------------------------------------------------------------------------------- variants


def single(family: str = "sd1") -> dict[str, Tensor]:
    """The tensors of a tiny single file, as stored."""
    if family == "ldm":
        return torch.load(TINY / "ldm/model.ckpt", weights_only=True)["state_dict"]
    return load_file(TINY / family / "model.safetensors")


def with_ema(state):
    prefix = "model.diffusion_model."
    copies = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v + 1
        for k, v in state.items()
        if k.startswith(prefix)
    }
    return state | copies | {"model_ema.decay": torch.tensor(0.9999)}


def with_position_ids(dtype):
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return lambda state: state | {key: torch.arange(77).to(dtype)[None]}


def without_prefix(state):
    return {k.replace(".text_model.", "."): v for k, v in state.items()}


VARIANTS = {
    "fp32": lambda state: {k: v.float() for k, v in state.items()},
    "bf16": lambda state: {k: v.bfloat16() for k, v in state.items()},
    "fp64": lambda state: {k: v.double() for k, v in state.items()},
    "ema": with_ema,
    "int position_ids": with_position_ids(torch.int64),
    "float position_ids": with_position_ids(torch.float16),
    "no text_model prefix": without_prefix,
    "schedule buffers": lambda state: (
        state | {"betas": torch.zeros(1000), "logvar": torch.zeros(9)}
    ),
    "autoencoder's loss": lambda state: state | {"first_stage_model.loss.logvar": torch.zeros(1)},
    "strided": lambda s: {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in s.items()},
}


@pytest.mark.parametrize("ending", ("ckpt", "safetensors"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_single_file_variants(variant, ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    shutil.copy(TINY / "sd1/config.yaml", tmp_path)
    state = VARIANTS[variant](single())
    if ending == "ckpt":
        torch.save({"state_dict": state, "global_step": 3}, path)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    model = load(path)
    reference = load(TINY / "sd1/model.ckpt")
    if variant == "bf16":
        for key, value in tensors(reference).items():
            assert torch.equal(tensors(model)[key], value.bfloat16().float())
    else:
        assert_same_tensors(model, reference)


def test_plain_state_dict_and_one_shared_storage(tmp_path):
    """Without the "state_dict" level; tensors that are views into one storage, at offsets."""
    state = single()
    flat = torch.cat([v.flatten() for v in state.values()])
    parts = flat.split([v.numel() for v in state.values()])
    views = {k: p.view(v.shape) for (k, v), p in zip(state.items(), parts)}
    shutil.copy(TINY / "sd1/config.yaml", tmp_path)
    torch.save(views, tmp_path / "model.ckpt")
    assert_same_tensors(load(tmp_path / "model.ckpt"), load(TINY / "sd1/model.ckpt"))


def test_format_is_found_from_the_content(tmp_path):
    shutil.copy(TINY / "sd1/config.yaml", tmp_path)
    for source, name in (("ckpt", "a.safetensors"), ("safetensors", "b.ckpt")):
        path = shutil.copy(TINY / f"sd1/model.{source}", tmp_path / name)
        assert_same_tensors(load(path), load(TINY / "sd1/model.ckpt"))


@pytest.mark.parametrize("name", ("sd1/diffusers", "sd2/diffusers"))
@pytest.mark.parametrize("ending", ("fp16.safetensors", "bin", "fp16.bin", "no prefix"))
def test_folder_variants(name, ending, tmp_path):
    folder = copy_beside(name, tmp_path)
    for path in list(folder.glob("*/*.safetensors")):
        state, kind = load_file(path), path.name.removesuffix(".safetensors")
        path.unlink()
        if ending == "fp16.safetensors":
            save_file(state, path.with_name(f"{kind}.{ending}"))
        elif ending == "no prefix":
            save_file({k.removeprefix("text_model."): v for k, v in state.items()}, path)
        else:
            kind = "pytorch_model" if kind == "model" else kind
            torch.save(OrderedDict(state), path.with_name(f"{kind}.{ending}"))
    assert_same_tensors(load(folder), load(TINY / name))


def test_folder_without_configuration(tmp_path):
    """Only what shapes cannot tell comes from the configuration; it has the families' defaults."""
    folder = copy_beside("sd1/diffusers", tmp_path)
    for path in folder.glob("*/*.json"):
        path.unlink()
    model = load(folder)
    assert model.unet.config.heads == 8 and model.schedule.prediction == "eps"
    assert_same_tensors(model, load(TINY / "sd1/diffusers"))


def scheduler_in(folder: Path, **changed) -> Path:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder


def test_a_folder_says_how_the_noise_grows(tmp_path):
    folder = copy_beside("sd2/diffusers", tmp_path)
    ours = load(scheduler_in(folder, rescale_betas_zero_snr=True)).schedule
    assert ours.alphas_cumprod[-1] == 0 and ours.ddim_timesteps(50)[0] == 999
    ours = load(scheduler_in(folder, timestep_spacing="leading")).schedule
    assert ours.alphas_cumprod[-1] == 0 and ours.ddim_timesteps(50)[0] == 981
    scheduler_in(folder, rescale_betas_zero_snr=False, timestep_spacing="linspace")
    assert load(folder).schedule.ddim_timesteps(50)[:2] == [999, 979]
    ours = load(scheduler_in(folder, beta_schedule="linear", beta_end=0.02)).schedule
    assert ours.betas[500] == pytest.approx(0.00085 + 500 / 999 * 0.01915)
    ours = load(scheduler_in(folder, trained_betas=[0.001, 0.002], num_train_timesteps=2)).schedule
    assert ours.betas.tolist() == [0.001, 0.002]


def test_schedules_that_are_not_supported(tmp_path):
    folder = copy_beside("sd1/diffusers", tmp_path)
    usual = (folder / "scheduler/scheduler_config.json").read_text()
    for told, changed in {
        "'sigmoid'": dict(beta_schedule="sigmoid"),
        "'middle'": dict(timestep_spacing="middle"),
        "needs v-prediction": dict(rescale_betas_zero_snr=True, prediction_type="epsilon"),
        "'sample'": dict(prediction_type="sample"),
        "FlowMatch": dict(_class_name="FlowMatchEulerDiscreteScheduler"),
    }.items():
        assert told in refusal(scheduler_in(folder, **changed))
        (folder / "scheduler/scheduler_config.json").write_text(usual)


@pytest.mark.parametrize("family", ("ldm", "sd1", "sd2"))
def test_fine_tunes_say_what_they_are(family, tmp_path):
    path = tmp_path / "model.safetensors"
    beside = (TINY / family / "config.yaml").read_text().replace("parameterization", "other")
    (tmp_path / "config.yaml").write_text(beside)
    if family == "ldm":
        shutil.copy(TINY / "ldm/vocab.txt", tmp_path)
    marked = single(family) | {"v_pred": torch.zeros(0)}
    save_file(marked, path)
    assert (load(path).schedule.prediction, load(path).schedule.zero_snr) == ("v", False)
    save_file(marked | {"ztsnr": torch.zeros(0)}, path)
    assert (load(path).schedule.prediction, load(path).schedule.zero_snr) == ("v", True)


# --------------------------------------------------------------------- hostile and damaged files


@pytest.mark.parametrize("file", ("ldm/model.ckpt", "sd1/model.ckpt", "sd1/model.safetensors"))
def test_truncated(file, tmp_path):
    data = (TINY / file).read_bytes()
    path = tmp_path / Path(file).name
    for length in (0, 1, 7, 8, 100, 5000, len(data) // 2, len(data) - 1000, len(data) - 1):
        path.write_bytes(data[:length])
        refusal(path)


def test_truncated_folder(tmp_path):
    folder = copy_beside("sd1/diffusers", tmp_path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="vae"):
        load(folder)


def test_broken_configuration(tmp_path):
    folder = copy_beside("sd1/diffusers", tmp_path)
    config = folder / "unet" / "config.json"
    for text in (
        "{",
        "[1, 2]",
        "3",
        '{"attention_head_dim": 0.5}',
        '{"attention_head_dim": "x"}',
        '{"attention_head_dim": [0]}',
        '{"attention_head_dim": []}',
        '{"norm_num_groups": 5}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert str(folder) in str(caught.value) and str(caught.value).isprintable()


def test_random_damage(tmp_path):
    """Bytes changed anywhere: the file loads or is refused in one line, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    for file in ("sd1/model.ckpt", "sd1/model.safetensors"):
        path = copy_beside(file, tmp_path)
        data = path.read_bytes()
        # Most of a file is weights, where damage cannot be seen: aim at what is parsed.
        around = data.find(b"data.pkl") if file.endswith("ckpt") else 0
        for _ in range(60):
            damaged = bytearray(data)
            for at in torch.randint(20_000, (3,), generator=generator):
                damaged[around + int(at)] = int(torch.randint(256, (1,), generator=generator))
            path.write_bytes(damaged)
            try:
                load(path)
            except CheckpointError as error:
                assert str(error).isprintable() and str(path) in str(error)


def test_foreign_files(tmp_path):
    """Each is refused with a hint at what it is: git-lfs pointers, LoRAs, SD XL."""
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git-lfs" in refusal(path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(4, 4)}
    xl = {"conditioner.embedders.0.transformer.text_model.a": torch.ones(1)}
    for state, hint in ((lora, "a LoRA"), (xl, "XL"), ({"a\nb\x1b[2J": torch.ones(1)}, "a?b")):
        save_file(state, path)
        assert hint in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "data.pkl" in refusal(path)
    torch.save([1, 2], path)
    refusal(path)


def test_incomplete_models(tmp_path):
    """Whatever one tensor is taken away, or given another shape, it is noticed."""
    state, path = single(), tmp_path / "model.safetensors"
    keys = sorted(state)[:: len(state) // 10]
    keys += [k for k in state if k.endswith(("out.2.weight", "0.0.weight", "embedding.weight"))]
    for key in keys:
        save_file({k: v for k, v in state.items() if k != key}, path)
        refusal(path)
        save_file(state | {key: torch.zeros(3, 5, 7)}, path)
        refusal(path)


def test_inpainting(tmp_path):
    state, path = single(), tmp_path / "model.safetensors"
    key = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(state | {key: torch.zeros(32, 9, 3, 3)}, path)
    assert "inpainting" in refusal(path) and "9 channels" in refusal(path)


def test_folders_without_a_model(tmp_path):
    refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refusal(tmp_path)
    (tmp_path / "unet").mkdir()
    assert "no weights" in refusal(tmp_path)
    (tmp_path / "text_encoder_2").mkdir()
    assert "XL" in refusal(tmp_path)


def test_no_such_file(tmp_path):
    assert "no such" in refusal(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match="a.b"):
        load(tmp_path / "a\nb")
    with pytest.raises(CheckpointError):
        load("a\0b")
    refusal(Path(os.devnull))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_unreadable_file(tmp_path):
    path = Path(shutil.copy(TINY / "sd1/model.safetensors", tmp_path))
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def entry(begin, end, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    (
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        header(a=entry(0, 16), b=entry(8, 24)) + bytes(24),
        header(a=entry(0, 16), b=entry(0, 16)) + bytes(16),
        header(a=entry(-16, 0)) + bytes(16),
        header(a=entry(16, 0)) + bytes(16),
        header(a=entry(0, 16, (-2, -2))) + bytes(16),
        header(a=entry(0, 17)) + bytes(17),
        header(a=entry(0, 16, (2**40, 2**40))) + bytes(16),
        header(a=entry(0, 2**70)) + bytes(16),
        header(a=entry(0, 16, "abcd")) + bytes(16),
        header(a=entry(0, "16")) + bytes(16),
        header(a=entry(0, 16, dtype="F4")) + bytes(16),
        header(a=[]),
        header(a=None),
        header(__metadata__=3),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ),
    ids=str,
)
def test_malformed_safetensors(data, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refusal(path)


# --------------------------------------------------------------------------------------- memory

MEASURE = """
import re, sys, threading, torch
from pathlib import Path
from models.checkpoint import load_model

def memory():  # our own, without pages of mapped files, which the system can take back
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while not done.wait(0.001):
        seen.append(memory())

path, warm_up, dtype = *sys.argv[1:3], getattr(torch, sys.argv[3])
load_model(warm_up, device="cpu", dtype=dtype)
done, seen = threading.Event(), [memory()]
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(path, device="cpu", dtype=dtype)
seen.append(memory())
done.set()
watcher.join()
modules = (model.unet, model.autoencoder, model.text_encoder)
print(max(seen) - seen[0], sum(p.nbytes for m in modules for p in m.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, Path]:
    """The tiny SD 1 with a UNet of 85 million parameters, 340 MB in float32, in both formats."""
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        unet = UNet(UNetConfig((256, 384, 384), 2, (1, 1, 0), context_dim=32))
    state = {k: v.float() for k, v in single().items() if "diffusion_model" not in k}
    for key, value in unet.state_dict().items():
        state[f"model.diffusion_model.{key}"] = torch.full(value.shape, 0.01)
    save_file(state, folder / "model.safetensors")
    torch.save({"state_dict": state}, folder / "model.ckpt")
    return {path.suffix: path for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("ending", (".ckpt", ".safetensors"))
@pytest.mark.parametrize(
    ("dtype", "share"), [("bfloat16", 1.3), ("float16", 1.3), ("float32", 0.1)]
)
def test_peak_memory(ending, dtype, share, large):
    """The model and little more; without conversion it stays in the file."""
    command = [sys.executable, "-c", MEASURE, large[ending], TINY / "sd1/model.ckpt", dtype]
    output = subprocess.run(
        command, cwd=GOLDEN.parent.parent, capture_output=True, text=True, check=True
    )
    peak, size = map(int, output.stdout.split())
    print(f"peak {peak / 1e6:.0f} MB for {size / 1e6:.0f} MB: {peak / size:.2f}")
    assert size > 1e8 and peak < share * size


# ------------------------------------------------------------------------------- live diffusers


@pytest.mark.parametrize("variant", (None, "fp16"))
@pytest.mark.parametrize("safe", (True, False), ids=("safetensors", "bin"))
@torch.no_grad()
def test_folder_written_by_diffusers(safe, variant, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    source = TINY / "sd1/diffusers"
    unet = diffusers.UNet2DConditionModel(**json.loads((source / "unet/config.json").read_text()))
    vae = diffusers.AutoencoderKL(**json.loads((source / "vae/config.json").read_text()))
    config = transformers.CLIPTextConfig(
        **json.loads((source / "text_encoder/config.json").read_text())
    )
    text = transformers.CLIPTextModel(config)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(source / "tokenizer"),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
    )
    pipeline.save_pretrained(tmp_path, safe_serialization=safe, variant=variant)
    model = load(tmp_path)
    assert model.schedule.prediction == "v"
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 900]), torch.randn(2, 77, 32)
    assert_close_std(model.unet(x, t, context), unet.eval()(x, t, context).sample, UNET)
    ids = torch.randint(0, 640, (2, 77))
    theirs = text.eval()(ids).last_hidden_state
    assert_close_std(model.text_encoder(model.embed(ids, None)), theirs, TEXT)
    assert_close_std(model.autoencoder.decode(x), vae.eval().decode(x).sample, DECODE)
