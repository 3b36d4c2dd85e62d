"""Damaged text, mended as `ftfy` does; OpenAI's CLIP tokenizer runs it on every prompt.

The rules are those of ftfy 6.3 (Robyn Speer, Apache License 2.0), written anew and more briefly.
Prompts need little of it (straight quotes, full-width letters), but ids must be exact.
"""

import html
import re
import unicodedata
from html.entities import html5


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
