"""The faults that the drills rely on are injected: without them a drill would pass and test nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment

from tests.slurm_lab.fault_injection import CRASH_CODE, faulty_step, slow_save
from tests.slurm_lab.fixtures import RECIPE, TRAIN_MODULE, nonfinite_samples
from train.loop import fit
from train.recipe import Recipe, parse
from train.step import train_step
from train.world import World


@pytest.fixture
def recipe_file(tmp_path, tiny_model, icon_shards) -> Path:
    paths = {"model": tiny_model, "data": str(icon_shards), "run": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **paths, "epochs": 1}))
    return tmp_path / "recipe.yaml"


def fit_with(recipe: Recipe, monkeypatch, **faults: object) -> list[int]:
    """Train in this process with faults; returns the samples of its steps that were not finite."""
    step = faulty_step(train_step, {name: str(value) for name, value in faults.items()})
    monkeypatch.setattr("train.loop.train_step", step)
    fit(recipe, World(), lambda clip, world: {})
    return nonfinite_samples(Path(recipe.run))


@pytest.mark.parametrize("micro_batch_size", [16, 4], ids=["whole", "chunked"])
def test_nan_reaches_the_asked_steps_alone(recipe_file, monkeypatch, micro_batch_size):
    recipe = parse([str(recipe_file), "--micro-batch-size", str(micro_batch_size)])
    assert fit_with(recipe, monkeypatch, LAB_NAN="32 64") == [32, 64]


def test_a_step_that_is_repeated_after_a_crash_is_recorded_once(recipe_file, monkeypatch):
    """A NaN in the first step after a checkpoint: the resumed run takes that step again."""
    recipe = parse([str(recipe_file), "--epochs", "2"])
    step = faulty_step(train_step, {"LAB_NAN": "160"})

    def crash_later(state, batch):
        if state.samples == 192:
            raise KeyboardInterrupt
        return step(state, batch)

    monkeypatch.setattr("train.loop.train_step", crash_later)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, World(), lambda clip, world: {})
    assert nonfinite_samples(Path(recipe.run)) == [160]
    assert fit_with(recipe, monkeypatch, LAB_NAN="160") == [160]


def test_every_step_is_slowed(recipe_file, monkeypatch):
    sleeps = []
    monkeypatch.setattr("tests.slurm_lab.fault_injection.time.sleep", sleeps.append)
    assert fit_with(parse([str(recipe_file)]), monkeypatch, LAB_STEP_S=7) == []
    lines = [json.loads(line) for line in (recipe_file.parent / "run" / "metrics.jsonl").open()]
    steps = [line for line in lines if "train/loss" in line]
    assert sleeps.count(7) == len(steps) > 0


def test_a_save_is_slowed_while_the_run_stops(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("tests.slurm_lab.fault_injection.time.sleep", calls.append)
    save = slow_save(calls.append, {"LAB_SAVE_S": "7"}, tmp_path)
    save("a")
    (tmp_path / "stop").touch()
    save("b")
    assert calls == ["a", 7, "b"]


def test_the_module_trains_with_the_faults_of_its_environment(recipe_file):
    """As the drills start it: a NaN in the second step, a crash before the fourth."""
    run = recipe_file.parent / "run"
    command = [sys.executable, "-m", TRAIN_MODULE, recipe_file, "--run", run]
    faults = environment(LAB_NAN="16", LAB_CRASH_STEP="4", LAB_STEP_S="0.01")
    result = subprocess.run(command, cwd=ROOT, env=faults, capture_output=True, text=True, check=False)
    assert result.returncode == CRASH_CODE, result.stderr
    assert nonfinite_samples(run) == [16]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert max(line["samples"] for line in lines) == 3 * RECIPE["global_batch_size"]
