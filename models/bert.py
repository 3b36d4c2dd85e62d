"""LDM's text encoder: a BERT-like transformer trained together with the UNet (paper, section 3).

It is the `x-transformers` encoder of the original code: pre-norm, learned positions, no token
types, no padding mask. Modules have the checkpoint's key names (without the prefix
`cond_stage_model.`); its language-model head `to_logits` is not used.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .layers import attention, feed_forward

HEADS, INNER = 8, 512  # attention heads and their joint width, fixed in the original code


@dataclass
class BertConfig:
    width: int = 1280
    layers: int = 32
    vocab_size: int = 30522
    max_length: int = 77


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, INNER, bias=False) for _ in range(3))
        self.to_out = nn.Linear(INNER, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attention(self.to_q(x), self.to_k(x), self.to_v(x), HEADS))


class AttentionLayers(nn.Module):
    """Attention and feed-forward in turns, each with its norm and added to x (B, L, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width, self.layers = config.width, nn.ModuleList()
        for _ in range(config.layers):
            first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
            for layer in (Attention(width), feed_forward(first, width)):
                self.layers.append(nn.ModuleList([nn.LayerNorm(width), layer]))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class BertTextEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.Module()
        self.transformer.token_emb = nn.Embedding(config.vocab_size, config.width)
        self.transformer.pos_emb = nn.Module()
        self.transformer.pos_emb.emb = nn.Embedding(config.max_length, config.width)
        self.transformer.attn_layers = AttentionLayers(config)
        self.transformer.norm = nn.LayerNorm(config.width)

    @property
    def token_table(self) -> Tensor:
        """The frozen embeddings (vocab_size, D) of the vocabulary."""
        return self.transformer.token_emb.weight

    def forward(self, embeddings: Tensor, ends: Tensor | None = None) -> Tensor:
        """Return the context (B, L, D) of token embeddings (B, L, D); L is at most `max_length`."""
        positions = self.transformer.pos_emb.emb.weight[: embeddings.shape[1]]
        return self.transformer.norm(self.transformer.attn_layers(embeddings + positions))
