"""evaluate.py: the scores against transformers, and the command on a tiny random base.

Tolerance: float32 features of order 1 differ by about 1e-6 between two implementations, cosines by less; 1e-5.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny import WEIGHTS, call, error_line, files_in, parameters, write_ckpt, write_photos

import evaluate
from evaluate import Metrics
from model.aesthetic import AestheticPredictor
from model.clip import CLIP
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


@pytest.fixture
def base(measured, tmp_path):
    """A copy, which a test may change."""
    return Path(shutil.copytree(measured, tmp_path / "base"))


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


@pytest.fixture
def measure(run, capsys):
    """Call evaluate.py for one subject; returns the content of its JSON file, and what it printed."""

    def call_it(*arguments):
        assert run(*arguments) == 0
        out = capsys.readouterr().out
        return read(re.search("numbers are in (.+), the pictures in ", out)[1]), out

    return call_it


def folders_of(base):
    return {"clip": base / "metrics" / "clip", "dino": base / "metrics" / "dino", "align": base / "reward"}


def metrics_of(base, photos, token="[V]"):
    return Metrics.from_folders(**folders_of(base), photos=photos, token=token)


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- the scores


def test_agrees_with_transformers(base):
    """From PIL pictures, not square ones, to the scores, with the library's own preprocessing, networks and tokens.

    The mean over the photos, of more pictures than one batch holds. (test_reward.py: the scores of ALIGN.)
    """
    photos, images = [picture(i, (60, 44)) for i in range(2)], [picture(5 + i, (30, 31 + i)) for i in range(18)]
    prompts = [f"a {'red ' * (i % 3)}[V] dog" for i in range(18)]
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
        assert 0 < (expected < 0).sum() < 9  # a cosine below 0 counts as 0
        assert (scores["clip_t"] - expected.clamp(min=0)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------- one subject


def test_checkpoint_writes_what_it_says(measure, ckpt, base, dog):
    result, said = measure("--ckpt", ckpt, "--subject", dog, "--n", 2)
    folder, rows = ckpt.parent / "best.eval", result["images"]
    assert sorted(path.name for path in ckpt.parent.iterdir()) == ["best.eval", "best.eval.json", ckpt.name]
    prompts = [row["prompt"] for row in rows]
    assert len({row["seed"] for row in rows}) == 50 and len(set(prompts)) == 25
    assert prompts[24:26] == ["a [V] dog wearing a rainbow scarf"] * 2
    assert sorted(row["file"] for row in rows) == sorted(set(files_in(folder)) - {"grid.png"})
    assert Image.open(folder / "grid.png").size == (2 * 20 + 4, 25 * 20 + 4)

    # The pictures are the checkpoint's; the numbers are those of the very files.
    sd = StableDiffusion.from_pretrained(base)
    sd.load_checkpoint(ckpt)
    images = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    again = sd.generate(prompts[3:4], [rows[3]["seed"]], steps=1, guidance=3)[0]
    assert np.abs(np.asarray(again).astype(int) - np.asarray(images[3])).max() <= 1  # another batch: rounding
    text = parameters(folder / rows[3]["file"])
    assert (text["prompt"], text["Seed"], text["CFG scale"]) == (prompts[3], str(rows[3]["seed"]), "3")
    scores = metrics_of(base, [Image.open(path) for path in sorted(dog.iterdir())])(images, prompts)
    scores["lambda_harmonic"] = lambda_harmonic(scores["align_i"], scores["align_t"], 0.3)
    assert list(result["means"]) == [*NAMES, "lambda_harmonic"]
    for name, values in scores.items():
        assert [row[name] for row in rows] == pytest.approx(values.tolist(), abs=2e-6)
        means, shown = values.view(25, 2).mean(1), result["means"][name]
        assert (shown["mean"], shown["sd"]) == pytest.approx((means.mean().item(), means.std().item()), abs=2e-6)
        assert re.search(f"^{evaluate.TITLES[name]} +{shown['mean']:.4f} +{shown['sd']:.4f} ", said, re.MULTILINE)

    assert "without the token [V]" in said and "without the token [V]" in result["scored_text"]
    assert result["networks"] == {name: str(folder) for name, folder in folders_of(base).items()}
    assert all(folder in said for folder in result["networks"].values()) and "ALIGN-T, λ = 0.3" in said
    assert result["training"] == read_metadata(ckpt)  # how it was made, next to how it was measured
    known = {"base": str(base), "noun": "dog", "live": True, "lambda": 0.3, "steps": 1, "guidance": 3}
    assert result["settings"].items() >= known.items()


def test_base_alone(measure, base, dog, tmp_path):
    result, _ = measure("--base", base, "--subject", dog)
    files = files_in(tmp_path / "here")
    assert files[:2] == ["base-base-dog.eval", "base-base-dog.eval.json"] and len(files) == 2 + 25 + 1
    assert result["settings"]["guidance"] == 7.5 and result["settings"]["ckpt"] is None
    settings = measure("--subject", dog)[0]["settings"]  # the embedded one
    assert settings["base"] == "weights/toy" and settings["guidance"] == 4  # its rpo.json


def test_same_command_same_files_whatever_the_batch(measure, ckpt, dog):
    def files():
        return {path.name: path.read_bytes() for path in Path("out").iterdir()}

    command = ("--ckpt", ckpt, "--subject", dog, "--out", "out")
    (result, _), pictures = measure(*command), files()
    assert measure(*command, "--seed", 0)[0] == result and files() == pictures and len(pictures) == 26
    other, _ = measure(*command, "--batch", 4, "--out", "batch")
    numbers = [[[row[name] for name in NAMES] for row in each["images"]] for each in (result, other)]
    assert np.abs(np.subtract(*numbers)).max() < 1e-3  # one grey level in some pixel, at most
    other, _ = measure(*command, "--guidance", 2)  # other pictures get other names
    assert files().items() > pictures.items() and {row["file"] for row in other["images"]}.isdisjoint(pictures)
    other, _ = measure(*command, "--seed", 1, "--out", "other")
    assert {row["seed"] for row in other["images"]}.isdisjoint(row["seed"] for row in result["images"])


def test_flags_win(base, dog, tmp_path, monkeypatch):
    """test_header.py: what is drawn without them. λ is 0.3 also for a checkpoint that another has chosen."""
    path = write_ckpt(base, tmp_path / "a.safetensors", lambda_val="0.7", resolution="24")
    given = ("--lambda", 0, "--guidance", 2, "--solver-steps", 3, "--sampler", "ddim")
    for options, lam, drawn in ((QUICK, 0.3, "1 DPM++ 2M 3 24x24"), (given, 0, "3 DDIM 2 24x24")):
        assert call(evaluate, monkeypatch, "--ckpt", path, "--subject", dog, "--n", 1, *options) == 0
        result = read(tmp_path / "a.eval.json")
        row, (align_i, align_t) = result["images"][0], [result["images"][0][name] for name in NAMES[3:]]
        shown = parameters(Path(result["pictures"]) / row["file"])
        assert " ".join(shown[name] for name in ("Steps", "Sampler", "CFG scale", "Size")) == drawn
        assert row["lambda_harmonic"] == pytest.approx(1 / (lam / align_i + (1 - lam) / align_t), abs=2e-6)


def test_base_is_read_as_the_header_says(measure, base, dog, tmp_path):
    path = write_ckpt(base, tmp_path / "a.safetensors", prediction_type="v_prediction")
    v = measure("--ckpt", path, "--subject", dog)[0]
    assert v["settings"]["prediction_type"] == "v_prediction"
    epsilon = measure("--ckpt", path, "--subject", dog, "--prediction-type", "epsilon")[0]
    assert v["means"] != epsilon["means"]


def test_networks_of_ones_own(measure, measured, base, dog, tmp_path):
    """Of a base that has none."""
    (base / "metrics").rename(tmp_path / "metrics"), (base / "reward").rename(tmp_path / "reward")
    options = [text for name, folder in folders_of(tmp_path).items() for text in (f"--{name}", folder)]
    result, _ = measure("--subject", dog, "--base", base, *options)
    assert result["networks"] == {name: str(folder) for name, folder in folders_of(tmp_path).items()}
    assert result["means"] == measure("--subject", dog, "--base", measured)[0]["means"]


def test_the_subject_is_what_flags_then_the_header_then_the_folder_say(measure, base, tmp_path):
    thing = write_photos(tmp_path / "vase")
    path = write_ckpt(base, tmp_path / "a.safetensors", token="sks")
    for options, text in (
        (("--ckpt", path), "a sks dog wearing a red hat"),
        (("--ckpt", path, "--noun", "my vase", "--no-live", "--token", "qx"), "a qx my vase with a wheat field"),
        (("--base", base, "--live"), "a [V] vase wearing a red hat"),
    ):
        result, out = measure("--subject", thing, *options)
        assert result["images"][10]["prompt"].startswith(text)
        scored = f"the prompt without the token {text.split()[1]}"
        assert result["scored_text"] == scored and scored in out


def test_prompts_of_ones_own(measure, base, dog, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("a {V} {noun} asleep\n\na [V] dog awake\n", encoding="utf-8")
    result, out = measure("--base", base, "--subject", dog, "--prompts", own, "--n", 2)
    prompts = ["a [V] dog asleep", "a [V] dog awake"]
    assert result["settings"]["prompts"] == prompts and "means of the prompts: 2, images a prompt: 2." in out
    assert [row["prompt"] for row in result["images"]] == [prompt for prompt in prompts for _ in range(2)]
    own.write_text("a {V} {noun} asleep", encoding="utf-8")
    result, _ = measure("--base", base, "--subject", dog, "--prompts", own)
    assert result["means"]["dino"] == {"mean": result["images"][0]["dino"], "sd": 0}


def test_aesthetic_score(measure, run, base, dog, tmp_path, capsys):
    path, clip, command = tmp_path / "laion.pth", base / "metrics" / "clip", ("--base", base, "--subject", dog)
    torch.manual_seed(0)
    predictor, network = AestheticPredictor(16).eval().requires_grad_(False), CLIP.from_pretrained(clip)
    torch.save(predictor.state_dict(), path)
    result, out = measure(*command, "--aesthetic", path, "--aesthetic-clip", clip)
    images = [Image.open(Path(result["pictures"]) / row["file"]) for row in result["images"]]
    with torch.no_grad():
        features = network.image_features(network.preprocess(images))
        expected = predictor(torch.nn.functional.normalize(features))
    assert expected.std() > 1e-4
    assert [row["aesthetic"] for row in result["images"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert f"{result['means']['aesthetic']['mean']:.4f}" in re.search("^Aesthetic .*laion.pth$", out, re.MULTILINE)[0]
    assert "Aesthetic" not in measure(*command)[1]
    predictor.layers[0].bias[0] = torch.nan
    torch.save(predictor.state_dict(), path)
    for options, words in (
        (("--aesthetic-clip", clip), "both"),
        (("--aesthetic", "no", "--aesthetic-clip", clip), "no is missing: name its place with --aesthetic"),
        (("--aesthetic", path, "--aesthetic-clip", clip), "aesthetic predictor's output is not finite"),
    ):
        assert run(*command, *options) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]  # the last pictures were drawn


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
    assert files_in(tmp_path / "here") == []
    assert re.findall("warning: .*runs/(.+) is not finished", err) == ["dog/best.safetensors"]
    summary = read(runs / "dreambench" / "best.eval.json")
    results = {name: read(runs / name / "best.eval.json") for name in ("cat2", "dog", "wolf_plushie")}
    texts = ["cat wearing a red hat", "dog wearing a red hat", "stuffed animal with a wheat field in the background"]
    assert [result["images"][10]["prompt"] for result in results.values()] == [f"a [V] {text}" for text in texts]
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| subject | DINO | CLIP-I | CLIP-T | ALIGN-I | ALIGN-T | λ-Harmonic |"
    assert summary["failed"] == {} and list(summary["subjects"]) == list(results)
    assert summary["subjects"] == {name: result["means"] for name, result in results.items()}
    images = [row for result in results.values() for row in result["images"]]  # one a prompt
    for name, value in summary["means"].items():
        values = [row[name] for row in images]
        assert list(value.values()) == pytest.approx([np.mean(values), np.std(values, ddof=1)], abs=2e-6)
    for row, (name, numbers) in zip(rows[1:], [*summary["subjects"].items(), ("all 3", summary["means"])], strict=True):
        cells = [f"{numbers[key]['mean']:.3f} ± {numbers[key]['sd']:.3f}" for key in [*NAMES, "lambda_harmonic"]]
        assert row == f"| {name} | {' | '.join(cells)} |"
    assert all(len(files_in(runs / name / "best.eval")) == 26 for name in results)
    # Each was drawn with its own checkpoint: alone it has the same numbers.
    assert run("--ckpt", runs / "wolf_plushie" / "best.safetensors", "--subject", bench[1] / "wolf_plushie") == 0
    assert read(runs / "wolf_plushie" / "best.eval.json") == results["wolf_plushie"]


def test_dreambench_continues(run, bench, base, tmp_path, capsys, monkeypatch):
    def done(*options):
        """Which subjects the command evaluates, and which it has done before."""
        assert run(*bench, *options) == 0
        out = capsys.readouterr().out
        return [re.findall(rf"^(\w+): {word}, ", out, re.MULTILINE) for word in ("done", "done before")]

    replace, written = os.replace, []

    def interrupt(*paths):
        written.append(paths)
        if len(written) == 30:  # the first subject has 27 files
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        assert run(*bench) == 130
    err = capsys.readouterr().err
    assert "interrupted; the same command continues" in err and "Traceback" not in err
    assert done() == [["dog", "wolf_plushie"], ["cat2"]]
    runs, names = tmp_path / "runs", ["cat2", "dog", "wolf_plushie"]
    result, summary = runs / "dog" / "best.eval.json", read(runs / "dreambench" / "best.eval.json")
    assert done() == [[], names] and read(runs / "dreambench" / "best.eval.json") == summary

    # Cut off, of other weights, photos or settings, some other file, or without a picture: it is done again.
    values = read(result)
    result.write_text(result.read_text()[:500], encoding="utf-8")
    write_ckpt(base, runs / "cat2" / "best.safetensors", 2, noun="cat")
    picture(9).save(tmp_path / "dataset" / "wolf_plushie" / "0.png")
    assert done() == [names, []]
    row = {"file": values["images"][0]["file"]}  # without its numbers
    for change in ({"settings": values["settings"] | {"seed": 1}}, {"means": []}, {"images": [row] * 25}):
        result.write_text(json.dumps(values | change), encoding="utf-8")
        assert done() == [["dog"], ["cat2", "wolf_plushie"]] and read(result) == values
    (runs / "dog" / "best.eval" / values["images"][0]["file"]).unlink()
    assert done() == [["dog"], ["cat2", "wolf_plushie"]] and read(result) == values
    assert done("--out", "pictures") == [names, []] and len(files_in(Path("pictures/dog"))) == 26
    Path("own.txt").write_text("a {V} {noun}", encoding="utf-8")
    for expected in ([names, []], [[], names]):
        assert done("--prompts", "own.txt") == expected


def test_dreambench_survives_failing_subjects(run, bench, tmp_path, capsys):
    path = tmp_path / "runs" / "wolf_plushie" / "best.safetensors"
    tensors = load_file(path)
    tensors.pop("conv_out.weight")
    save_tensors(tensors, path, read_metadata(path))
    (tmp_path / "dataset" / "cat2" / "1.png").write_text("no picture", encoding="utf-8")
    assert run(*bench) == 1
    out, err = capsys.readouterr()
    assert re.search("cat2: error: .*1.png", err) and err.count("error") == 2
    assert re.search("wolf_plushie: error: .*conv_out.weight", err)
    summary = read(tmp_path / "runs" / "dreambench" / "best.eval.json")
    assert list(summary["failed"]) == ["cat2", "wolf_plushie"] and "1.png" in summary["failed"]["cat2"]
    assert list(summary["subjects"]) == ["dog"] and "| dog | " in out


def test_dreambench_of_the_base_alone(run, bench, base):
    assert run(*bench[:2], "--base", base, "--out", "mine") == 0
    names = ["cat2", "dog", "dreambench", "wolf_plushie"]
    assert sorted(path.name for path in Path("base-base").glob("*.json")) == [f"{name}.eval.json" for name in names]
    assert sorted(path.name for path in Path("mine").iterdir()) == ["cat2", "dog", "wolf_plushie"]


# ---------------------------------------------------------------------------------------------- bad input

BAD = "--n 0, --seed -1, --steps 1001, --guidance 1e30, --batch 0, --lambda 1.1, --device abacus, --nonsense, "
BAD += "--ckpt=, --noun=, --clip=, --out=, --base=, --token dog, --dreambench ."
NOWHERE = [f"--{name} nowhere" for name in ("clip", "align", "base", "subject", "prompts")]
BAD_MANY = {"": "--subject", "--dreambench nowhere": "nowhere", "--dreambench {}/dog": "no subject of DreamBench"}
BAD_MANY |= {f"--dreambench {{}} {text}": text.split()[0] for text in ("--noun dog", "--live")}
BAD_MANY |= {"--dreambench {} --ckpt best.safetensors": "{subject}", "--dreambench {} --prompts nowhere": "nowhere"}


@pytest.mark.parametrize("option", [*BAD.split(", "), *NOWHERE, *BAD_MANY])
def test_bad_option_is_one_line(run, base, dog, bench, capsys, option, tmp_path):
    subject = [] if option in BAD_MANY else ["--base", base, "--subject", dog]
    assert run(*subject, *option.replace("{}", str(bench[1])).split()) == 2
    word = BAD_MANY[option] if option in BAD_MANY else "nowhere" if option in NOWHERE else option.split()[0].strip("-=")
    assert word in error_line(capsys) and files_in(tmp_path / "here") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance", "0"), ("live", "perhaps"), ("noun", " "), ("token", ""), ("base", "no/base")],
)
def test_bad_header_is_one_line(run, base, dog, tmp_path, capsys, name, value):
    """Before any network is loaded: this base's U-Net is broken."""
    path = write_ckpt(base, tmp_path / "bad.safetensors", **{name: value})
    (base / "unet" / WEIGHTS).write_bytes(b"no weights")
    assert run("--ckpt", path, "--subject", dog) == 2
    assert name in error_line(capsys) and not (tmp_path / "bad.eval").exists()


@pytest.mark.parametrize("name", ["metrics/clip", "reward", "metrics/clip/vocab.json", "metrics/dino/config.json"])
def test_incomplete_base_is_one_line(run, base, dog, tmp_path, capsys, name):
    shutil.rmtree(base / name) if (base / name).is_dir() else (base / name).unlink()
    assert run("--base", base, "--subject", dog) == 2
    assert name.split("/")[-1] in error_line(capsys) and files_in(tmp_path / "here") == []


def test_empty_folder_and_unwritable_places(run, base, dog, tmp_path, capsys):
    for folder in ("empty", "here/base-base-dog.eval.json"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "file").write_text("a file", encoding="utf-8")
    before = files_in(tmp_path)
    bad = {"photos": (tmp_path / "empty", "o"), "file": (dog, "file"), "folder of the photos": (dog, dog)}
    bad["base-base-dog.eval.json"] = dog, "out"
    for word, (photos, out) in bad.items():
        assert run("--base", base, "--subject", photos, "--out", out) == 2
        assert word in error_line(capsys) and files_in(tmp_path) == before
