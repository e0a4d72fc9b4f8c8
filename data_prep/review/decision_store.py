"""The file of decisions while it is written to, by a page and by people at once."""

import os
import threading
from pathlib import Path

from data_prep.build.decisions import Decision, read_decisions, write_decisions
from data_prep.errors import UserError


class Book:
    """The CSV of decisions, kept whole: each change is on the disk before it is answered. People may edit it
    meanwhile.

    Raises:
        UserError: the file holds what is no decision, or cannot be written.
    """

    def __init__(self, path: Path):
        self.path, self._lock, self._history, self._seen = path, threading.Lock(), [], None
        self._all: dict[tuple, Decision] = {}
        self._by_key: dict[str, list[Decision]] = {}
        if path.exists():
            self._look()
            if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
                raise UserError(f"{path}: cannot be written; pass --decisions, a file that may be")
        else:
            try:
                self._write({})
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be written ({error.strerror}); pass --decisions, a file that may be"
                ) from None

    def _look(self) -> None:
        """Read the file again where someone else has written to it."""
        if self._seen is None or self._state() != self._seen:
            self._seen = self._state()
            self._keep(read_decisions(self.path)[0] if self._seen else {})

    def _state(self) -> tuple | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _keep(self, decisions: dict[tuple, Decision]) -> None:
        self._all, self._by_key = decisions, {}
        for each in decisions.values():
            self._by_key.setdefault(each.key, []).append(each)

    def _write(self, decisions: dict[tuple, Decision]) -> None:
        write_decisions(self.path, decisions.values())
        self._keep(decisions)
        self._seen = self._state()

    def _change(self, about: tuple, decision: Decision | None) -> Decision | None:
        """Put `decision` in the place of what was decided before, which is returned. With the lock held."""
        decisions = dict(self._all)
        before = decisions.pop(about, None)
        if decision:
            decisions[about] = decision._replace(note=decision.note or (before.note if before else ""))
        try:
            self._write(decisions)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); this was not saved"
            ) from None
        return before

    def decide(self, decision: Decision) -> None:
        """Save a decision, in the place of an earlier one about the same.

        Raises:
            UserError: the file cannot be read or written any more; nothing was changed.
        """
        with self._lock:
            self._look()
            self._history.append((decision.about, self._change(decision.about, decision)))

    def take_back(self, about: tuple) -> None:
        """Remove the decision about this; raises as decide does, and where there is none."""
        with self._lock:
            self._look()
            if about not in self._all:
                raise UserError("this was taken back already")
            self._history.append((about, self._change(about, None)))

    def undo(self) -> str:
        """Undo what was done last since the server was started; the key of the picture it was about. Raises
        as decide does.
        """
        with self._lock:
            self._look()
            if not self._history:
                raise UserError("there is nothing to undo")
            self._change(*self._history[-1])
            return self._history.pop()[0][0]

    def of(self, key: str) -> list[Decision]:
        """What was decided about one picture."""
        return self._by_key.get(key, [])

    def state(self) -> dict:
        """What the page says of the file."""
        with self._lock:
            self._look()
            return {"decisions": len(self._all), "can_undo": bool(self._history), "file": str(self.path)}

    def latest(self, at: int, most: int) -> list[Decision]:
        """Decisions, the latest first, from the `at`-th on."""
        return list(reversed(self._all.values()))[at : at + most]
