"""Stop requests (RUN/stop, SIGTERM, SIGINT) take effect at the end of the current step."""

import signal
from pathlib import Path


class Stop:
    """Listens for stop requests inside a `with`; a second signal has its usual effect."""

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
        self.signalled = True
        signal.signal(number, self._previous[number])
