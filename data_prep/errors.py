"""Exit codes: a user's mistake prints one sentence and exits with 2; other exceptions are bugs and keep their
traceback.
"""

import errno
import os
import sys
from collections.abc import Callable

# A full disk, or a place that cannot be written to: not a bug of this program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
DISK_ERRORS += (errno.ENOTDIR, errno.EISDIR)  # a folder was typed where a file is, or the other way round


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


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; print a UserError and exit with its code. An error that all ranks share is printed once."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as in `... | head`
        # Without this, Python flushes stdout again at exit and prints a second BrokenPipeError.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not error.shared:
            print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to resume where possible", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch raises this from whatever runs at that moment
            raise
        print(
            f"\nerror: a worker process that reads images was killed ({str(error).splitlines()[0]}), usually"
            " for lack of memory; lower --workers or request more memory, then run the same command again to"
            " resume",
            file=sys.stderr,
        )
        sys.exit(Fault.exit_code)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(
            f"error: {error}; complete files are not affected: fix this, then run the same command again",
            file=sys.stderr,
        )
        sys.exit(Fault.exit_code)
