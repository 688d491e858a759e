"""What the commands share: argument types with one-line errors, defaults, the device."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from model.files.errors import is_out_of_memory
from model.files.write import write_atomic
from model.stable_diffusion import recommended
from model.tokenizer import CLIPTokenizer
from support import ranks

EMBEDDED_BASE = Path(__file__).parent.parent / "weights" / "toy"

# The paper's settings (table 4) but for those in OURS. A base's rpo.json may recommend others; flags win.
DEFAULTS = {"lr": 5e-6, "batch": 1, "guidance": 7.5, "images_per_prompt": 4, "class_images": 200, "solver_steps": 20}
LORA_LR = 1e-4
OURS = {"lora_lr": "usual for LoRA", "solver_steps": "our default", "class_images": "usual for DreamBooth"}


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line (its exit status is 2, as ever)."""

    def __init__(self, **options):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A λ should not end a run where the output's encoding has none; and a log should grow line by line.
                stream.reconfigure(errors="replace", line_buffering=True)
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)  # argparse lacks -1e-4

    def error(self, message: str):
        line = f"{self.prog}: error: {message} (see {self.prog} --help)\n"
        self.exit(2, line if ranks.speaks_first() else None)


def fail(message: object) -> int:
    """Print one line on stderr, of all ranks the first alone; the exit status for bad input."""
    if ranks.speaks_first():
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def guarded(work: Callable[[], int], remedy: Callable[[], str], interrupted: str) -> int:
    """`work`'s exit status; or, of what a user can cause, one line on stderr, and 2, or 130 for Ctrl-C.

    remedy: says what to try when the memory is full. A SIGTERM, or a SIGHUP that nohup does not hide, counts as Ctrl-C.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if ranks.world() == 1 and number and signal.getsignal(number) == signal.SIG_DFL:  # torchrun ends its own
            signal.signal(number, signal.default_int_handler)
    try:
        return work()
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return fail(f"the memory is full: {remedy()}")
        if isinstance(error, RuntimeError):
            raise
        return fail(error)
    except KeyboardInterrupt:
        if ranks.speaks_first():
            print(f"\n{interrupted}", file=sys.stderr)
        return 130


def count(text: str) -> int:
    """A whole number of at least 1, and below 2^31: the libraries have no words for larger ones."""
    return _number(text, int, lambda value: 1 <= value < 2**31, "a whole number of at least 1, below 2^31")


def seed(text: str) -> int:
    """A whole number in 0 .. 2^63 - 1; 0 is a seed like any other."""
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def at_least_0(text: str) -> float:
    """A number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of at least 0")


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def path(name: str) -> Path:
    """A file or folder; "" would be the current folder, and comes of an empty variable."""
    if not name:
        raise argparse.ArgumentTypeError("is empty: give the name of a file or folder, or leave it out")
    return Path(text(name))  # headers, PNGs and JSON name it


def text(value: str) -> str:
    """Text that a tokenizer can read: a terminal of another encoding gives bytes that are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def _number(text: str, kind: type, good: Callable[[float], bool], expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"{text!r} should be {expected}")
    return value


def device(name: str | None) -> torch.device:
    """The device called `name`, or cuda if there is one, else cpu. Raises ValueError for one that is not there.

    Of many processes on a machine each has its own GPU.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world() > 1:
        name = ranks.device(name)
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    chosen = torch.device(name)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # whoever asks what "the GPU" can do means this one
    return chosen


def add_base_flags(parser: argparse.ArgumentParser, default: Path | None, what: str) -> None:
    """--base and how it is read."""
    add = parser.add_argument
    add("--base", type=path, default=default, help=f"a folder with public weights, or a single file (default: {what})")
    add("--variant", help="take *.VARIANT.safetensors, such as fp16 (default: plain files, or the only ones)")
    add("--prediction-type", choices=("epsilon", "v_prediction"), help="of the U-Net (default: as its files say)")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --precision."""
    add = parser.add_argument
    add("--device", help="cpu, cuda or mps; only cpu has been tried (default: cuda if there is one)")
    add(
        "--precision", choices=("fp32", "bf16", "fp16"), help="(default: bf16 on cuda, or fp16 if it is old, else fp32)"
    )


def base_name(base: Path) -> str:
    """A base model's folder as a checkpoint names it: "weights/toy" for the embedded one, wherever the project lies."""
    if base.resolve() == EMBEDDED_BASE.resolve():
        return "weights/toy"
    return str(base.absolute())  # a link to a file stays one: its tokenizer/ is beside the link


def base_folder(name: str) -> Path:
    """The folder that `base_name` called so."""
    return EMBEDDED_BASE if name == "weights/toy" else Path(name)


def base_of(args: argparse.Namespace, ckpt: Path | None, header: dict) -> tuple[Path, str | None, str | None]:
    """The base model meant, its variant and prediction type: the flags of `add_base_flags` win, then `ckpt`'s header.

    Raises ValueError if the header has to say which base it is and does not, or that base is not there.
    """
    # A whole U-Net's goes with it, whichever base it stands on; a LoRA's U-Net is the base's own.
    noted = None if args.base and "lora_rank" in header else header.get("prediction_type")
    prediction_type = args.prediction_type or noted
    if ckpt is None or args.base:
        return args.base or EMBEDDED_BASE, args.variant, prediction_type
    name = header.get("base")
    if not name:
        raise ValueError(
            f"{ckpt} does not say which base model it belongs to: name it with --base, or, if it is a whole model, "
            "give it as --base instead"
        )
    if not base_folder(name).exists():
        raise ValueError(f"{ckpt} belongs to the base model {name}, which is not there: name it with --base")
    return base_folder(name), args.variant or header.get("variant"), prediction_type


def number(settings: dict, name: str, default: float, source: str, kind: Callable[[str], float] | None = None) -> float:
    """The number called `name` in a base's or a checkpoint's settings, else the default, which says what kind it is.

    Raises ValueError, naming the `source` of the settings, for what is no such number.
    """
    try:
        return (kind or (count if isinstance(default, int) else positive))(str(settings.get(name, default)))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{source} is wrong about {name}: {error}") from None


def steps_and_guidance(args: argparse.Namespace, ckpt: Path | None, header: dict, base: Path) -> tuple[int, float]:
    """How to draw: --steps and --guidance win, then the guidance in the header of `ckpt`, then what the base
    recommends, then 20 steps and the paper's guidance.

    Raises ValueError, naming the file, for a number that cannot be used.
    """
    recommends, source = recommended(base)
    steps = args.steps or number(recommends, "solver_steps", DEFAULTS["solver_steps"], f"{source}")
    guidance = number(recommends, "guidance", DEFAULTS["guidance"], f"{source}")
    return steps, args.guidance or number(header, "guidance", guidance, f"{ckpt}")


def settle(args: argparse.Namespace) -> None:
    """Fill in what train.py's flags left open: what the base recommends, else the paper's value.

    Says which is which. Raises ValueError, naming the file, for a number that cannot be used.
    """
    recommends, told_by = recommended(args.base)
    for name, value in DEFAULTS.items():
        source = "command line"
        if getattr(args, name) is None:
            key, value = ("lora_lr", LORA_LR) if name == "lr" and args.lora_rank else (name, value)
            source = "this base's recommendation" if key in recommends else OURS.get(key, "the paper")
            setattr(args, name, number(recommends, key, value, f"{told_by}"))
        if name != "class_images" or args.method != "rpo":
            print(f"  {name:18} {getattr(args, name):<8g} {source}")


def warn_of_cuts(tokenizer: CLIPTokenizer, prompts: Iterable[str]) -> None:
    """A line on stderr for each prompt that is too long, with what is not read of it."""
    for prompt in dict.fromkeys(prompts):
        if (rest := tokenizer.overflow(prompt)) and ranks.rank() == 0:
            print(f"warning: a prompt fills its {tokenizer.length} tokens; not read: {rest!r}", file=sys.stderr)


def check_writable(path: Path, size: int = 0) -> None:
    """Raise ValueError, before any work, if a file of `size` bytes cannot be written at `path`. Leaves nothing."""
    try:
        folder = path.parent
        # write_atomic makes what is missing, but a link that leads nowhere, or a drive that is not there
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give a file name")
        probe = folder / f".{path.name}.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # two machines may share a folder and a process id
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another place") from None
    if free < size:
        raise ValueError(f"{folder} has {free / 2**30:.1f} GiB free, and {size / 2**30:.1f} are needed")


def write_json(path: Path, value: dict) -> None:
    """As model.files.write.write_atomic."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda beside: beside.write_text(text, encoding="utf-8"))
