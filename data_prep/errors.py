"""A user's mistake ends in one sentence and exit code 2; anything else is our bug and keeps its traceback."""

import errno
import os
import sys
from collections.abc import Callable

NOT_OURS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)  # a full disk, or one that may not be written


class UserError(Exception):
    """What was found, where, what is wanted, and what to do about it, in one sentence."""

    exit_code = 2
    shared = False  # True where every rank raises the same one; see train.world.World.together


class Fault(UserError):
    """The machine failed, and not the user: a full disk, a file that vanished, a process that was killed.
    Trying again may help.
    """

    exit_code = 1


class Fenced(UserError):
    """Another attempt at the same run has taken over; this one must write nothing more."""

    exit_code = 4


class NotFinite(UserError):
    """Training or evaluation met a number that is not finite; nothing was overwritten."""

    exit_code = 3
    shared = True  # found in numbers that are gathered or reduced, so every rank finds it


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a UserError is printed and becomes the exit code. One that all ranks share is printed once."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: `... | head`
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python flushes into the pipe at exit
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not error.shared:
            print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here, as far as it can", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch says so in the midst of whatever is being done
            raise
        print(
            "\nerror: a process that reads images was killed, mostly for lack of memory"
            f" ({str(error).splitlines()[0]}); pass fewer --workers or ask for more memory: the same command"
            " goes on",
            file=sys.stderr,
        )
        sys.exit(Fault.exit_code)
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        print(
            f"error: {error}; nothing that was whole is lost: put this right, and run the same command again",
            file=sys.stderr,
        )
        sys.exit(Fault.exit_code)
