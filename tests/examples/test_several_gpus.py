"""examples/several_gpus.py in two real processes under torchrun, over gloo, beside one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import textinv
from models.images import grid

ROOT = Path(__file__).resolve().parents[2]
MUSHROOM = ROOT / "examples" / "concepts" / "mushroom"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SCRIPT = str(ROOT / "examples" / "several_gpus.py")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # another number rounds differently


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """The command in two processes, started in that folder."""
    command = [*TORCHRUN, SCRIPT, *map(str, arguments), "--device", "cpu"]
    options = dict(cwd=folder, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    return subprocess.run(command, **options)


@pytest.fixture(scope="module")
def model() -> textinv.LatentDiffusion:
    return textinv.load_model(device="cpu")


def test_two_processes_learn_the_word_that_one_does(model, tmp_path):
    """Batches of 3, so that the shares are unequal; the same total batch, penalty and seed."""
    learn = ["invert", MUSHROOM, "--init-word", "plant", "--steps", "4", "--batch-size", "3"]
    done = run(tmp_path, *learn, "--regularize", "0.01", "--vectors", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote mushroom.safetensors") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mushroom.safetensors"]
    two = textinv.load_concept(tmp_path / "mushroom.safetensors")
    options = dict(placeholder="<mushroom>", steps=4, batch_size=3, regularize=0.01, vectors=2)
    one = textinv.invert(model, MUSHROOM, "plant", **options)
    assert (one.vectors - two.vectors).abs().max() < 1e-5
    assert two.placeholder == "<mushroom>"
    assert two.metadata == one.metadata


def test_the_shares_of_a_batch_add_up_to_its_loss_and_gradient(model):
    """What `sum_over_processes` relies on: unequal shares, of the penalty too."""
    found = []
    for share in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        keep = lambda loss, gradients: found.append([x.clone() for x in (loss, *gradients)])
        options = dict(steps=1, batch_size=3, regularize=0.1, share=share, on_gradients=keep)
        list(textinv.train(model, MUSHROOM, "plant", **options))
    for whole, *shares in zip(*found):
        torch.testing.assert_close(shares[0] + shares[1], whole)


def test_two_processes_draw_what_one_does(model, tmp_path):
    prompts = ["a cat", "a dog", "a bear"]
    done = run(tmp_path, "sample", *prompts, "-n", "2", "--steps", "2")
    assert done.returncode == 0, done.stderr
    drawn = [textinv.sample(model, prompt, n=2, steps=2) for prompt in prompts]
    wanted = grid([picture for row in drawn for picture in row], columns=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(wanted))


def process_of(rank: int, parent: int) -> int | None:
    """The id of torchrun's child that has this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            status = (path / "stat").read_text().rpartition(")")[2].split()
            settings = (path / "environ").read_text().split("\0")
            if int(status[1]) == parent and f"RANK={rank}" in settings:
                return int(path.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_an_interrupted_process_stops_them_all_and_the_word_is_saved(tmp_path):
    command = [*TORCHRUN, SCRIPT, "invert", str(MUSHROOM), "--init-word", "plant"]
    command += ["--steps", "5000", "--batch-size", "2", "--save-every", "5", "--device", "cpu"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    running = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, **pipes)
    while not (tmp_path / "mushroom.safetensors").exists() and running.poll() is None:
        time.sleep(0.05)
    os.kill(process_of(1, running.pid), signal.SIGINT)
    text = running.communicate(timeout=120)[0]
    step = textinv.load_concept(tmp_path / "mushroom.safetensors").metadata["steps"]
    assert f"stopped after {step} steps; wrote mushroom.safetensors" in text


def test_a_mistake_is_said_once(tmp_path):
    done = run(tmp_path, "invert", MUSHROOM, "--init-word", "plant", "--batch-size", "1")
    assert done.returncode != 0
    assert done.stderr.count("textinv: a batch of 1 is too small to split among 2") == 1
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]


def test_without_torchrun_it_says_how_to_start_it(tmp_path):
    command = [sys.executable, SCRIPT, "sample", "a cat"]
    done = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 2 and "torchrun --nproc-per-node" in done.stderr
