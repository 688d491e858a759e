"""benchmarks/ on a tiny random base: both sides do the same job, what is counted is right, every command runs."""

import mmap
import os
import time

import pytest
import torch
from PIL import Image
from tiny import call, error_line

from benchmarks import common, dreambooth_peer, full_size, memory, phases, release, run
from model.align import ALIGN
from model.tokenizer import BertTokenizer
from reward import Reward
from subject import load_photos, load_subject

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dog(world):
    return load_subject(world / "dog")


@pytest.fixture(scope="module")
def pair(measured):
    return common.Pair(measured, CPU)


def watch(calls, **modules):
    """Let each module append its name and its first input to `calls`."""
    for name, module in modules.items():
        module.register_forward_hook(lambda _, inputs, __, name=name: calls.append((name, inputs[0])))


JOBS = {
    "unet": lambda pair, measured: run.unet_rows(pair, 1, 8, 1),
    "drawing": lambda pair, measured: run.drawing_rows(pair, 1, 2, 16, 1),
    "training": lambda pair, measured: run.training_rows(pair, measured, [], 1),
    "lora": lambda pair, measured: run.training_rows(pair, measured, ["--lora-rank", "2"], 1),
}


@pytest.mark.parametrize("job", JOBS)
def test_the_same_job_is_timed_in_each_layout_and_another_is_refused(job, pair, measured):
    rows = JOBS[job](pair, measured)
    assert len(rows) == (4 if job == "unet" else 2) == 2 * sum("both channels_last" in row for row in rows)
    ours, theirs = pair.ours.unet, pair.theirs.unet
    assert theirs.conv_in.weight.is_contiguous()  # the layout of the last row
    assert ours.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not ours.conv_in.weight.requires_grad and not any("lora" in name for name, _ in ours.named_modules())
    theirs.conv_out.bias.data += 0.1
    with pytest.raises(ValueError, match="cannot be compared"):
        JOBS[job](pair, measured)
    theirs.conv_out.bias.data -= 0.1


def test_times_alternate_and_the_ratio_is_above_1_where_ours_is_faster():
    calls = []

    def side(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    ours, theirs = common.alternate(side("o", 0.001), side("t", 0.02), 3, CPU)
    assert "".join(calls) == "ot" * 4 and len(ours) == len(theirs) == 3  # the first of each is not counted
    assert common.ratio(ours, theirs) > 1
    assert common.row("x", [1.0, 2.0, 4.0], [3.0, 6.0, 7.0]) == "| x | 1 / 2 / 4 | 3 / 6 / 7 | 3.00 |"
    for other in ([1.0, 2.1], [1.0, torch.nan], [1.0]):
        with pytest.raises(ValueError, match="cannot be compared"):
            common.check_same(torch.tensor([1.0, 2.0]), torch.tensor(other), 0.05, "x")


def test_a_section_of_the_results_is_replaced_and_others_stay(tmp_path):
    path = tmp_path / "RESULTS.md"
    for command, text in (("a", "first"), ("b", "other"), ("a", "second")):
        report = common.Report(command, CPU)
        report(text)
        report.write(path)
    text = path.read_text(encoding="utf-8")
    assert text.count("## a: ") == text.count("## b: ") == 1 and text.startswith("# ")
    assert "first" not in text and "second" in text and "other" in text


def test_the_peak_of_memory_counts_from_its_reset_and_a_killed_process_is_out_of_memory():
    def use(size):
        with mmap.mmap(-1, size) as memory:  # the allocator might have kept freed memory
            memory[::4096] = bytes(len(range(0, size, 4096)))

    use(size := 200_000_000)
    before = common.peak()
    common.reset_peak(CPU)
    low = common.peak()
    use(size // 2)
    assert low < before - 0.9 * size and 0.4 * size < common.peak_memory(CPU)[1] - low < 0.9 * size
    with pytest.raises(MemoryError, match="_exit was killed"):
        common.in_new_process(os._exit, 9)


@pytest.mark.parametrize("part", full_size.PARTS)
def test_full_size_loads_and_runs_each_part_as_the_libraries_do(part, measured):
    (ours, _), (theirs, _) = (full_size.run(part, measured / part, mine, 8) for mine in (True, False))
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)


def test_a_phase_within_a_phase_counts_once():
    clock = phases.Phases(CPU, "load")
    with clock("validation"):
        time.sleep(0.1)
        with clock("saving"):
            time.sleep(0.01)
        time.sleep(0.1)
    assert clock.seconds["validation"] >= 0.2 > clock.seconds["saving"] >= 0.01 and clock.open == ["load"]


def test_a_whole_run_by_phase(measured, dog, tmp_path):
    argv = ["--steps", "3", "--validate-every", "2", "--images-per-prompt", "1", "--solver-steps", "2"]
    result = phases.whole(measured, "cpu", argv, 1, dog.folder, tmp_path / "run.safetensors")
    assert result["counts"] == {"negatives": 8, "training": 3, "validation": 3 * 8}
    assert all(result["seconds"][name] > 0 for name in phases.PHASES) and result["peak"] > 1e7
    flop = {name: result["flop"][name] / count for name, count in result["counts"].items()}
    assert flop["negatives"] > flop["validation"] > 0  # a negative is encoded too
    assert 1.5 < flop["training"] / flop["validation"] < 4  # (3 + 1) x 2 forward passes; 2 x 2, and the decoding
    *_, training, validation, _, _, _ = phases.whole_rows(result | {"flop": {"training": 4e9}}, 1e9)
    assert f"| {4 / result['seconds']['training']:.0%} |" in training and validation.endswith("|  |  |")


def test_the_release_draws_one_by_one_encodes_again_and_scores_as_we_do(measured, dog, tmp_path):
    job = release.Release(measured, dog, tmp_path, {"lr": 1e-3, "batch": 2, "guidance": 3.0}, CPU)
    job.load()
    job.load_align()
    calls, pipe = [], job.pipe
    vae = {"encode": pipe.vae.encoder, "decode": pipe.vae.decoder}
    watch(calls, **vae, text=pipe.text_encoder, unet=pipe.unet, base=job.base_unet)
    drawn = [("text", 1), ("text", 1), *[("unet", 2)] * 50, ("decode", 1)]  # DDIM asks once a step, with guidance
    step = [("encode", 4), ("text", 4), ("base", 4), ("unet", 4)]
    for work, expected in ((lambda: job.negative(dog.training_prompts[0]), drawn), (job.step, step), (job.step, step)):
        calls.clear()
        work()
        assert [(name, len(given)) for name, given in calls] == expected
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and Image.open(tmp_path / "0.jpg").format == "JPEG"
    assert not torch.equal(job.unet.conv_in.weight, job.base_unet.conv_in.weight)
    photos, folder = load_photos(dog, 16), measured / "reward"
    reward = Reward(ALIGN.from_pretrained(folder), BertTokenizer.from_pretrained(folder), photos, "@")
    expected = reward(photos[:1], ["a [V] dog"], 0.3).item()  # "@" is not in the text, so its token stays, as theirs
    assert job.score(photos[0], "a [V] dog") == pytest.approx(expected, abs=1e-4)


def test_totals_of_the_release_and_of_ours():
    same, released = release.both_jobs(400)
    assert same == release.job(8, 4, 4, 400, 11)  # train.py validates the steps 0, 40, ..., 400
    assert released == release.job(8, 4, 16, 400, 10) and [each["save"] for each in release.both_jobs(60)] == [3, 1]
    assert same["negative"] == 32 and same["validation picture"] == 352 and same["load ALIGN, embed the photos"] == 12
    seconds = {"load": 1.0, "negatives": 10.0, "training": 4.0, "validation": 6.0, "saving": 2.0, "rest": 1.0}
    short = {"seconds": seconds, "counts": {"negatives": 32, "training": 8, "validation": 64}}
    assert release.ours(short, same) == pytest.approx(1 + 10 + 4 * 50 + (6 + 2) * 5.5 + 1)
    whole = {"seconds": seconds, "counts": {"negatives": 32, "training": 400, "validation": 352}}
    lines, other = [], 2 * sum(same.values())
    release.table(lines.append, {name: [1.0, 3.0] for name in same}, same, same | {"negative": 128}, whole)
    assert f"| **ratio** | | | **{other / 24:.1f}** | **{(other + 2 * 96) / 24:.1f}** |" in lines


def test_the_recipe_learns_photos_and_keeps_the_class(measured, dog):
    settings = {"batch": 2, "class_images": 9, "guidance": 3.0, "solver_steps": 2, "lr": 1e-3}
    recipe, calls = dreambooth_peer.Recipe(measured, dog, settings, CPU), []
    recipe.draw_class_images(seed=0)
    pipe = recipe.pipe
    watch(calls, encode=pipe.vae.encoder, text=pipe.text_encoder, unet=pipe.unet)
    offset = torch.tensor([0.0, 0.0, 3.0, 3.0]).view(4, 1, 1, 1)  # instead of a prediction
    pipe.unet.register_forward_hook(lambda _, __, output: type(output)(sample=offset.expand_as(output.sample)))
    loss = recipe.loss().item()
    (_, pixels), (_, ids), (_, x_t) = calls
    photos, drawn = map(pipe.image_processor.preprocess, (load_photos(dog, 16), recipe.drawn))
    for picture, among in zip(pixels, (photos, photos, drawn, drawn), strict=True):
        assert any(torch.equal(picture, one) for one in among)
    prompts = ["a photo of [V] dog"] * 2 + ["a photo of a dog"] * 2
    expected = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, expected) and len(recipe.drawn) == 9 and len(x_t) == 4
    assert loss == pytest.approx(1 + 1.0 * (1 + 3**2), rel=0.15)  # ε has variance 1; 2 x 256 numbers of each


def test_two_standard_errors_decide():
    rows = {"ours": [(0.50, 0.50, 0.1), (0.52, 0.51, 0.1)], "diffusers": [(0.51, 0.60, 0.1), (0.53, 0.61, 0.1)]}
    names, lines = dreambooth_peer.NAMES, []
    scores = {side: [dict(zip(names, row, strict=True)) for row in rows[side]] for side in rows}
    dreambooth_peer.quality_table(lines.append, scores)
    assert lines[-2].startswith("| diffusers | 0.520 ± 0.014 | 0.605 ± 0.007 |")
    assert lines[-1].endswith("? | yes | **no** | yes |")


def test_the_memory_of_a_step_is_measured_for_modes_that_fit(measured):
    argv = ["--batch", "1", "--images-per-prompt", "1"]
    lora, full = (memory.measure([*mode, *argv], measured, 16, CPU, "fp32", 1) for mode in (["--lora-rank", "16"], []))
    assert 0 < lora[0] < full[0] and lora[2] == full[2] == 0 and min(lora[1], full[1]) >= 0
    assert "| left out: 0.0 GB are free | at most 10 |" in memory.row("lora", measured, 16, CPU, "fp32", room=1000)


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        (run, "--quick --size toy --only unet whole", ["U-Net forward + backward, 8 x 16x16", "| saving |"]),
        (run, "--quick --size sd15 --only whole", ["is left out: on a CPU it would take days"]),
        (release, "--quick", ["| **ratio** |", "| training step |", "negative from 1 of 32"]),
        (memory, "--side 16 --modes lora", ["| estimated GB |", "| lora: `--lora-rank 16` | 0.0 M |"]),
        (dreambooth_peer, "--quick --threads 1 --seeds 3", ["| ours |", "| diffusers |", "| all but validation |"]),
    ],
)
def test_the_command_prints_and_writes_its_tables(module, flags, expected, measured, tmp_path, monkeypatch, capsys):
    written = tmp_path / "RESULTS.md"
    assert call(module, monkeypatch, *flags.split(), "--base", measured, "--device", "cpu", "--write", written) == 0
    printed, written = capsys.readouterr().out, written.read_text(encoding="utf-8")
    assert all(text in printed and text in written for text in expected)


def test_what_cannot_be_measured_is_one_line(monkeypatch, capsys):
    assert call(memory, monkeypatch, "--side", 100) == 2 and error_line(capsys)
