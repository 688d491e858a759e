"""evaluate.py: the scores against a double loop and transformers, and the command on a tiny random base.

Tolerance: float32 features of order 1 differ by about 1e-6 between two implementations, cosines by less; 1e-5.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny import WEIGHTS, call, error_line, files_in, parameters, write_base, write_ckpt, write_metrics, write_photos

import evaluate
from evaluate import Metrics
from model.files.tensors import read_metadata
from model.files.write import save_tensors
from model.stable_diffusion import StableDiffusion
from reward import lambda_harmonic

QUICK = ("--steps", 1, "--n", 1, "--device", "cpu")
NAMES = ["dino", "clip_i", "clip_t", "align_i", "align_t"]


def picture(seed, size=(40, 40)):
    """Blocks of random colours, so that pictures differ also at low resolution."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("world") / "base")
    write_metrics(folder / "metrics", folder / "tokenizer")
    return folder


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the base, which a test may change."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture
def ckpt(base, tmp_path):
    return write_ckpt(base, tmp_path / "result" / "best.safetensors")


@pytest.fixture
def dog(tmp_path):
    return write_photos(tmp_path / "photos" / "dog")


@pytest.fixture
def run(tmp_path, monkeypatch, dog):
    """Call evaluate.py in an empty folder; the last of two equal options counts."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda *arguments: call(evaluate, monkeypatch, *QUICK, *arguments)


def folders_of(base):
    return {"clip": base / "metrics" / "clip", "dino": base / "metrics" / "dino", "align": base / "reward"}


def metrics_of(base, photos, token="[V]"):
    return Metrics.from_folders(**folders_of(base), photos=photos, token=token)


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- the scores


def test_identical_pictures_have_1(base):
    photo = picture(0)
    scores = metrics_of(base, [photo])([photo, photo, picture(1)], ["a [V] dog", "a red [V] dog", "a [V] dog"])
    assert list(scores) == NAMES and all(values.shape == (3,) for values in scores.values())
    for name in ("dino", "clip_i", "align_i"):
        assert scores[name].tolist()[:2] == pytest.approx([1, 1], abs=1e-6) and scores[name][2] < 0.999


def test_agrees_with_a_double_loop(base):
    """Every photo with every picture, one pair at a time, more of both than one batch holds."""
    photos, images = [picture(i) for i in range(3)], [picture(10 + i) for i in range(18)]
    prompts = [f"a {'red ' * (i % 3)}[V] dog" for i in range(18)]
    metrics = metrics_of(base, photos)
    scores = metrics(images, prompts)
    clip, dino, align = metrics.clip, metrics.dino, metrics.reward.align

    def cosine(a, b):
        return float(a @ b) / (float(a @ a) ** 0.5 * float(b @ b) ** 0.5)

    eyes = {
        "dino": lambda image: dino(dino.preprocess([image]))[0],
        "clip_i": lambda image: clip.image_features(clip.preprocess([image]))[0],
        "align_i": lambda image: align.image_features(align.preprocess([image]))[0],
    }
    for name, eye in eyes.items():
        for i, image in enumerate(images):
            pairs = [cosine(eye(photo), eye(image)) for photo in photos]
            pairs = [(pair + 1) / 2 for pair in pairs] if name == "align_i" else pairs
            assert float(scores[name][i]) == pytest.approx(statistics.fmean(pairs), abs=1e-5)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        text = prompt.replace("[V] ", "")
        words = clip.text_features(metrics.tokenizer([text]))[0]
        assert float(scores["clip_t"][i]) == pytest.approx(max(0, cosine(eyes["clip_i"](image), words)), abs=1e-5)
        words = align.text_features(*metrics.reward.tokenizer([text]))[0]
        expected = (cosine(eyes["align_i"](image), words) + 1) / 2
        assert float(scores["align_t"][i]) == pytest.approx(expected, abs=1e-5)
    assert all(scores[name].std() > 0.01 for name in NAMES)  # there is something to agree on


def test_agrees_with_transformers(base):
    """From PIL pictures, not square ones, to the scores, with the library's own preprocessing, networks and tokens."""
    photos, images = [picture(i, (60, 44)) for i in range(2)], [picture(5, (31, 31)), picture(6, (30, 50))]
    prompts = ["a [V] dog in the snow", "a cube shaped [V] dog"]
    scores = metrics_of(base, photos)(images, prompts)
    clip = transformers.CLIPModel.from_pretrained(base / "metrics" / "clip").eval()
    dino = transformers.ViTModel.from_pretrained(base / "metrics" / "dino", add_pooling_layer=False).eval()
    clip_eye = transformers.AutoImageProcessor.from_pretrained(base / "metrics" / "clip", use_fast=False)
    dino_eye = transformers.AutoImageProcessor.from_pretrained(base / "metrics" / "dino", use_fast=False)
    tokens = transformers.CLIPTokenizer.from_pretrained(base / "metrics" / "clip")
    similarity = torch.nn.functional.cosine_similarity
    with torch.no_grad():
        see = {
            "clip_i": lambda p: clip.get_image_features(**clip_eye(p, return_tensors="pt")).pooler_output,
            "dino": lambda p: dino(**dino_eye(p, return_tensors="pt")).last_hidden_state[:, 0],
        }
        for name, features in see.items():
            expected = similarity(features(photos)[:, None], features(images)[None], dim=-1).mean(0)
            assert (scores[name] - expected).abs().max() < 1e-5
        texts = tokens([p.replace("[V] ", "") for p in prompts], padding="max_length", return_tensors="pt")
        words = clip.get_text_features(**texts).pooler_output
        expected = similarity(see["clip_i"](images), words)
        assert expected.min() > 0.01 and (scores["clip_t"] - expected).abs().max() < 1e-5


def test_a_cosine_below_0_counts_as_0(base):
    metrics = metrics_of(base, [picture(0)])
    images, prompts = [picture(i) for i in range(8)], ["a dog"] * 8
    scores = metrics(images, prompts)["clip_t"]
    with torch.no_grad():
        metrics.clip.text_projection.weight.neg_()
    others = metrics(images, prompts)["clip_t"]
    assert ((scores == 0) == (others > 0)).all() and torch.max(scores, others).min() > 0


@pytest.mark.parametrize("token", ["[V]", "sks"])
def test_token_is_not_scored(base, token):
    metrics = metrics_of(base, [picture(0)], token)
    scores = metrics([picture(1)] * 3, [f"a {token} dog in the snow", "a dog in the snow", f"a red {token} dog"])
    for name in ("clip_t", "align_t"):
        first, second, third = scores[name].tolist()
        assert first == second != third


def test_of_another_subject(base):
    one, image = metrics_of(base, [picture(0)], "sks"), ([picture(1)], ["a [V] dog"])
    ours, expected = one.of([picture(3)], "[V]")(*image), metrics_of(base, [picture(3)])(*image)
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)
    assert not torch.equal(ours["dino"], one(*image)["dino"])


def test_what_cannot_be_scored(base):
    with pytest.raises(ValueError, match="own prompt"):
        metrics_of(base, [picture(0)])([picture(0)], ["a dog", "a cat"])


def test_mean_and_spread_over_prompts():
    values = [0.1, 0.3, 0.5, 0.5, 0.9, 0.7]  # means 0.2, 0.5, 0.8
    assert evaluate.over_prompts(values, 2) == {"mean": 0.5, "sd": 0.3}
    assert evaluate.over_prompts(values, 1)["sd"] == pytest.approx(statistics.stdev(values), abs=1e-6)


# ---------------------------------------------------------------------------------------------- one subject


def test_checkpoint_writes_what_it_says(run, ckpt, base, dog, capsys):
    assert run("--ckpt", ckpt, "--subject", dog, "--n", 2) == 0
    said = capsys.readouterr().out
    result, folder = read(ckpt.parent / "best.eval.json"), ckpt.parent / "best.eval"
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["best.eval", "best.eval.json", ckpt.name]
    rows, settings = result["images"], result["settings"]
    prompts = [row["prompt"] for row in rows]
    assert len({row["seed"] for row in rows}) == 50 and len(set(prompts)) == 25
    assert prompts[24:26] == ["a [V] dog wearing a rainbow scarf"] * 2
    assert sorted(row["file"] for row in rows) == sorted(set(files_in(folder)) - {"grid.png"})
    assert Image.open(folder / "grid.png").size == (2 * 20 + 4, 25 * 20 + 4)

    # The pictures are the checkpoint's; the numbers are those of the very files.
    sd = StableDiffusion.from_pretrained(base)
    sd.load_unet(ckpt)
    images = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    again = sd.generate(prompts[3:4], [rows[3]["seed"]], steps=1, guidance=3)[0]
    assert np.abs(np.asarray(again).astype(int) - np.asarray(images[3])).max() <= 1  # another batch: rounding
    scores = metrics_of(base, [Image.open(path) for path in sorted(dog.iterdir())])(images, prompts)
    scores["lambda_harmonic"] = lambda_harmonic(scores["align_i"], scores["align_t"], 0.3)
    assert list(result["means"]) == [*NAMES, "lambda_harmonic"]
    for name, values in scores.items():
        assert [row[name] for row in rows] == pytest.approx(values.tolist(), abs=2e-6)
        means = values.view(25, 2).mean(1)
        assert result["means"][name]["mean"] == pytest.approx(means.mean().item(), abs=2e-6)
        assert result["means"][name]["sd"] == pytest.approx(means.std().item(), abs=2e-6)
        line = next(line for line in said.splitlines() if line.startswith(evaluate.TITLES[name]))
        assert f"{result['means'][name]['mean']:.4f}" in line

    text = parameters(folder / rows[3]["file"])
    assert (text["prompt"], text["Steps"], text["CFG scale"]) == (prompts[3], "1", "3")
    assert text["Seed"] == str(rows[3]["seed"])
    assert "without the token [V]" in said and "without the token [V]" in result["scored_text"]
    assert "metrics/dino, ViT 2x32/8" in said and "metrics/clip, ViT 2x32/8 + text 2x32" in said
    assert result["networks"]["align"].endswith("reward, EfficientNet of 2 blocks + BERT 1x16")
    assert result["training"] == read_metadata(ckpt)  # how it was made, next to how it was measured
    known = {"base": str(base), "noun": "dog", "live": True, "lambda_val": 0.3, "steps": 1, "guidance": 3}
    assert settings.items() >= known.items()


def test_base_alone(run, base, dog, tmp_path):
    assert run("--base", base, "--subject", dog) == 0
    files = files_in(tmp_path / "here")
    assert files[:2] == ["base-base-dog.eval", "base-base-dog.eval.json"] and len(files) == 2 + 25 + 1
    result = read("base-base-dog.eval.json")
    assert result["settings"]["guidance"] == 7.5 and result["settings"]["ckpt"] is None
    assert parameters(Path("base-base-dog.eval") / result["images"][0]["file"])["Model"] == "base"
    assert run("--subject", dog) == 0  # the embedded one
    settings = read("base-toy-dog.eval.json")["settings"]
    assert settings["base"] == "weights/toy" and settings["guidance"] == 4  # its rpo.json


def test_same_command_same_files_whatever_the_batch(run, ckpt, dog):
    def everything():
        return {path.name: path.read_bytes() for path in [*Path("out").iterdir(), ckpt.parent / "best.eval.json"]}

    command = ("--ckpt", ckpt, "--subject", dog)
    assert run(*command, "--out", "out") == 0
    first = everything()
    assert run(*command, "--out", "out", "--seed", 0) == 0
    assert everything() == first and len(first) == 27
    rows = read(ckpt.parent / "best.eval.json")["images"]
    assert run(*command, "--out", "batch", "--batch", 4) == 0
    others = read(ckpt.parent / "best.eval.json")["images"]
    numbers = [[[row[name] for name in NAMES] for row in each] for each in (rows, others)]
    assert np.abs(np.subtract(*numbers)).max() < 1e-3  # one grey level in some pixel, at most
    assert run(*command, "--out", "out", "--guidance", 2) == 0  # other pictures get other names
    assert everything().items() >= {name: data for name, data in first.items() if name.endswith(".png")}.items()
    names = {row["file"] for row in read(ckpt.parent / "best.eval.json")["images"]}
    assert len(files_in(Path("out"))) == 52 and all((Path("out") / name).is_file() for name in names - first.keys())
    assert run(*command, "--out", "other", "--seed", 1) == 0
    seeds = {row["seed"] for row in read(ckpt.parent / "best.eval.json")["images"]}
    assert seeds.isdisjoint(row["seed"] for row in rows)


def test_flags_win_then_the_header_then_the_base(run, copy, dog, tmp_path, monkeypatch):
    (copy / "rpo.json").write_text('{"guidance": 2, "solver_steps": 3}', encoding="utf-8")
    path = write_ckpt(copy, tmp_path / "a.safetensors", lambda_val="0.7", resolution="24")
    command = ("--ckpt", path, "--subject", dog, "--n", 1)

    def result():
        values = read(tmp_path / "a.eval.json")
        settings, row = values["settings"], values["images"][0]
        drawn = parameters(Path(values["pictures"]) / row["file"])
        assert (int(drawn["Steps"]), float(drawn["CFG scale"])) == (settings["steps"], settings["guidance"])
        return settings["steps"], settings["guidance"], settings["lambda_val"], drawn["Size"], row

    assert call(evaluate, monkeypatch, *command) == 0
    *settings, row = result()
    assert settings == [3, 3, 0.7, "24x24"]
    assert row["lambda_harmonic"] == pytest.approx(1 / (0.7 / row["align_i"] + 0.3 / row["align_t"]), abs=2e-6)
    assert call(evaluate, monkeypatch, *command, "--lambda-val", 0, "--guidance", 2, "--steps", 1) == 0
    *settings, row = result()
    assert settings == [1, 2, 0, "24x24"] and row["lambda_harmonic"] == row["align_t"]


def test_base_is_read_as_the_header_says(run, base, dog, tmp_path, capsys):
    path, results = write_ckpt(base, tmp_path / "a.safetensors", prediction_type="v_prediction", variant="fp16"), []
    assert run("--ckpt", path, "--subject", dog) == 2
    assert "no weights of the variant fp16" in error_line(capsys)  # the tiny base has plain files
    for options in ((), ("--prediction-type", "epsilon")):  # a --base of one's own has no use for its variant
        assert run("--ckpt", path, "--subject", dog, "--base", base, *options) == 0
        results.append(read(tmp_path / "a.eval.json"))
    assert [result["settings"]["prediction_type"] for result in results] == ["v_prediction", "epsilon"]
    assert results[0]["means"] != results[1]["means"]


def test_other_networks(run, base, copy, dog, tmp_path):
    """Of a base without metrics; the vision transformer has another architecture."""
    shutil.rmtree(copy / "metrics"), shutil.rmtree(copy / "reward")
    values = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = transformers.ViTModel(transformers.ViTConfig(**values, intermediate_size=64), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "my-dino")
    folders = folders_of(base) | {"dino": tmp_path / "my-dino"}
    assert run("--base", copy, "--subject", dog, *[text for n, f in folders.items() for text in (f"--{n}", f)]) == 0
    result = read("base-copy-dog.eval.json")
    assert result["networks"]["dino"] == f"{tmp_path}/my-dino, ViT 1x32/16"
    assert run("--base", base, "--subject", dog) == 0
    other = read("base-base-dog.eval.json")
    for name in ("dino", "clip_i", "align_i"):
        assert (other["means"][name] == result["means"][name]) == (name != "dino")


def test_header_wins_with_a_note(run, base, tmp_path, capsys):
    thing = write_photos(tmp_path / "vase")
    path = write_ckpt(base, tmp_path / "a.safetensors", token="sks")
    assert run("--ckpt", path, "--subject", thing, "--token", "[V]", "--no-live") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    words = ("noun dog", "live True", "token sks")
    assert [word in line for line, word in zip(notes, words, strict=True)] == [True] * 3
    result = read(tmp_path / "a.eval.json")
    assert result["images"][10]["prompt"] == "a sks dog wearing a red hat"
    assert "without the token sks" in result["scored_text"]
    for name in ("007", "my_dog"):  # no noun in that name, and none needed; a guess from it contradicts nothing
        thing = thing.rename(tmp_path / name)
        assert run("--ckpt", path, "--subject", thing) == 0
        assert "note: " not in capsys.readouterr().out
    assert run("--base", base, "--subject", thing, "--noun", "vase", "--live", "--token", "qx") == 0
    assert read("base-base-my_dog.eval.json")["images"][10]["prompt"] == "a qx vase wearing a red hat"


def test_file_names_that_are_not_utf_8(run, copy, dog, tmp_path, monkeypatch):
    """A photo, a stray file of the base, and the base's own folder, which its name in the results contains."""
    folder = copy.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    (dog / "0.png").rename(dog / os.fsdecode(b"caf\xe9.png"))
    (folder / "unet" / os.fsdecode(b"\xff.txt")).write_text("x", encoding="utf-8")
    monkeypatch.chdir(folder)
    assert run("--base", ".", "--subject", dog) == 0
    result = read(f"base-{folder.name}-dog.eval.json")
    assert result["settings"]["base"] == str(folder)
    assert parameters(Path(result["pictures"]) / result["images"][0]["file"])["Model"] == "caf?"


# ---------------------------------------------------------------------------------------------- DreamBench


@pytest.fixture
def bench(tmp_path, base):
    """Three of the data set's subjects, with what else lies there, and a checkpoint for each."""
    for name in ("dog", "cat2", "wolf_plushie"):
        write_photos(tmp_path / "dataset" / name)
        noun = {"dog": "dog", "cat2": "cat", "wolf_plushie": "stuffed animal"}[name]
        live = str(name != "wolf_plushie")
        write_ckpt(base, tmp_path / "runs" / name / "best.safetensors", 1 + len(name) / 10, noun=noun, live=live)
    write_photos(tmp_path / "dataset" / "something")
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text("...", encoding="utf-8")
    return "--dreambench", tmp_path / "dataset", "--ckpt", f"{tmp_path}/runs/{{subject}}/best.safetensors"


def test_dreambench(run, bench, tmp_path, capsys):
    runs = tmp_path / "runs"
    (runs / "dog" / "best.state.pt").write_text("state", encoding="utf-8")
    assert run(*bench) == 0
    out, err = capsys.readouterr()
    assert "note: " not in out and files_in(tmp_path / "here") == []
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "runs/dog/best.safetensors is not finished" in warning
    summary = read(runs / "dreambench" / "best.eval.json")
    results = {name: read(runs / name / "best.eval.json") for name in ("cat2", "dog", "wolf_plushie")}
    assert [result["images"][10]["prompt"] for result in results.values()] == [
        "a [V] cat wearing a red hat",
        "a [V] dog wearing a red hat",
        "a [V] stuffed animal with a wheat field in the background",
    ]
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| subject | DINO | CLIP-I | CLIP-T |" and len(rows) == 5
    assert summary["failed"] == {} and list(summary["subjects"]) == list(results)
    for row, (name, numbers) in zip(rows[1:4], summary["subjects"].items(), strict=True):
        assert row == "| " + " | ".join([name, *(f"{numbers[key]:.3f}" for key in ("dino", "clip_i", "clip_t"))]) + " |"
        assert numbers == {metric: value["mean"] for metric, value in results[name]["means"].items()}
        assert len(files_in(runs / name / "best.eval")) == 26
    assert rows[4].startswith(f"| mean of 3 | {summary['mean']['dino']:.3f} | ")
    expected = statistics.fmean(row["dino"] for row in summary["subjects"].values())
    assert summary["mean"]["dino"] == pytest.approx(expected, abs=1e-6)
    # Each was drawn with its own checkpoint: alone it has the same numbers.
    assert run("--ckpt", runs / "wolf_plushie" / "best.safetensors", "--subject", bench[1] / "wolf_plushie") == 0
    assert read(runs / "wolf_plushie" / "best.eval.json") == results["wolf_plushie"]


def done_now(out):
    return [line.split(":")[0] for line in out.splitlines() if ": done, " in line]


def test_dreambench_continues(run, bench, base, tmp_path, capsys, monkeypatch):
    replace, written = os.replace, []

    def interrupt(*paths):
        written.append(paths)
        return signal_ctrl_c() if len(written) == 30 else replace(*paths)  # cat2 writes 27 files

    def signal_ctrl_c():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        assert run(*bench) == 130
    err = capsys.readouterr().err
    assert "interrupted; the same command continues" in err and "Traceback" not in err
    assert run(*bench) == 0
    out = capsys.readouterr().out
    assert "cat2: done before, " in out and done_now(out) == ["dog", "wolf_plushie"]
    summary, runs = tmp_path / "runs" / "dreambench" / "best.eval.json", tmp_path / "runs"
    before, result = read(summary), runs / "dog" / "best.eval.json"
    assert run(*bench) == 0 and done_now(capsys.readouterr().out) == [] and read(summary) == before

    # What is cut off, or of other weights, photos, settings, or some other file, or lacks a picture, is done again.
    values = read(result)
    result.write_text(result.read_text()[:500], encoding="utf-8")
    write_ckpt(base, runs / "cat2" / "best.safetensors", 2, noun="cat")
    picture(9).save(tmp_path / "dataset" / "wolf_plushie" / "0.png")
    assert run(*bench) == 0 and done_now(capsys.readouterr().out) == ["cat2", "dog", "wolf_plushie"]
    for change in ({"settings": values["settings"] | {"seed": 1}}, {"means": []}):
        result.write_text(json.dumps(values | change), encoding="utf-8")
        assert run(*bench) == 0 and done_now(capsys.readouterr().out) == ["dog"] and read(result) == values
    (runs / "dog" / "best.eval" / values["images"][0]["file"]).unlink()
    assert run(*bench) == 0 and done_now(capsys.readouterr().out) == ["dog"] and read(result) == values
    assert run(*bench, "--out", "pictures") == 0 and len(done_now(capsys.readouterr().out)) == 3
    assert len(files_in(Path("pictures/dog"))) == 26


def test_dreambench_survives_failing_subjects(run, bench, tmp_path, capsys):
    path = tmp_path / "runs" / "wolf_plushie" / "best.safetensors"
    tensors = load_file(path)
    tensors.pop("conv_out.weight")
    save_tensors(tensors, path, read_metadata(path))
    (tmp_path / "dataset" / "cat2" / "1.png").write_text("no picture", encoding="utf-8")
    assert run(*bench) == 1
    out, err = capsys.readouterr()
    cat, wolf = (line for line in err.splitlines() if "error" in line)
    assert cat.startswith("cat2: error: ") and "1.png" in cat and "conv_out.weight" in wolf
    summary = read(tmp_path / "runs" / "dreambench" / "best.eval.json")
    assert list(summary["failed"]) == ["cat2", "wolf_plushie"] and "1.png" in summary["failed"]["cat2"]
    assert list(summary["subjects"]) == ["dog"] and "| dog | " in out


def test_dreambench_of_the_base_alone(run, bench, base):
    assert run(*bench[:2], "--base", base, "--out", "mine") == 0
    names = ["cat2", "dog", "dreambench", "wolf_plushie"]
    assert sorted(path.name for path in Path("base-base").glob("*.json")) == [f"{name}.eval.json" for name in names]
    assert sorted(path.name for path in Path("mine").iterdir()) == ["cat2", "dog", "wolf_plushie"]


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "option",
    [
        *["--n 0", "--seed -1", "--steps 0", "--steps 1001", "--guidance 1e30", "--batch 0", "--lambda-val 1.1"],
        *["--lambda-val x", "--device abacus", "--nonsense", "--ckpt", "--ckpt=", "--clip nowhere", "--dino nowhere"],
        *["--align nowhere", "--base nowhere", "--subject nowhere", "--noun=", "--token dog", "--dreambench ."],
        *["--clip=", "--out=", "--base="],
    ],
)
def test_bad_option_is_one_line(run, base, dog, capsys, option, tmp_path):
    assert run("--base", base, "--subject", dog, *option.split()) == 2
    line = error_line(capsys)
    assert option.split()[0].strip("-=") in line or "nowhere" in line
    assert files_in(tmp_path / "here") == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ((), "--subject"),
        (("--dreambench", "nowhere"), "nowhere"),
        (("--dreambench", "{dataset}", "--ckpt", "best.safetensors"), "{subject}"),
        (("--dreambench", "{dataset}", "--noun", "dog"), "--noun"),
        (("--dreambench", "{dataset}", "--no-live"), "--live"),
        (("--dreambench", "{dataset}/dog"), "no subject of DreamBench"),
    ],
)
def test_bad_dreambench_is_one_line(run, bench, capsys, tmp_path, options, word):
    assert run(*(str(option).replace("{dataset}", str(bench[1])) for option in options)) == 2
    assert word in error_line(capsys) and files_in(tmp_path / "here") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("lambda_val", "much"), ("lambda_val", "2"), ("guidance", "0"), ("live", "perhaps"), ("noun", " ")],
        *[("token", ""), ("base", "no/such/base")],
    ],
)
def test_bad_header_is_one_line(run, copy, dog, tmp_path, capsys, name, value):
    """Before any network is loaded: this base's U-Net is broken."""
    path = write_ckpt(copy, tmp_path / "bad.safetensors", **{name: value})
    (copy / "unet" / WEIGHTS).write_bytes(b"no weights")
    assert run("--ckpt", path, "--subject", dog) == 2
    assert name in error_line(capsys) and not (tmp_path / "bad.eval").exists()


@pytest.mark.parametrize(
    "name", ["metrics/clip", "reward", "metrics/clip/vocab.json", "metrics/dino/config.json", "unet"]
)
def test_incomplete_base_is_one_line(run, copy, dog, tmp_path, capsys, name):
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    assert run("--base", copy, "--subject", dog) == 2
    assert name.split("/")[-1] in error_line(capsys) and files_in(tmp_path / "here") == []


def test_empty_folder_and_unwritable_places(run, base, dog, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("--base", base, "--subject", tmp_path / "empty") == 2
    assert "photos" in error_line(capsys)
    (tmp_path / "here" / "file").write_text("a file", encoding="utf-8")
    (tmp_path / "here" / "base-base-dog.eval.json").mkdir()
    before = files_in(dog)
    for out, word in (("file", "file"), (dog, "photos"), ("out", "base-base-dog.eval.json")):
        assert run("--base", base, "--subject", dog, "--out", out) == 2
        assert word in error_line(capsys)
    assert files_in(tmp_path / "here") == ["base-base-dog.eval.json", "file"] and files_in(dog) == before


def test_as_a_command_of_its_own(base, dog, tmp_path):
    """The exit status and the streams, as a shell sees them."""
    command = [sys.executable, evaluate.__file__, *map(str, QUICK), "--subject", dog, "--base", base]
    bad = subprocess.run([*command, "--ckpt", "no"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(bad.stderr.splitlines()) == 1 and bad.stderr.startswith("evaluate.py: error: ")
    shell = f"set -o pipefail; {shlex.join(map(str, command))} 2>&- | head -1"  # head ends long before the result
    good = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0 and good.stdout.startswith("subject ")
    assert (
        len(read(tmp_path / "base-base-dog.eval.json")["images"]) == len(files_in(tmp_path / "base-base-dog.eval")) - 1
    )
