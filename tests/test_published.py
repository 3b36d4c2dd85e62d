"""Checkpoints by name and by address, from a real HTTP server on this machine, and from a cache as
Hugging Face's own program lays it out."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import try_to_load_from_cache

import textinv
from models import published
from models.checkpoint import load_clip
from models.files import CheckpointError

TINY = Path(__file__).parent / "golden" / "tiny"
FILE = (TINY / "sd1/model.safetensors").read_bytes()


class Handler(BaseHTTPRequestHandler):
    """Serves FILE at any address; the first part of the path says what goes wrong."""

    def do_GET(self):
        self.server.requests.append(self.path)
        how = self.path.split("/")[1]
        if how == "redirect":
            self.send_response(302)
            self.send_header("Location", "/whole/elsewhere?signature=1")
            return self.end_headers()
        self.send_response(404 if how == "missing" else 200)
        self.send_header("Content-Type", "text/html" if how == "page" else "binary/octet-stream")
        if how != "unmeasured":
            self.send_header("Content-Length", str(len(FILE)))
        self.end_headers()
        self.wfile.write(FILE[:1000] if how in ("cut", "unmeasured") else FILE)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, with the caches of torch and of Hugging Face in an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.address = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def publish(monkeypatch, address: str, content: bytes = FILE, name: str = "sd15", what="model"):
    """Replace what is published under a name."""
    row = dict(name=name, what=what, licence="MIT", address=address)
    row |= dict(sha256=hashlib.sha256(content).hexdigest() if content else "")
    others = [row for row in published.PUBLISHED if row["name"] != name]
    monkeypatch.setattr(published, "PUBLISHED", [*others, row])


def refused(given, what: str = "model") -> str:
    with pytest.raises(CheckpointError) as caught:
        published.find(given, what)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.is_dir())


# ------------------------------------------------------------------------- by name and address


def test_a_name_is_downloaded_once_and_then_taken_from_the_cache(
    server, monkeypatch, tmp_path, capfd
):
    publish(monkeypatch, f"{server.address}/whole/tiny.safetensors")
    for name in ("sd15", "SD15"):
        assert textinv.main(["show", "--model", name, "--device", "cpu"]) == 0
        out, err = capfd.readouterr()
        assert "tiny.safetensors" in out
        told = [f"{server.address}/whole/tiny.safetensors", f"{len(FILE):,} bytes", "MIT"]
        told += [hashlib.sha256(FILE).hexdigest(), "100%"]
        assert all((text in err) == (name == "sd15") for text in told)
    assert len(server.requests) == 2  # for the size, then for the content
    assert (tmp_path / "torch/hub/checkpoints/tiny.safetensors").read_bytes() == FILE
    assert files_below(tmp_path) == ["tiny.safetensors"]


def test_python_says_what_it_downloads(server, monkeypatch):
    publish(monkeypatch, f"{server.address}/redirect/tiny.safetensors")
    with pytest.warns(
        UserWarning, match="downloading http.*bytes; licence: MIT; SHA-256: [0-9a-f]"
    ):
        model = textinv.load_model("sd15", device="cpu")
    assert model.family == "sd1" and model.name == "tiny.safetensors"


@pytest.mark.parametrize(
    "how, content, said",
    [
        ("cut", FILE, "invalid hash value"),
        ("cut", b"", f"cut off after 1,000 of {len(FILE):,} bytes"),
        ("whole", b"another file", "invalid hash value"),
        ("missing", FILE, "404"),
        ("page", FILE, "not of its page"),
        ("unmeasured", b"", "a known size"),
    ],
)
@pytest.mark.filterwarnings("ignore:downloading")
def test_what_is_not_whole_is_no_file(server, monkeypatch, tmp_path, how, content, said):
    publish(monkeypatch, f"{server.address}/{how}/tiny.safetensors", content)
    for _ in range(2):
        message = refused("sd15")
        assert said in message and f"{server.address}/{how}/tiny.safetensors" in message
        assert str(tmp_path / "torch/hub/checkpoints/tiny.safetensors") in message
        assert files_below(tmp_path) == []
    publish(monkeypatch, f"{server.address}/whole/tiny.safetensors")
    assert (
        published.find("sd15", "model").read_bytes() == FILE
    )  # and the next try is none the worse


@pytest.mark.parametrize("name, what", [(r["name"], r["what"]) for r in published.PUBLISHED])
def test_without_a_network_one_line_says_where_to_put_the_file(monkeypatch, tmp_path, name, what):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    row = next(row for row in published.PUBLISHED if row["name"] == name)
    (proxy := ThreadingHTTPServer(("127.0.0.1", 0), Handler)).server_close()
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.server_port}")  # nobody listens
    monkeypatch.setattr(urllib.request, "_opener", None)  # which keeps the first proxies
    message = refused(name, what)
    place = re.search(rf"{tmp_path}\S+", message)[0]
    assert row["address"] in message and "refused" in message
    assert place.endswith(row["address"].rpartition("/")[2])
    shutil.copy(TINY / "sd1/model.safetensors", place)
    assert published.find(name, what) == Path(place)


def test_addresses_of_files_with_the_same_name_are_kept_apart(server, monkeypatch, tmp_path):
    addresses = [f"{server.address}/whole/{x}/model.safetensors?download=true" for x in "ab"]
    with pytest.warns(UserWarning, match="licence: not known; SHA-256: not known"):
        a, b = (published.find(address) for address in addresses)
    assert a != b and a.name == b.name == "model.safetensors" and a.read_bytes() == FILE
    assert published.find(addresses[0]) == a and len(server.requests) == 4
    with pytest.warns(UserWarning, match="downloading"):
        model = textinv.load_model(addresses[0].replace("http", "HTTP", 1), device="cpu")
    assert model.family == "sd1"
    for wrong in ("https://", "https://[", "http://127.0.0.1:99999/x", "https://no where/x"):
        assert wrong in refused(wrong)


def test_a_clip_has_names_of_its_own(server, monkeypatch):
    state = TINY / "clip/openai-state-dict.safetensors"
    monkeypatch.setitem(globals(), "FILE", state.read_bytes())
    publish(monkeypatch, f"{server.address}/whole/ViT.pt", FILE, "vit-b-32", "clip")
    with pytest.warns(UserWarning, match="downloading"):
        assert load_clip("ViT-B-32").config.text.width == 64
    assert "vit-b-32" not in refused("vit-b-16") and "vit-b-32" in refused("sd15", "clip")


def test_a_path_comes_before_a_name(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY / "sd1/diffusers", "sd15")
    assert textinv.load_model("sd15", device="cpu").name == "sd15"
    assert not server.requests


def test_unknown_names_list_the_known_ones(capsys):
    for name in ("sd-15", "sd1.5", "sd15.safetensors", "./sd15", "folder/sd15.ckpt"):
        assert textinv.main(["show", "--model", name]) == 2
        message = capsys.readouterr().err
        assert f"{name}: no such file or folder" in message and "sd15, sd21, sdxl, ldm" in message
    assert ("hf download" in message) is False  # that is a path


@pytest.mark.filterwarnings("ignore:downloading")
def test_a_folder_that_cannot_be_written_is_one_line(server, monkeypatch, tmp_path):
    publish(monkeypatch, f"{server.address}/whole/tiny.safetensors")
    (tmp_path / "torch").write_text("a file")
    assert "TORCH_HOME" in refused("sd15")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "new"))
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(torch.hub, "READ_DATA_CHUNK", 100)
    real = torch.hub.tqdm

    class Full(real):
        def update(self, n=1):
            raise full

    monkeypatch.setattr(torch.hub, "tqdm", Full)
    assert "No space left on device" in refused("sd15")
    assert files_below(tmp_path) == ["torch"]


@pytest.mark.filterwarnings("ignore:downloading")
def test_several_at_once_do_not_disturb_each_other(server, monkeypatch, tmp_path):
    publish(monkeypatch, f"{server.address}/whole/tiny.safetensors")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(published.find("sd15", "model")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and found[0].read_bytes() == FILE
    assert files_below(tmp_path) == ["tiny.safetensors"]


def test_weights_md_names_what_is_published():
    text = (Path(__file__).parent.parent / "weights.md").read_text()
    for row in published.PUBLISHED:
        assert all(row[key] in text for key in ("name", "address", "licence", "sha256")), row


# -------------------------------------------------------------------- Hugging Face repositories


def cached(hub: Path, repository: str, files: Path, commit: str = "c0ffee", ref: bool = True):
    """Put a file or folder into a cache as `hf download` does: links to blobs without endings."""
    root = hub / f"models--{repository.replace('/', '--')}"
    for i, file in enumerate(sorted(files.rglob("*")) if files.is_dir() else [files]):
        if file.is_file():
            blob = root / "blobs" / f"{commit}{i}"
            link = (
                root
                / "snapshots"
                / commit
                / file.relative_to(files if files.is_dir() else file.parent)
            )
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(commit)
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    for variable in "HF_HUB_CACHE HF_HOME XDG_CACHE_HOME".split():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache/huggingface/hub"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_repository_and_its_folder_load_from_the_cache(hub, family):
    root = cached(hub, "someone/a-model.v1", TINY / family / "diffusers")
    found = try_to_load_from_cache("someone/a-model.v1", "unet/config.json", hub)
    assert Path(found).is_file()  # so it is a cache to Hugging Face's own program too
    plain = textinv.load_model(TINY / family / "diffusers", device="cpu")
    for given in ("someone/a-model.v1", root, str(root), next(root.glob("snapshots/*"))):
        model = textinv.load_model(given, device="cpu")
        assert model.name == "models--someone--a-model.v1"
        assert model.fingerprint == plain.fingerprint


def test_the_cache_is_where_huggingface_hub_looks_for_it(hub, tmp_path, monkeypatch):
    assert published.hub_cache() == hub
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for variable, below in (
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HF_HOME", "hub"),
        ("HF_HUB_CACHE", ""),
    ):  # each one goes before those above it
        monkeypatch.setenv(variable, f"~/{variable}")
        assert published.hub_cache() == tmp_path / variable / below
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert Path(done.stdout.strip()) == published.hub_cache()


def test_refs_main_decides_else_the_newest_snapshot(hub):
    old = TINY / "sd1/model.safetensors"
    root = cached(hub, "x/y", old, "aaa")
    cached(hub, "x/y", TINY / "sd2/model.safetensors", "bbb", ref=False)
    os.utime(root / "snapshots/aaa", (1, 1))
    assert published.find("x/y").name == "aaa"
    (root / "refs/main").unlink()
    assert published.find("x/y").name == "bbb"
    os.utime(root / "snapshots/bbb", (0, 0))
    assert published.find(root).name == "aaa"


def test_single_files_of_a_repository(hub, tmp_path):
    """One checkpoint is taken, beside the settings of a model's parts; several are named."""
    for file in (TINY / "sd1/diffusers").rglob("*.json"):
        shutil.copytree(file.parent, tmp_path / "x" / file.parent.name, dirs_exist_ok=True)
    for weights in (tmp_path / "x").rglob("*.safetensors"):
        weights.unlink()
    shutil.copy(TINY / "sd1/model.safetensors", tmp_path / "x/v1-5.safetensors")
    shutil.copy(TINY / "sd1/model.ckpt", tmp_path / "x/v1-5.ckpt")
    cached(hub, "x/y", tmp_path / "x")
    model = textinv.load_model("x/y", device="cpu")
    assert model.family == "sd1" and model.name == "v1-5.safetensors"
    shutil.copy(TINY / "sd1/model.ckpt", tmp_path / "x/v1-5-pruned.ckpt")
    root = cached(hub, "x/z", tmp_path / "x")
    for given in ("x/z", root, tmp_path / "x"):
        with pytest.raises(CheckpointError, match="several.*v1-5-pruned.ckpt, v1-5.safetensors"):
            textinv.load_model(given, device="cpu")


def test_a_repository_that_is_not_there(hub, capsys):
    cached(hub, "some/one", TINY / "sd1/model.ckpt")
    shutil.rmtree(hub / "models--some--one/snapshots")
    for repository in ("stabilityai/sdxl-turbo", "some/one"):
        assert textinv.main(["show", "--model", repository]) == 2
        message = capsys.readouterr().err
        assert f"hf download {repository}" in message and str(hub) in message
    assert "sd15, sd21, sdxl, ldm" in refused("runwayml/stable-diffusion-v1-5")
    with pytest.raises(CheckpointError, match="hf download sd-concepts-library/cat-toy"):
        textinv.load_concept("sd-concepts-library/cat-toy")


def test_a_clip_from_the_cache(hub):
    root = cached(hub, "openai/clip", TINY / "clip/transformers")
    for given in ("openai/clip", root):
        assert load_clip(given).config.text.width == 64


def test_a_word_from_an_address(server, tmp_path, monkeypatch):
    word = tmp_path / "word.safetensors"
    textinv.Concept("<cat-toy>", torch.ones(1, 32)).save(word)
    monkeypatch.setitem(globals(), "FILE", word.read_bytes())
    with pytest.warns(UserWarning, match="downloading"):
        concept = textinv.load_concept(f"{server.address}/whole/learned_embeds.safetensors")
    assert concept.placeholder == "<cat-toy>"


def test_a_word_from_the_cache(hub, tmp_path):
    """As the sd-concepts-library has them."""
    (tmp_path / "x/concept_images").mkdir(parents=True)
    (tmp_path / "x/concept_images/0.jpeg").write_bytes(b"a picture")
    (tmp_path / "x/token_identifier.txt").write_text("<cat-toy>")
    torch.save({"<cat-toy>": torch.ones(32)}, tmp_path / "x/learned_embeds.bin")
    root = cached(hub, "sd-concepts-library/cat-toy", tmp_path / "x")
    for given in ("sd-concepts-library/cat-toy", root, str(root)):
        concept = textinv.load_concept(given)
        assert concept.placeholder == "<cat-toy>" and concept.vectors.shape == (1, 32)
