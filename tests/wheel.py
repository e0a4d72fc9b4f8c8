"""The wheel, installed in an environment of its own, and a folder of a user to run it from."""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

from data_prep.rooms import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements*.txt", "cliptune", *ROOMS)


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
