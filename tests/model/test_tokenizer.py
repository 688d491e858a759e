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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from model.files.errors import CheckpointError
from model.tokenizer import BertTokenizer, CLIPTokenizer

CORPUS = [
    "a photo of a dog on the beach",
    "a red [V] backpack with a mountain in the background",
    "the cat's hat isn't here, they're in the café at 10:45!",
    "a dog wearing a santa hat; it's the dog we've seen... wow!! 日本語の犬",
] * 3

NASTY = [
    "",
    " ",
    "\t a \n\n dog \r\n",
    "a photo of a [V] dog",
    "A PHOTO of a Dog",
    "hello! world!",
    "! !! !!! a!b",
    "it's they're I've isn't we'll I'd I'm IT'S",
    "'s 't ''s 'x",
    "3.14159 + 2,718 = 10:45 ½ ² Ⅷ",
    "café cafe\u0301 CAFÉ naïve Ångström \u212b",
    "ﬁnance ＡＢＣ ß ẞ İstanbul ǅ",
    "日本語の犬 犬と猫 강아지 สุนัข कुत्ता",
    "🐶🐕‍🦺 👩🏽‍🚀 a🐶b 🇫🇷",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break \u3000wide \ufeffbom",
    "line\u2028separator next\u0085line null\u0000char bell\u0007 \ufffd",
    "<|startoftext|> a dog <|endoftext|> more",
    "<|startoftext|><|endoftext|><|endoftext|>dog",
    "<|STARTOFTEXT|> <|EndOfText|>",
    "<|startoftext a | > <| endoftext |>",
    "[CLS] a [MASK] [mask] [PAD] [SEP] [UNK] dog",
    "a_b-c/d\\e@f#g$h%i^j&k*l(m)n",
    "“curly” ‘quotes’ – dash — … &amp; &lt;b&gt;",
    "x" * 300,
    "supercalifragilisticexpialidocious " * 40,
    "!" * 200,
    "dog " * 74 + "cat",
    "dog " * 75 + "cat",
    "dog " * 76 + "cat",
    "##ing ## #a",
    "</w> dog</w>",
    "\\u0041 \\n",
]


def random_texts(count: int) -> list[str]:
    """Random mixtures of words, spaces, marks and letters from all over Unicode (no surrogates)."""
    source = random.Random(0)
    ranges = [(32, 127), (160, 384), (0x370, 0x600), (0x4E00, 0x4F00), (0x1F300, 0x1F650), (0, 32), (0x2000, 0x2100)]
    pieces = [*" ".join(CORPUS).split(), " ", "  ", "!", "'s", "[V]", "<|endoftext|>", "[SEP]", "\n"]

    def piece() -> str:
        if source.random() < 0.6:
            return source.choice(pieces) + source.choice([" ", "", " "])
        return "".join(chr(source.randrange(*source.choice(ranges))) for _ in range(source.randrange(1, 6)))

    return ["".join(piece() for _ in range(source.randrange(1, 40))) for _ in range(count)]


TEXTS = NASTY + random_texts(400)


def save_clip(folder, normalized=False, **special):
    """vocab.json and merges.txt: 256 byte symbols, the same with `</w>`, some merges, the two special tokens."""
    folder.mkdir(exist_ok=True)
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trainer = trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False, min_frequency=2)
    trained.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)])
    tokens = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    assert len(merges) > 50

    def token(text):
        flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": text, **flags}

    settings = {"bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"), "model_max_length": 77}
    settings["pad_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "unk_token": token("<|endoftext|>"), **settings})
    )
    if special:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def save_bert(folder, **settings):
    """vocab.txt of BERT's shape: special tokens in odd places, letters, `##` letters, whole words and endings."""
    folder.mkdir(exist_ok=True)
    words = sorted({word for text in CORPUS for word in text.lower().replace("'", " ").split() if word.isalpha()})
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()] + list("日本語犬ßéı")
    tokens = ["[PAD]", "[unused0]", *letters, *("##" + letter for letter in letters), "[UNK]", "[CLS]", "[SEP]"]
    tokens = [*tokens, "[MASK]", *words, "##ing", "##og", "##able"]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    if settings:
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
    assert CLIPTokenizer.from_pretrained(folder).pad_id == size


def test_an_added_token_whose_id_cannot_be_kept_is_refused(tmp_path):
    """transformers gives it the next id without a word, and the text encoder reads another embedding."""
    folder = save_clip(tmp_path / "tokenizer")
    size = len(json.loads((folder / "vocab.json").read_text()))
    in_added_tokens_json(folder, {"<cat-toy>": size + 5})
    with pytest.raises(CheckpointError, match=f"^[^\n]*<cat-toy> has the id {size + 5}, should be {size}$"):
        CLIPTokenizer.from_pretrained(folder)


def test_clip_special_tokens(tmp_path):
    """`!` is an ordinary token for SD 1 and a padding token, wherever it stands, for SD 2."""
    one = CLIPTokenizer.from_pretrained(save_clip(tmp_path / "one"))
    two = CLIPTokenizer.from_pretrained(save_clip(tmp_path / "two", pad_token="!"))
    vocab = json.loads((tmp_path / "one" / "vocab.json").read_text())
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert one([""])[0].tolist() == [start] + [end] * 76
    assert two([""])[0].tolist() == [start, end] + [vocab["!"]] * 75
    assert one.tokens("dog!") == ["dog</w>", "!</w>"]
    assert two.tokens("dog!") == ["dog</w>", "!"]
    assert one.tokens("A [V] Dog") == ["a</w>", "[</w>", "v</w>", "]</w>", "dog</w>"]
    assert one([]).shape == (0, 77)
    assert one(["dog " * 200])[0, -1] == end


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


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"vocab": {"a": 1}}}'])
def test_a_broken_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^[^\n]*tokenizer\.json is no tokenizer[^\n]*$"):
        CLIPTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_json_of_another_model(tmp_path):
    Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"lacks <\|startoftext\|>, <\|endoftext\|>$"):
        CLIPTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "vocab.json is missing"),
        ("merges.txt", None, "merges.txt cannot be read"),
        ("vocab.json", "{", "vocab.json cannot be read"),
        ("vocab.json", "[1]", "vocab.json should hold"),
        ("vocab.json", '{"a": 1}', "do not fit together"),
        ("merges.txt", "#version: 0.2\nnever seen\n", "do not fit together"),
        ("tokenizer_config.json", '{"bos_token": "<s>", "eos_token": "</s>"}', "lacks <s>, </s>"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "lacks <pad>"),
    ],
)
def test_clip_errors(tmp_path, name, content, message):
    folder = save_clip(tmp_path / "tokenizer")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        CLIPTokenizer.from_pretrained(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fits(tmp_path):
    """A network with an id too few, or with too few places, is another tokenizer's."""
    for tokenizer in (
        CLIPTokenizer.from_pretrained(save_clip(tmp_path / "clip")),
        BertTokenizer.from_pretrained(save_bert(tmp_path / "bert")),
    ):
        ids, length = max(tokenizer.cutter.get_vocab().values()) + 1, tokenizer.length
        tokenizer.check_fits(SimpleNamespace(vocab_size=ids, max_position_embeddings=length), "X")
        for size, most in ((ids - 1, length), (ids, length - 1)):
            with pytest.raises(CheckpointError, match=rf"^the tokenizer has {ids} ids .* X reads {size} and {most}:"):
                tokenizer.check_fits(SimpleNamespace(vocab_size=size, max_position_embeddings=most), "X")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "vocab.txt cannot be read"),
        (b"[PAD]\n[UNK]\n", "lacks [CLS], [SEP]"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bert_errors(tmp_path, content, message):
    folder = save_bert(tmp_path / "tokenizer")
    (folder / "vocab.txt").unlink()
    if content is not None:
        (folder / "vocab.txt").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        BertTokenizer.from_pretrained(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


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
