"""What an image is called: a name relative to the folder of images, and a key that this name alone decides."""

import hashlib
import os
from urllib.parse import unquote

from data_prep.inputs.sources import is_url


def key_of(name: str) -> str:
    """16 hexadecimal digits of an image's name: safe in a tar, the same in every build."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class Names:
    """Image paths as names relative to a root that they may not leave; judged by their text alone."""

    def __init__(self, root: str):
        self.is_url = is_url(root)
        self.root = root if not self.is_url or root.endswith("/") else f"{root}/"
        self.real = root if self.is_url else os.path.realpath(root)

    def inside(self, image: str) -> tuple[str, tuple[str, str] | None]:
        """The name of an image below the root, and a problem or None."""
        name = image.strip()
        if not name or "\0" in name:
            return "", ("no image path", "")
        if is_url(name):
            if name.startswith("file://"):
                name = name.removeprefix("file://")
            elif not self.is_url or not name.startswith(self.root):
                return name, (
                    "outside of the images folder",
                    f"not under {self.root}; pass --images, for example https://",
                )
            else:
                name = name[len(self.root) :]
                if self.root.endswith("://"):
                    return name, None
        if self.is_url:
            name = name.lstrip("/")
            leaves = ".." in unquote(name).split("/")
        else:
            if name.startswith("/"):
                name = os.path.relpath(
                    name,
                    self.real if name.startswith(os.path.join(self.real, "")) else os.path.abspath(self.root),
                )
            elif "." in name.split("/") or ".." in name or "//" in name:
                name = os.path.normpath(name)
            leaves = name == ".." or name.startswith("../")
        return name, (
            (
                "outside of the images folder",
                f"not under {self.root}; see --images",
            )
            if leaves
            else None
        )
