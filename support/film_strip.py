"""The film strip of a run: what its validations drew, with the reward of each picture, and the scores as curves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from support.pictures import GAP, INK, PAGE, PAPER, paste

KEPT, CURVE, RULE = (24, 140, 60), (0, 96, 170), (225, 225, 225)  # green, blue, light grey
ROWS = 60  # the most validations that are shown as rows
LEFT, LINE, CURVES = 104, 18, 220  # pixels: the column of step and reward, a line of text, the height of the curves
LINES = 5  # of a prompt over its column
FINE = 4  # curves are drawn so many times larger, then reduced: smooth lines


class Validation(NamedTuple):
    step: int
    scores: dict[str, float]  # their means over all pictures, such as {"align_i": 0.87, "reward": 0.74}
    pictures: list[Image.Image]  # one for each prompt, square
    rewards: list[float]  # of these pictures


def title_of(score: str) -> str:
    """ "align_i" as people read it: ALIGN-I."""
    return score.upper().replace("_", "-") if score != "reward" else score


def film_strip(
    prompts: Sequence[str], photos: Sequence[Image.Image], validations: Sequence[Validation], kept: int | None
) -> Image.Image:
    """A run at a glance: the photos, a row for each validation, and from the second one on a curve for each score.

    The step `kept` is marked. Pictures are at most 192 pixels wide, less if the page would exceed PAGE. Of more than
    ROWS validations every second, or third, ..., the kept one and the last are rows; the curves have all.
    """
    every = -(-len(validations) // ROWS)
    last = len(validations) - 1
    rows = [row for i, row in enumerate(validations) if i % every == 0 or row.step == kept or i == last]
    columns = max(len(prompts), min(len(photos), 8))
    bands = -(-len(photos) // columns)  # rows of photos
    side = min(192, max(64, photos[0].width), (PAGE - LEFT) // columns - GAP)
    texts = LINES * LINE + 3 * GAP + len(rows) * LINE + CURVES
    side = min(side, (PAGE - texts) // (bands + len(rows)) - GAP)
    cell, height = side + GAP, texts + (bands + len(rows)) * (side + GAP)
    page = Image.new("RGB", (max(LEFT + columns * cell, 640), height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)

    paste(page, photos, side, columns, LEFT, GAP)
    pen.text((8, GAP + side // 2), "your photos", INK, font, anchor="lm")
    top = bands * cell + 2 * GAP
    titles = [textwrap.wrap(text, max(8, side // 7), max_lines=LINES, placeholder=" …") for text in prompts]
    for i, lines in enumerate(titles):
        pen.multiline_text((LEFT + i * cell, top), "\n".join(lines), INK, font, spacing=1)
    top += max(map(len, titles)) * LINE
    for row in rows:
        _draw_row(page, row, side, top, row.step == kept)
        top += cell + LINE
    if len(validations) > 1:
        _draw_curves(page, validations, kept, top)
        top += CURVES
    return page.crop((0, 0, page.width, top))


def _draw_row(page: Image.Image, row: Validation, side: int, top: int, kept: bool) -> None:
    """A validation: its step and reward, its pictures, and under each picture the picture's own reward."""
    pen, font, ink = ImageDraw.Draw(page), ImageFont.load_default(12), KEPT if kept else INK
    if kept:
        pen.rectangle((1, top - 3, page.width - 1, top + side + LINE), outline=KEPT, width=3)
    text = f"{f'step {row.step}' if row.step else 'the base'}\nreward\n{row.scores['reward']:.4f}"
    pen.multiline_text((8, top + side // 2), text + "\nKEPT" * kept, ink, font, anchor="lm")
    paste(page, row.pictures, side, len(row.pictures), LEFT, top)
    for i, reward in enumerate(row.rewards):
        pen.text((LEFT + i * (side + GAP) + side // 2, top + side + 1), f"{reward:.3f}", ink, font, anchor="ma")


def _draw_curves(page: Image.Image, validations: Sequence[Validation], kept: int | None, top: int) -> None:
    """A panel for each score, side by side."""
    steps, scores = [row.step for row in validations], list(validations[0].scores)
    width = (page.width - LEFT) // len(scores)
    for i, score in enumerate(scores):
        left = LEFT + i * width
        box = left + 46, top + 46, left + width - 16, top + CURVES - 44
        _draw_curve(page, box, title_of(score), steps, [row.scores[score] for row in validations], kept)


def _draw_curve(
    page: Image.Image,
    box: tuple[int, int, int, int],
    title: str,
    steps: Sequence[int],
    values: Sequence[float],
    kept: int | None,
) -> None:
    """A score over the steps. box: the plot's left, top, right and bottom; title, ticks and labels stand around it."""
    left, top, right, bottom = box
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    ticks = _ticks(min(values), max(values), most=4, least=0.001)
    low, high = ticks[0], ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x, y = (step - steps[0]) / (steps[-1] - steps[0]), (value - low) / (high - low)
        return left + x * (right - left), bottom - y * (bottom - top)

    digits = math.ceil(-math.log10(ticks[1] - ticks[0]) - 1e-6)
    for value in ticks:
        _, y = place(0, value)
        pen.line((left, y, right, y), INK if value == low else RULE)
        pen.text((left - 8, y), f"{value:.{digits}f}", INK, font, anchor="rm")
    for step in _ticks(steps[0], steps[-1], most=(right - left) // 48, least=1):
        x, _ = place(step, low)
        if x <= right:
            pen.line((x, bottom, x, bottom + 4), INK)
            pen.text((x, bottom + 7), f"{step:.0f}", INK, font, anchor="ma")
    pen.text(((left + right) // 2, bottom + 24), "step", INK, font, anchor="ma")
    pen.text((left, top - 36), title, INK, ImageFont.load_default(14))
    points = [place(*point) for point in zip(steps, values, strict=True)]
    _draw_line(page, points, CURVE, radius=3 if len(points) * 10 < right - left else 1)
    if kept is not None:
        i = steps.index(kept)
        x, _ = points[i]
        pen.line((x, top - 4, x, bottom), KEPT)
        pen.text((min(max(x, left + 40), right - 40), top - 6), f"kept: {values[i]:.4f}", KEPT, font, anchor="ms")
        _draw_line(page, [points[i]], KEPT, radius=5)


def _ticks(low: float, high: float, most: int, least: float) -> list[float]:
    """Numbers 1, 2 or 5 x 10^n apart, `least` or more; the first is not above `low`, the last not below `high`."""
    wanted = max((high - low) / most, least)
    power = 10 ** math.floor(math.log10(wanted))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    first = math.floor(low / apart)
    last = max(first + 1, math.ceil(high / apart))
    return [n * apart for n in range(first, last + 1)]


def _draw_line(page: Image.Image, points: Sequence[tuple[float, float]], colour: tuple, radius: int) -> None:
    """Join points by a smooth line, with a dot at each: drawn FINE times larger, then reduced."""
    left, top = (math.floor(min(each)) - 8 for each in zip(*points, strict=True))
    width, height = (math.ceil(max(each)) - math.floor(min(each)) + 16 for each in zip(*points, strict=True))
    mask = Image.new("L", (width * FINE, height * FINE))
    pen = ImageDraw.Draw(mask)
    fine = [((x - left) * FINE, (y - top) * FINE) for x, y in points]
    pen.line(fine, 255, width=2 * FINE, joint="curve")
    for point in fine:
        pen.circle(point, radius * FINE, 255)
    page.paste(colour, (left, top), mask.reduce(FINE))
