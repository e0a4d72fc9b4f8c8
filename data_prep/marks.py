"""Marks of search results as right or wrong: a JSONL that the search page appends to, and that
`build --feedback` reads. A later line about the same text and image replaces an earlier one.
"""

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import NamedTuple

from data_prep.atomic import lock_beside
from data_prep.errors import UserError
from data_prep.strict_json import MAX_BYTES, STRICT, parse_json, problem_of, strict_json

RIGHT, WRONG, NONE = "right", "wrong", ""
MAX_TEXT, MAX_NAME, SHOWN_PROBLEMS = 2000, 4096, 10


class Mark(NamedTuple):
    """A line of the JSONL: what a person said about one result of a sentence.

    Attributes:
        time: ISO 8601, UTC.
        text: the sentence, with white space as `build` normalizes it in captions.
        key, path: of the image, as the index has them.
        mark: RIGHT, WRONG, or NONE for a mark that was taken back.
        model, model_sha256: what found the image; the first digits of its weights' sha256.
    """

    time: str
    text: str
    key: str
    path: str
    mark: str
    model: str
    model_sha256: str


SHAPE = {name: str for name in Mark._fields} | {"mark": lambda value: value in (RIGHT, WRONG, NONE)}


def parse_mark(line: bytes) -> Mark:
    """The mark of a line.

    Raises:
        ValueError: it is none.
    """
    value = parse_json(line.decode(), **STRICT)
    if problem := problem_of(value, SHAPE):
        raise ValueError(problem)
    mark = Mark(**{name: value[name] for name in Mark._fields})
    "".join(mark).encode()  # an unpaired surrogate is a ValueError
    mark = mark._replace(text=" ".join(mark.text.split()))
    for name, text in mark._asdict().items():
        limit = MAX_TEXT if name == "text" else MAX_NAME
        if len(text) > limit:
            raise ValueError(f"{name} has {len(text):,} characters; at most {limit:,}")
        if "\0" in text:
            raise ValueError(f"{name} contains a NUL character")
    if not mark.text or not mark.key:
        raise ValueError("text or key is empty")
    return mark


def read_marks(path: Path) -> tuple[list[Mark], str]:
    """The marks in the order of the file; and the file's sha256.

    Raises:
        UserError: the file cannot be read, is larger than MAX_BYTES, or has lines that are no marks.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); pass the file of `eval serve --feedback`"
        ) from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES:,} bytes; leave out earlier marks")
    marks, problems = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            marks.append(parse_mark(line))
        except ValueError as error:
            problems.append(f"{path}:{number}: no mark ({error!s:.200}); fix or remove this line")
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] * (len(problems) > SHOWN_PROBLEMS)
        raise UserError("\n".join(problems[:SHOWN_PROBLEMS] + more))
    return marks, hashlib.sha256(data).hexdigest()


class MarkLog:
    """Appends marks to the JSONL; a mark is on disk before add() returns. One log at a time writes to a file,
    from its opening to close().

    Raises:
        UserError: as in read_marks(), the file cannot be written, or another page writes to it.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._marks: dict[str, dict[str, str]] = {}
        self._lock_file = lock_beside(path, "search page", "--feedback")
        try:
            self._append(b"")
            for mark in read_marks(path)[0]:
                self._set(mark)
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Let another process write to the file."""
        self._lock_file.close()

    def _set(self, mark: Mark) -> None:
        self._marks.setdefault(mark.text, {})[mark.key] = mark.mark

    def of(self, text: str) -> dict[str, str]:
        """The marks of a sentence, by the keys of images; NONE where one was taken back."""
        with self._lock:
            return dict(self._marks.get(" ".join(text.split()), {}))

    def add(self, mark: Mark) -> None:
        """Append a mark, unless it says what the file says already.

        Raises:
            UserError: it is not valid, or cannot be written; the file is as before.
        """
        line = strict_json(mark._asdict(), ensure_ascii=False).encode("utf-8", "surrogatepass")
        try:
            mark = parse_mark(line)
        except ValueError as error:
            raise UserError(f"no mark: {error}") from None
        with self._lock:
            if self._marks.get(mark.text, {}).get(mark.key, NONE) != mark.mark:
                self._append(line + b"\n")
                self._set(mark)

    def _append(self, line: bytes) -> None:
        """Write a line whole, or nothing of it. The file is opened anew: an editor may have replaced it."""
        try:
            with open(self.path, "ab+", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size and line and os.pread(file.fileno(), 1, size - 1) != b"\n":
                    line = b"\n" + line
                if size + len(line) > MAX_BYTES:
                    raise OSError(errno.EFBIG, f"it would have more than {MAX_BYTES:,} bytes")
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    raise
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); pass --feedback with a writable file"
            ) from None
