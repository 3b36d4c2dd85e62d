"""Training that stops by itself: the rule, the fixed loss, and runs that are interrupted."""

import numpy as np
import pytest
import torch
from test_textinv import MUSHROOM, ROOT, model  # noqa: F401  a fixture

import textinv
from models.stopping import Watch


def fed(losses) -> int | None:
    """After how many of the losses a watch says that it is over; every loss has its own vectors."""
    watch, vectors = Watch(), torch.zeros(1, 2)
    for i, loss in enumerate(losses, 1):
        vectors.fill_(loss)
        watch.look(loss, [vectors])
        if watch.steady():
            assert vectors.unique().item() == pytest.approx(min(losses[:i]))
            return i
    return None


def test_it_ends_when_the_last_window_varies_little_beside_all():
    falling = [1 / n for n in range(1, 200)]
    end = fed(falling)
    variances = [
        np.var(falling[n - Watch.WINDOW : n], ddof=1) / np.var(falling[:n], ddof=1)
        for n in range(Watch.WINDOW, 200)
    ]
    first = next(i for i, ratio in enumerate(variances) if ratio < Watch.SHARE)
    assert end == first + Watch.WINDOW


def test_it_does_not_end_where_the_loss_only_wavers_or_is_too_short():
    assert fed([0.3, 0.31] * 50) is None
    assert fed([1.0, *[0.5] * (Watch.WINDOW - 2)]) is None
    assert fed([1.0, *[0.5] * Watch.WINDOW]) == Watch.WINDOW + 1


def test_it_goes_on_from_what_it_was():
    watch = Watch()
    for loss in (3.0, 1.0, 2.0):
        watch.look(loss, [torch.full((1, 2), loss), torch.full((1, 2), -loss)])
    again = Watch.of({key: tensor.clone() for key, tensor in watch.tensors().items()})
    assert again.losses == watch.losses
    assert [v.unique().item() for v in again.best] == [1.0, -1.0]
    assert Watch.of({"step": torch.tensor(3)}).losses == []


def test_the_fixed_loss_depends_on_the_word_alone(model):  # noqa: F811
    word = textinv.Concept("<m>", textinv.initial_vectors(model, "plant", 1))
    lesson = textinv.prepare(model, word, MUSHROOM, ["a photo of {}"], True, False, 4, 0)
    before = [lesson.fixed_loss() for _ in range(2)]
    assert before[0] == before[1]
    word.vectors.mul_(torch.linspace(0, 2, word.vectors.shape[1]))
    assert lesson.fixed_loss() != before[0]


OPTIONS = dict(init_word="plant", batch_size=2, steps=40, stop="auto")


@pytest.fixture
def soon(monkeypatch):
    for name, value in dict(EVERY=2, WINDOW=3, SHARE=0.9).items():
        monkeypatch.setattr(Watch, name, value)


def test_training_ends_early_with_the_best_vectors(model, soon):  # noqa: F811
    losses = {}
    for state in textinv.train(model, MUSHROOM, **OPTIONS):
        if state.step % 2 == 0:
            losses[state.step] = state.watch.losses[-1]
    assert 6 <= state.step < 40 and state.watch.steady()
    lesson = textinv.prepare(
        model, state.concept, MUSHROOM, textinv.OBJECT_TEMPLATES, True, False, 2, 0
    )
    assert lesson.fixed_loss() == pytest.approx(min(losses.values()), abs=1e-7)


def test_interrupted_it_ends_at_the_same_step_with_the_same_bits(model, soon):  # noqa: F811
    *_, whole = textinv.train(model, MUSHROOM, **OPTIONS)
    states = textinv.train(model, MUSHROOM, **OPTIONS)
    saved = [next(states).tensors() for _ in range(5)][-1]
    *_, parts = textinv.train(model, MUSHROOM, **OPTIONS, resume=saved)
    assert parts.step == whole.step
    assert torch.equal(parts.concept.vectors, whole.concept.vectors)
    with pytest.raises(ValueError, match="the run is over after"):
        textinv.train(model, MUSHROOM, **OPTIONS, resume=whole.tensors())


def test_unknown_rules_and_progressive_training_are_refused(model):  # noqa: F811
    with pytest.raises(ValueError, match="stop 'soon' is not known; use never, auto"):
        textinv.train(model, MUSHROOM, "plant", stop="soon")
    with pytest.raises(ValueError, match="not by stop 'auto'"):
        textinv.train(model, MUSHROOM, "plant", vectors=3, progressive=True, stop="auto")


def test_the_command_line_says_when_it_ended(tmp_path, capsys, soon):
    out = tmp_path / "m.safetensors"
    pictures = str(ROOT / "examples" / "concepts" / "mushroom")
    command = ["invert", pictures, "--init-word", "plant", "--device", "cpu", "--out", str(out)]
    command += ["--batch-size", "2", "--steps", "40", "--preview-every", "0", "--stop", "auto"]
    assert textinv.main(command) == 0
    said = capsys.readouterr().out
    steps = int(textinv.load_concept(out).metadata["steps"])
    assert steps < 40 and f"steady after {steps} of 40 steps" in said and "wrote" in said
    before = out.read_bytes()
    assert textinv.main([*command, "--resume"]) == 0
    assert f"the run is over after {steps} steps" in capsys.readouterr().out
    assert out.read_bytes() == before
