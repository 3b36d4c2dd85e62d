"""Weights in prompts, as AUTOMATIC1111's web UI reads them (paper, appendix G: a learnt word that
takes over the prompt can be turned down by "prompt re-weighting").

    a (word)          1.1 times as strong          a [word]      weaker by the same factor
    a (word:1.3)      1.3 times; brackets nest      a \\(word\\)    plain brackets

What the weights do to the text encoder's output: `LatentDiffusion.encode_prompts`.
"""

import math
import re
from itertools import groupby

STEP = 1.1  # what a bracket without a number multiplies by, or divides by if it is square
TOKENS = re.compile(
    r"\\[()\[\]\\]?"  # an escaped bracket or backslash; a backslash alone is dropped
    r"|[(\[]"
    r"|:\s*[+-]?[.\d]+\s*\)"  # the number that a round bracket may end with
    r"|[)\]:]"
    r"|[^\\()\[\]:]+"
)


def split_weights(prompt: str) -> list[tuple[str, float]]:
    """The prompt as pieces of one weight each, brackets and escapes resolved.

    A bracket that is never closed holds to the end; one that was never opened is plain text. Raises
    ValueError for a weight that is no number, or too large for one.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `pieces` each one begins

    def close(bracket: str, factor: float) -> None:
        first = opened[bracket].pop()
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]

    for token in TOKENS.findall(prompt):
        if token in opened:
            opened[token].append(len(pieces))
        elif token == "]" and opened["["]:
            close("[", 1 / STEP)
        elif token == ")" and opened["("]:
            close("(", STEP)
        elif token[0] == ":" and token[-1] == ")" and opened["("]:
            close("(", number(token[1:-1], prompt))
        else:
            pieces.append((token[1:] if token[0] == "\\" else token, 1.0))
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[bracket]:
            close(bracket, factor)
    if not all(math.isfinite(weight) for _, weight in pieces):
        raise ValueError(f"{prompt[:80]!r}: a weight is too large; the useful ones are 0.5 to 1.5")
    runs = groupby(pieces, key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), weight) for weight, run in runs]


def number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{prompt[:80]!r}: {text.strip()!r} is no weight; write (word:1.2)"
        ) from None


def escape(text: str) -> str:
    """Text whose brackets are to be read as they stand."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def without_weights(prompt: str) -> str:
    """The prompt's text alone."""
    return "".join(text for text, _ in split_weights(prompt))
