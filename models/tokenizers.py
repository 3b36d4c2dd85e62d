"""Text to token ids: BERT's WordPiece (LDM) and CLIP's byte-pair encoding (Stable Diffusion).

Both follow their original programs id by id. Placeholders, the new words of textual inversion,
are cut out of the text before anything else sees it, so they are matched case-exactly, are never
split, and any string will do (paper, section 3: "a string containing our placeholder word is
first converted into tokens").
"""

import gzip
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from html.entities import html5
from itertools import groupby, pairwise
from pathlib import Path

Placeholders = Mapping[str, Sequence[int]]  # {"<cat>": its V consecutive ids}


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

    def words(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """All ids of the text, placeholders expanded, without start and end, not truncated."""
        if not placeholders:
            return self.tokenize(text)
        longest_first = sorted(placeholders, key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        ids: list[int] = []
        for piece in pieces:
            ids += placeholders[piece] if piece in placeholders else self.tokenize(piece)
        return ids

    def encode(self, text: str, placeholders: Placeholders = {}) -> list[int]:
        """Ids with start and end, at most `max_length` of them, without padding."""
        words = self.words(text, placeholders)[: self.max_length - 2]
        return [self.start_id, *words, self.end_id]

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
        return cls(Path(path).read_text(encoding="utf-8").split("\n")[:-1], max_length)

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


# ------------------------------------------------------------- damaged text, mended as ftfy does


def code_page(name: str) -> dict[str, int]:
    """The byte of each character. Windows' unused bytes are control characters, and 1A, one of
    them, stands for a character that got lost."""
    chars = bytes(range(256)).decode(name, "replace")
    page = {chr(b) if c == "\ufffd" else c: b for b, c in enumerate(chars)}
    if name in WINDOWS:
        page["\ufffd"] = page.pop("\x1a")
    return page


def decoded(first: int, last: int) -> str:
    """All characters that a byte from first to last is in Windows' encodings and Latin-1."""
    pages = [PAGES[name] for name in ("latin-1", *WINDOWS)]
    return "".join({c for page in pages for c, b in page.items() if first <= b <= last})


# Programs that took UTF-8 for one of these made "cafÃ©" of "café". They are tried in this order.
WINDOWS = ("cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257")
PAGES = {
    name: code_page(name) for name in ("latin-1", *WINDOWS, "iso-8859-2", "mac-roman", "cp437")
}
WINDOWS_CONTROLS = {b: c for c, b in PAGES["cp1252"].items() if 0x80 <= b < 0xA0}
REST = decoded(0x80, 0xBF)  # what follows the first byte of a character
STRICT_REST = REST.translate(str.maketrans("", "", "–—―‘’‚“”„•…"))
UTF8 = re.compile(
    f"(?<![{STRICT_REST}])(?:[{decoded(0xC2, 0xDF)}][ {REST}]|[{decoded(0xE0, 0xEF)}][ {REST}]{{2}}"
    f"|[{decoded(0xF0, 0xF0)}{decoded(0xF3, 0xF3)}][ {REST}]{{3}})+"
)
LOST_A0 = re.compile(  # byte A0, a space in most encodings, has become an ordinary space
    rb"[\xc2\xc3\xc5\xce\xd0\xd9] |[\xe2\xe3] [\x80-\x84\x86-\x9f\xa1-\xbf]"
    rb"|[\xe0-\xe3][\x80-\x84\x86-\x9f\xa1-\xbf] "
    rb"|\xf0(?: [\x80-\xbf]{2}|[\x80-\xbf] [\x80-\xbf]|[\x80-\xbf]{2} )"
)
LOST_BYTE = re.compile(  # some byte of a character has become 1A, or one of them a question mark
    rb"[\xc2-\xdf]\x1a|[\xc2\xc3]\?"
    rb"|\xed[\xa0-\xaf][\x1a?]\xed[\xb0-\xbf][\x1a?\x80-\xbf]"
    rb"|\xed[\xa0-\xaf][\x1a?\x80-\xbf]\xed[\xb0-\xbf][\x1a?]"
    rb"|[\xe0-\xef](?:[\x1a?][\x1a\x80-\xbf]|[\x1a\x80-\xbf][\x1a?])"
    rb"|[\xf0-\xf4](?:[\x1a?][\x1a\x80-\xbf]{2}|[\x1a\x80-\xbf][\x1a?][\x1a\x80-\xbf])"
    rb"|[\xf0-\xf4][\x1a\x80-\xbf]{2}[\x1a?]|\x1a"
)

# Neighbours that nobody writes on purpose: sequences of characters and of classes of characters.
CLASSES = {
    "control": "\x80-\x9f",
    "common": "\xa0\xad·´–—―…’",
    "bad": "¦¤¨¬¯¸ƒˆˇ˘˛˜†‡‰⌐◊\ufffdªº",
    "law": "¶§",
    "money": "¢£¥₧€",
    "open": "¡«¿©΄΅‘‚“„•‹\uf8ff",
    "close": "®»˝”›™",
    "math": "²³¹±¼½¾×µ÷⁄∂∆∏∑√∞∩∫≈≠≡≤≥№",
    "face": "Ò-ÖÙ-Üò-öø-üŐŌŪŲ°",  # as in ┌(°O°)┘
    "upper": "À-ÑØÜÝĂĀĄĆČĎĐĘĚĒĖĞĢİĪĶĹĽŁĻŃŇŅŒŘŚŞŠŢŤŮŰŸŹŻŽҐ",
    "lower": "ßà-ñăąāćčďđęěēėğģįīķĺľłļœŕśşšťüźżžґﬁﬂ",
    "greek_cyrillic": "ÞΑ-ΩΆΈΉΊΌΎΏΪΫЁ-Яα-ωάέήίΰа-џ",
    "small": "α-ωάέήίΰа-џ",
    "box": "│┌┐┘├┤┬┼═-╬▀▄█▌▐░▒▓",
}
SUSPECT = r"""[{control}]
[{bad}{lower}{upper}{box}{open}{close}{money}{math}{law}][{bad}]|[a-zA-Z][{greek_cyrillic}][{bad}]
[{bad}][{lower}{upper}{box}{open}{close}{money}{math}{law}]|[{box}{close}{money}{math}][{lower}]
[{lower}{small}{box}{close}{money}{math}][{upper}]|[{lower}{box}{close}][{money}]
\s[{upper}][{money}]|[a-z][{upper}][{open}{money}]|[{upper}{box}][{math}{law}]|[{upper}]°
[{lower}{upper}{box}{money}{close}][{open}][{math}]|[{lower}{upper}][{open}{close}]\w
[{lower}{upper}{money}{math}{box}{law}][{close}][{open}]|[{money}{math}{box}][{open}]
[{lower}{upper}{money}{math}{open}{close}{law}][{box}]|[{box}][{face}{close}]
[ÂÃÎÐ][€œŠš¢£Ÿž\xa0\xad®©°·»{open}{close}–—´]|Ã[\xa0¡]|(?:[a-z]\s?|^)[ÃÂ] |[Œœ][^A-Za-z]
[a-z.,?!{close}]Â[ {open}{close}]|(?:[ØÙ][{common}{money}{bad}{math}{open}ŸŠ®°µ»]){{2}}
×[²³]|à[²µ¹¼½¾]|√[±∂†≠®™´≤≥¥µø]|≈[°¢]|‚Ä[ìîïòôúùû†°¢π]|‚[âó][àä°ê]|вЂ|ā€|ГўВЂВ.[A-Za-z ]
[ВГРС][{control}{bad}{open}{close}{money}°µ][ВГРС]|β€[™\xa0Ά\xad®°]
[ΒΓΞΟ][{control}{bad}{open}{close}{money}°][ΒΓΞΟ]"""
SUSPECT = re.compile(SUSPECT.format(**CLASSES).replace("\n", "|"))

PLAIN = ["\u3000", *"ĲĳǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ", *map(chr, range(0xFF01, 0xFFF0))]
PLAIN = {c: unicodedata.normalize("NFKC", c) for c in PLAIN}  # ligatures, full and half width
PLAIN |= {"ﬅ": "ſt", "ŉ": "'n", "\r": "\n", "\u2028": "\n", "\u2029": "\n"}
PLAIN |= dict.fromkeys("ʼ‘’‚‛", "'") | dict.fromkeys("“”„‟", '"')
PLAIN = str.maketrans(PLAIN)
INVISIBLE = re.compile(  # colours of a terminal; control characters
    r"\x1b\[[\d;]*[a-zA-Z]|[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
)
CAPITALS = {name.upper() for name in html5 if name.islower()}


def fix_text(text: str) -> str:
    """What `ftfy.fix_text` makes of a text; CLIP's tokenizer starts with it.

    The rules are those of ftfy 6.3 (Robyn Speer, Apache-2.0), written anew and more briefly:
    straight quotes, letters for ligatures and full-width forms, characters for HTML entities
    (unless there is a "<"), no control characters, NFC, and "café" for "cafÃ©". Left out:
    lines of more than a million characters, which ftfy mends in pieces.
    """
    lines, entities = [], True
    for line in re.split(r"(?<=\n)", text):
        entities = entities and "<" not in line  # nor in any line before it
        before = None
        while line != before:
            before = line
            if entities:
                line = re.sub("&#?[0-9A-Za-z]{1,24};", unescape, line)
            line = fix_encoding(line).replace("\r\n", "\n").translate(PLAIN)
            line = line.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            line = unicodedata.normalize("NFC", INVISIBLE.sub("", line))
        lines.append(line)
    return "".join(lines)


def unescape(entity: re.Match) -> str:
    """Complete entities only, unlike html.unescape, and in capitals, too: É for &EACUTE;."""
    text, name = entity[0], entity[0][1:]
    plain = html.unescape(text)
    if name in html5 or (name[0] == "#" and ";" not in plain):
        return plain
    return html5[name.lower()].upper() if plain == text and name in CAPITALS else text


def fix_encoding(text: str) -> str:
    """Undoes wrong decodings, one after the other, as long as the text looks like one."""
    if text.isascii() or not SUSPECT.search(text):
        return text
    for name, page in PAGES.items():
        if not page.keys() >= set(text):
            continue
        data = bytes(page[c] for c in text)
        if name != "mac-roman":
            data = re.sub(rb"\xc3 (?! |quele|quela|quilo|s )", b"\xc3\xa0 ", data)
            data = LOST_A0.sub(lambda match: match[0].replace(b" ", b"\xa0"), data)
        if name in WINDOWS:
            data = LOST_BYTE.sub("\ufffd".encode(), data)
        try:  # a zero in two bytes and a character as two surrogates, as in Java, will do
            mended = data.replace(b"\xc0\x80", b"\0").decode("utf-8", "surrogatepass")
            mended = mended.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            break
        except UnicodeDecodeError:
            continue
    else:  # not as a whole: what looks like UTF-8 by itself, then control characters
        mended = UTF8.sub(lambda part: part[0] if part[0] == text else fix_encoding(part[0]), text)
        mended = text.translate(WINDOWS_CONTROLS) if mended == text else mended
    return text if mended == text else fix_encoding(mended)
