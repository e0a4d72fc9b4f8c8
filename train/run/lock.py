"""Who may write to a run: one process at a time, and where a scheduler starts attempts, the newest of them.

RUN/lock     held by the process that writes; the system takes it back however that ends
RUN/attempt  written by whoever starts attempts, who gives each its own RUN_ATTEMPT: a node that was cut off,
             and comes back, finds that it is not named there any more
"""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from data_prep.errors import Fault, Fenced, UserError

NO_LOCKS = (
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
)  # of a file system that has none; attempts are fenced all the same
WAIT_S = 120  # that an attempt gives the one before it, cut off perhaps, to see that it is fenced
# for the batch script to end srun first, which would end the step of the same number of the attempt that took
# over
FENCED_S = 10


class RunLock:
    """The right to write to a run folder, which this process has or takes."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, None

    def take(self) -> None:
        """Lock the run, unless that is done. The lock is POSIX's, which the processes that read images do not
        inherit.

        Raises:
            UserError: another process has it.
            Fault: another attempt has it, and did not let go in WAIT_S seconds.
        """
        if self.file:
            return
        file, attempt = (
            open(self.folder / "lock", "a+"),
            "RUN_ATTEMPT" in os.environ,
        )
        deadline = time.monotonic() + (WAIT_S if attempt else 0)
        while not self._lock(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise (Fault if attempt else UserError)(
                    f"{self.folder}: another process writes to this run ({holder}); wait for it, end it with:"
                    f" touch {self.folder / 'stop'}, or pass another --run"
                )
            time.sleep(1)
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
        file.flush()
        self.file = file

    @staticmethod
    def _lock(file: TextIO) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in NO_LOCKS
        return True

    def release(self) -> None:
        file, self.file = self.file, None  # in one go: the thread that writes checkpoints may be here as well
        if file:
            file.close()

    def check(self) -> None:
        """Before anything is written: is this attempt still the one that may?

        Raises:
            Fenced: it is not.
        """
        mine, path = os.environ.get("RUN_ATTEMPT"), self.folder / "attempt"
        if mine and path.is_file() and (current := path.read_text().strip()) != mine:
            self.release()
            time.sleep(FENCED_S)
            raise Fenced(
                f"{self.folder}: attempt {current} has taken over from this one, {mine}; nothing was written"
            )
