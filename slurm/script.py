"""A template and a site become a batch script that stands alone: what is submitted can be read, changed and
submitted again.

train.sbatch or job.sbatch, with @OPTIONS@ (lines of #SBATCH), @SETTINGS@ (variables) and @COMMON@ (common.sh)
filled in"""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from slurm.site import Site

HERE = Path(__file__).parent
LOGS = "slurm"  # the folder in a run that holds scripts, logs and job numbers


@dataclass(frozen=True)
class Shape:
    """How much of the cluster a job wants, and for how long."""

    nodes: int = 1
    """Nodes; each has one torchrun."""
    gpus: int = 8
    """GPUs on each node, one process for each; 0 is one process on the CPU."""
    time: str = "24:00:00"
    """Time limit, as sbatch reads it: 12:00:00, or 2-00:00:00 for two days."""

    @property
    def ranks_per_node(self) -> int:
        return max(self.gpus, 1)

    def check(self) -> None:
        if self.nodes < 1 or self.gpus < 0:
            raise UserError(
                f"--nodes {self.nodes} --gpus {self.gpus}: at least one node is wanted, and 0 or more GPUs"
            )


def script(
    template: str, name: str, logs: Path, shape: Shape, site: Site, settings: list[str], array: str = ""
) -> str:
    """The text of a batch script.

    Args:
        logs: folder of its output, which must be there when the job begins.
        settings: lines of bash, made by `assign` and `assign_list`.
        array: indices as sbatch reads them, 0-31 or 0-31%4.
    """
    options = [
        f"--job-name={name}",
        f"--time={shape.time}",
        *site.options(shape.nodes, shape.gpus),
        *([f"--array={array}"] if array else []),
    ]
    options += [f"--signal=B:USR1@{site.warn_s}", f"--output={logs}/{name}-{'%A_%a' if array else '%j'}.log"]
    for option in options:
        if "\n" in option:
            raise UserError(f"{option!r}: an option of sbatch is one line")
    first = [
        f"cd {shlex.quote(str(HERE.parent))}",
        *(f"export {assign(key, value)}" for key, value in site.environment.items()),
    ]
    first += [
        *site.setup,
        assign("PYTHON", site.interpreter),
        assign("CONTAINER", site.container),
        assign_list("SRUN", site.srun),
    ]
    first += [
        assign("WARN_S", site.warn_s),
        assign("SILENT_S", site.silent_s),
        assign("RANKS", shape.ranks_per_node),
    ]
    parts = {
        "@OPTIONS@": "\n".join(f"#SBATCH {quoted(option)}" for option in options),
        "@SETTINGS@": "\n".join([*first, *settings]),
        "@COMMON@": (
            (HERE / "common.sh").read_text().rstrip() + f"\nLOG={shlex.quote(str(logs))}/{name}-$job.log"
        ),
    }
    text = (HERE / template).read_text()
    for mark, part in parts.items():
        text = text.replace(f"\n{mark}\n", f"\n{part}\n")
    return text


def quoted(option: str) -> str:
    """An option as #SBATCH lines want it: in double quotes where it has a space or a #."""
    return f'"{option}"' if any(sign in option for sign in " \t#") else option


def assign(name: str, value: object) -> str:
    return f"{name}={shlex.quote(str(value))}"


def assign_list(name: str, values: list) -> str:
    return f"{name}=({shlex.join(map(str, values))})"


def write(text: str, path: Path) -> None:
    """Put a script into its folder, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(text)
    print(f"# {path}\n{text}")


def sbatch(path: Path, after: list[str], kind: str = "afterok", dry_run: bool = False) -> str:
    """Submit a script; its job's number, or a name in place of it in a dry run.

    Args:
        after: jobs to wait for, and if they fail, this one is cancelled, and does not wait for ever.
        kind: afterok, or afterany: where they fail, go on all the same.

    Raises:
        UserError: there is no Slurm here, or it refused; what it said.
    """
    words = [
        "sbatch",
        "--parsable",
        *([f"--dependency={kind}:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []),
        str(path),
    ]
    if dry_run:
        print(f"# not submitted: {shlex.join(words)}")
        return path.stem.upper()
    if not shutil.which("sbatch"):
        raise UserError(
            f"{path} is written, but there is no sbatch on this machine; --dry-run True writes and prints"
            " alone"
        )
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"
    }
    result = subprocess.run(words, capture_output=True, text=True, env=clean, check=False)
    if result.returncode:
        raise UserError(
            f"{path}: {' '.join(result.stderr.split())}; what the cluster wants stands in the site file"
            " (--site)"
        )
    number = result.stdout.strip().split(";")[0]
    print(f"# submitted: job {number}: {shlex.join(words)}")
    return number
