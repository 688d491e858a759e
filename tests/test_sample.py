"""sample.py on a tiny random base: which base, which prompts, which files, the same pictures again, and bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import UNET, WEIGHTS, call, error_line, files_in, write_base, write_photos

import sample
import train
from model.files.config import config_from
from model.files.write import save_tensors
from model.stable_diffusion import StableDiffusion
from model.unet import UNet, UNetConfig
from support import flags

QUICK = ("--steps", 1, "--n", 1)
TRAINING = ("--subject", "dog", "--steps", 2, "--validate-every", 1, "--solver-steps", 1, "--images-per-prompt", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("world") / "base")


@pytest.fixture(scope="module")
def ckpt(base, tmp_path_factory):
    """As train.py writes it: other weights than the base's, and a header."""
    tensors = {name: tensor.float() * 1.5 for name, tensor in load_file(base / "unet" / WEIGHTS).items()}
    header = {"base": str(base), "token": "[V]", "noun": "dog", "step": "40", "guidance": "3.0"}
    path = tmp_path_factory.mktemp("result") / "best.safetensors"
    save_tensors(tensors, path, header)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call sample.py in an empty folder; the last of two equal options counts."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(sample, monkeypatch, *QUICK, *arguments)


@pytest.fixture
def asked(monkeypatch):
    """What `generate` is called with, and with which weights."""
    seen = {}
    generate = StableDiffusion.generate

    def note(self, prompts, seeds, **options):
        seen.update(options, prompts=prompts, seeds=seeds, unet=self.unet.state_dict())
        return generate(self, prompts, seeds, **options)

    monkeypatch.setattr(StableDiffusion, "generate", note)
    return seen


def pixels(folder):
    return {path.name: Image.open(path).tobytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- what it draws


def test_checkpoint_alone_says_base_subject_and_guidance(run, ckpt, asked, tmp_path):
    assert run("--ckpt", ckpt) == 0
    places = ["in-the-snow", "on-the-beach", "on-the-Moon"]
    names = ["a-photo-of-a-V-dog-0.png", *(f"a-V-dog-{place}-0.png" for place in places), "grid.png"]
    assert files_in(tmp_path / "outputs") == sorted(names)
    assert asked["prompts"][0] == "a photo of a [V] dog" and asked["guidance"] == 3
    assert torch.equal(asked["unet"]["conv_in.weight"], load_file(ckpt)["conv_in.weight"])


def test_checkpoint_says_the_size(run, ckpt, base, asked, tmp_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "best.safetensors"
    save_file(load_file(ckpt), path, {"base": str(base), "resolution": "24"})
    assert run("--ckpt", path) == 0 and asked["size"] == 24
    assert run("--ckpt", path, "--size", 16) == 0 and asked["size"] == 16


def test_base_alone(run, base, asked, tmp_path, monkeypatch):
    assert run("--base", base) == 0
    assert asked["prompts"][0] == "a photo of a dog" and asked["guidance"] == 7.5
    assert torch.equal(asked["unet"]["conv_in.weight"], load_file(base / "unet" / WEIGHTS)["conv_in.weight"].float())
    before = pixels(tmp_path / "outputs")
    monkeypatch.setattr(flags, "EMBEDDED_BASE", base)  # what is used when nothing is named
    assert run("--out", "again") == 0
    assert pixels(tmp_path / "again") == before


def test_embedded_base_is_found_by_its_name(run, base, ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "EMBEDDED_BASE", base)
    save_tensors(load_file(ckpt), tmp_path / "moved.safetensors", {"base": "weights/toy", "noun": "cat"})
    assert run("--ckpt", "moved.safetensors") == 0
    assert "a-photo-of-a-V-cat-0.png" in files_in(tmp_path / "outputs")


def test_base_recommends_and_the_command_line_wins(run, base, asked, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    (copy / "rpo.json").write_text('{"guidance": 2, "solver_steps": 3, "lr": 1e-4}', encoding="utf-8")
    assert call(sample, monkeypatch, "--base", copy, "--n", 1) == 0
    assert (asked["steps"], asked["guidance"]) == (3, 2)
    assert run("--base", copy, "--guidance", 4) == 0
    assert (asked["steps"], asked["guidance"]) == (1, 4)
    (copy / "rpo.json").unlink()
    assert call(sample, monkeypatch, "--base", copy, "--n", 1) == 0
    assert (asked["steps"], asked["guidance"]) == (20, 7.5)


def test_prompts_seeds_and_grid(run, ckpt, asked, tmp_path):
    prompts = ["a [V] dog", "a [V] dog on the beach"]
    options = [text for prompt in prompts for text in ("--prompt", prompt)]
    assert run("--ckpt", ckpt, *options, "--n", 3, "--seed", 7, "--out", "a/b") == 0
    assert asked["prompts"] == [prompts[0]] * 3 + [prompts[1]] * 3 and asked["seeds"] == [7, 8, 9] * 2
    names = [f"{stem}-{seed}.png" for stem in ("a-V-dog", "a-V-dog-on-the-beach") for seed in (7, 8, 9)]
    assert files_in(tmp_path / "a" / "b") == sorted([*names, "grid.png"])
    drawn = pixels(tmp_path / "a" / "b")
    assert len({drawn[name] for name in names}) == 6
    for name, prompt, seed in zip(names, asked["prompts"], asked["seeds"], strict=True):
        text = Image.open(tmp_path / "a" / "b" / name).text["parameters"]
        assert text.startswith(f"{prompt}\n") and text.endswith(f", Seed: {seed}")
    page = Image.open(tmp_path / "a" / "b" / "grid.png")
    assert page.size == (3 * 20 + 4, 2 * 20 + 4)  # 16 px and a gap of 4
    for i, name in enumerate(names):
        x, y = 4 + i % 3 * 20, 4 + i // 3 * 20
        assert page.crop((x, y, x + 16, y + 16)).tobytes() == drawn[name]


def test_same_command_same_files(run, ckpt, tmp_path):
    for out in ("one", "two"):
        assert run("--ckpt", ckpt, "--n", 2, "--out", out, "--seed", 0) == 0
    assert run("--ckpt", ckpt, "--n", 2, "--out", "three") == 0  # 0 is the default
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two", "three")]
    assert files[0] == files[1] == files[2] and len(files[0]) == 9
    assert run("--ckpt", ckpt, "--n", 2, "--out", "other", "--seed", 5) == 0
    assert pixels(tmp_path / "other")["grid.png"] != pixels(tmp_path / "one")["grid.png"]


def test_options_reach_the_pictures(run, base, tmp_path):
    """Every option that is parsed changes them, but for --batch, which must not."""
    prompt = ("--prompt", "a dog", "--steps", 3)
    assert run("--base", base, *prompt, "--out", "plain") == 0
    plain = pixels(tmp_path / "plain")["a-dog-0.png"]
    for i, option in enumerate([("--guidance", 2), ("--steps", 2), ("--scheduler", "ddim"), ("--scheduler", "ddpm")]):
        assert run("--base", base, *prompt, *option, "--out", f"{i}") == 0
        assert pixels(tmp_path / f"{i}")["a-dog-0.png"] != plain
    assert run("--base", base, *prompt, "--size", 24, "--out", "large") == 0
    assert Image.open(tmp_path / "large" / "a-dog-0.png").size == (24, 24)
    assert run("--base", base, *prompt, "--n", 3, "--batch", 2, "--out", "batch") == 0
    assert pixels(tmp_path / "batch")["a-dog-0.png"] == plain


def test_png_carries_its_settings(run, base, ckpt, tmp_path):
    assert run("--ckpt", ckpt, "--prompt", "a [V] dog, été ❄", "--seed", 3, "--steps", 2) == 0
    text = Image.open(tmp_path / "outputs" / "a-V-dog-t-3.png").text["parameters"]
    prompt, settings = text.split("\n")
    assert prompt == "a [V] dog, été ❄"
    pairs = dict(pair.split(": ") for pair in settings.split(", "))
    expected = {"Steps": "2", "Sampler": "dpm++", "CFG scale": "3", "Seed": "3", "Size": "16x16", "Step": "40"}
    assert pairs == expected | {"Model": "best.safetensors", "Base": "base"}
    assert "été" in Image.open(tmp_path / "outputs" / "grid.png").text["parameters"]
    assert run("--base", base, "--prompt", "x") == 0
    assert "Model: base" in Image.open(tmp_path / "outputs" / "x-0.png").text["parameters"]


def test_braces_are_letters_like_others(run, base, ckpt, tmp_path):
    shutil.copy(ckpt, tmp_path / "{best}.safetensors")
    assert run("--ckpt", "{best}.safetensors", "--prompt", "a {dog}") == 0
    assert "{best}" in Image.open(tmp_path / "outputs" / "a-dog-0.png").text["parameters"]


# ---------------------------------------------------------------------------------------------- odd prompts


def test_too_long_a_prompt_is_drawn_with_a_warning(run, base, tmp_path, capsys):
    prompt = "a dog " * 37 + "on the Moon, with the Statue of Liberty in the background"
    assert run("--base", base, "--prompt", prompt, "--prompt", "a dog") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "Moon, with the Statue of Liberty in the background" in warnings[0]
    assert "a dog" not in warnings[0]
    assert len(files_in(tmp_path / "outputs")) == 3


def test_every_prompt_has_a_file_of_its_own(run, base, tmp_path):
    prompts = ["", "!?", "犬", "../../etc/passwd", "/", "a/b", "a b", "A B", "a-b-2", "x" * 400, "x" * 401, ".", "grid"]
    options = [text for prompt in prompts for text in ("--prompt", prompt)]
    assert run("--base", base, *options) == 0
    files = files_in(tmp_path / "outputs")
    assert len(files) == len(prompts) + 1 and files_in(tmp_path) == ["outputs", *(f"outputs/{name}" for name in files)]
    assert len({name.lower() for name in files}) == len(files) and max(map(len, files)) < 120
    texts = [Image.open(tmp_path / "outputs" / name).text["parameters"] for name in files if name != "grid.png"]
    assert sorted(text.split("\n")[0] for text in texts) == sorted(prompts)


def test_a_prompt_given_twice_is_drawn_once(run, base, asked, tmp_path):
    assert run("--base", base, "--prompt", "a dog", "--prompt", "a dog") == 0
    assert asked["prompts"] == ["a dog"] and files_in(tmp_path / "outputs") == ["a-dog-0.png", "grid.png"]


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "option",
    [
        *[("--steps", value) for value in (0, -3, 1.5, 1001)],
        *[("--n", 0), ("--seed", -1), ("--seed", "x"), ("--guidance", 0), ("--guidance", "nan"), ("--batch", 0)],
        *[("--size", value) for value in (0, 17, "big")],
        *[("--scheduler", "best"), ("--device", "abacus"), ("--device", "meta"), ("--nonsense",), ("--prompt",)],
        *[("--export-single", "x.ckpt"), ("--export-single", ""), ("--ckpt", ""), ("--out", "")],
    ],
    ids=lambda option: " ".join(map(str, option)),
)
def test_bad_option_is_one_line(run, base, tmp_path, capsys, option):
    assert run("--base", base, *option) == 2
    line = error_line(capsys)
    named = {"--n": "--n", "--size": "si"}.get(option[0], option[0].strip("-"))  # --size 17: the picture's side
    assert named in line
    assert files_in(tmp_path) == []


def spoilt(kind, base, ckpt, folder):
    """A checkpoint that cannot be used, and what the message should name."""
    path, data, tensors = folder / f"{kind}.safetensors", ckpt.read_bytes(), load_file(ckpt)
    header = {"base": str(base)}
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "text":
        path.write_text("not weights", encoding="utf-8")
    elif kind == "header":
        path.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    elif kind == "folder":
        path.mkdir()
    elif kind == "lacking":
        tensors.pop("conv_out.weight")
        save_file(tensors, path, header)
    elif kind == "extra":
        save_file(tensors | {"more": torch.zeros(1)}, path, header)
    elif kind == "architecture":
        network = UNet(config_from(UNetConfig, UNET | {"block_out_channels": [8, 16]}))
        save_tensors(network.state_dict(), path, header)
    elif kind == "no base":
        save_file(tensors, path)
    elif kind == "base gone":
        save_file(tensors, path, {"base": "no/such/base"})
    elif kind == "guidance":
        save_file(tensors, path, header | {"guidance": "much"})
    return path


KINDS = [
    "empty",
    "cut",
    "text",
    "header",
    "folder",
    "missing",
    "lacking",
    "extra",
    "architecture",
    "no base",
    "base gone",
]


@pytest.mark.parametrize("kind", [*KINDS, "guidance"])
def test_bad_checkpoint_is_one_line(run, base, ckpt, tmp_path, tmp_path_factory, capsys, kind):
    path = spoilt(kind, base, ckpt, tmp_path_factory.mktemp("spoilt"))
    assert run("--ckpt", path) == 2
    line = error_line(capsys)
    assert str(path) in line
    if "base" in kind:
        assert "--base" in line
    assert files_in(tmp_path) == []


def test_weights_that_are_no_numbers_are_one_line(run, base, ckpt, tmp_path, tmp_path_factory, capsys):
    tensors = load_file(ckpt)
    tensors["conv_out.bias"][0] = float("nan")
    path = tmp_path_factory.mktemp("spoilt") / "nan.safetensors"
    save_file(tensors, path, {"base": str(base)})
    assert run("--ckpt", path) == 2
    assert "not finite" in error_line(capsys)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["no base", "base gone"])
def test_base_can_be_named_where_the_header_does_not_help(run, base, ckpt, tmp_path, kind):
    path = spoilt(kind, base, ckpt, tmp_path)
    assert run("--ckpt", path, "--base", base) == 0
    assert "a-photo-of-a-dog-0.png" in files_in(tmp_path / "outputs")


@pytest.mark.parametrize("name", ["", "unet", "vae", "text_encoder", "tokenizer", "scheduler", f"unet/{WEIGHTS}"])
def test_incomplete_base_is_one_line(run, base, tmp_path, tmp_path_factory, capsys, name):
    copy = Path(shutil.copytree(base, tmp_path_factory.mktemp("copy") / "base"))
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    assert run("--base", copy) == 2
    assert Path(name).parts[0] in error_line(capsys) if name else str(copy) in error_line(capsys)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 78}),
    ],
    ids=str,
)
def test_tampered_base_is_one_line(run, base, tmp_path, tmp_path_factory, capsys, file, change):
    copy = Path(shutil.copytree(base, tmp_path_factory.mktemp("copy") / "base"))
    values = json.loads((copy / file).read_text(encoding="utf-8"))
    (copy / file).write_text(json.dumps(values | change), encoding="utf-8")
    assert run("--base", copy) == 2
    line, (name, value) = error_line(capsys), *change.items()
    assert Path(file).parts[0] in line and str(value) in line and (name in line or name == "model_max_length")
    assert files_in(tmp_path) == []


DAMAGES = {  # a tensor, and how its network is called
    "text_encoder": ("text_model.final_layer_norm.bias", "the text encoder"),
    "vae": ("decoder.conv_out.bias", "the VAE's decoder"),
    "vae encoder": ("encoder.conv_out.bias", "the VAE's encoder"),
    "reward": ("text_projection.bias", "ALIGN"),
    "reward vision": ("vision_model.embeddings.convolution.weight", "ALIGN"),
}


@pytest.fixture
def damaged(base, tmp_path_factory):
    """A copy of the base in which one weight of a part is NaN."""

    def damage(what):
        copy = Path(shutil.copytree(base, tmp_path_factory.mktemp("copy") / "base"))
        (path,) = (copy / what.split()[0]).glob("*.safetensors")
        tensors = load_file(path)
        tensors[DAMAGES[what][0]].view(-1)[0] = float("nan")
        save_file(tensors, path)
        return copy

    return damage


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["text_encoder", "vae"])
def test_damaged_part_is_one_line_and_leaves_the_old_pictures(run, base, damaged, tmp_path, capsys, what):
    assert run("--base", base) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert run("--base", damaged(what)) == 2
    line = error_line(capsys)
    assert DAMAGES[what][1] in line and "not finite" in line and "damaged" in line
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def interrupted(base, tmp_path_factory):
    """A folder with the photos in dog/ and all files of a run of train.py that was interrupted in its second step."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_photos(folder / "dog")
    step = train.Trainer.step

    def twice(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train.Trainer, "step", twice)
        assert call(train, patch, "--base", base, *TRAINING) == 130
    assert {"best.jsonl", "best.png", "best.safetensors", "best.state.pt"} < set(files_in(folder))
    return folder


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("method", ["rpo", "dreambooth"])
def test_damaged_part_ends_a_training_before_it_writes(
    interrupted, damaged, tmp_path, monkeypatch, capsys, what, method
):
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    before = contents(folder)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    options = (*TRAINING, "--method", method, "--class-images", 1)
    assert call(train, monkeypatch, "--base", damaged(what), *options) == 2
    line = error_line(capsys)
    assert DAMAGES[what][1] in line and "not finite" in line and "damaged" in line
    assert contents(folder) == before


def test_a_reward_with_another_models_tokenizer(base, interrupted, tmp_path, tmp_path_factory, monkeypatch, capsys):
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    copy, before = Path(shutil.copytree(base, tmp_path_factory.mktemp("copy") / "base")), contents(folder)
    with open(copy / "reward" / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("zebra\n")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert call(train, monkeypatch, "--base", copy, *TRAINING) == 2
    assert "the tokenizer has" in (line := error_line(capsys)) and "ALIGN reads" in line
    assert contents(folder) == before


def test_garbage_in_rpo_json(run, base, tmp_path, tmp_path_factory, capsys):
    copy = Path(shutil.copytree(base, tmp_path_factory.mktemp("copy") / "base"))
    (copy / "rpo.json").write_text('{"guidance": "strong"}', encoding="utf-8")
    assert run("--base", copy) == 2
    assert "rpo.json" in error_line(capsys)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below", "taken"])
def test_unwritable_output_is_one_line(run, base, tmp_path, capsys, out):
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    (tmp_path / "taken" / "grid.png").mkdir(parents=True)
    before = files_in(tmp_path)
    assert run("--base", base, "--out", out) == 2
    assert out.split("/")[0] in error_line(capsys)
    assert files_in(tmp_path) == before


def test_failed_write_leaves_the_old_picture(run, base, tmp_path, capsys, monkeypatch):
    assert run("--base", base, "--prompt", "a dog") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "outputs").iterdir()}
    capsys.readouterr()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run("--base", base, "--prompt", "a dog", "--guidance", 2) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in (tmp_path / "outputs").iterdir()} == before


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_full_memory_is_one_line(run, base, tmp_path, monkeypatch, capsys, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(StableDiffusion, "generate", full)
    assert run("--base", base) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line and "--batch" in line and "--size" in line
    assert files_in(tmp_path) == []


def test_interrupted(run, base, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusion, "generate", interrupt)
    assert run("--base", base) == 130
    assert files_in(tmp_path) == []


def test_interrupted_keeps_the_batches_that_are_done(run, base, tmp_path, monkeypatch, capsys):
    generate, calls = StableDiffusion.generate, []

    def third_time(self, prompts, *args, **options):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **options)

    wanted = ("--base", base, "--prompt", "a dog", "--prompt", "a Dog", "--n", 3)
    assert run(*wanted, "--out", "whole") == 0
    monkeypatch.setattr(StableDiffusion, "generate", third_time)
    assert run(*wanted, "--batch", 2) == 130
    names = [*(f"a-dog-{i}.png" for i in range(3)), "a-Dog-2-0.png"]
    assert files_in(tmp_path / "outputs") == sorted(names)
    assert "interrupted: 4 of 6 pictures are in outputs" in capsys.readouterr().err
    for name in names:
        kept, whole = (np.asarray(Image.open(tmp_path / out / name)).astype(int) for out in ("outputs", "whole"))
        assert abs(kept - whole).max() <= 1  # a batch of another size: the same to rounding


def test_as_a_command_of_its_own(base, ckpt, tmp_path):
    """The exit status and the streams, as a shell sees them."""

    def shell(*arguments):
        command = [sys.executable, sample.__file__, "--n", "1", "--steps", "1", "--prompt", "a dog", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    bad = shell("--ckpt", spoilt("architecture", base, ckpt, tmp_path))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(bad.stderr.splitlines()) == 1 and bad.stderr.startswith("sample.py: error: ")
    good = shell("--ckpt", ckpt)
    assert good.returncode == 0 and "outputs/grid.png" in good.stdout and "Traceback" not in good.stderr
    assert files_in(tmp_path / "outputs") == ["a-dog-0.png", "grid.png"]


def test_one_file_holds_what_the_folder_and_the_checkpoint_hold(base, ckpt, run, tmp_path):
    """Written with --export-single and read with --base, beside a tokenizer: the same pictures, to half precision."""
    assert run("--ckpt", ckpt, "--export-single", tmp_path / "whole.safetensors") == 0
    assert files_in(tmp_path) == ["whole.safetensors"]
    shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    drawn = []
    for source in (("--ckpt", ckpt), ("--base", tmp_path / "whole.safetensors", "--guidance", 3.0)):
        assert run(*source, "--prompt", "a [V] dog", "--out", tmp_path / str(len(drawn)), "--steps", 3) == 0
        drawn.append(np.asarray(Image.open(tmp_path / str(len(drawn)) / "grid.png")).astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 2  # fp16 has 11 bits: below 1 of 255, but it may fall across a step
    assert drawn[0].std() > 5


def test_what_is_exported_is_not_overwritten(base, ckpt, run, tmp_path, capsys):
    own = Path(shutil.copyfile(ckpt, tmp_path / "own.safetensors"))
    assert run("--ckpt", own, "--export-single", tmp_path / "sub" / ".." / "own.safetensors") == 2
    assert "another name" in error_line(capsys) and own.read_bytes() == ckpt.read_bytes()
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    before = (copy / "vae" / WEIGHTS).read_bytes()
    assert run("--base", copy, "--export-single", copy / "vae" / WEIGHTS) == 2
    assert "another name" in error_line(capsys) and (copy / "vae" / WEIGHTS).read_bytes() == before


def test_an_export_replaces_an_export_and_nothing_else(base, ckpt, run, tmp_path, capsys):
    other = Path(shutil.copyfile(ckpt, tmp_path / "my_cat.safetensors"))  # another run's result
    assert run("--ckpt", ckpt, "--export-single", other) == 2
    assert "another name" in error_line(capsys) and other.read_bytes() == ckpt.read_bytes()
    whole = tmp_path / "whole.safetensors"
    assert [run("--ckpt", ckpt, "--export-single", whole) for _ in range(2)] == [0, 0]
    shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    assert run("--base", whole, "--export-single", whole) == 2
    assert "another name" in error_line(capsys)


def test_a_grid_of_the_users_is_not_replaced(run, ckpt, asked, tmp_path, capsys):
    (tmp_path / "outputs").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "outputs" / "grid.png")
    assert run("--ckpt", ckpt) == 2
    assert "grid.png" in (line := error_line(capsys)) and "--out" in line
    assert files_in(tmp_path / "outputs") == ["grid.png"] and not asked


def test_among_the_users_photos_nothing_is_drawn(run, ckpt, asked, tmp_path, capsys):
    """The next training would take the drawings for photos."""
    photos = tmp_path / "my_dog"
    photos.mkdir()
    Image.new("RGB", (4, 4), "red").save(photos / "IMG_1.JPG", "JPEG")
    assert run("--ckpt", ckpt, "--out", photos) == 2
    assert "IMG_1.JPG" in (line := error_line(capsys)) and "--out" in line
    assert files_in(photos) == ["IMG_1.JPG"] and not asked


def test_where_our_pictures_are_more_may_be_drawn(run, ckpt, tmp_path):
    """An interrupted run leaves no grid.png; and the user may have put something beside a finished one's."""
    assert run("--ckpt", ckpt) == 0
    (tmp_path / "outputs" / "grid.png").unlink()
    assert run("--ckpt", ckpt) == 0
    Image.new("RGB", (4, 4), "red").save(tmp_path / "outputs" / "edited.jpg")
    assert run("--ckpt", ckpt) == 0


def test_a_runs_own_folder_is_no_folder_of_photos(run, ckpt, tmp_path):
    for name in ("best.png", "best.jsonl", "._IMG_1.jpg"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert run("--ckpt", ckpt, "--out", tmp_path) == 0


def test_a_file_without_its_tokenizer_says_where_to_get_it(base, run, tmp_path, capsys):
    assert run("--base", base, "--export-single", tmp_path / "whole.safetensors") == 0
    assert run("--base", tmp_path / "whole.safetensors") == 2
    line = error_line(capsys)
    at = [line.index(words) for words in ("the base it was made from", "Stable Diffusion 1.x", "hf download", "2.x")]
    assert at == sorted(at) and not (tmp_path / "outputs").exists()


def test_a_file_beside_another_models_tokenizer(base, run, tmp_path, capsys):
    assert run("--base", base, "--export-single", tmp_path / "whole.safetensors") == 0
    shutil.copytree(flags.EMBEDDED_BASE / "tokenizer", tmp_path / "tokenizer")
    assert run("--base", tmp_path / "whole.safetensors") == 2
    assert "the text encoder reads" in error_line(capsys) and not (tmp_path / "outputs").exists()
