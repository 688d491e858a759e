"""The toy world: what it draws for the benchmark's words, and who is kept out of training."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import call

from subject import DREAMBENCH_PROMPTS, TRAINING_PROMPTS, load_subject
from toy import check, world
from toy.animals import ANIMALS, OUTFITS
from toy.draw import CANVAS
from toy.scenes import PLAIN, SCENES, starry_night
from toy.things import THINGS
from toy.world import Picture

DATA = Path(__file__).parent.parent / "data"
KINDS_OF = {"live": list(ANIMALS), "thing": list(THINGS)}


def templates(living: str) -> list[str]:
    return DREAMBENCH_PROMPTS[living] + TRAINING_PROMPTS[living]


def picture_of(template: str, living: str) -> Picture:
    """What a prompt of subject.py asks for: its phrase must be one that the world draws for living things or things."""
    before, after = template.split("{V} {noun}")
    phrase = after.strip() or before.removeprefix("a ").strip()
    if phrase == world.VAN_GOGH:
        return Picture(van_gogh=True)
    if phrase in (world.LIVE_SCENES if living == "live" else world.THING_SCENES):
        return Picture(scene=phrase)
    if phrase in OUTFITS and living == "live":
        return Picture(outfit=phrase)
    if phrase in world.LOOKS:
        return Picture(look=phrase)
    raise KeyError(f"the world draws no {phrase!r} for a {living} subject")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---- subject.py's words


def test_there_are_enough_kinds():
    assert len(set(world.KINDS)) == len(world.KINDS) >= 12
    assert sum(map(world.is_live, world.KINDS)) >= 2
    assert {"dog", "cat"} <= set(KINDS_OF["live"]) and {"backpack", "stuffed animal"} <= set(KINDS_OF["thing"])


@pytest.mark.parametrize("living", ["live", "thing"])
def test_every_prompt_has_a_drawing_of_its_own(living):
    """33 prompts, 33 drawings of one subject that differ clearly: 1 of 255 in the mean is a small hat's worth."""
    kinds, drawn = KINDS_OF[living], {}
    named = world.reserved_subject(kinds[0], 0)
    for template in templates(living):
        drawn[template] = world.draw(named, picture_of(template, living), random.Random(1))
    assert len(drawn) == 33
    for (a, first), (b, second) in combinations(drawn.items(), 2):
        assert np.abs(pixels(first) - pixels(second)).mean() > 1, f"{a!r} and {b!r} look the same"


@pytest.mark.parametrize("living", ["live", "thing"])
def test_the_check_asks_for_the_same(living):
    kind = KINDS_OF[living][1]
    wanted = {t.replace("{V} ", "").format(noun=kind): picture_of(t, living) for t in templates(living)}
    assert check.prompts_of(kind) == wanted


@pytest.mark.parametrize("living", ["live", "thing"])
def test_training_draws_what_every_prompt_asks_for(living):
    rng = random.Random(0)
    for kind in (KINDS_OF[living][0], KINDS_OF[living][-1]):
        drawn = {world.random_picture(kind, rng) for _ in range(3000)}
        asked = {picture_of(template, living) for template in templates(living)}
        assert asked <= drawn, f"no training drawing of a {kind} shows {asked - drawn}"


@pytest.mark.parametrize("living", ["live", "thing"])
def test_captions_are_the_prompts_own_words(living):
    """Some captions are a prompt word for word, without the token and with a word in its place that means nothing."""
    kind, rng = KINDS_OF[living][-1], random.Random(2)
    named = world.reserved_subject(kind, 1)
    for template in templates(living):
        captions = {world.caption(named, picture_of(template, living), rng) for _ in range(600)}
        assert template.replace("{V} ", "").format(noun=kind) in captions
        assert template.format(V="[V]", noun=kind) in captions
        assert 3 < len(captions) < 600  # sometimes with the subject's colours, not always


def test_captions_name_all_that_is_drawn():
    for index in range(0, 4000, 4):
        named, picture, rng = world.sample(index)
        text = world.caption(named, picture, rng)
        phrases = [p for p in (named.subject.kind, picture.look, picture.outfit, picture.scene) if p]
        phrases += [world.VAN_GOGH] * picture.van_gogh
        assert all(phrase in text for phrase in phrases), (text, picture)
        others = {*SCENES, *OUTFITS, world.VAN_GOGH} - {*phrases}
        assert not any(phrase in text for phrase in others), (text, picture)


# ---- the drawings


@pytest.mark.parametrize("kind", world.KINDS)
def test_pictures_are_rgb_of_the_base_models_size(kind):
    picture = world.draw(world.reserved_subject(kind, 0), Picture(), random.Random(0))
    assert picture.mode == "RGB" and picture.size == (128, 128)


def test_the_same_seed_draws_the_same_picture():
    named, picture, rng = world.sample(1234)
    again = world.sample(1234)
    assert again[:2] == (named, picture)
    first = world.draw(named, picture, rng)
    assert first.tobytes() == world.draw(*again).tobytes()
    assert first.tobytes() != world.draw(named, picture, random.Random("another")).tobytes()


def test_another_process_draws_the_same_picture():
    """Nothing may hang on the order of a set or on a hash, which differ from process to process."""
    code = (
        "import zlib; from toy import world; "
        "print([zlib.crc32(world.draw(*world.sample(i)).tobytes()) for i in (0, 8, 1234)])"
    )
    printed = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        printed.add(subprocess.check_output([sys.executable, "-c", code], cwd=DATA.parent, env=environment, text=True))
    assert len(printed) == 1


@pytest.mark.parametrize("name, scene", [*SCENES.items(), ("Van Gogh", starry_night), ("plain", PLAIN[0])])
def test_scenes_cover_the_whole_canvas(name, scene):
    unpainted = (1, 254, 3)
    for seed in range(3):
        canvas = Image.new("RGB", (CANVAS, CANVAS), unpainted)
        place = scene(canvas, random.Random(seed))
        assert not (pixels(canvas) == unpainted).all(-1).any(), f"{name} leaves a hole"
        assert 0 < place.x < CANVAS and 0 < place.ground <= CANVAS


def test_pictures_have_no_black_borders():
    for index in range(0, 160, 4):
        picture = pixels(world.draw(*world.sample(index)))
        for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
            assert (edge == 0).all(-1).mean() < 0.5


def share(picture: Image.Image, color: tuple[int, int, int]) -> float:
    """The share of pixels of exactly this colour. Colours are jittered, so hardly any two subjects have one alike."""
    return (pixels(picture) == color).all(-1).mean()


@pytest.mark.parametrize("kind", world.KINDS)
def test_two_drawings_of_one_subject_share_colours_that_another_has_not(kind):
    one, other = world.reserved_subject(kind, 0), world.reserved_subject(kind, 1)
    assert one.subject.main != other.subject.main
    drawings = [world.draw(one, Picture(), random.Random(seed)) for seed in range(2)]
    stranger = world.draw(other, Picture(), random.Random(0))
    assert drawings[0].tobytes() != drawings[1].tobytes()
    for drawing in drawings:
        assert share(drawing, one.subject.main) > 0.01
        assert share(drawing, other.subject.main) < 0.001
    assert share(stranger, other.subject.main) > 0.01
    assert share(stranger, one.subject.main) < 0.001


@pytest.mark.parametrize("look", ["red", "purple", "green"])
def test_colour_looks_change_the_colour(look):
    named = next(n for n in map(world.training_subject, range(100)) if n.main not in ("red", "purple", "green"))
    picture = world.draw(named, Picture(look=look), random.Random(3))
    assert share(picture, named.subject.main) < 0.001


def test_drawing_is_fast():
    """Under 30 ms of this process's time a picture in the mean, which does not count what other programs take."""
    samples = [world.sample(index) for index in range(0, 160, 4)]
    start = time.process_time()
    for sample in samples:
        world.draw(*sample)
    assert (time.process_time() - start) / len(samples) < 0.030


# ---- who is kept out of training


def reserved_among_the_first(count: int) -> set:
    """The reserved subjects that some of the first training subjects cannot be told from."""
    reserved = {world.reserved_subject(k, i).signature for k in world.KINDS for i in range(world.RESERVED_PER_KIND)}
    return reserved & {world.training_subject(index).signature for index in range(count)}


def test_reserved_subjects_are_not_in_the_training_stream():
    assert reserved_among_the_first(5000) == set()


def test_without_the_reserve_they_would_be(monkeypatch):
    """So the test above can fail: 5000 draws meet some of the 64 signatures if nothing keeps them out."""
    monkeypatch.setattr(world, "reserved_signatures", frozenset)
    assert reserved_among_the_first(5000)


def test_training_subjects_are_many_and_of_all_kinds():
    stream = [world.training_subject(index) for index in range(2000)]
    assert {named.subject.kind for named in stream} == set(world.KINDS)
    assert len({named.subject for named in stream}) == 2000
    assert 0.4 < np.mean([world.is_live(named.subject.kind) for named in stream]) < 0.6


def test_four_drawings_in_a_row_show_one_subject():
    named = [world.sample(index)[0] for index in range(8)]
    assert named[0] == named[1] == named[2] == named[3] != named[4] == named[7]


def test_data_dog_is_the_worlds_own_reserved_dog():
    photos = world.photos_of("dog", world.EXAMPLE)
    files = sorted((DATA / "dog").glob("*.png"))
    assert len(photos) == len(files) == 5
    for photo, file in zip(photos, files, strict=True):
        with Image.open(file) as saved:
            assert saved.mode == "RGB" and saved.size == (128, 128)
            assert saved.tobytes() == photo.tobytes(), f"{file.name} is not what world.photos_of draws"


def test_a_new_subject_is_drawn_in_a_new_folder_named_after_its_kind(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos" / "stuffed_animal"
    call(world, monkeypatch, "--photos", folder)
    assert load_subject(folder).noun == "stuffed animal"
    with Image.open(sorted(folder.iterdir())[4]) as last:
        assert last.tobytes() == world.photos_of("stuffed animal", world.EXAMPLE)[4].tobytes()
    for wrong, why in ((folder, "File exists"), (tmp_path / "horse", "no 'horse', but dog, cat")):
        assert call(world, monkeypatch, "--photos", wrong) == 2
        assert why in capsys.readouterr().err
    assert len(list(folder.iterdir())) == 5
