"""The tokenizers against transformers' on the same vocabulary files, id for id.

The vocabularies are small and trained here, so that the special tokens have other ids than the public ones.
"""

import functools
import gzip
import hashlib
import importlib.util
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from model.files.errors import CheckpointError
from model.tokenizer import BertTokenizer, CLIPTokenizer
from toy.networks import write_bert_tokenizer, write_clip_tokenizer

CORPUS = [
    "a photo of a dog on the beach",
    "a red [V] backpack with a mountain in the background",
    "the cat's hat isn't here, they're in the café at 10:45!",
    "a dog wearing a santa hat; it's the dog we've seen... wow!! ## 日本語の犬",  # with a merge that starts with #
] * 3

NASTY = [
    "",
    "\t a \n\n dog \r\n",
    "A PHOTO of a [V] Dog",
    "! !! !!! a!b",
    "it's they're I've isn't we'll I'd I'm IT'S 's 't ''s 'x",
    "3.14159 + 2,718 = 10:45 ½ ² Ⅷ",
    "café cafe\u0301 CAFÉ naïve Ångström \u212b",
    "ﬁnance ＡＢＣ ß ẞ İstanbul ǅ",
    "日本語の犬 犬と猫 강아지 สุนัข कुत्ता",
    "🐶🐕‍🦺 👩🏽‍🚀 a🐶b 🇫🇷",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break \u3000wide \ufeffbom",
    "line\u2028separator next\u0085line null\u0000char bell\u0007 \ufffd",
    "<|startoftext|> a dog <|endoftext|> more <|endoftext|><|endoftext|>dog",
    "<|STARTOFTEXT|> <|EndOfText|>",
    "<|startoftext a | > <| endoftext |>",
    "[CLS] a [MASK] [mask] [PAD] [SEP] [UNK] dog",
    "a_b-c/d\\e@f#g$h%i^j&k*l(m)n ##ing ## #a </w> dog</w> \\u0041 \\n",
    "“curly” ‘quotes’ – dash — … &amp; &lt;b&gt;",
    "x" * 300,
    *("dog " * count + "cat" for count in (74, 75, 76)),
]


def random_texts(count):
    """Random mixtures of words, spaces, marks and letters from all over Unicode (no surrogates)."""
    source = random.Random(0)
    ranges = [(32, 127), (160, 384), (0x370, 0x600), (0x4E00, 0x4F00), (0x1F300, 0x1F650), (0, 32), (0x2000, 0x2100)]
    pieces = [*" ".join(CORPUS).split(), " ", "  ", "!", "'s", "[V]", "<|endoftext|>", "[SEP]", "\n"]
    kinds = [pieces, [f"{piece} " for piece in pieces], *([chr(code) for code in range(*each)] for each in ranges)]
    return ["".join(source.choice(source.choice(kinds)) for _ in range(source.randrange(1, 60))) for _ in range(count)]


TEXTS = NASTY + random_texts(400)


def save_clip(folder, normalized=False, **special):
    """vocab.json and merges.txt: 256 byte symbols, the same with `</w>`, some merges, the two special tokens."""
    write_clip_tokenizer([CORPUS] * 7, folder)
    (folder / "special_tokens_map.json").unlink()
    token = {"__type": "AddedToken", "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    start, end = (token | {"content": f"<|{name}|>"} for name in ("startoftext", "endoftext"))
    settings = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
    settings |= {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if special:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def save_bert(folder, **settings):
    """vocab.txt of BERT's shape: special tokens, signs, letters, `##` letters, whole words and endings."""
    write_bert_tokenizer([CORPUS], folder)
    with open(folder / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("\n".join([*"日本語犬ßéı", "##犬", "##ß", "##ing", "##og", "##able", ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    return folder


def differing(folder, texts=TEXTS):
    """The texts of which our ids are not those of transformers."""
    ours, theirs = CLIPTokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ids = ours(texts)
    assert ids.dtype == torch.long and ids.shape == expected.shape
    return [text for text, a, b in zip(texts, ids, expected, strict=True) if not a.equal(b)]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip_equals_transformers(tmp_path, pad, normalized):
    """From vocab.json and merges.txt, from the tokenizer.json that transformers 5 writes, and from an older one."""
    special = {"pad_token": "!"} if pad == "!" else {}  # as in Stable Diffusion 2: only here, and it wins
    old, new = save_clip(tmp_path / "old", normalized, **special), tmp_path / "new"
    assert differing(old) == []
    theirs = transformers.CLIPTokenizer.from_pretrained(old)
    assert theirs.pad_token == pad
    theirs.save_pretrained(new)
    assert not (new / "vocab.json").exists()
    assert differing(new) == []
    content = json.loads((new / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]  # before 2024
    (new / "tokenizer.json").write_text(json.dumps(content))
    assert differing(new) == []
    (new / "tokenizer_config.json").unlink()
    assert CLIPTokenizer.from_pretrained(new).pad_id == theirs.eos_token_id  # CLIP's own


ADDED = ["<cat-toy>", "<Big>", "<s1>", "<s2>"]
WITH_ADDED = ["a <cat-toy> dog", "a<cat-toy>dog", "<CAT-TOY>, <Big> <big> <s1><s2>", "a <s1>  dog! <|endoftext|> x", ""]


def in_added_tokens_json(folder, ids):
    (folder / "added_tokens.json").write_text(json.dumps(ids))


def in_config(folder, ids, **flags):
    in_added_tokens_json(folder, ids)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False} | flags
    config["added_tokens_decoder"] = {str(index): {"content": text, **flags} for text, index in ids.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def in_tokenizer_json(folder, ids, special=False):
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(sorted(ids, key=ids.get), special_tokens=special)
    shutil.rmtree(folder)
    theirs.save_pretrained(folder)


@pytest.mark.parametrize(
    "write",
    [
        in_added_tokens_json,  # transformers 4, as after textual inversion in diffusers
        in_config,
        functools.partial(in_config, normalized=False, lstrip=True, rstrip=True),
        functools.partial(in_config, normalized=False, single_word=True),
        in_tokenizer_json,  # transformers 5
        functools.partial(in_tokenizer_json, special=True),
    ],
)
def test_added_tokens_equal_transformers(tmp_path, write):
    folder = save_clip(tmp_path / "tokenizer", pad_token="!")
    size = len(json.loads((folder / "vocab.json").read_text()))
    write(folder, {text: size + i for i, text in reversed(list(enumerate(ADDED)))})
    assert differing(folder, WITH_ADDED + NASTY) == []
    assert CLIPTokenizer.from_pretrained(folder)(["<s1>"])[0, 1] == size + 2


def test_a_padding_token_may_be_an_added_one(tmp_path):
    folder = save_clip(tmp_path / "tokenizer", pad_token="<pad>")
    size = len(json.loads((folder / "vocab.json").read_text()))
    in_added_tokens_json(folder, {"<pad>": size})
    assert differing(folder, NASTY) == []


def test_clip_special_tokens(tmp_path):
    """`!` is an ordinary token for SD 1 and a padding token, wherever it stands, for SD 2."""
    one = CLIPTokenizer.from_pretrained(save_clip(tmp_path / "one"))
    two = CLIPTokenizer.from_pretrained(save_clip(tmp_path / "two", pad_token="!"))
    assert one.tokens("A [V] Dog!") == ["a</w>", "[</w>", "v</w>", "]</w>", "dog</w>", "!</w>"]
    assert two.tokens("dog!") == ["dog</w>", "!"]
    assert one([]).shape == (0, 77)


@pytest.mark.parametrize(
    "settings", [{}, {"model_max_length": 10**30}, {"do_lower_case": False, "model_max_length": 512}]
)
def test_bert_equals_transformers(tmp_path, settings):
    folder = save_bert(tmp_path / "tokenizer", **settings)
    theirs = transformers.BertTokenizerFast.from_pretrained(folder)
    length = 512 if settings.get("model_max_length") == 512 else 64  # 1e30: nobody set it
    expected = theirs(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids, mask = BertTokenizer.from_pretrained(folder)(TEXTS)
    assert ids.shape == mask.shape == (len(TEXTS), length) and ids.dtype == mask.dtype == torch.long
    wrong = [text for text, a, b in zip(TEXTS, ids, expected.input_ids, strict=True) if not a.equal(b)]
    assert wrong == []
    assert mask.equal(expected.attention_mask)


def test_bert_tokens(tmp_path):
    tokenizer = BertTokenizer.from_pretrained(save_bert(tmp_path / "tokenizer"))
    assert tokenizer.tokens("A [V] Dög, doging 🐶") == ["a", "[", "v", "]", "dog", ",", "dog", "##ing", "[UNK]"]
    assert tokenizer.tokens("[MASK]") == ["[MASK]"]


def test_overflow(tmp_path):
    """The part that does not fit is the exact end of the text, and what is before it gives the same ids."""
    clip = CLIPTokenizer.from_pretrained(save_clip(tmp_path / "clip"))
    bert = BertTokenizer.from_pretrained(save_bert(tmp_path / "bert"))
    assert clip.overflow("Dog " * 75) == "" and bert.overflow("Dog " * 62) == ""
    assert clip.overflow("Dog " * 75 + "CAFÉ  red!") == "CAFÉ  red!"
    assert bert.overflow("Dog " * 62 + "CAFÉ  red!") == "CAFÉ  red!"
    accents = "cafe\u0301 " * 30 + "日本語 " * 30  # normalising shortens the text: positions must be the original's
    for tokenizer in (clip, bert):
        rest = tokenizer.overflow(accents)
        assert rest and accents.endswith(rest)
        kept = tokenizer.tokens(accents[: -len(rest)])
        assert tokenizer.tokens(accents)[: len(kept)] == kept and len(kept) >= tokenizer.length - 2


OTHER_MODEL = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str()


@pytest.mark.parametrize(
    ("save", "name", "content", "message"),
    [
        (save_clip, "vocab.json", None, "vocab.json is missing"),
        (save_clip, "merges.txt", None, "merges.txt cannot be read"),
        (save_clip, "vocab.json", '{"a": 1}', "do not fit together"),
        (save_clip, "merges.txt", "#version: 0.2\nnever seen\n", "do not fit together"),
        (save_clip, "tokenizer_config.json", '{"bos_token": "<s>", "eos_token": "</s>"}', "lacks <s>, </s>"),
        (save_clip, "special_tokens_map.json", '{"pad_token": "<pad>"}', "lacks <pad>"),
        (save_clip, "added_tokens.json", '{"<new>": 9999}', "<new> has the id 9999, should be "),  # else it moves
        (save_bert, "vocab.txt", None, "vocab.txt cannot be read"),
        (save_bert, "vocab.txt", "[PAD]\n[UNK]\n", "lacks [CLS], [SEP]"),
        (Path.mkdir, "tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
        (Path.mkdir, "tokenizer.json", OTHER_MODEL, "lacks <|startoftext|>, <|endoftext|>"),
    ],
)
def test_bad_files(tmp_path, save, name, content, message):
    save(folder := tmp_path / "tokenizer")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        (BertTokenizer if save is save_bert else CLIPTokenizer).from_pretrained(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fits(tmp_path):
    """A network with an id too few, or with too few places, is another tokenizer's."""
    tokenizer = BertTokenizer.from_pretrained(save_bert(tmp_path))
    ids = max(tokenizer.backend.get_vocab().values()) + 1
    tokenizer.check_fits(SimpleNamespace(vocab_size=ids, max_position_embeddings=64), "X")
    for size, most in ((ids - 1, 64), (ids, 63)):
        with pytest.raises(CheckpointError, match=rf"^the tokenizer has {ids} ids .* X reads {size} and {most}:"):
            tokenizer.check_fits(SimpleNamespace(vocab_size=size, max_position_embeddings=most), "X")


# ---------------------------------------------------------------------------------- the public vocabulary, whole


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """CLIP's own vocabulary of 49,408 tokens, from the merges that the package openai-clip ships, as SD 1.x has it."""
    folder = tmp_path_factory.mktemp("public")
    package = Path(importlib.util.find_spec("clip").origin).parent  # found, not imported: that would want torchvision
    packed = (package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(packed).hexdigest().startswith("924691ac288e5440")
    merges = gzip.decompress(packed).decode("utf-8").splitlines()[1:48895]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
    settings = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a [V] dog", [320, 1125, 539, 320, 314, 341, 316, 1929]),
        ("a photo of sks dog", [320, 1125, 539, 48136, 1929]),
        ("hello! world!", [3306, 256, 1002, 256]),
    ],
)
def test_known_ids_of_the_public_vocabulary(public, text, ids):
    tokenizer = CLIPTokenizer.from_pretrained(public)
    assert (tokenizer.first_id, tokenizer.last_id, tokenizer.pad_id) == (49406, 49407, 49407)
    assert tokenizer([text])[0].tolist() == [49406, *ids, *[49407] * (76 - len(ids))]


def test_the_public_vocabulary_cuts_everything_as_transformers_does(public):
    wrong = differing(public, NASTY + random_texts(3000))
    # Published configurations say normalized: true of the special tokens, transformers without one says false.
    assert all("<|STARTOFTEXT|>" in text or "<|EndOfText|>" in text for text in wrong), wrong[:3]


def test_stable_diffusion_2_pads_with_an_exclamation_mark(public, tmp_path):
    """special_tokens_map.json wins over tokenizer_config.json, and every "!" of a prompt becomes the padding too."""
    folder = Path(shutil.copytree(public, tmp_path / "tokenizer"))
    special = json.loads((folder / "special_tokens_map.json").read_text(encoding="utf-8")) | {"pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    ids = CLIPTokenizer.from_pretrained(folder)(["hello! world!"])[0].tolist()
    assert ids == [49406, 3306, 0, 1002, 0, 49407, *[0] * 71]
