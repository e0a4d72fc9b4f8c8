"""Steps whose loss or gradient is not finite: they change nothing, are written down, and too many in a row go
back.

loss and grad_norm, alike on all ranks -> optimizer.found_inf, on the device -> AdamW leaves weights and
                                       moments as they are
                                       -> read by the host when it logs       -> RUN/nonfinite_steps.jsonl, and the limit

No host waits for a device because of this.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from train.run.logger import reopened
from train.world import World


class NonFiniteGuard:
    """What happened since a run was opened at `samples`; every rank holds the same.

    Attributes:
        in_a_row: steps that were not finite, up to the newest that was looked at.
    """

    def __init__(self, folder: Path, samples: int, keys_of: Callable[[int], list[str]], world: World):
        """Args:
        folder: of the run.
        keys_of: the sample keys of the global batch that begins at a number of samples.
        """
        self.keys_of, self.first = keys_of, world.is_first
        self.in_a_row, self.seen = 0, []
        self.file = reopened(folder / "nonfinite_steps.jsonl", samples) if self.first else None

    def judge(
        self, optimizer: torch.optim.Optimizer, samples: int, loss: torch.Tensor, grad_norm: torch.Tensor
    ) -> None:
        """Let the next optimizer.step() do nothing where the two are not both finite.

        `found_inf` is what torch's own GradScaler tells a fused optimizer.

        Args:
            samples: pairs seen before this step.
            loss: mean over the ranks.
            grad_norm: of the gradient of the global batch.
        """
        numbers = torch.stack([loss, grad_norm])
        optimizer.found_inf = (~torch.isfinite(numbers)).any().float()
        self.seen.append((samples, numbers))

    def look(self) -> int:
        """Write down the bad steps since the last look; gives how many of them there are in a row now."""
        for (samples, _), (loss, grad_norm) in zip(self.seen, self._numbers(), strict=True):
            if torch.isfinite(torch.tensor([loss, grad_norm])).all():
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            if self.first:
                line = {
                    "samples": samples,
                    "loss": str(loss),
                    "grad_norm": str(grad_norm),
                    "keys": self.keys_of(samples),
                }
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
        self.seen = []
        return self.in_a_row

    def _numbers(self) -> list[list[float]]:
        return torch.stack([numbers for _, numbers in self.seen]).tolist() if self.seen else []

    def __enter__(self) -> "NonFiniteGuard":
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()
