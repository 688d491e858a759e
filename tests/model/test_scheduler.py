"""The schedule and the samplers against diffusers', step by step, and the properties that no reference shows."""

import itertools
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from model.files.errors import CheckpointError
from model.scheduler import SAMPLERS, Scheduler, SchedulerConfig

# The public scheduler_config.json of Stable Diffusion 1.5. `clip_sample` false is what our class assumes anyway.
SD = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
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
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
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
    latents, ends = normal(2, 4, 8, 8), {}
    for to_one in (False, True):
        _, states = their_states("ddim", SD | {"set_alpha_to_one": to_one}, 20, latents, None)
        ends[to_one] = states[-1]
        got = scheduler(set_alpha_to_one=to_one).sample(denoise, latents, 20, "ddim")
        assert (got - ends[to_one]).abs().max() / ends[to_one].abs().max() <= 1e-5
    assert (ends[True] - ends[False]).abs().max() / ends[True].abs().max() > 1e-3


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
    v = scheduler(prediction_type="v_prediction").target(x_0, eps, t)
    assert torch.equal(v, reference.get_velocity(x_0, eps, t))
    one = ours.add_noise(x_0, eps, 500)
    assert torch.equal(one, ours.add_noise(x_0, eps, torch.full((5,), 500)))
    assert torch.equal(one, ours.add_noise(x_0, eps, torch.tensor(500)))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_prediction_gives_back_x0_and_eps(prediction_type):
    ours = scheduler(prediction_type=prediction_type)
    t = torch.arange(0, 1000, 37)
    x_0, eps = normal(len(t), 4, 4, 4), normal(len(t), 4, 4, 4, seed=1)
    x_t, target = ours.add_noise(x_0, eps, t), ours.target(x_0, eps, t)
    assert torch.equal(target, eps) == (prediction_type == "epsilon")
    got_x_0, got_eps = ours.to_x0_eps(target, x_t, t)
    # ε-prediction divides by √ᾱ_999 = 0.068, which makes rounding fifteen times larger.
    assert (got_x_0 - x_0).abs().max() <= 2e-5
    assert (got_eps - eps).abs().max() <= 2e-5
    target.requires_grad_()
    ours.to_x0_eps(target, x_t, t)[0].sum().backward()
    assert target.grad.abs().min() > 0


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_oracle_leads_every_sampler_to_its_picture(sampler, prediction_type):
    """A denoiser that knows x_0 returns it. DDIM stops at ᾱ_0 with √(1-ᾱ_0) = 0.03 of noise left."""
    ours = scheduler(prediction_type=prediction_type)
    x_0 = normal(2, 4, 8, 8, seed=5)

    def oracle(x_t, t):
        a = ours.alphas_cumprod[t]
        eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        return ours.target(x_0, eps, t)

    got = ours.sample(oracle, normal(2, 4, 8, 8), 20, sampler, seeds(1, 2))
    assert (got - x_0).abs().max() <= (0.15 if sampler == "ddim" else 1e-4)


@pytest.mark.parametrize(
    ("steps", "sampler", "message"),
    [
        (0, "dpm++", r"^steps must be between 1 and 1000, not 0$"),
        (1001, "ddim", r"^steps must be between 1 and 1000, not 1001$"),
        (10, "euler", r"^sampler 'euler' is unknown; choose one of ddpm, ddim, dpm\+\+$"),
    ],
)
def test_impossible_requests(steps, sampler, message):
    with pytest.raises(ValueError, match=message):
        scheduler().sample(denoise, normal(2, 4, 4, 4), steps, sampler)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "linear"},
        {"rescale_betas_zero_snr": True},
        {"steps_offset": "one"},
    ],
    ids=str,
)
def test_unsupported_config_is_refused(tmp_path, wrong):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD | wrong))
    with pytest.raises(CheckpointError, match=rf"^[^\n]*scheduler_config\.json[^\n]*{next(iter(wrong))}[^\n]*$"):
        Scheduler.from_pretrained(tmp_path)


def test_clip_sample_is_never_read(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD | {"clip_sample": True}))
    ours = Scheduler.from_pretrained(tmp_path)
    got = ours.sample(lambda x, t: torch.zeros_like(x), 10 * normal(1, 4, 4, 4), 20, "ddim")
    assert got.abs().max() > 5
