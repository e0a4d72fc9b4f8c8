"""The hub is asked once: where it does not answer, the cache is used alone, without retries."""

import contextlib
import logging
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

TIMEOUT_S = 6


@contextlib.contextmanager
def without_retries(needed: bool) -> Iterator[None]:
    """Silence open_clip and the hub's client, and use the cache alone where the hub does not answer.

    The client would retry each file for half a minute, with three lines for each try.

    Args:
        needed: whether the hub may be asked at all.
    """
    offline = constants.HF_HUB_OFFLINE
    logging.disable(logging.ERROR)  # what is wrong is raised; open_clip logs it too
    try:
        if needed and not offline:
            constants.HF_HUB_OFFLINE = not _answers()
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.disable(logging.NOTSET)


def wants_network(error: BaseException | None) -> bool:
    """Whether the hub could not be reached; open_clip wraps the error that says so."""
    while error and not isinstance(error, LocalEntryNotFoundError):
        error = error.__context__
    return error is not None


def _answers() -> bool:
    """Whether the hub answers within TIMEOUT_S; in a thread, because resolving a name has no limit."""
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass
        except OSError as error:
            # Its client may know certificates that urllib does not.
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):
                return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return answered.is_set()
