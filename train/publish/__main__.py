"""Publish a model on the Hugging Face hub, with a model card; the upload is downloaded again and compared.

  python -m train.publish RUN --repo USER/NAME --results comparison/compare.json --license mit --dry-run
      exports to RUN/export, writes the model card, and shows what would be uploaded; needs no network
  python -m train.publish RUN --repo USER/NAME --results comparison/compare.json --license mit
      the same, then asks, uploads in one commit, tags it (v1, v2, ...), downloads it and compares sha256

--yes uploads without asking, for scripts. The same command resumes an interrupted upload. The token is the
one of `hf auth login`, or HF_TOKEN.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.cli import Model, OptionalFolder, print_guide, run_command
from data_prep.errors import UserError, exit_on_user_error
from data_prep.terminal import say

PROG = "python -m train.publish"


def publish(
    model: tyro.conf.Positional[Model],
    repo: Annotated[str, tyro.conf.arg(metavar="USER/NAME")],
    results: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = (),
    images: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = (),
    dataset: Annotated[tuple[str, ...], tyro.conf.arg(metavar="USER/NAME ...")] = (),
    license: Annotated[str, tyro.conf.arg(metavar="LICENSE")] = "",
    run: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    out: OptionalFolder = None,
    version: Annotated[str, tyro.conf.arg(metavar="TAG")] = "",
    private: bool = False,
    dry_run: bool = False,
    yes: bool = False,
) -> None:
    """Publish a model on the Hugging Face hub, with a model card, for open_clip and transformers.

    Args:
        model: Run folder, a folder written by train.export, or another MODEL (NAME:PRETRAINED, hf-hub:ID,
            local-dir:PATH).
        repo: Repository on the hub, USER/NAME or ORGANISATION/NAME; created if it does not exist.
        results: JSON files of python -m eval retrieval --json or of python -m eval compare, for the card.
            Other models in them are shown beside this one if they were evaluated on the same data.
        images: PNG, JPEG, WebP, GIF or SVG files to show in the card.
        dataset: Data sets on the hub that the model was trained on.
        license: License of the model by its hub identifier: mit, apache-2.0, cc-by-4.0, other, ...
        run: Run that an exported folder came from, for the card; found automatically for RUN/export.
        out: Folder for the export; RUN/export if MODEL is a run.
        version: Tag of this version; default v1, v2, ...
        private: Create the repository as private. An existing repository keeps its visibility.
        dry_run: Show the files, their sizes and the card; upload nothing. Needs neither token nor network.
        yes: Upload without asking.
    """
    if not dry_run and not yes and not sys.stdin.isatty():
        raise UserError(
            f"publishing to {repo} asks before it uploads, and standard input is not a terminal: pass --yes"
            " to upload without asking, or --dry-run"
        )

    from train.publish import hub
    from train.publish.card import check_images, write_card

    hub.check_names(repo, version)
    api = None if dry_run else hub.connected()
    check_images(images)
    folder, run = hub.exported(model, run, out, results)
    hub.check_export(folder)
    hub.name_text_tower(folder, repo)
    card = write_card(folder, repo, run, results, images, dataset, license)
    files = hub.to_upload(folder)
    if api is None:
        say(
            f"{card}\n{hub.listing(files)}\nnothing was uploaded; without --dry-run it goes to"
            f" {hub.url(repo)}"
        )
    else:
        if not yes:
            confirm(repo, hub.listing(files), hub.url(repo))
        say(hub.upload(api, repo, files, version, private))
    if not license:
        say("the card names no license, so others may not use the model; pass --license mit, or another one")


def confirm(repo: str, listing: str, url: str) -> None:
    """Ask on the terminal.

    Raises:
        UserError: the answer is not yes.
    """
    say(listing)
    try:
        answer = input(f"upload these files to {url}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError(f"not confirmed, so nothing was uploaded to {repo}")


def main() -> None:
    if len(sys.argv) == 1:
        print_guide(f"{PROG} MODEL --repo USER/NAME [OPTIONS]", __doc__)
    else:
        run_command(publish, PROG, guide=__doc__)


if __name__ == "__main__":
    exit_on_user_error(main)
