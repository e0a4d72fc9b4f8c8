"""What a checkpoint is: a folder that is whole, or not there. Who writes it while training goes on is
train.run.async_writer.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from data_prep.atomic import atomic_folder
from data_prep.shards import sha256_of


def write(path: Path, fill: Callable[[Path], None], state: dict, check: Callable[[], None]) -> None:
    """A checkpoint at `path`: what `fill` puts into a folder, and state.json, which knows those files by
    their sha256.

    Args:
        check: called before the folder takes its name; what it raises leaves nothing behind.
    """
    with atomic_folder(path) as folder:
        fill(folder)
        digests = {
            file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.name != "state.json"
        }
        (folder / "state.json").write_text(json.dumps(state | {"sha256": digests}, indent=1) + "\n")
        check()


def newest(folder: Path, warn: bool) -> tuple[Path, dict] | None:
    """The newest checkpoint in `folder` that is whole, and its state; one whose files are not what was
    written is passed over.
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
            print(f"warning: {path} is damaged ({', '.join(damaged)}); passing over it", file=sys.stderr)
    return None


def link_best(folder: Path, name: str) -> None:
    """Point `folder`/best to the checkpoint `name`; a link is replaced whole."""
    link = folder / ".best.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, folder / "best")


def prune(folder: Path, keep: int, best: str) -> None:
    """Remove all checkpoints but the newest `keep` and the one named `best`."""
    for old in sorted(folder.glob("samples-*"))[:-keep]:
        if old.name != best:
            shutil.rmtree(old)


def clear(folder: Path) -> None:
    """Remove what a kill left of checkpoints that were being written."""
    for partial in folder.glob(".samples-*.partial"):
        shutil.rmtree(partial)
