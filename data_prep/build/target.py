"""Where a build goes: a folder, or a URL to which each shard is uploaded as soon as it is written.

OUT                    OUT.partial gets this name when it is complete
s3://bucket/shards     its unfinished build is the folder WORK; WORK/uploaded.jsonl lists what is uploaded,
                       and a tar that is uploaded is deleted here
    .made.json         all that a later build may delete; a file is listed before it is uploaded
    train/*.tar        each complete or absent
    manifest.json      last: without it this is no data set
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote

from data_prep.atomic import MARK, check_named, check_replaceable, mark, replace_folder, write_json
from data_prep.build.split import SPLITS
from data_prep.errors import UserError
from data_prep.inputs.storage import is_url
from data_prep.shards import sha256_of, shard_entry
from data_prep.store.cache import CACHES
from data_prep.store.remote import Store
from data_prep.strict_json import parse_json, problem_of

MANIFEST, JOURNAL = "manifest.json", "uploaded.jsonl"
BUILDS = CACHES / "builds"
MAX_BYTES = 1 << 30  # of a manifest or mark
UPLOADED = {"name": str, "bytes": int, "sha256": str, "entry?": dict}  # a line of JOURNAL


def target_of(out: str | Path, work: Path | None) -> "LocalTarget | StoreTarget":
    """Where --out leads.

    Args:
        work: of --work; None if it was not passed.

    Raises:
        UserError: nothing can be written there.
    """
    if is_url(str(out)):
        return StoreTarget(str(out), work)
    if work:
        raise UserError(f"--work {work}: is for an --out that is a URL; of {out}, it is {partial_of(out)}")
    return LocalTarget(Path(out))


def partial_of(out: str | Path) -> Path:
    """The folder of an unfinished build.

    Raises:
        UserError: `out` does not end in a name.
    """
    check_named(Path(out))
    return Path(out).with_name(f"{Path(out).name}.partial")


@dataclass(frozen=True)
class LocalTarget:
    """A folder, which appears when it is complete."""

    out: Path
    store = None

    def __str__(self) -> str:
        return str(self.out)

    @property
    def work(self) -> Path:
        return partial_of(self.out)

    @property
    def arguments(self) -> str:
        """That name it on a command line of `merge`."""
        return quote(str(self.out))

    def check(self, overwrite: bool, inputs: Iterable[str | Path]) -> None:
        """Refuse to replace what is there; see atomic.check_replaceable."""
        check_replaceable(self.out, "shards", overwrite, inputs)

    def begin(self, shards: Iterable[Path]) -> None:
        """Nothing: what is there stays until the end."""

    def entry(self, shard: Path) -> dict | None:
        """The manifest's entry of a shard that is written; None of one that is not."""
        return shard_entry(shard) if is_written(shard) else None

    def add(self, shard: Path, entry: dict) -> None:
        """Nothing: a shard that is written stays."""

    def finish(self, work_files: Sequence[Path]) -> None:
        """Give the complete build its name.

        Args:
            work_files: that are no part of it.
        """
        for file in work_files:
            file.unlink(missing_ok=True)
        mark(self.work, "shards")
        replace_folder(self.work, self.out)


class StoreTarget:
    """A URL. Methods but `check` are called with the work folder locked.

    Raises:
        UserError: the store refuses, or takes no files.
    """

    def __init__(self, url: str, work: Path | None):
        self.store = Store(url)
        if self.store.is_http:
            raise UserError(
                f"{self.store.shown}: files cannot be uploaded over HTTP; pass --out s3://, gs:// or hf://"
            )
        digest = hashlib.sha256(self.store.url.encode()).hexdigest()[:16]
        self._asked_work = work
        self.work = work or BUILDS / f"{self.store.url.rpartition('/')[2]}-{digest}"
        check_named(self.work)

    def __str__(self) -> str:
        return self.store.shown

    @property
    def arguments(self) -> str:
        """As LocalTarget has them."""
        return quote(self.store.url) + (f" --work {quote(str(self.work))}" if self._asked_work else "")

    def check(self, overwrite: bool, inputs: Iterable[str | Path]) -> None:
        """Refuse to replace what this command did not make, and see that files can be written.

        Raises:
            UserError: as check_replaceable() has it; or the store refuses.
        """
        shutil.rmtree(self._done_work, ignore_errors=True)
        for source in inputs:
            if f"{source}/".startswith(f"{self.store.url}/"):
                raise UserError(
                    f"{self}: the build would overwrite {source}, which this command reads; pass another"
                    " --out"
                )
        there, made = self.store.sizes(), self._made()
        if foreign := sorted(name for name in there if name not in made and _is_in_the_way(name)):
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise UserError(
                f"{self}: holds {foreign[0]}{more}, which was not made by this command ({MARK} does not list"
                " it), and is not overwritten; pass another --out, or delete it yourself"
            )
        if MANIFEST in there and not self._is_ours_whole():
            if not overwrite:
                raise UserError(f"{self}: exists already; pass another --out, or --overwrite to replace it")
            for name in (JOURNAL, MANIFEST):  # what was uploaded before that data set is overwritten by it
                (self.work / name).unlink(missing_ok=True)
        self._put_mark(made)

    def _is_ours_whole(self) -> bool:
        """Whether the manifest there is the one here: a kill came after it was uploaded."""
        try:
            return (self.work / MANIFEST).read_bytes() == self.store.read_whole(MANIFEST, MAX_BYTES)
        except FileNotFoundError:
            return False

    def _made(self) -> set[str]:
        """The names in the mark there; none without a mark, or with one that is not ours."""
        try:
            found = parse_json(self.store.read_whole(MARK, MAX_BYTES))
        except (FileNotFoundError, ValueError):
            return set()
        is_ours = not problem_of(found, {"kind": str, "files": [str]}) and found["kind"] == "shards"
        return {MARK, *found["files"]} if is_ours else set()

    def _put_mark(self, names: Iterable[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            mark_file = Path(folder) / MARK
            write_json(mark_file, {"kind": "shards", "files": sorted({*names} - {MARK})})
            self.store.put(mark_file, MARK)

    @cached_property
    def _uploaded(self) -> dict[str, dict]:
        """Lines of JOURNAL, by name, of files that the store still has in this size."""
        there, found = self.store.sizes(), {}
        try:
            lines = (self.work / JOURNAL).read_bytes().splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                uploaded = parse_json(line)
            except ValueError:
                continue
            if not problem_of(uploaded, UPLOADED) and there.get(uploaded["name"]) == uploaded["bytes"]:
                found[uploaded["name"]] = uploaded
        return found

    def begin(self, shards: Iterable[Path]) -> None:
        """Before the first shard is uploaded: an older data set there is none from here on.

        Args:
            shards: all tars of the build.
        """
        names = {name for path in shards for name in map(self._name, (path, _index_of(path)))}
        self._put_mark(self._made() | names)
        self.store.delete(MANIFEST)

    def entry(self, shard: Path) -> dict | None:
        """The manifest's entry of a shard that is uploaded; None of one that is not."""
        files = [self._uploaded.get(self._name(path)) for path in (_index_of(shard), shard)]
        return files[1].get("entry") if all(files) else None

    def add(self, shard: Path, entry: dict) -> None:
        """Note a shard that is uploaded, and delete it here.

        Args:
            entry: of the manifest.
        """
        index = _index_of(shard)
        self._note(index, entry["index_sha256"])
        self._note(shard, entry["sha256"], entry=entry)
        for file in (shard, index):
            file.unlink()

    def _note(self, file: Path, sha256: str, **more) -> None:
        uploaded = {"name": self._name(file), "bytes": file.stat().st_size, "sha256": sha256, **more}
        with open(self.work / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(f"\n{json.dumps(uploaded)}\n")  # after what a kill has left of a line
            journal.flush()
            os.fsync(journal.fileno())
        self._uploaded[uploaded["name"]] = uploaded

    def finish(self, work_files: Sequence[Path]) -> None:
        """Upload all but the shards, the manifest last, and delete the folder of the unfinished build.

        Args:
            work_files: that are no part of it.
        """
        if not self._is_ours_whole():
            work_files = {*work_files, self.work / JOURNAL, self.work / MANIFEST}
            files = [
                path for path in sorted(self.work.rglob("*")) if path.is_file() and path not in work_files
            ]
            before, made = self._made(), {*self._uploaded, *map(self._name, files), MANIFEST}
            self._put_mark(before | made)
            for path in files:
                self._put(path)
            for name in self.store.sizes().keys() & before - made - {MARK}:
                self.store.delete(name)
            self._put_mark(made)
            self.store.put(self.work / MANIFEST, MANIFEST)
        os.replace(self.work, self._done_work)
        shutil.rmtree(self._done_work)

    @property
    def _done_work(self) -> Path:
        return self.work.with_name(f".{self.work.name}.done")

    def _put(self, path: Path) -> None:
        """Upload a small file, unless it is there."""
        sha256 = sha256_of(path)
        if self._uploaded.get(self._name(path), {}).get("sha256") != sha256:
            self.store.put(path, self._name(path))
            self._note(path, sha256)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.work).as_posix()


def _is_in_the_way(name: str) -> bool:
    """Whether a build may write a file of this name: others, such as a README.md, stay as they are."""
    folder, slash, _ = name.partition("/")
    return folder in SPLITS if slash else name.endswith((".json", ".csv", ".html"))


def is_written(shard: Path) -> bool:
    """Whether a tar and its index are in the folder of an unfinished build."""
    return shard.exists() and _index_of(shard).exists()


def _index_of(shard: Path) -> Path:
    return shard.with_suffix(".index.tsv")
