"""Steps that wait for their data are spoken of once, with what to do."""

import torch

from train.model.clip import load
from train.optim import build_optimizer
from train.recipe import Recipe
from train.retain.select import WeightSelector
from train.run.folder import Run
from train.run.logger import Logger, cores_per_rank, data_wait_advice
from train.world import World


def test_the_advice_fits_the_machine(monkeypatch):
    assert (
        data_wait_advice(0.071, workers=4, cores=16)
        == "the data wait is 7 % of the step: pass --workers 8 (there are 16 cores per rank, --workers is 4)"
    )
    assert "pass --workers 1 " in data_wait_advice(0.3, workers=0, cores=2)
    assert "pass --workers 6 " in data_wait_advice(0.3, workers=4, cores=6)
    assert "all 4 cores per rank have a worker" in data_wait_advice(0.3, workers=4, cores=4)
    alone = cores_per_rank()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))
    assert cores_per_rank() == 1


def test_a_wait_is_said_once_and_not_of_the_start(tmp_path, capsys):
    recipe = Recipe("demo-vit:none", "unused", str(tmp_path / "run"), workers=0, log_every_steps=2)
    run = Run(recipe, World())
    clip = load("demo-vit:none")
    run.start(WeightSelector(clip, recipe), build_optimizer(clip.towers, recipe.optim))
    said = []
    with Logger(run, 0, 100, 100, World()) as log:
        log.say = said.append
        for step, data_s in enumerate([0.9, 0.9, 0.01, 0.01, 0.03, 0.03, 0.5, 0.5]):
            log.step(10 * (step + 1), 10, torch.zeros(()), {}, data_s, 1.0)
            assert len(said) == (step >= 5), step
    run.close()
    assert "the data wait is 3 % of the step" in said[0]
