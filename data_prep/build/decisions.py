"""What people decided about pictures and captions: a CSV that the review page writes, people edit, and
`build` applies.

  action   caption        new_caption
  drop                                   the image is left out
  edit     the old one    the new one
  remove   the old one
  add                     one more

An image is known by its `key`, which its name alone decides; `image` is that name, for people, as `note` is.
"""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.atomic import atomic_file
from data_prep.errors import UserError

DROPPED, REMOVED = "dropped by a decision", "caption removed by a decision"
WANTS = {
    "drop": (False, False),
    "edit": (True, True),
    "remove": (True, False),
    "add": (False, True),
}  # caption, new_caption
KEY = re.compile("[0-9a-f]{16}")


class Decision(NamedTuple):
    key: str
    image: str
    action: str
    caption: str = ""
    new_caption: str = ""
    note: str = ""

    @property
    def about(self) -> tuple[str, str, str]:
        """What can be decided once: that an image is dropped, what becomes of one caption, that one is added."""
        if self.action == "drop":
            return self.key, "drop", ""
        return (
            (self.key, "add", self.new_caption)
            if self.action == "add"
            else (self.key, "caption", self.caption)
        )

    def problem(self) -> str:
        """Why this cannot be a decision, or nothing."""
        if not KEY.fullmatch(self.key):
            return f"the key {self.key!r} is none; 16 digits of 0-9 and a-f are wanted, as in the shards"
        if self.action not in WANTS:
            return f"unknown action {self.action!r}; {', '.join(WANTS)} are known"
        for name, text, wanted in zip(self._fields[3:5], self[3:5], WANTS[self.action], strict=True):
            if bool(text) != wanted:
                return f"{self.action} {'wants a' if wanted else 'takes no'} {name}" + (
                    f", but has {text!r}" if text else ""
                )
        try:
            "".join(self).encode()
        except UnicodeEncodeError:
            return "a caption or name holds half a character"
        return ""


def read_decisions(path: Path) -> tuple[dict[tuple, Decision], str]:
    """Decisions in the order of the file, by what they are about; and the file's sha256.

    Raises:
        UserError: it cannot be read, or holds what is no decision, or two that contradict each other.
    """
    try:
        data = path.read_bytes()
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        return _parse(path, lines), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); a CSV of decisions is wanted, as review writes it"
        ) from None
    except (UnicodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read as a CSV in UTF-8 ({error}); put it right, or restore it"
        ) from None


def _parse(path: Path, lines) -> dict[tuple, Decision]:
    header, found, at = next(lines, []), {}, lines.line_num + 1
    if header != list(Decision._fields):
        raise UserError(f"{path}: its header is {','.join(header)!r}; {','.join(Decision._fields)} is wanted")
    for cells in lines:
        line, at = at, lines.line_num + 1
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{path}:{line}: {len(cells)} cells where the header has {len(header)}; quote captions that hold commas"
            )
        decision = tidy(*cells)
        if problem := decision.problem():
            raise UserError(f"{path}:{line}: {problem}")
        before = found.setdefault(decision.about, decision)
        if before[2:5] != decision[2:5]:
            raise UserError(
                f"{path}:{line}: {decision.action} {decision.caption!r}, but a line above says {before.action}; one of them is wanted"
            )
    return found


def tidy(*cells: str) -> Decision:
    """A decision whose captions are spaced as build spaces them."""
    key, image, action, caption, new_caption, note = cells
    return Decision(
        key.strip(), image, action.strip(), " ".join(caption.split()), " ".join(new_caption.split()), note
    )


def write_decisions(path: Path, decisions: Iterable[Decision]) -> None:
    """The file, whole or not at all."""
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Decision._fields)
        writer.writerows(decisions)


class Decided:
    """Decisions as they are applied, row by row; every part of a build asks about all rows, so that all count
    alike.
    """

    def __init__(self, decisions: Iterable[Decision]):
        self._all = list(decisions)
        self._dropped = {each.key: each for each in self._all if each.action == "drop"}
        self._captions = {
            (each.key, each.caption): each for each in self._all if each.action in ("edit", "remove")
        }
        self.adding = {each.key for each in self._all if each.action == "add"}
        self._keys = {each.key for each in self._all}
        self._seen: set[str] = set()
        self._used: set[tuple] = set()

    def __call__(self, key: str, caption: str) -> tuple[str, tuple[str, str] | None]:
        """What becomes of a row: its caption, and the reason and detail where it is not wanted any more."""
        if key not in self._keys:
            return caption, None
        self._seen.add(key)
        if found := self._captions.get((key, caption)):
            self._used.add(found.about)
        if key in self._dropped:
            return caption, (DROPPED, self._dropped[key].note)
        if found and found.action == "remove":
            return caption, (REMOVED, found.note or caption)
        return found.new_caption if found else caption, None

    def added(self) -> Iterator[tuple[str, str]]:
        """(key, caption) of captions for images that were seen and are not dropped, in the order of the file."""
        for each in self._all:
            if each.action == "add" and each.key in self._seen and each.key not in self._dropped:
                yield each.key, each.new_caption

    def counts(self) -> dict:
        """How many decisions of each action were applied, and which were not: their image or caption is in no
        row.
        """
        is_used = {
            each.about: each.about in self._used
            or (each.action in ("drop", "add") and each.key in self._seen)
            for each in self._all
        }
        used = Counter(each.action for each in self._all if is_used[each.about])
        return {
            **{action: used[action] for action in WANTS},
            "unused": [each for each in self._all if not is_used[each.about]],
        }
