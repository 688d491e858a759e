"""What a run of train.py leaves on disk, all with the checkpoint's stem, each written beside and renamed:

best.safetensors   the U-Net of the kept validation, in the public layout, its settings in the header
best.jsonl         the history: a line a step or validation
best.png           the film strip
best.state.pt      all that --resume needs, from step 0 on, the more rarely the larger it is; removed at the end
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.files.errors import CheckpointError, is_out_of_memory
from model.files.single_file import CONFIG_KEY
from model.files.tensors import read_metadata
from model.files.write import save_tensors, write_atomic
from model.stable_diffusion import home_of
from subject import Subject, visible_files
from support import flags, ranks
from support.pictures import film_strip

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = "0.1.0"
STATE = ".state.pt"
TERMS = {  # the flags that a method's loss reads, for the checkpoint's header; a new method has its own
    "rpo": ("lambda_train", "beta", "tau", "preference_weight"),
    "dreambooth": ("prior_weight", "class_images"),
    "dpg": ("prior_weight", "class_images", "dpg_reward"),
}
PAUSE = 20e-9  # seconds a byte between two states: of SD 1.5's whole U-Net 200 s, of the embedded one's 2


class Record:
    """The history of a run and its best validation so far.

    ckpt: the kept weights' path, *.safetensors. header: their header's settings. settings: what must be equal for a run
    to be the same run. prompts, photos: the film strip's columns and its top.
    """

    def __init__(self, ckpt: Path, header: dict, settings: dict, prompts: list[str], photos: list[Image.Image]):
        self.ckpt, self.prompts, self.photos = ckpt, prompts, photos
        self.header = {name: str(value) for name, value in header.items()}
        self.settings = {name: str(value) for name, value in settings.items()}
        self.history: list[dict] = []
        self.strip: list[tuple[int, float, list[Image.Image]]] = []  # step, reward, one picture a prompt
        self.best_step, self.best_reward = None, -math.inf
        self.kept = None  # step and reward of the weights that are in the file
        self.stale = 0  # validations since the best one
        self.saved = None  # the step that there is to resume from
        self.last_state = time.time()

    def validation(self, row: dict, images: list[Image.Image], keep_last: bool = False) -> bool:
        """Note a validation: its row, with step and reward, and a picture a prompt. Is it to be kept?

        It is if its reward is the highest so far, or, with keep_last, in any case; step 0, the base, never is.
        """
        step, reward = row["step"], row["reward"]
        self.history.append(row)
        self.strip.append((step, reward, images))
        better = step > 0 and (keep_last or reward > self.best_reward)
        self.stale = 0 if better or step == 0 else self.stale + 1
        if better:
            self.best_step, self.best_reward = step, reward
        return better

    def keep(self, weights: dict[str, Tensor]) -> None:
        """Write the checkpoint: the weights of the validation just noted. Raises ValueError if that fails."""
        header = self.header | {"step": str(self.best_step), "reward": str(self.best_reward)}
        save_tensors(weights, self.ckpt, header)
        self.kept = self.best_step, self.best_reward

    def write(self) -> None:
        """The history and the film strip. Raises ValueError if a file cannot be written."""
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        write_atomic(self.ckpt.with_suffix(".jsonl"), lambda path: path.write_text(lines, encoding="utf-8"))
        page = film_strip(self.prompts, self.photos, self.strip, self.best_step)
        write_atomic(self.ckpt.with_suffix(".png"), lambda path: page.save(path, "PNG"))

    def summary(self) -> str:
        """Where the result is, and how good it is."""
        if self.kept is None:
            return "nothing was kept yet"
        step, reward = self.kept
        base = next(row["reward"] for row in self.history if row["step"] == 0)
        note = "" if reward > base else ", NOT BETTER than the base: try another --lr or other photos"
        text = f"kept step {step} in {self.ckpt} (history .jsonl, film strip .png beside it)"
        return f"{text}: reward {reward:.4f}, the base's is {base:.4f}{note}"

    def save_state(self, step: int, parts: dict[str, dict]) -> None:
        """All that is needed to go on after `step` as if nothing had happened, unless the last was written just now.

        parts: state_dicts by name. AdamW's two averages are twice as large as the weights, parts["unet"].
        """
        size = 3 * sum(tensor.nbytes for tensor in parts["unet"].values())
        # The first at once: it replaces an older run's, and a run is not done for as long as there is a state.
        if self.saved is not None and time.time() - self.last_state < PAUSE * size:
            return
        strip = [(step, reward, torch.from_numpy(np.stack(images))) for step, reward, images in self.strip]
        best = (self.best_step, self.best_reward, self.stale)
        state = {"run": self.settings, "step": step, "best": best, "history": self.history, "strip": strip, **parts}
        write_atomic(self.ckpt.with_suffix(STATE), lambda path: torch.save(state, path))
        self.saved, self.last_state = step, time.time()

    def load_state(self, parts: dict) -> int:
        """Fill this record and the `parts`, whatever has load_state_dict, by name; returns the step that was done.

        Raises CheckpointError if the state is broken, or of a run with other settings, which it names, or if the
        weights are gone that the run has kept.
        """
        path, ours, changed = self.ckpt.with_suffix(STATE), self.settings, []
        try:
            mmap = os.name != "nt"  # else every process reads all of it; Windows replaces no mapped file
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
            theirs = state["run"]
            changed = [f"{name} {theirs.get(name)} -> {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
            if not changed:
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.best_step, self.best_reward, self.stale = state["best"]
                self.kept = (self.best_step, self.best_reward) if self.best_step is not None else None
                self.strip = [
                    (s, r, [Image.fromarray(image) for image in images.numpy()]) for s, r, images in state["strip"]
                ]
                self.history, self.saved = state["history"], state["step"]
        except Exception as error:  # torch raises many kinds for a broken file
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{path} is broken ({type(error).__name__}): drop --resume to start anew") from None
        if changed:
            raise CheckpointError(f"{path} is of a run with other settings ({'; '.join(changed)}): give the same ones")
        if self.kept:
            if not self.ckpt.is_file():
                raise CheckpointError(f"{self.ckpt} is missing, which that run has kept: put it back, or start anew")
            header = read_metadata(self.ckpt)  # it may be of a later validation than the state
            self.kept = int(header.get("step", self.kept[0])), float(header.get("reward", self.kept[1]))
        return self.saved


def metadata(args: argparse.Namespace, subject: Subject) -> dict[str, object]:
    """For the checkpoint's header: what sample.py and evaluate.py need to know, and how it was made."""
    values = {"format": "pt", "method": args.method, "version": VERSION, "base": flags.base_name(args.base)}
    optional = ("variant", "resolution", "lora_rank")
    values |= {name: getattr(args, name) for name in optional if getattr(args, name)}
    values |= {"token": subject.token, "noun": subject.noun, "live": subject.live}
    names = TERMS[args.method] + ("images_per_prompt", "validate_every", "lambda_val", "mean", "keep_last")
    names += ("lr", "batch", "guidance", "solver_steps", "seed")
    return values | {name: getattr(args, name) for name in names}


def fingerprint(args: argparse.Namespace, subject: Subject) -> dict[str, object]:
    """What must be equal for a run to be the same run. More --steps or another --patience are welcome.

    Of files it is what they hold, not where they lie.
    """
    free = {"steps", "patience", "resume", "device", "ckpt", "checkpoint_gradients", "compile", "subject"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings |= {"base": digest(files_of_base(args.base)), "align": digest([args.align])}
    if args.dpg_reward == "dino":
        settings["dino"] = digest([home_of(args.base) / "metrics" / "dino"])
    photos = {photo.name: hashlib.sha256(photo.read_bytes()).hexdigest()[:8] for photo in subject.photos}
    return settings | {"noun": subject.noun, "photos": photos}


def files_of_base(base: Path) -> list[Path]:
    """A single file, or a base's folders of networks, and its tokenizer."""
    networks = [base] if base.is_file() else [base / part for part in ("unet", "vae", "text_encoder", "scheduler")]
    return [*networks, home_of(base) / "tokenizer"]


def digest(paths: list[Path]) -> str:
    """Tells files, and those of folders, apart by name, size, and all of 16 MiB, or one at 16 places to the last."""
    seen = hashlib.sha256()
    files = [file for path in paths for file in (visible_files(path) if path.is_dir() else [path])]
    for file in (file for file in files if file.is_file()):
        with open(file, "rb") as stream:
            seen.update(f"{file.name} {(size := file.stat().st_size)}\n".encode())
            for place in range(0, size, 2**20) if size <= 2**24 else [(size - 2**20) * i // 15 for i in range(16)]:
                stream.seek(place)
                seen.update(stream.read(2**20))
    return seen.hexdigest()[:16]


@contextmanager
def alone(ckpt: Path) -> Iterator[None]:
    """Inside, no other run on this machine writes the same result. Raises ValueError if one does.

    The system frees the lock when a process ends, however that is; the file that carries it is removed.
    """
    if fcntl is None or ranks.rank() > 0:
        yield
        return
    path = ckpt.with_name(f".{ckpt.stem}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists():  # its owner has ended just now
                raise BlockingIOError
        except BlockingIOError:
            raise ValueError(f"another run is writing {ckpt}: wait for it, or give another --ckpt") from None
        except OSError:  # some network file systems have no locks
            pass
        else:
            for left in path.parent.iterdir():  # by a run that was killed in the midst of writing
                if re.fullmatch(rf"\.{re.escape(ckpt.stem)}\.(safetensors|jsonl|png|state\.pt)\.\d+", left.name):
                    left.unlink(missing_ok=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_place(ckpt: Path, resume: bool, photos: Path) -> None:
    """Say what a run with this result would replace. Raises ValueError if it cannot be written, or resumed.

    Nor may it replace what no run has written, such as a base model, or lie among the `photos`, a folder: the next run
    would take the film strip for one of them.
    """
    results = [ckpt.with_suffix(ending) for ending in (".safetensors", ".jsonl", ".png", STATE)]
    _, history, _, state = results
    if ckpt.parent.resolve() == photos.resolve():
        raise ValueError(f"--ckpt {ckpt} lies among the photos in {photos}: give another folder")
    for path in results:
        flags.check_writable(path)
    there = [path for path in results if path.exists()]
    ours = _is_result(ckpt) if ckpt.exists() else state.exists() or _is_history(history)
    if there and not ours:
        raise ValueError(f"{there[0]} is not train.py's, and would be replaced: move it, or give another --ckpt")
    if resume:
        if not state.is_file():
            raise ValueError(f"there is nothing to resume: {state} is missing")
        return
    if there:
        names = ", ".join(map(str, there))
        print(f"{names}: will be replaced, from step 0 on; --ckpt NAME keeps them")
    if state.exists():
        print(f"{state} is of an interrupted run; --resume goes on with it")


def warn_if_unfinished(ckpt: Path | None) -> None:
    """A line on stderr if the run that writes this checkpoint is not done: the weights may even be an older run's."""
    if ckpt and ckpt.with_suffix(STATE).exists():
        print(f"warning: the run of {ckpt} is not finished: train.py --resume goes on with it", file=sys.stderr)


def _is_result(ckpt: Path) -> bool:
    """Does its header say that train.py has written it, and not sample.py's --export-single?"""
    try:
        header = read_metadata(ckpt).keys()
        return {"version", "noun", "step"} <= header and CONFIG_KEY not in header
    except CheckpointError:
        return False


def _is_history(path: Path) -> bool:
    """Does it begin as Record.write begins one, with the base's validation?"""
    try:
        with open(path, encoding="utf-8") as file:
            return {"step", "reward"} <= json.loads(file.readline()).keys()
    except (OSError, ValueError, AttributeError):
        return False
