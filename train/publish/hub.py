"""A run becomes a repository of the Hugging Face hub, and what arrived there is what was exported.

  python -m train.publish RUN --repo USER/NAME --results comparison/compare.json --license mit --dry-run True
      exports to RUN/export, writes the model card, and shows what would be uploaded; needs no network
  python -m train.publish RUN --repo USER/NAME --results comparison/compare.json --license mit
      the same, then one commit, a tag (v1, v2, ...), and a download that is compared by sha256

An upload that was cut off goes on when the same command is given again. The token is that of `hf auth login`,
or HF_TOKEN."""

import glob
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from data_prep.errors import UserError
from data_prep.shards import sha256_of
from train.export.folder import data_of, export
from train.model.clip import Clip, load
from train.publish.card import PICTURES, weights_of, write_card

MANIFEST = "export.json"  # of train.export.folder: {"files": {name: {"sha256", "bytes"}}}
TOKEN_ADVICE = (
    "`hf auth login` with one that may write, or put it into HF_TOKEN; they are made at"
    " https://huggingface.co/settings/tokens"
)


def publish(
    model: Annotated[str, tyro.conf.Positional],
    repo: str,
    results: tuple[Path, ...] = (),
    pictures: tuple[Path, ...] = (),
    dataset: tuple[str, ...] = (),
    license: str = "",
    run: Path | None = None,
    out: Path | None = None,
    version: str = "",
    private: bool = False,
    dry_run: bool = False,
) -> None:
    """Puts a model on the Hugging Face hub, with a card, for open_clip and transformers to load.

    Args:
        model: Run folder, a folder that train.export.folder wrote, or another MODEL (NAME:PRETRAINED,
            hf-hub:ID, local-dir:PATH).
        repo: USER/NAME or ORGANISATION/NAME on the hub; made if it is not there.
        results: JSON of python -m eval retrieval --json, or eval compare, for the card; figures of other
            models stand beside this one's where they are of the same data.
        pictures: PNG, JPEG or SVG files to show in the card.
        dataset: Hub data sets that it was trained on, USER/NAME.
        license: Of the model, as the hub writes it: mit, apache-2.0, cc-by-4.0, other ...
        run: Run that an exported folder came from, for the card; RUN/export knows it.
        out: Where the export goes; RUN/export if MODEL is a run.
        version: Tag of this version; v1, v2, ... if not given.
        private: Make the repository private. One that is there already stays as it is.
        dry_run: Show the files, their sizes and the card; upload nothing. Needs no token and no network.
    """
    check_names(repo, version)
    api = None if dry_run else connected()
    folder, run = exported(model, run, out)
    check_export(folder)
    card = write_card(folder, repo, run, results, pictures, dataset, license)
    files = to_upload(folder)
    if api is None:
        print(
            f"{card}\n{listing(files)}\nnothing was uploaded; without --dry-run this becomes"
            f" {constants.ENDPOINT}/{repo}"
        )
    else:
        print(upload(api, repo, files, version, private))
    if not license:
        print(
            "the card names no licence, so nobody knows what may be done with the model; pass --license mit,"
            " or another"
        )


def check_names(repo: str, version: str) -> None:
    """Refuse names that the hub would refuse."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"--repo {repo}: not a name for the hub ({' '.join(str(error).split())}); USER/NAME is wanted"
        ) from None
    if "/" not in repo:
        raise UserError(f"--repo {repo}: whose? USER/NAME or ORGANISATION/NAME is wanted")
    if not re.fullmatch(r"[\w.-]*", version):
        raise UserError(f"--version {version}: letters, digits, dots and dashes are wanted, like v2 or 1.0")


def connected() -> HfApi:
    """The hub, with a token that it knows; asked for before the export, which takes minutes."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "HF_HUB_OFFLINE=1 forbids the network, and publishing wants it; unset it, or look with --dry-run"
            " True"
        )
    token = get_token()
    if not token:
        raise UserError(f"no token for {constants.ENDPOINT}: {TOKEN_ADVICE}")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # else the client's error message would quote it
        raise UserError(f"the token has characters that no token has; {TOKEN_ADVICE}")
    api = HfApi(token=token)
    with in_sentences(api):
        api.whoami()
    return api


def exported(model: str, run: Path | None, out: Path | None) -> tuple[Path, Path | None]:
    """The folder to upload, made if need be, and the run that it came from, if that is known."""
    folder = Path(model)
    if (folder / MANIFEST).is_file():
        run = run or (folder.parent if (folder.parent / "recipe.yaml").is_file() else None)
        if run and not is_export_of(load(str(run)), folder):
            raise UserError(
                f"{folder}: holds other weights than the best of {run}; export again, or publish {run}"
            )
        return folder, run
    if (folder / "recipe.yaml").is_file():
        run, out = folder, out or folder / "export"
    elif out is None:
        raise UserError(
            f"{model}: pass --out, a folder to export it to; or a run, or a folder that train.export.folder"
            " wrote"
        )
    clip = load(model)
    if is_export_of(clip, out):
        print(f"{out}: exported before, from these weights")
    else:
        if out.exists() and not (out / MANIFEST).is_file():
            raise UserError(f"{out}: there already, and not an export; pass another --out")
        export(clip, out, data=data_of(run))
    return out, run


def is_export_of(clip: Clip, folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and weights_of(folder) == clip.fingerprint()


def check_export(folder: Path) -> None:
    """Refuse files that are not those that the export has proven."""
    for name, said in json.loads((folder / MANIFEST).read_text())["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != said["sha256"]:
            raise UserError(
                f"{folder / name}: not what was exported (its sha256 is not that in {MANIFEST}); delete"
                f" {folder}, and export again"
            )


def to_upload(folder: Path) -> dict[str, Path]:
    """What the export, the card and its pictures are made of, and nothing else that lies there."""
    names = [*json.loads((folder / MANIFEST).read_text())["files"], MANIFEST, "README.md"]
    names += [f"{PICTURES}/{path.name}" for path in (folder / PICTURES).glob("*")]
    return {name: folder / name for name in sorted(names)}


def listing(files: dict[str, Path]) -> str:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    lines = [f"{size:15,}  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()):15,}  bytes in {len(files)} files"])


def upload(api: HfApi, repo: str, files: dict[str, Path], version: str, private: bool) -> str:
    """Commit what has changed, download it again and compare, then tag; what was done, in words.

    Raises:
        UserError: no rights, no network, another commit has the tag, or the download is not what was sent.
    """
    with in_sentences(api, repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.repo_info(repo)
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
        there = {
            file.path: file
            for file in api.list_repo_tree(repo, recursive=True, revision=info.sha)
            if isinstance(file, RepoFile)
        }
        outdated = outdated_files(api, repo, info.sha, there, files)
    if private and not info.private:
        raise UserError(
            f"{repo} is there already, and public; make it private in its settings on the hub first, or leave"
            " out --private"
        )
    changed = [name for name, path in files.items() if name not in there or not is_same(there[name], path)]
    commit = info.sha
    if version in tags and (changed or outdated or tags[version] != commit):
        raise UserError(
            f"{repo} has a version {version} already, of other files; pass another --version, or none for the"
            " next number"
        )
    if changed or outdated:
        adding = [CommitOperationAdd(name, str(files[name])) for name in changed]
        print(
            f"uploading to {constants.ENDPOINT}/{repo}: {len(changed)} of {len(files)} files are new or have"
            " changed",
            flush=True,
        )
        with in_sentences(api, repo):
            operations = [*adding, *(CommitOperationDelete(name) for name in outdated)]
            commit = api.create_commit(
                repo, operations, commit_message="Publish a model", parent_commit=commit
            ).oid
    else:
        print(f"{repo}: nothing has changed since commit {commit[:12]}; nothing was committed", flush=True)
    check_download(api, repo, commit, files)
    name = version or next(
        (tag for tag, sha in tags.items() if sha == commit and re.fullmatch(r"v\d+", tag)), next_version(tags)
    )
    if name not in tags:
        with in_sentences(api, repo):
            api.create_tag(repo, tag=name, revision=commit)
    said = f"{repo} {name} (commit {commit[:12]}): {len(files)} files, downloaded again, are what was sent"
    return f"{said}\nlook at {constants.ENDPOINT}/{repo}; load it as hf-hub:{repo}"


def outdated_files(
    api: HfApi, repo: str, commit: str, there: dict[str, RepoFile], files: dict[str, Path]
) -> list[str]:
    """What an earlier version published and this one has not: old weights under another name would be loaded
    by somebody.
    """
    if MANIFEST not in there:
        return []
    with tempfile.TemporaryDirectory() as fresh:
        before = json.loads(
            Path(api.hf_hub_download(repo, MANIFEST, revision=commit, cache_dir=fresh)).read_text()
        ).get("files", {})
    return [
        name for name in there if name not in files and (name in before or name.startswith(f"{PICTURES}/"))
    ]


def is_same(file: RepoFile, path: Path) -> bool:
    """Whether a file of the hub has this content: it knows sha256 of large files, and git's sha1 of others."""
    if file.size != path.stat().st_size:
        return False
    if file.lfs:
        return file.lfs.sha256 == sha256_of(path)
    return file.blob_id == hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest()


def next_version(tags: dict[str, str]) -> str:
    numbers = [int(found[1]) for tag in tags if (found := re.fullmatch(r"v(\d+)", tag))]
    return f"v{max(numbers, default=0) + 1}"


def check_download(api: HfApi, repo: str, commit: str, files: dict[str, Path]) -> None:
    """Download the commit into an empty cache, and compare it file by file."""
    with tempfile.TemporaryDirectory(dir=files[MANIFEST].parent.parent, prefix=".download-") as fresh:
        with in_sentences(api, repo):
            names = [glob.escape(name) for name in files]
            got = Path(api.snapshot_download(repo, revision=commit, cache_dir=fresh, allow_patterns=names))
        other = [
            name
            for name, path in files.items()
            if not (got / name).is_file() or sha256_of(got / name) != sha256_of(path)
        ]
    if other:
        raise UserError(
            f"{repo}: what the hub gives back for {', '.join(other)} is not what was sent; give the same"
            " command again"
        )


@contextmanager
def in_sentences(api: HfApi, repo: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into a sentence with the fix; the token is in none."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        said = (
            error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        )  # of an upload, what ended it
        raise UserError(explained(said, repo).replace(api.token, "(the token)")) from None


def explained(error: BaseException, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    words = " ".join(str(error).split())[:300]
    if status == 401:
        return f"{constants.ENDPOINT} does not know this token: {TOKEN_ADVICE}"
    if status in (403, 404):
        return (
            f"{repo}: this token may not write there, or there is no such user or organisation ({words});"
            f" check the name, and that the token may write: {TOKEN_ADVICE}"
        )
    if status in (409, 412):
        return f"{repo}: somebody else changed it at the same time; give the same command again"
    if status in (None, 400) and isinstance(error, ValueError):
        return f"{repo}: the hub refuses it: {words}"
    what = f"answered {status}" if status else "was lost"
    return (
        f"{repo or constants.ENDPOINT}: the hub {what} ({type(error).__name__}: {words}); what has arrived"
        " stays there: give the same command again, and it goes on"
    )


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    tyro.cli(publish, prog="python -m train.publish", config=(tyro.conf.FlagConversionOff,))
