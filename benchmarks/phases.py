"""One whole run of train.py, watched from outside: seconds by phase, FLOP, the peak of memory."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

import train
from benchmarks import common
from support import flags, memory

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
    base: Path, device_name: str, argv: list[str], threads: int, subject: Path = DOG, ckpt: Path | None = None
) -> dict:
    """Run train.py in this process and say how long each phase took, its FLOP, and the peak of memory.

    ckpt: where the result should stay.
    Call it in a process of its own: the peak is the process's. Raises RuntimeError if train.py fails.
    """
    torch.set_num_threads(threads)
    device, trainers = torch.device(device_name), []

    class Watched(train.Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            trainers.append(self)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # the tables stay alone
        arguments = ["--subject", subject, "--base", base, "--ckpt", ckpt or Path(folder) / "run.safetensors"]
        args = train.arguments().parse_args([*map(str, arguments), "--device", device_name, *argv])
        phases = Phases(device)
        for owner, methods, name in (
            (train.StableDiffusion, ["from_pretrained"], "load"),
            (train.ALIGN, ["from_pretrained"], "load"),
            (train.Trainer, ["prepare"], "negatives"),
            (train.Trainer, ["step"], "training"),
            (train.Trainer, ["validate"], "validation"),
            (train.Record, ["keep", "write", "save_state"], "saving"),
        ):
            for method in methods:
                stack.enter_context(phases.wrap(owner, method, name))
        stack.enter_context(mock.patch.object(train, "Trainer", Watched))
        status = train.run(args)
        phases.charge()
        if status:
            raise RuntimeError(f"train.py ended with {status}")
        what, peak = common.peak_memory(device)
        trainer, images = trainers[0], len(trainers[0].subject.training_prompts) * args.images_per_prompt
        counts = {"negatives": len(trainer.drawn_context), "training": phases.calls["training"]}
        counts |= {"validation": images * phases.calls["validation"]}
        seconds = {name: phases.seconds[name] for name in PHASES}
        settings = {name: getattr(args, name) for name in flags.DEFAULTS}
        result = {"seconds": seconds, "counts": counts, "peak": peak, "peak_of": what, "settings": settings}
        with memory.visiting(trainer.away, trainer.sd.device):
            each = work(trainer)
        return result | {"flop": {name: count * each[name] for name, count in counts.items()}}


def work(trainer: train.Trainer) -> dict[str, int]:
    """FLOP of one negative, one training step and one validation picture, as torch counts them (2 a multiply-add)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(call) -> int:
        # The counter may not know the CPU's fused attention, but it knows products of matrices.
        plain = sdpa_kernel(SDPBackend.MATH) if trainer.sd.device.type == "cpu" else contextlib.nullcontext()
        with FlopCounterMode(display=False) as counter, plain:
            call()
        return counter.get_total_flops()

    prompt = trainer.subject.training_prompts[:1]
    image = trainer.photos[:1]
    draw = count(lambda: trainer.draw(prompt, 0, "counting"))
    score = count(lambda: trainer.reward.alignments(image, prompt))
    encode = count(lambda: trainer.sd.encode_images(image))
    step = count(lambda: trainer.step(1))
    return {"negatives": draw + score + encode, "training": step, "validation": draw + score}


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
