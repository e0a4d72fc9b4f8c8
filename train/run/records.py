"""What a run has written about itself, read back: of the right shape, or a sentence that names the file."""

import hashlib
import json
import math
import re
from datetime import datetime
from pathlib import Path

from data_prep.atomic import local_paths
from data_prep.errors import UserError
from data_prep.strict_json import STRICT, load_json, parse_json, problem_of

DAMAGED = "damaged.jsonl"  # in a run: the damaged samples that were skipped
CHECKPOINT = re.compile("samples-[0-9]{1,18}")


def read_status(run: Path) -> dict:
    """status.json; {} where there is none, or a damaged one: a running run writes it again."""
    try:
        return load_json(run / "status.json", STATUS)
    except (OSError, ValueError):
        return {}


def read_environment(run: Path) -> dict:
    """environment.json; {} where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = run / "environment.json"
    try:
        return load_json(path, ENVIRONMENT)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({error}); it says what the run was started with: restore it from a copy, or"
            " pass another --run"
        ) from None


def run_trained_on(model: str, fingerprint: str) -> Path | None:
    """The run that a MODEL is of, or a folder of weights is in, if it was trained on these shards.

    Args:
        fingerprint: Shards.fingerprint.
    """
    for place in local_paths(model):
        for folder in (place, *place.absolute().parents):
            if (folder / "recipe.yaml").is_file():
                return folder if fingerprint in read_environment(folder).get("data_fingerprint", "") else None
    return None


def other_rounding(before: dict, now: dict) -> list[str]:
    """What differs between two environments that numbers depend on: "number of threads (2 before, 1 now)".

    Args:
        before: of the run; what it does not have is not compared.
    """
    is_cpu = now["device"] == "cpu"
    names = {"device": "device", "world_size": "number of ranks", "cuda": "CUDA", "rocm": "ROCm"}
    names |= {"threads": "number of threads", "cpu": "processor"} if is_cpu else {}
    values = [(text, before[name], now[name]) for name, text in names.items() if name in before]
    if isinstance(packages := before.get("packages"), dict):
        values += [
            (name, packages[name], version) for name, version in now["packages"].items() if name in packages
        ]
    return [f"{text} ({old} before, {new} now)" for text, old, new in values if old != new]


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of metrics.jsonl and files like it; a kill may have cut the last one.

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
            # NaN, which earlier versions wrote, is null
            lines.append(parse_json(line, **STRICT | {"parse_constant": lambda _: None}))
            problem = problem_of(lines[-1], LINE) or problem_of(list(lines[-1].items()), [_is_metric])
        except ValueError as error:
            problem = str(error)
        if problem:
            raise UserError(
                f"{path}:{number}: not a line that a run writes ({problem:.200}); remove this line"
            )
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
    state = load_json(checkpoint / "state.json", dict)
    wrong = [name for name, is_valid in STATE.items() if not is_valid(state.get(name))]
    if wrong:
        raise ValueError(f"state.json has no valid {', '.join(wrong)}")
    # A checkpoint of an earlier version has no seal.
    if state.get("state_sha256", seal(state)) != seal(state):
        raise ValueError("state.json has changed since it was written")
    if CHECKPOINT.fullmatch(checkpoint.name) and int(checkpoint.name[8:]) != state["samples"]:
        raise ValueError(f"state.json is of {state['samples']} samples")
    return state


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


def _is_metric(item: tuple[str, object]) -> bool:
    """A name, and a number or null; the line of a skipped step or sample has texts, and keys."""
    name, value = item
    return value is None or _is_number(value) or (name in SKIPPED and not isinstance(value, dict))


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


SKIPPED = ("loss", "grad_norm", "keys", "shard", "key", "found")
LINE = {"samples": _is_count}  # of metrics.jsonl
STATUS = {"state": str, "samples": _is_count, "time?": _is_time}
ENVIRONMENT = {
    "fitted?": {
        "micro_batch_size?": lambda value: _is_count(value) and value > 0,
        "activation_checkpointing?": lambda value: value in ("none", "selective", "full"),
    },
    "packages?": {str: str},
    "world_size?": int,
    "threads?": int,
    "device?": str,
    "data_fingerprint?": str,
    "git_commit?": (str, type(None)),
}
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
