"""What one cluster wants that others do not, from the file that its users edit."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from data_prep.errors import UserError

SITE = Path(__file__).parent / "site.yaml"


@dataclass(frozen=True)
class Site:
    """The keys of site.yaml, which explains them."""

    account: str = ""
    partition: str = ""
    cpu_partition: str = ""
    qos: str = ""
    sbatch: list[str] = field(default_factory=list)
    gpus: str = "--gpus-per-node={gpus}"
    cpus_per_gpu: int = 8
    warn_s: int = 300
    silent_s: int = 3600
    setup: list[str] = field(default_factory=list)
    python: str = ""
    container: str = ""
    srun: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def options(self, nodes: int, gpus: int) -> list[str]:
        """Options of sbatch for one torchrun on each of `nodes` with `gpus` each."""
        named = {
            "account": self.account,
            "partition": self.partition if gpus else self.cpu_partition or self.partition,
            "qos": self.qos,
        }
        asked = [f"--{name}={value}" for name, value in named.items() if value]
        asked += [
            f"--nodes={nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={self.cpus_per_gpu * max(gpus, 1)}",
        ]
        return [*asked, *([self.gpus.format(gpus=gpus)] if gpus else []), *self.sbatch]

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable


def read_site(path: Path) -> Site:
    """The site file at `path`.

    Raises:
        UserError: it is not there, or has a key or a kind of value that no site has.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a site file is a list of `key: value` lines, this is not")
    kinds = {key.name: type(getattr(Site(), key.name)) for key in dataclasses.fields(Site)}
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"{path}: a site has no key '{key}'; it can be {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise UserError(f"{path}: '{key}' is {value!r}; a {kinds[key].__name__} is wanted, as in {SITE}")
    if "environment" in values:
        values["environment"] = {name: str(value) for name, value in values["environment"].items()}
    return Site(**values)
