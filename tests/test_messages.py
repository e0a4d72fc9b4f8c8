"""No message, help or guide names an option that does not exist: all strings against options.txt."""

import ast
import re
from dataclasses import fields

import pytest
from conftest import ROOT, noise_images

from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.errors import UserError
from data_prep.inputs.rows import Columns

ROOMS = ("data_prep", "train", "eval", "slurm")
OPTION = re.compile(r"(?<![\w-])--((?:[a-z]|\{[^{}]*\})(?:[\w.-]|\{[^{}]*\})*)")
# Options of other programs that we start, or name in messages.
OTHERS = {
    "every command": {"help"},
    "torchrun": {"nproc_per_node", "max-restarts", "standalone", "run-path"},
    "Slurm": {
        *(
            "cpus-per-task",
            "dependency",
            "gpus-per-node",
            "job-name",
            "kill-on-invalid-dep",
            "ntasks-per-node",
        ),
        *("oneliner", "output", "parsable", "signal"),
    },
    "open_clip_train": {"aug-cfg"},
    "tensorboard": {"logdir"},
    "hf": {"repo-type"},
    "npm": {"ignore-scripts", "silent"},
    "http.server": {"directory"},
    "trackio": {"project"},
    "recipe.py, of any key": {"flag", "key", "no-key", "augment.key", "augment.no-key"},
}
# Options that are put together, by the file and the expression: all that they can be.
COMPOSED = {
    ("data_prep/inputs/cells.py", "{use}-column"): ["group", "split", "label", "caption"],
    ("data_prep/inputs/parquet.py", "{use}-column"): [field.name for field in fields(Columns)],
    ("data_prep/inputs/rows.py", "{use}-column"): [field.name for field in fields(Columns)],
}
# Composed of keys of a recipe, of parameters of commands, or of options of another program.
KEYS = {
    "data_prep/cli.py",
    "data_prep/build/resume.py",
    "train/recipe.py",
    "train/run/folder.py",
    "train/tune/grid.py",
    "train/bench/peer.py",
    "slurm/site.py",
}


def existing() -> set[str]:
    text = (ROOT / "tests" / "options.txt").read_text()
    keys = set(text.split("\n\n")[0].splitlines()[1:])
    return {
        *re.findall(r"^--([\w.-]+)", text, flags=re.MULTILINE),
        *keys,
        *(key.replace("_", "-") for key in keys),
    }


def named(path) -> set[str]:
    """The options in the strings of a Python file; of an f-string, with its expressions in braces."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            texts.append(
                "".join(
                    str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                    for part in node.values
                )
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return {option.rstrip(".") for text in texts for option in OPTION.findall(text)}


def test_every_option_that_is_named_exists():
    options = existing()
    known = options.union(*OTHERS.values())
    unknown, composed, others = [], set(), set()
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        file = str(path.relative_to(ROOT))
        for option in named(path) - options:
            if "{" in option:
                composed.add((file, option))
            elif option in known:
                others.add(option)
            else:
                unknown.append(f"{file}: --{option}")
    assert not unknown
    assert {place for place in composed if place[0] not in KEYS} <= set(COMPOSED)
    for (_, option), values in COMPOSED.items():
        made = {re.sub(r"\{.*\}", value, option) for value in values}
        assert made <= options, made - options
    assert others == set().union(*OTHERS.values())


def test_advice_of_a_build_can_be_followed(tmp_path, capsys):
    table = noise_images(tmp_path, 4)
    table.write_text("image,caption,split\n" + "".join(f"{n}.png,caption {n},val\n" for n in range(4)))
    build([str(table)], tmp_path / "out", Reading(split_column="split"), parallelism=Parallelism(1))
    printed = capsys.readouterr().out
    assert "--train" not in printed
    assert set(OPTION.findall(printed)) <= existing()


def test_max_rejects_is_a_fraction(tmp_path):
    table = noise_images(tmp_path, 4)
    table.write_text(table.read_text() + "".join(f"none{n}.png,a,\n" for n in range(96)))
    report = build([str(table)], tmp_path / "out", check=Checking(max_rejects=1), parallelism=Parallelism(1))
    assert (report["records"], report["rejects"]) == (4, 96)
    (tmp_path / "b.csv").write_text("image,caption\nnone.png,a\nnone.png,b\n")
    with pytest.raises(
        UserError, match=r"^none of the 2 rows can be used:\n .* missing file\n.*Fix the input$"
    ):
        build(
            [str(tmp_path / "b.csv")],
            tmp_path / "none",
            check=Checking(max_rejects=1),
            parallelism=Parallelism(1),
        )
    with pytest.raises(UserError, match=r"--max-rejects 5: must be a fraction of rows, from 0 to 1"):
        build([str(table)], tmp_path / "five", check=Checking(max_rejects=5), parallelism=Parallelism(1))
