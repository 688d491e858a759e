"""sample.py on a tiny random base: which base, which prompts, which files, the same pictures again, and bad input."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import WEIGHTS, call, error_line, files_in, parameters, write_ckpt
from trainings import contents

import sample
from model.files.write import save_tensors
from model.lora import add_lora, lora_tensors
from model.stable_diffusion import StableDiffusion
from subject import SKILLS
from support import flags

QUICK = ("--steps", 1, "--n", 1)
DOG = ("--prompt", "a dog")


@pytest.fixture
def ckpt(base, tmp_path_factory):
    return write_ckpt(base, tmp_path_factory.mktemp("result") / "best.safetensors")


@pytest.fixture
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call sample.py in an empty folder; the last of two equal options counts."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(sample, monkeypatch, *QUICK, *arguments)


def prompted(*prompts):
    return [text for prompt in prompts for text in ("--prompt", prompt)]


def pixels(folder):
    return {path.name: Image.open(path).tobytes() for path in Path(folder).iterdir()}


# ---------------------------------------------------------------------------------------------- what it draws


def test_checkpoint_alone_says_base_subject_guidance_and_size(run, base, ckpt, elsewhere):
    assert run("--ckpt", ckpt) == 0
    places = ["in-the-snow", "on-the-beach", "on-the-Moon"]
    names = ["a-photo-of-a-V-dog-0.png", *(f"a-V-dog-{place}-0.png" for place in places), "grid.png"]
    assert files_in(Path("outputs")) == sorted(names)
    drawn = parameters(Path("outputs") / names[0])
    assert drawn["prompt"] == "a photo of a [V] dog" and drawn["CFG scale"] == "3"
    sd = StableDiffusion.from_pretrained(base)
    sd.load_checkpoint(ckpt)
    again = sd.generate(["a photo of a [V] dog"], [0], steps=1, guidance=3)[0]
    difference = np.abs(np.asarray(again).astype(int) - np.asarray(Image.open(Path("outputs") / names[0])))
    assert difference.max() <= 1  # another batch: rounding
    path = write_ckpt(base, elsewhere / "best.safetensors", resolution="24")
    for options, side in (((), 24), (("--size", 16), 16)):
        assert run("--ckpt", path, *DOG, *options, "--out", f"{side}") == 0
        assert Image.open(f"{side}/a-dog-0.png").size == (side, side)


def test_base_alone_is_the_embedded_one(run, base):
    assert run("--base", base) == 0
    drawn = parameters(Path("outputs/a-photo-of-a-dog-0.png"))
    assert (drawn["prompt"], drawn["CFG scale"], drawn["Model"]) == ("a photo of a dog", "7.5", "base")
    for name, options in {"default": (), "named": ("--base", flags.EMBEDDED_BASE)}.items():
        assert run(*options, *DOG, "--size", 64, "--out", name) == 0
    assert pixels("default") == pixels("named")


def test_prompts_seeds_and_grid(run, ckpt):
    prompts = ["a [V] dog", "a [V] dog on the beach"]
    options = prompted(prompts[0], *prompts)  # one that is given twice is drawn once
    assert run("--ckpt", ckpt, *options, "--n", 3, "--seed", 7, "--out", "a/b") == 0
    names = [f"{stem}-{seed}.png" for stem in ("a-V-dog", "a-V-dog-on-the-beach") for seed in (7, 8, 9)]
    assert files_in(Path("a/b")) == sorted([*names, "grid.png"])
    drawn = pixels("a/b")
    assert len({drawn[name] for name in names}) == 6
    for i, name in enumerate(names):
        text = parameters(Path("a/b") / name)
        assert (text["prompt"], text["Seed"]) == (prompts[i // 3], str(7 + i % 3))
    page = Image.open("a/b/grid.png")
    assert page.size == (3 * 20 + 4, 2 * 20 + 4)  # 16 px and a gap of 4
    for i, name in enumerate(names):
        x, y = 4 + i % 3 * 20, 4 + i // 3 * 20
        assert page.crop((x, y, x + 16, y + 16)).tobytes() == drawn[name]
    before = contents(Path("a/b"))
    again = ("--ckpt", ckpt, *options, "--n", 3, "--seed", 7, "--out", "a/b")
    assert run(*again) == 0 and contents(Path("a/b")) == before
    assert run(*again, "--guidance", 2) == 0  # other pictures of the same names: none is replaced
    assert contents(Path("a/b")).items() > before.items() and len(files_in(Path("a/b"))) == 14


def test_skills(monkeypatch, run, base, ckpt):
    """A page a skill, with its prompt under each picture; of the checkpoint's subject, without one of a dog."""
    assert call(sample, monkeypatch, "--steps", 1, "--ckpt", ckpt, "--skill", "expressions") == 0
    prompts = [f"a {mood} [V] dog" for mood in ("depressed", "joyous", "sleepy", "screaming")]
    names, drawn = [f"{text.replace(' [V] ', '-V-').replace(' ', '-')}-0.png" for text in prompts], pixels("outputs")
    page = Image.open("outputs/grid-expressions.png")
    assert drawn.keys() == {*names, "grid-expressions.png"}
    assert parameters(Path(page.filename))["prompt"] == "\n".join(prompts)
    for i, name in enumerate(names):
        left = 4 + 20 * i
        assert page.crop((left, 4, left + 16, 20)).tobytes() == drawn[name]
        label = page.crop((left, 24, left + 16, page.height))
        assert label.convert("L").getextrema()[0] < 80 < 200 < label.convert("L").getextrema()[1]  # ink on paper
    assert run("--ckpt", ckpt, "--skill", "all", "--n", 1, "--out", "all") == 0
    pages = {path.name for path in Path("all").glob("grid*")}
    assert pages == {f"grid-{name}.png" for name in SKILLS}
    assert len(files_in(Path("all"))) == len(pages) + sum(map(len, SKILLS.values()))
    assert run("--base", base, "--skill", "hybrids", "--n", 2, "--out", "base") == 0
    assert Path("base/a-cross-of-a-dog-and-a-lion-1.png").is_file() and len(files_in(Path("base"))) == 4 * 2 + 1


def test_options_reach_the_pictures(run, base):
    """Every option that is parsed changes them, but for --batch, which must not. Two have a second spelling."""
    command = ("--base", base, *DOG, "--solver-steps", 3)
    assert run(*command, "--out", "plain") == 0
    plain, again = pixels("plain")["a-dog-0.png"], {"batch": ("--n", 3, "--batch", 2, "--seed", 0)}
    again["again"] = "--steps", 3, "--scheduler", "dpm++"
    for option in ("--guidance 2", "--solver-steps 2", "--sampler ddim", "--sampler ddpm", "--size 24", "--seed 1"):
        assert run(*command, *option.split(), "--out", option) == 0
        assert plain not in pixels(option).values()
    for out, options in again.items():
        assert run(*command, *options, "--out", out) == 0
        assert pixels(out)["a-dog-0.png"] == plain


def test_png_carries_its_settings(run, base, ckpt, elsewhere):
    path = shutil.copy(ckpt, elsewhere / '{my}, "dog": 犬.safetensors')
    assert run("--ckpt", path, "--prompt", "a {V} {noun}, {été} ❄", "--seed", 3, "--steps", 2) == 0
    (name,) = set(files_in(Path("outputs"))) - {"grid.png"}
    expected = {"prompt": "a [V] dog, {été} ❄", "Steps": "2", "Sampler": "DPM++ 2M", "CFG scale": "3", "Size": "16x16"}
    expected |= {"Model": path.name, "Base": "base", "Step": "40", "Seed": "3"}
    assert parameters(Path("outputs") / name) == expected == parameters(Path("outputs/grid.png"))
    # A LoRA is no checkpoint for other tools: its base is the model.
    unet = StableDiffusion.from_pretrained(base).unet
    add_lora(unet, 2, generator=torch.Generator().manual_seed(0))
    save_tensors(lora_tensors(unet), elsewhere / "lora.safetensors", {"base": str(base), "step": "8"})
    assert run("--ckpt", elsewhere / "lora.safetensors", *DOG, "--out", "lora") == 0
    text = parameters(Path("lora/a-dog-0.png"))
    assert (text["Model"], text["LoRA"], text["Step"]) == ("base", "lora.safetensors", "8") and "Base" not in text


# ---------------------------------------------------------------------------------------------- odd prompts


def test_too_long_a_prompt_is_drawn_with_a_warning(run, base, capsys):
    prompt = "a dog " * 37 + "on the Moon, with the Statue of Liberty in the background"
    assert run("--base", base, *prompted(prompt, "a dog")) == 0
    out, err = capsys.readouterr()
    (warning,) = [line for line in err.splitlines() if "warning" in line]
    assert "Moon, with the Statue of Liberty in the background" in warning and "a dog" not in warning
    assert len(files_in(Path("outputs"))) == 3 and "outputs/grid.png" in out


# ---------------------------------------------------------------------------------------------- bad input


BAD = "--steps 0, --steps 1001, --n 0, --seed -1, --guidance nan, --batch 0, --size big, --scheduler best, "
BAD += "--skill best, --skill all --prompt x, --device meta, --nonsense, --export-single=, --export-single x.ckpt, "
BAD += "--ckpt=, --out="


@pytest.mark.parametrize("option", [*BAD.split(", "), "--size 17"])
def test_bad_option_is_one_line(run, base, tmp_path, capsys, option):
    assert run("--base", base, *option.split()) == 2
    word = "side" if option == "--size 17" else option.split()[0].strip("=")  # known when the base is loaded
    assert word.strip("-") in error_line(capsys) and files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "words"), [("lacking", "conv_out.weight"), ("nan", "not finite"), ("base gone", "--base")]
)
def test_bad_checkpoint_is_one_line(run, base, ckpt, tmp_path, elsewhere, capsys, kind, words):
    path, tensors = elsewhere / f"{kind}.safetensors", load_file(ckpt)
    assert run("--ckpt", path) == 2
    assert "missing" in error_line(capsys)
    if kind == "lacking":
        del tensors["conv_out.weight"]
    elif kind == "nan":
        tensors["conv_out.bias"][0] = torch.nan
    save_tensors(tensors, path, {"base": "no/such/base" if kind == "base gone" else str(base)})
    assert run("--ckpt", path) == 2
    line = error_line(capsys)
    assert words in line and (str(path) in line or kind == "nan") and files_in(tmp_path) == []
    assert (run("--ckpt", path, "--base", base) == 0) == (kind == "base gone")  # it does what the line says


@pytest.mark.parametrize(
    ("file", "text"),
    [(f"unet/{WEIGHTS}", None), ("tokenizer/tokenizer_config.json", '{"model_max_length": 78}'), ("rpo.json", "{")],
)
def test_a_bad_base_is_one_line(run, base, tmp_path, capsys, file, text):
    (base / file).unlink() if text is None else (base / file).write_text(text, encoding="utf-8")
    assert run("--base", base) == 2
    assert Path(file).parts[0] in error_line(capsys) and files_in(tmp_path) == []


@pytest.mark.parametrize("out", ["file/far/below", "taken", "my_photos"])
def test_where_nothing_can_or_should_be_written_is_one_line(run, base, tmp_path, capsys, out):
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    (tmp_path / "taken" / "grid.png").mkdir(parents=True)
    (tmp_path / "my_photos").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "my_photos" / "IMG_1.JPG")
    before = files_in(tmp_path)
    assert run("--base", base, "--out", out) == 2
    assert out.split("/")[0] in error_line(capsys) and files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(28, "No space left on device"), 2, ["No space left"]),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, ["memory is full", "--batch", "--size"]),
        (KeyboardInterrupt(), 130, ["interrupted: 4 of 6 pictures are in outputs"]),
    ],
    ids=["disk", "memory", "Ctrl-C"],
)
def test_a_run_that_ends_early_keeps_what_is_saved(run, base, tmp_path, monkeypatch, capsys, error, status, words):
    """The fifth picture cannot be saved; pictures are drawn two at a time."""
    command = ("--base", base, "--prompt", "a dog", "--prompt", "a cat", "--n", 3)
    assert run(*command, "--batch", 2, "--out", "whole") == 0
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == 5:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    capsys.readouterr()
    assert run(*command, "--batch", 2) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in words)
    names = [*(f"a-dog-{i}.png" for i in range(3)), "a-cat-0.png"]
    assert files_in(Path("outputs")) == sorted(names)
    assert all(Path("outputs", name).read_bytes() == Path("whole", name).read_bytes() for name in names)


def start(*arguments, **streams):
    """sample.py as a process of its own; long enough for a progress bar."""
    options = ("--steps", 40, "--n", 3, "--batch", 1, *DOG, *arguments)
    return subprocess.Popen([sys.executable, sample.__file__, *map(str, options)], text=True, **streams)


def test_as_a_command_of_its_own(tmp_path):
    """The exit status and the streams, as a shell sees them."""
    with start("--ckpt", "no", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as bad:
        out, err = bad.communicate(timeout=60)
        assert (bad.returncode, out, err.count("\n")) == (2, "", 1) and err.startswith("sample.py: error: ")


@pytest.mark.parametrize("broken", ["closed", "full", "no reader"])
def test_a_broken_output_loses_no_picture(base, tmp_path, broken):
    if broken == "closed":  # as by 2>&-
        process = start("--base", base, cwd=tmp_path, preexec_fn=lambda: os.close(2))
    else:
        if broken == "full":
            end = os.open("/dev/full", os.O_WRONLY)
        else:  # a pipe such as | true
            reader, end = os.pipe()
            os.close(reader)
        process = start("--base", base, cwd=tmp_path, stdout=end, stderr=end)
        os.close(end)
    assert process.wait(timeout=60) == 0
    assert files_in(tmp_path / "outputs") == [*(f"a-dog-{seed}.png" for seed in range(3)), "grid.png"]


# ---------------------------------------------------------------------------------------------- the user's files


def test_one_file_holds_what_the_folder_and_the_checkpoint_hold(base, ckpt, run, tmp_path):
    """Written with --export-single and read with --base, next to a tokenizer: the same pictures, to half precision."""
    assert run("--ckpt", ckpt, "--export-single", "whole.safetensors") == 0
    assert files_in(tmp_path) == ["whole.safetensors"]
    shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    drawn = []
    for source in (("--ckpt", ckpt), ("--base", "whole.safetensors", "--guidance", 3.0)):
        assert run(*source, "--prompt", "a [V] dog", "--out", str(len(drawn)), "--steps", 3) == 0
        drawn.append(np.asarray(Image.open(tmp_path / str(len(drawn)) / "grid.png")).astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 2  # fp16 has 11 bits: below 1 of 255, but it may fall across a step
    assert drawn[0].std() > 5


def test_an_export_replaces_an_export_and_nothing_else(base, ckpt, run, tmp_path, capsys):
    own, other = (shutil.copyfile(ckpt, tmp_path / name) for name in ("own.safetensors", "cat.safetensors"))
    weights = base / "vae" / WEIGHTS
    before = {path: path.read_bytes() for path in (own, other, weights)}
    for source, target in ((own, tmp_path / "sub" / ".." / own.name), (ckpt, other), (ckpt, weights)):
        assert run("--ckpt", source, "--base", base, "--export-single", target) == 2
        assert "another name" in error_line(capsys)
    assert {path: path.read_bytes() for path in before} == before
    assert [run("--ckpt", ckpt, "--export-single", "whole.safetensors") for _ in range(2)] == [0, 0]
    shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    assert run("--base", "whole.safetensors", "--export-single", "whole.safetensors") == 2
    assert "another name" in error_line(capsys)
