"""The λ-Harmonic reward: Eq. 5 of RPO (arXiv 2407.12164).

ALIGN-I is how much an image x looks like the reference photos I_ref, ALIGN-T how well it fits its prompt c. Their
harmonic mean is low if one of them is low: neither a copy of a photo nor a picture of another dog has a high reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.align import ALIGN
from model.tokenizer import BertTokenizer


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(cos + 1) / 2 in [0, 1] of features (..., d) of unit length, broadcast. ALIGN-T of image and text features."""
    cosine = (a * b).sum(-1)  # no matmul: autocast would round it to bf16
    return ((cosine + 1) / 2).clamp(0, 1)  # rounding can give a cosine of 1.0000001


def align_i(x: Tensor, x_ref: Tensor) -> Tensor:
    """ALIGN-I(x, I_ref): the mean over I_ref. x: (n, d), x_ref: (photos, d) image features. Returns (n,)."""
    return similarity(x[:, None], x_ref).mean(1)


def lambda_harmonic(align_i: Tensor, align_t: Tensor, lam: float) -> Tensor:
    """Eq. 5: r = 1 / (λ / ALIGN-I + (1-λ) / ALIGN-T), elementwise, of values in [0, 1] and λ in [0, 1].

    λ = 0 gives exactly ALIGN-T and λ = 1 exactly ALIGN-I. In between, r is 0 if one of them is 0, the limit.
    """
    if lam in (0, 1):  # the formula can be 0/0
        return align_i if lam else align_t
    return 1 / (lam / align_i + (1 - lam) / align_t)  # x/0 is inf and 1/inf is 0


def lambda_arithmetic(align_i: Tensor, align_t: Tensor, lam: float) -> Tensor:
    """r = λ ALIGN-I + (1-λ) ALIGN-T, which the paper compares Eq. 5 with (Table 6)."""
    return lam * align_i + (1 - lam) * align_t


MEANS = {"harmonic": lambda_harmonic, "arithmetic": lambda_arithmetic}


def strip_token(prompt: str, token: str = "[V]") -> str:
    """The prompt without the unique token, which ALIGN does not know: "a [V] dog" becomes "a dog".

    A token of letters is removed only as a whole word: "sks" leaves "asks" alone.
    """
    # \b alone would not do: next to "[" it demands a letter, and matches nothing in "a [V] dog".
    before = r"(?<!\w)" if re.match(r"\w", token[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", token[-1]) else ""
    return " ".join(re.sub(before + re.escape(token) + after, " ", prompt).split())


class Reward:
    """r(x, c; λ, I_ref) for images of one subject. The photos and each text are embedded once.

    photos: the reference photos I_ref, RGB, at least one. token: removed from every prompt. combine: one of MEANS.
    Raises ValueError for another model's tokenizer. All methods raise FloatingPointError if ALIGN's features are not
    finite.
    """

    def __init__(
        self,
        align: ALIGN,
        tokenizer: BertTokenizer,
        photos: list[Image.Image],
        token: str = "[V]",
        combine: Callable[[Tensor, Tensor, float], Tensor] = lambda_harmonic,
    ):
        tokenizer.check_fits(align.config.text_config, "ALIGN")
        self.align, self.tokenizer, self.token, self.combine = align, tokenizer, token, combine
        self.reference_features = self._image_features(photos)  # (photos, d), unit length
        self._text_cache: dict[str, Tensor] = {}  # stripped prompt -> (d,), unit length

    def alignments(self, images: list[Image.Image], prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(ALIGN-I, ALIGN-T) of n RGB images, each with its own prompt: each (n,), fp32, on ALIGN's device."""
        if len(images) != len(prompts):  # one prompt would be broadcast to all images
            raise ValueError(f"each image needs its own prompt: {len(images)} images, {len(prompts)} prompts")
        x, c = self._image_features(images), self._text_features(prompts)
        return align_i(x, self.reference_features), similarity(x, c)

    def of_photos(self, prompts: list[str], lam: float) -> Tensor:
        """r(x_ref, c; λ, I_ref) of every photo with every prompt: (photos, prompts). I_ref includes x_ref itself."""
        x_ref = self.reference_features
        t = similarity(x_ref[:, None], self._text_features(prompts))
        return self.combine(align_i(x_ref, x_ref)[:, None].expand_as(t), t, lam)

    def __call__(self, images: list[Image.Image], prompts: list[str], lam: float) -> Tensor:
        """r(x, c; λ, I_ref) of n RGB images, each with its own prompt: (n,) in [0, 1]."""
        return self.combine(*self.alignments(images, prompts), lam)

    def _image_features(self, images: list[Image.Image]) -> Tensor:
        device = next(self.align.parameters()).device
        return unit_features(self.align.image_features, self.align.preprocess, images, device)

    @torch.no_grad()
    def _text_features(self, prompts: list[str]) -> Tensor:
        texts = [strip_token(prompt, self.token) for prompt in prompts]
        if new := [text for text in dict.fromkeys(texts) if text not in self._text_cache]:
            ids, mask = (tensor.to(self.reference_features.device) for tensor in self.tokenizer(new))
            features = _unit_length(self.align.text_features(ids, mask), self.align)
            self._text_cache.update(zip(new, features, strict=True))
        return torch.stack([self._text_cache[text] for text in texts])


@torch.no_grad()
def unit_features(
    network: Callable[[Tensor], Tensor], prepare: Callable[[list], Tensor], items: list, device: torch.device
) -> Tensor:
    """network(prepare(items)), 16 items at a time, normalized: (n, d) fp32. network: a module, or a module's method.

    Raises FloatingPointError if the features are not finite.
    """
    batches = (prepare(items[i : i + 16]).to(device) for i in range(0, len(items), 16))
    return _unit_length(torch.cat([network(batch) for batch in batches]), getattr(network, "__self__", network))


def _unit_length(features: Tensor, network: object) -> Tensor:
    if not features.isfinite().all():  # a damaged file of weights: every reward would be NaN
        raise FloatingPointError(f"{type(network).__name__}'s features are not finite: its weights are damaged")
    return F.normalize(features.float(), dim=1)
