"""Steps that are not finite reach no weight on any rank, and too many in a row go back."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import load_file
from test_loop import assert_bit_equal, flags, metrics, newest, no_validation, recipe

import train.loop
from data_prep.errors import NotFinite
from data_prep.shards import Shards
from train.data.order import Order
from train.loop import fit
from train.world import World


def faulty(
    arguments: list[str], bad_steps: list[int], ranks: int = 0, expect: int = 0
) -> subprocess.CompletedProcess:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--"] if ranks else []
    )
    line = [sys.executable, *launcher, str(ROOT / "tests" / "faulty.py"), *arguments[1:]]
    env = environment(BAD_STEPS=" ".join(map(str, bad_steps)))
    result = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == expect, result.stderr
    return result


def bad_lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "nonfinite_steps.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_is_left_out_on_all_ranks_and_written_down(
    tiny_model, icon_shards, tmp_path
):
    """The second rank's gradient is not a number in one step; one process that has the same step agrees with
    both.
    """
    runs = []
    for ranks, micro_batch_size in ((0, 24), (2, 12)):
        runs.append(tmp_path / str(ranks))
        plan = recipe(
            tiny_model,
            icon_shards,
            runs[-1],
            epochs=2,
            micro_batch_size=micro_batch_size,
            log_every_steps=2,
            keep_checkpoints=20,
        )
        faulty(flags(plan, tmp_path / "recipe.yaml"), [96], ranks)
    pairs = Shards(icon_shards, "train")
    order = Order(pairs.shard_sizes, 24, 0)
    for run in runs:
        (line,) = bad_lines(run)
        assert (line["samples"], line["grad_norm"]) == (96, "nan")
        assert line["keys"] == [pairs.key(order.sample_at(at)) for at in range(96, 120)]
        before, after = (run / "checkpoints" / f"samples-{samples:012d}" for samples in (96, 120))
        weights, others = (load_file(path / "open_clip_model.safetensors") for path in (before, after))
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (before, after)]
        assert all(
            torch.equal(value, states[1][number][name])
            for number, each in states[0].items()
            for name, value in each.items()
        )
        assert {
            each["step"].item()
            for each in torch.load(newest(run) / "optimizer.pt", weights_only=True)["state"].values()
        } == {11}
    weights, others = (load_file(newest(run) / "open_clip_model.safetensors") for run in runs)
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)
    curves = [[line["train/loss"] for line in metrics(run) if "train/loss" in line] for run in runs]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_two_ranks_go_back_together(tiny_model, icon_shards, tmp_path):
    for ranks, micro_batch_size in ((0, 24), (2, 12)):
        run = tmp_path / str(ranks)
        options = {
            "epochs": 3,
            "max_nonfinite_steps": 3,
            "save_every_minutes": 9,
            "keep_checkpoints": 9,
            "micro_batch_size": micro_batch_size,
        }
        result = faulty(
            flags(recipe(tiny_model, icon_shards, run, **options), tmp_path / "recipe.yaml"),
            [192, 216, 240],
            ranks,
        )
        assert result.stderr.count("going back to samples-000000000144") == 1
        assert [line["samples"] for line in bad_lines(run)] == [192, 216, 240]
    one, two = (load_file(newest(tmp_path / ranks) / "open_clip_model.safetensors") for ranks in "02")
    assert newest(tmp_path / "0").name == newest(tmp_path / "2").name == "samples-000000000432"
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_resumed_after_bad_steps_equals_uninterrupted(tiny_model, icon_shards, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run in (whole, parts):
        arguments = flags(
            recipe(tiny_model, icon_shards, run, epochs=2, keep_checkpoints=20), tmp_path / "recipe.yaml"
        )
        faulty(arguments, [72, 168])
    for _ in range(6):
        shutil.rmtree(newest(parts))
    (parts / "status.json").unlink()
    assert newest(parts).name == "samples-000000000144"
    faulty(arguments, [72, 168])
    assert_bit_equal(whole, parts)
    assert bad_lines(whole) == bad_lines(parts)


def poison(monkeypatch, bad) -> None:
    """From now on the gradients of the steps that `bad` chooses by the samples seen before them are not
    finite.
    """
    honest = train.loop.backward

    def poisoned(towers, batch, micro_batch_size, world, seed, samples, loss):
        value = honest(towers, batch, micro_batch_size, world, seed, samples, loss)
        if bad(samples):
            towers.model.visual.proj.grad[0, 0] = float("inf")
        return value

    monkeypatch.setattr(train.loop, "backward", poisoned)


def test_too_many_in_a_row_go_back_once_and_pass_over_them(
    tiny_model, icon_shards, tmp_path, monkeypatch, capsys
):
    plan = recipe(
        tiny_model,
        icon_shards,
        tmp_path / "run",
        workers=0,
        max_nonfinite_steps=3,
        save_every_minutes=9,
        keep_checkpoints=20,
    )
    poison(monkeypatch, lambda samples: 192 <= samples < 264 or samples == 312)
    run = fit(plan, World(), no_validation)
    assert run.is_finished
    assert [line["samples"] for line in bad_lines(run.folder)] == [192, 216, 240, 312]
    went_back, passed = (
        load_file(run.folder / "checkpoints" / name / "open_clip_model.safetensors") for name in CHECKPOINTS
    )
    assert all(torch.equal(went_back[name], passed[name]) for name in passed)
    assert "going back to samples-000000000144, and passing over what came since" in capsys.readouterr().err

    plan = recipe(
        tiny_model,
        icon_shards,
        tmp_path / "again",
        workers=0,
        max_nonfinite_steps=3,
        save_every_minutes=9,
        keep_checkpoints=20,
    )
    poison(monkeypatch, lambda samples: samples >= 360)
    with pytest.raises(
        NotFinite,
        match=r"last 3 steps before 432 pairs .* going back was tried already.* --optim\.lr 5\.0e-04",
    ):
        fit(plan, World(), no_validation)
    assert newest(tmp_path / "again").name == "samples-000000000288"
    fresh = recipe(
        tiny_model, icon_shards, tmp_path / "fresh", workers=0, max_nonfinite_steps=3, save_every_minutes=9
    )
    poison(monkeypatch, lambda samples: True)
    with pytest.raises(NotFinite, match="there is no checkpoint to go back to"):
        fit(fresh, World(), no_validation)


CHECKPOINTS = ("samples-000000000144", "samples-000000000264")
