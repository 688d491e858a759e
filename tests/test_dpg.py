"""DPG against float64 formulas written out by hand, to 1e-12; what the critic learns, to the stated share."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines.dpg import DPG, Critic, look_forward_reward, policy_loss


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def step(n=3, seed=0, dtype=torch.float32, size=6):
    """The tensors of one step."""
    g = draws(seed)
    x_0_hat, x_0 = (torch.randn(n, 4, size, size, generator=g).to(dtype) for _ in range(2))
    loss_ref, loss_drawn = (torch.rand(n, generator=g).to(dtype) for _ in range(2))
    return {
        "loss_ref": loss_ref,
        "loss_drawn": loss_drawn,
        "x_0_hat": x_0_hat,
        "x_0": x_0,
        "t": torch.randint(1000, (n,), generator=g),
    }


def trained(reward="look-forward", steps=5, **settings):
    """A DPG whose critic has left its zero start."""
    method = DPG(reward=reward, **settings)
    for seed in range(steps):
        x, dino = step(seed=seed), {"dino": torch.rand(3, generator=draws(seed))} if reward == "dino" else {}
        method.loss(**x, **dino)
    return method


def double(method):
    """The same method with a critic in float64 and an AdamW over it."""
    method.critic = method.critic.double()
    method.optimizer = torch.optim.AdamW(method.critic.parameters(), lr=1e-3)
    return method


def residuals(n, generator, size=8):
    """(x̂_0 - x_0)² as a denoiser makes them: their level differs a lot between samples, and between places."""
    level = torch.rand(n, 1, 1, 1, generator=generator) ** 2
    blots = F.interpolate(torch.rand(n, 4, 2, 2, generator=generator), size=size)
    return 2 * level * blots * torch.randn(n, 4, size, size, generator=generator) ** 2


# -------------------------------------------------------------------------------------------------- the reward


def test_look_forward_reward():
    x_0 = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    x_0_hat = torch.tensor([[1.0, 2.0], [0.0, -3.0]], dtype=torch.float64).reshape(2, 1, 1, 2).requires_grad_()
    reward = look_forward_reward(x_0_hat, x_0)
    assert reward.tolist() == [-2.5, -4.5] and not reward.requires_grad
    assert look_forward_reward(x_0, x_0).tolist() == [0, 0]


def test_look_forward_is_a_weighted_denoising_loss():
    """(1-ᾱ)/ᾱ times the ε-error, as the docstring has it. 1e-10: x̂_0 divides by √ᾱ."""
    x_0, eps, prediction = (torch.randn(2, 4, 3, 3, generator=draws(), dtype=torch.float64) for _ in range(3))
    prediction = prediction + torch.randn(2, 4, 3, 3, generator=draws(1), dtype=torch.float64)
    a = torch.tensor([0.9, 0.01], dtype=torch.float64).reshape(2, 1, 1, 1)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    x_0_hat = (x_t - (1 - a).sqrt() * prediction) / a.sqrt()
    expected = -((1 - a) / a * (prediction - eps) ** 2).flatten(1).mean(1)
    assert look_forward_reward(x_0_hat, x_0).tolist() == pytest.approx(expected.tolist(), abs=1e-10)


# -------------------------------------------------------------------------------------------------- the policy's loss


class Known(nn.Module):
    """Q(residual) = scale x the sum of a sample's elements."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, residual):
        return self.scale * residual.sum((1, 2, 3))


def test_policy_loss_is_the_formula():
    residual = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(2, 1, 2, 2)  # sums 10 and 26
    weight = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert policy_loss(Known(-3.0), residual, weight).item() == pytest.approx((0.5 * 30 + 0.25 * 78) / 2, abs=1e-12)


def by_hand(method, x, dino=None):
    """(total, policy) from the critic as it is now, sample by sample with Python floats."""
    policy = 0.0
    for i, t in enumerate(x["t"].tolist()):
        q = method.critic((x["x_0_hat"][i : i + 1] - x["x_0"][i : i + 1]) ** 2).item()
        policy -= method.gamma**t * q / len(x["t"])
    similarity, prior = sum(x["loss_ref"].tolist()) / 3, sum(x["loss_drawn"].tolist()) / 3
    return policy + method.prior_weight * prior + (0 if dino is None else similarity), policy


@pytest.mark.parametrize("reward", ["look-forward", "dino"])
@pytest.mark.parametrize("gamma, prior_weight", [(0.9986, 1.0), (1.0, 0.3), (0.9, 0.0)])
def test_total_is_the_formula(reward, gamma, prior_weight):
    method = double(trained(reward, gamma=gamma, prior_weight=prior_weight))
    x = step(seed=9, dtype=torch.float64) | {"t": torch.tensor([0, 3, 999])}
    dino = torch.tensor([0.9, 0.5, -0.2], dtype=torch.float64)
    dino = dino if reward == "dino" else None
    before = method.critic((x["x_0_hat"] - x["x_0"]) ** 2).tolist()
    loss = method.loss(**x, dino=dino)
    total, policy = by_hand(method, x, dino)  # after: the loss is under the critic that has learnt
    assert abs(policy) > 1e-3
    assert loss.total.item() == pytest.approx(total, abs=1e-12)
    assert loss.policy.item() == pytest.approx(policy, abs=1e-12)
    assert loss.similarity.item() == pytest.approx(x["loss_ref"].mean().item(), abs=1e-12)
    assert loss.prior.item() == pytest.approx(x["loss_drawn"].mean().item(), abs=1e-12)
    rewards = [-0.1, -0.5, -1.2]
    if dino is None:
        rewards = [-sum(v * v for v in row) / len(row) for row in (x["x_0_hat"] - x["x_0"]).flatten(1).tolist()]
    assert loss.critic_target.item() == pytest.approx(sum(rewards) / 3, abs=1e-12)
    error = sum((q - r) ** 2 for q, r in zip(before, rewards, strict=True)) / 3  # before: φ's error as it was
    assert loss.critic_loss.item() == pytest.approx(error, abs=1e-12)


def test_gamma_weighs_each_sample_by_its_own_t():
    method = trained(gamma=0.9986)
    x = step(seed=9)
    x |= {"x_0_hat": x["x_0_hat"][:1].repeat(3, 1, 1, 1), "x_0": x["x_0"][:1].repeat(3, 1, 1, 1)}  # Q alike in all
    x["x_0_hat"].requires_grad_()
    x["t"] = torch.tensor([0, 500, 999])
    (gradient,) = torch.autograd.grad(method.loss(**x).policy, x["x_0_hat"])
    first, *others = gradient.flatten(1).norm(dim=1).tolist()
    assert [other / first for other in others] == pytest.approx([0.9986**500, 0.9986**999], rel=1e-4)  # fp32 powers


def test_gamma_one_and_t_zero_are_exact():
    """γ = 1 forgets t, and t = 0 forgets γ, to the bit."""
    losses = []
    for gamma, t in ((1.0, 0), (1.0, 999), (0.9986, 0), (0.9986, 999)):
        method = trained(gamma=1.0)
        method.gamma = gamma
        losses.append(method.loss(**step(seed=9) | {"t": torch.full((3,), t)}).policy.item())
    assert losses[0] == losses[1] == losses[2] != losses[3]


@pytest.mark.parametrize("reward", ["look-forward", "dino"])
def test_gradients_match_finite_differences(reward):
    """Of the total, with φ held: φ's own step answers to x̂_0 too, which is no part of the policy's gradient."""
    method = double(trained(reward))
    method.learn = lambda residual, reward: torch.zeros(())
    x = step(n=2, seed=9, dtype=torch.float64, size=3) | {"t": torch.tensor([0, 300])}
    dino = torch.tensor([0.9, 0.4], dtype=torch.float64) if reward == "dino" else None

    def total(x_0_hat, loss_ref, loss_drawn):
        return method.loss(loss_ref, loss_drawn, x_0_hat, x["x_0"], x["t"], dino).total

    assert torch.autograd.gradcheck(total, [x[name].requires_grad_() for name in ("x_0_hat", "loss_ref", "loss_drawn")])


def test_policy_reaches_the_prediction_and_not_the_critic():
    method, x = trained(), step(seed=9)
    x["x_0_hat"].requires_grad_(), x["x_0"].requires_grad_()
    loss = method.loss(**x)
    for parameter in method.critic.parameters():
        parameter.grad = None
    after = [parameter.clone() for parameter in method.critic.parameters()]
    loss.total.backward()
    assert x["x_0_hat"].grad.abs().sum() > 0 and x["x_0"].grad is None
    assert all(parameter.grad is None for parameter in method.critic.parameters())
    assert all(map(torch.equal, after, method.critic.parameters()))


def test_dino_takes_no_gradient_and_look_forward_none_of_similarity():
    x = step(seed=9)
    x["loss_ref"].requires_grad_(), x["x_0_hat"].requires_grad_()
    trained().loss(**x).total.backward()
    assert x["loss_ref"].grad is None
    dino = torch.rand(3, generator=draws()).requires_grad_()
    trained("dino").loss(**x, dino=dino).total.backward()
    assert x["loss_ref"].grad.tolist() == pytest.approx([1 / 3] * 3) and dino.grad is None


def test_prior_weight_zero_leaves_the_policy_alone():
    x = step(seed=9) | {"loss_drawn": torch.full((3,), math.inf)}
    loss = trained(prior_weight=0).loss(**x)
    assert loss.total == loss.policy


# -------------------------------------------------------------------------------------------------- the critic


def test_critic_starts_at_zero_and_pushes_nobody():
    x = residuals(3, draws()).requires_grad_()
    q = Critic()(x)
    assert q.tolist() == [0, 0, 0] and torch.autograd.grad(q.sum(), x)[0].abs().sum() == 0


def test_critic_is_its_seeds_and_takes_every_size():
    state = torch.get_rng_state()
    a, b, c = Critic(seed=1), Critic(seed=1), Critic(seed=2)
    assert torch.equal(torch.get_rng_state(), state)  # the global source is left alone
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert not torch.equal(a.layers[0].weight, c.layers[0].weight)
    assert all(a(torch.rand(2, 4, *size)).shape == (2,) for size in ((16, 16), (64, 64), (9, 5)))


def true_mean(x):
    return -x.mean((1, 2, 3))


def true_saturating(x):
    """Like a similarity: bounded, and it looks at the middle of the picture only."""
    return torch.exp(-3 * x[:, :, 2:6, 2:6].mean((1, 2, 3))) - 1


@pytest.mark.parametrize("truth, floor", [(true_mean, 0.97), (true_saturating, 0.8)])
def test_critic_learns_a_known_reward(truth, floor):
    """200 steps of 2 samples: the share of the variance of unseen rewards that Q explains, at least `floor`."""
    method, g = DPG(), draws()
    for _ in range(200):
        x = residuals(2, g)
        method.learn(x, truth(x))
    x = residuals(512, draws(1))
    unexplained = (method.critic(x) - truth(x)).square().mean() / truth(x).var()
    assert 1 - unexplained.item() > floor


def test_policy_climbs_the_true_reward():
    """x̂_0 moved by the critic's gradient alone comes nearer to x_0: the sign of the whole is right."""
    method, g = DPG(gamma=1.0, prior_weight=0.0), draws()
    x_0 = torch.randn(2, 4, 8, 8, generator=g)
    x_0_hat = nn.Parameter(x_0 + torch.randn(x_0.shape, generator=g))
    policy, zero = torch.optim.SGD([x_0_hat], lr=20.0), torch.zeros(2)
    errors = []
    for _ in range(150):
        loss = method.loss(zero, zero, x_0_hat, x_0, torch.zeros(2, dtype=torch.long))
        errors.append(-loss.critic_target.item())
        policy.zero_grad()
        loss.total.backward()
        policy.step()
    assert errors[-1] < 0.3 * errors[0]


# -------------------------------------------------------------------------------------------------- state, mistakes


@pytest.mark.parametrize("reward", ["look-forward", "dino"])
def test_resuming_is_exact(reward):
    def go_on(method):
        dino = {"dino": torch.rand(3, generator=draws())} if reward == "dino" else {}
        return [[value.item() for value in method.loss(**step(seed=s), **dino)] for s in range(20, 25)]

    method, file = trained(reward), io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    resumed = DPG(reward=reward, seed=7)  # everything of the other seed is replaced
    resumed.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    assert go_on(resumed) == go_on(method)
    assert all(map(torch.equal, resumed.critic.parameters(), method.critic.parameters()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_0": torch.zeros(3, 4, 6, 5)}, "x_0_hat and x_0"),
        ({"x_0": torch.zeros(1, 4, 6, 6)}, "x_0_hat and x_0"),
        ({"x_0": torch.zeros(3, 4), "x_0_hat": torch.zeros(3, 4)}, "x_0_hat and x_0"),
        ({"t": torch.tensor(5)}, "t must be"),
        ({"t": torch.tensor([5, 6])}, "t must be"),
        ({"t": torch.tensor([5, -1, 6])}, "at least 0"),
        ({"loss_ref": torch.zeros(3, 1)}, "loss_ref must be"),
        ({"loss_drawn": torch.zeros(6)}, "loss_drawn must be"),
        ({"dino": torch.zeros(3)}, "dino is given"),
    ],
)
def test_bad_shapes(change, message):
    method = trained()
    before = [parameter.clone() for parameter in method.critic.parameters()]
    with pytest.raises(ValueError, match=rf"^DPG.loss: [^\n]*{message}[^\n]*$"):
        method.loss(**step() | change)
    assert all(map(torch.equal, before, method.critic.parameters()))  # the critic has learnt nothing from it


def test_bad_dino_and_empty_batch():
    with pytest.raises(ValueError, match="dino is missing"):
        DPG(reward="dino").loss(**step())
    with pytest.raises(ValueError, match=r"dino must be \(3,\)"):
        DPG(reward="dino").loss(**step(), dino=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="batch > 0"):
        DPG().loss(**{name: value[:0] for name, value in step().items()})


@pytest.mark.parametrize(
    "settings",
    [{"reward": "clip"}, {"gamma": 0.0}, {"gamma": 1.1}, {"gamma": math.nan}, {"prior_weight": -1.0}],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        DPG(**settings)


def test_what_it_draws_and_needs():
    assert DPG().drawn_prompts(SimpleNamespace(class_prompt="a photo of a dog"), 2) == ["a photo of a dog"] * 2
    assert DPG().needs == ("x_0_hat", "x_0", "t") and DPG(reward="dino").needs == ("x_0_hat", "x_0", "t", "dino")
