"""ranks.py: several processes give what one gives, end together, and only the first writes.

The processes are real ones on the CPU, with gloo. But for the last two tests they are forked from a server that has
imported torch, which is faster than torchrun; the environment variables are torchrun's.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tiny import call, files_in, write_ckpt, write_photos
from trainings import QUICK, history

import evaluate
import train
from baselines.dpg import DPG
from model.files.tensors import read_metadata
from support import flags, ranks

QUICK = (*QUICK, "--device", "cpu")
SLOW = 300  # seconds: more than any test needs on a busy machine


def process(work, folder, variables):
    """What each process does: `work` as torchrun would start it, its streams in files."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name + variables["RANK"], os.O_CREAT | os.O_WRONLY), stream)
    status = ranks.distributed(work)
    sys.stdout.flush()
    sys.exit(status)


@pytest.fixture
def start(tmp_path):
    """Run `work` in several processes in an empty folder: their exit statuses. They print to out0, err0, out1, ..."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["torch", "train", "evaluate"])
    (tmp_path / "here").mkdir()

    def go(work, world_size=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        processes = []
        for rank in map(str, range(world_size)):
            variables = where | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world_size)}
            processes.append(fork.Process(target=process, args=(work, tmp_path / "here", variables)))
            processes[-1].start()
        end = time.time() + SLOW
        for each in processes:
            each.join(max(0, end - time.time()))
            each.kill()
            each.join()
        return [each.exitcode for each in processes]

    return go


def text(folder, name):
    return [(folder / f"{name}{rank}").read_text() for rank in (0, 1)]


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_parts_cover_everything_once(monkeypatch, world_size):
    for n in range(1, 20):
        parts, weights = [], []
        for rank in range(world_size):
            as_rank(monkeypatch, rank, world_size)
            parts.append(list(range(n))[ranks.part(n)])
            pairs, weight = ranks.weighted_part(n)
            assert list(range(n))[pairs] == (parts[-1] or [0])  # never empty: a loss of no pairs would be NaN
            weights.append(weight)
        assert [i for part in parts for i in part] == list(range(n)) and sum(weights) == pytest.approx(1)
        assert weights == [len(part) / n for part in parts] and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_process_has_its_own_gpu(monkeypatch):
    as_rank(monkeypatch, 9, 12)  # of all machines; here it is the second of two
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (ranks.local_device("cuda"), ranks.local_device("cpu")) == ("cuda:1", "cpu")
    with pytest.raises(ValueError, match="--device cuda:0 is one device for 12 processes: give cpu or cuda"):
        flags.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc_per_node=1"):
        flags.device("cuda")


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    for size in (None, "1", "4"):  # without torchrun, with --nproc_per_node=1, and on a cluster image without RANK
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert ranks.distributed(lambda: 7) == 7


def test_variables_without_a_launcher_are_one_line(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert ranks.distributed(lambda: 7) == 2
    waiting, line = capsys.readouterr().err.splitlines()
    assert waiting == "waiting for 2 processes" and "start with torchrun" in line and "MASTER_ADDR" in line


RUNS = {  # name: method, options
    "uneven": (train.RPO, ("--batch", 3)),
    "fewer": (train.RPO, ("--batch", 1, "--images-per-prompt", 1, "--lora-rank", 2)),  # pairs than processes
    "critic": (DPG, ("--batch", 3, "--class-images", 1, "--train-text-encoder")),  # class images than processes
}


def trains(world, method, *options, before_step=lambda self, step: None):
    """train.py with this method; before each step `before_step`. How many pictures are decoded goes to drawn0, ..."""

    class Noted(method):
        def __init__(self, run, reward):
            super().__init__(run, reward)
            run.sd.vae.decoder.register_forward_pre_hook(self.note)

        def note(self, layer, inputs):
            with open(f"drawn{ranks.rank()}", "a", encoding="utf-8") as file:
                file.write(f"{len(inputs[0])} ")

        def batch(self, step):
            before_step(self, step)
            return super().batch(step)

    Noted.__name__ = method.__name__
    sys.argv = ["train.py", *map(str, ("--subject", world / "dog", "--base", world / "base", *QUICK, *options))]
    return train.main(Noted)


def all_runs(world):
    for name, (method, options) in RUNS.items():
        assert trains(world, method, *options, "--ckpt", f"{name}.safetensors") == 0


def test_two_processes_give_what_one_gives(start, world, tmp_path, monkeypatch):
    """Rounding differs: sums are taken in another order. The steps of AdamW, of the size of lr, amplify it."""
    here, alone = tmp_path / "here", tmp_path / "alone"
    assert start(partial(all_runs, world)) == [0, 0], text(here, "err")
    alone.mkdir()
    monkeypatch.chdir(alone)
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored at the end
    all_runs(world)
    for name in RUNS:
        ckpt = f"{name}.safetensors"
        for ours, theirs in zip(history(alone, f"{name}.jsonl"), history(here, f"{name}.jsonl"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), name
        assert read_metadata(alone / ckpt)["step"] == read_metadata(here / ckpt)["step"]
        weights, others = load_file(alone / ckpt), load_file(here / ckpt)
        assert weights.keys() == others.keys()
        worst = max((weights[key] - others[key]).abs().max().item() for key in weights)
        assert worst < 1e-4, name  # 4 steps of lr 1e-3 move a weight by up to 4e-3
    names = [f"{name}.{end}" for name in RUNS for end in ("jsonl", "png", "safetensors")]
    assert files_in(here) == sorted([*names, "drawn0", "drawn1", "err0", "err1", "out0", "out1"])
    drawn = [[int(count) for count in each.split()] for each in text(here, "drawn")]
    # Halves of 16 (negatives, 3 validations), of 8, and of one class image and 16.
    assert drawn == [[8] * 4 + [4] * 4 + [8] * 3, [8] * 4 + [4] * 4 + [1] + [8] * 3]
    (out, other), (err, silent) = text(here, "out"), text(here, "err")
    assert out.count("kept step") == 3 and "training" in err and other == silent == ""


def fill_memory(self, step):
    if step == 3 and ranks.rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_error_in_one_process_ends_all(start, world, tmp_path):
    """torchrun, unlike this test, ends the first process before it prints what has happened to the second."""
    assert start(partial(trains, world, train.RPO, "--batch", 4, before_step=fill_memory)) == [2, 2]
    here = tmp_path / "here"
    for err, words in zip(
        text(here, "err"), ("another process of this run has ended", "a smaller --batch"), strict=True
    ):
        assert [words in line for line in err.splitlines() if "error: " in line] == [True] and "Traceback" not in err
    files = [name for name in files_in(here) if name.startswith("best")]
    assert files == ["best.jsonl", "best.png", "best.safetensors", "best.state.pt"]
    assert read_metadata(here / "best.safetensors")["step"] == "2"


def evaluates_twice(arguments):
    sys.argv = ["evaluate.py", *map(str, arguments)]
    return max(evaluate.main(), evaluate.main())


def test_subjects_are_shared_out(start, measured, tmp_path, monkeypatch):
    for name, noun in {"cat2": "cat", "dog": "dog", "duck_toy": "toy"}.items():
        write_photos(tmp_path / "dataset" / name)
        if name != "dog":  # the first that the second process has to do
            for runs in ("one", "two"):
                write_ckpt(measured, tmp_path / runs / name / "best.safetensors", noun=noun, live=str(noun == "cat"))
    options = ("--dreambench", tmp_path / "dataset", "--steps", 1, "--n", 1, "--device", "cpu", "--ckpt")
    one, two = ((*options, tmp_path / runs / "{subject}" / "best.safetensors") for runs in ("one", "two"))
    assert start(partial(evaluates_twice, two)) == [1, 1]
    assert call(evaluate, monkeypatch, *one) == 1
    one, two = (json.loads((tmp_path / runs / "dreambench/best.eval.json").read_text()) for runs in ("one", "two"))
    assert one["subjects"] == two["subjects"] and list(one["subjects"]) == list(two["subjects"])
    assert one["means"] == two["means"] and list(one["failed"]) == list(two["failed"]) == ["dog"]
    (out, other), (err, errors) = text(tmp_path / "here", "out"), text(tmp_path / "here", "err")
    assert other == "" and out.count("| all 2 |") == 2 and "duck_toy: done before" in out
    assert errors.count("dog: error: ") == 2 and "error" not in err


def torchrun(folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command += map(str, arguments)
    return subprocess.Popen(command, cwd=folder, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_interrupted_torchrun_keeps_the_best_and_leaves_no_process(world, tmp_path, monkeypatch):
    common = ("--subject", world / "dog", "--base", world / "base", *QUICK)
    running = torchrun(tmp_path, *common, "--steps", 10**6)
    end = time.time() + SLOW
    while not (tmp_path / "best.safetensors").exists() and running.poll() is None and time.time() < end:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=SLOW)  # returns when no process holds these pipes
    assert err.count("interrupted: kept step ") == 1 and "--resume continues after step" in err
    assert "train.py: error" not in err and "KeyboardInterrupt" not in err
    assert files_in(tmp_path) == ["best.jsonl", "best.png", "best.safetensors", "best.state.pt"]
    monkeypatch.chdir(tmp_path)  # one process continues where two were interrupted
    done = torch.load("best.state.pt")["step"]
    assert call(train, monkeypatch, *common, "--resume", "--steps", done + 1) == 0
    assert [row["step"] for row in history(tmp_path)][-3:] == [done, done + 1, done + 1]
    assert files_in(tmp_path) == ["best.jsonl", "best.png", "best.safetensors"]


def test_torchrun_prints_an_error_of_all_once(world, tmp_path):
    """Its own exit status is 1; it adds a report of which process failed first."""
    running = torchrun(tmp_path, "--subject", world / "dog", "--beta", 0)
    out, err = running.communicate(timeout=SLOW)
    assert running.returncode == 1 and out == "" and "exitcode  : 2" in err
    lines = [line for line in err.splitlines() if "error: " in line]
    assert lines == ["train.py: error: argument --beta: '0' should be a number above 0 (see train.py --help)"]
