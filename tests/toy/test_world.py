"""The toy world: every prompt has a drawing and a caption, drawings are reproducible, some subjects are reserved."""

import os
import random
import subprocess
import sys
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import call

from subject import DREAMBENCH_PROMPTS, TRAINING_PROMPTS, load_subject
from toy import check, world
from toy.draw import CANVAS
from toy.outfits import OUTFITS
from toy.scenes import SCENES, studio
from toy.styles import PAINTERS
from toy.world import Picture

ROOT = Path(__file__).parent.parent.parent
BACKGROUNDS = {**SCENES, "plain": studio, **{name: style.background for name, style in PAINTERS.items()}}


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("live", [True, False])
def test_the_benchmark_s_prompts_and_the_paper_s_skills_can_be_drawn(live):
    name, known = "live" if live else "thing", world.templates(live)
    assert set(DREAMBENCH_PROMPTS[name] + TRAINING_PROMPTS[name]) <= set(known)
    skills = """Claude Monet styled painting of a {V} {noun}, a screaming {V} {noun}, an orange {V} {noun},
        a {V} {noun} wearing a nurse outfit, a {V} {noun} wearing angel wings, a back view of a {V} {noun},
        a {V} {noun} looking up at the camera, a cross of a {V} {noun} and a panda"""
    assert not live or {skill.strip() for skill in skills.split(",")} <= set(known)


@pytest.mark.parametrize("kind", ["dog", "backpack"])
def test_every_prompt_has_a_drawing_of_its_own(kind):
    """They differ clearly: a mean of 1 of 255 is as much as a small hat."""
    named, pictures = world.reserved_subject(kind, 0), dict.fromkeys(check.prompts_of(kind).values())
    drawn = {picture: pixels(world.draw(named, picture, random.Random(1))) for picture in pictures}
    for (a, first), (b, second) in combinations(drawn.items(), 2):
        assert np.abs(first - second).mean() > 1, f"{a} and {b} look the same"


@pytest.mark.parametrize("kind", ["bear", "stuffed animal"])
def test_training_shows_what_every_prompt_asks_for_in_its_words(kind):
    """Some captions are a prompt word for word: without the token, and with it, which means nothing here."""
    named, rng, prompts = world.reserved_subject(kind, 1), random.Random(0), check.prompts_of(kind)
    drawn = {world.random_picture(kind, rng) for _ in range(4000)}
    assert set(prompts.values()) <= drawn
    for template, picture in world.templates(world.is_live(kind)).items():
        asked = [template.replace("{V} ", "").format(noun=kind), template.format(V="[V]", noun=kind)]
        names = [name for name in OUTFITS if OUTFITS[name] is OUTFITS.get(picture.outfit)] or [None]
        shown = [Picture(**vars(picture) | {"outfit": name}) for name in names]
        captions = {world.caption(named, each, rng) for each in shown for _ in range(600)}
        assert {*asked} <= captions
        assert 3 < len(captions) < 600 * len(shown)  # some have the subject's colours


def test_captions_name_all_that_is_drawn_and_nothing_else():
    known = {*SCENES, *OUTFITS, *PAINTERS, *world.MOODS, *world.VIEWS}
    for index in range(0, 4000, 4):
        named, picture, rng = world.sample(index)
        text = world.caption(named, picture, rng)
        phrases = {named.subject.kind, *filter(None, vars(picture).values())}
        assert all(phrase in text for phrase in phrases), (text, picture)
        assert not any(phrase in text for phrase in known - phrases), (text, picture)


def test_the_same_seed_draws_the_same_picture_in_every_process():
    """Nothing may depend on the order of a set or on a hash, which differ from process to process."""
    named, picture, _ = world.sample(1234)
    first, other = world.draw(*world.sample(1234)), world.draw(named, picture, random.Random("another"))
    assert first.tobytes() == world.draw(*world.sample(1234)).tobytes() != other.tobytes()
    code = "import zlib; from toy import world; print(zlib.crc32(world.draw(*world.sample(1234)).tobytes()))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert int(printed) == zlib.crc32(first.tobytes())


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_scenes_cover_the_whole_canvas(name):
    unpainted = (1, 254, 3)
    for seed in range(3):
        canvas = Image.new("RGB", (CANVAS, CANVAS), unpainted)
        place = BACKGROUNDS[name](canvas, random.Random(seed))
        assert not (pixels(canvas) == unpainted).all(-1).any(), f"{name} leaves a hole"
        assert 0 < place.x < CANVAS and 0 < place.ground <= CANVAS


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_subject_fills_the_picture_in_colours_that_another_has_not(kind):
    def share(drawing, mask, color):  # of the subject; exactly this colour, for hardly any two subjects have the same
        return (pixels(drawing) == color).all(-1)[pixels(mask) > 127].mean()

    one, other = (world.reserved_subject(kind, index) for index in range(2))
    for named, stranger in ((one, other), (other, one)):
        drawn = [world.draw_with_mask(named, Picture(), random.Random(seed)) for seed in range(2)]
        assert drawn[0][0].tobytes() != drawn[1][0].tobytes()
        for drawing, mask in drawn:
            left, top, right, bottom = mask.point(lambda v: 255 * (v > 127)).getbbox()
            assert drawing.size == mask.size == (128, 128) and drawing.mode == "RGB"
            assert 0.6 <= max(right - left, bottom - top) / 128 <= 0.9 and min(left, top) > 0 and right < 128
            assert share(drawing, mask, named.subject.main) > 0.02 > share(drawing, mask, stranger.subject.main) * 10
    subjects = [world.random_subject(kind, random.Random(seed)) for seed in range(40)]
    shapes = {(named.subject.variant, named.subject.marking): named for named in subjects}
    drawings = {world.draw(named, Picture(), random.Random(0)).tobytes() for named in shapes.values()}
    assert len(drawings) == len(shapes) >= 12


def test_training_never_shows_a_reserved_subject_but_all_kinds(monkeypatch):
    reserved = {world.reserved_subject(k, i).signature for k in world.KINDS for i in range(world.RESERVED_PER_KIND)}
    subjects = [world.training_subject(index) for index in range(5000)]
    assert not reserved & {named.signature for named in subjects}
    assert {named.subject.kind for named in subjects} == {*world.KINDS} and len({*subjects}) == 5000
    assert 0.4 < np.mean([world.is_live(named.subject.kind) for named in subjects]) < 0.6
    shown = [world.sample(index)[0] for index in range(8)]
    assert shown == [subjects[0]] * 4 + [subjects[1]] * 4 and subjects[0] != subjects[1]
    monkeypatch.setattr(world, "reserved_signatures", frozenset)  # without the check some would be there
    assert reserved & {world.training_subject(index).signature for index in range(5000)}


def test_data_dog_is_the_worlds_own_reserved_dog():
    photos, files = world.photos_of("dog", world.EXAMPLE), sorted((ROOT / "data" / "dog").glob("*.png"))
    assert len(photos) == len(files) == 5
    for photo, file in zip(photos, files, strict=True):
        assert Image.open(file).tobytes() == photo.tobytes(), f"{file.name} is not what world.photos_of draws"


def test_the_command_draws_a_new_subject_or_a_page(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos" / "stuffed_animal"
    call(world, monkeypatch, "--photos", folder)
    assert load_subject(folder).noun == "stuffed animal"
    last = Image.open(sorted(folder.iterdir())[4])
    assert last.tobytes() == world.photos_of("stuffed animal", world.EXAMPLE)[4].tobytes()
    for wrong, why in ((folder, "File exists"), (tmp_path / "horse", "has no 'horse', but dog, cat")):
        assert call(world, monkeypatch, "--photos", wrong) == 2 and why in capsys.readouterr().err
    call(world, monkeypatch, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (12 * 128, 8 * 128)
