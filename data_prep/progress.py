"""Progress bars that are quiet in a log file."""

import shutil
import sys

from tqdm import tqdm


def progress(iterable=None, **options) -> tqdm:
    """A tqdm bar with its ETA; where nobody watches (no terminal) it writes a line in ten seconds, not five a
    second.
    """
    # Asked for here because tqdm draws nothing in a terminal that gives its size as 0 x 0, as some
    # containers' do.
    columns, rows = shutil.get_terminal_size((100, 24))
    every_s = 0.2 if sys.stderr.isatty() else 10
    return tqdm(iterable, mininterval=every_s, maxinterval=30, ncols=min(120, columns), nrows=rows, **options)
