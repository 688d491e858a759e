"""train.py --method and the ablations, on a tiny random base: what each draws, minimises, logs and keeps."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import call, error_line, write_base, write_photos

import rpo
import sample
import train
from baselines.dreambooth import DreamBooth
from model.dino import DINO, DINOConfig
from model.files.config import config_from
from model.files.tensors import read_metadata
from model.stable_diffusion import StableDiffusion
from model.unet import UNet
from toy.networks import DINO_CONFIG, PREPROCESSORS, write_part

QUICK = ("--steps", 3, "--validate-every", 3, "--solver-steps", 1, "--images-per-prompt", 1, "--lr", 1e-3)
NO_LABELS = {"step", "total", "similarity", "prior", "gradient_norm", "seconds"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_base(folder / "base")
    write_photos(folder / "dog")
    config = DINO_CONFIG | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 16}
    config |= {"patch_size": 8, "num_attention_heads": 2}
    torch.manual_seed(0)
    dino = DINO(config_from(DINOConfig, config))
    square = {"size": {"height": 16, "width": 16}}
    part = folder / "base" / "metrics" / "dino"
    write_part(part, config, dino.state_dict(), "model.safetensors", PREPROCESSORS["dino"] | square)
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Call train.py in an empty folder; returns its steps' and its validations' rows."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        assert call(train, monkeypatch, "--subject", world / "dog", "--base", world / "base", *QUICK, *arguments) == 0
        rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if "total" in row], [row for row in rows if "reward" in row]

    return go


def weights(folder):
    return load_file(folder / "best.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["dreambooth", "dpg"])
def test_a_baseline_draws_class_images_and_asks_nothing_of_the_base_afterwards(run, monkeypatch, tmp_path, method):
    drawn, looked = [], []
    generate, forward = StableDiffusion.generate, UNet.forward
    monkeypatch.setattr(
        StableDiffusion,
        "generate",
        lambda self, prompts, *a, **k: drawn.append(prompts) or generate(self, prompts, *a, **k),
    )
    monkeypatch.setattr(UNet, "forward", lambda self, *a: looked.append(self.training) or forward(self, *a))
    left, prepare = [], train.Trainer.prepare
    monkeypatch.setattr(train.Trainer, "prepare", lambda self: prepare(self) or left.append(self.base_unet))
    steps, validations = run("--method", method, "--class-images", 3)
    assert left == [None]  # θ₀'s memory is free
    assert drawn[0] == ["a photo of a dog"] * 3 and len(drawn) == 1 + len(validations)
    assert all("[V]" in prompt for prompt in drawn[1])
    # One U-Net in training mode: a call a step and a call a solver step; the base's are before the loop.
    assert looked.count(True) == len(steps) + len(validations) and looked.index(True) == looked.count(False)
    header = read_metadata(tmp_path / "best.safetensors")
    told = {"method": method, "class_images": "3", "prior_weight": "1.0", "keep_last": "False", "solver_steps": "1"}
    assert header.items() >= told.items() and header.get("dpg_reward") == {"dpg": "look-forward"}.get(method)


def test_dreambooth_is_the_photos_and_the_prior(run):
    steps, _ = run("--method", "dreambooth", "--class-images", 3, "--prior-weight", 0.5)
    for row in steps:
        assert set(row) == NO_LABELS
        assert row["total"] == pytest.approx(row["similarity"] + 0.5 * row["prior"], rel=1e-5)


def test_a_method_gets_what_it_asks_for(run, monkeypatch):
    """A loss of one's own that weighs by t and by the rewards, without a label."""
    seen = []

    class Own(DreamBooth):
        drawn, counted_by, needs = "negatives", "images_per_prompt", ("t", "r_ref", "r_drawn")
        drawn_prompts = rpo.RPO.drawn_prompts

        def loss(self, loss_ref, loss_drawn, **given):
            assert [given[name].shape for name in self.needs] == [loss_ref.shape] * 3
            seen.append(given)
            return super().loss(loss_ref, loss_drawn)

    monkeypatch.setattr(train, "method_of", lambda args, sd: Own())
    steps, _ = run("--batch", 2)
    assert len(steps) == len(seen) == 3 and all(given.keys() == set(Own.needs) for given in seen)
    t, r_drawn = (torch.cat([given[name] for given in seen]) for name in ("t", "r_drawn"))
    assert 0 <= t.min() < t.max() < 1000 and len(set(r_drawn.tolist())) > 2
    monkeypatch.setattr(train, "method_of", lambda args, sd: rpo.RPO())
    steps, _ = run("--batch", 2)  # its labels are drawn from the same rewards
    for row, given in zip(steps, seen, strict=True):
        assert row["p"] == pytest.approx(torch.sigmoid(given["r_ref"] - given["r_drawn"]).mean().item(), abs=1e-6)


def test_without_its_prior_dreambooth_is_the_similarity_alone(run):
    steps, _ = run("--method", "dreambooth", "--class-images", 3, "--prior-weight", 0)
    assert all(row["total"] == row["similarity"] for row in steps)


@pytest.mark.parametrize("reward", ["look-forward", "dino"])
def test_dpg_learns_from_its_critic(run, reward):
    steps, _ = run("--method", "dpg", "--class-images", 3, "--dpg-reward", reward)
    for row in steps:
        assert set(row) == NO_LABELS | {"policy", "critic_target", "critic_loss"}
        alone = row["policy"] + row["prior"]
        assert row["total"] == pytest.approx(alone + (row["similarity"] if reward == "dino" else 0), rel=1e-4)
    if reward == "dino":  # a cosine minus 1
        assert all(-2 <= row["critic_target"] <= 0 for row in steps)
    assert len({row["critic_loss"] for row in steps}) == len(steps)


@pytest.mark.parametrize("reward", ["look-forward", "dino"])
def test_a_resumed_dpg_run_has_the_same_critic(world, tmp_path, monkeypatch, reward):
    arguments = ("--subject", world / "dog", "--base", world / "base", *QUICK, "--method", "dpg", "--class-images", 2)
    arguments += ("--dpg-reward", reward, "--steps", 6, "--keep-last")
    results = []
    for name, stop in (("whole", None), ("cut", 5)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if stop:
            step = train.Trainer.step

            def interrupted(self, number, step=step, stop=stop):
                if number == stop:
                    raise KeyboardInterrupt
                return step(self, number)

            with monkeypatch.context() as patch:
                patch.setattr(train.Trainer, "step", interrupted)
                assert call(train, monkeypatch, *arguments) == 130
            assert call(train, monkeypatch, *arguments, "--resume") == 0
        else:
            assert call(train, monkeypatch, *arguments) == 0
        results.append((tmp_path / name / "best.safetensors").read_bytes())
    assert results[0] == results[1]


def test_dpg_with_dino_needs_dino(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bare = write_base(tmp_path / "bare")
    arguments = ("--subject", world / "dog", "--base", bare, "--method", "dpg", "--dpg-reward", "dino")
    assert call(train, monkeypatch, *arguments) == 2
    assert "metrics/dino" in error_line(capsys)


def test_without_the_preference_rpo_is_the_similarity_alone(run):
    steps, _ = run("--preference-weight", 0)
    assert all(row["total"] == row["similarity"] and row["preference"] > 0 for row in steps)


def test_the_preference_has_the_weight_that_is_said(run):
    steps, _ = run("--preference-weight", 0.5)
    for row in steps:
        assert row["total"] == pytest.approx(row["similarity"] + 0.5 * row["preference"], rel=1e-5)


def test_beta_scales_the_margin_and_nothing_else_before_it_has_taught(run, tmp_path):
    """Without the preference in the loss the runs are one run, whatever β is; only what is logged of Δ differs."""
    runs, ends = [], []
    for beta in (1, 100):
        runs.append(run("--preference-weight", 0, "--beta", beta)[0])
        ends.append(weights(tmp_path))
    assert same(*ends)
    for one, other in zip(*runs, strict=True):
        assert other["margin"] == pytest.approx(100 * one["margin"], rel=1e-4)
        assert [one[name] for name in ("similarity", "p", "label")] == [
            other[name] for name in ("similarity", "p", "label")
        ]


RPO, DREAMBOOTH, DPG = (("--method", name, "--class-images", 2) for name in ("rpo", "dreambooth", "dpg"))
CRITIC = {"critic_target", "critic_loss"}


@pytest.mark.parametrize(
    ("method", "switch", "says", "follows"),
    [
        (RPO, ("--beta", 5), {"gradient_norm"}, set()),  # Δ is 0 in the first step, whatever β is
        (RPO, ("--tau", 1e-6), {"p"}, {"label", "gradient_norm"}),
        (RPO, ("--lambda-train", 1), {"p"}, {"label", "gradient_norm"}),
        (RPO, ("--preference-weight", 0.5), {"total", "gradient_norm"}, set()),
        (RPO, ("--mean", "arithmetic"), {"reward"}, set()),
        (RPO, ("--lambda-val", 0.7), {"reward"}, set()),
        (RPO, ("--keep-last",), set(), set()),
        (DREAMBOOTH, ("--prior-weight", 0.5), {"total", "gradient_norm"}, set()),
        (DPG, ("--prior-weight", 0.5), {"total", "gradient_norm"}, set()),
        (DPG, ("--dpg-reward", "dino"), CRITIC | {"total", "gradient_norm"}, {"policy"}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_switch_changes_what_it_says_and_nothing_else(run, method, switch, says, follows):
    """Of all that is logged of the base's validation and of the first step, where θ is θ₀ yet: of a later step all
    differs, for it starts from other weights."""
    rows = []
    for options in ((), switch):
        steps, validations = run(*method, "--steps", 1, *options)
        rows.append({f"validation {name}": value for name, value in validations[0].items()} | steps[0])
    plain, switched = rows
    assert plain.keys() == switched.keys()
    differ = {name.removeprefix("validation ") for name in plain if plain[name] != switched[name]} - {"seconds"}
    assert says <= differ <= says | follows


def test_tau_sharpens_the_labels(run):
    soft, sharp = (run("--tau", tau)[0] for tau in (1, 1e-6))
    assert all(0.27 <= row["p"] <= 0.73 for row in soft)  # rewards in [0, 1]
    assert all(row["p"] in (0, 1) and row["label"] == row["p"] for row in sharp)


def test_the_arithmetic_mean_is_that(run):
    _, validations = run("--mean", "arithmetic", "--lambda-val", 0.25)
    for row in validations:
        assert row["reward"] == pytest.approx(0.25 * row["align_i"] + 0.75 * row["align_t"], abs=1e-6)


def test_the_mean_changes_no_step_when_labels_ignore_the_photos(run):
    """λ_train = 0: both means are ALIGN-T, and the steps are the same."""
    (harmonic, first), (arithmetic, second) = run(), run("--mean", "arithmetic")
    assert [row["total"] for row in harmonic] == [row["total"] for row in arithmetic]
    assert [row["align_i"] for row in first] == [row["align_i"] for row in second]
    assert first[0]["reward"] < second[0]["reward"]


def test_keep_last_keeps_the_last(run, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.2])
    monkeypatch.setitem(train.MEANS, "harmonic", lambda i, t, lam: torch.tensor([next(scores)]) if lam == 0.3 else t)
    run("--keep-last", "--validate-every", 2)
    header = read_metadata(tmp_path / "best.safetensors")
    assert header["step"] == "3" and float(header["reward"]) == pytest.approx(0.2)


def test_a_lora_is_a_small_file_and_the_base_is_the_network_without_it(run, world, tmp_path, monkeypatch, capsys):
    steps, _ = run("--lora-rank", 2, "--keep-last")
    assert steps[0]["margin"] == 0 and steps[1]["margin"] != 0  # θ is θ₀ until the first step, and not after
    tensors, header = weights(tmp_path), read_metadata(tmp_path / "best.safetensors")
    assert header["lora_rank"] == header["ss_network_dim"] == "2"
    assert all(name.split(".", 1)[1] in ("lora_down.weight", "lora_up.weight", "alpha") for name in tensors)
    drawn = []
    for options in (("--ckpt", "best.safetensors"), ("--base", world / "base")):
        assert (
            call(sample, monkeypatch, *options, "--prompt", "a [V] dog", "--n", 1, "--steps", 2, "--guidance", 7.5) == 0
        )
        drawn.append(np.asarray(Image.open(tmp_path / "outputs" / "grid.png")).astype(int))
    assert abs(drawn[0] - drawn[1]).max() > 0
    shutil.copytree(world / "base" / "tokenizer", tmp_path / "tokenizer")
    assert call(sample, monkeypatch, "--ckpt", "best.safetensors", "--export-single", "whole.safetensors") == 0
    options = ("--base", "whole.safetensors", "--prompt", "a [V] dog", "--n", 1, "--steps", 2, "--guidance", 7.5)
    assert call(sample, monkeypatch, *options) == 0
    merged = np.asarray(Image.open(tmp_path / "outputs" / "grid.png")).astype(int)
    assert abs(merged - drawn[0]).max() <= 2 < abs(merged - drawn[1]).max()  # half precision


def test_a_resumed_lora_run_ends_as_an_unbroken_one(world, tmp_path, monkeypatch):
    """Its negatives too: θ₀ draws them, though θ's adapters are loaded by then."""
    arguments = (
        "--subject",
        world / "dog",
        "--base",
        world / "base",
        *QUICK,
        "--lora-rank",
        2,
        "--steps",
        6,
        "--keep-last",
    )
    results, step = [], train.Trainer.step
    for name, stop in (("whole", 99), ("cut", 5)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)

        def interrupted(self, number, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return step(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "step", interrupted)
            assert call(train, monkeypatch, *arguments) == (130 if stop == 5 else 0)
        if stop == 5:
            assert call(train, monkeypatch, *arguments, "--resume") == 0
        results.append((tmp_path / name / "best.safetensors").read_bytes())
    assert results[0] == results[1]


def test_every_number_logged_is_finite(run):
    for method in ("rpo", "dreambooth", "dpg"):
        steps, _ = run("--method", method, "--class-images", 2)
        assert all(math.isfinite(value) for row in steps for value in row.values())


@pytest.mark.parametrize(
    "arguments",
    [("--method", "magic"), ("--tau", 0), ("--prior-weight", -1), ("--preference-weight", "nan"), ("--mean", "x")],
)
def test_bad_settings(world, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert call(train, monkeypatch, "--subject", world / "dog", "--base", world / "base", *arguments) == 2
    assert arguments[0] in error_line(capsys)
