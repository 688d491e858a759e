"""Where results may be written: nothing of the user's is replaced, and two runs never write the same files."""

from __future__ import annotations

import json
import os
import re
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

STATE = ".state.pt"  # next to the checkpoint, while its run is not finished

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def check_writable(path: Path, size: int = 0) -> None:
    """Raise ValueError, before any work, if a file of `size` bytes cannot be written at `path`. Leaves nothing."""
    try:
        folder = path.parent
        # write_atomic creates missing folders, but not a link's missing target or a missing drive
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


def check_result(ckpt: Path, resume: bool, photos: Path) -> None:
    """Say what a run with this --ckpt would replace. Raises ValueError if it cannot be written, or resumed.

    A run may not replace what no run has written, such as a base model. Nor may its film strip be among the `photos`,
    a folder: the next run would take it for a photo.
    """
    results = [ckpt.with_suffix(ending) for ending in (".safetensors", ".jsonl", ".png", STATE)]
    _, history, _, state = results
    if ckpt.parent.resolve() == photos.resolve():
        raise ValueError(f"--ckpt {ckpt} is in the folder of the photos, {photos}: give another folder")
    for path in results:
        check_writable(path)
    existing = [path for path in results if path.exists()]
    ours = _is_result(ckpt) if ckpt.exists() else state.exists() or _is_history(history)
    if existing and not ours:
        raise ValueError(f"{existing[0]} is not train.py's, and would be replaced: move it, or give another --ckpt")
    if resume:
        if not state.is_file():
            raise ValueError(f"there is nothing to resume: {state} is missing")
        return
    if existing:
        names = ", ".join(map(str, existing))
        print(f"{names}: will be replaced, from step 0 on; --ckpt NAME keeps them")
    if state.exists():
        print(f"{state} is of an interrupted run; --resume continues it")


def check_room(ckpt: Path, parameters: int) -> None:
    """Raise ValueError if the disk has no room for a run that trains so many parameters.

    A checkpoint and a state (fp32, with AdamW's two averages), and the new state next to the old while it is written.
    """
    existing = [path.stat().st_size for path in (ckpt, ckpt.with_suffix(STATE)) if path.exists()]
    check_writable(ckpt, max(28 * parameters - sum(existing), 12 * parameters))


@contextmanager
def lock(ckpt: Path) -> Iterator[None]:
    """Hold the lock of a result, so that no other run on this machine writes it. Raises ValueError if one does.

    The system frees the lock when a process ends, in any way; the file that carries it is removed.
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
            _remove_temporary_files(ckpt)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _remove_temporary_files(ckpt: Path) -> None:
    """Remove what a run that was killed while writing has left."""
    name = re.compile(rf"\.{re.escape(ckpt.stem)}\.(safetensors|jsonl|png|state\.pt)\.\d+")
    for file in ckpt.parent.iterdir():
        if name.fullmatch(file.name):
            file.unlink(missing_ok=True)


def warn_if_unfinished(ckpt: Path | None) -> None:
    """Warn on stderr if the run that writes this checkpoint is not done: the weights may even be an older run's."""
    if ckpt and ckpt.with_suffix(STATE).exists():
        print(f"warning: the run of {ckpt} is not finished: train.py --resume continues it", file=sys.stderr)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file as write_atomic does. Bytes of file names that are not UTF-8 become \\udcXX."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def _is_result(ckpt: Path) -> bool:
    """Return True if its header says that train.py wrote it, and not sample.py's --export-single."""
    try:
        header = read_metadata(ckpt).keys()
        return {"version", "noun", "step"} <= header and CONFIG_KEY not in header
    except CheckpointError:
        return False


def _is_history(path: Path) -> bool:
    """Return True if it begins as a run's history does, with the base's validation."""
    try:
        with open(path, encoding="utf-8") as file:
            return {"step", "reward"} <= json.loads(file.readline()).keys()
    except (OSError, ValueError, AttributeError):
        return False
