"""A user's mistake ends in one sentence and exit code 2; anything else is our bug and keeps its traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """What was found, where, what is wanted, and what to do about it, in one sentence."""

    exit_code = 2
    shared = False  # True where every rank raises the same one; see train.world.World.together


class NotFinite(UserError):
    """Training or evaluation met a number that is not finite; nothing was overwritten."""

    exit_code = 3
    shared = True  # found in numbers that are gathered or reduced, so every rank finds it


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a UserError is printed and becomes the exit code. One that all ranks share is printed once."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not error.shared:
            print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
