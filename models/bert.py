"""LDM's text encoder: a BERT-like transformer trained together with the UNet (paper, section 3).

Its layout is the `x-transformers` encoder of the original code: pre-norm, learned positions, no
token types, no padding mask. Modules carry that checkpoint's key names (`cond_stage_model.`
without the prefix); the language-model head `to_logits` of the file is not used and not kept.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .layers import attention

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
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attention(self.to_q(x), self.to_k(x), self.to_v(x), HEADS))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()),
            nn.Dropout(0.0),  # holds its place in the key names
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class AttentionLayers(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        kinds = [Attention, FeedForward] * config.layers
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(config.width), kind(config.width)]) for kind in kinds
        )

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
    restores_mean = False  # weights in a prompt do not keep its mean, which is close to 0

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    @property
    def token_table(self) -> Tensor:
        """The frozen embeddings (vocab_size, D) that words are looked up in."""
        return self.transformer.token_emb.weight

    def forward(self, embeddings: Tensor, ends: Tensor | None = None) -> Tensor:
        """Context (B, L, D) from token embeddings (B, L, D), L at most `max_length`."""
        t = self.transformer
        x = embeddings + t.pos_emb.emb.weight[: embeddings.shape[1]]
        return t.norm(t.attn_layers(x))
