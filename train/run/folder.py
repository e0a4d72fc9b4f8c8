"""A run is a folder, and everything in it can be looked at.

RUN/recipe.yaml           the merged recipe; itself a recipe
RUN/environment.json      versions, git commit, machine
RUN/status.json           running, stopped or finished; samples, speed, ETA, last checkpoint, and when that was written
RUN/metrics.jsonl         one line per logged step and per validation; also as TensorBoard events in RUN/tensorboard
RUN/nonfinite_steps.jsonl       steps that were left out, because their loss or gradient was not finite, with their samples' keys
RUN/checkpoints/samples-000123456/   open_clip_config.json and open_clip_model.safetensors (open_clip's local-dir:), the weights to use;
                                     training.safetensors, ema.safetensors: those to go on from, where they
                                     are others (train.retain.select); optimizer.pt, state.json with the
                                     sha256 of each file
RUN/checkpoints/best      link to the best one by validation
RUN/stop                  make this file, and the run ends cleanly at the next step, which removes it
RUN/lock, RUN/attempt     who may write here; see train.run.lock
"""

import json
import platform
import shutil
import socket
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

from data_prep.atomic import atomic_file
from data_prep.errors import Fault, NotFinite, UserError
from train.recipe import Recipe, differences, flags_of, parse, to_yaml
from train.retain.select import NO_SCORE, Score, Selection, WeightSelector
from train.run.async_writer import AsyncWriter
from train.run.checkpoint import clear, link_best, newest, prune, write
from train.run.lock import RunLock
from train.world import World

BEFORE = (
    "slurm",
    "attempt",
    "stop",
    "lock",
    "checkpoints",
    "environment.json",
)  # of a submission, and of a start that was killed
BEAT_S = 10  # seconds between two writes of status.json
PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "timm", "numpy", "pillow")


class Run:
    """The run folder, seen by all ranks; the first rank writes. Training happens `with` it, or leaves a
    checkpoint half written.

    Attributes:
        samples: pairs seen at the checkpoint to go on from, 0 for a new run.
        best, best_checkpoint: the best score so far, and the name of the checkpoint whose weights to use have
            it.
        checkpoint: the newest that is on disk.
        pending: the one that was begun since, and that wait() makes `checkpoint`.
        trouble: what a log could not be written for; kept until all ranks can hear of it.
    """

    def __init__(self, recipe: Recipe, world: World):
        """Open the run of `recipe`: new, unfinished or finished.

        Raises:
            UserError: the folder holds a run of another recipe, or something else.
        """
        self.recipe, self.world, self.folder = recipe, world, Path(recipe.run)
        self.samples, self.best, self.best_checkpoint = 0, NO_SCORE, ""
        self.checkpoint, self.pending = None, None
        self.rolled_back, self.beat_at, self.claim = False, 0.0, RunLock(self.folder)
        self.writer = AsyncWriter()
        self.trouble: Fault | None = None
        self.fingerprints: dict[str, str | None] = {}  # of what check_data() has seen
        if (self.folder / "recipe.yaml").is_file():
            old = parse([*flags_of(self.folder / "recipe.yaml"), "--run", recipe.run])
            if changed := differences(old, recipe):
                raise UserError(
                    f"{self.folder}: holds a run of another recipe ({'; '.join(changed)}); pass another"
                    f" --run, or go on with that one: python -m train {self.folder / 'recipe.yaml'}"
                )
            if world.is_first and not self.is_finished:
                self.claim.take()
            self._find_checkpoint()
        elif self.folder.exists() and not (
            self.folder.is_dir() and all(map(_may_precede, self.folder.iterdir()))
        ):
            raise UserError(f"{self.folder}: there already, and not a run; pass another --run")

    @property
    def is_finished(self) -> bool:
        return self._status().get("state") == "finished"

    @property
    def best_samples(self) -> int:
        """Pairs seen at the best checkpoint."""
        return int(self.best_checkpoint.removeprefix("samples-") or 0)

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    def check_data(self, fingerprint: str | None, key: str = "data") -> None:
        """Refuse to go on with other shards, or another base, than the run began with; see the fingerprint of
        Shards and of Clip.

        Args:
            fingerprint: of what the recipe's `key` names, None where it names nothing; start() writes it
                down.
        """
        path, self.fingerprints[f"{key}_fingerprint"] = self.folder / "environment.json", fingerprint
        if self.checkpoint and json.loads(path.read_text()).get(f"{key}_fingerprint") != fingerprint:
            named, kind = (
                getattr(self.recipe, key) or f"no --{key}",
                "weights" if key == "model" else "shards",
            )
            raise UserError(
                f"{named}: not the {kind} that {self.folder} began with; pass another --run, or the old"
                f" --{key}"
            )

    def start(self, choice: WeightSelector, optimizer: torch.optim.Optimizer) -> None:
        """Write what the run is, before its first step, and take the memory in which checkpoints wait to be
        written.
        """
        self.world.barrier()  # all ranks have looked at the folder as it was
        if self.world.is_first:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.claim.take()
            clear(self.folder / "checkpoints")
            if not self.samples:
                with atomic_file(self.folder / "environment.json") as partial:
                    environment = _environment(self.world) | self.fingerprints
                    partial.write_text(json.dumps(environment, indent=1) + "\n")
                with atomic_file(self.folder / "recipe.yaml") as partial:
                    partial.write_text(to_yaml(self.recipe))
            else:
                link_best(
                    self.folder / "checkpoints", self.best_checkpoint
                )  # a kill may have come between the checkpoint and its link
            self._write_status("running", self.samples)
            self.writer.allocate(choice.kept, optimizer)
        self.world.barrier()

    def beat(self, samples: int, **values: float) -> None:
        """Say that the run is alive, every BEAT_S seconds at the most; `values` are for whoever looks."""
        if self.world.is_first and time.monotonic() - self.beat_at > BEAT_S:
            try:
                self._write_status("running", samples, **values)
            except OSError as error:
                self.trouble = self.cannot_write(self.folder, error)
            self.beat_at = time.monotonic()

    def finish(self, state: str, samples: int, **values: str) -> None:
        """Say how the run ended: "finished", or "stopped" and ready to go on; the wish to stop is fulfilled."""
        if self.world.is_first:
            self._write_status(state, samples, **values)
            self.stop_file.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let others write here."""
        self.writer.close()
        self.claim.release()

    def _status(self) -> dict:
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _write_status(self, state: str, samples: int, **values: float | str) -> None:
        self.claim.check()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        status = {
            "state": state,
            "samples": samples,
            **values,
            "checkpoint": self.checkpoint and self.checkpoint.name,
            "time": now,
        }
        with atomic_file(self.folder / "status.json") as partial:
            partial.write_text(json.dumps(status | {"host": socket.gethostname()}) + "\n")

    def _find_checkpoint(self) -> None:
        found = newest(self.folder / "checkpoints", warn=self.world.is_first)
        if found is None:
            return
        self.checkpoint, state = found
        self.samples, self.best_checkpoint = state["samples"], state["best_checkpoint"]
        self.best = Score(
            state.get("best_keeps", True), state["best"]
        )  # runs from before there was a control have no such key
        self.rolled_back = state.get("rolled_back", False)
        if not (
            self.checkpoint.parent / self.best_checkpoint
        ).is_dir():  # it gave way to a better one, which is damaged
            self.best_checkpoint = self.checkpoint.name
            self.best = (
                NO_SCORE if state["score"] is None else Score(state.get("keeps", True), state["score"])
            )

    def restore(self, choice: WeightSelector, optimizer: torch.optim.Optimizer) -> None:
        """Put the checkpoint's weights and moments where they were; does nothing in a new run."""
        if self.checkpoint is None:
            return
        choice.restore(self.checkpoint)
        optimizer.load_state_dict(
            torch.load(self.checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
        )

    def save(
        self, choice: WeightSelector, optimizer: torch.optim.Optimizer, samples: int, pick: Selection
    ) -> None:
        """Begin a checkpoint of the weights and moments as they are now; it is copied and written while
        training goes on.

        Whoever changes them next calls writer.wait_for_snapshot() before. `pick` says which of them are to be used.

        Raises:
            Fault: the disk was full, or was not there, at the save before this one or since.
            Fenced: another attempt has taken over.
        """
        started = time.perf_counter()
        self.wait()
        self.pending = self._path(samples)
        is_best = pick.score is not None and pick.score > self.best
        self.best = pick.score if is_best else self.best
        if is_best or self.best.value == float(
            "-inf"
        ):  # before any validation, the newest is the best there is
            self.best_checkpoint = self.pending.name
        if self.world.is_first:
            path, state = self.pending, self._state(samples, pick.score)
            state |= {"weights": pick.weights, "base_control": choice.base_control}
            self.writer.begin(
                choice.kept, optimizer, lambda kept, moments: self._write(path, choice, state, kept, moments)
            )
        self.writer.times["time/save_stall_s"] = time.perf_counter() - started

    def _write(self, path: Path, choice: WeightSelector, state: dict, kept: dict, moments: dict) -> None:
        """By the writer's thread: a whole checkpoint, from which a run goes on whatever happens next."""

        def fill(folder: Path) -> None:
            choice.save(folder, kept, state["weights"])
            torch.save(moments, folder / "optimizer.pt")

        try:
            write(path, fill, state, self.claim.check)
            self.checkpoint = path  # from here on status.json may name it
            link_best(path.parent, state["best_checkpoint"])
            prune(path.parent, self.recipe.keep_checkpoints, state["best_checkpoint"])
        except (
            OSError,
            SafetensorError,
            RuntimeError,
        ) as error:  # torch and safetensors have errors of their own for a full disk
            raise self.cannot_write(path, error) from None

    def wait(self) -> None:
        """Until the checkpoint that was begun is on disk; what kept it from that is raised on all ranks. All
        of them call this.
        """
        self.world.all_or_raise(self._wait)
        self.checkpoint, self.pending = self.pending or self.checkpoint, None  # on every rank

    def _wait(self) -> None:
        self.writer.wait()
        if self.trouble:
            raise self.trouble

    @property
    def has_failed(self) -> bool:
        """Whether something could not be written: the next save says so, on all ranks."""
        return self.trouble is not None or self.writer.has_failed

    def cannot_write(self, path: Path, error: Exception) -> Fault:
        """The sentence for whoever has to make room."""
        return Fault(
            f"{path}: cannot be written ({' '.join(str(error).split())[:200]}); the last whole checkpoint is"
            f" safe ({self.checkpoint or 'none yet'}): make room, and the same command goes on from it"
        )

    def _path(self, samples: int) -> Path:
        return self.folder / "checkpoints" / f"samples-{samples:012d}"

    def _state(self, samples: int, score: Score | None) -> dict:
        found = {"score": score.value, "keeps": score.keeps} if score else {"score": None}
        best = {
            "best": self.best.value,
            "best_keeps": self.best.keeps,
            "best_checkpoint": self.best_checkpoint,
        }
        return {"samples": samples, **found, **best, "rolled_back": self.rolled_back}

    def roll_back(self, samples: int, n_bad: int) -> None:
        """Make the last checkpoint's weights and moments those after `samples` pairs: what came between is
        passed over.

        Raises:
            NotFinite: that was done before in this run, or there is no checkpoint.
        """
        self.wait()
        trouble = (
            f"{self.folder}: the last {n_bad} steps before {samples} pairs had a loss or gradient that is not"
            " finite (nonfinite_steps.jsonl)"
        )
        if self.rolled_back or self.checkpoint is None:
            why = (
                "and going back was tried already"
                if self.rolled_back
                else "and there is no checkpoint to go back to"
            )
            raise NotFinite(
                f"{trouble}, {why}; the weights of checkpoints/ are whole: look at the samples that it names,"
                f" or try again as another run with half the rate, --optim.lr {self.recipe.optim.lr / 2:.1e}"
            )
        self.rolled_back = True
        self.world.all_or_raise(lambda: self._roll_back(samples, trouble) if self.world.is_first else None)

    def _roll_back(self, samples: int, trouble: str) -> None:
        def fill(folder: Path) -> None:
            shutil.copytree(self.checkpoint, folder, dirs_exist_ok=True)

        state = json.loads((self.checkpoint / "state.json").read_text()) | self._state(
            samples, None
        )  # the same weights are to be used
        write(self._path(samples), fill, state, self.claim.check)
        print(
            f"warning: {trouble}; going back to {self.checkpoint.name}, and passing over what came since",
            file=sys.stderr,
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """No end of training leaves the writer behind; where an error is the end, that is told, and not what
        the writer says.
        """
        if kind is None:
            self.wait()
        else:
            self.writer.join()


def _may_precede(path: Path) -> bool:
    """Whether a folder that holds this, and no recipe.yaml, may still become a run."""
    return path.name in BEFORE or path.name.endswith(".partial")


def _environment(world: World) -> dict:
    commit = None
    if shutil.which("git"):
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = git.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "git_commit": commit,
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
