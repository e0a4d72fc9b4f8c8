"""Arrays in an .npz or .npy of any origin: no objects, and no more memory than the file accounts for."""

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

MAX_RATIO, FREE_BYTES = 200, 1 << 28  # of what compressed arrays become; features hardly compress
DAMAGE = (ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, SyntaxError)
DAMAGE += (RuntimeError, tokenize.TokenError, TypeError, OverflowError, MemoryError)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by their names.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, holds objects, or becomes much larger than it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > FREE_BYTES + MAX_RATIO * path.stat().st_size:
            raise ValueError(f"{size:,} bytes of arrays")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    except DAMAGE as error:
        raise ValueError(str(error)) from None


def map_array(path: Path, mode: str = "r") -> np.ndarray:
    """The array of an .npy, memory-mapped: its file must have all bytes that its header names.

    Args:
        mode: of numpy.memmap.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds objects.
    """
    try:
        return np.lib.format.open_memmap(path, mode=mode)
    except DAMAGE as error:
        raise ValueError(str(error)) from None
