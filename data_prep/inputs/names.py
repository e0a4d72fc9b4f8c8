"""The name of an image, relative to the folder of images, and the key that is derived from the name alone."""

import hashlib
import os
import re
from typing import NamedTuple
from urllib.parse import unquote

from data_prep.inputs.storage import is_http, is_url
from data_prep.masked import masked_url

OUTSIDE = "outside of the images folder"
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LOGIN = re.compile(r"(?<=://)[^/]*@")
UNQUOTED = 3  # servers and proxies may unquote a path more than once


class Problem(NamedTuple):
    """Why a row or an image cannot be used: a fixed phrase to count by, and a detail about this one."""

    reason: str
    detail: str = ""


def key_of(name: str) -> str:
    """16 hexadecimal digits from an image's name: safe in a tar, and the same in every build."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def missing_hint(name: str) -> str:
    """What to do about a path that does not exist."""
    if WINDOWS_PATH.match(name):
        return "a path of Windows; make paths relative to --images, with / between folders"
    return "a path of Windows; write / instead of \\" if "\\" in name else "see --images"


def _leaves(name: str) -> bool:
    """Whether a name in a URL has a part `..`, however it is quoted; clients take a backslash for a slash."""
    for _ in range(UNQUOTED):
        if ".." in re.split(r"[/\\]", name):
            return True
        name = unquote(name)
    return False


class Names:
    """Converts image paths to names relative to a root folder or URL, without touching the disk.

    Args:
        root: a local folder or a URL. Names that lead out of it are refused.
    """

    def __init__(self, root: str):
        self.is_url = is_url(root)
        self.root = root if not self.is_url or root.endswith("/") else f"{root}/"
        self.shown = masked_url(self.root)
        # A table names the images without the login of their server.
        self.starts = (self.root, LOGIN.sub("", self.root)) if self.is_url else ()
        self.real = root if self.is_url else os.path.realpath(root)

    def resolve(self, image: str) -> tuple[str, Problem | None]:
        """The name of an image below the root, and why it cannot be used, if so."""
        name = image.strip()
        if not name or "\0" in name:
            return "", Problem("no image path")
        if self.is_url and (control := CONTROL.search(name)):
            # HTTP clients leave these out of a URL, so it would not be the one that is judged here.
            return name, Problem("not a URL", f"it has the control character {control[0]!r}")
        if is_url(name):
            if is_http(name):
                name = name.partition("#")[0]  # a fragment is for the reader's browser, not for the server
            if name.startswith("file://"):
                name = name.removeprefix("file://")
            elif not (start := next(filter(name.startswith, self.starts), "")):
                return name, Problem(OUTSIDE, f"not under {self.shown}; pass --images, for example https://")
            else:
                name = name[len(start) :]
                if self.root.endswith("://"):
                    return name, None
        if self.is_url:
            name = name.lstrip("/")
            leaves_root = _leaves(name)
        else:
            name = self._relative(name)
            leaves_root = name == ".." or name.startswith("../")
        return name, Problem(OUTSIDE, f"not under {self.shown}; see --images") if leaves_root else None

    def _relative(self, name: str) -> str:
        """A local path relative to the root, normalized."""
        if name.startswith("/"):
            is_below_real = name.startswith(os.path.join(self.real, ""))
            return os.path.relpath(name, self.real if is_below_real else os.path.abspath(self.root))
        if "." in name.split("/") or ".." in name or "//" in name:
            return os.path.normpath(name)
        return name
