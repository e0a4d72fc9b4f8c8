"""Ctrl-C while a command imports its libraries prints one line, as it does later (exit_on_user_error)."""

import sys

from data_prep.terminal import say

_excepthook = sys.excepthook


def _one_line_on_interrupt(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    if issubclass(kind, KeyboardInterrupt):
        say("\nstopped", file=sys.stderr)
    else:
        _excepthook(kind, error, traceback)


sys.excepthook = _one_line_on_interrupt
