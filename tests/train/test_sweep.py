"""A grid of runs, one after another: it resumes, and its table equals the logs of the runs."""

import json

import pytest
from conftest import ROOT, assert_mistake, call_here
from sweeps import SMALL, call_main, lines_of, train_here

import train.sweep
from data_prep.errors import Fault, UserError
from train.recipe import flags_of, parse, to_yaml
from train.tune.grid import combinations, expand_grid


def states_of(runs) -> dict[str, str]:
    return {row["run"]: row["state"] for row in json.loads((runs / "sweep.json").read_text())["runs"]}


def test_a_sweep_resumes_and_its_table_equals_the_logs(tiny_model, icon_shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that train
    runs = tmp_path / "runs"
    names = ["run-lr=1e-3", "run-lr=3e-2"]
    (runs / names[0]).mkdir(parents=True)
    (runs / names[0] / "stop").touch()  # the first run is stopped from outside after its first step
    words = ["--model", tiny_model, "--data", icon_shards, "--runs", runs, *SMALL]
    call_main(train.sweep.main, *words, "--vary", "optim.lr=1e-3,3e-2")
    printed = capfd.readouterr()
    assert "== 1 of 2: run-lr=1e-3\n" in printed.out
    assert "training: " in printed.err, "the progress bar of a run is visible"
    assert f"{runs / names[1]} is finished: 256 pairs\n" in printed.out
    assert "stopped after 64 pairs\n" in printed.out
    for advice in ("--run)", "resume with", "evaluate: ", "tensorboard", "lower --optim.lr"):
        assert advice not in printed.out, "which is of a run by hand"
    assert states_of(runs) == {names[0]: "stopped", names[1]: "finished"}
    other = (runs / names[1] / "metrics.jsonl").read_bytes()

    # A third value makes the loss non-finite and is listed; the first run resumes; the second is not touched.
    monkeypatch.setattr("train.tune.sweep.train_one", train_here)
    diverging = ["--max-nonfinite-steps", 1, "--save-every-minutes", 0, "--vary", "optim.lr=1e-3,3e-2,1e30"]
    with pytest.raises(Fault, match=r"1 run failed \(run-lr=1e30\)"):
        call_main(train.sweep.main, *words, *diverging)
    printed = capfd.readouterr()
    assert "== 2 of 3: run-lr=3e-2 is finished\n" in printed.out
    assert (runs / names[1] / "metrics.jsonl").read_bytes() == other
    assert "after 64 pairs" in printed.out + printed.err, "the first run resumes after its one step"
    assert states_of(runs) == {**dict.fromkeys(names, "finished"), "run-lr=1e30": "failed, exit code 3"}

    rows = json.loads((runs / "sweep.json").read_text())["runs"]
    scores = [-1 if row["score"] is None else row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    text = (runs / "sweep.md").read_text()
    assert text in printed.out
    for row in rows:
        if row["state"] == "finished":
            check_row(row, runs / row["run"], text)

    # Only the table, of a folder with a run that a cluster has queued.
    (runs / "run-waiting" / "slurm").mkdir(parents=True)
    (runs / "run-waiting" / "slurm" / "recipe.yaml").write_text("model: x\n")
    call_main(train.sweep.main, "--table", runs)
    again = json.loads((runs / "sweep.json").read_text())["runs"]
    finished = [row for row in rows if row["state"] == "finished"]
    assert [row for row in again if row["state"] == "finished"] == finished
    assert states_of(runs)["run-waiting"] == "not started"


def check_row(row: dict, run, text: str) -> None:
    """A row of sweep.json, and its line in sweep.md, equal what the run logged."""
    lines = lines_of(run)
    validations = [line for line in lines if "val/mean/R@1" in line]
    best = max(validations[1:], key=lambda line: line["val/mean/R@1"])
    epoch_samples = row["samples"] // row["epoch"]
    assert [line["samples"] for line in validations] == [0, epoch_samples, 2 * epoch_samples]
    assert row["samples"] == best["samples"]
    assert row["metrics"] == {name: value for name, value in best.items() if name != "samples"}
    assert row["score"] == best["val/mean/R@1"]
    assert row["before"]["val/mean/R@1"] == validations[0]["val/mean/R@1"]
    speeds = sorted(line["time/pairs_per_s"] for line in lines if "time/pairs_per_s" in line)
    assert speeds[0] <= row["pairs_per_s"] <= speeds[-1]
    assert row["varied"]["optim.lr"] == parse(flags_of(run / "recipe.yaml")).optim.lr
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['run']} ")]
    assert f" {100 * best['val/image_to_text/R@1']:.1f} " in line
    assert f" → {100 * row['score']:.1f} " in line


def test_a_stopped_sweep_starts_no_run(tiny_model, icon_shards, tmp_path, capsys):
    (tmp_path / "stop").touch()
    words = ["--model", tiny_model, "--data", icon_shards, "--runs", tmp_path, *SMALL]
    call_main(train.sweep.main, *words, "--vary", "seed=0,1")
    assert "stopped; the same command resumes" in capsys.readouterr().out
    assert states_of(tmp_path) == dict.fromkeys(("run-seed=0", "run-seed=1"), "not started")
    assert not (tmp_path / "stop").exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_mistakes_are_found_before_the_first_run(tiny_model, icon_shards, tmp_path):
    words = ["--model", tiny_model, "--data", icon_shards, "--runs", tmp_path / "runs", *SMALL]
    for more, *message in (
        (["--vary", "optim.lr=1e-3", "--vary", "global_batch_size=64,999"], "999"),
        (["--vary", "seed=0,0"], "run-seed=0: two runs of the sweep have this name"),
        (["--vary", "epochs=2,0"], "--epochs 0"),
        (["--vary", "optim.lrr=1,2"], "--optim.lrr"),
        (["--vary", "lr"], "--vary lr"),
        (["--nproc", 3], "3 ranks"),
        (["--nproc", 0], "--nproc 0: must be at least 1"),
        (["--run", "x"], "--run: each run has its own folder in --runs"),
    ):
        assert_mistake(call_here(train.sweep.main, *words, *more), *message)
    assert_mistake(call_here(train.sweep.main, "--table", tmp_path), "contains no runs")
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_recipe_in_the_folder_is_refused(tiny_model, icon_shards, tmp_path):
    words = ["--model", tiny_model, "--data", str(icon_shards), *SMALL]
    (tmp_path / "run-seed=0").mkdir()
    recipe = parse([*words, "--run", str(tmp_path), "--epochs", "3"])
    (tmp_path / "run-seed=0" / "recipe.yaml").write_text(to_yaml(recipe))
    result = call_here(train.sweep.main, *words, "--runs", tmp_path, "--vary", "seed=0")
    assert_mistake(
        result, "run of another recipe", "epochs: 3 before, 2 now", "another --runs, or the old values"
    )
    assert "resume" not in result.stderr


def test_a_folder_of_something_else_is_refused(tiny_model, icon_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train.tune.sweep.train_one", lambda *_: 1)
    words = ["--model", tiny_model, "--data", str(icon_shards), *SMALL]
    for name in ("run", "started", "new"):
        (tmp_path / name).mkdir()
    recipe = to_yaml(parse([*words, "--run", "x"]))
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "file").touch()
    before = sorted(icon_shards.iterdir())
    for folder, found in (
        (icon_shards, "holds manifest.json"),
        (tmp_path / "run", "is a run"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file" / "runs", "is a file, not a folder"),
    ):
        result = call_here(train.sweep.main, *words, "--runs", folder, "--vary", "seed=0")
        assert_mistake(result, f"{folder}: ", found, "pass another --runs")
    assert sorted(icon_shards.iterdir()) == before
    (tmp_path / "started" / "run-seed=1.yaml").write_text(recipe)  # of a sweep that was killed at its start
    (tmp_path / "new" / "log.txt").touch()  # the output of the command itself
    for folder in (tmp_path / "started", tmp_path / "new", tmp_path / "a" / "b"):
        result = call_here(train.sweep.main, *words, "--runs", folder, "--vary", "seed=0", expect=1)
        assert_mistake(result, "1 run failed (run-seed=0)")


def test_help_lists_the_own_options_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.sweep", "--help"])
    with pytest.raises(SystemExit):
        train.sweep.main()
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m train.sweep RECIPE ")
    assert "python -m train --help" in printed
    assert "--weight-decay" not in printed


def test_names_and_combinations():
    pairs = combinations(["optim.lr=1e-5,3e-5", "seed=0"])
    assert pairs == [(("optim.lr", "1e-5"), ("seed", "0")), (("optim.lr", "3e-5"), ("seed", "0"))]
    assert combinations([]) == [()]
    assert expand_grid(["x/a.yaml", "b.yaml"], ["optim.lr=1"]) == {
        "a-lr=1": ("x/a.yaml", ["--optim.lr", "1"]),
        "b-lr=1": ("b.yaml", ["--optim.lr", "1"]),
    }
    switches = expand_grid(["a.yaml"], ["augment.full=true,false"])
    assert [flags for _, flags in switches.values()] == [["--augment.full"], ["--augment.no-full"]]
    with pytest.raises(UserError, match="a: two runs"):
        expand_grid(["x/a.yaml", "y/a.yaml"], [])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_says_how_it_is_run_and_whether_it_was_measured(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"train train/recipes/{path.name} --data " in head
    assert any(words in head for words in ("Not measured", "Not yet trained", "two CPU cores"))
