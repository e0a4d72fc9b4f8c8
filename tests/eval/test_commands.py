"""python -m eval: the guide, and the help of every command, without torch."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, call_here, environment

from eval.__main__ import COMMANDS, __doc__, main

HEAVY = ("torch", "pandas", "open_clip", "transformers", "sklearn", "matplotlib")


def test_the_guide_names_every_command(capsys, monkeypatch):
    for arguments in ([], ["--help"]):
        monkeypatch.setattr("sys.argv", ["eval", *arguments])
        main()
        printed = capsys.readouterr().out
        assert __doc__.strip() in printed
    for name in COMMANDS:
        assert f"python -m eval {name} " in printed


def test_help_of_each_command_imports_nothing_heavy():
    """One process for all: what is imported by any of them stays imported."""
    code = f"""
import contextlib, io, json, sys
from eval.__main__ import COMMANDS, main
pages = {{}}
for name in COMMANDS:
    sys.argv = ["eval", name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        main()
    pages[name] = page.getvalue()
print(json.dumps([pages, [name for name in {HEAVY} if name in sys.modules]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    pages, heavy = json.loads(done.stdout)
    assert heavy == []
    for name, page in pages.items():
        assert page.startswith(f"usage: python -m eval {name} "), name


def test_an_unknown_command_is_a_mistake():
    result = call_here(main, "retrieve")
    assert "no such command; it can be retrieval, " in result.stderr


@pytest.mark.parametrize("name", ["probe", "probes"])
def test_no_alias_is_kept(name):
    assert "no such command" in call_here(main, name).stderr
