"""Precision and readers fit the device by default; in one precision, training and evaluation agree."""

import json

import pytest
import torch
from runs import metrics, recipe, trained

from data_prep.errors import UserError
from eval.embed import load_for_eval, precision_of
from eval.options import INFERENCE, MOST_READERS, Inference
from eval.retrieval.command import retrieval
from train import device as device_module
from train.device import use_bf16
from train.world import World

CUDA = torch.device("cuda")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_validation_in_training_and_eval_retrieval_give_the_same_figures(
    tiny_model, icon_shards, tmp_path, precision
):
    plan = recipe(
        tiny_model,
        icon_shards,
        tmp_path / "run",
        epochs=1,
        precision=precision,
        micro_batch_size=24,
        workers=0,
        ema=0.9,
    )
    run = trained(plan)
    state = json.loads((run.folder / "checkpoints" / "best" / "state.json").read_text())
    prefix = "" if state["weights"] == "trained" else "ema/"
    lines = [line for line in metrics(run.folder) if "val/mean/R@1" in line]
    (logged,) = [line for line in lines if line["samples"] == state["samples"]]
    inference = Inference(batch_size=24, workers=0, precision=precision)
    retrieval(str(run.folder), icon_shards, "val", json=tmp_path / "out.json", inference=inference)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["precision"] == precision
    compared = {name for name in result["metrics"] if f"{prefix}val/{name}" in logged}
    assert {"mean/R@1", "image_to_text/mean_rank", "instance/text_to_image/MRR"} <= compared
    for name in compared:
        assert result["metrics"][name] == logged[f"{prefix}val/{name}"], name


def test_auto_is_fp32_on_a_cpu_and_bf16_where_a_gpu_has_it(tiny_model, monkeypatch):
    assert precision_of(load_for_eval(tiny_model, INFERENCE, World())) == "fp32"
    assert precision_of(load_for_eval(tiny_model, Inference(precision="bf16"), World())) == "bf16"
    for has_it in (True, False):
        monkeypatch.setattr(device_module, "has_bf16", lambda _, has_it=has_it: has_it)
        assert use_bf16("auto", CUDA) == has_it
        assert not use_bf16("auto", torch.device("cpu"))
        assert not use_bf16("fp32", CUDA)


@pytest.mark.parametrize(
    ("cores", "ranks", "readers"),
    [(1, 1, 1), (2, 1, 2), (16, 1, 16), (96, 1, MOST_READERS), (16, 8, 2), (4, 8, 1)],
)
def test_readers_by_cores(monkeypatch, cores, ranks, readers):
    monkeypatch.setattr("data_prep.cores.cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert Inference().readers == readers
    assert Inference(workers=5).readers == 5
    with pytest.raises(UserError, match="--workers -1: must be auto or at least 0"):
        Inference(workers=-1)
