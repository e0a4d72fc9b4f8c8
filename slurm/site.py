"""Settings of one cluster, from a YAML file that its users edit."""

import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from data_prep.errors import UserError
from train.recipe import read_yaml

SITE = Path(__file__).parent / "site.yaml"
VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Site:
    """The keys of site.yaml, which documents them."""

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
        """Options of sbatch for one torchrun on each of `nodes` with `gpus` GPUs each."""
        named = {
            "account": self.account,
            "partition": self.partition if gpus else self.cpu_partition or self.partition,
            "qos": self.qos,
        }
        return [
            *(f"--{name}={value}" for name, value in named.items() if value),
            f"--nodes={nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={self.cpus_per_gpu * max(gpus, 1)}",
            *([self.gpus.format(gpus=gpus)] if gpus else []),
            *self.sbatch,
        ]

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable


def read_site(path: Path) -> Site:
    """The site file at `path`.

    Raises:
        UserError: the file is missing, is not YAML, or has an unknown key or a value of the wrong type.
    """
    try:
        values = read_yaml(path) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a site file must consist of `key: value` lines; see {SITE}")
    types = {key.name: type(getattr(Site(), key.name)) for key in dataclasses.fields(Site)}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{path}: unknown key '{key}'; valid keys: {', '.join(types)}")
        if not isinstance(value, types[key]):
            raise UserError(
                f"{path}: '{key}' is {value!r}; its type must be {types[key].__name__}, as in {SITE}"
            )
    if "environment" in values:
        if wrong := [name for name in values["environment"] if not VARIABLE.fullmatch(str(name))]:
            raise UserError(f"{path}: 'environment' has {wrong[0]!r}, which is not the name of a variable")
        values["environment"] = {name: str(value) for name, value in values["environment"].items()}
    return Site(**values)
