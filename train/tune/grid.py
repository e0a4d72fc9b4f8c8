"""The grid of a sweep: recipe keys and their values become named runs, for train.sweep and slurm."""

import itertools
import re
from pathlib import Path

from data_prep.errors import UserError
from train.recipe import switch


def expand_grid(recipes: list[str], vary: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Name the runs of a grid.

    Args:
        recipes: YAML recipes; each is combined with each combination of values.
        vary: keys and their values, "optim.lr=1e-5,3e-5".

    Returns:
        Recipe and flags by the name of the run:
            {"demo-lr=1e-5-seed=0": ("demo.yaml", ["--optim.lr", "1e-5", "--seed", "0"])}.

    Raises:
        UserError: not a key and values, or two runs have the same name.
    """
    runs: dict[str, tuple[str, list[str]]] = {}
    for recipe, values in itertools.product(recipes, combinations(vary)):
        name = "-".join([Path(recipe).stem, *(f"{key.split('.')[-1]}={value}" for key, value in values)])
        if name in runs:
            raise UserError(
                f"{name}: two runs of the sweep have this name; use recipes with different file names and"
                " list each value once"
            )
        runs[name] = (recipe, [word for key, value in values for word in _flag(key, value)])
    return runs


def _flag(key: str, value: str) -> list[str]:
    return [switch(key, value == "true")] if value in ("true", "false") else [f"--{key}", value]


def combinations(vary: list[str]) -> list[tuple[tuple[str, str], ...]]:
    """["lr=1,2", "seed=0"] -> [(("lr", "1"), ("seed", "0")), (("lr", "2"), ("seed", "0"))]."""
    axes = []
    for axis in vary:
        if not re.fullmatch(r"[\w.-]+=[^,=/\s]+(,[^,=/\s]+)*", axis):
            raise UserError(f"--vary {axis}: must be KEY=VALUE,VALUE,..., for example optim.lr=1e-5,3e-5")
        key, values = axis.split("=")
        axes.append([(key, value) for value in values.split(",")])
    return list(itertools.product(*axes))
