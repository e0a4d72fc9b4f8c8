"""What a run has written about itself, read back: of the right shape, or a sentence that names the file."""

import hashlib
import json
import math
import re
from pathlib import Path

from data_prep.errors import UserError

CHECKPOINT = re.compile("samples-[0-9]{1,18}")


def read_status(run: Path) -> dict:
    """status.json; {} where there is none, or a damaged one: a running run writes it again."""
    try:
        found = _json(run / "status.json")
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(found, dict) and isinstance(found.get("state"), str)
    return found if is_ours and _is_count(found.get("samples")) else {}


def read_environment(run: Path) -> dict:
    """environment.json; {} where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = run / "environment.json"
    try:
        found = _json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(found, dict) or not isinstance(found.get("fitted", {}), dict):
        raise _damaged(path, "not the environment of a run")
    return found


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: damaged ({why}); it says what the run was started with: restore it from a copy, or pass"
        " another --run"
    )


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of metrics.jsonl or nonfinite_steps.jsonl; a kill may have cut the last one.

    Raises:
        UserError: a line is not what a run writes.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 ({error.reason}); restore it from a copy") from None
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not _is_count(found.get("samples")):
            raise UserError(f"{path}:{number}: not a line that a run writes ({line:.60}); remove this line")
        lines.append(found)
    return lines


def seal(state: dict) -> str:
    """The sha256 of a checkpoint's state.json without its "state_sha256"."""
    covered = {name: value for name, value in state.items() if name != "state_sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def read_state(checkpoint: Path) -> dict:
    """state.json of a checkpoint.

    Raises:
        ValueError: it is damaged: not JSON, of another shape, or changed since it was written.
        OSError: it cannot be read.
    """
    state = _json(checkpoint / "state.json")
    if not isinstance(state, dict):
        raise ValueError("state.json is no object")
    wrong = [name for name, is_valid in STATE.items() if not is_valid(state.get(name))]
    if wrong:
        raise ValueError(f"state.json has no valid {', '.join(wrong)}")
    # A checkpoint of an earlier version has no seal.
    if state.get("state_sha256", seal(state)) != seal(state):
        raise ValueError("state.json has changed since it was written")
    if CHECKPOINT.fullmatch(checkpoint.name) and int(checkpoint.name[8:]) != state["samples"]:
        raise ValueError(f"state.json is of {state['samples']} samples")
    return state


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_score(value: object) -> bool:
    """None, or a train.retain.select.Score."""
    return value is None or (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], bool) and _is_number(value[1])
    )


def _is_digests(value: object) -> bool:
    """File names, never paths, and their sha256."""
    return isinstance(value, dict) and all(
        name not in ("", ".", "..") and "/" not in name and isinstance(digest, str)
        for name, digest in value.items()
    )


STATE = {
    "samples": _is_count,
    "score": _is_score,
    "best": _is_score,
    "best_checkpoint": lambda value: isinstance(value, str) and CHECKPOINT.fullmatch(value) is not None,
    "rolled_back": lambda value: isinstance(value, bool),
    "weights": lambda value: value is None or isinstance(value, str),  # None of an earlier version
    "initial_retention": lambda value: value is None or _is_number(value),
    "sha256": _is_digests,
}
