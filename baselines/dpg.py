"""DPG: personalisation by deterministic policy gradient (Wei et al., arXiv 2407.06642, ECCV 2024), its U-Net-only form.

    policy   the denoiser: in the state (x_t, t, prompt) it acts by predicting ε, which says what x̂_0 would be.
    reward   "look-forward": r = -mean (x̂_0 - x_0)², the reconstruction error of the picture that t looks forward to;
             "dino":         r = cos(DINO(decoded x̂_0), DINO(photo)) - 1, which needs no gradient.
    critic   Q_φ((x̂_0 - x_0)²) ≈ r, a small network; φ minimises (Q_φ - r)².
    loss     look-forward: -λ γ^t Q_φ + w ℓ(θ; x_class)
             dino:         -λ γ^t Q_φ + ℓ(θ; x_ref) + w ℓ(θ; x_class)

θ follows the critic's gradient, with φ fixed, so the reward need not be differentiable. w is
DreamBooth's prior preservation (arXiv 2208.12242, section 3.3), ℓ the denoising loss.

Where each term is from. We could not open the paper's text. Look-forward is what its authors released
(github.com/wfanyue/DPG-T2I-Personalization): the critic's input, the unweighted target, γ^t = 0.9986^t outside the
critic, λ = w = 1, no ε-loss on the photos. A comment there, and notes by others on the paper's ablation, report that
γ = 1 is better than 0.9986. DINO was never released: r and the added ℓ(θ; x_ref) (the paper's λ Q_φ - ‖ε - ε_θ‖²; it
ablates λ = 0.1 and 1) are from two published notes on the paper, which agree; γ^t with DINO is our guess.

Differences from the paper's setting. All methods are compared in our loop, with our steps and learning rate:
- Only the U-Net learns; the paper trains the text encoder too (--train-text-encoder), for 1,000 steps at 1e-6, with 8
  class images.
- The paper's Q adds up the discounted rewards of the steps to come, Q(x_t) = r + γ Q(x_{t-1}) (by the same notes). The
  release and we look at one t at a time, weighted by γ^t, each sample by its own t (the release: all by the first's).
- The release's critic is a convolution to one channel and two linear layers for 64x64 latents (0.26 M), in half
  precision, SGD 0.01, non-negative at the start. Ours is convolutional, so it takes every size, and trains by AdamW.
- φ steps before θ, as in DDPG, not after: Q is zero at the start, so θ would have no gradient in the first step.
- The release's critic predicts the error -r and θ descends it: the same with the sign turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from baselines.dreambooth import DreamBooth, DreamBoothSettings, PriorBatch
from model.dino import DINO
from model.files.errors import CheckpointError
from model.stable_diffusion import home_of
from reward import Reward, unit_features
from rpo import denoising_loss
from support import ranks
from support.settings import at_least_0, fraction, ours
from support.start import Run


class DPGLoss(NamedTuple):
    """What `DPG.loss` returns: scalars. The first four carry a gradient to θ."""

    total: Tensor  # the value to minimise
    similarity: Tensor  # mean of ℓ(θ; x_ref); a part of the total with the DINO reward only
    policy: Tensor  # mean of -γ^t Q_φ((x̂_0 - x_0)²), before λ
    prior: Tensor  # mean of ℓ(θ; x_class), before the weight
    critic_target: Tensor  # mean of r, detached
    critic_loss: Tensor  # mean of (Q_φ - r)² before φ's step, detached


class Critic(nn.Module):
    """Q_φ: two convolutions and a mean over the picture; 10 thousand weights for 4 channels.

    The last layer is zero at the start: until the critic has seen a reward, Q and its gradient are zero, and the policy
    is not pushed at random.
    """

    def __init__(self, channels: int = 4, width: int = 32, seed: int = 0):
        super().__init__()
        with torch.device("meta"):  # filled below, so that the global source of randomness is left alone
            layers = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.SiLU(),
            )
            head = nn.Linear(width, 1)
        self.layers, self.head = layers.to_empty(device="cpu"), head.to_empty(device="cpu")
        rng = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.startswith("layers") and name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, generator=rng)
            else:
                nn.init.zeros_(parameter)

    def forward(self, residual: Tensor) -> Tensor:
        """residual: (n, channels, h, w), (x̂_0 - x_0)² in latent space, any h and w. Returns (n,), the rewards."""
        features = self.layers(residual.to(self.head.weight.dtype)).mean((2, 3))
        return self.head(features).squeeze(1)


def look_forward_reward(x_0_hat: Tensor, x_0: Tensor) -> Tensor:
    """r = -mean (x̂_0 - x_0)² over a sample's elements; (n,), without gradient.

    For an ε-prediction this is -(1-ᾱ_t)/ᾱ_t times the mean of (ε_θ - ε)²: a denoising loss that weighs noisy t more.
    """
    return -(x_0_hat - x_0).detach().square().flatten(1).mean(1)


def policy_loss(critic: nn.Module, residual: Tensor, weight: Tensor) -> Tensor:
    """-weight x Q_φ(residual), the mean over the batch: the gradient reaches `residual`, and never φ.

    residual: (n, channels, h, w). weight: (n,), γ^t. Returns a scalar.
    """
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    return -(weight * functional_call(critic, frozen, (residual,))).mean()


@dataclass(frozen=True)
class DPGSettings(DreamBoothSettings):
    dpg_reward: str = ours("look-forward", ("look-forward", "dino"), "what the critic learns")
    gamma: float = ours(0.9986, fraction, "γ: γ^t weighs the critic")
    policy_weight: float = ours(1.0, at_least_0, "λ: weight of the critic's term; the paper tries 0.1 and 1")


class DPG(DreamBooth):
    """RPO's loop with DreamBooth's class images, a critic, and the gradient that the critic gives θ."""

    Settings = DPGSettings
    result = "dpg.safetensors"
    critic_lr = 1e-3  # ours: after 200 steps Q explains more than 97 % of the variance of the look-forward reward

    def __init__(self, run: Run, reward: Reward):
        """Raises CheckpointError if the DINO reward is wanted and the base's folder has no metrics/dino."""
        super().__init__(run, reward)
        self.critic = Critic(run.sd.unet.config.in_channels, seed=run.settings.seed).to(run.sd.device)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=self.critic_lr, weight_decay=0.01)
        self.record.learning |= {"critic": self.critic, "critic_optimizer": self.critic_optimizer}  # for --resume
        self.dino = None
        if self.settings.dpg_reward == "dino":
            folder = home_of(run.base) / "metrics" / "dino"
            if not folder.is_dir():
                raise CheckpointError(f"{folder} is missing, which should hold DINO: copy or link its folder there")
            self.dino = DINO.from_pretrained(folder).to(run.sd.device)
            self.machine.offloadable = []  # every step decodes pictures

    def prepare(self) -> None:
        """Once: θ₀ draws the class images; DINO's features of the photos."""
        super().prepare()
        self.dino_photos = self.dino and self.dino_features(self.photos)

    def loss(self, batch: PriorBatch) -> DPGLoss:
        """One step of the critic, then the policy's loss under the critic that has just learned."""
        x_0, eps, t, context = self.both(batch)
        scheduler, n = self.sd.scheduler, len(batch.photo)
        x_t = scheduler.add_noise(x_0, eps, t)
        prediction = self.theta(x_t, t, context)
        ref, prior = denoising_loss(prediction, scheduler.target(x_0, eps, t)).chunk(2)
        x_0_hat = scheduler.to_x0_eps(prediction.float(), x_t, t)[0][:n]

        residual = (x_0_hat - batch.x_ref).square()
        reward = self.dino_reward(x_0_hat, batch.photo) if self.dino else look_forward_reward(x_0_hat, batch.x_ref)
        critic_loss = self.learn(residual.detach(), reward)
        policy = policy_loss(self.critic, residual, self.settings.gamma ** t[:n].to(residual.dtype))

        similarity, prior = ref.mean(), prior.mean()
        total = self.settings.policy_weight * policy + self.settings.prior_weight * prior
        total = total + similarity if self.dino else total
        return DPGLoss(total, similarity, policy, prior, reward.mean(), critic_loss)

    def dino_features(self, pictures: list[Image.Image]) -> Tensor:
        """(n, width), of length 1."""
        return unit_features(self.dino, self.dino.preprocess, pictures, self.sd.device)

    def dino_reward(self, x_0_hat: Tensor, photo: Tensor) -> Tensor:
        """cos(DINO(decoded x̂_0), DINO(photo)) - 1, (n,), without gradient."""
        features = self.dino_features(self.sd.decode_latents(x_0_hat.detach()))
        return (features * self.dino_photos[photo]).sum(1) - 1

    def learn(self, residual: Tensor, reward: Tensor) -> Tensor:
        """One AdamW step of φ on mean (Q_φ(residual) - reward)²; returns that loss as it was before, detached."""
        loss = F.mse_loss(self.critic(residual), reward.to(self.critic.head.weight.dtype))
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ranks.average_gradients(self.critic.parameters(), self.machine.weight)
        self.critic_optimizer.step()
        return loss.detach()


METHOD = DPG
