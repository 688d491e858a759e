"""RPO with the loss of the authors' released code (github.com/andrew-miao/RPO, commit d351ad5), for comparison.

    python -m baselines release --subject data/dog

It differs from the paper's Eq. 8 in two ways: inside L_pref the photo has the instance prompt c, so that its loss there
is that of L_sim again, and photo and negative have their own t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from support.randomness import step_generator
from train import RPO, Batch, RPOSettings


@dataclass(frozen=True)
class ReleaseSettings(RPOSettings):
    pictures_a_pair: ClassVar[int] = 2


class Release(RPO):
    Settings = ReleaseSettings
    result = "release.safetensors"

    def batch(self, step: int) -> Batch:
        """As RPO's, but t is (n, 2): the photo's and the negative's."""
        batch = super().batch(step)
        rng = step_generator(self.settings.seed, 2**31 + step)  # no step is as large
        t_gen = torch.randint(len(self.sd.scheduler.alphas_cumprod), batch.t.shape, generator=rng)
        return batch._replace(t=torch.stack([batch.t, t_gen], 1))

    def losses(self, batch: Batch) -> tuple[Tensor, ...]:
        """ℓ(θ; x_ref, c) twice, ℓ(θ; x_gen, c_mod), ℓ(θ₀; x_ref, c), ℓ(θ₀; x_gen, c_mod): (n,) each."""
        x_0, eps = torch.cat([batch.x_ref, batch.x_gen]), torch.cat([batch.eps_ref, batch.eps_gen])
        t, context = torch.cat(batch.t.unbind(1)), torch.cat([batch.c, batch.c_mod])
        base_ref, base_gen = self.error(self.theta_0, x_0, eps, t, context).chunk(2)
        ref, gen = self.error(self.theta, x_0, eps, t, context).chunk(2)
        return ref, ref, gen, base_ref, base_gen


METHOD = Release
