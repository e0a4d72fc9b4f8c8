"""report.html: one self-contained page on which someone sees at a glance whether the data is sane."""

from pathlib import Path

from data_prep.plan import Plan


def write_page(path: Path, plan: Plan, summary: dict, begun: dict) -> None:
    """Write the page of a finished plan; images are read again for it."""
    path.write_text("soon")
