"""DPG against its loss written out by hand, to 1e-5: fp32."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from tiny import error_line
from trainings import history, steps, stopped, train_tiny

from baselines.dpg import DPG, Critic
from baselines.dreambooth import PriorBatch
from support import memory

REWARDS = pytest.mark.parametrize("reward", ["look-forward", "dino"])
FEW = ("--class-images", 2)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_critic_starts_at_zero_has_its_seed_and_takes_every_size():
    x, state = torch.rand(3, 4, 8, 8).requires_grad_(), torch.get_rng_state()
    a, b, c = Critic(seed=1), Critic(seed=1), Critic(seed=2)
    assert torch.equal(torch.get_rng_state(), state)  # the global source is left alone
    assert a(x).tolist() == [0, 0, 0] and torch.autograd.grad(a(x).sum(), x)[0].abs().sum() == 0
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert not torch.equal(a.layers[0].weight, c.layers[0].weight)
    assert all(a(torch.rand(2, 4, *size)).shape == (2,) for size in ((16, 16), (64, 64), (9, 5)))


# -------------------------------------------------------------------------------------------------- the loss


@pytest.fixture
def prepared(world, measured, tmp_path, monkeypatch):
    """A DPG as it is when the loop begins, with these flags."""
    monkeypatch.chdir(tmp_path)

    def prepare(*options):
        class Prepared(DPG):
            def train(self):
                Prepared.last = self

        assert train_tiny(world, monkeypatch, "--base", measured, *FEW, *options, method=Prepared) == 0
        return Prepared.last

    return prepare


def batch(t, seed=0):
    n = len(t)
    latents = [torch.randn(n, 4, 8, 8, generator=draws(seed + i)) for i in range(4)]
    context = torch.zeros(n, 77, 32)
    t = torch.tensor(t)
    return PriorBatch(*latents, t, t, context, context, (torch.arange(n) + 1) % 3)


def learned(trainer):
    """A few steps, so that the critic leaves its zero start. θ is then a known function: 0.9 x_t."""
    trainer.theta = lambda x_t, t, context: 0.9 * x_t
    for seed in range(5):
        trainer.loss(batch([900, 500, 100], seed))
    return trainer


@REWARDS
@pytest.mark.parametrize(("gamma", "lam", "prior_weight"), [(0.9986, 1.0, 1.0), (0.9, 2.0, 0.3)])
def test_loss_is_the_formula(prepared, reward, gamma, lam, prior_weight):
    options = "--dpg-reward", reward, "--gamma", gamma, "--policy-weight", lam, "--prior-weight", prior_weight
    trainer = learned(prepared(*options))
    x, critic = batch([0, 3, 700], seed=9), trainer.critic
    a = trainer.sd.scheduler.alphas_cumprod[x.t_ref].double().reshape(3, 1, 1, 1)
    x_t = [a.sqrt() * x_0 + (1 - a).sqrt() * eps for x_0, eps in ((x.x_ref, x.eps_ref), (x.x_class, x.eps_class))]
    x_0_hat = (x_t[0] - (1 - a).sqrt() * 0.9 * x_t[0]) / a.sqrt()
    residual = ((x_0_hat - x.x_ref) ** 2).float()
    similarity = (0.9 * x_t[0] - x.eps_ref).square().mean().item()
    prior = (0.9 * x_t[1] - x.eps_class).square().mean().item()
    rewards = -residual.mean((1, 2, 3))
    if reward == "dino":
        seen = trainer.dino_features(trainer.sd.decode_latents(x_0_hat.float()))
        rewards = F.cosine_similarity(seen, trainer.dino_features([trainer.photos[i] for i in (1, 2, 0)])) - 1
    error = (critic(residual) - rewards).square().mean().item()  # φ's, before its step

    loss = trainer.loss(x)
    policy = -sum(gamma**t * q for t, q in zip([0, 3, 700], critic(residual).tolist(), strict=True)) / 3  # after it
    assert abs(policy) > 1e-4
    total = lam * policy + prior_weight * prior + (similarity if reward == "dino" else 0)
    expected = [total, similarity, policy, prior, rewards.mean().item(), error]
    assert [part.item() for part in loss] == pytest.approx(expected, rel=1e-5)


@REWARDS
def test_policy_reaches_theta_and_not_the_critic(prepared, reward):
    """Of the denoising loss on the photos θ gets a gradient with DINO only, which itself gives none."""
    trainer, scale = learned(prepared("--dpg-reward", reward, "--prior-weight", 0)), torch.ones(4, requires_grad=True)
    trainer.theta = lambda x_t, t, context: scale.reshape(4, 1, 1, 1) * x_t  # two photos, then two class images
    loss = trainer.loss(batch([400, 400], seed=9))
    trainer.critic.zero_grad()
    before = [parameter.clone() for parameter in trainer.critic.parameters()]
    gradients = [torch.autograd.grad(part, scale, retain_graph=True)[0] for part in (loss.policy, loss.similarity)]
    loss.total.backward()
    assert all(parameter.grad is None for parameter in trainer.critic.parameters())
    assert all(map(torch.equal, before, trainer.critic.parameters()))
    expected = gradients[0] + gradients[1] if reward == "dino" else gradients[0]
    torch.testing.assert_close(scale.grad, expected)
    assert (scale.grad[:2] != 0).all() and (scale.grad[2:] == 0).all()


def residuals(n, generator):
    """(x̂_0 - x_0)² as a denoiser makes them: their level differs a lot between samples, and between places."""
    level = torch.rand(n, 1, 1, 1, generator=generator) ** 2
    blots = F.interpolate(torch.rand(n, 4, 2, 2, generator=generator), size=8)
    return 2 * level * blots * torch.randn(n, 4, 8, 8, generator=generator) ** 2


def saturating(x):
    """Like a similarity: bounded, and it looks at the middle of the picture only."""
    return torch.exp(-3 * x[:, :, 2:6, 2:6].mean((1, 2, 3))) - 1


@pytest.mark.parametrize(("truth", "floor"), [(lambda x: -x.mean((1, 2, 3)), 0.97), (saturating, 0.8)])
def test_critic_learns_a_known_reward(prepared, truth, floor):
    """200 steps of 2 samples: the share of the variance of unseen rewards that Q explains, at least `floor`."""
    trainer, g = prepared(), draws()
    for _ in range(200):
        x = residuals(2, g)
        trainer.learn(x, truth(x))
    x = residuals(512, draws(1))
    unexplained = (trainer.critic(x) - truth(x)).square().mean() / truth(x).var()
    assert 1 - unexplained.item() > floor


# -------------------------------------------------------------------------------------------------- a run


@REWARDS
def test_a_run_and_a_resumed_one(run, measured, tmp_path, reward):
    """The critic, too, is as if nothing had happened."""
    options = (*FEW, "--base", measured, "--dpg-reward", reward, "--keep-last", "--ckpt")
    assert run(*options, "whole/d.safetensors", baseline="dpg") == 0
    rows = steps(history(tmp_path / "whole", "d.jsonl"))
    for row in rows:
        terms = {"similarity", "policy", "prior", "critic_target", "critic_loss"}
        assert set(row) == {"step", "total", "gradient_norm"} | terms and all(map(math.isfinite, row.values()))
        similarity = row["similarity"] if reward == "dino" else 0
        assert row["total"] == pytest.approx(row["policy"] + row["prior"] + similarity, rel=1e-4)
        assert -2 <= row["critic_target"] <= 0 or reward == "look-forward"  # a cosine minus 1
    assert len({row["critic_loss"] for row in rows}) == 4

    assert run(*options, "d.safetensors", method=stopped(4, method=DPG)) == 130
    assert run(*options, "d.safetensors", "--resume", baseline="dpg") == 0
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "whole" / "d.safetensors").read_bytes()
    assert history(tmp_path, "d.jsonl") == history(tmp_path / "whole", "d.jsonl")


def test_every_flag_of_dpg_is_known_to_these_tests(run, capsys):
    """Besides those that it has from DreamBooth."""
    listed = []
    for name in ("dreambooth", "dpg"):
        assert run("--help", baseline=name) == 0
        listed.append(set(re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.MULTILINE)))
    assert listed[1] - listed[0] == {"dpg-reward", "gamma", "policy-weight"}  # of test_loss_is_the_formula


def test_dino_needs_its_files_and_a_decoder_on_the_device(run, prepared, capsys, monkeypatch):
    assert run("--dpg-reward", "dino", baseline="dpg") == 2
    assert "metrics/dino" in error_line(capsys)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e3)  # what is used in every step is not moved
    moved = {"--dpg-reward=dino": 0, "--steps=4": 3, "--train-text-encoder": 2}  # nor a text encoder that learns
    assert {option: len(prepared(option).machine.offloadable) for option in moved} == moved
