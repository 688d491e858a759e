"""The work of evaluate.py around the scores: its flags, the job of a subject, the loop over DreamBench's subjects."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from model.files.config import read_json
from model.files.errors import CheckpointError, is_out_of_memory
from model.files.single_file import CONFIG_KEY
from model.files.tensors import read_metadata
from model.stable_diffusion import check_layout, home_of
from subject import DREAMBENCH_NOUNS, Subject, load_subject
from support import flags, ranks
from support.header import add_drawing_flags, base_name, digest, drawing_options, files_of_base, resolve_base
from support.pictures import check_folder
from support.results import check_writable, warn_if_unfinished, write_json
from support.settings import checked, count, fraction, seed_number

REMEDY = "use a smaller --batch, or another --device"  # for a full memory


@dataclass(frozen=True)
class Job:
    """One subject to evaluate, checked as far as possible without a network."""

    subject: Subject
    ckpt: Path | None
    header: dict[str, str]  # the checkpoint's
    base: tuple[Path, str | None, str | None]  # the base, its variant and prediction type
    folders: dict[str, Path]  # the metrics' networks: clip, dino, align; maybe aesthetic (a file), aesthetic_clip
    settings: dict  # equal settings give equal results
    out: Path  # the folder of the pictures
    result: Path  # the JSON file

    def done(self, metrics: Iterable[str]) -> dict[str, list[float]] | None:
        """The `values` of the JSON file, if it is complete, has these metrics and these settings, and its pictures."""
        with suppress(CheckpointError, KeyError, TypeError, AttributeError):
            result = read_json(self.result)
            complete = len(result["images"]) == len(self.subject.test_prompts) * self.settings["n"]
            drawn = all((self.out / row["file"]).is_file() for row in result["images"])
            equal = result["settings"] == self.settings and result["means"].keys() == set(metrics)
            return self.values(result, metrics) if complete and drawn and equal else None
        return None

    def write(self, about: dict[str, list], scores: dict[str, list[float]]) -> dict:
        """Write the JSON file and return its content. about, scores: a value for each picture, prompt by prompt."""
        home, columns = str(flags.EMBEDDED_BASE), about | scores
        result = {
            "subject": str(self.subject.folder),
            "pictures": str(self.out),
            "settings": self.settings,
            "training": {name: value for name, value in sorted(self.header.items()) if name != CONFIG_KEY},
            "scored_text": f"the prompt without the token {self.subject.token}",
            "networks": {name: str(path).replace(home, "weights/toy") for name, path in self.folders.items()},
            "means": {name: mean_and_sd(self.of_prompts(values)) for name, values in scores.items()},
            "images": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        }
        write_json(self.result, result)
        return result

    def values(self, result: dict, metrics: Iterable[str]) -> dict[str, list[float]]:
        """The means of the prompts for each metric, from the content of the JSON file."""
        return {name: self.of_prompts([row[name] for row in result["images"]]) for name in metrics}

    def of_prompts(self, values: list[float]) -> list[float]:
        """The mean of each prompt's pictures; values: one for each picture, prompt by prompt."""
        n = self.settings["n"]
        return [statistics.fmean(values[i : i + n]) for i in range(0, len(values), n)]


def mean_and_sd(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation (of a sample, with n - 1; 0 for a single value)."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 6), "sd": round(sd, 6)}


def parse(description: str) -> argparse.Namespace:
    """The command line of evaluate.py."""
    parser = flags.Parser(description=description)
    add, what = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--subject", type=flags.path, help="a folder with the subject's photos")
    what.add_argument("--dreambench", type=flags.path, metavar="FOLDER", help="the public data set, a folder a subject")
    add("--ckpt", type=flags.text, help="of train.py; {subject}: each folder of --dreambench (default: the base alone)")
    add("--noun", type=flags.text, help="what it is (default: the checkpoint's, or from the folder's name)")
    add("--live", action=argparse.BooleanOptionalAction, help="living, not a thing (default: the checkpoint's)")
    add("--token", type=flags.text, help="the unique token (default: the checkpoint's, or [V])")
    own = "a text file with a prompt a line, with {V} and {noun} (default: DreamBench's 25)"
    add("--prompts", type=flags.prompts, metavar="FILE", help=own)
    flags.add_base_flags(parser, None, "the checkpoint's own, or the embedded one")
    for name in ("clip", "dino", "align"):
        add(f"--{name}", type=flags.path, metavar="FOLDER", help="the folder of this network (default: the base's)")
    add("--aesthetic", type=flags.path, metavar="FILE", help="LAION's aesthetic predictor: one more metric")
    add("--aesthetic-clip", type=flags.path, metavar="FOLDER", help="its CLIP, openai/clip-vit-large-patch14")
    lam = {"dest": "lam", "metavar": "LAMBDA", "type": fraction, "default": 0.3}
    add("--lambda", **lam, help="λ of the λ-Harmonic reward (default: %(default)s, the paper's)")
    add("--n", type=count, default=4, help="images a prompt (default: %(default)s, as published)")
    add("--seed", type=seed_number, default=0, help="fixes every image (default: %(default)s)")
    add_drawing_flags(parser)
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
    if bool(args.aesthetic) != bool(args.aesthetic_clip):
        parser.error("--aesthetic and --aesthetic-clip need each other: give both, or neither")
    if args.subject and ranks.world_size() > 1:
        parser.error("--subject is work for one process: leave torchrun out, or share many out with --dreambench")
    return args


def place(args: argparse.Namespace, name: str) -> Path:
    """Where the results of a subject go, but for the ending; with --ckpt, its checkpoint."""
    if args.ckpt:
        return flags.path(args.ckpt.replace("{subject}", name) if args.dreambench else args.ckpt)
    base = Path(os.path.abspath(args.base or flags.EMBEDDED_BASE))  # "." has no name
    stem = f"base-{base.stem if base.is_file() else base.name}"
    return Path(stem, f"{name}.safetensors") if args.dreambench else Path(f"{stem}-{name}.safetensors")


def prepare_job(args: argparse.Namespace, folder: Path, out: Path | None) -> Job:
    """The job of a subject, its files and settings checked. Raises ValueError or OSError for what cannot be used."""
    path = place(args, Path(os.path.abspath(folder)).name)
    ckpt = path if args.ckpt else None
    header = read_metadata(ckpt) if ckpt else {}
    warn_if_unfinished(ckpt)
    base = resolve_base(args, ckpt, header)
    check_layout(base[0])
    home = home_of(base[0])
    folders = {"clip": args.clip or home / "metrics" / "clip", "dino": args.dino or home / "metrics" / "dino"}
    folders["align"] = args.align or home / "reward"
    if args.aesthetic:
        folders |= {"aesthetic": args.aesthetic, "aesthetic_clip": args.aesthetic_clip}
    for name, network in folders.items():
        if not network.exists():
            raise CheckpointError(f"{network} is missing: name its place with --{name.replace('_', '-')}")
    subject = _subject(args, folder, ckpt, header)
    size = checked(count, header, "resolution", ckpt) if "resolution" in header else None  # the base's own
    drawing = drawing_options(args, ckpt, header, base[0]) | {"n": args.n, "seed": args.seed, "size": size}
    drawing |= {"prompts": subject.test_prompts, "precision": args.precision}
    out, result = out or path.with_suffix(".eval"), path.with_suffix(".eval.json")
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out {out} is the folder of the photos: give another one")
    check_folder(out)
    check_writable(result)
    files = {"ckpt": [ckpt] if ckpt else [], "base": files_of_base(base[0]), "photos": subject.photos}
    files |= {name: [network] for name, network in folders.items()}
    identity = {"noun": subject.noun, "live": subject.live, "token": subject.token, "lambda": args.lam}
    identity |= {"ckpt": ckpt and ckpt.name, "base": base_name(base[0]), "variant": base[1], "prediction_type": base[2]}
    identity["files"] = {name: digest(paths) for name, paths in files.items()}
    return Job(subject, ckpt, header, base, folders, drawing | identity, out, result)


def _subject(args: argparse.Namespace, folder: Path, ckpt: Path | None, header: dict[str, str]) -> Subject:
    """The subject: flags win, then the checkpoint's header, then the folder's name."""
    given = {name: value for name in ("noun", "live", "token") if (value := getattr(args, name)) is not None}
    known = {"noun": None, "live": None, "token": "[V]"} | header | given
    if known["live"] is not None:
        known["live"] = checked(("True", "False"), known, "live", ckpt) == "True"
    return load_subject(folder, known["noun"], known["live"], known["token"], test_prompts=args.prompts)


def evaluate_subjects(
    args: argparse.Namespace, evaluate: Callable[[Job], dict], metrics: Iterable[str]
) -> tuple[dict, dict]:
    """Evaluate every subject of DreamBench that --dreambench holds; a failure is reported and does not stop the rest.

    evaluate: returns the content of a job's JSON file. Several processes share the subjects. Returns, in every process,
    the prompts' means of each subject, such as {"dog": {"dino": [0.6, ...], ...}}, and the errors of those that failed.
    """
    names = [name for name in DREAMBENCH_NOUNS if (args.dreambench / name).is_dir()]
    if not names:
        raise ValueError(f"{args.dreambench} holds no subject of DreamBench: give google/dreambooth's folder dataset")
    print(f"{len(names)} of DreamBench's {len(DREAMBENCH_NOUNS)} subjects are in {args.dreambench}")
    jobs, values, failed = {}, {}, {}
    for name in names[ranks.rank() :: ranks.world_size()]:  # all jobs first: an error is known before any drawing
        with _reported(name, failed):
            jobs[name] = prepare_job(args, args.dreambench / name, args.out and args.out / name)
    for name, job in jobs.items():
        with _reported(name, failed):
            before = job.done(metrics)
            values[name] = before or job.values(evaluate(job), metrics)
            print(f"{name}: {'done before' if before else 'done'}, {job.result}", flush=True)
    return _gathered(values, names), _gathered(failed, names)


@contextmanager
def _reported(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Print an error of one subject, and put it into `failed`."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        failed[name] = f"the memory is full: {REMEDY}" if is_out_of_memory(error) else " ".join(str(error).split())
        print(f"{name}: error: {failed[name]}", file=sys.stderr)


def _gathered(part: dict, names: list[str]) -> dict:
    """The dictionaries of all processes as one, in the order of `names`."""
    everything = dict(ranks.gather(list(part.items())))
    return {name: everything[name] for name in names if name in everything}
