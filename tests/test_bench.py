"""toy/bench.py: what counts as done, and the tables."""

import argparse
import json

import pytest
from tiny import write_base, write_metrics

import train
from toy import bench as module
from toy.bench import CHOICES, GROUPS, LOGGED, METHODS, SCORES, VALIDATED, Bench, reserved


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, steps=400, images=4)


def note(bench, variant, subject, seed, score, choice=""):
    scores = dict.fromkeys((*VALIDATED, *SCORES), score) | dict.fromkeys(LOGGED.values(), 0.5)
    bench.note(variant=variant, choice=choice, subject=subject, seed=seed, step=40, seconds=1.5, **scores)


def test_results_of_other_weights_steps_or_images_do_not_count(bench, tmp_path):
    note(bench, "RPO", "dog-2", 0, 0.5)
    assert len(bench.rows(variant="RPO", subject="dog-2", seed=0)) == 1 and not bench.rows(variant="RPO", seed=1)
    assert not Bench(tmp_path, steps=120, images=4).rows() and not Bench(tmp_path, steps=400, images=1).rows()
    bench.made_with |= {"weights": "others"}
    assert not bench.rows()
    note(bench, "RPO", "dog-2", 0, 0.7)  # another process with other weights
    assert [row["DINO"] for row in Bench(tmp_path, steps=400, images=4).rows()] == [0.5]


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
    assert not list(bench.table("Methods", [("RPO", ""), ("DreamBooth", "")]))
    bench.tables()


def test_one_run_has_no_spread(bench):
    note(bench, "RPO", "dog-2", 0, 0.5)
    note(bench, "DreamBooth", "dog-2", 0, 0.25)
    title, _, _, first, second, _ = bench.table("Methods", [("RPO", ""), ("DreamBooth", "")])
    assert "one run each: dog-2" in title and "±" not in first + second
    assert "| 0.500 |" in first and "| 0.250 (-0.250) |" in second


def test_reserved_subjects_are_named():
    assert reserved("stuffed animal-3") == "stuffed animal-3"
    for name in ("dog", "dog-4", "dog--1", "wolf-0", "-0"):
        with pytest.raises(argparse.ArgumentTypeError, match="kind and 0 to 3"):
            reserved(name)


def test_every_variant_is_a_command_line_of_train(monkeypatch):
    for variants in GROUPS.values():
        for options in variants.values():
            train.flags().parse_args(["--subject", "dog", *options])


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A Bench on a tiny random base, two steps a run."""
    base = write_base(tmp_path / "base")
    write_metrics(base / "metrics", base / "tokenizer")
    settings = {"batch": 2, "guidance": 2.0, "class_images": 4, "solver_steps": 1}
    (base / "rpo.json").write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.setattr(module, "WEIGHTS", base)
    monkeypatch.setattr(train, "Trainer", train.Trainer)  # which the benchmark replaces
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
        with pytest.raises(SystemExit):
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
