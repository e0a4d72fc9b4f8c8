"""kill -9 at any moment: the build resumes, and the shards equal those of an undisturbed build."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command, environment, noise_images, tars

from data_prep.build.pipeline import Checking, Parallelism, Reading, build

# Every chunk is committed, so that kills hit all states; transparent images are changed, and so spooled.
SCRIPT = """
import sys
from pathlib import Path
import data_prep.build.scan
from data_prep.build.pipeline import Checking, Reading, Parallelism, build
data_prep.build.scan.COMMIT_EVERY_S = 0
data_prep.build.scan.CHUNK = 8
options = {"parallelism": Parallelism(2), "images_per_shard": 50}
build([sys.argv[1]], Path(sys.argv[2]), Reading(), Checking(encode="webp"), **options)
"""


@pytest.mark.slow
def test_thirty_kills_change_nothing(tmp_path):
    path = noise_images(tmp_path, 900, mode="RGBA")
    build(
        [str(path)],
        tmp_path / "whole",
        Reading(),
        Checking(encode="webp"),
        parallelism=Parallelism(2),
        images_per_shard=50,
    )
    expected = tars(tmp_path / "whole")
    assert len(expected) > 20
    rng, kills, builds, resumed = random.Random(0), 0, 0, 0
    while kills < 30:
        out = tmp_path / f"out-{builds}"
        builds += 1
        longest_s = 1.0
        while not out.exists():
            process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, path, out],
                cwd=ROOT,
                env=environment(),
                stdout=-1,
                stderr=-1,
                text=True,
            )
            try:
                written, errors = process.communicate(timeout=rng.uniform(0.25, longest_s))
                assert process.returncode == 0, errors
                resumed += "resuming" in written
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                longest_s *= 1.1  # each build ends some time
        assert tars(out) == expected
        for file in ("report.json", "rejects.csv"):
            assert (out / file).read_text() == (tmp_path / "whole" / file).read_text()
        assert not list(out.rglob("*.partial"))
        splits = [
            json.loads((folder / "manifest.json").read_text())["splits"]
            for folder in (out, tmp_path / "whole")
        ]
        assert splits[0] == splits[1]
    assert resumed > 0


def test_ctrl_c_says_that_nothing_is_lost(tmp_path):
    path = noise_images(tmp_path, 2000, mode="RGBA")  # seconds of work: the signal comes in their middle
    arguments = command("data_prep", "build", path, "--out", tmp_path / "out", "--processes", 2)
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(),
        stdout=-1,
        stderr=-1,
        text=True,
        # tests that run in the background ignore it, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "out.partial" / "settings.json").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors


def test_orphaned_workers_end(tmp_path):
    """A parent that is killed leaves no process behind."""
    path = noise_images(tmp_path, 2000)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, path, tmp_path / "out"],
        cwd=ROOT,
        env=environment(),
        stdout=-1,
        stderr=-1,
    )
    children = []
    while len(children) < 2:
        assert process.poll() is None
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(
        subprocess.run(["kill", "-0", child], capture_output=True, check=False).returncode == 0
        for child in children
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
