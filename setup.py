"""The wheel has the rooms in one package, so that they never meet a user's own train.py or eval.py.

    clone                            wheel
    train/loop.py                    cliptune/train/loop.py
    from train.step import ...       from cliptune.train.step import ...
    "python -m eval search"          "cliptune search"       in messages and help
    "train/recipes/icons.yaml"       "icons"

All other settings are in pyproject.toml. An editable install (pip install -e) uses the clone as it is.
"""

import ast
import re
import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ("data_prep", "train", "eval", "slurm")
PACKAGE = "cliptune"
COMMANDS = runpy.run_path(str(Path(__file__).parent / PACKAGE / "commands.py"))["COMMANDS"]
NAMES = {words: name for name, words in COMMANDS.items()}
TEXT_FILES = (".py", ".html", ".md", ".yaml", ".sbatch", ".sh")

# `python -m train.export`, also where a message is continued in the next line or literal.
SPACE = r'(?:\s+|"\s*\n\s*f?" ?|\s*\n\s*)'
BY_PYTHON = re.compile(rf"python -m({SPACE})({'|'.join(ROOMS)})((?:\.[a-z_]+)*)\b(?: ([a-z-]+)\b(?!/))?")
BY_TORCHRUN = re.compile(r"(torchrun [^\n]*?-m (?:-- )?)(train|eval)(?: ([a-z-]+)\b(?!/))?")
RECIPE = re.compile(r"\btrain/recipes/(\w+)\.yaml")


class BuildPackage(build_py):
    """Copies the rooms as ever, then moves them into the package and renames what refers to them."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        root = Path(self.build_lib)
        shutil.rmtree(root, ignore_errors=True)  # an earlier build's files would be in the wheel
        super().run()
        for room in ROOMS:
            (root / room).rename(root / PACKAGE / room)
        for path in (root / PACKAGE).rglob("*"):
            if path.suffix in TEXT_FILES:
                text = path.read_text(encoding="utf-8")
                text = renamed_imports(text, path) if path.suffix == ".py" else text
                path.write_text(renamed_commands(text), encoding="utf-8")


def renamed_imports(source: str, path: Path) -> str:
    """`from train.step import x` -> `from cliptune.train.step import x`, inside functions too.

    Raises:
        ValueError: `import train.step`, which binds a name that would be another one in the wheel.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in ROOMS for alias in node.names):
            raise ValueError(f"{path}:{node.lineno}: write `from ... import ...` for modules of the rooms")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOMS:
            line = lines[node.lineno - 1]
            start = line.index("from ", len(line.encode()[: node.col_offset].decode())) + len("from ")
            lines[node.lineno - 1] = f"{line[:start]}{PACKAGE}.{line[start:]}"
    return "".join(lines)


def renamed_commands(text: str) -> str:
    """Commands of the clone in messages, help and comments -> those of `cliptune`."""
    text = BY_TORCHRUN.sub(lambda found: found[1] + console(found[2], found[3]), text)
    text = BY_PYTHON.sub(lambda found: console(found[2] + found[3], found[4], found[1]), text)
    return RECIPE.sub(r"\1", text)


def console(module: str, word: str | None, space: str = "") -> str:
    """`cliptune NAME` of a module, or of a room and the name of its command.

    Args:
        space: between "python -m" and the module; the end of a literal must stay.
    """
    start = space + PACKAGE if '"' in space else PACKAGE
    rest = f" {word}" if word else ""
    if name := NAMES.get(module + rest):
        return f"{start} {name}"
    return f"{start} {NAMES[module]}{rest}" if module in NAMES else f"{start}{rest}"


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPackage})
