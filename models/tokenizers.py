"""Text to token ids: BERT's WordPiece (LDM), CLIP's byte-pair encoding (Stable Diffusion), and
weights in prompts.

Placeholders, the new words of textual inversion, are cut out of the text first (paper, section 3:
"a string containing our placeholder word is first converted into tokens"). A placeholder may be any
string without spaces. It is never split, its case matters, and it is not found inside other words.
`nfc` makes two spellings of the same characters equal.
"""

import gzip
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

VOCAB = Path(__file__).parent / "vocab"
Placeholders = Mapping[str, Sequence[int]]  # {"<cat>": its V consecutive ids}
Tokens = list[tuple[int, float]]  # ids with their weights
BREAK = -1  # the id that ends a chunk
nfc = partial(unicodedata.normalize, "NFC")  # Unicode's form for comparing names


def any_of(words: Iterable[str]) -> str:
    """Return a pattern for any of the words, longest first. It finds whole words only: "my-cat" is
    not in "my-cats"."""
    longest_first = sorted(words, key=len, reverse=True)
    # \b goes to each end that is a letter or digit.
    patterns = (re.sub(r"^\b|\b$", r"\\b", re.escape(word)) for word in longest_first)
    return f"(?:{'|'.join(patterns) or '(?!)'})"


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a placeholder that is no single word, and for two of the same name."""
    for name in names:
        if not name or re.search(r"\s", name):
            raise ValueError(
                f"placeholder {name!r} is empty or has a space in it; use one like <cat> "
                "(--placeholder '<cat>', or --rename FILE='<cat>' for a finished word)"
            )
        if names.count(name) > 1:
            other = "give one another name: --rename FILE='<another>'"
            raise ValueError(f"two words are called {name}; {other}")


class Tokenizer:
    """The base of both tokenizers. Subclasses define `split`, a text's words, and `split_word`, the
    ids of a word."""

    special: tuple[str, ...]  # tokens that a text may name, such as "[SEP]"
    ids: dict[str, int]  # every token of the vocabulary
    vocab_size: int
    start_id: int
    end_id: int
    pad_id: int
    unknown_id: int | None = None  # CLIP's tokenizer has none: it knows every byte

    def __init__(self, max_length: int):
        self.max_length = max_length

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text without placeholders, without start and end."""
        ids: list[int] = []
        for piece in re.split(f"({any_of(self.special)})", text):
            if piece in self.special:
                ids.append(self.ids[piece])
            else:
                ids += [i for word in self.split(piece) for i in self.split_word(word)]
        return ids

    def token_ids(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """Return all ids of a text, placeholders expanded, without start and end, not cut off."""
        ids: list[int] = []
        for piece in re.split(f"({any_of(placeholders)})", nfc(text)):
            ids += placeholders[piece] if piece in placeholders else self.tokenize(piece)
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
        """Return a prompt as chunks of up to `max_length` - 2 tokens. CLIP encodes each by itself.

        As in A1111's web UI, a full chunk is cut after its last comma, if that is among its last 20
        tokens. The vectors of a learnt word stay in one chunk."""
        room, comma = self.max_length - 2, self.ids.get(",</w>")
        sizes = {ids[0]: len(ids) for ids in placeholders.values()}
        chunks: list[Tokens] = [[]]
        for i, weight in tokens:
            if len(chunk := chunks[-1]) == room and i not in (comma, BREAK):
                recent = range(max(0, room - 20), room)
                cut = max((k + 1 for k in recent if chunk[k][0] == comma), default=room)
                chunks[-1:] = [chunk[:cut], chunk[cut:]]
            if i == BREAK or (chunks[-1] and len(chunks[-1]) + sizes.get(i, 1) > room):
                chunks.append([])
            if i != BREAK:
                chunks[-1].append((i, weight))
        return chunks if chunks[-1] or not chunks[1:] else chunks[:-1]


# ------------------------------------------------------------------------------------ WordPiece

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD = 100  # characters; longer words are unknown
# Blocks of Chinese characters. Each character is a word of its own.
CJK = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)


class WordPieceTokenizer(Tokenizer):
    """The tokenizer of bert-base-uncased (Devlin et al. 2019), as the `tokenizers` library runs it.

    vocab: the tokens in the order of their ids, as in the published vocab.txt.
    """

    special = BERT_SPECIAL

    def __init__(self, vocab: Sequence[str], max_length: int = 77):
        super().__init__(max_length)
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.vocab_size = len(vocab)
        if missing := [token for token in self.special if token not in self.ids]:
            raise ValueError(f"not a WordPiece vocabulary: it has no {', '.join(missing)}")
        special = (self.ids[token] for token in self.special)
        self.pad_id, self.unknown_id, self.start_id, self.end_id, _ = special

    @classmethod
    def load(cls, path: str | Path, max_length: int = 77) -> "WordPieceTokenizer":
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return cls(lines, max_length)

    @staticmethod
    def split(text: str) -> list[str]:
        """Return lower-case words without accents. Each punctuation mark is a word."""
        category = unicodedata.category
        text = re.sub(r"[\t\n\r]", " ", text).replace("\ufffd", "")
        # Control and format characters are dropped, unassigned characters are not.
        text = "".join(c for c in text if category(c) not in ("Cc", "Cf", "Co", "Cs"))
        text = CJK.sub(r" \g<0> ", text)
        plain = unicodedata.normalize("NFD", text)
        plain = "".join(c.lower() for c in plain if category(c) != "Mn")
        marks = {c for c in plain if category(c)[0] == "P" or ("!" <= c <= "~" and not c.isalnum())}
        return "".join(f" {c} " if c in marks else c for c in plain).split()

    def split_word(self, word: str) -> list[int]:
        """Return the id of the longest piece the word begins with, then those of the rest."""
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.ids), None)
            if end is None or len(word) > MAX_WORD:
                return [self.unknown_id]
            pieces.append(self.ids[prefix + word[start:end]])
            start = end
        return pieces


# ------------------------------------------------------------------- CLIP's byte-pair encoding

# One printable character for each byte: itself, or the next free one for the 68 unprintable ones.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
BYTES = {b: chr(b) for b in PRINTABLE}
BYTES |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
# Python's \w has "_" among the letters and its \s has four control characters among the spaces;
# CLIP does not.
CLIP_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w\s]|[_\x1c-\x1f])+")


class CLIPTokenizer(Tokenizer):
    """CLIP's byte-pair encoding (Radford et al. 2021), as `transformers` 5 runs it.

    merges: pairs of symbols that become one, the most frequent first. Ids follow from their order:
    256 bytes, 256 bytes that end a word, one symbol per merge, start, end. pad_id: by default the
    end's, as in Stable Diffusion 1; in 2 it is 0.
    """

    special = ("<|startoftext|>", "<|endoftext|>")

    def __init__(
        self, merges: Sequence[tuple[str, str]], max_length: int = 77, pad_id: int | None = None
    ):
        super().__init__(max_length)
        symbols = [*BYTES.values(), *(symbol + "</w>" for symbol in BYTES.values())]
        symbols += [first + second for first, second in merges]
        self.ids = {symbol: i for i, symbol in enumerate([*symbols, *self.special])}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start_id, self.end_id = (self.ids[token] for token in self.special)
        self.pad_id = self.end_id if pad_id is None else pad_id
        self.vocab_size = len(symbols) + 2
        self.cache: dict[str, list[int]] = {}

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        max_length: int = 77,
        pad_id: int | None = None,
        vocab_size: int | None = None,
    ) -> "CLIPTokenizer":
        """Load CLIP's own merges, or a merges.txt, the one in a folder, or a tokenizer.json; only
        as many merges as `vocab_size` has room for. Raises ValueError if there are no merges.

        A vocab.json beside it is not read: it repeats what follows from the merges.
        """
        path = Path(path or VOCAB / "clip_merges.txt.gz")
        path = path / "merges.txt" if path.is_dir() else path
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = data.decode("utf-8").split("\n")
        lines = lines[lines[0].startswith("#version") :]
        if path.suffix == ".json":
            pairs = json.loads(data)["model"]["merges"]
            lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        merges = [tuple(line.split()) for line in lines if line]
        if any(len(pair) != 2 for pair in merges):
            raise ValueError(f"not a list of merges, two symbols a line: {path}")
        limit = None if vocab_size is None else max(0, vocab_size - 2 * len(BYTES) - 2)
        return cls(merges[:limit], max_length, pad_id)

    @staticmethod
    def split(text: str) -> Iterator[str]:
        """Yield lower-case words. Each digit is a word."""
        # Trap: character by character, since str.lower turns a capital sigma at the end into ς.
        for word in CLIP_WORDS.findall("".join(c.lower() for c in nfc(text))):
            # A digit is of Unicode's class N: isnumeric() is true also for ideographs such as 一,
            # which are letters.
            for digit, run in groupby(word, lambda c: c.isnumeric() and not c.isalpha()):
                chars = list(run)
                yield from chars if digit else ["".join(chars)]

    def split_word(self, word: str) -> list[int]:
        """Return the ids of a word: its bytes, of which the pair that ranks first is joined until
        no pair is left."""
        if word not in self.cache:
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
            self.cache[word] = [self.ids[part] for part in parts]
        return self.cache[word]


# ----------------------------------------------------------------------------- weights in prompts

# They are read as in AUTOMATIC1111's web UI. (Paper, appendix G: "prompt re-weighting" turns down a
# word that takes over the prompt.)
#     a (word)       1.1 times as strong          a [word]      weaker by the same factor
#     a (word:1.3)   1.3 times; brackets nest     a \(word\)    plain brackets
#     BREAK          the next chunk of 75 tokens begins here
# ComfyUI's "embedding:cat", or "embedding:cat.pt", is the word cat or <cat>.
# `LatentDiffusion.encode_prompts` applies the weights to the text encoder's output.
BRACKET = 1.1
PROMPT_PARTS = (
    r"|(?P<network><(?:lora|lyco|hypernet):[^<>]*>)"  # A1111's call of another network
    r"|(?P<name>\bembedding:[^\s,:()\[\]]+|<[^<>\s]+>)"
    r"|(?P<escaped>\\[()\[\]\\]?)"  # a bracket or backslash; any other backslash is dropped
    r"|(?P<open>[(\[])|(?P<end>(?::\s*[^\s\\()\[\]:|]+\s*)?[)\]])"  # ":1.2)", or just ")"
    r"|(?P<BREAK>\bBREAK\b)|(?P<text>(?s:.))"
)
Pieces = list[tuple[str | None, float]]  # texts, None for BREAK, with their weights


def split_weights(prompt: str, words: Collection[str] = ()) -> Pieces:
    """Return the pieces of a prompt, each with its weight, brackets and escapes resolved.

    An open bracket that is never closed reaches to the end; one that only closes is plain text.
    words: the learnt words, which are read before all else. Warns of what is not supported. Raises
    ValueError for a weight that is not a number or too large.
    """
    pieces: Pieces = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # indices in `pieces` where each begins

    def close(bracket: str, factor: float) -> None:
        first = opened[bracket].pop()
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]

    for match in re.finditer(f"(?P<word>{any_of(words)}){PROMPT_PARTS}", nfc(prompt)):
        part, kind = match[0], match.lastgroup
        bracket = {")": "(", "]": "["}.get(part[-1])
        if kind == "open":
            opened[part].append(len(pieces))
        elif kind == "end" and opened[bracket]:
            inside = "".join(text or "" for text, _ in pieces[opened[bracket][-1] :])
            text, factor = bracket_end(inside, part, words)
            pieces.append((text, 1.0))
            close(bracket, factor)
        else:
            pieces.append((plain_text(part, kind, words), 1.0))
    for bracket, factor in (("(", BRACKET), ("[", 1 / BRACKET)):
        while opened[bracket]:
            close(bracket, factor)
    if not all(math.isfinite(weight) for _, weight in pieces):
        raise ValueError(f"{prompt[:80]!r}: a weight is too large; the useful ones are 0.5 to 1.5")
    runs = groupby(pieces, key=lambda piece: (piece[0] is None, piece[1]))
    return [(None if end else "".join(t for t, _ in run), weight) for (end, weight), run in runs]


def bracket_end(inside: str, end: str, words: Collection[str]) -> tuple[str, float]:
    """Return the text and the factor of a bracket's end: "", 1.2 for ":1.2)", but ":D", 1.1 for
    ":D)". inside: the text in the bracket.

    Raises ValueError for what is meant as a weight but is not a number: digits with a comma or
    several points, unless they follow another number, or what follows a learnt word and a colon.
    """
    given = end[1:-1].strip()
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", given)
    if end[-1] == "]":
        if number or "|" in inside:
            note = "is not supported; it is read as plain text in a bracket"
            warnings.warn(f"[{inside}{end} {note}")
        return end[:-1], 1 / BRACKET
    digits = re.fullmatch(r"[+-]*[\d.,]*\d[\d.,]*", given) and not re.search(r"\b[\d.,]+$", inside)
    follows = re.search(f"({any_of(words)}|>)$", inside) and re.match(r":\S*\w", end)
    if not number and (digits or follows):
        raise ValueError(f"({inside[-60:]}{end}: {given!r} is no weight; write (word:1.2)")
    return ("", float(given)) if number else (end[:-1], BRACKET)


def plain_text(part: str, kind: str, words: Collection[str]) -> str | None:
    """Return the text of one part of a prompt, None for BREAK. Warns of unknown words."""
    if kind == "name":
        names = {name: word for word in words for name in (word.strip("<>"), word)}
        name = part.removeprefix("embedding:")
        if word := names.get(name) or names.get(re.sub(r"\.\w*$", "", name)):
            return word
        known = ", ".join(words) or "none"
        warnings.warn(f"{part} is no learnt word (known: {known}); it is read as plain text")
    elif kind == "network":
        warnings.warn(f"{part} is not supported; it is left out of the prompt")
    return {"network": "", "BREAK": None, "escaped": part[1:]}.get(kind, part)


def without_weights(prompt: str, words: Collection[str] = ()) -> str:
    """Return the prompt's text without brackets and weights."""
    return "".join(" " if text is None else text for text, _ in split_weights(prompt, words))
