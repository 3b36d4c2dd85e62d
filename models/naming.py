"""Rename the tensors of other programs' files to the names that our modules use.

Our names are CompVis', and for CLIP those of `transformers`, as in CompVis' files: single files
load unrenamed. In names of diffusers, open_clip and OpenAI, whole dotted segments are replaced.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from .files import CheckpointError

Tensors = dict[str, Tensor]


def count(keys: Iterable[str], pattern: str) -> int:
    """Return how many different numbers the pattern's group matches."""
    return len({m[1] for k in keys if (m := re.match(pattern, k))})


def part(state: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin with the prefix, under the rest of the name."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def rename(key: str, table: dict[str, str]) -> str:
    """Return the key with whole dotted segments replaced, one row of the table after another."""
    dotted = f".{key}."
    for old, new in table.items():
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


UNET_NAMES = dict(conv_in="input_blocks.0.0", conv_norm_out="out.0", conv_out="out.2")
UNET_NAMES |= dict(time_embedding="time_embed", add_embedding="label_emb.0")
UNET_NAMES |= {"linear_1": "0", "linear_2": "2", "mid_block.attentions.0": "middle_block.1"}
UNET_NAMES |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
UNET_NAMES |= {"downsamplers.0.conv": "downsamplers.0.op"}
RESNET_NAMES = dict(norm1="in_layers.0", conv1="in_layers.2", time_emb_proj="emb_layers.1")
RESNET_NAMES |= dict(norm2="out_layers.0", conv2="out_layers.3", conv_shortcut="skip_connection")
AUTOENCODER_NAMES = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
AUTOENCODER_NAMES |= {"mid_block.attentions.0": "mid.attn_1", "to_out.0": "proj_out"}
AUTOENCODER_NAMES |= {"downsamplers.0": "downsample", "upsamplers.0": "upsample"}
AUTOENCODER_NAMES |= dict(down_blocks="down", resnets="block", conv_shortcut="nin_shortcut")
AUTOENCODER_NAMES |= dict(conv_norm_out="norm_out", group_norm="norm", to_q="q", to_k="k", to_v="v")
# The names of diffusers before 0.15, which published Stable Diffusion folders have.
AUTOENCODER_NAMES |= dict(query="q", key="k", value="v", proj_attn="proj_out")
# open_clip's and OpenAI's names to those of `transformers`
CLIP_NAMES = {"visual.proj": "visual_projection.weight", "ln_pre": "pre_layrnorm"}
CLIP_NAMES |= dict(text_projection="text_projection.weight", conv1="embeddings.patch_embedding")
CLIP_NAMES |= dict(positional_embedding="embeddings.position_embedding.weight")
CLIP_NAMES |= {f"{k}_embedding": f"embeddings.{k}_embedding" for k in ("token", "class")}
CLIP_NAMES |= dict(visual="vision_model", transformer="encoder", resblocks="layers")
CLIP_NAMES |= dict(attn="self_attn", c_fc="fc1", c_proj="fc2", ln_post="post_layernorm")
CLIP_NAMES |= dict(ln_1="layer_norm1", ln_2="layer_norm2", ln_final="final_layer_norm")
OPEN_CLIP_LAYERS = {1024: 24, 1280: 32}  # by width: ViT-H and ViT-bigG


def unet_from_diffusers(state: Tensors) -> Tensors:
    """Rename a UNet. CompVis numbers its blocks in one list, diffusers by level and kind."""
    resnets = count(state, r"down_blocks\.0\.resnets\.(\d+)\.")

    def name(key: str) -> str:
        key = rename(key, RESNET_NAMES) if ".resnets." in key else key
        key = rename(key, UNET_NAMES)
        match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key)
        if not match:
            return key
        way, level, kind, index, rest = match.groups()
        side = {"down": "input_blocks", "up": "output_blocks"}[way]
        block = int(level) * (resnets + 1) + (way == "down")
        block += int(index) if kind in ("resnets", "attentions") else resnets
        attended = f"up_blocks.{level}.attentions.0.norm.weight" in state
        layer = dict(resnets=0, attentions=1, downsamplers=0, upsamplers=1 + attended)[kind]
        return f"{side}.{block}.{layer}.{rest}"

    return {name(k): v for k, v in state.items()}


def autoencoder_from_diffusers(state: Tensors) -> Tensors:
    """Rename diffusers' autoencoder; in some single files only the attention needs it. diffusers
    counts the decoder's levels in the opposite order, and stores 1x1 convolutions as matrices."""
    levels = count(state, r"decoder\.up_blocks\.(\d+)\.")

    def name(key: str) -> str:
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)
        return rename(key, AUTOENCODER_NAMES)

    return {name(k): v[:, :, None, None] if v.ndim == 2 else v for k, v in state.items()}


def clip_to_transformers(state: Tensors) -> Tensors:
    """Rename CLIP or one of its towers, from any layout; some files leave out `text_model.`.

    Trap: OpenAI and open_clip store projections transposed, and q, k and v stacked in one tensor.
    """
    foreign = any(".resblocks." in key for key in state)
    renamed: Tensors = {}
    for key, tensor in state.items():
        key = rename(key, CLIP_NAMES) if foreign else key
        key = re.sub(r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\g<0>", key)
        if match := re.fullmatch(r"(.+)\.in_proj_(weight|bias)", key):
            for letter, third in zip("qkv", tensor.chunk(3)):
                renamed[f"{match[1]}.{letter}_proj.{match[2]}"] = third
        else:
            renamed[key] = tensor.T if foreign and "_projection." in key else tensor
    return renamed


def text_up_to_penultimate(state: Tensors, layers: int | None) -> Tensors:
    """Return SD 2's text encoder without its last block: the model uses the one before.

    Trap: many files come without the last block already. layers: how many the full encoder has, if
    known; else a file counts as full if it has tensors that only the last block's output needs.
    """
    width = state["text_model.final_layer_norm.weight"].shape[0]
    there = count(state, r"text_model\.encoder\.layers\.(\d+)\.")
    full = any(k.startswith(("text_projection", "logit_scale")) for k in state)
    layers = OPEN_CLIP_LAYERS.get(width) or layers or (there if full else there + 1)
    if there < layers - 1:
        raise CheckpointError(f"its text encoder has {there} of {layers} layers; download it again")
    return first_layers(state, layers - 1)


def first_layers(state: Tensors, layers: int) -> Tensors:
    """Return CLIP's text tower with its first `layers` layers only."""
    numbers = {k: re.search(r"\.layers\.(\d+)\.", k) for k in state}
    return {k: v for k, v in state.items() if not numbers[k] or int(numbers[k][1]) < layers}


def side_by_side(first: Tensors, second: Tensors) -> Tensors:
    """Return SDXL's CLIP-L and bigG, from any layout, as one encoder with one token table."""
    first, second = clip_to_transformers(first), clip_to_transformers(second)
    state = {k.replace("text_model", "clip_l"): v for k, v in first.items()}
    state |= {k.replace("text_model", "clip_g"): v for k, v in second.items()}
    tables = [state.pop(f"{t}.embeddings.token_embedding.weight") for t in ("clip_l", "clip_g")]
    rows = min(map(len, tables))  # one may have rows that an earlier textual inversion added
    return state | {"token_table": torch.cat([table[:rows].float() for table in tables], dim=1)}
