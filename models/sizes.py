"""The sizes of the networks, from the names and shapes of their tensors."""

import math

from .autoencoder import AutoencoderConfig
from .bert import BertConfig
from .clip import TextConfig, VisionConfig
from .naming import Tensors, count
from .unet import UNetConfig


def unet_config(state: Tensors, **known) -> UNetConfig:
    """Sizes of a UNet; `known` are the heads and the groups, which shapes do not tell."""
    levels: list[list[int]] = [[]]
    depths = [0]
    for i in range(1, count(state, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in state:
            levels.append([])
            depths.append(0)
            continue
        levels[-1].append(state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0])
        depths[-1] = count(state, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
    middle = "middle_block.1.transformer_blocks"
    config = UNetConfig(
        widths=tuple(level[0] for level in levels),
        num_res_blocks=len(levels[0]),
        depths=tuple(depths),
        middle_depth=count(state, middle.replace(".", r"\.") + r"\.(\d+)\."),
        context_dim=state[f"{middle}.0.attn2.to_k.weight"].shape[1],
        channels=state["input_blocks.0.0.weight"].shape[1],
        linear_projection=state["middle_block.1.proj_in.weight"].ndim == 2,
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
    """Check that the attention heads divide the channels."""
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{heads!r} attention heads do not divide {width} channels")


def text_config(state: Tensors, heads, quick_gelu: bool, tower: str = "text_model") -> TextConfig:
    """`heads` None: 64 channels each, as in every published CLIP."""
    own_table = f"{tower}.embeddings.token_embedding.weight"
    vocab_size = state["token_table" if own_table not in state else own_table].shape[0]
    max_length, width = state[f"{tower}.embeddings.position_embedding.weight"].shape
    heads = heads or max(1, width // 64)
    check_heads(width, heads)
    layers = count(state, rf"{tower}\.encoder\.layers\.(\d+)\.")
    return TextConfig(width, layers, heads, quick_gelu, vocab_size, max_length)


def vision_config(state: Tensors, heads: int | None, quick_gelu: bool) -> VisionConfig:
    """As `text_config`, of the image tower."""
    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    heads = heads or max(1, width // 64)
    check_heads(width, heads)
    layers = count(state, r"vision_model\.encoder\.layers\.(\d+)\.")
    side = math.isqrt(positions - 1) * patch
    return VisionConfig(width, layers, heads, quick_gelu, image_size=side, patch_size=patch)
