"""Control characters of a stranger's text are escaped in the lists and pages of a build."""

import csv
import json

from conftest import noise_images

from data_prep.build.decisions import Decision, write_decisions
from data_prep.build.pipeline import Checking, Parallelism, build
from data_prep.sheets import write_csv
from data_prep.terminal import CONTROL, UNSAFE

EVIL = "\x1b[31mred\x1b]0;owned\x07 \x9b2J \u202eback"


def test_rejects_and_the_report_have_none(tmp_path):
    noise_images(tmp_path, 1)
    rows = [("0.png", "a"), (f"{EVIL}.png", "b"), ("0.png", f"c {EVIL}")]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in rows)
    )
    out = tmp_path / "out"
    build([str(tmp_path / "a.jsonl")], out, check=Checking(max_rejects=0.9), parallelism=Parallelism(1))
    for name, unsafe, back in (("rejects.csv", UNSAFE, r"\u202e"), ("report.html", CONTROL, "\u202e")):
        text = (out / name).read_text(encoding="utf-8")
        assert not unsafe.search(text.replace("\r\n", "\n"))
        assert rf"\x1b[31mred\x1b]0;owned\x07 \x9b2J {back}back.png" in text


def test_a_list_that_is_read_again_is_exact(tmp_path):
    decisions = [Decision("0" * 16, "0.png", "drop", note=EVIL)]
    write_decisions(tmp_path / "a.csv", decisions)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert EVIL in next(csv.DictReader(file)).values()
    write_csv(tmp_path / "b.csv", ["a"], [[f"=1{EVIL}"]])
    assert (tmp_path / "b.csv").read_text().splitlines()[1].startswith(r"'=1\x1b[31m")
