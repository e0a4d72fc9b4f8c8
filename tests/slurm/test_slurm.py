"""What is submitted is a whole bash script, mistakes cost no night in the queue, and status says what to do."""

import functools
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, assert_mistake, call_here

import slurm.__main__
from slurm.pipeline import job, pipeline
from slurm.queue import fields
from slurm.script import Shape
from slurm.site import SITE, read_site
from slurm.status import advice, describe, status
from slurm.submit import submit, sweep

RECIPE = str(ROOT / "train" / "recipes" / "demo.yaml")
TWO = Shape(nodes=2, gpus=2, time="12:00:00")


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    return tmp_path / "shards"


def scripts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.rglob("*.sbatch")}


def test_every_script_is_whole_and_slurm_sees_all_its_options(tmp_path, shards, capsys):
    submit(RECIPE, tmp_path / "run", shards, TWO, dry_run=True)
    sweep(
        [RECIPE], tmp_path / "sweep", shards, ["optim.lr=1e-5,3e-5", "seed=0,1"], TWO, at_once=2, dry_run=True
    )
    numbers = pipeline(
        ["a.csv"],
        RECIPE,
        tmp_path / "path",
        tmp_path / "new",
        build="--caption-column text",
        shape=TWO,
        publish="--repo me/it",
        dry_run=True,
    )
    assert numbers == ["PREPARE", "MERGE", "TRAIN1", "EVAL", "PUBLISH"]
    found = scripts(tmp_path)
    assert set(found) == {
        "train.sbatch",
        "sweep.sbatch",
        "prepare.sbatch",
        "merge.sbatch",
        "eval.sbatch",
        "publish.sbatch",
    }
    printed = capsys.readouterr().out
    for name, text in found.items():
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0, name
        assert "@" not in re.sub(r'"[^"]*"|\[@\]|USR1@300|#.*', "", text), f"{name}: a mark was not filled in"
        options, _, rest = text.partition("\nset -uo pipefail\n")
        assert "#SBATCH" not in rest, f"{name}: sbatch reads no options after the first command"
        for option in (
            "--signal=B:USR1@300",
            "--requeue",
            "--open-mode=append",
            "--output=",
            "--cpus-per-task=",
        ):
            assert f"#SBATCH {option}" in options, (name, option)
        assert text in printed
    train = found["train.sbatch"]
    for option in ("--nodes=2", "--gpus-per-node=2", "--time=12:00:00"):
        assert f"#SBATCH {option}\n" in train
    assert "#SBATCH --array=0-3%2\n" in found["sweep.sbatch"]
    assert "#SBATCH --array=0-31\n" in found["prepare.sbatch"]
    assert "HF_HUB_OFFLINE=0" in found["publish.sbatch"]
    assert "HF_HUB_OFFLINE=1" in found["eval.sbatch"]
    waits = re.findall(r"--dependency=(\S+) --kill-on-invalid-dep=yes \S+/(\w+)\.sbatch", printed)
    assert waits == [
        ("afterok:PREPARE", "merge"),
        ("afterok:MERGE", "train"),
        ("afterok:TRAIN1", "eval"),
        ("afterok:EVAL", "publish"),
    ]


def test_a_chain_waits_link_by_link(tmp_path, shards, capsys):
    assert submit(RECIPE, tmp_path / "run", shards, TWO, after=["7"], chain=3, dry_run=True) == [
        "TRAIN1",
        "TRAIN2",
        "TRAIN3",
    ]
    waits = re.findall(r"--dependency=(\S+)", capsys.readouterr().out)
    assert waits == ["afterok:7", "afterany:TRAIN1", "afterany:TRAIN2"]
    assert "\nREQUEUE=no\n" in scripts(tmp_path)["train.sbatch"]


def test_values_arrive_as_they_were_typed(tmp_path, shards):
    """Spaces, quotes and dollars in names are data, and no commands."""
    run = tmp_path / "a run; $(touch evil)'"
    site = tmp_path / "site.yaml"
    site.write_text("environment: {WORD: \"it's $HOME\"}\nsbatch: ['--comment=a b']\n")
    flags = ("--model", "x:$(touch evil)")
    submit(RECIPE, run, shards, TWO, site=site, dry_run=True, flags=flags)
    text = scripts(run)["train.sbatch"]
    assert '#SBATCH "--comment=a b"' in text
    settings = text.partition("\ncd ")[2].partition("\njob=")[0]
    show = f'cd {settings}\nprintf "%s\\n" "$RUN" "$WORD" "${{FLAGS[@]}}"'
    shown = subprocess.run(
        ["bash", "-c", show], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.splitlines()
    assert shown == [str(run), "it's $HOME", *flags]
    assert not list(tmp_path.rglob("evil"))


def test_mistakes_are_found_before_the_queue(tmp_path, shards):
    main, to = slurm.__main__.main, ["--run", tmp_path / "run", "--data", shards]
    assert_mistake(
        call_here(main, "submit", RECIPE, "--run", tmp_path / "run", "--data", tmp_path),
        "no manifest.json",
        "--after",
    )
    assert_mistake(
        call_here(main, "submit", RECIPE, *to, "--nodes", 3),
        "--global_batch_size 128 cannot be shared evenly by 24 ranks",
    )
    assert_mistake(call_here(main, "submit", RECIPE, *to, "--nodes", 0), "at least one node")
    assert_mistake(call_here(main, "submit", RECIPE, *to, "--chain", 0), "--chain 0")
    assert_mistake(call_here(main, "submit", "no.yaml", *to), "no such recipe file")
    assert_mistake(call_here(main, "submit", RECIPE, *to, "--", "--epochs", 0), "--epochs 0")
    assert_mistake(
        call_here(main, "sweep", RECIPE, RECIPE, "--runs", tmp_path, "--data", shards),
        "two runs of the sweep have this name",
    )
    assert_mistake(
        call_here(main, "sweep", RECIPE, "--runs", tmp_path, "--data", shards, "--vary", "lr"), "--vary lr"
    )
    assert_mistake(call_here(main, "job", "x", "--folder", tmp_path), "no command")
    assert_mistake(call_here(main, "status", tmp_path / "nowhere"), "neither a run nor submitted")
    for text, word in (
        ("partitoin: x", "no key 'partitoin'"),
        ("warn_s: soon", "'warn_s' is 'soon'"),
        ("- a", "key: value"),
        ("a: [", "YAML"),
    ):
        (tmp_path / "site.yaml").write_text(text)
        assert_mistake(
            call_here(main, "submit", RECIPE, *to, "--site", tmp_path / "site.yaml"), "site.yaml", word
        )
    assert not scripts(tmp_path)


def test_without_slurm_the_script_is_written_and_the_user_told(tmp_path, shards, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    told = call_here(slurm.__main__.main, "submit", RECIPE, "--run", tmp_path / "run", "--data", shards)
    assert_mistake(told, "train.sbatch is written, but there is no sbatch on this machine")


def test_our_site_file_has_every_key_and_the_defaults():
    site = read_site(SITE)
    assert site.options(2, 8) == [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--gpus-per-node=8",
    ]
    assert site.options(1, 0) == ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=8"]
    assert set(re.findall(r"^(\w+):", SITE.read_text(), flags=re.MULTILINE)) == set(site.__dataclass_fields__)


def test_status_says_where_it_stands_and_what_to_do(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "checkpoints" / "samples-000000001280").mkdir(parents=True)
    (run / "status.json").write_text('{"state": "stopped", "samples": 1280, "eta_s": 60}')
    (run / "slurm" / "jobs").write_text("12 train\n")
    (run / "slurm" / "train-12.log").write_text(
        "slurm: job 12.0: begins\ntraining: 3 %\nerror: the disk is full\n"
    )
    monkeypatch.setenv("PATH", "")
    status(run)
    said = capsys.readouterr().out
    for words in (
        f"{run}: stopped",
        "eta_s       60",
        "samples-000000001280",
        "12 train: the cluster has forgotten it",
        "error: the disk is full",
    ):
        assert words in said
    assert "training: 3 %" not in said
    assert said.splitlines()[-1].startswith("to do       it was stopped, and can go on")
    (run / "slurm" / "jobs").write_text("13_2 train\n")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "sweep-13_2.log").write_text("error: of a sweep\n")
    status(run)
    assert "error: of a sweep" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "alive", "last", "stop", "silent_s", "words"),
    [
        ("finished", False, "COMPLETED", False, 0, "eval retrieval"),
        ("running", True, "RUNNING", True, 0, "it stops"),
        ("running", True, "RUNNING", False, 9, "touch"),
        ("running", True, "RUNNING", False, 900, "nothing for 15 min"),
        ("running", True, "PENDING", False, 900, "it waits in the queue"),
        ("running", False, "CANCELLED", False, 0, "can go on"),
        ("running", False, "TIMEOUT", False, 0, "warn_s"),
        ("running", False, "FAILED", False, 0, "the reason is in the log"),
        ("", False, "", False, 0, "submit it"),
    ],
)
def test_advice(state, alive, last, stop, silent_s, words):
    assert words in advice(state, alive, last, stop, silent_s, Path("run"))


def test_what_slurm_says_is_read():
    line = (
        "JobId=12 JobName=train JobState=PENDING Reason=Resources Restarts=2 StartTime=2026-11-22T01:00:00"
        " NodeList=(null) ExitCode=0:0"
    )
    job = fields(line)
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "2")
    assert describe(job) == "PENDING, 2 restarts, Resources, begins at 2026-11-22T01:00:00 or before"
    assert describe({}) == "the cluster has forgotten it"


def test_a_command_of_any_kind(tmp_path):
    site = functools.partial(
        job, folder=tmp_path, dry_run=True, flags=("eval", "retrieval", "a model", "--data", "x")
    )
    site("eval", shape=Shape(1, 2))
    assert "COMMAND=(eval retrieval 'a model' --data x)" in scripts(tmp_path)["eval.sbatch"]
    assert "TORCHRUN=yes" in scripts(tmp_path)["eval.sbatch"]
