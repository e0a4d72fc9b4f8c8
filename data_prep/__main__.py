"""Captions in a CSV become shards.

  python -m data_prep icons --out data/icons
      draws a demo set of real UI icons, with a CSV

  python -m data_prep build data/icons/icons.csv --out data/icons/shards \\
      --image-column file_path --caption-column caption --group-column group
      checks every image, splits by group, writes train, val and test tars, and a report

Each has --help. What was rejected, and why, stands in SHARDS/rejects.csv; the counts in SHARDS/report.json.
"""

import sys

import tyro

from data_prep.build import build
from data_prep.errors import exit_on_user_error
from data_prep.icons import icons


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    tyro.extras.subcommand_cli_from_dict(
        {"icons": icons, "build": build}, prog="python -m data_prep", description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )


if __name__ == "__main__":
    exit_on_user_error(main)
