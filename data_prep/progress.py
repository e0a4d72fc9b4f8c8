"""Progress bars that do not flood a log file."""

import shutil
import sys

from tqdm import tqdm


def progress(iterable=None, **options) -> tqdm:
    """A tqdm bar with an ETA: five updates per second in a terminal, one line per ten seconds in a log."""
    # The size is passed because tqdm draws nothing in a terminal that reports 0 x 0, as in some containers.
    columns, rows = shutil.get_terminal_size((100, 24))
    interval_s = 0.2 if sys.stderr.isatty() else 10
    return tqdm(
        iterable, mininterval=interval_s, maxinterval=30, ncols=min(120, columns), nrows=rows, **options
    )
