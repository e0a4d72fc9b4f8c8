"""The README's commands run as they stand, on a small set; those that want GPUs or weights at least parse."""

import functools
import re
import shlex

import pytest
from conftest import ROOT, call

import data_prep.__main__
import eval.__main__
import slurm.__main__
import train.export.folder
import train.model.fetch
import train.publish.hub
import train.tune.lr
import train.tune.sweep
from train.recipe import parse

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
ROOMS = {"data_prep": data_prep.__main__, "eval": eval.__main__, "slurm": slurm.__main__}
ROOMS |= {f"train.{name}": getattr(train, name) for name in ("export", "publish", "fetch", "lr", "sweep")}
SMALLER = {
    "data_prep icons": "--limit 240",
    "data_prep build": "--images-per-shard 50",
    "train": "--epochs 2 --global_batch_size 32 --micro_batch_size 32 --log_every_steps 1",
    "eval retrieval": "--workers 0",
}


def commands(language: str) -> list[list[str]]:
    lines = [line.split("  #")[0] for kind, text in BLOCKS for line in text.splitlines() if kind == language]
    return [shlex.split(line) for line in lines if line.strip()]


def test_the_walk_by_hand(tmp_path):
    ran = []
    for words in commands("bash"):
        ranks = int(words[2]) if words[0] == "torchrun" else 0
        start = ["torchrun", "--nproc_per_node", "2", "-m", "--"] if ranks else ["python", "-m"]
        assert words[: len(start)] == start
        arguments = [re.sub(r"^(data/|runs/|out\.)", rf"{tmp_path}/\1", word) for word in words[len(start) :]]
        name = next(name for name in SMALLER if " ".join(arguments).startswith(name))
        call(*arguments, *SMALLER[name].split(), ranks=ranks)
        ran.append(name)
    assert set(ran) == set(SMALLER)
    assert (tmp_path / "out.json").is_file()
    page = (tmp_path / "out.html").read_text()
    assert page.count("<figure") >= 8
    assert 'src="http' not in page


def test_the_other_commands_parse(monkeypatch):
    called = []
    for room, names in (
        (data_prep.__main__, "build index review merge verify"),
        (
            eval.__main__,
            (
                "retrieval zeroshot probe compare confusion probes leaks embed_corpus search serve cluster"
                " export"
            ),
        ),
        (slurm.__main__, "submit sweep pipeline status"),
        (train.export, "command"),
        (train.publish, "publish"),
        (train.fetch, "fetch"),
        (train.lr, "search"),
        (train.sweep, "sweep table"),
    ):
        for name in names.split():
            stand_in = functools.wraps(getattr(room, name))(
                lambda *_, name=name, **given: called.append((name, given))
            )
            monkeypatch.setattr(room, name, stand_in)
    for words in commands("sh"):
        if words[0] == "sbatch":
            words = shlex.split(words[words.index("--wrap") + 1])
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        elif words[0] == "torchrun":
            assert words[:2] == ["torchrun", "--nproc_per_node"]
            assert words[3:6] == ["-m", "--", "train"]
            assert parse(words[6:]).model == "ViT-L-14:laion2b_s32b_b82k"
        else:
            monkeypatch.setattr("sys.argv", words[2:])
            ROOMS[words[2]].main()
    names = [
        "build",
        "build",
        "build",
        "index",
        "review",
        "build",
        "build",
        "merge",
        "search",
        "sweep",
        "table",
    ]
    names += ["submit", "pipeline", "sweep", "status", "retrieval", "retrieval"]
    names += ["zeroshot", "zeroshot", "probe", "compare", "confusion", "probes"]
    names += [
        "embed_corpus",
        "search",
        "search",
        "serve",
        "serve",
        "cluster",
        "export",
        "command",
        "publish",
        "fetch",
    ]
    assert [name for name, _ in called] == names
    assert called[1][1]["read"].images == "https://host/pictures/"
    assert called[0][1]["inputs"] == ["pairs.csv"]


@pytest.mark.parametrize(
    "path", [path for path in re.findall(r"\]\((?!http|#)([^)]+)\)", (ROOT / "README.md").read_text())]
)
def test_links_lead_somewhere(path):
    assert (ROOT / path).is_file()
