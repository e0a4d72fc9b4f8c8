"""Every command of eval gives the same result on two ranks as on one; retrieval has its own test."""

import json
import subprocess
import sys

from conftest import ROOT, environment
from every_command import every_command
from labelled_formats import as_folder, labelled_images

NAMES = (
    "zeroshot.json",
    "linear_probe.json",
    "confusion.json",
    "compositionality.json",
    "compare/compare.json",
)


def test_two_ranks_give_the_result_of_one(tiny_model, icon_shards, tmp_path, one_thread):
    for split, seeds in (("train", (1, 2)), ("val", (3,))):
        as_folder(
            tmp_path / "images", [each for seed in seeds for each in labelled_images(seed)], split=split
        )
    paths = [icon_shards, tmp_path / "images"]
    every_command(tiny_model, *paths, tmp_path / "one")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [
        sys.executable,
        *launcher,
        str(ROOT / "tests" / "every_command.py"),
        tiny_model,
        *map(str, paths),
        str(tmp_path / "two"),
    ]
    result = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in NAMES:
        one, two = (json.loads((tmp_path / ranks / name).read_text()) for ranks in ("one", "two"))
        assert close(one, two), name
    index = {path.name: path.read_bytes() for path in (tmp_path / "one" / "index").iterdir()}
    assert index == {path.name: path.read_bytes() for path in (tmp_path / "two" / "index").iterdir()}


def close(one, two) -> bool:
    """Equal except for the last digits of losses; a count, a rank or an accuracy of so few images would
    differ by far more.
    """
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(close, one, two))
    return abs(one - two) <= 1e-4 * max(1, abs(one)) if isinstance(one, float) else one == two
