"""LDM's text encoder against CompVis' (golden numbers)."""

import pytest
import torch
from helpers import (
    TEXT,
    VECTOR_GRAD,
    assert_close_std,
    below,
    embed,
    golden,
    golden_keys,
    shapes,
    tiny_text_encoder,
)

from models.bert import BertConfig, BertTextEncoder


def test_full_size_keys():
    """All but `transformer.to_logits.*`, the language-model head, which nothing uses."""
    with torch.device("meta"):
        encoder = BertTextEncoder(BertConfig())
    table = golden_keys("ldm-text2img-large")
    assert shapes(encoder) == below(table, "cond_stage_model.")
    unused = table.keys() - {f"cond_stage_model.{key}" for key in shapes(encoder)}
    unused = {key for key in unused if key.startswith("cond_stage_model.")}
    head = "cond_stage_model.transformer.to_logits"
    assert unused == {f"{head}.weight", f"{head}.bias"}


def test_output():
    g, encoder = golden("ldm"), tiny_text_encoder("ldm")
    assert_close_std(encoder(embed(encoder, g["text.ids"])), g["text.out"], TEXT)


def test_shorter_input_sees_the_same_positions():
    """Without padding, as attention is not causal, features differ; positions must not."""
    g, encoder = golden("ldm"), tiny_text_encoder("ldm")
    embeddings = embed(encoder, g["text.ids"])[:, :9]
    positions = encoder.transformer.pos_emb.emb.weight
    by_hand = encoder.transformer.attn_layers(embeddings + positions[:9])
    torch.testing.assert_close(encoder(embeddings), encoder.transformer.norm(by_hand))


@pytest.mark.parametrize("vectors", ("vec1", "vec3"))
def test_a_word_of_our_own(vectors):
    """One and three vectors put for the placeholder, and the gradient that returns to them."""
    g, encoder = golden("ldm"), tiny_text_encoder("ldm")
    word = g[f"text.replace.{vectors}"].clone().requires_grad_()
    out = encoder(embed(encoder, g["text.ids"][3:], g["text.placeholder_id"].item(), word))
    (grad,) = torch.autograd.grad((out * g["text.replace.probe"]).sum(), word)
    assert_close_std(out, g[f"text.replace.{vectors}.out"], TEXT)
    assert_close_std(grad, g[f"text.replace.{vectors}.grad"], VECTOR_GRAD)
