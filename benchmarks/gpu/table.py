"""All figures as Markdown: what was wanted, then the estimates beside the measurements, then each part."""

import platform

import torch

from benchmarks.gpu.record import WHOLE
from data_prep.tables import markdown_table
from train.device import device_name

LEFT_OUT = "left out"
SILENT = ("began", "finished", LEFT_OUT)  # notes that are no figures
PLAIN, CHECKPOINTING, COMPILED = (
    f"open_clip_train{way}" for way in ("", " --grad-checkpointing", " --torchcompile")
)
Figures = dict[tuple[str, str], dict]  # (part, name) -> note


def table(notes: list[dict], dry: bool = False) -> str:
    """The figures, and what is missing, with the card's name and the versions.

    Args:
        notes: of Record, in the order in which they were written; of two with one name the last counts.
        dry: of a rehearsal; the table says so.
    """
    figures = {(note["part"], note["name"]): note for note in notes if note["part"] not in SILENT}
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    parts = [f"{device_name()}, {versions}"]
    parts += ["A rehearsal on a CPU with a tiny model: no figure here is a GPU's."] if dry else []
    parts.append(markdown_table(("wanted of ViT-L/14 on an H200", "bound", "measured"), wanted(figures)))
    kernels = figures.get(("step", "kernels"), {})
    if measured := kernels.get("measured ms"):
        estimated = kernels["estimated ms"]
        rows = [[kind, _text(estimated[kind]), _text(measured.get(kind, 0.0))] for kind in estimated]
        parts.append(markdown_table(("ms of a step", "estimated from FLOP and bytes", "measured"), rows))
    rows = [[part, name, shown(note)] for (part, name), note in figures.items() if shown(note)]
    parts.append(markdown_table(("part", "what", "figures"), rows, left=3))
    left_out = [note["parts"] for note in notes if note["part"] == LEFT_OUT]
    parts.append(f"Left out: {', '.join(left_out[-1]) if left_out and left_out[-1] else 'nothing'}.")
    failed = [f"{part}: {name}" for (part, name), note in figures.items() if "error" in note]
    parts.append(f"Failed: {'; '.join(failed) or 'nothing'}.")
    return "\n\n".join(parts) + "\n"


def wanted(figures: Figures) -> list[list[str]]:
    """Rows of (what, bound, measured); a figure that is not known is blank."""
    steps = {name: note for (part, name), note in figures.items() if part == "step" and "pairs/s" in note}
    chunked = [note for name, note in steps.items() if "in chunks" in name]
    plain = [note for name, note in steps.items() if "in chunks" not in name]
    fastest = max((note["pairs/s"] for note in plain), default=None)
    slower = chunked[0]["ms per pair"] / plain[0]["ms per pair"] if chunked and plain else None
    ours = [note for (_, name), note in figures.items() if name == "ours"]
    waits = [100 * note["data_share"] for note in ours if "data_share" in note]  # none if out of memory
    rows = [
        ("pairs/s at the best micro batch", "at least 950", fastest),
        ("speed to open_clip_train's best", "at least 1.4", _ratio(figures, PLAIN, COMPILED)),
        ("speed to its --grad-checkpointing", "at least 1.9", _ratio(figures, CHECKPOINTING)),
        ("8,192 pairs in chunks, GB", "at most 24", chunked[0]["peak GB"] if chunked else None),
        ("8,192 pairs in chunks, time per pair to that of 64", "at most 1.35", slower),
        ("data wait of the whole path, %", "at most 1", max(waits, default=None)),
        ("host syncs in a step", "0", figures.get(("step", "host syncs"), {}).get("syncs")),
        ("resumed equals uninterrupted", "to rounding", _equality(figures, "")),
        ("resumed equals uninterrupted, deterministic", "bit for bit", _equality(figures, ", deterministic")),
    ]
    return [[what, bound, _text(value)] for what, bound, value in rows]


def _ratio(figures: Figures, *names: str) -> float | None:
    """Ours to the fastest of these runs, each beside the turn of ours in the same part."""
    speeds = {key: note.get("pairs_per_s") for key, note in figures.items()}
    ours = {part: speed for (part, name), speed in speeds.items() if name == "ours" and speed}
    theirs = [(part, speed) for (part, name), speed in speeds.items() if name in names and speed]
    return min((ours[part] / speed for part, speed in theirs if part in ours), default=None)


def _equality(figures: Figures, kind: str) -> str | None:
    note = figures.get(("smoke", f"resumed equals uninterrupted{kind}"), {})
    if "equal" not in note:
        return None
    largest = max(note["largest difference"].values())
    return "bit for bit" if note["equal"] else f"differs by {largest:.2g}"


def shown(note: dict) -> str:
    """The values of a note in one cell."""
    values = {name: value for name, value in note.items() if name not in ("part", "name", "said", "s")}
    if note["name"] == WHOLE and not values:
        return ""
    texts = [f"{name} {_text(value)}" for name, value in values.items() if value is not None]
    return ", ".join(texts) or "done"


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " / ".join(f"{name} {_text(part)}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
