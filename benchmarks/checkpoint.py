"""How long a step waits for a checkpoint, and how much slower steps are while it is written; beside a save
that training waits for.

    python -m benchmarks.checkpoint                          the rows of checkpoint.md
    python -m benchmarks.checkpoint --only ViT-B-32 --folder /disk/to/measure

Full-size models with random weights, the loop's own step and train.run.folder's own save, on a GPU if there
is one."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import tyro

ROWS = [("ViT-B-32:none", 2, "none"), ("ViT-L-14:none", 1, "checkpoint")]  # model, batch on a CPU, memory
GPU_BATCH = 64
QUIET_STEPS = 5


def row(model: str, batch: int, memory: str, folder: str, alone: bool) -> dict:
    """Steps, saves and steps in this process, in a run of its own in `folder`; seconds, and bytes written."""
    import torch

    from train.data.loader import Batch
    from train.model.clip import load
    from train.optim import build_optimizer
    from train.recipe import Recipe
    from train.retain.select import Selection, WeightSelector
    from train.run.folder import Run
    from train.step import backward
    from train.world import World

    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    batch = GPU_BATCH if world.device.type == "cuda" else batch
    recipe = Recipe(model, "none", f"{folder}/run", batch=batch, keep_checkpoints=1)
    clip = load(model)
    apply_checkpointing(clip.towers.model, memory, compiled=False)
    clip.towers.bf16 = world.device.type == "cuda"
    clip.towers.to(world.device).train()
    optimizer = build_optimizer(clip.towers, recipe.optim)
    choice = WeightSelector(clip, recipe)
    images = torch.randint(0, 256, (batch, 3, *clip.image_size), dtype=torch.uint8)
    tokens, ids = (
        torch.randint(1, 49000, (batch, 77), device=world.device),
        torch.arange(2 * batch, device=world.device).view(batch, 2),
    )
    data = Batch(images.to(world.device), tokens, torch.zeros(batch, 0), ids)
    run, samples = Run(recipe, world), 0

    def step() -> tuple[float, float, float]:
        """Seconds; those in which this thread computed; those in which it waited, but not for a core: for
        Python, the copy, a disk.
        """
        nonlocal samples
        started, before = time.perf_counter(), _scheduled()
        backward(clip.towers, data, batch, world, 0, samples)
        torch.nn.utils.clip_grad_norm_(clip.towers.parameters(), 1.0).item()  # waits for the device
        run.writer.wait_for_snapshot()
        optimizer.step()
        optimizer.zero_grad()
        samples += batch
        run.beat(samples)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, (cpu_s, queued_s) = time.perf_counter() - started, _scheduled()
        return seconds, cpu_s - before[0], seconds - (cpu_s - before[0]) - (queued_s - before[1])

    def copy_alone() -> float:
        """What a step would wait that has nothing to compute meanwhile."""
        started = time.perf_counter()
        run.writer.snapshot.begin(choice.kept, optimizer)()
        return time.perf_counter() - started

    started = time.perf_counter()
    run.start(choice, optimizer)
    found = {
        "model": model,
        "device": world.device.type,
        "batch": batch,
        "reserve_s": time.perf_counter() - started,
    }
    step()
    found["copy_alone_s"] = median(copy_alone() for _ in range(3))
    if alone:
        run.close()
        return found
    with run:
        found["quiet_steps_s"] = [step() for _ in range(QUIET_STEPS)]
        for name in ("first_", ""):
            run.save(choice, optimizer, samples, Selection())
            steps = [step()]
            stall_s = run.writer.times.pop("time/save_stall_s")
            while not run.writer.writing.done():
                steps.append(step())
            run.wait()
            found |= {f"{name}stall_s": stall_s, f"{name}write_s": run.writer.times.pop("time/save_write_s")}
            found |= {f"{name}steps_while_writing_s": steps}
        run.writer.snapshot = None  # what was done before: the live tensors are written, and training waits
        started = time.perf_counter()
        run.save(choice, optimizer, samples + 1, Selection())
        run.wait()
        found["synchronous_s"] = time.perf_counter() - started
    found["quiet_steps_after_s"] = [step() for _ in range(QUIET_STEPS)]
    found["written_gb"] = sum(file.stat().st_size for file in run.checkpoint.iterdir()) / 1e9
    run.close()
    return found


def _scheduled() -> tuple[float, float]:
    """Seconds that this thread has computed, and seconds that it was ready to and had no core; Linux says so."""
    computed, queued, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return int(computed) / 1e9, int(queued) / 1e9


def main(only: str = "", folder: Path | None = None, alone: bool = False) -> None:
    """Each model in a process of its own.

    Args:
        only: A part of the models' names.
        folder: On the disk to measure; a temporary one by default.
        alone: The copy alone, without a disk and with one step.
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
            found = json.loads(done.stdout.splitlines()[-1], parse_float=lambda text: round(float(text), 3))
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
