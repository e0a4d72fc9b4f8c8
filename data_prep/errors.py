"""Exit codes: a user's mistake prints one sentence and exits with 2; other exceptions are bugs and keep their
traceback.
"""

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable

from data_prep.terminal import say

# A full disk, a limit on files (ulimit -f), or a place that cannot be written to: not a bug of this program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
DISK_ERRORS += (errno.ENOTDIR, errno.EISDIR)  # a folder was typed where a file is, or the other way round

# In what torch says where shared memory is full.
SHARED_MEMORY = ("No space left on device", "shared memory", "unable to allocate shm", "unable to mmap")


class UserError(Exception):
    """One or two sentences: the place, what was found there, what is valid, and how to fix it."""

    exit_code = 2
    shared = False  # True if every rank raises the same error; see train.world.World.all_or_raise


class Fault(UserError):
    """The machine failed, not the user: a full disk, a missing file, a killed process. A retry may help."""

    exit_code = 1


class Fenced(UserError):
    """Another attempt at the same run has taken over; this process must not write anything more."""

    exit_code = 4


class NotFinite(UserError):
    """Training or evaluation produced a number that is not finite; nothing was overwritten."""

    exit_code = 3
    shared = True  # it is found in numbers that are gathered or reduced, so every rank finds it


def end_of_reader(error: BaseException) -> str:
    """Why a worker process of torch's DataLoader ended, and what to do about it; "" if it did not.

    Args:
        error: A RuntimeError, which torch raises from whatever the main process does at that moment; the one
            that it was raised from may know the signal.
    """
    text = str(error)
    while "killed by signal" not in text and (error := error.__cause__ or error.__context__):
        text = str(error) if "killed by signal" in str(error) else text
    if "DataLoader worker" not in text:
        return ""
    worker, first = "a worker process that reads images", text.splitlines()[0]
    signal_name = first.partition("killed by signal: ")[2].partition(".")[0].strip()
    # torch passes batches through files there; a write beyond what is free is a bus error
    if signal_name.startswith("Bus error") or any(sign in text for sign in SHARED_MEMORY):
        return (
            f"{worker} found no room in /dev/shm ({_free('/dev/shm')} free{file_limit()}); lower --workers,"
            " or give the machine or container more shared memory"
        )
    if signal_name.startswith("Killed") or "exited unexpectedly" in first:
        return (
            f"{worker} was killed ({first}), usually for lack of memory; lower --workers or request more"
            " memory"
        )
    if signal_name:
        return f"{worker} was ended by a signal from outside, or crashed ({first})"
    return ""  # an error in our own code, which keeps its traceback


def file_limit() -> str:
    """The limit that ulimit -f sets, for a message, or nothing: SQLite and torch do not say that it was
    reached.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return "" if limit == resource.RLIM_INFINITY else f", and ulimit -f allows files of {limit // 1024:,} KiB"


def _free(folder: str) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
    except OSError:
        return "nothing"


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; print a UserError and exit with its code. An error that all ranks share is printed once."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by `>&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as in `... | head`
        # Without this, Python flushes stdout again at exit and prints a second BrokenPipeError.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            say(f"error: {error}", file=sys.stderr, flush=True)
        elif not error.shared:
            say(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("\nstopped; run the same command again to resume where possible", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if not (reason := end_of_reader(error)):
            raise
        say(f"\nerror: {reason}; then run the same command again to resume", file=sys.stderr)
        sys.exit(Fault.exit_code)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        say(
            f"error: {error}{file_limit()}; complete files are not affected: fix this, then run the same"
            " command again",
            file=sys.stderr,
        )
        sys.exit(Fault.exit_code)
