"""The method itself, on the bundled model: real training and sampling, few steps."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from helpers import EXACT, GOLDEN, assert_close_std
from PIL import Image
from safetensors.torch import load_file

import textinv
from models import runs

ROOT = Path(__file__).resolve().parent.parent
MUSHROOM = ROOT / "examples" / "concepts" / "mushroom"


@pytest.fixture(scope="module")
def model():
    return textinv.load_model(device="cpu", dtype=torch.float32)


def fixed_loss(model, concept, images, init_word):
    """The loss with the same pictures, timesteps and noise for every word."""
    latents = model.encode_images(textinv.prepare_images(images, model.size)).repeat(4, 1, 1, 1)
    generator = torch.Generator().manual_seed(123)
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.linspace(50, 950, len(latents)).long()
    prompts = [f"a photo of a {concept.placeholder if concept else init_word}"] * len(latents)
    concepts = [concept] if concept else []
    with torch.no_grad():
        context = model.encode_text(prompts, concepts)
        return textinv.diffusion_loss(model, latents, context, t, noise).item()


def test_templates_are_the_papers():
    assert len(textinv.OBJECT_TEMPLATES) == len(set(textinv.OBJECT_TEMPLATES)) == 27
    assert all(t.count("{}") == 1 for kind in textinv.TEMPLATES.values() for t in kind)


def test_init_words_vector_encodes_exactly_like_the_word(model):
    vectors = textinv.initial_vectors(model, "apple", 1)
    concept = textinv.Concept("<thing>", vectors)
    with_word = model.encode_text(["a photo of an apple on the beach"])
    with_concept = model.encode_text(["a photo of an <thing> on the beach"], [concept])
    assert torch.equal(with_word, with_concept)


def test_equal_prompts_are_encoded_once_and_all_get_a_gradient(model, monkeypatch):
    word = textinv.Concept("<m>", textinv.initial_vectors(model, "plant", 1).requires_grad_())
    prompts = ["a photo of <m>", "a sketch", "a photo of <m>", "a photo of <m>"]
    shapes, forward = [], type(model.text_encoder).forward

    def noted(self, embeddings, ends):
        shapes.append(tuple(embeddings.shape[:2]))
        return forward(self, embeddings, ends)

    monkeypatch.setattr(type(model.text_encoder), "forward", noted)
    together = model.encode_text(prompts, [word])
    assert shapes == [(2, model.tokenizer.max_length)]
    apart = torch.cat([model.encode_text([prompt], [word]) for prompt in prompts])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)
    probe = torch.randn(together.shape, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad((context * probe).sum(), word.vectors)[0]
        for context in (together, apart)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_phrases_fill_average_or_repeat(model):
    table = model.text_encoder.token_table
    red, apple = (table[model.tokenizer.token_ids(w)[0]] for w in ("red", "apple"))
    torch.testing.assert_close(
        textinv.initial_vectors(model, "red apple", 1), ((red + apple) / 2)[None]
    )
    torch.testing.assert_close(
        textinv.initial_vectors(model, "red apple", 3), torch.stack([red, apple, red])
    )


@pytest.mark.parametrize("count", [1, 3])
def test_only_the_vectors_get_gradients_and_each_one_does(model, count):
    states = textinv.train(model, MUSHROOM, "plant", vectors=count, steps=1, batch_size=4)
    start = textinv.initial_vectors(model, "plant", count)
    concept = next(iter(states)).concept
    assert concept.vectors.shape == start.shape
    assert (concept.vectors.grad.abs().sum(dim=1) > 0).all()
    assert ((concept.vectors.detach() - start).abs().sum(dim=1) > 0).all()
    for module in (model.unet, model.autoencoder, model.text_encoder):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_loss_on_fixed_noise_falls(model):
    before = fixed_loss(model, None, MUSHROOM, "plant")
    concept = textinv.invert(model, MUSHROOM, "plant", steps=60, placeholder="<m>")
    assert fixed_loss(model, concept, MUSHROOM, "plant") < before - 0.001


def test_progressive_vectors_join_after_two_and_four_fifths(model):
    options = dict(vectors=3, steps=10, batch_size=1, progressive=True)
    moved = []
    start = textinv.initial_vectors(model, "plant", 3)
    for state in textinv.train(model, MUSHROOM, "plant", **options):
        vectors = state.concept.vectors.detach()
        moved.append(((vectors - start[: len(vectors)]).abs().sum(dim=1) > 0).tolist())
    assert moved == [[True]] * 4 + [[True, True]] * 4 + [[True, True, True]] * 2
    with pytest.raises(ValueError, match="needs 3 vectors and no early stopping"):
        textinv.train(model, MUSHROOM, "plant", vectors=5, progressive=True)


def test_regularization_holds_each_vector_by_itself(model):
    """With a weight so large that nothing else counts, a vector that was moved goes back, and the
    others stay where they are."""
    options = dict(vectors=2, batch_size=1, regularize=1e6, lr=1e-3, steps=2)
    first = next(textinv.train(model, MUSHROOM, "plant", **options))
    saved = first.tensors()
    start = textinv.initial_vectors(model, "plant", 2)
    saved["0.vectors"] = start + torch.tensor([[1.0], [0.0]])
    saved |= {f"0.{k}": torch.zeros_like(start) for k in ("exp_avg", "exp_avg_sq")}
    after = next(textinv.train(model, MUSHROOM, "plant", resume=saved, **options)).concept.vectors
    assert (after[0] < saved["0.vectors"][0]).all()
    gradient = after.grad
    torch.testing.assert_close(gradient[0], torch.full_like(gradient[0], 2e6), rtol=1e-3, atol=0)
    assert gradient[1].abs().max() < 1


def test_per_image_words_learn_beside_the_shared_one(model):
    options = dict(per_image=True, steps=3, batch_size=8, placeholder="<m>")
    *_, state = textinv.train(model, MUSHROOM, "plant", **options)
    assert [w.placeholder for w in state.image_words] == [f"<m>-{i}" for i in range(1, 6)]
    mean = model.text_encoder.token_table.mean(0)
    for word in (state.concept, *state.image_words):
        assert word.vectors.grad is not None
        assert (word.vectors.detach() - mean).abs().max() > 0
    words = [state.concept, *state.image_words]
    assert textinv.fill_template("a photo of {}", words, 1) == "a photo of <m> with <m>-2"


def test_templates_may_differ_from_picture_to_picture(model):
    captions = [[f"{{}} number {i}"] for i in range(5)]
    assert textinv.templates_by_picture(captions, 5)[3] == ["{} number 3"]
    with pytest.raises(ValueError, match="captions for 5 pictures, but 4"):
        textinv.templates_by_picture(captions, 4)
    with pytest.raises(ValueError, match="needs a {}"):
        textinv.invert(model, MUSHROOM, "plant", templates=["a photo"], steps=1)
    textinv.invert(model, MUSHROOM, "plant", templates=["{} {braces}"], steps=1, batch_size=1)


@pytest.mark.parametrize("rate, factor", [("base", 1), ("high", 4), ("low", 0.02)])
def test_named_learning_rates_are_the_papers_multiples(model, rate, factor):
    base = model.defaults["lr"]
    assert textinv.hyperparameters(model, None, None, rate)[2] == pytest.approx(base * factor)
    assert textinv.PAPER["lr"] * factor == pytest.approx({1: 5e-3, 4: 2e-2, 0.02: 1e-4}[factor])


def test_fp16_keeps_the_gradient():
    """That of the loss by the prediction is near fp16's smallest numbers, and is scaled up: without
    that the cosine is 0.999996."""
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        model = textinv.load_model(device="cpu", dtype=dtype)
        state = next(textinv.train(model, MUSHROOM, "plant", steps=1, batch_size=8))
        gradients[dtype] = state.concept.vectors.grad
    a, b = gradients.values()
    assert torch.cosine_similarity(a, b).item() > 0.999999
    assert (b.norm() / a.norm()).item() == pytest.approx(1, abs=1e-3)  # 2e-4 on some processors


@pytest.mark.parametrize("part", ["text encoder", "UNet", "autoencoder"])
def test_nan_stops_at_once_and_names_the_part(part):
    model = textinv.load_model(device="cpu", dtype=torch.float32)
    broken = {
        "text encoder": model.text_encoder.transformer.norm.weight,
        "UNet": model.unet.out[2].bias,
        "autoencoder": model.autoencoder.quant_conv.bias,
    }[part]
    state = None
    with pytest.raises(textinv.NotFinite, match=f"the {part} gave NaN or infinity"):
        for state in textinv.train(model, MUSHROOM, "plant", steps=3, batch_size=1):
            kept = state.concept.vectors.detach().clone()
            broken.data[0] = torch.nan
        broken.data[0] = torch.nan
        for state in textinv.train(model, MUSHROOM, "plant", steps=1, batch_size=1):
            pass
    assert torch.equal(state.concept.vectors, kept) and kept.isfinite().all()


def test_a_state_of_other_vectors_is_refused_and_so_is_a_run_that_is_done(model):
    options = dict(steps=1, batch_size=1)
    saved = next(textinv.train(model, MUSHROOM, "plant", vectors=2, **options)).tensors()
    with pytest.raises(ValueError, match="vectors of other shapes"):
        textinv.train(model, MUSHROOM, "plant", **options, resume=saved)
    with pytest.raises(ValueError, match="the run is over after 1 steps"):
        textinv.train(model, MUSHROOM, "plant", vectors=2, **options, resume=saved)


def test_a_word_that_no_prompt_shows_is_refused(model):
    for template in ("two {}s", "cat " * 30 + "{}"):
        with pytest.raises(ValueError, match="is not read in"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            textinv.train(model, MUSHROOM, "plant", placeholder="my-m", templates=[template])
    with pytest.raises(ValueError, match="no tokens that this model knows"):
        textinv.train(model, MUSHROOM, "\N{SNOWMAN}")


def test_nan_in_a_picture_is_no_black_picture(model):
    with pytest.raises(textinv.NotFinite, match="weaker guidance"):
        textinv.sample(model, "a cat", steps=2, guidance_scale=1e38)


def test_long_prompts_are_cut_and_it_is_said(model):
    with pytest.warns(UserWarning, match="has 40 tokens, only the first 22 are read"):
        textinv.sample(model, "cat " * 40, steps=1)


def test_same_seed_same_word_and_global_state_untouched(model):
    state = torch.random.get_rng_state()
    a, b, c = (
        textinv.invert(model, MUSHROOM, "plant", steps=2, batch_size=2, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(a.vectors, b.vectors) and not torch.equal(a.vectors, c.vectors)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gradient_checkpointing_gives_the_same_word(model):
    a, b = (
        textinv.invert(model, MUSHROOM, "plant", steps=2, batch_size=2, gradient_checkpointing=g)
        for g in (False, True)
    )
    torch.testing.assert_close(a.vectors, b.vectors, rtol=0, atol=1e-5)
    assert not model.unet.gradient_checkpointing


def test_concept_round_trip_and_no_silent_overwrite(model, tmp_path):
    concept = textinv.invert(model, MUSHROOM, "plant", steps=1, batch_size=2, placeholder="<Mü>")
    path = tmp_path / "word.safetensors"
    concept.save(path)
    again = textinv.load_concept(path)
    assert again.placeholder == "<Mü>" and torch.equal(again.vectors, concept.vectors)
    assert again.metadata["init_word"] == "plant" and again.metadata["steps"] == "1"
    assert again.metadata["base_model_hash"] == model.fingerprint
    assert list(load_file(path)) == ["<Mü>"]  # the layout that diffusers reads
    with pytest.raises(ValueError, match="--overwrite"):
        concept.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["word.safetensors"]


@pytest.mark.parametrize("placeholder", ["", "a cat", "apple"])
def test_unusable_placeholders_are_refused(model, placeholder):
    with pytest.raises(ValueError, match="placeholder"):
        textinv.invert(model, MUSHROOM, "plant", placeholder=placeholder, steps=1)


@pytest.mark.parametrize(
    "option",
    [
        dict(steps=0),
        dict(lr=-1.0),
        dict(lr=float("nan")),
        dict(lr="fast"),
        dict(batch_size=0),
        dict(vectors=0),
        dict(seed=-1),
        dict(regularize=-1.0),
        dict(weight_decay=float("inf")),
    ],
)
def test_unusable_numbers_are_refused(model, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        textinv.invert(model, MUSHROOM, "plant", **option)


@pytest.mark.parametrize("option", [dict(n=0), dict(batch_size=-1), dict(eta=2), dict(seed=-1)])
def test_unusable_numbers_are_not_sampled(model, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        textinv.sample(model, "a cat", **option)


@pytest.mark.parametrize("sampler, eta", (("dpm++", 0), ("dpm++", 1), ("ddim", 0), ("ddim", 1)))
def test_a_picture_depends_on_its_own_seed_only(model, sampler, eta):
    given = dict(sampler=sampler, eta=eta, steps=3)
    alone = textinv.sample(model, "a photo of an apple", seed=5, **given)
    among = textinv.sample(model, ["a cat", "a photo of an apple"], n=3, seed=4, **given)
    difference = np.abs(np.asarray(alone[0], int) - np.asarray(among[4], int))
    assert difference.max() <= 1
    assert len(among) == 6 and alone[0].size == (64, 64)


def test_the_samplers_have_their_numbers_of_steps(model):
    for sampler, steps in (("dpm++", 14), ("ddim", 50)):
        drawn = [textinv.sample(model, "a cat", sampler=sampler, steps=s) for s in (None, steps)]
        assert drawn[0][0].tobytes() == drawn[1][0].tobytes()
    with pytest.raises(ValueError, match=r"sampler 'euler' is not known; use dpm\+\+, ddim"):
        textinv.sample(model, "a cat", sampler="euler")


def test_words_of_another_width_or_twice_the_same_are_refused(model):
    wide = textinv.Concept("<w>", torch.zeros(1, 768))
    with pytest.raises(ValueError, match="768"):
        textinv.sample(model, "a <w>", [wide], steps=1)
    word = textinv.Concept("<w>", torch.zeros(1, 192))
    with pytest.raises(ValueError, match="two words.*--rename"):
        textinv.sample(model, "a <w>", [word, word], steps=1)
    with pytest.raises(ValueError, match="ordinary word.*--rename"):
        textinv.sample(model, "a cat", [textinv.Concept("cat", word.vectors)], steps=1)


def test_a_word_that_is_cut_in_two_is_refused(model):
    """Its last vectors would never be read."""
    room = model.tokenizer.max_length - 2
    template = " ".join(["a"] * (room - 2)) + " {}"
    textinv.train(model, MUSHROOM, "plant", vectors=2, templates=[template])
    with pytest.raises(ValueError, match="not all of it fits"):
        textinv.train(model, MUSHROOM, "plant", vectors=3, templates=[template])


def test_a_masked_loss_is_the_mean_of_the_pictures_weighted_means(model, tmp_path):
    """Against a loop over the pictures of a batch; half of the views are mirrored."""
    for i, box in enumerate(((0, 0, 20, 64), (13, 7, 64, 30))):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(200, box)
        Image.effect_noise((64, 64), 99).convert("RGB").save(tmp_path / f"{i}.jpg")
        mask.save(tmp_path / f"{i}.mask.png")
    pixels = textinv.prepare_images(tmp_path, 64, masked=True)
    *_, weights = textinv.training_set(model, pixels, flip=True)
    assert torch.equal(weights[2:], weights[:2].flip(-1))
    side = weights.shape[-1]
    area = np.asarray(mask, float).reshape(side, 64 // side, side, -1).mean((1, 3))
    assert np.allclose(weights[1, 0].numpy(), area / area.mean(), atol=1e-5)

    seen, loss = [], textinv.diffusion_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textinv, "diffusion_loss", lambda *args: seen.append(args) or loss(*args))
        state = next(textinv.train(model, tmp_path, "plant", batch_size=4, steps=1, masked=True))
    ((_, latents, context, t, noise, used),) = seen
    x_t = model.schedule.q_sample(latents, t, noise)
    with torch.no_grad():
        error = (model.unet(x_t, t, context) - model.schedule.target(latents, t, noise)) ** 2
    means = [(e * w).sum() / (w.sum() * len(e)) for e, w in zip(error, used)]
    assert all(any(torch.equal(w, known) for known in weights) for w in used)
    assert state.loss.item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)


def test_a_white_mask_changes_nothing(model, tmp_path):
    learn = dict(init_word="plant", steps=2, batch_size=2)
    Image.effect_noise((64, 64), 99).convert("RGB").save(tmp_path / "a.png")
    plain, mask = textinv.invert(model, tmp_path, **learn), Image.new("L", (64, 64), 255)
    for changes in (False, True):
        mask.save(tmp_path / "a.mask.png")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no picture has a mask
            found = textinv.invert(model, tmp_path, masked=True, **learn)
        assert torch.equal(found.vectors, plain.vectors) is not changes
        mask.paste(0, (0, 0, 32, 64))


# ------------------------------------------------------------------------------ early stopping


def converged_after(losses) -> int | None:
    """After how many of the losses training has converged."""
    counts = range(1, len(losses) + 1)
    return next((n for n in counts if textinv.converged(losses[:n])), None)


def test_it_converges_when_the_last_losses_vary_little_beside_all():
    falling, window = [1 / n for n in range(1, 200)], runs.STOP_WINDOW
    ratios = [
        np.var(falling[n - window : n], ddof=1) / np.var(falling[:n], ddof=1)
        for n in range(window, 200)
    ]
    first = next(i for i, ratio in enumerate(ratios) if ratio < runs.STOP_SHARE)
    assert converged_after(falling) == first + window


def test_it_does_not_converge_where_the_loss_only_wavers_or_is_too_short():
    window = runs.STOP_WINDOW
    assert converged_after([0.3, 0.31] * 50) is None
    assert converged_after([1.0, *[0.5] * (window - 2)]) is None
    assert converged_after([1.0, *[0.5] * window]) == window + 1


STOPPING = dict(init_word="plant", batch_size=2, steps=40, stop="auto")


@pytest.fixture
def soon(monkeypatch):
    for name, value in dict(STOP_EVERY=2, STOP_WINDOW=3, STOP_SHARE=0.9).items():
        monkeypatch.setattr(textinv if name == "STOP_EVERY" else runs, name, value)


def test_training_ends_early_with_the_best_vectors(model, soon):
    seen = {}
    for state in textinv.train(model, MUSHROOM, **STOPPING):
        if state.step % 2 == 0:
            seen[state.fixed_loss] = state.concept.vectors.detach().clone()
        else:
            assert state.fixed_loss is None
    assert 6 <= state.step < 40 and state.over
    assert list(seen) == state.fixed_losses
    *_, last = seen.values()  # of the step that converged: the best vectors are back in place
    best = min(seen)
    if best != state.fixed_losses[-1]:
        assert torch.equal(last, seen[best])
    assert torch.equal(state.concept.vectors, state.best[0])


def test_interrupted_it_ends_at_the_same_step_with_the_same_bits(model, soon):
    *_, whole = textinv.train(model, MUSHROOM, **STOPPING)
    states = textinv.train(model, MUSHROOM, **STOPPING)
    saved = [next(states).tensors() for _ in range(5)][-1]
    *_, parts = textinv.train(model, MUSHROOM, **STOPPING, resume=saved)
    assert parts.step == whole.step and parts.fixed_losses == whole.fixed_losses
    assert torch.equal(parts.concept.vectors, whole.concept.vectors)
    with pytest.raises(ValueError, match="the run is over after"):
        textinv.train(model, MUSHROOM, **STOPPING, resume=whole.tensors())


def test_unknown_rules_and_progressive_training_are_refused(model):
    with pytest.raises(ValueError, match="stop 'soon' is not known; use never, auto"):
        textinv.train(model, MUSHROOM, "plant", stop="soon")
    with pytest.raises(ValueError, match="needs 3 vectors and no early stopping"):
        textinv.train(model, MUSHROOM, "plant", vectors=3, progressive=True, stop="auto")


def test_the_command_line_says_when_it_ended(tmp_path, capsys, soon):
    out = tmp_path / "m.safetensors"
    pictures = str(ROOT / "examples" / "concepts" / "mushroom")
    command = ["invert", pictures, "--init-word", "plant", "--device", "cpu", "--out", str(out)]
    command += ["--batch-size", "2", "--steps", "40", "--preview-every", "0", "--stop", "auto"]
    assert textinv.main(command) == 0
    said = capsys.readouterr().out
    steps = int(textinv.load_concept(out).metadata["steps"])
    assert steps < 40 and f"converged after {steps} of 40 steps" in said and "wrote" in said
    before = out.read_bytes()
    assert textinv.main([*command, "--resume"]) == 0
    assert f"the run is over after {steps} steps" in capsys.readouterr().out
    assert out.read_bytes() == before


# ---------------------------------------------------------------------------- the same bits


BITS = """
import hashlib, sys, torch, textinv
model = textinv.load_model(device="cpu")
for _ in range(2):
    states = textinv.train(model, sys.argv[1], "animal", steps=8, seed=3)
    vectors = [state.concept.vectors.detach().numpy().tobytes() for state in states]
    print(hashlib.sha256(b"".join(vectors)).hexdigest())
"""


def test_the_same_seed_gives_the_same_bits_with_default_threads():
    """In two processes, twice in each, with as many threads as torch takes by itself."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # else the two wait for each other for minutes
    command = [sys.executable, "-c", BITS, str(MUSHROOM)]
    options = dict(cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    runs = [subprocess.Popen(command, **options) for _ in range(2)]
    hashes = [line for run in runs for line in run.communicate()[0].split()]
    assert len(hashes) == 4 and len(set(hashes)) == 1, hashes


def test_nothing_in_the_gradients_path_adds_up_in_any_order(model):
    """The backward pass of indexing by a tensor does, with several threads; torch knows which."""
    torch.use_deterministic_algorithms(True)
    try:
        word = textinv.Concept("<s>", textinv.initial_vectors(model, "plant", 2).requires_grad_())
        ids = torch.tensor([[1, model.tokenizer.vocab_size, model.tokenizer.vocab_size + 1]])
        graph = model.embed(ids, word.vectors).grad_fn
        context = model.encode_text(["a <s>", "two <s>", "a <s>"], [word])
    finally:
        torch.use_deterministic_algorithms(False)
    rest, names = [graph, context.grad_fn], set()
    while rest:
        node = rest.pop()
        names.add(node.name())
        rest += [parent for parent, _ in node.next_functions if parent is not None]
    assert "EmbeddingBackward0" in names and not any(n.startswith("IndexBackward") for n in names)


# ------------------------------------------------------------------------------- other devices


def test_another_device_gives_the_same_word_and_pictures(model):
    common = dict(placeholder="<s>", batch_size=2)

    def work(model):
        learnt = [
            textinv.invert(model, MUSHROOM, "plant", steps=steps, **common, **options)
            for steps, options in (
                (11, dict(stop="auto")),
                (3, dict(progressive=True, vectors=3, weight_decay=0.1)),
                (3, dict(per_image=True, gradient_checkpointing=True, regularize=0.1)),
            )
        ]
        drawn = textinv.sample(model, "a (photo:1.2) of a <s>", learnt[:1], n=2, steps=3, eta=1.0)
        return [word.vectors.cpu() for word in learnt], drawn

    words, pictures = work(model)
    with elsewhere():
        far_words, far_pictures = work(textinv.load_model(dtype=torch.float32))
    for word, far in zip(words, far_words):
        assert_close_std(far, word, EXACT)
    for picture, far in zip(pictures, far_pictures):
        assert np.abs(np.asarray(picture, float) - np.asarray(far, float)).max() <= 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    "file",
    ("ldm/model.ckpt", "sd1/model.ckpt", "sd2/model.safetensors", "sdxl/model.safetensors"),
)
def test_every_family_works_on_another_device(file, dtype):
    with elsewhere():
        model = textinv.load_model(GOLDEN / "tiny" / file, dtype=dtype)
        model.size = 64
        word = textinv.invert(model, MUSHROOM, "a", placeholder="<s>", steps=1, batch_size=1)
        assert model.device.type == word.vectors.device.type == "meta" and model.dtype == dtype
        (picture,) = textinv.sample(model, "a (dark:0.9) <s>", [word], steps=1, size=64)
    assert picture.size == (64, 64)


def test_a_run_on_another_device_is_resumed_there_and_here(model):
    options = dict(init_word="plant", steps=4, batch_size=2, stop="auto")
    *_, end = textinv.train(model, MUSHROOM, **options)
    with elsewhere():
        far = textinv.load_model(dtype=torch.float32)
        states = textinv.train(far, MUSHROOM, **options)
        saved = [next(states).tensors() for _ in range(2)][-1]
        *_, there = textinv.train(far, MUSHROOM, resume=saved, **options)
        there = there.concept.vectors.detach().cpu()
    *_, here = textinv.train(model, MUSHROOM, resume=saved, **options)
    assert_close_std(there, end.concept.vectors.detach(), EXACT)
    assert_close_std(here.concept.vectors, end.concept.vectors.detach(), EXACT)


def test_every_verb_on_another_device(tmp_path, capsys):
    word, out = str(tmp_path / "m.safetensors"), ["--out", str(tmp_path / "1.png")]
    few = ["--steps", "2", "-n", "2"]
    with elsewhere():
        for verb in (
            ["invert", str(MUSHROOM), "--init-word", "plant", "--steps", "2", "--out", word],
            ["sample", "a <m>", "--concept", word, *few, *out],
            ["show", "--word", word],
        ):
            assert textinv.main(verb) == 0, verb
    assert "on meta" in capsys.readouterr().out


# -------------------------------------------------------------------------------- from Python


def test_invert_shows_its_progress_and_names_the_word_after_the_folder(model, capsys):
    word = textinv.invert(model, MUSHROOM, "plant", steps=2, batch_size=1, progress=True)
    assert "2/2" in capsys.readouterr().err and word.placeholder == "<mushroom>"
    pictures = sorted(MUSHROOM.glob("*.png"))
    word = textinv.invert(model, pictures, "plant", steps=1, batch_size=1)
    assert capsys.readouterr().err == "" and word.placeholder == "<s>"


def test_training_works_where_gradients_are_disabled(model):
    given = dict(init_word="plant", steps=2, batch_size=1)
    expected = textinv.invert(model, MUSHROOM, **given)
    torch.set_grad_enabled(False)  # as at the top of many notebooks
    try:
        word = textinv.invert(model, MUSHROOM, **given)
    finally:
        torch.set_grad_enabled(True)
    assert torch.equal(word.vectors, expected.vectors)


def test_the_name_that_words_remember_loads_the_bundled_model(model):
    word = textinv.invert(model, MUSHROOM, "plant", steps=1, batch_size=1)
    again = textinv.load_model(word.metadata["base_model"], "cpu")
    assert again.fingerprint == model.fingerprint


def test_words_can_be_found_in_lists_and_sets():
    one, two = (textinv.Concept("<a>", torch.ones(1, 2)) for _ in range(2))
    assert one in [two, one] and one not in [two] and len({one, two}) == 2


def test_sampling_shows_its_progress_if_asked(model, capsys):
    for progress in (False, True):
        textinv.sample(model, "a cat", steps=2, seed=np.int64(3), progress=progress)
        assert ("step/s" in capsys.readouterr().err) == progress


def test_a_word_prints_short():
    assert len(repr(textinv.Concept("<cat>", torch.zeros(3, 768), {"templates": "x" * 999}))) < 100
