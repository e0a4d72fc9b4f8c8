"""What a run logs: metrics.jsonl for programs, trackers for curves, a progress bar with an ETA.

Names under time/ depend on the machine; all others are functions of the recipe and the data.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from data_prep.atomic import atomic_file
from data_prep.cores import cores_per_rank
from data_prep.masked import masked_url
from data_prep.progress import progress
from data_prep.store.remote import is_url
from data_prep.tables import counted
from data_prep.terminal import safe
from train.data.loader import Batch, Skipped
from train.data.sets import described
from train.data.shares import shares_of
from train.metrics import CROP_GAIN, CROP_GAIN_LOW
from train.model.activation_memory import should_compile
from train.model.towers import batch_dependent_layers
from train.run.folder import Run
from train.run.nonfinite import NonFiniteStep
from train.run.records import DAMAGED, read_metrics
from train.run.trackers import open_trackers

if TYPE_CHECKING:
    from train.step import TrainState, Values  # which needs train.run at run time

MAX_DATA_WAIT = 0.05  # of the step's time; above it, a hint is printed
PRINTED = ("val/image_to_text/R@1", "val/text_to_image/R@1")


class Logger:
    """The log of one run, written by the first rank; every rank calls step()."""

    def __init__(self, run: Run, state: "TrainState"):
        """Open the log at `state.samples`: later lines belong to steps that will be repeated, and are
        removed.

        Raises:
            UserError: a tracker is not installed, or cannot be reached; on all ranks.
        """
        self.run, self.state = run, state
        self.first = state.world.is_first
        self.pairs, self.data_s, self.step_s = 0, 0.0, 0.0
        self.lines, self.hinted, self.crop_hinted = 0, False, False
        self.found: set[tuple[str, str]] = set()  # shard and key of damaged samples that were skipped
        self._batch_s, self._began = 0.0, time.perf_counter()
        self.bar = progress(
            total=state.end,
            initial=state.samples,
            unit="pair",
            unit_scale=True,
            desc="training",
            disable=not self.first,
        )
        self.trackers = state.world.all_or_raise(
            lambda: open_trackers(run.folder, run.recipe, state.samples) if self.first else {}
        )
        if not self.first:
            return
        self.tracked = {_kind(line) for line in read_metrics(run.folder / "metrics.jsonl")}
        self.metrics_file = reopened(run.folder / "metrics.jsonl", state.samples)
        # A line there has the samples before its step: the step at state.samples is repeated, too.
        self.nonfinite_file = reopened(run.folder / "nonfinite_steps.jsonl", state.samples - 1)
        if (run.folder / DAMAGED).exists():
            reopened(run.folder / DAMAGED, state.samples - 1).close()
            self.found = {
                (str(line.get("shard")), str(line.get("key"))) for line in read_metrics(run.folder / DAMAGED)
            }

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time that each took to arrive is logged as the data wait of its step."""
        self._began = time.perf_counter()
        for batch in batches:
            self._batch_s = time.perf_counter() - self._began
            yield batch
            self._began = time.perf_counter()

    def step(self, values: "Values") -> None:
        """Count a step; every `log_every_steps`-th is written.

        Args:
            values: of train_step(), "train/loss" among them.
        """
        self.pairs += self.run.recipe.global_batch_size
        self.data_s += self._batch_s
        self.step_s += time.perf_counter() - self._began
        self.bar.update(self.run.recipe.global_batch_size)
        if not self.is_due:
            return
        started, samples = time.perf_counter(), self.state.samples
        numbers = {name: float(value) for name, value in values.items()}
        self.step_s += time.perf_counter() - started  # float() waited for a GPU to finish these steps
        pairs_per_s, data_wait = self.pairs / self.step_s, self.data_s / self.step_s
        epoch = samples / self.state.order.samples_per_epoch
        times = {"time/pairs_per_s": pairs_per_s, "time/data_wait_share": data_wait}
        damaged = {"train/damaged_samples": len(self.found)} if self.found else {}
        self.write({"epoch": epoch, **numbers, **damaged, **times, **self.run.writer.new_times()})
        self._hint_at(data_wait)
        eta_s = round((self.state.end - samples) / pairs_per_s)
        self.run.write_progress(samples, step=self.state.step, pairs_per_s=round(pairs_per_s, 2), eta_s=eta_s)
        self.bar.set_postfix_str(f"epoch {epoch:.1f}, loss {numbers['train/loss']:.3f}", refresh=False)
        self.pairs, self.data_s, self.step_s = 0, 0.0, 0.0

    def _hint_at(self, data_wait: float) -> None:
        """Print once what to do when steps wait for images; not for the first line, while workers start."""
        self.lines += 1
        if data_wait > MAX_DATA_WAIT and self.lines > 1 and not self.hinted:
            self.hinted = True
            recipe = self.run.recipe
            urls = [folder for folder in shares_of(recipe.data) if is_url(folder)]
            self.say(data_wait_hint(data_wait, recipe.workers, cores_per_rank(), urls))

    @property
    def is_due(self) -> bool:
        """Whether the last step is written."""
        return self.state.step % self.run.recipe.log_every_steps == 0

    def nonfinite(self, steps: list[NonFiniteStep]) -> None:
        """Write the skipped steps to nonfinite_steps.jsonl, with the keys of their samples."""
        if not self.first or not steps:
            return
        size = self.run.recipe.global_batch_size
        for samples, loss, grad_norm in steps:
            positions, damaged = range(samples, samples + size), {key for _, key in self.found}
            keys = [self.state.pairs.key_at(position, damaged) for position in positions]
            line = {"samples": samples, "loss": str(loss), "grad_norm": str(grad_norm), "keys": keys}
            with self._reported("nonfinite_steps.jsonl"):
                self.nonfinite_file.write(json.dumps(line) + "\n")
                self.nonfinite_file.flush()

    def damaged(self, skipped: list[Skipped]) -> None:
        """Write the damaged samples of the last step, of all ranks, to damaged.jsonl, each once in a run.

        Args:
            skipped: of this rank; it is emptied.
        """
        found = set(self.state.world.join(skipped))
        skipped.clear()
        new = sorted(each for each in found if each[:2] not in self.found)  # in any order of the ranks
        if not self.first or not new:
            return
        samples, before = self.state.samples - self.run.recipe.global_batch_size, len(self.found)
        self.found.update(each[:2] for each in new)
        with self._reported(DAMAGED), open(self.run.folder / DAMAGED, "a") as file:
            file.writelines(json.dumps({"samples": samples, **each._asdict()}) + "\n" for each in new)
        if len(self.found).bit_length() > before.bit_length():  # at 1, 2, 4, 8 ...
            shard, key, found = new[-1]
            self.say(
                f"warning: {shard}: sample {key}: {found}; skipped"
                f" ({counted(len(self.found), 'sample')} so far, see {self.run.folder / DAMAGED})"
            )

    def validation(self, values: dict[str, float], selected: str = "") -> None:
        """Write the metrics of a validation, if there was one; print two of the trained weights, and of those
        that are exported where they are others.

        Args:
            selected: prefix of the metrics of the exported weights.
        """
        if values:
            self.write(values)
            names = [each + name for each in dict.fromkeys(("", selected)) for name in PRINTED]
            recalls = ", ".join(f"{name} {100 * values[name]:.1f} %" for name in names if name in values)
            epochs = round(self.state.samples / self.state.order.samples_per_epoch)
            self.say(f"after {counted(epochs, 'epoch')}: {recalls}")
            if values.get(f"val/{CROP_GAIN_LOW}", 0) > 0 and not self.crop_hinted:
                self.crop_hinted = True
                self.say(crop_hint(values[f"val/{CROP_GAIN}"], self.run.recipe.augment.scale))

    def write(self, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        if not self.first:
            return
        self.run.lock.check()
        samples = self.state.samples
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # for JSON
        with self._reported("metrics.jsonl"):
            self.metrics_file.write(json.dumps({"samples": samples, **finite}) + "\n")
            self.metrics_file.flush()
            repeated = _kind({"samples": samples, **values}) in self.tracked
            for name, tracker in self.trackers.items():
                if name == "tensorboard" or not repeated:
                    tracker.log(values, samples)

    def sync(self) -> None:
        """Put all lines on disk; called before the checkpoint after which they stay valid."""
        if self.first:
            with self._reported("metrics.jsonl"):
                os.fsync(self.metrics_file.fileno())
                for tracker in self.trackers.values():
                    tracker.flush()

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """A full disk is reported, and the next save raises it on all ranks."""
        try:
            yield
        except OSError as error:
            self.run.report_write_error(self.run.folder / name, error)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.first:
            self.bar.write(safe(text))

    def __enter__(self) -> "Logger":
        state, recipe = self.state, self.run.recipe
        world, compiled = state.world, should_compile(recipe, state.world.device)
        self.say(
            f"{recipe.model} on {counted(state.order.n_samples, 'image')}, {world.world_size} x"
            f" {world.device.type}: {counted(state.steps, 'step')} of {recipe.global_batch_size} pairs"
        )
        for line in described(recipe, state.order, state.steps):
            self.say(line)
        if state.pairs.is_weighted:
            least, largest = state.pairs.shards.weight_range
            self.say(f"pairs have weights of {least:g} to {largest:g}")
        self.say(
            f"micro_batch_size {state.micro_batch_size}, activation_checkpointing"
            f" {state.activation_checkpointing}, {'compiled' if compiled else 'not compiled'}"
        )
        if layers := batch_dependent_layers(state.clip.towers):
            self.say(f"{' and '.join(layers)}: results depend on micro_batch_size and on the number of ranks")
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.first:
            with contextlib.suppress(OSError):  # a full disk, which was reported
                self.metrics_file.close()
                self.nonfinite_file.close()
                for tracker in self.trackers.values():
                    tracker.close()


def _kind(line: dict) -> tuple[int, bool]:
    """What identifies a line of metrics.jsonl: its samples, and whether it is of a step or a validation."""
    return line["samples"], "train/loss" in line


def reopened(path: Path, samples: int) -> TextIO:
    """A file of JSON lines, opened for appending; lines after `samples`, or cut by a kill, are removed."""
    lines = [line for line in read_metrics(path) if line["samples"] <= samples] if samples else []
    with atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open(path, "a")


def data_wait_hint(share: float, workers: int, cores: int, urls: Sequence[str] = ()) -> str:
    """A sentence on steps that wait for images for `share` of their time, with the fix.

    Args:
        cores: per rank.
        urls: where data sets are fetched from.
    """
    waits = f"data wait is {100 * share:.0f} % of the step time; "
    if urls:
        return (
            f"{waits}shards come from {masked_url(urls[0])}: with --cache-gb for all of them only the first"
            f" epoch waits; if it is not the store, pass more than --workers {workers}"
        )
    if workers < cores:
        more = min(cores, max(1, 2 * workers))
        return f"{waits}pass --workers {more} ({cores} cores per rank, --workers is {workers})"
    return (
        f"{waits}all {cores} cores per rank have a worker: use more cores, or smaller images: python -m"
        " data_prep build ... --resize-px 256"
    )


def crop_hint(gain: float, scale: tuple[float, float]) -> str:
    """A sentence on a model that does better on cropped images than on whole ones.

    Args:
        gain: in R@1.
        scale: of the recipe's crops.
    """
    larger = f"try larger crops than augment.scale {scale[0]} {scale[1]}"
    fix = larger if scale[0] < 1 else "cut off the margins of the images"
    return f"image-to-text R@1 is {100 * gain:.1f} points higher when images lose 4 % of each side: {fix}"
