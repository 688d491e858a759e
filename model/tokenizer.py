"""Text to token ids: CLIP's byte-level BPE and BERT's WordPiece, in the public checkpoints' vocabulary files.

CLIP (Radford et al., 2021, arXiv 2103.00020; vocab.json + merges.txt) feeds the text towers of Stable Diffusion and of
CLIP. BERT (Devlin et al., 2019, arXiv 1810.04805; vocab.txt) feeds ALIGN. The `tokenizers` library merges the pieces;
this file says which rules it follows, and adds the first, the last and the padding token by hand.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from model.files.config import read_json
from model.files.errors import CheckpointError

# How CLIP cuts a text into words: special tokens, English contractions, letters, single digits, everything else.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class _Tokenizer:
    """What the two have in common: one token in front, one behind, padding to a fixed length."""

    def __init__(self, cutter: Tokenizer, first: str, last: str, pad: str, length: int):
        """`cutter` cuts a text; `first`, `last` and `pad` are tokens of its vocabulary; `length` counts ids."""
        self.cutter, self.length = cutter, length
        self.first_id, self.last_id, self.pad_id = (cutter.token_to_id(token) for token in (first, last, pad))

    def check_fits(self, config: object, network: str) -> None:
        """Raise CheckpointError if the `network` with this config cannot read all ids, or texts of this length."""
        ids, most = max(self.cutter.get_vocab().values()) + 1, config.max_position_embeddings
        if ids > config.vocab_size or self.length > most:
            raise CheckpointError(
                f"the tokenizer has {ids} ids and texts of {self.length} tokens, but {network} reads "
                f"{config.vocab_size} and {most}: they are of different models"
            )

    def tokens(self, text: str) -> list[str]:
        """How the text is cut, without first and last token, and not truncated."""
        return self.cutter.encode(text, add_special_tokens=False).tokens

    def overflow(self, text: str) -> str:
        """The end of the text that does not fit and is not seen by the model: "" if all of it fits."""
        offsets = self.cutter.encode(text, add_special_tokens=False).offsets
        room = self.length - 2
        return text[offsets[room][0] :] if len(offsets) > room else ""

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask (1 for a token, 0 for padding), both int64 (batch, length)."""
        if isinstance(texts, str):  # it would be read letter by letter
            raise TypeError(f"expected a list of texts, not the one text {texts!r}")
        ids = torch.full((len(texts), self.length), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            cut = self.cutter.encode(text, add_special_tokens=False).ids[: self.length - 2]
            ids[row, : len(cut) + 2] = torch.tensor([self.first_id, *cut, self.last_id])
            mask[row, : len(cut) + 2] = 1
        return ids, mask


class CLIPTokenizer(_Tokenizer):
    """Lower-cased byte-level BPE: `<|startoftext|>`, up to 75 tokens, `<|endoftext|>`, padding up to 77.

    Stable Diffusion 1 pads with `<|endoftext|>`, 2 with `!`; the text encoder sees the padding, so it matters. The
    padding token is special: with 2's files, each `!` of a prompt becomes a padding token too, as in its own pipeline.
    """

    @classmethod
    def from_pretrained(cls, folder: Path) -> CLIPTokenizer:
        """Read vocab.json and merges.txt, or the tokenizer.json that transformers 5 writes instead, and, if present,
        the padding token and the length from tokenizer_config.json and special_tokens_map.json (which wins).
        Raises CheckpointError if a file is missing or garbled."""
        folder = Path(folder)
        vocab, merges, described, source = _clip_vocabulary(folder)
        settings = _settings(folder)
        names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        special = [settings.get(name) or names[name] for name in names]
        special = [described.get(entry, entry) if isinstance(entry, str) else entry for entry in special]
        first, last, pad = special = [_added_token(entry) for entry in special]
        _require(vocab, [token.content for token in special], source)

        rules = {"end_of_word_suffix": "</w>", "continuing_subword_prefix": "", "unk_token": last.content}
        try:
            cutter = Tokenizer(models.BPE(vocab, merges, **rules))
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(f"{folder}: the vocabulary and the merges do not fit together: {error}") from None
        cutter.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        cutter.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        cutter.add_special_tokens(special)
        return cls(cutter, first.content, last.content, pad.content, _length(settings, 77))

    def __call__(self, texts: list[str]) -> Tensor:
        """Ids, int64 (batch, length), truncated and padded; the last token of a truncated text stays the end token."""
        return self._encode(texts)[0]


class BertTokenizer(_Tokenizer):
    """WordPiece after BERT's own cleaning (lower case, no accents): `[CLS]`, the text, `[SEP]`, padding up to 64."""

    @classmethod
    def from_pretrained(cls, folder: Path) -> BertTokenizer:
        """Read vocab.txt (the line number is the id) and, if present, the length and the cleaning's switches from
        tokenizer_config.json. Raises CheckpointError if a file is missing or garbled."""
        folder = Path(folder)
        vocab = {token: index for index, token in enumerate(_lines(folder / "vocab.txt"))}
        _require(vocab, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], folder / "vocab.txt")
        settings = _settings(folder)

        cutter = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        cutter.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=_switch(settings, "tokenize_chinese_chars", True),
            strip_accents=_switch(settings, "strip_accents", None),  # None: as the lower-casing
            lowercase=_switch(settings, "do_lower_case", True),
        )
        cutter.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocab]
        cutter.add_special_tokens([_added_token(token) for token in special])
        return cls(cutter, "[CLS]", "[SEP]", "[PAD]", _length(settings, 64))

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask (1 for a token, 0 for padding), both int64 (batch, length), truncated and padded."""
        return self._encode(texts)


def _lines(path: Path) -> list[str]:
    """A text file's lines. Not `splitlines`: a vocabulary may hold Unicode's own line separators."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is {path.parent} a complete checkpoint folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}") from None


def _clip_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, dict], Path]:
    """Tokens and their ids; the pairs to merge, best first; the objects by which tokenizer.json describes special
    tokens, by their texts; the file that holds the tokens."""
    vocab_file, merges_file, added = folder / "vocab.json", folder / "merges.txt", []
    if vocab_file.is_file() or not (folder / "tokenizer.json").is_file():
        vocab = read_json(vocab_file)
        merges = [line for line in _lines(merges_file) if line and not line.startswith("#version")]
    else:
        vocab_file = merges_file = folder / "tokenizer.json"
        content = read_json(vocab_file)
        model, added = content.get("model"), content.get("added_tokens")
        vocab, merges = (model.get(part) if isinstance(model, dict) else None for part in ("vocab", "merges"))
    if not isinstance(vocab, dict) or not all(isinstance(index, int) for index in vocab.values()):
        raise CheckpointError(f"{vocab_file} should map tokens to whole numbers")
    if not isinstance(merges, list) or not all(isinstance(merge, (str, list)) for merge in merges):
        raise CheckpointError(f"{merges_file} should hold a list of merges")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if bad := [" ".join(map(str, pair)) for pair in pairs if [*map(type, pair)] != [str, str]]:
        raise CheckpointError(f"{merges_file} should hold two symbols a line, not {bad[0][:40]!r}")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    described = {entry["content"]: entry for entry in entries if isinstance(entry.get("content"), str)}
    return vocab, pairs, described, vocab_file


def _settings(folder: Path) -> dict:
    """What the folder's optional files say about the tokenizer, the later file over the earlier."""
    files = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    return {name: value for path in files if path.is_file() for name, value in read_json(path).items()}


def _added_token(entry: str | dict) -> AddedToken:
    """A special token, named by its text or described by an object. `normalized`: found whatever its case."""
    entry = {"content": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise CheckpointError(f"a special token should be a text or an object with one, not {entry!r}")
    return AddedToken(entry["content"], normalized=entry.get("normalized") is True, special=True)


def _require(vocab: dict[str, int], tokens: list[str], path: Path) -> None:
    if missing := [token for token in tokens if token not in vocab]:
        raise CheckpointError(f"{path} lacks {', '.join(dict.fromkeys(missing))}")


def _switch(settings: dict, name: str, default: bool | None) -> bool | None:
    if not isinstance(value := settings.get(name), bool | None):
        raise CheckpointError(f"tokenizer_config.json: {name} should be true or false, not {value!r}")
    return default if value is None else value


def _length(settings: dict, default: int) -> int:
    """`model_max_length`; transformers writes an astronomical number where nobody set it."""
    length = settings.get("model_max_length") or default
    if not (isinstance(length, (int, float)) and length >= 3):  # NaN is none either
        raise CheckpointError(
            f"tokenizer_config.json: model_max_length should be a whole number above 2, not {length!r}"
        )
    return default if length > 1_000_000 else int(length)
