"""On a real Slurm, where this machine can run one: what Slurm says of our scripts, and the quick drills.

All drills: python -m tests.slurm_lab drills. They need root and Debian's munge, slurmctld, slurmd,
slurm-client and iproute2.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.pipeline import pipeline
from slurm.script import Resources
from slurm.submit import submit, sweep
from tests.slurm_lab import cluster
from tests.slurm_lab.command import QUICK, running_cluster
from tests.slurm_lab.fixtures import Fixtures, python

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=f"no virtual cluster: {cluster.missing()}")


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory) -> Iterator[Fixtures]:
    with running_cluster():
        fixtures = Fixtures(tmp_path_factory.mktemp("lab"))
        fixtures.prepare()
        yield fixtures
    assert not cluster.STATE.exists()
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert cluster.BRIDGE not in links


@pytest.mark.slow
@pytest.mark.parametrize("drill", QUICK, ids=lambda drill: drill.__name__)
def test_drill(fixtures, drill):
    assert drill(fixtures)


def test_slurm_accepts_every_script(fixtures, capsys):
    folder, resources, site = fixtures.folder / "accepted", Resources(2, 2), fixtures.site("accepted")
    options = {"resources": resources, "site": site, "dry_run": True}
    submit(fixtures.recipe, folder / "run", fixtures.shards, **options)
    sweep((str(fixtures.recipe),), folder / "sweep", fixtures.shards, ("seed=0,1",), **options)
    shards = folder / "shards"
    pipeline(("a.csv",), fixtures.recipe, folder / "path", shards, publish="--repo x/y", **options)
    capsys.readouterr()
    scripts = sorted(folder.rglob("*.sbatch"))
    assert len(scripts) == 7
    for script in scripts:
        result = sbatch_test_only(script)
        assert (result.returncode, "to start at" in result.stderr) == (0, True), (script, result.stderr)
    impossible = folder / "impossible.sbatch"
    impossible.write_text(re.sub("--nodes=2", "--nodes=200", scripts[-1].read_text()))
    assert sbatch_test_only(impossible).returncode


def sbatch_test_only(script: Path) -> subprocess.CompletedProcess:
    words = ["sbatch", "--test-only", script]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_with_a_job_is_not_submitted_again_and_has_a_status(fixtures):
    run, site = fixtures.folder / "twice", fixtures.site("twice", sbatch=("--hold",))
    paths = [fixtures.recipe, "--run", run, "--data", fixtures.shards, "--site", site]
    command = ["slurm", "submit", *paths, "--nodes", "1", "--gpus", "1"]
    python(*command)
    assert "has jobs in the queue" in python(*command, expect=2)
    status = python("slurm", "status", run)
    assert re.search(r"job +\d+ train: PENDING, JobHeldUser", status), status
    cluster.call("scancel", (run / "slurm" / "jobs").read_text().split()[0])
    assert "it was stopped; to resume" in python("slurm", "status", run)
