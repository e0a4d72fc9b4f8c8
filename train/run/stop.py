"""Stop requests (RUN/stop, SIGTERM, SIGINT) take effect at the end of the current step."""

import signal
import time
from pathlib import Path

ONE_REQUEST_S = 3.0  # signals within this time of the first are the same request


class Stop:
    """Listens for stop requests inside a `with`; a signal later than ONE_REQUEST_S has its usual effect.

    One request often sends several signals: timeout(1) signals its child and then its process group, torchrun
    forwards what a group or a job step has received already.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, file: Path):
        self.file = file
        self.signalled = False

    def requested(self) -> bool:
        return self.signalled or self.file.exists()

    def __enter__(self) -> "Stop":
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        if not self.signalled:
            self.signalled, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > ONE_REQUEST_S:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
