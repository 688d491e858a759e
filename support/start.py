"""The start of a training run: its flags, its files checked and locked, its networks loaded. Prints what it finds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from model.align import ALIGN
from model.files.errors import CheckpointError
from model.stable_diffusion import PRECISIONS, StableDiffusion, check_layout, home_of, recommended
from model.tokenizer import BertTokenizer
from subject import Subject, load_photos, load_subject
from support import flags, memory
from support.header import base_name, header_of, identity_of
from support.machine import Machine, Optimizer, precision
from support.record import Record
from support.results import STATE, check_result, check_writable, lock
from support.settings import add_settings, count, resolve


class Run(NamedTuple):
    """What a method is given."""

    subject: Subject
    photos: list[Image.Image]
    base: Path  # the base model's folder or file
    sd: StableDiffusion
    align: ALIGN
    bert: BertTokenizer  # ALIGN's tokenizer
    machine: Machine  # θ and θ₀
    optimizer: Optimizer
    record: Record
    settings: Any  # the method's


def parse(method: type, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of a method, a class like train.RPO: flags of the run, and a flag for each of its settings."""
    parser = flags.Parser(description=description)
    add = parser.add_argument
    add("--subject", type=flags.path, required=True, help="a folder with 4 to 6 photos of the subject")
    add("--noun", type=flags.text, help="what it is, such as dog (default: from the folder's name)")
    living = "prompts for a living subject, or for a thing (default: whether the noun is an animal or a person)"
    add("--live", action=argparse.BooleanOptionalAction, help=living)
    add("--token", type=flags.text, default="[V]", help="the unique token (default: %(default)s)")
    own = "a text file with a prompt a line, with {V} and {noun} (default: the paper's 8)"
    add("--training-prompts", type=flags.prompts, metavar="FILE", help=own)
    flags.add_base_flags(parser, flags.EMBEDDED_BASE, "the embedded one")
    add("--align", type=flags.path, help="the folder of the reward's ALIGN (default: reward/ in the base's folder)")
    add("--ckpt", type=flags.path, default=Path(method.result), help="the result (default: %(default)s)")
    add("--lora-rank", type=count, help="train adapters of this rank, some MB (default: the whole U-Net)")
    add("--resume", action="store_true", help="continue an interrupted run")
    flags.add_machine_flags(parser)
    add("--checkpoint-gradients", action="store_true", help="less memory, a third slower: compute activations twice")
    add_settings(parser, method.Settings)
    args = parser.parse_args(argv)
    if args.ckpt.suffix != ".safetensors":
        parser.error(f"--ckpt {args.ckpt} should end in .safetensors")
    if (name := base_name(args.base)) != name.encode(errors="replace").decode():  # a checkpoint's header has to hold it
        parser.error(f"--base: {name!r} is not UTF-8: rename its folder")
    if args.patience and args.keep_last:
        parser.error("--patience waits for a better reward, and --keep-last ignores it: leave one out")
    return args


@contextmanager
def prepared(args: argparse.Namespace, method: type) -> Iterator[Run]:
    """Everything a run of the method needs. Raises ValueError, in one line, for input that cannot be used."""
    device = flags.device(args.device)
    args.precision = precision(args.precision, device)
    subject = load_subject(args.subject, args.noun, args.live, args.token, training_prompts=args.training_prompts)
    check_layout(args.base)
    args.align = args.align or home_of(args.base) / "reward"
    if not args.align.is_dir():
        raise CheckpointError(f"{args.align} is missing, which should hold ALIGN: name its folder with --align")
    check_result(args.ckpt, args.resume, subject.folder)
    with lock(args.ckpt):
        prompts = "prompts of living subjects" if subject.live else "prompts of things"
        prompts += " (for a person or an animal: --live)" if args.live is None and not subject.live else ""
        prompts = f"prompts of --training-prompts: {len(args.training_prompts)}" if args.training_prompts else prompts
        print(f"subject {subject.folder}: {len(subject.photos)} photos of {subject.noun!r}, {prompts}")
        args.settings = resolve(method.Settings, args, *recommended(args.base))
        if args.lora_rank and (also := args.settings.also_trained):  # no file format holds both
            raise ValueError(f"--lora-rank cannot train the {also[0].replace('_', ' ')} too: leave one out")
        offload = memory.print_estimate(args, device)
        sd, align = _load(args, device, subject)
        yield assemble(args, method, subject, sd, align, BertTokenizer.from_pretrained(args.align), offload=offload)


def assemble(
    args: argparse.Namespace,
    method: type,
    subject: Subject,
    sd: StableDiffusion,
    align: ALIGN,
    bert: BertTokenizer,
    offload: bool = False,
) -> Run:
    """A run, from loaded networks. offload: VAE, text encoder and ALIGN leave the device between validations."""
    settings = args.settings
    idle = [sd.vae, align] if settings.also_trained else [sd.vae, sd.text_encoder, align]
    machine = Machine(
        sd,
        method.trained,
        settings.also_trained,
        batch=settings.batch,
        lora_rank=args.lora_rank,
        checkpoint_gradients=args.checkpoint_gradients,
        seed=settings.seed,
        offloadable=idle if offload else [],
    )
    optimizer = Optimizer(machine, settings.lr, settings.weight_decay, settings.clip_norm)
    _check_room(args.ckpt, machine, (settings.steps // settings.validate_every + 2) * len(subject.training_prompts))
    photos, name = load_photos(subject, sd.image_size), method.__name__.lower()
    header, identity = header_of(name, args, settings, subject, sd), identity_of(name, args, settings, subject)
    record = Record(args.ckpt, header, identity, subject.training_prompts, photos, optimizer, settings)
    return Run(subject, photos, args.base, sd, align, bert, machine, optimizer, record, settings)


def _check_room(ckpt: Path, machine: Machine, pictures: int) -> None:
    """Raise ValueError if the disk has no room for a run whose film strip has so many pictures.

    4 bytes a weight for the checkpoint; 12 for the state, which holds AdamW's averages too, and 12 for its successor.
    An older run's files are replaced only by whole new ones. The pictures are in both states and in the page.
    """
    weights = sum(tensor.numel() for tensor in machine.weights().values())
    old = sum(path.stat().st_size for path in (ckpt, ckpt.with_suffix(STATE)) if path.exists())
    check_writable(ckpt, max(28 * weights - old, 12 * weights) + 3 * pictures * 3 * machine.sd.image_size**2)


def _load(args: argparse.Namespace, device: torch.device, subject: Subject) -> tuple[StableDiffusion, ALIGN]:
    """The base and ALIGN. Raises ValueError for settings that do not fit this base."""
    settings = args.settings
    sd = StableDiffusion.from_pretrained(args.base, device, args.variant, args.prediction_type)
    sd.precision, sd.image_size = PRECISIONS[args.precision], settings.resolution or sd.image_size
    align = ALIGN.from_pretrained(args.align).to(device)
    parameters = sum(parameter.numel() for parameter in sd.unet.parameters())
    slow = args.device is None and device.type == "cpu" and parameters > 1e8
    where = "cpu, since torch sees no GPU" if slow else device
    print(f"base {base_name(args.base)} on {where}: {parameters / 1e6:.1f} M parameters, {sd.image_size} px")
    print(f"the token {subject.token} is read as {' '.join(sd.tokenizer.tokens(subject.token))}")
    flags.warn_of_truncation(sd.tokenizer, [subject.instance_prompt, *subject.training_prompts])
    if sd.image_size % sd.vae.downscale:
        raise ValueError(f"--resolution must be a multiple of {sd.vae.downscale}, not {settings.resolution}")
    if settings.solver_steps > (most := len(sd.scheduler.alphas_cumprod)):
        raise ValueError(f"--solver-steps must be between 1 and {most}, not {settings.solver_steps}")
    return sd, align
