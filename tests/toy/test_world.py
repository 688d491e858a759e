"""The toy world: every prompt has a drawing and a caption, drawings are reproducible, some subjects are reserved."""

import os
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import call

from subject import DREAMBENCH_PROMPTS, TRAINING_PROMPTS, load_subject
from toy import check, world
from toy.animals import OUTFITS
from toy.draw import CANVAS
from toy.scenes import PLAIN, SCENES, starry_night
from toy.world import Picture

ROOT = Path(__file__).parent.parent.parent


def pixels(image):
    return np.asarray(image).astype(int)


def share(picture, color):  # exactly this colour: colours are jittered, so hardly any two subjects share one
    return (pixels(picture) == color).all(-1).mean()


@pytest.mark.parametrize("kind", ["dog", "backpack"])
def test_every_prompt_has_a_drawing_of_its_own(kind):
    """33 prompts, 33 drawings of one subject that differ clearly: a mean of 1 of 255 is as much as a small hat."""
    named, pictures = world.reserved_subject(kind, 0), check.prompts_of(kind)
    drawn = {prompt: pixels(world.draw(named, picture, random.Random(1))) for prompt, picture in pictures.items()}
    assert len(drawn) == 33
    for (a, first), (b, second) in combinations(drawn.items(), 2):
        assert np.abs(first - second).mean() > 1, f"{a!r} and {b!r} look the same"


@pytest.mark.parametrize("kind", ["dog", "bear", "backpack", "stuffed animal"])
def test_training_shows_what_every_prompt_asks_for(kind):
    rng, asked = random.Random(0), set(check.prompts_of(kind).values())
    drawn = {world.random_picture(kind, rng) for _ in range(3000)}
    assert asked <= drawn, f"no training drawing of a {kind} shows {asked - drawn}"


@pytest.mark.parametrize("living, kind", [("live", "bear"), ("thing", "stuffed animal")])
def test_captions_are_the_words_of_the_prompts(living, kind):
    """Some captions are a prompt word for word: without the token, and with it, which means nothing here."""
    named, rng = world.reserved_subject(kind, 1), random.Random(2)
    for template in DREAMBENCH_PROMPTS[living] + TRAINING_PROMPTS[living]:
        captions = {world.caption(named, check.picture_of(template), rng) for _ in range(600)}
        assert template.replace("{V} ", "").format(noun=kind) in captions
        assert template.format(V="[V]", noun=kind) in captions
        assert 3 < len(captions) < 600  # some have the subject's colours


def test_captions_name_all_that_is_drawn_and_nothing_else():
    for index in range(0, 4000, 4):
        named, picture, rng = world.sample(index)
        text = world.caption(named, picture, rng)
        phrases = [p for p in (named.subject.kind, picture.look, picture.outfit, picture.scene) if p]
        phrases += [world.VAN_GOGH] * picture.van_gogh
        assert all(phrase in text for phrase in phrases), (text, picture)
        assert not any(phrase in text for phrase in {*SCENES, *OUTFITS, world.VAN_GOGH} - {*phrases}), (text, picture)


def test_the_same_seed_draws_the_same_picture_in_every_process():
    """Nothing may depend on the order of a set or on a hash, which differ from process to process."""
    named, picture, _ = world.sample(1234)
    first, other = world.draw(*world.sample(1234)), world.draw(named, picture, random.Random("another"))
    assert first.tobytes() == world.draw(*world.sample(1234)).tobytes() != other.tobytes()
    code = "import zlib; from toy import world; print(zlib.crc32(world.draw(*world.sample(1234)).tobytes()))"
    command, printed = [sys.executable, "-c", code], set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        printed.add(subprocess.check_output(command, cwd=ROOT, env=environment, text=True))
    assert len(printed) == 1


@pytest.mark.parametrize("name, scene", [*SCENES.items(), ("Van Gogh", starry_night), ("plain", PLAIN[0])])
def test_scenes_cover_the_whole_canvas(name, scene):
    unpainted = (1, 254, 3)
    for seed in range(3):
        canvas = Image.new("RGB", (CANVAS, CANVAS), unpainted)
        place = scene(canvas, random.Random(seed))
        assert not (pixels(canvas) == unpainted).all(-1).any(), f"{name} leaves a hole"
        assert 0 < place.x < CANVAS and 0 < place.ground <= CANVAS


@pytest.mark.parametrize("kind", world.KINDS)
def test_two_drawings_of_one_subject_share_colours_that_another_has_not(kind):
    one, other = world.reserved_subject(kind, 0), world.reserved_subject(kind, 1)
    first, second = (world.draw(one, Picture(), random.Random(seed)) for seed in range(2))
    assert first.tobytes() != second.tobytes() and first.mode == "RGB" and first.size == (128, 128)
    third = world.draw(other, Picture(), random.Random(0))
    for named, stranger, drawing in ((one, other, first), (one, other, second), (other, one, third)):
        assert share(drawing, named.subject.main) > 0.01 and share(drawing, stranger.subject.main) < 0.001
    subjects = [world.random_subject(kind, random.Random(seed)) for seed in range(40)]
    shapes = {(named.subject.variant, named.subject.marking): named for named in subjects}
    drawings = {world.draw(named, Picture(), random.Random(0)).tobytes() for named in shapes.values()}
    assert len(drawings) == len(shapes) >= 12


def test_training_never_shows_a_reserved_subject_but_all_kinds(monkeypatch):
    def stream(count):
        return [world.training_subject(index) for index in range(count)]

    reserved = {world.reserved_subject(k, i).signature for k in world.KINDS for i in range(world.RESERVED_PER_KIND)}
    subjects = stream(5000)
    assert not reserved & {named.signature for named in subjects}
    assert {named.subject.kind for named in subjects} == {*world.KINDS} and len({*subjects}) == 5000
    assert 0.4 < np.mean([world.is_live(named.subject.kind) for named in subjects]) < 0.6
    shown = [world.sample(index)[0] for index in range(8)]
    assert shown == [subjects[0]] * 4 + [subjects[1]] * 4 and subjects[0] != subjects[1]
    monkeypatch.setattr(world, "reserved_signatures", frozenset)  # without the check some would be there
    assert reserved & {named.signature for named in stream(5000)}


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
    for wrong, why in ((folder, "File exists"), (tmp_path / "horse", "no kind 'horse'; the kinds are dog, cat")):
        assert call(world, monkeypatch, "--photos", wrong) == 2 and why in capsys.readouterr().err
    call(world, monkeypatch, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (12 * 128, 8 * 128)
