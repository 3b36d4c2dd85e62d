"""The model a user holds: text encoder, UNet, autoencoder and noise schedule in one object.

It is the latent diffusion model of the paper's section 3: E and D are the autoencoder, c_theta
the text encoder, eps_theta the UNet. Everything is frozen. The one thing that textual inversion
adds happens in `embed`: ids that are not in the vocabulary are looked up in learnt vectors.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoencoder import Autoencoder
from .embeddings import Concept
from .prompts import escape, split_weights
from .schedule import Schedule
from .tokenizers import Placeholders, Tokenizer, any_of
from .unet import UNet


class TextEncoder(Protocol):
    """What `LatentDiffusion` asks of a text encoder, an nn.Module."""

    token_table: Tensor  # (vocab_size, D), the frozen embeddings that words are looked up in
    restores_mean: bool  # whether weights in a prompt leave the mean of its features as it was

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Context (B, L, D) of token embeddings (B, L, D)."""


@dataclass
class LatentDiffusion:
    unet: UNet
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    family: str  # "ldm", "sd1" or "sd2"
    name: str = ""  # of the file or folder; "emoji" for the bundled model, an LDM
    size: int = 512  # side of the square pictures it was trained on, pixels
    # Makes the variance of the latents about 1, as the noise schedule expects: at its end only
    # noise of variance 1 is left. 0.18215 in LDM and Stable Diffusion 1 and 2.
    scale_factor: float = 0.18215
    fingerprint: str = ""  # tells base models apart, in fp32 and in fp16
    stored: str = ""  # precision of its file: "float16"
    # What suits it, where that is not the paper's: steps, batch_size, lr, guidance_scale.
    defaults: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for module in (self.unet, self.autoencoder, self.text_encoder):
            module.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.unet.out[2].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet and the autoencoder; the text encoder always computes in float32."""
        return self.unet.out[2].weight.dtype

    @property
    def parameter_count(self) -> int:
        modules = (self.unet, self.autoencoder, self.text_encoder)
        return sum(p.numel() for m in modules for p in m.parameters())

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}: {self.family}, {self.parameter_count / 1e6:,.0f}M parameters, "
            f"{self.schedule.prediction}-prediction, {precision} on {self.device}"
        )

    # ---------------------------------------------------------------------------------- text

    def placeholders(self, concepts: Sequence[Concept]) -> Placeholders:
        """Each placeholder with the ids of its vectors: consecutive, from `vocab_size` on."""
        ids: dict[str, range] = {}
        first = self.tokenizer.vocab_size
        for concept in concepts:
            ids[concept.placeholder] = range(first, first + len(concept.vectors))
            first += len(concept.vectors)
        return ids

    def embed(self, ids: Tensor, vectors: Tensor | None) -> Tensor:
        """Token embeddings (B, L, D) of ids (B, L): here v* enters (paper, figure 2).

        Ids from `vocab_size` on are looked up in `vectors` (V, D), in order; the others in the
        frozen table.
        """
        table = self.text_encoder.token_table
        if vectors is None:
            return F.embedding(ids, table)
        new = ids >= self.tokenizer.vocab_size
        frozen = F.embedding(ids.masked_fill(new, 0), table)
        learnt = vectors[(ids - self.tokenizer.vocab_size).clamp(min=0)]
        return torch.where(new[..., None], learnt, frozen)

    def encode_text(self, prompts: Sequence[str], concepts: Sequence[Concept] = ()) -> Tensor:
        """Context (B, L, D), float32, of prompts that may hold the concepts' placeholders.

        Differentiable with respect to the concepts' vectors. What does not fit into L tokens is
        cut off. Brackets are plain text: `encode_prompts` reads them as weights.
        """
        placeholders = self.placeholders(concepts)
        return self.encode_ids(
            [self.tokenizer.token_ids(p, placeholders) for p in prompts], concepts
        )

    def encode_ids(self, rows: list[list[int]], concepts: Sequence[Concept]) -> Tensor:
        """`encode_text` of ids, as many as there are, without start and end; equal rows once."""
        tokens = [tuple(self.tokenizer.pad(self.tokenizer.frame(ids))) for ids in rows]
        distinct = list(dict.fromkeys(tokens))
        ids = torch.tensor(distinct, device=self.device)
        vectors = None
        if concepts:
            vectors = torch.cat([c.vectors.to(self.device, torch.float32) for c in concepts])
        context = self.text_encoder(self.embed(ids, vectors))
        return context[[distinct.index(row) for row in tokens]]

    def weighted_ids(self, prompt: str, concepts: Sequence[Concept]) -> list[tuple[int, float]]:
        """The ids of a prompt, without start and end, each with its weight (models/prompts.py)."""
        placeholders = self.placeholders(concepts)
        if placeholders:  # one like [V] is no bracket
            prompt = re.sub(any_of(placeholders), lambda word: escape(word[0]), prompt)
        pieces = split_weights(prompt)
        return [(i, w) for text, w in pieces for i in self.tokenizer.token_ids(text, placeholders)]

    def encode_prompts(self, prompts: Sequence[str], concepts: Sequence[Concept] = ()) -> Tensor:
        """Context (B, L, D) as `encode_text` makes it, where brackets weigh what is in them.

        Each token's output is multiplied by its weight, then the whole prompt by what brings its
        mean back to what it was: the rule of AUTOMATIC1111's web UI, which knows CLIP only. The
        second half is left out for LDM's BERT: the bundled one's mean is 0 to a thousandth of its
        deviation, and bringing that back multiplied whole prompts by -18. Raises ValueError for a
        weight that is no number.
        """
        rows = [self.weighted_ids(prompt, concepts) for prompt in prompts]
        context = self.encode_ids([[i for i, _ in own] for own in rows], concepts)
        weights = torch.ones(context.shape[:2])
        for row, own in zip(weights, rows):
            own = own[: len(row) - 2]
            row[1 : 1 + len(own)] = torch.tensor([weight for _, weight in own])
        scaled = context * weights[..., None].to(context.device)
        if not self.text_encoder.restores_mean:
            return scaled
        # The means are small beside what they are means of, hence float64, which MPS has not.
        before, after = (x.cpu().double().mean((1, 2), True) for x in (context, scaled))
        return scaled * (before / after).to(scaled)

    # -------------------------------------------------------------------------------- images

    @property
    def unit(self) -> int:
        """What width and height of pictures must be multiples of, pixels."""
        return self.autoencoder.config.factor * 2 ** (len(self.unet.config.widths) - 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of pictures of `size` (width, height) pixels."""
        factor, unit = self.autoencoder.config.factor, self.unit
        if any(s < unit or s % unit for s in size):
            raise ValueError(
                f"size {size[0]}x{size[1]} does not fit this model; "
                f"width and height must be multiples of {unit}"
            )
        return self.unet.config.channels, size[1] // factor, size[0] // factor

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w), scaled, float32, of images (B, 3, H, W) in
        [-1, 1]. mean + std * noise is a sample of the latents z ~ E(x)."""
        moments = self.autoencoder.encode(images.to(self.device, self.dtype))
        mean, std = (m.float() * self.scale_factor for m in moments)
        return mean, std

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w), scaled, float32, of images (B, 3, H, W) in [-1, 1]: the mean."""
        return self.encode_moments(images)[0]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], float32, of scaled latents (B, C, h, w)."""
        z = latents.to(self.device, torch.float32) / self.scale_factor
        return self.autoencoder.decode(z.to(self.dtype)).float().clamp(-1, 1)

    # ------------------------------------------------------------------------------ guidance

    @torch.no_grad()
    def guided(
        self, x_t: Tensor, t: Tensor, context: Tensor, uncond: Tensor, guidance_scale: float
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2021): the prediction, pushed away from the
        one for `uncond`, the empty prompt. Scale 1 is no guidance; both halves run as one batch.
        """
        if guidance_scale == 1:
            return self.unet(x_t, t, context).float()
        both = torch.cat([uncond.expand_as(context), context])
        prediction = self.unet(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float()
        without, with_text = prediction.chunk(2)
        return without + guidance_scale * (with_text - without)
