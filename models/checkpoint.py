"""Public checkpoints to models: the families and what tells them apart, sizes, strict loading.

files.py reads tensors, naming.py gives them our names and sizes.py finds the sizes of the networks.
Here the family is found from the names, and the tensors fill modules that were built of those
sizes: every key must match.
"""

import hashlib
import json
import re
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from . import files, naming
from .autoencoder import Autoencoder
from .bert import BertConfig, BertTextEncoder
from .clip import CLIP, CLIPConfig, CLIPTextEncoder, SDXLTextEncoder, TextConfig
from .concepts import MAX_VECTORS, load_concepts
from .files import EXPECTED, CheckpointError, checking, contents, open_state, some
from .latent_diffusion import LatentDiffusion
from .naming import Tensors, part
from .published import checkpoint_in, find
from .schedule import Schedule
from .sizes import autoencoder_config, bert_config, text_config, unet_config, vision_config
from .tokenizers import CLIPTokenizer, WordPieceTokenizer
from .unet import UNet

FAMILIES = ("ldm", "sd1", "sd2", "sdxl")
BUNDLED = Path(__file__).parent / "emoji"
CONFIG = "config.json"
BERT_VOCAB = Path(__file__).parent / "vocab" / "bert-base-uncased.txt"
# For SDXL, whose steps cost eight times those of Stable Diffusion 1. The published recipes of
# diffusers and of invoke-training agree on this rate per step and on showing 2,000 pictures.
SDXL = dict(steps=2000, batch_size=1, lr=0.002, guidance_scale=5.0)
SAME = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset")
SCHEDULER = {name: name for name in SAME}  # diffusers' names of the arguments of `Schedule`
SCHEDULER |= dict(num_train_timesteps="length", rescale_betas_zero_snr="zero_snr")
SCHEDULER |= dict(timestep_spacing="spacing")
REFUSED = {  # a key in it: what the file is then
    r"lora_|.*\.(lora|hada|lokr)_": "a LoRA, which changes a model and is none",
    r"control_model\.": "a ControlNet, which steers a model and is none",
    r"conv_first\.|.*(RDB|rdb)\d\.": "an upscaler of finished pictures",
    r"model\.diffusion_model\.|(input|down)_blocks\.": "a UNet without a text encoder",
    r"(first_stage_model\.)?(encoder|decoder)\.": "an autoencoder alone; give it to --vae",
    r"text_model\.|.*\.resblocks\.": "a text encoder without a UNet",
}
# Tensors that some programs leave in a file and that no model here needs.
NEEDLESS = re.compile(
    r"(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?|num_batches_tracked)$"
    r"|visual_projection\.|vision_model\.|visual\.|(.*\.)?to_logits\.|loss\.|(.*[._])?(lora|optimizer)[._]"
)

# ------------------------------------------------------------------------------ what a file says
# Each reader below returns the tensors of "unet", "autoencoder" and "text" under our names, and the
# arguments of `assemble` that the file, or what lies beside it, tells.


def find_family(state: Tensors) -> str:
    """Return the family of a single file. Raises `CheckpointError` if it is of none."""

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in state)

    if has("cond_stage_model.transformer.token_emb."):
        return "ldm"
    if has("conditioner.embedders.1."):
        return "sdxl"
    if has("cond_stage_model.", "conditioner.embedders.0.") and has("model.diffusion_model."):
        if has("model.diffusion_model.label_emb."):
            raise CheckpointError(f"the refiner of SDXL, which is not supported; {EXPECTED}")
        # Trap: the names of the text encoder do not tell, both families come in all layouts.
        linear = state["model.diffusion_model.middle_block.1.proj_in.weight"].ndim == 2
        return "sd2" if linear else "sd1"
    for pattern, what in REFUSED.items():
        if any(re.match(pattern, key) for key in state):
            raise CheckpointError(f"{what}; {EXPECTED}")
    raise CheckpointError(f"not a text-to-image model, found {some(state)}; {EXPECTED}")


def read_single_file(path: Path, family: str | None) -> tuple[dict[str, Tensors], dict]:
    """LDM's or Stable Diffusion's own layout. EMA copies (`model_ema.`), the schedule's buffers
    and training leftovers are passed over, as in the original inference configuration."""
    state = open_state(path)
    if any(key.startswith("edm_") for key in state):
        raise CheckpointError(f"a model trained as EDM, which is not supported; {EXPECTED}")
    family = family or find_family(state)
    beside = files.settings_beside(path)
    number = {k: int(v) for k, v in beside.items() if v.isdigit()}
    known = dict(family=family, name=path.name, prediction=beside.get("parameterization"))
    known["short_hash"] = files.short_hash(path)
    # Fine-tunes say by empty tensors with these names what they are.
    known["schedule"] = dict(zero_snr="ztsnr" in state)
    known["prediction"] = "v" if "v_pred" in state else known["prediction"]
    if "num_head_channels" in number:
        known["attention"] = dict(heads=None, head_width=number["num_head_channels"])
    elif "num_heads" in number:
        known["attention"] = dict(heads=number["num_heads"])
    heads = number.get("num_attention_heads"), number.get("heads")  # CLIP's, open_clip's
    known["text_heads"] = heads if family == "sdxl" else heads[0] or heads[1]
    text = part(state, "cond_stage_model.") or part(state, "conditioner.embedders.0.")
    if family == "ldm":
        vocabulary = path.with_name("vocab.txt")
        known["vocabulary"] = vocabulary if vocabulary.is_file() else None
    elif family == "sdxl":
        text = naming.text_from_sdxl(part(state, "conditioner.embedders."))
    else:
        open_clip = part(text, "model.")
        text = naming.clip_from_openai(open_clip) if open_clip else part(text, "transformer.")
        text = naming.text_from_transformers(text)
    if family == "sd2":
        text = naming.text_up_to_penultimate(text, number.get("layers"))
    unet = part(state, "model.diffusion_model.")
    autoencoder = naming.vae_attention(part(state, "first_stage_model."))
    for ending in ("safetensors", "pt", "ckpt"):
        file = path.with_name(f"{path.stem}.vae.{ending}")
        if not autoencoder and file.is_file():
            warnings.warn(f"{path} has no autoencoder; {file.name} beside it is taken")
            autoencoder, _ = read_autoencoder(file)
    return dict(unet=unet, autoencoder=autoencoder, text=text), known


def read_autoencoder(path: Path) -> tuple[Tensors, dict]:
    """Return the tensors and settings of an autoencoder by itself: a file in either layout, or a
    folder as diffusers writes it."""
    expected = "expected an autoencoder: a file, or a vae folder in the diffusers layout"
    with checking(path, expected):
        path = path / "vae" if (path / "vae").is_dir() else path
        config = read_json(path.with_name(CONFIG))
        state, config = read_component(path) if path.is_dir() else (open_state(path), config)
        state = part(state, "first_stage_model.") or state
        if "post_quant_conv.weight" not in state:
            raise CheckpointError(f"no autoencoder, found {some(state)}; {expected}")
        diffusers = any("_blocks." in key for key in state)
        rename = naming.autoencoder_from_diffusers if diffusers else naming.vae_attention
        return rename(state), config


def read_json(path: Path) -> dict:
    """The object in a JSON file, empty if there is no such file."""
    with checking(path):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def read_component(folder: Path) -> tuple[Tensors, dict]:
    """Return weights and config.json of one subfolder of the diffusers layout: of the first variant
    that is there, in one file or in shards that an index names."""
    names = ("diffusion_pytorch_model", "model", "pytorch_model")
    for variant in ("", ".fp16", ".bf16", ".non_ema"):
        for ending, name in ((e, n) for e in ("safetensors", "bin") for n in names):
            files = [folder / f"{name}{variant}.{ending}"]
            index = folder / f"{name}.{ending}.index{variant}.json"
            if index.is_file():
                shards = set(read_json(index)["weight_map"].values())
                files = [folder / Path(shard).name for shard in sorted(shards)]
            if files[0].is_file():
                state = {k: v for file in files for k, v in open_state(file).items()}
                return state, read_json(folder / CONFIG)
    raise CheckpointError(
        f"{folder}: no weights there, found {some(sorted(p.name for p in folder.glob('*')))}; "
        f"expected {names[0]}.safetensors or the like, as diffusers writes it"
    )


def read_folder(path: Path, family: str | None) -> tuple[dict[str, Tensors], dict]:
    """Read a folder of Stable Diffusion 1, 2 or XL as diffusers writes it."""
    if (path / "bert").is_dir():
        raise CheckpointError("LDM as diffusers stores it; take its model.ckpt, or --model ldm")
    if "Upscale" in (kind := read_json(path / "model_index.json").get("_class_name", "")):
        raise CheckpointError(f"an upscaler of pictures ({kind}); {EXPECTED}")
    xl = (path / "text_encoder_2").exists()
    if xl and not (path / "text_encoder").exists():
        raise CheckpointError(f"the refiner of SDXL, which is not supported; {EXPECTED}")
    unet, config = read_component(path / "unet")
    there = (path / "vae").is_dir()
    autoencoder, autoencoder_config = read_autoencoder(path / "vae") if there else ({}, {})
    text, text_config = read_component(path / "text_encoder")
    text_config = text_config.get("text_config") or text_config  # of a whole CLIP
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    unet = naming.unet_from_diffusers(unet)
    linear = unet["middle_block.1.proj_in.weight"].ndim == 2
    if (kind := str(scheduler.get("_class_name"))).startswith(("EDM", "FlowMatch")):
        raise CheckpointError(f"its scheduler is {kind}, which is not supported; {EXPECTED}")
    kind = scheduler.get("prediction_type")
    root = path.parent.parent  # of a repository in Hugging Face's cache
    known = dict(
        family=family or ("sdxl" if xl else "sd2" if linear else "sd1"),
        name=(root if root.name.startswith("models--") else path).name,
        prediction={"epsilon": "eps", "v_prediction": "v"}.get(kind, kind),
        schedule={ours: scheduler[key] for key, ours in SCHEDULER.items() if key in scheduler},
        text_heads=text_config.get("num_attention_heads"),
        groups=[c.get("norm_num_groups", 32) for c in (config, autoencoder_config)],
        scale_factor=float(autoencoder_config.get("scaling_factor", 0.13025 if xl else 0.18215)),
    )
    # Trap: diffusers calls the number of heads `attention_head_dim`, one for all levels or a list.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    if isinstance(heads, list):  # SD 2: as many as there are heads of one width
        width = unet["input_blocks.0.0.weight"].shape[0] // heads[0]
        known["attention"] = dict(heads=None, head_width=width)
    elif heads:
        known["attention"] = dict(heads=heads)
    places = [path / "tokenizer" / name for name in ("merges.txt", "tokenizer.json")]
    known["vocabulary"] = next((place for place in places if place.is_file()), None)
    text = naming.text_from_transformers(text)
    if not xl:  # as transformers does with a file that has more layers than its configuration says
        text = naming.first_layers(text, text_config.get("num_hidden_layers", len(text)))
    if xl:
        second, config = read_component(path / "text_encoder_2")
        text = naming.side_by_side(text, second)
        known["text_heads"] = known["text_heads"], config.get("num_attention_heads")
    return dict(unet=unet, autoencoder=autoencoder, text=text), known


def read_bundled(path: Path, family: str | None) -> tuple[dict[str, Tensors], dict]:
    """A folder like that of the bundled model: an LDM with its sizes in config.json."""
    config = read_json(path / CONFIG)
    if "norm_groups" not in config:
        kind = read_json(path / "model_index.json").get("_class_name", "no model")
        raise CheckpointError(f"{kind}, found {contents(path)}; {EXPECTED}")
    parts, known = read_single_file(path / "model.safetensors", family or "ldm")
    known |= {key: config[key] for key in ("name", "size", "prediction", "defaults")}
    return parts, known | dict(attention=dict(heads=config["heads"]), groups=config["norm_groups"])


# -------------------------------------------------------------------------------------- loading


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


def load_model(
    path: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    prediction: str | None = None,
    clip_skip: int = 1,
    vae: str | Path | None = None,
) -> LatentDiffusion:
    """A text-to-image model from a public checkpoint, frozen, ready to invert and sample.

    path: a single file (.ckpt, .safetensors), a folder in the diffusers layout, a Hugging Face
    repository ("x/y") in the local cache, an address or a published name ("sd15", "sd21", "sdxl",
    "ldm"), which are downloaded once, or None for the bundled model. device, dtype: the best there
    are unless given; the text encoder stays in float32 whatever `dtype` is. family (one of
    `FAMILIES`) and prediction ("eps", "v") override what the file says. clip_skip: 2 takes the
    text from the last layer but one, as some Stable Diffusion 1 fine-tunes were trained. vae: a
    file or folder with another autoencoder. Weights that need no conversion stay in the file,
    mapped: replace it by renaming another, never by writing into it. Raises `CheckpointError`, a
    ValueError, for anything but such a file.
    """
    if family not in (None, *FAMILIES):
        raise ValueError(f"family {family!r} is not known; use {', '.join(FAMILIES)}")
    if prediction not in (None, "eps", "v"):
        raise ValueError(f"prediction {prediction!r} is not known; use eps or v")
    device = find_device(device)
    dtype = dtype or best_dtype(device)
    path = find(path, "model") if path is not None else BUNDLED
    with checking(path):
        parts, known = read_checkpoint(checkpoint_in(path), family, vae)
        known["prediction"] = prediction or known["prediction"]
        if clip_skip not in ((1, 2) if known["family"] == "sd1" else (1,)):
            raise CheckpointError(f"clip skip is {clip_skip}; use 2 with some SD 1 models, else 1")
        return assemble(parts, device, dtype, clip_skip=clip_skip, **known)


def read_checkpoint(path: Path, family: str | None, vae: str | Path | None):
    """Return the tensors of all networks, with another autoencoder if `vae` says so, and the
    arguments of `assemble` that are known."""
    if path.name == "model.safetensors" and "norm_groups" in read_json(path.parent / CONFIG):
        path = path.parent
    read = read_folder if (path / "unet").is_dir() else read_bundled
    try:
        parts, known = (read if path.is_dir() else read_single_file)(path, family)
    except CheckpointError:
        words = []
        with suppress(ValueError, OSError):
            words = [concept.placeholder for concept in load_concepts(path)]
        if words:
            kind = "a word; give it to --concept"
            raise CheckpointError(f"{kind}; found {some(words)}; {EXPECTED}") from None
        raise
    if vae is not None:
        parts["autoencoder"], config = read_autoencoder(find(vae, "vae"))
        known["groups"] = known.get("groups", (32, 32))[0], config.get("norm_num_groups", 32)
        if "scaling_factor" in config:
            known["scale_factor"] = float(config["scaling_factor"])
    elif not parts["autoencoder"]:
        beside = f"{path.stem}.vae.safetensors"
        raise CheckpointError(f"it has no autoencoder; give one with --vae PATH, or as {beside}")
    return parts, known


def assemble(
    parts: dict[str, Tensors],
    device: torch.device,
    dtype: torch.dtype,
    family: str,
    prediction: str | None,
    schedule: dict,  # of how the noise grows: arguments of `Schedule`
    attention: dict | None = None,  # the UNet's: its number of heads, or the channels in each
    text_heads: int | tuple[int | None, int | None] | None = None,  # a pair for SDXL
    groups: tuple[int, int] = (32, 32),  # of the UNet's and the autoencoder's GroupNorm
    vocabulary: Path | None = None,
    **about,  # other fields of LatentDiffusion
) -> LatentDiffusion:
    """Build the networks, fill them with the file's tensors and put them together."""
    if attention is None:
        wide = family in ("sd2", "sdxl")
        attention = dict(heads=None, head_width=64) if wide else dict(heads=8)
    autoencoder_sizes = autoencoder_config(parts["autoencoder"], norm_groups=groups[1])
    if family == "sdxl":
        about = dict(scale_factor=0.13025, size=1024, defaults=SDXL) | about
        vector_dim = parts["unet"]["label_emb.0.0.weight"].shape[1]
        attention |= dict(vector_dim=vector_dim, factor=autoencoder_sizes.factor)
    unet_sizes = unet_config(parts["unet"], norm_groups=groups[0], **attention)
    # Trap: SDXL's autoencoder overflows in fp16; its pictures are black then.
    overflows = family == "sdxl" and dtype == torch.float16
    autoencoder_dtype = torch.float32 if overflows else dtype
    takes, has = unet_sizes.channels, autoencoder_sizes.z_channels
    if takes != has:
        raise CheckpointError(
            f"its UNet takes {takes} channels, its latents have {has}; inpainting, depth and "
            "upscaling models are not supported"
        )
    text = parts["text"] if family == "ldm" else without_added_words(parts["text"], vocabulary)
    text_encoder = load_text_encoder(family, text, text_heads, device)
    stored = parts["unet"]["out.2.weight"].dtype
    unet = filled(UNet, unet_sizes, parts["unet"], dtype, device)
    model = LatentDiffusion(
        unet,
        filled(Autoencoder, autoencoder_sizes, parts["autoencoder"], autoencoder_dtype, device),
        text_encoder,
        load_tokenizer(family, text_encoder.config, vocabulary),
        schedule_of(prediction or ("v" if schedule.get("zero_snr") else "eps"), schedule),
        family,
        fingerprint=fingerprint(unet),
        stored=str(stored).removeprefix("torch."),
        **about,
    )
    if family in ("sd2", "sdxl") and not prediction:  # there are both, with the same keys
        model.schedule = schedule_of(measure_prediction(model), schedule)
    if "size" not in about:
        large = 768 if family == "sd2" and model.schedule.prediction == "v" else 512
        model.size = 256 if family == "ldm" else large
    return model


def schedule_of(prediction: str, options: dict) -> Schedule:
    """Return the noise schedule; `CheckpointError` for one that is not supported."""
    try:
        return Schedule(prediction=prediction, **options)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def filled(kind: type[nn.Module], config, state: Tensors, dtype, device) -> nn.Module:
    """Build a module without memory and give it the file's tensors; every key must match."""
    with torch.device("meta"):
        module = kind(config)
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    left = sorted(k for k in state.keys() - wanted.keys() if not NEEDLESS.match(k))
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or left or wrong:
        raise CheckpointError(
            f"not the expected {kind.__name__}: {len(missing)} keys missing "
            f"({some(missing)}), {len(left)} not expected ({some(left)}), {len(wrong)} of another "
            f"shape ({some(wrong)})"
        )
    # One at a time, so that memory holds no more than the module and one tensor.
    state = {k: state[k].to(dtype).contiguous().to(device) for k in wanted}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def load_text_encoder(family: str, state: Tensors, heads, device) -> nn.Module:
    """The text encoder, float32; `heads` of CLIP's attention if they are known."""
    if family == "ldm":
        return filled(BertTextEncoder, bert_config(state), state, torch.float32, device)
    if family == "sdxl":
        first = text_config(state, heads[0], quick_gelu=True, tower="clip_l")
        second = text_config(state, heads[1], quick_gelu=False, tower="clip_g")
        return filled(SDXLTextEncoder, (first, second), state, torch.float32, device)
    config = text_config(state, heads, quick_gelu=family == "sd1")
    return filled(CLIPTextEncoder, config, state, torch.float32, device)


def without_added_words(text: Tensors, vocabulary: Path | None) -> Tensors:
    """Return CLIP's text encoder without rows of its table that an earlier inversion has added.
    Warns of them."""
    key = next(k for k in text if k.endswith(("token_table", "token_embedding.weight")))
    known = CLIPTokenizer.load(vocabulary).vocab_size
    if not known < len(text[key]) <= known + MAX_VECTORS:
        return text
    added = read_json(vocabulary.with_name("added_tokens.json")) if vocabulary else {}
    if vocabulary and vocabulary.suffix == ".json":  # of transformers 5
        added |= {token["content"]: token["id"] for token in read_json(vocabulary)["added_tokens"]}
    names = ", ".join(name for name, i in added.items() if i >= known)
    warnings.warn(
        f"the text encoder has {len(text[key]) - known} more words than its vocabulary"
        f"{f' ({names})' if names else ''}; they are passed over, give their files to --concept"
    )
    return text | {key: text[key][:known]}


def load_tokenizer(family: str, config: BertConfig | TextConfig, vocabulary: Path | None):
    """The tokenizer that belongs to a text encoder; its vocabulary must have the same size."""
    size, length = config.vocab_size, config.max_length
    if family == "ldm":
        tokenizer = WordPieceTokenizer.load(vocabulary or BERT_VOCAB, length)
    else:
        pad_id = 0 if family == "sd2" else None
        tokenizer = CLIPTokenizer.load(vocabulary, size, max_length=length, pad_id=pad_id)
    if tokenizer.vocab_size != size:
        raise CheckpointError(
            f"its text encoder knows {size} tokens, its vocabulary has {tokenizer.vocab_size}; "
            "put the vocab.txt it was trained with beside it"
        )
    return tokenizer


def measure_prediction(model: LatentDiffusion) -> str:
    """Tell an eps-model from a v-model by asking it (both kinds have the same keys).

    At the last timestep x_t is nearly all noise: an eps-model returns it, a v-model about -x_0.
    """
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, model.unet.config.channels, 32, 32, generator=generator)
    t = torch.tensor([model.schedule.length - 1], device=model.device)
    with torch.no_grad():
        prediction = model.unet(x_t.to(model.device), t, model.encode_text([""])).float().cpu()
    correlation = torch.corrcoef(torch.stack([x_t.flatten(), prediction.flatten()]))[0, 1]
    return "eps" if correlation > 0.5 else "v"


def fingerprint(unet: UNet) -> str:
    """Return 16 hexadecimal digits that name a base model: a hash of the signs of its weights. They
    are the same in every precision and layout."""
    weights = torch.cat([p.flatten()[:1000] for p in unet.parameters()])
    return hashlib.sha256(weights.cpu().signbit().numpy().tobytes()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------- CLIP

CLIP_EXPECTED = (
    "expected a CLIP with both towers: OpenAI's .pt, its state_dict, or a file or folder in the "
    "layout of transformers"
)


def load_clip(path: str | Path | None = None) -> CLIP:
    """CLIP with both towers (the paper measures with OpenAI's ViT-B/32), float32, on the CPU.

    path: OpenAI's published .pt, a TorchScript archive of which only the tensors are read; its
    state_dict; model.safetensors of the layout of `transformers`, or the folder it is in, with the
    config.json beside it; "vit-b-32", which is downloaded once; None for the bundled one. Raises
    `CheckpointError`, a ValueError, for anything else.
    """
    path = find(path, "clip") if path is not None else BUNDLED / "clip.safetensors"
    try:
        with checking(path, CLIP_EXPECTED):
            folder = (path / CONFIG).is_file()
            return assemble_clip(read_component(path)[0] if folder else open_state(path), path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(EXPECTED, CLIP_EXPECTED)) from error


def assemble_clip(state: Tensors, path: Path) -> CLIP:
    """Sizes come from the shapes. The heads (64 channels each) and QuickGELU are OpenAI's unless a
    config.json in the layout of `transformers` says otherwise, as LAION's do."""
    settings = {}
    if "visual.conv1.weight" in state:
        if "input_resolution" not in state:  # a scalar of OpenAI's own files, in no state_dict
            warnings.warn(
                f"{path}: taken for OpenAI's CLIP, whose GELU is approximate; for one of LAION's, "
                "give the folder with its config.json in the layout of transformers"
            )
        state = naming.towers_from_openai(state)
    else:
        settings = read_json((path if path.is_dir() else path.parent) / CONFIG)
    for key in ("visual_projection.weight", "text_projection.weight"):
        if key not in state:
            raise CheckpointError(f"has no {key}, found {some(state)}; {CLIP_EXPECTED}")
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    known = [settings.get(tower) or {} for tower in ("text_config", "vision_config")]
    heads = [tower.get("num_attention_heads") for tower in known]
    quick_gelu = [tower.get("hidden_act", "quick_gelu") == "quick_gelu" for tower in known]
    text = text_config(state, heads[0], quick_gelu[0])
    vision = vision_config(state, heads[1], quick_gelu[1])
    config = CLIPConfig(text, vision, state["text_projection.weight"].shape[0])
    return filled(CLIP, config, state, torch.float32, "cpu")
