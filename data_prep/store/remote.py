"""A folder behind a URL that fsspec knows (s3://, gs://, hf://, https://): pieces of files, read and written.

What a store refuses is one sentence at once; what it fails to answer is asked for again, with back-off.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, unquote

from data_prep.errors import Fault, UserError
from data_prep.masked import masked_url, one_line
from data_prep.terminal import say

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")
ATTEMPTS, FIRST_WAIT_S = 6, 0.5  # waits of 0.5, 1, 2, 4 and 8 s: a store that restarts, or asks for less
# What clients of stores raise beside OSError, where they are imported.
CLIENT_ERRORS = (
    ("asyncio.exceptions", "TimeoutError"),
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("data_prep.inputs.image_server", "NotFetched"),
)
# By name, for their packages may not be installed: credentials that are missing, or no longer valid.
REFUSALS = {
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"),
    *("SSOTokenLoadError", "UnauthorizedSSOTokenError", "InvalidRegionError", "NoRegionError"),
    *("RefreshError", "DefaultCredentialsError", "NotFetched", "ParamValidationError"),
}
# Wrong arguments, such as the region's; not allowed; a bucket that is in another region.
WRONG = (errno.EINVAL, errno.EPERM, getattr(errno, "EREMCHG", errno.EINVAL))
MISSING = (404, 410)
NOTHING_THERE = 416  # the status of a range beyond the end of a file
VERSIONS = ("ETag", "etag", "generation", "blob_id")  # of a file, as stores name it
# Of the statuses that say that the request is wrong; the hub answers two commits at once by 412.
TRY_AGAIN = (408, 409, 412, 429)
CREDENTIALS = {
    "s3": "check the keys and the region: AWS_PROFILE, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and"
    " AWS_DEFAULT_REGION; for stores other than Amazon's AWS_ENDPOINT_URL",
    "gs": "log in with: gcloud auth application-default login",
    "hf": "log in with: hf auth login",
}


def is_url(place: object) -> bool:
    """Whether the text of a file or folder is a URL."""
    return isinstance(place, str) and "://" in place


def place_of(folder: str | Path) -> str | Path:
    """A folder as a path, or its URL as a text: a path would lose one of its slashes."""
    if not is_url(folder):
        return Path(folder)
    stripped = folder.rstrip("/")
    return stripped if is_url(stripped) else folder


def absolute_place(folder: str | Path) -> str:
    """A folder's absolute path; a URL as it is."""
    return str(folder) if is_url(folder) else str(Path(folder).absolute())


class Short(UserError):
    """A file ends before a piece that it should have.

    Attributes:
        found: that, in words.
    """

    def __init__(self, file: str, found: str):
        super().__init__(f"{file}: {found}; upload it again, or build again")
        self.found, self._arguments = found, (file, found)

    def __reduce__(self):
        return Short, self._arguments


class Store:
    """The files below a URL. Cheap to pickle; each process has its own connections.

    Raises:
        UserError: on use: it refuses, or a file is missing.
        Fault: on use: it does not answer, after ATTEMPTS.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        if not is_url(self.url):
            raise UserError(f"{url}: names no bucket or host; pass a URL such as s3://BUCKET/FOLDER")
        self.shown = masked_url(self.url)
        self._files: tuple[int, object] = (0, None)

    def __reduce__(self):
        return Store, (self.url,)

    def url_of(self, name: str) -> str:
        """Of a file below this folder.

        Raises:
            UserError: its name leads out of the folder.
        """
        if not name or "\0" in name or "\\" in name or "://" in name or name[0] == "/":
            raise UserError(f"{self.shown}: {name!r:.80} is no name of a file below it; restore the manifest")
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"{self.shown}: {name!r:.80} leads out of this folder, which is not followed")
        return f"{self.url}/{quote(name) if self.is_http else name}"

    @property
    def protocol(self) -> str:
        return self.url.partition("://")[0]

    @property
    def is_http(self) -> bool:
        return self.protocol in ("http", "https")

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A piece of a file, all of it.

        Raises:
            UserError: the file is missing.
            Short: it ends before.
        """
        try:
            data = self._piece(name, offset, offset + size)
        except FileNotFoundError:
            raise UserError(
                f"{self.shown}/{name}: missing, but listed in the manifest; upload it again, or build again"
            ) from None
        if len(data) != size:
            raise Short(f"{self.shown}/{name}", f"ends before byte {offset + size}")
        return data

    def read_whole(self, name: str, max_bytes: int) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: there is none, or no such bucket.
            UserError: it is larger.
        """
        data = self._piece(name, 0, max_bytes + 1)
        if len(data) > max_bytes:
            raise UserError(f"{self.shown}/{name}: more than {max_bytes:,} bytes, so it is not read")
        return data

    def _piece(self, name: str, start: int, end: int) -> bytes:
        url = self.url_of(name)
        return self._ask(name, lambda files: files.cat_file(url, start=start, end=end))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        return (self._info(name) or {"size": None})["size"]

    def version(self, name: str) -> str:
        """A sha256 of what the store says of a file: it is another one if the file is replaced.

        Raises:
            UserError: there is no such file, or its size is not known.
        """
        info = self._info(name)
        if info is None or not isinstance(info.get("size"), int):
            found = "no such file" if info is None else "the server does not say how large it is"
            raise UserError(f"{self.shown}/{name}: {found}; check the URL")
        # A listing says more than a question for one file, but both say these.
        known = {key: info[key] for key in VERSIONS if info.get(key)}
        told = {"url": self.url_of(name), "size": info["size"], **(known or info)}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def _info(self, name: str) -> dict | None:
        url = self.url_of(name)

        def ask(files) -> dict:
            files.invalidate_cache()
            try:
                return files.info(url)
            except FileNotFoundError as error:  # fsspec says so of any answer of a web server but success
                if _status(error) in (None, *MISSING):
                    raise
                raise error.__cause__ from None

        try:
            return self._ask(name, ask)
        except FileNotFoundError:
            return None

    def matching(self, pattern: str) -> list[str]:
        """URLs of the files whose names match a pattern with `*`, in sorted order."""
        found = self._ask(pattern, lambda files: files.glob(f"{self.url}/{pattern}"))
        return [f"{self.protocol}://{path.split('://')[-1]}" for path in sorted(found)]

    def put(self, file: Path, name: str) -> None:
        """Upload a file; it is there as a whole, or not at all.

        Raises:
            UserError: the store takes none.
        """
        url = self.url_of(name)
        if self.is_http:
            raise UserError(f"{self.shown}: files cannot be uploaded over HTTP; pass s3://, gs:// or hf://")
        try:
            self._ask(name, lambda files: files.put_file(str(file), url))
        except FileNotFoundError as error:
            raise UserError(
                f"{self.shown}: files cannot be put there ({one_line(error, 300)}); make the bucket or"
                " repository first, or check its name"
            ) from None

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the URL, by name; nothing where there is no such folder."""

        def ask(files) -> dict[str, int]:
            files.invalidate_cache()
            root = files._strip_protocol(self.url).rstrip("/") + "/"
            found = files.find(root, detail=True)
            return {name.removeprefix(root): info["size"] for name, info in found.items() if name != root}

        try:
            return self._ask("", ask)
        except FileNotFoundError:
            return {}

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        url = self.url_of(name)
        if self._info(name) is not None:  # some stores refuse to delete what is not there
            with contextlib.suppress(FileNotFoundError):
                self._ask(name, lambda files: files.rm_file(url))

    def _ask(self, name: str, request: Callable[[object], T]) -> T:
        """The answer to a request; FileNotFoundError is the caller's."""
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            files = self._file_system()
            try:
                return request(files)
            except FileNotFoundError:
                raise
            except client_errors() as error:
                if _status(error) == NOTHING_THERE:
                    return b""
                said = one_line(error, 300) or type(error).__name__
                if is_refusal(error):
                    hint = "; " + CREDENTIALS.get(self.protocol, "check the address and the password")
                    hint = "" if type(error).__name__ == "NotFetched" else hint
                    raise UserError(f"{self.shown}/{name}: refused ({said}){hint}") from None
                if attempt == ATTEMPTS:
                    raise Fault(
                        f"{self.shown}/{name}: no answer in {attempt} attempts over"
                        f" {time.monotonic() - started:.0f} s ({said}); when the store answers again, run the"
                        " same command again"
                    ) from None
                # not all processes at the same moment
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
                if attempt == ATTEMPTS // 2:
                    say(f"warning: {self.shown}/{name}: {said}; asked again", file=sys.stderr)
        raise AssertionError("unreachable")

    def _file_system(self):
        """That of this process: connections do not survive a fork."""
        process, files = self._files
        if process != os.getpid():
            files = _file_system(self.url)
            self._files = os.getpid(), files
        return files


def _file_system(url: str):
    if url.startswith(("http://", "https://")):
        from data_prep.inputs.image_server import ImageServer  # imports aiohttp, which is slow

        return ImageServer(url, skip_instance_cache=True)
    return remote(url)


def remote(url: str) -> "AbstractFileSystem":
    """The file system of a URL.

    Raises:
        UserError: its protocol is unknown, or needs a package that is not installed.
    """
    import fsspec  # slow to import

    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        known = "" if "install" in str(error).lower() else "; URLs begin with s3://, gs://, hf:// or https://"
        raise UserError(f"{masked_url(url)}: {error}{known}") from None


def client_errors() -> tuple[type[Exception], ...]:
    """What a request to a store may raise."""
    known = [OSError, ValueError]  # that of an endpoint which is no URL
    for module, name in CLIENT_ERRORS:
        known += filter(None, [getattr(sys.modules.get(module), name, None)])
    return tuple(known)


def is_refusal(error: Exception) -> bool:
    """Whether another attempt would end in the same way."""
    if isinstance(error, (PermissionError, ValueError)) or type(error).__name__ in REFUSALS:
        return True
    if isinstance(error, OSError) and error.errno in WRONG:
        return True
    status = _status(error)
    return status is not None and 300 <= status < 500 and status not in TRY_AGAIN


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error tells of, by any client."""
    for each in filter(None, (error, error.__cause__)):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):  # botocore's
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for holder in (each, answer):
            for name in ("status", "status_code", "code"):
                if isinstance(value := getattr(holder, name, None), int):
                    return int(value)
    return None


def file_at(url: str) -> tuple[Store, str]:
    """The store of a file, and its name there."""
    folder, _, name = url.rpartition("/")
    store = store_of(folder)
    return store, unquote(name) if store.is_http else name


@lru_cache
def store_of(url: str) -> Store:
    """One Store per URL, so that a process has one set of connections."""
    return Store(url)
