"""Files of learnt words: every layout in the wild is read, four are written.

The paper's code: a pickled {"string_to_token", "string_to_param": ParameterDict {string: (V, D)}}.
A1111: the same with a plain dict, "name", "step" and the base model; or that as JSON in a picture.
diffusers: {placeholder: (V, D) or (D,)}, several vectors also as `name`, `name_1`, `name_2`, ...
kohya, ComfyUI, InvokeAI: {"emb_params": (V, D)}. OneTrainer: {"emp_params": (V, D)}, spelt so.

What a file is follows from its content, not from its suffix. Nothing in it can run (pickles go
through reading.RestrictedUnpickler), and its sizes are checked before anything is allocated.
"""

import base64
import io
import json
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors.torch import save
from torch import Tensor, nn

from .files import write_file
from .reading import ZIP, CheckpointError, Stored, Stub, TorchArchive, contents, open_safetensors

SUFFIXES = {
    "diffusers": (".safetensors",),
    "emb_params": (".safetensors",),
    "paper": (".pt",),
    "a1111": (".pt", ".png"),
}
FORMATS = tuple(SUFFIXES)
MAX_VECTORS, MAX_WIDTH = 1000, 16384  # in one file
MAX_TABLE = 1 << 22  # bytes of pickle, header or JSON; those of whole checkpoints are below 1 MB
PNG, PNG_KEY = b"\x89PNG\r\n\x1a\n", b"sd-ti-embedding\0"
BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, pickled
STAR = {1280: 1008}  # the id of "*" by width: BERT's in LDM,
CLIP_STAR = 265  # and CLIP's elsewhere
A1111_METADATA = dict(
    steps="step", base_model="sd_checkpoint_name", base_model_hash="sd_checkpoint"
)
EXPECTED = (
    "expected a learnt word (.safetensors, .pt, .bin or .png) as the paper's code, A1111, "
    "diffusers, kohya or OneTrainer write it"
)
REFUSED = {  # key in the file: what that file is
    r".+\.(weight|bias)": "a model's weights, no learnt word; a checkpoint goes to --model",
    "clip_g": "a word for SDXL, which is not supported; take one for Stable Diffusion 1 or 2",
    "emp_params_out": "only OneTrainer's output embedding, no word; train without that option",
}
# Control characters, line separators, text that runs backwards, halves of characters. No wider
# than that: str.isprintable would also refuse what joins an emoji, and so rename the word.
HARMFUL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class EmbeddingError(CheckpointError):
    """A file that holds no usable word: one line with what was found, and what helps."""


@dataclass
class Concept:
    """A learnt word: what stands for it in prompts, and its vectors (V, D), float32.

    V is 1 in the paper's main setup; more vectors act like several words in a row (section 5.2).
    """

    placeholder: str
    vectors: Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        format: str | None = None,
        picture: Image.Image | None = None,
    ) -> None:
        """Write the word to a file, all or nothing.

        format: one of `FORMATS`, by default what the file's ending suggests; for .safetensors
        {placeholder: (V, D)}, which diffusers reads as it is. picture: what a .png is drawn on.
        Raises ValueError where the file exists or cannot be written.
        """
        path = Path(path)
        format = format or default_format(path.suffix)
        write_file(path, encode_concept(self, format, path.suffix, picture), overwrite)


# --------------------------------------------------------------------------------------- reading


def load_concept(path: str | Path) -> Concept:
    """The word of a file with one word; `load_concepts` reads files with several."""
    concepts = load_concepts(path)
    if len(concepts) > 1:
        names = ", ".join(concept.placeholder for concept in concepts)
        raise ValueError(f"{path} holds {len(concepts)} words ({names}); use load_concepts")
    return concepts[0]


def load_concepts(path: str | Path) -> list[Concept]:
    """The words in a file of any layout named above.

    Where the layout names no placeholder (A1111's .pt, kohya's, OneTrainer's), it is the one in
    the metadata of a .safetensors or else the file's name without suffix. Metadata is that of a
    .safetensors, and A1111's as "steps", "base_model", "base_model_hash". Harmful characters in
    names and metadata become "?". Raises `EmbeddingError`, a ValueError of one line.
    """
    path, words = Path(path), {}
    with checking(path):
        content, metadata, name = open_content(path)
        for key, tensor in tensors_of_words(content, name).items():
            words[clean(key).strip() or clean(path.stem)] = checked(key, tensor)
            if sum(map(len, words.values())) > MAX_VECTORS:
                raise EmbeddingError(f"more than {MAX_VECTORS:,} vectors are no learnt words")
        if not words:
            raise ValueError("no vectors")
        if len(widths := {vectors.shape[1] for vectors in words.values()}) > 1:
            raise EmbeddingError(f"words of different widths, {widths}: they fit no one model")
        for ours, theirs in A1111_METADATA.items():
            if isinstance(value := content.get(theirs), (int, str)) and value != "":
                metadata[ours] = str(value)
        metadata = {clean(k): clean(v) for k, v in metadata.items() if k != "placeholder"}
    return [Concept(name, v, dict(metadata)) for name, v in join_numbered(words).items()]


@contextmanager
def checking(path: Path):
    """Turns whatever a damaged, foreign or hostile file makes the code below stumble over, out
    of memory included, into one line about that file."""
    try:
        yield
    except EmbeddingError as error:
        raise EmbeddingError(f"{path}: {error}") from error
    except OSError as error:
        raise EmbeddingError(f"{path}: {error.strerror or error}; {EXPECTED}") from error
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        reason = reason.removeprefix(f"{path}: ")[:200] or type(error).__name__
        raise EmbeddingError(
            f"{path}: found {contents(path)} ({reason}); {EXPECTED}; if it is one, it is damaged: "
            "download it again"
        ) from error


def clean(text: str) -> str:
    return HARMFUL.sub("?", text)


def open_content(path: Path) -> tuple[dict, dict[str, str], str]:
    """What a file holds, by its first bytes: (content, metadata, name for a word without one)."""
    with open(path, "rb") as file:
        start = file.read(16)
        if start.startswith(PNG):
            content = json_in_png(file)
            return content, {}, str(content.get("name") or path.stem)
        if start.startswith(BEFORE_1_6):
            raise EmbeddingError(
                "written by torch before 1.6; open and save it again with a newer torch"
            )
        if start.startswith(ZIP):
            with zipfile.ZipFile(file) as archive:
                tables = [i for i in archive.infolist() if i.filename.endswith("data.pkl")]
            check_size(max((info.file_size for info in tables), default=0))
            content = TorchArchive(path).content
            return dict(content if isinstance(content, dict) else {}), {}, path.stem
        size = int.from_bytes(start[:8], "little")
        if 8 + size > path.stat().st_size:
            raise ValueError("truncated, or of an unknown kind")
        check_size(size)
        file.seek(8)
        found = json.loads(file.read(size)).get("__metadata__") or {}
    metadata = {key: value for key, value in found.items() if isinstance(value, str)}
    return open_safetensors(path), metadata, metadata.get("placeholder") or path.stem


def check_size(size: int) -> None:
    if size > MAX_TABLE:
        raise EmbeddingError(
            f"its description of the vectors has {size:,} bytes, too many for a learnt word "
            f"({MAX_TABLE:,} at most); a checkpoint goes to --model"
        )


def json_in_png(file) -> dict:
    """A1111's JSON: base64 in the tEXt chunk "sd-ti-embedding", tensors as {"TORCHTENSOR": lists}.
    The pixels, where A1111 hides a copy, are not even decoded."""
    kind, position = b"?", len(PNG)
    while kind:
        file.seek(position)
        size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if kind == b"tEXt" and file.read(len(PNG_KEY)) == PNG_KEY:
            check_size(size)
            text = base64.b64decode(file.read(max(0, size - len(PNG_KEY))))
            return dict(json.loads(text, object_hook=tensor_in_json))
        position += 12 + size
    raise EmbeddingError(
        "a picture without a word: it has no text chunk sd-ti-embedding, which sites and editors "
        "strip (the copy in the pixels is not read); take the original picture or the .pt"
    )


def tensor_in_json(entry: dict):
    return stored(torch.tensor(entry["TORCHTENSOR"])) if "TORCHTENSOR" in entry else entry


def stored(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), lambda dtype: tensor)


def tensors_of_words(content: dict, name: str) -> dict[str, Stored]:
    """The tensor of each word; `name` is for layouts that do not name theirs."""
    table = content.get("string_to_param", content.get("state_dict", content))
    if isinstance(table, Stub):  # a ParameterDict, of any torch
        table = (table.state or {}).get("_parameters") or {}
    tensors = {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, Stored)}
    if "string_to_param" in content:  # A1111's string is always "*", whatever the word
        by_name = "name" in content and len(tensors) == 1
        return dict(zip([name], tensors.values())) if by_name else tensors
    for key in ("emb_params", "emp_params"):
        if key in tensors:
            return {name: tensors[key]}
    for pattern, what in REFUSED.items():
        if any(re.fullmatch(pattern, key) for key in tensors):
            raise EmbeddingError(what)
    return tensors


def checked(name: str, tensor: Stored) -> Tensor:
    """A word's vectors (V, D), float32, of a stored (V, D) or (D,); `EmbeddingError` if they are
    none. Nothing larger than a word is read at all."""
    shape = (1, *tensor.shape) if len(tensor.shape) == 1 else tensor.shape
    if len(shape) != 2 or not (0 < shape[0] <= MAX_VECTORS and 0 < shape[1] <= MAX_WIDTH):
        raise EmbeddingError(
            f"{name[:80]!r} has the shape {str(tensor.shape)[:80]}, a word's is (V, D) with V from "
            f"1 to {MAX_VECTORS:,} and D to {MAX_WIDTH:,}"
        )
    vectors = tensor.read(None).reshape(shape)
    if not vectors.is_floating_point():
        raise EmbeddingError(f"{name[:80]!r} holds {vectors.dtype}; a word's vectors are floats")
    if not (vectors := vectors.float()).isfinite().all():
        raise EmbeddingError(
            f"{name[:80]!r} holds NaN or infinity: its training failed; take an earlier file, or "
            "train with a lower learning rate"
        )
    return vectors


def join_numbered(words: dict[str, Tensor]) -> dict[str, Tensor]:
    """`name`, `name_1`, `name_2`, ... of one vector each become one word of several."""
    left, joined = dict(words), {}
    for name in sorted(words, key=len):  # `name` before `name_1`
        if name in left:
            parts = [left.pop(name)]
            while len(parts[0]) == 1 == len(left.get(f"{name}_{len(parts)}", ())):
                parts.append(left.pop(f"{name}_{len(parts)}"))
            joined[name] = torch.cat(parts)
    return {name: joined[name] for name in words if name in joined}


# --------------------------------------------------------------------------------------- writing


def default_format(suffix: str) -> str:
    """The layout that goes with a suffix; ValueError if none does."""
    for format, suffixes in SUFFIXES.items():
        if suffix.lower() in suffixes:
            return format
    possible = ", ".join(dict.fromkeys(s for suffixes in SUFFIXES.values() for s in suffixes))
    given = repr(suffix) if suffix else "files without an ending"
    raise ValueError(f"words are not written as {given}; possible are {possible}")


def encode_concept(
    concept: Concept, format: str, suffix: str, picture: Image.Image | None = None
) -> bytes:
    """The file of a word (V, D), for the caller to write.

    "diffusers" and "emb_params": .safetensors with all metadata, "placeholder" among them.
    "paper": .pt. The paper's code finds the word by its id in the tokenizer, where it must be one
    token; so it is always "*", id 265 for CLIP, 1008 for BERT (1280 wide). No metadata.
    "a1111": .pt, whose file name is the word, or .png: `picture`, or else a card with the word on
    it, with the file in a text chunk. Metadata "steps", "base_model" and "base_model_hash".
    Raises ValueError for a format and suffix that do not go together, or a word that cannot be
    written.
    """
    suffix, placeholder = suffix.lower(), concept.placeholder
    if suffix not in SUFFIXES.get(format, ()):
        possible = "; ".join(f"{name}: {' or '.join(s)}" for name, s in SUFFIXES.items())
        raise ValueError(f"{format!r} is not written as {suffix!r}; possible are {possible}")
    if placeholder in ("", "__metadata__") or placeholder != clean(placeholder).strip():
        raise ValueError(f"placeholder {placeholder!r} cannot be written; use one like <cat>")
    # Trap: torch.save writes all of the storage that a tensor is a view of.
    vectors = checked(placeholder, stored(concept.vectors.detach().cpu())).clone().contiguous()
    metadata = concept.metadata | {"placeholder": placeholder}
    if suffix == ".safetensors":
        return save({placeholder if format == "diffusers" else format: vectors}, metadata)
    if format == "paper":
        token = {"*": torch.tensor(STAR.get(vectors.shape[1], CLIP_STAR))}
        parameters = nn.ParameterDict({"*": nn.Parameter(vectors)})
        return torch_file({"string_to_token": token, "string_to_param": parameters})
    content = {"string_to_token": {"*": CLIP_STAR}, "string_to_param": {"*": vectors}}
    content |= {"name": placeholder, "step": None, "sd_checkpoint": None}
    content |= {theirs: metadata.get(ours) for ours, theirs in A1111_METADATA.items()}
    content["step"] = int(steps) if (steps := content["step"] or "").isdecimal() else None
    return torch_file(content) if suffix == ".pt" else png_file(content, picture)


def torch_file(content: dict) -> bytes:
    """As torch.save writes it, without what newer versions of torch add to the zip.
    Trap: A1111 takes a file with any entry but these for hostile, and refuses it."""
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(content, new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            if re.fullmatch(r"[^/]+/(data\.pkl|data/\d+|version)", name):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return old.getvalue()


def png_file(content: dict, picture: Image.Image | None) -> bytes:
    """The picture with the content as `json_in_png` reads it. Float32 is kept exactly: Python
    writes a float with as many digits as it takes to read it back the same."""
    vectors = content["string_to_param"]["*"].tolist()
    content = content | {"string_to_param": {"*": {"TORCHTENSOR": vectors}}}
    text = base64.b64encode(json.dumps(content).encode())
    check_size(len(PNG_KEY) + len(text))
    info = PngImagePlugin.PngInfo()
    info.add_text(PNG_KEY[:-1].decode(), text)
    file = io.BytesIO()
    (picture or card(content["name"])).convert("RGB").save(file, "PNG", pnginfo=info)
    return file.getvalue()


def card(text: str) -> Image.Image:
    """The text, white on black, 512 x 512."""
    text = text[:60].encode("latin-1", "replace").decode("latin-1")  # all that the font may have
    font = ImageFont.load_default()
    word = Image.new("L", [int(side) + 1 for side in font.getbbox(text)[2:]])
    ImageDraw.Draw(word).text((0, 0), text, 255, font)
    return ImageOps.expand(ImageOps.pad(word, (448, 448)), 32)
