"""A forecast: short runs on nested parts of the groups, at most 60 % of the full run's pairs, and a table."""

import contextlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_mistake, call_here, noise_images
from PIL import Image
from scipy.special import expit
from sweeps import SMALL, call_main, lines_of, train_here

import train.forecast
from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build
from data_prep.shards import Shards
from data_prep.tables import text_of
from train.data.order import part_of_groups
from train.data.sets import open_pairs
from train.recipe import parse
from train.tune.extrapolate import bootstrap, gain, line_through, score_at
from train.tune.forecast import parts_of, verdict, warning
from train.tune.table import SCORE


def build_shards(folder: Path, table: Path, val: float) -> None:
    """Shards at FOLDER/shards."""
    reading = Reading(image_column="image", caption_column="caption", group_column="group")
    splitting = Splitting(val=val, test=0)
    with contextlib.redirect_stdout(io.StringIO()):
        build(
            [str(table)],
            folder / "shards",
            reading,
            Checking(),
            splitting,
            Parallelism(1),
            images_per_shard=50,
        )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """200 training images in 100 groups and 60 val images in 30; every image has two captions."""
    folder = tmp_path_factory.mktemp("pairs")
    table = noise_images(folder, 260, groups=130)
    lines = table.read_text().splitlines()
    second = [line.replace(",caption", ",another caption") for line in lines[1:]]
    table.write_text("\n".join([*lines, *second]) + "\n")
    build_shards(folder, table, val=0.25)
    return folder / "shards"


@pytest.fixture
def words(tiny_model, pairs, tmp_path, monkeypatch) -> list:
    """A command line with RUNS at tmp_path/forecast, of a full run of 5 epochs; runs train here."""
    monkeypatch.setattr("train.tune.sweep.train_one", train_here)
    monkeypatch.setattr("train.tune.forecast.in_fresh_process", lambda measure, *words: measure(*words))
    words = ["--model", tiny_model, "--data", pairs, "--runs", tmp_path / "forecast", *SMALL]
    words += ["--global-batch-size", "16", "--micro-batch-size", "16", "--epochs", "5"]
    return [*words, "--optim.lr", "1e-3", "--save-every-minutes", "0"]


def test_parts_are_nested_and_keep_groups_whole(pairs):
    groups = Shards(pairs, "train").groups
    parts = [part_of_groups(groups, fraction, 3) for fraction in (1 / 8, 1 / 4, 1 / 2, 1.0)]
    for smaller, larger in itertools.pairwise(parts):
        assert set(groups[smaller]) < set(groups[larger])
        assert not set(groups[smaller]) & set(groups[~smaller])
    assert parts[-1].all()
    assert [len(set(groups[each])) for each in parts[:3]] == [
        round(fraction * len(set(groups))) for fraction in (1 / 8, 1 / 4, 1 / 2)
    ]
    assert (part_of_groups(groups, 0.5, 4) != parts[2]).any(), "the seed decides"


def test_a_part_reads_what_the_whole_reads(pairs):
    whole = Shards(pairs, "train")
    chosen = part_of_groups(whole.groups, 1 / 4, 0)
    part = whole.only(chosen)
    numbers = np.flatnonzero(chosen).tolist()
    assert len(part) == len(numbers) == part.shard_sizes.sum()
    for number, other in enumerate(numbers):
        assert part.read(number) == whole.read(other)
    assert part.groups.tolist() == whole.groups[chosen].tolist()
    assert part.fingerprint == whole.fingerprint
    assert len(whole) > len(part), "the whole is as it was"


def test_a_forecast(words, pairs, tmp_path, capfd):
    call_main(train.forecast.main, *words)
    printed, runs = capfd.readouterr().out, tmp_path / "forecast"
    assert "4 short runs see 416 pairs, 43 % of the full run's 960; training alone takes about " in printed
    assert "each run also starts a process and validates 3 times" in printed
    for run in runs.glob("*/metrics.jsonl"):
        assert sum(SCORE in line for line in lines_of(run.parent)) == 3
    found = json.loads((runs / "forecast.json").read_text())
    assert (runs / "forecast.md").read_text() in printed
    assert Image.open(runs / "forecast.png").size > (600, 400)
    assert found["cost"] == pytest.approx(416 / 960)
    assert found["captions_per_image"] == 2
    assert [run["groups"] for run in found["short_runs"]] == [12, 25, 50, 25]
    assert [run["captions"] for run in found["short_runs"]] == ["random"] * 3 + ["first"]
    for run in found["short_runs"]:
        scores = [line[SCORE] for line in lines_of(runs / run["run"]) if SCORE in line]
        assert run["value"] == pytest.approx(max(scores[1:]), abs=1e-6)
        assert found["before"] == scores[0]
    sizes = [(each["times"], each["groups"], each["images"], each["epochs"]) for each in found["forecast"]]
    assert sizes == [(1, 100, 200, 5), (2, 200, 400, 5)]
    assert all(each["low"] <= each["value"] <= each["high"] for each in found["forecast"])
    shown = ["images", "captions", *(["epochs"] if found["best_epoch"] == 2 else [])]
    assert list(found["gains"]) == shown, (
        "more epochs promise nothing where val was best after the first half"
    )

    stamps = [file.stat().st_mtime_ns for file in sorted(runs.glob("*/metrics.jsonl"))]
    call_main(train.forecast.main, *words)  # trains nothing, and says the same
    again = capfd.readouterr().out
    assert "about" not in again.split("\n")[0]
    assert [file.stat().st_mtime_ns for file in sorted(runs.glob("*/metrics.jsonl"))] == stamps
    assert json.loads((runs / "forecast.json").read_text()) == found

    # What would mix runs, or replace the forecast, is refused before the plan is printed.
    before = (runs / "forecast.md").read_bytes()
    for changes, *message in (
        (("--seed", 1), "run of another recipe", "seed: 0 before, 1 now", "another --runs"),
        (("--epochs", 6), "--epochs 6", "run of 5 epochs", "another --runs"),
        (("--epochs", 20), "--epochs 20", "run of 5 epochs", "another --runs"),
    ):
        assert_mistake(call_here(train.forecast.main, *words, *changes), *message)
    (runs / "forecast.json").unlink()  # it is unfinished
    result = call_here(train.forecast.main, *words, "--epochs", 20)
    assert_mistake(result, "is a run of another forecast", "epochs: 2 before, 11 now", "another --runs")
    assert capfd.readouterr().out == ""
    assert (runs / "forecast.md").read_bytes() == before


def test_an_unfinished_forecast_says_nothing_and_is_resumed(words, tmp_path, monkeypatch, capfd):
    trained = []

    def train_one_then_stop(file, recipe, nproc, stop) -> int:
        trained.append(recipe.groups_fraction)
        if len(trained) == 1:
            stop.file.touch()
        return train_here(file, recipe, nproc, stop)

    monkeypatch.setattr("train.tune.sweep.train_one", train_one_then_stop)
    words += ["--captions.sample", "first"]
    call_main(train.forecast.main, *words)
    assert "The forecast is unfinished." in capfd.readouterr().out
    assert not (tmp_path / "forecast" / "forecast.json").exists()
    call_main(train.forecast.main, *words)
    assert trained == [0.125, 0.25, 0.5], "without a run for captions, of which the recipe takes the first"
    assert "captions" not in json.loads((tmp_path / "forecast" / "forecast.json").read_text())["gains"]


def test_a_run_on_a_part_sees_that_part_alone(tiny_model, pairs):
    words = ["--model", tiny_model, "--data", str(pairs), "--run", "unused", "--seed", "3"]
    whole = Shards(pairs, "train")
    part = open_pairs(parse([*words, "--groups-fraction", "0.25"]))
    assert set(part.groups) == set(whole.groups[part_of_groups(whole.groups, 0.25, 3)])
    assert len(open_pairs(parse(words))) == len(whole)


def test_mistakes_come_with_the_fix(words, tmp_path):
    def mistake(*changes):
        return call_here(train.forecast.main, *words, *changes)

    for nproc in (0, -1):
        assert_mistake(mistake("--nproc", nproc), f"--nproc {nproc}: must be at least 1")
    assert_mistake(mistake("--epochs", 1), "--epochs 1: must be at least 2")
    assert_mistake(mistake("--global-batch-size", 64), "24 images", "one batch of 64", "--global-batch-size")
    assert_mistake(mistake("--groups-fraction", 0), "--groups-fraction 0.0: must be above 0")
    for val, words_of_it in (
        (0, ("has no val split", "--val 0.1")),
        (0.3, ("val has 5 groups, too few", "larger --val")),
    ):
        folder = tmp_path / str(val)
        folder.mkdir()
        build_shards(folder, noise_images(folder, 40, groups=20), val)
        assert_mistake(mistake("--data", folder / "shards"), *words_of_it)
    assert not (tmp_path / "forecast").exists()


def test_a_line_is_extended_exactly():
    """Scores whose logits are a line; groups of equal hits, so that nothing is uncertain but the model."""
    groups = np.repeat(np.arange(30), 10)
    values = expit(np.array([-1.0, -0.8, -0.6]))
    hits = np.tile(values[:, None], (1, len(groups)))
    line = line_through(hits, groups, np.array([1 / 8, 1 / 4, 1 / 2]))
    for data, logit in ((1.0, -0.4), (2.0, -0.2)):
        estimate = score_at(line, data)
        assert estimate.value == pytest.approx(logit)
        interval = estimate.interval()
        assert interval.low < interval.value < interval.high
    assert gain(line, 1.0, 2.0).value == pytest.approx(0.2)
    assert gain(line, 1.0, 2.0**0.5).value == pytest.approx(0.1)
    near, far = score_at(line, 1.0), score_at(line, 2.0)
    assert far.deviation > near.deviation


def test_groups_are_resampled_together():
    """Two runs whose queries differ by a constant have the same difference in every resample."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    hits = rng.random(200) / 2
    scores = bootstrap(np.stack([hits, hits + 0.25]), groups)
    assert np.allclose(scores[:, 1] - scores[:, 0], 0.25)
    means = np.array([hits[groups == group].mean() for group in range(40)])
    assert scores[:, 0].std() == pytest.approx(means.std() / np.sqrt(40), rel=0.05)


def test_no_verdict_stands_under_the_warning():
    figures = {"groups": 8, "images": 9, "epochs": 2, "value": 0.1, "low": 0.0, "high": 0.2}
    found = {
        "level": 0.8,
        "best_epoch": 1,
        "gains": {"images": figures},
        "forecast": [{**figures, "times": 1}],
    }
    found["short_runs"] = [{**figures, "captions": "random"}]
    for before, named in ((0.05, "short of images"), (0.3, "the forecast means little")):
        text = text_of(parts_of({**found, "before": before}))
        assert named in text
        assert ("short of" in text) == (named == "short of images")


def test_runs_that_do_not_learn_are_named():
    text = warning({"before": 0.3, "short_runs": [{"value": 0.1}, {"value": 0.3}]})
    assert "train.lr" in text
    assert "more --epochs" in text, "which is what random weights lack"
    assert not warning({"before": 0.3, "short_runs": [{"value": 0.1}, {"value": 0.31}]})


def test_the_verdict_names_what_is_clearly_short():
    def of(value, low, high):
        return {"value": value, "low": low, "high": high}

    images, captions, epochs = of(0.05, 0.03, 0.07), of(0.01, -0.01, 0.02), of(0.04, 0.01, 0.06)
    assert verdict({"images": images, "captions": captions}).startswith("Short of images:")
    assert verdict({"epochs": epochs, "images": images}).startswith("Short of images or epochs:")
    unclear = verdict({"captions": captions, "images": of(0.03, -0.01, 0.07)})
    assert unclear.startswith("Perhaps short of images:")
    assert "+3.0 points" in unclear
    assert "(-1.0 to +7.0)" in unclear
    assert verdict({"captions": of(-0.01, -0.03, 0.01)}).startswith("Short of nothing")
