"""`deterministic: true`: compiled code is made for the same sizes in every process, and an operation that
cannot be deterministic is named.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, save_tiny
from runs import assert_bit_equal, no_validation, recipe, trained
from torch._dynamo.utils import counters

from data_prep.errors import UserError
from train.determinism import explained, set_deterministic
from train.loop import fit
from train.model.activation_memory import apply_checkpointing
from train.recipe import Captions, Recipe
from train.run.folder import Run
from train.setup import setup
from train.step import train_step
from train.world import World


@pytest.fixture
def plan(tmp_path, icon_shards, one_thread) -> Recipe:
    """Uneven chunks, and batches of several lengths, which a resumed process sees from the middle."""
    model = model_of(tmp_path, image_layers=2)
    small = {"global_batch_size": 12, "micro_batch_size": 5, "epochs": 1, "workers": 0}
    small |= {"patch_dropout": 0.5}  # sequences of images are shorter than those compiled for
    long = "a small image of {} as it is on a page of many icons for a program"
    captions = Captions(templates=(*["{}"] * 11, long))  # a third of the batches have short captions alone
    found = recipe(model, icon_shards, tmp_path / "whole", captions=captions, compile="always", **small)
    yield replace(found, deterministic=True)
    set_deterministic(False)
    torch.compiler.reset()


def model_of(folder: Path, image_layers: int) -> str:
    """A MODEL with two blocks in its text tower; a tower of one block is not compiled."""
    vision = {**TINY["vision_cfg"], "layers": image_layers}
    text = {**TINY["text_cfg"], "context_length": 40, "layers": 2}
    return f"local-dir:{save_tiny(folder, vision_cfg=vision, text_cfg=text)}"


def text_only(plan: Recipe, folder: Path) -> Recipe:
    """With one compiled tower, and without chunks."""
    (folder / "text").mkdir()
    model = model_of(folder / "text", image_layers=1)
    return replace(plan, model=model, patch_dropout=0.0, micro_batch_size=plan.global_batch_size)


def count_graphs(plan: Recipe, steps: int) -> tuple[int, int, set[int]]:
    """Compiled graphs before the first step and after `steps`, and the lengths of the captions between."""
    torch.compiler.reset()
    counters.clear()
    state = setup(plan, None, World())
    before = counters["stats"]["unique_graphs"]
    state.towers.train()
    lengths = set()
    for _ in range(steps):
        batch = next(state.batches)
        lengths.add(batch.tokens.shape[1])
        train_step(state, batch)
    after = counters["stats"]["unique_graphs"]
    apply_checkpointing(state.clip.towers.model, "none", compiled=False)
    return before, after, lengths


def test_nothing_is_compiled_for_the_sizes_of_a_batch(plan, tmp_path, monkeypatch):
    """Torch's own kernels, so that no C++ is compiled; which graphs are made is the same."""
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **_: compile_in_place(self, backend="aot_eager")
    )
    before, after, lengths = count_graphs(plan, 6)
    assert len(lengths) > 1
    assert (before > 0, after) == (True, before)
    before, after, _ = count_graphs(replace(text_only(plan, tmp_path), deterministic=False), 1)
    assert (before, after > 0) == (0, True)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_with_compiled_code(plan, tmp_path):
    plan = text_only(plan, tmp_path)  # C++ of a quarter as many graphs is compiled
    whole = trained(plan, no_validation)
    stopped = replace(plan, run=str(tmp_path / "stopped"), save_every_minutes=9)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "stop").touch()  # after the first step
    fit(stopped, World(), no_validation)
    assert Run(stopped, World()).samples == 12
    resumed = trained(replace(stopped, save_every_minutes=0.0), no_validation)
    assert_bit_equal(whole.folder, resumed.folder)


def test_an_operation_without_a_deterministic_implementation_is_a_sentence():
    with (
        pytest.raises(UserError, match=r"cumsum.* on this device; resume with --no-deterministic"),
        explained(),
    ):
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set"
            " 'torch.use_deterministic_algorithms(True)'."
        )
    with pytest.raises(RuntimeError, match="another"), explained():
        raise RuntimeError("another")


def test_the_key_may_change_when_a_run_is_resumed_and_is_recorded(tiny_model, icon_shards, tmp_path):
    short = {"epochs": 1, "workers": 0, "micro_batch_size": 24, "deterministic": True}
    run = trained(recipe(tiny_model, icon_shards, tmp_path / "run", **short), no_validation)
    try:
        assert run._environment()["deterministic"]
        (run.folder / "status.json").unlink()
        trained(replace(run.recipe, deterministic=False), no_validation)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        set_deterministic(False)
