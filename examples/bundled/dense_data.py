"""Scenes for a denser space of words: private words, two things, endlessly many styles.

The captions of emoji_data.py have 159 names, and new words have to be found between them. Here
captions can use a private word in place of a name, which stands for one drawing by one vendor, with
its colours turned or not, or in place of a style. A word encoder (train_emoji.py) looks at that
drawing, or at another picture in that style, and returns the word's vector.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from emoji_data import (
    HELD_OUT,
    MEDIA,
    TRAINED,
    VENDORS,
    Scenes,
    X,
    Y,
    apply_media,
    background,
    caption,
    draw_places,
    draw_poses,
    draw_vendors,
    find_sprite,
    load_sprites,
    luma,
    name_of,
    outlines,
    placed,
    with_article,
)
from torch import Tensor

PRIVATE_SHARE, PAIR_SHARE, STYLE_SHARE = 0.4, 0.15, 0.1  # of things, of scenes, of scenes
# Private words, in place of a name of the first and the second thing, and of a style.
PRIVATE = ("private0", "private1", "private2")

# Drawings that look much like a held-out thing. They are never trained on either.
ALIKE = "🐉🦖🌸💮🏵🪷💠🍨🍧👠🩴🦢🦡🪳🪿🎎"

PEOPLE_AND_SIGNS = (
    (0x1F3FB, 0x1F3FF),
    (0x1F440, 0x1F47A),
    (0x1F481, 0x1F487),
    (0x1F500, 0x1F567),
    (0x1F600, 0x1F64F),
    (0x1F6AB, 0x1F6C5),
    (0x1F90C, 0x1F93E),
    (0x1F970, 0x1F97A),
    (0x1F9B5, 0x1F9DF),
    (0x1FAC2, 0x1FAC5),
    (0x1FAE0, 0x1FAF8),
)


def unnamed(folder: Path) -> dict[str, str]:
    """All other emoji that the three vendors have drawn: no held-out things, nothing that looks
    like one of these, and none of the many people, hands, faces and signs."""
    known = set("".join([HELD_OUT, ALIKE, *TRAINED.values()]))
    for first, last in PEOPLE_AND_SIGNS:
        known |= {chr(code) for code in range(first, last + 1)}
    found = (chr(code) for code in range(0x1F300, 0x1FB00) if chr(code) not in known)
    drawn = (e for e in found if all(find_sprite(folder, v, e) for v in VENDORS))
    return {emoji: emoji for emoji in drawn}


# --------------------------------------------------------------------------------------- styles


class Style:
    """One of endlessly many styles: a kind of drawing, with two colours and a strength at random.

    The blueprint, which is to be learnt as a new word, stays out: no light lines on blue paper.
    """

    KINDS = ("contours", "contours", "contours", "ink", "duotone", "poster", "halftone", "cartoon")

    def __init__(self, rng: random.Random):
        self.kind = rng.choice(self.KINDS)
        self.strength, self.turn = rng.random(), rng.uniform(-np.pi, np.pi)
        while True:
            dark = [rng.random() * 0.45 for _ in range(3)]
            light = [1 - rng.random() * 0.35 for _ in range(3)]
            self.ink, self.paper = (light, dark) if rng.random() < 0.5 else (dark, light)
            if not (self.paper is dark and dark[2] > max(dark[:2])):
                break

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, 3, 64, 64) in [0, 1] in this style."""
        ink, paper = (x.new_tensor(c).view(3, 1, 1) for c in (self.ink, self.paper))
        if self.kind == "contours":
            lines = (outlines(x) * (1.5 + 2 * self.strength) - 0.3).clamp(0, 1)
            return paper + (ink - paper) * lines
        if self.kind == "cartoon":  # few colours, dark outlines
            flat = (x * 4).round() / 4
            return flat * (1 - (outlines(x) * (1 + 2 * self.strength) - 0.3).clamp(0, 1))
        if self.kind == "poster":
            levels = 2 + int(2 * self.strength)
            return turn_hue((x * levels).round() / levels, x.new_full((len(x),), self.turn))
        gray = luma(x)
        if self.kind == "ink":  # black or white, nothing between
            gray = ((gray - 0.35 - 0.3 * self.strength) * 12 + 0.5).clamp(0, 1)
        if self.kind == "halftone":
            dots = torch.from_numpy(np.sin(X * 1.57) * np.sin(Y * 1.57)).to(x) * 0.35
            gray = ((gray + dots - 0.5) * 6 + 0.5).clamp(0, 1)
        first, second = (ink, paper) if sum(self.ink) < sum(self.paper) else (paper, ink)
        return first + (second - first) * gray


def turn_hue(x: Tensor, angle: Tensor) -> Tensor:
    """x (n, 3, h, w) with each colour turned about the gray axis by angle (n,), in radians."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    eye, third = torch.eye(3), torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    matrix = cos * eye + (1 - cos) * third + sin * cross  # Rodrigues' formula
    return torch.einsum("nij,njhw->nihw", matrix, x).clamp(0, 1)


# --------------------------------------------------------------------------------------- scenes


def style_caption(rng: random.Random, things: str, place: str) -> str:
    """One sentence for a scene in a private style."""
    noun = rng.choice([noun for nouns in MEDIA.values() for noun in nouns])
    article, word, kind = rng.choice(["a", "a", "the"]), PRIVATE[2], rng.random()
    if kind < 0.5:
        return f"{article} {word} of {things}" + f" {place}" * (rng.random() < 0.5)
    subject = f"{article} {noun} of {things}" if kind < 0.75 else f"{article} {noun}"
    return f"{subject} in the style of {word}" + f" {place}" * (rng.random() < 0.3)


@dataclass
class Things:
    """n things of scenes: which drawing is shown, and which one the word encoder sees."""

    number: Tensor  # of the drawing
    private: Tensor  # True: the caption has a private word, not a name
    shown: Tensor  # number of the vendor who drew it
    source: Tensor  # vendor of the drawing that stands for the private word
    styled: Tensor  # True: the caption names the vendor
    hue: Tensor  # how far the colours are turned, radians

    def drawings(self, vendor: Tensor) -> Tensor:
        return torch.stack([self.number, vendor, self.hue], 1)


class DenseScenes(Scenes):
    """Scenes of named and unnamed things."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.sprites = torch.cat([self.sprites, load_sprites(folder, unnamed(folder))])

    def sprite(self, drawings: Tensor) -> Tensor:
        """The drawings (n, 3), each a number, a vendor and a hue, as RGBA (n, 4, 64, 64)."""
        sprites = self.sprites[drawings[:, 0].long(), drawings[:, 1].long()]
        turned = torch.minimum(turn_hue(sprites[:, :3], drawings[:, 2]), sprites[:, 3:])
        return torch.cat([turned, sprites[:, 3:]], 1)

    def things(self, n: int, pair: Tensor, g: torch.Generator) -> Things:
        private = torch.rand(n, generator=g) < PRIVATE_SHARE
        count = torch.where(private, len(self.sprites), len(self.names))
        number = (torch.rand(n, generator=g) * count).long()
        vendor, styled = draw_vendors(n, g)
        styled &= ~pair & ~(private & (torch.rand(n, generator=g) < 0.5))
        source = torch.randint(len(VENDORS), (n,), generator=g)
        # A drawing by one vendor, asked for in the style of another, is drawn by the other.
        shown = torch.where(private & ~styled, source, vendor)
        turned = private & ~styled & (torch.rand(n, generator=g) < 0.5)
        hue = turned * (torch.rand(n, generator=g) * 2 - 1) * np.pi
        return Things(number, private, shown, source, styled, hue)

    def layers(self, both: list[Things], pair: Tensor, upon: Tensor, g: torch.Generator):
        """The things of n scenes, (n, 4, 64, 64), and the scales of the first ones. Where `pair`,
        the second stands beside the first, or below it where `upon`."""
        layers, scales = [], []
        aside = torch.where(upon[:, None], torch.tensor([0.0, 0.42]), torch.tensor([0.46, 0.0]))
        for things, side in zip(both, (-1, 1)):
            scale, angle, mirror, shift = draw_poses(len(pair), g)
            beside = side * aside + 0.2 * shift + torch.tensor([0.0, 0.06])
            shift = torch.where(pair[:, None], beside, shift)
            pose = torch.where(pair, 0.56 * scale, scale), angle, mirror, shift
            layers.append(placed(self.sprite(things.drawings(things.shown)), *pose))
            scales.append(scale)
        first, second = layers
        second = second * pair[:, None, None, None]
        return second * (1 - first[:, 3:]) + first, scales[0]  # premultiplied: first over second

    def batch(self, n: int, seed: int):
        """n random scenes: pictures (n, 3, 64, 64), captions, facts, and how much of each pixel is
        the things' (n, 64, 64). Facts are what stands behind private words: the drawings (2, 3) of
        both things, and in a private style another picture (3, 64, 64) in it, else None."""
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        pair = torch.rand(n, generator=g) < PAIR_SHARE
        upon = torch.rand(n, generator=g) < 0.25
        both = [self.things(n, pair, g) for _ in range(2)]
        layer, scale = self.layers(both, pair, upon, g)
        places, media = draw_places(n, rng)
        backs, captions, styles = [], [], {}
        for i, place in enumerate(places):
            back, where = background(place, self.bank, rng, g)
            backs.append(back)
            shown = both if pair[i] else both[:1]
            names = [
                word if t.private[i] else name_of(rng, self.names, self.coarse, t.number[i])
                for t, word in zip(shown, PRIVATE)
            ]
            size = 0.9 if pair[i] else float(scale[i])  # a pair is neither small nor large
            text = (" on " if upon[i] else " and ").join(with_article(rng, m, size) for m in names)
            if rng.random() < STYLE_SHARE:
                styles[i], media[i] = Style(rng), "photo"
                captions.append(style_caption(rng, text, where))
            else:
                vendor = list(VENDORS)[both[0].shown[i]] if both[0].styled[i] else ""
                captions.append(caption(rng, text, vendor, where, media[i]))
        plain = torch.stack(backs) * (1 - layer[:, 3:]) + layer[:, :3]
        pictures, examples = apply_media(plain, media), {}
        for i, style in styles.items():
            pictures[i], examples[i] = style(plain[[i, (i + 1) % n]]).clamp(0, 1)
        drawings = torch.stack([things.drawings(things.source) for things in both], 1)
        facts = [(drawings[i], examples.get(i)) for i in range(n)]
        return pictures, captions, facts, layer[:, 3]
