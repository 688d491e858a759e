"""The tokenizers against transformers' on the same vocabulary files, id for id.

The vocabularies are small and trained here, so that the special tokens have other ids than the public ones.
"""

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


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip_equals_transformers(tmp_path, pad, normalized):
    special = {"pad_token": "!"} if pad == "!" else {}  # as in Stable Diffusion 2: only here, and it wins
    folder = save_clip(tmp_path / "tokenizer", normalized, **special)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    assert theirs.pad_token == pad
    expected = theirs(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ids = CLIPTokenizer.from_pretrained(folder)(TEXTS)
    assert ids.dtype == torch.long and ids.shape == (len(TEXTS), 77)
    wrong = [text for text, a, b in zip(TEXTS, ids, expected, strict=True) if not a.equal(b)]
    assert wrong == []


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
    with pytest.raises(TypeError, match="list of texts"):
        one("a dog")


@pytest.mark.parametrize("settings", [{}, {"model_max_length": 12}, {"do_lower_case": False, "model_max_length": 512}])
def test_bert_equals_transformers(tmp_path, settings):
    folder = save_bert(tmp_path / "tokenizer", **settings)
    theirs = transformers.BertTokenizerFast.from_pretrained(folder)
    length = settings.get("model_max_length", 64)
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


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("old", [False, True])
def test_clip_from_tokenizer_json(tmp_path, pad, normalized, old):
    """transformers 5 writes tokenizer.json and no vocab.json; files of before 2024 write a merge as one text."""
    special = {"pad_token": "!"} if pad == "!" else {}
    theirs = transformers.CLIPTokenizer.from_pretrained(save_clip(tmp_path / "old", normalized, **special))
    folder = tmp_path / "new"
    theirs.save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
    if old:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ids = CLIPTokenizer.from_pretrained(folder)(TEXTS)
    wrong = [text for text, ours, right in zip(TEXTS, ids, expected, strict=True) if not torch.equal(ours, right)]
    assert not wrong, wrong[:3]
    assert torch.equal(ids, CLIPTokenizer.from_pretrained(tmp_path / "old")(TEXTS))
    (folder / "tokenizer_config.json").unlink()
    assert CLIPTokenizer.from_pretrained(folder).tokens("a dog") == theirs.tokenize("a dog")
    assert CLIPTokenizer.from_pretrained(folder).pad_id == ids.max()  # CLIP's own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "tokenizer.json cannot be read"),
        ({"model": None}, "tokens to whole numbers"),
        ({"model": {"vocab": [["a", 1.0]], "merges": []}}, "tokens to whole numbers"),
        ({"model": {"vocab": {"a": 1}}}, "list of merges"),
        ({"model": {"vocab": {"a": 1}, "merges": 5}}, "list of merges"),
        ({"model": {"vocab": {"a": 1}, "merges": [5]}}, "list of merges"),
        ({"model": {"vocab": {"a": 1}, "merges": [["a", "b", "c"]]}}, "two symbols a line, not 'a b c'"),
        ({"model": {"vocab": {"a": 1}, "merges": [["a", 3]]}}, "two symbols a line, not 'a 3'"),
        (
            {"model": {"vocab": {"a": 1}, "merges": []}, "added_tokens": [5, {"content": []}]},
            "tokenizer.json lacks <|startoftext|>, <|endoftext|>",
        ),
    ],
)
def test_clip_tokenizer_json_errors(tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(CheckpointError) as error:
        CLIPTokenizer.from_pretrained(tmp_path)
    assert message in str(error.value) and "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


def test_length_unset(tmp_path):
    """transformers writes 1e30 for "nobody said"."""
    folder = save_bert(tmp_path / "bert", model_max_length=1000000000000000019884624838656)
    assert BertTokenizer.from_pretrained(folder).length == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "vocab.json is missing"),
        ("merges.txt", None, "merges.txt is missing"),
        ("vocab.json", "{", "vocab.json cannot be read"),
        ("vocab.json", "[1]", "vocab.json should hold"),
        ("vocab.json", '{"a": "b"}', "whole numbers"),
        ("vocab.json", '{"a": 1}', "lacks <|startoftext|>, <|endoftext|>"),
        ("merges.txt", "#version: 0.2\na b c\n", "two symbols a line, not 'a b c'"),
        ("merges.txt", "#version: 0.2\nnever seen\n", "do not fit together"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "lacks <pad>"),
        ("special_tokens_map.json", '{"pad_token": 3}', "special token"),
        ("tokenizer_config.json", '{"model_max_length": "long"}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length"),
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


@pytest.mark.parametrize("name", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
@pytest.mark.parametrize("value", ["yes", 1])
def test_bert_switches_are_true_or_false(tmp_path, name, value):
    with pytest.raises(
        CheckpointError, match=f"^tokenizer_config.json: {name} should be true or false, not {value!r}$"
    ):
        BertTokenizer.from_pretrained(save_bert(tmp_path, **{name: value}))
    for plain in (None, True):  # null means the default
        assert BertTokenizer.from_pretrained(save_bert(tmp_path, **{name: plain})).tokens("Dög") == ["dog"]


def test_fits(tmp_path):
    """A network with an id too few, or with too few places, is another tokenizer's."""
    for tokenizer in (
        CLIPTokenizer.from_pretrained(save_clip(tmp_path / "clip")),
        BertTokenizer.from_pretrained(save_bert(tmp_path / "bert")),
    ):
        ids, length = max(tokenizer.cutter.get_vocab().values()) + 1, tokenizer.length
        tokenizer.check_fits(SimpleNamespace(vocab_size=ids, max_position_embeddings=length), "X")
        for less in ((ids - 1, length), (ids, length - 1)):
            config = SimpleNamespace(vocab_size=less[0], max_position_embeddings=less[1])
            with pytest.raises(
                CheckpointError, match=rf"^the tokenizer has {ids} ids .* X reads {less[0]} and {less[1]}:"
            ):
                tokenizer.check_fits(config, "X")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "vocab.txt is missing"), (b"[PAD]\n[UNK]\n", "lacks [CLS], [SEP]"), (b"\xff\xfe\x00", "cannot be read")],
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
    ours, theirs = CLIPTokenizer.from_pretrained(public), transformers.CLIPTokenizer.from_pretrained(public)
    texts = NASTY + random_texts(3000)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    found = ours(texts)
    wrong = [text for text, one, other in zip(texts, found, expected, strict=True) if not torch.equal(one, other)]
    # Published configurations say normalized: true of the special tokens, transformers without one says false.
    assert all("<|STARTOFTEXT|>" in text or "<|EndOfText|>" in text for text in wrong), wrong[:3]


def test_stable_diffusion_2_pads_with_an_exclamation_mark(public, tmp_path):
    """special_tokens_map.json wins over tokenizer_config.json, and every "!" of a prompt becomes the padding too."""
    folder = Path(shutil.copytree(public, tmp_path / "tokenizer"))
    special = json.loads((folder / "special_tokens_map.json").read_text(encoding="utf-8")) | {"pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    ids = CLIPTokenizer.from_pretrained(folder)(["hello! world!"])[0].tolist()
    assert ids == [49406, 3306, 0, 1002, 0, 49407, *[0] * 71]
