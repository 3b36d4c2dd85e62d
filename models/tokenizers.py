"""Text to token ids: BERT's WordPiece (LDM), CLIP's byte-pair encoding (Stable Diffusion), and
weights in prompts.

Placeholders, the new words of textual inversion, are cut out of the text first (paper, section 3:
"a string containing our placeholder word is first converted into tokens"). A placeholder may be any
string without spaces. It is never split, its case matters, and it is not found inside other words.
"""

import gzip
import json
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

VOCAB = Path(__file__).parent / "vocab"
Placeholders = Mapping[str, Sequence[int]]  # {"<cat>": its V consecutive ids}
Tokens = list[tuple[int, float]]  # ids with their weights
BREAK = -1  # the id that ends a chunk
RENAME = "use a name like <cat> (for a word from a file: --rename FILE='<cat>')"
nfc = partial(unicodedata.normalize, "NFC")  # makes two spellings of the same characters equal


def any_of(words: Iterable[str]) -> str:
    """Return a pattern for any of the words, longest first. It finds no "my-cat" in "my-cats"."""
    # \b goes to each end that is a letter or digit.
    patterns = [re.sub(r"^\b|\b$", r"\\b", re.escape(w)) for w in sorted(words, key=len)[::-1]]
    return f"(?:{'|'.join(patterns) or '(?!)'})"


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a placeholder that is empty or has spaces, and for two equal ones."""
    for name in names:
        if not name or re.search(r"\s", name):
            raise ValueError(f"placeholder {name!r} is empty or has a space in it; {RENAME}")
        if names.count(name) > 1:
            raise ValueError(f"two words are called {name}; {RENAME}")


class Tokenizer:
    """Base of both tokenizers. They define `split`, text to words; `split_word`, word to ids."""

    special: tuple[str, ...]  # tokens that a text may name, such as "[SEP]"
    ids: dict[str, int]  # every token of the vocabulary
    max_length: int  # ids of a text, with start and end
    unknown_id: int | None = None  # CLIP's tokenizer has none: it knows every byte

    def token_ids(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """Return all ids of a text, placeholders expanded, without start and end, not cut off."""
        whole = {token: [self.ids[token]] for token in self.special} | dict(placeholders)
        ids: list[int] = []
        for piece in re.split(f"({any_of(whole)})", nfc(text)):
            if piece in whole:
                ids += whole[piece]
            else:
                ids += [i for word in self.split(piece) for i in self.split_word(word)]
        return ids

    def encode(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """Return at most `max_length` ids of a text, with start and end, without padding."""
        return self.frame(self.token_ids(text, placeholders))

    def frame(self, ids: list[int]) -> list[int]:
        """Return start, as many ids as fit, and end."""
        return [self.start_id, *ids[: self.max_length - 2], self.end_id]

    def pad(self, ids: list[int]) -> list[int]:
        return ids + [self.pad_id] * (self.max_length - len(ids))

    def chunks(self, tokens: Tokens, placeholders: Placeholders) -> list[Tokens]:
        """Return a prompt in chunks of up to `max_length` - 2 tokens; CLIP encodes each separately.

        As in A1111's web UI, a full chunk is cut after a comma among its last 20 tokens, if there
        is one. The vectors of a learnt word stay in one chunk."""
        room, comma = self.max_length - 2, self.ids.get(",</w>")
        sizes = {ids[0]: len(ids) for ids in placeholders.values()}
        chunks: list[Tokens] = [[]]
        for i, weight in tokens:
            if len(chunk := chunks[-1]) == room and i not in (comma, BREAK):
                commas = [k for k in range(room - 20, room) if chunk[k][0] == comma]
                cut = commas[-1] + 1 if commas else room
                chunks[-1:] = [chunk[:cut], chunk[cut:]]
            if i == BREAK or (chunks[-1] and len(chunks[-1]) + sizes.get(i, 1) > room):
                chunks.append([])
            if i != BREAK:
                chunks[-1].append((i, weight))
        return chunks[:-1] if chunks[1:] and not chunks[-1] else chunks


# ------------------------------------------------------------------------------------ WordPiece

# Blocks of Chinese characters. Each character is a word of its own.
CJK = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)


class WordPieceTokenizer(Tokenizer):
    """The tokenizer of bert-base-uncased (Devlin et al. 2019), equal to that of the `tokenizers`
    library. vocab: the tokens in the order of their ids."""

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, vocab: Sequence[str], max_length: int = 77):
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.vocab_size, self.max_length = len(vocab), max_length
        special = (self.ids[token] for token in self.special)
        self.pad_id, self.unknown_id, self.start_id, self.end_id, _ = special

    @classmethod
    def load(cls, path: str | Path) -> "WordPieceTokenizer":
        return cls(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n"))

    @staticmethod
    def split(text: str) -> list[str]:
        """Return lower-case words without accents. Each punctuation mark is a word."""
        category = unicodedata.category
        text = re.sub(r"[\t\n\r]", " ", text).replace("\ufffd", "")
        text = unicodedata.normalize("NFD", CJK.sub(r" \g<0> ", text))
        # Accents, control and format characters are dropped, unassigned characters are not.
        dropped = ("Mn", "Cc", "Cf", "Co", "Cs")
        plain = "".join(c.lower() for c in text if category(c) not in dropped)
        marks = {c for c in plain if category(c)[0] == "P" or ("!" <= c <= "~" and not c.isalnum())}
        return "".join(f" {c} " if c in marks else c for c in plain).split()

    def split_word(self, word: str) -> list[int]:
        """Return the id of the longest piece the word begins with, then those of the rest."""
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.ids), None)
            if end is None or len(word) > 100:  # BERT's own limit
                return [self.unknown_id]
            pieces.append(self.ids[prefix + word[start:end]])
            start = end
        return pieces


# ------------------------------------------------------------------- CLIP's byte-pair encoding

# One printable character for each byte: itself, or the next free one for the 68 unprintable ones.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
BYTES = {b: chr(b) for b in PRINTABLE}
BYTES |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
# Unlike CLIP, Python counts "_" as a letter (in \w), and four control characters as spaces (in \s).
CLIP_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w\s]|[_\x1c-\x1f])+")


class CLIPTokenizer(Tokenizer):
    """CLIP's byte-pair encoding (Radford et al. 2021), equal to that of `transformers` 5.

    merges: pairs of symbols that become one, the most frequent first. Ids follow from their order:
    256 bytes, 256 bytes that end a word, one symbol per merge, start, end. pad_id: by default the
    end's, as in Stable Diffusion 1; in 2 it is 0."""

    special = ("<|startoftext|>", "<|endoftext|>")

    def __init__(self, merges: Sequence[tuple], max_length: int = 77, pad_id: int | None = None):
        symbols = [*BYTES.values(), *(symbol + "</w>" for symbol in BYTES.values())]
        symbols += [first + second for first, second in merges] + [*self.special]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start_id, self.end_id = (self.ids[token] for token in self.special)
        self.pad_id = self.end_id if pad_id is None else pad_id
        self.vocab_size, self.max_length = len(symbols), max_length

    @classmethod
    def load(cls, path: Path | None = None, vocab_size: int = 49408, **options) -> "CLIPTokenizer":
        """Load CLIP's own merges, or those in a merges.txt or tokenizer.json, as many of them as
        `vocab_size` has room for. A vocab.json is not read: it follows from the merges."""
        path = path or VOCAB / "clip_merges.txt.gz"
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        if path.suffix == ".json":
            pairs = json.loads(text)["model"]["merges"]  # "a b", in newer files ["a", "b"]
        else:
            pairs = [line for line in text.split("\n") if line and not line.startswith("#version")]
        merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in pairs]
        return cls(merges[: vocab_size - 2 * len(BYTES) - 2], **options)

    @staticmethod
    def split(text: str) -> list[str]:
        """Return lower-case words. Each digit is a word."""
        # Trap: character by character, since str.lower turns a capital sigma at the end into ς.
        lower = [c.lower() for c in text]
        # isnumeric() is true for all digits, and for ideographs such as 一, which are letters.
        spaced = [f" {c} " if c.isnumeric() and not c.isalpha() else c for c in lower]
        return CLIP_WORDS.findall("".join(spaced))

    def split_word(self, word: str) -> list[int]:
        """Return the ids of a word. Starting from its bytes, the neighbours that come first in
        `merges` are joined, again and again, until no neighbours are in it."""
        parts = [BYTES[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while pairs := [pair for pair in pairwise(parts) if pair in self.ranks]:
            best, joined = min(pairs, key=self.ranks.__getitem__), []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return [self.ids[part] for part in parts]


# ----------------------------------------------------------------------------- weights in prompts

# As in AUTOMATIC1111's web UI; `LatentDiffusion.encode_prompts` applies them. (Paper, appendix G:
# "prompt re-weighting" turns down a word that takes over the prompt.)
#     a (word)       1.1 times as strong          a [word]      weaker by the same factor
#     a (word:1.3)   1.3 times; brackets nest     a \(word\)    plain brackets
#     BREAK          the next chunk of 75 tokens begins here
# ComfyUI's "embedding:cat", or "embedding:cat.pt", is the word cat or <cat>.
FACTORS = {")": 1.1, "]": 1 / 1.1}  # of brackets without a number
PROMPT_PARTS = (
    r"|(?P<network><(?:lora|lyco|hypernet):[^<>]*>)"  # how A1111 loads another network
    r"|(?P<name>\bembedding:[^\s,:()\[\]]+|<[^<>\s]+>)"
    r"|(?P<escaped>\\[()\[\]\\]?)"  # a bracket or backslash; any other backslash is dropped
    r"|(?P<open>[(\[])|(?P<end>(?::\s*[^\s\\()\[\]:|]+\s*)?[)\]])"  # ":1.2)", or just ")"
    r"|(?P<text>(?s:.))"
)


def split_weights(prompt: str, words: Collection[str] = ()) -> list[tuple[str, float]]:
    """Return the pieces of a prompt with their weights. Learnt `words` are found before anything
    else. Warns of what is not supported. Raises ValueError for a weight that is not a number.

    A bracket that is never closed reaches to the end; one that was never opened is plain text.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {end: [] for end in FACTORS}  # where in `pieces` they begin

    def close(bracket: str, factor: float) -> None:
        first = opened[bracket].pop()
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]

    for match in re.finditer(f"(?P<word>{any_of(words)}){PROMPT_PARTS}", nfc(prompt)):
        part, kind = match[0], match.lastgroup
        if kind == "open":
            opened[")" if part == "(" else "]"].append(len(pieces))
        elif kind == "end" and opened[part[-1]]:
            inside = "".join(text for text, _ in pieces[opened[part[-1]][-1] :])
            text, factor = bracket_end(inside, part, words)
            pieces.append((text, 1.0))
            close(part[-1], factor)
        else:
            pieces.append((plain_text(part, kind, words), 1.0))
    for bracket, factor in FACTORS.items():
        while opened[bracket]:
            close(bracket, factor)
    runs = groupby(pieces, key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), weight) for weight, run in runs]


def bracket_end(inside: str, end: str, words: Collection[str]) -> tuple[str, float]:
    """Return the text and the factor that a bracket's end means after the text `inside`: ("", 1.2)
    for ":1.2)", but (":D", 1.1) for ":D)".

    Raises ValueError for what is meant as a weight but is not a number: digits with a comma or
    several points (unless digits come before the colon), or a word after a learnt word's colon."""
    given = end[1:-1].strip()
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", given)
    digits = re.fullmatch(r"[+-]*[\d.,]*\d[\d.,]*", given) and not re.search(r"\b[\d.,]+$", inside)
    follows = re.search(f"({any_of(words)}|>)$", inside) and re.match(r":\S*\w", end)
    if end[-1] == "]":
        if number or "|" in inside:
            warnings.warn(f"[{inside}{end} is not supported; it is read as plain text in a bracket")
    elif number:
        return "", float(given)
    elif digits or follows:
        raise ValueError(f"({inside[-60:]}{end}: {given!r} is not a weight; write (word:1.2)")
    return end[:-1], FACTORS[end[-1]]


def plain_text(part: str, kind: str, words: Collection[str]) -> str:
    """Return the text of one part of a prompt. Warns of unknown words and of other networks."""
    if kind == "escaped":
        return part[1:]
    if kind == "network":
        warnings.warn(f"{part} is not supported; it is left out of the prompt")
        return ""
    if kind == "name":
        names = {name: word for word in words for name in (word.strip("<>"), word)}
        name = part.removeprefix("embedding:")
        if word := names.get(name) or names.get(re.sub(r"\.\w*$", "", name)):
            return word
        known = ", ".join(words) or "none"
        warnings.warn(f"{part} is not a learnt word (known: {known}); it is read as plain text")
    return part


def without_weights(prompt: str, words: Collection[str] = ()) -> str:
    """Return the prompt's text without brackets, weights and BREAK."""
    return re.sub(r"\bBREAK\b", " ", "".join(text for text, _ in split_weights(prompt, words)))
