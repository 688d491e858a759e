"""Prompts and photos: DreamBench's lists word for word, and which files of a folder are photos."""

import hashlib
import os

import pytest
from PIL import Image

from subject import (
    DREAMBENCH_NOUNS,
    DREAMBENCH_PROMPTS,
    SKILLS,
    TRAINING_PROMPTS,
    SubjectError,
    fill,
    load_photos,
    load_subject,
)


def put(folder, name="a.png", image=None, **options):
    folder.mkdir(exist_ok=True)
    (image or Image.new("RGB", (8, 6), "red")).save(folder / name, **options)
    return folder


def refused(match, *args, **options):
    with pytest.raises(SubjectError, match=match) as caught:
        load_subject(*args, **options)
    assert "\n" not in str(caught.value)


# ---- prompts and nouns


@pytest.mark.parametrize(
    "words, count, digest",
    [
        (DREAMBENCH_PROMPTS["live"], 25, "9326e098c349"),
        (DREAMBENCH_PROMPTS["thing"], 25, "37d835910d2e"),
        (TRAINING_PROMPTS["live"], 8, "b3e87089c2cd"),
        (TRAINING_PROMPTS["thing"], 8, "b63af5859879"),
        (DREAMBENCH_NOUNS, 30, "0ec7505aec6c"),
        (DREAMBENCH_NOUNS.values(), 30, "aef68732ff8e"),
    ],
)
def test_lists_are_the_published_ones(words, count, digest):
    """They were compared word for word with DreamBench's file and the paper's Figure 6; a change must be meant."""
    assert len(words) == count and hashlib.sha256("\n".join(words).encode()).hexdigest().startswith(digest)


def test_filled_prompts(tmp_path):
    assert DREAMBENCH_PROMPTS["live"][9] == "a {V} {noun} on top of a purple rug in a forest"
    assert TRAINING_PROMPTS["thing"][4] == "a {V} {noun} on top of wooden roof"
    dog = load_subject(put(tmp_path / "dog"), token="sks")
    assert (dog.instance_prompt, dog.class_prompt) == ("a photo of sks dog", "a photo of a dog")
    assert dog.training_prompts[1] == "a sks dog in Vincent Van Gogh rendition"
    assert dog.training_prompts[-1] == "a green sks dog" and dog.test_prompts[-1] == "a cube shaped sks dog"
    assert all(fill(prompts, "sks", "dog") for prompts in SKILLS.values())  # each has token and noun
    assert fill(SKILLS["views"][2:3], " sks", "big  cat") == ["a back view of a sks big cat"]  # a header's
    can = load_subject(put(tmp_path / "can"), token="{noun}")  # an odd token is not filled in twice
    assert can.test_prompts[10] == "a {noun} can with a wheat field in the background"
    with pytest.raises(SubjectError, match="'a hotdog asks' lacks 'sks'"):  # the reward would not remove it
        fill(["a hotdog asks"], "sks", "dog")


@pytest.mark.parametrize(
    "folder, noun, live",
    [
        *[(folder, noun, noun in ("cat", "dog")) for folder, noun in DREAMBENCH_NOUNS.items()],
        *[("Golden_Retriever-puppy3", "golden retriever puppy", True), ("teddy-bear", "teddy bear", False)],
        *[("my_lamp", "my lamp", False), ("glasses", "glasses", False), ("our_dogs", "our dogs", True)],
    ],
)
def test_noun_from_the_folder(tmp_path, folder, noun, live):
    subject = load_subject(put(tmp_path / folder))
    assert (subject.noun, subject.live) == (noun, live)


def test_given_noun_and_kind_win(tmp_path, monkeypatch):
    folder = put(tmp_path / "dog6")
    car = load_subject(folder, noun="  toy   car ")
    assert (car.noun, car.live) == ("toy car", False)
    assert load_subject(folder, live=False).test_prompts[10].endswith("wheat field in the background")
    assert load_subject(folder, noun="gizmo", live=True).test_prompts[10] == "a [V] gizmo wearing a red hat"
    monkeypatch.chdir(folder)
    assert load_subject(".").noun == "dog"


def test_bad_nouns_and_tokens(tmp_path):
    refused("--noun", put(tmp_path / "2024-05"))
    folder = put(tmp_path / "dog")
    for noun in (" ", "do\udcffg"):  # the second from a folder whose name is not UTF-8
        refused("--noun", folder, noun=noun)
    refused("token is empty", folder, token=" ")
    refused("the noun alone", folder, noun="[V] dog")


# ---- finding photos


def test_photos_are_found_sorted(tmp_path):
    folder, names = tmp_path / "dog", ["10.png", "b.JPG", "a.jpeg", "c.WebP", "d.bmp", "e.tif"]
    for name in names:
        put(folder, name)
    for name in (".DS_Store", "Thumbs.db", "._10.png", ".hidden.jpg"):
        (folder / name).write_bytes(b"not an image")
    (folder / "more.png").mkdir()
    subject = load_subject(str(folder))
    assert [photo.name for photo in subject.photos] == sorted(names)
    assert [photo.size for photo in load_photos(subject, 16)] == [(16, 16)] * len(names)


def test_what_is_not_read_is_named(tmp_path, capsys):
    """Bytes of a name that are not UTF-8 are escaped."""
    put(tmp_path, photo := os.fsdecode(b"caf\xe9.jpg"))
    names = ["IMG.HEIC", "._IMG.HEIC", *(f"{i}.txt" for i in range(6)), os.fsdecode(b"1\xe9.txt")]  # macOS' is second
    for name in names:
        (tmp_path / name).write_bytes(b"a phone's")
    assert [path.name for path in load_subject(tmp_path, "dog").photos] == [photo]
    note = "note: not read as photos: '0.txt', '1.txt', '1\\udce9.txt', '2.txt', '3.txt' and 3 more; "
    assert capsys.readouterr().out == note + "convert pictures to .jpg or .png\n"


def test_bad_folders(tmp_path, monkeypatch):
    refused("cannot be read.*No such file", tmp_path / "absent")
    (tmp_path / "dog.png").write_bytes(b"")
    refused("cannot be read.*Not a directory", tmp_path / "dog.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "IMG.HEIC").write_bytes(b"heic")
    refused("holds no photos.*heic", tmp_path / "empty")

    def locked(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", locked)  # root may read everything, so chmod would not do
    refused("cannot be read.*Permission denied", tmp_path)


def test_bad_photos_are_named(tmp_path):
    folder = put(tmp_path / "dog", "good.png")
    (folder / "bad.jpg").write_bytes(b"a text file")
    refused("bad.jpg is not a usable image .*replace it", folder)
    (folder / "bad.jpg").unlink()
    subject = load_subject(folder)
    (folder / "good.png").unlink()
    with pytest.raises(SubjectError, match=r"good\.png"):
        load_photos(subject, 8)
