"""`load_clip`: OpenAI's TorchScript archive as torch.jit writes it, folders, and refusals."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.checkpoint import CheckpointError, load_clip

TINY = GOLDEN / "tiny" / "clip"


class Node(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def modules(state: dict[str, Tensor]) -> nn.Module:
    """A tree of modules with these key names; a mask as OpenAI's blocks have it, no buffer."""
    root = Node()
    for key, value in state.items():
        *path, name = key.split(".")
        node = root
        for segment in path:
            if segment not in node._modules:
                node.add_module(segment, Node())
            node = node._modules[segment]
        if value.is_floating_point():
            node.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            node.register_buffer(name, value)
    root.transformer.resblocks._modules["0"].attn_mask = torch.zeros(77, 77)
    return root


def archive(path: Path, how: str = "trace") -> Path:
    """The golden state_dict as OpenAI publishes it: matrices in half precision, three sizes."""
    state = load_file(TINY / "openai-state-dict.safetensors")
    assert state["visual.proj"].dtype == torch.float16
    sizes = dict(input_resolution=32, context_length=77, vocab_size=256)
    root = modules(state | {k: torch.tensor(v) for k, v in sizes.items()})
    scripted = torch.jit.trace(root, torch.ones(1)) if how == "trace" else torch.jit.script(root)
    torch.jit.save(scripted, path)
    return path


def repickled(source: Path, target: Path, program: bytes) -> Path:
    """An archive with another data.pkl."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))
    return target


jit = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@jit
@pytest.mark.parametrize("how", ("trace", "script"))
def test_torchscript(how, tmp_path):
    model = load_clip(archive(tmp_path / "ViT-B-32.pt", how))
    reference = load_clip(TINY / "openai-state-dict.safetensors")
    assert model.config == reference.config
    state = reference.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@jit
def test_nothing_in_a_torchscript_archive_runs(tmp_path):
    """Code as the archive's modules, as their state, as a value and as a call beside the state."""
    marker, source = tmp_path / "marker", archive(tmp_path / "model.pt")
    with zipfile.ZipFile(source) as file:
        name = next(n for n in file.namelist() if n.endswith("data.pkl"))
        good = file.read(name)
    call = f"cos\nsystem\n(X{{}}touch '{marker}'tR".encode()
    call = call.replace(b"{}", len(f"touch '{marker}'").to_bytes(4, "little"))
    assert pickle.loads(call + b".") == 0 and marker.exists(), "not as hostile as it should be"
    marker.unlink()
    root = b"c__torch__\nCLIP\n)\x81"
    programs = {
        "instead": call + b".",
        "as state": root + call + b"b.",
        "as value": root + b"}X\x04\x00\x00\x00evil" + call + b"sb.",
        "as name": root + b"}" + call + b"Nsb.",
        "attribute": root + b"}X\x09\x00\x00\x00__class__" + call + b"sb.",
        "reduce": b"c__torch__\nCLIP\n(" + call + b"tR.",
        "list": root + b"]b.",
        "cycle": root + b"q\x01}X\x01\x00\x00\x00ah\x01sb.",
        "deep": (root + b"}X\x01\x00\x00\x00a") * 2000 + root + b"}b" + b"sb" * 2000 + b".",
    }
    for place, program in programs.items():
        with pytest.raises(CheckpointError) as caught:
            load_clip(repickled(source, tmp_path / "hostile.pt", program))
        message = str(caught.value)
        assert message.isprintable() and "hostile.pt" in message and "a CLIP" in message, place
        assert not marker.exists(), place
    # Beside good weights it is refused, too: PyTorch's loader knows no such opcode.
    with pytest.raises(CheckpointError):
        load_clip(repickled(source, tmp_path / "hostile.pt", call + b"0" + good))
    assert not marker.exists()


@jit
def test_refusals_of_load_clip(tmp_path):
    """One line that names the file and says what a CLIP would be, whatever the accident."""
    whole = archive(tmp_path / "whole.pt").read_bytes()
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_bytes(b"<!DOCTYPE html>\n<html>")
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], tmp_path / "list.pt")
    state = load_file(TINY / "transformers/model.safetensors")
    text = {k: v for k, v in state.items() if k.startswith("text")}
    save_file(text, tmp_path / "text.safetensors")
    names = ("empty.pt", "page.pt", "short.pt", "list.pt", "text.safetensors", ".")
    with pytest.raises(CheckpointError, match="missing.pt: no such file or folder.* vit-b-32"):
        load_clip(tmp_path / "missing.pt")
    for name in names:
        with pytest.raises(CheckpointError, match="a CLIP") as caught:
            load_clip(tmp_path / name)
        assert str(caught.value).isprintable() and str(tmp_path / name) in str(caught.value)
        assert "Stable Diffusion" not in str(caught.value)
    save_file(state | {"logit_scale": torch.ones(3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match="not the expected CLIP.* 1 of another shape"):
        load_clip(tmp_path / "wrong.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match="not the expected CLIP.* 1 missing .visual_proj"):
        load_clip(tmp_path / "wrong.safetensors")


def test_heads_of_a_configuration(tmp_path):
    save_file(load_file(TINY / "transformers/model.safetensors"), tmp_path / "model.safetensors")
    for settings, found in (
        ("[1]", "damaged"),
        ('{"num_attention_heads": 3}', "3 attention heads"),
    ):
        (tmp_path / "config.json").write_text(f'{{"vision_config": {settings}}}')
        with pytest.raises(CheckpointError, match=found) as caught:
            load_clip(tmp_path)
        assert str(caught.value).isprintable()
