"""Text to token ids: BERT's WordPiece (LDM) and CLIP's byte-pair encoding (Stable Diffusion), and
weights in prompts.

Placeholders, the new words of textual inversion, are cut out of the text before anything else reads
it (paper, section 3: "a string containing our placeholder word is first converted into tokens").
So they are matched case by case, are never split, and may be any string without spaces, but they
are not found inside another word. `nfc` makes them equal however they were typed.
"""

import gzip
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

VOCAB = Path(__file__).parent / "vocab"
Placeholders = Mapping[str, Sequence[int]]  # {"<cat>": its V consecutive ids}
nfc = partial(unicodedata.normalize, "NFC")  # Unicode's form in which names are compared


def any_of(words: Iterable[str]) -> str:
    """Return a pattern with one group for any of the words, the longest first, each only where it
    stands by itself: "my-cat" is not found in "my-cats"."""

    def whole(word: str) -> str:
        before = r"(?<!\w)" if re.match(r"\w", word) else ""
        after = r"(?!\w)" if re.search(r"\w$", word) else ""
        return before + re.escape(word) + after

    return "(" + "|".join(map(whole, sorted(words, key=len, reverse=True))) + ")"


def is_one_word(placeholder: str) -> bool:
    """Return whether a placeholder is neither empty nor has a space in it."""
    return bool(placeholder) and not re.search(r"\s", placeholder)


class Tokenizer:
    """The base of both tokenizers. Subclasses define `tokenize` and the special ids."""

    ids: dict[str, int]  # every token of the vocabulary
    vocab_size: int
    start_id: int
    end_id: int
    pad_id: int
    unknown_id: int | None = None  # CLIP's tokenizer has none, it knows every byte

    def __init__(self, max_length: int):
        self.max_length = max_length

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text without placeholders, without start and end."""
        raise NotImplementedError

    def token_ids(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """Return all ids of a text, placeholders expanded, without start and end, not cut off."""
        if not placeholders:
            return self.tokenize(text)
        ids: list[int] = []
        for piece in re.split(any_of(placeholders), nfc(text)):
            ids += placeholders[piece] if piece in placeholders else self.tokenize(piece)
        return ids

    def encode(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """Return the ids with start and end, at most `max_length`, without padding."""
        return self.frame(self.token_ids(text, placeholders))

    def frame(self, ids: list[int]) -> list[int]:
        """Return start, as many of the ids as fit, and end."""
        return [self.start_id, *ids[: self.max_length - 2], self.end_id]

    def pad(self, ids: list[int]) -> list[int]:
        return ids + [self.pad_id] * (self.max_length - len(ids))


# ------------------------------------------------------------------------------------ WordPiece

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_SPECIAL_PATTERN = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])")
MAX_WORD = 100  # characters; longer words are unknown
# Blocks of Chinese characters. Each character is a word of its own.
CJK = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)


class WordPieceTokenizer(Tokenizer):
    """The tokenizer of bert-base-uncased (Devlin et al. 2019), as the `tokenizers` library runs it.

    vocab: the tokens in the order of their ids, one per line in the published vocab.txt.
    """

    def __init__(self, vocab: Sequence[str], max_length: int = 77):
        super().__init__(max_length)
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.vocab_size = len(vocab)
        missing = [token for token in BERT_SPECIAL if token not in self.ids]
        if missing:
            raise ValueError(f"not a WordPiece vocabulary: it has no {', '.join(missing)}")
        special = [self.ids[token] for token in BERT_SPECIAL]
        self.pad_id, self.unknown_id, self.start_id, self.end_id, _ = special

    @classmethod
    def load(cls, path: str | Path, max_length: int = 77) -> "WordPieceTokenizer":
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return cls(lines, max_length)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in BERT_SPECIAL_PATTERN.split(text):
            if piece in BERT_SPECIAL:
                ids.append(self.ids[piece])
            else:
                for word in self.split(piece):
                    ids += self.split_word(word)
        return ids

    @staticmethod
    def split(text: str) -> list[str]:
        """Return lower-case words without accents. Each punctuation mark is a word."""
        category = unicodedata.category
        text = re.sub(r"[\t\n\r]", " ", text).replace("\ufffd", "")
        # Control characters and their like vanish, unassigned characters do not.
        text = "".join(c for c in text if category(c) not in ("Cc", "Cf", "Co", "Cs"))
        text = CJK.sub(r" \g<0> ", text)
        plain = unicodedata.normalize("NFD", text)
        plain = "".join(c.lower() for c in plain if category(c) != "Mn")

        def is_punctuation(c: str) -> bool:
            return category(c)[0] == "P" or ("!" <= c <= "~" and not c.isalnum())

        return "".join(f" {c} " if is_punctuation(c) else c for c in plain).split()

    def split_word(self, word: str) -> list[int]:
        """Return the longest piece in the vocabulary, then the longest of the rest, and so on."""
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

CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# One printable character for each byte: itself, or the next free one for the 68 unprintable ones.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
BYTES = {b: chr(b) for b in PRINTABLE}
BYTES |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
# Python's \w counts "_" among the letters and its \s counts four control characters among the
# spaces; CLIP does not.
CLIP_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w\s]|[_\x1c-\x1f])+")


class CLIPTokenizer(Tokenizer):
    """CLIP's byte-pair encoding (Radford et al. 2021), as `transformers` 5 runs it.

    merges: pairs of symbols that become one, the most frequent first. The ids follow from them: 256
    bytes, 256 bytes that end a word, one symbol per merge, start, end. pad_id: end_id in Stable
    Diffusion 1, 0 in 2.
    """

    def __init__(
        self, merges: Sequence[tuple[str, str]], max_length: int = 77, pad_id: int | None = None
    ):
        super().__init__(max_length)
        symbols = [*BYTES.values(), *(symbol + "</w>" for symbol in BYTES.values())]
        symbols += [first + second for first, second in merges]
        self.ids = {symbol: i for i, symbol in enumerate([*symbols, *CLIP_SPECIAL])}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start_id, self.end_id = (self.ids[token] for token in CLIP_SPECIAL)
        self.pad_id = self.end_id if pad_id is None else pad_id
        self.vocab_size = len(symbols) + 2
        self.special = re.compile("(" + "|".join(map(re.escape, CLIP_SPECIAL)) + ")")
        self.cache: dict[str, list[int]] = {}

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        max_length: int = 77,
        pad_id: int | None = None,
        vocab_size: int | None = None,
    ) -> "CLIPTokenizer":
        """Load CLIP's own merges, or a merges.txt, or the folder it is in; only as many merges as
        `vocab_size` has room for. Raises ValueError if the file is no list of merges.

        The vocab.json of such a folder only repeats the order that follows from the merges.
        """
        path = Path(path or VOCAB / "clip_merges.txt.gz")
        path = path / "merges.txt" if path.is_dir() else path
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = data.decode("utf-8").split("\n")
        lines = lines[lines[0].startswith("#version") :]
        merges = [tuple(line.split()) for line in lines if line]
        if any(len(pair) != 2 for pair in merges):
            raise ValueError(f"not a list of merges, two symbols a line: {path}")
        limit = None if vocab_size is None else max(0, vocab_size - 2 * len(BYTES) - 2)
        return cls(merges[:limit], max_length, pad_id)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self.special.split(text):
            if piece in CLIP_SPECIAL:
                ids.append(self.ids[piece])
                continue
            # Character by character: str.lower would also turn a last capital sigma into ς.
            piece = "".join(c.lower() for c in unicodedata.normalize("NFC", piece))
            for word in CLIP_WORDS.findall(piece):
                # Every digit is a word: Unicode's class N, which is isnumeric() without
                # ideographs such as 一, which are letters at the same time.
                for digit, chars in groupby(word, lambda c: c.isnumeric() and not c.isalpha()):
                    for part in chars if digit else ["".join(chars)]:
                        ids += self.split_word(part)
        return ids

    def split_word(self, word: str) -> list[int]:
        """Return the ids of a word: starting from bytes, join the pair that ranks first, again and
        again."""
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

# As AUTOMATIC1111's web UI reads them (paper, appendix G: a word that takes over the prompt can be
# turned down by "prompt re-weighting"):
#     a (word)       1.1 times as strong          a [word]      weaker by the same factor
#     a (word:1.3)   1.3 times; brackets nest     a \(word\)    plain brackets
# `LatentDiffusion.encode_prompts` applies the weights to the text encoder's output.
BRACKET = 1.1
PROMPT_PARTS = re.compile(
    r"\\[()\[\]\\]?"  # an escaped bracket or backslash; a backslash alone is dropped
    r"|[(\[]"
    r"|:\s*[+-]?[.\d]+\s*\)"  # the number that a round bracket may end with
    r"|[)\]:]"
    r"|[^\\()\[\]:]+"
)


def split_weights(prompt: str) -> list[tuple[str, float]]:
    """Return the prompt as pieces of text with one weight each, brackets and escapes resolved.

    A bracket that is never closed reaches to the end; one that was never opened is plain text.
    Raises ValueError for a weight that is no number, or too large for one.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `pieces` each one begins

    def close(bracket: str, factor: float) -> None:
        first = opened[bracket].pop()
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]

    for part in PROMPT_PARTS.findall(nfc(prompt)):
        if part in opened:
            opened[part].append(len(pieces))
        elif part == "]" and opened["["]:
            close("[", 1 / BRACKET)
        elif part == ")" and opened["("]:
            close("(", BRACKET)
        elif part[0] == ":" and part[-1] == ")" and opened["("]:
            try:
                close("(", float(part[1:-1]))
            except ValueError:
                raise ValueError(
                    f"{prompt[:80]!r}: {part[1:-1].strip()!r} is no weight; write (word:1.2)"
                ) from None
        else:
            pieces.append((part[1:] if part[0] == "\\" else part, 1.0))
    for bracket, factor in (("(", BRACKET), ("[", 1 / BRACKET)):
        while opened[bracket]:
            close(bracket, factor)
    if not all(math.isfinite(weight) for _, weight in pieces):
        raise ValueError(f"{prompt[:80]!r}: a weight is too large; the useful ones are 0.5 to 1.5")
    runs = groupby(pieces, key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), weight) for weight, run in runs]


def escape(text: str) -> str:
    """Return the text with its brackets escaped, so that they are read as plain text."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def without_weights(prompt: str) -> str:
    """Return the prompt's text without brackets and weights."""
    return "".join(text for text, _ in split_weights(prompt))
