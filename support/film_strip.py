"""The film strip of a run: what its validations drew, with the reward of each picture, and the scores as curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from support.pictures import COLUMNS, GAP, INK, PAGE, PAPER, paste

KEPT, CURVE = (24, 140, 60), (0, 96, 170)  # green, blue
ROWS = 60  # the most validations that are shown as rows
LEFT, LINE, CURVES = 104, 18, 220  # pixels: the column of step and reward, a line of text, the height of the curves
LINES = 5  # of a prompt over its column


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
    ROWS validations every second, or third, ..., the kept one and the last are rows; the curves have all. Of more than
    COLUMNS prompts the first are shown. The font is ASCII only: other characters of a prompt are boxes.
    """
    prompts, every = prompts[:COLUMNS], -(-len(validations) // ROWS)
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
    paste(page, row.pictures[:COLUMNS], side, COLUMNS, LEFT, top)
    for i, reward in enumerate(row.rewards[:COLUMNS]):
        pen.text((LEFT + i * (side + GAP) + side // 2, top + side + 1), f"{reward:.3f}", ink, font, anchor="ma")


def _draw_curves(page: Image.Image, validations: Sequence[Validation], kept: int | None, top: int) -> None:
    """A panel for each score, side by side."""
    pen, steps, scores = ImageDraw.Draw(page), [row.step for row in validations], list(validations[0].scores)
    width = (page.width - LEFT) // len(scores)
    for i, score in enumerate(scores):
        left = LEFT + i * width
        box = left + 46, top + 46, left + width - 16, top + CURVES - 44
        _draw_curve(pen, box, title_of(score), steps, [row.scores[score] for row in validations], kept)


def _draw_curve(
    pen: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    title: str,
    steps: Sequence[int],
    values: Sequence[float],
    kept: int | None,
) -> None:
    """A score over the steps. box: the plot's left, top, right and bottom; title and ticks stand around it.

    The ticks are the first and the last step, the lowest and the highest value.
    """
    (left, top, right, bottom), font = box, ImageFont.load_default(12)
    low, high = min(values), max(values)
    x = [left + (step - steps[0]) / (steps[-1] - steps[0]) * (right - left) for step in steps]
    y = [bottom - (value - low) / ((high - low) or 1) * (bottom - top) for value in values]
    pen.text((left, top - 36), title, INK, ImageFont.load_default(14))
    pen.line((left, top, left, bottom, right, bottom), INK)
    pen.text((left - 8, bottom), f"{low:.3f}", INK, font, anchor="rm")
    if high > low:
        pen.text((left - 8, top), f"{high:.3f}", INK, font, anchor="rm")
    pen.text((left, bottom + 7), f"step {steps[0]}", INK, font, anchor="ma")
    pen.text((right, bottom + 7), f"{steps[-1]}", INK, font, anchor="ma")
    pen.line([*zip(x, y, strict=True)], CURVE, width=2, joint="curve")
    if kept is not None:
        i = steps.index(kept)
        pen.line((x[i], top - 4, x[i], bottom), KEPT)
        pen.circle((x[i], y[i]), 4, KEPT)
        pen.text((min(max(x[i], left + 40), right - 40), top - 6), f"kept: {values[i]:.4f}", KEPT, font, anchor="ms")
