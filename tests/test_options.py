"""Every recipe key and every flag is in options.txt: a new one, or one less, is a decision.

After a decision: python tests/test_options.py > tests/options.txt
"""

import contextlib
import dataclasses
import importlib
import io
import re
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data_prep.cli import CONFIG  # noqa: E402
from train.recipe import Recipe, leaves  # noqa: E402

OWN_OPTIONS = {
    "train.forecast": "train.forecast:Forecast",
    "train.lr": "train.lr:Search",
    "train.sweep": "train.sweep:Sweep",
    "train.bench": "train.bench.__main__:Bench",
    "train.export": "train.export.__main__:command",
    "train.publish": "train.publish.__main__:publish",
    "train.fetch": "train.fetch:fetch",
}


def recipe_keys() -> list[str]:
    return sorted(leaves(dataclasses.asdict(Recipe("m", "d", "r"))))


def commands() -> dict[str, str]:
    """ "module:function" of each command, by the words that are typed after `python -m`."""
    found = dict(OWN_OPTIONS)
    for room in ("data_prep", "eval", "slurm"):
        table = importlib.import_module(f"{room}.__main__").COMMANDS
        found |= {f"{room} {name}": place for name, place in table.items()}
    return found


def flags_of(place: str) -> list[str]:
    module, _, name = place.partition(":")
    command = getattr(importlib.import_module(module), name)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"], config=CONFIG)
    return sorted({*re.findall(r"^[│ ] (--[\w.-]+)", text.getvalue(), flags=re.MULTILINE)})


def listing() -> str:
    lines = ["# recipe keys", *recipe_keys()]
    for command, place in sorted(commands().items()):
        lines += ["", f"# python -m {command}", *flags_of(place)]
    return "\n".join(lines) + "\n"


def test_all_options_are_listed():
    expected = (ROOT / "tests" / "options.txt").read_text()
    assert listing() == expected, "options have changed: python tests/test_options.py > tests/options.txt"


if __name__ == "__main__":
    print(listing(), end="")
