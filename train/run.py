"""A run is a folder, and everything in it can be looked at.

RUN/recipe.yaml           the merged recipe; itself a recipe
RUN/environment.json      versions, git commit, machine
RUN/status.json           running, stopped or finished; samples seen
RUN/metrics.jsonl         one line per logged step and per validation; also as TensorBoard events in RUN/tensorboard
RUN/checkpoints/samples-000123456/   open_clip_config.json and open_clip_model.safetensors (open_clip's local-dir:),
                                     optimizer.pt, state.json with the sha256 of each file
RUN/checkpoints/best      link to the best one by validation
RUN/stop                  make this file, and the run ends cleanly at the next step
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_prep.atomic import atomic_file, atomic_folder
from data_prep.errors import UserError
from data_prep.shards import sha256_of
from train.model import WEIGHTS_FILE, Clip
from train.recipe import Recipe, differences, flags_of, parse, to_yaml
from train.world import World

PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "timm", "numpy", "pillow")


class Run:
    """The run folder, seen by all ranks; the first rank writes, and the others wait until it has.

    Attributes:
        samples: pairs seen at the checkpoint to go on from, 0 for a new run.
        best, best_checkpoint: the best validation score so far, and the name of the checkpoint that has it.
    """

    def __init__(self, recipe: Recipe, world: World):
        """Open the run of `recipe`: new, unfinished or finished.

        Raises:
            UserError: the folder holds a run of another recipe, or something else.
        """
        self.recipe, self.world, self.folder = recipe, world, Path(recipe.run)
        self.samples, self.best, self.best_checkpoint = 0, float("-inf"), ""
        self.checkpoint: Path | None = None
        if (self.folder / "recipe.yaml").is_file():
            old = parse([*flags_of(self.folder / "recipe.yaml"), "--run", recipe.run])
            if changed := differences(old, recipe):
                raise UserError(
                    f"{self.folder}: holds a run of another recipe ({'; '.join(changed)}); pass another --run, "
                    f"or go on with that one: python -m train {self.folder / 'recipe.yaml'}"
                )
            self._find_checkpoint()
        elif self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise UserError(f"{self.folder}: there already, and not a run; pass another --run")

    @property
    def is_finished(self) -> bool:
        return self._status().get("state") == "finished"

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    def check_data(self, fingerprint: str) -> None:
        """Refuse to go on with other data than the run began with; see data_prep.shards.Shards.fingerprint."""
        path = self.folder / "environment.json"
        if self.checkpoint and json.loads(path.read_text())["data_fingerprint"] != fingerprint:
            raise UserError(f"{self.recipe.data}: not the shards that {self.folder} began with; pass another --run, or the old --data")

    def start(self, data_fingerprint: str) -> None:
        """Write what the run is, before its first step."""
        self.world.barrier()  # all ranks have looked at the folder as it was
        if self.world.is_first:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.stop_file.unlink(missing_ok=True)
            if not self.samples:
                with atomic_file(self.folder / "environment.json") as partial:
                    partial.write_text(json.dumps(_environment(self.world, data_fingerprint), indent=1) + "\n")
                with atomic_file(self.folder / "recipe.yaml") as partial:
                    partial.write_text(to_yaml(self.recipe))
            else:
                self._link_best()  # a kill may have come between the checkpoint and its link
            self._write_status("running", self.samples)
        self.world.barrier()

    def finish(self, state: str, samples: int) -> None:
        """Say how the run ended: "finished", or "stopped" and ready to go on."""
        if self.world.is_first:
            self._write_status(state, samples)

    def _status(self) -> dict:
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _write_status(self, state: str, samples: int) -> None:
        with atomic_file(self.folder / "status.json") as partial:
            partial.write_text(json.dumps({"state": state, "samples": samples}) + "\n")

    def _find_checkpoint(self) -> None:
        """The newest checkpoint that is whole; one whose files are not what was written is named and passed over."""
        for path in sorted((self.folder / "checkpoints").glob("samples-*"), reverse=True):
            try:
                state = json.loads((path / "state.json").read_text())
                damaged = [name for name, digest in state["sha256"].items() if sha256_of(path / name) != digest]
            except (OSError, ValueError, KeyError) as error:
                damaged = [str(error)]
            if not damaged:
                self.checkpoint, self.samples = path, state["samples"]
                self.best, self.best_checkpoint = state["best"], state["best_checkpoint"]
                return
            if self.world.is_first:
                print(f"warning: {path} is damaged ({', '.join(damaged)}); passing over it", file=sys.stderr)

    def restore(self, clip: Clip, optimizer: torch.optim.Optimizer) -> None:
        """Put the checkpoint's weights and moments where they were; does nothing in a new run."""
        if self.checkpoint is None:
            return
        clip.towers.model.load_state_dict(load_file(self.checkpoint / WEIGHTS_FILE))
        optimizer.load_state_dict(torch.load(self.checkpoint / "optimizer.pt", weights_only=True, map_location="cpu"))

    def save(self, clip: Clip, optimizer: torch.optim.Optimizer, samples: int, score: float | None) -> None:
        """Write a checkpoint, whole or not at all; `score` (higher is better) is that of these weights, if they have one."""
        if self.world.is_first:
            self._save(clip, optimizer, samples, score)
        self.world.barrier()

    def _save(self, clip: Clip, optimizer: torch.optim.Optimizer, samples: int, score: float | None) -> None:
        path = self.folder / "checkpoints" / f"samples-{samples:012d}"
        is_best = score is not None and score > self.best
        self.best = score if is_best else self.best
        if is_best or self.best == float("-inf"):  # before any validation, the newest is the best there is
            self.best_checkpoint = path.name
        with atomic_folder(path) as folder:
            clip.save(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            digests = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
            state = {"samples": samples, "score": score, "best": self.best, "best_checkpoint": self.best_checkpoint, "sha256": digests}
            (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        self._link_best()
        for old in sorted(path.parent.glob("samples-*"))[: -self.recipe.keep]:
            if old.name != self.best_checkpoint:
                shutil.rmtree(old)

    def _link_best(self) -> None:
        """Point checkpoints/best to the best checkpoint; a link is replaced whole."""
        link = self.folder / "checkpoints" / ".best.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(self.best_checkpoint)
        os.replace(link, link.with_name("best"))


def _environment(world: World, data_fingerprint: str) -> dict:
    commit = None
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "data_fingerprint": data_fingerprint,
        "git_commit": commit,
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
