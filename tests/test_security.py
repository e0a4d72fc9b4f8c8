"""docs/security.md: every promise names the tests that hold it, and they exist."""

import ast
import re

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()
TEST = re.compile(r"`(tests/[\w/]+\.py)`")
ROWS = re.findall(r"^\| (.+) \| (.+) \|$", PAGE, flags=re.MULTILINE)
PROMISES = [row for row in ROWS if row[1] != "held by"]


def test_there_are_promises():
    assert len(PROMISES) > 25
    assert ROWS.count(("promise", "held by")) == PAGE.split("\n## Not promised")[0].count("\n## ")


@pytest.mark.parametrize(("promise", "tests"), PROMISES, ids=[promise[:50] for promise, _ in PROMISES])
def test_a_promise_names_its_tests(promise, tests):
    names = TEST.findall(tests)
    assert tests == ", ".join(f"`{name}`" for name in names)
    for name in names:
        tree = ast.parse((ROOT / name).read_text())
        assert any(
            isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body
        ), name


def test_no_other_test_is_named():
    assert set(re.findall(r"tests/[\w/]+\.py", PAGE)) <= {
        "tests/test_security.py",
        *(name for _, tests in PROMISES for name in TEST.findall(tests)),
    }


def test_other_documents_lead_to_it():
    assert "](security.md)" in (ROOT / "docs" / "architecture.md").read_text()
