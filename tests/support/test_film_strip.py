"""film_strip.py: what is where on the page. (test_train.py: that it shows the run.)"""

import pytest
from PIL import Image, ImageChops

from support.film_strip import CURVES, KEPT, LEFT, Validation, film_strip
from support.pictures import GAP, PAGE

PROMPTS = [f"prompt {i} of a [V] dog" for i in range(8)]


def plain(*colour, side=64):
    return Image.new("RGB", (side, side), colour)


PHOTOS = [plain(250, i, 0) for i in range(3)]


def validation(step, reward=0.5, align_t=0.6, rewards=(0.7,) * 8, side=64):
    scores = {"align_i": 0.8, "align_t": align_t, "reward": reward}
    return Validation(step, scores, [plain(step, i, 200, side=side) for i in range(len(rewards))], list(rewards))


def colours(page):
    return {colour for _, colour in page.getcolors(page.width * page.height)}


@pytest.mark.parametrize("side", [16, 512])
def test_the_photos_and_a_row_a_validation(side):
    """Each picture is found in its row and column by its colour; the kept row alone has the frame."""
    photos = [plain(250, i, 0, side=side) for i in range(3)]
    rows = [validation(step, side=side) for step in (0, 40, 80)]
    page = film_strip(PROMPTS, photos, rows, 40)
    shown = min(max(side, 64), 192)
    tops = []
    for i in range(8):
        x = LEFT + i * (shown + GAP)
        seen = [page.getpixel((x, y)) for y in range(page.height)]
        expected = [(step, i, 200) for step in (0, 40, 80)]
        assert all(seen.count(colour) == shown for colour in expected)
        assert i > 2 or seen[GAP : GAP + shown] == [(250, i, 0)] * shown
        tops.append([seen.index(colour) for colour in expected])
    assert all(row == tops[0] == sorted(row) for row in tops)
    framed = [y for y in range(page.height) if page.getpixel((page.width - 2, y)) == KEPT]
    assert tops[0][0] + shown < framed[0] < tops[0][1] < tops[0][1] + shown < framed[-1] < tops[0][2]
    assert KEPT not in colours(film_strip(PROMPTS, photos, rows, None))


def test_each_picture_has_its_own_reward_under_it():
    row = validation(40)
    page = film_strip(PROMPTS, PHOTOS, [row], None)
    top = next(y for y in range(page.height) if page.getpixel((LEFT, y)) == (40, 0, 200))
    for i in range(8):
        rewards = [0.7] * i + [0.1] + [0.7] * (7 - i)
        other = film_strip(PROMPTS, PHOTOS, [row._replace(rewards=rewards)], None)
        box = ImageChops.difference(page, other).getbbox()
        left = LEFT + i * 68
        assert left < box[0] < box[2] < left + 64 and top + 64 <= box[1] < box[3] < top + 64 + 20


@pytest.mark.parametrize("count", [2, 60])
def test_a_curve_of_each_score_with_the_kept_step(count):
    """A score that changes moves its own curve; the kept step is marked in all three."""
    rows = [validation(step, align_t=0.6 + step / 100) for step in range(count)]
    page = film_strip(PROMPTS, PHOTOS, rows, None)
    third, bottom = (page.width - LEFT) // 3, page.height - CURVES
    rows[1] = validation(1, align_t=0.61 + 0.004)
    left, top, right, _ = ImageChops.difference(page, film_strip(PROMPTS, PHOTOS, rows, None)).getbbox()
    assert LEFT + third <= left < right <= LEFT + 2 * third + GAP and top >= bottom
    curves = film_strip(PROMPTS, PHOTOS, rows, count - 1).crop((0, bottom, page.width, page.height))
    marked = [x for x in range(page.width) if curves.crop((x, 50, x + 1, 160)).getcolors()[0][1] == KEPT]
    assert [(x - LEFT) // third for x in marked if x > LEFT] == [0, 1, 2]


@pytest.mark.parametrize(("photos", "validations"), [(1000, 5), (5, 401)])
def test_a_long_strip_is_wrapped(photos, validations):
    """All photos are there, and of many validations the first, the kept one and the last."""
    references = [plain(250, i % 256, i // 256) for i in range(photos)]
    rows = [validation(step) for step in range(validations)]
    rows = [row._replace(pictures=[plain(row.step % 256, row.step // 256, 200)] * 8) for row in rows]
    page = film_strip(PROMPTS, references, rows, validations - 4)
    assert max(page.size) <= PAGE
    assert {picture.getpixel((0, 0)) for picture in references} <= colours(page)
    shown = {(step % 256, step // 256, 200) for step in (0, validations - 4, validations - 1)}
    assert shown <= colours(page)


def test_prompts_of_ones_own():
    many = film_strip(PROMPTS * 100, PHOTOS, [validation(0, rewards=[0.7] * 800, side=16)], None)
    assert max(many.size) <= PAGE and {(0, i, 200) for i in range(40)} == {c for c in colours(many) if c[2] == 200}
    row = validation(0, rewards=[0.7])
    page = film_strip(["a [V] dog " * 50], PHOTOS[:1], [row, row._replace(step=1)], 1)
    assert page.width >= 600 and {(250, 0, 0), (0, 0, 200)} <= colours(page)
