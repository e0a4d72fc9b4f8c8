"""Decisions about images and captions: a CSV that the review page writes, people edit, and `build` applies.

  action   caption        new_caption
  drop                                   leave the image out
  edit     the old one    the new one
  remove   the old one
  add                     one more

An image is identified by its `key`, which is derived from its name; `image` is the name, for people, and
`note` is free text.
"""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.inputs.names import Problem
from data_prep.inputs.rows import MAX_CHARACTERS
from data_prep.sheets import read_cell, write_csv

DROPPED, REMOVED = "dropped by a decision", "caption removed by a decision"
KEY = re.compile("[0-9a-f]{16}")


class CaptionCells(NamedTuple):
    """Which cells an action must have; the others must be empty."""

    caption: bool
    new_caption: bool


ACTIONS = {
    "drop": CaptionCells(caption=False, new_caption=False),
    "edit": CaptionCells(caption=True, new_caption=True),
    "remove": CaptionCells(caption=True, new_caption=False),
    "add": CaptionCells(caption=False, new_caption=True),
}


class Subject(NamedTuple):
    """What can be decided once: whether an image is dropped, what happens to a caption, a caption to add."""

    key: str
    kind: str
    caption: str


class Decision(NamedTuple):
    """A line of the CSV."""

    key: str
    image: str
    action: str
    caption: str = ""
    new_caption: str = ""
    note: str = ""

    @property
    def subject(self) -> Subject:
        if self.action == "drop":
            return Subject(self.key, "drop", "")
        if self.action == "add":
            return Subject(self.key, "add", self.new_caption)
        return Subject(self.key, "caption", self.caption)

    def problem(self) -> str:
        """Why this is not a valid decision; "" if it is."""
        if not KEY.fullmatch(self.key):
            return f"invalid key {self.key!r}; a key has 16 digits of 0-9 and a-f, as in the shards"
        if self.action not in ACTIONS:
            return f"unknown action {self.action!r}; valid actions are {', '.join(ACTIONS)}"
        for name, required in ACTIONS[self.action]._asdict().items():
            text = getattr(self, name)
            if required and not text:
                return f"{self.action} needs a {name}"
            if text and not required:
                return f"{self.action} takes no {name}, but has {text!r}"
        for name, text in self._asdict().items():
            if len(text) > MAX_CHARACTERS:
                return f"its {name} has {len(text):,} characters; at most {MAX_CHARACTERS:,}"
            if "\0" in text:
                return f"its {name} contains a NUL character"
        try:
            "".join(self).encode()
        except UnicodeEncodeError:
            return "a caption or name contains an unpaired surrogate"
        return ""

    def contradicts(self, other: "Decision") -> bool:
        """Whether two decisions about one subject differ."""
        return (self.action, self.caption, self.new_caption) != (
            other.action,
            other.caption,
            other.new_caption,
        )


def read_decisions(path: Path) -> tuple[dict[Subject, Decision], str]:
    """Decisions by their subject, in the order of the file; and the file's sha256.

    Raises:
        UserError: the file cannot be read, or has an invalid decision, or two that contradict each other.
    """
    try:
        data = path.read_bytes()
        # So that a cell that is too long is named with its line, in place of an unreadable file.
        csv.field_size_limit(max(csv.field_size_limit(), len(data)))
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        return _parse(path, lines), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); pass a CSV of decisions, as review writes it"
        ) from None
    except (UnicodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read as a CSV in UTF-8 ({error}); fix the file, or restore it"
        ) from None


def _parse(path: Path, lines) -> dict[Subject, Decision]:
    header, decisions, next_line = next(lines, []), {}, lines.line_num + 1
    if header != list(Decision._fields):
        raise UserError(
            f"{path}: its header is {','.join(header)!r}; it must be {','.join(Decision._fields)}"
        )
    for cells in lines:
        line, next_line = next_line, lines.line_num + 1
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{path}:{line}: {len(cells)} cells, but the header has {len(header)}; quote captions that"
                " contain commas"
            )
        decision = normalized(Decision(*map(read_cell, cells)))
        if problem := decision.problem():
            raise UserError(f"{path}:{line}: {problem}; fix or remove this line")
        before = decisions.setdefault(decision.subject, decision)
        if decision.contradicts(before):
            raise UserError(
                f"{path}:{line}: {decision.action} {decision.caption!r}, but a line above says"
                f" {before.action}; keep one of them"
            )
    return decisions


def normalized(decision: Decision) -> Decision:
    """The decision with white space as `build` normalizes it in captions."""
    return decision._replace(
        key=decision.key.strip(),
        action=decision.action.strip(),
        caption=" ".join(decision.caption.split()),
        new_caption=" ".join(decision.new_caption.split()),
    )


def write_decisions(path: Path, decisions: Iterable[Decision]) -> None:
    """Write the CSV, atomically."""
    write_csv(path, Decision._fields, decisions, is_input=True)


class AppliedDecisions:
    """Applies decisions row by row. Every task of a build applies them to all rows, so all count alike.

    Args:
        unused: Decisions that are listed and not applied; their note says why.
    """

    def __init__(self, decisions: Iterable[Decision], unused: Iterable[Decision] = ()):
        self._all, self._unused = list(decisions), list(unused)
        self._dropped = {decision.key: decision for decision in self._all if decision.action == "drop"}
        self._captions = {
            (decision.key, decision.caption): decision
            for decision in self._all
            if decision.action in ("edit", "remove")
        }
        self.keys_with_additions = {decision.key for decision in self._all if decision.action == "add"}
        self._keys = {decision.key for decision in self._all}
        self._seen: set[str] = set()
        self._used: set[Subject] = set()
        self._present: set[tuple[str, str]] = set()  # captions of images to which some are added

    def apply(self, key: str, caption: str) -> tuple[str, Problem | None]:
        """The caption of a row after the decisions, and why the row is left out, if so."""
        if key not in self._keys:
            return caption, None
        self._seen.add(key)
        decision = self._captions.get((key, caption))
        if decision:
            self._used.add(decision.subject)
        if key in self._dropped:
            return caption, Problem(DROPPED, self._dropped[key].note)
        if decision and decision.action == "remove":
            return caption, Problem(REMOVED, decision.note or caption)
        caption = decision.new_caption if decision else caption
        if key in self.keys_with_additions:
            self._present.add((key, caption))
        return caption, None

    def added(self) -> Iterator[Decision]:
        """Captions to add to images that were seen, are not dropped and do not have them, in the order of the
        file.
        """
        for decision in self._all:
            if decision.action != "add" or decision.key not in self._seen or decision.key in self._dropped:
                continue
            if not self._is_present(decision):
                yield decision

    def _is_present(self, decision: Decision) -> bool:
        return decision.action == "add" and (decision.key, decision.new_caption) in self._present

    def counts(self) -> dict:
        """How many decisions of each action were applied; `present`, captions to add that the image had; and
        `unused`: those whose image or caption is in no row.
        """
        is_used = {
            decision.subject: decision.subject in self._used
            or (decision.action in ("drop", "add") and decision.key in self._seen)
            for decision in self._all
        }
        present = [decision for decision in self._all if self._is_present(decision)]
        used = Counter(decision.action for decision in self._all if is_used[decision.subject])
        used["add"] -= len(present)
        return {
            **{action: used[action] for action in ACTIONS},
            "present": len(present),
            "unused": [*(each for each in self._all if not is_used[each.subject]), *self._unused],
        }
