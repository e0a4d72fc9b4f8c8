"""A stop is a wish, not an interruption: the file RUN/stop, SIGTERM or SIGINT; the loop grants it after a
step.
"""

import signal
from pathlib import Path


class Stop:
    """Listens while it is entered; a second signal does what it would have done without us."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, file: Path):
        self.file = file
        self.signalled = False

    def asked(self) -> bool:
        return self.signalled or self.file.exists()

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _) -> None:
        self.signalled = True
        signal.signal(number, self._before[number])
