"""Two real processes under torchrun, over gloo, beside one."""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import textinv
from models.parallel import shared_out

ROOT = Path(__file__).resolve().parent.parent
MUSHROOM = str(ROOT / "examples" / "concepts" / "mushroom")


def run(folder: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """The command by itself, or by torchrun; one thread each, for two round otherwise than one."""
    folder.mkdir(exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "textinv.py")]
    return subprocess.run(
        [*command, *arguments, "--device", "cpu"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("options", [[], ["--regularize", "0.01", "--vectors", "2"]])
def test_two_processes_learn_the_word_that_one_does(tmp_path, options):
    """Batches of 3, so that the shares are unequal; the same total batch, loss and table."""
    learn = ["invert", MUSHROOM, "--init-word", "plant", "--steps", "4", "--batch-size", "3"]
    words, losses = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = run(folder, processes, *learn, *options, "--preview-every", "2")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote mushroom.safetensors") == 1
        words.append(textinv.load_concept(folder / "mushroom.safetensors").vectors)
        rows = csv.DictReader((folder / "mushroom.csv").read_text().splitlines())
        losses.append([float(row["loss"]) for row in rows])
    assert (words[0] - words[1]).abs().max() < 1e-5
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-6)
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("1", "2")]
    assert names[0] == names[1]


def test_two_processes_draw_and_measure_what_one_does(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("background: A photo of {} at night\nstyle: A sketch of {}\n")
    pictures, tables = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        draw = ["sample", "a cat", "a dog", "a bear", "-n", "1", "--steps", "2"]
        done = run(folder, processes, *draw, "--singles", "all")
        assert done.returncode == 0, done.stderr
        pictures.append([np.asarray(Image.open(p)) for p in sorted((folder / "all").iterdir())])
        measure = ["evaluate", "--references", "--images", MUSHROOM, "--prompts", str(prompts)]
        done = run(folder, processes, *measure, "-n", "2", "--steps", "2")
        assert done.returncode == 0, done.stderr
        tables.append((folder / "scores.csv").read_text())
    assert len(pictures[0]) == 3 and np.array_equal(pictures[0], pictures[1])
    assert tables[0] == tables[1]


def process_of(rank: int, parent: int) -> int | None:
    """The number of torchrun's child that has this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            status = (path / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and f"RANK={rank}" in (path / "environ").read_text().split(
                "\0"
            ):
                return int(path.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_an_interrupted_process_stops_them_all_and_the_word_is_saved(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "textinv.py"), "invert", MUSHROOM, "--init-word", "plant"]
    command += ["--steps", "5000", "--batch-size", "2", "--save-every", "5", "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    running = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    while not (tmp_path / "mushroom.safetensors").exists() and running.poll() is None:
        time.sleep(0.05)
    os.kill(process_of(1, running.pid), signal.SIGINT)
    text = running.communicate(timeout=120)[0]
    assert "stopped; the word so far is in mushroom.safetensors" in text
    assert "torchrun --nproc-per-node 2" in text
    step = int(textinv.load_concept(tmp_path / "mushroom.safetensors").metadata["steps"])
    assert (tmp_path / "mushroom.csv").read_text().splitlines()[-1].startswith(f"{step},")


def test_a_mistake_is_said_once(tmp_path):
    done = run(tmp_path, 2, "invert", MUSHROOM, "--init-word", "plant", "--batch-size", "1")
    assert done.returncode != 0
    assert done.stderr.count("textinv: a batch of 1 is too small to split among 2") == 1
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".safetensors"]


def test_one_process_does_everything_in_order():
    assert list(shared_out([3, 1, 2], lambda x: 10 * x)) == [30, 10, 20]
