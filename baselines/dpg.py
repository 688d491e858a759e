"""DPG: personalisation by deterministic policy gradient (Wei et al., arXiv 2407.06642, ECCV 2024), its U-Net-only form.

    policy   the denoiser: in the state (x_t, t, prompt) it acts by predicting ε, which says what x̂_0 would be.
    reward   "look-forward": r = -mean (x̂_0 - x_0)², the reconstruction error of the picture that t looks forward to;
             "dino":         r = cos(DINO(decoded x̂_0), DINO(photo)) - 1, which needs no gradient.
    critic   Q_φ((x̂_0 - x_0)²) ≈ r, a small network; φ minimises (Q_φ - r)².
    loss     look-forward: -γ^t Q_φ + w ℓ(θ; x_class)
             dino:         -γ^t Q_φ + ℓ(θ; x_ref) + w ℓ(θ; x_class)

θ climbs the critic's gradient, φ being fixed, so any reward will do, even one that cannot be differentiated. w is
DreamBooth's prior preservation (arXiv 2208.12242, section 3.3), ℓ the denoising loss.

Where each term is from. We could not open the paper's text. Look-forward is what its authors released
(github.com/wfanyue/DPG-T2I-Personalization): the critic's input, the unweighted target, γ^t = 0.9986^t outside the
critic, w = 1, no ε-loss on the photos. A comment there, and the paper's ablation by others' notes, find γ = 1
better than 0.9986. DINO was never released: r and the added ℓ(θ; x_ref) (the paper's λ Q_φ - ‖ε - ε_θ‖², λ = 1
here; it ablates 0.1 and 1) are from two published notes on the paper, which agree; γ^t with DINO is our guess.

How this differs from the paper's setting, for it is compared in our loop, with our steps and learning rate:
- Only the U-Net learns; the paper trains the text encoder too, for 1,000 steps at 1e-6, with 8 class images.
- The paper's Q adds up the discounted rewards of the steps to come, Q(x_t) = r + γ Q(x_{t-1}) (by the same notes). The
  release and we look at one t at a time, weighted by γ^t, each sample by its own t (the release: all by the first's).
- The release's critic is a convolution to one channel and two linear layers for 64x64 latents (0.26 M), in half
  precision, SGD 0.01, non-negative at the start. Ours is convolutional, so it takes every size, and trains by AdamW.
- φ steps before θ, as in DDPG, not after: Q is zero at the start and would have nothing to say in the first step.
- The release's critic predicts the error -r and θ descends it: the same with the sign turned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from support.machine import own_averages

GAMMA = 0.9986
REWARDS = ("look-forward", "dino")


class DPGLoss(NamedTuple):
    """What `DPG.loss` returns: scalars. The first four carry a gradient to θ."""

    total: Tensor  # the value to minimise
    similarity: Tensor  # mean of ℓ(θ; x_ref); a part of the total with the DINO reward only
    policy: Tensor  # mean of -γ^t Q_φ((x̂_0 - x_0)²)
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
        draws = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.startswith("layers") and name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, generator=draws)
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


class DPG:
    """The method as the training loop sees it. Owns the critic and the critic's AdamW.

    channels: of the latents. reward: "look-forward" or "dino". gamma: γ in (0, 1]; 1 weighs all t alike.
    prior_weight: w >= 0. seed: of the critic's first weights. device: where the latents live.
    lr: the critic's, 1e-3. Ours: after 200 steps of 2 synthetic residuals Q explains more than 97 % of the variance of
    the look-forward reward, and its gradient points the right way; with 3e-3 and more the gradient is worse.
    Raises ValueError for a value outside these.
    """

    drawn, counted_by = "class images", "class_images"  # what the base draws first, and the flag that says how many

    def __init__(
        self,
        channels: int = 4,
        reward: str = "look-forward",
        gamma: float = GAMMA,
        prior_weight: float = 1.0,
        lr: float = 1e-3,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        if reward not in REWARDS:
            raise ValueError(f"reward {reward!r} is unknown; choose one of {', '.join(REWARDS)}")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], not {gamma}")
        if not (prior_weight >= 0 and math.isfinite(prior_weight)):
            raise ValueError(f"the prior's weight must be a number of at least 0, not {prior_weight}")
        self.reward, self.gamma, self.prior_weight = reward, gamma, prior_weight
        # What `loss` is given beside the two denoising losses, by name.
        self.needs = ("x_0_hat", "x_0", "t", "dino") if reward == "dino" else ("x_0_hat", "x_0", "t")
        self.critic = Critic(channels, seed=seed).to(device)
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), lr=lr, weight_decay=0.01)

    def drawn_prompts(self, subject, count: int) -> list[str]:
        """What the base model draws before training, a prompt an image: `count` class images."""
        return [subject.class_prompt] * count

    def loss(
        self, loss_ref: Tensor, loss_drawn: Tensor, x_0_hat: Tensor, x_0: Tensor, t: Tensor, dino: Tensor | None = None
    ) -> DPGLoss:
        """One step of the critic, then the policy's loss under the critic that has just learnt.

        Call it outside autocast, and `backward` before the next call, which changes φ.
        loss_ref, loss_drawn: (n,) ℓ of photos (instance prompt) and of class images (class prompt).
        x_0_hat: (n, c, h, w) the photos' x̂_0, predicted from x_t in one step by θ. x_0: their latents, no gradient.
        t: (n,) the photos' whole timesteps, 0 the cleanest. dino: (n,) cosine similarities in [-1, 1] of the decoded
        x̂_0 and the photo, with the DINO reward only; no gradient is taken of it.
        Raises ValueError if the shapes do not go together, a t is negative, or dino is missing or not wanted.
        """
        self._check(loss_ref, loss_drawn, x_0_hat, x_0, t, dino)
        residual = (x_0_hat - x_0.detach()).square()
        reward = look_forward_reward(x_0_hat, x_0) if dino is None else dino.detach() - 1
        critic = self.learn(residual.detach(), reward)

        policy = policy_loss(self.critic, residual, self.gamma ** t.to(residual.dtype))
        similarity, prior = loss_ref.mean(), loss_drawn.mean()
        total = policy if dino is None else policy + similarity
        if self.prior_weight:  # weight 0 skips the term: 0 x ∞ would be NaN
            total = total + self.prior_weight * prior
        return DPGLoss(total, similarity, policy, prior, reward.mean(), critic)

    def learn(self, residual: Tensor, reward: Tensor) -> Tensor:
        """One AdamW step of φ on mean (Q_φ(residual) - reward)²; returns that loss as it was before, detached."""
        loss = F.mse_loss(self.critic(residual), reward.to(self.critic.head.weight.dtype))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict:
        """The critic and its optimizer: what a resumed run needs to go on exactly. Holds references, as torch's do."""
        return {"critic": self.critic.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """The counterpart of `state_dict`. torch raises if the state is of another critic."""
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        own_averages(self.optimizer)

    def _check(self, loss_ref, loss_drawn, x_0_hat, x_0, t, dino) -> None:
        if x_0_hat.shape != x_0.shape or x_0_hat.ndim != 4 or len(x_0_hat) == 0:
            shapes = f"{tuple(x_0_hat.shape)} and {tuple(x_0.shape)}"
            raise ValueError(
                f"DPG.loss: x_0_hat and x_0 must both be (batch, c, h, w), with batch > 0; they are {shapes}"
            )
        if (dino is not None) != (self.reward == "dino"):
            raise ValueError(f"DPG.loss: dino is {'missing' if dino is None else 'given'}, the reward is {self.reward}")
        vectors = {"loss_ref": loss_ref, "loss_drawn": loss_drawn, "t": t} | ({} if dino is None else {"dino": dino})
        for name, vector in vectors.items():
            if vector.shape != x_0_hat.shape[:1]:
                raise ValueError(f"DPG.loss: {name} must be ({len(x_0_hat)},), not {tuple(vector.shape)}")
        if t.device.type == "cpu" and not bool((t >= 0).all()):  # to look at a GPU's is to wait for it
            raise ValueError("DPG.loss: every t must be at least 0")
