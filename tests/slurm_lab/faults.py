"""Faults of the machine, one after the other in one training without Slurm: nothing is lost, and the log
names each.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm_lab.fixtures import (
    ROOT,
    THREADS,
    TRAIN_MODULE,
    Fixtures,
    kind_of,
    logged,
    nonfinite_samples,
    weights_sha256,
)

FAULTS, EPOCHS, BATCH_SIZE, STEPS_PER_EPOCH = 20, 40, 16, 10
DISK_MB = 96


@dataclass
class FaultyTraining:
    """A training in which faults are caused.

    Attributes:
        nan: samples seen before the steps whose gradient is not a number; see fault_injection.
        expected: words that its log must contain in the end, one for each fault.
    """

    fixtures: Fixtures
    run: Path
    data: Path
    nan: str
    expected: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.fixtures.folder / f"{self.run.name}.log"

    def start(self, step_s: float = 0.05) -> subprocess.Popen:
        """Start or resume the training; each step takes `step_s` seconds longer."""
        flags = ["--data", self.data, "--run", self.run, "--epochs", str(EPOCHS)]
        command = [sys.executable, "-m", TRAIN_MODULE, self.fixtures.recipe, *flags]
        environment = {**os.environ, **THREADS, "LAB_STEP_S": str(step_s), "LAB_NAN": self.nan}
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("samples-*"))

    def start_and_progress(self) -> subprocess.Popen:
        """Start the training, and wait until it has written two more checkpoints."""
        newest = self.checkpoints()[-1:]
        process, deadline = self.start(), time.monotonic() + 300
        for _ in range(2):
            while self.checkpoints()[-1:] == newest:
                assert process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.02)
            newest = self.checkpoints()[-1:]
        return process

    def assert_exits(self, process: subprocess.Popen, code: int, words: str) -> None:
        """Wait for the end of the process; its log must contain `words`."""
        actual = process.wait(300)
        assert actual == code, f"exit code {actual}, {code} expected\n{self.log.read_text()[-3000:]}"
        self.expected.append(words)


def terminated(training: FaultyTraining, rng: random.Random) -> None:
    process = training.start_and_progress()
    time.sleep(rng.uniform(0, 1))
    process.send_signal(signal.SIGTERM)
    training.assert_exits(process, 0, "stopped after")


def killed_worker(training: FaultyTraining, rng: random.Random) -> None:
    process = training.start_and_progress()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") for pid in children}
    workers = [pid for pid, line in lines.items() if kind_of(pid, line.decode()) == "a worker"]
    os.kill(rng.choice(workers), signal.SIGKILL)
    training.assert_exits(process, 1, "a worker process that reads images was killed")


def truncated_checkpoint(training: FaultyTraining, rng: random.Random) -> None:
    process = training.start_and_progress()
    process.kill()
    process.wait()
    newest = training.checkpoints()[-1]
    file = rng.choice(sorted(newest.iterdir()))
    os.truncate(file, rng.randrange(file.stat().st_size))
    training.expected.append(f"{newest.name} is damaged")


def corrupt_shards(training: FaultyTraining, _: random.Random) -> None:
    """All of them: whichever samples are read first."""
    shards = {shard: shard.read_bytes() for shard in (training.data / "train").glob("*.tar")}
    for shard, content in shards.items():
        shard.write_bytes(bytes(byte ^ 1 for byte in content))
    training.assert_exits(training.start(), 2, ": altered since it was built")
    for shard, content in shards.items():
        shard.write_bytes(content)


def full_disk(training: FaultyTraining, rng: random.Random) -> None:
    process = training.start_and_progress()
    time.sleep(rng.uniform(0, 1))
    filler = training.run / "filler.partial"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:  # until the disk is full
            file.write(bytes(1 << 16))
    training.assert_exits(process, 1, "No space left on device")
    filler.unlink()


FAULT_TYPES: tuple[Callable, ...] = (
    terminated,
    killed_worker,
    truncated_checkpoint,
    corrupt_shards,
    full_disk,
)


def faults(fixtures: Fixtures) -> str:
    """Twenty faults in one run without Slurm: non-finite steps, damaged files, a full disk, SIGTERM, a
    killed worker.
    """
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    drawn = Counter(rng.choice(["nan", *(fault.__name__ for fault in FAULT_TYPES)]) for _ in range(FAULTS))
    steps = rng.sample(range(EPOCHS * STEPS_PER_EPOCH), drawn["nan"])
    nan_samples = [BATCH_SIZE * step for step in sorted(steps)]
    nan = " ".join(map(str, nan_samples))
    data = shutil.copytree(fixtures.shards, fixtures.folder / "faults-shards")
    reference = FaultyTraining(fixtures, fixtures.folder / "faults-undisturbed", data, nan)
    assert reference.start(step_s=0).wait(1500) == 0, reference.log.read_text()[-3000:]
    with small_disk(fixtures.folder / "small") as disk:
        training = FaultyTraining(fixtures, disk / "faults", data, nan)
        training.start_and_progress().kill()
        causes = [cause for cause in FAULT_TYPES for _ in range(drawn[cause.__name__])]
        rng.shuffle(causes)
        for cause in causes:
            cause(training, rng)
        assert training.start(step_s=0).wait(1500) == 0, training.log.read_text()[-3000:]
        log = training.log.read_text()
        missing = [words for words in training.expected if words not in log]
        assert not missing, f"seed {seed}: not in the log: {missing}\n{log[-3000:]}"
        assert nonfinite_samples(training.run) == nan_samples, f"seed {seed}"
        assert weights_sha256(training.run) == weights_sha256(reference.run), f"seed {seed}"
        assert logged(training.run) == logged(reference.run), f"seed {seed}"
    what = ", ".join(f"{count} x {name}" for name, count in sorted(drawn.items()))
    return f"{FAULTS} faults ({what}), all named, seed {seed}"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A folder on a file system of DISK_MB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
