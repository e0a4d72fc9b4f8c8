"""The one reader of JSON that others have written: what it refuses, and in which words."""

import fuzz
import pytest

from data_prep.errors import UserError
from data_prep.strict_json import load_json, problem_of, read_json

SHAPE = {"n": int, "of": {str: {"x": (float, type(None)), "y?": [str]}}}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"n": 1, "of": {"a": {"x": 1}, "b": {"x": None, "y": ["c"], "more": 2}}}, ""),
        ([], "it is a list, not an object"),
        ({"n": True, "of": {}}, "n is true or false, not a whole number"),
        ({"of": {}}, "n is missing"),
        ({"n": 1, "of": {"a": {}}}, "of.a.x is missing"),
        ({"n": 1, "of": {"a": {"x": "1"}}}, "of.a.x is a text, not a number"),
        ({"n": 1, "of": {"a": {"x": 1, "y": ["b", 3]}}}, "of.a.y[1] is a whole number, not a text"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(value, problem):
    assert problem_of(value, SHAPE) == problem


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[" * 1_000_000, "nested too deeply"),
        (b"1" * 5000, "has more than 64 bits"),
        (b"9223372036854775808", "has more than 64 bits"),
        (b"NaN", "NaN is no number in JSON"),
        (b"[1e999]", "is too large a number"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"\xff", "can't decode byte"),
        (b"[]" + b" " * 100, "more than 50 bytes"),
    ],
)
def test_what_no_other_program_could_read_is_a_sentence(data, problem, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with (
        fuzz.few_addresses(),
        pytest.raises(UserError, match=rf"a\.json: damaged \(.*{problem}.*\); do this"),
    ):
        read_json(path, object, "do this", 50 if b" " in data else 1 << 28)
    with pytest.raises(UserError, match=r"b\.json: cannot be read \(No such file"):
        read_json(tmp_path / "b.json", object, "do this")


def test_other_libraries_may_write_large_numbers(tmp_path):
    (tmp_path / "a.json").write_text('{"model_max_length": 1000000000000000019884624838656, "b": Infinity}')
    assert load_json(tmp_path / "a.json", dict, is_ours=False)["model_max_length"] == int(1e30)
