"""The next toy world: what it can draw, and the two helpers of its autoencoder's training."""

import random

import numpy as np
import pytest
import torch

from model.vae import VAE, VAEConfig
from subject import DREAMBENCH_PROMPTS, TRAINING_PROMPTS
from toy.next import fast_norm, grow, world
from toy.next.world import Picture


@pytest.mark.parametrize("live", [True, False])
def test_every_prompt_has_a_drawing(live):
    known = world.templates(live)
    name = "live" if live else "thing"
    assert set(DREAMBENCH_PROMPTS[name] + TRAINING_PROMPTS[name]) <= set(known)
    named = world.reserved_subject("dog" if live else "clock", 0)
    drawn = {world.draw(named, picture, random.Random(1)).tobytes() for picture in set(known.values())}
    aliases = 3 if live else 0  # "in" and "wearing" a chef's, a firefighter's or a police outfit
    assert len(drawn) == len(set(known.values())) - aliases


def test_the_paper_s_skills_are_among_them():
    known = world.templates(live=True)
    for prompt in (
        "Claude Monet styled painting of a {V} {noun}",
        "a screaming {V} {noun}",
        "a {V} {noun} wearing a nurse outfit",
        "a {V} {noun} wearing angel wings",
        "a back view of a {V} {noun}",
        "a {V} {noun} looking up at the camera",
        "a cross of a {V} {noun} and a panda",
    ):
        assert prompt in known


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_subject_fills_the_picture(kind):
    for i in range(4):
        named = world.random_subject(kind, random.Random(i))
        picture, mask = world.draw_with_mask(named, Picture(), random.Random(i))
        assert picture.size == mask.size == (128, 128)
        left, top, right, bottom = mask.point(lambda v: 255 * (v > 127)).getbbox()
        assert 0.6 <= max(right - left, bottom - top) / 128 <= 0.9
        assert left > 0 and top > 0 and right < 128 and bottom <= 128


@pytest.mark.parametrize("kind", world.KINDS)
def test_two_subjects_of_a_kind_differ(kind):
    one, other = (world.draw(world.reserved_subject(kind, i), Picture(), random.Random(0)) for i in (0, 1))
    assert np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() > 8


def test_reserved_subjects_stay_out_of_training_and_samples_repeat():
    assert all(world.training_subject(i).signature not in world.reserved_signatures() for i in range(300))
    assert world.draw(*world.sample(77)).tobytes() == world.draw(*world.sample(77)).tobytes()


def test_captions_say_what_is_drawn():
    named, rng = world.reserved_subject("dog", 0), random.Random(0)
    for text in (
        world.caption(named, Picture(view="back view"), rng),
        world.caption(named, Picture(view="side view"), rng),
    ):
        assert " view of a" in text
    assert "a cross of a" in world.caption(named, Picture(cross="lion"), rng)
    assert "sleepy" in world.caption(named, Picture(mood="sleepy", scene="on the Moon"), rng)


def small(widths: tuple[int, ...], latent: int) -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(block_out_channels=widths, norm_num_groups=8, latent_channels=latent, layers_per_block=1))


def test_a_grown_vae_starts_as_the_narrow_one(monkeypatch):
    monkeypatch.setattr(grow, "NOISE", 0.0)
    narrow, wide = small((16, 16), 4), small((32, 32), 8)
    grow.grow(wide, narrow)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        mean, _ = narrow.encode(x)
        assert torch.allclose(wide.encode(x)[0][:, :4], mean, atol=1e-4)
        padded = torch.cat([mean, torch.zeros_like(mean)], 1)
        assert torch.allclose(wide.decode(padded), narrow.decode(mean), atol=1e-4)


def test_the_fast_norm_has_the_same_gradients():
    vae, x = small((16, 32), 4), torch.randn(2, 3, 16, 16)
    grads = []
    for _ in range(2):
        vae.zero_grad()
        vae.decode(vae.encode(x)[0]).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None]))
        fast_norm.speed_up(vae)
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-6)
