"""Text to token ids: BERT's WordPiece (LDM) and CLIP's byte-pair encoding (Stable Diffusion).

Both follow their original programs id by id. Placeholders, the new words of textual inversion,
are cut out of the text before anything else sees it, so they are matched case-exactly, are never
split, and any string will do, but not inside another word (paper, section 3: "a string containing
our placeholder word is first converted into tokens").
"""

import gzip
import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path

from .mending import fix_text

Placeholders = Mapping[str, Sequence[int]]  # {"<cat>": its V consecutive ids}


def whole(word: str) -> str:
    """A pattern for the word where it stands by itself: "my-cat" is not in "my-cats"."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return before + re.escape(word) + after


def any_of(words: Iterable[str]) -> str:
    """A pattern with one group for any of the words, the longest that fits."""
    return "(" + "|".join(map(whole, sorted(words, key=len, reverse=True))) + ")"


class Tokenizer:
    """What the two tokenizers share. Subclasses give `tokenize` and the special ids."""

    vocab_size: int
    start_id: int
    end_id: int
    pad_id: int

    def __init__(self, max_length: int):
        self.max_length = max_length

    def tokenize(self, text: str) -> list[int]:
        """Ids of a piece of text, without start and end."""
        raise NotImplementedError

    def token_ids(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """All ids of the text, placeholders expanded, without start and end, not truncated."""
        if not placeholders:
            return self.tokenize(text)
        ids: list[int] = []
        for piece in re.split(any_of(placeholders), text):
            ids += placeholders[piece] if piece in placeholders else self.tokenize(piece)
        return ids

    def encode(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """Ids with start and end, at most `max_length` of them, without padding."""
        return self.frame(self.token_ids(text, placeholders))

    def frame(self, ids: list[int]) -> list[int]:
        """Start and end around as many of the ids as fit."""
        return [self.start_id, *ids[: self.max_length - 2], self.end_id]

    def pad(self, ids: list[int]) -> list[int]:
        return ids + [self.pad_id] * (self.max_length - len(ids))


# ------------------------------------------------------------------------------------ WordPiece

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD = 100  # characters; longer words are unknown

# Blocks of Chinese characters, each of which is a word of its own.
CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def is_punctuation(c: str) -> bool:
    """Unicode punctuation, or any ASCII sign that is no letter, digit or space."""
    return unicodedata.category(c)[0] == "P" or ("!" <= c <= "~" and not c.isalnum())


class WordPieceTokenizer(Tokenizer):
    """bert-base-uncased (Devlin et al. 2019), as the `tokenizers` library runs it.

    vocab: the tokens in the order of their ids, one a line in the published vocab.txt.
    """

    def __init__(self, vocab: Sequence[str], max_length: int = 77):
        super().__init__(max_length)
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.vocab_size = len(vocab)
        missing = [token for token in BERT_SPECIAL if token not in self.ids]
        if missing:
            raise ValueError(f"not a WordPiece vocabulary: it has no {', '.join(missing)}")
        self.pad_id, self.unknown_id, self.start_id, self.end_id, _ = (
            self.ids[token] for token in BERT_SPECIAL
        )

    @classmethod
    def load(cls, path: str | Path, max_length: int = 77) -> "WordPieceTokenizer":
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return cls(lines, max_length)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", text):
            if piece in BERT_SPECIAL:
                ids.append(self.ids[piece])
            else:
                for word in self.split(piece):
                    ids += self.split_word(word)
        return ids

    @staticmethod
    def split(text: str) -> list[str]:
        """Lower-case words without accents; every punctuation mark is a word of its own."""
        spaced = []
        for c in text:
            if c in "\t\n\r" or unicodedata.category(c) in ("Zs", "Zl", "Zp"):
                spaced.append(" ")
            elif unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") or c == "\ufffd":
                continue  # control characters and their like vanish, unassigned ones do not
            elif any(low <= ord(c) <= high for low, high in CJK):
                spaced.append(f" {c} ")
            else:
                spaced.append(c)
        plain = unicodedata.normalize("NFD", "".join(spaced))
        plain = "".join(c.lower() for c in plain if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if is_punctuation(c) else c for c in plain).split()

    def split_word(self, word: str) -> list[int]:
        """The longest piece in the vocabulary, then the longest of the rest, and so on."""
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

MERGES = Path(__file__).parent / "vocab" / "clip_merges.txt.gz"
OPENAI_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
OPEN_CLIP_SPECIAL = ("<start_of_text>", "<end_of_text>")
# One printable character for each byte: itself, or for the 68 unprintable ones the next free one.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
BYTES = {b: chr(b) for b in PRINTABLE}
BYTES |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


class CLIPTokenizer(Tokenizer):
    """CLIP's byte-pair encoding (Radford et al. 2021), as OpenAI's and open_clip's code run it.

    merges: pairs of symbols that become one, the most frequent first. The ids follow from them:
    256 bytes, 256 bytes that end a word, one symbol per merge, start, end. pad_id is end_id in
    Stable Diffusion 1 and 0 in 2. special: how start and end are written where a prompt spells
    them out; OPEN_CLIP_SPECIAL with Stable Diffusion 2 as a single file.
    """

    def __init__(
        self,
        merges: Sequence[tuple[str, str]],
        max_length: int = 77,
        pad_id: int | None = None,
        special: tuple[str, str] = OPENAI_SPECIAL,
    ):
        super().__init__(max_length)
        symbols = [*BYTES.values(), *(symbol + "</w>" for symbol in BYTES.values())]
        symbols += [first + second for first, second in merges]
        self.ids = {symbol: i for i, symbol in enumerate([*symbols, *special])}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start_id, self.end_id = (self.ids[token] for token in special)
        self.pad_id = self.end_id if pad_id is None else pad_id
        self.vocab_size = len(symbols) + 2
        # Letters and digits, or other signs; \w counts "_" among the former, CLIP does not.
        # U+0345, a mark whose capital is a letter, is neither to the module `regex` it uses.
        self.pattern = re.compile(
            "|".join(map(re.escape, special))
            + r"|'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w\s\u0345]|_)+",
            re.IGNORECASE,
        )
        self.cache = {token: [self.ids[token]] for token in special}

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        max_length: int = 77,
        pad_id: int | None = None,
        vocab_size: int | None = None,
        special: tuple[str, str] = OPENAI_SPECIAL,
    ) -> "CLIPTokenizer":
        """CLIP's own merges, or a merges.txt, or the folder it is in; all that `vocab_size` holds.

        The vocab.json of such a folder only repeats the order that follows from the merges.
        """
        path = Path(path or MERGES)
        path = path / "merges.txt" if path.is_dir() else path
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = data.decode("utf-8").split("\n")
        lines = lines[lines[0].startswith("#version") :]
        merges = [tuple(line.split()) for line in lines if line]
        if any(len(pair) != 2 for pair in merges):
            raise ValueError(f"not a list of merges, two symbols a line: {path}")
        limit = None if vocab_size is None else max(0, vocab_size - 2 * len(BYTES) - len(special))
        return cls(merges[:limit], max_length, pad_id, special)

    def tokenize(self, text: str) -> list[int]:
        text = html.unescape(html.unescape(fix_text(text)))
        ids: list[int] = []
        for piece in self.pattern.findall(" ".join(text.split()).lower()):
            # Every digit is a word of its own: Unicode's class N, which isnumeric() is but for
            # ideographs such as 一, letters at the same time.
            for digit, chars in groupby(piece, lambda c: c.isnumeric() and not c.isalpha()):
                for word in chars if digit else ["".join(chars)]:
                    ids += self.split_word(word)
        return ids

    def split_word(self, word: str) -> list[int]:
        """Starting from bytes, always joins the pair that comes first in the merges."""
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
