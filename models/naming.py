"""The names of tensors in other programs' files, as our modules have them.

Our modules carry the CompVis key names (text encoders of Stable Diffusion and CLIP those of
`transformers`, which CompVis files have too), so single files load unrenamed; the diffusers layout,
open_clip's and OpenAI's CLIP are renamed here, on whole dotted segments.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .files import CheckpointError

Tensors = dict[str, Tensor]


def count(keys: Iterable[str], pattern: str) -> int:
    """How many different numbers the pattern's group matches."""
    return len({m[1] for k in keys if (m := re.match(pattern, k))})


def part(state: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with the prefix, without it."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def rename(key: str, table: Mapping[str, str]) -> str:
    """The key with every run of whole dotted segments that the table knows replaced, in order."""
    dotted = f".{key}."
    for old, new in table.items():
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_NAMES = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # diffusers before 0.15, and so every published Stable Diffusion folder
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
OPEN_CLIP_LAYERS = {1024: 24, 1280: 32}  # by width: ViT-H and ViT-bigG
# open_clip's and OpenAI's names to those of `transformers`
CLIP_NAMES = {
    "resblocks": "layers",
    "transformer": "encoder",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
    "class_embedding": "embeddings.class_embedding",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}


def unet_from_diffusers(state: Tensors) -> Tensors:
    """CompVis counts all blocks of one way in a row; diffusers counts by level and kind."""
    blocks = count(state, r"down_blocks\.0\.resnets\.(\d+)\.")

    def name(key: str) -> str:
        match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key)
        if not match:
            key = rename(key, UNET_OUTSIDE)
            return rename(key, UNET_RESNET) if re.match(r"middle_block\.[02]\.", key) else key
        way, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if way == "down":
            first, side = 1 + level * (blocks + 1), "input_blocks"
        else:
            first, side = level * (blocks + 1), "output_blocks"
        if kind == "resnets":
            return f"{side}.{first + index}.0.{rename(rest, UNET_RESNET)}"
        if kind == "attentions":
            return f"{side}.{first + index}.1.{rest}"
        if kind == "downsamplers":
            return f"{side}.{first + blocks}.0.{rename(rest, {'conv': 'op'})}"
        attended = f"up_blocks.{level}.attentions.0.norm.weight" in state
        return f"{side}.{first + blocks}.{2 if attended else 1}.{rest}"

    return {name(k): v for k, v in state.items()}


def autoencoder_from_diffusers(state: Tensors) -> Tensors:
    """The decoder's levels are counted from the other end."""
    levels = count(state, r"decoder\.up_blocks\.(\d+)\.")

    def level(match: re.Match) -> str:
        number = int(match[2])
        return f"{match[1]}.{number if match[1] == 'down' else levels - 1 - number}."

    def name(key: str) -> str:
        return rename(re.sub(r"(down|up)_blocks\.(\d+)\.", level, key), VAE_NAMES)

    return vae_attention({name(k): v for k, v in state.items()})


def vae_attention(state: Tensors) -> Tensors:
    """Return the autoencoder's tensors with the attention's names as CompVis has them, which other
    programs change in single files too. Its 1x1 convolutions may come as matrices."""
    renamed: Tensors = {}
    for key, v in state.items():
        if ".attn_1." in key:
            key, v = rename(key, VAE_ATTENTION), v[:, :, None, None] if v.ndim == 2 else v
        renamed[key] = v
    return renamed


def clip_from_openai(state: Tensors) -> Tensors:
    """open_clip's or OpenAI's names of one tower; the stacked in_proj is cut into q, k and v. Sizes
    (three scalars in OpenAI's .pt) and the mask that a traced module keeps are left out."""
    unused = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    renamed: Tensors = {}
    for key, tensor in state.items():
        if key.endswith(unused):
            continue
        key = rename(key, CLIP_NAMES)
        if match := re.fullmatch(r"(.+\.self_attn)\.in_proj_(weight|bias)", key):
            for letter, third in zip("qkv", tensor.chunk(3)):
                renamed[f"{match[1]}.{letter}_proj.{match[2]}"] = third
        else:
            renamed[key] = tensor
    return renamed


def text_from_transformers(state: Tensors) -> Tensors:
    """CLIP's text tower under `text_model.`, which some files leave out."""
    towers = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{k}" if k.startswith(towers) else k: v for k, v in state.items()}


def text_up_to_penultimate(state: Tensors, layers: int | None) -> Tensors:
    """Return SD 2's text encoder without its last block: the model takes the one before.

    Trap: many files have lost the last block already. layers: of the full encoder, if that is
    known; else a file is full if it has what only the last block is needed for.
    """
    width = state["text_model.final_layer_norm.weight"].shape[0]
    there = count(state, r"text_model\.encoder\.layers\.(\d+)\.")
    full = any(k.startswith(("text_projection", "logit_scale")) for k in state)
    layers = OPEN_CLIP_LAYERS.get(width) or layers or (there if full else there + 1)
    if there < layers - 1:
        raise CheckpointError(f"its text encoder has {there} of {layers} layers; download it again")
    return first_layers(state, layers - 1)


def first_layers(state: Tensors, layers: int) -> Tensors:
    """Return CLIP's text tower without the layers from number `layers` on."""
    numbers = {k: re.search(r"\.layers\.(\d+)\.", k) for k in state}
    return {k: v for k, v in state.items() if not numbers[k] or int(numbers[k][1]) < layers}


def text_from_sdxl(state: Tensors) -> Tensors:
    """SDXL's text encoders from a single file; open_clip's projection multiplies from the right."""
    second = part(state, "1.model.")
    second["text_projection.weight"] = second.pop("text_projection").T
    return side_by_side(part(state, "0.transformer."), clip_from_openai(second))


def side_by_side(first: Tensors, second: Tensors) -> Tensors:
    """CLIP-L and bigG in the names of `transformers`, as one encoder with one table of tokens."""
    first, second = text_from_transformers(first), text_from_transformers(second)
    first.pop("text_projection.weight", None)  # of CLIP-L, which is not used
    state = {k.replace("text_model", "clip_l"): v for k, v in first.items()}
    state |= {k.replace("text_model", "clip_g"): v for k, v in second.items()}
    tables = [state.pop(f"{t}.embeddings.token_embedding.weight") for t in ("clip_l", "clip_g")]
    rows = min(map(len, tables))  # one of them may have words of an earlier inversion
    return state | {"token_table": torch.cat([table[:rows].float() for table in tables], dim=1)}


def towers_from_openai(state: Tensors) -> Tensors:
    """OpenAI's layout in the names of `transformers`; its projections multiply from the right."""
    visual = part(state, "visual.")
    text = {k: v for k, v in state.items() if not k.startswith("visual.")}
    towers = {
        "visual_projection.weight": visual.pop("proj").T,
        "text_projection.weight": text.pop("text_projection").T,
        "logit_scale": text.pop("logit_scale"),
    }
    towers |= {f"text_model.{k}": v for k, v in clip_from_openai(text).items()}
    return towers | {f"vision_model.{k}": v for k, v in clip_from_openai(visual).items()}
