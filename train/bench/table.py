"""What train.bench.__main__ measured, for people: tables, and a picture of the same rows."""

from pathlib import Path

from matplotlib.figure import Figure

from data_prep.atomic import atomic_file
from train.publish.card_tables import markdown_table

OURS, PEER = "#1f77b4", "#ff7f0e"
STEP_COLUMNS = ("pairs/s", "share of peak", "step", "data", "forward", "backward", "optimizer", "memory")
PATH_COLUMNS = ("pairs/s", "to ours", "slowest", "fastest", "CPU ms/pair", "data wait", "memory")


def table(result: dict) -> str:
    """What was measured, where, and a line for each row, in Markdown."""
    lines = [f"{name:22} {_shown(value)}" for name, value in result.items() if not isinstance(value, list)]
    lines += [
        "",
        *padded_table(
            "one step", STEP_COLUMNS, {_step_name(row): _step_cells(row) for row in result["steps"]}
        ),
    ]
    if result["whole_path"]:
        ours = result["whole_path"][0]["pairs_per_s"]
        rows = {_path_name(row): _path_cells(row, ours) for row in result["whole_path"]}
        lines += ["", *padded_table("whole path", PATH_COLUMNS, rows)]
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """A bar for each row: pairs/s on the left, peak memory on the right."""
    rows = [(_step_name(row), row, OURS) for row in result["steps"]]
    rows += [
        (_path_name(row), row, OURS if row["trainer"] == "ours" else PEER) for row in result["whole_path"]
    ]
    names, found, colors = zip(*rows, strict=True)
    figure = Figure(figsize=(12, 1.3 + 0.32 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, key, label in (left, "pairs_per_s", "pairs/s"), (right, "peak_memory_gb", "peak memory, GB"):
        bars = axis.barh(range(len(rows)), [row[key] or 0 for row in found], color=colors)
        axis.bar_label(bars, [f" {row[key]:.3g}" if row[key] else " out of memory" for row in found])
        axis.set_xlabel(label)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(rows)), names)
    left.invert_yaxis()
    figure.suptitle(
        f"{result['model']}, batch {result['global_batch_size']}, {result['precision']}, {result['device']}"
    )
    write_png(path, figure)


def write_png(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, open(partial, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def _step_name(row: dict) -> str:
    return (
        f"step: micro_batch_size {row['micro_batch_size']}, activation_checkpointing"
        f" {row['activation_checkpointing']}"
    )


def _path_name(row: dict) -> str:
    return " ".join(filter(None, ("whole path:", row["trainer"], row["options"])))


def _step_cells(row: dict) -> list[str]:
    if row["pairs_per_s"] is None:
        return ["out of memory", *[""] * (len(STEP_COLUMNS) - 1)]
    parts = [
        f"{row[f'{part}_s'] / row['step_s']:.1%}" for part in ("data", "forward", "backward", "optimizer")
    ]
    return [
        f"{row['pairs_per_s']:.4g}",
        f"{row['share_of_peak']:.1%}",
        f"{row['step_s']:.4g} s",
        *parts,
        f"{row['peak_memory_gb']:.2f} GB",
    ]


def _path_cells(row: dict, ours: float | None) -> list[str]:
    if row["pairs_per_s"] is None:
        return ["out of memory", *[""] * (len(PATH_COLUMNS) - 1)]
    speeds = [f"{row[name]:.4g}" for name in ("pairs_per_s", "slowest", "fastest")]
    ratio = f"{ours / row['pairs_per_s']:.2f} x" if ours else ""
    cpu = f"{1e3 * row['cpu_s_per_pair']:.1f}"
    return [speeds[0], ratio, *speeds[1:], cpu, f"{row['data_share']:.1%}", f"{row['peak_memory_gb']:.2f} GB"]


def padded_table(title: str, columns: tuple[str, ...], rows: dict[str, list[str]]) -> list[str]:
    """Lines of Markdown that stand well in a terminal too: a row under its name for each of `rows`, whose
    names `title` heads.
    """
    cells = [[title, *columns], *([name, *row] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    return markdown_table(padded).splitlines()


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
