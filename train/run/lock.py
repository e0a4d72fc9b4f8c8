"""Who may write to a run: one process at a time, and where a scheduler starts attempts, the newest of them.

RUN/lock     locked by the process that writes; the kernel releases it however that process ends
RUN/attempt  written by the scheduler's script, which gives each attempt its own RUN_ATTEMPT: a node that was
             cut off and comes back reads another attempt there, and is fenced
"""

import fcntl
import os
import socket
import time
from pathlib import Path
from shlex import quote
from typing import TextIO

from data_prep.atomic import NO_LOCKS
from data_prep.errors import Fault, Fenced, UserError

WAIT_S = 120  # that a new attempt gives the previous one, perhaps cut off, to notice that it is fenced
# A fenced attempt waits before it exits: its batch script must end its srun first, or Slurm would end the
# step of the same number of the new attempt.
FENCED_S = 10


class RunLock:
    """The right of one process to write to a run folder."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, None

    def acquire(self) -> None:
        """Lock the run, if this process has not yet. It is a POSIX lock, which loader workers do not inherit.

        Raises:
            UserError: another process holds it.
            Fault: another attempt holds it, and did not release it within WAIT_S.
        """
        if self.file:
            return
        file = open(self.folder / "lock", "a+")  # noqa: SIM115 open as long as the run
        is_attempt = "RUN_ATTEMPT" in os.environ
        deadline = time.monotonic() + (WAIT_S if is_attempt else 0)
        while not self._try_lock(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise (Fault if is_attempt else UserError)(
                    f"{self.folder}: another process writes to this run ({holder}). Wait for it, stop it"
                    f" with: touch {quote(str(self.folder / 'stop'))}, or pass another --run"
                )
            time.sleep(1)
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
        file.flush()
        self.file = file

    @staticmethod
    def _try_lock(file: TextIO) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in NO_LOCKS  # attempts are fenced there all the same
        return True

    def release(self) -> None:
        # in one statement: the thread that writes checkpoints may be here too
        file, self.file = (self.file, None)
        if file:
            file.close()

    def check(self) -> None:
        """Check, before anything is written, that this attempt is still the newest.

        Raises:
            Fenced: it is not.
        """
        own, path = os.environ.get("RUN_ATTEMPT"), self.folder / "attempt"
        if own and path.is_file() and (newest := path.read_text().strip()) != own:
            self.release()
            time.sleep(FENCED_S)
            raise Fenced(
                f"{self.folder}: attempt {newest} has replaced this one ({own}); nothing was written"
            )
