"""CLIP against OpenAI's and open_clip's (golden numbers) and against transformers (live)."""

import pytest
import torch
from helpers import (
    GOLDEN,
    TEXT,
    VECTOR_GRAD,
    assert_close_std,
    below,
    embed,
    fill,
    golden,
    golden_keys,
    randomize,
    shapes,
    tiny_state,
    tiny_text_encoder,
)
from safetensors.torch import load_file
from torch import Tensor

from models.clip import CLIP, CLIPConfig, CLIPTextEncoder, TextConfig, VisionConfig


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD 2's single-file names in ours; a list of three names splits query, key and value."""
    names, out = golden_keys("map-sd-v2-text-openclip-to-transformers")["map"], {}
    for key, value in below(state, "cond_stage_model.model.").items():
        if isinstance(names[key], list):
            out |= zip(names[key], value.chunk(3))
        elif names[key] is not None:
            out[names[key]] = value
    return out


def test_full_size_keys_sd1():
    with torch.device("meta"):
        encoder = CLIPTextEncoder(TextConfig())
    table = golden_keys("sd-v1-compvis")
    assert shapes(encoder) == below(table, "cond_stage_model.transformer.")


def test_full_size_keys_sd2():
    """The file's 24th layer is left out, with text_projection and logit_scale."""
    config = TextConfig(width=1024, layers=23, heads=16, quick_gelu=False)
    with torch.device("meta"):
        encoder = CLIPTextEncoder(config)
        table = golden_keys("sd-v2-compvis")
        state = {k: torch.empty(v) for k, v in table.items() if k.startswith("cond_stage_model.")}
    theirs = {key: list(value.shape) for key, value in from_open_clip(state).items()}
    assert shapes(encoder) == theirs


def test_full_size_keys_image_tower():
    with torch.device("meta"):
        model = CLIP(CLIPConfig(TextConfig(width=512, heads=8), VisionConfig(), 512))
    assert shapes(model) == below(golden_keys("clip-vit-b32-transformers"), "")


@pytest.mark.parametrize("family", ("sd1", "sd2"))
def test_text_output(family):
    g, encoder = golden(family), tiny_text_encoder(family)
    embeddings = embed(encoder, g["text.ids"])
    assert_close_std(encoder(embeddings), g["text.out"], TEXT)
    # Causal: what follows a token has no influence on it.
    assert_close_std(encoder(embeddings[:, :9]), g["text.out"][:, :9], TEXT)


@pytest.mark.parametrize("layers, name", ((2, "text.out"), (3, "text.out_last_layer")))
def test_sd2_single_file(layers, name):
    """Without its last layer, the file's encoder gives what SD 2 uses; with it, open_clip's."""
    g = golden("sd2")
    state = from_open_clip(tiny_state("sd2"))
    state = {k: v for k, v in state.items() if f".layers.{layers}." not in k}
    config = TextConfig(width=32, layers=layers, heads=2, vocab_size=640, quick_gelu=False)
    encoder = fill(CLIPTextEncoder(config), state)
    out = encoder(embed(encoder, g["text.ids"][: len(g[name])]))
    assert_close_std(out, g[name], TEXT)


@pytest.mark.parametrize("vectors", ("vec1", "vec3"))
@pytest.mark.parametrize("family", ("sd1", "sd2"))
def test_a_word_of_our_own(family, vectors):
    """One and three vectors put for the placeholder, and the gradient that returns to them."""
    g, encoder = golden(family), tiny_text_encoder(family)
    word = g[f"text.replace.{vectors}"].clone().requires_grad_()
    out = encoder(embed(encoder, g["text.ids"][3:], g["text.placeholder_id"].item(), word))
    (grad,) = torch.autograd.grad((out * g["text.replace.probe"]).sum(), word)
    assert_close_std(out, g[f"text.replace.{vectors}.out"], TEXT)
    assert_close_std(grad, g[f"text.replace.{vectors}.grad"], VECTOR_GRAD)


def tiny_clip() -> CLIP:
    config = CLIPConfig(
        TextConfig(width=64, layers=1, heads=1, vocab_size=256),
        VisionConfig(width=128, layers=1, heads=2, image_size=32, patch_size=8),
        width=32,
    )
    return fill(CLIP(config), load_file(GOLDEN / "tiny/clip/transformers/model.safetensors"))


def test_both_towers():
    g, model = golden("clip"), tiny_clip()
    images = model.encode_image(g["pixel_values"])
    texts = model.encode_text(g["ids"], end_id=255)
    assert_close_std(images, g["image_features"], TEXT)
    assert_close_std(texts, g["text_features"], TEXT)
    images, texts = (x / x.norm(dim=1, keepdim=True) for x in (images, texts))
    assert_close_std(images @ texts.T, g["cosine"], TEXT)
    assert_close_std(model.logit_scale.exp() * images @ texts.T, g["logits_per_image"], TEXT)


@pytest.mark.parametrize("hidden_act", ("quick_gelu", "gelu"))
def test_live_text_encoder(hidden_act):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        hidden_act=hidden_act,
        attn_implementation="eager",
    )
    reference = randomize(transformers.CLIPTextModel(config))
    state = {
        "text_model." + key.removeprefix("text_model."): value  # version 5 dropped the prefix
        for key, value in reference.state_dict().items()
    }
    ours = TextConfig(48, 3, 3, hidden_act == "quick_gelu", vocab_size=100)
    encoder = fill(CLIPTextEncoder(ours), state)
    ids = torch.randint(100, (3, 77), generator=torch.Generator().manual_seed(0))
    assert_close_std(encoder(embed(encoder, ids)), reference(ids).last_hidden_state, TEXT)


def test_live_clip():
    transformers = pytest.importorskip("transformers")
    end_id = 99
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "bos_token_id": 98,
            "eos_token_id": end_id,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 48,
            "patch_size": 16,
        },
        projection_dim=24,
    )
    reference = randomize(transformers.CLIPModel(config))
    ours = CLIPConfig(
        TextConfig(width=32, layers=2, heads=2, vocab_size=100),
        VisionConfig(width=48, layers=2, heads=3, image_size=48, patch_size=16),
        width=24,
    )
    model = fill(CLIP(ours), reference.state_dict())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 48, 48, generator=generator)
    ids = torch.randint(end_id, (3, 77), generator=generator)
    for row, end in enumerate((2, 30, 76)):  # padded with the end's id, as SD 1 does
        ids[row, end:] = end_id
    out = reference(input_ids=ids, pixel_values=pixels)
    images, texts = model.encode_image(pixels), model.encode_text(ids, end_id)
    images, texts = (x / x.norm(dim=1, keepdim=True) for x in (images, texts))
    assert_close_std(images, out.image_embeds, TEXT)
    assert_close_std(texts, out.text_embeds, TEXT)
    assert_close_std(model.logit_scale.exp() * images @ texts.T, out.logits_per_image, TEXT)
