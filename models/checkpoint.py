"""Public checkpoints to models: the families and what tells them apart, sizes, strict loading.

What lies in a file is read by reading.py and named by naming.py. Here the family is found from the
names and every size from the shapes, and the tensors fill modules that were built of those sizes:
every key must match.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder, AutoencoderConfig
from .bert import BertConfig, BertTextEncoder
from .clip import CLIP, CLIPConfig, CLIPTextEncoder, TextConfig, VisionConfig
from .latent_diffusion import LatentDiffusion
from .naming import (
    autoencoder_from_diffusers,
    count,
    part,
    text_from_open_clip,
    text_from_transformers,
    towers_from_openai,
    unet_from_diffusers,
)
from .reading import EXPECTED, CheckpointError, Tensors, checking, contents, open_state, some
from .schedule import Schedule
from .tokenizers import (
    OPEN_CLIP_SPECIAL,
    OPENAI_SPECIAL,
    CLIPTokenizer,
    Tokenizer,
    WordPieceTokenizer,
)
from .unet import UNet, UNetConfig

BUNDLED = Path(__file__).parent / "emoji"
BERT_VOCAB = Path(__file__).parent / "vocab" / "bert-base-uncased.txt"
BETAS = (0.00085, 0.012)  # LDM text2img-large and Stable Diffusion alike

# ------------------------------------------------------------------------- sizes from the shapes


def unet_config(state: Tensors, **known) -> UNetConfig:
    """Sizes of a UNet; `known` are the heads and the groups, which shapes do not tell."""
    levels: list[list[int]] = [[]]
    attention = set()
    for i in range(1, count(state, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in state:
            levels.append([])
            continue
        levels[-1].append(state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0])
        if f"input_blocks.{i}.1.proj_in.weight" in state:
            attention.add(len(levels) - 1)
    middle = "middle_block.1.transformer_blocks"
    return UNetConfig(
        widths=tuple(level[0] for level in levels),
        num_res_blocks=len(levels[0]),
        attention_levels=tuple(sorted(attention)),
        depth=count(state, middle.replace(".", r"\.") + r"\.(\d+)\."),
        context_dim=state[f"{middle}.0.attn2.to_k.weight"].shape[1],
        channels=state["input_blocks.0.0.weight"].shape[1],
        linear_projection=len(state["middle_block.1.proj_in.weight"].shape) == 2,
        **known,
    )


def autoencoder_config(state: Tensors, **known) -> AutoencoderConfig:
    levels = range(count(state, r"encoder\.down\.(\d+)\."))
    return AutoencoderConfig(
        widths=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels),
        num_res_blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        z_channels=state["post_quant_conv.weight"].shape[0],
        **known,
    )


def bert_config(state: Tensors) -> BertConfig:
    vocab_size, width = state["transformer.token_emb.weight"].shape
    return BertConfig(
        width=width,
        layers=count(state, r"transformer\.attn_layers\.layers\.(\d+)\.") // 2,
        vocab_size=vocab_size,
        max_length=state["transformer.pos_emb.emb.weight"].shape[0],
    )


def check_heads(width: int, heads: int | None) -> None:
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{heads!r} attention heads do not divide {width} channels")


def text_config(state: Tensors, heads: int | None, quick_gelu: bool) -> TextConfig:
    """`heads` None: 64 channels each, as in every published CLIP."""
    vocab_size, width = state["text_model.embeddings.token_embedding.weight"].shape
    heads = heads or max(1, width // 64)
    check_heads(width, heads)
    return TextConfig(
        width=width,
        layers=count(state, r"text_model\.encoder\.layers\.(\d+)\."),
        heads=heads,
        quick_gelu=quick_gelu,
        vocab_size=vocab_size,
        max_length=state["text_model.embeddings.position_embedding.weight"].shape[0],
    )


# ------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """What tells LDM, Stable Diffusion 1 and 2 apart, beside what shapes tell: the sizes, and
    whether the UNet projects by linear layers or by 1x1 convolutions.

    Outside of this table stand what each text encoder computes (bert.py, clip.py), that SD 2 does
    without its last layer (naming.py), and how a folder of diffusers' is told to be SD 1 or 2
    (`from_diffusers`).
    """

    key: str  # what keys of a single file begin with, in no family further down
    text: Callable[[Tensors], Tensors]  # its text encoder's tensors under our names
    encoder: Callable[..., nn.Module]
    config: Callable[[Tensors, int | None], BertConfig | TextConfig]  # heads if known
    tokenizer: Callable[
        ["Parts", int, int], Tokenizer
    ]  # of the size of the vocabulary, and the length
    attention: dict[str, int | None]  # the UNet's heads: a number of them, or channels in each
    prediction: str | None  # None: there are both, and keys do not tell which
    size: dict[str, int]  # side of the pictures it was trained on, pixels, by prediction
    special: tuple[str, str] = OPENAI_SPECIAL  # start and end, where prompts spell them out


LDM = Family(
    key="cond_stage_model.transformer.token_emb.",
    text=lambda state: {k: v for k, v in state.items() if ".to_logits." not in k},
    encoder=BertTextEncoder,
    config=lambda state, heads: bert_config(state),
    tokenizer=lambda parts, _, length: WordPieceTokenizer.load(
        parts.vocabulary or BERT_VOCAB, length
    ),
    attention=dict(heads=8, head_width=None),
    prediction="eps",
    size=dict(eps=256, v=256),
)
SD1 = replace(
    LDM,
    key="cond_stage_model.transformer.",
    text=lambda state: text_from_transformers(part(state, "transformer.")),
    encoder=CLIPTextEncoder,
    config=lambda state, heads: text_config(state, heads, quick_gelu=True),
    tokenizer=lambda parts, vocab_size, length: CLIPTokenizer.load(
        parts.vocabulary, length, None, vocab_size, parts.special
    ),
    size=dict(eps=512, v=512),
)
SD2 = replace(
    SD1,
    key="cond_stage_model.model.",
    text=lambda state: text_from_open_clip(part(state, "model.")),
    config=lambda state, heads: text_config(state, heads, quick_gelu=False),
    tokenizer=lambda parts, vocab_size, length: CLIPTokenizer.load(
        parts.vocabulary, length, 0, vocab_size, parts.special
    ),
    attention=dict(heads=None, head_width=64),
    prediction=None,
    size=dict(eps=512, v=768),
    special=OPEN_CLIP_SPECIAL,
)
FAMILIES = {"ldm": LDM, "sd1": SD1, "sd2": SD2}


@dataclass
class Parts:
    """A checkpoint taken apart: the three networks under our names, and what was said beside."""

    path: Path
    family: str
    unet: Tensors
    autoencoder: Tensors
    text: Tensors
    prediction: str | None = None
    betas: tuple[float, float] = BETAS
    heads: int | None = None
    head_width: int | None = None
    text_heads: int | None = None
    unet_groups: int = 32
    autoencoder_groups: int = 32
    vocabulary: Path | None = None
    special: tuple[str, str] = OPENAI_SPECIAL
    name: str = ""
    size: int | None = None
    defaults: dict = field(default_factory=dict)  # as `LatentDiffusion.defaults`


def find_family(state: Tensors, path: Path) -> str:
    """The family of a single file; `CheckpointError` if it is of none."""
    for name, family in FAMILIES.items():
        if any(key.startswith(family.key) for key in state):
            return name
    if any(key.startswith("conditioner.embedders.") for key in state):
        raise CheckpointError(f"{path}: Stable Diffusion XL is not supported; {EXPECTED}")
    raise CheckpointError(f"{path}: not a text-to-image model, found {some(state)}; {EXPECTED}")


# -------------------------------------------------------------------------------------- loading


def filled(build: Callable[[], nn.Module], state: Tensors, dtype, device, path: Path) -> nn.Module:
    """The module built without memory, then given the file's tensors; every key must match."""
    with torch.device("meta"):
        module = build()
    wanted = module.state_dict()
    missing, left = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [k for k in wanted if k in state and state[k].shape != tuple(wanted[k].shape)]
    if missing or left or wrong:
        raise CheckpointError(
            f"{path}: not the expected {type(module).__name__}: {len(missing)} keys missing "
            f"({some(missing)}), {len(left)} not expected ({some(left)}), {len(wrong)} of another "
            f"shape ({some(wrong)})"
        )
    module.load_state_dict(
        {k: state[k].read(dtype).to(device) for k in wanted}, strict=True, assign=True
    )
    return module.eval()


def holds_model(path: Path) -> bool:
    """Whether a file is a checkpoint of a text-to-image model, supported or not."""
    try:
        return any(key.startswith("model.diffusion_model.") for key in open_state(path))
    except CheckpointError:
        return False


def settings_beside(path: Path) -> dict[str, str]:
    """Plain `key: value` lines of the original configuration beside a file, where there is one:
    model.yaml beside model.ckpt, or config.yaml."""
    for name in (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        if name.is_file():
            text = name.read_text(errors="replace")
            lines = re.findall(r"^\s*(\w+):[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
            return dict(reversed(lines))  # the first of equal keys counts
    return {}


def from_single_file(path: Path, family: str | None) -> Parts:
    """LDM's or Stable Diffusion's own layout. EMA copies (`model_ema.`), the schedule's buffers
    and training leftovers are passed over, as in the original inference configuration."""
    state = open_state(path)
    family = family or find_family(state, path)
    beside = settings_beside(path)
    number = {k: int(v) for k, v in beside.items() if v.isdigit()}
    autoencoder = part(state, "first_stage_model.")
    vocabulary = path.with_name("vocab.txt")
    return Parts(
        path,
        family,
        unet=part(state, "model.diffusion_model."),
        autoencoder={k: v for k, v in autoencoder.items() if not k.startswith("loss.")},
        text=FAMILIES[family].text(part(state, "cond_stage_model.")),
        prediction=beside.get("parameterization"),
        heads=None if "num_head_channels" in number else number.get("num_heads"),
        head_width=number.get("num_head_channels"),
        text_heads=number.get("num_attention_heads") or number.get("heads"),
        vocabulary=vocabulary if family == "ldm" and vocabulary.is_file() else None,
        special=FAMILIES[family].special,
        name=path.name,
    )


def read_json(path: Path) -> dict:
    with checking(path):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def component(folder: Path) -> tuple[Tensors, dict]:
    """Weights and config.json of one subfolder of the diffusers layout, fp16 variants included."""
    names = ("diffusion_pytorch_model", "model", "pytorch_model")
    endings = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    for name in (n + e for e in endings for n in names):
        if (folder / name).is_file():
            return open_state(folder / name), read_json(folder / "config.json")
    raise CheckpointError(
        f"{folder}: no weights there, found {some(sorted(p.name for p in folder.glob('*')))}; "
        f"expected {names[0]}.safetensors or the like, as diffusers writes it"
    )


def from_diffusers(path: Path, family: str | None) -> Parts:
    """A folder of Stable Diffusion 1 or 2 as diffusers writes it; warns of a schedule that is not
    the usual one."""
    if (path / "text_encoder_2").exists():
        raise CheckpointError(f"{path}: Stable Diffusion XL is not supported; {EXPECTED}")
    unet, config = component(path / "unet")
    autoencoder, autoencoder_settings = component(path / "vae")
    text, text_settings = component(path / "text_encoder")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    unet = unet_from_diffusers(unet)
    if not family:
        linear = len(unet["middle_block.1.proj_in.weight"].shape) == 2
        family = "sd2" if linear else "sd1"
    # Trap: diffusers calls the number of heads `attention_head_dim`, one for all levels or a list.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    by_width = isinstance(heads, list)
    kind = scheduler.get("prediction_type")
    usual = dict(beta_schedule="scaled_linear", num_train_timesteps=1000)
    usual |= dict(scaling_factor=0.18215)
    for key, value in usual.items():
        told = (scheduler | autoencoder_settings).get(key, value)
        if told != value:
            warnings.warn(f"{path}: {key} {told} is not supported, {value} is taken instead")
    merges = path / "tokenizer" / "merges.txt"
    return Parts(
        path,
        family,
        unet,
        autoencoder_from_diffusers(autoencoder),
        text_from_transformers(text),
        prediction={"epsilon": "eps", "v_prediction": "v"}.get(kind, kind),
        betas=(scheduler.get("beta_start", BETAS[0]), scheduler.get("beta_end", BETAS[1])),
        heads=None if by_width else heads,
        head_width=unet["input_blocks.0.0.weight"].shape[0] // heads[0] if by_width else None,
        text_heads=text_settings.get("num_attention_heads"),
        unet_groups=config.get("norm_num_groups", 32),
        autoencoder_groups=autoencoder_settings.get("norm_num_groups", 32),
        vocabulary=merges if merges.is_file() else None,
        name=path.name,
    )


def take_apart(path: Path, family: str | None) -> Parts:
    """A single file, a folder of diffusers', or one like that of the bundled model."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; {EXPECTED}")
    if path.is_file():
        return from_single_file(path, family)
    if (path / "unet").is_dir():
        return from_diffusers(path, family)
    settings = read_json(path / "config.json")
    if "norm_groups" not in settings:
        raise CheckpointError(f"{path}: found {contents(path)}; {EXPECTED}")
    parts = from_single_file(path / "model.safetensors", "ldm")
    parts.unet_groups, parts.autoencoder_groups = settings["norm_groups"]
    parts.heads, parts.prediction = settings["heads"], settings["prediction"]
    parts.name, parts.size = settings["name"], settings["size"]
    parts.defaults = settings["defaults"]
    return parts


def load_tokenizer(parts: Parts, vocab_size: int, max_length: int) -> Tokenizer:
    tokenizer = FAMILIES[parts.family].tokenizer(parts, vocab_size, max_length)
    if tokenizer.vocab_size != vocab_size:
        raise CheckpointError(
            f"{parts.path}: its text encoder knows {vocab_size} tokens, its vocabulary has "
            f"{tokenizer.vocab_size}; put the vocab.txt it was trained with beside it"
        )
    return tokenizer


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, the best there is for None; ValueError if it is not here."""
    try:
        device = best_device() if name is None else torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not known; use cuda, mps or cpu") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if (device.index or 0) >= here.get(device.type, 0):
        raise ValueError(
            f"no device {device} here; use --device cpu, or install a torch that supports it"
        )
    return device


def best_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # not on V100 and T4
        return torch.bfloat16 if native else torch.float16
    return torch.float32


def measure_prediction(model: LatentDiffusion) -> str:
    """Tell an eps-model from a v-model by asking it (SD 2's two kinds have the same keys).

    At the last timestep x_t is nearly all noise: an eps-model returns it, a v-model about -x_0.
    """
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, model.unet.config.channels, 32, 32, generator=generator)
    t = torch.tensor([model.schedule.length - 1], device=model.device)
    with torch.no_grad():
        prediction = model.unet(x_t.to(model.device), t, model.encode_text([""])).float().cpu()
    correlation = torch.corrcoef(torch.stack([x_t.flatten(), prediction.flatten()]))[0, 1]
    return "eps" if correlation > 0.5 else "v"


def load_model(
    path: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    prediction: str | None = None,
) -> LatentDiffusion:
    """A text-to-image model from a public checkpoint, frozen, ready to invert and sample.

    path: a single file (.ckpt, .safetensors), a folder in the diffusers layout, or None for the
    bundled model. device, dtype: the best there are unless given; the text encoder stays in
    float32 whatever `dtype` is. family ("ldm", "sd1", "sd2") and prediction ("eps", "v") override
    what the file says. Raises `CheckpointError`, a ValueError, for anything but such a file.
    """
    if family not in (None, *FAMILIES):
        raise ValueError(f"family {family!r} is not known; use {', '.join(FAMILIES)}")
    if prediction not in (None, "eps", "v"):
        raise ValueError(f"prediction {prediction!r} is not known; use eps or v")
    path = Path(path) if path is not None else BUNDLED
    device = find_device(device)
    dtype = dtype or best_dtype(device)
    with checking(path):
        return assemble(take_apart(path, family), device, dtype, prediction)


def assemble(parts: Parts, device, dtype, prediction: str | None) -> LatentDiffusion:
    """The networks of a checkpoint that was taken apart, built, filled and put together."""
    family, path = FAMILIES[parts.family], parts.path
    heads = dict(heads=parts.heads, head_width=parts.head_width)
    heads = heads if any(heads.values()) else family.attention
    unet = unet_config(parts.unet, **heads, norm_groups=parts.unet_groups)
    for width in unet.widths:
        check_heads(width, unet.heads_for(width))
    autoencoder = autoencoder_config(parts.autoencoder, norm_groups=parts.autoencoder_groups)
    if unet.channels != autoencoder.z_channels:
        raise CheckpointError(
            f"{path}: its UNet takes {unet.channels} channels, its latents have "
            f"{autoencoder.z_channels}; inpainting, depth and upscaling models are not supported"
        )
    text = family.config(parts.text, parts.text_heads)
    told = prediction or parts.prediction or family.prediction
    sample = parts.unet["out.2.weight"].read(None)
    model = LatentDiffusion(
        unet=filled(lambda: UNet(unet), parts.unet, dtype, device, path),
        autoencoder=filled(
            lambda: Autoencoder(autoencoder), parts.autoencoder, dtype, device, path
        ),
        text_encoder=filled(lambda: family.encoder(text), parts.text, torch.float32, device, path),
        tokenizer=load_tokenizer(parts, text.vocab_size, text.max_length),
        schedule=Schedule(*parts.betas, told or "eps"),
        family=parts.family,
        name=parts.name,
        fingerprint=fingerprint(sample),
        stored=str(sample.dtype).removeprefix("torch."),
        defaults=parts.defaults,
    )
    if not told:
        model.schedule = Schedule(*parts.betas, measure_prediction(model))
    model.size = parts.size or family.size[model.schedule.prediction]
    return model


def fingerprint(weights: Tensor) -> str:
    """16 hexadecimal digits that name a base model, equal for its fp16 and fp32 files."""
    return hashlib.sha256(weights.half().numpy().tobytes()).hexdigest()[:16]


CLIP_EXPECTED = (
    "expected a CLIP with both towers: OpenAI's .pt, its state_dict, or a file or folder in the "
    "layout of transformers"
)


def load_clip(path: str | Path | None = None) -> CLIP:
    """CLIP with both towers (the paper measures with OpenAI's ViT-B/32), float32, on the CPU.

    path: OpenAI's published .pt, a TorchScript archive of which only the tensors are read; its
    state_dict; model.safetensors of the layout of `transformers`, or the folder it is in, with the
    config.json beside it; None for the bundled one. Raises `CheckpointError`, a ValueError, for
    anything else.
    """
    path = Path(path) if path is not None else BUNDLED / "clip.safetensors"
    try:
        with checking(path):
            folder = (path / "config.json").is_file()
            return assemble_clip(component(path)[0] if folder else open_state(path), path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(EXPECTED, CLIP_EXPECTED)) from error


def assemble_clip(state: Tensors, path: Path) -> CLIP:
    """Sizes come from the shapes. The heads (64 channels each) and QuickGELU are OpenAI's unless a
    config.json in the layout of `transformers` says otherwise, as LAION's do."""
    text_settings, vision_settings = {}, {}
    if "visual.conv1.weight" in state:
        if "input_resolution" not in state:  # a scalar of OpenAI's own files, in no state_dict
            warnings.warn(
                f"{path}: taken for OpenAI's CLIP, whose GELU is approximate; for one of LAION's, "
                "give the folder with its config.json in the layout of transformers"
            )
        state = towers_from_openai(state)
    else:
        settings = read_json((path if path.is_dir() else path.parent) / "config.json")
        text_settings = settings.get("text_config") or {}
        vision_settings = settings.get("vision_config") or {}
    for key in ("visual_projection.weight", "text_projection.weight"):
        if key not in state:
            raise CheckpointError(f"{path}: has no {key}, found {some(state)}; {CLIP_EXPECTED}")
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    patches = state["vision_model.embeddings.patch_embedding.weight"].shape
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    config = CLIPConfig(
        text=text_config(state, text_settings.get("num_attention_heads"), quick(text_settings)),
        vision=VisionConfig(
            width=patches[0],
            layers=count(state, r"vision_model\.encoder\.layers\.(\d+)\."),
            heads=vision_settings.get("num_attention_heads") or max(1, patches[0] // 64),
            quick_gelu=quick(vision_settings),
            patch_size=patches[2],
            image_size=math.isqrt(positions - 1) * patches[2],
        ),
        width=state["text_projection.weight"].shape[0],
    )
    check_heads(config.vision.width, config.vision.heads)
    return filled(lambda: CLIP(config), state, torch.float32, "cpu", path)


def quick(settings: dict) -> bool:
    """Whether a tower of CLIP has OpenAI's approximation of GELU, or the exact one."""
    return settings.get("hidden_act", "quick_gelu") == "quick_gelu"
