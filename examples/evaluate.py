"""Measure words as the paper does (section 5.1): two scores in the space of CLIP.

    python examples/evaluate.py mushroom.safetensors --images examples/concepts/mushroom
    python examples/evaluate.py runs/*/*.safetensors --images examples/concepts --chart fig7.png

Reconstruction says how similar samples of "A photo of S*" are to the training pictures,
editability how similar samples of other prompts are to these prompts. From Python:

    scorer = Scorer.load("vit-b-32")
    samples, images = scorer.images(samples), scorer.images(training_set)
    text = scorer.texts([without_placeholder("A photo of <cat> on the moon", "<cat>")])
    reconstruction(samples, images), editability(samples, text)
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import repository  # noqa: F401
import torch
import torch.nn.functional as F
from chart import tradeoff, write_chart
from PIL import Image
from scores import print_scores, summarize
from torch import Tensor
from tqdm import tqdm

import textinv
from models.checkpoint import BUNDLED, load_clip
from models.clip import CLIP, MEAN, STD
from models.concepts import Concept, load_concept
from models.files import free_target, write_table
from models.images import find_images, open_image
from models.latent_diffusion import LatentDiffusion
from models.tokenizers import (
    CLIPTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    any_of,
    without_weights,
)

PROMPTS = Path(__file__).parent / "evaluation_prompts.txt"
RECONSTRUCTION = "A photo of {}"
KINDS = ("background", "style", "composition")
BATCH = 32  # pictures or texts at a time


@dataclass
class Scorer:
    """CLIP with what stands before it: `preprocess` for pictures, the tokenizer for texts."""

    clip: CLIP
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: str | Path | None = None, device: str | torch.device = "cpu") -> "Scorer":
        """Load the CLIP of a path that `load_clip` takes.

        The paper measures with "the official CLIP ViT-B/32 checkpoint" (appendix F); None is the
        small CLIP of the bundled model, which knows little more than emoji. Raises ValueError, one
        line, for any other file.
        """
        clip = load_clip(path)
        size = clip.config.text.vocab_size
        if path is None:
            tokenizer: Tokenizer = WordPieceTokenizer.load(BUNDLED / "vocab.txt")
        else:
            merges = next(Path(path).glob("merges.txt"), None)
            tokenizer = CLIPTokenizer.load(merges, size)
        tokenizer.max_length = clip.config.text.max_length
        if (known := tokenizer.vocab_size) != size:
            raise ValueError(f"{path}: knows {size} tokens, its vocabulary has {known}")
        return cls(clip.to(device), tokenizer)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit features (N, D), float32, on the CPU, of N pictures of any size and mode."""
        size, device = self.clip.config.vision.image_size, self.clip.logit_scale.device
        encode = lambda rows: self.clip.encode_image(preprocess(rows, size).to(device))
        return unit_features(images, encode)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit features (M, D) of M texts, of which CLIP reads 75 tokens.

        The padding does not matter: the encoder is causal, and read at the first end token.
        """
        rows = [self.tokenizer.pad(self.tokenizer.encode(text)) for text in texts]
        ids, end_id = torch.tensor(rows, device=self.clip.logit_scale.device), self.tokenizer.end_id
        return unit_features(ids, lambda rows: self.clip.encode_text(rows, end_id))


def preprocess(images: Sequence[Image.Image], size: int) -> Tensor:
    """Return pictures as CLIP reads them, (B, 3, size, size): the shorter side resized (bicubic),
    cropped to the centre, normalised."""
    rows = []
    for image in images:
        w, h = (size * side // min(image.size) for side in image.size)
        image = image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
        left, top = round((w - size) / 2), round((h - size) / 2)
        rows.append(np.asarray(image.crop((left, top, left + size, top + size))))
    pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN) / STD


def unit_features(rows: Sequence | Tensor, encode: Callable[[Sequence | Tensor], Tensor]) -> Tensor:
    """Encode BATCH rows at a time and scale each result to a unit vector."""
    if len(rows) == 0:
        raise ValueError("nothing to score: no pictures, or no texts")
    parts = [encode(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    return F.normalize(torch.cat(parts), dim=-1).cpu()


def rank(scorer: Scorer, images: Sequence[Image.Image], text: str) -> list[int]:
    """Return the pictures' indices, the one most similar to the text first: "this process can be
    largely automated by using CLIP to rank images" (section 4, image curation)."""
    cosines = (scorer.images(images) @ scorer.texts([text]).T)[:, 0]
    return cosines.argsort(descending=True, stable=True).tolist()


# ---------------------------------------------------------------------------- prompts and captions


def read_prompts(path: str | Path | None = None) -> dict[str, list[str]]:
    """Return {kind: prompts with one {} each} of a file, evaluation_prompts.txt by default, where
    the format is described. Raises ValueError that names the file and the line."""
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
    """Return section 5.2's human captions, one a line: {"short captions": those of up to 12 words,
    "long captions": the others}, each if there are any. Raises ValueError for what is no text."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a text file with captions ({error})") from None
    captions: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, lines)):
        length = "short" if len(line.split()) <= 12 else "long"
        captions.setdefault(f"{length} captions", []).append(line)
    return captions


def without_placeholder(prompt: str, placeholder: str) -> str:
    """Return the prompt "where we omit the placeholder S* (i.e. 'A photo of on the moon')"."""
    return " ".join(prompt.replace(placeholder, "").split())


def escape(text: str) -> str:
    """Return the text with its brackets escaped, so that they are read as plain text."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def plain_text(prompt: str, concepts: Sequence[Concept]) -> str:
    """Return the prompt for a CLIP that does not know the words: without weights, each word
    replaced by the initial word that its file names."""
    initial = {concept.placeholder: concept.metadata.get("init_word", "") for concept in concepts}
    if initial:
        prompt = re.sub(any_of(initial), lambda word: escape(initial[word[0]]), prompt)
    return " ".join(without_weights(prompt).split())


# ----------------------------------------------------------------------------- scores, section 5.1


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


def evaluate(
    model: LatentDiffusion,
    scorer: Scorer,
    images: str | Path | Sequence,
    texts: Sequence[str] | None,
    concepts: Sequence[Concept] = (),
    prompts: Mapping[str, Sequence[str]] | None = None,
    n: int = 64,
    steps: int = 50,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Iterator[dict]:
    """Yield a row {"kind", "prompt", "score"} for each prompt (section 5.1); the kind of the
    first, "A photo of {}", is "reconstruction".

    images: the pictures that the word was learnt from. texts: what stands for {} in the prompts:
    [a placeholder] of `concepts`, human captions (n samples shared out among them), [""] for
    "prompt only", or None for "image only", where the pictures themselves are scored (each
    compared with itself, too). prompts: {kind: prompts}, by default evaluation_prompts.txt. Raises
    ValueError as `textinv.sample` does.
    """
    textinv.check_range(1, n=n)
    prompts = read_prompts() if prompts is None else prompts
    pictures = find_images(images) if isinstance(images, (str, Path)) else images
    originals = scorer.images([open_image(picture) for picture in pictures])

    def features(prompt: str) -> Tensor:
        """Unit features (n, D) of samples of the prompt."""
        if texts is None:
            return originals
        drawn = []
        for i, text in enumerate(texts):
            share = len(range(i, n, len(texts)))
            filled = " ".join(prompt.replace("{}", escape(text)).split())
            options = dict(sampler="ddim", steps=steps, guidance_scale=guidance_scale)
            options |= dict(seed=seed + len(drawn))
            drawn += textinv.sample(model, filled, concepts, n=share, **options) if share else []
        return scorer.images(drawn)

    score = reconstruction(features(RECONSTRUCTION), originals)
    yield dict(kind="reconstruction", prompt=RECONSTRUCTION, score=score)
    for kind, texts_of_kind in prompts.items():
        for prompt in texts_of_kind:
            text = scorer.texts([without_placeholder(without_weights(prompt), "{}")])
            yield dict(kind=kind, prompt=prompt, score=editability(features(prompt), text))


# ------------------------------------------------------------------------------------ command line


def make_parser() -> textinv.Parser:
    p = textinv.Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    p.add_argument("words", nargs="*", metavar="WORD", help="word files; a folder is a setup")
    p.add_argument("--images", required=True, metavar="DIR", help="what they were learnt from")
    p.add_argument("--references", action="store_true", help="also image only and prompt only")
    p.add_argument("--captions", metavar="FILE", help="human captions; of a folder, its NAME.txt")
    p.add_argument("--prompts", metavar="FILE", help="'kind: prompt with {}' lines (the paper's)")
    p.add_argument("-n", type=int, default=64, help="samples per prompt (default: 64)")
    p.add_argument("--clip", metavar="PATH", help="vit-b-32 (OpenAI's), or a path (bundled CLIP)")
    p.add_argument("--out", default="scores.csv", metavar="FILE", help="table (scores.csv)")
    p.add_argument("--chart", metavar="FILE", help="draw figure 7 of it (needs matplotlib)")
    textinv.add_options(p, "seed overwrite steps guidance model " + textinv.LOADING)
    p.set_defaults(steps=50)
    return p


class Subject(NamedTuple):
    """A word, or a reference of section 5.2, as `evaluate` measures it."""

    setup: str
    name: str
    images: Path
    texts: list[str] | None
    concepts: list[Concept]


def find_subjects(args: argparse.Namespace) -> Iterator[Subject]:
    """Yield what is to be measured. Words in one folder are one setup; each reference of section
    5.2 is a setup of its own. The pictures of a word NAME lie in --images or in its folder NAME."""
    folders = {}
    for path in map(Path, args.words):
        name, folder = path.stem, Path(args.images, path.stem)
        folders[name] = folder if folder.is_dir() else Path(args.images)
        word = replace(load_concept(path), placeholder=f"<{'-'.join(name.split())}>")
        setup = path.resolve().parent.name
        yield Subject(setup, name, folders[name], [word.placeholder], [word])
    for name, folder in (folders or {Path(args.images).name: Path(args.images)}).items():
        if args.references:
            yield Subject("image only", name, folder, None, [])
            yield Subject("prompt only", name, folder, [""], [])
        if args.captions:
            file = Path(args.captions)
            file = file / f"{name}.txt" if file.is_dir() else file
            for setup, captions in read_captions(file).items():
                yield Subject(setup, name, folder, captions, [])


def checked_subjects(args: argparse.Namespace) -> list[Subject]:
    """Return what is to be measured, where names are clear and there are pictures."""
    subjects = list(find_subjects(args))
    if not subjects:
        raise ValueError("nothing to measure; give words, --references or --captions FILE")
    names = [subject[:2] for subject in subjects]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two words are {twice[1]} of the setup (folder) {twice[0]}; rename one")
    for subject in subjects:
        find_images(subject.images)
    return subjects


def run(args: argparse.Namespace) -> None:
    """The whole command; faults that can be found before hours of work are found before it."""
    out = free_target(args.out, args.overwrite)
    chart = free_target(args.chart, args.overwrite, ".png") if args.chart else None
    subjects, prompts = checked_subjects(args), read_prompts(args.prompts)
    for prompt in (prompt for kind in prompts.values() for prompt in kind):
        without_weights(prompt)  # raises ValueError for a weight that is no number
    model = textinv.load_for(args)
    for subject in subjects:
        model.conditioning([""], subject.concepts)  # raises ValueError for other models' words
    scorer = Scorer.load(args.clip, model.device)
    count = 1 + sum(map(len, prompts.values()))
    print(f"measuring {len(subjects)} subject(s), {count} prompts x {args.n} samples, to {out}")
    options = dict(prompts=prompts, n=args.n, steps=args.steps, guidance_scale=args.guidance)
    options |= dict(seed=args.seed)
    rows = []
    with tqdm(total=len(subjects) * count, unit="prompt") as progress:
        for setup, name, *subject in subjects:
            progress.set_postfix_str(f"{setup}, {name}")
            for row in evaluate(model, scorer, *subject, **options):
                rows.append(dict(setup=setup, name=name, **row))
                progress.update()
            write_table(out, rows, overwrite=args.overwrite or len(rows) > count)
    print_scores(rows)
    print(f"wrote {out}")
    if chart:
        write_chart(chart, lambda: tradeoff(summarize(rows)))


def main(argv: Sequence[str] | None = None) -> int:
    return textinv.exit_status(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
