"""A stranger's recipe or site file ends in a value or in one sentence."""

import contextlib

import pytest

from data_prep.errors import UserError
from slurm.site import read_site
from train.recipe import flags_of, parse

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
FILES = (
    BOMB,
    "[" * 100_000,
    "{a: " * 100_000,
    "optim: {lr: 2026-99-99}",
    "seed: " + "1" * 5000,
    "\0",
    "a: b: c",
)
FILES += ("- 1", "1", "", "!!python/object/apply:os.system ['true']", "model: &a [*a]", "x" * (1 << 19))
FILES += ("? {a: b}\n: c", "optim: &o {lr: *o}", "seed: !!int x", "model: !!binary x", "1: 2", "null: 3")
VALUES = ("nan", "-1", ".nan", "inf", "1" * 5000, "true", "[]", "{}", "x", "2026-01-01", "null", "0x10")
KEYS = ("seed", "global_batch_size", "ema", "wise_ft", "model")


@pytest.mark.parametrize("number", range(len(FILES)))
def test_odd_files_are_one_sentence(number, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(FILES[number])
    for act in (flags_of, read_site):
        with contextlib.suppress(UserError):
            act(file)


@pytest.mark.parametrize("value", VALUES)
def test_odd_values_are_values_or_one_sentence(value, tmp_path, capsys):
    for key in KEYS:
        file = tmp_path / "recipe.yaml"
        file.write_text(f"{key}: {value}\n")
        with contextlib.suppress(UserError, SystemExit):  # the parser exits with its own sentence
            parse([str(file), "--data", "x", "--run", "y"])
        assert "Traceback" not in capsys.readouterr().err
