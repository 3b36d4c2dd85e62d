"""Prompts through the model: weights against an implementation of AUTOMATIC1111's rule that shares
nothing with ours (a parser by characters, transformers' tokenizer and text encoder, numpy)."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close_std
from test_tokenizers import PROMPTS, by_characters, chunked

import textinv

SD1 = Path(__file__).parent / "golden/tiny/sd1/diffusers"
SDXL = Path(__file__).parent / "golden/tiny/sdxl/model.safetensors"


def reference(prompt: str, vectors: torch.Tensor, clip_skip: int = 1) -> np.ndarray:
    """(77 * chunks, D) of transformers' encoder with the word's vectors appended to its table."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(SD1 / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(SD1 / "text_encoder").float().eval()
    size = encoder.config.vocab_size
    encoder.resize_token_embeddings(size + len(vectors))
    encoder.get_input_embeddings().weight.data[size:] = vectors
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    units: list = []  # as `chunked` takes them, of pairs (id, weight)
    runs: list[list] = []
    for c, weight in by_characters(prompt):
        if runs and runs[-1][1] == weight:
            runs[-1][0] += c
        else:
            runs.append([c, weight])
    for text, weight in runs:
        for part in re.split("(<s>|BREAK)", text):
            if part == "BREAK":
                units.append(None)
            elif part == "<s>":
                units.append(([(size + k, weight) for k in range(len(vectors))], False))
            else:
                ids = tokenizer(part, add_special_tokens=False).input_ids
                units += [([(i, weight)], i == comma) for i in ids]
    begin, end, rows = tokenizer.bos_token_id, tokenizer.eos_token_id, []
    for chunk in chunked(units):
        pad = 75 - len(chunk)
        ids = [begin, *[i for i, _ in chunk], end, *[tokenizer.pad_token_id] * pad]
        weights = np.array([1.0, *[weight for _, weight in chunk], 1.0, *[1.0] * pad])
        with torch.no_grad():
            out = encoder(torch.tensor([ids]), output_hidden_states=True)
            z = encoder.final_layer_norm(out.hidden_states[-clip_skip])
        z = z[0].double().numpy()
        weighted = z * weights[:, None]
        rows.append(weighted * (z.mean() / weighted.mean()))
    return np.concatenate(rows)


LONG = [
    "a (photo of:1.2) BREAK (<s>:0.8) on the beach",
    "word, " * 30 + "(a, photo of <s>:1.1) " + "[on the beach] " * 20,
    "<s> " * 38,
    "(word BREAK " + "photo of a, thing:1.3) " + "<s> beach, " * 40,
]


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("prompt", PROMPTS + LONG)
def test_text_features_of_weighted_prompts(prompt, clip_skip):
    model = textinv.load_model(SD1, "cpu", torch.float32, clip_skip=clip_skip)
    generator = torch.Generator().manual_seed(1)
    vectors = 0.02 * torch.randn(2, 32, generator=generator)
    ours = model.encode_prompts([prompt, "another"], [textinv.Concept("<s>", vectors)])
    for i, text in enumerate((prompt, "another")):
        expected = reference(text, vectors, clip_skip)
        theirs = ours[i].double().numpy()[: len(expected)]
        assert np.abs(theirs - expected).max() / expected.std() < 2e-5
    empty = reference("", vectors, clip_skip)
    filled = ours[1, 77:].double().numpy().reshape(-1, *empty.shape)
    assert np.abs(filled - empty).max(initial=0) / empty.std() < 2e-5
    assert ours.shape[1] == len(reference(prompt, vectors))


def test_clip_skip_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    parts = dict(safety_checker=None, feature_extractor=None, image_encoder=None)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        SD1, **parts, torch_dtype=torch.float32
    )
    encoder = pipe.text_encoder
    encoder.__dict__["text_model"] = encoder  # where transformers 4, which diffusers asks, has it
    text, prompt = dict(device="cpu", num_images_per_prompt=1), "a photo of a thing"
    theirs, uncond = pipe.encode_prompt(
        prompt, **text, do_classifier_free_guidance=True, clip_skip=1
    )
    model = textinv.load_model(SD1, "cpu", torch.float32, clip_skip=2)
    assert_close_std(model.encode_text([prompt]), theirs, 2e-5)
    ours, _ = model.conditioning([prompt])
    assert_close_std(ours, theirs, 2e-5)
    assert not torch.allclose(textinv.load_model(SD1, "cpu").encode_text([prompt]), theirs)


@pytest.mark.parametrize("name", ["ldm/model.ckpt", "sd2/diffusers", "sdxl/model.safetensors"])
def test_clip_skip_is_refused_for_other_families(name):
    with pytest.raises(ValueError, match="clip skip is 2; use 2 with some SD 1 models, else 1"):
        textinv.load_model(SD1.parent.parent / name, clip_skip=2)
    for clip_skip in (0, 3):
        with pytest.raises(ValueError, match=f"clip skip is {clip_skip}"):
            textinv.load_model(SD1, clip_skip=clip_skip)


def test_a_word_of_clip_skip_is_noted_without_it():
    word = textinv.Concept("<s>", torch.zeros(1, 32), {"clip_skip": "2"})
    with pytest.warns(UserWarning, match="<s> was learnt with clip skip 2; add --clip-skip 2"):
        textinv.load_model(SD1).check_concepts([word])
    plain = textinv.Concept("<s>", word.vectors, {"clip_skip": "1"})
    with pytest.warns(UserWarning, match="<s> was learnt with clip skip 1; add --clip-skip 1"):
        textinv.load_model(SD1, clip_skip=2).check_concepts([plain])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        textinv.load_model(SD1, clip_skip=2).check_concepts([word])


def test_chunks_of_sdxl_lie_side_by_side():
    model = textinv.load_model(SDXL, "cpu", torch.float32)
    prompts = ["a (photo:1.4) of", "a [beach] (word:0.5)"]
    single = model.encode_prompts(prompts)
    both = model.encode_prompts([" BREAK ".join(prompts), "short"])
    expected = single.context.flatten(0, 1)
    assert_close_std(both.context[0], expected, 1e-6)
    assert_close_std(both.pooled[0], single.pooled[0], 1e-6)
    empty = model.encode_text([""]).context[0]
    assert_close_std(both.context[1, 77:], empty, 1e-6)
    noise = torch.randn(2, 4, 8, 8)
    assert model.unet(noise, torch.tensor([9, 9]), both).shape == noise.shape


@pytest.mark.parametrize("name", ["sd1/model.ckpt", "sd2/diffusers", "sdxl/model.safetensors"])
def test_both_sides_of_the_guidance_have_as_many_chunks(name):
    model = textinv.load_model(SD1.parent.parent / name, "cpu", torch.float32)
    for prompt, negative in (("a cat", "b BREAK c BREAK d"), ("a, " * 120, "b"), ("a BREAK b", "")):
        context, uncond = (
            getattr(part, "context", part) for part in model.conditioning([prompt], (), negative)
        )
        assert context.shape == uncond.shape and context.shape[1] > 77
        assert textinv.sample(model, prompt, negative=negative, steps=1, size=64)[0]
    assert uncond.any() == (model.family != "sdxl")


def test_the_negative_prompt_takes_the_empty_ones_place():
    """Of SDXL the empty one is zeros; learnt words and weights work in it."""
    for path in (SD1, SDXL):
        model = textinv.load_model(path, "cpu", torch.float32)
        width = model.text_encoder.token_table.shape[1]
        word = textinv.Concept("<bad>", 0.02 * torch.randn(8, width))
        negative = "(ugly:1.3), <bad>"
        _, uncond = model.conditioning(["a cat", "b"], [word], negative)
        expected = model.encode_prompts([negative], [word])
        _, empty = model.conditioning(["a cat"], [word], " ")
        for part in ("context", "pooled") if path == SDXL else ("",):
            ours, theirs, none = (getattr(x, part, x) for x in (uncond, expected, empty))
            assert_close_std(ours, theirs, 1e-6)
            assert bool(none.any()) == (path != SDXL)
        drawn = [
            textinv.sample(model, "a cat", [word], negative=text, steps=2, size=64)[0].tobytes()
            for text in ("", negative, "ugly, <bad>", "ugly")
        ]
        assert len(set(drawn)) == 4


def test_prompts_of_ldm_have_one_chunk():
    model = textinv.load_model()
    with pytest.warns(UserWarning, match="no second chunk, BREAK is left out"):
        ours = model.encode_prompts(["a cat BREAK on the beach"])
    assert torch.equal(ours, model.encode_text(["a cat on the beach"]))
    with pytest.warns(UserWarning, match="has 50 tokens, only the first 22 are read"):
        model.conditioning(["a"], negative="cat " * 50)


def test_plain_prompts_are_encoded_as_ever():
    model = textinv.load_model()
    prompts = ["a photo of a cat", "a sketch of a dog on the beach"]
    assert torch.equal(model.encode_prompts(prompts), model.encode_text(prompts))
    assert torch.equal(model.encode_text(prompts[0]), model.encode_text(prompts[:1]))


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
    weighted = model.weighted_chunks("([V]:1.5)", [word])
    assert weighted == [[(model.tokenizer.vocab_size, 1.5)]]


def test_placeholders_are_cut_out_whole_and_the_longest_first():
    model = textinv.load_model()
    width = model.text_encoder.token_table.shape[1]
    first = model.tokenizer.vocab_size
    for names in (("[V]", "[[V]]"), ("[[V]]", "[V]")):
        words = [textinv.Concept(name, torch.ones(1, width)) for name in names]
        expected = first + names.index("[[V]]")
        assert model.weighted_chunks("[[V]]", words) == [[(expected, 1.0)]]


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
