"""train.py on a tiny random base: what it writes, that it repeats itself, resumes, stops, and refuses bad input."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import WEIGHTS, call, error_line, files_in, write_base, write_photos

import train
from model.align import ALIGN
from model.files.tensors import read_metadata
from model.stable_diffusion import StableDiffusion
from model.tokenizer import BertTokenizer
from reward import lambda_harmonic
from support import machine, record
from support.pictures import film_strip

RESULT = ["best.jsonl", "best.png", "best.safetensors"]
STATE = "best.state.pt"
QUICK = ("--steps", 4, "--validate-every", 2, "--solver-steps", 1, "--images-per-prompt", 2, "--lr", 1e-3)
NEGATIVES = 16  # 8 prompts, 2 each


class Watched(train.Trainer):
    """A Trainer that remembers itself and the weights it had at each validation."""

    last = None

    def __init__(self, args, subject, sd, align, dino):
        Watched.last, self.align = self, align
        self.frozen = [sd.unet, sd.vae, sd.text_encoder, align]  # here the U-Net is θ₀
        self.before = [copied(network) for network in self.frozen]
        self.seen = {}
        super().__init__(args, subject, sd, align, dino)

    def validate(self, step):
        self.seen[step] = copied(self.unet)
        return super().validate(step)


def copied(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(folder, name="best.jsonl"):
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def same_files(one, other):
    """Are two results equal, but for the times in the history?"""
    assert (one / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    assert history(one) == history(other)
    return (one / "best.png").read_bytes() == (other / "best.png").read_bytes()


def validations(rows):
    return [row for row in rows if "reward" in row]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_base(folder / "base")
    write_photos(folder / "dog")
    return folder


@pytest.fixture
def base(world, tmp_path_factory):
    """A copy of the base, to be spoilt."""
    return Path(shutil.copytree(world / "base", tmp_path_factory.mktemp("copy") / "base"))


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Call train.py in an empty folder; the last of two equal options counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Trainer", Watched)

    def go(*arguments):
        return call(train, monkeypatch, "--subject", world / "dog", "--base", world / "base", *QUICK, *arguments)

    return go


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """An uninterrupted run: its folder and its Trainer. What it asked of ALIGN and of generate is noted in it."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "Trainer", Watched)
        texts, embedded, draws, encoded = [], [], [], []
        spy(patch, BertTokenizer, "__call__", lambda self, batch: texts.extend(batch))
        spy(patch, ALIGN, "image_features", lambda self, pixels: embedded.append(len(pixels)))
        spy(patch, StableDiffusion, "encode_images", lambda self, images: encoded.append(images))
        generate = StableDiffusion.generate

        def noted(self, prompts, seeds, *settings, **options):
            drawer = "θ" if self.unet is Watched.last.unet else "θ₀"
            draws.append((drawer, prompts, seeds, len(embedded), generate(self, prompts, seeds, *settings, **options)))
            return draws[-1][-1]

        patch.setattr(StableDiffusion, "generate", noted)
        loads = []
        original = ALIGN.from_pretrained.__func__
        patch.setattr(ALIGN, "from_pretrained", classmethod(lambda cls, at: loads.append(at) or original(cls, at)))
        arguments = ("--subject", world / "dog", "--base", world / "base", *QUICK)
        assert call(train, patch, *arguments) == 0
        trainer = Watched.last
    trainer.texts, trainer.embedded, trainer.draws, trainer.loads = texts, embedded, draws, loads
    trainer.encoded = encoded
    return folder, trainer


def spy(patch, cls, name, note):
    original = getattr(cls, name)
    patch.setattr(cls, name, lambda self, *args, **options: (note(self, *args), original(self, *args, **options))[1])


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_leaves_three_files_and_nothing_else(done):
    assert files_in(done[0]) == RESULT


def test_checkpoint_loads_strictly_and_is_the_best_validation(done, world):
    folder, trainer = done
    sd = StableDiffusion.from_pretrained(world / "base")
    sd.load_unet(folder / "best.safetensors")  # raises if a key is missing, extra or misshapen
    scored = {row["step"]: row["reward"] for row in validations(history(folder)) if row["step"] > 0}
    best = max(scored, key=scored.get)
    assert trainer.record.best_step == best and list(scored) == [2, 4]
    assert same(load_file(folder / "best.safetensors"), trainer.seen[best])
    assert not same(trainer.seen[0], trainer.seen[best])
    assert same(sd.unet.state_dict(), trainer.seen[best])


def test_header_says_where_it_comes_from(done, world):
    folder, trainer = done
    header = read_metadata(folder / "best.safetensors")
    expected = {"base": str(world / "base"), "token": "[V]", "noun": "dog", "seed": "0", "version": record.VERSION}
    expected |= {"step": str(trainer.record.best_step), "reward": str(trainer.record.best_reward)}
    expected |= {"lambda_train": "0.0", "lambda_val": "0.3", "beta": "1.0", "lr": "0.001", "guidance": "7.5"}
    expected |= {"prediction_type": trainer.sd.scheduler.config.prediction_type}
    assert {name: header.get(name) for name in expected} == expected


def test_history_has_a_line_a_step_and_a_validation(done):
    lines = [json.loads(line) for line in (done[0] / "best.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], "reward" in row) for row in lines] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ]
    of_step = {
        "step",
        "total",
        "similarity",
        "preference",
        "accuracy",
        "margin",
        "p",
        "label",
        "gradient_norm",
        "seconds",
    }
    of_validation = {"step", "align_i", "align_t", "reward", "seconds"}
    for row in lines:
        assert set(row) == (of_validation if "reward" in row else of_step)
        assert all(math.isfinite(value) for value in row.values())
    for row in validations(lines):  # of averages the two differ, but not by much
        mean = 1 / (0.3 / row["align_i"] + 0.7 / row["align_t"])
        assert row["reward"] == pytest.approx(mean, abs=0.01)


def test_film_strip_has_a_row_a_validation(done):
    folder, trainer = done
    assert [(step, len(row)) for step, _, row in trainer.record.strip] == [(0, 8), (2, 8), (4, 8)]
    arguments = (trainer.subject.training_prompts, trainer.photos)
    page = film_strip(*arguments, trainer.record.strip, trainer.record.best_step)
    assert Image.open(folder / "best.png").tobytes() == page.tobytes()
    assert page.height - film_strip(*arguments, trainer.record.strip[:2], 2).height >= 16
    assert page.tobytes() != film_strip(*arguments, trainer.record.strip, None).tobytes()  # the kept row is marked


def test_ckpt_moves_everything(run, tmp_path):
    assert run("--ckpt", "new/deep/max.1.safetensors", "--steps", 1) == 0
    names = ["max.1.jsonl", "max.1.png", "max.1.safetensors"]
    assert files_in(tmp_path) == ["new", "new/deep", *(f"new/deep/{name}" for name in names)]


# ---------------------------------------------------------------------------------------------- the method


def test_only_the_unet_learns(done):
    _, trainer = done
    for network, before in zip(trainer.frozen, trainer.before, strict=True):
        assert same(network.state_dict(), before)
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert trainer.base_unet is trainer.frozen[0] and trainer.unet is not trainer.base_unet
    assert all(parameter.requires_grad for parameter in trainer.unet.parameters())
    moved = [not torch.equal(tensor, trainer.seen[0][name]) for name, tensor in trainer.seen[4].items()]
    assert all(moved)
    assert same(trainer.seen[0], trainer.before[0])


def test_first_step_has_margin_zero(done):
    """θ = θ₀, so Δ is 0, the preference term is log 2 and no sign agrees with a label."""
    first = history(done[0])[1]
    assert first["margin"] == 0 and first["accuracy"] == 0
    assert first["preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert history(done[0])[2]["margin"] != 0


def test_every_validation_has_the_same_seeds_and_the_negatives_have_others(done):
    (drawer, prompts, seeds, *_), *scored = done[1].draws
    assert drawer == "θ₀" and len(set(seeds)) == len(prompts) == NEGATIVES
    assert [scored[0][:3]] * 3 == [draw[:3] for draw in scored]
    assert scored[0][:2] == ("θ", prompts) and set(scored[0][2]).isdisjoint(seeds)
    trainer, asked = done[1], []  # nor has another --seed's
    trainer = SimpleNamespace(args=SimpleNamespace(**vars(trainer.args) | {"seed": 1}), at_once=8)
    trainer.sd = SimpleNamespace(generate=lambda prompts, seeds, *how, **options: asked.append(set(seeds)) or [])
    for place in (train.NEGATIVES, train.VALIDATION):
        train.Trainer.draw(trainer, prompts, place, "")
    assert len(set(seeds) | set(scored[0][2]) | asked[0] | asked[1]) == 4 * NEGATIVES
    assert len({row["reward"] for row in validations(history(done[0]))}) == 3


@pytest.fixture(scope="module")
def first_step(world, tmp_path_factory):
    """The weights after one step."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(train, patch, "--subject", world / "dog", "--base", world / "base", *QUICK, "--steps", 1) == 0
    return load_file(folder / "best.safetensors")


@pytest.mark.parametrize(
    "option",
    [
        *[("--lr", 1e-4), ("--batch", 2), ("--guidance", 2)],
        *[("--solver-steps", 2), ("--seed", 1), ("--token", "qzx"), ("--noun", "can"), ("--no-live",)],
    ],
    ids=lambda option: option[0],
)
def test_every_setting_matters(run, tmp_path, first_step, option):
    assert run("--steps", 1, *option) == 0
    assert not same(load_file(tmp_path / "best.safetensors"), first_step)


def test_lambda_val_decides_what_is_kept(run, tmp_path, done):
    assert run("--lambda-val", 1) == 0
    rows, plain = validations(history(tmp_path)), validations(history(done[0]))
    assert [row["reward"] for row in rows] == pytest.approx([row["align_i"] for row in rows])
    assert [row["align_i"] for row in rows] == [row["align_i"] for row in plain]  # the steps are the same
    assert rows[0]["reward"] != plain[0]["reward"]


def test_v_prediction_base(run, tmp_path, monkeypatch):
    base = write_base(tmp_path / "v", "v_prediction")
    scheduler = StableDiffusion.from_pretrained(base).scheduler
    inputs, targets = [], []
    loss = train.denoising_loss
    monkeypatch.setattr(train, "denoising_loss", lambda p, target: targets.append(target) or loss(p, target))
    spy(monkeypatch, type(scheduler), "target", lambda self, *args: inputs.append(args))
    assert run("--base", base, "--steps", 2) == 0
    for (x_0, eps, t), target in zip(inputs, targets[::2], strict=True):
        assert torch.allclose(target, scheduler.velocity(x_0, eps, t)) and not torch.allclose(target, eps, atol=0.1)
    assert history(tmp_path)[1]["margin"] == 0


# ---------------------------------------------------------------------------------------------- again, and on


def interrupt_at(patch, step, error=KeyboardInterrupt):
    original = Watched.step

    def stop(self, now):
        if now == step:
            raise error
        return original(self, now)

    patch.setattr(Watched, "step", stop)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(run, done, tmp_path, capsys, at):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, at)
        assert run() == 130
    out = capsys.readouterr().out
    kept = at > 2
    assert files_in(tmp_path) == sorted([*(RESULT if kept else RESULT[:2]), STATE])
    assert ("interrupted: kept step 2" if kept else "interrupted: nothing was kept") in out and "--resume" in out
    if kept:
        assert same(load_file(tmp_path / "best.safetensors"), done[1].seen[2])
    assert run("--resume") == 0
    assert f"going on after step {2 if kept else 0}" in capsys.readouterr().out
    assert files_in(tmp_path) == RESULT
    assert same(Watched.last.unet.state_dict(), done[1].unet.state_dict())
    assert same_files(tmp_path, done[0])


def test_interrupted_while_the_checkpoint_is_written_tells_what_is_there(run, tmp_path, monkeypatch, capsys):
    save, stops = record.save_tensors, iter([True, False, True])

    def stop(*arguments):
        if next(stops):
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(record, "save_tensors", stop)
    assert run("--keep-last") == 130  # at step 2
    assert "nothing was kept" in capsys.readouterr().out and not (tmp_path / "best.safetensors").exists()
    assert run("--keep-last") == 130  # at step 4
    assert "interrupted: kept step 2 in" in capsys.readouterr().out
    assert read_metadata(tmp_path / "best.safetensors")["step"] == "2"


def test_a_large_state_is_written_more_rarely_and_resumes_as_well(run, tmp_path, monkeypatch, capsys):
    """The weights in the file are then those of a later validation than the state's."""
    options = ("--validate-every", 1, "--keep-last")
    assert run(*options, "--ckpt", "whole/best.safetensors") == 0
    size = 3 * sum(tensor.nbytes for tensor in load_file(tmp_path / "whole" / "best.safetensors").values())
    monkeypatch.setattr(record, "PAUSE", 150 / size)
    clock = iter(range(0, 10_000, 100))  # 100 s pass between two looks
    monkeypatch.setattr(record, "time", SimpleNamespace(time=lambda: next(clock)))
    (tmp_path / STATE).write_text("of an older run", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2)
        assert run(*options) == 130
        assert torch.load(tmp_path / STATE)["step"] == 0  # at once: a checkpoint without a state is of a finished run
        assert "kept step 1" in (out := capsys.readouterr().out) and "--resume goes on after step 0" in out
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4)
        assert run(*options) == 130
        assert torch.load(tmp_path / STATE)["step"] == 2
        assert "kept step 3" in (out := capsys.readouterr().out) and "--resume goes on after step 2" in out
        interrupt_at(patch, 3)
        assert run(*options, "--resume") == 130
        assert "kept step 3" in capsys.readouterr().out
    assert run(*options, "--resume") == 0
    assert "going on after step 2" in capsys.readouterr().out
    assert same_files(tmp_path, tmp_path / "whole")


@pytest.fixture
def interrupted(run, tmp_path):
    """A folder whose run was interrupted at step 3."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 3)
        assert run() == 130
    return tmp_path


def test_resume_may_go_further(run, interrupted):
    assert run("--resume", "--steps", 5, "--patience", 9) == 0
    assert [row["step"] for row in validations(history(interrupted))] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    "changed",
    [("--lr", 1e-4), ("--seed", 1), ("--beta", 2), ("--noun", "cat"), ("--validate-every", 3), ("--lambda-val", 0.5)],
    ids=lambda changed: changed[0],
)
def test_resume_with_other_settings_is_refused(run, interrupted, capsys, changed):
    before = {path: path.read_bytes() for path in interrupted.iterdir()}
    capsys.readouterr()
    assert run("--resume", *changed) == 2
    assert changed[0].strip("-").replace("-", "_") in error_line(capsys)
    assert {path: path.read_bytes() for path in interrupted.iterdir()} == before


def test_resume_with_other_photos_of_the_same_names_is_refused(run, interrupted, world, tmp_path_factory, capsys):
    photos = Path(shutil.copytree(world / "dog", tmp_path_factory.mktemp("other") / "dog"))
    Image.new("RGB", (20, 20), "red").save(photos / "1.png")
    assert run("--resume", "--subject", photos) == 2
    assert "'1.png'" in error_line(capsys)


def test_resume_knows_a_base_by_what_it_holds(run, interrupted, base, capsys):
    """Where it lies is nothing; after a pull that changed its weights the run would be another."""
    tensors = load_file(base / "vae" / WEIGHTS)
    before = (base / "vae" / WEIGHTS).read_bytes()
    save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, base / "vae" / WEIGHTS)
    capsys.readouterr()
    assert run("--resume", "--base", base, "--align", base / "reward") == 2
    line = error_line(capsys)
    assert "other settings (base " in line and "align" not in line
    (base / "vae" / WEIGHTS).write_bytes(before)
    assert run("--resume", "--base", base) == 0


def test_a_hidden_file_in_the_base_makes_no_other_run(run, done, interrupted, base):
    """Finder leaves one in a folder that it shows."""
    for part in ("unet", "reward"):
        (base / part / ".DS_Store").write_bytes(b"x")
    try:
        assert run("--resume") == 0
    finally:
        for part in ("unet", "reward"):
            (base / part / ".DS_Store").unlink()
    assert same_files(interrupted, done[0])


def test_a_state_of_another_device_resumes(run, done, interrupted):
    """Apple's GPUs have another memory layout than the CPU, and no fused AdamW: one keeps what the state says."""
    state = torch.load(interrupted / STATE)
    for averages in state["optimizer"]["state"].values():
        averages |= {name: averages[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
        assert averages["step"].device.type == "cpu"
    for group in state["optimizer"]["param_groups"]:
        assert group["fused"]
        group["fused"] = False
    torch.save(state, interrupted / STATE)
    assert run("--resume") == 0
    optimizer = Watched.last.optimizer
    assert all(group["fused"] for group in optimizer.param_groups)
    for weight, averages in optimizer.state.items():
        assert averages["exp_avg"].stride() == averages["exp_avg_sq"].stride() == weight.stride()
    assert same_files(interrupted, done[0])


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_state_does_not_give_away_what_came_into_the_results_place(run, interrupted, tmp_path, capsys, resume):
    """Such as an export of sample.py, which is no result of train.py's."""
    save_file({"x": torch.zeros(1)}, tmp_path / "best.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert run(*resume) == 2
    assert "best.safetensors is not train.py's" in error_line(capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_without_the_weights_that_were_kept_is_refused(run, interrupted, capsys):
    state = (interrupted / STATE).read_bytes()
    (interrupted / "best.safetensors").rename(interrupted / "elsewhere")
    assert run("--resume") == 2
    assert "best.safetensors is missing" in error_line(capsys) and (interrupted / STATE).read_bytes() == state


def test_a_state_of_the_version_before_and_other_speed_are_welcome(run, done, interrupted, monkeypatch):
    path = interrupted / STATE
    state = torch.load(path)
    torch.save(state | {"method": {}, "run": state["run"] | {"compile": "False"}}, path)
    monkeypatch.setattr(machine, "compile_networks", lambda *networks: None)
    assert run("--resume", "--compile") == 0
    assert same_files(interrupted, done[0])


@pytest.mark.parametrize("spoil", ["empty", "cut", "text", "other", "lacking", "misshapen"])
def test_broken_state_is_refused(run, interrupted, capsys, spoil):
    path = interrupted / STATE
    state, data = torch.load(path), path.read_bytes()
    if spoil in ("empty", "cut", "text"):
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "text": b"not a state"}[spoil])
    else:
        lacking = {name: value for name, value in state.items() if name != "history"}
        misshapen = state | {"unet": {name: tensor[:1] for name, tensor in state["unet"].items()}}
        torch.save({"other": [1, 2, 3], "lacking": lacking, "misshapen": misshapen}[spoil], path)
    capsys.readouterr()
    assert run("--resume") == 2
    assert STATE in error_line(capsys)


def test_resume_to_fewer_steps_than_are_done_is_refused_and_loses_nothing(run, interrupted, capsys):
    before = {path: path.read_bytes() for path in interrupted.iterdir()}
    capsys.readouterr()
    assert run("--resume", "--steps", 1) == 2
    assert "2 steps already" in error_line(capsys)
    assert {path: path.read_bytes() for path in interrupted.iterdir()} == before


def test_a_new_run_over_an_interrupted_one_says_so(run, interrupted, capsys):
    capsys.readouterr()
    assert run() == 0
    assert f"{STATE} is of an interrupted run" in capsys.readouterr().out


def test_a_new_run_over_a_result_says_what_it_replaces(run, tmp_path, capsys):
    assert run("--steps", 2) == 0
    assert "replaced" not in capsys.readouterr().out
    assert run("--steps", 2) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "will be replaced" in line)
    assert all(name in line for name in RESULT)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", ["best.png", "best.safetensors", "best.jsonl"])
def test_what_no_run_has_written_is_not_replaced(run, tmp_path, capsys, name, exported):
    """A picture of the user's, and a model: A1111's --ckpt is the base. One that was exported has a result's header."""
    tensors = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    header = {"version": "0.1.0", "noun": "dog", "step": "40", "rpo.config": "{}"} if exported else {"format": "pt"}
    save_file(tensors, tmp_path / name, header)
    if name == "best.jsonl":
        (tmp_path / name).write_text('{"file": "1.jpg", "text": "a dog"}\n' if exported else "", encoding="utf-8")
    before = (tmp_path / name).read_bytes()
    assert run() == 2
    assert name in (line := error_line(capsys)) and "--ckpt" in line
    assert files_in(tmp_path) == [name] and (tmp_path / name).read_bytes() == before


def test_two_runs_do_not_write_one_result(run, tmp_path, capsys):
    with record.alone(Path("best.safetensors")):  # as in another terminal
        assert run() == 2
        assert "another run is writing best.safetensors" in (line := error_line(capsys)) and "--ckpt" in line
        assert run("--ckpt", "other.safetensors") == 0
    assert run() == 0  # the lock of a run that has ended, however, is gone
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_run_that_breaks_off_says_what_it_has_kept(run, tmp_path, monkeypatch, capsys):
    step = Watched.step
    monkeypatch.setattr(record, "PAUSE", 0)
    for error, hint in ((OSError("disk gone"), "--resume goes on after step 2"), (FloatingPointError("nan"), "again")):

        def fails(self, n, error=error):
            if n == 4:
                raise error
            return step(self, n)

        monkeypatch.setattr(Watched, "step", fails)
        assert run() == 2
        told = capsys.readouterr()
        assert str(error) in told.err.splitlines()[-1]
        assert "kept step 2" in told.out and told.out.splitlines()[-1].endswith(hint)


def test_interrupted_while_drawing_negatives_promises_nothing(run, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "draw", interrupt)
    assert run() == 130
    assert "start again" in capsys.readouterr().out
    assert files_in(tmp_path) == []


def test_a_full_gpu_is_one_line(run, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Trainer, "prepare", full)
    assert run() == 2
    assert "--batch" in error_line(capsys)


def test_nothing_to_resume(run, tmp_path, capsys):
    assert run("--resume") == 2
    assert "nothing to resume" in error_line(capsys)
    assert files_in(tmp_path) == []


def test_interrupted_while_loading(run, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.ALIGN, "from_pretrained", interrupt)
    assert run() == 130
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["best.safetensors", "best.jsonl", "best.png", STATE])
def test_failed_write_leaves_the_old_file_and_says_so(run, done, tmp_path, capsys, monkeypatch, name):
    """The disk fills up when the second run has written the file and is about to rename it."""
    for old in ("best.jsonl", "best.png", STATE):
        (tmp_path / old).write_text("old", encoding="utf-8")
    save_file({"x": torch.zeros(1)}, tmp_path / "best.safetensors", read_metadata(done[0] / "best.safetensors"))
    before, replace = (tmp_path / name).read_bytes(), os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and name in last and "No space left" in last
    assert (tmp_path / name).read_bytes() == before
    assert files_in(tmp_path) == sorted([*RESULT, STATE])


def test_what_a_killed_run_left_half_written_goes_and_nothing_else(run, tmp_path):
    left = [f".best.{ending}.1234" for ending in ("safetensors", "jsonl", "png", "state.pt")]
    others = [".best.1234", ".best.png.old", ".best.txt.1234", ".other.png.1234"]
    for name in (*left, *others):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert run() == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == others


def test_killed_while_writing_the_state_resumes_from_the_one_before(run, done, tmp_path, monkeypatch):
    save, saved = torch.save, []

    def half(state, path):
        saved.append(state["step"])
        if state["step"] == 4:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(state, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", half)
        assert run() == 130
    assert saved == [0, 2, 4] and torch.load(tmp_path / STATE)["step"] == 2
    assert files_in(tmp_path) == sorted([*RESULT, STATE])
    assert run("--resume") == 0
    assert same_files(tmp_path, done[0])


def test_library_errors_while_writing_are_one_line(run, tmp_path, capsys, monkeypatch):
    def full(state, path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    assert run() == 2
    assert "file write failed" in capsys.readouterr().err.splitlines()[-1]
    assert STATE not in files_in(tmp_path)


# ---------------------------------------------------------------------------------------------- when it stops


@pytest.fixture
def rewards(monkeypatch):
    """Make the validations score what one likes; their first is the base's."""

    def script(*values):
        left = list(values)

        def mean(align_i, align_t, lam):  # the validation's λ is 0.3; the labels' is 0
            return torch.tensor([left.pop(0)]) if lam == 0.3 else lambda_harmonic(align_i, align_t, lam)

        monkeypatch.setattr(train, "MEANS", {"harmonic": mean})

    return script


def test_patience_stops_early_and_keeps_the_best(run, tmp_path, capsys, rewards):
    rewards(0.2, 0.3, 0.4, 0.35, 0.4, 0.9)  # equal is not better
    assert run("--steps", 9, "--validate-every", 1, "--patience", 2) == 0
    assert [row["step"] for row in validations(history(tmp_path))] == [0, 1, 2, 3, 4]
    assert read_metadata(tmp_path / "best.safetensors")["step"] == "2"
    assert same(load_file(tmp_path / "best.safetensors"), Watched.last.seen[2])
    out = capsys.readouterr().out
    assert "stopped: 2 validations" in out and "kept step 2" in out and "NOT BETTER" not in out
    assert files_in(tmp_path) == RESULT


def test_without_patience_it_goes_to_the_end(run, tmp_path, capsys, rewards):
    rewards(0.9, 0.3, 0.2, 0.1)
    assert run("--steps", 5, "--validate-every", 2) == 0
    assert [row["step"] for row in validations(history(tmp_path))] == [0, 2, 4, 5]
    assert read_metadata(tmp_path / "best.safetensors")["step"] == "2"  # the base is no result, even if it was better
    assert "NOT BETTER" in capsys.readouterr().out


def test_patience_counts_across_an_interruption(run, tmp_path, rewards):
    rewards(0.2, 0.5, 0.4, 0.3, 0.9)
    options = ("--steps", 9, "--validate-every", 1, "--patience", 2)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(*options) == 130
    assert run(*options, "--resume") == 0
    assert [row["step"] for row in validations(history(tmp_path))] == [0, 1, 2, 3]


@pytest.mark.parametrize(("every", "told"), [(4, "the loss is"), (1, "prediction is not finite")])
def test_loss_or_picture_that_is_no_number_ends_the_run(run, tmp_path, capsys, every, told):
    assert run("--lr", 1e30, "--validate-every", every) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert told in last and "--lr" in last
    assert "--resume goes on" not in out  # it would diverge again
    assert "best.safetensors" not in files_in(tmp_path)


# ---------------------------------------------------------------------------------------------- settings


@pytest.fixture
def settings(run, monkeypatch, capsys, world):
    """Call train.py up to where the settings are known: they, and what was printed."""

    class Stop(Exception):
        pass

    def stop(args, *rest):
        stop.args = args
        raise Stop

    def go(base, *arguments):
        monkeypatch.setattr(train, "Trainer", stop)
        with pytest.raises(Stop):
            call(train, monkeypatch, "--subject", world / "dog", "--base", base, *arguments)
        return stop.args, capsys.readouterr().out

    return go


def test_defaults_are_the_papers(settings, world):
    args, out = settings(world / "base")
    expected = {"lr": 5e-6, "batch": 1, "beta": 1, "lambda_train": 0, "lambda_val": 0.3, "guidance": 7.5, "steps": 400}
    expected |= {"images_per_prompt": 4, "validate_every": 40, "solver_steps": 20, "seed": 0, "patience": None}
    expected |= {"token": "[V]", "ckpt": Path("best.safetensors")}
    assert {name: getattr(args, name) for name in expected} == expected
    assert out.count("the paper") == 4


def test_a_base_recommends_and_the_command_line_wins(settings, base):
    (base / "rpo.json").write_text('{"lr": 1e-4, "batch": 2, "guidance": 3}', encoding="utf-8")
    args, out = settings(base, "--batch", 3)
    assert (args.lr, args.batch, args.guidance, args.solver_steps) == (1e-4, 3, 3, 20)
    sources = {line.split()[0]: " ".join(line.split()[2:]) for line in out.splitlines() if line.startswith("  ")}
    assert sources["lr"] == sources["guidance"] == "this base's recommendation"
    assert sources["batch"] == "command line" and sources["solver_steps"] == "our default"


@pytest.mark.parametrize(
    "text",
    ['{"lr": "fast"}', '{"lr": -1}', '{"lr": true}', '{"batch": 1.5}', '{"guidance": []}', '{"lr": NaN}', "[1]", "{"],
)
def test_garbage_in_rpo_json(world, base, tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    (base / "rpo.json").write_text(text, encoding="utf-8")
    assert call(train, monkeypatch, "--subject", world / "dog", "--base", base) == 2
    assert "rpo.json" in error_line(capsys)
    assert files_in(tmp_path) == []


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "option",
    [
        *[("--lambda-train", value) for value in (1.5, -0.1, "nan", "")],
        *[("--lambda-val", value) for value in (1.5, "-inf", "x")],
        *[("--steps", value) for value in (0, -3, 1.5, "many")],
        *[("--lr", value) for value in (0, -1e-4, "nan", "inf", "fast")],
        *[("--beta", 0), ("--guidance", -1), ("--batch", 0), ("--images-per-prompt", 0), ("--solver-steps", 0)],
        *[("--validate-every", 0), ("--patience", 0), ("--seed", -1), ("--seed", 2**63), ("--seed", 0.5)],
        ("--patience", 3, "--keep-last"),
        *[("--device", value) for value in ("abacus", "meta", "cuda:99", "")],
        *[("--ckpt", "best.pt"), ("--ckpt", ""), ("--token", " "), ("--noun", " "), ("--solver-steps", 1001)],
        *[("--nonsense",), ("--step", 3), ("--steps",)],
    ],
    ids=lambda option: " ".join(map(str, option)),
)
def test_bad_option_is_one_line(run, tmp_path, capsys, option):
    assert run(*option) == 2
    line = error_line(capsys)
    assert option[0] in line or option[0].split("-")[-1] in line
    assert len(option) < 2 or "expected one argument" not in line  # -1e-4 is a number, not a flag
    assert files_in(tmp_path) == []


def no_folder(subject):
    shutil.rmtree(subject)


def no_photos(subject):
    for photo in subject.iterdir():
        photo.unlink()


def a_file(subject):
    shutil.rmtree(subject)
    subject.write_text("a file", encoding="utf-8")


def text_called_jpg(subject):
    (subject / "3.jpg").write_text("a text", encoding="utf-8")


def cut_photo(subject):
    data = (subject / "1.png").read_bytes()
    (subject / "1.png").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("spoil", [no_folder, no_photos, a_file, text_called_jpg, cut_photo])
def test_bad_subject_is_one_line(run, world, tmp_path, tmp_path_factory, capsys, spoil):
    subject = Path(shutil.copytree(world / "dog", tmp_path_factory.mktemp("bad") / "dog"))
    spoil(subject)
    assert run("--subject", subject) == 2
    assert str(subject) in error_line(capsys)
    assert files_in(tmp_path) == []


def missing(name):
    def spoil(base):
        shutil.rmtree(base / name) if (base / name).is_dir() else (base / name).unlink()

    return spoil


def cut(name):
    def spoil(base):
        data = (base / name).read_bytes()
        (base / name).write_bytes(data[: len(data) // 2])

    return spoil


def without_a_tensor(base):
    tensors = load_file(base / "unet" / WEIGHTS)
    tensors.pop("conv_in.weight")
    save_file(tensors, base / "unet" / WEIGHTS)


def huge_header(base):
    """A header that claims to be longer than the file."""
    data = bytearray((base / "unet" / WEIGHTS).read_bytes())
    data[:8] = (2**40).to_bytes(8, "little")
    (base / "unet" / WEIGHTS).write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        *[(missing(name), name) for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "reward")],
        *[(missing(name), name) for name in ("unet/config.json", "reward/vocab.txt")],
        *[(missing("reward/model.safetensors"), "reward"), (cut("reward/model.safetensors"), "reward")],
        *[(cut(name), name) for name in (f"unet/{WEIGHTS}", "vae/config.json")],
        *[(without_a_tensor, "conv_in.weight"), (huge_header, f"unet/{WEIGHTS}"), (shutil.rmtree, "base")],
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__qualname__", ""),
)
def test_bad_base_is_one_line(run, base, tmp_path, capsys, spoil, named):
    spoil(base)
    assert run("--base", base) == 2
    assert named in error_line(capsys)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    "ckpt", ["taken.safetensors", "history.safetensors", "file/best.safetensors", "file/a/b.safetensors"]
)
def test_unwritable_result_is_one_line(run, tmp_path, capsys, ckpt):
    """A folder in the place of a file, and a file in the place of a folder (a superuser may write anywhere else)."""
    for folder in ("taken.safetensors", "history.jsonl"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    before = files_in(tmp_path)
    assert run("--ckpt", ckpt) == 2
    assert ckpt.split(".")[0] in error_line(capsys)
    assert files_in(tmp_path) == before


def test_a_result_among_the_photos_is_refused(run, world, tmp_path, capsys):
    before = files_in(world / "dog")
    assert run("--ckpt", world / "dog" / "best.safetensors") == 2
    assert "among the photos" in error_line(capsys)
    assert files_in(world / "dog") == before


def test_full_disk_is_known_before_the_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert run() == 2
    assert "GiB free" in error_line(capsys)
    assert files_in(tmp_path) == []


def test_resuming_wants_room_only_for_what_is_not_there_yet(run, interrupted, monkeypatch, capsys):
    """The checkpoint and the state are replaced: beside them only a new state is needed, 12 bytes a weight."""
    weights = load_file(interrupted / "best.safetensors").values()
    new_state = 12 * sum(tensor.numel() for tensor in weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, new_state // 2))
    assert run("--resume") == 2
    assert "GiB free" in error_line(capsys)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, new_state))
    assert run("--resume") == 0


def test_as_a_command_of_its_own(world, tmp_path):
    """The exit status and the streams, as a shell sees them."""
    script = Path(train.__file__)
    command = [sys.executable, script, "--base", world / "base", "--subject", tmp_path / "nothing"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("train.py: error: ")
    assert files_in(tmp_path) == []


def test_a_token_that_leaves_no_room_for_the_prompt_is_told(run, capsys):
    assert run("--token", "z" * 90, "--steps", 1) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 9 and "zz dog'" in warnings[0]  # the instance prompt and the training prompts
    assert run("--steps", 1) == 0
    assert "warning" not in capsys.readouterr().err


def test_resolution(run, tmp_path, capsys):
    """Photos, negatives and validation images have it, and what draws with the result takes it from the header."""
    assert run("--resolution", 24) == 0  # the base's own is 16
    trainer = Watched.last
    assert {photo.size for photo in trainer.photos} == {(24, 24)}
    assert trainer.ref_posterior[0].shape[2:] == trainer.drawn_posterior[0].shape[2:] == (12, 12)
    assert {image.size for _, _, images in trainer.record.strip for image in images} == {(24, 24)}
    assert read_metadata(tmp_path / "best.safetensors")["resolution"] == "24"
    capsys.readouterr()
    assert run("--resolution", 25) == 2
    assert "multiple of 2" in error_line(capsys)
