"""Our loss is open_clip's, whole or split over ranks."""

import open_clip
import torch
import torch.nn.functional as F

from train.loss import clip_loss
from train.world import World


def test_loss_and_gradients_equal_open_clips():
    generator = torch.Generator().manual_seed(0)
    ours = [F.normalize(torch.randn(12, 8, generator=generator), dim=1) for _ in range(2)] + [torch.tensor(14.3)]
    theirs = [tensor.clone().requires_grad_() for tensor in ours]
    ours = [tensor.requires_grad_() for tensor in ours]
    loss = clip_loss(*ours, World())
    expected = open_clip.ClipLoss()(*theirs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for tensor, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad)
