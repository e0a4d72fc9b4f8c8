"""What fits into memory is found by measuring: on the CPU, and on a device that counts, which is simulated
here by counting the CPU's tensors. Where memory runs out, a sentence says what to change.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import TINY, save_tiny
from runs import no_validation, recipe, trained

import train.loop
from data_prep.errors import UserError
from train.loop import fit
from train.model import activation_memory
from train.model.activation_memory import (
    MODES,
    SPARE,
    LiveBytes,
    apply_checkpointing,
    dummy_batch,
    fit_micro_batch,
    less_memory,
    needed_bytes,
    pairs_that_fit,
)
from train.model.clip import load
from train.model.towers import Towers
from train.recipe import Recipe
from train.world import World, joined_world

CPU = torch.device("cpu")
RECIPE = Recipe("tiny:none", "data", "run", global_batch_size=20, precision="fp32", compile="never")


class Device(LiveBytes):
    """A device of `limit` bytes that counts its memory as torch.cuda does, and runs on the CPU."""

    def __init__(self, limit: float, weights: int = 0):
        super().__init__()
        self.limit, self.weights, self.highest = limit, weights, 0

    def _count(self, storage: torch.UntypedStorage) -> None:
        if self.memory_allocated() + storage.nbytes() > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes")
        super()._count(storage)
        self.highest = max(self.highest, self.now)

    def memory_allocated(self, device=None) -> int:
        return self.weights + self.now

    memory_reserved = memory_allocated

    def reset_peak_memory_stats(self, device=None) -> None:
        self.peak = self.now

    def max_memory_allocated(self, device=None) -> int:
        return self.weights + self.peak

    def mem_get_info(self, device=None) -> tuple[int, int]:
        return int(self.limit - self.memory_allocated()), int(self.limit)

    def empty_cache(self) -> None:
        pass


@pytest.fixture
def simulated(monkeypatch):
    """A function that makes a Device and has activation_memory use it."""

    def simulate(limit: float, weights: int = 0) -> Device:
        device = Device(limit, weights)
        monkeypatch.setattr(activation_memory, "counts_memory", lambda _: True)
        monkeypatch.setattr(torch, "get_device_module", lambda _: device)
        return device

    return simulate


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model with few tokens and wide layers: casts of its weights count, as ViT-L/14's do."""
    vision = {"image_size": 32, "layers": 3, "width": 192, "head_width": 64, "patch_size": 16}
    text = {**TINY["text_cfg"], "layers": 3, "width": 128, "heads": 2}
    return save_tiny(tmp_path_factory.mktemp("wide"), vision_cfg=vision, text_cfg=text)


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """A model with many tokens, whose weights are small beside what a pair keeps."""
    vision = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 4}
    return save_tiny(tmp_path_factory.mktemp("long"), vision_cfg=vision)


def towers_of(folder: Path, lock: str = "none") -> Towers:
    towers = load(f"local-dir:{folder}").towers
    towers.lock(lock)
    return towers.train()


def weights_of(towers: Towers) -> int:
    return sum(parameter.nbytes for parameter in towers.parameters())


def trained_of(towers: Towers) -> int:
    return sum(parameter.nbytes for parameter in towers.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_does_not_grow_with_the_pairs_is_told_apart(wide, monkeypatch, mode):
    """Casts of weights, in bf16. Seen as the pairs' own, they would be 3 of 4 bytes of 8 pairs."""
    towers = towers_of(wide)
    towers.bf16 = True
    apply_checkpointing(towers.model, mode, compiled=False)
    at = {n: needed_bytes(towers, mode, n, CPU) for n in (2, 4, 8, 61)}
    each = (at[4] - at[2]) / 2
    assert at[61] == pytest.approx(at[4] + 57 * each, rel=0.002)
    if mode == "none":
        assert at[8] / 8 > 2.5 * each
    free = (at[61] + 3 * trained_of(towers)) / SPARE
    for spare, fits in ((0.4, 61), (-0.6, 60)):  # of a pair
        monkeypatch.setattr(activation_memory, "free_bytes", lambda _, more=spare: free + more * each / SPARE)
        assert pairs_that_fit(towers, mode, World(), 999) == fits


def test_all_tensors_of_a_pass_are_counted_and_forgotten():
    """Two matrices of 4 MB and their product; a view and an operation in place are none more."""
    with LiveBytes() as live:
        first, second = torch.ones(1000, 1000), torch.ones(1000, 1000)
        product = first @ second.T
        product.add_(1)
        assert live.now == live.peak == 12e6
        view = product[:10]
        del product, first
        assert live.now == 8e6
        del view
        assert (live.now, live.peak) == (4e6, 12e6)


def peak_of(towers: Towers, mode: str, n: int, simulated) -> int:
    """What n pairs take at most beside weights and gradients, on a device that has enough."""
    apply_checkpointing(towers.model, mode, compiled=False)
    with simulated(1e12):
        return needed_bytes(towers, mode, n, CPU)


def test_the_choice_is_the_fastest_that_fits(long, simulated):
    """In any memory; what is chosen is measured too, so that no estimate can be wrong."""
    towers, choices = towers_of(long, lock="text"), {}
    need = {mode: peak_of(towers, mode, 20, simulated) for mode in MODES}
    rooms = {"none": need["none"], "selective": need["selective"], "full": need["full"]}
    for name, room in (rooms | {"chunks": 0.35 * need["full"]}).items():
        limit = weights_of(towers) + (3 * trained_of(towers) + 1.02 * room) / SPARE
        device, compile = simulated(limit, weights_of(towers)), "always" if name == "selective" else "never"
        with device:
            plan = dataclasses.replace(RECIPE, compile=compile)
            mode, size = choices[name] = fit_micro_batch(towers, plan, World())
        assert peak_of(towers, mode, size, simulated) <= 1.02 * room
    expected = {name: (name, 20) for name in MODES}
    assert choices == expected | {"chunks": ("full", 7)}  # 7, 7 and 6


def test_a_mode_whose_first_measurement_finds_no_memory_is_passed_over(long, simulated):
    """Here 16 pairs, and 8, are more than there is with "none"."""
    towers = towers_of(long, lock="text")
    room = 0.3 * peak_of(towers, "none", 16, simulated)
    limit = weights_of(towers) + 3 * trained_of(towers) + room
    device = simulated(limit, weights_of(towers))
    with device, pytest.raises(torch.OutOfMemoryError):
        towers(*dummy_batch(towers, 8, CPU))
    for asked, expected in {"auto": "full", "none": "none"}.items():
        with device:
            plan = dataclasses.replace(RECIPE, activation_checkpointing=asked)
            mode, size = fit_micro_batch(towers, plan, World())
        assert mode == expected
        assert 1 <= size < (8 if mode == "none" else 20)
        assert all(parameter.grad is None for parameter in towers.parameters())
    assert device.now < 1e6  # what failed has left nothing behind


def test_where_no_pair_fits_the_other_mode_is_named(long, simulated):
    towers = towers_of(long, lock="text")
    limit = weights_of(towers) + 3 * trained_of(towers) + 0.5 * peak_of(towers, "none", 1, simulated)
    plan = dataclasses.replace(RECIPE, activation_checkpointing="none")
    words = "one pair do not fit into .* pass --activation-checkpointing full, free some, or use a smaller"
    with simulated(limit, weights_of(towers)), pytest.raises(UserError, match=words):
        fit_micro_batch(towers, plan, World())


def test_a_probe_compiles_nothing(long, simulated, monkeypatch):
    """The blocks are compiled once, for the batch that is trained."""
    towers = towers_of(long, lock="text")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    room = 0.8 * peak_of(towers, "none", 20, simulated)
    limit = weights_of(towers) + (3 * trained_of(towers) + room) / SPARE
    with simulated(limit, weights_of(towers)):
        fit_micro_batch(towers, dataclasses.replace(RECIPE, compile="always"), World())
    assert not compiled


def allocates(*_) -> None:
    torch.empty(1 << 50)  # torch's own error for the machine's memory


def exceeds(*_) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore words")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (allocates, r"out of memory \(.*can't allocate memory.*\); "),
        (exceeds, r"out of GPU memory \(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\); "),
    ],
)
def test_out_of_memory_is_a_sentence_and_its_advice_helps(
    tiny_model, icon_shards, tmp_path, monkeypatch, act, words
):
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, workers=0)
    advice = "micro_batch_size is 12 and activation_checkpointing none: pass --micro-batch-size 6 or"
    with monkeypatch.context() as patched:
        patched.setattr(train.loop, "train_step", act)
        with pytest.raises(UserError, match=words + advice) as caught:
            fit(plan, World(), no_validation)
    assert caught.value.exit_code == 2
    assert "--activation-checkpointing full, and the run resumes" in str(caught.value)
    trained(dataclasses.replace(plan, micro_batch_size=6, activation_checkpointing="full"), no_validation)


def test_out_of_memory_without_torchrun_is_a_sentence():
    for act in (allocates, exceeds):
        with (
            pytest.raises(UserError, match=r"out of .*memory .*; pass a smaller --batch-size"),
            joined_world(),
        ):
            act()
    with pytest.raises(RuntimeError, match="another"), joined_world():
        raise RuntimeError("another")


def test_advice_names_only_what_can_be_lowered():
    assert less_memory("full", 8).endswith("full: pass --micro-batch-size 4, and the run resumes")
    assert less_memory("none", 1).endswith("none: pass --activation-checkpointing full, and the run resumes")
    assert less_memory("full", 1).endswith("full: use a smaller model")
    assert less_memory().startswith("pass a smaller --micro-batch-size or --activation-checkpointing full")


def test_a_resumed_run_measures_nothing(tiny_model, icon_shards, tmp_path, monkeypatch):
    options = {"micro_batch_size": "auto", "activation_checkpointing": "auto", "workers": 0}
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, **options)
    measured, real = [], activation_memory.pairs_that_fit
    monkeypatch.setattr(
        activation_memory, "pairs_that_fit", lambda *given: measured.append(given) or real(*given)
    )

    def stop(clip, world):
        (tmp_path / "run" / "stop").touch()
        return {}

    assert not fit(plan, World(), stop).is_finished
    assert len(measured) == 1
    trained(plan, no_validation)
    assert len(measured) == 1
