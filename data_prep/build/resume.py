"""An unfinished build, continued by a command with other inputs or options: what was checked is kept where
the file and the checks are the same.

OUT.partial/settings.json   what the build is of; a part has a copy, of what it is of
OUT.partial/.lock           locked by the process that writes, until it ends
part-*.sqlite: images       checked by this command
               earlier      checked by an earlier command, and kept if the file has the same bytes
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from data_prep.atomic import write_json
from data_prep.build.database import Count, select_one
from data_prep.build.records import SPOOLED, Part
from data_prep.errors import UserError
from data_prep.strict_json import load_json, read_json
from data_prep.terminal import say

SETTINGS = "settings.json"  # of an unfinished build; the manifest begins with the same keys
SAME_CHECKS = ("command", "format", "check")  # settings that, with the libraries, decide what a check finds
SHOWN_INPUTS = 3
# Of SETTINGS, and of the manifest.
SHAPE = dict.fromkeys(("command", "check", "read", "split", "write", "versions"), dict) | {
    "command": str,
    "format": int,
    "inputs": {str: (str, type(None))},
    "num_tasks": lambda n: type(n) is int and 0 < n < 1 << 20,
}
# An image that a check has spooled, because it was changed or fetched, is kept with its place; of any other,
# the place is that of the new row.
KEEP = f"""
INSERT OR REPLACE INTO earlier
SELECT images.key, coalesce(source, content), extension, width, height, content, pixels, phash, fixes,
       iif(by_check, images.container, NULL), iif(by_check, images.offset, NULL),
       iif(by_check, images.length, NULL)
FROM (SELECT images.*, images.container = {SPOOLED} AND (rows.container IS NOT {SPOOLED}
                                                         OR rows.offset != images.offset) AS by_check
      FROM images JOIN rows USING (ordinal)) AS images
"""


def check_ours(folder: Path) -> None:
    """Refuse a folder that this command did not make.

    Raises:
        UserError: it is not an unfinished build.
    """
    if not folder.exists() or any(_is_of_a_build(folder / name) for name in (SETTINGS, "manifest.json")):
        return
    # Hidden files are allowed: another task may be writing its settings at this moment.
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(
            f"{folder}: has no {SETTINGS}, so it was not made by this command, and is not written to; move it"
            " away"
        )


def _is_of_a_build(file: Path) -> bool:
    try:
        load_json(file, SHAPE)
    except (OSError, ValueError):
        return False
    return True


def read_settings(folder: Path, name: str = SETTINGS) -> dict:
    """The settings of an unfinished build.

    Raises:
        UserError: they are damaged.
    """
    return read_json(folder / name, SHAPE, f"delete {folder}, and run the build again")


def start_or_resume(folder: Path, settings: dict) -> None:
    """Make an unfinished build one of these settings: of one with others, only the parts are left."""
    # A build that was killed after its last step but one has a manifest already.
    files = [path for path in (folder / SETTINGS, folder / "manifest.json") if path.is_file()]
    if not files:
        write_json(folder / SETTINGS, settings)
        return
    if changed := changes(read_settings(folder, files[0].name), settings):
        if settings["num_tasks"] > 1:
            say(f"{folder}: another {', '.join(changed)}; run tasks that were finished before again")
        parts = [path.name for path in folder.glob(f"part-*-of-{settings['num_tasks']:05d}.*")]
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in parts and not entry.name.startswith("."):
                entry.unlink()
    else:
        say(f"resuming {folder}")
    write_json(folder / SETTINGS, settings)


def adopt(part: Part, settings: dict) -> None:
    """Make a part one of these settings: of one with others, what was checked in the same way is kept."""
    before = json.loads(part.get("settings") or "{}")
    if not (changed := changes(before, settings)):
        return
    keep = all(before.get(name) == settings[name] for name in SAME_CHECKS) and _same_libraries(
        before, settings
    )
    if checked := restart(part, settings, keep):
        kept = "are kept where their files are the same" if keep else "are checked again"
        say(f"{part.path.parent}: another {', '.join(changed)}; {checked:,} checked images {kept}")


def _same_libraries(before: dict, now: dict) -> bool:
    """Whether each library that images may have been checked with is still there, in the same version.

    One that is installed meanwhile, for another format of images, changes no image that was accepted without.
    """
    installed = {name: number for name, number in before.get("versions", {}).items() if number}
    return installed.items() <= now["versions"].items()


def restart(part: Part, settings: dict, keep: bool) -> int:
    """Empty a part, in one transaction.

    Args:
        keep: keep its images as ones that an earlier command has checked.

    Returns:
        How many images were checked.
    """
    count = "FROM (SELECT count(*) AS n FROM (SELECT key FROM images UNION SELECT key FROM earlier))"
    checked = select_one(part.db, Count, count).n
    part.db.execute("BEGIN")
    part.db.execute(KEEP if keep else "DELETE FROM earlier")
    for table in ("rows", "images", "rejects", "long_captions", "state"):
        part.db.execute(f"DELETE FROM {table}")
    part.db.execute("DROP INDEX IF EXISTS rows_by_key")
    part.set(settings=json.dumps(settings))
    part.db.execute("COMMIT")
    return checked


def retry_rejected(part: Part) -> None:
    """Let `scan` check rejected images again: their files may have been replaced since."""
    rejected = (
        "SELECT ordinal FROM rejects JOIN rows USING (ordinal)"
        " WHERE NOT EXISTS (SELECT 1 FROM images WHERE images.key = rows.key)"
    )
    part.db.execute("BEGIN")
    if part.db.execute(f"DELETE FROM rejects WHERE ordinal IN ({rejected})").rowcount:
        part.set(scanned="", last_key="")
    part.db.execute("COMMIT")


def changes(before: dict, now: dict) -> list[str]:
    """What differs between two settings, in words; nothing else of `before` counts."""
    return [
        text
        for name, value in now.items()
        if before.get(name) != value
        for text in _describe_change(name, before.get(name), value)
    ]


def _describe_change(name: str, before, now) -> list[str]:
    if name == "inputs":
        before = before or {}
        if changed := [source for source in before if source in now and before[source] != now[source]]:
            return [f"content of {_shortened(changed)}"]
        return [f"input ({_shortened(before)}, now {_shortened(now)})"]
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [f"{name} ({before}, now {now})"]
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [_describe_option(name, key, before.get(key), now.get(key)) for key in changed]


def _describe_option(name: str, key: str, before, now) -> str:
    if key in ("decisions", "feedback"):  # hashes, which tell a person nothing
        return f"content of --{key}" if before and now else f"--{key}"
    flag = key if name == "versions" else f"--{key.replace('_', '-')}"
    return f"{flag} ({'none' if before in ('', None) else before}, now {'none' if now == '' else now})"


def _shortened(sources: Iterable[str]) -> str:
    first = list(sources)
    more = f" and {len(first) - SHOWN_INPUTS} more" if len(first) > SHOWN_INPUTS else ""
    return ", ".join(first[:SHOWN_INPUTS]) + more
