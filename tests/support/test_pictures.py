"""pictures.py: names, texts and pages of pictures."""

import pytest
from PIL import Image

from support.pictures import GAP, KEPT, PAGE, PAPER, check_page, film_strip, grid, save_png


def plain(*colour, side=16):
    return Image.new("RGB", (side, side), colour)


def test_a_page_of_ours_may_be_replaced_however_large(tmp_path, monkeypatch):
    save_png(grid([plain(255, 0, 0)] * 4, 2), tmp_path / "grid.png", "a dog", "Steps: 1", 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    check_page(tmp_path)
    (tmp_path / "grid.png").write_bytes(b"a picture of the user's")
    with pytest.raises(ValueError, match="--out"):
        check_page(tmp_path)


def test_grid():
    pictures = [plain(i, 0, 0) for i in range(5)]
    page = grid(pictures, 3)
    assert page.size == (3 * 20 + GAP, 2 * 20 + GAP)
    assert [page.getpixel((12 + i % 3 * 20, 12 + i // 3 * 20)) for i in range(5)] == [(i, 0, 0) for i in range(5)]
    assert page.getpixel((12 + 40, 32)) == PAPER and page.getpixel((0, 0)) == PAPER


@pytest.mark.parametrize(
    ("prompts", "n", "side", "wide", "shown"),
    [
        (25, 4, 512, 8, 512),  # two prompts a row
        (2, 21, 512, 15, 512),  # two rows a prompt, the second not full
        (4, 200, 320, 29, 271),  # smaller
        (200, 1, 512, 14, 512),
    ],
)
def test_a_large_grid_is_wrapped(prompts, n, side, wide, shown):
    """Every picture is found in its place by its colour."""
    colours = [(i % 256, i // 256, 99) for i in range(prompts * n)]
    page, cell, group = grid([plain(*colour, side=side) for colour in colours], n), shown + GAP, max(wide, n)
    assert max(page.size) <= PAGE and page.width == wide * cell + GAP
    for i, colour in enumerate(colours):
        row, column = i // group * -(-group // wide) + i % group // wide, i % group % wide
        assert page.getpixel((GAP + column * cell + shown // 2, GAP + row * cell + shown // 2)) == colour


@pytest.mark.parametrize("side", [16, 128, 512])
def test_film_strip_has_the_photos_and_a_row_a_validation(side):
    """Each picture is found in its row and column by its colour; the kept row alone has the frame."""
    photos = [plain(250, i, 0, side=side) for i in range(3)]
    rows = [(step, 0.5, [plain(step, i, 200, side=side) for i in range(8)]) for step in (0, 40, 80)]
    page = film_strip([f"prompt {i} of a [V] dog" for i in range(8)], photos, rows, 40)
    colours = {colour for _, colour in page.getcolors(page.width * page.height)}
    assert {(250, i, 0) for i in range(3)} <= colours
    assert {(step, i, 200) for step in (0, 40, 80) for i in range(8)} <= colours

    def top(colour):
        return min(y for y in range(page.height) for x in range(page.width) if page.getpixel((x, y)) == colour)

    if side == 16:  # looking at every pixel takes a while
        tops = [top((250, 0, 0)), *(top((step, 3, 200)) for step in (0, 40, 80))]
        assert tops == sorted(set(tops))
    framed = [y for y in range(page.height) if page.getpixel((page.width - 2, y)) == KEPT]
    shown = min(side, 192)
    assert shown <= len(framed) <= shown + 8
    without = film_strip(["p"] * 8, photos, rows, None)
    assert all(without.getpixel((page.width - 2, y)) != KEPT for y in range(page.height))


@pytest.mark.parametrize(("photos", "validations"), [(200, 11), (1000, 3), (5, 401)])
def test_a_long_film_strip_is_wrapped(photos, validations):
    """All photos are there, and of many validations the first, the kept one and the last."""
    references = [plain(250, i % 256, i // 256, side=192) for i in range(photos)]
    rows = [(step, 0.5, [plain(step % 256, step // 256, 200, side=16)] * 8) for step in range(validations)]
    page = film_strip(["a [V] dog"] * 8, references, rows, validations - 4)
    assert max(page.size) <= PAGE
    colours = {colour for _, colour in page.getcolors(page.width * page.height)}
    assert {picture.getpixel((0, 0)) for picture in references} <= colours
    assert {(step % 256, step // 256, 200) for step in (0, validations - 4, validations - 1) if step >= 0} <= colours
