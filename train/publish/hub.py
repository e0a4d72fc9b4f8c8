"""Upload an exported model to the Hugging Face hub in one commit, and check what the hub gives back.

exported folder -> files whose content differs -> one commit -> downloaded and compared by sha256 -> tag
"""

import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from data_prep.atomic import PLACE, check_replaceable, local_paths, sweep, write_json
from data_prep.errors import UserError
from data_prep.masked import one_line
from data_prep.shards import sha256_of
from data_prep.strict_json import load_json
from data_prep.tables import markdown_table
from data_prep.terminal import say
from train.export.folder import RECORD, export, read_record, shards_of
from train.model.clip import CONFIG_FILE, Clip, load
from train.model.source import read_config
from train.publish.card import EVAL_RESULTS, IMAGES, weights_of
from train.publish.card_tables import read_tables

TOKEN_ADVICE = (
    "run `hf auth login` with a token that has write access, or set HF_TOKEN; tokens are made at"
    " https://huggingface.co/settings/tokens"
)


def url(repo: str) -> str:
    return f"{constants.ENDPOINT}/{repo}"


def check_names(repo: str, version: str) -> None:
    """Raise UserError for names that the hub would refuse."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"--repo {repo}: must be USER/NAME or ORGANISATION/NAME ({' '.join(str(error).split())})"
        ) from None
    if "/" not in repo:
        raise UserError(f"--repo {repo}: has no owner; must be USER/NAME or ORGANISATION/NAME")
    if not re.fullmatch(r"[\w.-]*", version):
        raise UserError(
            f"--version {version}: must consist of letters, digits, dots and dashes, for example v2 or 1.0"
        )


def connected() -> HfApi:
    """A client whose token the hub accepts; called before the export, which takes minutes."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "HF_HUB_OFFLINE=1 disables the network, which publishing needs; unset it, or pass --dry-run"
        )
    token = get_token()
    if not token:
        raise UserError(f"no token for {constants.ENDPOINT}: {TOKEN_ADVICE}")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # the client's own error message would quote it
        raise UserError(f"the token contains characters that are not valid in a token: {TOKEN_ADVICE}")
    api = HfApi(token=token)
    with hub_errors(api):
        api.whoami()
    return api


def exported(
    model: str, run: Path | None, out: Path | None, results: tuple[Path, ...] = ()
) -> tuple[Path, Path | None]:
    """The folder to upload, exported if necessary, and the run that it came from if that is known.

    Args:
        results: for the card; checked before the export, which takes minutes.
    """
    folder = Path(model)
    if (folder / RECORD).is_file():
        run = run or (folder.parent if (folder.parent / "recipe.yaml").is_file() else None)
        if run and not is_export_of(load(str(run)), folder):
            raise UserError(
                f"{folder}: its weights are not those of the best checkpoint of {run}; export again, or"
                f" publish {run}"
            )
        return folder, run
    if (folder / "recipe.yaml").is_file():
        run, out = folder, out or folder / "export"
    elif out is None:
        raise UserError(
            f"{model}: neither a run nor a folder written by train.export; pass --out FOLDER to export it to"
        )
    clip = load(model)
    read_tables(results, clip.fingerprint())
    if is_export_of(clip, out):
        say(f"{out}: already exported from these weights")
    else:
        check_replaceable(out, "export", overwrite=True, inputs=local_paths(model))
        export(clip, out, data=shards_of(run))
    return out, run


def is_export_of(clip: Clip, folder: Path) -> bool:
    """Whether a folder is an export of these weights, and has the same background."""
    if not (folder / RECORD).is_file() or weights_of(folder) != clip.fingerprint():
        return False
    return load(f"local-dir:{folder}", weights=False).background == clip.background


def name_text_tower(folder: Path, repo: str) -> None:
    """Where the model's own folder holds its Hugging Face text tower or tokenizer, name the repository as its
    place: on the hub open_clip takes hf_model_name and hf_tokenizer_name for names of repositories.
    """
    config, record = read_config(folder / CONFIG_FILE), read_record(folder)
    text, in_folder = config["model_cfg"]["text_cfg"], record.get("in_folder", [])
    if all(text.get(key) == repo for key in in_folder):
        return
    text |= dict.fromkeys(in_folder, repo)
    write_json(folder / CONFIG_FILE, config)
    record["files"][CONFIG_FILE] = {
        "format": "open_clip",
        "bytes": (folder / CONFIG_FILE).stat().st_size,
        "sha256": sha256_of(folder / CONFIG_FILE),
    }
    write_json(folder / RECORD, record)


def check_export(folder: Path) -> None:
    """Raise UserError if files have changed since the export compared them."""
    for name, entry in read_record(folder)["files"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != entry["sha256"]:
            raise UserError(
                f"{folder / name}: has changed since the export (its sha256 is not the one in {RECORD});"
                f" delete {folder} and export again"
            )


def to_upload(folder: Path) -> dict[str, Path]:
    """Files of the export, the card and its images; other files in the folder are not uploaded."""
    names = [*read_record(folder)["files"], RECORD, "README.md"]
    for written in (IMAGES, EVAL_RESULTS):
        names += [f"{written}/{path.name}" for path in (folder / written).glob("*")]
    return {name: folder / name for name in sorted(names)}


def listing(files: dict[str, Path]) -> str:
    """The files and their sizes as a table with a total."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = [[name, f"{size:,}"] for name, size in sizes.items()]
    return markdown_table(("file", "bytes"), [*rows, [f"{len(files)} files", f"{sum(sizes.values()):,}"]])


def upload(api: HfApi, repo: str, files: dict[str, Path], version: str, private: bool) -> str:
    """Commit what has changed, download it and compare, then tag.

    Returns:
        What was done, as text.

    Raises:
        UserError: no write access, no network, another commit has the tag, or the download differs.
    """
    with hub_errors(api, repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.repo_info(repo)
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
        published = {
            file.path: file
            for file in api.list_repo_tree(repo, recursive=True, revision=info.sha)
            if isinstance(file, RepoFile)
        }
        outdated = outdated_files(api, repo, info.sha, published, files)
    if private and not info.private:
        raise UserError(
            f"{repo}: already exists and is public; make it private in its settings on the hub, or leave"
            " --private out"
        )
    changed = [
        name for name, path in files.items() if name not in published or not is_same(published[name], path)
    ]
    if version in tags and (changed or outdated or tags[version] != info.sha):
        raise UserError(
            f"{repo}: version {version} already exists with other files; pass another --version, or none for"
            " the next number"
        )
    commit = _commit(api, repo, info.sha, files, changed, outdated)
    check_download(api, repo, commit, files)
    tag = version or next(
        (tag for tag, sha in tags.items() if sha == commit and re.fullmatch(r"v\d+", tag)), next_version(tags)
    )
    if tag not in tags:
        with hub_errors(api, repo):
            api.create_tag(repo, tag=tag, revision=commit)
    return (
        f"{repo} {tag} (commit {commit[:12]}): {len(files)} files were downloaded again and equal the local"
        f" ones\npage: {url(repo)}; load it as hf-hub:{repo}"
    )


def _commit(
    api: HfApi, repo: str, parent: str, files: dict[str, Path], changed: list[str], outdated: list[str]
) -> str:
    """Commit changes and deletions on top of `parent`; the new commit, or `parent` if there are none."""
    if not changed and not outdated:
        say(f"{repo}: nothing has changed since commit {parent[:12]}; nothing was committed", flush=True)
        return parent
    additions = [CommitOperationAdd(name, str(files[name])) for name in changed]
    say(f"uploading to {url(repo)}: {len(changed)} of {len(files)} files are new or have changed", flush=True)
    with hub_errors(api, repo):
        operations = [*additions, *(CommitOperationDelete(name) for name in outdated)]
        return api.create_commit(repo, operations, commit_message="Publish a model", parent_commit=parent).oid


def outdated_files(
    api: HfApi, repo: str, commit: str, published: dict[str, RepoFile], files: dict[str, Path]
) -> list[str]:
    """Files of an earlier version that this one does not have: old weights under another name could be loaded
    by mistake. Files that an earlier version did not publish are kept.
    """
    if RECORD not in published:
        return []
    with tempfile.TemporaryDirectory() as cache:
        record_file = api.hf_hub_download(repo, RECORD, revision=commit, cache_dir=cache)
        try:
            before = load_json(Path(record_file), {"files": dict})["files"]
        except ValueError:  # somebody else's: what it has published is not known
            before = {}
    return [
        name
        for name in published
        if name not in files and (name in before or name.startswith((f"{IMAGES}/", f"{EVAL_RESULTS}/")))
    ]


def is_same(file: RepoFile, path: Path) -> bool:
    """Whether a file of the hub has this content; the hub gives sha256 for large files, git's sha1 for
    others.
    """
    if file.size != path.stat().st_size:
        return False
    if file.lfs:
        return file.lfs.sha256 == sha256_of(path)
    return file.blob_id == hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest()


def next_version(tags: dict[str, str]) -> str:
    numbers = [int(match[1]) for tag in tags if (match := re.fullmatch(r"v(\d+)", tag))]
    return f"v{max(numbers, default=0) + 1}"


def check_download(api: HfApi, repo: str, commit: str, files: dict[str, Path]) -> None:
    """Download the commit into an empty cache and compare it file by file."""
    parent, left = files[RECORD].parent.parent, f".{PLACE}-{os.getpid()}.partial"
    sweep(parent)  # a download that was killed has the size of the model
    with tempfile.TemporaryDirectory(left, ".download-", parent) as cache:
        with hub_errors(api, repo):
            patterns = [glob.escape(name) for name in files]
            snapshot = Path(
                api.snapshot_download(repo, revision=commit, cache_dir=cache, allow_patterns=patterns)
            )
        different = [
            name
            for name, path in files.items()
            if not (snapshot / name).is_file() or sha256_of(snapshot / name) != sha256_of(path)
        ]
    if different:
        raise UserError(
            f"{repo}: the hub returns other content for {', '.join(different)} than was uploaded; run the"
            " same command again"
        )


@contextmanager
def hub_errors(api: HfApi, repo: str = "") -> Iterator[None]:
    """Turn errors of the hub's client into a UserError that says what to do and never contains the token."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # An upload wraps its reason in a RuntimeError.
        reason = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        raise UserError(explained(reason, repo, api.token)) from None


def explained(error: BaseException, repo: str, token: str) -> str:
    """What went wrong and what to do, without the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = one_line(error, 300, token)
    if status == 401:
        return f"{constants.ENDPOINT} does not accept this token: {TOKEN_ADVICE}"
    if status in (403, 404):
        return (
            f"{repo}: this token has no write access, or there is no such user or organisation ({message});"
            f" check the name and the token: {TOKEN_ADVICE}"
        )
    if status in (409, 412):
        return f"{repo}: was changed by another upload at the same time; run the same command again"
    if status in (None, 400) and isinstance(error, ValueError):
        return f"{repo}: the hub refuses it: {message}"
    failure = f"the hub answered {status}" if status else "the connection to the hub was lost"
    return (
        f"{repo or constants.ENDPOINT}: {failure} ({type(error).__name__}: {message}); run the same command"
        " again: it resumes the upload"
    )
