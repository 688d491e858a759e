"""The λ-Harmonic reward: ALIGN-I, ALIGN-T and their weighted harmonic mean (arXiv 2407.12164, section 4).

ALIGN-I says how much a picture looks like the reference photos, ALIGN-T how well it fits its prompt. The harmonic mean
is low when either is, so that neither a copied photo nor a stranger's portrait gets a high reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from model.align import ALIGN
    from model.tokenizer import BertTokenizer


def lambda_harmonic(image_alignment: Tensor, text_alignment: Tensor, lam: float) -> Tensor:
    """r = 1 / (λ / ALIGN-I + (1−λ) / ALIGN-T), elementwise, of alignments in [0, 1].

    λ = 0 is exactly the text alignment and λ = 1 exactly the image alignment, whatever the other is. In between,
    an alignment of 0 makes the reward 0, the limit. Raises ValueError if lam is outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam (λ) must lie in [0, 1], not {lam}")
    if lam == 0:  # at the ends the formula would be 0/0 where the ignored alignment is 0
        return text_alignment
    if lam == 1:
        return image_alignment
    return 1 / (lam / image_alignment + (1 - lam) / text_alignment)  # x/0 is inf and 1/inf is 0


def lambda_arithmetic(image_alignment: Tensor, text_alignment: Tensor, lam: float) -> Tensor:
    """λ ALIGN-I + (1−λ) ALIGN-T, what the paper compares the harmonic mean with. Raises ValueError as that does."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam (λ) must lie in [0, 1], not {lam}")
    return lam * image_alignment + (1 - lam) * text_alignment


MEANS = {"harmonic": lambda_harmonic, "arithmetic": lambda_arithmetic}


def strip_token(prompt: str, token: str = "[V]") -> str:
    """The text that is scored: the prompt without the unique token, which means nothing to ALIGN.

    "a [V] dog in the snow" becomes "a dog in the snow". A token of letters goes only where it is a word of its own, so
    that "sks" leaves "asks" alone. Raises ValueError if the token is empty.
    """
    if not token.strip():
        raise ValueError("the unique token must not be empty")
    token = token.strip()
    # Brackets bound themselves: \b beside "[" would demand a letter there, and match nothing in "a [V] dog".
    before = r"(?<!\w)" if re.match(r"\w", token[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", token[-1]) else ""
    return " ".join(re.sub(before + re.escape(token) + after, " ", prompt).split())


class Reward:
    """ALIGN's reward for pictures of one subject. The photos are embedded once, here; each text once, when first seen.

    align: an ALIGN in eval mode; its device is where the work is done. photos: the reference photos, RGB PIL images.
    token: the unique token, taken out of every prompt. combine: one of MEANS. Raises ValueError if there are no photos,
    or if the tokenizer is another model's (a CheckpointError), and as whatever embeds something FloatingPointError if
    the features are not finite.
    """

    def __init__(
        self,
        align: ALIGN,
        tokenizer: BertTokenizer,
        photos: list[Image.Image],
        token: str = "[V]",
        combine: Callable[[Tensor, Tensor, float], Tensor] = lambda_harmonic,
    ):
        if not photos:
            raise ValueError("the reward needs at least one reference photo")
        tokenizer.check_fits(align.config.text_config, "ALIGN")
        self.align, self.tokenizer, self.token, self.combine = align, tokenizer, token, combine
        self.reference_features = self._image_features(photos)  # (photos, features), unit length
        self._text_cache: dict[str, Tensor] = {}  # stripped prompt -> (features,), unit length

    def alignments(self, images: list[Image.Image], prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(ALIGN-I, ALIGN-T), each (n,) fp32 in [0, 1] on the model's device: cosines s mapped to (s+1)/2.

        images: n RGB PIL images. prompts: n, each picture's own. ALIGN-I is the mean over the reference photos.
        Raises ValueError if there are not as many prompts as images.
        """
        if len(images) != len(prompts):
            raise ValueError(f"each image needs its own prompt: {len(images)} images, {len(prompts)} prompts")
        if not images:
            empty = self.reference_features.new_zeros(0)
            return empty, empty.clone()
        image = self._image_features(images)
        text = self._text_features(prompts)
        # Products and sums, not a matmul, which a surrounding autocast would round to bf16.
        align_i = _to_unit((image[:, None] * self.reference_features).sum(2)).mean(1)
        align_t = _to_unit((image * text).sum(1))
        return align_i, align_t

    def of_photos(self, prompts: list[str], lam: float) -> Tensor:
        """r(x_ref, c; λ) of every reference photo with every prompt: (photos, prompts). Embeds no photo again.

        A photo's ALIGN-I is to all of them, itself included.
        """
        photos, text = self.reference_features, self._text_features(prompts)
        align_i = _to_unit((photos[:, None] * photos).sum(2)).mean(1, keepdim=True)
        align_t = _to_unit((photos[:, None] * text).sum(2))
        return self.combine(align_i.expand_as(align_t), align_t, lam)

    def __call__(self, images: list[Image.Image], prompts: list[str], lam: float) -> Tensor:
        """r(x, c; λ, I_ref) of each image with its own prompt: (n,) in [0, 1]. Raises ValueError, as the parts do."""
        return self.combine(*self.alignments(images, prompts), lam)

    def _image_features(self, images: list[Image.Image]) -> Tensor:
        device = next(self.align.parameters()).device
        return unit_features(self.align.image_features, self.align.preprocess, images, device)

    @torch.no_grad()
    def _text_features(self, prompts: list[str]) -> Tensor:
        texts = [strip_token(prompt, self.token) for prompt in prompts]
        if new := [text for text in dict.fromkeys(texts) if text not in self._text_cache]:
            ids, mask = (tensor.to(self.reference_features.device) for tensor in self.tokenizer(new))
            features = self.align.text_features(ids, mask)
            self._text_cache.update(zip(new, _unit_length(features, self.align), strict=True))
        return torch.stack([self._text_cache[text] for text in texts])


@torch.no_grad()
def unit_features(
    network: Callable[[Tensor], Tensor], prepare: Callable[[list], Tensor], items: list, device: torch.device
) -> Tensor:
    """(n, width) of length 1, in fp32: the network's of what `prepare` makes of the items, 16 at a time.

    `network` is a module or its method. Raises FloatingPointError, naming its class, if the features are not finite.
    """
    parts = (prepare(items[i : i + 16]).to(device) for i in range(0, len(items), 16))
    return _unit_length(torch.cat([network(part) for part in parts]), getattr(network, "__self__", network))


def _unit_length(features: Tensor, owner: object) -> Tensor:
    """Features (n, width) of length 1, in fp32."""
    if not features.isfinite().all():
        raise FloatingPointError(f"{type(owner).__name__}'s features are not finite: its weights are damaged")
    return F.normalize(features.float(), dim=1)


def _to_unit(cosine: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]; rounding can carry a cosine a hair outside, hence the clamp."""
    return ((cosine + 1) / 2).clamp(0, 1)
