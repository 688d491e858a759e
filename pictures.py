"""Pages of pictures: the grid of sample.py and the film strip of train.py."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, INK, PAPER, KEPT = 4, (40, 40, 40), (255, 255, 255), (24, 140, 60)


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size on a page, row by row."""
    side = max(max(picture.size) for picture in pictures)
    page = Image.new("RGB", (columns * (side + GAP) + GAP, -(-len(pictures) // columns) * (side + GAP) + GAP), PAPER)
    for i, picture in enumerate(pictures):
        page.paste(picture, (GAP + i % columns * (side + GAP), GAP + i // columns * (side + GAP)))
    return page


def film_strip(
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    rows: Sequence[tuple[int, float, Sequence[Image.Image]]],
    kept: int | None,
    largest: int = 192,
) -> Image.Image:
    """A run at a glance: the reference photos on top, then a row a validation (step, reward, a picture a prompt), and
    the prompts above the columns; the row of the step `kept` is framed. Pictures are at most `largest` pixels wide."""
    side = min(largest, references[0].width)
    margin, font = 104, ImageFont.load_default(12)
    columns, head = max(len(prompts), len(references)), 66
    width, height = margin + columns * (side + GAP), (1 + len(rows)) * (side + GAP) + head + 2 * GAP
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)

    def place(pictures: Sequence[Image.Image], top: int, label: str, ink: tuple[int, int, int] = INK) -> None:
        pen.multiline_text((8, top + side // 2 - 22), label, ink, font)
        for i, picture in enumerate(pictures):
            page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (margin + i * (side + GAP), top))

    place(references, GAP, "your photos")
    for i, prompt in enumerate(prompts):
        text = textwrap.fill(prompt, max(8, side // 7))
        pen.multiline_text((margin + i * (side + GAP), side + 3 * GAP), text, INK, font, spacing=1)
    for i, (step, reward, pictures) in enumerate(rows):
        top, name = head + (i + 1) * (side + GAP) + GAP, "the base" if step == 0 else f"step {step}"
        label = f"{name}\nreward\n{reward:.4f}" + ("\nKEPT" if step == kept else "")
        place(pictures, top, label, KEPT if step == kept else INK)
        if step == kept:
            pen.rectangle((1, top - 3, width - 1, top + side + 2), outline=KEPT, width=3)
    return page
