"""CLIP (Radford et al. 2021): the text tower that conditions Stable Diffusion, and the image tower
that the paper's evaluation uses (section 5.1).

Modules have the key names of `transformers`, which Stable Diffusion 1 files use too. naming.py
translates those of OpenAI and open_clip.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Conditioning, attention

# Mean and standard deviation of the pictures that OpenAI's CLIP was trained on, per channel.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass
class TowerConfig:
    width: int = 768
    layers: int = 12
    heads: int = 12
    quick_gelu: bool = True  # OpenAI's CLIP; open_clip's (SD 2, SDXL) have the exact GELU


@dataclass
class TextConfig(TowerConfig):
    vocab_size: int = 49408
    max_length: int = 77


@dataclass
class VisionConfig(TowerConfig):
    image_size: int = 224
    patch_size: int = 32


@dataclass
class CLIPConfig:
    text: TextConfig
    vision: VisionConfig
    width: int  # of the space that both towers project to


class Attention(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.heads, self.causal = config.heads, isinstance(config, TextConfig)
        layers = (nn.Linear(config.width, config.width) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = layers

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, self.causal))


class MLP(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.quick_gelu = config.quick_gelu
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        # Trap: OpenAI's CLIP approximates GELU by a sigmoid; the exact one changes features by 5 %.
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h))


class EncoderLayer(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (B, L, D) of the last two layers."""
        for layer in self.layers:
            before, x = x, layer(x)
        return before, x


class TextModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.embeddings.position_embedding = nn.Embedding(config.max_length, config.width)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return the penultimate layer's output and the normed last one, (B, L, D) each, of token
        embeddings (B, L, D). There is no padding mask."""
        positions = self.embeddings.position_embedding.weight[: embeddings.shape[1]]
        penultimate, last = self.encoder(embeddings + positions)
        return penultimate, self.final_layer_norm(last)


class CLIPTextEncoder(nn.Module):
    """The text encoder of Stable Diffusion 1 (CLIP-L) and 2 (open_clip's ViT-H).

    Trap: SD 2 applies the final norm to the output of the penultimate layer. So its last layer is
    never built (`config.layers` is 23, not 24), and both models use the output of the last layer.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.widths = (config.width,)  # of the features of each encoder
        self.text_model = TextModel(config)

    @property
    def token_table(self) -> Tensor:
        """The frozen embeddings (vocab_size, D) of the vocabulary."""
        return self.text_model.embeddings.token_embedding.weight

    def forward(self, embeddings: Tensor, ends: Tensor | None = None) -> Tensor:
        """Return the context (B, L, D) of token embeddings (B, L, D); L is at most `max_length`."""
        return self.text_model(embeddings)[1]


class SDXLTextEncoder(nn.Module):
    """SDXL's two text encoders, CLIP-L and open_clip's ViT-bigG (Podell et al. 2023, section 2.1).

    Both read the same tokens. Their token tables are joined: each row is a row of CLIP-L's, then
    one of bigG's. So a vector of a learnt word is one row too.
    """

    def __init__(self, configs: tuple[TextConfig, TextConfig]):
        super().__init__()
        self.config = configs[0]  # both encoders have this vocabulary and length
        self.widths = tuple(config.width for config in configs)
        self.token_table = nn.Parameter(torch.zeros(self.config.vocab_size, sum(self.widths)))
        self.clip_l, self.clip_g = (TextModel(config) for config in configs)
        for tower in (self.clip_l, self.clip_g):
            del tower.embeddings.token_embedding
        self.text_projection = nn.Linear(self.widths[1], self.widths[1], bias=False)

    def forward(self, embeddings: Tensor, ends: Tensor) -> Conditioning:
        """Return the context (B, L, D_l + D_g) and the pooled text (B, D_g) of token embeddings
        (B, L, D_l + D_g). ends (B,): the positions of the end tokens.

        Trap: the context is the output of both penultimate layers, without the final norm. Pooled
        text is the output of bigG's last layer at the end token, with the final norm.
        """
        x_l, x_g = embeddings.split(self.widths, dim=-1)
        # Trap: CLIP-L's prompts are padded with the end token, bigG's with id 0.
        padding = torch.arange(embeddings.shape[1], device=ends.device) > ends[:, None]  # (B, L)
        x_g = torch.where(padding[..., None], self.token_table[0, self.widths[0] :], x_g)
        context_l, _ = self.clip_l(x_l)
        context_g, last = self.clip_g(x_g)
        pooled = self.text_projection(last[torch.arange(len(ends), device=ends.device), ends])
        return Conditioning(torch.cat([context_l, context_g], dim=-1), pooled)


class VisionModel(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.width, config.patch_size
        positions = (config.image_size // patch) ** 2 + 1
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.embeddings.position_embedding = nn.Embedding(positions, width)
        self.pre_layrnorm = nn.LayerNorm(width)  # spelt like this in every file
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the output (B, D) at the class token, for pixels (B, 3, H, W)."""
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1)  # (B, 1 + patches, D)
        x = self.pre_layrnorm(x + self.embeddings.position_embedding.weight)
        _, x = self.encoder(x)
        return self.post_layernorm(x[:, 0])


class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config.text)
        self.vision_model = VisionModel(config.vision)
        self.text_projection = nn.Linear(config.text.width, config.width, bias=False)
        self.visual_projection = nn.Linear(config.vision.width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07)

    def encode_text(self, ids: Tensor, end_id: int) -> Tensor:
        """Return features (B, width), not normalised, of token ids (B, L).

        Trap: they are taken at the first `end_id`. OpenAI's code takes them at the largest id, but
        a placeholder's id is larger than the end token's.
        """
        _, features = self.text_model(self.text_model.embeddings.token_embedding(ids))
        end = (ids == end_id).int().argmax(dim=1)
        return self.text_projection(features[torch.arange(len(ids)), end])

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return features (B, width), not normalised. pixels (B, 3, H, W): (rgb - MEAN) / STD."""
        return self.visual_projection(self.vision_model(pixels))
