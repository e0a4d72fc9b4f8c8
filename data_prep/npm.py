"""Files in npm packages of pinned versions, read without running any of them."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.errors import Fault, UserError


def archive(folder: Path, name: str, version: str) -> Path:
    """Where `npm pack` puts a package."""
    return folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def fetch(folder: Path, versions: Mapping[str, str]) -> list[Path]:
    """The archives of packages in `folder`, each fetched by npm unless it is there.

    Args:
        versions: By name.

    Raises:
        UserError: One is not there, and there is no npm.
        Fault: npm failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: archive(folder, name, version) for name, version in versions.items()}
    missing = [f"{name}@{versions[name]}" for name, path in paths.items() if not path.is_file()]
    if missing and not shutil.which("npm"):
        raise UserError(
            f"there is no npm here to fetch {' and '.join(missing)}; install it, or run `npm pack"
            f" {' '.join(missing)}` where there is one, and pass the folder of the archives as --packages"
        )
    for name, path in paths.items():
        _fetch(folder, name, versions[name], path)
    return [*paths.values()]


def _fetch(folder: Path, name: str, version: str, path: Path) -> None:
    if path.is_file():
        return
    done = subprocess.run(
        ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode or not path.is_file():
        raise Fault(
            f"npm pack {name}@{version} failed: {(done.stdout + done.stderr)[-500:]}; the same command"
            " resumes"
        )


def read(path: Path, members: Sequence[str], sha512: str = "") -> list[bytes]:
    """Files of an archive.

    Args:
        sha512: Of the archive, in base64, as npm's integrity has it; not checked if empty.

    Raises:
        UserError: The archive cannot be read, has another sha512, or lacks a file.
    """
    again = "delete it, and npm fetches it again"
    try:
        if sha512 and base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode() != sha512:
            raise UserError(f"{path}: its sha512 is not that of the pinned version; {again}")
        with tarfile.open(path) as tar:
            return [tar.extractfile(f"package/{member}").read() for member in members]
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {again}") from None
