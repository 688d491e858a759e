"""Reward Preference Optimization: the Bradley-Terry label and the loss (arXiv 2407.12164, section 4).

A pair is a reference photo x_ref and a negative x_gen, drawn by the base model θ₀ for a prompt c. The reward r says how
probable it is that the photo is preferred; a coin with that probability is the label y; the loss pulls the implicit
reward of the trained model θ, which is β times its gain in denoising over θ₀, towards the label.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RPOLoss(NamedTuple):
    """What `rpo_loss` returns. Only the first three carry a gradient."""

    total: Tensor  # scalar: similarity + preference, the value to minimise
    similarity: Tensor  # scalar: mean of ℓ(θ; x_ref)
    preference: Tensor  # scalar: mean of −[y log σ(Δ) + (1−y) log σ(−Δ)]
    margin: Tensor  # (batch,): Δ, detached
    accuracy: Tensor  # scalar in [0, 1], detached: how often the sign of Δ agrees with y; Δ = 0 never does


def preference_probability(r_ref: Tensor | float, r_gen: Tensor | float, tau: float = 1.0) -> Tensor:
    """P(x_ref ≻ x_gen) = σ((r_ref − r_gen) / τ), Bradley-Terry; the paper has τ = 1.

    Both rewards are given the prompt that drew x_gen. Rewards in [0, 1] and τ = 1 keep P within [0.27, 0.73]: labels
    are noisy by design. Raises ValueError if tau is not a positive number.
    """
    _check_positive("tau", tau)
    return torch.sigmoid(torch.as_tensor(r_ref - r_gen) / tau)


def preference_label(p: Tensor, generator: torch.Generator) -> Tensor:
    """y ~ Bernoulli(p), elementwise: 1.0 where the photo is preferred, 0.0 where the negative is.

    Drawn on the generator's device, so that a CPU generator gives the same labels whatever p's device is.
    Raises ValueError if a p is outside [0, 1].
    """
    if not bool(((p >= 0) & (p <= 1)).all()):  # written so that NaN fails too
        raise ValueError("preference_label: every probability must lie in [0, 1]; check the rewards for NaN")
    return torch.bernoulli(p.to(generator.device), generator=generator).to(p.device)


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """ℓ = ‖target − prediction‖², the mean over a sample's elements, in fp32.

    prediction, target: (batch, ...) of one shape; the target is ε, or v for a v-prediction base.
    Returns (batch,). Raises ValueError if the shapes differ, which would broadcast in silence.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"denoising_loss: prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ"
        )
    return (target.float() - prediction.float()).square().flatten(1).mean(1)


def rpo_loss(
    loss_ref: Tensor,
    loss_gen: Tensor,
    base_loss_ref: Tensor,
    base_loss_gen: Tensor,
    label: Tensor,
    beta: float,
    preference_weight: float = 1.0,
) -> RPOLoss:
    """The RPO loss, averaged over the batch.

    loss_ref: (batch,) ℓ(θ; x_ref), instance prompt. loss_gen: (batch,) ℓ(θ; x_gen), the prompt that drew x_gen.
    base_loss_ref, base_loss_gen: (batch,) the same of the frozen θ₀, with the same ε and t; they get no gradient.
    label: (batch,) y in [0, 1], not checked: 1 where the photo is preferred, 0 where the negative is.
    beta: β > 0, how sharp the preference is; 1.0 in the paper.
    preference_weight: of the second term; 1 in the paper, 0 leaves the similarity alone.
    Raises ValueError if the shapes differ, beta is not a positive number, or the weight is negative or not finite.
    """
    _check_positive("beta", beta)
    if not (preference_weight >= 0 and math.isfinite(preference_weight)):
        raise ValueError(f"preference_weight must be a number of at least 0, not {preference_weight}")
    shapes = [tuple(x.shape) for x in (loss_ref, loss_gen, base_loss_ref, base_loss_gen, label)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise ValueError(f"rpo_loss: four losses and the label must all be (batch,), with batch > 0; they are {shapes}")
    y = label.to(loss_ref.dtype)

    gain_ref = base_loss_ref.detach() - loss_ref
    gain_gen = base_loss_gen.detach() - loss_gen
    margin = beta * (gain_ref - gain_gen)

    similarity = loss_ref.mean()
    preference = -(y * F.logsigmoid(margin) + (1 - y) * F.logsigmoid(-margin)).mean()

    margin = margin.detach()
    accuracy = ((margin > 0) & (y == 1) | (margin < 0) & (y == 0)).float().mean()
    # Weight 0 skips the term: 0 x ∞ would be NaN.
    total = similarity + preference_weight * preference if preference_weight else similarity
    return RPOLoss(total, similarity, preference, margin, accuracy)


class RPO:
    """The method as the training loop sees it: which pictures it wants drawn, and the loss of a step.

    beta, preference_weight: as in `rpo_loss`, which raises ValueError for a wrong one.
    """

    drawn, counted_by = "negatives", "images_per_prompt"  # what the base draws first, and the flag that says how many
    needs = ("base_loss_ref", "base_loss_drawn", "label")  # what `loss` is given beside the two denoising losses

    def __init__(self, beta: float = 1.0, preference_weight: float = 1.0):
        self.beta, self.preference_weight = beta, preference_weight

    def drawn_prompts(self, subject, count: int) -> list[str]:
        """What the base model draws before training, a prompt an image: `count` negatives for each training prompt."""
        return [prompt for prompt in subject.training_prompts for _ in range(count)]

    def loss(
        self, loss_ref: Tensor, loss_drawn: Tensor, base_loss_ref: Tensor, base_loss_drawn: Tensor, label: Tensor
    ) -> RPOLoss:
        """loss_ref, loss_drawn: (n,) ℓ(θ) of photos and of negatives; base_...: of θ₀; label: (n,) y."""
        losses = loss_ref, loss_drawn, base_loss_ref, base_loss_drawn
        return rpo_loss(*losses, label, self.beta, self.preference_weight)


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, not {value}")
