"""toy/check.py: what it measures, its exit status, and what it refuses before any work."""

import random

import pytest
import torch
from PIL import Image
from tiny import call, error_line

from model.clip import CLIP
from model.dino import DINO
from model.tokenizer import CLIPTokenizer
from model.vae import VAE
from toy import check, world
from toy.networks import WEIGHTS

SKILLS = ["scene", "look", "painter", "outfit", "mood", "cross", "view"]


def test_vae_and_clip_of_the_embedded_base_are_measured():
    overall, subject = check.check_vae(VAE.from_pretrained(WEIGHTS / "vae"), count=16)
    assert 29 < overall[1] < 40 and 27 < subject[1] < overall[1]
    assert overall[2:] == (30, "dB") and subject[2:] == (28, "dB")
    folder = WEIGHTS / "metrics" / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    kind, phrase, worst, *skills = check.check_clip(CLIP.from_pretrained(folder), tokenizer, seed=0, count=40)
    assert kind[1] > 80 and phrase[1] > 80 and kind[2] == phrase[2] == 95
    assert worst[1] <= kind[1] and skills[0][0] == "CLIP: phrase, scene of 20" and worst[2] is None


def test_retrieval_counts_how_often_the_partner_is_the_nearest():
    dino = DINO.from_pretrained(WEIGHTS / "metrics" / "dino")
    networks = {"DINO": lambda part: dino(dino.preprocess(part)), "blind": lambda part: torch.ones(len(part), 4)}
    seen, blind = ([*check.check_retrieval(name, networks[name], 0, (90, None), 24, 3)] for name in networks)
    expected = [("DINO: the subject among 3 others", 90), ("DINO: the subject among 3 others of its kind", None)]
    assert [(row[0], row[2]) for row in seen] == expected and all(80 < row[1] <= 100 for row in seen)
    assert all(row[1] == 0 for row in blind)  # the partner is not nearer than the others


def test_every_kind_and_every_skill_is_asked_as_often():
    asked = check.balanced_prompts(7 * 20, random.Random(0))
    kinds = [kind for kind, _ in asked]
    assert all(kinds.count(kind) == (14 if world.is_live(kind) else 7) for kind in world.KINDS)
    skills = [check.prompts_of(kind)[prompt].part for kind, prompt in asked if kind == "bear"]
    assert all(skills.count(skill) == 2 for skill in SKILLS)
    assert "a cross of a bear and a bear" not in check.prompts_of("bear")


def test_zero_shot_counts_what_is_right_and_names_the_mistakes(capsys):
    """Two prompts may ask for the same drawing."""
    chef, other_chef, joyous = "a dog in a chef outfit", "a dog wearing a chef outfit", "a joyous dog"
    asked = [("dog", chef), ("dog", joyous), ("clock", "a red clock"), ("clock", "a wet clock")]
    seen = [("dog", other_chef), ("cat", joyous), ("clock", "a red clock"), ("clock", "a shiny clock")]
    assert [*check.zero_shot("CLIP", asked, seen, (95, 97, 85, 80))] == [
        ("CLIP: kind of 4", 75, 95, "%"),
        ("CLIP: phrase of 4", 75, 97, "%"),
        ("CLIP: the worst kind, dog", 50, 85, "%"),
        ("CLIP: phrase, outfit of 1", 100, 80, "%"),
        ("CLIP: phrase, mood of 1", 100, 80, "%"),
        ("CLIP: phrase, look of 2", 50, 80, "%"),
    ]
    printed = capsys.readouterr().out
    assert "1 x dog (seen: cat)" in printed and "1 x a wet clock (seen: a shiny clock)" in printed


@pytest.mark.parametrize("value, status", [(28.0, 0), (27.9, 1)])
def test_the_exit_status_says_whether_all_bars_hold(value, status, capsys):
    assert check.report([("VAE", value, 28, "dB"), ("ALIGN, only reported", 0.0, None, "%")]) == status
    assert ("FAIL" in capsys.readouterr().out) == bool(status)


def test_the_command_writes_the_pictures_of_the_base(tmp_path, monkeypatch, capsys):
    sheet = tmp_path / "check.JPG"
    assert call(check, monkeypatch, "--only", "base", "--prompts", 2, "--sheet", sheet) in (0, 1)
    assert Image.open(sheet).size == (2 * (world.SIZE + 4), world.SIZE + 50)
    assert "base: phrase of 2" in capsys.readouterr().out


@pytest.mark.parametrize("part", check.PARTS)
@pytest.mark.parametrize("flags", [["--sheet", "check.txt"], ["--sheet", "none/check.png"], ["--weights", "none"]])
def test_a_wrong_sheet_and_missing_weights_are_one_line(flags, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(check, monkeypatch, *flags, "--only", part) == 2 and flags[1] in error_line(capsys)
