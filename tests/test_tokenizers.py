"""Token ids against transformers' CLIP and BERT tokenizers, what placeholders do, and weights in
prompts.

`golden/tokenizer/golden.json` holds 364 strings with their ids, without the padding.
"""

import gzip
import json
import random
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from models.tokenizers import (
    BREAK,
    VOCAB,
    CLIPTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    split_weights,
    without_weights,
)

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("sd1", "sd2", "bert")
ROWS = json.loads((GOLDEN / "tokenizer" / "golden.json").read_text(encoding="utf-8"))["rows"]


@cache
def tokenizer(name: str) -> Tokenizer:
    if name == "bert":
        return WordPieceTokenizer.load(VOCAB / "bert-base-uncased.txt")
    return CLIPTokenizer.load(pad_id=0 if name == "sd2" else None)


@pytest.mark.parametrize("name, column", [("sd1", "clip"), ("bert", "bert")])
def test_ids(name, column):
    ours = tokenizer(name)
    assert len(ROWS) == 364
    wrong = [
        row["text"]
        for row in ROWS
        if ours.pad(ours.encode(row["text"]))
        != row[column] + [ours.pad_id] * (77 - len(row[column]))
    ]
    assert wrong == []


def test_clips_ids_are_those_of_transformers(tmp_path):
    """On the golden strings and on random ones of all kinds of characters."""
    transformers = pytest.importorskip("transformers", minversion="5")
    ours = tokenizer("sd1")
    (tmp_path / "merges.txt").write_bytes(
        gzip.decompress((VOCAB / "clip_merges.txt.gz").read_bytes())
    )
    (tmp_path / "vocab.json").write_text(json.dumps(ours.ids))
    files = {
        name: str(tmp_path / f"{name}.{e}") for name, e in (("vocab", "json"), ("merges", "txt"))
    }
    theirs = transformers.CLIPTokenizer(**files)
    rng = random.Random(0)
    blocks = ((32, 126), (32, 126), (160, 591), (880, 1279), (0x4E00, 0x4E80), (0x1F600, 0x1F64F))
    texts = [row["text"] for row in ROWS]
    for _ in range(300):
        block = [rng.choice(blocks) for _ in range(rng.randrange(1, 20))]
        texts.append("".join(chr(rng.randint(*b)) + rng.choice(("", "", " ")) for b in block))
    wrong = [
        text
        for text in texts
        if ours.encode(text) != theirs(text, truncation=True, max_length=77).input_ids
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "name, start, end, pad, size",
    [
        ("sd1", 49406, 49407, 49407, 49408),
        ("sd2", 49406, 49407, 0, 49408),
        ("bert", 101, 102, 0, 30522),
    ],
)
def test_special_ids(name, start, end, pad, size):
    ours = tokenizer(name)
    assert (ours.start_id, ours.end_id, ours.pad_id) == (start, end, pad)
    assert ours.vocab_size == size
    assert ours.encode("") == [start, end]
    assert ours.pad(ours.encode("")) == [start, end] + [pad] * 75


def test_special_tokens_as_text():
    clip, bert = tokenizer("sd1"), tokenizer("bert")
    assert clip.token_ids("<|startoftext|>a<|endoftext|>") == [49406, *clip.token_ids("a"), 49407]
    assert 49407 not in clip.token_ids("<|ENDOFTEXT|>")  # in capitals it is no special token
    assert bert.token_ids("[CLS]x[SEP][MASK][PAD][UNK]")[:1] == [101]
    assert bert.token_ids("[SEP] [MASK] [PAD] [UNK]") == [102, 103, 0, 100]
    assert len(bert.token_ids("[mask]")) == 3


@pytest.mark.parametrize("name", NAMES)
def test_truncation_keeps_the_end(name):
    ours = tokenizer(name)
    ids = ours.encode("cat " * 100)
    assert len(ids) == 77
    assert ids == [ours.start_id, *ours.token_ids("cat") * 75, ours.end_id]
    placeholders = {"<cat>": range(ours.vocab_size, ours.vocab_size + 3)}
    cut = ours.encode("cat " * 74 + "<cat>", placeholders)  # only the first of three vectors fits
    assert cut[-2:] == [ours.vocab_size, ours.end_id]
    assert len(cut) == 77


@pytest.mark.parametrize("name", NAMES)
def test_placeholders(name):
    ours = tokenizer(name)
    n = ours.vocab_size
    new = {"<cat>": (n, n + 1), "<cat>s": (n + 2,), "S*": (n + 3,), "Wort": (n + 4,)}
    photo, of = ours.token_ids("a photo of"), ours.token_ids("of")
    assert ours.token_ids("a photo of <cat>", new) == [*photo, n, n + 1]
    assert ours.token_ids("a photo of <cat>s", new) == [*photo, n + 2]  # the longest first
    assert ours.token_ids("of<cat><cat>of", new) == [*of, n, n + 1, n, n + 1, *of]
    assert ours.token_ids("S*,S*", new) == [n + 3, *ours.token_ids(","), n + 3]
    assert ours.token_ids("<CAT>", new) == ours.token_ids("<CAT>")  # case matters
    assert ours.token_ids("wort s*", new) == ours.token_ids("wort s*")
    assert ours.token_ids("of Wort, of", new) == [*of, n + 4, *ours.token_ids(", of")]
    assert ours.token_ids("ofWortof", new) == ours.token_ids("ofWortof")  # not inside another word
    assert ours.token_ids("Worts", new) == ours.token_ids("Worts")
    assert ours.token_ids("a photo of", new) == photo
    assert ours.token_ids("&lt;cat&gt;", new) == ours.token_ids("&lt;cat&gt;")


@pytest.mark.parametrize("family, pad", [("sd1", None), ("sd2", 0)])
def test_diffusers_folder(family, pad):
    """640 tokens: two times 256 bytes, the first 126 merges, start and end."""
    folder = GOLDEN / "tiny" / family / "diffusers" / "tokenizer"
    ours = CLIPTokenizer.load(folder / "merges.txt", pad_id=pad)
    assert ours.ids == json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert (ours.start_id, ours.end_id, ours.vocab_size) == (638, 639, 640)
    assert ours.pad_id == (639 if pad is None else pad)
    same = CLIPTokenizer.load(vocab_size=640)
    assert same.ids == ours.ids
    assert same.encode("a photo of the cat") == ours.encode("a photo of the cat")
    assert [*ours.ids].index("!") == 0  # what Stable Diffusion 2 pads with


def test_loading_is_fast():
    start = time.process_time()
    CLIPTokenizer.load()
    assert time.process_time() - start < 1  # takes 0.1 s


def test_the_first_merge_comes_first():
    """In "aab" it is "a a", so "a b" never gets a chance; in "aaab" the left "a a" is joined."""
    ours = CLIPTokenizer([("a", "a"), ("a", "b</w>"), ("aa", "ab</w>")])
    assert ours.token_ids("ab") == [ours.ids["ab</w>"]]
    assert ours.token_ids("aab") == [ours.ids["aa"], ours.ids["b</w>"]]
    assert ours.token_ids("aaab") == [ours.ids["aaab</w>"]]


def test_a_vocabulary_may_lack_its_last_line_break(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]
    for end in ("", "\n"):
        (tmp_path / "vocab.txt").write_text("\n".join(tokens) + end)
        assert WordPieceTokenizer.load(tmp_path / "vocab.txt").token_ids("cat") == [5]


# ----------------------------------------------------------------------------- weights in prompts

PROMPTS = [
    "a photo of a cat",
    "a photo of (<s>:1.3) on the [beach]",
    "a (photo of ((<s>)) on:0.7) the beach",
    "[[a photo]] of <s>, (very (old)",
    "a \\(photo\\) of [<s> \\[x\\]] :) 10:30 :1.5)",
    "(a:1.21)(photo:0.5)",
    "(" * 3 + "a photo of <s>",
    "(word:1.5) " * 60,  # cut off in the middle
]


def by_characters(prompt: str) -> list[tuple[str, float]]:
    """Every character that is text, with its weight: brackets are looked for in pairs first."""
    escaped, characters, i = [], [], 0
    while i < len(prompt):
        if prompt[i] == "\\":
            literal = prompt[i + 1 : i + 2]
            if literal and literal in "()[]\\":
                characters.append(literal)
                escaped.append(True)
                i += 1
        else:
            characters.append(prompt[i])
            escaped.append(False)
        i += 1
    weights = np.ones(len(characters))
    text = [True] * len(characters)
    stacks: dict[str, list[int]] = {"(": [], "[": []}
    for i, c in enumerate(characters):
        if escaped[i]:
            continue
        if c in "([":
            stacks[c].append(i)
            text[i] = False
        elif c == ")" and stacks["("]:
            begin, factor = stacks["("].pop(), 1.1
            text[i] = False
            colon = "".join(characters[:i]).rfind(":")
            inside = "".join(characters[colon + 1 : i]).strip()
            if colon > begin and inside and set(inside.lstrip("+-")) <= set("0123456789."):
                factor = float(inside)
                for k in range(colon, i):
                    text[k] = False
            weights[begin:i] *= factor
        elif c == "]" and stacks["["]:
            text[i] = False
            weights[stacks["["].pop() : i] /= 1.1
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for begin in stacks[bracket]:
            weights[begin:] *= factor
    return [(c, w) for c, w, shown in zip(characters, weights, text) if shown]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_weights_of_characters(prompt):
    ours = [(c, weight) for text, weight in split_weights(prompt) for c in text]
    theirs = by_characters(prompt)
    assert [c for c, _ in ours] == [c for c, _ in theirs]
    np.testing.assert_allclose([w for _, w in ours], [w for _, w in theirs], rtol=1e-12)


def test_escaped_text_is_plain():
    assert split_weights(r"a \(b\) \[c\] \\d: \(e:1.2\)") == [(r"a (b) [c] \d: (e:1.2)", 1.0)]
    assert without_weights("a (b:2) [c]") == "a b c"


def test_a_weight_that_is_no_number_is_said():
    with pytest.raises(ValueError, match="'1.2.3' is not a weight"):
        split_weights("a (cat:1.2.3)")


WORDS = ("<cat>", "[V]", "<dog:1>", "<lora:x:1>", "my-cat", "[a:b:0.5]", "BREAK")


@pytest.mark.parametrize(
    "prompt, weight",
    [
        ("a (<cat>:1,2)", "1,2"),
        ("(<cat>: 1,2), b", "1,2"),
        ("([V]:abc)", "abc"),
        ("((my-cat:high))", "high"),
        ("(<dog:1>:120%)", "120%"),
        ("(<unknown>:strong)", "strong"),
        ("(a cat:-1,5)", "-1,5"),
        ("(cat2:1..2)", "1..2"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_meant_as_a_weight_and_is_none_is_an_error(prompt, weight):
    with pytest.raises(ValueError, match=f"'{weight}' is not a weight; write"):
        split_weights(prompt, WORDS)


@pytest.mark.parametrize(
    "prompt, pieces",
    [
        ("at 10:30, [b]", [("at 10:30, ", 1), ("b", 1 / 1.1)]),
        ("(ratio 16:9)", [("ratio 16", 9)]),  # as AUTOMATIC1111 reads it
        ("(1:1.85, 10:30,5)", [("1:1.85, 10:30,5", 1.1)]),
        ("(open 10:30pm)", [("open 10:30pm", 1.1)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("(<cat>: asleep)", [("<cat>: asleep", 1.1)]),
        ("(style:anime)", [("style:anime", 1.1)]),
        ("(smile :))", [("smile :", 1.1), (")", 1)]),
        ("(smile :D) :-)", [("smile :D", 1.1), (" :-)", 1)]),
        ("(wait:...)", [("wait:...", 1.1)]),
        ("(<cat>:0)", [("<cat>", 0)]),
        (r"\(<cat>:abc\) \\", [("(<cat>:abc) \\", 1)]),
        ("(a: 0.5 )(b:+.5)", [("ab", 0.5)]),
        ("a | b", [("a | b", 1)]),
        ("", []),
    ],
)
@pytest.mark.filterwarnings("error")
def test_ordinary_text_is_neither_an_error_nor_a_note(prompt, pieces):
    assert split_weights(prompt, WORDS) == pieces


@pytest.mark.filterwarnings("error")
def test_learnt_words_win_over_any_other_syntax():
    prompt = " ".join(WORDS)
    assert split_weights(prompt, WORDS) == [(prompt, 1)]
    weighted = " ".join(f"({word}:1.5)" for word in WORDS)
    assert [p for p in split_weights(weighted, WORDS) if p != (" ", 1)] == [
        (word, 1.5) for word in WORDS
    ]


@pytest.mark.parametrize("name", ["<cat>", "cat", "cat.pt", "cat.safetensors", "<cat>.bin"])
@pytest.mark.filterwarnings("error")
def test_comfyuis_name_of_a_word(name):
    assert split_weights(f"a (embedding:{name}:1.2)", WORDS) == [("a ", 1), ("<cat>", 1.2)]
    assert split_weights(f"embedding:{name}, b", WORDS) == [("<cat>, b", 1)]
    assert split_weights(f"[embedding:{name}]", ["<>", "<cat>"]) == [("<cat>", 1 / 1.1)]


@pytest.mark.parametrize(
    "prompt, note, text",
    [
        ("a <lora:x y:0.8>b", "<lora:x y:0.8> is not supported; it is left out", "a b"),
        ("<hypernet:x:1>", "<hypernet:x:1> is not supported", ""),
        ("[a:b:0.5]", "[a:b:0.5] is not supported; it is read as plain", "a:b:0.5"),
        ("x [<cat>: 10 ]", "[<cat>: 10 ] is not supported", "x <cat>: 10 "),
        ("[a|<cat>]", "[a|<cat>] is not supported", "a|<cat>"),
        (
            "embedding:dog, b",
            "embedding:dog is not a learnt word (known: <cat>)",
            "embedding:dog, b",
        ),
        (
            "a <dog>",
            "<dog> is not a learnt word (known: <cat>); it is read as plain text",
            "a <dog>",
        ),
    ],
)
def test_what_is_not_supported_is_noted(prompt, note, text):
    with pytest.warns(UserWarning) as notes:
        assert without_weights(prompt, ["<cat>"]) == text
    assert len(notes) == 1 and note in str(notes[0].message)


def chunked(units: list, room: int = 75) -> list[list]:
    """A1111's rule restated. A unit is (ids of a word's vectors or of one token, is it a comma), or
    None for BREAK."""
    chunks, rest = [], units
    while rest or not chunks:
        fits, size = 0, 0
        while fits < len(rest) and rest[fits] and size + len(rest[fits][0]) <= room:
            size += len(rest[fits][0])
            fits += 1
        if fits < len(rest) and rest[fits] and size == room and not rest[fits][1]:
            starts = np.cumsum([0] + [len(ids) for ids, _ in rest[:fits]])
            commas = [k for k in range(fits) if rest[k][1] and room - starts[k] <= 20]
            fits = commas[-1] + 1 if commas else fits
        chunks.append([i for ids, _ in rest[:fits] for i in ids])
        rest = rest[fits + (fits < len(rest) and rest[fits] is None) :]
    return chunks


def test_long_prompts_are_cut_into_chunks_as_a1111_does():
    ours, draw = tokenizer("sd1"), random.Random(0)
    first = ours.vocab_size
    words = {"<a>": range(first, first + 1), "<b>": range(first + 1, first + 17)}
    comma = ours.ids[",</w>"]
    for _ in range(300):
        weights = (50, draw.randint(0, 5), 3, 1, 0.5)
        kinds = draw.choices(("x", ",", "<a>", "<b>", "BREAK"), weights, k=250)
        units: list = []
        for kind in kinds[: draw.choice((0, 1, 74, 75, 76, 250))]:
            ids = words.get(kind, [comma if kind == "," else draw.randrange(260)])
            units.append(None if kind == "BREAK" else ([*ids], kind == ","))
        tokens = [(i, 1.0) for unit in units for i in (unit[0] if unit else [BREAK])]
        found = [[i for i, _ in chunk] for chunk in ours.chunks(tokens, words)]
        expected = chunked(units)
        assert found == expected or (units[-1:] == [None] and found == expected[:-1])


def test_a_word_is_not_torn_by_the_end_of_a_chunk():
    ours = tokenizer("sd1")
    word = {"<cat>": range(ours.vocab_size, ours.vocab_size + 8)}
    x, new = [(320, 1.0)] * 70, [(i, 1.2) for i in word["<cat>"]]
    assert ours.chunks(x + new + x, word) == [x, new + x[:67], x[67:]]
    huge = {"<cat>": range(ours.vocab_size, ours.vocab_size + 80)}  # does not fit into any
    new = [(i, 1.0) for i in huge["<cat>"]]
    assert ours.chunks(x + new, huge) == [x, new[:75], new[75:]]
