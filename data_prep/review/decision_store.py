"""The CSV of decisions while the review page and people write to it."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data_prep.atomic import lock_beside
from data_prep.build.decisions import Decision, Subject, read_decisions, write_decisions
from data_prep.errors import UserError


class _Change(NamedTuple):
    """What undo() restores: the decision about `subject` before a change."""

    subject: Subject
    before: Decision | None


class _FileState(NamedTuple):
    inode: int
    size: int
    modified_ns: int


class DecisionStore:
    """Reads and writes the CSV. A change is on disk before the method returns, and the file is read again if
    a person has edited it. One store at a time writes to a file, from its opening to close().

    Raises:
        UserError: the file has an invalid decision, or cannot be written, or another review writes to it.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._lock_file = lock_beside(path, "review page", "--decisions")
        try:
            self._open(path)
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Let another process write to the file."""
        self._lock_file.close()

    def _open(self, path: Path) -> None:
        self._history: list[_Change] = []
        self._file_state: _FileState | None = None
        self._decisions: dict[Subject, Decision] = {}
        self._by_key: dict[str, list[Decision]] = {}
        if path.exists():
            self._reload()
            if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
                raise UserError(f"{path}: cannot be written; pass --decisions with a writable file")
        else:
            try:
                self._write([])
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be written ({error.strerror}); pass --decisions with a writable file"
                ) from None

    def _reload(self) -> None:
        """Read the file, if it has changed."""
        state = self._read_state()
        if self._file_state is None or state != self._file_state:
            self._file_state = state
            self._set(read_decisions(self.path)[0].values() if state else [])

    def _read_state(self) -> _FileState | None:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        return _FileState(status.st_ino, status.st_size, status.st_mtime_ns)

    def _set(self, decisions: Iterable[Decision]) -> None:
        self._decisions = {decision.subject: decision for decision in decisions}
        self._by_key = {}
        for decision in self._decisions.values():
            self._by_key.setdefault(decision.key, []).append(decision)

    def _write(self, decisions: list[Decision]) -> None:
        write_decisions(self.path, decisions)
        self._set(decisions)
        self._file_state = self._read_state()

    def _replace(self, subject: Subject, decision: Decision | None) -> Decision | None:
        """Replace the decision about a subject. Call it with the lock held.

        Returns:
            The decision before.
        """
        decisions = dict(self._decisions)
        before = decisions.pop(subject, None)
        if decision:
            decisions[subject] = decision._replace(note=decision.note or (before.note if before else ""))
        try:
            self._write(list(decisions.values()))
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); the change was not saved"
            ) from None
        return before

    def decide(self, decision: Decision) -> None:
        """Save a decision; it replaces an earlier one about the same subject.

        Raises:
            UserError: the file cannot be read or written; nothing was changed.
        """
        with self._lock:
            self._reload()
            self._history.append(_Change(decision.subject, self._replace(decision.subject, decision)))

    def remove(self, subject: Subject) -> None:
        """Remove the decision about a subject.

        Raises:
            UserError: there is none, or as in decide().
        """
        with self._lock:
            self._reload()
            if subject not in self._decisions:
                raise UserError("this decision was removed already")
            self._history.append(_Change(subject, self._replace(subject, None)))

    def undo(self) -> str:
        """Undo the last change since the server started.

        Returns:
            The key of the image.

        Raises:
            UserError: there is no change to undo, or as in decide().
        """
        with self._lock:
            self._reload()
            if not self._history:
                raise UserError("there is nothing to undo")
            self._replace(*self._history[-1])
            return self._history.pop().subject.key

    def of(self, key: str) -> list[Decision]:
        """The decisions about one image."""
        return self._by_key.get(key, [])

    def state(self) -> dict:
        """What the page shows about the file."""
        with self._lock:
            self._reload()
            return {
                "decisions": len(self._decisions),
                "can_undo": bool(self._history),
                "file": str(self.path),
            }

    def latest(self, start: int, count: int) -> list[Decision]:
        """Decisions from the `start`-th on, the latest first."""
        return list(reversed(self._decisions.values()))[start : start + count]
