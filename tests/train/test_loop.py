"""A run that was stopped, killed and resumed equals one that was not, bit for bit; two ranks equal one.

Mistakes are found before training.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from conftest import TINY, assert_mistake, build_icons, call, noise_images, save_tiny
from damage import as_an_older_build
from runs import (
    WEIGHTS,
    assert_bit_equal,
    assert_equal_weights,
    exported,
    fit_on_ranks,
    flags,
    launch,
    metrics,
    newest,
    no_validation,
    recipe,
    status_of,
    trained,
    until_logged,
)
from safetensors.torch import load_file

from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build
from data_prep.errors import UserError
from train.loop import fit
from train.model.clip import load
from train.recipe import Augment, Captions, Recipe
from train.run.folder import Run
from train.setup import check_batch, setup
from train.step import train_step
from train.world import World


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory) -> str:
    """With open_clip's own patch dropout: random numbers in the forward pass must resume as well."""
    folder = tmp_path_factory.mktemp("dropout")
    vision = {**TINY["vision_cfg"], "patch_size": 4, "patch_dropout": 0.25}
    return f"local-dir:{save_tiny(folder, vision_cfg=vision)}"


@pytest.fixture(scope="module")
def undisturbed(dropout_model, icon_shards, tmp_path_factory) -> dict[int, Path]:
    """Runs that nothing happened to, by number of ranks."""
    folder, runs = tmp_path_factory.mktemp("undisturbed"), {}
    for ranks in (1, 2):
        runs[ranks] = folder / str(ranks)
        fit_on_ranks(recipe(dropout_model, icon_shards, runs[ranks]), ranks)
    return runs


def interrupt(
    arguments: list[str], run: Path, ranks: int, at_samples: int, how: signal.Signals | None
) -> None:
    """Start training, and interrupt it after `at_samples` pairs: by a signal, or by the file RUN/stop."""
    process = launch(arguments, ranks)
    until_logged(process, run, f'"samples": {at_samples}')
    if how == signal.SIGKILL:  # torchrun, ranks and loader workers at once, as a power cut would
        os.killpg(process.pid, signal.SIGKILL)
    elif how:
        process.send_signal(how)
    else:
        (run / "stop").touch()
    process.wait(60)
    if how != signal.SIGKILL:
        output = process.stdout.read()
        assert process.returncode == 0, output
        assert "stopped after" in output
        status = status_of(run)
        assert (status["state"], status["requested_by"]) == ("stopped", "signal" if how else "file")
        assert not (run / "stop").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_killed_and_resumed_equals_undisturbed(
    undisturbed, dropout_model, icon_shards, tmp_path, ranks
):
    """A command is stopped by SIGTERM (one process) or RUN/stop (torchrun with two), and killed after it has
    resumed.
    """
    run = tmp_path / "run"
    plan = recipe(dropout_model, icon_shards, run)
    arguments, launched = flags(plan, tmp_path / "recipe.yaml"), ranks if ranks > 1 else 0
    steps = [random.randrange(2, 10), random.randrange(12, 22)]
    print(f"stopped at step {steps[0]}, killed at step {steps[1]}")
    interrupt(arguments, run, launched, 24 * steps[0], how=None if launched else signal.SIGTERM)
    interrupt(arguments, run, launched, 24 * steps[1], how=signal.SIGKILL)
    fit_on_ranks(plan, ranks)
    assert status_of(run)["state"] == "finished"
    assert_bit_equal(run, undisturbed[ranks])


def test_siglip_with_positives_of_a_group_resumes_bit_for_bit(icon_shards, tmp_path):
    """Stopped within the first epoch. logit_scale begins above 100, as SigLIP2's does, and is not clamped."""
    (tmp_path / "biased").mkdir()
    biased = f"local-dir:{save_tiny(tmp_path / 'biased', init_logit_bias=-10.0, init_logit_scale=5.0)}"
    options = {"loss": "siglip", "same_group": "positive", "epochs": 2, "workers": 0, "save_every_minutes": 9}
    whole = trained(recipe(biased, icon_shards, tmp_path / "whole", **options), no_validation)

    def stop(clip, world):
        (tmp_path / "parts" / "stop").touch()
        return {}

    parts = recipe(biased, icon_shards, tmp_path / "parts", **options)
    assert not fit(parts, World(), stop).is_finished
    assert [line["samples"] for line in metrics(tmp_path / "parts") if "train/loss" in line] == [24]
    trained(parts, no_validation)
    assert_bit_equal(tmp_path / "parts", whole.folder)
    before, after = load_file(tmp_path / "biased" / WEIGHTS), exported(newest(whole.folder))
    assert after["logit_scale"] > 4.7 > 4.61 > math.log(100)
    assert before["logit_bias"] != after["logit_bias"]


def test_two_ranks_have_the_loss_curve_of_one(tiny_model, icon_shards, tmp_path):
    curves = []
    for ranks, micro_batch_size in ((1, 24), (2, 12)):
        run = tmp_path / str(ranks)
        fit_on_ranks(recipe(tiny_model, icon_shards, run, micro_batch_size=micro_batch_size), ranks)
        curves.append(metrics(run))
    assert len(curves[0]) == 24 + 5
    for one, two in zip(*curves, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if name.startswith("train/"):
                assert one[name] == pytest.approx(two[name], rel=1e-5), (one["samples"], name)
            elif name == "val/mean/R@1":
                assert one[name] == pytest.approx(two[name], abs=0.05)


def test_training_learns(tiny_model, icon_shards, tmp_path):
    """A model of two layers memorises its training captions; otherwise something is not connected."""
    options = {"epochs": 20, "workers": 0, "micro_batch_size": 24, "captions": Captions()}
    options |= {"augment": Augment(scale=(1.0, 1.0), color_jitter_prob=0, gray_scale_prob=0)}
    state = setup(recipe(tiny_model, icon_shards, tmp_path / "run", **options), None, World())
    losses = [float(train_step(state, batch)["train/loss"]) for batch in state.batches]
    assert (len(losses), state.samples) == (120, state.end)
    assert losses[0] > 3  # chance is ln 24 = 3.2
    assert max(losses[-6:]) < 1.5


def test_a_run_folder_holds_what_its_module_says(undisturbed):
    run = undisturbed[2]
    status = status_of(run)
    assert (status["state"], status["samples"]) == ("finished", 576)
    assert status["checkpoint"] == "samples-000000000576"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert list((run / "tensorboard").glob("events*"))
    validations = [line for line in metrics(run) if "val/mean/R@1" in line]
    assert [line["samples"] for line in validations] == [0, 144, 288, 432, 576]
    best = max(validations[1:], key=lambda line: line["val/mean/R@1"])
    assert (run / "checkpoints" / "best").readlink().name == f"samples-{best['samples']:012d}"
    kept = {path.name for path in (run / "checkpoints").iterdir()} - {"best"}
    assert kept == {"samples-000000000552", "samples-000000000576", f"samples-{best['samples']:012d}"}


def test_a_finished_run_is_not_touched(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed[1].rglob("*")}
    output = call("train", undisturbed[1] / "recipe.yaml", "--workers", 0).stdout
    assert "is finished" in output
    assert "python -m eval retrieval" in output
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed[1].rglob("*")}


def short(model: str, shards: Path, run: Path, **changes) -> Recipe:
    """One epoch in this process, without chunks."""
    return recipe(model, shards, run, **{"epochs": 1, "workers": 0, "micro_batch_size": 24, **changes})


def test_a_damaged_checkpoint_is_skipped(tiny_model, icon_shards, tmp_path, capsys):
    plan = short(tiny_model, icon_shards, tmp_path / "run")
    run = trained(plan, no_validation).folder
    weights, expected = newest(run) / WEIGHTS, exported(newest(run))
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    weights.write_bytes(weights.read_bytes()[:-100])
    (run / "status.json").unlink()
    trained(plan, no_validation)
    warning = "samples-000000000144 is damaged (open_clip_model.safetensors); using an older one"
    assert warning in capsys.readouterr().err
    assert_equal_weights(exported(newest(run)), expected)


def test_a_recipe_that_does_not_fit_is_an_error_before_anything_is_written(tiny_model, icon_shards, tmp_path):
    run = tmp_path / "run"

    def error(model: str = tiny_model, data: Path = icon_shards, folder: Path = run, **changes) -> str:
        with pytest.raises(UserError) as raised:
            fit(short(model, data, folder, **changes), World(), no_validation)
        assert not run.exists()
        return str(raised.value)

    found = error(global_batch_size=5000)
    assert "training images are fewer than one batch of 5000; pass a smaller --global-batch-size" in found
    assert "no model 'x'" in error("x:none")
    assert "has no logit_bias, which --loss siglip needs" in error(loss="siglip")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    assert "exists and is not a run; pass another --run" in error(folder=tmp_path / "letters")
    assert "exists and is not a run; pass another --run" in error(folder=tmp_path / "letters" / "a.txt")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    for place, kind in ((Path("/dev/null"), "a device or pipe"), (tmp_path / "letters" / "a.txt", "a file")):
        assert f"{place} is {kind}, not a folder; pass another --run" in error(folder=place / "new" / "run")
    assert "gone is a link to nothing, not a folder; pass another --run" in error(
        folder=tmp_path / "gone" / "run"
    )
    assert "no manifest.json" in error(data=tmp_path / "letters" / "a.txt")
    indivisible = short(tiny_model, icon_shards, run, global_batch_size=25)
    expected = "--global-batch-size 25: cannot be divided evenly among 2 ranks; pass --global-batch-size 24"
    with pytest.raises(UserError, match=expected):
        check_batch(indivisible, 100, World(0, 2))


def test_a_run_does_not_resume_with_another_recipe(undisturbed, dropout_model, icon_shards):
    with pytest.raises(UserError, match=r"epochs: 4 before, 9 now.*pass another --run"):
        fit(recipe(dropout_model, icon_shards, undisturbed[1], epochs=9), World(), no_validation)


def test_a_kill_between_a_checkpoint_and_its_link_is_repaired(tiny_model, icon_shards, tmp_path):
    scores = iter([0.1, 0.3, 0.2, 0.4])
    plan = short(tiny_model, icon_shards, tmp_path / "run", epochs=3, save_every_minutes=9)
    run = trained(plan, lambda clip, world: {"val/mean/R@1": next(scores)}).folder
    link = run / "checkpoints" / "best"
    assert link.readlink().name == newest(run).name
    link.unlink()
    link.symlink_to("samples-000000000288")
    (run / "status.json").unlink()
    trained(plan, no_validation)
    assert link.readlink().name == newest(run).name


def test_a_run_resumes_with_moved_data_and_not_with_other_data(
    tiny_model, icon_shards, icon_folder, tmp_path
):
    run = tmp_path / "run"
    trained(short(tiny_model, icon_shards, run), no_validation)
    (run / "status.json").unlink()
    build_icons(icon_folder, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"not the shards that .* was started with"):
        trained(short(tiny_model, tmp_path / "other", run), no_validation)
    moved = shutil.copytree(icon_shards, tmp_path / "moved")
    trained(short(tiny_model, moved, run, micro_batch_size=12), no_validation)


def test_a_group_on_both_sides_of_the_split_is_an_error(tiny_model, icon_shards, tmp_path):
    shards = shutil.copytree(icon_shards, tmp_path / "shards")
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["splits"]["val"] = manifest["splits"]["train"]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"\d+ groups are in train and in val"):
        fit(recipe(tiny_model, shards, tmp_path / "run"), World(), no_validation)
    assert not (tmp_path / "run").exists()


def test_one_group_whose_pairs_are_positives_is_an_error(tiny_model, tmp_path):
    reading = Reading(image_column="image", caption_column="caption", group_column="group")
    table, splitting = noise_images(tmp_path, 30, groups=1), Splitting(val=0, test=0)
    build([str(table)], tmp_path / "shards", reading, Checking(), splitting, Parallelism(1))
    plan = short(tiny_model, tmp_path / "shards", tmp_path / "run", same_group="positive")
    expected = "all 30 training images are of one group.* pass --same-group negative"
    with pytest.raises(UserError, match=expected):
        fit(plan, World(), no_validation)
    assert not (tmp_path / "run").exists()
    trained(dataclasses.replace(plan, same_group="negative", epochs=1), no_validation)


def test_mistakes_exit_2_also_under_torchrun(tiny_model, icon_shards, tmp_path):
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", global_batch_size=5000)
    arguments = flags(plan, tmp_path / "recipe.yaml")
    assert_mistake(call(*arguments, expect=2), "error:", "fewer than one batch of 5000")
    result = call(*arguments, ranks=2, expect=1)  # torchrun's own exit code
    assert result.stderr.count("fewer than one batch of 5000") == 1
    assert "exitcode  : 2" in result.stderr


def test_an_error_of_one_rank_ends_all(tiny_model, icon_shards, tmp_path):
    """Each rank hashes its part of the shards without a hash per sample. That of the second is altered; the
    first must not wait.
    """
    shards = as_an_older_build(shutil.copytree(icon_shards, tmp_path / "shards"))
    with open(shards / "train" / "train-000001.tar", "r+b") as file:
        file.write(b"x")
    arguments = flags(recipe(tiny_model, shards, tmp_path / "run"), tmp_path / "recipe.yaml")
    result = call(*arguments, ranks=2, expect=1)
    assert result.stderr.count("error: on rank 1: ") == 1
    assert "train-000001.tar: altered since it was built" in result.stderr
    assert not (tmp_path / "run").exists()


def test_shards_without_a_val_split_train_and_the_newest_checkpoint_is_best(
    tiny_model, icon_shards, icon_folder, tmp_path
):
    build_icons(icon_folder, tmp_path / "shards", val=0.0)
    run = trained(short(tiny_model, tmp_path / "shards", tmp_path / "run")).folder
    assert (run / "checkpoints" / "best").readlink().name == newest(run).name


def test_setup_restores_what_a_step_left(tiny_model, icon_shards, tmp_path):
    """setup() of a run that was stopped gives the state that the stopped process had, and the same step."""
    plan = short(tiny_model, icon_shards, tmp_path / "run", ema=0.9)

    def stop(clip, world):
        (tmp_path / "run" / "stop").touch()
        return {"val/mean/R@1": 0.1}

    fit(plan, World(), stop)
    resumed = setup(plan, Run(plan, World()), World())
    fresh = setup(short(tiny_model, icon_shards, tmp_path / "new", ema=0.9), None, World())
    fresh.clip.towers.load_state_dict(load(tiny_model).towers.state_dict())
    assert (resumed.samples, resumed.step, resumed.steps) == (24, 1, 6)
    fresh.towers.train()
    resumed.towers.train()
    train_step(fresh, next(fresh.batches))
    assert_equal_weights(fresh.clip.towers.state_dict(), resumed.clip.towers.state_dict())
    for state in (fresh, resumed):
        train_step(state, next(state.batches))
    assert_equal_weights(fresh.clip.towers.state_dict(), resumed.clip.towers.state_dict())
    assert_equal_weights(fresh.selector.resumable.state_dict(), resumed.selector.resumable.state_dict())
