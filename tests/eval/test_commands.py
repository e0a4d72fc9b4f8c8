"""python -m eval: the guide, and the help of every command, without torch."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, assert_mistake, call_here, environment

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


def test_a_wrong_index_filter_or_folder_is_refused_without_torch(icon_index, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "of mine").touch()
    index, nowhere, full = str(icon_index), str(tmp_path / "nowhere"), str(tmp_path / "full")
    cases = [
        (["search", nowhere, "--text", "a"], "no index there"),
        (["search", index, "--text", "a", "--filter", "split"], "must be COLUMN=VALUE"),
        (["search", index, "--text", "a", "--filter", "split=none"], "split can be train"),
        (["serve"], "no INDEX given"),
        (["serve", index, nowhere], "no index there"),
        (["serve", index, index, "--model", "a"], "1 models for 2 indexes"),
        (["site", nowhere, "--out", nowhere], "no index there"),
        (["site", index, "--out", full, "--overwrite"], "has no .made.json"),
        (["compress", nowhere, "--out", f"{nowhere}-small"], "no index there"),
        (["compress", index, "--out", full], "exists already"),
    ]
    code = f"""
import json, sys
from data_prep.errors import UserError
from eval.__main__ import main
for arguments, _ in {cases!r}:
    sys.argv = ["eval", *arguments]
    try:
        main()
    except UserError as error:
        print(json.dumps([str(error), "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, (arguments, words) in zip(done.stdout.splitlines(), cases, strict=True):
        said, has_torch = json.loads(line)
        assert words in said, arguments
        assert not has_torch, arguments


def test_an_unknown_command_is_a_mistake():
    result = call_here(main, "retrieve")
    assert "no such command; it can be retrieval, " in result.stderr


@pytest.mark.parametrize("name", ["probe", "probes"])
def test_no_alias_is_kept(name):
    assert "no such command" in call_here(main, name).stderr


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("retrieval", ["--json", "--page"]),
        ("confusion", ["--json", "--page"]),
        ("compositionality", ["--json", "--page"]),
        ("compare", ["--out"]),
        ("zeroshot", ["--json", "--out"]),
        ("linear-probe", ["--json", "--page", "--out", "--cache"]),
        ("leaks", ["--csv"]),
        ("search", ["--json", "--out"]),
        ("export", ["--out"]),
        ("cluster", ["--page", "--csv", "--pairs", "--json"]),
    ],
)
def test_outputs_are_checked_before_anything_is_read(name, options, tmp_path):
    """There is no such MODEL, SHARDS or INDEX: the place of the output is what is refused."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    needed = {"leaks": ["--csv", "a.csv"], "export": ["--out", "a.sql"], "cluster": ["--page", "a.html"]}
    data = [] if name in ("search", "export", "cluster") else ["--data", "nowhere"]
    for option in options:
        is_folder = option in ("--cache",) or (option == "--out" and name not in ("search", "export"))
        others = needed.get(name, []) if option not in needed.get(name, []) else []
        for place, words in (
            ("file" if is_folder else "folder", f"is a {'file' if is_folder else 'folder'}; pass the path"),
            ("file/new/a.json", "file is a file, not a folder"),
        ):
            result = call_here(main, name, "nowhere", *data, *others, option, tmp_path / place)
            assert_mistake(result, f"{option} {tmp_path / place}: ", words)
    assert (tmp_path / "file").read_text() == "kept"


def test_two_outputs_are_two_files_and_a_device_is_kept(tmp_path):
    same = ["--json", tmp_path / "a", "--page", f"{tmp_path}/./a"]
    assert_mistake(
        call_here(main, "retrieval", "nowhere", "--data", "nowhere", *same), "--json and --page: both"
    )
    mistake = call_here(main, "retrieval", "nowhere", "--data", "nowhere", "--json", "/dev/null")
    assert_mistake(mistake, "--json /dev/null: is a device or pipe; pass the path of a file")
    good = ["--json", tmp_path / "new" / "a.json", "--page", tmp_path / "a.html"]
    assert_mistake(call_here(main, "retrieval", "nowhere", "--data", "nowhere", *good), "nowhere: ")
    assert not list(tmp_path.iterdir())
