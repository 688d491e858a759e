"""pictures.py: names, texts and pages of pictures."""

import pytest
from PIL import Image

from support.pictures import GAP, PAGE, PAPER, check_folder, grid, labelled, picture_name, save_png


def plain(*colour, side=16):
    return Image.new("RGB", (side, side), colour)


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("a [V] dog, in_the snow!", "a-V-dog-in-the-snow"),
        ("雪の中の犬", "雪の中の犬"),
        ("कुत्ता बर्फ़ में", "कुत्ता-बर्फ़-में"),  # its vowel signs are marks
        ("dog ❤\ufe0f cat", "dog-cat"),  # a mark without a letter
        ("../../etc/passwd", "etc-passwd"),
        ("Été à Zürich, №5", "Été-à-Zürich-5"),
        ("!?", "empty"),
        ("x" * 400, "x" * 120),
        ("犬" * 400, "犬" * 40),  # 3 bytes each: the whole name has at most 255
    ],
)
def test_a_name_keeps_the_letters_of_every_script(prompt, stem):
    assert picture_name(prompt, 2**63 - 1) == f"{stem}-{2**63 - 1}.png"


def test_a_different_picture_of_the_same_name_stays(tmp_path):
    """Other pixels, prompt, settings or seed: another file. The identical picture: the same one."""
    path, red = tmp_path / "new" / "a.png", plain(255, 0, 0)
    variants = [(red, "a b", "s", 0), (plain(0, 255, 0), "a b", "s", 0), (red, "a/b", "s", 0), (red, "a b", "t", 0)]
    variants.append((red, "a b", "s", 1))
    names = ["a.png", *(f"a-{number}.png" for number in range(2, 6))]
    for _ in range(2):
        assert [save_png(picture, path, *text).name for picture, *text in variants] == names
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(names)
    (path.parent / "b.png").symlink_to("nowhere")
    (path.parent / "b-2.png").mkdir()
    assert save_png(red, path.with_name("b.png"), "", "", 0).name == "b-3.png"


def test_a_folder_with_a_page_of_ours_is_ours_however_large(tmp_path, monkeypatch):
    save_png(grid([plain(255, 0, 0)] * 4, 2), tmp_path / "grid-2.png", "a dog", "Steps: 1", 0)
    (tmp_path / "grid-3.png").mkdir()
    (tmp_path / "grid.png").symlink_to("nowhere")
    (tmp_path / "photo.jpg").write_bytes(b"a picture of the user's")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    check_folder(tmp_path)
    (tmp_path / "grid.png").unlink()
    (tmp_path / "grid-2.png").rename(tmp_path / "a-dog-0.png")  # one picture of ours among the user's
    with pytest.raises(ValueError, match=r"photo.jpg .*--out"):
        check_folder(tmp_path)
    (tmp_path / "photo.jpg").unlink()
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("count", "columns", "side", "wide", "shown"),
    [(5, 3, 16, 3, 16), (100, 4, 512, 10, 512), (42, 21, 512, 7, 512), (800, 200, 320, 29, 271)],
)
def test_a_grid_and_a_large_one_which_is_wrapped(count, columns, side, wide, shown):
    """Every picture is found in its place by its colour; the last grid's are smaller."""
    colours = [(i % 256, i // 256, 99) for i in range(count)]
    page, cell = grid([plain(*colour, side=side) for colour in colours], columns), shown + GAP
    assert page.size == (wide * cell + GAP, -(-count // wide) * cell + GAP) and max(page.size) <= PAGE
    for i, colour in enumerate([*colours, *[PAPER] * (-count % wide)]):
        row, column = divmod(i, wide)
        assert page.getpixel((GAP + column * cell + shown // 2, GAP + row * cell + shown // 2)) == colour


@pytest.mark.parametrize(("prompts", "n", "side"), [(10, 2, 768), (10, 1600, 4)])
def test_a_large_labelled_page_is_reduced(prompts, n, side):
    pictures = [plain(90, 90, 99, side=side)] * (prompts * n)
    assert max(labelled(pictures, ["a dog on a cobblestone street"] * prompts, n).size) <= PAGE
