"""Files of learnt words: every layout in the wild is read, four are written.

The paper's code: a pickled {"string_to_token", "string_to_param": ParameterDict {string: (V, D)}}.
A1111: the same with a plain dict, "name", "step" and the base model; or that as JSON in a picture.
diffusers: {placeholder: (V, D) or (D,)}, several vectors also as `name`, `name_1`, `name_2`, ...
kohya, ComfyUI, InvokeAI: {"emb_params": (V, D)}. OneTrainer: {"emp_params": (V, D)}, with a p.
SDXL: {"clip_l": (V, 768), "clip_g": (V, 1280)}, or diffusers' learned_embeds and learned_embeds_2;
a Concept joins them to (V, 768 + 1280). "clip_l" alone is a word of Stable Diffusion 1.
A LoRA may hold words in any of these layouts: {"bundle_emb.NAME.emb_params": (V, D)}.

A file's content tells its format, not its suffix. Code in a file never runs (files.py).
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

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from . import files
from .files import CheckpointError
from .published import find
from .tokenizers import nfc

FORMATS = dict(diffusers=(".safetensors",), emb_params=(".safetensors",))  # layouts we can write
FORMATS |= dict(a1111=(".pt", ".png"), paper=(".pt",))
MAX_VECTORS, MAX_WIDTH = 1000, 16384  # of a word
MAX_TABLE = 1 << 22  # bytes of pickle, header or JSON; those of whole checkpoints are below 1 MB
PNG, PNG_KEY = b"\x89PNG\r\n\x1a\n", "sd-ti-embedding"  # a PNG's first bytes; A1111's text chunk
SDXL = (768, 1280)  # widths of the two halves of SDXL's words
SECOND = ("clip_g", "text_encoders_1")  # keys of the second half; the latter in old Replicate files
# Keys of layouts that do not name their word, or name it as one of a bundle.
PART = re.compile(
    r"(?:bundle_emb\.(.+)\.)?(clip_[lg]|text_encoders_[01]|em[bp]_params|string_to_param\.[^.]+)"
)
LORA = r"(^|[._])(lora|lycoris)[._].*\.(weight|alpha|(hada|lokr|oft)_\w+)$"
STAR, BERT_STAR = 265, 1008  # the id of "*" in CLIP's tokenizer and in BERT's
A1111_KEYS = dict(steps="step", base_model_hash="sd_checkpoint", base_model="sd_checkpoint_name")
EXPECTED = "expected a learnt word (.safetensors, .pt, .bin, .png); if it is one, download it again"
REFUSED = {  # pattern of a key in the file: what that file is
    LORA: "a LoRA, not a learnt word; it changes the model's weights, which only other programs do",
    r"^(encoder|decoder)\.(conv_in|down|up|mid)": "an autoencoder (VAE), not a learnt word",
    r"\.(weight|bias)$": "a model's weights, not a learnt word; a checkpoint goes to --model",
    "^emp_params_out$": "only OneTrainer's output embedding, not a word; train without that option",
    "^(320|640|768|1024|1280)$": "a hypernetwork, not a learnt word; A1111's web UI reads it",
}
# Control characters, line separators, marks that reverse text, lone surrogates. Unlike
# str.isprintable, this accepts the characters that join emoji.
clean = partial(re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]").sub, "?")


@dataclass(repr=False, eq=False)
class Concept:
    """A learnt word: its name in prompts (the placeholder), and its vectors (V, D), float32.

    V is 1 in the paper's main setup; more vectors act like several words in a row (section 5.2).
    The placeholder is in Unicode's form NFC, as prompts are, with "?" for harmful characters.
    """

    placeholder: str
    vectors: Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.placeholder = clean(nfc(self.placeholder)).strip()

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

        format: one of `FORMATS`, by default diffusers' for .safetensors, A1111's for .pt and .png;
        SDXL's words have only one. picture: for a .png, where to put the word. Raises ValueError.
        """
        files.write_file(path, encode_concept(self, format, Path(path).suffix, picture), overwrite)


def load_concept(path: str | Path) -> Concept:
    """Return the word of a file with one word; `load_concepts` reads files with several."""
    concepts = load_concepts(path)
    if len(concepts) > 1:
        raise ValueError(f"{path} holds {len(concepts)} words; use load_concepts")
    return concepts[0]


def load_concepts(path: str | Path) -> list[Concept]:
    """Return the words in a file of any layout named above, or in a folder with one such file.

    A word without a name (A1111's .pt, kohya's, a bare tensor) is named as the metadata says, else
    after the file. Metadata is kept from a .safetensors, and from A1111's files as "steps",
    "base_model" and "base_model_hash". Raises `CheckpointError`, a ValueError of one line.
    """
    path = word_file(find(path))
    with files.checking(path, EXPECTED):
        starts = ("learned_embeds", "learned_embeds_2")  # of diffusers' two files for SDXL
        names = dict.fromkeys(re.sub("^learned_embeds(_2)?", start, path.name) for start in starts)
        first, *second = (path.with_name(name) for name in names)
        if not first.is_file():
            raise CheckpointError(f"half of a word for SDXL; {first.name} belongs beside it")
        opened = [open_word(file) for file in (first, *second) if file.is_file()]
        content, metadata, _ = opened[0]
        halves = [words_of(table, name) for table, _, name in opened]
        words = {key: torch.cat([half[key] for half in halves], dim=1) for key in halves[0]}
        for ours, theirs in A1111_KEYS.items():
            if isinstance(value := content.get(theirs), (int, str)) and value != "":
                metadata[ours] = str(value)
        metadata = {clean(k): clean(v) for k, v in metadata.items() if k != "placeholder"}
        return [Concept(name, v, dict(metadata)) for name, v in join_numbered(words).items()]


def words_in(paths: Sequence[str], renames: Sequence[str]) -> list[Concept]:
    """Return the words of the files `paths`, with the names that --rename OLD=NEW gives them."""
    new_names = dict(nfc(entry).rpartition("=")[::2] for entry in renames)
    concepts, known = [], set()
    for path in paths:
        for concept in load_concepts(path):
            names = [nfc(s) for s in (str(path), Path(path).name, concept.placeholder)]
            name = next((new_names[old] for old in names if old in new_names), names[-1])
            concepts.append(replace(concept, placeholder=name))
            known |= set(names)
    for old, new in new_names.items():
        if old not in known or not new:
            loaded = ", ".join(sorted(known)) or "no word yet (use --concept FILE)"
            raise ValueError(f"--rename {old}={new}: write OLD=NEW; OLD may be {loaded}")
    return concepts


def word_file(path: Path) -> Path:
    """Return the word file in a folder: diffusers' newest, else the only one; or the file."""
    if not path.is_dir():
        return path
    endings = (".safetensors", ".pt", ".bin", ".png")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in endings)
    learned = [p for p in found if re.fullmatch(r"learned_embeds(-steps-\d+)?", p.stem)]
    if learned:  # the file without a step number is the last, else the one with the most steps
        return max(learned, key=lambda p: ("-" not in p.stem, len(p.stem), p.stem, p.suffix))
    words = []
    for file in found:
        with suppress(CheckpointError):
            load_concepts(file)
            words.append(file)
    if len(words or found) == 1:
        return (words or found)[0]
    what = f"{len(words)} words: " if words else "no word, found "
    names = files.some(p.name for p in words or sorted(path.iterdir()))
    raise CheckpointError(f"{path}: {what}{names}; give a word's file (a model: --model)")


def open_word(path: Path) -> tuple[dict, dict[str, str], str]:
    """Return a file's content, its metadata, and a name for a word that has no name in it."""
    with open(path, "rb") as file:
        if file.read(len(PNG)) != PNG:
            content, metadata = files.open_content(path, MAX_TABLE)
            name = metadata.get("placeholder") or path.stem
            return {name: content} if isinstance(content, Tensor) else dict(content), metadata, name
        text = Image.open(file, formats=["PNG"]).text.get(PNG_KEY, "")
    if not text:
        raise CheckpointError(f"a picture without a word: no text chunk {PNG_KEY}; take the .pt")
    files.check_size(len(text), MAX_TABLE)
    key = "TORCHTENSOR"  # A1111's {"TORCHTENSOR": lists}, as JSON in base64
    hook = lambda item: torch.tensor(item[key]) if key in item else item
    content = dict(json.loads(base64.b64decode(text), object_hook=hook))
    return content, {}, str(content.get("name") or path.stem)


def words_of(content: dict, name: str) -> dict[str, Tensor]:
    """Return the vectors (V, D) of each word; `name` is for a word that has no name in it."""
    table = content.get("string_to_param", content.get("state_dict", content))
    if isinstance(table, files.Stub):  # a ParameterDict, of any torch
        table = table.state["_parameters"]
    tensors = files.tensors_in(table)
    if "string_to_param" in content and "name" in content and len(tensors) == 1:
        return {name: checked(name, *tensors.values())}  # A1111's string is always "*"
    words: dict[str, dict[bool, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := PART.fullmatch(key):
            words.setdefault(match[1] or name, {})[match[2] in SECOND] = checked(key, tensor)
    if words:
        if any(re.search(LORA, key) for key in tensors):
            warnings.warn(f"{', '.join(words)}: read without the LoRA that is in the same file")
        if not all(False in halves for halves in words.values()):
            raise CheckpointError("half of a word for SDXL, which needs clip_l and clip_g")
        # Sorted, False (the first half) comes before True (the second).
        return {n: torch.cat([h[i] for i in sorted(h)], dim=1) for n, h in words.items()}
    for pattern, what in REFUSED.items():
        if any(re.search(pattern, str(key)) for key in table):
            raise CheckpointError(what)
    if not tensors:
        raise ValueError("no vectors")
    return {key: checked(key, tensor) for key, tensor in tensors.items()}


def checked(name: str, tensor: Tensor) -> Tensor:
    """Return a float32 copy (V, D) of a stored tensor (V, D) or (D,). Raises `CheckpointError` for
    tensors that are not a word. Shape and type are checked before the data are read."""
    rows = tensor[None] if tensor.ndim == 1 else tensor
    fits = rows.ndim == 2 and 0 < len(rows) <= MAX_VECTORS and 0 < rows.shape[1] <= MAX_WIDTH
    if not (fits and rows.is_floating_point()):
        found = f"{name[:80]!r} holds {tensor.dtype} of shape {tuple(tensor.shape)[:8]}"
        most = f"V from 1 to {MAX_VECTORS:,}, D to {MAX_WIDTH:,}"
        raise CheckpointError(f"{found}; a word is floats (V, D), {most}")
    # Trap: a view would keep its file mapped, and torch.save would write the whole tensor under it.
    vectors = rows.float().clone(memory_format=torch.contiguous_format)
    if not vectors.isfinite().all():
        raise CheckpointError(f"{name[:80]!r} holds NaN or infinity; take an earlier file")
    return vectors


def join_numbered(words: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join `name`, `name_1`, `name_2`, ... with one vector each into one word with several."""
    joined: dict[str, list[Tensor]] = {}
    for name in sorted(words, key=lambda name: (len(name), name)):  # `name` before `name_1`
        first, _, number = name.rpartition("_")
        follows = first in joined and number == str(len(joined[first]))
        follows = follows and len(words[name]) == len(words[first]) == 1
        joined.setdefault(first if follows else name, []).append(words[name])
    return {name: torch.cat(joined[name]) for name in words if name in joined}


def default_format(suffix: str, format: str | None = None) -> str:
    """Return `format`, or the usual one for this suffix. Raises ValueError if they do not fit."""
    possible = [name for name, endings in FORMATS.items() if suffix.lower() in endings]
    if not possible or format not in (None, *possible):
        table = "; ".join(f"{name}: {' or '.join(ends)}" for name, ends in FORMATS.items())
        raise ValueError(f"{format or 'a word'} is not written as {suffix!r}; possible are {table}")
    return format or possible[0]


def encode_concept(
    concept: Concept, format: str | None, suffix: str, picture: Image.Image | None = None
) -> bytes:
    """Return the bytes of a word's file; arguments as in `Concept.save`. Raises ValueError.

    A .safetensors keeps all metadata and the placeholder; A1111's files keep "steps", "base_model"
    and "base_model_hash", but not for SDXL. Other programs name the word in a .pt after the file.
    """
    content = content_of(concept, default_format(suffix, format))
    if suffix.lower() == ".safetensors":
        return save(content, concept.metadata | {"placeholder": concept.placeholder})
    if suffix.lower() == ".pt":
        file = io.BytesIO()
        torch.save(content, file)
        # Trap: A1111 refuses a file with entries that older versions of torch did not write.
        return files.without_code(file).getvalue()
    # Float32 is kept exactly: Python writes as many digits as it takes to read a float back.
    text = json.dumps(content, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()})
    text = base64.b64encode(text.encode()).decode()
    files.check_size(len(text), MAX_TABLE)
    picture = picture or Image.new("RGB", (512, 512))
    return files.png_bytes(picture.convert("RGB"), {PNG_KEY: text})


def content_of(concept: Concept, format: str) -> dict:
    """Return what the file of a word contains in one of `FORMATS`."""
    vectors = checked(concept.placeholder, concept.vectors.detach().cpu())
    if vectors.shape[1] == sum(SDXL):  # without a name, which A1111 would take for a tensor
        first, second = vectors.split(SDXL, dim=1)
        return dict(clip_l=first.contiguous(), clip_g=second.contiguous())
    if format == "diffusers":
        return {concept.placeholder: vectors}
    if format == "emb_params":
        return {"emb_params": vectors}
    if format == "paper":  # the paper's code finds the word by its one token id
        token = torch.tensor(BERT_STAR if vectors.shape[1] == 1280 else STAR)
        parameters = nn.ParameterDict({"*": nn.Parameter(vectors)})
        return {"string_to_token": {"*": token}, "string_to_param": parameters}
    content = {"string_to_token": {"*": STAR}, "string_to_param": {"*": vectors}}
    content |= {"name": concept.placeholder}
    content |= {theirs: concept.metadata.get(ours) for ours, theirs in A1111_KEYS.items()}
    content["step"] = int(steps) if (steps := content["step"] or "").isdecimal() else None
    return content
