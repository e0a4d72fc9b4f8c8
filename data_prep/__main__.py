"""Captions in a CSV become shards.

  python -m data_prep icons --out data/icons
      draws a demo set of real UI icons, with a CSV

  python -m data_prep build data/icons/icons.csv --out data/icons/shards \\
      --image-column file_path --caption-column caption --group-column group
      checks every image, splits by group, writes train, val and test tars, and a report

  python -m data_prep review SHARDS --decisions decisions.csv
      a page in the browser to look through them: drop pictures, put captions right; build --decisions applies
      it

  python -m data_prep index TARS --out DIR     checks WebDataset tars that are there already, for training in place
  python -m data_prep merge SHARDS             after a build in several tasks: one manifest
  python -m data_prep verify SHARDS            hashes every file again

Each has --help. What was rejected, and why, stands in SHARDS/rejects.csv; a page to look at is
SHARDS/report.html. """

import sys
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.build.pipeline import build, index, merge
from data_prep.errors import UserError, exit_on_user_error
from data_prep.icons import icons
from data_prep.progress import progress
from data_prep.shards import altered, read_manifest


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Hash every shard and index again, and compare with the manifest.

    Args:
        folder: Folder of shards.
    """
    entries = [entry for split in read_manifest(folder)["splits"].values() for entry in split["shards"]]
    problems = [
        problem
        for entry in progress(entries, desc="verifying", unit="shard")
        for problem in altered(folder, entry)
    ]
    if problems:
        raise UserError(f"{len(problems)} files are not what was built:\n" + "\n".join(problems))
    print(f"{folder}: all {len(entries)} shards are as they were built")


def review(
    shards: Annotated[Path, tyro.conf.Positional],
    decisions: Path = Path("decisions.csv"),
    host: str = "127.0.0.1",
    port: int = 8001,
) -> None:
    """Look through a data set in the browser, and decide: this picture is dropped, that caption is put right.

    Each decision is saved at once; `build ... --decisions decisions.csv` builds the data set that was decided
    on.

    Args:
        shards: Folder that build or index wrote. Nothing in it is changed.
        decisions: CSV that the decisions go to, and are read from where it is there; it may be edited by
            hand, too.
        host: Address to listen on; 0.0.0.0 lets in everybody who reaches this machine.
        port: 0 takes a free one.
    """
    from data_prep import (
        review,
        web,
    )  # here, because building does without a web server, and it takes half a second

    web.serve(review.app(shards, decisions, host), host, port, "review page")


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    tyro.extras.subcommand_cli_from_dict(
        {"icons": icons, "build": build, "index": index, "review": review, "merge": merge, "verify": verify},
        prog="python -m data_prep",
        description=__doc__,
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
