"""Captions in a CSV become shards.

  python -m data_prep icons --out data/icons
      draws a demo set of real UI icons, with a CSV

  python -m data_prep build data/icons/icons.csv --out data/icons/shards \\
      --image-column file_path --caption-column caption --group-column group
      checks every image, splits by group, writes train, val and test tars, and a report

  python -m data_prep review SHARDS --decisions decisions.csv
      opens a page to look through the images, drop some and edit captions; build --decisions applies it

  python -m data_prep index TAR ... --out DIR   checks existing WebDataset tars, for training in place
  python -m data_prep merge SHARDS              after a build in several tasks: writes shards and manifest
  python -m data_prep verify SHARDS             compares all files with their sha256

SHARDS/report.html shows the result; SHARDS/rejects.csv lists every rejected row with its reason.
"""

from data_prep.cli import run_commands
from data_prep.errors import exit_on_user_error

COMMANDS = {
    "icons": "data_prep.icons:icons",
    "build": "data_prep.build.pipeline:build",
    "index": "data_prep.build.pipeline:index",
    "review": "data_prep.review.command:review",
    "merge": "data_prep.build.pipeline:merge",
    "verify": "data_prep.verify:verify",
}


def main() -> None:
    run_commands("python -m data_prep", __doc__, COMMANDS)


if __name__ == "__main__":
    exit_on_user_error(main)
