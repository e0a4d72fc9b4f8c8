"""The wheel in an environment of its own, used from a folder that has a user's train.py, eval.py and others.

The heavy packages are those of the environment of the tests.
"""

import functools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, call

from cliptune.commands import COMMANDS
from data_prep.rooms import ROOMS

PACKAGED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements*.txt", "cliptune", *ROOMS)
SMALL = "--epochs 1 --global-batch-size 32 --micro-batch-size 32 --workers 1 --log-every-steps 1".split()  # noqa: SIM905


class Installed(NamedTuple):
    wheel: Path
    bin: Path  # of the environment
    folder: Path  # of the user

    def run(self, *words, expect: int = 0, **more: str) -> str:
        """Run a program of the environment in the user's folder; what it prints."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
        result = subprocess.run(
            [self.bin / words[0], *map(str, words[1:])],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == expect, f"{words}: {result.returncode}\n{result.stdout}"
        return result.stdout


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    (folder / "clone").mkdir()
    for path in (path for name in PACKAGED for path in ROOT.glob(name)):
        copy = functools.partial(shutil.copytree, ignore=shutil.ignore_patterns("__pycache__"))
        (copy if path.is_dir() else shutil.copyfile)(path, folder / "clone" / path.name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder / "clone"]
    subprocess.run(build, check=True)
    [wheel] = folder.glob("*.whl")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    [site] = venv.glob("lib/python*/site-packages")
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = [*pip, "--python", venv / "bin" / "python"]
    subprocess.run([*python, "install", "--no-deps", "--no-index", wheel], check=True)
    (folder / "user").mkdir()
    for room in ROOMS:  # `python -m` and a script in this folder would import these first
        (folder / "user" / f"{room}.py").write_text("WHOSE = 'the user'\n")
    return Installed(wheel, venv / "bin", folder / "user")


@pytest.fixture(scope="session")
def shards(installed) -> Path:
    installed.run("cliptune", "icons", "--out", "icons", "--limit", 120)
    columns = ["--image-column", "file_path", "--caption-column", "caption", "--group-column", "group"]
    installed.run("cliptune", "build", "icons/icons.csv", "--out", "shards", *columns)
    return installed.folder / "shards"


def test_the_wheel_holds_every_file_and_no_name_of_the_clone(installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        texts = {name: wheel.read(name).decode("utf-8", "replace") for name in wheel.namelist()}
    clone = installed.wheel.parent / "clone"
    ours = [path for room in ROOMS for path in (clone / room).rglob("*") if path.is_file()]
    expected = {f"cliptune/{path.relative_to(clone)}" for path in ours if "__pycache__" not in path.parts}
    assert len(expected) > 150
    expected |= {f"cliptune/{path.name}" for path in (clone / "cliptune").glob("*.py")}
    assert {name for name in texts if ".dist-info/" not in name} == expected
    for name, text in texts.items():
        if name.startswith("cliptune/"):
            assert not re.search(rf'python -m[\s"f]*({"|".join(ROOMS)})\b', text), name
            assert not re.search(rf"^\s*(from|import) ({'|'.join(ROOMS)})[. ]", text, re.MULTILINE), name
            assert not re.search(r"train/recipes/\w+\.yaml", text), name


def test_messages_name_the_console_command():
    setup = runpy.run_path(str(ROOT / "setup.py"))
    for text, expected in {
        "make one: python -m eval embed MODEL --out INDEX": "make one: cliptune embed MODEL --out INDEX",
        "by `python -m data_prep index`": "by `cliptune index-tars`",
        "python -m train train/recipes/demo.yaml --data": "cliptune train demo --data",
        "python -m train.lr RECIPE": "cliptune lr RECIPE",
        "python -m eval export indexes/icons": "cliptune export-index indexes/icons",
        "python -m slurm sweep RECIPE": "cliptune submit-sweep RECIPE",
        "python -m eval": "cliptune",
        'images: python -m"\n    " data_prep build ...': 'images: "\n    " cliptune build ...',
        'images: python -m"\n    f" train.sweep --table': 'images: "\n    f" cliptune sweep --table',
        "python -m\n    train.fetch MODEL": "cliptune fetch MODEL",
        "torchrun --nproc_per_node 2 -m -- train A": "torchrun --nproc_per_node 2 -m -- cliptune train A",
        "torchrun --nproc_per_node 6 -m eval embed RUN": "torchrun --nproc_per_node 6 -m cliptune embed RUN",
    }.items():
        assert setup["renamed_commands"](text) == expected
    source = "def f():\n    é = 1; from train.loop import fit\nfrom evaluate import train\n"
    renamed = setup["renamed_imports"](source, Path("a.py"))
    assert renamed == source.replace("from train", "from cliptune.train")
    with pytest.raises(ValueError, match=r"a\.py:1: write `from"):
        setup["renamed_imports"]("import train.loop", Path("a.py"))


def test_the_command_alone_prints_a_guide_at_once(installed):
    code = (
        "import sys, runpy; runpy.run_module('cliptune', run_name='__main__'); print('numpy' in sys.modules)"
    )
    started = time.monotonic()
    guide = installed.run("cliptune")
    assert time.monotonic() - started < 5  # 0.3 s on an idle machine
    assert installed.run("python", "-c", code) == f"{guide}False\n"
    assert all(re.search(rf"\b{name}\b", guide) for name in COMMANDS)
    assert "did you mean retrieval?" in installed.run("cliptune", "retreival", expect=2)
    usage = installed.run("cliptune", "export-index", "--help")
    assert usage.startswith("usage: cliptune export-index ")
    assert "cliptune export-index indexes/icons --out icons.sql" in usage
    assert installed.run("cliptune", "publish").startswith("usage: cliptune publish MODEL")
    recipes = {path.stem for path in (ROOT / "train" / "recipes").glob("*.yaml")}
    assert recipes <= set(re.findall(r"\w+", guide.partition("A recipe is a name")[2]))


def test_every_module_imports_beside_modules_of_the_user(installed):
    """The user's own `train` stays the user's, before and after."""
    code = (
        "import importlib, pkgutil, sys, train, cliptune, eval\n"
        "names = [found.name for found in pkgutil.walk_packages(cliptune.__path__, 'cliptune.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "import slurm, data_prep\n"
        "print({module.WHOSE for module in (train, eval, slurm, data_prep)}, len(names) > 150)\n"
        "print(len(cliptune.load('demo-vit:none').encode_texts(['a bell', 'a house'])))"
    )
    assert installed.run("python", "-c", code) == "{'the user'} True\n2\n"


@pytest.mark.slow
def test_training_from_any_folder_on_two_ranks_and_in_a_sweep(installed, shards):
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
    said = installed.run(*torchrun, "cliptune", "train", "demo", "--data", "shards", "--run", "two", *SMALL)
    assert "evaluate: cliptune retrieval two --data shards" in said
    said = installed.run("cliptune", "sweep", "demo", "--data", "shards", "--runs", "sweep", *SMALL)
    status = json.loads((installed.folder / "sweep" / "demo" / "status.json").read_text())
    assert status["state"] == "finished"
    assert "cliptune retrieval RUN" in said
    said = installed.run("cliptune", "train", "sweep/demo/recipe.yaml")
    assert "is finished" in said
    said = installed.run("cliptune", "retrieval", "two", "--data", "shards", "--split", "val", "--workers", 1)
    assert "R@1" in said
    environment = json.loads((installed.folder / "two" / "environment.json").read_text())
    assert (environment["git_commit"], environment["cliptune"]) == (None, "0.1.0")


FAKE_SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""


def test_jobs_run_modules_of_the_package_in_the_folder_of_the_user(installed):
    pipeline = ["pairs.csv", "--recipe", "icons", "--run", "path", "--data", "new", "--gpus", 0, "--dry-run"]
    said = installed.run("cliptune", "submit-pipeline", *pipeline)
    for module in ("cliptune.data_prep build", "cliptune.data_prep merge", "cliptune.eval retrieval"):
        assert f"\nCOMMAND=({module} " in said
    assert "\nMODULE=cliptune.train\n" in said
    assert said.count(f"\ncd {installed.folder}\n") == 4


@pytest.mark.slow
def test_a_submitted_job_trains(installed, shards, tmp_path):
    """The batch script, with a program in place of srun; it starts in another folder."""
    resources = ["--gpus", 0, "--dry-run"]
    installed.run("cliptune", "submit", "demo", "--run", "job", "--data", "shards", *resources, "--", *SMALL)
    installed.run("cliptune", "submit-job", "look", "--folder", "job", *resources, "--", "fetch", "--help")
    for name, text in {"srun": FAKE_SRUN, "scontrol": "#!/bin/bash\necho localhost\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL_S": "0.2"}
    printed = {}
    for script in ("train", "look"):
        done = subprocess.run(
            ["bash", installed.folder / "job" / "slurm" / f"{script}.sbatch"],
            cwd=tmp_path,
            env={**os.environ, **slurm, "PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        printed[script] = done.stdout
    assert json.loads((installed.folder / "job" / "status.json").read_text())["state"] == "finished"
    assert "usage: cliptune fetch" in printed["look"]


def test_the_clone_has_the_same_commands_without_an_installation(tmp_path):
    assert "usage: cliptune COMMAND" in call("cliptune").stdout
    assert "usage: cliptune search " in call("cliptune", "search", "--help").stdout
    for name, words in COMMANDS.items():
        module = words.split()[0]
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), name
    rooms = {words.split()[0] for words in COMMANDS.values() if " " in words}
    for room in rooms:
        table = runpy.run_path(str(ROOT / room / "__main__.py"))["COMMANDS"]
        assert {f"{room} {name}" for name in table} == {
            w for w in COMMANDS.values() if w.startswith(f"{room} ")
        }
