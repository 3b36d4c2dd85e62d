"""The training pictures of the bundled model: emoji of three vendors, composed into scenes.

A scene is a sprite (moved, scaled, turned, mirrored) on a background, drawn in a medium, with a
caption that says so: "a sketch of a crab in twemoji style on the beach". Sprites come from three
npm packages, unpacked into one folder; their licences are named in weights.md:

    npm pack emoji-datasource-google@16.0.0      Noto Emoji, Apache 2.0
    npm pack emoji-datasource-twitter@16.0.0     Twemoji, CC BY 4.0
    npm pack @lobehub/fluent-emoji-3d@1.1.0      Fluent Emoji, MIT
    for f in *.tgz; do mkdir $f.d && tar xzf $f -C $f.d; done
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE = 64

# Words the model is trained on, by the coarse word that captions use for them now and then.
TRAINED = {
    "fruit": "apple🍎 pear🍐 orange🍊 lemon🍋 banana🍌 watermelon🍉 grapes🍇 strawberry🍓 cherries🍒 "
    "peach🍑 pineapple🍍 coconut🥥 kiwi🥝",
    "vegetable": "tomato🍅 avocado🥑 eggplant🍆 potato🥔 carrot🥕 corn🌽 pepper🌶️ cucumber🥒 broccoli🥦 "
    "garlic🧄 onion🧅",
    "food": "bread🍞 croissant🥐 pretzel🥨 bagel🥯 pancakes🥞 waffle🧇 cheese🧀 bacon🥓 hamburger🍔 fries🍟 "
    "pizza🍕 sandwich🥪 egg🥚 popcorn🍿 cake🍰 doughnut🍩 cookie🍪 chocolate🍫 lollipop🍭 honey🍯",
    "drink": "coffee☕ tea🍵 wine🍷 beer🍺 milk🥛",
    "animal": "dog🐶 cat🐱 mouse🐭 rabbit🐰 fox🦊 bear🐻 panda🐼 koala🐨 tiger🐯 lion🦁 cow🐮 pig🐷 frog🐸 "
    "monkey🐵 wolf🐺 horse🐴 unicorn🦄 bee🐝 butterfly🦋 snail🐌 ladybug🐞 spider🕷️ turtle🐢 octopus🐙 "
    "lobster🦞 crab🦀 fish🐟 dolphin🐬 whale🐳 shark🦈 elephant🐘",
    "bird": "chicken🐔 penguin🐧 chick🐤 owl🦉 duck🦆",
    "plant": "cactus🌵 tree🌳 palm🌴 tulip🌷 rose🌹 sunflower🌻 clover🍀",
    "weather": "rainbow🌈 cloud☁️ star⭐ sun☀️ snowflake❄️ snowman⛄ umbrella☂️",
    "vehicle": "rocket🚀 car🚗 taxi🚕 bus🚌 truck🚚 tractor🚜 bicycle🚲 train🚆 airplane✈️ helicopter🚁 "
    "sailboat⛵",
    "building": "house🏠 tent⛺ castle🏰",
    "toy": "football⚽ basketball🏀 baseball⚾ balloon🎈 robot🤖 dice🎲",
    "instrument": "guitar🎸 violin🎻 trumpet🎺 drum🥁",
    "clothes": "hat🎩 shirt👕 dress👗 jeans👖 shoe👟 boot👢 glasses👓 crown👑",
    "object": "camera📷 television📺 phone📱 clock⏰ lamp💡 candle🕯️ book📕 envelope✉️ pencil✏️ scissors✂️ "
    "key🔑 lock🔒 hammer🔨 magnet🧲 bell🔔 gift🎁 ring💍 backpack🎒 chair🪑 bucket🪣 globe🌍 trophy🏆 "
    "heart❤️ anchor⚓",
    "monster": "ghost👻 alien👽 skull💀 pumpkin🎃",
}

# Never trained on, by name or picture: the unnamed things to invert.
HELD_OUT = (
    "mushroom🍄 mango🥭 blueberries🫐 pie🥧 hotdog🌭 icecream🍦 teapot🫖 kite🪁 parrot🦜 flamingo🦩 raccoon🦝 "
    "hedgehog🦔 peacock🦚 beetle🪲 zebra🦓 giraffe🦒 dragon🐲 sauropod🦕 fire-engine🚒 ufo🛸 lantern🏮 "
    "sandal👡 crystal-ball🔮 yarn🧶 hibiscus🌺 blossom🌼 teddy🧸 bucket-hat👒 cupcake🧁 gem💎 moai🗿 nesting-dolls🪆"
)

VENDORS = {
    "noto": "emoji-datasource-google-16.0.0.tgz.d/package/img/google/64/{}.png",
    "twemoji": "emoji-datasource-twitter-16.0.0.tgz.d/package/img/twitter/64/{}.png",
    "fluent": "lobehub-fluent-emoji-3d-1.1.0.tgz.d/package/assets/{}.webp",
}

# In how many captions the vendor is named ("in twemoji style"), and whose drawings the others show.
# One vendor prevails there, as some look prevails for every word of a model trained on pictures of
# the web (the paper's appendix A.2 calls it a bias); it also keeps three drawings from blurring.
STYLED = 0.4
VENDOR_ODDS = (0.8, 0.1, 0.1)

COLORS = {
    "red": (205, 55, 50),
    "orange": (240, 145, 45),
    "yellow": (245, 215, 80),
    "green": (85, 165, 85),
    "blue": (65, 115, 205),
    "purple": (140, 85, 180),
    "pink": (240, 160, 190),
    "brown": (125, 85, 60),
    "gray": (140, 140, 145),
    "white": (242, 242, 242),
    "black": (28, 28, 32),
}

# What a caption says about each scene; the drawings are below.
SCENES = {
    "beach": "on the beach",
    "grass": "on the grass",
    "snow": "in the snow",
    "moon": "on the moon",
    "night": "at night",
    "water": "under water",
    "table": "on a wooden table",
    "fire": "on fire",
}

MEDIA = {
    "photo": ("photo", "photo", "rendering", "rendition", "picture"),
    "painting": ("painting", "oil painting"),
    "sketch": ("sketch", "drawing"),
    "pixel": ("pixel art",),
    "gray": ("black and white photo",),
}
MEDIA_ODDS = (0.64, 0.09, 0.09, 0.09, 0.09)


def split_names(text: str) -> dict[str, str]:
    """{"apple": "🍎", ...} from "apple🍎 ..."."""
    words = (entry.rstrip("\ufe0f") for entry in text.split())
    return {w[:-1]: w[-1] for w in words}


def find_sprite(folder: Path, vendor: str, emoji: str) -> Path | None:
    code = f"{ord(emoji):04x}"
    paths = [folder / VENDORS[vendor].format(c) for c in (code, f"{code}-fe0f")]
    return next((p for p in paths if p.exists()), None)


def load_sprite(folder: Path, vendor: str, emoji: str) -> Tensor:
    """One drawing as premultiplied RGBA (4, 64, 64) in [0, 1]. Raises ValueError if there is none."""
    path = find_sprite(folder, vendor, emoji)
    if path is None:
        raise ValueError(f"{folder} has no {emoji} by {vendor}; see emoji_data.py for the drawings")
    image = Image.open(path).convert("RGBA")
    if image.width > SIZE:  # the 3D set has wide margins
        image = image.crop((12, 12, 244, 244)).resize((SIZE, SIZE), Image.Resampling.BOX)
    rgba = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])


def load_sprites(folder: Path, names: dict[str, str]) -> Tensor:
    """(names, vendors, 4, 64, 64)."""
    return torch.stack(
        [torch.stack([load_sprite(folder, v, e) for v in VENDORS]) for e in names.values()]
    )


# ---------------------------------------------------------------------------------- backgrounds


def noise(rng, rows: int, cols: int) -> np.ndarray:
    """Smooth noise (64, 64) in [0, 1] with about rows x cols blobs."""
    grid = Image.fromarray((rng.random((rows, cols)) * 255).astype(np.uint8))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255.0


def blend(top, bottom, weight: np.ndarray) -> np.ndarray:
    """Colours (0-255) mixed by weight (64, 64): 0 gives `top`, 1 gives `bottom`."""
    weight = np.clip(weight, 0, 1)[..., None]
    return np.asarray(top, float) * (1 - weight) + np.asarray(bottom, float) * weight


Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(float)


def dots(rng, canvas, count, radius, color, below=0, above=SIZE):
    for _ in range(count):
        r, cx, cy = rng.uniform(*radius), rng.uniform(0, SIZE), rng.uniform(below, above)
        canvas = blend_over(canvas, color, r + 0.5 - np.hypot(X - cx, Y - cy))
    return canvas


def blend_over(canvas, color, alpha):
    alpha = np.clip(alpha, 0, 1)[..., None]
    return canvas * (1 - alpha) + np.asarray(color, float) * alpha


def draw_scene(name: str, rng) -> np.ndarray:
    """A background (64, 64, 3), 0-255."""
    horizon = rng.uniform(22, 36)
    ground = np.clip(Y - horizon, 0, 1)
    depth = np.clip((Y - horizon) / (SIZE - horizon), 0, 1)
    if name == "beach":
        sky = blend((110, 185, 240), (205, 235, 250), Y / horizon)
        shore = horizon + rng.uniform(8, 14) + 2 * np.sin(X / rng.uniform(5, 9) + rng.uniform(0, 6))
        sea = blend(
            (20, 130, 175), (70, 200, 205), (Y - horizon) / 12 + 0.5 * (noise(rng, 32, 6) - 0.5)
        )
        sand = blend(
            (240, 215, 160), (215, 180, 120), depth * 0.6 + 0.5 * (noise(rng, 40, 40) - 0.3)
        )
        canvas = np.where(ground[..., None] > 0, sea, sky)
        canvas = blend_over(canvas, (250, 250, 245), 2 - np.abs(Y - shore))
        return np.where((Y > shore)[..., None], sand, canvas)
    if name == "grass":
        sky = blend((140, 200, 245), (225, 240, 250), Y / horizon)
        field = blend((125, 190, 70), (55, 130, 45), depth + 0.8 * (noise(rng, 24, 60) - 0.5))
        return dots(
            rng, np.where(ground[..., None] > 0, field, sky), 5, (0.5, 1.2), (250, 240, 120), 45
        )
    if name == "snow":
        sky = blend((150, 175, 205), (215, 225, 235), Y / horizon)
        field = blend((250, 252, 255), (195, 212, 235), noise(rng, 5, 4) * 0.9)
        canvas = np.where(ground[..., None] > 0, field, sky)
        return dots(rng, canvas, 26, (0.4, 1.3), (255, 255, 255))
    if name == "moon":
        canvas = dots(
            rng, np.zeros((SIZE, SIZE, 3)) + 8, 25, (0.1, 0.6), (255, 255, 255), 0, horizon
        )
        soil = blend((190, 190, 190), (120, 120, 124), depth + 0.6 * (noise(rng, 14, 20) - 0.5))
        canvas = np.where(ground[..., None] > 0, soil, canvas)
        for _ in range(6):
            r, cx, cy = rng.uniform(3, 8), rng.uniform(0, SIZE), rng.uniform(horizon + 4, SIZE)
            d = np.hypot((X - cx) / r, (Y - cy) / (0.4 * r))
            canvas = blend_over(canvas, (95, 95, 100), 4 * (1 - d) * 0.8)
        return canvas
    if name == "night":
        canvas = blend((12, 16, 55), (45, 50, 110), Y / SIZE)
        canvas = dots(rng, canvas, 30, (0.1, 0.7), (255, 250, 210), 0, 50)
        mx, my = rng.uniform(8, 56), rng.uniform(7, 14)
        crescent = np.minimum(6 - np.hypot(X - mx, Y - my), np.hypot(X - mx - 3, Y - my + 1) - 5)
        canvas = blend_over(canvas, (250, 240, 180), crescent)
        hill = 54 + 4 * np.sin(X / rng.uniform(6, 12) + rng.uniform(0, 6))
        return blend_over(canvas, (10, 14, 30), Y - hill)
    if name == "water":
        canvas = blend((70, 185, 225), (8, 55, 125), Y / SIZE + 0.3 * (noise(rng, 4, 6) - 0.5))
        rays = np.sin((X + 0.5 * Y) / rng.uniform(3, 6) + rng.uniform(0, 6)) * (1 - Y / SIZE)
        canvas = blend_over(canvas, (190, 240, 250), 0.25 * rays)
        for _ in range(9):
            r, cx, cy = rng.uniform(1.2, 3.5), rng.uniform(0, SIZE), rng.uniform(0, SIZE)
            canvas = blend_over(canvas, (210, 245, 255), 0.9 - np.abs(np.hypot(X - cx, Y - cy) - r))
        return blend_over(canvas, (120, 130, 100), (Y - 58 - 3 * noise(rng, 2, 7)) * 0.7)
    if name == "table":
        tint = rng.uniform(0, 1)
        wall = blend((235, 225, 205), (190, 200, 205), np.full((SIZE, SIZE), tint))
        wood = blend((175, 115, 65), (120, 72, 38), noise(rng, 50, 4))
        planks = ((Y - horizon) % rng.uniform(8, 12)) < 1
        wood = blend_over(wood, (80, 45, 22), 0.8 * planks)
        return np.where(ground[..., None] > 0, wood, wall)
    if name == "fire":
        heat = (Y / SIZE) * 1.3 + 0.9 * (noise(rng, 7, 14) - 0.5) + 0.5 * (noise(rng, 3, 7) - 0.5)
        canvas = blend((60, 8, 5), (225, 50, 10), heat * 1.8)
        canvas = blend_over(canvas, (250, 150, 25), (heat - 0.55) * 5)
        return blend_over(canvas, (255, 235, 120), (heat - 0.9) * 4)
    raise ValueError(f"no scene {name!r}; there are {', '.join(SCENES)}")


def scene_bank(per_scene: int = 64, seed: int = 0) -> Tensor:
    """(scenes, per_scene, 3, 64, 64) in [0, 1]."""
    rng = np.random.default_rng(seed)
    bank = np.stack([[draw_scene(s, rng) for _ in range(per_scene)] for s in SCENES])
    return torch.from_numpy(bank).float().permute(0, 1, 4, 2, 3).clamp(0, 255) / 255


# ---------------------------------------------------------------------------------------- media


def luma(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def paint(x: Tensor) -> Tensor:
    """Kuwahara's filter (each pixel takes the mean of its calmest corner), stronger colours."""
    mean = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 3, 1)
    square = F.avg_pool2d(F.pad(luma(x) ** 2, (2, 2, 2, 2), mode="replicate"), 3, 1)
    var = square - luma(mean) ** 2
    corners = [(dy, dx) for dy in (0, 2) for dx in (0, 2)]
    means = torch.stack([mean[..., dy : dy + SIZE, dx : dx + SIZE] for dy, dx in corners])
    calm = torch.stack([var[..., dy : dy + SIZE, dx : dx + SIZE] for dy, dx in corners]).argmin(0)
    out = means.gather(0, calm[None].expand(1, -1, 3, -1, -1))[0]
    strokes = torch.from_numpy(np.sin((X + Y) * 1.1) * np.sin(Y * 0.35)).to(x) * 0.02
    return (luma(out) + 1.35 * (out - luma(out)) + strokes).clamp(0, 1)


def pencil(x: Tensor) -> Tensor:
    """Grey pencil on paper: the picture divided by its blur leaves the lines."""
    gray = 0.15 + 0.85 * luma(x)
    blur = F.avg_pool2d(F.pad(gray, (2, 2, 2, 2), mode="replicate"), 5, 1)
    lines = (gray / blur).clamp(0, 1) ** 2.2 * (0.75 + 0.25 * gray)
    return lines * x.new_tensor([0.98, 0.97, 0.93]).view(3, 1, 1)


def pixelate(x: Tensor) -> Tensor:
    return F.interpolate((F.avg_pool2d(x, 4) * 5).round() / 5, scale_factor=4.0)


def grayscale(x: Tensor) -> Tensor:
    return ((luma(x) - 0.5) * 1.15 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)


def outlines(x: Tensor) -> Tensor:
    """How much the colours of x (n, 3, 64, 64) change at each pixel, (n, 1, 64, 64)."""
    slope = x.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernels = torch.stack([slope, slope.T])[:, None]
    channels = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(channels, kernels).norm(dim=1).unflatten(0, (-1, 3)).amax(1, keepdim=True)


FILTERS = {"photo": None, "painting": paint, "sketch": pencil, "pixel": pixelate, "gray": grayscale}


# --------------------------------------------------------------------------------------- scenes


def name_of(rng: random.Random, names: list[str], coarse: list[str], number: int) -> str:
    """What captions call a thing: its name, now and then the coarse word for it."""
    return (names if rng.random() < 0.93 else coarse)[number]


def with_article(rng: random.Random, name: str, scale: float) -> str:
    """A thing as captions name it. Words of the paper's templates are used with their meaning where
    a picture can show it (small, large) and at random where it cannot (nice, cool, ...)."""
    adjective = rng.choice(["", "", "", "", "nice ", "cool ", "weird ", "clean ", "dirty "])
    if rng.random() < 0.3:
        adjective = "large " if scale > 0.98 else "small " if scale < 0.84 else adjective
    article = rng.choice(["a", "a", "a", "the", "my", "one"])
    if article == "a" and (adjective or name)[0] in "aeiou":
        article = "an"
    return f"{article} {adjective}{name}"


def caption(rng: random.Random, thing: str, style: str, place: str, medium: str) -> str:
    """One sentence for a scene; `style` is the vendor's name, or "" to leave it out."""
    noun = rng.choice(MEDIA[medium])
    if medium == "photo" and rng.random() < 0.3:
        noun = rng.choice(["good", "bright", "dark", "cropped", "close-up"]) + " " + noun
    text = f"{rng.choice(['a', 'a', 'the'])} {noun} of {thing}"
    if medium == "photo" and rng.random() < 0.15:
        text = thing
    if style:
        text += rng.choice([f" in {style} style", f" in the style of {style}"])
    return f"{text} {place}" if rng.random() < 0.85 else text


def placed(sprites: Tensor, scale: Tensor, angle: Tensor, mirror: Tensor, shift: Tensor) -> Tensor:
    """Sprites (n, 4, 64, 64) scaled, turned by an angle in radians, mirrored (-1) or not (1), and
    shifted by (x, y), in halves of a picture."""
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack(
        [torch.stack([mirror * cos, -mirror * sin], 1), torch.stack([sin, cos], 1)], 1
    )
    offset = -(theta @ shift[:, :, None])
    size = [len(sprites), 4, SIZE, SIZE]
    grid = F.affine_grid(torch.cat([theta, offset], 2), size, align_corners=False)
    return F.grid_sample(sprites, grid, align_corners=False)


def plain(color: str, down: float, right: float, tint: Tensor) -> Tensor:
    """A background (3, 64, 64) of one colour, a little brighter one way, and tinted (3, 1, 1)."""
    ramp = torch.linspace(-1, 1, SIZE)
    return (
        torch.tensor(COLORS[color]).view(3, 1, 1) / 255
        + (ramp[:, None] * down + ramp * right)
        + tint
    )


def draw_vendors(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Who drew each of n things, and whether the captions say so."""
    styled = torch.rand(n, generator=g) < STYLED
    odds = torch.where(styled[:, None], 1.0, torch.tensor(VENDOR_ODDS))
    return odds.multinomial(1, generator=g)[:, 0], styled


def draw_poses(n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, angle, mirror and shift of n things, for `placed`."""
    scale = 0.78 + 0.26 * torch.rand(n, generator=g)
    angle = 0.07 * torch.randn(n, generator=g).clamp(-2, 2)
    mirror = (torch.rand(n, generator=g) < 0.7).float() * 2 - 1
    room = (1.08 - scale).clamp(min=0.05)
    shift = (torch.rand(n, 2, generator=g) * 2 - 1) * room[:, None]
    shift[:, 1] = shift[:, 1].abs() * 0.7 - 0.2 * room  # rather low: things stand on the ground
    return scale, angle, mirror, shift


def draw_places(n: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Places (scenes or colours) and media of n pictures."""
    odds = [1 / len(SCENES)] * len(SCENES) + [0.8 / len(COLORS)] * len(COLORS)
    return rng.choices([*SCENES, *COLORS], odds, k=n), rng.choices([*MEDIA], MEDIA_ODDS, k=n)


def background(place: str, bank: Tensor, rng: random.Random, g: torch.Generator):
    """A background (3, 64, 64) of a place, and what captions say about it."""
    if place in SCENES:
        back = bank[list(SCENES).index(place), rng.randrange(bank.shape[1])]
        back = back.flip(-1) if rng.random() < 0.5 else back
        return back.clamp(0, 1), SCENES[place]
    tilt = rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)
    back = plain(place, *tilt, 0.03 * torch.randn(3, 1, 1, generator=g))
    return back.clamp(0, 1), f"on a {place} background".replace("a orange", "an orange")


def apply_media(pictures: Tensor, media: list[str]) -> Tensor:
    """Pictures (n, 3, 64, 64) drawn in their media."""
    pictures = pictures.clone()
    for medium, apply in FILTERS.items():
        rows = [i for i, m in enumerate(media) if m == medium]
        if apply and rows:
            pictures[rows] = apply(pictures[rows])
    return pictures.clamp(0, 1)


def compose(sprites: Tensor, bank: Tensor, names: list[str], coarse: list[str], n: int, seed: int):
    """n random scenes: pictures (n, 3, 64, 64) in [0, 1], captions, (name, place, medium), and
    how much of each pixel is the thing's (n, 64, 64)."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    who = torch.randint(len(names), (n,), generator=g)
    vendor, styled = draw_vendors(n, g)
    scale, *pose = draw_poses(n, g)
    layer = placed(sprites[who, vendor], scale, *pose)
    places, media = draw_places(n, rng)
    backs, captions = [], []
    for i, place in enumerate(places):
        back, where = background(place, bank, rng, g)
        backs.append(back)
        name = name_of(rng, names, coarse, who[i])
        style = list(VENDORS)[vendor[i]] if styled[i] else ""
        thing = with_article(rng, name, float(scale[i]))
        captions.append(caption(rng, thing, style, where, media[i]))
    pictures = torch.stack(backs) * (1 - layer[:, 3:]) + layer[:, :3]
    facts = [(names[w], p, m) for w, p, m in zip(who, places, media)]
    return apply_media(pictures, media), captions, facts, layer[:, 3]


class Scenes:
    """All that is needed to compose scenes of one set of names."""

    def __init__(self, folder: Path):
        entries = [(n, e, c) for c, text in TRAINED.items() for n, e in split_names(text).items()]
        self.names = [n for n, _, _ in entries]
        self.coarse = [c for _, _, c in entries]
        self.sprites = load_sprites(Path(folder), {n: e for n, e, _ in entries})
        self.bank = scene_bank()

    def batch(self, n: int, seed: int):
        return compose(self.sprites, self.bank, self.names, self.coarse, n, seed)


def words() -> list[str]:
    """Every word that a training caption can hold, for the vocabulary."""
    texts = [*TRAINED, *SCENES.values(), *COLORS, *VENDORS, *(w for m in MEDIA.values() for w in m)]
    texts += [n for text in TRAINED.values() for n in split_names(text)]
    texts += (
        "a an the my one of in on style background nice cool weird clean dirty large small".split()
    )
    texts += "good bright dark cropped close up".split()
    return sorted({w for text in texts for w in text.split()})
