"""Recipes and site files of changed bytes and values: values or one sentence, and nothing runs."""

import contextlib
import json

import fuzz
import pytest
import yaml

from slurm.site import SITE, read_site
from train.recipe import RECIPES, Recipe, flags_of, parse, read_yaml, to_yaml

WHOLE = to_yaml(Recipe("demo-vit:none", "data", "runs/a")).encode()
# As much of libyaml's notation as people use.
NOTATION = (
    b"a: &x {b: [1, 2.5, true, null, 2026-01-01, 0x1f, .nan]}\nc: *x\nd: |\n  text\n  more\ne: 'it''s'\n"
)
NOTATION += b'f: "\\u00e4\\x00"\n? g\n: !!str 1\n<<: {h: 1}\n--- # second\ni: !!python/name:os.system\n'


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_yaml(count, memory_folder):
    file = memory_folder / "a.yaml"

    def act(data: bytes) -> None:
        file.write_bytes(data)
        value = read_yaml(file)
        assert value is None or isinstance(value, object)

    fuzz.check(count, fuzz.changed_bytes(NOTATION, WHOLE[:300]), act, (OSError, ValueError, yaml.YAMLError))


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_recipes_and_site_files(count, memory_folder):
    file = memory_folder / "recipe.yaml"
    seeds = [yaml.safe_load(WHOLE), yaml.safe_load((RECIPES / "demo.yaml").read_text())]
    seeds.append(
        yaml.safe_load(SITE.read_text()) or {"account": "a", "environment": {"A": 1}, "cpus_per_gpu": 8}
    )
    texts = (WHOLE[:400], (RECIPES / "demo.yaml").read_bytes()[:400])

    def changed(choices: fuzz.Choices) -> bytes:
        if choices.number() % 4 == 0:
            return fuzz.edited(choices.of(texts), choices)
        return fuzz.changed_json(choices.of(seeds), choices)  # JSON is YAML, but for a few signs

    def act(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(fuzz.UserError):
            flags_of(file)
        read_site(file)

    fuzz.check(count, fuzz.made_by(changed), act)


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_recipe_to_its_end(count, memory_folder, capsys):
    """With the parser, which takes too long for more; it prints its own sentences and exits."""
    file, seed = memory_folder / "a.yaml", yaml.safe_load(WHOLE)

    def act(value: object) -> None:
        try:
            file.write_text(json.dumps(value))
        except ValueError:
            return
        to_yaml(parse([str(file)])).encode()

    fuzz.check(count, fuzz.changed_values(seed), act, (fuzz.UserError, SystemExit), valid=[seed])
    assert "Traceback" not in capsys.readouterr().err
