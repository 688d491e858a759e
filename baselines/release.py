"""RPO with the loss of the authors' released code (github.com/andrew-miao/RPO, commit d351ad5), for comparison.

    python -m baselines release --subject data/dog

It differs from the paper's Eq. 8 in two ways: inside L_pref the photo has the instance prompt c, so that its loss there
is that of L_sim again, and photo and negative have their own t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rpo import preference_label
from support.randomness import step_generator
from train import RPO, RPOSettings, latents


class ReleaseBatch(NamedTuple):
    """As train.Batch, with a t for each picture."""

    x_ref: Tensor
    x_gen: Tensor
    eps_ref: Tensor
    eps_gen: Tensor
    t_ref: Tensor
    t_gen: Tensor
    c: Tensor
    c_mod: Tensor
    p: Tensor
    label: Tensor


@dataclass(frozen=True)
class ReleaseSettings(RPOSettings):
    pictures_a_pair: ClassVar[int] = 2


class Release(RPO):
    Settings = ReleaseSettings
    result = "release.safetensors"

    def batch(self, step: int) -> ReleaseBatch:
        """Photo i, negative j, a coin for the label; each picture its own t and ε."""
        draws, n = step_generator(self.settings.seed, step), self.settings.batch
        i = torch.randint(len(self.photos), (n,), generator=draws)
        j = torch.randint(len(self.c_mod), (n,), generator=draws)
        p = self.p[i, j]
        label = preference_label(p, draws)
        x_ref, x_gen = latents(self.ref, i, draws), latents(self.gen, j, draws)
        t_ref, t_gen = torch.randint(len(self.sd.scheduler.alphas_cumprod), (2, n), generator=draws)
        eps_ref, eps_gen = torch.randn(2, *x_ref.shape, generator=draws)
        return ReleaseBatch(
            x_ref, x_gen, eps_ref, eps_gen, t_ref, t_gen, self.c.expand(n, -1, -1), self.c_mod[j], p, label
        )

    def losses(self, batch: ReleaseBatch) -> tuple[Tensor, ...]:
        """ℓ(θ; x_ref, c) twice, ℓ(θ; x_gen, c_mod), ℓ(θ₀; x_ref, c), ℓ(θ₀; x_gen, c_mod): (n,) each."""
        x_0, eps = torch.cat([batch.x_ref, batch.x_gen]), torch.cat([batch.eps_ref, batch.eps_gen])
        t, context = torch.cat([batch.t_ref, batch.t_gen]), torch.cat([batch.c, batch.c_mod])
        base_ref, base_gen = self.error(self.theta_0, x_0, eps, t, context).chunk(2)
        ref, gen = self.error(self.theta, x_0, eps, t, context).chunk(2)
        return ref, ref, gen, base_ref, base_gen


METHOD = Release
