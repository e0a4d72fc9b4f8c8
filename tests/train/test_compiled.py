"""Every call of a block runs compiled code, of few graphs, whatever the sizes and modes of a run are."""

from collections.abc import Iterator

import pytest
import torch
from compiled_script import Counts, compiled_state, step
from conftest import TINY, call, save_tiny

from train.model.activation_memory import dummy_batch, uncompiled
from train.model.clip import load
from train.model.lora import adapt

CPU, CONTEXT, LAYERS = torch.device("cpu"), 77, 3


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """16 patches, and the context of CLIP."""
    vision = {**TINY["vision_cfg"], "patch_size": 4, "layers": LAYERS}
    text = {**TINY["text_cfg"], "context_length": CONTEXT, "layers": LAYERS}
    folder = save_tiny(tmp_path_factory.mktemp("deep"), vision_cfg=vision, text_cfg=text)
    return f"local-dir:{folder}"


# Graphs after whole batches, then after uneven chunks, then after replay.
@pytest.mark.parametrize(("mode", "graphs"), [("none", (2, 10, 12)), ("selective", (3, 11, 13))])
def test_no_size_leaves_a_block_uncompiled(model, mode, graphs):
    counts, clip = Counts(), load(model)
    state, found = compiled_state(counts, clip, mode), []
    for length in (16, 8, 24, CONTEXT):
        step(state, length)
    found.append(counts.graphs)

    state.micro_batch_size = 5  # 5, 5, 5 and 1: torch compiles for a size of 1 apart
    for length in (16, 24, CONTEXT, 16):
        step(state, length)
    state.micro_batch_size = 6  # 6, 6 and 4
    step(state, 32)
    found.append(counts.graphs)

    with uncompiled():  # validation
        clip.towers.eval()
        calls = counts.calls
        clip.towers(*dummy_batch(clip.towers, 3, CPU))
        counts.calls = calls
    image_features, *_ = clip.towers(*dummy_batch(clip.towers, 4, CPU))  # replay
    image_features.sum().backward()
    clip.towers.train()
    step(state)
    found.append(counts.graphs)

    assert counts.runs == counts.calls > 0
    assert all(count <= most for count, most in zip(found, graphs, strict=True)), found


def test_the_end_of_patch_dropout_adds_one_graph(model):
    counts, clip = Counts(), load(model)
    state = compiled_state(counts, clip, patch_dropout=0.5)
    step(state)
    during = counts.graphs
    clip.towers.patch_dropout.set_rate(0.5, 1.0)
    step(state)
    assert counts.runs == counts.calls
    assert during == 2
    assert counts.graphs <= 3


def test_adapted_layers_share_their_code(model):
    """The first block of a tower is compiled apart: its input needs no gradient."""
    counts, clip = Counts(), load(model)
    adapt(clip.towers, 2, 0)
    state = compiled_state(counts, clip)
    for length in (16, 8, CONTEXT):
        step(state, length)
    assert counts.graphs <= 4
    assert counts.runs == counts.calls == 3 * 2 * LAYERS


def test_two_ranks_compile_and_run_what_one_does(model, tmp_path):
    """DDP would cut each block where a bucket of gradients is full."""
    call("tests.compiled_script", tmp_path / "counts.pt", model, ranks=2)
    calls = 3 * 2 * LAYERS
    assert torch.load(tmp_path / "counts.pt") == {"graphs": 2, "runs": calls, "calls": calls}
