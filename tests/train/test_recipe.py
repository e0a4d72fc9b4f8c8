"""Recipes are flags in a file: one parser, the last one wins, a saved one loads back equal."""

import pytest
import yaml
from conftest import assert_mistake, call_here

from data_prep.errors import UserError
from train.__main__ import main
from train.recipe import RECIPES, Captions, Recipe, differences, flags_of, parse, to_yaml

REQUIRED = ["--data", "d", "--run", "r"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_merged_form_is_itself_a_recipe(path, tmp_path):
    recipe = parse([str(path), *REQUIRED])
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert parse([str(tmp_path / "recipe.yaml")]) == recipe


def test_the_seed_recipe_is_the_seeds():
    recipe = parse([str(RECIPES / "spectrum_icons.yaml"), *REQUIRED])
    assert (recipe.model, recipe.global_batch_size, recipe.micro_batch_size, recipe.epochs) == (
        "ViT-L-14:laion2b_s32b_b82k",
        384,
        64,
        40,
    )
    assert (recipe.optim.lr, recipe.precision, recipe.activation_checkpointing) == (
        5e-6,
        "bf16",
        "checkpoint",
    )
    augment = recipe.augment
    assert (augment.color_jitter, augment.color_jitter_prob, augment.gray_scale_prob) == (
        (0.2, 0.2, 0.1, 0.0),
        0.7,
        0.2,
    )
    # The defaults are the seed's, on any GPU: whoever writes no recipe gets it.
    assert recipe == Recipe(
        model="ViT-L-14:laion2b_s32b_b82k",
        data="d",
        run="r",
        micro_batch_size=64,
        activation_checkpointing="full",
    )


def test_typed_flags_win_and_have_types(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: a:none\noptim: {lr: 1e-5}\naugment:\n  scale: [0.5, 1]\nmemory: none\n"
    )
    recipe = parse(
        [
            str(tmp_path / "a.yaml"),
            *REQUIRED,
            "--optim.max_grad_norm",
            "2",
            "--augment.color-jitter",
            "1",
            "2",
            "3",
            "0",
        ]
    )
    assert (recipe.optim.lr, recipe.optim.max_grad_norm, recipe.augment.scale) == (1e-5, 2.0, (0.5, 1.0))
    assert recipe.augment.color_jitter == (1, 2, 3, 0)
    assert recipe.activation_checkpointing == "none"
    assert parse([str(tmp_path / "a.yaml"), *REQUIRED, "--optim.lr", "3e-5"]).optim.lr == 3e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", r"a\.yaml: a recipe has no key 'optim\.lrr'; perhaps you meant 'optim\.lr'"),
        ("bach: 3", "perhaps you meant 'batch'"),
        ("zzz: 3", "it can be model, data"),
        ("optim: 3", "holds keys of its own"),
        ("- a\n- b", "a list of `key: value` lines"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_wrong_recipe_file_is_explained(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        flags_of(tmp_path / "a.yaml")


def test_wrong_values_are_explained():
    base = ["--model", "a:none", *REQUIRED]
    with pytest.raises(UserError, match="fraction of the run"):
        parse([*base, "--optim.warmup_fraction", "10000"])
    with pytest.raises(UserError, match="--epochs 0"):
        parse([*base, "--epochs", "0"])
    with pytest.raises(UserError, match=r"the project has .*demo\.yaml"):
        parse(["recipes/nodemo.yaml"])


@pytest.mark.parametrize(
    "templates", [(), ("{}",), ("an icon of {}", "{}", 'it\'s a "{}": yes, - no', "é #{}")]
)
def test_templates_survive_the_file(tmp_path, templates):
    """Empty ones too, which are a flag without a value."""
    recipe = parse(
        ["--model", "a:none", *REQUIRED, "--captions.templates", *templates, "--captions.tag_dropout", "0.25"]
    )
    assert recipe.captions == Captions("any", 0.25, templates)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert parse([str(tmp_path / "recipe.yaml")]) == recipe
    again = parse([str(tmp_path / "recipe.yaml"), "--captions.templates", "this {}"])
    assert again.captions.templates == ("this {}",)
    assert differences(recipe, again) == [f"captions.templates: {templates} before, ('this {{}}',) now"]


def test_templates_and_tag_dropout_are_checked():
    base = ["--model", "a:none", *REQUIRED]
    for wrong in ("an icon", "{} {}", "an icon of {name}"):
        with pytest.raises(UserError, match=r"--captions\.templates .*one {} is wanted"):
            parse([*base, "--captions.templates", "{}", wrong])
    with pytest.raises(UserError, match=r"--captions\.tag_dropout 1\.0"):
        parse([*base, "--captions.tag_dropout", "1"])
    with pytest.raises(UserError, match=r"--augment\.theme_prob -0\.5"):
        parse([*base, "--augment.theme_prob", "-0.5"])


def test_mistakes_on_the_command_line_exit_2():
    assert_mistake(call_here(main, RECIPES / "demo.yaml", *REQUIRED, "--optim.lrr", "1"), "--optim.lr")
    assert_mistake(call_here(main, RECIPES / "demo.yaml", *REQUIRED, "--global_batch_size", "many"), "many")
    assert_mistake(call_here(main, RECIPES / "demo.yaml"), "--data", "--run")


def test_what_may_change_between_the_parts_of_a_run():
    old = Recipe(model="a:none", data="d", run="r")
    values = yaml.safe_load(to_yaml(old)) | {"wise_ft": ()}
    assert differences(old, old) == []
    nested = {"optim": old.optim, "augment": old.augment, "captions": old.captions}
    same = Recipe(
        **{**values, **nested, "run": "elsewhere", "data": "there", "workers": 0, "micro_batch_size": 8}
    )
    assert differences(old, same) == []
    other = parse(["--model", "a:none", *REQUIRED, "--optim.lr", "1e-3"])
    assert differences(old, other) == ["optim.lr: 5e-06 before, 0.001 now"]
