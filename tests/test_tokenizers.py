"""Token ids against OpenAI's, open_clip's and BERT's own tokenizers, and what placeholders do.

`golden/tokenizer/golden.json` holds 364 strings with the ids of all three, `damaged.json` strings
in wrong encodings with those of ftfy and OpenAI's tokenizer; neither keeps the padding.
"""

import json
import time
from functools import cache
from pathlib import Path

import pytest

from models.mending import fix_text
from models.tokenizers import (
    MERGES,
    OPEN_CLIP_SPECIAL,
    CLIPTokenizer,
    Tokenizer,
    WordPieceTokenizer,
)

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("sd1", "sd2", "bert")


@cache
def tokenizer(name: str) -> Tokenizer:
    if name == "bert":
        return WordPieceTokenizer.load(MERGES.parent / "bert-base-uncased.txt")
    if name == "sd1":
        return CLIPTokenizer.load()
    return CLIPTokenizer.load(pad_id=0, special=OPEN_CLIP_SPECIAL)


def rows(file: str) -> list[dict]:
    return json.loads((GOLDEN / "tokenizer" / file).read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("name", NAMES)
def test_ids(name):
    ours = tokenizer(name)
    data = rows("golden.json")
    assert len(data) == 364
    wrong = [
        row["text"]
        for row in data
        if ours.pad(ours.encode(row["text"])) != row[name] + [ours.pad_id] * (77 - len(row[name]))
    ]
    assert wrong == []


def test_ids_of_damaged_text():
    ours = tokenizer("sd1")
    wrong = [
        row["text"]
        for row in rows("damaged.json")
        if ours.pad(ours.encode(row["text"])) != row["sd1"] + [49407] * (77 - len(row["sd1"]))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "damaged, mended",
    [
        ("cafÃ©", "café"),
        ("â€œquotesâ€\x9d", '"quotes"'),
        ("voilÃ  le travail", "voilà le travail"),  # A0 became an ordinary space
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
        ("caf√© 50¬∞C", "café 50°C"),  # Mac
        ("a 😀 in a cafÃ©", "a 😀 in a café"),  # only in part
        ("café, Ã la mode, Å, 50 £", "café, Ã la mode, Å, 50 £"),  # nothing wrong with these
        ("Ａ&nbsp;ﬁne\x00 ‘x’ e\u0301", "A\xa0fine 'x' é"),
        ("<b>&amp;</b>", "<b>&amp;</b>"),  # CLIP's own unescaping comes later
    ],
)
def test_fix_text(damaged, mended):
    assert fix_text(damaged) == mended


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
    sd1, sd2, bert = map(tokenizer, NAMES)
    assert sd1.tokenize("<|startoftext|><|ENDOFTEXT|>") == [49406, 49407]
    assert sd2.tokenize("<start_of_text> <End_Of_Text>") == [49406, 49407]
    assert len(sd1.tokenize("<end_of_text>")) > 1 < len(sd2.tokenize("<|endoftext|>"))
    assert bert.tokenize("[CLS]x[SEP][MASK][PAD][UNK]")[:1] == [101]
    assert bert.tokenize("[SEP] [MASK] [PAD] [UNK]") == [102, 103, 0, 100]
    assert len(bert.tokenize("[mask]")) == 3  # another case is no special token


@pytest.mark.parametrize("name", NAMES)
def test_truncation_keeps_the_end(name):
    ours = tokenizer(name)
    ids = ours.encode("cat " * 100)
    assert len(ids) == 77
    assert ids == [ours.start_id, *ours.tokenize("cat") * 75, ours.end_id]
    placeholders = {"<cat>": range(ours.vocab_size, ours.vocab_size + 3)}
    cut = ours.encode("cat " * 74 + "<cat>", placeholders)  # only the first of three vectors fits
    assert cut[-2:] == [ours.vocab_size, ours.end_id]
    assert len(cut) == 77


@pytest.mark.parametrize("name", NAMES)
def test_placeholders(name):
    ours = tokenizer(name)
    n = ours.vocab_size
    new = {"<cat>": (n, n + 1), "<cat>s": (n + 2,), "S*": (n + 3,), "Wort": (n + 4,)}
    photo, of = ours.tokenize("a photo of"), ours.tokenize("of")
    assert ours.token_ids("a photo of <cat>", new) == [*photo, n, n + 1]
    assert ours.token_ids("a photo of <cat>s", new) == [*photo, n + 2]  # the longest first
    assert ours.token_ids("of<cat><cat>of", new) == [*of, n, n + 1, n, n + 1, *of]
    assert ours.token_ids("S*,S*", new) == [n + 3, *ours.tokenize(","), n + 3]
    assert ours.token_ids("<CAT>", new) == ours.tokenize("<CAT>")  # case matters
    assert ours.token_ids("wort s*", new) == ours.tokenize("wort s*")
    assert ours.token_ids("of Wort, of", new) == [*of, n + 4, *ours.tokenize(", of")]
    assert ours.token_ids("ofWortof", new) == ours.tokenize("ofWortof")  # not inside another word
    assert ours.token_ids("Worts", new) == ours.tokenize("Worts")
    assert ours.token_ids("a photo of", new) == photo
    assert ours.token_ids("&lt;cat&gt;", new) == ours.tokenize("&lt;cat&gt;")


@pytest.mark.parametrize("family, pad", [("sd1", None), ("sd2", 0)])
def test_diffusers_folder(family, pad):
    """640 tokens: two times 256 bytes, the first 126 merges, start and end."""
    folder = GOLDEN / "tiny" / family / "diffusers" / "tokenizer"
    ours = CLIPTokenizer.load(folder, pad_id=pad)
    assert ours.ids == json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert (ours.start_id, ours.end_id, ours.vocab_size) == (638, 639, 640)
    assert ours.pad_id == (639 if pad is None else pad)
    same = CLIPTokenizer.load(folder / "merges.txt"), CLIPTokenizer.load(vocab_size=640)
    for other in same:
        assert other.ids == ours.ids
        assert other.encode("a photo of the cat") == ours.encode("a photo of the cat")
    assert [*ours.ids].index("!") == 0  # what Stable Diffusion 2 pads with


def test_not_a_list_of_merges(tmp_path):
    file = tmp_path / "merges.txt"
    file.write_text("[PAD]\n[UNK]\n")
    with pytest.raises(ValueError, match=r"merges\.txt"):
        CLIPTokenizer.load(file)


def test_loading_is_fast():
    start = time.process_time()
    CLIPTokenizer.load()
    assert time.process_time() - start < 1  # takes 0.1 s


def test_the_first_merge_comes_first():
    """In "aab" it is "a a", so "a b" never gets a chance; in "aaab" the left "a a" is joined."""
    ours = CLIPTokenizer([("a", "a"), ("a", "b</w>"), ("aa", "ab</w>")])
    assert ours.tokenize("ab") == [ours.ids["ab</w>"]]
    assert ours.tokenize("aab") == [ours.ids["aa"], ours.ids["b</w>"]]
    assert ours.tokenize("aaab") == [ours.ids["aaab</w>"]]


def test_a_vocabulary_may_lack_its_last_line_break(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]
    for end in ("", "\n"):
        (tmp_path / "vocab.txt").write_text("\n".join(tokens) + end)
        assert WordPieceTokenizer.load(tmp_path / "vocab.txt").token_ids("cat") == [5]
