"""Progress bars that are quiet in a log file."""

import sys

from tqdm import tqdm


def progress(iterable=None, **options) -> tqdm:
    """A tqdm bar with its ETA; where nobody watches (no terminal) it writes a line in ten seconds, not ten a second."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 10, maxinterval=30, dynamic_ncols=True, **options)
