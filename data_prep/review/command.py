"""The command review."""

from pathlib import Path
from typing import Annotated

import tyro

from data_prep.cli import File, OptionalFile, Shards


def review(
    shards: Annotated[Shards, tyro.conf.Positional],
    decisions: File = Path("decisions.csv"),
    suspects: OptionalFile = None,
    host: str = "127.0.0.1",
    port: int = 8001,
) -> None:
    """Look through a data set in the browser, drop images and edit captions.

    Each decision is saved at once; `build ... --keep-splits SHARDS --decisions decisions.csv` applies them.

    Args:
        shards: Folder that build or index wrote. Nothing in it is changed.
        decisions: CSV to read decisions from, if it exists, and to write them to; it may be edited by hand.
        suspects: List of `python -m eval suspects`; its images come first, each with the reason.
        host: Address to listen on; 0.0.0.0 accepts connections from other machines; the
            printed address then has a random token, without which nothing is answered.
        port: 0 takes a free one.
    """
    from data_prep import web
    from data_prep.review.server import app
    from data_prep.suspects import read_suspects

    listed = read_suspects(suspects) if suspects else None
    web.serve(app(shards, decisions, host, listed), host, port, "review page")
