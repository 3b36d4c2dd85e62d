"""Load public checkpoints: recognize the family of a file and fill a model with its tensors.

files.py reads tensors, naming.py gives them our names, and sizes.py finds the sizes of the
networks. The tensors' names tell the family. Loading is strict: every key must match.
"""

import hashlib
import json
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from . import files, naming
from .autoencoder import Autoencoder
from .bert import BertTextEncoder
from .clip import CLIP, CLIPConfig, CLIPTextEncoder, SDXLTextEncoder
from .concepts import MAX_VECTORS, load_concepts
from .files import EXPECTED, CheckpointError, checking, contents, open_state, some
from .latent_diffusion import LatentDiffusion
from .naming import Tensors, part
from .published import checkpoint_in, find
from .schedule import Schedule
from .sizes import autoencoder_config, bert_config, text_config, unet_config, vision_config
from .tokenizers import CLIPTokenizer, WordPieceTokenizer
from .unet import UNet

BUNDLED = Path(__file__).parent / "emoji"
CONFIG = "config.json"
BERT_VOCAB = Path(__file__).parent / "vocab" / "bert-base-uncased.txt"
# For SDXL: the recipes of diffusers and of invoke-training agree on this rate and 2,000 pictures.
SDXL = dict(steps=2000, batch_size=1, lr=0.002, guidance_scale=5.0)
# How a family differs from Stable Diffusion 1, whose values are LatentDiffusion's defaults.
FAMILIES = dict(ldm=dict(size=256), sd1={}, sd2={})
FAMILIES["sdxl"] = dict(size=1024, scale_factor=0.13025, defaults=SDXL)
# Arguments of `Schedule` that have other names in diffusers.
SCHEDULER = dict(num_train_timesteps="length", rescale_betas_zero_snr="zero_snr")
SCHEDULER |= dict(timestep_spacing="spacing")
REFUSED = {  # pattern of a key: what a file with such a key is
    r"lora_|.*\.(lora|hada|lokr)_": "a LoRA, not a model",
    r"control_model\.": "a ControlNet, not a model",
    r"conv_first\.|.*(RDB|rdb)\d\.": "an upscaler, which has no text encoder",
    r"model\.diffusion_model\.|(input|down)_blocks\.": "a UNet without a text encoder",
    r"(first_stage_model\.)?(encoder|decoder)\.": "an autoencoder alone; give it to --vae",
    r"text_model\.|.*\.resblocks\.": "a text encoder without a UNet",
}
# Tensors that some programs leave in a file and that no model here needs.
NEEDLESS = re.compile(
    r"(.*\.)?(position_ids|logit_scale|text_projection[\w.]*|attn_mask|input_resolution"
    r"|context_length|vocab_size)$|visual_projection\.|vision_model\.|(.*\.)?to_logits\.|loss\."
    r"|(.*[._])?(lora|optimizer)[._]"
)

# ------------------------------------------------------------------------------ what a file says
# `read_single_file` and `read_folder` return the tensors of "unet", "autoencoder" and "text" under
# our names, and arguments of `assemble`.


def find_family(state: Tensors) -> str:
    """Return the family of a single file. Raises `CheckpointError` if it belongs to none."""

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in state)

    if has("cond_stage_model.transformer.token_emb."):
        return "ldm"
    if has("conditioner.embedders.1."):
        return "sdxl"
    if has("cond_stage_model.", "conditioner.embedders.0.") and has("model.diffusion_model."):
        if has("model.diffusion_model.label_emb."):
            raise CheckpointError(f"the refiner of SDXL, which is not supported; {EXPECTED}")
        # Trap: the text encoder's names do not tell the two apart: both come in every layout.
        linear = state["model.diffusion_model.middle_block.1.proj_in.weight"].ndim == 2
        return "sd2" if linear else "sd1"
    for pattern, what in REFUSED.items():
        if any(re.match(pattern, key) for key in state):
            raise CheckpointError(f"{what}; {EXPECTED}")
    raise CheckpointError(f"not a text-to-image model, found {some(state)}; {EXPECTED}")


def read_single_file(path: Path, family: str | None) -> tuple[dict[str, Tensors], dict]:
    """Read LDM's or Stable Diffusion's own layout. EMA copies (`model_ema.`) and other leftovers of
    training are ignored, as in the original inference configuration."""
    state, config = read_component(path)
    if any(key.startswith("edm_") for key in state):
        raise CheckpointError(f"a model trained as EDM, which is not supported; {EXPECTED}")
    family = family or find_family(state)
    beside = files.settings_beside(path)
    number = {k: int(v) for k, v in beside.items() if v.isdigit()}
    heads = dict(heads=number.get("num_heads"), head_width=number.get("num_head_channels"))
    known = dict(
        family=family,
        name=path.name,
        short_hash=files.short_hash(path),
        # Some fine-tunes say with an empty tensor of such a name that they predict v.
        prediction="v" if state.keys() & {"v_pred", "ztsnr"} else beside.get("parameterization"),
        schedule=dict(zero_snr="ztsnr" in state),
        unet=heads if any(heads.values()) else {},
        vocabulary=first_of(path.with_name("vocab.txt"), BERT_VOCAB) if family == "ldm" else None,
        text_settings=(number, dict(num_attention_heads=number.get("heads"))),
    )
    if "norm_groups" in config:  # a small LDM such as the bundled one
        known |= {key: config[key] for key in ("name", "size", "prediction", "defaults")}
        known["unet"] = dict(heads=config["heads"], norm_groups=config["norm_groups"][0])
        known["autoencoder"] = dict(norm_groups=config["norm_groups"][1])
    text = part(state, "cond_stage_model.") or part(state, "conditioner.embedders.0.")
    if family == "sdxl":
        second = part(state, "conditioner.embedders.1.model.")
        text = naming.side_by_side(part(text, "transformer."), second)
    elif family != "ldm":
        text = naming.clip_to_transformers(part(text, "model.") or part(text, "transformer."))
    if family == "sd2":
        text = naming.text_up_to_penultimate(text, number.get("layers"))
    unet = part(state, "model.diffusion_model.")
    autoencoder = naming.autoencoder_from_diffusers(part(state, "first_stage_model."))
    return dict(unet=unet, autoencoder=autoencoder, text=text), known


def first_of(*paths: Path) -> Path | None:
    """Return the first of the paths that is a file."""
    return next((path for path in paths if path.is_file()), None)


def read_json(path: Path) -> dict:
    """Return the object in a JSON file, empty if there is no such file."""
    with checking(path):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def read_component(path: Path) -> tuple[Tensors, dict]:
    """Return the weights and config.json of a file, or of a folder as diffusers writes it: its
    first variant that exists, in one file or in shards that an index lists."""
    if not path.is_dir():
        return open_state(path), read_json(path.with_name(CONFIG))
    names = ("diffusion_pytorch_model", "model", "pytorch_model")
    for variant in ("", ".fp16", ".bf16", ".non_ema"):
        for ending in ("safetensors", "bin"):
            found = [p for name in names if (p := path / f"{name}{variant}.{ending}").is_file()]
            for index in path.glob(f"*.{ending}.index{variant}.json"):
                shards = sorted(set(read_json(index)["weight_map"].values()))
                found = [path / Path(shard).name for shard in shards]
            if found:
                state = {k: v for file in found for k, v in open_state(file).items()}
                return state, read_json(path / CONFIG)
    raise CheckpointError(f"{path}: no weights there, found {contents(path)}; {EXPECTED}")


def read_autoencoder(path: Path) -> tuple[Tensors, dict]:
    """Return the tensors of a separate autoencoder (a file in either layout, or a folder as
    diffusers writes it) and the arguments of `assemble` that its config.json tells."""
    expected = "expected an autoencoder: a file, or a vae folder in the diffusers layout"
    with checking(path, expected):
        state, config = read_component(path / "vae" if (path / "vae").is_dir() else path)
        state = naming.autoencoder_from_diffusers(part(state, "first_stage_model.") or state)
        if "post_quant_conv.weight" not in state:
            raise CheckpointError(f"no autoencoder, found {some(state)}; {expected}")
        known = dict(autoencoder=dict(norm_groups=config.get("norm_num_groups", 32)))
        if "scaling_factor" in config:
            known["scale_factor"] = float(config["scaling_factor"])
        return state, known


def read_folder(path: Path, family: str | None) -> tuple[dict[str, Tensors], dict]:
    """Read a folder of Stable Diffusion 1, 2 or XL as diffusers writes it."""
    if (path / "bert").is_dir():
        raise CheckpointError("LDM as diffusers stores it; take its model.ckpt, or --model ldm")
    if not (path / "unet").is_dir():
        kind = read_json(path / "model_index.json").get("_class_name", "no model")
        raise CheckpointError(f"{kind}, found {contents(path)}; {EXPECTED}")
    xl = (path / "text_encoder_2").exists()
    if xl and not (path / "text_encoder").exists():
        raise CheckpointError(f"the refiner of SDXL, which is not supported; {EXPECTED}")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    if (kind := str(scheduler.get("_class_name"))).startswith(("EDM", "FlowMatch")):
        raise CheckpointError(f"its scheduler is {kind}, which is not supported; {EXPECTED}")
    unet, config = read_component(path / "unet")
    unet = naming.unet_from_diffusers(unet)
    autoencoder, known = read_autoencoder(path / "vae") if (path / "vae").is_dir() else ({}, {})
    text, first = read_component(path / "text_encoder")
    first = second = first.get("text_config") or first  # a whole CLIP has a "text_config"
    if xl:
        other, second = read_component(path / "text_encoder_2")
        text = naming.side_by_side(text, other)
    else:  # like transformers, ignore layers beyond the number in the configuration
        text = naming.clip_to_transformers(text)
        text = naming.first_layers(text, first.get("num_hidden_layers", len(text)))
    kind = scheduler.get("prediction_type")
    linear = unet["middle_block.1.proj_in.weight"].ndim == 2
    schedule = {SCHEDULER.get(key, key): value for key, value in scheduler.items()}
    root = path.parent.parent  # the repository's folder, if path is in Hugging Face's cache
    known |= dict(
        family=family or ("sdxl" if xl else "sd2" if linear else "sd1"),
        name=(root if root.name.startswith("models--") else path).name,
        prediction={"epsilon": "eps", "v_prediction": "v"}.get(kind, kind),
        schedule={k: v for k, v in schedule.items() if k in Schedule.__dataclass_fields__},
        unet=dict(norm_groups=config.get("norm_num_groups", 32)),
        text_settings=(first, second),
        vocabulary=first_of(path / "tokenizer/merges.txt", path / "tokenizer/tokenizer.json"),
    )
    # Trap: diffusers calls the number of heads `attention_head_dim`, one for all levels or a list.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    if isinstance(heads, list):  # SD 2: heads per level, all heads have the same width
        width = unet["input_blocks.0.0.weight"].shape[0] // heads[0]
        known["unet"] |= dict(heads=None, head_width=width)
    elif heads:
        known["unet"] |= dict(heads=heads)
    return dict(unet=unet, autoencoder=autoencoder, text=text), known


# -------------------------------------------------------------------------------------- loading


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the device of that name, the best for None. Raises ValueError if it is not there."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = name or next(kind for kind in here if here[kind])
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"no device {name}; use cpu, or cuda or mps if torch has them") from None


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
    """Return a text-to-image model from a public checkpoint, frozen, ready to invert and sample.

    path: a single file (.ckpt, .safetensors), a folder in the diffusers layout, a Hugging Face
    repository ("x/y") in the local cache, an address or a published name ("sd15", "sd21", "sdxl",
    "ldm"), which are downloaded once, or None or "emoji", the bundled model. device, dtype: the
    best by default; the text encoder is always float32. family (one of `FAMILIES`) and prediction
    ("eps", "v") override what the file says. clip_skip: 2 uses the text encoder's last layer but
    one, as some Stable Diffusion 1 fine-tunes were trained. vae: a file or folder with another
    autoencoder. The file stays mapped (files.py). Raises `CheckpointError`, a ValueError.
    """
    if family not in (None, *FAMILIES):
        raise ValueError(f"family {family!r} is not known; use {', '.join(FAMILIES)}")
    device = find_device(device)
    path = BUNDLED if path in (None, BUNDLED.name) else find(path, "model")
    with checking(path):
        parts, known = read_checkpoint(checkpoint_in(path), family, vae)
        known["prediction"] = prediction or known["prediction"]
        if clip_skip not in ((1, 2) if known["family"] == "sd1" else (1,)):
            raise CheckpointError(f"clip skip is {clip_skip}; use 2 with some SD 1 models, else 1")
        return assemble(parts, device, dtype or best_dtype(device), clip_skip=clip_skip, **known)


def read_checkpoint(path: Path, family: str | None, vae: str | Path | None):
    """Return the tensors of all networks, and the arguments of `assemble` that the files tell."""
    try:
        parts, known = (read_folder if path.is_dir() else read_single_file)(path, family)
    except CheckpointError as error:
        try:
            words = some(concept.placeholder for concept in load_concepts(path))
        except (ValueError, OSError):
            raise error from None
        raise CheckpointError(f"a word; give it to --concept; found {words}; {EXPECTED}") from None
    if vae is None and not parts["autoencoder"]:
        beside = [path.with_name(f"{path.stem}.vae.{e}") for e in ("safetensors", "pt", "ckpt")]
        if (vae := first_of(*beside)) is None:
            raise CheckpointError(f"no autoencoder; give it by --vae PATH, or as {beside[0].name}")
        warnings.warn(f"{path} has no autoencoder; {vae.name} beside it is used")
    if vae is not None:
        parts["autoencoder"], settings = read_autoencoder(find(vae, "vae"))
        known |= settings
    return parts, known


def assemble(
    parts: dict[str, Tensors],
    device: torch.device,
    dtype: torch.dtype,
    family: str,
    prediction: str | None,
    schedule: dict,  # arguments of `Schedule`
    text_settings: tuple[dict, dict],  # for CLIP-L and for open_clip's encoder, see sizes.py
    unet: dict,  # sizes that the tensors' shapes do not tell; `autoencoder`: the same
    autoencoder: dict = {},
    vocabulary: Path | None = None,
    **about,  # other fields of LatentDiffusion
) -> LatentDiffusion:
    """Build the networks, fill them with the file's tensors and put them together."""
    if family in ("sd2", "sdxl"):
        unet = dict(heads=None, head_width=64) | unet
    vae_sizes = autoencoder_config(parts["autoencoder"], **autoencoder)
    unet_sizes = unet_config(parts["unet"], factor=vae_sizes.factor, **unet)
    if (takes := unet_sizes.channels) != (has := vae_sizes.z_channels):
        found = f"its UNet takes {takes} channels, its latents have {has}"
        raise CheckpointError(f"{found}; inpainting, depth and upscaling models are not supported")
    try:
        noise = Schedule(prediction=prediction or "eps", **schedule)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    tokenizer, text = load_tokenizer(family, parts["text"], vocabulary)
    text_encoder = load_text_encoder(family, text, text_settings, device)
    tokenizer.max_length = text_encoder.config.max_length
    # Trap: SDXL's autoencoder overflows in fp16; its pictures are black then.
    vae_dtype = torch.float32 if (family, dtype) == ("sdxl", torch.float16) else dtype
    model = LatentDiffusion(
        filled(UNet, unet_sizes, parts["unet"], dtype, device),
        filled(Autoencoder, vae_sizes, parts["autoencoder"], vae_dtype, device),
        text_encoder,
        tokenizer,
        noise,
        family,
        stored=str(parts["unet"]["out.2.weight"].dtype).removeprefix("torch."),
        **(FAMILIES[family] | about),
    )
    model.fingerprint = fingerprint(model.unet)
    if not prediction and family in ("sd2", "sdxl"):  # both kinds exist, with the same keys
        noise.prediction = measure_prediction(model)
    if family == "sd2" and noise.prediction == "v":
        model.size = 768
    return model


def filled(kind: type[nn.Module], config, state: Tensors, dtype, device) -> nn.Module:
    """Build a module without memory and give it the file's tensors; every key must match."""
    with torch.device("meta"):
        module = kind(config)
    wanted = module.state_dict()
    faults = {
        "missing": [k for k in wanted if k not in state],
        "not expected": [k for k in state if k not in wanted and not NEEDLESS.match(k)],
        "of another shape": [k for k in wanted if k in state and state[k].shape != wanted[k].shape],
    }
    if any(faults.values()):
        found = ", ".join(f"{len(keys)} {what} ({some(keys)})" for what, keys in faults.items())
        raise CheckpointError(f"not the expected {kind.__name__}, keys: {found}")
    # One at a time, so that memory holds no more than the module and one tensor.
    state = {k: state[k].to(dtype).contiguous().to(device) for k in wanted}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def load_text_encoder(family: str, state: Tensors, settings, device) -> nn.Module:
    """Return the text encoder, float32. settings: `text_settings` of `assemble`."""
    clip_l, open_clip = settings[0], dict(hidden_act="gelu") | settings[1]
    if family == "ldm":
        kind, config = BertTextEncoder, bert_config(state)
    elif family == "sdxl":
        kind = SDXLTextEncoder
        config = text_config(state, "clip_l", clip_l), text_config(state, "clip_g", open_clip)
    else:
        kind = CLIPTextEncoder
        config = text_config(state, "text_model", clip_l if family == "sd1" else open_clip)
    return filled(kind, config, state, torch.float32, device)


def load_tokenizer(family: str, text: Tensors, vocabulary: Path | None):
    """Return the tokenizer and the text encoder's tensors. Rows that an earlier textual inversion
    has added to the token table are left out, with a warning."""
    keys = dict(ldm="transformer.token_emb.weight", sdxl="token_table")
    key = keys.get(family, "text_model.embeddings.token_embedding.weight")
    if family == "ldm":
        tokenizer = WordPieceTokenizer.load(vocabulary)
    else:
        pad_id = 0 if family == "sd2" else None
        tokenizer = CLIPTokenizer.load(vocabulary, len(text[key]), pad_id=pad_id)
    rows, known = len(text[key]), tokenizer.vocab_size
    if family != "ldm" and known < rows <= known + MAX_VECTORS:
        more = f"the text encoder has {rows - known} more words than its vocabulary"
        warnings.warn(f"{more}; they are ignored, give their files to --concept")
        return tokenizer, text | {key: text[key][:known]}
    if rows != known:
        found = f"its text encoder knows {rows} tokens, its vocabulary has {known}"
        raise CheckpointError(f"{found}; put the vocabulary it was trained with beside it")
    return tokenizer, text


def measure_prediction(model: LatentDiffusion) -> str:
    """Return "eps" or "v", by running the model once: both kinds have the same keys.

    At the last timestep x_t is nearly all noise. An eps-model returns it, a v-model about -x_0.
    """
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, model.unet.config.channels, 32, 32, generator=generator)
    t = torch.tensor([model.schedule.length - 1], device=model.device)
    with torch.no_grad():
        prediction = model.unet(x_t.to(model.device), t, model.encode_text([""])).float().cpu()
    correlation = torch.corrcoef(torch.stack([x_t.flatten(), prediction.flatten()]))[0, 1]
    return "eps" if correlation > 0.5 else "v"


def fingerprint(unet: UNet) -> str:
    """Return 16 digits that identify a model in any precision: a hash of its weights' signs."""
    weights = torch.cat([p.flatten()[:1000] for p in unet.parameters()])
    return hashlib.sha256(weights.cpu().signbit().numpy().tobytes()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------- CLIP

CLIP_EXPECTED = "expected a CLIP with both towers, OpenAI's or in the layout of transformers"


def load_clip(path: str | Path | None = None) -> CLIP:
    """Return CLIP with both towers (the paper takes OpenAI's ViT-B/32), float32, on the CPU.

    path: OpenAI's .pt (a TorchScript archive; only its tensors are read); its state_dict; a
    file or folder in the layout of `transformers`; "vit-b-32", which is downloaded once; None for
    the bundled one. If heads do not have 64 channels, or the GELU is not OpenAI's QuickGELU (as in
    LAION's), `transformers`' config.json must say so. Raises `CheckpointError`, a ValueError.
    """
    path = find(path, "clip") if path is not None else BUNDLED / "clip.safetensors"
    try:
        with checking(path, CLIP_EXPECTED):
            state, settings = read_component(path)
            state = naming.clip_to_transformers(state)
            text = text_config(state, "text_model", settings.get("text_config") or {})
            vision = vision_config(state, settings.get("vision_config") or {})
            config = CLIPConfig(text, vision, len(state["text_projection.weight"]))
            return filled(CLIP, config, state, torch.float32, "cpu")
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(EXPECTED, CLIP_EXPECTED)) from error
