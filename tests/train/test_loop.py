"""A run that was stopped and killed equals one that was not, bit for bit; two ranks equal one; mistakes cost
no training.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_mistake, build_icons, call, command, environment, save_tiny
from safetensors.torch import load_file

from data_prep.errors import UserError
from data_prep.shards import sha256_of
from train.__main__ import validator
from train.loop import check_batch, fit
from train.recipe import Augment, Captions, Optim, Recipe, to_yaml
from train.world import World


def recipe(model: str, data: Path, run: Path, **changes) -> Recipe:
    """24 steps in 4 epochs, a checkpoint after each step; all that is drawn is drawn."""
    defaults = {
        "epochs": 4,
        "global_batch_size": 24,
        "micro_batch_size": 12,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "workers": 1,
    }
    defaults["augment"] = Augment(
        flip_prob=0.3, blur_prob=0.3, downscale_prob=0.3, theme_prob=0.3, place_prob=0.3
    )
    defaults["captions"] = Captions(tag_dropout=0.3, templates=("an icon of {}", "{}"))
    optim = Optim(lr=1e-3, warmup_fraction=0.2)
    return Recipe(
        model,
        str(data),
        str(run),
        optim=optim,
        **{**defaults, "log_every_steps": 1, "save_every_minutes": 0.0, **changes},
    )


def flags(recipe: Recipe, file: Path) -> list[str]:
    file.write_text(to_yaml(recipe))
    return ["train", str(file)]


def metrics(run: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("samples-*"))


def assert_bit_equal(run: Path, other: Path) -> None:
    assert newest(run).name == newest(other).name
    assert sha256_of(newest(run) / "open_clip_model.safetensors") == sha256_of(
        newest(other) / "open_clip_model.safetensors"
    )
    moments, others = (torch.load(newest(path) / "optimizer.pt", weights_only=True) for path in (run, other))
    assert moments["param_groups"] == others["param_groups"]
    assert moments["state"].keys() == others["state"].keys()
    for number, state in moments["state"].items():
        assert all(torch.equal(value, others["state"][number][name]) for name, value in state.items())
    assert metrics(run) == metrics(other)
    assert (run / "checkpoints" / "best").readlink() == (other / "checkpoints" / "best").readlink()


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory) -> str:
    """With patch dropout: randomness in the forward must resume as well."""
    folder = tmp_path_factory.mktemp("dropout")
    return f"local-dir:{save_tiny(folder, vision_cfg={**TINY['vision_cfg'], 'patch_size': 4, 'patch_dropout': 0.25})}"


@pytest.fixture(scope="module")
def undisturbed(dropout_model, icon_shards, tmp_path_factory) -> dict[int, Path]:
    """Runs that nothing happened to, by number of ranks (0: without torchrun)."""
    folder, runs = tmp_path_factory.mktemp("undisturbed"), {}
    for ranks in (0, 2):
        runs[ranks] = folder / str(ranks)
        call(*flags(recipe(dropout_model, icon_shards, runs[ranks]), folder / f"{ranks}.yaml"), ranks=ranks)
    return runs


def interrupt(
    arguments: list[str], run: Path, ranks: int, at_samples: int, how: signal.Signals | None
) -> None:
    """Start training, and interrupt it when it has seen `at_samples`: by a signal, or by the file RUN/stop."""
    process = subprocess.Popen(
        command(*arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    log = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.is_file() or f'"samples": {at_samples}' not in log.read_text():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline, "the run never came that far"
        time.sleep(0.005)
    if how == signal.SIGKILL:
        os.killpg(
            process.pid, signal.SIGKILL
        )  # torchrun, ranks and loader workers at once, as a power cut would
    elif how:
        process.send_signal(how)
    else:
        (run / "stop").touch()
    process.wait(60)
    if how != signal.SIGKILL:
        assert process.returncode == 0, process.stdout.read().decode()
        assert "stopped after" in process.stdout.read().decode()
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["asked_by"]) == ("stopped", "signal" if how else "file")


@pytest.mark.parametrize("ranks", [0, 2])
def test_stopped_and_killed_and_resumed_equals_undisturbed(
    undisturbed, dropout_model, icon_shards, tmp_path, ranks
):
    run = tmp_path / "run"
    arguments = flags(recipe(dropout_model, icon_shards, run), tmp_path / "recipe.yaml")
    steps = [random.randrange(2, 10), random.randrange(12, 22)]
    print(f"stopped at step {steps[0]}, killed at step {steps[1]}")
    interrupt(arguments, run, ranks, 24 * steps[0], how=None if ranks else signal.SIGTERM)
    interrupt(arguments, run, ranks, 24 * steps[1], how=signal.SIGKILL)
    assert "is finished" in call(*arguments, ranks=ranks).stdout
    assert_bit_equal(run, undisturbed[ranks])


def test_mates_and_siglip_resume_bit_for_bit(icon_shards, tmp_path):
    """Stopped within the first epoch, and gone on with; the scale is above 100, as SigLIP2's are, and stays
    there.
    """
    (tmp_path / "biased").mkdir()
    biased = f"local-dir:{save_tiny(tmp_path / 'biased', init_logit_bias=-10.0, init_logit_scale=5.0)}"
    asked = {
        "loss": "siglip",
        "same_group": "positive",
        "spread_mates": True,
        "epochs": 2,
        "workers": 0,
        "save_every_minutes": 9,
    }
    whole = fit(recipe(biased, icon_shards, tmp_path / "whole", **asked), World(), no_validation)

    def stopping(clip, world):
        (tmp_path / "parts" / "stop").touch()
        return {}

    parts = recipe(biased, icon_shards, tmp_path / "parts", **asked)
    assert not fit(parts, World(), stopping).is_finished
    assert [line["samples"] for line in metrics(tmp_path / "parts") if "train/loss" in line] == [24]
    assert fit(parts, World(), no_validation).is_finished
    assert_bit_equal(tmp_path / "parts", whole.folder)
    before, after = (
        load_file(path / "open_clip_model.safetensors")
        for path in (tmp_path / "biased", newest(whole.folder))
    )
    assert after["logit_scale"] > 4.7 > 4.61 > math.log(100)
    assert before["logit_bias"] != after["logit_bias"]


def test_two_ranks_have_the_loss_curve_of_one(tiny_model, icon_shards, tmp_path):
    curves = []
    for ranks, micro_batch_size in ((0, 24), (2, 12)):
        run = tmp_path / str(ranks)
        call(
            *flags(
                recipe(tiny_model, icon_shards, run, micro_batch_size=micro_batch_size),
                tmp_path / "recipe.yaml",
            ),
            ranks=ranks,
        )
        curves.append(metrics(run))
    assert len(curves[0]) == 24 + 5
    for one, two in zip(*curves, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if name.startswith("train/"):
                assert one[name] == pytest.approx(two[name], rel=1e-5), (one["samples"], name)
            elif name == "val/mean/R@1":
                assert one[name] == pytest.approx(two[name], abs=0.05)


def no_validation(clip, world):
    return {}


def test_training_learns(tiny_model, icon_shards, tmp_path):
    """A model of two layers memorises its training captions: far from chance, or something is not connected."""
    plain = Augment(scale=(1.0, 1.0), color_jitter_prob=0, gray_scale_prob=0)
    options = {"epochs": 20, "augment": plain, "captions": Captions(), "save_every_minutes": 9, "workers": 0}
    run = fit(recipe(tiny_model, icon_shards, tmp_path / "run", **options), World(), no_validation)
    losses = [line["train/loss"] for line in metrics(run.folder)]
    assert losses[0] > 3  # chance is ln 24 = 3.2
    assert max(losses[-6:]) < 1.5


def test_the_run_folder_holds_what_it_says(undisturbed, dropout_model):
    run = undisturbed[2]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["samples"], status["checkpoint"]) == (
        "finished",
        576,
        "samples-000000000576",
    )
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert list((run / "tensorboard").glob("events*"))
    lines = metrics(run)
    validations = [line for line in lines if "val/mean/R@1" in line]
    assert [line["samples"] for line in validations] == [0, 144, 288, 432, 576]
    best = max(validations[1:], key=lambda line: line["val/mean/R@1"])
    assert (run / "checkpoints" / "best").readlink().name == f"samples-{best['samples']:012d}"
    kept = {path.name for path in (run / "checkpoints").iterdir()} - {"best"}
    assert kept == {"samples-000000000552", "samples-000000000576", f"samples-{best['samples']:012d}"}


def test_a_finished_run_says_so_and_is_not_touched(undisturbed, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in undisturbed[0].rglob("*")}
    result = call("train", undisturbed[0] / "recipe.yaml", "--workers", 0)
    assert "is finished" in result.stdout
    assert "python -m eval retrieval" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed[0].rglob("*")}


def test_a_damaged_checkpoint_is_passed_over(tiny_model, icon_shards, tmp_path, capsys):
    whole = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, workers=0)
    run = fit(whole, World(), no_validation)
    expected = {
        name: tensor.clone()
        for name, tensor in load_file(newest(run.folder) / "open_clip_model.safetensors").items()
    }
    weights = newest(run.folder) / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (run.folder / "status.json").unlink()
    run = fit(whole, World(), no_validation)
    assert (
        "samples-000000000144 is damaged (open_clip_model.safetensors); passing over it"
        in capsys.readouterr().err
    )
    found = load_file(newest(run.folder) / "open_clip_model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny_model, icon_shards, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        UserError,
        match=r"\d+ training images are fewer than one batch of 5000; pass a smaller --global_batch_size",
    ):
        fit(recipe(tiny_model, icon_shards, run, global_batch_size=5000), World(), no_validation)
    with pytest.raises(
        UserError,
        match="--global_batch_size 25 cannot be shared evenly by 2 ranks; pass --global_batch_size 24",
    ):
        check_batch(recipe(tiny_model, icon_shards, run, global_batch_size=25), 100, World(0, 2))
    with pytest.raises(UserError, match="no model 'x'"):
        fit(recipe("x:none", icon_shards, run), World(), no_validation)
    with pytest.raises(UserError, match="no logit_bias, which --loss siglip adds"):
        fit(recipe(tiny_model, icon_shards, run, loss="siglip"), World(), no_validation)
    assert not run.exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    with pytest.raises(UserError, match="there already, and not a run"):
        fit(recipe(tiny_model, icon_shards, tmp_path / "letters"), World(), no_validation)
    with pytest.raises(UserError, match="there already, and not a run"):
        fit(recipe(tiny_model, icon_shards, tmp_path / "letters" / "a.txt"), World(), no_validation)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        fit(recipe(tiny_model, tmp_path / "letters" / "a.txt", run), World(), no_validation)


def test_another_recipe_does_not_go_on_with_a_run(undisturbed, dropout_model, icon_shards):
    with pytest.raises(UserError, match=r"epochs: 4 before, 9 now.*pass another --run"):
        fit(recipe(dropout_model, icon_shards, undisturbed[0], epochs=9), World(), no_validation)


def test_a_kill_between_a_checkpoint_and_its_link_leaves_the_right_best(tiny_model, icon_shards, tmp_path):
    scores = iter([0.1, 0.3, 0.2, 0.4])
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=3, workers=0, save_every_minutes=9)
    run = fit(plan, World(), lambda clip, world: {"val/mean/R@1": next(scores)})
    link = run.folder / "checkpoints" / "best"
    assert link.readlink().name == newest(run.folder).name
    link.unlink()
    link.symlink_to("samples-000000000288")
    (run.folder / "status.json").unlink()
    fit(plan, World(), no_validation)
    assert link.readlink().name == newest(run.folder).name


def test_other_data_does_not_go_on_with_a_run_but_moved_data_does(
    tiny_model, icon_shards, icon_folder, tmp_path
):
    plan = {"model": tiny_model, "run": tmp_path / "run", "epochs": 1, "workers": 0}
    fit(recipe(data=icon_shards, **plan), World(), no_validation)
    (tmp_path / "run" / "status.json").unlink()
    build_icons(icon_folder, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"not the shards that .* began with"):
        fit(recipe(data=tmp_path / "other", **plan), World(), no_validation)
    moved = shutil.copytree(icon_shards, tmp_path / "moved")
    assert fit(recipe(data=moved, micro_batch_size=24, **plan), World(), no_validation).is_finished


def test_a_group_on_both_sides_of_the_split_is_refused(tiny_model, icon_shards, tmp_path):
    shards = shutil.copytree(icon_shards, tmp_path / "shards")
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["splits"]["val"] = manifest["splits"]["train"]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"\d+ groups are in train and in val"):
        validator(recipe(tiny_model, shards, tmp_path / "run"), World())


def test_mistakes_exit_2_under_torchrun_as_well(tiny_model, icon_shards, tmp_path):
    arguments = flags(
        recipe(tiny_model, icon_shards, tmp_path / "run", global_batch_size=5000), tmp_path / "recipe.yaml"
    )
    assert_mistake(call(*arguments, expect=2), "error:", "fewer than one batch of 5000")
    result = call(*arguments, ranks=2, expect=1)  # torchrun's own code
    assert result.stderr.count("fewer than one batch of 5000") == 1
    assert "exitcode  : 2" in result.stderr


def test_what_one_rank_finds_ends_all_of_them(tiny_model, icon_shards, tmp_path):
    """Each rank verifies its part of the shards: the second rank's is altered, and the first must not wait
    for ever.
    """
    shards = shutil.copytree(icon_shards, tmp_path / "shards")
    with open(shards / "train" / "train-000001.tar", "r+b") as file:
        file.write(b"x")
    arguments = flags(recipe(tiny_model, shards, tmp_path / "run"), tmp_path / "recipe.yaml")
    result = call(*arguments, ranks=2, expect=1)
    assert result.stderr.count("error: on rank 1: ") == 1
    assert "train-000001.tar: altered since it was built" in result.stderr
    assert not (tmp_path / "run").exists()


def test_shards_without_validation_train_and_keep_the_newest(tiny_model, icon_shards, icon_folder, tmp_path):
    build_icons(icon_folder, tmp_path / "shards", val=0.0)
    plan = recipe(tiny_model, tmp_path / "shards", tmp_path / "run", epochs=1, workers=0)
    run = fit(plan, World(), validator(plan, World()))
    assert (run.folder / "checkpoints" / "best").readlink().name == newest(run.folder).name
