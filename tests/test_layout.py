"""Arrows of import point left only: data_prep <- train <- eval <- slurm; train/__main__.py is the one place
that composes.
"""

import ast
import importlib
import json

import open_clip
import pytest
from conftest import ROOT

import train.model.clip

ROOMS = ["data_prep", "train", "eval", "slurm"]
MODULES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported_rooms(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names.add(node.module)
    return {name.split(".")[0] for name in names} & set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_left(path):
    allowed = set(ROOMS[: ROOMS.index(path.parts[0]) + 1])
    if str(path) == "train/__main__.py":
        allowed.add("eval")
    assert imported_rooms((ROOT / path).read_text()) <= allowed


def test_the_rule_sees_an_arrow_to_the_right():
    assert imported_rooms(
        "import os\nfrom eval.retrieval.ranking import ranks\ndef f():\n    import train.loop"
    ) == {"eval", "train"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_imports_and_says_why_it_exists(path):
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    assert module.__doc__


def test_our_architectures_are_known_to_open_clip():
    for path in train.model.clip.MODELS.glob("*.json"):
        assert open_clip.get_model_config(path.stem) == json.loads(path.read_text())
