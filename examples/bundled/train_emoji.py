"""Train the bundled model: autoencoder, then UNet and text encoder together, then a small CLIP.

    python examples/bundled/train_emoji.py SPRITES WORK clip --minutes 12
    python examples/bundled/train_emoji.py SPRITES WORK autoencoder --minutes 11
    python examples/bundled/train_emoji.py SPRITES WORK diffusion --minutes 112
    python examples/bundled/train_emoji.py SPRITES WORK export
    python examples/bundled/train_emoji.py SPRITES DENSE import --recipe dense
    python examples/bundled/train_emoji.py SPRITES DENSE diffusion --recipe dense --minutes 155
    python examples/bundled/train_emoji.py SPRITES DENSE export --recipe dense

SPRITES is the folder of emoji_data.py; WORK and DENSE keep checkpoints, from which every stage
resumes when it is started again. `export` writes models/emoji, and `import` is its reverse. All of
it runs on two CPU cores.

The recipe "names" comes first: every caption names one thing. In the recipe "dense", two things in
five have no name in their captions but a private word: a small network, the word encoder, looks at
the drawing and returns a vector in the place of a token's. So text encoder and UNet learn to read a
space of words that is dense, in which new words can be found later. The word encoder is not
exported.

What makes hours of CPU enough: scenes are encoded once and trained on as latents, matrices are
stepped by Muon (Jordan et al. 2024), which needs several times fewer pictures than AdamW here,
the UNet predicts v (Salimans & Ho 2022) with little weight on the weakest noise, the thing in a
scene counts more than its background, and weights are averaged (EMA). A processor that multiplies
bfloat16 is two to three times as fast as one that does not.
"""

import argparse
import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import repository
import torch
import torch.nn.functional as F
from common import run_script
from dense_data import PRIVATE, DenseScenes
from emoji_data import Scenes, words
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.autoencoder import Autoencoder, AutoencoderConfig
from models.bert import BertConfig, BertTextEncoder
from models.checkpoint import load_model
from models.clip import (
    CLIP,
    MEAN,
    STD,
    CLIPConfig,
    TextConfig,
    VisionConfig,
)
from models.schedule import Schedule
from models.tokenizers import WordPieceTokenizer
from models.unet import UNet, UNetConfig

BATCH = 96  # scenes per step of the diffusion stage
MAX_LENGTH = 24
CONTEXT_DIM = 192
PREDICTION = "v"  # holds the shapes, which are decided in strong noise, better than eps does
SCALE = 0.18215  # of every LDM latent; the autoencoder is rescaled so that it fits
GROUPS, AUTOENCODER_GROUPS, HEADS = 8, 4, 4
UNET = UNetConfig(
    widths=(48, 96, 160),
    num_res_blocks=1,
    depths=(0, 1, 1),
    context_dim=CONTEXT_DIM,
    heads=HEADS,
    norm_groups=GROUPS,
)
AUTOENCODER = AutoencoderConfig((32, 64, 128), num_res_blocks=1, norm_groups=AUTOENCODER_GROUPS)


@dataclass(frozen=True)
class Recipe:
    """What scenes to train on."""

    scenes: type[Scenes]
    cached: int  # scenes encoded once for the diffusion stage

    @property
    def dense(self) -> bool:
        """True if captions have private words."""
        return self.scenes is DenseScenes


RECIPES = {
    "names": Recipe(Scenes, cached=65536),
    "dense": Recipe(DenseScenes, cached=98304),
}


def vocabulary() -> list[str]:
    """Special tokens, the words of the captions, and letters from which any word can be spelt."""
    signs = list("abcdefghijklmnopqrstuvwxyz0123456789") + list("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~")
    pieces = [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    return list(dict.fromkeys([*WordPieceTokenizer.special, *signs, *pieces, *words()]))


# ------------------------------------------------------------------------------------ optimizer


@torch.no_grad()
def orthogonalize(g: Tensor) -> Tensor:
    """Each matrix of g (n, rows, columns) with its singular values pushed towards 1.

    Newton-Schulz iteration of Muon, carried out on the small Gram matrix: the polynomials of
    A = X X^T commute, so X is touched only twice.
    """
    if g.shape[1] > g.shape[2]:
        return orthogonalize(g.mT).mT
    x = g / (g.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a = gram = x @ x.mT
    eye = 3.4445 * torch.eye(a.shape[-1])
    p = None
    for i in range(4):
        q = torch.baddbmm(eye - 4.7750 * a, a, a, alpha=2.0315)
        p = q if p is None else q @ p
        a = p @ p @ gram if i < 3 else None
    return p @ x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the step has the size that AdamW's would have (Liu et al. 2025)."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[tuple, list] = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                by_shape.setdefault(update.shape, []).append((p, update))
            for shape, entries in by_shape.items():
                updates = orthogonalize(torch.stack([u for _, u in entries]))
                for (p, _), update in zip(entries, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


class Trainer:
    """Both optimizers, the schedule by wall time, averaged weights, and a resumable checkpoint."""

    def __init__(self, modules: nn.Module, path: Path, minutes: float, lr: float, decay: float):
        self.modules, self.path, self.seconds, self.lr = modules, path, minutes * 60, lr
        self.decay = decay
        inner = {
            id(p)
            for m in modules.modules()
            if isinstance(m, (nn.Conv2d, nn.Linear))
            for p in [m.weight]
            if min(p.flatten(1).shape) > 8
        }
        matrices = [p for p in modules.parameters() if id(p) in inner]
        others = [p for p in modules.parameters() if id(p) not in inner]
        self.optimizers = [
            Muon(matrices, lr, weight_decay=0.02),
            torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        ]
        self.ema = {k: v.clone() for k, v in modules.state_dict().items()}
        self.step, self.used, self.shown, self.saved = 0, 0.0, 0.0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            modules.load_state_dict(state["model"])
            self.ema, self.step, self.used = state["ema"], state["step"], state["used"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=False):
                optimizer.load_state_dict(saved)
        self.clock = time.time()
        self.shown = self.saved = self.used

    @property
    def done(self) -> float:
        return self.used / self.seconds

    def update(self, loss: Tensor) -> None:
        """One step at a rate that rises for 100 steps and falls over the last half of the time."""
        rate = self.lr * min(1, (self.step + 1) / 100, max(0.0, 1 - self.done) / 0.5)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.param_groups[0]["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.values()), list(self.modules.state_dict().values()), 1 - decay
            )
        self.step += 1
        self.used += time.time() - self.clock
        self.clock = time.time()

    def report(self, text: str, pictures: int) -> None:
        if self.used - self.shown > 30:
            self.shown = self.used
            rate = self.step * pictures / self.used
            print(f"{self.used:6.0f} s  step {self.step}  {rate:.1f}/s  {text}", flush=True)
        if self.used - self.saved > 120 or self.done >= 1:
            self.saved = self.used
            self.save()

    def save(self) -> None:
        state = {"model": self.modules.state_dict(), "ema": self.ema, "step": self.step}
        state |= {"used": self.used, "optimizers": [o.state_dict() for o in self.optimizers]}
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)


# --------------------------------------------------------------------------------------- stages


def train_autoencoder(scenes: Scenes, work: Path, minutes: float, recipe: Recipe) -> None:
    """L1 + L1 of the gradients + KL at 1e-3, on crops of 32 pixels (everything here is local)."""
    model = Autoencoder(AUTOENCODER).to(memory_format=torch.channels_last)
    with torch.no_grad():  # a posterior that starts narrow lets the decoder see something
        model.quant_conv.bias[4:] = -5
        model.quant_conv.weight[4:] *= 0.1
    trainer = Trainer(model, work / "autoencoder.pt", minutes, lr=4e-3, decay=0.995)
    while trainer.done < 1:
        pool = scenes.batch(512, trainer.step)[0] * 2 - 1
        for x in pool.split(16):
            i, j = torch.randint(0, 33, (2,)).tolist()
            x = x[..., i : i + 32, j : j + 32].contiguous(memory_format=torch.channels_last)
            with fast_cpu():
                mean, std = (part.float() for part in model.encode(x))
                y = model.decode(mean + std * torch.randn_like(std)).float()
            edges = sum((a - b).abs().mean() for a, b in zip(gradients(x), gradients(y)))
            kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
            loss = (x - y).abs().mean()
            trainer.update(loss + edges + 1e-3 * kl)
            trainer.report(f"L1 {loss.item():.4f}  edges {edges.item():.4f}", 16)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


@torch.no_grad()
def load_autoencoder(scenes: Scenes, work: Path) -> Autoencoder:
    """The averaged autoencoder, its latents shifted and scaled so that SCALE * z is standard.

    That goes into the 1x1 convolutions beside the latents, so the model needs no number of its
    own where LDM and Stable Diffusion have 0.18215.
    """
    model = Autoencoder(AUTOENCODER)
    saved = torch.load(work / "autoencoder.pt", weights_only=True)
    model.load_state_dict(saved["ema"])
    if saved.get("scaled"):  # imported
        return model
    mean, std = model.encode(scenes.batch(1024, 1)[0] * 2 - 1)
    torch.manual_seed(0)  # every call gives the same numbers
    z = mean + std * torch.randn_like(std)
    shift, scale = z.mean((0, 2, 3)), 1 / (z.std((0, 2, 3)) * SCALE)
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:4] *= scale.view(4, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - shift) * scale
    quant.bias[4:] += 2 * scale.log()
    post.bias += post.weight.flatten(1) @ shift
    post.weight /= scale.view(1, 4, 1, 1)
    return model


@torch.no_grad()
def cache_scenes(
    scenes: Scenes, work: Path, recipe: Recipe, tokenizer: WordPieceTokenizer
) -> dict[str, Tensor]:
    """The scenes as the diffusion stage reads them: means and deviations of the scaled latents,
    the captions' ids, how much of each latent pixel is the things', and what stands behind private
    words: the drawings, and in `example` the row of `examples` with another picture in the style
    (-1: no style)."""
    path = work / "scenes.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    model = load_autoencoder(scenes, work)
    rows = {key: [] for key in ("mean", "std", "ids", "thing", "drawings", "example")}
    examples = []
    for seed in range(0, recipe.cached, 512):
        pictures, captions, facts, alpha = scenes.batch(512, 10_000_000 + seed)
        ids = [tokenizer.pad(tokenizer.encode(caption)) for caption in captions]
        rows["ids"].append(torch.tensor(ids))
        rows["thing"].append(F.avg_pool2d(alpha, 4).half())
        for part in (pictures * 2 - 1).split(64):
            with fast_cpu():
                mean, std = model.encode(part)
            rows["mean"].append((mean.float() * SCALE).half())
            rows["std"].append((std.float() * SCALE).half())
        for drawings, example in facts if recipe.dense else ():
            rows["drawings"].append(drawings[None])
            rows["example"].append(torch.tensor([-1 if example is None else len(examples)]))
            examples += [] if example is None else [(example * 255).round().byte()]
    cache = {key: torch.cat(parts) for key, parts in rows.items() if parts}
    if examples:
        cache["examples"] = torch.stack(examples)
    torch.save(cache, path)
    return cache


class WordEncoder(nn.Module):
    """A word for a drawing (RGBA) or for a style (a picture in it), (n, channels, 64, 64) to
    (n, 192): a vector for the place of a token's.

    All words have the same length, and noise is added to each in training, so that words near by
    draw things that look alike.
    """

    LENGTH, NOISE = 2.0, 0.15

    def __init__(self, channels: int):
        super().__init__()
        layers, width = [], channels
        for wider in (32, 64, 128, 192):
            conv = nn.Conv2d(width, wider, 4, stride=2, padding=1)
            layers += [conv, nn.GroupNorm(8, wider), nn.SiLU()]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192 * 4 * 4, CONTEXT_DIM))

    def forward(self, pictures: Tensor) -> Tensor:
        word = F.normalize(self.layers(pictures).float(), dim=1)
        noise = torch.randn_like(word) / word.shape[1] ** 0.5
        return self.LENGTH * (word + self.NOISE * noise)


def private_words(
    encoders: nn.ModuleDict, scenes: Scenes, cache: dict, rows: Tensor, first_id: int
) -> Tensor:
    """The vectors (n, 3, 192) of the words PRIVATE, of the ids from `first_id` on, in the captions
    of these scenes; zeros where a caption has no such word."""
    words = torch.zeros(len(rows), len(PRIVATE), CONTEXT_DIM)
    for k, name in enumerate(("thing", "thing", "style")):
        used = (cache["ids"][rows] == first_id + k).any(1).nonzero()[:, 0]
        if not len(used):
            continue
        if name == "thing":
            pictures = scenes.sprite(cache["drawings"][rows[used], k])
        else:
            pictures = cache["examples"][cache["example"][rows[used]]] / 255
        words[used, k] = encoders[name](pictures)
    return words


def embed(table: Tensor, ids: Tensor, private: Tensor) -> Tensor:
    """Token vectors (n, L, 192) of ids (n, L): rows of the table, or beyond it private words."""
    new = ids - len(table)
    picked = private.gather(1, new.clamp(min=0)[..., None].expand(-1, -1, private.shape[2]))
    return torch.where(new[..., None] >= 0, picked, table[ids.clamp(max=len(table) - 1)])


def train_diffusion(scenes: Scenes, work: Path, minutes: float, recipe: Recipe) -> None:
    vocab = vocabulary()
    tokenizer = WordPieceTokenizer([*vocab, *PRIVATE], MAX_LENGTH)
    cache = cache_scenes(scenes, work, recipe, tokenizer)
    empty = torch.tensor(tokenizer.pad(tokenizer.encode("")))
    torch.manual_seed(0)
    modules = networks(len(vocab), recipe)
    text, unet = modules["text"], modules["unet"]
    trainer = Trainer(modules, work / "diffusion.pt", minutes, lr=3e-3, decay=0.9985)
    torch.manual_seed(trainer.step)
    schedule = Schedule(0.00085, 0.012, PREDICTION)
    snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).float()
    weight = (5 / (snr + 1)).clamp(max=1)
    average = None
    while trainer.done < 1:
        rows = torch.randint(len(cache["ids"]), (BATCH,))
        x_0 = cache["mean"][rows] + cache["std"][rows] * torch.randn(BATCH, 4, 16, 16)
        ids = cache["ids"][rows]
        ids[torch.rand(BATCH) < 0.1] = empty
        t = ((torch.arange(BATCH) + torch.rand(BATCH)) * (1000 / BATCH)).long().clamp(max=999)
        noise = torch.randn_like(x_0)
        x_t, target = schedule.q_sample(x_0, t, noise), schedule.target(x_0, t, noise)
        with fast_cpu():
            private = private_words(modules["words"], scenes, cache, rows, len(vocab))
            context = text(embed(text.token_table, ids, private))
            prediction = unet(x_t, t, context).float()
        error = ((prediction - target) ** 2).mean(1)
        # What can be learnt lies in the thing; the background's ripples and stars are chance.
        importance = 0.5 + cache["thing"][rows]
        trainer.update((weight[t, None, None] * importance * error).mean())
        plain = error.mean().item()
        average = plain if average is None else average + 0.02 * (plain - average)
        trainer.report(f"v error {average:.4f}", BATCH)


def networks(vocab_size: int, recipe: Recipe) -> nn.ModuleDict:
    """Text encoder, UNet and word encoders before the first step."""
    text = BertTextEncoder(BertConfig(CONTEXT_DIM, 2, vocab_size, MAX_LENGTH))
    nn.init.normal_(text.transformer.token_emb.weight, std=0.1)
    nn.init.normal_(text.transformer.pos_emb.emb.weight, std=0.02)
    unet = UNet(UNET)
    nn.init.zeros_(unet.out[2].weight)
    for block in unet.modules():  # residual branches start at nothing
        if hasattr(block, "out_layers"):
            nn.init.zeros_(block.out_layers[3].weight)
        if hasattr(block, "proj_out"):
            nn.init.zeros_(block.proj_out.weight)
    unet.to(memory_format=torch.channels_last)
    encoders = {"thing": WordEncoder(4), "style": WordEncoder(3)} if recipe.dense else {}
    return nn.ModuleDict({"text": text, "unet": unet, "words": nn.ModuleDict(encoders)})


@contextlib.contextmanager
def fast_cpu():
    """bfloat16 where the processor multiplies it (2.4 times as fast), plain attention (flash
    attention's backward is slow in bfloat16)."""
    native = torch.cpu._is_avx512_bf16_supported()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on processors, too
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=native):
        yield


def train_clip(scenes: Scenes, work: Path, minutes: float, recipe: Recipe, batch: int = 128):
    """Radford et al. 2021: within a batch, each picture finds its caption and each caption its
    picture. For evaluation only; the diffusion model never sees it."""
    tokenizer = WordPieceTokenizer(vocabulary(), MAX_LENGTH)
    torch.manual_seed(0)
    clip = CLIP(clip_config(tokenizer))
    for p in (
        clip.vision_model.embeddings.class_embedding,
        *(m.weight for m in clip.modules() if isinstance(m, nn.Embedding)),
    ):
        nn.init.normal_(p, std=0.02)
    trainer = Trainer(clip, work / "clip.pt", minutes, lr=2e-3, decay=0.995)
    while trainer.done < 1:
        pictures, captions, _, _ = scenes.batch(batch, 50_000_000 + trainer.step)
        if trainer.step % 2:  # pictures that a model draws are a little soft
            pictures = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
        ids = torch.tensor([tokenizer.pad(tokenizer.encode(c)) for c in captions])
        image = F.normalize(clip.encode_image((pictures - MEAN) / STD), dim=-1)
        text = F.normalize(clip.encode_text(ids, tokenizer.end_id), dim=-1)
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ text.T
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        hits = (logits.argmax(1) == target).float().mean().item()
        trainer.update(loss)
        trainer.report(f"loss {loss.item():.3f}  found {hits:.2f} of {batch}", batch)


def clip_config(tokenizer: WordPieceTokenizer) -> CLIPConfig:
    sizes = dict(vocab_size=tokenizer.vocab_size, max_length=MAX_LENGTH)
    return CLIPConfig(
        text=TextConfig(width=128, layers=2, heads=2, **sizes),
        vision=VisionConfig(width=192, layers=4, heads=3, image_size=64, patch_size=8),
        width=128,
    )


def export(scenes: Scenes, work: Path, minutes: float, recipe: Recipe) -> None:
    """Write models/emoji: averaged weights in fp16 under LDM's key names, vocabulary, settings.

    Tokens that no caption has, from which other words are spelt, get the vector of "a": at random,
    they would be read like private words. (Not "-", which the templates' "close-up" has.)
    """
    target = repository.ROOT / "models" / "emoji"
    target.mkdir(exist_ok=True)
    ema = torch.load(work / "diffusion.pt", weights_only=True)["ema"]
    prefixes = {"text.": "cond_stage_model.", "unet.": "model.diffusion_model."}
    weights = {}
    for key, tensor in ema.items():
        for old, new in prefixes.items():
            if key.startswith(old):
                weights[new + key.removeprefix(old)] = tensor
    for key, tensor in load_autoencoder(scenes, work).state_dict().items():
        weights["first_stage_model." + key] = tensor
    table, tokens = weights["cond_stage_model.transformer.token_emb.weight"], vocabulary()
    known = {*WordPieceTokenizer.special, *words(), "-"}
    spare = [i for i, token in enumerate(tokens) if token not in known]
    table[spare] = table[tokens.index("a")].clone()
    half = {k: v.half().contiguous() for k, v in weights.items()}
    save_file(half, target / "model.safetensors")
    (target / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    settings = dict(name="emoji", size=64, norm_groups=[GROUPS, AUTOENCODER_GROUPS])
    settings |= dict(heads=HEADS, prediction=PREDICTION)
    settings["defaults"] = dict(steps=600, batch_size=8, lr=0.0025, guidance_scale=3.0)
    settings["nouns"] = [*dict.fromkeys([*scenes.coarse, *scenes.names])]
    (target / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    if (work / "clip.pt").exists():
        ema = torch.load(work / "clip.pt", weights_only=True)["ema"]
        save_file({k: v.half().contiguous() for k, v in ema.items()}, target / "clip.safetensors")


def import_bundled(scenes: Scenes, work: Path, minutes: float, recipe: Recipe) -> None:
    """Checkpoints in WORK that start from models/emoji, without the optimizers' state."""
    model = load_model(device="cpu")
    saved = {"ema": model.autoencoder.state_dict(), "scaled": True}
    torch.save(saved, work / "autoencoder.pt")
    modules = networks(model.tokenizer.vocab_size, recipe)
    modules["text"], modules["unet"] = model.text_encoder, model.unet
    state = modules.state_dict()  # the word encoders, which are not exported, start anew
    state = {"model": state, "ema": state, "step": 0, "used": 0.0, "optimizers": []}
    torch.save(state, work / "diffusion.pt")


STAGES = {
    "autoencoder": train_autoencoder,
    "diffusion": train_diffusion,
    "clip": train_clip,
    "export": export,
    "import": import_bundled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sprites", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--recipe", choices=RECIPES, default="names")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.recipe]
    kind = Scenes if args.stage == "clip" else recipe.scenes  # CLIP judges by names
    STAGES[args.stage](kind(args.sprites), args.work, args.minutes, recipe)


if __name__ == "__main__":
    run_script(main)
