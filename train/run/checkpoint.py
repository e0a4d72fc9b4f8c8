"""A checkpoint is a folder that is whole or absent. It is written by train.run.async_writer while training
continues.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from data_prep.atomic import atomic_folder, write_json
from data_prep.shards import sha256_of
from data_prep.strict_json import as_null, strict_json
from data_prep.terminal import say
from train.model.clip import CONFIG_FILE, WEIGHTS_FILE
from train.run.records import read_state, seal

# What a checkpoint holds beside the exported model.
TRAINING = ("training.safetensors", "ema.safetensors", "optimizer.pt", "state.json")


def write(path: Path, fill: Callable[[Path], None], state: dict, check: Callable[[], None]) -> None:
    """Write a checkpoint: the files that `fill` puts into a folder, and state.json with their sha256 and its
    own.

    Args:
        check: called before the folder gets its name; if it raises, nothing is left.
    """
    with atomic_folder(path) as folder:
        fill(folder)
        files = [file for file in sorted(folder.iterdir()) if file.name != "state.json"]
        digests = {file.name: sha256_of(file) for file in files}
        # as JSON has it: a Score is a list there
        state = json.loads(strict_json(state | {"sha256": digests}, as_null))
        write_json(folder / "state.json", state | {"state_sha256": seal(state)})
        check()


def newest(folder: Path, warn: bool) -> tuple[Path, dict] | None:
    """The newest checkpoint in `folder` whose files all have their sha256, and its state; damaged ones are
    skipped.
    """
    for path in sorted(folder.glob("samples-*"), reverse=True):
        try:
            state = read_state(path)
            damaged = [name for name, digest in state["sha256"].items() if not _has(path / name, digest)]
            damaged += [
                f"{name} was added"
                for name in (*TRAINING, CONFIG_FILE, WEIGHTS_FILE)
                if name != "state.json" and name not in state["sha256"] and os.path.lexists(path / name)
            ]
        except (OSError, ValueError) as error:
            damaged = [str(error)]
        if not damaged:
            return path, state
        if warn:
            say(f"warning: {path} is damaged ({', '.join(damaged)}); using an older one", file=sys.stderr)
    return None


def _has(file: Path, digest: str) -> bool:
    return file.is_file() and sha256_of(file) == digest


def link_best(folder: Path, name: str) -> None:
    """Point `folder`/best to the checkpoint `name`, atomically."""
    link = folder / ".best.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, folder / "best")


def link_model(run: Path) -> None:
    """Point names in the run's folder to the files of the best model: open_clip then loads local-dir:RUN.

    They go through checkpoints/best, so each changes with it, and at the same moment.
    """
    for file in (run / "checkpoints" / "best").iterdir():
        link, target = run / file.name, Path("checkpoints", "best", file.name)
        if file.name not in TRAINING and not link.is_symlink():
            partial = run / f".{file.name}.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(target)
            os.replace(partial, link)


def prune(folder: Path, n: int, best: str) -> None:
    """Remove all checkpoints but the newest `n` and the one named `best`."""
    for old in sorted(folder.glob("samples-*"))[:-n]:
        if old.name != best:
            shutil.rmtree(old)


def clear(folder: Path) -> None:
    """Remove partial checkpoints that a kill has left."""
    for ending in ("partial", "replaced"):
        for partial in folder.glob(f".samples-*.{ending}"):
            shutil.rmtree(partial)
