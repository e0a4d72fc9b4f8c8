"""Recipes are flags in a file: one parser reads both, typed flags win, and a saved recipe loads equal."""

import importlib.util
import re

import pytest
from conftest import assert_mistake, call_here

from data_prep.errors import UserError
from train.__main__ import COMMANDS, main
from train.recipe import RECIPES, Captions, Optim, Recipe, differences, flags_of, parse, to_yaml

REQUIRED = ["--data", "d", "--run", "r"]
BASE = ["--model", "a:none", *REQUIRED]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_merged_form_is_a_recipe(path, tmp_path):
    recipe = parse([str(path), *REQUIRED])
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert parse([str(tmp_path / "recipe.yaml")]) == recipe


def test_the_defaults_are_those_of_spectrum_icons():
    recipe = parse([str(RECIPES / "spectrum_icons.yaml"), *REQUIRED])
    assert (recipe.global_batch_size, recipe.epochs, recipe.precision) == (384, 40, "bf16")
    assert recipe.optim == Optim(lr=5e-6, warmup_fraction=0.05, weight_decay=0.2, betas=(0.9, 0.98))
    augment = recipe.augment
    assert augment.color_jitter == (0.2, 0.2, 0.1, 0.0)
    assert (augment.color_jitter_prob, augment.gray_scale_prob) == (0.7, 0.2)
    assert recipe == Recipe("ViT-L-14:laion2b_s32b_b82k", data="d", run="r", micro_batch_size=64)


def test_typed_flags_win_and_have_types(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: a:none\noptim: {lr: 1e-5}\naugment:\n  scale: [0.5, 1]\nactivation_checkpointing: none\n"
    )
    typed = ["--optim.max_grad_norm", "2", "--augment.color-jitter", "1", "2", "3", "0"]
    recipe = parse([str(tmp_path / "a.yaml"), *REQUIRED, *typed])
    assert (recipe.optim.lr, recipe.optim.max_grad_norm, recipe.augment.scale) == (1e-5, 2.0, (0.5, 1.0))
    assert recipe.augment.color_jitter == (1, 2, 3, 0)
    assert recipe.activation_checkpointing == "none"
    assert parse([str(tmp_path / "a.yaml"), *REQUIRED, "--optim.lr", "3e-5"]).optim.lr == 3e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", r"a\.yaml: unknown key 'optim\.lrr'; did you mean 'optim\.lr'\?"),
        ("global_bach_size: 3", "did you mean 'global_batch_size'"),
        ("zzz: 3", "valid keys: model, data"),
        ("optim: 3", r"'optim' must be a group of keys \(lr, "),
        ("- a\n- b", "must be a list of `key: value` lines"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_mistake_in_a_recipe_file_is_reported(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        flags_of(tmp_path / "a.yaml")


def test_a_missing_recipe_file_lists_those_of_the_project():
    with pytest.raises(UserError, match=r"recipes/nodemo\.yaml: no such recipe file; .*: cars, demo, "):
        parse(["recipes/nodemo.yaml"])


def test_a_recipe_of_the_project_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no recipe
    assert parse(["demo", *REQUIRED]) == parse([str(RECIPES / "demo.yaml"), *REQUIRED])
    (tmp_path / "icons").write_text("model: mine:none")
    assert parse(["icons", *REQUIRED]).model == "mine:none"  # a file is
    with pytest.raises(UserError, match="no such recipe file"):
        parse(["../recipes/demo", *REQUIRED])


@pytest.mark.parametrize(
    ("typed", "rule"),
    [
        ("--epochs 0", "must be at least 1"),
        ("--global-batch-size 1", "must be at least 2"),
        ("--seed -1", "must be at least 0"),
        ("--seed 9223372036854775808", "must be at most 9223372036854775807"),
        ("--workers 1000000", "must be at most 1024"),
        ("--optim.lr -0.1", "must be at least 0"),
        ("--optim.betas 0.9 1.0", "both must be at least 0 and below 1"),
        ("--optim.max-grad-norm 0.0", "must be above 0"),
        ("--optim.warmup-fraction 1.0", "must be at least 0 and below 1"),
        ("--patch-dropout 1.0", "must be at least 0 and below 1"),
        ("--captions.tag-dropout 1.0", "must be at least 0 and below 1"),
        ("--captions.templates icon", "each template must contain {} once"),
        ("--captions.templates {} {}{}", "each template must contain {} once"),
        ("--augment.flip-prob -0.5", "must be a probability from 0 to 1"),
        ("--augment.scale 1.0 0.9", "the smaller first"),
        ("--augment.color-jitter 0.1 0.1 0.1 0.6", "hue, the last, at most 0.5"),
        ("--micro-batch-size 0", "must be auto or at least 1"),
        ("--wise-ft 0.501 0.502", "differ in their second decimal"),
        ("--max-retention-drop 0.1", "needs --retention-set"),
        ("--max-nonfinite-steps 0", "must be at least 1"),
    ],
)
def test_a_value_out_of_range_is_reported(typed, rule):
    with pytest.raises(UserError, match=re.escape(f"{typed}: ") + ".*" + re.escape(rule)):
        parse([*BASE, *typed.split()])


def test_all_values_out_of_range_are_reported_at_once():
    typed = (
        "--epochs 0 --optim.lr -1.0 --augment.blur-prob 2.0 --wise-ft 1.0 --lock image --patch-dropout 0.5"
    )
    with pytest.raises(UserError) as error:
        parse([*BASE, *typed.split()])
    problems = str(error.value).split("; --")
    assert [problem.split(": ")[0].removeprefix("--") for problem in problems] == [
        "epochs 0",
        "optim.lr -1.0",
        "augment.blur-prob 2.0",
        "wise-ft 1.0",
        "lock image",
    ]


@pytest.mark.parametrize(
    "templates", [(), ("{}",), ("an icon of {}", "{}", 'it\'s a "{}": yes, - no', "é #{}")]
)
def test_templates_are_the_same_after_saving(tmp_path, templates):
    """Also none, which is a flag without a value."""
    typed = ["--captions.templates", *templates, "--captions.tag_dropout", "0.25"]
    recipe = parse([*BASE, *typed])
    assert recipe.captions == Captions("random", 0.25, templates)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert parse([str(tmp_path / "recipe.yaml")]) == recipe
    again = parse([str(tmp_path / "recipe.yaml"), "--captions.templates", "this {}"])
    assert again.captions.templates == ("this {}",)
    assert differences(recipe, again) == [f"captions.templates: {templates} before, ('this {{}}',) now"]


def test_mistakes_on_the_command_line_exit_2():
    demo = RECIPES / "demo.yaml"
    assert_mistake(call_here(main, demo, *REQUIRED, "--optim.lrr", "1"), "--optim.lr")
    assert_mistake(call_here(main, demo, *REQUIRED, "--global-batch-size", "many"), "many")
    assert_mistake(call_here(main, demo), "--data", "--run")


def test_a_command_of_its_own_is_not_taken_for_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train"])
    main()
    guide = capsys.readouterr().out
    for name in COMMANDS:
        command = f"python -m train.{name}"
        assert importlib.util.find_spec(f"train.{name}"), command
        for more in ([], ["--help"], ["train/recipes/icons.yaml", "--data", "x"]):
            assert_mistake(call_here(main, name, *more), f"{name}: no such recipe; did you mean {command}?")
        assert command in guide or name in ("fetch", "export", "publish")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr").write_text("model: m\n")
    assert_mistake(call_here(main, "lr"), "--data")


def test_keys_that_change_no_number_may_differ_when_a_run_is_resumed():
    old = parse(BASE)
    assert differences(old, old) == []
    safe = "--run elsewhere --data there --workers 0 --micro-batch-size 8 --compile never"
    assert differences(old, parse([*BASE, *safe.split()])) == []
    other = parse([*BASE, "--optim.lr", "1e-3", "--seed", "1"])
    assert differences(old, other) == ["optim.lr: 5e-06 before, 0.001 now", "seed: 0 before, 1 now"]


def test_a_missing_recipe_is_named(tmp_path):
    assert_mistake(call_here(main, *REQUIRED), "no RECIPE", "spectrum_icons", "--model is required")
    assert parse(BASE).model == "a:none"
