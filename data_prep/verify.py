"""The command verify: are the shards on disk still what was built?"""

from typing import Annotated

import tyro

from data_prep.cli import Shards
from data_prep.errors import UserError
from data_prep.progress import progress
from data_prep.shards import altered, read_manifest
from data_prep.tables import are, counted
from data_prep.terminal import say


def verify(shards: Annotated[Shards, tyro.conf.Positional]) -> None:
    """Compare the sha256 of every shard and index with the manifest.

    A tar that was indexed behind a URL was not read whole, and has no sha256: its store is asked whether it
    was replaced.

    Args:
        shards: Folder of shards.
    """
    entries = [entry for split in read_manifest(shards)["splits"].values() for entry in split["shards"]]
    bar = progress(entries, desc="verifying", unit="shard")
    problems = [problem for entry in bar for problem in altered(shards, entry)]
    if problems:
        files = f"{counted(len(problems), 'file')} {are(len(problems))}"
        raise UserError("\n".join([f"{files} missing or altered:", *problems]))
    say(f"{shards}: all {len(entries)} shards are unchanged")
    if unread := len({entry["file"] for entry in entries if not entry["sha256"]}):
        tars = counted(unread, "tar")
        say(f"not checked: the bytes of {tars} behind URLs, only that their stores say the same of them")
