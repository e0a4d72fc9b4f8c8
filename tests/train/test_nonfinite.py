"""A step with a non-finite gradient changes no weight on any rank; too many in a row roll the run back."""

import math
import shutil

import pytest
import torch
from runs import (
    assert_bit_equal,
    assert_equal_weights,
    checkpoint,
    exported,
    fit_on_ranks,
    metrics,
    newest,
    no_validation,
    nonfinite_steps,
    poison,
    recipe,
    state_of,
    trained,
)

from data_prep.errors import NotFinite
from data_prep.shards import Shards
from train.data.order import Order
from train.run.nonfinite import NonFiniteGuard, NonFiniteStep

SKIPPED, IN_A_ROW = 96, (192, 216, 240)  # pairs before a step


@pytest.fixture(scope="module")
def one_and_two_ranks(tiny_model, icon_shards, tmp_path_factory) -> dict[int, tuple]:
    """By number of ranks, the folder and output of a run in which the last rank's gradient is NaN in one
    step, and later in as many consecutive steps as are allowed.
    """
    folder, runs = tmp_path_factory.mktemp("nonfinite"), {}
    for ranks in (1, 2):
        options = {
            "epochs": 3,
            "micro_batch_size": 24 // ranks,
            "max_nonfinite_steps": 3,
            "keep_checkpoints": 20,
            "workers": 0,
        }
        plan = recipe(tiny_model, icon_shards, folder / str(ranks), **options)
        runs[ranks] = folder / str(ranks), fit_on_ranks(plan, ranks, (SKIPPED, *IN_A_ROW))
    return runs


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_nonfinite_step_is_skipped_on_all_ranks_and_logged(one_and_two_ranks, icon_shards, ranks):
    run, _ = one_and_two_ranks[ranks]
    pairs = Shards(icon_shards, "train")
    order = Order(pairs.shard_sizes, 24, 0)
    line = nonfinite_steps(run)[0]
    assert (line["samples"], line["grad_norm"]) == (SKIPPED, "nan")
    assert line["keys"] == [pairs.key(order.sample_at(position)) for position in range(SKIPPED, SKIPPED + 24)]
    before, after = checkpoint(run, SKIPPED), checkpoint(run, SKIPPED + 24)
    assert_equal_weights(exported(before), exported(after))
    moments = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (before, after)]
    for number, values in moments[0].items():
        assert_equal_weights(values, moments[1][number])
    later = torch.load(checkpoint(run, 144) / "optimizer.pt", weights_only=True)["state"]
    assert {values["step"].item() for values in later.values()} == {5}  # of 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_roll_back_together(one_and_two_ranks, ranks):
    """To the newest checkpoint. Non-finite steps before it do not matter: they changed nothing."""
    run, output = one_and_two_ranks[ranks]
    assert [line["samples"] for line in nonfinite_steps(run)] == [SKIPPED, *IN_A_ROW]
    assert output.count("rolling back to samples-000000000240 and skipping the pairs since") == 1
    assert_equal_weights(exported(checkpoint(run, 192)), exported(checkpoint(run, 264)))
    assert state_of(newest(run))["samples"] == 432
    assert state_of(newest(run))["rolled_back"] is True


def test_two_ranks_equal_one_where_steps_are_not_finite(one_and_two_ranks):
    one, two = (one_and_two_ranks[ranks][0] for ranks in (1, 2))
    weights, others = exported(newest(one)), exported(newest(two))
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)
    curves = [[line["train/loss"] for line in metrics(run) if "train/loss" in line] for run in (one, two)]
    assert len(curves[0]) == 18
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_resumed_after_nonfinite_steps_equals_uninterrupted(tiny_model, icon_shards, tmp_path, monkeypatch):
    poison(monkeypatch, lambda samples: samples in (72, 168))
    for name in ("whole", "parts"):
        options = {"epochs": 2, "keep_checkpoints": 20, "workers": 0, "micro_batch_size": 24}
        trained(recipe(tiny_model, icon_shards, tmp_path / name, **options), no_validation)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for _ in range(6):
        shutil.rmtree(newest(parts))
    (parts / "status.json").unlink()
    assert newest(parts).name == "samples-000000000144"
    trained(recipe(tiny_model, icon_shards, parts, **options), no_validation)
    assert_bit_equal(whole, parts)
    assert nonfinite_steps(whole) == nonfinite_steps(parts)
    assert [line["samples"] for line in nonfinite_steps(whole)] == [72, 168]


LIMITED = {
    "epochs": 3,
    "micro_batch_size": 24,
    "workers": 0,
    "max_nonfinite_steps": 3,
    "save_every_minutes": 9,
    "keep_checkpoints": 20,
}


def test_a_run_rolls_back_once_and_skips_the_pairs_since(
    tiny_model, icon_shards, tmp_path, monkeypatch, capsys
):
    """To the end of the first epoch; afterwards single non-finite steps are skipped as before."""
    poison(monkeypatch, lambda samples: 192 <= samples < 264 or samples == 312)
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", **LIMITED)
    run = trained(plan, no_validation)
    assert [line["samples"] for line in nonfinite_steps(run.folder)] == [192, 216, 240, 312]
    rolled_back, copy = (checkpoint(run.folder, samples) for samples in (144, 264))
    assert_equal_weights(exported(rolled_back), exported(copy))
    error = capsys.readouterr().err
    assert "rolling back to samples-000000000144 and skipping the pairs since" in error
    assert [line["samples"] for line in metrics(run.folder)] == list(range(24, 433, 24))


def test_a_second_rollback_is_an_error(tiny_model, icon_shards, tmp_path, monkeypatch):
    poison(monkeypatch, lambda samples: samples >= 168)
    with pytest.raises(
        NotFinite, match=r"last 3 steps before 312 pairs .* a rollback did not help.* --optim\.lr 5\.0e-04"
    ):
        trained(recipe(tiny_model, icon_shards, tmp_path / "run", **LIMITED), no_validation)
    newest_states = [state_of(checkpoint(tmp_path / "run", samples)) for samples in (144, 288)]
    assert [state["rolled_back"] for state in newest_states] == [False, True]


def test_without_a_checkpoint_there_is_no_rollback(tiny_model, icon_shards, tmp_path, monkeypatch):
    poison(monkeypatch, lambda samples: True)
    with pytest.raises(NotFinite, match="there is no checkpoint to roll back to"):
        trained(recipe(tiny_model, icon_shards, tmp_path / "run", **LIMITED), no_validation)


def test_the_guard_counts_consecutive_steps_over_flushes():
    guard, nan, one = NonFiniteGuard(), torch.tensor(math.nan), torch.tensor(1.0)
    assert guard.flush() == []
    assert [guard.check(24 * number, one, norm).item() for number, norm in enumerate((one, nan))] == [0, 1]
    assert guard.check(48, torch.tensor(math.inf), one).item() == 1
    first, second = guard.flush()
    assert (first.samples, first.loss, guard.consecutive) == (24, 1.0, 2)
    assert second == NonFiniteStep(48, math.inf, 1.0)
    guard.check(72, nan, nan)
    assert ([step.samples for step in guard.flush()], guard.consecutive) == ([72], 3)
    guard.check(96, one, one)
    assert (guard.flush(), guard.consecutive) == ([], 0)
