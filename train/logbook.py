"""What a run says while it goes: metrics.jsonl for programs, TensorBoard for eyes, a bar with an ETA for whoever watches.

Names under time/ depend on the machine; all others are functions of the recipe and the data.
"""

import json
import os
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from data_prep.atomic import atomic_file
from data_prep.progress import progress
from train.world import World

FOLLOWED = ("val/image_to_text/R@1", "val/text_to_image/R@1")


class Logbook:
    """The log of one run, written by the first rank; every rank must call step()."""

    def __init__(self, folder: Path, samples: int, end: int, samples_per_epoch: int, log_every_steps: int, world: World):
        """Open the log at `samples`: what stands after that belongs to steps that will be taken again."""
        self.samples_per_epoch, self.log_every_steps, self.world = samples_per_epoch, log_every_steps, world
        self.pairs, self.data_s, self.step_s = 0, 0.0, 0.0
        self.first = world.is_first
        self.bar = progress(total=end, initial=samples, unit="pair", unit_scale=True, desc="training", disable=not self.first)
        if not self.first:
            return
        self.path = folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(self.path) if samples and json.loads(line)["samples"] <= samples]
        with atomic_file(self.path) as partial:
            partial.write_text("".join(kept))
        self.file = open(self.path, "a")  # noqa: SIM115 open as long as the run
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=samples + 1 if samples else None)

    def step(
        self, samples: int, batch: int, loss: torch.Tensor, values: dict[str, torch.Tensor | float], data_s: float, step_s: float
    ) -> None:
        """Count a step; every `log_every_steps`-th is written, with the loss averaged over the ranks.

        Args:
            samples: pairs seen, this step's included.
            data_s: seconds that this step waited for its batch, part of `step_s`.
        """
        self.pairs, self.data_s, self.step_s = self.pairs + batch, self.data_s + data_s, self.step_s + step_s
        self.bar.update(batch)
        if samples // batch % self.log_every_steps:
            return
        loss = (self.world.sum(loss.clone()) / self.world.world_size).item()
        numbers = {"epoch": samples / self.samples_per_epoch, "train/loss": loss}
        numbers |= {name: float(value) for name, value in values.items()}
        numbers |= {"time/pairs_per_s": self.pairs / self.step_s, "time/data_wait_share": self.data_s / self.step_s}
        self.write(samples, numbers)
        self.bar.set_postfix_str(f"epoch {numbers['epoch']:.1f}, loss {loss:.3f}", refresh=False)
        self.pairs, self.data_s, self.step_s = 0, 0.0, 0.0

    def validation(self, samples: int, values: dict[str, float]) -> None:
        """Write what a validation found, if there was one, and say the part of it that people follow."""
        if values:
            self.write(samples, values)
            recalls = ", ".join(f"{name} {100 * value:.1f} %" for name, value in values.items() if name in FOLLOWED)
            self.say(f"after {samples / self.samples_per_epoch:.0f} epochs: {recalls}")

    def write(self, samples: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard."""
        if not self.first:
            return
        self.file.write(json.dumps({"samples": samples, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, samples)

    def sync(self) -> None:
        """Before a checkpoint: the lines that it leaves behind must be on disk."""
        if self.first:
            os.fsync(self.file.fileno())
            self.tensorboard.flush()

    def say(self, text: str) -> None:
        """A line for whoever watches, above the bar."""
        if self.first:
            self.bar.write(text)

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.first:
            self.file.close()
            self.tensorboard.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a log, without one that a kill cut short."""
    text = path.read_text() if path.is_file() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
