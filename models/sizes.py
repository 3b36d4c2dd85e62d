"""The sizes of the networks, from the names and shapes of their tensors."""

import math

from .autoencoder import AutoencoderConfig
from .bert import BertConfig
from .clip import TextConfig, VisionConfig
from .naming import Tensors, count
from .unet import UNetConfig


def unet_config(state: Tensors, **known) -> UNetConfig:
    """Return the sizes of a UNet. known: those that shapes do not tell: heads, groups, factor."""
    blocks = count(state, r"input_blocks\.(\d+)\.")
    halving = (i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in state)
    per_level = next(halving, blocks)  # the last one halves; block 0 is a convolution
    levels = range(1, blocks, per_level)
    depth = r"transformer_blocks\.(\d+)\."
    config = UNetConfig(
        widths=tuple(state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in levels),
        num_res_blocks=per_level - 1,
        depths=tuple(count(state, rf"input_blocks\.{i}\.1\.{depth}") for i in levels),
        middle_depth=count(state, rf"middle_block\.1\.{depth}"),
        context_dim=state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        channels=state["input_blocks.0.0.weight"].shape[1],
        linear_projection=state["middle_block.1.proj_in.weight"].ndim == 2,
        vector_dim=state["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in state else 0,
        **known,
    )
    for width in config.widths:
        check_heads(width, config.heads_for(width))
    return config


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
    layers = count(state, r"transformer\.attn_layers\.layers\.(\d+)\.") // 2  # with MLPs between
    return BertConfig(width, layers, vocab_size, state["transformer.pos_emb.emb.weight"].shape[0])


def check_heads(width: int, heads: int | None) -> None:
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{heads!r} attention heads do not divide {width} channels")


def tower_sizes(state: Tensors, tower: str, settings: dict) -> tuple[int, int, int, bool]:
    """Return the sizes of one of CLIP's towers, the arguments of `TowerConfig`. settings: number of
    heads and GELU as in the config.json of `transformers`; as in OpenAI's CLIP unless given."""
    width = state[f"{tower}.embeddings.position_embedding.weight"].shape[1]
    layers = count(state, rf"{tower}\.encoder\.layers\.(\d+)\.")
    heads = settings.get("num_attention_heads") or max(1, width // 64)
    check_heads(width, heads)
    return width, layers, heads, settings.get("hidden_act", "quick_gelu") == "quick_gelu"


def text_config(state: Tensors, tower: str, settings: dict) -> TextConfig:
    joint = "token_table" in state  # SDXL's, of both towers
    table = "token_table" if joint else f"{tower}.embeddings.token_embedding.weight"
    max_length = len(state[f"{tower}.embeddings.position_embedding.weight"])
    return TextConfig(*tower_sizes(state, tower, settings), len(state[table]), max_length)


def vision_config(state: Tensors, settings: dict) -> VisionConfig:
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    side = math.isqrt(len(state["vision_model.embeddings.position_embedding.weight"]) - 1) * patch
    return VisionConfig(*tower_sizes(state, "vision_model", settings), side, patch)
