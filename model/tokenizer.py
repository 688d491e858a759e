"""Text to token ids: CLIP's byte-level BPE and BERT's WordPiece, from the public checkpoints' vocabulary files.

CLIP's (arXiv 2103.00020; vocab.json + merges.txt) feeds the text towers of Stable Diffusion and of CLIP, BERT's (arXiv
1810.04805; vocab.txt) feeds ALIGN. The `tokenizers` library merges the pieces; this file gives it the rules, and adds
the first, the last and the padding token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor

from model.files.config import read_json
from model.files.errors import CheckpointError, error_context

# How CLIP splits a text into words: special tokens, English contractions, letters, single digits, everything else.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class _Tokenizer:
    """The common part: one token in front, one behind, padding to a fixed length."""

    def __init__(self, backend: Tokenizer, first: str, last: str, pad: str, length: int):
        """`backend` splits a text; `first`, `last` and `pad` are tokens of its vocabulary; `length` counts ids."""
        self.backend, self.length = backend, length
        self.first_id, self.last_id, self.pad_id = (backend.token_to_id(token) for token in (first, last, pad))

    def check_fits(self, config: object, network: str) -> None:
        """Raise CheckpointError if the `network` with this config cannot read all ids, or texts of this length."""
        ids, most = max(self.backend.get_vocab().values()) + 1, config.max_position_embeddings
        if ids > config.vocab_size or self.length > most:
            ours = f"the tokenizer has {ids} ids and texts of {self.length} tokens"
            raise CheckpointError(f"{ours}, but {network} reads {config.vocab_size} and {most}: use its own tokenizer")

    def tokens(self, text: str) -> list[str]:
        """The tokens of a text, without the first and the last one, and not truncated."""
        return self.backend.encode(text, add_special_tokens=False).tokens

    def overflow(self, text: str) -> str:
        """The end of the text that does not fit, which the model does not see: "" if all of it fits."""
        cut = self.backend.encode(text, add_special_tokens=False).offsets[self.length - 2 :]
        return text[cut[0][0] :] if cut else ""

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask (1 for a token, 0 for padding), both int64 (batch, length)."""
        ids = torch.full((len(texts), self.length), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            cut = self.backend.encode(text, add_special_tokens=False).ids[: self.length - 2]
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
        added tokens, the padding token and the length. Raises CheckpointError if a file is missing or broken."""
        settings = _optional_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:  # else that describes them
            settings |= _optional_json(folder / "special_tokens_map.json")
        names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        special = [_added_token(settings.get(name) or default, special=True) for name, default in names.items()]
        first, last, pad = (token.content for token in special)
        if (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
            with error_context(f"{folder / 'tokenizer.json'} is no tokenizer"):
                backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
            backend.no_padding()
            backend.no_truncation()
            _require([first, last, pad], backend.get_vocab(), folder)
        else:
            backend = _clip_tokenizer(folder, unknown=last)
            _add_tokens(backend, special, folder, settings)
        return cls(backend, first, last, pad, _length(settings, 77))

    def __call__(self, texts: list[str]) -> Tensor:
        """Ids, int64 (batch, length), truncated and padded."""
        return self._encode(texts)[0]


class BertTokenizer(_Tokenizer):
    """WordPiece after BERT's own cleaning (lower case, no accents): `[CLS]`, the text, `[SEP]`, padding up to 64."""

    @classmethod
    def from_pretrained(cls, folder: Path) -> BertTokenizer:
        """Read vocab.txt (the line number is the id) and, if present, tokenizer_config.json.
        Raises CheckpointError if a file is missing or broken."""
        vocab = {token: index for index, token in enumerate(_lines(folder / "vocab.txt"))}
        _require(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], vocab, folder)
        settings = _optional_json(folder / "tokenizer_config.json")
        backend = BertWordPieceTokenizer(vocab, lowercase=settings.get("do_lower_case", True))
        return cls(backend, "[CLS]", "[SEP]", "[PAD]", _length(settings, 64))

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask (1 for a token, 0 for padding), both int64 (batch, length), truncated and padded."""
        return self._encode(texts)


def _lines(path: Path) -> list[str]:
    """A text file's lines. Not `splitlines`: a vocabulary may hold Unicode's own line separators."""
    with error_context(f"{path} cannot be read as text"):
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _optional_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _clip_tokenizer(folder: Path, unknown: str) -> Tokenizer:
    """CLIP's rules with the tokens of vocab.json and the pairs to merge of merges.txt, best first."""
    vocab, lines = read_json(folder / "vocab.json"), _lines(folder / "merges.txt")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    rules = {"end_of_word_suffix": "</w>", "continuing_subword_prefix": "", "unk_token": unknown}
    with error_context(f"{folder}: the vocabulary and the merges do not fit together"):
        backend = Tokenizer(models.BPE(vocab, merges, **rules))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _add_tokens(backend: Tokenizer, special: list[AddedToken], folder: Path, settings: dict) -> None:
    """Add the tokens that are not in the vocabulary, such as <cat-toy>, and mark the special ones."""
    entries = settings.get("added_tokens_decoder")
    if entries is None:
        entries = {index: token for token, index in _optional_json(folder / "added_tokens.json").items()}
    names = [token.content for token in special]
    added = {int(index): _added_token(entry, special=entry in names) for index, entry in entries.items()}
    for index, token in sorted(added.items()):
        backend.add_tokens([token])
        if (found := backend.token_to_id(token.content)) != index:
            raise CheckpointError(f"{folder}: the added token {token.content} has the id {index}, should be {found}")
    _require(names, backend.get_vocab(), folder)
    known = {token.content for token in added.values()}  # adding them again would replace their flags
    backend.add_special_tokens([token for token in special if token.content not in known])


def _added_token(entry: str | dict, special: bool) -> AddedToken:
    """A token given by its text or by an object. `normalized`: it is searched in the lower-cased text."""
    entry = {"content": entry} if isinstance(entry, str) else entry
    flags = {name: entry[name] for name in ("lstrip", "rstrip", "single_word") if name in entry}
    return AddedToken(entry["content"], normalized=entry.get("normalized", not special), **flags)


def _require(tokens: list[str], vocab: dict[str, int], folder: Path) -> None:
    if missing := [token for token in dict.fromkeys(tokens) if token not in vocab]:
        raise CheckpointError(f"the vocabulary in {folder} lacks {', '.join(missing)}")


def _length(settings: dict, default: int) -> int:
    """`model_max_length`; transformers writes 1e30 where nobody set it."""
    length = settings.get("model_max_length") or default
    return default if length > 1_000_000 else int(length)
