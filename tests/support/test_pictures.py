"""pictures.py: names, texts and pages of pictures."""

import pytest
from PIL import Image

from support.pictures import GAP, KEPT, PAPER, check_page, film_strip, grid, save_png


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
