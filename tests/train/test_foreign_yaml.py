"""A stranger's recipe or site file ends in a value or in one sentence."""

import contextlib

import pytest
import torch

from data_prep.errors import UserError
from slurm.site import read_site
from train.data.order import random_bits
from train.recipe import flags_of, parse, read_yaml, to_yaml

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


SMUGGLED = (
    "log: [tensorboard, --seed, 7]",
    "log: [tensorboard, --seed=7]",
    "model: --seed=7",
    "wise_ft: [-h]",
)
SMUGGLED += ("captions: {templates: ['an icon of {}', --data, elsewhere]}", "model: --help", "log: --run=x")


@pytest.mark.parametrize("text", SMUGGLED)
def test_a_value_of_a_recipe_is_no_flag(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{text}\n")
    with pytest.raises(UserError, match="begins like a flag, which a value must not"):
        flags_of(file)


def test_values_that_begin_with_a_dash_are_values(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: demo-vit:none\noptim: {lr: 1.0e-3}\ncaptions: {templates: ['- {}', '-{}']}\n")
    recipe = parse([str(file), "--data", "x", "--run", "y"])
    assert recipe.captions.templates == ("- {}", "-{}")
    file.write_text(to_yaml(recipe))
    assert parse([str(file)]) == recipe


def test_no_value_of_a_recipe_acts_on_the_terminal(tmp_path):
    file = tmp_path / "recipe.yaml"
    for text in ('epochs: "\\e]0;x\\a"', 'model: "\\x9b31m"', 'log: ["\\e[2J"]'):
        file.write_text(f"{text}\n")
        with pytest.raises(UserError, match=r"must be of printable characters") as error:
            flags_of(file)
        assert str(error.value).isprintable()


def test_a_variable_of_a_site_is_a_name(tmp_path):
    """It becomes a line of a batch script."""
    file = tmp_path / "site.yaml"
    for name in ("A=1; touch x #", "A B", "1", "$(id)"):
        file.write_text(f"environment: {{{name!r}: x}}\n")
        with pytest.raises(UserError, match="not the name of a variable"):
            read_site(file)
    file.write_text("environment: {NCCL_DEBUG: WARN}\n")
    assert read_site(file).environment == {"NCCL_DEBUG": "WARN"}


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("model: a\nepochs: 1\n\nepochs: 2\n", "epochs", "2 and 4"),
        ("model: a\noptim:\n  lr: 1.0e-3\n  'lr': 1.0e-4\n", "lr", "3 and 4"),
        ("environment: {A: 1, B: 2, A: 3}\n", "A", "1 and 1"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(text, key, lines, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    for act in (flags_of, read_site):
        with pytest.raises(UserError, match=f"'{key}' is given twice, in lines {lines}; remove one"):
            act(file)


def test_a_key_may_be_in_two_groups_and_override_a_merged_one(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "base: &b {lr: 1, eps: 2}\nfirst: &f {<<: *b, lr: 3}\nthen: {<<: [*f, *b], eps: 4}\nlr: 5\n"
    )
    assert read_yaml(file) == {
        "base": {"lr": 1, "eps": 2},
        "first": {"lr": 3, "eps": 2},
        "then": {"lr": 3, "eps": 4},
        "lr": 5,
    }


def test_the_largest_seed_is_one_of_torch_and_of_numpy():
    seed = parse(["--model", "a:none", "--data", "x", "--run", "y", "--seed", str(2**63 - 1)]).seed
    with torch.random.fork_rng(devices=[]):
        assert torch.manual_seed(seed).initial_seed() == seed
    assert torch.tensor(seed).item() == seed
    assert len(random_bits(3, seed, 1)) == 3
