"""A Hugging Face hub on the loopback: repositories, LFS, commits, tags, and failures on demand.

    with Hub() as hub:
        hub.put("laion/some-clip", {"open_clip_config.json": b"..."})
        call("eval", "retrieval", "hf-hub:laion/some-clip", ..., **hub.environment(cache))

It answers huggingface_hub's client as huggingface.co does, without the Xet protocol (HF_HUB_DISABLE_XET=1).
There is one user, "me", with the token TOKEN and the organisation "my-org".
"""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hub_answers import TOKEN, Answers, Refused


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha -> path -> content, oldest first
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: dict[str, bytes]) -> str:
        content = "".join(
            f"{len(self.commits)} {path} {hashlib.sha256(data).hexdigest()}\n"
            for path, data in sorted(files.items())
        )
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def at(self, revision: str) -> str:
        sha = self.head if revision == "main" else self.tags.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class Hub:
    """The hub and its state.

    Attributes:
        repos: "me/clip", or "datasets/me/icons" -> Repo.
        blobs: sha256 -> bytes, large files that were uploaded, committed or not.
        log: "METHOD /path" of every request; "PUT sha256" of a blob that arrived whole, "CUT sha256 after n"
            of one that did not.
        cut: (k, n) breaks the connection in the k-th PUT from now on, after n of its bytes; then `down` is
            True until it is set to False.
        spoiled: paths that are returned with other bytes than were uploaded.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.cut: tuple[int, int] | None = None
        self.down, self.lock, self.spoiled = False, threading.Lock(), set()
        handler = type("Bound", (Answers,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, private: bool, files: dict[str, bytes]) -> None:
        self.repos[name] = Repo(private)
        self.put(name, files)

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Commit these files to a repository, without a request; the commit."""
        return self.repos.setdefault(name, Repo()).commit(files)

    def environment(self, cache: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables with which a command sees this hub and no other."""
        values = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cache),
        }
        values |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
            "HF_TOKEN_PATH": str(cache / "no-token"),
        }
        return values

    @contextlib.contextmanager
    def in_this_process(self, cache: Path) -> Iterator[None]:
        """Point huggingface_hub's client in this process to this hub, with `cache` as its cache."""
        constants = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": self.url}
        constants["HUGGINGFACE_CO_URL_TEMPLATE"] = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants["HF_HUB_CACHE"] = str(cache / "hub")
        constants["HF_TOKEN_PATH"] = str(cache / "no-token")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment(cache).items():
                patch.setenv(name, value)
            for name, value in constants.items():
                patch.setattr(f"huggingface_hub.constants.{name}", value)
            yield

    def count(self, start: str) -> int:
        return sum(line.startswith(start) for line in self.log)
