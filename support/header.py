"""The header of a checkpoint: what train.py writes there and who reads it. Also: when --resume accepts a run's state.

| keys | written from | read by |
|---|---|---|
| base, variant, prediction_type | flags, the base | sample.py, evaluate.py: its base, and how to read that |
| token, noun | the subject | sample.py: default prompts; evaluate.py: test prompts and scored texts |
| training_prompts | the subject | people: a list in JSON |
| live | the subject | evaluate.py: test prompts of living subjects or of things |
| resolution (if set), guidance | settings | sample.py, evaluate.py: how to draw |
| lora_rank | flags | sample.py, evaluate.py: with --base, a LoRA's prediction type is that base's |
| step, reward | the kept validation | train.py --resume; step also goes into PNGs |
| version, noun, step | | train.py: only a file that has all three may be replaced by a run |
| format | | other tools |
| method and the other settings | settings | people; evaluate.py copies the header into its JSON file |
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

from model.scheduler import SAMPLERS
from model.stable_diffusion import StableDiffusion, home_of, recommended
from subject import Subject, visible_files
from support.flags import EMBEDDED_BASE
from support.settings import checked, count, guidance_scale

VERSION = "0.1.0"
SOLVER_STEPS, GUIDANCE = 20, 7.5  # without a checkpoint or a recommendation: ours; the release's


def header_of(method: str, args: argparse.Namespace, settings, subject: Subject, sd: StableDiffusion) -> dict[str, str]:
    """The header of a run's checkpoints, before step and reward are known."""
    header = {"format": "pt", "method": method, "version": VERSION, "base": base_name(args.base)}
    header |= {"variant": args.variant, "prediction_type": sd.scheduler.config.prediction_type}
    header |= {"lora_rank": args.lora_rank}
    header |= {"token": subject.token, "noun": subject.noun, "live": subject.live} | dataclasses.asdict(settings)
    header |= {"training_prompts": json.dumps(subject.training_prompts, ensure_ascii=False)}
    return {name: str(value) for name, value in header.items() if value is not None}


def identity_of(method: str, args: argparse.Namespace, settings, subject: Subject) -> dict[str, str]:
    """What must be equal for --resume: all settings but steps and patience, and the contents of the files.

    Their paths may differ.
    """
    identity = dataclasses.asdict(settings)
    del identity["steps"], identity["patience"]
    identity |= {name: getattr(args, name) for name in ("variant", "prediction_type", "precision", "lora_rank")}
    identity |= {"method": method, "base": digest(files_of_base(args.base)), "align": digest([args.align])}
    identity |= {"token": subject.token, "noun": subject.noun, "live": subject.live}
    identity |= {"photos": {photo.name: digest([photo])[:8] for photo in subject.photos}}
    prompts = "\n".join(subject.training_prompts).encode()
    identity |= {"training_prompts": hashlib.blake2b(prompts).hexdigest()[:8]}
    return {name: str(value) for name, value in identity.items()}


def files_of_base(base: Path) -> list[Path]:
    """A single file, or the folders of a base's networks; and its tokenizer."""
    networks = [base] if base.is_file() else [base / part for part in ("unet", "vae", "text_encoder", "scheduler")]
    return [*networks, home_of(base) / "tokenizer"]


def digest(paths: list[Path]) -> str:
    """A hash of the names and contents of files, and of the visible files of folders."""
    files = [file for path in paths for file in (visible_files(path) if path.is_dir() else [path])]
    seen = hashlib.blake2b()
    for file in files:
        if file.is_file():
            stat = file.stat()
            line = f"{file.name} {_content(file, stat.st_size, stat.st_mtime_ns)}\n"
            seen.update(line.encode(errors="surrogateescape"))  # a file's name need not be UTF-8
    return seen.hexdigest()[:16]


@functools.cache  # evaluate.py needs the same base for each subject
def _content(file: Path, size: int, changed: int) -> str:
    seen = hashlib.blake2b()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            seen.update(block)
    return seen.hexdigest()


def base_name(base: Path) -> str:
    """A base model's folder as a checkpoint names it: "weights/toy" for the embedded one, wherever this project is."""
    if base.resolve() == EMBEDDED_BASE.resolve():
        return "weights/toy"
    return str(base.absolute())  # not resolved: a linked single file has its tokenizer/ next to the link


def base_folder(name: str) -> Path:
    """The inverse of `base_name`."""
    return EMBEDDED_BASE if name == "weights/toy" else Path(name)


def resolve_base(args: argparse.Namespace, ckpt: Path | None, header: dict) -> tuple[Path, str | None, str | None]:
    """The base model, its variant and its prediction type: flags win, then `ckpt`'s header.

    Raises ValueError if no flag names the base and the header does not either, or names one that is not there.
    """
    # A whole U-Net has its own prediction type on any base; a LoRA has that of the base it is used with.
    own = None if args.base and "lora_rank" in header else header.get("prediction_type")
    prediction_type = args.prediction_type or own
    if ckpt is None or args.base:
        return args.base or EMBEDDED_BASE, args.variant, prediction_type
    if not (name := header.get("base")):
        raise ValueError(f"{ckpt} names no base model: add --base, or, for a whole model, give it as --base instead")
    if not base_folder(name).exists():
        raise ValueError(f"{ckpt} belongs to the base model {name}, which is not there: name it with --base")
    return base_folder(name), args.variant or header.get("variant"), prediction_type


def add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    """--sampler, --solver-steps and --guidance of sample.py and evaluate.py, which `drawing_options` reads."""
    add, elsewhere = parser.add_argument, "or what the base recommends"
    add("--sampler", "--scheduler", choices=SAMPLERS, help=f"the sampler (default: dpm++, {elsewhere})")
    add("--solver-steps", "--steps", type=count, help=f"the sampler's steps (default: 20, {elsewhere})")
    add("--guidance", type=guidance_scale, help="classifier-free guidance (default: as in training, or the base's)")


def drawing_options(args: argparse.Namespace, ckpt: Path | None, header: dict, base: Path) -> dict:
    """steps, guidance and sampler, for drawing: flags win, then `ckpt`'s header (guidance alone), then what the base
    recommends, then the defaults. Raises ValueError, naming the file, for a value that cannot be used.
    """
    values, source = recommended(base)
    values = {"solver_steps": SOLVER_STEPS, "guidance": GUIDANCE, "sampler": "dpm++"} | values
    steps = args.solver_steps or checked(count, values, "solver_steps", source)
    sampler = args.sampler or checked(SAMPLERS, values, "sampler", source)
    if "guidance" in header:
        values, source = header, ckpt
    guidance = args.guidance or checked(guidance_scale, values, "guidance", source)
    return {"steps": steps, "guidance": guidance, "sampler": sampler}
