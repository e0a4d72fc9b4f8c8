"""On a real Slurm, where this machine can have one: the quick drills, and what Slurm itself says of our
scripts.

All drills: python -m tests.slurm_lab drills. Wanted are root and Debian's munge, slurmctld, slurmd,
    slurm-client, iproute2.
"""

import re
import subprocess
from pathlib import Path

import pytest

from slurm.pipeline import pipeline
from slurm.script import Shape
from slurm.submit import submit, sweep
from tests.slurm_lab import cluster
from tests.slurm_lab.__main__ import QUICK, lab
from tests.slurm_lab.ground import Ground, python

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=f"no Slurm to be had: {cluster.missing()}")


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    with lab():
        ground = Ground(tmp_path_factory.mktemp("lab"))
        ground.prepare()
        yield ground
    assert not cluster.STATE.exists()
    assert (
        cluster.BRIDGE
        not in subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize("drill", QUICK, ids=lambda drill: drill.__name__)
def test_drill(ground, drill):
    assert drill(ground)


def test_slurm_accepts_every_script(ground, capsys):
    folder, shape, site = ground.folder / "accepted", Shape(2, 2), ground.site("accepted")
    submit(str(ground.recipe), folder / "run", ground.shards, shape, site=site, dry_run=True)
    sweep([str(ground.recipe)], folder / "sweep", ground.shards, ["seed=0,1"], shape, site=site, dry_run=True)
    pipeline(
        ["a.csv"],
        str(ground.recipe),
        folder / "path",
        folder / "shards",
        shape=shape,
        publish="--repo x/y",
        site=site,
        dry_run=True,
    )
    capsys.readouterr()
    scripts = sorted(folder.rglob("*.sbatch"))
    assert len(scripts) == 7
    for script in scripts:
        said = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True, check=False)
        assert (said.returncode, "to start at" in said.stderr) == (0, True), (script, said.stderr)
    wrong = Path(folder / "wrong.sbatch")
    wrong.write_text(re.sub("--nodes=2", "--nodes=200", scripts[-1].read_text()))
    assert subprocess.run(["sbatch", "--test-only", wrong], capture_output=True, check=False).returncode


def test_a_run_with_a_job_is_not_submitted_again_and_has_a_status(ground):
    run, words = (
        ground.folder / "twice",
        ["--nodes", "1", "--gpus", "1", "--site", ground.site("twice", sbatch=("--hold",))],
    )
    command = ["slurm", "submit", ground.recipe, "--run", run, "--data", ground.shards, *words]
    python(*command)
    assert "has jobs in the queue" in python(*command, expect=2)
    said = python("slurm", "status", run)
    assert re.search(r"job +\d+ train: PENDING, JobHeldUser", said), said
    cluster.call("scancel", (run / "slurm" / "jobs").read_text().split()[0])
    assert "it was stopped, and can go on" in python("slurm", "status", run)
