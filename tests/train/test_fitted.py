"""What "auto" chose is recorded in the run and used again when it resumes: its numbers stay the same."""

import dataclasses
import json
from pathlib import Path

import pytest
from runs import assert_bit_equal, no_validation, recipe, trained

from train.loop import fit
from train.recipe import Recipe
from train.run.folder import Run
from train.world import World


@pytest.fixture
def memory(monkeypatch):
    """A function that decides how many pairs fit into memory from now on, by activation_checkpointing."""

    def fitting(**pairs: int) -> None:
        name = "train.model.activation_memory.pairs_that_fit"
        monkeypatch.setattr(name, lambda towers, mode, *_: pairs[mode])

    return fitting


def fitted(run: Path) -> tuple[str, int]:
    choice = json.loads((run / "environment.json").read_text())["fitted"]
    return choice["activation_checkpointing"], choice["micro_batch_size"]


@pytest.fixture
def plan(tiny_model, icon_shards, tmp_path) -> Recipe:
    options = {"micro_batch_size": "auto", "activation_checkpointing": "auto", "epochs": 1, "workers": 0}
    return recipe(tiny_model, icon_shards, tmp_path / "run", keep_checkpoints=9, **options)


def interrupted(plan: Recipe) -> None:
    """Train until the first step, as a stop request does."""

    def stop(clip, world):
        (Path(plan.run) / "stop").touch()
        return {}

    assert not fit(plan, World(), stop).is_finished
    assert [path.name for path in Path(plan.run).glob("checkpoints/samples-*")] == ["samples-000000000024"]


def test_a_resumed_run_has_the_choice_of_its_first_start(plan, memory, tmp_path):
    """Though more memory is free then; and it equals a run that was not interrupted, bit for bit."""
    memory(none=5, full=17)
    interrupted(plan)
    assert fitted(tmp_path / "run") == ("full", 12)
    whole = trained(dataclasses.replace(plan, run=str(tmp_path / "whole")), no_validation)
    memory(none=24, full=24)
    trained(plan, no_validation)
    assert fitted(tmp_path / "run") == ("full", 12)
    assert_bit_equal(tmp_path / "run", whole.folder)


def test_a_new_run_measures(plan, memory, tmp_path):
    memory(none=24, full=24)
    trained(plan, no_validation)
    assert fitted(tmp_path / "run") == ("none", 24)


def test_other_conditions_are_measured_again(plan, memory, tmp_path):
    """Another number of ranks, or another value of compile, leaves "auto" as it is, to be measured."""
    memory(none=5, full=17)
    interrupted(plan)
    chosen = Run(plan, World()).with_fitted(plan)
    assert (chosen.activation_checkpointing, chosen.micro_batch_size) == ("full", 12)
    assert Run(plan, World(1, 2)).with_fitted(plan) == plan
    compiled = dataclasses.replace(plan, compile="never")
    assert Run(compiled, World()).with_fitted(compiled) == compiled


def test_a_value_that_was_typed_since_makes_auto_measure_again(plan, memory, tmp_path):
    """12 pairs fit with "full" and need not fit with "none"."""
    memory(none=5, full=17)
    interrupted(plan)
    typed = dataclasses.replace(plan, activation_checkpointing="none")
    assert Run(typed, World()).with_fitted(typed) == typed
    trained(typed, no_validation)
    assert fitted(tmp_path / "run") == ("none", 5)
    assert Run(typed, World()).with_fitted(typed).micro_batch_size == 5


def test_a_micro_batch_above_the_batch_changes_nothing(plan, memory, tmp_path):
    """It is limited to this rank's share, and "auto" for the other key is chosen once all the same."""
    memory(none=5, full=99)
    large = dataclasses.replace(plan, micro_batch_size=99)
    interrupted(large)
    assert fitted(tmp_path / "run") == ("full", 24)
    assert Run(large, World()).with_fitted(large).activation_checkpointing == "full"
