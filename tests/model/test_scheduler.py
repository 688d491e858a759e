"""The schedule and the samplers against diffusers', step by step, and the properties that no reference shows."""

import itertools
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from model.files.errors import CheckpointError
from model.scheduler import SAMPLERS, Scheduler, SchedulerConfig

# The public scheduler_config.json of Stable Diffusion 1.5.
SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
REFERENCES = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
PREDICTIONS = ("epsilon", "v_prediction")


def scheduler(**overrides):
    return Scheduler(SchedulerConfig(**overrides))


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoise(x, t):
    """Something smooth in x that mixes positions and changes with t, in place of a network."""
    return 0.8 * torch.tanh(x + 0.3 * x.roll(1, -1)) + 0.1 * math.cos(int(t) / 100) * x.roll(1, -2)


def their_states(sampler, config, steps, latents, generators):
    """The timesteps and every x_t after them, as diffusers' scheduler gives them."""
    reference = REFERENCES[sampler].from_config(config)
    reference.set_timesteps(steps)
    x, states = latents, []
    for t in reference.timesteps:
        drawn = {} if sampler == "dpm++" else {"generator": generators}
        x = reference.step(denoise(x, t), t, x, **drawn).prev_sample
        states.append(x)
    return reference.timesteps.tolist(), states


# Both sides do the same sums; our coefficients are in double precision, so they differ by float32 rounding (1e-6
# measured after 50 steps). A wrong end level, order or variance, each tried, was off by 1e-2 and more.
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 25, 30, 50])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_diffusers(tmp_path, sampler, steps, spacing, prediction_type):
    config = SD | {"prediction_type": prediction_type} | ({"timestep_spacing": spacing} if spacing else {})
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config | {"clip_sample": True}))  # never read
    ours = Scheduler.from_pretrained(tmp_path)
    latents = normal(3, 4, 8, 8)
    times, expected = their_states(sampler, config, steps, latents, seeds(1, 2, 3))
    asked, states, kept = [], [], latents.clone()

    def ask(x, t):
        assert (t.dtype, t.ndim) == (torch.int64, 0)
        asked.append(int(t))
        states.append(x)
        return denoise(x, t)

    states.append(ours.sample(ask, latents, steps, sampler, generators=seeds(1, 2, 3)))
    assert asked == times == ours.timesteps(steps, sampler)
    assert torch.equal(latents, kept) and torch.equal(states[0], kept)
    for ours_t, theirs_t in zip(states[1:], expected, strict=True):
        scale = theirs_t.abs().max()
        assert 0.1 < scale < 100
        assert (ours_t - theirs_t).abs().max() / scale <= 1e-5


def test_ddim_to_clean_is_diffusers():
    """set_alpha_to_one: the last step goes to ᾱ = 1 instead of ᾱ_0."""
    latents = normal(2, 4, 8, 8)
    _, states = their_states("ddim", SD | {"set_alpha_to_one": True}, 20, latents, None)
    got, other = (scheduler(set_alpha_to_one=one).sample(denoise, latents, 20, "ddim") for one in (True, False))
    assert (got - states[-1]).abs().max() / states[-1].abs().max() <= 1e-5
    assert (got - other).abs().max() / states[-1].abs().max() > 1e-3


@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_number_of_steps_works(sampler, spacing):
    """Timesteps exist and fall. For 1,000 steps diffusers has an IndexError for ddpm, and gives nan for dpm++."""
    ours = scheduler(timestep_spacing=spacing)
    for steps in range(1, 1001):
        times = ours.timesteps(steps, sampler)
        assert all(0 <= t <= 999 for t in times)
        assert all(early > late for early, late in itertools.pairwise(times))
        short = steps == 1000 and sampler == "dpm++" and spacing != "trailing"
        assert len(times) == steps - short
    got = ours.sample(denoise, normal(1, 4, 4, 4), 1000, sampler, seeds(1))
    assert got.isfinite().all() and 0.1 < got.abs().max() < 100


def test_noise_and_velocity_are_diffusers_exactly():
    reference = DDPMScheduler.from_config(SD)
    ours = scheduler()
    assert ours.alphas_cumprod.dtype == torch.float32
    assert torch.equal(ours.alphas_cumprod, reference.alphas_cumprod)
    t = torch.tensor([0, 1, 500, 998, 999])
    x_0, eps = normal(5, 4, 8, 8), normal(5, 4, 8, 8, seed=1)
    assert torch.equal(ours.add_noise(x_0, eps, t), reference.add_noise(x_0, eps, t))
    assert ours.target(x_0, eps, t) is eps
    v = scheduler(prediction_type="v_prediction").target(x_0, eps, t)
    assert torch.equal(v, reference.get_velocity(x_0, eps, t))
    same = ours.add_noise(x_0, eps, torch.full((5,), 500))
    assert torch.equal(same, ours.add_noise(x_0, eps, torch.tensor(500)))


def test_impossible_requests():
    for steps, sampler, message in (
        (0, "dpm++", r"^steps must be between 1 and 1000, not 0$"),
        (1001, "ddim", r"^steps must be between 1 and 1000, not 1001$"),
        (10, "euler", r"^sampler 'euler' is unknown; choose one of ddpm, ddim, dpm\+\+$"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler().sample(denoise, normal(2, 4, 4, 4), steps, sampler)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction_type", "sample"),
        ("beta_schedule", "linear"),
        ("rescale_betas_zero_snr", True),
        ("steps_offset", "one"),
    ],
)
def test_unsupported_config_is_refused(tmp_path, name, value):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD | {name: value}))
    with pytest.raises(CheckpointError, match=rf"^[^\n]*scheduler_config\.json[^\n]*{name}[^\n]*$"):
        Scheduler.from_pretrained(tmp_path)
