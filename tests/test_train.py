"""train.py on a tiny random base: what it learns and writes, that it repeats itself, resumes, stops, and bad input."""

import copy
import errno
import itertools
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import WEIGHTS, error_line, files_in, write_base
from trainings import RESULT, RPO, STATE, contents, history, same, same_results, steps, stopped, train_tiny, validations

import train
from model.align import ALIGN
from model.files.tensors import read_metadata
from model.stable_diffusion import StableDiffusion
from model.tokenizer import BertTokenizer
from reward import Reward
from subject import load_photos, load_subject
from support import memory, randomness, results
from support.film_strip import film_strip
from support.header import VERSION

# ---------------------------------------------------------------------------------------------- what a run leaves


def test_the_result_is_the_best_validation_and_loads_strictly(done, world):
    folder, trainer = done
    assert files_in(folder) == RESULT
    sd = StableDiffusion.from_pretrained(world / "base")
    sd.load_checkpoint(folder / "best.safetensors")  # raises if a key is missing, extra or of a wrong shape
    scored = {row["step"]: row["reward"] for row in validations(history(folder)) if row["step"] > 0}
    best = max(scored, key=scored.get)
    assert list(scored) == [2, 4] and read_metadata(folder / "best.safetensors")["step"] == str(best)
    assert same(load_file(folder / "best.safetensors"), trainer.seen[best])
    assert same(sd.unet.state_dict(), trainer.seen[best]) and not same(trainer.seen[0], trainer.seen[best])
    page = film_strip(trainer.subject.training_prompts, trainer.photos, trainer.record.strip, best)
    assert Image.open(folder / "best.png").tobytes() == page.tobytes()
    assert [row.step for row in trainer.record.strip] == [0, 2, 4]
    for row, (_, prompts, images) in zip(trainer.record.strip, trainer.drawn[1:], strict=True):
        assert row.pictures == images[::2]
        assert row.rewards == trainer.reward(images, prompts, 0.3)[::2].tolist()


def test_header(done, world):
    folder, trainer = done
    settings = {name: str(value) for name, value in vars(trainer.settings).items() if value is not None}
    assert settings.items() >= {"lambda_train": "0.0", "lambda_val": "0.3", "beta": "1.0", "lr": "0.001"}.items()
    subject = {"token": "[V]", "noun": "dog", "live": "True"}
    base = {"base": str(world / "base"), "prediction_type": "epsilon"}
    best = max(validations(history(folder))[1:], key=lambda row: row["reward"])
    kept = {"step": str(best["step"]), "reward": str(best["reward"])}
    run = {"format": "pt", "method": "rpo", "version": VERSION}
    run |= {"training_prompts": json.dumps(trainer.subject.training_prompts)}
    assert read_metadata(folder / "best.safetensors") == settings | subject | base | kept | run


def test_history_has_a_line_a_step_and_a_validation(done):
    folder, trainer = done
    lines = [json.loads(line) for line in (folder / "best.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [(row["step"], "reward" in row) for row in lines]
    assert kinds == [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    of_step = {"total", "similarity", "preference", "margin", "accuracy", "p", "label", "gradient_norm"}
    for row in lines:
        assert set(row) == {"step", "seconds"} | ({"align_i", "align_t", "reward"} if "reward" in row else of_step)
        assert all(math.isfinite(value) for value in row.values())
    for row, (_, prompts, images) in zip(validations(lines), trainer.drawn[1:], strict=True):
        for name, lam in (("reward", 0.3), ("align_i", 1), ("align_t", 0)):
            assert row[name] == pytest.approx(trainer.reward(images, prompts, lam).mean().item(), abs=1e-6)
    first, second = steps(lines)[:2]  # θ = θ₀: Δ is 0, the preference loss log 2, and no sign agrees with a label
    assert first["margin"] == first["accuracy"] == 0 and second["margin"] != 0
    assert first["preference"] == pytest.approx(math.log(2), abs=1e-6)


# ---------------------------------------------------------------------------------------------- the method


def by_hand(base, dog, n, beta, weight, lambda_train):
    """The method, a pair at a time, without train.py, rpo.py and support/: each step's row of the history, and θ."""
    sd, subject = StableDiffusion.from_pretrained(base), load_subject(dog)
    photos, bert = load_photos(subject, 16), BertTokenizer.from_pretrained(base / "reward")
    reward = Reward(ALIGN.from_pretrained(base / "reward"), bert, photos)
    prompts = [prompt for prompt in subject.training_prompts for _ in range(2)]
    seeds = np.random.SeedSequence([0, 3]).generate_state(16).tolist()
    negatives = sd.generate(prompts, seeds, steps=1, guidance=7.5)
    theta, theta_0 = copy.deepcopy(sd.unet).requires_grad_(True), sd.unet
    adamw = torch.optim.AdamW(theta.parameters(), lr=1e-3, weight_decay=0.01)

    def error(unet, x_0, eps, t, prompt):
        alpha = sd.scheduler.alphas_cumprod[t].float()
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        v = sd.scheduler.config.prediction_type == "v_prediction"
        x_t, target = signal * x_0 + noise * eps, signal * eps - noise * x_0 if v else eps
        return (unet(x_t[None], t[None], sd.encode_prompts([prompt]))[0] - target).square().mean()

    for step in itertools.count(1):
        words = np.random.SeedSequence([0, step, 1]).generate_state(1, np.uint64)
        draws = torch.Generator().manual_seed(int(words[0]))
        ref = [photos[i] for i in torch.randint(3, (n,), generator=draws)]
        j = torch.randint(16, (n,), generator=draws)
        gen, c_mod = [negatives[k] for k in j], [prompts[k] for k in j]
        p = torch.sigmoid(reward(ref, c_mod, lambda_train) - reward(gen, c_mod, lambda_train))
        y, x = torch.bernoulli(p, generator=draws), []
        for mean, std in map(sd.encode_images, (ref, gen)):
            x.append(mean + std * torch.randn(mean.shape, generator=draws))
        t, eps = torch.randint(1000, (n,), generator=draws), torch.randn(2, *mean.shape, generator=draws)
        similarity = preference = 0
        for k in range(n):
            pair = (x[0][k], eps[0][k], t[k], c_mod[k]), (x[1][k], eps[1][k], t[k], c_mod[k])
            l_sim = error(theta, x[0][k], eps[0][k], t[k], subject.instance_prompt)
            l_ref, l_gen = (error(theta, *picture) for picture in pair)
            with torch.no_grad():
                base_ref, base_gen = (error(theta_0, *picture) for picture in pair)
            margin = beta * ((base_ref - l_ref) - (base_gen - l_gen))
            similarity += l_sim / n
            preference += F.softplus(-margin if y[k] == 1 else margin) / n  # -log σ(±Δ)
        adamw.zero_grad()
        (similarity + weight * preference).backward()
        norm = torch.nn.utils.clip_grad_norm_(theta.parameters(), 1.0)
        adamw.step()
        row = {"similarity": similarity, "preference": preference, "gradient_norm": norm}
        row |= {"p": p.mean(), "label": y.mean()}
        yield {name: value.item() for name, value in row.items()}, theta


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loop_is_the_method_written_out(run, world, tmp_path, prediction_type):
    base = write_base(tmp_path / "other", prediction_type)
    options = ("--batch", 3, "--beta", 2, "--preference-weight", 0.5, "--lambda-train", 0.5, "--keep-last")
    assert run("--base", base, *options) == 0
    rows, ours = steps(history(tmp_path)), load_file(tmp_path / "best.safetensors")
    for row, (expected, theta) in zip(rows, by_hand(base, world / "dog", 3, 2, 0.5, 0.5), strict=False):  # noqa: B007
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)  # fp32, other batches
    # AdamW amplifies rounding where a gradient is almost 0, hence the mean: a weight has moved by some 2e-3.
    apart = torch.cat([(ours[name] - weight).abs().flatten() for name, weight in theta.state_dict().items()])
    assert apart.mean() < 5e-7 and apart.max() < 1e-3


def test_only_the_unet_learns(done):
    _, trainer = done
    for network, before in zip(trainer.frozen, trainer.before, strict=True):
        assert same(network.state_dict(), before)
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert same(trainer.seen[0], trainer.before[0])  # the first of the frozen networks is θ₀
    assert not any(torch.equal(tensor, trainer.seen[0][name]) for name, tensor in trainer.seen[4].items())


def test_validations_share_their_noise_and_negatives_have_another(run, done, tmp_path):
    assert run("--lr", 1e-30, "--validate-every", 1) == 0  # in fp32 no weight changes
    assert len({row["reward"] for row in validations(history(tmp_path))}) == 1
    (first, prompts, negatives), *scored = done[1].drawn
    assert first == randomness.NEGATIVES and [stream for stream, _, _ in scored] == [randomness.VALIDATION] * 3
    assert prompts == scored[0][1] and len(prompts) == 16
    pictures = {image.tobytes() for image in (*negatives, *scored[0][2])}  # of θ₀ both
    assert len(pictures) == 2 * 16


def test_short_memory_moves_networks_and_changes_nothing(run, done, tmp_path, monkeypatch, capsys):
    """On a CPU, where a move changes nothing, only that they are said to be away between validations."""

    class Asserting(RPO):
        def draw(self, *args):
            images = super().draw(*args)
            assert not self.machine.offloaded
            return images

        def loss(self, batch):
            assert self.machine.offloaded
            return super().loss(batch)

    Asserting.__name__ = "RPO"
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e3)
    assert run("--seed", 0, method=Asserting) == 0  # 0 is the default, and a seed as any other
    trainer = RPO.last
    assert trainer.machine.offloadable == [trainer.sd.vae, trainer.sd.text_encoder, trainer.reward.align]
    assert "warning: this GPU has 0.0 GB free: try --precision bf16" in capsys.readouterr().out
    assert same_results(tmp_path, done[0])


# ---------------------------------------------------------------------------------------------- settings


def observed(folder):
    """The numbers of the base's validation and of the first step, and the weights after it."""
    validation, step, *_ = history(folder)
    tensors = load_file(folder / "best.safetensors")
    return validation | step | {"weights": b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))}


@pytest.fixture(scope="module")
def one_step(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("one"))
        assert train_tiny(world, patch, "--steps", 1) == 0
    return observed(folder)


FLAGS = {  # a flag and its value: what it changes of `observed`, None for the weights at least
    ("--similarity-weight", 0.5): {"total", "gradient_norm", "weights"},
    ("--mean", "arithmetic"): {"reward"},  # λ_train is 0: with both means the labels are of ALIGN-T
    ("--lambda-val", 0.7): {"reward"},
    ("--sampler", "ddim"): None,
    ("--guidance", 2): None,
    ("--seed", 2): None,
    ("--token", 1): None,
    ("--noun", "can"): None,
    ("--no-live",): None,
    ("--prediction-type", "v_prediction"): None,
    ("--precision", "bf16"): None,
}
# Flags with a test of their own, here or in other files; the second line's are in the loop that is written out.
OTHERS = "help subject base align variant ckpt resume steps validate-every patience keep-last live device"
OTHERS += " batch beta lambda-train preference-weight lr images-per-prompt solver-steps"
OTHERS += " checkpoint-gradients training-prompts resolution lora-rank"


def test_every_flag_is_known_to_these_tests(capsys, run):
    assert run("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "constant; with LoRA 1e-4 (default: 5e-06, the paper)" in text and "better reward (default: never)" in text
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text.split("options:")[1]))
    assert flags == {f"--{name}" for name in OTHERS.split()} | {option[0] for option in FLAGS}


@pytest.mark.parametrize("option", FLAGS, ids=lambda option: option[0])
def test_a_flag_is_read(run, tmp_path, one_step, option):
    assert run("--steps", 1, *option) == 0
    now = observed(tmp_path)
    assert now.keys() == one_step.keys()
    changed = {name for name in now if now[name] != one_step[name]}
    if FLAGS[option] is None:
        assert "weights" in changed
    else:
        assert changed == FLAGS[option]
        assert read_metadata(tmp_path / "best.safetensors")[option[0][2:].replace("-", "_")] == str(option[1])


def test_variant_and_align_name_files(run, base, tmp_path):
    for file in (base / "unet" / WEIGHTS, base / "vae" / WEIGHTS, base / "text_encoder" / "model.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    (base / "reward").rename(tmp_path / "elsewhere")
    assert run("--base", base, "--align", tmp_path / "elsewhere", "--variant", "fp16", "--steps", 1) == 0


def test_resolution_is_that_of_all_pictures(run):
    assert run("--resolution", 24, "--steps", 1) == 0  # the base's own is 16
    pictures = [*RPO.last.photos, *(image for _, _, images in RPO.last.drawn for image in images)]
    assert {picture.size for picture in pictures} == {(24, 24)}
    header = read_metadata(Path("best.safetensors"))  # for sample.py and evaluate.py
    assert header["resolution"] == "24"


def shown(out):
    """The settings that were printed, and where each is from; each once."""
    rows = [line.split(maxsplit=2) for line in out.splitlines() if line.startswith("  ")]
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: (value, source.strip()) for name, value, source in rows}


class Unprepared(RPO):
    """Stops when its settings are known."""

    def prepare(self):
        raise KeyboardInterrupt


def test_each_default_says_whose_it_is(run, tmp_path, capsys):
    assert run(method=Unprepared, quick=()) == 130
    out, err = capsys.readouterr()
    assert "nothing was kept" in (line := err.splitlines()[-1]) and "start again" in line and files_in(tmp_path) == []
    paper = {"steps": "400", "lr": "5e-06", "images_per_prompt": "4", "validate_every": "40"}
    paper |= {"lambda_val": "0.3", "mean": "harmonic", "lambda_train": "0", "beta": "1"}
    paper |= {"preference_weight": "1", "similarity_weight": "1"}
    release = {"batch": ("1", "the release"), "guidance": ("7.5", "the release")}
    ours = {"solver_steps": ("20", "our default"), "seed": ("0", "our default"), "sampler": ("dpm++", "our default")}
    assert shown(out) == release | ours | {name: (value, "the paper") for name, value in paper.items()}
    assert RPO.last.settings == train.RPOSettings()


def test_a_flag_wins_then_the_bases_recommendation_then_the_default(run, base, capsys):
    recommended = {"lr": 1e-4, "batch": 2, "guidance": 3, "mean": "arithmetic"}
    recommended |= {"keep_last": True, "unknown": 1}  # a switch is set by its flag alone
    (base / "rpo.json").write_text(json.dumps(recommended), encoding="utf-8")
    assert run("--base", base, "--batch", 3, method=Unprepared, quick=()) == 130
    theirs = "this base's recommendation"
    expected = {"lr": ("0.0001", theirs), "guidance": ("3", theirs), "mean": ("arithmetic", theirs)}
    expected |= {"batch": ("3", "command line"), "beta": ("1", "the paper"), "solver_steps": ("20", "our default")}
    assert shown(capsys.readouterr().out).items() >= expected.items()
    assert RPO.last.settings == train.RPOSettings(lr=1e-4, guidance=3.0, mean="arithmetic", batch=3)


@pytest.mark.parametrize("text", ['{"batch": 1.5}', '{"mean": "x"}', "[1]"])
def test_a_bad_rpo_json_is_named(run, base, tmp_path, capsys, text):
    (base / "rpo.json").write_text(text, encoding="utf-8")
    assert run("--base", base, quick=()) == 2
    assert "rpo.json" in error_line(capsys)
    assert files_in(tmp_path) == []


# ---------------------------------------------------------------------------------------------- resumed, replaced


@pytest.mark.parametrize("at", [1, 4])
def test_resumed_is_as_if_uninterrupted(run, done, tmp_path, capsys, at):
    assert run(method=stopped(at)) == 130
    line, kept = capsys.readouterr().err.splitlines()[-1], at > 2
    assert ("interrupted: kept step 2" if kept else "interrupted: nothing was kept") in line and "--resume" in line
    assert files_in(tmp_path) == sorted([*(RESULT if kept else RESULT[:2]), STATE])
    assert not kept or same(load_file(tmp_path / "best.safetensors"), done[1].seen[2])
    assert run("--resume") == 0
    assert f"resuming after step {2 if kept else 0}" in capsys.readouterr().out
    assert files_in(tmp_path) == RESULT
    assert same(RPO.last.machine.weights(), done[1].machine.weights())
    assert same_results(tmp_path, done[0])


def test_a_resumed_lora_run_ends_as_an_uninterrupted_one(run, tmp_path):
    """Its negatives too: θ₀ draws them when θ's adapters are loaded."""
    options, whole = ("--lora-rank", 2, "--keep-last"), tmp_path / "whole"
    assert run(*options, "--ckpt", "whole/best.safetensors") == 0
    first, second, *_ = steps(history(whole))
    assert first["margin"] == 0 != second["margin"]  # θ₀ is the network without its adapters
    tensors, header = load_file(whole / "best.safetensors"), read_metadata(whole / "best.safetensors")
    assert header["lora_rank"] == "2"
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert run(*options, method=stopped(4)) == 130
    assert run(*options, "--resume") == 0
    assert same_results(tmp_path, whole)


def test_a_state_that_is_older_than_the_weights_resumes_as_well(run, tmp_path, monkeypatch, capsys):
    """A large state is written more rarely. Here the clock stands still: after the first state there is none."""
    options = ("--validate-every", 1, "--keep-last")
    assert run(*options, "--ckpt", "whole/best.safetensors") == 0
    (tmp_path / STATE).write_text("of an older run", encoding="utf-8")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert run(*options, method=stopped(4)) == 130
    assert torch.load(tmp_path / STATE)["step"] == 0  # written at once: it replaces the older run's
    assert "kept step 3" in (err := capsys.readouterr().err) and "--resume continues after step 0" in err
    assert run(*options, "--resume", method=stopped(2)) == 130
    assert read_metadata(tmp_path / "best.safetensors")["step"] == "1"
    assert run(*options, "--resume") == 0
    assert same_results(tmp_path, tmp_path / "whole")


@pytest.fixture(scope="module")
def at_step_3(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("interrupted"))
        assert train_tiny(world, patch, method=stopped(3)) == 130
    return folder


@pytest.fixture
def interrupted(run, at_step_3, tmp_path):
    """A folder whose run was interrupted at step 3."""
    return Path(shutil.copytree(at_step_3, tmp_path, dirs_exist_ok=True))


def test_resume_as_another_run_is_refused_and_loses_nothing(run, interrupted, capsys):
    before = contents(interrupted)
    changes = {"lr": 1e-4, "beta": 2, "noun": "cat", "seed": 1, "validate_every": 3, "lora_rank": 2}
    for name, value in changes.items():
        assert run("--resume", f"--{name.replace('_', '-')}", value) == 2
        assert name in error_line(capsys) and contents(interrupted) == before
    assert run("--resume", "--steps", 1) == 2
    assert "2 steps" in error_line(capsys) and contents(interrupted) == before


def test_resume_knows_photos_and_base_by_what_they_hold(run, done, interrupted, world, base, tmp_path_factory, capsys):
    photos = Path(shutil.copytree(world / "dog", tmp_path_factory.mktemp("other") / "dog"))
    Image.new("RGB", (20, 20), "red").save(photos / "1.png")
    assert run("--resume", "--subject", photos) == 2
    assert "'1.png'" in error_line(capsys)
    (base / "unet" / ".DS_Store").write_bytes(b"x")  # Finder leaves one in a folder that it shows
    path = base / "vae" / WEIGHTS
    tensors, before = load_file(path), path.read_bytes()
    save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, path)
    assert run("--resume", "--base", base) == 2
    line = error_line(capsys)
    assert "other settings (base " in line and "align" not in line
    path.write_bytes(before)
    assert run("--resume", "--base", base, "--steps", 5, "--patience", 9) == 0  # and it may continue further
    assert history(interrupted)[:-2] == history(done[0])


def test_a_state_of_another_device_resumes(run, done, interrupted):
    """Apple's GPUs have another memory layout than the CPU, and no fused AdamW."""
    state = torch.load(interrupted / STATE)
    for averages in state["optimizer"]["state"].values():
        averages |= {name: averages[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
    for group in state["optimizer"]["param_groups"]:
        assert group["fused"]
        group["fused"] = False
    torch.save(state, interrupted / STATE)
    assert run("--resume") == 0
    adamw = RPO.last.optimizer.adamw
    assert all(group["fused"] for group in adamw.param_groups)
    for weight, averages in adamw.state.items():
        assert averages["exp_avg"].stride() == averages["exp_avg_sq"].stride() == weight.stride()
    assert same_results(interrupted, done[0])


@pytest.mark.parametrize("spoil", ["cut", "lacking", "no state", "no weights"])
def test_a_broken_state_is_refused_and_nothing_lost(run, interrupted, capsys, spoil):
    path = interrupted / STATE
    if spoil == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif spoil == "lacking":
        torch.save({name: value for name, value in torch.load(path).items() if name != "history"}, path)
    else:
        (path if spoil == "no state" else interrupted / "best.safetensors").unlink()
    before = contents(interrupted)
    assert run("--resume") == 2
    assert ("best.safetensors is missing" if spoil == "no weights" else STATE) in error_line(capsys)
    assert contents(interrupted) == before


def test_a_new_run_says_what_it_replaces(run, interrupted, capsys):
    assert run("--steps", 2) == 0
    replaced = ", ".join(f"best.{ending}" for ending in ("safetensors", "jsonl", "png", "state.pt"))
    assert f"{replaced}: will be replaced" in (out := capsys.readouterr().out) and "--resume continues it" in out


@pytest.mark.parametrize(
    ("name", "exported"),
    [("best.png", False), ("best.safetensors", False), ("best.safetensors", True), ("best.jsonl", False)],
)
def test_what_no_run_has_written_is_not_replaced(run, tmp_path, capsys, name, exported):
    """A picture of the user's, a model (A1111's --ckpt is the base), an export, which has a result's header."""
    header = {"version": "0.1.0", "noun": "dog", "step": "40", "rpo.config": "{}"} if exported else {"format": "pt"}
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / name, header)
    if name == "best.jsonl":
        (tmp_path / name).write_text('{"file": "1.jpg", "text": "a dog"}\n', encoding="utf-8")
    before = contents(tmp_path)
    assert run() == 2
    assert name in (line := error_line(capsys)) and "--ckpt" in line
    assert contents(tmp_path) == before


def test_two_runs_do_not_write_one_result(run, tmp_path, capsys):
    with results.lock(Path("best.safetensors")):  # as in another terminal
        assert run() == 2
        assert "another run is writing best.safetensors" in (line := error_line(capsys)) and "--ckpt" in line
        assert run("--ckpt", "other.safetensors", "--steps", 1) == 0
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("name", ["best.safetensors", "best.jsonl", "best.png", STATE])
def test_failed_write_leaves_the_old_file_and_says_so(run, done, tmp_path, capsys, monkeypatch, name):
    """The disk fills up when the second run has written the file and is about to rename it."""
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / STATE).write_text("old", encoding="utf-8")
    before, replace = (tmp_path / name).read_bytes(), os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run("--seed", 1) == 2
    assert name in (last := capsys.readouterr().err.splitlines()[-1]) and "No space left" in last
    assert (tmp_path / name).read_bytes() == before and files_in(tmp_path) == sorted([*RESULT, STATE])


def test_a_run_that_the_disk_cannot_hold_is_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    assert run("--lora-rank", 2) == 2
    assert "GiB free" in error_line(capsys) and files_in(tmp_path) == []
    (tmp_path / STATE).touch()
    os.truncate(tmp_path / STATE, 10**9)  # it is freed only when the new state is whole
    assert run("--lora-rank", 2) == 2
    assert "GiB free" in error_line(capsys) and files_in(tmp_path) == [STATE]


def test_only_temporary_files_of_a_killed_run_are_removed(run, tmp_path):
    others = [".best.1234", ".best.png.old", ".best.txt.1234", ".other.png.1234"]
    for name in (*others, *(f".best.{ending}.1234" for ending in ("safetensors", "jsonl", "png", "state.pt"))):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert run("--steps", 1) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == others


# ---------------------------------------------------------------------------------------------- when it stops


def scored(*rewards):
    """RPO with these rewards at its validations, the first of which is the base's."""
    left = list(rewards)

    class Scored(RPO):
        def __init__(self, run, reward):
            super().__init__(run, reward)  # λ of the validation is 0.3, of the labels 0
            reward.combine = lambda i, t, lam: torch.tensor([left.pop(0)]) if lam == 0.3 else t

    return Scored


@pytest.mark.parametrize(
    ("rewards", "options", "scored_steps", "kept"),
    [
        ((0.2, 0.3, 0.4, 0.35, 0.4, 0.9), ("--patience", 2), [0, 1, 2, 3, 4], "2"),  # equal is not better
        ((0.9, 0.3, 0.2, 0.1), ("--steps", 5, "--validate-every", 2), [0, 2, 4, 5], "2"),  # the base is no result
        ((0.2, 0.9, 0.3, 0.25), ("--steps", 3, "--keep-last"), [0, 1, 2, 3], "3"),
    ],
    ids=["patience", "best", "last"],
)
def test_which_weights_are_kept(run, tmp_path, capsys, rewards, options, scored_steps, kept):
    assert run("--steps", 9, "--validate-every", 1, *options, method=scored(*rewards)) == 0
    rows = validations(history(tmp_path))
    assert [row["step"] for row in rows] == scored_steps
    assert [row["reward"] for row in rows] == pytest.approx(rewards[: len(rows)])
    header, best = read_metadata(tmp_path / "best.safetensors"), rewards[scored_steps.index(int(kept))]
    assert header["step"] == kept and float(header["reward"]) == pytest.approx(best)
    assert same(load_file(tmp_path / "best.safetensors"), RPO.last.seen[int(kept)])
    out = capsys.readouterr().out
    assert ("stopped: 2 validations" in out) == ("--patience" in options)
    assert f"kept step {kept}" in out and ("NOT BETTER" in out) == (best < rewards[0])


@pytest.mark.parametrize(("every", "message"), [(4, "the loss is"), (1, "prediction is not finite")])
def test_a_diverged_run_ends(run, tmp_path, capsys, every, message):
    assert run("--lr", 1e30, "--validate-every", every) == 2
    out, err = capsys.readouterr()
    assert message in (last := err.splitlines()[-1]) and "--lr" in last
    assert out.splitlines()[-1].endswith("start again")  # resumed, it would diverge again
    assert "best.safetensors" not in files_in(tmp_path)


def test_a_run_that_fails_says_what_it_has_kept(run, capsys):
    assert run(method=stopped(4, OSError("gone"))) == 2
    out, err = capsys.readouterr()
    assert "gone" in err.splitlines()[-1]
    assert "kept step 2" in out and out.splitlines()[-1].endswith("--resume continues after step 2")


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "option",
    [
        *[("--lambda-train", 1.5), ("--lambda-val", "-inf"), ("--steps", 0), ("--lr", "-1e-4"), ("--beta", 0)],
        *[("--guidance", -1), ("--batch", 0), ("--images-per-prompt", 0), ("--solver-steps", 0), ("--mean", "x")],
        *[("--preference-weight", "nan"), ("--validate-every", 0), ("--seed", 2**63)],
        *[("--patience", 0), ("--patience", 3, "--keep-last"), ("--device", "abacus"), ("--device", "cuda:99")],
        *[("--ckpt", "best.pt"), ("--ckpt", ""), ("--token", " "), ("--noun", " "), ("--solver-steps", 1001)],
        *[("--resolution", 25), ("--precision", "fp8"), ("--nonsense",), ("--step", 3)],
        *[("--sampler", "best"), ("--method", "dpg"), ("--prior-weight", 1)],  # the baselines' flags are not train.py's
    ],
    ids=lambda option: " ".join(map(str, option)),
)
def test_bad_option_is_one_line(run, tmp_path, capsys, option):
    assert run(*option) == 2
    line = error_line(capsys)
    assert option[0] in line or option[0].split("-")[-1] in line
    assert files_in(tmp_path) == []


SPOILT = [("dog", None), ("dog/1.png", 60), ("base", None), ("base/reward", None), ("base/reward/vocab.txt", None)]
SPOILT += [("base/vae/config.json", 20), ("base/unet/config.json", 0), (f"base/unet/{WEIGHTS}", 9000)]


@pytest.mark.parametrize(("name", "remains"), SPOILT)  # None: the file or folder is missing; else its first bytes
def test_bad_photos_and_a_bad_base_are_one_line(run, world, tmp_path, tmp_path_factory, capsys, name, remains):
    spoilt = Path(shutil.copytree(world, tmp_path_factory.mktemp("spoilt") / "world"))
    path = spoilt / name
    if remains is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:remains])
    assert run("--subject", spoilt / "dog", "--base", spoilt / "base") == 2
    assert name.removesuffix("/vocab.txt") in error_line(capsys)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("ckpt", ["history.safetensors", "file/best.safetensors", "photos"])
def test_a_place_where_no_result_can_be_is_one_line(run, world, tmp_path, capsys, ckpt):
    """A folder in the place of the history, a file in the place of a folder, the folder of the photos."""
    (tmp_path / "history.jsonl").mkdir()
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    before, photos = files_in(tmp_path), files_in(world / "dog")
    assert run("--ckpt", world / "dog" / "best.safetensors" if ckpt == "photos" else ckpt) == 2
    assert ckpt.split(".")[0] in error_line(capsys)
    assert files_in(tmp_path) == before and files_in(world / "dog") == photos


def test_a_base_in_a_folder_that_is_not_utf_8_is_one_line(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run("--base", "base") == 2
    assert "is not UTF-8: rename" in error_line(capsys) and files_in(folder) == []


def test_a_token_that_leaves_no_room_for_the_prompt_is_reported(run, capsys):
    assert run("--token", "z" * 90, "--steps", 1) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 9 and "zz dog'" in warnings[0]  # the instance prompt and the training prompts
