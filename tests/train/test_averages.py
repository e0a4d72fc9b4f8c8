"""The EMA and L2-SP are one call each for all tensors: bit-equal to a loop, and nothing waits for a GPU."""

import copy

import pytest
import torch
from conftest import TINY, save_tiny
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode

from train.model.clip import Clip, load
from train.optim import build_optimizer
from train.recipe import Optim, Recipe
from train.retain.l2sp import L2SP
from train.retain.select import WeightSelector

RECIPE = Recipe("tiny:none", "data", "run", ema=0.9998)
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}  # BatchNorm counts batches


@pytest.fixture(params=[TINY["vision_cfg"], RESNET], ids=["vit", "resnet"])
def clip(request, tmp_path) -> Clip:
    return load(f"local-dir:{save_tiny(tmp_path, vision_cfg=request.param)}")


class Operations(TorchDispatchMode):
    """Names of the operations that are dispatched inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*arguments, **(options or {}))


def disturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)


def test_the_ema_equals_a_loop_over_its_tensors(clip):
    """timm's, with the decay's warm-up (step 1 copies), and a step that is skipped."""
    torch.manual_seed(0)
    selector, loop = WeightSelector(clip, RECIPE), ModelEmaV3(clip.towers.model, 0.9998, use_warmup=True)
    loop.foreach = False
    for step in range(1, 6):
        disturb(clip.towers.model)
        skipped = torch.tensor(float(step == 3))
        before = copy.deepcopy(selector.ema.module.state_dict())
        selector.after_step(step, skipped)
        decay = torch.where(skipped.bool(), 1.0, loop.get_decay(step))
        with torch.no_grad():
            loop.apply_update_(clip.towers.model, decay)
        expected = loop.module.state_dict()
        for name, tensor in selector.ema.module.state_dict().items():
            assert torch.equal(tensor, expected[name]), (step, name)
            stays = step == 3 and tensor.is_floating_point()
            assert torch.equal(tensor, before[name]) == stays, (step, name)


def test_one_call_averages_all_tensors_and_asks_the_host_nothing(clip):
    selector, found_inf = WeightSelector(clip, RECIPE), torch.tensor(0.0)
    with Operations() as operations:
        selector.after_step(5, found_inf)
    assert operations.names.count("_foreach_lerp_") == 1
    assert len(operations.names) <= 7, operations.names
    assert "_local_scalar_dense" not in operations.names


def test_l2_sp_equals_a_loop_over_the_weights(clip):
    torch.manual_seed(0)
    base = copy.deepcopy(clip.towers)
    disturb(clip.towers.model)
    optimizer = build_optimizer(clip.towers, Optim(lr=1e-3))
    pull = L2SP(clip.towers, base, 300.0)
    expected = {
        name: parameter.detach().lerp(dict(base.model.named_parameters())[name], torch.tensor(0.3))
        for name, parameter in clip.towers.model.named_parameters()
        if parameter in pull.initial
    }
    with Operations() as operations:
        pull.step(optimizer, torch.tensor(0.0))
    for name, parameter in clip.towers.model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=0)
    assert operations.names.count("_foreach_lerp_") == len(optimizer.param_groups)
    assert "_local_scalar_dense" not in operations.names
