"""Checkpoints as other programs write them: each computes what the tiny model's own file does."""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from helpers import GOLDEN
from safetensors.torch import load_file, save_file

from models import checkpoint, naming
from models.checkpoint import load_model
from models.concepts import Concept
from models.files import CheckpointError
from models.latent_diffusion import LatentDiffusion

TINY = GOLDEN / "tiny"
UNET_FILE = "diffusion_pytorch_model.safetensors"


def tensors(family: str, component: str = "") -> dict:
    """The tiny model's tensors: of its single file, or of a component of its folder."""
    folder = TINY / family
    return load_file(next((folder / "diffusers" / component if component else folder).glob("*.s*")))


def single(tmp_path: Path, family: str, state: dict, ending: str = "safetensors") -> Path:
    """A single file with the tiny model's configuration beside it."""
    path = tmp_path / f"model.{ending}"
    shutil.copy(TINY / family / "config.yaml", tmp_path)
    state = {k: v.contiguous() for k, v in state.items()}
    save_file(state, path) if ending == "safetensors" else torch.save({"state_dict": state}, path)
    return path


def folder(tmp_path: Path, family: str) -> Path:
    return Path(shutil.copytree(TINY / family / "diffusers", tmp_path / "folder"))


def assert_same(path, family: str, **options) -> LatentDiffusion:
    """Text, UNet and autoencoder compute what those of the family's own file do."""
    ours, reference = load_model(path, **options), load_model(TINY / family / "model.safetensors")
    assert (ours.family, ours.tokenizer.pad_id) == (family, reference.tokenizer.pad_id)
    assert ours.fingerprint == reference.fingerprint
    (context, x), t = (reference.encode_text(["a cat on the beach"]), torch.ones(1, 4, 8, 8)), 500
    assert torch.equal(ours.encode_text(["a cat on the beach"]), context)
    t = torch.tensor([500])
    assert torch.equal(ours.unet(x, t, context), reference.unet(x, t, context))
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    assert torch.equal(ours.encode_images(pixels), reference.encode_images(pixels))
    return ours


@pytest.mark.parametrize("ending", ("safetensors", "ckpt"))
@pytest.mark.parametrize("blocks", (2, 3))
@pytest.mark.parametrize("also", ((), ("text_projection", "logit_scale")))
def test_sd2_with_and_without_its_last_text_block(tmp_path, ending, blocks, also):
    dropped = tuple(f"cond_stage_model.model.{name}" for name in also)
    dropped += (f"cond_stage_model.model.transformer.resblocks.{blocks}.",)
    state = {k: v for k, v in tensors("sd2").items() if not k.startswith(dropped)}
    assert_same(single(tmp_path, "sd2", state, ending), "sd2")


@pytest.mark.parametrize("width, blocks, left", ((1024, 23, 23), (1024, 24, 23), (1280, 32, 31)))
def test_the_width_tells_how_many_text_blocks_there_are(width, blocks, left):
    keys = [f"text_model.encoder.layers.{i}.mlp.fc1.bias" for i in range(blocks)]
    state = dict.fromkeys(keys, torch.zeros(1))
    state["text_model.final_layer_norm.weight"] = torch.zeros(width)
    found = naming.text_up_to_penultimate(state, None)
    assert naming.count(found, r"text_model\.encoder\.layers\.(\d+)\.") == left


def test_sd2_with_its_text_encoder_in_the_names_of_transformers(tmp_path):
    state = {k: v for k, v in tensors("sd2").items() if not k.startswith("cond_stage_model.")}
    text = tensors("sd2", "text_encoder")
    state |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
    assert_same(single(tmp_path, "sd2", state), "sd2")


def test_sd2_in_the_layout_of_sgm(tmp_path):
    old, new = "cond_stage_model.model.", "conditioner.embedders.0.model."
    state = {k.replace(old, new): v for k, v in tensors("sd2").items()}
    assert_same(single(tmp_path, "sd2", state), "sd2")
    state["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="the refiner of SDXL"):
        load_model(single(tmp_path, "sd2", state))


def test_a_whole_open_clip(tmp_path):
    state = tensors("sd2") | {"cond_stage_model.model.visual.proj": torch.zeros(3, 3)}
    assert_same(single(tmp_path, "sd2", state), "sd2")


@pytest.mark.parametrize("lost", (20, 22))
def test_layers_that_are_missing(lost):
    """Of the 24 of ViT-H the last one may be missing, and no other."""
    keys = [f"text_model.encoder.layers.{i}.mlp.fc1.bias" for i in range(lost)]
    state = dict.fromkeys(keys, torch.zeros(1))
    state["text_model.final_layer_norm.weight"] = torch.zeros(1024)
    with pytest.raises(CheckpointError, match=f"{lost} of 24 layers"):
        naming.text_up_to_penultimate(state, None)


@pytest.mark.parametrize("whole", (False, True))
def test_a_folder_with_more_layers_than_its_configuration_says(tmp_path, whole):
    """As with transformers, also where the text encoder is the text tower of a whole CLIP."""
    path = folder(tmp_path, "sd2") / "text_encoder"
    text, config = tensors("sd2", "text_encoder"), json.loads((path / "config.json").read_text())
    more = {k.replace("layers.1.", "layers.2."): v + 1 for k, v in text.items() if "layers.1." in k}
    more |= {"vision_model.pre_layrnorm.bias": torch.zeros(3)} if whole else {}
    save_file(text | more, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"text_config": config} if whole else config))
    assert_same(path.parent, "sd2")


@pytest.mark.parametrize("family", ("sd1", "sd2"))
def test_keys_say_v_and_zero_snr(tmp_path, family):
    state = tensors(family) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    schedule = load_model(single(tmp_path, family, state)).schedule
    assert (schedule.prediction, schedule.alphas_cumprod[-1].item()) == ("v", 0)


@pytest.mark.parametrize(
    "setting",
    (
        dict(timestep_spacing="trailing"),
        dict(timestep_spacing="linspace"),
        dict(trained_betas=[0.001 + 1e-5 * i for i in range(1000)]),
        dict(beta_schedule="linear"),
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ),
)
def test_the_scheduler_of_a_folder_is_honoured(tmp_path, setting):
    path = folder(tmp_path, "sd2")
    config = path / "scheduler/scheduler_config.json"
    settings = json.loads(config.read_text()) | setting
    config.write_text(json.dumps(settings))
    theirs = diffusers.DDIMScheduler.from_config(settings)
    theirs.set_timesteps(20)
    ours = load_model(path).schedule
    assert (ours.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 1e-5
    assert ours.ddim_timesteps(20) == theirs.timesteps.tolist()


@pytest.mark.parametrize("key", ("timestep_spacing", "beta_schedule", "prediction_type"))
def test_an_unknown_setting_of_the_scheduler_is_refused(tmp_path, key):
    path = folder(tmp_path, "sd1")
    config = path / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: "odd"}))
    with pytest.raises(CheckpointError, match="'odd' is not") as error:
        load_model(path)
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("kind", (torch.float8_e4m3fn, torch.float8_e5m2))
@pytest.mark.parametrize("family", ("sd1", "sd2", "sdxl"))
def test_eight_bit_floats(tmp_path, family, kind):
    state = {k: v.to(kind) if v.is_floating_point() else v for k, v in tensors(family).items()}
    ours = load_model(single(tmp_path, family, state))
    wide = {k: v.float() if v.dtype == kind else v for k, v in state.items()}
    reference = load_model(single(tmp_path, family, wide))
    assert ours.stored == str(kind)[6:] and ours.fingerprint == reference.fingerprint
    for name in ("unet", "autoencoder", "text_encoder"):
        mine, theirs = (getattr(m, name).state_dict() for m in (ours, reference))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    "names", ("to_q to_k to_v to_out.0", "query key value proj_attn", "q k v proj_out")
)
def test_attention_of_the_autoencoder_in_a_single_file(tmp_path, names):
    new = dict(zip("q k v proj_out".split(), names.split())) | {"norm": "norm"}

    def renamed(key: str, v: torch.Tensor) -> tuple[str, torch.Tensor]:
        head, found, tail = key.partition(".attn_1.")
        name, _, kind = tail.partition(".")
        return (f"{head}{found}{new[name]}.{kind}", v.squeeze()) if found else (key, v)

    state = dict(renamed(k, v) for k, v in tensors("sd1").items())
    assert_same(single(tmp_path, "sd1", state), "sd1")


@pytest.mark.parametrize("prefix", ("", "first_stage_model."))
def test_a_file_without_an_autoencoder(tmp_path, prefix):
    state = {k: v for k, v in tensors("sd1").items() if not k.startswith("first_stage")}
    vae = {prefix + k: v for k, v in naming.part(tensors("sd1"), "first_stage_model.").items()}
    path = single(tmp_path, "sd1", state)
    with pytest.raises(CheckpointError, match="--vae"):
        load_model(path)
    save_file(vae, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="an autoencoder alone; give it to --vae"):
        load_model(tmp_path / "a.safetensors")
    pipeline = TINY / "sd1/diffusers"
    for given in (tmp_path / "a.safetensors", pipeline, pipeline / "vae"):
        assert_same(path, "sd1", vae=given)
    torch.save({"state_dict": vae}, tmp_path / "model.vae.pt")
    assert_same(path, "sd1")


@pytest.mark.parametrize("layout", ("CompVis", "diffusers", "training", "checkpoint"))
@pytest.mark.parametrize("ending", ("safetensors", "pt", "ckpt"))
def test_the_autoencoder_beside_a_file(tmp_path, ending, layout):
    state = {k: v for k, v in tensors("sd1").items() if not k.startswith("first_stage")}
    path = single(tmp_path, "sd1", state)
    with pytest.raises(CheckpointError, match="--vae PATH, or as model.vae.safetensors"):
        load_model(path)
    vae = naming.part(tensors("sd1"), "first_stage_model.")
    vae |= {"loss.logvar": torch.zeros(1)} if layout == "training" else {}
    vae = tensors("sd1", "vae") if layout == "diffusers" else vae
    vae = tensors("sd1") if layout == "checkpoint" else vae
    file = tmp_path / f"model.vae.{ending}"
    save_file(vae, file) if ending == "safetensors" else torch.save({"state_dict": vae}, file)
    with pytest.warns(UserWarning, match=f"has no autoencoder; model.vae.{ending} beside it"):
        assert_same(path, "sd1")


def test_settings_of_another_autoencoder(tmp_path):
    path = folder(tmp_path, "sd1") / "vae"
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    for given in (path, path / UNET_FILE, path.parent):
        model = load_model(TINY / "sd1/model.safetensors", vae=given)
        assert model.scale_factor == 0.5
    for wrong, told in ((path.parent / "text_encoder", "no autoencoder"), ("none", "no such")):
        with pytest.raises(CheckpointError, match=f"{told}.*expected|{told}.*possible"):
            load_model(TINY / "sd1/model.safetensors", vae=wrong)


def test_needless_tensors_are_passed_over_by_name(tmp_path):
    text, unet = "cond_stage_model.transformer.", "model.diffusion_model."
    for name in (
        f"{text}text_projection.weight",
        f"{text}logit_scale",
        f"{text}vision_model.embeddings.class_embedding",
        f"{text}text_model.embeddings.position_ids",
        f"{unet}input_blocks.1.1.to_q.lora_A.weight",
        "optimizer.state.0",
    ):
        assert_same(single(tmp_path, "sd1", tensors("sd1") | {name: torch.arange(3)}), "sd1")
    with pytest.raises(CheckpointError, match="not expected .unknown"):
        load_model(single(tmp_path, "sd1", tensors("sd1") | {f"{unet}unknown": torch.zeros(1)}))


@pytest.mark.parametrize("family", ("sd1", "sd2"))
def test_a_text_encoder_with_words_of_an_earlier_inversion(tmp_path, family):
    path, key = folder(tmp_path, family), "text_model.embeddings.token_embedding.weight"
    text = tensors(family, "text_encoder")
    size = len(text[key])
    text[key] = torch.cat([text[key], text[key][:2]])
    save_file(text, path / "text_encoder/model.safetensors")
    added = json.dumps({"<cat>": size, "<dog>": size + 1})
    (path / "tokenizer/added_tokens.json").write_text(added)
    with pytest.warns(UserWarning, match="2 more words than .*; they are ignored"):
        assert_same(path, family)


@pytest.mark.parametrize("words", ((), ("<cat>", "<dog>")))
def test_a_folder_of_transformers_5_with_words(tmp_path, words):
    """It has a tokenizer.json alone."""
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, "sd1")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path / "tokenizer")
    shutil.rmtree(path / "tokenizer")
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(path / "tokenizer")
    text, key = tensors("sd1", "text_encoder"), "text_model.embeddings.token_embedding.weight"
    text[key] = torch.cat([text[key], torch.ones(len(words), 32, dtype=text[key].dtype)])
    save_file(text, path / "text_encoder/model.safetensors")
    with warnings.catch_warnings(record=True) as notes:
        model = assert_same(path, "sd1")
    assert model.tokenizer.vocab_size == 640
    assert ["2 more words than" in str(note.message) for note in notes] == [True] * bool(words)


def test_a_vocabulary_that_was_cut_off(tmp_path):
    path, key = folder(tmp_path, "sd1"), "text_model.embeddings.token_embedding.weight"
    text = tensors("sd1", "text_encoder")
    save_file(text | {key: torch.ones(5000, 32)}, path / "text_encoder/model.safetensors")
    with pytest.raises(CheckpointError, match="knows 5000 tokens, its vocabulary has 640"):
        load_model(path)


@pytest.mark.parametrize("variant", ("bf16", "non_ema", "shards", "bin shards"))
def test_variants_and_shards(tmp_path, variant):
    path = folder(tmp_path, "sd1")
    for file in (path / "unet" / UNET_FILE, path / "text_encoder/model.safetensors"):
        if variant in ("bf16", "non_ema"):
            file.rename(file.with_suffix(f".{variant}.safetensors"))
            continue
        ending = "bin" if "bin" in variant else "safetensors"
        state, keys = load_file(file), {}
        for i in range(2):
            shard = file.with_name(f"{file.stem}-0000{i + 1}-of-00002.{ending}")
            some = dict(list(state.items())[i::2])
            torch.save(some, shard) if ending == "bin" else save_file(some, shard)
            keys |= dict.fromkeys(some, shard.name)
        file.with_suffix(f".{ending}.index.json").write_text(json.dumps({"weight_map": keys}))
        file.unlink()
    assert_same(path, "sd1")


@pytest.mark.parametrize(
    "state, message",
    (
        ({"lora_unet_down_blocks_0_to_q.lora_down.weight": torch.zeros(4, 4)}, "a LoRA"),
        ({"unet.down_blocks.0.to_q.lora_A.weight": torch.zeros(4, 4)}, "a LoRA"),
        ({"emb_params": torch.zeros(1, 768)}, "a word; give it to --concept"),
        ({"<cat>": torch.zeros(768)}, "a word; give it to --concept"),
        ({"my-cat": torch.zeros(2, 768)}, "a word; give it to --concept"),
        ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "a word; give it"),
        ({"conv_first.weight": torch.zeros(4)}, "an upscaler"),
        ({"model.1.sub.0.RDB1.conv1.0.weight": torch.zeros(4)}, "an upscaler"),
        ({"text_model.final_layer_norm.weight": torch.zeros(4)}, "a text encoder without"),
        ({"model.diffusion_model.out.2.weight": torch.zeros(4)}, "a UNet without"),
        ({"control_model.time_embed.0.weight": torch.zeros(4)}, "a ControlNet"),
    ),
)
def test_what_is_no_model_is_called_by_its_name(tmp_path, state, message):
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "file.safetensors")


@pytest.mark.parametrize("format, ending", (("paper", "pt"), ("a1111", "pt"), ("a1111", "png")))
def test_words_of_other_programs_are_no_model(tmp_path, format, ending):
    Concept("<cat>", torch.ones(1, 768)).save(tmp_path / f"cat.{ending}", format=format)
    with pytest.raises(CheckpointError, match="a word; give it to --concept"):
        load_model(tmp_path / f"cat.{ending}")


def test_upscalers_as_they_are_published(tmp_path):
    torch.save({"params_ema": {"body.0.rdb1.conv1.weight": torch.zeros(1)}}, tmp_path / "x4.pth")
    with pytest.raises(CheckpointError, match="an upscaler"):
        load_model(tmp_path / "x4.pth")


def test_folders_of_other_pipelines(tmp_path):
    for name, part, told in (
        ("LDMTextToImagePipeline", "bert", "--model ldm"),
        ("StableDiffusion3Pipeline", "transformer", "StableDiffusion3Pipeline"),
    ):
        path = tmp_path / name
        for kind in {part, "vae", "unet" if part == "bert" else part}:
            (path / kind).mkdir(parents=True)
        (path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(CheckpointError, match=told):
            load_model(path)


def test_the_bundled_file_by_itself():
    path = Path(checkpoint.__file__).parent / "emoji"
    file, bundled = load_model(path / "model.safetensors"), load_model()
    assert (file.name, file.size, file.defaults) == (bundled.name, bundled.size, bundled.defaults)
