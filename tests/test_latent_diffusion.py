"""Prompts through the model: weights against an implementation of AUTOMATIC1111's rule that shares
nothing with ours (a parser by characters, transformers' tokenizer and text encoder, numpy)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_tokenizers import PROMPTS, by_characters

import textinv

SD1 = Path(__file__).parent / "golden/tiny/sd1/diffusers"


def reference(prompt: str, vectors: torch.Tensor) -> np.ndarray:
    """(77, D) of transformers' encoder with the word's vectors appended to its table."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(SD1 / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(SD1 / "text_encoder").float().eval()
    size = encoder.config.vocab_size
    encoder.resize_token_embeddings(size + len(vectors))
    encoder.get_input_embeddings().weight.data[size:] = vectors
    ids, weights = [], []
    runs: list[list] = []
    for c, weight in by_characters(prompt):
        if runs and runs[-1][1] == weight:
            runs[-1][0] += c
        else:
            runs.append([c, weight])
    for text, weight in runs:
        for i, part in enumerate(text.split("<s>")):
            new = [size + k for k in range(len(vectors))] if i else []
            new += tokenizer(part, add_special_tokens=False).input_ids
            ids += new
            weights += [weight] * len(new)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = 77 - 2 - len(ids[:75])
    ids = [begin, *ids[:75], end, *[tokenizer.pad_token_id] * pad]
    weights = np.array([1.0, *weights[:75], 1.0, *[1.0] * pad])
    with torch.no_grad():
        z = encoder(torch.tensor([ids])).last_hidden_state[0].double().numpy()
    weighted = z * weights[:, None]
    return weighted * (z.mean() / weighted.mean())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_features_of_weighted_prompts(prompt):
    model = textinv.load_model(SD1, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    vectors = 0.02 * torch.randn(2, 32, generator=generator)
    ours = model.encode_prompts([prompt, "another"], [textinv.Concept("<s>", vectors)])[0]
    expected = reference(prompt, vectors)
    scale = expected.std()
    assert np.abs(ours.double().numpy() - expected).max() / scale < 2e-5


def test_plain_prompts_are_encoded_as_ever():
    model = textinv.load_model()
    prompts = ["a photo of a cat", "a sketch of a dog on the beach"]
    assert torch.equal(model.encode_prompts(prompts), model.encode_text(prompts))


def test_ldm_weighs_without_restoring_a_mean_that_is_zero():
    """The mean of BERT's output is noise; restoring it multiplied a prompt by -18."""
    model = textinv.load_model()
    plain = model.encode_text(["a photo of a cat"])
    weights = torch.ones(plain.shape[1])
    weights[5] = 0.6  # [CLS] a photo of a cat
    expected = plain * weights[:, None]
    torch.testing.assert_close(model.encode_prompts(["a photo of a (cat:0.6)"]), expected)


def test_placeholders_with_brackets_are_words():
    model = textinv.load_model()
    word = textinv.Concept("[V]", torch.ones(1, model.text_encoder.token_table.shape[1]))
    plain = model.encode_text(["a photo of [V]"], [word])
    assert torch.equal(model.encode_prompts(["a photo of [V]"], [word]), plain)
    weighted = model.weighted_ids("([V]:1.5)", [word])
    assert weighted == [(model.tokenizer.vocab_size, 1.5)]


def test_placeholders_are_cut_out_whole_and_the_longest_first():
    model = textinv.load_model()
    width = model.text_encoder.token_table.shape[1]
    first = model.tokenizer.vocab_size
    for names in (("[V]", "[[V]]"), ("[[V]]", "[V]")):
        words = [textinv.Concept(name, torch.ones(1, width)) for name in names]
        expected = first + names.index("[[V]]")
        assert model.weighted_ids("[[V]]", words) == [(expected, 1.0)]


def test_no_prompts_are_no_pictures():
    assert textinv.sample(textinv.load_model(), []) == []


def test_weights_matter_when_sampling():
    model = textinv.load_model()
    plain, _ = model.conditioning(["a cat on the beach"])
    weighted, _ = model.conditioning(["a (cat:1.4) on the beach"])
    assert not torch.allclose(plain, weighted)
    a, b = (
        textinv.sample(model, prompt, steps=2)[0].tobytes()
        for prompt in ("a cat on the beach", "a (cat:1.4) on the beach")
    )
    assert a != b
