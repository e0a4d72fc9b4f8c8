"""A run is a folder, and everything in it can be looked at.

RUN/recipe.yaml            the merged recipe; itself a recipe
RUN/environment.json       versions, git commit, machine, sha256 of the data, what "auto" chose
RUN/status.json            running, stopped, failed or finished; samples, speed, ETA, last checkpoint, time
RUN/metrics.jsonl          a line per logged step and validation; RUN/tensorboard holds the same
RUN/nonfinite_steps.jsonl  skipped steps, whose loss or gradient was not finite, and the samples in them
RUN/damaged.jsonl          damaged samples that were skipped, if there were any
RUN/checkpoints/samples-000123456/
    open_clip_config.json, open_clip_model.safetensors    the exported weights (open_clip's local-dir:)
    training.safetensors, ema.safetensors                 what to resume from (train.retain.select)
    optimizer.pt, state.json                              moments; samples, scores and the sha256 of each file
RUN/checkpoints/best       link to the best one by validation
RUN/open_clip_*            links to its model, so that open_clip loads local-dir:RUN
RUN/stop                   make this file, and the run ends at the next step, which removes it
RUN/lock, RUN/attempt      who may write here (train.run.lock)
"""

import contextlib
import dataclasses
import platform
import shutil
import socket
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from data_prep.atomic import atomic_file, check_parents, sweep, write_json
from data_prep.errors import Fault, Fenced, NotFinite, UserError
from data_prep.masked import one_line
from data_prep.rooms import CLONE
from data_prep.terminal import say
from train.device import cpu_name, device_name
from train.recipe import Recipe, differences, flags_of, parse, to_yaml
from train.retain.select import NO_SCORE, Score, Selection, WeightSelector
from train.run.async_writer import AsyncWriter
from train.run.checkpoint import clear, link_best, link_model, newest, prune, write
from train.run.lock import RunLock
from train.run.records import other_rounding, read_environment, read_state, read_status
from train.world import World

if TYPE_CHECKING:
    from train.step import TrainState  # which needs Run's neighbours at run time

# What a folder may hold before it is a run: of a submission, and of a start that was killed.
BEFORE = ("slurm", "attempt", "stop", "lock", "checkpoints", "environment.json")
# Environment variable of a run that train.lr, forecast or sweep starts: they say themselves what to do next.
PART_OF_RUNS = "CLIPTUNE_PART_OF_RUNS"
KINDS = {"model": "weights", "replay_texts": "sentences"}  # else shards
OTHER_WEIGHTS = "weights will differ from an uninterrupted run's, by rounding at least"
STATUS_EVERY_S = 10
PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "timm", "numpy", "pillow")


class Run:
    """The run folder, seen by all ranks; the first rank writes. Train inside `with run`, which joins the
    writer.

    Attributes:
        samples: pairs seen at the checkpoint to resume from, 0 for a new run.
        best, best_checkpoint: the best score so far, and the name of the checkpoint whose exported weights
            have it.
        checkpoint: the newest one on disk.
        pending: one that is being written; wait() makes it `checkpoint`.
    """

    def __init__(self, recipe: Recipe, world: World, flag: str = "--run"):
        """Open the run of `recipe`: new, unfinished or finished.

        Args:
            flag: that was passed, for messages: "--runs" for one of a command's runs.

        Raises:
            UserError: the folder holds a run of another recipe, or something else.
        """
        self.recipe, self.world, self.folder, self.flag = recipe, world, Path(recipe.run), flag
        self.samples, self.best, self.best_checkpoint = 0, NO_SCORE, ""
        self.checkpoint, self.pending = None, None
        self.rolled_back, self.status_written_at, self.lock = False, 0.0, RunLock(self.folder)
        self.saved_at = time.monotonic()
        self.writer = AsyncWriter()
        self._write_error: Fault | None = None  # kept until all ranks can hear of it
        self.fingerprints: dict[str, str | None] = {}  # of what check_data() has seen
        check_parents(self.folder, flag)
        if (self.folder / "recipe.yaml").is_file():
            old = parse([*flags_of(self.folder / "recipe.yaml"), "--run", recipe.run])
            if changed := differences(old, recipe):
                resumed = f"python -m train {quote(str(self.folder / 'recipe.yaml'))}"
                other = f"resume that one: {resumed}" if flag == "--run" else "the old values"
                raise UserError(
                    f"{self.folder}: holds a run of another recipe ({'; '.join(changed)}); pass another"
                    f" {flag}, or {other}"
                )
            if world.is_first and not self.is_finished:
                self.lock.acquire()
            self._find_checkpoint()
        elif self.folder.exists() and not (
            self.folder.is_dir() and all(map(_may_precede, self.folder.iterdir()))
        ):
            raise UserError(f"{self.folder}: exists and is not a run; pass another {flag}")

    @property
    def is_finished(self) -> bool:
        return self._status().get("state") == "finished"

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    @property
    def save_is_due(self) -> bool:
        """Whether the last checkpoint is old, or a write has failed, which save() reports on all ranks."""
        return self.has_failed or time.monotonic() - self.saved_at > 60 * self.recipe.save_every_minutes

    def check_data(self, fingerprint: str | None, key: str = "data") -> None:
        """Check that a resumed run has the shards, or the base model, that it was started with.

        Args:
            fingerprint: of what the recipe's `key` names (Shards.fingerprint, Clip.fingerprint), None where
                it names nothing; start() records it.

        Raises:
            UserError: it has not.
        """
        self.fingerprints[f"{key}_fingerprint"] = fingerprint
        if self.checkpoint and (before := self._environment().get(f"{key}_fingerprint")) != fingerprint:
            flag, kind = f"--{key.replace('_', '-')}", KINDS.get(key, "shards")
            value = getattr(self.recipe, key) or f"no {flag}"
            if isinstance(value, dict):  # several data sets
                pairs = zip(value, fingerprint.split(), str(before).split(), strict=False)
                value = ", ".join([folder for folder, now, old in pairs if now != old] or value)
            raise UserError(
                f"{value}: not the {kind} that {self.folder} was started with; pass another {self.flag}, or"
                f" the old {flag}"
            )

    def with_fitted(self, recipe: Recipe) -> Recipe:
        """`recipe` with "auto" replaced by what was chosen at the last start under the same conditions.

        Another choice would change the numbers by rounding (or more, with BatchNorm and dropout).
        """
        fitted = self._environment().get("fitted", {}) if self.checkpoint else {}
        if any(fitted.get(name) != value for name, value in self._conditions().items()):
            return recipe
        automatic = [name for name in FITTED if getattr(recipe, name) == "auto" and name in fitted]
        return dataclasses.replace(recipe, **{name: fitted[name] for name in automatic})

    def _conditions(self) -> dict[str, int | str | dict]:
        """What a choice for "auto" depends on, beside the model.

        The recipe's own values are among them: a micro batch that fits with "full" need not fit with "none".
        """
        requested = {name: getattr(self.recipe, name) for name in (*FITTED, "compile")}
        return {"world_size": self.world.world_size, "device": device_name(), "requested": requested}

    def start(self, state: "TrainState") -> None:
        """Write what the run is, before its first step, and allocate the memory for snapshots."""
        self.world.barrier()  # all ranks have read the folder as it was
        if self.world.is_first:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            clear(self.folder / "checkpoints")
            sweep(self.folder, is_locked=True)
            now, environment = _describe_environment(self.world), self._environment() if self.samples else {}
            if changed := ", another ".join(other_rounding(environment, now)):
                say(f"warning: resuming with another {changed}; {OTHER_WEIGHTS}", file=sys.stderr)
            environment = environment or now | self.fingerprints
            environment["fitted"] = self._conditions() | {name: getattr(state, name) for name in FITTED}
            write_json(self.folder / "environment.json", environment)
            if self.samples:
                # A kill may have come between the checkpoint and its link.
                link_best(self.folder / "checkpoints", self.best_checkpoint)
                link_model(self.folder)
            else:
                with atomic_file(self.folder / "recipe.yaml") as partial:
                    partial.write_text(to_yaml(self.recipe))
            self._write_status("running", self.samples)
            self.writer.allocate(state.selector.resumable, state.optimizer)
        # Weights must not change while they are being copied for a checkpoint.
        state.optimizer.register_step_pre_hook(lambda *_: self.writer.wait_for_snapshot())
        self.world.barrier()

    def write_progress(self, samples: int, **values: float) -> None:
        """Update status.json, at most every STATUS_EVERY_S seconds."""
        if self.world.is_first and time.monotonic() - self.status_written_at > STATUS_EVERY_S:
            try:
                self._write_status("running", samples, **values)
            except OSError as error:
                self.report_write_error(self.folder, error)
            self.status_written_at = time.monotonic()

    def end(self, state: str, samples: int, requested_by: str = "") -> None:
        """Record how training ended ("finished", "stopped", "rolled back") and let others write here.

        A stop request is fulfilled then; after a rollback the run is still running.
        """
        if self.world.is_first and state in ("finished", "stopped"):
            self._write_status(state, samples, **({"requested_by": requested_by} if requested_by else {}))
            self.stop_file.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let others write here."""
        self.writer.close()
        self.lock.release()

    def _status(self) -> dict:
        return read_status(self.folder)

    def _environment(self) -> dict:
        return read_environment(self.folder)

    def _write_status(self, state: str, samples: int, **values: float | str) -> None:
        self.lock.check()
        checkpoint = self.checkpoint and self.checkpoint.name
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        status = {"state": state, "samples": samples, **values, "checkpoint": checkpoint, "time": now}
        write_json(self.folder / "status.json", status | {"host": socket.gethostname()})

    def _find_checkpoint(self) -> None:
        found = newest(self.folder / "checkpoints", warn=self.world.is_first)
        if found is None:
            return
        self.checkpoint, state = found
        self.samples, self.best_checkpoint = state["samples"], state["best_checkpoint"]
        self.best = NO_SCORE if state["best"] is None else Score(*state["best"])
        self.rolled_back = state["rolled_back"]
        if not (self.checkpoint.parent / self.best_checkpoint).is_dir():
            # It was pruned for a better one, which is damaged.
            self.best_checkpoint = self.checkpoint.name
            self.best = NO_SCORE if state["score"] is None else Score(*state["score"])

    def restore(self, selector: WeightSelector, optimizer: torch.optim.Optimizer) -> None:
        """Load the checkpoint's weights and moments; does nothing in a new run."""
        if self.checkpoint is None:
            return
        selector.restore(self.checkpoint)
        moments = torch.load(self.checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(moments)

    def save(self, state: "TrainState", selection: Selection) -> None:
        """Begin a checkpoint of the state as it is now; it is copied and written while training continues.

        Args:
            selection: which weights it exports.

        Raises:
            Fault: the disk was full or missing, at the save before this one or since.
            Fenced: another attempt has taken over.
        """
        started = time.perf_counter()
        self.wait()
        self.saved_at = time.monotonic()
        self.pending = self._checkpoint_path(state.samples)
        is_best = selection.score is not None and selection.score > self.best
        self.best = selection.score if is_best else self.best
        if is_best or self.best.value == float("-inf"):  # before any validation, the newest is the best
            self.best_checkpoint = self.pending.name
        if self.world.is_first:
            path, selector = self.pending, state.selector
            values = self._checkpoint_values(state.samples, selection.score)
            values |= {"weights": selection.weights, "initial_retention": selector.initial_retention}
            self.writer.begin(
                selector.resumable,
                state.optimizer,
                lambda weights, moments: self._write(path, selector, values, weights, moments),
            )
        self.writer.times["time/save_stall_s"] = time.perf_counter() - started

    def _write(
        self, path: Path, selector: WeightSelector, values: dict, weights: dict, moments: dict
    ) -> None:
        """Called by the writer's thread."""

        def fill(folder: Path) -> None:
            selector.save(folder, weights, values["weights"])
            torch.save(moments, folder / "optimizer.pt")

        try:
            write(path, fill, values, self.lock.check)
            self.checkpoint = path  # only a whole one is named in status.json
            link_best(path.parent, values["best_checkpoint"])
            link_model(self.folder)
            # After the link: a kill in between leaves one checkpoint too many, and never a link to none.
            prune(path.parent, self.recipe.keep_checkpoints, values["best_checkpoint"])
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch and safetensors have their own error types for a full disk.
            raise self.cannot_write(path, error) from None

    def wait(self) -> None:
        """Join the checkpoint being written. Every rank calls this, and all raise what kept it from being
        written.
        """
        self.world.all_or_raise(self._wait)
        self.checkpoint, self.pending = self.pending or self.checkpoint, None  # on every rank

    def _wait(self) -> None:
        self.writer.wait()
        if self._write_error:
            raise self._write_error

    @property
    def has_failed(self) -> bool:
        """Whether something could not be written; the next save raises it on all ranks."""
        return self._write_error is not None or self.writer.has_failed

    def report_write_error(self, path: Path, error: Exception) -> None:
        """Keep an error of this rank until all ranks can raise it, at the next save."""
        self._write_error = self.cannot_write(path, error)

    def cannot_write(self, path: Path, error: Exception) -> Fault:
        reason = one_line(error, 200)
        return Fault(
            f"{path}: cannot be written ({reason}). Make room and run the same command again: it resumes from"
            f" the last whole checkpoint ({self.checkpoint or 'none yet'})"
        )

    def _checkpoint_path(self, samples: int) -> Path:
        return self.folder / "checkpoints" / f"samples-{samples:012d}"

    def _checkpoint_values(self, samples: int, score: Score | None) -> dict:
        return {
            "samples": samples,
            "score": score,
            "best": None if self.best == NO_SCORE else self.best,
            "best_checkpoint": self.best_checkpoint,
            "rolled_back": self.rolled_back,
        }

    def roll_back(self, state: "TrainState") -> None:
        """Make the last checkpoint's weights and moments those of now: the pairs in between are skipped.

        Raises:
            NotFinite: this run has rolled back before, or there is no checkpoint.
        """
        self.wait()
        problem = (
            f"{self.folder}: the last {state.guard.consecutive} steps before {state.samples} pairs had a"
            " non-finite loss or gradient (nonfinite_steps.jsonl)"
        )
        if self.rolled_back or self.checkpoint is None:
            why = "a rollback did not help" if self.rolled_back else "there is no checkpoint to roll back to"
            raise NotFinite(
                f"{problem}, and {why}. Checkpoints hold finite weights. Look at the samples listed there, or"
                f" start another run with half the learning rate: --optim.lr {self.recipe.optim.lr / 2:.1e}"
            )
        self.rolled_back = True
        copy = lambda: self._copy_checkpoint(state.samples, problem) if self.world.is_first else None  # noqa: E731
        self.world.all_or_raise(copy)

    def _copy_checkpoint(self, samples: int, problem: str) -> None:
        def fill(folder: Path) -> None:
            shutil.copytree(self.checkpoint, folder, dirs_exist_ok=True)

        # The exported weights stay the same.
        values = read_state(self.checkpoint) | self._checkpoint_values(samples, None)
        write(self._checkpoint_path(samples), fill, values, self.lock.check)
        say(
            f"warning: {problem}; rolling back to {self.checkpoint.name} and skipping the pairs since",
            file=sys.stderr,
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Join the writer. After an error in training, that error is raised, and not the writer's; then
        status.json says "failed", if there is room for it.
        """
        has_failed = True
        try:
            if kind is None:
                self.wait()
            else:
                self.writer.join()
            has_failed = kind is not None and issubclass(kind, Exception) and not issubclass(kind, Fenced)
        finally:
            if has_failed and self.world.is_first:
                with contextlib.suppress(OSError, UserError):  # a full disk; Fenced
                    self._write_status("failed", self._status().get("samples", self.samples))


FITTED = ("activation_checkpointing", "micro_batch_size")  # keys of the recipe that can be "auto"


def _may_precede(path: Path) -> bool:
    """Whether a folder that holds this, and no recipe.yaml, may still become a run."""
    return path.name in BEFORE or path.name.endswith(".partial")


def _describe_environment(world: World) -> dict:
    commit = None
    if CLONE and shutil.which("git"):  # an installed package may be in a repository of the user
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=CLONE, capture_output=True, text=True, check=False
        )
        commit = git.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "cliptune": None if CLONE else version("cliptune"),
        "git_commit": commit,
        "world_size": world.world_size,
        "device": device_name(),
        "cpu": cpu_name(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
