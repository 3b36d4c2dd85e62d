"""The baselines of figure 5: words and pictures by CLIP alone, beside the learnt word.

    python examples/experiments/baselines.py
    python examples/experiments/baselines.py --images cat/ --concept cat.safetensors --model sd.ckpt

PALAVRA (Cohen et al. 2022) learns a word among CLIP's own tokens with a contrastive loss: its texts
shall be nearer to the pictures than the texts of other words. CLIP-guided diffusion (Crowson 2021)
draws without a prompt and follows, in every step, the gradient of a cosine in CLIP's space: to the
text with PALAVRA's word, or to the text without a word and to the pictures. It optimises what our
scores measure, so judge by eye.
"""

import repository  # noqa: F401
import torch
import torch.nn.functional as F
from clip_guided import clip_guided
from common import Workspace, concept_folder, make_parser, open_images, run_script, sheet
from evaluate import without_placeholder
from torch import Tensor

PROMPTS = ("a photo of a {}", "a photo of a {} on the beach", "a sketch of a {}")
OTHERS = "cat dog car house tree apple shoe clock book guitar bird flower cup hat toy".split()


def text_features(workspace: Workspace, texts: list[str], word: Tensor) -> Tensor:
    """Return unit features of texts in which "*" is a word of CLIP, given as a vector (1, D)."""
    clip, tokenizer = workspace.scorer.clip, workspace.scorer.tokenizer
    new = {"*": [tokenizer.vocab_size]}
    ids = torch.tensor([tokenizer.pad(tokenizer.encode(text, new)) for text in texts])
    table = clip.text_model.embeddings.token_embedding.weight
    embeddings = F.embedding(ids.to(table.device), torch.cat([table, word]))
    ends = (ids == tokenizer.end_id).int().argmax(dim=1)
    features = clip.text_model(embeddings)[1][torch.arange(len(ids)), ends]
    return F.normalize(clip.text_projection(features), dim=-1)


def contrastive_word(workspace: Workspace, images: Tensor, steps: int) -> Tensor:
    """Return PALAVRA's word (1, D): it minimises the cross-entropy of each picture's feature (N, D)
    between the word's text and those of other words."""
    table = workspace.scorer.clip.text_model.embeddings.token_embedding.weight
    word = table.mean(0, keepdim=True).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([word], lr=1e-2)
    for _ in range(steps):
        texts = text_features(workspace, [f"a photo of a {w}" for w in ("*", *OTHERS)], word)
        logits = workspace.scorer.clip.logit_scale.exp() * images @ texts.T
        loss = F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return word.detach()


def main(argv=None) -> None:
    parser = make_parser(__doc__, samples=2, steps=50)
    parser.add_argument("--concept", default="mushroom", help="a set, or a word's file")
    parser.add_argument("--images", help="what it was learnt from; the set's pictures by default")
    parser.add_argument("--scale", type=float, default=100.0, help="weight of the gradient")
    parser.add_argument("--word-steps", type=int, default=200)
    args = parser.parse_args(argv)
    workspace = Workspace.open(args)
    workspace.scorer.clip.requires_grad_(False)
    images = open_images(args.images or concept_folder(args.concept))
    features, word = workspace.scorer.images(images), workspace.word(args.concept)
    palavra = contrastive_word(workspace, features, args.word_steps)
    rows, guide = {"learnt from": images, "ours": []}, (args.n, args.steps, args.scale)
    rows["PALAVRA, CLIP-guided"], rows["text and pictures, CLIP-guided"] = [], []
    for prompt in PROMPTS:
        rows["ours"] += workspace.draw(prompt.replace("{}", word.placeholder), [word])
        with_word = text_features(workspace, [prompt.replace("{}", "*")], palavra)
        rows["PALAVRA, CLIP-guided"] += clip_guided(workspace, with_word, *guide)
        text = workspace.scorer.texts([without_placeholder(prompt, "{}")])
        both = torch.cat([text.expand(len(features), -1), features])
        rows["text and pictures, CLIP-guided"] += clip_guided(workspace, both, *guide)
    workspace.save("baselines.png", sheet(rows, [p for p in PROMPTS for _ in range(args.n)]))


if __name__ == "__main__":
    run_script(main)
