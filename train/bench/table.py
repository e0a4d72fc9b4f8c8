"""Results of train.bench as tables, and as a plot of the same rows."""

from pathlib import Path

from data_prep.atomic import atomic_file
from data_prep.tables import markdown_table

OURS, PEER = "#1f77b4", "#ff7f0e"
STEP_COLUMNS = ("pairs/s", "share of peak", "step", "data", "forward", "backward", "optimizer", "memory")
PATH_COLUMNS = ("pairs/s", "to ours", "slowest", "fastest", "CPU ms/pair", "data wait", "memory")


def table(result: dict) -> str:
    """What was measured and where, then a Markdown table with a line per row."""
    lines = [f"{name:22} {_shown(value)}" for name, value in result.items() if not isinstance(value, list)]
    steps = [[_step_name(row), *_step_cells(row)] for row in result["steps"]]
    lines += ["", markdown_table(("one step", *STEP_COLUMNS), steps)]
    if result["whole_path"]:
        ours = result["whole_path"][0]["pairs_per_s"]
        paths = [[_path_name(row), *_path_cells(row, ours)] for row in result["whole_path"]]
        lines += ["", markdown_table(("whole path", *PATH_COLUMNS), paths)]
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Draw a bar per row: pairs/s on the left, peak memory on the right."""
    from matplotlib.figure import Figure

    rows = [(_step_name(row), row, OURS) for row in result["steps"]]
    rows += [
        (_path_name(row), row, OURS if row["trainer"] == "ours" else PEER) for row in result["whole_path"]
    ]
    names, measured, colors = zip(*rows, strict=True)
    figure = Figure(figsize=(12, 1.3 + 0.32 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, key, label in (left, "pairs_per_s", "pairs/s"), (right, "peak_memory_gb", "peak memory, GB"):
        bars = axis.barh(range(len(rows)), [row[key] or 0 for row in measured], color=colors)
        axis.bar_label(bars, [f" {row[key]:.3g}" if row[key] else " out of memory" for row in measured])
        axis.set_xlabel(label)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(rows)), names)
    left.invert_yaxis()
    figure.suptitle(
        f"{result['model']}, batch {result['global_batch_size']}, {result['precision']}, {result['device']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _step_name(row: dict) -> str:
    name = (
        f"step: micro_batch_size {row['micro_batch_size']}, activation_checkpointing"
        f" {row['activation_checkpointing']}"
    )
    if "tokens" not in row:  # out of memory
        return name
    least, most = row["tokens"]
    compiles = f", compiled {row['compiled']} graphs meanwhile" if row["compiled"] else ""
    return f"{name}, captions of {least if least == most else f'{least} to {most}'} tokens{compiles}"


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


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
