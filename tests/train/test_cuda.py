"""The suite's equalities where a GPU could break them: pytest -m cuda. Without one, each is rehearsed on the
CPU, with the same code.
"""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import TINY, save_tiny
from ranks_script import BASIC, global_batch, train_state
from runs import assert_equal_weights, exported, newest, no_validation, recipe

from eval.embed import embed, open_shards
from eval.options import Inference
from eval.retrieval.ranking import Relevance, ranks
from eval.validation import features_metrics, validator
from train.data.augment import Augmentation
from train.determinism import noise_batch, set_deterministic
from train.export.folder import export
from train.loop import fit
from train.model.activation_memory import apply_checkpointing
from train.model.clip import load
from train.recipe import Recipe
from train.run.async_writer import AsyncWriter
from train.setup import setup
from train.step import TrainState, backward, train_step
from train.world import World


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> torch.device:
    yield torch.device(request.param)
    set_deterministic(False)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Two blocks of each tower, so that they are compiled, with heads of 32, which fused attention takes."""
    vision = {"image_size": 16, "layers": 2, "width": 64, "head_width": 32, "patch_size": 4}
    text = {**TINY["text_cfg"], "layers": 2, "width": 64}
    return f"local-dir:{save_tiny(tmp_path_factory.mktemp('cuda'), vision_cfg=vision, text_cfg=text)}"


def state_on(device: torch.device, model: str, **changes) -> TrainState:
    """A state at the start of training, with the batch that global_batch() makes in mind."""
    clip = load(model)
    clip.towers.bf16 = changes.get("precision") == "bf16"
    clip.towers.to(device)
    return train_state(clip, replace(BASIC, **changes), World(device=device))


def gradient(state: TrainState) -> torch.Tensor:
    """Of all parameters, fp64 on the CPU."""
    state.towers.zero_grad()
    backward(state, global_batch().to(state.world.device))
    return torch.cat([weight.grad.flatten().double().cpu() for weight in state.towers.parameters()])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def plan_of(model: str, shards, run, **changes) -> Recipe:
    options = {"epochs": 1, "global_batch_size": 48, "micro_batch_size": 24, "workers": 0}
    return recipe(model, shards, run, **(options | {"compile": "auto", "deterministic": True} | changes))


# (activation_checkpointing, compiled on a GPU, micro_batch_size, bf16)
WAYS = [
    ("none", True, 16, False),
    ("selective", True, 16, False),
    ("full", True, 16, False),
    ("none", True, 5, False),
    ("none", True, 16, True),
    ("selective", True, 5, True),
]


def test_gradients_are_those_of_the_cpu_by_mode_chunk_and_precision(device, model):
    expected = gradient(state_on(torch.device("cpu"), model))
    for mode, compiled, chunk, bf16 in WAYS:
        state = state_on(device, model, micro_batch_size=chunk, precision="bf16" if bf16 else "fp32")
        apply_checkpointing(state.clip.towers.model, mode, compiled and device.type == "cuda")
        found = distance(gradient(state), expected)
        # On a GPU, fp32 is TF32 in the towers.
        bound = 5e-2 if bf16 else 3e-3 if device.type == "cuda" else 1e-5
        assert found < bound, (mode, chunk, bf16, found)


def test_a_gradient_is_the_same_twice(device, model):
    set_deterministic(True)
    one, two = (gradient(state_on(device, model, precision="bf16")) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one(device, model, icon_shards, tmp_path, precision):
    if (device.type, precision) == ("cpu", "fp32"):
        pytest.skip("test_loop.py has it")
    world, ends = World(device=device), {}
    for name in ("whole", "stopped"):
        plan = plan_of(model, icon_shards, tmp_path / name, precision=precision, epochs=2)
        if name == "stopped":
            (tmp_path / name).mkdir()
            (tmp_path / name / "stop").touch()  # after the first step
            fit(plan, world, no_validation)
            assert newest(tmp_path / name).name == "samples-000000000048"
        fit(plan, world, no_validation)
        ends[name] = newest(tmp_path / name)
    assert ends["whole"].name == ends["stopped"].name
    assert_equal_weights(exported(ends["whole"]), exported(ends["stopped"]))
    for tensor in exported(ends["whole"]).values():
        assert torch.isfinite(tensor).all()


def test_a_run_its_export_and_its_features_agree_with_the_cpu(device, model, icon_shards, tmp_path):
    """Validation, EMA, a checkpoint, the export with its own comparison, and an embedding on both devices."""
    plan, world = plan_of(model, icon_shards, tmp_path / "run", ema=0.9, wise_ft=(0.5,)), World(device=device)
    run = fit(plan, world, validator(plan, world))
    record = export(load(str(run.folder)), tmp_path / "out", "fp32", False, icon_shards, features_metrics)
    assert set(record["differences"]) >= {
        "open_clip",
        "transformers",
    }  # within their bounds, or it is refused
    features = []
    for place in (device, torch.device("cpu")):
        clip, alone = load(f"local-dir:{tmp_path / 'out'}"), World(device=place)
        clip.towers.to(place).eval()
        found = embed(clip, open_shards(icon_shards, "test", alone), alone, Inference(workers=0))
        features.append(torch.cat([found.image_features, found.text_features]).cpu())
    torch.testing.assert_close(*features, rtol=0, atol=1e-5 if device.type == "cpu" else 1e-3)


def test_the_average_is_what_its_formula_gives(device, model):
    state = state_on(device, model, ema=0.9)
    batch = noise_batch(state, 16, 8)
    expected = {name: tensor.clone() for name, tensor in state.clip.towers.model.state_dict().items()}
    for step in range(1, 4):
        train_step(state, batch)
        decay = state.selector.ema.get_decay(step)
        for name, tensor in state.clip.towers.model.state_dict().items():
            expected[name] = expected[name] * decay + tensor * (1 - decay)
    for name, tensor in state.selector.ema.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_that_is_not_finite_changes_nothing(device, model):
    state = state_on(device, model)
    batch = noise_batch(state, 16, 8)
    train_step(state, batch)
    before = copy.deepcopy(state.clip.towers.state_dict())
    backward(state, batch)
    state.optimizer.step(found_inf=torch.ones((), device=device))
    assert_equal_weights(state.clip.towers.state_dict(), before)
    state.optimizer.step(found_inf=torch.zeros((), device=device))
    assert float(next(iter(state.optimizer.state.values()))["step"]) == 2


def test_a_snapshot_holds_the_weights_of_its_moment(device, model):
    state = state_on(device, model)
    batch, writer, copied = noise_batch(state, 16, 8), AsyncWriter(), {}
    writer.allocate(state.clip.towers.model, state.optimizer)
    state.optimizer.register_step_pre_hook(lambda *_: writer.wait_for_snapshot())
    for _ in range(3):
        train_step(state, batch)
        weights = state.clip.towers.model.state_dict()
        expected = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        writer.wait()
        writer.begin(
            state.clip.towers.model,
            state.optimizer,
            lambda found, _: copied.update({name: tensor.clone() for name, tensor in found.items()}),
        )
    train_step(state, batch)
    writer.wait()
    writer.close()
    assert_equal_weights(copied, expected)


def test_a_step_never_waits_for_the_device(device, model, icon_shards):
    state = setup(plan_of(model, icon_shards, "", deterministic=False), None, World(device=device))
    state.towers.train()
    for _ in range(2):  # compiles
        train_step(state, next(state.batches).to(device))
    batch = next(state.batches).to(device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train_step(state, batch)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_augmentation_is_that_of_the_cpu(device):
    batch = global_batch()
    augmentation = Augmentation(BASIC.augment)
    expected = augmentation.apply(batch.images, batch.augment_rows)
    found = augmentation.apply(batch.images.to(device), batch.augment_rows.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_ranks_are_those_of_the_cpu(device):
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(500, 32, generator=generator), dim=1) for _ in range(2)
    )
    expected = ranks(images, texts, Relevance.diagonal(500))
    found = ranks(images.to(device), texts.to(device), Relevance.diagonal(500))
    for one, other in zip(found, expected, strict=True):
        assert (one.above == other.above).all()
