"""evaluate.py and metrics.py: the scores against a double loop and transformers, and the command on a tiny random base.

Tolerance: float32 features of order 1 differ by about 1e-6 between two implementations, cosines by less; 1e-5.
"""

import json
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
from tiny import WEIGHTS, call, error_line, files_in, write_base, write_metrics, write_photos

import evaluate
from metrics import Metrics
from model.files.tensors import read_metadata
from model.files.write import save_tensors
from model.stable_diffusion import StableDiffusion
from reward import lambda_harmonic
from subject import open_photo
from support import flags, record

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


@pytest.fixture(scope="module")
def ckpt(base, tmp_path_factory):
    """As train.py writes it: other weights than the base's, and a header."""
    return write_ckpt(base, tmp_path_factory.mktemp("result") / "best.safetensors")


def write_ckpt(folder, path, factor=1.5, **header):
    tensors = {name: tensor.float() * factor for name, tensor in load_file(folder / "unet" / WEIGHTS).items()}
    header = {
        "base": str(folder),
        "token": "[V]",
        "noun": "dog",
        "live": "True",
        "step": "40",
        "guidance": "3.0",
    } | header
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, header)
    return path


@pytest.fixture
def dog(tmp_path):
    return write_photos(tmp_path / "photos" / "dog")


@pytest.fixture
def run(tmp_path, monkeypatch, dog):
    """Call evaluate.py in an empty folder; the last of two equal options counts."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda *arguments: call(evaluate, monkeypatch, *QUICK, *arguments)


@pytest.fixture
def asked(monkeypatch):
    """What `generate` is called with, each time."""
    calls, generate = [], StableDiffusion.generate

    def note(self, prompts, seeds, **options):
        calls.append(options | {"prompts": prompts, "seeds": seeds, "unet": dict(self.unet.state_dict())})
        return generate(self, prompts, seeds, **options)

    monkeypatch.setattr(StableDiffusion, "generate", note)
    return calls


def folders_of(base):
    return {"clip": base / "metrics" / "clip", "dino": base / "metrics" / "dino", "align": base / "reward"}


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- the scores


def test_identical_pictures_have_1(base):
    photo = picture(0)
    scores = Metrics.from_folders(**folders_of(base), photos=[photo])([photo, photo], ["a [V] dog", "a red [V] dog"])
    assert list(scores) == NAMES and all(values.shape == (2,) for values in scores.values())
    for name in ("dino", "clip_i", "align_i"):
        assert scores[name].tolist() == pytest.approx([1, 1], abs=1e-6)
    other = Metrics.from_folders(**folders_of(base), photos=[photo])([picture(1)], ["a [V] dog"])
    assert all(other[name] < 0.999 for name in ("dino", "clip_i", "align_i"))


def test_agrees_with_a_double_loop(base):
    """Every photo with every picture, one pair at a time, more of both than one batch holds."""
    photos, images = [picture(i) for i in range(3)], [picture(10 + i) for i in range(18)]
    prompts = [f"a {'red ' * (i % 3)}[V] dog" for i in range(18)]
    metrics = Metrics.from_folders(**folders_of(base), photos=photos, token="[V]")
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
    scores = Metrics.from_folders(**folders_of(base), photos=photos)(images, prompts)
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
    metrics = Metrics.from_folders(**folders_of(base), photos=[picture(0)])
    images, prompts = [picture(i) for i in range(8)], ["a dog"] * 8
    scores = metrics(images, prompts)["clip_t"]
    with torch.no_grad():
        metrics.clip.text_projection.weight.neg_()
    others = metrics(images, prompts)["clip_t"]
    assert ((scores == 0) == (others > 0)).all() and torch.max(scores, others).min() > 0


@pytest.mark.parametrize("token", ["[V]", "sks"])
def test_token_is_not_scored(base, token):
    metrics = Metrics.from_folders(**folders_of(base), photos=[picture(0)], token=token)
    seen, tokenizer = [], metrics.tokenizer
    metrics.tokenizer = lambda texts: seen.extend(texts) or tokenizer(texts)
    metrics([picture(1)] * 3, [f"a {token} dog in the snow", f"a {token} dog", f"a {token} dog in the snow"])
    assert seen == ["a dog in the snow", "a dog"]  # each once


def test_of_another_subject(base):
    one = Metrics.from_folders(**folders_of(base), photos=[picture(0)], token="sks")
    other, fresh = one.of([picture(3)], "[V]"), Metrics.from_folders(**folders_of(base), photos=[picture(3)])
    ours, expected = other([picture(1)], ["a [V] dog"]), fresh([picture(1)], ["a [V] dog"])
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)
    assert other.clip is one.clip and not torch.equal(ours["dino"], one([picture(1)], ["a [V] dog"])["dino"])


def test_what_cannot_be_scored(base):
    with pytest.raises(ValueError, match="photo"):
        Metrics.from_folders(**folders_of(base), photos=[])
    metrics = Metrics.from_folders(**folders_of(base), photos=[picture(0)])
    with pytest.raises(ValueError, match="no pictures"):
        metrics([], [])
    with pytest.raises(ValueError, match="own prompt"):
        metrics([picture(0)], ["a dog", "a cat"])


def test_mean_and_spread_over_prompts():
    values = [0.1, 0.3, 0.5, 0.5, 0.9, 0.7]  # means 0.2, 0.5, 0.8
    assert evaluate.over_prompts(values, 2) == {"mean": 0.5, "sd": 0.3}
    assert evaluate.over_prompts(values, 1)["sd"] == pytest.approx(statistics.stdev(values), abs=1e-6)


def test_photos_are_scored_in_their_own_resolution(tmp_path):
    """A square photo as it is: what the networks' own preprocessing starts from."""
    picture(0, (300, 300)).save(tmp_path / "square.png")
    assert evaluate.whole(tmp_path / "square.png").tobytes() == picture(0, (300, 300)).tobytes()
    picture(0, (300, 200)).save(tmp_path / "wide.jpg", exif=_turned())
    upright = evaluate.whole(tmp_path / "wide.jpg")
    assert upright.size == (200, 200) and upright.tobytes() == open_photo(tmp_path / "wide.jpg", 200).tobytes()


def _turned():
    exif = Image.Exif()
    exif[274] = 6
    return exif


# ---------------------------------------------------------------------------------------------- one subject


def test_checkpoint_writes_what_it_says(run, ckpt, base, dog, asked, capsys):
    assert run("--ckpt", ckpt, "--subject", dog, "--n", 2) == 0
    said = capsys.readouterr().out
    result, folder = read(ckpt.parent / "best.eval.json"), ckpt.parent / "best.eval"
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["best.eval", "best.eval.json", ckpt.name]
    assert len(asked) == 1 and torch.equal(asked[0]["unet"]["conv_in.weight"], load_file(ckpt)["conv_in.weight"])
    assert (asked[0]["guidance"], asked[0]["steps"]) == (3, 1)
    assert len(set(asked[0]["seeds"])) == 50 and len(set(asked[0]["prompts"])) == 25
    assert asked[0]["prompts"][24:26] == ["a [V] dog wearing a rainbow scarf"] * 2
    rows = result["images"]
    assert [row["prompt"] for row in rows] == asked[0]["prompts"] and [row["seed"] for row in rows] == asked[0]["seeds"]
    assert sorted(row["file"] for row in rows) == sorted(set(files_in(folder)) - {"grid.png"})
    assert Image.open(folder / "grid.png").size == (2 * 20 + 4, 25 * 20 + 4)

    # The numbers are those of the very files.
    photos = [Image.open(path) for path in sorted(dog.iterdir())]
    images = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    scores = Metrics.from_folders(**folders_of(base), photos=photos)(images, asked[0]["prompts"])
    scores["lambda_harmonic"] = lambda_harmonic(scores["align_i"], scores["align_t"], 0.3)
    assert list(result["means"]) == [*NAMES, "lambda_harmonic"]
    for name, values in scores.items():
        assert [row[name] for row in rows] == pytest.approx(values.tolist(), abs=2e-6)
        means = values.view(25, 2).mean(1)
        assert result["means"][name]["mean"] == pytest.approx(means.mean().item(), abs=2e-6)
        assert result["means"][name]["sd"] == pytest.approx(means.std().item(), abs=2e-6)
        line = next(line for line in said.splitlines() if line.startswith(evaluate.TITLES[name]))
        assert f"{result['means'][name]['mean']:.4f}" in line

    text = Image.open(folder / rows[3]["file"]).text["parameters"]
    assert text.startswith("a [V] dog in the snow\nSteps: 1, Sampler: dpm++, CFG scale: 3, Size: 16x16, Model: best")
    assert text.endswith(f"Step: 40, Seed: {rows[3]['seed']}")
    assert "without the token [V]" in said and "without the token [V]" in result["scored_text"]
    assert "metrics/dino, ViT 2x32/8" in said and "metrics/clip, ViT 2x32/8 + text 2x32" in said
    assert result["networks"]["align"].endswith("reward, EfficientNet of 2 blocks + BERT 1x16")
    assert result["training"] == read_metadata(ckpt)  # how it was made, beside how it was measured
    settings = result["settings"]
    assert (settings["base"], settings["noun"], settings["live"], settings["lambda_val"]) == (
        str(base),
        "dog",
        True,
        0.3,
    )


def test_base_alone(run, base, dog, asked, tmp_path, monkeypatch):
    assert run("--base", base, "--subject", dog) == 0
    files = files_in(tmp_path / "here")
    assert files[:2] == ["base-base-dog.eval", "base-base-dog.eval.json"] and len(files) == 2 + 25 + 1
    first = read("base-base-dog.eval.json")
    assert asked[0]["guidance"] == 7.5 and first["settings"]["ckpt"] is None
    assert "Model: base, " in Image.open(Path("base-base-dog.eval") / first["images"][0]["file"]).text["parameters"]
    monkeypatch.setattr(flags, "EMBEDDED_BASE", base)
    assert run("--subject", dog) == 0
    assert read("base-base-dog.eval.json")["images"] == first["images"]
    assert read("base-base-dog.eval.json")["settings"]["base"] == "weights/toy"


def test_same_command_same_files(run, ckpt, dog, tmp_path):
    def everything():
        files = {path.name: path.read_bytes() for path in Path("out").iterdir()}
        return files | {"json": (ckpt.parent / "best.eval.json").read_bytes()}

    assert run("--ckpt", ckpt, "--subject", dog, "--out", "out") == 0
    first = everything()
    assert run("--ckpt", ckpt, "--subject", dog, "--out", "out", "--seed", 0) == 0
    assert everything() == first and len(first) == 27
    assert run("--ckpt", ckpt, "--subject", dog, "--out", "other", "--seed", 1) == 0
    assert {row["seed"] for row in read(ckpt.parent / "best.eval.json")["images"]}.isdisjoint(
        row["seed"] for row in json.loads(first["json"])["images"]
    )


def test_batch_changes_nothing(run, base, dog):
    numbers = []
    for batch in (4, 25):
        assert run("--base", base, "--subject", dog, "--batch", batch) == 0
        numbers.append([[row[name] for name in NAMES] for row in read("base-base-dog.eval.json")["images"]])
    assert np.abs(np.subtract(*numbers)).max() < 1e-3  # one grey level in some pixel, at most


def test_flags_win_and_lambda_comes_from_the_header(run, base, dog, tmp_path, asked):
    path = write_ckpt(base, tmp_path / "a.safetensors", lambda_val="0.7")
    assert run("--ckpt", path, "--subject", dog) == 0
    result = read(tmp_path / "a.eval.json")
    row = result["images"][0]
    assert result["settings"]["lambda_val"] == 0.7
    assert row["lambda_harmonic"] == pytest.approx(1 / (0.7 / row["align_i"] + 0.3 / row["align_t"]), abs=2e-6)
    assert run("--ckpt", path, "--subject", dog, "--lambda-val", 0, "--guidance", 2, "--steps", 3) == 0
    result = read(tmp_path / "a.eval.json")
    assert result["images"][0]["lambda_harmonic"] == result["images"][0]["align_t"]
    assert (asked[1]["guidance"], asked[1]["steps"]) == (2, 3)


def test_base_is_read_as_the_header_says(run, base, dog, tmp_path, monkeypatch):
    path = write_ckpt(base, tmp_path / "a.safetensors", prediction_type="v_prediction", variant="fp16")
    seen, load = [], StableDiffusion.from_pretrained

    def note(base, device, variant, prediction_type):
        seen.append((base, variant, prediction_type))
        return load(base, device)

    monkeypatch.setattr(StableDiffusion, "from_pretrained", note)
    assert run("--ckpt", path, "--subject", dog) == 0
    assert run("--ckpt", path, "--subject", dog, "--prediction-type", "epsilon", "--variant", "x") == 0
    assert run("--ckpt", path, "--subject", dog, "--base", base) == 0  # another base, but the same U-Net
    assert seen == [(base, "fp16", "v_prediction"), (base, "x", "epsilon"), (base, None, "v_prediction")]


def test_base_recommends(run, base, dog, asked, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    (copy / "rpo.json").write_text('{"guidance": 2, "solver_steps": 3}', encoding="utf-8")
    assert call(evaluate, monkeypatch, "--base", copy, "--n", 1, "--subject", dog) == 0
    assert (asked[0]["steps"], asked[0]["guidance"]) == (3, 2)


def test_other_networks(run, base, dog, tmp_path):
    for name, folder in folders_of(base).items():
        shutil.copytree(folder, tmp_path / f"my-{name}")
    values = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = transformers.ViTModel(transformers.ViTConfig(**values, intermediate_size=64), add_pooling_layer=False)
    shutil.rmtree(tmp_path / "my-dino")
    vit.save_pretrained(tmp_path / "my-dino")
    copy = Path(shutil.copytree(base, tmp_path / "public", ignore=shutil.ignore_patterns("metrics", "reward")))
    mine = [text for name in folders_of(base) for text in (f"--{name}", tmp_path / f"my-{name}")]
    assert run("--base", copy, "--subject", dog, *mine) == 0
    result = read("base-public-dog.eval.json")
    assert result["networks"]["dino"] == f"{tmp_path}/my-dino, ViT 1x32/16"
    assert run("--base", base, "--subject", dog) == 0
    other = read("base-base-dog.eval.json")
    for name in ("dino", "clip_i", "align_i"):
        assert (other["means"][name] == result["means"][name]) == (name != "dino")


def test_header_wins_with_a_note(run, base, tmp_path, asked, capsys):
    thing = write_photos(tmp_path / "vase")
    path = write_ckpt(base, tmp_path / "a.safetensors", token="sks")
    assert run("--ckpt", path, "--subject", thing, "--token", "[V]") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [word in line for line, word in zip(notes, ("noun dog", "token sks"), strict=True)] == [True] * 2
    assert asked[0]["prompts"][10] == "a sks dog wearing a red hat"
    assert "without the token sks" in read(tmp_path / "a.eval.json")["scored_text"]
    assert run("--ckpt", path, "--subject", thing, "--no-live") == 0
    assert "note: " in (out := capsys.readouterr().out) and "with live True" in out
    numbered = thing.rename(tmp_path / "007")  # no noun in that name, and none needed
    assert run("--ckpt", path, "--subject", numbered) == 0
    assert "note: " not in capsys.readouterr().out
    mine = numbered.rename(tmp_path / "my_dog")  # a guess from the folder's name is no claim
    assert run("--ckpt", path, "--subject", mine) == 0
    assert "note: " not in capsys.readouterr().out
    assert run("--base", base, "--subject", mine, "--noun", "vase", "--live", "--token", "qx") == 0
    assert asked[-1]["prompts"][10] == "a qx vase wearing a red hat"


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


def test_dreambench(run, bench, asked, tmp_path, capsys):
    assert run(*bench) == 0
    out = capsys.readouterr().out
    assert len(asked) == 3 and "note: " not in out
    assert [call["prompts"][10] for call in asked] == [
        "a [V] cat wearing a red hat",
        "a [V] dog wearing a red hat",
        "a [V] stuffed animal with a wheat field in the background",
    ]
    weights = [float(call["unet"]["conv_in.weight"].abs().sum()) for call in asked]
    assert weights[1] < weights[0] < weights[2]  # each drew with its own
    summary = read(tmp_path / "runs" / "dreambench" / "best.eval.json")
    assert summary["failed"] == {} and list(summary["subjects"]) == ["cat2", "dog", "wolf_plushie"]
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| subject | DINO | CLIP-I | CLIP-T |" and len(rows) == 5
    for row, (name, numbers) in zip(rows[1:4], summary["subjects"].items(), strict=True):
        assert row == "| " + " | ".join([name, *(f"{numbers[key]:.3f}" for key in ("dino", "clip_i", "clip_t"))]) + " |"
        means = read(tmp_path / "runs" / name / "best.eval.json")["means"]
        assert numbers == {metric: value["mean"] for metric, value in means.items()}
        assert len(files_in(tmp_path / "runs" / name / "best.eval")) == 26
    assert rows[4].startswith(f"| mean of 3 | {summary['mean']['dino']:.3f} | ")
    expected = statistics.fmean(row["dino"] for row in summary["subjects"].values())
    assert summary["mean"]["dino"] == pytest.approx(expected, abs=1e-6)
    assert files_in(tmp_path / "here") == []


def test_dreambench_goes_on(run, bench, base, asked, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        generate, calls = StableDiffusion.generate, []
        patch.setattr(
            StableDiffusion, "generate", lambda *a, **o: interrupt() if calls else calls.append(1) or generate(*a, **o)
        )
        assert run(*bench) == 130
    captured = capsys.readouterr()
    assert "interrupted; the same command goes on" in captured.err and "Traceback" not in captured.err
    assert run(*bench) == 0
    assert [call["prompts"][0] for call in asked[1:]] == [
        "a [V] dog in the jungle",
        "a [V] stuffed animal in the jungle",
    ]
    whole = read(tmp_path / "runs" / "dreambench" / "best.eval.json")
    assert run(*bench) == 0  # all are done
    assert len(asked) == 3 and "dog: done before" in capsys.readouterr().out
    assert read(tmp_path / "runs" / "dreambench" / "best.eval.json") == whole

    # What is cut off, without its pictures, of other settings, of other weights or of other photos is done again.
    result = tmp_path / "runs" / "dog" / "best.eval.json"
    result.write_text(result.read_text()[:500], encoding="utf-8")
    write_ckpt(base, tmp_path / "runs" / "cat2" / "best.safetensors", 2, noun="cat")
    picture(9).save(tmp_path / "dataset" / "wolf_plushie" / "0.png")
    assert run(*bench) == 0 and len(asked) == 6
    values = read(result)
    result.write_text(json.dumps(values | {"settings": values["settings"] | {"seed": 1}}), encoding="utf-8")
    assert run(*bench) == 0 and len(asked) == 7 and read(result) == values
    result.write_text(json.dumps(values | {"means": []}), encoding="utf-8")  # some other file
    assert run(*bench) == 0 and len(asked) == 8 and read(result) == values
    (tmp_path / "runs" / "dog" / "best.eval" / values["images"][0]["file"]).unlink()
    assert run(*bench) == 0 and len(asked) == 9 and read(result) == values
    assert run(*bench, "--out", "pictures") == 0 and len(asked) == 12 and len(files_in(Path("pictures/dog"))) == 26


def test_weights_of_an_unfinished_run_are_told(run, bench, tmp_path, capsys):
    (tmp_path / "runs" / "dog" / "best.state.pt").write_text("state", encoding="utf-8")
    assert run(*bench) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "runs/dog/best.safetensors is not finished" in line


def test_a_changed_part_of_a_huge_file_is_seen(tmp_path):
    path, size, seen = tmp_path / "weights", 20 * 2**20, set()
    for first, last in ((0, 0), (0, 1), (size // 3, size // 2), (size - 1, size)):
        data = bytearray(size)
        data[first:last] = b"1" * (last - first)
        path.write_bytes(data)
        seen.add(record.digest([path]))
    assert len(seen) == 4


def test_any_changed_weight_of_a_large_file_is_seen(tmp_path):
    path, size = tmp_path / "weights", 5 * 2**20
    seen = set()
    for at in (None, 0, size // 3, size // 2, size - 1):
        data = bytearray(size)
        if at is not None:
            data[at] = 1
        path.write_bytes(data)
        seen.add(record.digest([path]))
    assert len(seen) == 5


def test_pictures_do_not_go_among_the_photos(run, base, dog, capsys):
    before = files_in(dog)
    assert run("--base", base, "--subject", dog, "--out", dog) == 2
    assert "photos" in error_line(capsys) and files_in(dog) == before


def test_dreambench_survives_a_failing_subject(run, bench, asked, tmp_path, capsys):
    (tmp_path / "runs" / "cat2" / "best.safetensors").unlink()
    (tmp_path / "dataset" / "dog" / "1.png").write_text("no picture", encoding="utf-8")
    assert run(*bench) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 2 and lines[0].startswith("cat2: error: ") and lines[1].startswith("dog: error: ")
    assert len(asked) == 1 and "| wolf_plushie | " in captured.out
    summary = read(tmp_path / "runs" / "dreambench" / "best.eval.json")
    assert list(summary["failed"]) == ["cat2", "dog"] and "1.png" in summary["failed"]["dog"]
    assert list(summary["subjects"]) == ["wolf_plushie"]


def test_dreambench_survives_a_checkpoint_that_does_not_fit(run, bench, asked, tmp_path, capsys):
    path = tmp_path / "runs" / "dog" / "best.safetensors"
    tensors = load_file(path)
    tensors.pop("conv_out.weight")
    save_tensors(tensors, path, read_metadata(path))
    assert run(*bench) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and "conv_out.weight" in lines[0] and len(asked) == 2


def test_dreambench_of_the_base_alone(run, bench, base, asked, tmp_path):
    assert run(*bench[:2], "--base", base, "--out", "mine") == 0
    names = ["cat2", "dog", "dreambench", "wolf_plushie"]
    assert sorted(path.name for path in Path("base-base").glob("*.json")) == [f"{name}.eval.json" for name in names]
    assert sorted(path.name for path in Path("mine").iterdir()) == ["cat2", "dog", "wolf_plushie"]


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "option",
    [
        *[("--n", 0), ("--seed", -1), ("--steps", 0), ("--steps", 1001), ("--guidance", 0), ("--batch", 0)],
        *[
            ("--lambda-val", 1.1),
            ("--lambda-val", "x"),
            ("--device", "abacus"),
            ("--nonsense",),
            ("--ckpt",),
            ("--ckpt", ""),
        ],
        *[("--clip", "nowhere"), ("--dino", "nowhere"), ("--align", "nowhere"), ("--base", "nowhere")],
        *[("--subject", "nowhere"), ("--noun", ""), ("--token", " "), ("--dreambench", "."), ("--token", "dog")],
        *[("--clip", ""), ("--out", ""), ("--base", "")],
    ],
    ids=lambda option: " ".join(map(str, option)),
)
def test_bad_option_is_one_line(run, base, dog, capsys, option, tmp_path):
    assert run("--base", base, "--subject", dog, *option) == 2
    line = error_line(capsys)
    assert option[0].strip("-") in line or "nowhere" in line
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
    ("header", "word"),
    [
        ({"lambda_val": "much"}, "lambda_val"),
        ({"lambda_val": "2"}, "lambda_val"),
        ({"guidance": "0"}, "guidance"),
        ({"live": "perhaps"}, "live"),
        ({"noun": " "}, "noun"),
        ({"token": ""}, "token"),
        ({"base": ""}, "--base"),
        ({"base": "no/such/base"}, "--base"),
    ],
)
def test_bad_header_is_one_line(run, base, dog, tmp_path, capsys, monkeypatch, header, word):
    """Before any network is loaded."""
    path = write_ckpt(base, tmp_path / "bad.safetensors", **header)
    monkeypatch.setattr(StableDiffusion, "from_pretrained", None)
    assert run("--ckpt", path, "--subject", dog) == 2
    assert word in error_line(capsys) and not (tmp_path / "bad.eval").exists()


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "folder"])
def test_bad_checkpoint_is_one_line(run, ckpt, dog, tmp_path, capsys, kind):
    path = tmp_path / "bad.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"not weights" if kind == "text" else ckpt.read_bytes()[:1000])
    assert run("--ckpt", path, "--subject", dog) == 2
    assert str(path) in error_line(capsys) and not (tmp_path / "bad.eval").exists()


@pytest.mark.parametrize(
    "name", ["metrics/clip", "metrics/dino", "reward", "metrics/clip/vocab.json", "metrics/dino/config.json", "unet"]
)
def test_incomplete_base_is_one_line(run, base, dog, tmp_path, capsys, name):
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    assert run("--base", copy, "--subject", dog) == 2
    assert name.split("/")[-1] in error_line(capsys) and files_in(tmp_path / "here") == []


@pytest.mark.parametrize("text", ['{"guidance": "strong"}', '{"solver_steps": 0.5}', "[]", "{"])
def test_garbage_in_rpo_json(run, base, dog, tmp_path, capsys, text):
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    (copy / "rpo.json").write_text(text, encoding="utf-8")
    call_quick = ("--base", copy, "--subject", dog)
    status = run(*call_quick) if "solver" not in text else run(*call_quick, "--steps", 1)
    if "solver" in text:
        assert status == 0  # the command line says how many
    else:
        assert status == 2 and "rpo.json" in error_line(capsys)


def test_empty_folder_and_unwritable_places(run, base, dog, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("--base", base, "--subject", tmp_path / "empty") == 2
    assert "photos" in error_line(capsys)
    (tmp_path / "here" / "file").write_text("a file", encoding="utf-8")
    assert run("--base", base, "--subject", dog, "--out", "file") == 2
    assert "file" in error_line(capsys)
    (tmp_path / "here" / "base-base-dog.eval.json").mkdir()
    assert run("--base", base, "--subject", dog) == 2
    assert "base-base-dog.eval.json" in error_line(capsys)
    assert files_in(tmp_path / "here") == ["base-base-dog.eval.json", "file"]


def test_interrupted(run, base, dog, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusion, "generate", interrupt)
    assert run("--base", base, "--subject", dog) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "interrupted"
    assert files_in(tmp_path / "here") == []


def test_as_a_command_of_its_own(dog, tmp_path):
    """The exit status and the streams, as a shell sees them."""
    command = [sys.executable, evaluate.__file__, *map(str, QUICK), "--subject", dog, "--ckpt", tmp_path / "no"]
    bad = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(bad.stderr.splitlines()) == 1 and bad.stderr.startswith("evaluate.py: error: ")
