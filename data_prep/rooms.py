"""Where the rooms are: at the top of the clone as `train`, or in the installed package as `cliptune.train`.

The wheel has other names (see setup.py), so a name that is typed as a string, of a module to run or to
import, goes through importable().
"""

import os
from pathlib import Path

ROOMS = ("data_prep", "train", "eval", "slurm")
PACKAGE = __name__.removesuffix("data_prep.rooms")  # "" in the clone, "cliptune." where it is installed
# The folder that must be on sys.path; None where the package is installed, and so found.
CLONE = None if PACKAGE else Path(__file__).parents[1]


def importable(module: str) -> str:
    """The full name of a module of a room: "train.bench" -> "cliptune.train.bench" where it is installed."""
    return f"{PACKAGE}{module}"


def environment() -> dict[str, str]:
    """Environment variables of a process that runs one of our modules from any folder."""
    paths = [str(CLONE or ""), os.environ.get("PYTHONPATH", "")]
    # An empty part of PYTHONPATH would be the working folder.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
