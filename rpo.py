"""Reward Preference Optimization: the label and the loss (arXiv 2407.12164, Eq. 6 to 8).

A pair is a reference photo x_ref and a negative x_gen, which the frozen base model θ₀ drew for a prompt c_mod. The
photo's own prompt is c, "a photo of [V] dog". The rewards of the two pictures give the probability P that the photo is
preferred; a coin with that probability is the label y. L_sim learns the photo under c. L_pref is the cross-entropy of y
and σ(Δ); Δ compares how much the trained model θ has improved over θ₀ on the photo and on the negative, under c_mod.

ℓ(θ; x, prompt) is the denoising loss of θ on the noisy latents x_t of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RPOLoss(NamedTuple):
    """What `rpo_loss` returns. Only the first three carry a gradient."""

    total: Tensor  # scalar: similarity + preference, weighted, the value to minimise
    similarity: Tensor  # scalar: Eq. 7, the mean of ℓ(θ; x_ref, c)
    preference: Tensor  # scalar: Eq. 8, the mean of -[y log σ(Δ) + (1-y) log σ(-Δ)]
    margin: Tensor  # (batch,): Δ, detached
    accuracy: Tensor  # scalar in [0, 1], detached: how often the sign of Δ agrees with y; Δ = 0 never agrees


def preference_probability(r_ref: Tensor, r_gen: Tensor) -> Tensor:
    """Eq. 6, Bradley-Terry: P(x_ref ≻ x_gen) = exp r_ref / (exp r_ref + exp r_gen) = σ(r_ref - r_gen).

    r_ref, r_gen: rewards in [0, 1], both for the negative's prompt c_mod; shapes that broadcast. P is then in
    [0.27, 0.73]: labels are noisy by design.
    """
    return torch.sigmoid(r_ref - r_gen)


def preference_label(p: Tensor, generator: torch.Generator) -> Tensor:
    """y ~ Bernoulli(p), elementwise: 1.0 where the photo is preferred, 0.0 where the negative is.

    p: in [0, 1], on the generator's device.
    """
    return torch.bernoulli(p, generator=generator)


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """ℓ = ‖target - prediction‖², the mean over a sample's elements, in fp32.

    prediction, target: (batch, ...) of one shape; the target is ε, or v for a v-prediction base. Returns (batch,).
    """
    return (target.float() - prediction.float()).square().flatten(1).mean(1)


def rpo_loss(
    similarity: Tensor,
    ref: Tensor,
    gen: Tensor,
    base_ref: Tensor,
    base_gen: Tensor,
    label: Tensor,
    beta: float = 1.0,
    similarity_weight: float = 1.0,
    preference_weight: float = 1.0,
) -> RPOLoss:
    """L = L_sim + L_pref (Eq. 7 and 8), averaged over the batch. Every argument but the last three is (batch,).

    similarity: ℓ(θ; x_ref, c). ref, gen: ℓ(θ; x_ref, c_mod) and ℓ(θ; x_gen, c_mod). base_ref, base_gen: the same two
    of θ₀, from the same x_t; they get no gradient. label: y, 1 where the photo is preferred, 0 where the negative is.
    beta: β > 0, how sharp the preference is. The weights are of L_sim and L_pref. All three are 1 in the paper.
    """
    gain_ref = base_ref.detach() - ref
    gain_gen = base_gen.detach() - gen
    margin = beta * (gain_ref - gain_gen)

    l_sim = similarity.mean()
    l_pref = -(label * F.logsigmoid(margin) + (1 - label) * F.logsigmoid(-margin)).mean()

    margin = margin.detach()
    accuracy = ((margin > 0) & (label == 1) | (margin < 0) & (label == 0)).float().mean()
    total = similarity_weight * l_sim + preference_weight * l_pref
    return RPOLoss(total, l_sim, l_pref, margin, accuracy)
