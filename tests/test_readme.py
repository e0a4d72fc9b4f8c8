"""Commands of README and docs: those in ```bash blocks run on a small set, those in ```sh blocks parse."""

import functools
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT, call

import data_prep.cli
from cliptune.commands import COMMANDS
from train.recipe import parse, parse_with

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SMALLER = {
    "data_prep icons": "--limit 240",
    "data_prep build": "--images-per-shard 50",
    "train": "--epochs 2 --global-batch-size 32 --micro-batch-size 32 --log-every-steps 1",
    "eval retrieval": "--workers 0",
}


def commands(language: str, pages=PAGES) -> list[list[str]]:
    lines = [
        line.split("  #")[0]
        for page in pages
        for kind, text in BLOCK.findall(page.read_text())
        for line in text.splitlines()
        if kind == language
    ]
    return [in_the_clone(shlex.split(line)) for line in lines if line.strip()]


def in_the_clone(words: list[str]) -> list[str]:
    """`cliptune NAME ...`, also under torchrun, as `python -m MODULE ...`; other commands as they are."""
    start = words.index("--") + 1 if words[0] == "torchrun" and "--" in words else 0
    if words[start] != "cliptune":
        return words
    module = [*COMMANDS[words[start + 1]].split(), *words[start + 2 :]]
    return [*(words[:start] or ["python", "-m"]), *module]


def test_the_commands_by_hand_run(tmp_path):
    ran = set()
    for words in commands("bash"):
        ranks = int(words[2]) if words[0] == "torchrun" else 0
        start = ["torchrun", "--nproc_per_node", "2", "-m", "--"] if ranks else ["python", "-m"]
        assert words[: len(start)] == start
        arguments = [re.sub(r"^(data/|runs/|out\.)", rf"{tmp_path}/\1", word) for word in words[len(start) :]]
        name = next(name for name in SMALLER if " ".join(arguments).startswith(name))
        call(*arguments, *SMALLER[name].split(), ranks=ranks)
        ran.add(name)
    assert ran == set(SMALLER)
    assert (tmp_path / "out.json").is_file()
    page = (tmp_path / "out.html").read_text()
    assert page.count("<figure") >= 8
    assert 'src="http' not in page


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """The names of the functions that would have been called; commands only parse."""
    names = []

    def only_parse(command, prog, arguments=None, guide=None, **options):
        @functools.wraps(command)
        def stand_in(*_, **__):
            names.append(command.__name__)

        return run_command(stand_in, prog, arguments, guide, **options)

    run_command = data_prep.cli.run_command
    monkeypatch.setattr(data_prep.cli, "run_command", only_parse)
    for module in ("train.export.__main__", "train.publish.__main__", "train.fetch"):
        monkeypatch.setattr(importlib.import_module(module), "run_command", only_parse)
    return names


def run_words(words: list[str], monkeypatch, parsed: list[str]) -> None:
    """Parse what follows `python -m`."""
    module, arguments = words[0], words[1:]
    monkeypatch.setattr(sys, "argv", words)
    if module == "train":
        assert parse(arguments).model
    elif module in ("train.lr", "train.forecast", "train.sweep"):
        if "--table" not in arguments:
            importlib.import_module(module).read([*arguments, "--run", "unused"])
    elif module == "train.bench":
        bench = importlib.import_module("train.bench.__main__")
        parse_with(bench.Bench, [*arguments, "--run", "unused"], bench.PROG, bench.__doc__)
    elif module in ("train.export", "train.publish"):
        importlib.import_module(f"{module}.__main__").main()
    elif module == "train.fetch":
        importlib.import_module(module).main()
    elif module == "tests.slurm_lab":
        assert (ROOT / "tests" / "slurm_lab" / "__main__.py").is_file()
    else:
        before = len(parsed)
        importlib.import_module(f"{module}.__main__").main()
        assert len(parsed) == before + 1


@pytest.mark.parametrize("words", commands("sh"), ids=" ".join)
def test_a_command_parses(words, monkeypatch, parsed):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    if words[:2] in (["pip", "install"], ["uv", "pip"]):
        return
    if words[0] == "sbatch":
        words = shlex.split(words[words.index("--wrap") + 1])
    if words[0] == "torchrun":
        assert (words[1], words[3:5]) == ("--nproc_per_node", ["-m", "--"])
        run_words(words[5:], monkeypatch, parsed)
    else:
        assert words[:2] == ["python", "-m"]
        run_words(words[2:], monkeypatch, parsed)


def test_every_command_is_documented(monkeypatch):
    """In README or docs, by its name."""
    text = "\n".join(page.read_text() for page in PAGES)
    for room in ("data_prep", "eval", "slurm"):
        for name in importlib.import_module(f"{room}.__main__").COMMANDS:
            assert re.search(rf"{room} {name}\b|\*\*{name}\*\*", text), f"{room} {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link
