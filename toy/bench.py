"""The paper's comparisons in miniature: methods and ablations on reserved subjects of the toy world.

    python -m toy.bench --quick              # minutes: two subjects, one seed, the methods, 120 steps
    python -m toy.bench                      # six subjects, two seeds, all groups but lr: hours on two cores
    python -m toy.bench --only methods loss  # some of rpo, methods, loss, dpo, lambda_train, beta, coin, lr
    python -m toy.bench --only rpo --subjects dog-1 --seeds 0 1 2 --images 2  # README's first table

Each variant is trained by train.py's own loop, on the same photos, for the same number of steps, with the settings that
the base recommends. Then its kept weights generate pictures of the 25 test prompts, from the same noise for all
variants, and evaluate.py scores them. The test prompts are used for nothing else. Choices among a run's
validations (λ_val, the mean, no early stopping) share that run. Pictures that θ₀ generates for several variants are
generated once; their time counts for each of these variants.

Writes to --out: results.jsonl, a line a result; tables.md, whose comparisons use the six subjects only; the figures.
Re-running a command continues it. Several processes may use one --out at the same time, with other --only, --subjects
or --seeds. A result is used only with the weights, steps, images and precision that it was made with.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

import train
from evaluate import Metrics
from model.files.tensors import read_tensors
from model.files.write import save_tensors, write_atomic
from model.stable_diffusion import PRECISIONS, StableDiffusion, recommended
from reward import MEANS
from subject import Subject, load_photos, load_subject
from support import flags, machine
from support.header import GUIDANCE, SOLVER_STEPS
from support.settings import count, seed_number
from support.start import parse
from toy import world
from toy.results import Results
from toy.variants import GROUPS, LOGGED, SCORES, SELECTED, SUBJECTS, TUNING, VALIDATED

FIGURE_PROMPTS = 6


class Watched:
    """Mixed into a method: keeps what its validations measured, and their weights; reuses θ₀'s pictures.

    `Bench.run` sets these attributes on the class, for one run.
    """

    shared: dict  # (prompts, seed, stream) -> θ₀'s pictures, and the seconds that they took
    folder: Path  # for the weights of each validation
    started: list  # the instance, once there is one

    def __init__(self, *parts):
        super().__init__(*parts)
        self.started.append(self)
        self.scored: dict[int, tuple[Tensor, Tensor]] = {}  # step -> ALIGN-I and ALIGN-T of each picture
        self.spared = 0.0  # seconds of the pictures that another run has generated

    def draw(self, prompts, unet, stream, title):
        if unet is self.theta and self.record.history:  # θ, after the first step
            return super().draw(prompts, unet, stream, title)
        key = (tuple(prompts), self.settings.seed, stream)
        if key in self.shared:
            self.spared += self.shared[key][1]
        else:
            start = time.time()
            self.shared[key] = super().draw(prompts, unet, stream, title), time.time() - start
        return self.shared[key][0]

    def validate(self, step):
        self.scored[step] = super().validate(step)
        if step:
            save_tensors(self.machine.weights(), self.folder / f"{step}.safetensors")
        return self.scored[step]

    def chosen(self, choice: tuple[float, str] | None) -> int:
        """The step that a (λ_val, mean) would keep; None: the last one. The base, step 0, is never kept."""
        if choice is None:
            return max(self.scored)
        lam, mean = choice
        rewards = {step: MEANS[mean](*scores, lam).mean().item() for step, scores in self.scored.items() if step}
        return max(rewards, key=rewards.get)

    def validated(self, step: int) -> dict[str, float]:
        """What the validation of a step measured."""
        row = next(row for row in self.record.history if row["step"] == step and "reward" in row)
        return {title: row[name] for title, name in VALIDATED.items()}

    def logged(self) -> dict[str, float]:
        """What RPO's loss logs: means over the second half of the steps. Empty for other losses."""
        steps = [row for row in self.record.history if "total" in row]
        half = [row | {"|margin|": abs(row["margin"])} for row in steps[len(steps) // 2 :] if "margin" in row]
        return {name: statistics.mean(row[name] for row in half) for name in LOGGED.values()} if half else {}


class Bench:
    """Trains variants and scores them. base: a folder like weights/toy, with reward/ and metrics/."""

    def __init__(self, out: Path, steps: int, images: int, base: Path = flags.EMBEDDED_BASE):
        self.out, self.steps, self.images, self.base = out, steps, images, base
        device = flags.device(None)  # as train.py's
        precision = machine.precision(None, device)
        made_with = {"weights": weights_hash(base), "steps": steps, "images": images, "precision": precision}
        self.results = Results(out, made_with)
        self.sd = StableDiffusion.from_pretrained(base, device)  # generates the pictures of the test prompts
        self.sd.precision = PRECISIONS[precision]
        self.base_weights = {name: tensor.clone() for name, tensor in self.sd.unet.state_dict().items()}
        self.metrics = None
        self.shared: dict = {}  # see Watched

    def all(self, subjects: list[str], seeds: list[int], groups: list[str]) -> None:
        """Run every variant of the groups that has no result yet."""
        variants = {name: variant for group in groups for name, variant in GROUPS[group].items()}
        for seed in seeds:
            for subject in map(self.subject, subjects):
                self.shared.clear()
                for name, (method, options) in variants.items():
                    last = list(SELECTED.get(name, {"": None}))[-1]
                    if not self.results.rows(variant=name, choice=last, subject=subject.folder.name, seed=seed):
                        print(f"\n== {name}, {subject.folder.name}, seed {seed}", flush=True)
                        self.run(subject, seed, name, method, options)
                        self.results.write_tables()

    def subject(self, name: str) -> Subject:
        """The reserved subject called `name`, such as dog-2, with its photos in --out; load its metrics."""
        kind, index = name.rsplit("-", 1)
        folder = self.out / "photos" / name
        for i, photo in enumerate(world.photos_of(kind, int(index))):
            path = folder / f"{i:02d}.png"  # another process may read it at the same time
            write_atomic(path, lambda temporary, photo=photo: photo.save(temporary, "PNG"))
        subject = load_subject(folder, noun=kind, live=world.is_live(kind))
        photos, folders = load_photos(subject, self.sd.image_size), self.base / "metrics"
        if self.metrics is None:
            networks = folders / "clip", folders / "dino", self.base / "reward"
            self.metrics = Metrics.from_folders(*networks, photos, subject.token, self.sd.device)
        else:
            self.metrics = self.metrics.for_subject(photos, subject.token)
        return subject

    def run(self, subject: Subject, seed: int, name: str, method: type[train.RPO], options: list[str]) -> None:
        """Train one variant; score what it keeps, and what other choices among its validations would keep."""
        folder = self.out / f"run-{subject.folder.name}-{seed}-{os.getpid()}"  # another process may run the same
        argv = ["--base", self.base, "--subject", subject.folder, "--noun", subject.noun]
        argv += ["--ckpt", folder / "best.safetensors"]
        argv += ["--live" if subject.live else "--no-live", "--seed", seed, "--steps", self.steps, *options]
        if "--keep-last" in options:  # nothing is chosen: one validation, at the end, is enough
            argv += ["--validate-every", self.steps]
        watch = {"shared": self.shared, "folder": folder / "validations", "started": []}
        watched = type(method.__name__, (Watched, method), watch)
        try:
            start = time.time()
            train.fine_tune(parse(method, "", list(map(str, argv))), watched)
            trained = watched.started[0]
            seconds = time.time() - start + trained.spared
            self.score_choices(trained, subject, seed, name, round(seconds, 1))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def score_choices(self, trained: Watched, subject: Subject, seed: int, name: str, seconds: float) -> None:
        """Score the weights that each choice keeps, and the base's, if no other variant has done so."""
        results, scores, which = self.results, {}, {"subject": subject.folder.name, "seed": seed}
        if not results.rows(variant="base", **which):
            tested = self.score(subject, seed, self.base_weights, "base")
            results.add(variant="base", choice="", **which, step=0, seconds=0.0, **trained.validated(0), **tested)
        steps = {"": trained.record.best_step}
        steps |= {choice: trained.chosen(how) for choice, how in SELECTED.get(name, {}).items()}
        for choice, step in steps.items():
            title = f"{name} {choice}".strip()
            if step not in scores:
                weights = read_tensors(trained.folder / f"{step}.safetensors")
                scores[step] = title, self.score(subject, seed, weights, title)
            else:
                files = [results.row_file(*which.values(), one) for one in (scores[step][0], title)]
                shutil.copyfile(*files)
            row = {"variant": name, "choice": choice, **which, "step": step, "seconds": seconds}
            results.add(**row, **trained.validated(step), **scores[step][1], **trained.logged())

    def score(self, subject: Subject, seed: int, weights: dict[str, Tensor], name: str) -> dict[str, float]:
        """Generate pictures of the test prompts with these weights; score all, and save the first for the figures."""
        self.sd.unet.load_state_dict(weights)
        prompts = [prompt for prompt in subject.test_prompts for _ in range(self.images)]
        seeds = [100_000 * (seed + 1) + i for i in range(len(prompts))]
        settings = {"solver_steps": SOLVER_STEPS, "guidance": GUIDANCE} | recommended(self.base)[0]
        steps, guidance = settings["solver_steps"], settings["guidance"]
        with tqdm(total=len(prompts), desc=f"testing {name}", unit="image", leave=False) as bar:
            images = self.sd.generate(prompts, seeds, steps, guidance, on_batch=bar.update)
        shown = images[:: self.images][:: len(subject.test_prompts) // FIGURE_PROMPTS][:FIGURE_PROMPTS]
        world.sheet(shown, len(shown)).save(self.results.row_file(subject.folder.name, seed, name))
        scores = self.metrics(images, prompts)
        return {title: scores[key].mean().item() for title, key in SCORES.items()}


def weights_hash(base: Path) -> str:
    """Twelve digits that identify a base: of its weights and its recommended settings."""
    files = [*sorted(base.rglob("*.safetensors")), *base.glob("rpo.json")]
    hashes = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:12]


def reserved(name: str) -> str:
    """The name of a reserved subject, such as dog-2. Raises argparse's error for any other text."""
    kind, _, index = name.rpartition("-")
    if kind not in world.KINDS or index not in map(str, range(world.RESERVED_PER_KIND)):
        last = world.RESERVED_PER_KIND - 1
        raise argparse.ArgumentTypeError(f"{name!r} should be a kind and 0 to {last}: {', '.join(world.KINDS)}")
    return name


def run(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: give a folder")
    default = (SUBJECTS[0], SUBJECTS[3]) if args.quick else TUNING if args.only == ["lr"] else SUBJECTS
    subjects = args.subjects or default
    bench = Bench(args.out, args.steps, args.images, args.base)
    bench.all(subjects, args.seeds, args.only or [group for group in GROUPS if group != "lr"])
    bench.results.write_tables()
    bench.results.figures([(subject, seed) for subject in subjects for seed in args.seeds])
    print((args.out / "tables.md").read_text(encoding="utf-8"))


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="two subjects, one seed, the methods, 120 steps")
    add("--only", nargs="+", choices=list(GROUPS), help="groups (default: all but lr)")
    add("--subjects", nargs="+", type=reserved, metavar="KIND-N", help=f"(default: {' '.join(SUBJECTS)})")
    add("--seeds", type=seed_number, nargs="+", default=[0, 1], help="(default: 0 1)")
    add("--steps", type=count, default=400, help="gradient steps (default: 400)")
    add("--images", type=count, default=4, help="pictures a test prompt (default: 4)")
    add("--base", type=flags.path, default=flags.EMBEDDED_BASE, help="a folder like weights/toy, the default")
    add("--out", type=flags.path, default=Path("runs/bench"), help="(default: runs/bench)")
    args = parser.parse_args()
    if args.quick:  # only other defaults
        parser.set_defaults(only=["methods"], seeds=[0], steps=120, images=1)
        args = parser.parse_args()
    interrupted = "interrupted: re-run the command to continue"
    return flags.guarded(lambda: run(args), lambda: "close other programs", interrupted)


if __name__ == "__main__":
    sys.exit(main())
