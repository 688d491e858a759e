"""The command: runs the parts, each in a process of its own and in its share of the time, and writes the tables."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.gpu import drawing, training
from benchmarks.gpu.job import FAILED, SIZES, Job, base
from model.files.write import write_atomic
from support import flags
from support.settings import positive

PARTS: dict[str, tuple[Callable[[Job], None], int]] = {  # and its share of the time: seconds of nine minutes
    "base": (base, 50),
    "parity": (training.parity, 60),
    "whole": (training.whole, 110),
    "step": (training.step, 90),
    "passes": (drawing.passes, 60),
    "drawing": (drawing.drawing, 60),
    "graphs": (drawing.graphs, 70),
    "release": (drawing.release, 40),
}
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers")
SMI = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv"]
PIECE = 15 * 2**20  # bytes

# ----------------------------------------------------------------------------------------------------------- the parts


def measured(args: Namespace, device: torch.device) -> list[dict]:
    """Run the parts and --then, writing the results after each; returns the rows of all tables."""
    os.environ["TQDM_DISABLE"] = "1"  # progress bars would fill the log
    begin, end, minute = time.time(), time.time(), 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="gpu_") as folder:
        job = Job(Path(folder) / "base", args.size, device, begin + minute, Path(folder) / "rows.jsonl")
        describe(job)
        for name, (_, share) in PARTS.items():
            end += minute * share / sum(share for _, share in PARTS.values())
            if name in args.parts:
                run_part(name, job._replace(until=end))
                write(args.out, job.rows)
        if args.then:
            then(args.then, job)
            bring(args.bring, args.out)
        return write(args.out, job.rows)


def describe(job: Job) -> None:
    """The device, its driver and clocks, and the packages that matter."""
    job.add(
        "Where",
        what="machine",
        value=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    )
    if job.device.type == "cuda":
        job.add("Where", what="device", value=torch.cuda.get_device_name(job.device))
        with contextlib.suppress(OSError):
            found = subprocess.run(SMI, capture_output=True, text=True, check=False).stdout
            job.add("Where", what="nvidia-smi", value=found.replace("\n", "; "))
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            job.add("Where", what=name, value=version(name))


def run_part(name: str, job: Job) -> None:
    """Run a part in a new process; stop it when its time is over."""
    if job.left() < 1:
        job.add(FAILED, what=name, traceback="no time was left")
        return
    begin = time.time()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(name, job))
    process.start()
    process.join(job.left())
    if process.is_alive():
        process.kill()
        process.join()
        job.add(FAILED, what=name, traceback="stopped when its time was over")
    elif process.exitcode:
        job.add(FAILED, what=name, traceback=f"its process ended with status {process.exitcode}")
    job.add("Time of the parts", part=name, s=time.time() - begin)


def work(name: str, job: Job) -> None:
    """Do a part, and note the traceback if it fails."""
    try:
        PARTS[name][0](job)
    except Exception:
        job.add(FAILED, what=name, traceback=traceback.format_exc())


# -------------------------------------------------------------------------------------------------------- what follows


def then(command: str, job: Job) -> None:
    """Run a shell command until the job's end; the files it has written by then stay."""
    environment = os.environ | {"SECONDS_LEFT": str(int(job.left()))}
    process = subprocess.Popen(command, shell=True, env=environment, start_new_session=True)
    try:
        status = process.wait(max(0, job.left()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status = "stopped when the time was over"
    job.add("Time of the parts", part=command, status=status)


def bring(files: list[Path], out: Path) -> None:
    """Copy files to the results in pieces, named after their folder: unet-model.safetensors.00, .01, ..."""
    for file in files:
        if file.is_file():
            whole = file.read_bytes()
            for i in range(0, len(whole), PIECE):
                (out / f"{file.parent.name}-{file.name}.{i // PIECE:02}").write_bytes(whole[i : i + PIECE])


# --------------------------------------------------------------------------------------------------------- the results


def write(out: Path, rows: Path) -> list[dict]:
    """Write results.json and results.md; returns the rows."""
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    text = json.dumps(found, indent=1) + "\n"
    write_atomic(out / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_atomic(out / "results.md", lambda path: path.write_text(markdown(found), encoding="utf-8"))
    return found


def markdown(rows: list[dict]) -> str:
    """A section a table, in the order in which they began; tracebacks as they are."""
    lines = [f"# benchmarks.gpu, {time.strftime('%Y-%m-%d')}"]
    for table in dict.fromkeys(row["table"] for row in rows):
        lines += ["", f"## {table}", ""]
        own = [{name: value for name, value in row.items() if name != "table"} for row in rows if row["table"] == table]
        if table == FAILED:
            lines += [f"{row['what']}:\n```\n{row['traceback'].strip()}\n```" for row in own]
            continue
        columns = list(dict.fromkeys(name for row in own for name in row))
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(shown(row.get(column, "")) for column in columns) + " |" for row in own]
    return "\n".join(lines) + "\n"


def shown(value: str | float) -> str:
    """A cell of a table; numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main() -> int:
    """Exit status 0 if nothing failed, else 1."""
    parser = flags.Parser(description=gpu.__doc__)
    add = parser.add_argument
    add("--device", help="cuda or cpu (default: the best there is)")
    add("--size", choices=SIZES, default="sd15", help="of the networks (default: %(default)s)")
    add("--minutes", type=positive, default=9.0, help="for everything (default: %(default)g)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    add("--out", type=Path, default=Path("outputs/gpu"), help="the folder of the results (default: %(default)s)")
    add("--then", metavar="COMMAND", help="what to run in the time that is left")
    add("--bring", nargs="+", type=Path, default=[], metavar="FILE", help="files to copy to the results at the end")
    args = parser.parse_args()
    try:
        rows = measured(args, flags.device(args.device))
    except (ValueError, OSError) as error:
        return flags.fail(error)
    except KeyboardInterrupt:
        return 130
    print(markdown(rows))
    return int(any(row["table"] == FAILED for row in rows))
