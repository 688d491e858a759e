"""The results of toy.bench: results.jsonl, a line a result, and the tables and figures made from it."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from toy import world
from toy.variants import (
    ARITHMETIC,
    EXAMPLE,
    GROUPS,
    LAMBDAS,
    LAST,
    LOGGED,
    METHODS,
    SCORES,
    SUBJECTS,
    TUNING,
    VALIDATED,
    WITH_LABELS,
)

PUBLISHED = """\
The authors' own, on DreamBench's 30 subjects (arXiv 2407.12164, not measured here):

| | DINO | CLIP-I | CLIP-T |
|---|---|---|---|
| λ_val 0.3 | .581 | .798 | .329 |
| λ_val 0.5 | .652 | .833 | .314 |
| λ_val 0.7 | .679 | .850 | .304 |
"""


class Results:
    """The file results.jsonl in the folder `out`, which several processes may extend at the same time.

    made_with: weights, steps, images and precision. Lines made with others are ignored.
    """

    def __init__(self, out: Path, made_with: dict):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.made_with, self.path = out, made_with, out / "results.jsonl"

    def rows(self, **which) -> list[dict]:
        """The results with these values, of other processes too."""
        rows, wanted = [], self.made_with | which
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):  # an incomplete line: its process was killed
                rows.append(json.loads(line))
        return [row for row in rows if row.items() >= wanted.items()]

    def add(self, **row) -> None:
        """Append a result."""
        last = self.path.read_bytes()[-1:] if self.path.exists() else b""
        start = "" if last in (b"", b"\n") else "\n"  # after an incomplete line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(start + json.dumps(row | self.made_with, ensure_ascii=False) + "\n")

    def runs(self, variant: tuple[str, str], subjects: tuple[str, ...] = SUBJECTS) -> dict[tuple[str, int], dict]:
        """The results of a (variant, choice) on these subjects, by (subject, seed)."""
        rows = self.rows(variant=variant[0], choice=variant[1])
        return {(row["subject"], row["seed"]): row for row in rows if row["subject"] in subjects}

    # ------------------------------------------------------------------------------------------------- tables

    def table(self, title: str, variants: list[tuple[str, str]], subjects: tuple[str, ...] = SUBJECTS) -> Iterator[str]:
        """The lines of a table: mean ± standard deviation over the runs that all of these variants have.

        In brackets: the mean difference from the first variant, run by run, ± its standard error. If runs are missing
        for a comparison, one line says which; with nothing to compare there are no lines.
        """
        found = {variant: runs for variant in variants if (runs := self.runs(variant, subjects))}
        if variants[0] not in found:
            if any(name != "base" for name, _ in found):  # every run measures the base too
                group = next((group for group, names in GROUPS.items() if variants[0][0] in names), "rpo")
                yield f"**{title}**: run `--only {group}` too, with which these are compared.\n"
            return
        if len(found) < 2:
            return
        common = sorted(set.intersection(*map(set, found.values())))
        if not common:
            yield f"**{title}**: no subject and seed has a run of each of these.\n"
            return
        count = "one run each" if len(common) == 1 else f"{len(common)} runs each"
        yield f"**{title}** ({count}: {', '.join(dict.fromkeys(subject for subject, _ in common))})\n"
        yield "| | " + " | ".join([*VALIDATED, *SCORES]) + " | kept step | seconds |"
        yield "|---|" + "---|" * (len(VALIDATED) + len(SCORES) + 2)
        compared = {variant: [runs[run] for run in common] for variant, runs in found.items()}
        for variant, runs in compared.items():
            yield _line(variant, runs, compared[variants[0]])
        yield ""

    def write_tables(self) -> None:
        """Write tables.md, from the results so far."""
        rpo = ("RPO", "")
        groups = {group: [(name, "") for name in names] for group, names in GROUPS.items()}
        loss = [variant for name in ("RPO", *GROUPS["loss"]) for variant in ((name, ""), (name, LAST))]
        dpo = [("λ_train 0.5", ""), *groups["dpo"], *((name, LAST) for name in GROUPS["dpo"])]
        coin = [(name, LAST) for name in ("RPO", *GROUPS["coin"], "similarity only")]
        mean = [("RPO", choice) for pair in zip(LAMBDAS, ARITHMETIC, strict=True) for choice in pair]
        lines = [
            "Base weights {weights}, {steps} steps, {images} images a prompt, {precision}.\n".format(**self.made_with),
            *self.table("RPO and the base, data/dog", [("base", ""), rpo], EXAMPLE),
            *self.table("Methods (Table 1)", [rpo, ("base", ""), *groups["methods"][1:]]),
            *self.table("Loss and early stopping (Table 2)", loss),
            *self.table("λ_val (Table 3)", [("RPO", choice) for choice in LAMBDAS]),
            PUBLISHED,
            *self.table("λ_train (Table 5)", [rpo, *groups["lambda_train"]]),
            *self.table("Harmonic or arithmetic mean (Table 6)", mean),
            *self.table("L_pref only, with λ_train 0.5 (Table 7)", dpo),
            *self.table("β", [rpo, *groups["beta"]]),
            *self.table("The label's coin", coin),
            *self.table("Learning rates", groups["lr"], TUNING),
            *self._label_table(),
        ]
        (self.out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _label_table(self) -> Iterator[str]:
        yield "Means over the second half of a run's steps; a step's Δ and P are means over its pairs.\n"
        yield f"| labels and margins | runs | {' | '.join(LOGGED)} |"
        yield "|---|" + "---|" * (1 + len(LOGGED))
        for name in [name for group in WITH_LABELS for name in GROUPS[group]]:
            if rows := self.runs((name, "")).values():
                cells = {title: f"{statistics.mean(row[key] for row in rows):.4f}" for title, key in LOGGED.items()}
                if name in GROUPS["coin"]:  # there y is P, not a label
                    cells |= {"share of y = 1": "", "agreement": ""}
                yield f"| {name} | {len(rows)} | {' | '.join(cells.values())} |"

    # ------------------------------------------------------------------------------------------------ figures

    def row_file(self, subject: str, seed: int, name: str) -> Path:
        """The file with the first test pictures of a variant and choice, side by side."""
        (self.out / "rows").mkdir(exist_ok=True)
        return self.out / "rows" / f"{subject} {seed} {name}.png"

    def kept(self, subject: str, seed: int) -> dict[str, int]:
        """The steps that the variants and choices of a run kept, of those that have pictures."""
        steps = {f"{r['variant']} {r['choice']}".strip(): r["step"] for r in self.rows(subject=subject, seed=seed)}
        return {name: step for name, step in steps.items() if self.row_file(subject, seed, name).exists()}

    def figures(self, runs: list[tuple[str, int]]) -> None:
        """Draw methods.png and lambda_val.png for one (subject, seed).

        It is the first in which each λ_val kept another step, or else the first of all.
        """
        lambdas = [f"RPO {choice}" for choice in LAMBDAS]

        def differ(run: tuple[str, int]) -> bool:
            kept = self.kept(*run)
            return len({kept[name] for name in lambdas if name in kept}) == len(lambdas)

        run = next(filter(differ, runs), runs[0])
        self.figure("methods.png", *run, ["base", *METHODS, *GROUPS["loss"], *GROUPS["dpo"]])
        self.figure("lambda_val.png", *run, ["base", *lambdas])

    def figure(self, file: str, subject: str, seed: int, names: list[str]) -> None:
        """A page with the photos, then a row for each variant that has pictures; none if there are fewer than two."""
        kept = self.kept(subject, seed)
        rows = [(f"{n}, step {kept[n]}", Image.open(self.row_file(subject, seed, n))) for n in names if n in kept]
        if len(rows) < 2:
            return
        left = height = rows[0][1].height
        page = Image.new("RGB", (left + rows[0][1].width, height * (len(rows) + 1)), "white")
        photos = world.sheet([Image.open(p) for p in sorted((self.out / "photos" / subject).iterdir())], 5)
        for i, (name, row) in enumerate([(f"{subject}, seed {seed}, photos", photos), *rows]):
            page.paste(row, (left, i * height))
            name = name.replace(", ", "\n").replace("λ", "lambda")  # Pillow's own font has no λ
            ImageDraw.Draw(page).text((4, i * height + height // 3), name, fill="black", font_size=13)
        page.quantize().save(self.out / file)


def _line(variant: tuple[str, str], runs: list[dict], first: list[dict]) -> str:
    """One row of a table: the scores of the runs of a (variant, choice), and their differences from `first`."""
    cells = []
    for score in (*VALIDATED, *SCORES):
        cells.append(spread([run[score] for run in runs]))
        if runs is not first:
            gains = [run[score] - other[score] for run, other in zip(runs, first, strict=True)]
            cells[-1] += f" ({spread(gains, of_mean=True, sign='+')})"
    step, seconds = (statistics.mean(run[key] for run in runs) for key in ("step", "seconds"))
    name, choice = variant
    return f"| {f'{name}, {choice}' if choice else name} | {' | '.join(cells)} | {step:.0f} | {seconds:.0f} |"


def spread(values: list[float], of_mean: bool = False, sign: str = "") -> str:
    """The mean ± the standard deviation, or ± the standard error of the mean; of one value only the value.

    sign: "+" writes the sign of a positive mean.
    """
    mean = f"{statistics.mean(values):{sign}.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / (len(values) ** 0.5 if of_mean else 1):.3f}"
