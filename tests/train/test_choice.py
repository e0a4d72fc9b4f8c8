"""What a run gives away is what was validated as the best; choosing it changes no step of the training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_mistake, call, call_here
from safetensors.torch import load_file
from test_bad_steps import poison
from test_loop import assert_bit_equal, flags, metrics, newest, recipe

from data_prep.errors import UserError
from eval.compare.wise_ft import mix
from train.__main__ import closing_words, main, validator
from train.loop import fit
from train.metrics import DIRECTIONS, METRICS
from train.model.clip import load
from train.recipe import Recipe, parse
from train.retain.select import Score, WeightSelector
from train.world import World

WEIGHTS = "open_clip_model.safetensors"


def trained(plan: Recipe, **validations):
    """The finished run of `plan`."""
    run = fit(plan, World(), validations.get("validate") or validator(plan, World()))
    assert run.is_finished
    return run


def scores(*values: dict | float):
    """A validation that finds these values, one after the other; a number is that of R@1 both ways and on the
    average.
    """
    left = iter(values)
    names = [f"val/{direction}/R@1" for direction in ("mean", *DIRECTIONS)]
    return lambda clip, world: (
        dict(value) if isinstance(value := next(left), dict) else dict.fromkeys(names, value)
    )


def weights_in_training(checkpoint: Path) -> dict[str, torch.Tensor]:
    file = checkpoint / "training.safetensors"
    return load_file(file if file.is_file() else checkpoint / WEIGHTS)


def average(checkpoint: Path) -> dict[str, torch.Tensor]:
    file = checkpoint / "ema.safetensors"
    return load_file(file if file.is_file() else checkpoint / WEIGHTS)


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def assert_close(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_average_is_the_recursion_and_a_step_that_is_left_out_moves_nothing(
    tiny_model, icon_shards, tmp_path, monkeypatch
):
    """Decay 1 - (1 + (t - 1)) ** (-2/3) after step t, at most `ema`; nothing of the first weights is in it."""
    poison(monkeypatch, lambda samples: samples == 96)
    plan = recipe(
        tiny_model, icon_shards, tmp_path / "run", epochs=2, workers=0, keep_checkpoints=99, ema=0.6
    )
    run = trained(plan, validate=scores(*[0.1] * 5))
    expected = {}
    for step in range(1, 13):
        checkpoint = run.folder / "checkpoints" / f"samples-{24 * step:012d}"
        now, decay = weights_in_training(checkpoint), min(0.6, 1 - step ** (-2 / 3))
        if step != 5:
            expected = {
                name: decay * expected.get(name, 0.0) + (1 - decay) * tensor.double()
                for name, tensor in now.items()
            }
        assert_close({name: tensor.float() for name, tensor in expected.items()}, average(checkpoint))
    assert not torch.equal(now["visual.proj"], average(checkpoint)["visual.proj"])


WISHES = {"ema": 0.9, "wise_ft": (0.3, 0.7)}


@pytest.fixture(scope="module")
def wishful(tiny_model, icon_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wishful")
    plan = recipe(tiny_model, icon_shards, folder / "run", keep_checkpoints=99, **WISHES)
    call(*flags(plan, folder / "recipe.yaml"))
    return folder / "run"


@pytest.mark.parametrize("goes_on_from", [120, 288])
def test_resumed_equals_uninterrupted_whatever_is_given_away(wishful, tmp_path, goes_on_from):
    parts = shutil.copytree(wishful, tmp_path / "run", symlinks=True)
    for checkpoint in (parts / "checkpoints").glob("samples-*"):
        if int(checkpoint.name[8:]) > goes_on_from:
            shutil.rmtree(checkpoint)
    (parts / "status.json").unlink()
    call("train", parts / "recipe.yaml", "--run", parts)
    assert_bit_equal(wishful, parts)
    for file in newest(wishful).iterdir():
        assert (newest(parts) / file.name).is_file()
    for read in (weights_in_training, average):
        one, two = read(newest(wishful)), read(newest(parts))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_weights_in_training_are_those_of_a_run_without_a_choice(
    wishful, tiny_model, icon_shards, tmp_path, one_thread
):
    trained(recipe(tiny_model, icon_shards, tmp_path / "run", workers=0))
    one, two = load_file(newest(tmp_path / "run") / WEIGHTS), weights_in_training(newest(wishful))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (newest(tmp_path / "run") / "training.safetensors").exists()
    mine = ("ema/", "mixture-")
    assert metrics(tmp_path / "run") == [
        {key: line[key] for key in line if not key.startswith(mine)} for line in metrics(wishful)
    ]


def test_a_run_loads_as_its_best_candidate(wishful, tiny_model):
    """Which of all that were validated has the highest score; its weights are those that eval mixes, and
    score what was logged.
    """
    found = {}
    for line in metrics(wishful):
        for key, value in line.items():
            if key.endswith("val/mean/R@1") and line["samples"]:
                found[line["samples"], key.removesuffix("val/mean/R@1")] = value
    assert len(found) == 4 * 4
    (samples, prefix), best = max(found.items(), key=lambda item: item[1])
    checkpoint = wishful / "checkpoints" / "best"
    state = state_of(checkpoint)
    assert (state["samples"], state["score"], state["best"]) == (samples, best, best)
    assert state["weights"] == (prefix[:-1].replace("mixture-", "mixture ") or "trained")


@pytest.mark.parametrize(("place", "share"), [(0, None), (1, 1.0), (2, 0.3), (3, 0.7)])
def test_the_chosen_weights_are_the_average_or_its_mixture_with_the_base(
    tiny_model, icon_shards, tmp_path, place, share
):
    finds = [0.0, 0.0, 0.0, 0.0]
    finds[place] = 0.5
    plan = recipe(
        tiny_model, icon_shards, tmp_path / "run", epochs=1, workers=0, save_every_minutes=9, **WISHES
    )
    run = trained(plan, validate=scores(0.0, *finds))
    name = ("trained", "ema", "wise_ft 0.30", "wise_ft 0.70")[place]
    assert state_of(newest(run.folder))["weights"] == name
    given = load(str(run.folder))
    if share is None:
        assert not (newest(run.folder) / "training.safetensors").exists()
        return
    averaged = load(tiny_model)
    averaged.towers.model.load_state_dict(average(newest(run.folder)))
    assert_close(
        mix(load(tiny_model), averaged, share).towers.model.state_dict(), given.towers.model.state_dict()
    )
    assert not torch.equal(
        given.towers.model.visual.proj, weights_in_training(newest(run.folder))["visual.proj"]
    )
    words = closing_words(run)
    assert "is finished" in words


def test_what_was_logged_of_a_mixture_is_what_the_run_scores(tiny_model, icon_shards, tmp_path):
    """One epoch at a rate that ruins the weights: a mixture near the base, on a control set, is what is left
    to choose.
    """
    plan = recipe(
        tiny_model,
        icon_shards,
        tmp_path / "run",
        epochs=1,
        workers=0,
        wise_ft=(0.01, 0.5),
        retention_set=str(icon_shards),
    )
    validate = validator(plan, World())
    run = trained(plan, validate=validate)
    state = state_of(newest(run.folder))
    prefix = {"trained": "", "wise_ft 0.01": "wise_ft-0.01/", "wise_ft 0.50": "wise_ft-0.50/"}[
        state["weights"]
    ]
    logged = metrics(run.folder)[-1]
    for metric, value in validate(load(str(run.folder)), World()).items():
        assert logged[prefix + metric] == pytest.approx(value, abs=1e-6), metric
    assert logged["retention/mean/R@1"] == logged["val/mean/R@1"]
    assert f", of the {state['weights']}" in closing_words(run) or state["weights"] == "trained"


def test_a_candidate_that_forgot_is_behind_one_that_did_not(tiny_model, icon_shards, tmp_path):
    def found(val, control):
        return {"val/mean/R@1": val, "retention/mean/R@1": control}

    plan = recipe(
        tiny_model,
        icon_shards,
        tmp_path / "run",
        epochs=3,
        workers=0,
        wise_ft=(0.5,),
        control="x",
        max_retention_drop=0.005,
    )
    plan = Recipe(**{**vars(plan), "save_every_minutes": 9.0, "keep_checkpoints": 9})
    epochs = [
        (found(0.9, 0.5), found(0.2, 0.55)),  # both forgot: the one that forgot less
        (found(0.9, 0.594), found(0.3, 0.595)),  # half a point is what may go
        (found(0.9, 0.594), found(0.2, 0.7)),  # it keeps, but is no better than that one
    ]
    validate = scores(found(0.1, 0.6), *(each for both in epochs for each in both))
    run = trained(plan, validate=validate)
    states = [state_of(run.folder / "checkpoints" / f"samples-{samples:012d}") for samples in (144, 288, 432)]
    assert [state["weights"] for state in states] == ["wise_ft 0.50"] * 3
    assert [(state["keeps"], state["score"]) for state in states] == [(False, 0.55), (True, 0.3), (True, 0.2)]
    assert [state["base_control"] for state in states] == [0.6] * 3
    assert (run.folder / "checkpoints" / "best").readlink().name == "samples-000000000288"

    (run.folder / "status.json").unlink()
    for samples in (288, 432):
        shutil.rmtree(run.folder / "checkpoints" / f"samples-{samples:012d}")
    again = trained(plan, validate=scores(*(each for both in epochs[1:] for each in both)))
    assert state_of(newest(again.folder)) == states[-1]


def test_of_ranks_the_lowest_is_the_best(tiny_model):
    choice = WeightSelector(
        load(tiny_model), Recipe("m", "d", "r", best_metric="val/text_to_image/mean_rank")
    )
    assert choice.score({"val/text_to_image/mean_rank": 2.0}) > choice.score(
        {"val/text_to_image/mean_rank": 3.0}
    )
    choice = WeightSelector(load(tiny_model), Recipe("m", "d", "r", best_metric="val/text_to_image/MRR"))
    assert (
        choice.score({"val/text_to_image/MRR": 0.2})
        < choice.score({"val/text_to_image/MRR": 0.3})
        == Score(True, 0.3)
    )


def test_every_metric_is_known_to_be_better_high_or_low(tiny_model, icon_shards, tmp_path):
    """What is none of these in a new version of the metrics would be taken for better high."""
    names = validator(recipe(tiny_model, icon_shards, tmp_path / "run", workers=0), World())(
        load(tiny_model), World()
    )
    assert all(name.rpartition("/")[2] in METRICS for name in names)
    parse(["--model", "m", "--data", "d", "--run", "r", "--best_metric", "val/mean/R@1"])


def test_a_wrong_name_or_nothing_to_choose_by_ends_it_before_any_training(tiny_model, icon_shards, tmp_path):
    arguments = flags(
        recipe(tiny_model, icon_shards, tmp_path / "run", best_metric="val/mean/R@2"),
        tmp_path / "recipe.yaml",
    )
    assert_mistake(
        call_here(main, *arguments[1:]),
        "--best_metric val/mean/R@2",
        "it can be val/image_to_text/R@1, ",
        "val/mean/R@1",
    )
    control = flags(
        recipe(tiny_model, icon_shards, tmp_path / "run", retention_set=str(tmp_path)),
        tmp_path / "recipe.yaml",
    )
    assert_mistake(call_here(main, *control[1:]), "no manifest.json")
    bare = shutil.copytree(icon_shards, tmp_path / "bare")
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no val split, and --ema"):
        validator(recipe(tiny_model, bare, tmp_path / "run", ema=0.9), World())
    assert validator(recipe(tiny_model, bare, tmp_path / "run"), World())(None, World()) == {}
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        UserError, match="--best_metric val/other: no metric of this run's validation; it can be val/mean/R@1"
    ):
        fit(
            recipe(tiny_model, icon_shards, tmp_path / "run", workers=0, best_metric="val/other"),
            World(),
            scores(0.1),
        )


def test_patience_ends_the_run_and_a_resumed_one(tiny_model, icon_shards, tmp_path):
    plan = recipe(
        tiny_model,
        icon_shards,
        tmp_path / "run",
        epochs=9,
        workers=0,
        keep_checkpoints=9,
        save_every_minutes=9,
        patience_epochs=2,
    )
    run = trained(plan, validate=scores(0.9, 0.1, 0.3, 0.2, 0.3))
    status = json.loads((run.folder / "status.json").read_text())
    assert (status["state"], status["samples"], status["reason"]) == (
        "finished",
        576,
        "no new best in 2 epochs (patience_epochs)",
    )
    assert "576 pairs, no new best in 2 epochs" in closing_words(run)
    for left in ([], [0.2, 0.3]):  # killed after the last checkpoint, and after the one that had the best
        (run.folder / "status.json").unlink()
        for number in range(len(left)):
            shutil.rmtree(run.folder / "checkpoints" / f"samples-{576 - 144 * number:012d}")
        run = trained(plan, validate=scores(*left))
        assert newest(run.folder).name == "samples-000000000576"
        assert json.loads((run.folder / "status.json").read_text())["reason"] == status["reason"]


def test_wrong_values_are_explained():
    for option in (
        "--ema 1",
        "--wise_ft 0.5 1.0",
        "--wise_ft 0.501 0.502",
        "--max_retention_drop 0.005",
        "--patience_epochs -1",
    ):
        with pytest.raises(UserError, match=option.split()[0]):
            parse(["--model", "a:none", "--data", "d", "--run", "r", *option.split()])


def test_two_ranks_choose_what_one_does(tiny_model, icon_shards, tmp_path):
    averages = []
    for ranks, micro_batch_size in ((0, 24), (2, 6)):
        run = tmp_path / str(ranks)
        options = {
            "epochs": 2,
            "micro_batch_size": micro_batch_size,
            "workers": 0,
            "lora_rank": 2,
            "retention_set": str(icon_shards),
        }
        call(
            *flags(recipe(tiny_model, icon_shards, run, **options, **WISHES), tmp_path / "recipe.yaml"),
            ranks=ranks,
        )
        averages.append(average(newest(run)))
        assert (
            len([key for line in metrics(run) for key in line if key == "wise_ft-0.70/retention/mean/R@1"])
            == 2
        )
    assert all(torch.allclose(averages[0][name], averages[1][name], atol=1e-4) for name in averages[0])
