"""LDM's text encoder: a BERT-like transformer trained together with the UNet (paper, section 3).

It is the `x-transformers` encoder of the original code: pre-norm, learned positions, no token
types, no padding mask. Modules have the checkpoint's key names (without the prefix
`cond_stage_model.`); its language-model head `to_logits` is not used.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .layers import FeedForward, attention

HEADS, HEAD_WIDTH = 8, 64  # the original code never changes them, so the inner width is 512


@dataclass
class BertConfig:
    width: int = 1280
    layers: int = 32
    vocab_size: int = 30522
    max_length: int = 77


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        layers = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_q, self.to_k, self.to_v = layers
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attention(self.to_q(x), self.to_k(x), self.to_v(x), HEADS))


class AttentionLayers(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        width, self.layers = config.width, nn.ModuleList()
        for _ in range(config.layers):
            first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
            for layer in (Attention(width), FeedForward(first, width)):
                self.layers.append(nn.ModuleList([nn.LayerNorm(width), layer]))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class PositionEmbedding(nn.Module):
    def __init__(self, length: int, width: int):
        super().__init__()
        self.emb = nn.Embedding(length, width)


class Transformer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.token_emb = nn.Embedding(config.vocab_size, config.width)
        self.pos_emb = PositionEmbedding(config.max_length, config.width)
        self.attn_layers = AttentionLayers(config)
        self.norm = nn.LayerNorm(config.width)


class BertTextEncoder(nn.Module):
    restores_mean = False  # its mean is close to 0: see `LatentDiffusion.encode_prompts`

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    @property
    def token_table(self) -> Tensor:
        """The frozen embeddings (vocab_size, D) of the vocabulary."""
        return self.transformer.token_emb.weight

    def forward(self, embeddings: Tensor, ends: Tensor | None = None) -> Tensor:
        """Return the context (B, L, D) of token embeddings (B, L, D); L is at most `max_length`."""
        t = self.transformer
        x = embeddings + t.pos_emb.emb.weight[: embeddings.shape[1]]
        return t.norm(t.attn_layers(x))
