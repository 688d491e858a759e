"""toy/bench.py: what counts as done, and the tables."""

import argparse
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import call, error_line, write_base, write_metrics

import train
from toy import bench as module
from toy.bench import CHOICES, GROUPS, LOGGED, METHODS, SCORES, SELECTED, VALIDATED, Bench, Watched, reserved

DOCS = Path(__file__).parent.parent / "docs" / "bench"


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, steps=400, images=4)


def note(bench, variant, subject, seed, score, choice="", step=40):
    scores = dict.fromkeys((*VALIDATED, *SCORES), score) | dict.fromkeys(LOGGED.values(), 0.5)
    bench.note(variant=variant, choice=choice, subject=subject, seed=seed, step=step, seconds=1.5, **scores)


def test_results_of_other_weights_steps_or_images_do_not_count(bench, tmp_path):
    note(bench, "RPO", "dog-2", 0, 0.5)
    assert len(bench.rows(variant="RPO", subject="dog-2", seed=0)) == 1 and not bench.rows(variant="RPO", seed=1)
    assert not Bench(tmp_path, steps=120, images=4).rows() and not Bench(tmp_path, steps=400, images=1).rows()
    bench.made_with |= {"weights": "others"}
    assert not bench.rows()
    note(bench, "RPO", "dog-2", 0, 0.7)  # another process with other weights
    assert [row["DINO"] for row in Bench(tmp_path, steps=400, images=4).rows()] == [0.5]


def test_a_torn_line_does_not_count_and_stays_alone(bench):
    note(bench, "RPO", "dog-2", 0, 0.5)
    with bench.path.open("ab") as file:
        file.write('{"variant": "β'.encode()[:-1])  # killed within a letter
    assert [row["variant"] for row in bench.rows()] == ["RPO"]
    bench.tables()
    note(bench, "DreamBooth", "dog-2", 0, 0.5)
    assert [row["variant"] for row in bench.rows()] == ["RPO", "DreamBooth"]
    assert bench.path.read_bytes().count(b"\n") == 3


def test_the_tables_in_docs_are_those_of_the_results_there(bench):
    tables = (DOCS / "tables.md").read_text(encoding="utf-8")
    head = r"Base weights (\w+), (\d+) steps, (\d+) images a prompt, (\w+)\."
    weights, steps, images, precision = re.match(head, tables).groups()
    bench.made_with = {"weights": weights, "steps": int(steps), "images": int(images), "precision": precision}
    shutil.copyfile(DOCS / "results.jsonl", bench.path)
    bench.tables()
    assert (bench.out / "tables.md").read_text(encoding="utf-8") == tables


def test_a_table_compares_run_by_run(bench):
    for seed, (rpo, other) in enumerate([(0.5, 0.6), (0.7, 0.9), (0.1, 0.5)]):
        note(bench, "RPO", "dog-2", seed, rpo)
        note(bench, "DreamBooth", "dog-2", seed, other)
    note(bench, "RPO", "cat-0", 0, 100.0)  # DreamBooth has no such run: it must not count
    title, _, _, first, second, _ = bench.table("Methods", [("RPO", ""), ("DreamBooth", ""), ("unknown", "")])
    assert "3 runs each: dog-2" in title
    columns = len(VALIDATED) + len(SCORES)
    assert first == "| RPO | " + " | ".join(["0.433 ± 0.306"] * columns) + " | 40 | 2 |"
    # differences 0.1, 0.2, 0.4: mean 0.2333, standard deviation 0.15275, over √3
    assert second == "| DreamBooth | " + " | ".join(["0.667 ± 0.208 (+0.233 ± 0.088)"] * columns) + " | 40 | 2 |"


def test_no_table_of_one_variant_or_of_no_common_run(bench):
    note(bench, "RPO", "dog-2", 0, 0.5)
    assert not list(bench.table("Methods", [("RPO", ""), ("DreamBooth", "")]))
    note(bench, "DreamBooth", "dog-2", 1, 0.5)
    line = "**Methods**: no subject and seed has a run of each of these.\n"
    assert list(bench.table("Methods", [("RPO", ""), ("DreamBooth", "")])) == [line]


@pytest.mark.parametrize("title, group", [("The label's coin", "coin"), ("β and τ", "beta_tau")])
def test_a_table_without_what_it_compares_with_says_so(bench, title, group):
    """And does not compare with the next one instead."""
    note(bench, "base", "dog-2", 0, 0.5)
    for variant in GROUPS[group]:
        for choice in ("", *SELECTED.get(variant, {})):
            note(bench, variant, "dog-2", 0, 0.5, choice)
    bench.tables()
    tables = (bench.out / "tables.md").read_text(encoding="utf-8")
    titles = [line for line in tables.splitlines() if line.startswith("**")]
    assert titles == [f"**{title}**: run `--only rpo` too, with which these are compared."]


def test_one_run_has_no_spread(bench):
    note(bench, "RPO", "dog-2", 0, 0.5)
    note(bench, "DreamBooth", "dog-2", 0, 0.25)
    title, _, _, first, second, _ = bench.table("Methods", [("RPO", ""), ("DreamBooth", "")])
    assert "one run each: dog-2" in title and "±" not in first + second
    assert "| 0.500 |" in first and "| 0.250 (-0.250) |" in second


def test_the_dog_of_the_learning_rate_is_in_no_comparison(bench):
    variants = [("base", ""), *((name, "") for name in GROUPS["loss"] | METHODS), *(("RPO", name) for name in CHOICES)]
    for variant, choice in variants:
        note(bench, variant, "dog-2", 0, 0.5, choice)
        note(bench, variant, "cat-0", 1, 0.5, choice)
        note(bench, variant, "dog-1", 0, 0.25, choice)
    for variant in GROUPS["lr"]:
        note(bench, variant, "dog-3", 0, 0.125)
    bench.tables()
    tables = (bench.out / "tables.md").read_text(encoding="utf-8")
    weights, precision = bench.made_with["weights"], bench.made_with["precision"]
    assert tables.startswith(f"Base weights {weights}, 400 steps, 4 images a prompt, {precision}.\n\n")
    titles = [line for line in tables.splitlines() if line.startswith("**")]
    assert titles.pop(0) == "**RPO and the base, data/dog** (one run each: dog-1)"
    assert titles.pop() == "**Learning rates** (one run each: dog-3)"
    assert len(titles) == 4 and all(title.endswith("** (2 runs each: cat-0, dog-2)") for title in titles)
    assert "| RPO | 2 |" in tables  # of labels and margins


def test_the_figures_are_of_the_first_run_whose_lambdas_kept_different_steps(bench):
    bench.figures([("dog-2", 0)])  # of nothing: none
    assert not list(bench.out.glob("*.png"))
    lambdas, colours = list(CHOICES)[:3], {}
    runs = {("dog-2", 0): (40, 80, 80), ("dog-2", 1): (40, 80, 120), ("cat-0", 0): (80, 120, 160)}
    for index, ((subject, seed), steps) in enumerate(runs.items()):
        (bench.out / "photos" / subject).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 128)).save(bench.out / "photos" / subject / "00.png")
        kept = {("base", ""): 0, ("RPO", ""): 40, ("DreamBooth", ""): 400, ("similarity only", ""): 360}
        kept |= {("RPO", choice): step for choice, step in zip(lambdas, steps, strict=True)}
        for i, ((variant, choice), step) in enumerate(kept.items()):
            note(bench, variant, subject, seed, 0.5, choice, step)
            name = f"{variant} {choice}".strip()
            colours[subject, seed, name] = (80 * index, 30 * i, 255)
            Image.new("RGB", (768, 128), colours[subject, seed, name]).save(bench.figure_row(subject, seed, name))

    def rows(file):
        page = Image.open(bench.out / file).convert("RGB")
        return [page.getpixel((500, y)) for y in range(192, page.height, 128)]

    def expected(subject, seed, *names):
        return [colours[subject, seed, name] for name in names]

    methods, lambda_val = ("base", "RPO", "DreamBooth", "similarity only"), ("base", *(f"RPO {c}" for c in lambdas))
    bench.figures(list(runs))
    assert rows("methods.png") == expected("dog-2", 1, *methods)
    assert rows("lambda_val.png") == expected("dog-2", 1, *lambda_val)
    bench.figure_row("dog-2", 1, lambda_val[-1]).unlink()
    bench.figures(list(runs))
    assert rows("lambda_val.png") == expected("cat-0", 0, *lambda_val)
    bench.figures(list(runs)[:2])  # in neither
    assert rows("lambda_val.png") == expected("dog-2", 0, *lambda_val)


def test_a_label_says_which_step_was_kept(bench, monkeypatch):
    written = []
    monkeypatch.setattr(module.ImageDraw.ImageDraw, "text", lambda draw, place, text, **_: written.append(text))
    (bench.out / "photos" / "dog-2").mkdir(parents=True)
    Image.new("RGB", (128, 128)).save(bench.out / "photos" / "dog-2" / "00.png")
    for variant, choice, step in (("base", "", 0), ("RPO", "λ_val 0.5", 120), ("DPG, DINO", "", 400)):
        note(bench, variant, "dog-2", 1, 0.5, choice, step)
        Image.new("RGB", (768, 128)).save(bench.figure_row("dog-2", 1, f"{variant} {choice}".strip()))
    bench.figure("some.png", "dog-2", 1, ["base", "RPO λ_val 0.5", "DPG, DINO", "unknown"])
    labels = ["dog-2\nseed 1\nphotos", "base\nstep 0", "RPO lambda_val 0.5\nstep 120", "DPG\nDINO\nstep 400"]
    assert [text for text in written if "\n" in text] == labels


def test_the_command_draws_the_figures_of_all_its_runs(monkeypatch, tmp_path, capsys):
    drawn = []
    monkeypatch.setattr(Bench, "all", lambda *_: None)
    monkeypatch.setattr(Bench, "figures", lambda bench, runs: drawn.extend(runs))
    call(module, monkeypatch, "--out", tmp_path, "--subjects", "dog-2", "cat-0", "--seeds", 1, 2)
    assert drawn == [("dog-2", 1), ("dog-2", 2), ("cat-0", 1), ("cat-0", 2)]
    assert capsys.readouterr().out.startswith("Base weights")


@pytest.mark.parametrize("flags", [("--images", 0), ("--steps", 0), ("--seeds", 0, -1), ("--out", __file__)])
def test_what_cannot_be_run_is_refused_in_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(Bench, "all", lambda *_: pytest.fail("it ran"))
    assert call(module, monkeypatch, *flags) == 2
    assert flags[0] in error_line(capsys)


def test_the_bases_pictures_are_shared_within_a_seed_and_a_place(monkeypatch):
    drawn = []
    monkeypatch.setattr(Watched, "shared", {})
    monkeypatch.setattr(train.Trainer, "draw", lambda self, _, place, __: drawn.append((self.args.seed, place)))
    for seed, place in ((0, train.NEGATIVES), (0, train.VALIDATION), (1, train.NEGATIVES), (0, train.NEGATIVES)):
        trainer = object.__new__(Watched)
        trainer.args, trainer.spared = SimpleNamespace(seed=seed), 0.0
        trainer.sd, trainer.unet = SimpleNamespace(unet="θ₀"), "θ"
        trainer.draw(["a [V] dog"], place, "drawing")
    assert drawn == [(0, train.NEGATIVES), (0, train.VALIDATION), (1, train.NEGATIVES)]


def test_each_choice_keeps_its_own_validation():
    trainer = object.__new__(Watched)
    pictures = {  # ALIGN-I and ALIGN-T of each
        0: [(1.0, 1.0)],  # the base: best, and never kept
        40: [(0.3, 0.7)],
        80: [(0.6, 0.4)],
        120: [(0.8, 0.3)],
        160: [(0.1, 0.9), (0.7, 0.6)],  # what the arithmetic mean forgives; the harmonic one of the two's means would
        200: [(0.1, 0.1)],
    }
    trainer.scored = {step: tuple(torch.tensor(pairs).T) for step, pairs in pictures.items()}
    kept = {"λ_val 0.3": 40, "λ_val 0.5": 80, "λ_val 0.7": 120, "λ_val 0.3, arithmetic": 160, "no early stopping": 200}
    assert {name: trainer.chosen(choice) for name, choice in CHOICES.items()} == kept
    assert trainer.chosen(SELECTED["similarity only"]["no early stopping"]) == 200


def test_reserved_subjects_are_named():
    assert reserved("stuffed animal-3") == "stuffed animal-3"
    for name in ("dog", "dog-4", "dog--1", "wolf-0", "-0"):
        with pytest.raises(argparse.ArgumentTypeError, match="kind and 0 to 3"):
            reserved(name)


def test_every_variant_is_a_command_line_of_train(monkeypatch):
    for variants in GROUPS.values():
        for options in variants.values():
            train.arguments().parse_args(["--subject", "dog", *options])


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A Bench on a tiny random base, two steps a run."""
    base = write_base(tmp_path / "base")
    write_metrics(base / "metrics", base / "tokenizer")
    settings = {"batch": 2, "guidance": 2.0, "class_images": 4, "solver_steps": 1}
    (base / "rpo.json").write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.setattr(module, "WEIGHTS", base)
    monkeypatch.setattr(module.Watched, "shared", {})
    return Bench(tmp_path / "out", steps=2, images=1)


def test_every_method_is_trained_and_scored_once(tiny, monkeypatch):
    drawn, draw = [], train.Trainer.draw
    monkeypatch.setattr(train.Trainer, "draw", lambda self, p, *rest: drawn.append(len(p)) or draw(self, p, *rest))
    tiny.all(["dog-2"], [0], ["methods"])
    assert [(row["variant"], row["choice"]) for row in tiny.rows()] == [
        *[("base", ""), ("RPO", ""), *(("RPO", choice) for choice in CHOICES)],
        *((name, "") for name in list(METHODS)[1:]),
    ]
    assert {row["step"] for row in tiny.rows() if row["variant"] != "base"} == {2}
    assert all(-1 <= row[score] <= 1 for row in tiny.rows() for score in (*VALIDATED, *SCORES))
    # Negatives, the base's validation and every run's last; class images once for the three methods that want them.
    assert sorted(drawn) == sorted([32, 32, *[32] * 4, 4])
    assert sorted(path.name for path in tiny.out.iterdir()) == ["photos", "results.jsonl", "rows", "tables.md"]
    tables = (tiny.out / "tables.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in tables for name in METHODS)
    assert train.Trainer is not Watched  # whoever trains next is not watched

    def again(*_):
        raise AssertionError("trained twice")

    monkeypatch.setattr(train, "run", again)
    tiny.all(["dog-2"], [0], ["methods"])


def test_labels_may_be_probabilities(tiny):
    tiny.all(["dog-2"], [0], ["rpo", "coin"])
    rpo, expected = (tiny.rows(variant=name, choice="")[0] for name in ("RPO", "RPO, P for y"))
    assert expected["label"] == pytest.approx(expected["p"]) and rpo["p"] == pytest.approx(expected["p"])
    assert rpo["label"] in (0, 0.5, 1)  # the coin is back: one step of two pairs


def test_an_interrupted_run_leaves_nothing_and_is_done_anew(tiny, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.all(["clock-0"], [0], ["rpo"])
    assert not tiny.rows() and [path.name for path in tiny.out.iterdir()] == ["photos"]
    tiny.all(["clock-0"], [0], ["rpo"])
    assert [row["variant"] for row in tiny.rows()][:2] == ["base", "RPO"]


def test_what_a_run_was_spared_counts_for_its_seconds(tiny, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    draws = train.Trainer.draw
    monkeypatch.setattr(train.Trainer, "draw", draws)
    monkeypatch.setattr(module.time, "time", lambda: float(next(clock)))
    tiny.all(["dog-2"], [0], ["rpo"])
    assert module.Watched.last.spared == 0
    spared = {key: seconds for key, (_, seconds) in module.Watched.shared.items()}
    assert len(spared) == 2 and all(seconds > 0 for seconds in spared.values())
    tiny.run(tiny.subject("dog-2"), 0, "again", [])
    assert module.Watched.last.spared == sum(spared.values())
