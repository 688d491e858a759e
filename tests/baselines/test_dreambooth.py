"""DreamBooth and `python -m baselines`. Formulas by hand in float64, tolerance 1e-12: the rounding of float64."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import call, error_line, files_in
from trainings import copied, history, same, same_results, steps, stopped, watched

import baselines.__main__
import sample
import train
from baselines.dreambooth import DreamBooth, dreambooth_loss
from model.files.single_file import read_single_file
from model.files.tensors import read_metadata
from model.files.write import save_tensors
from model.stable_diffusion import StableDiffusion
from support import randomness

ROOT = Path(train.__file__).parent
FEW = ("--class-images", 3)
REF, CLASS = [0.5, 0.2, 0.9], [0.4, 0.7, 0.1]


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_value_and_gradient_by_hand(weight):
    ref, prior = (torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in (REF, CLASS))
    loss = dreambooth_loss(ref, prior, weight)
    assert loss.similarity.item() == pytest.approx(sum(REF) / 3, abs=1e-12)
    assert loss.prior.item() == pytest.approx(sum(CLASS) / 3, abs=1e-12)
    assert loss.total.item() == pytest.approx((sum(REF) + weight * sum(CLASS)) / 3, abs=1e-12)
    loss.total.backward()
    assert ref.grad.tolist() == pytest.approx([1 / 3] * 3, abs=1e-12)
    assert prior.grad.tolist() == pytest.approx([weight / 3] * 3, abs=1e-12)
    assert dreambooth_loss(ref, prior) == dreambooth_loss(ref, prior, 1.0)


# ---------------------------------------------------------------------------------------------- a run


Watched = watched(DreamBooth)


def test_a_run_learns_the_photos_and_the_class(run, world, tmp_path):
    assert run(*FEW, "--prior-weight", 0.5, "--batch", 4, "--ckpt", "here.safetensors", method=Watched) == 0
    trainer, rows = Watched.last, steps(history(tmp_path, "here.jsonl"))
    stream, prompts, images = trainer.drawn[0]
    assert stream == randomness.NEGATIVES and prompts == ["a photo of a dog"] * 3
    assert [prompts for _, prompts, _ in trainer.drawn[1:]] == [trainer.prompts] * 3  # the validations are RPO's
    assert trainer.machine.base_unet is trainer.sd.unet is None  # θ₀'s memory is free
    for row in rows:
        assert set(row) == {"step", "total", "similarity", "prior", "gradient_norm"}
        assert row["total"] == pytest.approx(row["similarity"] + 0.5 * row["prior"], rel=1e-5)  # fp32

    sd, (batch, again, other) = trainer.sd, (trainer.batch(step) for step in (1, 1, 2))
    assert all(map(torch.equal, batch[:9], again[:9])) and not any(map(torch.equal, batch[:4], other[:4]))
    assert all(map(torch.equal, trainer.generated_latents, sd.encode_images(images)))
    assert torch.equal(batch.c, sd.encode_prompts(["a photo of [V] dog"]).expand(4, -1, -1))
    assert torch.equal(batch.c_class, sd.encode_prompts(["a photo of a dog"]).expand(4, -1, -1))
    assert not torch.equal(batch.eps_ref, batch.eps_class) and not torch.equal(batch.t_ref, batch.t_class)

    unet = StableDiffusion.from_pretrained(world / "base").unet  # the first step again, with the base's U-Net
    pictures = {"similarity": (batch.x_ref, batch.eps_ref, batch.t_ref, batch.c)}
    pictures["prior"] = batch.x_class, batch.eps_class, batch.t_class, batch.c_class
    for name, (x_0, eps, t, context) in pictures.items():
        error = (unet(sd.scheduler.add_noise(x_0, eps, t), t, context) - eps).square().mean().item()
        assert rows[0][name] == pytest.approx(error, rel=1e-5)  # fp32


# ---------------------------------------------------------------------------------------------- the text encoder


BOTH = (*FEW, "--train-text-encoder", "--keep-last", "--ckpt", "both/best.safetensors")


def test_the_checkpoint_and_its_export_hold_the_text_encoder_too(run, world, tmp_path, monkeypatch):
    """What it draws is what the last validation drew. A checkpoint without one has the base's again."""
    assert run(*BOTH, method=Watched) == 0
    trainer, ckpt = Watched.last, tmp_path / "both" / "best.safetensors"
    sd = StableDiffusion.from_pretrained(world / "base")
    base, texts = copied(sd.text_encoder.state_dict()), ["a photo of [V] dog", ""]
    before = sd.encode_prompts(texts)
    sd.load_checkpoint(ckpt)
    assert same(sd.unet.state_dict(), trainer.machine.unet.state_dict())
    assert same(sd.text_encoder.state_dict(), trainer.sd.text_encoder.state_dict())
    assert all((tensor != base[name]).any() for name, tensor in sd.text_encoder.state_dict().items())
    assert not torch.isclose(sd.encode_prompts(texts), before, atol=1e-3).all()
    stream, prompts, images = trainer.drawn[-1]
    assert stream == randomness.VALIDATION
    seeds = randomness.picture_seeds(0, stream, len(prompts))
    assert sd.generate(prompts, seeds, steps=1) == images  # --solver-steps 1, as the run

    assert call(sample, monkeypatch, "--ckpt", ckpt, "--export-single", tmp_path / "whole.safetensors") == 0
    _, tensors = read_single_file(tmp_path / "whole.safetensors")["text_encoder"]
    assert same(tensors, {name: tensor.half() for name, tensor in sd.text_encoder.state_dict().items()})

    plain = {name: tensor for name, tensor in load_file(ckpt).items() if not name.startswith("text_encoder.")}
    save_tensors(plain, other := ckpt.with_name("plain.safetensors"))
    for path in (other, ckpt, other):
        sd.load_checkpoint(path)
    assert same(sd.text_encoder.state_dict(), base) and torch.equal(sd.encode_prompts(texts), before)
    assert same(sd.unet.state_dict(), plain)


def test_a_step_trains_both_by_one_adamw(run, world, tmp_path):
    """The first step again, with torch alone. It has the gradient's sign, so rounding turns a few weights around."""
    assert run(*BOTH, "--steps", 1, "--lr", 0.01, method=Watched) == 0
    trainer, sd = Watched.last, StableDiffusion.from_pretrained(world / "base")
    parameters = [*sd.unet.requires_grad_(True).parameters(), *sd.text_encoder.requires_grad_(True).parameters()]
    adamw, batch = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01, fused=True), trainer.batch(1)
    total = 0
    for prompt, x_0, eps, t in (
        ("a photo of [V] dog", batch.x_ref, batch.eps_ref, batch.t_ref),
        ("a photo of a dog", batch.x_class, batch.eps_class, batch.t_class),
    ):
        context = sd.text_encoder(sd.tokenizer([prompt]))
        total = total + (sd.unet(sd.scheduler.add_noise(x_0, eps, t), t, context) - eps).square().mean()
    total.backward()
    norm, row = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item(), steps(history(tmp_path / "both"))[0]
    assert (row["total"], row["gradient_norm"]) == pytest.approx((total.item(), norm), rel=1e-4)
    adamw.step()
    for ours, theirs in ((trainer.machine.unet, sd.unet), (trainer.sd.text_encoder, sd.text_encoder)):
        apart = torch.cat(
            [(a - b).abs().flatten() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
        )
        assert (apart < 1e-4).float().mean() > 0.98
    averages = torch.cat([each["exp_avg"].flatten() for each in trainer.optimizer.adamw.state.values()])
    assert norm > 1 and averages.norm().item() == pytest.approx(0.1, rel=1e-4)  # 1 - β₁ of a gradient clipped to 1


def test_resumed_is_as_if_uninterrupted(run, tmp_path):
    """The base's text encoder draws the class images again, not the trained one."""
    assert run(*BOTH, method=DreamBooth) == 0
    options = (*BOTH, "--ckpt", "best.safetensors")
    assert run(*options, method=stopped(4, method=DreamBooth)) == 130
    assert run(*options, "--resume", method=DreamBooth) == 0
    assert same_results(tmp_path, tmp_path / "both")


def test_lora_with_the_text_encoder_is_refused(run, tmp_path, capsys):
    assert run(*BOTH, "--lora-rank", 2, baseline="dreambooth") == 2
    assert "text encoder too: leave one out" in error_line(capsys)
    assert files_in(tmp_path) in ([], ["both"])


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_lists_the_baselines(monkeypatch, capsys, tmp_path):
    for words, status in (((), 2), (("magic",), 2), (("--help",), 0)):
        assert call(baselines.__main__, monkeypatch, *words) == status
        out, err = capsys.readouterr()
        assert "{dpg,dreambooth,release}" in (err if status else out) and not (out if status else err)
    command = [sys.executable, "-m", "baselines", "dreambooth", "--subject", "nothing"]
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert re.fullmatch("python -m baselines dreambooth: error: nothing .*\n", bad.stderr)
    assert call(baselines.__main__, monkeypatch, "dreambooth", "--subject", tmp_path, "--prior-weight", -1) == 2
    assert capsys.readouterr().err.startswith("python -m baselines dreambooth: error: argument --prior-weight")


def test_flags_and_default_result(run, tmp_path):
    """--class-images says how many are drawn."""
    assert run("--class-images", 2, "--steps", 1, baseline="dreambooth") == 0
    header = read_metadata(tmp_path / "dreambooth.safetensors")
    expected = {"method": "dreambooth", "class_images": "2", "prior_weight": "1.0", "steps": "1", "noun": "dog"}
    assert header.items() >= expected.items() and "beta" not in header
