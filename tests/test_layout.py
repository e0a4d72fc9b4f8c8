"""The rooms: data_prep <- train <- eval <- slurm, and cliptune, which offers them as one command and one
package. Imports point left, leaves are imported by commands alone, and one module of training takes optimizer
steps.
"""

import ast
import importlib
import json
import re
from pathlib import Path

import open_clip
import pytest
from conftest import ROOT

import cliptune.__main__
import data_prep.rooms
import train.model.source

ROOMS = ["data_prep", "train", "eval", "slurm", "cliptune"]
MODULES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
SUB_ROOMS = sorted({path.parent for path in MODULES})
# The commands with an import from the right.
COMPOSE = [Path("train/__main__.py"), Path("train/forecast.py"), Path("train/export/__main__.py")]

# What can be deleted without breaking another module, and the modules that may import it all the same: they
# are a command of their own. Commands in a __main__.py may import any leaf.
LEAVES = {
    "data_prep.review": [],
    "data_prep.report.page": ["data_prep/report/summary.py"],
    "train.bench": ["train/tune/forecast.py"],
    "train.tune": ["train/forecast.py", "train/lr.py", "train/sweep.py", "slurm/submit.py"],
    "train.export": [
        "train/publish/card.py",
        "train/publish/hub.py",
        "eval/search/site.py",
        "eval/search/tower.py",
    ],
    "train.publish": [],
    "eval.align": [],
    "eval.cluster": [],
    "eval.compositionality": [],
    "slurm": [],
}


def imported(source: str) -> set[str]:
    """Full names of the modules and of what is taken from them, those imported inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(source: str, room: str) -> set[str]:
    """Names of the modules of a room that are imported, without the packages they are in."""
    files = {".".join(path.with_suffix("").parts) for path in MODULES}
    packages = {".".join(path.parts) for path in SUB_ROOMS}
    names = {name for name in imported(source) if name in files | packages and is_in(name, room)}
    return {
        name for name in names if name in files or not any(is_in(other, name) for other in names - {name})
    }


def is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def steppers(source: str) -> set[str]:
    """Expressions whose step() is called: {"optimizer", "state.optimizer"}."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {
        ast.unparse(function.value)
        for function in calls
        if isinstance(function, ast.Attribute) and function.attr == "step"
    }


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_left(path):
    allowed = ROOMS[: ROOMS.index(path.parts[0]) + 1]
    rooms = {name.split(".")[0] for name in imported((ROOT / path).read_text())} & set(ROOMS)
    assert rooms <= {*allowed, *(["eval"] if path in COMPOSE else [])}


def test_an_example_imports_what_its_user_has():
    for path in (ROOT / "examples").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path.read_text())} & set(ROOMS) == {"cliptune"}


def test_the_rooms_know_their_names():
    assert [room for room in ROOMS if room not in data_prep.rooms.ROOMS] == ["cliptune"]


@pytest.mark.parametrize("path", COMPOSE, ids=str)
def test_some_commands_of_training_import_one_module_of_eval(path):
    assert imported_modules((ROOT / path).read_text(), "eval") == {"eval.validation"}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_is_imported_by_commands_alone(leaf):
    folder = Path(*leaf.split("."))
    assert (ROOT / folder).is_dir() or (ROOT / folder).with_suffix(".py").is_file()
    importers = {
        str(path)
        for path in MODULES
        if not path.is_relative_to(folder)
        and path.name != "__main__.py"
        and any(is_in(name, leaf) for name in imported((ROOT / path).read_text()))
    }
    assert importers == set(LEAVES[leaf])


def test_one_module_takes_optimizer_steps():
    """All of training is in train_step(): the loop, the benchmark and the tests of faults call it. The other
    two train heads or projections on features that are computed once, and no model.
    """
    found = {
        str(path) for path in MODULES if any("optim" in name for name in steppers((ROOT / path).read_text()))
    }
    assert found == {"train/step.py", "eval/classify/heads.py", "eval/bases/projections.py"}


def printers(source: str) -> list[str]:
    """Calls that write to the terminal."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [name for name in calls if name in ("print", "sys.stdout.write", "sys.stderr.write")]


def test_one_module_prints():
    """say() makes foreign text safe for a terminal, and masks secrets."""
    assert {str(path) for path in MODULES if printers((ROOT / path).read_text())} == {"data_prep/terminal.py"}


def test_the_rules_see_what_they_forbid():
    source = (
        "import os\nfrom eval.retrieval.ranking import ranks\nfrom eval import embed\n"
        "def f(state):\n    import train.loop\n    state.optimizer.step(found_inf=None)\n    log.step()"
    )
    assert {"eval.retrieval.ranking", "eval.embed", "train.loop"} < imported(source)
    assert imported_modules(source, "eval") == {"eval.retrieval.ranking", "eval.embed"}
    assert steppers(source) == {"state.optimizer", "log"}
    assert printers("print(1)\nimport sys\nsys.stderr.write('')\nsay(2)") == ["print", "sys.stderr.write"]


@pytest.mark.parametrize("path", SUB_ROOMS, ids=str)
def test_a_sub_room_says_in_one_line_what_its_subject_is(path):
    tree = ast.parse((ROOT / path / "__init__.py").read_text())
    assert len(ast.get_docstring(tree).splitlines()) == 1
    if str(path) == "cliptune":
        return  # the API
    code = 1 if str(path) == "data_prep" else 0  # what must be imported first
    assert len(tree.body) == 1 + code, "a package holds its docstring and nothing else"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_imports_and_has_a_docstring(path):
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    assert module.__doc__


def test_no_test_of_training_imports_another():
    """What they share is in tests/runs.py and tests/conftest.py."""
    files = {path: imported(path.read_text()) for path in (ROOT / "tests" / "train").rglob("*.py")}
    tests = {path.stem for path in files}
    assert {path.name: names & tests for path, names in files.items() if names & tests} == {}


def test_our_architectures_are_known_to_open_clip():
    for path in train.model.source.MODELS.glob("*.json"):
        assert open_clip.get_model_config(path.stem) == json.loads(path.read_text())


def test_the_version_is_that_of_the_project(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cliptune", "--version"])
    cliptune.__main__.main()
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert capsys.readouterr().out == f"cliptune {version}\n"
