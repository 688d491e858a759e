"""benchmarks.gpu: each part at tiny size on the CPU. And, without a GPU: a step and the solver never wait for one."""

import json
import time
from collections import Counter

import pytest
import torch
from tiny import call, error_line
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import command, drawing, training
from benchmarks.gpu import job as tools
from benchmarks.gpu.command import markdown, run_part, work
from benchmarks.gpu.job import FAILED, Job
from model.stable_diffusion import StableDiffusion, guided
from reward import Reward
from support import start
from support.flags import EMBEDDED_BASE
from support.machine import Machine, Optimizer
from train import RPO

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job with a base model, which a process of its own has made."""
    folder = tmp_path_factory.mktemp("gpu")
    job = Job(folder / "base", "tiny", CPU, time.time() + 600, folder / "rows.jsonl")
    run_part("base", job)
    return job


def rows_of(job, table=None):
    rows = [json.loads(line) for line in job.rows.read_text().splitlines()]
    return [row for row in rows if table in (None, row["table"])]


# ------------------------------------------------------------------------------------------------------ every part runs

TABLES = {  # of each part, and how many rows
    "parity": {"Parity with fp32 on the CPU": 2 * 2 * (8 + 6)},
    "whole": {"A whole run of the whole U-Net": 10, "A whole run of LoRA 16": 10},
    "step": {"A training step": 7},
    "passes": {"A U-Net pass": 8},
    "drawing": {"Drawing, 2 steps": 2, "Kernels": 2, "The longest kernels": 16},
    "graphs": {"Graphs and compilation": 4},
    "release": {"The release's shape": 6},
}


def test_the_base_is_made_in_a_process_of_its_own(job):
    assert [row["network"] for row in rows_of(job, "The base of random weights")] == [*tools.NETWORKS]
    assert all(row["value"] > 0 for row in rows_of(job, "The machine"))
    assert [row["part"] for row in rows_of(job, "Time of the parts")] == ["base"] and not rows_of(job, FAILED)


@pytest.mark.parametrize("part", TABLES)
def test_a_part_fills_its_tables(part, job, tmp_path):
    job = job._replace(rows=tmp_path / "rows.jsonl")
    work(part, job)
    assert Counter(row["table"] for row in rows_of(job)) == TABLES[part]
    for row in rows_of(job):
        assert all(value >= 0 for value in row.values() if isinstance(value, float))
    text = markdown(rows_of(job))
    assert all(f"\n## {table}\n" in text for table in TABLES[part])
    if part == "parity":
        same = [row for row in rows_of(job) if row["precision"] == "fp32"]
        assert all(row["relative"] < 1e-5 for row in same)
        assert all(0 < row["relative"] < 0.1 for row in rows_of(job) if row["precision"] == "bf16")
    if part == "whole":
        *phases, total = rows_of(job, "A whole run of LoRA 16")
        assert {row["phase"]: row["times"] for row in phases}["step (median)"] == 400
        assert total["default run, s"] == pytest.approx(sum(row["s"] * row["times"] for row in phases))


def test_what_fails_leaves_its_traceback_and_the_next_goes_on(job, tmp_path, capsys):
    job = job._replace(rows=tmp_path / "rows.jsonl", base=tmp_path / "nothing")
    work("drawing", job)
    job.measure("no time", lambda job: None)
    job._replace(until=0).measure("too late", lambda job: None)
    failed, late = rows_of(job)
    assert failed["table"] == late["table"] == FAILED and late["what"] == "too late"
    assert failed["what"] == "drawing" and "Traceback" in failed["traceback"] and "nothing" in failed["traceback"]
    assert f"drawing:\n```\n{failed['traceback'].strip()}\n```" in markdown(rows_of(job))


def test_a_part_is_stopped_when_its_time_is_over(job, tmp_path):
    job = job._replace(rows=tmp_path / "rows.jsonl", until=time.time() + 1.1)
    begin = time.time()
    run_part("parity", job)
    assert time.time() - begin < 5
    run_part("whole", job)
    *parity, whole = rows_of(job, FAILED)  # a slow machine stops parity before its first row, a fast one after some
    assert whole["what"] == "whole" and whole["traceback"] == "no time was left"
    assert parity and {row["traceback"] for row in parity} <= {"stopped when its time was over", "no time was left"}


def test_the_command_stops_in_time_and_brings_files_in_pieces(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "PIECE", 2)
    then = "mkdir weights; printf 12345 > weights/x; printf $SECONDS_LEFT > left; sleep 60"
    flags = ["--size", "tiny", "--device", "cpu", "--minutes", "0.02", "--parts", "base", "drawing", "--out", "out"]
    begin = time.time()
    assert call(command, monkeypatch, *flags, "--then", then, "--bring", "weights/x", "missing") == 1
    assert time.time() - begin < 10
    assert (tmp_path / "left").read_text() == "1"
    pieces = sorted((tmp_path / "out").glob("weights-x.*"))
    assert [piece.name for piece in pieces] == ["weights-x.00", "weights-x.01", "weights-x.02"]
    assert b"".join(piece.read_bytes() for piece in pieces) == b"12345"
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["what"] for row in rows if row["table"] == FAILED] == ["base", "drawing"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert text in capsys.readouterr().out and "stopped when the time was over" in text
    capsys.readouterr()
    assert call(command, monkeypatch, "--device", "cuda:99") == 2 and error_line(capsys)


def test_the_names_of_kernels_tell_their_kind():
    names = ["pytorch_flash::flash_fwd_kernel<...>", "multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>"]
    names += ["at::native::RowwiseMomentsCUDAKernel<float>", "Memcpy HtoD (Pinned -> Device)"]
    names += ["sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "vectorized_elementwise_kernel<4, silu_kernel>"]
    kinds = ["attention", "AdamW, clipping", "norms", "copies, casts, layouts", "products, convolutions"]
    assert [drawing.kind_of(name) for name in names] == [*kinds, "element by element"]
    assert {*kinds, "element by element"} == {*drawing.KINDS}


# ----------------------------------------------------------------------------- without a GPU: neither waits nor mix-ups


class Accelerator(TorchDispatchMode):
    """The meta device in the place of a GPU: to read one of its numbers raises an error, as no number is there.

    Operations with tensors of two devices raise here. `waits`: copies between devices for which the host would wait.
    """

    copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __init__(self):
        super().__init__()
        self.waits, self.operations = [], 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options, self.operations = options or {}, self.operations + 1
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        result = operation(*arguments, **options)
        if operation in self.copies:
            waits = not (options.get("non_blocking") or (len(arguments) > 2 and arguments[2]))
            if waits and len({tensor.device for tensor in (*tensors, result)}) > 1:
                self.waits.append(tuple(tensors[-1].shape))
        elif len({tensor.device for tensor in tensors if tensor.ndim}) > 1:
            raise RuntimeError(f"{operation} on {[str(tensor.device) for tensor in tensors]}")
        return result


class Reads(TorchFunctionMode):
    """Notes the methods that bring a tensor's numbers to Python, for which the host waits on a GPU."""

    methods = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if (name := getattr(function, "__name__", "")) in self.methods:
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.fixture(scope="module")
def on_meta(job):
    """A run of train.py on the CPU, ready for its first step, and the same on the meta device."""

    def both(*flags):
        with start.prepared(tools.arguments(job, *flags), RPO) as run:
            method = RPO(run, Reward(run.align, run.bert, run.photos))
            method.prepare()
            base = StableDiffusion.from_pretrained(job.base)
            sd = StableDiffusion(base.unet, base.vae, base.text_encoder, base.tokenizer, base.scheduler, META)
            modes = {"lora_rank": 2} if "--lora-rank" in flags else {}
            machine = Machine(sd, checkpoint_gradients="--checkpoint-gradients" in flags, **modes)
            optimizer = Optimizer(machine, 1e-5, 0.01, 1.0)
            there = RPO(run._replace(sd=sd, machine=machine, optimizer=optimizer), method.reward)
        return method, there

    return both


@pytest.mark.parametrize("flags", [(), ("--lora-rank", "2"), ("--checkpoint-gradients",)])
def test_between_loss_and_step_the_host_reads_nothing(flags, on_meta):
    with Accelerator() as gpu:
        torch.ones(3).to(META)
    assert gpu.waits == [(3,)]  # what it is to find
    here, there = on_meta(*flags)
    with Accelerator() as gpu:
        for step in range(2):
            batch = there.machine.place(here.batch(step))
            there.optimizer.minimize(there.loss(batch).total)
    assert gpu.operations > 1000 and not any(p.grad is not None for p in there.machine.parameters)
    assert gpu.waits == []


def test_a_step_brings_its_numbers_to_the_host_at_once(on_meta):
    here, _ = on_meta()
    batch = here.machine.place(here.batch(1))
    loss = here.loss(batch)
    norm = here.optimizer.minimize(loss.total)
    with Reads() as reads:
        here.record.step(1, loss, gradient_norm=norm, label=batch.label, p=batch.p)
    assert reads.found == ["tolist"]


@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
def test_the_solver_starts_all_of_its_steps_without_waiting(sampler, on_meta):
    _, there = on_meta()
    latents, context = torch.empty(2, 4, 8, 8, device=META), torch.empty(2, 77, 32, device=META)
    with Accelerator() as gpu:
        for unet in (there.theta, there.theta_0):
            denoise = guided(unet, context, context[0], 7.5)
            with torch.no_grad():
                x_0 = there.sd.scheduler.sample(denoise, latents, 5, sampler)
    assert x_0.shape == latents.shape and gpu.operations > 1000
    assert gpu.waits == []


def test_no_network_mixes_devices():
    for _, network, method, inputs in training.cases(EMBEDDED_BASE):
        network.to(META)
        with Accelerator() as gpu, torch.no_grad():
            getattr(network, method)(*(each.to(META, non_blocking=True) for each in inputs))
        assert gpu.operations > 10 and not gpu.waits
