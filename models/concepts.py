"""Files of learnt words: every layout in the wild is read, four are written.

The paper's code: a pickled {"string_to_token", "string_to_param": ParameterDict {string: (V, D)}}.
A1111: the same with a plain dict, "name", "step" and the base model; or that as JSON in a picture.
diffusers: {placeholder: (V, D) or (D,)}, several vectors also as `name`, `name_1`, `name_2`, ...
kohya, ComfyUI, InvokeAI: {"emb_params": (V, D)}. OneTrainer: {"emp_params": (V, D)}, spelt so.
SDXL: {"clip_l": (V, 768), "clip_g": (V, 1280)} everywhere, in any container; "clip_l" alone is a
word of Stable Diffusion 1. diffusers' script writes two files, learned_embeds.safetensors and
learned_embeds_2.safetensors. Here such a word is one (V, 768 + 1280).
A LoRA may hold words in any of these layouts: {"bundle_emb.NAME.emb_params": (V, D)}.

The content of a file decides on its format, not its suffix. Nothing in it can run (files.py).
"""

import base64
import io
import json
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors.torch import save
from torch import Tensor, nn

from . import files
from .files import CheckpointError
from .published import find
from .tokenizers import nfc

SUFFIXES = dict(
    diffusers=(".safetensors",), emb_params=(".safetensors",), a1111=(".pt", ".png"), paper=(".pt",)
)
FORMATS = tuple(SUFFIXES)
MAX_VECTORS, MAX_WIDTH = 1000, 16384  # in one file
MAX_TABLE = 1 << 22  # bytes of pickle, header or JSON; those of whole checkpoints are below 1 MB
PNG, PNG_KEY = b"\x89PNG\r\n\x1a\n", "sd-ti-embedding"  # first bytes; name of A1111's text chunk
SDXL = (768, 1280)  # widths of the halves of its words
READ = (".safetensors", ".bin", ".pt", ".png")
# The key of a word that the layout does not name, or names as one of a bundle; of SDXL's first half
# and second half. text_encoders_0 and 1 are those of old Replicate files.
PART = re.compile(
    r"(?:bundle_emb\.(.+)\.)?(?:(clip_l|text_encoders_0|em[bp]_params|string_to_param\.[^.]+)"
    r"|(clip_g|text_encoders_1))"
)
LORA = r"(^|[._])(lora|lycoris)[._].*\.(weight|alpha|(hada|lokr|oft)_\w+)$"
STAR, BERT_STAR = 265, 1008  # the id of "*" in CLIP's tokenizer and in BERT's
A1111_KEYS = dict(steps="step", base_model_hash="sd_checkpoint", base_model="sd_checkpoint_name")
EXPECTED = (
    "expected a learnt word (.safetensors, .pt, .bin or .png) as the paper's code, A1111, "
    "diffusers, kohya or OneTrainer write it; if it is one, download it again"
)
REFUSED = {  # pattern of a key in the file: what that file is
    LORA: "a LoRA, no learnt word; it changes the model's weights, which only other programs do",
    r"^(encoder|decoder)\.(conv_in|down|up|mid)": "an autoencoder (VAE), no learnt word",
    r"\.(weight|bias)$": "a model's weights, no learnt word; a checkpoint goes to --model",
    "^emp_params_out$": "only OneTrainer's output embedding, no word; train without that option",
}
# Control characters, line separators, text that runs backwards, halves of characters. No wider
# than that: str.isprintable would also refuse what joins an emoji, and so rename the word.
HARMFUL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
clean = partial(HARMFUL.sub, "?")


@dataclass(repr=False)
class Concept:
    """A learnt word: what stands for it in prompts, and its vectors (V, D), float32.

    V is 1 in the paper's main setup; more vectors act like several words in a row (section 5.2).
    The placeholder is kept in Unicode's normal form NFC, in which prompts are read too.
    """

    placeholder: str
    vectors: Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.placeholder = nfc(self.placeholder)

    def __repr__(self) -> str:
        return f"Concept({self.placeholder!r}, vectors {tuple(self.vectors.shape)})"

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        format: str | None = None,
        picture: Image.Image | None = None,
    ) -> None:
        """Write the word to a file, all or nothing.

        format: one of `FORMATS`, by default what the file's ending suggests: diffusers' for
        .safetensors, A1111's for .pt and .png. picture: what a .png is drawn on.
        Raises ValueError where the file exists or cannot be written.
        """
        path = Path(path)
        format = format or default_format(path.suffix)
        files.write_file(path, encode_concept(self, format, path.suffix, picture), overwrite)


def load_concept(path: str | Path) -> Concept:
    """The word of a file with one word; `load_concepts` reads files with several."""
    concepts = load_concepts(path)
    if len(concepts) > 1:
        names = ", ".join(concept.placeholder for concept in concepts)
        raise ValueError(f"{path} holds {len(concepts)} words ({names}); use load_concepts")
    return concepts[0]


def load_concepts(path: str | Path) -> list[Concept]:
    """Return the words in a file of any layout named above, or in a folder with one such file.

    Where the layout names no placeholder (A1111's .pt, kohya's, a bare tensor), it is the one in
    the metadata of a .safetensors or else the file's name without suffix. Metadata is that of a
    .safetensors, and A1111's as "steps", "base_model", "base_model_hash". Harmful characters in
    names and metadata become "?". Raises `CheckpointError`, a ValueError of one line.
    """
    path, words = word_file(find(path)), {}
    with files.checking(path, EXPECTED):
        opened = [open_word(file) for file in both_files(path)]
        content, metadata, name = opened[0]
        tables = [tensors_of_words(table, name) for table, *_ in opened]
        for key in tables[0]:
            halves = [checked(key, part) for table in tables for part in table[key]]
            words[clean(key).strip() or clean(path.stem)] = torch.cat(halves, dim=1)
            if sum(map(len, words.values())) > MAX_VECTORS:
                raise CheckpointError(f"more than {MAX_VECTORS:,} vectors are no learnt words")
        if not words:
            raise ValueError("no vectors")
        if len(widths := {vectors.shape[1] for vectors in words.values()}) > 1:
            raise CheckpointError(f"words of different widths, {widths}: they fit no one model")
        for ours, theirs in A1111_KEYS.items():
            if isinstance(value := content.get(theirs), (int, str)) and value != "":
                metadata[ours] = str(value)
        metadata = {clean(k): clean(v) for k, v in metadata.items() if k != "placeholder"}
    return [Concept(name, v, dict(metadata)) for name, v in join_numbered(words).items()]


def words_in(files: Sequence[str], renames: Sequence[str]) -> list[Concept]:
    """Return the words of the files, with the names that --rename OLD=NEW gives them."""
    for entry in renames:
        if "=" not in entry:
            raise ValueError(f"--rename {entry}: write FILE='<new-name>', with = between the two")
    new_names = dict(nfc(entry).rpartition("=")[::2] for entry in renames)
    concepts, known = [], set()
    for path in files:
        for concept in load_concepts(path):
            olds = [nfc(s) for s in (str(path), Path(path).name, concept.placeholder)]
            old = next((old for old in olds if old in new_names), concept.placeholder)
            concepts.append(replace(concept, placeholder=new_names.get(old, old)))
            known |= set(olds)
    for old, new in new_names.items():
        if old not in known or not new:
            raise ValueError(
                f"--rename {old}={new}: no word or file of that name is loaded, or no new name "
                f"is given; there are {', '.join(sorted(known)) or 'none (use --concept FILE)'}"
            )
    return concepts


def word_file(path: Path) -> Path:
    """Return the file of the word in a folder: the newest that diffusers' script wrote, else the
    only one that is a word. Return a file as it is."""
    if not path.is_dir():
        return path
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in READ)
    learned = [p for p in found if re.fullmatch(r"learned_embeds(-steps-\d+)?", p.stem)]
    if learned:  # without a number the last, else that of the most steps
        return max(learned, key=lambda p: ("-" not in p.stem, len(p.stem), p.stem, p.suffix))
    words = []
    for file in found:
        with suppress(CheckpointError):
            words += [file] * bool(load_concepts(file))
    if len(found := words or found) == 1:
        return found[0]
    names = ", ".join([p.name for p in found or sorted(path.iterdir())][:9]) or "no files"
    what = "several words" if words else "no word"
    raise CheckpointError(f"{path}: {what} there ({names}); give a word's file (a model: --model)")


def both_files(path: Path) -> list[Path]:
    """Return the path, or both files of a word for SDXL as diffusers' script writes them."""
    first = path.name.replace("learned_embeds_2", "learned_embeds", 1)
    second = first.replace("learned_embeds", "learned_embeds_2", 1)
    pair = [path.with_name(name) for name in (first, second)]
    if path.name != first and not pair[0].is_file():
        raise CheckpointError(f"half of a word for SDXL; {first} belongs beside it")
    return pair if first != second and pair[1].is_file() else [path]


def open_word(path: Path) -> tuple[dict, dict[str, str], str]:
    """Return a file's content, its metadata, and the name of a word that the content lacks."""
    with open(path, "rb") as file:
        if file.read(len(PNG)) == PNG:
            content = json_in_png(file)
            return content, {}, str(content.get("name") or path.stem)
    content, metadata = files.open_content(path, MAX_TABLE)
    name, beside = path.stem, path.with_name("token_identifier.txt")
    if name.startswith("learned_embeds") and beside.is_file():  # as in the sd-concepts-library
        name = beside.read_text("utf-8-sig", "replace").strip()
    name = metadata.get("placeholder") or name
    if isinstance(content, Tensor):
        content = {name: content}
    return content if isinstance(content, dict) else {}, metadata, name


def json_in_png(file: BinaryIO) -> dict:
    """A1111's JSON: base64 in the text chunk "sd-ti-embedding", tensors as {"TORCHTENSOR": lists}.
    The pixels hide a copy, which is not read."""
    picture = Image.open(file, formats=["PNG"])
    text = picture.info.get(PNG_KEY) or picture.text.get(PNG_KEY)  # before the pixels, or behind
    if not text:
        raise CheckpointError(
            "a picture without a word: it has no text chunk sd-ti-embedding, which sites and "
            "editors strip; take the original picture or the .pt"
        )
    files.check_size(len(text), MAX_TABLE)
    key = "TORCHTENSOR"
    decoded = base64.b64decode(text)
    return dict(json.loads(decoded, object_hook=lambda d: torch.tensor(d[key]) if key in d else d))


def tensors_of_words(content: dict, name: str) -> dict[str, list[Tensor]]:
    """Return the tensor of each word, or SDXL's two; `name` is for layouts that do not name it."""
    table = content.get("string_to_param", content.get("state_dict", content))
    if isinstance(table, files.Stub):  # a ParameterDict, of any torch
        table = (table.state or {}).get("_parameters") or {}
    tensors = files.tensors_in(table)
    if "string_to_param" in content and "name" in content and len(tensors) == 1:
        return {name: [*tensors.values()]}  # A1111's string is always "*", whatever the word
    words: dict[str, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := PART.fullmatch(key):
            words.setdefault(match[1] or name, {})[match.lastindex] = tensor
    if words:
        if any(re.search(LORA, key) for key in tensors):
            warnings.warn(f"{', '.join(words)}: read without the LoRA that is in the same file")
        if any(2 not in parts for parts in words.values()):
            raise CheckpointError("half of a word for SDXL, which needs clip_l and clip_g")
        return {name: [parts[i] for i in sorted(parts)] for name, parts in words.items()}
    for pattern, what in REFUSED.items():
        if any(re.search(pattern, key) for key in tensors):
            raise CheckpointError(what)
    if any(isinstance(key, int) for key in content):
        raise CheckpointError("a hypernetwork, no learnt word; A1111's web UI reads it")
    return {key: [tensor] for key, tensor in tensors.items()}


def checked(name: str, tensor: Tensor) -> Tensor:
    """Return a copy (V, D) in float32 of a word's stored (V, D) or (D,); `CheckpointError` if it is
    none. Nothing larger than a word is read."""
    v, d = tensor.shape if tensor.ndim == 2 else (1, *tensor.shape, 0)[:2]
    sizes_fit = tensor.ndim in (1, 2) and 0 < v <= MAX_VECTORS and 0 < d <= MAX_WIDTH
    if not (sizes_fit and tensor.is_floating_point()):
        raise CheckpointError(
            f"{name[:80]!r} holds {tensor.dtype} of shape {tuple(tensor.shape)[:8]}; a word's are "
            f"floats (V, D) with V from 1 to {MAX_VECTORS:,} and D to {MAX_WIDTH:,}"
        )
    # Trap: a view would keep its file mapped, and torch.save writes all that it is a view of.
    vectors = tensor.reshape(v, d).float().clone(memory_format=torch.contiguous_format)
    if not vectors.isfinite().all():
        raise CheckpointError(
            f"{name[:80]!r} holds NaN or infinity: its training failed; take an earlier file, or "
            "train with a lower learning rate"
        )
    return vectors


def join_numbered(words: dict[str, Tensor]) -> dict[str, Tensor]:
    """`name`, `name_1`, `name_2`, ... of one vector each become one word of several."""
    joined: dict[str, list[Tensor]] = {}
    for name in sorted(words, key=lambda name: (len(name), name)):  # `name` before `name_1`
        first, _, number = name.rpartition("_")
        follows = first in joined and number == str(len(joined[first]))
        follows = follows and len(words[name]) == len(words[first]) == 1
        joined.setdefault(first if follows else name, []).append(words[name])
    return {name: torch.cat(joined[name]) for name in words if name in joined}


def default_format(suffix: str) -> str:
    """The layout that goes with a suffix; ValueError if none does."""
    for format, suffixes in SUFFIXES.items():
        if suffix.lower() in suffixes:
            return format
    given = repr(suffix) if suffix else "files without an ending"
    raise ValueError(f"words are not written as {given}; possible are .safetensors, .pt, .png")


def encode_concept(
    concept: Concept, format: str, suffix: str, picture: Image.Image | None = None
) -> bytes:
    """Return the bytes of a word's file. ValueError for what cannot be written.

    "diffusers" and "emb_params": .safetensors with all metadata, "placeholder" among them.
    "a1111": .pt, whose file name is the word, or `picture` (else a card with the word on it) as
    .png, with the same in a text chunk. Metadata "steps", "base_model" and "base_model_hash".
    "paper": .pt, where the word is always "*": the paper's code finds it by its one id in the
    tokenizer, 265 for CLIP, 1008 for BERT (1280 wide). No metadata.
    A word for SDXL is {clip_l, clip_g} in all of these. A .pt or .png gives it its file's name, for
    A1111 takes every other entry for a tensor.
    """
    suffix, placeholder = suffix.lower(), concept.placeholder
    if suffix not in SUFFIXES.get(format, ()):
        possible = "; ".join(f"{name}: {' or '.join(s)}" for name, s in SUFFIXES.items())
        raise ValueError(f"{format!r} is not written as {suffix!r}; possible are {possible}")
    if placeholder in ("", "__metadata__") or placeholder != clean(placeholder).strip():
        raise ValueError(f"placeholder {placeholder!r} cannot be written; use one like <cat>")
    vectors = checked(placeholder, concept.vectors.detach().cpu())
    metadata = concept.metadata | {"placeholder": placeholder}
    if vectors.shape[1] == sum(SDXL):
        halves = [half.contiguous() for half in vectors.split(SDXL, dim=1)]
        content = dict(clip_l=halves[0], clip_g=halves[1])
    elif suffix == ".safetensors":
        content = {placeholder if format == "diffusers" else format: vectors}
    elif format == "paper":
        token = torch.tensor(BERT_STAR if vectors.shape[1] == 1280 else STAR)
        parameters = nn.ParameterDict({"*": nn.Parameter(vectors)})
        content = {"string_to_token": {"*": token}, "string_to_param": parameters}
    else:
        content = {"string_to_token": {"*": STAR}, "string_to_param": {"*": vectors}}
        content |= {"name": placeholder}
        content |= {theirs: metadata.get(ours) for ours, theirs in A1111_KEYS.items()}
        content["step"] = int(steps) if (steps := content["step"] or "").isdecimal() else None
    if suffix == ".safetensors":
        return save(content, metadata)
    if suffix == ".pt":
        return torch_file(content)
    return png_file(content, picture or card(placeholder))


def torch_file(content: dict) -> bytes:
    """As torch.save writes it. Trap: A1111 refuses a file with entries that older versions of
    torch did not write."""
    file = io.BytesIO()
    torch.save(content, file)
    return files.without_code(file).getvalue()


def png_file(content: dict, picture: Image.Image) -> bytes:
    """The picture with the content as `json_in_png` reads it. Float32 is kept exactly: Python
    writes a float with as many digits as it takes to read it back the same."""
    text = json.dumps(content, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()})
    text = base64.b64encode(text.encode())
    files.check_size(len(text), MAX_TABLE)
    info = PngImagePlugin.PngInfo()
    info.add_text(PNG_KEY, text)
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG", pnginfo=info)
    return file.getvalue()


def card(text: str) -> Image.Image:
    """The text, white on black, 512 x 512."""
    text = text[:60].encode("latin-1", "replace").decode("latin-1")  # all that the font may have
    font = ImageFont.load_default()
    word = Image.new("L", [int(side) + 1 for side in font.getbbox(text)[2:]])
    ImageDraw.Draw(word).text((0, 0), text, 255, font)
    return ImageOps.expand(ImageOps.pad(word, (448, 448)), 32)
