"""What a sweep varies: keys and their values become runs, each with a name; here (train.sweep) and on a
cluster (slurm).
"""

import itertools
import re
from pathlib import Path

from data_prep.errors import UserError


def expand_grid(recipes: list[str], vary: list[str]) -> dict[str, tuple[str, list[str]]]:
    """The runs of a sweep by name: {"demo-lr=1e-5-seed=0": ("demo.yaml", ["--optim.lr", "1e-5", "--seed",
    "0"])}.

    Args:
        recipes: YAML recipes; each is combined with each combination of values.
        vary: keys and their values, "optim.lr=1e-5,3e-5".

    Raises:
        UserError: not a key and values, or two runs have one name.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for recipe, values in itertools.product(recipes, combinations(vary)):
        name = "-".join([Path(recipe).stem, *(f"{key.split('.')[-1]}={value}" for key, value in values)])
        if name in found:
            raise UserError(
                f"{name}: two runs of the sweep have this name; give recipes of different names, and each"
                " value once"
            )
        found[name] = (recipe, [word for key, value in values for word in (f"--{key}", value)])
    return found


def combinations(vary: list[str]) -> list[tuple[tuple[str, str], ...]]:
    """["lr=1,2", "seed=0"] -> [(("lr", "1"), ("seed", "0")), (("lr", "2"), ("seed", "0"))]."""
    axes = []
    for text in vary:
        if not re.fullmatch(r"[\w.]+=[^,=/\s]+(,[^,=/\s]+)*", text):
            raise UserError(f"--vary {text}: a key and its values are wanted, as in optim.lr=1e-5,3e-5")
        key, values = text.split("=")
        axes.append([(key, value) for value in values.split(",")])
    return list(itertools.product(*axes))
