"""Batch scripts from a template and the settings of a site. A script is complete: it can be read, edited and
submitted again with sbatch.

train.sbatch or job.sbatch, with @OPTIONS@ (#SBATCH lines), @SETTINGS@ (variables) and @COMMON@ (common.sh)
replaced
"""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.rooms import CLONE
from data_prep.terminal import say
from slurm.site import Site

HERE = Path(__file__).parent
LOGS = "slurm"  # the folder in a run that holds scripts, logs and job numbers


@dataclass(frozen=True)
class Resources:
    """What a job requests."""

    nodes: int = 1
    """Number of nodes; one torchrun on each."""
    gpus: int = 8
    """GPUs per node, one process each; 0 is one process on the CPU."""
    time: str = "24:00:00"
    """Time limit in sbatch's format: 12:00:00, or 2-00:00:00 for two days."""

    @property
    def ranks_per_node(self) -> int:
        return max(self.gpus, 1)

    def check(self) -> None:
        """Raises UserError where a number is too small."""
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: must be at least 1")
        if self.gpus < 0:
            raise UserError(f"--gpus {self.gpus}: must be 0 (CPU only) or more")


def render_script(
    template: str,
    name: str,
    logs: Path,
    resources: Resources,
    site: Site,
    settings: list[str],
    array: str = "",
) -> str:
    """The text of a batch script.

    Args:
        template: file name of the template, "train.sbatch" or "job.sbatch".
        name: of the job, and of its log.
        logs: folder of its log, which must exist when the job starts.
        settings: lines of bash, made by `assign` and `assign_list`.
        array: indices in sbatch's format, 0-31 or 0-31%4.

    Raises:
        UserError: an option contains a line break.
    """
    variables = [
        f"cd {shlex.quote(str(CLONE or Path.cwd()))}",  # where `python -m` finds the rooms
        *(f"export {assign(key, value)}" for key, value in site.environment.items()),
        *site.setup,
        assign("PYTHON", site.interpreter),
        assign("CONTAINER", site.container),
        assign_list("SRUN", site.srun),
        assign("WARN_S", site.warn_s),
        assign("SILENT_S", site.silent_s),
        assign("RANKS", resources.ranks_per_node),
        *settings,
    ]
    common = (HERE / "common.sh").read_text().rstrip()
    parts = {
        "@OPTIONS@": "\n".join(sbatch_lines(name, logs, resources, site, array)),
        "@SETTINGS@": "\n".join(variables),
        "@COMMON@": f"{common}\nLOG={shlex.quote(str(logs))}/{name}-$job.log",
    }
    text = (HERE / template).read_text()
    for mark, part in parts.items():
        text = text.replace(f"\n{mark}\n", f"\n{part}\n")
    return text


def sbatch_lines(name: str, logs: Path, resources: Resources, site: Site, array: str) -> list[str]:
    """The #SBATCH lines of a script; see render_script."""
    options = [
        f"--job-name={name}",
        f"--time={resources.time}",
        *site.options(resources.nodes, resources.gpus),
        *([f"--array={array}"] if array else []),
        f"--signal=B:USR1@{site.warn_s}",  # B: to the batch shell alone; it decides what the ranks are told
        f"--output={logs}/{name}-{'%A_%a' if array else '%j'}.log",
    ]
    for option in options:
        if "\n" in option:
            raise UserError(f"{option!r}: an option of sbatch must be one line")
    return [f"#SBATCH {quote_option(option)}" for option in options]


def quote_option(option: str) -> str:
    """An option for an #SBATCH line: in double quotes if it contains a space or a #."""
    return f'"{option}"' if any(character in option for character in " \t#") else option


def assign(name: str, value: object) -> str:
    """A bash assignment, quoted."""
    return f"{name}={shlex.quote(str(value))}"


def assign_list(name: str, values: list) -> str:
    """A bash array, quoted."""
    return f"{name}=({shlex.join(map(str, values))})"


def write_script(text: str, path: Path) -> None:
    """Write a script, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(text)
    say(f"# {path}\n{text}")


def sbatch(path: Path, after: list[str], dependency: str = "afterok", dry_run: bool = False) -> str:
    """Submit a script; returns the job's number, or in a dry run a name in its place.

    Args:
        after: numbers of jobs to wait for. If the dependency can no longer be met, the job is cancelled.
        dependency: afterok (all must succeed) or afterany.

    Raises:
        UserError: Slurm is not installed here, or sbatch refused the script.
    """
    words = [
        "sbatch",
        "--parsable",
        *([f"--dependency={dependency}:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []),
        str(path),
    ]
    if dry_run:
        say(f"# not submitted: {shlex.join(words)}")
        return path.stem.upper()
    if not shutil.which("sbatch"):
        raise UserError(
            f"{path}: written, but there is no sbatch on this machine; run this on the cluster's login node,"
            " or pass --dry-run"
        )
    # Inside of a job, SLURM_* and SBATCH_* describe that job; sbatch would take them as options.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"
    }
    result = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise UserError(
            f"{path}: {' '.join(result.stderr.split())}; options of your cluster are set in the site file"
            " (--site)"
        )
    number = result.stdout.strip().split(";")[0]
    say(f"# submitted: job {number}: {shlex.join(words)}")
    return number
