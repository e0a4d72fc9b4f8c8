"""Does each command work on this device, and does a killed and resumed run equal an uninterrupted one?"""

import json
import time
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.gpu.record import Record, Started, kill
from benchmarks.gpu.sizes import Sizes
from train.retain.select import prefix
from train.run.records import read_metrics, read_state

PART = "smoke"


def smoke(record: Record, sizes: Sizes, data: str) -> None:
    """Four runs at once, as nothing is timed: two are killed after their first checkpoint and resumed."""
    names = [f"{kind}{which}" for kind in ("", "deterministic-") for which in ("whole", "cut")]
    running = {name: record.start(f"train-{name}", train_words(record, sizes, data, name)) for name in names}
    waiting = {name for name in names if name.endswith("cut")}
    while waiting and record.left_s > 0:
        for name in list(waiting):
            if list((record.out / "runs" / name / "checkpoints").glob("samples-*")):
                kill(running[name])
                running[name] = record.start(f"train-{name}-resumed", train_words(record, sizes, data, name))
                waiting.remove(name)
            elif running[name].process.poll() is not None:
                waiting.remove(name)  # its error is noted below
        time.sleep(0.05)
    for name, started in running.items():
        record.note(PART, f"train {name}", **record.end(started))
    for kind in ("", "deterministic-"):
        found = isolated(lambda kind=kind: differences(record.out / "runs", f"{kind}whole", f"{kind}cut"))
        record.note(PART, f"resumed equals uninterrupted{', deterministic' if kind else ''}", **found)


def train_words(record: Record, sizes: Sizes, data: str, name: str, **more) -> list:
    options = {
        "model": sizes.small,
        "data": data,
        "run": record.out / "runs" / name,
        "epochs": 2,
        "global-batch-size": sizes.smoke_batch,
        "micro-batch-size": sizes.smoke_batch // 2,
        "activation-checkpointing": "none",
        "workers": sizes.workers // 4 or 1,
        "log-every-steps": 5,
        "ema": 0.99,
        "wise-ft": 0.5,
        **more,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    return ["-m", "train", *words, *(["--deterministic"] if name.startswith("deterministic") else [])]


def differences(runs: Path, one: str, other: str) -> dict:
    """The largest difference between the weights, and between their averages, at the end of two runs."""
    ends = [max((runs / name / "checkpoints").glob("samples-*")) for name in (one, other)]
    found, equal = {}, ends[0].name == ends[1].name
    for file in sorted(path.name for path in ends[0].glob("*.safetensors")):
        before, after = (load_file(end / file) for end in ends)
        found[file.partition(".")[0]] = max(
            (before[name].double() - after[name].double()).abs().max().item() for name in before
        )
        equal &= all(before[name].equal(after[name]) for name in before)
    return {"equal": equal, "largest difference": found, "at": [end.name for end in ends]}


def commands(record: Record, sizes: Sizes, data: str) -> None:
    """Evaluation, export and an index of the first run; a rank of torchrun; DDP on one rank. All at once."""
    run, result = record.out / "runs" / "whole", record.out / "retrieval.json"
    few = ["--workers", sizes.workers // 4 or 1]
    one_rank = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "--"]
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # the machine may have no network
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", **loopback}
    running: list[Started] = [
        record.start(
            "eval retrieval",
            ["-m", "eval", "retrieval", run, "--data", data, "--split", "val", "--json", result, *few],
        ),
        record.start("train.export", ["-m", "train.export", run, "--out", record.out / "exported"]),
        record.start(
            "eval embed", ["-m", "eval", "embed", run, "--data", data, "--out", record.out / "index", *few]
        ),
        record.start(
            "one rank of torchrun",
            [*one_rank, *train_words(record, sizes, data, "torchrun", epochs=1, compile="never")[1:]],
            **loopback,
        ),
        record.start(
            "DDP on one rank",
            ["-m", "benchmarks.gpu.ddp", record.out, record.deadline, sizes.small, data, sizes.smoke_batch],
            MASTER_PORT="29777",
            **alone,
        ),
    ]
    for started in running:
        record.note(PART, started.name, **record.end(started))
    record.note(PART, "eval retrieval gives training's figure", **isolated(lambda: same_figure(run, result)))


def same_figure(run: Path, result: Path) -> dict:
    """R@1 as training has logged it for the exported weights, and as the command gives it."""
    best = read_state((run / "checkpoints" / "best").resolve())
    key = f"{prefix(best['weights'])}val/image_to_text/R@1"
    logged = [line[key] for line in read_metrics(run / "metrics.jsonl") if line["samples"] == best["samples"]]
    evaluated = json.loads(result.read_text())["metrics"]["image_to_text/R@1"]
    return {"equal": logged[-1] == evaluated, "training": logged[-1], "command": evaluated}


def isolated(check) -> dict:
    """What a check finds, or its error: others follow."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 it is written down
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
