"""Stable Diffusion XL against diffusers: recorded numbers, and diffusers itself."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CHAIN,
    CONTEXT_GRAD,
    DECODE,
    EXACT,
    GOLDEN,
    STEP,
    TEXT,
    UNET,
    VECTOR_GRAD,
    assert_close_std,
    golden,
    golden_keys,
    schedule,
    tiny_autoencoder,
    tiny_text_encoder,
    tiny_unet,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import textinv
from models import checkpoint
from models.concepts import FORMATS
from models.files import CheckpointError
from models.latent_diffusion import LatentDiffusion
from models.layers import Conditioning
from models.schedule import Schedule
from models.tokenizers import CLIPTokenizer
from models.unet import UNetConfig

TINY = GOLDEN / "tiny/sdxl"
PROMPTS = [
    "",
    "a photo of a cat in the forest",
    "The 2nd dog's house, at 10:30 -- isn't it?",
    "a * on the table, a * and the sea",
]


@cache
def tiny_model() -> LatentDiffusion:
    """The tiny model, put together without models/checkpoint.py."""
    parts = tiny_unet("sdxl"), tiny_autoencoder("sdxl"), tiny_text_encoder("sdxl")
    tokenizer = CLIPTokenizer.load(TINY / "diffusers/tokenizer/merges.txt")
    return LatentDiffusion(
        *parts, tokenizer, schedule("sdxl"), "sdxl", size=64, scale_factor=0.13025
    )


def recorded_word(vectors: str) -> torch.Tensor:
    """The two halves of a recorded word side by side."""
    g = golden("sdxl")
    return torch.cat([g[f"text.replace.{vectors}.{half}"] for half in ("clip_l", "clip_g")], 1)


# --------------------------------------------------------------------------------------- text


def test_text():
    g, given = golden("sdxl"), tiny_model().encode_text(PROMPTS)
    assert_close_std(given.context, g["text.out"], TEXT)
    assert_close_std(given.pooled, g["text.pooled"], TEXT)
    assert given.sizes is None


@pytest.mark.parametrize("vectors", ("vec1", "vec3"))
def test_a_word_of_our_own(vectors):
    """Trap: diffusers reads pooled text at the highest id, which is the word's."""
    g, word = golden("sdxl"), recorded_word(vectors).requires_grad_()
    given = tiny_model().encode_text(PROMPTS[3:], [textinv.Concept("*", word)])
    name = f"text.replace.{vectors}"
    assert_close_std(given.context, g[f"{name}.out"], TEXT)
    assert_close_std(given.pooled, g[f"{name}.pooled"], TEXT)
    probe = (given.context * g["text.replace.probe"]).sum()
    probe += (given.pooled * g["text.replace.probe_pooled"]).sum()
    grad = torch.autograd.grad(probe, word)[0].split((32, 48), dim=1)
    assert_close_std(grad[0], g[f"{name}.grad.clip_l"], VECTOR_GRAD)
    assert_close_std(grad[1], g[f"{name}.grad.clip_g"], VECTOR_GRAD)


def test_weights_keep_the_mean_of_each_encoder():
    model = tiny_model()
    plain, weighted = model.encode_text(["a cat here"]), model.encode_prompts(["a (cat:1.4) here"])
    for before, after in zip(
        plain.context.split((32, 48), -1), weighted.context.split((32, 48), -1)
    ):
        torch.testing.assert_close(after.double().mean(), before.double().mean(), rtol=1e-4, atol=0)
    assert not torch.equal(plain.context, weighted.context)
    assert torch.equal(plain.pooled, weighted.pooled)


# --------------------------------------------------------------------------------------- UNet


def test_pooled_text_and_sizes():
    g, unet = golden("sdxl"), tiny_unet("sdxl")
    given = Conditioning(g["unet.context"], g["unet.pooled"], g["add.time_ids"])
    assert_close_std(unet.embed_vector(g["unet.x"], given), g["add.emb"], UNET)


@pytest.mark.parametrize("checkpointing", (False, True))
def test_unet_and_both_gradients(checkpointing):
    g, unet = golden("sdxl"), tiny_unet("sdxl")
    context, pooled = (g[f"unet.{name}"].clone().requires_grad_() for name in ("context", "pooled"))
    unet.gradient_checkpointing = checkpointing
    try:
        out = unet(g["unet.x"], g["unet.t"], Conditioning(context, pooled, g["add.time_ids"]))
        loss = F.mse_loss(out, g["unet.target"])
        grads = torch.autograd.grad(loss, (context, pooled))
    finally:
        unet.gradient_checkpointing = False
    assert_close_std(out, g["unet.out"], UNET)
    assert_close_std(loss, g["unet.loss"], EXACT)
    assert_close_std(grads[0], g["unet.grad_context"], CONTEXT_GRAD)
    assert_close_std(grads[1], g["unet.grad_pooled"], CONTEXT_GRAD)


def test_sizes_are_the_pictures_own_unless_given():
    g, unet = golden("sdxl"), tiny_unet("sdxl")
    own = Conditioning(g["unet.context"], g["unet.pooled"])
    height, width = (4 * side for side in g["unet.x"].shape[2:])
    given = replace(own, sizes=torch.tensor([[height, width, 0, 0, height, width]] * 3))
    results = [unet(g["unet.x"], g["unet.t"], which) for which in (own, given)]
    assert torch.equal(*results)
    cropped = replace(own, sizes=torch.tensor([[height, width, 8, 0, height, width]] * 3))
    assert not torch.equal(results[0], unet(g["unet.x"], g["unet.t"], cropped))


def test_one_textual_inversion_step():
    g, model, word = golden("sdxl"), tiny_model(), recorded_word("vec1").requires_grad_()
    given = model.encode_text(PROMPTS[3:], [textinv.Concept("*", word)])
    given = replace(given, sizes=g["ti.time_ids"])
    loss = textinv.diffusion_loss(model, g["ti.x0"], given, g["ti.t"], g["ti.noise"])
    grad = torch.autograd.grad(loss, word)[0].split((32, 48), dim=1)
    assert_close_std(loss, g["ti.loss"], EXACT)
    assert_close_std(grad[0], g["ti.grad.clip_l"], VECTOR_GRAD)
    assert_close_std(grad[1], g["ti.grad.clip_g"], VECTOR_GRAD)


# ------------------------------------------------------------------------------------ pictures


def test_latents_are_scaled():
    g, model = golden("sdxl"), tiny_model()
    mean, std = model.encode_moments(g["vae.image"])
    assert_close_std(mean + std * g["vae.noise"], g["vae.latent_scaled"], UNET)
    decoded = model.decode_latents(g["vae.latent_scaled"])
    assert_close_std(decoded, g["vae.decoded_of_scaled"].clamp(-1, 1), DECODE)


TRAJECTORIES = ("S10.g1", "S10.g5.zeros", "S10.g5.empty", "S10.g5.negative", "S4.g5.zeros")


@pytest.mark.parametrize("name", (*TRAJECTORIES, "S10.g5.zeros.sizes"))
def test_ddim_with_guidance(name):
    """As diffusers' pipeline draws; zeros stand for the empty negative prompt."""
    g, model = golden("sdxl"), tiny_model()
    states = g[f"ddim.{name}"]
    context, uncond = model.conditioning([PROMPTS[1]])
    if name.endswith(("empty", "negative")):
        uncond = model.encode_text([PROMPTS[2 if name.endswith("negative") else 0]])
    sizes = g["add.time_ids"][:1]
    if name.endswith("sizes"):
        sizes = torch.tensor([[512, 768, 16, 8, 1024, 896]])
    context, uncond = (replace(given, sizes=sizes) for given in (context, uncond))
    scale = 1 if "g1" in name else 5

    def predict(x, t):
        return model.guided(x, t, context, uncond, scale)

    sampler = model.schedule.ddim_sample(predict, g["ddim.xT"], len(states))
    for ours, theirs in zip(sampler, states, strict=True):
        assert_close_std(ours[0], theirs, CHAIN)


# ------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model in diffusers' layout. Its UNet is written here, from the single file."""
    path = tmp_path_factory.mktemp("sdxl") / "diffusers"
    shutil.copytree(TINY / "diffusers", path)
    names = golden_keys("map-sdxl-tiny-unet-compvis-to-diffusers")["map"]
    state = load_file(TINY / "model.safetensors")
    state = {theirs: state[ours] for ours, theirs in names.items()}
    save_file(state, path / "unet/diffusion_pytorch_model.safetensors")
    return path


def networks(model: LatentDiffusion) -> list[torch.nn.Module]:
    return [model.unet, model.autoencoder, model.text_encoder]


def assert_like_tiny_model(model: LatentDiffusion) -> None:
    for ours, reference in zip(networks(model), networks(tiny_model())):
        ours, reference = ours.state_dict(), reference.state_dict()
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[key], reference[key]) for key in ours)
    assert (model.family, model.size, model.scale_factor) == ("sdxl", 1024, 0.13025)
    assert model.schedule.prediction == "eps" and not model.schedule.zero_snr
    assert textinv.guidance_of(model, None) == 5


def test_both_layouts(folder):
    for path in (TINY / "model.safetensors", folder):
        model = textinv.load_model(path, "cpu")
        assert_like_tiny_model(model)
        # The same numbers as well: heads, pads and GELU are in no tensor.
        assert_close_std(model.encode_text(PROMPTS).context, golden("sdxl")["text.out"], TEXT)
        assert_close_std(model.encode_text(PROMPTS).pooled, golden("sdxl")["text.pooled"], TEXT)
        given = Conditioning(*(golden("sdxl")[f"unet.{name}"] for name in ("context", "pooled")))
        inputs = golden("sdxl")["unet.x"], golden("sdxl")["unet.t"], given
        assert torch.equal(model.unet(*inputs), tiny_unet("sdxl")(*inputs))


def test_the_autoencoder_never_runs_in_fp16():
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = textinv.load_model(TINY / "model.safetensors", "cpu", dtype)
        assert (model.dtype, model.autoencoder.quant_conv.weight.dtype) == (dtype, kept)
        assert model.decode_latents(model.encode_images(torch.zeros(1, 3, 32, 32))).isfinite().all()


FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
FILES |= {"text_encoder": "model", "text_encoder_2": "model"}


@pytest.mark.parametrize("layout", ("compvis", "diffusers"))
def test_full_size_keys(layout, tmp_path, monkeypatch):
    """Every key of the published files has its place; none is missing and none is left."""
    tables = {tmp_path / "model.safetensors": golden_keys("sdxl-compvis")}
    if layout == "diffusers":
        tables = {}
        for name, file in FILES.items():
            path = tmp_path / name / f"{file}.safetensors"
            tables[path] = golden_keys(f"sdxl-diffusers-{name}")
            path.parent.mkdir()
        config = json.dumps(golden_keys("config/sdxl-diffusers-unet"))
        (tmp_path / "unet/config.json").write_text(config)
    for path in tables:
        path.touch()

    def opened(path):
        return {key: torch.empty(shape, device="meta") for key, shape in tables[path].items()}

    monkeypatch.setattr(checkpoint, "open_state", opened)
    monkeypatch.setattr(checkpoint, "fingerprint", lambda weights: "")
    monkeypatch.setattr(checkpoint, "find_device", torch.device)
    path = next(iter(tables)) if layout == "compvis" else tmp_path
    model = textinv.load_model(path, "meta", prediction="eps")
    counts = [sum(p.numel() for p in network.parameters()) for network in networks(model)]
    assert counts == [2_567_463_684, 83_653_863, 123_060_480 + 694_659_840]
    assert model.unet.config == UNetConfig(
        widths=(320, 640, 1280),
        depths=(0, 2, 10),
        middle_depth=10,
        context_dim=2048,
        heads=None,
        head_width=64,
        linear_projection=True,
        vector_dim=2816,
    )
    towers = [
        tower.encoder.layers for tower in (model.text_encoder.clip_l, model.text_encoder.clip_g)
    ]
    assert [(len(layers), layers[0].self_attn.heads) for layers in towers] == [(12, 12), (32, 20)]
    assert [layers[0].mlp.quick_gelu for layers in towers] == [True, False]
    assert model.unit == 32


@pytest.fixture
def changed(tmp_path):
    """A function that writes the tiny file with other keys besides."""

    def write(extra: dict, *without: str) -> Path:
        state = load_file(TINY / "model.safetensors")
        state = {k: v for k, v in state.items() if not k.startswith(without)} if without else state
        shutil.copy(TINY / "config.yaml", tmp_path)
        save_file(state | extra, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


def test_what_fine_tunes_say_of_themselves(changed):
    model = textinv.load_model(changed({"v_pred": torch.zeros(0), "junk.weight": torch.ones(3)}))
    assert (model.schedule.prediction, model.schedule.zero_snr) == ("v", False)
    model = textinv.load_model(changed({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}))
    assert (model.schedule.prediction, model.schedule.zero_snr) == ("v", True)
    image = textinv.sample(model, "a cat", steps=2, size=64)[0]  # begins where there is no signal
    assert image.size == (64, 64)


def test_a_folder_that_ends_in_noise(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    scheduler = dict(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    (tmp_path / "model/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    model = textinv.load_model(tmp_path / "model")
    assert (model.schedule.prediction, model.schedule.zero_snr) == ("v", True)


def test_models_of_their_like_are_refused(changed, folder, tmp_path):
    markers = {"edm_mean": "EDM", "edm_vpred.sigma_max": "EDM"}
    for key, name in markers.items():
        with pytest.raises(CheckpointError, match=name):
            textinv.load_model(changed({key: torch.zeros(1)}))
    second = {"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}  # bigG alone
    with pytest.raises(CheckpointError, match="refiner"):
        textinv.load_model(changed(second, "conditioner."))
    key = "model.diffusion_model.input_blocks.0.0.weight"
    with pytest.raises(CheckpointError, match="inpainting"):
        textinv.load_model(changed({key: torch.zeros(32, 9, 3, 3)}))
    for name, change in (("refiner", "text_encoder"), ("EDM", "scheduler")):
        shutil.copytree(folder, tmp_path / name)
        shutil.rmtree(tmp_path / name / change)
    (tmp_path / "EDM/scheduler").mkdir()
    config = '{"_class_name": "EDMEulerScheduler"}'
    (tmp_path / "EDM/scheduler/scheduler_config.json").write_text(config)
    for name in ("refiner", "EDM"):
        with pytest.raises(CheckpointError, match=name):
            textinv.load_model(tmp_path / name)


def test_zero_terminal_snr_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    ours = Schedule(0.00085, 0.012, "v", zero_snr=True)
    assert ours.alphas_cumprod[-1] == 0
    torch.testing.assert_close(
        ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=2e-7
    )
    for steps in (4, 7, 30, 50):
        theirs.set_timesteps(steps)
        assert ours.ddim_timesteps(steps) == theirs.timesteps.tolist()
    theirs.set_timesteps(7)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, t_prev = ours.ddim_pairs(7)[0]
    stepped = theirs.step(0.5 * x + 1, t, x).prev_sample
    theirs_prev = t - 1000 // 7  # diffusers counts back by the whole stride from where it is
    assert_close_std(ours.ddim_step(x, t, theirs_prev, 0.5 * x + 1), stepped, STEP)
    with pytest.raises(ValueError, match="--prediction v"):
        Schedule(0.00085, 0.012, "eps", zero_snr=True)


# --------------------------------------------------------------------------------------- words


def saved(path: Path, content: dict, metadata: dict | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path, metadata)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("ending", ("safetensors", "pt"))
def test_words_of_other_programs(ending, tmp_path):
    first, second = torch.randn(3, 768), torch.randn(3, 1280)
    whole = torch.cat([first, second], dim=1)
    lora = {"lora_unet_down.lora_up.weight": torch.zeros(4, 4)}
    bundle = {"bundle_emb.<b>.clip_l": first, "bundle_emb.<b>.clip_g": second}
    kinds = {
        "kohya": {"clip_l": first, "clip_g": second.half()},
        "replicate": {"text_encoders_0": first, "text_encoders_1": second},
        "lora": lora | bundle,
    }
    for name, content in kinds.items():
        word = textinv.load_concept(saved(tmp_path / f"{name}.{ending}", content))
        assert word.placeholder == ("<b>" if name == "lora" else name)
        tolerance = 1e-2 if name == "kohya" else 0
        torch.testing.assert_close(word.vectors, whole, atol=tolerance, rtol=0)
    named = saved(tmp_path / "named.safetensors", kinds["replicate"], {"placeholder": "<n>"})
    assert textinv.load_concept(named).placeholder == "<n>"


@pytest.mark.parametrize("given", ("learned_embeds", "learned_embeds_2"))
@pytest.mark.parametrize("rest", (".safetensors", "-steps-500.safetensors", ".bin"))
def test_the_two_files_of_diffusers(given, rest, tmp_path):
    halves = {"learned_embeds": torch.randn(2, 768), "learned_embeds_2": torch.randn(2, 1280)}
    for name, half in halves.items():
        saved(tmp_path / (name + rest), {"<cat>": half})
    word = textinv.load_concept(tmp_path / (given + rest))
    assert word.placeholder == "<cat>"
    assert torch.equal(word.vectors, torch.cat(list(halves.values()), dim=1))


def test_the_recorded_files():
    for name in ("pair", "learned_embeds", "learned_embeds_2"):
        word = textinv.load_concept(TINY / f"words/{name}.safetensors")
        torch.testing.assert_close(word.vectors, recorded_word("vec3"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("key", ("clip_g", "text_encoders_1", "bundle_emb.<b>.clip_g"))
@pytest.mark.parametrize("ending", ("safetensors", "pt"))
def test_half_a_word_is_refused(key, ending, tmp_path):
    path = saved(tmp_path / f"half.{ending}", {key: torch.zeros(1, 1280)})
    with pytest.raises(CheckpointError, match="half.*needs clip_l and clip_g"):
        textinv.load_concept(path)


@pytest.mark.parametrize("rest", (".safetensors", "-steps-500.safetensors", ".bin"))
def test_the_second_file_of_diffusers_alone_is_refused(rest, tmp_path):
    path = saved(tmp_path / f"learned_embeds_2{rest}", {"<cat>": torch.zeros(1, 1280)})
    for given in (path, tmp_path):
        with pytest.raises(CheckpointError, match=f"half a word.*learned_embeds{rest}|half of a"):
            textinv.load_concept(given)


@pytest.mark.parametrize("name", ("cat.safetensors", "cat.pt", "cat.png"))
def test_words_are_written_as_halves(name, tmp_path):
    word = textinv.Concept("<cat>", torch.randn(2, 2048), {"steps": "7"})
    for format in [f for f, endings in FORMATS.items() if (tmp_path / name).suffix in endings]:
        word.save(tmp_path / name, overwrite=True, format=format)
        back = textinv.load_concept(tmp_path / name)
        assert torch.equal(back.vectors, word.vectors)
        assert back.placeholder == ("<cat>" if name.endswith("safetensors") else "cat")
    if name == "cat.png":
        return
    content = load_file(tmp_path / name) if name.endswith("s") else torch.load(tmp_path / name)
    assert {key: tuple(half.shape) for key, half in content.items()} == {
        "clip_l": (2, 768),
        "clip_g": (2, 1280),
    }


def test_a_word_of_another_width_is_refused():
    with pytest.raises(ValueError, match="2048 wide, .* --model: sdxl"):
        tiny_model().check_concepts([textinv.Concept("<cat>", torch.zeros(1, 2048))])


# -------------------------------------------------------------------------------- live diffusers


@pytest.fixture(scope="module")
def pipeline(folder):
    """diffusers' own pipeline with the tiny model, DDIM, and the end token found by its id."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.text_encoder_2.text_model.eos_token_id = 639
    pipe.set_progress_bar_config(disable=True)
    words = load_file(TINY / "words/pair.safetensors")
    for half, tokenizer, encoder in (
        ("clip_l", pipe.tokenizer, pipe.text_encoder),
        ("clip_g", pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        pipe.load_textual_inversion(
            words[half], token="<cat>", text_encoder=encoder, tokenizer=tokenizer
        )
    return pipe


@pytest.mark.parametrize("negative", (None, "a dog"))
def test_pictures_are_those_of_diffusers(pipeline, folder, negative):
    """Words, conditioning, sizes, guidance and sampler together."""
    model = textinv.load_model(folder, "cpu")
    word = textinv.load_concept(TINY / "words/pair.safetensors")
    word = replace(word, placeholder="<cat>")
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a photo of <cat> in the forest",
        negative_prompt=negative,
        height=32,
        width=48,
        num_inference_steps=5,
        guidance_scale=5.0,
        latents=noise,
        output_type="latent",
    ).images
    context, uncond = model.conditioning(["a photo of <cat> in the forest"], [word])
    uncond = model.encode_text([negative]) if negative else uncond

    def predict(x, t):
        return model.guided(x, t, context, uncond, 5.0)

    *_, ours = model.schedule.ddim_sample(predict, noise, 5)
    assert_close_std(ours, theirs, CHAIN)


def test_words_we_write_are_read_by_diffusers(pipeline, tmp_path):
    transformers = pytest.importorskip("transformers")
    word = textinv.Concept("<dog>", torch.randn(2, 2048))
    word.save(tmp_path / "dog.safetensors")
    written = load_file(tmp_path / "dog.safetensors")
    tokenizers = pipeline.tokenizer, pipeline.tokenizer_2
    for (half, vectors), tokenizer in zip(sorted(written.items(), reverse=True), tokenizers):
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=vectors.shape[1], num_hidden_layers=1
        )
        encoder = transformers.CLIPTextModel(config)
        pipeline.load_textual_inversion(
            vectors, token=f"<dog-{half}>", text_encoder=encoder, tokenizer=tokenizer
        )
        ids = tokenizer.convert_tokens_to_ids([f"<dog-{half}>", f"<dog-{half}>_1"])
        assert torch.equal(encoder.get_input_embeddings().weight[ids], vectors)


# --------------------------------------------------------------------------------- command line


def run(*arguments: object) -> None:
    assert textinv.main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("layout", ("compvis", "diffusers"))
def test_command_line(layout, folder, tmp_path, capsys, monkeypatch):
    """Learn, resume to the same bits, convert, draw with two words at once."""
    monkeypatch.chdir(tmp_path)
    model = ("--model", folder if layout == "diffusers" else TINY / "model.safetensors")
    (tmp_path / "cats").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"cats/{i}.png")
    learn = ("invert", "cats", "--init-word", "cat", "--size", 64, "--preview-every", 0, *model)
    run(*learn, "--steps", 4, "--out", "whole.safetensors", "--placeholder", "<cat>")
    run(*learn, "--steps", 2, "--out", "cat.safetensors")
    run(*learn, "--steps", 4, "--out", "cat.safetensors", "--resume")
    whole, word = (textinv.load_concept(f"{name}.safetensors") for name in ("whole", "cat"))
    assert torch.equal(word.vectors, whole.vectors)
    assert (word.metadata["lr"], word.metadata["batch_size"]) == ("0.002", "1")
    start = textinv.initial_vectors(textinv.load_model(model[1]), "cat", 1)
    for learnt, before in zip(word.vectors.split((32, 48), 1), start.split((32, 48), 1)):
        assert (learnt - before).abs().mean() > 1e-3  # both halves have moved

    run("convert", "cat.safetensors", "dog.pt", "--format", "a1111")
    pair = ("--concept", TINY / "words/pair.safetensors", "--rename", "pair.safetensors=<big>")
    words = ("--concept", "cat.safetensors", "--concept", "dog.pt", *pair)
    draw = ("sample", "a <cat> beside dog and (<big>:1.2)", *words, "--size", "64x32", "-n", 2)
    run(*draw, "--steps", 3, "--singles", "one", *model)
    with Image.open("one/0000.png") as image:
        assert image.size == (64, 32)
        assert json.loads(image.text["settings"])["guidance_scale"] == 5
    run("show", "--word", "cat.safetensors", *model)
    run("show", *model)
    assert "1 vector(s) of 80 numbers" in capsys.readouterr().out


def test_a_size_that_does_not_fit(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    learn = ("invert", tmp_path, "--init-word", "cat", "--size", "72", "--out", tmp_path / "c/d.pt")
    model = ("--model", TINY / "model.safetensors")
    assert textinv.main([str(argument) for argument in (*learn, *model)]) == 2
    assert "multiples of 16" in capsys.readouterr().err
