"""A checkpoint is a folder that is whole or absent. It is written by train.run.async_writer while training
continues.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from data_prep.atomic import atomic_folder
from data_prep.shards import sha256_of

# What a checkpoint holds beside the exported model.
TRAINING = ("training.safetensors", "ema.safetensors", "optimizer.pt", "state.json")


def write(path: Path, fill: Callable[[Path], None], state: dict, check: Callable[[], None]) -> None:
    """Write a checkpoint: the files that `fill` puts into a folder, and state.json with their sha256.

    Args:
        check: called before the folder gets its name; if it raises, nothing is left.
    """
    with atomic_folder(path) as folder:
        fill(folder)
        files = [file for file in sorted(folder.iterdir()) if file.name != "state.json"]
        digests = {file.name: sha256_of(file) for file in files}
        (folder / "state.json").write_text(json.dumps(state | {"sha256": digests}, indent=1) + "\n")
        check()


def newest(folder: Path, warn: bool) -> tuple[Path, dict] | None:
    """The newest checkpoint in `folder` whose files have their sha256, and its state; damaged ones are
    skipped.
    """
    for path in sorted(folder.glob("samples-*"), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text())
            damaged = [name for name, digest in state["sha256"].items() if sha256_of(path / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            damaged = [str(error)]
        if not damaged:
            return path, state
        if warn:
            print(f"warning: {path} is damaged ({', '.join(damaged)}); using an older one", file=sys.stderr)
    return None


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
