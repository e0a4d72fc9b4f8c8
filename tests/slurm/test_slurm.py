"""Submitted scripts are complete bash scripts, mistakes are reported before anything is queued, and status
says what to do next.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_mistake, call_here

import slurm.__main__
import tests.slurm_lab.__main__
from slurm.pipeline import job, pipeline
from slurm.queue import parse_fields
from slurm.script import Resources
from slurm.site import SITE, read_site
from slurm.status import advice, describe, status
from slurm.submit import submit, sweep

RECIPE = ROOT / "train" / "recipes" / "demo.yaml"
TWO_NODES = Resources(nodes=2, gpus=2, time="12:00:00")


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    return tmp_path / "shards"


def scripts_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.rglob("*.sbatch")}


@pytest.fixture
def dry_run(tmp_path, shards, capsys) -> tuple[dict[str, str], str]:
    """Every script that the commands write, by its name, and what they print."""
    submit(RECIPE, tmp_path / "run", shards, TWO_NODES, dry_run=True)
    vary = ("optim.lr=1e-5,3e-5", "seed=0,1")
    sweep((str(RECIPE),), tmp_path / "sweep", shards, vary, TWO_NODES, at_once=2, dry_run=True)
    numbers = pipeline(
        ("a.csv",),
        RECIPE,
        tmp_path / "path",
        tmp_path / "new",
        build="--caption-column text",
        resources=TWO_NODES,
        publish="--repo me/it",
        dry_run=True,
    )
    assert numbers == ["PREPARE", "MERGE", "TRAIN1", "EVAL", "PUBLISH"]
    return scripts_in(tmp_path), capsys.readouterr().out


def test_options_in_quotes_as_the_help_of_pipeline_has_them(tmp_path, monkeypatch):
    path = ["a.csv", "--recipe", RECIPE, "--run", tmp_path / "path", "--data", tmp_path / "new", "--dry-run"]
    more = [
        "--build",
        "--image-column file --caption-column text",
        "--publish",
        "--repo ME/MODEL --license mit",
    ]
    monkeypatch.setattr(sys, "argv", ["slurm", "pipeline", *map(str, path), *more])
    slurm.__main__.main()
    scripts = scripts_in(tmp_path)
    assert "--image-column file --caption-column text" in scripts["prepare.sbatch"]
    assert "--repo ME/MODEL --license mit" in scripts["publish.sbatch"]


def test_every_script_is_complete_and_slurm_reads_all_its_options(dry_run):
    scripts, printed = dry_run
    names = ("train", "sweep", "prepare", "merge", "eval", "publish")
    assert set(scripts) == {f"{name}.sbatch" for name in names}
    for name, text in scripts.items():
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0, name
        assert "@" not in re.sub(r'"[^"]*"|\[@\]|USR1@300|#.*', "", text), f"{name}: a mark was not replaced"
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
    for option in ("--nodes=2", "--gpus-per-node=2", "--time=12:00:00"):
        assert f"#SBATCH {option}\n" in scripts["train.sbatch"]
    assert "#SBATCH --nodes=1\n" in scripts["eval.sbatch"]
    assert "#SBATCH --array=0-3%2\n" in scripts["sweep.sbatch"]
    assert "#SBATCH --array=0-31\n" in scripts["prepare.sbatch"]


def test_each_job_of_a_pipeline_waits_for_the_previous_one(dry_run):
    scripts, printed = dry_run
    waits = re.findall(r"--dependency=(\S+) --kill-on-invalid-dep=yes \S+/(\w+)\.sbatch", printed)
    assert waits == [
        ("afterok:PREPARE", "merge"),
        ("afterok:MERGE", "train"),
        ("afterok:TRAIN1", "eval"),
        ("afterok:EVAL", "publish"),
    ]
    assert "HF_HUB_OFFLINE=1" in scripts["eval.sbatch"]
    assert "HF_HUB_OFFLINE=0" in scripts["publish.sbatch"]
    [command] = re.findall(r"^COMMAND=\((.*)\)$", scripts["publish.sbatch"], flags=re.MULTILINE)
    assert command.split()[0] == "train.publish"
    assert "--yes" in command.split(), "publishing asks before it uploads, and a job has no terminal"


def test_each_job_of_a_chain_waits_for_the_previous_one(tmp_path, shards, capsys):
    numbers = submit(RECIPE, tmp_path / "run", shards, TWO_NODES, after=("7",), chain=3, dry_run=True)
    assert numbers == ["TRAIN1", "TRAIN2", "TRAIN3"]
    waits = re.findall(r"--dependency=(\S+)", capsys.readouterr().out)
    assert waits == ["afterok:7", "afterany:TRAIN1", "afterany:TRAIN2"]
    assert "\nREQUEUE=no\n" in scripts_in(tmp_path)["train.sbatch"]


def test_special_characters_are_data_not_commands(tmp_path, shards):
    run = tmp_path / "a run; $(touch evil)'"
    site = tmp_path / "site.yaml"
    site.write_text("environment: {WORD: \"it's $HOME\"}\nsbatch: ['--comment=a b']\n")
    flags = ("--model", "x:$(touch evil)")
    submit(RECIPE, run, shards, TWO_NODES, site=site, dry_run=True, flags=flags)
    text = scripts_in(run)["train.sbatch"]
    assert '#SBATCH "--comment=a b"' in text
    settings = text.partition("\ncd ")[2].partition("\n# In an array")[0]
    show = f'cd {settings}\nprintf "%s\\n" "$RUN" "$WORD" "${{FLAGS[@]}}"'
    result = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.splitlines() == [str(run), "it's $HOME", *flags]
    assert not list(tmp_path.rglob("evil"))


def test_mistakes_are_reported_before_anything_is_queued(tmp_path, shards):
    paths = ["--run", tmp_path / "run", "--data", shards]
    sweep_paths = ["--runs", tmp_path, "--data", shards]
    for arguments, *words in (
        (["submit", RECIPE, "--run", tmp_path / "run", "--data", tmp_path], "no manifest.json", "--after"),
        (
            ["submit", RECIPE, *paths, "--nodes", 3],
            "--global-batch-size 128: must be a multiple of the 24 ranks",
        ),
        (["submit", RECIPE, *paths, "--nodes", 0], "--nodes 0: must be at least 1"),
        (["submit", RECIPE, *paths, "--gpus", -1], "--gpus -1: must be 0"),
        (["submit", RECIPE, *paths, "--chain", 0], "--chain 0: must be at least 1"),
        (["submit", "no.yaml", *paths], "no such recipe file"),
        (
            ["submit", RECIPE, "--run", tmp_path / "run", "--data", f"{shards}=0.7", f"{tmp_path / 'b'}=0.3"],
            "b: no manifest.json",
        ),
        (
            ["submit", RECIPE, "--run", tmp_path / "run", "--data", f"{shards}=0.7", "b=0.4"],
            "must be above 0 and sum to 1",
        ),
        (["submit", RECIPE, *paths, "--", "--epochs", 0], "--epochs 0"),
        (["sweep", RECIPE, RECIPE, *sweep_paths], "two runs of the sweep have this name"),
        (["sweep", RECIPE, *sweep_paths, "--vary", "lr"], "--vary lr"),
        (["sweep", *sweep_paths], "no recipe"),
        (["pipeline", "--recipe", RECIPE, *paths], "no input"),
        (["pipeline", "a.csv", "--recipe", RECIPE, *paths, "--tasks", 0], "--tasks 0: must be at least 1"),
        (["job", "x", "--folder", tmp_path], "no command"),
        (["status", tmp_path / "nowhere"], "not a run, and not submitted"),
        (["status", tmp_path, "--", "x"], "takes nothing after --"),
    ):
        assert_mistake(call_here(slurm.__main__.main, *arguments), *words)
    for text, word in (
        ("partitoin: x", "unknown key 'partitoin'"),
        ("warn_s: soon", "'warn_s' is 'soon'; its type must be int"),
        ("- a", "key: value"),
        ("a: [", "YAML"),
    ):
        site = tmp_path / "site.yaml"
        site.write_text(text)
        assert_mistake(
            call_here(slurm.__main__.main, "submit", RECIPE, *paths, "--site", site), "site.yaml", word
        )
    assert not scripts_in(tmp_path)


def test_without_slurm_the_script_is_written_and_the_user_told(tmp_path, shards, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = call_here(slurm.__main__.main, "submit", RECIPE, "--run", tmp_path / "run", "--data", shards)
    assert_mistake(result, "train.sbatch: written, but there is no sbatch on this machine")


def test_what_follows_the_dashes_is_passed_on(tmp_path, shards, monkeypatch, capsys):
    def run(*arguments) -> None:
        monkeypatch.setattr("sys.argv", ["python -m", *map(str, arguments)])
        slurm.__main__.main()

    paths = ["--run", tmp_path / "run", "--data", shards]
    run("submit", RECIPE, *paths, "--gpus", 2, "--dry-run", "--", "--optim.lr", "1e-5", "--epochs", "3")
    assert "\nFLAGS=(--optim.lr 1e-5 --epochs 3)\n" in scripts_in(tmp_path)["train.sbatch"]
    run("job", "x", "--folder", tmp_path, "--dry_run", "--", "eval", "search", "--text", "a b")
    assert "\nCOMMAND=(eval search --text 'a b')\n" in scripts_in(tmp_path)["x.sbatch"]
    for words in (["search", "--text", "b"], ["cliptune", "search", "--text", "b"]):
        run("job", "x", "--folder", tmp_path, "--dry_run", "--", *words)
        assert "\nCOMMAND=(cliptune search --text b)\n" in scripts_in(tmp_path)["x.sbatch"]


@pytest.mark.parametrize("command", ["submit", "sweep", "pipeline", "job", "status"])
def test_help_has_its_own_usage_line_and_imports_nothing_heavy(command):
    script = (
        "import sys; from slurm.__main__ import main\n"
        "try: main()\n"
        "finally: print('heavy:', {'torch', 'open_clip', 'pandas', 'numpy'} & set(sys.modules))"
    )
    line = [sys.executable, "-c", script, command, "--help"]
    started = time.monotonic()
    result = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
    assert time.monotonic() - started < 5  # 0.2 s on an idle machine
    assert result.stdout.startswith(f"usage: python -m slurm {command} ")
    assert result.stdout.endswith("heavy: set()\n")


def test_the_lab_is_used_by_tests_alone_and_names_its_drills():
    for path in (ROOT / "slurm").glob("*.py"):
        assert not re.search(r"^\s*(from|import) tests\b", path.read_text(), flags=re.MULTILINE), path
    result = call_here(tests.slurm_lab.__main__.main, "drills", "hang", "nonsense")
    assert_mistake(result, "nonsense: no such drill; there are two_nodes, ", ", hang, ")


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


def test_status_shows_the_state_and_what_to_do(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "checkpoints" / "samples-000000001280").mkdir(parents=True)
    (run / "status.json").write_text(
        '{"state": "stopped", "samples": 1280, "eta_s": 60, "requested_by": "file"}'
    )
    (run / "slurm" / "jobs").write_text("12 train\n")
    log = "slurm: job 12.0: starts\ntraining: 3 %\nerror: the disk is full\n"
    (run / "slurm" / "train-12.log").write_text(log)
    monkeypatch.setenv("PATH", "")
    status(run)
    printed = capsys.readouterr().out
    for words in (
        f"{run}: stopped",
        "eta_s       60",
        "requested_by file",
        "samples-000000001280",
        "12 train: no longer known to Slurm",
        "error: the disk is full",
    ):
        assert words in printed
    assert "training: 3 %" not in printed
    assert printed.splitlines()[-1].startswith("to do       it was stopped; to resume")
    (run / "slurm" / "jobs").write_text("13_2 train\n")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "sweep-13_2.log").write_text("error: of a sweep\n")
    status(run)
    assert "error: of a sweep" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "job_states", "stop_requested", "silent_s", "words"),
    [
        ("finished", ["COMPLETED"], False, 0, "eval retrieval"),
        ("running", ["RUNNING"], True, 0, "it stops"),
        ("running", ["RUNNING"], False, 9, "touch"),
        ("running", ["RUNNING"], False, 900, "no heartbeat for 15 min"),
        ("running", ["RUNNING", "PENDING", "PENDING"], False, 900, "no heartbeat for 15 min"),
        ("running", ["PENDING"], False, 900, "it waits in the queue"),
        ("running", ["CANCELLED"], False, 0, "to resume"),
        ("running", ["TIMEOUT"], False, 0, "warn_s"),
        ("running", ["FAILED"], False, 0, "the reason is in the log"),
        ("", [], False, 0, "submit it"),
        ("", [""], False, 0, "submit it"),
        # started by `train`, without Slurm
        ("running", [], False, 9, "nothing; to stop it with a checkpoint: touch 'a run/stop'"),
        ("running", [], True, 9, "nothing; it stops"),
        ("running", [], False, 900, "if its process has ended, to resume"),
        ("stopped", [], False, 0, "last checkpoint: python -m train 'a run/recipe.yaml'"),
        (
            "failed",
            [],
            False,
            0,
            "it failed, and said why where it was started; after fixing that, to resume",
        ),
        ("failed", ["FAILED"], False, 0, "it ended and was not requeued"),
        ("finished", [], False, 0, "eval retrieval 'a run' --data"),
    ],
)
def test_advice(state, job_states, stop_requested, silent_s, words):
    assert words in advice(state, job_states, stop_requested, silent_s, Path("a run"))


def test_output_of_scontrol_is_parsed():
    line = (
        "JobId=12 JobName=train JobState=PENDING Reason=Resources Restarts=2 StartTime=2026-11-22T01:00:00"
        " NodeList=(null) ExitCode=0:0"
    )
    info = parse_fields(line)
    assert (info["JobState"], info["Restarts"]) == ("PENDING", "2")
    expected = "PENDING, 2 restarts, Resources, expected to start at 2026-11-22T01:00:00 or earlier"
    assert describe(info) == expected
    assert describe({}) == "no longer known to Slurm"


def test_any_command_is_run_by_torchrun_where_there_are_gpus(tmp_path):
    words = ("eval", "retrieval", "a model", "--data", "x")
    for name, gpus, torchrun in (("two", 2, "yes"), ("none", 0, "no")):
        job(name, tmp_path, Resources(1, gpus), dry_run=True, flags=words)
        script = scripts_in(tmp_path)[f"{name}.sbatch"]
        assert "\nCOMMAND=(eval retrieval 'a model' --data x)\n" in script
        assert f"\nTORCHRUN={torchrun}\n" in script
