"""How long a step waits for a checkpoint, and how much slower steps are while it is written; beside a save
that training waits for.

    python -m benchmarks.checkpoint                          the rows of checkpoint.md
    python -m benchmarks.checkpoint --only ViT-B-32 --folder /disk/to/measure

Full-size models with random weights, the loop's own step and train.run.folder's own save, on a GPU if there
is one.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import tyro

ROWS = [("ViT-B-32:none", 2, "none"), ("ViT-L-14:none", 1, "full")]  # model, batch on a CPU, checkpointing
GPU_BATCH = 64
QUIET_STEPS = 5


class Steps:
    """The loop's train_step on one batch of noise, timed."""

    def __init__(self, recipe, world):
        """Args:
        recipe: whose data are shards; one batch is read from them, and its images are used in every step.
        """
        from train.run.folder import Run
        from train.setup import setup

        self.run = Run(recipe, world)
        self.state = setup(recipe, self.run, world)
        self.state.towers.train()
        self.batch = next(self.state.batches)
        started = time.perf_counter()
        self.run.start(self.state)
        self.start_s = time.perf_counter() - started

    def __call__(self) -> tuple[float, float, float]:
        """Seconds; those in which this thread computed; those in which it waited, but not for a core: for
        Python, the copy, a disk.
        """
        import torch

        from train.step import train_step

        started, before = time.perf_counter(), _scheduled()
        train_step(self.state, self.batch)
        self.run.write_progress(self.state.samples)
        if self.state.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, (cpu_s, queued_s) = time.perf_counter() - started, _scheduled()
        return seconds, cpu_s - before[0], seconds - (cpu_s - before[0]) - (queued_s - before[1])

    def copy_s(self) -> float:
        """How long a step would wait that has nothing to compute meanwhile."""
        started = time.perf_counter()
        self.run.writer.snapshot.begin(self.state.selector.resumable, self.state.optimizer)()
        return time.perf_counter() - started

    def save(self) -> dict:
        """A save, and steps until it is written."""
        from train.retain.select import Selection

        self.run.save(self.state, Selection())
        steps = [self()]
        stall_s = self.run.writer.times.pop("time/save_stall_s")
        while not self.run.writer.writing.done():
            steps.append(self())
        self.run.wait()
        write_s = self.run.writer.times.pop("time/save_write_s")
        return {"stall_s": stall_s, "write_s": write_s, "steps_while_writing_s": steps}

    def synchronous_save_s(self) -> float:
        """A save that training waits for: without a snapshot, the live tensors are written."""
        from train.retain.select import Selection

        self.run.writer.snapshot = None
        self()  # a checkpoint of its own, after other pairs
        started = time.perf_counter()
        self.run.save(self.state, Selection())
        self.run.wait()
        return time.perf_counter() - started


def row(model: str, batch: int, checkpointing: str, folder: str, alone: bool, data: str = "") -> dict:
    """Steps, saves and steps in this process, in a run of its own in `folder`; seconds, and bytes written.

    Args:
        data: shards to read a batch from; "" draws some.
    """
    import torch

    from train.recipe import Recipe
    from train.world import World

    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    batch = GPU_BATCH if world.device.type == "cuda" else batch
    steps = Steps(
        Recipe(
            model,
            data or drawn(folder),
            f"{folder}/run",
            epochs=1000,
            global_batch_size=batch,
            micro_batch_size=batch,
            precision="bf16" if world.device.type == "cuda" else "fp32",
            activation_checkpointing=checkpointing,
            workers=0,
            keep_checkpoints=1,
        ),
        world,
    )
    result = {"model": model, "device": world.device.type, "batch": batch, "allocate_s": steps.start_s}
    steps()
    result["copy_alone_s"] = median(steps.copy_s() for _ in range(3))
    if not alone:
        with steps.run:
            result["quiet_steps_s"] = [steps() for _ in range(QUIET_STEPS)]
            result |= {f"first_{name}": value for name, value in steps.save().items()}
            result |= steps.save()
            result["synchronous_s"] = steps.synchronous_save_s()
        result["quiet_steps_after_s"] = [steps() for _ in range(QUIET_STEPS)]
        result["written_gb"] = sum(file.stat().st_size for file in steps.run.checkpoint.iterdir()) / 1e9
    steps.run.close()
    return result


def drawn(folder: str) -> str:
    """Shards of a batch of icons."""
    from benchmarks.data_prep import draw_icon, make
    from benchmarks.loader import build

    make(Path(folder, "icons"), draw_icon, GPU_BATCH, "png")
    build(Path(folder, "icons"), Path(folder, "shards"))
    return f"{folder}/shards"


def _scheduled() -> tuple[float, float]:
    """Seconds in which this thread computed, and in which it was ready and had no core; from Linux."""
    computed, queued, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return int(computed) / 1e9, int(queued) / 1e9


def main(only: str = "", folder: Path | None = None, alone: bool = False) -> None:
    """Measure each model in its own process.

    Args:
        only: A part of the models' names.
        folder: On the disk to measure; the default is a temporary one.
        alone: Only the copy, without a disk and with one step.
    """
    for arguments in ROWS:
        if only in arguments[0]:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                code = (
                    "import json; from benchmarks.checkpoint import row;"
                    f" print(json.dumps(row(*{arguments!r}, {place!r}, {alone})))"
                )
                done = subprocess.run(
                    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
                )
            result = json.loads(done.stdout.splitlines()[-1], parse_float=lambda text: round(float(text), 3))
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
