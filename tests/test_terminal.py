"""What a terminal does to commands: Ctrl-C at any moment, and a reader that stops reading."""

import signal
import subprocess
import time

import pytest
from conftest import ROOT, command, environment, noise_images


@pytest.mark.parametrize("after_s", [0.15, 0.4, 1.0])
@pytest.mark.parametrize(
    "words", [("train", "train/recipes/demo.yaml"), ("eval", "retrieval", "demo-vit:none")]
)
def test_ctrl_c_while_a_command_starts_prints_one_line(words, after_s, icon_shards, tmp_path):
    run = ("--run", tmp_path / "run") if words[0] == "train" else ()
    line = command(*words, "--data", icon_shards, *run)
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode
    assert "Traceback" not in errors
    if process.returncode != -signal.SIGINT or errors:  # before Python itself is up, nothing is printed
        assert errors.strip().startswith("stopped")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_without_an_output_does_its_work(closed, tmp_path):
    line = " ".join(command("data_prep", "icons", "--out", tmp_path / "icons", "--limit", 2))
    result = subprocess.run(
        f"{line} {closed}",
        shell=True,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert (tmp_path / "icons" / "icons.csv").is_file()


def test_help_without_an_output_is_no_traceback():
    for words in (("train", "--help"), ("eval", "compare")):
        shell = f"{' '.join(command(*words))} >&-"
        result = subprocess.run(
            shell, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
        assert "Traceback" not in result.stderr


def test_a_limit_on_files_is_one_sentence(tmp_path):
    """ulimit -f, which batch systems set: SQLite says "disk I/O error" when it is reached."""
    line = " ".join(command("data_prep", "build", noise_images(tmp_path, 40), "--out", tmp_path / "shards"))
    shell = ["bash", "-c", f"ulimit -f 16; {line} --processes 1"]
    result = subprocess.run(shell, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "ulimit -f allows files of 16 KiB" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [("data_prep",), ("eval",), ("train", "--help"), ("slurm", "--help")])
def test_a_pipe_to_head_prints_no_traceback(words):
    shell = f"{' '.join(command(*words))} | head -n 1"
    result = subprocess.run(
        shell, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
