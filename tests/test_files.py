"""Files: what other programs wrote is read, nothing in a file runs, writing is all or nothing."""

import functools
import io
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import timeit
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.concepts import load_concepts
from models.files import CheckpointError, checking, open_state, write_file

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half()}


def same(state: dict[str, Tensor]) -> bool:
    return state.keys() == STATE.keys() and all(
        torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in STATE.items()
    )


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_state(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 700
    return message


# ------------------------------------------------------------------------------- what is read


class Callback:
    """As a class, a key of Lightning's table of callbacks."""


class Settings:
    """As omegaconf's, with a state of its own making."""

    def __getstate__(self):
        return {"content": {"lr": 1e-4}, "flags": [1, 2]}

    def __setstate__(self, state):
        raise AssertionError("code of a class has run")


def lightning() -> dict:
    return {
        "epoch": 3,
        "state_dict": OrderedDict(STATE),
        "callbacks": {Callback: {"best_model_score": np.float64(0.5), "path": Path("a")}},
        "hyper_parameters": Settings(),
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}}],
        "random": np.random.default_rng(0).bit_generator.state["state"]["state"],
        "array": np.arange(3),
    }


def test_formats(tmp_path):
    path = tmp_path / "model.ckpt"
    flat = torch.cat([v.float().flatten() for v in STATE.values()])
    views = {"a.weight": flat[:6].view(2, 3), "a.bias": STATE["a.bias"]}
    parameters = {k: nn.Parameter(v) for k, v in STATE.items()}
    for content in (
        STATE,
        {"state_dict": STATE},
        OrderedDict(STATE),
        views,
        parameters,
        lightning(),
    ):
        torch.save(content, path)
        state = open_state(path)
        assert same(state) and not any(v.requires_grad for v in state.values())
    for content in (STATE, {"state_dict": parameters}):
        torch.save(content, path, _use_new_zipfile_serialization=False)
        assert same(open_state(path))  # as torch before 1.6 wrote it


@pytest.mark.parametrize("name", ("model.ckpt", "model.safetensors"))
def test_the_content_decides_not_the_name(name, tmp_path):
    path = tmp_path / name
    torch.save(lightning(), path)
    assert same(open_state(path))
    save_file(STATE, path)
    assert same(open_state(path))


def test_compressed_archive(tmp_path):
    torch.save(STATE, tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a") as old:
        with zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    assert same(open_state(tmp_path / "b.ckpt"))


def test_torchscript(tmp_path):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = (nn.Parameter(v) for v in STATE.values())

        def forward(self, x):
            return x @ self.weight.T + 2.5

    outer = nn.Module()
    outer.a = Inner()
    outer.forward = lambda x: outer.a(x)
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(outer, torch.ones(1, 3), check_trace=False), path)
    assert same(open_state(path))


@pytest.mark.parametrize("suffix", (".ckpt", ".safetensors"))
def test_what_is_written_into_a_tensor_stays_in_memory(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    torch.save(STATE, path) if suffix == ".ckpt" else save_file(STATE, path)
    before = path.read_bytes()
    state = open_state(path)
    for tensor in state.values():
        tensor += 1
    assert torch.equal(state["a.weight"], STATE["a.weight"] + 1)
    assert path.read_bytes() == before and same(open_state(path))


@pytest.mark.parametrize("suffix", (".ckpt", ".safetensors"))
def test_a_replaced_file_keeps_its_tensors(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    torch.save(STATE, path) if suffix == ".ckpt" else save_file(STATE, path)
    state = open_state(path)
    write_file(path, bytes(path.stat().st_size), overwrite=True)
    assert same(state)
    path.unlink()
    assert same(state)


def test_tensors_that_are_no_weights_are_left_out(tmp_path):
    others = {"s": torch.eye(2).to_sparse(), 5: torch.ones(1), "n": 3, "t": [torch.ones(1)]}
    torch.save(STATE | others, tmp_path / "model.ckpt")
    assert same(open_state(tmp_path / "model.ckpt"))


# -------------------------------------------------------------------------------- what is refused


class Call:
    """Calls a function where it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(mark: Path) -> dict[str, object]:
    """What makes the file `mark` when pickle reads it."""
    code = f"open({str(mark)!r}, 'w')"
    script = mark.with_suffix(".py")
    script.write_text(code)
    system = Call(os.system, f"touch '{mark}'")
    return {
        "system": system,
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(mark), "w"),
        "mkdir": Call(os.mkdir, str(mark)),
        "method": Call(Path.touch, mark),
        "subprocess": Call(subprocess.call, ["touch", str(mark)]),
        "shutil": Call(shutil.copyfile, str(script), str(mark)),
        "runpy": Call(runpy.run_path, str(script)),
        "timeit": Call(timeit.timeit, code, "", timeit.default_timer, 1),
        "partial": Call(functools.partial(os.system, f"touch '{mark}'")),
        "nested": Call(pickle.loads, pickle.dumps(system)),
        "torch": Call(torch.save, 1, str(mark)),
    }


KINDS = "system eval exec open mkdir method subprocess shutil runpy timeit partial nested torch"
PLACES = {
    "all": lambda evil: evil,
    "beside": lambda evil: {"state_dict": STATE, "hyper_parameters": evil},
    "key": lambda evil: {"state_dict": STATE, "callbacks": {(evil, 1): [evil]}},
    "tensor": lambda evil: {"state_dict": STATE | {"b": evil}},
    "word": lambda evil: {"string_to_param": {"*": torch.ones(1, 4)}, "name": evil},
    "word's table": lambda evil: {"string_to_param": evil, "string_to_token": evil},
}


def archives(content: object) -> dict[str, bytes]:
    """Every container that a pickle comes in."""
    new, old, script = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(content, new)
    torch.save(content, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(script, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("archive/constants.pkl", pickle.dumps(content))
    files = {"zip": new, "before 1.6": old, "TorchScript": script}
    return {name: f.getvalue() for name, f in files.items()} | {"bare": pickle.dumps(content)}


def shown(path: Path) -> None:
    """The file loads or is refused in one line, as a checkpoint and as a word."""
    for read in (open_state, load_concepts):
        try:
            read(path)
        except CheckpointError as error:
            assert str(error).isprintable() and str(path) in str(error)


@pytest.mark.parametrize("kind", KINDS.split())
@pytest.mark.parametrize("place", PLACES)
def test_nothing_in_a_pickle_runs(kind, place, tmp_path):
    mark = tmp_path / "mark"
    content = PLACES[place](payloads(mark)[kind])
    for container, data in archives(content).items():
        for name in ("w.pt", "w.safetensors"):
            (tmp_path / name).write_bytes(data)
            shown(tmp_path / name)
            assert not mark.exists(), container
    with suppress(Exception):  # what becomes of the value does not matter
        pickle.loads(data)
    assert mark.exists(), "the file is not as hostile as it should be"


def test_hand_written_pickles(tmp_path):
    """Calls by any route, and tensors that are none, in a zip as torch.save writes it."""
    mark, path = tmp_path / "mark", tmp_path / "model.ckpt"
    call = f"(S\"touch '{mark}'\"\ntR.".encode()
    text = b"X" + struct.pack("<I", len(f"touch '{mark}'")) + f"touch '{mark}'".encode()
    programs = {
        "global": b"cos\nsystem\n" + call,
        "protocol 2": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "platform": b"\x80\x02cposix\nsystem\n" + text + b"\x85R.",
        "other platform": b"\x80\x02cnt\nsystem\n" + text + b"\x85R.",
        "through a module": b"\x80\x02cshutil\nos.system\n" + text + b"\x85R.",
        "builtins": b"c__builtin__\neval\n" + call,
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x0cos.path.join\x93.",
        "inst": f"(S\"touch '{mark}'\"\nios\nsystem\n.".encode(),
        "build": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        "setstate": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemscos\nsystem\nsb.",
        "items": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
        "endless": b"(" * 100_000,
        "nested": b"(" * 100_000 + b"t" * 100_000 + b".",
        "memo": b"Nr\xff\xff\xff\x0f.",
        "legacy": pickle.dumps({"state_dict": {}}),
        "persistent": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "gigabytes": b"\x80\x04\x96" + (1 << 40).to_bytes(8, "little") + b".",
        "not a tensor": pickle.dumps([1, 2, 3], 2),
    }
    for program in programs.values():
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", "3\n")
        shown(path)
    assert not mark.exists()


class Rebuilt:
    """A tensor as torch.save writes it, with arguments of our choice."""

    def __init__(self, tensor: Tensor, *arguments):
        self.arguments = (tensor.storage(), *arguments)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "arguments",
    ((0, (5,), (1,)), (1, (4,), (1,)), (-1, (4,), (1,)), (0, (2**40, 2**20), (1, 1)),
     (0, (4,), (-1,)), (0, (2, 2), (3, 1)), (0, (-2, -2), (1, 1)), ("x", (4,), (1,))),
    ids=str,
)  # fmt: skip
def test_tensors_beyond_their_storage(arguments, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"betas": Rebuilt(torch.ones(4), *arguments, False, {})}, path)
    refusal(path)


def test_messages(tmp_path):
    """One line each: the cause and not PyTorch's advice, what the file is, its name once."""
    path = tmp_path / "model.ckpt"
    torch.save({"a": Call(os.system, "true")}, path)
    assert "posix is blocked" in refusal(path) and "weights_only" not in refusal(path)
    path.write_bytes(b"")
    assert "an empty file" in refusal(path)
    path.write_text("<html>\n")
    assert "the text '<html>'" in refusal(path)
    assert "No such file" in refusal(tmp_path / "absent")
    strange = tmp_path / "a\nb"
    strange.write_bytes(b"\0" * 9)
    with pytest.raises(CheckpointError) as caught:
        with checking(tmp_path), checking(strange):
            raise KeyError("k\x1b")
    assert str(caught.value).startswith(f"{tmp_path}/a?b: damaged")
    assert "binary data, 9 bytes (it has no 'k\\x1b')" in str(caught.value)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: said$"):
        with checking(tmp_path), checking(tmp_path):
            raise CheckpointError("said")
    with pytest.raises(RuntimeError, match="memory"):
        with checking(tmp_path):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


# ------------------------------------------------------------------------------- what is written


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "new" / "a.bin"
    write_file(target, b"old")
    with pytest.raises(ValueError, match="--overwrite"):
        write_file(target, b"new")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_file(target, b"new", overwrite=True)
    assert target.read_bytes() == b"old" and len(list(target.parent.iterdir())) == 1


def test_a_tilde_is_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_file("~/a.txt", b"x")
    assert (tmp_path / "a.txt").read_bytes() == b"x"


def test_a_folder_that_is_a_file_and_a_target_that_is_a_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"):
        write_file(tmp_path / "file" / "a", b"")
    for target in (tmp_path, Path(os.devnull)):
        with pytest.raises(ValueError, match="is a folder or a device"):
            write_file(target, b"", overwrite=True)
