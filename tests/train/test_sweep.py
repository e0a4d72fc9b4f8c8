"""Runs over values, one after another: their table says what their own logs do; and the rate to take is what
the figures allow.
"""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import ROOT, assert_mistake, call_here
from PIL import Image

import train.tune.lr
import train.tune.sweep
from data_prep.errors import Fault, UserError
from data_prep.shards import Shards
from train.recipe import flags_of, parse, to_yaml
from train.tune.grid import combinations, expand_grid
from train.tune.lr import standard_error, suggest

SMALL = [
    "--epochs",
    "2",
    "--global_batch_size",
    "64",
    "--micro_batch_size",
    "64",
    "--precision",
    "fp32",
    "--activation_checkpointing",
    "none",
    "--workers",
    "0",
]
SMALL += ["--log_every_steps", "1", "--optim.warmup_fraction", "0.2"]


@pytest.fixture
def call_main(monkeypatch, tiny_model, icon_shards):
    """A main of ours with these words; the runs are processes of their own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def called(main, *words) -> None:
        monkeypatch.setattr(
            "sys.argv", ["it", "--model", tiny_model, "--data", str(icon_shards), *SMALL, *map(str, words)]
        )
        main()

    return called


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_sweep_goes_on_and_its_table_is_what_the_runs_logged(call_main, tmp_path, monkeypatch, capfd):
    runs = tmp_path / "runs"
    names = ["run-lr=1e-3", "run-lr=3e-2"]
    (runs / names[0]).mkdir(parents=True)
    (runs / names[0] / "stop").touch()  # the first of them is stopped by somebody after its first step
    vary = ["--vary", "optim.lr=1e-3,3e-2"]
    call_main(train.sweep.main, "--run", runs, *vary)
    assert "== 1 of 2: run-lr=1e-3\n" in capfd.readouterr().out
    states = {
        row["run"]: (row["state"], row["score"] is None)
        for row in json.loads((runs / "sweep.json").read_text())["runs"]
    }
    assert states == {names[0]: ("stopped", True), names[1]: ("finished", False)}
    other = (runs / names[1] / "metrics.jsonl").read_bytes()

    # A third value, of which the loss cannot be finite, is listed; the first goes on; the second is not
    # touched.
    diverging = ["--max_nonfinite_steps", 1, "--save_every_minutes", 0, "--vary", "optim.lr=1e-3,3e-2,1e30"]
    with pytest.raises(Fault, match=r"1 of the runs failed \(run-lr=1e30\)"):
        call_main(train.sweep.main, "--run", runs, *diverging)
    printed = capfd.readouterr()
    assert "== 2 of 3: run-lr=3e-2 is finished\n" in printed.out
    assert "training: " in printed.err, "the bar of a run is seen"
    assert (runs / names[1] / "metrics.jsonl").read_bytes() == other
    assert "going on after 64 pairs" in printed.out + printed.err

    rows = json.loads((runs / "sweep.json").read_text())["runs"]
    assert {row["run"]: row["state"] for row in rows} == dict.fromkeys(names, "finished") | {
        "run-lr=1e30": "failed, exit code 3"
    }
    scores = [-1 if row["score"] is None else row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    text = (runs / "sweep.md").read_text()
    assert text in printed.out
    for row in rows:
        if row["state"] != "finished":
            continue
        lines = lines_of(runs / row["run"])
        validations = [line for line in lines if "val/mean/R@1" in line]
        best = max(validations[1:], key=lambda line: line["val/mean/R@1"])
        assert [line["samples"] for line in validations] == [
            0,
            row["samples"] // row["epoch"],
            2 * row["samples"] // row["epoch"],
        ]
        assert row["samples"] == best["samples"]
        assert row["metrics"] == {name: value for name, value in best.items() if name != "samples"}
        assert row["score"] == best["val/mean/R@1"]
        assert row["before"]["val/mean/R@1"] == validations[0]["val/mean/R@1"]
        speeds = sorted(line["time/pairs_per_s"] for line in lines if "time/pairs_per_s" in line)
        assert speeds[0] <= row["pairs_per_s"] <= speeds[-1]
        assert row["varied"]["optim.lr"] == parse(flags_of(runs / row["run"] / "recipe.yaml")).optim.lr
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['run']} ")]
        assert f" {100 * best['val/image_to_text/R@1']:.1f} " in line
        assert f" → {100 * row['score']:.1f} " in line

    # The table alone, as of a folder that a cluster's sweep left, with a run that waits in the queue.
    (runs / "run-waiting" / "slurm").mkdir(parents=True)
    (runs / "run-waiting" / "slurm" / "recipe.yaml").write_text("model: x\n")
    monkeypatch.setattr("sys.argv", ["it", "--table", str(runs)])
    train.tune.sweep.main()
    again = json.loads((runs / "sweep.json").read_text())["runs"]
    assert [row for row in again if row["state"] == "finished"] == [
        row for row in rows if row["state"] == "finished"
    ]
    assert next(row for row in again if row["run"] == "run-waiting")["state"] == "not begun"


def test_a_sweep_that_is_to_stop_begins_nothing(call_main, tmp_path, capsys):
    (tmp_path / "stop").touch()
    call_main(train.sweep.main, "--run", tmp_path, "--vary", "seed=0,1")
    assert "stopped; the same command goes on" in capsys.readouterr().out
    assert [row["state"] for row in json.loads((tmp_path / "sweep.json").read_text())["runs"]] == [
        "not begun"
    ] * 2
    assert not (tmp_path / "stop").exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_mistakes_are_found_before_the_first_run(tiny_model, icon_shards, tmp_path):
    main, words = (
        train.tune.sweep.main,
        ["--model", tiny_model, "--data", icon_shards, "--run", tmp_path / "runs", *SMALL],
    )
    assert_mistake(
        call_here(main, *words, "--vary", "optim.lr=1e-3", "--vary", "global_batch_size=64,999"),
        "fewer than one batch of 999",
    )
    assert_mistake(
        call_here(main, *words, "--vary", "seed=0,0"), "run-seed=0: two runs of the sweep have this name"
    )
    assert_mistake(call_here(main, *words, "--vary", "epochs=2,0"), "--epochs 0")
    assert_mistake(call_here(main, *words, "--vary", "optim.lrr=1,2"), "--optim.lrr")
    assert_mistake(call_here(main, *words, "--vary", "lr"), "--vary lr")
    assert_mistake(call_here(main, *words, "--nproc", 3), "cannot be shared evenly by 3 ranks")
    assert_mistake(call_here(main, "--table", tmp_path), "no runs in it")
    main, words = (
        train.tune.lr.main,
        ["--model", tiny_model, "--data", icon_shards, "--out", tmp_path / "runs", *SMALL],
    )
    assert_mistake(call_here(main, *words, "--part", 0), "--part 0")
    assert_mistake(call_here(main, *words, "--rates", "1e-3"), "at least two")
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_recipe_in_the_folder_is_told(tiny_model, icon_shards, tmp_path):
    words = ["--model", tiny_model, "--data", icon_shards, "--run", tmp_path, *SMALL]
    (tmp_path / "run-seed=0").mkdir()
    (tmp_path / "run-seed=0" / "recipe.yaml").write_text(to_yaml(parse([*map(str, words), "--epochs", "3"])))
    told = call_here(train.sweep.main, *words, "--vary", "seed=0")
    assert_mistake(told, "holds a run of another recipe", "epochs: 3 before, 2 now")


def test_names_and_combinations():
    pairs = combinations(["optim.lr=1e-5,3e-5", "seed=0"])
    assert pairs == [(("optim.lr", "1e-5"), ("seed", "0")), (("optim.lr", "3e-5"), ("seed", "0"))]
    assert combinations([]) == [()]
    assert expand_grid(["x/a.yaml", "b.yaml"], ["optim.lr=1"]) == {
        "a-lr=1": ("x/a.yaml", ["--optim.lr", "1"]),
        "b-lr=1": ("b.yaml", ["--optim.lr", "1"]),
    }
    with pytest.raises(UserError, match="a: two runs"):
        expand_grid(["x/a.yaml", "y/a.yaml"], [])


def test_a_search_for_the_rate(call_main, icon_shards, tmp_path, capfd):
    """A rate that diverges is a result; rates that were tried before count."""
    out, names = tmp_path / "lr", ["run-epochs=1-lr=0.001", "run-epochs=1-lr=0.002", "run-epochs=1-lr=1e+30"]
    words = ["--out", out, "--part", 0.5, "--max_nonfinite_steps", 1, "--save_every_minutes", 0, "--rates"]
    call_main(train.lr.main, *words, "1e30", "1e-3")
    printed = capfd.readouterr().out
    rows = {row["run"]: row for row in json.loads((out / "sweep.json").read_text())["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {names[0]: "finished", names[2]: "finished"}
    assert rows[names[2]]["score"] is None, "its last step was left out, and there was no other"
    assert [line["samples"] for line in lines_of(out / names[0]) if "val/mean/R@1" in line] == [
        0,
        rows[names[0]]["samples"],
    ]
    assert printed.rstrip().endswith("--optim.lr 0.001")
    assert "largest" not in printed
    assert (out / "sweep.md").read_text() in printed
    assert Image.open(out / "lr.png").size > (600, 400)

    shutil.copytree(out / names[0], out / names[1])
    old = (out / names[1] / "recipe.yaml").read_text()
    (out / names[1] / "recipe.yaml").write_text(old.replace("lr: 0.001\n", "lr: 0.002\n"))
    call_main(train.lr.main, *words, "2e-3", "1e-3")  # which trains nothing
    printed = capfd.readouterr().out
    assert all(f"{name} is finished\n" in printed for name in names[:2])
    n_groups = len(np.unique(Shards(icon_shards, "val").groups))
    scores = dict.fromkeys((0.001, 0.002), rows[names[0]]["score"]) | {1e30: 0.0}
    _, why = suggest(scores, rows[names[0]]["before"]["val/mean/R@1"], n_groups)
    assert f"{' '.join(why)}\n\n    --optim.lr 0.001\n" in printed


def test_the_best_rate_where_it_stands_out():
    scores = {1e-6: 0.30, 3e-6: 0.40, 1e-5: 0.60, 3e-5: 0.50, 1e-4: 0.10}
    rate, why = suggest(scores, 0.2, 400)
    assert rate == 1e-5
    assert why == ["The best by validation is 1e-05: mean R@1 60.0 %, ± 2.4 for 400 groups."]
    assert standard_error(0.6, 400) == pytest.approx(math.sqrt(0.6 * 0.4 / 400))


def test_within_one_standard_error_the_smallest_neighbour():
    scores = {1e-6: 0.30, 3e-6: 0.585, 1e-5: 0.59, 3e-5: 0.60, 1e-4: 0.10}
    assert suggest(scores, 0.2, 400)[0] == 3e-6
    assert suggest(scores, 0.2, 40_000)[0] == 3e-5, "with more to measure by, they are apart"
    assert suggest({**scores, 3e-6: 0.3, 1e-6: 0.6}, 0.2, 400)[0] == 1e-6, "of equal ones the smallest"
    assert suggest({**scores, 3e-6: 0.3, 1e-6: 0.599}, 0.2, 400)[0] == 1e-5, (
        "what lies beyond a worse one is no neighbour"
    )


def test_the_edge_of_the_grid_is_told():
    rate, why = suggest({1e-6: 0.1, 1e-5: 0.3, 1e-4: 0.5}, 0.05, 400)
    assert rate == 1e-4
    assert "largest that was tried: try further, --rates 0.0003 0.001" in " ".join(why)
    rate, why = suggest({1e-6: 0.5, 1e-5: 0.3, 1e-4: 0.1}, 0.05, 400)
    assert rate == 1e-6
    assert "smallest that was tried: try further, --rates 1e-07 3.3e-07" in " ".join(why)
    assert "largest" not in " ".join(why)
    assert "largest" not in " ".join(suggest({1e-6: 0.1, 1e-5: 0.5, 1e-4: 0.0}, 0.05, 400)[1]), (
        "beyond it, training diverged"
    )


def test_a_search_that_says_nothing_says_so():
    why = " ".join(suggest({1e-6: 0.20, 1e-5: 0.21, 1e-4: 0.205}, 0.22, 400)[1])
    assert "cannot tell them apart" in why
    assert "None is better than the weights before training (22.0 %)" in why


@pytest.mark.parametrize(
    "path", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_says_how_it_is_run_and_whether_it_was_measured(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"train train/recipes/{path.name} --data " in head
    assert any(words in head for words in ("Not measured", "Not yet trained", "two CPU cores"))
