"""The model as one object: text encoder, UNet, autoencoder and noise schedule.

It is the latent diffusion model of the paper's section 3: E and D are the autoencoder, c_theta is
the text encoder, eps_theta the UNet. All of it is frozen. Textual inversion adds one thing, in
`embed`: ids beyond the vocabulary are looked up in the learnt vectors.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoencoder import Autoencoder
from .bert import BertTextEncoder
from .clip import CLIPTextEncoder, SDXLTextEncoder
from .concepts import Concept
from .layers import Conditioning, each
from .schedule import Schedule
from .tokenizers import BREAK, RENAME, Tokenizer, Tokens, check_names, split_weights
from .unet import UNet

WIDTHS = {768: "sd15", 1024: "sd21", 1280: "ldm", 2048: "sdxl"}  # models by their words' width
Context = Tensor | Conditioning  # (B, L, D); for SDXL a Conditioning, with pooled text (B, P)


@dataclass
class LatentDiffusion:
    unet: UNet
    autoencoder: Autoencoder
    text_encoder: BertTextEncoder | CLIPTextEncoder | SDXLTextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    family: str  # "ldm", "sd1", "sd2" or "sdxl"
    name: str = ""  # the file's or folder's; "emoji" is the bundled model, an LDM
    size: int = 512  # side of the square pictures it was trained on, pixels
    scale_factor: float = 0.18215  # of latents, to a variance of about 1; 0.13025 in SDXL
    fingerprint: str = ""  # identifies the base model, the same in every precision and layout
    stored: str = ""  # precision of its file, such as "float16"
    short_hash: str = ""  # of its file, as A1111's web UI computes it
    clip_skip: int = 1  # 2: the text encoder's last layer but one is used
    defaults: dict[str, float] = field(default_factory=dict)  # steps, lr, ..., if not the paper's

    def __post_init__(self):
        for module in (self.unet, self.autoencoder, self.text_encoder):
            module.requires_grad_(False).eval()
        if self.clip_skip > 1:  # drop the last layers, but not the final norm after them
            del self.text_encoder.text_model.encoder.layers[1 - self.clip_skip :]

    @property
    def device(self) -> torch.device:
        return self.unet.out[2].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's precision. The text encoder always computes in float32."""
        return self.unet.out[2].weight.dtype

    def __str__(self) -> str:
        modules = (self.unet, self.autoencoder, self.text_encoder)
        count = sum(p.numel() for m in modules for p in m.parameters())
        head = f"{self.name}: {self.family}, {count / 1e6:,.0f}M parameters"
        precision = str(self.dtype).removeprefix("torch.")
        return f"{head}, {self.schedule.prediction}-prediction, {precision} on {self.device}"

    # ------------------------------------------------------------------------------- text

    def placeholders(self, concepts: Sequence[Concept]) -> dict[str, range]:
        """Return the ids of each placeholder's vectors: consecutive, from `vocab_size` on."""
        ids, first = {}, self.tokenizer.vocab_size
        for concept in concepts:
            ids[concept.placeholder] = range(first, first + len(concept.vectors))
            first += len(concept.vectors)
        return ids

    def embed(self, ids: Tensor, vectors: Tensor | None) -> Tensor:
        """Return token embeddings (B, L, D) of ids (B, L). Here v* enters (paper, figure 2).

        Id `vocab_size` + i is row i of `vectors` (V, D); others are rows of the frozen table."""
        table = self.text_encoder.token_table
        if vectors is None:
            return F.embedding(ids, table)
        new = ids - self.tokenizer.vocab_size  # negative for ordinary words
        frozen = F.embedding(ids.masked_fill(new >= 0, 0), table)
        # Trap: vectors[new] would sum its gradient in an order that depends on the threads, so runs
        # would differ in the last bits. F.embedding does not.
        learnt = F.embedding(new.clamp(min=0), vectors)
        return torch.where(new[..., None] >= 0, learnt, frozen)  # (B, L, D)

    def encode_text(self, prompts: str | list[str], concepts: Sequence[Concept] = ()) -> Context:
        """Return the context (B, L, D), float32, of B prompts with placeholders; for SDXL a
        `Conditioning`. It is differentiable in the concepts' vectors. Prompts are cut off after L
        tokens. Brackets are text; `encode_prompts` reads them as weights."""
        placeholders = self.placeholders(concepts)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self.tokenizer.token_ids(prompt, placeholders) for prompt in prompts]
        return self.encode_ids(rows, concepts)

    def encode_ids(self, rows: list[list[int]], concepts: Sequence[Concept]) -> Context:
        """Return the context (B, L, D) of B rows of ids of any length, without start and end."""
        tokens = [tuple(self.tokenizer.pad(self.tokenizer.frame(ids))) for ids in rows]
        distinct = list(dict.fromkeys(tokens))
        ids = torch.tensor(distinct, device=self.device)
        vectors = [concept.vectors.to(self.device, torch.float32) for concept in concepts]
        # Trap: not ids.argmax(1), as OpenAI finds the end token: a learnt word's id is higher.
        ends = (ids == self.tokenizer.end_id).int().argmax(dim=1)
        context = self.text_encoder(self.embed(ids, torch.cat(vectors) if vectors else None), ends)
        where = torch.tensor([distinct.index(row) for row in tokens], device=self.device)
        # index_select, not part[where], for the same reason as in `embed`.
        return each(lambda part: part.index_select(0, where), context)

    def weighted_chunks(self, prompt: str, concepts: Sequence[Concept]) -> list[Tokens]:
        """Return the chunks of a prompt: ids with their weights, without start and end. Each is
        encoded separately. For LDM there is one chunk, with a warning if the prompt is cut."""
        placeholders = self.placeholders(concepts)
        known = {"BREAK": [BREAK]} | placeholders
        tokens: Tokens = []
        for text, weight in split_weights(prompt, placeholders):
            tokens += [(i, weight) for i in self.tokenizer.token_ids(text, known)]
        if self.family != "ldm":
            return self.tokenizer.chunks(tokens, placeholders)
        read = [(i, weight) for i, weight in tokens if i != BREAK]
        if len(read) < len(tokens):
            warnings.warn(f"{prompt!r}: this model has no second chunk, BREAK is left out")
        self.warn_if_cut(prompt, len(read))
        return [read[: self.tokenizer.max_length - 2]]

    def encode_prompts(self, prompts: Sequence[str], concepts: Sequence[Concept] = ()) -> Context:
        """Return the context (B, k * L, D) as `encode_text` does, with brackets read as weights. k
        is the number of chunks of the longest prompt; shorter prompts get empty chunks. Raises
        ValueError for a weight that is not a number."""
        rows = [self.weighted_chunks(prompt, concepts) for prompt in prompts]
        k = max(map(len, rows))
        chunks = [chunk for row in rows for chunk in row + [[]] * (k - len(row))]
        encoded = self.encode_ids([[i for i, _ in chunk] for chunk in chunks], concepts)
        context = encoded.context if isinstance(encoded, Conditioning) else encoded
        weights = torch.ones(*context.shape[:2], 1)
        for i, chunk in enumerate(chunks):
            weights[i, 1 : 1 + len(chunk), 0] = torch.tensor([weight for _, weight in chunk])
        scaled = self.apply_weights(context, weights.to(context.device))
        scaled = scaled.unflatten(0, (-1, k)).flatten(1, 2)  # (B, k * L, D)
        # Pooled text is taken from the first chunk.
        return replace(encoded[::k], context=scaled) if context is not encoded else scaled

    def apply_weights(self, context: Tensor, weights: Tensor) -> Tensor:
        """Return a context (B, L, D) with each token's features multiplied by its weight (B, L, 1).

        As in AUTOMATIC1111's web UI, each row is then scaled to its old mean; for SDXL, each
        encoder's part separately. Not for LDM: BERT's mean is close to 0, and the scaling would
        multiply some prompts by factors such as -18."""
        if self.family == "ldm":
            return context * weights
        parts = []
        for part in context.split(self.text_encoder.widths, dim=-1):
            # float64, because means are much smaller than values; on the CPU: MPS has no float64
            old, new = (x.cpu().double().mean((1, 2), True) for x in (part, part * weights))
            parts.append(part * weights * (old / new).to(part))
        return torch.cat(parts, dim=-1)

    def conditioning(
        self, prompts: Sequence[str], concepts: Sequence[Concept] = (), negative: str = ""
    ) -> tuple[Context, Context]:
        """Return the contexts of prompts (P, k * L, D) and of the negative prompt (1, k * L, D),
        for `guided`; k is as in `encode_prompts`. Checks the concepts."""
        self.check_concepts(concepts)
        both = self.encode_prompts([*prompts, negative], concepts)
        context, uncond = both[:-1], both[-1:]
        # Trap: SDXL was trained with zeros instead of the encoded empty prompt.
        if self.family == "sdxl" and not negative.strip():
            uncond = each(torch.zeros_like, uncond)
        return context, uncond

    def token_text(self, i: int, concepts: Sequence[Concept] = ()) -> str:
        """Return an id's text: the vocabulary's entry, or "<cat>, vector 1 of 2" if it is new."""
        for name, ids in self.placeholders(concepts).items():
            if i in ids:
                return f"{name}, vector {i - ids[0] + 1} of {len(ids)}"
        return next(text for text, number in self.tokenizer.ids.items() if number == i)

    # ----------------------------------------------------------------------------- checks

    def known_ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without unknown tokens."""
        return [i for i in self.tokenizer.token_ids(text) if i != self.tokenizer.unknown_id]

    def check_placeholders(self, names: Sequence[str]) -> None:
        """Raise ValueError for a placeholder with spaces, an ordinary word, and equal names."""
        check_names(names)
        ours = [name for name in names if name.isalnum() and len(self.known_ids(name)) == 1]
        if ours:
            raise ValueError(f"placeholder {ours[0]!r} is an ordinary word of this model; {RENAME}")

    def check_concepts(self, concepts: Sequence[Concept]) -> None:
        """Raise ValueError for words of another width than the model's, and for names that
        `check_placeholders` refuses. Warns of words that were learnt with another model."""
        self.check_placeholders([concept.placeholder for concept in concepts])
        width = self.text_encoder.token_table.shape[1]
        for concept in concepts:
            if (theirs := concept.vectors.shape[1]) != width:
                base = concept.metadata.get("base_model") or WIDTHS.get(theirs, "unknown")
                wide = f"{concept.placeholder} is {theirs} wide, words of this model {width} wide"
                raise ValueError(f"{wide}; its model goes to --model: {base}")
            self.warn_of_another_model(concept)

    def warn_of_another_model(self, concept: Concept) -> None:
        """Warn of a word that was learnt with another model or clip skip, by what its file says."""
        name, said = concept.placeholder, concept.metadata
        theirs, base = said.get("base_model_hash", ""), said.get("base_model") or "a model"
        # Trap: files of A1111 hold another kind of hash here, with fewer digits.
        if len(theirs) == len(self.fingerprint) and theirs != self.fingerprint:
            here = f"this is another model: {self.name} (fingerprint {self.fingerprint})"
            warnings.warn(f"{name} was learnt with {base} (fingerprint {theirs}); {here}")
        if (skip := said.get("clip_skip", str(self.clip_skip))) != str(self.clip_skip):
            warnings.warn(f"{name} was learnt with clip skip {skip}; add --clip-skip {skip}")

    def warn_if_cut(self, prompt: str, count: int) -> None:
        """Warn if a prompt of `count` tokens is longer than the text encoder reads."""
        if count > (room := self.tokenizer.max_length - 2):
            warnings.warn(f"{prompt!r} has {count} tokens, only the first {room} are read")

    # ----------------------------------------------------------------------------- images

    @property
    def unit(self) -> int:
        """Pictures' width and height must be multiples of this number of pixels."""
        return self.autoencoder.config.factor * 2 ** (len(self.unet.config.widths) - 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of pictures of `size` (width, height), pixels.
        Raises ValueError for a size that does not fit the model."""
        (width, height), factor, unit = size, self.autoencoder.config.factor, self.unit
        if min(size) < unit or width % unit or height % unit:
            raise ValueError(f"size {width}x{height}: both must be multiples of {unit}")
        return self.unet.config.channels, height // factor, width // factor

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (B, C, h, w), scaled, float32, of the latents of images
        (B, 3, H, W) in [-1, 1]. mean + std * noise is a sample z ~ E(x)."""
        mean, std = self.autoencoder.encode(images.to(self.device))
        return mean.float() * self.scale_factor, std.float() * self.scale_factor

    def encode_images(self, images: Tensor) -> Tensor:
        """Return only the mean from `encode_moments`."""
        return self.encode_moments(images)[0]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1], float32, of scaled latents (B, C, h, w)."""
        z = latents.to(self.device, torch.float32) / self.scale_factor
        return self.autoencoder.decode(z).float().clamp(-1, 1)

    # --------------------------------------------------------------------------- guidance

    @torch.no_grad()
    def guided(
        self, x_t: Tensor, t: Tensor, context: Context, uncond: Context, guidance_scale: float
    ) -> Tensor:
        """Return the prediction for `context`, pushed away from the one for `uncond`, the negative
        prompt: classifier-free guidance (Ho & Salimans 2021). Scale 1 is no guidance."""
        if guidance_scale == 1:
            return self.unet(x_t, t, context).float()
        both = each(lambda u, c: torch.cat([u.expand_as(c), c]), uncond, context)  # (2B, L, D)
        prediction = self.unet(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float()
        without, with_text = prediction.chunk(2)
        return without + guidance_scale * (with_text - without)
