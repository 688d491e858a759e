"""The paper's comparisons in miniature: methods and ablations, on reserved subjects of the toy world.

    python -m toy.bench --quick              # minutes: two subjects, one seed, the four methods, 120 steps
    python -m toy.bench                      # six subjects, two seeds, everything: hours on two cores
    python -m toy.bench --only methods loss  # some groups: rpo, methods, loss, lambda_train, beta, coin, lr
    python -m toy.bench --only rpo --subjects dog-1 --seeds 0 1 2 --images 2  # README's first table

Every variant trains in train.py's own loop, from the same photos, for the same number of steps, with the base's
recommended settings. Then the 25 test prompts are drawn with the kept weights, with the same noise for every variant,
and scored by evaluate.py; nothing was chosen by these prompts. What only selects among validations (λ_val, the mean,
early stopping) uses one run's saved validations. Pictures that variants share, the negatives and the base's, are drawn
once, and count for the seconds of each.

--out holds results.jsonl, a line a result; tables.md, which compares on the six subjects alone; and the figures. An
interrupted benchmark goes on when it is started again. Two may fill one --out side by side, with other --only,
--subjects or --seeds. A line counts only for the weights, steps, images and precision that it was made with.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
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
from baselines.dpg import DPG
from baselines.dreambooth import DreamBooth
from evaluate import Metrics
from model.files.tensors import read_tensors
from model.files.write import save_tensors, write_atomic
from model.stable_diffusion import PRECISIONS, StableDiffusion, recommended
from reward import MEANS
from subject import Subject, load_photos, load_subject
from support import flags, machine
from support.settings import count, seed_number
from support.start import parse
from toy import world
from toy.networks import WEIGHTS

SUBJECTS = ("dog-2", "cat-0", "rabbit-1", "backpack-0", "clock-0", "teapot-1")  # reserved: no training has seen them
TUNING = ("dog-3",)  # for the learning rates alone
RATES = ("1e-5", "3e-5", "1e-4")
EXAMPLE = ("dog-1",)  # data/dog: the learning rate was first chosen on it, so no comparison counts it
Variant = tuple[type[train.RPO], list[str]]  # the method, and its flags


class CertainLabel(train.RPO):
    """RPO with P in the place of the coin y. The coin is still drawn, so that later draws are equal."""

    def batch(self, step):
        batch = super().batch(step)
        return batch._replace(label=batch.p)


METHODS: dict[str, Variant] = {
    "RPO": (train.RPO, []),
    "DreamBooth": (DreamBooth, ["--keep-last"]),
    "DPG, look-forward": (DPG, ["--keep-last"]),
    "DPG, DINO": (DPG, ["--dpg-reward", "dino", "--keep-last"]),
}
GROUPS: dict[str, dict[str, Variant]] = {
    "rpo": {"RPO": METHODS["RPO"]},
    "methods": METHODS,
    "loss": {"similarity only": (train.RPO, ["--preference-weight", "0"])},
    "lambda_train": {f"λ_train {value}": (train.RPO, ["--lambda-train", value]) for value in ("0.3", "0.5", "0.7")},
    "beta": {f"β {value}": (train.RPO, ["--beta", value]) for value in ("100", "2000")},
    "coin": {"RPO, P for y": (CertainLabel, [])},
    "lr": {f"{m}, lr {lr}": (METHODS[m][0], [*METHODS[m][1], "--lr", lr]) for m in METHODS for lr in RATES},
}
# What is chosen from RPO's and the similarity's saved validations: (λ_val, mean), or None for the last one.
CHOICES = {
    "λ_val 0.3": (0.3, "harmonic"),
    "λ_val 0.5": (0.5, "harmonic"),
    "λ_val 0.7": (0.7, "harmonic"),
    "λ_val 0.3, arithmetic": (0.3, "arithmetic"),
    "no early stopping": None,
}
SELECTED = {"RPO": CHOICES, **{name: {"no early stopping": None} for name in ("similarity only", "RPO, P for y")}}
PUBLISHED = """\
The authors' own, with Stable Diffusion 2.1 on DreamBench's 30 subjects (arXiv 2407.12164, not measured here):

| | DINO | CLIP-I | CLIP-T |
|---|---|---|---|
| λ_val 0.3 | .581 | .798 | .329 |
| λ_val 0.5 | .652 | .833 | .314 |
| λ_val 0.7 | .679 | .850 | .304 |
"""
VALIDATED = {"λ-Harmonic": "reward", "ALIGN-I": "align_i", "ALIGN-T": "align_t"}  # on the validation's own prompts
SCORES = {"DINO": "dino", "CLIP-I": "clip_i", "CLIP-T": "clip_t"}  # on the test prompts
LOGGED = {"P": "p", "share of y = 1": "label", "Δ": "margin", "\\|Δ\\|": "|margin|", "agreement": "accuracy"}
FIGURE_PROMPTS = 6


class Watched:
    """Mixed into a method: keeps what its validations scored and weighed, and draws nothing twice that θ₀ drew."""

    shared: ClassVar[dict[tuple, tuple[list[Image.Image], float]]] = {}  # θ₀'s pictures, and the seconds they took
    folder: ClassVar[Path | None] = None  # where the validations' weights go
    last: ClassVar[Watched]

    def __init__(self, *parts):
        super().__init__(*parts)
        Watched.last, self.scored, self.spared = self, {}, 0.0

    def draw(self, prompts, unet, stream, title):
        if unet is self.theta and self.record.history:  # θ, after the first step
            return super().draw(prompts, unet, stream, title)
        key = (tuple(prompts), self.settings.seed, stream)
        if key in Watched.shared:
            self.spared += Watched.shared[key][1]  # a run of its own would have taken them too
        else:
            start = time.time()
            Watched.shared[key] = super().draw(prompts, unet, stream, title), time.time() - start
        return Watched.shared[key][0]

    def validate(self, step):
        self.scored[step] = super().validate(step)
        if Watched.folder and step:
            save_tensors(self.machine.weights(), Watched.folder / f"{step}.safetensors")
        return self.scored[step]

    def chosen(self, choice: tuple[float, str] | None) -> int:
        """The step that a λ_val and a mean would have kept; None: the last one."""
        if choice is None:
            return max(self.scored)
        lam, mean = choice
        return max(
            (step for step in self.scored if step), key=lambda s: MEANS[mean](*self.scored[s], lam).mean().item()
        )

    def validated(self, step: int) -> dict[str, float]:
        """What the validation of a step measured."""
        row = next(row for row in self.record.history if row["step"] == step and "reward" in row)
        return {title: row[name] for title, name in VALIDATED.items()}

    def logged(self) -> dict[str, float]:
        """Means over the second half of the steps of what RPO's loss logs: does the preference regularise at all?"""
        steps = [row for row in self.record.history if "total" in row]
        half = [row | {"|margin|": abs(row["margin"])} for row in steps[len(steps) // 2 :] if "margin" in row]
        return {name: statistics.mean(row[name] for row in half) for name in LOGGED.values()} if half else {}


class Bench:
    """The runs, and the file that grows with their results."""

    def __init__(self, out: Path, steps: int, images: int):
        self.out, self.steps, self.images = out, steps, images
        self.path = out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        files = [*sorted(WEIGHTS.rglob("*.safetensors")), WEIGHTS / "rpo.json"]
        weights = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
        device = flags.device(None)  # as train.py's
        precision = machine.precision(None, device)
        self.made_with = {"weights": weights.hexdigest()[:12], "steps": steps, "images": images, "precision": precision}
        self.sd = StableDiffusion.from_pretrained(WEIGHTS, device)  # draws the test prompts
        self.sd.precision = PRECISIONS[precision]
        self.base = {name: tensor.clone() for name, tensor in self.sd.unet.state_dict().items()}
        self.metrics = None

    def rows(self, **which) -> list[dict]:
        """The results so far, another process's too, that were made with these weights, steps and images."""
        rows, wanted = [], self.made_with | which
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):  # a kill tore the line
                rows.append(json.loads(line))
        return [row for row in rows if row.items() >= wanted.items()]

    def note(self, **row) -> None:
        last = self.path.read_bytes()[-1:] if self.path.exists() else b""
        start = "" if last in (b"", b"\n") else "\n"  # a torn line stays alone
        with self.path.open("a", encoding="utf-8") as file:
            file.write(start + json.dumps(row | self.made_with, ensure_ascii=False) + "\n")

    def subject(self, name: str) -> Subject:
        kind, index = name.rsplit("-", 1)
        folder = self.out / "photos" / name
        for i, photo in enumerate(world.photos_of(kind, int(index))):
            path = folder / f"{i:02d}.png"
            if not path.exists():  # another process may be reading it
                write_atomic(path, lambda beside, photo=photo: photo.save(beside, "PNG"))
        subject = load_subject(folder, kind, world.is_live(kind))
        photos = load_photos(subject, self.sd.image_size)
        folders = (WEIGHTS / "metrics" / "clip", WEIGHTS / "metrics" / "dino", WEIGHTS / "reward")
        if self.metrics is None:
            self.metrics = Metrics.from_folders(*folders, photos=photos, token=subject.token, device=self.sd.device)
        self.metrics = self.metrics.of(photos, subject.token)
        return subject

    def score(self, subject: Subject, seed: int, weights: dict[str, torch.Tensor], name: str) -> dict[str, float]:
        """Draw the test prompts with these weights, keep the first pictures for the figure, and score all."""
        self.sd.unet.load_state_dict(weights)
        prompts = [prompt for prompt in subject.test_prompts for _ in range(self.images)]
        seeds = [100_000 * (seed + 1) + i for i in range(len(prompts))]
        steps, guidance = (recommended(WEIGHTS)[0][setting] for setting in ("solver_steps", "guidance"))
        with tqdm(total=len(prompts), desc=f"testing {name}", unit="image", leave=False) as bar:
            images = self.sd.generate(prompts, seeds, steps, guidance, on_batch=bar.update)
        shown = images[:: self.images][:: len(subject.test_prompts) // FIGURE_PROMPTS][:FIGURE_PROMPTS]
        world.sheet(shown, len(shown)).save(self.figure_row(subject.folder.name, seed, name))
        scores = self.metrics(images, prompts)
        return {title: scores[key].mean().item() for title, key in SCORES.items()}

    def figure_row(self, subject: str, seed: int, name: str) -> Path:
        (self.out / "rows").mkdir(exist_ok=True)
        return self.out / "rows" / f"{subject} {seed} {name}.png"

    def run(self, subject: Subject, seed: int, name: str, method: type[train.RPO], options: list[str]) -> None:
        """Train one variant and score what it keeps, and what other choices among its validations would have kept."""
        folder = self.out / f"run-{subject.folder.name}-{seed}-{os.getpid()}"  # another process may run the same
        argv = ["--base", WEIGHTS, "--subject", subject.folder, "--noun", subject.noun]
        argv += ["--ckpt", folder / "best.safetensors"]
        argv += ["--live" if subject.live else "--no-live", "--seed", seed, "--steps", self.steps, *options]
        if "--keep-last" in options:  # nothing is chosen: one validation, at the end, will do
            argv += ["--validate-every", self.steps]
        Watched.folder = folder / "validations"
        Watched.folder.mkdir(parents=True, exist_ok=True)
        watched = type(method.__name__, (Watched, method), {})
        try:
            start = time.time()
            train.fine_tune(parse(method, "", list(map(str, argv))), watched)
            seconds = time.time() - start + Watched.last.spared
            self.note_choices(subject, seed, name, round(seconds, 1))
        finally:
            shutil.rmtree(folder)

    def note_choices(self, subject: Subject, seed: int, name: str, seconds: float) -> None:
        """Score the weights that each choice among the last run's validations keeps, and the base's if need be."""
        trainer, scores, which = Watched.last, {}, {"subject": subject.folder.name, "seed": seed}
        if not self.rows(variant="base", **which):
            tested = self.score(subject, seed, self.base, "base")
            self.note(variant="base", choice="", **which, step=0, seconds=0.0, **trainer.validated(0), **tested)
        steps = {"": trainer.record.best_step}
        steps |= {choice: trainer.chosen(how) for choice, how in SELECTED.get(name, {}).items()}
        for choice, step in steps.items():
            title = f"{name} {choice}".strip()
            if step not in scores:
                weights = read_tensors(Watched.folder / f"{step}.safetensors")
                scores[step] = title, self.score(subject, seed, weights, title)
            else:
                rows = [self.figure_row(subject.folder.name, seed, one) for one in (scores[step][0], title)]
                shutil.copyfile(*rows)
            row = {"variant": name, "choice": choice, **which, "step": step, "seconds": seconds}
            self.note(**row, **trainer.validated(step), **scores[step][1], **trainer.logged())

    def all(self, subjects: list[str], seeds: list[int], groups: list[str]) -> None:
        variants = {name: variant for group in groups for name, variant in GROUPS[group].items()}
        for seed in seeds:
            for subject in map(self.subject, subjects):
                Watched.shared.clear()
                for name, (method, options) in variants.items():
                    last = list(SELECTED.get(name, {"": None}))[-1]
                    if not self.rows(variant=name, choice=last, subject=subject.folder.name, seed=seed):
                        print(f"\n== {name}, {subject.folder.name}, seed {seed}", flush=True)
                        self.run(subject, seed, name, method, options)
                        self.tables()

    # ------------------------------------------------------------------------------------------ what comes out

    def runs(self, variant: tuple[str, str], subjects: tuple[str, ...] = SUBJECTS) -> dict[tuple[str, int], dict]:
        """The results of a variant and a choice on these subjects, by subject and seed."""
        rows = self.rows(variant=variant[0], choice=variant[1])
        return {(row["subject"], row["seed"]): row for row in rows if row["subject"] in subjects}

    def table(self, title: str, variants: list[tuple[str, str]], subjects: tuple[str, ...] = SUBJECTS) -> Iterator[str]:
        """Mean ± standard deviation over these subjects and their seeds, of the runs that all of these variants have.

        In brackets: the difference from the first of them, run by run, and its standard error. Or, in the
        table's place, which runs are missing.
        """
        results = {variant: found for variant in variants if (found := self.runs(variant, subjects))}
        if variants[0] not in results:
            if any(name != "base" for name, _ in results):  # the base's come with every run
                group = next((group for group, names in GROUPS.items() if variants[0][0] in names), "rpo")
                yield f"**{title}**: run `--only {group}` too, with which these are compared.\n"
            return
        if len(results) < 2:
            return
        if not (runs := sorted(set.intersection(*map(set, results.values())))):
            yield f"**{title}**: no subject and seed has a run of each of these.\n"
            return
        count = "one run each" if len(runs) == 1 else f"{len(runs)} runs each"
        yield f"**{title}** ({count}: {', '.join(dict.fromkeys(subject for subject, _ in runs))})\n"
        names = [*VALIDATED, *SCORES]
        yield "| | " + " | ".join(names) + " | kept step | seconds |"
        yield "|---|" + "---|" * (len(names) + 2)
        first = results[variants[0]]
        for (variant, choice), found in results.items():
            cells = []
            for score in names:
                cells.append(spread([found[run][score] for run in runs]))
                if found is not first:
                    gains = [found[run][score] - first[run][score] for run in runs]
                    cells[-1] += f" ({spread(gains, of_mean=True, sign='+')})"
            step, seconds = (statistics.mean(found[run][key] for run in runs) for key in ("step", "seconds"))
            name = f"{variant}, {choice}" if choice else variant
            yield f"| {name} | {' | '.join(cells)} | {step:.0f} | {seconds:.0f} |"
        yield ""

    def tables(self) -> None:
        """tables.md, from what there is."""
        rpo, names = [("RPO", "")], {group: [(name, "") for name in GROUPS[group]] for group in GROUPS}
        lines = [
            "Base weights {weights}, {steps} steps, {images} images a prompt, {precision}.\n".format(**self.made_with),
            *self.table("RPO and the base, data/dog", [("base", ""), *rpo], EXAMPLE),
            *self.table("Methods", [*rpo, ("base", ""), *names["methods"][1:]]),
            *self.table(
                "Loss and early stopping",
                [*rpo, ("RPO", "no early stopping"), *names["loss"], ("similarity only", "no early stopping")],
            ),
            *self.table(
                "The label's coin",
                [(name, "no early stopping") for name in ("RPO", *GROUPS["coin"], "similarity only")],
            ),
            *self.table("λ_val", [("RPO", choice) for choice in list(CHOICES)[:3]]),
            PUBLISHED,
            *self.table("Harmonic or arithmetic mean", [("RPO", "λ_val 0.3"), ("RPO", "λ_val 0.3, arithmetic")]),
            *self.table("λ_train", [*rpo, *names["lambda_train"]]),
            *self.table("β", [*rpo, *names["beta"]]),
            *self.table("Learning rates", names["lr"], TUNING),
            "Means over the second half of a run's steps; a step's Δ and P are means over its pairs.\n",
            f"| labels and margins | runs | {' | '.join(LOGGED)} |",
            "|---|" + "---|" * (1 + len(LOGGED)),
        ]
        weighed = ("rpo", "loss", "coin", "lambda_train", "beta")  # the groups that log P and Δ
        for name in [name for group in weighed for name in GROUPS[group]]:
            if rows := self.runs((name, "")).values():
                cells = {title: f"{statistics.mean(row[key] for row in rows):.4f}" for title, key in LOGGED.items()}
                if name in GROUPS["coin"]:  # its y is no label to agree with
                    cells |= {"share of y = 1": "", "agreement": ""}
                lines.append(f"| {name} | {len(rows)} | {' | '.join(cells.values())} |")
        (self.out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def kept(self, subject: str, seed: int) -> dict[str, int]:
        """The steps that the variants and choices of a run kept, of those that there are pictures of."""
        steps = {f"{r['variant']} {r['choice']}".strip(): r["step"] for r in self.rows(subject=subject, seed=seed)}
        return {name: step for name, step in steps.items() if self.figure_row(subject, seed, name).exists()}

    def figures(self, runs: list[tuple[str, int]]) -> None:
        """methods.png and lambda_val.png: of the first run in which each λ_val kept another step, else of the first."""
        lambdas = [f"RPO {choice}" for choice in list(CHOICES)[:3]]

        def differ(run: tuple[str, int]) -> bool:
            kept = self.kept(*run)
            return len({kept[name] for name in lambdas if name in kept}) == len(lambdas)

        run = next(filter(differ, runs), runs[0])
        self.figure("methods.png", *run, ["base", *METHODS, *GROUPS["loss"]])
        self.figure("lambda_val.png", *run, ["base", *lambdas])

    def figure(self, file: str, subject: str, seed: int, names: list[str]) -> None:
        """A row a variant, the same prompts and noise in every column; the photos on top."""
        kept = self.kept(subject, seed)
        rows = [(f"{n}, step {kept[n]}", Image.open(self.figure_row(subject, seed, n))) for n in names if n in kept]
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


def spread(values: list[float], of_mean: bool = False, sign: str = "") -> str:
    """The mean, and ± the standard deviation, or the mean's standard error; of one value there is none."""
    mean = f"{statistics.mean(values):{sign}.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / (len(values) ** 0.5 if of_mean else 1):.3f}"


def reserved(name: str) -> str:
    """The name of a reserved subject, such as dog-2. Raises argparse's error for another."""
    kind, _, index = name.rpartition("-")
    if kind not in world.KINDS or index not in map(str, range(world.RESERVED_PER_KIND)):
        last = world.RESERVED_PER_KIND - 1
        raise argparse.ArgumentTypeError(f"{name!r} should be a kind and 0 to {last}: {', '.join(world.KINDS)}")
    return name


def run(args: argparse.Namespace) -> int:
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: give a folder")
    default = (SUBJECTS[0], SUBJECTS[3]) if args.quick else TUNING if args.only == ["lr"] else SUBJECTS
    subjects = args.subjects or default
    bench = Bench(args.out, args.steps, args.images)
    bench.all(subjects, args.seeds, args.only or [group for group in GROUPS if group != "lr"])
    bench.tables()
    bench.figures([(subject, seed) for subject in subjects for seed in args.seeds])
    print((args.out / "tables.md").read_text(encoding="utf-8"))
    return 0


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="two subjects, one seed, the methods, 120 steps")
    add("--only", nargs="+", choices=list(GROUPS), help="groups (default: all but lr)")
    add("--subjects", nargs="+", type=reserved, metavar="KIND-N", help=f"(default: {' '.join(SUBJECTS)})")
    add("--seeds", type=seed_number, nargs="+", default=[0, 1], help="(default: 0 1)")
    add("--steps", type=count, default=400, help="gradient steps (default: 400)")
    add("--images", type=count, default=4, help="pictures a test prompt (default: 4)")
    add("--out", type=flags.path, default=Path("runs/bench"), help="(default: runs/bench)")
    args = parser.parse_args()
    if args.quick:  # other defaults, no more
        parser.set_defaults(only=["methods"], seeds=[0], steps=120, images=1)
        args = parser.parse_args()
    return flags.guarded(
        lambda: run(args), lambda: "end other programs", interrupted="interrupted: the same command goes on"
    )


if __name__ == "__main__":
    sys.exit(main())
