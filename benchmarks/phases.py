"""One whole run of train.py, watched from outside: seconds by phase, FLOP, the peak of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import train
from benchmarks import common
from support import start
from support.machine import Optimizer
from support.randomness import VALIDATION
from support.record import Record
from train import RPO

DOG = Path(__file__).parent.parent / "data" / "dog"
PHASES = ("load", "negatives", "training", "validation", "saving", "rest")


class Phases:
    """Wall-clock by phase; what happens within a phase within a phase counts for the inner one."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.calls, self.open = device, Counter(), Counter(), ["rest"]
        self.then = time.perf_counter()

    def charge(self) -> None:
        """Give the time since the last call to the phase at hand."""
        common.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.then
        self.then = now

    @contextlib.contextmanager
    def __call__(self, name: str):
        self.charge()
        self.open.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self.charge()
            self.open.pop()

    def wrap(self, owner: type, method: str, name: str):
        """A patch under which `method` counts for the phase."""
        inner = getattr(owner, method)

        def timed(*arguments, **options):
            with self(name):
                return inner(*arguments, **options)

        return mock.patch.object(owner, method, timed)


def whole(
    base: Path,
    device_name: str,
    argv: list[str],
    threads: int,
    subject: Path = DOG,
    ckpt: Path | None = None,
    method: type[RPO] = RPO,
) -> dict:
    """Run train.py, or a baseline's `method`, in this process: seconds of each phase, its FLOP, the peak of memory.

    ckpt: where the result should stay. Call it in a process of its own: the peak is the process's.
    """
    torch.set_num_threads(threads)
    device, runs = torch.device(device_name), []

    class Watched(method):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            runs.append(self)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # stdout is for the tables
        arguments = ["--subject", subject, "--base", base, "--ckpt", ckpt or Path(folder) / "run.safetensors"]
        args = start.parse(method, "", [*map(str, arguments), "--device", device_name, *argv])
        phases = Phases(device)
        for owner, methods, name in (
            (start.StableDiffusion, ["from_pretrained"], "load"),
            (start.ALIGN, ["from_pretrained"], "load"),
            (Watched, ["prepare"], "negatives"),
            (Watched, ["batch", "loss"], "training"),
            (Optimizer, ["minimize", "numbers"], "training"),
            (Watched, ["validate"], "validation"),
            (Record, ["_write"], "saving"),
        ):
            for each in methods:
                stack.enter_context(phases.wrap(owner, each, name))
        train.fine_tune(args, Watched)
        phases.charge()
        what, peak = common.peak_memory(device)
        run, steps = runs[0], sum("total" in row for row in runs[0].record.history)
        counts = {"negatives": len(run.c_mod), "training": steps}
        counts["validation"] = len(run.prompts) * phases.calls["validation"]
        result = {"seconds": {name: phases.seconds[name] for name in PHASES}, "counts": counts, "peak": peak}
        result |= {"peak_of": what, "settings": dataclasses.asdict(run.settings)}
        each = work(run)
        return result | {"flop": {name: count * each[name] for name, count in counts.items()}}


def step(run: RPO) -> Tensor:
    """One training step, without the record; returns the loss."""
    loss = run.loss(run.machine.place(run.batch(1))).total
    run.optimizer.minimize(loss)
    return loss.detach()


def work(run: RPO) -> dict[str, int]:
    """FLOP of one negative, one training step and one validation picture, as torch counts them (2 a multiply-add)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(call) -> int:
        # The counter may not know the CPU's fused attention, but it knows products of matrices.
        plain = sdpa_kernel(SDPBackend.MATH) if run.sd.device.type == "cpu" else contextlib.nullcontext()
        with FlopCounterMode(display=False) as counter, plain:
            call()
        return counter.get_total_flops()

    prompt, image = run.prompts[:1], run.photos[:1]
    draw = count(lambda: run.draw(prompt, run.theta, VALIDATION, "counting"))
    score = count(lambda: run.reward.alignments(image, prompt))
    encode = count(lambda: run.sd.encode_images(image))
    return {"negatives": draw + score + encode, "training": count(lambda: step(run)), "validation": draw + score}


def matmul_peak(device: torch.device, quick: bool) -> tuple[str, float]:
    """What a large matrix product reaches here, FLOP/s, taken as the machine's peak."""
    side = 8192 if device.type == "cuda" else 1024 if quick else 4096
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b, best = torch.randn(side, side, device=device, dtype=dtype), torch.randn(side, side).to(device, dtype), 0.0
    for _ in range(5):
        common.synchronize(device)
        start = time.perf_counter()
        a @ b
        common.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return f"{side} x {side} {str(dtype).removeprefix('torch.')} matrix product", best


def whole_rows(result: dict, peak_flops: float) -> list[str]:
    """The table of a whole run."""
    rows = ["| phase | what | s | share | TFLOP | of the peak |", "|---|---|---|---|---|---|"]
    total, flop = sum(result["seconds"].values()), sum(result["flop"].values())
    units = {"negatives": "pictures", "training": "steps", "validation": "pictures"}
    for name in PHASES:
        seconds, done = result["seconds"][name], result["flop"].get(name, 0)
        what = f"{result['counts'][name]} {units[name]}" if name in units else ""
        used = f"{done / 1e12:.2f} | {done / seconds / peak_flops:.0%}" if done else " | "
        rows.append(f"| {name} | {what} | {seconds:.1f} | {seconds / total:.0%} | {used} |")
    rows.append(f"| all | | {total:.1f} | 100% | {flop / 1e12:.2f} | {flop / total / peak_flops:.0%} |")
    return rows
