"""DreamBooth: learn the photos, and keep the class as it was (arXiv 2208.12242, section 3.3; CVPR 2023).

The photos are trained under `a photo of [V] dog`. So that the class does not shrink to this one dog, the base model
first draws images of it, `a photo of a dog`, and θ goes on learning these beside the photos: prior preservation.

The paper's loss (its "class-specific prior preservation loss") measures x̂_0 - x_0 with a weight for each t; as usual
for Stable Diffusion we measure ε (or v) without one, as rpo.py does. Numbers: weight 1 and about 1,000 steps in the
paper, 200 x N class images for N photos; public recipes for Stable Diffusion say 200 to 300 images. The paper trains
the text encoder too where that helps; here, as in all we compare, only the U-Net is trained. (The section and the
numbers are from the paper as others quote it; we could not open its text, so no equation number is given.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class DreamBoothLoss(NamedTuple):
    """What `dreambooth_loss` returns: scalars, all with a gradient."""

    total: Tensor  # similarity + weight x prior, the value to minimise
    similarity: Tensor  # mean of ℓ(θ; x_ref)
    prior: Tensor  # mean of ℓ(θ; x_class), before the weight


def dreambooth_loss(loss_ref: Tensor, loss_class: Tensor, prior_weight: float = 1.0) -> DreamBoothLoss:
    """ℓ(θ; x_ref) + w ℓ(θ; x_class), averaged over the batch.

    loss_ref: (n,) denoising losses of photos, instance prompt. loss_class: (n,) of class images, class prompt; whether
    the two share ε and t changes the variance of the gradient, not its expectation (the paper draws them apart).
    prior_weight: w >= 0; 1 in the paper, 0 leaves the similarity alone.
    Raises ValueError if the shapes differ or the weight is negative or not finite.
    """
    if loss_ref.shape != loss_class.shape or loss_ref.ndim != 1 or len(loss_ref) == 0:
        shapes = f"{tuple(loss_ref.shape)} and {tuple(loss_class.shape)}"
        raise ValueError(f"dreambooth_loss: both losses must be (batch,), with batch > 0; they are {shapes}")
    if not (prior_weight >= 0 and math.isfinite(prior_weight)):
        raise ValueError(f"dreambooth_loss: the prior's weight must be a number of at least 0, not {prior_weight}")
    similarity, prior = loss_ref.mean(), loss_class.mean()
    # Weight 0 skips the term: 0 x ∞ would be NaN.
    total = similarity + prior_weight * prior if prior_weight else similarity
    return DreamBoothLoss(total, similarity, prior)


class DreamBooth:
    """The method as the training loop sees it: which images it wants drawn, and the loss of a step."""

    drawn, counted_by = "class images", "class_images"  # what the base draws first, and the flag that says how many
    needs = ()  # beside the two denoising losses

    def __init__(self, prior_weight: float = 1.0):
        self.prior_weight = prior_weight

    def drawn_prompts(self, subject, count: int) -> list[str]:
        """What the base model draws before training, a prompt an image: `count` class images."""
        return [subject.class_prompt] * count

    def loss(self, loss_ref: Tensor, loss_drawn: Tensor) -> DreamBoothLoss:
        """loss_ref, loss_drawn: (n,) ℓ of photos and of class images."""
        return dreambooth_loss(loss_ref, loss_drawn, self.prior_weight)
