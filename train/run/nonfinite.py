"""NonFiniteGuard: steps with a non-finite loss or gradient change nothing, are logged, and too many end in a
rollback.

loss and grad_norm, equal on all ranks -> found_inf, on the device -> the optimizer skips the step
                                       -> read by the host when it logs -> RUN/nonfinite_steps.jsonl, and the
                                       limit

The host never waits for a device because of this.
"""

from typing import NamedTuple

import torch


class NonFiniteStep(NamedTuple):
    """A skipped step: pairs seen before it, its loss and gradient norm."""

    samples: int
    loss: float
    grad_norm: float


class NonFiniteGuard:
    """Watches the steps since a run was opened; the same on every rank.

    Attributes:
        consecutive: non-finite steps in a row, up to the newest one that was flushed.
    """

    def __init__(self):
        self.consecutive = 0
        self._pending: list[tuple[int, torch.Tensor]] = []

    def check(self, samples: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """fp32 [] on the device: 1 where the optimizer must skip the step, else 0.

        Args:
            samples: pairs seen before this step.
            loss: mean over the ranks.
            grad_norm: of the gradient of the global batch.
        """
        numbers = torch.stack([loss, grad_norm])
        self._pending.append((samples, numbers))
        return (~torch.isfinite(numbers)).any().float()

    def flush(self) -> list[NonFiniteStep]:
        """The non-finite steps since the last flush; waits for the device."""
        if not self._pending:
            return []
        steps = []
        numbers = torch.stack([pair for _, pair in self._pending])
        finite = torch.isfinite(numbers).all(1).tolist()
        for (samples, _), pair, is_finite in zip(self._pending, numbers.tolist(), finite, strict=True):
            self.consecutive = 0 if is_finite else self.consecutive + 1
            if not is_finite:
                steps.append(NonFiniteStep(samples, *pair))
        self._pending = []
        return steps
