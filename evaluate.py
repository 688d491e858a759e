"""Measure a checkpoint as DreamBench does: DINO, CLIP-I and CLIP-T, and ALIGN-I, ALIGN-T and their λ-Harmonic mean.

    python evaluate.py --ckpt best.safetensors --subject data/dog
    python evaluate.py --subject data/dog                              # the base alone, for comparison
    python evaluate.py --dreambench dreambooth/dataset --ckpt "runs/{subject}/best.safetensors"

Draws the 25 test prompts, 4 images each, and writes best.eval.json (settings, networks, means, every image's numbers)
and the pictures in best.eval/; the base alone is base-toy-dog.eval, in the current folder. --dreambench does so for
every subject of the public data set (google/dreambooth); the same command again goes on where it was interrupted. With
`torchrun --standalone --nproc_per_node=N evaluate.py --dreambench ...` N processes share the subjects out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from metrics import Metrics
from model.files.config import read_json
from model.files.errors import CheckpointError, is_out_of_memory
from model.files.single_file import CONFIG_KEY
from model.files.tensors import read_metadata
from model.stable_diffusion import PRECISIONS, StableDiffusion, check_layout, home_of
from reward import lambda_harmonic
from subject import DREAMBENCH_NOUNS, Subject, load_subject, open_photo
from support import flags, machine, ranks
from support.header import base_name, base_of, digest, files_of_base, steps_and_guidance
from support.pictures import check_page, drawn_with, grid, picture_names, save_png
from support.results import check_writable, warn_if_unfinished, write_json
from support.settings import checked, count, fraction, positive, seed_number

TITLES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "align_i": "ALIGN-I", "align_t": "ALIGN-T"}
TITLES |= {"lambda_harmonic": "λ-Harmonic"}
FULL = "use a smaller --batch, or another --device"


@dataclass(frozen=True)
class Job:
    """One subject to evaluate, checked as far as it can be without a network."""

    subject: Subject
    ckpt: Path | None
    header: dict[str, str]
    base: tuple[Path, str | None, str | None]  # the base, its variant and prediction type
    folders: dict[str, Path]  # the metrics' networks
    settings: dict  # equal settings give equal results
    out: Path  # the pictures' folder
    result: Path  # the JSON file

    def done(self) -> dict | None:
        """The result, if it is there already, whole and with these settings."""
        with suppress(CheckpointError, KeyError, TypeError, AttributeError):
            result = read_json(self.result)
            complete = len(result["images"]) == 25 * self.settings["n"] and result["means"].keys() == TITLES.keys()
            drawn = all((self.out / row["file"]).is_file() for row in result["images"])
            return result if complete and drawn and result["settings"] == self.settings else None
        return None


def plan(args: argparse.Namespace, folder: Path, ckpt: Path | None, stem: Path, out: Path | None) -> Job:
    """All that can be known before a network is loaded. Raises ValueError or OSError for what cannot be used."""
    header = read_metadata(ckpt) if ckpt else {}
    warn_if_unfinished(ckpt)
    base, variant, prediction_type = base_of(args, ckpt, header)
    check_layout(base)
    home = home_of(base)
    folders = {"clip": args.clip or home / "metrics" / "clip", "dino": args.dino or home / "metrics" / "dino"}
    folders["align"] = args.align or home / "reward"
    for name, path in folders.items():
        if not path.is_dir():
            raise CheckpointError(f"{path} is missing, which should hold {name.upper()}: name its folder with --{name}")
    subject = subject_of(args, folder, ckpt, header)
    settings = {"noun": subject.noun, "live": subject.live, "token": subject.token, "n": args.n, "seed": args.seed}

    steps, guidance = steps_and_guidance(args, ckpt, header, base)
    size = checked(count, header, "resolution", ckpt) if "resolution" in header else None  # the base's own
    settings |= {"guidance": guidance, "steps": steps, "size": size}
    lambda_val = checked(fraction, {"lambda_val": 0.3} | header, "lambda_val", ckpt)
    settings["lambda_val"] = lambda_val if args.lambda_val is None else args.lambda_val

    out, result = out or Path(f"{stem}.eval"), Path(f"{stem}.eval.json")
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the folder of the photos: give another one")
    check_page(out)
    check_writable(result)
    settings |= {"ckpt": ckpt.name if ckpt else None, "base": base_name(base)}
    settings |= {"variant": variant, "prediction_type": prediction_type, "precision": args.precision}
    files = {"ckpt": [ckpt] if ckpt else [], "base": files_of_base(base), "photos": subject.photos}
    files |= {name: [path] for name, path in folders.items()}
    settings["files"] = {name: digest(paths) for name, paths in files.items()}
    return Job(subject, ckpt, header, (base, variant, prediction_type), folders, settings, out, result)


def subject_of(args: argparse.Namespace, folder: Path, ckpt: Path | None, header: dict[str, str]) -> Subject:
    """The subject as the checkpoint knows it; what its header leaves open, the flags or the folder's name say.

    Notes where a flag, or the name of a folder of DreamBench's, says otherwise.
    """
    if header.get("live", "True") not in ("True", "False"):
        raise CheckpointError(f"{ckpt} is wrong about live: {header['live']!r} should be True or False")
    live = header["live"] == "True" if "live" in header else args.live
    token = header.get("token", args.token or "[V]")
    subject = load_subject(folder, header.get("noun", args.noun), live, token)
    noun = args.noun or DREAMBENCH_NOUNS.get(folder.name.lower())
    for name, ours in {"noun": noun, "live": args.live, "token": args.token}.items():
        if ours not in (None, trained := getattr(subject, name)):
            print(f"note: {ckpt} was trained with {name} {trained}, which is used, not {ours}")
    return subject


class Evaluator:
    """Draws and scores. What is loaded stays for the subjects that follow, as long as their base is the same."""

    def __init__(self, device: torch.device, batch: int | None, precision: str):
        self.device, self.batch, self.precision, self.loaded = device, batch, precision, None

    def load(self, job: Job) -> None:
        """Raises CheckpointError, naming the file, for what does not fit."""
        photos, token = [whole(photo) for photo in job.subject.photos], job.subject.token
        lora = "lora_rank" in job.header  # it needs the base's own weights, which a whole U-Net has replaced
        if self.loaded == (job.base, job.folders, lora):
            self.metrics = self.metrics.of(photos, token)
        else:
            self.loaded = self.metrics = self.sd = None  # make room first
            self.metrics = Metrics.from_folders(**job.folders, photos=photos, token=token, device=self.device)
            base, variant, prediction_type = job.base
            self.sd = StableDiffusion.from_pretrained(base, self.device, variant, prediction_type)
            self.sd.precision = PRECISIONS[self.precision]
            self.loaded = job.base, job.folders, lora
        if job.ckpt:
            self.sd.load_unet(job.ckpt)
        machine.round_frozen(self.sd.unet, self.sd.precision)

    def __call__(self, job: Job) -> dict:
        """Draw, score and write one subject; returns what its JSON file holds."""
        self.load(job)
        settings, n = job.settings, job.settings["n"]
        prompts = [prompt for prompt in job.subject.test_prompts for _ in range(n)]
        # 2: other noise than train.py's.
        seeds = np.random.SeedSequence([settings["seed"], 2]).generate_state(len(prompts)).tolist()
        options = {"steps": settings["steps"], "sampler": "dpm++", "guidance": settings["guidance"]}
        looks = {"unit": "image", "leave": False, "delay": 0.1, "disable": ranks.rank() > 0}
        flags.warn_of_truncation(self.sd.tokenizer, prompts)
        with tqdm(total=len(prompts), desc=job.subject.folder.name, **looks) as bar:
            how = {"size": settings["size"], "batch_size": self.batch, "on_batch": bar.update}
            images = self.sd.generate(prompts, seeds, **options, **how)
        scores = self.metrics(images, prompts)
        scores["lambda_harmonic"] = lambda_harmonic(scores["align_i"], scores["align_t"], settings["lambda_val"])
        scores = {name: [round(value, 6) for value in values.tolist()] for name, values in scores.items()}

        text = drawn_with(**options, size=images[0].size, ckpt=job.ckpt, base=job.base[0], header=job.header)
        names = picture_names(prompts, seeds)
        for name, image, prompt, seed in zip(names, images, prompts, seeds, strict=True):
            save_png(image, job.out / name, prompt, text, seed)
        save_png(grid(images, n), job.out / "grid.png", "\n".join(job.subject.test_prompts), text, seeds[0])
        columns = {"prompt": prompts, "seed": seeds, "file": names} | scores
        result = {"subject": str(job.subject.folder), "pictures": str(job.out), "settings": settings}
        result["training"] = {name: value for name, value in sorted(job.header.items()) if name != CONFIG_KEY}
        result["scored_text"] = f"the prompt without the token {job.subject.token}"
        kinds = self.metrics.kinds().items()
        result["networks"] = {name: f"{shown(job.folders[name])}, {kind}" for name, kind in kinds}
        result["means"] = {name: over_prompts(values, n) for name, values in scores.items()}
        result["images"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        write_json(job.result, result)
        return result


def whole(path: Path) -> Image.Image:
    """A photo in its own resolution, from which each network's preprocessing starts; square, as training sees it.

    The released evaluation cuts nothing beforehand, which differs for photos that are not square.
    """
    with Image.open(path) as image:
        side = min(image.size)
    return open_photo(path, side)


def shown(folder: Path) -> str:
    """As seen from the project, if it lies there: "weights/toy/metrics/dino"."""
    folder, project = folder.resolve(), flags.EMBEDDED_BASE.resolve().parent.parent
    return (folder.relative_to(project) if folder.is_relative_to(project) else folder).as_posix()


def over_prompts(values: list[float], n: int) -> dict[str, float]:
    """Mean and standard deviation of the prompts' means; `values` are n images of a prompt, n of the next, ..."""
    means = [statistics.fmean(values[i : i + n]) for i in range(0, len(values), n)]
    return {"mean": round(statistics.fmean(means), 6), "sd": round(statistics.stdev(means), 6)}


def base_alone(args: argparse.Namespace) -> str:
    """What the results of a base without a checkpoint are called: "base-toy", "base-sd15"."""
    base = Path(os.path.abspath(args.base or flags.EMBEDDED_BASE))  # "." has no name
    return f"base-{base.stem if base.is_file() else base.name}"


def run_one(args: argparse.Namespace, device: torch.device) -> int:
    ckpt = Path(args.ckpt) if args.ckpt else None
    stem = ckpt.with_suffix("") if ckpt else Path(f"{base_alone(args)}-{args.subject.resolve().name}")
    job = plan(args, args.subject, ckpt, stem, args.out)
    subject, settings = job.subject, job.settings
    kind, guidance = "living subjects" if subject.live else "things", settings["guidance"]
    print(f"subject {subject.folder}: {len(subject.photos)} photos of {subject.noun!r}, prompts of {kind}")
    print(f"{ckpt or 'no checkpoint'}, base {settings['base']}, {settings['steps']} steps, guidance {guidance:g}")
    result = Evaluator(device, args.batch, args.precision)(job)
    print(f"\n{'':12}{'mean':>8}{'SD':>8}  over 25 prompts x {args.n} images, measured with")
    for name, title in TITLES.items():
        network = result["networks"].get(name.split("_")[0], f"ALIGN-I and ALIGN-T, λ = {settings['lambda_val']:g}")
        print(f"{title:12}{result['means'][name]['mean']:8.4f}{result['means'][name]['sd']:8.4f}  {network}")
    print(f"The text of CLIP-T and ALIGN-T is {result['scored_text']}.")
    print(f"every image's numbers are in {job.result}, the pictures in {job.out}")
    return 0


def run_many(args: argparse.Namespace, device: torch.device) -> int:
    """Every subject of DreamBench that is there; one that fails is told in a line and does not stop the others."""
    names = [name for name in DREAMBENCH_NOUNS if (args.dreambench / name).is_dir()]
    if not names:
        raise ValueError(f"{args.dreambench} holds no subject of DreamBench: give google/dreambooth's folder dataset")
    print(f"{len(names)} of DreamBench's {len(DREAMBENCH_NOUNS)} subjects are in {args.dreambench}")
    template, failed, jobs, rows = args.ckpt or f"{base_alone(args)}/{{subject}}", {}, {}, {}
    summary = Path(template.replace("{subject}", "dreambench")).with_suffix(".eval.json")
    check_writable(summary)

    @contextmanager
    def reported(name: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
            failed[name] = f"the memory is full: {FULL}" if is_out_of_memory(error) else " ".join(str(error).split())
            print(f"{name}: error: {failed[name]}", file=sys.stderr)

    mine = names[ranks.rank() :: ranks.world_size()]
    for name in mine:  # what is wrong with the last should be known before the first is drawn
        with reported(name):
            path, out = Path(template.replace("{subject}", name)), args.out and args.out / name
            jobs[name] = plan(args, args.dreambench / name, path if args.ckpt else None, path.with_suffix(""), out)
    evaluator = Evaluator(device, args.batch, args.precision)
    for name, job in jobs.items():
        with reported(name):
            before = job.done()
            rows[name] = {k: v["mean"] for k, v in (before or evaluator(job))["means"].items()}
            print(f"{name}: {'done before' if before else 'done'}, {job.result}", flush=True)
    rows, failed = (dict(ranks.gather(list(part.items()))) for part in (rows, failed))
    rows, failed = ({name: part[name] for name in names if name in part} for part in (rows, failed))
    if rows and ranks.rank() == 0:
        mean = {name: round(statistics.fmean(row[name] for row in rows.values()), 6) for name in TITLES}
        print("\n| subject | DINO | CLIP-I | CLIP-T |\n|---|---|---|---|")
        for name, row in [*rows.items(), (f"mean of {len(rows)}", mean)]:
            print(f"| {name} | {row['dino']:.3f} | {row['clip_i']:.3f} | {row['clip_t']:.3f} |")
        write_json(summary, {"mean": mean, "subjects": rows, "failed": failed})
        print(f"\nthe same and the other metrics are in {summary}")
    ranks.barrier()  # the first process that ends with 1 makes torchrun end the others
    return 1 if failed else 0


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add, what = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--subject", type=flags.path, help="a folder with the subject's photos")
    what.add_argument("--dreambench", type=flags.path, metavar="FOLDER", help="the public data set, a folder a subject")
    add("--ckpt", type=flags.text, help="of train.py; --dreambench puts names for {subject} (default: the base alone)")
    add("--noun", type=flags.text, help="what it is; a checkpoint's own wins (default: from the folder's name)")
    add("--live", action=argparse.BooleanOptionalAction, help="living, or a thing; a checkpoint's own wins")
    add("--token", type=flags.text, help="the unique token; a checkpoint's own wins (default: [V])")
    flags.add_base_flags(parser, None, "the checkpoint's own, or the embedded one")
    for name in ("clip", "dino", "align"):
        add(f"--{name}", type=flags.path, metavar="FOLDER", help="the folder of this network (default: the base's)")
    add("--lambda-val", type=fraction, help="λ of the λ-Harmonic reward (default: the checkpoint's, or 0.3)")
    add("--n", type=count, default=4, help="images a prompt (default: %(default)s, as published)")
    add("--seed", type=seed_number, default=0, help="fixes every image (default: %(default)s)")
    add("--steps", type=count, help="DPM-Solver++ steps (default: 20, or what the base recommends)")
    add("--guidance", type=positive, help="classifier-free guidance (default: as in training, or the base's)")
    add("--batch", type=count, help="images at a time; changes no image (default: what fits, 8 on a CPU)")
    add("--out", type=flags.path, help="the folder for the pictures (default: the checkpoint's name and .eval)")
    flags.add_machine_flags(parser)
    args = parser.parse_args()
    if args.dreambench and args.ckpt and "{subject}" not in args.ckpt:
        parser.error('--ckpt should hold {subject} for --dreambench, such as "runs/{subject}/best.safetensors"')
    if args.ckpt == "":
        parser.error("--ckpt is empty: leave it out for the base alone")
    if args.dreambench and (args.noun or args.live is not None):
        parser.error("--noun and --live are for --subject: --dreambench knows its subjects")
    if args.subject and ranks.world_size() > 1:
        parser.error("--subject is work for one process: leave torchrun out, or share many out with --dreambench")
    kept = "; the same command goes on with the subjects that are not done" if args.dreambench else ""

    def work() -> int:
        device = flags.device(args.device)
        args.precision = machine.precision(args.precision, device)
        return (run_one if args.subject else run_many)(args, device)

    return flags.guarded(work, lambda: FULL, f"interrupted{kept}")


if __name__ == "__main__":
    sys.exit(ranks.distributed(main))
