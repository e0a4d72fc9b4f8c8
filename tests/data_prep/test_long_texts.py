"""A caption has a limit at every door, and what is over it never makes a file unreadable."""

import csv

import pytest
from conftest import noise_images

from data_prep.build.decisions import Decision, read_decisions, write_decisions
from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.errors import UserError
from data_prep.inputs.names import key_of
from data_prep.inputs.rows import MAX_CHARACTERS


@pytest.mark.parametrize("field", ["new_caption", "note", "image"])
@pytest.mark.parametrize("text", ["x" * (MAX_CHARACTERS + 1), "a\0b"], ids=["long", "NUL"])
def test_a_decision_that_no_build_takes_is_refused_with_its_line(field, text, tmp_path):
    good = Decision(key_of("0.png"), "0.png", "add", new_caption="one more")
    bad = Decision(key_of("1.png"), "1.png", "add", new_caption="another")._replace(**{field: text})
    assert not good.problem()
    assert field in bad.problem()
    write_decisions(tmp_path / "decisions.csv", [good, bad])
    with pytest.raises(UserError, match=rf"decisions.csv:3: its {field} .*fix or remove this line"):
        read_decisions(tmp_path / "decisions.csv")


def test_the_longest_caption_can_be_decided_about(tmp_path):
    longest = "x" * MAX_CHARACTERS
    table = noise_images(tmp_path, 4)
    with open(table, "w", newline="") as file:
        rows = [
            ("image", "caption"),
            ("0.png", longest),
            ("1.png", f"{longest}x"),
            ("2.png", "a"),
            ("3.png", "b"),
        ]
        csv.writer(file).writerows(rows)
    edits = [Decision(key_of("0.png"), "0.png", "edit", longest, "short")]
    edits += [Decision(key_of("2.png"), "2.png", "add", new_caption=longest)]
    write_decisions(tmp_path / "decisions.csv", edits)
    report = build(
        [str(table)],
        tmp_path / "out",
        Reading(decisions=str(tmp_path / "decisions.csv")),
        Checking(max_rejects=0.5),
        parallelism=Parallelism(1),
    )
    assert (report["records"], report["reasons"]) == (4, {"text too long": 1})
