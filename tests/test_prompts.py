"""Prompt weights against an implementation of AUTOMATIC1111's rule that shares nothing with ours:
a parser by characters, transformers' tokenizer and text encoder, numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch

import textinv
from models.prompts import escape, split_weights, without_weights

SD1 = Path(__file__).parent / "golden/tiny/sd1/diffusers"

PROMPTS = [
    "a photo of a cat",
    "a photo of (<s>:1.3) on the [beach]",
    "a (photo of ((<s>)) on:0.7) the beach",
    "[[a photo]] of <s>, (very (old)",
    "a \\(photo\\) of [<s> \\[x\\]] :) 10:30 :1.5)",
    "(a:1.21)(photo:0.5)",
    "(" * 3 + "a photo of <s>",
    "(word:1.5) " * 60,  # cut off in the middle
]


def by_characters(prompt: str) -> list[tuple[str, float]]:
    """Every character that is text, with its weight: brackets are looked for in pairs first."""
    escaped, characters, i = [], [], 0
    while i < len(prompt):
        if prompt[i] == "\\":
            literal = prompt[i + 1 : i + 2]
            if literal and literal in "()[]\\":
                characters.append(literal)
                escaped.append(True)
                i += 1
        else:
            characters.append(prompt[i])
            escaped.append(False)
        i += 1
    weights = np.ones(len(characters))
    text = [True] * len(characters)
    stacks: dict[str, list[int]] = {"(": [], "[": []}
    for i, c in enumerate(characters):
        if escaped[i]:
            continue
        if c in "([":
            stacks[c].append(i)
            text[i] = False
        elif c == ")" and stacks["("]:
            begin, factor = stacks["("].pop(), 1.1
            text[i] = False
            colon = "".join(characters[:i]).rfind(":")
            inside = "".join(characters[colon + 1 : i]).strip()
            if colon > begin and inside and set(inside.lstrip("+-")) <= set("0123456789."):
                factor = float(inside)
                for k in range(colon, i):
                    text[k] = False
            weights[begin:i] *= factor
        elif c == "]" and stacks["["]:
            text[i] = False
            weights[stacks["["].pop() : i] /= 1.1
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for begin in stacks[bracket]:
            weights[begin:] *= factor
    return [(c, w) for c, w, shown in zip(characters, weights, text) if shown]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_weights_of_characters(prompt):
    ours = [(c, weight) for text, weight in split_weights(prompt) for c in text]
    theirs = by_characters(prompt)
    assert [c for c, _ in ours] == [c for c, _ in theirs]
    np.testing.assert_allclose([w for _, w in ours], [w for _, w in theirs], rtol=1e-12)


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


def test_escaped_text_comes_back():
    text = r"a (b) [c] \d: (e:1.2)"
    assert split_weights(escape(text)) == [(text, 1.0)]
    assert without_weights("a (b:2) [c]") == "a b c"


def test_placeholders_are_cut_out_whole_and_the_longest_first():
    model = textinv.load_model()
    width = model.text_encoder.token_table.shape[1]
    first = model.tokenizer.vocab_size
    for names in (("[V]", "[[V]]"), ("[[V]]", "[V]")):
        words = [textinv.Concept(name, torch.ones(1, width)) for name in names]
        expected = first + names.index("[[V]]")
        assert model.weighted_ids("[[V]]", words) == [(expected, 1.0)]


def test_clip_is_asked_for_the_coarse_word():
    art = textinv.Concept("art", torch.ones(1, 8), {"init_word": "toy (old)"})
    bracket = textinv.Concept("[V]", torch.ones(1, 8), {"init_word": "cat"})
    text = textinv.plain_text("a (party:1.2) of [V] and art", [art, bracket])
    assert text == "a party of cat and toy (old)"


@pytest.mark.parametrize("prompt", ["(a:" + "9" * 400 + ")", "(" * 9000 + "a"])
def test_weights_without_bound_are_said(prompt):
    with pytest.raises(ValueError, match="a weight is too large"):
        split_weights(prompt)


def test_no_prompts_are_no_pictures():
    assert textinv.sample(textinv.load_model(), []) == []


def test_a_weight_that_is_no_number_is_said():
    with pytest.raises(ValueError, match="'1.2.3' is no weight"):
        split_weights("a (cat:1.2.3)")


def test_weights_matter_when_sampling_editing_and_evaluating():
    """The same brackets everywhere: each of the three asks `conditions`."""
    model = textinv.load_model()
    plain = textinv.conditions(model, ["a cat on the beach"])["context"]
    weighted = textinv.conditions(model, ["a (cat:1.4) on the beach"])["context"]
    assert not torch.allclose(plain, weighted)
    a, b = (
        textinv.sample(model, prompt, steps=2)[0].tobytes()
        for prompt in ("a cat on the beach", "a (cat:1.4) on the beach")
    )
    assert a != b
    picture = textinv.sample(model, "a dog", steps=2)[0]
    a, b = (
        textinv.edit(model, picture, prompt, steps=2)[0].tobytes()
        for prompt in ("a cat on the beach", "a (cat:1.4) on the beach")
    )
    assert a != b
