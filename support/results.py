"""Where results may be written: nothing of the user's is replaced, and two runs never write the same files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.files.errors import CheckpointError
from model.files.single_file import CONFIG_KEY
from model.files.tensors import read_metadata
from model.files.write import write_atomic
from support import ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STATE = ".state.pt"  # next to the checkpoint, while its run is not finished


def files_of_run(ckpt: Path) -> list[Path]:
    """The files that a run writes: checkpoint, history, film strip and state."""
    return [ckpt.with_suffix(ending) for ending in (".safetensors", ".jsonl", ".png", STATE)]


def check_writable(path: Path, size: int = 0) -> None:
    """Raise ValueError if a file of `size` bytes cannot be written at `path`. Leaves nothing."""
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give a file name")
        # The first folder that exists; a link to a missing folder counts, because mkdir() cannot make it.
        folder = next((folder for folder in path.parents if os.path.lexists(folder)), path.parent)
        probe = folder / f".{path.name}.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # another machine may have the same process id
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another place") from None
    if free < size:
        raise ValueError(f"{folder} has {free / 2**30:.1f} GiB free, and {size / 2**30:.1f} are needed")


def check_result(ckpt: Path, resume: bool, photos: Path) -> None:
    """Print what a run with this --ckpt will replace. Raises ValueError if it cannot be written, or resumed.

    A run may not replace files that no run has written, such as a base model. Nor may it write into the folder of the
    photos: the next run would take the film strip for a photo.
    """
    if ckpt.parent.resolve() == photos.resolve():
        raise ValueError(f"--ckpt {ckpt} is in the folder of the photos, {photos}: give another folder")
    files, state = files_of_run(ckpt), ckpt.with_suffix(STATE)
    for path in files:
        check_writable(path)
    existing = [path for path in files if path.exists()]
    if existing and not _is_result(ckpt):
        raise ValueError(f"{existing[0]} is not train.py's, and would be replaced: move it, or give another --ckpt")
    if resume:
        if state not in existing:
            raise ValueError(f"there is nothing to resume: {state} is missing")
        return
    if existing:
        print(f"{', '.join(map(str, existing))}: will be replaced, from step 0 on; --ckpt NAME keeps them")
    if state in existing:
        print(f"{state} is of an interrupted run; --resume continues it")


def _is_result(ckpt: Path) -> bool:
    """Return True if train.py has written the files of this name: the checkpoint, or else the state or the history."""
    try:
        if ckpt.exists():
            header = read_metadata(ckpt).keys()
            return {"version", "noun", "step"} <= header and CONFIG_KEY not in header  # which sample.py exports
        if ckpt.with_suffix(STATE).exists():
            return True
        with open(ckpt.with_suffix(".jsonl"), encoding="utf-8") as history:
            return {"step", "reward"} <= json.loads(history.readline()).keys()
    except (CheckpointError, OSError, ValueError, AttributeError):
        return False


@contextmanager
def lock(ckpt: Path) -> Iterator[None]:
    """Hold the lock of a result. Raises ValueError if another run on this machine holds it.

    The system frees the lock when a process ends, in any way.
    """
    if fcntl is None or ranks.rank() > 0:
        yield
        return
    path = ckpt.with_name(f".{ckpt.stem}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {ckpt}: wait for it, or give another --ckpt") from None
        except OSError:  # some network file systems have no locks
            pass
        else:  # a run that was killed has left write_atomic's temporary files, .NAME.PROCESS
            names = {f".{file.name}" for file in files_of_run(ckpt)}
            for left in ckpt.parent.iterdir():
                if left.stem in names and left.suffix[1:].isdigit():
                    left.unlink(missing_ok=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def warn_if_unfinished(ckpt: Path | None) -> None:
    """Warn on stderr if the run that writes this checkpoint is not done: the weights may even be an older run's."""
    if ckpt and ckpt.with_suffix(STATE).exists():
        print(f"warning: the run of {ckpt} is not finished: train.py --resume continues it", file=sys.stderr)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file as write_atomic does. Bytes of file names that are not UTF-8 become \\udcXX."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))
