"""What the paper measures (section 5.1): scores in CLIP's space, and their confidence intervals.

A `Scorer` makes features of pictures and texts, unit vectors in CLIP's space; the measures are
plain functions of such features, or of numbers:

    scorer = Scorer.load("ViT-B-32.pt")
    drawn, images = scorer.images(samples), scorer.images(training_set)
    text = scorer.texts([without_placeholder("A photo of <cat> on the moon", "<cat>")])
    reconstruction(drawn, images), editability(drawn, text)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .checkpoint import BUNDLED, load_clip
from .clip import CLIP, preprocess
from .tokenizers import CLIPTokenizer, Tokenizer, WordPieceTokenizer

PROMPTS = Path(__file__).parent / "evaluation_prompts.txt"
KINDS = ("background", "style", "composition")
BATCH = 32  # pictures or texts at a time


@dataclass
class Scorer:
    """CLIP with what stands before it: `preprocess` for pictures, the tokenizer for texts."""

    clip: CLIP
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: str | Path | None = None, device: str | torch.device = "cpu") -> "Scorer":
        """path: what `load_clip` takes. The paper measures with "the official CLIP ViT-B/32
        checkpoint" (appendix F); None is the small CLIP of the bundled model, which knows little
        more than emoji. Raises ValueError in one line for anything that is no CLIP.
        """
        clip = load_clip(path)
        size, length = clip.config.text.vocab_size, clip.config.text.max_length
        if path is None:
            tokenizer: Tokenizer = WordPieceTokenizer.load(BUNDLED / "vocab.txt", length)
        else:
            merges = next(Path(path).glob("merges.txt"), None)
            tokenizer = CLIPTokenizer.load(merges, length, vocab_size=size)
        if (known := tokenizer.vocab_size) != size:
            raise ValueError(f"{path}: knows {size} tokens, its vocabulary has {known}")
        return cls(clip.to(device), tokenizer)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (N, D) of N pictures of any size and mode: unit vectors, float32, on the CPU."""
        size, device = self.clip.config.vision.image_size, self.clip.logit_scale.device
        encode = lambda rows: self.clip.encode_image(preprocess(rows, size).to(device))
        return features(images, encode)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (M, D) of M texts, of which CLIP reads 75 tokens; otherwise as `images`.

        Nothing depends on what pads a row: the tower is causal, and read at the row's first end.
        """
        rows = [self.tokenizer.pad(self.tokenizer.encode(text)) for text in texts]
        ids, end_id = torch.tensor(rows, device=self.clip.logit_scale.device), self.tokenizer.end_id
        return features(ids, lambda rows: self.clip.encode_text(rows, end_id))


def features(rows: Sequence | Tensor, encode: Callable[[Sequence | Tensor], Tensor]) -> Tensor:
    """`encode` of some rows at a time, each result scaled to a unit vector."""
    if len(rows) == 0:
        raise ValueError("nothing to score: no pictures, or no texts")
    parts = [encode(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    return F.normalize(torch.cat(parts), dim=-1).cpu()


# --------------------------------------------------------------------------------- section 5.1


def without_placeholder(prompt: str, placeholder: str) -> str:
    """The prompt "where we omit the placeholder S* (i.e. 'A photo of on the moon')"."""
    return " ".join(prompt.replace(placeholder, "").split())


def read_prompts(path: str | Path | None = None) -> dict[str, list[str]]:
    """{kind: its prompts, each with one {} for the new word}; None for evaluation_prompts.txt,
    where the format is described. Raises ValueError that names the file and the line."""
    path = Path(path or PROMPTS)
    prompts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        kind, _, prompt = (part.strip() for part in line.partition(":"))
        braces = [c for c in prompt if c in "{}"]
        if kind not in prompts or braces != ["{", "}"] or "{}" not in prompt:
            raise ValueError(
                f"{path}, line {number}: expected one of {', '.join(KINDS)}, a colon and a prompt "
                f"with one {{}}, found {line[:80]!r}"
            )
        prompts[kind].append(prompt)
    if not any(prompts.values()):
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Section 5.2's human captions, one a line: {"short captions": those of up to 12 words, "long
    captions": the others}, each only if there are any. Raises ValueError for what is no text."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no text file with captions ({error})") from None
    captions: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, lines)):
        length = "short" if len(line.split()) <= 12 else "long"
        captions.setdefault(f"{length} captions", []).append(line)
    return captions


def reconstruction(samples: Tensor, images: Tensor) -> float:
    """Section 5.1: "the average pair-wise CLIP-space cosine-similarity between the generated
    images", 64 of "A photo of S*", "and the images of the concept-specific training set".

    samples (N, D) and images (M, D) are features; the score is in [-1, 1], more is better.
    """
    return (samples @ images.T).mean().item()


def editability(samples: Tensor, prompt: Tensor) -> float:
    """Section 5.1: "for each prompt, we synthesize 64 samples using 50 DDIM steps, calculate the
    average CLIP embedding of the samples, and compute their cosine similarity with the CLIP
    embedding of the textual prompts, where we omit the placeholder".

    samples (N, D) and prompt (D,) or (1, D) are features; the score is in [-1, 1], more is better.
    Trap: the published code takes the average of the cosines, which is this number times the
    length of the average embedding, so a little less; it rewards samples that are all alike.
    """
    return F.cosine_similarity(samples.mean(dim=0), prompt.reshape(-1), dim=0).item()


def scores_of(rows: Sequence[dict]) -> dict[str, list[tuple[str, float, float]]]:
    """{setup: [(name, reconstruction, mean editability), ...]} from rows of prompts."""
    table: dict[str, list] = {}
    for setup, name in dict.fromkeys((row["setup"], row["name"]) for row in rows):
        own = [row for row in rows if (row["setup"], row["name"]) == (setup, name)]
        first = next(row["score"] for row in own if row["kind"] == "reconstruction")
        others = [row["score"] for row in own if row["kind"] != "reconstruction"]
        table.setdefault(setup, []).append((name, first, sum(others) / len(others)))
    return table


def rank(scorer: Scorer, images: Sequence[Image.Image], text: str) -> list[int]:
    """The pictures' numbers, the one that is most like the text first: "this process can be largely
    automated by using CLIP to rank images" (section 4, image curation)."""
    cosines = (scorer.images(images) @ scorer.texts([text]).T)[:, 0]
    return cosines.argsort(descending=True, stable=True).tolist()


# ---------------------------------------------------------------------------- confidence intervals


def moments(values: Tensor | Sequence[float]) -> tuple[int, float, float]:
    """Their number, their mean, and the squared standard error of it."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(values) < 2:
        raise ValueError(f"a spread needs two values at least, found {len(values)}")
    return len(values), values.mean().item(), (values.var() / len(values)).item()


def confidence(values: Tensor | Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The mean of values (n,), n >= 2, and half the width of its confidence interval by Student's
    t ("error bars are 95% confidence intervals", figure 7)."""
    if not 0 < level < 1:
        raise ValueError(f"a level of confidence lies between 0 and 1, found {level}")
    n, mean, error = moments(values)
    low, high = 0.0, math.pi / 2  # bisection, over the angle whose tangent t is
    for _ in range(60):
        angle = (low + high) / 2
        wide = student_tail(math.tan(angle), n - 1) < 1 - level
        low, high = (low, angle) if wide else (angle, high)
    return mean, math.tan(low) * math.sqrt(error)


def student_tail(t: float, degrees: float) -> float:
    """P(|T| >= |t|) where T has Student's distribution with that many degrees of freedom."""
    both = degrees + t * t
    return incomplete_beta(degrees / both, t * t / both, degrees / 2, 0.5)


def incomplete_beta(x: float, y: float, a: float, b: float) -> float:
    """The regularised I_x(a, b), 0 <= x <= 1, y = 1 - x: the continued fraction 8.17.22 of the
    Digital Library of Mathematical Functions, evaluated from its far end."""
    if x > (a + 1) / (a + b + 2):  # it converges fast on the other side only
        return 1 - incomplete_beta(y, x, b, a)
    if x == 0:
        return 0.0
    rest = 1.0
    for m in range(100 + int(4 * math.sqrt(max(a, b))), 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        rest = 1 + even / (1 + odd / rest)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log(y) - log_beta) / a
    return front / (1 - (a + b) * x / (a + 1) / rest)
