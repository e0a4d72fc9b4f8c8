"""The search for a learning rate: the scores decide what it recommends; unfinished, it recommends nothing."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import assert_mistake, call_here
from PIL import Image
from sweeps import SMALL, call_main, lines_of, train_here

import train.lr
from data_prep.shards import Shards
from train.tune.lr import standard_error, suggest


@pytest.fixture
def words(tiny_model, icon_shards, tmp_path, monkeypatch) -> list:
    """A command line with RUNS at tmp_path/lr; runs train in this process, one epoch each."""
    monkeypatch.setattr("train.tune.sweep.train_one", train_here)
    words = ["--model", tiny_model, "--data", icon_shards, "--runs", tmp_path / "lr", *SMALL]
    return [
        *words,
        "--epochs-fraction",
        0.5,
        "--max-nonfinite-steps",
        1,
        "--save-every-minutes",
        0,
        "--rates",
    ]


def test_a_search_for_the_rate(words, icon_shards, tmp_path, capfd):
    """A rate that diverges is a result; rates that were tried before count."""
    runs, names = tmp_path / "lr", [f"run-epochs=1-lr={rate}" for rate in ("0.001", "0.002", "1e+30")]
    call_main(train.lr.main, *words, "1e30", "1e-3")
    printed = capfd.readouterr().out
    rows = {row["run"]: row for row in json.loads((runs / "sweep.json").read_text())["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {names[0]: "finished", names[2]: "finished"}
    assert rows[names[2]]["score"] is None, "its only step was skipped"
    validated = [line["samples"] for line in lines_of(runs / names[0]) if "val/mean/R@1" in line]
    assert validated == [0, rows[names[0]]["samples"]]
    assert printed.rstrip().endswith("--optim.lr 0.001")
    assert "largest" not in printed
    assert (runs / "sweep.md").read_text() in printed
    assert Image.open(runs / "lr.png").size > (600, 400)

    shutil.copytree(runs / names[0], runs / names[1])
    old = (runs / names[1] / "recipe.yaml").read_text()
    (runs / names[1] / "recipe.yaml").write_text(old.replace("lr: 0.001\n", "lr: 0.002\n"))
    call_main(train.lr.main, *words, "2e-3", "1e-3")  # trains nothing
    printed = capfd.readouterr().out
    assert all(f"{name} is finished\n" in printed for name in names[:2])
    n_groups = len(np.unique(Shards(icon_shards, "val").groups))
    scores = dict.fromkeys((0.001, 0.002), rows[names[0]]["score"]) | {1e30: 0.0}
    _, reasons = suggest(scores, rows[names[0]]["before"]["val/mean/R@1"], n_groups)
    assert f"{' '.join(reasons)}\n\n    --optim.lr 0.001\n" in printed


def test_an_unfinished_search_recommends_no_rate(words, tmp_path, monkeypatch, capfd):
    rates = ["1e-3", "2e-3", "3e-3"]
    trained = []

    def train_two_then_stop(file, recipe, nproc, stop) -> int:
        trained.append(recipe.optim.lr)
        if len(trained) == 2:
            stop.file.touch()
        return train_here(file, recipe, nproc, stop)

    monkeypatch.setattr("train.tune.sweep.train_one", train_two_then_stop)
    call_main(train.lr.main, *words, *rates)
    printed = capfd.readouterr().out
    assert "The search is unfinished: 2 of 3 rates are trained." in printed
    assert "| run-epochs=1-lr=0.001 " in printed
    assert "--optim.lr" not in printed
    assert not (tmp_path / "lr" / "lr.png").exists()

    call_main(train.lr.main, *words, *rates)
    printed = capfd.readouterr().out
    assert trained == [0.001, 0.002, 0.003]
    assert "unfinished" not in printed
    assert "    --optim.lr 0.00" in printed


def test_mistakes_are_found_before_the_first_run(tiny_model, icon_shards, tmp_path):
    words = ["--model", tiny_model, "--data", icon_shards, "--runs", tmp_path / "lr", *SMALL]
    assert_mistake(call_here(train.lr.main, *words, "--epochs-fraction", 0), "--epochs-fraction 0")
    assert_mistake(call_here(train.lr.main, *words, "--rates", "1e-3"), "at least two different rates")
    assert not (tmp_path / "lr").exists()


def test_the_best_rate_if_it_stands_out():
    scores = {1e-6: 0.30, 3e-6: 0.40, 1e-5: 0.60, 3e-5: 0.50, 1e-4: 0.10}
    rate, reasons = suggest(scores, 0.2, 400)
    assert rate == 1e-5
    assert reasons == ["Best on val: 1e-05, mean R@1 60.0 % (standard error 2.4, 400 groups)."]
    assert standard_error(0.6, 400) == pytest.approx(math.sqrt(0.6 * 0.4 / 400))


def test_within_one_standard_error_the_smallest_neighbour():
    scores = {1e-6: 0.30, 3e-6: 0.585, 1e-5: 0.59, 3e-5: 0.60, 1e-4: 0.10}
    assert suggest(scores, 0.2, 400)[0] == 3e-6
    assert suggest(scores, 0.2, 40_000)[0] == 3e-5, "with more groups, the rates differ"
    assert suggest({**scores, 3e-6: 0.3, 1e-6: 0.6}, 0.2, 400)[0] == 1e-6, "the smallest of equal rates"
    assert suggest({**scores, 3e-6: 0.3, 1e-6: 0.599}, 0.2, 400)[0] == 1e-5, "a worse rate ends the search"


def test_the_best_rate_at_the_edge_of_the_grid():
    rate, reasons = suggest({1e-6: 0.1, 1e-5: 0.3, 1e-4: 0.5}, 0.05, 400)
    assert rate == 1e-4
    assert "largest rate tried; try larger ones: --rates 0.0003 0.001" in " ".join(reasons)
    rate, reasons = suggest({1e-6: 0.5, 1e-5: 0.3, 1e-4: 0.1}, 0.05, 400)
    assert rate == 1e-6
    assert "smallest rate tried; try smaller ones: --rates 1e-07 3.3e-07" in " ".join(reasons)
    assert "largest" not in " ".join(reasons)
    diverged_above = suggest({1e-6: 0.1, 1e-5: 0.5, 1e-4: 0.0}, 0.05, 400)[1]
    assert "largest" not in " ".join(diverged_above)


def test_an_inconclusive_search():
    reasons = " ".join(suggest({1e-6: 0.20, 1e-5: 0.21, 1e-4: 0.205}, 0.22, 400)[1])
    assert "this search cannot rank them" in reasons
    assert "No rate is better than the weights before training (22.0 %)" in reasons
