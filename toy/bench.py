"""The paper's comparisons in miniature: methods and ablations, on reserved subjects of the toy world.

    python -m toy.bench --quick              # minutes: two subjects, one seed, the four methods, 120 steps
    python -m toy.bench                      # six subjects, two seeds, everything: hours on two cores
    python -m toy.bench --only methods       # one group: methods, loss, lambda_train, beta_tau

Every variant trains with train.py's own Trainer and the base's recommended settings, from the same photos, for the same
number of steps. Then the 25 test prompts are drawn with the kept weights, four pictures each, from the same noise, and
scored by metrics.py; nothing was chosen by these prompts. What only selects among validations (λ_val, the mean, early
stopping) uses one run's saved validations. Pictures that variants share, the negatives and the base's, are drawn once.

--out holds results.jsonl, a line a result, to which an interrupted benchmark adds when it is started again with the
same flags; tables.md; and the two figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import train
from metrics import Metrics
from model.stable_diffusion import StableDiffusion
from model.weights import read_tensors, save_tensors
from reward import MEANS
from subject import Subject, load_photos, load_subject
from toy import world
from toy.networks import WEIGHTS

SUBJECTS = (("dog", 2), ("cat", 0), ("rabbit", 1), ("backpack", 0), ("clock", 0), ("teapot", 1))  # reserved: never seen
KEEP_LAST = ["--keep-last"]
GROUPS: dict[str, dict[str, list[str]]] = {
    "methods": {
        "RPO": [],
        "DreamBooth": ["--method", "dreambooth", *KEEP_LAST],
        "DPG, look-forward": ["--method", "dpg", *KEEP_LAST],
        "DPG, DINO": ["--method", "dpg", "--dpg-reward", "dino", *KEEP_LAST],
    },
    "loss": {"similarity only": ["--preference-weight", "0"]},
    "lambda_train": {f"λ_train {value}": ["--lambda-train", value] for value in ("0.3", "0.5", "0.7")},
    "beta_tau": {
        "β 100": ["--beta", "100"],
        "β 2000": ["--beta", "2000"],
        "τ 0.02": ["--tau", "0.02"],
        "β 2000, τ 0.02": ["--beta", "2000", "--tau", "0.02"],
    },
}
# What is chosen from RPO's and the similarity's saved validations: (λ_val, mean), or None for the last one.
CHOICES = {
    "λ_val 0.3": (0.3, "harmonic"),
    "λ_val 0.5": (0.5, "harmonic"),
    "λ_val 0.7": (0.7, "harmonic"),
    "λ_val 0.3, arithmetic": (0.3, "arithmetic"),
    "no early stopping": None,
}
SELECTED = {"RPO": CHOICES, "similarity only": {"no early stopping": None}}
SCORES = {"DINO": "dino", "CLIP-I": "clip_i", "CLIP-T": "clip_t"}
FIGURE_PROMPTS = 6


class Watched(train.Trainer):
    """A Trainer that keeps what its validations scored and weighed, and draws nothing that θ₀ has drawn before."""

    shared: ClassVar[dict[tuple, list[Image.Image]]] = {}  # θ₀'s pictures for one subject and seed
    folder: Path | None = None  # where the validations' weights go
    last: Watched

    def __init__(self, *parts):
        super().__init__(*parts)
        Watched.last, self.scored = self, {}

    def draw(self, prompts, seed, text):
        if self.sd.unet is self.unet and self.record.history:  # θ, after the first step
            return super().draw(prompts, seed, text)
        key = (tuple(prompts), seed)
        if key not in self.shared:
            self.shared[key] = super().draw(prompts, seed, text)
        return self.shared[key]

    def validate(self, step):
        super().validate(step)
        self.scored[step] = self.alignments
        if self.folder and step:
            save_tensors(self.unet.state_dict(), self.folder / f"{step}.safetensors")

    def chosen(self, choice: tuple[float, str] | None) -> int:
        """The step that a λ_val and a mean would have kept; None: the last one."""
        if choice is None:
            return max(self.scored)
        lam, mean = choice
        return max(
            (step for step in self.scored if step), key=lambda s: MEANS[mean](*self.scored[s], lam).mean().item()
        )


class Bench:
    """The runs, and the file that grows with their results."""

    def __init__(self, out: Path, steps: int, images: int):
        self.out, self.steps, self.images = out, steps, images
        self.path = out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]
        self.sd = StableDiffusion.from_pretrained(WEIGHTS)  # draws the test prompts
        self.base = {name: tensor.clone() for name, tensor in self.sd.unet.state_dict().items()}
        self.metrics = None

    def done(self, **which) -> bool:
        return any(all(row[name] == value for name, value in which.items()) for row in self.rows)

    def note(self, **row) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def subject(self, kind: str, index: int) -> Subject:
        folder = self.out / "photos" / f"{kind}-{index}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, photo in enumerate(world.photos_of(kind, index)):
            photo.save(folder / f"{i:02d}.png")
        subject = load_subject(folder, kind, world.is_live(kind))
        photos = load_photos(subject, self.sd.image_size)
        folders = (WEIGHTS / "metrics" / "clip", WEIGHTS / "metrics" / "dino", WEIGHTS / "reward")
        if self.metrics is None:
            self.metrics = Metrics.from_folders(*folders, photos=photos, token=subject.token)
        self.metrics = self.metrics.of(photos, subject.token)
        return subject

    def score(self, subject: Subject, seed: int, weights: dict[str, torch.Tensor], name: str) -> dict[str, float]:
        """Draw the test prompts with these weights, keep the first pictures for the figure, and score all."""
        self.sd.unet.load_state_dict(weights)
        prompts = [prompt for prompt in subject.test_prompts for _ in range(self.images)]
        seeds = [100_000 * (seed + 1) + i for i in range(len(prompts))]
        guidance = self.sd.recommended.get("guidance", 7.5)
        with tqdm(total=len(prompts), desc=f"testing {name}", unit="image", leave=False) as bar:
            images = self.sd.generate(prompts, seeds, guidance=guidance, on_batch=bar.update)
        page = world.sheet(images[:: self.images][:: len(subject.test_prompts) // FIGURE_PROMPTS], len(images))
        page.save(self.figure_row(subject.folder.name, seed, name))
        scores = self.metrics(images, prompts)
        return {title: scores[key].mean().item() for title, key in SCORES.items()}

    def figure_row(self, subject: str, seed: int, name: str) -> Path:
        (self.out / "rows").mkdir(exist_ok=True)
        return self.out / "rows" / f"{subject} {seed} {name}.png"

    def run(self, kind: str, index: int, seed: int, name: str, options: list[str], choices: dict) -> None:
        """Train one variant and score what it keeps, and what other choices among its validations would have kept."""
        which = {"subject": f"{kind}-{index}", "seed": seed}
        subject, ckpt = self.subject(kind, index), self.out / "run" / "best.safetensors"
        flags = ["--subject", subject.folder, "--noun", kind, "--ckpt", ckpt, "--seed", seed, "--steps", self.steps]
        flags += ["--live" if subject.live else "--no-live", *options]
        Watched.folder = self.out / "run" / "validations"
        Watched.folder.mkdir(parents=True, exist_ok=True)
        start, train.Trainer = time.time(), Watched
        if status := train.run(train.flags().parse_args(list(map(str, flags)))):
            sys.exit(status)
        seconds, trainer, scores = time.time() - start, Watched.last, {}
        kept = trainer.record.best_step
        steps = {"": kept} | {choice: trainer.chosen(how) for choice, how in choices.items()}
        for choice, step in steps.items():
            title = f"{name} {choice}".strip()
            if step not in scores:
                weights = read_tensors(Watched.folder / f"{step}.safetensors")
                scores[step] = title, self.score(subject, seed, weights, title)
            elif choice:
                rows = [self.figure_row(subject.folder.name, seed, one) for one in (scores[step][0], title)]
                shutil.copyfile(*rows)
            row = {"variant": name, "choice": choice, **which, "step": step, "seconds": round(seconds, 1)}
            self.note(**row, **self.logged(trainer), **scores[step][1])

    def logged(self, trainer: Watched) -> dict[str, float]:
        """Means over the steps of what the loss logs, to see whether the preference regularises at all."""
        steps = [row for row in trainer.record.history if "total" in row]
        half = steps[len(steps) // 2 :]
        names = [name for name in ("p", "label", "margin", "accuracy", "preference") if name in steps[0]]
        logged = {name: statistics.mean(row[name] for row in half) for name in names}
        if "margin" in names:
            logged["|margin|"] = statistics.mean(abs(row["margin"]) for row in half)
        return logged

    def all(self, subjects, seeds, groups) -> None:
        for (kind, index), seed in ((s, seed) for seed in seeds for s in subjects):
            Watched.shared.clear()
            which = {"subject": f"{kind}-{index}", "seed": seed}
            if not self.done(variant="base", **which):
                scores = self.score(self.subject(kind, index), seed, self.base, "base")
                self.note(variant="base", choice="", **which, step=0, seconds=0.0, **scores)
            for name, options in ((n, o) for group in groups for n, o in GROUPS[group].items()):
                choices = SELECTED.get(name, {})
                last = list(choices)[-1] if choices else ""
                if not self.done(variant=name, choice=last, **which):
                    print(f"\n== {name}, {kind} {index}, seed {seed}", flush=True)
                    self.run(kind, index, seed, name, options, choices)
                    self.tables()

    # ------------------------------------------------------------------------------------------ what comes out

    def table(self, title: str, variants: list[tuple[str, str]]) -> Iterator[str]:
        """Mean ± standard deviation over subjects and seeds, of the runs that all of these variants have."""
        runs = {
            v: {(r["subject"], r["seed"]): r for r in self.rows if (r["variant"], r["choice"]) == v} for v in variants
        }
        runs = {variant: found for variant, found in runs.items() if found}
        if not runs:
            return
        common = set.intersection(*(set(found) for found in runs.values()))
        yield f"**{title}** ({len(common)} runs each)\n"
        yield "| | " + " | ".join(SCORES) + " | kept step | seconds |"
        yield "|---|" + "---|" * (len(SCORES) + 2)
        for (variant, choice), found in runs.items():
            rows = [found[run] for run in sorted(common)]
            cells = [f"{mean_and_spread([row[score] for row in rows])}" for score in SCORES]
            step, seconds = (statistics.mean(row[key] for row in rows) for key in ("step", "seconds"))
            yield f"| {choice or variant} | {' | '.join(cells)} | {step:.0f} | {seconds:.0f} |"
        yield ""

    def tables(self) -> None:
        """tables.md, from what there is."""
        rpo, names = [("RPO", "")], {group: [(name, "") for name in GROUPS[group]] for group in GROUPS}
        lines = [
            *self.table("Methods", [("base", ""), *names["methods"]]),
            *self.table(
                "Loss and early stopping",
                [*rpo, ("RPO", "no early stopping"), *names["loss"], ("similarity only", "no early stopping")],
            ),
            *self.table("λ_val", [("RPO", choice) for choice in list(CHOICES)[:3]]),
            *self.table("Harmonic or arithmetic mean", [("RPO", "λ_val 0.3"), ("RPO", "λ_val 0.3, arithmetic")]),
            *self.table("λ_train", [*rpo, *names["lambda_train"]]),
            *self.table("β and τ", [*rpo, *names["beta_tau"]]),
            "| labels and margins | P | share of y = 1 | Δ | mean \\|Δ\\| | implicit accuracy |",
            "|---|---|---|---|---|---|",
        ]
        for name in [name for group in GROUPS.values() for name in group]:
            rows = [row for row in self.rows if row["variant"] == name and row["choice"] == "" and "p" in row]
            if rows:
                keys = ("p", "label", "margin", "|margin|", "accuracy")
                cells = [f"{statistics.mean(row[key] for row in rows):.4f}" for key in keys]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        (self.out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def figure(self, path: Path, subject: str, seed: int, names: list[str]) -> None:
        """A row a variant, the same prompts and noise in every column; the photos on top."""
        rows = [(n, Image.open(p)) for n in names if (p := self.figure_row(subject, seed, n)).exists()]
        if not rows:
            return
        left, height = 110, rows[0][1].height
        page = Image.new("RGB", (left + rows[0][1].width, height * (len(rows) + 1)), "white")
        photos = world.sheet([Image.open(p) for p in sorted((self.out / "photos" / subject).iterdir())], 9)
        for i, (name, row) in enumerate([("photos", photos), *rows]):
            page.paste(row, (left, i * height))
            ImageDraw.Draw(page).text((4, i * height + height // 2), name.replace(", ", ",\n"), fill="black")
        page.save(path)


def mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two subjects, one seed, the methods, 120 steps")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="groups (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--steps", type=int, default=400, help="gradient steps (default: 400)")
    parser.add_argument("--images", type=int, default=4, help="pictures a test prompt (default: 4)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="(default: runs/bench)")
    args = parser.parse_args()
    if args.quick:
        args.only, args.seeds, args.steps, args.images = ["methods"], [0], 120, 1
    bench = Bench(args.out, args.steps, args.images)
    subjects = (SUBJECTS[0], SUBJECTS[3]) if args.quick else SUBJECTS
    bench.all(subjects, args.seeds, args.only)
    bench.tables()
    shown = "{}-{}".format(*SUBJECTS[0])
    bench.figure(args.out / "methods.png", shown, args.seeds[0], ["base", *GROUPS["methods"]])
    bench.figure(
        args.out / "lambda_val.png", shown, args.seeds[0], ["base", *(f"RPO {name}" for name in list(CHOICES)[:3])]
    )
    print((args.out / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
