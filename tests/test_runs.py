"""Runs: no other files are lost, and a run that is killed goes on to the same bits."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import textinv
from models.runs import Run, interruptible

ROOT = Path(__file__).resolve().parent.parent
MUSHROOM = ROOT / "examples" / "concepts" / "mushroom"
LEARN = ["invert", str(MUSHROOM), "--init-word", "plant", "--device", "cpu"]
SMALL = ["--batch-size", "1", "--preview-every", "0", "--save-every", "3"]


def start(*arguments: str, **pipes) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "textinv.py", *LEARN, *SMALL, *arguments],
        **(pipes or dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)),
    )


def results(out: Path) -> tuple:
    """The word, and byte by byte table and state: vectors, optimizer, step."""
    word = textinv.load_concept(out)  # the header of a .safetensors has no order of its own
    files = (out.with_suffix(ending).read_bytes() for ending in (".csv", ".state"))
    return word.vectors.numpy().tobytes(), word.metadata, *files


def test_a_run_takes_no_other_files_place_and_goes_on_only_as_it_began(tmp_path):
    out = tmp_path / "cat.safetensors"
    for name in ("cat.csv", "cat.json", "cat.step-1-holiday.png"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="^cat.csv, cat.json: there already"):
        Run(out, {"lr": 1}).look(resume=False, overwrite=False)
    run = Run(out, {"lr": 1, "steps": 2})
    assert run.look(resume=False, overwrite=True) is None
    run.begin(anew=True)
    assert (tmp_path / "cat.step-1-holiday.png").read_text() == "mine"
    run.rows = [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": "0.4"}]
    run.write_state({"step": torch.tensor(1)})
    again = Run(out, {"lr": 1, "steps": 9})
    assert int(again.look(resume=True, overwrite=False)["step"]) == 1
    assert again.rows == run.rows[:1]
    again.begin(anew=False)
    assert json.loads((tmp_path / "cat.json").read_text())["steps"] == 9
    with pytest.raises(ValueError, match="began with lr 1, now it is 2"):
        Run(out, {"lr": 2}).look(resume=True, overwrite=False)
    with pytest.raises(ValueError, match="began with file 'cat.safetensors', now it is 'cat.pt'"):
        Run(tmp_path / "cat.pt", {"lr": 1}).look(resume=True, overwrite=False)  # another word
    (tmp_path / "cat.csv").rename(tmp_path / "moved.csv")
    with pytest.raises(ValueError, match="cat.csv: No such file or directory; .* put it back"):
        Run(out, {"lr": 1}).look(resume=True, overwrite=False)
    (tmp_path / "moved.csv").rename(tmp_path / "cat.csv")
    (tmp_path / "cat.state").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cat.state: .* start over"):
        Run(out, {"lr": 1}).look(resume=True, overwrite=False)
    Run(out, {"lr": 1}).begin(anew=True)
    assert Run(out, {"lr": 1}).look(resume=True, overwrite=False) is None


@pytest.mark.parametrize(
    "options", [[], ["--vectors", "2", "--regularize", "0.1"], ["--per-image"]]
)
def test_more_steps_later_equal_all_steps_at_once(tmp_path, options):
    whole, parts = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    options = [*LEARN, *SMALL, *options, "--placeholder", "<m>"]
    assert textinv.main([*options, "--steps", "7", "--out", str(whole)]) == 0
    assert textinv.main([*options, "--steps", "4", "--out", str(parts)]) == 0
    assert textinv.main([*options, "--steps", "7", "--out", str(parts), "--resume"]) == 0
    assert results(whole) == results(parts)


def step_of(out: Path) -> int:
    state = out.with_suffix(".state")
    return int(load_file(state)["step"]) if state.exists() else 0


def test_killed_at_random_moments_it_resumes_to_the_same_bits(tmp_path, full):
    """SIGKILL leaves no time to clean up. Each life begins with --resume, as a user would."""
    steps, kills = ("1500", 50) if full else ("300", 4)
    whole, parts = tmp_path / "whole" / "m.safetensors", tmp_path / "parts" / "m.safetensors"
    assert start("--steps", steps, "--out", str(whole)).wait() == 0
    draw, reached = random.Random(0), []
    for life in range(kills):
        before, began = step_of(parts), time.time()
        process = start("--steps", steps, "--out", str(parts), "--resume")
        settings = parts.with_suffix(".json")
        while process.poll() is None:  # every second life reaches a state of its own
            begun = settings.exists() and settings.stat().st_mtime > began
            if begun and (life % 2 == 0 or step_of(parts) > before):
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        for word in parts.parent.glob("*.safetensors"):
            assert textinv.load_concept(word).vectors.isfinite().all()
        reached.append(step_of(parts))
    assert reached == sorted(reached) and 0 < reached[1] < int(steps)
    assert start("--steps", steps, "--out", str(parts), "--resume").wait() == 0
    assert results(whole) == results(parts)
    assert not list(parts.parent.glob(".*"))  # what the killed left is gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, number):
    out = tmp_path / "m.safetensors"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = start("--steps", "5000", "--out", str(out), **pipes)
    while not out.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    text = process.communicate()[0]
    assert "stopping after this step" in text
    assert process.returncode == 130
    assert re.search(r"continue with: python \S+ invert --resume ", text)  # before any "--"
    step = int(textinv.load_concept(out).metadata["steps"])
    assert 3 <= step < 5000
    rows = out.with_suffix(".csv").read_text().splitlines()
    assert rows[-1].startswith(f"{step},")


def test_a_run_that_breaks_within_a_step_keeps_what_was_saved_before(tmp_path):
    """The vectors already belong to the step that broke, so with them it would be done twice."""
    out = tmp_path / "cat.safetensors"
    model = textinv.load_model(device="cpu")

    def states(resume=None, on_gradients=None):
        options = dict(init_word="plant", placeholder="<cat>", steps=12, batch_size=1, stop="auto")
        return textinv.train(model, MUSHROOM, **options, resume=resume, on_gradients=on_gradients)

    def broken(loss, gradients):
        if not gradients:  # the loss on fixed batches, which follows step 10
            raise KeyboardInterrupt

    run = Run(out, {"steps": 12})
    with pytest.raises(KeyboardInterrupt):
        run.follow(states(on_gradients=broken), 4, 0, None)
    assert textinv.load_concept(out).metadata["steps"] == "8"
    (*_, last) = states(resume=load_file(tmp_path / "cat.state"))
    (*_, whole) = states()
    assert last.step == whole.step == 12
    assert torch.equal(last.concept.vectors, whole.concept.vectors)


def test_a_second_ctrl_c_does_not_wait():
    with interruptible() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_run_goes_on_when_its_checkpoint_was_renamed(tmp_path):
    """Under another name, and in the other layout; another model is refused."""
    golden, out = ROOT / "tests" / "golden" / "tiny", str(tmp_path / "m.safetensors")
    renamed = tmp_path / "other.safetensors"
    for path in (golden / "sd2").glob("*.*"):
        shutil.copy(path, tmp_path / path.name.replace("model", "other"))
    learn = ["invert", str(MUSHROOM), "--init-word", "a", "--device", "cpu", *SMALL, "--out", out]
    learn += ["--size", "64", "--prediction", "v", "--steps"]
    for steps, model in enumerate((golden / "sd2" / "model.safetensors", renamed), 1):
        assert textinv.main([*learn, str(steps), "--model", str(model), "--resume"]) == 0
        assert textinv.load_concept(out).metadata["steps"] == str(steps)
    assert textinv.main([*learn, "3", "--model", str(golden / "sd2/diffusers"), "--resume"]) == 0
    other = str(golden / "sd1" / "model.ckpt")
    assert textinv.main([*learn, "4", "--model", other, "--resume"]) == 2
