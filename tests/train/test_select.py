"""A checkpoint exports the weights that validated best; which ones changes no step of the training."""

import shutil
from pathlib import Path
from shlex import quote

import pytest
import torch
from conftest import assert_mistake, build_icons, call_here
from runs import (
    CANDIDATES,
    WEIGHTS,
    assert_bit_equal,
    assert_equal_weights,
    checkpoint,
    exported,
    fit_on_ranks,
    flags,
    metrics,
    newest,
    poison,
    recipe,
    state_of,
    trained,
)
from safetensors.torch import load_file

from data_prep.errors import UserError
from eval.compare.wise_ft import mix
from eval.validation import validator
from train.__main__ import main, summary
from train.metrics import DIRECTIONS, METRICS
from train.model.clip import load
from train.recipe import Recipe, parse
from train.retain.select import Score, WeightSelector
from train.world import World


def returning(*values: dict | float):
    """A validation that gives these metrics, one after the other; a number is R@1 of both directions and the
    mean.
    """
    left = iter(values)
    names = [f"val/{direction}/R@1" for direction in ("mean", *DIRECTIONS)]
    return lambda clip, world: (
        dict(value) if isinstance(value := next(left), dict) else dict.fromkeys(names, value)
    )


def saved(checkpoint: Path, file: str) -> dict[str, torch.Tensor]:
    """Those of training.safetensors or ema.safetensors; the exported weights where that file is missing."""
    path = checkpoint / file
    return load_file(path if path.is_file() else checkpoint / WEIGHTS)


def in_training(checkpoint: Path) -> dict[str, torch.Tensor]:
    return saved(checkpoint, "training.safetensors")


def ema(checkpoint: Path) -> dict[str, torch.Tensor]:
    return saved(checkpoint, "ema.safetensors")


def assert_close(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_ema_equals_its_recursion_and_skips_nonfinite_steps(
    tiny_model, icon_shards, tmp_path, monkeypatch
):
    """Its decay after step t is 1 - (1 + (t - 1)) ** (-2/3), at most that of the recipe, so it is 0 in the
    first step: the initial weights are not in the average.
    """
    poison(monkeypatch, lambda samples: samples == 96)
    options = {"epochs": 2, "workers": 0, "keep_checkpoints": 99, "ema": 0.6, "micro_batch_size": 24}
    run = trained(recipe(tiny_model, icon_shards, tmp_path / "run", **options), returning(*[0.1] * 5))
    expected = {}
    for step in range(1, 13):
        folder = checkpoint(run.folder, 24 * step)
        weights, decay = in_training(folder), min(0.6, 1 - step ** (-2 / 3))
        if step != 5:
            expected = {
                name: decay * expected.get(name, 0.0) + (1 - decay) * tensor.double()
                for name, tensor in weights.items()
            }
        assert_close({name: tensor.float() for name, tensor in expected.items()}, ema(folder))
    assert not torch.equal(weights["visual.proj"], ema(folder)["visual.proj"])


@pytest.fixture(scope="module")
def candidates_run(tiny_model, icon_shards, tmp_path_factory) -> Path:
    """A run with all kinds of candidates and all its checkpoints."""
    folder = tmp_path_factory.mktemp("candidates") / "run"
    trained(recipe(tiny_model, icon_shards, folder, workers=0, keep_checkpoints=99, **CANDIDATES))
    return folder


@pytest.mark.parametrize("samples", [120, 288], ids=["within an epoch", "after an epoch"])
def test_resumed_equals_uninterrupted(candidates_run, tiny_model, icon_shards, tmp_path, samples):
    """Whichever weights the last checkpoint exports."""
    parts = shutil.copytree(candidates_run, tmp_path / "run", symlinks=True)
    for folder in (parts / "checkpoints").glob("samples-*"):
        if int(folder.name[8:]) > samples:
            shutil.rmtree(folder)
    (parts / "status.json").unlink()
    trained(recipe(tiny_model, icon_shards, parts, workers=0, keep_checkpoints=99, **CANDIDATES))
    assert_bit_equal(candidates_run, parts)
    files = [{path.name for path in newest(run).iterdir()} for run in (candidates_run, parts)]
    assert files[0] == files[1]
    for weights in (in_training, ema):
        assert_equal_weights(weights(newest(candidates_run)), weights(newest(parts)))


def test_candidates_do_not_change_the_training(candidates_run, tiny_model, icon_shards, tmp_path):
    """Bit for bit: weights and metrics equal those of a run without candidates."""
    trained(recipe(tiny_model, icon_shards, tmp_path / "run", workers=0))
    assert_equal_weights(exported(newest(tmp_path / "run")), in_training(newest(candidates_run)))
    assert not (newest(tmp_path / "run") / "training.safetensors").exists()
    of_candidates = ("ema/", "wise_ft-")
    assert metrics(tmp_path / "run") == [
        {key: line[key] for key in line if not key.startswith(of_candidates)}
        for line in metrics(candidates_run)
    ]


def test_a_run_is_its_best_candidate_of_all_validations(candidates_run):
    scores = {}
    for line in metrics(candidates_run):
        for key, value in line.items():
            if key.endswith("val/mean/R@1") and line["samples"]:
                scores[line["samples"], key.removesuffix("val/mean/R@1")] = value
    assert len(scores) == 4 * 4
    (samples, prefix), best = max(scores.items(), key=lambda item: item[1])
    state = state_of(candidates_run / "checkpoints" / "best")
    assert (state["samples"], state["score"], state["best"]) == (samples, [True, best], [True, best])
    assert state["weights"] == (prefix[:-1].replace("wise_ft-", "wise_ft ") or "trained")


@pytest.mark.parametrize(("number", "alpha"), [(0, None), (1, 1.0), (2, 0.3), (3, 0.7)])
def test_exported_weights_are_trained_ema_or_what_eval_mixes(
    tiny_model, icon_shards, tmp_path, number, alpha
):
    scores = [0.0, 0.0, 0.0, 0.0]
    scores[number] = 0.5
    options = {"epochs": 1, "workers": 0, "save_every_minutes": 9, "micro_batch_size": 24}
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", **options, **CANDIDATES)
    run = trained(plan, returning(0.0, *scores))
    name = ("trained", "ema", "wise_ft 0.30", "wise_ft 0.70")[number]
    assert state_of(newest(run.folder))["weights"] == name
    assert "is finished" in summary(run)
    assert f"50.0 % in the best checkpoint (after 144 pairs{', ' + name if number else ''})" in summary(run)
    loaded = load(str(run.folder)).towers.model.state_dict()
    if alpha is None:
        assert not (newest(run.folder) / "training.safetensors").exists()
        return
    averaged = load(tiny_model)
    averaged.towers.model.load_state_dict(ema(newest(run.folder)))
    assert_close(mix(load(tiny_model), averaged, alpha).towers.model.state_dict(), loaded)
    assert not torch.equal(loaded["visual.proj"], in_training(newest(run.folder))["visual.proj"])


def test_the_end_says_what_went_wrong_and_what_can_be_copied(
    tiny_model, icon_folder, tmp_path, capsys, monkeypatch
):
    """A run that made the model worse, one on shards without val and test; in folders with a space."""
    folder, shards = tmp_path / "my runs", tmp_path / "my shards"
    build_icons(icon_folder, shards)
    options = {"epochs": 1, "workers": 0, "micro_batch_size": 24, "log": ("tensorboard",)}
    for name, scores in (("worse", (0.5, 0.25)), ("better", (0.25, 0.5))):
        run = trained(recipe(tiny_model, shards, folder / name, **options), returning(*scores))
        is_worse = "worse than before training (val/mean/R@1); lower --optim.lr (now 0.001)" in summary(run)
        assert is_worse == (name == "worse"), summary(run)
    place = quote(str(folder / "better"))
    assert f"eval retrieval {place} --data {quote(str(shards))} --split test" in summary(run)
    assert f"tensorboard --logdir {place}" in summary(run)
    build_icons(icon_folder, tmp_path / "one split", val=0, test=0)
    plan = recipe(tiny_model, tmp_path / "one split", folder / "all", **options)
    monkeypatch.setattr("sys.argv", flags(plan, tmp_path / "plan.yaml"))
    capsys.readouterr()
    main()
    printed = capsys.readouterr().out
    assert "no val split, so nothing is validated" in printed
    assert "no validation" in printed
    assert "--split" not in printed


def test_with_alpha_0_nothing_worse_than_the_initial_weights_is_exported(
    tiny_model, icon_shards, tmp_path, capfd
):
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=2, workers=0, wise_ft=(0.0,))
    run = trained(plan, returning(0.5, *(0.4, 0.5), *(0.3, 0.5)))  # initial; trained and mixture, twice
    best = run.folder / "checkpoints" / "best"
    assert state_of(best)["weights"] == "wise_ft 0.00"
    assert_equal_weights(exported(best), load(tiny_model).towers.model.state_dict())
    assert not torch.equal(in_training(best)["visual.proj"], exported(best)["visual.proj"])
    assert "worse than before" not in summary(run)
    printed = "".join(capfd.readouterr())
    name = "image_to_text/R@1"
    assert f"after 1 epoch: val/{name} 40.0 %" in printed, "of the trained weights"
    assert f"wise_ft-0.00/val/{name} 50.0 %" in printed, "and of the exported ones"


def test_a_run_has_the_metrics_that_were_logged_for_its_weights(tiny_model, icon_shards, tmp_path):
    """Of a WiSE-FT mixture; it is selected because the trained weights are given a score of -1."""
    options = {"epochs": 1, "workers": 0, "micro_batch_size": 24, "save_every_minutes": 9}
    options |= {"wise_ft": (0.01, 0.5), "retention_set": str(icon_shards)}
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", **options)
    validate, calls = validator(plan, World()), []

    def without_trained(clip, world):
        calls.append(clip)
        return validate(clip, world) | ({"val/mean/R@1": -1.0} if len(calls) == 2 else {})

    run = trained(plan, without_trained)
    weights, logged = state_of(newest(run.folder))["weights"], metrics(run.folder)[-1]
    assert weights in ("wise_ft 0.01", "wise_ft 0.50")
    for metric, value in validate(load(str(run.folder)), World()).items():
        assert logged[f"{weights.replace(' ', '-')}/{metric}"] == pytest.approx(value, abs=1e-6), metric
    assert logged["wise_ft-0.50/retention/mean/R@1"] == logged["wise_ft-0.50/val/mean/R@1"]
    assert f", {weights})" in summary(run)


def test_a_candidate_whose_retention_drops_ranks_behind_one_that_retains(tiny_model, icon_shards, tmp_path):
    def found(val: float, retention: float) -> dict:
        return {"val/mean/R@1": val, "retention/mean/R@1": retention}

    options = {"epochs": 3, "workers": 0, "save_every_minutes": 9, "keep_checkpoints": 9}
    options |= {"wise_ft": (0.5,), "retention_set": "x", "max_retention_drop": 0.005}
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", **options)
    epochs = [  # trained weights, mixture
        (found(0.9, 0.5), found(0.2, 0.55)),  # both drop too much: the one that drops least
        (found(0.9, 0.594), found(0.3, 0.595)),  # half a point is the limit
        (found(0.9, 0.594), found(0.2, 0.7)),  # it retains, but is no better than the mixture before it
    ]
    run = trained(plan, returning(found(0.1, 0.6), *(metrics for both in epochs for metrics in both)))
    states = [state_of(checkpoint(run.folder, samples)) for samples in (144, 288, 432)]
    assert [state["weights"] for state in states] == ["wise_ft 0.50"] * 3
    assert [state["score"] for state in states] == [[False, 0.55], [True, 0.3], [True, 0.2]]
    assert [state["best"] for state in states] == [[False, 0.55], [True, 0.3], [True, 0.3]]
    assert [state["initial_retention"] for state in states] == [0.6] * 3
    assert (run.folder / "checkpoints" / "best").readlink().name == "samples-000000000288"

    (run.folder / "status.json").unlink()
    for samples in (288, 432):
        shutil.rmtree(checkpoint(run.folder, samples))
    again = trained(plan, returning(*(metrics for both in epochs[1:] for metrics in both)))
    assert state_of(newest(again.folder)) == states[-1]


def test_a_checkpoint_before_any_validation_has_no_score(tiny_model, icon_shards, tmp_path):
    """null in state.json, which JSON has instead of -Infinity."""
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, workers=0, keep_checkpoints=9)
    run = trained(plan, returning(0.1, 0.2))
    first, last = (state_of(checkpoint(run.folder, samples)) for samples in (24, 144))
    assert (first["score"], first["best"], first["best_checkpoint"]) == (None, None, "samples-000000000024")
    assert (last["score"], last["best"]) == ([True, 0.2], [True, 0.2])
    assert (first["weights"], first["initial_retention"]) == ("trained", None)


def test_the_lowest_rank_is_the_best(tiny_model):
    metric = "val/text_to_image/mean_rank"
    selector = WeightSelector(load(tiny_model), Recipe("m", "d", "r", best_metric=metric))
    assert selector.score({metric: 2.0}) > selector.score({metric: 3.0})
    metric = "val/text_to_image/MRR"
    selector = WeightSelector(load(tiny_model), Recipe("m", "d", "r", best_metric=metric))
    assert selector.score({metric: 0.2}) < selector.score({metric: 0.3}) == Score(True, 0.3)


def test_every_metric_is_known_to_be_better_high_or_low(tiny_model, icon_shards, tmp_path):
    validate = validator(recipe(tiny_model, icon_shards, tmp_path / "run", workers=0), World())
    names = validate(load(tiny_model), World())
    assert all(name.rpartition("/")[2] in METRICS for name in names)
    parse(["--model", "m", "--data", "d", "--run", "r", "--best-metric", "val/mean/R@1"])


def test_an_unknown_metric_or_no_validation_is_an_error_before_training(tiny_model, icon_shards, tmp_path):
    for metric, hint in (
        ("recall", "valid: val/image_to_text/R@1, "),
        ("val/mean/R1", "did you mean val/mean/R@1?"),
    ):
        plan = recipe(tiny_model, icon_shards, tmp_path / "run", best_metric=metric)
        assert_mistake(
            call_here(main, *flags(plan, tmp_path / "recipe.yaml")[1:]),
            f"--best-metric {metric}: not a metric of this run's validation; {hint}",
        )
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", retention_set=str(tmp_path))
    assert_mistake(call_here(main, *flags(plan, tmp_path / "recipe.yaml")[1:]), "no manifest.json")
    train_alone = shutil.copytree(icon_shards, tmp_path / "train_alone")
    manifest = (train_alone / "manifest.json").read_text()
    renamed = manifest.replace('"val"', '"other"').replace('"test"', '"another"')
    (train_alone / "manifest.json").write_text(renamed)
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", retention_set=str(train_alone))
    assert_mistake(
        call_here(main, *flags(plan, tmp_path / "recipe.yaml")[1:]),
        f"--retention-set {train_alone}: has no images in the splits val and test",
        "--val 0.1",
    )
    without_val = shutil.copytree(icon_shards, tmp_path / "without_val")
    manifest = (without_val / "manifest.json").read_text()
    (without_val / "manifest.json").write_text(manifest.replace('"val"', '"other"'))
    with pytest.raises(UserError, match="has no val split, which --ema"):
        validator(recipe(tiny_model, without_val, tmp_path / "run", ema=0.9), World())
    assert validator(recipe(tiny_model, without_val, tmp_path / "run"), World())(None, World()) == {}
    assert not (tmp_path / "run").exists()
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", workers=0, best_metric="val/other")
    expected = "--best-metric val/other: not a metric of this run's validation; "
    with pytest.raises(UserError, match=expected):
        trained(plan, returning(0.1))


@pytest.mark.parametrize(
    "option",
    ["--ema 1", "--wise-ft 0.5 1.0", "--wise-ft -0.1", "--wise-ft 0.501 0.502", "--max-retention-drop 0.005"],
)
def test_a_value_out_of_range_is_an_error(option):
    with pytest.raises(UserError, match=option.split()[0]):
        parse(["--model", "a:none", "--data", "d", "--run", "r", *option.split()])


def test_two_ranks_select_among_the_same_weights_as_one(tiny_model, icon_shards, tmp_path):
    averages = []
    for ranks, micro_batch_size in ((1, 24), (2, 6)):
        run = tmp_path / str(ranks)
        options = {"epochs": 2, "micro_batch_size": micro_batch_size, "workers": 0, "save_every_minutes": 9}
        options |= {"lora_rank": 2, "retention_set": str(icon_shards)}
        fit_on_ranks(recipe(tiny_model, icon_shards, run, **options, **CANDIDATES), ranks)
        averages.append(ema(newest(run)))
        assert sum("wise_ft-0.70/retention/mean/R@1" in line for line in metrics(run)) == 2
    assert all(torch.allclose(averages[0][name], averages[1][name], atol=1e-4) for name in averages[0])
