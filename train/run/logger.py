"""What a run says while it goes: metrics.jsonl for programs, TensorBoard for eyes, a bar with an ETA for
whoever watches.

Names under time/ depend on the machine; all others are functions of the recipe and the data.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from torch.utils.tensorboard import SummaryWriter

from data_prep.atomic import atomic_file
from data_prep.progress import progress
from train.run.folder import Run
from train.world import World

DATA_WAIT = 0.02  # of the step's time: more is worth a word
FOLLOWED = ("val/image_to_text/R@1", "val/text_to_image/R@1")


class Logger:
    """The log of one run, written by the first rank; every rank must call step()."""

    def __init__(self, run: Run, samples: int, end: int, samples_per_epoch: int, world: World):
        """Open the log at `samples`: what stands after that belongs to steps that will be taken again."""
        self.run, self.end, self.samples_per_epoch = run, end, samples_per_epoch
        self.pairs, self.data_s, self.step_s = 0, 0.0, 0.0
        self.lines, self.data_wait_said = 0, False
        self.first = world.is_first
        self.bar = progress(
            total=end, initial=samples, unit="pair", unit_scale=True, desc="training", disable=not self.first
        )
        if not self.first:
            return
        self.file = reopened(run.folder / "metrics.jsonl", samples)
        self.tensorboard = SummaryWriter(
            str(run.folder / "tensorboard"), purge_step=samples + 1 if samples else None
        )

    def step(
        self,
        samples: int,
        batch: int,
        loss: torch.Tensor,
        values: dict[str, torch.Tensor | float],
        data_s: float,
        step_s: float,
    ) -> None:
        """Count a step; every `log_every_steps`-th is written.

        Args:
            samples: pairs seen, this step's included.
            loss: mean over the ranks.
            data_s: seconds that this step waited for its batch, part of `step_s`.
        """
        self.pairs, self.data_s, self.step_s = self.pairs + batch, self.data_s + data_s, self.step_s + step_s
        self.bar.update(batch)
        if not self.is_due(samples, batch):
            return
        started = time.perf_counter()
        numbers = {"epoch": samples / self.samples_per_epoch, "train/loss": loss.item()}
        self.step_s += (
            time.perf_counter() - started
        )  # a GPU was behind: what it had left to do is part of these steps
        numbers |= {name: float(value) for name, value in values.items()}
        numbers |= {
            "time/pairs_per_s": self.pairs / self.step_s,
            "time/data_wait_share": self.data_s / self.step_s,
        }
        numbers |= self.run.writer.new_times()
        self.write(samples, numbers)
        self._on_data_wait(self.data_s / self.step_s)
        speed = self.pairs / self.step_s
        self.run.beat(
            samples,
            step=samples // batch,
            pairs_per_s=round(speed, 2),
            eta_s=round((self.end - samples) / speed),
        )
        self.bar.set_postfix_str(
            f"epoch {numbers['epoch']:.1f}, loss {numbers['train/loss']:.3f}", refresh=False
        )
        self.pairs, self.data_s, self.step_s = 0, 0.0, 0.0

    def _on_data_wait(self, share: float) -> None:
        """Say once what to do where the steps wait for pictures; not of the first line, in which the workers
        start.
        """
        self.lines += 1
        if share > DATA_WAIT and self.lines > 1 and not self.data_wait_said:
            self.data_wait_said = True
            self.say(data_wait_advice(share, self.run.recipe.workers, cores_per_rank()))

    def is_due(self, samples: int, batch: int) -> bool:
        """Whether the step that ends at `samples` is written."""
        return samples // batch % self.run.recipe.log_every_steps == 0

    def validation(self, samples: int, values: dict[str, float], chosen: str = "") -> None:
        """Write what a validation found, if there was one, and say the part of it that people follow.

        Args:
            chosen: what stands before the names of the weights to use.
        """
        if values:
            self.write(samples, values)
            recalls = ", ".join(
                f"{chosen}{name} {100 * values[chosen + name]:.1f} %"
                for name in FOLLOWED
                if chosen + name in values
            )
            self.say(f"after {samples / self.samples_per_epoch:.0f} epochs: {recalls}")

    def write(self, samples: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard."""
        if not self.first:
            return
        self.run.claim.check()
        written = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }  # JSON has no NaN
        with self._told():
            self.file.write(json.dumps({"samples": samples, **written}) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, samples)

    def sync(self) -> None:
        """Before a checkpoint: the lines that it leaves behind must be on disk."""
        if self.first:
            with self._told():
                os.fsync(self.file.fileno())
                self.tensorboard.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A disk that is full, of a checkpoint that is being written perhaps: the next save says so, on all
        ranks.
        """
        try:
            yield
        except OSError as error:
            self.run.trouble = self.run.cannot_write(self.run.folder / "metrics.jsonl", error)

    def say(self, text: str) -> None:
        """A line for whoever watches, above the bar."""
        if self.first:
            self.bar.write(text)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.first:
            with contextlib.suppress(
                OSError
            ):  # a full disk, which was told; what matters is on it since the last checkpoint
                self.file.close()
                self.tensorboard.close()


def reopened(path: Path, samples: int) -> TextIO:
    """A file of JSON lines to go on with, without what stands after `samples`, or was cut short by a kill."""
    lines = path.read_text().splitlines(keepends=True) if samples and path.is_file() else []
    with atomic_file(path) as partial:
        partial.write_text(
            "".join(line for line in lines if line.endswith("\n") and json.loads(line)["samples"] <= samples)
        )
    return open(path, "a")


def cores_per_rank() -> int:
    """CPU cores that this process may use, shared with the other ranks of its node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def data_wait_advice(share: float, workers: int, cores: int) -> str:
    """A sentence on steps of which `share` goes by in waiting for pictures, with what can be done.

    Args:
        cores: per rank.
    """
    waits = f"the data wait is {100 * share:.0f} % of the step: "
    if workers < cores:
        return (
            f"{waits}pass --workers {min(cores, max(1, 2 * workers))} (there are {cores} cores per rank,"
            f" --workers is {workers})"
        )
    return (
        f"{waits}all {cores} cores per rank have a worker; give the job more cores, "
        "or make the pictures smaller with: python -m data_prep build ... --resize-px 256"
    )
